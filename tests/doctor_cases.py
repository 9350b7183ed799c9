"""Set-ups for the doctor: broken ones with the name of what is wrong, and healthy ones."""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import bert_classifier, disturb, foreign_code, gpt2, llama, t5, token_ids
from torch import nn
from torch.optim import AdamW

import minipeft
from minipeft import LoraConfig, get_lora_model, load_adapter

BROKEN, HEALTHY = {}, {}
RATE = 1e-3
QV = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
GPT2 = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"]}


@dataclass(frozen=True)
class Case:
    """A set-up: what it is, a function that makes the arguments of `diagnose`, and the findings that it must have."""

    what: str
    make: object
    finds: tuple = ()


def broken(what, *finds):
    def register(make):
        BROKEN[what] = Case(what, make, finds)
        return make

    return register


def healthy(what):
    def register(make):
        HEALTHY[what] = Case(what, make)
        return make

    return register


def batch(**more):
    ids = token_ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **more}


def optimizer(model, rate=RATE, kind=AdamW):
    return kind([p for p in model.parameters() if p.requires_grad], lr=rate)


def training(model, rows=None, rate=RATE):
    """A model in training, with its optimizer and a batch."""
    return {"model": model.train(), "batch": batch() if rows is None else rows, "optimizer": optimizer(model, rate)}


def lora(base=None, **options):
    return get_lora_model(gpt2() if base is None else base, LoraConfig(**{**GPT2, **options}))


def peft_lora(base=None, **options):
    import peft

    with foreign_code():
        return peft.get_peft_model(gpt2() if base is None else base, peft.LoraConfig(**{**GPT2, **options}))


def tokenizer(tokens=100, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(tokens)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w1", **special)


def reloaded(model, cls=None, **options):
    """The model as `from_pretrained` gives it, with marks of what its checkpoint held."""
    with tempfile.TemporaryDirectory() as folder, foreign_code():
        model.save_pretrained(folder)
        return (cls or type(model)).from_pretrained(folder, **options)


# Healthy


@healthy("GPT-2, before the first step")
def _():
    return training(lora())


@healthy("Llama, after two steps")
def _():
    model = get_lora_model(llama(), LoraConfig(**QV))
    made = training(model)
    for _ in range(2):
        model(**made["batch"]).loss.backward()
        made["optimizer"].step()
    return made


@healthy("Llama, warm-up of the schedule at rate 0")
def _():
    made = training(get_lora_model(llama(), LoraConfig(**QV, lora_dropout=0.1)))
    torch.optim.lr_scheduler.LambdaLR(made["optimizer"], lambda step: step / 10)
    return made


@healthy("Qwen3, all linear layers")
def _():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 100, "head_dim": 8}
    base = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    return training(get_lora_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")))


@healthy("Mixtral, experts in one parameter")
def _():
    return training(
        get_lora_model(mixtral(), LoraConfig(**QV, target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    )


VIT = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))


def images():
    return {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 2])}


@healthy("ViT classifier")
def _():
    base = vit()
    base.activation_checkpointing_enable({"use_reentrant": True})
    return training(get_lora_model(base, LoraConfig(**VIT)), images())


@healthy("T5")
def _():
    rows = {"input_ids": token_ids(), "labels": token_ids(length=6, seed=3)}
    return training(get_lora_model(t5(), LoraConfig(r=4, lora_alpha=8)), rows)


def classification():
    return {"input_ids": token_ids(), "labels": torch.tensor([0, 2])}


@healthy("BERT classifier with modules_to_save")
def _():
    base = reloaded(bert_classifier().bert, type(bert_classifier()), num_labels=3)
    config = LoraConfig(r=4, lora_alpha=8, modules_to_save=["classifier"], task_type="SEQ_CLS")
    return training(get_lora_model(base, config), classification())


@healthy("NF4 base")
def _():
    return training(get_lora_model(minipeft.quantize(llama(), "nf4"), LoraConfig(**QV)))


@healthy("a base of torchao's int8")
def _():
    return training(get_lora_model(minipeft.quantize(llama(), "int8_weight_only"), LoraConfig(**QV)))


@healthy("lean")
def _():
    return training(minipeft.lean(get_lora_model(llama(), LoraConfig(**QV))))


@healthy("two adapters, one active")
def _():
    model = lora()
    model.add_adapter("other", LoraConfig(**GPT2))
    return training(model)


@healthy("DoRA")
def _():
    return training(lora(use_dora=True, lora_dropout=0.1))


@healthy("GPT-2 with dropout, recomputed")
def _():
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=64))
    base.activation_checkpointing_enable({"use_reentrant": True})
    return training(lora(base))


@healthy("bfloat16 base")
def _():
    return training(get_lora_model(llama().bfloat16(), LoraConfig(**QV)))


@healthy("loaded, trained, for inference")
def _():
    with tempfile.TemporaryDirectory() as folder:
        disturb(lora()).save_pretrained(folder)
        return {"model": load_adapter(gpt2(), folder).eval(), "batch": batch(), "tokenizer": tokenizer()}


@healthy("merged, for inference")
def _():
    model = disturb(lora()).eval()
    model.merge_adapter()
    return {"model": model, "batch": batch()}


@healthy("rows packed as if alone")
def _():
    return training(get_lora_model(llama(), LoraConfig(**QV)), packed(use_cache=False))


@healthy("padding masked by position")
def _():
    return {**training(lora(), padded()), "tokenizer": tokenizer(pad_token="w0", eos_token="w0")}


@healthy("PEFT's own GPT-2")
def _():
    return training(peft_lora())


@healthy("PEFT's own classifier, with DoRA")
def _():
    base = reloaded(bert_classifier().bert, type(bert_classifier()), num_labels=3)
    options = {"target_modules": ["query", "value"], "use_dora": True, "task_type": "SEQ_CLS", "lora_dropout": 0.1}
    return training(peft_lora(base, **options), classification())


@healthy("PEFT's own experts, two adapters")
def _():
    import peft

    config = {**QV, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = peft_lora(mixtral(), **config)
    with foreign_code():
        model.add_adapter("other", peft.LoraConfig(**config))
    return training(model)


@healthy("ours inside a PeftModel")
def _():
    from minipeft.integrations.peft import as_peft_model

    return training(as_peft_model(lora()))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=2))


def padded():
    """Two rows, each with an eos (0) at its end, the second with padding (0) behind it."""
    ids = token_ids()
    ids[0, -1] = 0
    ids[1, 6:] = 0
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(**more):
    ids = token_ids()
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand_as(ids)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.clone(), **more}


# Broken


@broken("a model without adapters", "no-adapter")
def _():
    return {"model": gpt2(), "batch": batch()}


@broken("adapters switched off", "adapters-disabled")
def _():
    made = training(lora())
    made["model"].disable_adapters()
    return made


@broken("PEFT's adapters switched off", "adapters-disabled")
def _():
    made = training(peft_lora())
    made["model"].base_model.disable_adapter_layers()
    return made


@broken("PEFT's model with no adapter active", "no-active-adapter")
def _():
    model = disturb(peft_lora()).eval()
    model.base_model.set_adapter([])
    return {"model": model, "batch": batch()}


@broken("a scale of zero", "scale-zero")
def _():
    made = training(lora())
    made["model"].set_scale("default", 0)
    return made


@broken("an adapter that was never trained, for inference", "adapter-untrained")
def _():
    with tempfile.TemporaryDirectory() as folder, foreign_code():
        lora().save_pretrained(folder)
        return {"model": load_adapter(gpt2(), folder).eval(), "batch": batch()}


@broken("PEFT's adapter whose file did not match", "keys-unmatched")
def _():
    import peft
    from safetensors.torch import load_file, save_file

    folder = tempfile.mkdtemp()
    with foreign_code():
        disturb(lora()).save_pretrained(folder)
        file = Path(folder) / "adapter_model.safetensors"
        save_file({key.replace("transformer.", "model."): value for key, value in load_file(file).items()}, file)
        model = peft.PeftModel.from_pretrained(gpt2(), folder)
    return {"model": model, "batch": batch(), "adapter_dir": folder}


@broken("steps that never reach the adapter", "adapter-unmoved")
def _():
    made = training(lora())
    model, steps = made["model"], made["optimizer"]
    for group in steps.param_groups:
        group["lr"] = 0.0
    model(**made["batch"]).loss.backward()
    for _ in range(2):
        steps.step()
    steps.zero_grad()
    for group in steps.param_groups:
        group["lr"] = RATE
    return made


class Bypass(nn.Module):
    """A model that holds a layer and computes with its weight, taken out before."""

    def __init__(self):
        super().__init__()
        self.used, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, labels):
        logits = self.used(x) + x @ self.other.weight.data.t()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def plain_batch():
    return {"x": torch.randn(4, 8), "labels": torch.arange(4)}


@broken("a layer that is passed by", "layer-not-reached")
def _():
    model = get_lora_model(Bypass(), LoraConfig(r=2, lora_alpha=4, target_modules=["used", "other"]))
    return training(model, plain_batch())


@broken("PEFT's layer whose weight is read", "layer-not-reached")
def _():
    return training(peft_lora(Bypass(), r=2, lora_alpha=4, target_modules=["used", "other"]), plain_batch())


@broken("a merged adapter in training", "merged-in-training")
def _():
    made = training(lora())
    made["model"].merge_adapter()
    return made


@broken("PEFT's merged adapter in training", "merged-in-training")
def _():
    made = training(peft_lora())
    with foreign_code():
        made["model"].merge_adapter()
    return made


@broken("two active adapters that train", "two-adapters-train")
def _():
    model = lora()
    model.add_adapter("other", LoraConfig(**GPT2))
    model.set_adapter(["default", "other"])
    return training(model)


@broken("an adapter loaded without is_trainable", "adapter-frozen")
def _():
    with tempfile.TemporaryDirectory() as folder:
        disturb(lora()).save_pretrained(folder)
        model = load_adapter(gpt2(), folder).train()
    return {"model": model, "batch": batch(), "optimizer": AdamW(model.parameters(), lr=RATE)}


@broken("the optimizer of a copy", "optimizer-of-another-model")
def _():
    model = lora().train()
    return {"model": model, "batch": batch(), "optimizer": optimizer(copy.deepcopy(model))}


@broken("the optimizer made first", "optimizer-before-adapters")
def _():
    base = gpt2()
    steps = AdamW(base.parameters(), lr=RATE)
    return {"model": lora(base).train(), "batch": batch(), "optimizer": steps}


@broken("an adapter added after the optimizer", "not-in-optimizer")
def _():
    made = training(lora())
    group = made["optimizer"].param_groups[0]
    group["params"] = group["params"][2:]
    return made


@broken("a base that trains", "base-trains")
def _():
    model = lora()
    model.transformer.h[0].ln_1.weight.requires_grad_(True)
    return training(model)


@broken("a quantized base whose norms train", "quantized-base-trains")
def _():
    model = get_lora_model(minipeft.quantize(llama(), "nf4"), LoraConfig(**QV))
    model.model.norm.weight.requires_grad_(True)
    return training(model)


@broken("all parameters in the optimizer", "base-in-optimizer")
def _():
    model = lora().train()
    return {"model": model, "batch": batch(), "optimizer": AdamW(model.parameters(), lr=RATE)}


class Detached(Bypass):
    def forward(self, x, labels):
        logits = self.used(x) + self.other(x).detach()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@broken("a gradient that is cut", "no-gradient")
def _():
    model = get_lora_model(Detached(), LoraConfig(r=2, lora_alpha=4, target_modules=["used", "other"]))
    return training(model, plain_batch())


class Checkpointed(Bypass):
    def forward(self, x, labels):
        logits = torch.utils.checkpoint.checkpoint(self.used, x, use_reentrant=True)
        loss = nn.functional.cross_entropy(logits + self.other(x), labels)
        return {"loss": loss, "logits": logits}


@broken("a block of one's own with reentrant checkpointing", "checkpointing-cuts-gradients")
def _():
    model = get_lora_model(Checkpointed(), LoraConfig(r=2, lora_alpha=4, target_modules=["used", "other"]))
    return training(model, plain_batch())


@broken("PEFT's ViT with reentrant checkpointing", "checkpointing-cuts-gradients")
def _():
    model = peft_lora(vit(), **VIT)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": True})
    return training(model, images())


@broken("a learning rate of zero", "learning-rate-zero")
def _():
    return training(lora(), rate=0.0)


@broken("the learning rate of full fine-tuning", "learning-rate-of-full-fine-tuning")
def _():
    return training(lora(), rate=2e-5)


@broken("alpha as large as r squared and more", "scaling-unusual")
def _():
    return training(lora(lora_alpha=1024), rate=1e-5)


@broken("a learning rate that diverges", "step-too-large")
def _():
    return training(lora(), rate=0.3)


@broken("a learning rate that rounds to nothing", "step-too-small")
def _():
    return training(lora(), rate=1e-9)


@broken("an update larger than the weight", "update-too-large")
def _():
    return training(disturb(lora(), scale=0.7), rate=1e-4)


@broken("float16 adapters", "float16-trained")
def _():
    model = get_lora_model(llama().half(), LoraConfig(**QV), autocast_adapter_dtype=False)
    return training(model)


@broken("bfloat16 adapters at a small rate", "update-lost-to-rounding")
def _():
    model = get_lora_model(llama().bfloat16(), LoraConfig(**QV), autocast_adapter_dtype=False)
    return training(model, rate=6e-5)


@broken("an adapter on another device", "mixed-devices")
def _():
    made = training(lora())
    layer = made["model"].transformer.h[0].attn.c_attn
    layer.adapters["default"].to("meta")
    return made | {"optimizer": optimizer(made["model"])}


@broken("PEFT's dropout in evaluation", "dropout-in-eval")
def _():
    return {"model": peft_lora(gpt2().eval(), lora_dropout=0.1), "batch": batch()}


@broken("a model left in evaluation mode", "eval-in-training")
def _():
    model = lora(lora_dropout=0.1, target_modules=["c_attn"])
    model.transformer.drop.p = 0.1
    return training(model) | {"model": model.eval()}


@broken("a new head that nothing trains", "head-untrained")
def _():
    base = reloaded(bert_classifier().bert, type(bert_classifier()), num_labels=3)
    with foreign_code():
        model = get_lora_model(base, LoraConfig(r=4, lora_alpha=8))
    return training(model, classification())


@broken("PEFT's new head that nothing trains", "head-untrained")
def _():
    base = reloaded(bert_classifier().bert, type(bert_classifier()), num_labels=3)
    return training(peft_lora(base, target_modules=["query", "value"]), classification())


@broken("an adapter of another base", "other-base")
def _():
    model = lora(reloaded(gpt2()), base_model_name_or_path="openai-community/gpt2-large")
    return training(model)


@broken("PEFT's trained copy of a tied embedding", "tie-broken")
def _():
    return training(peft_lora(gpt2(), modules_to_save=["wte"]))


@broken("labels that are all ignored", "labels-all-ignored")
def _():
    return training(lora(), batch(labels=torch.full((2, 12), -100)))


@broken("labels shifted by hand", "labels-shifted-twice")
def _():
    ids = token_ids()
    return training(lora(), batch(labels=torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)))


@broken("labels on the padding", "padding-in-loss")
def _():
    rows = padded()
    return training(lora(), rows | {"labels": rows["input_ids"].clone()})


@broken("labels on the padding, and no mask", "padding-in-loss")
def _():
    ids = token_ids()
    ids[1, 7:] = 2
    rows = {"input_ids": ids, "labels": ids.clone()}
    return training(lora(), rows) | {"tokenizer": tokenizer(pad_token="w2", eos_token="w0")}


@broken("labels of T5 on the padding", "padding-in-loss")
def _():
    labels = token_ids(length=6, seed=3)
    labels[1, 4:] = 0
    return training(get_lora_model(t5(), LoraConfig(r=4, lora_alpha=8)), {"input_ids": token_ids(), "labels": labels})


@broken("pad = eos, and eos masked", "eos-never-learnt")
def _():
    rows = padded()
    rows["labels"] = rows["input_ids"].masked_fill(rows["input_ids"] == 0, -100)
    return training(lora(), rows) | {"tokenizer": tokenizer(pad_token="w0", eos_token="w0")}


@broken("packed rows with a mask of ones", "packing-leaks")
def _():
    return training(
        get_lora_model(llama(), LoraConfig(**QV)), packed(attention_mask=torch.ones(2, 12, dtype=torch.int64))
    )


@broken("a tokenizer with more tokens than the table", "tokenizer-too-large")
def _():
    return training(lora()) | {"tokenizer": tokenizer(104)}


@broken("new tokens whose rows stay", "new-tokens-untrained")
def _():
    folder = tempfile.mkdtemp()
    gpt2().save_pretrained(folder)
    with foreign_code():
        base = type(gpt2()).from_pretrained(folder)
        base.resize_token_embeddings(102)
        return training(lora(base)) | {"tokenizer": tokenizer(102)}


@broken("chats without a template", "no-chat-template")
def _():
    tokens = tokenizer(99)
    tokens.add_tokens(["<|im_start|>"], special_tokens=True)
    rows = batch()
    rows["input_ids"][:, 0] = rows["labels"][:, 0] = 99
    return training(lora(), rows) | {"tokenizer": tokens}


@broken("a NaN in the base", "nan-in-base")
def _():
    base = gpt2()
    base.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("nan")
    return training(lora(base))


@broken("an infinity in an adapter", "nan-in-adapter")
def _():
    model = lora()
    model.transformer.h[0].attn.c_attn.adapters["default"].lora_A.data[0, 0] = float("inf")
    return training(model)


@broken("an overflow in a layer", "nan-in-output")
def _():
    base = gpt2()
    base.transformer.h[1].ln_1.weight.data.fill_(3e38)
    return training(lora(base, target_modules=["c_fc"]))


class RootOfZero(Bypass):
    def forward(self, x, labels):
        logits = self.used(x) + self.other(x)
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss + (logits - logits.detach()).square().sum().sqrt(), "logits": logits}


@broken("a gradient that is not finite", "nan-in-gradient")
def _():
    model = get_lora_model(RootOfZero(), LoraConfig(r=2, lora_alpha=4, target_modules=["used", "other"]))
    return training(model, plain_batch())

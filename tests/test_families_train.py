"""Tiny random models of many families, adapted, trained, merged and saved, beside PEFT on the same weights."""

import copy
import functools

import pytest
import torch
import transformers
from fast_copy import Template
from rotation import often
from tiny_models import foreign_code
from torch import nn

from minipeft import LoraConfig, get_lora_model, load_adapter

with foreign_code():
    import peft

TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, **TEXT}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, **TEXT}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "max_position_embeddings": 32,
    **TEXT,
}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0, **TEXT}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
}
CAUSAL, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"
SEQ2SEQ, PLAIN = "AutoModelForSeq2SeqLM", "AutoModel"

# model_type: the kind of model, and its configuration
FAMILIES = {
    "gpt2": (CAUSAL, GPT2),
    "gpt_neo": (
        CAUSAL,
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], **TEXT},
    ),
    "gpt_neox": (CAUSAL, SMALL),
    "gptj": (CAUSAL, {**GPT2, "rotary_dim": 8}),
    "gpt_bigcode": (CAUSAL, GPT2),
    "opt": (CAUSAL, {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": (CAUSAL, {"hidden_size": 32, "n_layer": 2, "n_head": 2, **TEXT}),
    "falcon": (CAUSAL, SMALL),
    "llama": (CAUSAL, GROUPED),
    "mistral": (CAUSAL, GROUPED),
    "mixtral": (CAUSAL, {**GROUPED, **EXPERTS}),
    "qwen2": (CAUSAL, GROUPED),
    "qwen3": (CAUSAL, GROUPED),
    "qwen3_moe": (
        CAUSAL,
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "gemma": (CAUSAL, GROUPED),
    "gemma2": (CAUSAL, GROUPED),
    "gemma3_text": (CAUSAL, GROUPED),
    "phi": (CAUSAL, SMALL),
    "phi3": (CAUSAL, SMALL),
    "stablelm": (CAUSAL, {**SMALL, "num_key_value_heads": 2}),
    "starcoder2": (CAUSAL, GROUPED),
    "bert": (MASKED, SMALL),
    "roberta": (MASKED, SMALL),
    "electra": (MASKED, {**SMALL, "embedding_size": 16}),
    "albert": (MASKED, {**SMALL, "embedding_size": 16}),
    "distilbert": (MASKED, {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, **TEXT}),
    "deberta-v2": (MASKED, {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "mpnet": (MASKED, SMALL),
    "modernbert": (MASKED, {**SMALL, "cls_token_id": 1, "sep_token_id": 2}),
    "t5": (SEQ2SEQ, T5),
    "bart": (SEQ2SEQ, BART),
    "mbart": (SEQ2SEQ, BART),
    "pegasus": (SEQ2SEQ, BART),
    "vit": (PLAIN, IMAGE),
    "clip": (
        PLAIN,
        {
            "text_config": {**SMALL, "projection_dim": 16},
            "vision_config": {**IMAGE, "projection_dim": 16},
            "projection_dim": 16,
        },
    ),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        {**BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
    ),
}
# PEFT 0.21.2 rewrites the targets of a model whose experts transformers 5 has fused, and loses its own default on the way:
# `get_peft_model(mixtral, LoraConfig())` raises NoMatchingPeftModuleError.
NO_DEFAULT_IN_PEFT = {"mixtral"}


def family(model_type):
    """A tiny random model in eval mode, always the same; no bias and no scale is at its neutral value."""
    return _made(model_type).copy()


@functools.lru_cache(maxsize=1)
def _made(model_type):
    kind, options = FAMILIES[model_type]
    with foreign_code(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(options))
        config._attn_implementation = "eager"
        model = getattr(transformers, kind).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return Template(model.eval())


def inputs(model_type):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 6), generator=generator)
    kind = FAMILIES[model_type][0]
    if model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if model_type == "clip":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "input_ids": ids}
    if model_type == "whisper":
        return {"input_features": torch.randn(2, 8, 16, generator=generator), "decoder_input_ids": ids}
    return {"input_ids": ids, **({"decoder_input_ids": ids} if kind == SEQ2SEQ else {})}


def output(model, model_type):
    """The first floating-point output of the model, logits or hidden states."""
    with foreign_code():
        values = model(**inputs(model_type))
    return next(v for v in values.values() if isinstance(v, torch.Tensor) and v.is_floating_point())


def train_step(model, model_type):
    """One step of gradient descent in training mode, dropout and all; returns the gradients by PEFT's names."""
    torch.manual_seed(4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.cos(output(model.train(), model_type)).sum().backward()
    gradients = {file_name(name): p.grad.clone() for name, p in trained.items()}
    torch.optim.SGD(trained.values(), lr=0.05).step()
    model.eval().zero_grad()
    return gradients


def file_name(name):
    """A parameter's name, ours or PEFT's, as the key of a file."""
    ours = name.replace(".adapters.default.lora_A", ".lora_A.weight").replace(
        ".adapters.default.lora_B", ".lora_B.weight"
    )
    theirs = (
        ours.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.").removesuffix(".default")
    )
    return theirs if theirs.startswith("base_model.model.") else f"base_model.model.{theirs}"


@torch.no_grad()
def move(model):
    """Move ours as training would; returns the values by PEFT's names."""
    generator = torch.Generator().manual_seed(2)
    tensors = model.adapter_state_dict()
    for tensor in tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def theirs_with(model_type, values, targets):
    """PEFT's model with the same adapter, on its own default targets where it has them, else on ours."""
    known = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    default = model_type in known and model_type not in NO_DEFAULT_IN_PEFT
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=None if default else targets)
    with foreign_code():
        model = peft.get_peft_model(family(model_type), config).eval()
    own = {file_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    assert set(own) == set(values), "the adapters are on other modules than PEFT's"
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(values[key])
    return model


def close(got, wanted, rounding=2e-5):
    """Whether they are equal but for rounding, measured against the largest value."""
    scale = wanted.abs().max().clamp_min(1e-6)
    assert float((got - wanted).detach().abs().max() / scale.detach()) <= rounding


ALWAYS = (
    "gpt2",
    "gpt_neox",
    "bloom",
    "llama",
    "mixtral",
    "qwen3_moe",
    "gemma3_text",
    "phi3",
    "bert",
    "deberta-v2",
    "t5",
    "clip",
)


@pytest.mark.parametrize("model_type", often(FAMILIES, ALWAYS))
def test_a_family_is_adapted_trained_merged_and_saved_as_peft_does_it(model_type, tmp_path):
    base = family(model_type)
    expected = output(base, model_type)
    model = get_lora_model(family(model_type), LoraConfig(r=4, lora_alpha=8))
    assert isinstance(model, type(base))
    assert torch.equal(output(model, model_type), expected), "a fresh adapter changes nothing"
    values = move(model)
    model.save_pretrained(tmp_path / "ours")
    theirs = theirs_with(model_type, values, sorted({key.split(".")[-3] for key in values}))

    y = output(model, model_type).detach()
    assert not torch.allclose(y, expected, rtol=1e-3), "an adapter that is moved changes the output"
    close(y, output(theirs, model_type))
    with foreign_code():
        theirs.save_pretrained(tmp_path / "theirs")
        read = peft.PeftModel.from_pretrained(family(model_type), tmp_path / "ours").eval()
    assert torch.equal(output(read, model_type), output(theirs, model_type)), "PEFT reads our file"
    assert torch.equal(output(load_adapter(family(model_type), tmp_path / "ours"), model_type), y)
    assert torch.equal(output(load_adapter(family(model_type), tmp_path / "theirs"), model_type), y), "we read theirs"

    gradients, their_gradients = train_step(model, model_type), train_step(theirs, model_type)
    assert set(gradients) == set(their_gradients)
    for key, gradient in gradients.items():
        assert gradient.any(), key
        close(gradient, their_gradients[key], 1e-4)
    y = output(model, model_type).detach()
    close(y, output(theirs, model_type))
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    close(output(merged, model_type), y)
    trained = model.state_dict()
    assert set(trained) == set(base.state_dict())
    targets = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in values}
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(trained[name], tensor)}
    assert changed == {f"{target}.weight" for target in targets}, "the weights of the targets, and no other"


class Mixer(nn.Module):
    """A model that knows nothing of transformers: tokens mixed by one matrix, channels by another, and shared parts."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 12)
        self.blocks = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(5, 5), "up": nn.Linear(12, 12)}) for _ in range(3))
        self.blocks[2]["up"] = self.blocks[0]["up"]  # one layer in two places
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 7, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = x + block["mix"](x.transpose(1, 2)).transpose(1, 2)
            x = x + torch.tanh(block["up"](self.norm(x)))
        return self.head(x.mean(1))


def mixer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mixer().eval()


def in_both_places(theirs):
    """PEFT adapts a layer that stands in two places in the first of them only; here it gets both, as ours has."""
    blocks = theirs.base_model.model.blocks
    assert type(blocks[2]["up"]) is nn.Linear
    blocks[2]["up"] = blocks[0]["up"]
    return theirs


def test_a_model_that_knows_nothing_of_transformers_is_adapted_as_peft_does_it(tmp_path):
    ids = torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(1))
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["table", "mix", "up", "head"]}
    model = get_lora_model(mixer(), LoraConfig(**options))
    assert torch.equal(model(ids), mixer()(ids))
    values = move(model)
    with foreign_code():
        theirs = in_both_places(peft.get_peft_model(mixer(), peft.LoraConfig(**options)).eval())
        peft.set_peft_model_state_dict(theirs, values)
    close(model(ids), theirs(ids))
    model.save_pretrained(tmp_path)
    with foreign_code():
        read = in_both_places(peft.PeftModel.from_pretrained(mixer(), tmp_path).eval())
    close(read(ids), theirs(ids))
    assert torch.equal(load_adapter(mixer(), tmp_path)(ids), model(ids))
    torch.cos(model(ids)).sum().backward()
    torch.cos(theirs(ids)).sum().backward()
    own = {name: tensor.grad for name, tensor in model.adapter_state_dict().items()}
    other = {file_name(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for key, gradient in own.items():
        close(gradient, other[key], 1e-4)
    expected = model(ids).detach()
    close(model.merge_and_unload()(ids), expected)
    assert type(model) is Mixer
    assert model.blocks[0]["up"] is model.blocks[2]["up"]

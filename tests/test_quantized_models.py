"""QLoRA end to end: models that transformers quantized, files to and from PEFT on the same base, and a training run."""

import copy
import gzip
import logging
from pathlib import Path

import pytest
import torch
from rotation import thinned
from test_quantized import gpt2, llama
from tiny_models import VOCABULARY, disturb, foreign_code, logits, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import minipeft
from minipeft import CheckpointError, LoraConfig
from minipeft.hf import AdapterTrainer
from minipeft.layers.base import layer_ops

with foreign_code():
    bnb = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from transformers import BitsAndBytesConfig

logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each call in int8
ASSETS = Path(__file__).resolve().parents[1] / "examples" / "assets"
LOADING = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
TARGETS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj"]}
# A Llama's layers are packed as they are and GPT-2's turned first, however they are packed: the ways of packing are
# tried on GPT-2's, and on a Llama one of either module of bitsandbytes.
every_base = pytest.mark.parametrize(
    ("family", "loading"),
    thinned((TARGETS, LOADING), [*(("gpt2", loading) for loading in LOADING), ("llama", "nf4"), ("llama", "int8")]),
)
every_family = pytest.mark.parametrize("family", TARGETS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A function: the model of a family as transformers loads it from a directory, quantized; a new one at each call."""
    made = {}

    def load(family, loading, **options):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            {"gpt2": gpt2, "llama": llama}[family]().save_pretrained(made[family])
        with foreign_code():
            config = BitsAndBytesConfig(**LOADING[loading])
            return AutoModelForCausalLM.from_pretrained(made[family], quantization_config=config, **options)

    return load


def as_in_training(model):
    """Logits in training mode: in eval mode bitsandbytes repacks a 4-bit weight that we do not guard, and loses bits."""
    found = logits(model.train())
    model.eval()
    return found


def their_config(family):
    return peft.LoraConfig(target_modules=TARGETS[family], init_lora_weights=False, r=4, lora_alpha=6)


def our_config(family):
    return LoraConfig(target_modules=TARGETS[family], init_lora_weights=False, r=4, lora_alpha=6)


@every_base
def test_what_transformers_quantized_is_read_in_the_right_orientation(family, loading, loaded):
    """GPT-2's Conv1D is transposed on the way into bitsandbytes' layer."""
    model, plain = loaded(family, loading), {"gpt2": gpt2, "llama": llama}[family]()
    for name, layer in plain.named_modules():
        if type(layer) in (nn.Linear, Conv1D) and name != "lm_head":
            packed = model.get_submodule(name)
            weight = layer_ops(layer).read_weight(layer)
            found = layer_ops(packed).read_weight(packed)
            assert (found - weight).abs().max() <= 0.2 * weight.abs().max(), name


@pytest.mark.each_value
@every_base
def test_a_file_of_ours_means_the_same_to_peft_on_its_own_quantized_base(family, loading, loaded, tmp_path):
    model = minipeft.get_lora_model(loaded(family, loading), our_config(family))
    model.save_pretrained(tmp_path)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(loaded(family, loading), tmp_path)
    assert type(theirs.get_submodule(f"base_model.model.{_first(model)}")).__module__ == "peft.tuners.lora.bnb"
    torch.testing.assert_close(as_in_training(theirs), as_in_training(model), rtol=0, atol=1e-5)


@pytest.mark.each_value
@every_base
def test_a_file_of_peft_means_the_same_to_us_on_the_quantized_base(family, loading, loaded, tmp_path):
    with foreign_code():
        theirs = peft.get_peft_model(loaded(family, loading), their_config(family))
        theirs.save_pretrained(tmp_path)
    model = minipeft.load_adapter(loaded(family, loading), tmp_path)
    torch.testing.assert_close(as_in_training(model), as_in_training(theirs), rtol=0, atol=1e-5)


@pytest.mark.each_value
@every_base
def test_parameters_are_counted_as_in_peft(family, loading, loaded):
    """Two values of 4 bits in a byte are two."""
    ours = minipeft.get_lora_model(loaded(family, loading), our_config(family))
    with foreign_code():
        theirs = peft.get_peft_model(loaded(family, loading), their_config(family))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def _first(model):
    return next(name for name, module in model.named_modules() if hasattr(module, "adapters"))


@pytest.mark.each_value
@every_family
@pytest.mark.parametrize("loading", ["nf4", "int8"])
def test_gradients_are_those_of_peft(family, loading, loaded, tmp_path):
    model = minipeft.get_lora_model(loaded(family, loading), our_config(family))
    model.save_pretrained(tmp_path)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(loaded(family, loading), tmp_path, is_trainable=True)
    ids = token_ids()
    for one in (model, theirs):
        one.train()(input_ids=ids, labels=ids).loss.backward()
    expected = {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.default.weight", "")
        .replace(".lora_B.default.weight", ""): []
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            expected[name.removeprefix("base_model.model.").partition(".lora_")[0]].append(p.grad)
    for name, (A, B) in expected.items():
        lora = model.get_submodule(name).adapters["default"]
        for found, wanted in ((lora.lora_A.grad, A), (lora.lora_B.grad, B)):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.each_value
@every_base
def test_a_model_that_transformers_quantized_becomes_plain_again(family, loading, loaded, tmp_path):
    """Type by type: transformers' and PEFT's own ways leave nn.Linear with a transposed weight where a Conv1D was."""
    plain = {"gpt2": gpt2, "llama": llama}[family]()
    model = disturb(minipeft.get_lora_model(loaded(family, loading), our_config(family)))
    expected = as_in_training(model)
    merged = model.merge_and_unload(dequantize=True)
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    with foreign_code():
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not getattr(again, "is_quantized", False)
    assert torch.equal(logits(again), logits(merged))


def test_a_model_loaded_in_bfloat16_trains(loaded):
    model = minipeft.get_lora_model(loaded("llama", "nf4 double", dtype=torch.bfloat16), our_config("llama"))
    ids = token_ids()
    with torch.no_grad():
        model.eval()(input_ids=ids)  # where bitsandbytes would repack
    model.train()(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 8
    assert all(g.dtype is torch.float32 and g.any() for g in grads)


def test_generating_while_training_gives_the_tokens_of_the_training_model(loaded):
    model = minipeft.get_lora_model(loaded("llama", "nf4"), our_config("llama"))
    ids = token_ids(rows=1, length=6)
    with foreign_code():
        found = model.eval().generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    for position in range(6, found.shape[1]):
        assert found[0, position] == model.train()(input_ids=found[:, :position]).logits[0, -1].argmax()


def test_the_base_is_known_again_across_quantization(tmp_path):
    saved = {"float": gpt2(), **{kind: minipeft.quantize(gpt2(), kind) for kind in ("nf4", "int8")}}
    for name, model in saved.items():
        minipeft.get_lora_model(model, our_config("gpt2")).save_pretrained(tmp_path / name)
    for name in saved:
        for kind in (None, "nf4", "fp4", "int8"):
            for seed in (0, 7):
                base = gpt2(seed=seed) if kind is None else minipeft.quantize(gpt2(seed=seed), kind)
                if seed == 0:
                    minipeft.load_adapter(base, tmp_path / name)
                else:
                    with pytest.raises(CheckpointError, match="trained on another base"):
                        minipeft.load_adapter(base, tmp_path / name)


def embedded(kind):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32)
    return minipeft.quantize(model, kind)


def batches():
    with foreign_code():
        tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    with gzip.open(ASSETS / "corpus" / "code-train.txt.gz", "rt", encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read(60_000), verbose=False)["input_ids"])
    return ids[: 2 * 4 * 24].view(2, 4, 24).repeat(7, 1, 1)


# That int8 trains and is saved, the tests of trainers and of files hold.
@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_embedded_model_learns_is_saved_and_comes_back(kind, tmp_path):
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"])
    model, data = minipeft.get_lora_model(embedded(kind), config), batches()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    losses = []
    for ids in data:
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            model.eval()(input_ids=ids[:1, :8])  # an evaluation in between
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.8
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    model.save_pretrained(tmp_path)
    expected = logits(model, data[0][:2])
    again = minipeft.load_adapter(embedded(kind), tmp_path)
    assert torch.equal(logits(again.eval(), data[0][:2]), expected)
    merged = model.merge_and_unload(dequantize=True)
    error = (logits(merged, data[0][:2]) - expected).abs().max() / expected.abs().max()
    assert error < (0.02 if kind == "int8" else 1e-5)


def test_lean_works_on_a_quantized_base():
    model = minipeft.get_lora_model(minipeft.quantize(gpt2(), "nf4"), our_config("gpt2")).train()
    ids = token_ids()

    def gradients():
        loss = model(input_ids=ids, labels=ids).loss
        return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]

    expected = gradients()
    minipeft.lean(model, checkpointing="block")
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert copy.deepcopy(model).config.vocab_size == VOCABULARY


def test_the_loss_of_a_head_that_torchao_quantized_is_not_computed_in_chunks():
    """torchao's ``quantize_`` takes the head too, which stays an ``nn.Linear`` with another kind of weight."""
    torchao = pytest.importorskip("torchao.quantization")
    model = llama()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    minipeft.get_lora_model(model, LoraConfig(r=2)).train()
    with pytest.raises(minipeft.LeanError, match=r"output head is quantized; pass chunked_loss=False"):
        minipeft.lean(model)
    minipeft.lean(model, chunked_loss=False)


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "int8_weight_only"])
@every_family
def test_a_model_that_we_quantized_is_saved_and_loads_again(kind, family, tmp_path):
    model = {"gpt2": gpt2, "llama": llama}[family]()
    with foreign_code():
        minipeft.quantize(model, kind)
    if (kind, family) == ("int8_weight_only", "gpt2"):  # transformers would load it the wrong way round
        with foreign_code(), pytest.raises(RuntimeError, match="storage"):
            model.save_pretrained(tmp_path)
        return
    with foreign_code():
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for module in (*again.modules(), *model.modules()):
        module.support_avx512bf16_for_cpu = False  # for which bitsandbytes rounds the scales in its first call
    assert torch.equal(logits(again), logits(model.eval()))
    head = again.get_output_embeddings()
    assert type(head) is nn.Linear
    assert torch.equal(head.weight, model.get_output_embeddings().weight)
    minipeft.dequantize(model)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")


TRAININGS = [["nf4", "int8", "ours"], [False, True], [Trainer, AdapterTrainer]]
EACH_PAIR = [
    (loading, checkpointing, TRAININGS[2][(row + checkpointing) % 2])
    for row, loading in enumerate(TRAININGS[0])
    for checkpointing in TRAININGS[1]
]


@pytest.mark.each_value
@pytest.mark.parametrize(("loading", "checkpointing", "trainer"), thinned(TRAININGS, EACH_PAIR))
def test_the_trainer_trains_adapters_on_a_quantized_base(loading, checkpointing, trainer, loaded, tmp_path):
    model = minipeft.quantize(llama()) if loading == "ours" else loaded("llama", loading)
    minipeft.get_lora_model(model, our_config("llama"))
    before = copy.deepcopy(model.adapter_state_dict())
    row = token_ids()[0]
    options = {"max_steps": 2, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), activation_checkpointing=checkpointing, **options)
    with foreign_code():
        trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 8).train()
    after = model.adapter_state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in before if "lora_B" in key)
    assert not getattr(model.unload(), "_hf_peft_config_loaded", False)

"""Who reads an adapter: the rules tried for real where the reader is installed, and on files as their sources describe them."""

import contextlib
import json
import re
import shutil
import time
from pathlib import Path

import pytest
import readers_table
import torch
from fast_copy import copied
from method_cases import CASES, ours
from safetensors.torch import load_file, save_file
from test_peft_interop import CASES as LORA
from tiny_models import adapted, disturb, foreign_code, gpt2, llama, logits, t5
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import minipeft
from minipeft.errors import CheckpointError
from minipeft.files.readers.contents import read_contents
from minipeft.files.readers.made_for import made_for
from minipeft.files.readers.names import Part, Reader
from minipeft.files.readers.rules import Takes, answer, rules_of
from minipeft.files.readers.summary import summary

with foreign_code():
    peft = pytest.importorskip("peft")

INSTALLED = (Reader.PEFT, Reader.TRANSFORMERS)
SERVERS = (Reader.VLLM, Reader.SGLANG, Reader.LLAMA_CPP)
QV = {"target_modules": ["q_proj", "v_proj"]}
PATTERNS = {
    "r": 4,
    "lora_alpha": 16,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"layers.1.self_attn.v_proj": 3},
}
OPTIONS = {
    "plain": QV,
    "rslora and patterns": QV | PATTERNS,
    "regex": {"target_modules": r".*\.(q_proj|v_proj)"},
    "one layer": QV | {"layers_to_transform": [1]},
    "dora": QV | {"use_dora": True},
    "bias of B": QV | {"lora_bias": True},
    "start": QV | {"init_lora_weights": "pissa"},
    "tokens": QV | {"trainable_token_indices": [1, 2]},
    "head": {"target_modules": ["q_proj", "v_proj", "lm_head"]},
    "head to save": QV | {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
}
# What an editor of files, or another tool, may do to the keys and the configuration.
KEYS = {
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "adapter name": lambda key: key.replace(".weight", ".default.weight"),
    "torch.compile": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "module": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "double prefix": lambda key: f"base_model.model.{key}",
}
CONFIGS = {
    "fewer targets": {"target_modules": ["q_proj"]},
    "regex of fewer": {"target_modules": ".*q_proj"},
    "excluded": {"exclude_modules": ["v_proj"]},
    "larger rank": {"r": 8},
    "rank of one": {"rank_pattern": {"q_proj": 2}},
    "unknown method": {"peft_type": "TURBO"},
}


def read_by(reader, model, directory):
    """A base model with the adapter, as this reader loads it."""
    with foreign_code():
        if reader is Reader.PEFT:
            return peft.PeftModel.from_pretrained(model, directory).eval()
        model.load_adapter(str(directory))
        return model.eval()


def check_all_for_real(model, factory, directory):
    """What the rules say of a saved adapter is what happens with each reader that is installed."""
    expected = logits(model)
    for reader in INSTALLED:
        check_for_real(reader, factory, expected, directory)


def check_for_real(reader, factory, expected, directory):
    """What the rules say of an adapter is what happens."""
    given = answer(read_contents(directory), reader).takes
    try:
        with foreign_code():
            found = logits(read_by(reader, factory(), directory))
    except Exception:
        assert given is Takes.NO, reader
        return
    same = torch.allclose(found, expected, atol=1e-5)
    assert given is (Takes.YES if same else Takes.PARTLY), reader


def edited(directory, key=None, config=None):
    if key is not None:
        path = directory / "adapter_model.safetensors"
        save_file({key(name): tensor for name, tensor in load_file(path).items()}, path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))


both = pytest.mark.parametrize("reader", INSTALLED)


@pytest.mark.parametrize("case", CASES)
def test_the_rules_are_right_about_every_method(case, tmp_path):
    model = disturb(ours(case))
    model.save_pretrained(tmp_path)
    check_all_for_real(model, CASES[case][1], tmp_path)


@pytest.mark.parametrize("case", OPTIONS)
def test_the_rules_are_right_about_every_option(case, tmp_path):
    model = adapted(llama(), **OPTIONS[case])
    model.save_pretrained(tmp_path)
    check_all_for_real(model, llama, tmp_path)


@pytest.mark.parametrize(
    "case", ["gpt2 conv1d", "gpt2 bias all", "gpt2 modules_to_save", "bert classifier", "llama tied"]
)
def test_the_rules_are_right_about_other_models(case, tmp_path):
    factory, options = LORA[case]
    model = adapted(factory(), **options)
    model.save_pretrained(tmp_path)
    check_all_for_real(model, factory, tmp_path)


@pytest.mark.parametrize("case", [*KEYS, *CONFIGS])
def test_the_rules_are_right_about_files_that_were_changed(case, tmp_path):
    model = adapted(llama(), **QV)
    model.save_pretrained(tmp_path)
    edited(tmp_path, KEYS.get(case), CONFIGS.get(case))
    check_all_for_real(model, llama, tmp_path)


def rules_that_apply(reader, directory):
    return {finding.rule.name for finding in answer(read_contents(directory), reader).findings}


@pytest.mark.parametrize(
    ("reader", "options", "rules"),
    [
        (Reader.VLLM, {}, set()),
        (Reader.VLLM, PATTERNS, {"scaling"}),
        (Reader.VLLM, {"use_rslora": True}, set()),
        (Reader.VLLM, {"use_dora": True}, {"dora", "keys"}),
        (Reader.VLLM, {"modules_to_save": ["lm_head"]}, {"modules_to_save", "keys"}),
        (Reader.VLLM, {"trainable_token_indices": [1]}, {"tokens"}),
        (Reader.VLLM, {"init_lora_weights": "pissa"}, {"keys"}),
        (Reader.VLLM, {"lora_bias": True}, {"keys"}),
        (Reader.VLLM, {"r": 32}, {"max rank"}),
        (Reader.SGLANG, {}, set()),
        (Reader.SGLANG, PATTERNS, {"ranks", "scaling"}),
        (Reader.SGLANG, {"use_rslora": True}, {"scaling"}),
        (Reader.SGLANG, {"modules_to_save": ["lm_head"]}, {"modules_to_save"}),
        (Reader.SGLANG, {"trainable_token_indices": [1]}, {"tokens"}),
        (Reader.SGLANG, {"target_modules": r".*\.(q_proj|v_proj)"}, {"targets"}),
        (Reader.SGLANG, {"target_modules": ["q_proj"]}, {"stacked"}),
        (Reader.SGLANG, {"target_modules": ["up_proj"]}, {"gate"}),
        (Reader.LLAMA_CPP, {}, set()),
        (Reader.LLAMA_CPP, PATTERNS, {"scaling"}),
        (Reader.LLAMA_CPP, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {}}, set()),
        (Reader.LLAMA_CPP, {"use_dora": True}, {"dora"}),
        (Reader.LLAMA_CPP, {"modules_to_save": ["input_layernorm"]}, {"norms"}),
        (Reader.LLAMA_CPP, {"modules_to_save": ["lm_head"]}, {"modules_to_save"}),
        (Reader.LLAMA_CPP, {"target_modules": ["q_proj", "lm_head"]}, {"head"}),
        (Reader.MLX, {}, {"format"}),
        (Reader.DIFFUSERS, {}, {"component", "name"}),
    ],
)
def test_each_rule_of_a_reader_that_is_not_installed(reader, options, rules, tmp_path):
    adapted(llama(), **(QV | options)).save_pretrained(tmp_path)
    assert rules_that_apply(reader, tmp_path) == rules


def test_what_a_server_leaves_out_without_a_word(tmp_path):
    """What the script of llama.cpp and vLLM's manager do with these, seen in a run or read at the version that is named."""
    for number, (old, new, rule, reader) in enumerate(
        [
            ("model.layers", "model.visual.blocks", "vision", Reader.VLLM),
            ("model.layers", "model.visual.blocks", "vision", Reader.LLAMA_CPP),
            ("model.layers", "_orig_mod.model.layers", "wrappers", Reader.VLLM),
        ]
    ):
        place = tmp_path / str(number)
        adapted(llama(), **QV).save_pretrained(place)
        edited(place, lambda key, old=old, new=new: key.replace(old, new))
        assert asked(reader, place).takes is Takes.PARTLY
        assert rule in rules_that_apply(reader, place)


@pytest.mark.parametrize(
    ("old", "new", "rules"),
    [
        ("model.layers", "_orig_mod.model.layers", set()),  # only the layer's number and its last name are looked at
        ("model.layers", "model.vision_tower.encoder.layers", {"vision"}),
        ("model.layers", "model.visual.blocks", {"outside"}),
        ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa", {"stacked", "mla"}),
    ],
)
def test_what_sglang_makes_of_a_name(old, new, rules, tmp_path):
    """Read in lora.py and mem_pool.py of the wheel of SGLang 0.5.23."""
    adapted(llama(), **QV).save_pretrained(tmp_path)
    edited(tmp_path, lambda key: key.replace(old, new))
    (tmp_path / "added_tokens.json").write_text('{"<x>": 32000}')
    assert rules_that_apply(Reader.SGLANG, tmp_path) == rules | {"added_tokens"}


def test_fused_experts_are_told_apart_from_a_router(tmp_path):
    for target, applies in (("mlp.gate.weight", False), ("experts.down_proj", True)):
        model = adapted(mixture(), **QV, target_parameters=[target])
        model.save_pretrained(tmp_path / target)
        for reader in SERVERS:
            assert ("experts" in rules_that_apply(reader, tmp_path / target)) is applies


def test_a_rank_that_no_server_of_vllm_allows(tmp_path):
    adapted(llama(), **QV, r=640).save_pretrained(tmp_path)
    assert rules_that_apply(Reader.VLLM, tmp_path) == {"max rank", "largest rank"}


def test_what_depends_on_the_base(tmp_path):
    adapted(gpt2()).save_pretrained(tmp_path)
    assert rules_that_apply(Reader.SGLANG, tmp_path) == {"outside"}
    assert rules_that_apply(Reader.LLAMA_CPP, tmp_path) == {"transposed"}


@pytest.mark.parametrize("reader", Reader)
def test_each_rule_says_where_it_was_read_and_has_a_name_of_its_own(reader):
    rules = rules_of(reader)
    assert len({rule.name for rule in rules}) == len(rules)
    assert all(rule.source and rule.consequence for rule in rules)


@pytest.mark.parametrize("case", ["start", "vera"])
def test_an_option_of_save_pretrained_that_a_fix_names_makes_the_adapter_readable(case, tmp_path):
    model = disturb(ours("vera")) if case == "vera" else adapted(gpt2(), init_lora_weights="pissa")
    model.save_pretrained(tmp_path / "it")
    fixes = [finding.rule.fix for finding in answer(read_contents(tmp_path / "it"), Reader.TRANSFORMERS).findings]
    (option,) = {
        re.search(r"save_pretrained\(\.\.\., (\w+)=True\)", fix)[1] for fix in fixes if "save_pretrained" in fix
    }
    model.save_pretrained(tmp_path / "out", **{option: True})
    assert answer(read_contents(tmp_path / "out"), Reader.TRANSFORMERS).takes is Takes.YES


FOLDED = ["plain", "rslora and patterns", "regex", "one layer", "start", "embedding", "head"]


@copied
def deepseek():
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "vocab_size": llama().config.vocab_size,
    }
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    moe = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    torch.manual_seed(0)
    config = DeepseekV3Config(**sizes, **heads, **moe, kv_lora_rank=8, q_lora_rank=None, num_hidden_layers=2)
    return DeepseekV3ForCausalLM(config).eval()


EXPERTS = {
    "plain": {},
    "no mapping": {"task_type": "CAUSAL_LM", "rank_pattern": {"shared_experts.up_proj": 2}, "use_rslora": True},
    "dropout": {"lora_dropout": 0.1},
    "gate alone": {"target_modules": ["gate_proj"]},
    "experts excluded": {"exclude_modules": ["experts"]},
}


@pytest.mark.each_value
@both
@pytest.mark.parametrize("case", EXPERTS)
def test_layers_named_as_the_experts_of_transformers_4_are_found_and_converted(reader, case, tmp_path):
    """PEFT takes targets such as ``gate_proj`` for the fused experts, and leaves dense layers and shared experts out."""
    options = {"target_modules": ["gate_proj", "up_proj", "down_proj", "o_proj"]} | EXPERTS[case]
    said = (
        contextlib.nullcontext()
        if "exclude_modules" in options
        else pytest.warns(UserWarning, match="parts of experts")
    )
    with said:
        model = adapted(deepseek(), **options).eval()
    model.save_pretrained(tmp_path / "it")
    check_for_real(reader, deepseek, logits(model), tmp_path / "it")
    assert rules_that_apply(reader, tmp_path / "it") & {"experts", "experts refused"}
    made = made_for(reader, tmp_path / "it", tmp_path / "out")
    assert len(made.done) == 1 + ("lora_dropout" in options)
    assert answer(read_contents(tmp_path / "out"), reader).takes is Takes.YES
    check_for_real(reader, deepseek, logits(model), tmp_path / "out")
    again = minipeft.load_adapter(deepseek(), tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)


@both
def test_dora_of_layers_named_as_experts_is_not_promised(reader, tmp_path):
    model = adapted(deepseek(), target_modules=["gate_proj", "up_proj"], exclude_modules=["experts"], use_dora=True)
    model.save_pretrained(tmp_path / "it")
    check_for_real(reader, deepseek, logits(model), tmp_path / "it")
    with pytest.raises(CheckpointError, match="minipeft merge"):
        made_for(reader, tmp_path / "it", tmp_path / "out")


def test_which_base_an_adapter_is_for_decides_about_names_of_experts(tmp_path):
    adapted(llama(), target_modules=["up_proj", "gate_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert "experts" not in rules_that_apply(Reader.PEFT, tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "glm4_moe"}')
    edited(tmp_path, config={"base_model_name_or_path": str(tmp_path / "base")})
    assert "experts" in rules_that_apply(Reader.PEFT, tmp_path)


@pytest.mark.parametrize("case", FOLDED)
def test_an_adapter_made_for_a_server_has_the_same_effect(case, tmp_path):
    model = adapted(llama(), **OPTIONS[case])
    model.save_pretrained(tmp_path / "it")
    expected = logits(model)
    for reader in SERVERS:
        out = tmp_path / reader.name
        made_for(reader, tmp_path / "it", out)
        assert asked(reader, out).takes is Takes.YES, reader
        config = json.loads((out / "adapter_config.json").read_text())
        assert not {"use_rslora", "rank_pattern", "alpha_pattern"} & config.keys(), reader
        for again in (read_by(Reader.PEFT, llama(), out), minipeft.load_adapter(llama(), out)):
            torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)


def test_adalora_is_low_rank_and_can_be_made_plain(tmp_path):
    model = disturb(ours("adalora default"))
    model.save_pretrained(tmp_path / "it")
    made_for(Reader.VLLM, tmp_path / "it", tmp_path / "out")
    with_peft = read_by(Reader.PEFT, llama(), tmp_path / "out")
    torch.testing.assert_close(logits(with_peft), logits(model), atol=1e-5, rtol=0)


@both
def test_a_start_of_our_own_is_folded_for_peft(reader, tmp_path):
    model = adapted(llama(), **QV, init_lora_weights="pissa", modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "it")
    made_for(reader, tmp_path / "it", tmp_path / "out")
    torch.testing.assert_close(logits(read_by(reader, llama(), tmp_path / "out")), logits(model), atol=1e-5, rtol=0)


def test_keys_are_renamed_as_peft_writes_them(tmp_path):
    model = adapted(llama(), **QV)
    model.save_pretrained(tmp_path / "it")
    edited(tmp_path / "it", KEYS["no prefix"])
    made = made_for(Reader.PEFT, tmp_path / "it", tmp_path / "out")
    assert made.done == ["8 keys were renamed as PEFT writes them."]
    torch.testing.assert_close(
        logits(read_by(Reader.PEFT, llama(), tmp_path / "out")), logits(model), atol=1e-5, rtol=0
    )


def test_half_precision_is_not_rounded(tmp_path):
    model = adapted(llama(), **QV, **PATTERNS)
    model.save_pretrained(tmp_path / "it")
    path = tmp_path / "it" / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    before = minipeft.load_adapter(llama(), tmp_path / "it")
    made = made_for(Reader.VLLM, tmp_path / "it", tmp_path / "out")
    assert "The factors are torch.float32 now, since they would have been rounded." in made.done
    after = minipeft.load_adapter(llama(), tmp_path / "out")
    torch.testing.assert_close(logits(after), logits(before), atol=1e-5, rtol=0)


def test_what_is_left_out_is_left_out_on_request_and_named(tmp_path):
    adapted(llama(), **QV, modules_to_save=["lm_head"], trainable_token_indices=[1]).save_pretrained(tmp_path / "it")
    for drop, said in (([], "--drop modules_to_save"), ([Part.MODULES_TO_SAVE], "--drop tokens")):
        with pytest.raises(CheckpointError, match=said):
            made_for(Reader.VLLM, tmp_path / "it", tmp_path / "out", drop)
    assert not (tmp_path / "out").exists()
    made = made_for(Reader.VLLM, tmp_path / "it", tmp_path / "out", list(Part))
    left_out = ("lm_head.weight", "model.embed_tokens.token_adapter.trainable_tokens_delta")
    assert made.dropped == [f"base_model.model.{name}" for name in left_out]
    assert answer(read_contents(tmp_path / "out"), Reader.VLLM).takes is Takes.YES


def test_a_head_is_left_out_on_request(tmp_path):
    adapted(llama(), target_modules=["q_proj", "v_proj", "lm_head"]).save_pretrained(tmp_path / "it")
    made = made_for(Reader.LLAMA_CPP, tmp_path / "it", tmp_path / "out", [Part.HEAD])
    assert len(made.dropped) == 2
    assert rules_that_apply(Reader.LLAMA_CPP, tmp_path / "out") == set()


REFUSED = {
    "dora": (OPTIONS["dora"], "minipeft merge"),
    "bias of B": (OPTIONS["bias of B"], "minipeft merge"),
    "q without v": ({"target_modules": ["q_proj"]}, "cannot be stacked"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_made_for_a_server_is_refused_and_nothing_is_written(case, tmp_path):
    options, said = REFUSED[case]
    adapted(llama(), **options).save_pretrained(tmp_path / "it")
    with pytest.raises(CheckpointError, match=said):
        made_for(Reader.SGLANG, tmp_path / "it", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["loha", "lokr", "oft", "ia3", "vera"])
def test_other_methods_are_refused_with_the_reason(case, tmp_path):
    disturb(ours(case)).save_pretrained(tmp_path / "it")
    with pytest.raises(CheckpointError, match=r"cannot be made plain LoRA \(.*minipeft merge"):
        made_for(Reader.VLLM, tmp_path / "it", tmp_path / "out")


def test_weights_without_a_configuration_are_not_called_another_method(tmp_path):
    adapted(llama()).save_pretrained(tmp_path / "it")
    (tmp_path / "it" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="it has no adapter_config.json"):
        made_for(Reader.VLLM, tmp_path / "it", tmp_path / "out")


def test_the_output_must_be_a_place_of_its_own(tmp_path):
    adapted(llama(), **QV).save_pretrained(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out in (
        tmp_path,
        tmp_path / "full",
        tmp_path / "link",
        tmp_path / "dangling",
        tmp_path / "adapter_config.json",
    ):
        with pytest.raises(CheckpointError, match=r"is the adapter itself|is in use"):
            made_for(Reader.VLLM, tmp_path, out)


def test_mlx_gets_its_own_format(tmp_path):
    """mlx-lm computes ``x + scale * (x @ lora_a) @ lora_b``."""
    model = adapted(llama(), **QV, **PATTERNS)
    model.save_pretrained(tmp_path / "it")
    made_for(Reader.MLX, tmp_path / "it", tmp_path / "out")
    assert answer(read_contents(tmp_path / "out"), Reader.MLX).takes is Takes.YES
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_parameters"]
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    assert config["rank"] == 4
    for name in config["keys"]:
        up, down = model.get_submodule(name).adapter("default").factors()
        update = config["scale"] * (tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]).T
        torch.testing.assert_close(update, (up @ down).detach(), atol=1e-5, rtol=1e-5)


class Denoiser(torch.nn.Module):
    """Named as the transformer of a diffusers pipeline."""

    def __init__(self):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 5)}) for _ in range(2)
        )
        self.proj_out = torch.nn.Linear(5, 4)


def test_diffusers_gets_its_own_keys_with_the_scaling_in_them(tmp_path):
    model = disturb(
        minipeft.get_lora_model(Denoiser(), minipeft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"]))
    )
    model.save_pretrained(tmp_path / "it")
    made_for(Reader.DIFFUSERS, tmp_path / "it", tmp_path / "out")
    assert answer(read_contents(tmp_path / "out"), Reader.DIFFUSERS).takes is Takes.YES
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    key = "transformer.transformer_blocks.1.to_q.lora_{}.weight"
    up, down = model.transformer_blocks[1]["to_q"].adapter("default").factors()
    torch.testing.assert_close(tensors[key.format("B")] @ tensors[key.format("A")], (up @ down).detach())


def test_layers_beside_the_blocks_are_of_the_same_part_of_a_pipeline(tmp_path):
    """ "all-linear" takes them too."""
    model = minipeft.get_lora_model(Denoiser(), minipeft.LoraConfig(r=2, target_modules=["to_q", "proj_out"]))
    model.save_pretrained(tmp_path / "it")
    made_for(Reader.DIFFUSERS, tmp_path / "it", tmp_path / "out")
    assert "transformer.proj_out.lora_A.weight" in load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")


def test_the_text_part_of_a_vision_model_is_renamed_for_readers_of_text(tmp_path):
    adapted(llama(), **QV).save_pretrained(tmp_path / "it")
    edited(tmp_path / "it", lambda key: key.replace("model.layers", "model.language_model.layers"))
    assert "wrapper" in rules_that_apply(Reader.LLAMA_CPP, tmp_path / "it")
    assert asked(Reader.LLAMA_CPP, tmp_path / "it").takes is Takes.YES
    made_for(Reader.LLAMA_CPP, tmp_path / "it", tmp_path / "out")
    keys = read_contents(tmp_path / "out").weights.shapes
    assert all(key.startswith("base_model.model.model.layers.") for key in keys)
    made_for(Reader.MLX, tmp_path / "it", tmp_path / "mlx")
    assert all(key.startswith("language_model.model.layers.") for key in read_contents(tmp_path / "mlx").weights.shapes)


def test_a_directory_without_safetensors_says_what_to_do(tmp_path):
    adapted(t5(), target_modules=["q"]).save_pretrained(tmp_path / "it")
    shutil.move(tmp_path / "it" / "adapter_model.safetensors", tmp_path / "it" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="minipeft convert"):
        read_contents(tmp_path / "it")


ODD = [
    None,
    True,
    0,
    -1,
    2.5,
    10**400,
    "text",
    "(a+)+$",
    [],
    ["q_proj", 3],
    {"q_proj": "x"},
    {"(": 1},
    {"q_proj": 10**400},
]


@pytest.mark.parametrize(
    "option",
    ["peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"],
)
def test_odd_values_are_answered_or_refused_in_one_sentence(option, tmp_path):
    adapted(llama(), **QV).save_pretrained(tmp_path)
    for value in ODD:
        edited(tmp_path, config={option: value})
        with contextlib.suppress(minipeft.MinipeftError):
            summary(tmp_path)
        with contextlib.suppress(minipeft.MinipeftError):
            contents = read_contents(tmp_path)
            for reader in Reader:
                with contextlib.suppress(minipeft.MinipeftError):
                    answer(contents, reader)


def asked(reader, directory):
    return answer(read_contents(directory), reader)


def test_many_keys_are_answered_in_linear_time(tmp_path):
    names = [f"model.layers.{n // 100}.experts.{n % 100}.up_proj" for n in range(4_000)]
    keys = [f"base_model.model.{name}.lora_{factor}.weight" for name in names for factor in "AB"]
    save_file({key: torch.zeros(1, 1) for key in keys}, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": names,
        "rank_pattern": dict.fromkeys(names, 1),
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    start = time.process_time()
    contents = read_contents(tmp_path)
    for reader in Reader:
        answer(contents, reader)
    assert time.process_time() - start < 4  # some seven times as long as it takes


@pytest.mark.parametrize("shape", [(), (0,), (4,), (3, 32), (0, 32), (4, 32, 1, 1)])
def test_factors_of_odd_shapes_are_answered_or_refused(shape, tmp_path):
    adapted(llama(), **QV).save_pretrained(tmp_path / "it")
    path = tmp_path / "it" / "adapter_model.safetensors"
    save_file(
        load_file(path) | {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(shape)}, path
    )
    assert summary(tmp_path / "it").layers
    for reader in Reader:
        asked(reader, tmp_path / "it")
    if shape != (4, 32, 1, 1):
        with pytest.raises(CheckpointError):
            made_for(Reader.VLLM, tmp_path / "it", tmp_path / "out")


@copied
def mixture():
    config = Qwen3MoeConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[],
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize("reader", SERVERS)
def test_a_server_gets_experts_one_by_one(reader, tmp_path):
    options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "use_rslora": True}
    model = adapted(mixture(), **QV, **options)
    model.save_pretrained(tmp_path / "it")
    model.config.architectures = ["Qwen3MoeForCausalLM"]
    model.config.save_pretrained(tmp_path / "base")
    made_for(reader, tmp_path / "it", tmp_path / "out", base=tmp_path / "base")
    assert asked(reader, tmp_path / "out").takes is Takes.YES
    torch.testing.assert_close(logits(minipeft.load_adapter(mixture(), tmp_path / "out")), logits(model))


def test_square_experts_made_for_peft_are_read_again(tmp_path):
    model = adapted(mixture(), **QV, target_parameters=["experts.gate_up_proj"])  # 2 x 16 features of 32
    model.save_pretrained(tmp_path / "it")
    made_for(Reader.PEFT, tmp_path / "it", tmp_path / "out")
    torch.testing.assert_close(logits(minipeft.load_adapter(mixture(), tmp_path / "out")), logits(model))
    with foreign_code():
        reference = peft.PeftModel.from_pretrained(mixture(), tmp_path / "out")
        torch.testing.assert_close(logits(reference), logits(model), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of names that only one of the readers takes
def test_the_page_has_the_table_of_the_rules():
    page = (Path(__file__).resolve().parents[1] / "docs" / "files.md").read_text("utf-8")
    assert readers_table.written(page) == page, "run: python -m tests.readers_table --write docs/files.md"

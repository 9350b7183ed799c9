"""One LoRA for each expert, as transformers 4 had its layers, in models with fused experts: against float64 algebra and PEFT."""

import json
import logging

import pytest
import torch
from old_experts import FAMILIES, MIXTRAL, QWEN, OldFile, logits, mixture, old_file, stacks
from safetensors.torch import load_file, save_file
from tiny_models import foreign_code, state_digest

import minipeft
from minipeft import CheckpointError, MinipeftError, load_adapter
from minipeft.config.adapter_config import config_from_dict
from minipeft.files.names.experts.split import split_experts

peft = pytest.importorskip("peft")
pytest.importorskip("transformers.conversion_mapping")
COMMON = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3")
# What PEFT drops there: LoRA of dense layers and shared experts that have the names of the experts' layers.
DROPPED_BY_PEFT = {"qwen2_moe", "deepseek_v3", "jamba", "glm4_moe", "ernie4_5_moe", "hunyuan", "dots1", "phimoe"}


def theirs(model, directory):
    with foreign_code():
        return peft.PeftModel.from_pretrained(model, directory)


def check(family, file, directory, *, expected=None):
    """Loaded, the file has these updates; merged too; saved and loaded again too."""
    expected = logits(file.into(mixture(family))) if expected is None else expected
    assert (expected - logits(mixture(family))).abs().max() > 0.1
    model = load_adapter(mixture(family), directory / "old")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.save_pretrained(directory / "again")
    again = load_adapter(mixture(family), directory / "again")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    merged = again.merge_and_unload()
    for name, update in file.updates.items():
        there = mixture(family).get_parameter(name).double() + update
        torch.testing.assert_close(merged.get_parameter(name).double(), there, rtol=0, atol=1e-6)
    return model


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in COMMON else pytest.mark.slow) for f in FAMILIES], ids=str
)
def test_the_experts_of_transformers_4_are_those_of_the_fused_model(family, tmp_path):
    file, targets = old_file(mixture(family), family)
    file.save(tmp_path / "old", target_modules=targets)
    model = check(family, file, tmp_path)
    if family not in DROPPED_BY_PEFT:
        for directory in ("old", "again"):
            reference = theirs(mixture(family), tmp_path / directory)
            torch.testing.assert_close(logits(reference), logits(model), rtol=0, atol=1e-5)
        with foreign_code():
            state = peft.get_peft_model_state_dict(reference)
        own = model.adapter_state_dict()
        assert state.keys() == own.keys()
        assert all(torch.equal(state[key], own[key]) for key in own)


def experts_only(family, *, only=None, options=None, **file_options):
    _, _, around, layers = FAMILIES[family]
    file = OldFile(**file_options)
    for name, module in stacks(mixture(family)).items():
        file.experts(name, module, around, layers, only, **(options or {}))
    return file


@pytest.mark.parametrize(
    ("config", "only"),
    [
        ({"target_modules": ["w1", "w2"]}, lambda name: not name.endswith("w3")),
        ({"target_modules": ["w3"]}, lambda name: name.endswith("w3")),
        (
            {"target_modules": ["w2"], "layers_to_transform": [1]},
            lambda name: "layers.1." in name and name.endswith("w2"),
        ),
        ({"target_modules": r".*\.experts\.[02]\.(w1|w2|w3)"}, lambda name: ".experts.1." not in name),
        ({"target_modules": ["w1", "experts.1.w3"]}, lambda name: name.endswith(("w1", "experts.1.w3"))),
        (
            {"target_modules": ["w1", "w2", "w3"], "exclude_modules": ["experts.0.w1"]},
            lambda name: "s.0.w1" not in name,
        ),
        (
            {"target_modules": [f"model.layers.0.block_sparse_moe.experts.{n}.w1" for n in range(3)]},
            lambda n: "0.block_sparse_moe.experts" in n and n.endswith("w1"),
        ),
    ],
    ids=["gate and down", "up", "down of one layer", "some experts", "one up", "excluded", "full names"],
)
def test_a_part_of_the_experts_is_adapted_exactly_as_it_was(config, only, tmp_path):
    file = experts_only("mixtral", only=only)
    file.save(tmp_path / "old", **config)
    model = check("mixtral", file, tmp_path)
    state = model.adapter_state_dict()
    found = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (found["target_modules"] or []) in ([], config["target_modules"])
    reference = theirs(mixture("mixtral"), tmp_path / "again")
    torch.testing.assert_close(logits(reference), logits(model), rtol=0, atol=1e-5)
    assert any(not key.endswith("base_layer.lora_A.weight") for key in state)


def test_ranks_and_scalings_are_kept_where_peft_has_them_wrong(tmp_path):
    """rsLoRA scales by the root of the rank; patterns give one expert, and one of two fused layers, another rank and alpha."""
    options = {"experts.1.w3": {"r": 4}, "w2": {"r": 3, "lora_alpha": 7}, "w1": {"lora_alpha": 5}}
    patterns = {"rank_pattern": {"experts.1.w3": 4, "w2": 3}, "alpha_pattern": {"w2": 7, "w1": 5}}
    for use_rslora in (False, True):
        file = experts_only("mixtral", options=options, use_rslora=use_rslora)
        directory = tmp_path / str(use_rslora)
        file.save(directory / "old", target_modules=list(MIXTRAL), **patterns)
        model = check("mixtral", file, directory)
        state, prefix = model.adapter_state_dict(), "base_model.model.model.layers.0.mlp.experts"
        assert state[f"{prefix}.base_layer.lora_A.weight"].shape == (3 * 6, 16)
        assert state[f"{prefix}.lora_B.weight"].shape == (16, 3 * 3)
        found = json.loads((directory / "again" / "adapter_config.json").read_text())
        assert found["rank_pattern"] == {"experts.gate_up_proj": 6, "experts.down_proj": 3}
        reference = theirs(mixture("mixtral"), directory / "again")
        torch.testing.assert_close(logits(reference), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate", *MIXTRAL], r".*\.(q_proj|gate|w[123])"], ids=str)
def test_a_router_that_was_a_layer_is_adapted_as_a_parameter(targets, tmp_path):
    linear = ("q_proj",) if targets != "all-linear" else ("q_proj", "k_proj", "v_proj", "o_proj")
    file, _ = old_file(mixture("mixtral"), "mixtral", linear=linear)
    for layer in range(2):
        update = file.pair(f"model.layers.{layer}.block_sparse_moe.gate", 3, 16)
        file.updates[f"model.layers.{layer}.mlp.gate.weight"] = update
    file.save(tmp_path / "old", target_modules=targets)
    model = check("mixtral", file, tmp_path)
    reference = theirs(mixture("mixtral"), tmp_path / "again")
    torch.testing.assert_close(logits(reference), logits(model), rtol=0, atol=1e-5)


def test_half_precision_and_scalings_that_differ_do_not_round_twice(tmp_path):
    file = experts_only("mixtral", options={"w3": {"lora_alpha": 7}})
    tensors = {key: tensor.bfloat16() for key, tensor in file.tensors.items()}
    file.save(tmp_path / "old", target_modules=list(MIXTRAL), alpha_pattern={"w3": 7})
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    state = load_adapter(mixture("mixtral"), tmp_path / "old").adapter_state_dict()
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
    old = tensors["base_model.model.model.layers.0.block_sparse_moe.experts.2.w3.lora_B.weight"]
    assert torch.equal(state[key].view(24, 4, 3)[12:, 2:, 2], (old.double() * (7 / 3)).float())


def test_dropout_that_has_no_layer_to_act_on_is_set_to_zero_and_logged(tmp_path, caplog):
    file = experts_only("mixtral")
    file.save(tmp_path / "old", target_modules=list(MIXTRAL), lora_dropout=0.05)
    with caplog.at_level(logging.INFO, "minipeft"):
        model = check("mixtral", file, tmp_path)
    assert "the LoRA of 18 single layers, such as model.layers.0.block_sparse_moe.experts.0.w1, is" in caplog.text
    assert "lora_dropout" in caplog.text
    assert model.peft_config["default"].lora_dropout == 0


def test_a_second_adapter_finds_the_experts_that_the_first_has_wrapped(tmp_path):
    files = [experts_only("mixtral", seed=seed) for seed in (1, 2)]
    model = mixture("mixtral")
    for name, file in zip("ab", files, strict=True):
        file.save(tmp_path / name, target_modules=list(MIXTRAL))
        model = load_adapter(model, tmp_path / name, adapter_name=name)
    for name, file in zip("ab", files, strict=True):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), logits(file.into(mixture("mixtral"))), rtol=0, atol=1e-5)


def with_more(tensors, **more):
    return {**tensors, **{f"base_model.model.model.layers.0.{key}": torch.zeros(shape) for key, shape in more.items()}}


W1 = "block_sparse_moe.experts.0.w1"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "experts.2.w1" not in k},
            {},
            r"lacks 'model.layers.0.block_sparse_moe.experts.2.w1'",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "0.w1.lora_A" not in k},
            {},
            r"lacks lora_A of model.layers.0.block_sparse_moe.experts.0.w1",
        ),
        (lambda t: t, {"target_modules": ["w1", "w2"]}, "holds .*experts.0.w3.*, but not its configuration selects"),
        (
            lambda t: with_more(t, **{f"{W1}.lora_magnitude_vector": (12,)}),
            {"use_dora": True},
            "lora_magnitude_vector.* only plain LoRA is the same",
        ),
        (lambda t: t, {"use_dora": True}, "dora adapts model.layers.0.block_sparse_moe.experts.0.w1"),
        (lambda t: with_more(t, **{f"{W1}.lora_B.bias": (12,)}), {"lora_bias": True}, "lora_B.bias.* only plain LoRA"),
        (lambda t: with_more(t, **{f"{W1}.weight": (12, 16)}), {}, "w1.weight.* only plain LoRA"),
        (
            lambda t: with_more(
                t,
                **{
                    "block_sparse_moe.experts.3.w1.lora_A.weight": (2, 16),
                    "block_sparse_moe.experts.3.w1.lora_B.weight": (12, 2),
                },
            ),
            {},
            "has 3 experts",
        ),
        (
            lambda t: with_more(
                t,
                **{
                    "block_sparse_moe.experts.999999.w1.lora_A.weight": (2, 16),
                    "block_sparse_moe.experts.999999.w1.lora_B.weight": (12, 2),
                },
            ),
            {},
            "has 3 experts",
        ),
        (
            lambda t: with_more(t, **{"block_sparse_moe.experts.99999999999.w1.lora_A.weight": (2, 16)}),
            {},
            "unexpected",
        ),
        (lambda t: with_more(t, **{"block_sparse_moe.experts.00.w1.lora_A.weight": (2, 16)}), {}, "unexpected"),
        (
            lambda t: with_more(
                t, **{"mlp.experts.0.w1.lora_A.weight": (2, 16), "mlp.experts.0.w1.lora_B.weight": (12, 2)}
            ),
            {},
            "two layers that are",
        ),
        (
            lambda t: with_more(t, **{"mlp.experts.base_layer.lora_A.weight": (12, 16)}),
            {},
            "twice, once under its old name",
        ),
        (lambda t: with_more(t, **{f"{W1}.lora_A.default.weight": (2, 16)}), {}, "holds lora_A of .* twice"),
        (
            lambda t: {k: v[:, :8] if k.endswith("1.w2.lora_A.weight") else v for k, v in t.items()},
            {},
            r"w2.lora_A.weight is F32 \[2, 8\] in the file, and \[2, 12\]",
        ),
        (lambda t: t, {"r": 4}, r"is F32 \[2, 16\] in the file, and \[4, 16\] here"),
        (lambda t: {k: v.int() if "0.w2.lora_B" in k else v for k, v in t.items()}, {}, "is I32"),
        (lambda t: {k: v * float("nan") if "0.w2.lora_B" in k else v for k, v in t.items()}, {}, "NaN or infinity"),
        (
            lambda t: {k: v for k, v in t.items() if "layers.0" in k},
            {},
            "lacks 'model.layers.1.block_sparse_moe.experts.0.w1'",
        ),
        (
            lambda t: {
                k.replace("lora_A.weight", "hada_w1_a").replace("lora_B.weight", "hada_w1_b"): v for k, v in t.items()
            },
            {"peft_type": "LOHA", "lora_alpha": None, "use_rslora": None},
            "only plain LoRA",
        ),
    ],
)
def test_what_is_not_the_same_in_a_fused_model_is_refused(change, config, message, tmp_path):
    file = experts_only("mixtral")
    file.tensors = {key: tensor.contiguous() for key, tensor in change(file.tensors).items()}
    file.save(tmp_path / "old", **({"target_modules": list(MIXTRAL)} | config))
    model = mixture("mixtral")
    before = state_digest(model)
    with pytest.raises(MinipeftError, match=message) as error:
        load_adapter(model, tmp_path / "old")
    assert str(error.value).endswith("Nothing was changed.")
    assert state_digest(model) == before


def test_zeros_are_not_filled_in_without_bound(tmp_path):
    """One expert of an absurd rank would make all of them as large."""
    file = experts_only("mixtral", options={"experts.1.w2": {"r": 5000}})
    file.save(tmp_path / "old", target_modules=list(MIXTRAL), rank_pattern={"experts.1.w2": 5000})
    with pytest.raises(CheckpointError, match="ranks of up to 5,000, and not all the same"):
        load_adapter(mixture("mixtral"), tmp_path / "old")


def test_the_adapters_name_and_a_doubled_prefix_may_stand_in_the_keys(tmp_path):
    file = experts_only("mixtral")
    file.tensors = {f"base_model.model.{k}".replace(".weight", ".default.weight"): v for k, v in file.tensors.items()}
    file.save(tmp_path / "old", target_modules=list(MIXTRAL))
    check("mixtral", file, tmp_path)


QWEN_LAYERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
MIXTRAL_LAYERS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


def split_again(directory, layers=QWEN_LAYERS, experts=".mlp.experts."):
    """The saved file, split, as another file with this name for its lists of experts; returns its tensors."""
    tensors = load_file(directory / "again" / "adapter_model.safetensors")
    tensors = {key.replace(".mlp.experts.", experts): tensor for key, tensor in tensors.items()}
    config = json.loads((directory / "again" / "adapter_config.json").read_text())
    tensors, options = split_experts(tensors, config_from_dict(config), layers)
    names = {key.split(".lora_")[0].rpartition(".")[2] for key in tensors}
    config = {**options, "target_modules": sorted(names)}
    (directory / "split").mkdir()
    save_file(tensors, directory / "split" / "adapter_model.safetensors")
    (directory / "split" / "adapter_config.json").write_text(json.dumps(config))
    return tensors, config


@pytest.mark.parametrize("use_rslora", [False, True])
def test_fused_experts_are_split_into_the_pairs_they_were_made_of(use_rslora, tmp_path):
    options = {"w2": {"r": 4, "lora_alpha": 7}}
    file = experts_only("mixtral", options=options, use_rslora=use_rslora)
    patterns = {"rank_pattern": {"w2": 4}, "alpha_pattern": {"w2": 7}}
    file.save(tmp_path / "old", target_modules=list(MIXTRAL), **patterns)
    model = check("mixtral", file, tmp_path)
    tensors, config = split_again(tmp_path, MIXTRAL_LAYERS, ".block_sparse_moe.experts.")
    assert tensors.keys() == file.tensors.keys()
    assert all(torch.equal(tensors[key], file.tensors[key]) for key in tensors)
    assert config["target_parameters"] is None
    assert sorted(config["target_modules"]) == sorted(MIXTRAL)
    again = load_adapter(mixture("mixtral"), tmp_path / "split")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]], ids=str)
def test_experts_that_were_trained_fused_are_split_exactly(parameters, tmp_path):
    config = minipeft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        init_lora_weights=False,
        rank_pattern={parameters[-1]: 3},
        target_parameters=[f"experts.{name}" for name in parameters],
    )
    model = minipeft.get_lora_model(mixture("qwen3_moe"), config)
    model.save_pretrained(tmp_path / "again")
    tensors, config = split_again(tmp_path)
    prefix = "base_model.model.model.layers.1.mlp.experts.3"
    if "gate_up_proj" in parameters:
        shapes = [tensors[f"{prefix}.{name}.lora_{factor}.weight"].shape for name in QWEN[:2] for factor in "AB"]
        r = 2 if len(parameters) == 2 else 3
        assert shapes == [(r, 16), (12, r)] * 2
    assert not any("experts.lora" in key or "base_layer" in key for key in tensors)
    again = load_adapter(mixture("qwen3_moe"), tmp_path / "split")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    reference = theirs(mixture("qwen3_moe"), tmp_path / "again")
    torch.testing.assert_close(logits(reference), logits(model), rtol=0, atol=1e-5)


def test_what_has_no_fused_experts_is_not_split_and_what_does_not_fit_is_refused():
    tensors = {
        "base_model.model.a.lora_A.weight": torch.ones(2, 3),
        "base_model.model.a.lora_B.weight": torch.ones(4, 2),
    }
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["a"]}
    assert split_experts(tensors, config_from_dict(config), QWEN_LAYERS)[0] == tensors
    fused = {key.replace("model.a", "model.experts"): tensor for key, tensor in tensors.items()}
    both = {**config, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    with pytest.raises(CheckpointError, match="experts has 1 pairs, and target_parameters names 2"):
        split_experts(fused, config_from_dict(both), QWEN_LAYERS)
    with pytest.raises(CheckpointError, match="not those of experts of rank 3"):
        split_experts(fused, config_from_dict({**both, "r": 3, "target_parameters": ["gate_up_proj"]}), QWEN_LAYERS)

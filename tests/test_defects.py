"""What PEFT 0.21.2 gets wrong about names, files, merging and orientation, and what happens here instead."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    adapted,
    bert_classifier,
    disturb,
    foreign_code,
    gpt2,
    llama,
    logits,
    refuses,
    state_digest,
    trainable,
)
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from minipeft import CheckpointError, LoraConfig, MergeError, StateError, TargetError, get_lora_model, load_adapter
from minipeft.injection.module_tree import adapted_layers

every_merge = pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])


@pytest.mark.parametrize("targets", [["c_attn", "c_atn"], ["c_atn", "c_attn"], ["c_attn", "attn.c_atn"]])
def test_each_entry_of_target_modules_must_match(targets):
    model = gpt2()
    refuses(
        TargetError,
        model,
        lambda: get_lora_model(model, LoraConfig(target_modules=targets)),
        "c_atn'",
        "c_attn",
        "2 modules",
    )


def test_each_entry_of_exclude_modules_must_match():
    model = gpt2()
    config = LoraConfig(target_modules=["c_attn"], exclude_modules=["h.0.attn.c_attn", "h.7.attn.c_attn"])
    refuses(TargetError, model, lambda: get_lora_model(model, config), "exclude_modules", "h.7.attn.c_attn")


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_each_key_of_a_pattern_table_must_match(option):
    model = gpt2()
    config = LoraConfig(target_modules=["c_attn"], **{option: {"c_attn": 2, "c_fc": 2}})
    refuses(TargetError, model, lambda: get_lora_model(model, config), option, "c_fc")


def test_a_misspelt_module_to_save_is_refused():
    model = gpt2()
    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["ln_f", "lm_haed"])
    refuses(TargetError, model, lambda: get_lora_model(model, config), "modules_to_save", "'lm_haed'", "'lm_head'")


def test_a_module_to_save_is_matched_at_a_dot():
    model = gpt2()
    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["head"])
    refuses(TargetError, model, lambda: get_lora_model(model, config), "'head'")


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_shared_module_to_save_is_found_by_each_of_its_names(name):
    model = get_lora_model(Shared(), LoraConfig(target_modules=["last"], modules_to_save=[name]))
    assert model.first is model.second
    assert sum("weight" in key for key in trainable(model)) == 1


def test_layers_to_transform_holds_for_full_names_too():
    model = gpt2()
    targets = ["c_attn", "transformer.h.0.mlp.c_fc"]
    config = LoraConfig(target_modules=targets, layers_to_transform=[1])
    refuses(TargetError, model, lambda: get_lora_model(model, config), "transformer.h.0.mlp.c_fc")
    config = LoraConfig(target_modules=targets, layers_to_transform=[0])
    found = [name for name, _ in adapted_layers(get_lora_model(model, config))]
    assert found == ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"]


def change_file(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


EXTRA = "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"
WANTED = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


def test_an_unexpected_tensor_in_a_file_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: tensors.update({EXTRA: torch.ones(4, 32)}))
    model = gpt2()
    refuses(CheckpointError, model, lambda: load_adapter(model, tmp_path), "unexpected", EXTRA)
    other = adapted()
    refuses(CheckpointError, other, lambda: other.load_adapter(tmp_path, "second"), "unexpected", EXTRA)
    assert list(other.adapter_configs) == ["default"]


def test_a_missing_tensor_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: tensors.pop(WANTED))
    model = gpt2()
    refuses(CheckpointError, model, lambda: load_adapter(model, tmp_path), "missing", WANTED)


def test_a_renamed_tensor_is_named_beside_what_was_expected(tmp_path):
    adapted().save_pretrained(tmp_path)
    renamed = WANTED.replace("c_attn", "attention")
    change_file(tmp_path, lambda tensors: tensors.update({renamed: tensors.pop(WANTED)}))
    model = gpt2()
    refuses(CheckpointError, model, lambda: load_adapter(model, tmp_path), renamed, WANTED)


def test_without_strict_a_warning_names_what_was_left_out(tmp_path):
    source = adapted()
    source.save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: tensors.update({EXTRA: torch.ones(4, 32)}))
    with pytest.warns(UserWarning, match=r"mlp\.c_fc\.lora_A"):
        model = load_adapter(gpt2(), tmp_path, strict=False)
    assert torch.equal(logits(model), logits(source))


def test_loading_under_a_name_that_is_taken_is_refused(tmp_path):
    source = adapted(lora_alpha=40)
    source.save_pretrained(tmp_path)
    model = adapted(lora_alpha=1)
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=2))
    for name in ("default", "second"):
        refuses(StateError, model, lambda name=name: model.load_adapter(tmp_path, name), name, "delete_adapter")
        refuses(StateError, model, lambda name=name: model.add_adapter(name, LoraConfig()), name)
    assert [config.lora_alpha for config in model.adapter_configs.values()] == [1, 2]
    model.delete_adapter("second")
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(source))  # with the alpha of the file


def switched(model):
    """The model after everything that switches and switches back."""
    with model.disable_adapter():
        pass
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    active = model.active_adapters
    for name in [*model.adapter_configs, *active]:
        model.set_adapter(name)
    model.merge_adapter()
    with model.disable_adapter():
        pass
    model.unmerge_adapter()
    return model


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["ln_f"]}, {"bias": "all"}])
def test_a_frozen_adapter_stays_frozen_whatever_is_switched(options, tmp_path):
    adapted(**options).save_pretrained(tmp_path)
    model = load_adapter(gpt2(), tmp_path)
    model.load_adapter(tmp_path, "second")
    assert trainable(switched(model)) == []


def test_a_trainable_adapter_stays_trainable_beside_a_frozen_one(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = load_adapter(gpt2(), tmp_path, is_trainable=True)
    before = trainable(model)
    assert len(before) == 4
    model.load_adapter(tmp_path, "second")
    assert trainable(switched(model)) == before


def test_what_was_frozen_by_hand_stays_frozen():
    """LoRA-FA, say, freezes every A."""
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = trainable(model)
    assert all("lora_B" in name for name in before)
    with model.disable_adapter():
        pass
    assert trainable(model) == before
    for names in ("default", "second", "default", ["second", "default"], "default"):
        model.set_adapter(names)
    assert trainable(model) == before


def two_adapters(model=None):
    model = adapted(model)
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn", "c_fc"]))
    model.set_adapter("second")
    disturb(model, seed=9)
    model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize("name", ["default", "second"])
def test_merging_one_of_two_active_adapters_keeps_the_other_acting(name):
    model = two_adapters()
    expected, weights = logits(model), state_digest(model)
    model.merge_adapter([name])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert state_digest(model) == weights
    assert torch.equal(logits(model), expected)


def test_each_adapter_counts_once_when_both_are_merged_one_by_one():
    both = two_adapters()
    first = copy.deepcopy(both)
    first.merge_adapter(["default"])
    first.merge_adapter(["second"])
    both.merge_adapter()
    left, right = first.state_dict(), both.state_dict()
    assert all(torch.equal(left[key], right[key]) for key in right)


def two_of_a_kind(**options):
    """Two adapters with the same options, each moved its own way; the second acts."""
    model = adapted(**options)
    model.add_adapter("second", LoraConfig(r=2, **options))
    model.set_adapter("second")
    return disturb(model, seed=9)


def test_adapters_that_train_the_same_bias_add_up_merged_as_unmerged():
    """PEFT allows one such adapter in a model."""
    model = two_of_a_kind(bias="lora_only")
    model.set_adapter(["default", "second"])
    expected = logits(model)
    model.merge_adapter(["default"])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@every_merge
@pytest.mark.parametrize("options", [{"modules_to_save": ["ln_f"]}, {"bias": "all"}])
def test_adapters_that_train_the_same_module_in_full_are_not_merged_together(verb, options):
    """Only one of the copies could be kept."""
    model = two_of_a_kind(**options)
    refuses(StateError, model, lambda: model.set_adapter(["default", "second"]), "default", "second")
    refuses(StateError, model, lambda: getattr(model, verb)(adapter_names=["default", "second"]), "default", "second")


@pytest.mark.parametrize("options", [{}, {"bias": "lora_only"}, {"bias": "all"}, {"modules_to_save": ["ln_f"]}])
def test_an_adapter_added_beside_a_merged_one_starts_from_the_base(options):
    model = adapted(bias="lora_only")
    model.merge_adapter()
    model.add_adapter("second", LoraConfig(**options))
    model.unmerge_adapter()
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(gpt2()))


@pytest.mark.parametrize("merge_first", [False, True])
def test_unload_works_while_the_adapters_are_switched_off(merge_first):
    model = two_adapters()
    if merge_first:
        model.merge_adapter()
    with model.disable_adapter():
        base = model.unload()
    assert type(base) is GPT2LMHeadModel
    assert torch.equal(logits(base), logits(gpt2()))


@pytest.mark.each_value
@pytest.mark.parametrize("merge_first", [False, True])
@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head", "ln_f"]}),
        (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
        (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
        (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}),
        (bert_classifier, {"task_type": "SEQ_CLS"}),
        (llama, {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_unload_gives_the_base_back_bit_for_bit(factory, options, merge_first):
    base = factory()
    before = state_digest(base)
    model = adapted(base, **options)
    assert not torch.allclose(logits(model), logits(factory()), atol=1e-3)
    if merge_first:
        model.merge_adapter()
    unloaded = model.unload()
    assert unloaded is base
    assert state_digest(unloaded) == before
    assert torch.equal(logits(unloaded), logits(factory()))


@every_merge
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merge_that_fails_in_the_last_layer_changes_none(verb, value):
    model = adapted()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.adapters["default"].lora_B[3, 1] = value
    refuses(MergeError, model, getattr(model, verb), "transformer.h.1.attn.c_attn", "default")


@every_merge
def test_an_overflow_in_half_precision_changes_no_layer(verb):
    model = adapted(gpt2().half())
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.adapters["default"].lora_B.fill_(1e7)
    refuses(MergeError, model, getattr(model, verb), "transformer.h.1.attn.c_attn", "float16")


@pytest.mark.parametrize(
    "action",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_adapter(["second"]),
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(adapter_names=["second"]),
    ],
)
def test_a_failed_merge_leaves_an_earlier_merge_in_place(action):
    model = two_adapters()
    model.merge_adapter(["default"])
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.adapters["second"].lora_B[0, 0] = float("nan")
    refuses(MergeError, model, lambda: action(model), "transformer.h.1.mlp.c_fc", "second")
    assert all(layer.merged == ("default",) for name, layer in adapted_layers(model) if "c_attn" in name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_rounds_the_exact_sum_once(dtype):
    model = two_adapters(gpt2().to(dtype))
    before = {name: layer.base_layer.weight.detach().clone() for name, layer in adapted_layers(model)}
    updates = {}
    for name, layer in adapted_layers(model):
        updates[name] = sum(  # in float64, from the definition
            lora.scaling * (lora.lora_B.double() @ lora.lora_A.double()).T.detach() for lora in layer.adapters.values()
        )
    report = model.merge_adapter()
    for name, layer in adapted_layers(model):
        exact = before[name].double() + updates[name]
        rounded = layer.base_layer.weight.detach()
        ulp = torch.finfo(dtype).eps * exact.abs()
        assert bool(((rounded.double() - exact).abs() <= 0.5 * ulp + 1e-6).all()), name
        if dtype != torch.float32:  # float32 sums differ from float64's by less than decides a half-precision rounding
            assert (rounded != exact.to(dtype)).float().mean() < 1e-3
        error = (rounded.double() - before[name].double() - updates[name]).norm() / updates[name].norm()
        assert report.relative_error[name] == pytest.approx(float(error), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_and_unmerging_does_not_drift(dtype):
    model = two_adapters(gpt2().to(dtype))
    before = state_digest(model)
    model.merge_adapter()
    merged = state_digest(model)
    for _ in range(7):  # a hundred in test_merge.py
        model.unmerge_adapter()
        assert state_digest(model) == before
        model.merge_adapter()
        assert state_digest(model) == merged


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 8)

    def forward(self, ids):
        return self.table(ids)


def test_dropout_acts_on_an_embedding():
    """A one-hot input drops as a whole: a token's update is gone, or scaled by 1 / (1 - p); in eval nothing drops."""
    p, ids = 0.25, torch.arange(30).repeat(400)
    model = disturb(get_lora_model(Table(), LoraConfig(r=2, target_modules=["table"], lora_dropout=p)))
    with torch.no_grad():
        base = model.table.base_layer(ids)
        update = model.eval()(ids) - base
        dropped = model.train()(ids) - base
    kept = dropped.abs().sum(1) > 0
    torch.testing.assert_close(dropped[kept], update[kept] / (1 - p), rtol=1e-3, atol=1e-5)
    share = float(kept.float().mean())
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / len(ids)) ** 0.5
    assert len({bool(k) for k in kept[ids == 3]}) == 2  # each occurrence of a token for itself


class Mixed(nn.Module):
    """Square layers of both orientations, where a transposed weight has the right shape."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.conv = Conv1D(8, 8)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(torch.tanh(self.conv(torch.tanh(self.linear(x)))))


def mixed():
    torch.manual_seed(0)
    return Mixed()


INPUT = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_each_layer_knows_its_own_orientation(fan_in_fan_out):
    config = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=fan_in_fan_out)
    model = disturb(get_lora_model(mixed(), config))
    with torch.no_grad():
        x = INPUT
        for name in ("linear", "conv", "last"):
            lora, base = getattr(model, name).adapters["default"], getattr(mixed(), name)
            weight = base.weight.T if name == "conv" else base.weight
            x = x @ (weight + 4 * lora.lora_B @ lora.lora_A).T + base.bias
            x = x if name == "last" else torch.tanh(x)
        torch.testing.assert_close(model(INPUT), x)
        torch.testing.assert_close(model.merge_and_unload()(INPUT), x)


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_a_model_of_both_orientations_goes_through_files(fan_in_fan_out, tmp_path):
    """Whatever the file says of fan_in_fan_out, which holds for one layer at a time, ours and PEFT's readers agree."""
    with foreign_code():
        peft = pytest.importorskip("peft")
    model = disturb(get_lora_model(mixed(), LoraConfig(r=2, target_modules="all-linear")))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    assert written["fan_in_fan_out"] is True  # there is a Conv1D
    change_file(tmp_path, lambda tensors: None)
    path.write_text(json.dumps({**written, "fan_in_fan_out": fan_in_fan_out}))
    loaded = load_adapter(mixed(), tmp_path)
    with foreign_code():
        reference = peft.PeftModel.from_pretrained(mixed(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(INPUT), model(INPUT))
        torch.testing.assert_close(reference(INPUT), model(INPUT))
        torch.testing.assert_close(loaded.merge_and_unload()(INPUT), model(INPUT))


CONFIGS = [
    {"target_modules": ["c_attn", "c_proj"]},
    {"target_modules": "all-linear"},
    {},
    {"target_modules": ["c_attn"], "rank_pattern": {"h.1.attn.c_attn": 3}, "modules_to_save": ["ln_f"], "bias": "all"},
    {"target_modules": {"c_attn", "c_fc"}, "layers_to_transform": 0, "task_type": "CAUSAL_LM"},
]


@pytest.mark.parametrize("options", CONFIGS)
def test_the_config_of_the_user_is_never_changed(options, tmp_path):
    given = copy.deepcopy(options)
    config = LoraConfig(**given)
    before = copy.deepcopy(dataclasses.asdict(config))
    model = get_lora_model(gpt2(), config)
    model.add_adapter("second", dataclasses.replace(config, modules_to_save=None, bias="none"))
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    model.merge_and_unload()
    assert dataclasses.asdict(config) == before
    assert given == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3


def test_one_config_serves_models_of_both_orientations():
    config = LoraConfig(target_modules="all-linear", r=4)
    for factory in (gpt2, llama, gpt2):
        model = disturb(get_lora_model(factory(), config))
        expected = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)

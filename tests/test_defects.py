"""What PEFT 0.21.2 gets wrong (shared/peft.md, section 3c; the numbers are its), and what happens here instead.

Not here, since what they concern is not built yet: 10 (mixed batches), 11 and 12 (weighted adapters), 13 (OLoRA),
14 (LoftQ), 15 (convolutions), 16 (layer replication), 19 (lora_bias), 24 (CorDA).
"""

import copy
import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import adapted, bert_classifier, disturb, foreign_code, gpt2, llama, logits, state_digest
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from minipeft import CheckpointError, LoraConfig, MergeError, StateError, TargetError, get_lora_model, load_adapter
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import adapted_layers
from minipeft.methods.lora import Lora


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def refuses(error, model, action, *named):
    """The action raises this error, its message has these words, and the model is what it was."""
    before = state_digest(model)
    with pytest.raises(error) as caught:
        action()
    for word in named:
        assert word in str(caught.value)
    assert state_digest(model) == before


TIED_TARGETS = [["wte"], ["lm_head"], ["wte", "lm_head"], ["wte", "c_attn"]]
every_tie = pytest.mark.parametrize("targets", TIED_TARGETS, ids=" ".join)
every_merge = pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])


@every_tie
@every_merge
def test_1_merging_into_a_tied_weight_is_refused(targets, verb):
    model = adapted(target_modules=targets)
    expected = logits(model)
    refuses(MergeError, model, getattr(model, verb), "tied", "untie=True")
    assert torch.equal(logits(model), expected)


@every_tie
@every_merge
def test_1_with_untie_the_merged_model_computes_what_the_adapted_one_did(targets, verb):
    model = adapted(target_modules=targets)
    expected, table = logits(model), gpt2().transformer.wte.weight
    getattr(model, verb)(untie=True)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    if "lm_head" not in targets:
        assert torch.equal(model.lm_head.weight, table)
    if "wte" not in targets:
        assert torch.equal(model.transformer.wte.weight, table)


@every_tie
def test_1_the_untied_merged_model_survives_saving_and_reloading(targets, tmp_path):
    model = adapted(target_modules=targets)
    expected = logits(model)
    merged = model.merge_and_unload(untie=True)
    with foreign_code():
        merged.save_pretrained(tmp_path)
        reloaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(reloaded), logits(merged))


@every_tie
def test_1_unmerging_ties_the_weights_again(targets):
    model = adapted(target_modules=targets)
    before = state_digest(model)
    model.merge_adapter(untie=True)
    assert model.config.tie_word_embeddings is False
    model.unmerge_adapter()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings is True
    assert state_digest(model) == before


def test_1_the_tie_of_the_merged_model_stays_cut_when_transformers_ties_weights():
    model = adapted(target_modules=["wte"])
    expected = logits(model)
    merged = model.merge_and_unload(untie=True)
    with foreign_code():
        merged.tie_weights()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_1_merging_beside_a_tie_needs_no_leave():
    model = adapted(target_modules=["c_attn"])
    expected = logits(model)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings is True
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("saved", [["lm_head"], ["wte"], ["wte", "lm_head"]], ids=" ".join)
def test_1_a_tied_module_trained_in_full_survives_merging_saving_and_reloading(saved, tmp_path):
    model = adapted(target_modules=["c_attn"], modules_to_save=saved)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    with foreign_code():
        merged.save_pretrained(tmp_path)
        reloaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(merged))


@pytest.mark.parametrize("targets", [["c_attn", "c_atn"], ["c_atn", "c_attn"], ["c_attn", "attn.c_atn"]])
def test_2_each_entry_of_target_modules_must_match(targets):
    model = gpt2()
    refuses(
        TargetError,
        model,
        lambda: get_lora_model(model, LoraConfig(target_modules=targets)),
        "c_atn'",
        "c_attn",
        "2 modules",
    )


def test_2_each_entry_of_exclude_modules_must_match():
    model = gpt2()
    config = LoraConfig(target_modules=["c_attn"], exclude_modules=["h.0.attn.c_attn", "h.7.attn.c_attn"])
    refuses(TargetError, model, lambda: get_lora_model(model, config), "exclude_modules", "h.7.attn.c_attn")


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_2_each_key_of_a_pattern_table_must_match(option):
    model = gpt2()
    config = LoraConfig(target_modules=["c_attn"], **{option: {"c_attn": 2, "c_fc": 2}})
    refuses(TargetError, model, lambda: get_lora_model(model, config), option, "c_fc")


def test_3_a_misspelt_module_to_save_is_refused():
    model = gpt2()
    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["ln_f", "lm_haed"])
    refuses(TargetError, model, lambda: get_lora_model(model, config), "modules_to_save", "'lm_haed'", "'lm_head'")


def test_3_a_module_to_save_is_matched_at_a_dot():
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
def test_3_a_shared_module_to_save_is_found_by_each_of_its_names(name):
    model = get_lora_model(Shared(), LoraConfig(target_modules=["last"], modules_to_save=[name]))
    assert model.first is model.second
    assert sum("weight" in key for key in trainable(model)) == 1


def test_22_layers_to_transform_holds_for_full_names_too():
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


def test_4_an_unexpected_tensor_in_a_file_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: tensors.update({EXTRA: torch.ones(4, 32)}))
    model = gpt2()
    refuses(CheckpointError, model, lambda: load_adapter(model, tmp_path), "unexpected", EXTRA)
    other = adapted()
    refuses(CheckpointError, other, lambda: other.load_adapter(tmp_path, "second"), "unexpected", EXTRA)
    assert list(other.adapter_configs) == ["default"]


def test_4_a_missing_tensor_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: tensors.pop(WANTED))
    model = gpt2()
    refuses(CheckpointError, model, lambda: load_adapter(model, tmp_path), "missing", WANTED)


def test_4_a_renamed_tensor_is_named_beside_what_was_expected(tmp_path):
    adapted().save_pretrained(tmp_path)
    renamed = WANTED.replace("c_attn", "attention")
    change_file(tmp_path, lambda tensors: tensors.update({renamed: tensors.pop(WANTED)}))
    model = gpt2()
    refuses(CheckpointError, model, lambda: load_adapter(model, tmp_path), renamed, WANTED)


def test_4_without_strict_a_warning_names_what_was_left_out(tmp_path):
    source = adapted()
    source.save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: tensors.update({EXTRA: torch.ones(4, 32)}))
    with pytest.warns(UserWarning, match=r"mlp\.c_fc\.lora_A"):
        model = load_adapter(gpt2(), tmp_path, strict=False)
    assert torch.equal(logits(model), logits(source))


def test_5_loading_under_a_name_that_is_taken_is_refused(tmp_path):
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
def test_6_a_frozen_adapter_stays_frozen_whatever_is_switched(options, tmp_path):
    adapted(**options).save_pretrained(tmp_path)
    model = load_adapter(gpt2(), tmp_path)
    model.load_adapter(tmp_path, "second")
    assert trainable(switched(model)) == []


def test_6_a_trainable_adapter_stays_trainable_beside_a_frozen_one(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = load_adapter(gpt2(), tmp_path, is_trainable=True)
    before = trainable(model)
    assert len(before) == 4
    model.load_adapter(tmp_path, "second")
    assert trainable(switched(model)) == before


def test_6_what_was_frozen_by_hand_stays_frozen():
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
def test_7_merging_one_of_two_active_adapters_keeps_the_other_acting(name):
    model = two_adapters()
    expected, weights = logits(model), state_digest(model)
    model.merge_adapter([name])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert state_digest(model) == weights
    assert torch.equal(logits(model), expected)


def test_7_each_adapter_counts_once_when_both_are_merged_one_by_one():
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


def test_7_adapters_that_train_the_same_bias_add_up_merged_as_unmerged():
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
def test_7_adapters_that_train_the_same_module_in_full_are_not_merged_together(verb, options):
    """Only one of the copies could be kept."""
    model = two_of_a_kind(**options)
    refuses(StateError, model, lambda: model.set_adapter(["default", "second"]), "default", "second")
    refuses(StateError, model, lambda: getattr(model, verb)(["default", "second"]), "default", "second")


@pytest.mark.parametrize("options", [{}, {"bias": "lora_only"}, {"bias": "all"}, {"modules_to_save": ["ln_f"]}])
def test_7_an_adapter_added_beside_a_merged_one_starts_from_the_base(options):
    model = adapted(bias="lora_only")
    model.merge_adapter()
    model.add_adapter("second", LoraConfig(**options))
    model.unmerge_adapter()
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(gpt2()))


@pytest.mark.parametrize("merge_first", [False, True])
def test_8_unload_works_while_the_adapters_are_switched_off(merge_first):
    model = two_adapters()
    if merge_first:
        model.merge_adapter()
    with model.disable_adapter():
        base = model.unload()
    assert type(base) is GPT2LMHeadModel
    assert torch.equal(logits(base), logits(gpt2()))


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
def test_8_unload_gives_the_base_back_bit_for_bit(factory, options, merge_first):
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
def test_9_a_merge_that_fails_in_the_last_layer_changes_none(verb, value):
    model = adapted()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.adapters["default"].lora_B[3, 1] = value
    refuses(MergeError, model, getattr(model, verb), "transformer.h.1.attn.c_attn", "default")


@every_merge
def test_9_an_overflow_in_half_precision_changes_no_layer(verb):
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
        lambda model: model.merge_and_unload(["second"]),
    ],
)
def test_9_a_failed_merge_leaves_an_earlier_merge_in_place(action):
    model = two_adapters()
    model.merge_adapter(["default"])
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.adapters["second"].lora_B[0, 0] = float("nan")
    refuses(MergeError, model, lambda: action(model), "transformer.h.1.mlp.c_fc", "second")
    assert all(layer.merged == ("default",) for name, layer in adapted_layers(model) if "c_attn" in name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_21_merging_rounds_the_exact_sum_once(dtype):
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
def test_21_merging_and_unmerging_does_not_drift(dtype):
    model = two_adapters(gpt2().to(dtype))
    before = state_digest(model)
    model.merge_adapter()
    merged = state_digest(model)
    for _ in range(31):
        model.unmerge_adapter()
        assert state_digest(model) == before
        model.merge_adapter()
        assert state_digest(model) == merged


def fails_at_call(monkeypatch, cls, method, number):
    original, calls = getattr(cls, method), []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == number:
            raise MemoryError("out of memory")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, method, failing)


@pytest.mark.parametrize("targets", [["c_attn", "ln_1"], ["ln_f", "c_attn"], ["c_attn", "drop"]])
def test_17_a_layer_that_cannot_be_adapted_leaves_the_others_alone(targets):
    model = gpt2()
    config = LoraConfig(target_modules=targets)
    refuses(TargetError, model, lambda: get_lora_model(model, config), "no LayerOps", "transformer.")
    assert type(model) is GPT2LMHeadModel
    assert type(get_lora_model(model, LoraConfig())).__name__ == "GPT2LMHeadModel"  # and it still can be


@pytest.mark.parametrize(("cls", "method"), [(Lora, "reset_parameters"), (AdaptedLayer, "__init__")])
def test_17_an_injection_that_breaks_off_leaves_nothing_behind(cls, method, monkeypatch):
    model = gpt2()
    config = LoraConfig(target_modules=["c_attn", "c_proj"], modules_to_save=["ln_f"])
    with monkeypatch.context() as patch:
        fails_at_call(patch, cls, method, 3)
        refuses(MemoryError, model, lambda: get_lora_model(model, config))
    assert type(model) is GPT2LMHeadModel
    assert torch.equal(logits(get_lora_model(model, config)), logits(gpt2()))


@pytest.mark.parametrize(("cls", "method"), [(Lora, "reset_parameters"), (AdaptedLayer, "__init__")])
def test_17_a_second_adapter_that_breaks_off_leaves_the_first_alone(cls, method, monkeypatch, tmp_path):
    model = adapted()
    expected = logits(model)
    config = LoraConfig(target_modules=["c_attn", "c_proj"])
    adapted(target_modules=["c_attn", "c_proj"]).save_pretrained(tmp_path)
    for action in (lambda: model.add_adapter("second", config), lambda: model.load_adapter(tmp_path, "second")):
        with monkeypatch.context() as patch:
            fails_at_call(patch, cls, method, 3)
            refuses(MemoryError, model, action)
    assert list(model.adapter_configs) == ["default"]
    assert torch.equal(logits(model), expected)


def test_25_adapting_an_adapted_model_again_is_refused():
    model = adapted()
    refuses(StateError, model, lambda: get_lora_model(model, LoraConfig()), "add_adapter")
    refuses(StateError, model, lambda: get_lora_model(model, LoraConfig(), "second"), "add_adapter")
    unloaded = model.unload()
    assert torch.equal(logits(get_lora_model(unloaded, LoraConfig())), logits(gpt2()))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_25_a_model_that_peft_has_wrapped_is_refused(task_type):
    with foreign_code():
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(gpt2(), peft.LoraConfig(task_type=task_type))
    config = LoraConfig(target_modules="all-linear")
    refuses(StateError, wrapped, lambda: get_lora_model(wrapped, config), "PeftModel")


def test_25_the_layers_within_a_layer_that_peft_has_adapted_are_no_targets():
    """Its lora_A and lora_B are linear layers too."""
    model = gpt2()
    with foreign_code():
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["c_attn"]), model)
    config = LoraConfig(target_modules="all-linear")
    refuses(TargetError, model, lambda: get_lora_model(model, config), "transformer.h.0.attn.c_attn")


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 8)

    def forward(self, ids):
        return self.table(ids)


def test_18_dropout_acts_on_an_embedding():
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
def test_20_each_layer_knows_its_own_orientation(fan_in_fan_out):
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
def test_20_a_model_of_both_orientations_goes_through_files(fan_in_fan_out, tmp_path):
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
def test_20_the_config_of_the_user_is_never_changed(options, tmp_path):
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


def test_20_one_config_serves_models_of_both_orientations():
    config = LoraConfig(target_modules="all-linear", r=4)
    for factory in (gpt2, llama, gpt2):
        model = disturb(get_lora_model(factory(), config))
        expected = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


class Many(nn.Module):
    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def work(action):
    """Number of function calls, Python's and C's, that an action takes: the same on a fast machine and a slow one."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(previous)
    return count


EVERY_LAYER = LoraConfig(r=1, target_modules="all-linear")


def test_23_a_further_adapter_costs_as_much_as_the_first():
    model = Many(100)
    first = work(lambda: get_lora_model(model, EVERY_LAYER))
    for name in ("second", "third", "fourth", "fifth"):
        assert work(lambda name=name: model.add_adapter(name, EVERY_LAYER)) < 1.5 * first


@pytest.mark.parametrize("options", [{}, {"target_modules": ["0", "1"]}, {"bias": "all", "target_modules": ["0", "1"]}])
def test_23_injecting_a_second_adapter_is_linear_in_the_number_of_modules(options):
    costs = []
    for layers in (50, 200):
        model = get_lora_model(Many(layers), EVERY_LAYER)
        config = LoraConfig(**{"r": 1, "target_modules": "all-linear", **options} | {"bias": "none"})
        costs.append(work(lambda model=model, config=config: model.add_adapter("second", config)))
    assert costs[1] < 4.4 * costs[0]


@pytest.mark.filterwarnings("ignore:.*every update is zero")
def test_23_loading_a_second_adapter_is_linear_in_the_number_of_modules(tmp_path):
    costs = []
    for layers in (50, 200):
        model = get_lora_model(Many(layers), EVERY_LAYER)
        model.save_pretrained(tmp_path / str(layers))
        costs.append(work(lambda model=model, layers=layers: model.load_adapter(tmp_path / str(layers), "second")))
    assert costs[1] < 4.4 * costs[0]


def test_23_one_rank_a_module_is_linear_in_the_number_of_modules():
    """EVA and AdaLoRA write such tables: a key a module."""
    costs = []
    for layers in (50, 200):
        ranks = {f"layers.{index}": 1 + index % 2 for index in range(layers)}
        config = LoraConfig(target_modules="all-linear", rank_pattern=ranks)
        costs.append(work(lambda config=config, layers=layers: get_lora_model(Many(layers), config)))
    assert costs[1] < 8 * costs[0]


def switch_off_and_on(model):
    with model.disable_adapter():
        pass


@pytest.mark.filterwarnings("ignore:.*every update is zero")
@pytest.mark.parametrize("switch", [switch_off_and_on, lambda model: model.set_adapter("second")])
def test_23_switching_costs_the_same_for_any_number_of_modules(switch, tmp_path):
    costs = []
    for layers in (10, 200):
        get_lora_model(Many(layers), EVERY_LAYER).save_pretrained(tmp_path / str(layers))
        model = load_adapter(Many(layers), tmp_path / str(layers))
        model.load_adapter(tmp_path / str(layers), "second")
        costs.append(work(lambda model=model: switch(model)))
    assert costs[0] == costs[1]

"""Verbs within `disable_adapter`, and contexts that end late or in another order: the model is what it says it is."""

import contextlib
import copy
import pickle

import pytest
import torch
from tiny_models import gpt2, logits
from torch import nn

from minipeft import LoraConfig, StateError, get_lora_model, load_adapter

OPTIONS = {"r": 2, "target_modules": ["c_attn"], "init_lora_weights": False}


def two(*, merged=()):
    """A model with the adapters "default", which acts, and "b"."""
    model = get_lora_model(gpt2(), LoraConfig(**OPTIONS))
    model.add_adapter("b", LoraConfig(**OPTIONS))
    if merged:
        model.merge_adapter(merged)
    return model


def outputs(model, name):
    """What the model computes with one adapter, unmerged."""
    model = copy.deepcopy(model)
    model.unmerge_adapter()
    model.set_adapter(name)
    return logits(model)


def test_set_adapter_in_a_merged_model_is_refused_within_as_it_is_outside():
    model = two(merged=["default"])
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
        with pytest.raises(StateError, match=r"'default' is merged.*unmerge_adapter"):
            model.set_adapter("b")
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    assert (model.active_adapters, model._state.merged) == (["default"], ("default",))


def test_disable_adapters_in_a_merged_model_is_refused_within_as_it_is_outside():
    """It would say that no adapter acts, and at the end of the context the merged one would be in the base again."""
    model = two(merged=["default"])
    expected = logits(model)
    with model.disable_adapter(), pytest.raises(StateError, match=r"'default' is merged.*unmerge_adapter"):
        model.disable_adapters()
    assert torch.equal(logits(model), expected)
    assert model._state.switch.enabled


def test_set_adapter_within_counts_afterwards_if_nothing_is_merged():
    model = two()
    expected = outputs(model, "b")
    with model.disable_adapter():
        base = logits(model)
        model.set_adapter("b")
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)


def test_a_merged_adapter_is_not_deleted_within():
    model = two(merged=["b"])
    expected = logits(model)
    with model.disable_adapter(), pytest.raises(StateError, match="'b' is in use"):
        model.delete_adapter("b")
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        model.delete_adapter("b")
    assert torch.equal(logits(model), outputs(model, "default"))


def test_adapters_unmerged_within_stay_unmerged():
    model = two(merged=["default"])
    expected = outputs(model, "b")
    with model.disable_adapter():
        model.unmerge_adapter()
        model.set_adapter("b")
    assert model._state.merged == ()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("merged", [(), ("default",)])
def test_merging_within_is_refused(verb, merged):
    model = two(merged=merged)
    expected = logits(model)
    with model.disable_adapter(), pytest.raises(StateError, match="outside of that context"):
        getattr(model, verb)()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("merged", [(), ("default",)])
def test_adapters_that_are_added_or_loaded_within_wait_for_set_adapter(merged, tmp_path):
    other = get_lora_model(gpt2(), LoraConfig(**OPTIONS))
    other.save_pretrained(tmp_path)
    model = two(merged=merged)
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
        model.add_adapter("c", LoraConfig(**OPTIONS))
        load_adapter(model, tmp_path, "d")
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    assert model._state.merged == merged
    assert torch.equal(outputs(model, "d"), logits(other))


@pytest.mark.parametrize("merged", [(), ("default",)])
def test_unloading_within_leaves_the_base(merged):
    model, base = two(merged=merged), logits(gpt2())
    with model.disable_adapter():
        plain = model.unload()
    assert torch.equal(logits(plain), base)
    assert "_minipeft" not in plain.__dict__


@pytest.mark.parametrize("merged", [(), ("default",)])
@pytest.mark.parametrize("first_out", [0, 1])
def test_two_contexts_may_end_in_any_order(merged, first_out):
    """As of generators that are closed late."""
    model, base = two(merged=merged), logits(gpt2())
    expected = logits(model)
    contexts = [contextlib.ExitStack(), contextlib.ExitStack()]
    for context in contexts:
        context.enter_context(model.disable_adapter())
    assert torch.equal(logits(model), base)
    contexts.pop(first_out).close()
    assert torch.equal(logits(model), base)  # one is still open
    contexts.pop().close()
    assert torch.equal(logits(model), expected)
    assert model._state.merged == merged


@pytest.mark.parametrize("merged", [(), ("default",)])
def test_an_error_within_leaves_the_model_as_it_was(merged):
    model = two(merged=merged)
    expected = logits(model)
    with pytest.raises(KeyError), model.disable_adapter(), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model), expected)
    assert model._state.merged == merged


def test_a_weight_written_within_leaves_the_adapters_acting_if_they_cannot_be_merged_again():
    model = two(merged=["default"])
    with pytest.raises(RuntimeError, match="not finite"), model.disable_adapter(), torch.no_grad():
        model.transformer.h[0].attn.c_attn.adapters["default"].lora_B.fill_(float("nan"))
    assert (model._state.merged, model._state.set_aside) == ((), ())
    model.set_adapter("b")
    assert torch.equal(logits(model), outputs(model, "b"))


def test_merging_for_good_keeps_what_is_merged_already():
    model = two(merged=["b"])
    expected = logits(model)
    assert not torch.equal(expected, outputs(model, "default"))
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_a_compiled_function_may_disable_adapters_in_its_one_graph():
    options = OPTIONS | {"target_modules": ["0"]}
    model, x = get_lora_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(**options)), torch.randn(2, 4)

    def change(x):
        with model.disable_adapter():
            base = model(x)
        return model(x) - base

    with torch.no_grad():
        found = torch.compile(change, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(found, change(x))


@pytest.mark.parametrize("merged", [(), ("default",)])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_within_is_the_base_until_its_adapters_are_enabled(copied, merged):
    model = two(merged=merged)
    expected, acting = outputs(model, "default"), logits(model)
    with model.disable_adapter():
        other, base = copied(model), logits(model)
    assert torch.equal(logits(model), acting)
    assert torch.equal(logits(other), base)
    with other.disable_adapter():
        pass
    assert torch.equal(logits(other), base)
    other.set_adapter("default")
    other.enable_adapters()
    assert torch.equal(logits(other), expected)
    other.merge_adapter()
    other.unmerge_adapter()
    assert torch.equal(logits(other), expected)

"""Blocks run a few samples at a time: the same loss and gradients, where it is known that they are the same."""

from functools import partial

import pytest
import torch
from rotation import often
from test_lean import IDS, LABELS, OTHERS, assert_same_learning, in_training, loss_and_gradients
from tiny_models import gpt2, llama
from torch import nn
from transformers import AutoModelForCausalLM

from minipeft import LeanError, lean
from minipeft.memory import sample_slices
from minipeft.memory.sample_slices import ROWS, runs_in_slices


@pytest.fixture(autouse=True)
def one_sample_is_enough(monkeypatch):
    """A part of one sample, for batches as small as the tests'."""
    monkeypatch.setitem(sample_slices.DEFAULT_ROWS, "cpu", 2 * IDS.shape[1] - 1)


def blocks_of(model):
    return [block for block in model.modules() if hasattr(block, "_gradient_checkpointing_func")]


def batches_seen(block):
    """The batch of each call of a module inside the block, the calls in the backward pass included."""
    seen = []
    inner = next(module for name, module in block.named_modules() if name.endswith(("attn", "attention")))
    inner.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len((args or tuple(kwargs.values()))[0])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("kind", often(["gpt2", "llama", *OTHERS], ["gpt2", "llama", "falcon"]))
def test_every_sample_by_itself_gives_the_same_loss_and_gradients(kind):
    torch.manual_seed(0)
    base = {"gpt2": gpt2, "llama": llama}.get(kind, lambda: AutoModelForCausalLM.from_config(OTHERS[kind]))()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = in_training(base, target_modules="all-linear")
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    for inputs in ({}, {"attention_mask": mask}):
        expected = loss_and_gradients(lean(model, "none"), **inputs)
        lean(model, "block")
        seen = batches_seen(blocks_of(model)[0])
        assert_same_learning(loss_and_gradients(model, **inputs), expected)
        # BLOOM's positional biases have a row for each sample and head
        assert seen == ([3] * 2 if kind == "bloom" else [1] * 6)


def test_the_default_runs_the_last_block_again_in_parts():
    model = in_training()
    expected = loss_and_gradients(model)
    first, last = lean(model).transformer.h
    seen = {name: batches_seen(block) for name, block in (("first", first), ("last", last))}
    assert_same_learning(loss_and_gradients(model), expected)
    assert seen == {"first": [3], "last": [1] * 6}


@pytest.mark.parametrize("where", ["model", "adapter"])
def test_dropout_rules_parts_out_since_they_would_draw_other_masks(where):
    base = gpt2()
    if where == "model":
        base.transformer.h[1].mlp.dropout.p = 0.1
    model = in_training(base, lora_dropout=0.1 if where == "adapter" else 0.0)
    expected = loss_and_gradients(model)
    lean(model)
    assert not blocks_of(model)
    assert_same_learning(loss_and_gradients(model), expected)
    lean(model, "block")
    assert_same_learning(loss_and_gradients(model), expected)
    drawing = [not runs_in_slices(block) for block in blocks_of(model)]
    assert drawing == ([True, True] if where == "adapter" else [False, True])


def test_dropout_that_is_switched_on_later_is_noticed():
    model = lean(in_training(), "last")
    block = model.transformer.h[1]
    assert runs_in_slices(block)
    block.mlp.dropout.p = 0.1
    loss_and_gradients(model)
    assert not runs_in_slices(block)
    block.mlp.dropout.p = 0.0
    loss_and_gradients(model)
    assert runs_in_slices(block)


def test_an_argument_that_nobody_knows_is_not_cut():
    model = lean(in_training(), "last")
    block = model.transformer.h[1]
    expected = loss_and_gradients(model)
    seen = batches_seen(block)
    block.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "stranger": torch.ones(len(IDS))}), with_kwargs=True
    )
    assert_same_learning(loss_and_gradients(model), expected)
    assert set(seen) == {len(IDS)}


def test_as_many_samples_as_tokens_are_not_cut_since_a_mask_could_be_either():
    model = lean(in_training(), "last")
    seen = batches_seen(model.transformer.h[1])
    ids = IDS[:, :3]
    model(input_ids=ids, labels=ids).loss.backward()
    assert set(seen) == {3}


def test_a_layer_whose_output_is_not_by_sample_is_run_whole():
    class Sums(nn.Module):
        def forward(self, x):
            return x, x.sum()

    layer, x = Sums(), torch.ones(4, 5, 2)
    for _ in range(2):
        sample_slices.run(layer, partial(Sums.forward, layer), [x], lambda function, *args: function(*args))
        assert layer.__dict__[ROWS] == 0


def test_parts_are_as_even_as_can_be_and_outputs_come_in_order():
    sizes = []

    class Double(nn.Module):
        def forward(self, hidden_states, attention_mask=None, position_embeddings=None):
            sizes.append((len(hidden_states), len(attention_mask), [len(item) for item in position_embeddings]))
            return (2 * hidden_states + attention_mask, None)

    layer, x = Double(), torch.arange(70.0).reshape(7, 5, 2)
    layer.__dict__[ROWS] = 15
    mask, positions = torch.arange(7.0).reshape(7, 1, 1), (torch.ones(1, 5, 2), torch.ones(7, 5, 2))
    function = partial(Double.forward, layer, attention_mask=mask, position_embeddings=positions)
    output = sample_slices.run(layer, function, [x], lambda function, *args: function(*args))
    assert torch.equal(output[0], 2 * x + mask)
    assert output[1] is None
    assert sizes == [(3, 3, [1, 3]), (2, 2, [1, 2]), (2, 2, [1, 2])]
    assert runs_in_slices(layer)


@pytest.mark.parametrize("labels", [IDS, LABELS])
def test_the_probe_runs_one_sample_at_a_time_and_catches_a_layer_that_mixes_samples(labels, monkeypatch):
    model = in_training()
    forward = type(model.transformer.h[1].mlp).forward
    monkeypatch.setattr(
        type(model.transformer.h[1].mlp), "forward", lambda self, x: forward(self, x) + x.mean(0, keepdim=True)
    )
    expected = loss_and_gradients(model, labels=labels)
    with pytest.raises(LeanError, match="would differ"):
        lean(model, "last")
    assert_same_learning(loss_and_gradients(model, labels=labels), expected, 0)


def test_a_slice_is_as_large_as_suits_the_device_that_the_model_has_moved_to(monkeypatch):
    model = lean(in_training(), "last")
    seen = batches_seen(model.transformer.h[1])
    monkeypatch.setitem(sample_slices.DEFAULT_ROWS, "cpu", IDS.numel())
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert set(seen) == {len(IDS)}

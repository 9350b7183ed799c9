"""HF PEFT as the oracle for the other methods: the same files, numbers and gradients on the same tiny models."""

import json

import pytest
import torch
from method_cases import CASES, gradients, load_theirs, ours, save_theirs, their_logits, theirs
from rotation import shared
from safetensors.torch import load_file
from tiny_models import disturb, foreign_code, logits

import minipeft
from minipeft.ecosystem.peft_options import WITHOUT_EFFECT, asks_nothing

peft = pytest.importorskip("peft")
every_case = pytest.mark.parametrize("case", CASES)


def every_other_case(turn):
    """For one of two tests."""
    return pytest.mark.parametrize("case", shared(CASES, turn))


RUNTIME = {"peft_version", "revision", "auto_mapping"}


def tensors_in(directory):
    tensors = load_file(directory / "adapter_model.safetensors")
    # PEFT writes the whole table of an adapted embedding.
    return {key: tensor for key, tensor in tensors.items() if not key.endswith("embed_tokens.base_layer.weight")}


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def their_gradients(model):
    with foreign_code():
        loss = gradients(model.eval())
        grads = {key: tensor.grad for key, tensor in model.named_parameters() if tensor.requires_grad}
        names = {key.replace(".default", ""): grad for key, grad in grads.items()}
    return loss, names


@every_case
def test_the_start_is_exactly_the_base(case):
    assert torch.equal(logits(ours(case)), logits(CASES[case][1]()))


@every_other_case(0)
def test_a_file_of_ours_is_read_by_peft_and_back_with_the_same_outputs(case, tmp_path):
    model = disturb(ours(case))
    expected = logits(model)
    assert (expected - logits(CASES[case][1]())).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "ours")
    reference = load_theirs(case, tmp_path / "ours")
    save_theirs(reference, tmp_path / "theirs")
    torch.testing.assert_close(their_logits(reference), expected, rtol=0, atol=1e-5)
    assert_same_tensors(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"))
    again = minipeft.load_adapter(CASES[case][1](), tmp_path / "theirs")
    assert torch.equal(logits(again), expected)


@every_other_case(1)
def test_a_file_of_peft_is_read_by_us_with_the_same_outputs_gradients_and_merged_weights(case, tmp_path):
    reference = disturb(theirs(case))
    save_theirs(reference, tmp_path)
    model = minipeft.load_adapter(CASES[case][1](), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(model), their_logits(reference), rtol=0, atol=1e-5)
    expected_loss, expected = their_gradients(reference)
    torch.testing.assert_close(gradients(model), expected_loss)
    live = {key: t for key, t in model.adapter_state_dict().items() if t.requires_grad}
    assert live.keys() == expected.keys()
    # An optimizer's state is by place, and a Trainer of either may resume from the other's checkpoint.
    shapes = [[p.shape for p in of.parameters() if p.requires_grad] for of in (model, reference)]
    assert shapes[0] == shapes[1]
    for key, tensor in live.items():
        torch.testing.assert_close(tensor.grad, expected[key], rtol=1e-4, atol=1e-6, msg=key)
        assert expected[key].abs().max() > 0, key
    merged = model.merge_and_unload().state_dict()
    with foreign_code():
        expected_merged = reference.merge_and_unload().state_dict()
    assert merged.keys() == expected_merged.keys()
    for key, tensor in expected_merged.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@every_case
def test_as_many_parameters_train_as_in_peft_and_the_config_has_its_keys(case, tmp_path):
    model, reference = ours(case), theirs(case)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in reference.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "ours")
    save_theirs(reference, tmp_path / "theirs")
    found, expected = (
        json.loads((tmp_path / which / "adapter_config.json").read_text()) for which in ("ours", "theirs")
    )
    assert found.keys() <= expected.keys()
    for key in expected.keys() - found.keys() - RUNTIME:  # what we do not write asks for nothing
        assert asks_nothing(expected[key]) or key in WITHOUT_EFFECT, key
    targets = [sorted(values.pop("target_modules")) for values in (found, expected)]
    if "all-linear" not in case:
        assert targets[0] == targets[1]
    for values in (found, expected):
        values.pop("feedforward_modules", None)
        values.pop("base_model_name_or_path")
    for key in found:
        assert found[key] == expected[key], key

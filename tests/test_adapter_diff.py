"""The comparison of two adapters, against dense updates in float64."""

import json

import pytest
import torch
from test_cli import run
from tiny_models import adapted, gpt2, llama

from minipeft import AdaLoraConfig, CheckpointError, get_adapter_model
from minipeft.planning.adapter_diff import adapter_diff, principal_angles

QV = {"target_modules": ["q_proj", "v_proj"]}


def saved(model, directory):
    model.save_pretrained(directory)
    updates = {}
    for name, module in model.named_modules():
        if hasattr(module, "adapters"):
            up, down = (factor.double() for factor in module.adapters["default"].factors())
            updates[name] = (up @ down).detach()
    return directory, updates


def dense_angles(one, two, side):
    """From the singular vectors of whole updates."""
    bases = []
    for update in (one, two):
        U, s, Vh = torch.linalg.svd(update)
        rank = int((s > 1e-9 * s[0]).sum())
        bases.append(U[:, :rank] if side == "columns" else Vh[:rank].T)
    cosines = torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(max=1)
    return torch.rad2deg(torch.acos(cosines))


@pytest.mark.parametrize("options", [{}, {"r": 3, "lora_alpha": 7, "use_rslora": True}])
def test_it_is_that_of_dense_updates(tmp_path, options):
    first, one = saved(adapted(llama(), **QV, seed=1), tmp_path / "a")
    second, two = saved(adapted(llama(), **QV, seed=2, **options), tmp_path / "b")
    found = adapter_diff(first, second)
    assert {layer.module for layer in found.layers} == set(one)
    for layer in found.layers:
        A, B = one[layer.module], two[layer.module]
        assert layer.norms == pytest.approx((float(A.norm()), float(B.norm())), rel=1e-6)
        assert layer.difference == pytest.approx(float((A - B).norm()), rel=1e-6)
        assert layer.cosine == pytest.approx(float((A * B).sum() / A.norm() / B.norm()), abs=1e-6)
        assert layer.ranks == (4, options.get("r", 4))
        for side, angles in (("columns", layer.column_angles), ("rows", layer.row_angles)):
            assert angles == pytest.approx(dense_angles(A, B, side).tolist(), abs=1e-4)
    total = torch.stack([(one[name] - two[name]).norm() ** 2 for name in one]).sum().sqrt()
    assert found.difference == pytest.approx(float(total), rel=1e-6)
    moved = [layer.difference for layer in found.layers]
    assert moved == sorted(moved, reverse=True)


def test_equal_adapters_differ_by_nothing_and_a_missing_layer_by_all(tmp_path):
    first, updates = saved(adapted(llama(), **QV), tmp_path / "a")
    same = adapter_diff(first, first)
    assert same.difference < 1e-6 * same.norms[0]
    assert max(max(layer.column_angles + layer.row_angles) for layer in same.layers) < 1e-5
    second, _ = saved(adapted(llama(), target_modules=["q_proj"]), tmp_path / "b")
    alone = next(layer for layer in adapter_diff(first, second).layers if "v_proj" in layer.module)
    assert alone.ranks == (4, 0)
    assert alone.cosine is None
    assert alone.column_angles == ()
    assert alone.difference == pytest.approx(float(updates[alone.module].norm()), rel=1e-6)


def test_methods_may_differ_where_both_are_of_low_rank(tmp_path):
    first, one = saved(adapted(llama(), **QV), tmp_path / "a")
    torch.manual_seed(0)
    other = get_adapter_model(llama(), AdaLoraConfig(init_r=3, target_r=2, total_step=10, **QV))
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    second, two = saved(other, tmp_path / "b")
    for layer in adapter_diff(first, second).layers:
        expected = float((one[layer.module] - two[layer.module]).norm())
        assert layer.difference == pytest.approx(expected, rel=1e-5)


def test_small_angles_are_exact():
    angle = 1e-7
    one = torch.eye(3, dtype=torch.float64)[:, :1]
    two = torch.tensor([[torch.tensor(angle, dtype=torch.float64).cos()], [angle], [0.0]], dtype=torch.float64)
    assert principal_angles(one, two)[0] == pytest.approx(torch.rad2deg(torch.tensor(angle)).item(), rel=1e-6)


def test_the_command_shows_the_layers_that_moved_most(tmp_path):
    first, _ = saved(adapted(llama(), **QV, seed=1), tmp_path / "a")
    second, _ = saved(adapted(llama(), **QV, seed=2), tmp_path / "b")
    lines = run("diff", first, second).output.splitlines()
    found = json.loads(run("diff", first, second, "--json").output)
    assert lines[3].split()[0] == found["layers"][0]["module"]
    assert len(found["layers"][0]["row_angles"]) == 4


def test_what_trains_in_full_is_named_and_not_compared(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    adapted(llama(), **QV, modules_to_save=["lm_head"]).save_pretrained(first)
    adapted(llama(), **QV, trainable_token_indices=[3]).save_pretrained(second)
    rest = ["lm_head.weight", "model.embed_tokens.token_adapter.trainable_tokens_delta"]
    found = json.loads(run("diff", first, second, "--json").output)["not_compared"]
    assert [key.removeprefix("base_model.model.") for key in found] == rest
    assert (
        "not compared, since it trains in full: 'base_model.model.lm_head.weight'" in run("diff", first, second).output
    )


def test_what_cannot_be_compared_is_named(tmp_path):
    first, _ = saved(adapted(llama(), **QV), tmp_path / "a")
    second, _ = saved(adapted(gpt2()), tmp_path / "b")
    adapted(llama(), **QV, use_dora=True).save_pretrained(tmp_path / "c")
    for other, words in (
        (second, "no layer in common"),
        (tmp_path / "c", "magnitude"),
        (tmp_path / "d", "not a directory"),
    ):
        with pytest.raises(CheckpointError, match=words):
            adapter_diff(first, other)

"""The fused low-rank linear map against the formula in float64, in every way autograd may call on it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from minipeft import LoraConfig, fused, get_lora_model
from minipeft.fused import lora_linear

S = 0.7


def formula(x, weight, bias, A, B):
    y = x @ weight.T + S * (x @ A.T) @ B.T
    return y if bias is None else y + bias


def arguments(shape=(3, 4), in_features=5, out_features=7, r=2, bias=True, transposed=False, dtype=torch.float64):
    weight = (
        torch.randn(in_features, out_features, dtype=dtype).t()
        if transposed
        else torch.randn(out_features, in_features, dtype=dtype)
    )
    return (
        torch.randn(*shape, in_features, dtype=dtype, requires_grad=True),
        weight,
        torch.randn(out_features, dtype=dtype) if bias else None,
        torch.randn(r, in_features, dtype=dtype, requires_grad=True),
        torch.randn(out_features, r, dtype=dtype, requires_grad=True),
    )


@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (2, 3, 4), (0,), (2, 0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_values_and_gradients_are_those_of_the_formula(shape, bias, transposed):
    x, weight, b, A, B = arguments(shape, bias=bias, transposed=transposed)
    y = lora_linear(x, weight, b, A, B, S)
    expected = formula(x, weight, b, A, B)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for found, wanted in zip(
        torch.autograd.grad(y, (x, A, B), dy), torch.autograd.grad(expected, (x, A, B), dy), strict=True
    ):
        torch.testing.assert_close(found, wanted)
        assert found.is_contiguous()


@pytest.mark.parametrize("transposed", [True, False])
def test_the_gradient_and_its_gradient_agree_with_finite_differences(transposed):
    x, weight, b, A, B = arguments((2, 3), transposed=transposed)

    def f(x, A, B):
        return lora_linear(x, weight, b, A, B, S)

    assert torch.autograd.gradcheck(f, (x, A, B))
    assert torch.autograd.gradgradcheck(f, (x, A, B))


@pytest.mark.parametrize(
    "wants", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_the_gradients_that_are_wanted_are_made(wants):
    x, weight, b, A, B = arguments()
    leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip((x, A, B), wants, strict=True)]
    lora_linear(leaves[0], weight, b, *leaves[1:], S).sum().backward()
    formula(x, weight, b, A, B).sum().backward()
    for leaf, want, reference in zip(leaves, wants, (x, A, B), strict=True):
        if want:
            torch.testing.assert_close(leaf.grad, reference.grad)
        else:
            assert leaf.grad is None


def test_where_nothing_wants_a_gradient_there_is_no_node():
    x, weight, b, A, B = (None if t is None else t.detach() for t in arguments())
    assert lora_linear(x, weight, b, A, B, S).grad_fn is None
    with torch.no_grad():
        assert lora_linear(*arguments(), S).grad_fn is None


@pytest.mark.parametrize(
    "strided",
    [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[..., :1].expand(-1, -1, 5), lambda x: x.flip(0)],
)
def test_any_layout_of_the_input_will_do(strided):
    x, weight, b, A, B = arguments((4, 6))
    found, expected = lora_linear(strided(x), weight, b, A, B, S), formula(strided(x), weight, b, A, B)
    torch.testing.assert_close(found, expected)
    (found_x,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(found_x, torch.autograd.grad(expected.sum(), x)[0])


def test_a_second_backward_through_the_same_graph_gives_the_same():
    x, weight, b, A, B = arguments()
    y = lora_linear(x, weight, b, A, B, S)
    first = torch.autograd.grad(y.sum(), (x, A, B), retain_graph=True)
    again = torch.autograd.grad(y.sum(), (x, A, B))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_the_output_may_be_written_in_place_and_the_input_read_by_others():
    x, weight, b, A, B = arguments()
    y = lora_linear(x, weight, b, A, B, S)
    assert not y._is_view()
    y.mul_(2).add_(x.sum())
    y.sum().backward()
    found = x.grad
    x.grad = None
    (formula(x, weight, b, A, B) * 2 + x.sum()).sum().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(use_reentrant):
    x, weight, b, A, B = arguments()
    expected = torch.autograd.grad(lora_linear(x, weight, b, A, B, S).sum(), (x, A, B))

    def run(x):
        return lora_linear(x, weight, b, A, B, S)

    checkpoint(run, x, use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(t.grad, e) for t, e in zip((x, A, B), expected, strict=True))


# ----------------------------------------------------------------------------------------------- as a layer calls it
def layer_of(kind, dtype=torch.float32):
    base = Conv1D(7, 5) if kind == "conv1d" else nn.Linear(5, 7, bias=kind == "linear")
    model = get_lora_model(
        nn.Sequential(base.to(dtype)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    return base, model


@pytest.fixture
def fused_calls(monkeypatch):
    """How often the fused map ran."""
    calls = []
    real = fused._product
    monkeypatch.setattr(fused, "_product", lambda *args: calls.append(1) or real(*args))
    return calls


def composed(model, x):
    """The same layer by single operations: base first, then the adapter on its output."""
    layer = model[0]
    return layer.adapters["default"](layer.base_layer, layer.ops, x, layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
def test_a_layer_runs_fused_and_agrees_with_the_composed_one(kind, dtype, fused_calls):
    _, model = layer_of(kind, dtype)
    x = torch.randn(6, 3, 5, dtype=dtype, requires_grad=True)
    lora = model[0].adapters["default"]
    inputs = (x, lora.lora_A, lora.lora_B)
    found = model(x)
    assert fused_calls == [1]
    assert found.dtype is dtype
    expected = composed(model, x)
    assert fused_calls == [1]
    tolerance = {} if dtype in (torch.float32, torch.float64) else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(found, expected, **tolerance)
    for one, other in zip(
        torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize(
    "change",
    [
        lambda base, model: base.register_forward_hook(lambda *args: None),
        lambda base, model: base.register_forward_pre_hook(lambda *args: None),
        lambda base, model: setattr(base, "forward", base.forward),
        lambda base, model: base.requires_grad_(True),
        lambda base, model: setattr(model[0].adapters["default"], "dropout", 0.5),
    ],
)
def test_what_the_fused_map_does_not_know_goes_the_composed_way(change, fused_calls):
    base, model = layer_of("linear")
    change(base, model)
    model.train()(torch.randn(2, 5))
    assert fused_calls == []


class Loud(nn.Linear):
    """A layer of its own."""

    def forward(self, x):
        return 3 * super().forward(x)


def test_a_subclass_with_its_own_forward_is_called(fused_calls):
    model = get_lora_model(nn.Sequential(Loud(5, 7)), LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(2, 5)
    assert torch.equal(model(x), model[0].base_layer(x))
    assert fused_calls == []


def test_autocast_goes_the_composed_way_in_its_own_dtype(fused_calls):
    _, model = layer_of("linear")
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 5))
    assert y.dtype is torch.bfloat16
    assert fused_calls == []


def test_functorch_transforms_work():
    _, model = layer_of("linear", torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index, row in enumerate(x):
        model.zero_grad()
        model(row).square().sum().backward()
        lora = model[0].adapters["default"]
        torch.testing.assert_close(grads["0.adapters.default.lora_A"][index], lora.lora_A.grad)


def test_kept_for_backward_are_the_input_itself_and_the_small_projection():
    _, model = layer_of("linear")
    x = torch.randn(50, 5, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert kept == {x.untyped_storage().data_ptr(): 50 * 5 * 4, **{k: v for k, v in kept.items() if v == 50 * 2 * 4}}
    assert sum(kept.values()) == 50 * 5 * 4 + 50 * 2 * 4


def test_training_equals_the_composed_way_step_by_step(monkeypatch):
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    model = get_lora_model(base, LoraConfig(r=4, target_modules=["0", "2"]))
    other = copy.deepcopy(model)
    x, y = torch.randn(64, 5), torch.randn(64, 3)

    def losses(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(50):
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    found = list(losses(model))
    monkeypatch.setattr("minipeft.methods.lora.can_fuse", lambda *tensors: False)
    assert found == pytest.approx(list(losses(other)), rel=1e-5)
    assert found[-1] < found[0]


def test_a_subclass_that_brings_its_own_forward_is_given_the_output_of_the_base():
    from minipeft.methods.lora import Lora

    class Doubled(Lora):
        def forward(self, base, ops, x, y):
            return y + 2 * (super().forward(base, ops, x, y) - y)

    assert Lora.runs_base
    assert not Doubled.runs_base

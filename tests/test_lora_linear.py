"""The fused low-rank linear map against the formula in float64, in every way autograd may call on it."""

import copy

import pytest
import torch
from rotation import often
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from minipeft import LoraConfig, get_lora_model
from minipeft.kernels import lora_linear as fused
from minipeft.kernels import matmul, merged_weight, recompute
from minipeft.kernels.dropout_mask import ROWS, DropoutMask
from minipeft.kernels.lora_gradients import SLICE
from minipeft.kernels.lora_linear import lora_linear

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


@pytest.fixture(params=["two products", "merged weight"])
def route(request, monkeypatch):
    """Which way the map goes: the low-rank product next to the weight's, or W + s B A made first."""
    monkeypatch.setattr(merged_weight, "pays", lambda rows, weight: request.param == "merged weight")
    return request.param


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("r", [2, 17])  # narrow products are transposed, wide ones not
@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (2, 3, 4), (0,), (2, 0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_values_and_gradients_are_those_of_the_formula(shape, bias, transposed, r):
    x, weight, b, A, B = arguments(shape, bias=bias, transposed=transposed, r=r)
    y = lora_linear(x, weight, b, A, B, S)
    expected = formula(x, weight, b, A, B)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for found, wanted in zip(
        torch.autograd.grad(y, (x, A, B), dy), torch.autograd.grad(expected, (x, A, B), dy), strict=True
    ):
        torch.testing.assert_close(found, wanted)
        assert found.is_contiguous()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("transposed", [True, False])
def test_the_gradient_and_its_gradient_agree_with_finite_differences(transposed):
    x, weight, b, A, B = arguments((2, 3), transposed=transposed)

    def f(x, A, B):
        return lora_linear(x, weight, b, A, B, S)

    assert torch.autograd.gradcheck(f, (x, A, B))
    assert torch.autograd.gradgradcheck(f, (x, A, B))


@pytest.mark.usefixtures("route")
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


@pytest.mark.usefixtures("route")
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


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(use_reentrant):
    x, weight, b, A, B = arguments()
    expected = torch.autograd.grad(lora_linear(x, weight, b, A, B, S).sum(), (x, A, B))

    def run(x):
        return lora_linear(x, weight, b, A, B, S)

    checkpoint(run, x, use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(t.grad, e) for t, e in zip((x, A, B), expected, strict=True))


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
        lambda base, model: base.bias.requires_grad_(True),
    ],
)
def test_what_the_fused_map_does_not_know_goes_the_composed_way(change, fused_calls):
    _, model = layer_of("linear")
    change(model[0].base_layer, model)
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


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_the_input_once_and_keeps_no_copy_of_the_weight(base_dtype, fused_calls):
    _, model = layer_of("linear", base_dtype)
    x = torch.randn(40, 5, requires_grad=True)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.shape)) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16):
        with hooks:
            y = model(x)
        expected = composed(model, x)
    assert fused_calls == [1]
    assert y.dtype is torch.bfloat16
    assert kept.count((torch.bfloat16, torch.Size([40, 5]))) == 1  # x, for the adapter; weights only as they are stored
    assert (base_dtype, torch.Size([7, 5])) in kept
    torch.testing.assert_close(y, expected, atol=3e-2, rtol=3e-2)
    lora = model[0].adapters["default"]
    inputs = (x, lora.lora_A, lora.lora_B)
    dy = torch.randn_like(y)
    for one, other in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        assert one.dtype is torch.float32
        torch.testing.assert_close(one, other, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_a_single_row_under_autocast_is_cast_once_too(base_dtype):
    _, model = layer_of("linear", base_dtype)
    x = torch.randn(1, 1, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        expected = composed(model, x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, atol=3e-2, rtol=3e-2)
    lora = model[0].adapters["default"]
    for gradient, like in zip(torch.autograd.grad(y.sum(), (x, lora.lora_A)), (x, lora.lora_A), strict=True):
        assert gradient.dtype is like.dtype
        assert gradient.isfinite().all()


def test_a_backward_pass_inside_autocast_computes_in_the_dtype_of_the_forward_pass():
    x, weight, b, A, B = arguments(dtype=torch.float32)
    y = lora_linear(x, weight, b, A, B, S)
    expected = torch.autograd.grad(y.sum(), (x, A, B), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), (x, A, B))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


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


def kept_for_backward(model, *inputs):
    """Bytes of every storage that a forward pass keeps, beside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(*inputs)
    return result, kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kept_for_backward_are_the_input_itself_and_the_small_projection(dropout, route):
    base = nn.Sequential(nn.Linear(5, 7))
    model = get_lora_model(base, LoraConfig(r=2, target_modules=["0"], lora_dropout=dropout)).train()
    x = torch.randn(50, 5, requires_grad=True)
    _, kept = kept_for_backward(model, x)
    assert kept.pop(x.untyped_storage().data_ptr()) == 50 * 5 * 4
    with_h = route == "two products" or dropout > 0
    assert list(kept.values()) == ([50 * 2 * 4] if with_h else [])


@pytest.mark.parametrize(
    ("rows", "dtype", "pays"),
    [
        (512, torch.float32, False),
        (1152, torch.float32, True),
        (1152, torch.float64, True),
        (2**20, torch.bfloat16, False),
    ],
)
def test_the_weight_is_merged_for_many_rows_in_full_precision_only(rows, dtype, pays):
    x, weight = torch.empty(rows, 768, dtype=dtype), torch.empty(2304, 768, dtype=dtype)
    assert merged_weight.pays(x, weight) is pays


def passing(x, seed, p):
    """The mask of a call that started from this state of torch's generator."""
    torch.manual_seed(seed)
    mask = DropoutMask(p)
    rows = x.detach().reshape(-1, x.shape[-1])
    found = torch.empty(rows.shape)
    for block, survives, _ in mask.blocks(rows):
        found[block] = survives
    return found.view(x.shape)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(3, 4), (ROWS["cpu"] + 3,), (0,)])
def test_dropout_is_the_formula_on_the_masked_input(shape, p):
    x, weight, b, A, B = arguments(shape)
    passes = passing(x, 3, p)
    torch.manual_seed(3)
    y = lora_linear(x, weight, b, A, B, S, p)
    expected = x @ weight.T + S * ((x * passes / (1 - p)) @ A.T) @ B.T + b
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for found, wanted in zip(
        torch.autograd.grad(y, (x, A, B), dy), torch.autograd.grad(expected, (x, A, B), dy), strict=True
    ):
        torch.testing.assert_close(found, wanted)
        assert found.is_contiguous()


def test_with_dropout_the_gradient_and_its_gradient_agree_with_finite_differences():
    x, weight, b, A, B = arguments((2, 3))

    def f(x, A, B):
        torch.manual_seed(5)
        return lora_linear(x, weight, b, A, B, S, 0.4)

    assert torch.autograd.gradcheck(f, (x, A, B))
    assert torch.autograd.gradgradcheck(f, (x, A, B))


@pytest.mark.parametrize("p", often([0.003, 0.05, 0.1, 1 / 3, 0.75, 0.97], [0.003, 0.1, 0.97]))
def test_features_are_dropped_independently_with_the_given_probability(p):
    x = torch.ones(2000, 600)
    dropped = 1 - passing(x, 0, p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert dropped.mean().item() == pytest.approx(p, abs=5 * deviation / x.numel() ** 0.5 + 5 / 256 / 2000**0.5)
    for dim, count in ((0, 2000), (1, 600)):
        assert dropped.mean(dim).sub(p).abs().max().item() < 6 * deviation / count**0.5 + 1 / 256
    for other in (dropped.roll(1, 0), dropped.roll(1, 1), dropped.roll(8, 1), dropped.roll(ROWS["cpu"], 0)):
        correlation = ((dropped - p) * (other - p)).mean() / deviation**2
        assert abs(correlation.item()) < 5 / x.numel() ** 0.5 + 5 * (1 / 256) ** 2 / deviation**2
    assert not torch.equal(passing(x, 1, p), passing(x, 0, p))


@pytest.mark.parametrize("p", [0.05, 0.75])
def test_a_gpu_draws_its_mask_in_one_call_with_the_same_promises(p, monkeypatch):
    monkeypatch.setattr(DropoutMask, "_of_bytes", DropoutMask._at_once)
    x = torch.ones(2000, 600)
    dropped = 1 - passing(x, 0, p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert dropped.mean().item() == pytest.approx(p, abs=5 * deviation / x.numel() ** 0.5)
    for other in (dropped.roll(1, 0), dropped.roll(1, 1), dropped.roll(ROWS["cpu"], 0)):
        assert abs(((dropped - p) * (other - p)).mean().item()) < 5 * deviation**2 / x.numel() ** 0.5
    test_dropout_is_the_formula_on_the_masked_input((ROWS["cpu"] + 3,), p)


def test_the_mask_does_not_depend_on_the_number_of_threads():
    x = torch.ones(1100, 33)
    before = torch.get_num_threads()
    masks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        masks.append(passing(x, 7, 0.2))
    torch.set_num_threads(before)
    assert torch.equal(*masks)


def test_dropout_touches_the_adapters_way_only():
    x, weight, b, A, B = arguments((6,))
    torch.manual_seed(0)
    y = lora_linear(x, weight, b, torch.zeros_like(A), B, S, 0.5)
    torch.testing.assert_close(y, x @ weight.T + b)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_dropout_under_checkpointing_draws_the_same_mask_again(use_reentrant):
    x, weight, b, A, B = arguments((700,))

    def run(x):
        return lora_linear(x, weight, b, A, B, S, 0.3)

    torch.manual_seed(2)
    expected = torch.autograd.grad(run(x).square().sum(), (x, A, B))
    after = torch.randint(100, ())
    torch.manual_seed(2)
    y = checkpoint(run, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert all(torch.equal(t.grad, e) for t, e in zip((x, A, B), expected, strict=True))
    assert torch.equal(torch.randint(100, ()), after)


def test_a_layer_drops_in_training_only_and_anew_in_every_call():
    model = get_lora_model(
        nn.Sequential(nn.Linear(64, 8)),
        LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False),
    )
    x = torch.randn(16, 64)
    model.eval()
    assert torch.equal(model(x), model(x))
    expected = model(x)
    model.train()
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        mean = sum(model(x.repeat(40, 1, 1)).mean(0) for _ in range(50)) / 50  # each row of each call drops its own
    torch.testing.assert_close(mean, expected, atol=0.1, rtol=0)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_output_of_a_marked_module_is_computed_again_instead_of_kept(dropout):
    norm = nn.LayerNorm(5, dtype=torch.float64).requires_grad_(False)
    norm.weight.normal_()
    x, weight, b, A, B = arguments((40,))

    def run(marked):
        torch.manual_seed(0)
        z = norm(x)
        z = recompute.mark(z, norm, x) if marked else z
        return lora_linear(z, weight, b, A, B, S, dropout)

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = run(True)
    assert kept.count(x.data_ptr()) == 2  # by the norm and by the adapter, in one storage
    expected = run(False)
    assert torch.equal(y, expected)
    for found, wanted in zip(
        torch.autograd.grad(y.square().sum(), (x, A, B)),
        torch.autograd.grad(expected.square().sum(), (x, A, B)),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_a_marked_input_that_was_written_since_is_kept_itself():
    x = torch.randn(40, 5)
    z = recompute.mark(torch.tanh(x), nn.Tanh(), x)
    assert recompute.source_of(z) is not None
    z = z.detach()
    assert recompute.source_of(z) is None
    z = recompute.mark(torch.tanh(x.detach()), nn.Tanh(), x.detach())
    z.mul_(2)
    assert recompute.source_of(z) is None


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 40, SLICE["cpu"] + 3])
def test_the_gradient_goes_through_an_activation_in_slices(rows, dropout):
    x, weight, b, A, B = arguments((rows,))
    gelu = nn.GELU(approximate="tanh")

    def run(marked):
        torch.manual_seed(0)
        z = gelu(x)
        z = recompute.mark(z, gelu, x, pointwise=True) if marked else z
        return lora_linear(z, weight, b, A, B, S, dropout)

    y, expected = run(True), run(False)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    for wanted_of in ((x, A, B), (x,), (B,)):
        for found, wanted in zip(
            torch.autograd.grad(y, wanted_of, dy, retain_graph=True),
            torch.autograd.grad(expected, wanted_of, dy, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("watch", [lambda z, seen: z.retain_grad(), lambda z, seen: z.register_hook(seen.append)])
def test_who_watches_the_gradient_of_an_activation_sees_it(watch):
    x, weight, b, A, B = arguments((6,))
    gelu, seen = nn.GELU(approximate="tanh"), []
    z = recompute.mark(gelu(x), gelu, x, pointwise=True)
    watch(z, seen)
    lora_linear(z, weight, b, A, B, S).sum().backward()
    expected = (weight + S * B @ A).sum(0).expand(6, 5)
    torch.testing.assert_close(z.grad if not seen else seen[0], expected)


@pytest.mark.parametrize("pointwise", [True, False])
def test_the_gradient_of_a_gradient_goes_through_a_recomputed_input(pointwise):
    x, weight, b, A, B = arguments((2, 3))
    gelu = nn.GELU(approximate="tanh")

    def f(x, A, B):
        return lora_linear(recompute.mark(gelu(x), gelu, x, pointwise=pointwise), weight, b, A, B, S)

    assert torch.autograd.gradcheck(f, (x, A, B))
    assert torch.autograd.gradgradcheck(f, (x, A, B))


class Gated(nn.Module):
    def forward(self, gate, up):
        return nn.functional.silu(gate) * up


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("rows", [3, SLICE["cpu"] + 3])
def test_the_gradient_goes_through_a_function_of_two_tensors(rows):
    x, weight, b, A, B = arguments((rows,))
    gate, up = (torch.randn_like(x, requires_grad=True) for _ in range(2))

    def f(gate, up, A, B, marked=True):
        z = Gated()(gate, up)
        return lora_linear(recompute.mark(z, Gated(), gate, up, pointwise=True) if marked else z, weight, b, A, B, S)

    given = (gate, up, A, B)
    dy = torch.randn(rows, len(weight), dtype=x.dtype)
    for found, wanted in zip(
        torch.autograd.grad(f(*given), given, dy), torch.autograd.grad(f(*given, False), given, dy), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    if rows == 3:
        assert torch.autograd.gradgradcheck(f, given)


def test_layers_that_share_an_input_compute_it_again_once(monkeypatch):
    x, weight, b, A, B = arguments((6,))
    norm, calls, forward = nn.LayerNorm(5, dtype=torch.float64).requires_grad_(False), [], nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: calls.append(1) or forward(self, x))

    def total(z):
        return sum(lora_linear(z, weight, b, A * i, B, S).square().sum() for i in (1, 2, 3))

    expected = torch.autograd.grad(total(norm(x)), (x, A, B))
    y = total(recompute.mark(norm(x), norm, x))
    calls.clear()
    for passes in (1, 2):
        for found, wanted in zip(torch.autograd.grad(y, (x, A, B), retain_graph=True), expected, strict=True):
            torch.testing.assert_close(found, wanted)
        assert len(calls) == passes


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
    monkeypatch.setattr("minipeft.methods.low_rank.can_fuse", lambda *arguments: False)
    assert found == pytest.approx(list(losses(other)), rel=1e-5)
    assert found[-1] < found[0]


def test_a_subclass_that_brings_its_own_forward_is_given_the_output_of_the_base():
    from minipeft.methods.lora import Lora

    class Doubled(Lora):
        def forward(self, base, ops, x, y):
            return y + 2 * (super().forward(base, ops, x, y) - y)

    assert Lora.runs_base
    assert not Doubled.runs_base


@pytest.mark.parametrize("rows", [1, 2, 8, 64, 65])
@pytest.mark.parametrize("r", [1, 4, 16])
def test_training_and_evaluation_give_the_same_bits_however_few_the_rows(rows, r, monkeypatch):
    """An adapter that trains, and the same one loaded for inference: one forward pass keeps what the other drops."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: False)  # on some processors, and in training alone
    for sizes in ((8, 8), (32, 96), (300, 160)):
        x, *others = arguments((rows,), *sizes, r=r, dtype=torch.float32)
        y = lora_linear(x, *others, S)
        with torch.no_grad():
            assert torch.equal(lora_linear(x, *others, S), y)
        torch.testing.assert_close(y, formula(x, *others), rtol=1e-4, atol=1e-4)

"""The fused low-rank map on quantized bases: the same function as without, and no float weight kept for it."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from rotation import rotated, thinned
from test_quantized import EPS, KINDS, gpt2, quantized, read, with_lora
from tiny_layers import OneLayer
from tiny_models import disturb, foreign_code, token_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

import minipeft
from minipeft import LoraConfig
from minipeft.kernels import merged_weight
from minipeft.layers.base import layer_ops
from minipeft.layers.quantized import QuantizedLinearOps
from minipeft.memory.lean import STATE
from minipeft.memory.modules import FastLinear

with foreign_code():
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao.quantization")

every_kind = pytest.mark.parametrize("kind", KINDS)
WAYS = [None, "none", "last", "mlp", "block"]
IN, OUT = 128, 64


def leaves(*tensors, dtype=torch.float64):
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def factors(model):
    lora = model.layer.adapters["default"]
    return lora.lora_A, lora.lora_B


def same(found, expected, eps=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).abs().max() <= eps * b.abs().max()


def is_fused(y):
    return type(y.grad_fn).__name__ == "_LoraLinearBackward"


def float_twin(model):
    """The same adapted layer on the float layer that the quantized one stands for."""
    base = model.layer.base_layer
    plain = nn.Linear(IN, OUT, base.bias is not None)
    plain.load_state_dict({"weight": read(base)} | ({} if base.bias is None else {"bias": base.bias}))
    twin = copy.copy(model)
    twin._modules = {"layer": copy.copy(model.layer)}
    twin.layer._modules = dict(model.layer._modules) | {"base_layer": plain.requires_grad_(False)}
    twin.layer.ops = layer_ops(plain)
    return twin


@pytest.fixture
def made(monkeypatch):
    """Weak references to the float weights that are made, in turn."""
    references = []

    def spied(original):
        def dequantized(base, dtype=None):
            weight = original(base, dtype)
            if dtype is not None:
                references.append(weakref.ref(weight))
            return weight

        return dequantized

    for ops in {layer_ops(quantized(kind).layer) for kind in KINDS}:
        monkeypatch.setattr(ops, "dequantized", spied(ops.dequantized))
    return references


@pytest.fixture(params=["two products", "merged weight"])
def route(request, monkeypatch):
    monkeypatch.setattr(merged_weight, "pays", lambda rows, weight: request.param == "merged weight")


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", EPS)
@every_kind
def test_output_and_gradients_are_those_of_the_formula_in_float64(kind, dtype, bias):
    model = with_lora(quantized(kind, lambda: nn.Linear(IN, OUT, bias), dtype))
    base, (A, B) = model.layer.base_layer, factors(model)
    x = torch.randn(2, 5, IN, dtype=dtype, requires_grad=True)
    y = model(x)
    assert is_fused(y)
    dy = torch.randn_like(y)
    for _ in range(2):  # the second pass makes the weight anew: the first one's has been written into
        found = torch.autograd.grad(y, (x, A, B), dy, retain_graph=True)
        z, C, D = leaves(x, A, B)
        weight = layer_ops(base).dequantized(base, dtype).double()
        expected = z @ (weight + model.layer.adapters["default"].scaling * D @ C).T
        expected = expected if base.bias is None else expected + base.bias.double()
        same((y, *found), (expected, *torch.autograd.grad(expected, (z, C, D), dy.double())), EPS[dtype])
    assert y.dtype is x.dtype


@pytest.mark.each_value
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"lora_bias": True}, {"freeze_lora_A": True}, {"bias": "lora_only"}]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@every_kind
def test_every_option_gives_what_it_gives_on_the_float_layer(kind, dropout, options):
    """Whose masks, drawn from the same seed, are the same."""
    model = with_lora(quantized(kind), lora_dropout=dropout, **options)
    x, results = torch.randn(6, IN, requires_grad=True), []
    for one in (model, float_twin(model)):
        torch.manual_seed(1)
        y = one(x)
        trained = [p for p in one.layer.adapters.parameters() if p.requires_grad]
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *trained))))
    same(*results)


@every_kind
def test_a_method_that_is_no_lora_takes_the_fused_path_too(kind):
    model = minipeft.get_adapter_model(quantized(kind), minipeft.LoHaConfig(target_modules=["layer"], r=4))
    disturb(model)
    x = torch.randn(6, IN, requires_grad=True)
    results = [(y, *torch.autograd.grad(y.sum(), x)) for y in (model(x), float_twin(model)(x))]
    assert is_fused(model(x))
    same(*results)


@every_kind
def test_the_gradient_of_the_gradient_is_that_of_the_float_layer(kind):
    model, results = with_lora(quantized(kind)), []
    x = torch.randn(6, IN, requires_grad=True)
    for one in (model, float_twin(model)):
        A, B = factors(one)
        first = torch.autograd.grad(one(x).tanh().sum(), (x, A, B), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, A, B)))
    same(*results)


@every_kind
def test_checkpointing_replays_the_dropout(kind):
    model = with_lora(quantized(kind), lora_dropout=0.5)
    x, results = torch.randn(6, IN, requires_grad=True), []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(call(x).square().sum(), (x, *factors(model))))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@every_kind
def test_compiled_it_is_the_same(kind):
    model = with_lora(quantized(kind))
    x = torch.randn(6, IN, requires_grad=True)
    expected = model(x)
    with foreign_code():
        found = torch.compile(model, backend="eager")(x)
        same((found, *torch.autograd.grad(found.sum(), x)), (expected, *torch.autograd.grad(expected.sum(), x)))


@pytest.mark.parametrize("training", [True, False])
@every_kind
def test_a_fresh_adapter_and_a_disabled_one_leave_the_layers_own_output(kind, training):
    torch.manual_seed(0)
    model = minipeft.get_lora_model(quantized(kind), LoraConfig(target_modules=["layer"], r=4)).train(training)
    x = torch.randn(6, IN, requires_grad=True)
    own = model.layer.base_layer(x)
    same((model(x),), (own,), 1e-6)
    disturb(model)
    with model.disable_adapter():
        same((model(x),), (own,), 1e-6)
    with torch.no_grad():  # where nothing is learned it is the layer's own call
        own = model.layer.base_layer(x)
        with model.disable_adapter():
            assert torch.equal(model(x), own)


@every_kind
def test_an_adapter_beside_a_merged_one_acts_on_the_float_layer(kind):
    model = with_lora(quantized(kind))
    model.add_adapter("other", LoraConfig(target_modules=["layer"], init_lora_weights=False, r=2))
    model.set_adapter(["default", "other"])
    x = torch.randn(6, IN, requires_grad=True)
    expected = model(x)
    model.merge_adapter(["default"], dequantize=True)
    with pytest.warns(UserWarning, match="'default' is merged into the base"):
        found = model(x)
    same((found, *torch.autograd.grad(found.sum(), x)), (expected, *torch.autograd.grad(expected.sum(), x)))


@pytest.mark.parametrize(
    ("kind", "recomputed"), thinned((KINDS, [True, False]), zip(KINDS, itertools.cycle([True, False])))
)
def test_the_weight_is_made_once_forward_once_backward_and_gone_in_between(kind, recomputed, made):
    model = with_lora(quantized(kind))
    made.clear()
    x = torch.randn(6, IN, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=False) if recomputed else model(x)
    gc.collect()
    assert [weight() for weight in made] == [None]
    y.sum().backward()
    gc.collect()
    assert [weight() for weight in made] == [None] * (3 if recomputed else 2)


@every_kind
def test_where_no_gradient_goes_on_the_backward_pass_makes_no_weight(kind, made):
    model = with_lora(quantized(kind))
    made.clear()
    model(torch.randn(6, IN)).sum().backward()
    assert len(made) == 1
    assert all(p.grad.any() for p in factors(model))


@pytest.mark.each_value
@pytest.mark.parametrize(("kind", "freeze", "rows"), rotated(KINDS, [True, False], [8, 1, 8]))
def test_kept_are_the_input_and_the_few_columns_of_its_projection(kind, rows, freeze):
    """With A frozen not even the input: bitsandbytes' int8 layer, left to itself, would hold on to it unseen."""
    model = with_lora(quantized(kind), freeze_lora_A=freeze)
    x, kept = torch.randn(rows, IN, requires_grad=True), {}
    z = x * 1  # nobody else keeps it
    z_lives = weakref.ref(z)

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(z)
    own = {p.untyped_storage().data_ptr() for p in factors(model)}
    expected = [(rows, 4)] if freeze else [(rows, 4), (rows, IN)]
    assert sorted(tuple(shape) for pointer, shape in kept.items() if pointer not in own) == expected
    del z
    kept.clear()
    gc.collect()
    assert (z_lives() is None) == freeze
    y.sum().backward()
    assert x.grad.any()


@every_kind
def test_in_eval_mode_every_bit_is_the_layers_own_and_still_no_weight_is_kept(kind):
    model = with_lora(quantized(kind, lambda: nn.Linear(IN, 78))).eval()
    x, kept = torch.randn(6, IN, requires_grad=True), []
    with torch.no_grad():
        own, expected = model.layer.base_layer(x), model(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert torch.equal(y, expected)
    assert not [t for t in kept if t.numel() == IN * 78 and t.is_floating_point()]
    with model.disable_adapter():
        y = model(x)
    assert torch.equal(y, own)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0][0], read(model.layer.base_layer).sum(0), rtol=1e-4, atol=1e-5
    )


def test_int8_in_eval_mode_rounds_its_input_and_is_left_to_itself():
    model = with_lora(quantized("int8"))
    x = torch.randn(6, IN, requires_grad=True)
    assert is_fused(model.train()(x))
    y, own = model.eval()(x), model.layer.base_layer(x)
    A, B = factors(model)
    assert not is_fused(y)
    torch.testing.assert_close(y, own + model.layer.adapters["default"].scaling * x @ A.T @ B.T)
    assert not torch.allclose(own, nn.functional.linear(x, read(model.layer.base_layer), model.layer.base_layer.bias))


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32, None])
def test_a_layer_that_computes_in_another_dtype_is_left_to_itself(compute):
    packed = bnb.nn.Linear4bit(IN, OUT, compute_dtype=compute, quant_type="nf4").to("cpu")
    model = with_lora(OneLayer(packed))
    assert is_fused(model(torch.randn(6, IN, requires_grad=True))) == (compute is not torch.bfloat16)


def test_a_weight_that_was_packed_from_a_narrower_dtype_is_not_rounded_to_it():
    """As after prepare_model_for_kbit_training; bitsandbytes multiplies by one weight and, backward, by another."""
    model = with_lora(quantized("nf4", dtype=torch.bfloat16))
    model.float()
    base, x = model.layer.base_layer, torch.randn(6, IN, requires_grad=True)
    base.compute_dtype = torch.float32
    with model.disable_adapter():
        y = model(x)
        with torch.no_grad():
            torch.testing.assert_close(y, base(x), rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(y[:, 3].sum(), x)
    torch.testing.assert_close(slope[0], base(torch.eye(IN))[:, 3] - base.bias[3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["hook", "forward"])
@every_kind
def test_what_is_attached_to_a_layer_is_not_passed_over(kind, where):
    model = with_lora(quantized(kind))
    base, calls = model.layer.base_layer, []
    if where == "hook":
        base.register_forward_hook(lambda module, args, output: calls.append(1))
    else:
        own = base.forward
        base.forward = lambda x: calls.append(1) or own(x)
    assert not is_fused(model(torch.randn(6, IN, requires_grad=True)))
    assert calls == [1]


@pytest.mark.parametrize("dtype", EPS)
@every_kind
def test_under_autocast_the_output_keeps_its_dtype_and_is_right(kind, dtype):
    model = with_lora(quantized(kind, dtype=dtype))
    x, results = torch.randn(6, IN, dtype=dtype, requires_grad=True), []
    with torch.autocast("cpu", torch.bfloat16):
        own = model.layer.base_layer(x)
        y = model(x)
    assert y.dtype is own.dtype
    for z in (y, adapted_float(model, x)):
        results.append((z, *torch.autograd.grad(z.sum(), (x, *factors(model)))))
    same(*results, EPS[torch.bfloat16])
    with torch.autocast("cpu", torch.bfloat16), model.disable_adapter():
        assert model(x).dtype is own.dtype


def adapted_float(model, x):
    (A, B), base = factors(model), model.layer.base_layer
    weight = read(base).float() + model.layer.adapters["default"].scaling * B @ A
    return x.float() @ weight.T + base.bias.float()


class Silent(QuantizedLinearOps):
    """A quantized layer that only says how to dequantize it."""

    def dequantized(self, base, dtype=None):
        raise AssertionError


def test_a_quantized_layer_that_says_nothing_of_its_call_is_called():
    layer, ops = nn.Linear(2, 2), Silent()
    x = torch.ones(2, requires_grad=True)
    assert ops.linear_weight(layer, x) is None
    assert torch.equal(ops.call(layer, x), layer(x))


def gradients(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(
    ("kind", "checkpointing"), thinned((KINDS, WAYS), zip(itertools.cycle(KINDS), [*WAYS, *WAYS[1:]]))
)
def test_lean_changes_neither_loss_nor_gradients(kind, checkpointing):
    config = LoraConfig(target_modules=["c_attn", "c_fc", "mlp.c_proj"], init_lora_weights=False, r=4)
    model, ids = minipeft.get_lora_model(minipeft.quantize(gpt2(), kind), config).train(), token_ids(rows=4)
    expected = gradients(model, ids)
    minipeft.lean(model, checkpointing=checkpointing)
    for found, wanted in zip(gradients(model, ids), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@every_kind
def test_under_lean_a_quantized_layer_without_adapter_keeps_nothing(kind):
    config = LoraConfig(target_modules=["c_attn"], init_lora_weights=False, r=4)
    model, ids = minipeft.get_lora_model(minipeft.quantize(gpt2(), kind), config).train(), token_ids()
    classes, expected = [type(m) for m in model.modules()], gradients(model, ids)
    minipeft.lean(model, checkpointing="none")
    layer = model.transformer.h[1].mlp.c_proj
    assert isinstance(layer, FastLinear)
    assert layer_ops(layer).is_quantized
    x = torch.randn(3, layer.in_features, requires_grad=True)
    z, kept = x * 1, []
    lives = weakref.ref(z)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        y = layer(z)
    del z
    gc.collect()
    assert kept == []
    assert lives() is None
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0][0], read(layer).sum(0), rtol=1e-4, atol=1e-5)
    for found, wanted in zip(gradients(copy.deepcopy(model), ids), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    minipeft.unlean(model)
    assert [type(m) for m in model.modules()] == classes
    assert STATE not in vars(model)

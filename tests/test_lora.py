"""LoRA's algebra on every layer type, in float64 against the formula, and its behaviour as a module."""

import copy
import io
import pickle

import pytest
import torch
from tiny_layers import LAYERS, OneLayer, adapted_layer, canonical_weight, example
from torch import nn

from minipeft import LoraConfig, get_lora_model
from minipeft.kernels.functional import lora_delta


@pytest.mark.parametrize("name", LAYERS)
def test_the_output_is_the_formula(name):
    layer, model = adapted_layer(name, r=3, lora_alpha=5)
    lora = model.layer.adapters["default"]
    x, dense = example(layer)
    update = 5 / 3 * lora.lora_B @ lora.lora_A
    bias = 0 if getattr(layer, "bias", None) is None else layer.bias
    torch.testing.assert_close(model(x), dense @ (canonical_weight(layer) + update).T + bias)


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradients_are_those_of_the_formula(name):
    layer, model = adapted_layer(name, r=3, lora_alpha=5)
    lora = model.layer.adapters["default"]
    x, dense = example(layer)
    A, B = (p.detach().clone().requires_grad_() for p in (lora.lora_A, lora.lora_B))
    grad = torch.randn_like(model(x))
    (model(x) * grad).sum().backward()
    (dense @ (5 / 3 * B @ A).T * grad).sum().backward()
    if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
        A.grad[:, layer.padding_idx] = 0  # torch's embedding gives the padding row no gradient
    torch.testing.assert_close(lora.lora_A.grad, A.grad)
    torch.testing.assert_close(lora.lora_B.grad, B.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_the_start_is_exactly_the_base(name, dtype):
    layer = LAYERS[name]().to(dtype)
    x, _ = example(layer, dtype)
    expected = layer(x)
    for init in (True, "gaussian"):
        config = LoraConfig(r=3, target_modules=["layer"], init_lora_weights=init)
        assert torch.equal(get_lora_model(OneLayer(copy.deepcopy(layer)), config)(x), expected)


def test_a_is_kaiming_uniform_and_b_zero():
    lora = get_lora_model(OneLayer(nn.Linear(400, 300)), LoraConfig(r=64, target_modules=["layer"])).layer.adapters[
        "default"
    ]
    bound = (6 / ((1 + 5) * 400)) ** 0.5  # a = sqrt(5), fan_in = 400
    assert lora.lora_A.abs().max() <= bound
    assert lora.lora_A.abs().max() > 0.99 * bound
    torch.testing.assert_close(lora.lora_A.var().item(), bound**2 / 3, rtol=0.05, atol=0)
    assert not lora.lora_B.any()


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Conv1d(6, 4, 3), nn.Conv2d(3, 5, (2, 3))])
def test_both_factors_start_with_the_very_values_of_torchs_own_function(layer):
    config = LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False)
    torch.manual_seed(0)
    lora = get_lora_model(OneLayer(layer), config).layer.adapters["default"]
    torch.manual_seed(0)
    for factor in (lora.lora_A, lora.lora_B):
        assert torch.equal(factor, nn.init.kaiming_uniform_(torch.empty_like(factor), a=5**0.5))


def test_gaussian_a_has_the_standard_deviation_one_over_r():
    config = LoraConfig(r=16, target_modules=["layer"], init_lora_weights="gaussian")
    lora = get_lora_model(OneLayer(nn.Linear(4000, 3)), config).layer.adapters["default"]
    torch.testing.assert_close(lora.lora_A.std().item(), 1 / 16, rtol=0.02, atol=0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_parameters_are_float32_on_a_half_precision_base_unless_told_otherwise(half):
    config = LoraConfig(r=2, target_modules=["layer"])
    model = get_lora_model(OneLayer(nn.Linear(4, 4).to(half)), config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(torch.randn(2, 4, dtype=half)).dtype is half
    model = get_lora_model(OneLayer(nn.Linear(4, 4).to(half)), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {half}
    assert {p.dtype for p in adapted_layer("linear")[1].parameters()} == {torch.float64}


def test_autocast_gives_the_base_dtype_of_autocast_and_float32_gradients():
    model = get_lora_model(
        OneLayer(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(3, 8))
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert model.layer.adapters["default"].lora_A.grad.dtype is torch.float32


def test_dropout_drops_inputs_in_training_only():
    layer, model = adapted_layer("linear", r=3, lora_dropout=0.5)
    lora, x = model.layer.adapters["default"], torch.ones(20_000, 5, dtype=torch.float64)
    update = (model.train()(x) - layer(x)).detach()
    undropped = (model.eval()(x) - layer(x)).detach()
    torch.testing.assert_close(undropped[0], undropped[1])
    torch.testing.assert_close(update.mean(0), undropped[0], rtol=0.05, atol=0.02)  # scaled up by 1 / (1 - p)
    columns = (
        lora.scaling * lora.lora_B @ lora.lora_A
    ).detach()  # any row is a sum over a subset of the inputs, doubled
    subsets = torch.cartesian_prod(*[torch.tensor([0.0, 2.0], dtype=torch.float64)] * 5) @ columns.T
    assert torch.cdist(update[:200], subsets, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 1e-9


def test_dropout_on_an_embedding_drops_whole_tokens():
    layer, model = adapted_layer("embedding", r=3, lora_dropout=0.25)
    ids = torch.zeros(20_000, dtype=torch.long)
    update = (model.train()(ids) - layer(ids)).detach()
    full = (model.eval()(ids) - layer(ids)).detach()[0]
    kept = update.abs().sum(1) > 0
    torch.testing.assert_close(kept.double().mean().item(), 0.75, rtol=0.03, atol=0)
    torch.testing.assert_close(update[kept][0], full / 0.75)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: the rows are scaled on the way out."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


def test_a_scaled_embedding_scales_its_update_too():
    layer = ScaledEmbedding(9, 6)
    model = get_lora_model(OneLayer(layer), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    lora, ids = model.layer.adapters["default"], torch.arange(9)
    expected = 3 * (layer.weight + (lora.scaling * lora.lora_B @ lora.lora_A).T)
    torch.testing.assert_close(model(ids), expected)
    model.merge_and_unload()
    torch.testing.assert_close(model(ids), expected)


def test_copies_pickles_and_saved_modules_are_independent_and_equal():
    layer, model = adapted_layer("linear", r=2)
    x, _ = example(layer)
    expected = model(x).detach()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert torch.equal(other(x), expected)
        assert type(other) is type(model)
        with torch.no_grad():
            other.layer.adapters["default"].lora_B.add_(1)
        assert not torch.equal(other(x), expected)
        with other.disable_adapter():
            assert torch.equal(other(x), layer(x))
        assert torch.equal(model(x), expected)


def test_the_input_is_kept_once_and_in_its_own_dtype():
    """Saved for backward: x itself (no float32 copy of it) and the small projections, nothing as large as x beside it."""
    base = nn.Linear(256, 256).bfloat16()
    model = get_lora_model(OneLayer(base), LoraConfig(r=4, target_modules=["layer"]))
    x = torch.randn(128, 256, dtype=torch.bfloat16, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert sorted(saved.values())[-1] == x.nbytes
    assert sum(saved.values()) <= x.nbytes + 4 * 128 * 4 * 4 + 2 * 4 * 4 * 256


def test_delta_refuses_factors_of_different_rank():
    with pytest.raises(ValueError, match="rank mismatch"):
        lora_delta(torch.zeros(2, 3), torch.zeros(4, 3), 1.0)


def test_bias_training_leaves_the_base_bias_alone():
    layer, model = adapted_layer("linear", r=2, bias="lora_only")
    before = layer.bias.detach().clone()
    x = torch.randn(4, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    lora = model.layer.adapters["default"]
    assert not torch.equal(lora.lora_bias, before)
    assert torch.equal(layer.bias, before)
    update = lora.scaling * lora.lora_B @ lora.lora_A
    torch.testing.assert_close(model(x), x @ (layer.weight + update).T + lora.lora_bias)

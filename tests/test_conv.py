"""Convolutions: against the update written out as a kernel, in float64, and against PEFT where that is right."""

import copy

import pytest
import torch
from tiny_models import disturb, foreign_code, state_digest
from torch import nn

from minipeft import (
    CheckpointError,
    ConfigError,
    IA3Config,
    LoraConfig,
    TargetError,
    get_adapter_model,
    get_lora_model,
    load_adapter,
)
from minipeft.layers.base import layer_ops

with foreign_code():
    peft = pytest.importorskip("peft")

# torch says so of padding="same" with an even kernel; it is the layer's business.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

LAYERS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "1d same, even kernel": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 9)),
    "1d unbatched": (lambda: nn.Conv1d(4, 6, 3, stride=2), (4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    "2d stride, no bias": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, bias=False), (2, 4, 7, 8)),
    "2d pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 7, 7)),
    "2d dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), (2, 4, 9, 9)),
    "2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 7)),
    "2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="replicate"), (2, 4, 7, 7)),
    "2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), (2, 4, 9, 9)),
    "3d": (lambda: nn.Conv3d(2, 3, 3, padding=1), (2, 2, 4, 5, 4)),
    "3d flat kernel": (lambda: nn.Conv3d(2, 3, (1, 1, 3)), (2, 2, 4, 5, 5)),
}
# What PEFT computes wrongly or not at all, each of them a defect of 0.21.2: dilation, circular padding, groups.
RIGHT_IN_PEFT = ["1d", "1d same, even kernel", "2d", "2d stride, no bias", "2d pointwise", "3d", "3d flat kernel"]
each = pytest.mark.parametrize("name", LAYERS)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.conv = copy.deepcopy(layer)

    def forward(self, x):
        return self.conv(x)


def config(**options):
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["conv"], "init_lora_weights": False, **options})


def case(name, dtype=torch.float64, **options):
    """(base layer, adapted model, input); every adapter parameter matters."""
    make, shape = LAYERS[name]
    layer = make().to(dtype)
    return layer, get_lora_model(Net(layer), config(**options)), torch.randn(shape, dtype=dtype)


def with_weight(layer, weight, x):
    other = copy.deepcopy(layer)
    other.weight.data = weight
    return other(x)


@each
def test_the_output_is_that_of_the_kernel_with_the_update_in_it(name):
    layer, model, x = case(name)
    lora = model.conv.adapters["default"]
    update = 5 / 3 * lora.lora_B.flatten(1) @ lora.lora_A.flatten(1)
    expected = with_weight(layer, layer.weight + update.view_as(layer.weight), x)
    torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(expected, layer(x), atol=1e-2)


@pytest.mark.parametrize("init", [True, "gaussian"])
@each
def test_the_start_is_exactly_the_base(name, init):
    layer, model, x = case(name, torch.float32, init_lora_weights=init)
    assert torch.equal(model(x), layer(x))


def theirs(layer, directory=None, **options):
    with foreign_code():
        base = Net(copy.deepcopy(layer))
        if directory is not None:
            return peft.PeftModel.from_pretrained(base, directory).eval()
        return disturb(
            peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["conv"], **options))
        )


@pytest.mark.parametrize("name", RIGHT_IN_PEFT)
def test_files_are_those_of_peft_in_both_directions(name, tmp_path):
    layer, model, x = case(name, torch.float32)
    model.save_pretrained(tmp_path / "ours")
    with foreign_code():
        torch.testing.assert_close(theirs(layer, tmp_path / "ours")(x), model(x), rtol=1e-4, atol=1e-5)
        reference = theirs(layer, bias="lora_only")
        reference.save_pretrained(tmp_path / "theirs")
        expected = reference(x)
    loaded = load_adapter(Net(copy.deepcopy(layer)), tmp_path / "theirs")
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    assert loaded.adapter_state_dict().keys() == peft.get_peft_model_state_dict(reference).keys()


@pytest.mark.parametrize("name", ["2d dilation", "2d circular", "2d reflect"])
def test_what_peft_merges_is_what_we_compute_where_its_forward_drops_dilation_or_padding(name, tmp_path):
    """PEFT's own unmerged forward fails for dilation, and is off by more than one for circular padding."""
    layer, model, x = case(name, torch.float32)
    model.save_pretrained(tmp_path)
    with foreign_code():
        reference = theirs(layer, tmp_path)
        merged = reference.merge_and_unload()(x)
    torch.testing.assert_close(model(x), merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", False])
def test_a_kernel_saved_as_plain_lora_is_read_by_us_and_by_peft(init, tmp_path):
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1))
    config = LoraConfig(r=3, target_modules=["0", "1"], rank_pattern={"1": 2}, init_lora_weights=init)
    model, x = disturb(get_lora_model(copy.deepcopy(base), config)), torch.randn(2, 4, 6, 6)
    model.save_pretrained(tmp_path, convert_to_lora=True)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for loaded in (load_adapter(base, tmp_path), theirs):
        torch.testing.assert_close(loaded(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_flat_3d_kernel_merges_where_peft_crashes(tmp_path):
    """a Conv3d kernel (1, 1, k) is taken for a 2-d pointwise one there."""
    layer, model, x = case("3d flat kernel", torch.float32)
    model.save_pretrained(tmp_path)
    y = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-4, atol=1e-5)
    with foreign_code(), pytest.raises((RuntimeError, IndexError)):
        theirs(layer, tmp_path).merge_and_unload()


def test_loftq_is_refused_by_name_before_it_can_miss_an_argument():
    """PEFT's conv calls loftq_init without an argument that it needs."""
    with pytest.raises(ConfigError, match="init_lora_weights .loftq. starts from the quantization error"):
        config(init_lora_weights="loftq")


def test_an_adapter_of_peft_that_mixes_groups_is_refused_since_no_grouped_layer_can_hold_it(tmp_path):
    layer = LAYERS["2d groups"][0]()
    with foreign_code():
        base = Net(copy.deepcopy(layer))
        peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["conv"])).save_pretrained(tmp_path)
    model = Net(layer)
    before = state_digest(model)
    with pytest.raises(CheckpointError, match=r"conv.lora_A.weight: \[4, 4, 3, 3\] in the file, \[4, 2, 3, 3\] here"):
        load_adapter(model, tmp_path)
    assert state_digest(model) == before


def test_all_linear_takes_no_convolution():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3), "linear": nn.Linear(3, 3)})
    adapted = get_lora_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert {key.split(".")[2] for key in adapted.adapter_state_dict()} == {"linear"}


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize("layer", [Standardised(3, 3, 3), nn.LazyConv2d(3, 3), nn.ConvTranspose2d(3, 3, 3)])
def test_a_convolution_that_computes_otherwise_is_refused_and_left_alone(layer):
    model = Net(layer)
    layer = model.conv
    with pytest.raises(TargetError, match="conv: "):
        get_lora_model(model, config())
    assert type(model) is Net
    assert model.conv is layer


def test_dropout_drops_inputs_in_training_only():
    layer, model, x = case("2d pointwise", lora_dropout=0.5)
    assert torch.equal(model.eval()(x), model(x))
    torch.manual_seed(1)
    y = model.train()(x)
    torch.manual_seed(1)
    lora = model.conv.adapters["default"]
    kernel = (5 / 3 * lora.lora_B.flatten(1) @ lora.lora_A.flatten(1)).view_as(layer.weight)
    expected = layer(x) + nn.functional.conv2d(nn.functional.dropout(x, 0.5), kernel)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", ["1d", "1d unbatched", "2d groups", "3d"])
def test_a_factor_per_output_feature_scales_as_scaled_rows_of_the_weight_do(name):
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    ops, y = layer_ops(layer), layer(x)
    factor = torch.randn(layer.out_channels, dtype=torch.float64)
    scaled = with_weight(layer, layer.weight * factor.reshape(-1, *[1] * (layer.weight.ndim - 1)), x)
    bias = ops.per_feature(layer, layer.bias)
    torch.testing.assert_close((y - bias) * ops.per_feature(layer, factor) + bias, scaled)
    layer(ops.example_input(layer))


@pytest.mark.parametrize("name", ["1d", "1d unbatched", "2d stride, no bias", "3d"])
def test_a_factor_per_input_feature_scales_as_scaled_columns_of_the_weight_do(name):
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    ops = layer_ops(layer)
    factor = torch.randn(ops.in_features(layer), dtype=torch.float64)
    kernel_size = ops.shape(layer)[1] // len(factor)
    weight = ops.read_weight(layer) * factor.repeat_interleave(kernel_size)
    expected = with_weight(layer, weight.view_as(layer.weight).detach(), x)
    torch.testing.assert_close(layer(x * ops.per_feature(layer, factor)), expected)


@pytest.mark.parametrize("name", ["1d", "2d groups", "3d"])
def test_the_update_needs_no_weight_of_the_layer(name):
    """The first FSDP leaves a part of it in its place, flat, where it wraps the layer inside of the adapted one."""
    make, shape = LAYERS[name]
    base, x = make(), torch.randn(shape)
    ops = layer_ops(base)
    A, B = (torch.randn(size) for size in ops.factor_shapes(base, 2))
    expected = ops.project_out(base, ops.project_in(base, x, A), B)
    base.weight.data = base.weight.detach().flatten()[:3]
    assert torch.equal(ops.project_out(base, ops.project_in(base, x, A), B), expected)


def test_inputs_of_groups_cannot_be_scaled_in_the_weight():
    layer = LAYERS["2d groups"][0]()
    with pytest.raises(TargetError, match="groups=2: its input features cannot be scaled one by one"):
        layer_ops(layer).in_features(layer)


@pytest.mark.parametrize("feedforward", [[], ["conv"]], ids=["outputs", "inputs"])
@pytest.mark.parametrize("name", ["2d stride, no bias", "2d pointwise", "3d"])
def test_the_vectors_of_ia3_have_pefts_shape_in_both_directions(name, feedforward, tmp_path):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    options = {"target_modules": ["conv"], "feedforward_modules": feedforward}
    model = get_adapter_model(Net(layer), IA3Config(init_ia3_weights=False, **options))
    model.save_pretrained(tmp_path / "ours")
    with foreign_code():
        loaded = peft.PeftModel.from_pretrained(Net(layer), tmp_path / "ours")
        torch.testing.assert_close(loaded(x), model(x))
        reference = disturb(peft.get_peft_model(Net(layer), peft.IA3Config(**options)))
        reference.save_pretrained(tmp_path / "theirs")
        expected = reference(x)
    found = load_adapter(Net(layer), tmp_path / "theirs")
    torch.testing.assert_close(found(x), expected)
    torch.testing.assert_close(found.merge_and_unload()(x), expected)

"""The contract on layers in their less usual forms; test_contract tries one plain example of each layer type.

It also compiles that example under every method; here `one_graph`, which takes as long as all other checks, is left out.
"""

import itertools

import pytest
import torch
from rotation import thinned
from torch import nn

from minipeft import LoraConfig, get_lora_model
from minipeft.testing import check_pair
from minipeft.testing.checks import CHECKS

# torch warns about padding="same" with an even kernel; it does so without an adapter too.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

HERE = [check for check in CHECKS if check.__name__ != "one_graph"]
CONVOLUTIONS = {
    "1d, even kernel": (nn.Conv1d, {"kernel_size": 4, "padding": "same"}),
    "2d, pointwise": (nn.Conv2d, {"kernel_size": 1}),
    "2d, stride, no bias": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1, "bias": False}),
    "2d, dilation": (nn.Conv2d, {"kernel_size": 3, "dilation": 2, "padding": 2}),
    "2d, circular": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    "2d, reflect": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "2d, groups": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1, "padding_mode": "replicate"}),
    "2d, depthwise": (nn.Conv2d, {"in_channels": 8, "groups": 8, "kernel_size": 3, "dilation": 2}),
    "3d": (nn.Conv3d, {"kernel_size": 3, "padding": 1}),
    "3d, flat kernel": (nn.Conv3d, {"kernel_size": (1, 1, 3)}),
}
ATTENTION = {
    "batch first, no bias": {"batch_first": True, "bias": False},
    "bias and zero attention": {"add_bias_kv": True, "add_zero_attn": True},
}
# The options of a method that lead another way than its defaults, which test_contract tries.
OPTIONS = {
    "lora, bias": ("lora", {"bias": "lora_only"}),
    "dora, bias": ("dora", {"bias": "lora_only"}),
    "ia3, feedforward": ("ia3", {"feedforward_modules": ["layer"]}),
    "lokr, both factors decomposed": ("lokr", {"r": 1, "alpha": 3, "decompose_both": True}),
    "oft, uneven blocks": ("oft", {"oft_block_size": 7}),
    "oft, constrained": ("oft", {"r": 2, "oft_block_size": 0, "coft": True, "eps": 0.3}),
}


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: the rows are scaled on the way out."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class TransposedExperts(nn.Module):
    """Experts stored as (experts, in, out), here read from the out side, whose size an example's input has."""

    is_transposed = True

    def __init__(self, in_features, out_features, experts=3):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(experts, in_features, out_features) / in_features**0.5)

    def forward(self, x):
        return torch.tanh(x @ self.experts.mT).square().sum(0)


class OneMatrix(TransposedExperts):
    """A bare parameter of two dimensions."""

    is_transposed = False

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.experts = nn.Parameter(self.experts[0].detach())

    def forward(self, x):
        return x @ self.experts.T


def one_expert(in_features, out_features):
    return TransposedExperts(in_features, out_features, experts=1)


def padded(in_features, out_features):
    return nn.Embedding(in_features, out_features, padding_idx=0)


def without_bias(in_features, out_features):
    return nn.Linear(in_features, out_features, bias=False)


def channels_last(in_features, out_features):
    return nn.Conv2d(in_features, out_features, 3, padding=1).to(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr("minipeft.testing.report.CHECKS", HERE)


def keeps_the_contract(method, layer, make, **options):
    report = check_pair(method, layer, make, **options)
    assert report.refused is None
    skipped = {"offloading"} if layer is nn.MultiheadAttention else set()  # accelerate cannot offload it
    assert set(report.passed) == {check.__name__ for check in HERE} - skipped, report


DORA_READS = ("2d, stride, no bias", "2d, circular", "2d, groups", "3d, flat kernel")  # DoRA's norms on each kind
# DoRA computes what LoRA does, and the norms; so each kind is tried with one of the two.
ALWAYS = [("dora" if kind in DORA_READS else "lora", kind) for kind in CONVOLUTIONS]


@pytest.mark.parametrize(("method", "kind"), thinned((["lora", "dora"], CONVOLUTIONS), ALWAYS))
def test_a_convolution_keeps_the_contract_whatever_its_kernel_reads(method, kind):
    layer, options = CONVOLUTIONS[kind]

    def make(in_features, out_features):
        return layer(**{"in_channels": in_features, "out_channels": out_features, **options})

    keeps_the_contract(method, layer, make)


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_a_channels_last_weight_keeps_the_contract(method):
    keeps_the_contract(method, nn.Conv2d, channels_last)


@pytest.mark.parametrize("sizes", [{"kernel_size": 1}, {"kernel_size": 3, "groups": 6}], ids=str)
def test_a_channels_last_kernel_that_flattens_to_a_view_is_merged_in_place(sizes):
    """With one position, or one channel a group, the flat kernel is the same memory with other strides."""
    layer = nn.Conv2d(6, 6, **sizes).to(memory_format=torch.channels_last)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
    before = layer.weight.detach().double()
    model = get_lora_model(nn.Sequential(layer), config)
    up, down = (factor.detach().double().flatten(1) for factor in model[0].adapter("default").factors())
    merged = model.merge_and_unload()[0].weight
    torch.testing.assert_close(merged.double(), before + (up @ down).view(before.shape), rtol=1e-6, atol=1e-6)
    assert merged.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_keeps_the_contract(kind):
    def make(in_features, out_features):
        return nn.MultiheadAttention(in_features, 2, **ATTENTION[kind])

    keeps_the_contract("lora", nn.MultiheadAttention, make)


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("method", "make"), [("lora", padded), ("lora", ScaledEmbedding), ("dora", ScaledEmbedding), ("loha", padded)]
)
def test_an_embedding_with_padding_or_a_scale_keeps_the_contract(method, make):
    keeps_the_contract(method, nn.Embedding, make)


BIASED = ["dora", "ia3", "oft"]  # what these do to a bias is their own; the others leave it alone
LINEAR = [*BIASED, "lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("adalora", "loha", "lokr", "vera"))]


@pytest.mark.parametrize("method", LINEAR)
def test_a_linear_layer_without_bias_keeps_the_contract(method):
    keeps_the_contract(method, nn.Linear, without_bias)


@pytest.mark.parametrize("make", [TransposedExperts, one_expert, OneMatrix])
def test_experts_keep_the_contract_in_either_orientation(make):
    keeps_the_contract("lora", nn.Parameter, make)


CONV1D = "transformers.pytorch_utils.Conv1D"
LAYERS = [nn.Linear, CONV1D, nn.Embedding]
ON_LAYERS = zip(OPTIONS, itertools.cycle(LAYERS))  # each option on one of them, in turn


@pytest.mark.parametrize(("case", "layer"), thinned((OPTIONS, LAYERS), ON_LAYERS))
def test_options_that_lead_another_way_keep_the_contract_too(case, layer):
    method, options = OPTIONS[case]
    keeps_the_contract(method, layer, None, **options)

"""Feed-forward modules with a gate: which ones lean recognises, and what the node in the middle computes and keeps."""

import pytest
import torch
from torch import nn

from minipeft.kernels.keeps_inputs import keeping_inputs
from minipeft.memory.gated_mlp import GatedMlp, GatedProduct, JoinedGatedMlp, gated_mixin, gated_product


class Mlp(nn.Module):
    def __init__(self, act=None, limit=None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.gate_up_proj = nn.Linear(4, 12)
        self.act_fn = self.activation_fn = act or nn.SiLU()
        self.limit = limit

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Clamped(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=self.limit) * self.up_proj(x))


class OtherWayRound(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Sum(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Joined(Mlp):
    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class JoinedOtherWayRound(Mlp):
    def forward(self, x):
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


@pytest.mark.parametrize(
    ("mlp", "mixin"),
    [
        (Mlp(), GatedMlp),
        (Mlp(nn.GELU()), GatedMlp),
        (Joined(), JoinedGatedMlp),
        (Mlp(nn.PReLU()), None),  # has a parameter
        (Mlp(nn.Softmax(-1)), None),  # does not work element by element
        (Clamped(limit=100.0), None),  # the limit would not show in a call
        (OtherWayRound(), None),
        (JoinedOtherWayRound(), None),
        (Sum(), None),
        (nn.Linear(2, 2), None),
        (Mlp().to("meta"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_only_what_computes_the_same_is_recognised(mlp, mixin):
    before = torch.get_rng_state()
    assert gated_mixin(mlp) is mixin
    assert torch.equal(torch.get_rng_state(), before)


def test_the_product_is_exact_and_keeps_its_two_factors_alone(monkeypatch):
    monkeypatch.setattr("minipeft.kernels.keeps_inputs.ELEMENTS", {"cpu": 8, "cuda": 8})  # two rows at a time
    gate, up = (torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    act, kept = nn.GELU(approximate="tanh"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = gated_product(act, gate, up)
    assert kept == [gate.data_ptr(), up.data_ptr()]
    expected = GatedProduct(act).forward(gate, up)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    for found, wanted in zip(
        torch.autograd.grad(y, (gate, up), dy), torch.autograd.grad(expected, (gate, up), dy), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradgradcheck(lambda gate, up: gated_product(act, gate, up), (gate, up))
    assert torch.autograd.gradcheck(lambda gate: gated_product(act, gate, up.detach()), (gate,))


def test_a_norm_in_half_precision_keeps_its_input_alone(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    monkeypatch.setattr("minipeft.kernels.keeps_inputs.ELEMENTS", {"cpu": 16, "cuda": 16})
    norm = LlamaRMSNorm(8).requires_grad_(False)
    norm.weight.normal_()
    norm.to(torch.bfloat16)
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = keeping_inputs(norm, x)
    assert kept == [x.data_ptr()]
    expected = norm(x)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])
    double = LlamaRMSNorm(8).requires_grad_(False)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: keeping_inputs(lambda x: torch.tanh(x) * double.weight, x), (x,))

"""RMS norms by torch's kernel in lean models: the same function, in one call, where torch has one."""

import copy

import pytest
import torch
from fake_gpu import fake_gpu, on
from tiny_models import adapted, foreign_code, llama, token_ids
from torch import nn

from minipeft import lean, unlean
from minipeft.memory import rms_norm

with foreign_code():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm


def step(model):
    ids = token_ids()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return [loss.detach(), *gradients]


@pytest.mark.each_value
@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 5e-2)])
def test_loss_and_gradients_are_those_of_the_composed_norms(dtype, tolerance, checkpointing, monkeypatch):
    model = adapted(llama(), target_modules="all-linear").to(dtype).train()
    expected = step(model)
    lean(model, checkpointing)
    monkeypatch.setattr(rms_norm, "DEVICES", ("cpu",))
    for found, wanted in zip(step(model), expected, strict=True):
        assert (found - wanted).norm() <= tolerance * wanted.norm()
    unlean(model)
    assert not any(rms_norm.KERNEL in vars(module) for module in model.modules())


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_on_a_gpu_every_norm_is_the_kernel_s(monkeypatch):
    found, real = [], rms_norm.RmsNorm.forward
    monkeypatch.setattr(rms_norm.RmsNorm, "forward", lambda self, x: found.append(x.shape) or real(self, x))
    model = lean(adapted(llama(), target_modules="all-linear").bfloat16().train(), "none")
    with fake_gpu():
        ids = torch.zeros(2, 8, dtype=torch.long, device="cuda")
        on("cuda", model)
        model(input_ids=ids, labels=ids, use_cache=False)
    assert found == [(2, 8, 32)] * 5


def test_only_a_norm_that_computes_the_same_is_given_to_the_kernel():
    norms = [LlamaRMSNorm(8, 1e-6), Qwen3RMSNorm(8, 1e-5), T5LayerNorm(8)]
    for norm in norms:
        nn.init.uniform_(norm.weight)
        assert rms_norm.is_plain(norm)
        other = copy.deepcopy(norm)
        other.variance_epsilon = 1e-3  # of a subclass that adds another one
        x = torch.full((2, 8), 1e-3)
        assert not torch.allclose(rms_norm.RmsNorm(other).forward(x), norm(x), rtol=1e-3)
    assert not rms_norm.is_plain(GemmaRMSNorm(8))  # which multiplies by 1 + w

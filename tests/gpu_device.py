"""The device of the tests marked `gpu`: cuda, or what MINIPEFT_TEST_DEVICE says; on "cpu" those run that any device can.

float64 on a CPU is what they are compared with, and tolerances are relative to the norm of a tensor.
"""

import copy
import os

import pytest
import torch

import minipeft
from minipeft import LoraConfig

DEVICE = torch.device(os.environ.get("MINIPEFT_TEST_DEVICE", "cuda"))
THERE = DEVICE.type == "cpu" or torch.cuda.is_available()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}
# On a tiny Llama.
METHODS = {
    "lora": LoraConfig(r=4, target_modules="all-linear"),
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "vera": minipeft.VeraConfig(r=4, target_modules="all-linear"),
    "ia3": minipeft.IA3Config(),
    "oft": minipeft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "v_proj"]),
    "loha": minipeft.LoHaConfig(r=2, target_modules="all-linear"),
    "lokr": minipeft.LoKrConfig(r=2, target_modules="all-linear"),
    "adalora": minipeft.AdaLoraConfig(total_step=100, target_modules="all-linear"),
}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# What other packages warn about depends on the machine; it is shown and no error.
on_device = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not THERE, reason=f"there is no {DEVICE}"),
]
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="only CUDA has this")


def exact(model):
    """The same model in float64 on a CPU."""
    return copy.deepcopy(model).to("cpu", torch.float64)


def off(found, wanted):
    """How far a tensor is from another, relative to the norm of that."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def close(found, wanted, tolerance):
    """Tensors, or dictionaries of tensors, are equal up to a tolerance; what is not is printed with its error."""
    if isinstance(wanted, torch.Tensor):
        found, wanted = {"value": found}, {"value": wanted}
    assert found.keys() == wanted.keys()
    errors = {name: off(found[name], wanted[name]) for name in wanted}
    assert errors
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"beyond {tolerance:.1e}: {wrong}"


def learned(model, seed=5, **inputs):
    """The loss of a call and the gradients of what trains, by name; every call draws the same random numbers."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(**inputs).loss
    loss.backward()
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | found


def devices(model):
    """The types of devices on which a model has something."""
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}

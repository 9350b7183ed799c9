"""TensorFloat-32 on a CPU: float32 products whose factors are rounded to 10 bits, if the caller allows that on a GPU."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FACTORS = {  # of the products that torch has: where their factors stand
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::linear": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmm_": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::baddbmm_": (1, 2),
}


@contextlib.contextmanager
def tf32_allowed():
    """Within the context the caller has allowed it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with _Tf32():
            yield
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def autocast():
    """What the caller of a verb may have switched on, too."""
    return torch.autocast("cpu", torch.bfloat16)


class _Tf32(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        places = FACTORS.get(operation._schema.name, ())
        if torch.backends.cuda.matmul.fp32_precision == "tf32":
            args = [_rounded(arg) if place in places else arg for place, arg in enumerate(args)]
        return operation(*args, **(kwargs or {}))


def _rounded(factor):
    if factor.dtype is not torch.float32:
        return factor
    bits = factor.contiguous().view(torch.int32)
    return torch.empty_like(factor).copy_(((bits + 0x1000) & ~0x1FFF).view(torch.float32))

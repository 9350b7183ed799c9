"""A GPU that computes nothing: tensors that have a shape and a device, and no values.

torch checks the devices of every operation on them, and refuses to read a value. So code that mixes devices, or would wait for
a GPU, fails here as it would there. A torch without CUDA makes such tensors and their graph for "cuda" too; it runs backward
passes only for devices that it does not count among accelerators, of which "lazy" is one.
"""

import contextlib
import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from minipeft.kernels import dropout_mask, rotary
from minipeft.memory import sample_slices, token_tiles

ROOMS = tuple(f"minipeft.{room}." for room in ("kernels", "layers", "methods", "injection", "memory", "merging"))
KINDS = {"cpu": 0, "cuda": 1, "lazy": 17}  # torch's numbers of them
AUTOCAST = ("autocast", "is_autocast_enabled", "get_autocast_dtype")
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # whom autograd asks for a device's streams, by kind


@contextlib.contextmanager
def fake_gpu():
    """Within the context there is a GPU of each kind, and all new tensors are without values."""
    state = torch.get_rng_state()
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(ROOMS):
                stack.enter_context(mock.patch.object(module, "type", _type, create=True))
        for owner, name, value in (
            (dropout_mask, "torch", _WithGenerators()),
            (rotary, "by_triton", lambda: None),  # a kernel would start a driver
            *((torch, name, _of_cpu(getattr(torch, name))) for name in AUTOCAST),
            (torch, "lazy", SimpleNamespace(_initialized=False, device_count=lambda: 1)),
            (Tensor, "nonzero", lambda tensor: torch.arange(tensor.numel(), device=tensor.device)[:, None]),
            (torch.amp, "autocast", _of_cpu(torch.amp.autocast)),
            (sample_slices, "drew_nothing", lambda *_: True),
            (token_tiles, "drew_nothing", lambda *_: True),
            (torch.amp, "is_autocast_available", lambda device: True),
            (torch.cuda, "get_rng_state", lambda device=0: state),
            (torch.cuda, "set_rng_state", lambda *_: None),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=name == "lazy"))
        stack.enter_context(_guarded())
        yield stack.enter_context(FakeTensorMode())


@contextlib.contextmanager
def _guarded():
    """Let autograd take each kind for a device of one stream, as the CPU is."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (max(KINDS.values()) + 1)).in_dll(library, GUARDS)
    before = list(guards)
    for kind in KINDS.values():
        guards[kind] = before[kind] or before[KINDS["cpu"]]
    try:
        yield
    finally:
        for kind in KINDS.values():
            guards[kind] = before[kind]


def _of_cpu(function):
    """The function of a kind of device, which answers for "lazy" as for the CPU: that kind has no autocast."""
    return lambda device_type, *args, **options: function(
        "cpu" if device_type == "lazy" else device_type, *args, **options
    )


class _WithGenerators:
    """torch, in which a mask's seed has a value, and a generator is there for each device."""

    Generator = staticmethod(lambda device: torch.Generator("cpu"))
    randint = staticmethod(lambda *args, device: {"cpu": 7}[device])

    def __getattr__(self, name):
        return getattr(torch, name)


def _type(*args):
    """``type``, for which a fake tensor is an ordinary one."""
    if len(args) == 1 and type(args[0]) is FakeTensor:
        return nn.Parameter if isinstance(args[0], nn.Parameter) else Tensor
    return type(*args)


def on(device, model):
    """The model, whose tensors are replaced by some on this device; within `fake_gpu`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return model

"""Mixins that let a module compute the same function in less memory or time; `minipeft.memory.lean` applies them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minipeft.ecosystem.transformers_model import without_cache
from minipeft.injection.checkpointing import switch_of, with_adapters_kept
from minipeft.injection.rows import in_backward
from minipeft.injection.wrapper import Switch
from minipeft.kernels import glibc, recompute
from minipeft.kernels.frozen_linear import lean_linear
from minipeft.kernels.functional import HALF
from minipeft.kernels.keeps_inputs import keeping_inputs
from minipeft.kernels.transformed import is_traced, is_transformed
from minipeft.layers.base import LayerOps
from minipeft.memory import sample_slices, token_tiles
from minipeft.memory.chains import CHAINS, Chains
from minipeft.memory.rms_norm import kernel_of
from minipeft.python.class_swap import SameFunction

# Activations that transformers composes of single operations, each of which keeps an array for the backward pass.
TANH_GELUS = {"NewGELUActivation", "FastGELUActivation"}
# Cheap functions of one tensor that depend on nothing that changes within a step.
CHEAP = {"GELUActivation", "GELUTanh", "SiLUActivation", "QuickGELUActivation", "ReLUSquaredActivation"}
CHEAP_TYPES = (nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid)
FUSED_GELU = nn.GELU(approximate="tanh")


def learns(module: nn.Module) -> bool:
    """Whether a call of the module may be part of training; in any other call it computes what it did, bit for bit."""
    return module.training and torch.is_grad_enabled() and not is_traced()


class FusedGelu(SameFunction):
    """The tanh approximation of GELU (arXiv:1606.08415) as one kernel, which keeps only its input.

    It rounds once, where the composed one rounds after each operation: in bfloat16 the two may differ by one rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not learns(self):
            y: Tensor = super().forward(x)
            return y
        # The backward pass, in which nothing learns, recomputes what this call computed.
        return recompute.mark(FUSED_GELU(x), FUSED_GELU, x, pointwise=True)


class Recomputed(SameFunction):
    """A norm or activation whose output the next adapter recomputes instead of keeping it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not learns(self):
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        kernel = None if is_transformed() else kernel_of(self, x)
        if kernel is not None:
            return recompute.mark(kernel.forward(x), kernel, x)
        if x.dtype in HALF and is_rms_norm(self):
            y = keeping_inputs(super().forward, x)
        else:
            y = super().forward(x)
        return recompute.mark(y, self, x, pointwise=is_cheap_activation(self))


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is one of transformers' RMS norms, which are composed of single operations and work in float32."""
    return type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))


def is_cheap_activation(module: nn.Module) -> bool:
    """Whether a module is an activation that works element by element and takes little time."""
    known = type(module).__name__ in (CHEAP | TANH_GELUS) or isinstance(module, CHEAP_TYPES)
    return known and not any(True for _ in module.parameters())


class FastLinear(SameFunction):
    """A frozen linear layer that uses the faster matrix library in training.

    A quantized layer keeps nothing for the backward pass here; its own call might keep its input or its float weight.
    """

    lean_ops: LayerOps

    def forward(self, x: Tensor) -> Tensor:
        if learns(self):
            y = lean_linear(x, self.lean_ops.linear_weight(self, x), self.lean_ops.read_bias(self))
            if y is not None:
                return y
        return super().forward(x)


class RecomputedMlp(SameFunction):
    """A feed-forward module that keeps only its input and is recomputed in the backward pass.

    Inside a block that is recomputed as a whole this costs no time, since the block's recomputation stops before it.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run: Callable[..., Any] = partial(super().forward, **kwargs)
        if not learns(self) or not wants_gradient(self, args, kwargs):
            return run(*args)
        switch = switch_of(self)
        source = recompute.source_of(args[0]) if len(args) == 1 and isinstance(args[0], Tensor) else None
        if source is not None:  # keep the input of the preceding norm, which the norm keeps anyway
            return token_tiles.run(self, with_adapters_kept(_after(run, source.module), switch), source.inputs)
        run = with_adapters_kept(run, switch)
        if len(args) == 1 and isinstance(args[0], Tensor):
            return token_tiles.run(self, run, args)
        _forget_sources(*args, *kwargs.values())
        return checkpoint(run, *args, use_reentrant=False)


def _after(run: Callable[[Tensor], Any], norm: recompute.Function) -> Callable[[Tensor], Any]:
    """``run(norm(x))``. It must not hold the input itself, which an outer recomputation may have freed."""
    return lambda *inputs: run(recompute.output(norm, *inputs))


class RecomputedBlock(SameFunction):
    """A block that transformers recomputes in the backward pass, unless there is none.

    Where it is recomputed, transformers leaves its keys and values out of the cache, so without gradients, as when a
    model in training mode generates text, it must not be.
    """

    recomputes: bool = False
    trims: bool = False  # give freed memory back before each run, not only before the block is computed again

    @property
    def gradient_checkpointing(self) -> bool:
        """What transformers asks before each call. `torch.func` has no hooks for tensors that are kept."""
        return self.recomputes and torch.is_grad_enabled() and not is_traced()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.recomputes = value


def recompute_block(function: Any, *args: Any) -> Any:
    """The checkpointing function for transformers' blocks: non-reentrant, and inactive below the lowest adapter."""
    module = function.args[0] if isinstance(function, partial) and function.args else None
    if not isinstance(module, nn.Module):
        return _checkpoint(None, False, function, *args)
    if not wants_gradient(module, args, function.keywords):
        return function(*args)
    if len(args) > 1:
        args = without_cache(module, sample_slices.positional_names(function.func)[len(function.args) :], args)
    checkpointed = partial(_checkpoint, switch_of(module), getattr(module, "trims", False))
    chains: Chains | None = module.__dict__.get(CHAINS)
    if chains is not None and args and isinstance(args[0], Tensor) and not is_transformed():
        return chains.run(module, function, args, checkpointed)
    return sample_slices.run(module, function, args, checkpointed)


def _checkpoint(switch: Switch | None, trims: bool, function: Any, *args: Any) -> Any:
    _forget_sources(*args, *(function.keywords.values() if isinstance(function, partial) else ()))
    return checkpoint(with_adapters_kept(partial(_trimmed, trims, function), switch), *args, use_reentrant=False)


def _forget_sources(*values: Any) -> None:
    """Take the marks off what is given to a function that is recomputed.

    The hooks of a recomputation around it bring its arguments back without marks, and both runs must keep the same.
    """
    for value in values:
        if isinstance(value, Tensor):
            recompute.forget(value)


def _trimmed(always: bool, function: Any, *args: Any) -> Any:
    """Run a block; where it is computed again, the step takes most memory, so freed memory goes back to the system first."""
    if args and isinstance(args[0], Tensor) and not torch.compiler.is_compiling() and (always or in_backward()):
        glibc.trim(args[0].device.type)
    return function(*args)


def wants_gradient(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a gradient must flow through this call."""
    inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return any(value.requires_grad for value in inputs) or any(p.requires_grad for p in module.parameters())

"""The layer contract: what every method may ask of a layer type, with the weight always as (out, in)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.errors import StateError
from minipeft.kernels.frozen_linear import Weight, lean_linear
from minipeft.python.class_swap import plain_class
from minipeft.registry import registry

FLOAT_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class LayerOps(ABC):
    """How to read, write and call one layer type. Methods see a layer only through this class.

    Register a subclass with ``register_layer``. It must have `shape`, `read_weight` and `write_weight`; everything else
    has a default that fits a layer which computes ``y = W x + b`` on the last dimension of x.

    The canonical weight W is (out, in), whatever the layer stores. A layer that takes indices computes ``y = W[:, x]``.
    Ops keep nothing about any one layer, and two of the same class with the same attributes are equal.
    """

    @abstractmethod
    def shape(self, base: Any) -> tuple[int, int]:
        """(out_features, in_features) of the canonical weight."""

    @abstractmethod
    def read_weight(self, base: Any) -> Tensor:
        """The canonical weight, shape (out, in), as a view of the layer's own if possible.

        A quantized layer returns a new dequantized tensor at every call.
        """

    @abstractmethod
    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Store a canonical weight (out, in) and bias (out,) in place, and return the layer that now holds them.

        A layer that cannot hold them, such as a quantized one, stays as it is and returns a replacement in the dtype of
        the given weight.
        """

    # Everything below is optional.

    contract: ClassVar[str] = "LayerOps"
    is_embedding: ClassVar[bool] = False  # the input holds indices
    is_quantized: ClassVar[bool] = False  # reads a dequantized copy, and is replaced by a float layer when merged
    can_merge: ClassVar[bool] = True
    in_all_linear: ClassVar[bool] = False  # target_modules="all-linear" includes it
    fan_in_fan_out: ClassVar[bool] = False  # it stores (in, out); only PEFT's file format asks
    update_count: int = 1  # how often PEFT adds LoRA's update to such a weight, which is what files mean

    def accepts(self, base: Any) -> bool:
        """Whether these ops fit this instance; a subclass that computes its weight, for example, should be refused."""
        return True

    def prepare(self, base: Any) -> None:
        """Make a layer fit for training without changing what it computes; by default nothing.

        Called for every layer of this type in a model, adapted or not, when adapters are added.
        """
        return None

    def read_bias(self, base: Any) -> Tensor | None:
        """The bias, shape (out,), or None."""
        return getattr(base, "bias", None)

    def example_input(self, base: Any) -> Tensor:
        """A small random input that the layer takes, for comparing outputs before and after a merge."""
        weight = self.read_weight(base)
        return torch.randn(4, weight.shape[1], dtype=weight.dtype, device=weight.device)

    def linear_weight(self, base: Any, x: Tensor) -> Weight | None:
        """The weight, if calling this layer on x now computes ``F.linear(x, weight, read_bias(base))`` and nothing else.

        Returns:
            None if the call may do anything else; hooks and patched forwards do. Otherwise the weight, shape (out, in),
            or a function dtype -> weight, which a quantized layer returns in training. That is called once in the forward
            and once in the backward pass, so that the float weight is never kept; the output has the dtype of x, also
            under autocast. A method may then compute the layer's output together with its own.
        """
        return None

    def call(self, base: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's own output, (..., out). In training it may be computed faster from `linear_weight`."""
        if base.training and not args and not kwargs and torch.is_grad_enabled():
            y = lean_linear(x, self.linear_weight(base, x), self.read_bias(base))
            if y is not None:
                return y
        y = base(x, *args, **kwargs)
        if not isinstance(y, Tensor):
            raise StateError(
                f"a {type(base).__name__} returns a {type(y).__name__}, to which no update can be added. Name its weight in "
                "target_parameters instead: then the layer runs with the updated weight."
            )
        return y

    def project_in(self, base: Any, x: Tensor, A: Tensor) -> Tensor:
        """``A x``, shape (..., r), for the layer's own input x and A of shape (r, in) or as in `factor_shapes`."""
        return F.linear(x, A)

    def project_out(self, base: Any, h: Tensor, B: Tensor) -> Tensor:
        """``B h``, `scaled`, shape (..., out), for h from `project_in` and B of shape (out, r) or as in `factor_shapes`."""
        return self.scaled(base, F.linear(h, B))

    def scaled(self, base: Any, y: Tensor) -> Tensor:
        """``s y``, shape (..., out), if the layer computes ``s W x + b``; by default y."""
        return y

    def per_feature(self, base: Any, v: Tensor) -> Tensor:
        """A vector (features,), shaped to multiply the layer's inputs or outputs, or to be added to them."""
        return v

    def in_features(self, base: Any) -> int:
        """How many features of an input one vector can scale; their columns of W lie next to each other.

        Raises:
            TargetError: scaling the input of this layer cannot be merged into its weight.
        """
        return self.shape(base)[1]

    def factor_shapes(self, base: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes in which A and B are stored and saved, (r, in) and (out, r) once all but dimension 0 is flattened.

        If W is a stack of experts that each have their own factors, they are (r * experts, in) and
        (out / experts, r * experts), in the order that `minipeft.kernels.functional.stacked_delta` expects.
        """
        out_features, in_features = self.shape(base)
        return (r, in_features), (out_features, r)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))


def store(parameter: Tensor, value: Tensor) -> None:
    """Write a value into a parameter, unless it is a view of the parameter itself, which a merge has changed in place."""
    if value.data_ptr() != parameter.data_ptr():
        parameter.detach().copy_(value)


def takes_vectors(ops: LayerOps) -> bool:
    """Whether the layer multiplies the last dimension of its input by W, as ``F.linear`` does."""
    cls = type(ops)
    return cls.project_in is LayerOps.project_in and cls.project_out is LayerOps.project_out


def is_plain_linear(ops: LayerOps, base: nn.Module) -> bool:
    """Whether the layer's calls, with any input, compute ``F.linear`` with its float weight and nothing else."""
    return isinstance(ops.linear_weight(base, ops.read_weight(base)), Tensor)  # the weight's rows are inputs too


def layer_ops(base: nn.Module) -> LayerOps | None:
    """The registered ops that accept this layer, the most derived type first, or None."""
    return next((ops for _, ops in registry.layer_candidates(type(base)) if ops.accepts(base)), None)


def has_own_forward(ops: LayerOps, base: nn.Module) -> bool:
    """Whether the layer's class has another ``forward`` than the type that these ops are registered for."""
    own: Any = type(base)
    for kind, known in registry.layer_candidates(own):
        if known is ops or known == ops:  # nearly always the same object, and comparing two takes longer
            return own.forward is not kind.forward  # type: ignore[attr-defined]
    return False


def runs_only(base: nn.Module, forward: object) -> bool:
    """Whether calling the module runs this ``forward`` of its class and no hook."""
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    if hooks or "forward" in base.__dict__:
        return False
    own: Any = type(base)
    plain: Any = own if own.forward is forward else plain_class(own)  # a compiler would stop at `plain_class`
    return plain.forward is forward


def has_plain_weight(base: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether ``base.weight`` is an ordinary float parameter of this shape: not quantized, sharded, sparse, lazy or computed."""
    weight = base._parameters.get("weight")
    return is_plain(weight) and tuple(weight.shape) == shape


def is_plain(parameter: object) -> TypeGuard[nn.Parameter]:
    """Whether this is an ordinary dense float parameter."""
    return type(parameter) is nn.Parameter and parameter.layout is torch.strided and parameter.dtype in FLOAT_DTYPES

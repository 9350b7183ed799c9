"""The layer contract: what every method may ask of a layer type, in one canonical orientation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft import registry
from minipeft.class_swap import plain_class
from minipeft.kernels.frozen_linear import Weight, can_fuse, frozen_linear

FLOAT_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class LayerOps(ABC):
    """How to read, write and follow one layer type; a method sees a layer only through it.

    An instance holds no state of any layer, and two of the same type and values are equal, so copies of a model agree.

    The canonical weight is ``(out, in)``, whatever the layer stores: ``y = W x + b`` for the last dimension of x, or
    ``y = W[:, x]`` for a layer that looks indices up. Register a subclass with ``register_layer``; what it must say is
    `shape`, `read_weight` and `write_weight`, and the rest is by default that of a linear map.
    """

    contract: ClassVar[str] = "LayerOps"
    is_embedding: ClassVar[bool] = False  # the input is indices, as if one-hot
    in_all_linear: ClassVar[bool] = False  # target_modules="all-linear" takes it
    fan_in_fan_out: ClassVar[bool] = False  # stores (in, out); only PEFT's file format asks
    can_merge: ClassVar[bool] = True
    is_quantized: ClassVar[bool] = False  # `read_weight` makes a float copy, `write_weight` a float layer (see there)
    kinds: ClassVar[tuple[str, ...]] = ()  # what `minipeft.quantize` calls the layers that `pack` makes
    # The name of a parameter that the module reads, where there is no call to follow (see `minipeft.layers.uncalled`).
    reads: str = ""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    @abstractmethod
    def shape(self, base: Any) -> tuple[int, int]:
        """(out_features, in_features) of the canonical weight."""

    @abstractmethod
    def read_weight(self, base: Any) -> Tensor:
        """The canonical weight, shape (out, in); a view of the layer's own where that is possible.

        A quantized layer dequantizes: a fresh tensor, and the time and memory it takes, at every call.
        """

    @abstractmethod
    def write_weight(self, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Store a canonical weight (out, in) and bias (out,) in place, and return the layer that now holds them.

        A layer that cannot hold them, such as a quantized one, returns a replacement in the dtype of the given weight,
        and stays as it is itself. Merging does that only where it is asked to dequantize.
        """

    def accepts(self, base: Any) -> bool:
        """Whether these ops hold for this instance; a subclass with a packed weight, say, is refused here."""
        return True

    def quantize(self, kind: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A quantized, frozen layer of one of the `kinds`, from a float weight (out, in) and bias (out,), left as they are.

        Raises:
            ImportError: the package that does it is missing.
            ValueError: it cannot do it for such a weight.
        """
        raise ValueError(f"there is no quantized layer of the kind {kind!r}")

    def prepare(self, base: Any) -> None:
        """Called for every such layer of a model, adapted or not, when adapters are put in: make it fit for training.

        Only for what leaves the layer's function as it is; by default nothing.
        """
        return None

    def run(self, base: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's own output; overridden where the layer's own call would keep a float weight for backward."""
        return base(x, *args, **kwargs)

    def output(self, base: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """`run` beside an adapter: in training by the faster matrix library, where this is a linear call."""
        if base.training and not args and not kwargs and torch.is_grad_enabled() and not self.is_embedding:
            weight = None if torch.is_autocast_enabled(x.device.type) else self.weight_of_call(base, x)
            bias = self.read_bias(base)
            if weight is not None and can_fuse(x, weight, bias):
                return frozen_linear(x, weight, bias)
        return self.run(base, x, *args, **kwargs)

    def read_bias(self, base: Any) -> Tensor | None:
        """The bias, shape (out,), or None."""
        return getattr(base, "bias", None)

    def down_shape(self, base: Any, r: int) -> tuple[int, ...]:
        """The shape in which a down projection is kept and saved; ``A.flatten(1)`` of it is (r, in)."""
        return r, self.shape(base)[1]

    def up_shape(self, base: Any, r: int) -> tuple[int, ...]:
        """The shape in which an up projection is kept and saved; ``B.flatten(1)`` of it is (out, r)."""
        return self.shape(base)[0], r

    def magnitude_shape(self, base: Any) -> tuple[int, ...]:
        """The shape in which one factor an output feature, such as DoRA's magnitude, is kept and saved."""
        return (self.shape(base)[0],)

    def num_experts(self, base: Any) -> int:
        """How many maps of one shape lie below each other in the canonical weight, each with factors of its own.

        For more than one, `down_shape` is (r * maps, in) and `up_shape` (out / maps, r * maps), in the order that
        `minipeft.kernels.functional.stacked_delta` knows.
        """
        return 1

    def project_in(self, base: Any, x: Tensor, A: Tensor) -> Tensor:
        """``A x`` for A of shape (r, in), or `down_shape`, and the layer's own input x: shape (..., r)."""
        return F.linear(x, A)

    def project_out(self, base: Any, h: Tensor, B: Tensor) -> Tensor:
        """``B h`` for B of shape (out, r), or `up_shape`, and h as `project_in` gives it, scaled as the layer scales its
        own output: (..., out).
        """
        return F.linear(h, B)

    def scaled(self, base: Any, y: Tensor) -> Tensor:
        """What the layer makes of ``y = W x``, (..., out), before it adds its bias: by default y itself."""
        return y

    def scale_out(self, base: Any, y: Tensor, v: Tensor) -> Tensor:
        """``y * v`` along the output features, for v of shape (out,), or `magnitude_shape`."""
        return y * v

    def takes_vectors(self) -> bool:
        """Whether the layer maps the last dimension of its input as ``F.linear`` does, and so `project_in` and the rest."""
        cls = type(self)
        return cls.project_in is LayerOps.project_in and cls.project_out is LayerOps.project_out

    def along_out(self, base: Any, v: Tensor, ndim: int) -> Tensor:
        """The vector v, shape (out,), so shaped that it can be added to an output with `ndim` dimensions."""
        return self.scale_out(base, v.new_ones((1,) * ndim), v)

    def in_channels(self, base: Any) -> int:
        """How many input features there are to scale one by one; where W has several columns for each, they lie together."""
        return self.shape(base)[1]

    def scale_in(self, base: Any, x: Tensor, v: Tensor) -> Tensor:
        """``x * v`` along the input features, for v of shape (in_channels,); never asked of a lookup."""
        return x * v

    def is_linear_call(self, base: Any) -> bool:
        """Whether calling this instance now does ``F.linear(x, read_weight(base), read_bias(base))`` and nothing beside.

        A method may then compute the layer's output itself, together with its own. Hooks and patched forwards rule it out.
        """
        return False

    def weight_of_call(self, base: Any, x: Tensor) -> Weight | None:
        """The weight, if calling this instance on x now does ``F.linear(x, weight, read_bias(base))`` and nothing beside.

        None says that it may do something else. A layer that has to make the weight, as quantized ones have, gives what
        makes it, in the dtype it is called with (see `minipeft.kernels.frozen_linear`); that is called in the forward and again in the
        backward pass, so that the weight is never kept. It holds where a gradient is wanted, and the output is in the
        dtype of x then, also under autocast.
        """
        return self.read_weight(base) if self.is_linear_call(base) else None

    def read_children(self, base: Any) -> Mapping[str, LayerOps]:
        """Children whose weights the layer reads and which are adapted along with it: attribute -> ops; by default none."""
        return {}

    def of_parameter(self, name: str) -> LayerOps:
        """These ops for one parameter of a module; what is registered for a class of parameters says how."""
        raise NotImplementedError(f"{type(self).__name__} is for layers, not for bare parameters.")

    def example_input(self, base: Any) -> Tensor:
        """A small input the layer takes, drawn from torch's generator: what a merge is checked on."""
        weight = self.read_weight(base)
        return torch.randn(4, weight.shape[1], dtype=weight.dtype, device=weight.device)

    # ------------------------------------------------------------------------- what `minipeft.testing` tries methods on
    def example(self, in_features: int, out_features: int) -> nn.Module | None:
        """A small layer of this type with about these sizes, or None: then `check_layer` has to be given one."""
        return None

    def example_call(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The output of an example, adapted or not, for an `example_input`; where a call takes or gives more than one."""
        return layer(x)

    def example_selection(self, name: str) -> dict[str, list[str]]:
        """The options of a configuration that select an example which stands under this name in its model."""
        return {"target_modules": [name]}


def layer_ops(base: nn.Module) -> LayerOps | None:
    """The registered ops that accept this layer, the most derived type first, or None."""
    return next((ops for _, ops in registry.layer_candidates(type(base)) if ops.accepts(base)), None)


def runs_only(base: nn.Module, forward: object) -> bool:
    """Whether a call of the module runs this ``forward`` of its class and no hook."""
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    return not hooks and vars(plain_class(type(base))).get("forward") is forward and "forward" not in base.__dict__


def has_plain_weight(base: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether ``base.weight`` is an ordinary parameter of this shape: not packed, sharded, lazy or computed from others."""
    weight = base._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.dtype in FLOAT_DTYPES and tuple(weight.shape) == shape

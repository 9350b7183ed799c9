"""One method on one layer, made to be tried: a tiny model that holds the layer, its inputs, and what is measured on it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.errors import ContractError, TargetError, shown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import adapted_layers
from minipeft.kernels.generators import generators_kept
from minipeft.layers.base import LayerOps, layer_ops
from minipeft.model import AdaptedModel, get_adapter_model
from minipeft.registry import registry
from minipeft.testing.examples import Call, Example, Make, example_like, example_of, options_of

SIZES, SQUARE = (16, 8), (16, 16)
MOVED = 0.3  # standard deviation of an imitated training: large, so that a wrong update cannot pass for rounding
ROUNDINGS = {torch.float64: 32, torch.float32: 32, torch.bfloat16: 8}  # tolerance in units of the dtype's own rounding


class Holder(nn.Module):
    """The model to try: one layer, and how it is called."""

    def __init__(self, layer: nn.Module, call: Call) -> None:
        super().__init__()
        self.call = call
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


@dataclass(frozen=True)
class Case:
    """A method, a layer type and how to make both.

    Args:
        method: name of the method.
        adapter: its registered class.
        layer: name of the layer type, for messages.
        ops: what is registered for it.
        example: a small layer, and how to call and select it.
        options: the method's options, besides what to adapt.
        reasons: what `no` has found out so far, by dtype.
    """

    method: str
    adapter: type[Any]
    layer: str
    ops: LayerOps
    example: Example
    options: Mapping[str, Any] = field(default_factory=dict)
    reasons: dict[torch.dtype, str | None] = field(default_factory=dict, compare=False, repr=False)

    def base(self, dtype: torch.dtype = torch.float32, sizes: tuple[int, int] = SIZES, kind: Any = Holder) -> Any:
        """A model that holds a layer, in eval mode: the same at every call, and no value of a plain weight is zero."""
        with _seeded(0), torch.no_grad():
            layer = self.example.make(*sizes)
            for parameter in layer.parameters():
                if type(parameter) is nn.Parameter and parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            model = kind(layer, self.example.call).to(dtype).eval()
            self.ops.prepare(layer)  # as an injection does
            return model

    def config(self, **more: list[str]) -> AdapterConfig:
        """The method's configuration for the layer of a holder; `more` is added to its lists."""
        selection = self.example.selection("layer")
        selection = {name: values + more.get("also", []) for name, values in selection.items()}
        return self.adapter.config_class(**selection, **self.options)

    def adapted(
        self,
        dtype: torch.dtype = torch.float32,
        sizes: tuple[int, int] = SIZES,
        *,
        moved: bool = True,
        base: nn.Module | None = None,
    ) -> AdaptedModel:
        """The adapted model, in eval mode; if `moved`, with its adapter changed as training would. `base` is to be adapted."""
        with _seeded(1):
            model = get_adapter_model(self.base(dtype, sizes) if base is None else base, self.config())
        return move(model) if moved else model

    def input(self, model: nn.Module) -> Tensor:
        """An input for the layer of a plain model."""
        with _seeded(2):
            return self.ops.example_input(model.layer)

    def no(self, dtype: torch.dtype) -> str | None:
        """Why the layer cannot be tried in this dtype, or None."""
        if dtype not in self.reasons:
            self.reasons[dtype] = self._no(dtype)
        return self.reasons[dtype]

    def _no(self, dtype: torch.dtype) -> str | None:
        try:
            model = self.base(dtype)
            with torch.no_grad():
                computed = model(self.input(model)).dtype
                read = {layer.ops.read_weight(layer.base_layer).dtype for layer in layers_of(self.adapted(dtype))}
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            return f"{self.layer} itself does not run in {dtype} ({type(error).__name__})"
        other = (read | {computed}) - {dtype}
        return f"{self.layer} itself holds or computes in {shown(other)}, not {dtype}" if other else None

    def fail(self, check: str, reason: str) -> ContractError:
        return ContractError(self.method, self.layer, check, reason)

    def same(self, check: str, what: str, got: Tensor, wanted: Tensor, noise: float = 0.0) -> None:
        """Check that outputs are equal up to the rounding of their dtype, and `noise`, a fraction of the largest value.

        Raises:
            ContractError: they differ by more.
        """
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            seen = f"{list(got.shape)} of {got.dtype}, not {list(wanted.shape)} of {wanted.dtype}"
            raise self.fail(check, f"{what} is {seen}")
        off = relative_error(got, wanted)
        allowed = ROUNDINGS[wanted.dtype] * torch.finfo(wanted.dtype).eps + noise
        if not off <= allowed:
            raise self.fail(check, f"{what} is off by {off:.2g} of its largest value, where {allowed:.2g} is rounding")


def case_of(method: str, layer: str, ops: LayerOps | None, make: Make | None, options: Mapping[str, Any]) -> Case:
    """Put a case together; without `ops` they are those that accept the layer that `make` makes.

    Raises:
        RegistryError: there is no such method.
        TargetError: no layer can be made, or other ops accept it.
    """
    make = example_of(layer).make if make is None else make
    try:
        with generators_kept():
            instance = make(*SIZES)
    except ImportError as error:
        raise TargetError(f"{layer}: {error.name or error} is not installed.") from None
    found = layer_ops(instance)
    if ops is None and found is None:
        raise TargetError(f"no LayerOps accept a {type(instance).__name__}; see register_layer.")
    if ops is not None and found is not None and not isinstance(found, type(ops)):
        raise TargetError(
            f"{layer}: the example is a {type(instance).__name__}, which is adapted by {type(found).__name__}, not by "
            f"{type(ops).__name__}; pass make=... or register another example."
        )
    resolved: Any = ops or found
    options = {**options_of(method), **options}
    return Case(method, registry.method_class(method), layer, resolved, example_like(resolved, make), options)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators in use, and put them back: `torch.manual_seed` records a stack trace for each other device."""
    with generators_kept():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        yield


def layers_of(model: nn.Module) -> list[AdaptedLayer]:
    """The adapted layers of a model."""
    return [layer for _, layer in adapted_layers(model)]


@torch.no_grad()
def move(model: AdaptedModel, seed: int = 3) -> AdaptedModel:
    """Move every trainable parameter at random, as training would; torch's generator stays where it is."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter), alpha=MOVED)
    return model


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a fraction of the largest value wanted; NaN if one is not finite."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def read_and_written(layer: AdaptedLayer) -> nn.Module:
    """A copy of the base layer, or its replacement, after its own weight was read and written back."""
    base = copy.deepcopy(layer.base_layer)
    bias = layer.ops.read_bias(base)
    return layer.ops.write_weight(
        base, layer.ops.read_weight(base).detach().clone(), None if bias is None else bias.detach().clone()
    )


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything a failed call must leave alone: modules, classes, modes, parameters and their bits, and what trains."""
    seen: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        seen.append((name, id(module), type(module), module.training, hooks, sorted(module.__dict__)))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen.append((name, id(parameter), parameter.requires_grad, bits(parameter)))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        seen.append((name, id(buffer), bits(buffer)))
    return seen


def bits(tensor: Tensor) -> Any:
    """A tensor's type, shape and bit pattern; for a tensor subclass, those of the tensors it wraps."""
    tensor = tensor.detach()
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        return type(tensor), [bits(getattr(tensor, name)) for name in flatten()[0]]
    flat = tensor.cpu().contiguous().flatten()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""

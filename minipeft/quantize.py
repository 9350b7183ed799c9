"""Quantising the frozen linear layers of a model in memory, GPT-2's Conv1D included, before adapters are put on it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapted import TensorIndex, Wrapper
from minipeft.errors import ConfigError, StateError, TargetError, hint, shown
from minipeft.layers.base import LayerOps
from minipeft.patterns import is_suffix
from minipeft.targets import HEAD_NAMES, Candidate, candidates, layer_ops

Packer = Callable[[Tensor, Tensor | None], nn.Module]


@torch.no_grad()
def quantize(model: nn.Module, kind: str = "nf4", *, skip_modules: Sequence[str] = ()) -> nn.Module:
    """Replace the linear layers of a float model by quantised, frozen ones, in place; returns the model.

    Left in float are the output head and task heads, embeddings, layers that share their weight with another module,
    and whatever has a forward of its own. The float weights go when the last reference to them does.

    Args:
        model: any float model without adapters, on any device; its weights in float32, bfloat16 or float16.
        kind: "nf4" (QLoRA's 4-bit normal float, arXiv:2305.14314, blocks of 64 with 8-bit scales: 4.13 bits a weight) or
            "fp4"; "int8" (LLM.int8(), arXiv:2208.07339); these need bitsandbytes. "int8_weight_only" needs torchao.
        skip_modules: names, or dotted ends of names, of further modules to leave in float with all that is in them.

    Raises:
        ConfigError: no such kind, or its package is missing.
        StateError: the model has adapters.
        TargetError: an entry of `skip_modules` matches nothing, or nothing is left to quantise. In any case nothing was
            changed.
    """
    if kind not in KINDS:
        raise ConfigError(f"quantize: no kind {kind!r}{hint(str(kind), KINDS)}; there are: {shown(KINDS)}.")
    if any(isinstance(module, Wrapper) for module in model.modules()):
        raise StateError("quantize: this model has adapters; quantise it first, then adapt it. Nothing was changed.")
    chosen = _chosen(model, skip_modules)
    pack = _imported(kind)
    replacements = [(candidate, _replacement(candidate.base, ops, pack)) for candidate, ops in chosen]
    for candidate, layer in replacements:
        for parent, attribute in candidate.places:
            setattr(parent, attribute, layer)
    return model


def _chosen(model: nn.Module, skip_modules: Sequence[str]) -> list[tuple[Candidate, type[LayerOps]]]:
    found, index = candidates(model), TensorIndex(model)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    skipped: set[int] = set()
    for entry in [skip_modules] if isinstance(skip_modules, str) else skip_modules:
        hits = [c.module for c in found.values() if any(is_suffix(entry, name) for name in c.names)]
        if not hits:
            raise TargetError(
                f"skip_modules: {entry!r} matches no module of {type(model).__name__}"
                f"{hint(entry, {name.rpartition('.')[2] for name in found})}; nothing was changed."
            )
        skipped |= {id(module) for hit in hits for module in hit.modules()}
    chosen = []
    for name, candidate in found.items():
        layer, ops = candidate.base, layer_ops(candidate.base)
        if ops is None or not ops.in_all_linear or ops.is_quantized or not ops.is_linear_call(layer):
            continue
        is_head = layer is head or name.rpartition(".")[2] in HEAD_NAMES
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if is_head or id(layer) in skipped or index.also_used_by(layer, weight):
            continue
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.is_meta:
            raise TargetError(
                f"{name}: a weight of {weight.dtype} on {weight.device.type} cannot be quantised; nothing was changed. "
                "Convert the model to float32, bfloat16 or float16."
            )
        chosen.append((candidate, ops))
    if not chosen:
        raise TargetError(f"quantize: {type(model).__name__} has no linear layer to quantise; nothing was changed.")
    return chosen


def _replacement(layer: nn.Module, ops: type[LayerOps], pack: Packer) -> nn.Module:
    bias = ops.read_bias(layer)
    packed = pack(ops.read_weight(layer).detach().contiguous(), None if bias is None else bias.detach())
    # What stood here, in transformers' words: whoever makes it float again knows what to make of it.
    packed.source_cls = type(layer)  # type: ignore[assignment]
    set_up = layer_ops(packed)
    assert set_up is not None
    assert set_up.is_quantized
    set_up.prepare(packed)
    return packed.requires_grad_(False).train(layer.training)


# ------------------------------------------------------------------------------------------------------------- kinds
def _imported(kind: str) -> Packer:
    try:
        return KINDS[kind]()
    except ImportError as error:
        raise ConfigError(
            f"quantize: {kind!r} needs {error.name or 'a package'}, which is not installed; "
            "pip install 'minipeft[quant]'. Nothing was changed."
        ) from None


def _four_bits(quant_type: str) -> Packer:
    bnb: Any = importlib.import_module("bitsandbytes.nn")

    def pack(weight: Tensor, bias: Tensor | None) -> nn.Module:
        out_features, in_features = weight.shape
        layer: nn.Module = bnb.Linear4bit(
            in_features, out_features, bias is not None, weight.dtype, quant_type=quant_type, device="meta"
        )
        layer.weight = bnb.Params4bit(weight, requires_grad=False, quant_type=quant_type, module=layer).to(
            weight.device
        )
        return _with_bias(layer, bias)

    return pack


def _nf4() -> Packer:
    return _four_bits("nf4")


def _fp4() -> Packer:
    return _four_bits("fp4")


def _int8() -> Packer:
    bnb: Any = importlib.import_module("bitsandbytes.nn")

    def pack(weight: Tensor, bias: Tensor | None) -> nn.Module:
        out_features, in_features = weight.shape
        layer: nn.Module = bnb.Linear8bitLt(
            in_features, out_features, bias is not None, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        layer.weight = bnb.Int8Params(weight.cpu(), requires_grad=False).to(
            weight.device
        )  # it packs on the way from the CPU
        return _with_bias(layer, bias)

    return pack


def _int8_weight_only() -> Packer:
    torchao: Any = importlib.import_module("torchao.quantization")

    def pack(weight: Tensor, bias: Tensor | None) -> nn.Module:
        out_features, in_features = weight.shape
        layer = nn.Linear(in_features, out_features, bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, False)
        torchao.quantize_(_with_bias(layer, bias), torchao.Int8WeightOnlyConfig())
        return layer

    return pack


def _with_bias(layer: nn.Module, bias: Tensor | None) -> nn.Module:
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), False)
    return layer


KINDS: dict[str, Callable[[], Packer]] = {
    "nf4": _nf4,
    "fp4": _fp4,
    "int8": _int8,
    "int8_weight_only": _int8_weight_only,
}

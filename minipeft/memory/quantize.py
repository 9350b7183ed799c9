"""Quantizing the linear layers of a model in memory, GPT-2's Conv1D included, before adapters are added."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.options import checked_module
from minipeft.config.patterns import is_suffix
from minipeft.ecosystem.transformers_model import mark_as_loaded, output_head
from minipeft.errors import ConfigError, StateError, TargetError, all_or_nothing, hint, shown, told
from minipeft.injection.all_linear import HEAD_NAMES
from minipeft.injection.fresh_parts import find_origins
from minipeft.injection.module_tree import Candidate, TensorIndex, candidates
from minipeft.injection.wrapper import Wrapper
from minipeft.layers.base import LayerOps, is_plain_linear, layer_ops
from minipeft.layers.quantized import QuantizedLinearOps, quantizers


@all_or_nothing
@torch.no_grad()
def quantize(model: nn.Module, kind: str = "nf4", *, skip_modules: Sequence[str] = ()) -> nn.Module:
    """Replace the linear layers of a float model by quantized, frozen ones, in place; returns the model.

    The output head and task heads, layers that the checkpoint lacks, embeddings, layers tied to another module, and
    layers with a forward of their own stay in float. The float weights are freed with the last reference to them.

    Args:
        model: any model without adapters, with weights in float32, bfloat16 or float16, on any device.
        kind: "nf4", QLoRA's 4-bit normal float (arXiv:2305.14314), in blocks of 64 with 8-bit scales, 4.13 bits per
            weight (blocks of 32 if the input features are not a multiple of 64); "fp4"; "int8", LLM.int8()
            (arXiv:2208.07339). These need bitsandbytes. "int8_weight_only" needs torchao. Registered ops may add kinds.
        skip_modules: names, or dotted ends of names, of more modules to leave in float with everything in them.

    Raises:
        ConfigError: `model` is not a module, there is no such kind, or its package is missing.
        StateError: the model has adapters.
        TargetError: an entry of `skip_modules` matches nothing, or nothing is left to quantize.
    """
    checked_module(model)
    known = quantizers()
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(f"quantize: no kind {told(kind)}{hint(str(kind), known)}; there are: {shown(known)}.")
    if any(isinstance(module, Wrapper) for module in model.modules()):
        raise StateError("quantize: this model has adapters; quantize it first, then adapt it.")
    chosen = _chosen(model, skip_modules)
    replacements = [(candidate, _replacement(candidate, ops, known[kind], kind)) for candidate, ops in chosen]
    for candidate, layer in replacements:
        for parent, attribute in candidate.places:
            setattr(parent, attribute, layer)
    _note(model, known[kind], kind)
    return model


def _note(model: nn.Module, quantizer: QuantizedLinearOps, kind: str) -> None:
    """Note how a transformers model is quantized, as `from_pretrained` does, so that a saved one loads again."""
    if not hasattr(model, "_from_config") or not hasattr(model, "config"):
        return
    layers = {name: (candidate.base, layer_ops(candidate.base)) for name, candidate in candidates(model).items()}
    in_float = [n for n, (_, ops) in layers.items() if ops is not None and ops.in_all_linear and not ops.is_quantized]
    dtypes = [p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point()]
    transposed = any(getattr(layer, "source_cls", nn.Linear) is not nn.Linear for layer, _ in layers.values())
    config = quantizer.transformers_config(kind, dtypes[0] if dtypes else torch.float32, in_float, transposed)
    if config is not None:
        auto: Any = importlib.import_module("transformers.quantizers.auto")
        vars(model)["hf_quantizer"] = auto.AutoHfQuantizer.from_config(config, pre_quantized=True)
        vars(model.config)["quantization_config"] = config


def _chosen(model: nn.Module, skip_modules: Sequence[str]) -> list[tuple[Candidate, LayerOps]]:
    """The layers to quantize, with their ops."""
    found, index = candidates(model), TensorIndex(model)
    head, new, skipped = output_head(model), find_origins(model).fresh, _skipped(model, found, skip_modules)
    chosen = []
    for name, candidate in found.items():
        layer, ops = candidate.base, layer_ops(candidate.base)
        if ops is None or not ops.in_all_linear or ops.is_quantized or not is_plain_linear(ops, layer):
            continue
        # A layer that the checkpoint lacks has to train in full, as a head has.
        is_head = layer is head or name.rpartition(".")[2] in HEAD_NAMES or f"{name}.weight" in new
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if is_head or id(layer) in skipped or index.also_used_by(weight, layer):
            continue
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.is_meta:
            raise TargetError(
                f"{name}: a weight of {weight.dtype} on {weight.device.type} cannot be quantized. "
                "Convert the model to float32, bfloat16 or float16."
            )
        chosen.append((candidate, ops))
    if not chosen:
        raise TargetError(f"quantize: {type(model).__name__} has no linear layer to quantize.")
    return chosen


def _skipped(model: nn.Module, found: Mapping[str, Candidate], skip_modules: Sequence[str]) -> set[int]:
    """The ids of the modules that `skip_modules` leaves in float."""
    skipped: set[int] = set()
    for entry in [skip_modules] if isinstance(skip_modules, str) else skip_modules:
        hits = [c.module for c in found.values() if any(is_suffix(entry, name) for name in c.names)]
        if not hits:
            raise TargetError(
                f"skip_modules: {entry!r} matches no module of {type(model).__name__}"
                f"{hint(entry, {name.rpartition('.')[2] for name in found})}."
            )
        skipped |= {id(module) for hit in hits for module in hit.modules()}
    return skipped


def _replacement(candidate: Candidate, ops: LayerOps, quantizer: QuantizedLinearOps, kind: str) -> nn.Module:
    name, layer = candidate.names[0], candidate.base
    weight, bias = ops.read_weight(layer).detach().contiguous(), ops.read_bias(layer)
    try:
        quantized = quantizer.quantize(kind, weight, None if bias is None else bias.detach())
    except ImportError as error:
        raise ConfigError(
            f"quantize: {kind!r} needs {error.name or 'a package'}, which is not installed; pip install 'minipeft[quant]'."
        ) from None
    except ValueError as error:
        raise TargetError(f"{name}: {error}. Leave it in float by skip_modules, or take another kind.") from None
    if not quantizer.accepts(quantized):
        raise TargetError(
            f"{name}: the installed package stores {kind!r} in a way that {type(quantizer).__name__} does not know. "
            "Take the version that the extra minipeft[quant] names."
        )
    # transformers' name for the class that was replaced; dequantizing makes a layer of this class again.
    quantized.source_cls = type(layer)  # type: ignore[assignment]
    quantizer.prepare(quantized)
    mark_as_loaded(quantized, layer)
    return quantized.requires_grad_(False).train(layer.training)

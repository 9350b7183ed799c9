"""What is unusual about an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from minipeft.errors import MinipeftError, shown
from minipeft.files.format import open_adapter
from minipeft.patterns import endings
from minipeft.readers import facts
from minipeft.readers.contents import Contents
from minipeft.readers.keys import Kind
from minipeft.readers.layers import Layer

LARGE = 1e3  # of a value; factors that train well stay far below
STRONG = 1.0  # of an update's norm over its weight's


def unusual(contents: Contents, values: Mapping[str, Tensor], layers: Sequence[Layer]) -> list[str]:
    """Sentences about what a careful reader of this file should know."""
    return [*_values(values), *_layers(layers), *_names(contents), *_refusal(contents)]


def _values(values: Mapping[str, Tensor]) -> Iterator[str]:
    floating = {key: t for key, t in values.items() if t.is_floating_point() and t.numel()}
    broken = [key for key, tensor in floating.items() if not tensor.isfinite().all()]
    if broken:
        yield f"NaN or infinity in {shown(broken, 3)}."
    largest = {key: float(tensor.abs().max()) for key, tensor in floating.items() if key not in broken}
    large = [key for key, value in largest.items() if value > LARGE]
    if large:
        yield f"Values above {LARGE:g} in {shown(large, 3)}."
    empty = [key for key, tensor in values.items() if not tensor.numel()]
    if empty:
        yield f"No values at all in {shown(empty, 3)}."


def _layers(layers: Sequence[Layer]) -> Iterator[str]:
    idle = [layer.module for layer in layers if layer.norm == 0]
    if idle:
        yield f"Updates of zero ({len(idle)} of {len(layers)}): {shown(idle, 3)}."
    strong = [layer.module for layer in layers if layer.relative is not None and layer.relative > STRONG]
    if strong:
        yield f"Updates larger than the weights that they are added to: {shown(strong, 3)}."
    for what in ("rank", "dtype", "scaling"):
        found = {getattr(layer, what) for layer in layers} - {None}
        if len(found) > 1:
            yield f"Several {what}s: {', '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in sorted(found)[:6])}."


def _names(contents: Contents) -> Iterator[str]:
    halves = [module for module, parts in contents.layers.items() if _is_half(set(parts))]
    if halves:
        yield f"One factor without the other: {shown(halves, 3)}."
    targets = contents.listed("target_modules")
    used = {ending for module in contents.layers for ending in endings(module)}
    idle = [target for target in targets if target not in used]
    if idle:
        yield f"target_modules names {shown(idle, 5)}, and no key is for it."
    about_keys = (facts.without_prefix, facts.with_adapter_name, facts.with_wrappers)
    for finds in (facts.not_selected, facts.other_ranks, *about_keys):
        said = finds(contents)
        if said:
            yield f"Keys: {said.removesuffix(',').removesuffix(', which')}."
    for kind in (Kind.START, Kind.COPY):
        keys = contents.of(kind)
        if keys:
            yield f"A key is {kind.value}: {facts.one_of([key.text for key in keys])}."
    own = facts.kept_start(contents)
    if own:
        yield f"{own} is minipeft's own, which no other program reads."


def _is_half(parts: set[str]) -> bool:
    pairs = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"), ("lora_A", "lora_B"))
    return any((A in parts) != (B in parts) for A, B in pairs)


def _refusal(contents: Contents) -> Iterator[str]:
    try:
        file = open_adapter(contents.directory)
        known = file.config.to_dict().keys() - file.config.other_keys.keys()
    except MinipeftError as error:
        yield f"load_adapter refuses it: {error}"
        return
    described = {"peft_version", "revision", "auto_mapping"}
    others = [
        k for k, v in contents.config.items() if k not in known | described and v not in (None, False, "", [], {})
    ]
    if others:
        yield f"The configuration has keys that are no option of this method: {shown(others, 5)}."

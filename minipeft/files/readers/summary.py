"""All that ``minipeft inspect`` says of an adapter, as values for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minipeft.config.patterns import endings
from minipeft.errors import MinipeftError, shown
from minipeft.files.format import AdapterFile, open_adapter
from minipeft.files.readers import facts
from minipeft.files.readers.contents import Contents, read_contents
from minipeft.files.readers.keys import Kind
from minipeft.files.readers.layers import Layer, layers_of_file

LARGE = 1e3  # of a value; factors that train well stay far below
STRONG = 1.0  # of an update's norm over its weight's


@dataclass(frozen=True)
class Summary:
    """An adapter's directory in figures."""

    contents: Contents
    options: dict[str, Any]  # of the configuration, those that differ from the defaults
    layers: list[Layer]
    saved: list[dict[str, Any]]  # modules that are trained in full, with their tensors
    tokens: list[dict[str, Any]]  # tables of which rows are trained, with the number of rows and their width
    unusual: list[str]  # sentences that a careful reader of the file should know

    @property
    def bytes(self) -> int:
        """Size of the file of weights."""
        return self.contents.weights.path.stat().st_size

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        weights = self.contents.weights
        shapes, dtypes, keys = weights.shapes, weights.dtypes, self.contents.keys
        tensors = [
            {"key": k.text, "shape": list(shapes[k.text]), "dtype": dtypes[k.text], "for": k.kind.value} for k in keys
        ]
        return {
            "method": self.contents.config.get("peft_type"),
            "base": self.contents.config.get("base_model_name_or_path"),
            "config": dict(self.contents.config),
            "differs": self.options,
            "bytes": self.bytes,
            "layers": [layer.to_dict() for layer in self.layers],
            "modules_to_save": self.saved,
            "tokens": self.tokens,
            "unusual": self.unusual,
            "tensors": tensors,
        }


def summary(directory: Path) -> Summary:
    """Read an adapter's directory, and all its tensors.

    Raises:
        CheckpointError: it holds no adapter, or one is hostile or damaged.
    """
    contents = read_contents(directory)
    values = contents.weights.read(finite=False)
    try:
        file, refusal = open_adapter(directory), None
    except MinipeftError as error:
        file, refusal = None, error
    layers = layers_of_file(contents, values, {} if file is None else file.base)
    saved = [
        {"module": key.module, "tensor": key.part, "shape": list(tensor.shape), "bytes": tensor.nbytes}
        for key in contents.of(Kind.SAVED, Kind.COPY)
        for tensor in [values[key.text]]
    ]
    tokens = [
        {"module": key.module, "rows": len(values[key.text]), "width": values[key.text].shape[-1]}
        for key in contents.of(Kind.TOKENS)
    ]
    unusual = [*_values(values), *_layers(layers), *_names(contents), *_options(contents, file)]
    unusual += [] if refusal is None else [f"load_adapter refuses it: {refusal}"]
    return Summary(contents, _differing(contents, file), layers, saved, tokens, unusual)


def _differing(contents: Contents, file: AdapterFile | None) -> dict[str, Any]:
    """The options that are not the defaults of their method."""
    try:
        defaults = {} if file is None else type(file.config)().to_dict()
    except MinipeftError:  # a method may need an option
        defaults = {}
    aside = {"peft_type", "base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping"}
    return {
        key: value
        for key, value in sorted(contents.config.items())
        if key not in aside and value != defaults.get(key) and value not in (None, False, "", [], {})
    }


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


def _options(contents: Contents, file: AdapterFile | None) -> Iterator[str]:
    if file is None:
        return
    known = {
        *(file.config.to_dict().keys() - file.config.other_keys.keys()),
        "peft_version",
        "revision",
        "auto_mapping",
    }
    others = [k for k, v in contents.config.items() if k not in known and v not in (None, False, "", [], {})]
    if others:
        yield f"The configuration has keys that are no option of this method: {shown(others, 5)}."

"""All that ``minipeft inspect`` says of an adapter, as values for JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.config import AdapterConfig
from minipeft.errors import MinipeftError
from minipeft.files.format import open_adapter
from minipeft.readers.contents import Contents, read_contents
from minipeft.readers.keys import Kind
from minipeft.readers.layers import Layer, layers_of_file
from minipeft.readers.unusual import unusual


@dataclass(frozen=True)
class Summary:
    """An adapter's directory in figures."""

    contents: Contents
    options: dict[str, Any]  # of the configuration, those that differ from the defaults
    layers: list[Layer]
    saved: list[dict[str, Any]]  # modules that are trained in full, with their tensors
    tokens: list[dict[str, Any]]  # tables of which rows are trained, with the number of rows and their width
    unusual: list[str]  # sentences

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
        file = open_adapter(directory)
        samples, known = file.base, type(file.config)
    except MinipeftError:  # which is said among what is unusual
        samples, known = {}, None
    layers = layers_of_file(contents, values, samples)
    saved = [
        {"module": key.module, "tensor": key.part, "shape": list(tensor.shape), "bytes": tensor.nbytes}
        for key in contents.of(Kind.SAVED, Kind.COPY)
        for tensor in [values[key.text]]
    ]
    tokens = [
        {"module": key.module, "rows": len(values[key.text]), "width": values[key.text].shape[-1]}
        for key in contents.of(Kind.TOKENS)
    ]
    return Summary(contents, _differing(contents, known), layers, saved, tokens, unusual(contents, values, layers))


def _differing(contents: Contents, known: type[AdapterConfig] | None) -> dict[str, Any]:
    """The options that are not the defaults of their method."""
    try:
        defaults = {} if known is None else known().to_dict()
    except MinipeftError:  # a method may need an option
        defaults = {}
    aside = {"peft_type", "base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping"}
    return {
        key: value
        for key, value in sorted(contents.config.items())
        if key not in aside and value != defaults.get(key) and value not in (None, False, "", [], {})
    }

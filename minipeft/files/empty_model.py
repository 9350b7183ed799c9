"""The base as a transformers model without weights: the class and the sizes that the adapter was trained with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minipeft.ecosystem.transformers_model import input_embedding, output_head
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import ConfigError, MergeError, MinipeftError, told
from minipeft.files.format import AdapterFile
from minipeft.files.names.fitted import in_names_of
from minipeft.files.reading import reading
from minipeft.files.resized_vocabulary import OPTION, PER_LAYER, VOCABULARY

# The auto class for a task whose head a checkpoint of another task lacks.
HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass
class EmptyModel:
    """A model without weights, and what its configuration says otherwise than the base's ``config.json``."""

    model: nn.Module
    changed: dict[str, Any] = field(default_factory=dict)


def empty_model(folder: Path, values: Mapping[str, Any], file: AdapterFile, auto_mapping: Any = None) -> EmptyModel:
    """Build the model that the adapter was trained on, without weights, in evaluation mode.

    Args:
        folder: of the base.
        values: its ``config.json``.
        file: the adapter, whose tensors say how many rows the vocabulary and a new head have.
        auto_mapping: of the adapter's configuration, where PEFT names the class of a model without a task.

    Raises:
        ConfigError: transformers is not installed.
        MergeError: transformers has no such model.
    """
    try:
        import transformers as package
    except ImportError:
        raise ConfigError(
            "the base's config.json takes transformers and accelerate: pip install 'minipeft[train]'"
        ) from None
    transformers: Any = package
    with reading(folder):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    cls = _model_class(transformers, folder, values, config, file.config.task_type, auto_mapping)
    made = EmptyModel(_built(cls, config))
    if cls.__name__ not in (values.get("architectures") or ()):
        made.changed["architectures"] = [cls.__name__]
    shapes = _shapes(file, made.model)
    labels, rows = _labels(made.model, shapes), _rows(made.model, file, shapes)
    if labels is not None:
        config.num_labels = labels
        made.changed |= {name: getattr(config, name) for name in ("id2label", "label2id")}
    if rows is not None:
        text = config.get_text_config()
        sizes = {size: rows for size in (VOCABULARY, PER_LAYER) if hasattr(text, size)}  # as resizing does
        text.update(sizes)
        inside = next((key for key in values if text is not config and getattr(config, key, None) is text), None)
        made.changed |= sizes if inside is None else {inside: {**values[inside], **sizes}}
    if labels is not None or rows is not None:
        made.model = _built(cls, config)
    return made


def _shapes(file: AdapterFile, model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """The shapes in the file by the names that its modules have in this model; by its own if they do not fit."""
    try:
        return in_names_of(model, file).shapes
    except MinipeftError:  # loading the adapter will say why
        return file.shapes


def _model_class(
    transformers: Any, folder: Path, values: Mapping[str, Any], config: Any, task: str | None, auto_mapping: Any
) -> Any:
    names = values.get("architectures")
    own = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    _class_named(transformers, folder, own)
    if isinstance(auto_mapping, Mapping) and str(auto_mapping.get("parent_library", "")).startswith("transformers."):
        own = auto_mapping.get("base_model_class") or own
    elif task in HEADS:
        cls: Any = getattr(transformers, HEADS[task])._model_mapping.get(type(config), ())
        with_head = [each.__name__ for each in (cls if isinstance(cls, tuple | list) else [cls])]
        # A model for images and text is not among the causal ones, and keeps its own class.
        other = task not in GENERATING or own is None or own.endswith("Model")
        own = with_head[0] if with_head and own not in with_head and other else own
    return _class_named(transformers, folder, own)


def _class_named(transformers: Any, folder: Path, own: str | None) -> Any:
    cls = getattr(transformers, own, None) if isinstance(own, str) and own.isidentifier() else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise MergeError(
            f"base: {folder} is for the class {told(own)}, which transformers {transformers.__version__} does not have. "
            "Load the model as its authors say, then merge_and_unload() and save_pretrained()."
        )
    return cls


def _built(cls: Any, config: Any) -> nn.Module:
    try:
        with without_weights(), torch.random.fork_rng(devices=[]):
            model = cls(config)
    except Exception as error:  # whatever a model raises for a configuration
        own = getattr(config, "architectures", None) or [cls.__name__]
        if cls.__name__ not in own:
            raise MergeError(
                f"the adapter was trained on a {cls.__name__}, and the base is a {told(own[0])}. Give the base that it was trained on."
            ) from error
        raise MergeError(f"{cls.__name__} cannot be built from the base's config.json ({error!s:.200}).") from error
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Parameters are made on the meta device; buffers have values, since no file holds some of them."""
    try:
        from accelerate import init_empty_weights  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError("a model without weights takes accelerate: pip install 'minipeft[train]'") from None
    with init_empty_weights(include_buffers=False):
        yield


def _labels(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many labels the adapter's head has, if that is another number than the model's."""
    here = getattr(model.config, "num_labels", None)
    tables = {id(module) for module in (input_embedding(model), output_head(model))}
    for name, module in model.named_modules():
        shape = shapes.get(f"{PREFIX}{name}.weight") or shapes.get(f"{PREFIX}{name}.modules_to_save.weight")
        weight = module._parameters.get("weight")
        if shape is None or weight is None or id(module) in tables or len(shape) != 2:
            continue
        if len(weight) == here and shape[0] != here and shape[1] == weight.shape[1]:
            return shape[0]
    return None


def _rows(model: nn.Module, file: AdapterFile, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many tokens the adapter was trained with, if those are more than the model has."""
    table = input_embedding(model)
    weight = None if table is None else table._parameters.get("weight")
    if weight is None:
        return None
    names = [name for name, module in model.named_modules() if module in (table, output_head(model))]
    ends = (".weight", ".base_layer.weight", ".modules_to_save.weight")
    found = [shapes.get(f"{PREFIX}{name}{end}") for name in names for end in ends]
    rows = [shape[0] for shape in found if shape is not None and shape[1:] == tuple(weight.shape[1:])]
    for option in (getattr(file.config, OPTION, None), getattr(file.config, "token_indices", None)):
        lists = list(option.values()) if isinstance(option, Mapping) else [option]
        rows += [max(ids) + 1 for ids in lists if ids]
    most = max(rows, default=0)
    return most if most > len(weight) else None

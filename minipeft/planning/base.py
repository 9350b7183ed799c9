"""The model that is planned for, built from its configuration: every layer is there, and no weight has a value."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from minipeft.config.options import one_of
from minipeft.errors import CheckpointError, ConfigError, MinipeftError, told, told_error
from minipeft.files.empty_model import without_weights
from minipeft.files.file_names import CONFIG_FILE
from minipeft.files.model_card import is_repo_id
from minipeft.files.reading import reading
from minipeft.injection.wrapper import Wrapper
from minipeft.memory.quantize import quantize as quantized
from minipeft.planning.hollow import Hollow
from minipeft.python.class_swap import plain_class

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_LAYERS = 10_000
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
Place = Any  # a directory, a name on the Hub, a transformers configuration, or a plain transformers model


def base_model(place: Place, hollow: Hollow, dtype: str | None = None, quantize: str | None = None) -> nn.Module:
    """Build the model in training mode, with hollow parameters; buffers have values.

    Args:
        place: a directory or name on the Hub with a ``config.json``, a transformers configuration, or a plain transformers
            model, which is only read.
        hollow: the context that it is for.
        dtype: of the weights, "float32", "bfloat16" or "float16"; None: the one that the configuration names, else float32.
        quantize: a kind of `minipeft.quantize`, or None.

    Raises:
        MinipeftError: there is no such model or kind, the configuration has no sizes, or the model cannot be built.
    """
    one_of("dtype", dtype, (None, *DTYPES))
    config, cls = _described(place)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise ConfigError(
            f"{cls.__name__} would have {layers:,} layers by its configuration; {MAX_LAYERS:,} are allowed."
        )
    kind = DTYPES[dtype] if dtype else _dtype_of(config)
    try:
        with quiet(), without_weights(), torch.random.fork_rng(devices=[]):
            model: nn.Module = cls._from_config(config, dtype=kind)
    except Exception as error:  # whatever a model raises for a configuration
        raise ConfigError(f"{cls.__name__} cannot be built from its configuration ({told_error(error)}).") from error
    model.config.use_cache = False  # type: ignore[union-attr]  # as the Trainer does, which leaves those of parts alone
    model.tie_weights()  # type: ignore[operator]
    _fill(model, hollow)
    if quantize is not None:
        with hollow:
            quantized(model, quantize)
    return model.train()


def _described(place: Place) -> tuple[Any, Any]:
    """A configuration of its own, and the class of the model."""
    try:
        transformers: Any = importlib.import_module("transformers")
        importlib.import_module("accelerate")
    except ImportError:
        raise ConfigError("planning takes transformers and accelerate: pip install 'minipeft[train]'") from None
    if isinstance(place, str | os.PathLike):
        config = _read(transformers, place)
    else:
        config = getattr(place, "config", place)
    if not isinstance(config, transformers.PreTrainedConfig):
        raise ConfigError(
            f"the model must be a directory, a name on the Hub, a transformers configuration or model, not {told(place)}."
        )
    if isinstance(place, nn.Module) and any(isinstance(module, Wrapper) for module in place.modules()):
        raise ConfigError("the model has adapters already; give its base, and the adapter's configuration apart.")
    cls = plain_class(type(place)) if isinstance(place, nn.Module) else _class_of(transformers, config)
    return type(config).from_dict(config.to_dict()), cls


def _read(transformers: Any, place: str | os.PathLike[str]) -> Any:
    if not os.path.isdir(place) and (os.path.exists(place) or not is_repo_id(os.fspath(place))):
        raise CheckpointError(
            f"{told(os.fspath(place))} is neither a directory here nor the name of a model on the Hub."
        )
    if os.path.isdir(place) and not os.path.isfile(os.path.join(place, "config.json")):
        is_adapter = os.path.isfile(os.path.join(place, CONFIG_FILE))
        what = "is an adapter: give its base" if is_adapter else "has no config.json: give the directory of a model"
        raise CheckpointError(f"{os.fspath(place)} {what}, or its name on the Hub.")
    try:
        with reading(place):
            values, _ = transformers.PreTrainedConfig.get_config_dict(place)
            config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    except MinipeftError as error:
        raise CheckpointError(f"{told_error(error, 300)}.") from None
    names = getattr(type(config), "attribute_map", {})
    given = {key for part in (values, *values.values()) if isinstance(part, dict) for key in part}
    if not given & {*SIZES, *(names[size] for size in SIZES if size in names)}:
        raise ConfigError(f"{place}: its config.json says no sizes ({', '.join(SIZES)}), so nothing can be counted.")
    return config


def _class_of(transformers: Any, config: Any) -> Any:
    """The class that the configuration names, else the causal language model of its family."""
    names = config.architectures or ()
    named = next((getattr(transformers, name, None) for name in names if name.isidentifier()), None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    found: Any = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    if found is None:
        raise ConfigError(
            f"transformers {transformers.__version__} has no causal language model for {type(config).__name__}; "
            "name the model's class in architectures."
        )
    return found[0] if isinstance(found, tuple | list) else found


def _dtype_of(config: Any) -> torch.dtype:
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return next((dtype for dtype in DTYPES.values() if dtype is named), torch.float32)


def _fill(model: nn.Module, hollow: Hollow) -> None:
    """Give every parameter memory; those that are tied stay so."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # which keeps the old ones, so that no two have the same hash
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(hollow.made(parameter), parameter.requires_grad)
                module._parameters[name] = made[parameter]
    for buffer in model.buffers():
        hollow.ledger.note(buffer)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the context transformers logs errors only, and no advice about masks and the like: no text is being read."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

"""What minipeft knows of transformers' models, all by duck typing: nothing here imports transformers.

Every function also takes a model that is not one of transformers'; it then answers None, False or nothing.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from minipeft.ecosystem.wrapper_names import ATTRIBUTES, unwrapped

# Modules around a model: adapt what is inside, then wrap it.
WRAPPING = {*ATTRIBUTES, "PeftModel"}
# What transformers keeps of a quantization on a model, besides `quantization_config` in its config.
QUANTIZATION = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")

# A model's argument for what it remembers of earlier tokens; the first since transformers 5.24, the others before it.
CACHES = ("cache", "past_key_values", "cache_params")

# A model's arguments for what is not text, and what config calls the tokens that stand for it.
MEDIA = (
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "input_values",
    "image_patches",
    "flattened_patches",
    "grid_thw",
)
MEDIA_TOKENS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "audio_token_id",
    "audio_token_index",
)

# The op by which experts multiply where torch has no grouped product for them (`transformers.integrations.moe`).
GROUPED_PRODUCT = "grouped_mm_fallback"

# Subclasses of nn.Linear that make something else of ``W x``: routers choose by it, and a grouped layer splits W.
OTHER_OUTPUT = frozenset({"DeepseekV4GroupedLinear", "Llama4Router", "PhimoeTopKRouter"})


def has_other_output(layer: nn.Module) -> bool:
    """Whether this linear layer returns something other than ``W x + b``."""
    return not OTHER_OUTPUT.isdisjoint([cls.__name__ for cls in type(layer).__mro__])


def model_type(model: nn.Module) -> str | None:
    """``config.model_type``, such as "llama"."""
    found = getattr(getattr(model, "config", None), "model_type", None)
    return found if isinstance(found, str) else None


def name_or_path(model: nn.Module) -> str | None:
    """Where the model was loaded from: a name on the Hub or a directory."""
    found = getattr(model, "name_or_path", None)
    return found if isinstance(found, str) and found else None


def main_input_name(model: nn.Module) -> str:
    """The argument of the model's call that it mainly reads, such as "input_ids"."""
    found = getattr(model, "main_input_name", None)
    return found if isinstance(found, str) else "input_ids"


def _arguments(module: nn.Module) -> frozenset[str]:
    """The named arguments of a module's call."""
    return _named_by(getattr(type(module), "forward", None))  # a scripted module's class has none


@functools.cache
def _named_by(forward: Any) -> frozenset[str]:
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY)


def takes_text(module: nn.Module) -> bool:
    """Whether a module is called with tokens and nothing but text."""
    takes = _arguments(module)
    return "input_ids" in takes and takes.isdisjoint(MEDIA)


def media_input(module: nn.Module) -> str | None:
    """What a module is called with instead of text, such as "pixel_values".

    A class may only have inherited its `main_input_name`, as Whisper's decoder has.
    """
    takes, main = _arguments(module), getattr(type(module), "main_input_name", "input_ids")
    if "input_ids" in takes or takes <= {"self"}:
        return None
    return next((name for name in MEDIA if name in takes), None if main == "input_ids" else main)


def takes_media(model: nn.Module) -> bool:
    """Whether a model can be called with images or sound."""
    return not _arguments(model).isdisjoint(MEDIA)


def gives_media(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a model is called with images or sound; what is given without a name may be."""
    return len(args) > 1 or any(kwargs.get(name) is not None for name in MEDIA)


def same_media_in_rows(model: nn.Module, ids: Tensor | None, given: Mapping[str, Any]) -> bool:
    """Whether each row of tokens stands for as many images, or as much sound, of the same size as the others."""
    if ids is None or ids.ndim != 2 or ids.is_floating_point():
        return False
    for name in ("image_grid_thw", "video_grid_thw", "image_sizes", "pixel_attention_mask", "input_features_mask"):
        size = given.get(name)
        if isinstance(size, Tensor) and size.ndim and not bool((size == size[:1]).all()):
            return False
    tokens = [getattr(getattr(model, "config", None), name, None) for name in MEDIA_TOKENS]
    counts = [(ids == token).sum(1) for token in tokens if isinstance(token, int)]
    return any(bool(c.any()) for c in counts) and all(bool((c == c[0]).all()) for c in counts)


def vocabulary_size(model: nn.Module, option: str = "vocab_size") -> int | None:
    """The size of a vocabulary in the text part of the model's config, which ``resize_token_embeddings`` changes."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    found = getattr(get() if callable(get) else config, option, None)
    return found if isinstance(found, int) else None


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module that ``get_input_embeddings`` returns: the wrapper, if it is adapted."""
    return _returned_by(model, "get_input_embeddings")


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that ``get_output_embeddings`` returns: the wrapper, if it is adapted."""
    return _returned_by(model, "get_output_embeddings")


def per_layer_embedding(model: nn.Module) -> nn.Module | None:
    """The second table of Gemma 3n and Gemma 4, with a vector of each token for each layer."""
    try:
        return _returned_by(model, "get_per_layer_input_embeddings")
    except AttributeError:  # a small one has none
        return None


def vocabulary_tables(model: nn.Module) -> list[nn.Module]:
    """The modules that ``resize_token_embeddings`` gives more rows, the input embedding first; a tied head is one of them."""
    found = (input_embedding(model), output_head(model), per_layer_embedding(model))
    return [module for module in found if module is not None]


def text_part(model: nn.Module) -> nn.Module | None:
    """The language model in a model of several modalities, the model itself if it has one only and that is text, else None."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    if callable(get) and get() is not config:
        part = _returned_by(model, "get_decoder")
        return None if part is model else part
    return model if getattr(model, "main_input_name", None) == "input_ids" else None


def knows_its_head(model: nn.Module) -> bool:
    """Whether the model has ``get_output_embeddings``, even if that returns None."""
    return hasattr(model, "get_output_embeddings")


def wrapping_class(model: nn.Module) -> str | None:
    """The name of the class that wraps a model, such as DDP's, if `model` is such a wrapper."""
    return next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in WRAPPING), None)


def is_from_checkpoint(parameter: nn.Parameter) -> bool:
    """Whether ``from_pretrained`` found a parameter in the checkpoint, or tied it; the mark is lost in a copy or a pickle.

    transformers marks what it loads so that ``_init_weights`` leaves it alone (4.56 to 5, ``modeling_utils.py``).
    """
    return getattr(parameter, "_is_hf_initialized", False) is True


def computed_parameters(model: nn.Module) -> re.Pattern[str] | None:
    """Names of parameters that no checkpoint holds, since the model computes them, such as tables of positions."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None)
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def mark_as_loaded(module: nn.Module, source: nn.Module) -> None:
    """Mark the parameters of a layer that stands in for one from the checkpoint."""
    if all(map(is_from_checkpoint, source.parameters())):
        for parameter in module.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def loadable_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that ``from_pretrained`` can make, the outermost first."""
    for module in model.modules():
        if hasattr(type(module), "from_pretrained") and hasattr(module, "config"):
            yield module


def base_model(model: nn.Module) -> nn.Module | None:
    """The model below a task's head: ``base_model_prefix`` names it, else it is the largest child; None without a head."""
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str) or not prefix:
        return None
    named = getattr(model, prefix, None)
    children = [child for child in model.children() if any(True for _ in child.parameters())]
    if isinstance(named, nn.Module) or len(children) < 2:
        return named if isinstance(named, nn.Module) and named is not model else None
    return max(children, key=lambda child: sum(parameter.numel() for parameter in child.parameters()))


def base_prefix(model: nn.Module) -> str:
    """The name of the base model within a model, next to its heads; "" if ``base_model_prefix`` names no module."""
    prefix = getattr(model, "base_model_prefix", None)
    return prefix if isinstance(prefix, str) and prefix in model._modules else ""


def recomputable_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that transformers can recompute in the backward pass, in the model's order."""
    for module in model.modules():
        if any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__):
            yield module


def without_cache(block: nn.Module, names: Sequence[str], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The positional arguments of a block, whose names are `names`, without a cache: recomputing would fill it again.

    transformers leaves out one that is given by name; RecurrentGemma gives it by position.
    """
    if getattr(block, "_can_checkpoint_with_cache", False):
        return values
    left_out = {"use_cache": False, "layer_past": None, **dict.fromkeys(CACHES)}
    given = zip(names, values, strict=False)
    return tuple(left_out.get(name, value) for name, value in given) + values[len(names) :]


def says_tied(model: nn.Module) -> bool:
    """Whether the config says that the output head shares the weight of the input embedding."""
    return getattr(getattr(model, "config", None), "tie_word_embeddings", None) is True


def mark_untied(model: nn.Module) -> bool:
    """Record in the config that the output head has its own weight; returns whether it said otherwise.

    A model that computes by it keeps its word. transformers loads it all the same, since the file has both weights.
    """
    changes = says_tied(model) and not _computes_by_tie(model)
    if changes:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    return changes


def _computes_by_tie(model: nn.Module) -> bool:
    """Whether `forward` asks the config if the head is tied: UMT5, Switch Transformers and UDOP then scale its input."""
    own = (vars(cls).get("forward") for cls in type(model).__mro__)
    codes = (getattr(inspect.unwrap(forward), "__code__", None) for forward in own if forward is not None)
    return any("tie_word_embeddings" in code.co_names for code in codes if code is not None)


def mark_tied(model: nn.Module) -> None:
    """Record in the config that the output head shares the weight of the input embedding: undoes `mark_untied`."""
    model.config.tie_word_embeddings = True  # type: ignore[union-attr]


def forget_quantization(model: nn.Module) -> None:
    """Remove what transformers noted about a quantization, so that the model saves and loads as a float model."""
    for module in model.modules():
        for name in QUANTIZATION:
            vars(module).pop(name, None)
        vars(getattr(module, "config", module)).pop("quantization_config", None)


def _returned_by(model: nn.Module, method: str) -> nn.Module | None:
    get = getattr(model, method, None)
    try:
        module = get() if callable(get) else None
    except NotImplementedError:  # transformers raises it for a model that has none
        return None
    return unwrapped(module) if isinstance(module, nn.Module) else None

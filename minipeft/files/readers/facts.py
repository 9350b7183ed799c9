"""What the rules of several readers ask of an adapter; each answers with what it found, as the start of a sentence, or None."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from minipeft.ecosystem.wrapper_names import PREFIX, unwrapped_name
from minipeft.errors import shown, told
from minipeft.files.readers.contents import MAX_NUMBER, Contents
from minipeft.files.readers.keys import Kind, bare_key

Applies = Callable[[Contents], str | None]
VISION = {"visual", "vision_tower", "vision_model", "audio_tower"}  # in names of what is not the language model
FLOATING = 1e-6  # relative difference of two scalings that are equal


def one_of(names: Sequence[str], then: str = "") -> str | None:
    """The first name, of how many, and what follows; None if there is no name."""
    number = f" (one of {len(names)})" if len(names) > 1 else ""
    return f"{shown(names[:1])}{number}{then}" if names else None


def methods_but(*methods: str) -> Applies:
    """The adapter is of none of these methods."""
    return lambda c: None if c.method in methods else f"peft_type {c.config.get('peft_type')!r}"


def is_set(option: str, but: Collection[object] = ()) -> Applies:
    """An option asks for something: it is neither null, false nor empty, nor one of `but`."""

    def applies(contents: Contents) -> str | None:
        value = contents.config.get(option)
        return f"{option} = {told(value)}" if value and value not in but else None

    return applies


def lacks(*options: str) -> Applies:
    """The configuration lacks one of these keys."""

    def applies(contents: Contents) -> str | None:
        missing = [option for option in options if option not in contents.config]
        return f"the configuration has no {missing[0]}, which" if missing else None

    return applies


def holds(*kinds: Kind, but: tuple[str, ...] = ()) -> Applies:
    """The file holds tensors of these kinds, under keys that do not end with one of `but`."""
    return lambda c: one_of([key.text for key in c.of(*kinds) if not key.text.endswith(but or ("\0",))])


def without_prefix(contents: Contents) -> str | None:
    """Keys do not start with ``base_model.model.`` exactly once."""
    keys = [key.text for key in contents.keys if not _has_prefix(key.text)]
    return one_of(keys, ", which does not start with base_model.model. once,")


def _has_prefix(key: str) -> bool:
    is_shared = key.removeprefix("base_model.").startswith("vera_")
    return is_shared or (key.startswith(PREFIX) and not key.startswith(PREFIX * 2))


def with_adapter_name(contents: Contents) -> str | None:
    """Keys have an adapter's name in them, as in a live model's state_dict."""
    keys = [key.text for key in contents.keys if bare_key(key.text) != key.text]
    return one_of(keys, ", which has an adapter's name in it,")


def of_former_oft(contents: Contents) -> str | None:
    """OFT of PEFT before 0.16, which was another method."""
    return one_of([key.text for key in contents.keys if key.part == "oft_r"], ", OFT of PEFT before 0.16,")


def with_wrappers(contents: Contents) -> str | None:
    """Keys have a wrapper's part in them, such as ``_orig_mod``."""
    texts = [key.text for key in contents.keys]
    keys = [text for text in texts if unwrapped_name(text) != text or text.startswith(f"{PREFIX}module.")]
    return one_of(keys, ", which has a wrapper's name in it,")


def not_selected(contents: Contents) -> str | None:
    """The configuration does not select layers that the file has."""
    return one_of(contents.not_selected(), ", which target_modules does not select,")


def other_ranks(contents: Contents) -> str | None:
    """The ranks in the file are not those of the configuration."""
    for module, rank in contents.ranks.items() if contents.is_plain_lora else ():
        there = rank_in_file(contents, module)
        if there not in (None, rank):
            return f"{module} has rank {there}, and the configuration says {rank}, which"
    return None


def of_older_peft(contents: Contents) -> str | None:
    """What it says meant something else when PEFT before 0.14 wrote it."""
    config, stored = contents.config, contents.stored
    names = [name for name, value in stored.items() if value != config[name]]
    return one_of(names, ", from PEFT before 0.14,") if names else None


def rank_in_file(contents: Contents, module: str) -> int | None:
    """The rank of a layer's factors, or None if it has no such factor."""
    for part in ("lora_A.weight", "lora_embedding_A", "lora_A"):
        shape = contents.shape(module, part)
        if shape:
            return shape[0]
    return None


def scaled_otherwise(reads: Callable[[Contents, str], float]) -> Applies:
    """A reader multiplies updates with something else than the configuration asks for."""

    def applies(contents: Contents) -> str | None:
        if contents.method != "LORA":
            return None
        factors = [reads(contents, module) / scaling for module, scaling in contents.scalings.items() if scaling]
        wrong = [factor for factor in factors if not abs(factor - 1) <= FLOATING]
        if not wrong:
            return None
        least, most = min(wrong), max(wrong)
        by = f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
        asked = [option for option in ("use_rslora", "rank_pattern", "alpha_pattern") if contents.config.get(option)]
        return f"{len(wrong)} of {len(factors)} updates come out times {by} ({', '.join(asked)}), since it"

    return applies


def alpha_over_r(contents: Contents, module: str) -> float:
    """The scaling of a reader that knows the top-level options only; NaN if these are not numbers that it can divide."""
    alpha, r = contents.config.get("lora_alpha", 8), contents.config.get("r", 8)
    known = isinstance(alpha, int | float) and isinstance(r, int | float) and r > 0 and alpha <= MAX_NUMBER
    return alpha / r if known else math.nan


def more_than_matrices(contents: Contents) -> str | None:
    """A factor has more than two dimensions, as for a convolution."""
    keys = [key.text for key in contents.of(Kind.FACTOR) if len(contents.weights.shapes[key.text]) != 2]
    return one_of(keys, ", which is not a matrix,")


def experts(contents: Contents) -> str | None:
    """Bare parameters are adapted, as those of fused experts; a router's weight is read like that of a layer."""
    value = contents.config.get("target_parameters")
    names = value if isinstance(value, list) else [value] if value else []
    stacks = [name for name in names if not (isinstance(name, str) and name.rpartition(".")[2] == "weight")]
    return f"target_parameters = {told(stacks)}" if stacks else None


def vision(contents: Contents) -> str | None:
    """A module outside of the language model has an update."""
    return next((module for module in contents.layers if not VISION.isdisjoint(module.split("."))), None)


def kept_start(contents: Contents) -> str | None:
    """The start that the file brings along is a value of minipeft's own."""
    value = contents.config.get("init_lora_weights")
    return f"init_lora_weights = {value!r}" if isinstance(value, str) and value.endswith("_kept") else None


def file_is_not(name: str) -> Applies:
    """The weights are in another file than the one that is read."""
    return lambda c: None if c.weights.path.name == name else c.weights.path.name

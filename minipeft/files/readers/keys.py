"""What a key of an adapter's file stands for: which module, and which part of its adapter."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from minipeft.config.patterns import is_suffix
from minipeft.ecosystem.wrapper_names import PREFIX

HEADS = ("lm_head", "embed_out", "output_projection", "score", "classifier", "qa_outputs")


class Kind(enum.Enum):
    """What a tensor of a file is for."""

    FACTOR = "a factor of a low-rank update"
    START = "a factor of the start that minipeft subtracts"
    MAGNITUDE = "DoRA's magnitude"
    BIAS = "a trained bias"
    METHOD = "a tensor of another method"
    TOKENS = "rows of tokens"
    COPY = "a copy of a base weight"
    SAVED = "a module trained in full"


# The end of a key after the module's name -> what it is.
TAILS = {
    **dict.fromkeys(("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"), Kind.FACTOR),
    **dict.fromkeys(("initial_lora_A.weight", "initial_lora_B.weight"), Kind.START),
    **dict.fromkeys(("initial_lora_embedding_A", "initial_lora_embedding_B"), Kind.START),
    "lora_magnitude_vector": Kind.MAGNITUDE,
    **dict.fromkeys(("lora_B.bias", "base_layer.bias"), Kind.BIAS),
    "base_layer.weight": Kind.COPY,
    **dict.fromkeys(("token_adapter.trainable_tokens_delta", "trainable_tokens_delta"), Kind.TOKENS),
    **dict.fromkeys(("lora_a", "lora_b"), Kind.METHOD),  # mlx-lm's
    **dict.fromkeys(("lora_A", "lora_B", "lora_E", "oft_R.weight", "ia3_l"), Kind.METHOD),
    **dict.fromkeys(("vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d"), Kind.METHOD),
}
STARTS_OF_PARTS = ("hada_", "lokr_", "lora_", "oft_", "vera_")


@dataclass(frozen=True)
class Key:
    """A key of a file, taken apart."""

    text: str  # the key
    module: str  # name in the base
    part: str  # what follows it, such as ``lora_A.weight``
    kind: Kind

    @property
    def is_head(self) -> bool:
        """Whether the module is an output head, by its name."""
        return any(is_suffix(head, self.module) for head in HEADS)


def bare_key(key: str) -> str:
    """A key without the name of an adapter, which a live model's state_dict has in it."""
    return key.replace(".default.", ".").removesuffix(".default")


def taken_apart(text: str, *, bias: bool) -> Key:
    """The parts of a key; `bias` says that the adapter trains biases of modules that are not adapted."""
    name = text
    while name.startswith(PREFIX):  # a wrapper around a wrapper doubles it
        name = name.removeprefix(PREFIX)
    name = name.removeprefix("base_model.")
    words = bare_key(name).split(".")
    for length in (2, 1):
        part = ".".join(words[-length:])
        known = TAILS.get(part)
        if known is not None:
            return Key(text, ".".join(words[:-length]), part, known)
    for length in (2, 1):  # a method that this table does not know, or another layer type's names
        if len(words) >= length and words[-length].startswith(STARTS_OF_PARTS):
            return Key(text, ".".join(words[:-length]), ".".join(words[-length:]), Kind.METHOD)
    module, last = ".".join(words[:-1]), words[-1]
    return Key(text, module, last, Kind.BIAS if bias and last == "bias" else Kind.SAVED)

"""What llama.cpp reads: ``convert_lora_to_gguf.py``, and ``--lora`` with the file that it makes."""

from __future__ import annotations

import math

from minipeft.files.readers import facts
from minipeft.files.readers.contents import MAX_NUMBER, Contents
from minipeft.files.readers.keys import Kind
from minipeft.files.readers.rules import (
    CONVERT,
    MERGE,
    NO,
    NOTE,
    PARTLY,
    SAVE_AGAIN,
    WITHOUT_MODULES,
    WITHOUT_TOKENS,
    Rule,
    plain_lora,
)

VERSION = "llama.cpp, commit 0c1e570"
SCRIPT = f"convert_lora_to_gguf.py, {VERSION}"
RUNTIME = f"src/llama-adapter.cpp, {VERSION}"
UNEXPECTED = "is an unexpected name"
NORMS = ("_layernorm.weight", ".norm.weight")


def scaling(contents: Contents, module: str) -> float:
    """What llama.cpp multiplies an update with: the one alpha, over the rank of this update's tensor."""
    alpha, rank = contents.config.get("lora_alpha", 8), facts.rank_in_file(contents, module)
    return alpha / rank if rank and isinstance(alpha, int | float) and alpha <= MAX_NUMBER else math.nan


def norms_alone(contents: Contents) -> str | None:
    """Norms are trained in full, and nothing else is."""
    return None if facts.holds(Kind.SAVED, but=NORMS)(contents) else facts.holds(Kind.SAVED)(contents)


def of_images(contents: Contents) -> str | None:
    """A module has the name of a model with images."""
    return next((module for module in contents.layers if module.startswith("model.language_model.")), None)


def holds_head(contents: Contents) -> str | None:
    """An output head is adapted."""
    return facts.one_of(sorted({key.module for key in contents.of(Kind.FACTOR) if key.is_head}), " (an output head)")


RULES = (
    *plain_lora(SCRIPT, SCRIPT, "lora_alpha"),
    Rule("dora", facts.holds(Kind.MAGNITUDE), NO, UNEXPECTED, SCRIPT, MERGE),
    Rule("bias", facts.holds(Kind.BIAS), NO, UNEXPECTED, SCRIPT, MERGE),
    Rule("start", facts.holds(Kind.START), NO, UNEXPECTED, SCRIPT, CONVERT),
    Rule("tokens", facts.holds(Kind.TOKENS), NO, UNEXPECTED, SCRIPT, WITHOUT_TOKENS),
    Rule("modules_to_save", facts.holds(Kind.SAVED, but=NORMS), NO, UNEXPECTED, SCRIPT, WITHOUT_MODULES),
    Rule("norms", norms_alone, PARTLY, "is written to the file and left out when that is read", RUNTIME, WITHOUT_MODULES),
    Rule("adapter name", facts.with_adapter_name, NO, UNEXPECTED, SCRIPT, CONVERT),
    Rule("scaling", facts.scaled_otherwise(scaling), PARTLY, "reads lora_alpha and nothing else", SCRIPT, CONVERT),
    Rule("experts", facts.experts, NO, "has another layout there: one update an expert", SCRIPT, CONVERT),
    Rule("transposed", facts.is_set("fan_in_fan_out"), NO,
         "is not looked at: the script transposes the update along with GPT-2's weight",
         f"conversion/gpt2.py (modify_tensors), {VERSION}", MERGE),
    Rule("matrices", facts.more_than_matrices, NO, "is not supported", SCRIPT, MERGE),
    Rule("vision", facts.vision, PARTLY,
         "is left out: it is not in the language model's file, the only one that an adapter is for", SCRIPT, MERGE),
    Rule("wrapper", of_images, NOTE, "has the name of a model with images, which older scripts refuse", SCRIPT, CONVERT),
    Rule("wrappers", facts.with_wrappers, NO, "is not a name there", SCRIPT, SAVE_AGAIN),
    Rule("head", holds_head, NOTE, "is refused if the base ties it to its embedding", f"{SCRIPT} (modify_tensors)",
         f"{CONVERT} --drop head"),
)  # fmt: skip

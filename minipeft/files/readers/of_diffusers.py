"""What diffusers reads: ``pipeline.load_lora_weights``."""

from __future__ import annotations

from minipeft.files.file_names import DIFFUSERS_FILE
from minipeft.files.readers import facts
from minipeft.files.readers.contents import Contents
from minipeft.files.readers.rules import CONVERT, NO, NOTE, PARTLY, Rule

LOADING = "diffusers/loaders/peft.py (load_lora_adapter), diffusers 0.42.1"
COMPONENTS = (
    *("unet.", "transformer.", "transformer_2.", "text_encoder.", "text_encoder_2.", "text_encoder_3."),
    "controlnet.",
)
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector", ".alpha")


def no_component(contents: Contents) -> str | None:
    """A key does not start with the name of a part of a pipeline."""
    keys = [key for key in contents.weights.shapes if not key.startswith(COMPONENTS)]
    return facts.one_of(keys, ", which names no part of a pipeline,")


def other_parts(contents: Contents) -> str | None:
    """A key is for something else than a low-rank update."""
    return facts.one_of([key for key in contents.weights.shapes if not key.endswith(PARTS) and ".lokr_" not in key])


RULES = (
    Rule("component", no_component, NO, "is left out with a warning", LOADING, CONVERT),
    Rule("keys", other_parts, PARTLY, "is left out", LOADING, f"{CONVERT} --drop modules_to_save"),
    Rule("name", facts.file_is_not(DIFFUSERS_FILE), NOTE, "is found only if it is the one .safetensors file there",
         "diffusers/loaders/lora_base.py (_best_guess_weight_name), diffusers 0.42.1"),
)  # fmt: skip

"""What vLLM reads: ``--enable-lora``."""

from __future__ import annotations

import math

from minipeft.files.file_names import WEIGHTS_FILE
from minipeft.readers import facts
from minipeft.readers.contents import MAX_NUMBER, Contents
from minipeft.readers.keys import Kind
from minipeft.readers.rules import Rule, Takes

HELPER = "vllm/lora/peft_helper.py (PEFTHelper), main branch, November 2026"
NAMES = "vllm/lora/utils.py (parse_fine_tuned_lora_name), commit 0fd1570"
LOADING = "vllm/lora/lora_model.py (from_lora_tensors), commit 0306474"
CONVERT = "minipeft convert DIR OUT --for vllm"
MAX_RANK = 16
TABLES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


def scaling(contents: Contents, module: str) -> float:
    """What vLLM multiplies an update with: of the top-level options, rsLoRA included."""
    r = contents.config.get("r", 8) if contents.config.get("use_rslora") is True else 1
    return facts.alpha_over_r(contents, module) * (math.sqrt(r) if isinstance(r, int) and 0 < r <= MAX_NUMBER else 1)


RULES = (
    Rule("format", facts.file_is_not(WEIGHTS_FILE), Takes.NO, "is not read", LOADING, "minipeft convert DIR OUT"),
    Rule(
        "method",
        facts.methods_but("LORA"),
        Takes.NO,
        "is no LoRA, and no other method is read",
        HELPER,
        "minipeft merge",
    ),
    Rule("options", facts.lacks("r", "lora_alpha", "target_modules"), Takes.NO, "is required", HELPER, CONVERT),
    Rule("dora", facts.is_set("use_dora"), Takes.NO, "is refused", HELPER, "minipeft merge"),
    Rule(
        "modules_to_save",
        facts.is_set("modules_to_save"),
        Takes.NO,
        "is refused",
        HELPER,
        f"{CONVERT} --drop modules_to_save, or minipeft merge",
    ),
    Rule("bias", facts.is_set("bias", but=("none",)), Takes.NO, "is refused", HELPER, "minipeft merge"),
    Rule(
        "tokens",
        facts.is_set("trainable_token_indices"),
        Takes.NO,
        "is refused, unless the server has --max-lora-trainable-tokens",
        HELPER,
        f"{CONVERT} --drop tokens, or minipeft merge",
    ),
    Rule(
        "keys",
        facts.holds(Kind.START, Kind.MAGNITUDE, Kind.BIAS, Kind.SAVED),
        Takes.NO,
        "is an unsupported LoRA weight",
        NAMES,
        CONVERT,
    ),
    Rule(
        "copies",
        facts.holds(Kind.COPY, but=TABLES),
        Takes.NO,
        "is an unsupported LoRA weight",
        NAMES,
        f"{CONVERT} --drop modules_to_save",
    ),
    Rule("adapter name", facts.with_adapter_name, Takes.NO, "is an unsupported LoRA weight", NAMES, CONVERT),
    Rule(
        "wrappers",
        facts.with_wrappers,
        Takes.NO,
        "is no module there",
        LOADING,
        "load it with minipeft and save it again",
    ),
    Rule("scaling", facts.scaled_otherwise(scaling), Takes.PARTLY, "reads neither pattern", HELPER, CONVERT),
    Rule(
        "matrices",
        facts.more_than_matrices,
        Takes.NO,
        "has no LoRA layer there",
        "vllm/lora/utils.py (get_supported_lora_modules), commit 0fd1570",
        "minipeft merge",
    ),
    Rule(
        "experts",
        facts.experts,
        Takes.NOTE,
        "is read for models whose experts vLLM keeps in one tensor (is_3d_moe_weight)",
        "vllm/lora/lora_model.py (from_local_checkpoint), commit 0306474",
        CONVERT,
    ),
    Rule(
        "max rank",
        facts.rank_above(MAX_RANK),
        Takes.NOTE,
        f"is above the default of {MAX_RANK}: start the server with --max-lora-rank",
        HELPER,
    ),
)

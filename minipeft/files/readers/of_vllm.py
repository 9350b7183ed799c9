"""What vLLM reads: ``--enable-lora``."""

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
    SILENTLY,
    WITHOUT_MODULES,
    WITHOUT_TOKENS,
    Rule,
    plain_lora,
)

VERSION = "vLLM 0.20.2 (commit bc150f5)"
HELPER = f"vllm/lora/peft_helper.py (PEFTHelper), {VERSION}"
NAMES = f"vllm/lora/utils.py (parse_fine_tuned_lora_name), {VERSION}"
LOADING = f"vllm/lora/lora_model.py (from_lora_tensors), {VERSION}"
MANAGER = f"vllm/lora/model_manager.py, {VERSION}"
UNSUPPORTED = "is an unsupported LoRA weight"
MAX_RANK, LARGEST_RANK = 16, 512
TABLES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


def scaling(contents: Contents, module: str) -> float:
    """What vLLM multiplies an update with: of the top-level options, rsLoRA included."""
    r = contents.config.get("r", 8) if contents.config.get("use_rslora") is True else 1
    return facts.alpha_over_r(contents, module) * (math.sqrt(r) if isinstance(r, int) and 0 < r <= MAX_NUMBER else 1)


def rank_above(limit: int) -> facts.Applies:
    """Some rank is larger than this."""

    def applies(contents: Contents) -> str | None:
        ranks = [rank for rank in (facts.rank_in_file(contents, module) for module in contents.layers) if rank]
        most = max([*ranks, *[r for r in [contents.config.get("r")] if isinstance(r, int)]], default=0)
        return f"rank {most}" if most > limit else None

    return applies


RULES = (
    *plain_lora(LOADING, HELPER),
    Rule("dora", facts.is_set("use_dora"), NO, "is refused", HELPER, MERGE),
    Rule("modules_to_save", facts.is_set("modules_to_save"), NO, "is refused", HELPER, WITHOUT_MODULES),
    Rule("bias", facts.is_set("bias", but=("none",)), NO, "is refused", HELPER, MERGE),
    Rule("tokens", facts.holds(Kind.TOKENS), NO, f"{UNSUPPORTED}; later versions may take it with --max-lora-trainable-tokens",
         NAMES, WITHOUT_TOKENS),
    Rule("keys", facts.holds(Kind.START, Kind.MAGNITUDE, Kind.BIAS, Kind.SAVED), NO, UNSUPPORTED, NAMES, CONVERT),
    Rule("copies", facts.holds(Kind.COPY, but=TABLES), NO, UNSUPPORTED, NAMES, f"{CONVERT} --drop modules_to_save"),
    Rule("adapter name", facts.with_adapter_name, NO, UNSUPPORTED, NAMES, CONVERT),
    Rule("wrappers", facts.with_wrappers, PARTLY, f"is no module there, and {SILENTLY}", f"{MANAGER} (activate_adapter)",
         SAVE_AGAIN),
    Rule("scaling", facts.scaled_otherwise(scaling), PARTLY, "reads neither pattern", HELPER, CONVERT),
    Rule("matrices", facts.more_than_matrices, NO, "has no LoRA layer there",
         f"vllm/lora/utils.py (get_supported_lora_modules), {VERSION}", MERGE),
    Rule("experts", facts.experts, PARTLY,
         "is read as GPT-OSS's, whose gate and up alternate, unless vLLM keeps the experts of the model in one tensor",
         f"{MANAGER} (_stack_moe_lora_weights), vllm/model_executor/models (is_3d_moe_weight)", CONVERT),
    Rule("vision", facts.vision, PARTLY,
         "is left out, unless the server has --enable-tower-connector-lora and the model supports that",
         f"{MANAGER} (_maybe_init_mm)", MERGE),
    Rule("largest rank", rank_above(LARGEST_RANK), NO, f"is above {LARGEST_RANK}, the largest --max-lora-rank",
         f"vllm/config/lora.py (MaxLoRARanks), {VERSION}", MERGE),
    Rule("max rank", rank_above(MAX_RANK), NOTE,
         f"is above the default of {MAX_RANK}: start the server with --max-lora-rank", HELPER),
)  # fmt: skip

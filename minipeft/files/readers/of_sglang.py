"""What SGLang reads: ``--enable-lora``."""

from __future__ import annotations

import os
import re

from minipeft.files.readers import facts
from minipeft.files.readers.contents import Contents
from minipeft.files.readers.keys import Kind
from minipeft.files.readers.rules import (
    CONVERT,
    MERGE,
    NO,
    NOTE,
    PARTLY,
    SILENTLY,
    WITHOUT_MODULES,
    WITHOUT_TOKENS,
    Rule,
    plain_lora,
)

CONFIG = "sglang/srt/lora/lora_config.py (LoRAConfig), SGLang 0.5.23"
ADAPTER = "sglang/srt/lora/lora.py (LoRAAdapter), SGLang 0.5.23"
MANAGER = "sglang/srt/lora/lora_manager.py, SGLang 0.5.23"
POOL = "sglang/srt/lora/mem_pool.py (load_lora_weight_tensor), SGLang 0.5.23"
TARGETS = "sglang/srt/lora/utils.py (get_normalized_target_modules), SGLang 0.5.23"
TABLES = ("embed_tokens", "lm_head")
_LAYER = re.compile(r"layers\.\d+\.")


def pattern_targets(contents: Contents) -> str | None:
    """``target_modules`` is an expression."""
    targets = contents.config.get("target_modules")
    short = isinstance(targets, str) and targets in ("all", "all-linear")
    return None if isinstance(targets, list) or short else f"target_modules = {targets!r}"


def outside_layers(contents: Contents) -> str | None:
    """Adapted modules that are neither in a numbered layer nor one of the two tables."""
    names = [m for m in contents.layers if not _LAYER.search(f"{m}.") and m.rpartition(".")[2] not in TABLES]
    return facts.one_of(names, ", which is in no layers.N,")


def vision_layers(contents: Contents) -> str | None:
    """A numbered layer of another part than the language model is adapted."""
    names = (m for m in contents.layers if _LAYER.search(f"{m}.") and not facts.VISION.isdisjoint(m.split(".")))
    return next(names, None)


def added_tokens(contents: Contents) -> str | None:
    """A tokenizer that was saved along has tokens of its own."""
    return "added_tokens.json" if os.path.isfile(contents.directory / "added_tokens.json") else None


def mixed_ranks(contents: Contents) -> str | None:
    """Some layer has another rank than the top-level option says."""
    r = contents.config.get("r", 8)
    names = [module for module in contents.layers if facts.rank_in_file(contents, module) not in (None, r)]
    return facts.one_of(names, f" of another rank than r = {r}") if contents.is_plain_lora else None


def without_siblings(stacked: tuple[str, ...], needed: tuple[str, ...]) -> facts.Applies:
    """One of the `stacked` layers is adapted, and one of those `needed` next to it is not; the names end in these."""

    def applies(contents: Contents) -> str | None:
        names = contents.layers.keys()
        for module in names:
            parent, dot, last = module.rpartition(".")
            missing = [name for name in needed if f"{parent}{dot}{name}" not in names] if last in stacked else []
            if missing:
                return f"{module} without {missing[0]}"
        return None

    return applies


RULES = (
    *plain_lora(ADAPTER, CONFIG),
    Rule("dora", facts.is_set("use_dora"), NO, "is refused", MANAGER, MERGE),
    Rule("targets", pattern_targets, NO, "is refused: a list of names is needed", TARGETS, CONVERT),
    Rule("ranks", mixed_ranks, NO, "does not fit its buffer", POOL, CONVERT),
    Rule("scaling", facts.scaled_otherwise(facts.alpha_over_r), PARTLY, "reads lora_alpha / r only", ADAPTER, CONVERT),
    Rule("start", facts.holds(Kind.START), NO, "takes the place of the factor itself", POOL, CONVERT),
    Rule("bias", facts.holds(Kind.BIAS, Kind.MAGNITUDE), NO, "takes the place of a factor", POOL, "minipeft merge"),
    Rule("modules_to_save", facts.holds(Kind.SAVED, Kind.COPY), PARTLY, f"{SILENTLY}, or refused inside of a layer", ADAPTER,
         WITHOUT_MODULES),
    Rule("tokens", facts.holds(Kind.TOKENS), PARTLY, SILENTLY, ADAPTER, WITHOUT_TOKENS),
    Rule("outside", outside_layers, PARTLY, SILENTLY, ADAPTER, MERGE),
    Rule("vision", vision_layers, NO, "would be taken for a layer of the language model, as only its number is read", ADAPTER,
         MERGE),
    Rule("stacked", without_siblings(("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")), NO, "cannot be stacked",
         f"{ADAPTER}.normalize_qkv_proj", MERGE),
    Rule("gate", without_siblings(("up_proj",), ("gate_proj",)), NOTE, "is refused for models that have one",
         f"{ADAPTER}.normalize_gate_up_proj", MERGE),
    Rule("experts", facts.experts, NO, "has another layout there: one update an expert", POOL, CONVERT),
    Rule("matrices", facts.more_than_matrices, NO, "has no LoRA layer there", POOL, MERGE),
    Rule("mla", without_siblings(("kv_a_proj_with_mqa",), ("q_a_proj",)), NO, "has no buffer",
         f"{ADAPTER}.normalize_fused_qkv_a_proj", MERGE),
    Rule("added_tokens", added_tokens, NOTE, "makes it refuse the adapter if it names a token beyond the base's vocabulary",
         MANAGER, "take the file out if the base has these tokens, else minipeft merge"),
)  # fmt: skip

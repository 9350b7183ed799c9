"""What ``adapter_config.json`` meant to PEFT before version 0.14, in the words of today.

A file of that time does not name its version. But PEFT writes all of its options, and ``exclude_modules`` came with 0.14.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RANK, ALPHA = "rank_pattern", "alpha_pattern"
OPTIONS = {"LORA": ("r", "lora_alpha"), "LOHA": ("r", "alpha"), "LOKR": ("r", "alpha")}  # which the tables set


def in_todays_words(values: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a file as PEFT 0.14 and newer would have written them; those of a newer one as they are.

    The first key of either table that fitted a layer decided in both: where the other table did not have it, that option
    was the one for all layers. LoKr did not scale its update, whatever alpha said.
    """
    said = dict(values)
    method = said.get("peft_type")
    if "layers_pattern" not in said or "exclude_modules" in said or method not in OPTIONS:
        return said
    rank, alpha = OPTIONS[method]
    ranks, alphas = said.get(RANK) or {}, said.get(ALPHA) or {}
    if not {rank, alpha} <= said.keys() or not isinstance(ranks, Mapping) or not isinstance(alphas, Mapping):
        return said
    if ranks and alphas:
        keys = dict.fromkeys((*ranks, *alphas))
        said[RANK] = {key: ranks.get(key, said[rank]) for key in keys}
        said[ALPHA] = {key: alphas.get(key, said[alpha]) for key in keys}
    if method == "LOKR":
        said |= {alpha: said[rank], ALPHA: said.get(RANK)}
    return {**said, "exclude_modules": None}


def has_another_series(values: Mapping[str, Any]) -> bool:
    """Whether it is OFT by a series that PEFT 0.18, the first to name its version in a file, has changed in its last term."""
    return values.get("peft_type") == "OFT" and bool(values.get("use_cayley_neumann")) and "peft_version" not in values

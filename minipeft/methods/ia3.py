"""(IA)^3: learned vectors that scale activations (Liu et al., 2022, arXiv:2205.05638)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config import AdapterConfig, flag, names_or_regex
from minipeft.layers.base import LayerOps
from minipeft.methods.base import Adapter
from minipeft.patterns import full_matches, is_suffix
from minipeft.registry import register_method

# Target modules and, of those, feedforward modules by model_type, as in PEFT: keys, values, and what leads out of the
# feedforward block.
DEFAULTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "t5": (("k", "v", "wo"), ("wo",)),
    "mt5": (("k", "v", "wi_1"), ()),
    "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "gpt_bigcode": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "bloom": (("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)),
    "roberta": (("key", "value", "output.dense"), ("output.dense",)),
    "bert": (("key", "value", "output.dense"), ("output.dense",)),
    "deberta-v2": (("key_proj", "value_proj", "output.dense"), ("output.dense",)),
    "deberta": (("in_proj", "output.dense"), ("output.dense",)),
    "opt": (("q_proj", "k_proj", "fc2"), ("fc2",)),
    "bart": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "phi": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "gptj": (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
    "gpt_neo": (("q_proj", "v_proj", "c_proj"), ("c_proj",)),
    "gpt_neox": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "falcon": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "mixtral": (("k_proj", "v_proj", "w2"), ("w2",)),
    "llama": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "mistral": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    **dict.fromkeys(
        ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
        (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    ),
}
EVERY: str = ".*"  # stands for "this module is one", where the configuration is that of one module


def _regex(suffixes: Sequence[str]) -> str:
    return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, suffixes))})"


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """(IA)^3's options, on top of `AdapterConfig`'s; names, meanings and defaults are PEFT's.

    Args:
        feedforward_modules: suffixes, or one regular expression, for those of the target modules whose input is scaled
            instead of their output; ``[]`` for none of them. None: the default of the model's ``model_type``, or none.
        init_ia3_weights: True: vectors of ones, which leave the model as it is. False: normal ones (for tests).
        fan_in_fan_out: accepted for PEFT's sake and ignored, since the layer knows its own orientation.
    """

    method: ClassVar[str] = "ia3"
    not_in_files: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    feedforward_modules: Sequence[str] | str | None = None
    init_ia3_weights: bool = True
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.feedforward_modules
        none = isinstance(given, list | tuple | set | frozenset) and not given
        self._set("feedforward_modules", () if none else names_or_regex("feedforward_modules", given))
        flag("init_ia3_weights", self.init_ia3_weights)
        flag("fan_in_fan_out", self.fan_in_fan_out)

    @property
    def is_feedforward(self) -> bool:
        """Of the configuration of one module (see `for_modules`): whether its input is scaled."""
        return self.feedforward_modules == EVERY

    def for_model_type(self, model_type: str | None) -> Self:
        targets, feedforward = DEFAULTS.get(model_type or "", (None, ()))
        return replace(
            self,
            target_modules=targets if self.target_modules is None else self.target_modules,
            # A regular expression may fit none of the targets, as a default may.
            feedforward_modules=(_regex(feedforward) if feedforward else ())
            if self.feedforward_modules is None
            else self.feedforward_modules,
        )

    def for_modules(self, names: Sequence[str]) -> dict[str, Self]:
        scaled_in = set(self._feedforward(names))
        either = {inside: replace(self, feedforward_modules=EVERY if inside else ()) for inside in (True, False)}
        return {name: either[name in scaled_in] for name in names}

    def _feedforward(self, names: Sequence[str]) -> list[str]:
        patterns = self.feedforward_modules or ()
        if isinstance(patterns, str):
            return full_matches(patterns, names, "feedforward_modules")
        return [name for name in names if any(is_suffix(entry, name) for entry in patterns)]

    def unused_options(self, names: Sequence[str]) -> list[str]:
        patterns = self.feedforward_modules or ()
        if isinstance(patterns, str):
            default = any(patterns == _regex(suffixes) for _, suffixes in DEFAULTS.values() if suffixes)
            return [] if default or self._feedforward(names) else [f"feedforward_modules: {patterns}"]
        return [f"feedforward_modules: {e}" for e in patterns if not any(is_suffix(e, name) for name in names)]


@register_method("ia3")
class IA3(Adapter):
    """y = l * (W x + b), or y = W (l * x) + b for a feedforward module; section 3.3 of arXiv:2205.05638.

    `ia3_l` is (out, 1), or (1, in) for a feedforward module. The output is scaled with its bias, as in PEFT, and so is
    the bias in a merge.
    """

    config_class = IA3Config

    def __init__(self, base: nn.Module, ops: LayerOps, config: IA3Config, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        self.is_feedforward, self.is_embedding = config.is_feedforward, ops.is_embedding
        shape = (1, ops.in_features(base)) if self.is_feedforward else (ops.shape(base)[0], 1)
        self.ia3_l = nn.Parameter(ops.read_weight(base).new_ones(shape))
        if not config.init_ia3_weights:
            nn.init.normal_(self.ia3_l)

    def before(self, base: nn.Module, ops: LayerOps, x: Tensor) -> Tensor:
        # Multiplied in the wider dtype and rounded once: near 1 a half-precision vector could hardly move.
        outside = not self.is_feedforward or self.is_embedding
        return x if outside else (x * ops.per_feature(base, self.ia3_l.flatten())).to(x.dtype)

    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Any) -> Tensor:
        if not self.is_feedforward:
            y = (y * ops.per_feature(base, self.ia3_l.flatten())).to(y.dtype)
        elif self.is_embedding:  # a one-hot input scaled is the looked-up column scaled
            y = (y * ops.project_in(base, x, self.ia3_l)).to(y.dtype)
        assert isinstance(y, Tensor)
        return y

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.ia3_l.detach().to(weight.dtype)
        if self.is_feedforward:
            return weight * scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1), bias
        return weight * scale, None if bias is None else bias * scale.flatten().to(bias.dtype)

    def changes_nothing(self) -> bool:
        return bool((self.ia3_l == 1).all())

    @classmethod
    def file_options(cls, values: Mapping[str, Any], adapters: Mapping[str, Self]) -> dict[str, Any]:
        """As they are, where PEFT reads them alike; it wants a subset of its targets, and goes by the end of a name."""
        entries, targets = values["feedforward_modules"] or [], values["target_modules"]
        ours = {name for name, adapter in adapters.items() if adapter.is_feedforward}
        if isinstance(entries, str) or (
            (isinstance(targets, str) or set(entries) <= set(targets))
            and ours == {name for name in adapters if any(name.endswith(entry) for entry in entries)}
        ):
            return {"feedforward_modules": entries}
        return {"feedforward_modules": "|".join(map(re.escape, sorted(ours)))}

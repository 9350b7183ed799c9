"""(IA)^3: learned vectors that scale activations (Liu et al., 2022, arXiv:2205.05638)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.options import names_or_regex
from minipeft.config.patterns import endings, selected
from minipeft.layers.base import LayerOps
from minipeft.methods.base import Adapter
from minipeft.registry.registry import default_targets, register_method, register_targets

# Target modules and which of them are feedforward modules, by model_type, as in PEFT: keys, values, and the way out of
# the feedforward block.
DEFAULTS: tuple[tuple[str, list[str], list[str]], ...] = (
    ("t5", ["k", "v", "wo"], ["wo"]),
    ("mt5", ["k", "v", "wi_1"], []),
    ("gpt2 gpt_bigcode", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    ("bloom", ["query_key_value", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]),
    ("roberta bert", ["key", "value", "output.dense"], ["output.dense"]),
    ("deberta-v2", ["key_proj", "value_proj", "output.dense"], ["output.dense"]),
    ("deberta", ["in_proj", "output.dense"], ["output.dense"]),
    ("opt", ["q_proj", "k_proj", "fc2"], ["fc2"]),
    ("bart phi", ["q_proj", "v_proj", "fc2"], ["fc2"]),
    ("gptj", ["q_proj", "v_proj", "fc_out"], ["fc_out"]),
    ("gpt_neo", ["q_proj", "v_proj", "c_proj"], ["c_proj"]),
    ("gpt_neox falcon", ["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    ("mixtral", ["k_proj", "v_proj", "w2"], ["w2"]),
    ("llama mistral", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    ("llama4 gemma gemma2 gemma3_text qwen2 qwen3", ["q_proj", "v_proj", "down_proj"], ["down_proj"]),
)
EVERY: str = ".*"  # as feedforward_modules of the configuration of one module: this module is one


def _regex(suffixes: Sequence[str]) -> str:
    """The modules with these suffixes. Unlike a list of them, a regular expression may match none of the targets."""
    return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, suffixes))})"


for _model_types, _targets, _feedforward in DEFAULTS:
    for _model_type in _model_types.split():
        register_targets(_model_type, _targets, method="ia3")
        if _feedforward:
            register_targets(_model_type, _regex(_feedforward), method="ia3", option="feedforward_modules")


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """(IA)^3's options, on top of `AdapterConfig`'s; names, meanings and defaults are PEFT's.

    Args:
        feedforward_modules: suffixes, or one regular expression, for those of the target modules whose input is scaled
            instead of their output; ``[]`` for none of them. None: the default of the model's ``model_type``, or none.
        init_ia3_weights: True: vectors of ones, which leave the model as it is. False: normal ones (for tests).
        fan_in_fan_out: accepted for compatibility with PEFT and ignored: the layer knows its own orientation.
    """

    method: ClassVar[str] = "ia3"
    empty_in_files = frozenset({"target_modules", "feedforward_modules"})
    not_in_files: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    feedforward_modules: Sequence[str] | str | None = None
    init_ia3_weights: bool = True
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.feedforward_modules
        none = isinstance(given, list | tuple | set | frozenset) and not given
        self._set("feedforward_modules", () if none else names_or_regex("feedforward_modules", given))

    @property
    def is_feedforward(self) -> bool:
        """Of the configuration of one module (see `for_modules`): whether its input is scaled."""
        return self.feedforward_modules == EVERY

    def for_modules(self, names: Sequence[str]) -> dict[str, Self]:
        scaled_in = set(self._feedforward(names))
        either = {inside: replace(self, feedforward_modules=EVERY if inside else ()) for inside in (True, False)}
        return {name: either[name in scaled_in] for name in names}

    def _feedforward(self, names: Sequence[str]) -> list[str]:
        return selected(self.feedforward_modules or (), names, "feedforward_modules")

    def unused_options(self, names: Sequence[str]) -> list[str]:
        patterns = self.feedforward_modules or ()
        if isinstance(patterns, str):
            is_default = patterns in default_targets("ia3", "feedforward_modules").values()
            return [] if is_default or self._feedforward(names) else [f"feedforward_modules: {patterns}"]
        used = {ending for name in names for ending in endings(name)}
        return [f"feedforward_modules: {entry}" for entry in patterns if entry not in used]


@register_method("ia3")
class IA3(Adapter):
    """y = l * (W x + b), or y = W (l * x) + b for a feedforward module; section 3.3 of arXiv:2205.05638.

    `ia3_l` is (out, 1), or (1, in) for a feedforward module; in a convolution (1, out, 1, ...) or (1, in, 1, ...). The output
    is scaled with its bias, as in PEFT, and so is the bias in a merge.
    """

    config_class = IA3Config

    def __init__(self, base: nn.Module, ops: LayerOps, config: IA3Config, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        self.is_feedforward, self.is_embedding = config.is_feedforward, ops.is_embedding
        features = ops.in_features(base) if self.is_feedforward else ops.shape(base)[0]
        scale = ops.per_feature(base, ops.read_weight(base).new_ones(features))
        is_column = not self.is_feedforward and scale.ndim == 1
        self.ia3_l = nn.Parameter(scale.unsqueeze(1 if is_column else 0))
        if not config.init_ia3_weights:
            nn.init.normal_(self.ia3_l)

    def before(self, base: nn.Module, ops: LayerOps, x: Tensor) -> Tensor:
        # Multiplied in the wider dtype and rounded once: near 1 a half-precision vector could hardly move.
        outside = not self.is_feedforward or self.is_embedding
        return x if outside else (x * ops.per_feature(base, self.ia3_l.flatten())).to(x.dtype)

    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Any) -> Tensor:
        if not self.is_feedforward:
            y = (y * ops.per_feature(base, self.ia3_l.flatten())).to(y.dtype)
        elif self.is_embedding:  # scaling a one-hot input scales the column it selects
            y = (y * ops.project_in(base, x, self.ia3_l)).to(y.dtype)
        assert isinstance(y, Tensor)
        return y

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.ia3_l.flatten().to(weight.dtype)
        if self.is_feedforward:
            return weight * scale.repeat_interleave(weight.shape[1] // len(scale)), bias
        return weight * scale.unsqueeze(1), None if bias is None else bias * scale.to(bias.dtype)

    @classmethod
    def file_options(cls, values: Mapping[str, Any], adapters: Mapping[str, Self], compact: bool) -> dict[str, Any]:
        """`feedforward_modules` so that PEFT reads it as we do.

        PEFT wants a subset of the target modules, and compares the ends of names without regard to dots.
        """
        entries, targets = values["feedforward_modules"] or [], values["target_modules"]
        ours = {name for name, adapter in adapters.items() if adapter.is_feedforward}
        if isinstance(entries, str) or (
            (isinstance(targets, str) or set(entries) <= set(targets))
            and ours == {name for name in adapters if any(name.endswith(entry) for entry in entries)}
        ):
            return {"feedforward_modules": entries}
        return {"feedforward_modules": "|".join(map(re.escape, sorted(ours)))}

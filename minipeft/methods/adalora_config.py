"""The options of AdaLoRA, and its schedule of ranks (Zhang et al., 2023, arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from typing_extensions import Self

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.options import MAX_RANK, alpha, integer, number, one_of, rank
from minipeft.errors import ConfigError, told
from minipeft.registry.registry import register_targets

MAX_STEPS = 2**53
RANKS_SUFFIX = ".lora_E"  # ends the keys of rank_pattern
for _model_type, _patterns in {  # PEFT's, which differ from LoRA's
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "roberta": ["query", "key", "value", "dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
}.items():
    register_targets(_model_type, _patterns, method="adalora")


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(AdapterConfig):
    """AdaLoRA's options, on top of `AdapterConfig`'s; names, meanings and defaults are PEFT's.

    Training has three phases: `tinit` steps at the full rank; then the mean rank goes down, as a cube, from `init_r` to
    `target_r`; then `tfinal` steps at fixed ranks. `minipeft.hf.AdapterTrainer` and
    `minipeft.training.updates.Updater` do this; in a loop of your own, call `minipeft.after_step` in every step and add
    `minipeft.extra_loss` to the loss.

    Args:
        init_r, target_r: rank of every update at first, and mean rank at the end.
        total_step: number of optimizer steps of the training; must be given.
        tinit, tfinal: steps before and after the ranks go down.
        deltaT: steps from one allocation to the next.
        beta1, beta2: decay of the running means of sensitivity and uncertainty.
        orth_reg_weight: factor of the loss that keeps P and Q orthogonal.
        lora_alpha: the update is scaled by ``lora_alpha / init_r``.
        lora_dropout: as LoRA's.
        rank_pattern: ``"<module>.lora_E"`` -> which of the `init_r` components are left; the module gets only these.
            Written when the ranks are final.
        init_lora_weights: False: Lambda random too, so the model differs from the base at once (for tests).
        r, bias, fan_in_fan_out: accepted for compatibility with PEFT: ignored, "none" only, and ignored.
    """

    method: ClassVar[str] = "adalora"
    null_in_files = frozenset(
        {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "lora_dropout", "r"}
    )

    init_r: int = 12
    target_r: int = 8
    total_step: int | None = None
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    rank_pattern: Mapping[str, Sequence[bool]] | None = field(default=None)
    init_lora_weights: bool = True
    r: int = 8
    bias: str = "none"
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("init_r", "target_r", "r"):
            rank(name, getattr(self, name))
        if self.total_step is None:
            raise ConfigError(
                "total_step must be given: the number of optimizer steps, which the schedule is made for."
            )
        integer("total_step", self.total_step, at_least=1, at_most=MAX_STEPS)
        for name in ("tinit", "tfinal"):
            integer(name, getattr(self, name), at_least=0, at_most=MAX_STEPS)
        integer("deltaT", self.deltaT, at_least=1, at_most=MAX_STEPS)
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"tinit = {self.tinit} and tfinal = {self.tfinal} leave none of the total_step = {self.total_step} steps "
                "for reducing ranks; make them smaller."
            )
        if self.target_r > self.init_r:
            raise ConfigError(f"target_r = {self.target_r} exceeds init_r = {self.init_r}, and ranks only go down.")
        for name in ("beta1", "beta2"):
            number(name, getattr(self, name), above=0, below=1)
        number("orth_reg_weight", self.orth_reg_weight, at_least=0)
        alpha("lora_alpha", self.lora_alpha)
        number("lora_dropout", self.lora_dropout, at_least=0, below=1)
        one_of("bias", self.bias, ("none",))
        if self.rank_pattern is not None:
            self._set("rank_pattern", _checked_pattern(self.rank_pattern, self.init_r))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """PEFT notices a `target_r` above `init_r` only when it allocates ranks; a file that it wrote stays at `init_r`."""
        init_r, target_r = values.get("init_r", cls.init_r), values.get("target_r", cls.target_r)
        above = type(init_r) is type(target_r) is int and 1 <= init_r < target_r <= MAX_RANK
        return super().from_dict({**values, "target_r": init_r} if above else values)

    @property
    def kept(self) -> tuple[bool, ...]:
        """In the configuration of one module (see `for_modules`): which of the `init_r` components are left."""
        (kept,) = (self.rank_pattern or {"": (True,) * self.init_r}).values()
        return tuple(kept)

    def for_modules(self, names: Sequence[str]) -> dict[str, Self]:
        given, whole = self.rank_pattern or {}, replace(self, rank_pattern=None)
        own = {name: given.get(name + RANKS_SUFFIX) for name in names}
        return {name: whole if kept is None else replace(self, rank_pattern={"": kept}) for name, kept in own.items()}

    def unused_options(self, names: Sequence[str]) -> list[str]:
        known = {name + RANKS_SUFFIX for name in names}
        return [f"rank_pattern: {key}" for key in self.rank_pattern or () if key not in known]

    def budget(self, step: int, start: int, target: int) -> tuple[int, bool]:
        """How many components all modules together have after a step, and whether to allocate them now; eq. (19)."""
        assert self.total_step is not None
        if step <= self.tinit:
            return start, False
        end = self.total_step - self.tfinal
        if step > end:
            return target, True
        rest = 1 - (step - self.tinit) / (end - self.tinit)
        return int((start - target) * rest**3 + target), step == end or step % self.deltaT == 0


def _checked_pattern(given: object, init_r: int) -> dict[str, tuple[bool, ...]]:
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"rank_pattern must map '<module>{RANKS_SUFFIX}' to lists of booleans, not {told(given, 100)}."
        )
    for key, kept in given.items():
        right = isinstance(kept, list | tuple) and len(kept) == init_r and all(isinstance(k, bool) for k in kept)
        if not isinstance(key, str) or not right:
            raise ConfigError(
                f"rank_pattern[{told(key)}] must be a list of init_r = {init_r} booleans, not {told(kept, 100)}."
            )
    return {key: tuple(kept) for key, kept in given.items()}

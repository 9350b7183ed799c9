"""AdaLoRA: updates in the form of an SVD, whose rank is spent where it matters (Zhang et al., 2023, arXiv:2303.10512)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config import AdapterConfig, flag, integer, number, one_of
from minipeft.errors import CheckpointError, ConfigError, StateError, shown, told
from minipeft.kernels.functional import is_column_major, lora_factors, low_rank_product
from minipeft.layers.base import LayerOps
from minipeft.methods.base import Adapter
from minipeft.methods.low_rank import low_rank_forward
from minipeft.registry import register_method

MAX_RANK, MAX_STEPS = 2**16, 2**53
RANKS_SUFFIX = ".lora_E"  # ends the keys of rank_pattern
MEANS = ("sensitivity", "uncertainty")
UNSCHEDULED_CHANGES = 3  # after which it is said that nobody calls `after_step`
# Default target modules by model_type where PEFT's are others than LoRA's.
DEFAULTS = {
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "roberta": ("query", "key", "value", "dense"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
}


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(AdapterConfig):
    """AdaLoRA's options, on top of `AdapterConfig`'s; names, meanings and defaults are PEFT's.

    Training has three phases: `tinit` steps at the full rank; then the mean rank goes down, as a cube, from `init_r` to
    `target_r`; then `tfinal` steps with the ranks as they are. `minipeft.hf.AdapterTrainer` and
    `minipeft.training.updates.Updater` see to it; in a loop of your own call `minipeft.after_step` in every step and
    add `minipeft.extra_loss` to the loss.

    Args:
        init_r, target_r: rank of every update at first, and in the mean at the end.
        total_step: number of optimizer steps of the training; must be given.
        tinit, tfinal: steps before and after the ranks go down.
        deltaT: steps from one allocation to the next.
        beta1, beta2: how much of the past the means of sensitivity and uncertainty keep.
        orth_reg_weight: factor of the loss that keeps P and Q orthogonal.
        lora_alpha: the update is scaled by ``lora_alpha / init_r``.
        lora_dropout: as LoRA's.
        rank_pattern: ``"<module>.lora_E"`` -> for each of the `init_r` components whether it was kept; such a module
            gets the kept ones only. Written when the ranks are final.
        init_lora_weights: False: Lambda random too, so the model differs from the base at once (for tests).
        r, bias, fan_in_fan_out: accepted for PEFT's sake: ignored, "none" only, and ignored.
    """

    method: ClassVar[str] = "adalora"

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
            integer(name, getattr(self, name), at_least=1, at_most=MAX_RANK)
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
        number("lora_alpha", self.lora_alpha, above=0)
        number("lora_dropout", self.lora_dropout, at_least=0, below=1)
        one_of("bias", self.bias, ("none",))
        flag("init_lora_weights", self.init_lora_weights)
        flag("fan_in_fan_out", self.fan_in_fan_out)
        if self.rank_pattern is not None:
            self._set("rank_pattern", _checked_pattern(self.rank_pattern, self.init_r))

    @property
    def kept(self) -> tuple[bool, ...]:
        """Of the configuration of one module (see `for_modules`): which of the `init_r` components it still has."""
        (kept,) = (self.rank_pattern or {"": (True,) * self.init_r}).values()
        return tuple(kept)

    def for_model_type(self, model_type: str | None) -> Self:
        targets = DEFAULTS.get(model_type or "") if self.target_modules is None else None
        return self if targets is None else replace(self, target_modules=targets)

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


@register_method("adalora")
class AdaLora(Adapter):
    """y = W x + b + lora_alpha / init_r * P Lambda Q dropout(x), eq. (3) of arXiv:2303.10512.

    P is `lora_B` (out, r), Q is `lora_A` (r, in), and Lambda the diagonal `lora_E` (r, 1), which starts at zero. A
    component that is taken away has its value in Lambda at zero; a file holds those that are left.
    """

    config_class = AdaLoraConfig
    runs_base = True
    left: Tensor | None

    def __init__(self, base: nn.Module, ops: LayerOps, config: AdaLoraConfig, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        (out_features, in_features), weight = ops.shape(base), ops.read_weight(base)
        self.kept = config.kept  # of the init_r components, those that this adapter was made with
        self.scaling = config.lora_alpha / (config.init_r + 1e-5)  # PEFT's divisor, and always that of the start
        self.beta1, self.beta2 = config.beta1, config.beta2
        self.dropout = config.lora_dropout
        r = sum(self.kept)
        self.lora_A = nn.Parameter(weight.new_empty(r, in_features))
        self.lora_E = nn.Parameter(weight.new_empty(r, 1))
        self.lora_B = nn.Parameter(weight.new_empty(out_features, r))
        std = 0.02 if config.init_lora_weights else 1.0
        for factor in (self.lora_A, self.lora_B):
            nn.init.normal_(factor, std=std)
        nn.init.zeros_(self.lora_E) if config.init_lora_weights else nn.init.normal_(self.lora_E)
        # What training knows: the last step that `after_step` was called for; which components were left at the last
        # allocation, shape (r,); and the running means of every parameter's sensitivity and uncertainty, by its name.
        self.step = -1
        self.register_buffer("left", None, persistent=False)
        self.means: dict[str, tuple[Tensor, Tensor]] = {}
        self.seen = (
            0,
            0,
            0.0,
        )  # training passes, how often one found another Lambda, and the sum of the last one found

    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Tensor | None) -> Tensor:
        if self.training and self.step < 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._miss_schedule()
        dropout, down = self.dropout if self.training else 0.0, self.lora_A * self.lora_E
        return low_rank_forward(base, ops, x, y, down, self.lora_B, self.scaling, dropout)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta(weight).to(weight.dtype), bias

    def factors(self) -> tuple[Tensor, Tensor]:
        return lora_factors(self.lora_A.detach() * self.lora_E.detach(), self.lora_B.detach(), self.scaling)

    def delta(self, weight: Tensor) -> Tensor:
        return low_rank_product(*self.factors(), column_major=is_column_major(weight))

    def changes_nothing(self) -> bool:
        return not (self.lora_E.any() and self.lora_A.any() and self.lora_B.any())

    # ------------------------------------------------------------------------------------------------- rank allocation
    @classmethod
    def after_step(cls, adapters: Mapping[str, Self], config: AdaLoraConfig, step: int) -> None:
        """Algorithm 1 of the paper, with the steps as PEFT counts them."""
        assert config.total_step is not None
        end = config.total_step - config.tfinal
        parts = list(adapters.values())
        last = max(adapter.step for adapter in parts)
        if step <= last:
            raise StateError(
                f"AdaLoRA has done step {last} already, and step {step} came. Call after_step once a step, with steps counted "
                "over the whole run; for a new run, load the saved adapter into a fresh base."
            )
        idle = [name for adapter in parts for name, p in adapter.named_parameters() if p.grad is None]
        if step < end and idle:
            raise StateError(
                f"AdaLoRA's allocation reads gradients, and {idle[0]} has none; call after_step after backward() and before "
                "zero_grad()."
            )
        for adapter in parts if step < end else ():
            adapter._notice()
        noticed = all(adapter.means for adapter in parts)
        if step == end and not noticed:
            raise StateError(f"AdaLoRA allocates at step {end}, and after_step was not called for those before it.")
        start = sum(len(adapter.lora_E) for adapter in parts)
        budget, allocates = config.budget(step, start, min(start, config.target_r * len(parts)))
        if allocates and noticed:  # beyond the end only where the step at the end itself was skipped
            _allocate(parts, budget)
        for adapter in parts:
            adapter.step = step
            if step > end:
                adapter._take_away(adapter.left if adapter.left is not None else adapter.lora_E.detach().flatten() != 0)
            if step >= end:
                adapter.means = {}

    @torch.no_grad()
    def _notice(self) -> None:
        """Running means of every parameter's sensitivity |w dL/dw| and its uncertainty; eqs. (9) to (11)."""
        for name, parameter in self.named_parameters():
            assert parameter.grad is not None
            now = (parameter * parameter.grad).abs()
            mean, unsure = self.means.get(name, (torch.zeros_like(now), torch.zeros_like(now)))
            mean = self.beta1 * mean + (1 - self.beta1) * now
            unsure = self.beta2 * unsure + (1 - self.beta2) * (now - mean).abs()
            self.means[name] = (mean, unsure)

    def _scores(self) -> Tensor:
        """Importance of each component, shape (r,): of its value, and in the mean of its vectors; eq. (8)."""
        A, E, B = (self.means[name][0] * self.means[name][1] for name in ("lora_A", "lora_E", "lora_B"))
        return E.flatten() + (A.mean(1) + B.mean(0))

    @torch.no_grad()
    def _take_away(self, left: Tensor) -> None:
        self.left = left
        self.lora_E.masked_fill_(~left.unsqueeze(1), 0.0)

    @classmethod
    def extra_loss(cls, adapters: Mapping[str, Self], config: AdaLoraConfig) -> Tensor | None:
        """How far P and Q are from orthogonal, eq. (4): mean of ``|P^T P - I|`` and ``|Q Q^T - I|``, Frobenius norms."""
        grams = [gram for a in adapters.values() for gram in (a.lora_A @ a.lora_A.t(), a.lora_B.t() @ a.lora_B)]
        norms = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]
        return config.orth_reg_weight * torch.stack([norm.to(norms[0].device) for norm in norms]).mean()

    def _miss_schedule(self) -> None:
        """Warn where the values change from pass to pass and `after_step` is never called; looks at pass 1, 2, 4, 8, ..."""
        passes, changes, last = self.seen
        now = float(self.lora_E.detach().sum()) if passes & (passes + 1) == 0 else last
        self.seen = (passes + 1, changes + (now != last), now)
        if now != last and changes + 1 == UNSCHEDULED_CHANGES:
            warnings.warn(
                "AdaLoRA trains, and nobody calls minipeft.after_step: no rank is taken away, and without "
                "minipeft.extra_loss nothing keeps P and Q orthogonal. minipeft.hf.AdapterTrainer does both.",
                stacklevel=2,
            )

    # ------------------------------------------------------------------------------------------------ going on with a run
    def training_state(self) -> dict[str, Tensor]:
        state = {} if self.step < 0 else {"step": torch.tensor(self.step)}
        state |= {} if self.left is None else {"left": self.left}
        for name, means in self.means.items():
            state |= {f"{name}.{what}": mean for what, mean in zip(MEANS, means, strict=True)}
        return state

    def check_training_state(self, state: Mapping[str, Tensor]) -> None:
        means = {f"{name}.{what}": p for name, p in self.named_parameters() for what in MEANS}
        known = {"step": torch.tensor(0), "left": torch.ones(len(self.lora_E), dtype=torch.bool)} | means
        right = all(n in known and (t.shape, t.dtype) == (known[n].shape, known[n].dtype) for n, t in state.items())
        if not right or len(state.keys() & means.keys()) not in (0, len(means)) or (state and "step" not in state):
            raise CheckpointError(f"this is of another AdaLoRA's schedule: {shown(sorted(state), 9)}.")

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        own = {name: tensor.to(self.lora_E.device) for name, tensor in state.items()}
        self.step, self.left = int(state.get("step", -1)), own.get("left")
        names = [name for name, _ in self.named_parameters() if f"{name}.{MEANS[0]}" in own]
        self.means = {name: (own[f"{name}.{MEANS[0]}"], own[f"{name}.{MEANS[1]}"]) for name in names}

    # ------------------------------------------------------------------------------------------------------------ files
    def _pattern(self) -> list[bool]:
        """Which of the `init_r` components a file need hold: all this adapter has, unless one is at zero for good."""
        has = self.lora_E.detach().flatten() != 0
        final = self.left is not None and not bool((has & ~self.left).any())
        left = iter(self.left.tolist() if final and self.left is not None else [True] * len(has))
        return [was and next(left) for was in self.kept]

    @classmethod
    def compact_options(cls, values: Mapping[str, Any], adapters: Mapping[str, Self]) -> dict[str, Any]:
        patterns = {name + RANKS_SUFFIX: adapter._pattern() for name, adapter in adapters.items()}
        return {"rank_pattern": patterns if not all(map(all, patterns.values())) else None}

    @classmethod
    def compacted(cls, tensors: dict[str, Tensor], values: Mapping[str, Any]) -> dict[str, Tensor]:
        for name, pattern in (values["rank_pattern"] or {}).items():
            prefix = min((key for key in tensors if key.endswith(f".{name}")), key=len).removesuffix(RANKS_SUFFIX)
            values_of = tensors[prefix + RANKS_SUFFIX].flatten()
            # All that is left, and of an adapter made with fewer components than init_r, what is not zero of them.
            order = torch.tensor(pattern) if len(pattern) == len(values_of) else values_of != 0
            chosen = torch.sort(torch.sort(~order, stable=True).indices[: sum(pattern)]).values
            tensors[f"{prefix}.lora_A"] = tensors[f"{prefix}.lora_A"][chosen].contiguous()
            tensors[f"{prefix}.lora_E"] = tensors[f"{prefix}.lora_E"][chosen].contiguous()
            tensors[f"{prefix}.lora_B"] = tensors[f"{prefix}.lora_B"][:, chosen].contiguous()
        return tensors


@torch.no_grad()
def _allocate(adapters: Sequence[AdaLora], budget: int) -> None:
    """Leave the `budget` most important components of all; of equals at the border, none."""
    scores = [adapter._scores() for adapter in adapters]
    device = scores[0].device
    together = torch.cat([score.to(device) for score in scores])
    below = len(together) - budget
    threshold = torch.kthvalue(together, below).values if below > 0 else together.new_full((), -1.0)  # scores are >= 0
    for adapter, score in zip(adapters, scores, strict=True):
        adapter._take_away(score > threshold.to(score.device))

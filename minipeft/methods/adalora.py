"""AdaLoRA: updates in the form of an SVD, whose rank is spent where it matters (Zhang et al., 2023, arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from minipeft.errors import CheckpointError, StateError, shown, warn
from minipeft.kernels.functional import lora_factors
from minipeft.kernels.transformed import is_transformed
from minipeft.layers.base import LayerOps
from minipeft.methods.adalora_config import RANKS_SUFFIX, AdaLoraConfig
from minipeft.methods.input_dropout import InputDropout
from minipeft.methods.low_rank import low_rank_forward
from minipeft.methods.swapping import copy_tensors, unlike
from minipeft.registry.registry import register_method

MEANS = ("sensitivity", "uncertainty")
PROGRESS = frozenset({"step", "left", "seen"})  # of a schedule: not what an adapter computes
UNSCHEDULED_CHANGES = 3  # of Lambda, after which a warning says that nothing calls `after_step`


@register_method("adalora")
class AdaLora(InputDropout):
    """y = W x + b + lora_alpha / init_r * P Lambda Q dropout(x), eq. (3) of arXiv:2303.10512.

    P is `lora_B` (out, r), Q is `lora_A` (r, in), and Lambda the diagonal `lora_E` (r, 1), which starts at zero. A removed
    component has a zero in Lambda; a file holds only those that are left.
    """

    config_class = AdaLoraConfig
    runs_base = True
    scaling: float
    left: Tensor | None

    def __init__(self, base: nn.Module, ops: LayerOps, config: AdaLoraConfig, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        (out_features, in_features), weight = ops.shape(base), ops.read_weight(base)
        self.kept = config.kept  # which of the init_r components this adapter was made with
        self.scaling = config.lora_alpha / (config.init_r + 1e-5)  # PEFT's divisor; it does not follow the rank
        self.beta1, self.beta2 = config.beta1, config.beta2
        self.drop(config.lora_dropout)
        self.rank = r = sum(self.kept)
        self.lora_A = nn.Parameter(weight.new_empty(r, in_features))
        self.lora_B = nn.Parameter(weight.new_empty(out_features, r))
        self.lora_E = nn.Parameter(weight.new_empty(r, 1))
        std = 0.02 if config.init_lora_weights else 1.0
        for factor in (self.lora_A, self.lora_B):
            nn.init.normal_(factor, std=std)
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_E)
        else:
            nn.init.normal_(self.lora_E)
        # The training state: the last step `after_step` was called for; which components were left by the last
        # allocation, shape (r,); and the running means of each parameter's sensitivity and uncertainty, by its name.
        self.step = -1
        self.register_buffer("left", None, persistent=False)
        self.means: dict[str, tuple[Tensor, Tensor]] = {}
        # Training passes, how many of them found a changed Lambda, and the sum of the Lambda last seen.
        self.seen = (0, 0, 0.0)

    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Tensor | None) -> Tensor:
        if self.training and self.step < 0 and torch.is_grad_enabled() and not is_transformed():
            self._miss_schedule()
        down = self.lora_A * self.lora_E
        return low_rank_forward(base, ops, x, y, down, self.lora_B, self.scaling, self.drops)

    def factors(self) -> tuple[Tensor, Tensor]:
        return lora_factors(self.lora_A * self.lora_E, self.lora_B, self.scaling)

    def call_factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.drops or (self.training and self.step < 0) else self.factors()

    @classmethod
    def after_step(cls, adapters: Mapping[str, Self], config: AdaLoraConfig, step: int) -> None:
        """Algorithm 1 of the paper, with steps counted as in PEFT."""
        assert config.total_step is not None
        end = config.total_step - config.tfinal
        parts = list(adapters.values())
        last = max(adapter.step for adapter in parts)
        if step <= last:
            raise StateError(
                f"AdaLoRA has done step {last} already, and step {step} came. Call after_step once per step, with steps counted "
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
        if allocates and noticed:  # after the end only if the step at the end was skipped
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
        """Importance of each component, shape (r,): that of its value plus the mean over its vectors; eq. (8)."""
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
        """Warn if the values change from pass to pass but `after_step` is never called; looks at pass 1, 2, 4, 8, ..."""
        passes, changes, last = self.seen
        now = float(self.lora_E.detach().sum()) if passes & (passes + 1) == 0 else last
        self.seen = (passes + 1, changes + (now != last), now)
        if now != last and changes + 1 == UNSCHEDULED_CHANGES:
            warn(
                "AdaLoRA trains, and nobody calls minipeft.after_step: no rank is removed, and without "
                "minipeft.extra_loss nothing keeps P and Q orthogonal. minipeft.hf.AdapterTrainer does both."
            )

    def misfit(self, other: Self) -> str:
        return unlike(self, other, PROGRESS)

    def take(self, other: Self) -> None:
        copy_tensors(self, other, PROGRESS)
        self.step, self.left, self.means, self.seen = other.step, other.left, {}, other.seen

    def training_state(self) -> dict[str, Tensor]:
        state = {} if self.step < 0 else {"step": torch.tensor(self.step, device="cpu")}
        state |= {} if self.left is None else {"left": self.left}
        for name, means in self.means.items():
            state |= {f"{name}.{what}": mean for what, mean in zip(MEANS, means, strict=True)}
        return state

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        means = {f"{name}.{what}": p for name, p in self.named_parameters() for what in MEANS}
        known = {"step": torch.tensor(0, device="cpu"), "left": torch.ones(len(self.lora_E), dtype=torch.bool)} | means
        fits = all(n in known and (t.shape, t.dtype) == (known[n].shape, known[n].dtype) for n, t in state.items())
        if not fits or len(state.keys() & means.keys()) not in (0, len(means)) or (state and "step" not in state):
            raise CheckpointError(f"this is the state of another AdaLoRA's schedule: {shown(sorted(state), 9)}.")
        own = {name: tensor.to(self.lora_E.device) for name, tensor in state.items()}
        self.step, self.left = int(state.get("step", -1)), own.get("left")
        names = [name for name, _ in self.named_parameters() if f"{name}.{MEANS[0]}" in own]
        self.means = {name: (own[f"{name}.{MEANS[0]}"], own[f"{name}.{MEANS[1]}"]) for name in names}

    def _pattern(self) -> list[bool]:
        """Which of the `init_r` components go into a file: all that this adapter has, except those at zero for good."""
        if self.left is None or bool((self.lora_E.detach().flatten()[~self.left] != 0).any()):
            return list(self.kept)
        left = iter(self.left.tolist())
        return [was and next(left) for was in self.kept]

    @classmethod
    def file_options(cls, values: Mapping[str, Any], adapters: Mapping[str, Self], compact: bool) -> dict[str, Any]:
        if not compact:
            return {}
        patterns = {name + RANKS_SUFFIX: adapter._pattern() for name, adapter in adapters.items()}
        return {"rank_pattern": patterns if not all(map(all, patterns.values())) else None}

    @classmethod
    def compacted(cls, tensors: dict[str, Tensor], values: Mapping[str, Any]) -> dict[str, Tensor]:
        for name, pattern in (values["rank_pattern"] or {}).items():
            prefix = min((key for key in tensors if key.endswith(f".{name}")), key=len).removesuffix(RANKS_SUFFIX)
            values_of = tensors[prefix + RANKS_SUFFIX].flatten()
            # The components that are left; in an adapter made with fewer than init_r of them, those that are not zero.
            order = torch.tensor(pattern, device=values_of.device) if len(pattern) == len(values_of) else values_of != 0
            chosen = torch.sort(torch.sort(~order, stable=True).indices[: sum(pattern)]).values
            tensors[f"{prefix}.lora_A"] = tensors[f"{prefix}.lora_A"][chosen].contiguous()
            tensors[f"{prefix}.lora_E"] = tensors[f"{prefix}.lora_E"][chosen].contiguous()
            tensors[f"{prefix}.lora_B"] = tensors[f"{prefix}.lora_B"][:, chosen].contiguous()
        return tensors


@torch.no_grad()
def _allocate(adapters: Sequence[AdaLora], budget: int) -> None:
    """Keep the `budget` most important components of all adapters; none of those that tie at the threshold."""
    scores = [adapter._scores() for adapter in adapters]
    device = scores[0].device
    together = torch.cat([score.to(device) for score in scores])
    below = len(together) - budget
    threshold = torch.kthvalue(together, below).values if below > 0 else together.new_full((), -1.0)  # scores are >= 0
    for adapter, score in zip(adapters, scores, strict=True):
        adapter._take_away(score > threshold.to(score.device))

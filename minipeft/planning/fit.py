"""Which settings fit into a given memory, the fastest first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.ecosystem.transformers_model import recomputable_blocks
from minipeft.errors import ConfigError, LeanError
from minipeft.planning.base import Place
from minipeft.planning.estimate import Adapt, Estimate, Planner, Setup
from minipeft.planning.sizes import in_units

USABLE = 0.9  # share of the memory to plan with: the estimate may be off, and other programs need some too
# Ways of checkpointing, each of which takes less memory than the one before; None: plain LoRA, for models that cannot be
# made lean.
WAYS = ("none", "last", "mlp", "block", "sqrt", None)


@dataclass(frozen=True)
class Proposal:
    """Settings that fit.

    Attributes:
        estimate: with the setup, whose batch is that of one forward pass.
        accumulation: forward passes in an optimizer step.
        recomputed: how much of the forward pass is computed again in the backward pass; 1.0 is all of it.
    """

    estimate: Estimate
    accumulation: int
    recomputed: float

    def code(self) -> list[str]:
        """The lines that set this up."""
        setup = self.estimate.setup
        quantized = [f"model = quantize(model, {setup.quantize!r})"] if setup.quantize else []
        loss = "" if self.estimate.chunks_loss else ", chunked_loss=False"
        made_lean = [f"model = lean(model, checkpointing={setup.checkpointing!r}{loss})"] if setup.checkpointing else []
        return [*quantized, "model = get_lora_model(model, config)", *made_lean]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.estimate.to_dict(), "accumulation": self.accumulation, "recomputed": self.recomputed}


def fit(place: Place, config: AdapterConfig, setup: Setup, memory: int, adapt: Adapt) -> list[Proposal]:
    """Settings of `minipeft.lean` with which a step fits into this memory, those first that recompute least.

    With each way of checkpointing the batch is halved, and as many more are accumulated, until it fits. If nothing fits with
    the weights as they are, they are quantized to NF4. A model that cannot be made lean gets plain LoRA.

    Args:
        place: see `minipeft.planning.base.base_model`.
        config: of the adapter.
        setup: its batch is that of an optimizer step; training and checkpointing are chosen here.
        memory: bytes.
        adapt: see `Planner`.

    Raises:
        ConfigError: nothing fits; or as `Planner`.
    """
    tried: list[Estimate] = []
    for quantize in dict.fromkeys((setup.quantize, setup.quantize or "nf4")):
        found: list[Proposal] = []
        for planner in _planners(place, config, setup, quantize, adapt):
            smallest = planner.estimate(1)
            tried.append(smallest)
            if smallest.memory["weights"] > USABLE * memory:
                break  # whatever is recomputed
            largest = _largest(planner, smallest, memory)
            if largest is not None:
                accumulation = math.ceil(setup.batch / largest.setup.batch)
                found.append(Proposal(largest, accumulation, _recomputed(planner)))
            if found and found[-1].accumulation == 1:
                break  # what comes now is slower and helps nothing
        if found:
            return sorted(found, key=lambda proposal: (proposal.recomputed, proposal.accumulation))
    raise ConfigError(_why_nothing(setup, memory, min(tried, key=lambda estimate: estimate.peak)))


def _planners(
    place: Place, config: AdapterConfig, setup: Setup, quantize: str | None, adapt: Adapt
) -> Iterator[Planner]:
    """One for each of `WAYS` that the model allows; plain LoRA only if it allows no other."""
    can_be_lean = False
    for way in WAYS:
        if way is None and can_be_lean:
            return
        try:
            own = replace(setup, training="lean" if way else "lora", checkpointing=way, quantize=quantize)
            planner = Planner(place, config, own, adapt)
        except LeanError:
            continue  # the model's blocks have no feed-forward part, or cannot be recomputed at all
        can_be_lean = True
        yield planner


def _largest(planner: Planner, smallest: Estimate, memory: int) -> Estimate | None:
    """The largest batch that fits: all of the one that is wanted, a half, a quarter, ...; None if not even one row does."""
    batch = planner.setup.batch
    while batch > 1:
        estimate = planner.estimate(batch)
        if estimate.peak <= USABLE * memory:
            return estimate
        # Memory grows with the batch in a straight line, so most sizes need no look.
        room = (USABLE * memory - smallest.peak) / max(1, estimate.peak - smallest.peak) * (batch - 1) + 1
        batch = batch // 2
        while batch > max(1.0, 1.1 * room):
            batch //= 2
    return smallest if smallest.peak <= USABLE * memory else None


def _recomputed(planner: Planner) -> float:
    """Of all blocks, how many more forward passes a step takes."""
    blocks = list(recomputable_blocks(planner.model))
    if not blocks:
        return 0.0
    shares: dict[object, float] = {"last": 1 / len(blocks), "mlp": _share_of_mlp(blocks[0]), "block": 1.0}
    shares |= {"sqrt": 2.0 - 1 / math.sqrt(len(blocks)), "none": 0.0, None: 0.0}
    return shares[planner.setup.checkpointing]


def _share_of_mlp(block: nn.Module) -> float:
    sizes = {"mlp": 0, "all": 0}
    for name, parameter in block.named_parameters():
        sizes["all"] += parameter.numel()
        sizes["mlp"] += parameter.numel() if any(word in name.lower() for word in ("mlp", "ffn", "feed_forward")) else 0
    return sizes["mlp"] / max(1, sizes["all"])


def _why_nothing(setup: Setup, memory: int, least: Estimate) -> str:
    return (
        f"nothing fits into {in_units(memory)}, of which {USABLE:.0%} count: one sequence of {setup.length} tokens on an "
        f"{least.setup.quantize or least.setup.dtype or 'unquantized'} base takes {in_units(least.peak)}, of which the "
        f"weights are {in_units(least.memory['weights'])}. Take a smaller model, or fewer tokens."
    )

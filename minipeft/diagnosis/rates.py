"""Learning rate, scaling, and the size of updates relative to the weights that they are added to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from minipeft.diagnosis.check import Seen, Setup, about, check
from minipeft.diagnosis.view import Part

# Full fine-tuning takes rates of 1e-5 to 5e-5, which is transformers' default, and LoRA learns best at about ten times
# its rate ("LoRA Without Regret", Schulman et al., 2025). What counts is rate times scaling, so a rate that a large scaling
# makes up for is left alone: twice 5e-5 is what alpha = 2 r makes of it.
FULL_RATE, FULL_STEP = 5e-5, 1e-4
# "LoRA Without Regret" trained with alpha = 32 at ranks from 1 to 512, all with one rate: factors from 1/16 to 32. Nobody
# has published rates for factors beyond twice that.
SCALINGS = (1 / 32, 64)
# A step that moves a weight by a tenth of its norm has replaced it after ten; full fine-tuning moves it by about 1e-3.
LARGE_STEP = 0.1
# Ten thousand steps that all point the same way must add up to what bfloat16 can tell apart, 2**-9 of the weight.
SMALL_STEP = 2**-9 / 10_000
# Beyond its own norm, a layer is more adapter than base; trained adapters have 0.01 to 0.3.
LARGE_UPDATE = 1.0


@check("learning-rate-zero", "Nothing will change.", unless=["optimizer-before-adapters", "optimizer-of-another-model"])
def rate_zero(setup: Setup) -> Iterable[Seen]:
    """An adapter trains at a rate of zero."""
    rates = setup.rates
    parts = [part for part in setup.view.training if any(rates.get(id(p)) == 0 for p in part.trained)]
    return about(parts, "its learning rate is 0, and no schedule raises it.", "lr=2e-4")


@check(
    "scaling-unusual",
    "The learning rates that are known to work are for factors from 1/16 to 32.",
    unless=["scale-zero"],
)
def scaling_unusual(setup: Setup) -> Iterator[Seen]:
    """The scaling is far from what anybody has tried."""
    least, most = SCALINGS
    parts = [p for p in setup.view.training if p.pair is not None and p.scaling and not least <= abs(p.scaling) <= most]
    if parts:
        yield from about(
            parts,
            f"the update is multiplied by {parts[0].scaling:g} (lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora).",
            "lora_alpha = 2 * r is usual, or lora_alpha = 32 at any rank.",
        )


@check(
    "step-too-large",
    "Ten such steps replace the weight: training will diverge.",
    unless=["nan-in-base", "nan-in-adapter"],
)
def step_too_large(setup: Setup) -> Iterator[Seen]:
    """The first steps move a layer by a tenth of its weight each."""
    steps = [(part, step) for part, step in _steps(setup) if step > LARGE_STEP]
    if steps:
        yield from about(
            (part for part, _ in steps),
            f"one step moves the layer by about {max(step for _, step in steps):.2g} of its weight's norm.",
            "a lower learning rate or scaling; 2e-4 with lora_alpha = 2 * r is usual.",
        )


@check("step-too-small", "Ten thousand steps would not change a bfloat16 weight.", unless=["learning-rate-zero"])
def step_too_small(setup: Setup) -> Iterator[Seen]:
    """No number of steps that anybody makes adds up to anything."""
    steps = list(_steps(setup))
    if steps and all(0 < step < SMALL_STEP for _, step in steps):
        yield from about(
            (part for part, _ in steps),
            f"one step moves the layer by about {max(step for _, step in steps):.1g} of its weight's norm.",
            "lr=2e-4",
        )


@check(
    "learning-rate-of-full-fine-tuning",
    "LoRA learns best at about ten times the rate of full fine-tuning; at this one it hardly moves.",
    unless=["step-too-small"],
)
def rate_of_full(setup: Setup) -> Iterator[Seen]:
    """Adam's rate, times the scaling, is one for full fine-tuning."""
    rates = _rates(setup)
    low = [(part, rate) for part, rate in rates if 0 < rate <= FULL_RATE and rate * (part.scaling or 1.0) <= FULL_STEP]
    if low and len(low) == len(rates):
        part, rate = low[0]
        yield Seen(
            "optimizer",
            f"learning rate {rate:g} with scaling {part.scaling or 1.0:g}.",
            f"lr={10 * rate:g}; about 2e-4 is usual, and less for preferences (DPO).",
        )


@check(
    "update-too-large",
    "The layer computes more adapter than base: most of what the base knew there is lost.",
    unless=["nan-in-base", "nan-in-adapter"],
)
def update_too_large(setup: Setup) -> Iterator[Seen]:
    """An update is larger than the weight that it is added to."""
    sizes = [
        (part, size) for part in setup.view.acting if (size := _relative(part)) is not None and size > LARGE_UPDATE
    ]
    use = "; to use it as it is, model.set_scale(name, 0.5) weakens it." if not setup.view.is_peft else "."
    if sizes:
        yield from about(
            (part for part, _ in sizes),
            f"the update's norm is {max(size for _, size in sizes):.3g} times that of the weight.",
            f"a lower learning rate, fewer steps or weight decay{use}",
        )


def _relative(part: Part) -> float | None:
    update = None if part.is_full else part.update_norm()
    weight = part.weight_norm() if update else None
    return update / weight if update and weight else None


def _rates(setup: Setup) -> list[tuple[Part, float]]:
    """LoRA's parts with the largest rate of each, if the optimizer is one of Adam's."""
    rates = setup.rates if setup.is_adam else {}
    pairs = [part for part in setup.view.training if part.pair is not None]
    return [(part, max(found)) for part in pairs if (found := [rates[id(p)] for p in part.trained if id(p) in rates])]


def _steps(setup: Setup) -> Iterator[tuple[Part, float]]:
    """How far Adam's first steps move a layer, as a share of its weight's norm.

    Adam moves each value of a factor by about the learning rate. With signs at random that changes s B A by
    ``s lr sqrt(out |A|^2 + in |B|^2)``; signs that agree, by up to sqrt(r) times more.
    """
    for part, rate in _rates(setup):
        assert part.pair is not None
        down, up = part.pair
        weight = part.weight_norm()
        if weight and not down.is_meta and not up.is_meta:
            squares = up.shape[0] * float(down.float().norm()) ** 2 + down.shape[1] * float(up.float().norm()) ** 2
            yield part, abs(part.scaling or 1.0) * rate * math.sqrt(squares) / weight

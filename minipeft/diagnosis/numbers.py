"""Where NaN or infinity comes up first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from minipeft.diagnosis.check import Seen, Setup, about, check
from minipeft.errors import shown


@check("nan-in-base", "Every output is NaN.")
def in_base(setup: Setup) -> Iterator[Seen]:
    """A parameter of the base is not finite."""
    found = [name for name, parameter in setup.view.base.items() if _is_broken(parameter)]
    if found:
        fix = "load it again; a base that was trained in bfloat16 overflows in float16: dtype=torch.bfloat16"
        yield Seen(shown(found, 3), "NaN or infinity in the base.", fix)


@check("nan-in-adapter", "Every output is NaN.")
def in_adapter(setup: Setup) -> Iterable[Seen]:
    """A parameter of an adapter is not finite."""
    parts = [part for part in setup.view.parts if any(map(_is_broken, part.parameters.values()))]
    fix = "go back to a checkpoint before it diverged; a lower learning rate, warm-up or clipping of the gradient."
    return about(parts, "NaN or infinity in the adapter.", fix)


@check(
    "nan-in-output",
    "The loss is NaN, and after one step so is the adapter.",
    unless=["nan-in-base", "nan-in-adapter", "labels-all-ignored"],
    needs_trial=True,
)
def in_output(setup: Setup) -> Iterator[Seen]:
    """All parameters are finite, and the output is not."""
    trial = setup.trial
    if trial.broken is not None or (trial.loss is not None and not math.isfinite(trial.loss)):
        what = f"its output is the first with a NaN; the loss is {trial.loss}." if trial.broken else f"{trial.loss}"
        yield Seen(
            trial.broken or "loss",
            what,
            "dtype=torch.bfloat16 or float32 instead of float16; look at the inputs there.",
        )


@check(
    "nan-in-gradient",
    "After one step the adapter is NaN.",
    unless=["nan-in-base", "nan-in-adapter", "nan-in-output", "labels-all-ignored"],
    needs_trial=True,
)
def in_gradient(setup: Setup) -> Iterator[Seen]:
    """The output is finite, and a gradient is not."""
    training, gradients = setup.view.training, setup.trial.gradients
    parts = [p for p in training if any(not math.isfinite(gradients.get(id(t), 0.0)) for t in p.trained)]
    if parts:
        yield from about(
            parts,
            f"NaN or infinity in the gradient; the loss is {setup.trial.loss:.4g}.",
            "look behind the last of these layers for a square root, logarithm or division at zero.",
            of=training,
        )


def _is_broken(parameter: Tensor) -> bool:
    # Other types are quantized or sharded weights, for which torch has no such function.
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.is_floating_point() and not parameter.is_meta
    if not plain or not parameter.numel():
        return False
    return not bool(parameter.detach().isfinite().all())

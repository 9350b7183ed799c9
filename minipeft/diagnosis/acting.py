"""Whether the adapters act: active, switched on, not zero, and reached by a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from minipeft.diagnosis.check import Seen, Setup, about, check
from minipeft.diagnosis.view import Part, by_adapter
from minipeft.errors import shown


@check("adapters-disabled", "The model computes what its base does, and training changes nothing.")
def disabled(setup: Setup) -> Iterator[Seen]:
    """The adapters are switched off."""
    if setup.view.disabled:
        fix = "model.base_model.enable_adapter_layers()" if setup.view.is_peft else "model.enable_adapters()"
        yield Seen(f"adapter {shown(setup.view.active)}", "all adapters are switched off.", fix)


@check("no-active-adapter", "The model computes what its base does.", unless=["adapters-disabled"])
def inactive(setup: Setup) -> Iterator[Seen]:
    """There are adapters, and none is active."""
    if not any(part.active for part in setup.view.parts):
        names = list(dict.fromkeys(part.adapter for part in setup.view.parts))
        yield Seen(f"adapter {shown(names)}", "none is active.", f"model.set_adapter({names[0]!r})")


@check("scale-zero", "Zero times an update adds nothing, and gives the adapter no gradient.")
def scale_zero(setup: Setup) -> Iterable[Seen]:
    """The update is multiplied by zero."""
    parts = [part for part in setup.view.acting if part.scaling == 0]
    fix = "lora_alpha > 0 in the configuration"
    if parts and not setup.view.is_peft:
        fix = f"model.set_scale({parts[0].adapter!r}, 1.0)  # and {fix}"
    return about(parts, "the scaling of the update is 0.", fix)


@check(
    "adapter-untrained",
    "The outputs are those of the base: this adapter was never trained, or its values were not loaded.",
    unless=["keys-unmatched"],
)
def untrained(setup: Setup) -> Iterator[Seen]:
    """An adapter that does not train changes nothing."""
    for parts in by_adapter(setup.view.acting):
        if _all_zero(parts) and not any(part.is_full or part.trained for part in parts):
            yield from about(
                parts,
                "every update is exactly zero, as before the first step (B = 0), and nothing of it is set to train.",
                "load the trained file, and look at it with `minipeft inspect DIR`; or load it with is_trainable=True to train it.",
            )


@check("adapter-unmoved", "The steps so far went elsewhere: B leaves zero in the first step that reaches it.")
def unmoved(setup: Setup) -> Iterator[Seen]:
    """The optimizer has made steps with the adapter, which is still zero."""
    state = {} if setup.optimizer is None else setup.optimizer.state
    for parts in by_adapter(setup.view.acting):
        steps = max((float(state[p].get("step", 1)) for part in parts for p in part.trained if p in state), default=0)
        if steps > 1 and _all_zero(parts):  # the first step of a warm-up is one of zero
            yield from about(
                parts,
                f"the optimizer has made {steps:.0f} steps, and every update is still exactly zero.",
                "look at the learning rate of these parameters, and at a gradient scaler that skips every step.",
            )


@check(
    "layer-not-reached",
    "An adapter there does nothing and learns nothing, while it is saved and counted like the others.",
    needs_trial=True,
)
def not_reached(setup: Setup) -> Iterable[Seen]:
    """The module around a layer runs, and the layer is neither called nor read."""
    acting = setup.view.acting
    return about(
        [part for part in acting if part.layer in setup.trial.idle],
        "the model ran the module around the layer and did not call the layer.",
        "leave it out of target_modules (exclude_modules=...), or let the model call it.",
        of=acting,
    )


@check("merged-in-training", "A merged adapter is part of the frozen weight: it gets no gradient.")
def merged(setup: Setup) -> Iterable[Seen]:
    """An adapter that trains is merged."""
    parts = [part for part in setup.view.training if part.merged and setup.is_training]
    return about(parts, "it is merged into the base, and is set to train.", "model.unmerge_adapter()")


@check("two-adapters-train", "Both get the same gradient, and each is right only together with the other.")
def two_train(setup: Setup) -> Iterator[Seen]:
    """Several active adapters train at once."""
    names = list(dict.fromkeys(part.adapter for part in setup.view.training))
    if len(names) > 1:
        freeze = f"to let {names[0]!r} act without training: requires_grad_(False) on its parameters"
        yield Seen(
            f"adapter {shown(names)}",
            f"{len(names)} adapters are active and train.",
            f"model.set_adapter({names[-1]!r})  # or, {freeze}",
        )


def _all_zero(parts: list[Part]) -> bool:
    known = [zero for part in parts if (zero := part.is_zero()) is not None]
    return bool(known) and all(known)

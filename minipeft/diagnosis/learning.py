"""Whether training changes the adapters and nothing else: what requires a gradient, the optimizer, and the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from minipeft.diagnosis.check import Seen, Setup, about, check
from minipeft.diagnosis.view import Part, by_adapter
from minipeft.ecosystem.packages import is_from
from minipeft.errors import shown

CUT = "None of the inputs have requires_grad=True"  # what `torch.utils.checkpoint` warns of
MAKE = "optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)  # after adapting"


@check("adapter-frozen", "The optimizer will change nothing.", unless=["no-active-adapter", "adapters-disabled"])
def frozen(setup: Setup) -> Iterator[Seen]:
    """There is an optimizer, and no parameter of an active adapter requires a gradient."""
    if setup.optimizer is not None and not setup.view.training:
        for parts in by_adapter(part for part in setup.view.parts if part.active):
            yield from about(
                parts,
                f"none of its {sum(len(part.parameters) for part in parts)} parameters requires a gradient.",
                "load it with is_trainable=True, or leave inference_mode=True out of its configuration.",
            )


@check("optimizer-of-another-model", "It trains tensors that this model does not compute with.")
def another_model(setup: Setup) -> Iterator[Seen]:
    """The optimizer holds parameters that are not the model's."""
    own = {id(parameter) for parameter in setup.view.model.parameters()}
    strangers = [key for key in setup.rates if key not in own]
    if strangers:
        yield Seen(
            "optimizer",
            f"{len(strangers)} of its {len(setup.rates)} parameters are not in this model, as after copying or reloading it.",
            MAKE,
        )


@check(
    "optimizer-before-adapters",
    "The adapters will never change: an optimizer keeps the parameters that it was made with.",
    unless=["optimizer-of-another-model"],
)
def before_adapters(setup: Setup) -> Iterator[Seen]:
    """The optimizer holds none of what trains."""
    parts = setup.view.training
    if setup.optimizer is not None and parts and not any(id(p) in setup.rates for part in parts for p in part.trained):
        yield Seen("optimizer", f"it holds {len(setup.rates)} parameters, and none of an adapter that trains.", MAKE)


@check(
    "not-in-optimizer", "These will never change.", unless=["optimizer-of-another-model", "optimizer-before-adapters"]
)
def not_in_optimizer(setup: Setup) -> Iterable[Seen]:
    """The optimizer holds some of what trains, and not all of it."""
    training = setup.view.training if setup.optimizer is not None else []
    parts = [part for part in training if any(id(p) not in setup.rates for p in part.trained)]
    fix = (
        "optimizer.add_param_group({'params': [...]}), or a new optimizer if the adapter was added to the model later."
    )
    return about(parts, "trains, and is not in the optimizer.", fix, of=training)


@check(
    "base-trains", "The adapter's file does not hold the base, so what it learns is lost; its gradients take memory."
)
def base_trains(setup: Setup) -> Iterator[Seen]:
    """Parameters of the base require a gradient."""
    found = setup.trainable_base()
    if found and not _is_quantized(setup):
        yield Seen(
            shown(found, 3),
            f"{_share(found, setup)} of the base require a gradient.",
            f"{_freeze(setup)}  # what is to train in full belongs into modules_to_save",
        )


@check("quantized-base-trains", "What they learn is in no adapter file, and the quantized layers do not follow.")
def quantized_base_trains(setup: Setup) -> Iterator[Seen]:
    """The base is quantized, and its remaining float parameters train."""
    found = setup.trainable_base()
    if found and _is_quantized(setup):
        yield Seen(
            shown(found, 3),
            f"the base is quantized, and {_share(found, setup)} of it require a gradient.",
            f"{_freeze(setup)}  # quantize before adapting, which freezes what is left in float",
        )


@check(
    "base-in-optimizer",
    "Harmless while they have no gradient; the day one is unfrozen, it trains, with weight decay, and nobody said so.",
    unless=[
        "optimizer-of-another-model",
        "optimizer-before-adapters",
        "base-trains",
        "quantized-base-trains",
        "adapter-frozen",
    ],
)
def base_in_optimizer(setup: Setup) -> Iterator[Seen]:
    """The optimizer holds frozen parameters of the base."""
    found = {name: p for name, p in setup.view.base.items() if id(p) in setup.rates and not p.requires_grad}
    if found:
        yield Seen(shown(found, 3), f"the optimizer holds {_share(found, setup)} of the frozen base.", MAKE)


@check(
    "checkpointing-cuts-gradients",
    "Reentrant checkpointing gives no gradient to a block none of whose inputs requires one, as images and the ids of tokens "
    "do not; torch warns 'None of the inputs have requires_grad=True'.",
    needs_trial=True,
)
def checkpointing(setup: Setup) -> Iterable[Seen]:
    """Adapters inside checkpointed blocks got no gradient."""
    return about(
        _without_gradient(setup) if any(CUT in said for said in setup.trial.warned) else (),
        "it is checkpointed with use_reentrant=True, and no gradient arrived.",
        "model.gradient_checkpointing_enable({'use_reentrant': False})",
        of=setup.view.training,
    )


@check(
    "no-gradient",
    "An optimizer leaves it as it is. (At the first step A's gradient is zero because B is; that is not meant here.)",
    unless=[
        "checkpointing-cuts-gradients",
        "labels-all-ignored",
        "merged-in-training",
        "adapters-disabled",
        "scale-zero",
    ],
    needs_trial=True,
)
def no_gradient(setup: Setup) -> Iterable[Seen]:
    """A layer ran, and nothing of its adapter got a gradient that is not zero."""
    return about(
        _without_gradient(setup),
        "it ran in the forward pass, and its gradient is missing or zero in all its parameters.",
        "look for detach(), torch.no_grad() or .data between this layer and the loss.",
        of=setup.view.training,
    )


def _without_gradient(setup: Setup) -> list[Part]:
    """The parts that ran and got no gradient in any parameter; A's alone is zero as long as B is."""
    trial = setup.trial
    here = setup.view.learning if trial.trained else []
    # Rows of tokens get a gradient from the batches that have those tokens.
    here = [part for part in here if not any(name.startswith("trainable_tokens") for name in part.parameters)]
    seen = trial.seen
    here = [part for part in here if seen.ran(part.module) or id(part.module) in seen.read]
    ran = [part for part in here if part.layer not in trial.idle]
    return [part for part in ran if not any(trial.gradients.get(id(p), 0.0) != 0.0 for p in part.trained)]


def _freeze(setup: Setup) -> str:
    kept = "'lora_' in n or 'modules_to_save' in n" if setup.view.is_peft else "'.adapters.' in n"
    return f"for n, p in model.named_parameters(): p.requires_grad_({kept})"


def _is_quantized(setup: Setup) -> bool:
    is_marked = bool(getattr(setup.view.root, "is_quantized", False))
    weights = setup.view.base.values()
    return is_marked or any(not w.is_floating_point() or is_from(type(w), "torchao") for w in weights)


def _share(found: dict[str, nn.Parameter], setup: Setup) -> str:
    return f"{len(found)} of {len(setup.view.base)} parameters ({sum(p.numel() for p in found.values()):,} values)"

"""``lean(model)``: train a transformers model with the same loss and gradients in less memory and time."""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from minipeft.config.options import checked_module, flags
from minipeft.ecosystem.transformers_model import output_head, recomputable_blocks, wrapping_class
from minipeft.errors import LeanError, StateError, all_or_nothing, hint, shown, told
from minipeft.injection.rollback import unchanged_on_error
from minipeft.injection.wrapper import Wrapper
from minipeft.kernels import glibc, matmul
from minipeft.kernels.functional import is_divided
from minipeft.layers.base import is_plain_linear, layer_ops
from minipeft.memory import rms_norm, sample_slices, token_tiles
from minipeft.memory.chains import CHAINS, Chains
from minipeft.memory.chunked_loss import LeanLoss, PassesThrough, after_forward, before_forward, check_loss
from minipeft.memory.gated_mlp import gated_mixin
from minipeft.memory.modules import (
    TANH_GELUS,
    FastLinear,
    FusedGelu,
    Recomputed,
    RecomputedBlock,
    RecomputedMlp,
    is_cheap_activation,
    is_rms_norm,
    recompute_block,
)
from minipeft.memory.probe import Probe
from minipeft.memory.rotary import FastRotary, is_rotary_attention
from minipeft.python.class_swap import SameFunction, mixed_class, original_class, plain_class
from minipeft.python.interrupts import interrupts_deferred

logger = logging.getLogger("minipeft")
Model = TypeVar("Model", bound=nn.Module)
CHECKPOINTING = ("none", "last", "mlp", "block", "sqrt")
FOR_SPEED = (None, "none", "last")  # those for which memory is not worth a twentieth of the time
MLP = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)
STATE = "_minipeft_lean"
# From this size on, glibc gives freed arrays back at once; smaller ones take time, which only groups of blocks are worth.
MAPPED_BLOCKS, MAPPED_GROUPS = 2**22, 2**20


@dataclass
class LeanState:
    """What `unlean` must undo: plain data in the model's __dict__, so copies and pickles carry it."""

    mixed: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)  # (module, what it was mixed with)
    blocks: list[nn.Module] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    chunked_loss: bool = False


@all_or_nothing
def lean(
    model: Model, checkpointing: str | int | None = None, *, chunked_loss: bool = True, fast_linear: bool = True
) -> Model:
    """Change a transformers model, in place, to train in less memory and time with the same loss and gradients.

    GELUs composed of single operations become one kernel. The outputs of norms and activations, gated ones (SwiGLU)
    included, are recomputed for the adapters instead of kept. The loss of a causal language model is computed from a few
    rows of logits at a time. Frozen layers use the faster matrix library. All this acts in training mode with gradients
    only; any other call computes what it did, bit for bit.

    A tiny batch is run before and after, and the call is refused if loss or gradients differ. Call it after adapting
    the model, and again, with all options, after adding adapters or to change an option.

    Args:
        model: a plain or adapted transformers model, not yet wrapped by DDP or the like.
        checkpointing: what to recompute in the backward pass. "last": the last block, a slice of the batch at a time,
            since memory peaks at the beginning of that pass. "mlp": the feed-forward half of each block. "block": every
            block, in slices, and its feed-forward half in tiles of tokens. A number k: every block, and of each k blocks
            only the first keeps its input, from which those of the others are computed again; "sqrt": as many blocks as
            groups. Each takes less memory and more time than the one before. From "mlp" on, on a CPU, time also goes into
            giving freed memory back around the loss; from "block" on, before each block too, and glibc is told to give
            freed arrays back at once, for the rest of the process. "none": nothing. The default is "last" if the model can
            run in slices, which dropout prevents, else "none". Recomputation is non-reentrant and stops below the lowest
            adapter.
        chunked_loss: with labels in training mode, ``outputs.loss`` comes without ``outputs.logits``.
        fast_linear: also let frozen layers without an adapter use the faster library, if there is one; quantized
            layers then keep nothing for the backward pass.

    Raises:
        LeanError: loss or gradients would differ, or an option asks for something that this model does not have.
        StateError: `model` is not a transformers model, or something wraps it or has divided it over processes.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise StateError(f"lean() takes a transformers model, adapted or plain, not {type(model).__name__}.")
    if (wrapping := wrapping_class(model)) is not None:
        raise StateError(f"{wrapping} wraps the model; call lean() on the model itself, then wrap it.")
    if any(map(is_divided, model.parameters())):
        raise StateError("the model is divided over processes, as by fully_shard; call lean() before that.")
    flags(chunked_loss=chunked_loss, fast_linear=fast_linear)
    _check_checkpointing(checkpointing)
    before = model.__dict__.get(STATE)
    with unchanged_on_error(model, *([before] if before is not None else [])):
        state = _replace(model, checkpointing, chunked_loss=chunked_loss, fast_linear=fast_linear)
    if checkpointing not in (None, "none", "last", "mlp") and next(model.parameters()).device.type == "cpu":
        glibc.map_large_arrays(MAPPED_BLOCKS if checkpointing == "block" else MAPPED_GROUPS)
    logger.info("lean: %s", describe(state))
    return model


def _replace(model: nn.Module, checkpointing: str | int | None, *, chunked_loss: bool, fast_linear: bool) -> LeanState:
    """Undo an earlier `lean`, do what these options ask for, and prove it; raises a LeanError in the middle of that."""
    unlean(model)
    if chunked_loss:
        check_loss(model)
    probe = Probe(model, with_labels=chunked_loss)
    state = LeanState()
    model.__dict__[STATE] = state
    _swap_modules(model, state, fast_linear=fast_linear)
    _recompute(model, state, checkpointing)
    if chunked_loss:
        _chunk_loss(model, state, trims=checkpointing not in FOR_SPEED)
    probe.compare(model)
    if checkpointing is None and not all(sample_slices.runs_in_slices(block) for block in state.blocks):
        _keep_blocks(state)
    _compare_in_pieces(model, state, probe)
    if not (state.mixed or state.blocks or state.chunked_loss):
        raise LeanError(f"there is nothing in {type(model).__name__} that lean() could improve with these options.")
    return state


def _compare_in_pieces(model: nn.Module, state: LeanState, probe: Probe) -> None:
    """Let what can be cut run in pieces, and prove it by the smallest ones."""
    mlps = [module for module, mixin in state.mixed if mixin is RecomputedMlp]
    token_tiles.settle(mlps)
    with (
        sample_slices.cut_small(state.blocks, sample_slices.ROWS, 1) as some,
        # Two tokens, since torch's products by a single row in bfloat16 are too inexact to prove anything.
        sample_slices.cut_small(mlps, token_tiles.TOKENS, 2) as others,
    ):
        if some or others:
            probe.compare(model)


def _check_checkpointing(value: object) -> None:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value is not None and not is_number and not (isinstance(value, str) and value in CHECKPOINTING):
        raise LeanError(
            f"checkpointing must be one of {shown(CHECKPOINTING)} or a number of blocks, not {told(value)}"
            f"{hint(str(value), CHECKPOINTING)}."
        )


def unlean(model: nn.Module) -> None:
    """Undo `lean` exactly; does nothing if it was not called.

    Raises:
        ConfigError: `model` is not a module.
    """
    state: LeanState | None = checked_module(model).__dict__.get(STATE)
    if state is not None:
        with interrupts_deferred():
            _take_back(model, state)


def _take_back(model: nn.Module, state: LeanState) -> None:
    del model.__dict__[STATE]
    for module in model.modules():  # not those of `state.mixed`: adapting has moved some into new objects
        if isinstance(module, SameFunction):
            module.__class__ = plain_class(type(module))
            for name in ("lean_ops", "passing", token_tiles.TOKENS, token_tiles.TRIED, rms_norm.KERNEL):
                module.__dict__.pop(name, None)
    _keep_blocks(state)
    for hook in state.hooks:
        hook.remove()
    if state.chunked_loss:
        loss: LeanLoss = model.__dict__.pop("_loss_function")
        if loss.set_before:
            model._loss_function = loss.original


def _keep_blocks(state: LeanState) -> None:
    """Stop recomputing blocks."""
    for block in state.blocks:
        if RecomputedBlock in type(block).__mro__:
            block.__class__ = original_class(RecomputedBlock, type(block))
        for name in ("recomputes", "trims", "_gradient_checkpointing_func", sample_slices.ROWS, CHAINS):
            block.__dict__.pop(name, None)
    state.blocks = []  # the list itself stays for `unchanged_on_error`


def describe(state: LeanState) -> str:
    """What `lean` changed, in one line."""
    counts = Counter(mixin.__name__ for _, mixin in state.mixed)
    said = [f"{count} {name}" for name, count in counts.items()]
    if state.blocks:
        said.append(f"{len(state.blocks)} blocks recomputed")
    return ", ".join([*said, *(["loss in chunks"] if state.chunked_loss else [])])


def _swap_modules(model: nn.Module, state: LeanState, *, fast_linear: bool) -> None:
    adapted = {id(wrapper.base_layer) for wrapper in model.modules() if isinstance(wrapper, Wrapper)}
    head = output_head(model)
    for module in model.modules():
        if "forward" in module.__dict__ or module is head:
            continue  # patched, or left to _chunk_loss
        if (gated := gated_mixin(module)) is not None:
            _mix(module, gated, state)
        elif is_rotary_attention(module):
            _mix(module, FastRotary, state)
        if not any(p.requires_grad for p in module.parameters()):
            _swap_frozen(module, state, fast_linear=fast_linear and id(module) not in adapted)


def _swap_frozen(module: nn.Module, state: LeanState, *, fast_linear: bool) -> None:
    """Swap a module in which nothing trains, if it is a norm, an activation or a linear layer."""
    if type(module).__name__ in TANH_GELUS:
        _mix(module, FusedGelu, state)
    elif type(module) is nn.LayerNorm or is_rms_norm(module) or is_cheap_activation(module):
        if is_rms_norm(module) and rms_norm.is_plain(module):
            module.__dict__[rms_norm.KERNEL] = True
        _mix(module, Recomputed, state)
    elif fast_linear and (ops := layer_ops(module)) is not None:
        if ops.is_quantized or (matmul.may_beat_torch() and is_plain_linear(ops, module)):
            _mix(module, FastLinear, state)
            module.__dict__["lean_ops"] = ops


def _mix(module: nn.Module, mixin: type[nn.Module], state: LeanState) -> None:
    state.mixed.append((module, mixin))
    module.__class__ = mixed_class(mixin, type(module))


def _recompute(model: nn.Module, state: LeanState, checkpointing: str | int | None) -> None:
    if checkpointing == "none":
        return
    blocks = list(recomputable_blocks(model))
    on = [block for block in blocks if getattr(block, "gradient_checkpointing", False)]
    if on and checkpointing is None:
        return
    if on:
        raise LeanError("gradient checkpointing is on already; call model.gradient_checkpointing_disable() first.")
    if not blocks and checkpointing is not None:
        raise LeanError(
            f'checkpointing="{checkpointing}": {type(model).__name__} has no layers that transformers could checkpoint.'
        )
    if checkpointing == "mlp":
        _recompute_mlps(model, state, blocks, needed=True)
        return
    every = checkpointing is not None and checkpointing != "last"
    state.blocks = blocks if every else blocks[-1:]
    size = math.isqrt(len(blocks) - 1) + 1 if checkpointing == "sqrt" and blocks else checkpointing
    chains = Chains(size) if isinstance(size, int) and size > 1 else None
    for block in state.blocks:
        if chains is not None:
            block.__dict__[CHAINS] = chains
        block.__class__ = mixed_class(RecomputedBlock, type(block))
        block.gradient_checkpointing = True  # type: ignore[assignment]
        block.trims = every  # type: ignore[assignment]
        block._gradient_checkpointing_func = recompute_block  # type: ignore[assignment]
    if every:
        _recompute_mlps(model, state, blocks, needed=False)


def _recompute_mlps(model: nn.Module, state: LeanState, blocks: list[nn.Module], *, needed: bool) -> None:
    mlps = [child for block in blocks for name, child in block.named_children() if _is_mlp(name, child)]
    if not mlps and needed:
        raise LeanError(
            f'checkpointing="mlp": the layers of {type(model).__name__} have no feed-forward module of their own; '
            'use checkpointing="block".'
        )
    for mlp in dict.fromkeys(mlps):  # blocks may share one
        _mix(mlp, RecomputedMlp, state)


def _is_mlp(name: str, module: nn.Module) -> bool:
    return any(module.children()) and bool(MLP.search(name) or MLP.search(type(module).__name__))


def _chunk_loss(model: nn.Module, state: LeanState, *, trims: bool) -> None:
    head, loss = output_head(model), model.loss_function
    assert head is not None
    _mix(head, PassesThrough, state)
    set_before = "_loss_function" in model.__dict__
    takes_use_cache = "use_cache" in inspect.signature(model.forward).parameters
    model._loss_function = LeanLoss(head, loss, set_before, takes_use_cache, trims)  # type: ignore[assignment]
    state.chunked_loss = True
    state.hooks += [
        model.register_forward_pre_hook(before_forward, with_kwargs=True),
        model.register_forward_hook(after_forward, with_kwargs=True, always_call=True),
    ]

"""The labels of a batch: what the loss is computed on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minipeft.diagnosis.check import Seen, Setup, check
from minipeft.diagnosis.trial import forward, left_alone, logits_of
from minipeft.kernels.packed_documents import rounding_leak

IGNORED = -100  # the label that the loss leaves out
SHIFTED, ALIGNED = 0.9, 0.5  # share of labels that are the next token, and that are the token itself


@check("labels-all-ignored", "The loss is the mean of nothing, NaN or zero, and nothing is learnt.")
def all_ignored(setup: Setup) -> Iterator[Seen]:
    """Every label is the one that the loss leaves out."""
    labels = setup.tensor("labels")
    if labels is not None and labels.numel() and not labels.is_floating_point() and bool((labels == IGNORED).all()):
        yield Seen(
            "batch['labels']",
            f"all {labels.numel()} labels are {IGNORED}.",
            "look at the collator's response template or prompt mask, and at texts that were cut before the answer.",
        )


@check("labels-shifted-twice", "The model shifts labels itself, so it learns to predict the token after the next one.")
def shifted_twice(setup: Setup) -> Iterator[Seen]:
    """The labels of a causal model are the inputs moved by one."""
    found = _tokens(setup)
    if found is None:
        return
    ids, labels, mask = found
    counts = (labels[:, :-1] != IGNORED) & mask[:, :-1]
    total = int(counts.sum())
    if not total:
        return
    aligned = int(((labels[:, :-1] == ids[:, :-1]) & counts).sum()) / total
    shifted = int(((labels[:, :-1] == ids[:, 1:]) & counts).sum()) / total
    if shifted >= SHIFTED and aligned < ALIGNED:
        what = f"{shifted:.0%} of the labels are the next token, {aligned:.0%} the token itself."
        yield Seen("batch['labels']", what, "labels = input_ids.clone()  # with -100 where nothing is to be learnt")


@check("padding-in-loss", "The model learns to write padding, and the mean of the loss is mostly about that.")
def padding_in_loss(setup: Setup) -> Iterator[Seen]:
    """Labels are not masked where the batch is padded."""
    found = _tokens(setup)
    labels, pad = setup.tensor("labels"), _token(setup, "pad_token_id")
    if found is not None:
        _, labels, mask = found
        padded = int(((labels != IGNORED) & ~mask).sum())
        if padded:
            fix = "labels[attention_mask == 0] = -100"
            yield Seen("batch['labels']", f"{padded} of {int((~mask).sum())} padded positions have a label.", fix)
    elif setup.is_encoder_decoder and labels is not None and labels.ndim == 2 and pad is not None:
        padded = int((labels == pad).sum())
        if padded and pad != _token(setup, "eos_token_id"):
            yield Seen(
                "batch['labels']", f"{padded} labels are the padding token.", "labels[labels == pad_token_id] = -100"
            )


@check("eos-never-learnt", "The model never learns to stop.")
def eos_never_learnt(setup: Setup) -> Iterator[Seen]:
    """The padding token is eos, and the texts' own eos was masked along with the padding."""
    found, eos = _tokens(setup), _token(setup, "eos_token_id")
    if found is None or eos is None or eos != _token(setup, "pad_token_id"):
        return
    ids, labels, mask = found
    at_end = ids.gather(1, (mask.shape[1] - 1 - mask.flip(1).int().argmax(1, keepdim=True))) == eos
    if bool(at_end.any()) and not bool(((labels == eos) & mask).any()):
        yield Seen(
            "batch['labels']",
            f"pad_token is eos_token ({eos}), {int(at_end.sum())} texts end with it, and none of them has a label there.",
            "mask by position, labels[attention_mask == 0] = -100, or give the tokenizer a pad_token of its own.",
        )


@check(
    "packing-leaks",
    "Documents attend to those before them in the row, which were packed as if each were alone.",
    needs_trial=True,
)
def packing_leaks(setup: Setup) -> Iterator[Seen]:
    """Another first document changes the logits of the second one."""
    ids, positions = setup.tensor("input_ids"), setup.tensor("position_ids")
    if ids is None or positions is None or positions.shape != ids.shape or not setup.is_causal:
        return
    later = ((positions == 0).cumsum(1) > 1).to(ids.device)
    if not bool(later.any()) or setup.batch is None:
        return
    changed = torch.where(later, ids, (ids + 1) % (int(ids.max()) + 1))
    batch = {name: value for name, value in setup.batch.items() if name != "labels"}
    training = bool(setup.view.learning)
    with left_alone(setup.view), torch.no_grad():
        own, other = (
            logits_of(forward(setup.view, {**batch, "input_ids": rows}, training=training)) for rows in (ids, changed)
        )
    if own is None or other is None:
        return
    change = float((own - other).abs().amax(-1)[later.to(own.device)].max() / own.abs().max())
    if change > rounding_leak(own.dtype):
        has_mask = "attention_mask" in batch
        yield Seen(
            "batch['position_ids']",
            f"other tokens in the first document change the logits of the later ones by {change:.1g} of the largest.",
            "leave out attention_mask and pass use_cache=False: with a mask, transformers does not look for documents."
            if has_mask
            else "pass use_cache=False; if it leaks all the same, this model mixes documents: pad each text on its own.",
        )


def _tokens(setup: Setup) -> tuple[Tensor, Tensor, Tensor] | None:
    """Ids, labels and where there is no padding, each (batch, seq), of a causal model's batch."""
    ids, labels, mask = setup.tensor("input_ids"), setup.tensor("labels"), setup.tensor("attention_mask")
    if ids is None or labels is None or ids.ndim != 2 or labels.shape != ids.shape or not setup.is_causal:
        return None
    if mask is not None and mask.shape == ids.shape:
        return ids, labels, mask.bool()
    pad = _token(setup, "pad_token_id")
    if pad is None or pad == _token(setup, "eos_token_id"):
        return ids, labels, torch.ones_like(ids, dtype=torch.bool)
    return ids, labels, (ids == pad).flip(1).cumprod(1).flip(1) == 0  # all but the run of padding at the end


def _token(setup: Setup, name: str) -> int | None:
    """A special token's id: the tokenizer's, or the config's."""
    for source in (setup.tokenizer, getattr(setup.view.root, "config", None)):
        found = getattr(source, name, None)
        if isinstance(found, int):
            return found
    return None

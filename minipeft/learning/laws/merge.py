"""Exercise 08: merging, in both orientations, and its rounding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minipeft.learning.law import Broken, Laws, gap, require, same

LAWS = Laws()
R, SCALING = 2, 4.0


def _case(
    kind: str, out: int, within: int, dtype: torch.dtype = torch.float32, size: float = 1.0
) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(1)
    layer: Any = nn.Linear(within, out) if kind == "Linear" else Conv1D(out, within)  # type: ignore[no-untyped-call]
    layer.to(dtype).requires_grad_(False)
    layer.bias.normal_()
    return layer, size * torch.randn(R, within), torch.randn(out, R)


def _merged(layer: Any, update: Tensor) -> Tensor:
    return layer.weight.detach() + (update.T if isinstance(layer, Conv1D) else update)


def _check(work: SimpleNamespace, kind: str, out: int, within: int) -> None:
    layer, A, B = _case(kind, out, within)
    before, wanted = layer.weight.detach().clone(), _merged(layer, SCALING * B @ A)
    bias, kept_A, kept_B = layer.bias.detach().clone(), A.clone(), B.clone()
    work.merge(layer, A, B, SCALING)
    given = layer.weight.detach()
    if same(given, before, 1e-6):
        raise Broken(f"the weight of {kind} is not changed: write into it, as layer.weight.copy_(...) under no_grad.")
    if given.shape != wanted.shape:
        raise Broken(f"the merged weight of {kind} is {tuple(given.shape)}, and was {tuple(before.shape)}.")
    _explain(kind, given, before, wanted)
    require(torch.equal(layer.bias, bias), f"the bias of {kind} is changed.")
    require(
        torch.equal(A, kept_A) and torch.equal(B, kept_B),
        "merging changes A or B, which other layers or files may still need.",
    )
    require(isinstance(layer.weight, nn.Parameter), "the weight is no nn.Parameter any more, so no file would have it.")


def _explain(kind: str, given: Tensor, before: Tensor, wanted: Tensor) -> None:
    if same(given, wanted):
        return
    update = wanted - before
    if given.shape[0] == given.shape[1]:
        stored = "(in, out)" if kind == "Conv1D" else "(out, in)"
        if same(given, before + update.T):
            raise Broken(f"the merged weight of {kind} is transposed: the update must be added as {stored}.")
        if same(given, wanted.T):
            raise Broken(f"the whole weight of {kind} is transposed.")
    mistakes = {
        "the scaling is missing": before + update / SCALING,
        "it is merged twice": before + 2 * update,
        "W is replaced by the update instead of added to": update,
        "the update is subtracted": before - update,
        "W is scaled, too": SCALING * before + update,
    }
    for why, value in mistakes.items():
        if same(given, value, 1e-3):
            raise Broken(f"{why}: the weight of {kind} is off by {gap(given, wanted):.2g}.")
    raise Broken(f"the merged weight of {kind} is off by {gap(given, wanted):.2g}.")


@LAWS.law("the merged weight of a Linear is W + s B A")
def _merges_linear(work: SimpleNamespace) -> None:
    _check(work, "Linear", 5, 5)
    _check(work, "Linear", 6, 3)


@LAWS.law("that of a Conv1D is W + (s B A)^T")
def _merges_conv1d(work: SimpleNamespace) -> None:
    _check(work, "Conv1D", 5, 5)
    _check(work, "Conv1D", 6, 3)


@LAWS.law("factors that train, and a weight that trains, can be merged")
def _merges_what_trains(work: SimpleNamespace) -> None:
    layer, A, B = _case("Linear", 6, 3)
    layer.requires_grad_(True)
    try:
        work.merge(layer, nn.Parameter(A), nn.Parameter(B), SCALING)
    except RuntimeError as error:
        raise Broken(f"torch says: {error} Merge under torch.no_grad().") from None
    require(layer.weight.is_leaf, "the merged weight hangs on the graph of A and B: merge under torch.no_grad().")


@LAWS.law("in bfloat16 it keeps the dtype and rounds once")
def _rounds_once(work: SimpleNamespace) -> None:
    layer, A, B = _case("Linear", 64, 64, torch.bfloat16, size=0.003)
    before = layer.weight.detach().clone()
    exact = before.float() + SCALING * B @ A
    work.merge(layer, A.bfloat16(), B.bfloat16(), SCALING)
    require(layer.weight.dtype == torch.bfloat16, f"the merged weight is {layer.weight.dtype}; it was bfloat16.")
    exact = before.float() + SCALING * B.bfloat16().float() @ A.bfloat16().float()
    off = int((layer.weight != exact.bfloat16()).sum())
    require(
        off == 0,
        f"{off} of {exact.numel()} numbers are rounded more than once: compute the sum in float32, then round it.",
    )


@LAWS.law("unmerge brings back every bit")
def _brings_back(work: SimpleNamespace) -> None:
    for kind in ("Linear", "Conv1D"):
        layer, A, B = _case(kind, 6, 3, torch.bfloat16)
        before = layer.weight.detach().clone()
        work.unmerge(layer, work.merge(layer, A, B, SCALING))
        difference = gap(layer.weight.float(), before.float())
        if difference > 0.5:
            raise Broken(
                f"unmerge does not bring the weight of {kind} back: it is off by {difference:.2g}. Did `kept` change with it?"
            )
        require(
            torch.equal(layer.weight, before),
            f"the weight of {kind} is off by {difference:.2g}: subtracting what was rounded does not bring it back; keep a copy.",
        )

"""Two adapters compared layer by layer, from their files, without forming an update."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import CheckpointError
from minipeft.files.readers.contents import Contents, read_contents
from minipeft.files.readers.keys import Kind
from minipeft.files.readers.plain import pairs_of
from minipeft.kernels.products import Factors, product_norm

TINY = 1e-10  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class LayerDiff:
    """How the updates of one layer differ.

    Attributes:
        module: its name.
        ranks: of the two updates, numerically; 0 where an adapter has none.
        norms: Frobenius norms of the two updates.
        difference: Frobenius norm of their difference.
        cosine: of the angle between the updates as vectors; None if one is zero.
        column_angles: principal angles between their column spaces, in degrees, the smallest first.
        row_angles: the same for their row spaces.
    """

    module: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    difference: float
    cosine: float | None
    column_angles: tuple[float, ...]
    row_angles: tuple[float, ...]

    @property
    def relative(self) -> float | None:
        """The difference over the larger of the two norms; None if both are zero."""
        return self.difference / max(self.norms) if max(self.norms) else None


@dataclass(frozen=True)
class AdapterDiff:
    """Two adapters: their layers, those that moved most apart first, and the keys of what is not of low rank."""

    layers: tuple[LayerDiff, ...]
    not_compared: tuple[str, ...]

    @property
    def norms(self) -> tuple[float, float]:
        """Of all updates together."""
        return math.hypot(*(layer.norms[0] for layer in self.layers)), math.hypot(
            *(layer.norms[1] for layer in self.layers)
        )

    @property
    def difference(self) -> float:
        """Of all updates together."""
        return math.hypot(*(layer.difference for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        layers = [{**asdict(layer), "relative": layer.relative} for layer in self.layers]
        return {"norms": self.norms, "difference": self.difference, "layers": layers, "not_compared": self.not_compared}


def adapter_diff(first: Path, second: Path) -> AdapterDiff:
    """Compare two adapters of the same base whose updates are of low rank: LoRA, its variants, and AdaLoRA, of any ranks.

    Raises:
        CheckpointError: a directory has no such adapter, or the two are for different bases.
    """
    contents = read_contents(first), read_contents(second)
    one, two = map(_updates, contents)
    if not one.keys() & two.keys():
        raise CheckpointError(
            f"{first} and {second} have no layer in common ({next(iter(one), 'none')}, {next(iter(two), 'none')}), so they are "
            "not for the same model."
        )
    layers = [_compared(name, one.get(name), two.get(name), first, second) for name in {**one, **two}]
    rest = dict.fromkeys(key.text for each in contents for key in each.of(Kind.SAVED, Kind.COPY, Kind.TOKENS))
    return AdapterDiff(tuple(sorted(layers, key=lambda layer: -layer.difference)), tuple(rest))


def _updates(contents: Contents) -> dict[str, Factors]:
    """(up, down) of each layer in float64, the scaling in `up`."""
    pairs = pairs_of(contents, contents.weights.read())
    if not pairs:
        raise CheckpointError(f"{contents.directory} has no layer with a low-rank update.")
    return {name: (p.scaling * p.up.double().flatten(1), p.down.double().flatten(1)) for name, p in pairs.items()}


def _compared(name: str, one: Factors | None, two: Factors | None, first: Path, second: Path) -> LayerDiff:
    shapes = [(len(f[0]), f[1].shape[1]) for f in (one, two) if f is not None]
    if len(set(shapes)) > 1:
        raise CheckpointError(
            f"{name} is {shapes[0]} in {first} and {shapes[1]} in {second}; compare adapters of the same base."
        )
    given = [
        f if f is not None else (torch.zeros(shapes[0][0], 1).double(), torch.zeros(1, shapes[0][1]).double())
        for f in (one, two)
    ]
    norms = tuple(product_norm([factors], [1.0]) for factors in given)
    inner = float(((given[0][0].T @ given[1][0]) * (given[0][1] @ given[1][1].T)).sum())
    columns, rows = zip(*(_spaces(*factors) for factors in given), strict=True)
    return LayerDiff(
        module=name,
        ranks=(columns[0].shape[1], columns[1].shape[1]),
        norms=(norms[0], norms[1]),
        difference=product_norm(given, [1.0, -1.0]),
        cosine=max(-1.0, min(1.0, inner / (norms[0] * norms[1]))) if all(norms) else None,
        column_angles=principal_angles(*columns),
        row_angles=principal_angles(*rows),
    )


def _spaces(up: Tensor, down: Tensor) -> Factors:
    """Orthonormal bases of the column and row space of ``up @ down``: shapes (out, rank) and (in, rank)."""
    left, R = torch.linalg.qr(up)
    right, S = torch.linalg.qr(down.T)
    U, sizes, Vh = torch.linalg.svd(R @ S.T, full_matrices=False)
    rank = int((sizes > TINY * sizes[0]).sum()) if sizes[0] > 0 else 0
    return left @ U[:, :rank], right @ Vh[:rank].T


def principal_angles(one: Tensor, two: Tensor) -> tuple[float, ...]:
    """Angles in degrees between the spaces that two orthonormal bases span (Bjorck and Golub, 1973, eq. 3.6), rising.

    Small ones come from their sines, since the cosine of an angle of 1e-8 is 1.
    """
    if not one.shape[1] or not two.shape[1]:
        return ()
    if one.shape[1] < two.shape[1]:
        one, two = two, one
    overlap = one.T @ two
    cosines = torch.linalg.svdvals(overlap).clamp(0, 1)
    sines = torch.linalg.svdvals(two - one @ overlap).clamp(0, 1).flip(0)[: len(cosines)]
    angles = torch.where(cosines**2 < 0.5, torch.acos(cosines), torch.asin(sines))
    return tuple(float(angle) for angle in torch.rad2deg(angles))

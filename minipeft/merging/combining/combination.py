"""How adapters are combined: the options, checked, and what they make of the updates of one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minipeft.config.options import number, one_of, rank
from minipeft.errors import ConfigError, TargetError, shown
from minipeft.kernels.products import Factors, clamped, joined, product_norm, truncated, truncated_matrix
from minipeft.merging.combining.sources import Update
from minipeft.merging.combining.task_arithmetic import ELECTS, PRUNED, weighted_sum

TYPES = ("linear", "cat", "svd", *(f"{scheme}{end}" for end in ("", "_svd") for scheme in PRUNED))
DRIVERS = (None, "gesvd", "gesvdj", "gesvda")


@dataclass(frozen=True)
class Combination:
    """The options of `add_weighted_adapter`, by PEFT's names."""

    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        one_of("combination_type", self.combination_type, TYPES)
        one_of("majority_sign_method", self.majority_sign_method, ("total", "frequency"))
        one_of("svd_driver", self.svd_driver, DRIVERS)
        if self.svd_rank is not None:
            rank("svd_rank", self.svd_rank)
        if self.svd_clamp is not None and not 0 <= number("svd_clamp", self.svd_clamp) <= 1:
            raise ConfigError(f"svd_clamp must be a quantile from 0 to 1, not {self.svd_clamp!r}.")
        if self.density is not None and not 0 < number("density", self.density) <= 1:
            raise ConfigError(
                f"density must be the share of values to keep, above 0 and at most 1, not {self.density!r}."
            )
        prunes, svd = self.scheme in PRUNED, self.combination_type.endswith("svd")
        if prunes and self.density is None:
            raise ConfigError(f"combination_type {self.combination_type!r} needs density, the share of values to keep.")
        unused = {"density": self.density is not None and not prunes}
        unused["majority_sign_method"] = self.majority_sign_method != "total" and self.scheme not in ELECTS
        unused |= {f"svd_{o}": getattr(self, f"svd_{o}") is not None and not svd for o in ("rank", "clamp", "driver")}
        if names := [name for name, is_unused in unused.items() if is_unused]:
            raise ConfigError(
                f"combination_type {self.combination_type!r} has no use for {shown(names)}; leave it out."
            )

    @property
    def scheme(self) -> str:
        """What is done before an SVD: "linear", or a key of `PRUNED`."""
        return "linear" if self.combination_type == "svd" else self.combination_type.removesuffix("_svd")

    def of(self, path: str, updates: Sequence[Update], ranks: Sequence[int]) -> Factors:
        """(up, down) of the combined update of one layer, shapes (matrices, out, r) and (matrices, r, in).

        Args:
            path: name of the layer.
            updates: on it.
            ranks: of all updates on all layers; their maximum is what an SVD keeps without an `svd_rank`.

        Raises:
            TargetError: an update has no factors, or their ranks differ, and this way needs that.
        """
        weights = [update.weight for update in updates]
        if self.combination_type == "cat":
            return joined(_pairs(path, updates, self.combination_type), weights)
        if not self.combination_type.endswith("svd"):
            return self._of_factors(path, updates)
        left = self.svd_rank or max(ranks)
        pairs = [update.factors() for update in updates]
        known = [pair for pair in pairs if pair is not None]
        # Clamping depends on the signs of the singular vectors: those of the whole matrix, as in PEFT.
        if self.combination_type == "svd" and len(known) == len(pairs) and self.svd_clamp is None:
            return truncated(*joined(known, weights), left, self.svd_driver)
        ops = updates[0].layer.ops
        turned = ops.fan_in_fan_out or ops.is_embedding  # as PEFT holds it, so that random masks are the same
        dense = [update.dense().mT if turned else update.dense() for update in updates]
        matrix = weighted_sum(dense, weights, self.scheme, self.density, self.majority_sign_method)
        up, down = truncated_matrix(matrix.mT if turned else matrix, left, self.svd_driver)
        return (up, down) if self.svd_clamp is None else clamped(up, down, self.svd_clamp)

    def _of_factors(self, path: str, updates: Sequence[Update]) -> Factors:
        """The factors of all updates, added up: ``sum_i sqrt|w_i s_i| A_i`` with the signs, and the same of B."""
        pairs = _pairs(path, updates, self.combination_type)
        if len({down.shape[-2] for _, down in pairs}) > 1:
            said = [f"{update.name} has {down.shape[-2]}" for update, (_, down) in zip(updates, pairs, strict=True)]
            raise TargetError(
                f"{path}: {self.combination_type!r} adds factors of one rank, and {shown(said)}. 'cat' and the types "
                "with 'svd' take any ranks."
            )
        # PEFT's order of random draws: all of A, then all of B.
        scales = [1.0 if update.adapter.scaling is None else update.adapter.scaling for update in updates]
        signed = [update.weight * scale for update, scale in zip(updates, scales, strict=True)]
        roots = [math.sqrt(abs(weight)) for weight in signed]
        down = [pair[1] for pair in pairs]
        up = [pair[0] if scale == 0 else pair[0] / scale for pair, scale in zip(pairs, scales, strict=True)]
        options = (self.scheme, self.density, self.majority_sign_method)
        A = weighted_sum(down, [math.copysign(root, w) for root, w in zip(roots, signed, strict=True)], *options)
        return weighted_sum(up, roots, *options), A


def _pairs(path: str, updates: Sequence[Update], combination_type: str) -> list[Factors]:
    pairs = []
    for update in updates:
        pair = update.factors()
        if pair is None:
            raise TargetError(
                f"{path}: the update of {update.name!r} ({type(update.adapter).__name__}) has no factors to "
                f"{'join' if combination_type == 'cat' else 'add'}. combination_type='svd' takes it, and reports what is lost."
            )
        pairs.append(pair)
    return pairs


def measured(updates: Sequence[Update], made: Factors) -> tuple[float, float]:
    """(norm of the weighted sum, distance of the combined update from it), in Frobenius norms."""
    weights = [update.weight for update in updates]
    pairs = [update.factors() for update in updates]
    known = [pair for pair in pairs if pair is not None]
    if len(known) == len(pairs):
        made = (made[0].to(known[0][0].dtype), made[1].to(known[0][1].dtype))
        return product_norm(known, weights), product_norm([*known, made], [*weights, -1.0])
    wanted = weighted_sum([update.dense() for update in updates], weights, "linear", None, "total")
    off: Tensor = wanted - made[0].to(wanted.dtype) @ made[1].to(wanted.dtype)
    return float(torch.linalg.vector_norm(wanted)), float(torch.linalg.vector_norm(off))


def summed_bias(updates: Sequence[Update]) -> Tensor | None:
    """The weighted sum of what the updates add to the layer's bias, shape (out,), or None."""
    terms = [update.weight * bias for update in updates if (bias := update.bias()) is not None]
    return torch.stack(terms).sum(0) if terms else None

"""Exercise 07: a search that is right about seeds, divergence and ties."""

from __future__ import annotations

import math
from types import SimpleNamespace

from minipeft.learning.law import Broken, Laws, as_number, require

LAWS = Laws()
RANKS, ALPHAS, SEEDS = [2, 8, 32], [8, 32], [0, 1, 2]
Setting = tuple[int, int]
# (r, lora_alpha) -> the mean evaluation loss; each table tempts into one mistake.
PLAIN = {(2, 8): 2.9, (2, 32): 2.8, (8, 8): 2.7, (8, 32): 2.0, (32, 8): 2.6, (32, 32): 2.5}
TIE = {(2, 8): 2.9, (2, 32): 2.8, (8, 8): 2.011, (8, 32): 2.005, (32, 8): 2.3, (32, 32): 2.0}


class Runs:
    """Runs with these mean losses, their spread over the seeds, and losses on the training text."""

    def __init__(self, means: dict[Setting, float], training: dict[Setting, float] | None = None) -> None:
        self.means, self.training = means, training or means
        self.spread: dict[Setting, list[float]] = {}
        self.calls: list[tuple[int, int, int]] = []

    def __call__(self, r: int, lora_alpha: float, seed: int) -> dict[str, float]:
        """One run."""
        self.calls.append((r, int(lora_alpha), seed))
        place = (r, int(lora_alpha))
        off = self.spread.get(place, [0.001, -0.001, 0.0])[seed]
        return {"training": self.training[place], "evaluation": self.means[place] + off}


def _chosen(work: SimpleNamespace, runs: Runs) -> Setting:
    found = work.tune(runs, list(RANKS), list(ALPHAS), list(SEEDS))
    require(isinstance(found, tuple | list) and len(found) == 2, f"tune returns {found!r:.60}, not (r, lora_alpha).")
    setting = (found[0], found[1])
    if setting not in runs.means and setting[::-1] in runs.means:
        raise Broken(f"tune returns {setting}: that is (lora_alpha, r), the wrong way round.")
    require(setting in runs.means, f"tune returns {setting}, which is none of the settings.")
    return setting


@LAWS.law("lora_alpha grows with r if the scaling is to stay")
def _keeps_the_scaling(work: SimpleNamespace) -> None:
    given = as_number(work.keep_scaling(8, 32, 16), "keep_scaling(8, 32, 16)")
    wrong = {
        32.0: "lora_alpha stays, so the scaling is halved",
        16.0: "it goes down with r, and the scaling to a quarter",
        32 * math.sqrt(2): "that keeps rank-stabilised LoRA's scaling, lora_alpha / sqrt(r)",
        4.0: "that is the scaling itself; which lora_alpha gives it with the new r?",
        40.0: "the difference of the ranks is added; lora_alpha / r is a ratio",
    }
    if abs(given - 64) > 1e-6:
        why = next(
            (said for value, said in wrong.items() if abs(given - value) < 1e-3),
            f"the scaling becomes {given / 16:g}, not 4",
        )
        raise Broken(f"keep_scaling(8, 32, 16) is not {given:g}: {why}.")


@LAWS.law("every r, lora_alpha and seed is tried, once")
def _tries_all(work: SimpleNamespace) -> None:
    runs = Runs(PLAIN)
    work.tune(runs, list(RANKS), list(ALPHAS), list(SEEDS))
    wanted = {(r, alpha, seed) for r in RANKS for alpha in ALPHAS for seed in SEEDS}
    missing = wanted - set(runs.calls)
    pairs = {call[:2] for call in runs.calls}
    if len(pairs) < len(RANKS) * len(ALPHAS):
        raise Broken(
            f"of {len(RANKS) * len(ALPHAS)} pairs of r and lora_alpha only {len(pairs)} are tried; each r may have another best lora_alpha."
        )
    require(not missing, f"{len(missing)} of {len(wanted)} runs are not made: try every seed.")
    if len(runs.calls) != len(wanted):
        raise Broken(f"{len(runs.calls)} runs are made for {len(wanted)} settings and seeds; keep the results.")


@LAWS.law("the evaluation loss decides")
def _looks_at_evaluation(work: SimpleNamespace) -> None:
    training = {place: 3.0 - 0.08 * place[0] + 0.001 * place[1] for place in PLAIN}
    found = _chosen(work, Runs(PLAIN, training))
    if found == (32, 8):
        raise Broken(
            "it takes the lowest training loss, (32, 8), which more parameters always lower; the evaluation loss decides."
        )
    worst = max(PLAIN, key=PLAIN.__getitem__)
    require(found != worst, f"it takes {found}, which has the highest loss.")
    require(found == (8, 32), f"it takes {found} with a loss of {PLAIN[found]:g}; (8, 32) has {PLAIN[8, 32]:g}.")


@LAWS.law("the mean over the seeds decides, not a lucky one")
def _averages(work: SimpleNamespace) -> None:
    runs = Runs(PLAIN)
    runs.spread = {(32, 32): [-1.0, 0.9, 1.0], (2, 8): [1.0, -1.1, 1.0], (2, 32): [1.0, 1.0, -1.0]}
    found = _chosen(work, runs)
    require(found == (8, 32), f"it takes {found} for a single lucky seed; on average (8, 32) is better.")


@LAWS.law("a setting that diverged is out")
def _leaves_out_diverged(work: SimpleNamespace) -> None:
    for value in (math.nan, math.inf):
        runs = Runs(PLAIN)
        runs.spread = {place: [0.0, value, 0.0] for place in ((2, 8), (2, 32))}
        try:
            found = _chosen(work, runs)
        except ValueError as error:
            raise Broken(f"with two settings that gave {value} it raises a ValueError ({error}).") from None
        require(found == (8, 32), f"it takes {found}; runs with r = 2 gave {value}, and (8, 32) is best of the others.")


@LAWS.law("of settings that are equally good, the smallest r")
def _prefers_small(work: SimpleNamespace) -> None:
    found = _chosen(work, Runs(TIE))
    if found == (32, 32):
        raise Broken(
            "it takes (32, 32), 0.25 % better than (8, 32) at four times the numbers: within 1 %, take the smaller r."
        )
    if found == (8, 8):
        raise Broken("of the two good settings with r = 8 it takes the one with the higher loss.")
    require(found == (8, 32), f"it takes {found} with a loss of {TIE[found]:g}, more than 1 % above the best.")

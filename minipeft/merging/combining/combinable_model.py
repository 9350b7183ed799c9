"""The verb of an adapted model that makes one adapter of several."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from minipeft.config.options import flags, number
from minipeft.errors import ConfigError, StateError, all_or_nothing, shown, told
from minipeft.injection.starting import check_started
from minipeft.injection.state import WithAdapters, check_name
from minipeft.merging.combining.combination import Combination
from minipeft.merging.combining.report import CombineReport
from minipeft.merging.combining.weighted import add_weighted

logger = logging.getLogger("minipeft")
FAR = 0.1  # relative error from which a combination that is meant as a sum is worth a warning


class CombinableModel(WithAdapters):
    """The part of `minipeft.AdaptedModel` that combines several adapters."""

    @all_or_nothing
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        different_targets: bool = False,
    ) -> CombineReport:
        """Make a new LoRA adapter of several adapters, frozen and inactive until `set_adapter`, and say what that cost.

        The weighted sum of their updates, ``sum_i w_i D_i``, is what each type is compared with:

        * "cat" is exact: the factors stand next to each other, and the ranks add up. It takes any method whose update
          is a product: LoRA, LoHa, VeRA, AdaLoRA.
        * "svd" is the nearest update of rank `svd_rank`. It takes LoKr, too. The SVD is that of a small core, since no
          array as large as a weight is needed.
        * "linear" adds the factors themselves, which leaves products of one adapter's A with another one's B.
        * "ties", "dare_linear", "dare_ties" and "magnitude_prune" do so after leaving out values, see
          `minipeft.merging.combining.task_arithmetic`; with "_svd" at the end, they leave out values of whole updates.

        Results are PEFT's, but for what is wrong there: `use_rslora` and `lora_bias` count as they act; a combination of
        one adapter is what `combination_type` says, and not always "linear"; ranks are the same on all layers, as the
        configuration says. Random masks are drawn by torch's generator in PEFT's order, but PEFT draws the starting values of
        the new adapter before.

        Args:
            adapters: their names, each once.
            weights: one each; negative ones subtract.
            adapter_name: of the new one.
            combination_type: see above.
            svd_rank: of the result; None: the largest rank of these adapters.
            svd_clamp: a quantile, by which the values of the factors are limited after an SVD.
            svd_full_matrices: PEFT's option, which changes nothing in the result.
            svd_driver: of ``torch.linalg.svd``, on CUDA only.
            density: the share of values that the types with pruning keep, above 0 and at most 1.
            majority_sign_method: how TIES elects signs: "total" or "frequency".
            different_targets: let an adapter lack layers that others have: its update is zero there.

        Returns:
            The distance from the weighted sum, per layer and in all. It also goes to the logger "minipeft".

        Raises:
            StateError: a name is unknown or taken; an adapter multiplies the weight (DoRA, OFT, (IA)^3) or trains modules or
                rows of tokens in full; a value is not finite; or an adapter is merged.
            ConfigError: a number or an option is not allowed.
            TargetError: the adapters are on different layers, or what is to be added differs in rank or has no factors.
        """
        weights_by_name = self._checked_weights(adapters, weights)
        check_name(adapter_name, self._state.configs)
        flags(svd_full_matrices=svd_full_matrices, different_targets=different_targets)
        how = Combination(combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
        if svd_driver is not None and any(p.device.type != "cuda" for p in self.parameters()):
            raise ConfigError("svd_driver is for CUDA, and this model is elsewhere; leave it out.")
        self._state.check_unmerged()
        check_started(self._state, tuple(weights_by_name))
        report = add_weighted(self, weights_by_name, adapter_name, how, different_targets=different_targets)
        is_far = combination_type in ("linear", "svd") and report.total > FAR
        logger.log(logging.WARNING if is_far else logging.INFO, "%s", report)
        return report

    def _checked_weights(self, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
        if (
            isinstance(adapters, str)
            or not isinstance(adapters, Sequence)
            or not all(isinstance(a, str) for a in adapters)
        ):
            raise ConfigError(f"adapters must be a list of names, not {told(adapters)}.")
        if isinstance(weights, str) or not isinstance(weights, Sequence):
            raise ConfigError(f"weights must be a list of numbers, not {told(weights)}.")
        if repeated := [name for name, count in Counter(adapters).items() if count > 1]:
            raise StateError(f"adapters: {shown(repeated)} stands there more than once; add up its weights.")
        self._check_known(adapters)
        if len(adapters) != len(weights):
            raise ConfigError(
                f"weights must have one number for each of the {len(adapters)} adapters, not {len(weights)}."
            )
        return {name: number(f"the weight of {name!r}", w) for name, w in zip(adapters, weights, strict=True)}

"""The contract suite, public; see `minipeft.testing.report`."""

from __future__ import annotations

from minipeft.testing.report import CHECKS, PairReport, Report, check_layer, check_method, check_pair, refusal

__all__ = ["CHECKS", "PairReport", "Report", "check_layer", "check_method", "check_pair", "refusal"]

"""The contract, public: check a method or a layer of your own against everything the rest of the library relies on.

    from minipeft.testing import check_layer, check_method

    print(check_method("my_method"))  # on every registered layer type
    print(check_layer(MyLayer, make=MyLayer))  # under every registered method

Both need nothing but minipeft. They raise a `ContractError` that names the method, the layer and the check that failed, and
return a `Report` of what passed, what was skipped and why, and which pairs are refused with which words.
"""

from __future__ import annotations

from minipeft.testing.checks import CHECKS
from minipeft.testing.examples import register_example, register_options
from minipeft.testing.report import PairReport, Report, check_layer, check_method, check_pair, refusal

__all__ = [
    "CHECKS",
    "PairReport",
    "Report",
    "check_layer",
    "check_method",
    "check_pair",
    "refusal",
    "register_example",
    "register_options",
]

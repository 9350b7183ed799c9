"""Modules of which it is known that their inputs are not rows of the batch, whatever size they have."""

from __future__ import annotations

from torch import nn

from minipeft.injection.module_tree import outside_adapters, wrappers
from minipeft.transformers_model import main_input_name

EXPERTS = {"expert", "experts"}  # what models call the list of them


def mark_rows(model: nn.Module) -> bool:
    """Say of each wrapper what it is called with, if not with the rows of the model's main input.

    Returns:
        Whether a module says if rows or positions come first, see `minipeft.injection.row_order`.
    """
    main, others, told = main_input_name(model), {}, False
    for path, module in outside_adapters(model):
        told |= says_order(module)
        reads = getattr(type(module), "main_input_name", main)
        # An encoder of images in a model of text sees as many images as there are, in no relation to the rows.
        if main == "input_ids" and reads != main:
            others[path] = f"the {reads} of the whole batch"
    for path, wrapper in wrappers(model):
        above = [path[:end] for end, letter in enumerate(path) if letter == "."]
        wrapper.counts = next((others[name] for name in above if name in others), None)
        if EXPERTS & {*path.split(".")}:
            wrapper.counts = "the tokens that chose one expert"
    return told


def says_order(module: nn.Module) -> bool:
    """Whether it is an attention or a recurrent layer of torch's, or like them."""
    return isinstance(getattr(module, "batch_first", None), bool)

"""A saved adapter, or the state of a whole model, is loaded bit for bit; anything wrong with a file stops the load."""

from __future__ import annotations

import tempfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from minipeft.errors import CheckpointError
from minipeft.files.file_names import WEIGHTS_FILE
from minipeft.model import get_adapter_model, load_adapter
from minipeft.testing.case import Case, fingerprint


def files(case: Case) -> str | None:
    """A saved adapter is loaded bit for bit, and a missing, extra or reshaped tensor stops the load and changes nothing."""
    model = case.adapted()
    x = case.input(case.base())
    expected = model(x)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        model.save_pretrained(directory)
        loaded = load_adapter(case.base(), directory, is_trainable=True)
        if not torch.equal(loaded(x), expected):
            raise case.fail("files", "the loaded adapter computes something else than the saved one")
        with safetensors.safe_open(directory / WEIGHTS_FILE, "pt") as file:
            metadata = file.metadata()
        saved = safetensors.torch.load_file(directory / WEIGHTS_FILE)
        if not saved:
            raise case.fail("files", "no tensor is saved")
        damaged = {f"{key!r} reshaped": {**saved, key: _reshaped(value)} for key, value in saved.items()}
        damaged["an extra tensor"] = {**saved, f"{next(iter(saved))}.extra": torch.zeros(1)}
        refusals = 0
        for key in saved:
            damaged[f"{key!r} missing"] = {k: v for k, v in saved.items() if k != key}
        for what, tensors in damaged.items():
            safetensors.torch.save_file(tensors, directory / WEIGHTS_FILE, metadata)
            refusals += _load_refused(case, directory, what, x, expected)
        if refusals < len(damaged) - len(saved) + 1:
            raise case.fail("files", "a file loads whichever of its tensors is missing")
    return None


def whole_state(case: Case) -> str | None:
    """The ``state_dict`` of a whole model, loaded into one that had another base until then, gives the same output."""
    model = case.adapted()
    x, state = case.input(case.base()), model.state_dict()
    try:
        case.base().load_state_dict(case.base().state_dict())
    except Exception as error:
        return f"{case.layer} itself cannot load its own state ({error})"
    base = case.base()
    with torch.no_grad():
        for parameter in base.parameters():
            if type(parameter) is nn.Parameter and parameter.is_floating_point():
                parameter.mul_(1.5)
    other = get_adapter_model(base, case.config())
    other.load_state_dict(state)
    if not torch.equal(other(x), model(x)):
        raise case.fail("whole_state", "with the state of the whole model, another base computes something else")
    return None


def _reshaped(tensor: Tensor) -> Tensor:
    return torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1) if tensor.ndim else torch.zeros(2)


def _load_refused(case: Case, directory: Path, what: str, x: Tensor, expected: Tensor) -> bool:
    """Whether the load is refused; otherwise it must have made the same adapter, for example from a saved seed."""
    base = case.base()
    before = fingerprint(base)
    try:
        loaded = load_adapter(base, directory)
    except CheckpointError:
        if fingerprint(base) != before:
            raise case.fail("files", f"a refused load ({what}) changed the model") from None
        return True
    if not what.endswith("missing") or not torch.equal(loaded(x), expected):
        raise case.fail("files", f"a file with {what} loads")
    return False

"""Loading an adapter with the programs that are installed here, and comparing what comes out."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import CheckpointError, ConfigError, told_error
from minipeft.files.readers.names import Reader
from minipeft.files.reading import read_object, reading

EQUAL = 1e-4  # allowed difference of two outputs, over the largest of them
SCRIPT = "convert_lora_to_gguf.py"
MAX_SECONDS = 600


@dataclass(frozen=True)
class Tried:
    """What became of an adapter in another program."""

    said: str
    difference: float | None = None  # largest of the outputs, over their largest value; None: nothing to compare

    @property
    def is_equal(self) -> bool:
        """Whether the adapter has the effect there that it has here."""
        return self.difference is not None and self.difference <= EQUAL


def base_model(directory: Path, architecture: str | None = None, **options: Any) -> Any:
    """The transformers model in a directory, for inference.

    Args:
        directory: of the model.
        architecture: a class of transformers, to take instead of the one that the directory names.
        options: of its ``from_pretrained``; without any it loads in float32.

    Raises:
        MinipeftError: transformers is missing, or the directory holds no model that it knows.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("loading a base model needs transformers: pip install transformers.")
    names = read_object(directory / "config.json").get("architectures")
    with _quiet():
        import transformers

        cls: Any = getattr(
            transformers, architecture or (str(names[0]) if isinstance(names, list) and names else ""), None
        )
    is_model = isinstance(cls, type) and issubclass(cls, nn.Module)
    if cls is None or not (is_model or architecture):
        raise CheckpointError(f"{directory / 'config.json'} names no model class of transformers in 'architectures'.")
    with reading(directory), _quiet():
        model = cls.from_pretrained(directory, **(options or {"dtype": torch.float32}))
    return model.eval()


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """Outputs for a fixed batch: logits, or the last hidden states of a model without a head."""
    with _quiet():
        found = model(**any_batch(model))
    values = getattr(found, "logits", None)
    return values if isinstance(values, Tensor) else found[0]


def any_batch(model: Any) -> dict[str, Tensor]:
    """A fixed batch that the model takes: tokens or pixels at random; raises ConfigError if it reads something else."""
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    if model.main_input_name != "input_ids":
        size = getattr(model.config, "image_size", None)
        if model.main_input_name != "pixel_values" or not isinstance(size, int):
            raise ConfigError(f"there is no batch for {type(model).__name__}, which reads {model.main_input_name}.")
        return {"pixel_values": torch.randn(1, model.config.num_channels, size, size, generator=generator)}
    ids = torch.randint(1, config.vocab_size, (1, 16), generator=generator)  # 0 often pads
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


def tried(reader: Reader, base: Path, directory: Path, ours: Tensor) -> Tried:
    """Load an adapter with another program, if that is installed here.

    `ours` is what `outputs` gave with this library.
    """
    if reader is Reader.LLAMA_CPP:
        return _script(base, directory)
    if reader not in (Reader.PEFT, Reader.TRANSFORMERS):
        return Tried(f"not tried: there is no way to try {reader.value} here")
    missing = [name for name in ("peft", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return Tried(f"not tried: {missing[0]} is not installed")
    model = base_model(base)
    alone = outputs(model)
    try:
        with _quiet():
            theirs = outputs(_loaded(reader, model, directory).eval())
    except Exception as error:
        return Tried(f"refused: {type(error).__name__}: {told_error(error)}", float("inf"))
    most = float(ours.abs().max()) or 1.0
    difference = float((theirs - ours).abs().max()) / most
    if difference <= EQUAL:
        return Tried(f"the same outputs, to {difference:.1e}", difference)
    effect = "as without the adapter, " if torch.equal(theirs, alone) else ""
    return Tried(f"other outputs, {effect}off by {difference:.1e}", difference)


def _loaded(reader: Reader, model: Any, directory: Path) -> Any:
    if reader is Reader.TRANSFORMERS:
        model.load_adapter(str(directory))
        return model
    import peft

    return peft.PeftModel.from_pretrained(model, directory)


def _script(base: Path, directory: Path) -> Tried:
    """Run llama.cpp's converter, if the PATH or the folder in LLAMA_CPP has it."""
    folder = os.environ.get("LLAMA_CPP")
    found = shutil.which(SCRIPT) or (str(Path(folder) / SCRIPT) if folder else None)
    if found is None or not os.path.isfile(found):
        return Tried(f"not tried: {SCRIPT} is neither on the PATH nor in the folder that LLAMA_CPP names")
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, found, str(directory), "--base", str(base), "--outfile", f"{place}/adapter.gguf"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=MAX_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Tried(f"not tried: {told_error(error)}")
        if done.returncode == 0:
            return Tried(f"{SCRIPT} takes it")
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    return Tried(f"{SCRIPT} refuses it: {last[:200]}", float("inf"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within the context other programs print no warnings or messages as they load."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield

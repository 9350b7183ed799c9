"""The flags of examples/train.py for a real run: what is loaded, how it learns, and where it ends up."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import minipeft  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
ASSETS = Path(__file__).resolve().parents[1] / "examples" / "assets"
TINY = ASSETS / "tiny"


@pytest.fixture(scope="module")
def train(train):
    """Without what is slow: long samples and the curve."""
    train.SAMPLE_TOKENS, train.plot_losses = 2, lambda *_: None
    return train


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(gzip.decompress((ASSETS / "corpus" / "code-train.txt.gz").read_bytes()).decode()[:1900], "utf-8")
    return path


@pytest.fixture(scope="module")
def bf16_base(tmp_path_factory):
    """The embedded model as a checkpoint in bfloat16."""
    directory = tmp_path_factory.mktemp("bf16")
    transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TINY / name).read_bytes())
    return directory


@pytest.fixture
def go(train, text, tmp_path):
    """Runs three updates in `tmp_path / "run"`, unless flags say otherwise, and gives that directory."""

    def go(*flags, name="run"):
        common = ["--train_file", text, "--max_length", "24", "--batch_size", "5", "--max_steps", "3"]
        train.main([str(word) for word in (*common, "--output_dir", tmp_path / name, *flags)])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return tmp_path / name

    return go


@pytest.fixture
def refused(go):
    """The one line with which a run is refused."""

    def refused(*flags):
        with pytest.raises(SystemExit) as stopped:
            go(*flags)
        message = str(stopped.value.code)
        assert message.startswith("train.py: error: ")
        assert "\n" not in message
        return message

    return refused


@pytest.fixture
def bases(train, monkeypatch):
    """The bases that a run loads, each with the dtype it had."""
    found = []
    load = train.load_base

    def load_base(args):
        tokenizer, model = load(args)
        found.append((model, model.dtype))
        return tokenizer, model

    monkeypatch.setattr(train, "load_base", load_base)
    return found


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]


def rates_of(directory):
    return [row["learning_rate"] for row in rows_of(directory) if "loss" in row]


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [([], torch.float32), (["--dtype", "bf16"], torch.bfloat16), (["--dtype", "auto"], torch.bfloat16)],
)
def test_the_base_is_loaded_once_and_in_the_dtype_asked_for(go, bases, bf16_base, capsys, flags, dtype):
    directory = go("--model_name", bf16_base, *flags)
    assert [found for _, found in bases] == [dtype]
    assert {value.dtype for value in load_file(directory / "adapter_model.safetensors").values()} == {torch.float32}
    out = capsys.readouterr().out
    assert "reloaded against trained model: logits differ by 0.0e+00" in out
    assert "merged against trained model" in out


def test_auto_is_the_dtype_of_the_checkpoint(train):
    args = train.parse_args(["--model_name", str(TINY), "--dtype", "auto"])
    assert train.load_base(args)[1].dtype == torch.float32


@pytest.mark.parametrize("flags", [["--lean"], ["--quantize", "int8_weight_only", "--dtype", "bf16"]])
def test_the_final_check_works_within_the_one_base(go, bases, capsys, flags):
    go(*flags)
    assert len(bases) == 1
    assert "merged against trained model" in capsys.readouterr().out


def test_the_final_check_notices_a_file_that_is_not_the_trained_adapter(go, train, monkeypatch):
    save = train.Run.save_adapter

    def save_another(run):
        with torch.no_grad():
            next(parameter for parameter in run.model.parameters() if parameter.requires_grad).mul_(2)
        save(run)
        with torch.no_grad():
            next(parameter for parameter in run.model.parameters() if parameter.requires_grad).div_(2)

    monkeypatch.setattr(train.Run, "save_adapter", save_another)
    with pytest.raises(SystemExit, match="the reloaded adapter is not the one that was trained"):
        go("--learning_rate", "0.01")

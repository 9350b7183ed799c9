"""The short examples run and do what they say."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from tiny_models import foreign_code
from transformers import AutoModelForCausalLM

from minipeft import ConfigError
from minipeft.registry import registry

with foreign_code():
    import peft

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def isolated():
    with registry.isolated():
        yield


@pytest.mark.usefixtures("isolated")
def test_query_key_and_value_in_one_layer_get_ranks_of_their_own():
    path = EXAMPLES / "fused_qkv.py"
    change, logits, loaded, merged = runpy.run_path(str(path))["main"]()
    q, k, v = change.chunk(3, dim=1)
    # After one step of B from zero the change has the rank of the adapter; k has no adapter.
    assert [int(torch.linalg.matrix_rank(part, rtol=1e-3)) for part in (q, k, v)] == [8, 0, 2]
    assert torch.equal(loaded, logits)
    torch.testing.assert_close(merged, logits, rtol=1e-5, atol=1e-5)
    assert len(path.read_text("utf-8").splitlines()) <= 60


def test_a_sweep_trains_in_one_batch_and_each_adapter_is_saved(tmp_path, capsys):
    flags = ["--ranks", "2", "4", "--learning_rates", "3e-3", "--steps", "8", "--rows", "1", "--length", "32"]
    main = runpy.run_path(str(EXAMPLES / "train_many.py"))["main"]
    before, after = main([*flags, "--output_dir", str(tmp_path)])
    assert after.keys() == {"r2_lr3e-03", "r4_lr3e-03"}
    assert all(after[name] < before[name] for name in after)
    assert (tmp_path / "loss_curves.png").stat().st_size > 0
    assert "2 adapters, 8 steps" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(EXAMPLES / "assets" / "tiny")
    for name in after:
        with foreign_code():
            model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        assert model.peft_config["default"].r == int(name[1])


def test_rates_that_round_alike_have_adapters_of_their_own_and_repeated_ones_have_one():
    _, rates = runpy.run_path(str(EXAMPLES / "train_many.py"))["adapted"]([2, 2], [1e-3, 1.2e-3, 1e-3, 1.0])
    assert rates == {"r2_lr1e-03": 1e-3, "r2_lr12e-04": 1.2e-3, "r2_lr1e00": 1.0}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ranks", "0"], "argument --ranks: 0 is not above 0"),
        (["--learning_rates", "nan"], "argument --learning_rates: nan is not above 0"),
        (["--learning_rates", "1e300"], "argument --learning_rates: 1e300 is not above 0 and below 2147483648"),
        (["--seed", "1" * 23], f"argument --seed: {'1' * 23} is not above -1"),
        (["--rows", "many"], "argument --rows: invalid number value"),
    ],
)
def test_a_flag_of_a_sweep_that_cannot_be_is_said_before_anything_is_loaded(flags, words, capsys):
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "train_many.py"))["main"](flags)
    assert words in capsys.readouterr().err


def test_a_sweep_is_not_trained_in_each_of_two_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "train_many.py"))["main"]([])
    assert "start it by python, not by accelerate launch" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_found_before_a_sweep_trains(tmp_path):
    (tmp_path / "file").touch()
    flags = ["--ranks", "2", "--learning_rates", "1e-3", "--output_dir", str(tmp_path / "file")]
    with pytest.raises(FileExistsError):
        runpy.run_path(str(EXAMPLES / "train_many.py"))["main"](flags)


def test_rows_longer_than_the_model_reads_are_refused():
    with pytest.raises(ConfigError, match="--length must be from 2 to 256, not 300"):
        runpy.run_path(str(EXAMPLES / "train_many.py"))["main"](["--ranks", "2", "--length", "300"])

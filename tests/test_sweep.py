"""The sweep continues after a kill with equal results, and each of its cells learns what it would learn alone."""

import importlib
import json
import os

import pytest
from conftest import EXAMPLES
from tiny_models import foreign_code

import minipeft

FLAGS = "--rates 1e-3 1e-2 --ranks 2 --alphas 8 --targets c_attn --seeds 2 --methods ia3 adalora --method_rates 1e-2"
FLAGS += " --full_rates 1e-3 --rows 4 --other_rows 2 --length 16"
DRAWN = []


@pytest.fixture(scope="module")
def sweep(text):
    """The example as a module, which reads a short text and does not draw."""
    with pytest.MonkeyPatch.context() as patch, foreign_code():
        patch.syspath_prepend(str(EXAMPLES))
        patch.setattr(importlib.import_module("sweep_report"), "draw", lambda results, chosen, path: DRAWN.append(path))
        module = importlib.import_module("sweep")
        words = [*FLAGS.split(), "--text", str(text), "--other_text", str(text)]
        flags = module.flags
        patch.setattr(module, "flags", lambda argv: flags([*words, *argv]))
        yield module


def cells(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text("utf-8").splitlines()][1:]


def run(sweep, folder, *more):
    with foreign_code():
        return sweep.main(["--output_dir", str(folder), *map(str, more)])


@pytest.fixture(scope="module")
def whole(sweep, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(sweep, folder, "--together", 3)


def test_a_killed_sweep_continues_with_equal_results(sweep, whole, tmp_path, monkeypatch):
    train, trained = sweep.Training.run, []

    def killed(self, group, tick):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.extend([group])
        return train(self, group, tick)

    monkeypatch.setattr(sweep.Training, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(sweep, tmp_path, "--together", 3)
    assert len(cells(tmp_path)) == sum(map(len, trained)) < len(cells(whole[0]))
    again = []
    monkeypatch.setattr(
        sweep.Training, "run", lambda self, group, tick: again.append(group) or train(self, group, tick)
    )
    share = run(sweep, tmp_path, "--together", 3)
    assert not [group for group in again if group in trained]
    assert cells(tmp_path) == cells(whole[0])
    assert share == whole[1]


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_cell_learns_what_it_would_learn_alone(sweep, whole, method):
    args = sweep.flags([])
    [record] = [each for each in cells(whole[0]) if (each["rate"], each["seed"], each["method"]) == (1e-2, 1, method)]
    training = sweep.Training(args, batch=1)
    cell = sweep.Cell(**{name: record[name] for name in sweep.Cell.__annotations__})
    with foreign_code():
        [alone] = training.run([cell], lambda: None)
    assert alone["loss"] == pytest.approx(record["loss"], abs=1e-4)
    assert alone["bytes"] == record["bytes"]
    assert method != "lora" or alone["bytes"] == 4 * 2 * (128 + 384) * 4


def test_the_report_has_a_row_for_each_setting_and_says_how_far_the_suggestion_is(whole, sweep, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- sweep: begin -->\nold\n<!-- sweep: end -->\nafter\n", "utf-8")
    share = run(sweep, whole[0], "--together", 3, "--write", page)  # everything is done: it only reports
    text, printed = page.read_text("utf-8"), capsys.readouterr().out
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert DRAWN[-2:] == [whole[0] / "sweep.png", tmp_path / "figures" / "sweep.png"]
    for row in ("**suggested**", "full fine-tuning", "| ia3 |", "| adalora |", "lora, r = 2, alpha = 8, c_attn"):
        assert row in text
    losses = {}
    for each in cells(whole[0]):
        if each["method"] == "lora":
            losses.setdefault((each["rate"], each["rank"]), []).append(each["loss"])
    means = {key: sum(values) / len(values) for key, values in losses.items()}
    assert share == pytest.approx(means[max(means, key=lambda key: key[1])] / min(means.values()) - 1)
    assert f"{100 * share:.1f} % above" in printed


@pytest.mark.slow
def test_the_plots_are_drawn(whole):
    report, records = importlib.import_module("sweep_report"), cells(whole[0])
    importlib.reload(report)
    report.report(records, records[0], whole[0], None)
    assert (whole[0] / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_write_that_fails_leaves_the_cells_that_were_there(sweep, tmp_path, monkeypatch):
    records = sweep.Records(tmp_path / "cells.jsonl", {"model": "a"})
    cell = {"method": "lora", "rate": 1.0, "rank": 1, "alpha": 1.0, "targets": "a", "seed": 0, "loss": 1.0, "bytes": 4}
    records.add([cell])
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        records.add([{**cell, "seed": 1}])
    assert cells(tmp_path) == [cell]
    with pytest.raises(minipeft.DataError, match="other settings"):
        sweep.Records(tmp_path / "cells.jsonl", {"model": "b"})


@pytest.mark.parametrize(
    "lines", ["", '{"model": "a"}\n{"meth', '{"model": "a"}\n{"method": "lora"}\n', '{"model": "a"}\n[]\n', "\x00"]
)
def test_a_damaged_file_of_cells_is_named(sweep, tmp_path, lines):
    (tmp_path / "cells.jsonl").write_text(lines)
    with pytest.raises(minipeft.DataError, match=r"cells\.jsonl is damaged .*delete it"):
        sweep.Records(tmp_path / "cells.jsonl", {"model": "a"})


@pytest.mark.parametrize(("flag", "value"), [("--rates", "-0.01"), ("--method_rates", "nan"), ("--together", "0")])
def test_a_number_that_is_not_above_zero_is_refused(sweep, flag, value, capsys):
    with pytest.raises(SystemExit):
        sweep.flags([flag, value])
    assert f"argument {flag}: {value} is not above 0" in capsys.readouterr().err

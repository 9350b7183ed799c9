"""Reading runs and drawing them."""

import json

import pytest
from test_cli import run
from tiny_models import adapted

from minipeft import CheckpointError, ConfigError
from minipeft.planning.runs import draw_runs, read_run

ROWS = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}, {"step": 2, "eval_loss": 3.5, "eval_perplexity": 33.1}]


@pytest.fixture
def ours(tmp_path):
    adapted().save_pretrained(tmp_path / "ours")
    cut_off = '{"step": 3, "lo'
    (tmp_path / "ours" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + cut_off)
    return tmp_path / "ours"


@pytest.fixture
def theirs(tmp_path):
    for step, rows in ((2, ROWS[:1]), (10, ROWS)):
        folder = tmp_path / "theirs" / f"checkpoint-{step}"
        adapted(scale=0.1 * step).save_pretrained(folder)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    return tmp_path / "theirs"


def test_both_kinds_of_log_are_read(ours, theirs):
    for place in (ours, theirs, ours / "metrics.jsonl"):
        found = read_run(place)
        assert found.training == [(1.0, 4.0), (2.0, 3.0)]
        assert found.evaluation == [(2.0, 3.5)]
        assert len(found.layers) == 2
    assert read_run(theirs).layers[0].norm > 10 * read_run(ours).layers[0].norm  # of the latest checkpoint


def test_a_picture_has_both_runs(ours, theirs, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    run("plot", ours, theirs, "--out", tmp_path / "runs.png")
    losses, updates = drawn[0].axes
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["ours", "theirs"]
    assert [list(line.get_xdata()) for line in updates.get_lines()] == [["0", "1"], ["0", "1"]]
    expected = [layer.norm for layer in read_run(ours).layers]
    assert list(updates.get_lines()[0].get_ydata()) == pytest.approx(expected)


def test_the_picture_is_a_png(ours, tmp_path):
    run("plot", ours, "--out", tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_named(ours, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "trainer_state.json").write_text("[]")
    for place, words in (
        ("nowhere", "is not a directory"),
        ("x" * 5000, "cannot be read .File name too long"),
        ("empty", "neither metrics.jsonl nor"),
        ("odd", "no log_history"),
    ):
        with pytest.raises(CheckpointError, match=words):
            run("plot", tmp_path / place)
    with pytest.raises(ConfigError, match="cannot be written"):
        run("plot", ours, "--out", tmp_path / "runs.word")


def test_a_run_whose_losses_are_all_nan_and_a_picture_without_a_name_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    with pytest.raises(CheckpointError, match="none that is finite"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match=r"such as runs\.png"):
        draw_runs([], tmp_path)

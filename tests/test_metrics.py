"""The rows of a run: in a file where a directory is given, else in memory alone."""

from minipeft.training.runs.metrics import Metrics, read_rows

ROWS = [{"step": step, "loss": 1 / (step + 1)} for step in range(4)]


def test_rows_are_written_and_read_back_up_to_a_step(tmp_path):
    metrics = Metrics(tmp_path)
    for row in ROWS:
        metrics.write(row)
    assert read_rows(tmp_path / "metrics.jsonl") == metrics.rows == ROWS
    metrics.close()
    again = Metrics(tmp_path, 2)
    again.close()
    assert read_rows(tmp_path / "metrics.jsonl") == again.rows == ROWS[:3]


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = Metrics(None, 2)
    for row in ROWS:
        metrics.write(row)
    metrics.close()
    assert metrics.rows == ROWS
    assert not list(tmp_path.iterdir())

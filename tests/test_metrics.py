"""The rows of a run: in a file where a directory is given, else in memory alone."""

import errno

import pytest

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


class NearlyFull:
    """A file on a disk with space for so many bytes."""

    name = "metrics.jsonl"

    def __init__(self, space):
        self.space, self.written = space, b""

    def write(self, data):
        if not self.space:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self.space = data[: self.space], max(0, self.space - len(data))
        self.written += taken
        return len(taken)


def test_rows_that_find_the_disk_full_are_warned_of_once_and_follow(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.close()
    file = metrics._file = NearlyFull(40)
    metrics.write(ROWS[0])
    with pytest.warns(UserWarning, match="No space left on device"):
        metrics.write(ROWS[1])
    metrics.write(ROWS[2])  # a second warning would be an error
    file.space = 1000
    metrics.write(ROWS[3])
    (tmp_path / "metrics.jsonl").write_bytes(file.written)
    assert read_rows(tmp_path / "metrics.jsonl") == metrics.rows == ROWS

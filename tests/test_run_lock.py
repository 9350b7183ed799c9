"""Two runs never write one directory, and a killed run blocks none."""

import json
import os
import signal
import socket
import sys
import threading
import time
import warnings

import filelock
import pytest
from warm import context

from minipeft import CheckpointError
from minipeft.training.runs.lock import LOCK_FILE, OWNER_FILE, RunLock


def hold(directory, say, release):
    with RunLock(directory):
        say.send(os.getpid())
        release.recv()


@pytest.fixture
def holder(tmp_path):
    """(process that has the lock, what tells it to let go)"""
    heard, say = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path, say, say))
    process.start()
    assert heard.poll(60)
    heard.recv()
    yield process, heard
    process.kill()
    process.join(10)


def test_the_second_run_is_told_who_the_first_is(tmp_path, holder):
    process, _ = holder
    with pytest.raises(CheckpointError) as caught, RunLock(tmp_path):
        pass
    for part in (
        str(tmp_path),
        f"process {process.pid} on {socket.gethostname()}, since 20",
        "command '",
        "choose another",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_ends_lets_the_next_one_in(tmp_path, holder):
    process, tell = holder
    tell.send("end")
    process.join(30)
    assert process.exitcode == 0
    with RunLock(tmp_path):
        assert json.loads((tmp_path / OWNER_FILE).read_text())["pid"] == os.getpid()


def test_a_run_that_is_killed_lets_the_next_one_in_at_once(tmp_path, holder):
    process, _ = holder
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert json.loads((tmp_path / OWNER_FILE).read_text())["pid"] == process.pid  # the note alone locks nothing
    with RunLock(tmp_path):
        pass


def test_one_process_cannot_have_it_twice(tmp_path):
    with RunLock(tmp_path) as lock:
        with pytest.raises(CheckpointError, match=f"process {os.getpid()}"), RunLock(tmp_path):
            pass
        with pytest.raises(CheckpointError, match="already locked by this object"):
            lock.__enter__()
        with pytest.raises(CheckpointError), RunLock(tmp_path):  # and the attempts have not opened it
            pass
    with lock, pytest.raises(CheckpointError), RunLock(tmp_path):  # it can be taken again
        pass


def test_an_error_within_lets_go(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        raise ZeroDivisionError
    with RunLock(tmp_path):
        pass


def test_another_thread_may_let_go(tmp_path):
    lock = RunLock(tmp_path).__enter__()
    thread = threading.Thread(target=lock.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    with RunLock(tmp_path):
        pass


def wait(seconds):
    time.sleep(seconds)


def fork_and_hold(directory, say):
    with RunLock(directory):
        child = os.fork()
        if child == 0:
            wait(60)
            os._exit(0)
        say.send(child)
        wait(60)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path):
    heard, say = context.Pipe()
    process = context.Process(target=fork_and_hold, args=(tmp_path, say))
    process.start()
    assert heard.poll(60)
    worker = heard.recv()
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        os.kill(worker, 0)  # it lives
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("note", [None, "", "[]", "{}", '{"pid": 1}', "\0"])
def test_an_owner_that_left_no_readable_note_is_not_known(note, tmp_path):
    with RunLock(tmp_path):
        if note is None:
            (tmp_path / OWNER_FILE).unlink()
        else:
            (tmp_path / OWNER_FILE).write_text(note)
        with pytest.raises(CheckpointError, match="which one is not known"), RunLock(tmp_path):
            pass


def test_a_directory_that_cannot_be_locked_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / LOCK_FILE).mkdir(parents=True)
    for directory in (tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(
            CheckpointError, match="cannot be locked .*; a run directory must be on a file system with flock"
        ):
            RunLock(directory).__enter__()


def test_a_file_system_without_flock_is_an_error(tmp_path, monkeypatch):
    import errno
    import fcntl

    def absent(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", absent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as a user may have it: what filelock then warns of is an error all the same
        with pytest.raises(CheckpointError, match="cannot be locked .*flock"):
            RunLock(tmp_path).__enter__()
    monkeypatch.undo()
    with RunLock(tmp_path):
        pass


def test_a_note_that_cannot_be_written_lets_go(tmp_path):
    (tmp_path / OWNER_FILE).mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        RunLock(tmp_path).__enter__()
    (tmp_path / OWNER_FILE).rmdir()
    with RunLock(tmp_path):
        pass
    assert filelock.FileLock(tmp_path / LOCK_FILE).acquire(timeout=0)

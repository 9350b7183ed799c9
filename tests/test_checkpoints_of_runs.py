"""Checkpoints of runs: whole or not at all, whatever ends the process and wherever the disk is full."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import warm
from deaths import EXIT_CODE, die_before
from rotation import thinned

from minipeft import CheckpointError, ConfigError, StateError
from minipeft.training.runs.checkpoints import FOREIGN_LEFTOVER_SECONDS, Checkpoints, verify
from minipeft.training.runs.output_dir import checkpoint_to_resume, the_only_run
from minipeft.training.runs.snapshot import Snapshot

SIZE = 1000
KILLS = 8


def snapshot(number, size=SIZE):
    """A checkpoint of which each file tells the number."""
    tensors = {"number": torch.full((size,), number)}
    adapter = {"number": torch.full((8,), float(number))}
    return Snapshot(adapter, {"number": number, "peft_type": "LORA"}, {}, tensors, tensors, {"number": number})


def number_in(folder):
    """The number that all files of a sound checkpoint tell."""
    files = verify(folder)
    assert len(files) == 5
    told = {json.loads(path.read_bytes())["number"] for path in files.values() if path.suffix == ".json"}
    for path in files.values():
        if path.suffix == ".safetensors":
            told |= set(safetensors.torch.load_file(path)["number"].tolist())
    (number,) = told
    return number


def save(directory, step, number=None, keep=2):
    return Checkpoints(directory, keep).save(step, snapshot(step if number is None else number).write)


def names(directory):
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def finish(process):
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def test_the_newest_are_kept_and_the_latest_is_found(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 100_000_000):
        folder = save(tmp_path, step)
        assert checkpoints.latest() == folder
        assert number_in(folder) == step
    assert names(tmp_path) == ["step-00000010", "step-100000000"]


def test_complete_tells_size_and_sum_of_every_file(tmp_path):
    folder = save(tmp_path, 7)
    told = json.loads((folder / "COMPLETE").read_text())
    assert (told["step"], told["format"]) == (7, 1)
    assert {"COMPLETE", *told["files"]} == {path.name for path in folder.iterdir()}
    for name, entry in told["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_a_step_is_saved_again_in_place_of_the_first(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert number_in(save(tmp_path, 2, 20)) == 20
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_every_file_is_on_the_disk_before_the_folder_has_its_name_and_the_folder_before_the_old_ones_go(
    tmp_path, monkeypatch
):
    save(tmp_path, 1)
    events, fsync, rename = [], os.fsync, os.rename

    def watched_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def watched_rename(source, target):
        events.append(f"{Path(source).name.partition('.tmp-')[0]} -> {Path(target).name.partition('.trash-')[0]}")
        rename(source, target)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("there is no /proc here")
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    folder = save(tmp_path, 2, keep=1)
    named = events.index(".step-00000002 -> step-00000002")
    complete = events.index("COMPLETE")
    assert {path.name for path in folder.iterdir()} - {"COMPLETE"} <= set(events[:complete])
    assert events[complete + 1].startswith(".step-00000002.tmp-")
    assert complete + 2 == named
    assert events[named + 1 :] == ["checkpoints", "step-00000001 -> .step-00000001"]


@pytest.mark.parametrize(("keep", "step"), [(0, 1), (True, 1), (2, -1), (2, 1.0), (2, "1")])
def test_numbers_that_make_no_sense_are_refused(keep, step, tmp_path):
    with pytest.raises(ConfigError):
        Checkpoints(tmp_path, keep).save(step, snapshot(1).write)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_taken_back_discards_what_came_after(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "checkpoints" / "step-00000004").mkdir()
    with pytest.raises(CheckpointError, match=r"newer checkpoints \('step-00000003', .*discard_newer\(2\)") as caught:
        save(tmp_path, 2, 20)
    assert "Nothing was changed." in str(caught.value)
    assert number_in(tmp_path / "checkpoints" / "step-00000002") == 2
    assert [path.name for path in Checkpoints(tmp_path).discard_newer(2)] == ["step-00000003", "step-00000004"]
    assert number_in(save(tmp_path, 2, 20)) == 20
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_what_a_checkpoint_may_not_hold_is_refused(tmp_path):
    def link(folder):
        (folder / "a").symlink_to("/etc/hostname")

    for write in (
        lambda folder: (folder / "sub").mkdir(),
        link,
        lambda folder: (folder / "COMPLETE").write_text("{}"),
        lambda folder: (folder / "a b").write_text(""),
        lambda folder: None,
    ):
        with pytest.raises(CheckpointError, match="could not be saved"):
            Checkpoints(tmp_path).save(1, write)
        assert names(tmp_path) == []


def test_an_error_of_the_caller_passes_and_leaves_nothing(tmp_path):
    save(tmp_path, 1)

    def fail(folder):
        (folder / "a").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Checkpoints(tmp_path).save(2, fail)
    assert names(tmp_path) == ["step-00000001"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit": lambda folder: flip(folder / "rng.safetensors"),
    "a longer file": lambda folder: (folder / "rng.safetensors").write_bytes(bytes(10**6)),
    "a missing file": lambda folder: (folder / "rng.safetensors").unlink(),
    "a file more": lambda folder: (folder / "rng.safetensors.bak").write_text("x"),
    "a link": lambda folder: (
        (folder / "rng.safetensors").rename(folder.parent / "x"),
        (folder / "rng.safetensors").symlink_to(folder.parent / "x"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_an_error_that_names_the_file_and_the_sound_one_before(damage, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    folder = tmp_path / "checkpoints"
    DAMAGES[damage](folder / "step-00000003")
    flip(folder / "step-00000002" / "state.json")
    latest = Checkpoints(tmp_path).latest()
    assert latest == folder / "step-00000003"  # and not silently an older one
    with pytest.raises(CheckpointError) as caught:
        verify(latest)
    assert "step-00000003" in str(caught.value)
    assert "rng.safetensors" in str(caught.value)
    assert f"sound one before it is {folder / 'step-00000001'}: to go on from there" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert verify(folder / "step-00000001")


GOOD = {"format": 1, "step": 3, "files": {"state.json": {"size": 1, "sha256": "0"}}}


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 10**5,
        json.dumps(GOOD | {"format": 2}).encode(),
        json.dumps(GOOD | {"step": 4}).encode(),
        json.dumps(GOOD | {"files": {}}).encode(),
        json.dumps(GOOD | {"files": {"../state.json": {"size": 1, "sha256": "0"}}}).encode(),
        json.dumps(GOOD | {"files": {"a": {"size": "1", "sha256": "0"}}}).encode(),
    ],
)
def test_a_folder_without_a_valid_complete_is_passed_over_with_a_warning(content, tmp_path):
    save(tmp_path, 1)
    folder = save(tmp_path, 3)
    if content is None:
        (folder / "COMPLETE").unlink()
    else:
        (folder / "COMPLETE").write_bytes(content)
    with pytest.warns(UserWarning, match="'step-00000003' is not complete and was passed over"):
        assert number_in(Checkpoints(tmp_path).latest()) == 1
    if content is None or b'"step": 4' not in content:
        with pytest.raises(CheckpointError, match="not a complete checkpoint.* before it is .*step-00000001"):
            verify(folder)


def test_other_names_are_left_alone(tmp_path):
    folder = save(tmp_path, 1).parent
    for name in (
        "step-9",
        "step-000000002",
        "step-0000000x",
        ".step-00000009.tmp-",
        "notes",
        ".step-00000002.tmp-a-b-c",
    ):
        (folder / name).mkdir()
    (folder / "step-00000009").write_text("a file")
    assert number_in(Checkpoints(tmp_path).latest()) == 1
    before = set(names(tmp_path))
    (folder / "step-00000009").unlink()
    save(tmp_path, 2)
    assert set(names(tmp_path)) == before - {"step-00000009"} | {"step-00000002"}


def test_what_is_no_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        verify(tmp_path / "nowhere")


def save_and_die(directory, call, step, number, keep):
    die_before(call)
    save(directory, step, number, keep)


# The same step again, which replaces and prunes; and the next step, which does not replace.
SCENARIOS = {"again": (2, 20, 1), "next": (3, 30, 2)}


@pytest.mark.parametrize(("scenario", "every"), thinned((SCENARIOS, [1, 6]), [("next", 6)]))
def test_a_process_that_dies_before_any_write_leaves_old_or_new_and_the_next_save_tidies_up(every, scenario, tmp_path):
    step, number, keep = SCENARIOS[scenario]
    save(tmp_path / "before", 1)
    save(tmp_path / "before", 2)
    found = []
    for call in itertools.count(1, every):
        directory = shutil.copytree(tmp_path / "before", tmp_path / str(call))
        process = warm.context.Process(target=save_and_die, args=(directory, call, step, number, keep))
        process.start()
        code = finish(process)
        if code == 0:  # it has fewer calls
            break
        assert code == EXIT_CODE
        found.append(number_in(Checkpoints(directory).latest()))
        assert number_in(save(directory, 4)) == 4
        assert names(directory) == [f"step-{step if found[-1] == number else 2:08d}", "step-00000004"]
        assert number_in(directory / "checkpoints" / names(directory)[0]) == found[-1]
    assert len(found) * every > 15
    assert set(found) == {2, number}
    assert found == sorted(found)  # from one call on it is there


def save_for_ever(directory, first):
    for step in range(first, first + 10**6):
        save(directory, step, keep=1 + step % 2)
        save(directory, step, keep=1)


def test_a_process_that_is_killed_at_any_moment_leaves_a_sound_latest_checkpoint(tmp_path):
    chance = random.Random(0)
    save(tmp_path, 1)
    done = 1
    for _ in range(KILLS):
        before = set(names(tmp_path))
        process = warm.context.Process(target=save_for_ever, args=(tmp_path, done + 1))
        process.start()
        deadline = time.monotonic() + 60
        while not any(name[0] == "." for name in set(names(tmp_path)) - before) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        assert finish(process) == -signal.SIGKILL
        latest = Checkpoints(tmp_path).latest()
        found = number_in(latest)
        assert found >= done
        done = found
    save(tmp_path, done + 1)
    assert not any(name.startswith(".") for name in names(tmp_path))


def test_what_others_may_still_be_writing_is_left_alone(tmp_path, monkeypatch):
    folder = save(tmp_path, 1).parent
    host, mine, parent = socket.gethostname(), os.getpid(), os.getppid()
    alive, elsewhere, ours = (
        folder / f".step-00000002.tmp-{owner}-01234567"
        for owner in (f"{host}-{parent}", "else-where-1", f"{host}-{mine}")
    )
    for path in (alive, elsewhere, ours):
        path.mkdir()
    save(tmp_path, 2)
    assert alive.exists()
    assert elsewhere.exists()
    assert not ours.exists()  # a process id comes again in a container that is started again
    old = time.time() - FOREIGN_LEFTOVER_SECONDS - 10
    os.utime(elsewhere, (old, old))
    save(tmp_path, 3)
    assert not elsewhere.exists()


def assert_refused(error, needed=True):
    text = str(error.value)
    assert "step-00000002 could not be saved" in text
    assert ("bytes are needed" in text) == needed
    assert "are free" in text
    assert "\n" not in text


def test_what_has_no_room_is_not_begun(tmp_path):
    save(tmp_path, 1)
    calls = []
    with pytest.raises(CheckpointError, match=r"1,000,000,000,000,000,000 bytes are needed, [\d,]+ are free") as error:
        Checkpoints(tmp_path).save(2, calls.append, needed=10**18)
    assert_refused(error)
    assert calls == []
    assert names(tmp_path) == ["step-00000001"]


def save_under_a_limit(directory, report):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    found = []
    for number, write in enumerate((snapshot(2, 10**5).write, too_long)):
        try:
            Checkpoints(directory).save(2, write, needed=8 * 10**5)
        except CheckpointError as error:
            found.append([str(error), names(directory)])
        save(directory, 1, number)  # the run goes on
    report.write_text(json.dumps(found))


def too_long(folder):
    (folder / "state.json").write_bytes(bytes(2**17))


def test_a_write_that_fails_midway_leaves_the_previous_checkpoint_and_nothing_else(tmp_path):
    run, report = tmp_path / "run", tmp_path / "report.json"
    save(run, 1)
    process = warm.context.Process(target=save_under_a_limit, args=(run, report))
    process.start()
    assert finish(process) == 0
    found = json.loads(report.read_text())
    assert len(found) == 2
    for text, left in found:
        assert "could not be saved" in text
        assert "too large" in text
        assert "800,000 bytes are needed, " in text
        assert "\n" not in text
        assert left == ["step-00000001"]
    assert number_in(Checkpoints(run).latest()) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 2 MiB; only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        made = subprocess.run(command, capture_output=True, check=False)
        if sys.platform == "linux" and made.returncode == 0:
            yield folder
            subprocess.run(["umount", str(folder)], check=True)
            return
    pytest.skip("file systems cannot be mounted here")


@pytest.mark.parametrize("told", [True, False])
def test_a_full_disk_leaves_the_previous_checkpoint_and_the_run_goes_on(told, small_disk):
    save(small_disk, 1)
    large = snapshot(2, 2 * 10**5)
    with pytest.raises(CheckpointError) as error:
        Checkpoints(small_disk).save(2, large.write, needed=large.nbytes if told else 0)
    assert_refused(error, needed=told)
    assert told or "No space left" in str(error.value)
    assert names(small_disk) == ["step-00000001"]
    assert number_in(Checkpoints(small_disk).latest()) == 1
    assert number_in(save(small_disk, 2)) == 2


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="could not be saved .Not a directory; how many are free is not known"):
        Checkpoints(tmp_path / "file").save(1, snapshot(1).write)


def test_finding_a_checkpoint_needs_no_torch():
    """So that a watcher or a launcher that looks for the latest one starts at once."""
    code = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('minipeft')\n"
        "package.__path__ = list(importlib.util.find_spec('minipeft').submodule_search_locations)\n"
        "sys.modules['minipeft'] = package\n"
        "import minipeft.training.runs.checkpoints, minipeft.training.runs.lock\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints"])
def test_a_run_that_died_before_its_first_checkpoint_is_not_sent_in_a_circle(left, tmp_path):
    (tmp_path / left).mkdir() if left == "checkpoints" else (tmp_path / left).write_text("")
    with pytest.raises(CheckpointError, match="take --overwrite instead"):
        checkpoint_to_resume(Checkpoints(tmp_path), "latest")
    with pytest.raises(StateError, match="holds a run already") as caught:
        the_only_run(tmp_path, resume=False, overwrite=False).__enter__()
    assert "--overwrite begins anew" in str(caught.value)
    assert "--resume" not in str(caught.value)
    with the_only_run(tmp_path, resume=False, overwrite=True):
        assert checkpoint_to_resume(Checkpoints(tmp_path), None) is None


def test_an_empty_directory_is_begun_without_the_flag(tmp_path):
    with pytest.raises(CheckpointError, match="leave the flag out to begin"):
        checkpoint_to_resume(Checkpoints(tmp_path), "latest")
    with the_only_run(tmp_path, resume=False, overwrite=False):
        assert checkpoint_to_resume(Checkpoints(tmp_path), None) is None

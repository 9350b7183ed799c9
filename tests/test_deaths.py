"""What writes files is killed before each change that it makes, or finds no room: old or new, and a repeat succeeds."""

import itertools
import os
import resource
import socket
import tempfile

import pytest
import torch
from deaths import EXIT_CODE, die_before
from foreign_files import mlx
from safetensors.torch import load_file
from tiny_models import adapted, disturb, foreign_code, llama

from minipeft import CheckpointError, LoraConfig, get_lora_model, merge_from_disk
from minipeft.files.formats.convert import convert
from minipeft.files.readers.made_for import made_for
from minipeft.files.readers.names import Reader
from minipeft.learning.attempt import attempt
from minipeft.learning.exercises import EXERCISES, ORIGINALS, Progress, copy_to

REFUSED = 3  # the exit code of a child whose call raised CheckpointError
SIZES = [0, 10, 300, 2000, 10_000]  # bytes of one file


def trained():
    torch.manual_seed(0)
    return disturb(get_lora_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])))


def two_adapters():
    model = adapted()
    torch.manual_seed(0)
    model.add_adapter("second", LoraConfig(r=3, init_lora_weights=False))
    return model


def base(folder, shard="1GB"):
    with foreign_code():
        llama().save_pretrained(folder, max_shard_size=shard)
    return folder


def convert_mlx(folder):
    (folder / "given").mkdir()
    mlx(folder / "given")
    return lambda: convert(folder / "given", folder / "out")


def convert_for(reader):
    def prepare(folder):
        trained().save_pretrained(folder / "given")
        return lambda: made_for(reader, folder / "given", folder / "out")

    return prepare


def merge(shard):
    def prepare(folder):
        trained().save_pretrained(folder / "given")
        base(folder / "base", shard)
        return lambda: merge_from_disk(folder / "base", folder / "given", folder / "out")

    return prepare


def save(folder):
    adapted(seed=2, lora_alpha=32).save_pretrained(folder / "out")
    return lambda: two_adapters().save_pretrained(folder / "out")


def learn(folder):
    def start():
        copy_to(folder / "out")
        Progress(folder / "out", {"01"}).save()

    os.environ["XDG_STATE_HOME"] = str(folder / "out")
    return start


CASES = {
    "convert": convert_mlx,
    "convert for vLLM": convert_for(Reader.VLLM),
    "convert for MLX": convert_for(Reader.MLX),
    "merge": merge("1GB"),
    "merge, sharded": merge("20KB"),
    "save": save,
    "learn": learn,
}


def contents(folder, place):
    """By folder and name, whatever `place` is called. Hidden files, which nothing reads, and empty folders do not count."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            values = path.read_bytes().replace(str(place).encode(), b"PLACE")
            if path.suffix == ".safetensors":  # the rest is about the files that a save replaced
                values = {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()}
            found.setdefault(str(path.parent.relative_to(folder)), {})[path.name] = values
    return found


def hidden(folder):
    return [path for path in folder.rglob(".*") if path.name.startswith(".")]


def child(act, before):
    """The exit code of a fork that calls `before` and then `act`."""
    with foreign_code():  # newer Pythons warn of threads
        pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        before()
        act()
    except CheckpointError:
        os._exit(REFUSED)
    except BaseException:
        os._exit(1)
    os._exit(0)


def is_change(event, args):
    writes = event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    return writes or event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_killed_anywhere_is_old_or_new_and_can_be_repeated(case, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "")  # put back at the end
    (tmp_path / "whole").mkdir()
    act = CASES[case](tmp_path / "whole")
    old = contents(tmp_path / "whole/out", tmp_path / "whole")
    act()
    new = contents(tmp_path / "whole/out", tmp_path / "whole")
    for number in itertools.count(1):
        place = tmp_path / f"killed-{number}"
        place.mkdir()
        act = CASES[case](place)
        code = child(act, lambda number=number: die_before(number, is_change))
        if code == 0:
            break
        assert code == EXIT_CODE
        found = contents(place / "out", place)
        for folder, files in found.items():
            for name, values in files.items():  # of two files of an adapter the weights decide, see test_checkpoint.py
                assert values in (old.get(folder, {}).get(name), new[folder][name]), name
        if found != new:
            act()
            assert contents(place / "out", place) == new
            assert hidden(place) == []
    assert number > 4


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_without_room_for_a_file_each_folder_is_old_or_new(case, size, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "")
    act = CASES[case](tmp_path)
    old = contents(tmp_path / "out", tmp_path)
    code = child(act, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))
    found = contents(tmp_path / "out", tmp_path)
    assert hidden(tmp_path) == []
    if code == REFUSED:
        act()
    new = contents(tmp_path / "out", tmp_path)
    assert code == REFUSED or (code, found) == (0, new)
    assert all(files in (old.get(folder), new[folder]) for folder, files in found.items())


def test_what_a_killed_conversion_left_does_not_stop_the_next(tmp_path):
    act = convert_for(Reader.VLLM)(tmp_path)
    (tmp_path / "out").mkdir()
    for name in (f".adapter_model.safetensors.tmp-{socket.gethostname()}-{2**22 + 1}-01234567", "adapter_config.json"):
        (tmp_path / "out" / name).write_bytes(b"")
    act()
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(CheckpointError, match="is in use"):
        act()


@pytest.mark.parametrize("case", ["convert", "push", "learn"])
def test_what_finds_no_temporary_folder_says_so(case, tmp_path, monkeypatch):
    call = {
        "convert": convert_for(Reader.VLLM)(tmp_path),
        "push": lambda: adapted().push_to_hub("owner/name"),
        "learn": lambda: attempt(ORIGINALS / EXERCISES[0].file, EXERCISES[0], 60),
    }[case]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match="the temporary folder cannot be written"):
        call()
    assert not (tmp_path / "out").exists()

"""Pickles of adapters: `load_adapter` never reads one, ``minipeft convert`` reads tensors and runs nothing."""

import collections
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from foreign_files import litgpt, llm
from safetensors.torch import load_file
from test_formats import check_updates
from tiny_models import gpt2, logits, state_digest
from typer.testing import CliRunner

import minipeft
from minipeft.cli.main import app
from minipeft.files.formats.convert import convert
from minipeft.files.formats.pickled import check_archive, dense


class Runs:
    """Unpickled, it makes a file in the current folder."""

    def __reduce__(self):
        return Path.touch, (Path("canary"),)


def rezipped(source, target, change, compression=zipfile.ZIP_STORED):
    """The same archive with other entries: `change` gets name and bytes, and returns pairs of them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            for pair in change(name, old.read(name)):
                new.writestr(*pair)


def archive(path, program):
    """An archive of torch.save with this pickle in it."""
    torch.save({"a": torch.zeros(7)}, path.with_suffix(".good"))
    rezipped(path.with_suffix(".good"), path, lambda name, data: [(name, program if name.endswith(".pkl") else data)])


def deep(path):
    archive(path, b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 200_000 + b"N" + b"s" * 200_000 + b".")


HOSTILE = {
    "code": lambda path: torch.save({"a": Runs()}, path),
    "code within": lambda path: torch.save({"a": [torch.zeros(2), {"b": (Runs(),)}]}, path),
    "code in an OrderedDict": lambda path: torch.save(collections.OrderedDict(a=Runs()), path),
    "code by protocol 4": lambda path: torch.save({"a": Runs()}, path, pickle_protocol=4),
    "a function of torch": lambda path: archive(path, b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00a\x85R."),
    "eval": lambda path: archive(path, b"\x80\x02cbuiltins\neval\nX\x13\x00\x00\x00open('canary', 'w').a\x85R."),
    "a class of the old kind": lambda path: archive(path, b"(S'canary'\nios\nmknod\n."),
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps({"a": Runs()})),
    "before torch 1.6": lambda path: torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False),
    "no pickle at all": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An adapter's folder without its weights, and the current folder to look for a canary in."""
    monkeypatch.chdir(tmp_path)
    minipeft.get_lora_model(gpt2()).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    return tmp_path / "adapter"


def nothing_ran(folder):
    assert not list(folder.parent.rglob("canary"))
    assert not (folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_with_more_than_tensors_is_one_error_and_nothing_runs(kind, folder):
    path = folder / "adapter_model.bin"
    HOSTILE[kind](path)
    model = gpt2()
    before = state_digest(model)
    with pytest.raises(minipeft.CheckpointError, match="minipeft convert"):
        minipeft.load_adapter(model, folder)
    with pytest.raises(minipeft.CheckpointError, match=r"adapter_model\.bin") as caught:
        convert(folder)
    assert "\n" not in str(caught.value)
    assert state_digest(model) == before
    nothing_ran(folder)


def beside(extra):
    """Adds one entry to an archive, next to its pickle."""
    return lambda name, data: [(name, data), *([(extra, b"x")] if name.endswith(".pkl") else [])]


@pytest.mark.parametrize(
    ("change", "compression"),
    [
        pytest.param(beside("good/../../canary"), zipfile.ZIP_STORED, id="a path out"),
        pytest.param(beside("/canary"), zipfile.ZIP_STORED, id="an absolute path"),
        pytest.param(beside("other/data.pkl"), zipfile.ZIP_STORED, id="two folders"),
        pytest.param(lambda name, data: [(name, data)], zipfile.ZIP_DEFLATED, id="compressed"),
        pytest.param(lambda name, data: [(name, data)] * ("data/" in name), zipfile.ZIP_STORED, id="no pickle"),
    ],
)
def test_an_archive_that_torch_does_not_write_is_refused(change, compression, tmp_path):
    torch.save({"a": torch.zeros(7)}, tmp_path / "good.bin")
    rezipped(tmp_path / "good.bin", tmp_path / "bad.bin", change, compression)
    with pytest.raises(minipeft.CheckpointError, match=r"bad\.bin"):
        check_archive(tmp_path / "bad.bin")


def test_entries_that_overlap_are_refused(tmp_path):
    torch.save({"a": torch.zeros(7)}, tmp_path / "x.bin")
    data = bytearray((tmp_path / "x.bin").read_bytes())
    place = data.index(b"PK\x01\x02")  # the first entry of the central directory: its two sizes
    data[place + 20 : place + 28] = struct.pack("<II", 2**31, 2**31)
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(minipeft.CheckpointError, match=r"x\.bin"):
        check_archive(tmp_path / "x.bin")


def huge_storage(path):
    """The pickle says that seven numbers are two thousand million."""
    torch.save({"a": torch.zeros(7)}, path.with_suffix(".good"))
    many = b"J" + struct.pack("<i", 2**31 - 1)
    rezipped(path.with_suffix(".good"), path, lambda name, data: [(name, data.replace(b"K\x07", many))])


def repeated(path):
    torch.save({"a": torch.zeros(1).expand(10**10)}, path)


def test_a_tensor_that_repeats_its_values_is_refused(tmp_path):
    repeated(tmp_path / "x.bin")
    check_archive(tmp_path / "x.bin")
    found = torch.load(tmp_path / "x.bin", weights_only=True)
    with pytest.raises(minipeft.CheckpointError, match="claims more values"):
        dense(tmp_path / "x.bin", found)


@pytest.mark.slow  # each starts a process that imports torch
@pytest.mark.parametrize(
    "make",
    [repeated, huge_storage, deep, lambda path: torch.save({"a": 5}, path)],
    ids=["repeated", "huge", "deep", "5"],
)
def test_a_file_that_claims_more_than_it_holds_is_refused_within_its_limits(make, folder):
    make(folder / "adapter_model.bin")
    with pytest.raises(minipeft.CheckpointError, match=r"adapter_model\.bin"):
        convert(folder)
    nothing_ran(folder)


def test_convert_in_place_writes_safetensors_beside_the_pickle(tmp_path):
    base = gpt2()
    adapted = minipeft.get_lora_model(gpt2(), minipeft.LoraConfig(r=4, init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    torch.save(collections.OrderedDict(tensors), tmp_path / "adapter_model.bin")
    path.unlink()
    config = (tmp_path / "adapter_config.json").read_bytes()
    result = CliRunner().invoke(app, ["convert", str(tmp_path)])
    assert (result.exit_code, result.output) == (0, f"{tmp_path}\n")
    assert (tmp_path / "adapter_model.bin").exists()
    assert (tmp_path / "adapter_config.json").read_bytes() == config
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(path).items())
    assert torch.equal(logits(minipeft.load_adapter(base, tmp_path)), logits(adapted))
    with pytest.raises(minipeft.CheckpointError, match="already"):
        convert(tmp_path / "adapter_model.bin")


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_an_adapter_is_not_converted_into_the_folder_of_a_whole_model(kind, tmp_path):
    source, model = tmp_path / "in", tmp_path / "model"
    minipeft.get_lora_model(gpt2(), minipeft.LoraConfig(r=4)).save_pretrained(source)
    torch.save(load_file(source / "adapter_model.safetensors"), source / "adapter_model.bin")
    (source / "adapter_model.safetensors").unlink()
    gpt2().save_pretrained(model)
    if kind == "pickle":
        torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
        (model / "model.safetensors").unlink()
    before = sorted(model.iterdir())
    with pytest.raises(minipeft.CheckpointError, match="holds a whole model"):
        convert(source, model)
    assert sorted(model.iterdir()) == before


@pytest.mark.slow
def test_a_pickle_of_litgpt_is_named_and_converted(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    updates = litgpt(source)
    torch.save({"model": load_file(source / "lit.safetensors")}, source / "lit_model.pth.lora")
    (source / "lit.safetensors").unlink()
    with pytest.raises(minipeft.CheckpointError, match=r"lit_model\.pth\.lora.*minipeft convert"):
        minipeft.load_adapter(llm(), source)
    assert convert(source, out) == [out]
    check_updates(llm(), out, updates)


def test_the_process_imports_nothing_from_the_adapters_folder(folder, monkeypatch):
    """A torch.py next to the pickle, or where the user stands, is not imported."""
    torch.save({"a": Runs()}, folder / "adapter_model.bin")
    for place in (folder, folder.parent):
        (place / "torch.py").write_text("open('canary', 'w')")
        (place / "zipfile.py").write_text("open('canary', 'w')")
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(minipeft.CheckpointError, match="more than tensors"):
        convert(folder)
    nothing_ran(folder)


def test_a_failed_conversion_leaves_no_file(folder):
    shutil.copy(folder / "adapter_config.json", folder / "adapter_model.bin")
    before = sorted(os.listdir(folder))
    with pytest.raises(minipeft.CheckpointError):
        convert(folder, folder / "out")
    assert sorted(os.listdir(folder)) == before

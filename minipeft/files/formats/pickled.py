"""The tensors of a pickle as safetensors, read in a process of its own with limits on its time and memory.

`load_adapter` never comes here; ``minipeft convert`` does. Three things stand between a hostile file and the user: the
check of the archive below, ``torch.load(weights_only=True)``, and a process that may use little more memory than the file
has bytes.

A file of ``torch.save`` is a zip archive. ``data.pkl`` in it is a pickle, a program that builds the objects; the numbers of
the tensors lie beside it as plain bytes. A pickle of tensors calls three functions and names a few classes. One that calls
or names anything else can run code, so it is refused. The check reads the program and never runs it, and comes before
anything but the standard library is imported, so that a hostile file is refused before anything large is loaded.
"""

from __future__ import annotations

import os
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minipeft.errors import CheckpointError, MinipeftError, told, told_error

SECONDS, SECONDS_PER_GIB, SPARE_MEMORY = 60.0, 60.0, 2**30
REFUSED = 3  # exit code of the process when it has printed why
MAX_PROGRAM_BYTES, MAX_ENTRIES = 2**25, 200_000
CALLS = {"collections OrderedDict", "torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v2"}
STORAGES = {
    f"torch {kind}Storage"
    for kind in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
}
# What a pickle of a dictionary of tensors is made of. Not among them: whatever makes objects of other classes or finds
# names in a way that this check does not follow (STACK_GLOBAL, INST, OBJ, NEWOBJ, EXT1, ...).
OPCODES = {
    *("PROTO", "STOP", "MARK"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("SETITEM", "SETITEMS", "APPEND", "APPENDS", "BUILD"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "REDUCE", "BINPERSID"),
}


def write_safetensors(source: Path, target: Path) -> None:
    """Write the tensors of a file of ``torch.save`` to a new safetensors file; the names stay.

    Args:
        source: holds a dictionary of tensors, or one under the key "model".
        target: in an empty folder of ours, in which the process runs.

    Raises:
        CheckpointError: the file holds more than tensors, is damaged, or takes too long or too much memory.
    """
    if not os.path.isfile(source):
        raise CheckpointError(f"{source} is not a plain file, or cannot be seen.")
    seconds = SECONDS + SECONDS_PER_GIB * source.stat().st_size / 2**30
    # The folders this process imports from, but not the current one, in which somebody may have put a torch.py.
    package = str(Path(__file__).resolve().parents[3])
    folders = [package, *(os.path.abspath(place) for place in sys.path if place)]
    command = [sys.executable, "-m", __spec__.name, os.path.abspath(source), os.path.abspath(target)]
    try:
        result = subprocess.run(
            command,
            cwd=target.parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{source} takes more than {seconds:.0f} s to read.") from None
    if result.returncode == REFUSED:
        raise CheckpointError(result.stdout.decode("utf-8", "replace").strip())
    if result.returncode != 0:
        last = result.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise CheckpointError(f"{source} cannot be read (exit code {result.returncode}: {last:.200}).")


def _write(source: Path, target: Path) -> None:
    """What the process does."""
    _limit_memory(SPARE_MEMORY)
    check_archive(source)
    _limit_memory(None)
    import torch  # only now: a file that the check refuses is not worth the wait
    from safetensors.torch import save_file

    _limit_memory(4 * source.stat().st_size + SPARE_MEMORY)
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{source} cannot be read ({told_error(error)}).") from None
    tensors = dense(source, found)
    needed, size = sum(tensor.nbytes for tensor in tensors.values()), source.stat().st_size
    if needed > 2 * size + 2**20:  # tied tensors may lie in the file once
        raise CheckpointError(f"{source}: its tensors claim {needed:,} bytes, and the file has {size:,}.")
    save_file(
        {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}, target
    )


def dense(source: Path, found: Any) -> Mapping[str, Any]:
    """What ``torch.load`` gave, if it is a dictionary of dense tensors, each with all of its values in the file.

    Raises:
        CheckpointError: it is not.
    """
    import torch

    if isinstance(found, Mapping) and set(found) == {"model"}:  # litgpt's
        found = found["model"]
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{source} holds {told(type(found).__name__)} and no dictionary of tensors.")
    for key, tensor in found.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise CheckpointError(f"{source}: {told(key)} is not the name of a dense tensor.")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{source}: {told(key)} claims more values than the file holds of it.")
    return found


def _limit_memory(more: int | None) -> None:
    """Let this process map this many bytes more than it does now (None: no limit), if the system says how many it does."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (hard if more is None else pages * resource.getpagesize() + more, hard))
    except (ImportError, OSError, ValueError):
        return  # the check of the archive compares all sizes with the file's


def check_archive(path: Path) -> None:
    """Check that a file is an archive of ``torch.save`` that holds tensors only.

    Raises:
        CheckpointError: it is anything else, or its sizes do not add up.
    """
    with path.open("rb") as file:
        start = file.read(1)
    if start == b"\x80":
        raise CheckpointError(
            f"{path} is a bare pickle, as torch wrote before version 1.6; only the archive that torch.save writes today is read."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            _check_program(path, archive.read(_check_entries(path, archive)))
    except CheckpointError:
        raise
    except Exception as error:  # of zipfile and pickletools: many, and not documented
        raise CheckpointError(f"{path} is not an archive of torch.save ({told_error(error)}).") from None


def _check_entries(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The entry of the pickle, if all entries are such as torch writes."""
    entries = archive.infolist()
    folders = {entry.filename.partition("/")[0] for entry in entries}
    names = {entry.filename for entry in entries}
    if len(entries) > MAX_ENTRIES or len(names) < len(entries) or len(folders) != 1:
        raise CheckpointError(f"{path}: {len(entries):,} entries, which are not those of one torch.save.")
    for entry in entries:
        parts = entry.filename.split("/")
        if ".." in parts or "" in parts or "\\" in entry.filename or entry.flag_bits & 1:
            raise CheckpointError(f"{path}: {told(entry.filename)} is not an entry that torch.save writes.")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise CheckpointError(f"{path}: {told(entry.filename)} is compressed, which torch.save never does.")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path}: its entries claim more bytes than the file has.")
    program = next((entry for entry in entries if entry.filename == f"{next(iter(folders))}/data.pkl"), None)
    if program is None or program.file_size > MAX_PROGRAM_BYTES:
        raise CheckpointError(f"{path} has no data.pkl of at most {MAX_PROGRAM_BYTES:,} bytes.")
    return program


def _check_program(path: Path, program: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "GLOBAL" and argument not in CALLS | STORAGES:
            raise CheckpointError(f"{path} holds more than tensors: it names {told(argument, 100)}, and may run code.")
        if opcode.name not in OPCODES:
            raise CheckpointError(f"{path} holds more than tensors: its pickle uses {opcode.name}.")


if __name__ == "__main__":
    try:
        _write(Path(sys.argv[1]), Path(sys.argv[2]))
    except MinipeftError as error:
        print(error)
        sys.exit(REFUSED)

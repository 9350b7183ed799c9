"""Checking a file of ``torch.save`` without executing any of it: does it hold tensors, and nothing else?

Such a file is a zip archive. ``data.pkl`` in it is a pickle, a program that builds the objects; the numbers of the tensors
lie beside it as plain bytes. A pickle of tensors calls three functions and names a few classes. One that calls or names
anything else can run code, so it is refused. The program is read here, and never run.

This file imports nothing but the standard library, so that a hostile file is refused before anything large is loaded.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

from minipeft.errors import CheckpointError, told, told_error

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

"""Making an adapter that one reader takes from one that it does not: one rank, one scaling, its names, its format."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from minipeft.config.adapter_config import config_from_dict
from minipeft.config.options import plain
from minipeft.config.patterns import matching
from minipeft.ecosystem.wrapper_names import PREFIX, unwrapped_name
from minipeft.errors import CheckpointError, shown
from minipeft.files.atomic import write_files
from minipeft.files.base_checkpoint import CONFIG, cached
from minipeft.files.empty_model import empty_model
from minipeft.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from minipeft.files.format import NAMES, open_adapter
from minipeft.files.names.to_old import with_old_names
from minipeft.files.readers.contents import Contents, read_contents
from minipeft.files.readers.fused_experts import as_parameters
from minipeft.files.readers.keys import Kind, bare_key
from minipeft.files.readers.names import Part, Reader
from minipeft.files.readers.plain import Pair, alike, check_method, pairs_of
from minipeft.files.readers.rules import Takes, answer
from minipeft.files.readers.written import Made, factors, renamed_for, write_diffusers, write_mlx, write_peft
from minipeft.files.reading import read_object, reading, writing
from minipeft.files.tensor_file import Entry, TensorFile

# Readers of everything that PEFT writes; for the others an adapter becomes plain LoRA.
WHOLE = (Reader.PEFT, Reader.TRANSFORMERS)
# Options that a plain LoRA configuration keeps.
KEPT = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "lora_dropout")


def made_for(
    reader: Reader,
    directory: Path,
    out: Path,
    drop: Collection[Part] = (),
    *,
    base: Path | None = None,
    old_names: bool = False,
) -> Made:
    """Write an adapter for a reader into a new or empty directory, all or nothing.

    Fused experts become one LoRA for each layer of each expert for all readers but PEFT and transformers, under the names
    that checkpoints have, so they take the base's configuration.

    Args:
        reader: who is to take it.
        directory: of the adapter; it is only read.
        out: where the new one goes.
        drop: what may be left out.
        base: the directory of the base. None: the one that the adapter names, if it is on this machine.
        old_names: give modules the names that transformers 4 had.

    Raises:
        MinipeftError: the adapter cannot be read, this reader can take nothing that has its effect, or `out` is in use.
    """
    _check_place(directory, out)
    contents = read_contents(directory)
    if contents.weights.path.name != WEIGHTS_FILE:
        raise CheckpointError(
            f"{directory} is no adapter in PEFT's format; make it one first: minipeft convert DIR OUT."
        )
    open_adapter(directory)  # which refuses what cannot be right, such as two files of different saves
    made = Made()
    values: Mapping[str, Tensor] = contents.weights.read()
    contents = _without(contents, drop, made)
    if old_names or (contents.config.get("target_parameters") and reader not in WHOLE):
        contents, values = _under_old_names(reader, contents, base, made)
    if reader in WHOLE and not contents.of(Kind.START):
        contents = as_parameters(contents, made.done)
        _as_it_is(contents, values, made)
    else:
        _plain(reader, contents, values, made)
    _check(reader, made)
    write_files(out, made.files)
    return made


def _check_place(directory: Path, out: Path) -> None:
    with reading(out):
        if out.resolve() == directory.resolve():
            raise CheckpointError(f"{out} is the adapter itself; name another directory for the new one.")
        # What is hidden, and a configuration alone, may be what a killed process left.
        if os.path.lexists(out) and not (out.is_dir() and all(_is_free(path.name) for path in out.iterdir())):
            raise CheckpointError(f"{out} is in use; name a new or an empty directory.")


def _is_free(name: str) -> bool:
    return name.startswith(".") or name == CONFIG_FILE


def _without(contents: Contents, drop: Collection[Part], made: Made) -> Contents:
    """The same adapter without what is to be left out."""
    gone = {key.text for key in contents.of(Kind.SAVED, Kind.COPY)} if Part.MODULES_TO_SAVE in drop else set()
    gone |= {key.text for key in contents.of(Kind.TOKENS)} if Part.TOKENS in drop else set()
    gone |= {key.text for key in contents.keys if key.is_head} if Part.HEAD in drop else set()
    options = {"modules_to_save"} if Part.MODULES_TO_SAVE in drop else set()
    options |= {"trainable_token_indices"} if Part.TOKENS in drop else set()
    made.dropped += sorted(gone)
    weights, config = contents.weights, {**contents.config, **dict.fromkeys(options & contents.config.keys())}
    entries = {key: entry for key, entry in weights.entries.items() if key not in gone}
    left = replace(contents, config=config, weights=replace(weights, entries=entries))
    if not left.layers:
        raise CheckpointError(f"{contents.directory}: without {shown(sorted(drop))} no update is left.")
    if Part.HEAD in drop and gone:
        return replace(left, config={**config, "target_modules": list(left.layers)})
    return left


def _under_old_names(
    reader: Reader, contents: Contents, base: Path | None, made: Made
) -> tuple[Contents, Mapping[str, Tensor]]:
    """The same adapter as PEFT would have saved it with transformers 4, and its tensors."""
    if reader in (Reader.MLX, Reader.DIFFUSERS):
        raise CheckpointError(
            f"{contents.directory}: {reader.value} has its own names, and none for one expert or those of transformers 4. "
            "Merge the adapter: minipeft merge."
        )
    weights, folder = contents.weights, _base(contents, base)
    config = config_from_dict(dict(contents.config))
    file = open_adapter(contents.directory)
    entries = {key: entry for key, entry in file.entries.items() if key in weights.entries}  # some may be dropped
    file = replace(file, entries=entries, config=config)
    auto_mapping: Any = contents.config.get("auto_mapping")
    model = empty_model(folder, read_object(folder / CONFIG), file, auto_mapping).model
    tensors, options = with_old_names(model, file, contents.config)
    renamed = [key for key in tensors if key not in weights.shapes]
    if renamed:
        made.done.append(
            f"{len(renamed)} tensors have names of transformers 4, such as {renamed[0].removeprefix(PREFIX)}."
        )
    entries = {key: Entry(tuple(t.shape), NAMES[t.dtype], (key,)) for key, t in tensors.items()}
    return Contents(contents.directory, options, TensorFile(weights.path, entries, weights.metadata)), tensors


def _base(contents: Contents, base: Path | None) -> Path:
    """The directory with the base's configuration."""
    named = contents.config.get("base_model_name_or_path")
    found = base if base is not None else cached(named) if isinstance(named, str) else None
    if found is None or not os.path.isfile(found / CONFIG):
        raise CheckpointError(
            f"{contents.directory}: which names its modules had depends on the base, and there is no {CONFIG} of it in "
            f"{found or named!s:.200}. Give its directory with --base."
        )
    return found


def _as_it_is(contents: Contents, values: Mapping[str, Tensor], made: Made) -> None:
    """PEFT's own format: the tensors stay, under keys as PEFT writes them."""
    tensors = {}
    for key in contents.keys:
        text = unwrapped_name(bare_key(key.text))
        while text.startswith(PREFIX * 2):
            text = text.removeprefix(PREFIX)
        if not text.startswith("base_model."):
            text = f"{PREFIX}{text}"
        tensors[text] = values[key.text]
    if len(tensors) < len(contents.keys):
        raise CheckpointError(f"{contents.directory}: two of its keys would get the same name.")
    renamed = sum(key.text not in tensors for key in contents.keys)
    made.done += [f"{renamed} keys were renamed as PEFT writes them."] if renamed else []
    # PEFT changed the layout of experts in this version, and nothing else in the file tells which one square experts have.
    layout = {"peft_version": "0.19.1"} if "minipeft" in contents.weights.metadata else {}
    write_peft(tensors, {**layout, **contents.config}, made)


def _plain(reader: Reader, contents: Contents, values: Mapping[str, Tensor], made: Made) -> None:
    """Plain LoRA of one rank and one scaling, as the reader wants to have it."""
    check_method(contents)
    _refuse_the_rest(reader, contents)
    before = pairs_of(contents, values)
    pairs = alike(before)
    made.done += _told(before, pairs)
    names = {module: renamed_for(reader, module) for module in pairs}
    moved = [module for module, name in names.items() if name != module]
    made.done += [f"{len(moved)} modules were renamed, as {moved[0]} to {names[moved[0]]}."] if moved else []
    pairs = {names[module]: pair for module, pair in pairs.items()}
    rest = {key.text: values[key.text] for key in contents.of(Kind.SAVED, Kind.COPY, Kind.TOKENS)}
    if reader is Reader.MLX:
        write_mlx(pairs, made)
    elif reader is Reader.DIFFUSERS:
        write_diffusers(pairs, contents.directory, made)
    else:
        write_peft({**rest, **factors(pairs, PREFIX)}, _plain_config(contents, pairs, reader), made)


def _refuse_the_rest(reader: Reader, contents: Contents) -> None:
    if reader in WHOLE:
        return
    flags = {Kind.SAVED: Part.MODULES_TO_SAVE, Kind.TOKENS: Part.TOKENS}
    if reader not in (Reader.VLLM, Reader.LLAMA_CPP):  # which leave copies out by themselves
        flags[Kind.COPY] = Part.MODULES_TO_SAVE
    for kind, part in flags.items():
        keys = contents.of(kind)
        if keys:
            raise CheckpointError(
                f"{contents.directory}: {reader.value} cannot take {shown([keys[0].text])} ({kind.value}). Leave it out with "
                f"--drop {part.value}, or keep its effect with minipeft merge."
            )


def _told(before: Mapping[str, Pair], after: Mapping[str, Pair]) -> list[str]:
    first = next(iter(after.values()))
    ranks, scalings = {pair.rank for pair in before.values()}, {pair.scaling for pair in before.values()}
    said = [f"Ranks {min(ranks)} to {max(ranks)} became {first.rank}, with zeros."] if len(ranks) > 1 else []
    if len(scalings) > 1:
        said.append(f"{len(scalings)} scalings became {first.scaling:g}; the rest is in lora_B.")
    if first.up.dtype != next(iter(before.values())).up.dtype:
        said.append(f"The factors are {first.up.dtype} now, since they would have been rounded.")
    return said


def _plain_config(contents: Contents, pairs: Mapping[str, Pair], reader: Reader) -> dict[str, Any]:
    first = next(iter(pairs.values()))
    targets = contents.listed("target_modules")
    selected = targets if set(matching(targets, pairs)) == set(pairs) else sorted(pairs)
    kept = [*KEPT, "exclude_modules", "layers_to_transform", "layers_pattern"] if selected is targets else [*KEPT]
    kept += ["modules_to_save", "trainable_token_indices"] if reader in WHOLE else []
    config = {key: contents.config[key] for key in kept if contents.config.get(key) is not None}
    return config | {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": plain(first.scaling * first.rank),
        "target_modules": selected,
        "bias": "none",
        "inference_mode": True,
    }


def _check(reader: Reader, made: Made) -> None:
    """Ask the rules about what is going to be written."""
    with writing("the temporary folder"), TemporaryDirectory() as place:
        for name, payload in made.files.items():
            (Path(place) / name).write_bytes(payload)
        found = answer(read_contents(Path(place)), reader)
    if found.takes is not Takes.YES:
        first = next(f for f in found.findings if f.rule.takes is found.takes)
        fix = f" Try: {first.rule.fix}." if first.rule.fix else ""
        raise CheckpointError(f"{reader.value} would still not take it: {first.reason}.{fix}")

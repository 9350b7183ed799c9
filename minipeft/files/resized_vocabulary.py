"""Vocabularies that were resized: the rows that the base on disk lacks go into an adapter's file, and come out again.

A resized table has new rows of random values, and whoever resizes the base again gets others. So the file has to bring
them along: as rows of tokens beside a LoRA adapter, which PEFT reads too and which are no more than they are. PEFT itself
writes the whole tables; of those the rows that differ from the base's are taken.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minipeft.config import AdapterConfig
from minipeft.errors import CheckpointError, ConfigError, told
from minipeft.files.atomic import read_limited
from minipeft.files.format import MAX_CONFIG_BYTES, AdapterFile
from minipeft.files.hub import is_hub_id
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.build import PREFIX
from minipeft.injection.module_tree import wrappers
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.wrapper import innermost
from minipeft.patterns import is_suffix
from minipeft.transformers_model import input_embedding, output_head

OPTION, ROWS = "trainable_token_indices", "token_adapter.trainable_tokens_delta"


def tables(model: nn.Module) -> dict[str, nn.Module]:
    """The input embedding and the output head of a transformers model, by name, each weight once; as they are wrapped."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for module in (input_embedding(model), output_head(model)):
        weight = None if module is None else getattr(innermost(module), "weight", None)
        is_table = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
        if module is None or not is_table or id(weight) in found:
            continue
        name = next((name for name, other in model.named_modules() if other is module), None)
        if name is not None:
            found[id(weight)] = (name, module)
    return dict(found.values())


def base_vocabulary(model: nn.Module) -> int | None:
    """``vocab_size`` of the checkpoint that the model comes from, as its ``config.json`` on this machine says; else None."""
    place = getattr(model, "name_or_path", None)
    path: object = None
    if isinstance(place, str) and place and len(place) < 4096:
        path = Path(place) / "config.json"
        if not Path(place).is_dir() and is_hub_id(place):
            commit = getattr(model.config, "_commit_hash", None)
            path = try_to_load_from_cache(place, "config.json", revision=commit)
    try:
        values = json.loads(read_limited(Path(path), MAX_CONFIG_BYTES)) if isinstance(path, str | Path) else {}
        size = values.get("vocab_size", (values.get("text_config") or {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError, CheckpointError):
        return None
    return size if isinstance(size, int) else None


# ------------------------------------------------------------------------------------------------------- writing
def with_tables(
    model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], save: bool | str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and configuration, with what of the model's tables has to be saved along.

    Args:
        model: the adapted model.
        adapter_name: which of its adapters.
        tensors: as `minipeft.files.save.adapter_tensors` gives them.
        config: as `minipeft.files.save.file_config` gives it.
        save: "auto": the rows that the base lacks, where the vocabulary was resized; True: whole tables; False: nothing.

    Raises:
        ConfigError: `save` is something else, or rows of a table that is to be saved whole train, or there is no table.
    """
    if save is True:
        return {**tensors, **_whole_tables(model, adapter_name)}, dict(config)
    if save is False:
        return dict(tensors), dict(config)
    if save != "auto":
        raise ConfigError(f'save_embedding_layers must be True, False or "auto", not {told(save)}.')
    known = base_vocabulary(model)
    if known is None:
        return dict(tensors), dict(config)
    all_tensors, trained = dict(tensors), _ids_by_name(model, config)
    ids = dict(trained)
    for name, module in tables(model).items():
        weight = innermost(module).weight
        assert isinstance(weight, Tensor)
        missing = sorted(set(range(known, len(weight))) - set(trained.get(name, ())))
        is_copied = isinstance(module, SavedModule) and adapter_name in module.adapters
        if not missing or is_copied or _holds_them(config, missing):
            continue
        key = f"{PREFIX}{name}.{ROWS}"
        if OPTION not in config or (name not in trained and _is_taken(model, weight, adapter_name)):
            warnings.warn(
                f"{name} has {len(missing)} rows that {model.name_or_path} lacks, and this adapter's file cannot hold them: give "
                f"them an adapter of their own, TrainableTokensConfig(token_indices=list(range({known}, {len(weight)}))).",
                stacklevel=4,
            )
            continue
        before = [all_tensors[key]] if name in trained else []
        all_tensors[key] = torch.cat([*before, weight.detach()[missing].to(before[0] if before else weight)])
        ids[name] = [*trained.get(name, ()), *missing]
    return all_tensors, dict(config) if ids == trained else {**config, OPTION: ids}


def _ids_by_name(model: nn.Module, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The option of a file's configuration, by the names of the tables."""
    option, names = config.get(OPTION), list(tables(model))
    if isinstance(option, Mapping):
        return {next((name for name in names if is_suffix(entry, name)), entry): ids for entry, ids in option.items()}
    return {names[0]: option} if option and names else {}


def _holds_them(config: Mapping[str, Any], missing: list[int]) -> bool:
    return set(missing) <= set(config.get("token_indices") or ())


def _adapts(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, AdaptedLayer) and adapter_name in module.adapters


def _is_taken(model: nn.Module, weight: Tensor, adapter_name: str) -> bool:
    """Whether the adapter does something with this weight already, here or in a layer that is tied to it."""
    holders = [wrapper for _, wrapper in wrappers(model) if getattr(innermost(wrapper), "weight", None) is weight]
    return any(adapter_name in wrapper.adapters for wrapper in holders)


def _whole_tables(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    whole, found = {}, tables(model)
    if not found:
        raise ConfigError(
            f"save_embedding_layers=True: {type(model).__name__} names no input embedding (get_input_embeddings); leave it "
            "at 'auto'."
        )
    for name, module in found.items():
        adapts = _adapts(module, adapter_name)
        if isinstance(module, AdaptedLayer) and adapts and module.adapter(adapter_name).overrides("for_tied"):
            raise ConfigError(
                f"save_embedding_layers=True: rows of {name} train, and the file holds those; leave it at 'auto'."
            )
        if not isinstance(module, SavedModule) or adapter_name not in module.adapters:
            weight = innermost(module).weight
            assert isinstance(weight, Tensor)
            whole[f"{PREFIX}{name}.{'base_layer.' * adapts}weight"] = weight
    return whole


# ------------------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Brought:
    """What a file brings of a resized vocabulary: rows, by the key that they have as rows of tokens."""

    config: AdapterConfig
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()  # of the whole tables, which are done with


def brought(file: AdapterFile, model: nn.Module) -> Brought:
    """Look at whole tables in a file: where some of their rows are not the model's, those are rows of tokens to load.

    Raises:
        CheckpointError: a table has another number of rows than the model's, or is damaged, or two that are tied differ.
    """
    known = {name: innermost(module).weight for name, module in tables(model).items()}
    if not known:
        return Brought(file.config)
    modules = model.named_modules(remove_duplicate=False)
    trained = file.config.modules_to_save or ()
    every = {name: getattr(innermost(module), "weight", None) for name, module in modules}
    owners = {id(weight): name for name, weight in known.items()}
    found: dict[str, Tensor] = {}
    keys = set()
    for key, shape in file.shapes.items():
        name = key.removeprefix(PREFIX).removesuffix(".weight")
        weight = every.get(name) if key.endswith(".weight") else None
        # A table that is adapted itself, `<name>.base_layer.weight`, has to be the base's own.
        elsewhere = name.endswith(".base_layer") or any(is_suffix(entry, name) for entry in trained)
        if not isinstance(weight, Tensor) or id(weight) not in owners or len(shape) != 2 or elsewhere:
            continue
        if shape != tuple(weight.shape):
            if shape[1:] == weight.shape[1:]:
                raise CheckpointError(
                    f"{file.path} is for a vocabulary of {shape[0]} rows, and {name} has {len(weight)}. First "
                    f"model.resize_token_embeddings({shape[0]})."
                )
            continue
        table, owner = _read(file.path, key), owners[id(weight)]
        if owner in found and not torch.equal(found[owner], table):
            raise CheckpointError(f"{file.path}: {name} differs from {owner}, to which it is tied.")
        found[owner] = table
        keys.add(key)
    ids = {name: _differing(table, known[name]) for name, table in found.items()}
    ids = {name: rows for name, rows in ids.items() if rows and 2 * len(rows) <= len(found[name])}
    fields = {f.name for f in dataclasses.fields(file.config)}
    if not ids or OPTION not in fields or getattr(file.config, OPTION) is not None:
        return Brought(file.config)
    rows = {f"{PREFIX}{name}.{ROWS}": found[name][rows] for name, rows in ids.items()}
    option: dict[str, Any] = {OPTION: ids}
    config = dataclasses.replace(file.config, **option)
    done = {key for key in keys if owners[id(every[key.removeprefix(PREFIX).removesuffix(".weight")])] in ids}
    return Brought(config, rows, frozenset(done))


def _read(path: Path, key: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            table: Tensor = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}).") from None
    if not table.isfinite().all():
        raise CheckpointError(f"{path} holds NaN or infinity in {key!r}.")
    return table


@torch.no_grad()
def _differing(table: Tensor, weight: Any) -> list[int]:
    """The rows of a table in a file that are not the model's; one of the two may have been rounded to half precision.

    New rows of two resizings may be as good as equal, near the mean of all, so nothing else is tolerated.
    """
    here = weight.detach().cpu()
    narrow = min(table.dtype, here.dtype, key=lambda dtype: dtype.itemsize)
    return (table.to(narrow) != here.to(narrow)).any(1).nonzero().flatten().tolist()


def resize_hint(model: nn.Module, there: tuple[int, ...], here: tuple[int, ...]) -> str:
    """Advice for two shapes of one tensor that differ as vocabularies do, or nothing."""
    pairs = [(a, b) for a, b in zip(there, here, strict=False) if a != b]
    sizes = {len(weight) for weight in (innermost(module).weight for module in tables(model).values())}  # type: ignore[arg-type]
    if len(there) == len(here) and len(pairs) == 1 and pairs[0][1] in sizes:
        return f" If its vocabulary was resized: model.resize_token_embeddings({pairs[0][0]}) first."
    return ""

"""What only PEFT's files have: copies of base weights, tensors that repeat another, and entries that mean more.

PEFT repeats the tensors of layers that share an adapter or a trained copy (``ensure_weight_tying``). So do we.

An entry of ``modules_to_save`` is a suffix at a dot boundary in a configuration of ours. PEFT trains every module whose
name ends with the entry: ``classifier`` takes DistilBERT's ``pre_classifier`` along, and the file holds both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from minipeft.config.adapter_config import HEADS_OF_TASK, AdapterConfig
from minipeft.config.patterns import endings, is_suffix
from minipeft.ecosystem.wrapper_names import PREFIX, ROOT, named_modules, named_parameters
from minipeft.errors import CheckpointError
from minipeft.files.format import AdapterFile
from minipeft.injection.module_tree import Candidate, candidates, wrappers_of
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.targets import Selection, within
from minipeft.injection.tied_sites import rest_of
from minipeft.layers.offloaded import values_of

# The factors of a head that is tied to an embedding -> those of the embedding, of which each is the transpose.
TRANSPOSED = {".lora_A.weight": ".lora_embedding_B", ".lora_B.weight": ".lora_embedding_A"}

# Buffers in a state that was saved without PEFT's filter, with or without the adapter's name behind them.
_NAME = r"(\.[A-Za-z0-9_-]{1,64})?"
_PROJECTION = re.compile(r".+\.(vera_[AB])" + _NAME)  # VeRA's shared matrices, again at each layer
_IN_COPY = re.compile(r"\.modules_to_save\.[A-Za-z0-9_-]{1,64}(?=\.)")  # before a bias inside of a trained module
_INFIX = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.)")  # of PEFT's wrappers
_RANK = re.compile(r"(.+\.)ranknum" + _NAME)  # how many triplets of AdaLoRA a layer has


def followers(model: nn.Module, config: AdapterConfig, adapter_name: str) -> dict[str, str]:
    """The layers that share what another one has, which PEFT's files repeat: name -> name of that other one.

    All with `ensure_weight_tying`, else those of a trained copy, but for a table's, which PEFT does not name, and those that
    a companion of the configuration names too: PEFT may give each of these an adapter.
    """
    here = list(wrappers_of(model, adapter_name))
    if not config.ensure_weight_tying:
        copies = {n for n, w in here if isinstance(w, SavedModule) and not isinstance(w.base_layer, nn.Embedding)}
        named = {entry for _, companion in config.companions() for entry in companion.target_modules or ()}
        here = [(n, w) for n, w in here if n in copies or (named and not named.isdisjoint(endings(n)))]
    first_of: dict[frozenset[int], str] = {}
    shared = {}
    for name, wrapper in sorted(here, key=lambda pair: _rank(pair[1], adapter_name)):
        part = wrapper.adapters[adapter_name]
        weight = (
            part._parameters.get("weight") if config.ensure_weight_tying and isinstance(wrapper, SavedModule) else None
        )
        weights = frozenset(map(id, part.parameters() if weight is None else [weight]))
        first = first_of.setdefault(weights, name) if weights else name
        if first != name:
            shared[name] = first
    return shared


def _rank(wrapper: nn.Module, adapter_name: str) -> int:
    """Of wrappers that share a tensor the lowest is the one that it belongs to: a copy of all, then of some, then of nothing."""
    only = getattr(wrapper, "only", None)
    return 2 - bool(only) if only is not None else int(adapter_name in getattr(wrapper, "tied_adapters", ()))


def with_repeats(tensors: Mapping[str, Tensor], shared: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of an adapter, and under the names of its followers what PEFT writes for those."""
    more: dict[str, Tensor] = {}
    for name, first in shared.items():
        start = f"{PREFIX}{first}."
        more |= {
            f"{PREFIX}{name}.{key[len(start) :]}": tensor for key, tensor in tensors.items() if key.startswith(start)
        }
        for new, old in TRANSPOSED.items():
            if start + old[1:] in tensors:
                more[f"{PREFIX}{name}{new}"] = tensors[start + old[1:]].t()
    return {**tensors, **more}


def rest_of_followers(model: nn.Module, shared: Mapping[str, str], adapter_name: str) -> dict[str, Tensor]:
    """What followers have besides their weight and do not train, such as the bias of BERT's head, by key: PEFT wants that too."""
    # There are few models with any, and a walk over a model takes long.
    here = dict(wrappers_of(model, adapter_name)) if shared else {}
    copies = {name: w for name in shared if isinstance(w := here[name], SavedModule) and not w.only}
    rests = {name: rest_of(w.base_layer) for name, w in copies.items()}
    return {f"{PREFIX}{name}.{key}": parameter for name, rest in rests.items() for key, parameter in rest.items()}


def find_copies(file: AdapterFile, keys: Sequence[str], model: nn.Module) -> dict[str, Tensor]:
    """Which of these keys copy a tensor of the base, such as an embedding table, by name and shape -> that tensor.

    Or they copy what the shapes of the file say, which is AdaLoRA's number of triplets.
    """
    base, plain = _base_tensors(model) if keys else {}, {key: _INFIX.sub("", key) for key in keys}
    found = {key: base[name] for key, name in plain.items() if name in base and base[name].shape == file.shapes[key]}
    return {**values_of(model, found), **_ranks(file, keys)}


def _ranks(file: AdapterFile, keys: Sequence[str]) -> dict[str, Tensor]:
    matches = {key: match for key in keys if (match := _RANK.fullmatch(key)) and file.shapes[key] == (1,)}
    values = {key: file.shapes.get(f"{match[1]}lora_E") for key, match in matches.items()}
    return {key: torch.tensor([float(shape[0])]) for key, shape in values.items() if shape}


def find_repeats(file: AdapterFile, keys: Sequence[str], tied: Mapping[str, str], model: nn.Module) -> dict[str, str]:
    """Which of these keys repeat another one, by name and shape -> that key.

    PEFT repeats the bias of a trained head, and the tensors of a tied layer; `tied` says which layer that is tied to. A
    bias that has two names in the model, it writes under both. VeRA's matrices are in a state without PEFT's filter once
    more for each layer.
    """
    renamed = _renamed(file, keys, tied) | _projections(file, keys)
    return renamed | _other_names(file, [key for key in keys if key not in renamed], keys, model)


def _renamed(file: AdapterFile, keys: Sequence[str], tied: Mapping[str, str]) -> dict[str, str]:
    plain = {key: key.replace(".modules_to_save.", ".") for key in keys}
    plain = {key: _untied(name if name in file.shapes else _IN_COPY.sub("", key), tied) for key, name in plain.items()}
    for key, other in plain.items():
        if other not in file.shapes:  # the factors of a head and of its embedding are each other's transpose
            plain[key] = _transposed(other)
    shapes = {
        key: file.shapes[key][::-1] if _is_transposed(key, other) else file.shapes[key] for key, other in plain.items()
    }
    return {key: other for key, other in plain.items() if other != key and file.shapes.get(other) == shapes[key]}


def _projections(file: AdapterFile, keys: Sequence[str]) -> dict[str, str]:
    found = {key: f"{ROOT}{match[1]}" for key in keys if (match := _PROJECTION.fullmatch(key))}
    return {key: other for key, other in found.items() if file.shapes.get(other) == file.shapes[key]}


def _other_names(file: AdapterFile, keys: Sequence[str], unknown: Sequence[str], model: nn.Module) -> dict[str, str]:
    """Which of these keys are another name of a bias that a key of the file, not one of the unknown, names too.

    Not of a weight: where a copy of an embedding trains, PEFT writes the head that was tied to it as the base has it.
    """
    keys = [key for key in keys if key.endswith(".bias")]
    if not keys:
        return {}
    # By their own names alone: a bias of the original in PEFT's wrapper does not repeat the trained one.
    parameters = named_parameters(model, remove_duplicate=False)
    base = {PREFIX + name.replace(".base_layer.", "."): parameter for name, parameter in parameters}
    trained = {key: key.replace(".base_layer.", ".") for key in file.shapes if key not in unknown}
    # Where PEFT leaves the other name the base's.
    copied = tuple(f"{entry}.bias" for entry in file.config.modules_to_save or ())
    known = {id(base[name]): key for key, name in trained.items() if name in base and not name.endswith(copied)}
    found = {key: known[id(base[key])] for key in keys if key in base and id(base[key]) in known}
    return {key: other for key, other in found.items() if file.shapes[key] == file.shapes[other]}


def check_extras(
    file: AdapterFile, values: Mapping[str, Tensor], copies: Mapping[str, Tensor], repeats: Mapping[str, str]
) -> None:
    """Compare the values; raises CheckpointError if a copy or a repeated tensor differs."""
    for key, parameter in copies.items():
        if not torch.allclose(values[key].float(), parameter.detach().float().cpu(), rtol=1e-2, atol=1e-6):
            raise CheckpointError(
                f"{file.path} brings its own {key!r}, which differs from this model's. Use the base it was trained on."
            )
    for key, other in repeats.items():
        repeated = values[other].t() if _is_transposed(key, other) else values[other]
        if not torch.equal(values[key], repeated):
            raise CheckpointError(
                f"{file.path}: {key!r} and {other!r} should be equal, and differ. Tied layers have one adapter, or one trained copy, here; "
                "load it on a base in which they are not tied."
            )


def _transposed(key: str) -> str:
    """The key of an embedding's factor whose transpose this factor of a linear layer is, or the key itself."""
    ending = next((ending for ending in TRANSPOSED if key.endswith(ending)), "")
    return key.removesuffix(ending) + TRANSPOSED[ending] if ending else key


def _is_transposed(key: str, other: str) -> bool:
    return other.endswith(tuple(TRANSPOSED.values())) and key.endswith(tuple(TRANSPOSED))


def _untied(key: str, tied: Mapping[str, str]) -> str:
    """The key of the same tensor in the layer that a tied layer is tied to."""
    plain = key.removeprefix(PREFIX) if tied else ""
    for place, character in enumerate(plain):
        if character == "." and plain[:place] in tied:
            return f"{PREFIX}{tied[plain[:place]]}.{plain[place + 1 :].removeprefix('base_layer.')}"
    return key


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Base parameters and buffers by the key that PEFT gives them, without the infixes of its wrappers.

    With ``bias="all"`` it writes the buffers called bias, too, which a frozen norm has (DETR's backbone).
    """
    tensors: dict[str, Tensor] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        owner = _INFIX.sub("", f".{name}.").lstrip(".")
        for last, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                tensors[f"{PREFIX}{owner}{last}"] = tensor
    return tensors


def as_peft_reads(file: AdapterFile, model: nn.Module, found: dict[str, Candidate]) -> AdapterFile:
    """A file whose options name all that they mean to PEFT; a file of ours as it is.

    `modules_to_save` then names every module that PEFT would train, and `target_modules` nothing where PEFT knows no default
    modules for the model's family, as for GPT-OSS, and adapted the `target_parameters` alone.
    """
    config = file.config
    if file.is_own:
        return file
    if config.target_parameters and config.target_modules is None:
        defaults = Selection(model, config, found).targets
        if not has_keys_of(file, defaults):
            config = replace(config, target_modules=())
    entries = (*(config.modules_to_save or ()), *HEADS_OF_TASK.get(config.task_type or "", ()))
    if more := _strays(found, entries) if entries else ():
        config = replace(config, modules_to_save=(*(config.modules_to_save or ()), *more))
    return file if config is file.config else replace(file, config=config)


def has_keys_of(file: AdapterFile, names: Collection[str]) -> bool:
    """Whether it has a tensor of one of these modules, or of one inside of them."""
    roots = set(names)
    keys = (key.removeprefix(PREFIX) for key in file.shapes if key.startswith(PREFIX))
    return any(within(key.rpartition(".")[0], roots) for key in keys)


def for_peft(model: nn.Module, entries: Sequence[str], saved: Mapping[str, nn.Module]) -> list[str]:
    """Entries for a file that name these modules, and no others to PEFT if there are such entries.

    There are none for a module without a parent, such as ``classifier`` next to ``pre_classifier``. PEFT then copies the
    base's ``pre_classifier``, which is not in the file, so its outputs are the same. But it cannot read a file whose entry
    also means a module inside of one that it names, as BERT's ``embeddings`` means ``embeddings.word_embeddings``.
    """
    # An entry for a module inside another entry's module would match nothing when the file is read.
    used = [entry for entry in entries if any(is_suffix(entry, name) for name in saved)]
    inside = {f"{name}.{path}" for name, module in saved.items() for path, _ in named_modules(module) if path}
    around = {name for name in _strays(candidates(model), used) if not within(name, saved)}
    used = [entry for entry in used if not any(name.endswith(entry) for name in around | inside)]
    # An entry may also be a name with a wrapper's part in it.
    return used + [name for name in saved if not any(is_suffix(entry, name) for entry in used)]


def _strays(found: Mapping[str, Candidate], entries: Sequence[str]) -> list[str]:
    """Modules whose name ends with one of these entries, but not at a dot boundary."""
    endings = tuple(entries)
    return [
        first
        for first, candidate in found.items()
        if any(name.endswith(endings) for name in candidate.names)
        and not any(is_suffix(entry, name) for name in candidate.names for entry in entries)
    ]

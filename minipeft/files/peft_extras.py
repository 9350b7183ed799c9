"""Where PEFT's files say more than ours would have to: tensors of layers that share, and entries that mean more.

PEFT repeats the tensors of layers that share an adapter or a trained copy (``ensure_weight_tying``). So do we.

An entry of ``modules_to_save`` is a suffix at a dot boundary in a configuration of ours. PEFT trains every module whose
name ends with the entry: ``classifier`` takes DistilBERT's ``pre_classifier`` along, and the file holds both.

`minipeft.files.extra_tensors` compares what else PEFT's files repeat.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from minipeft.config.adapter_config import HEADS_OF_TASK, AdapterConfig
from minipeft.config.patterns import endings, is_suffix
from minipeft.ecosystem.wrapper_names import PREFIX, named_modules
from minipeft.files.format import AdapterFile
from minipeft.injection.module_tree import Candidate, candidates, wrappers_of
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.targets import Selection, within
from minipeft.injection.tied_sites import rest_of

# The factors of a head that is tied to an embedding -> those of the embedding, of which each is the transpose.
TRANSPOSED = {".lora_A.weight": ".lora_embedding_B", ".lora_B.weight": ".lora_embedding_A"}


def followers(model: nn.Module, config: AdapterConfig, adapter_name: str) -> dict[str, str]:
    """The layers that share the tensors of another one, which PEFT's files repeat: name -> name of that one.

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
    for name, wrapper in sorted(here, key=lambda pair: _precedence(pair[1], adapter_name)):
        part = wrapper.adapters[adapter_name]
        by_weight = config.ensure_weight_tying and isinstance(wrapper, SavedModule)
        weight = part._parameters.get("weight") if by_weight else None
        weights = frozenset(map(id, part.parameters() if weight is None else [weight]))
        first = first_of.setdefault(weights, name) if weights else name
        if first != name:
            shared[name] = first
    return shared


def _precedence(wrapper: nn.Module, adapter_name: str) -> int:
    """Sorts wrappers that share a tensor; it belongs to the first: a whole copy or adapter, then a part, then nothing."""
    only = getattr(wrapper, "only", None)
    return 2 - bool(only) if only is not None else int(adapter_name in getattr(wrapper, "tied_adapters", ()))


def with_repeats(tensors: Mapping[str, Tensor], shared: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of an adapter, and what PEFT writes for its `followers`, under their names."""
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


def as_peft_reads(file: AdapterFile, model: nn.Module, found: dict[str, Candidate]) -> AdapterFile:
    """The file with options that name all that they mean to PEFT; a file of ours as it is.

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
    """Whether a file has a tensor of one of these modules, or of a module in one."""
    roots = set(names)
    keys = (key.removeprefix(PREFIX) for key in file.shapes if key.startswith(PREFIX))
    return any(within(key.rpartition(".")[0], roots) for key in keys)


def for_peft(model: nn.Module, entries: Sequence[str], saved: Mapping[str, nn.Module]) -> list[str]:
    """Entries of ``modules_to_save`` for a file that name these modules and, if possible, no others to PEFT.

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

"""The base below the adapters: is it the right one, is all of it loaded, and do its tables hold together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from minipeft.diagnosis.check import Seen, Setup, about, check
from minipeft.ecosystem.transformers_model import input_embedding, name_or_path, output_head, says_tied
from minipeft.ecosystem.wrapper_names import named_modules
from minipeft.errors import shown
from minipeft.files.format import open_adapter, open_weights
from minipeft.files.names.fitted import in_names_of
from minipeft.injection.fresh_parts import ORIGINS, drawn_at_random
from minipeft.injection.targets import within


@check("head-untrained", "It is random, and stays so: whoever loads the base again gets another one.")
def head_untrained(setup: Setup) -> Iterator[Seen]:
    """The checkpoint lacks a module, which was drawn at random, and nothing trains it."""
    view, tables = setup.view, {id(t) for t in (input_embedding(setup.view.root), output_head(setup.view.root))}
    in_tables = {id(p) for m in view.root.modules() if id(m) in tables for p in m.parameters()}
    training = {part.adapter for part in view.parts if part.trained}
    # Loaded to be used, a head is the file's; in training it has to train.
    covered = {p.layer for p in view.parts if p.is_full and (p.trained or p.adapter not in training)}
    fresh = [
        name
        for name in _fresh(view.root, view.base)
        if not view.base[name].requires_grad and id(view.base[name]) not in in_tables
    ]
    found = sorted({name.rpartition(".")[0] for name in fresh if not within(name, covered)})
    if found:
        yield Seen(
            shown(found, 3),
            "it is not in the checkpoint of the base, so it was drawn at random, and it is frozen.",
            f"modules_to_save={found[:3]!r} in the configuration, or its task_type, such as 'SEQ_CLS'",
        )


@check(
    "other-base", "An update is added to weights that it was not made for: the outputs are wrong, and no shape tells."
)
def other_base(setup: Setup) -> Iterator[Seen]:
    """The adapter names another base than the model was loaded from, and has no samples of its weights."""
    here = name_or_path(setup.view.root)
    for name, config in setup.view.configs.items():
        there = getattr(config, "base_model_name_or_path", None)
        if here and there and not _same_name(here, there) and not _was_compared(setup):
            yield Seen(
                f"adapter {name!r}",
                f"it was trained on {there!r}, and this model was loaded from {here!r}.",
                f"AutoModel...from_pretrained({there!r})",
            )


@check("keys-unmatched", "What did not match is not loaded: the adapter there is as it was drawn.")
def keys_unmatched(setup: Setup) -> Iterator[Seen]:
    """The file's keys are not those of the adapter."""
    if setup.adapter_dir is None:
        return
    there, here = _keys_of_file(setup, setup.adapter_dir), _keys(setup)
    missing, unexpected = sorted(here - there), sorted(there - here)
    # minipeft has refused or named what is unexpected, and PEFT passes over it.
    if missing or (unexpected and setup.view.is_peft):
        said = [f"{word} {shown(keys, 2)}" for word, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        yield Seen(
            str(setup.adapter_dir),
            f"{len(here & there)} of the adapter's {len(here)} keys matched; {'; '.join(said)}.",
            "load it strictly, minipeft.load_adapter(base, directory), which says what differs; key_mapping={...} renames keys.",
        )


@check(
    "tie-broken",
    "Two weights now stand for what the config says is one: who loads the merged model ties them again and loses one.",
)
def tie_broken(setup: Setup) -> Iterator[Seen]:
    """The input embedding is tied to the head by the config, and one of them trains a copy of its own."""
    root = setup.view.root
    tables = (input_embedding(root), output_head(root))
    parts = [part for part in setup.view.training if part.is_full and any(part.module is table for table in tables)]
    weights = [_weight(table) for table in tables]
    if says_tied(root) and None not in weights and weights[0] != weights[1]:
        yield from about(
            parts,
            "it trains a copy of its own, apart from the layer that the config ties it to.",
            "ensure_weight_tying=True in the configuration keeps them one; or model.config.tie_word_embeddings = False before adapting.",
        )


def _weight(table: nn.Module | None) -> int | None:
    weight = getattr(table, "weight", None)
    return None if weight is None else weight.data_ptr()


def _fresh(root: nn.Module, base: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the base's parameters that its checkpoint lacks; none if the model does not say what it was loaded with."""
    remembered = root.__dict__.get(ORIGINS)
    if remembered is not None:
        return [name for name in base if name in remembered.fresh]
    return drawn_at_random(root, base) or []


def _same_name(one: str, other: str) -> bool:
    a, b = _plain(one), _plain(other)
    return a in b or b in a


def _plain(place: str) -> str:
    """The last word of a path or name; of a folder in the hub's cache, the model's."""
    cached = re.search(r"models--[^/]+?--([^/]+)/snapshots/", place)
    return re.sub(r"[^a-z0-9]", "", (cached[1] if cached else re.split(r"[/\\]", place.rstrip("/\\"))[-1]).lower())


def _was_compared(setup: Setup) -> bool:
    """Whether samples of the base were compared when the adapter was loaded, as minipeft does with its own files."""
    if setup.view.is_peft or setup.adapter_dir is None:
        return False
    return '"base"' in open_weights(setup.adapter_dir).metadata.get("minipeft", "")


def _keys_of_file(setup: Setup, directory: Path) -> set[str]:
    """The keys in the file, for a model of minipeft's by the names that the model has."""
    if setup.view.is_peft:
        return set(open_weights(directory).shapes)
    root = setup.view.root
    file = open_adapter(directory, lambda _: [name for name, _ in named_modules(root) if name])
    return set(in_names_of(root, file, None, strict=False).shapes)


def _keys(setup: Setup) -> set[str]:
    """The keys that the file of the first active adapter would have."""
    name = next(iter(setup.view.active), None)
    if not setup.view.is_peft:
        state: dict[str, object] = setup.view.root.adapter_state_dict(name)  # type: ignore[operator]
        return set(state)
    from peft import get_peft_model_state_dict

    return set(get_peft_model_state_dict(setup.view.model, adapter_name=name))

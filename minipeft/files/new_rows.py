"""Loading the rows that a vocabulary gained: whole tables in a file, as PEFT writes them.

They become rows of tokens, and the base stays as it is. Where the adapter acts on the table itself, or its method has no rows
of tokens, they take the places of those that resizing the base drew at random, as in PEFT.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.patterns import is_suffix
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import CheckpointError, shown, warn
from minipeft.files.format import FLOATS, AdapterFile
from minipeft.files.resized_vocabulary import IN_LAYER, OPTION, Table, ids_by_name, tables
from minipeft.injection.module_tree import wrappers
from minipeft.kernels.functional import agree
from minipeft.layers.offloaded import values_of

# In PEFT's files the keys of a base table have these in them, if rows of it train or it has a trained copy.
INFIXES = (".token_adapter.base_layer", ".original_module")
COPY = f"{INFIXES[1]}.weight"


class WholeTable:
    """A table that a file may bring whole, compared with the model's.

    Args:
        file: the file.
        table: the model's.

    Raises:
        CheckpointError: it has another number of rows than the model's, or is damaged, or two that are tied differ.
    """

    def __init__(self, file: AdapterFile, table: Table) -> None:
        self.file, self.table = file, table
        self.names = [name for name, _ in table.layers if not name.endswith(".base_layer")]
        self.keys = self._keys()  # the file's, none if it does not bring the table
        self.copies = [key for key in self.keys if self._trains(key)]  # of modules that train in full

    def _keys(self) -> list[str]:
        infixes = "", ".base_layer", *INFIXES
        places = {f"{PREFIX}{name}{infix}.weight" for name in self.names for infix in infixes}
        keys, here = [], tuple(self.table.weight.shape)
        for key in filter(places.__contains__, self.file.shapes):
            shape = self.file.shapes[key]
            if len(shape) != 2 or self.file.dtypes[key] not in FLOATS:
                continue
            if self._trains(key) and not key.endswith(COPY):
                continue  # PEFT repeats the trained copy here
            if shape == here:
                keys.append(key)
            elif shape[1:] == here[1:]:
                raise CheckpointError(
                    f"{self.file.path} is for a vocabulary of {shape[0]} rows, and {self.table.name} has {here[0]}. First "
                    f"model.resize_token_embeddings({shape[0]})."
                )
        return keys

    def _trains(self, key: str) -> bool:
        """Whether a table is a copy of a module that trains in full, whose trained rows the file has too."""
        name = key.removeprefix(PREFIX).removesuffix(COPY).removesuffix(".weight")
        named = any(is_suffix(entry, name) for entry in self.file.config.modules_to_save or ())
        # With ensure_weight_tying, also what is tied to one that is named.
        return named or f"{PREFIX}{name}.modules_to_save.weight" in self.file.shapes

    @functools.cached_property
    def values(self) -> Tensor:
        """The table in the file."""
        found = self.file.read(self.keys)
        for key, value in found.items():
            if not torch.equal(value, found[self.keys[0]]):
                raise CheckpointError(f"{self.file.path}: {key} differs from {self.table.name}, to which it is tied.")
        return found[self.keys[0]]

    @functools.cached_property
    @torch.no_grad()
    def ids(self) -> list[int]:
        """The rows that are not the model's, if they are at most half of them; the file or the model may be rounded.

        New rows of two resizings may be almost equal, near the mean of all, so no other difference is tolerated.
        """
        table = self.table
        here = values_of(table.model, {table.name: table.weight})[table.name].detach().cpu()
        ids: list[int] = (~agree(self.values, here)).any(1).nonzero().flatten().tolist()
        return ids if 2 * len(ids) <= len(self.values) else []

    @functools.cached_property
    def ids_for_base(self) -> list[int] | None:
        """Of those rows, the ones that the base itself gets, if the adapter's rows of tokens have no room in this table."""
        config = self.file.config
        if getattr(config, "bias", "") == "all" and self.table.has_bias:
            return self.ids
        # The adapter acts on the table itself, or trains a copy of what that is tied to.
        taken = any(key.endswith(IN_LAYER) and not key.endswith(f"{INFIXES[0]}.weight") for key in self.keys)
        if taken or any(self._trains(f"{PREFIX}{name}.weight") for name in self.names):
            own = set(getattr(config, "token_indices", None) or ())  # which train, so the adapter has them
            return [row for row in self.ids if row not in own]
        return None if hasattr(config, OPTION) else self.ids


class NewRows:
    """Rows of a resized vocabulary that a file brings: of its whole tables, those that differ from the model's.

    Attributes:
        config: the file's, with the rows in ``trainable_token_indices``.
        values: by the key that they have as rows of tokens.
        done: keys of what they come from: whole tables, and rows that train.
        lacking: what to warn of.

    Raises:
        CheckpointError: see `WholeTable`; or rows are for the base itself, which other adapters use already or which is not
            in memory.
    """

    def __init__(self, file: AdapterFile, model: nn.Module) -> None:
        known = tables(model)
        trained = ids_by_name(known, getattr(file.config, OPTION, None))
        self.file, self.ids = file, dict(trained)  # the rows of each table that train here
        self.values, self.done = dict[str, Tensor](), set[str]()
        self._of_base: list[tuple[Table, list[int], Tensor]] = []  # rows for the base itself
        whole = [WholeTable(file, table) for table in known.values()]
        for table in whole:
            if not table.keys or not table.ids:
                continue
            self.done.update(table.copies)
            if len(table.copies) < len(table.keys):
                if table.ids_for_base is None:
                    self._as_rows_of_tokens(table, trained.get(table.table.name, []))
                else:
                    self._as_rows_of_base(table, table.ids_for_base)
        option: dict[str, Any] = {OPTION: self.ids}
        self.config = file.config if self.ids == trained else dataclasses.replace(file.config, **option)
        self.lacking = list(self._lacking(whole)) if any(table.keys for table in whole) else []

    def _as_rows_of_base(self, whole: WholeTable, ids: list[int]) -> None:
        """Let the base have these rows, if resizing it drew all of them at random."""
        table, size = whole.table, whole.table.base_rows
        if size is None or min(ids, default=size) < size:
            return  # which is refused when the keys are compared
        here = isinstance(table.weight, nn.Parameter) and not table.weight.is_meta
        advice = None if here else "with all of its weights in memory"
        if next(wrappers(table.model), None) is not None:
            advice = "before its other adapters"
        if ids and advice is not None:
            raise CheckpointError(
                f"{self.file.path} brings rows {shown(ids)} of {table.name}, where resizing drew others here, and the base itself "
                f"has to take them. Load this adapter {advice}, or resize the base with the seed of that run."
            )
        self._of_base += [(table, ids, whole.values[ids])] if ids else []
        self.done.update(whole.keys)

    def _as_rows_of_tokens(self, whole: WholeTable, trained: list[int]) -> None:
        """Put the rows that differ behind those that train, which the file has already."""
        key, added = whole.table.rows_key, sorted(set(whole.ids) - set(trained))
        if added and trained and self.file.shapes.get(key) != (len(trained), whole.values.shape[1]):
            return  # which is refused when the keys are compared
        self.done.update(whole.keys)
        if added:
            rows = whole.values[added]
            if trained:
                own = self.file.read([key])[key]
                rows = torch.cat([own, rows.to(own)])
                self.done.add(key)
            self.values[key], self.ids[whole.table.name] = rows, [*trained, *added]

    @torch.no_grad()
    def put_in_base(self) -> None:
        """Give the base the rows that are for it, in place of those that were drawn when it was resized."""
        for table, ids, values in self._of_base:
            table.weight[ids] = values.to(table.weight)
            warn(
                f"rows {shown(ids)} of {table.name}, which resizing the base drew at random, have the adapter file's values now, in "
                "the base itself."
            )

    def _lacking(self, whole: list[WholeTable]) -> Iterator[str]:
        """What to say of new rows of which a file brings nothing: PEFT writes the table that LoRA acts on, and not the other."""
        for table in (each.table for each in whole if not each.keys):
            name = table.name
            if table.is_resized and not any(key.startswith(f"{PREFIX}{name}.") for key in self.file.shapes):
                yield (
                    f"{self.file.path.parent} brings nothing of rows {table.base_rows} to {len(table.weight) - 1} of {name}, "
                    "which resizing drew at random, so results may differ from those in training."
                )


def resize_hint(model: nn.Module, there: tuple[int, ...], here: tuple[int, ...]) -> str:
    """Advice if two shapes of one tensor differ as vocabularies do, else nothing."""
    pairs = [(a, b) for a, b in zip(there, here, strict=False) if a != b]
    sizes = {len(table.weight) for table in tables(model).values()}
    if len(there) == len(here) and len(pairs) == 1 and pairs[0][1] in sizes:
        return f" If its vocabulary was resized: model.resize_token_embeddings({pairs[0][0]}) first."
    return ""

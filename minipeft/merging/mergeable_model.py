"""The merging verbs of an adapted model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from minipeft.config.options import flags
from minipeft.errors import StateError, all_or_nothing, shown
from minipeft.injection.module_tree import wrappers
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.starting import check_started
from minipeft.injection.state import STATE, WithAdapters, names_given, not_running
from minipeft.injection.training_guard import watch
from minipeft.merging.merge import merge, merged_names, unmerge
from minipeft.merging.report import MergeReport
from minipeft.python.interrupts import interrupts_deferred


class MergeableModel(WithAdapters):
    """The part of `minipeft.AdaptedModel` that folds adapters into base weights and takes them out again."""

    @all_or_nothing
    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        untie: bool = False,
        dequantize: bool = False,
    ) -> MergeReport:
        """Fold adapters into the base weights, reversibly; merged ones stay merged. Returns what rounding cost.

        Args:
            adapter_names: None: the active ones.
            safe_merge: PEFT's option; every merge here is checked, so it changes nothing.
            untie: give a weight that is tied elsewhere (GPT-2's embedding and head) its own copy instead of refusing.
            dequantize: replace a quantized layer by a float layer, until it is unmerged, instead of refusing.

        Raises:
            MergeError: a check failed.
        """
        names = self._active_or(adapter_names)
        flags(untie=untie, dequantize=dequantize)
        merged = tuple(dict.fromkeys((*self._state.merged, *names)))
        self._check_compatible(tuple(dict.fromkeys((*merged, *self._state.switch.active))))
        return self._merge(merged, untie=untie, dequantize=dequantize)

    @all_or_nothing
    def unmerge_adapter(self) -> None:
        """Take every merged adapter out of the base weights again, bit for bit.

        Within `disable_adapter` they are out already; then they are not merged again when it ends.

        Raises:
            MergeError: a merged weight was written or converted in the meantime.
        """
        self._take_out()
        self._state.set_aside = ()

    def _take_out(self) -> None:
        merged = self._state.merged
        try:
            if merged:
                unmerge(self)
                self._note_merged(())
        except BaseException:
            with interrupts_deferred():
                merge(self, merged, untie=True, dequantize=True)  # the layers that were taken out already
                self._note_merged(merged)
            raise

    @contextlib.contextmanager
    def _unmerged(self) -> Iterator[None]:
        """Within the context the base weights are the original ones; afterwards, merged adapters are merged again.

        Several such contexts may be open and end in any order: it is the end of the last one that merges.
        """
        state, merged = self._state, self._state.merged
        self._take_out()
        state.set_aside = merged or state.set_aside
        state.pauses += 1
        try:
            yield
        finally:  # a compiled call cannot defer, and has nothing to merge
            with interrupts_deferred() if state.set_aside else contextlib.nullcontext():
                state.pauses -= 1
                if state.pauses == 0:
                    again, state.set_aside = state.set_aside, ()
                    if again and self.__dict__.get(STATE) is state:  # unless it was unloaded in the meantime
                        self._merge(again, untie=True, dequantize=True)  # as allowed before

    def _check_compatible(self, names: tuple[str, ...]) -> None:
        for path, wrapper in wrappers(self) if len(names) > 1 else ():
            owners = [name for name in names if name in wrapper.adapters]
            if isinstance(wrapper, SavedModule) and len(owners) > 1:
                raise StateError(
                    f"{path}: {shown(owners)} each train this module in full, so they cannot act together."
                )

    def _merge(
        self, names: tuple[str, ...], outside: Sequence[tuple[str, nn.Module]] | None = None, **options: Any
    ) -> MergeReport:
        """Have exactly these adapters merged: one rounding for all, not one each.

        `outside` are the model's `outside_adapters`, if they have been found already; the options are those of `merge`.
        """
        with not_running(self._state):
            return self._merge_now(names, outside, **options)

    def _merge_now(
        self, names: tuple[str, ...], outside: Sequence[tuple[str, nn.Module]] | None, **options: Any
    ) -> MergeReport:
        self._check_compatible(names)
        if names != (before := self._state.merged):
            self._take_out()
        undoable = options.get("undoable", True)
        try:
            report = merge(self, names, outside=None if before else outside, **options)  # taking out may replace layers
            self._note_merged(names, undoable=undoable)
        except BaseException:
            with interrupts_deferred():
                if undoable:
                    unmerge(self)  # if all was merged when Ctrl-C came
                if not (stuck := merged_names(self)):  # by a permanent merge that could not be taken back
                    merge(self, before, untie=True, dequantize=True)
                self._note_merged(stuck or before, undoable=not stuck)
            raise
        return report

    def _note_merged(self, names: tuple[str, ...], *, undoable: bool = True) -> None:
        self._state.switch.merged = names
        watch(self, bool(names) and undoable)  # after a permanent merge there is no adapter to train

    def _active_or(self, adapter_names: Sequence[str] | None) -> tuple[str, ...]:
        names = self._state.switch.active if adapter_names is None else names_given(adapter_names)
        self._check_known(names)
        check_started(self._state, names)
        if not self._state.switch.enabled:
            raise StateError("the adapters are switched off by disable_adapter(); merge outside of that context.")
        return names

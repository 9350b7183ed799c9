"""What acts after adapters are deleted."""

from __future__ import annotations

from collections.abc import Sequence

from minipeft.errors import StateError, shown
from minipeft.injection.attach import AdapterState


def active_without(state: AdapterState, names: Sequence[str], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The adapters that act once these are deleted: those that are wanted, or those that act now and stay.

    `wanted` None: nobody said.

    Raises:
        StateError: one to delete is merged, nothing would act, or the wanted ones cannot start to act now.
    """
    merged = (*state.merged, *state.set_aside)
    if held := [name for name in names if name in merged]:
        raise StateError(f"adapter {shown(held)} is in use: it is merged into the base. unmerge_adapter() first.")
    stay = [name for name in state.configs if name not in names]
    if gone := [name for name in wanted or () if name in names]:
        raise StateError(f"activate: {shown(gone)} is to be deleted; left are: {shown(stay)}.")
    if wanted is not None and wanted != state.switch.active and merged:
        raise StateError(f"{shown(merged)} is merged into the base; call unmerge_adapter() first.")
    active = tuple(name for name in state.switch.active if name not in names) if wanted is None else wanted
    if not active:
        fix = f"say what acts instead: delete_adapter({names[0]!r}, activate={stay[0]!r})" if stay else "call unload()"
        raise StateError(f"adapter {shown(names)} is in use, and no other one is active; {fix}.")
    return active

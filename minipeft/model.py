"""Adapted models: the same object and class as before, plus the adapter verbs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from minipeft.config.adapter_config import AdapterConfig, checked_config
from minipeft.config.options import checked_module, flag, flags
from minipeft.ecosystem.transformers_model import mark_untied, says_tied, wrapping_class
from minipeft.errors import StateError, all_or_nothing, shown
from minipeft.files.foreign_options import check_options
from minipeft.files.hotswap import HotswapModel
from minipeft.files.hub import adapter_directory
from minipeft.files.load import load_parts, warn_if_idle
from minipeft.files.restore import RestorableModel
from minipeft.files.save_pretrained import DEFAULT
from minipeft.files.trl_guard import TrainedAlone
from minipeft.injection.attach import attach, detach, remove, switch_to
from minipeft.injection.build import build
from minipeft.injection.manageable_model import ManageableModel
from minipeft.injection.many_adapters import ManyAdapters
from minipeft.injection.module_tree import outside_adapters, wrappers
from minipeft.injection.other_names import OtherNames
from minipeft.injection.own_methods import OwnMethods
from minipeft.injection.plan import check_loaded
from minipeft.injection.plan import plan as plan_injection
from minipeft.injection.starting import await_values, stop_waiting
from minipeft.injection.state import active_without, check_name, names_given
from minipeft.injection.status import parameter_counts
from minipeft.memory.dequantize import dequantize as make_float
from minipeft.merging.combining.combinable_model import CombinableModel
from minipeft.merging.mergeable_model import MergeableModel
from minipeft.merging.tied_weights import check_trained_copies, cut_remaining_ties
from minipeft.python.class_swap import reduced
from minipeft.python.garbage import no_collection
from minipeft.registry import registry


@all_or_nothing
def get_adapter_model(
    model: nn.Module, config: AdapterConfig, adapter_name: str = DEFAULT, *, autocast_adapter_dtype: bool = True
) -> AdaptedModel:
    """Adapt a model in place with any registered method, freeze its base, and return the same object.

    Args:
        model: any ``nn.Module``; it keeps its class family and its forward signature.
        config: the method's configuration, such as `LoraConfig`; PEFT's are taken as what they say.
        adapter_name: letters, digits, '_' and '-'.
        autocast_adapter_dtype: hold adapter parameters in float32 if the base is in half precision.

    Raises:
        MinipeftError: a value, pattern or layer cannot be used; the model is unchanged, bit for bit.
    """
    if isinstance(model, AdaptedModel):
        raise StateError(
            f"{type(model).__name__} is adapted already ({shown(model.adapter_configs)}); use model.add_adapter(name, config)."
        )
    check_name(adapter_name, ())
    _adapt(model, config, adapter_name, autocast_adapter_dtype)
    return cast(AdaptedModel, model)


@all_or_nothing
def load_adapter(
    model: nn.Module,
    directory: str | PathLike[str],
    adapter_name: str = DEFAULT,
    is_trainable: bool = False,
    strict: bool = True,
    *,
    allow_base_mismatch: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    local_files_only: bool = False,
    **others: Any,
) -> AdaptedModel:
    """Read an adapter, ours or PEFT's, from a directory or the hub into a model, and return the model, adapted.

    On a plain model the adapter becomes active; on an adapted one it waits for ``set_adapter``. Pickles are never read. As in
    PEFT, a plain model comes back in evaluation mode, unless the adapter is to train.

    Args:
        model: the base the adapter was trained on, plain or adapted already.
        directory: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``; if there is none of this
            name, ``"owner/name"`` on the Hugging Face Hub.
        adapter_name: a name that the model does not use yet.
        is_trainable: whether its parameters require gradients.
        strict: require exactly the expected tensors. False: warn about missing and unexpected ones; missing ones keep
            their starting values. A wrong shape is always an error.
        allow_base_mismatch: skip the comparison of the base weights.
        key_mapping: regular expressions for the names in the file -> replacements, as PEFT's; of each name, without
            ``base_model.model.``, the first that is found is replaced. Names that other versions and classes of
            transformers use are known without, see `minipeft.files.names.fitted`.
        revision, token, subfolder, local_files_only: see `minipeft.files.hub.adapter_directory`.
        others: PEFT's options that ask for nothing here, see `minipeft.files.foreign_options`.

    Raises:
        MinipeftError: something does not fit; the model is unchanged, bit for bit.
    """
    check_options("load_adapter", others)
    check_name(adapter_name, model.adapter_configs if isinstance(model, AdaptedModel) else ())
    flags(is_trainable=is_trainable, strict=strict, allow_base_mismatch=allow_base_mismatch)
    _check_adaptable(model)
    path = adapter_directory(
        directory, revision=revision, token=token, subfolder=subfolder, local_files_only=local_files_only
    )
    adapted = model if isinstance(model, AdaptedModel) else None
    unmerged = contextlib.nullcontext() if adapted is None else adapted._unmerged()
    with unmerged, no_collection(), torch.inference_mode(False):  # as in `_adapt`
        plan, parts, new_rows = load_parts(
            model,
            path,
            strict=strict,
            allow_base_mismatch=allow_base_mismatch,
            key_mapping=key_mapping,
            is_trainable=is_trainable,
        )
        attach(model, AdaptedModel, plan, parts, adapter_name, trainable=is_trainable)
        new_rows.put_in_base()
        if not is_trainable:
            warn_if_idle(path, parts)
    if adapted is None and not is_trainable:
        model.eval()
    return cast(AdaptedModel, model)


def _adapt(
    model: nn.Module, config: object, adapter_name: str, autocast_adapter_dtype: bool, *, every_pattern: bool = True
) -> None:
    with no_collection(), torch.inference_mode(False):  # inference tensors could never train
        own = checked_config(config)
        _check_adaptable(model)
        plan = plan_injection(model, own, every_pattern=every_pattern)
        check_loaded(model, plan, may_be_empty=True)
        parts = build(plan, autocast_adapter_dtype=autocast_adapter_dtype)
        attach(model, AdaptedModel, plan, parts, adapter_name, trainable=not plan.config.inference_mode)
        await_values(model, adapter_name, parts)


def _check_adaptable(model: object) -> None:
    model = checked_module(model)
    wrapping = wrapping_class(model)
    if wrapping is not None:
        raise StateError(f"{wrapping} wraps the model; adapt the model itself, then wrap it.")
    if not isinstance(model, AdaptedModel) and (inner := next(wrappers(model), None)) is not None:
        raise StateError(
            f"{inner[0]} of {type(model).__name__} is adapted already, with verbs and files of its own; use those, or unload() it first."
        )
    registry.load_plugins()


class _Names(list[str]):
    def __call__(self) -> list[str]:
        return self


class AdaptedModel(
    OwnMethods,
    TrainedAlone,
    ManyAdapters,
    OtherNames,
    ManageableModel,
    RestorableModel,
    HotswapModel,
    MergeableModel,
    CombinableModel,
):
    """The adapter verbs of an adapted model; a mixin that `minipeft.injection.attach` puts in front of the model's class."""

    @property
    def adapter_configs(self) -> dict[str, AdapterConfig]:
        """The configuration of each adapter, by name."""
        return dict(self._state.configs)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act now. Transformers has a method of this name, so it can be called, too."""
        return _Names(self._state.switch.active)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters, including adapters; shared parameters count once."""
        return parameter_counts(self)

    def print_trainable_parameters(self) -> None:
        """Print the two counts and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / max(total, 1):.4f}"
        )

    def add_adapter(
        self,
        adapter_name: str | AdapterConfig = DEFAULT,
        config: AdapterConfig | str | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        peft_config: object = None,
        adapter_config: object = None,
    ) -> None:
        """Add another adapter, inactive until `set_adapter`; transformers' order, the configuration first, is understood.

        Args:
            adapter_name: a name that the model does not use yet.
            config: the method's configuration.
            autocast_adapter_dtype: see `get_adapter_model`.
            peft_config, adapter_config: what PEFT and transformers call `config`.

        Raises:
            MinipeftError: as `get_adapter_model`; or the name is taken.
        """
        wanted: object = next((c for c in (config, peft_config, adapter_config) if c is not None), None)
        if not isinstance(adapter_name, str):
            adapter_name, wanted = wanted if isinstance(wanted, str) else DEFAULT, adapter_name
        self._add(adapter_name, wanted, autocast_adapter_dtype)

    @all_or_nothing
    def _add(
        self, adapter_name: str, config: object, autocast_adapter_dtype: bool, *, every_pattern: bool = True
    ) -> None:
        check_name(adapter_name, self.adapter_configs)
        with self._unmerged():  # an adapter starts from the base, not from other adapters
            _adapt(self, config, adapter_name, autocast_adapter_dtype, every_pattern=every_pattern)

    def load_adapter(
        self,
        directory: str | PathLike[str] | None = None,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        strict: bool = True,
        *,
        model_id: str | PathLike[str] | None = None,
        peft_model_id: str | PathLike[str] | None = None,
        **options: Any,
    ) -> AdaptedModel:
        """See `minipeft.load_adapter`. `model_id` and `peft_model_id` are what PEFT and transformers call `directory`."""
        place: Any = next((p for p in (directory, model_id, peft_model_id) if p is not None), None)
        return load_adapter(self, place, adapter_name, is_trainable, strict, **options)

    @all_or_nothing
    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let exactly these adapters act, one after the other; in `inference_mode` they train only when chosen again.

        Raises:
            StateError: a name is unknown or repeated, an adapter is merged, or two train the same module in full.
        """
        names = names_given(adapter_name)
        self._check_known(names)
        self._state.check_unmerged()
        self._check_compatible(names)
        switch_to(self, names, frozen=flag("inference_mode", inference_mode))

    @all_or_nothing
    def delete_adapter(self, adapter_name: str | Sequence[str], *, activate: str | Sequence[str] | None = None) -> None:
        """Remove an adapter, or several.

        Args:
            adapter_name: which.
            activate: what acts afterwards. None: what acts now, less what is deleted. If that leaves nothing, say here
                what takes its place; PEFT picks the first adapter that is left.

        Raises:
            StateError: a name is unknown, an adapter is merged, or nothing would act (`unload` removes the last one).
        """
        names = names_given(adapter_name)
        self._check_known(names)
        wanted = None if activate is None else names_given(activate)
        if wanted is not None:
            self._check_known(wanted)
            self._check_compatible(wanted)
        remove(self, names, active_without(self._state, names, wanted))

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the model computes exactly what its base does; merged adapters are unmerged meanwhile.

        They count as merged all the same, so `set_adapter` and deleting one of them are refused, as outside.
        """
        with self._unmerged(), self._state.switch.off():
            yield

    @all_or_nothing
    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        untie: bool = False,
        dequantize: bool = False,
    ) -> nn.Module:
        """Fold adapters into the base weights permanently and return the model in its original class.

        Modules trained in full keep their trained values. What rounding cost goes to the logger "minipeft" at level INFO.

        Args:
            progressbar: show one.
            safe_merge, untie: as in `merge_adapter`.
            adapter_names: these alone, and the others are dropped. None: the merged and the active ones.
            dequantize: make the whole model float instead of refusing to merge into quantized layers.

        Raises:
            MergeError: a check failed.
        """
        names = self._active_or(adapter_names)
        flags(progressbar=progressbar, untie=untie, dequantize=dequantize)
        merged = names if adapter_names is not None else tuple(dict.fromkeys((*self._state.merged, *names)))
        progress: Any = functools.partial(tqdm, desc="merging", unit="layer", disable=not progressbar)
        was_tied = says_tied(self)
        with no_collection():
            outside = tuple(outside_adapters(self))  # one walk for what comes before the merge and after it
            untied = check_trained_copies(self, merged, outside)
            how = {"untie": untie, "dequantize": dequantize, "undoable": False, "progress": progress}
            self._merge(merged, outside, **how)
            if untied:
                mark_untied(self)
            self._state.switch.active, self._state.switch.enabled = names, True
            detach(self, AdaptedModel, outside, keep_trained=True)
            stop_waiting(self)
        if was_tied and not says_tied(self):
            cut_remaining_ties(self)
        return make_float(self) if dequantize else self

    @all_or_nothing
    def unload(self) -> nn.Module:
        """Remove all adapters and return the base, bit for bit, in its original class."""
        with self._unmerged():  # and merged again if detaching fails
            detach(self, AdaptedModel, tuple(outside_adapters(self)), keep_trained=False)
            stop_waiting(self)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(AdaptedModel, self, super().__reduce_ex__(protocol))

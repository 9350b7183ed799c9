"""The verbs of an adapted model that write files: save its adapters, push them to the hub, keep their model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import Tensor

from minipeft.config.options import flags
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import ConfigError, StateError, shown, warn
from minipeft.files import hub
from minipeft.files.base_samples import base_samples
from minipeft.files.foreign_options import check_options, check_size
from minipeft.files.lost_state import warn_of_computed, warn_of_lost_state, warn_of_scale
from minipeft.files.model_card import card_to_write, public_base, update_card
from minipeft.files.other_in_peft import warn_of_peft
from minipeft.files.peft_extras import followers, rest_of_followers, with_repeats
from minipeft.files.reading import as_path, writing
from minipeft.files.resized_vocabulary import brought_rows, with_tables
from minipeft.files.save import (
    adapter_tensors,
    check_values,
    file_config,
    is_gathered_elsewhere,
    save_adapter,
    tensors_from_state,
)
from minipeft.files.scaling_in_B import for_diffusers
from minipeft.files.to_lora import as_lora
from minipeft.files.trainer_guard import begin_checkpoint, check_outer_save, check_trainer, save_base_for_pipeline
from minipeft.injection.starting import check_started
from minipeft.injection.state import WithAdapters, names_given
from minipeft.injection.watch import idle_message
from minipeft.layers.offloaded import values_of
from minipeft.python.garbage import no_collection

DEFAULT = "default"


def directory_of(root: Path, adapter_name: str) -> Path:
    """Where an adapter is saved, as in PEFT: "default" in the directory itself, any other in one of its name."""
    return root if adapter_name == DEFAULT else root / adapter_name


class SavableModel(WithAdapters):
    """The part of `minipeft.AdaptedModel` that writes files."""

    def adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """The live tensors of one adapter (None: of the only one) under the keys they have in a file."""
        known = list(self._state.configs)
        if adapter_name is None and len(known) > 1:
            raise StateError(f"there are several adapters ({shown(known)}); name one.")
        name = known[0] if adapter_name is None else adapter_name
        self._check_known([name])
        return adapter_tensors(self, name)

    def get_adapter_state_dict(self, adapter_name: str | None = None, state_dict: Any = None) -> dict[str, Tensor]:
        """Transformers' verb: an adapter's live tensors (None: the active one's), with their keys in a file less its prefix.

        Raises:
            StateError: there is no such adapter.
            ConfigError: a `state_dict` is given, which `save_pretrained` takes.
        """
        if state_dict is not None:
            raise ConfigError("get_adapter_state_dict gives the live tensors; pass state_dict to save_pretrained().")
        name = next(iter(self._state.switch.active), None) if adapter_name is None else adapter_name
        tensors = self.adapter_state_dict(name)
        return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Torch's own; refused if it is for a whole model around this one, which is about to be saved to be loaded again.

        Raises:
            StateError: it is.
        """
        if kwargs.get("prefix"):  # asked for by a module around this one
            check_outer_save(self)
        return super().state_dict(*args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        adapter_name: str | bool | None = None,
        *unnamed: object,
        selected_adapters: Sequence[str] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        convert_to_lora: bool = False,
        save_embedding_layers: bool | str = "auto",
        **others: Any,
    ) -> None:
        """Save adapters in PEFT's format, each completely or not at all, with a model card.

        The adapter "default" goes into the directory itself, any other into a sub-directory of its name, as in PEFT.

        Args:
            save_directory: created if it does not exist.
            adapter_name: which adapter. None: all of them; and so does True, which transformers and PEFT take here.
            unnamed: nothing.
            selected_adapters: PEFT's way to name several.
            state_dict: take the values from this (gathered) state of the model instead of the live tensors. A process other than
                the first that got nothing of it writes nothing.
            is_main_process: False: write nothing.
            safe_serialization: PEFT's and transformers' option; True is the only value, as a pickle is never written.
            convert_to_lora: save any low-rank update, such as PiSSA's, as plain LoRA, see `minipeft.files.to_lora`.
            save_embedding_layers: "auto": if the vocabulary was resized since the base was loaded, also save its new
                rows, as rows of tokens, or whole tables where the adapter has no room for such rows. True: the whole input
                and output tables, as PEFT does. False: neither.
            others: options of transformers' method that change nothing here, see `minipeft.files.foreign_options`.

        Raises:
            ConfigError: an option is unknown, cannot be honoured, or contradicts another; `safe_serialization` is False; or
                a table is to be saved whole of which rows train.
            StateError: there is no such adapter; or the caller is a Trainer that could not load the best one at the end; or a
                table to save has an adapter merged into it.
            CheckpointError: the directory cannot be written, or holds a whole model.
        """
        if safe_serialization is not True:
            raise ConfigError(
                "safe_serialization must be True: adapters are saved as safetensors, never as a pickle, which can run code."
            )
        flags(is_main_process=is_main_process, convert_to_lora=convert_to_lora)
        root = as_path(save_directory, "save_directory")
        check_options("save_pretrained", others, unnamed)
        names = self._all_or(None if adapter_name is True else adapter_name, selected_adapters)
        check_trainer()
        if convert_to_lora and state_dict is not None:
            raise ConfigError("convert_to_lora saves the live tensors; give it or state_dict, not both.")
        is_main_process = is_main_process and not (state_dict is not None and is_gathered_elsewhere(state_dict))
        if is_main_process:
            warn_of_lost_state(self)
            save_base_for_pipeline(self, root)
        check_started(self._state, names)
        with no_collection():
            for name in names if is_main_process else ():
                if name in self._state.idle:
                    warn(f"saving adapter {name!r}: {idle_message((name,), self._state.idle[name])}")
                warn_of_peft(self, self._state.configs[name], name)
                if convert_to_lora:
                    tensors, config = as_lora(self, self._state.configs[name], name)
                else:
                    warn_of_scale(self, name)
                    tensors, config = self._as_it_is(name, state_dict)
                self._save(root, name, tensors, config, save_embedding_layers, others, state_dict)

    def _as_it_is(
        self, name: str, state_dict: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        warn_of_computed(self, name)
        tensors = self.adapter_state_dict(name)
        if state_dict is not None:
            tensors = tensors_from_state(self, tensors, state_dict)
        return tensors, self._file_config(name)

    def push_to_hub(
        self,
        repo_id: str,
        adapter_name: str | None = None,
        *,
        commit_message: str = "Upload adapter",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **others: Any,
    ) -> CommitInfo:
        """Push adapters, never the base, to the Hugging Face Hub: what `save_pretrained` writes, as one commit.

        It does not publish where the base is on this machine, nor overwrite a model card that somebody wrote.

        Args:
            repo_id: ``owner/name``; created if it does not exist.
            adapter_name: which adapter. None: all of them.
            commit_message: first line of the commit.
            commit_description: its body.
            private: who sees a repository that is created. None: the owner's default.
            token: None: the one you are logged in with.
            revision: branch to push to, created if it does not exist. None: the main one.
            create_pr: open a pull request instead of pushing to the branch.
            others: options of PEFT's and transformers' method that change nothing here, see `minipeft.files.foreign_options`.

        Returns:
            The commit; as a string, its URL.

        Raises:
            StateError: there is no such adapter.
            CheckpointError: the hub refuses, or cannot be reached.
            ConfigError: both a pull request and a branch; or an option is unknown, or asks for what is not done.
        """
        check_options("push_to_hub", others)
        names = self._all_or(adapter_name)
        warn_of_lost_state(self)
        with writing("the temporary folder"), tempfile.TemporaryDirectory() as folder:
            for name in names:
                warn_of_scale(self, name)
                tensors, config = self._as_it_is(name)
                if public_base(config) is None:
                    config["base_model_name_or_path"] = None
                self._save(Path(folder), name, tensors, config, options=others)
            return hub.push(
                Path(folder),
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def create_or_update_model_card(self, output_dir: str | PathLike[str]) -> None:
        """Mark the model card in a directory as an adapter's; Trainer calls this after it has written its own."""
        update_card(as_path(output_dir, "output_dir"), self._file_config(next(iter(self._state.configs))))

    def _save(
        self,
        root: Path,
        name: str,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        save_embedding_layers: bool | str = "auto",
        options: Mapping[str, Any] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write one adapter below a directory, with what PEFT repeats and the rows of tables that have to go along."""
        check_values(root, tensors := values_of(self, tensors))
        shared = followers(self, self._state.configs[name], name)
        whole, config = with_tables(self, name, tensors, config, save_embedding_layers, state)
        repeated = with_repeats({key: whole[key] for key in tensors}, shared)
        tensors = {**values_of(self, rest_of_followers(self, shared, name)), **whole, **repeated}
        check_size(options or {}, tensors)
        with writing(root):
            begin_checkpoint(root)
            self._write_adapter(directory_of(root, name), name, tensors, config)

    def _file_config(self, name: str) -> dict[str, Any]:
        return file_config(self, self._state.configs[name], name)

    def _write_adapter(
        self, directory: Path, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> None:
        tensors, written, scaling = for_diffusers(self, tensors, config)
        save_adapter(
            directory,
            tensors,
            written,
            base_samples(self, name, brought_rows(config)),
            self._state.kept.get(name, ()),
            scaling,
            card_to_write(directory, config, sum(tensor.numel() for tensor in tensors.values())),
            self._state.configs[name].ensure_weight_tying and not written["ensure_weight_tying"],
        )

    def _all_or(self, adapter_name: str | bool | None, selected: Sequence[str] | None = None) -> list[str]:
        if adapter_name is not None and selected is not None:
            raise ConfigError("give adapter_name or selected_adapters, not both.")
        named = None if adapter_name is None else [adapter_name]
        names: list[Any] = named or list(self._state.configs if selected is None else names_given(selected))
        self._check_known(names)
        return names

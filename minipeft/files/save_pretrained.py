"""What an adapted model does with files: save its adapters, push them to the hub, keep their model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo
from torch import Tensor, nn

from minipeft.errors import ConfigError, StateError, hint, shown
from minipeft.files import hub
from minipeft.files.base_samples import base_samples
from minipeft.files.model_card import public_base, update_card, write_card
from minipeft.files.resized_vocabulary import with_tables
from minipeft.files.save import adapter_tensors, file_config, save_adapter, tensors_from_state
from minipeft.files.to_lora import as_lora
from minipeft.files.trainer_guard import check_trainer
from minipeft.injection.attach import STATE, AdapterState

DEFAULT = "default"


def directory_of(root: Path, adapter_name: str) -> Path:
    """Where an adapter is saved, as in PEFT: "default" in the directory itself, any other in one of its name."""
    return root if adapter_name == DEFAULT else root / adapter_name


class SharedModel(nn.Module):
    """The part of `minipeft.AdaptedModel` that has to do with files."""

    @property
    def _state(self) -> AdapterState:
        state = self.__dict__.get(STATE)
        if state is None:
            raise StateError(f"this {type(self).__name__} has no adapter; it was built from an adapted model's class.")
        return cast(AdapterState, state)

    def adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """The live tensors of one adapter (None: of the only one) under the keys they have in a file."""
        return adapter_tensors(self, self._only_or(adapter_name))

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        adapter_name: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        convert_to_lora: bool = False,
        save_embedding_layers: bool | str = "auto",
    ) -> None:
        """Save adapters in PEFT's format, each whole or not at all, with a model card.

        The adapter "default" goes into the directory itself, any other into a sub-directory of its name, as in PEFT.

        Args:
            save_directory: made if need be.
            adapter_name: None: all of them.
            state_dict: take the values from this (gathered) state of the model instead of the live tensors.
            is_main_process: False: write nothing.
            convert_to_lora: save a low-rank update of any kind, PiSSA's for one, as plain LoRA, see `minipeft.files.to_lora`.
            save_embedding_layers: "auto": where the vocabulary was resized since the base was loaded, save its new rows
                along, as rows of tokens. True: the whole input and output tables, as PEFT does. False: nothing of them.

        Raises:
            ConfigError: `state_dict` and `convert_to_lora` at once; rows train of a table that is to be saved whole.
            StateError: no such adapter; or a Trainer saves that could not load the best adapter at its end.
            CheckpointError: the directory cannot be written, or holds a whole model.
        """
        names = self._all_or(adapter_name)
        check_trainer()
        if convert_to_lora and state_dict is not None:
            raise ConfigError("convert_to_lora saves the live tensors; give it or state_dict, not both.")
        for name in names if is_main_process else ():
            tensors = self.adapter_state_dict(name)
            if state_dict is not None:
                tensors = tensors_from_state(self, tensors, state_dict)
            config = self._file_config(name)
            if convert_to_lora:
                tensors, config = as_lora(self, self._state.configs[name], name)
            tensors, config = with_tables(self, name, tensors, config, save_embedding_layers)
            self._write_adapter(directory_of(Path(save_directory), name), name, tensors, config)

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
    ) -> CommitInfo:
        """Push adapters, and never the base, to the Hugging Face Hub: what `save_pretrained` writes, as one commit.

        The path of a base model on this machine is not published, nor is somebody's own model card overwritten.

        Args:
            repo_id: ``owner/name``; made if need be.
            adapter_name: None: all of them.
            commit_message: first line of the commit.
            commit_description: its body.
            private: of a repository that is made: who sees it. None: as the owner has set.
            token: None: the one you are logged in with.
            revision: branch to push to, made if need be. None: the main one.
            create_pr: open a pull request instead of pushing to the branch.

        Returns:
            The commit; as a string, its URL.

        Raises:
            StateError: no such adapter.
            CheckpointError: the hub refuses, or cannot be reached.
            ConfigError: a pull request and a branch at once.
        """
        names = self._all_or(adapter_name)
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                config = self._file_config(name)
                if public_base(config) is None:
                    config["base_model_name_or_path"] = None
                tensors, config = with_tables(self, name, self.adapter_state_dict(name), config, "auto")
                self._write_adapter(directory_of(Path(folder), name), name, tensors, config)
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
        """Mark the card in a directory as an adapter's; Trainer calls this after writing a card of its own."""
        update_card(Path(output_dir), self._file_config(next(iter(self._state.configs))))

    # ----------------------------------------------------------------------------------------------------- internals
    def _file_config(self, name: str) -> dict[str, Any]:
        return file_config(self, self._state.configs[name], name)

    def _write_adapter(
        self, directory: Path, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> None:
        save_adapter(directory, tensors, config, base_samples(self, name))
        write_card(directory, config, sum(tensor.numel() for tensor in tensors.values()))

    def _check_known(self, names: Sequence[str]) -> None:
        known = self._state.configs
        for name in names:
            if name not in known:
                raise StateError(f"no adapter {name!r}{hint(str(name), known)}; there are: {shown(known)}.")
        if not names or len(set(names)) != len(names):
            raise StateError(
                f"adapter names must be given once each, and at least one: {shown(names)}; to switch all off use disable_adapter()."
            )

    def _all_or(self, adapter_name: str | None) -> list[str]:
        names = list(self._state.configs) if adapter_name is None else [adapter_name]
        self._check_known(names)
        return names

    def _only_or(self, adapter_name: str | None) -> str:
        known = list(self._state.configs)
        if adapter_name is None and len(known) > 1:
            raise StateError(f"there are several adapters ({shown(known)}); name one.")
        self._check_known([adapter_name or known[0]])
        return adapter_name or known[0]

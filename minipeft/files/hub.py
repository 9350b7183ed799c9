"""Adapters from and to the Hugging Face Hub: download two files by name, upload one folder. And whole bases from it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from minipeft.errors import CheckpointError, ConfigError, shown, told
from minipeft.files.file_names import CONFIG_FILE, OF_OTHER_TOOLS, WEIGHTS_FILE
from minipeft.files.formats.known import format_of, pickles_in, weights_in
from minipeft.files.model_card import CARD_FILE, MARK, is_repo_id
from minipeft.files.not_an_adapter import folder_named
from minipeft.files.reading import as_path
from minipeft.files.tensor_file import Entry, TensorFile, open_tensors

Result = TypeVar("Result")
# What a tool writes next to its weights, and says what they mean.
BESIDE = (CONFIG_FILE, "config.json", "hyperparameters.yaml", "model_config.yaml")


def adapter_directory(
    place: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local directory of an adapter; what is a directory on this machine is never looked up on the hub.

    Otherwise a string ``owner/name`` is a repository on the hub. Of it only the two files of an adapter are downloaded,
    both of one commit, into the cache that ``HF_HUB_CACHE`` names; or those of another tool's, if it has such a one instead.

    Args:
        place: a directory, or a hub id. A `Path` is always a directory.
        revision: branch, tag or commit on the hub.
        token: for a private repository; None: the one you are logged in with.
        subfolder: where in it the adapter is; minipeft and PEFT save one that is not "default" to a folder of its name.
        local_files_only: use the cache, or fail.

    Raises:
        CheckpointError: the hub has no such adapter, or cannot be reached.
        ConfigError: a revision of a local directory, or a subfolder outside the directory.
    """
    as_path(place, "directory")
    inside = Path() if subfolder is None else as_path(subfolder, "subfolder")
    if inside.is_absolute() or ".." in inside.parts:
        raise ConfigError(
            f"subfolder {subfolder!r:.100} must be a path within the adapter's directory, such as 'other'."
        )
    if _is_local(place, revision, is_hub_id(place)):
        return Path(place) / (subfolder or "")
    inner = f"{inside.as_posix()}/" if subfolder else ""
    repository = _Repository(str(place), inner, revision, token, local_files_only)
    try:
        weights = repository.download(WEIGHTS_FILE)
    except Exception as error:  # huggingface_hub's own, or of its HTTP library, which differs by version
        weights = _other_weights(repository, error)
    else:
        if not _is_of_another_tool(weights):
            try:
                return repository.download(CONFIG_FILE).parent
            except Exception as error:  # as above
                raise _not_given(repository, CONFIG_FILE, error, repository.names_if_absent(error)) from None
    for beside in BESIDE:
        repository.has(beside)  # no tool writes all of them; reading says what is missing
    return weights.parent


@dataclass
class _Repository:
    """A folder of a repository, from which all files come from one commit."""

    repo_id: str
    folder: str  # with a slash behind it, or empty
    commit: str | None  # or the branch or tag that was asked for, until the first file is here
    token: str | bool | None
    local_files_only: bool

    def download(self, name: str) -> Path:
        """Where a file is in the cache; raises what huggingface_hub raises."""
        found = hf_hub_download(
            self.repo_id,
            f"{self.folder}{name}",
            revision=self.commit,
            token=self.token,
            local_files_only=self.local_files_only,
            library_name="minipeft",
        )
        self.commit = Path(found).parents[self.folder.count("/")].name  # a snapshot is named after its commit
        return Path(found)

    def has(self, name: str) -> bool:
        """Whether the repository has a file, which is then in the cache."""
        with contextlib.suppress(Exception):
            self.download(name)
            return True
        return False

    def names(self) -> list[str]:
        """The names in the folder; none if the hub does not give them."""
        with contextlib.suppress(Exception):
            names = HfApi(token=self.token, library_name="minipeft").list_repo_files(self.repo_id, revision=self.commit)
            return [name.removeprefix(self.folder) for name in names if name.startswith(self.folder)]
        return []

    def names_if_absent(self, error: Exception) -> list[str]:
        """The names in the folder, if this error says that a file is not in the repository."""
        return self.names() if _is_absent(error) else []

    def shows_adapter(self, name: str) -> bool:
        """Whether a file of weights is of a known format; only its header is downloaded."""
        with contextlib.suppress(Exception):  # from the hub, or since the header is broken
            api, path = HfApi(token=self.token, library_name="minipeft"), f"{self.folder}{name}"
            found = api.parse_safetensors_file_metadata(self.repo_id, path, revision=self.commit)
            entries = {key: Entry(tuple(info.shape), info.dtype, (key,)) for key, info in found.tensors.items()}
            return format_of(TensorFile(Path(path), entries, found.metadata)) is not None
        return False


def _other_weights(repository: _Repository, error: Exception) -> Path:
    """Another tool's weights in a repository that did not give ours; raises CheckpointError if there are none."""
    names = repository.names_if_absent(error)
    name = _weights_of_another_tool(repository, names)
    if isinstance(error, LocalEntryNotFoundError):
        name = next((known for known in OF_OTHER_TOOLS if repository.has(known)), None)
    if name is None:
        raise _not_given(repository, WEIGHTS_FILE, error, names) from None
    try:
        return repository.download(name)
    except Exception as failure:  # as above
        raise CheckpointError(f"the hub does not give {told(name)} ({_first_line(failure)}).") from None


def _not_given(repository: _Repository, name: str, error: Exception, names: Sequence[str]) -> CheckpointError:
    """The error for a file that did not come from a repository with these names in it."""
    why = _why(error, name, repository.local_files_only) + (_what_is_there(names) if names else "")
    return CheckpointError(f"{repository.repo_id!r} is not a directory here, and {why}")


def _weights_of_another_tool(repository: _Repository, names: Sequence[str]) -> str | None:
    """The file with an adapter of a format that is known; None if there is none, or several.

    If the name says nothing, only the header is asked for first, since the file may be a whole model.
    """
    flat = [name for name in names if "/" not in name]
    found = weights_in(flat)
    known = found is None or found in OF_OTHER_TOOLS or (not folder_named(flat) and repository.shows_adapter(found))
    return found if known else None


def _is_of_another_tool(path: Path) -> bool:
    """Whether a file of weights is of a known format that is not PEFT's."""
    with contextlib.suppress(CheckpointError):  # reading it will say why
        return format_of(open_tensors(path)) is not None
    return False


def base_directory(
    place: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local directory of a whole model; arguments and rules as for `adapter_directory`.

    Of a repository only the files that `minipeft.merge_from_disk` reads are downloaded: safetensors and small ones.

    Raises:
        CheckpointError: the hub has no such model, or cannot be reached.
        ConfigError: a revision of a local directory.
    """
    as_path(place, "base")
    if _is_local(place, revision, may_be_base_id(place)):
        return Path(place)
    try:
        found = snapshot_download(
            str(place),
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*"],
            ignore_patterns=["consolidated*", "original/*", "onnx/*"],
            library_name="minipeft",
        )
    except Exception as error:  # as above
        why = _why(error, "model", local_files_only)
        raise CheckpointError(f"{place!r} is not a directory here, and {why}") from None
    return Path(found)


def _is_local(place: str | os.PathLike[str], revision: str | None, may_be_id: bool) -> bool:
    """Whether a place is on this machine; raises ConfigError if it is, and a revision is given."""
    local = os.path.isdir(place) or not may_be_id
    if local and revision is not None:
        raise ConfigError(f"{place} is not a repository on the hub, so it has no revision {revision!r}.")
    return local


def is_hub_id(place: str | os.PathLike[str]) -> bool:
    """Whether this can only be the name of a repository: ``owner/name``."""
    return isinstance(place, str) and place.count("/") == 1 and is_repo_id(place)


def may_be_base_id(place: str | os.PathLike[str]) -> bool:
    """Whether this can be the name of a base: ``owner/name``, or an old one such as ``gpt2``, where there is no such file."""
    return isinstance(place, str) and not os.path.exists(place) and is_repo_id(place)


def _why(error: Exception, name: str, local_files_only: bool) -> str:
    if constants.HF_HUB_OFFLINE or local_files_only:
        setting = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
        return f"its {name} is not in {constants.HF_HUB_CACHE}, the only place to look with {setting} set."
    if _is_absent(error):
        return f"the repository on the hub has no {name}."
    return f"the hub does not give its {name} ({_first_line(error)})."


def _is_absent(error: Exception) -> bool:
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def _what_is_there(names: Sequence[str]) -> str:
    """What a repository without an adapter is, by its list of files."""
    pickles = pickles_in(names)
    if pickles:
        return f" {shown(pickles)} is a pickle: download it, and `minipeft convert` makes safetensors of it."
    return folder_named(names)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def create_repo(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Create a repository if it does not exist, and return its full name.

    Raises:
        CheckpointError: the hub refuses, or cannot be reached.
    """
    api = HfApi(token=token, library_name="minipeft")
    return _tried(lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id, repo_id)


def push(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    """Upload the files of a folder as one commit, to a repository that is created if it does not exist.

    A model card there that somebody wrote is kept.

    Raises:
        CheckpointError: the hub refuses, or cannot be reached.
        ConfigError: both a pull request and a branch.
    """
    if create_pr and revision is not None:
        raise ConfigError(f"create_pr opens a pull request against the main branch; leave out revision={revision!r}.")
    api = HfApi(token=token, library_name="minipeft")
    repo_id = create_repo(repo_id, private=private, token=token)
    if revision is not None and not revision.startswith("refs/"):
        _tried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
    own_card = _tried(lambda: _has_card_of_its_own(api, repo_id, revision), repo_id)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    operations = [
        CommitOperationAdd(name, path) for name, path in paths.items() if not (own_card and name == CARD_FILE)
    ]

    def commit() -> CommitInfo:
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )

    return _tried(commit, repo_id)


def _has_card_of_its_own(api: HfApi, repo_id: str, revision: str | None) -> bool:
    if not api.file_exists(repo_id, CARD_FILE, revision=revision):
        return False
    path = api.hf_hub_download(repo_id, CARD_FILE, revision=revision)
    return MARK not in Path(path).read_text("utf-8", errors="replace")


def _tried(call: Callable[[], Result], repo_id: str) -> Result:
    try:
        return call()
    except Exception as error:  # as above
        raise CheckpointError(f"the adapter was not pushed to {repo_id!r} ({_first_line(error)}).") from error

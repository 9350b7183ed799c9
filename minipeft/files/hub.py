"""Adapters from and to the Hugging Face Hub: download two files by name, upload one folder. And whole bases from it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from minipeft.errors import CheckpointError, ConfigError, shown, told
from minipeft.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from minipeft.files.foreign_on_hub import BESIDE, first_in_cache, is_of_another_tool, weights_of_another_tool
from minipeft.files.formats import known
from minipeft.files.model_card import CARD_FILE, MARK, is_repo_id
from minipeft.files.not_an_adapter import folder_named
from minipeft.files.reading import as_path

Result = TypeVar("Result")


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
    if _is_local(place, revision):
        return Path(place) / (subfolder or "")

    def download(name: str, commit: str | None) -> Path:
        options = {"token": token, "local_files_only": local_files_only, "library_name": "minipeft"}
        return Path(hf_hub_download(str(place), name, subfolder=subfolder, revision=commit, **options))  # type: ignore[arg-type]

    inner = f"{Path(subfolder).as_posix()}/" if subfolder else ""
    name, commit, found = WEIGHTS_FILE, revision, Path()
    try:
        found = download(WEIGHTS_FILE, commit)
        commit = found.parents[inner.count("/")].name  # a snapshot is named after its commit
        if not is_of_another_tool(found):
            name = CONFIG_FILE
            return download(CONFIG_FILE, commit).parent
    except Exception as error:  # huggingface_hub's own, or of its HTTP library, which differs by version
        names = _names_there(str(place), inner, commit, token) if _is_absent(error) else []
        other = weights_of_another_tool(names, inner, str(place), commit, token) if name == WEIGHTS_FILE else None
        if isinstance(error, LocalEntryNotFoundError) and name == WEIGHTS_FILE:
            other = first_in_cache(lambda known: download(known, commit))
        if other is None:
            why = _why(error, name, local_files_only) + (_what_is_there(names) if names else "")
            raise CheckpointError(f"{place!r} is not a directory here, and {why}") from None
        name = other
    return _of_another_tool(name, inner, commit, download)


def _of_another_tool(name: str, inner: str, commit: str | None, download: Callable[[str, str | None], Path]) -> Path:
    """Download the weights and what the tool wrote beside them, and return their directory.

    Raises:
        CheckpointError: the hub does not give the weights.
    """
    try:
        path = download(name, commit)
    except Exception as error:  # as above
        raise CheckpointError(f"the hub does not give {told(name)} ({_first_line(error)}).") from None
    for beside in BESIDE:
        with contextlib.suppress(Exception):  # no tool writes all of them; reading says what is missing
            download(beside, path.parents[inner.count("/")].name)
    return path.parent


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
    if _is_local(place, revision):
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


def _is_local(place: str | os.PathLike[str], revision: str | None) -> bool:
    """Whether a place is on this machine; raises ConfigError if it is, and a revision is given."""
    local = os.path.isdir(place) or not is_hub_id(place)
    if local and revision is not None:
        raise ConfigError(f"{place} is not a repository on the hub, so it has no revision {revision!r}.")
    return local


def is_hub_id(place: str | os.PathLike[str]) -> bool:
    """Whether this can only be the name of a repository: ``owner/name``."""
    return isinstance(place, str) and place.count("/") == 1 and is_repo_id(place)


def _why(error: Exception, name: str, local_files_only: bool) -> str:
    if constants.HF_HUB_OFFLINE or local_files_only:
        setting = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
        return f"its {name} is not in {constants.HF_HUB_CACHE}, the only place to look with {setting} set."
    if _is_absent(error):
        return f"the repository on the hub has no {name}."
    return f"the hub does not give its {name} ({_first_line(error)})."


def _is_absent(error: Exception) -> bool:
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def _names_there(repo_id: str, inner: str, commit: str | None, token: str | bool | None) -> list[str]:
    """The files of a repository, or of a folder in it; none if the hub does not give that."""
    with contextlib.suppress(Exception):
        names = HfApi(token=token, library_name="minipeft").list_repo_files(repo_id, revision=commit)
        return [name.removeprefix(inner) for name in names if name.startswith(inner)]
    return []


def _what_is_there(names: Sequence[str]) -> str:
    """What a repository without an adapter is, by its list of files."""
    pickles = known.pickles_in(names)
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

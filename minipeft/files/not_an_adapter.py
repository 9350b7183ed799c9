"""Recognising what something is that is no adapter: by names in a folder, the first bytes of a file, or the keys in it.

Nothing here decides whether something is an adapter. It only completes the message about something that is not one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from minipeft.files.file_names import CONFIG_FILE, WEIGHTS_FILE

MAX_NAMES, HEAD_BYTES = 2000, 512

# First bytes of a file -> what it is.
HEADS: tuple[tuple[str, str], ...] = (
    (r"version https://git-lfs", "a git-lfs pointer, which stands for the file: run `git lfs pull` where it was cloned"),
    (r"/annex/objects/", "a git-annex pointer, which stands for the file: run `git annex get` where it was cloned"),
    (r"\s*<(!doctype|html|\?xml)", "a web page, such as an error page that was saved: download the file again"),
    (r"\s*(Entry not found|Not Found|Invalid username|Access to model)", "an error message of the server"),
    (r"PK\x03\x04", "a zip archive; a file of torch.save is one too, and pickles are never read"),
    (r"\x80[\x02-\x05]", "a pickle, which can run code and is never read"),
    (r"\x1f\x8b", "a gzip archive: unpack it"),
    (r"GGUF", "a GGUF file, llama.cpp's format"),
    (r"\x89HDF\r\n", "an HDF5 file, such as Keras weights"),
)  # fmt: skip
# A regular expression for a name in a folder -> what the folder is. The first that some name matches decides.
FOLDERS: tuple[tuple[str, str], ...] = (
    (r"pytorch_adapter\.bin|adapter\.safetensors|head_config\.json|pytorch_model_head\.bin|adapter_fusion_config\.json"
     r"|adapter_setup\.json|model_head\.safetensors",
     "an adapter of the AdapterHub library (`adapters`), whose format is another one: load it there"),
    (r"adapter_model-\d+-of-\d+\.(safetensors|bin)|adapter_model\.(safetensors|bin)\.index\.json",
     "an adapter in shards, which neither PEFT nor minipeft reads: put the tensors of all of them into one file"),
    (r"zero_to_fp32\.py|global_step\d+(/.*)?|.*_optim_states\.pt|mp_rank_\d+_model_states\.pt",
     "a DeepSpeed checkpoint: its zero_to_fp32.py makes whole weights of it, and minipeft.hf.AdapterTrainer saves "
     "adapters"),
    (r"\.metadata|__\d+_\d+\.distcp|pytorch_model_fsdp(_\d+)?(\.bin|/.*)?",
     "a sharded checkpoint of FSDP or torch.distributed.checkpoint: save the gathered adapter from the training instead"),
    (r"trainer_state\.json|training_args\.bin",
     "a Trainer's checkpoint without an adapter: its trainer saved {what}"),
    (r"random_states_\d+\.pkl|sampler(_\d+)?\.bin|custom_checkpoint_\d+\.pkl",
     "a state that accelerate saved: save the adapter with model.save_pretrained(...) as well"),
    (r"optimizer(_\d+)?\.(pt|bin|pth)|scheduler\.(pt|bin)|rng_state(_\d+)?\.pth",
     "the state of an optimizer or of a training, and no adapter"),
    (r"model_index\.json", "a whole pipeline of diffusers"),
    (r".*\.gguf", "a model or adapter in GGUF, llama.cpp's format"),
    (r"modules\.json|config_sentence_transformers\.json", "a whole model of sentence-transformers"),
    (r"(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?|consolidated.*\.(pth|safetensors)|tf_model\.h5",
     "a whole model: load it with from_pretrained"),
    (r".*\.(zip|tar|tgz|tar\.gz|7z|rar)", "an archive: unpack it"),
)  # fmt: skip
WHOLE = re.compile(r"(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?")


def named(path: Path) -> str:
    """What an unreadable file is instead, as the end of a message; or ""."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(HEAD_BYTES).decode("latin-1")
        if not head:
            return " It is empty, as after a download or a copy that was cut off."
        for pattern, what in HEADS:
            if re.match(pattern, head, re.IGNORECASE):
                return f" It is {what}."
    return ""


def folder_named(names: Iterable[str]) -> str:
    """What a folder or repository with these files is instead of an adapter, as the end of a message; or ""."""
    names = sorted(itertools.islice(names, MAX_NAMES))
    if not names:
        return " It is empty."
    inner = sorted(
        {name.rpartition("/")[0] for name in names if name.endswith((f"/{CONFIG_FILE}", f"/{WEIGHTS_FILE}"))}
    )
    if inner:
        more = f" (there are {len(inner)})" if len(inner) > 1 else ""
        return (
            f" An adapter is in its sub-directory {inner[-1]!r:.200}{more}: give that, or subfolder={inner[-1]!r:.200}."
        )
    whole = "a whole model" if any(map(WHOLE.fullmatch, names)) else "no weights"
    for pattern, what in FOLDERS:
        if any(re.fullmatch(pattern, name) for name in names):
            return f" It is {what.format(what=whole)}."
    return ""


def layout_named(name: str, keys: Iterable[str]) -> str:
    """What to say of a file whose LoRA keys have an unknown layout, as the end of a message; or ""."""
    key = min((key for key in keys if "lora" in key), default=None)
    if key is None:
        return ""
    return (
        f" {name} holds {key!r:.200}, whose layout is not known. If a diffusers pipeline's load_lora_weights reads it, save it "
        "by pipe.unet.save_lora_adapter(folder), or pipe.transformer's."
    )


def local_names(directory: Path) -> list[str]:
    """The names in a folder, and of an adapter's files one level further down."""
    with os.scandir(directory) as entries:
        found = [(entry.name, entry.is_dir()) for entry in itertools.islice(entries, MAX_NAMES)]
    names = [name for name, _ in found]
    for folder in (name for name, is_folder in found if is_folder):
        names += [
            f"{folder}/{file}" for file in (CONFIG_FILE, WEIGHTS_FILE) if os.path.isfile(directory / folder / file)
        ]
    return names


def config_named(values: Mapping[str, Any]) -> str:
    """What an ``adapter_config.json`` without a PEFT method is instead, as the end of a message; or ""."""
    of_adapter_hub = {"model_type", "model_class", "hidden_size", "model_name"}
    if isinstance(values.get("config"), dict | str) and not of_adapter_hub.isdisjoint(values):
        return " It is the configuration of an AdapterHub adapter (`adapters`), whose format is another one."
    if "architectures" in values or "transformers_version" in values:
        return " It is the configuration of a whole model."
    return ""


def tensors_named(keys: Collection[str], parameters: Collection[str]) -> str:
    """What these tensors are instead of an adapter's, as the end of a message; or ""."""
    if any("exp_avg" in key or "momentum_buffer" in key for key in keys):
        return " It is the state of an optimizer."
    own = set(parameters)
    plain = [key.removeprefix("base_model.model.") for key in keys]
    if 2 * sum(key in own or f"model.{key}" in own for key in plain) > len(plain):
        return " These are weights of the model itself, not of an adapter."
    return ""

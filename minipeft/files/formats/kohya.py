"""kohya's and LyCORIS's adapters: ``lora_unet_down_blocks_0_..._to_q.lora_down.weight`` and the like.

The name of a module has underscores in place of its dots, so only the model's own names can say where the dots were. The
prefix says which part of a pipeline is meant. `alpha` is a tensor per module; without it, or at 0, it is the rank. See
``networks/lora.py`` of sd-scripts and ``lycoris/modules`` of LyCORIS, whose methods are in `minipeft.files.formats.lycoris`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from minipeft.errors import CheckpointError, hint, shown, told
from minipeft.files.formats.foreign import Format, Part, Source, numbers, part
from minipeft.files.formats.lycoris import ENDS, method
from minipeft.files.tensor_file import TensorFile

# Prefix -> the part of a diffusers pipeline. A pipeline has a unet or a transformer, and kohya has one word for both.
COMPONENTS = {
    "lora_unet": "unet",
    "lora_transformer": "transformer",  # OneTrainer's
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_te": "text_encoder",
    "lycoris": "",
}
# How the names begin that Stability's UNets and SD3, and Black Forest Labs' Flux, have in their own code.
ORIGINAL = ("input_blocks", "output_blocks", "middle_block", "joint_blocks", "double_blocks", "single_blocks")
_KEY = re.compile(rf"({'|'.join(COMPONENTS)})_([^.]+)\.({'|'.join(map(re.escape, ENDS))}|alpha)")
_PREFIXES = tuple(f"{prefix}_" for prefix in COMPONENTS)


def knows(file: TensorFile) -> bool:
    """Whether all keys begin as kohya's do; what follows may be a method that is not read."""
    keys = file.shapes
    return bool(keys) and all(key.startswith(_PREFIXES) and "." in key for key in keys)


def component_of(key: str) -> str:
    """The part of the pipeline that a key is for."""
    return next(component for prefix, component in COMPONENTS.items() if key.startswith(f"{prefix}_"))


def read(source: Source, component: str, keys: Sequence[str]) -> Part:
    """The adapter of one component under the names of its modules."""
    known, path = source.modules(component), source.file.path
    if known is None:
        raise CheckpointError(
            f"{path}: kohya's names have underscores for dots, so only the model's names say which modules are meant. "
            "Load it into the model, or give the model's folder to minipeft convert as --base."
        )
    dotted = _dotted(known)
    modules: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{path}: {told(key, 200)} belongs to a method of LyCORIS that is not read.")
        names = next((dotted[name] for name in _spellings(component, match[2]) if name in dotted), [])
        if len(names) != 1:
            raise CheckpointError(_misnamed(path, match[2], names, dotted))
        if match[3] in modules.setdefault(names[0], {}):
            raise CheckpointError(f"{path}: {names[0]} has {match[3]} twice, under two prefixes.")
        modules[names[0]][match[3]] = key
    alphas = [ends["alpha"] for ends in modules.values() if "alpha" in ends]
    peft_type, made, values = method(source, modules, numbers(source.file, alphas))
    return part(source, keys, made, peft_type=peft_type, spent=alphas, known=known, **values)


def _dotted(known: Iterable[str]) -> dict[str, list[str]]:
    """Names of modules by what kohya makes of them."""
    found: dict[str, list[str]] = {}
    for name in known:
        found.setdefault(name.replace(".", "_"), []).append(name)
    return found


def _spellings(component: str, name: str) -> list[str]:
    """The names a module may go by: transformers 5 dropped the `text_model` around a text encoder of CLIP's."""
    around = "text_model_"
    return [name, name.removeprefix(around), f"{around}{name}"] if component.startswith("text_encoder") else [name]


def _misnamed(path: object, name: str, names: Sequence[str], dotted: Mapping[str, object]) -> str:
    if names:
        return f"{path}: {told(name, 200)} may be {shown(names)} of this model, so it is not read."
    if name.startswith(ORIGINAL):
        return (
            f"{path}: {told(name, 200)} is a name of the original UNet or transformer, and this model has diffusers' names. Load "
            "the file by a pipeline's load_lora_weights, and save it by pipe.unet.save_lora_adapter(folder), or pipe.transformer's."
        )
    return f"{path}: {told(name, 200)} names no module of this model{hint(name, dotted)}."


KOHYA = Format("kohya's sd-scripts or LyCORIS", knows, read, component_of)

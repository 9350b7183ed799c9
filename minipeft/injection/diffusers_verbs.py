"""diffusers' verbs for LoRA on an adapted model: refused, since they look for PEFT's layers, find none, and do nothing.

So does the ``scale`` in the keyword arguments for the attention, which ``pipe(..., cross_attention_kwargs={"scale": 0.5})``
passes on. And ``fuse_qkv_projections`` makes one layer of three from the base's weights alone. But ``unload_lora``, which a pipeline's
``unload_lora_weights`` calls, means our `unload`.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from minipeft.errors import StateError, told

# diffusers/loaders/peft.py, diffusers 0.42.1 -> what does it here.
VERBS = {
    "fuse_lora": "merge_adapter()",
    "unfuse_lora": "unmerge_adapter()",
    "set_adapters": "set_adapter(names) and set_scale(name, factor)",
    "enable_lora": "enable_adapters()",
    "disable_lora": "disable_adapters(), or disable_adapter() for a while",
    "delete_adapters": "delete_adapter(name)",
    "save_lora_adapter": "save_pretrained(folder)",
}
NOT_PEFTS = "knows PEFT's layers alone, and minipeft adapted this"
FUSING, UNLOADING = "fuse_qkv_projections", "unload_lora"
FOR_ATTENTION = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def refuse_diffusers_verbs(cls: type[nn.Module]) -> None:
    """Make an adapted class of diffusers refuse `scale`, and those of these verbs that it has."""
    messages = {verb: f"{NOT_PEFTS} {cls.__name__}; use its {ours}." for verb, ours in VERBS.items()}
    messages[FUSING] = f"copies the weights of this {cls.__name__} without its adapters; call merge_and_unload() first."
    for verb, message in messages.items():
        if hasattr(cls, verb):
            setattr(cls, verb, _refused(cls, verb, message))
    if hasattr(cls, UNLOADING):
        setattr(cls, UNLOADING, _unloading(cls))
    cls.forward = _without_scale(cls)


def _refused(cls: type[nn.Module], verb: str, message: str) -> Any:
    @functools.wraps(getattr(cls, verb))
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise StateError(f"{verb}() of diffusers {message}")

    return method


def _unloading(cls: type[nn.Module]) -> Any:
    @functools.wraps(getattr(cls, UNLOADING))
    def method(self: Any) -> None:
        """Give the base back, as `unload` does, and let diffusers do the rest."""
        self.unload()
        getattr(self, UNLOADING)()  # the base's own

    return method


def _without_scale(cls: type[nn.Module]) -> Any:
    plain = cls.forward

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name in FOR_ATTENTION if isinstance(self, cls) else ():  # it may be unloaded by now
            scale = (kwargs.get(name) or {}).get("scale", 1.0)
            if scale != 1.0:
                raise StateError(
                    f"{name}={{'scale': {told(scale)}}} {NOT_PEFTS} {cls.__name__}; use its set_scale(name, factor)."
                )
        return plain(self, *args, **kwargs)

    return forward

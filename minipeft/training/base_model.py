"""The base of a run and its tokenizer: those that were named, or an error."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minipeft.errors import ConfigError, DataError, told_error
from minipeft.files.tokenizer import load_tokenizer
from minipeft.memory.quantize import quantize

DTYPES: dict[str, Any] = {"float32": torch.float32, "bf16": torch.bfloat16, "auto": "auto"}


def load_base(
    name: str,
    dtype: str = "float32",
    attention: str | None = None,
    quantized: str | None = None,
    chat_template: Path | None = None,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """A causal language model and its tokenizer; never another one.

    Args:
        name: of the Hub, or a local directory.
        dtype: a key of `DTYPES`; ``"auto"`` is the checkpoint's own.
        attention: transformers' ``attn_implementation``.
        quantized: how to quantize the base, if at all.
        chat_template: a file with the template that takes the place of the tokenizer's.

    Raises:
        ConfigError: it is not there, has no tokenizer or no such attention, or is not a causal language model.
    """
    auto: Any = transformers  # which hides its Auto classes from type checkers
    options = {"dtype": DTYPES[dtype], "attn_implementation": attention, "output_loading_info": True}
    try:
        auto.AutoConfig.from_pretrained(name)
        tokenizer = load_tokenizer(name)
        model, info = auto.AutoModelForCausalLM.from_pretrained(name, **options)
    except DataError as error:
        raise ConfigError(f"--model_name {error}") from None
    except Exception as error:  # of transformers, the Hub or the file system
        reason = told_error(error)
        if attention and (isinstance(error, ImportError) or "attn_implementation" in reason):
            raise ConfigError(f"--attn_implementation {attention}: {reason}; sdpa needs no package.") from None
        raise ConfigError(
            f"--model_name {name}: this is not a model directory, and the Hub does not have it ({reason}); "
            "check the name and the network, or leave the flag out for the embedded model."
        ) from None
    if info["missing_keys"]:
        raise ConfigError(
            f"--model_name {name}: no weights for {min(info['missing_keys'])}; name a causal language model."
        )
    if chat_template:
        try:
            tokenizer.chat_template = chat_template.read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"--chat_template {chat_template}: cannot be read ({error}).") from None
    if quantized:
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line per call in int8
        model = quantize(model, quantized)
    return tokenizer, model

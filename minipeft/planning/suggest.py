"""Settings to begin with, each with its reason, by the rules of "LoRA Without Regret" (Schulman et al., 2025).

Source: https://thinkingmachines.ai/blog/lora; the formula for the learning rate is the one that its authors publish with it
(``tinker_cookbook.hyperparam_utils``).
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from minipeft.config.adapter_config import ALL_LINEAR, ALL_LINEAR_TEXT, AdapterConfig, config_from_dict
from minipeft.config.options import integer
from minipeft.ecosystem.transformers_model import model_type, text_part
from minipeft.errors import ConfigError, DataError, told
from minipeft.files.reading import read_text
from minipeft.files.tokenizer import load_tokenizer
from minipeft.planning.base import Place, base_model
from minipeft.planning.estimate import Adapt, task_type
from minipeft.planning.hollow import Hollow

ARTICLE = "LoRA Without Regret"
OPTIONS = ("r", "lora_alpha", "target_modules", "task_type")  # of the configuration
LEAST_RANK, MOST_RANK, USUAL_RANK = 8, 256, 32
ALPHA = 32  # the article's, for every rank
# learning rate = FULL_RATE * FACTOR * (WIDTH / hidden_size) ** exponent of the family
FULL_RATE, FACTOR, WIDTH = 5e-5, 10, 2000
EXPONENTS = {"qwen": 0.0775, "llama": 0.781}
# For other families, between the two. With Llama's, a GPT-2 of width 128 was 2 % worse than the best rate (examples/sweep.py).
OTHER_EXPONENT = sum(EXPONENTS.values()) / len(EXPONENTS)
SHORT_RUN = 100  # steps; in shorter ones 15 times full fine-tuning's rate was best
MOST_SEQUENCES = 32
MOST_TOKENS = 2**53


@dataclass(frozen=True)
class Choice:
    """One setting: its name, its value, and why."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Suggestion:
    """Settings to begin with, in the order in which they are chosen."""

    choices: tuple[Choice, ...]

    def __getitem__(self, name: str) -> Any:
        return next(choice.value for choice in self.choices if choice.name == name)

    @property
    def config(self) -> AdapterConfig:
        """The configuration of the adapter, a `LoraConfig`."""
        return config_from_dict({"peft_type": "LORA", **self._options()}, live=True)

    def code(self) -> str:
        """The configuration, to paste."""
        options = (
            f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}"
            for name, value in self._options().items()
        )
        return f"LoraConfig({', '.join(options)})"

    def _options(self) -> dict[str, Any]:
        values = {choice.name: choice.value for choice in self.choices}
        return {name: values[name] for name in OPTIONS if name in values}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"config": self.code(), "choices": [asdict(choice) for choice in self.choices]}


def suggest(
    place: Place, adapt: Adapt, tokens: int | None = None, length: int = 512, text: str | Path | None = None
) -> Suggestion:
    """Choose targets, rank, alpha, learning rate, batch and schedule.

    Args:
        place: see `minipeft.planning.base.base_model`.
        adapt: `minipeft.get_adapter_model`.
        tokens: to train on, each counted once; None if not known.
        length: tokens in a sequence.
        text: a file whose tokens are counted, instead of `tokens`; `place` is then a directory or a name.

    Raises:
        MinipeftError: the model cannot be built or adapted, the text not counted, or a number is not allowed.
    """
    integer("length", length, at_least=1)
    tokens = _tokens(place, tokens, text)
    hollow = Hollow()
    model = base_model(place, hollow)
    family, width, task = model_type(model) or "", _hidden_size(model), task_type(model)
    has_towers = text_part(model) not in (None, model)
    targets = ALL_LINEAR_TEXT if has_towers else ALL_LINEAR
    with hollow:
        adapted = adapt(model, config_from_dict({"peft_type": "LORA", "r": 1, "target_modules": targets}, live=True))
    per_rank = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    rank = _rank(tokens, per_rank)
    batch, steps = _batch(tokens, length)
    return Suggestion(
        (
            *([Choice("task_type", task, "the head is new, so it trains in full")] if task else []),
            Choice(
                "target_modules",
                targets,
                f"attention alone learns less than the feed-forward layers do, at the same number of parameters ({ARTICLE})",
            ),
            rank,
            Choice(
                "lora_alpha",
                ALPHA,
                f"the update is scaled by alpha / r, so the learning rate serves every rank ({ARTICLE})",
            ),
            _learning_rate(family, width, steps),
            batch,
            Choice(
                "lr_scheduler_type", "linear", "after a warm-up over 5 % of the steps; the article held it constant"
            ),
        )
    )


def _tokens(place: Place, tokens: int | None, text: str | Path | None) -> int | None:
    if tokens is not None:
        integer("tokens", tokens, at_least=1, at_most=MOST_TOKENS)
    if text is None:
        return tokens
    if tokens is not None:
        raise ConfigError("tokens and text both say how many tokens there are; give one.")
    if not isinstance(text, str | os.PathLike):
        raise ConfigError(f"text must be the path of a file, not {told(text)}.")
    return count_tokens(place, Path(text))


def _hidden_size(model: nn.Module) -> int:
    config: Any = model.config
    width = getattr(config.get_text_config(), "hidden_size", None)
    if not isinstance(width, int):
        raise ConfigError(
            f"{type(model).__name__}: its configuration has no hidden_size, by which the learning rate is chosen."
        )
    return width


def _rank(tokens: int | None, per_rank: int) -> Choice:
    if tokens is None:
        return Choice("r", USUAL_RANK, "the number of training tokens is not known; say --tokens or --text to fit it")
    needed = 2 ** math.ceil(math.log2(max(1.0, tokens / per_rank)))
    rank = min(MOST_RANK, max(LEAST_RANK, needed))
    has = f"{rank * per_rank:,} parameters at r={rank} for {tokens:,} tokens"
    if needed > MOST_RANK:
        return Choice("r", rank, f"{has}: less than one a token, so full fine-tuning may learn more ({ARTICLE})")
    return Choice("r", rank, f"{has}: at least one a token, so the adapter has room for what they teach ({ARTICLE})")


def _batch(tokens: int | None, length: int) -> tuple[Choice, int | None]:
    why = f"LoRA loses more by large batches than full fine-tuning does ({ARTICLE})"
    if tokens is None:
        return Choice("batch_size", 16, f"{why}: 32 at most"), None
    sequences = max(1, tokens // length)
    batch = 2 ** max(0, min(int(math.log2(MOST_SEQUENCES)), math.floor(math.log2(max(1, sequences // SHORT_RUN)))))
    steps = max(1, sequences // batch)
    return Choice("batch_size", batch, f"{why}; {steps:,} steps an epoch of {length} tokens each sequence"), steps


def _learning_rate(family: str, width: int, steps: int | None) -> Choice:
    known = next((name for name in EXPONENTS if family.startswith(name)), None)
    is_short = steps is not None and steps < SHORT_RUN
    exponent = EXPONENTS[known] if known else OTHER_EXPONENT
    rate = FULL_RATE * FACTOR * (WIDTH / width) ** exponent * (1.5 if is_short else 1)
    times = 15 if is_short else FACTOR
    between = f"between those fitted for Llama and Qwen, as {family or 'this family'} was not measured"
    fitted = f"fitted for {known}" if known else between
    short = f", and fewer than {SHORT_RUN} steps" if is_short else ""
    return Choice(
        "learning_rate",
        float(f"{rate:.2g}"),
        f"{times} times full fine-tuning's, for hidden size {width}{short}; {fitted} ({ARTICLE})",
    )


def count_tokens(place: Any, path: Path) -> int:
    """The number of tokens that a model's tokenizer makes of a text file in UTF-8.

    Raises MinipeftError if the file cannot be read, or the model, a directory or name on the Hub, has no tokenizer.
    """
    if not isinstance(place, str | os.PathLike):
        raise ConfigError(
            "a text is counted by a model's tokenizer; give the model's directory or name, or count yourself."
        )
    text = read_text(path)
    try:
        tokenizer = load_tokenizer(place)
    except DataError as error:
        raise DataError(f"{error} Or count yourself and give the number of tokens.") from None
    count = len(tokenizer(text, verbose=False)["input_ids"])
    if not count:
        raise DataError(f"there are no tokens in {path}.")
    return count

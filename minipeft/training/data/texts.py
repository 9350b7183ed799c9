"""The texts of a run: one to train on, and those that it is evaluated on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from minipeft.errors import DataError
from minipeft.training.data.encoding import Encoding, check_fit
from minipeft.training.data.examples import Examples, encode
from minipeft.training.data.sources import Source, held_out_split, open_source


@dataclass(frozen=True)
class Texts:
    """What a run reads.

    Attributes:
        train: examples to train on, or a source to stream them from.
        evaluation: examples to evaluate on, by name; one is "eval".
        held_out: whether these are the end of the text to train on.
    """

    train: Examples | Source
    evaluation: dict[str, Examples]
    held_out: bool = False

    def fingerprints(self) -> dict[str, str]:
        """Digests of all texts by name, to compare when a run goes on. A stream has none."""
        train = self.train.fingerprint if isinstance(self.train, Examples) else "a stream"
        return {"train": train, **{name: text.fingerprint for name, text in self.evaluation.items()}}

    def describe(self, name: str) -> str:
        """Sizes of the texts, one line each."""
        train = self.train.describe() if isinstance(self.train, Examples) else "a stream"
        lines = [f"text {name}, to train on (train): {train}"]
        lines += [f"text {name}, to evaluate on ({key}): {text.describe()}" for key, text in self.evaluation.items()]
        if self.held_out:
            lines.append("no evaluation text: the last 5 percent of the examples are held out for it")
        return "\n".join(lines)


def read_texts(
    data: str | os.PathLike[str],
    evaluation: Mapping[str, str | os.PathLike[str]],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    model_config: Any,
    *,
    dataset_config: str | None = None,
    lines: bool = False,
    streaming: bool = False,
    eval_examples: int | None = None,
) -> Texts:
    """Read and encode the texts of a run.

    Args:
        data: what to train on, see `open_source`.
        evaluation: what to evaluate on, by name. If empty, it is the split of `data` for this, or else its end.
        tokenizer: of the model.
        encoding: lengths and packing.
        model_config: transformers configuration of the model, which must be able to take the examples.
        dataset_config: of a data set on the Hub that has several.
        lines: whether rows with ``text`` are lines that follow each other.
        streaming: whether to read the text to train on while training.
        eval_examples: number of examples to evaluate on, per text. None: all.

    Raises:
        DataError: a text cannot be read or encoded, or a stream has no text to evaluate on.
        ConfigError: the model cannot take the examples.
    """
    check_fit(encoding.max_length, 0, model_config)

    def encoded(data: str | os.PathLike[str], split: str = "train") -> Examples:
        examples = encode(open_source(data, dataset_config, split, lines=lines), tokenizer, encoding)
        check_fit(encoding.max_length, examples.largest_id, model_config)
        return examples

    split = None if evaluation else held_out_split(data, dataset_config)
    if streaming and not (evaluation or split):
        raise DataError("--streaming: a stream has no end to hold out for the evaluation; give an --eval_file.")
    train: Examples | Source
    train = open_source(data, dataset_config, streaming=True, lines=lines) if streaming else encoded(data)
    held_out = isinstance(train, Examples) and not (evaluation or split)
    if held_out:
        assert isinstance(train, Examples)
        train, end = train.hold_out()
        texts = {"eval": end}
    else:
        texts = {"eval": encoded(data, split)} if split else {name: encoded(text) for name, text in evaluation.items()}
    texts = {name: text.select(0, min(len(text), eval_examples or len(text))) for name, text in texts.items()}
    return Texts(train, texts, held_out)

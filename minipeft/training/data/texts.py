"""The texts of a run: one to train on, and those that it is evaluated on."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from minipeft.errors import ConfigError, DataError, shown
from minipeft.training.data.apart import why_not_apart
from minipeft.training.data.encoding import Encoder, Encoding, check_fit
from minipeft.training.data.examples import Examples, encode
from minipeft.training.data.packing import Packed, pack
from minipeft.training.data.sources import Source, held_out_split, open_source

_log = logging.getLogger("minipeft")


@dataclass(frozen=True)
class Texts:
    """What a run reads."""

    train: Examples | Packed | Source  # examples to train on, or a source to stream them from
    evaluation: dict[str, Examples | Packed]  # examples to evaluate on, by name; one is "eval"
    encoding: Encoding  # of `train`; its `packing` is what the model allows
    held_out: bool = False  # whether these are the end of the text to train on
    # By name, columns of the data that nothing reads
    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def fingerprints(self) -> dict[str, str]:
        """Digests of all texts by name, to compare when a run goes on. A stream has none."""
        train = "a stream" if isinstance(self.train, Source) else self.train.fingerprint
        return {"train": train, **{name: text.fingerprint for name, text in self.evaluation.items()}}

    def describe(self, name: str) -> str:
        """Sizes of the texts, one line each."""
        train = "a stream" if isinstance(self.train, Source) else self.train.describe()
        lines = [f"text {name}, to train on (train): {train}"]
        lines += [f"text {name}, to evaluate on ({key}): {text.describe()}" for key, text in self.evaluation.items()]
        lines += [f"columns that are not used ({key}): {shown(columns, 8)}" for key, columns in self.ignored.items()]
        if self.held_out:
            lines.append("no evaluation text: the last 5 percent of the examples are held out for it")
        return "\n".join(lines)


def read_texts(
    data: str | os.PathLike[str],
    evaluation: Mapping[str, str | os.PathLike[str]],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    model: Any,
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
        model: of transformers; it must be able to take the examples, and to keep packed ones apart.
        dataset_config: of a data set on the Hub that has several.
        lines: whether rows with ``text`` are lines that follow each other.
        streaming: whether to read the text to train on while training.
        eval_examples: number of examples to evaluate on, per text, before they are packed. None: all.

    Raises:
        DataError: a text cannot be read or encoded, or a stream has no text to evaluate on.
        ConfigError: the model cannot take the examples, or packing was asked for and it would not keep them apart.
    """
    check_fit(encoding.max_length, 0, model.config)
    why_not = functools.cache(functools.partial(why_not_apart, model))  # asked only if examples would share rows

    def opened(data: str | os.PathLike[str], split: str = "train", streaming: bool = False) -> tuple[Source, Encoding]:
        source = open_source(data, dataset_config, split, lines=lines, streaming=streaming)
        return source, _allowed(encoding, Encoder(tokenizer, source.kind, encoding), type(model).__name__, why_not)

    def packed(examples: Examples, most: int | None = None) -> Examples | Packed:
        first = examples.select(0, min(len(examples), most or len(examples)))
        return pack(first) if first.share_rows else first

    split = None if evaluation else held_out_split(data, dataset_config)
    if streaming and not (evaluation or split):
        raise DataError("--streaming: a stream has no end to hold out for the evaluation; give an --eval_file.")
    source, own = opened(data, streaming=streaming)
    others = {"eval": opened(data, split)} if split else {name: opened(text) for name, text in evaluation.items()}
    texts = {name: packed(_encoded(*other, tokenizer, model), eval_examples) for name, other in others.items()}
    sources = {"train": source, **{name: other for name, (other, _) in others.items()}}
    ignored = {name: read.ignored for name, read in sources.items() if read.ignored}
    if streaming:
        return Texts(source, texts, own, ignored=ignored)
    examples = _encoded(source, own, tokenizer, model)
    if not others:
        examples, end = examples.hold_out()
        texts = {"eval": packed(end, eval_examples)}
    return Texts(packed(examples), texts, own, held_out=not others, ignored=ignored)


def _encoded(source: Source, encoding: Encoding, tokenizer: PreTrainedTokenizerBase, model: Any) -> Examples:
    examples = encode(source, tokenizer, encoding)
    check_fit(encoding.max_length, examples.largest_id, model.config)
    return examples


def _allowed(encoding: Encoding, encoder: Encoder, model: str, why_not: Callable[[], str | None]) -> Encoding:
    """The encoding, without packing if nobody asked for it and the model would not keep the examples apart."""
    if not encoder.in_rows or (why := why_not()) is None:
        return encoding
    if encoding.packing:
        raise ConfigError(
            f"packing: {model} {why}, so packed examples would not be as if alone; pad them (--no-packing), or join "
            "documents all the same (--attend_across)."
        )
    _log.info("packing: %s %s, so documents are padded; attend_across joins them all the same.", model, why)
    return replace(encoding, packing=False)

"""What the chapters share: the embedded model and its texts, a plain training loop, claims that are checked, and figures."""

import argparse
import functools
import gzip
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler
from transformers.utils import logging

logging.set_verbosity_error()  # the lines that a chapter prints are its own
logging.disable_progress_bar()

ASSETS = Path(__file__).resolve().parents[1] / "assets"
TARGETS = ["c_attn", "c_proj", "c_fc"]  # every linear layer of GPT-2 but the head


def tiny_model() -> nn.Module:
    """The embedded GPT-2 in float32: 4 layers of width 128, trained on Python's documentation."""
    return AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", local_files_only=True)


@functools.cache
def tokenizer():
    """The embedded model's tokenizer, of 2,048 tokens."""
    return AutoTokenizer.from_pretrained(ASSETS / "tiny", local_files_only=True)


@functools.cache
def blocks(part: str, length: int) -> Tensor:
    """An embedded text as rows of this many tokens: code-train, code-eval (new to the model), docs-train or docs-eval."""
    text = gzip.decompress((ASSETS / "corpus" / f"{part}.txt.gz").read_bytes()).decode("utf-8")
    ids = torch.tensor(tokenizer()(text)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def batches(rows: Tensor, size: int, steps: int, seed: int = 0) -> Iterator[Tensor]:
    """Random rows, `size` of them in each step; the seed alone decides which."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield rows[torch.randint(len(rows), (size,), generator=generator)]


def train(
    model: nn.Module,
    rows: Tensor,
    *,
    steps: int,
    lr: float,
    size: int = 8,
    seed: int = 0,
    warmup: int | None = None,
    clip: float = 1.0,
    schedule: str = "linear",
    after_step: Callable[[int, float], object] | None = None,
) -> list[float]:
    """Train what can be trained with AdamW; returns the loss of every step, in nats per token.

    Args:
        size: rows in a batch.
        warmup: steps until the learning rate is reached; a twentieth of all, if not given.
        clip: largest norm of the gradient.
        schedule: of the learning rate, as transformers' `get_scheduler` names it.
        after_step: called with the number of the step, from 1, and its gradient's norm before clipping.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    rate = get_scheduler(schedule, optimizer, steps // 20 if warmup is None else warmup, steps)
    torch.manual_seed(seed)  # for dropout
    model.train()
    losses = []
    for step, ids in enumerate(batches(rows, size, steps, seed), 1):
        loss = model(ids, labels=ids).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trainable, clip).item()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if after_step is not None:
            after_step(step, norm)
    model.eval()
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, rows: Tensor) -> float:
    """The mean loss over these rows without dropout, in nats per token."""
    training = model.training
    model.eval()
    total = sum(model(some, labels=some).loss.item() * len(some) for some in rows.split(16))
    model.train(training)
    return total / len(rows)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values, or of as many as there are, at each place."""
    return [sum(values[max(0, end - window) : end]) / min(window, end) for end in range(1, len(values) + 1)]


def check(claim: str, holds: bool) -> None:
    """Print a claim that was just computed; the program ends with exit code 1 if it is false."""
    print(f"{'true ' if holds else 'FALSE'} | {claim}")
    if not holds:
        sys.exit(1)


def figure(columns: int = 1, width: float = 4.5, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """An empty figure with `columns` plots side by side, each this large in inches."""
    drawn = Figure(figsize=(columns * width if columns > 1 else 6.5, height), layout="constrained")
    axes = list(drawn.subplots(1, columns, squeeze=False)[0])
    for each in axes:
        each.grid(alpha=0.3)
    return drawn, axes


def save(drawn: Figure, options: argparse.Namespace, chapter: str) -> None:
    """Write the figure as a PNG into --output, under the chapter's name."""
    path = options.output / f"{Path(chapter).stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=100)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # 64 colours take a quarter of the bytes
    print(f"figure: {path.as_posix()}")


def options(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """--output, a folder, and --quick: fewer steps, for a look or a test."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/tutorial"), help="where the figure goes")
    parser.add_argument("--quick", action="store_true", help="fewer steps: a look at the program, not at its results")
    return parser.parse_args(argv)

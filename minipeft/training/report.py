"""What a run shows: its parameters, losses, samples before and after, and that the saved adapter is right."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from minipeft.errors import MinipeftError, StateError
from minipeft.memory.dequantize import float_dtype
from minipeft.model import AdaptedModel, load_adapter
from minipeft.training.data.collate import Store

TOLERANCES = {"reloaded": 1e-6, "merged": 1e-5}  # as shares of the largest logit
ROUNDED = 5e-2  # merged weights are rounded to a half-precision base; int8 layers round their input, merged ones do not


def parameter_table(model: AdaptedModel) -> str:
    """Numbers of total, trainable and frozen parameters."""
    trainable, total = model.get_nb_trainable_parameters()
    numbers = {"total": total, "trainable": trainable, "frozen": total - trainable}
    lines = [f"{'parameters':<12}{'number':>16}{'percent':>10}"]
    lines += [f"{name:<12}{number:>16,}{100 * number / total:>10.2f}" for name, number in numbers.items()]
    return "\n".join(lines)


def openings(tokenizer: PreTrainedTokenizerBase, examples: Store) -> list[str]:
    """The beginnings of the first three examples, to be continued."""
    rows = examples.rows(range(min(3, len(examples.lengths))))
    return tokenizer.batch_decode([row.input_ids[: min(16, max(1, len(row.input_ids) // 2))].tolist() for row in rows])


@torch.no_grad()
def sample(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, tokens: int, max_length: int, seed: int
) -> list[str]:
    """Each prompt with its continuation of at most `tokens` tokens, drawn with the same random numbers.

    Prompt and continuation stay below `max_length`, the tokens that the model was trained on at a time. Every process calls
    it, since the model may be sharded; the model is left in evaluation mode.
    """
    model.eval()
    texts: list[str] = []
    for prompt in prompts:
        torch.manual_seed(seed)
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
        length = max(1, min(tokens, max_length - inputs["input_ids"].shape[1]))
        options = {"min_new_tokens": length, "max_new_tokens": length, "pad_token_id": tokenizer.eos_token_id}
        ids = model.generate(**inputs, do_sample=True, temperature=0.7, top_k=20, **options)
        texts += tokenizer.batch_decode(ids)
    return texts


def sample_report(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> str:
    """Samples of the base and of the adapted model, prompt by prompt."""
    pairs = zip(prompts, before, after, strict=True)
    return "\n".join(f"=== {prompt!r}, before:\n{old}\n--- {prompt!r}, after:\n{new}\n" for prompt, old, new in pairs)


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn minipeft's errors into one line and exit code 1, and Ctrl-C into one and 130.

    Of several processes the first one prints it.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        yield
    except KeyboardInterrupt:
        if first:
            print(f"{program}: stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except MinipeftError as error:
        raise SystemExit(f"{program}: error: {' '.join(str(error).split())}" if first else 1) from None


def finite(loss: float) -> float:
    """A loss that JSON and exp() can take; raises StateError beyond 100 nats per token, where nothing is left to train."""
    if not loss < 100:
        raise StateError(f"the loss is {loss}: training diverged; lower --learning_rate or --alpha.")
    return loss


def update_line(row: Mapping[str, float]) -> str:
    """What a run's metrics say of one update."""
    line = "loss={loss:.3f} lr={learning_rate:.1e} {tokens_per_second:.0f} tokens/s, {peak_memory_mib:.0f} MiB"
    return line.format(**row)


def evaluation_line(row: Mapping[str, float]) -> str:
    """What a run's metrics say of one evaluation."""
    line = "epoch {epoch:.2f}, update {step}: eval loss {eval_loss:.4f}, perplexity {eval_perplexity:.2f}"
    return line.format(**row)


def perplexity_report(rows: Sequence[dict[str, Any]]) -> str:
    """First and last perplexities among the rows of a run's metrics."""
    lines = []
    for key, what in (("eval", "held-out text"), ("docs", "documentation, what the base was trained on")):
        found = [row[f"{key}_perplexity"] for row in rows if f"{key}_perplexity" in row]
        if found:
            lines.append(f"perplexity on {what}: {found[0]:.2f} before, {found[-1]:.2f} after")
    return "\n".join(lines)


def plot_losses(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the losses of all updates and evaluations of a run."""
    from matplotlib.figure import Figure  # takes a second, and only one process draws, at the end

    updates, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    steps, losses = [row["step"] for row in updates], [row["loss"] for row in updates]
    window = max(1, math.ceil(len(steps) / 20))
    means = [sum(losses[end - window : end]) / window for end in range(window, len(losses) + 1)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", lw=0.8, alpha=0.3, label="training, each update")
    axes.plot(steps[window - 1 :], means, color="tab:blue", label=f"training, mean of the last {window}")
    axes.plot([row["step"] for row in evaluations], [row["eval_loss"] for row in evaluations], "o-",
              color="tab:orange", label="evaluation, with perplexity")  # fmt: skip
    for row in evaluations:
        axes.annotate(f"{row['eval_perplexity']:.1f}", (row["step"], row["eval_loss"]), (0, -14),
                      textcoords="offset points", ha="center", color="tab:orange", weight="bold")  # fmt: skip
    axes.set(xlabel="optimizer updates", ylabel="loss (nats per token)", title=title)
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise StateError(f"{path} cannot be written ({error}); the adapter is saved.") from None


def peak_memory(device: torch.device) -> float:
    """The most memory this process has used so far, in MiB: of the GPU, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@torch.no_grad()
def logits_of_first(model: nn.Module, examples: Store) -> Tensor:
    """Logits of the first example, in float32 and evaluation mode, shape (1, tokens, vocabulary)."""
    device = next(model.parameters()).device
    ids = torch.tensor(examples.rows([0])[0].input_ids, dtype=torch.int64, device=device)[None]
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def check_adapter(trained: Tensor, base: nn.Module, directory: Path, examples: Store, quantized: str | None) -> str:
    """Compare the saved adapter, reloaded into its base and then merged, with the model that was trained.

    Args:
        trained: `logits_of_first` of the trained model, for these examples.
        base: without adapters, on the same device, such as `AdaptedModel.unload` gives; it is changed.
        directory: holds the adapter.
        quantized: how the base is quantized, if it is.

    Returns the differences found; raises StateError if one is larger than rounding explains.
    """
    largest, lines = trained.abs().max().item(), []
    rounded = quantized == "int8" or float_dtype(base) != torch.float32
    loaded = load_adapter(base, directory)
    model: nn.Module = loaded
    for name, tolerance in TOLERANCES.items():
        if name == "merged":
            model = loaded.merge_and_unload(untie=True, dequantize=quantized is not None)
            tolerance = ROUNDED if rounded else tolerance
        difference = (logits_of_first(model, examples) - trained).abs().max().item()
        lines.append(
            f"{name} against trained model: logits differ by {difference:.1e}; allowed {tolerance * largest:.1e}"
        )
        if not difference <= tolerance * largest:
            raise StateError(f"the {name} adapter is not the one that was trained; please report this. {lines[-1]}.")
    return "\n".join(lines)

r"""Train a sweep of LoRA adapters in one batch: every rank with every learning rate, on one base held once.

    python examples/train_many.py                                   # six adapters on the embedded GPT-2; needs no network
    python examples/train_many.py --ranks 2 8 32 --learning_rates 1e-3 1e-2 --steps 200

All adapters see the same texts. Each has its own optimizer, schedule, clipped gradient and loss, so each learns what it would
have learned alone. It leaves in --output_dir an adapter for each setting, which `minipeft.load_adapter` and PEFT read,
and loss_curves.png.
"""

import argparse
import gzip
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import minipeft
from minipeft import AdaptedModel, LoraConfig, per_adapter_loss

ASSETS = Path(__file__).resolve().parent / "assets"
TARGETS = ["c_attn", "c_proj", "c_fc"]  # so small a model needs more than its attention to learn another language
EVALUATED = 16  # blocks of text


def blocks(part: str, tokenizer, length: int) -> Tensor:
    """The tokens of an embedded text, cut into rows of this length."""
    text = gzip.decompress((ASSETS / "corpus" / f"{part}.txt.gz").read_bytes()).decode("utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def batches(rows: Tensor, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Random rows, as many as asked for in each step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield rows[torch.randint(len(rows), (size,), generator=generator)]


def name_of(rank: int, rate: float) -> str:
    """Such as r4_lr1e-03, and r4_lr12e-04 for 1.2e-03, since the name of an adapter has no dot."""
    _, digits, exponent = Decimal(repr(rate)).normalize().as_tuple()
    return f"r{rank}_lr{''.join(map(str, digits))}e{exponent:+03d}".replace("+", "")


def adapted(ranks: Sequence[int], rates: Sequence[float]) -> tuple[AdaptedModel, dict[str, float]]:
    """The model with an adapter for each setting, and the learning rate of each by its name."""
    model, settings = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny"), {}
    for rank in dict.fromkeys(ranks):
        for rate in dict.fromkeys(rates):
            name, config = name_of(rank, rate), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
            torch.manual_seed(0)
            if settings:
                model.add_adapter(name, config)
            else:
                minipeft.get_lora_model(model, config, name)
            settings[name] = rate
    model.train_adapters(list(settings))
    return model, settings


def losses(model: AdaptedModel, ids: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The loss of every adapter on the same rows, from one pass over the base."""
    each = [name for name in names for _ in ids]
    together = ids.repeat(len(names), 1)
    return per_adapter_loss(model(together, adapter_names=each).logits, together, each)


@torch.no_grad()
def evaluate(model: AdaptedModel, rows: Tensor, names: Sequence[str]) -> dict[str, float]:
    """The mean loss of every adapter over these rows."""
    model.eval()
    found = [losses(model, some, names) for some in rows.split(2)]
    model.train()
    return {name: sum(some[name].item() for some in found) / len(found) for name in names}


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """A curve for each adapter, smoothed over a twentieth of the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        window = max(1, len(values) // 20)
        means = [sum(values[end - window : end]) / window for end in range(window, len(values) + 1)]
        axes.plot(range(window, len(values) + 1), means, label=name)
    axes.set(
        xlabel="optimizer steps", ylabel="loss (nats per token)", title=f"{len(curves)} adapters trained in one batch"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def number(kind: Callable[[str], float], above: int = 0) -> Callable[[str], float]:
    """The type of a flag for numbers of this kind that torch's sizes, seeds and optimizers take."""

    def parsed(text: str) -> float:
        value = kind(text)
        if not above < value < 2**31:
            raise argparse.ArgumentTypeError(f"{text} is not above {above} and below {2**31}")
        return value

    parsed.__name__ = "number"  # argparse says "invalid number value"
    return parsed


def flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, rate = number(int), number(float)
    parser.add_argument("--ranks", type=count, nargs="+", default=[4, 16])
    parser.add_argument("--learning_rates", type=rate, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--steps", type=count, default=60, help="optimizer steps of each adapter")
    parser.add_argument("--rows", type=count, default=2, help="rows that each adapter sees in a step")
    parser.add_argument("--length", type=count, default=64, help="tokens of a row")
    parser.add_argument("--seed", type=number(int, -1), default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("train_many_output"))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        parser.error("all adapters train in one process here: start it by python, not by accelerate launch")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """Train, save and draw; returns the loss of each adapter on other texts, before and after."""
    args = flags(argv)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    model, settings = adapted(args.ranks, args.learning_rates)
    if not 2 <= args.length <= model.config.n_positions:
        raise minipeft.ConfigError(f"--length must be from 2 to {model.config.n_positions}, not {args.length}.")
    args.output_dir.mkdir(parents=True, exist_ok=True)  # if it cannot be, say so before the training
    names = list(settings)
    training, other = (blocks(part, tokenizer, args.length) for part in ("code-train", "code-eval"))
    parameters = {name: model.adapter_parameters(name) for name in names}
    optimizers = {name: torch.optim.AdamW(parameters[name], lr=rate) for name, rate in settings.items()}
    schedules = [get_scheduler("linear", optimizers[name], args.steps // 20, args.steps) for name in names]

    before, start = evaluate(model, other[:EVALUATED], names), time.perf_counter()
    curves: dict[str, list[float]] = {name: [] for name in names}
    for ids in batches(training, args.rows, args.steps, args.seed):
        found = losses(model, ids, names)
        sum(found.values()).backward()
        for name, optimizer in optimizers.items():
            torch.nn.utils.clip_grad_norm_(parameters[name], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curves[name].append(found[name].item())
        for schedule in schedules:
            schedule.step()
    seconds, after = time.perf_counter() - start, evaluate(model, other[:EVALUATED], names)

    model.save_pretrained(args.output_dir, selected_adapters=names)
    draw(curves, args.output_dir / "loss_curves.png")
    print(f"{len(names)} adapters, {args.steps} steps of {args.rows} x {args.length} tokens each: {seconds:.1f} s")
    for name in sorted(names, key=after.__getitem__):
        print(f"{name:>16}: loss on other code {before[name]:.3f} -> {after[name]:.3f}")
    return before, after


if __name__ == "__main__":
    try:
        main()
    except (minipeft.MinipeftError, OSError) as error:
        print(f"train_many: {error}", file=sys.stderr)
        sys.exit(2)

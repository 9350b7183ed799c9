r"""Sweep learning rate x rank x alpha x targets x seeds, and see how far `minipeft suggest` is from the best.

    python examples/sweep.py                                        # on the embedded GPT-2; needs no network
    python examples/sweep.py --ranks 8 32 --rates 1e-4 3e-4 1e-3 --model my-model --text mine.txt --other_text held-out.txt

Adapters that share their targets train in one batch, each with its own loss, clipped gradient and optimizer, so each learns
what it would have learned alone. Finished batches go into --output_dir/cells.jsonl: a run that was killed continues there.
Full fine-tuning and the other methods are swept over the learning rates, too. In the end there are a table, sweep.png and
how far the suggested setting is from the best one.
"""

import argparse
import functools
import gzip
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sweep_report import FULL, report
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, get_scheduler
from transformers.utils import logging

import minipeft
from minipeft import per_adapter_loss
from minipeft.files.tokenizer import load_tokenizer

ASSETS = Path(__file__).resolve().parent / "assets"
METHODS: dict[str, Callable[..., minipeft.AdapterConfig]] = {
    "lora": lambda r, **more: minipeft.LoraConfig(r=r, **more),
    "dora": lambda r, **more: minipeft.LoraConfig(r=r, use_dora=True, **more),
    "adalora": lambda r, **more: minipeft.AdaLoraConfig(init_r=r + r // 2, target_r=r, **more),
    "loha": lambda r, lora_alpha, **more: minipeft.LoHaConfig(r=r, alpha=lora_alpha, **more),
    "lokr": lambda r, lora_alpha, **more: minipeft.LoKrConfig(r=r, alpha=lora_alpha, **more),
    "oft": lambda r, lora_alpha, **more: minipeft.OFTConfig(oft_block_size=2 * r, **more),
    "vera": lambda r, lora_alpha, **more: minipeft.VeraConfig(r=16 * r, **more),
    "ia3": lambda r, lora_alpha, **more: minipeft.IA3Config(**more),
}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    method: str
    rate: float
    rank: int
    alpha: float
    targets: str
    seed: int


def grid(args: argparse.Namespace, suggested: Cell) -> list[list[Cell]]:
    """All cells in the batches in which they train; the same for the same flags, so that a run can continue."""
    settings = itertools.product(args.rates, args.ranks, args.alphas, args.targets)
    cells = [replace(suggested, rate=lr, rank=r, alpha=alpha, targets=names) for lr, r, alpha, names in settings]
    cells += [replace(suggested, method=method, rate=rate) for method in args.methods for rate in args.method_rates]
    cells += [replace(suggested, method=FULL, rate=rate, rank=0, alpha=0, targets="") for rate in args.full_rates]
    seeded = [replace(cell, seed=seed) for cell in dict.fromkeys([*cells, suggested]) for seed in range(args.seeds)]
    groups: dict[Any, list[Cell]] = {}
    for cell in seeded:
        groups.setdefault(cell if cell.method == FULL else (cell.method, cell.targets), []).append(cell)
    return [group[at : at + args.together] for group in groups.values() for at in range(0, len(group), args.together)]


class Training:
    """Texts, and how every cell is trained."""

    def __init__(self, args: argparse.Namespace, batch: int):
        self.model, self.batch = args.model, batch
        self.tokenizer = load_tokenizer(args.model)
        self.rows = self._rows(args.text, args.length)[: args.rows]
        self.other = self._rows(args.other_text, args.length)[: args.other_rows]
        self.steps = max(1, args.epochs * len(self.rows) // batch)

    def _rows(self, path: Path, length: int) -> Tensor:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        ids = torch.tensor(self.tokenizer(text)["input_ids"])
        if len(ids) < length:
            raise minipeft.DataError(f"{path} has {len(ids)} tokens, fewer than one row of {length}.")
        return ids[: len(ids) // length * length].view(-1, length)

    def base(self) -> nn.Module:
        """Without dropout, so that a cell depends on its own seed and nothing else."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    def order(self, seed: int) -> Iterator[Tensor]:
        """The batches of a seed: every row once an epoch, in random order."""
        generator, per_epoch = torch.Generator().manual_seed(seed), len(self.rows) // self.batch
        for step in range(self.steps):
            if step % per_epoch == 0:
                order = torch.randperm(len(self.rows), generator=generator)
            at = step % per_epoch * self.batch
            yield self.rows[order[at : at + self.batch]]

    def config(self, cell: Cell) -> minipeft.AdapterConfig:
        options: dict[str, Any] = {"lora_alpha": cell.alpha, "target_modules": named(cell.targets)}
        if cell.method == "adalora":  # its ranks go down in the middle of the run
            options |= {"total_step": self.steps, "tinit": self.steps // 10, "tfinal": self.steps // 3}
        return METHODS[cell.method](r=cell.rank, **options)

    def run(self, cells: Sequence[Cell], tick: Callable[[], object]) -> list[dict[str, Any]]:
        """Train these cells in one batch; a record for each."""
        model, names = self.base(), [str(place) for place in range(len(cells))]
        for name, cell in zip(names, cells, strict=True):
            torch.manual_seed(cell.seed)
            if cell.method != FULL:
                config = self.config(cell)
                if name == names[0]:
                    minipeft.get_adapter_model(model, config, name)
                else:
                    model.add_adapter(name, config)
        is_full = cells[0].method == FULL
        if not is_full:
            model.train_adapters(names)
        parameters = [list(model.parameters()) if is_full else model.adapter_parameters(name) for name in names]
        groups = [{"params": own, "lr": cell.rate} for own, cell in zip(parameters, cells, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        schedule = get_scheduler("linear", optimizer, max(1, self.steps // 20), self.steps)
        for step, rows in enumerate(zip(*(self.order(cell.seed) for cell in cells), strict=True)):
            loss = sum(losses(model, rows, names, is_full))
            (loss if is_full else loss + minipeft.extra_loss(model)).backward()
            for own in parameters:
                nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            if not is_full:
                minipeft.after_step(model, step)
            optimizer.zero_grad()
            schedule.step()
            tick()
        found = self.evaluate(model.eval(), names, is_full)
        sizes = [sum(parameter.nbytes for parameter in own) for own in parameters]
        return [
            {**asdict(cell), "loss": loss, "bytes": size} for cell, loss, size in zip(cells, found, sizes, strict=True)
        ]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, names: Sequence[str], is_full: bool) -> list[float]:
        parts = self.other.split(self.batch)
        sums = torch.zeros(len(names), dtype=torch.float64)
        for part in parts:
            sums += torch.stack(losses(model, [part] * len(names), names, is_full)).double() * len(part)
        return (sums / len(self.other)).tolist()


def named(targets: str) -> str | list[str]:
    return targets if targets == "all-linear" else targets.split("+")


def losses(model: nn.Module, rows: Sequence[Tensor], names: Sequence[str], is_full: bool) -> list[Tensor]:
    """The loss of each cell on its own rows, from one pass over the base."""
    if is_full:
        return [model(rows[0], labels=rows[0]).loss]
    together = torch.cat(list(rows))
    each = [name for name, own in zip(names, rows, strict=True) for _ in own]
    return list(per_adapter_loss(model(together, adapter_names=each).logits, together, each).values())


class Records:
    """cells.jsonl: the settings in its first line, then a line for each finished cell. It is replaced as a whole."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.lines, self.done = path, [settings], {}
        if path.exists():
            try:
                self.lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
                other = self.lines[0] != settings
                self.done = self._by_cell(() if other else self.lines[1:])
            except (ValueError, LookupError, TypeError) as error:
                raise minipeft.DataError(
                    f"{path} is damaged ({error}); choose another --output_dir, or delete it."
                ) from None
            if other:
                raise minipeft.DataError(
                    f"{path} is of a sweep with other settings; choose another --output_dir, or delete it."
                )

    @staticmethod
    def _by_cell(records: Sequence[dict[str, Any]]) -> dict[Cell, dict[str, Any]]:
        return {Cell(**{name: line[name] for name in Cell.__annotations__}): line for line in records}

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        self.lines += records
        self.done |= self._by_cell(records)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in self.lines), "utf-8")
        os.replace(new, self.path)


def flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(ASSETS / "tiny"), help="a causal language model: a folder, or a name on the Hub"
    )
    parser.add_argument("--text", type=Path, default=ASSETS / "corpus" / "code-train.txt.gz", help="to train on")
    parser.add_argument(
        "--other_text", type=Path, default=ASSETS / "corpus" / "code-eval.txt.gz", help="to evaluate on"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5e-3, 3e-3, 6e-3, 1.2e-2], help="of LoRA")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--alphas", type=float, nargs="+", default=[16, 32])
    parser.add_argument(
        "--targets", nargs="+", default=["all-linear", "c_attn"], help='names joined by "+", or all-linear'
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=[name for name in METHODS if name != "lora"],
        default=[name for name in METHODS if name != "lora"],
    )
    parser.add_argument(
        "--method_rates", type=float, nargs="+", default=[2e-3, 8e-3, 3.2e-2], help="of the other methods"
    )
    parser.add_argument("--full_rates", type=float, nargs="*", default=[3e-4, 1e-3, 3e-3], help="of full fine-tuning")
    parser.add_argument("--rows", type=int, default=208, help="rows of the text to train on")
    parser.add_argument("--other_rows", type=int, default=64, help="rows to evaluate on")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--together", type=int, default=15, help="cells in one batch")
    parser.add_argument("--output_dir", type=Path, default=Path("output/sweep"))
    parser.add_argument(
        "--write", type=Path, help="a Markdown page whose table of the sweep and figures/sweep.png are replaced"
    )
    args = parser.parse_args(argv)
    check_numbers(parser, args)
    return args


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("rates", "ranks", "alphas", "seeds", "method_rates", "full_rates", "other_rows", "together"):
        given = getattr(args, name)
        wrong = [value for value in (given if isinstance(given, list) else [given]) if not 0 < value < math.inf]
        if wrong:
            parser.error(f"argument --{name}: {wrong[0]} is not above 0")


def main(argv: Sequence[str] | None = None) -> float:
    """Train what is not done, and report; returns how much worse the suggested setting is than the best, as a share."""
    args = flags(argv)
    found = minipeft.suggest(args.model, tokens=args.rows * args.length * args.epochs, length=args.length)
    suggested = Cell("lora", found["learning_rate"], found["r"], float(found["lora_alpha"]), found["target_modules"], 0)
    training, groups = Training(args, found["batch_size"]), grid(args, suggested)
    settings = {
        name: str(getattr(args, name))
        for name in ("model", "text", "other_text", "rows", "other_rows", "length", "epochs", "together")
    }
    settings["batch"] = str(training.batch)
    records = Records(args.output_dir / "cells.jsonl", settings)
    todo = [group for group in groups if not all(cell in records.done for cell in group)]
    total = sum(map(len, groups))
    with tqdm(
        total=total * training.steps, desc=f"{total} cells", initial=(total - sum(map(len, todo))) * training.steps
    ) as bar:
        for group in todo:
            records.add(training.run(group, functools.partial(bar.update, len(group))))
    chosen = [records.done[cell] for group in groups for cell in group]
    return report(chosen, asdict(suggested), args.output_dir, args.write)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        main()
    except (minipeft.MinipeftError, OSError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        sys.exit(2)

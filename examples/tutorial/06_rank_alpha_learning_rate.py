"""Rank, alpha and the learning rate: one plot, and why the variants tie once each has its own learning rate.

    python examples/tutorial/06_rank_alpha_learning_rate.py

48 runs of the embedded GPT-2, trained at the same time as 48 adapters on one base: six settings, four learning rates, two
seeds. Each adapter sees the rows of its seed, and has its own loss, clipped gradient and learning rate.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from material import TARGETS, batches, blocks, check, figure, options, save, tiny_model
from torch import Tensor, nn

from minipeft import LoraConfig, get_lora_model, per_adapter_loss

SETTINGS = {  # of the configuration, and how much faster B learns than A
    "r = 8, alpha = 8": ({"r": 8, "lora_alpha": 8}, 1),
    "r = 8, alpha = 32": ({"r": 8, "lora_alpha": 32}, 1),
    "r = 8, alpha / sqrt(r)": ({"r": 8, "lora_alpha": 8, "use_rslora": True}, 1),
    "r = 8, LoRA+": ({"r": 8, "lora_alpha": 8}, 16),
    "r = 2, alpha = 8": ({"r": 2, "lora_alpha": 8}, 1),
    "r = 32, alpha = 8": ({"r": 32, "lora_alpha": 8}, 1),
}
TIED = [name for name in SETTINGS if name.startswith("r = 8")]


@dataclass(frozen=True)
class Run:
    """One of the runs; its adapter has its `name`."""

    setting: str
    rate: float
    seed: int
    name: str


def adapted(runs: Sequence[Run]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model with an adapter for each run, and the optimizer of all of them."""
    model, groups = tiny_model(), []  # from_pretrained switches dropout off, so a run depends on its seed alone
    for place, run in enumerate(runs):
        config = LoraConfig(**SETTINGS[run.setting][0], target_modules=TARGETS)
        torch.manual_seed(run.seed)
        if place == 0:
            get_lora_model(model, config, run.name)
        else:
            model.add_adapter(run.name, config)
    model.train_adapters([run.name for run in runs])
    for run in runs:
        ratio, own = SETTINGS[run.setting][1], {id(parameter) for parameter in model.adapter_parameters(run.name)}
        for name, parameter in model.named_parameters():
            if id(parameter) in own:
                groups.append({"params": [parameter], "lr": run.rate * (ratio if "lora_B" in name else 1)})
    return model, torch.optim.AdamW(groups, weight_decay=0.0)


def losses(model: nn.Module, rows: Sequence[Tensor], runs: Sequence[Run]) -> dict[str, Tensor]:
    """The loss of each run on its own rows, from one pass over the base."""
    together = torch.cat(list(rows))
    each = [run.name for run, own in zip(runs, rows, strict=True) for _ in own]
    return per_adapter_loss(model(together, adapter_names=each).logits, together, each)


def trained(runs: Sequence[Run], steps: int, other: Tensor) -> dict[Run, float]:
    """The loss of each run on other code, after training."""
    model, optimizer = adapted(runs)
    parameters = [model.adapter_parameters(run.name) for run in runs]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 4) * (1 - step / steps))
    rows = blocks("code-train", 64)
    for some in zip(*(batches(rows, 2, steps, run.seed) for run in runs), strict=True):
        sum(losses(model, some, runs).values()).backward()
        for own in parameters:
            nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        parts = [losses(model, [part] * len(runs), runs) for part in other.split(2)]
    return {run: mean(part[run.name].item() for part in parts) for run in runs}


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    rates, seeds, steps, other = ([3e-3, 3e-2], 2, 2, 2) if args.quick else ([1e-3, 3e-3, 1e-2, 3e-2], 2, 40, 24)
    product = itertools.product(SETTINGS, rates, range(seeds))
    runs = [Run(setting, rate, seed, f"run{place}") for place, (setting, rate, seed) in enumerate(product)]
    found = trained(runs, steps, blocks("code-eval", 64)[:other])

    curves: dict[str, dict[float, list[float]]] = {name: {rate: [] for rate in rates} for name in SETTINGS}
    for run, loss in found.items():
        curves[run.setting][run.rate].append(loss)
    print(f"{len(runs)} runs of {steps} steps in one batch; loss on other code, mean of two seeds")
    print(f"{'learning rate':>24}" + "".join(f"{rate:>9g}" for rate in rates) + f"{'best':>9}{'seeds':>14}")
    best, spread = {}, {}
    for name, curve in curves.items():
        means = {rate: mean(each) for rate, each in curve.items()}
        rate = min(means, key=means.__getitem__)
        best[name], spread[name] = means[rate], max(curve[rate]) - min(curve[rate])
        print(
            f"{name:>24}"
            + "".join(f"{each:>9.3f}" for each in means.values())
            + f"{best[name]:>9.3f}{min(curve[rate]):>8.3f}-{max(curve[rate]):.3f}"
        )
    at_one = [mean(curves[name][rates[0]]) for name in TIED]
    apart, tied = max(at_one) - min(at_one), max(best[name] for name in TIED) - min(best[name] for name in TIED)
    print(
        f"four variants at r = 8: {apart:.3f} apart at a learning rate of {rates[0]:g}, {tied:.3f} apart each at its best"
    )
    check("at one learning rate the variants look different", apart > tied)
    if not args.quick:  # two steps teach nothing
        check(
            f"each at its best, they tie within the spread over seeds, {max(spread.values()):.3f}",
            tied <= max(spread.values()),
        )

    drawn, axes = figure(2)
    for name, curve in curves.items():
        for plot in [axes[0]] * (name in TIED) + [axes[1]] * (name not in TIED or name == TIED[0]):
            [line] = plot.plot(rates, [mean(each) for each in curve.values()], "o-", markersize=3, label=name)
            low, high = [min(each) for each in curve.values()], [max(each) for each in curve.values()]
            plot.fill_between(rates, low, high, color=line.get_color(), alpha=0.15)
    axes[0].set(title="Four variants of one rank", ylabel="loss on other code")
    axes[1].set(title="Three ranks")
    for plot in axes:
        plot.set(xscale="log", xlabel="learning rate")
        plot.set_ylim(top=1.3 * min(best.values()))
        plot.legend(fontsize="small")
    save(drawn, args, __file__)


if __name__ == "__main__":
    main()

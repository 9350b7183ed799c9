"""Train, and read the curve: what a good run looks like, one that learns too little, and one that learns by heart.

    python examples/tutorial/05_train_and_read_the_curve.py

Each run is the embedded GPT-2 with LoRA, learning to write code. What it has learnt is measured on other code. Then two
runs at a learning rate that is too high, with and without warm-up and clipping.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from material import TARGETS, blocks, check, evaluate, figure, options, save, smooth, tiny_model, train

from minipeft import LoraConfig, get_lora_model

LENGTH = 64
FEW = 16  # rows that can be learnt by heart


@dataclass
class Run:
    """One run: its settings, and the curves that it drew."""

    name: str
    lr: float
    rows: int | None = None  # of the text; all, if not given
    more: dict = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    others: dict[int, float] = field(default_factory=dict)  # loss on other code, after so many steps


def trained(run: Run, steps: int, size: int, looks: int, other: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = get_lora_model(tiny_model(), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))

    def look(step: int, norm: float) -> None:
        run.norms.append(norm)
        if step % (steps // looks) == 0:
            run.others[step] = evaluate(model, other)

    run.others[0] = evaluate(model, other)
    rows = blocks("code-train", LENGTH)[: run.rows]
    run.losses = train(model, rows, steps=steps, lr=run.lr, size=size, after_step=look, **run.more)


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    steps, size, looks, other = (
        (8, 2, 2, blocks("code-eval", LENGTH)[:4]) if args.quick else (160, 4, 8, blocks("code-eval", LENGTH)[:32])
    )
    good = Run("a good run", 4e-3)
    slow = Run("learning rate too low", 4e-5)
    heart = Run(f"only {FEW} rows of text", 4e-3, rows=FEW)
    bare = Run("no warm-up, no clipping", 5e-2, more={"warmup": 0, "clip": 1e9})
    safe = Run("warm-up and clipping", 5e-2, more={"warmup": steps // 5, "clip": 1.0})
    for run in (good, slow, heart, bare, safe):
        trained(run, steps, size, looks, other)

    window = steps // 8
    print(f"{'loss, in nats per token':>24}{'training':>10}{'other code':>12}{'lowest':>9}")
    for run in (good, slow, heart, bare, safe):
        last, lowest = run.others[max(run.others)], min(run.others.values())
        print(f"{run.name:>24}{smooth(run.losses, window)[-1]:>10.2f}{last:>12.2f}{lowest:>9.2f}")
    start = good.others[0]
    end = {run.name: run.others[max(run.others)] for run in (good, slow, heart, bare, safe)}
    check(f"the good run takes the loss on other code from {start:.2f} to {end[good.name]:.2f}", end[good.name] < start)
    check(
        "with a learning rate 100 times lower hardly anything is learnt",
        start - end[slow.name] < 0.25 * (start - end[good.name]),
    )
    gap = {run.name: run.others[max(run.others)] - smooth(run.losses, window)[-1] for run in (good, heart)}
    check(
        "learning by heart: its training loss is the lowest of all",
        smooth(heart.losses, window)[-1] < smooth(good.losses, window)[-1],
    )
    check("and its loss on other code is worse than the good run's", end[heart.name] > end[good.name])
    check(
        f"so the gap between the two is {gap[heart.name]:.1f} instead of {gap[good.name]:.1f}",
        gap[heart.name] > gap[good.name],
    )
    check(
        f"at ten times the learning rate the bare run's loss once was {max(bare.losses):.1f}, the safe run's {max(safe.losses):.1f}",
        max(bare.losses) > max(safe.losses),
    )

    drawn, axes = figure(3, width=3.8)
    for run in (good, slow, heart):
        axes[0].plot(range(1, steps + 1), smooth(run.losses, window), label=run.name)
        axes[1].plot(list(run.others), list(run.others.values()), "o-", markersize=3, label=run.name)
    axes[0].set(title="loss on the training text", xlabel="step", ylabel="nats per token")
    axes[1].set(title="loss on other code", xlabel="step")
    for run in (bare, safe):
        axes[2].plot(range(1, steps + 1), run.losses, linewidth=1, label=run.name)
    axes[2].set(title="learning rate 0.05", xlabel="step")
    for each in axes:
        each.legend(fontsize="small")
    save(drawn, args, __file__)


if __name__ == "__main__":
    main()

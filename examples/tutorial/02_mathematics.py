"""The mathematics: a change of a weight matrix, written as two thin matrices.

    python examples/tutorial/02_mathematics.py

What rank is, what the two factors save, what alpha does, why B starts at zero, and whether the change that real
fine-tuning makes is of low rank.
"""

from collections.abc import Sequence

import torch
from material import TARGETS, blocks, check, evaluate, figure, options, save, tiny_model, train
from torch import Tensor, nn

from minipeft import LoraConfig, get_lora_model

LAYER = "transformer.h.2.mlp.c_fc.weight"
RANKS = (1, 2, 4, 8, 16, 32)


def rank_and_numbers() -> None:
    """A product of (d, r) and (r, k) has rank r at most, whatever is in it."""
    d, k, r = 1024, 1024, 8
    B, A = torch.randn(d, r, dtype=torch.float64), torch.randn(r, k, dtype=torch.float64)
    full, thin = d * k, r * (d + k)
    print(f"W is {d} x {k}: {full:,} numbers; B and A at r = {r}: {thin:,}")
    check(
        f"B A is as large as W, and its rank is {r}", (B @ A).shape == (d, k) and torch.linalg.matrix_rank(B @ A) == r
    )
    check(f"r (d + k) = {r} x ({d} + {k}) = {thin:,}, {full // thin} times fewer", (full, thin) == (1_048_576, 16_384))


def adapted(r: int, lora_alpha: int) -> tuple[nn.Module, nn.Parameter, nn.Parameter]:
    """A model of one layer, and the factors of its adapter."""
    model = nn.Sequential(nn.Linear(64, 64))
    get_lora_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=["0"]))
    adapter = model[0].adapters["default"]
    return model, adapter.lora_A, adapter.lora_B


def change(model: nn.Module, x: Tensor) -> Tensor:
    """What the adapter adds to the output."""
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        return model(x) - base


def the_scale() -> None:
    """The update is (alpha / r) B A."""
    x, sizes = torch.randn(1000, 64), {}
    for r, alpha in ((8, 8), (8, 16), (16, 16), (64, 16)):
        torch.manual_seed(0)
        model, A, B = adapted(r, alpha)
        nn.init.normal_(A), nn.init.normal_(B)
        sizes[r, alpha] = change(model, x).std().item()
        print(
            f"r = {r:>2}, alpha = {alpha:>2}: alpha / r = {alpha / r:>5.2f}, random factors change by {sizes[r, alpha]:.1f}"
        )
    check("twice the alpha makes twice the change", abs(sizes[8, 16] / sizes[8, 8] - 2) < 1e-3)


def the_start() -> None:
    """B = 0: nothing is changed, yet B can learn at once, and A from the second step on."""
    (model, A, B), x = adapted(8, 16), torch.randn(100, 64)
    check("with B = 0 the first output is the base's, bit for bit", not change(model, x).any())

    def gradients() -> tuple[float, float]:
        model.zero_grad()
        (model(x) - 1).square().mean().backward()
        return A.grad.norm().item(), B.grad.norm().item()

    first = gradients()
    check(f"the first gradient of A is zero, that of B is {first[1]:.3f}", first[0] == 0 < first[1])
    with torch.no_grad():
        B -= 0.1 * B.grad
    second = gradients()
    check(f"one step later A learns, too: its gradient is {second[0]:.4f}", second[0] > 0)
    nn.init.zeros_(A), nn.init.zeros_(B)
    check("with A = B = 0 both gradients are zero, now and for ever", gradients() == (0, 0))


def energy(matrix: Tensor) -> Tensor:
    """The share of the squared norm that lies in the largest 1, 2, 3, ... singular directions."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    return squares.cumsum(0) / squares.sum()


def cut(matrix: Tensor, r: int) -> Tensor:
    """The nearest matrix of rank r."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def a_real_update(steps: int, rows: int) -> tuple[dict[str, Tensor], dict[int, float]]:
    """Fine-tune all weights on code. How many directions has the change, and how many of them are what was learnt?"""
    model, other = tiny_model(), blocks("code-eval", 64)[:rows]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, blocks("code-train", 64), steps=steps, lr=1e-3)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    updates = {
        name: after[name] - before[name]
        for name in after
        if name.endswith(tuple(f"{target}.weight" for target in TARGETS))
    }

    losses = {}
    for r in (0, *RANKS, 128):
        model.load_state_dict({**before, **{name: before[name] + cut(update, r) for name, update in updates.items()}})
        losses[r] = evaluate(model, other)
    kept = {r: 100 * (losses[0] - losses[r]) / (losses[0] - losses[128]) for r in RANKS}
    update = updates[LAYER]
    shares = {"the update": update, "the weight": before[LAYER], "random numbers": torch.randn(update.shape)}
    return {name: energy(matrix) for name, matrix in shares.items()}, kept


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    torch.manual_seed(0)
    rank_and_numbers()
    the_scale()
    the_start()
    shares, kept = a_real_update(*((4, 4) if args.quick else (120, 64)))
    for name, each in shares.items():
        print(f"{LAYER}, {name:>14}: {100 * each[7]:>3.0f} % of the squared norm in 8 of 128 directions")
    for r, percent in kept.items():
        print(f"all updates cut to rank {r:>2}: {percent:>3.0f} % of what was learnt is kept")
    update, noise = shares["the update"][7], shares["random numbers"][7]
    check("the update lies in fewer directions than random numbers do", bool(update > 1.5 * noise))
    if not args.quick:  # four steps teach too little
        check("8 of 128 directions keep more than two thirds of what was learnt", kept[8] > 67)

    drawn, axes = figure(2)
    for name, each in shares.items():
        axes[0].plot(range(1, len(each) + 1), 100 * each, label=name)
    axes[0].set(
        xlabel="singular directions, the largest first",
        ylabel="% of the squared norm",
        title="Directions of one matrix",
    )
    axes[0].legend(fontsize="small")
    axes[1].plot(list(kept), list(kept.values()), "o-")
    axes[1].set(
        xlabel="rank to which all updates are cut",
        ylabel="% of the gain in loss",
        title="What a cut update still knows",
        xscale="log",
        ylim=(0, 102),
    )
    axes[1].set_xticks(RANKS, map(str, RANKS))
    save(drawn, args, __file__)


if __name__ == "__main__":
    main()

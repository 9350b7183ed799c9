"""The layer from scratch: forty lines that do what the library does.

    python examples/tutorial/03_layer_from_scratch.py

The layer is in my_lora.py, next to this file. Read it first. Here it is given the library's factors, and compared with it:
outputs, gradients, thirty steps of training, and the merged weight.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from material import check, figure, options, save
from my_lora import LoRA
from torch import Tensor, nn

from minipeft import LoraConfig, get_lora_model

R, ALPHA, IN, OUT = 4, 16, 32, 48


def pair() -> tuple[LoRA, nn.Module, nn.Module]:
    """Our layer and the library's model around the same base, with the same A; and the library's adapter."""
    base = nn.Linear(IN, OUT)
    ours = LoRA(copy.deepcopy(base), R, ALPHA)
    library = get_lora_model(nn.Sequential(base), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"]))
    adapter = library[0].adapters["default"]
    with torch.no_grad():
        ours.A.copy_(adapter.lora_A)
    return ours, library, adapter


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def furthest(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # so that equal means equal
    try:
        compare(args)
    finally:
        torch.set_default_dtype(torch.float32)


def compare(args) -> None:
    lines = (Path(__file__).parent / "my_lora.py").read_text("utf-8").splitlines()
    check(f"the layer and the function that puts it in are {len(lines)} lines", len(lines) <= 40)
    ours, library, adapter = pair()
    x, y = torch.randn(64, IN), torch.randn(64, OUT)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, library)]
    check(
        f"both train {counts[0]} of {OUT * IN + OUT + counts[0]} numbers: r (in + out)", counts == [R * (IN + OUT)] * 2
    )
    check("both begin as the base layer", torch.equal(ours(x), ours.base(x)) and torch.equal(library(x), ours.base(x)))

    with torch.no_grad():
        ours.B.normal_()
        adapter.lora_B.copy_(ours.B)
    check("the outputs are equal", furthest(ours(x), library(x)) < 1e-12)
    for model in (ours, library):
        (model(x) - y).square().mean().backward()
    check("the gradients of A are equal", furthest(ours.A.grad, adapter.lora_A.grad) < 1e-12)
    check("the gradients of B are equal", furthest(ours.B.grad, adapter.lora_B.grad) < 1e-12)
    check("no base weight has a gradient", all(p.grad is None for p in ours.base.parameters()))

    ours_curve, library_curve = fit(ours, x, y, 30), fit(library, x, y, 30)
    print(
        f"loss after 30 steps: ours {ours_curve[-1]:.6f}, the library's {library_curve[-1]:.6f}, at first {ours_curve[0]:.6f}"
    )
    check(
        "thirty steps of training are equal",
        max(abs(a - b) for a, b in zip(ours_curve, library_curve, strict=True)) < 1e-9,
    )
    before = ours(x).detach()
    merged, library = ours.merge(), library.merge_and_unload()
    check("the merged layers are plain Linear layers again", type(merged) is type(library[0]) is nn.Linear)
    check("their weights are equal", furthest(merged.weight, library[0].weight) < 1e-10)
    check("and they compute what the adapted layer did", furthest(merged(x), before) < 1e-10)

    drawn, [axes] = figure()
    axes.plot(library_curve, linewidth=5, alpha=0.35, label="the library")
    axes.plot(ours_curve, "k", linewidth=1, label="the forty lines")
    axes.set(xlabel="step", ylabel="loss", title="The same layer, trained twice")
    axes.legend()
    save(drawn, args, __file__)


if __name__ == "__main__":
    main()

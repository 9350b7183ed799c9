"""QLoRA: the frozen base in four bits, the adapter in full precision.

    python examples/tutorial/10_qlora.py

First NF4 by hand: blocks of 64 weights, each stored as one of 16 levels times the block's largest value. Then the embedded
model is quantized and adapted, and trained next to the same adapter on the float base. Takes bitsandbytes.
"""

from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch
from material import TARGETS, blocks, check, evaluate, figure, options, save, smooth, tiny_model, train
from torch import Tensor

from minipeft import LoraConfig, dequantize, get_lora_model, load_adapter, quantize

BLOCK = 64
CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)


def to_levels(weight: Tensor, levels: Tensor) -> Tensor:
    """What a weight becomes: in each block of 64, the nearest level times the block's largest absolute value."""
    rows = weight.reshape(-1, BLOCK)
    largest = rows.abs().amax(1, keepdim=True)
    nearest = (rows[..., None] / largest[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * largest).reshape(weight.shape)


def normal_levels() -> Tensor:
    """Sixteen levels between -1 and 1, as dense as a normal distribution: 8 negative ones, zero, 7 positive ones."""
    # QLoRA (Dettmers et al., 2023), appendix E: quantiles at equal steps, the outermost one chosen so that none is infinite.
    offset = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([positive, torch.zeros(1), negative]).sort().values
    return levels / levels.abs().max()


def layer_bytes(model) -> int:
    """Bytes of the adapted layers' weights, with the scales of quantized ones."""
    total = 0
    for name, module in model.named_modules():
        if name.endswith(tuple(TARGETS)) and ".h." in name:
            total += module.weight.nbytes
            state = getattr(module.weight, "quant_state", None)
            total += state.absmax.nbytes if state is not None else 0
    return total


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    steps, size = (5, 2) if args.quick else (100, 8)
    train_text = "code-eval" if args.quick else "code-train"
    rows, unseen = blocks(train_text, 64), blocks("code-eval", 64)[: 4 if args.quick else 48]

    weight = tiny_model().transformer.h[0].mlp.c_fc.weight.detach().T.contiguous()  # Conv1D stores (in, out)
    by_hand, levels = to_levels(weight, normal_levels()), normal_levels()
    even = to_levels(weight, torch.linspace(-1, 1, 16))
    library = dequantize(quantize(tiny_model())).transformer.h[0].mlp.c_fc.weight.detach()
    library = library if library.shape == weight.shape else library.T
    norm = weight.norm()
    error, error_even = (by_hand - weight).norm() / norm, (even - weight).norm() / norm
    difference = (library - by_hand).norm() / norm
    print("the levels:", " ".join(f"{level:.3f}" for level in levels))
    check(f"by hand and by the library the weight is the same up to {difference:.1%}", difference < 0.01)
    check(
        f"rounding to them moves it by {error:.1%} of its norm; to 16 even levels, by {error_even:.1%}",
        error < error_even,
    )

    floats, small = tiny_model(), quantize(tiny_model())
    sizes = layer_bytes(floats), layer_bytes(small)
    check(
        f"the layers take {sizes[1]:,} bytes instead of {sizes[0]:,}: {sizes[0] / sizes[1]:.1f} times less",
        sizes[0] > 7 * sizes[1],
    )
    before = evaluate(floats, unseen), evaluate(small, unseen)
    print(f"evaluation loss: float base {before[0]:.3f}, NF4 base {before[1]:.3f}")

    curves, after = {}, []
    for name, model in (("LoRA on the float base", floats), ("QLoRA: LoRA on the NF4 base", small)):
        torch.manual_seed(0)  # the same A for both
        model = get_lora_model(model, CONFIG)
        curves[name] = train(model, rows, steps=steps, lr=3e-3, size=size)
        after.append(evaluate(model, unseen))
        print(f"{name}: evaluation loss {after[-1]:.3f}")
    check(
        "the quantized weights are frozen",
        not any(p.requires_grad for n, p in small.named_parameters() if "lora_" not in n),
    )
    gain = before[0] - after[0]
    check(f"LoRA gains {gain:.3f}", gain > 0)
    if not args.quick:
        check(f"QLoRA ends within {abs(after[1] - after[0]):.3f} of it", abs(after[1] - after[0]) < 0.1 * gain)
    with TemporaryDirectory() as folder, torch.no_grad():
        small.save_pretrained(folder)
        again = load_adapter(quantize(tiny_model()), folder)
        same = torch.equal(again.eval()(unseen[:2]).logits, small.eval()(unseen[:2]).logits)
    check("the adapter's file, loaded on a base quantized anew, gives the same logits", same)

    drawn, [histogram, curve] = figure(2)
    histogram.hist(
        (weight / weight.reshape(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK).view_as(weight)).flatten(),
        80,
        color="0.75",
    )
    for level in levels:
        histogram.axvline(level.item(), color="C3", linewidth=1)
    histogram.set(xlabel="weight / largest of its block", ylabel="weights", title="The 16 levels of NF4", yticks=[])
    for name, losses in curves.items():
        curve.plot(smooth(losses, 10), label=name)
    curve.set(xlabel="step", ylabel="training loss (nats per token)", title="Four bits, and it learns the same")
    curve.legend(fontsize="small")
    save(drawn, args, __file__)


if __name__ == "__main__":
    main()

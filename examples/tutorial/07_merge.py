"""Merging: the update goes into the weight, and the adapter costs nothing any more. What it costs is one rounding.

    python examples/tutorial/07_merge.py

An adapter is trained and merged: the same outputs, as many parameters as before, and back again bit for bit. Then it is
merged into weights of three precisions, at many strengths, and the report of each merge says what rounding cost.
"""

from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch
from material import TARGETS, blocks, check, evaluate, figure, options, save, tiny_model, train

from minipeft import LoraConfig, get_lora_model, load_adapter

STRENGTHS = [2.0**power for power in range(-8, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def trained(folder: str, rows: torch.Tensor, steps: int, size: int):
    torch.manual_seed(0)
    model = get_lora_model(tiny_model(), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    train(model, rows, steps=steps, lr=3e-3, size=size)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(ids).logits.float()


def loaded(folder: str, dtype: torch.dtype):
    """The base in a precision, with the adapter in float32 as it was trained."""
    # Its weights are rounded, so they are not quite those that the adapter was trained on.
    return load_adapter(tiny_model().to(dtype), folder, allow_base_mismatch=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    train_text = "code-eval" if args.quick else "code-train"
    rows, unseen = blocks(train_text, 64), blocks("code-eval", 64)[: 4 if args.quick else 64]
    strengths = STRENGTHS[::4] if args.quick else STRENGTHS
    ids = unseen[:1, :32]  # with many rows the library computes with the sum W + s B A anyway
    with TemporaryDirectory() as folder:
        model = trained(folder, rows, *((5, 2) if args.quick else (100, 8)))
        adapted, weight = logits(model, ids), model.transformer.h[0].attn.c_attn.base_layer.weight.clone()
        report = model.merge_adapter()
        print(f"float32: {report}")
        check(
            f"merged, the logits are the same up to {(logits(model, ids) - adapted).abs().max():.0e}",
            torch.allclose(logits(model, ids), adapted, atol=1e-3),
        )
        check("the weight has changed", not torch.equal(model.transformer.h[0].attn.c_attn.base_layer.weight, weight))
        model.unmerge_adapter()
        check("unmerged, the logits are what they were, bit for bit", torch.equal(logits(model, ids), adapted))
        plain, base = model.merge_and_unload(), tiny_model()
        check(
            "merge_and_unload leaves a model of the original class, with as many parameters",
            type(plain) is type(base) and plain.num_parameters() == base.num_parameters(),
        )

        errors: dict[torch.dtype, list[float]] = {dtype: [] for dtype in DTYPES}
        for dtype in DTYPES:
            model = loaded(folder, dtype)
            for strength in strengths:
                model.set_scale("default", strength)
                errors[dtype].append(model.merge_adapter().worst)
                model.unmerge_adapter()
            model.set_scale("default", 1.0)
            before = evaluate(model, unseen)
            report = model.merge_adapter()
            name = str(dtype).removeprefix("torch.")
            print(f"{name}: evaluation loss {before:.4f}, merged {evaluate(model, unseen):.4f}; {report}")

    at_one = strengths.index(1.0)
    worst = {dtype: errors[dtype][at_one] for dtype in DTYPES}
    check(
        f"bfloat16 loses {worst[torch.bfloat16]:.1%} of the update, float16 {worst[torch.float16]:.1%}",
        worst[torch.bfloat16] > 4 * worst[torch.float16] > 400 * worst[torch.float32],
    )
    check(
        f"at a {1 / strengths[0]:.0f}th of its size bfloat16 loses {errors[torch.bfloat16][0]:.0%} of it: "
        "the smaller the update, the larger the part that is lost",
        errors[torch.bfloat16] == sorted(errors[torch.bfloat16], reverse=True),
    )

    drawn, [axes] = figure()
    for dtype in DTYPES:
        axes.plot(strengths, errors[dtype], "o-", label=str(dtype).removeprefix("torch."))
    axes.axhline(1, color="0.4", linestyle=":")
    axes.text(strengths[-1], 1.15, "all of the update is lost", ha="right", color="0.4", va="bottom")
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="strength of the adapter (1: as trained)", ylabel="share of the update that is lost")
    axes.set_ylim(top=10)
    axes.set_title("What rounding costs when an adapter is merged")
    axes.legend(loc="lower left")
    save(drawn, args, __file__)


if __name__ == "__main__":
    main()

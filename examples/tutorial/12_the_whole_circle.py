"""The whole circle: train, look at the update, merge, and reload everywhere with the same logits.

    python examples/tutorial/12_the_whole_circle.py

The base knows Python's documentation; the adapter learns code. Then: how much has each layer moved, which tokens have
become likelier, and does every program that reads the adapter, or the merged model, compute the same?
"""

import importlib.util
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch
from material import TARGETS, blocks, check, evaluate, figure, options, save, tiny_model, tokenizer, train
from torch import Tensor
from transformers import AutoModelForCausalLM

from minipeft import LoraConfig, get_lora_model, load_adapter

TEXT = "def read(self, size=-1):\n    if self.closed:\n        raise ValueError('read of closed file')\n    return self.data[:size]\n"


@torch.no_grad()
def logits(model, ids: Tensor) -> Tensor:
    return model.eval()(ids).logits


def token_losses(model, ids: Tensor) -> Tensor:
    """The loss of each token but the first, in nats."""
    return torch.nn.functional.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:], reduction="none")


def updates(base, merged) -> dict[str, float]:
    """How far each layer has moved, as a share of its weight's norm."""
    pairs = zip(base.named_parameters(), merged.parameters(), strict=True)
    return {
        name.removeprefix("transformer.h.").removesuffix(".weight"): ((new - old).norm() / old.norm()).item()
        for (name, old), new in pairs
        if not torch.equal(old, new)
    }


def draw(args, moved: dict[str, float], words: list[str], change: Tensor) -> None:
    drawn, [layers, tokens] = figure(2, height=4.2)
    blocks_of = sorted({name.split(".")[0] for name in moved})
    kinds = list(dict.fromkeys(name.split(".", 1)[1] for name in moved))
    for place, kind in enumerate(kinds):
        at = [int(block) + 0.2 * (place - 1.5) for block in blocks_of]
        layers.bar(at, [moved[f"{block}.{kind}"] for block in blocks_of], 0.2, label=kind)
    layers.set(
        xlabel="block", ylabel="norm of the update / norm of the weight", title="By layer", xticks=range(len(blocks_of))
    )
    layers.set_ylim(top=1.35 * max(moved.values()))
    layers.legend(fontsize="small", ncols=2, loc="upper center")
    order = change.argsort()
    shown = torch.cat([order[:10], order[-5:]])
    labels = [repr(words[place])[1:-1].replace("$", r"\$").replace(" ", "\N{MIDDLE DOT}") for place in shown]
    tokens.barh(range(len(shown)), change[shown], color=["C2" if change[place] < 0 else "C3" for place in shown])
    tokens.set_yticks(range(len(shown)), labels, family="monospace", fontsize="small")
    tokens.invert_yaxis()
    tokens.set(xlabel="change of the loss (nats)", title="By token: most and least gain")
    save(drawn, args, __file__)


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    train_text = "code-eval" if args.quick else "code-train"
    rows, unseen = blocks(train_text, 64), blocks("code-eval", 64)[: 4 if args.quick else 48]
    steps, size = (8, 2) if args.quick else (120, 8)
    ids = tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    base = tiny_model()
    torch.manual_seed(0)
    model = get_lora_model(tiny_model(), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    train(model, rows, steps=steps, lr=3e-3, size=size)
    before, after = evaluate(base, unseen), evaluate(model, unseen)
    check(f"trained: the loss on code that it has not seen falls from {before:.3f} to {after:.3f}", after < before)

    adapted, change = logits(model, ids), token_losses(model, ids) - token_losses(base, ids)
    words = [tokenizer().decode([token]) for token in ids[0, 1:]]
    best = change.argmin()
    print(f"the text's loss changes by {change.mean():.3f} a token; most for {words[best]!r}: {change[best]:.2f}")

    with TemporaryDirectory() as adapter, TemporaryDirectory() as whole:
        model.save_pretrained(adapter)
        check(
            "reloaded by minipeft: the same logits, bit for bit",
            torch.equal(logits(load_adapter(tiny_model(), adapter), ids), adapted),
        )
        if importlib.util.find_spec("peft"):
            from peft import PeftModel

            theirs = logits(PeftModel.from_pretrained(tiny_model(), adapter), ids)
            check("reloaded by PEFT: the same logits", torch.allclose(theirs, adapted, atol=1e-4))
            plain = tiny_model()
            plain.load_adapter(adapter)
            check(
                "reloaded by transformers itself: the same logits",
                torch.allclose(logits(plain, ids), adapted, atol=1e-4),
            )
        else:
            print("PEFT is not installed, so it and transformers' load_adapter are left out")
        merged = model.merge_and_unload()
        moved = updates(base, merged)
        check("merged: the same logits", torch.allclose(logits(merged, ids), adapted, atol=1e-4))
        merged.save_pretrained(whole)
        again = AutoModelForCausalLM.from_pretrained(whole, local_files_only=True)
        check(
            "the merged model, reloaded by transformers: the same, bit for bit",
            torch.equal(logits(again, ids), logits(merged, ids)),
        )

    check(f"all {len(moved)} adapted layers have moved, and nothing else", len(moved) == 4 * base.config.n_layer)
    largest = max(moved, key=moved.__getitem__)
    print(
        f"the layers have moved by {min(moved.values()):.1%} to {moved[largest]:.1%} of their norm, most of all {largest}"
    )
    draw(args, moved, words, change)


if __name__ == "__main__":
    main()

"""It trains, and nothing happens: five broken runs, and the doctor's answer to each.

    python examples/tutorial/09_no_effect.py

None of these runs fails. Each goes through all of its steps and prints losses. `minipeft.diagnose` looks at the model, a
batch and the optimizer before the first step, and names what is wrong.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from material import TARGETS, batches, blocks, check, evaluate, figure, options, save, tiny_model, tokenizer
from torch import Tensor, nn

from minipeft import LoraConfig, diagnose, get_lora_model

CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
LENGTH, RATE = 64, 3e-3


class Run(NamedTuple):
    """A model, its optimizer, and how token ids become what the model is called with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Callable[[Tensor], dict[str, Tensor]]


def plain_batch(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids.clone()}


def shifted_batch(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}  # the model shifts them itself


def padded_batch(ids: Tensor) -> dict[str, Tensor]:
    """Texts of 8 tokens, padded."""
    mask = (torch.arange(ids.shape[1]) < 8).long().expand_as(ids)
    ids = torch.where(mask.bool(), ids, tokenizer().pad_token_id)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}  # -100 on the padding is missing


def run(lr: float = RATE, batch=plain_batch) -> Run:
    model = get_lora_model(tiny_model(), CONFIG)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Run(model, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0), batch)


def optimizer_first() -> Run:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)  # there are no adapters yet
    return Run(get_lora_model(model, CONFIG), optimizer, plain_batch)


def switched_off() -> Run:
    made = run()
    made.model.set_scale("default", 0.0)  # to see the base's answers, and never set back
    return made


BROKEN = {  # what is wrong -> how it comes about, and the finding that names it
    "optimizer made before the adapters": (optimizer_first, "optimizer-before-adapters"),
    "adapter scaled to zero": (switched_off, "scale-zero"),
    "learning rate of full fine-tuning": (lambda: run(lr=2e-5), "learning-rate-of-full-fine-tuning"),
    "labels shifted by hand": (lambda: run(batch=shifted_batch), "labels-shifted-twice"),
    "loss on the padding": (lambda: run(batch=padded_batch), "padding-in-loss"),
}


def trained(made: Run, rows: Tensor, unseen: Tensor, steps: int, size: int) -> list[float]:
    """The loss on text that is not trained on, before the first step and after each fifth of the steps."""
    made.model.train()
    torch.manual_seed(0)
    losses = [evaluate(made.model, unseen)]
    for step, ids in enumerate(batches(rows, size, steps), 1):
        made.model(**made.batch(ids)).loss.backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
        if step * 5 % steps == 0:
            losses.append(evaluate(made.model, unseen))
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    args = options(__doc__, argv)
    steps, size = (5, 2) if args.quick else (40, 8)
    train_text = "code-eval" if args.quick else "code-train"
    rows, unseen = blocks(train_text, LENGTH), blocks("code-eval", LENGTH)[: 4 if args.quick else 16]
    found, curves = {}, {}
    for name, (make, wanted) in {"nothing wrong": (run, None), **BROKEN}.items():
        torch.manual_seed(0)
        made = make()
        findings = diagnose(made.model.train(), made.batch(rows[:size]), made.optimizer, tokenizer())
        found[name] = [finding.name for finding in findings]
        curves[name] = [] if args.quick and wanted else trained(made, rows, unseen, steps, size)
        print(f"\n{name}" + (f": loss {curves[name][0]:.3f} -> {curves[name][-1]:.3f}" if curves[name] else ""))
        for finding in findings:
            print(finding)
    print()

    check("the healthy run has no finding", found["nothing wrong"] == [])
    for name, (_, wanted) in BROKEN.items():
        check(f"{name}: found as {wanted}", found[name] == [wanted])
    if not args.quick:
        gain = {name: curve[0] - curve[-1] for name, curve in curves.items()}
        check(f"the healthy run gains {gain['nothing wrong']:.2f} nats per token", gain["nothing wrong"] > 0.2)
        most = max(gain[name] for name in BROKEN)
        check(f"no broken run gains more than {most:.2f}", most < 0.4 * gain["nothing wrong"])

    drawn, [axes] = figure(height=3.8)
    for number, (name, curve) in enumerate(curves.items()):
        if curve:
            axes.plot(
                torch.linspace(0, steps, len(curve)), curve, "-" if number % 2 else "--", linewidth=2.2, label=name
            )
    axes.set(
        xlabel="step",
        ylabel="loss on other text (nats per token)",
        title="Five runs that print losses and do not learn the text",
    )
    axes.set_ylim(top=curves["nothing wrong"][0] + 4)  # with room for the legend
    axes.legend(fontsize="small", ncols=2, loc="upper right")
    save(drawn, args, __file__)


if __name__ == "__main__":
    main()

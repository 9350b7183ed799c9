"""Exercise 05: a training loop, watched at every step of its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

from minipeft.learning.law import Broken, Laws, require, same

LAWS = Laws()
STEPS = 6
LOWEST, HIGHEST = 1e-4, 1e-2  # learning rates that may do for LoRA; full fine-tuning takes 1e-5 to 5e-5


def _model(dropout: float = 0.1) -> Any:
    torch.manual_seed(1)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 16, "n_positions": 16, "initializer_range": 0.1}
    drops = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0)).eval()


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randint(16, (4, 1), generator=generator) + torch.arange(12)) % 16 for _ in range(STEPS)]


def _prepared(work: SimpleNamespace, dropout: float = 0.1) -> Any:
    model = work.prepare(_model(dropout))
    if not isinstance(model, nn.Module):
        raise Broken(f"prepare returns {type(model).__name__}, not the model: is a return missing?")
    return model


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@LAWS.law("prepare puts adapters on c_attn, and only they train")
def _adapts(work: SimpleNamespace) -> None:
    model = _prepared(work)
    trainable = _trainable(model)
    adapters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    require(adapters, "the model has no adapters: call minipeft.get_lora_model(model, minipeft.LoraConfig(...)).")
    require(trainable, "nothing of the model trains.")
    base = [name for name in trainable if name not in adapters]
    require(not base, f"{base[:1]} trains besides the adapters; get_lora_model has frozen the base, leave it so.")
    others = [name for name in adapters if "c_attn" not in name]
    require(not others, f"{others[:1]} is adapted, too; name the layers, as target_modules=['c_attn'].")
    ranks = {min(p.shape) for p in adapters.values()}
    require(ranks == {8}, f"r is {sorted(ranks)}, not 8.")


@LAWS.law("the optimizer has the adapters, nothing else, and a learning rate for them")
def _makes_an_optimizer(work: SimpleNamespace) -> None:
    model = _prepared(work)
    optimizer = work.make_optimizer(model)
    if not isinstance(optimizer, torch.optim.AdamW):
        raise Broken(f"make_optimizer returns {type(optimizer).__name__}, not torch.optim.AdamW.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = {id(p) for p in _trainable(model).values()}
    require(
        wanted <= held,
        f"{len(wanted - held)} of the {len(wanted)} adapter parameters are not in the optimizer and will never change.",
    )
    require(
        held == wanted,
        f"{len(held - wanted)} parameters of the frozen base are in the optimizer; give it those that require a gradient.",
    )
    rate = float(optimizer.param_groups[0]["lr"])
    require(
        rate >= LOWEST,
        f"the learning rate is {rate:g}, as for full fine-tuning or less; LoRA takes about ten times that (1e-4 and more).",
    )
    require(
        rate <= HIGHEST, f"the learning rate is {rate:g}: training diverges with such steps; LoRA takes 1e-4 to 1e-2."
    )


class Watched(torch.optim.AdamW):
    """AdamW that looks at the gradients that it is given."""

    def __init__(self, model: nn.Module, batches: list[Tensor], rate: float) -> None:
        self.parameters = list(_trainable(model).values())
        super().__init__(self.parameters, lr=rate, weight_decay=0.0)
        self.model, self.batches, self.steps, self.seen_training = model, batches, 0, True

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Compare the gradients with those of this step's batch."""
        if self.steps < len(self.batches):
            self._compare(self.batches[self.steps])
        self.steps += 1
        return super().step(closure)

    def _compare(self, ids: Tensor) -> None:
        self.seen_training &= self.model.training
        given = [p.grad for p in self.parameters]
        if all(gradient is None for gradient in given):
            raise Broken(
                f"at step {self.steps + 1} there are no gradients: loss.backward() comes before optimizer.step()."
            )
        right = torch.autograd.grad(self.model(input_ids=ids, labels=ids).loss, self.parameters)
        flat = torch.cat(
            [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(self.parameters, given, strict=True)]
        )
        wanted = torch.cat([gradient.flatten() for gradient in right])
        if torch.allclose(flat, wanted, atol=1e-5, rtol=1e-3):
            return
        if self.steps:
            raise Broken(
                f"at step {self.steps + 1} the gradients are {float(flat.norm() / wanted.norm()):.2g} times as large as this batch's: "
                "those of the steps before are still in them (zero_grad), or the loss is another one."
            )
        _explain_first(flat, wanted)


def _explain_first(given: Tensor, wanted: Tensor) -> None:
    if float(given.norm()) == 0:
        raise Broken(
            "the gradients are zero at the first step: zero_grad comes after step or before backward, not between."
        )
    factor = float(given @ wanted / (wanted @ wanted))
    if torch.allclose(given, factor * wanted, atol=1e-5, rtol=1e-3):
        raise Broken(f"the gradients are {factor:.3g} times this batch's: call backward once, on the loss itself.")
    raise Broken(
        "the gradients are not those of the model's loss: give it labels=ids as they are, the model shifts them itself."
    )


@LAWS.law("a step for each batch, with that batch's gradients")
def _steps(work: SimpleNamespace) -> None:
    model, batches = _prepared(work, dropout=0.0), _batches()
    optimizer = Watched(model, batches, 1e-3)
    first = model(input_ids=batches[0], labels=batches[0]).loss.item()
    losses = work.train(model, optimizer, batches)
    require(optimizer.steps > 0, "optimizer.step() is never called, so nothing is learnt.")
    require(optimizer.steps == STEPS, f"the optimizer makes {optimizer.steps} steps for {STEPS} batches.")
    require(isinstance(losses, list), f"train returns {type(losses).__name__}, not the list of losses.")
    require(len(losses) == STEPS, f"train returns {len(losses)} losses for {STEPS} steps.")
    kinds = {type(loss).__name__ for loss in losses}
    require(
        "Tensor" not in kinds,
        "the losses are tensors, each of which keeps the whole graph of its step in memory: use loss.item().",
    )
    require(kinds == {"float"}, f"the losses are {sorted(kinds)}, not floats.")
    if not math.isclose(losses[0], first, rel_tol=1e-3):
        raise Broken(f"the first loss is {losses[0]:.3g}; the model's own is {first:.3g}.")
    require(
        optimizer.seen_training, "the model is in evaluation mode, so dropout never acts: call model.train() first."
    )


@LAWS.law("the model learns, and its base stays as it was")
def _learns(work: SimpleNamespace) -> None:
    model, batches = _prepared(work, dropout=0.0), _batches() * 8
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = work.train(model, work.make_optimizer(model), batches)
    last = sum(losses[-STEPS:]) / STEPS
    require(
        last < 0.99 * losses[0],
        f"after {len(batches)} steps the loss is {last:.3g}, and it began at {losses[0]:.3g}: the learning rate does not suit.",
    )
    changed = [name for name, p in model.named_parameters() if name in before and not same(p, before[name], 0.0)]
    require(not changed, f"training has changed the base: {changed[:1]}.")

"""Exercise 04: LoRA in a whole model, in Linear and Conv1D."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minipeft.learning.law import Broken, Laws, gap, require, same

LAWS = Laws()
R, ALPHA, WIDTH = 2, 8.0, 8
TRAINED = ("blocks.0.c_attn", "blocks.0.c_proj", "blocks.1.c_attn", "blocks.1.c_proj")


def _conv1d(out: int, within: int) -> Any:
    return Conv1D(out, within)  # type: ignore[no-untyped-call]


class Block(nn.Module):
    """A block with GPT-2's kind of layer, a square one among them, one of torch's, and names that are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = _conv1d(3 * WIDTH, WIDTH)
        self.c_proj = _conv1d(WIDTH, WIDTH)
        self.not_c_attn = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.not_c_attn(self.c_proj(self.c_attn(x).chunk(3, -1)[0] + x)))


class Model(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _model() -> Model:
    torch.manual_seed(1)
    return Model()


def _adapted(work: SimpleNamespace, names: tuple[str, ...] = ("c_attn", "c_proj")) -> tuple[Model, Any]:
    model = _model()
    return model, work.apply_lora(model, list(names), R, ALPHA)


def _found(work: SimpleNamespace, model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, work.LoraLayer)]


IDS = torch.arange(10).view(2, 5)


@LAWS.law("the layer takes a Conv1D, whose weight is (in, out)")
def _takes_conv1d(work: SimpleNamespace) -> None:
    torch.manual_seed(1)
    for base in (_conv1d(6, 3), nn.Linear(3, 6), _conv1d(4, 4)):
        out, within = (6, 3) if base.weight.shape != (4, 4) else (4, 4)
        layer, kind = work.LoraLayer(base, R, ALPHA), type(base).__name__
        shapes = tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)
        if shapes == ((R, out), (within, R)) and out != within:
            raise Broken(
                f"in and out are swapped for {kind}: its weight is {tuple(base.weight.shape)}, and it puts out {out} features."
            )
        if shapes != ((R, within), (out, R)):
            raise Broken(f"for {kind}({within} -> {out}) lora_A and lora_B are {shapes[0]} and {shapes[1]}.")
        x = torch.randn(3, within)
        require(
            same(layer(x), base(x)),
            f"around {kind} the first output differs by {gap(layer(x), base(x)):.2g} from the base layer's.",
        )
        with torch.no_grad():
            layer.lora_B.normal_()
            update = ALPHA / R * (x @ layer.lora_A.T @ layer.lora_B.T)
            difference = gap(layer(x), base(x) + update)
        require(difference < 1e-4, f"around {kind} the output is off by {difference:.2g} from W x + s B A x.")


@LAWS.law("every layer of these names is adapted, of either type, wherever it is")
def _finds_all(work: SimpleNamespace) -> None:
    try:
        model, _ = _adapted(work)
    except ValueError as error:
        raise Broken(
            f"for names that are there it raises a ValueError ({error}): GPT-2's layers are Conv1D, which is no subclass of "
            "nn.Linear, and they are in blocks within the model."
        ) from None
    found = _found(work, model)
    require(found, "no layer is adapted: put each into its parent, with setattr.")
    missing = [name for name in TRAINED if name not in found]
    require(not missing, f"{', '.join(missing)} is not adapted.")
    nested = [name for name in found if "base_layer" in name]
    require(
        not nested, f"{', '.join(nested)}: an adapted layer is adapted again; list the layers first, then replace them."
    )
    others = [name for name in found if name not in TRAINED]
    if others:
        raise Broken(f"{', '.join(others)} is adapted, too: compare the last part of the name, and compare it whole.")
    try:
        linear, _ = _adapted(work, ("head", "not_c_attn"))
    except ValueError:
        raise Broken("it finds no nn.Linear; adapt both types.") from None
    found = _found(work, linear)
    require("head" in found, "an nn.Linear directly in the model, 'head', is not adapted.")
    require(len(found) == 3, f"of three layers called head or not_c_attn, all nn.Linear, {len(found)} are adapted.")


@LAWS.law("it returns the names, and raises a ValueError if there is none")
def _names_them(work: SimpleNamespace) -> None:
    _, names = _adapted(work)
    require(names is not None, "apply_lora returns None; it returns the names.")
    told = sorted(names)
    require(told == sorted(TRAINED), f"it returns {told!r:.100}, not the dotted names of the four layers.")
    try:
        _adapted(work, ("q_proj",))
    except ValueError:
        return
    raise Broken(
        "with a name that no layer has, nothing happens; raise a ValueError, or the mistake shows only after training."
    )


@LAWS.law("nothing else trains")
def _freezes_the_rest(work: SimpleNamespace) -> None:
    model, _ = _adapted(work)
    training = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    others = {name: count for name, count in training.items() if not name.endswith(("lora_A", "lora_B"))}
    require(
        not others,
        f"{sum(others.values()):,} numbers train besides the adapters, such as {next(iter(others), '')}: freeze the whole model first.",
    )
    wanted = 2 * R * (WIDTH + 3 * WIDTH + WIDTH + WIDTH)
    require(
        sum(training.values()) == wanted,
        f"{sum(training.values()):,} numbers train, not {wanted:,}: are the adapters frozen along with the model?",
    )


@LAWS.law("the model's first output is what it was, and training changes it")
def _begins_as_the_model(work: SimpleNamespace) -> None:
    before = _model()(IDS)
    model, _ = _adapted(work)
    require(same(model(IDS), before), f"the adapted model's first output differs by {gap(model(IDS), before):.2g}.")
    model(IDS).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if name.endswith("lora_B") and p.grad is None]
    require(not silent, f"no gradient reaches {', '.join(silent)}.")

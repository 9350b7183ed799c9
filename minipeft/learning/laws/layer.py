"""Exercise 03: what a LoRA layer must keep. Exercise 04 holds its layer to some of the same laws."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.learning.law import Broken, Laws, gap, require, same

LAWS = Laws()
R, ALPHA = 4, 12.0
OUT, IN = 6, 5


def _base(out: int = OUT, within: int = IN, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(within, out, bias=bias)


def _layer(work: SimpleNamespace, base: nn.Linear | None = None, **options: float) -> Any:
    return work.LoraLinear(_base() if base is None else base, R, ALPHA, **options)


def _trained(layer: Any) -> Any:
    """The layer with factors as if it had been trained."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for factor in (layer.lora_A, layer.lora_B):
            factor.copy_(torch.randn(factor.shape, generator=generator))
    return layer


def _inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@LAWS.law("the layer is a module that keeps the base layer itself")
def _keeps_the_base(work: SimpleNamespace) -> None:
    base = _base()
    before = [parameter.detach().clone() for parameter in base.parameters()]
    layer = _layer(work, base)
    require(isinstance(layer, nn.Module), "LoraLinear is not an nn.Module: let it inherit from nn.Module.")
    kept = getattr(layer, "base_layer", None)
    require(kept is not None, "there is no self.base_layer.")
    if kept is not base:
        raise Broken("self.base_layer is a copy: keep the layer that you were given, or its weight is in memory twice.")
    for old, new in zip(before, base.parameters(), strict=True):
        require(torch.equal(old, new), "making your layer changes the base layer's values.")


@LAWS.law("A is (r, in) and B is (out, r), both parameters")
def _has_factors(work: SimpleNamespace) -> None:
    layer = _layer(work)
    for name, shape, in_words in (("lora_A", (R, IN), "(r, in)"), ("lora_B", (OUT, R), "(out, r)")):
        factor = getattr(layer, name, None)
        require(factor is not None, f"there is no self.{name}.")
        if isinstance(factor, nn.Module):
            raise Broken(f"self.{name} is a {type(factor).__name__}; here it is an nn.Parameter of shape {in_words}.")
        if not isinstance(factor, nn.Parameter):
            raise Broken(f"self.{name} is not an nn.Parameter, so no optimizer finds it and no file has it.")
        swapped = " That is transposed." if tuple(factor.shape) == shape[::-1] else ""
        if tuple(factor.shape) != shape:
            raise Broken(f"self.{name} is {tuple(factor.shape)}, not {in_words} = {shape}.{swapped}")
        require(factor.requires_grad, f"self.{name} is frozen; it must train.")


@LAWS.law("the base layer is frozen, and only A and B train")
def _freezes_the_base(work: SimpleNamespace) -> None:
    layer = _layer(work)
    for name, parameter in layer.base_layer.named_parameters():
        require(not parameter.requires_grad, f"the base layer's {name} is not frozen: it gets a gradient and trains.")
    others = [n for n, p in layer.named_parameters() if p.requires_grad and n not in ("lora_A", "lora_B")]
    require(not others, f"{', '.join(others)} trains, too; LoRA trains A and B.")


@LAWS.law("B starts at zero")
def _starts_at_zero(work: SimpleNamespace) -> None:
    base, x = _base(), _inputs(7, IN)
    layer = _layer(work, base)
    if layer.lora_B.abs().max() == 0:
        return
    difference = gap(layer(x), base(x))
    if layer.lora_A.abs().max() == 0:
        raise Broken("A starts at zero and B does not; it is the other way round (Hu et al., 2021, section 4.1).")
    raise Broken(f"your B does not start at zero, so the first output already differs by {difference:.2g}.")


@LAWS.law("A starts at random")
def _starts_at_random(work: SimpleNamespace) -> None:
    first, second = _layer(work).lora_A, work.LoraLinear(_base(), R, ALPHA).lora_A
    if first.abs().max() == 0:
        raise Broken("your A and your B both start at zero: then neither gets a gradient, and nothing is ever learnt.")
    rank = int(torch.linalg.matrix_rank(first.detach()))
    require(rank == R, f"your A starts with rank {rank} instead of {R}: its rows are alike and stay so.")
    torch.manual_seed(4)
    second = _layer(work, nn.Linear(IN, OUT)).lora_A
    require(
        not torch.equal(first, second),
        "two layers start with the same A: do not set a seed within the layer, it is set once for the program.",
    )


@LAWS.law("the first output is the base layer's")
def _begins_as_the_base(work: SimpleNamespace) -> None:
    # Square, so that a transposed factor is a wrong number later, and not an error here.
    base, x = _base(R, R), _inputs(7, R)
    y, given = base(x), _layer(work, base)(x)
    require(isinstance(given, Tensor), f"forward returns {type(given).__name__}, not a tensor: is a return missing?")
    if given.shape != y.shape:
        raise Broken(f"the output of an input of {tuple(x.shape)} is {tuple(given.shape)}, not {tuple(y.shape)}.")
    if same(given, y):
        return
    if given.abs().max() == 0:
        raise Broken("the first output is zero: the base layer's output is missing from the sum.")
    if same(given, y - base.bias):
        raise Broken("the base layer's bias is missing from the output.")
    if same(given, y + base.bias):
        raise Broken("the base layer's bias is in the output twice.")
    factor = float((given * y).sum() / (y * y).sum())
    if same(given, factor * y):
        raise Broken(f"the base layer's output is multiplied by {factor:.2g}; only the update is scaled.")
    raise Broken(f"B is zero, and yet the first output differs from the base layer's by {gap(given, y):.2g}.")


@LAWS.law("the update is s B A x, with s = lora_alpha / r")
def _scales_by_alpha_over_r(work: SimpleNamespace) -> None:
    for base in (_base(R, R), _base()):
        layer, x = _trained(_layer(work, base)), _inputs(7, base.in_features)
        update = (layer(x) - base(x)).detach()
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        product = x @ A.T @ B.T
        factor = float((update * product).sum() / (product * product).sum())
        if not same(update, factor * product, 1e-3):
            _explain_update(base, update, x, A, B)
        require(update.abs().max() > 0, "the output does not change when A and B do: the update is not added.")
        _check_scaling(factor)


def _explain_update(base: nn.Linear, update: Tensor, x: Tensor, A: Tensor, B: Tensor) -> None:
    s, weight = ALPHA / R, base.weight.detach()
    if x.shape[-1] == len(B):  # only where these products exist
        for product in (x @ A @ B, x @ B @ A, x @ B.T @ A.T, x @ A @ B.T, x @ A.T @ B):
            if same(update, s * product, 1e-3):
                raise Broken("A or B is transposed, or they are in the wrong order: first x A^T, then that times B^T.")
    if same(update, s * (x @ weight.T @ A.T @ B.T) if weight.shape[0] == A.shape[1] else update - 1):
        raise Broken("the update is computed from the base layer's output; it takes the layer's input x.")
    for name in ("relu", "gelu", "tanh", "sigmoid"):
        if same(update, s * (getattr(torch, name, nn.functional.gelu)(x @ A.T) @ B.T), 1e-3):
            raise Broken(f"there is a {name} between A and B; without one the update can be merged into W.")
    raise Broken(f"the update is not a multiple of B A x: it is off by {gap(update, s * (x @ A.T @ B.T)):.2g}.")


def _check_scaling(factor: float) -> None:
    wrong = {
        R / ALPHA: "scaling is r / lora_alpha instead of lora_alpha / r",
        1.0: "the scaling is missing",
        ALPHA: "the scaling is lora_alpha alone, without r",
        1 / R: "the scaling is 1 / r, without lora_alpha",
        ALPHA / R**0.5: "the scaling is lora_alpha / sqrt(r), which is rank-stabilised LoRA (rsLoRA)",
        ALPHA * R: "the scaling is lora_alpha * r",
        (ALPHA / R) ** 2: "the scaling is applied twice",
        -ALPHA / R: "the update is subtracted",
    }
    if abs(factor - ALPHA / R) > 1e-3:
        why = next((said for value, said in wrong.items() if abs(factor - value) < 1e-3), "the scaling is wrong")
        raise Broken(
            f"{why}: with r = {R} and lora_alpha = {ALPHA:g}, B A x is multiplied by {factor:.3g}, not {ALPHA / R:g}."
        )


@LAWS.law("it takes any shape (..., in), and a base layer without bias")
def _takes_any_shape(work: SimpleNamespace) -> None:
    base = _base(bias=False)
    layer = _trained(_layer(work, base))
    rows = _inputs(6, IN)
    whole = layer(rows.view(2, 3, IN))
    if whole.shape != (2, 3, OUT):
        raise Broken(f"the output of an input of (2, 3, {IN}) is {tuple(whole.shape)}, not (2, 3, {OUT}).")
    require(same(whole.view(6, OUT), layer(rows)), "a batch of sequences gives other numbers than its rows do.")


@LAWS.law("dropout acts on the update only, in training only")
def _drops_in_training_only(work: SimpleNamespace) -> None:
    base, x = _base(), _inputs(2000, IN)
    layer = _layer(work, base, dropout=0.5)
    require(
        same(layer.train()(x), base(x)),
        "dropout acts on the base layer, too: with B at zero the output in training still differs from the base layer's.",
    )
    evaluated, expected = _trained(layer).eval()(x), _trained(_layer(work, _base()))(x)
    if not same(evaluated, expected, 1e-3):
        raise Broken(
            f"dropout also acts in eval: the output differs by {gap(evaluated, expected):.2g} from that without dropout."
        )
    trained = layer.train()(x)
    require(not same(trained, layer(x)), "dropout does not act in training: two passes give the same output.")
    update, wanted = trained - base(x), expected - base(x)
    kept = float((update * wanted).sum() / (wanted * wanted).sum())
    require(
        abs(kept - 1) < 0.15,
        f"with dropout 0.5 the update is on average {kept:.2g} of what it is without; nn.Dropout divides what stays by 1 - p.",
    )


@LAWS.law("gradients reach A, B and the layers below, and not the base")
def _passes_gradients(work: SimpleNamespace) -> None:
    base, x = _base(), _inputs(7, IN).requires_grad_()
    layer = _trained(_layer(work, base))
    layer(x).square().sum().backward()
    for name in ("lora_A", "lora_B"):
        gradient = getattr(layer, name).grad
        require(
            gradient is not None and gradient.abs().max() > 0,
            f"no gradient reaches {name}: is there a detach, .data or no_grad?",
        )
    require(base.weight.grad is None, "the base layer's weight gets a gradient.")
    wanted = 2 * layer(x).detach() @ (base.weight + ALPHA / R * layer.lora_B @ layer.lora_A)
    assert x.grad is not None
    require(
        same(x.grad, wanted, 1e-2),
        f"the gradient for the layers below is off by {gap(x.grad, wanted):.2g}: is the base layer called under no_grad?",
    )

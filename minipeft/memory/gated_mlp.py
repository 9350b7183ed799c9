"""Feed-forward modules with a gate, as Llama's, Qwen's and Phi-3's are: what they keep is halved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.kernels import recompute
from minipeft.kernels.generators import generators_kept
from minipeft.kernels.keeps_inputs import keeping_inputs
from minipeft.kernels.transformed import is_transformed
from minipeft.memory.modules import is_cheap_activation, learns
from minipeft.python.class_swap import SameFunction, plain_class


@dataclass(frozen=True)
class GatedProduct:
    """``act(gate) * up`` for two tensors of one shape and an activation that works element by element."""

    act: nn.Module

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Shape (..., features), that of both."""
        product: Tensor = self.act(gate) * up
        return product

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.forward(gate, up)


class SiluProduct(GatedProduct):
    """SwiGLU's product (arXiv:2002.05202), whose gradient is known."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def with_back(self, gate: Tensor, up: Tensor) -> recompute.WithBack:
        """As autograd has it, in two arrays fewer."""
        activated = F.silu(gate)

        def back(dy: Tensor) -> tuple[Tensor, Tensor]:
            into = dy * up
            torch.ops.aten.silu_backward.grad_input(into, gate, grad_input=into)
            return into, activated.mul_(dy)

        return activated * up, back


def gated_product(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """The product, keeping gate and up alone; and a LoRA layer that is given it keeps nothing more."""
    if is_transformed():
        plain: Tensor = act(gate) * up
        return plain
    product = (SiluProduct if isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation" else GatedProduct)(act)
    return recompute.mark(keeping_inputs(product, gate, up), product, gate, up, pointwise=True)


class GatedMlp(SameFunction):
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))``, keeping no product."""

    def forward(self, x: Tensor) -> Tensor:
        return _separate(self, x, gated_product) if learns(self) else super().forward(x)


class JoinedGatedMlp(SameFunction):
    """The same with one layer for both halves, ``gate_up_proj``."""

    def forward(self, x: Tensor) -> Tensor:
        return _joined(self, x, gated_product) if learns(self) else super().forward(x)


Product = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _separate(mlp: Any, x: Tensor, product: Product) -> Tensor:
    y: Tensor = mlp.down_proj(product(mlp.act_fn, mlp.gate_proj(x), mlp.up_proj(x)))
    return y


def _joined(mlp: Any, x: Tensor, product: Product) -> Tensor:
    gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    y: Tensor = mlp.down_proj(product(mlp.activation_fn, gate, up))
    return y


# The names that such a forward method uses, and no others -> what it does.
FORMS: dict[frozenset[str], tuple[type[nn.Module], Callable[[Any, Tensor, Product], Tensor]]] = {
    frozenset({"down_proj", "act_fn", "gate_proj", "up_proj"}): (GatedMlp, _separate),
    frozenset({"down_proj", "activation_fn", "gate_up_proj", "chunk"}): (JoinedGatedMlp, _joined),
}


@torch.no_grad()
def gated_mixin(mlp: nn.Module) -> type[nn.Module] | None:
    """The mixin for a feed-forward module that has a gate, or None.

    Its forward method must use the names of such a module and no others, and give the same bits on a random input.
    """
    own: Any = plain_class(type(mlp))
    code = getattr(own.forward, "__code__", None)
    form = None if code is None else FORMS.get(frozenset(code.co_names))
    act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if form is None or not isinstance(act, nn.Module) or not is_cheap_activation(act):
        return None
    mixin, run = form
    weight = next(mlp.parameters())
    first: Any = getattr(mlp, "gate_proj", None) or getattr(mlp, "gate_up_proj", None)
    x = torch.linspace(-2, 2, 2 * first.in_features, device=weight.device).view(2, -1)
    x = x.to(weight.dtype if weight.is_floating_point() else torch.float32)
    if x.is_meta:
        return None
    with generators_kept():  # adapters may have dropout
        torch.manual_seed(0)
        expected = mlp(x)
        torch.manual_seed(0)
        found = run(mlp, x, lambda act, gate, up: act(gate) * up)
    return mixin if torch.equal(found, expected) else None

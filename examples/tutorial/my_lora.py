"""LoRA in forty lines, for torch's Linear and for GPT-2's Conv1D. Chapter 3 shows that it is the library's."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class LoRA(nn.Module):
    """y = W x + b + (alpha / r) B A x, where W and b are frozen and A and B are learned."""

    def __init__(self, base: nn.Module, r: int, alpha: float):
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / r
        self.is_transposed = isinstance(base, Conv1D)  # it stores W as (in, out)
        out_features, in_features = base.weight.T.shape if self.is_transposed else base.weight.shape
        self.A = nn.Parameter(torch.empty(r, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, r))  # so that nothing is changed at the start
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T * self.scaling

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The base layer with the update added to its weight."""
        update = self.scaling * self.B @ self.A
        self.base.weight += update.T if self.is_transposed else update
        return self.base


def add_lora(model: nn.Module, names: list[str], r: int, alpha: float) -> None:
    """Freeze a model, and put a LoRA layer around each module whose name ends with one of these."""
    model.requires_grad_(False)
    chosen = [name for name, _ in model.named_modules() if name.endswith(tuple(names))]
    for name in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRA(model.get_submodule(name), r, alpha))

"""Dropout of what goes into an adapter, in an `nn.Dropout`, where other tools look for it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import nn
from typing_extensions import Self

from minipeft.layers.base import LayerOps
from minipeft.methods.base import Adapter


class InputDropout(Adapter):
    """A method whose update sees ``dropout(x)`` in training.

    Its `nn.Dropout` says when and how much: TRL's trainers set its ``p`` to 0, and Monte Carlo dropout puts it alone in
    training mode. Without a dropout rate there is none.
    """

    dropout: nn.Dropout | None

    @abstractmethod
    def __init__(self, base: nn.Module, ops: LayerOps, config: Any, shared: object | None) -> None:
        super().__init__(base, ops, config, shared)
        vars(self)["dropout"] = None

    def drop(self, probability: float) -> None:
        """Drop with this probability in training from now on."""
        if self.dropout is not None:
            self.dropout.p = probability
        elif probability:
            self.dropout = nn.Dropout(probability).train(self.training)

    @property
    def drops(self) -> float:
        """The probability of dropping a feature of the input now."""
        dropout = self.dropout
        return dropout.p if dropout is not None and dropout.training else 0.0

    @property
    def drop_rate(self) -> float:
        """The probability of dropping a feature in training."""
        return 0.0 if self.dropout is None else self.dropout.p

    def take(self, other: Self) -> None:
        super().take(other)
        self.drop(other.drop_rate)

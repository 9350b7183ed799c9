"""How LoRA's factors start: one function per value of ``init_lora_weights``, and the table of them.

A new start is a function here and its line in `INITS`. Those that are computed from the weight run in float32, or
float64 for a float64 weight.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.config.options import one_of
from minipeft.errors import ConfigError
from minipeft.kernels.functional import accumulation_dtype

GAIN = nn.init.calculate_gain("leaky_relu", math.sqrt(5))
KEPT = "_kept"  # ends the value in a file that brings the starting factors along


@dataclass
class Start:
    """What a start fills in, and what it may use."""

    A: Tensor  # the down projection; ``A.flatten(1)`` is (r, in)
    B: Tensor  # the up projection; ``B.flatten(1)`` is (out, r)
    bias: Tensor | None  # that of B, shape (out,) and zero, if it has one
    weight: Tensor  # the canonical weight, shape (out, in)
    scaling: float  # of the update, dimensionless
    iterations: int | None = None  # the N of a value that ends in ``_niter_N``, else None

    @property
    def r(self) -> int:
        """The rank."""
        return len(self.A)

    def set(self, A: Tensor, B: Tensor) -> None:
        """Fill in both factors, (r, in) and (out, r)."""
        self.A.copy_(A.view_as(self.A))
        self.B.copy_(B.view_as(self.B))


@dataclass(frozen=True)
class Init:
    """One way to start."""

    fill: Callable[[Start], None]  # sets the factors
    fill_embedding: Callable[[Start], None] | None = None  # sets those of an embedding; None: `fill` does
    # The factors are part of the weight, so their product is taken off the update, and files bring them
    of_weight: bool = False
    one_matrix: bool = False  # it works on one matrix, not on the experts of a parameter
    iterates: bool = False  # the name may end in ``_niter_N``


def kaiming(start: Start) -> None:
    """A Kaiming-uniform, B zero."""
    _kaiming_uniform(start.A)
    start.B.zero_()


def _kaiming_uniform(factor: Tensor) -> None:
    """``nn.init.kaiming_uniform_(factor, a=math.sqrt(5))``, the same values in a third of the time for small layers."""
    if factor.numel():
        bound = math.sqrt(3.0) * (GAIN / math.sqrt(factor.numel() // factor.shape[0]))
        factor.uniform_(-bound, bound)


def gaussian(start: Start) -> None:
    """A normal with standard deviation 1/r, B zero."""
    start.A.normal_(std=1 / start.r)
    start.B.zero_()


def all_random(start: Start) -> None:
    """A and B Kaiming-uniform, the bias of B uniform: an update that is not zero, for tests."""
    _kaiming_uniform(start.A)
    _kaiming_uniform(start.B)
    if start.bias is not None:
        start.bias.uniform_(-(start.r**-0.5), start.r**-0.5)


def embedding_zero(start: Start) -> None:
    """A zero, B normal: of an embedding A is read token by token, and B is a linear map behind it, as in PEFT."""
    start.A.zero_()
    start.B.normal_()


def embedding_random(start: Start) -> None:
    """A and B normal: an update that is not zero, for tests."""
    start.A.normal_()
    start.B.normal_()


def orthogonal(start: Start) -> None:
    """``B A = 0`` with neither of them zero: they go through the even and the odd rows of one orthogonal matrix.

    https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation

    Raises:
        ConfigError: r is odd.
    """
    r, (out_features, in_features) = start.r, start.weight.shape
    if r % 2:
        raise ConfigError(f"init_lora_weights='orthogonal' splits the rank in two, and r = {r} is odd.")
    options = {"dtype": accumulation_dtype(start.weight), "device": start.weight.device}
    Q, _ = torch.linalg.qr(torch.randn(r, r, **options))  # type: ignore[call-overload]
    A = Q[0::2].t() @ torch.randn(in_features, r // 2, **options).t()  # type: ignore[call-overload]
    B = torch.randn(r // 2, out_features, **options).t() @ Q[1::2]  # type: ignore[call-overload]
    start.set(A / 10, B / 10)


def pissa(start: Start) -> None:
    """The r principal components of the weight, ``scaling * B A = U_r S_r V_r`` (Meng et al., 2024, arXiv:2404.02948).

    The square root of the singular values goes to either factor, eqs. (2) and (3). With `iterations`, a randomised
    decomposition of that many power iterations takes the place of the exact one. It is far faster, and draws from
    torch's generator.

    Raises:
        ConfigError: r exceeds the rank of the weight.
    """
    weight, r = _of_rank(start), start.r
    if start.iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(weight, r, niter=start.iterations)
        Vh = V.t()
    roots = (S[:r] / start.scaling).sqrt()
    start.set(roots.unsqueeze(1) * Vh[:r], U[:, :r] * roots)


def olora(start: Start) -> None:
    """The first r of ``W = Q R``: ``B = Q[:, :r]``, orthonormal, and ``A = R[:r]`` (Buyukakyuz, 2024, arXiv:2406.01775).

    Raises:
        ConfigError: r exceeds the rank of the weight.
    """
    Q, R = torch.linalg.qr(_of_rank(start))
    start.set(R[: start.r], Q[:, : start.r])


def _of_rank(start: Start) -> Tensor:
    weight = start.weight
    if start.r > min(weight.shape):
        raise ConfigError(
            f"r = {start.r} exceeds the rank of a weight of shape {tuple(weight.shape)}, whose parts init_lora_weights asks "
            "for. Lower r, by rank_pattern for single modules."
        )
    return weight.detach().to(accumulation_dtype(weight))


INITS: dict[bool | str, Init] = {
    True: Init(kaiming, embedding_zero),
    False: Init(all_random, embedding_random),
    "gaussian": Init(gaussian, embedding_zero),
    "orthogonal": Init(orthogonal, one_matrix=True),
    "pissa": Init(pissa, of_weight=True, one_matrix=True, iterates=True),
    "olora": Init(olora, of_weight=True, one_matrix=True),
}
# PEFT's others, by what they start from.
NOT_HERE = {
    "eva": "inputs",
    "corda": "inputs",
    "lora_ga": "gradients",
    "loftq": "quantization error",
    "mica": "smallest singular vectors",
}
# Of these, those that leave the base as it is: the file holds plain LoRA. LoRA-GA, CorDA and LoftQ change the base.
PLAIN = {"eva", "mica"}


@dataclass(frozen=True)
class Chosen:
    """What a value of ``init_lora_weights`` says: how to start, and whether a file brings the starting factors along."""

    init: Init
    iterations: int | None = None
    kept: bool = False

    def fill(self, start: Start, *, is_embedding: bool) -> None:
        """Set the factors; those that a file brings along start in the default way, and are read later."""
        init = INITS[True] if self.kept else self.init
        (init.fill_embedding if is_embedding and init.fill_embedding else init.fill)(start)


_plain = functools.cache(Chosen)


def chosen_init(value: object) -> Chosen:
    """Look up a value of ``init_lora_weights``; raises ConfigError if there is no such start."""
    if isinstance(value, bool):  # asked twice for each layer
        return _plain(INITS[value])
    if isinstance(value, str):
        if value in NOT_HERE:
            raise ConfigError(
                f"init_lora_weights {value!r} starts from the {NOT_HERE[value]} of the layers, which is not implemented; "
                "'pissa' starts from their weights."
            )
        match = re.fullmatch(rf"(\w+?)(?:_niter_([1-9]\d{{0,2}}))?({KEPT})?", value)
        init = INITS.get(match[1]) if match else None
        if match and init and (init.iterates or not match[2]) and (init.of_weight or not match[3]):
            return Chosen(init, int(match[2]) if match[2] else None, match[3] is not None)
    names = [*INITS, *(f"{name}_niter_4" for name, init in INITS.items() if init.iterates)]
    return Chosen(INITS[one_of("init_lora_weights", value, names)])


def start_of_file(value: object) -> object:
    """A value of ``init_lora_weights`` in a file, as one that starts here; a start that leaves no trace becomes True.

    PEFT tells some names apart by their lower case only.

    Raises:
        ConfigError: the start changed the base, by factors that the file does not hold.
    """
    name = value.lower() if isinstance(value, str) else ""
    if name in PLAIN:
        return True
    init = INITS.get(name.partition("_niter_")[0])
    if name in NOT_HERE or (init is not None and init.of_weight and not name.endswith(KEPT)):
        raise ConfigError(
            f"init_lora_weights {value!r} changes the base by factors that the file does not hold. Convert it to plain "
            "LoRA where it was made: in PEFT, save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    return name if name in INITS else value

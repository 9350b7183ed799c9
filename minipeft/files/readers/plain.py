"""An adapter's updates as plain low-rank pairs of one rank and one scaling, computed from its file alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minipeft.errors import CheckpointError, shown
from minipeft.files.file_names import CONFIG_FILE
from minipeft.files.readers.contents import Contents
from minipeft.files.readers.keys import Kind

# PEFT adds it to AdaLoRA's divisor.
EPSILON = 1e-5
WHY_NOT = {
    "LOHA": "a product of two low-rank matrices, element by element, is not one of the same rank",
    "LOKR": "a Kronecker product is not of low rank",
    "OFT": "it rotates the weight, which is not a low-rank update",
    "IA3": "it scales the weight, which is not a low-rank update",
    "VERA": "the factors that its layers share have to be cut to the shapes of the base",
    "TRAINABLE_TOKENS": "it replaces rows of a table",
}


@dataclass(frozen=True)
class Pair:
    """The update of one layer: ``scaling * up @ down``, shapes (out, r) and (r, in), or those of a convolution."""

    down: Tensor
    up: Tensor
    scaling: float
    is_embedding: bool

    @property
    def rank(self) -> int:
        """Number of components, those that are zero included."""
        return self.down.shape[0]

    def padded(self, rank: int) -> Pair:
        """The same update with components of zeros."""
        missing = rank - self.rank
        down = torch.cat([self.down, self.down.new_zeros(missing, *self.down.shape[1:])])
        up = torch.cat([self.up, self.up.new_zeros(len(self.up), missing, *self.up.shape[2:])], 1)
        return replace(self, down=down, up=up)

    def scaled(self, scaling: float) -> Pair:
        """The same update under another scaling, with the difference in `up`.

        In half precision the product may not be exact; then both factors become float32.
        """
        if scaling == self.scaling:
            return self
        exact = self.up.double() * (self.scaling / scaling)
        up = exact.to(self.up.dtype)
        if self.up.dtype.itemsize < 4 and not torch.equal(up.double(), exact):
            return replace(self, down=self.down.float(), up=exact.float(), scaling=scaling)
        return replace(self, up=up, scaling=scaling)


def check_method(contents: Contents) -> None:
    """Raise CheckpointError if the method's updates are not of low rank, or not without the base."""
    method = contents.method
    if not contents.config:
        raise CheckpointError(
            f"{contents.directory} cannot be made plain LoRA: it has no {CONFIG_FILE}, or an empty one, and that says how the "
            "factors are scaled. Copy the file from where the adapter was saved."
        )
    if method not in ("LORA", "ADALORA"):
        why = WHY_NOT.get(method, "minipeft does not know it as a low-rank method")
        raise CheckpointError(
            f"{contents.directory}: {method or 'an adapter without peft_type'} cannot be made plain LoRA ({why}). "
            "Merge it into the base: minipeft merge."
        )


def pairs_of(contents: Contents, values: Mapping[str, Tensor]) -> dict[str, Pair]:
    """The update of each layer, by the name of its module.

    Raises:
        CheckpointError: the method is not low-rank, or a layer has more than a low-rank update.
    """
    check_method(contents)
    for kind in (Kind.MAGNITUDE, Kind.BIAS):
        keys = contents.of(kind)
        if keys:
            raise CheckpointError(
                f"{contents.directory}: {shown([keys[0].text])} is {kind.value}, which is more than a low-rank update. "
                "Merge it into the base: minipeft merge."
            )
    return {module: pair_of(contents, module, values) for module in contents.layers}


def pair_of(contents: Contents, module: str, values: Mapping[str, Tensor]) -> Pair:
    """The low-rank part of one layer's update, of LoRA or AdaLoRA; raises CheckpointError if its factors are not a pair."""
    return (_lora if contents.method == "LORA" else _adalora)(contents, module, values)


def _lora(contents: Contents, module: str, values: Mapping[str, Tensor]) -> Pair:
    parts = contents.layers[module]
    is_embedding = "lora_embedding_A" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    down, up = (_value(contents, module, name, values) for name in names)
    if f"initial_{names[0]}" in parts:  # the start is subtracted from the update
        start_A, start_B = (_value(contents, module, f"initial_{name}", values) for name in names)
        down, up = torch.cat([down, start_A.to(down.dtype)]), torch.cat([up, -start_B.to(up.dtype)], 1)
    return _checked(contents, module, Pair(down, up, _scaling(contents, module), is_embedding))


def _adalora(contents: Contents, module: str, values: Mapping[str, Tensor]) -> Pair:
    down, up, middle = (_value(contents, module, name, values) for name in ("lora_A", "lora_B", "lora_E"))
    r = contents.ranks[module]
    scaling = _scaling(contents, module) * (r / (r + EPSILON))
    return _checked(contents, module, Pair(down * middle, up, scaling, is_embedding=False))


def _scaling(contents: Contents, module: str) -> float:
    scaling = contents.scalings.get(module)
    if scaling is None:
        raise CheckpointError(f"{contents.directory}: {module} has rank {contents.ranks[module]} in the configuration.")
    return scaling


def _checked(contents: Contents, module: str, pair: Pair) -> Pair:
    if pair.down.ndim < 2 or pair.up.ndim < 2 or pair.up.shape[1] != pair.rank:
        shapes = f"{list(pair.down.shape)} and {list(pair.up.shape)}"
        raise CheckpointError(f"{contents.directory}: the factors of {module} are {shapes}, which do not fit together.")
    return pair


def _value(contents: Contents, module: str, part: str, values: Mapping[str, Tensor]) -> Tensor:
    key = contents.layers[module].get(part)
    if key is None:
        raise CheckpointError(f"{contents.directory}: {module} has no {part}.")
    return values[key]


def alike(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The same updates, all of one rank, one scaling and one dtype. The scaling is the one that most of them have."""
    rank = max(pair.rank for pair in pairs.values())
    scaling = Counter(pair.scaling for pair in pairs.values()).most_common(1)[0][0]
    made = {module: pair.padded(rank).scaled(scaling) for module, pair in pairs.items()}
    dtypes = {tensor.dtype for pair in made.values() for tensor in (pair.down, pair.up)}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    # Bfloat16 and float16 hold different numbers.
    wide = torch.float32 if len(dtypes) > 1 and widest.itemsize < 4 else widest
    return {m: replace(pair, down=pair.down.to(wide), up=pair.up.to(wide)) for m, pair in made.items()}

"""The options of LoRA (Hu et al., 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from typing_extensions import Self

from minipeft.config.adapter_config import AdapterConfig
from minipeft.config.options import alpha, names, number, one_of, pattern_table, rank
from minipeft.errors import ConfigError
from minipeft.kernels.functional import lora_scaling
from minipeft.methods.lora_init import KEPT, chosen_init, start_of_file
from minipeft.methods.trainable_tokens import token_option, tokens_beside


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """LoRA's options, on top of `AdapterConfig`'s; names, meanings and defaults are PEFT's.

    Args:
        r: rank of the update.
        lora_alpha: the update is scaled by ``lora_alpha / r`` (`use_rslora`: ``/ sqrt(r)``, arXiv:2312.03732).
        lora_dropout: probability of dropping an input feature on its way into A, in training; for an embedding, whose
            input is one-hot, of dropping a token's update.
        bias: "none"; "lora_only" trains the biases of adapted layers; "all" those of every other module too. They are
            trained copies, so switching the adapter off restores the base exactly.
        rank_pattern, alpha_pattern: regular expression -> value, for the whole module name or a dotted suffix of it.
        init_lora_weights: how the factors start, see `minipeft.methods.lora_init`. True, "gaussian" and "orthogonal" start
            with an update of zero. False does not (for tests). "pissa", "pissa_niter_N" and "olora" start from parts of
            the weight. The weight stays as it is: ``scaling * B_0 A_0`` is stored and subtracted from the update. A file
            that brings these starting factors along says "pissa_kept" and so on.
        lora_bias: B has a bias, which scaled is added to the layer's; only with `init_lora_weights` True or False.
        freeze_lora_A: train B alone (LoRA-FA, arXiv:2308.03303), so that only A x is kept of a layer's input for the
            backward pass. Files do not say it; there the adapter is plain LoRA.
        use_dora: DoRA (arXiv:2402.09353): train the length of each row of the weight separately from its direction.
        target_parameters: suffixes of the names of bare parameters to adapt besides `target_modules` (which may then be
            empty): of shape (out, in), (experts, out, in) or, in a module that says `is_transposed`, (experts, in, out).
            `exclude_modules` and `layers_to_transform` do not apply to them.
        trainable_token_indices: train the rows of these tokens as well, see `minipeft.methods.trainable_tokens`: ids for
            the input embedding, or a mapping from module names to ids. Layers tied to it follow.
        ensure_weight_tying: if the input embedding or a head tied to it is among `target_modules` or `modules_to_save`, by
            PEFT's names ``embed_tokens`` and ``lm_head``, one adapter or trained copy serves all of them, so that they
            stay tied.
        fan_in_fan_out: accepted for compatibility with PEFT and ignored: the layer knows its own orientation.
    """

    method: ClassVar[str] = "lora"
    null_in_files = frozenset({"lora_dropout"})
    pattern_options: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    freeze_lora_A: bool = False
    use_dora: bool = False
    target_parameters: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    ensure_weight_tying: bool = False
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        self._set(
            "target_parameters",
            names("target_parameters", None if self.target_parameters in ([], ()) else self.target_parameters),
        )
        super().__post_init__()
        rank("r", self.r)
        alpha("lora_alpha", self.lora_alpha)
        number("lora_dropout", self.lora_dropout, at_least=0, below=1)
        one_of("bias", self.bias, ("none", "all", "lora_only"))
        self._set("rank_pattern", pattern_table("rank_pattern", self.rank_pattern, rank))
        self._set("alpha_pattern", pattern_table("alpha_pattern", self.alpha_pattern, alpha))
        chosen_init(self.init_lora_weights)
        self._set("trainable_token_indices", token_option("trainable_token_indices", self.trainable_token_indices))
        if self.lora_bias and (self.use_dora or isinstance(self.init_lora_weights, str)):
            raise ConfigError("lora_bias goes with init_lora_weights True or False only, and not with use_dora.")
        if self.ensure_weight_tying and self.freeze_lora_A:
            raise ConfigError(
                "ensure_weight_tying shares the factors with a layer in which A and B change places; leave "
                "out freeze_lora_A."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        init = start_of_file(values.get("init_lora_weights", True))
        return super().from_dict({**values, "init_lora_weights": init})

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["freeze_lora_A"]
        chosen = chosen_init(self.init_lora_weights)
        if chosen.init.of_weight and not chosen.kept:
            # Other readers would subtract factors that they compute themselves. This value they refuse.
            values["init_lora_weights"] = f"{self.init_lora_weights}{KEPT}"
        return values

    @property
    def adapter_method(self) -> str:
        return "dora" if self.use_dora else self.method

    @property
    def scaling(self) -> float:
        """Factor of the update, dimensionless."""
        return lora_scaling(self.r, self.lora_alpha, self.use_rslora)

    def companions(self) -> Sequence[tuple[str, AdapterConfig]]:
        return tokens_beside(self.trainable_token_indices)

    def needs_a_call(self) -> list[str]:
        used = {"lora_dropout": self.lora_dropout > 0, "bias": self.bias != "none"}
        used |= {"lora_bias": self.lora_bias, "use_dora": self.use_dora}
        return [f"{option} = {getattr(self, option)!r}" for option, is_set in used.items() if is_set]

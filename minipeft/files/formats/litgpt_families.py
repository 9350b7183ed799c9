"""What litgpt's layers are called in transformers, and which of them are one layer there; by model.

See ``copy_weights_*`` in ``litgpt/scripts/convert_lit_checkpoint.py``, and ``qkv_reassemble`` for the order of rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA_MLP = {"mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
DENSE_MLP = {"mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"}
_EXPERT = re.compile(r"mlp\.experts\.(\d{1,6})\.(fc_1|fc_2|proj)")


@dataclass(frozen=True)
class Family:
    """Where the layers of one kind of model are in transformers."""

    names: Mapping[str, str]  # litgpt's layer -> transformers' one
    layers: str = "model.layers"  # the list of layers
    qkv: tuple[str, ...] = QKV  # the layers that q, k and v are; one name: all three in one
    by_group: bool = False  # whether that one has the rows of each query group together, and not all of q first
    gate_up: str = ""  # the layer in which ``mlp.fc_1`` and ``mlp.fc_2`` are one; "": they are two
    # The list of experts and the names of gate, up and down in one; empty: there are none
    experts: tuple[str, ...] = ()
    head: str = "lm_head"  # the output head

    def name(self, layer: str) -> str | None:
        """Transformers' name of a layer that is one by itself; None if it is not known."""
        expert = _EXPERT.fullmatch(layer) if self.experts else None
        if expert is not None:
            first, *ends = self.experts
            return f"{first}.{int(expert[1])}.{ends[('fc_1', 'fc_2', 'proj').index(expert[2])]}"
        return self.names.get(layer)


LLAMA = Family({"attn.proj": "self_attn.o_proj", **LLAMA_MLP})
PHI = Family({"attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"})
PHI3 = Family(
    {"attn.proj": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"},
    qkv=("self_attn.qkv_proj",),
    gate_up="mlp.gate_up_proj",
)
NEOX = Family(
    {"attn.proj": "attention.dense", **DENSE_MLP},
    layers="gpt_neox.layers",
    qkv=("attention.query_key_value",),
    by_group=True,
    head="embed_out",
)
FALCON = Family(
    {"attn.proj": "self_attention.dense", **DENSE_MLP},
    layers="transformer.h",
    qkv=("self_attention.query_key_value",),
    by_group=True,
)
MIXTRAL = Family(
    {"attn.proj": "self_attn.o_proj", "mlp.gate": "block_sparse_moe.gate"},
    experts=("block_sparse_moe.experts", "w1", "w3", "w2"),
)
QWEN_MOE = Family(
    {"attn.proj": "self_attn.o_proj", "mlp.gate": "mlp.gate"},
    experts=("mlp.experts", "gate_proj", "up_proj", "down_proj"),
)


def family(name: str, mlp: object) -> Family | None:
    """The family of a model by its name in litgpt and the class of its MLP, as litgpt's own converter chooses it."""
    name = name.lower()
    if "falcon" in name:
        return FALCON
    if name.startswith("phi"):
        return PHI3 if name.startswith(("phi-3", "phi-4")) else PHI
    if mlp == "LLaMAMoE":
        return QWEN_MOE if name.startswith("qwen3") else MIXTRAL
    return {"LLaMAMLP": LLAMA, "GemmaMLP": LLAMA, "GptNeoxMLP": NEOX}.get(str(mlp))

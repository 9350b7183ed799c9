"""The training subjects that the benchmarks compare.

All LoRA subjects read the same adapter, saved once by PEFT, so that they compute the same function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import minipeft

TARGETS = ["c_attn", "c_proj", "c_fc"]
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

FROZEN = "frozen base"
FULL = "full fine-tuning"
FULL_CHECKPOINTED = "full fine-tuning, checkpointing"
PEFT = "PEFT"
PEFT_CHECKPOINTED = "PEFT, checkpointing"
TUNED = "PEFT, tuned"
TUNED_FAST = "PEFT, tuned, fast products"
CORE = "minipeft"
LEAN = "minipeft, lean"
LEAN_NONE = "minipeft, lean, checkpointing none"
LEAN_MLP = "minipeft, lean, checkpointing mlp"
LEAN_BLOCK = "minipeft, lean, checkpointing block"
LEAN_SQRT = "minipeft, lean, checkpointing sqrt"
# What a subject's name ends with if its base is not in float32.
BF16 = ", bf16 base"
NF4 = ", NF4 base"
NF4_BF16 = ", NF4 and bf16 base"


def gpt2(tiny: bool = False, **options: Any) -> GPT2LMHeadModel:
    """GPT-2 124M with random weights from seed 0 and no dropout; `tiny` is for trying things out."""
    config: dict[str, Any] = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    if tiny:
        config |= {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 101}
        config |= {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**config | options))


def llama(tiny: bool = False, **options: Any) -> LlamaForCausalLM:
    """A Llama as wide and deep as GPT-2, with grouped heads and 32,000 words, with random weights from seed 0."""
    config: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    config |= {"num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32_000}
    if tiny:
        config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config |= {"num_key_value_heads": 1, "vocab_size": 101, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config | options))


MODELS: dict[str, Callable[..., PreTrainedModel]] = {"GPT-2 124M": gpt2, "Llama 134M": llama}


def model_name(tiny: bool, name: str = "GPT-2 124M") -> str:
    return f"tiny {name.split()[0]}" if tiny else name


def save_adapter(base: nn.Module, folder: Path, r: int = 8, lora_alpha: float = 8) -> Path:
    """Adapt the base with PEFT, B non-zero, and save the adapter; the base is used up."""
    is_gpt2 = isinstance(base, GPT2LMHeadModel)
    targets = TARGETS if is_gpt2 else LLAMA_TARGETS
    config = peft.LoraConfig(
        r=r, lora_alpha=lora_alpha, target_modules=targets, init_lora_weights=False, fan_in_fan_out=is_gpt2
    )
    torch.manual_seed(1)
    with warnings.catch_warnings():  # notes on names that transformers has given up
        warnings.simplefilter("ignore")
        peft.get_peft_model(base, config).save_pretrained(folder)
    return folder


def full(base: nn.Module, adapter: Path) -> nn.Module:
    return base


def full_checkpointed(base: nn.Module, adapter: Path) -> nn.Module:
    with warnings.catch_warnings():  # transformers 5 has a new name for it, which 4 does not know
        warnings.simplefilter("ignore", FutureWarning)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return base


def frozen(base: nn.Module, adapter: Path) -> nn.Module:
    return base.requires_grad_(False)


def by_peft(base: nn.Module, adapter: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)


def by_peft_checkpointed(base: nn.Module, adapter: Path) -> nn.Module:
    return by_peft(full_checkpointed(base, adapter), adapter)


def by_peft_tuned(base: nn.Module, adapter: Path, fast_linear: bool = False) -> nn.Module:
    model = by_peft(base, adapter)
    minipeft.lean(model.get_base_model(), fast_linear=fast_linear)
    return model


def by_peft_tuned_fast(base: nn.Module, adapter: Path) -> nn.Module:
    return by_peft_tuned(base, adapter, fast_linear=True)


def ours(base: nn.Module, adapter: Path) -> nn.Module:
    return minipeft.load_adapter(base, adapter, is_trainable=True)


def ours_lean(base: nn.Module, adapter: Path, checkpointing: str | None = None) -> nn.Module:
    return minipeft.lean(ours(base, adapter), checkpointing=checkpointing)


def ours_lean_none(base: nn.Module, adapter: Path) -> nn.Module:
    return ours_lean(base, adapter, "none")


def ours_lean_mlp(base: nn.Module, adapter: Path) -> nn.Module:
    return ours_lean(base, adapter, "mlp")


def ours_lean_block(base: nn.Module, adapter: Path) -> nn.Module:
    return ours_lean(base, adapter, "block")


def ours_lean_sqrt(base: nn.Module, adapter: Path) -> nn.Module:
    return ours_lean(base, adapter, "sqrt")


def bf16(base: nn.Module) -> nn.Module:
    return base.to(torch.bfloat16)


def nf4(base: nn.Module) -> nn.Module:
    """QLoRA's base: every linear layer but the head in NF4 with double quantization; the same for both libraries."""
    base = minipeft.quantize(base, "nf4")
    base.is_loaded_in_4bit = True  # by which PEFT recognises bitsandbytes' layers
    return base


BUILDERS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    FROZEN: frozen,
    FULL: full,
    FULL_CHECKPOINTED: full_checkpointed,
    PEFT: by_peft,
    PEFT_CHECKPOINTED: by_peft_checkpointed,
    TUNED: by_peft_tuned,
    TUNED_FAST: by_peft_tuned_fast,
    CORE: ours,
    LEAN: ours_lean,
    LEAN_NONE: ours_lean_none,
    LEAN_MLP: ours_lean_mlp,
    LEAN_BLOCK: ours_lean_block,
    LEAN_SQRT: ours_lean_sqrt,
}
BASES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "": lambda base: base,
    BF16: bf16,
    NF4: nf4,
    NF4_BF16: lambda base: nf4(bf16(base)),
}


def on(prepare: Callable[[nn.Module], nn.Module], build: Callable[[nn.Module, Path], nn.Module]) -> Any:
    """The subject that `build` makes of a base which was prepared first."""
    return lambda base, adapter: build(prepare(base), adapter)


SUBJECTS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    name + ending: on(prepare, build) for ending, prepare in BASES.items() for name, build in BUILDERS.items()
}


def base_of(subject: str) -> str:
    """How the name of a subject ends, which says what its base is stored in."""
    return next((ending for ending in (NF4_BF16, NF4, BF16) if subject.endswith(ending)), "")


def is_lora(subject: str) -> bool:
    return not subject.startswith((FROZEN, FULL))


def peer(subject: str) -> str:
    """PEFT's subject that computes the same function."""
    return PEFT + base_of(subject)


def base_bytes(model: nn.Module) -> int:
    """Bytes of a model's own weights, the scales of packed ones included, without adapters."""
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for name, tensor in model.state_dict().items()
        if not {"adapters", "lora_A", "lora_B"} & set(name.split("."))
    }
    return sum(sizes.values())


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradient of every adapter parameter by module name and factor, whichever library holds it."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default.weight", "")
            gradients[name.replace("adapters.default.", "")] = parameter.grad
    return gradients

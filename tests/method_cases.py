"""Every method beside LoRA on tiny models, and PEFT's own on the same: what several test files ask both libraries for."""

import copy

import torch
from tiny_models import disturb, foreign_code, gpt2, llama, logits, token_ids

import minipeft

with foreign_code():
    import peft

GPT2, LLAMA = ["c_attn", "mlp.c_proj"], ["q_proj", "v_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 1}, "alpha_pattern": {"v_proj": 3}}

# method: what both are asked for, by the words they share
CASES = {
    "ia3": ("IA3Config", gpt2, {"target_modules": GPT2, "feedforward_modules": ["mlp.c_proj"]}),
    "ia3 default": ("IA3Config", gpt2, {}),
    "ia3 all-linear": ("IA3Config", llama, {"target_modules": "all-linear", "feedforward_modules": ["mlp.down_proj"]}),
    "ia3 none": ("IA3Config", llama, {"target_modules": LLAMA, "feedforward_modules": []}),
    "ia3 regex": (
        "IA3Config",
        llama,
        {"target_modules": r".*\.(q_proj|up_proj)", "feedforward_modules": r".*\.up_proj"},
    ),
    "vera": ("VeraConfig", gpt2, {"target_modules": GPT2, "r": 8, "projection_prng_key": 7}),
    "vera unsaved": ("VeraConfig", llama, {"target_modules": LLAMA, "r": 4, "save_projection": False}),
    "vera one layer": (
        "VeraConfig",
        llama,
        {"target_modules": ["q_proj"], "r": 4, "layers_to_transform": [1], "d_initial": 0.5},
    ),
    "adalora": ("AdaLoraConfig", gpt2, {"target_modules": GPT2, "init_r": 5, "target_r": 2, "total_step": 20}),
    "adalora default": ("AdaLoraConfig", llama, {"total_step": 9, "lora_alpha": 3, "orth_reg_weight": 0.0}),
    "loha": ("LoHaConfig", llama, {"target_modules": LLAMA, "r": 3, "alpha": 5}),
    "loha patterns": ("LoHaConfig", llama, {"target_modules": LLAMA, **PATTERNS}),
    "lokr": ("LoKrConfig", llama, {"target_modules": LLAMA, "r": 2, "alpha": 5}),
    "lokr patterns": (
        "LoKrConfig",
        llama,
        {"target_modules": LLAMA, "decompose_both": True, "decompose_factor": 5, **PATTERNS},
    ),
    "lokr lycoris": ("LoKrConfig", llama, {"target_modules": LLAMA, "init_weights": "lycoris", "decompose_factor": 4}),
    "oft": ("OFTConfig", llama, {"target_modules": [*LLAMA, "embed_tokens"], "oft_block_size": 8}),
    "oft exact": (
        "OFTConfig",
        llama,
        {"target_modules": LLAMA, "oft_block_size": 0, "r": 5, "use_cayley_neumann": False, "block_share": True},
    ),
    "oft constrained": (
        "OFTConfig",
        llama,
        {"target_modules": LLAMA, "oft_block_size": 7, "coft": True, "eps": 0.5, "num_cayley_neumann_terms": 3},
    ),
}


def ours(case, model=None, **more):
    name, factory, options = CASES[case]
    return minipeft.get_adapter_model(
        factory() if model is None else model, getattr(minipeft, name)(**{**options, **more})
    )


def theirs(case, model=None, **more):
    """PEFT's model of a case; its configuration object is PEFT's to change, so it gets a copy."""
    name, factory, options = CASES[case]
    with foreign_code():
        config = getattr(peft, name)(**copy.deepcopy({**options, **more}))
        return peft.get_peft_model(factory() if model is None else model, config)


def save_theirs(model, directory):
    with foreign_code():
        model.save_pretrained(directory)


def load_theirs(case, directory, **options):
    with foreign_code():
        return peft.PeftModel.from_pretrained(CASES[case][1](), directory, **options)


def their_logits(model):
    with foreign_code():
        return logits(model.eval())


def gradients(model, ids=None):
    """Loss of one batch, and the gradients by the key in a file; the model is left in eval mode."""
    ids = token_ids() if ids is None else ids
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


__all__ = [
    "CASES",
    "disturb",
    "gradients",
    "load_theirs",
    "logits",
    "ours",
    "save_theirs",
    "their_logits",
    "theirs",
    "torch",
]

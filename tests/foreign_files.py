"""Adapters as other tools write them, made by hand after those tools' sources, with the updates that they stand for.

Each maker fills a folder and returns {module name: update of its weight in float64}, by the tool's own formula.
"""

import json

import torch
import yaml
from safetensors.torch import save_file
from tiny_models import llama
from torch import nn

HEADS, GROUPS, SIZE = 4, 2, 8  # of the tiny llama


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4


def write_json(folder, **values):
    (folder / "adapter_config.json").write_text(json.dumps(values))


class Parts(nn.Module):
    """Layers under the kinds of names that a part of a diffusers pipeline has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = {"to_q": nn.Linear(8, 12), "to_out": nn.ModuleList([nn.Linear(12, 8)]), "conv_in": nn.Conv2d(3, 8, 3)}
        self.down_blocks = nn.ModuleList([nn.ModuleDict(block)])
        self.conv_in = nn.Conv2d(2, 4, 1)
        self.double()


def llm():
    return llama().double()


def mlx(folder):
    """mlx_lm/tuner/lora.py: fuse() adds (scale * lora_b.T) @ lora_a.T; an embedding adds scale * lora_a @ lora_b."""
    tensors, updates = {}, {}
    layers = {"model.layers.1.self_attn.q_proj": (32, 32), "model.layers.0.mlp.down_proj": (64, 32)}
    for seed, (name, (inner, outer)) in enumerate({**layers, "model.embed_tokens": (100, 32)}.items()):
        a, b = draw(seed, inner, 4), draw(seed + 50, 4, outer)
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        update = 20.0 * a.double() @ b.double()
        updates[name] = update if "embed" in name else update.T
    save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    write_json(folder, fine_tune_type="lora", num_layers=2, lora_parameters=parameters, model="org/base", seed=0)
    return updates


def torchtune(folder):
    """torchtune/models/convert_weights.py: features 2 i and 2 i + 1 of a head there are i and i + size / 2 here."""
    order = [
        SIZE * head + (2 * j if j < SIZE // 2 else 2 * (j - SIZE // 2) + 1)
        for head in range(HEADS)
        for j in range(SIZE)
    ]
    tensors, updates = {}, {}
    rows = {"attn.q_proj": 32, "attn.k_proj": 16, "attn.v_proj": 16, "attn.output_proj": 32}
    here = {"attn.q_proj": "q_proj", "attn.k_proj": "k_proj", "attn.v_proj": "v_proj", "attn.output_proj": "o_proj"}
    for seed, (name, count) in enumerate(rows.items()):
        a, b = draw(seed, 4, 32), draw(seed + 50, count, 4)
        tensors |= {f"layers.1.{name}.lora_a.weight": a, f"layers.1.{name}.lora_b.weight": b}
        update = 16 / 4 * b.double() @ a.double()
        updates[f"model.layers.1.self_attn.{here[name]}"] = update[order[:count]] if seed < 2 else update
    a, b = draw(9, 4, 32), draw(59, 64, 4)
    tensors |= {"layers.0.mlp.w3.lora_a.weight": a, "layers.0.mlp.w3.lora_b.weight": b}
    updates["model.layers.0.mlp.up_proj"] = 4 * b.double() @ a.double()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder, r=4, lora_alpha=16, target_modules=["q_proj", "w3"], peft_type="LORA")
    base = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(base))
    return updates


def litgpt(folder):
    """litgpt/lora.py, LoRAQKVLinear: the ranks of q and v one under the other in A, their rows one under the other in B."""
    A, B = draw(0, 8, 32), draw(1, 48, 4)
    a, b = draw(2, 4, 64), draw(3, 32, 4)
    tensors = {"transformer.h.1.attn.qkv.lora_A": A, "transformer.h.1.attn.qkv.lora_B": B}
    tensors |= {"transformer.h.0.mlp.proj.lora_A": a, "transformer.h.0.mlp.proj.lora_B": b}
    save_file(tensors, folder / "lit.safetensors")
    training = {
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_query": True,
        "lora_key": False,
        "lora_value": True,
    }
    model = {"name": "Tiny", "mlp_class_name": "LLaMAMLP", "n_head": HEADS, "n_query_groups": GROUPS, "head_size": SIZE}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(training))
    (folder / "model_config.yaml").write_text(yaml.safe_dump({**model, "n_embd": 32}))
    A, B = A.double(), B.double()
    return {
        "model.layers.1.self_attn.q_proj": 2 * B[:32] @ A[:4],
        "model.layers.1.self_attn.v_proj": 2 * B[32:] @ A[4:],
        "model.layers.0.mlp.down_proj": 2 * b.double() @ a.double(),
    }


def kohya(folder):
    """sd-scripts networks/lora.py, merge_to(): up @ down * alpha / rank; LyCORIS's lora_mid stands between the two."""
    q = (draw(0, 4, 8), draw(1, 12, 4))
    out = (draw(2, 2, 12), draw(3, 8, 2))
    conv = (draw(4, 4, 3, 1, 1), draw(5, 4, 4, 3, 3), draw(6, 8, 4, 1, 1))
    names = ("lora_unet_down_blocks_0_to_q", "lora_unet_down_blocks_0_to_out_0", "lora_unet_down_blocks_0_conv_in")
    tensors = {
        f"{names[0]}.lora_down.weight": q[0],
        f"{names[0]}.lora_up.weight": q[1],
        f"{names[0]}.alpha": torch.tensor(2.0),
    }
    tensors |= {f"{names[1]}.lora_down.weight": out[0], f"{names[1]}.lora_up.weight": out[1]}
    tensors |= {f"{names[2]}.lora_{end}.weight": t for end, t in zip(("down", "mid", "up"), conv, strict=True)}
    tensors[f"{names[2]}.alpha"] = torch.tensor(1.0)
    save_file(tensors, folder / "my_style.safetensors", {"ss_network_dim": "4"})
    down, mid, up = (t.double() for t in conv)
    return {
        "down_blocks.0.to_q": 2 / 4 * q[1].double() @ q[0].double(),
        "down_blocks.0.to_out.0": out[1].double() @ out[0].double(),
        "down_blocks.0.conv_in": 1 / 4 * torch.einsum("oa,abkl,bi->oikl", up[..., 0, 0], mid, down[..., 0, 0]),
    }


def loha(folder):
    """lycoris/functional/loha.py: (w1_a w1_b) o (w2_a w2_b) * alpha / rank."""
    shapes = {"hada_w1_a": (12, 4), "hada_w1_b": (4, 8), "hada_w2_a": (12, 4), "hada_w2_b": (4, 8)}
    factors = {end: draw(seed, *shape) for seed, (end, shape) in enumerate(shapes.items())}
    tensors = {f"lycoris_down_blocks_0_to_q.{end}": t for end, t in factors.items()}
    save_file({**tensors, "lycoris_down_blocks_0_to_q.alpha": torch.tensor(2.0)}, folder / "loha.safetensors")
    a, b, c, d = (t.double() for t in factors.values())
    return {"down_blocks.0.to_q": 2 / 4 * (a @ b) * (c @ d)}


def lokr(folder):
    """lycoris/functional/lokr.py: kron(w1, w2_a w2_b) * alpha / rank; two whole factors are not scaled."""
    w1, a, b = draw(0, 2, 2), draw(1, 6, 1), draw(2, 1, 4)
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}
    whole = {"lokr_w1": draw(3, 2, 2), "lokr_w2": draw(4, 4, 6), "alpha": torch.tensor(7.0)}
    stored = {f"lycoris_down_blocks_0_to_q.{end}": t for end, t in tensors.items()}
    stored |= {f"lycoris_down_blocks_0_to_out_0.{end}": t for end, t in whole.items()}
    save_file(stored, folder / "lokr.safetensors")
    return {
        "down_blocks.0.to_q": 3 * torch.kron(w1.double(), a.double() @ b.double()),
        "down_blocks.0.to_out.0": torch.kron(whole["lokr_w1"].double(), whole["lokr_w2"].double()),
    }


def _along(core, up, down):
    """lycoris/functional/general.py, rebuild_tucker(): up (r, out) and down (r, in) around a core (r, r, *kernel)."""
    return torch.einsum("ij...,ip,jq->pq...", core.double(), up.double(), down.double())


def loha_with_cores(folder):
    """lycoris/functional/loha.py: each half is rebuilt around its core; a kernel of size 1 has none."""
    shapes = {"hada_t1": (2, 2, 3, 3), "hada_w1_a": (2, 8), "hada_w1_b": (2, 3)}
    shapes |= {"hada_t2": (2, 2, 3, 3), "hada_w2_a": (2, 8), "hada_w2_b": (2, 3)}
    conv = {end: draw(seed, *shape) for seed, (end, shape) in enumerate(shapes.items())}
    shapes = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 2), "hada_w2_a": (4, 2), "hada_w2_b": (2, 2)}
    point = {end: draw(seed + 9, *shape) for seed, (end, shape) in enumerate(shapes.items())}
    stored = {f"lora_unet_down_blocks_0_conv_in.{end}": t for end, t in conv.items()}
    stored |= {f"lora_unet_conv_in.{end}": t for end, t in point.items()}
    save_file({**stored, "lora_unet_conv_in.alpha": torch.tensor(1.0)}, folder / "loha.safetensors")
    one, two = (_along(conv[f"hada_t{i}"], conv[f"hada_w{i}_a"], conv[f"hada_w{i}_b"]) for i in "12")
    a, b, c, d = (t.double() for t in point.values())
    return {"down_blocks.0.conv_in": one * two, "conv_in": (0.5 * (a @ b) * (c @ d))[..., None, None]}


def lokr_of_kernels(folder):
    """lycoris/functional/lokr.py: kron of w1 and a kernel, which is w2 as it is, or rebuilt around a core."""
    w1, core, a, b = draw(0, 2, 1), draw(1, 1, 1, 3, 3), draw(2, 1, 4), draw(3, 1, 3)
    tensors = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}
    whole = {"lokr_w1": draw(4, 2, 1), "lokr_w2": draw(5, 2, 2, 1, 1)}
    stored = {f"lora_unet_down_blocks_0_conv_in.{end}": t for end, t in tensors.items()}
    save_file({**stored, **{f"lora_unet_conv_in.{end}": t for end, t in whole.items()}}, folder / "lokr.safetensors")
    left = w1.double()[..., None, None]
    return {
        "down_blocks.0.conv_in": 3 * torch.kron(left, _along(core, a, b)),
        "conv_in": torch.kron(whole["lokr_w1"].double()[..., None, None], whole["lokr_w2"].double()),
    }


def lokr_without_cores(folder):
    """lycoris/functional/lokr.py: without a core w2_b has the columns of all positions of the kernel."""
    w1, a, b = draw(0, 2, 1), draw(1, 4, 1), draw(2, 1, 27)
    q1, q = draw(3, 2, 2), (draw(4, 6, 1), draw(5, 1, 4))
    stored = {"down_blocks_0_conv_in.lokr_w1": w1, "down_blocks_0_conv_in.lokr_w2_a": a}
    stored |= {"down_blocks_0_conv_in.lokr_w2_b": b, "down_blocks_0_to_q.lokr_w1": q1}
    stored |= {"down_blocks_0_to_q.lokr_w2_a": q[0], "down_blocks_0_to_q.lokr_w2_b": q[1]}
    save_file({f"lora_unet_{key}": t for key, t in stored.items()}, folder / "lokr.safetensors")
    return {
        "down_blocks.0.conv_in": torch.kron(w1.double(), a.double() @ b.double()).view(8, 3, 3, 3),
        "down_blocks.0.to_q": torch.kron(q1.double(), q[0].double() @ q[1].double()),
    }


def diffusers(folder):
    """diffusers/loaders/lora_base.py, _pack_dict_with_prefix(): PEFT's keys and configuration behind ``unet.``"""
    q, conv = (draw(0, 4, 8), draw(1, 12, 4)), (draw(2, 4, 2, 1, 1), draw(3, 4, 4, 1, 1))
    tensors = {"unet.down_blocks.0.to_q.lora_A.weight": q[0], "unet.down_blocks.0.to_q.lora_B.weight": q[1]}
    tensors |= {"unet.conv_in.lora_A.weight": conv[0], "unet.conv_in.lora_B.weight": conv[1]}
    values = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"conv_in": 2}, "target_modules": ["to_q", "conv_in"]}
    text = json.dumps({f"unet.{key}": value for key, value in values.items()})
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", {"format": "pt", "lora_adapter_metadata": text})
    update = conv[1].double()[..., 0, 0] @ conv[0].double()[..., 0, 0]
    return {"down_blocks.0.to_q": 2 * q[1].double() @ q[0].double(), "conv_in": 2 / 4 * update[..., None, None]}


def diffusers_before_peft(folder):
    """diffusers/utils/state_dict_utils.py, DIFFUSERS_OLD: the layer stands in the name of the attention's processor."""
    q, out = (draw(0, 4, 8), draw(1, 12, 4)), (draw(2, 4, 12), draw(3, 8, 4))
    first = "unet.down_blocks.0.processor"
    tensors = {f"{first}.to_q_lora.down.weight": q[0], f"{first}.to_q_lora.up.weight": q[1]}
    tensors |= {f"{first}.to_out_lora.down.weight": out[0], f"{first}.to_out_lora.up.weight": out[1]}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})
    return {
        "down_blocks.0.to_q": q[1].double() @ q[0].double(),
        "down_blocks.0.to_out.0": out[1].double() @ out[0].double(),
    }


MAKERS = {
    **{maker.__name__: (maker, llm) for maker in (mlx, torchtune, litgpt)},
    **{maker.__name__: (maker, Parts) for maker in (kohya, loha, lokr, diffusers, diffusers_before_peft)},
    **{maker.__name__: (maker, Parts) for maker in (loha_with_cores, lokr_of_kernels, lokr_without_cores)},
}

"""litgpt's adapters of models whose layers transformers has joined or split, against litgpt's formula in float64.

What the formula says was compared with litgpt 0.5.13 (``attn.qkv``) and 0.5.3 (``attn.attn``) themselves: their merged and
converted weights, for each family here, differ from those of this file by rounding only.
"""

import pytest
import torch
import yaml
from foreign_files import draw
from safetensors.torch import save_file
from tiny_models import foreign_code

import minipeft

with foreign_code():
    import transformers

R, WIDTH, INNER, COUNT, SIZE = 3, 32, 48, 4, 8
SMALL = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": COUNT,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": INNER}
FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": INNER}
# family -> (litgpt's name and class of the MLP, transformers' class, its options, query groups)
FAMILIES = {
    "llama": ("Tiny-Llama", "LLaMAMLP", "Llama", {}, 2),
    "phi": ("phi-2", "GptNeoxMLP", "Phi", {}, 2),
    "phi3": ("Phi-3-mini", "LLaMAMLP", "Phi3", {}, 2),
    "pythia": ("pythia-14m", "GptNeoxMLP", "GPTNeoX", {}, COUNT),
    "falcon": ("falcon-40b", "GptNeoxMLP", "Falcon", FALCON, 2),
    "mixtral": ("Mixtral-8x7B", "LLaMAMoE", "Mixtral", EXPERTS, 2),
    "qwen3": ("Qwen3-30B-A3B", "LLaMAMoE", "Qwen3Moe", {**EXPERTS, "head_dim": SIZE}, 2),
}


def made(family):
    _, _, name, options, _ = FAMILIES[family]
    with foreign_code():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SMALL, **options)
        return getattr(transformers, f"{name}ForCausalLM")(config).double().eval()


class File:
    """What a run of litgpt writes, tensor by tensor, with the update of each layer under its name there."""

    def __init__(self, family, adapted):
        self.name, self.mlp, _, _, self.groups = FAMILIES[family]
        self.adapted, self.tensors, self.updates = adapted, {}, {}

    def pair(self, layer, inputs, outputs):
        A, B = draw(len(self.tensors), R, inputs), draw(len(self.tensors) + 50, outputs, R)
        self.tensors |= {f"{layer}.lora_A": A, f"{layer}.lora_B": B}
        self.updates[layer] = 2 * B.double() @ A.double()

    def qkv(self, layer):
        """conv1d() multiplies each third with its own; zero_pad() puts the rows where they belong."""
        sizes = [COUNT * SIZE, self.groups * SIZE, self.groups * SIZE]
        own = [sizes[place] for place in self.adapted]
        A, B = draw(7, R * len(own), WIDTH), draw(8, sum(own), R)
        self.tensors |= {f"{layer}.lora_A": A, f"{layer}.lora_B": B}
        products = [2 * b.double() @ a.double() for a, b in zip(A.split(R), B.split(own), strict=True)]
        starts = [0, sizes[0], sizes[0] + sizes[1]]
        whole = torch.zeros(sum(sizes), WIDTH, dtype=torch.float64)
        for place, product in zip(self.adapted, products, strict=True):
            whole[starts[place] : starts[place] + sizes[place]] = product
        self.updates[layer] = whole.split(sizes)

    def write(self, folder):
        save_file(self.tensors, folder / "lit.safetensors")
        flags = {name: place in self.adapted for place, name in enumerate(("lora_query", "lora_key", "lora_value"))}
        model = {"name": self.name, "mlp_class_name": self.mlp, "n_head": COUNT, "n_embd": WIDTH}
        (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({"lora_r": R, "lora_alpha": 2 * R, **flags}))
        (folder / "model_config.yaml").write_text(yaml.safe_dump({**model, "n_query_groups": self.groups}))


def together(q, k, v, groups):
    """qkv_reassemble(): a query group's heads, its key, its value, and then the next group."""
    parts = [[part.chunk(groups)[group] for part in (q, k, v)] for group in range(groups)]
    return torch.cat([part for group in parts for part in group])


def changes(model, folder):
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged = minipeft.load_adapter(model, folder).merge_and_unload()
    after = {name: p - before[name] for name, p in merged.named_parameters()}
    return {name.removesuffix(".weight"): change for name, change in after.items() if change.abs().max() > 0}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name].detach(), update, rtol=1e-6, atol=1e-9)


@pytest.mark.each_value
@pytest.mark.parametrize("adapted", [(0, 2), (0, 1, 2), (1,)], ids=["q v", "q k v", "k"])
@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "pythia", "falcon"])
def test_a_dense_model_gets_the_update_that_litgpt_merges(family, adapted, tmp_path):
    file, layer = File(family, adapted), "transformer.h.1"
    file.qkv(f"{layer}.attn.qkv")
    file.pair(f"{layer}.attn.proj", WIDTH, WIDTH)
    gated = file.mlp == "LLaMAMLP"
    for name in ("fc_1", "fc_2") if gated else ("fc",):
        file.pair(f"{layer}.mlp.{name}", WIDTH, INNER)
    file.pair(f"{layer}.mlp.proj", INNER, WIDTH)
    file.pair("lm_head", WIDTH, 96)
    file.write(tmp_path)
    model = made(family)
    own = {name.removeprefix(f"{layer}."): update for name, update in file.updates.items()}
    q, k, v = own["attn.qkv"]
    expected = {"lm_head": own["lm_head"]}
    if family in ("llama", "phi"):
        first = "model.layers.1"
        parts = {"q_proj": q, "k_proj": k, "v_proj": v}
        expected |= {f"{first}.self_attn.{name}": part for name, part in parts.items() if part.abs().max() > 0}
        names = {"mlp.proj": "mlp.down_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj"}
        if family == "phi":
            names = {"mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"}
        names["attn.proj"] = "self_attn.o_proj" if family == "llama" else "self_attn.dense"
        expected |= {f"{first}.{name}": own[old] for old, name in names.items()}
    elif family == "phi3":
        expected |= {
            "model.layers.1.self_attn.qkv_proj": torch.cat([q, k, v]),
            "model.layers.1.self_attn.o_proj": own["attn.proj"],
            "model.layers.1.mlp.gate_up_proj": torch.cat([own["mlp.fc_1"], own["mlp.fc_2"]]),
            "model.layers.1.mlp.down_proj": own["mlp.proj"],
        }
    else:
        first = "gpt_neox.layers.1.attention" if family == "pythia" else "transformer.h.1.self_attention"
        expected |= {
            f"{first}.query_key_value": together(q, k, v, file.groups),
            f"{first}.dense": own["attn.proj"],
            f"{first.rpartition('.')[0]}.mlp.dense_h_to_4h": own["mlp.fc"],
            f"{first.rpartition('.')[0]}.mlp.dense_4h_to_h": own["mlp.proj"],
        }
    same(changes(model, tmp_path), expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
def test_the_experts_of_litgpt_become_those_of_one_parameter(family, tmp_path):
    file, layer, experts = File(family, (0,)), "transformer.h.0", "model.layers.0.mlp.experts"
    file.pair(f"{layer}.mlp.gate", WIDTH, 3)
    for expert in range(3):
        for name, shape in {"fc_1": (WIDTH, INNER), "fc_2": (WIDTH, INNER), "proj": (INNER, WIDTH)}.items():
            file.pair(f"{layer}.mlp.experts.{expert}.{name}", *shape)
    file.write(tmp_path)
    fc_1, fc_2, down = (
        torch.stack([file.updates[f"{layer}.mlp.experts.{expert}.{name}"] for expert in range(3)])
        for name in ("fc_1", "fc_2", "proj")
    )
    gate = {"model.layers.0.mlp.gate": file.updates[f"{layer}.mlp.gate"]}
    fused = {f"{experts}.gate_up_proj": torch.cat([fc_1, fc_2], 1), f"{experts}.down_proj": down}
    same(changes(made(family), tmp_path), gate | fused)


@pytest.mark.parametrize("adapted", [(0, 2), (0, 1, 2)], ids=["q v", "q k v"])
def test_adapters_from_before_0_5_5_of_all_three_have_the_rows_of_a_weight_in_groups(adapted, tmp_path):
    """Its zero_pad() returns the product as it is if all three are adapted, and the weight has each group together."""
    file = File("llama", adapted)
    file.qkv("transformer.h.1.attn.attn")
    file.write(tmp_path)
    q, k, v = file.updates["transformer.h.1.attn.attn"]
    if len(adapted) == 3:
        rows = torch.cat([q, k, v]).chunk(file.groups)  # of one group: its part of q, its k, its v
        per = COUNT // file.groups * SIZE
        groups = [group.split([per, SIZE, SIZE]) for group in rows]
        q, k, v = (torch.cat(parts) for parts in zip(*groups, strict=True))
    first = "model.layers.1.self_attn"
    parts = {f"{first}.q_proj": q, f"{first}.k_proj": k, f"{first}.v_proj": v}
    same(changes(made("llama"), tmp_path), {name: part for name, part in parts.items() if part.abs().max() > 0})


def test_a_gate_without_its_other_half_is_refused(tmp_path):
    file = File("phi3", (0, 2))
    file.pair("transformer.h.0.mlp.fc_1", WIDTH, INNER)
    file.write(tmp_path)
    with pytest.raises(minipeft.CheckpointError, match=r"mlp\.fc_2\.lora_A .* not a pair"):
        minipeft.load_adapter(made("phi3"), tmp_path)

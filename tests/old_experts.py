"""Tiny mixtures of experts of many families, and adapter files for them with the names that transformers 4 had."""

import json

import torch
import transformers
from fast_copy import Template
from safetensors.torch import save_file
from tiny_models import foreign_code
from torch import nn

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
SIZES |= {"num_experts_per_tok": 2, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
QWEN, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
DEEPSEEK = {"intermediate_size": 12, "moe_intermediate_size": 8, "n_routed_experts": 4, "n_shared_experts": 1}
DEEPSEEK |= {"topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
}
# Family -> (class, its config's class, its sizes, the module around the experts in transformers 4, gate, up and down there)
FAMILIES = {
    "mixtral": ("MixtralForCausalLM", {"intermediate_size": 12, "num_local_experts": 3}, "block_sparse_moe", MIXTRAL),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {"moe_intermediate_size": 12, "num_experts": 4, "head_dim": 8, "intermediate_size": 12},
        "mlp",
        QWEN,
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {"moe_intermediate_size": 12, "num_experts": 4, "intermediate_size": 12, "shared_expert_intermediate_size": 10},
        "mlp",
        QWEN,
    ),
    "olmoe": ("OlmoeForCausalLM", {"intermediate_size": 8, "num_experts": 4}, "mlp", QWEN),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK | LATENT, "mlp", QWEN),
    "phimoe": ("PhimoeForCausalLM", {"intermediate_size": 12, "num_local_experts": 4}, "block_sparse_moe", MIXTRAL),
    "jamba": (
        "JambaForCausalLM",
        {"intermediate_size": 12, "num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        "feed_forward",
        QWEN,
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", DEEPSEEK | {"n_group": 1, "head_dim": 8}, "mlp", QWEN),
    "minimax": (
        "MiniMaxForCausalLM",
        {"intermediate_size": 12, "num_local_experts": 3, "head_dim": 8},
        "block_sparse_moe",
        MIXTRAL,
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {
            "intermediate_size": 12,
            "moe_intermediate_size": 8,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_layer_start_index": 1,
        },
        "mlp",
        QWEN,
    ),
    "hunyuan": (
        "HunYuanMoEV1ForCausalLM",
        {"intermediate_size": 12, "num_experts": 4, "moe_topk": 2, "head_dim": 8},
        "mlp",
        QWEN,
    ),
    "flex_olmo": ("FlexOlmoForCausalLM", {"intermediate_size": 8, "num_experts": 4}, "mlp", QWEN),
    "dots1": ("Dots1ForCausalLM", DEEPSEEK | {"n_group": 1}, "mlp", QWEN),
}


_models = {}


def made(model_class, config):
    """A model, always the same; copied, as making one takes ten times as long."""
    key = model_class, config.to_json_string(use_diff=False)
    if key not in _models:
        _models[key] = Template(_new(model_class, config))
    return _models[key].copy()


def _new(model_class, config):
    """A model whose parameters all matter."""
    with foreign_code(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


def mixture(family, **more):
    name, sizes, _, _ = FAMILIES[family]
    model_class = getattr(transformers, name)
    return made(model_class, model_class.config_class(**(SIZES | sizes | more)))


def gpt_oss(**more):
    """Its experts were fused in transformers 4, too."""
    sizes = {"intermediate_size": 12, "num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    return made(transformers.GptOssForCausalLM, transformers.GptOssConfig(**(SIZES | sizes | more)))


class OldFile:
    """The tensors of an adapter file, and the update of each parameter of today's model in float64."""

    def __init__(self, r=2, lora_alpha=3, use_rslora=False, seed=5):
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors, self.updates = {}, {}

    def pair(self, name, rows, columns, r=None, lora_alpha=None):
        """Add a pair; returns its update."""
        r, lora_alpha = r or self.r, lora_alpha or self.lora_alpha
        A, B = (torch.randn(shape, generator=self.generator) * 0.3 for shape in ((r, columns), (rows, r)))
        self.tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        return (B.double() @ A.double()) * lora_alpha / (r**0.5 if self.use_rslora else r)

    def experts(self, name, experts, around, layers, only=None, **options):
        """Add the experts of one stack; `options` may give another r and lora_alpha for an old name, by its ending."""
        number, rows, columns = experts.gate_up_proj.shape
        gate_up, down = torch.zeros(number, rows, columns).double(), torch.zeros(experts.down_proj.shape).double()
        parts = (gate_up[:, : rows // 2], gate_up[:, rows // 2 :], down)
        for expert in range(number):
            for layer, part in zip(layers, parts, strict=True):
                old = f"{name.rpartition('.')[0].rpartition('.')[0]}.{around}.experts.{expert}.{layer}"
                if only is None or only(old):
                    more = next((value for ending, value in options.items() if old.endswith(ending)), {})
                    part[expert] = self.pair(old, *part.shape[1:], **more)
        self.updates |= {f"{name}.gate_up_proj": gate_up, f"{name}.down_proj": down}

    def save(self, directory, **config):
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, directory / "adapter_model.safetensors", {"format": "pt"})
        values = {"peft_type": "LORA", "r": self.r, "lora_alpha": self.lora_alpha, "use_rslora": self.use_rslora}
        values |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": None, **config}
        (directory / "adapter_config.json").write_text(json.dumps(values))
        return directory

    def into(self, model):
        """The model with the updates in its weights."""
        with torch.no_grad():
            for name, update in self.updates.items():
                parameter = model.get_parameter(name)
                parameter.copy_((parameter.double() + update).float())
        return model


def stacks(model):
    return {
        name: module for name, module in model.named_modules() if hasattr(module, "gate_up_proj") and "experts" in name
    }


def old_file(model, family, *, linear=("q_proj",), **options):
    """A file that adapts the experts, all that has the names of their layers, and these linear layers."""
    _, _, around, layers = FAMILIES[family]
    file = OldFile(**options)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            file.experts(name, module, around, layers)
        elif isinstance(module, nn.Linear) and name.rpartition(".")[2] in (*layers, *linear):
            file.updates[f"{name}.weight"] = file.pair(name, *module.weight.shape)
    return file, [*layers, *linear]


def logits(model):
    ids = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), foreign_code():
        return model(input_ids=ids).logits

"""Other places of experts: lists that Unsloth made, experts without a gate, stacks of an old name, a model within a model."""

import pytest
import torch
import transformers
from old_experts import DEEPSEEK, QWEN, SIZES, OldFile, logits, made, stacks
from tiny_models import state_digest
from torch import nn

from minipeft import CheckpointError, load_adapter

pytest.importorskip("transformers.conversion_mapping")
OF_EXPERTS = r".*\.experts\.\d+\.(gate|up|down)_proj"


def check(make, fill, directory, **config):
    file = OldFile()
    fill(file, make())
    file.save(directory / "old", **config)
    expected = logits(file.into(make()))
    assert (expected - logits(make())).abs().max() > 0.1
    model = load_adapter(make(), directory / "old")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.save_pretrained(directory / "again")
    again = load_adapter(make(), directory / "again")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)


def test_the_lists_of_layers_that_unsloth_makes_of_gpt_oss(tmp_path):
    """Gate and up alternate there, in the layers as in the parameter, which is stored as (experts, in, out)."""
    sizes = {"intermediate_size": 12, "num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    config = transformers.GptOssConfig(**(SIZES | sizes))

    def fill(file, model):
        for layer in range(2):
            name = f"model.layers.{layer}.mlp.experts"
            for parameter in ("gate_up_proj", "down_proj"):
                number, rows, columns = model.get_parameter(f"{name}.{parameter}").shape
                updates = [file.pair(f"{name}.{parameter}s.{expert}", columns, rows).T for expert in range(number)]
                file.updates[f"{name}.{parameter}"] = torch.stack(updates)

    targets = r".*\.(gate_up|down)_projs\.\d+"
    check(lambda: made(transformers.GptOssForCausalLM, config), fill, tmp_path, target_modules=targets)


def test_experts_without_a_gate_and_under_the_old_name_of_the_model(tmp_path):
    sizes = {"n_routed_experts": 4, "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 8}
    sizes |= {
        "n_group": 1,
        "topk_group": 1,
        "mamba_num_heads": 2,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 1,
    }
    sizes |= {"use_mamba_kernels": False, "head_dim": 8, "layers_block_type": ["moe", "attention", "moe"]}
    common = {key: value for key, value in SIZES.items() if key != "num_hidden_layers"}
    config = transformers.NemotronHConfig(**(common | sizes))

    def fill(file, model):
        for name, module in model.named_modules():
            for parameter in ("up_proj", "down_proj"):
                if isinstance(getattr(module, parameter, None), nn.Parameter):
                    number, *shape = getattr(module, parameter).shape
                    old = f"backbone.{name.removeprefix('model.')}"
                    updates = [file.pair(f"{old}.{expert}.{parameter}", *shape) for expert in range(number)]
                    file.updates[f"{name}.{parameter}"] = torch.stack(updates)

    check(lambda: made(transformers.NemotronHForCausalLM, config), fill, tmp_path, target_modules=OF_EXPERTS)


STACKS = {"target_modules": [], "target_parameters": ["input_linear.weight", "output_linear.weight"]}


def granite():
    config = transformers.GraniteMoeConfig(**(SIZES | {"intermediate_size": 12, "num_local_experts": 4}))
    return made(transformers.GraniteMoeForCausalLM, config)


def fill_stacks(file, model):
    """Granite's, adapted by PEFT 0.18, which took in for out."""
    for layer in range(2):
        name = f"model.layers.{layer}.block_sparse_moe"
        for parameter, old in (("gate_up_proj", "input_linear"), ("down_proj", "output_linear")):
            number, rows, columns = model.get_parameter(f"{name}.experts.{parameter}").shape
            A, B = torch.randn(2 * number, rows) * 0.3, torch.randn(columns, 2 * number) * 0.3
            key = f"base_model.model.{name}.{old}"
            file.tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
            down, up = A.double().view(number, 2, rows), B.double().view(columns, 2, number)
            file.updates[f"{name}.experts.{parameter}"] = torch.einsum("ire,ero->eoi", up, down) * 1.5


def test_stacks_that_were_modules_of_their_own(tmp_path):
    torch.manual_seed(1)
    check(granite, fill_stacks, tmp_path, **STACKS, peft_version="0.18.1")


def test_a_file_that_lacks_the_stacks_of_a_layer_is_refused(tmp_path):
    file = OldFile()
    fill_stacks(file, granite())
    file.tensors = {key: tensor for key, tensor in file.tensors.items() if ".layers.1." not in key}
    file.save(tmp_path, **STACKS, peft_version="0.18.1")
    with pytest.raises(CheckpointError, match=r"lacks 'model.layers.1.block_sparse_moe.input_linear'.* selects"):
        load_adapter(granite(), tmp_path)


def glm4v():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    text = SIZES | DEEPSEEK | {"n_group": 1, "head_dim": 8, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    return made(
        transformers.Glm4vMoeForConditionalGeneration,
        transformers.Glm4vMoeConfig(text_config=text, vision_config=vision),
    )


@pytest.mark.parametrize("prefix", ["model.language_model.layers", "model.layers"])
def test_experts_of_the_text_model_within_a_multimodal_one(prefix, tmp_path):
    def fill(file, model):
        for name, module in stacks(model).items():
            file.experts(name, module, "mlp", QWEN)
        file.tensors = {key.replace("model.language_model.layers", prefix): t for key, t in file.tensors.items()}

    check(glm4v, fill, tmp_path, target_modules=OF_EXPERTS)


class Twice(nn.Module):
    """Two towers whose experts have names that end alike."""

    base_model_prefix = ""

    def __init__(self):
        super().__init__()
        self.config = transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=12, num_experts=4, head_dim=8)
        self.left, self.right = (made(transformers.Qwen3MoeModel, self.config) for _ in range(2))


def test_experts_that_may_be_those_of_two_towers_are_refused_with_both_names(tmp_path):
    model, file = Twice(), OldFile()
    for name, module in stacks(model.left).items():
        file.experts(f"model.{name}", module, "mlp", QWEN)
    file.save(tmp_path, target_modules=list(QWEN))
    before = state_digest(model)
    with pytest.raises(
        CheckpointError, match=r"can be 'left.layers.0.mlp.experts.*', 'right.layers.0.*Nothing was changed"
    ):
        load_adapter(model, tmp_path)
    assert state_digest(model) == before

"""What ``target_modules="all-linear"`` leaves out, and a list that names parts of experts, is named in one warning with the reason."""

import copy
import warnings

import pytest
import torch
from old_experts import gpt_oss, mixture
from tiny_models import foreign_code, gpt2, gpt2_classifier, llama
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from transformers import MixtralConfig, MixtralForCausalLM

from minipeft import LoraConfig, TargetError, get_lora_model
from minipeft.injection.module_tree import adapted_layers

ALL = LoraConfig(r=2, target_modules="all-linear")


def mlps(model):
    return [getattr(layer.mlp, name) for layer in model.model.layers for name in ("gate_proj", "up_proj", "down_proj")]


def float8(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


class LinearOfAnotherPackage(nn.Module):
    """As GPTQ's and AWQ's: not an nn.Linear, and the weight packed into a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))

    def forward(self, x):
        return torch.zeros(*x.shape[:-1], 48)


CHANGES = {
    "float8": (float8, "6 Linear (its weight is float8_e4m3fn) such as model.layers.0.mlp.gate_proj."),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "6 Linear (its weight is computed"),
    "weight norm": (weight_norm, "6 ParametrizedLinear (its weight is computed"),
    "old weight norm": (nn.utils.weight_norm, "6 Linear (its weight is computed"),
}


def said(model, config=ALL):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = get_lora_model(model, config)
    return [str(warning.message) for warning in caught if "minipeft" in warning.filename], adapted


@pytest.mark.parametrize("kind", CHANGES)
def test_layers_with_an_unusual_weight_are_named(kind):
    model, (change, expected) = llama(), CHANGES[kind]
    with foreign_code():
        for layer in mlps(model):
            change(layer)
    messages, adapted = said(model)
    assert len(messages) == 1
    assert messages[0].startswith("target_modules='all-linear' leaves out ")
    assert expected in messages[0]
    assert "lm_head" not in messages[0]
    assert len(list(adapted_layers(adapted))) == 8


def test_a_linear_layer_of_a_package_that_is_not_known_is_named():
    model = llama()
    model.model.layers[1].mlp.gate_proj = LinearOfAnotherPackage()
    assert said(model)[0] == [
        "target_modules='all-linear' leaves out 1 LinearOfAnotherPackage (no weight that minipeft can read; see "
        "register_layer) such as model.layers.1.mlp.gate_proj."
    ]


def test_quantized_layers_that_are_not_known_are_named():
    torchao = pytest.importorskip("torchao.quantization")
    model = llama()
    with foreign_code():
        torchao.quantize_(
            model,
            torchao.Float8WeightOnlyConfig(),
            filter_fn=lambda layer, name: "mlp" in name and isinstance(layer, nn.Linear),
        )
    assert said(model)[0] == [
        "target_modules='all-linear' leaves out 6 Linear (its weight is a Float8Tensor; see register_layer) such as "
        "model.layers.0.mlp.gate_proj."
    ]


def test_attention_that_reads_its_weights_is_named_without_its_parts():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    )
    assert said(model)[0] == [
        "target_modules='all-linear' leaves out 2 MultiheadAttention (read and not called; target_modules can name it) "
        "such as layers.0.self_attn."
    ]


def mixtral():
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    return MixtralForCausalLM(config)


def test_fused_experts_are_named_unless_they_are_adapted():
    model = mixtral()
    messages = said(copy.deepcopy(model))[0]
    assert len(messages) == 1
    assert "2 MixtralExperts (fused; target_parameters can name gate_up_proj and down_proj)" in messages[0]
    names = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    assert said(model, LoraConfig(r=2, target_modules="all-linear", target_parameters=names))[0] == []


def packed(module, *names):
    """Hold parameters as a quantizer does: integers that no adapter can change."""
    for name in names:
        setattr(module, name, nn.Parameter(getattr(module, name).detach().to(torch.uint8), requires_grad=False))
    return module


def test_no_bias_and_no_packed_parameter_of_experts_is_advised():
    model = gpt_oss()
    assert (
        "2 GptOssExperts (fused; target_parameters can name gate_up_proj and down_proj)"
        in said(copy.deepcopy(model))[0][0]
    )
    for layer in model.model.layers:
        packed(layer.mlp.experts, "gate_up_proj", "down_proj")
    (message,) = said(model)[0]
    assert "2 GptOssExperts (fused; no weight that minipeft can read; see register_layer)" in message


def test_no_packed_parameter_of_a_layer_is_advised():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)

    model = nn.ModuleDict({"q": Packed()})
    with pytest.raises(TargetError, match=r"no LayerOps for .*Packed; .* See register_layer\. Nothing"):
        get_lora_model(model, LoraConfig(target_modules=["q"]))


EXPERTS_LEFT_OUT = {
    "a name of the shared experts": ("qwen2_moe", {"target_modules": ["q_proj", "gate_proj"]}, 2),
    "a name of a dense layer": ("deepseek_v3", {"target_modules": ["o_proj", "down_proj"]}, 1),
    "a regular expression": ("qwen2_moe", {"target_modules": r".*\.(q_proj|down_proj)"}, 2),
    "one layer": ("qwen2_moe", {"target_modules": ["down_proj"], "layers_to_transform": [1]}, 1),
    "longer names": ("qwen2_moe", {"target_modules": ["q_proj", "shared_expert.down_proj"]}, 0),
    "a longer expression": ("qwen2_moe", {"target_modules": r".*\.shared_expert\.\w+_proj"}, 0),
    "excluded": ("qwen2_moe", {"target_modules": ["down_proj"], "exclude_modules": ["experts"]}, 0),
    "another layer": ("deepseek_v3", {"target_modules": ["down_proj"], "layers_to_transform": [0]}, 0),
    "adapted": ("qwen2_moe", {"target_modules": ["down_proj"], "target_parameters": ["experts.down_proj"]}, 0),
    "attention": ("qwen2_moe", {"target_modules": ["q_proj", "v_proj"]}, 0),
    "defaults": ("qwen2_moe", {}, 0),
}


@pytest.mark.parametrize("case", EXPERTS_LEFT_OUT)
def test_experts_whose_parts_a_pattern_names_are_named_unless_that_is_said(case):
    family, options, count = EXPERTS_LEFT_OUT[case]
    messages = said(mixture(family), LoraConfig(r=2, **options))[0]
    assert len(messages) == bool(count)
    if count:
        kind = {"qwen2_moe": "Qwen2MoeExperts", "deepseek_v3": "DeepseekV3Experts"}[family]
        assert f"{count} {kind} (fused; target_parameters can name gate_up_proj and down_proj)" in messages[0]
        assert "exclude_modules=['experts']" in messages[0]


def test_what_is_left_out_on_purpose_is_not_named():
    for make in (gpt2, gpt2_classifier, llama):
        assert said(make())[0] == []
    model = llama()
    for layer in mlps(model):
        float8(layer)
    assert (
        said(
            copy.deepcopy(model),
            LoraConfig(target_modules="all-linear", exclude_modules=["mlp", "gate_proj", "up_proj", "down_proj"]),
        )[0]
        == []
    )
    assert said(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))[0] == []
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert "lm_head" not in said(model)[0][0]


def test_many_kinds_make_one_short_warning():
    kinds = [type(f"Linear{index}", (LinearOfAnotherPackage,), {}) for index in range(40)]
    model = nn.ModuleDict(
        {f"{'long' * 50}{i}": nn.ModuleList([kind() for _ in range(50)]) for i, kind in enumerate(kinds)}
    )
    model["plain"] = nn.Linear(4, 4)
    messages = said(model)[0]
    assert len(messages) == 1
    assert len(messages[0]) < 4000
    assert messages[0].endswith("; 32 more kinds.")


def test_the_error_of_a_base_that_cannot_be_adapted_says_why():
    model = llama()
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        float8(layer)
    with pytest.raises(TargetError, match=r"leaves no module.*14 Linear \(its weight is float8_e4m3fn\) such as model"):
        get_lora_model(model, ALL)

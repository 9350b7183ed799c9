"""Linear layers whose output is not their product, such as routers that choose by it: their weight is what can be adapted."""

import pytest
import torch
from old_experts import OldFile, mixture
from tiny_models import logits, refuses, token_ids
from torch import nn

import minipeft
from minipeft import CheckpointError, LoraConfig, StateError, TargetError, get_lora_model

IDS = token_ids() % 60


def test_a_router_is_refused_as_a_layer_and_adapted_as_a_parameter():
    model = mixture("phimoe").eval()
    config = LoraConfig(r=2, target_modules=["router"])
    refuses(TargetError, model, lambda: get_lora_model(model, config), "router", "target_parameters")
    before = logits(model, IDS)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["router.weight"], init_lora_weights=False)
    adapted = get_lora_model(model, config)
    y = logits(adapted, IDS)
    assert not torch.allclose(y, before)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), IDS), y)


def test_all_linear_leaves_routers_out_by_name():
    with pytest.warns(UserWarning, match="PhimoeTopKRouter .*target_parameters can name its weight"):
        model = get_lora_model(mixture("phimoe"), LoraConfig(r=2, target_modules="all-linear"))
    logits(model, IDS)


def test_a_router_that_is_no_linear_layer_is_named_too():
    with pytest.warns(UserWarning, match=r"2 MixtralTopKRouter \(target_parameters can name weight\) such as"):
        get_lora_model(mixture("mixtral"), LoraConfig(r=2, target_modules="all-linear"))


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("gate", "'gate.weight'"),  # three that PEFT takes for the parameters
        ("w1", "'experts.gate_up_proj', 'experts.down_proj'"),
        ("gate_proj", "'experts.gate_up_proj', 'experts.down_proj'"),
        ("experts.down_proj", "'experts.down_proj'"),
    ],
)
def test_a_layer_that_is_a_parameter_in_this_model_is_named(target, named):
    model = mixture("mixtral")
    config = LoraConfig(r=2, target_modules=["q_proj", target])
    refuses(TargetError, model, lambda: get_lora_model(model, config), f"; target_parameters can name {named}.")
    names = [name.strip(" '") for name in named.split(",")]
    get_lora_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names))


def test_a_router_that_was_a_layer_in_transformers_4_is_read(tmp_path):
    file, model = OldFile(), mixture("phimoe").double()
    update = file.pair("model.layers.1.block_sparse_moe.gate", *model.model.layers[1].mlp.router.weight.shape)
    file.save(tmp_path, target_modules=["gate"], layers_to_transform=[1])
    before = model.model.layers[1].mlp.router.weight.clone()
    merged = minipeft.load_adapter(model, tmp_path).merge_and_unload()
    torch.testing.assert_close((merged.model.layers[1].mlp.router.weight - before).detach(), update, rtol=0, atol=1e-7)


def test_a_router_that_was_a_layer_takes_plain_lora_alone(tmp_path):
    file, model = OldFile(), mixture("phimoe")
    name = "model.layers.1.block_sparse_moe.gate"
    file.pair(name, *model.model.layers[1].mlp.router.weight.shape)
    file.tensors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.ones(4)
    file.save(tmp_path, target_modules=["gate"], layers_to_transform=[1], use_dora=True)
    named = f"dora adapts {name}, and this model has its weight as a bare parameter"
    refuses(CheckpointError, model, lambda: minipeft.load_adapter(model, tmp_path), named)


class Scores(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.topk(1).indices


def test_a_layer_that_turns_out_to_return_two_tensors_names_the_way(recwarn):
    model = nn.Sequential(Scores(4, 3))
    with pytest.raises(StateError, match=r"Scores returns a tuple.*target_parameters"):
        get_lora_model(model, LoraConfig(r=2, target_modules=["0"]))(torch.randn(2, 4))

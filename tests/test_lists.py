"""Lists of layers and of parameters, which a model takes apart instead of calling them."""

import copy

import pytest
import torch
from tiny_models import disturb, llama
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from minipeft import LoraConfig, TargetError, get_lora_model, load_adapter
from minipeft.testing.case import fingerprint


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6)])
        self.named = nn.ModuleDict({"a": nn.Linear(6, 6)})
        self.values = nn.ParameterList([nn.Parameter(torch.randn(6, 6))])
        self.tables = nn.ParameterDict({"a": nn.Parameter(torch.randn(6, 6))})
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.named["a"](x) @ self.values[0] @ self.tables["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["values"]}, "modules_to_save: values is a ParameterList"),
        ({"modules_to_save": ["tables"]}, "modules_to_save: tables is a ParameterDict"),
        ({"target_parameters": ["values.0"]}, "target_parameters: values is a ParameterList"),
        ({"target_parameters": ["tables.a"]}, "target_parameters: tables is a ParameterDict"),
    ],
)
def test_a_list_is_refused_when_adapting(options, message):
    model = Lists()
    before = fingerprint(model)
    with pytest.raises(TargetError, match=message):
        get_lora_model(model, LoraConfig(r=2, target_modules=["head"], **options))
    assert fingerprint(model) == before


def test_a_list_of_modules_trains_the_modules_in_it(tmp_path):
    plain = Lists()
    config = LoraConfig(r=2, target_modules=["head"], modules_to_save=["layers", "named"])
    model, x = get_lora_model(copy.deepcopy(plain), config), torch.randn(2, 6)
    assert torch.equal(model(x), plain(x))
    model(x).sum().backward()
    trained = [model.get_submodule(name).adapters["default"].weight for name in ("layers.0", "named.a")]
    assert all(weight.grad.any() for weight in trained)
    disturb(model).save_pretrained(tmp_path)
    assert torch.equal(load_adapter(copy.deepcopy(plain), tmp_path)(x), model(x))


@pytest.mark.parametrize("wrap", [lambda block: block, checkpoint_wrapper])
def test_the_blocks_of_a_transformer_can_be_trained(wrap, tmp_path):
    base, x = llama(), torch.arange(8).reshape(1, 8)
    base.model.layers[0] = wrap(base.model.layers[0])
    model = get_lora_model(base, LoraConfig(r=2, target_modules=["lm_head"], modules_to_save=["layers"]))
    assert torch.equal(model(x).logits, llama()(x).logits)
    disturb(model).save_pretrained(tmp_path)
    assert torch.equal(load_adapter(llama(), tmp_path)(x).logits, model(x).logits)
    with torch.no_grad():
        assert not torch.equal(model(x).logits, llama()(x).logits)

"""Two adapters of any methods on one layer, in both orders: what they compute together is what a merge writes.

Where no merge can write it, it is refused. The outputs to compare with are those of the same model, called, in float64.
"""

import functools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import minipeft
from minipeft import MergeError, MinipeftError

METHODS = {
    "lora": functools.partial(minipeft.LoraConfig, r=2, init_lora_weights=False),
    "lora with a bias": functools.partial(minipeft.LoraConfig, r=2, bias="lora_only", init_lora_weights=False),
    "lora_bias": functools.partial(minipeft.LoraConfig, r=2, lora_bias=True, init_lora_weights=False),
    "pissa": functools.partial(minipeft.LoraConfig, r=2, init_lora_weights="pissa"),
    "dora": functools.partial(minipeft.LoraConfig, r=2, use_dora=True, init_lora_weights=False),
    "dora with a bias": functools.partial(
        minipeft.LoraConfig, r=2, use_dora=True, bias="lora_only", init_lora_weights=False
    ),
    "adalora": functools.partial(minipeft.AdaLoraConfig, init_r=2, target_r=1, total_step=10),
    "vera": functools.partial(minipeft.VeraConfig, r=2, init_weights=False),
    "loha": functools.partial(minipeft.LoHaConfig, r=2, init_weights=False),
    "lokr": functools.partial(minipeft.LoKrConfig, r=2, init_weights=False),
    "ia3": functools.partial(minipeft.IA3Config, feedforward_modules=[]),
    "ia3 feedforward": functools.partial(minipeft.IA3Config, feedforward_modules=["layer"]),
    "oft": functools.partial(minipeft.OFTConfig, oft_block_size=2),
    "trainable_tokens": functools.partial(minipeft.TrainableTokensConfig, token_indices=[1, 3]),
}
FEW = [
    "lora with a bias",
    "dora",
    "lokr",
    "ia3",
    "ia3 feedforward",
    "oft",
    "trainable_tokens",
]  # of each kind, to save time
ADD = {"lora", "lora with a bias", "lora_bias", "pissa", "adalora", "vera", "loha", "lokr", "trainable_tokens"}
LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), lambda: torch.randn(3, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), lambda: torch.randn(3, 4)),
    "conv1d of gpt2": (lambda: Conv1D(6, 4), lambda: torch.randn(3, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 2, padding=1), lambda: torch.randn(2, 4, 3, 3)),
    "embedding": (lambda: nn.Embedding(8, 6), lambda: torch.arange(8)),
}


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def made(layer, *methods, **options):
    """A model with an adapter of each method, called "0", "1" and so on, and an input; None if one does not fit."""
    torch.manual_seed(0)
    make, make_input = LAYERS[layer]
    model, x = Holder(make()).double().eval(), make_input()
    nn.init.normal_(model.layer.bias) if getattr(model.layer, "bias", None) is not None else None
    try:
        for number, method in enumerate(methods):
            config = METHODS[method](target_modules=["layer"], **options.get(method, {}))
            if number == 0:
                minipeft.get_adapter_model(model, config, "0")
            else:
                model.add_adapter(str(number), config)
            model.set_adapter(str(number))
            move(model)
    except MinipeftError:
        return None
    model.set_adapter([str(number) for number in range(len(methods))])
    return model.eval(), x.double() if x.is_floating_point() else x


@torch.no_grad()
def move(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.5)


def is_refused_or_the_same(model, x, merge):
    """Returns whether it merged."""
    expected = model(x)
    try:
        merge(model)
    except MinipeftError:
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        return False
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    return True


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("layer", "first"), [(layer, first) for layer in LAYERS for first in (METHODS if layer == "linear" else FEW)]
)
@torch.no_grad()
def test_two_adapters_merged_compute_what_they_compute_called(layer, first):
    for second in METHODS if layer == "linear" else FEW:
        built = made(layer, first, second)
        if built is None:
            continue
        model, x = built
        merged = is_refused_or_the_same(model, x, lambda m: m.merge_adapter())
        without_bias = {"lora_bias"} & {first, second} and getattr(model.layer, "bias", None) is None
        assert merged or without_bias, f"{first}, {second}: nothing stands against merging both"
        for names in (["0"], ["1"], ["1", "0"]):
            merged = is_refused_or_the_same(model, x, lambda m, names=names: m.merge_adapter(names))
            if {first, second} <= ADD and not without_bias:
                assert merged, f"{first}, {second}: they commute, and merging {names} was refused"


@pytest.mark.parametrize("second", ["lora", "lora_bias"])
@pytest.mark.parametrize("method", ["ia3", "oft", "dora"])
@torch.no_grad()
def test_a_permanent_merge_in_another_order_is_refused_unless_the_methods_commute(method, second):
    model, x = made("linear", method, second)
    expected = model(x)
    with pytest.raises(MergeError, match=r"do not commute.*set_adapter.*Nothing was changed"):
        model.merge_and_unload(adapter_names=["1", "0"])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    model.set_adapter(["1", "0"])
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["1", "0"])(x), expected)


@pytest.mark.parametrize("method", ["ia3", "oft", "dora", "lora"])
@torch.no_grad()
def test_a_permanent_merge_of_some_leaves_what_they_compute_alone(method):
    model, x = made("linear", "lora", method)
    model.set_adapter("1")
    expected = model(x)
    model.set_adapter(["0", "1"])
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["1"])(x), expected)


@torch.no_grad()
def test_three_adapters_merge_one_after_the_other_as_far_as_they_commute():
    model, x = made("linear", "lora", "lora_bias", "ia3")
    expected = model(x)
    model.merge_adapter(["1"])
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(MergeError, match="'0' acts before '2'"):
        model.merge_adapter(["2"])
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        pass
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("first", [name for name in METHODS if name != "dora" and "token" not in name])
@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_dropout_in_dora_behind_another_adapter_only_adds_noise(layer, first):
    """As its share goes to zero, so does the difference between training and evaluation."""
    built = made(layer, first, "dora", dora={"lora_dropout": 1e-12})
    if built is None:
        pytest.skip("it does not adapt this layer")
    model, x = built
    expected = model(x)
    torch.testing.assert_close(model.train()(x), expected)

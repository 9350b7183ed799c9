"""Merging into a layer that computes its weight, or does something around it: refused, unless the outputs stay the same."""

import contextlib
import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from minipeft import IA3Config, LoraConfig, MergeError, TargetError, VeraConfig, get_adapter_model, get_lora_model

OPTIONS = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}


class Own(torch.Tensor):
    pass


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def old(make):
    def put_on(layer):
        with pytest.warns(FutureWarning):
            make(layer)

    return put_on


def in_int8(layer):
    """As torchao replaces the weight of a linear layer."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig(version=2))


COMPUTED = {
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": old(weight_norm),
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
    "a subclass": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().as_subclass(Own))),
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(4, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 1), lambda: torch.randn(4, 6, 2, 2)),
    "embedding": (lambda: nn.Embedding(6, 8), lambda: torch.arange(6)),
}


def adapted(layer="linear", config=None):
    make, make_input = LAYERS[layer]
    model = get_adapter_model(nn.Sequential(make()), config or LoraConfig(**OPTIONS)).eval()
    return model, make_input()


def refuses_every_merge(model, x, match):
    expected = model(x)
    for verb in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(MergeError, match=f"(?s)^0: .*{match}.*Nothing was changed"):
            getattr(model, verb)()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_since_it_was_adapted_is_not_merged_into(kind, layer):
    model, x = adapted(layer)
    COMPUTED[kind](model[0].base_layer)
    refuses_every_merge(model.eval(), x, "no longer a plain parameter")


def test_a_weight_that_was_quantized_since_it_was_adapted_is_not_merged_into():
    model = get_lora_model(nn.Sequential(nn.Linear(32, 32)), LoraConfig(**OPTIONS))
    in_int8(model[0])
    refuses_every_merge(model, torch.randn(2, 32), "no longer a plain parameter")


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_already_is_not_adapted(kind):
    model = nn.Sequential(nn.Linear(6, 8))
    COMPUTED[kind](model[0])
    with pytest.raises(TargetError, match="this instance is refused"):
        get_lora_model(model, LoraConfig(**OPTIONS))


@pytest.mark.parametrize("config", [IA3Config(target_modules=["0"]), LoraConfig(bias="lora_only", **OPTIONS)])
def test_a_bias_that_is_computed_is_not_merged_into(config):
    model, x = adapted(config=config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    parametrize.register_parametrization(model[0].base_layer, "bias", Half())
    refuses_every_merge(model, x, "bias .* is computed")


def test_a_bias_that_is_computed_does_not_matter_if_the_merge_leaves_it_alone():
    model, x = adapted()
    prune.random_unstructured(model[0].base_layer, "bias", 0.5)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def patch(layer, around):
    forward = layer.forward
    layer.forward = lambda x: around(forward, x)


CHANGES = {
    "output": lambda layer: layer.register_forward_hook(lambda module, args, y: 2 * y),
    "input": lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "patched": lambda layer: patch(layer, lambda forward, x: 2 * forward(x)),
}
LOOKS = {
    "output": lambda layer: layer.register_forward_hook(lambda module, args, y: None),
    "input": lambda layer: layer.register_forward_pre_hook(lambda module, args: None),
    "patched": lambda layer: patch(layer, lambda forward, x: forward(x)),
    "what it adds": lambda layer: layer.register_forward_hook(lambda module, args, y: y + 1),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("before", [True, False])
def test_a_layer_with_a_hook_that_changes_what_it_computes_is_not_merged_into(kind, before):
    plain = nn.Sequential(nn.Linear(6, 8))
    CHANGES[kind](plain[0]) if before else None
    model = get_lora_model(plain, LoraConfig(**OPTIONS))
    CHANGES[kind](model[0].base_layer) if not before else None
    refuses_every_merge(model, torch.randn(4, 6), "hooks or a patched forward.* off by")


@pytest.mark.parametrize("kind", LOOKS)
def test_a_layer_with_a_hook_that_only_looks_is_merged_into(kind):
    model, x = adapted()
    LOOKS[kind](model[0].base_layer)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


HOOKED = {
    "output": lambda layer: layer.register_forward_hook(lambda module, args, y: 2 * y + 1),
    "output with keywords": lambda layer: layer.register_forward_hook(lambda *given: 2 * given[-1], with_kwargs=True),
    "input": lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0] + 1,)),
    "gradient": lambda layer: layer.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],)),
    "gradient before": lambda layer: layer.register_full_backward_pre_hook(lambda module, outputs: (2 * outputs[0],)),
}
REMOVALS = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "unload": lambda model: model.unload(),
    "delete_adapter": lambda model: model.delete_adapter("default", activate="other"),
}


def output_and_gradient(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), x)


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("base_too", [True, False])
@pytest.mark.parametrize("kind", HOOKED)
def test_hooks_on_an_adapted_layer_stay_when_the_adapter_goes(kind, base_too, removal):
    """They are on the layer for whoever put them there, and the layer is the same object before and after."""
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
    layer, x = plain[0], torch.randn(4, 6)
    if base_too:
        layer.register_forward_hook(lambda module, args, y: y + 1)
        layer.register_forward_pre_hook(lambda module, args: None)
    model = get_lora_model(plain, LoraConfig(**OPTIONS))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["2"]))
    handle = HOOKED[kind](layer)
    with contextlib.nullcontext() if removal == "merge_and_unload" else model.disable_adapter():
        hooked = output_and_gradient(model, x)
    REMOVALS[removal](model)
    assert type(layer) is nn.Linear
    for found, expected in zip(output_and_gradient(model, x), hooked, strict=True):
        torch.testing.assert_close(found, expected)
    handle.remove()
    assert not torch.allclose(output_and_gradient(model, x)[1], hooked[1])


class Recorder:
    def __init__(self):
        self.lock, self.calls = threading.Lock(), 0  # a lock cannot be copied

    def hook(self, module, args, output):
        self.calls += 1


@pytest.mark.parametrize("config", [LoraConfig(**OPTIONS), VeraConfig(r=2, target_modules=["0"], init_weights=False)])
def test_what_a_hook_on_an_adapter_belongs_to_is_not_copied_in_a_merge(config):
    model, x = adapted(config=config)
    recorder = Recorder()
    model[0].adapters["default"].register_forward_hook(recorder.hook)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    assert recorder.calls == 2


def test_another_forward_of_an_adapted_layer_is_not_lost_in_a_merge():
    model, x = adapted()
    expected = 2 * model(x)
    patch(model[0], lambda forward, x: 2 * forward(x))
    with pytest.raises(MergeError, match=r"^0: this Linear was given another forward .*Nothing was changed"):
        model.merge_and_unload()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    del model[0].forward
    torch.testing.assert_close(2 * model.merge_and_unload()(x), expected)


def test_a_hook_that_fails_on_the_trial_is_named():
    model, _ = adapted()
    handle = model[0].base_layer.register_forward_hook(lambda module, args, y: y[:, :, 0])
    with pytest.raises(MergeError, match=r"^0: Linear has hooks.*IndexError.*Nothing was changed"):
        model.merge_adapter()
    handle.remove()
    model.merge_adapter()


def test_a_copy_of_a_model_with_a_parametrized_layer_keeps_its_adapter():
    """Such a layer has a __deepcopy__ of its own."""
    model, x = adapted()
    parametrizations.weight_norm(model[0].base_layer)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert list(twin[0].adapters) == ["default"]
    torch.testing.assert_close(twin(x), expected)

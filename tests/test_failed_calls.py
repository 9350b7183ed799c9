"""A call that fails, or must not be made a second time, leaves the model as it was."""

import pytest
import torch
from tiny_models import adapted, foreign_code, gpt2, logits, refuses
from torch import nn
from transformers import GPT2LMHeadModel

from minipeft import LoraConfig, StateError, TargetError, get_lora_model
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.methods.lora import Lora


def fails_at_call(monkeypatch, cls, method, number):
    original, calls = getattr(cls, method), []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == number:
            raise MemoryError("out of memory")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, method, failing)


@pytest.mark.parametrize("targets", [["c_attn", "ln_1"], ["ln_f", "c_attn"], ["c_attn", "drop"]])
def test_a_layer_that_cannot_be_adapted_leaves_the_others_alone(targets):
    model = gpt2()
    config = LoraConfig(target_modules=targets)
    refuses(TargetError, model, lambda: get_lora_model(model, config), "no LayerOps", "transformer.")
    assert type(model) is GPT2LMHeadModel
    assert type(get_lora_model(model, LoraConfig())).__name__ == "GPT2LMHeadModel"  # and it still can be


@pytest.mark.parametrize(("cls", "method"), [(Lora, "reset_parameters"), (AdaptedLayer, "__init__")])
def test_an_injection_that_breaks_off_leaves_nothing_behind(cls, method, monkeypatch):
    model = gpt2()
    config = LoraConfig(target_modules=["c_attn", "c_proj"], modules_to_save=["ln_f"])
    with monkeypatch.context() as patch:
        fails_at_call(patch, cls, method, 3)
        refuses(MemoryError, model, lambda: get_lora_model(model, config))
    assert type(model) is GPT2LMHeadModel
    assert torch.equal(logits(get_lora_model(model, config)), logits(gpt2()))


@pytest.mark.parametrize(("cls", "method"), [(Lora, "reset_parameters"), (AdaptedLayer, "__init__")])
def test_a_second_adapter_that_breaks_off_leaves_the_first_alone(cls, method, monkeypatch, tmp_path):
    model = adapted()
    expected = logits(model)
    config = LoraConfig(target_modules=["c_attn", "c_proj"])
    adapted(target_modules=["c_attn", "c_proj"]).save_pretrained(tmp_path)
    for action in (lambda: model.add_adapter("second", config), lambda: model.load_adapter(tmp_path, "second")):
        with monkeypatch.context() as patch:
            fails_at_call(patch, cls, method, 3)
            refuses(MemoryError, model, action)
    assert list(model.adapter_configs) == ["default"]
    assert torch.equal(logits(model), expected)


def test_adapting_an_adapted_model_again_is_refused():
    model = adapted()
    refuses(StateError, model, lambda: get_lora_model(model, LoraConfig()), "add_adapter")
    refuses(StateError, model, lambda: get_lora_model(model, LoraConfig(), "second"), "add_adapter")
    unloaded = model.unload()
    assert torch.equal(logits(get_lora_model(unloaded, LoraConfig())), logits(gpt2()))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_model_that_peft_has_wrapped_is_refused(task_type):
    with foreign_code():
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(gpt2(), peft.LoraConfig(task_type=task_type))
    config = LoraConfig(target_modules="all-linear")
    refuses(StateError, wrapped, lambda: get_lora_model(wrapped, config), "PeftModel")


def test_the_layers_within_a_layer_that_peft_has_adapted_are_no_targets():
    """Its lora_A and lora_B are linear layers too."""
    model = gpt2()
    with foreign_code():
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["c_attn"]), model)
    config = LoraConfig(target_modules="all-linear")
    refuses(TargetError, model, lambda: get_lora_model(model, config), "transformer.h.0.attn.c_attn")


def test_a_model_with_an_adapted_part_is_refused():
    """Its file would hold the part's adapters as well, which its configuration does not name."""
    outer = nn.ModuleDict({"body": adapted(), "head": nn.Linear(4, 4)})
    config = LoraConfig(r=2, target_modules=["head"])
    refuses(StateError, outer, lambda: get_lora_model(outer, config), "body.transformer", "adapted already")
    body = nn.ModuleDict({"body": gpt2()})
    get_lora_model(body, LoraConfig(r=2, target_modules=["c_attn"]))
    refuses(StateError, body, lambda: get_lora_model(body["body"], config), "transformer.h.0.attn", "adapted already")

"""Models built on the meta device and given their weights later: adapters start as on any other model, or are refused."""

import copy

import pytest
import torch
from tiny_models import foreign_code, gpt2, logits
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel

from minipeft import LoraConfig, StateError, VeraConfig, get_adapter_model, get_lora_model, load_adapter

CONFIGS = {
    "LoRA": LoraConfig(r=4, lora_bias=True),
    "DoRA": LoraConfig(r=4, use_dora=True),
    "PiSSA": LoraConfig(r=4, init_lora_weights="pissa"),
    "random": LoraConfig(r=4, init_lora_weights=False, bias="all"),
    "trained in full": LoraConfig(r=4, modules_to_save=["ln_f", "mlp"], target_modules=["c_attn"]),
    "tokens": LoraConfig(r=4, trainable_token_indices=[3, 5]),
    "VeRA": VeraConfig(r=4, target_modules=["c_attn"]),
}


def empty_model():
    """GPT-2 without weights; what is not in its state has values, as with accelerate's init_empty_weights."""
    model = gpt2()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.to("meta"))
    model.tie_weights()
    return model


def give_memory(model, state):
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)  # instead of whatever the memory held
        for name, value in kept.items():
            model.get_buffer(name).copy_(value)
    model.tie_weights()
    return model.load_state_dict(state, strict=False)


def give_tensors(model, state):
    result = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return result


def own_tensors(model):
    return {key: tensor.detach().clone() for key, tensor in model.adapter_state_dict().items()}


@pytest.mark.each_value
@pytest.mark.parametrize("give", [give_memory, give_tensors])
@pytest.mark.parametrize("method", CONFIGS)
def test_adapters_start_when_the_model_gets_its_weights(method, give):
    state = {key: value.clone() for key, value in gpt2().state_dict().items()}
    model = get_adapter_model(empty_model(), CONFIGS[method])
    torch.manual_seed(3)
    give(model, state)
    torch.manual_seed(3)
    expected = get_adapter_model(gpt2(), CONFIGS[method])
    torch.testing.assert_close(own_tensors(model), own_tensors(expected), rtol=0, atol=0)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in expected.named_parameters() if p.requires_grad
    ]
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(gpt2()))
    model.unload()
    assert not model._load_state_dict_post_hooks


def test_what_a_state_holds_of_the_adapter_stays_and_shards_may_come_one_by_one():
    source = get_adapter_model(gpt2(), CONFIGS["random"])
    state = {key: value.clone() for key, value in source.state_dict().items()}
    model = get_adapter_model(empty_model(), CONFIGS["random"])
    first = {key: value for key, value in state.items() if "h.0" in key}
    model.load_state_dict(first, strict=False, assign=True)
    with pytest.raises(StateError, match=r"load_state_dict\(..., strict=False\)"):
        logits(model)
    held = model.transformer.h[0].attn.c_attn.adapters["default"].lora_A
    model.load_state_dict({k: v for k, v in state.items() if k not in first}, strict=False, assign=True)
    assert model.transformer.h[0].attn.c_attn.adapters["default"].lora_A is held
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=1e-6)


def test_memory_without_values_is_neither_run_nor_saved_nor_merged(tmp_path):
    model = get_lora_model(empty_model(), LoraConfig(r=4))
    model.to_empty(device="cpu")
    combine = lambda: model.add_weighted_adapter(["default"], [1.0], "combined")  # noqa: E731
    for action in (lambda: logits(model), lambda: model.save_pretrained(tmp_path), model.merge_adapter, combine):
        with pytest.raises(StateError, match="made on the meta device and has no values yet"):
            action()
    assert not list(tmp_path.iterdir())
    assert copy.deepcopy(model)._state.unstarted == {"default"}
    base = model.unload()
    assert type(base) is GPT2LMHeadModel
    base.load_state_dict(gpt2().state_dict())


def test_a_file_is_loaded_once_the_weights_are_there(tmp_path):
    source = get_adapter_model(gpt2(), CONFIGS["random"])
    source.save_pretrained(tmp_path)
    model = empty_model()
    with pytest.raises(Exception, match=r"Load the\s+model's weights first"):
        load_adapter(model, tmp_path)
    give_tensors(model, gpt2().state_dict())
    torch.testing.assert_close(logits(load_adapter(model, tmp_path)), logits(source), rtol=0, atol=1e-6)


class Allocated(TorchDispatchMode):
    """Bytes of the new tensors that are not on the meta device."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta and not function._schema.name.endswith("detach"):
            self.nbytes += result.nbytes
        return result


def test_adapting_a_large_model_on_the_meta_device_takes_no_memory_for_tensors():
    with foreign_code(), torch.device("meta"):
        from transformers import MixtralConfig, MixtralForCausalLM

        sizes = {"num_hidden_layers": 60, "num_local_experts": 256, "hidden_size": 4096, "intermediate_size": 1536}
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=32, num_key_value_heads=4))
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with Allocated() as allocated:
        get_lora_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], target_parameters=experts))
    assert model.get_nb_trainable_parameters() == (3_158_016_000, 295_658_786_816)
    assert allocated.nbytes < 2**16

"""Reentrant gradient checkpointing gives every adapter the gradient that it has without, whatever the model's input is."""

import copy
import functools
import pickle

import pytest
import torch
import transformers as tf
from fast_copy import copied
from tiny_models import gpt2, llama, t5
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from minipeft import LoraConfig, StateError, get_lora_model, lean
from minipeft.files.restore import restore_adapter

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(1, 90, (2, 5), generator=torch.Generator().manual_seed(2))


def vit():
    config = tf.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES, **NO_DROPOUT)
    return tf.ViTForImageClassification(config), lambda model: model(pixel_values=PIXELS).logits


def wav2vec2():
    sizes = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    none = dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "feat_proj_dropout", "activation_dropout", "layerdrop"), 0.0
    )
    config = tf.Wav2Vec2Config(
        **SIZES, **sizes, **none, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0
    )
    sound = torch.randn(2, 80, generator=torch.Generator().manual_seed(1))
    return tf.Wav2Vec2Model(config), lambda model: model(sound).last_hidden_state


def clip():
    config = tf.CLIPConfig(
        text_config={**SIZES, "vocab_size": 96, "projection_dim": 8, "eos_token_id": 3},
        vision_config={**SIZES, "image_size": 8, "patch_size": 4, "projection_dim": 8},
        projection_dim=8,
    )
    return tf.CLIPModel(config), lambda model: model(input_ids=IDS, pixel_values=PIXELS).logits_per_image


def encoder_decoder():
    return t5(), lambda model: model(input_ids=IDS, decoder_input_ids=IDS).logits


def from_embeddings():
    given = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    return gpt2(), lambda model: model(inputs_embeds=given[..., : model.config.hidden_size]).logits


BLOCKS = ("ViTLayer", "CLIPEncoderLayer", "LlamaDecoderLayer")
MODELS = {"vit": vit, "wav2vec2": wav2vec2, "clip": clip, "t5": encoder_decoder, "inputs_embeds": from_embeddings}


def made(kind):
    torch.manual_seed(0)
    model, call = MODELS[kind]()
    return model, lambda model: call(model).double().sin().sum()


def adapted(model):
    return get_lora_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()


def gradients(model, call):
    model.zero_grad()
    call(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def enable(model, **options):
    name = "activation_checkpointing_enable" if hasattr(model, "activation_checkpointing_enable") else None
    getattr(model, name or "gradient_checkpointing_enable")(options)


def wrap(model, kind=CheckpointImpl.NO_REENTRANT):
    """As FSDP's and torchtitan's scripts checkpoint: each block in a module of torch's."""
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=lambda m: type(m).__name__ in BLOCKS)


def disable(model):
    name = "activation_checkpointing_disable" if hasattr(model, "activation_checkpointing_disable") else None
    getattr(model, name or "gradient_checkpointing_disable")()


@pytest.mark.each_value
@pytest.mark.parametrize("first", ["adapted", "checkpointed"])
@pytest.mark.parametrize("kind", MODELS)
def test_reentrant_checkpointing_gives_the_same_gradients(kind, first):
    model, call = made(kind)
    if first == "checkpointed":
        enable(model, use_reentrant=True)
    adapted(model)
    if first == "adapted":
        enable(model, use_reentrant=True)
    found = gradients(model, call)
    disable(model)
    expected = gradients(model, call)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("way", ["a part of the model", "a module around each block"])
def test_what_checkpoints_since_the_last_call_gives_the_same_gradients(way):
    model, call = made("clip")
    adapted(model)
    expected = gradients(model, call)
    assert any("vision_model" in name for name in expected)
    if way == "a part of the model":
        enable(model.vision_model, use_reentrant=True)
    else:
        wrap(model, CheckpointImpl.REENTRANT)
    found = {
        name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in gradients(model, call).items()
    }
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_a_module_around_a_block_is_left_as_it_was_when_the_adapter_goes():
    model, call = made("vit")
    wrap(model, CheckpointImpl.REENTRANT)
    wrappers = [module for module in model.modules() if hasattr(module, "checkpoint_fn")]
    before = [wrapper.checkpoint_fn for wrapper in wrappers]
    gradients(adapted(model), call)
    assert len(before) == 2
    assert not any(wrapper.checkpoint_fn is then for wrapper, then in zip(wrappers, before, strict=True))
    model.unload()
    assert all(wrapper.checkpoint_fn is then for wrapper, then in zip(wrappers, before, strict=True))


def functions(model):
    return [vars(m)["_gradient_checkpointing_func"] for m in model.modules() if "gradient_checkpointing" in vars(m)]


def test_unloading_and_disabling_leave_the_functions_of_transformers():
    model, _ = made("vit")
    enable(model, use_reentrant=True)
    before = functions(model)
    assert before
    assert all(isinstance(function, functools.partial) for function in before)
    adapted(model)
    assert not any(now is then for now, then in zip(functions(model), before, strict=True))
    model.unload()
    assert all(now is then for now, then in zip(functions(model), before, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_trained_as_well(copied):
    model, call = made("vit")
    adapted(model)
    expected = gradients(model, call)
    enable(model, use_reentrant=True)
    assert gradients(copied(model), call).keys() == expected.keys()


def test_a_call_without_gradients_and_the_other_kind_of_checkpointing_are_left_alone():
    model, call = made("vit")
    adapted(model)
    with torch.no_grad():
        expected = call(model)
        enable(model, use_reentrant=True)
        assert torch.equal(call(model), expected)
    enable(model, use_reentrant=False)
    assert all(function.args[0].keywords == {"use_reentrant": False} for function in functions(model))


def test_a_model_without_checkpointing_has_none_when_it_is_adapted():
    model = get_lora_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    assert not hasattr(model, "_set_gradient_checkpointing")
    with pytest.raises(AttributeError, match="gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()


WAYS = ["reentrant", "not reentrant", "wrapped", "lean", "lean mlp", "lean block", "lean sqrt"]


def two_adapters(way):
    torch.manual_seed(0)
    model = get_lora_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"]))
    model.add_adapter("other", model.adapter_configs["default"])
    model.train_adapters(["default", "other"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.3)
    if way.startswith("lean"):
        lean(model, *way.split()[1:])
    elif way == "wrapped":
        wrap(model)
    elif way != "none":
        enable(model, use_reentrant=way == "reentrant")
    return model.train()


def in_turn(model):
    """The gradients of a pass with each adapter and one without, of which one loss is made."""
    losses = [model(input_ids=IDS, labels=IDS).loss]
    model.set_adapter("other")
    losses.append(model(input_ids=IDS, labels=IDS).loss.square())
    with model.disable_adapter():
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        model.train_adapters(["default", "other"])
        sum(losses).backward()
    named = ((name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters())
    return {name: p.grad for name, p in named if p.requires_grad}


@functools.cache
def gradients_of_passes_in_turn():
    """Without checkpointing; they are only read."""
    return in_turn(two_adapters("none"))


@pytest.mark.parametrize("way", WAYS)
def test_passes_with_different_adapters_each_find_their_own_in_one_backward_pass(way):
    expected, found = gradients_of_passes_in_turn(), in_turn(two_adapters(way))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


CHANGES = {
    "scale": lambda model, folder: model.set_scale("default", 3.0),
    "swap": lambda model, folder: model.hotswap_adapter(folder),
    "restore": lambda model, folder: restore_adapter(model, "default", folder),
    "merge": lambda model, folder: model.merge_adapter(),
    "rest": lambda model, folder: model.set_adapter("other"),
    "rename": lambda model, folder: model.rename_adapter("default", "first"),
    "unload": lambda model, folder: model.unload(),
}


@copied
def two_adapters_on_llama(checkpointing=None):
    torch.manual_seed(0)
    model = get_lora_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.add_adapter("other", model.adapter_configs["default"])
    return model if checkpointing is None else lean(model.train(), checkpointing)


def adapted_llama(way):
    """Always the same, and copied, since `lean` takes long to try a batch."""
    if way.startswith("lean"):
        return two_adapters_on_llama(way.split()[1]).train()
    model = two_adapters_on_llama()
    enable(model, use_reentrant=way == "reentrant")
    return model.train()


@pytest.mark.each_value
@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "lean block", "lean sqrt"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_that_is_changed_before_the_backward_pass_stops_it(change, way, tmp_path):
    model = adapted_llama(way)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loss = model(input_ids=IDS, labels=IDS).loss
    CHANGES[change](model, tmp_path)
    with pytest.raises(StateError, match="adapters were changed since the forward pass"):
        loss.backward()


@pytest.mark.parametrize("way", ["reentrant", "lean sqrt"])
def test_what_is_taken_back_before_the_backward_pass_does_not_stop_it(way):
    expected, found = adapted_llama(way), adapted_llama(way)
    expected(input_ids=IDS, labels=IDS).loss.backward()
    loss = found(input_ids=IDS, labels=IDS).loss
    found.set_adapter("other")
    with torch.no_grad(), found.disable_adapter():
        found(input_ids=IDS)
    found.set_adapter("default")
    loss.backward()
    for (name, one), other in zip(expected.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)

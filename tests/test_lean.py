"""lean(): the same loss and gradients, in less, on real transformers models; and refusals where that would not hold."""

import contextlib
import copy
import functools
import inspect
import os
import pickle
import platform
from pathlib import Path
from unittest import mock

import pytest
import torch
from kept_bytes import bytes_kept
from rotation import rotated, thinned
from tiny_models import VOCABULARY, adapted, bert_classifier, disturb, foreign_code, gpt2, llama, t5
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Model,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4VisionConfig,
    Llama4VisionModel,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    Trainer,
    TrainingArguments,
)

from minipeft import LeanError, LoraConfig, StateError, get_lora_model, lean, unlean
from minipeft.kernels.matmul import onednn_is_faster
from minipeft.layers.base import is_plain_linear
from minipeft.memory import sample_slices
from minipeft.memory.lean import describe
from minipeft.memory.modules import FastLinear, FusedGelu, Recomputed, RecomputedMlp
from minipeft.memory.probe import HALF_TOLERANCE, MOST, Probe

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OTHERS = {
    "bloom": BloomConfig(n_layer=2, hidden_size=32, n_head=4, vocab_size=VOCABULARY, pad_token_id=None),
    "falcon": FalconConfig(
        **{k: v for k, v in SIZES.items() if k not in ("head_dim", "intermediate_size")}, new_decoder_architecture=False
    ),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}),
    "mistral": MistralConfig(**SIZES),
    "opt": OPTConfig(
        num_hidden_layers=2,
        hidden_size=32,
        ffn_dim=48,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.0,
    ),
    "phi": PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, resid_pdrop=0.0),
    "qwen2": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
}
IDS = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
LABELS = IDS.clone()
LABELS[0, :4] = -100


def in_training(base=None, **options):
    return adapted(base, scale=0, **{"init_lora_weights": False, **options}).train()


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    torch.manual_seed(5)
    output = model(**{"input_ids": IDS, "labels": LABELS, **inputs})
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_learning(found, expected, rtol=1e-5):
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=rtol, atol=0, check_dtype=False)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= rtol * gradient.norm(), name


def mixins(model):
    return {
        mixin.__name__
        for mixin in (FusedGelu, Recomputed, FastLinear, RecomputedMlp)
        for m in model.modules()
        if isinstance(m, mixin)
    }


def checkpoints_blocks(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize(
    ("make", "checkpointing", "dropout"), rotated([gpt2, llama], ["none", "last", "mlp", "block", "sqrt"], [0.2, 0.0])
)
def test_loss_and_gradients_are_what_they_were(make, dropout, checkpointing):
    model = in_training(make(), lora_dropout=dropout)
    expected = loss_and_gradients(model)
    assert lean(model, checkpointing) is model
    found = loss_and_gradients(model)
    assert_same_learning(found, expected)
    assert found[0].logits is None
    assert "logits" not in found[0]
    assert ("RecomputedMlp" in mixins(model)) == (checkpointing in ("mlp", "block", "sqrt"))
    assert checkpoints_blocks(model) == (checkpointing in ("last", "block", "sqrt"))


@pytest.mark.parametrize("kind", OTHERS)
def test_it_is_generic_over_causal_language_models(kind):
    torch.manual_seed(0)
    model = in_training(AutoModelForCausalLM.from_config(OTHERS[kind]), target_modules="all-linear")
    expected = loss_and_gradients(model)
    lean(model, "block")
    assert_same_learning(loss_and_gradients(model), expected)


@pytest.mark.parametrize("p", [{"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}])
@pytest.mark.parametrize("checkpointing", ["none", "last", "mlp", "block", "sqrt"])
def test_the_models_own_dropout_draws_the_same_masks(checkpointing, p):
    base = gpt2()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    model = in_training(base, lora_dropout=0.1)
    expected = loss_and_gradients(model)
    lean(model, checkpointing)
    assert_same_learning(loss_and_gradients(model), expected)


@pytest.mark.parametrize("inputs", [{"num_items_in_batch": 11}, {"num_items_in_batch": torch.tensor(11)}])
def test_the_trainers_count_of_items_divides_the_loss(inputs):
    model = in_training()
    expected = loss_and_gradients(model, **inputs)
    assert_same_learning(loss_and_gradients(lean(model), **inputs), expected)


def test_positional_arguments_tuples_and_embeddings_as_input():
    model = in_training()
    expected = loss_and_gradients(model)[0].loss
    lean(model)
    by_position = dict.fromkeys(inspect.signature(model.forward).parameters)
    by_position.pop("kwargs")
    by_position.update(input_ids=IDS, labels=LABELS, logits_to_keep=0)
    torch.testing.assert_close(model(*by_position.values()).loss, expected)
    output = model(input_ids=IDS, labels=LABELS, return_dict=False)
    torch.testing.assert_close(output[0], expected)
    assert output[1] is None
    embeddings = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeddings, labels=LABELS).loss, expected)


@pytest.mark.usefixtures("unprobed")
def test_fifty_steps_of_training_follow_the_same_curve():
    base = gpt2()
    del base.transformer.h[1:]

    def curve(change):
        model = change(in_training(copy.deepcopy(base), init_lora_weights=True))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(50):
            loss = model(input_ids=IDS, labels=LABELS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    plain = list(curve(lambda model: model))
    assert plain[-1] < 0.7 * plain[0]
    for checkpointing in ("none", "block"):
        assert list(curve(lambda model, how=checkpointing: lean(model, how))) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = in_training(gpt2().to(dtype))
    expected = loss_and_gradients(model)
    assert_same_learning(loss_and_gradients(lean(model, "mlp")), expected, 5e-2 if dtype is torch.bfloat16 else 1e-6)


def test_autocast():
    model = in_training()
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(model)
        lean(model, "mlp")
        found = loss_and_gradients(model)
    assert found[0].loss.dtype is torch.float32
    assert_same_learning(found, expected, 5e-2)


def test_a_plain_frozen_head_model_can_be_lean_too():
    model = gpt2(tie_word_embeddings=False).train()
    model.lm_head.requires_grad_(False)
    expected = loss_and_gradients(model)
    lean(model, "block")
    assert_same_learning(loss_and_gradients(model), expected)


@contextlib.contextmanager
def a_plain_call(model, mode):
    """A call that is no training: in evaluation mode, or without gradients."""
    model.train(mode == "training mode without gradients")
    with torch.set_grad_enabled(mode == "evaluation with gradients"):
        yield


MODES = ["evaluation", "evaluation with gradients", "training mode without gradients"]


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("mode", "checkpointing", "make", "dtype"),
    rotated(MODES, ["last", "mlp", "block"], [gpt2, llama], [torch.float32, torch.bfloat16]),
)
def test_what_is_not_training_stays_bit_for_bit(make, dtype, checkpointing, mode, request):
    if dtype is torch.float32:  # in which the first test of this file has each of these models proved
        request.getfixturevalue("unprobed")
    model = in_training(make()).to(dtype)
    options = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)

    def seen():
        with a_plain_call(model, mode):
            output = model(input_ids=IDS, labels=LABELS)
            with model.disable_adapter():
                base = model(input_ids=IDS)
            tokens = model.generate(IDS, generation_config=options)
        wanted = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(output.loss, wanted) if output.loss.requires_grad else ()
        keys = [layer.keys for layer in (*output.past_key_values.layers, *base.past_key_values.layers)]
        return output.logits, output.loss, base.logits, tokens, *keys, *gradients

    expected = seen()
    lean(model, checkpointing)
    found = seen()
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_without_labels_training_gives_logits():
    model = lean(in_training())
    assert model(input_ids=IDS).logits.shape == (*IDS.shape, VOCABULARY)


def test_the_cache_is_left_out_unless_it_is_asked_for():
    model = in_training()
    assert model(input_ids=IDS, labels=LABELS).past_key_values is not None
    lean(model)
    assert model(input_ids=IDS, labels=LABELS).past_key_values is None
    assert model(input_ids=IDS, labels=LABELS, use_cache=True).past_key_values is not None


def bloom():
    """Its feed-forward modules take the output of a norm and the sum before that."""
    torch.manual_seed(0)
    return disturb(AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS["bloom"])))


@pytest.mark.parametrize(
    ("make", "labels"),
    [(bert_classifier, torch.tensor([0, 2, 1])), (t5, LABELS), (bloom, LABELS)],
    ids=["blocks", "encoder", "feed-forward"],
)
def test_what_is_recomputed_may_be_given_the_outputs_of_norms(make, labels):
    model = in_training(make(), target_modules="all-linear")
    expected = loss_and_gradients(model, labels=labels)
    for checkpointing in ("block", "sqrt"):
        lean(model, checkpointing, chunked_loss=False)
        assert_same_learning(loss_and_gradients(model, labels=labels), expected)


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("checkpointing", ["last", "block", "sqrt"])
def test_a_cache_that_blocks_get_by_position_is_not_filled_twice(checkpointing):
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "pad_token_id")}
    config = RecurrentGemmaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, block_types=["recurrent", "attention"]
    )
    torch.manual_seed(0)
    model = in_training(RecurrentGemmaForCausalLM(config), r=2, target_modules="all-linear")
    mask = torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)
    expected = loss_and_gradients(model, attention_mask=mask)
    lean(model, checkpointing, chunked_loss=False)
    assert_same_learning(loss_and_gradients(model, attention_mask=mask), expected)


def test_a_head_that_trains_by_now_gets_whole_logits_and_its_gradient():
    model = lean(in_training(gpt2(tie_word_embeddings=False)))
    model.lm_head.requires_grad_(True)
    output = model(input_ids=IDS, labels=LABELS)
    assert output.logits is not None
    output.loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_nothing_is_checkpointed_below_the_lowest_adapter():
    calls = []
    model = in_training(target_modules=r"transformer\.h\.1\..*c_attn")
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda *args, block=block: calls.append(block))
    expected = loss_and_gradients(model)
    for checkpointing in ("block", "mlp"):
        lean(model, checkpointing)
        calls.clear()
        assert_same_learning(loss_and_gradients(model), expected)
        counts = [calls.count(block) for block in model.transformer.h]
        assert counts == ([1, 2] if checkpointing == "block" else [1, 1])


def test_a_failing_call_leaves_the_head_as_it_was():
    model = lean(in_training())
    with pytest.raises(LeanError, match="one label per token"):
        model(input_ids=IDS, labels=LABELS[:, :-2])
    with pytest.raises(IndexError):
        model(input_ids=IDS + VOCABULARY, labels=LABELS)
    assert model(input_ids=IDS).logits.shape[-1] == VOCABULARY


@pytest.mark.parametrize("where", ["transformer.ln_f", "lm_head"])
def test_ctrl_c_within_a_training_step_leaves_the_head_as_it_was(where):
    model = lean(in_training())
    expected = model.eval()(input_ids=IDS).logits

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.get_submodule(where).register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):  # torch calls no hook of the model then
        model.train()(input_ids=IDS, labels=LABELS)
    hook.remove()
    assert torch.equal(model.eval()(input_ids=IDS).logits, expected)


@pytest.mark.usefixtures("unprobed")
@pytest.mark.each_value
@pytest.mark.parametrize("checkpointing", ["last", "mlp", "block", "sqrt"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_torch_func_gives_the_gradients_of_a_model_that_recomputes(make, checkpointing):
    model = in_training(make())
    _, expected = loss_and_gradients(model)
    lean(model, checkpointing)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        return torch.func.functional_call(model, values, (), {"input_ids": IDS, "labels": LABELS}).loss

    found = torch.func.grad(loss)(parameters)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", ["none", "last", "mlp", "block", "sqrt"])
def test_unlean_brings_everything_back(checkpointing):
    model = in_training()
    classes = [type(module) for module in model.modules()]
    own = {id(module): set(module.__dict__) for module in model.modules()}
    expected = loss_and_gradients(model)
    unlean(lean(model, checkpointing))
    assert [type(module) for module in model.modules()] == classes
    assert {id(module): set(module.__dict__) for module in model.modules()} == own
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    found = loss_and_gradients(model)
    assert torch.equal(found[0].loss, expected[0].loss)
    assert torch.equal(found[0].logits, expected[0].logits)
    unlean(model)  # nothing to do


@pytest.mark.parametrize("cause", ["refused", "interrupted"])
def test_a_call_that_fails_leaves_the_model_as_lean_as_it_was(cause, monkeypatch):
    model = lean(in_training(), "block")
    expected = loss_and_gradients(model)
    before, kept = list(map(type, model.modules())), bytes_kept(model, input_ids=IDS, labels=LABELS)
    if cause == "refused":
        model.lm_head.register_forward_hook(lambda *args: None)
        with pytest.raises(LeanError, match="hooked.*Nothing was changed"):
            lean(model, "sqrt")
        model.lm_head._forward_hooks.clear()
    else:
        monkeypatch.setattr(Probe, "compare", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lean(model, "sqrt")
    assert list(map(type, model.modules())) == before
    assert bytes_kept(model, input_ids=IDS, labels=LABELS) == kept
    assert_same_learning(loss_and_gradients(model), expected)
    fresh = in_training()
    unlean(model)
    assert list(map(type, model.modules())) == list(map(type, fresh.modules()))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_loss_function_of_ones_own_comes_back():
    from transformers.loss.loss_utils import ForCausalLMLoss

    model = in_training()
    model.loss_function = ForCausalLMLoss
    unlean(lean(model))
    assert model.__dict__["_loss_function"] is ForCausalLMLoss


def test_another_call_replaces_the_options():
    model = in_training()
    expected = loss_and_gradients(model)
    for checkpointing in ("block", "last", "mlp", "none"):
        assert_same_learning(loss_and_gradients(lean(model, checkpointing)), expected)
        assert checkpoints_blocks(model) == (checkpointing in ("last", "block", "sqrt"))
    assert not lean(model, chunked_loss=False)(input_ids=IDS, labels=LABELS).logits.isnan().any()


@pytest.mark.usefixtures("unprobed")
@pytest.mark.each_value
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("checkpointing", ["last", "mlp", "block"])
def test_copies_are_lean_and_can_be_undone_on_their_own(copied, checkpointing):
    model = lean(in_training(), checkpointing)
    expected = loss_and_gradients(model)
    other = copied(model)
    assert_same_learning(loss_and_gradients(other), expected, 0)
    unlean(other)
    assert other(input_ids=IDS, labels=LABELS).logits is not None
    assert model(input_ids=IDS, labels=LABELS).logits is None


def test_names_files_and_merging_are_untouched(tmp_path):
    model = in_training(target_modules=["c_attn"])
    keys = list(model.state_dict())
    expected = model.eval()(IDS).logits
    lean(model.train(), "mlp")
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.eval()(IDS).logits, expected)
    unlean(merged)
    assert mixins(merged) == set()
    torch.testing.assert_close(merged(IDS).logits, expected)


def test_layers_made_fast_before_adapting_are_still_fused(monkeypatch):
    monkeypatch.setattr("minipeft.kernels.matmul.onednn_is_faster", lambda: True)
    base = gpt2().requires_grad_(False)
    lean(base)
    assert "FastLinear" in mixins(base)
    model = get_lora_model(base, LoraConfig(r=2))
    layer = model.transformer.h[0].attn.c_attn
    assert is_plain_linear(layer.ops, layer.base_layer)
    assert model.merge_adapter().worst < 1e-5


def scaled(model):
    head = model.lm_head

    def forward(hidden):
        return nn.Linear.forward(head, hidden) * 0.5

    head.forward = forward
    return model


REFUSED = {
    "soft caps": (lambda: AutoModelForCausalLM.from_config(Gemma2Config(**SIZES)), "changes its logits"),
    "a scale": (
        lambda: AutoModelForCausalLM.from_config(CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
        "changes its logits",
    ),
    "a division": (
        lambda: AutoModelForCausalLM.from_config(
            GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=8.0)
        ),
        "changes its logits",
    ),
    "a classifier": (bert_classifier, "no output head"),
    "an encoder and decoder": (t5, "not transformers' ForCausalLMLoss|does not compute its loss"),
    "a patched head": (lambda: scaled(gpt2()), "patched or hooked"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_the_same_is_refused_and_nothing_has_changed(case):
    make, why = REFUSED[case]
    torch.manual_seed(0)
    model = get_lora_model(make(), LoraConfig(r=2, target_modules="all-linear")).train()
    classes, own = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    with pytest.raises(LeanError, match=why) as error:
        lean(model, "block")
    assert "chunked_loss=False" in str(error.value)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == own


@pytest.mark.parametrize("case", ["soft caps", "a scale"])
def test_what_is_refused_with_the_chunked_loss_works_without(case):
    torch.manual_seed(0)
    model = in_training(REFUSED[case][0](), target_modules="all-linear")
    expected = loss_and_gradients(model)
    lean(model, "block", chunked_loss=False)
    found = loss_and_gradients(model)
    assert_same_learning(found, expected)
    torch.testing.assert_close(found[0].logits, expected[0].logits)


def test_a_head_that_trains_or_is_adapted_is_refused():
    with pytest.raises(LeanError, match="its output head trains"):
        lean(gpt2())
    with pytest.raises(LeanError, match=r"chunked_loss=False"):
        lean(in_training(target_modules=["lm_head", "c_attn"]))
    with pytest.raises(LeanError, match=r"chunked_loss=False"):
        lean(in_training(gpt2(tie_word_embeddings=False), modules_to_save=["lm_head"]))


def test_the_probe_catches_a_swap_that_computes_something_else(monkeypatch):
    monkeypatch.setattr("torch.nn.functional.gelu", lambda x, approximate: x.relu())
    model = in_training()
    expected = loss_and_gradients(model)
    with pytest.raises(LeanError, match=r"would differ by \d"):
        lean(model)
    assert mixins(model) == set()
    assert_same_learning(loss_and_gradients(model), expected, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_is_not_misled_by_an_output_whose_norm_never_changes(dtype):
    model = adapted(gpt2(GPT2Model), target_modules="all-linear").to(dtype)
    model.ln_f.reset_parameters()
    model.wte.weight.data.mul_(100)  # far above the norm's epsilon, as in pretrained models
    gradients = Probe(model, with_labels=False).gradients
    assert max(gradient.norm() for gradient in gradients) > 1e-3, "more than rounding"
    lean(model, "block", chunked_loss=False)


def test_the_probe_leaves_modes_generators_gradients_and_buffers_alone():
    model = in_training(lora_dropout=0.1)
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    lean(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lean(in_training(), "blocks"), LeanError, "closest: 'block'"),
        (lambda: lean(in_training(), True), LeanError, "must be one of"),
        (lambda: lean(in_training(), 0), LeanError, "or a number of blocks, not 0"),
        (lambda: lean(nn.Linear(2, 2)), StateError, "takes a transformers model"),
        (lambda: lean("gpt2"), StateError, "takes a transformers model"),
        (
            lambda: lean(
                in_training(AutoModelForCausalLM.from_config(OTHERS["opt"]), target_modules=["q_proj"]), "mlp"
            ),
            LeanError,
            'use checkpointing="block"',
        ),
    ],
)
def test_wrong_arguments_are_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_model_of_images_is_named_as_one_whatever_its_class_inherits():
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {
        "image_size": 16,
        "patch_size": 4,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    model = Llama4VisionModel(Llama4VisionConfig(**sizes, **more))
    assert model.main_input_name == "input_ids"
    for each in (model, get_lora_model(model, LoraConfig(r=2, target_modules=["q_proj"]))):
        with pytest.raises(LeanError, match="Llama4VisionModel reads pixel_values"):
            lean(each, chunked_loss=False)


def test_gradient_checkpointing_that_is_on_already_is_refused():
    model = in_training()
    with foreign_code():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(LeanError, match="gradient checkpointing is on already"):
        lean(model, "block")
    assert checkpoints_blocks(model)
    expected = loss_and_gradients(model)
    lean(model)  # keeps to it
    assert all(block.gradient_checkpointing for block in model.transformer.h)
    assert_same_learning(loss_and_gradients(model), expected)


def test_describe_counts_what_was_done():
    model = lean(in_training(), "block")
    said = describe(model.__dict__["_minipeft_lean"])
    assert "2 FusedGelu" in said
    assert "5 Recomputed" in said
    assert "2 blocks recomputed" in said
    assert said.endswith("loss in chunks")


def test_the_trainer_of_transformers_trains_a_lean_model_to_the_same_losses(tmp_path):
    def losses(change):
        model = change(in_training(gpt2(), init_lora_weights=True))
        data = [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(4, 1)]
        arguments = TrainingArguments(
            tmp_path, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.evaluate()

    plain, evaluated = losses(lambda model: model)
    lean_losses, lean_evaluated = losses(lean)
    assert lean_losses == pytest.approx(plain, rel=1e-3)
    assert lean_evaluated["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-3)


def kept_of_64_tokens(model):
    ids = torch.zeros(2, 32, dtype=torch.long)
    return bytes_kept(model, input_ids=ids, labels=ids)


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(
    ("subject", "units"),
    [
        ("full", 28),
        ("core", 28),
        ("lean", 10),
        ("lean, dropout", 10),
        ("mlp", 6),
        ("block", 1),
    ],
)
def test_a_block_of_gpt2_keeps_so_many_arrays_of_its_width(subject, units):
    """In units of one (rows, width) array; on top come r floats a row and adapter, and a few statistics."""

    def model(n_layer):
        base = gpt2(use_cache=False)
        config = copy.deepcopy(base.config)
        config.n_layer, config.n_embd, config.n_head = n_layer, 256, 2
        torch.manual_seed(0)
        base = type(base)(config).train()
        if subject == "full":
            return base
        dropout = 0.1 if "dropout" in subject else 0.0
        made = in_training(base, r=1, target_modules=["c_attn", "c_proj", "c_fc"], lora_dropout=dropout)
        return made if subject == "core" else lean(made, subject if subject in ("mlp", "block") else "none")

    block = kept_of_64_tokens(model(3)) - kept_of_64_tokens(model(2))
    unit = 2 * 32 * 256 * 4
    small = 2 * 32 * 4 * (4 + 4 + 2)  # h of four adapters, mean and deviation of two norms, two heads' sums
    assert units * unit <= block <= units * unit + small


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(("checkpointing", "kept"), [("block", (9, 4)), ("sqrt", (3, 2)), (4, (3, 1)), (2, (5, 2))])
def test_a_group_of_blocks_keeps_one_array_of_its_width(checkpointing, kept):
    nine, four = (kept_of_64_tokens(lean(of_blocks(number), checkpointing)) for number in (9, 4))
    unit = 2 * 32 * 64 * 4
    assert nine - four == (kept[0] - kept[1]) * unit


@functools.cache
def of_blocks(number):
    """A GPT-2 of so many blocks, made once: a call of `lean` replaces the options of the one before."""
    config = copy.deepcopy(gpt2(use_cache=False).config)
    config.n_layer, config.n_embd, config.n_head = number, 64, 2
    return in_training(type(gpt2())(config).train(), r=1, target_modules=["c_attn", "c_fc"])


GROUPED = [(gpt2, torch.float32, 0.2), (gpt2, "autocast", 0.0), (llama, torch.float32, 0.0)]


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(
    ("make", "dtype", "dropout"), thinned(([gpt2, llama], [torch.float32, "autocast"], [0.0, 0.2]), GROUPED)
)
def test_groups_of_blocks_compute_their_inputs_again_to_the_last_bit(make, dropout, dtype):
    config = copy.deepcopy(make(use_cache=False).config)
    setattr(config, "n_layer" if make is gpt2 else "num_hidden_layers", 5)
    torch.manual_seed(0)
    base = type(make())(config)
    model = in_training(base, target_modules="all-linear", lora_dropout=dropout)
    ids = torch.randint(VOCABULARY, (2, 8))

    def gradients(checkpointing):
        lean(model, checkpointing)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward(retain_graph=True)
        loss.backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return [loss, *found]

    wanted = gradients("block")
    for checkpointing in ("sqrt", 2, 100):
        assert all(torch.equal(f, w) for f, w in zip(gradients(checkpointing), wanted, strict=True))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.manual_seed(1)
    copied(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("make", [gpt2, llama])
def test_feed_forward_modules_are_recomputed_in_tiles_of_tokens(make, monkeypatch):
    monkeypatch.setitem(sample_slices.DEFAULT_ROWS, "cpu", 5)
    model = in_training(make(use_cache=False), target_modules="all-linear")
    ids = torch.randint(VOCABULARY, (1, 17))
    expected = loss_and_gradients(model, input_ids=ids, labels=ids)
    sizes = []
    for name, module in model.named_modules():
        if name.endswith(("c_fc", "up_proj")):
            module.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[1]))
    lean(model, "block")
    sizes.clear()
    assert_same_learning(loss_and_gradients(model, input_ids=ids, labels=ids), expected)
    assert set(sizes) == {4, 5}
    unlean(model)
    assert_same_learning(loss_and_gradients(model, input_ids=ids, labels=ids), expected)


def rotary_model(kind, dtype, n_layer, ff):
    """Grouped heads: keys and values of half a unit together."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": ff, "num_hidden_layers": n_layer, "num_attention_heads": 4}
    config = {"num_key_value_heads": 1, "vocab_size": 64, "use_cache": False, "head_dim": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **config, **ids)).to(dtype).train()


LLAMAS = {
    # Two norms' inputs, q and the output of attention, k and v (a quarter each), gate and up (three each).
    ("llama", "none"): 4 + 0.5 + 2 * 3,
    ("mistral", "none"): 4 + 0.5 + 2 * 3,
    ("phi3", "none"): 4 + 0.25 + 1.5 + 2 * 3,  # v is a view of q, k and v
    ("qwen3", "none"): 4 + 0.5 + 1 + 0.25 + 2 * 3,  # and the inputs of the norms of q and k
    ("llama", "mlp"): 4 + 0.5,
    ("llama", "block"): 1,
}
TRIED = {(case, torch.float32) for case in LLAMAS} | {
    (("llama", subject), torch.bfloat16) for subject in ("none", "mlp")
}


@pytest.mark.each_value
@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(("case", "dtype"), thinned((LLAMAS, [torch.float32, torch.bfloat16]), TRIED))
def test_a_block_of_the_llama_family_keeps_so_many_arrays_of_its_width(case, dtype):
    """In units of one (rows, width) array of the model's dtype, as for GPT-2."""
    (kind, subject), units = case, LLAMAS[case]

    def model(n_layer):
        base = rotary_model(kind, dtype, n_layer, 3 * 256)
        targets = [name for name, layer in base.named_modules() if type(layer) is nn.Linear and "lm_head" not in name]
        return lean(in_training(base, r=1, target_modules=targets), subject)

    block = kept_of_64_tokens(model(3)) - kept_of_64_tokens(model(2))
    unit, rows = 2 * 32 * 256 * dtype.itemsize, 2 * 32
    heads = 4 * (4 + 2 * 5)  # of attention the sums of four heads, and of norms of q and k a deviation each
    casts = 2 * 20 * 256 if dtype is torch.bfloat16 else 0  # of A and B
    assert units * unit <= block <= units * unit + rows * (4 * 7 + 2 * 4 + heads) + casts


@pytest.mark.skipif(not onednn_is_faster(), reason="MKL is the faster library here")
def test_frozen_layers_take_the_faster_library_in_training_only(monkeypatch):
    calls = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        "minipeft.kernels.matmul._onednn", lambda: lambda *args: calls.append(min(args[1].shape)) or real(*args)
    )
    monkeypatch.setattr("minipeft.kernels.matmul.WORTH_IT", 0)
    model = lean(in_training(target_modules=["c_attn"]))
    calls.clear()
    with torch.no_grad():
        model(input_ids=IDS)
    assert set(calls) <= {4}  # the adapters' own narrow products
    model(input_ids=IDS).logits.sum().backward()
    assert sum(size > 4 for size in calls) > 12


def test_memory_is_handed_back_by_glibc_and_nowhere_else(monkeypatch):
    from minipeft.kernels import glibc

    trim = inspect.unwrap(glibc.trim)
    trim("cpu")
    glibc._of_glibc.cache_clear()
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert glibc._of_glibc("malloc_trim") is None
    trim("cpu")
    glibc.map_large_arrays(2**20)
    glibc._of_glibc.cache_clear()


@pytest.mark.parametrize(
    ("checkpointing", "forward", "backward"), [("none", 0, 0), ("last", 0, 1), (None, 0, 1), ("block", 5, 2)]
)
def test_memory_goes_back_before_a_block_is_computed_again_and_around_the_loss_if_memory_comes_first(
    checkpointing, forward, backward, monkeypatch
):
    from minipeft.kernels import glibc

    model, calls = lean(adapted(gpt2()).train(), checkpointing), []
    monkeypatch.setattr(glibc, "trim", calls.append)
    loss = model(input_ids=IDS, labels=IDS).loss
    assert len(calls) == forward
    loss.backward()
    assert len(calls) == forward + backward


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize("checkpointing", ["block", "sqrt", 2])
def test_recomputing_all_blocks_gives_freed_arrays_back_at_once(checkpointing):
    from minipeft.kernels import glibc

    glibc._of_glibc("mallopt")(glibc.M_MMAP_THRESHOLD, 2**25)  # what glibc comes to by itself
    lean(adapted(gpt2()), checkpointing)
    before = resident()
    mib = 5 if checkpointing == "block" else 2
    large = [torch.ones(mib * 2**18) for _ in range(16)]
    kept = [torch.ones(2**10), *large[1::2]]
    assert resident() - before > (16 * mib - 1) * 2**20
    del large
    assert resident() - before < (8 * mib + 1) * 2**20, "freed arrays between others stay"
    del kept


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("checkpointing", ["mlp", "block"])
def test_a_feed_forward_module_that_blocks_share_is_checkpointed_once(checkpointing):
    base = gpt2()
    base.transformer.h[1].mlp = base.transformer.h[0].mlp
    model = in_training(base)
    classes, expected = [type(module) for module in model.modules()], loss_and_gradients(model)
    assert_same_learning(loss_and_gradients(lean(model, checkpointing)), expected)
    unlean(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.usefixtures("unprobed")
@pytest.mark.each_value
@pytest.mark.parametrize("checkpointing", ["none", "last", "block"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_head_whose_rows_of_tokens_train_still_has_its_loss_in_chunks(make, checkpointing):
    tokens = [7, 3, 98] if make is gpt2 else {"embed_tokens": [7, 3], "lm_head": [3, 98, 5]}
    model = in_training(make(), trainable_token_indices=tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected = loss_and_gradients(model, input_ids=IDS, labels=LABELS)
    assert sum("trainable_tokens" in name for name in expected[1]) == (1 if make is gpt2 else 2)
    lean(model, checkpointing)
    assert_same_learning(loss_and_gradients(model, input_ids=IDS, labels=LABELS), expected)
    assert model(input_ids=IDS, labels=LABELS).logits is None
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert_same_learning(loss_and_gradients(copied, input_ids=IDS, labels=LABELS), expected)
    with model.disable_adapter():
        plain = make().train()
        torch.testing.assert_close(model(input_ids=IDS, labels=LABELS).loss, plain(input_ids=IDS, labels=LABELS).loss)
    model.add_adapter("head", LoraConfig(r=2, target_modules=["lm_head"])) if make is llama else None
    if make is llama:
        model.set_adapter(["default", "head"])
        assert model(input_ids=IDS, labels=LABELS).logits is not None
        model.set_adapter("default")
        model.delete_adapter("head")
    unlean(model)
    assert_same_learning(loss_and_gradients(model, input_ids=IDS, labels=LABELS), expected)
    merged = lean(model, checkpointing).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS, labels=LABELS).loss, expected[0].loss)


@pytest.mark.parametrize(("spread", "is_deep"), [(0.02, False), (0.3, True)])
def test_in_half_precision_as_much_may_differ_as_one_rounding_of_the_embeddings_changes(spread, is_deep):
    """A deep model multiplies each rounding; weights that are spread widely do so in four blocks, too."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", initializer_range=spread, **sizes, **ids))
    model = in_training(base, target_modules="all-linear").bfloat16()
    probe = Probe(model, with_labels=True)
    assert (HALF_TOLERANCE < probe.of_gradients <= MOST) if is_deep else probe.of_gradients == HALF_TOLERANCE
    assert probe.tolerance == HALF_TOLERANCE  # of the loss
    probe.compare(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.adapters["default"].lora_B.neg_()
    with pytest.raises(LeanError, match="would differ"):
        probe.compare(model)

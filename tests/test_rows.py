"""A batch whose rows use different adapters: each row is what that adapter alone computes, and PEFT's mixed batch agrees."""

import contextlib
import copy
import functools
import inspect
import math
import threading

import accelerate
import pytest
import torch
import transformers as tf
from tiny_layers import OneLayer
from tiny_models import (
    adapted,
    bert_classifier,
    disturb,
    foreign_code,
    gpt2,
    gpt2_classifier,
    llama,
    logits,
    t5,
    token_ids,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

import minipeft
from minipeft import ConfigError, LoraConfig, StateError
from minipeft.files import hotswap
from minipeft.files.restore import restore_adapter
from minipeft.injection import attach
from minipeft.injection.module_tree import wrappers_of
from minipeft.merging import mergeable_model

BASE = "__base__"
METHODS = {
    "lora": functools.partial(minipeft.LoraConfig, r=2, init_lora_weights=False),
    "lora_r5": functools.partial(minipeft.LoraConfig, r=5, lora_alpha=3, init_lora_weights=False),
    "lora_bias": functools.partial(minipeft.LoraConfig, r=2, lora_bias=True, init_lora_weights=False),
    "pissa": functools.partial(minipeft.LoraConfig, r=2, init_lora_weights="pissa"),
    "dora": functools.partial(minipeft.LoraConfig, r=2, use_dora=True, init_lora_weights=False),
    "adalora": functools.partial(minipeft.AdaLoraConfig, init_r=2, target_r=1, total_step=10, init_lora_weights=False),
    "vera": functools.partial(minipeft.VeraConfig, r=2, init_weights=False),
    "loha": functools.partial(minipeft.LoHaConfig, r=2, init_weights=False),
    "lokr": functools.partial(minipeft.LoKrConfig, r=2, init_weights=False),
    "ia3": functools.partial(minipeft.IA3Config, feedforward_modules=[], init_ia3_weights=False),
    "ia3_in": functools.partial(minipeft.IA3Config, feedforward_modules=["layer"], init_ia3_weights=False),
    "oft": functools.partial(minipeft.OFTConfig, oft_block_size=2, init_weights=False),
    "tokens": functools.partial(minipeft.TrainableTokensConfig, token_indices=[1, 3], init_weights=False),
}
LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), lambda n: torch.randn(n, 3, 4)),
    "linear on vectors": (lambda: nn.Linear(4, 6, bias=False), lambda n: torch.randn(n, 4)),
    "conv1d of gpt2": (lambda: Conv1D(6, 4), lambda n: torch.randn(n, 3, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 2, padding=1), lambda n: torch.randn(n, 4, 3, 3)),
    "embedding": (lambda: nn.Embedding(8, 6), lambda n: torch.randint(8, (n, 5))),
}


def alone(model, name, call):
    """What the model computes if all rows use this adapter."""
    if name == BASE:
        with model.disable_adapter():
            return call()
    before = model.active_adapters[:]
    model.set_adapter(name)
    try:
        return call()
    finally:
        model.set_adapter(before)


def check_rows(model, names, call, tolerance=1e-5):
    """Each row of `call(adapter_names=...)` is the one that its adapter alone gives; returns the output."""
    found = call(adapter_names=names)
    for name in dict.fromkeys(names):
        own = alone(model, name, call)
        for row in [row for row, used in enumerate(names) if used == name]:
            error = (found[row] - own[row]).abs().max()
            assert error <= tolerance * (1 + own[row].abs().max()), (name, row, error)
            assert name != BASE or torch.equal(found[row], own[row])
    return found


def several(model, configs):
    """The model with these adapters, each of which shows in the output."""
    for place, (name, config) in enumerate(configs.items()):
        if isinstance(model, minipeft.AdaptedModel):
            model.add_adapter(name, config)
        else:
            minipeft.get_adapter_model(model, config, name)
        model.set_adapter(name)
        disturb(model, seed=place, scale=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def three():
    configs = {"a": LoraConfig(r=4), "b": LoraConfig(r=2, lora_alpha=7, target_modules=["c_fc", "mlp.c_proj"])}
    return several(gpt2(), {**configs, "c": LoraConfig(r=3, use_rslora=True, target_modules="all-linear")})


@pytest.mark.parametrize("layer", LAYERS)
def test_all_methods_in_one_batch_on_one_layer(layer):
    make, inputs = LAYERS[layer]
    model, x = OneLayer(make()).double(), None
    for name, config in METHODS.items():
        with contextlib.suppress(minipeft.TargetError, ConfigError):  # a method that this type of layer cannot have
            config = config(target_modules=["layer"])
            model = several(model, {name: config})
    names = [*model.adapter_configs, BASE, *reversed(model.adapter_configs)]
    x = inputs(len(names))
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        check_rows(model, names, functools.partial(model, x), 1e-12)
        check_rows(model, sorted(names), functools.partial(model, x), 1e-12)
    assert len(set(names)) > 7


@pytest.mark.parametrize("names", ["abc", "ccaab_b", "b__b__", "aabb", "_a_b_c_a"], ids=str)
def test_rows_of_a_model_equal_each_adapter_alone(three, names):
    names = [BASE if name == "_" else name for name in names]
    ids = token_ids(len(names), 7)
    mask = (torch.arange(7) >= torch.arange(len(names))[:, None] % 4).long()  # padded on the left
    call = functools.partial(three, ids, attention_mask=mask)
    with torch.no_grad():
        check_rows(three, names, lambda **more: call(**more).logits)
    assert three.active_adapters == ["c"]


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("names", ["aaaaaaaabc", "abcabcabc", "cba"])
def test_both_schemes_of_low_rank_rows_agree(three, monkeypatch, names, length):
    ids = token_ids(len(names), length)
    from minipeft.injection import layer_by_row

    with torch.no_grad():
        for pays in (True, False):
            monkeypatch.setattr(layer_by_row, "_blocks_pay", lambda *args, pays=pays: pays)
            check_rows(three, list(names), lambda **more: three(ids, **more).logits)


def family(kind):
    """(model, call) of a family that is not a decoder alone."""
    ids = token_ids(4, 6)
    if kind == "t5":
        return t5(), lambda model, **more: model(input_ids=ids, decoder_input_ids=ids[:, :5], **more).logits
    if kind == "bert":
        return bert_classifier(), lambda model, **more: model(ids, **more).logits
    if kind == "opt":  # whose feed-forward part sees (rows * length, width)
        config = tf.OPTConfig(
            hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=100, word_embed_proj_dim=16,
            max_position_embeddings=32, dropout=0.0, attention_dropout=0.0,
        )  # fmt: skip
        return tf.OPTForCausalLM(config).eval(), lambda model, **more: model(ids, **more).logits
    config = tf.ViTConfig(image_size=8, patch_size=4, num_labels=3, hidden_size=16, num_hidden_layers=2,
                          num_attention_heads=2, intermediate_size=24)  # fmt: skip
    pixels = torch.randn(4, 3, 8, 8)
    return tf.ViTForImageClassification(config).eval(), lambda model, **more: model(pixel_values=pixels, **more).logits


@pytest.mark.parametrize("kind", ["t5", "bert", "opt", "vit"])
def test_other_families(kind):
    model, call = family(kind)
    linear = {"target_modules": "all-linear", "init_lora_weights": False}
    several(model, {"a": LoraConfig(r=2, **linear), "b": LoraConfig(r=3, use_dora=True, **linear)})
    with torch.no_grad():
        check_rows(model, ["b", "a", BASE, "b"], functools.partial(call, model))


def test_trained_copies_tied_layers_and_tokens_by_row():
    model = several(
        gpt2_classifier(),
        {
            "a": LoraConfig(r=2, modules_to_save=["score", "ln_f"], target_modules=["c_attn"]),
            "b": LoraConfig(r=2, modules_to_save=["score"], target_modules=["c_fc"]),
            "c": LoraConfig(r=2, target_modules=["c_attn"]),
        },
    )
    ids = token_ids(5)
    with torch.no_grad():
        check_rows(model, ["a", "b", BASE, "c", "a"], lambda **more: model(ids, **more).logits)
    handle = model.transformer.register_forward_pre_hook(lambda module, args: model.score.weight + 1)
    with pytest.raises(StateError, match=r"score is read, not called"):
        model(ids, adapter_names=["a", "b", "a", "b", "a"])
    handle.remove()
    model = several(
        gpt2(),
        {
            "a": minipeft.TrainableTokensConfig(token_indices=[5, 7]),
            "b": LoraConfig(r=2, trainable_token_indices=[7, 9]),
            "c": LoraConfig(r=2, target_modules=["wte", "lm_head"], ensure_weight_tying=True),
        },
    )
    ids[:, 2:5] = torch.tensor([5, 7, 9])
    with torch.no_grad():
        check_rows(model, ["a", "b", BASE, "c", "a"], lambda **more: model(ids, **more).logits)


def test_a_weight_that_is_read_cannot_differ_by_row_but_its_shape_is_known():
    model = several(t5(), {"a": LoraConfig(r=2, target_modules=["wo"]), "b": LoraConfig(r=2, target_modules=["wo"])})
    layer, ids = model.encoder.block[0].layer[1].DenseReluDense.wo, token_ids()
    seen = []

    def look(module, args):
        seen.append((layer.weight.shape, layer.weight.dtype))
        with pytest.raises(StateError, match=r"encoder.block.0.layer.1.DenseReluDense.wo is read"):
            layer.weight + 1

    handle = model.encoder.register_forward_pre_hook(look)
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids, adapter_names=["a", "b"])
    handle.remove()
    assert seen == [(torch.Size([32, 48]), torch.float32)]


class Experts(nn.Module):
    """A mixture whose experts see the tokens that chose them."""

    main_input_name = "x"

    def __init__(self, shuffled):
        super().__init__()
        self.shuffled = shuffled
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.shared = nn.Linear(4, 4)

    def forward(self, x):
        flat = x.flatten(0, 1)
        order = torch.randperm(len(flat)) if self.shuffled else torch.arange(len(flat))
        y = torch.empty_like(flat)
        y[order] = sum(expert(flat[order]) for expert in self.experts)
        return (y + self.shared(flat)).view(x.shape)


IMAGE = 60


def with_images(kind):
    """A tiny model of text and images; each image is four tokens, or one."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "idefics3":
        config = tf.Idefics3Config(text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=2)
        return tf.Idefics3ForConditionalGeneration(config).eval()
    vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    more = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, **more)
    return tf.LlavaForConditionalGeneration(config).eval()


def images_in_rows(kind, *each):
    """A batch with these numbers of images in its rows."""
    tokens, g = 1 if kind == "idefics3" else 4, torch.Generator().manual_seed(3)
    ids = torch.randint(1, 50, (len(each), 12), generator=g)
    for row, number in enumerate(each):
        ids[row, 1 : 1 + number * tokens] = IMAGE
    images = torch.randn(sum(each), 3, 8, 8, generator=g)
    if kind == "idefics3":  # which pads the images of each row with empty ones
        split = images.split(each)
        images = nn.utils.rnn.pad_sequence(split, batch_first=True)
    return {"input_ids": ids, "pixel_values": images}


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["idefics3", "llava"])
@pytest.mark.parametrize("part", ["vision", "projector", "all"])
def test_images_belong_to_their_rows_or_are_refused_by_name(kind, part):
    """Two images in two rows may both be of one row."""
    names = {
        "vision": "vision.*q_proj",
        "projector": "(modality_projection.proj|linear_1)",
        "all": "(q_proj|proj|linear_1)",
    }
    model = several(with_images(kind), {name: LoraConfig(r=2, target_modules=f".*{names[part]}") for name in "ab"})

    def call(*each, **more):
        return model(**images_in_rows(kind, *each), **more).logits

    with torch.no_grad():
        for each in ((1, 1), (2, 2)):
            check_rows(model, ["a", "b"], functools.partial(call, *each))
            check_rows(model, [BASE, "a"], functools.partial(call, *each))
    with pytest.raises(StateError, match="images or sound"):
        call(0, 2, adapter_names=["a", "b"])


class Placed(nn.Module):
    """Adds a table of positions to the four parts of each image, as Florence-2 does."""

    def __init__(self):
        super().__init__()
        self.places = nn.Embedding(4, 16)

    def forward(self, x):
        return x + self.places(torch.arange(4))


def test_positions_of_images_are_not_taken_for_the_rows():
    base = with_images("llava")
    base.model.multi_modal_projector = nn.Sequential(Placed(), base.model.multi_modal_projector)
    model = several(base, {name: LoraConfig(r=2, target_modules=["places"]) for name in "ab"})
    with torch.no_grad(), pytest.raises(StateError, match="places is called with the images or sound"):
        model(**images_in_rows("llava", 1, 1), adapter_names=["a", "b"])


def test_a_head_with_layers_inside_is_called_with_rows():
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    text |= {"vocab_size": 100, "num_key_value_heads": 2, "layer_types": ["full_attention"], "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {
        "text_config": text,
        "vision_config": vision | {"image_size": 8, "patch_size": 4},
        "mm_tokens_per_image": 4,
    }
    torch.manual_seed(0)
    base = tf.T5Gemma2ForTokenClassification(tf.T5Gemma2Config(encoder=parts, decoder=text, num_labels=3)).eval()
    options = {"r": 2, "init_lora_weights": False, "modules_to_save": None}
    model = several(base, {name: LoraConfig(target_modules=["score.out_proj", "q_proj"], **options) for name in "ab"})
    with torch.no_grad():
        check_rows(model, ["a", "b"], lambda **more: model(input_ids=token_ids(), **more).logits)


def test_a_decoder_of_whisper_alone_reads_rows_of_tokens():
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 200}
    config = tf.WhisperConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    torch.manual_seed(0)
    base = tf.WhisperForCausalLM(config).eval()
    model = several(base, {name: LoraConfig(r=2, target_modules=["q_proj", "fc1"]) for name in "ab"})
    check_rows(model, ["a", "b"], lambda **more: model(input_ids=token_ids(), **more).logits)


def test_experts_are_refused_by_name_unless_all_rows_agree():
    options = {"r": 2, "init_lora_weights": False}
    model = several(
        Experts(True),
        {
            "a": LoraConfig(target_modules=["experts.0", "shared"], **options),
            "b": LoraConfig(target_modules=["shared"], **options),
            "c": LoraConfig(target_modules=["shared"], **options),
        },
    )
    x = torch.randn(3, 4, 4)
    with torch.no_grad():
        check_rows(model, ["b", "c", BASE], functools.partial(model, x))  # (rows * length, width)
        assert torch.allclose(model(x, adapter_names=["a"] * 3), alone(model, "a", functools.partial(model, x)))
        with pytest.raises(StateError, match=r"experts.0 is called with the tokens that chose one expert"):
            model(x, adapter_names=["a", "b", "c"])
    assert not model._minipeft.switch.running


class PositionsFirst(nn.Module):
    """As XLNet, it computes with (length, rows, width)."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, input_ids):
        return self.layer(self.table(input_ids.t())).transpose(0, 1)


class Positions(nn.Module):
    """Its table of positions is read without rows."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.layer = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, input_ids):
        return self.layer(self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])))


def relative(model, ids):
    return model(input_ids=ids, decoder_input_ids=ids)


def relative_in_decoder(model, ids):
    return model(input_ids=token_ids(4, 7), decoder_input_ids=ids)


INPUTS_WITHOUT_ROWS = {
    "positions": (gpt2, ["wpe"], "transformer.wpe", lambda model, ids: model(ids)),
    "relative positions": (t5, ["relative_attention_bias"], "relative_attention_bias", relative),
    "of a decoder": (
        t5,
        ["decoder.block.0.layer.0.SelfAttention.relative_attention_bias"],
        "decoder.*bias",
        relative_in_decoder,
    ),
    "positions alone": (Positions, ["places"], "places", lambda model, ids: model(ids % 9)),
    "length first": (PositionsFirst, ["layer"], "layer", lambda model, ids: model(ids % 9)),
}


@pytest.mark.each_value
@pytest.mark.parametrize("length", [3, 4, 8])  # of 4 rows: not even a multiple, or as many, shows the wrong dimension
@pytest.mark.parametrize("kind", INPUTS_WITHOUT_ROWS)
def test_an_input_whose_first_dimension_is_not_the_rows_is_refused_by_name(kind, length):
    make, targets, path, call = INPUTS_WITHOUT_ROWS[kind]
    options = {"r": 2, "init_lora_weights": False, "target_modules": targets}
    model, ids = several(make(), {"a": LoraConfig(**options), "b": LoraConfig(**options)}), token_ids(4, length)

    def named(names):
        caller = lambda *args, **kwargs: model(*args, adapter_names=names, **kwargs)  # noqa: E731
        return call(caller, ids)

    with torch.no_grad():
        with pytest.raises(StateError, match=rf"{path} (got an input of shape|is called with positions before rows)"):
            named(["a", "b", "a", "b"])
        alike = named(["a"] * 4)
        own = alone(model, "a", lambda: call(model, ids))
    assert torch.equal(getattr(alike, "logits", alike), getattr(own, "logits", own))


class Patches(nn.Module):
    """Its layer is called with the four patches of an image before the rows, as in MLCD."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        self.patches, self.layer, self.head = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, pixel_values):
        return self.head(self.layer(self.patches(pixel_values).flatten(2).permute(2, 0, 1)).tanh().mean(0))


@pytest.mark.each_value
@pytest.mark.parametrize("make", [Patches, PositionsFirst])
@pytest.mark.parametrize("compiled", [False, True])
def test_as_many_rows_as_positions_of_images_or_of_a_compiled_model(make, compiled):
    x = torch.randn(4, 3, 8, 8) if make is Patches else torch.randint(9, (4, 4))
    names, options = ["a", "b", BASE, "a"], {"r": 2, "init_lora_weights": False}
    model = several(make(), {name: LoraConfig(target_modules=["layer"], **options) for name in "ab"})
    call = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        with pytest.raises(StateError, match="layer is called with positions before rows"):
            call(x, adapter_names=names)
        if make is Patches:
            model = several(make(), {name: LoraConfig(target_modules=["patches", "head"], **options) for name in "ab"})
            call = torch.compile(model, backend="eager") if compiled else model
            check_rows(model, names, lambda **more: call(x, **more))
    torch._dynamo.reset()


class TorchLayers(nn.Module):
    """Torch's own attention and recurrence, with rows or positions first in the model's input and in those layers."""

    def __init__(self, layer, input_rows_first, layer_rows_first):
        super().__init__()
        self.turns = input_rows_first != layer_rows_first
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)
        attention = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=layer_rows_first)
        self.layer = attention if layer == "attention" else nn.LSTM(8, 8, batch_first=layer_rows_first)

    def forward(self, x):
        x = self.table(x)
        x = self.layer(x.transpose(0, 1) if self.turns else x)
        x = x[0] if isinstance(x, tuple) else x
        return self.head(x.transpose(0, 1) if self.turns else x)


@pytest.mark.parametrize("length", [3, 4])  # of 4 rows
@pytest.mark.parametrize("layer", ["attention", "recurrence"])
@pytest.mark.parametrize("layer_rows_first", [False, True])
@pytest.mark.parametrize("input_rows_first", [False, True])
def test_rows_first_or_not_in_torchs_own_layers(layer, layer_rows_first, input_rows_first, length):
    model = TorchLayers(layer, input_rows_first, layer_rows_first)
    several(model, {name: LoraConfig(r=2, target_modules=["head"], init_lora_weights=False) for name in "ab"})
    ids = torch.randint(9, (4, length) if input_rows_first else (length, 4))
    names = ["a", "b", BASE, "a"][: len(ids)]
    with torch.no_grad():
        if input_rows_first:
            check_rows(model, names, functools.partial(model, ids))
        else:
            with pytest.raises(StateError, match=r"input of TorchLayers reaches layer\S* as positions"):
                model(ids, adapter_names=names)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_forward_called_directly_uses_adapter_names_too(make):
    options = {"target_modules": "all-linear", "init_lora_weights": False}
    model = several(make(), {"a": LoraConfig(r=2, **options), "b": LoraConfig(r=3, **options)})
    ids, names = token_ids(3, 5), ["b", BASE, "a"]
    with torch.no_grad():
        found = check_rows(model, names, lambda **more: model.forward(ids, **more).logits)
        assert torch.equal(found, model(ids, adapter_names=names).logits)
    with pytest.raises(StateError, match="no adapter 'c'"):
        model.forward(ids, adapter_names=["a", "b", "c"])
    assert inspect.signature(model.forward) == inspect.signature(make().forward)
    changed = type(make())
    before = changed.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changed, "forward", lambda self, *args, **kwargs: "patched")
        assert model(ids) == "patched"
    assert changed.forward is before


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert"])
def test_as_many_rows_as_positions_are_no_trouble_elsewhere(kind):
    ids = token_ids(4, 4)
    make, options = {"gpt2": (gpt2, {}), "t5": (t5, {"decoder_input_ids": ids}), "bert": (bert_classifier, {})}[kind]
    model = several(make(), {"a": LoraConfig(r=2, target_modules="all-linear"), "b": LoraConfig(r=3)})
    names = ["a", "b", BASE, "a"]
    with torch.no_grad():
        check_rows(model, names, lambda **more: model(input_ids=ids, **options, **more).logits)
    if kind == "gpt2":
        model.eval()._minipeft.switch.order_known = False
        found = generated(model, names, inputs=ids, do_sample=False)
        for row, name in enumerate(names):
            own = alone(model, name, lambda: generated(model, None, inputs=ids, do_sample=False))
            assert torch.equal(found[row], own[row])


def test_nan_in_one_adapter_stays_in_its_rows(three):
    model = copy.deepcopy(three)
    ids, names = token_ids(6, 5), ["a", "b", "c", BASE, "b", "a"]
    with torch.no_grad():
        before = model(ids, adapter_names=names).logits
        for parameter in model.adapter_parameters("b"):
            parameter.fill_(math.nan)
        for length in (5, 1):
            found = model(ids[:, :length], adapter_names=names).logits
            bad = [row for row in range(6) if found[row].isnan().any()]
            assert bad == [1, 4]
            assert length == 1 or torch.equal(found[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model = several(llama().to(dtype), {"a": LoraConfig(r=2), "b": LoraConfig(r=4), "c": minipeft.IA3Config()})
    ids, names = token_ids(4), ["a", "b", "c", BASE]
    tolerance = 8 * torch.finfo(dtype).eps
    with torch.no_grad():
        check_rows(model, names, lambda **more: model(ids, **more).logits, tolerance)
    model = several(llama(), {"a": LoraConfig(r=2), "b": LoraConfig(r=4)})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        check_rows(model, ["a", "b", BASE, "b"], lambda **more: model(ids, **more).logits, 8 * 2**-8)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize("layer", LAYERS)
def test_autocast_to_the_other_half_precision(layer, dtypes):
    """A CPU's autocast refuses to join tensors of the base's dtype."""
    make, inputs = LAYERS[layer]
    model = OneLayer(make()).to(dtypes[0])
    several(model, {name: METHODS[name](target_modules=["layer"]) for name in ("lora", "pissa")})
    model.add_adapter("narrow", METHODS["pissa"](target_modules=["layer"]), autocast_adapter_dtype=False)
    names = ["lora", "pissa", BASE, "narrow", "lora"]
    x = inputs(len(names))
    x = x.to(dtypes[0]) if x.is_floating_point() else x
    with torch.no_grad(), torch.autocast("cpu", dtypes[1]):
        check_rows(model, names, functools.partial(model, x), 8 * 2**-8)


@pytest.mark.parametrize("kind", ["nf4", "int8_weight_only"])
def test_quantized_bases(kind):
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
    model = llama()
    with foreign_code():
        minipeft.quantize(model, kind)
        several(
            model,
            {"a": LoraConfig(r=2), "b": LoraConfig(r=4, use_dora=True), "c": minipeft.OFTConfig(oft_block_size=8)},
        )
        ids = token_ids(4)
        with torch.no_grad():
            check_rows(model, ["a", "b", "c", BASE], lambda **more: model(ids, **more).logits)


def test_int8_rows_depend_on_the_batch_as_the_bare_layer_of_bitsandbytes_does():
    """It keeps the features in half precision that are large in any row, so that one row changes the rounding of others."""
    pytest.importorskip("bitsandbytes")
    x = torch.randn(4, 3, 32)
    x[1, 0, 5] = 9.0
    with foreign_code(), torch.no_grad():
        bare = minipeft.quantize(OneLayer(nn.Linear(32, 16)), "int8").eval().layer
        changed = [
            (bare(inputs) - torch.cat([bare(row[None]) for row in inputs])).abs().amax((1, 2)) for inputs in (x, x / 9)
        ]
        assert (changed[0][[0, 2, 3]] > 1e-4).all()
        assert changed[1].max() < 1e-6  # no feature is large
        options = {"target_modules": ["layer"], "init_lora_weights": False}
        model = OneLayer(bare)
        several(model, {"a": LoraConfig(r=2, **options), "b": LoraConfig(r=4, use_dora=True, **options)})
        check_rows(
            model, ["a", "b", BASE, "a"], functools.partial(model, x)
        )  # each alone in the same batch: no difference


def generated(model, names, **options):
    torch.manual_seed(3)
    with foreign_code():
        return model.generate(pad_token_id=0, max_new_tokens=6, min_new_tokens=6, adapter_names=names, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"guidance_scale": 1.5}, {"use_cache": False}],
    ids=str,
)
def test_generate_gives_each_prompt_what_its_adapter_alone_gives(three, options):
    names, ids = ["a", BASE, "c", "b", "a"], token_ids(5, 6)
    mask = (torch.arange(6) >= torch.arange(5)[:, None] % 3).long()
    options = {"inputs": ids, "attention_mask": mask, "do_sample": False, **options}
    found = generated(three, names, **options)
    each = len(found) // 5
    for row, name in enumerate(names):
        own = alone(three, name, lambda: generated(three, None, **options))
        assert torch.equal(found[row * each : row * each + each], own[row * each : row * each + each])
    assert not torch.equal(found[0], found[2 * each])


def test_generate_with_an_encoder_that_sees_each_row_once():
    model = several(
        t5(), {name: LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False) for name in "ab"}
    )
    names, ids = ["b", "a", BASE], token_ids(3, 6)
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3, "temperature": 1e-6}):
        found = generated(model, names, input_ids=ids, **options)
        each = len(found) // 3
        for row, name in enumerate(names):
            own = alone(model, name, lambda options=options: generated(model, None, input_ids=ids, **options))
            assert torch.equal(found[row * each : row * each + each], own[row * each : row * each + each])


def test_what_generate_keeps_of_adapters_follows_their_parameters(three):
    model, again, seen = copy.deepcopy(three), copy.deepcopy(three), []

    class Change(tf.LogitsProcessor):
        """Writes into adapter "a" between two tokens, as a training run beside it would."""

        def __call__(self, ids, scores):
            seen.append((ids, scores.clone()))
            change(model, len(seen))
            return scores

    def change(model, step):
        for _, layer in wrappers_of(model, "a") if step % 2 else ():
            layer.adapters["a"].rescale(1 / step)
        for parameter in model.adapter_parameters("a") if step % 2 == 0 else ():
            parameter.mul_(1.5)

    processors = tf.LogitsProcessorList([Change()])
    with torch.no_grad():
        generated(
            model, ["a", "b"], inputs=token_ids(2, 4), do_sample=False, use_cache=False, logits_processor=processors
        )
        for step, (ids, scores) in enumerate(seen, 1):
            for row, name in enumerate("ab"):
                own = alone(again, name, lambda ids=ids: again(ids).logits)[row, -1]
                assert torch.allclose(
                    scores[row, 1:], own[1:], atol=1e-4
                )  # the first one, which ends a text, is forbidden
            change(again, step)
    assert len(seen) == 6


def test_pipelines_and_peft_tools_pass_the_names_on(three):
    from minipeft.integrations.peft import as_peft_model

    names, ids = ["a", "c", BASE], token_ids(3, 5)
    outside = as_peft_model(three)
    with torch.no_grad():
        assert torch.equal(outside(ids, adapter_names=names).logits, three(ids, adapter_names=names).logits)
        assert torch.equal(generated(outside, names, inputs=ids), generated(three, names, inputs=ids))
    tokenizer = tf.AutoTokenizer.from_pretrained("examples/assets/tiny")
    model = tf.AutoModelForCausalLM.from_pretrained("examples/assets/tiny")
    several(model, {"a": LoraConfig(r=2, init_lora_weights=False), "b": LoraConfig(r=3, init_lora_weights=False)})
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "left"
    with foreign_code():
        pipe = tf.pipeline(
            "text-generation", model, tokenizer=tokenizer, batch_size=2, max_new_tokens=5, do_sample=False
        )
        found = pipe(["def read", "The file is"], adapter_names=["a", "b"])
        for row, name in enumerate("ab"):
            own = alone(model, name, lambda: pipe(["def read", "The file is"]))
            assert found[row][0]["generated_text"] == own[row][0]["generated_text"]


def test_mixed_batches_equal_those_of_peft():
    with foreign_code():
        import peft

        torch.manual_seed(0)
        theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), "a")
        theirs.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj", "down_proj"]))
    model = several(
        llama(),
        {
            "a": LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
            "b": LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj", "down_proj"]),
        },
    )
    for name in "ab":
        state = {k: v.clone() for k, v in model.adapter_state_dict(name).items()}
        with foreign_code():
            peft.set_peft_model_state_dict(theirs, state, adapter_name=name)
    theirs.eval()
    ids, names = token_ids(5), ["a", "b", BASE, "b", "a"]
    with torch.no_grad(), foreign_code():
        expected = theirs(input_ids=ids, adapter_names=names).logits
        assert torch.allclose(model(input_ids=ids, adapter_names=names).logits, expected, atol=1e-5)
        for beams in (1, 3):
            options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
            expected = theirs.generate(input_ids=ids, adapter_names=names, **options)
            assert torch.equal(model.generate(input_ids=ids, adapter_names=names, **options), expected)


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["a", "bb"], StateError, ["'bb'", "closest: 'b'"]),
        (["a"], ConfigError, ["1 names", "2 rows"]),
        (["a", "b", "c"], ConfigError, ["3 names"]),
        ("ab", ConfigError, ["must be a list"]),
        ([["a"], "b"], ConfigError, ["must be a list"]),
        ({"a": 1, "b": 2}, ConfigError, ["must be a list"]),
        ([], ConfigError, ["0 names"]),
        (["a", "__bas__"], StateError, ["closest: '__base__'"]),
    ],
    ids=str,
)
def test_bad_names_are_refused(three, names, error, words):
    for call in (three, functools.partial(three.generate, max_new_tokens=1)):
        with pytest.raises(error) as caught:
            call(token_ids(), adapter_names=names)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert three._minipeft.switch.running == []


def test_continuous_batching_refuses_names_that_it_would_ignore(three):
    ids, said = token_ids(2), r"generate_batch\(\) cannot use another adapter for each row"
    with foreign_code(), pytest.raises(StateError, match=said):
        three.generate_batch(ids.tolist(), adapter_names=["a", "b"])
    with foreign_code(), pytest.raises(StateError, match=said):
        three.generate(ids, adapter_names=["a", "b"], cache_implementation="paged", max_new_tokens=2)


def test_features_of_a_part_refuse_names_that_they_would_ignore():
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.CLIPConfig(text_config=size, vision_config=size | {"image_size": 4, "patch_size": 2}, projection_dim=4)
    model = several(tf.CLIPModel(config), dict.fromkeys("ab", LoraConfig(r=2, target_modules=["q_proj"])))
    images = torch.randn(2, 3, 4, 4)
    with pytest.raises(StateError, match=r"get_image_features\(\) cannot use another adapter for each row"):
        model.get_image_features(images, adapter_names=["a", "b"])
    assert len(model.get_image_features(images, adapter_names=None).pooler_output) == 2


def test_a_merged_adapter_is_refused_and_disabling_wins(three):
    model, ids = copy.deepcopy(three), token_ids()
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(ids, adapter_names=["a", "b"]).logits, model(ids).logits)
        model.merge_adapter(["a"])
        with pytest.raises(StateError, match="'a' is merged into the base"):
            model(ids, adapter_names=["b", "b"])
        model.unmerge_adapter()
        assert torch.equal(model(ids, adapter_names=["a", "b"]).logits, three(ids, adapter_names=["a", "b"]).logits)
    with pytest.raises(ConfigError, match="not allowed"):
        model.add_adapter(BASE, LoraConfig())


def test_adapters_of_a_running_batch_cannot_change(three, tmp_path):
    model, refused = copy.deepcopy(three), []
    disturb(copy.deepcopy(three), seed=9).save_pretrained(tmp_path)  # "a" of another run

    def meddle(module, args):
        model.set_adapter("c")  # acts on calls without names alone
        actions = (
            lambda: model.delete_adapter("a"),
            lambda: model.rename_adapter("a", "z"),
            lambda: model.set_scale("a", 0.5),
            lambda: model.prepare_hotswap(8),
            lambda: model.hotswap_adapter(tmp_path / "a", "a"),
            lambda: restore_adapter(model, "a", tmp_path / "a"),
            model.unload,
            model.merge_adapter,
            model.merge_and_unload,
        )
        model.set_scale("c", 0.5)  # nor do they disturb
        model.hotswap_adapter(tmp_path / "b", "b")
        for action in actions:
            with pytest.raises(StateError, match="runs now") as caught:
                action()
            refused.append(str(caught.value))

    model.set_adapter("b")
    handle = model.transformer.h[1].register_forward_pre_hook(meddle)
    with torch.no_grad():
        found = model(token_ids(), adapter_names=["a", BASE]).logits
        handle.remove()
        assert len(refused) == 9
        assert torch.equal(found, three(token_ids(), adapter_names=["a", BASE]).logits)
    model.delete_adapter("a")


def test_between_two_tokens_of_generate_its_adapters_cannot_change_either(three, tmp_path):
    """The keys and values of the tokens so far would be the old one's."""
    model, refused = copy.deepcopy(three), []
    model.save_pretrained(tmp_path)

    class Change(tf.LogitsProcessor):
        def __call__(self, ids, scores):
            for action in (lambda: model.set_scale("a", 2), lambda: model.hotswap_adapter(tmp_path / "b", "b")):
                with pytest.raises(StateError, match="runs now"):
                    action()
                refused.append(action)
            return scores

    generated(model, ["a", "b"], inputs=token_ids(2, 4), logits_processor=tf.LogitsProcessorList([Change()]))
    assert len(refused) >= 4
    model.set_scale("a", 2)


@pytest.mark.parametrize("verb", ["hotswap_adapter", "delete_adapter", "merge_adapter"])
def test_a_batch_begins_before_an_adapter_changes_or_after(three, verb, tmp_path, monkeypatch):
    """A thread that calls the model meanwhile waits, and does not meet half of it."""
    model, found = copy.deepcopy(three), []
    disturb(copy.deepcopy(three), seed=9).save_pretrained(tmp_path)
    place, within, args = {
        "hotswap_adapter": (hotswap, "_give", (tmp_path / "a", "a")),
        "delete_adapter": (attach, "discard", ("a",)),
        "merge_adapter": (mergeable_model, "merge", (["a"],)),
    }[verb]

    @torch.no_grad()
    def call():
        try:
            found.append(model(token_ids(), adapter_names=["a", BASE]).logits)
        except StateError as error:
            found.append(str(error))

    def pausing(*args, **options):
        if thread.ident is None:
            thread.start()
            thread.join(0.1)
            assert found == []
        return real(*args, **options)

    real, thread = getattr(place, within), threading.Thread(target=call)
    monkeypatch.setattr(place, within, pausing)
    model.set_adapter("b")
    getattr(model, verb)(*args)
    thread.join()
    call()
    assert torch.equal(*found) if verb == "hotswap_adapter" else found[0] == found[1]


def test_an_error_within_a_call_leaves_no_rows_behind(three):
    def fail(module, args):
        raise RuntimeError("on purpose")

    expected = logits(three)
    handle = three.transformer.h[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        three(token_ids(), adapter_names=["a", "b"])
    handle.remove()
    assert three._minipeft.switch.running == []
    assert torch.equal(logits(three), expected)


def test_threads_with_other_rows_do_not_meet(three):
    ids, plans = token_ids(2, 8), [["a", "b"], ["b", "c"], None, [BASE, "a"]]
    with torch.no_grad():
        expected = [three(ids, adapter_names=names).logits for names in plans]
    wrong, start = [], threading.Barrier(len(plans))

    def serve(names, own):
        start.wait()
        for _ in range(15):
            with torch.no_grad():
                if not torch.equal(three(ids, adapter_names=names).logits, own):
                    wrong.append(names)

    threads = [threading.Thread(target=serve, args=pair) for pair in zip(plans, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Stack(nn.Module):
    """Small, since compiling takes long."""

    def __init__(self):
        super().__init__()
        self.table, self.first, self.second, self.head = (
            nn.Embedding(8, 4),
            nn.Linear(4, 6),
            nn.Linear(6, 4),
            nn.Linear(4, 3),
        )

    def forward(self, ids):
        return self.head(self.second(self.first(self.table(ids)).tanh()))


@pytest.mark.parametrize("way", ["model.compile", "torch.compile"])
def test_other_rows_need_no_other_graph(way):
    options = {"init_lora_weights": False}
    model = several(
        Stack(),
        {
            "a": LoraConfig(r=2, target_modules=["first"], modules_to_save=["head"], **options),
            "b": minipeft.IA3Config(target_modules=["second", "table"], feedforward_modules=["second"]),
            "c": LoraConfig(r=3, target_modules=["table", "second"], **options),
            "d": LoraConfig(r=2, target_modules=["first"], **options),
        },
    )
    ids, plans = torch.randint(8, (4, 5)), ["abcd", "aaaa", "db_a", "____"]
    plans = [[BASE if name == "_" else name for name in plan] for plan in plans]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        expected = [model(ids, adapter_names=names) for names in plans]
        if way == "model.compile":
            model.compile(backend="eager", fullgraph=True)
            call = model
        else:
            call = torch.compile(model, backend="eager")
        for names, own in zip(plans, expected, strict=True):
            assert torch.allclose(call(ids, adapter_names=names), own, atol=1e-5)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs == 1


@pytest.mark.parametrize("first", ["offloaded", "adapted"])
def test_offloaded_bases(first):
    model = llama()
    configs = {
        "a": LoraConfig(r=2),
        "b": LoraConfig(r=3, use_dora=True),
        "c": minipeft.IA3Config(feedforward_modules=[]),
    }
    if first == "adapted":
        several(model, configs)
    with foreign_code():
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if first == "offloaded":
        several(model, configs)
    with torch.no_grad():
        check_rows(model, ["a", "b", BASE, "c"], lambda **more: model(token_ids(4), **more).logits)


def test_a_lean_model_in_evaluation():
    model = several(llama(), {"a": LoraConfig(r=2), "b": LoraConfig(r=3)})
    minipeft.lean(model)
    with torch.no_grad():
        check_rows(model, ["a", BASE, "b"], lambda **more: model(token_ids(3), **more).logits)


def test_a_first_pass_by_row_names_what_it_does_not_use():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = minipeft.get_lora_model(Idle(), LoraConfig(r=2, target_modules=["used"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["used", "idle"]))
    with pytest.warns(UserWarning, match="'b' does nothing there"), torch.no_grad():
        model(torch.randn(2, 4), adapter_names=["a", "b"])


def test_each_model_of_two_has_its_own_rows(three):
    other, ids = adapted(llama(), adapter_name="x"), token_ids()
    seen = []
    handle = three.transformer.h[0].register_forward_pre_hook(lambda module, args: seen.append(other(ids).logits))
    with torch.no_grad():
        expected = other(ids).logits
        three(ids, adapter_names=["a", "b"])
    handle.remove()
    assert torch.equal(seen[0], expected)

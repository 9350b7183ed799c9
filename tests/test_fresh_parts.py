"""Layers that the base's checkpoint lacks: a new head is drawn at random, so the adapter's file has to bring it."""

import copy
import functools
import json

import peft
import pytest
import torch
import transformers as tf
from rotation import shared
from safetensors.torch import load_file
from tiny_models import disturb, foreign_code, gpt2, llama, t5
from torch import nn

from minipeft import LoraConfig, get_lora_model, load_adapter
from minipeft.errors import CheckpointError
from minipeft.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from minipeft.files.restore import restore_adapters
from minipeft.injection.fresh_parts import find_origins

TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SOUND = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48},
    **{"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2},
    **{
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_prob": 0.0,
        "classifier_proj_size": 16,
    },
}
WHISPER = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 96},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8},
    **{"max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 1, "classifier_proj_size": 16, "suppress_tokens": None, "begin_suppress_tokens": None},
}
MODERN = {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
SMALL = {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2, "vocab_size": 96}
IMAGE = {**TEXT, "image_size": 8, "patch_size": 4}
IDS = {"input_ids": torch.arange(1, 9).view(1, 8)}
VALUES = torch.linspace(-1, 1, 400).sin()[None]
# family: (what the checkpoint holds, its configuration, the model with a head, inputs, what is new in it)
FAMILIES = {
    "distilbert": (
        tf.DistilBertModel,
        tf.DistilBertConfig(**SMALL),
        tf.DistilBertForSequenceClassification,
        IDS,
        "pre_classifier classifier",
    ),
    "deberta": (
        tf.DebertaV2Model,
        tf.DebertaV2Config(**TEXT),
        tf.DebertaV2ForSequenceClassification,
        IDS,
        "pooler classifier",
    ),
    "modernbert": (
        tf.ModernBertModel,
        tf.ModernBertConfig(**MODERN),
        tf.ModernBertForSequenceClassification,
        IDS,
        "head classifier",
    ),
    "wav2vec2": (
        tf.Wav2Vec2Model,
        tf.Wav2Vec2Config(**SOUND),
        tf.Wav2Vec2ForSequenceClassification,
        {"input_values": VALUES},
        "projector classifier",
    ),
    "whisper": (
        tf.WhisperForConditionalGeneration,
        tf.WhisperConfig(**WHISPER),
        tf.WhisperForAudioClassification,
        {"input_features": VALUES[:, :256].view(1, 8, 32)},
        "projector classifier",
    ),
    "vit": (
        tf.ViTModel,
        tf.ViTConfig(**IMAGE),
        tf.ViTForImageClassification,
        {"pixel_values": VALUES[:, :192].view(1, 3, 8, 8)},
        "classifier",
    ),
    "xlm-roberta": (
        tf.XLMRobertaForMaskedLM,
        tf.XLMRobertaConfig(**TEXT),
        tf.XLMRobertaForSequenceClassification,
        IDS,
        "classifier",
    ),
    "bert without a pooler": (
        tf.BertForMaskedLM,
        tf.BertConfig(**TEXT),
        tf.BertForSequenceClassification,
        IDS,
        "bert.pooler classifier",
    ),
    "bart": (
        tf.BartForConditionalGeneration,
        tf.BartConfig(
            **{"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
            **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "eos_token_id": 8},
        ),
        tf.BartForSequenceClassification,
        IDS,
        "classification_head",
    ),
}


def some(turn):
    """The families of one of three tests."""
    return pytest.mark.parametrize("family", shared(FAMILIES, turn, 3))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a model with a new head from the checkpoint of a family, another head for each seed."""

    @functools.cache
    def checkpoint(family):
        stored, config, *_ = FAMILIES[family]
        torch.manual_seed(0)
        stored(config).save_pretrained(folder := tmp_path_factory.mktemp("base"))
        return folder

    def make(family, seed):
        with foreign_code(), torch.random.fork_rng():
            folder = checkpoint(family)
            torch.manual_seed(seed)
            return FAMILIES[family][2].from_pretrained(folder, num_labels=3).eval()

    return make


@torch.no_grad()
def logits(model, family):
    return model(**FAMILIES[family][3]).logits


def lora(model, **options):
    return get_lora_model(model, LoraConfig(r=4, **options))


def saved_modules(folder):
    return set(json.loads((folder / CONFIG_FILE).read_text())["modules_to_save"] or ())


@some(0)
def test_a_classification_task_trains_and_saves_every_new_layer(family, made, tmp_path):
    new = FAMILIES[family][4].split()
    model = lora(made(family, 1), task_type="SEQ_CLS")
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert {name.partition(".adapters.")[0] for name in trained} == set(new)
    disturb(model, scale=0.3).save_pretrained(tmp_path / "adapter")
    other = made(family, 2)
    assert not torch.allclose(logits(other, family), logits(model, family), atol=1e-2)
    assert torch.equal(logits(load_adapter(other, tmp_path / "adapter"), family), logits(model, family))
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(made(family, 3), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs, family), logits(model, family), rtol=1e-5, atol=1e-5)


@some(1)
def test_a_copy_has_lost_the_marks_and_its_head_is_found_by_its_place(family, made, tmp_path):
    model = copy.deepcopy(made(family, 1))
    assert not find_origins(model).fresh
    lora(model, task_type="SEQ_CLS")
    disturb(model, scale=0.3).save_pretrained(tmp_path)
    if family == "bert without a pooler":
        with pytest.raises(CheckpointError, match=r"another base.*bert\.pooler"):
            load_adapter(made(family, 2), tmp_path)
    else:
        assert torch.equal(logits(load_adapter(made(family, 2), tmp_path), family), logits(model, family))


@some(2)
def test_without_a_task_new_layers_stay_as_they_are_and_are_saved(family, made, tmp_path):
    with pytest.warns(UserWarning, match=r"not in the checkpoint.*modules_to_save") as said:
        model = lora(made(family, 1))
    assert len(said) == 1
    assert all(name in str(said[0].message) for name in FAMILIES[family][4].split())
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    disturb(model).save_pretrained(tmp_path)
    assert saved_modules(tmp_path) == set(FAMILIES[family][4].split())
    assert torch.equal(logits(load_adapter(made(family, 2), tmp_path), family), logits(model, family))


@pytest.mark.parametrize("family", ["distilbert", "deberta", "bert without a pooler"])
def test_naming_only_some_of_the_new_layers_saves_all(family, made, tmp_path):
    with pytest.warns(UserWarning, match="not in the checkpoint"):
        model = lora(made(family, 1), modules_to_save=["classifier"])
    disturb(model, scale=0.3).save_pretrained(tmp_path)
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == {"classifier"}
    assert torch.equal(logits(load_adapter(made(family, 2), tmp_path), family), logits(model, family))


def test_naming_a_layer_inside_a_new_head_saves_the_rest_of_it(made, tmp_path):
    with pytest.warns(UserWarning, match=r"^'classification_head\.dense': not in the checkpoint"):
        model = lora(made("bart", 1), modules_to_save=["classification_head.out_proj"])
    disturb(model, scale=0.3).save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(made("bart", 2), tmp_path), "bart"), logits(model, "bart"))


def test_a_new_layer_that_is_targeted_trains_in_full(made, tmp_path):
    with pytest.warns(UserWarning, match=r"^'pooler'.* trained and saved in full"):
        model = lora(made("deberta", 1), target_modules=["dense", "query_proj"], modules_to_save=["classifier"])
    disturb(model).save_pretrained(tmp_path)
    assert not any("pooler" in name for name in load_file(tmp_path / WEIGHTS_FILE) if "lora" in name)
    again = load_adapter(made("deberta", 2), tmp_path)
    assert torch.equal(logits(again, "deberta"), logits(model, "deberta"))


def doubled(layer):
    """The layer, or another one in its place, with a weight of the user's own."""
    new = nn.Linear(layer.in_features, layer.out_features, bias=False)
    new.weight = nn.Parameter(2 * layer.weight.detach())
    return new


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_a_targeted_layer_whose_weight_was_replaced_is_adapted_and_not_new(task, whole, tmp_path):
    with foreign_code():
        llama().save_pretrained(tmp_path / "base")

    def base(replaces):
        kind = tf.AutoModelForSequenceClassification if task else tf.AutoModelForCausalLM
        with foreign_code(), torch.random.fork_rng():
            model = kind.from_pretrained(tmp_path / "base").eval()
        for block in model.model.layers if replaces else ():
            new = doubled(block.self_attn.q_proj)
            if whole:
                block.self_attn.q_proj = new
            else:
                block.self_attn.q_proj.weight = new.weight
        return model

    model = disturb(lora(base(True), target_modules=["q_proj", "down_proj"], task_type=task))
    model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / WEIGHTS_FILE).keys()
    assert [key for key in keys if ".lora_" not in key] == ["base_model.model.score.weight"] * bool(task)
    assert sum("q_proj.lora_" in key for key in keys) == 2 * len(model.model.layers)
    with torch.no_grad():
        assert torch.equal(load_adapter(base(True), tmp_path / "adapter")(**IDS).logits, model(**IDS).logits)
    with pytest.raises(
        CheckpointError, match=r"another base: the weights of model\.layers\.0\.self_attn\.q_proj differ"
    ):
        load_adapter(base(False), tmp_path / "adapter")


@pytest.mark.each_value
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("make", [gpt2, llama, t5])
def test_a_whole_checkpoint_has_nothing_new(make, task, tmp_path):
    with foreign_code():
        make().save_pretrained(tmp_path / "base")
        model = type(make()).from_pretrained(tmp_path / "base")
    origins = find_origins(model)
    assert not origins.fresh
    assert not origins.unknown
    lora(model, task_type=task).save_pretrained(tmp_path / "adapter")
    assert not saved_modules(tmp_path / "adapter")
    assert all(".lora_" in key for key in load_file(tmp_path / "adapter" / WEIGHTS_FILE))


def test_a_trained_head_in_the_checkpoint_is_not_new(made, tmp_path):
    with foreign_code():
        made("deberta", 1).save_pretrained(tmp_path / "whole")
        model = tf.DebertaV2ForSequenceClassification.from_pretrained(tmp_path / "whole")
    lora(model, task_type="SEQ_CLS").save_pretrained(tmp_path / "adapter")
    assert not any("pooler" in key for key in load_file(tmp_path / "adapter" / WEIGHTS_FILE))


@pytest.mark.parametrize("targets", [["query_proj"], ["query_proj", "pooler.dense"]])
def test_a_file_of_peft_that_lacks_a_new_layer_is_named(made, tmp_path, targets):
    """An update of a layer does not bring the layer either."""
    with foreign_code():
        config = peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS")
        peft.get_peft_model(made("deberta", 1), config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"does not bring .*pooler\.dense\.weight"):
        load_adapter(made("deberta", 2), tmp_path)


def test_a_file_of_peft_that_lacks_a_new_layer_brings_it_once_it_was_trained_further(made, tmp_path):
    with foreign_code():
        config = peft.LoraConfig(r=4, target_modules=["query_proj"], task_type="SEQ_CLS")
        peft.get_peft_model(made("deberta", 1), config).save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"does not bring .*pooler\.dense\.weight"):
        model = load_adapter(made("deberta", 2), tmp_path / "theirs", is_trainable=True)
    assert not any("pooler" in name for name, p in model.named_parameters() if p.requires_grad)
    disturb(model).eval().save_pretrained(tmp_path / "ours")
    expected = logits(model, "deberta")
    for trains in (False, True):
        again = load_adapter(made("deberta", 3), tmp_path / "ours", is_trainable=trains).eval()
        assert torch.equal(logits(again, "deberta"), expected)
    assert not any("pooler" in name for name, p in again.named_parameters() if p.requires_grad)
    restored = load_adapter(made("deberta", 3), tmp_path / "ours", is_trainable=True).eval()
    restore_adapters(disturb(restored, seed=9), tmp_path / "ours")
    assert torch.equal(logits(restored, "deberta"), expected)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(made("deberta", 3), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs, "deberta"), expected)


class Net(nn.Module):
    """A user's own model around a checkpoint: nothing is known of its head."""

    def __init__(self, backbone, seed):
        super().__init__()
        self.backbone = backbone
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Linear(32, 3)


def test_an_own_head_that_was_drawn_anew_is_refused(made, tmp_path):
    def net(seed):
        return Net(made("distilbert", seed).distilbert, seed)

    disturb(lora(net(1), target_modules=["q_lin"])).save_pretrained(tmp_path)
    load_adapter(net(1), tmp_path)
    with pytest.raises(CheckpointError, match=r"another base: the weights of head\.weight differ.*allow_base_mismatch"):
        load_adapter(net(2), tmp_path)
    load_adapter(net(2), tmp_path, allow_base_mismatch=True)


def test_an_adapted_copy_still_knows_what_is_new(made, tmp_path):
    model = copy.deepcopy(lora(made("deberta", 1), task_type="SEQ_CLS"))
    model.add_adapter("second", LoraConfig(r=2, task_type="SEQ_CLS"))
    model.set_adapter("second")
    model.save_pretrained(tmp_path, "second")
    assert "pooler" in saved_modules(tmp_path / "second")


def test_a_mask_token_next_to_other_layers_is_named_and_does_not_keep_a_file_from_loading(made, tmp_path):
    def lacking(seed):
        with foreign_code(), torch.random.fork_rng():
            torch.manual_seed(seed)
            return tf.Wav2Vec2ForCTC.from_pretrained(tmp_path / "lacking")

    with foreign_code():
        model = tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**{**SOUND, "mask_time_prob": 0.05}, vocab_size=32))
        state = {key: value for key, value in model.state_dict().items() if "masked_spec_embed" not in key}
        model.save_pretrained(tmp_path / "lacking", state_dict=state)
    with pytest.warns(UserWarning, match="masked_spec_embed.*neither trained nor saved"):
        model = disturb(lora(lacking(1)))
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(lacking(2), tmp_path / "adapter")
    assert torch.equal(logits(again.eval(), "wav2vec2"), logits(model.eval(), "wav2vec2"))


def test_training_on_from_a_file_leaves_what_was_not_trained_frozen(made, tmp_path):
    with pytest.warns(UserWarning, match="not in the checkpoint"):
        model = lora(made("deberta", 1), modules_to_save=["classifier"])
    disturb(model).save_pretrained(tmp_path / "first")
    for folder, following in (("first", "second"), ("second", "third")):
        again = load_adapter(made("deberta", 2), tmp_path / folder, is_trainable=True)
        trained = {name for name, p in again.named_parameters() if p.requires_grad and "lora" not in name}
        assert {name.partition(".")[0] for name in trained} == {"classifier"}
        again.save_pretrained(tmp_path / following)
    assert torch.equal(
        logits(load_adapter(made("deberta", 3), tmp_path / "third"), "deberta"), logits(model, "deberta")
    )


def test_restoring_a_checkpoint_gives_new_layers_their_values(made, tmp_path):
    with pytest.warns(UserWarning, match="not in the checkpoint"):
        first, second = (lora(made("distilbert", seed)) for seed in (1, 2))
    disturb(first).save_pretrained(tmp_path / "adapter")
    restore_adapters(second, tmp_path / "adapter")
    assert torch.equal(logits(second, "distilbert"), logits(first, "distilbert"))


def test_merging_and_unloading_do_not_make_a_base_new(made):
    model = made("deberta", 1)
    fresh = find_origins(model)
    for leave in ("unload", "merge_and_unload"):
        disturb(lora(model, task_type="SEQ_CLS", target_modules="all-linear"))
        getattr(model, leave)()
        assert find_origins(model) == fresh


def test_bias_all_trains_a_new_layer_whole(made, tmp_path):
    with pytest.warns(UserWarning, match="trained and saved in full"):
        model = lora(made("deberta", 1), bias="all")
    disturb(model).save_pretrained(tmp_path)
    again = load_adapter(made("deberta", 2), tmp_path)
    assert torch.equal(logits(again, "deberta"), logits(model, "deberta"))


def test_a_new_output_table_is_refused_when_it_is_drawn_anew(tmp_path):
    def from_headless(seed):
        with foreign_code(), torch.random.fork_rng():
            torch.manual_seed(seed)
            return tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")

    with foreign_code():
        llama().model.save_pretrained(tmp_path / "base")
    disturb(lora(from_headless(1))).save_pretrained(tmp_path / "adapter")
    load_adapter(from_headless(1), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"another base: the weights of lm_head"):
        load_adapter(from_headless(2), tmp_path / "adapter")

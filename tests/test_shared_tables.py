"""A table that encoder and decoder share (T5, BART, Pegasus), trained in full: all that is tied to it uses the copy."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from tiny_models import VOCABULARY, disturb, foreign_code, logits, saved_and_loaded, t5, token_ids
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
)

from minipeft import LoraConfig, TargetError, get_lora_model, load_adapter

SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def bart():
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(**SIZES, bos_token_id=0)).eval()


def pegasus():
    torch.manual_seed(0)
    return PegasusForConditionalGeneration(PegasusConfig(**SIZES)).eval()


FAMILIES = {"t5": t5, "bart": bart, "pegasus": pegasus}
every_family = pytest.mark.parametrize("family", FAMILIES)


def trained(family, saved=("shared",), **options):
    target = "q" if family == "t5" else "q_proj"
    return disturb(
        get_lora_model(FAMILIES[family](), LoraConfig(r=2, target_modules=[target], modules_to_save=saved, **options))
    )


@every_family
def test_the_shared_table_trains_as_it_does_in_the_plain_model(family):
    model = trained(family)
    table = model.get_input_embeddings().adapters["default"].weight
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    plain = FAMILIES[family]()
    with torch.no_grad():
        plain.get_input_embeddings().weight.copy_(table)
    assert torch.equal(logits(model), logits(plain))
    ids = token_ids()
    for each in (model, plain):
        each(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(table.grad, plain.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(FAMILIES[family]()))
    assert sum(p.numel() == table.numel() for p in model.parameters() if p.requires_grad) == 1


@every_family
def test_it_is_saved_once_and_comes_back(family, tmp_path):
    model = trained(family)
    assert sum("lora" not in key for key in model.adapter_state_dict()) == 1
    model.save_pretrained(tmp_path)
    loaded = load_adapter(FAMILIES[family](), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    expected = logits(disturb(loaded, seed=5))
    assert torch.equal(logits(copy.deepcopy(loaded)), expected)
    assert torch.equal(logits(disturb(pickle.loads(pickle.dumps(model)), seed=5)), expected)


@pytest.mark.each_value
@every_family
@pytest.mark.parametrize("saved", [("shared",), ("embed_tokens",), ("lm_head",), ("shared", "lm_head")], ids=" ".join)
def test_merged_saved_and_reloaded_it_is_the_same_model(family, saved, tmp_path):
    model = trained(family, saved)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    saved_and_loaded(merged, tmp_path)
    if saved == ("shared",):
        assert (
            len({id(p) for name, p in merged.named_parameters(remove_duplicate=False) if p.shape[0] == VOCABULARY}) == 1
        )


@every_family
def test_unloaded_it_is_the_base(family):
    model = trained(family).unload()
    plain = FAMILIES[family]()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_module_tied_to_a_trained_table_is_not_adapted_too():
    config = LoraConfig(r=2, target_modules=["q", "lm_head"], modules_to_save=["shared"])
    with pytest.raises(TargetError, match=r"lm_head shares its weight with shared, which is trained in full"):
        get_lora_model(t5(), config)


def test_lora_on_some_of_the_tied_tables_survives_merging_saving_and_reloading(tmp_path):
    with pytest.warns(UserWarning, match="shares its weight"):
        model = disturb(get_lora_model(bart(), LoraConfig(r=2, target_modules=["encoder.embed_tokens"])))
    expected = logits(model)
    merged = model.merge_and_unload(untie=True)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    saved_and_loaded(merged, tmp_path)


def resized(family, folder, seed=5):
    """A base from a checkpoint, with three more tokens: its three tables are one module then."""
    if not folder.exists():
        with foreign_code():
            FAMILIES[family]().save_pretrained(folder)
    with foreign_code():
        model = type(FAMILIES[family]()).from_pretrained(folder)
        torch.manual_seed(seed)
        model.resize_token_embeddings(VOCABULARY + 3)
    return model.eval()


def loaded_again(model, folder):
    with foreign_code():
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_table_trains_for_its_head_too_once_it_was_resized(family, tmp_path):
    model = resized(family, tmp_path / "base")
    again = loaded_again(model, tmp_path / "resized")
    config = LoraConfig(r=2, target_modules=["q" if family == "t5" else "q_proj"], modules_to_save=["shared"])
    disturb(get_lora_model(model, config)).save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(again, tmp_path / "adapter")), logits(model))
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-4)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("names", [["embed_tokens"], ["embed_tokens", "lm_head"], ["shared", "lm_head"]], ids=" ".join)
def test_tokens_of_a_resized_table_under_any_of_its_names(names, tmp_path):
    tokens = {name: [3, 4, VOCABULARY] for name in names}
    config = LoraConfig(r=2, target_modules=["q"], trainable_token_indices=tokens)
    model = disturb(get_lora_model(resized("t5", tmp_path / "base"), config))
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "adapter")  # its rows are those of the same tables again
    ids = token_ids()
    ids[:, :4] = torch.tensor([3, 4, VOCABULARY, VOCABULARY + 2])
    for seed in (5, 6):
        again = load_adapter(resized("t5", tmp_path / "base", seed), tmp_path / "adapter")
        torch.testing.assert_close(logits(again, ids), logits(model, ids))
        with foreign_code():
            theirs = peft.PeftModel.from_pretrained(resized("t5", tmp_path / "base", seed), tmp_path / "adapter")
        torch.testing.assert_close(logits(theirs, ids), logits(model, ids), rtol=1e-4, atol=1e-5)


def test_an_adapter_on_a_resized_table_is_named_when_saved_since_peft_adapts_one_of_its_names(tmp_path):
    model = get_lora_model(resized("t5", tmp_path / "base"), LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.warns(
        UserWarning, match=r"shared is 'encoder.embed_tokens', 'decoder.embed_tokens' too, .*PEFT adapts it"
    ):
        model.save_pretrained(tmp_path / "adapter")
    again = loaded_again(resized("t5", tmp_path / "base"), tmp_path / "resized")
    with pytest.warns(UserWarning, match="shares its weight"):
        model = disturb(get_lora_model(again, LoraConfig(r=2, target_modules=["embed_tokens"])))
    model.save_pretrained(tmp_path / "other")
    with foreign_code():
        again = type(again).from_pretrained(tmp_path / "resized")
        theirs = peft.PeftModel.from_pretrained(again, tmp_path / "other").eval()
    torch.testing.assert_close(logits(theirs), logits(model))


def test_tokens_of_tied_layers_that_peft_passes_over_are_named_when_saved(tmp_path):
    def trained_with(option):
        model = t5()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "encoder.embed_tokens shares|decoder.embed_tokens shares")
            config = LoraConfig(r=2, target_modules=["q"], trainable_token_indices=option)
            return disturb(get_lora_model(model, config))

    tokens = token_ids()[0, :3].tolist()
    with pytest.warns(UserWarning, match="PEFT passes over the tokens of 'lm_head', since .* get_input_embeddings"):
        trained_with({"embed_tokens": tokens, "lm_head": tokens}).save_pretrained(tmp_path / "both")
    for option in ({"shared": tokens}, {"embed_tokens": tokens}, {"embed_tokens": tokens, "lm_head": tokens[:2]}):
        model = trained_with(option)
        model.save_pretrained(tmp_path / "adapter")
        with foreign_code():
            theirs = peft.PeftModel.from_pretrained(t5(), tmp_path / "adapter").eval()
        torch.testing.assert_close(logits(theirs), logits(model))

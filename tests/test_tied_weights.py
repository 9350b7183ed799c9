"""An embedding and an output head that share a weight: merging writes neither unasked, and untying lasts."""

import copy

import pytest
import torch
from tiny_models import adapted, foreign_code, gpt2, logits, refuses, saved_and_loaded, state_digest
from torch import nn
from transformers import UMT5Config, UMT5ForConditionalGeneration

from minipeft import MergeError

TIED_TARGETS = [["wte"], ["lm_head"], ["wte", "lm_head"], ["wte", "c_attn"]]
every_tie = pytest.mark.parametrize("targets", TIED_TARGETS, ids=" ".join)
every_merge = pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])


@every_tie
@every_merge
def test_merging_into_a_tied_weight_is_refused(targets, verb):
    model = adapted(target_modules=targets)
    expected = logits(model)
    refuses(MergeError, model, getattr(model, verb), "tied", "untie=True")
    assert torch.equal(logits(model), expected)


@every_tie
@every_merge
def test_with_untie_the_merged_model_computes_what_the_adapted_one_did(targets, verb):
    model = adapted(target_modules=targets)
    expected, table = logits(model), gpt2().transformer.wte.weight
    getattr(model, verb)(untie=True)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    if "lm_head" not in targets:
        assert torch.equal(model.lm_head.weight, table)
    if "wte" not in targets:
        assert torch.equal(model.transformer.wte.weight, table)


@every_tie
def test_the_untied_merged_model_survives_saving_and_reloading(targets, tmp_path):
    model = adapted(target_modules=targets)
    expected = logits(model)
    merged = model.merge_and_unload(untie=True)
    torch.testing.assert_close(logits(saved_and_loaded(merged, tmp_path)), expected, rtol=0, atol=1e-5)


@every_tie
def test_unmerging_ties_the_weights_again(targets):
    model = adapted(target_modules=targets)
    before = state_digest(model)
    model.merge_adapter(untie=True)
    assert model.config.tie_word_embeddings is False
    model.unmerge_adapter()
    assert model.get_parameter("lm_head.weight") is model.get_parameter("transformer.wte.weight")
    assert model.config.tie_word_embeddings is True
    assert state_digest(model) == before


def test_the_tie_of_the_merged_model_stays_cut_when_transformers_ties_weights():
    model = adapted(target_modules=["wte"])
    expected = logits(model)
    merged = model.merge_and_unload(untie=True)
    with foreign_code():
        merged.tie_weights()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_merging_beside_a_tie_needs_no_leave():
    model = adapted(target_modules=["c_attn"])
    expected = logits(model)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings is True
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("saved", [["lm_head"], ["wte"], ["wte", "lm_head"]], ids=" ".join)
def test_a_tied_module_trained_in_full_survives_merging_saving_and_reloading(saved, tmp_path):
    model = adapted(target_modules=["c_attn"], modules_to_save=saved)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    saved_and_loaded(merged, tmp_path)


def umt5():
    """As Switch Transformers and UDOP, it scales what comes into the head, if its config says that this is tied."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 100}
    torch.manual_seed(0)
    return UMT5ForConditionalGeneration(UMT5Config(decoder_start_token_id=0, dropout_rate=0.0, **sizes)).eval()


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_untying_does_not_change_what_a_model_computes_by_its_config(options, tmp_path):
    model = adapted(umt5(), **{"target_modules": ["wo"], **options})
    expected = logits(model)
    if "modules_to_save" not in options:
        model.merge_adapter(untie=True)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload(untie=True)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    saved_and_loaded(merged, tmp_path)


class HeadFirst(nn.Module):
    """As CamemBERT: the head comes before the table that it is tied to, and its bias has a second name."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 11)
        self.bias = self.head.bias
        self.table, self.inner = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.table.weight = self.head.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.table(ids))))


@every_merge
def test_rows_of_a_table_behind_its_head_are_merged_into_both(verb):
    torch.manual_seed(0)
    base, ids = HeadFirst().double(), torch.arange(11)[None]
    options = {"target_modules": ["inner"], "trainable_token_indices": {"table": [3, 7]}}
    model = adapted(copy.deepcopy(base), scale=0.3, **options)
    rows = next(p for name, p in model.named_parameters() if "tokens" in name)
    expected = model(ids).detach()
    getattr(model, verb)()
    torch.testing.assert_close(model(ids), expected)
    written = model.get_parameter("head.weight")
    assert torch.equal(written[[3, 7]], rows)
    assert torch.equal(written[:3], base.head.weight[:3])
    assert model.get_parameter("table.weight") is written
    assert model.get_parameter("head.bias") is model.bias

"""Resizing the vocabulary of an adapted model works, or is refused before anything changes."""

import copy

import pytest
import torch
from tiny_models import VOCABULARY, bert_classifier, disturb, foreign_code, gpt2, llama, logits, state_digest, t5
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from minipeft import LoraConfig, StateError, TrainableTokensConfig, get_adapter_model, get_lora_model


def opt():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=32, max_position_embeddings=64, **sizes)
    return OPTForCausalLM(config).eval()


BASES = {
    "llama": lambda: llama(tie_word_embeddings=False),
    "gpt2": gpt2,
    "opt": opt,
    "t5": t5,
    "bert": bert_classifier,
}
TARGETS = {"llama": "q_proj", "gpt2": "c_attn", "opt": "q_proj", "t5": "q", "bert": "query"}
WAYS = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "copies": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


def resize(model, *args, **options):
    with foreign_code():
        return model.resize_token_embeddings(*args, mean_resizing=False, **options)


@pytest.mark.each_value
@pytest.mark.parametrize("size", [{"new_num_tokens": 120}, {"pad_to_multiple_of": 64}, {"new_num_tokens": 80}], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_a_model_without_adapters_on_its_tables_is_resized(kind, size):
    model = disturb(get_lora_model(BASES[kind](), LoraConfig(r=2, target_modules=[TARGETS[kind]])))
    ids = torch.randint(1, 80, (2, 12), generator=torch.Generator().manual_seed(0))
    before = logits(model, ids)
    rows = size.get("new_num_tokens", 128)
    assert len(resize(model, **size).weight) == model.config.vocab_size == rows
    after = logits(model, ids)
    common = min(rows, VOCABULARY) if kind != "bert" else before.shape[-1]
    torch.testing.assert_close(after[..., :common], before[..., :common], rtol=0, atol=1e-5)
    assert logits(model, torch.tensor([[rows - 1]])).isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapted_table_is_not_resized_and_nothing_changes(way, tied):
    model = get_lora_model(llama(tie_word_embeddings=tied), LoraConfig(r=2, **WAYS[way]))
    digest, config = state_digest(model), copy.deepcopy(model.config.to_dict())
    for size in ({"new_num_tokens": 120}, {"pad_to_multiple_of": 64}, {"new_num_tokens": 80}):
        with pytest.raises(StateError, match=r"Resize the base first.*Nothing was changed\."):
            resize(model, **size)
    assert state_digest(model) == digest
    assert model.config.to_dict() == config


def test_the_present_size_is_no_change_and_leaves_what_trains_trainable():
    model = get_lora_model(llama(tie_word_embeddings=False), LoraConfig(r=2, **WAYS["copies"]))
    digest = state_digest(model)
    assert resize(model, VOCABULARY) is model.get_input_embeddings()
    assert resize(model) is model.get_input_embeddings()
    assert resize(model, 99, pad_to_multiple_of=50) is model.get_input_embeddings()
    assert state_digest(model) == digest


@pytest.mark.filterwarnings("ignore:encoder.embed_tokens shares its weight")
@pytest.mark.parametrize("adapt", ["encoder.embed_tokens", "shared", "decoder"])
def test_the_shared_table_of_an_encoder_and_a_decoder_counts_where_it_is_tied_or_inside(adapt):
    saved = {"modules_to_save": ["decoder"]} if adapt == "decoder" else {"trainable_token_indices": {adapt: [3]}}
    model = get_lora_model(t5(), LoraConfig(r=2, target_modules=["encoder.block.0.layer.0.SelfAttention.q"], **saved))
    digest = state_digest(model)
    with pytest.raises(StateError, match="Resize the base first"):
        resize(model, 120)
    assert state_digest(model) == digest


def test_an_adapted_table_is_not_replaced():
    model = get_adapter_model(gpt2(), TrainableTokensConfig(token_indices=[3]))
    digest = state_digest(model)
    with pytest.raises(StateError, match="'transformer.wte', 'lm_head' is adapted"):
        model.set_input_embeddings(nn.Embedding(VOCABULARY, 32))
    with pytest.raises(StateError, match="Nothing was changed"):
        model.set_output_embeddings(nn.Linear(32, VOCABULARY, bias=False))
    model.set_input_embeddings(model.get_input_embeddings())
    assert state_digest(model) == digest


def test_a_plain_table_is_replaced():
    model = get_lora_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    table, head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY, bias=False)
    model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is table
    assert model.get_output_embeddings() is head


def test_without_its_adapters_the_model_is_resized_again():
    model = get_lora_model(llama(), LoraConfig(r=2, **WAYS["rows"])).unload()
    assert len(resize(model, 120).weight) == 120

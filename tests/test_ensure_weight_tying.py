"""ensure_weight_tying: one adapter or trained copy for an embedding and its tied head, as in PEFT, both ways."""

import json

import pytest
import torch
from rotation import shared
from safetensors.torch import load_file, save_file
from tiny_models import disturb, foreign_code, gpt2, llama, logits, saved_and_loaded, state_digest, t5, token_ids
from transformers import BertConfig, BertForMaskedLM, PhiConfig, PhiForCausalLM

import minipeft
from minipeft.hf import restore_adapters

with foreign_code():
    peft = pytest.importorskip("peft")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "q_proj"
CASES = {
    "embedding": {"target_modules": [Q, "embed_tokens"]},
    "head": {"target_modules": [Q, "lm_head"]},
    "both": {"target_modules": [Q, "embed_tokens", "lm_head"], "use_rslora": True, "lora_alpha": 3},
    "regex": {"target_modules": r".*(q_proj|lm_head)"},
    "saved embedding": {"target_modules": [Q], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": [Q], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": [Q], "trainable_token_indices": [6, 7]},
    "nothing tied": {"target_modules": [Q]},
}


def bert_lm():
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=100, **small)).eval()


def tied():
    return llama(tie_word_embeddings=True)


def config_of(library, case):
    options = {key: list(value) if isinstance(value, list) else value for key, value in CASES[case].items()}
    return library.LoraConfig(r=4, ensure_weight_tying=True, task_type="CAUSAL_LM", **options)


def theirs(case):
    with foreign_code():
        return disturb(peft.get_peft_model(tied(), config_of(peft, case))).eval()


def ours(case):
    return disturb(minipeft.get_lora_model(tied(), config_of(minipeft, case))).eval()


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def save_theirs(model, path):
    with foreign_code():
        model.save_pretrained(path)


@pytest.mark.parametrize("case", shared(CASES, 0))
def test_a_file_of_peft_is_read_merged_and_written_back(case, tmp_path):
    reference = theirs(case)
    expected = logits(reference)
    save_theirs(reference, tmp_path / "theirs")
    model = minipeft.load_adapter(tied(), tmp_path / "theirs")
    same(logits(model), expected)
    model.save_pretrained(tmp_path / "ours")
    with foreign_code():
        same(logits(peft.PeftModel.from_pretrained(tied(), tmp_path / "ours").eval()), expected)
    same(logits(minipeft.load_adapter(tied(), tmp_path / "ours")), expected)
    merged = model.merge_and_unload()
    same(logits(merged), expected)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("case", shared(CASES, 1))
def test_a_live_model_trains_one_set_of_parameters_and_peft_reads_it(case, tmp_path):
    model, reference = ours(case), theirs(case)
    counts = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (model, reference)]
    if case in {"saved embedding", "saved head", "tokens", "nothing tied"}:  # PEFT counts tied factors twice
        assert counts[0] == counts[1]
    else:
        assert counts[0] < counts[1]
    model.save_pretrained(tmp_path)
    with foreign_code():
        same(logits(peft.PeftModel.from_pretrained(tied(), tmp_path).eval()), logits(model))
    same(logits(minipeft.load_adapter(tied(), tmp_path)), logits(model))
    assert json.loads((tmp_path / CONFIG).read_text())["ensure_weight_tying"] is True


def test_both_layers_give_gradients_to_the_shared_factors():
    model = minipeft.get_lora_model(tied(), config_of(minipeft, "embedding"))
    disturb(model)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    A = model.model.embed_tokens.adapters["default"].lora_A
    assert model.lm_head.adapters["default"].lora_A is A
    used = torch.zeros(A.shape[1], dtype=torch.bool)
    used[ids] = True
    assert A.grad[:, ~used].abs().max() > 0  # which only the head reads


def test_the_head_uses_the_transposed_factors():
    model = ours("embedding")
    embedding, head = model.model.embed_tokens.adapters["default"], model.lm_head.adapters["default"]
    table = torch.eye(100, dtype=torch.float64)
    down, up = (factor.double() for factor in head.pair())
    update = embedding.scaling * (embedding.lora_B.double() @ embedding.lora_A.double()).t()
    torch.testing.assert_close(table @ (head.scaling * up @ down), update)


def test_a_repeat_that_differs_is_refused(tmp_path):
    save_theirs(theirs("embedding"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.lora_B.weight"][3, 1] += 1
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model = tied()
    before = state_digest(model)
    with pytest.raises(minipeft.CheckpointError, match="should be equal, and differ"):
        minipeft.load_adapter(model, tmp_path)
    assert state_digest(model) == before


@pytest.mark.parametrize(("factory", "target"), [(gpt2, "wte"), (bert_lm, "decoder")])
def test_where_peft_did_not_tie_nothing_is_tied(factory, target, tmp_path):
    """GPT-2 calls its table wte, and BERT its head decoder, which PEFT does not recognise."""
    options = {"r": 4, "target_modules": ["c_attn" if factory is gpt2 else "query", target]}
    with foreign_code():
        config = peft.LoraConfig(ensure_weight_tying=True, **options)
        reference = disturb(peft.get_peft_model(factory(), config)).eval()
    save_theirs(reference, tmp_path)
    with foreign_code():  # what is tied to it stays as it is, which minipeft warns about
        model = minipeft.load_adapter(factory(), tmp_path)
    same(logits(model), logits(reference))


def test_our_own_file_for_a_table_of_another_name_ties_in_peft(tmp_path):
    config = minipeft.LoraConfig(r=4, target_modules=["c_attn", "wte"], ensure_weight_tying=True, task_type="CAUSAL_LM")
    model = disturb(minipeft.get_lora_model(gpt2(), config)).eval()
    model.save_pretrained(tmp_path)
    with foreign_code():
        same(logits(peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()), logits(model))
    same(logits(minipeft.load_adapter(gpt2(), tmp_path)), logits(model))


def test_dora_and_different_ranks_are_refused():
    for options in ({"use_dora": True}, {"rank_pattern": {"lm_head": 2}}):
        model = tied()
        before = state_digest(model)
        config = minipeft.LoraConfig(
            r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, **options
        )
        with pytest.raises(minipeft.TargetError, match="ensure_weight_tying"):
            minipeft.get_lora_model(model, config)
        assert state_digest(model) == before


def phi():
    """Its head has a bias, and a name that PEFT knows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return PhiForCausalLM(PhiConfig(vocab_size=100, tie_word_embeddings=True, **sizes)).eval()


HEADS = {
    "BERT's": (bert_lm, "query", ["decoder"], "cls.predictions.decoder"),
    "BERT's table": (bert_lm, "query", ["word_embeddings"], "cls.predictions.decoder"),
    "Phi's": (phi, "q_proj", ["lm_head"], "lm_head"),
    "Phi's table": (phi, "q_proj", ["embed_tokens"], "lm_head"),
}


def with_biased_head(make, head):
    model = make()
    torch.nn.init.normal_(model.get_submodule(head).bias)
    return model


@pytest.mark.each_value
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("case", HEADS)
def test_the_bias_of_a_tied_head_trains_if_the_head_is_named(case, bias, tmp_path):
    """PEFT unties BERT's head, and drops the bias of Phi's."""
    make, target, saved, head = HEADS[case]
    config = minipeft.LoraConfig(target_modules=[target], modules_to_save=saved, ensure_weight_tying=True, bias=bias)
    model = minipeft.get_lora_model(with_biased_head(make, head), config)
    assert torch.equal(logits(model), logits(with_biased_head(make, head)))
    copy, table = model.get_submodule(head).adapters["default"], model.get_input_embeddings().adapters["default"]
    assert copy.weight is table.weight
    assert copy.weight.requires_grad
    trained = {name for name, parameter in copy.named_parameters() if parameter.requires_grad}
    assert trained == ({"weight"} if "table" in case and bias == "none" else {"weight", "bias"})
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    with foreign_code():
        same(logits(peft.PeftModel.from_pretrained(with_biased_head(make, head), tmp_path).eval()), expected)
    again = minipeft.load_adapter(with_biased_head(make, head), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert (
        again.get_submodule(head).adapters["default"].weight is again.get_input_embeddings().adapters["default"].weight
    )
    restore_adapters(again, tmp_path)
    same(logits(again.eval()), expected)
    merged = again.merge_and_unload()
    same(logits(merged), expected)
    if make is phi or "bias" not in trained:  # BERT's bias has a second name, which the merged one has not
        assert merged.get_submodule(head).weight is merged.get_input_embeddings().weight
    same(logits(saved_and_loaded(merged, tmp_path / "merged")), expected)


def test_a_file_of_peft_without_the_bias_of_a_tied_head_leaves_it_as_it_is(tmp_path):
    with foreign_code():
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
        reference = disturb(peft.get_peft_model(phi(), config)).eval()
    save_theirs(reference, tmp_path)
    model = minipeft.load_adapter(phi(), tmp_path, is_trainable=True)
    same(logits(model.eval()), logits(reference))
    assert not model.lm_head.adapters["default"].bias.requires_grad
    with pytest.warns(UserWarning, match="PEFT computes without lm_head.bias, so this adapter was trained without it"):
        minipeft.load_adapter(with_biased_head(phi, "lm_head"), tmp_path)


def test_peft_reads_the_table_of_an_encoder_and_a_decoder(tmp_path):
    """With ensure_weight_tying it would make linear layers of their embeddings."""
    config = minipeft.LoraConfig(target_modules=["q"], modules_to_save=["shared"], ensure_weight_tying=True)
    model = disturb(minipeft.get_lora_model(t5(), config)).eval()
    model.save_pretrained(tmp_path)
    with foreign_code():
        same(logits(peft.PeftModel.from_pretrained(t5(), tmp_path).eval()), logits(model))
    again = minipeft.load_adapter(t5(), tmp_path)
    same(logits(again), logits(model))
    assert again.lm_head.weight is again.encoder.embed_tokens.weight is again.shared.weight


def test_a_table_and_a_head_that_peft_copied_apart_are_read_so(tmp_path):
    """PEFT does not know the names of BERT's, so ensure_weight_tying does nothing in it."""
    options = {"target_modules": ["query"], "modules_to_save": ["word_embeddings", "decoder"]}
    with foreign_code():
        config = peft.LoraConfig(ensure_weight_tying=True, **options)
        reference = disturb(peft.get_peft_model(bert_lm(), config)).eval()
    save_theirs(reference, tmp_path)
    same(logits(minipeft.load_adapter(bert_lm(), tmp_path)), logits(reference))


@pytest.mark.parametrize("saved", ["cls", "predictions", "embeddings"])
def test_a_module_that_holds_a_tied_layer_is_not_copied_without_the_other(saved, tmp_path):
    options = {"target_modules": ["query"], "modules_to_save": [saved], "ensure_weight_tying": True}
    model = bert_lm()
    before = state_digest(model)
    with pytest.raises(minipeft.TargetError, match="in and outside of it share one weight. Name the layers"):
        minipeft.get_lora_model(model, minipeft.LoraConfig(**options))
    assert state_digest(model) == before
    if saved == "embeddings":  # whose name ends that of the tables in it
        return
    with foreign_code():  # which unties them
        reference = disturb(peft.get_peft_model(bert_lm(), peft.LoraConfig(**options))).eval()
    save_theirs(reference, tmp_path)
    same(logits(minipeft.load_adapter(model, tmp_path)), logits(reference))


@pytest.mark.parametrize(("target", "saved"), [("lm_head", "embed_tokens"), ("embed_tokens", "lm_head")])
def test_of_tied_layers_one_is_not_adapted_and_the_other_trained_in_full(target, saved):
    """The trained copy would be called in the place of the adapted layer. PEFT refuses an adapted head, too."""
    options = {"r": 4, "target_modules": [Q, target], "modules_to_save": [saved], "ensure_weight_tying": True}
    model, said = tied(), f"which modules_to_save trains in full, and target_modules adapts .*{target}"
    before = state_digest(model)
    with pytest.raises(minipeft.TargetError, match=said):
        minipeft.get_lora_model(model, minipeft.LoraConfig(**options))
    assert state_digest(model) == before
    if target == "lm_head":
        with foreign_code(), pytest.raises(TypeError, match="cannot be applied"):
            peft.get_peft_model(tied(), peft.LoraConfig(**options))

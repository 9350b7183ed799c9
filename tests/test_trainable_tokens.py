"""Rows of a few tokens that train, in the embedding and in whatever is tied to it."""

import copy
import json
import math
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import disturb, foreign_code, gpt2, llama, logits, state_digest, t5, token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForMaskedLM, Gemma2Config, Gemma2ForCausalLM

from minipeft import LoraConfig, TrainableTokensConfig, get_adapter_model, get_lora_model, load_adapter
from minipeft.errors import CheckpointError, ConfigError, MergeError, TargetError
from minipeft.registry import registry
from minipeft.training.lora_plus import lora_plus_groups

TOKENS = [7, 3, 98]
BESIDE = {"target_modules": ["c_attn"], "r": 4}


def gemma(seed=0):
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = Gemma2Config(
        **sizes, num_key_value_heads=1, head_dim=16, vocab_size=100, max_position_embeddings=64, pad_token_id=0
    )
    return Gemma2ForCausalLM(config).eval()


def bert():
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=100, **small)).eval()


def ids_with_tokens():
    ids = token_ids()
    ids[0, :4] = torch.tensor([3, 98, 7, 3])
    return ids


def rows_of(model, name="default"):
    (rows,) = (t for key, t in model.adapter_state_dict(name).items() if key.endswith("trainable_tokens_delta"))
    return rows


def output(model):
    if model.config.is_encoder_decoder:
        ids = ids_with_tokens()
        return model(input_ids=ids, decoder_input_ids=ids).logits
    return model(ids_with_tokens()).logits


@pytest.mark.parametrize("make", [gpt2, gemma, t5], ids=["tied", "scaled", "three-times"])
def test_the_model_computes_what_it_does_with_those_rows_in_its_table(make):
    model = get_adapter_model(make().double(), TrainableTokensConfig(token_indices=TOKENS))
    plain = make().double()
    torch.testing.assert_close(output(model), output(plain), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        rows_of(model).normal_(generator=torch.Generator().manual_seed(3))
        plain.get_input_embeddings().weight[TOKENS] = rows_of(model)
    torch.testing.assert_close(output(model), output(plain))
    torch.testing.assert_close(output(model.merge_and_unload()), output(plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [gpt2, gemma], ids=["tied", "scaled"])
def test_the_rows_get_the_gradient_that_they_have_in_a_table_that_trains(make):
    model = get_adapter_model(make().double(), TrainableTokensConfig(token_indices=TOKENS))
    plain = make().double()
    for each in (model, plain):
        output(each).square().mean().backward()
    table = plain.get_input_embeddings().weight
    torch.testing.assert_close(rows_of(model).grad, table.grad[TOKENS])
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]


def test_a_layer_tied_to_the_table_follows_and_an_untied_one_does_not():
    tied = get_lora_model(gpt2(), LoraConfig(**BESIDE, trainable_token_indices=TOKENS))
    assert tied.lm_head.adapters["default"].trainable_tokens_delta is rows_of(tied)
    assert sum("trainable_tokens" in name for name, _ in tied.named_parameters()) == 1
    untied = get_lora_model(llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS))
    assert type(untied.lm_head) is nn.Linear
    both = {"embed_tokens": TOKENS, "lm_head": [3, 5]}
    untied = get_lora_model(llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=both))
    shapes = {key: tuple(t.shape) for key, t in untied.adapter_state_dict().items() if "tokens" in key}
    assert shapes == {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (3, 32),
        "base_model.model.lm_head.token_adapter.trainable_tokens_delta": (2, 32),
    }


CASES = {
    "tokens beside LoRA": (gpt2, peft.LoraConfig, {**BESIDE, "trainable_token_indices": TOKENS}),
    "by name": (gpt2, peft.LoraConfig, {**BESIDE, "trainable_token_indices": {"wte": TOKENS}}),
    "head named too": (
        gpt2,
        peft.LoraConfig,
        {**BESIDE, "trainable_token_indices": {"wte": TOKENS, "lm_head": TOKENS}},
    ),
    "a tied head with other tokens": (
        gpt2,
        peft.LoraConfig,
        {**BESIDE, "trainable_token_indices": {"lm_head": [5, 3], "wte": TOKENS}},
    ),
    "head alone": (gpt2, peft.LoraConfig, {**BESIDE, "trainable_token_indices": {"lm_head": TOKENS}}),
    "head alone, and nothing else": (
        gpt2,
        peft.TrainableTokensConfig,
        {"target_modules": ["lm_head"], "token_indices": TOKENS},
    ),
    "tokens beside DoRA": (gpt2, peft.LoraConfig, {**BESIDE, "use_dora": True, "trainable_token_indices": TOKENS}),
    "untied": (
        llama,
        peft.LoraConfig,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [5, 3]}},
    ),
    "scaled": (gemma, peft.LoraConfig, {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS}),
    "alone": (gpt2, peft.TrainableTokensConfig, {"token_indices": TOKENS}),
}


def test_the_encoders_table_named_alone_trains_in_the_encoder_alone_as_in_peft(tmp_path):
    with foreign_code():
        config = peft.LoraConfig(target_modules=["q"], trainable_token_indices={"encoder.embed_tokens": TOKENS})
        theirs = peft.get_peft_model(t5(), config).eval()
        with torch.no_grad():
            theirs.base_model.model.encoder.embed_tokens.token_adapter.trainable_tokens_delta["default"].add_(1)
        theirs.save_pretrained(tmp_path)
        expected = output(theirs)
    with pytest.warns(UserWarning, match="'decoder.embed_tokens.weight', which the adapter does not reach"):
        ours = load_adapter(t5(), tmp_path)
    torch.testing.assert_close(output(ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_peft_is_read_and_given_back_to_it(case, tmp_path):
    make, config, options = CASES[case]
    with foreign_code():
        theirs = peft.get_peft_model(make(), config(**options)).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        expected = logits(theirs, ids_with_tokens())
        theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(make(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, ids_with_tokens()), expected, rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    with foreign_code():
        again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again, ids_with_tokens()), expected, rtol=1e-4, atol=1e-4)


def test_peft_reads_our_file_where_it_gives_a_tied_head_that_is_named_rows_of_its_own(tmp_path):
    """PEFT ties what has its full name, such as ``lm_head``, and BERT's is ``cls.predictions.decoder``."""
    both = {"word_embeddings": TOKENS, "decoder": TOKENS}
    model = disturb(get_lora_model(bert(), LoraConfig(target_modules=["query"], trainable_token_indices=both)))
    model.save_pretrained(tmp_path)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    expected = logits(model, ids_with_tokens())
    torch.testing.assert_close(logits(theirs, ids_with_tokens()), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(load_adapter(bert(), tmp_path), ids_with_tokens()), expected)


@pytest.mark.parametrize("alike", [True, False])
def test_a_file_in_which_peft_has_the_rows_of_one_weight_twice_is_read_if_they_are_the_same(alike, tmp_path):
    with foreign_code():
        config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["wte", "lm_head"])
        theirs = peft.get_peft_model(gpt2(), config)
        for module in (theirs.base_model.model.transformer.wte, theirs.base_model.model.lm_head)[: 2 if alike else 1]:
            module.trainable_tokens_delta["default"].data.add_(1)
        theirs.save_pretrained(tmp_path)
    assert sum("tokens_delta" in key for key in load_file(tmp_path / "adapter_model.safetensors")) > 1
    model = gpt2()
    before = state_digest(model)
    if alike:
        model = load_adapter(model, tmp_path)
        assert torch.equal(rows_of(model), gpt2().transformer.wte.weight[TOKENS] + 1)
    else:
        with pytest.raises(CheckpointError, match="lm_head"):
            load_adapter(model, tmp_path)
        assert state_digest(model) == before


def test_merging_keeps_the_tie_and_unmerging_brings_back_every_bit():
    model = disturb(get_lora_model(gpt2(), LoraConfig(**BESIDE, trainable_token_indices=TOKENS)))
    expected, table = logits(model, ids_with_tokens()), gpt2().transformer.wte.weight
    rows = rows_of(model).detach().clone()
    model.merge_adapter()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.transformer.wte.weight[TOKENS], rows)
    torch.testing.assert_close(logits(model, ids_with_tokens()), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model.transformer.wte.base_layer.weight, table)
    assert torch.equal(logits(model, ids_with_tokens()), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids_with_tokens()), logits(gpt2(), ids_with_tokens()))
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "GPT2LMHeadModel"
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged, ids_with_tokens()), expected, rtol=1e-5, atol=1e-5)


def test_a_tied_head_with_other_tokens_trains_its_own_and_merges_into_a_weight_of_its_own():
    own = {"wte": TOKENS, "lm_head": [5, 3]}
    model = disturb(get_lora_model(gpt2(), LoraConfig(**BESIDE, trainable_token_indices=own)))
    shapes = [tuple(t.shape) for key, t in model.adapter_state_dict().items() if "tokens" in key]
    assert sorted(shapes) == [(2, 32), (3, 32)]
    expected, table = logits(model, ids_with_tokens()), gpt2().transformer.wte.weight
    with pytest.raises(MergeError, match="untie=True"):
        model.merge_and_unload()
    merged = model.merge_and_unload(untie=True)
    changed = [(layer.weight != table).any(1).nonzero().flatten() for layer in (merged.transformer.wte, merged.lm_head)]
    assert [found.tolist() for found in changed] == [sorted(TOKENS), [3, 5]]
    torch.testing.assert_close(logits(merged, ids_with_tokens()), expected)


def test_a_merge_that_fails_half_way_leaves_both_tied_layers_unmerged(monkeypatch):
    model = disturb(get_lora_model(gpt2(), LoraConfig(**BESIDE, trainable_token_indices=TOKENS)))
    expected, before = logits(model, ids_with_tokens()), state_digest(model)
    ops = model.transformer.h[1].attn.c_attn.ops
    written = ops.write_weight
    calls = []

    def breaks(base, weight, bias):
        calls.append(base)
        if len(calls) == 2:
            raise MemoryError
        return written(base, weight, bias)

    monkeypatch.setattr(ops, "write_weight", breaks)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    monkeypatch.undo()
    assert state_digest(model) == before
    assert not model.lm_head.merged
    assert not model.transformer.wte.merged
    assert torch.equal(logits(model, ids_with_tokens()), expected)


def test_beside_another_adapter_of_the_table_the_tie_must_be_given_up_to_merge():
    model = get_lora_model(gpt2(), LoraConfig(**BESIDE, trainable_token_indices=TOKENS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the head shares the weight that is adapted
        model.add_adapter("table", LoraConfig(target_modules=["wte"], r=2))
    model.set_adapter(["default", "table"])
    disturb(model)
    expected = logits(model, ids_with_tokens())
    before = state_digest(model)
    with pytest.raises(MergeError, match="untie"):
        model.merge_adapter()
    assert state_digest(model) == before
    model.merge_adapter(untie=True)
    torch.testing.assert_close(logits(model, ids_with_tokens()), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert model.get_parameter("lm_head.weight") is model.get_parameter("transformer.wte.weight")
    assert state_digest(model) == before


def test_the_changes_of_two_adapters_add_up():
    model = get_adapter_model(gpt2(), TrainableTokensConfig(token_indices=TOKENS))
    model.add_adapter("more", TrainableTokensConfig(token_indices=[3, 4]))
    plain = gpt2()
    table = plain.transformer.wte.weight
    with torch.no_grad():
        start = table.clone()
        for name, tokens in (("default", TOKENS), ("more", [3, 4])):
            rows_of(model, name).add_(torch.randn(len(tokens), 32))
            table[tokens] += rows_of(model, name) - start[tokens]
    model.set_adapter(["default", "more"])
    torch.testing.assert_close(logits(model, ids_with_tokens()), logits(plain, ids_with_tokens()), rtol=1e-5, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("more")
    assert not model.lm_head.tied_adapters - {"default"}
    model.unload()
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(logits(model), logits(gpt2()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_keeps_the_tie(copied):
    model = get_adapter_model(gpt2(), TrainableTokensConfig(token_indices=TOKENS))
    twin = copied(model)
    with torch.no_grad():
        rows_of(twin).add_(1)
    assert twin.lm_head.adapters["default"].trainable_tokens_delta is rows_of(twin)
    merged = copy.deepcopy(twin).merge_and_unload()
    torch.testing.assert_close(logits(twin), logits(merged), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), logits(gpt2()))


def test_autocast_to_the_other_half_precision_changes_nothing_in_the_table():
    """A CPU's autocast refuses to join tensors of that dtype."""
    model = nn.ModuleDict({"table": nn.Embedding(100, 8)}).half()
    model = disturb(get_adapter_model(model, TrainableTokensConfig(target_modules=["table"], token_indices=TOKENS)))
    expected = model["table"](ids_with_tokens())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model["table"](ids_with_tokens()), expected)


def test_on_a_half_precision_base_the_rows_are_float32_and_the_output_is_not():
    model = get_adapter_model(gpt2().bfloat16(), TrainableTokensConfig(token_indices=TOKENS))
    assert rows_of(model).dtype is torch.float32
    assert torch.equal(logits(model), logits(gpt2().bfloat16()))
    with torch.no_grad():
        rows_of(model).add_(0.5)
    unmerged = logits(model, ids_with_tokens())
    assert unmerged.dtype is torch.bfloat16
    merged = logits(model.merge_and_unload(), ids_with_tokens())
    assert (unmerged - merged).abs().max() <= 0.05 * merged.abs().max()


class Largest(TorchDispatchMode):
    """The largest tensor with memory of its own that anything makes."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(x) if torch.is_tensor(t)] for x in ((args, kwargs), result))
        held = {t.untyped_storage().data_ptr() for t in given}
        self.size = max(0, self.size, *(t.numel() for t in made if t.untyped_storage().data_ptr() not in held))
        return result


@pytest.mark.parametrize("library", ["minipeft", "peft"])
def test_nothing_as_large_as_the_table_is_made_where_peft_makes_it(library):
    torch.manual_seed(0)
    table, head = nn.Embedding(5000, 16), nn.Linear(16, 5000, bias=False)
    head.weight = table.weight
    net = nn.Sequential(table, nn.Linear(16, 16), head)
    if library == "minipeft":
        net = get_adapter_model(net, TrainableTokensConfig(token_indices=[4999, 2], target_modules=["0"]))
    else:
        with foreign_code():
            net = peft.get_peft_model(
                net, peft.TrainableTokensConfig(token_indices=[4999, 2], target_modules=["0", "2"])
            )
    with Largest() as largest:
        net(torch.tensor([1, 2, 3])).square().sum().backward()
    assert (largest.size < table.weight.numel()) == (library == "minipeft")
    assert largest.size >= 3 * 5000


def resized(make, size, seed):
    model = make()
    torch.manual_seed(seed)
    with foreign_code():
        model.resize_token_embeddings(size)
    return model


def test_new_words_are_learnt_and_found_again_on_a_table_resized_with_other_random_rows(tmp_path):
    new = [100, 101, 102]
    model = get_lora_model(resized(gpt2, 103, 5), LoraConfig(**BESIDE, trainable_token_indices=new))
    ids = torch.tensor([[1, 100, 2, 101, 102, 3, 100, 4]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(model.transformer.wte.weight[:100], gpt2().transformer.wte.weight)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert max(math.prod(t.shape) for t in tensors.values()) <= 32 * 96
    again = load_adapter(resized(gpt2, 103, 6), tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    padded = load_adapter(resized(gpt2, 128, 7), tmp_path)
    torch.testing.assert_close(padded(ids).logits[..., :103], model(ids).logits, rtol=1e-5, atol=1e-5)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(resized(gpt2, 103, 8), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    plain = gpt2()
    before = state_digest(plain)
    with pytest.raises(ConfigError, match=r"resize_token_embeddings\(103\)"):
        load_adapter(plain, tmp_path)
    assert state_digest(plain) == before


def test_the_wrong_base_is_noticed_by_the_rows_that_do_not_train(tmp_path):
    get_adapter_model(gpt2(), TrainableTokensConfig(token_indices=TOKENS)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter(gpt2(seed=9), tmp_path)
    other = gpt2()
    with torch.no_grad():
        other.transformer.wte.weight[TOKENS] += 1  # which the file brings along
    loaded = load_adapter(other, tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(loaded), logits(gpt2()), rtol=1e-5, atol=1e-5)


WRONG = [
    ({"trainable_token_indices": []}, "non-empty"),
    ({"trainable_token_indices": 7}, "non-empty"),
    ({"trainable_token_indices": "wte"}, "non-empty"),
    ({"trainable_token_indices": [3, 3]}, "3 more than once"),
    ({"trainable_token_indices": [-1]}, "from 0"),
    ({"trainable_token_indices": [True]}, "True"),
    ({"trainable_token_indices": [1.0]}, "1.0"),
    ({"trainable_token_indices": {}}, "module names"),
    ({"trainable_token_indices": {3: [1]}}, "module names"),
    ({"trainable_token_indices": {"wte": []}}, "'wte'"),
    ({"trainable_token_indices": [100]}, r"resize_token_embeddings\(101\)"),
    ({"trainable_token_indices": {"wtee": [1]}}, "wtee"),
    ({"trainable_token_indices": {"ln_f": [1]}}, "LayerNorm"),
    (
        {"trainable_token_indices": {"wte": [1], "lm_head": [2]}, "ensure_weight_tying": True},
        "wte share their weight.*leave out ensure_weight_tying",
    ),
    ({"trainable_token_indices": [1], "target_modules": ["c_attn", "wte"]}, "Choose one"),
    ({"trainable_token_indices": [1], "target_modules": ["c_attn", "lm_head"]}, "Choose one"),
    ({"trainable_token_indices": [1], "modules_to_save": ["wte"]}, "Choose one"),
    ({"trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, "Choose one"),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_what_makes_no_sense_is_refused_and_changes_nothing(options, words):
    model = gpt2()
    before = state_digest(model)
    with pytest.raises((ConfigError, TargetError), match=words):
        get_lora_model(model, LoraConfig(**{**BESIDE, **options}))
    assert state_digest(model) == before
    assert type(model.lm_head) is nn.Linear


def test_a_bias_that_would_be_left_out_is_refused():
    net = nn.ModuleDict({"table": nn.Embedding(10, 4), "inner": nn.Linear(4, 4), "head": nn.Linear(4, 10)})
    with pytest.raises(TargetError, match="bias='all'"):
        get_lora_model(
            net, LoraConfig(target_modules=["inner"], bias="all", trainable_token_indices={"head": [1]}, r=2)
        )


def test_a_model_without_an_input_embedding_says_so():
    net = nn.ModuleDict({"table": nn.Embedding(10, 4), "inner": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="by name"):
        get_lora_model(net, LoraConfig(target_modules=["inner"], trainable_token_indices=[1], r=2))
    with pytest.raises(TargetError, match="by name"):
        get_adapter_model(net, TrainableTokensConfig(token_indices=[1]))


def test_the_rows_go_along_when_an_update_is_saved_as_plain_lora(tmp_path):
    config = LoraConfig(**BESIDE, init_lora_weights="pissa", trainable_token_indices=TOKENS)
    model = disturb(get_lora_model(gpt2(), config))
    model.save_pretrained(tmp_path, convert_to_lora=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"] == TOKENS
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    torch.testing.assert_close(
        logits(theirs, ids_with_tokens()), logits(model, ids_with_tokens()), rtol=1e-4, atol=1e-4
    )


def test_lora_plus_trains_the_rows_at_the_plain_rate():
    model = get_lora_model(gpt2(), LoraConfig(**BESIDE, trainable_token_indices=TOKENS))
    (group,) = (
        group["name"] for group in lora_plus_groups(model, lr=1e-3) if any(p is rows_of(model) for p in group["params"])
    )
    assert group == "lora_A"


def test_an_adapter_that_has_not_moved_a_row_is_reported_as_idle(tmp_path):
    get_adapter_model(gpt2(), TrainableTokensConfig(token_indices=TOKENS)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="changes nothing"):
        load_adapter(gpt2(), tmp_path)


def test_random_rows_are_there_on_request():
    model = get_adapter_model(gpt2(), TrainableTokensConfig(token_indices=TOKENS, init_weights=False))
    assert not torch.allclose(logits(model), logits(gpt2()))
    assert registry.method_class("trainable_tokens") is type(model.lm_head.adapters["default"])

"""Exact packing: each example of a packed row is computed as if it were alone, or the model is refused."""

import logging
import random

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families_train import CAUSAL, EXPERTS, FAMILIES, GROUPED, SMALL, family
from test_training_data import EOS, letters, spelled, write
from tiny_models import adapted, disturb, foreign_code, gpt2, llama

import minipeft
from minipeft.errors import ConfigError
from minipeft.training.data.apart import why_not_apart
from minipeft.training.data.collate import Example, collate, eval_batches, model_inputs
from minipeft.training.data.encoding import IGNORED, Encoding
from minipeft.training.data.examples import encode
from minipeft.training.data.order import UpdateOrder
from minipeft.training.data.packing import best_fit, joined, pack
from minipeft.training.data.sources import open_source
from minipeft.training.data.texts import read_texts
from minipeft.training.updates import loss_sum

pytestmark = pytest.mark.usefixtures("own_cache")

# In most of them, position ids do not reach the mask; Mamba and LFM2 have no mask for their states.
NOT_APART = {"opt", "bloom", "gpt_oss", "mamba", "lfm2"}
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
    NOT_APART.add("falcon")
CAUSAL_FAMILIES = [name for name, (kind, _) in FAMILIES.items() if kind == CAUSAL]
OTHERS = {
    "mamba": {**SMALL, "state_size": 4},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "gpt_oss": {**GROUPED, **EXPERTS},
}
WINDOWS = ["mistral", "gemma3_text", "phi3", "starcoder2"]


def documents(*lengths, masked=0, size=64, seed=0):
    """Examples of these lengths, the first `masked` tokens of which are not predicted."""
    ids = [np.random.default_rng([seed, n]).integers(3, size, n).astype(np.int32) for n in lengths]
    return [Example(row, np.where(np.arange(len(row)) < masked, IGNORED, row).astype(np.int32)) for row in ids]


def loss_and_gradients(model, batches):
    model.zero_grad()
    loss = sum(loss_sum(model, batch) for batch in batches)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_as_if_alone(model):
    """Two packed rows, one of them padded, against their documents one by one: logits, loss and every gradient."""
    rows = [documents(9, 4), documents(8, 1, 5, seed=1)]
    together = collate([joined(row) for row in rows], 0)
    alone = [collate([document], 0) for row in rows for document in row]
    with torch.no_grad():
        logits = model(**model_inputs(together)).logits
        expected = [model(**model_inputs(batch)).logits[0] for batch in alone]
    for row, own in zip(logits, (torch.cat(expected[:2]), torch.cat(expected[2:])), strict=True):
        torch.testing.assert_close(row[: len(own)], own, rtol=1e-5, atol=1e-5)
    (loss, gradients), (other, others) = (loss_and_gradients(model, batches) for batches in ([together], alone))
    assert loss == pytest.approx(other, rel=1e-5)
    assert gradients.keys() == others.keys()
    assert gradients
    for name, gradient in gradients.items():
        scale = max(1.0, float(others[name].abs().max()))
        torch.testing.assert_close(gradient, others[name], rtol=1e-5, atol=1e-5 * scale, msg=name)


def model_of(name, moved=True, **options):
    """A tiny random model of a family, all of which trains; fresh from its initialisation if it is not `moved`."""
    if moved and not options and name in FAMILIES:
        return family(name).requires_grad_(True)
    kind, usual = FAMILIES.get(name) or (CAUSAL, OTHERS[name])
    with foreign_code(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **{**usual, **options})
        model = getattr(transformers, kind).from_config(config).eval()
    return disturb(model) if moved else model


@pytest.mark.parametrize("name", [name for name in CAUSAL_FAMILIES if name not in NOT_APART])
def test_a_packed_row_is_its_documents_alone(name):
    model = model_of(name)
    assert why_not_apart(model) is None
    assert_as_if_alone(model)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_sliding_window_stays_within_a_packed_document(name):
    model = model_of(name, sliding_window=4)
    assert why_not_apart(model) is None
    assert_as_if_alone(model)


@pytest.mark.each_value
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("name", sorted(NOT_APART))
def test_a_model_that_mixes_packed_documents_is_found(name, moved):
    model = model_of(name, moved=moved).train()
    assert "mixes packed documents (their logits differ by" in why_not_apart(model)
    assert model.training
    model.eval()
    if moved:
        with pytest.raises(AssertionError):
            assert_as_if_alone(model)


@pytest.mark.each_value
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "mamba"])
def test_the_probe_tells_them_apart_in_half_precision(name, implementation):
    model = model_of(name).bfloat16()
    if name != "mamba":
        model.set_attn_implementation(implementation)
    assert (why_not_apart(model) is None) == (name != "mamba")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_leak_is_not_taken_for_rounding(dtype):
    class Leaking(type(llama())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 1e-4 * output.logits.cumsum(1)
            return output

    model = llama().to(dtype)
    assert why_not_apart(model) is None
    model.__class__ = Leaking
    assert "mixes packed documents" in why_not_apart(model)


def test_a_model_without_position_ids_is_found():
    class Plain(type(gpt2())):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    model = gpt2()
    model.__class__ = Plain
    assert "cannot compute packed documents" in why_not_apart(model)


@pytest.mark.usefixtures("unprobed")
@pytest.mark.each_value
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_a_lean_adapted_model_trains_on_packed_rows_as_on_padded_ones(make, checkpointing):
    model = minipeft.lean(adapted(make()).train(), checkpointing)
    examples = documents(3, 9, 4, 12, 2, 7, masked=2, size=100)
    packed = collate([joined(examples[:3]), joined(examples[3:])], 0)
    padded = collate(examples, 0)
    (loss, gradients), (other, others) = (loss_and_gradients(model, [batch]) for batch in (packed, padded))
    assert loss == pytest.approx(other, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-5)


def test_a_batch_of_packed_rows_has_positions_and_no_mask():
    batch = collate([joined(documents(3, 2)), joined(documents(1, 2, 4))], 0)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 0, 1, 2, 3]]
    assert (batch["labels"] == IGNORED).tolist() == [
        [True, False, False, True, False, True, True],
        [True, True, False, True, False, False, False],
    ]
    assert model_inputs(batch)["use_cache"] is False


@given(st.lists(st.integers(1, 20), max_size=60))
@settings(max_examples=100, deadline=None)
def test_bins_hold_each_example_once_and_no_two_of_them_fit_into_one(lengths):
    lengths = sorted(lengths, reverse=True)
    bins = best_fit(lengths, 20)
    assert len(bins) == len(lengths)
    assert set(bins) == set(range(max(bins, default=-1) + 1))
    filled = sorted(np.bincount(bins, weights=lengths)) if lengths else []
    assert max(filled, default=0) <= 20
    assert len(filled) < 2 or filled[0] + filled[1] > 20


def test_prompts_fill_rows_and_cost_no_more_than_their_tokens(tmp_path):
    generator = random.Random(0)
    rows = [{"prompt": "p" * generator.randint(1, 9), "completion": "c" * generator.randint(1, 20)} for _ in range(200)]
    examples = encode(open_source(write(tmp_path / "a.jsonl", rows)), letters(), Encoding(32, packing=True))
    packed = pack(examples)
    assert (int(packed.lengths.sum()), packed.targets.sum()) == (int(examples.lengths.sum()), examples.tokens)
    assert packed.lengths.max() <= 32
    assert packed.lengths.sum() > 0.9 * 32 * len(packed)
    assert f"{len(packed)} rows, each example as if alone" in packed.describe()
    assert pack(examples).fingerprint == packed.fingerprint != examples.fingerprint
    order = UpdateOrder(packed, 4, 0)
    model = gpt2().double()
    with torch.no_grad():
        for u in range(3):
            batches = order[u].batches(0, 1, 3)
            numbers = np.concatenate([packed.order[packed.edges[r] : packed.edges[r + 1]] for r in order[u].indices])
            alone = loss_sum(model, collate(examples.rows(numbers), 0))
            assert float(sum(loss_sum(model, batch) for batch in batches)) == pytest.approx(float(alone), rel=1e-6)
            assert order[u].tokens == int(examples.targets[numbers].sum())
    assert sum(len(batch["labels"]) for batch in eval_batches(packed, 5)) == len(packed)


def test_documents_are_packed_whole_and_only_long_ones_are_cut(tmp_path):
    texts = ["alpha", "", "beta gamma", "d", "epsilon"]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    packed = pack(encode(open_source(path), letters(), Encoding(8)))
    found = []
    for row in packed.rows(range(len(packed))):
        found += [piece.tolist() for piece in np.split(row.input_ids, np.cumsum(row.documents)[:-1])]
    beta = [*spelled("beta gamma"), EOS]
    whole = [[*spelled(text), EOS] for text in ("alpha", "d", "epsilon")]
    assert sorted(found) == sorted([*whole, beta[:8], beta[8:]])


def texts_of(path, model, **options):
    return read_texts(path, {}, letters(), Encoding(16, **options), model)


def test_packing_is_refused_or_padded_where_it_cannot_be_exact(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [{"text": "ab" * (1 + n % 3)} for n in range(40)])
    opt = model_of("opt", vocab_size=300)
    with pytest.raises(ConfigError, match=r"packing: OPTForCausalLM mixes .*; pad them \(--no-packing\)"):
        texts_of(path, opt, packing=True)
    with caplog.at_level(logging.INFO, "minipeft"):
        texts = texts_of(path, opt)
    assert "OPTForCausalLM mixes" in caplog.text
    assert texts.encoding.packing is False
    assert len(texts.train) == 38
    assert texts.train.rows([0])[0].documents == ()
    across = texts_of(path, opt, attend_across=True)
    assert across.train.rows([0])[0].documents == ()
    assert across.train.lengths[0] == 16


def test_documents_are_packed_by_default_and_prompts_if_asked(tmp_path):
    model = model_of("qwen3", vocab_size=300)
    path = write(tmp_path / "a.jsonl", [{"text": "ab" * (1 + n % 3), "id": n} for n in range(40)])
    texts = texts_of(path, model)
    assert "columns that are not used (train): 'id'" in texts.describe("a")
    assert len(texts.train) < 20
    assert len(texts.train.store) == 38
    assert len(texts.evaluation["eval"].store) == 2
    path = write(tmp_path / "b.jsonl", [{"prompt": "ab", "completion": "c" * (1 + n % 3)} for n in range(40)])
    assert len(texts_of(path, model).train) == 38
    assert len(texts_of(path, model, packing=True).train) < 20
    (tmp_path / "c.txt").write_text("one text without documents\n" * 9)
    assert texts_of(tmp_path / "c.txt", model_of("mamba", vocab_size=300), packing=True).train.lengths[0] == 16

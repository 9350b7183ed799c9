"""The embedded base: the bytes that were recorded, as good as was recorded, and built by the script beside it."""

import gzip
import hashlib
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ASSETS = Path(__file__).resolve().parents[1] / "examples" / "assets"
RESULTS = json.loads((ASSETS / "RESULTS.json").read_text("utf-8"))


def build_script():
    spec = importlib.util.spec_from_file_location("build_assets", ASSETS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_has_its_recorded_sum():
    lines = (ASSETS / "SHA256SUMS").read_text("utf-8").splitlines()
    recorded = {name: digest for digest, name in (line.split("  ") for line in lines)}
    for name, digest in recorded.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name
    kept = {p.relative_to(ASSETS).as_posix() for folder in ("tiny", "corpus") for p in (ASSETS / folder).iterdir()}
    assert kept <= recorded.keys()
    assert sum((ASSETS / name).stat().st_size for name in recorded) < 4e6


def perplexity_on(corpus, rows=None):
    """Of the embedded base, on so many rows of a corpus; the default is all."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32).eval()
    assert model.num_parameters() == RESULTS["parameters"] == 1_088_256
    text = gzip.decompress((ASSETS / "corpus" / f"{corpus}-eval.txt.gz").read_bytes()).decode("utf-8")
    text = text if rows is None else text[: 2000 * rows]  # which has more than 256 tokens in 2000 characters
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    blocks = ids[: len(ids) // 256 * 256].view(-1, 256)[:rows]
    with torch.no_grad():
        losses = [model(input_ids=row, labels=row).loss * len(row) for row in blocks.split(8)]
    assert rows in (None, len(blocks))
    return math.exp(float(torch.stack(losses).sum()) / len(blocks))


@pytest.mark.slow  # always checked are the bytes of the model, which this cannot change, and a part of the text
@pytest.mark.parametrize("corpus", ["docs", "code"])
def test_the_base_has_its_recorded_perplexity(corpus):
    recorded = RESULTS["final"][f"{corpus}_perplexity"]
    assert perplexity_on(corpus) == pytest.approx(recorded, rel=2e-3)  # stored in float16


def test_the_base_is_about_as_good_on_the_first_rows_as_on_all():
    for corpus in ("docs", "code"):
        assert perplexity_on(corpus, 16) == pytest.approx(RESULTS["final"][f"{corpus}_perplexity"], rel=0.5)


def test_the_tokenizer_gives_every_text_back():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    for text in ("def f(x):\n    return x\n", "naïve café ☃ 中文", " \t\n\n  x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


def test_training_and_evaluation_share_no_document():
    for corpus in ("docs", "code"):
        parts = [gzip.decompress((ASSETS / "corpus" / f"{corpus}-{p}.txt.gz").read_bytes()) for p in ("train", "eval")]
        train, held_out = (set(part.split(b"<|endoftext|>")) - {b"\n", b""} for part in parts)
        assert train
        assert held_out
        assert not train & held_out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' notes on a model under construction
def test_a_few_steps_of_the_build_learn(tmp_path, monkeypatch):
    build = build_script()
    text = build.read_corpus(ASSETS, "docs-train")[:200_000]
    tokenizer = build.build_tokenizer(text)
    assert len(tokenizer) == 2048
    held_out = {"docs_perplexity": build.read_corpus(ASSETS, "docs-eval")[:8_000]}
    model, log = build.pretrain(tokenizer, text, held_out, steps=20, batch_size=4, learning_rate=3e-3)
    assert log[-1]["docs_perplexity"] < 0.6 * log[0]["docs_perplexity"]
    build.save_half(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded.transformer.wte.weight, model.transformer.wte.weight.half().float())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_the_style_is_code_without_docstrings():
    import ast

    build = build_script()
    tree = ast.parse('"""Module."""\nclass A:\n    """Doc."""\ndef f():\n    """Doc."""\n    return 1  # comment\n')
    assert build.without_docstrings(tree) == "class A:\n    pass\n\ndef f():\n    return 1"

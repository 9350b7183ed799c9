"""The suggestions, against the article's formula worked out here."""

import json

import pytest
import transformers
from test_cli import run
from tiny_models import bert_classifier, gpt2
from transformers import LlamaConfig, Qwen2Config

import minipeft
from minipeft import ConfigError, LoraConfig, MinipeftError, get_adapter_model
from minipeft.planning.suggest import suggest

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192}
LLAMA = LlamaConfig(hidden_size=2048, vocab_size=100, **SIZES, architectures=["LlamaForCausalLM"])
# In and out features of q, k, v, o, gate, up and down.
PER_RANK = 2 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))


def test_the_learning_rate_is_ten_times_that_of_full_fine_tuning():
    found = suggest(LLAMA, get_adapter_model)
    assert found["learning_rate"] == pytest.approx(5e-4 * (2000 / 2048) ** 0.781, rel=0.02)
    qwen = suggest(Qwen2Config(hidden_size=1024, vocab_size=100, **SIZES), get_adapter_model)
    assert qwen["learning_rate"] == pytest.approx(5e-4 * (2000 / 1024) ** 0.0775, rel=0.02)


def test_a_family_that_was_not_measured_gets_a_rate_between_those_that_were():
    found = suggest(gpt2().config, get_adapter_model)
    width = gpt2().config.hidden_size
    llama, qwen = (5e-4 * (2000 / width) ** p for p in (0.781, 0.0775))
    assert found["learning_rate"] == pytest.approx((llama * qwen) ** 0.5, rel=0.03)
    assert "gpt2 was not measured" in next(c.reason for c in found.choices if c.name == "learning_rate")


@pytest.mark.parametrize(("tokens", "r"), [(1000, 8), (20 * PER_RANK, 32), (64 * PER_RANK, 64), (10**12, 256)])
def test_the_rank_gives_a_parameter_to_each_token(tokens, r):
    found = suggest(LLAMA, get_adapter_model, tokens)
    assert found["r"] == r
    reason = next(choice.reason for choice in found.choices if choice.name == "r")
    assert f"{r * PER_RANK:,} parameters" in reason
    assert ("less than one a token" in reason) == (tokens == 10**12)


def test_a_short_run_learns_faster_and_in_small_batches():
    short, long = (suggest(LLAMA, get_adapter_model, tokens, length=100) for tokens in (1000, 10**7))
    assert short["learning_rate"] == pytest.approx(1.5 * long["learning_rate"], rel=0.03)
    assert (short["batch_size"], long["batch_size"]) == (1, 32)


def missing(place):
    raise OSError(f"no tokenizer in {place}")


def test_the_command_prints_a_configuration_to_paste(tmp_path):
    gpt2().config.save_pretrained(tmp_path)
    lines = run("suggest", tmp_path, "--tokens", "5000").output.splitlines()
    assert eval(lines[-1]) == LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    found = json.loads(run("suggest", tmp_path, "--tokens", "5000", "--json").output)
    assert found["config"] == lines[-1]
    assert all(choice["reason"] for choice in found["choices"])


def test_the_call_returns_what_the_command_prints(tmp_path):
    gpt2().config.save_pretrained(tmp_path)
    found = minipeft.suggest(tmp_path, tokens=5000)
    assert found.code() == run("suggest", tmp_path, "--tokens", "5000").output.splitlines()[-1]
    assert found.config == LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")


def test_the_head_of_a_classifier_trains_in_full():
    config = minipeft.suggest(bert_classifier()).config
    assert config.task_type == "SEQ_CLS"
    model = get_adapter_model(bert_classifier(), config)
    assert any(name.startswith("classifier.") for name, p in model.named_parameters() if p.requires_grad)


def test_bad_input_is_named(tmp_path, monkeypatch):
    gpt2().config.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", missing)
    (tmp_path / "text").write_text("one")  # and a model without a tokenizer
    for more, words in (
        (["--tokens", "1", "--text", "x"], "give one"),
        (["--text", tmp_path / "none"], "cannot be read"),
        (["--text", tmp_path / "text"], "no tokenizer"),
        (["--tokens", "0"], "integer from 1 to"),
    ):
        with pytest.raises(MinipeftError, match=words):
            run("suggest", tmp_path, *more)
    with pytest.raises(ConfigError, match="integer from 1 to"):
        suggest(LLAMA, get_adapter_model, length=0)

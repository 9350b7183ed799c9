"""A model without a tokenizer of its own is said to have none; transformers makes up an empty one for some families."""

import pytest
import transformers
from test_cli import run
from tiny_models import foreign_code, gpt2, llama

from minipeft import DataError, LoraConfig, get_lora_model
from minipeft.errors import ConfigError
from minipeft.files.tokenizer import load_tokenizer
from minipeft.training.base_model import load_base


def gemma2():
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**sizes, num_key_value_heads=2, vocab_size=100, bos_token_id=1, eos_token_id=2)
    )


MODELS = {
    "no words": (gpt2, "has no tokenizer of its own, and the one that transformers makes for it knows no words"),
    "five special tokens": (gemma2, "knows no words"),
    "none at all": (llama, "has no tokenizer that loads"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_base_without_a_tokenizer_is_named_wherever_one_is_needed(case, tmp_path):
    make, words = MODELS[case]
    with foreign_code():
        make().save_pretrained(tmp_path / "base")
        base = type(make()).from_pretrained(tmp_path / "base")
    get_lora_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    (tmp_path / "text").write_text("some words")
    with pytest.raises(DataError, match=words):
        load_tokenizer(tmp_path / "base")
    with pytest.raises(ConfigError, match=rf"--model_name .*base.* {words}") as caught:
        load_base(str(tmp_path / "base"))
    assert "\n" not in str(caught.value)
    for command in (["suggest", tmp_path / "base"], ["doctor", tmp_path / "adapter"]):
        with pytest.raises(DataError, match=words):
            run(*command, "--text", tmp_path / "text")

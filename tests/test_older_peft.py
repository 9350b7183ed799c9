"""Files of PEFT's earlier versions, which meant something else by the same words; the installed PEFT says what that is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import disturb, foreign_code, gpt2, llama, logits

import minipeft
from minipeft.files.readers.contents import read_contents
from minipeft.files.readers.made_for import made_for
from minipeft.files.readers.names import Reader
from minipeft.files.readers.rules import Takes, answer

with foreign_code():
    import peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SINCE_0_14 = {
    "exclude_modules",
    "eva_config",
    "lora_bias",
    "rank_dropout_scale",
    "trainable_token_indices",
    "peft_version",
}
TARGETS = {"target_modules": ["q_proj", "v_proj"]}
# What 0.13 wrote -> what decides for each layer today.
OF_0_13 = {
    "both tables know a layer by another key": (
        peft.LoraConfig,
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 30, "v_proj": 3}},
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "a rank for one layer of those with an alpha": (
        peft.LoraConfig,
        {"r": 4, "rank_pattern": {"layers.1.self_attn.v_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        {
            "r": 4,
            "rank_pattern": {"layers.1.self_attn.v_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 3},
        },
    ),
    "loha": (
        peft.LoHaConfig,
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 30}},
        {"r": 4, "rank_pattern": {"q_proj": 2}},
    ),
    "lokr had no alpha": (
        peft.LoKrConfig,
        {"r": 4, "alpha": 16, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"r": 4, "alpha": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}},
    ),
}


def written(path, config, model=llama):
    with foreign_code():
        adapted = disturb(peft.get_peft_model(model(), config)).eval()
        adapted.save_pretrained(path)
        return logits(adapted)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", OF_0_13)
def test_the_tables_of_peft_before_0_14_decide_as_they_did(case, tmp_path):
    """One key decided for both tables, and LoKr's alpha did nothing. A file that is saved again says it in today's words."""
    cls, said, meant = OF_0_13[case]
    expected = written(tmp_path / "theirs", cls(**meant, **TARGETS))
    values = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    old = {key: value for key, value in values.items() if key not in SINCE_0_14} | said
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(old))
    model = minipeft.load_adapter(llama(), tmp_path / "theirs")
    same(logits(model), expected)
    model.save_pretrained(tmp_path / "ours")
    assert answer(read_contents(tmp_path / "theirs"), Reader.PEFT).takes is Takes.PARTLY
    made_for(Reader.PEFT, tmp_path / "theirs", tmp_path / "made")
    for folder in ("ours", "made"):
        same(logits(minipeft.load_adapter(llama(), tmp_path / folder)), expected)
        with foreign_code():
            same(logits(peft.PeftModel.from_pretrained(llama(), tmp_path / folder).eval()), expected)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_biases_of_peft_before_0_7_are_those_of_the_layers(bias, tmp_path):
    """A layer was adapted by a subclass of its own then, not by one around it: ``c_attn.bias``."""
    config = peft.LoraConfig(r=4, bias=bias, target_modules=["c_attn"])
    expected = written(tmp_path, config, gpt2)
    tensors = {key.replace(".base_layer.bias", ".bias"): t for key, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    same(logits(minipeft.load_adapter(gpt2(), tmp_path)), expected)


def test_a_series_of_oft_that_peft_has_changed_is_named(tmp_path):
    """As PEFT names it. What it is today cannot say what it was."""
    expected = written(tmp_path, peft.OFTConfig(oft_block_size=8, **TARGETS))
    same(logits(minipeft.load_adapter(llama(), tmp_path)), expected)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if key != "peft_version"}))
    with pytest.warns(UserWarning, match="PEFT before 0.18"):
        model = minipeft.load_adapter(llama(), tmp_path)
    model.save_pretrained(tmp_path / "ours")
    minipeft.load_adapter(llama(), tmp_path / "ours")


@pytest.mark.parametrize("options", [{"r": 2}, {"r": 2, "oft_block_size": 0}], ids=["before 0.14", "before 0.16"])
def test_oft_of_peft_before_0_16_is_named(options, tmp_path):
    """PEFT refuses the first; of the second it loads nothing."""
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "OFT", "target_modules": ["c_fc"], **options}))
    save_file({"base_model.model.transformer.h.0.mlp.c_fc.oft_r": torch.zeros(2, 8, 8)}, tmp_path / WEIGHTS)
    with pytest.raises(minipeft.CheckpointError, match=r"OFT of PEFT before 0\.16.* Train it again"):
        minipeft.load_adapter(gpt2(), tmp_path)
    for reader in (Reader.PEFT, Reader.TRANSFORMERS):
        assert answer(read_contents(tmp_path), reader).takes is Takes.NO


def test_biases_that_peft_before_0_19_1_left_out_are_said_to_be_lost(tmp_path):
    written(tmp_path, peft.LoraConfig(r=4, bias="lora_only", target_modules=["c_attn"]), gpt2)
    save_file({k: t for k, t in load_file(tmp_path / WEIGHTS).items() if ".bias" not in k}, tmp_path / WEIGHTS)
    with pytest.raises(
        minipeft.CheckpointError, match=r"missing .*bias.* PEFT 0.7 to 0.19.0 left .* strict=False loads"
    ):
        minipeft.load_adapter(gpt2(), tmp_path)
    with foreign_code():
        expected = logits(peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval())
    with pytest.warns(UserWarning, match="missing"):
        model = minipeft.load_adapter(gpt2(), tmp_path, strict=False)
    same(logits(model), expected)

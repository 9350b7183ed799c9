"""Values in adapter_config.json that ask for nothing, as PEFT and other tools write them; PEFT says what they mean."""

import copy
import dataclasses
import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import disturb, foreign_code, gpt2, gpt2_classifier, llama, logits, state_digest
from torch import nn

import minipeft
from minipeft.config.adapter_config import config_from_dict
from minipeft.ecosystem.peft_options import OPTIONS

with foreign_code():
    peft = pytest.importorskip("peft")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QV = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
METHODS = {
    "lora": lambda: peft.LoraConfig(r=4, **QV),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, **QV),
    "ia3": lambda: peft.IA3Config(feedforward_modules=["v_proj"], **QV),
    "loha": lambda: peft.LoHaConfig(r=4, **QV),
    "lokr": lambda: peft.LoKrConfig(r=4, **QV),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, **QV),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[6, 7], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
}


def written(path, config, model=llama, **edit):
    """A directory of PEFT's with its configuration edited, and the logits of its model."""
    with foreign_code():
        adapted = disturb(peft.get_peft_model(model(), config)).eval()
        adapted.save_pretrained(path)
        expected = logits(adapted)
    edited(path, **edit)
    return expected


def edited(path, **edit):
    values = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**values, **edit}))


def their_logits(path, model=llama):
    with foreign_code():
        return logits(peft.PeftModel.from_pretrained(model(), path).eval())


def refused(path, said, model=llama):
    fresh = model()
    before = state_digest(fresh)
    with pytest.raises(minipeft.MinipeftError, match=said):
        minipeft.load_adapter(fresh, path)
    assert state_digest(fresh) == before


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method", [m if m == "trainable_tokens" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_null_and_empty_values_are_read_as_peft_reads_them(method, tmp_path):
    """For every option: whatever PEFT reads as nothing we read so too, and nothing is read in another way."""
    expected = written(tmp_path, METHODS[method]())
    plain = json.loads((tmp_path / CONFIG).read_text())
    for key in plain.keys() - {"peft_type", "target_modules", "feedforward_modules", "base_model_name_or_path"}:
        for value in (None, [], "") if key in {"modules_to_save", "layers_to_transform"} else (None,):
            (tmp_path / CONFIG).write_text(json.dumps({**plain, key: value}))
            try:
                theirs = their_logits(tmp_path)
            except Exception:
                theirs = None
            try:
                ours = logits(minipeft.load_adapter(llama(), tmp_path))
            except minipeft.MinipeftError:
                # VeRA's null for save_projection says that the file has none, and it has.
                assert theirs is None or (theirs - expected).abs().max() > 1e-5 or key == "save_projection", (
                    key,
                    value,
                )
                continue
            same(ours, expected if theirs is None else theirs)


@pytest.mark.parametrize(
    "edit",
    [
        {"fan_in_fan_out": None},
        {"modules_to_save": []},
        {"modules_to_save": False, "exclude_modules": False, "layers_pattern": False, "target_parameters": False},
        {"exclude_modules": []},
        {"exclude_modules": ""},
        {"layers_to_transform": []},
        {"layers_pattern": []},
        {"target_parameters": []},
        {"trainable_token_indices": {}},
        {"rank_pattern": None, "alpha_pattern": None},
        {"use_dora": None, "use_rslora": 0, "lora_bias": None, "ensure_weight_tying": None},
        {"init_lora_weights": None},
        {"lora_dropout": None, "bias": None},
        {"enable_lora": None, "merge_weights": False},
        {"merge_weights": True},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"megatron_config": {}, "layer_replication": [], "use_bdlora": False},
        {"eva_config": {"rho": 2.0}, "corda_config": {"verbose": False}, "loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "Gaussian"},
    ],
    ids=lambda edit: " ".join(edit),
)
def test_what_asks_for_nothing_changes_nothing(edit, tmp_path):
    expected = written(tmp_path / "theirs", METHODS["lora"](), **edit)
    model = minipeft.load_adapter(llama(), tmp_path / "theirs")
    same(logits(model), expected)
    model.save_pretrained(tmp_path / "ours")
    same(their_logits(tmp_path / "ours"), expected)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"r": None}, "r must be an integer"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number"),
        ({"r": []}, "r must be an integer"),
        ({"target_modules": []}, "target_modules must be a non-empty list"),
        ({"enable_lora": [True, False, True]}, "enable_lora"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"num_virtual_tokens": 8}, "num_virtual_tokens"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
        ({"init_lora_weights": "lora_ga"}, "changes the base by factors that the file does not hold"),
        ({"init_lora_weights": "loftq"}, "changes the base by factors that the file does not hold"),
        ({"init_lora_weights": "OLoRA"}, "changes the base by factors that the file does not hold"),
        ({"a_new_option": True, "peft_version": "0.99.0"}, "a_new_option"),
        ({f"key{number}": number + 1 for number in range(100)}, "100 unknown keys"),
        ({"use_dora": "no"}, "use_dora must be True or False"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, dict) else "",
)
def test_what_asks_for_something_that_is_not_there_is_refused(edit, said, tmp_path):
    written(tmp_path, METHODS["lora"](), **edit)
    refused(tmp_path, said)


def test_a_file_of_adalora_that_never_allocated_ranks_may_aim_above_its_first_rank(tmp_path):
    options = {"init_r": 4, "total_step": 10, **QV}  # and target_r is 8 by default
    expected = written(tmp_path, peft.AdaLoraConfig(**options))
    ours = minipeft.load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-5)
    assert ours.adapter_configs["default"].target_r == 4
    with pytest.raises(minipeft.ConfigError, match="target_r = 8 exceeds init_r = 4"):
        minipeft.AdaLoraConfig(**options)


def test_a_misspelt_option_is_not_taken_for_bookkeeping():
    plain = {"peft_type": "LORA", "target_modules": ["a"]}
    for key, option in {"lora_alhpa": "lora_alpha", "loraAlpha": "lora_alpha", "rank_patern": "rank_pattern"}.items():
        with pytest.raises(minipeft.ConfigError, match=f"{key}.*{option}"):
            config_from_dict({**plain, key: 4})
    assert config_from_dict({**plain, "unsloth_fixed": True}).other_keys == {"unsloth_fixed": True}


def test_bookkeeping_is_kept_and_written_back(tmp_path, caplog):
    more = {"unsloth_fixed": True, "swift_version": "3.1", "note": {"by": ["a tool"]}, "empty": None}
    expected = written(tmp_path / "theirs", METHODS["lora"](), revision="v2", **more)
    with caplog.at_level(logging.INFO, "minipeft"):
        model = minipeft.load_adapter(llama(), tmp_path / "theirs", is_trainable=True)
    assert [record.message for record in caplog.records if "'note', 'swift_version', 'unsloth_fixed'" in record.message]
    for step in ("ours", "again"):
        model.save_pretrained(tmp_path / step)
        values = json.loads((tmp_path / step / CONFIG).read_text())
        assert {key: values.get(key) for key in more} == more
        assert values["revision"] == "v2"
        model = minipeft.load_adapter(llama(), tmp_path / step)
        same(logits(model), expected)
    model.save_pretrained(tmp_path / "lora", convert_to_lora=True)
    assert json.loads((tmp_path / "lora" / CONFIG).read_text())["unsloth_fixed"] is True


def test_other_keys_of_a_live_configuration_are_checked():
    for value in ({"r": 4}, {"use_qalora": True}, {3: 4}, {"a": float("nan")}, {"a": object()}, ["a"]):
        with pytest.raises(minipeft.ConfigError, match="other_keys"):
            minipeft.LoraConfig(other_keys=value)
    assert minipeft.LoraConfig(other_keys={"made_by": "us"}).to_dict()["made_by"] == "us"


def test_every_option_of_the_installed_peft_is_known():
    known = {f.name for config in PEFT_TYPE_TO_CONFIG_MAPPING.values() for f in dataclasses.fields(config)}
    assert known <= OPTIONS


class FrozenNorm(nn.Module):
    """As DETR's backbone has them: its weight and bias are buffers."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("weight", torch.rand(size) + 1)
        self.register_buffer("bias", torch.randn(size))

    def forward(self, x):
        return x * self.weight + self.bias


def test_buffers_that_are_called_bias_are_compared_with_those_of_the_base(tmp_path):
    """With ``bias="all"`` PEFT writes them, too."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 5), FrozenNorm(5), nn.Linear(5, 4)), torch.randn(3, 6)
    with foreign_code():
        config = peft.LoraConfig(r=2, target_modules=["0"], bias="all")
        adapted = disturb(peft.get_peft_model(copy.deepcopy(base), config)).eval()
        adapted.save_pretrained(tmp_path)
        expected = adapted(x)
    assert "base_model.model.1.bias" in load_file(tmp_path / WEIGHTS)
    torch.testing.assert_close(minipeft.load_adapter(copy.deepcopy(base), tmp_path)(x), expected)
    base[1].bias += 1
    with pytest.raises(minipeft.CheckpointError, match="brings its own 'base_model.model.1.bias'"):
        minipeft.load_adapter(base, tmp_path)


class Classifier(nn.Module):
    """As RoBERTa's: its head has several layers."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        return self.classifier(self.body(x))


@pytest.mark.parametrize("adapter_name", ["default", "first"])
def test_biases_inside_of_a_trained_module_are_read_under_each_of_their_names(adapter_name, tmp_path):
    """With ``bias="all"`` PEFT writes them thrice: for the module, for the copy that trains, and for the original."""
    torch.manual_seed(0)
    base, x = Classifier(), torch.randn(3, 6)
    with foreign_code():
        config = peft.LoraConfig(r=2, target_modules=["body"], bias="all", modules_to_save=["classifier"])
        adapted = disturb(peft.get_peft_model(copy.deepcopy(base), config, adapter_name)).eval()
        adapted.save_pretrained(tmp_path)
        expected = adapted(x)
    folder = tmp_path if adapter_name == "default" else tmp_path / adapter_name
    assert f"base_model.model.classifier.modules_to_save.{adapter_name}.2.bias" in load_file(folder / WEIGHTS)
    torch.testing.assert_close(minipeft.load_adapter(copy.deepcopy(base), folder)(x), expected)
    base.classifier[2].bias.data += 1
    with pytest.raises(
        minipeft.CheckpointError, match=r"brings its own 'base_model.model.classifier.original_module.2"
    ):
        minipeft.load_adapter(base, folder)


def test_an_entry_of_a_peft_file_takes_every_module_whose_name_ends_with_it(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["head"], task_type="CAUSAL_LM")
    with foreign_code():
        expected = written(tmp_path / "theirs", config, gpt2)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "theirs" / WEIGHTS)
    model = minipeft.load_adapter(gpt2(), tmp_path / "theirs")
    same(logits(model), expected)
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["modules_to_save"] == ["lm_head"]
    same(their_logits(tmp_path / "ours", gpt2), expected)
    same(logits(minipeft.load_adapter(gpt2(), tmp_path / "ours")), expected)


def test_our_entries_name_the_same_modules_to_peft(tmp_path):
    """In PEFT 'head' would take 'ahead' along; '0.head' does not."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.ahead, self.down = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.ahead(self.down(self.head(x)))

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(Block(), Block())

    config = minipeft.LoraConfig(r=2, target_modules=["down"], modules_to_save=["head"])
    adapted = disturb(minipeft.get_lora_model(model(), config)).eval()
    adapted.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["0.head", "1.head"]
    x = torch.randn(3, 8)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(model(), tmp_path).eval()
    same(theirs(x), adapted(x))
    assert sorted(n for n, m in theirs.named_modules() if n.endswith("modules_to_save")) == [
        "base_model.model.0.head.modules_to_save",
        "base_model.model.1.head.modules_to_save",
    ]


def test_the_class_of_a_model_without_a_task_is_written(tmp_path):
    with foreign_code():
        base = gpt2()
        base.save_pretrained(tmp_path / "base")
        fresh = type(base).from_pretrained(tmp_path / "base")
    model = disturb(minipeft.get_lora_model(fresh, minipeft.LoraConfig(r=4))).eval()
    model.save_pretrained(tmp_path / "ours")
    mapping = json.loads((tmp_path / "ours" / CONFIG).read_text())["auto_mapping"]
    assert mapping == {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    with foreign_code():
        auto = peft.AutoPeftModel.from_pretrained(tmp_path / "ours").eval()
    same(logits(auto), logits(model))
    edited(tmp_path / "ours", auto_mapping={"base_model_class": "Other", "parent_library": "somewhere"})
    again = minipeft.load_adapter(gpt2(), tmp_path / "ours")
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["auto_mapping"]["base_model_class"] == "Other"


def test_a_model_with_a_task_has_no_auto_mapping(tmp_path):
    model = minipeft.get_lora_model(gpt2_classifier(), minipeft.LoraConfig(r=4, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    assert "auto_mapping" not in json.loads((tmp_path / CONFIG).read_text())

"""A call that fails, or must not be made a second time, leaves the model as it was."""

from pathlib import Path

import pytest
import torch
from tiny_models import adapted, foreign_code, gpt2, logits, refuses, token_ids
from torch import nn
from transformers import GPT2LMHeadModel

from minipeft import (
    CheckpointError,
    ConfigError,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MinipeftError,
    StateError,
    TargetError,
    after_step,
    dequantize,
    estimate,
    extra_loss,
    get_lora_model,
    hotswap_adapter,
    lean,
    load_adapter,
    per_adapter_loss,
    quantize,
    register_targets,
    suggest,
    unlean,
)
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.methods.lora import Lora


def fails_at_call(monkeypatch, cls, method, number):
    original, calls = getattr(cls, method), []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == number:
            raise MemoryError("out of memory")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, method, failing)


@pytest.mark.parametrize("targets", [["c_attn", "ln_1"], ["ln_f", "c_attn"], ["c_attn", "drop"]])
def test_a_layer_that_cannot_be_adapted_leaves_the_others_alone(targets):
    model = gpt2()
    config = LoraConfig(target_modules=targets)
    refuses(TargetError, model, lambda: get_lora_model(model, config), "no LayerOps", "transformer.")
    assert type(model) is GPT2LMHeadModel
    assert type(get_lora_model(model, LoraConfig())).__name__ == "GPT2LMHeadModel"  # and it still can be


@pytest.mark.parametrize(("cls", "method"), [(Lora, "reset_parameters"), (AdaptedLayer, "__init__")])
def test_an_injection_that_breaks_off_leaves_nothing_behind(cls, method, monkeypatch):
    model = gpt2()
    config = LoraConfig(target_modules=["c_attn", "c_proj"], modules_to_save=["ln_f"])
    with monkeypatch.context() as patch:
        fails_at_call(patch, cls, method, 3)
        refuses(MemoryError, model, lambda: get_lora_model(model, config))
    assert type(model) is GPT2LMHeadModel
    assert torch.equal(logits(get_lora_model(model, config)), logits(gpt2()))


@pytest.mark.parametrize(("cls", "method"), [(Lora, "reset_parameters"), (AdaptedLayer, "__init__")])
def test_a_second_adapter_that_breaks_off_leaves_the_first_alone(cls, method, monkeypatch, tmp_path):
    model = adapted()
    expected = logits(model)
    config = LoraConfig(target_modules=["c_attn", "c_proj"])
    adapted(target_modules=["c_attn", "c_proj"]).save_pretrained(tmp_path)
    for action in (lambda: model.add_adapter("second", config), lambda: model.load_adapter(tmp_path, "second")):
        with monkeypatch.context() as patch:
            fails_at_call(patch, cls, method, 3)
            refuses(MemoryError, model, action)
    assert list(model.adapter_configs) == ["default"]
    assert torch.equal(logits(model), expected)


def test_adapting_an_adapted_model_again_is_refused():
    model = adapted()
    refuses(StateError, model, lambda: get_lora_model(model, LoraConfig()), "add_adapter")
    refuses(StateError, model, lambda: get_lora_model(model, LoraConfig(), "second"), "add_adapter")
    unloaded = model.unload()
    assert torch.equal(logits(get_lora_model(unloaded, LoraConfig())), logits(gpt2()))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_model_that_peft_has_wrapped_is_refused(task_type):
    with foreign_code():
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(gpt2(), peft.LoraConfig(task_type=task_type))
    config = LoraConfig(target_modules="all-linear")
    refuses(StateError, wrapped, lambda: get_lora_model(wrapped, config), "PeftModel")


def test_the_layers_within_a_layer_that_peft_has_adapted_are_no_targets():
    """Its lora_A and lora_B are linear layers too."""
    model = gpt2()
    with foreign_code():
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["c_attn"]), model)
    config = LoraConfig(target_modules="all-linear")
    refuses(TargetError, model, lambda: get_lora_model(model, config), "transformer.h.0.attn.c_attn")


def test_a_model_with_an_adapted_part_is_refused():
    """Its file would hold the part's adapters as well, which its configuration does not name."""
    outer = nn.ModuleDict({"body": adapted(), "head": nn.Linear(4, 4)})
    config = LoraConfig(r=2, target_modules=["head"])
    refuses(StateError, outer, lambda: get_lora_model(outer, config), "body.transformer", "adapted already")
    body = nn.ModuleDict({"body": gpt2()})
    get_lora_model(body, LoraConfig(r=2, target_modules=["c_attn"]))
    refuses(StateError, body, lambda: get_lora_model(body["body"], config), "transformer.h.0.attn", "adapted already")


@pytest.mark.parametrize("first", [{"bias": "all"}, {"modules_to_save": ["mlp.c_fc"]}])
def test_a_module_of_which_another_adapter_trains_a_part_is_not_trained_as_a_whole(first):
    """Its copy would hold the other adapter's, and its file too."""
    model = adapted(r=2, target_modules=["c_attn"], **first)
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["mlp"])
    refuses(TargetError, model, lambda: model.add_adapter("b", config), "transformer.h.0.mlp", "trains a part of it")


@pytest.mark.parametrize("targets", ["c_attn", "h.0.mlp.c_fc"])  # some of the layers, or all
def test_a_file_that_adapts_layers_in_a_module_that_another_adapter_trains_in_full_is_refused_for_that(
    targets, tmp_path
):
    adapted(r=2, target_modules=[targets]).save_pretrained(tmp_path)
    model = adapted(r=2, target_modules=["h.1.attn.c_attn"], modules_to_save=["h.0"], adapter_name="a")
    reason = "transformer.h.0", "another adapter trains it in full"
    refuses(TargetError, model, lambda: model.load_adapter(tmp_path, "b"), *reason)
    model.save_pretrained(tmp_path / "both")
    model.load_adapter(tmp_path / "both" / "a", "c")  # which trains that module, too


NO_NAMES = (
    5,
    True,
    None,
    0.5,
    torch.tensor(1),
    Path("default"),
    b"default",
    "",
    object(),
    [["default"]],
    [None],
    {5: 1},
)


@pytest.mark.parametrize(
    "verb", ["set_adapter", "delete_adapter", "merge_adapter", "train_adapters", "saves", "activates"]
)
def test_what_is_no_name_is_one_error_that_lists_the_names(verb, tmp_path):
    model = adapted()
    model.add_adapter("b", LoraConfig(r=2))
    verbs = {
        "saves": lambda names: model.save_pretrained(tmp_path, selected_adapters=names),
        "activates": lambda names: model.delete_adapter("default", activate=names),
    }
    act = verbs.get(verb) or getattr(model, verb)
    for names in NO_NAMES:
        if names is None and verb in ("merge_adapter", "saves", "activates"):
            continue  # nothing is said
        refuses(StateError, model, lambda names=names: act(names), "no adapter", "there are: 'default', 'b'")
    assert list(tmp_path.iterdir()) == []
    assert model.active_adapters == ["default"]
    assert list(model.adapter_configs) == ["default", "b"]


def test_a_string_is_one_name_and_a_set_has_an_order():
    model = adapted()
    for name in ("a", "b", "ab"):
        model.add_adapter(name, LoraConfig(r=2))
    model.merge_adapter("ab")
    assert [row.adapter for row in model.adapter_status() if row.merged] == ["ab"]
    model.unmerge_adapter()
    model.set_adapter({"b", "default", "ab"})
    assert model.active_adapters == ["ab", "b", "default"]
    model.set_adapter(name for name in ("b", "a"))
    assert model.active_adapters == ["b", "a"]


@pytest.mark.parametrize("name", ["", 0, False])
def test_an_empty_name_does_not_stand_for_the_adapter_that_is_there(name):
    model = adapted()
    for verb in (model.adapter_state_dict, model.get_adapter_state_dict):
        refuses(StateError, model, lambda verb=verb: verb(name), "no adapter")


FLAGS = {
    "get_lora_model": (lambda m, d, **o: get_lora_model(gpt2(), **o), ["autocast_adapter_dtype"]),
    "add_adapter": (lambda m, d, **o: m.add_adapter("n", LoraConfig(), **o), ["autocast_adapter_dtype"]),
    "load_adapter": (lambda m, d, **o: m.load_adapter(d, "n", **o), ["is_trainable", "strict", "allow_base_mismatch"]),
    "hotswap_adapter": (lambda m, d, **o: m.hotswap_adapter(d, **o), ["allow_base_mismatch"]),
    "merge_adapter": (lambda m, d, **o: m.merge_adapter(**o), ["untie", "dequantize"]),
    "merge_and_unload": (lambda m, d, **o: m.merge_and_unload(**o), ["progressbar", "untie", "dequantize"]),
    "save_pretrained": (lambda m, d, **o: m.save_pretrained(d, **o), ["is_main_process", "convert_to_lora"]),
}


@pytest.mark.parametrize("verb", FLAGS)
def test_a_switch_is_true_or_false_and_nothing_that_counts_as_one(verb, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    act, options = FLAGS[verb]
    for option in options:
        for value in ("false", 1, None, torch.ones(2)):
            action = lambda option=option, value=value: act(model, tmp_path, **{option: value})  # noqa: E731
            refuses(ConfigError, model, action, f"{option} must be True or False")
    assert list(model.adapter_configs) == ["default"]


def test_a_state_that_is_not_the_model_s_is_not_saved(tmp_path):
    model = adapted()
    state = model.state_dict()
    key = next(key for key in state if "lora_A" in key)
    for wrong in (5, "state", [*state], {5: state[key]}, {**state, key: state[key].tolist()}):
        refuses(ConfigError, model, lambda wrong=wrong: model.save_pretrained(tmp_path, state_dict=wrong), "state_dict")
    wrong = {**state, key: state[key][:1]}
    refuses(CheckpointError, model, lambda: model.save_pretrained(tmp_path, state_dict=wrong), "has the shape [1,", key)
    refuses(ConfigError, model, lambda: model.create_or_update_model_card(5), "output_dir must be the path")
    assert list(tmp_path.iterdir()) == []


TEXT = "openai-community/gpt2"  # a model's name in the place of the model, and a word in the place of anything else
OF_ANOTHER_TYPE = {
    "quantize": lambda m: quantize(TEXT),
    "quantize, kind": lambda m: quantize(gpt2(), ["nf4"]),
    "dequantize": lambda m: dequantize(TEXT),
    "lean, checkpointing": lambda m: lean(m, checkpointing=["block"]),
    "lean, chunked_loss": lambda m: lean(m, chunked_loss="no"),
    "unlean": lambda m: unlean(TEXT),
    "after_step": lambda m: after_step(TEXT, 0),
    "after_step, step": lambda m: after_step(m, "0"),
    "after_step, step below 0": lambda m: after_step(m, -1),
    "extra_loss": lambda m: extra_loss(None),
    "per_adapter_loss": lambda m: per_adapter_loss(m(token_ids(2)), token_ids(2), ["default"] * 2),
    "per_adapter_loss, labels": lambda m: per_adapter_loss(torch.randn(2, 3, 5), [[1, 2, 3]] * 2, ["default"] * 2),
    "per_adapter_loss, names": lambda m: per_adapter_loss(torch.randn(2, 3, 5), torch.ones(2, 3).long(), None),
    "estimate, dtype": lambda m: estimate(m.config, dtype=["float32"]),
    "estimate, quantize": lambda m: estimate(m.config, quantize=["nf4"]),
    "suggest, text": lambda m: suggest(m.config, text=5),
    "suggest, length": lambda m: suggest(m.config, length=None),
    "register_targets": lambda m: register_targets("unheard_of", [5]),
    "LoHaConfig": lambda m: LoHaConfig(rank_pattern=0),
    "LoraConfig": lambda m: LoraConfig(target_parameters=0),
    "LoKrConfig": lambda m: LoKrConfig(decompose_factor=-1.0),
}


@pytest.mark.parametrize("call", OF_ANOTHER_TYPE)
def test_an_argument_of_another_type_is_one_error(call):
    model = adapted()
    refuses(MinipeftError, model, lambda: OF_ANOTHER_TYPE[call](model))


def test_peft_s_options_of_loading_and_merging_are_taken_where_they_ask_for_nothing(tmp_path):
    model = adapted(init_lora_weights=False)
    model.save_pretrained(tmp_path)
    options = {"torch_device": "cpu", "low_cpu_mem_usage": True, "autocast_adapter_dtype": True, "config": None}
    options |= {"device_map": "".join("auto"), "torch_dtype": None, "hotswap": False}
    options |= {"ephemeral_gpu_offload": False, "ignore_mismatched_sizes": False}
    options |= {"use_safetensors": True, "use_auth_token": True}
    model.load_adapter(tmp_path, "b", **options)
    expected = logits(model)
    assert torch.equal(logits(load_adapter(gpt2(), tmp_path, **options)), expected)
    hotswap_adapter(model, tmp_path, "b", **options)
    model.set_adapter("b")
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(False, True, ["b"])), expected)


LOADING = {
    "an unknown option": ({"revison": "main"}, "no option 'revison' (closest: 'revision')"),
    "half precision": ({"autocast_adapter_dtype": False}, "autocast_adapter_dtype=False is not possible"),
    "other shapes": ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes=True is not possible"),
    "no device": ({"torch_device": 5}, "torch_device=5 is not possible"),
    "a device for the base": ({"device_map": "cpu"}, "device_map='cpu' is not possible; an adapter is"),
    "a dtype for the base": ({"torch_dtype": torch.float16}, "not possible; load the base in that dtype"),
    "a pickle": ({"use_safetensors": False}, "`minipeft convert DIR` makes safetensors of it"),
    "a configuration": ({"config": LoraConfig()}, "the configuration is read from the directory"),
    "a swap": ({"hotswap": True}, "hotswap_adapter() does that"),
    "no place": ({"directory": None}, "directory must be the path of a directory, not None"),
}


@pytest.mark.parametrize("case", LOADING)
def test_an_option_of_loading_that_is_not_done_is_refused_by_name(case, tmp_path):
    options, said = LOADING[case]
    model = adapted()
    model.save_pretrained(tmp_path)
    given = {"directory": tmp_path, "adapter_name": "b"} | options
    refuses(ConfigError, model, lambda: model.load_adapter(**given), said, "Nothing was changed.")
    refuses(ConfigError, model, lambda: load_adapter(model, **given), said, "Nothing was changed.")
    if "directory" not in options:
        given = {"directory": tmp_path} | options
        refuses(ConfigError, model, lambda: hotswap_adapter(model, **given), said, "Nothing was changed.")
    assert list(model.adapter_configs) == ["default"]


def test_a_scale_that_is_no_number_is_named_in_a_plain_sentence():
    model = adapted()
    refuses(ConfigError, model, lambda: model.set_scale("default", "1"), "scale must be a finite number, not '1'.")

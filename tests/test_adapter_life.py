"""Names, strength, status and end of adapters: `rename_adapter`, `set_scale`, `adapter_status`, `delete_adapter`."""

import copy
import json
import math
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import adapted, disturb, foreign_code, gpt2, llama, logits, refuses, state_digest, trainable

import minipeft
from minipeft import ConfigError, LoraConfig, StateError, TargetError, get_adapter_model, get_lora_model, load_adapter
from minipeft.integrations.peft import as_peft_model

with foreign_code():
    import peft

EVERYTHING = {"modules_to_save": ["ln_f"], "trainable_token_indices": [3, 5], "bias": "lora_only"}


def three():
    """The adapters "a", which acts, with all kinds of parts; "b", which waits; and "c" on other layers."""
    model = adapted(adapter_name="a", r=2, **EVERYTHING)
    model.add_adapter("b", LoraConfig(r=3, init_lora_weights=False))
    model.add_adapter("c", LoraConfig(r=2, target_modules=["c_fc"], init_lora_weights=False))
    return model


def everything_said(model):
    """All names that the state of a model and its modules hold."""
    state = {**vars(model._state), **vars(model._state.switch)}
    del state["switch"], state["changing"]
    state = {key: sorted(value) if isinstance(value, set) else value for key, value in state.items()}
    paths = {id(module): path for path, module in model.named_modules()}
    for table in ("places", "resting"):
        state[table] = {n: sorted((paths[id(m)], key) for m, key in places) for n, places in state[table].items()}
    state["buffers"] = list(state["buffers"])
    wrapped = [(w.merged, sorted(w.tied_adapters)) for w in model.modules() if hasattr(w, "tied_adapters")]
    return repr((state, wrapped, list(model.state_dict())))


def test_a_renamed_adapter_is_the_same_in_its_place_everywhere():
    model = three()
    expected, flags = logits(model), trainable(model)
    model.set_adapter(["a", "b"])
    both = logits(model)
    model.rename_adapter("a", "zebra")
    assert (list(model.adapter_configs), model.active_adapters) == (["zebra", "b", "c"], ["zebra", "b"])
    assert torch.equal(logits(model), both)
    model.set_adapter("zebra")
    assert torch.equal(logits(model), expected)
    assert [name.replace(".zebra.", ".a.") for name in trainable(model)] == flags
    model.set_adapter("b")
    model.set_adapter("zebra")
    assert [name.replace(".zebra.", ".a.") for name in trainable(model)] == flags
    assert "'a'" not in everything_said(model)
    assert ".a." not in everything_said(model)
    fresh = three()
    fresh.rename_adapter("a", "zebra")
    fresh.rename_adapter("zebra", "a")
    assert everything_said(fresh) == everything_said(three())


def test_two_adapters_can_change_names():
    model = three()
    a = logits(model)
    model.set_adapter("b")
    b = logits(model)
    for old, new in (("a", "other"), ("b", "a"), ("other", "b")):
        model.rename_adapter(old, new)
    assert torch.equal(logits(model), b)
    assert model.active_adapters == ["a"]
    model.set_adapter("b")
    assert torch.equal(logits(model), a)


def test_a_renamed_adapter_saves_and_loads_and_its_optimizer_goes_on(tmp_path):
    model = three().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.rename_adapter("a", "new")
    ids = torch.arange(8)[None]
    before = logits(model)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), before)
    model.save_pretrained(tmp_path, "new")
    again = load_adapter(gpt2(), tmp_path / "new", "first")
    again.rename_adapter("first", "second")
    assert torch.equal(logits(again), logits(model.eval()))
    clone = pickle.loads(pickle.dumps(again))
    clone.rename_adapter("second", "third")
    assert again.active_adapters == ["second"]
    assert torch.equal(logits(clone), logits(again))


def test_a_merged_adapter_is_renamed_and_comes_out_again():
    model = adapted(adapter_name="a")
    base, expected = logits(gpt2()), logits(model)
    model.merge_adapter()
    merged = logits(model)
    model.rename_adapter("a", "b")
    assert torch.equal(logits(model), merged)
    with model.disable_adapter():
        model.rename_adapter("b", "c")  # while it is set aside
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), base)


TIED = [{"target_modules": ["wte"], "ensure_weight_tying": True}, {"trainable_token_indices": [1, 2]}]


@pytest.mark.parametrize("options", TIED, ids=["one adapter on both", "rows of tokens"])
def test_tied_layers_follow_a_rename(options):
    model = adapted(adapter_name="a", r=2, **options)
    expected, keys, flags = logits(model), list(model.adapter_state_dict()), trainable(model)
    model.rename_adapter("a", "b")
    assert torch.equal(logits(model), expected)
    assert list(model.adapter_state_dict()) == keys
    assert trainable(model) == [name.replace(".a.", ".b.") for name in flags]


@pytest.mark.parametrize(
    ("old", "new", "error", "said"),
    [
        ("d", "e", StateError, "no adapter 'd'"),
        (["a"], "e", StateError, r"no adapter ['a']"),
        ("a", "b", StateError, "there is an adapter 'b' already"),
        ("a", "x/y", ConfigError, "not allowed"),
        ("a", "keys", ConfigError, "not allowed"),
        ("a", 3, ConfigError, "not allowed"),
    ],
)
def test_a_wrong_name_changes_nothing(old, new, error, said):
    model = three()
    before = everything_said(model)
    refuses(error, model, lambda: model.rename_adapter(old, new), said, "Nothing was changed.")
    assert everything_said(model) == before


@pytest.mark.parametrize("last", range(4))
def test_ctrl_c_while_renaming_leaves_every_name_as_it_was(last, monkeypatch):
    from minipeft.injection import state, wrapper

    model, calls = three(), []
    expected, before, real = logits(model), everything_said(model), wrapper.replace_key

    def failing(*args):
        real(*args)
        calls.append(args)
        if len(calls) == 1 + 3 * last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state, "replace_key", failing)
        patch.setattr(wrapper, "replace_key", failing)
        with pytest.raises(KeyboardInterrupt):
            model.rename_adapter("a", "zebra")
    assert everything_said(model) == before
    assert torch.equal(logits(model), expected)


def test_the_peft_bridge_follows_a_rename():
    model = adapted(adapter_name="a")
    bridge = as_peft_model(model)
    config = bridge.peft_config["a"]
    model.rename_adapter("a", "b")
    assert (list(bridge.peft_config), bridge.active_adapters) == (["b"], ["b"])
    bridge.add_adapter("ref", config)  # with a configuration from before, still an exact copy
    expected = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


METHODS = {
    "lora": ("LoraConfig", {"r": 3, "use_rslora": True, "init_lora_weights": False}),
    "pissa": ("LoraConfig", {"r": 3, "init_lora_weights": "pissa"}),
    "loha": ("LoHaConfig", {"r": 2, "init_weights": False}),
    "lokr": ("LoKrConfig", {"r": 2, "init_weights": False}),
    "vera": ("VeraConfig", {"r": 6, "init_weights": False}),
    "adalora": ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 9, "init_lora_weights": False}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_multiplies_the_update_and_one_brings_every_bit_back(method):
    config, options = METHODS[method]
    targets = ["q_proj", "down_proj"]
    # In float64, since AdaLoRA's start makes a model here that multiplies its roundings.
    model = get_adapter_model(llama().double(), getattr(minipeft, config)(target_modules=targets, **options))
    disturb(model, scale=0.05)
    layers = [m for m in model.modules() if hasattr(m, "tied_adapters")]
    full, expected = [layer.adapter("default").delta(layer.base_layer.weight) for layer in layers], logits(model)
    model.set_scale("default", -0.3)
    for layer, whole in zip(layers, full, strict=True):
        torch.testing.assert_close(layer.adapter("default").delta(layer.base_layer.weight), -0.3 * whole)
    scaled = logits(model)
    assert not torch.allclose(scaled, expected)
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), scaled, atol=1e-5, rtol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), scaled, atol=1e-5, rtol=1e-4)
    refuses(StateError, model, lambda: model.set_scale("default", 1), "is merged into the base")
    model.unmerge_adapter()
    assert torch.equal(logits(model), scaled)
    model.set_scale("default", 0)
    torch.testing.assert_close(logits(model), logits(llama().double()), atol=1e-6, rtol=1e-5)
    model.set_scale("default", 1)
    assert torch.equal(logits(model), expected)


def test_a_scale_by_pattern_is_what_peft_layers_are_told(tmp_path):
    model = adapted(r=4, target_modules=["c_attn", "c_proj", "wte"])
    model.save_pretrained(tmp_path)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path)
    model.set_scale("default", 0.5)
    model.set_scale("default", 2.0, r"h\.1\..*")
    model.set_scale("default", 0.0, "c_attn")
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.0 if name.endswith("c_attn") else 2.0 if ".h.1." in name else 0.5)
    with foreign_code():
        torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    scales = {row.layer: row.scale for row in model.layer_status()}
    assert scales["transformer.wte"] == 0.5
    assert scales["transformer.h.1.mlp.c_proj"] == 2.0
    assert scales["transformer.h.1.attn.c_attn"] == 0.0
    assert model.adapter_status()[0].scale == "0-2"
    model.set_scale("default", 1.0)
    assert torch.equal(logits(model), logits(load_adapter(gpt2(), tmp_path)))


def test_a_trained_bias_is_scaled_with_the_update():
    model = adapted(r=2, target_modules=["c_attn", "c_fc"], bias="lora_only").double()
    full = model.state_dict()
    model.set_scale("default", -0.5)
    scaled = logits(model)
    expected = gpt2().double()
    with torch.no_grad():
        for path, layer in expected.named_modules():
            if path.endswith(("c_attn", "c_fc")):
                A, B = (full[f"{path}.adapters.default.lora_{side}"] for side in "AB")
                layer.weight -= 0.5 * 4 * (B @ A).T  # alpha 8, rank 2
                layer.bias -= 0.5 * (full[f"{path}.adapters.default.lora_bias"] - layer.bias)
    torch.testing.assert_close(scaled, logits(expected))
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), scaled)
    model.set_scale("default", 0)
    assert torch.equal(logits(model), logits(gpt2().double()))


def test_layers_tied_to_a_scaled_one_follow():
    options = {"r": 2, "target_modules": ["wte"], "ensure_weight_tying": True, "init_lora_weights": False}
    model = get_lora_model(gpt2(), LoraConfig(**options))
    model.set_scale("default", 0.25, "wte")
    half = get_lora_model(gpt2(), LoraConfig(**{**options, "lora_alpha": 2}))
    half.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(model), logits(half))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("LoraConfig", {"r": 2, "use_dora": True}),
        ("OFTConfig", {"oft_block_size": 8}),
        ("IA3Config", {"feedforward_modules": []}),
    ],
)
def test_an_effect_that_is_no_number_times_an_update_has_no_scale(config, options):
    model = get_adapter_model(gpt2(), getattr(minipeft, config)(target_modules=["c_attn"], **options))
    refuses(StateError, model, lambda: model.set_scale("default", 0.5), "h.0.attn.c_attn", "has no scale")


@pytest.mark.parametrize(
    ("args", "error", "said"),
    [
        (("b", 0.5), StateError, "no adapter 'b'"),
        (("default", math.nan), ConfigError, "scale must be a finite number"),
        (("default", "1"), ConfigError, "scale must be a finite number"),
        (("default", True), ConfigError, "scale must be a finite number"),
        (("default", 0.5, "h.0"), TargetError, "'h.0.*' is all that is inside"),
        (("default", 0.5, "c_atn"), TargetError, "matches none of the 2 layers"),
        (("default", 0.5, "("), ConfigError, "not a valid regular expression"),
        (("default", 0.5, ""), ConfigError, "pattern must be"),
    ],
)
def test_a_wrong_scale_changes_nothing(args, error, said):
    model = adapted()
    expected = logits(model)
    refuses(error, model, lambda: model.set_scale(*args), said, "Nothing was changed.")
    assert torch.equal(logits(model), expected)
    assert model.adapter_status()[0].scale == "1"


def test_what_is_trained_in_full_keeps_its_strength_and_that_is_said():
    model = adapted(r=2, modules_to_save=["ln_f"])
    with pytest.warns(UserWarning, match=r"'transformer.ln_f' by values and not by an update"):
        model.set_scale("default", 0.0)
    with model.disable_adapter():
        base = logits(model)
    assert not torch.allclose(logits(model), base)


def test_a_file_holds_the_adapter_at_full_strength_or_as_it_acts(tmp_path):
    model = adapted(r=4)
    full = logits(model)
    model.set_scale("default", 0.5)
    scaled = logits(model)
    with pytest.warns(UserWarning, match=r"act with 0.5 of its update.*convert_to_lora=True"):
        model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits(load_adapter(gpt2(), tmp_path / "full")), full)
    model.save_pretrained(tmp_path / "scaled", convert_to_lora=True)
    again = load_adapter(gpt2(), tmp_path / "scaled")
    torch.testing.assert_close(logits(again), scaled)
    assert again.adapter_status()[0].scale == "1"
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "scaled")
        torch.testing.assert_close(logits(theirs), scaled, atol=1e-5, rtol=1e-5)
    model.set_scale("default", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "again")
    sides = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("full", "again")]
    assert all(torch.equal(sides[0][key], sides[1][key]) for key in sides[0] | sides[1])
    assert json.loads((tmp_path / "full/adapter_config.json").read_text())["lora_alpha"] == 8


def test_a_scale_is_copied_pickled_and_trained_with():
    model = adapted(r=2)
    model.set_scale("default", 0.5)
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        twin.set_scale("default", 1)
    assert torch.equal(logits(model), expected)
    ids = torch.arange(8)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    halved = adapted(r=2, lora_alpha=4).train()  # the same with the half in its alpha
    halved(input_ids=ids, labels=ids).loss.backward()
    for (name, own), (_, other) in zip(model.named_parameters(), halved.named_parameters(), strict=True):
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, msg=name)


def test_the_status_says_what_peft_says():
    model = three()
    model.set_adapter(["a", "b"])
    with foreign_code():
        theirs = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2), "a")
        theirs.add_adapter("b", peft.LoraConfig(r=3))
        theirs.base_model.set_adapter(["a", "b"])
        said = {status.name: status for status in theirs.get_layer_status()}
    rows = [row for row in model.layer_status() if row.adapter in "ab" and row.method == "lora"]
    assert {f"model.{row.layer}" for row in rows} == set(said)
    for row in rows:
        other = said[f"model.{row.layer}"]
        assert row.adapter in other.available_adapters
        assert row.active == (row.adapter in other.active_adapters)
        assert row.merged == (row.adapter in other.merged_adapters)
        assert row.trainable == other.requires_grad[row.adapter]
        assert [row.device] == other.devices[row.adapter]


def test_the_status_can_be_read_by_programs_and_people():
    model = three()
    model.set_adapter("b")
    model.merge_adapter()
    status = {row.adapter: row for row in model.adapter_status()}
    a, b, c = (status[name] for name in "abc")
    assert set(a.method.split(", ")) == {"lora", "trainable_tokens", "full"}
    assert (a.rank, a.active, a.merged, a.trainable) == ("2", False, False, True)
    assert (b.rank, b.active, b.merged, b.layers) == ("3", True, True, 2)
    assert (c.active, c.merged, c.layers, c.dtype, c.device) == (False, False, 2, "float32", "cpu")
    for name in "abc":
        assert status[name].parameters == sum(tensor.numel() for tensor in model.adapter_state_dict(name).values())
    lines = str(model.adapter_status()).splitlines()
    assert lines[0].split()[:3] == ["adapter", "method", "rank"]
    assert [line.split()[0] for line in lines[1:]] == ["a", "b", "c"]
    assert len(str(model.layer_status()).splitlines()) == 1 + len(model.layer_status())
    model.unmerge_adapter()
    with model.disable_adapter():
        assert "disabled" in str(model.adapter_status())
        assert model.adapter_status().enabled is False
    frozen = next(iter(model.transformer.h[0].attn.c_attn.adapter("b").parameters())).requires_grad_(False)
    assert frozen.requires_grad is False
    assert {row.adapter: row.trainable for row in model.adapter_status()}["b"] is None


def test_the_active_one_leaves_when_it_is_said_what_acts_instead():
    model = three()
    model.set_adapter("b")
    b = logits(model)
    model.set_adapter("a")
    refuses(
        StateError,
        model,
        lambda: model.delete_adapter("a"),
        "'a' is in use, and no other one is active",
        "delete_adapter('a', activate='b')",
    )
    refuses(StateError, model, lambda: model.delete_adapter("a", activate="d"), "no adapter 'd'")
    refuses(StateError, model, lambda: model.delete_adapter("a", activate="a"), "'a' is to be deleted")
    refuses(StateError, model, lambda: model.delete_adapter(["a", "b", "c"]), "call unload()")
    model.delete_adapter("a", activate="b")
    assert (list(model.adapter_configs), model.active_adapters) == (["b", "c"], ["b"])
    assert torch.equal(logits(model), b)
    assert {name.split(".")[-2] for name in trainable(model)} == {"b"}


def test_one_of_several_active_ones_leaves_as_in_peft(tmp_path):
    model = adapted(adapter_name="a", r=2)
    model.add_adapter("b", LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "a", "a")
        theirs.load_adapter(tmp_path / "b", "b")
        theirs.base_model.set_adapter(["a", "b"])
        theirs.delete_adapter("a")
    model.set_adapter(["a", "b"])
    model.delete_adapter("a")
    assert model.active_adapters == theirs.active_adapters == ["b"]
    with foreign_code():
        torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)


def test_a_delete_that_breaks_off_leaves_all_of_them(monkeypatch):
    from minipeft.injection import attach

    model, gone = three(), []
    expected, before, said, real = logits(model), state_digest(model), everything_said(model), attach.discard

    def failing(*args):
        real(*args)
        gone.append(args)
        if len(gone) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attach, "discard", failing)
        with pytest.raises(KeyboardInterrupt):
            model.delete_adapter(["a", "b"], activate="c")
    assert (state_digest(model), everything_said(model)) == (before, said)
    assert torch.equal(logits(model), expected)

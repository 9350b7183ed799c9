"""The registry: resolution, contracts held at registration, and plugins."""

import importlib.metadata
import pickle
import sys
import types

import pytest
import torch
from tiny_models import gpt2
from torch import nn

import minipeft
from minipeft import Adapter, LoraConfig, RegistryError, get_lora_model
from minipeft.config.adapter_config import config_from_dict
from minipeft.layers.base import layer_ops
from minipeft.layers.linear import LinearOps
from minipeft.methods.lora import Lora
from minipeft.registry import registry


@pytest.fixture(autouse=True)
def isolated():
    """What a test registers is gone after it."""
    with registry.isolated():
        yield


class Special(nn.Linear):
    """A subclass of a registered type."""


class SpecialOps(LinearOps):
    """Ops of its own for that subclass."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Special(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.first(x))


def test_a_subclass_is_served_by_its_base_until_it_has_ops_of_its_own():
    assert layer_ops(Special(2, 2)) == LinearOps()
    registry.register_layer(Special)(SpecialOps)
    assert layer_ops(Special(2, 2)) == SpecialOps()
    assert layer_ops(nn.Linear(2, 2)) == LinearOps()


def test_the_most_derived_type_wins_in_either_order_of_registration():
    with registry.isolated(empty=True):
        registry.register_layer(Special)(SpecialOps)
        registry.register_layer(nn.Linear)(LinearOps)
        assert layer_ops(Special(2, 2)) == SpecialOps()
        assert layer_ops(nn.Linear(2, 2)) == LinearOps()


def test_a_dotted_name_may_be_an_alias_of_where_the_class_is_defined():
    with registry.isolated(empty=True):
        registry.register_layer("torch.nn.Linear")(LinearOps)
        assert layer_ops(nn.Linear(2, 2)) == LinearOps()


def register_and_fail():
    with registry.isolated():
        registry.register_method("short_lived")(Lora)
        registry.register_layer(Special)(SpecialOps)
        assert "short_lived" in registry.method_names()
        raise ZeroDivisionError


def test_what_is_registered_in_isolation_is_gone_afterwards_also_after_an_error():
    known = registry.method_names(), registry.layers()
    with pytest.raises(ZeroDivisionError):
        register_and_fail()
    assert (registry.method_names(), registry.layers()) == known
    with registry.isolated(empty=True):
        assert (registry.method_names(), registry.layers()) == ([], {})
    assert (registry.method_names(), registry.layers()) == known


def test_a_dotted_name_waits_for_a_package_that_is_not_there():
    registry.register_layer("no_such_package.layers.Exotic")(SpecialOps)
    assert layer_ops(nn.Linear(2, 2)) == LinearOps()
    module = types.ModuleType("no_such_package.layers")
    module.Exotic = type("Exotic", (nn.Linear,), {"__module__": "no_such_package.layers"})
    assert layer_ops(module.Exotic(2, 2)) == SpecialOps()


def test_a_second_class_for_the_same_place_is_refused_and_the_first_stays():
    with pytest.raises(RegistryError, match="already registered to minipeft.layers.linear.LinearOps"):
        registry.register_layer(nn.Linear)(SpecialOps)
    assert layer_ops(nn.Linear(2, 2)) == LinearOps()


def test_registering_the_same_class_again_is_a_reload_not_an_error():
    reloaded = type("LinearOps", (LinearOps,), {"__module__": LinearOps.__module__, "__qualname__": "LinearOps"})
    registry.register_layer(nn.Linear)(reloaded)
    assert layer_ops(nn.Linear(2, 2)) == reloaded()


def test_the_decorator_returns_its_argument():
    assert registry.register_layer(Special)(SpecialOps) is SpecialOps


def test_what_does_not_derive_from_the_contract_is_refused():
    with pytest.raises(RegistryError, match="does not derive from minipeft.LayerOps"):
        registry.register_layer(Special)(type("Loose", (), {}))
    with pytest.raises(RegistryError, match="does not derive from minipeft.Adapter"):
        registry.register_method("loose")(nn.Linear)


def test_an_incomplete_class_is_refused_by_the_name_of_what_it_lacks():
    incomplete = type("Half", (minipeft.LayerOps,), {"shape": staticmethod(lambda base: (1, 1))})
    with pytest.raises(RegistryError, match="Half lacks 'read_weight', 'write_weight' of the LayerOps contract"):
        registry.register_layer(Special)(incomplete)


def test_a_method_with_other_parameters_than_the_contract_is_refused():
    wrong = type("Wrong", (LinearOps,), {"project_in": lambda self, layer, x, A: x})
    with pytest.raises(
        RegistryError, match=r"Wrong.project_in\(self, layer, x, A\) does not fit .*project_in\(self, base, x, A\)"
    ):
        registry.register_layer(Special)(wrong)


@pytest.mark.parametrize("name", ["Lora", "", "lo ra", 3, "1lora"])
def test_a_method_name_is_an_identifier(name):
    with pytest.raises(RegistryError, match="not a lower-case identifier"):
        registry.register_method(name)(Lora)


@pytest.mark.parametrize("layer", ["Linear", 3, "a.b c", None])
def test_a_layer_is_a_class_or_a_dotted_name(layer):
    with pytest.raises(RegistryError, match="neither a layer class nor a dotted name"):
        registry.register_layer(layer)(SpecialOps)


def test_an_unknown_method_is_answered_with_the_known_ones_and_the_nearest():
    with pytest.raises(RegistryError, match=r"no method 'lorra' \(closest: 'lora'\); registered: .*'lora'"):
        registry.method_class("lorra")


def test_conflicting_default_targets_are_refused():
    with pytest.raises(RegistryError, match="'gpt2' already has"):
        registry.register_targets("gpt2", ["c_proj"])
    registry.register_targets("gpt2", ["c_attn"])  # the same again is fine
    assert registry.default_targets()["gpt2"] == ("c_attn",)


def test_a_method_s_own_default_targets_go_before_the_general_ones():
    registry.register_targets("gpt2", ["c_fc"], method="loha")
    chosen = {
        cls.method: minipeft.get_adapter_model(gpt2(), cls()).adapter_configs["default"].target_modules
        for cls in (minipeft.LoHaConfig, minipeft.LoKrConfig)
    }
    assert chosen == {"loha": ("c_fc",), "lokr": None}  # None: the general ones
    named = minipeft.get_adapter_model(gpt2(), minipeft.LoHaConfig(target_modules=["c_proj"]))
    assert named.adapter_configs["default"].target_modules == ("c_proj",)
    with pytest.raises(RegistryError, match="'gpt2' already has"):
        registry.register_targets("gpt2", ["c_proj"], method="loha")


def test_a_method_without_options_gets_a_config_class():
    registry.register_method("noop_scale")(Scale)
    assert Scale.config_class(target_modules=["c_attn"]).to_dict()["peft_type"] == "NOOP_SCALE"
    assert pickle.loads(pickle.dumps(Scale.config_class())) == Scale.config_class()
    with pytest.raises(minipeft.ConfigError, match="ScaleConfig has no option 'r'"):
        Scale.config_class(r=3)


def test_a_method_that_cannot_be_merged_is_refused():
    with pytest.raises(RegistryError, match="lacks 'merge or delta or factors' of the Adapter contract"):
        registry.register_method("unmergeable")(Unmergeable)


class Unmergeable(minipeft.Adapter):
    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)

    def forward(self, base, ops, x, y):
        return y


class Scale(Unmergeable):
    def merge(self, weight, bias):
        return weight.clone(), bias


class Louder(Lora):
    """LoRA whose update counts twice: an override that shows."""

    def forward(self, base, ops, x, y):
        return y + 2 * (super().forward(base, ops, x, y) - y)


class Loudest(Louder):
    """Another override."""


def test_an_override_goes_by_pattern_then_by_layer_type_then_the_method_itself():
    registry.register_adapter("lora", layer=nn.Linear)(Louder)
    assert registry.adapter_class("lora", "h.0.first", Special) is Louder
    registry.register_adapter("lora", pattern="first")(Loudest)
    assert registry.adapter_class("lora", "h.0.first", Special) is Loudest
    assert registry.adapter_class("lora", "h.0.second", nn.Linear) is Louder
    assert registry.adapter_class("lora", "h.0.wte", nn.Embedding) is Lora


def test_an_override_is_what_an_injection_uses():
    registry.register_adapter("lora", pattern="second")(Louder)
    model = get_lora_model(Block(), LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    assert type(model.first.adapters["default"]) is Lora
    assert type(model.second.adapters["default"]) is Louder
    x = torch.randn(5, 6)
    lora = model.second.adapters["default"]
    expected = model.second.base_layer(x) + 2 * lora.scaling * x @ lora.lora_A.T @ lora.lora_B.T
    torch.testing.assert_close(model.second(x), expected)


@pytest.mark.parametrize("where", [{}, {"layer": nn.Linear, "pattern": "x"}])
def test_an_override_is_for_one_place(where):
    with pytest.raises(RegistryError, match="exactly one"):
        registry.register_adapter("lora", **where)(Louder)


PLUGINS = """
from minipeft import register_method
from minipeft.methods.lora import Lora, LoraConfig

class {name}Config(LoraConfig):
    method = "{method}"

@register_method("{method}")
class {name}(Lora):
    config_class = {name}Config
{tail}
"""


def plugin(folder, package, name, method, tail=""):
    """A distribution with one entry point, as an installed plugin package leaves it."""
    (folder / f"{package}.py").write_text(PLUGINS.format(name=name, method=method, tail=tail))
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[minipeft.plugins]\n{package} = {package}\n")


@pytest.fixture
def plugin_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches() if hasattr(importlib, "invalidate_caches") else None
    yield tmp_path
    for name in ("good_plugin", "bad_plugin"):
        sys.modules.pop(name, None)


def test_a_plugin_loads_at_the_first_injection_and_its_method_works(plugin_folder):
    plugin(plugin_folder, "good_plugin", "Good", "good")
    assert "good" not in registry.method_names()
    get_lora_model(Block(), LoraConfig(r=2, target_modules=["first"]))
    assert "good" in registry.method_names()
    config = sys.modules["good_plugin"].GoodConfig(r=2, target_modules=["first"])
    model = minipeft.get_adapter_model(Block(), config)
    assert type(model.first.adapters["default"]).__name__ == "Good"


def test_a_plugin_loads_when_a_file_asks_for_its_method(plugin_folder):
    plugin(plugin_folder, "good_plugin", "Good", "good")
    config = config_from_dict({**LoraConfig(r=2).to_dict(), "peft_type": "GOOD"})
    assert type(config) is sys.modules["good_plugin"].GoodConfig
    assert config.r == 2


def test_a_broken_plugin_is_named_and_takes_nothing_down(plugin_folder):
    plugin(plugin_folder, "bad_plugin", "Bad", "bad", tail="raise RuntimeError('half way through')")
    plugin(plugin_folder, "good_plugin", "Good", "good")
    with pytest.warns(UserWarning, match="plugin 'bad_plugin' .*half way through"):
        registry.load_plugins()
    assert "bad" not in registry.method_names()  # what it registered before it broke is taken back
    assert {"good", "lora"} <= set(registry.method_names())


def test_plugins_load_once_and_can_be_switched_off(plugin_folder, monkeypatch):
    plugin(plugin_folder, "good_plugin", "Good", "good")
    monkeypatch.setenv("MINIPEFT_DISABLE_PLUGINS", "1")
    registry.load_plugins()
    assert "good" not in registry.method_names()
    monkeypatch.delenv("MINIPEFT_DISABLE_PLUGINS")
    loaded = []
    entry_points = importlib.metadata.entry_points
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **kw: loaded.append(kw) or entry_points(**kw))
    registry.load_plugins()
    registry.load_plugins()
    assert len(loaded) == 1


def test_adapters_are_called_as_modules_so_that_hooks_fire():
    model = get_lora_model(Block(), LoraConfig(r=2, target_modules=["first"]))
    calls = []
    adapter = model.first.adapters["default"]
    assert isinstance(adapter, Adapter)
    adapter.register_forward_hook(lambda *args: calls.append(1))
    model(torch.randn(2, 4))
    assert calls == [1]

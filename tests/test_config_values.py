"""Every option of every method's configuration, given values of every JSON type: a configuration or a ConfigError."""

import dataclasses
import json
import random

import pytest

from minipeft import ConfigError, LoraConfig
from minipeft.config.adapter_config import config_from_dict
from minipeft.registry import registry
from minipeft.testing.examples import options_of

HUGE = 10**5000  # more digits than Python writes out
VALUES = (
    *(None, True, False, 0, 1, -1, 3, 10**400, HUGE, 0.0, 1.5, -0.5, float("nan"), float("inf")),
    *("", "3", "x(", "all-linear", "none", "a" * 3000, "\0", "\ud800"),
    *([], [0], [1.5], [None], [[]], [["a"], ["b"]], ["a"], [{}], ["a", 3], [True], [HUGE], "a" * 99),
    *({}, {"a": 1}, {"a": None}, {"a": [True]}, {"a": [[]]}, {"(": 1}, {"a": {"b": {}}}, {"": 1}, {"a" * 3000: 1}),
    *({"a": HUGE}, {3: 1}, {"layers": {"to": ["transform"]}}),
)
BESIDE = ({}, {"target_modules": ["a"], "layers_to_transform": [0]})  # options that others are checked together with


def example(method):
    config = registry.method_class(method).config_class(**options_of(method))
    return type(config), {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def used(config):
    """All that is asked of a configuration before a model is touched."""
    json.dumps(config.to_dict())
    config.for_model_type("gpt2").for_modules(["a", "h.0.b"])
    config.unused_options(["a"])
    config.needs_a_call()
    return config.target_parameters, config.adapter_method, config.bias


def tried(build, options):
    """What was wrong, or "" where a configuration came of it; any other error fails the test."""
    try:
        config = build(options)
    except ConfigError as error:
        return str(error)
    used(config)
    return ""


@pytest.mark.parametrize("method", registry.method_names())
def test_a_value_of_any_type_is_taken_or_refused_with_a_config_error(method):
    cls, given = example(method)
    for name in given:
        said = [tried(lambda o: cls(**o), {**given, **more, name: value}) for more in BESIDE for value in VALUES]
        assert any(said), name
        assert max(map(len, said)) < 800
    assert not tried(lambda o: cls(**o), given)


@pytest.mark.parametrize("method", registry.method_names())
def test_a_file_with_values_of_any_type_is_read_or_refused_with_a_config_error(method):
    cls, given = example(method)
    draw, plain = random.Random(0), cls(**given).to_dict()
    for _ in range(300):
        tried(config_from_dict, plain | {name: draw.choice(VALUES) for name in draw.sample(sorted(plain), 3)})


@pytest.mark.parametrize("value", [0.0, "3", "", {}, {"0": 1}, [[0]], b"\1", True, [1.0]])
def test_layers_are_an_index_or_a_list_of_them(value):
    with pytest.raises(ConfigError, match="layers_to_transform must be an integer from 0"):
        LoraConfig(target_modules=["a"], layers_to_transform=value)


@pytest.mark.parametrize("value", [2, [2], (2,), range(2, 3), {2}])
def test_one_layer_may_be_said_in_many_ways(value):
    assert LoraConfig(target_modules=["a"], layers_to_transform=value).layers_to_transform == (2,)

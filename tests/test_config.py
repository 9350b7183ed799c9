"""LoraConfig: checked when built, to and from PEFT's JSON, and never changed afterwards."""

import contextlib
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft import ConfigError, LoraConfig, MinipeftError
from minipeft.config.adapter_config import config_from_dict

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "r must be an integer from 1"),
        ({"r": -1}, "not -1"),
        ({"r": True}, "not True"),
        ({"r": 4.0}, "not 4.0"),
        ({"r": "4"}, "not '4'"),
        ({"r": 10**9}, "to 65536"),
        ({"lora_alpha": NAN}, "lora_alpha must be a finite number > 0, not nan"),
        ({"lora_alpha": INF}, "not inf"),
        ({"lora_alpha": 10**400}, "lora_alpha must be"),
        ({"lora_alpha": 0}, "> 0"),
        ({"lora_alpha": False}, "not False"),
        ({"lora_alpha": None}, "not None"),
        ({"lora_dropout": 1.5}, "lora_dropout must be a finite number >= 0 and < 1, not 1.5"),
        ({"lora_dropout": 1.0}, "< 1"),
        ({"lora_dropout": -0.1}, ">= 0"),
        ({"lora_dropout": NAN}, "not nan"),
        ({"bias": "lora"}, "closest: 'lora_only'"),
        ({"bias": None}, "bias must be one of 'none', 'all', 'lora_only'"),
        ({"use_rslora": 1}, "use_rslora must be True or False"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights must be one of True, False, 'gaussian', .*'pissa'"),
        ({"init_lora_weights": 1}, "not 1"),
        ({"fan_in_fan_out": "yes"}, "fan_in_fan_out must be"),
        ({"task_type": "CAUSAL"}, "closest: 'CAUSAL_LM'"),
        ({"target_modules": []}, "non-empty list"),
        ({"target_modules": [""]}, "non-empty strings"),
        ({"target_modules": ["c_attn", 3]}, "non-empty strings"),
        ({"target_modules": ""}, "empty string"),
        ({"target_modules": "c_attn("}, "not a valid regular expression"),
        ({"target_modules": "a" * 3000}, "3,000 characters"),
        ({"exclude_modules": "*"}, "exclude_modules: '\\*' is not a valid"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a non-empty list"),
        ({"layers_to_transform": [0, -1], "target_modules": ["x"]}, "layers_to_transform must be"),
        ({"layers_to_transform": [True], "target_modules": ["x"]}, "not True"),
        ({"layers_to_transform": 1, "target_modules": ".*c_attn"}, "needs target_modules as a list"),
        ({"layers_pattern": "h", "target_modules": ["x"]}, "needs layers_to_transform"),
        ({"rank_pattern": {"x": 0}}, r"rank_pattern\['x'\] must be"),
        ({"rank_pattern": {"(": 4}}, "not a valid regular expression"),
        ({"rank_pattern": ["x"]}, "must map"),
        ({"alpha_pattern": {"x": NAN}}, r"alpha_pattern\['x'\] must be"),
        ({"alpha_pattern": {3: 4}}, "the key 3"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be"),
        ({"inference_mode": "no"}, "inference_mode must be"),
        ({"rank": 8}, "has no option 'rank'"),
        ({"lora_alhpa": 8}, "closest: 'lora_alpha'"),
        (
            {"use_qalora": True},
            "has no option 'use_qalora', which is PEFT's and not implemented for this method; known",
        ),
        (
            {"peft_type": "LORA"},
            r"has no option 'peft_type', which only a file has; minipeft\.load_config\(directory\)",
        ),
        ({"layer_replication": [[0, 2]]}, "has no option 'layer_replication', which is PEFT's and not implemented"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(options, said):
    with pytest.raises(ConfigError, match=said) as caught:
        LoraConfig(**options)
    assert len(str(caught.value)) < 500


def test_a_config_is_frozen_and_keeps_no_hold_on_what_it_was_given():
    targets, ranks = ["c_attn", "c_attn", "c_proj"], {"c_proj": 4}
    config = LoraConfig(target_modules=targets, rank_pattern=ranks)
    targets.append("c_fc")
    ranks["c_fc"] = 2
    assert config.target_modules == ("c_attn", "c_proj")
    assert config.rank_pattern == {"c_proj": 4}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3


def test_a_set_of_targets_has_one_order():
    assert LoraConfig(target_modules={"b", "a", "c"}).target_modules == ("a", "b", "c")


def test_defaults_are_those_of_peft():
    import peft

    ours, theirs = LoraConfig(), peft.LoraConfig()
    for f in dataclasses.fields(LoraConfig):
        # A matter of training, which PEFT leaves to an optimizer of its own; and what PEFT drops when it reads a file.
        if f.name in {"freeze_lora_A", "other_keys"}:
            continue
        assert getattr(ours, f.name) == getattr(theirs, f.name), f.name


def test_scaling_is_alpha_over_r_or_over_its_root():
    assert LoraConfig(r=4, lora_alpha=8).scaling == 2
    assert LoraConfig(r=4, lora_alpha=8, use_rslora=True).scaling == 4


def test_peft_enums_are_taken():
    import peft

    assert LoraConfig(task_type=peft.TaskType.CAUSAL_LM).task_type == "CAUSAL_LM"


def test_the_first_matching_pattern_decides_as_in_peft():
    config = LoraConfig(
        r=8, rank_pattern={"h.1.attn.c_attn": 2, "c_attn": 4}, alpha_pattern={"^c_fc": 3, ".*mlp.c_proj": 5}
    )
    blocks = [f"transformer.h.{i}" for i in (0, 1)]
    names = [
        f"{block}.{part}" for block in blocks for part in ("attn.c_attn", "attn.xc_attn", "mlp.c_fc", "mlp.c_proj")
    ]
    resolved = config.for_modules(names)
    assert [resolved[f"{block}.attn.c_attn"].r for block in blocks] == [4, 2]
    assert resolved["transformer.h.0.mlp.c_fc"].r == 8
    assert resolved["transformer.h.0.mlp.c_fc"].lora_alpha == 8  # ^c_fc is not the whole name
    assert resolved["transformer.h.0.mlp.c_proj"].lora_alpha == 5
    assert resolved["transformer.h.0.attn.xc_attn"].r == 8  # no dot before it
    assert config.unused_options(names) == ["alpha_pattern: ^c_fc"]
    shadowed = LoraConfig(rank_pattern={"c_.*": 2, "c_fc": 4})
    assert shadowed.unused_options(names) == ["rank_pattern: c_fc"]


configs = st.builds(
    LoraConfig,
    r=st.integers(1, 64),
    lora_alpha=st.one_of(st.integers(1, 100), st.floats(0.01, 100)),
    lora_dropout=st.floats(0, 0.9),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    use_rslora=st.booleans(),
    target_modules=st.one_of(st.none(), st.just("all-linear"), st.lists(st.sampled_from("abcd"), min_size=1)),
    rank_pattern=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9)),
    modules_to_save=st.one_of(st.none(), st.lists(st.sampled_from("abcd"), min_size=1)),
    init_lora_weights=st.sampled_from([True, False, "gaussian"]),
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(configs)
def test_a_config_survives_json(config):
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


# What patterns, paths, numbers and JSON hold besides letters; from all of Unicode hypothesis makes a table first, a second's work.
TEXTS = st.text("a1.-_*+^$|()[]{}\\/\"' \n\0\x7f\u00df\u0130\u0301\u0663\u2028\U0001f600", max_size=8)


def junk(**floats):
    """Whatever JSON can hold."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(**floats) | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    )


keys = st.sampled_from([*LoraConfig().to_dict(), "freeze_lora_A", "peft_type", "zzz"])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.dictionaries(keys, junk(), max_size=4))
def test_whatever_a_file_says_is_a_config_or_a_config_error(changes):
    with contextlib.suppress(MinipeftError):  # any other exception fails the test
        config_from_dict({**LoraConfig().to_dict(), **changes})


def test_peft_writes_nothing_that_stands_in_the_way():
    import peft

    plain = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM").to_dict()
    values = json.loads(json.dumps(plain, default=list)) | {"peft_version": "0.21.2"}
    assert config_from_dict(values).r == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "olora"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        config_from_dict({**LoraConfig().to_dict(), key: value})


@pytest.mark.parametrize("peft_type", ["BOFT", "lorra", None, 3])
def test_an_unknown_method_is_refused_with_the_known_ones(peft_type):
    with pytest.raises(ConfigError, match="LORA"):
        config_from_dict({**LoraConfig().to_dict(), "peft_type": peft_type})

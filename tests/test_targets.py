"""What target_modules and its companions select, and what they refuse: the model is then bit for bit what it was."""

import re
import time

import pytest
import torch
from tiny_models import adapted, gpt2, gpt2_classifier, llama, logits, state_digest, t5
from torch import nn

from minipeft import ConfigError, LoraConfig, StateError, TargetError, get_lora_model, load_adapter
from minipeft.config import patterns
from minipeft.injection import apply as injection
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import adapted_layers, wrappers


def chosen(model, **options):
    return [name for name, _ in adapted_layers(get_lora_model(model, LoraConfig(r=2, **options)))]


BLOCKS = ["transformer.h.0", "transformer.h.1"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [f"{b}.attn.c_attn" for b in BLOCKS]),
        ({"target_modules": ["attn.c_proj"]}, [f"{b}.attn.c_proj" for b in BLOCKS]),
        ({"target_modules": ["c_proj"]}, [f"{b}.{part}.c_proj" for b in BLOCKS for part in ("attn", "mlp")]),
        ({"target_modules": r".*\.h\.1\..*c_(attn|fc)"}, ["transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_fc"]),
        ({"target_modules": ["wte", "lm_head"]}, ["transformer.wte", "lm_head"]),
        ({"target_modules": ["c_proj"], "exclude_modules": ["mlp.c_proj"]}, [f"{b}.attn.c_proj" for b in BLOCKS]),
        (
            {"target_modules": ["c_proj"], "exclude_modules": r".*h\.0.*"},
            [f"{BLOCKS[1]}.{p}.c_proj" for p in ("attn", "mlp")],
        ),
        ({"target_modules": ["c_attn"], "layers_to_transform": 1}, ["transformer.h.1.attn.c_attn"]),
        (
            {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": "h"},
            ["transformer.h.0.attn.c_attn"],
        ),
        ({"target_modules": ["transformer.h.0.attn.c_attn"]}, ["transformer.h.0.attn.c_attn"]),
        (
            {"target_modules": "all-linear"},
            [f"{b}.{part}" for b in BLOCKS for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
        ),
    ],
)
def test_the_patterns_select(options, expected):
    assert chosen(gpt2(), **options) == expected


class Attention(nn.Module):
    """As diffusers' has it: the output projection is in a list, next to a dropout."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(4, 4)
        self.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.0)])


def test_a_layer_in_a_list_is_named_as_a_target_can_name_it():
    with pytest.raises(TargetError, match=r"this model's own: 'to_q \(1\)', 'to_out\.0 \(1\)'"):
        get_lora_model(Attention(), LoraConfig())
    with pytest.raises(
        TargetError, match=r"to_out: no LayerOps for .*ModuleList.* Name a layer in it, such as 'to_out\.0'"
    ):
        get_lora_model(Attention(), LoraConfig(target_modules=["to_out"]))
    assert chosen(Attention(), target_modules=["to_out.0"]) == ["to_out.0"]


def test_all_linear_leaves_the_head_out_also_a_classifier_without_a_task():
    assert "lm_head" not in chosen(llama(), target_modules="all-linear")
    assert "score" not in chosen(gpt2_classifier(), target_modules="all-linear")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"target_modules": ["c_atn", "c_proj"]},
            r"target_modules: 'c_atn' matches no module .*\(closest: 'c_attn', 2 modules\)",
        ),
        (
            {"target_modules": ["value"]},
            "'value' matches no module of GPT2LMHeadModel, whose linear layers are called 'c_attn', 'c_fc', 'c_proj'\\.",
        ),
        ({"target_modules": "c_attn"}, r"give the list \['c_attn'\]"),
        ({"target_modules": ".*nothing"}, "matches no module of GPT2LMHeadModel"),
        ({"target_modules": ["ln_1"]}, "transformer.h.0.ln_1: no LayerOps for torch.nn.*LayerNorm; registered: Conv1D"),
        ({"target_modules": ["attn"]}, "transformer.h.0.attn: no LayerOps for .*GPT2Attention"),
        ({"target_modules": ["all-linear"]}, "give 'all-linear' as a string, not in a list"),
        ({"target_modules": "all_linear"}, "'all_linear' matches no module .* Closest: 'all-linear'"),
        ({"target_modules": ["c_attn"], "exclude_modules": ["c_att"]}, "exclude_modules: 'c_att' matches no module"),
        ({"target_modules": ["c_attn"], "exclude_modules": ["c_attn"]}, "leaves no module"),
        (
            {"target_modules": ["c_attn"], "layers_to_transform": [1, 7]},
            "no targeted module in layer 7 .*found: 0 to 1",
        ),
        (
            {"target_modules": ["c_attn", "lm_head"], "layers_to_transform": [1]},
            "'lm_head' is in none of the layers 1",
        ),
        ({"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "layers"}, "check layers_pattern"),
        ({"modules_to_save": ["head"]}, r"modules_to_save: 'head' matches no module .*\(closest: 'lm_head'"),
        ({"modules_to_save": ["act"]}, "modules_to_save: 'act' is a NewGELUActivation without parameters"),
        ({"modules_to_save": ["c_attn"]}, "leaves no module"),
        ({"rank_pattern": {"c_atn": 4}}, "rank_pattern: c_atn"),
        ({"rank_pattern": {"c_proj": 4}}, "'rank_pattern: c_proj' matches none of the 2 targeted modules"),
        ({"alpha_pattern": {"h.9": 4}}, "alpha_pattern"),
        ({"task_type": "SEQ_CLS"}, "trains the head .*'score'"),
        ({"target_modules": "(a+)+x|(.*)*y" + "(.*)*" * 12 + "z"}, "takes more than|matches no module"),
    ],
)
def test_what_fits_nothing_is_an_error_that_changes_nothing(options, said):
    model = gpt2()
    before = state_digest(model)
    with pytest.raises((TargetError, ConfigError), match=said):
        get_lora_model(model, LoraConfig(**options))
    assert state_digest(model) == before


@pytest.mark.parametrize("given", [["mlp", "c_attn"], r".*\.mlp"])
def test_excluding_a_module_around_targeted_layers_names_the_expression_that_excludes_what_is_inside(given):
    """PEFT excludes the module itself, which is no target, and adapts what is inside."""
    model = gpt2()
    before = state_digest(model)
    with pytest.raises(TargetError, match=r"excludes transformer.h.0.mlp itself, and 4 targeted layers") as caught:
        get_lora_model(model, LoraConfig(target_modules="all-linear", exclude_modules=given))
    assert state_digest(model) == before
    (better,) = re.findall(r"regular expression (\S+)\. Nothing", str(caught.value))
    expected = ["c_attn", "c_proj"] if isinstance(given, str) else ["c_proj"]
    found = chosen(gpt2(), target_modules="all-linear", exclude_modules=better)
    assert found == [f"{b}.attn.{name}" for b in BLOCKS for name in expected]


def test_a_hostile_expression_is_stopped(monkeypatch):
    assert patterns.SECONDS_PER_OPTION == 2
    monkeypatch.setattr(patterns, "SECONDS_PER_OPTION", 0.2)
    layers = nn.Sequential()
    layers.add_module("a" * 60 + "!", nn.Linear(2, 2))
    with pytest.raises(TargetError, match=r"takes more than 0\.2 s|matches no module"):
        get_lora_model(layers, LoraConfig(target_modules="(a|a|aa)+(a|a)*(a|aa)*$"))


def test_time_in_which_the_program_does_not_run_does_not_stop_an_expression(monkeypatch):
    """On a loaded machine seconds may pass between two names."""
    monkeypatch.setattr(patterns, "SECONDS_PER_OPTION", 0.3)

    def names():
        yield "q"
        time.sleep(0.4)
        yield "a" * 24 + "c"  # takes some ten ms
        yield "aab"

    assert patterns.full_matches("(?:a|aa)+b|q", names(), "target_modules") == ["q", "aab"]


def test_an_unknown_model_gets_proposals_from_its_own_modules():
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.ModuleDict({"mix": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})] * 3)}
    )
    with pytest.raises(TargetError, match=r"give target_modules, from this model's own: 'mix \(1\)'"):
        get_lora_model(model, LoraConfig())


class Twice(nn.Module):
    """One linear layer under two names, one of them in a list."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.steps = nn.ModuleList([nn.Linear(4, 4), self.encode])

    def forward(self, x):
        return self.steps[1](self.steps[0](self.encode(x)))


@pytest.mark.parametrize(
    "targets", [["encode"], ["steps.1"], ["encode", "steps.1"], ["encode", "steps.0"], "all-linear"]
)
def test_a_module_under_two_names_gets_one_wrapper_at_both(targets, tmp_path):
    model = get_lora_model(Twice(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert isinstance(model.encode, AdaptedLayer)
    assert model.encode is model.steps[1]
    x = torch.randn(3, 4)
    expected = model(x)
    model.save_pretrained(tmp_path)
    fresh = Twice()
    fresh.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "adapters" not in k}
    )
    assert torch.equal(load_adapter(fresh, tmp_path)(x), expected)
    base = model.merge_and_unload()
    torch.testing.assert_close(base(x), expected)
    assert base.encode is base.steps[1]


def test_a_block_that_is_itself_shared_is_adapted_once():
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = get_lora_model(nn.Sequential(block, block), LoraConfig(r=2, target_modules=["0.0"]))
    assert len(list(wrappers(model))) == 1
    assert model[0][0] is model[1][0]


def test_a_packed_weight_is_refused_not_misread():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        TargetError, match="0: torch.nn.modules.linear.Linear is registered, but .*Parameter of torch.uint8"
    ):
        get_lora_model(model, LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="leaves out 1 Linear"):
        assert chosen(model, target_modules="all-linear") == ["1"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_weight_that_is_computed_from_others_is_refused_since_it_cannot_be_written(norm):
    with pytest.raises(TargetError, match="0: .*Linear is registered, but this instance is refused"):
        get_lora_model(nn.Sequential(norm(nn.Linear(4, 4))), LoraConfig(target_modules=["0"]))


def test_a_projection_that_is_read_and_never_called_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TargetError, match="attention.out_proj: MultiheadAttention reads its weight and never calls it"):
        get_lora_model(model, LoraConfig(target_modules=["out_proj"]))


def test_the_fast_path_of_a_transformer_encoder_does_not_pass_the_adapters_by():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    model = get_lora_model(
        encoder, LoraConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False)
    ).eval()
    x = torch.randn(2, 3, 8)
    expected = model(x)  # with gradients, the layers are called one by one
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        with model.disable_adapter():
            assert not torch.allclose(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


class ShiftedEmbedding(nn.Embedding):
    """As OPT's positions: the index it looks up is not the index it is given."""

    def forward(self, ids):
        return super().forward(ids + 2)


def test_an_embedding_with_a_lookup_of_its_own_is_refused():
    with pytest.raises(TargetError, match="ShiftedEmbedding is registered, but"):
        get_lora_model(nn.Sequential(ShiftedEmbedding(9, 4)), LoraConfig(target_modules=["0"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_model_is_refused_with_the_right_order(wrap):
    with pytest.raises(StateError, match="adapt the model itself, then wrap it"):
        get_lora_model(wrap(nn.Sequential(nn.Linear(2, 2))), LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("name", ["", ".", "../x", "/etc/x", "a.b", "a b", "a/b", "keys", "train", "x" * 65, None, 3])
def test_an_adapter_name_that_could_leave_its_directory_is_refused(name):
    model = gpt2()
    before = state_digest(model)
    with pytest.raises(ConfigError, match="adapter name"):
        get_lora_model(model, LoraConfig(), adapter_name=name)
    assert state_digest(model) == before


@pytest.mark.parametrize("config", [None, {"r": 8}, "lora"])
def test_what_is_no_config_is_refused(config):
    from minipeft import get_adapter_model

    with pytest.raises(ConfigError, match="config must be"):
        get_adapter_model(gpt2(), config)


def test_a_failing_adapter_class_leaves_the_model_as_it_was(monkeypatch):
    from minipeft.methods.lora import Lora

    model, made = gpt2(), []

    def fail_at_the_second(self, init, weight):
        made.append(self)
        if len(made) == 2:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(Lora, "reset_parameters", fail_at_the_second)
    before = state_digest(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        get_lora_model(model, LoraConfig())
    assert state_digest(model) == before


def test_an_assignment_that_fails_half_way_is_taken_back(monkeypatch):
    model = gpt2()
    before, expected = state_digest(model), logits(model)
    original = injection.put

    def refuse(wrap, module, places):
        if module is model.transformer.h[1].attn.c_attn:
            raise RuntimeError("no")
        return original(wrap, module, places)

    with monkeypatch.context() as patch:
        patch.setattr(injection, "put", refuse)
        with pytest.raises(RuntimeError, match="no"):
            get_lora_model(model, LoraConfig())
    assert state_digest(model) == before
    assert torch.equal(logits(model), expected)


def test_a_twin_that_shares_the_weight_and_is_not_adapted_is_named():
    """T5's `shared` is not called by the model of transformers 5: its encoder and decoder have tables of their own."""
    with pytest.warns(
        UserWarning, match=r"shared shares its weight with '(en|de)coder.embed_tokens.weight'.* target those too"
    ):
        get_lora_model(t5(), LoraConfig(target_modules=["shared"]))
    get_lora_model(t5(), LoraConfig(target_modules=["shared", "embed_tokens"]))  # all of them: nothing to say
    get_lora_model(gpt2(), LoraConfig(target_modules=["wte"]))  # the head is another type of layer


def test_layers_in_a_module_that_another_adapter_trains_in_full_are_named():
    model = adapted(r=2, target_modules=["h.1.attn.c_attn"], modules_to_save=["h.0"])
    for place, targets in enumerate((["c_attn"], r".*c_attn", "all-linear", None)):
        with pytest.warns(
            UserWarning, match=r"target_modules leaves out 'transformer.h.0.attn.c_attn'.*around it in full"
        ):
            model.add_adapter(f"a{place}", LoraConfig(r=2, target_modules=targets))
    model.add_adapter("elsewhere", LoraConfig(r=2, target_modules=["h.1.attn.c_attn"]))
    model.add_adapter("excluded", LoraConfig(r=2, target_modules=["c_attn"], exclude_modules=r".*\.h\.0\..*|.*wte"))
    model.add_adapter("in_full_too", LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["h.0"]))

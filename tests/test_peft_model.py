"""Adapted models where PEFT's are expected, PEFT's configurations here, and the fused layer inside PEFT: against the real PEFT."""

import copy
import pickle
import re

import peft
import pytest
import torch
from tiny_models import gpt2, state_digest
from transformers import LlamaConfig, LlamaForCausalLM

import minipeft
from minipeft import (
    CheckpointError,
    ConfigError,
    LoraConfig,
    StateError,
    VeraConfig,
    get_adapter_model,
    get_lora_model,
)
from minipeft.integrations.peft import AdaptedPeftModel, FusedLinear, as_peft_model, config

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
IDS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()


def moved(model):
    """Trainable values that depend on their names' lengths alone, so equal in two libraries."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                chance = torch.Generator().manual_seed(len(name))
                parameter.copy_(torch.randn(parameter.shape, generator=chance) / 10)
    return model.eval()


@pytest.fixture
def wrapped():
    return as_peft_model(moved(get_lora_model(llama(), LoraConfig(r=4, target_modules="all-linear"))))


def test_it_is_a_peft_model_around_the_same_model(wrapped):
    model = wrapped.get_base_model()
    assert isinstance(wrapped, peft.PeftModel)
    assert isinstance(model, minipeft.AdaptedModel)
    assert torch.equal(wrapped(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert torch.equal(wrapped.generate(IDS, max_new_tokens=3), model.generate(IDS, max_new_tokens=3))
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in model.parameters()}
    assert wrapped.config is model.config
    assert wrapped.active_adapter == "default"
    assert wrapped.peft_config["default"].r == 4
    assert isinstance(wrapped.peft_config["default"], peft.LoraConfig)
    assert wrapped.peft_config["default"] is wrapped.peft_config["default"]
    wrapped.train()
    assert model.training


def test_the_verbs_do_what_the_model_does(wrapped, tmp_path):
    adapted = wrapped(input_ids=IDS).logits
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(input_ids=IDS).logits, llama()(input_ids=IDS).logits)
    wrapped.save_pretrained(tmp_path, state_dict=wrapped.state_dict(), is_main_process=True)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(theirs(input_ids=IDS).logits, adapted, rtol=1e-5, atol=1e-5)
    assert wrapped.get_nb_trainable_parameters() == wrapped.get_base_model().get_nb_trainable_parameters()
    torch.testing.assert_close(wrapped.merge_and_unload()(input_ids=IDS).logits, adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]}, {"use_dora": True}],
    ids=lambda options: next(iter(options)),
)
def test_peft_reads_and_sets_the_tensors_of_an_adapter(options):
    """As FSDP does when it saves adapters alone."""
    values, theirs = {"r": 2, "target_modules": ["q_proj", "up_proj"], **options}, []
    for seed in (0, 1):
        model = get_lora_model(llama(), LoraConfig(**values))
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        with torch.no_grad():
            for place, tensor in enumerate(model.adapter_state_dict("default").values()):
                tensor.add_(seed + place / 10)
        theirs.append(as_peft_model(model))
    source, target = theirs
    found = peft.get_peft_model_state_dict(source)
    assert (
        found.keys() == peft.get_peft_model_state_dict(peft.get_peft_model(llama(), peft.LoraConfig(**values))).keys()
    )
    assert not peft.set_peft_model_state_dict(target, found).unexpected_keys
    torch.testing.assert_close(target.get_base_model().adapter_state_dict("default"), dict(found), rtol=0, atol=0)
    assert torch.equal(target(input_ids=IDS).logits, source(input_ids=IDS).logits)


def test_a_process_that_got_nothing_of_a_gathered_state_has_no_tensors_in_it(monkeypatch):
    """The first FSDP gathers a whole state on the first process, and accelerate asks on all of them."""
    wrapped = as_peft_model(get_lora_model(llama(), LoraConfig()))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert len(peft.get_peft_model_state_dict(wrapped)) == 8
        if rank:
            assert peft.get_peft_model_state_dict(wrapped, state_dict={}) == {}
    with pytest.raises(CheckpointError, match="state_dict lacks"):
        peft.get_peft_model_state_dict(wrapped, state_dict={})


class FullyShardedDataParallel(torch.nn.Module):
    """Has the name and the attribute of the first FSDP, without its processes."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


def test_peft_would_silently_set_nothing_inside_the_first_fsdp_and_is_stopped(wrapped):
    tensors = peft.get_peft_model_state_dict(wrapped)
    model = wrapped.get_base_model()
    model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0])
    with pytest.raises(StateError, match="instead of as_peft_model"):
        peft.set_peft_model_state_dict(wrapped, tensors)


def test_biases_that_peft_could_not_tell_apart_are_not_given_to_it():
    model = as_peft_model(get_lora_model(gpt2(), LoraConfig(bias="all")))
    with pytest.raises(ConfigError, match="which biases of 'default' train"):
        peft.get_peft_model_state_dict(model)


def test_what_only_peft_has_is_refused_by_name(wrapped):
    with pytest.raises(StateError, match="get_layer_status"):
        wrapped.get_layer_status()
    with pytest.raises(ConfigError, match="not Llama"):
        as_peft_model(llama())


@pytest.mark.parametrize("cast", [True, False])
def test_an_adapter_that_is_added_has_the_dtype_that_peft_gives_it(cast):
    options = {"low_cpu_mem_usage": False, "autocast_adapter_dtype": cast}
    ours, theirs = gpt2().bfloat16(), gpt2().bfloat16()
    ours = as_peft_model(get_lora_model(ours, LoraConfig(r=2, target_modules=["c_attn"])))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["c_attn"]))
    found = []
    for model in (ours, theirs):
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["c_attn"]), **options)
        found.append({p.dtype for name, p in model.named_parameters() if "other" in name})
    assert found[0] == found[1] == {torch.float32 if cast else torch.bfloat16}
    with pytest.raises(TypeError, match="autocast_dtype"):
        ours.add_adapter("third", LoraConfig(r=2), autocast_dtype=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_2"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_added_with_the_configuration_of_another_is_its_copy_and_does_not_train(options):
    """As TRL makes its reference."""
    model = moved(get_lora_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **options)))
    wrapped = as_peft_model(model)
    expected, trainable = wrapped(input_ids=IDS).logits, wrapped.get_nb_trainable_parameters()[0]
    wrapped.add_adapter("ref", wrapped.peft_config["default"])
    assert wrapped.get_nb_trainable_parameters()[0] == trainable
    for name, parameter in wrapped.named_parameters():
        if ".default." in name:
            assert torch.equal(wrapped.get_parameter(name.replace(".default.", ".ref.")), parameter)
    wrapped.set_adapter("ref")
    assert torch.equal(wrapped(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(
    "theirs",
    [
        peft.LoraConfig(
            r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"
        ),
        peft.LoraConfig(r=4, target_modules="all-linear", use_rslora=True, rank_pattern={"q_proj": 2}),
        peft.LoraConfig(r=4, use_dora=True, target_modules={"q_proj"}),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    ],
    ids=lambda given: type(given).__name__,
)
def test_a_configuration_of_peft_is_taken_as_what_it_says(theirs):
    model = get_adapter_model(llama(), theirs)
    other = peft.get_peft_model(llama(), copy.deepcopy(theirs))
    assert model.get_nb_trainable_parameters()[0] == other.get_nb_trainable_parameters()[0]


def test_a_lora_config_of_peft_means_the_same_and_is_not_changed():
    theirs = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    before = copy.deepcopy(theirs.to_dict())
    model, other = get_lora_model(llama(), theirs), peft.get_peft_model(llama(), copy.deepcopy(theirs))
    assert theirs.to_dict() == before
    assert model.get_nb_trainable_parameters() == other.get_nb_trainable_parameters()
    model.add_adapter("second", theirs)


@pytest.mark.parametrize(
    "options",
    [{"layer_replication": [[0, 2]]}, {"init_lora_weights": "eva"}, {"use_qalora": True}],
    ids=str,
)
def test_what_a_configuration_of_peft_asks_for_in_vain_is_refused(options):
    with pytest.raises(ConfigError, match=f"LoraConfig: .*{next(iter(options))}"):
        get_lora_model(llama(), peft.LoraConfig(**options))


def test_layers_of_its_own_in_a_configuration_of_peft_are_refused_by_name_but_for_ours():
    theirs = peft.LoraConfig(target_modules=["q_proj"])
    assert get_lora_model(llama(), config(theirs)).active_adapters == ["default"]
    theirs._register_custom_module({torch.nn.LSTM: peft.tuners.lora.Linear})
    with pytest.raises(ConfigError, match=r"_register_custom_module .* 'LSTM'; .* register_layer"):
        get_lora_model(llama(), theirs)


def test_the_class_of_a_configuration_is_no_configuration():
    with pytest.raises(ConfigError, match="config must be the configuration of a method"):
        get_adapter_model(llama(), peft.LoraConfig)


@pytest.mark.each_value
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("own", [LoraConfig, peft.LoraConfig])
def test_the_fused_layer_inside_peft_computes_what_peft_does(make, own):
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    theirs = moved(peft.get_peft_model(make(), peft.LoraConfig(**options, fan_in_fan_out=make is gpt2)))
    fused = moved(peft.get_peft_model(make(), config(own(**options, fan_in_fan_out=make is gpt2))))
    assert sum(type(module) is FusedLinear for module in fused.modules()) > 5
    losses = [model(input_ids=IDS, labels=IDS).loss for model in (theirs, fused)]
    assert torch.allclose(*losses, rtol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, parameter), other in zip(theirs.named_parameters(), fused.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    with theirs.disable_adapter(), fused.disable_adapter():
        assert torch.equal(theirs(input_ids=IDS).logits, fused(input_ids=IDS).logits)
    torch.testing.assert_close(
        fused.merge_and_unload()(input_ids=IDS).logits, theirs.merge_and_unload()(input_ids=IDS).logits
    )


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_where_it_is_not_plain_lora_the_layer_is_pefts(options):
    theirs = moved(peft.get_peft_model(llama(), peft.LoraConfig(r=4, **options)))
    fused = moved(peft.get_peft_model(llama(), config(peft.LoraConfig(r=4, **options))))
    assert torch.equal(theirs(input_ids=IDS).logits, fused(input_ids=IDS).logits)


def test_transformers_verbs_do_the_same_as_ours():
    model = moved(get_lora_model(llama(), LoraConfig(r=4)))
    adapted, base = model(input_ids=IDS).logits, llama()(input_ids=IDS).logits
    assert model.active_adapters() == model.active_adapters == ["default"]
    model.disable_adapters()
    assert torch.equal(model(input_ids=IDS).logits, base)
    with model.disable_adapter():
        pass
    assert torch.equal(model(input_ids=IDS).logits, base)
    model.enable_adapters()
    assert torch.equal(model(input_ids=IDS).logits, adapted)
    model.add_adapter(LoraConfig(r=2), "second")
    assert list(model.adapter_configs) == ["default", "second"]
    model.add_adapter(adapter_config=LoraConfig(r=2), adapter_name="third")
    model.delete_adapter(["second", "third"])
    assert list(model.adapter_configs) == ["default"]
    tensors = model.get_adapter_state_dict()
    assert tensors["model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    model.merge_adapter()
    with pytest.raises(StateError, match="unmerge_adapter"):
        model.disable_adapters()


def test_peft_is_not_put_over_an_adapted_model():
    model = moved(get_lora_model(llama(), LoraConfig(r=4)))
    expected = model(input_ids=IDS).logits
    with pytest.raises(StateError, match="PEFT cannot add an adapter to a model that minipeft has adapted"):
        peft.get_peft_model(model, peft.LoraConfig(r=2))
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert list(model.peft_config) == ["default"]


def test_the_wrapper_has_no_copy_of_its_own_in_memory(wrapped):
    assert isinstance(wrapped, AdaptedPeftModel)
    assert set(dict(wrapped.named_children())) == {"base_model"}


def test_peft_functions_for_a_models_state_name_ours_instead_of_reading_nothing():
    model = minipeft.get_lora_model(llama(), minipeft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = state_digest(model)
    for call in (peft.get_peft_model_state_dict, lambda m: peft.set_peft_model_state_dict(m, {})):
        with pytest.raises(
            minipeft.MinipeftError, match=r"get_adapter_state_dict\(\) and model\.set_adapter_state_dict\("
        ):
            call(model)
    assert state_digest(model) == before
    assert not hasattr(model.peft_config["default"], "peft_type")


def test_what_only_a_configuration_of_peft_has_names_ours(tmp_path):
    own = LoraConfig(r=2, target_modules=["q_proj"])
    ours = {
        "peft_type": lambda: own.peft_type,
        "from_pretrained": lambda: LoraConfig.from_pretrained(tmp_path),
        "from_json_file": lambda: LoraConfig.from_json_file(tmp_path / "adapter_config.json"),
        "save_pretrained": lambda: own.save_pretrained(tmp_path),
        "_register_custom_module": lambda: own._register_custom_module({}),
    }
    for name, call in ours.items():
        assert hasattr(peft.LoraConfig(), name)
        with pytest.raises(minipeft.MinipeftError, match=f"LoraConfig has no {name}, which is PEFT's; ") as caught:
            call()
        assert isinstance(caught.value, AttributeError)
        found = re.findall(r"(minipeft|model|config)\.(\w+)", str(caught.value))
        assert found
        owners = {"minipeft": minipeft, "model": minipeft.AdaptedModel, "config": own}
        assert all(hasattr(owners[owner], attribute) for owner, attribute in found)
    with pytest.raises(AttributeError, match="LoraConfig has no attribute 'lora_rank'"):
        own.lora_rank  # noqa: B018
    assert copy.deepcopy(own) == pickle.loads(pickle.dumps(own)) == own


IN_MEMORY = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "up_proj"]),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1, 2]),
    "dora": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "pissa": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    "vera": VeraConfig(r=4, target_modules=["q_proj"]),  # its projections are in the state, once for all layers
}


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_a_state_in_memory_goes_from_one_model_to_another_and_training_goes_on(kind):
    """As a server and its clients exchange it: the mean of two, in the same parameters."""
    clients = [moved(get_adapter_model(llama(), IN_MEMORY[kind])) for _ in range(2)]
    with torch.no_grad():
        for tensor in clients[1].adapter_state_dict().values():
            tensor.mul_(3)
    states = [client.get_adapter_state_dict() for client in clients]
    mean = {key: (value + states[1][key]) / 2 for key, value in states[0].items()}
    target = get_adapter_model(llama(), IN_MEMORY[kind]).train()
    trained = [p for p in target.parameters() if p.requires_grad]
    target.set_adapter_state_dict(mean)
    assert [id(p) for p in target.parameters() if p.requires_grad] == [*map(id, trained)]
    for key, value in target.get_adapter_state_dict().items():
        assert torch.equal(value, mean[key])
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    target(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not all(torch.equal(value, mean[key]) for key, value in target.get_adapter_state_dict().items())


def test_a_state_that_peft_gives_is_taken_and_means_the_same():
    values = {"r": 4, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]}
    theirs = moved(peft.get_peft_model(llama(), peft.LoraConfig(**values)))
    state = peft.get_peft_model_state_dict(theirs)
    ours = get_lora_model(llama(), LoraConfig(**values)).eval()
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    ours.set_adapter_state_dict(state)
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    ours.set_adapter("other")
    ours.set_adapter_state_dict(state, "default")  # also while it waits
    with pytest.raises(CheckpointError, match="state_dict does not fit adapter 'other': .*unexpected"):
        ours.set_adapter_state_dict(state)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    model = moved(get_lora_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
    state = {key: value.clone() + 1 for key, value in model.get_adapter_state_dict().items()}
    first, last = min(state), max(state)
    cases = {
        f"missing '.*{re.escape(last)}'": {key: value for key, value in state.items() if key != last},
        "unexpected '.*surplus.weight'": {**state, "surplus.weight": torch.ones(1)},
        r"has the shape \[2, 32\], and the adapter's has \[4, 32\]": {**state, first: torch.ones(2, 32)},
        "NaN or infinity in .*lora_B": {**state, last: torch.full_like(state[last], float("nan"))},
        "must map names to tensors": [*state.values()],
    }
    before = state_digest(model)
    for message, given in cases.items():
        with pytest.raises(minipeft.MinipeftError, match=message) as caught:
            model.set_adapter_state_dict(given)
        assert str(caught.value).endswith("Nothing was changed.")
    with pytest.raises(StateError, match="no adapter 'absent'"):
        model.set_adapter_state_dict(state, "absent")
    assert state_digest(model) == before
    model.merge_adapter()
    with pytest.raises(StateError, match="unmerge_adapter"):
        model.set_adapter_state_dict(state)

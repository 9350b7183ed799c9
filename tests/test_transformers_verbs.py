"""Verbs of transformers on an adapted model are ours; those of diffusers are refused where they look for PEFT's layers."""

import re

import pytest
import torch
from tiny_models import foreign_code, llama, token_ids
from transformers import TrainingArguments
from transformers.integrations import PeftAdapterMixin

import minipeft
from minipeft import LoraConfig, StateError, get_lora_model
from minipeft.hf import AdapterTrainer

IDS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(1))
VERBS = sorted(name for name in vars(PeftAdapterMixin) if not name.startswith("_"))


@pytest.fixture(autouse=True)
def no_peft_is_good_enough(monkeypatch):
    """As with transformers 5.24, which asks for a PEFT that does not exist yet."""

    def refuse(min_version):
        raise ValueError(f"the version of PEFT must be >= {min_version}")

    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", refuse)
    monkeypatch.setattr("transformers.integrations.peft.is_peft_available", lambda: False, raising=False)


@pytest.fixture
def model():
    return get_lora_model(llama(), LoraConfig(r=4, init_lora_weights=False)).eval()


def test_this_is_what_transformers_itself_says():
    with pytest.raises(ValueError, match="PEFT"):
        llama().disable_adapters()


@pytest.mark.parametrize("verb", VERBS)
def test_every_public_verb_is_ours(model, verb):
    owner = next(cls for cls in type(model).__mro__ if verb in vars(cls))
    assert owner.__module__.startswith("minipeft.")


def test_the_verbs_work(model, tmp_path):
    adapted, base = model(input_ids=IDS).logits, llama().eval()(input_ids=IDS).logits
    model.disable_adapters()
    assert torch.equal(model(input_ids=IDS).logits, base)
    model.enable_adapters()
    assert torch.equal(model(input_ids=IDS).logits, adapted)
    model.add_adapter(LoraConfig(r=2), "second")
    model.set_adapter("second")
    assert model.active_adapters() == ["second"]
    assert torch.equal(model(input_ids=IDS).logits, base)
    assert any(key.endswith("lora_A.weight") for key in model.get_adapter_state_dict("default"))
    model.set_adapter("default")
    model.delete_adapter("second")
    model.save_pretrained(tmp_path)
    again = minipeft.load_adapter(llama(), tmp_path).eval()
    assert torch.equal(again(input_ids=IDS).logits, adapted)
    with pytest.raises(StateError, match="in use"):
        again.delete_adapter("default")


def test_a_trainer_saves_and_resumes(model, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in token_ids(8, 10)]
    options = {
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    for steps, resumed in ((1, None), (2, True)):
        arguments = TrainingArguments(str(tmp_path), max_steps=steps, **options)
        with foreign_code():
            AdapterTrainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resumed)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("build", ["from_pretrained", "from_config", "call"])
def test_what_is_built_from_an_adapted_models_class_is_a_plain_model(model, build, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    cls = type(model)
    makers = {
        "from_pretrained": lambda: cls.from_pretrained(tmp_path / "base"),
        "from_config": lambda: cls._from_config(model.config),
        "call": lambda: cls(model.config),
    }
    built = makers[build]().eval()
    assert type(built) is type(llama())
    built.load_state_dict(llama().state_dict())
    expected = built(input_ids=IDS).logits
    built.save_pretrained(tmp_path / "saved")
    assert torch.equal(type(built).from_pretrained(tmp_path / "saved").eval()(input_ids=IDS).logits, expected)
    model.save_pretrained(tmp_path / "adapter")
    loaded = minipeft.load_adapter(built, tmp_path / "adapter")
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert type(loaded) is cls


def test_names_that_only_peft_has_say_what_they_say_there(tmp_path):
    import peft

    with foreign_code():
        theirs = peft.get_peft_model(
            llama(), peft.LoraConfig(r=4, init_lora_weights=False, modules_to_save=["lm_head"])
        )
        theirs.save_pretrained(tmp_path)
    ours = minipeft.load_adapter(llama(), tmp_path)
    assert ours.targeted_module_names == theirs.targeted_module_names
    assert ours.active_peft_config.r == theirs.active_peft_config.r == 4
    assert ours.get_base_model() is ours
    theirs.eval()
    for model in (ours, theirs):
        model.disable_adapter_layers()
    assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    for model in (ours, theirs):
        model.enable_adapter_layers()
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


OF_PEFT = {
    "get_layer_status": "layer_status()",
    "get_model_status": "adapter_status()",
    "set_requires_grad": "train_adapters(names)",
    "enable_peft_hotswap": "prepare_hotswap(max_rank)",
    "update_and_allocate": "after_step(model, step), and add extra_loss(model)",
}


@pytest.mark.parametrize("verb", OF_PEFT)
def test_a_verb_of_peft_that_is_another_one_here_names_ours(model, verb):
    with pytest.raises(StateError) as caught:
        getattr(model, verb)()
    assert f"call {OF_PEFT[verb]}" in str(caught.value)
    assert all(hasattr(model, name) or hasattr(minipeft, name) for name in re.findall(r"(\w+)\(", OF_PEFT[verb]))


class Denoiser(torch.nn.Module):
    """The verbs of a model of diffusers, as its PeftAdapterMixin has them: PEFT's layers are not there, so nothing happens."""

    __module__ = "diffusers.models.denoiser"

    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(4, 4)

    def forward(self, sample, cross_attention_kwargs=None):
        return self.to_q(sample)

    def fuse_lora(self, lora_scale=1.0, safe_fusing=False, adapter_names=None):
        """Nothing."""

    unfuse_lora = set_adapters = enable_lora = disable_lora = delete_adapters = unload_lora = save_lora_adapter = (
        fuse_lora
    )
    fuse_qkv_projections = fuse_lora


@pytest.mark.parametrize(
    ("verb", "ours"),
    [
        ("fuse_lora", r"merge_adapter\(\)"),
        ("unfuse_lora", r"unmerge_adapter\(\)"),
        ("set_adapters", "set_scale"),
        ("enable_lora", r"enable_adapters\(\)"),
        ("disable_lora", r"disable_adapters\(\)"),
        ("delete_adapters", "delete_adapter"),
        ("save_lora_adapter", "save_pretrained"),
        ("fuse_qkv_projections", r"merge_and_unload\(\)"),
    ],
)
def test_a_verb_of_diffusers_that_would_do_nothing_names_ours(verb, ours):
    plain = Denoiser()
    getattr(plain, verb)()
    model = get_lora_model(plain, LoraConfig(target_modules=["to_q"]))
    with pytest.raises(StateError, match=ours):
        getattr(model, verb)()
    getattr(model.unload(), verb)()


@pytest.mark.parametrize("verb", ["unload_lora", "peft_config"])
def test_what_a_pipeline_of_diffusers_calls_to_unload_gives_the_base_back(verb):
    """unload_lora of its own models; of a text encoder it deletes peft_config and then sets _hf_peft_config_loaded."""
    plain, x = Denoiser(), torch.ones(1, 4)
    expected, kept = plain(x), set(plain.state_dict())
    model = get_lora_model(plain, LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    assert not torch.equal(model(x), expected)
    if verb == "unload_lora":
        model.unload_lora()
    else:
        del model.peft_config
        model._hf_peft_config_loaded = None
    assert type(model) is Denoiser
    assert set(model.state_dict()) == kept
    assert torch.equal(model(x), expected)


def test_a_scale_for_the_layers_of_peft_is_refused():
    model = get_lora_model(Denoiser(), LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    x = torch.ones(1, 4)
    with pytest.raises(StateError, match="set_scale"):
        model(x, cross_attention_kwargs={"scale": 0.5})
    for without in ({"scale": 1.0}, {}, None):
        assert torch.equal(model(x, cross_attention_kwargs=without), model(x))


def test_what_diffusers_undoes_after_a_refusal_does_not_hide_it():
    """PeftAdapterMixin.load_lora_adapter pops the configuration of the adapter that it could not add."""
    model = get_lora_model(Denoiser(), LoraConfig(target_modules=["to_q"]))
    with pytest.raises(StateError, match="load_adapter"):
        model.peft_config.pop("second")
    assert list(model.adapter_configs) == ["default"]

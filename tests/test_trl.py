"""TRL's trainers with our model: one base in memory, the losses of PEFT's model, checkpoints of adapters alone."""

import contextlib
import copy
import math
from types import SimpleNamespace

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from minipeft import ConfigError, LoraConfig, StateError, get_lora_model, lean, load_adapter
from minipeft.hf import AdapterTrainerMixin
from minipeft.integrations.peft import as_peft_model
from minipeft.integrations.trl import arguments_for_trl

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")
PAIRS = [
    {"prompt": f"w{10 + i} w{11 + i}", "chosen": f" w{20 + i} w{21 + i}", "rejected": f" w{30 + i} w{31 + i}"}
    for i in range(8)
]
ROWS = {
    "SFT": [{"text": f"w{10 + i} w{20 + i} w{30 + i} w{40 + i}"} for i in range(8)],
    "DPO": PAIRS,
    "Reward": PAIRS,
    "KTO": [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": place % 2 == 0}
        for place, row in enumerate(PAIRS)
    ],
}


class SFT(AdapterTrainerMixin, trl.SFTTrainer):
    pass


class DPO(AdapterTrainerMixin, trl.DPOTrainer):
    pass


class KTO(AdapterTrainerMixin, trl.KTOTrainer):
    pass


class GRPO(AdapterTrainerMixin, trl.GRPOTrainer):
    pass


class RLOO(AdapterTrainerMixin, trl.RLOOTrainer):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, as from_pretrained reads it, and an adapter that has been trained."""
    folder = tmp_path_factory.mktemp("trl")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}
    vocabulary = [*special.values(), *(f"w{i}" for i in range(4, 96))]
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "base")
    ids = {"eos_token_id": 1, "pad_token_id": 2, "bos_token_id": 3}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    model = get_lora_model(base(folder), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder / "adapter")
    return folder


def base(folder):
    return LlamaForCausalLM.from_pretrained(folder / "base")


def ours(folder):
    return load_adapter(base(folder), folder / "adapter", is_trainable=True)


def theirs(folder):
    return peft.PeftModel.from_pretrained(base(folder), folder / "adapter", is_trainable=True)


def trained(trainer, model, folder, out, resume=None, **options):
    """The trainer after a few steps, and the losses that it logged."""
    kind = trainer.__mro__[2] if AdapterTrainerMixin in trainer.__mro__ else trainer
    name = kind.__name__.removesuffix("Trainer")
    settings = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False, "save_strategy": "no"}
    settings |= {"gradient_checkpointing": False, "max_length": 16}
    run = trainer(
        model=model,
        args=getattr(trl, f"{name}Config")(output_dir=str(out), **{**settings, **options}),
        train_dataset=Dataset.from_list(copy.deepcopy(ROWS[name])),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "base"),
    )
    run.train(resume_from_checkpoint=resume and str(resume))
    return SimpleNamespace(run=run, losses=[row["loss"] for row in run.state.log_history if "loss" in row])


@pytest.mark.parametrize(
    ("mine", "stock"), [(SFT, trl.SFTTrainer), pytest.param(KTO, trl.KTOTrainer, marks=pytest.mark.slow)]
)
def test_the_losses_are_those_of_pefts_model_and_there_is_one_base(mine, stock, folder, tmp_path):
    found = trained(mine, ours(folder), folder, tmp_path / "ours")
    expected = trained(stock, theirs(folder), folder, tmp_path / "theirs")
    assert len(found.losses) == 5
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    assert len(set(found.losses)) > 1, "it learns"
    assert getattr(found.run, "ref_model", None) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "Reward"])
def test_twenty_steps_have_the_losses_of_pefts_model(name, folder, tmp_path):
    stock = getattr(trl, f"{name}Trainer")
    mine = type(name, (AdapterTrainerMixin, stock), {})
    models = {"ours": ours(folder), "theirs": theirs(folder)}
    if name == "Reward":
        models = reward_models(folder, tmp_path / "adapter")
    found = trained(mine, models["ours"], folder, tmp_path / "ours", max_steps=20)
    expected = trained(stock, models["theirs"], folder, tmp_path / "theirs", max_steps=20)
    assert len(found.losses) == 20
    assert found.losses == pytest.approx(expected.losses, rel=1e-3, abs=1e-4)


def reward_models(folder, adapter):
    """A classifier with a trained adapter and its score head, ours and PEFT's."""

    def scorer():
        torch.manual_seed(5)
        return LlamaForSequenceClassification.from_pretrained(folder / "base", num_labels=1)

    model = get_lora_model(scorer(), LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    assert any(key.endswith("score.weight") for key in model.adapter_state_dict())
    model.save_pretrained(adapter)
    return {
        "ours": load_adapter(scorer(), adapter, is_trainable=True),
        "theirs": peft.PeftModel.from_pretrained(scorer(), adapter, is_trainable=True),
    }


def test_dpo_starts_at_log_2_from_a_trained_adapter_and_its_reference_stays(folder, tmp_path):
    model = ours(folder)
    before = {key: value.clone() for key, value in model.adapter_state_dict("default").items()}
    found = trained(DPO, model, folder, tmp_path)
    assert found.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert model.active_adapter == "default"
    for key, value in model.adapter_state_dict("ref").items():
        assert torch.equal(value, before[key])
    assert any(not torch.equal(value, before[key]) for key, value in model.adapter_state_dict("default").items())


def test_dpo_takes_an_adapter_of_peft_with_a_pattern_for_another_family(folder, tmp_path):
    """Which PEFT passes over; a file says by its tensors what it adapts."""
    options = {"target_modules": ["q_proj", "c_attn"], "init_lora_weights": False, "rank_pattern": {"c_attn": 2}}
    peft.get_peft_model(base(folder), peft.LoraConfig(r=4, **options)).save_pretrained(tmp_path / "theirs")
    model = load_adapter(base(folder), tmp_path / "theirs", is_trainable=True)
    found = trained(DPO, model, folder, tmp_path, max_steps=1)
    assert found.losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_trainer_that_switches_dropout_off_finds_that_of_an_adapter(folder, tmp_path):
    """As DPO does by default, so that model and reference agree at first."""
    options = {"target_modules": "all-linear", "lora_dropout": 0.5, "init_lora_weights": False}
    found = trained(DPO, get_lora_model(base(folder), LoraConfig(**options)), folder, tmp_path, max_steps=1)
    assert found.losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_lean_model_trains_and_says_that_the_loss_is_left_alone(folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="minipeft")
    found = trained(SFT, lean(ours(folder)), folder, tmp_path / "lean")
    expected = trained(SFT, ours(folder), folder, tmp_path / "plain")
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    assert sum("was not asked for its logits" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]},
                                     {"trainable_token_indices": [20, 30]}], ids=str)  # fmt: skip
def test_what_sits_on_the_head_acts_and_trains(options, folder, tmp_path):
    """TRL multiplies by the head's weight itself."""
    model = get_lora_model(base(folder), LoraConfig(r=4, **options))
    before = {key: value.clone() for key, value in model.adapter_state_dict().items()}
    trained(SFT, model, folder, tmp_path)
    moved = [key for key, value in model.adapter_state_dict().items() if not torch.equal(value, before[key])]
    assert any("lm_head" in key or "token" in key for key in moved)


def rewarded(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.mark.parametrize(
    ("mine", "stock"), [(GRPO, trl.GRPOTrainer), pytest.param(RLOO, trl.RLOOTrainer, marks=pytest.mark.slow)]
)
def test_online_training_has_one_base_and_the_losses_of_pefts_model(mine, stock, folder, tmp_path):
    def run(trainer, model, out):
        config = getattr(trl, stock.__name__.removesuffix("Trainer") + "Config")
        settings = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
        settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False, "save_strategy": "no"}
        settings |= {"logging_steps": 1, "beta": 0.1, "learning_rate": 1e-2, "gradient_checkpointing": False}
        made = trainer(
            model=model,
            args=config(output_dir=str(out), **settings),
            reward_funcs=rewarded,
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS]),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "base", padding_side="left"),
        )
        torch.manual_seed(3)
        made.train()
        return made, [(row["loss"], row["grad_norm"]) for row in made.state.log_history if "loss" in row]

    found, losses = run(mine, ours(folder), tmp_path / "ours")
    _, expected = run(stock, theirs(folder), tmp_path / "theirs")
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-3, atol=1e-5)
    assert all(norm > 1e-3 for _, norm in losses), "it learns"
    assert getattr(found, "ref_model", None) is None


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head", "input_layernorm"]},
        {"bias": "all", "modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [20, 30]},
    ],
    ids=str,
)
def test_vllm_gets_the_parameters_of_the_merged_model(options, folder, monkeypatch):
    """What is trained in full, too, under the names that its model has there."""
    from trl.generation.vllm_generation import VLLMGeneration

    torch.manual_seed(0)
    model = get_lora_model(base(folder), LoraConfig(r=2, target_modules=["q_proj"], **options))
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    monkeypatch.setattr(VLLMGeneration, "__init__", lambda self: None)
    sender = VLLMGeneration()
    sender.model, sender.accelerator = as_peft_model(model), None
    sender._dist = SimpleNamespace(gather_params=contextlib.nullcontext, is_fsdp=False)
    sent = {name: value.clone() for name, value in sender._iter_named_params()}
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    assert sent.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(sent[name], value, rtol=0, atol=1e-6, msg=name)


def test_what_trl_cannot_work_with_is_refused_before_training(folder, tmp_path):
    arguments = {
        "args": trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        "train_dataset": Dataset.from_list(PAIRS),
        "processing_class": PreTrainedTokenizerFast.from_pretrained(folder / "base"),
    }
    with pytest.raises(StateError, match="ref_model is not needed"):
        DPO(ours(folder), base(folder), **arguments)
    for model in (ours(folder), as_peft_model(ours(folder))):
        with pytest.raises(StateError, match="Leave ref_model out"):
            trl.DPOTrainer(model, base(folder), **arguments)
    model = ours(folder)
    model.add_adapter("ref", LoraConfig(r=2))
    with pytest.raises(StateError, match="'ref'"):
        DPO(model=model, **arguments)
    other = load_adapter(base(folder), folder / "adapter", "mine", is_trainable=True)
    with pytest.raises(StateError, match="'default'"):
        DPO(model=other, **arguments)
    with pytest.raises(ConfigError, match=r"peft_config.*minipeft\.integrations\.peft\.config"):
        DPO(model=base(folder), peft_config=LoraConfig(r=2), **arguments)


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_a_plain_trainer_that_would_load_a_second_base_is_stopped_before_it_does(name, folder, tmp_path):
    model = ours(folder)
    model.config._name_or_path = "there is none"
    with pytest.raises(StateError, match=f"second base.*as_peft_model.*AdapterTrainerMixin, {name}Trainer"):
        trained(getattr(trl, f"{name}Trainer"), model, folder, tmp_path)
    assert list(model.adapter_configs) == ["default"]


def online(name, model, folder, out, **options):
    options |= {"use_cpu": True, "bf16": False, "report_to": "none", "num_generations": 4}
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(str(out), per_device_train_batch_size=4, **options),
        reward_funcs=rewarded,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "base"),
    )


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_a_plain_online_trainer_is_stopped_only_if_it_needs_a_reference(name, folder, tmp_path):
    with pytest.raises(StateError, match="second base"):
        online(name, ours(folder), folder, tmp_path, beta=0.1)
    assert online(name, ours(folder), folder, tmp_path, beta=0.0).ref_model is None
    assert online(name, as_peft_model(ours(folder)), folder, tmp_path, beta=0.1).ref_model is None


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_a_plain_online_trainer_that_generates_with_vllm_is_stopped(name, folder, tmp_path, monkeypatch):
    """Which would get the base as it is."""
    monkeypatch.setattr(f"trl.trainer.{name.lower()}_trainer.VLLMGeneration", lambda **_: None)
    options = {"use_vllm": True, "vllm_mode": "colocate", "beta": 0.0}
    with pytest.raises(StateError, match="send vLLM the base.*as_peft_model"):
        online(name, ours(folder), folder, tmp_path, **options)
    online(name, as_peft_model(ours(folder)), folder, tmp_path, **options)


def test_a_plain_trainer_that_would_load_a_second_base_for_its_teacher_is_stopped(folder, tmp_path):
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    options = {"use_cpu": True, "bf16": False, "report_to": "none", "num_generations": 4}
    others = {
        "args": SDPOConfig(str(tmp_path), per_device_train_batch_size=4, **options),
        "reward_funcs": rewarded,
        "train_dataset": Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS]),
        "processing_class": PreTrainedTokenizerFast.from_pretrained(folder / "base"),
    }
    with pytest.raises(StateError, match="SDPOTrainer would hold a second base.*as_peft_model"):
        SDPOTrainer(model=ours(folder), **others)
    wrapped = as_peft_model(ours(folder))
    assert SDPOTrainer(model=wrapped, **others).teacher_model is wrapped


def test_a_reference_that_precomputes_needs_no_second_base(folder, tmp_path):
    found = trained(trl.DPOTrainer, ours(folder), folder, tmp_path, precompute_ref_log_probs=True)
    assert found.losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_trainer_that_copies_the_model_is_told_how_not_to(folder, tmp_path):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    for model in (ours(folder), as_peft_model(ours(folder))):
        with pytest.raises(StateError, match="OnlineDPOTrainer copies the model"):
            OnlineDPOTrainer(
                model=model,
                args=OnlineDPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
                reward_funcs=rewarded,
                train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS]),
                processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "base"),
            )


def test_inside_a_peft_model_a_plain_trainer_resumes_exactly_and_restores_the_best(folder, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    found = trained(trl.DPOTrainer, as_peft_model(ours(folder)), folder, tmp_path, **options)
    again = as_peft_model(ours(folder))
    run = trained(trl.DPOTrainer, again, folder, tmp_path, tmp_path / "checkpoint-2", **options)
    assert run.losses == found.losses
    values = found.run.model.get_base_model().adapter_state_dict("default")
    assert all(
        torch.equal(values[key], value) for key, value in again.get_base_model().adapter_state_dict("default").items()
    )
    again.load_adapter(tmp_path / "checkpoint-2", "default")
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(
        torch.equal(best[key], value) for key, value in again.get_base_model().adapter_state_dict("default").items()
    )
    with pytest.raises(ConfigError, match="'strict' is for a new adapter"):
        again.load_adapter(tmp_path / "checkpoint-2", "default", strict=False)


@pytest.mark.parametrize("stock", [True, False])
def test_packed_texts_that_the_model_would_mix_are_refused(stock, folder, tmp_path):
    """OPT takes its positions and its mask from the attention mask alone, so the texts of a row see each other."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    model = get_lora_model(OPTForCausalLM(OPTConfig(word_embed_proj_dim=32, pad_token_id=2, **sizes)), LoraConfig(r=2))
    model.train()
    with pytest.raises(StateError, match=r"OPTForCausalLM lets packed texts attend.*packing=False"):
        trained(trl.SFTTrainer if stock else SFT, model, folder, tmp_path, packing=True)
    assert model.training


def test_packed_texts_have_the_loss_of_padded_ones(folder, tmp_path):
    packed = trained(SFT, ours(folder), folder, tmp_path, packing=True, max_steps=1)
    assert packed.losses == pytest.approx(trained(SFT, ours(folder), folder, tmp_path, max_steps=1,
                                                  per_device_train_batch_size=8).losses, rel=1e-5)  # fmt: skip


def test_the_name_that_trl_trains_is_asked_for_by_name(folder, tmp_path):
    model = as_peft_model(load_adapter(base(folder), folder / "adapter", "mine", is_trainable=True))
    with pytest.raises(StateError, match="no adapter 'default', only 'mine'"):
        trained(trl.DPOTrainer, model, folder, tmp_path)


def test_without_peft_what_needs_no_reference_trains_and_the_rest_says_so(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = ours(folder)
    assert arguments_for_trl(trl.SFTTrainer, (model,), {})["model"] is model
    with pytest.raises(StateError, match="pip install peft"):
        arguments_for_trl(trl.DPOTrainer, (), {"model": model})

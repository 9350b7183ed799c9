"""TRL's trainers with our model: one base in memory, the losses of PEFT's model, checkpoints of adapters alone."""

import copy
import math
from types import SimpleNamespace

import peft
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minipeft import LoraConfig, StateError, get_lora_model, lean, load_adapter
from minipeft.hf import AdapterTrainerMixin
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


@pytest.mark.parametrize(("mine", "stock"), [(SFT, trl.SFTTrainer), (DPO, trl.DPOTrainer), (KTO, trl.KTOTrainer)])
def test_the_losses_are_those_of_pefts_model_and_there_is_one_base(mine, stock, folder, tmp_path):
    found = trained(mine, ours(folder), folder, tmp_path / "ours")
    expected = trained(stock, theirs(folder), folder, tmp_path / "theirs")
    assert len(found.losses) == 5
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    assert len(set(found.losses)) > 1, "it learns"
    assert getattr(found.run, "ref_model", None) is None


def test_dpo_starts_at_log_2_from_a_trained_adapter_and_its_reference_stays(folder, tmp_path):
    model = ours(folder)
    before = {key: value.clone() for key, value in model.adapter_state_dict("default").items()}
    found = trained(DPO, model, folder, tmp_path)
    assert found.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert model.active_adapter == "default"
    for key, value in model.adapter_state_dict("ref").items():
        assert torch.equal(value, before[key])
    assert any(not torch.equal(value, before[key]) for key, value in model.adapter_state_dict("default").items())


def test_checkpoints_hold_adapters_alone_and_are_resumed_exactly(folder, tmp_path):
    trained(DPO, ours(folder), folder, tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2,
            lr_scheduler_type="constant")  # fmt: skip
    checkpoint = tmp_path / "run" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "ref"} <= names
    assert not any(name.startswith(("model", "pytorch_model")) for name in names)
    constant = trained(DPO, ours(folder), folder, tmp_path / "constant", max_steps=4, lr_scheduler_type="constant")
    again = ours(folder)
    run = trained(DPO, again, folder, tmp_path / "run", checkpoint, max_steps=4, lr_scheduler_type="constant")
    assert run.losses[-2:] == constant.losses[-2:]
    for key, value in constant.run.model.get_base_model().adapter_state_dict("default").items():
        assert torch.equal(again.adapter_state_dict("default")[key], value)


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


def rewarded(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


@pytest.mark.parametrize(("mine", "stock"), [(GRPO, trl.GRPOTrainer), (RLOO, trl.RLOOTrainer)])
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
        return made, [row["loss"] for row in made.state.log_history if "loss" in row]

    found, losses = run(mine, ours(folder), tmp_path / "ours")
    _, expected = run(stock, theirs(folder), tmp_path / "theirs")
    assert losses == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert getattr(found, "ref_model", None) is None


def test_what_trl_cannot_work_with_is_refused_before_training(folder, tmp_path):
    arguments = {
        "args": trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        "train_dataset": Dataset.from_list(PAIRS),
        "processing_class": PreTrainedTokenizerFast.from_pretrained(folder / "base"),
    }
    with pytest.raises(StateError, match="ref_model is not needed"):
        DPO(ours(folder), base(folder), **arguments)
    model = ours(folder)
    model.add_adapter("ref", LoraConfig(r=2))
    with pytest.raises(StateError, match="'ref'"):
        DPO(model=model, **arguments)
    other = load_adapter(base(folder), folder / "adapter", "mine", is_trainable=True)
    with pytest.raises(StateError, match="'default'"):
        DPO(model=other, **arguments)


def test_without_peft_what_needs_no_reference_trains_and_the_rest_says_so(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = ours(folder)
    assert arguments_for_trl(trl.SFTTrainer, (model,), {})["model"] is model
    with pytest.raises(StateError, match="pip install peft"):
        arguments_for_trl(trl.DPOTrainer, (), {"model": model})

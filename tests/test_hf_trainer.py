"""transformers' Trainer and an adapted model: adapter checkpoints, exact resuming, the best adapter, equal losses."""

import copy
import functools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import tiny_models
import torch
from datasets import Dataset
from deaths import die_before
from rotation import thinned
from tiny_models import bert_classifier, disturb, foreign_code, gpt2, llama, logits, state_digest, token_ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import minipeft
from minipeft import CheckpointError, LeanError, LoraConfig, StateError, get_lora_model
from minipeft.files import trainer_guard
from minipeft.hf import AdapterTrainer, AdapterTrainerMixin, restore_adapters
from minipeft.integrations import trainer_checkpoint
from minipeft.training.lora_plus import lora_plus_groups

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TRAINERS_OWN = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
DATA = [{"input_ids": row, "labels": row} for row in token_ids(16, 10)]


OPTIONS = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}


def arguments(folder, **options):
    return TrainingArguments(folder, **{**OPTIONS, **options})


adapted = functools.partial(tiny_models.adapted, scale=0, lora_dropout=0.2)


def trained(trainer, **options):
    with foreign_code():  # Trainer's own warnings
        trainer.train(**options)
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def values(model, adapter_name=None):
    return {key: tensor.detach().clone() for key, tensor in model.adapter_state_dict(adapter_name).items()}


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[key], others[key]) for key in some)


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_a_plain_trainer_trains_saves_the_adapter_and_nothing_of_the_base(tmp_path):
    columns = {"input_ids": token_ids(8, 10).tolist(), "labels": token_ids(8, 10).tolist(), "note": ["x"] * 8}
    model = adapted(modules_to_save=["lm_head"])  # whose original is tied to the embedding
    base = {name: t.clone() for name, t in gpt2().state_dict().items()}
    trainer = Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=Dataset.from_dict(columns))
    assert trainer.label_names == ["labels"]
    assert len(trained(trainer)) == 4
    assert files(tmp_path / "checkpoint-2") == {WEIGHTS, CONFIG, "README.md", *TRAINERS_OWN}
    trainer.save_model(tmp_path / "final")
    assert files(tmp_path / "final") == {WEIGHTS, CONFIG, "README.md", "training_args.bin"}
    keys = safetensors.torch.load_file(tmp_path / "final" / WEIGHTS).keys()
    assert all(".lora_" in key or ".lm_head." in key for key in keys)
    loaded = minipeft.load_adapter(gpt2(), tmp_path / "final")
    assert torch.equal(logits(loaded), logits(model.eval()))
    plain = model.unload().state_dict()
    assert all(torch.equal(plain[name], base[name]) for name in base)


def test_a_plain_trainer_says_at_its_first_checkpoint_that_it_cannot_resume(tmp_path, caplog):
    trainer_guard._say_no_resume.cache_clear()
    trained(Trainer(adapted(), arguments(tmp_path, max_steps=2, save_steps=1), train_dataset=DATA))
    said = [record.message for record in caplog.records if "cannot resume" in record.message]
    assert len(said) == 1
    assert "AdapterTrainer" in said[0]


def test_a_plain_trainer_does_not_resume_from_a_fresh_adapter(tmp_path):
    trained(Trainer(adapted(), arguments(tmp_path, max_steps=2), train_dataset=DATA))
    model = adapted()
    before = state_digest(model)
    with pytest.raises(ValueError, match="checkpoint index"):
        Trainer(model, arguments(tmp_path), train_dataset=DATA).train(resume_from_checkpoint=True)
    assert state_digest(model) == before


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_plain_trainer_that_could_not_load_the_best_adapter_is_told_at_its_first_checkpoint(tmp_path, name):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = Trainer(
        adapted(adapter_name=name), arguments(tmp_path, **options), train_dataset=DATA, eval_dataset=DATA[:4]
    )
    with pytest.raises(
        StateError, match=r"minipeft\.hf\.AdapterTrainer, or class MyTrainer\(AdapterTrainerMixin, Trainer"
    ):
        trained(trainer)
    assert trainer.state.global_step == 2
    assert not any(path.endswith(WEIGHTS) for path in files(tmp_path))


def test_a_state_dict_given_to_save_pretrained_is_where_the_values_come_from(tmp_path):
    model, other = adapted(), disturb(adapted())
    model.save_pretrained(tmp_path, state_dict=other.state_dict(), is_main_process=True)
    assert same(safetensors.torch.load_file(tmp_path / WEIGHTS), values(other))
    with pytest.raises(CheckpointError, match="state_dict lacks"):
        model.save_pretrained(tmp_path / "none", state_dict={})


def test_the_trainer_of_transformers_4_passes_safe_serialization(tmp_path):
    class Old(Trainer):
        def _save(self, output_dir=None, state_dict=None):
            self.model.save_pretrained(output_dir, state_dict=state_dict, safe_serialization=self.save_safetensors)

    trainer = Old(adapted(), arguments(tmp_path, max_steps=2), train_dataset=DATA)
    trainer.save_safetensors = True
    trained(trainer)
    assert WEIGHTS in files(tmp_path / "checkpoint-2")
    trainer.save_safetensors = False
    with pytest.raises(minipeft.ConfigError, match="safe_serialization must be True"):
        trainer.save_model(tmp_path / "final")


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_after_unloading_trainer_saves_a_whole_model_again(tmp_path, how):
    model = adapted()
    trainer = AdapterTrainer(model, arguments(tmp_path, max_steps=2, save_strategy="no"), train_dataset=DATA)
    trained(trainer)
    getattr(model, how)()
    with foreign_code():
        trainer.save_model(tmp_path / "whole")
    assert not files(tmp_path / "whole") & {WEIGHTS, CONFIG}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("cls", [Trainer, AdapterTrainer])
def test_trainer_s_own_model_card_stays_that_of_an_adapter(tmp_path, cls, saved):
    trainer = cls(adapted(), arguments(tmp_path), train_dataset=DATA)
    if saved:
        trainer.save_model()
    with foreign_code():
        trainer.create_model_card(tags=["mine"], model_name="x")
    text = (tmp_path / "README.md").read_text()
    assert "Training procedure" in text
    assert "- mine" in text.splitlines()
    if saved or cls is AdapterTrainer:  # a plain one asks the model only where it finds an adapter's card
        assert "library_name: peft" in text
        assert {"- minipeft", "- lora"} <= set(text.splitlines())


@pytest.mark.parametrize(("make", "how"), thinned(([gpt2, llama], ["path", "last"]), [(gpt2, "path"), (llama, "last")]))
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, make, how):
    options = {"target_modules": "all-linear", "bias": "lora_only"} if make is gpt2 else {}
    whole = adapted(make(), **options)
    losses = trained(AdapterTrainer(whole, arguments(tmp_path), train_dataset=DATA))
    checkpoint = tmp_path / "checkpoint-4"
    if how == "last":
        (tmp_path / "checkpoint-6").rename(tmp_path / "elsewhere")
    torch.manual_seed(99)
    again = disturb(adapted(make(), **options))  # other values, so that nothing but the file can bring the right ones
    resumed = AdapterTrainer(again, arguments(tmp_path), train_dataset=DATA)
    tail = trained(resumed, resume_from_checkpoint=True if how == "last" else str(checkpoint))
    assert tail == losses  # the history is the checkpoint's, and then our own
    assert same(values(again), values(whole))


def test_a_run_with_lora_plus_resumes_too(tmp_path):
    def run(model, **options):
        optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=1e-3, ratio=8))
        trainer = AdapterTrainer(model, arguments(tmp_path), train_dataset=DATA, optimizers=(optimizer, None))
        return trained(trainer, **options), [group["lr"] for group in optimizer.param_groups], values(model)

    losses, rates, end = run(adapted())
    tail, resumed_rates, resumed_end = run(disturb(adapted()), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tail, resumed_rates) == (losses, rates)
    assert same(resumed_end, end)


def test_dropout_matters_to_the_test_above(tmp_path):
    losses = {
        p: trained(AdapterTrainer(adapted(lora_dropout=p), arguments(tmp_path, save_strategy="no"), train_dataset=DATA))
        for p in (0.0, 0.2)
    }
    assert losses[0.0] != losses[0.2]


def test_a_checkpoint_without_optimizer_brings_the_values_back(tmp_path):
    first = adapted()
    trained(AdapterTrainer(first, arguments(tmp_path, max_steps=2, save_only_model=True), train_dataset=DATA))
    assert not files(tmp_path / "checkpoint-2") & {"optimizer.pt", "rng_state.pth"}
    again = disturb(adapted())
    restore_adapters(again, tmp_path / "checkpoint-2")
    assert same(values(again), values(first))
    trainer = AdapterTrainer(adapted(), arguments(tmp_path, max_steps=2), train_dataset=DATA)
    with pytest.warns(UserWarning, match="holds no optimizer, .* start anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("name", "said"), [("scheduler.pt", "no optimizer, learning rate, as"), ("rng_state.pth", "no random numbers, as")]
)
def test_a_checkpoint_that_lost_a_part_of_its_training_state_says_what_starts_anew(name, said, checkpoint):
    (checkpoint / name).unlink()
    trainer = AdapterTrainer(adapted(), arguments(checkpoint.parent), train_dataset=DATA)
    with pytest.warns(UserWarning, match=f"{said} .* start anew"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("callbacks", [None, [], {"minipeft": 5}])
def test_a_state_of_another_form_is_refused(callbacks, checkpoint):
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"stateful_callbacks": callbacks}), "utf-8")
    trainer = AdapterTrainer(adapted(), arguments(checkpoint.parent), train_dataset=DATA)
    with pytest.raises(CheckpointError, match=r"trainer_state.json cannot be read"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_another_number_of_processes_is_said(checkpoint):
    path = checkpoint / "trainer_state.json"
    path.write_text(path.read_text("utf-8").replace('"processes": 1', '"processes": 2'), "utf-8")
    trainer = AdapterTrainer(adapted(), arguments(checkpoint.parent, max_steps=2), train_dataset=DATA)
    with pytest.warns(UserWarning, match="run in 2 processes, and this one has 1: random numbers start anew"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The folder of a run, which nobody writes into."""
    folder = tmp_path_factory.mktemp("two-steps")
    trained(AdapterTrainer(adapted(), arguments(folder, max_steps=2), train_dataset=DATA))
    return folder


@pytest.fixture
def checkpoint(two_steps, tmp_path):
    return shutil.copytree(two_steps / "checkpoint-2", tmp_path / "checkpoint-2")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: adapted(gpt2(seed=5)), "trained on another base"),
        (lambda: adapted(r=8), "r is 4 there and 8 here"),
        (lambda: adapted(lora_dropout=0.0), "lora_dropout is 0.2 there"),
        (lambda: adapted(target_modules=["c_attn", "c_proj"]), "target_modules"),
        (lambda: adapted(adapter_name="other"), "holds the adapters 'default', and the model has 'other'"),
        (lambda: merged(adapted()), "unmerge_adapter"),
    ],
)
def test_another_base_configuration_or_adapter_is_not_resumed(checkpoint, make, said):
    model = make()
    before = state_digest(model)
    trainer = AdapterTrainer(model, arguments(checkpoint.parent), train_dataset=DATA)
    with pytest.raises(minipeft.MinipeftError, match=said):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert state_digest(model) == before


def merged(model):
    disturb(model).merge_adapter()
    return model


@pytest.mark.parametrize("left", [None, '{"epoch": 0.25, "glo'])
def test_a_checkpoint_whose_saving_was_cut_off_is_not_resumed(left, checkpoint):
    """Trainer writes trainer_state.json last; what is saved before it may be missing, too."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (checkpoint / name).unlink()
    if left is not None:
        (checkpoint / "trainer_state.json").write_text(left, "utf-8")
    model = disturb(adapted())
    before = state_digest(model)
    trainer = AdapterTrainer(model, arguments(checkpoint.parent), train_dataset=DATA)
    with pytest.raises(CheckpointError, match=r"saving it was cut off|trainer_state.json cannot be read"):
        trainer.train(resume_from_checkpoint=True)
    assert state_digest(model) == before


def raiser(error):
    def act(*args):
        raise error

    return act


def inside_peft(model, *args, **options):
    pytest.importorskip("peft")
    from minipeft.integrations.peft import as_peft_model

    return Trainer(as_peft_model(model), *args, **options)


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("make", "said"), [(AdapterTrainer, "saving it was cut off"), (inside_peft, "trainer_state.json")]
)
@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_save_over_an_older_checkpoint_that_is_cut_off_is_not_resumed(make, said, method, tmp_path, monkeypatch):
    """Else the new run's adapter would go on with the older one's optimizer and place in the data."""
    trained(make(adapted(), arguments(tmp_path, max_steps=2), train_dataset=DATA))
    trainer = make(adapted(seed=5), arguments(tmp_path, max_steps=2), train_dataset=DATA)
    monkeypatch.setattr(trainer, method, raiser(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        trained(trainer)
    with pytest.raises((CheckpointError, FileNotFoundError), match=said):
        trained(make(adapted(seed=5), arguments(tmp_path), train_dataset=DATA), resume_from_checkpoint=True)
    trained(make(adapted(seed=5), arguments(tmp_path, max_steps=2), train_dataset=DATA))  # a repeat makes it whole
    trained(make(adapted(seed=5), arguments(tmp_path), train_dataset=DATA), resume_from_checkpoint=True)


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in files(folder) if not Path(name).name.startswith(".")}


@pytest.mark.slow
@pytest.mark.parametrize("make", [AdapterTrainer, inside_peft])
def test_a_save_over_an_older_checkpoint_that_is_killed_anywhere_is_not_resumed(make, tmp_path, monkeypatch):
    """Before each change of a file: what tells a checkpoint complete is there only with all files of one run."""
    folder, save = tmp_path / "checkpoint-2", torch.save

    def is_change(event, args):
        writes = event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        return (writes or event in {"os.rename", "os.remove"}) and str(folder) in str(args[0])

    def audited(value, path, **options):  # torch writes without Python's knowledge
        sys.audit("open", path, "w", os.O_WRONLY)
        save(value, path, **options)

    def run(seed):
        trained(make(adapted(seed=seed), arguments(tmp_path, max_steps=2), train_dataset=DATA))
        return bytes_of(folder)

    monkeypatch.setattr(torch, "save", audited)
    whole = [run(5), run(3)]
    for number in range(1, 99):
        with foreign_code():
            child = os.fork()
        if child == 0:
            die_before(number, is_change)
            run(5)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        assert (folder / "trainer_state.json").exists() <= (bytes_of(folder) in whole), number
        assert run(3) == whole[1]  # a repeat succeeds
        assert files(folder) == set(whole[1])
    assert number > 12


def test_values_alone_saved_over_an_older_checkpoint_do_not_go_on_with_its_optimizer(tmp_path):
    trained(AdapterTrainer(adapted(), arguments(tmp_path, max_steps=2), train_dataset=DATA))
    options = {"max_steps": 2, "save_only_model": True}
    trained(AdapterTrainer(adapted(seed=5), arguments(tmp_path, **options), train_dataset=DATA))
    trainer = AdapterTrainer(adapted(seed=5), arguments(tmp_path), train_dataset=DATA)
    with pytest.warns(UserWarning, match="holds no optimizer") as said:
        trainer.train(resume_from_checkpoint=True)
    assert said[0].filename == __file__


@pytest.mark.parametrize("kind", [AdapterTrainer, Trainer])
def test_a_trainer_that_saves_the_adapter_once_more_into_its_checkpoint_keeps_that_whole(kind, tmp_path):
    class SavesAgain(kind):
        def _save_checkpoint(self, *args, **options):
            super()._save_checkpoint(*args, **options)
            self.model.save_pretrained(tmp_path / "checkpoint-2")

    trained(SavesAgain(adapted(), arguments(tmp_path, max_steps=2), train_dataset=DATA))
    assert {"trainer_state.json", "optimizer.pt", "scheduler.pt"} <= files(tmp_path / "checkpoint-2")
    trained(AdapterTrainer(adapted(), arguments(tmp_path), train_dataset=DATA), resume_from_checkpoint=True)


def test_a_checkpoint_without_adapter_or_of_a_whole_model_is_not_resumed(tmp_path):
    gpt2().save_pretrained(tmp_path / "whole")
    trainer = AdapterTrainer(adapted(), arguments(tmp_path), train_dataset=DATA)
    for folder, said in (("whole", "holds the adapters none"), ("nothing", "not a directory")):
        with pytest.raises(CheckpointError, match=said):
            trainer.train(resume_from_checkpoint=str(tmp_path / folder))
    with pytest.raises(StateError, match="not adapted"):
        restore_adapters(gpt2(), tmp_path)


def test_a_damaged_adapter_among_several_leaves_all_as_they_are(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path)
    (tmp_path / "second" / WEIGHTS).write_bytes(b"")
    disturb(model)
    before = state_digest(model)
    with pytest.raises(CheckpointError):
        restore_adapters(model, tmp_path)
    assert state_digest(model) == before


def test_a_model_that_is_not_adapted_resumes_as_with_trainer(tmp_path):
    losses = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = AdapterTrainer(gpt2(), arguments(tmp_path, max_steps=4), train_dataset=DATA)
        losses.append(trained(trainer, resume_from_checkpoint=resume))
    assert losses[0] == losses[1]


def test_the_mixin_stands_first():
    with pytest.raises(TypeError, match="must come before Trainer"):
        type("Wrong", (Trainer, AdapterTrainerMixin), {})
    right = type("Right", (AdapterTrainerMixin, type("Mine", (Trainer,), {})), {})
    assert type("Derived", (right,), {"_load_best_model": right._load_best_model}).restores_adapters


def test_the_best_checkpoint_is_known_before_fsdp_writes_its_shards(tmp_path, monkeypatch):
    """With SHARDED_STATE_DICT Trainer saves nothing before it notes which checkpoint is the best, if the folder exists."""
    trainer = AdapterTrainer(adapted(), arguments(tmp_path), train_dataset=DATA)
    trainer.is_fsdp_enabled = True
    for method in ("save_model", "_save_optimizer_and_scheduler"):
        monkeypatch.setattr(trainer, method, lambda *_, **__: None)
    trainer.state.global_step = trainer.state.best_global_step = 2
    trainer._save_checkpoint(trainer.model, None)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("name", ["default", "other"])
def test_the_best_adapter_is_back_at_the_end(tmp_path, name):
    scores = iter([1.0, 3.0, 2.0])
    model = adapted(adapter_name=name)
    trainer = AdapterTrainer(
        model,
        arguments(
            tmp_path,
            load_best_model_at_end=True,
            eval_strategy="steps",
            eval_steps=2,
            metric_for_best_model="score",
            greater_is_better=True,
        ),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    parameters = [id(p) for p in model.parameters()]
    trained(trainer)
    folder = "" if name == "default" else name
    best, last = (safetensors.torch.load_file(tmp_path / f"checkpoint-{n}" / folder / WEIGHTS) for n in (4, 6))
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert same(values(model), best)
    assert not same(best, last)
    assert [id(p) for p in model.parameters()] == parameters  # so that an optimizer still holds them
    assert all(p.requires_grad for key, p in model.adapter_state_dict().items())


def two_adapters(active="second"):
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, lora_dropout=0.1))
    disturb(model)
    model.set_adapter(active)
    return model


def test_every_adapter_is_in_every_checkpoint_and_the_active_one_trains(tmp_path):
    model = two_adapters()
    start = values(model, "default")
    losses = trained(AdapterTrainer(model, arguments(tmp_path), train_dataset=DATA))
    assert same(values(model, "default"), start)
    assert files(tmp_path / "checkpoint-2") >= {WEIGHTS, f"second/{WEIGHTS}", f"second/{CONFIG}"}
    again = disturb(two_adapters())
    tail = trained(
        AdapterTrainer(again, arguments(tmp_path), train_dataset=DATA),
        resume_from_checkpoint=str(tmp_path / "checkpoint-4"),
    )
    assert tail == losses
    for name in ("default", "second"):
        assert same(values(again, name), values(model, name))


def test_the_optimizer_of_one_adapter_does_not_go_on_with_another(tmp_path):
    trained(AdapterTrainer(two_adapters(), arguments(tmp_path, max_steps=2), train_dataset=DATA))
    record = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert record["minipeft"]["attributes"] == {"active_adapters": ["second"], "processes": 1}
    trainer = AdapterTrainer(two_adapters("default"), arguments(tmp_path), train_dataset=DATA)
    with pytest.raises(CheckpointError, match=r"'second' was active there, and here it is 'default'; .*set_adapter\("):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "record", [{"active_adapters": 7}, {"active_adapters": [["second"]]}, {"processes": "two"}, []]
)
def test_a_record_of_the_wrong_types_is_refused(record, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    state = {"stateful_callbacks": {"minipeft": {"args": {}, "attributes": record}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"trainer_state\.json (is damaged: .* wrong types|cannot be read)"):
        trainer_checkpoint.resume(model, tmp_path, 1)


def test_twenty_steps_give_the_same_losses_as_with_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(lora_dropout=0.0, target_modules=["c_attn", "c_fc"])
    with foreign_code():
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM")
        reference = peft.get_peft_model(gpt2(), config)
        peft.set_peft_model_state_dict(reference, values(model))
        options = arguments(tmp_path, max_steps=20, save_strategy="no", weight_decay=0.01, warmup_steps=3)
        theirs = Trainer(reference, options, train_dataset=DATA)
        theirs.train()
    ours = trained(Trainer(model, copy.deepcopy(options), train_dataset=DATA))
    expected = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert len(ours) == 20
    assert expected[0] > expected[-1] + 0.1  # there is something to compare
    assert [loss for _, loss in ours] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_gradient_checkpointing_changes_no_loss(tmp_path, make):
    def losses(**options):
        with foreign_code():  # the option has a new name since transformers 5
            options = arguments(tmp_path, max_steps=4, save_strategy="no", **options)
        return [loss for _, loss in trained(Trainer(adapted(make(), lora_dropout=0.0), options, train_dataset=DATA))]

    plain = losses()
    assert plain[0] != plain[-1]
    for reentrant in (False, True):
        checkpointed = losses(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert checkpointed == pytest.approx(plain, rel=1e-5)


def uneven():
    """Rows with different numbers of labels, so that a mean of means is not the mean."""
    rows = []
    for index, row in enumerate(token_ids(16, 10)):
        labels = row.clone()
        labels[: index % 8] = -100
        rows.append({"input_ids": row, "labels": labels})
    return rows


@pytest.mark.parametrize("make_lean", [False, True])
def test_accumulated_small_batches_are_one_big_batch(tmp_path, make_lean):
    def run(size, steps):
        model = adapted(lora_dropout=0.0)
        model = minipeft.lean(model) if make_lean else model
        options = arguments(
            tmp_path, max_steps=4, save_strategy="no", optim="sgd", learning_rate=0.5,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        return [loss for _, loss in trained(Trainer(model, options, train_dataset=uneven()))], values(model)

    (big, whole), (small, parts) = run(8, 1), run(2, 4)
    assert small == pytest.approx(big, rel=1e-6)
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-4, atol=1e-6)


def test_a_lean_model_gives_no_logits_in_training_and_all_of_them_in_evaluation(tmp_path):
    seen = []

    class Watching(AdapterTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
            seen.append((model.training, outputs.logits is None))
            return (loss, outputs) if return_outputs else loss

    model = minipeft.lean(adapted())
    shapes = []
    trainer = Watching(
        model,
        arguments(tmp_path, max_steps=2),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        compute_metrics=lambda p: shapes.append(p.predictions.shape) or {},
    )
    trained(trainer)
    result = trainer.evaluate()
    assert set(seen) == {(True, True), (False, False)}
    assert shapes == [(4, 10, 100)]
    whole = get_lora_model(gpt2(), LoraConfig(r=4))
    whole.load_state_dict(model.state_dict())
    expected = Trainer(whole, arguments(tmp_path), eval_dataset=DATA[:4]).evaluate()["eval_loss"]
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-6)


def own_loss(outputs, labels, **options):
    return torch.nn.functional.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_loss_of_ones_own_that_needs_logits_says_how_a_lean_model_gives_them(tmp_path):
    class Reading(AdapterTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            return own_loss({"logits": model(**inputs).logits}, inputs["labels"])

    def losses(cls, **options):
        model = minipeft.lean(adapted(lora_dropout=0.0), **options)
        run = arguments(tmp_path, max_steps=2, save_strategy="no")
        own = own_loss if cls is AdapterTrainer else None
        return trained(cls(model, run, train_dataset=DATA, compute_loss_func=own))

    with pytest.raises(LeanError, match=r"Reading: TypeError in the loss .*chunked_loss=False"):
        losses(Reading)
    whole = losses(Reading, chunked_loss=False)
    assert losses(AdapterTrainer) == whole  # whose model is given no labels


def test_a_classifier_trains_its_head_and_resumes(tmp_path):
    data = [{"input_ids": row, "labels": int(row[0]) % 3} for row in token_ids(12, 8)]

    def make():
        return adapted(bert_classifier(), modules_to_save=["classifier"])

    whole = make()
    trainer = AdapterTrainer(whole, arguments(tmp_path, max_steps=4), train_dataset=data)
    losses = trained(trainer)
    assert trainer.label_names == ["labels"]
    again = disturb(make())
    tail = trained(
        AdapterTrainer(again, arguments(tmp_path, max_steps=4), train_dataset=data),
        resume_from_checkpoint=str(tmp_path / "checkpoint-2"),
    )
    assert tail == losses
    assert same(values(again), values(whole))


@pytest.mark.parametrize("options", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["Norm"]}])
def test_a_run_of_pefts_goes_on(options, tmp_path):
    """PEFT names heads that the model does not have, and takes every module whose name ends with an entry."""
    peft = pytest.importorskip("peft")
    data = [{"input_ids": row, "labels": int(row[0]) % 3} for row in token_ids(12, 8)]
    config = peft.LoraConfig(r=4, target_modules=["query"], **options)
    with foreign_code():
        torch.manual_seed(0)
        theirs = Trainer(
            peft.get_peft_model(bert_classifier(), config), arguments(tmp_path, max_steps=4), train_dataset=data
        )
    losses, checkpoint = trained(theirs), tmp_path / "checkpoint-2"
    model = minipeft.load_adapter(bert_classifier(), checkpoint, is_trainable=True)
    tail = trained(
        AdapterTrainer(disturb(model), arguments(tmp_path, max_steps=4), train_dataset=data),
        resume_from_checkpoint=str(checkpoint),
    )
    assert [loss for _, loss in tail] == pytest.approx([loss for _, loss in losses], abs=1e-5)


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {**{f"w{index}": index for index in range(98)}, "<pad>": 98, "<eos>": 99}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="w0", model_max_length=64
    )


def supervised(folder, model, mixin=AdapterTrainerMixin, **options):
    """TRL's SFTTrainer on sentences of a hundred words; its own default checkpoints gradients."""
    with foreign_code():
        trl = pytest.importorskip("trl")
        data = Dataset.from_dict({"text": [" ".join(f"w{t % 98}" for t in r.tolist()) for r in token_ids(16, 10)]})
        config = trl.SFTConfig(folder, **{**OPTIONS, "max_length": 16, "bf16": False, **options})
        trainer = type("Supervised", (trl.SFTTrainer,) if mixin is None else (mixin, trl.SFTTrainer), {})
        return trainer(model, config, train_dataset=data, processing_class=word_tokenizer())


@pytest.mark.parametrize("make", [gpt2, pytest.param(llama, marks=pytest.mark.slow)])
def test_sft_trainer_resumes_bit_for_bit_and_saves_the_adapter_alone(tmp_path, make):
    whole = adapted(make())
    losses = trained(supervised(tmp_path, whole))
    assert len({loss for _, loss in losses}) == 6
    saved = files(tmp_path / "checkpoint-4")
    assert saved >= {WEIGHTS, CONFIG}
    assert not [name for name in saved if "model" in name and name != WEIGHTS]
    again = disturb(adapted(make()))
    tail = trained(supervised(tmp_path, again), resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert tail == losses
    assert same(values(again), values(whole))
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


def test_sft_trainer_gives_the_losses_that_it_gives_with_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(lora_dropout=0.0)
    with foreign_code():
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], task_type="CAUSAL_LM")
        reference = peft.get_peft_model(gpt2(), config)
        peft.set_peft_model_state_dict(reference, values(model))
    expected, ours = (
        [loss for _, loss in trained(supervised(tmp_path, subject, None, max_steps=20, save_strategy="no"))]
        for subject in (reference, model)
    )
    assert sum(expected[8:16]) < sum(expected[:8]) - 0.1  # the second epoch, and there is something to compare
    assert ours == pytest.approx(expected, abs=1e-5)


def test_sft_trainer_computes_its_own_loss_so_a_lean_model_leaves_it_that(tmp_path):
    plain = trained(supervised(tmp_path, adapted(lora_dropout=0.0), None, save_strategy="no"))
    for options in ({}, {"chunked_loss": False}):
        lean = minipeft.lean(adapted(lora_dropout=0.0), **options)
        losses = trained(supervised(tmp_path, lean, None, save_strategy="no"))
        assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in plain], rel=1e-5)

"""AdaLoRA in transformers' Trainer: its loss and its allocation of ranks, as a loop written by hand has them."""

import copy
import json
import shutil

import pytest
import safetensors.torch
import torch
from rotation import thinned
from test_hf_trainer import CONFIG, DATA, WEIGHTS, arguments, files, trained, uneven
from tiny_models import foreign_code, gpt2, llama, state_digest
from torch.utils.data import SequentialSampler
from transformers import Trainer

import minipeft
from minipeft import AdaLoraConfig, CheckpointError, LoraConfig, StateError, get_adapter_model
from minipeft.hf import AdapterTrainer
from minipeft.injection.step_hooks import has_schedule, schedule_state
from minipeft.integrations.trainer_checkpoint import SCHEDULE_FILE

SCHEDULE = {"total_step": 8, "tinit": 1, "tfinal": 3, "deltaT": 2, "init_r": 4, "target_r": 1, "orth_reg_weight": 0.3}


BATCH = {key: torch.stack([row[key] for row in DATA[:4]]) for key in ("input_ids", "labels")}


def scheduled(seed=0, **options):
    """Of a class whose name tells Trainer that its loss shifts the labels; it counts one too many for GPT2LMHeadModel."""
    torch.manual_seed(seed)
    targets = ["q_proj", "down_proj"]
    return get_adapter_model(llama(), AdaLoraConfig(**{"target_modules": targets, **SCHEDULE, **options}))


def spectrum(model):
    return torch.cat([t.detach().flatten() for k, t in model.adapter_state_dict().items() if k.endswith("lora_E")])


def ranks(model):
    return int((spectrum(model) != 0).sum())


class InOrder(AdapterTrainer):
    """Takes its rows as they come, and counts what is left of the spectrum after each step."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def _after_step(self):
        super()._after_step()
        self.left = [*getattr(self, "left", []), ranks(self.model)]


def sgd(folder, **options):
    plain = {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant", "save_strategy": "no"}
    return arguments(
        folder, **{"max_steps": 8, "max_grad_norm": 0.5, "per_device_train_batch_size": 2, **plain, **options}
    )


def by_hand(model, rows, accumulated, per_token):
    """Steps of `accumulated` batches of two rows, fewer at the end of an epoch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, left, start = torch.optim.SGD(parameters, lr=0.3), [], [], 0
    model.train()
    for step in range(SCHEDULE["total_step"]):
        batches = [rows[i : i + 2] for i in range(start, min(start + 2 * accumulated, len(rows)), 2)]
        start = (start + 2 * accumulated) % len(rows) if start + 2 * accumulated < len(rows) else 0
        sums = []
        for batch in batches:
            ids, labels = (torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids).logits[:, :-1]
            flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            sums.append((flat, int((labels[:, 1:] != -100).sum())))
        tokens = sum(count for _, count in sums)
        mean = sum(s / tokens for s, _ in sums) if per_token else sum(s / count for s, count in sums) / len(sums)
        loss = mean + minipeft.extra_loss(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        minipeft.after_step(model, step)
        optimizer.zero_grad()
        losses.append(loss.item())
        left.append(ranks(model))
    return losses, left


@pytest.mark.parametrize(("per_token", "accumulated"), thinned(([True, False], [1, 3]), [(True, 3), (False, 1)]))
def test_it_is_the_loop_written_by_hand(tmp_path, accumulated, per_token):
    """Also where an epoch ends within an accumulation: sixteen rows are eight batches, or steps of 3, 3 and 2."""
    rows, model = uneven(), scheduled()
    reference = copy.deepcopy(model)
    expected, expected_left = by_hand(reference, rows, accumulated, per_token)
    trainer = InOrder(model, sgd(tmp_path, gradient_accumulation_steps=accumulated), train_dataset=rows)
    trainer.model_accepts_loss_kwargs = per_token
    assert [loss for _, loss in trained(trainer)] == pytest.approx(expected, rel=1e-5)
    assert trainer.left == expected_left
    assert (expected_left[0], expected_left[-1]) == (16, 4)
    for key, tensor in model.adapter_state_dict().items():
        torch.testing.assert_close(tensor, reference.adapter_state_dict()[key], rtol=1e-4, atol=1e-6)


def test_a_loss_function_of_ones_own_is_not_divided_either(tmp_path):
    def own(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"][:, :-1]
        flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return flat / num_items_in_batch

    expected, _ = by_hand(scheduled(), uneven(), 3, True)
    options = sgd(tmp_path, gradient_accumulation_steps=3)
    trainer = InOrder(scheduled(), options, train_dataset=uneven(), compute_loss_func=own)
    assert [loss for _, loss in trained(trainer)] == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_has_the_plain_loss(tmp_path):
    model = scheduled(init_lora_weights=False)
    trainer = AdapterTrainer(model, arguments(tmp_path), eval_dataset=DATA[:4])
    with torch.no_grad():
        expected = model(**BATCH).loss.item()
        assert minipeft.extra_loss(model) > 0.1
    with foreign_code():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with dropout and a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("whole")
    model = scheduled(lora_dropout=0.2)
    trainer = AdapterTrainer(model, arguments(folder, max_steps=8, save_steps=1), train_dataset=DATA)
    losses = trained(trainer)
    trainer.save_model(folder / "final")
    return folder, losses


@pytest.mark.parametrize("step", [1, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 6)), 5, 7])
def test_a_resumed_run_ends_with_the_same_files(whole, tmp_path, step):
    """From before the first allocation, from between two, and from after the last one."""
    folder, losses = whole
    model = scheduled(seed=5, lora_dropout=0.2)
    trainer = AdapterTrainer(model, arguments(tmp_path, max_steps=8, save_steps=1), train_dataset=DATA)
    assert trained(trainer, resume_from_checkpoint=str(folder / f"checkpoint-{step}")) == losses
    trainer.save_model(tmp_path / "final")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "final" / name).read_bytes() == (folder / "final" / name).read_bytes()


def test_checkpoints_hold_all_components_and_the_final_adapter_what_is_left(whole):
    folder, _ = whole
    for name, count in (("checkpoint-7", 16), ("final", 4)):
        weights = safetensors.torch.load_file(folder / name / WEIGHTS)
        assert sum(len(t) for key, t in weights.items() if key.endswith("lora_E")) == count
        pattern = json.loads((folder / name / CONFIG).read_text())["rank_pattern"]
        assert (pattern is None) == (count == 16)
        minipeft.load_adapter(llama(), folder / name)
    assert SCHEDULE_FILE in files(folder / "checkpoint-7")
    assert SCHEDULE_FILE not in files(folder / "final")


def damaged(checkpoint, how):
    path = checkpoint / SCHEDULE_FILE
    tensors = safetensors.torch.load_file(path)
    if how == "gone":
        path.unlink()
        return "state of the schedule of adapter 'default' is not there"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-9])
        return "this run cannot resume from"
    name = next(key for key in tensors if key.endswith("lora_A.sensitivity"))
    if how == "shape":
        tensors[name] = tensors[name][:1]
    elif how == "half":
        del tensors[name]
    else:
        tensors["default/elsewhere/left"] = torch.ones(4, dtype=torch.bool)
    safetensors.torch.save_file(tensors, path)
    return "no adapter on 'elsewhere'" if how == "elsewhere" else "of another AdaLoRA's schedule"


@pytest.mark.parametrize("how", ["gone", "cut", "shape", "half", "elsewhere"])
def test_without_the_state_of_its_schedule_no_run_goes_on_and_nothing_changes(whole, tmp_path, how):
    shutil.copytree(whole[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    said = damaged(tmp_path / "checkpoint-4", how)
    model = scheduled(seed=5, lora_dropout=0.2)
    before = state_digest(model)
    trainer = AdapterTrainer(model, arguments(tmp_path, max_steps=8), train_dataset=DATA)
    with pytest.raises(CheckpointError, match=said):
        trainer.train(resume_from_checkpoint=True)
    assert state_digest(model) == before


@pytest.mark.parametrize("save_only_model", [False, True])
def test_the_best_adapter_is_back_at_the_end_with_the_ranks_it_had(tmp_path, save_only_model):
    scores = iter([1.0, 3.0, 2.0, 0.0])
    model = scheduled()
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 8}
    options |= {"metric_for_best_model": "score", "save_only_model": save_only_model}
    trainer = AdapterTrainer(
        model, arguments(tmp_path, **options), train_dataset=DATA, eval_dataset=DATA[:4],
        compute_metrics=lambda prediction: {"score": next(scores)},
    )  # fmt: skip
    trained(trainer)
    best, last = (safetensors.torch.load_file(tmp_path / f"checkpoint-{n}" / WEIGHTS) for n in (4, 8))
    now = model.adapter_state_dict()
    assert all(torch.equal(now[key], best[key]) for key in now)
    assert ranks(model) > sum(int((t != 0).sum()) for key, t in last.items() if key.endswith("lora_E"))
    assert (tmp_path / "checkpoint-4" / SCHEDULE_FILE).exists() != save_only_model


def test_a_resting_adapter_with_a_schedule_needs_none(tmp_path):
    def make():
        model = scheduled()
        model.add_adapter("plain", LoraConfig(r=2))
        model.set_adapter("plain")
        return model

    losses = trained(AdapterTrainer(make(), arguments(tmp_path, max_steps=4), train_dataset=DATA))
    trainer = AdapterTrainer(make(), arguments(tmp_path, max_steps=4), train_dataset=DATA)
    assert trained(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-2")) == losses


def test_a_loss_that_leaves_the_adapters_own_out_is_refused(tmp_path):
    class Own(AdapterTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    with pytest.raises(StateError, match=r"Own\.compute_loss leaves out .* super\(\)\.compute_loss"):
        trained(Own(scheduled(), arguments(tmp_path), train_dataset=DATA))
    torch.manual_seed(0)
    plain = minipeft.get_lora_model(gpt2(), LoraConfig(r=2))  # which has none to leave out
    assert len(trained(Own(plain, arguments(tmp_path, max_steps=2, save_strategy="no"), train_dataset=DATA))) == 2


def test_a_second_call_besides_the_trainer_s_is_refused(tmp_path):
    class Twice(AdapterTrainer):
        def _after_step(self):
            super()._after_step()
            minipeft.after_step(self.model, self.state.global_step)

    with pytest.raises(StateError, match="has done step 0 already, and step 0 came"):
        trained(Twice(scheduled(), arguments(tmp_path), train_dataset=DATA))


def test_a_plain_trainer_leaves_the_ranks_alone_and_a_warning_says_so(tmp_path):
    options = arguments(tmp_path, max_steps=8, save_strategy="no")  # at the beginning of the eighth
    with pytest.warns(UserWarning, match=r"nobody calls minipeft\.after_step"):
        Trainer(scheduled(), options, train_dataset=DATA).train()


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_sharded_model_is_refused_before_the_first_step(tmp_path, kind):
    trainer = AdapterTrainer(scheduled(), arguments(tmp_path), train_dataset=DATA)
    setattr(trainer, kind, True)
    with pytest.raises(StateError, match="needs its tensors whole"):
        trainer._check_schedule()
    plain = AdapterTrainer(minipeft.get_lora_model(gpt2(), LoraConfig(r=2)), arguments(tmp_path), train_dataset=DATA)
    setattr(plain, kind, True)
    plain._check_schedule()


def test_a_step_that_a_gradient_scaler_skips_is_left_out(tmp_path):
    """Here the one at which the last ranks go, which then happens in the next step."""

    class Skips(InOrder):
        def _after_step(self):
            end = SCHEDULE["total_step"] - SCHEDULE["tfinal"]
            self.optimizer._is_overflow = self.state.global_step == end
            super()._after_step()
            self.optimizer._is_overflow = False

    trainer = Skips(scheduled(deltaT=3), sgd(tmp_path), train_dataset=uneven())
    trained(trainer)
    assert trainer.left[5] > 4
    assert trainer.left[6:] == [4, 4]


@pytest.mark.parametrize("wrap", [torch.nn.Sequential, torch.nn.DataParallel, torch.compile])
def test_a_wrapped_model_has_the_schedule_of_the_one_within(wrap):
    model = scheduled(init_lora_weights=False)
    with foreign_code():
        wrapped = wrap(model)
    if wrap is torch.nn.Sequential:  # not a wrapper of one model: it can hold two as well
        with pytest.raises(StateError, match="Sequential has no adapter"):
            minipeft.after_step(wrapped, 0)
        assert not has_schedule(wrapped)
        return
    assert has_schedule(wrapped)
    assert torch.equal(minipeft.extra_loss(wrapped), minipeft.extra_loss(model))
    model(**BATCH).loss.backward()
    minipeft.after_step(wrapped, 0)
    assert schedule_state(model, "default")

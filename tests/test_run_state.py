"""A run that is interrupted and goes on computes what it would have computed, bit for bit, or says why it cannot."""

import contextlib
import copy
import datetime
import json
import math
import os
import platform
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import minipeft
from minipeft import CheckpointError, ConfigError, LoraConfig, StateError, get_lora_model
from minipeft.training.distributed.ranks import agree
from minipeft.training.runs import run_state
from minipeft.training.runs.checkpoints import Checkpoints
from minipeft.training.runs.optimizer_state import load_exactly, optimizer_from_plain, optimizer_to_plain
from minipeft.training.runs.plain import checked_json, from_plain, to_plain
from minipeft.training.runs.rng import check_rng_state, gathered_rng_states, rng_state, set_rng_state
from minipeft.training.runs.run_state import TrainingState
from minipeft.training.runs.saved_run import Progress, config_differences

WORLD = 2
STEPS = 6
CONFIG = {"learning_rate": 0.01, "data": {"files": ["a", "b"], "seed": 1}, "output_dir": "here"}


class Net(nn.Module):
    """Two maps with dropout between; needs no transformers, so that a process of it starts soon."""

    def __init__(self, width=12):
        super().__init__()
        self.one = nn.Linear(width, 20)
        self.drop = nn.Dropout(0.2)
        self.two = nn.Linear(20, width)

    def forward(self, x):
        return self.two(self.drop(torch.relu(self.one(x))))


def net(seed=0, width=12, r=4, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    base = Net(width).to(dtype)
    config = LoraConfig(r=r, target_modules=["one", "two"], lora_dropout=0.1, init_lora_weights=False)
    return get_lora_model(base, config, **options).train()


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adamw(model):
    """Two groups with settings of their own, as LoRA+ has."""
    parameters = trained(model)
    groups = [
        {"params": [p for name, p in parameters.items() if which in name], "lr": rate}
        for which, rate in (("lora_A", 1e-2), ("lora_B", 2e-2))
    ]
    return torch.optim.AdamW(groups, betas=(0.8, 0.95), weight_decay=0.1)


def linear(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (STEPS + 2))


class Run:
    """A model in training, and everything that its next step depends on."""

    def __init__(self, model, optimizer=adamw, scheduler=linear, config=CONFIG, wrap=None, **options):
        self.model = model
        self.called = wrap(model) if wrap else model
        self.optimizer = optimizer(model)
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self.state = TrainingState(model, self.optimizer, self.scheduler, config=config, **options)

    def loss(self):
        x = torch.randn(6, 12)
        return self.called(x).square().mean() * (1 + random.random() + np.random.rand() + np.random.randn())

    def step(self):
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss.item())
        elif self.scheduler:
            self.scheduler.step()
        return loss.item()

    def steps(self, count):
        return [self.step() for _ in range(count)]

    def weights(self):
        return {name: whole(tensor) for name, tensor in self.model.adapter_state_dict().items()}


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def everything(run):
    """A value that shows any change in what a restore could touch."""
    state = run.optimizer.state_dict()
    tensors = {**run.weights(), **rng_state()}
    tensors |= {f"{i}.{k}": v for i, values in state["state"].items() for k, v in values.items()}
    plain = [state["param_groups"], run.scheduler.state_dict() if run.scheduler else None]
    return repr(plain) + "".join(f"{name} {tensor.tolist()}" for name, tensor in sorted(tensors.items()))


def run_in(directory):
    """A checkpoint after three steps, the run that made it, and the run directory."""
    seed_all(3)
    run = Run(net())
    run.steps(3)
    return run.state.save(Checkpoints(directory), 3, {"epoch": 0, "batch": 3}), run, directory


@pytest.fixture
def saved(tmp_path):
    return run_in(tmp_path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("kept"))[-1]


@pytest.fixture
def folder(kept, tmp_path):
    """A copy of such a checkpoint, which a test may change."""
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    return Checkpoints(tmp_path).latest()


def change(folder, name, payload):
    """Replace a file of a checkpoint and make its sums right again, as damage to content that no sum shows."""
    (folder / name).write_bytes(payload)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "COMPLETE"}

    def write(target):
        for file, content in files.items():
            (target / file).write_bytes(content)

    return Checkpoints(folder.parent.parent).save(int(folder.name.removeprefix("step-")), write)


def change_state(folder, **values):
    state = json.loads((folder / "state.json").read_text())
    return change(folder, "state.json", json.dumps(state | values).encode())


def gpt2_run(seed):
    from tiny_models import gpt2

    model = gpt2(seed=0)
    for module in model.modules():  # dropout of the model's own, beside the adapter's
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], lora_dropout=0.1)
    return Run(get_lora_model(model, config).train())


def gpt2_steps(run, count):
    losses = []
    for _ in range(count):
        ids = torch.randint(1, 100, (2, 12))
        logits = run.model(input_ids=ids).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.scheduler.step()
        losses.append(loss.item())
    return losses


def test_gpt2_with_dropout_goes_on_bit_for_bit_from_any_step(tmp_path):
    seed_all(5)
    whole_run = gpt2_run(seed=1)
    expected, folders = [], []
    for step in range(STEPS):
        if step in (0, 1, 3, 5):
            folders.append((step, whole_run.state.save(Checkpoints(tmp_path, keep=9), step, {"batch": step})))
        expected += gpt2_steps(whole_run, 1)
    assert len(set(expected)) == STEPS
    for step, folder in folders:
        seed_all(100 + step)
        run = gpt2_run(seed=7)
        assert run.state.restore(folder) == Progress(step, {"batch": step})
        assert gpt2_steps(run, STEPS - step) == expected[step:]
        assert equal(run.weights(), whole_run.weights())


SCHEDULERS = {
    "none": None,
    "linear": linear,
    "steps": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5], 0.5),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 2),
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "sequence": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
        ],
        milestones=[3],
    ),
}
OPTIMIZERS = {
    "AdamW": adamw,
    "AMSGrad": lambda model: torch.optim.Adam(trained(model).values(), amsgrad=True),
    "fused": lambda model: torch.optim.AdamW(trained(model).values(), fused=True),
    "learning rate in a tensor": lambda model: torch.optim.AdamW(trained(model).values(), lr=torch.tensor(1e-2)),
    "SGD": lambda model: torch.optim.SGD(trained(model).values(), lr=0.1),
    "momentum": lambda model: torch.optim.SGD(trained(model).values(), lr=0.1, momentum=0.9),
    "NAdam": lambda model: torch.optim.NAdam(trained(model).values(), lr=1e-2),
    "Adagrad": lambda model: torch.optim.Adagrad(trained(model).values(), lr=1e-2),
    "Adafactor": lambda model: torch.optim.Adafactor(trained(model).values(), lr=1e-2),
    "Rprop": lambda model: torch.optim.Rprop(trained(model).values()),
    "with names": lambda model: torch.optim.AdamW(list(trained(model).items()), lr=1e-2),
}


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [(name, "linear") for name in OPTIMIZERS] + [("AdamW", name) for name in SCHEDULERS if name != "linear"],
)
@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")  # torch's SequentialLR calls itself so
def test_every_optimizer_and_scheduler_goes_on_bit_for_bit(optimizer, scheduler, tmp_path):
    def begin(seed):
        return Run(net(seed), OPTIMIZERS[optimizer], SCHEDULERS[scheduler])

    seed_all(1)
    run = begin(0)
    run.steps(2)
    folder = run.state.save(Checkpoints(tmp_path), 2)
    expected = run.steps(STEPS - 2)
    seed_all(99)
    other = begin(0)
    other.state.restore(folder)
    assert other.steps(STEPS - 2) == expected
    assert everything(other) == everything(run)


def test_a_state_in_another_dtype_than_its_parameter_is_not_rounded(tmp_path):
    class Exact(torch.optim.SGD):
        """Keeps a sum in float64, and a count as a Python number, as optimizers of others do."""

        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["sum"] = state.get("sum", torch.zeros(p.shape, dtype=torch.float64)) + p.grad.double() / 3
                    state["count"] = state.get("count", 0) + 1
                    state["flag"], state["nothing"] = True, None
            super().step()

    def begin():
        return Run(net(0, dtype=torch.bfloat16), lambda model: Exact(trained(model).values(), lr=0.1), None)

    run, other = begin(), begin()
    run.loss = other.loss = None
    for parameter in trained(run.model).values():
        parameter.grad = torch.randn(parameter.shape)
    run.optimizer.step()
    other.state.restore(run.state.save(Checkpoints(tmp_path), 1))
    for mine, its in zip(trained(run.model).values(), trained(other.model).values(), strict=True):
        one, two = run.optimizer.state[mine], other.optimizer.state[its]
        assert two["sum"].dtype == torch.float64
        assert torch.equal(one["sum"], two["sum"])
        assert (two["count"], two["flag"], two["nothing"]) == (1, True, None)


def test_parameters_are_known_by_name_and_not_by_their_order(saved):
    folder, run, _ = saved
    other = Run(
        net(),
        lambda model: torch.optim.AdamW(
            [
                {"params": [p for name, p in reversed(trained(model).items()) if which in name], "lr": 1.0}
                for which in ("lora_A", "lora_B")
            ]
        ),
    )
    other.state.restore(folder)
    for name, parameter in trained(run.model).items():
        one, two = run.optimizer.state[parameter], other.optimizer.state[trained(other.model)[name]]
        assert one.keys() == two.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert other.optimizer.param_groups[0]["betas"] == (0.8, 0.95)


def test_a_gradient_scaler_goes_on(tmp_path):
    def begin():
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return Run(net(), scaler=scaler), scaler

    (run, scaler), (other, its) = begin(), begin()
    for _ in range(3):
        scaler.scale(run.loss()).backward()
        scaler.step(run.optimizer)
        scaler.update()
    other.state.restore(run.state.save(Checkpoints(tmp_path), 3))
    assert its.state_dict() == scaler.state_dict()
    assert its.get_scale() == 16.0


def test_restoring_changes_the_parameters_in_place_and_survives_the_removal_of_the_files(saved):
    folder, run, _ = saved
    expected, other = run.steps(2), Run(net(1, autocast_adapter_dtype=True))
    other = Run(net())
    before = {name: parameter.data_ptr() for name, parameter in trained(other.model).items()}
    other.state.restore(folder)
    shutil.rmtree(folder)
    assert {name: parameter.data_ptr() for name, parameter in trained(other.model).items()} == before
    assert other.steps(2) == expected


def test_a_checkpoint_loads_as_an_adapter_by_itself(saved):
    folder, run, _ = saved
    torch.manual_seed(0)
    model = minipeft.load_adapter(Net(), folder).eval()
    x = torch.randn(3, 12)
    assert torch.equal(model(x), run.model.eval()(x))
    assert equal(model.adapter_state_dict(), run.weights())


def test_saving_changes_nothing(saved):
    _, run, directory = saved
    before = everything(run)
    run.state.save(Checkpoints(directory), 4)
    assert everything(run) == before


def test_a_snapshot_is_a_copy_that_later_steps_do_not_change(tmp_path):
    run = Run(net())
    run.steps(2)
    snapshot, weights, state = run.state.capture(2), run.weights(), copy.deepcopy(run.optimizer.state_dict())
    run.steps(2)
    folder = Checkpoints(tmp_path).save(2, snapshot.write)
    other = Run(net())
    other.state.restore(folder)
    assert equal(other.weights(), weights)
    for index, values in other.optimizer.state_dict()["state"].items():
        assert equal(values, state["state"][index])
    assert sum(path.stat().st_size for path in folder.iterdir()) <= snapshot.nbytes


def test_accelerates_wrappers_are_taken_as_they_are(tmp_path):
    from accelerate import Accelerator

    def begin():
        accelerator = Accelerator(cpu=True)
        run = Run(net())
        model, optimizer, scheduler = accelerator.prepare(run.model, run.optimizer, run.scheduler)
        run.optimizer, run.scheduler = optimizer, scheduler
        run.state = TrainingState(accelerator.unwrap_model(model), optimizer, scheduler, config=CONFIG)
        return run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, other = begin(), begin()
    seed_all(2)
    run.steps(2)
    folder = run.state.save(Checkpoints(tmp_path), 2)
    expected = run.steps(3)
    other.state.restore(folder)
    assert other.steps(3) == expected


def two_groups_the_other_way(model):
    return torch.optim.AdamW([{"params": [p]} for p in list(trained(model).values())[:2]])


def two_groups_of_sgd(model):
    return torch.optim.SGD([{"params": group["params"]} for group in adamw(model).param_groups], lr=0.1)


REFUSED = {
    "another rank": (lambda: Run(net(r=2)), "r is 4 there and 2 here"),
    "another alpha": (
        lambda: Run(get_lora_model(Net(), LoraConfig(r=4, lora_alpha=3, target_modules=["one", "two"]))),
        "lora_alpha is 8 there and 3 here",
    ),
    "another width": (lambda: Run(net(width=11)), "one.lora_A"),
    "another dtype": (
        lambda: Run(net(dtype=torch.bfloat16, autocast_adapter_dtype=False)),
        "bfloat16 here",
    ),
    "another base": (lambda: Run(net(seed=1)), "another base: the weights of one differ"),
    "more adapted layers": (
        lambda: Run(get_lora_model(Net(), LoraConfig(r=4, target_modules=["one"]))),
        r"another configuration: target_modules is \['one', 'two'\] there and \['one'\] here",
    ),
    "another optimizer": (
        lambda: Run(net(), two_groups_of_sgd),
        "group 0 of the optimizer is of another kind: .*'betas'",
    ),
    "one group": (
        lambda: Run(net(), lambda model: torch.optim.AdamW(trained(model).values())),
        "the optimizer has 1 groups, and 2 were saved",
    ),
    "other groups": (lambda: Run(net(), two_groups_the_other_way), "group 0 of the optimizer lacks .*two.lora_A"),
    "no scheduler": (lambda: Run(net(), scheduler=None), "then had a scheduler, and now has no"),
    "another scheduler": (
        lambda: Run(net(), scheduler=SCHEDULERS["plateau"]),
        "scheduler is of another kind: .*'best'",
    ),
    "a scaler": (lambda: Run(net(), scaler=torch.amp.GradScaler("cpu")), "then had no scaler, and now has a"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_has_changed(case, folder):
    make, message = REFUSED[case]
    run = make()
    before = everything(run)
    with pytest.raises(CheckpointError, match=message) as caught:
        run.state.restore(folder)
    assert everything(run) == before
    assert str(folder) in str(caught.value)
    assert str(caught.value).endswith(" Nothing was changed.")
    assert "\n" not in str(caught.value)


FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


@pytest.mark.each_value
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "nonsense", "empty object"])
def test_a_damaged_file_is_refused_and_nothing_has_changed(name, damage, folder):
    path = folder / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "nonsense":  # of which the sums are right
        folder = change(folder, name, b"nonsense" * 99)
    elif damage == "empty object":
        folder = change(folder, name, b"{}" if name.endswith("json") else safetensors.torch.save({}))
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] if damage == "cut" else content[:middle] + b"~" + content[middle + 1 :])
    run = Run(net())
    before = everything(run)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        run.state.restore(folder)
    assert everything(run) == before
    assert name in str(caught.value) or damage in ("nonsense", "empty object")
    assert "\n" not in str(caught.value)


def with_option(state, **values):
    group, *others = state["optimizer"]["options"]
    return {"optimizer": {**state["optimizer"], "options": [{**group, **values}, *others]}}


def with_state(state, **values):
    own = state["optimizer"]["state"]
    return {"optimizer": {**state["optimizer"], "state": {name: {**old, **values} for name, old in own.items()}}}


EDITS = {
    "a rate that is text": lambda state: with_option(state, lr="0.1"),
    "no rate": lambda state: with_option(state, lr=None),
    "betas in a list": lambda state: with_option(state, betas=[0.9, 0.99]),
    "moments that are text": lambda state: with_state(state, exp_avg="x"),
    "moments in a list": lambda state: with_state(state, exp_avg=[1, 2]),
    "a tensor that is not there": lambda state: with_state(state, exp_avg={"$tensor": "gone"}),
    "a step that is text": lambda state: {"step": "3"},
    "a negative step": lambda state: {"step": -3},
    "a scheduler that is text": lambda state: {"scheduler": dict.fromkeys(state["scheduler"], "x")},
    "a scheduler of numbers": lambda state: {"scheduler": [1, 2]},
    "versions that are text": lambda state: {"versions": "new"},
    "no format": lambda state: {"format": None},
    "groups that are text": lambda state: {"optimizer": {**state["optimizer"], "groups": "ab"}},
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_state_is_refused_and_nothing_has_changed(edit, folder):
    folder = change_state(folder, **EDITS[edit](json.loads((folder / "state.json").read_text())))
    run = Run(net())
    before = everything(run)
    with pytest.raises((CheckpointError, ConfigError)):
        run.state.restore(folder)
    assert everything(run) == before


def test_moments_of_another_shape_are_refused_and_nothing_has_changed(folder):
    tensors = safetensors.torch.load_file(folder / "optimizer.safetensors")
    tensors = {name: torch.zeros(3, 3) if name.endswith("exp_avg") else t.clone() for name, t in tensors.items()}
    folder = change(folder, "optimizer.safetensors", safetensors.torch.save(tensors))
    run = Run(net())
    before = everything(run)
    with pytest.raises(CheckpointError, match=r"'exp_avg' has shape \[3, 3\]"):
        run.state.restore(folder)
    assert everything(run) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", ["load_exactly", "load_schedule_state", "set_rng_state"])
def test_a_restore_that_breaks_off_puts_everything_back(step, error, folder, monkeypatch):
    run, real = Run(net()), getattr(run_state, step)
    run.steps(1)
    before, calls = everything(run), []

    def failing(*args):
        real(*args)
        calls.append(args)
        if len(calls) == 1:  # not when things are put back
            raise error

    monkeypatch.setattr(run_state, step, failing)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError):
        run.state.restore(folder)
    assert everything(run) == before
    run.state.restore(folder)
    assert everything(run) != before


def test_a_position_that_is_none_is_refused_and_nothing_has_changed(folder):
    run = Run(net())
    before = everything(run)
    with pytest.raises(CheckpointError, match="position in .* cannot be read"):
        run.state.restore(folder, go_to=lambda position: position["no such key"])
    assert everything(run) == before


def test_random_states_of_another_shape_are_refused_and_nothing_has_changed(folder):
    states = safetensors.torch.load_file(folder / "rng.safetensors")
    states["rank0.python"] = states["rank0.python"][1:]
    folder = change(folder, "rng.safetensors", safetensors.torch.save({k: v.clone() for k, v in states.items()}))
    run = Run(net())
    before = everything(run)
    with pytest.raises(CheckpointError, match="not a state of random generators"):
        run.state.restore(folder)
    assert everything(run) == before


def test_another_number_of_processes_is_refused_unless_it_is_allowed(saved):
    folder, run, _ = saved
    folder = change_state(folder, world_size=4)
    other = Run(net())
    before = everything(other)
    with pytest.raises(CheckpointError, match="had 4 processes, and here are 1, .* exact=False"):
        other.state.restore(folder)
    assert everything(other) == before
    seed_all(50)
    random_before = rng_state()
    assert other.state.restore(folder, exact=False).step == 3
    assert equal(other.weights(), run.weights())
    assert repr(random_before) == repr(rng_state())


def test_another_configuration_is_refused_with_its_differences(folder):
    other = copy.deepcopy(CONFIG) | {"output_dir": "there", "learning_rate": 0.02, "new": True}
    other["data"]["seed"] = 2
    run = Run(net(), config=other)
    before = everything(run)
    with pytest.raises(ConfigError) as caught:
        run.state.restore(folder, may_differ=("output_dir",))
    assert everything(run) == before
    for line in ("data.seed: was 1, is 2", "learning_rate: was 0.01, is 0.02", "new: was not set, is True"):
        assert line in str(caught.value)
    assert "output_dir" not in str(caught.value)
    run.state.restore(folder, may_differ=("output_dir", "data", "learning_rate", "new"))


def test_another_version_of_torch_is_told_of(folder):
    folder = change_state(folder, versions={"python": platform.python_version(), "torch": "1.0"})
    with pytest.warns(UserWarning, match="torch 1.0 then, .*; the same numbers are not promised"):
        Run(net()).state.restore(folder)


def test_another_format_is_refused(folder):
    folder = change_state(folder, format=2)
    with pytest.raises(CheckpointError, match="format 2, and this version reads 1"):
        Run(net()).state.restore(folder)


def test_an_optimizer_of_other_parameters_is_refused_at_once():
    model = net()
    model.two.base_layer.bias.requires_grad_(True)
    with pytest.raises(StateError, match="the optimizer trains 1 parameters that are not the adapter's"):
        TrainingState(model, torch.optim.SGD(trained(model).values(), lr=0.1))


def test_a_wrapped_or_plain_model_is_refused_at_once():
    model = net()
    for wrong in (Net(), nn.Sequential(model)):
        with pytest.raises(StateError, match="the adapted model itself"):
            TrainingState(wrong, adamw(model))


def test_one_of_several_adapters_must_be_named(tmp_path):
    model = net()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["one"]))
    with pytest.raises(StateError, match="several adapters"):
        TrainingState(model, adamw(model))
    state = TrainingState(model, adamw(model), adapter_name="default")
    assert len(state.capture(0).adapter) == 4


@pytest.mark.parametrize("value", [object(), "text", [1, 2], torch.zeros(2, 2).to_sparse()], ids=type)
def test_an_optimizer_that_keeps_something_else_is_refused(value, tmp_path):
    run = Run(net())
    run.step()
    next(iter(run.optimizer.state.values()))["strange"] = value
    with pytest.raises(CheckpointError, match="strange.*saved"):
        run.state.save(Checkpoints(tmp_path), 1)
    assert Checkpoints(tmp_path).latest() is None


def test_a_position_or_configuration_that_is_not_json_is_refused(tmp_path):
    run = Run(net())
    with pytest.raises(ConfigError, match="position cannot be saved as JSON"):
        run.state.save(Checkpoints(tmp_path), 1, {"where": (1, 2)})
    with pytest.raises(ConfigError, match="config cannot be saved as JSON"):
        TrainingState(run.model, run.optimizer, config={"path": Path("x")})


HARD = 'a1"\\\n\0\x7f\u00e9\u2028\U0001f600'  # what JSON writes in some other way, besides a letter and a digit
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(HARD, max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(HARD, max_size=3), inner, max_size=3)
        | st.dictionaries(st.integers() | st.text(HARD, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=75, deadline=None, derandomize=True)
@given(PLAIN)
def test_plain_values_come_back_from_json_as_they_were(value):
    tensors = {}
    text = json.dumps(to_plain(value, "x", tensors.__setitem__), allow_nan=False)
    assert repr(from_plain(json.loads(text), tensors.__getitem__)) == repr(value)


def test_counters_and_tensors_come_back_from_json_as_they_were():
    tensors = {}
    value = {"c": Counter({3: 2}), "t": (torch.arange(3), [torch.ones(())])}
    found = from_plain(json.loads(json.dumps(to_plain(value, "x", tensors.__setitem__))), tensors.__getitem__)
    assert type(found["c"]) is Counter
    assert found["c"] == value["c"]
    assert tensors.keys() == {"x.t.0", "x.t.1.0"}
    assert torch.equal(found["t"][0], value["t"][0])


@pytest.mark.parametrize(
    "value", [{"$what": 1}, {"$tuple": [], "b": 1}, {"$float": "1"}, {"$pairs": [1]}, {"$tuple": 3}, {"$tensor": "no"}]
)
def test_what_is_no_plain_value_is_refused(value):
    with pytest.raises(CheckpointError, match="is not a saved value"):
        from_plain(value, {}.__getitem__)


def test_sets_and_objects_are_no_plain_values():
    for value in ({1}, object(), {"a": b"x"}, np.int64(3)):
        with pytest.raises(CheckpointError, match="cannot be saved"):
            to_plain(value, "x", {}.__setitem__)


def test_differences_of_configurations_are_lines_to_read():
    old = {"a": 1, "b": {"c": [1, 2], "d": 0.5, "same": None}, "gone": "x", "out": {"dir": "here"}, "long": "a" * 500}
    new = {"a": True, "b": {"c": [1, 3], "d": 0.5, "same": None}, "new": None, "out": {"dir": "there"}, "long": ""}
    assert config_differences(old, new, may_differ=["out.dir"]) == [
        "a: was 1, is True",
        "b.c: was [1, 2], is [1, 3]",
        "gone: was 'x', is not set",
        f"long: was '{'a' * 99}... (502 characters), is ''",
        "new: was not set, is None",
    ]
    assert config_differences(old, new, may_differ=["a", "b", "gone", "long", "new", "out"]) == []
    assert config_differences({"b": {"x": 1}}, {"b": 1}) == ["b: was {'x': 1}, is 1"]


def test_values_are_the_same_if_their_types_are_too():
    value = {"a": [1, {"b": 2.0, "c": None}], "d": True}
    assert checked_json(value, "config") == value
    assert config_differences(value, copy.deepcopy(value)) == []
    for one, other in ((1, True), (1, 1.0), ([1], [1, 2]), ([{"a": 1}], [{"b": 1}]), ([0], [False])):
        assert config_differences({"x": one}, {"x": other}) == [f"x: was {one!r}, is {other!r}"]
    for wrong in (math.nan, (1,), Path("x"), {1: "a"}):
        with pytest.raises(ConfigError):
            checked_json({"x": [wrong]}, "config")


def test_random_states_are_taken_and_given_back_exactly():
    seed_all(8)
    random.gauss(0, 1)  # a second normal number waits
    np.random.randn()
    state = rng_state()
    draws = [(torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand())]
    seed_all(9)
    set_rng_state(state)
    draws.append((torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand()))
    assert draws[0] == draws[1]
    random.gauss(0, 1)
    random.gauss(0, 1)
    assert all(tensor.ndim == 1 for tensor in state.values())


def test_a_default_device_does_not_decide_where_a_state_is(saved):
    """As after `torch.set_default_device("cuda")`; meta is a device that every torch has."""
    path, run, directory = saved
    with torch.device("meta"):
        set_rng_state(rng_state())
        assert {tensor.device.type for tensor in rng_state().values()} == {"cpu"}
        written = run.state.save(Checkpoints(directory / "again"), 3, {"epoch": 0, "batch": 3})
        run.state.restore(written)
    names = {file.name for file in path.iterdir()}
    assert {file.name for file in written.iterdir()} == names
    assert all(
        (written / name).read_bytes() == (path / name).read_bytes() for name in names if name.endswith(".safetensors")
    )


def test_random_states_of_absent_devices_are_refused():
    state = rng_state() | {"cuda.999": torch.zeros(16, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"random states of 'cuda.999', and there are \d+ CUDA devices"):
        check_rng_state(state)


def test_random_states_of_cuda_devices_are_saved_and_given_back(monkeypatch):
    """With stand-ins for two devices, as none is needed to see where the states go."""
    states = [torch.full((16,), index, dtype=torch.uint8) for index in range(2)]
    given = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: given.update({index: state}))
    state = rng_state()
    set_rng_state(state)
    assert torch.equal(given[0], states[0])
    assert torch.equal(given[1], states[1])
    with pytest.raises(CheckpointError, match="no random states of CUDA devices, and CUDA is in use"):
        check_rng_state({name: words for name, words in state.items() if not name.startswith("cuda")})


def test_numpys_other_generators_are_refused(monkeypatch):
    monkeypatch.setattr(np.random, "get_state", lambda legacy: ("PCG64", None, 0, 0, 0.0))
    with pytest.raises(CheckpointError, match="PCG64, whose state cannot be saved"):
        rng_state()


def test_alone_a_process_agrees_with_itself():
    agree(None)
    with pytest.raises(ZeroDivisionError):
        agree(ZeroDivisionError())
    assert {name.removeprefix("rank0.") for name in gathered_rng_states()} == rng_state().keys()


def test_loading_an_optimizer_state_is_what_torch_does_with_its_own():
    """Against torch's own state_dict, of which ours is a detour through JSON and names."""
    run, plain, ours = Run(net()), Run(net()), Run(net())
    run.steps(3)
    names = {id(tensor): key for key, tensor in run.model.adapter_state_dict().items()}
    groups = [[names[id(p)] for p in group["params"]] for group in run.optimizer.param_groups]
    tensors = {}
    saved = json.loads(json.dumps(optimizer_to_plain(run.optimizer, groups, tensors.__setitem__)))
    load_exactly(ours.optimizer, optimizer_from_plain(saved, ours.optimizer, groups, tensors.__getitem__))
    plain.optimizer.load_state_dict(run.optimizer.state_dict())
    one, two = plain.optimizer.state_dict(), ours.optimizer.state_dict()
    assert one["param_groups"] == two["param_groups"]
    for index, values in one["state"].items():
        assert equal(values, two["state"][index])


def sharded(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in (model.one, model):  # the second map is left to the outermost module
        fully_shard(part, mesh=mesh)
    return model


def run_of_many(kind, seed=0):
    return (
        Run(net(seed), wrap={"fsdp": None, "ddp": DistributedDataParallel}[kind]) if kind == "ddp" else fsdp_run(seed)
    )


def fsdp_run(seed):
    return Run(sharded(net(seed)))


@contextlib.contextmanager
def group(rank, directory, name):
    path = (directory / name).as_posix()
    dist.init_process_group(
        "gloo", f"file://{path}", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def evaluate(run):
    run.model.eval()
    with torch.no_grad():
        run.called(torch.ones(2, 12))
    run.model.train()


def interrupted(kind, rank, directory):
    """What an uninterrupted run finds, and one that goes on in a new process group.

    Each run is gone before its group: DDP's reducer would free the group later, and wait for a thread that waits for Python.
    """
    checkpoints = Checkpoints(directory / kind)
    with group(rank, directory, f"{kind}-first"):
        folder, found = uninterrupted(kind, rank, checkpoints)
    with group(rank, directory, f"{kind}-second"):
        return found | continued(kind, rank, checkpoints, folder)


def uninterrupted(kind, rank, checkpoints):
    run, found = run_of_many(kind), {}
    seed_all(rank)  # what the ranks draw differs
    found["first"] = run.steps(2)
    evaluate(run)  # which leaves the outermost module of a sharded model whole
    folder = run.state.save(checkpoints, 2, {"batch": 2})
    found["expected"] = run.steps(3)
    found["expected weights"] = run.weights()
    return folder, found


def continued(kind, rank, checkpoints, folder):
    run, found = run_of_many(kind), {}
    seed_all(77)
    found["progress"] = run.state.restore(folder).step
    found["losses"] = run.steps(3)
    found["weights"] = run.weights()
    found["types"] = sorted({type(p).__name__ for p in trained(run.model).values()})
    return found | failures(run, rank, checkpoints, folder)


def failures(run, rank, checkpoints, folder):
    """What the processes say when only one of them has a reason to."""
    found = {}
    (checkpoints.folder / "step-00000009").mkdir() if rank == 0 else None
    dist.barrier()
    try:
        run.state.save(checkpoints, 5)
    except CheckpointError as error:
        found["save"] = str(error)
    before = run.weights()
    try:
        run.state.restore(folder if rank == 0 else folder / "nowhere")
    except CheckpointError as error:
        found["restore"] = str(error)
    found["untouched"] = equal(before, run.weights())
    return found


def main(directory):
    warnings.simplefilter("error")
    rank = int(os.environ["RANK"])
    found = {kind: interrupted(kind, rank, directory) for kind in ("fsdp", "ddp")}
    torch.save(found, directory / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found, and where their checkpoints are."""
    directory = tmp_path_factory.mktemp("ranks")
    warm.ranks(directory, main, directory)
    return directory, [torch.load(directory / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_two_processes_go_on_bit_for_bit_in_a_new_group(kind, ranks):
    directory, found = ranks
    one, other = (each[kind] for each in found)
    for each in (one, other):
        assert each["progress"] == 2
        assert each["losses"] == each["expected"]
        assert equal(each["weights"], each["expected weights"])
    assert one["losses"] != other["losses"]  # each has its own random numbers
    assert one["types"] == (["DTensor"] if kind == "fsdp" else ["Parameter"])
    states = safetensors.torch.load_file(directory / kind / "checkpoints" / "step-00000002" / "rng.safetensors")
    assert not torch.equal(states["rank0.torch"], states["rank1.torch"])


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_where_one_of_two_processes_fails_both_do_and_nothing_has_changed(kind, ranks):
    one, other = (each[kind] for each in ranks[1])
    assert "there are newer checkpoints ('step-00000009')" in one["save"]
    assert other["save"] == f"process 0 of 2: {one['save']}"
    assert "not a complete checkpoint" in other["restore"]
    assert one["restore"] == f"process 1 of 2: {other['restore']}"
    assert one["untouched"]
    assert other["untouched"]


def test_a_sharded_run_leaves_an_adapter_that_loads_in_one_process(ranks):
    directory, _ = ranks
    folder = directory / "fsdp" / "checkpoints" / "step-00000002"
    torch.manual_seed(0)
    model = minipeft.load_adapter(Net(), folder)
    saved = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert equal(model.adapter_state_dict(), saved)
    run = Run(net())
    with pytest.raises(CheckpointError, match="had 2 processes, and here are 1"):
        run.state.restore(folder)
    run.state.restore(folder, exact=False)
    assert equal(run.weights(), saved)
    shapes = {tuple(values["exp_avg"].shape) for values in run.optimizer.state.values()}
    assert shapes == {tuple(tensor.shape) for tensor in saved.values()}

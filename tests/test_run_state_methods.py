"""Every method's run, interrupted and gone on with, ends in the files of the uninterrupted one, byte for byte."""

import json

import pytest
import safetensors.torch
import torch
from method_cases import CASES
from rotation import often
from tiny_models import gpt2, llama, token_ids

import minipeft
from minipeft import AdaLoraConfig, CheckpointError
from minipeft.registry import registry
from minipeft.training.runs.checkpoints import Checkpoints
from minipeft.training.runs.run_state import TrainingState

STEPS = 6
FILES = ("adapter_config.json", "adapter_model.safetensors")
LAYERS = ["q_proj", "down_proj"]
METHODS = {
    "lora": minipeft.LoraConfig(r=3, lora_dropout=0.2, target_modules=LAYERS),
    "lora, head in full": minipeft.LoraConfig(
        r=3, target_modules=LAYERS, modules_to_save=["lm_head"], bias="lora_only"
    ),
    "lora-fa": minipeft.LoraConfig(r=3, target_modules=LAYERS, freeze_lora_A=True),
    "dora": minipeft.LoraConfig(r=3, use_dora=True, lora_dropout=0.2, target_modules=LAYERS),
    "ia3": minipeft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
    "vera": minipeft.VeraConfig(r=4, vera_dropout=0.2, target_modules=LAYERS),
    "vera unsaved": minipeft.VeraConfig(r=4, save_projection=False, target_modules=LAYERS),
    "loha": minipeft.LoHaConfig(r=2, rank_dropout=0.2, target_modules=LAYERS),
    "lokr": minipeft.LoKrConfig(r=2, module_dropout=0.2, target_modules=LAYERS),
    "oft": minipeft.OFTConfig(oft_block_size=8, module_dropout=0.2, target_modules=LAYERS),
    "trainable tokens": minipeft.TrainableTokensConfig(token_indices=[3, 50, 7]),
    "lora, and tokens": minipeft.LoraConfig(r=3, target_modules=LAYERS, trainable_token_indices=[3, 50, 7]),
    "adalora": AdaLoraConfig(
        total_step=STEPS, tinit=1, tfinal=2, init_r=4, target_r=1, lora_dropout=0.2, target_modules=LAYERS
    ),
}


class Run:
    """A model in training, its batches drawn at random."""

    def __init__(self, config, seed=0):
        torch.manual_seed(seed)
        self.model = minipeft.get_adapter_model(llama(attention_dropout=0.1), config).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.02)
        self.state = TrainingState(self.model, self.optimizer)

    def steps(self, first, last):
        for step in range(first, last):
            ids = torch.randint(1, 100, (2, 8))
            loss = self.model(input_ids=ids, labels=ids).loss + minipeft.extra_loss(self.model)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            minipeft.after_step(self.model, step)

    def files(self, folder):
        self.model.save_pretrained(folder)
        return [(folder / name).read_bytes() for name in FILES]


def test_every_method_is_among_them():
    tried = {config.adapter_method for config in METHODS.values()}
    classes = {name: registry.method_class(name) for name in registry.method_names()}
    assert tried == {name for name, cls in classes.items() if cls.__module__.startswith("minipeft.")}
    assert {name.split()[0] for name in CASES} <= tried


def went_on(config, folder, step, tmp_path):
    """The files of a run that goes on from a checkpoint with another beginning, and other random numbers so far."""
    run = Run(config, seed=0)
    with torch.no_grad():
        for parameter in run.optimizer.param_groups[0]["params"]:
            parameter.add_(1.0)
    torch.manual_seed(99)
    assert run.state.restore(folder).step == step
    run.steps(step, STEPS)
    return run.files(tmp_path / f"again-{step}")


ALWAYS = ("lora", "dora", "vera unsaved", "lokr", "trainable tokens", "adalora")


@pytest.mark.parametrize("method", often(METHODS, ALWAYS))
def test_a_run_that_goes_on_ends_in_the_same_bytes(method, tmp_path):
    run = Run(METHODS[method])
    run.steps(0, 3)
    folder = run.state.save(Checkpoints(tmp_path), 3)
    run.steps(3, STEPS)
    assert went_on(METHODS[method], folder, 3, tmp_path) == run.files(tmp_path / "whole")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An AdaLoRA run with a checkpoint at every step: before, between and after its allocations."""
    directory = tmp_path_factory.mktemp("whole")
    run, folders = Run(METHODS["adalora"]), []
    for step in range(STEPS):
        folders.append(run.state.save(Checkpoints(directory, keep=9), step))
        run.steps(step, step + 1)
    return folders, run.files(directory / "end")


@pytest.mark.parametrize("step", often(range(STEPS), [1, STEPS // 2, STEPS - 1]))
def test_the_allocation_of_ranks_goes_on_from_any_step(step, whole, tmp_path):
    folders, expected = whole
    assert went_on(METHODS["adalora"], folders[step], step, tmp_path) == expected


def test_a_checkpoint_holds_all_components_and_the_end_what_is_left(whole):
    folders, (config, weights) = whole
    kept = [len(t) for key, t in safetensors.torch.load(weights).items() if key.endswith("lora_E")]
    assert sum(kept) == 4
    assert json.loads(config)["rank_pattern"] is not None
    for folder in folders:
        tensors = safetensors.torch.load_file(folder / FILES[1])
        assert {len(t) for key, t in tensors.items() if key.endswith("lora_E")} == {4}
        minipeft.load_adapter(llama(), folder, is_trainable=True)
    ids = token_ids()
    run = Run(METHODS["adalora"])
    run.state.restore(folders[4])
    loaded = minipeft.load_adapter(llama(), folders[4])
    assert torch.equal(loaded(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)


@pytest.fixture(scope="module")
def begun():
    """A run after its first step, which nothing changes."""
    run = Run(METHODS["adalora"])
    run.steps(0, 1)
    return run


def state_of(run):
    """Copies of all tensors of a model, its schedule and its optimizer, by name; and the optimizer's options."""
    optimizer = run.optimizer.state_dict()
    tensors = run.model.state_dict() | minipeft.injection.step_hooks.schedule_state(run.model, "default")
    for number, moments in optimizer["state"].items():
        tensors |= {f"{number} {name}": moment for name, moment in moments.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}, optimizer["param_groups"]


def changed(folder, directory, change):
    """A checkpoint with its state.json changed, and its sums right."""
    state = json.loads((folder / "state.json").read_text())
    change(state)
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "COMPLETE"}
    contents["state.json"] = json.dumps(state).encode()

    def write(target):
        for name, content in contents.items():
            (target / name).write_bytes(content)

    return Checkpoints(directory).save(4, write)


def one_of(state, ending):
    return next(key for key in state["schedule"] if key.endswith(ending))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("schedule"), "schedule of adapter 'default' is not there"),
        (lambda state: state["schedule"].pop(one_of(state, "lora_B.uncertainty")), "another AdaLoRA's schedule"),
        (lambda state: state["schedule"].pop(one_of(state, "/step")), "another AdaLoRA's schedule"),
        (lambda state: state["schedule"].update({"elsewhere/left": 1}), "no adapter on 'elsewhere'"),
        (lambda state: state.update(schedule=[]), "not a checkpoint of this format"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_and_nothing_has_changed(change, said, whole, begun, tmp_path):
    folder, run = changed(whole[0][3], tmp_path, change), begun
    before, options = state_of(run)
    with pytest.raises(CheckpointError, match=said):
        run.state.restore(folder)
    now, options_now = state_of(run)
    assert options == options_now
    assert before.keys() == now.keys()
    assert all(torch.equal(before[key], now[key]) for key in before)


def test_a_method_that_keeps_no_state_takes_none(tmp_path):
    torch.manual_seed(0)
    model = minipeft.get_lora_model(gpt2(), minipeft.LoraConfig(r=2, target_modules=["c_attn"]))
    path = "transformer.h.0.attn.c_attn"
    minipeft.injection.step_hooks.check_schedule_state(model, "default", None)
    with pytest.raises(CheckpointError, match="has no training state, but the checkpoint has 'left'"):
        minipeft.injection.step_hooks.check_schedule_state(model, "default", {f"{path}/left": torch.ones(2)})

"""AdaLoRA in `Updater`: its own loss counts once an update, and its ranks go, on any number of processes."""

from types import SimpleNamespace

import pytest
import torch
import warm
from tiny_models import gpt2
from tiny_rows import Rows

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from test_updates import mean_loss, no_room_for, updater_of

import minipeft
from minipeft import AdaLoraConfig, StateError
from minipeft.training.data.order import UpdateOrder
from minipeft.training.updates import Updater

STEPS = 6
SCHEDULE = {"total_step": STEPS, "tinit": 1, "tfinal": 2, "init_r": 4, "target_r": 1, "orth_reg_weight": 0.3}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """A process has one accelerator state; each test starts without."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def scheduled():
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["c_attn", "c_fc"], init_lora_weights=False, **SCHEDULE)
    return minipeft.get_adapter_model(gpt2(), config).double().train()  # one rounding may decide which rank goes


def ranks(model):
    return sum(int((t != 0).sum()) for key, t in model.adapter_state_dict().items() if key.endswith("lora_E"))


def by_hand(model):
    """Plain SGD on the mean over all tokens and the method's own loss, clipped; the ranks after each step."""
    order, left, losses = UpdateOrder(Rows(), 7, seed=0), [], []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for number in range(STEPS):
        loss = mean_loss(model, Rows().rows(order[number].indices))
        optimizer.zero_grad()
        (loss + minipeft.extra_loss(model)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        minipeft.after_step(model, number)
        losses.append(loss.item())
        left.append(ranks(model))
    return losses, left


@pytest.fixture(scope="module")
def expected():
    """The model that was trained by hand, its losses, and its ranks after each step; to read."""
    reference = scheduled()
    return reference, *by_hand(reference)


def assert_alike(model, reference):
    expected = reference.adapter_state_dict()
    for key, tensor in model.adapter_state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [7, 2])
def test_updates_are_the_loop_written_by_hand(micro_batch, expected):
    model, (reference, losses, left) = scheduled(), expected
    update, order, found = updater_of(model, micro_batch=micro_batch, clip=0.5), UpdateOrder(Rows(), 7, seed=0), []
    for number in range(STEPS):
        assert update(order[number]) == pytest.approx(losses[number], rel=1e-5)
        found.append(ranks(model))
    assert found == left
    assert (left[0], left[-1]) == (16, 4)
    assert_alike(model, reference)


def test_where_memory_runs_out_it_is_still_counted_once(capsys, expected):
    model = scheduled()
    update = updater_of(model, micro_batch=4, clip=0.5, auto_batch=True, loss=no_room_for(1))
    for number in range(STEPS):
        update(UpdateOrder(Rows(), 7, seed=0)[number])
    assert update.micro_batch == 1
    assert_alike(model, expected[0])


def test_a_skipped_step_is_left_out():
    update, order = updater_of(scheduled(), clip=0.5), UpdateOrder(Rows(), 7, seed=0)
    for number in range(STEPS):
        update.optimizer._is_overflow = number == 4  # of the last allocation
        update(order[number])
        assert ranks(update.model) == 4 or number < 5


def test_an_engine_that_cuts_tensors_up_is_refused():
    engine = SimpleNamespace(gradient_clipping=float, gradient_accumulation_steps=int)
    with pytest.raises(StateError, match="needs whole tensors"):
        Updater(SimpleNamespace(), scheduled(), None, micro_batch=1, clip=1.0, engine=engine)


def main(directory):
    """One of two processes."""
    accelerator = Accelerator(cpu=True)
    update, order = updater_of(scheduled(), accelerator, micro_batch=2, clip=0.5), UpdateOrder(Rows(), 7, seed=0)
    losses = [update(order[number]) for number in range(STEPS)]
    state = {key: tensor.detach() for key, tensor in update.model.adapter_state_dict().items()}
    torch.save([losses, state], directory / f"{accelerator.process_index}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path, expected):
    warm.ranks(tmp_path, main, tmp_path, ACCELERATE_USE_CPU="true")
    reference, losses, _ = expected
    for rank in "01":
        found, state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found == pytest.approx(losses, rel=1e-5)
        for key, tensor in reference.adapter_state_dict().items():
            torch.testing.assert_close(state[key], tensor.detach(), rtol=1e-4, atol=1e-6)

"""Updates of the weights: the gradient of the mean over all tokens, however they are divided; and memory that runs out."""

import copy
import functools
from collections import OrderedDict

import numpy as np
import pytest
import tiny_models
import torch
import warm
from tiny_models import gpt2, token_ids
from tiny_rows import Rows
from torch import nn

pytest.importorskip("accelerate")

from accelerate import Accelerator
from rotation import thinned

import minipeft
from minipeft import LoraConfig
from minipeft.training.data.collate import filler
from minipeft.training.data.order import UpdateOrder
from minipeft.training.updates import Updater, evaluate, is_out_of_memory, loss_sum

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


adapted = functools.partial(tiny_models.adapted, r=8)


def updater_of(model, accelerator=None, lr=0.1, **options):
    accelerator = accelerator or Accelerator(cpu=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    options = {"micro_batch": 3, "clip": 1e6, **options}
    return Updater(accelerator, model, accelerator.prepare_optimizer(optimizer), **options)


def mean_loss(model, examples):
    """Each example by itself, unpadded: an independent way to the mean over all tokens."""
    total, tokens = 0.0, 0
    for example in examples:
        ids, labels = (torch.from_numpy(a.astype(np.int64))[None] for a in example[:2])
        logits = model(input_ids=ids).logits[:, :-1]
        total = total + nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        tokens += int((labels[:, 1:] != -100).sum())
    return total / tokens


DRAWN = [{"freeze_lora_A": True}, {"init_lora_weights": "pissa_niter_2"}]
FEW = [(1e6, 6, False), (1e6, 4, True), (0.05, 4, False), (0.05, 1, True)]


@functools.cache
def by_hand(clip):
    """The losses of four updates of 6, 6 and 4 of sixteen examples by plain SGD on their mean loss, and what was trained."""
    reference, store, losses = adapted().train(), Rows(), []
    parameters = [p for p in reference.parameters() if p.requires_grad]
    plain, order = torch.optim.SGD(parameters, lr=0.1), UpdateOrder(store, 6, seed=0)
    for number in range(4):
        loss = mean_loss(reference, store.rows(order[number].indices))
        plain.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        plain.step()
        losses.append(loss.item())
    return losses, parameters


@pytest.mark.each_value
@pytest.mark.parametrize(("clip", "micro_batch", "lean"), thinned(([1e6, 0.05], [6, 4, 1], [False, True]), FEW))
def test_an_update_follows_the_mean_over_all_its_tokens(micro_batch, clip, lean):
    losses, parameters = by_hand(clip)
    model = adapted()
    if lean:
        minipeft.lean(model)
    update, order = updater_of(model.train(), micro_batch=micro_batch, clip=clip), UpdateOrder(Rows(), 6, seed=0)
    for number, expected in enumerate(losses):
        assert update(order[number]) == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(update.parameters, parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("lean", [False, True])
def test_a_batch_that_predicts_nothing_has_a_loss_of_zero(lean):
    model = adapted().train()
    if lean:
        minipeft.lean(model)
    loss = loss_sum(model, filler(0))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_losses_are_read_after_all_passes_of_an_update(monkeypatch):
    """A GPU that is asked for a loss has to be waited for, and then has nothing to do."""
    events, real = [], torch.Tensor.__float__

    def loss(model, batch):
        events.append("pass")
        return loss_sum(model, batch)

    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: events.append("read") or real(tensor))
    model, store = adapted().train(), Rows()
    accelerator = Accelerator(cpu=True)
    updater_of(model, accelerator, micro_batch=2, loss=loss)(UpdateOrder(store, 6, seed=0)[0])
    assert events[:4] == ["pass"] * 3 + ["read"]
    events.clear()
    evaluate(accelerator, model, store, 8, loss)
    assert events[:3] == ["pass"] * 2 + ["read"]


def test_an_evaluation_counts_each_token_once():
    model, store = adapted().eval(), Rows()
    with torch.no_grad():
        expected = mean_loss(model, store.examples).item()
    for micro_batch in (1, 5, 16):
        assert evaluate(Accelerator(cpu=True), model, store, micro_batch) == pytest.approx(expected, rel=1e-6)


def no_room_for(more_than):
    """A loss that fails as torch does where a batch is too large; partway, with gradients added up already."""

    def loss(model, batch):
        total = loss_sum(model, batch)
        if len(batch["input_ids"]) > more_than and loss.calls > 0:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
            )
        loss.calls += 1
        return total

    loss.calls = 0
    return loss


def test_where_memory_runs_out_the_batch_is_halved_and_the_update_is_the_same(capsys):
    store = Rows()
    expected, found = adapted().train(), adapted().train()
    plain = updater_of(expected, micro_batch=1)
    small = updater_of(found, plain.accelerator, micro_batch=4, auto_batch=True, loss=no_room_for(1))
    order = UpdateOrder(store, 8, seed=0)
    for number in range(3):
        assert small(order[number]) == pytest.approx(plain(order[number]), rel=1e-6)
    assert small.micro_batch == 1
    assert capsys.readouterr().out.count("out of memory: now") == 2
    for ours, theirs in zip(small.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("auto_batch", [False, True])
def test_where_it_cannot_be_halved_the_error_says_what_to_do(auto_batch):
    model = adapted().train()
    before = copy.deepcopy(model.state_dict())
    options = {"micro_batch": 1, "auto_batch": True} if auto_batch else {"micro_batch": 4}
    update = updater_of(model, loss=no_room_for(0), **options)
    with pytest.raises(minipeft.StateError, match="out of memory with . examples at a time.*lower the batch size"):
        update(UpdateOrder(Rows(), 8, seed=0)[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_error_is_not_taken_for_a_lack_of_memory():
    def loss(model, batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        updater_of(adapted(), loss=loss, auto_batch=True)(UpdateOrder(Rows(), 8, seed=0)[0])
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("can't allocate memory"))


class Half(nn.Module):
    """A model that calls one of its two parts: an idle layer, or one of two experts."""

    def __init__(self, idle):
        super().__init__()
        self.used, self.idle = gpt2(), idle
        self.config = self.used.config

    def forward(self, **inputs):
        return self.used(**inputs)


def test_an_adapter_that_the_model_does_not_call_is_said():
    model = minipeft.get_lora_model(Half(nn.Linear(4, 4)), LoraConfig(target_modules=["c_attn", "idle"])).train()
    with pytest.raises(minipeft.StateError, match="'idle': the model neither called nor read"):
        updater_of(model)(UpdateOrder(Rows(), 8, seed=0)[0])


def test_experts_that_a_batch_does_not_choose_are_no_fault():
    experts = nn.ModuleList(nn.Sequential(OrderedDict(up=nn.Linear(4, 4))) for _ in range(2))
    model = minipeft.get_lora_model(Half(experts), LoraConfig(target_modules=["c_attn", "up"])).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    updater_of(model)(UpdateOrder(Rows(), 8, seed=0)[0])
    moved = {name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])}
    assert moved == {name for name in before if "c_attn" in name and "lora_B" in name}


def test_a_loss_that_depends_on_no_adapter_is_said():
    model = adapted().train()
    loss = lambda model, batch: (model(**batch).logits.detach() * torch.ones(1, requires_grad=True)).sum()  # noqa: E731
    with pytest.raises(minipeft.StateError, match="no trainable parameter got a gradient"):
        updater_of(model, loss=loss)(UpdateOrder(Rows(), 8, seed=0)[0])


def drawn_differently(accelerator, **options):
    """What a model computes once an Updater has it; each process drew the adapter's random values from another seed."""
    torch.manual_seed(accelerator.process_index)
    model = minipeft.get_lora_model(gpt2(), LoraConfig(r=2, **options)).train()
    updater_of(model, accelerator)(UpdateOrder(Rows(), 8, seed=0)[0])
    with torch.no_grad():
        return model.eval()(token_ids()).logits


def main(directory):
    """One of two processes; only the second has too little memory."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    drawn = [drawn_differently(accelerator, **options) for options in DRAWN]
    loss = no_room_for(1) if rank == 1 else no_room_for(99)
    found = updater_of(adapted().train(), accelerator, micro_batch=4, auto_batch=True, loss=loss)
    order = UpdateOrder(Rows(), 8, seed=0)
    losses = [found(order[number]) for number in range(3)]
    torch.save([losses, found.micro_batch, [p.detach() for p in found.parameters], drawn], directory / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found; one that dies of its memory ends the run within the time-out, instead of hanging."""
    directory = tmp_path_factory.mktemp("ranks")
    warm.ranks(directory, main, directory, ACCELERATE_USE_CPU="true")
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in "01"]


def test_what_an_adapter_draws_at_random_is_the_same_in_all_processes(ranks):
    """Also what does not train: a frozen A, and the start that PiSSA's update is counted from."""
    one, other = (rank[3] for rank in ranks)
    assert len(one) == len(DRAWN)
    assert all(map(torch.equal, one, other))


def test_where_one_of_two_processes_runs_out_of_memory_both_halve_their_batches(ranks):
    one, other = ranks
    plain = updater_of(adapted().train(), micro_batch=1)
    order = UpdateOrder(Rows(), 8, seed=0)
    assert one[0] == other[0] == pytest.approx([plain(order[number]) for number in range(3)], rel=1e-6)
    assert one[1] == other[1] == 1
    for a, b, expected in zip(one[2], other[2], plain.parameters, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected, atol=1e-6, rtol=1e-5)

"""Whatever is raised while a verb changes a model, Ctrl-C included, the model is what it was: the same objects and flags."""

import copy
import functools
import itertools
import signal
from contextlib import nullcontext

import pytest
import torch
from tiny_models import adapted, disturb, gpt2, logits
from torch import nn
from torch.nn.utils import prune

from minipeft import LoraConfig, TargetError, get_lora_model, lean, load_adapter, unlean
from minipeft.files import restore
from minipeft.injection import attach as verbs
from minipeft.injection import rollback
from minipeft.injection.module_tree import adapted_layers
from minipeft.merging import merge
from minipeft.merging.unmerge import Undo
from minipeft.python.class_swap import plain_class


def everything(model):
    """Each module with its class, the identity of its ``__dict__`` and of all that is in it, and each tensor's flag and bytes."""
    modules = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = vars(module)
        inside = {key: list(map(id, value.values())) for key, value in own.items() if isinstance(value, dict)}
        modules[name] = (id(module), type(module), id(own), {key: id(value) for key, value in own.items()}, inside)
    tensors = {
        name: (id(t), t.requires_grad, t.data_ptr(), t.detach().numpy().tobytes())
        for name, t in model.state_dict(keep_vars=True).items()
    }
    state = vars(model).get(verbs.STATE)
    known = {} if state is None else {**vars(state), **vars(state.switch)}
    objects = {"switch", "changing"}
    return modules, tensors, {key: str(value) if key in objects else copy.copy(value) for key, value in known.items()}


def plain(tmp_path):
    return gpt2()


def with_one(tmp_path):
    return adapted(modules_to_save=["ln_f"])


def with_two(tmp_path):
    model = adapted(modules_to_save=["ln_f"])
    model.add_adapter("other", LoraConfig(target_modules=["c_attn", "c_fc"], modules_to_save=["ln_1"]))
    return model


def two_plain(tmp_path):
    model = adapted()
    model.add_adapter("b", LoraConfig(init_lora_weights=False))
    return model


def merged(tmp_path):
    model = adapted()
    model.merge_adapter()
    return model


OTHER = LoraConfig(target_modules=["c_attn", "c_proj"], modules_to_save=["ln_1"])
VERBS = {
    "get_lora_model": (plain, lambda model, _: get_lora_model(model, OTHER)),
    "load_adapter": (plain, lambda model, folder: load_adapter(model, folder)),
    "add_adapter": (with_one, lambda model, _: model.add_adapter("other", OTHER)),
    "add_adapter, merged": (merged, lambda model, _: model.add_adapter("other", OTHER)),
    "load a second": (with_one, lambda model, folder: model.load_adapter(folder, "other")),
    "set_adapter": (with_two, lambda model, _: model.set_adapter("other")),
    "delete_adapter": (with_two, lambda model, _: model.delete_adapter("other")),
    "delete_adapter, active": (with_two, lambda model, _: model.delete_adapter("default", activate="other")),
    "rename_adapter": (with_two, lambda model, _: model.rename_adapter("default", "new")),
    "add_weighted_adapter": (two_plain, lambda model, _: model.add_weighted_adapter(["default", "b"], [1, 1], "new")),
    "unload": (with_two, lambda model, _: model.unload()),
}
# Functions that the verbs call on the way, by the module that calls them.
STEPS = [
    "apply",
    "wrappers_of",
    "buffer_samples",
    "hold_still",
    "let_checkpoints_train",
    "follow_loads",
    "discard",
    "eject",
]
STEPS += ["let_go", "original_class", "leave_checkpoints_alone", "put_to_rest"]


def steps_of(call, model, folder, monkeypatch):
    """The steps that a verb takes, each once."""
    taken = {}

    def noting(step, real, *args, **kwargs):
        taken[step] = True
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        for step in STEPS:
            patch.setattr(verbs, step, functools.partial(noting, step, getattr(verbs, step)))
        call(model, folder)
    return list(taken)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_breaks_off_at_any_step_leaves_the_model_as_it_was(verb, tmp_path, monkeypatch):
    adapted().save_pretrained(tmp_path)
    make, call = VERBS[verb]
    steps = steps_of(call, make(tmp_path), tmp_path, monkeypatch)
    assert steps
    places = itertools.product(steps, (True, False))  # before the step has done its work, and after
    for (step, first), error in zip(places, itertools.cycle((KeyboardInterrupt, RuntimeError, MemoryError))):
        model, real = make(tmp_path), getattr(verbs, step)
        output, before = logits(model), everything(model)

        def failing(*args, real=real, first=first, error=error, **kwargs):
            if not first:
                real(*args, **kwargs)
            raise error("here")

        with monkeypatch.context() as patch:
            patch.setattr(verbs, step, failing)
            with pytest.raises(error, match="here"):
                call(model, tmp_path)
        if "merged" not in verb:  # which is unmerged and merged again, into other tensors
            assert everything(model) == before, step
        assert torch.equal(logits(model), output)
        call(model, tmp_path)  # and it still can be done


def two_merged():
    model = two_plain(None)
    model.merge_adapter(["default", "b"])  # the second does not act when it is not merged
    return model


@pytest.mark.parametrize("verb", ["unmerge_adapter", "unload", "disable_adapter"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_unmerging_that_breaks_off_leaves_every_layer_merged(verb, error, monkeypatch):
    model, base = two_merged(), gpt2()
    output, calls, real = logits(model), itertools.count(1), Undo.check
    last = 2 * sum(1 for _ in adapted_layers(model))  # each is checked twice

    def failing(*args):
        if next(calls) == last:
            raise error("here")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Undo, "check", failing)
        with (
            pytest.raises(error, match="here"),
            model.disable_adapter() if verb == "disable_adapter" else nullcontext(),
        ):
            getattr(model, verb)()
    assert torch.equal(logits(model), output)
    assert all(layer.merged == ("default", "b") for _, layer in adapted_layers(model))
    assert torch.equal(logits(model.unload()), logits(base))


def test_ctrl_c_at_the_end_of_a_merge_takes_it_back(monkeypatch):
    model = two_plain(None)
    output, before = logits(model), everything(model)
    with monkeypatch.context() as patch:
        patch.setattr("minipeft.merging.mergeable_model.watch", lambda *args: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            model.merge_adapter(["default", "b"])
    assert everything(model) == before
    assert torch.equal(logits(model), output)


def test_ctrl_c_while_adapters_are_merged_again_waits_until_they_are(monkeypatch):
    model, real = two_merged(), merge.plan_merge
    output = logits(model)

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), model.disable_adapter():
        patch.setattr(merge, "plan_merge", interrupted)
    assert torch.equal(logits(model), output)
    assert model.unload() is model


def test_ctrl_c_while_lean_tries_the_model_leaves_its_mode():
    model = adapted().eval()
    model.transformer.h[1].train = lambda mode: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        lean(model)
    assert not any(module.training for module in model.modules())


def interrupted_first(real):
    """The same function, but Ctrl-C comes when it is called."""

    def call(*args):
        signal.raise_signal(signal.SIGINT)
        return real(*args)

    return call


def test_ctrl_c_while_lean_is_undone_waits_until_it_is(monkeypatch):
    model = lean(adapted())
    monkeypatch.setattr("minipeft.memory.lean.plain_class", interrupted_first(plain_class))
    with pytest.raises(KeyboardInterrupt):
        unlean(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in adapted().modules()]


def test_ctrl_c_while_adapters_are_restored_waits_until_they_are(monkeypatch):
    model, wanted = two_plain(None), two_plain(None)
    disturb(wanted, seed=7)
    values = {name: dict(wanted.adapter_state_dict(name)) for name in ("default", "b")}
    monkeypatch.setattr(type(model), "adapter_state_dict", interrupted_first(type(model).adapter_state_dict))
    with pytest.raises(KeyboardInterrupt):
        restore._write(model, values)
    monkeypatch.undo()
    assert torch.equal(logits(model), logits(wanted))


def test_flags_are_put_back_in_the_middle_of_switching(monkeypatch):
    model, calls = with_two(None), []
    before, real = everything(model), torch.Tensor.requires_grad_

    def failing(tensor, *args):
        calls.append(tensor)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(tensor, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "requires_grad_", failing)
        with pytest.raises(KeyboardInterrupt):
            model.set_adapter("other")
    assert everything(model) == before


def test_what_is_kept_costs_no_copy_of_a_tensor():
    model = gpt2()

    def half():
        with rollback.unchanged_on_error(model):
            model.lm_head = None
            model.transformer.h[0].attn.extra = 1
            model.transformer.wte.weight.requires_grad_(False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.wte.weight.requires_grad
    assert not hasattr(model.transformer.h[0].attn, "extra")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`torch.jit:FutureWarning")
def test_a_scripted_module_in_modules_to_save_is_refused_by_name():
    model = nn.Sequential(torch.jit.script(nn.Linear(6, 6)), nn.Linear(6, 5))
    with pytest.raises(TargetError, match=r"0 cannot be trained in full.*Nothing was changed"):
        get_lora_model(model, LoraConfig(target_modules=["1"], modules_to_save=["0"]))
    assert type(model) is nn.Sequential
    assert all(parameter.requires_grad for parameter in model.parameters())


class Locked(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle '_thread.lock' object")


def test_a_module_that_cannot_be_copied_is_refused_by_name():
    model = nn.Sequential(Locked(6, 6), nn.Linear(6, 5))
    with pytest.raises(
        TargetError, match=r"0 cannot be trained in full, since Locked cannot be copied \(cannot pickle"
    ):
        get_lora_model(model, LoraConfig(target_modules=["1"], modules_to_save=["0"]))


def weight_norm(layer):
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(layer)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.3)
    return layer


@pytest.mark.parametrize("computed", [weight_norm, torch.nn.utils.spectral_norm, pruned])
def test_a_layer_whose_weight_is_computed_can_train_in_full(computed, tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), computed(nn.Linear(6, 5)))

    x, base = torch.randn(3, 6), model()
    base(x).sum().backward()  # now the weight that it keeps has a history, which deepcopy refuses
    before = base.eval()(x)
    tuned = get_lora_model(base, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    assert torch.equal(tuned.eval()(x), before)
    tuned.train()(x).square().sum().backward()
    torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 0.1).step()
    after = tuned.eval()(x)
    assert not torch.allclose(after, before)
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(x), before)
    tuned.save_pretrained(tmp_path)
    torch.testing.assert_close(load_adapter(model().eval(), tmp_path)(x), after)

"""Training several adapters in one batch: each learns what it would have learned alone."""

import copy
import dataclasses
import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny_layers import OneLayer
from tiny_models import VOCABULARY, foreign_code, gpt2, llama, refuses, token_ids, trainable
from torch import nn
from torch.utils.checkpoint import checkpoint

import minipeft
from minipeft import ConfigError, LoraConfig, StateError, per_adapter_loss
from minipeft.kernels.block_linear import block_linear, stacked

NAMES = ["a", "b", "c", "a", "d", "e", "__base__"]
CONFIGS = {
    "a": LoraConfig(r=2, target_modules="all-linear"),
    "b": LoraConfig(r=5, lora_alpha=3, target_modules=["c_attn"], bias="lora_only"),
    "c": LoraConfig(r=2, use_dora=True),
    "d": minipeft.IA3Config(),
    "e": minipeft.VeraConfig(r=4),
}
RATES = {"a": 1e-2, "b": 3e-3, "c": 1e-2, "d": 3e-2, "e": 1e-2}


def together(model=None, configs=CONFIGS):
    """A model with these adapters, all of which learn; the first is active."""
    model = gpt2() if model is None else model
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        if isinstance(model, minipeft.AdaptedModel):
            model.add_adapter(name, config)
        else:
            minipeft.get_adapter_model(model, config, name)
    model.train_adapters(list(configs))
    return model.train()


def values(model, name):
    return {key: tensor.detach().clone() for key, tensor in model.adapter_state_dict(name).items()}


def gradients(model, name):
    return [None if p.grad is None else p.grad.clone() for p in model.adapter_parameters(name)]


def optimizer(model, name):
    made = torch.optim.AdamW(model.adapter_parameters(name), lr=RATES[name])
    return made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step * RATES[name]))


def train(model, steps, loss_of):
    """Fifty steps, each adapter with an optimizer, a schedule and a clipped gradient of its own; returns the last loss."""
    for step in range(25):
        loss = loss_of(token_ids(4, 5, seed=step))
        loss.backward()
        for name, (own, schedule) in steps.items():
            torch.nn.utils.clip_grad_norm_(model.adapter_parameters(name), 0.5)
            own.step()
            schedule.step()
            own.zero_grad()
    return loss.detach()


def test_each_adapter_learns_in_25_steps_what_it_learns_alone():
    # Without the bias of b: that of the keys has no gradient but rounding, which Adam makes as large as any.
    configs = {name: dataclasses.replace(CONFIGS[name], **({"bias": "none"} if name == "b" else {})) for name in "abc"}
    start, names = together(gpt2(n_inner=32), configs), ["a", "b", "c", "a"]
    mixed = copy.deepcopy(start)
    steps = {name: optimizer(mixed, name) for name in configs}
    losses = lambda ids: sum(per_adapter_loss(mixed(ids, adapter_names=names).logits, ids, names).values())  # noqa: E731
    last, expected_last = train(mixed, steps, losses), 0
    for name in configs:
        alone = copy.deepcopy(start)
        alone.train_adapters([])
        alone.set_adapter(name)
        rows = [row for row, used in enumerate(names) if used == name]
        loss = lambda ids, model=alone, rows=rows: model(ids[rows], labels=ids[rows]).loss  # noqa: E731
        expected_last += train(alone, {name: optimizer(alone, name)}, loss)
        before, found = values(start, name), values(mixed, name)
        for key, expected in values(alone, name).items():
            moved = (expected - before[key]).norm()
            assert moved > 0
            assert (found[key] - expected).norm() <= 1e-5 * moved, (name, key)
    assert torch.allclose(last, expected_last, rtol=1e-5)


def loss_gradients(model, ids, names=NAMES):
    model.zero_grad()
    sum(per_adapter_loss(model(ids, adapter_names=names).logits, ids, names).values()).backward()
    return {name: gradients(model, name) for name in model.adapter_configs}


def assert_same(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert tensors
        for own, tensor in zip(found[name], tensors, strict=True):
            assert (own - tensor).norm() <= tolerance * (1e-6 + tensor.norm()), name


def disturbed(model):
    with torch.no_grad():
        for name in model.adapter_configs:
            for parameter in model.adapter_parameters(name):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "lean mlp", "lean block", "lean sqrt"])
def test_a_recomputed_block_finds_its_rows(kind):
    model, ids = disturbed(together()), token_ids(len(NAMES), 6)
    expected = loss_gradients(model, ids)
    if kind.startswith("lean"):
        minipeft.lean(model, checkpointing=kind.split()[1], chunked_loss=False)
        loss_gradients(model, ids)
    else:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its name in 5
        enable({"use_reentrant": kind == "reentrant"})
    assert_same(loss_gradients(model, ids), expected)
    # Two passes before one backward pass, each with its own rows.
    other = NAMES[1:] + NAMES[:1]
    model.zero_grad()
    losses = [per_adapter_loss(model(ids, adapter_names=names).logits, ids, names) for names in (NAMES, other)]
    sum(loss for some in losses for loss in some.values()).backward()
    both = {name: gradients(model, name) for name in model.adapter_configs}
    second = loss_gradients(model, ids, other)
    added = {name: [a + b for a, b in zip(expected[name], second[name], strict=True)] for name in expected}
    assert_same(both, added)


class OwnCheckpoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return checkpoint(self.second, self.first(x).tanh(), use_reentrant=False)


def test_a_checkpoint_that_forgets_the_rows_is_an_error():
    model = together(OwnCheckpoint(), {name: LoraConfig(r=2, target_modules=["first", "second"]) for name in "ab"})
    x = torch.randn(2, 4)
    with pytest.raises(StateError, match="does not say which rows"):
        model(x, adapter_names=["a", "b"]).sum().backward()
    model(x).sum().backward()  # without names it may be recomputed


def test_nan_in_one_loss_leaves_the_gradients_of_the_others():
    model, ids = disturbed(together()), token_ids(len(NAMES), 6)
    expected = loss_gradients(model, ids)
    with torch.no_grad():
        model.adapter_parameters("b")[0].fill_(math.nan)
    found = loss_gradients(model, ids)
    assert all(tensor.isnan().any() for tensor in found.pop("b"))
    expected.pop("b")
    assert_same(found, expected)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("bad", [{"use_dora": True}, {"modules_to_save": ["second"]}], ids=str)
def test_nan_in_one_adapter_of_a_compiled_model_leaves_the_gradients_of_the_others(bad):
    targets = ["first"] if "modules_to_save" in bad else ["first", "second"]
    configs = {"a": minipeft.IA3Config(target_modules=targets, feedforward_modules=[])}
    model = together(TwoLayers(), {**configs, "b": LoraConfig(r=2, target_modules=targets, **bad)})
    call, x, names = torch.compile(model, backend="aot_eager"), torch.randn(3, 4), ["a", "b", "__base__"]
    found = []
    for value in (0.1, math.nan):
        with torch.no_grad():
            for parameter in model.adapter_parameters("b"):
                parameter.fill_(value)
        model.zero_grad()
        call(x, adapter_names=names).sin().sum().backward()
        found.append({"a": gradients(model, "a")})
    torch._dynamo.reset()
    assert_same(found[1], found[0])


def test_who_learns_is_said_once_and_plain_verbs_stay_right():
    model = minipeft.get_lora_model(gpt2(), LoraConfig(r=2), "a").train()
    model.add_adapter("b", LoraConfig(r=2, freeze_lora_A=True))
    model.add_adapter("c", LoraConfig(r=2, inference_mode=True))
    owned = {name: {id(p) for p in model.adapter_parameters(name)} for name in "ab"}
    learning = lambda: {id(p) for p in model.parameters() if p.requires_grad}  # noqa: E731
    call = functools.partial(model, token_ids(), adapter_names=["a", "b"])
    assert learning() == owned["a"]
    refuses(StateError, model, call, "'b' would not learn", "train_adapters")
    with torch.no_grad():
        call()
    model.train_adapters(["a", "b"])
    assert learning() == owned["a"] | owned["b"]
    call()
    model.set_adapter("c")
    assert learning() == owned["a"] | owned["b"]
    model.set_adapter("b")
    model.train_adapters([])
    assert learning() == owned["b"]
    model.train_adapters(["a"])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert trainable(copied) == trainable(model)
        copied.train_adapters([])
        assert all(".b." in name for name in trainable(copied))
    model.delete_adapter("a")
    assert learning() == owned["b"]
    refuses(StateError, model, lambda: model.train_adapters(["b", "cc"]), "no adapter 'cc'", "closest: 'c'")
    refuses(StateError, model, lambda: model.train_adapters(["c"]), "'c' was made or loaded not to train")
    refuses(StateError, model, lambda: model.adapter_parameters("c"), "not to train")


def test_a_schedule_goes_on_for_adapters_that_learn_and_do_not_act():
    config = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 6, "target_modules": ["c_attn"]}
    model = together(configs={"a": LoraConfig(r=2), "b": minipeft.AdaLoraConfig(**config)})
    own, names = torch.optim.SGD([p for n in "ab" for p in model.adapter_parameters(n)], lr=0.1), ["b", "a"]
    for step in range(6):
        ids = token_ids(seed=step)
        loss = sum(per_adapter_loss(model(ids, adapter_names=names).logits, ids, names).values())
        (loss + minipeft.extra_loss(model)).backward()
        own.step()
        minipeft.after_step(model, step)
        own.zero_grad()
    ranks = [int((p != 0).sum()) for p in model.adapter_parameters("b") if p.shape == (4, 1)]
    assert sum(ranks) <= 2 * len(ranks) < 4 * len(ranks)


def test_dropout_is_each_adapters_own():
    model = together(
        OneLayer(nn.Linear(64, 3)),
        {
            "a": LoraConfig(r=4, lora_dropout=0.5, target_modules=["layer"], init_lora_weights=False),
            "b": LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False),
        },
    )
    x, names = torch.randn(2, 64), ["a", "b"]
    draws = torch.stack([model(x, adapter_names=names).detach() for _ in range(500)])
    model.eval()
    expected = model(x, adapter_names=names).detach()
    assert (draws[:, 1] - expected[1]).abs().max() < 1e-5
    spread = draws[:, 0].std(0)
    assert (spread > 0.01).all()
    assert ((draws[:, 0].mean(0) - expected[0]).abs() < 5 * spread / 500**0.5).all()


def test_the_loss_of_each_adapter_is_the_mean_over_its_own_tokens():
    model, ids = gpt2(), token_ids(4, 7)
    labels = ids.masked_fill(torch.rand(4, 7) < 0.4, -100)
    names, logits = ["a", "b", "a", "__base__"], model(ids).logits
    found = per_adapter_loss(logits, labels, names)
    assert list(found) == ["a", "b"]
    for name, rows in {"a": [0, 2], "b": [1]}.items():
        assert torch.allclose(found[name], model(ids[rows], labels=labels[rows]).loss)
    unshifted = per_adapter_loss(logits, labels, names, shift=False)["a"]
    assert torch.allclose(unshifted, F.cross_entropy(logits[[0, 2]].flatten(0, 1), labels[[0, 2]].flatten()))
    classes, kinds = torch.randn(4, 3).bfloat16(), torch.tensor([2, 0, 1, 1])
    one = per_adapter_loss(classes, kinds, names)["a"]
    assert one.dtype is torch.float32
    assert torch.allclose(one, F.cross_entropy(classes[[0, 2]].float(), kinds[[0, 2]]))
    assert per_adapter_loss(logits, torch.full_like(labels, -100), names)["a"] == 0
    for wrong in (names[:3], [*names, "a"]):
        with pytest.raises(ConfigError, match="must agree on the rows"):
            per_adapter_loss(logits, labels, wrong)
    with pytest.raises(ConfigError, match="must agree"):
        per_adapter_loss(logits, labels[:, 1:], names)


def test_gradients_of_the_blocked_product_are_exact():
    weight, bias = torch.randn(5, 4).double(), torch.randn(5).double()
    x, down, up = (torch.randn(3, *shape).double().requires_grad_() for shape in ((2, 4), (2, 4), (5, 2)))
    for given in (weight, lambda dtype: weight.to(dtype)):
        call = functools.partial(lambda given, *args: block_linear(args[0], given, bias, *args[1:]), given)
        expected = x @ weight.t() + bias + (x @ down.mT) @ up.mT
        assert torch.allclose(call(x, down, up), expected)
        assert torch.autograd.gradcheck(call, (x, down, up))
        assert torch.autograd.gradgradcheck(call, (x, down, up))
        assert torch.autograd.gradcheck(functools.partial(call, x.detach()), (down, up))
        assert torch.autograd.gradcheck(lambda value, call=call: call(value, down.detach(), up.detach()), (x,))


def test_factors_of_other_ranks_and_of_no_adapter_are_padded():
    pairs = [(torch.randn(3, 2), torch.randn(2, 4)), None, (torch.randn(3, 1).double(), torch.randn(1, 4).double())]
    down, up = stacked(pairs, torch.float64)
    assert (down.shape, up.shape) == ((3, 2, 4), (3, 3, 2))
    for place, pair in enumerate(pairs):
        expected = torch.zeros(3, 4).double() if pair is None else pair[0].double() @ pair[1].double()
        assert torch.allclose(up[place] @ down[place], expected)


@pytest.mark.parametrize("kind", ["nf4", "bfloat16", "autocast"])
def test_other_bases_give_the_gradients_of_each_adapter_alone(kind):
    model = llama(initializer_range=0.05)
    with foreign_code():
        if kind == "nf4":
            pytest.importorskip("bitsandbytes")
            minipeft.quantize(model, "nf4")
        together(
            model.to(torch.bfloat16) if kind == "bfloat16" else model, {"a": LoraConfig(r=2), "b": LoraConfig(r=4)}
        )
    ids, names = token_ids(3, 6), ["a", "b", "a"]
    disturbed(model)

    def gradient(call):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            call().backward()

    gradient(lambda: sum(per_adapter_loss(model(ids, adapter_names=names).logits, ids, names).values()))
    found = {name: gradients(model, name) for name in "ab"}
    for name, rows in {"a": [0, 2], "b": [1]}.items():
        model.set_adapter(name)
        gradient(lambda rows=rows: model(ids[rows], labels=ids[rows]).loss)
        assert_same({name: found[name]}, {name: gradients(model, name)}, 1e-4 if kind == "nf4" else 0.05)


def test_the_base_is_kept_once_and_never_learns():
    model, ids = together(), token_ids(len(NAMES), 6)
    base = [p for name, p in model.named_parameters() if ".adapters." not in name]
    before = [p.clone() for p in base]
    loss_gradients(model, ids)
    assert all(p.grad is None and not p.requires_grad for p in base)
    assert all(torch.equal(p, old) for p, old in zip(base, before, strict=True))
    assert model.config.vocab_size == VOCABULARY

"""Any sequence of verbs against a dense float64 model: the same outputs, and at the end a base that is the same bit for bit."""

import copy

import numpy
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft import LoraConfig, MinipeftError, get_lora_model

NAMES = ("a", "b", "c", "d", "e")
RANKS, ALPHAS = st.integers(1, 3), st.sampled_from([1, 2, 5])
SCALES = st.sampled_from([0.0, -1.5, 0.5, 1.0, 2.0])


class Net(nn.Module):
    """Three layer types; without activations, so that every update shows in the output."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(7, 6)
        self.turned = Conv1D(5, 6)
        self.last = nn.Linear(5, 4)

    def forward(self, ids):
        return self.last(self.turned(self.rows(ids)))


LAYERS = ("rows", "turned", "last")
IDS = torch.arange(7)


class Dense:
    """What the verbs mean, with whole matrices: the base's weights (out, in), and per adapter an update for each."""

    def __init__(self, net):
        self.bias = {"turned": net.turned.bias.detach().clone(), "last": net.last.bias.detach().clone()}
        self.base = {"rows": net.rows.weight.detach().T.clone(), "turned": net.turned.weight.detach().T.clone()}
        self.base["last"] = net.last.weight.detach().clone()
        self.updates, self.scales = {}, {}
        self.active, self.merged, self.enabled = [], [], True

    def output(self):
        acting = dict.fromkeys([*self.merged, *self.active]) if self.enabled else {}
        weights = dict(self.base)
        for name in acting:
            for path in LAYERS:
                weights[path] = weights[path] + self.scales[name][path] * self.updates[name][path]
        h = weights["rows"].T
        for path in LAYERS[1:]:
            h = h @ weights[path].T + self.bias[path]
        return h

    def scaled(self, name):
        return {path: self.scales[name][path] * self.updates[name][path] for path in LAYERS}


class Verbs(RuleBasedStateMachine):
    @initialize(r=RANKS, alpha=ALPHAS, seed=st.integers(0, 100))
    def start(self, r, alpha, seed):
        torch.manual_seed(seed)
        net = Net().double()
        self.bits = {name: tensor.numpy().tobytes() for name, tensor in net.state_dict().items()}
        self.dense, self.model = Dense(copy.deepcopy(net)), net
        self.model = get_lora_model(net, self.config(r, alpha), "a")
        self.know("a")
        self.dense.active = ["a"]

    def config(self, r, alpha):
        return LoraConfig(r=r, lora_alpha=alpha, target_modules=list(LAYERS), init_lora_weights=False)

    def know(self, name):
        """Read an adapter's factors into a dense update."""
        self.dense.scales[name] = dict.fromkeys(LAYERS, 1.0)
        self.dense.updates[name] = {}
        for path in LAYERS:
            lora = self.model.get_submodule(path).adapter(name)
            config = self.model.adapter_configs[name]
            self.dense.updates[name][path] = config.lora_alpha / config.r * (lora.lora_B @ lora.lora_A).detach()

    def some(self, data, least=1):
        known = list(self.dense.updates)
        return data.draw(st.lists(st.sampled_from(known), min_size=least, max_size=3, unique=True))

    def free(self):
        return next(iter([name for name in NAMES if name not in self.dense.updates]), None)

    def refused(self, verb, *args, **options):
        with pytest.raises(MinipeftError, match=r"Nothing was changed\.$"):
            verb(*args, **options)

    @precondition(lambda self: self.free())
    @rule(r=RANKS, alpha=ALPHAS)
    def add(self, r, alpha):
        name = self.free()
        self.model.add_adapter(name, self.config(r, alpha))
        self.know(name)

    @rule(data=st.data())
    def switch(self, data):
        names = self.some(data)
        if self.dense.merged:
            return self.refused(self.model.set_adapter, names)
        self.model.set_adapter(names)
        self.dense.active = names

    @rule(data=st.data(), new=st.sampled_from(NAMES))
    def rename(self, data, new):
        old = self.some(data)[0]
        if new in self.dense.updates and new != old:
            return self.refused(self.model.rename_adapter, old, new)
        self.model.rename_adapter(old, new)
        dense = self.dense
        dense.updates, dense.scales = (
            {new if k == old else k: v for k, v in table.items()} for table in (dense.updates, dense.scales)
        )
        dense.active, dense.merged = ([new if n == old else n for n in names] for names in (dense.active, dense.merged))

    @rule(data=st.data(), scale=SCALES, pattern=st.sampled_from([None, *LAYERS, "(rows|last)"]))
    def scale(self, data, scale, pattern):
        name = self.some(data)[0]
        if name in self.dense.merged:
            return self.refused(self.model.set_scale, name, scale, pattern)
        self.model.set_scale(name, scale, pattern)
        for path in LAYERS:
            if pattern is None or path in pattern:
                self.dense.scales[name][path] = scale

    @precondition(lambda self: self.free())
    @rule(data=st.data(), kind=st.sampled_from(["cat", "linear", "svd"]), rank=RANKS)
    def combine(self, data, kind, rank):
        names, new, dense = self.some(data), self.free(), self.dense
        weights = [data.draw(st.sampled_from([-1.0, 0.5, 2.0])) for _ in names]
        ranks = {self.model.adapter_configs[name].r for name in names}
        args = (names, weights, new, kind, *([rank] if kind == "svd" else []))
        if dense.merged or (kind == "linear" and len(ranks) > 1):
            return self.refused(self.model.add_weighted_adapter, *args)
        report = self.model.add_weighted_adapter(*args)
        self.know(new)
        parts = [dense.scaled(name) for name in names]
        for path in LAYERS:
            total = sum(weight * part[path] for weight, part in zip(weights, parts, strict=True))
            if kind == "cat":
                expected = total
            elif kind == "svd":
                U, s, Vh = torch.linalg.svd(total, full_matrices=False)
                expected = U[:, :rank] * s[:rank] @ Vh[:rank]
            else:
                A, B = 0.0, 0.0
                for name, weight in zip(names, weights, strict=True):
                    config, lora = self.model.adapter_configs[name], self.model.get_submodule(path).adapter(name)
                    signed = weight * config.lora_alpha / config.r * dense.scales[name][path]
                    A, B = (
                        A + numpy.sign(signed) * abs(signed) ** 0.5 * lora.lora_A,
                        B + abs(signed) ** 0.5 * lora.lora_B,
                    )
                expected = (B @ A).detach() if torch.is_tensor(A) else torch.zeros_like(total)
            size = 1 + float(total.norm())
            assert float((dense.updates[new][path] - expected).norm()) < 1e-8 * size
            assert abs(report.distances[path] - float((expected - total).norm())) < 1e-8 * size

    @rule(data=st.data())
    def delete(self, data):
        names, dense = self.some(data), self.dense
        left = [name for name in dense.updates if name not in names]
        stay = [name for name in dense.active if name not in names]
        activate = data.draw(st.one_of(st.none(), st.sampled_from(left))) if left else None
        changes = activate is not None and [activate] != dense.active
        if set(names) & set(dense.merged) or not (stay or activate) or (changes and dense.merged):
            return self.refused(self.model.delete_adapter, names, activate=activate)
        self.model.delete_adapter(names, activate=activate)
        dense.active = stay if activate is None else [activate]
        for name in names:
            del dense.updates[name], dense.scales[name]

    @rule(data=st.data())
    def merge(self, data):
        names = data.draw(st.one_of(st.none(), st.just(self.some(data))))
        if not self.dense.enabled:
            return self.refused(self.model.merge_adapter, names)
        self.model.merge_adapter(names)
        self.dense.merged = list(dict.fromkeys([*self.dense.merged, *(names or self.dense.active)]))

    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.dense.merged = []

    @precondition(lambda self: not self.dense.merged)
    @rule(on=st.booleans())
    def turn(self, on):
        (self.model.enable_adapters if on else self.model.disable_adapters)()
        self.dense.enabled = on

    @rule()
    def within_disable(self):
        was, self.dense.enabled = self.dense.enabled, False
        with self.model.disable_adapter():
            torch.testing.assert_close(self.model(IDS), self.dense.output())
        self.dense.enabled = was

    @rule(data=st.data())
    def mixed(self, data):
        """Each row by its own adapter."""
        dense, was = self.dense, (self.dense.active, self.dense.merged)
        names = data.draw(st.lists(st.sampled_from([*dense.updates, "__base__"]), min_size=len(IDS), max_size=len(IDS)))
        with torch.no_grad():
            if dense.merged:
                with pytest.raises(MinipeftError, match="merged"):
                    self.model(IDS, adapter_names=names)
                return
            found = self.model(IDS, adapter_names=names)
        for row, name in enumerate(names):
            dense.active = [] if name == "__base__" else [name]
            torch.testing.assert_close(found[row], dense.output()[row], atol=1e-8, rtol=1e-8)
        dense.active, dense.merged = was

    @rule()
    def train(self):
        if self.dense.merged or not self.dense.enabled:
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if trained:
            self.model.zero_grad()
            self.model(IDS).square().mean().backward()
            with torch.no_grad():
                for parameter in trained:
                    parameter -= 1e-3 * parameter.grad.clamp(-1, 1)
        for name in self.dense.updates:
            kept = self.dense.scales[name]
            self.know(name)
            self.dense.scales[name] = kept

    @invariant()
    def outputs_are_the_same(self):
        if not hasattr(self, "dense"):
            return
        with torch.set_grad_enabled(not self.dense.merged):  # training while one of several is merged is a warning
            torch.testing.assert_close(self.model(IDS), self.dense.output(), atol=1e-8, rtol=1e-8)
        assert list(self.model.adapter_configs) == list(self.dense.updates)
        assert self.model.active_adapters == self.dense.active
        status = {row.adapter: row for row in self.model.adapter_status()}
        assert [name for name, row in status.items() if row.merged] == [
            n for n in self.dense.updates if n in self.dense.merged
        ]

    def teardown(self):
        if hasattr(self, "dense"):
            base = self.model.unload()
            assert {name: tensor.numpy().tobytes() for name, tensor in base.state_dict().items()} == self.bits
            assert type(base) is Net


class FewVerbs(Verbs):
    pass


def how_many(examples):
    return settings(
        max_examples=examples,
        stateful_step_count=15,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # a failure shows every step; making it shorter takes minutes
        suppress_health_check=list(HealthCheck),
    )


FewVerbs.TestCase.settings, Verbs.TestCase.settings = how_many(8), how_many(200)
TestFewSequences = FewVerbs.TestCase
TestManySequences = pytest.mark.slow(Verbs.TestCase)

"""Every registered method on every registered layer keeps the contract; and the contract has teeth."""

import dataclasses
import functools
import random
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft import Adapter, AdapterConfig, ConfigError, ContractError, LayerOps, RegistryError, TargetError
from minipeft.layers.embedding import EmbeddingOps
from minipeft.layers.linear import Conv1DOps, LinearOps
from minipeft.methods.lora import Lora, LoraConfig
from minipeft.registry import registry
from minipeft.testing import check_layer, check_method, check_pair, examples, register_example, register_options
from minipeft.testing.checks import CHECKS

ALL = {check.__name__ for check in CHECKS}
MERGES = {"merge_float64", "merge_float32", "merge_bfloat16"}
PAIRS = [(method, layer) for method in registry.method_names() for layer in registry.layers()]

of_built_in = functools.cache(check_pair)  # nothing of a built-in pair is tried twice


@pytest.fixture
def uncompiled(monkeypatch):
    """All checks but `one_graph`, which takes as long as the others together."""
    monkeypatch.setattr("minipeft.testing.report.CHECKS", [c for c in CHECKS if c.__name__ != "one_graph"])


@pytest.fixture
def isolated():
    """What a test registers is gone after it."""
    with registry.isolated():
        yield


LINEAR, EMBEDDING, CONV1D = (registry.qualified(layer) for layer in (nn.Linear, nn.Embedding, Conv1D))
# Beside linear layers: methods that read all of the weight or its rows, of a linear layer the other way round and of a
# table. What the others compute on these is held against the merged weight in test_methods.py.
FURTHER = {
    ("dora", CONV1D),
    ("oft", CONV1D),
    ("ia3", CONV1D),
    ("dora", EMBEDDING),
    ("lokr", EMBEDDING),
    ("vera", EMBEDDING),
}


def compiled(method, layer):
    """The pairs that are always compiled: every method on one layer type, and lora on one of each kind."""
    return layer == LINEAR or (method == "lora" and layer in (EMBEDDING, CONV1D, registry.qualified(nn.Conv2d)))


def pair(method, layer):
    """Lora is always tried on every layer type, and every method on linear layers; most others are slow."""
    marks = () if method == "lora" or layer == LINEAR or (method, layer) in FURTHER else pytest.mark.slow
    return pytest.param(method, layer, marks=marks, id=f"{method}-{layer.rpartition('.')[2]}")


@pytest.mark.parametrize(("method", "layer"), [pair(*names) for names in PAIRS])
def test_every_method_keeps_the_contract_on_every_layer_or_says_what_is_missing(method, layer, request):
    if not compiled(method, layer):
        request.getfixturevalue("uncompiled")
    report = of_built_in(method, layer)
    if report.refused is not None:
        short = layer.rpartition(".")[2].lower()
        assert short in report.refused.lower() or method in report.refused.lower(), report.refused
        assert len(report.refused) > 40, "a refusal says what is missing"
    elif not report.passed:
        assert "is not installed" in next(iter(report.skipped.values())), f"{layer} has no example: {report}"
        pytest.skip(str(report))
    else:
        assert set(report.passed) | set(report.skipped) == (ALL if compiled(method, layer) else ALL - {"one_graph"})
        may_skip = MERGES | {
            "shapes",
            "one_graph",
            "copies",
            "reads",
            "whole_state",
            "offloading",
        }  # each only for a reason that lies in the layer itself
        assert set(report.skipped) <= may_skip, report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layer"), [pair for pair in PAIRS if not compiled(*pair)], ids=lambda name: name.rpartition(".")[2]
)
def test_every_other_pair_compiles_to_one_graph(method, layer, monkeypatch):
    monkeypatch.setattr("minipeft.testing.report.CHECKS", [c for c in CHECKS if c.__name__ == "one_graph"])
    report = check_pair(method, layer)
    assert report.refused or report.skipped or report.passed == ("one_graph",)


def test_lora_skips_nothing_on_linear():
    report = of_built_in("lora", registry.qualified(nn.Linear))
    assert set(report.passed) == ALL
    assert report.served
    assert str(report) == f"lora on Linear: {len(ALL)} of {len(ALL)} checks passed"


@pytest.mark.usefixtures("uncompiled")
def test_options_of_the_method_are_tried_too():
    assert check_pair("lora", nn.Linear, r=3, use_rslora=True, bias="lora_only").served


@dataclass(frozen=True, kw_only=True)
class TrialConfig(AdapterConfig):
    """Options of the method that the tests below break."""

    method = "trial"


class Trial(Adapter):
    """y' = v * (y + B A x): a scale and a low-rank path, so that each of the ops is used; it keeps the contract."""

    config_class = TrialConfig
    scaling = 2.0

    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        out_features, in_features = ops.shape(base)
        weight = ops.read_weight(base)
        self.is_embedding = ops.is_embedding
        self.v = nn.Parameter(weight.new_ones(out_features))
        self.A = nn.Parameter(torch.randn(3, in_features).to(weight) / 4)
        self.B = nn.Parameter(weight.new_zeros(out_features, 3))

    def path(self, base, ops, x, dtype):
        h = ops.project_in(base, x, self.A.to(dtype)) * self.scaling
        return ops.project_out(base, h, self.B.to(dtype))

    def forward(self, base, ops, x, y):
        return (y + self.path(base, ops, x, y.dtype)) * ops.per_feature(base, self.v.to(y.dtype))

    def merge(self, weight, bias):
        merged = weight + self.scaling * (self.B @ self.A).to(weight.dtype)
        v = self.v.to(weight.dtype)
        return v[:, None] * merged, None if bias is None else v * bias


class ForgetsScaling(Trial):
    def merge(self, weight, bias):
        v = self.v.to(weight.dtype)
        return v[:, None] * (weight + (self.B @ self.A).to(weight.dtype)), None if bias is None else v * bias


class ForgetsBias(Trial):
    def merge(self, weight, bias):
        return super().merge(weight, bias)[0], bias


class TransposesOnSquares(Trial):
    def merge(self, weight, bias):
        merged, bias = super().merge(weight, bias)
        return merged.t() if merged.shape[0] == merged.shape[1] else merged, bias


class ClaimsAnotherUpdate(Trial):
    def delta(self, weight):
        return torch.full_like(weight, 0.5)


class ClaimsAnotherProduct(Trial):
    def factors(self):
        return self.B.detach(), self.A.detach()


class MergesInPlace(Trial):
    def merge(self, weight, bias):
        merged, bias = super().merge(weight, bias)
        return weight.copy_(merged), bias


class MergesInHalfPrecision(Trial):
    def merge(self, weight, bias):
        return super().merge(weight.bfloat16(), None if bias is None else bias.bfloat16())


class RoundsInFloat32(Trial):
    def merge(self, weight, bias):
        merged, bias = super().merge(weight, bias)
        return merged.bfloat16().float() if merged.dtype == torch.float32 else merged, bias


class IsIdleInBfloat16(Trial):
    def forward(self, base, ops, x, y):
        return y if y.dtype == torch.bfloat16 else super().forward(base, ops, x, y)


class WritesInPlace(Trial):
    def forward(self, base, ops, x, y):
        return y.add_(self.path(base, ops, x, y.dtype)).mul_(self.v.to(y.dtype))


class LeavesAParameterOut(Trial):
    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        self.unused = nn.Parameter(torch.zeros(3))


class CutsTheInputsGradient(Trial):
    def forward(self, base, ops, x, y):
        return super().forward(base, ops, x.detach(), y)


class IsIdle(Trial):
    def forward(self, base, ops, x, y):
        return y + 0 * (self.v.sum() + self.A.sum() + self.B.sum())


class StartsElsewhere(Trial):
    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        self.v.data.mul_(1.01)


class Widens(Trial):
    def forward(self, base, ops, x, y):
        return y + self.v * self.path(base, ops, x, y.dtype)


class DoesNotPickle(Trial):
    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        self.activation = lambda y: y


class SharesWithItsCopies(Trial):
    def __deepcopy__(self, memo):
        return self


class ForgetsATensor(Trial):
    def file_tensors(self):
        return {"A": self.A, "B": self.B}


class SavesNothing(Trial):
    def file_tensors(self):
        return {}


class KeepsTheFirstSize(Trial):
    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        self.register_buffer("size", ops.read_weight(base).detach().norm(), persistent=False)

    def forward(self, base, ops, x, y):
        return y + (super().forward(base, ops, x, y) - y) * self.size.to(y.dtype)

    def merge(self, weight, bias):
        merged, merged_bias = super().merge(weight, bias)
        size = self.size.to(weight.dtype)
        return weight + size * (merged - weight), None if bias is None else bias + size * (merged_bias - bias)


class LooksAtValues(Trial):
    def forward(self, base, ops, x, y):
        return super().forward(base, ops, x, y) if float(y.detach().sum()) < 1e30 else y


class KnowsOnlyRows(Trial):
    def forward(self, base, ops, x, y):
        return (
            super().forward(base, ops, x.view(4, -1), y) if not ops.is_embedding else super().forward(base, ops, x, y)
        )


class OwnsTheBase(Trial):
    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        self.base = base


class WritesTheBase(Trial):
    def forward(self, base, ops, x, y):
        if self.training:
            base.weight.data.mul_(1.0001)
        return super().forward(base, ops, x, y)


class ForgetsItsRandomness(Trial):
    def forward(self, base, ops, x, y):
        y = super().forward(base, ops, x, y)
        return y + random.random() * (self.v - self.v.detach()).to(y.dtype) if self.training else y


class HooksTheBase(Trial):
    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        base.register_forward_hook(print_nothing)


def print_nothing(module, args, output):
    return None


class ActsWhenDisabled(Trial):
    """From the second call on, the scale sits in a hook of the base, which nothing switches off."""

    def forward(self, base, ops, x, y):
        path, v = self.path(base, ops, x, y.dtype), self.v.to(y.dtype)
        if "trial" in base.__dict__:
            return y + path * v
        base.__dict__["trial"] = self
        base.register_forward_hook(scaled)
        return (y + path) * v


def scaled(module, args, output):
    return output * module.trial.v.to(output.dtype)


BROKEN = {
    ForgetsScaling: "merge_float64",
    ForgetsBias: "merge_float64",
    TransposesOnSquares: "merge_float64",
    ClaimsAnotherUpdate: "merge_float64",
    ClaimsAnotherProduct: "merge_float64",
    MergesInPlace: "merge_float64",
    MergesInHalfPrecision: "merge_float64",
    RoundsInFloat32: "merge_float32",
    IsIdleInBfloat16: "merge_bfloat16",
    WritesInPlace: "not_in_place",
    LeavesAParameterOut: "gradients",
    CutsTheInputsGradient: "gradients",
    IsIdle: "frozen_base",
    StartsElsewhere: "identity_at_init",
    Widens: "identity_at_init",
    DoesNotPickle: "copies",
    SharesWithItsCopies: "copies",
    ForgetsATensor: "files",
    SavesNothing: "files",
    KeepsTheFirstSize: "whole_state",
    LooksAtValues: "one_graph",
    KnowsOnlyRows: "shapes",
    OwnsTheBase: "ownership",
    WritesTheBase: "frozen_base",
    ForgetsItsRandomness: "checkpointing",
    HooksTheBase: "failed_injection",
    ActsWhenDisabled: "disabled",
}


@pytest.fixture
def three_layers():
    """Three layer types, one of each orientation and an embedding, to try a whole method on."""
    with registry.isolated(empty=True):
        for layer, ops in ((nn.Linear, LinearOps), (Conv1D, Conv1DOps), (nn.Embedding, EmbeddingOps)):
            registry.register_layer(layer)(ops)
        yield


def test_a_method_that_keeps_the_contract_passes(three_layers):
    registry.register_method("trial")(Trial)
    report = check_method("trial")
    assert {pair.layer.rpartition(".")[2] for pair in report.pairs if pair.served} >= {"Linear", "Conv1D", "Embedding"}


@pytest.mark.parametrize(("method", "check"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_method_fails_the_check_that_says_so(method, check, isolated, request):
    if check != "one_graph":
        request.getfixturevalue("uncompiled")
    registry.register_method("trial")(method)
    with pytest.raises(ContractError, match="trial on .*Linear fails") as raised:
        check_pair("trial", nn.Linear)
    assert raised.value.check == check, str(raised.value)
    assert (raised.value.method, raised.value.layer) == ("trial", "torch.nn.modules.linear.Linear")


class RefusesEmbeddings(Trial):
    def __init__(self, base, ops, config, shared):
        if ops.is_embedding:
            raise TargetError(f"trial needs vectors, and {type(base).__name__} looks indices up.")
        super().__init__(base, ops, config, shared)


class RefusesAll(Trial):
    def __init__(self, base, ops, config, shared):
        raise TargetError("trial is never content.")


class RefusesTooLate(Trial):
    def __init__(self, base, ops, config, shared):
        base.weight.data.zero_()
        raise TargetError("trial is never content; it says that nothing was changed.")


@pytest.mark.usefixtures("uncompiled")
def test_a_refusal_is_reported_with_its_words(three_layers):
    registry.register_method("trial")(RefusesEmbeddings)
    report = check_method("trial")
    refused = {layer.rpartition(".")[2]: why for (_, layer), why in report.refused.items()}
    assert refused["Embedding"] == "trial needs vectors, and Embedding looks indices up. Nothing was changed."
    assert "Linear" not in refused
    assert "trial on Embedding: refused: trial needs vectors" in str(report)


def test_a_method_that_refuses_every_layer_serves_nothing(three_layers):
    registry.register_method("trial")(RefusesAll)
    with pytest.raises(ContractError, match="trial fails 'serves'") as raised:
        check_method("trial")
    assert raised.value.check == "serves"


def test_a_refusal_that_changes_the_model_is_a_failure(isolated):
    registry.register_method("trial")(RefusesTooLate)
    with pytest.raises(ContractError, match="fails 'refusal': it is refused .* but changes the model"):
        check_pair("trial", nn.Linear)


def test_options_that_are_not_allowed_are_no_refusal_of_the_layer():
    with pytest.raises(ContractError, match="lora on .*Linear fails 'options': r must be an integer"):
        check_pair("lora", nn.Linear, r=-1)


class AsksForAnother(Trial):
    config_class = LoraConfig


def test_the_method_that_is_tried_is_the_one_that_acts(isolated):
    registry.register_method("trial")(AsksForAnother)
    with pytest.raises(ContractError, match="AsksForAnother should act, but 'Lora' does; see its config_class"):
        check_pair("trial", nn.Linear)


@pytest.mark.usefixtures("uncompiled")
def test_an_override_for_a_layer_type_is_what_is_tried(isolated):
    registry.register_method("trial")(Trial)
    registry.register_adapter("trial", layer=nn.Linear)(ForgetsScaling)
    assert check_pair("trial", nn.Embedding).served
    with pytest.raises(ContractError, match="merge_float64"):
        check_pair("trial", nn.Linear)


class Flipped(nn.Module):
    """y = x W + b, with W stored as (in, out), as in GPT-2."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / 4)
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return x @ self.weight + self.bias


class FlippedOps(LayerOps):
    def shape(self, base):
        return tuple(reversed(base.weight.shape))

    def read_weight(self, base):
        return base.weight.t()

    @torch.no_grad()
    def write_weight(self, base, weight, bias):
        base.weight.copy_(weight.t())
        base.bias.copy_(bias)
        return base


def guess(weight):
    return weight if weight.shape[0] == weight.shape[1] else weight.t()


class GuessesTheOrientation(FlippedOps):
    def read_weight(self, base):
        return guess(base.weight)

    @torch.no_grad()
    def write_weight(self, base, weight, bias):
        base.weight.copy_(guess(weight))
        base.bias.copy_(bias)
        return base


class WritesTheOtherWayRound(FlippedOps):
    @torch.no_grad()
    def write_weight(self, base, weight, bias):
        base.weight.copy_(weight.reshape(base.weight.shape))
        base.bias.copy_(bias)
        return base


class SwapsTheShape(FlippedOps):
    def shape(self, base):
        return tuple(base.weight.shape)


class LosesTheBias(FlippedOps):
    @torch.no_grad()
    def write_weight(self, base, weight, bias):
        base.weight.copy_(weight.t())
        return base


class FollowsWrongly(FlippedOps):
    def project_in(self, base, x, A):
        return nn.functional.linear(x.flip(-1), A)


class ScalesOtherFeatures(FlippedOps):
    def per_feature(self, base, v):
        return v.flip(0)


class ClaimsALinearCall(FlippedOps):
    def linear_weight(self, base, x):
        return self.read_weight(base)


class ClaimsNoMerge(FlippedOps):
    """Says that it cannot merge, which is allowed and reported."""

    can_merge = False


BROKEN_LAYERS = {
    GuessesTheOrientation: "merge_float64",
    WritesTheOtherWayRound: "layer_facts",
    SwapsTheShape: "layer_facts",
    LosesTheBias: "merge_float64",
    FollowsWrongly: "merge_float64",
    ScalesOtherFeatures: "merge_float64",
}


@pytest.fixture
def two_methods():
    """LoRA, and one that scales: between them they ask for everything that a layer can be asked."""
    with registry.isolated(empty=True):
        registry.register_method("lora")(Lora)
        registry.register_method("trial")(Trial)
        yield


@pytest.mark.usefixtures("uncompiled")
def test_a_layer_that_keeps_the_contract_passes_under_every_method(two_methods):
    registry.register_layer(Flipped)(FlippedOps)
    report = check_layer(Flipped, make=Flipped)
    assert [pair.method for pair in report.pairs] == ["lora", "trial"]
    assert report.skipped == {}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("ops", "check"), BROKEN_LAYERS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_layer_fails_the_check_that_says_so(ops, check, two_methods):
    registry.register_layer(Flipped)(ops)
    with pytest.raises(ContractError, match="Flipped fails") as raised:
        check_layer(Flipped, make=Flipped)
    assert raised.value.check == check, str(raised.value)


class Halved(Flipped):
    """Does more to its input than to multiply it."""

    def forward(self, x):
        return super().forward(x) / 2


class InPlace(Flipped):
    """Writes over its input."""

    def forward(self, x):
        return super().forward(x.mul_(2))


def test_a_layer_that_does_more_than_a_linear_call_may_not_claim_to_be_one(two_methods):
    registry.register_layer(Halved)(ClaimsALinearCall)
    with pytest.raises(ContractError, match="fails 'layer_facts': the product by linear_weight is off by"):
        check_layer(Halved, make=Halved)


def test_a_layer_that_writes_over_its_input_is_told_so(two_methods):
    registry.register_layer(InPlace)(FlippedOps)
    with pytest.raises(ContractError, match="fails 'not_in_place': the layer itself writes its input"):
        check_layer(InPlace, make=InPlace)


@pytest.mark.usefixtures("uncompiled")
def test_a_layer_that_cannot_merge_skips_that_and_says_so(two_methods):
    registry.register_layer(Flipped)(ClaimsNoMerge)
    report = check_layer(Flipped, make=Flipped)
    assert {check for _, _, check in report.skipped} == MERGES | {"reads"}
    assert set(report.skipped.values()) == {"ClaimsNoMerge.can_merge is False, and merging is refused"}
    assert "skipped merge_float64, merge_float32, merge_bfloat16, reads: ClaimsNoMerge.can_merge is False" in str(
        report
    )


class Packed(nn.Module):
    """A linear map with one int8 weight and one scale a row, which may compute with another weight than it holds."""

    def __init__(self, in_features, out_features, noise=0.0):
        super().__init__()
        linear = nn.Linear(in_features, out_features)
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias, self.noise = linear.bias, noise

    def forward(self, x):
        return nn.functional.linear(x, self.packed * self.scale * (1 + self.noise), self.bias)


class PackedOps(LayerOps):
    def shape(self, base):
        return tuple(base.packed.shape)

    def read_weight(self, base):
        return base.packed * base.scale if isinstance(base, Packed) else base.weight

    def write_weight(self, base, weight, bias):
        linear = nn.Linear(*reversed(weight.shape)).to(base.bias.dtype)
        linear.load_state_dict({"weight": weight, "bias": bias})
        return linear


def noisy(in_features, out_features):
    return Packed(in_features, out_features, noise=0.01)


def wrong(in_features, out_features):
    return Packed(in_features, out_features, noise=1.0)


@pytest.mark.usefixtures("uncompiled")
def test_a_layer_that_is_replaced_when_merged_may_differ_by_its_own_noise(two_methods):
    registry.register_layer(Packed)(PackedOps)
    assert all(pair.served for pair in check_layer(Packed, make=Packed).pairs)
    assert all(pair.served for pair in check_layer(Packed, make=noisy).pairs)
    with pytest.raises(ContractError, match="the layer that write_weight returns is off by"):
        check_layer(Packed, make=wrong)


class Unpicklable(Flipped):
    """A layer that is neither copied, nor pickled, nor compiled, whatever is put on it."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.activation = lambda y: y

    def forward(self, x):
        y = super().forward(x)
        return y if y.detach().sum().item() < 1e30 else -y


def test_what_the_layer_itself_cannot_do_is_skipped_and_said(two_methods):
    registry.register_layer(Unpicklable)(FlippedOps)
    skipped = check_pair("lora", Unpicklable, make=Unpicklable).skipped
    assert set(skipped) == {"copies", "one_graph"}
    assert "Unpicklable itself cannot be copied or pickled (Can't pickle local object" in skipped["copies"].replace(
        "get local object", "pickle local object"
    )
    assert skipped["one_graph"].endswith("Unpicklable itself does not compile to one graph")


def test_a_layer_without_an_example_is_reported_as_not_tried(isolated):
    registry.register_layer(Packed)(PackedOps)
    report = check_pair("lora", Packed)
    assert not report.served
    assert set(report.skipped) == ALL
    assert "Packed: there is no example to try; pass make=..., or call testing.register_example." in str(report)
    with pytest.raises(TargetError, match="Packed: there is no example to try"):
        check_layer(Packed)


class Special(nn.Linear):
    """A subclass of a layer type that has an example."""


class SpecialOps(LinearOps):
    """Nothing of its own."""


@pytest.mark.usefixtures("uncompiled")
def test_an_example_that_other_ops_accept_is_refused(isolated):
    registry.register_layer(Special)(SpecialOps)
    with pytest.raises(TargetError, match="the example is a Linear, which is adapted by LinearOps, not by SpecialOps"):
        check_layer(Special, make=nn.Linear)
    assert check_pair("lora", Special, make=Special).served


@pytest.mark.usefixtures("uncompiled")
def test_a_registered_example_is_tried_as_it_is_called_and_selected(isolated, monkeypatch):
    monkeypatch.setattr(examples, "_examples", dict(examples._examples))
    registry.register_layer(Special)(SpecialOps)
    register_example(Special, Special, call=call_twice)
    assert check_pair("lora", Special).served


def call_twice(layer, x):
    return layer(x) + layer(x)


@pytest.mark.usefixtures("uncompiled")
def test_options_without_a_default_can_be_registered(isolated, monkeypatch):
    monkeypatch.setattr(examples, "_options", dict(examples._options))
    registry.register_method("trial")(NeedsAnOption)
    with pytest.raises(ContractError, match="fails 'options': size must be given.*testing.register_options"):
        check_pair("trial", nn.Linear)
    register_options("trial", size=3)
    assert check_pair("trial", nn.Linear).served


@dataclass(frozen=True, kw_only=True)
class SizedConfig(TrialConfig):
    size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.size is None:
            raise ConfigError("size must be given.")


class NeedsAnOption(Trial):
    config_class = SizedConfig


@pytest.mark.usefixtures("uncompiled")
def test_a_subclass_that_its_base_serves_is_tried_with_an_instance_of_it():
    assert check_pair("lora", Special, make=Special).served
    with pytest.raises(RegistryError, match=r"no LayerOps are registered for .*Special' itself.*pass make="):
        check_layer(Special)


def test_a_layer_that_no_ops_accept_is_refused_at_once():
    with pytest.raises(TargetError, match="no LayerOps accept a LayerNorm"):
        check_layer(nn.LayerNorm, make=norm)


def norm(in_features, out_features):
    return nn.LayerNorm(in_features)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["torch.nn.Linear", "torch.nn.modules.linear.Linear"])
def test_a_layer_type_may_be_given_by_any_of_its_dotted_names(name):
    assert check_pair("lora", name).layer == "torch.nn.modules.linear.Linear"


def test_an_unknown_method_is_answered_with_the_known_ones():
    with pytest.raises(RegistryError, match=r"no method 'lorra' \(closest: 'lora'\)"):
        check_method("lorra")


@pytest.mark.usefixtures("uncompiled")
def test_the_caller_s_randomness_is_left_alone():
    before = torch.get_rng_state()
    check_pair("lora", nn.Linear)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_error_can_be_pickled_as_test_runners_do():
    import pickle

    error = ContractError("lora", "Linear", "files", "a reason")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "lora on Linear fails 'files': a reason"
    assert again.check == "files"
    assert dataclasses.is_dataclass(TrialConfig)

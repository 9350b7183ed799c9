"""Merging for good: one product added in place, proved finite beforehand; and what an exception half way leaves behind."""

import _thread
import logging
import threading
from dataclasses import dataclass

import pytest
import torch
from test_merge import adapted
from tiny_models import disturb, gpt2, llama, logits, state_digest
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minipeft import (
    Adapter,
    AdapterConfig,
    LoraConfig,
    MergeError,
    get_adapter_model,
    get_lora_model,
    register_method,
)
from minipeft.injection.module_tree import adapted_layers
from minipeft.kernels.functional import largest, low_rank_bound, low_rank_product
from minipeft.layers.linear import LinearOps
from minipeft.merging import merge as merging
from minipeft.merging import rounding
from minipeft.merging.rounding import add_product
from minipeft.merging.steps import Step, Write
from minipeft.methods.lora import Lora
from minipeft.python.interrupts import interrupts_deferred
from minipeft.registry import registry

WIDE = 96  # no other tensor of the model below has 96 x 96 values


class Count(TorchDispatchMode):
    """Counts the operators that read or make a tensor of so many values, and the bytes they make; views are free."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.calls, self.made = numel, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)] + outputs
        is_view = any(alias.alias_info and not alias.alias_info.is_write for alias in func._schema.arguments)
        if not is_view and any(x.numel() == self.numel for x in tensors):
            self.calls.append(func.overloadpacket.__name__)
        new = [x for x in outputs if x.untyped_storage().data_ptr() not in known]
        self.made += sum(x.numel() for x in new if x.numel() >= self.numel)
        return result


def wide_model(dtype=torch.float32, layers=1, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDE, WIDE) for _ in range(layers)]).to(dtype)
    names = [str(index) for index in range(layers)]
    return get_lora_model(model, LoraConfig(r=2, target_modules=names, init_lora_weights=False, **options))


def bits(model):
    return {
        name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters() if "adapters" not in name
    }


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())


def test_a_merge_for_good_reads_the_weight_once_and_adds_once():
    model = wide_model()
    with Count(WIDE * WIDE) as count:
        model.merge_and_unload()
    # Writing a layer's own weight into it is a copy of a tensor onto itself, which torch leaves out.
    assert [call for call in count.calls if call != "copy_"] == ["aminmax", "addmm_"]
    assert count.made == 0


def test_half_precision_is_merged_without_a_wide_copy(monkeypatch):
    monkeypatch.setitem(rounding.BLOCK, "cpu", 10 * WIDE)  # the last block is a shorter one
    model = wide_model(torch.bfloat16)
    weight = model[0].base_layer.weight.detach().double()
    adapter = model[0].adapter("default")
    update = adapter.scaling * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
    with Count(WIDE * WIDE) as count:
        model.merge_and_unload()
    assert count.made == 0
    # Rounded once: within half a unit in the last place, and a hair for the float32 in between.
    torch.testing.assert_close(model[0].weight.detach().double(), weight + update, rtol=2**-8 * 1.01, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_added_in_place_and_rounded_once(dtype, transposed, monkeypatch):
    monkeypatch.setitem(rounding.BLOCK, "cpu", 21)  # three rows of seven values
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    weight, up, down = torch.randn(7, 8, dtype=dtype), torch.randn(8, 2, dtype=wide), torch.randn(2, 7, dtype=wide)
    weight = weight.t().contiguous() if not transposed else weight
    weight = weight if not transposed else weight.t()
    expected = (weight.to(wide) + up @ down).to(dtype)
    add_product(weight, up, down)
    torch.testing.assert_close(weight, expected, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(wide).eps)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_merged_in_place_is_the_formula_in_float64(make, dtype):
    model = adapted(make().to(dtype), scale=0.1)
    model.add_adapter("second", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    wanted = {}
    for path, layer in adapted_layers(model):
        total = layer.ops.read_weight(layer.base_layer).detach().double()
        for name in ("default", "second"):
            lora = layer.adapter(name)
            total = total + lora.scaling * lora.lora_B.detach().double() @ lora.lora_A.detach().double()
        wanted[path] = (layer.ops, total)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    for path, (ops, total) in wanted.items():
        weight = ops.read_weight(merged.get_submodule(path)).detach().double()
        torch.testing.assert_close(weight, total, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_both_libraries_merge_to_the_same_weights():
    peft = pytest.importorskip("peft")
    base, ours = gpt2(), adapted(gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(base, config)
    loras = {path: layer.adapter("default") for path, layer in adapted_layers(ours)}
    with torch.no_grad():
        for path, lora in loras.items():
            layer = theirs.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(lora.lora_A)
            layer.lora_B["default"].weight.copy_(lora.lora_B)
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    for (name, weight), (other, peer) in zip(merged.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(weight, peer, rtol=1e-6, atol=1e-7)


def test_who_listens_to_the_log_gets_the_errors_and_the_same_bits(caplog):
    silent = bits(wide_model().merge_and_unload())
    with caplog.at_level(logging.INFO, logger="minipeft"):
        loud = wide_model().merge_and_unload()
    assert "merged 1 layers; rounding changed the update" in caplog.text
    assert same(loud, silent)


def test_the_bound_bounds():
    for seed in range(50):
        torch.manual_seed(seed)
        up, down = torch.randn(7, 3).double(), torch.randn(3, 11).double()
        assert largest(up @ down) <= low_rank_bound(up, down)
    assert low_rank_bound(torch.ones(4, 2), torch.ones(2, 4)) == 2  # and is reached
    assert largest(torch.empty(3, 0)) == 0
    assert largest(torch.tensor([[1.0, -3.0], [2.0, 0.0]]).t()) == 3
    assert not largest(torch.tensor([1.0, float("nan")])) <= 3


def test_a_proved_merge_computes_no_merged_weight(monkeypatch):
    def fail(*args):
        raise AssertionError("computed")

    monkeypatch.setattr(Step, "merged", fail)
    model = adapted()
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("act", ["merge_adapter", "merge_and_unload"])
def test_what_the_bound_cannot_prove_is_computed(act):
    model = wide_model(torch.float16)
    lora = model[0].adapter("default")
    with torch.no_grad():  # the bound says 2 * 6e4, the product is at most 6e4 - 6e4 of 1 and 1
        lora.lora_A.fill_(1.0)
        lora.lora_B[:, 0], lora.lora_B[:, 1] = 6e4 / lora.scaling, -6e4 / lora.scaling
    weight = model[0].weight.detach().clone()
    getattr(model, act)()
    assert torch.equal(model[0].weight, weight)  # the update is zero
    model = wide_model(torch.float16)
    lora = model[0].adapter("default")
    with torch.no_grad():  # now they add up, in one row only
        lora.lora_A.fill_(1.0)
        lora.lora_B.zero_()[7] = 6e4 / lora.scaling
    before = state_digest(model)
    with pytest.raises(MergeError, match=r"0: the merged weight is not finite in torch.float16"):
        getattr(model, act)()
    assert state_digest(model) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_weight_that_is_not_finite_is_refused(value):
    model = wide_model()
    with torch.no_grad():
        model[0].base_layer.weight[-1, -1] = value
    with pytest.raises(MergeError, match="not finite"):
        model.merge_and_unload()


@dataclass(frozen=True, kw_only=True)
class PlainConfig(AdapterConfig):
    method = "merged_plainly"


class Plain(Adapter):
    """Only what a method must say; its merge is a sum, but nobody knows."""

    config_class = PlainConfig

    def __init__(self, base, ops, config, shared):
        super().__init__(base, ops, config, shared)
        self.v = nn.Parameter(torch.full((ops.shape(base)[0],), 1.5))

    def forward(self, base, ops, x, y):
        return y * ops.per_feature(base, self.v)

    def merge(self, weight, bias):
        return weight * self.v[:, None], None if bias is None else bias * self.v


@pytest.fixture(scope="module", autouse=True)
def known():
    with registry.isolated():
        register_method("merged_plainly")(Plain)
        yield


def plain_model(layers=3):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)])
    return get_adapter_model(model, PlainConfig(target_modules=[str(index) for index in range(layers)]))


def test_a_method_that_only_says_merge_is_merged():
    model = plain_model()
    x = torch.randn(2, 8)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_what_a_parent_says_of_its_merge_is_forgotten_with_the_merge():
    class Doubled(Lora):
        def merge(self, weight, bias):
            return super().merge(weight, bias)[0] * 2, bias

    class OtherDelta(Lora):
        def delta(self, weight):
            return super().delta(weight) * 2

    class Factors(Doubled):
        def factors(self):
            return torch.ones(6, 1), torch.ones(1, 4)

    layer = nn.Linear(4, 6)
    made = [cls(layer, LinearOps(), LoraConfig(r=2), None) for cls in (Lora, Doubled, OtherDelta, Factors)]
    assert [adapter.factors() is not None for adapter in made] == [True, False, False, True]
    assert [adapter.delta(layer.weight) is not None for adapter in made] == [True, False, True, True]
    assert torch.equal(made[-1].delta(layer.weight), torch.ones(6, 4))


def merge_and_undo(model):
    """Adapt a model, and hold its bits against what a merge that cuts its ties, and is undone, leaves of them."""
    get_lora_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, bias="lora_only"))
    disturb(model)
    before = bits(model)
    model.merge_adapter(untie=True)
    assert not same(model, before)
    model.unmerge_adapter()
    assert same(model, before)


def test_an_untied_layer_gets_its_trained_bias_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match="shares its weight with '1.weight'"):
        merge_and_undo(model)
    assert model.get_parameter("1.weight") is model.get_parameter("0.weight")


def test_a_layer_that_shares_its_bias_alone_gets_its_weight_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].bias = model[0].bias
    merge_and_undo(model)
    assert model.get_parameter("1.bias") is model.get_parameter("0.bias")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("act", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("options", [{"bias": "lora_only", "lora_alpha": 0.01}, {}], ids=["biased", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exception_in_a_write_takes_back_what_it_can(error, moment, act, options, dtype, monkeypatch):
    model = disturb(wide_model(dtype, layers=4, **options), scale=0.01)
    before, digest, calls, write = bits(model), state_digest(model), [], LinearOps.write_weight
    x = torch.randn(2, WIDE, dtype=dtype)
    expected = model(x)

    def failing(ops, base, weight, bias):
        calls.append(base)
        if len(calls) == 3 and moment == "before":
            raise error
        result = write(ops, base, weight, bias)
        if len(calls) == 3:
            raise error
        return result

    monkeypatch.setattr(LinearOps, "write_weight", failing)
    with pytest.raises(error):
        getattr(model, act)()
    monkeypatch.undo()
    if act == "merge_and_unload" and not options:  # added in place, without anything to take it back with
        assert [layer.merged for _, layer in adapted_layers(model)] == [("default",)] * 3 + [()]
    else:
        assert same(model, before)
        assert state_digest(model) == digest
        assert not any(layer.merged for _, layer in adapted_layers(model))
    torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=0.1, atol=0.1)  # and it can be done again


def test_an_exception_while_untying_ties_again(monkeypatch):
    model = adapted(target_modules=["wte", "c_attn"])
    digest = state_digest(model)

    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr(Write, "write", fail)
    with pytest.raises(MemoryError):
        model.merge_adapter(untie=True)
    monkeypatch.undo()
    assert model.get_parameter("lm_head.weight") is model.get_parameter("transformer.wte.weight")
    assert model.config.tie_word_embeddings
    assert state_digest(model) == digest


def test_a_final_merge_that_is_no_sum_stops_in_a_state_that_acts_as_before(monkeypatch):
    model = plain_model()
    x, calls, write = torch.randn(2, 8), [], LinearOps.write_weight
    expected = model(x)

    def failing(ops, base, weight, bias):
        calls.append(base)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(ops, base, weight, bias)

    monkeypatch.setattr(LinearOps, "write_weight", failing)
    with pytest.raises(KeyboardInterrupt):
        model.merge_and_unload()
    monkeypatch.undo()
    assert [layer.merged for _, layer in adapted_layers(model)] == [("default",), ("default",), ()]
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_an_interrupt_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():  # noqa: PT012
        _thread.interrupt_main()
        done += [None for _ in range(3)]
    assert len(done) == 3
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  afterwards it comes at once again
        _thread.interrupt_main()
        done += [None for _ in range(3)]
    assert len(done) == 3


def test_an_interrupt_is_not_lost_if_the_block_fails():
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():  # noqa: PT012
        _thread.interrupt_main()
        raise MemoryError


def test_a_thread_merges_too():
    model, threads = wide_model(), []
    threads.append(threading.Thread(target=model.merge_and_unload))
    threads[0].start()
    threads[0].join()
    assert type(model) is nn.Sequential


@pytest.mark.parametrize("undoable", [True, False])
def test_an_interrupt_at_any_time_leaves_all_or_nothing(undoable):
    layers, outcomes = 24, set()
    model = disturb(wide_model(layers=layers), scale=0.01)
    before = bits(model)
    for index in range(20):
        timer = threading.Timer(index * 8e-4, _thread.interrupt_main)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            timer.start()
            merging.merge(model, ["default"], undoable=undoable)
            timer.join()
            _ = [None for _ in range(3)]  # where one that is pending arrives
        torch.set_grad_enabled(True)  # one that comes while torch.no_grad is entered or left leaves that undone
        merged = {layer.merged for _, layer in adapted_layers(model)}
        outcomes |= merged
        assert len(merged) == 1
        assert same(model, before) == (merged == {()})
        if merged != {()}:  # start again
            if undoable:
                merging.unmerge(model)
                assert same(model, before)
            else:
                model = disturb(wide_model(layers=layers), scale=0.01)
    assert () in outcomes


def test_the_product_lies_as_it_is_asked_to():
    up, down = torch.randn(5, 2), torch.randn(2, 7)
    for column_major in (False, True):
        product = low_rank_product(up, down, column_major=column_major)
        assert product.shape == (5, 7)
        assert (product.stride(0) < product.stride(1)) == column_major
        torch.testing.assert_close(product.double(), up.double() @ down.double(), rtol=1e-5, atol=1e-6)


def test_where_memory_does_not_suffice_for_the_report_each_layer_acts_as_before(monkeypatch, caplog):
    """With the logger at INFO the error is measured after the weight is written, which nothing can take back."""
    model, x = wide_model(layers=3), torch.randn(4, WIDE)
    expected, calls = model(x).detach(), []

    def fails(*tensors):
        calls.append(tensors)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr("minipeft.merging.steps.relative_error", fails)
    with caplog.at_level(logging.INFO, "minipeft"), pytest.raises(MemoryError):
        model.merge_and_unload()
    assert len(calls) == 2
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)

"""Merging: rounded once, checked first, undone bit for bit, and never into a tensor that others use."""

import copy
import functools

import pytest
import tiny_models
import torch
from fake_tf32 import autocast, tf32_allowed
from rotation import thinned
from tiny_models import disturb, gpt2, gpt2_classifier, llama, logits, state_digest
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from minipeft import LoraConfig, MergeError, StateError, get_lora_model
from minipeft.injection.module_tree import adapted_layers
from minipeft.kernels.functional import lora_delta
from minipeft.merging.unmerge import original_of

adapted = functools.partial(tiny_models.adapted, target_modules="all-linear")


@pytest.mark.parametrize("make", [gpt2, llama])
def test_merged_logits_equal_the_adapted_ones(make):
    model = adapted(make())
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    merged = model.merge_and_unload()
    assert type(merged) is type(make())
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [["c_attn"], ["attn.c_proj"], ["wte"], ["lm_head"]])
def test_the_merged_weight_is_the_formula_in_float64(targets):
    model = adapted(gpt2().double(), target_modules=targets)
    wanted = {}
    for name, layer in adapted_layers(model):
        lora, update = layer.adapter("default"), None
        update = 8 / 4 * lora.lora_B @ lora.lora_A
        weight = layer.base_layer.weight.detach().clone()
        wanted[name] = weight + (update if isinstance(layer.base_layer, nn.Linear) else update.T)
    model.merge_adapter(untie=True)
    for name, layer in adapted_layers(model):
        torch.testing.assert_close(layer.weight, wanted[name])


@pytest.mark.parametrize(
    ("dtype", "scale"),
    thinned(
        ([torch.float64, torch.float32, torch.bfloat16, torch.float16], [1e-4, 0.02, 1.0]),
        [(torch.float64, 1e-4), (torch.float32, 1.0), (torch.bfloat16, 0.02), (torch.float16, 1e-4)],
    ),
)
def test_unmerging_brings_every_bit_back_a_hundred_times(dtype, scale):
    base = gpt2().to(dtype)
    del base.transformer.h[1:]
    model = adapted(base, scale=scale)
    with torch.no_grad():  # signed zeros are bits too
        next(adapted_layers(model))[1].base_layer.weight.view(-1)[:7] = -0.0
    before = {n: p.detach().clone().view(torch.uint8) for n, p in model.named_parameters()}
    for _ in range(100 if scale == 0.02 and dtype in (torch.float32, torch.bfloat16) else 3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(p.view(torch.uint8), before[n]) for n, p in model.named_parameters())


def test_undoing_keeps_next_to_nothing_of_the_weights():
    model = adapted(llama().bfloat16(), scale=0.01)
    model.merge_adapter()
    for _, layer in adapted_layers(model):
        assert layer.undo.original.copy is None
        assert layer.undo.original.values.numel() <= layer.weight.numel() / 16


def test_an_update_that_dwarfs_the_weights_is_undone_from_a_copy():
    model = adapted(scale=30.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    assert any(layer.undo.original.copy is not None for _, layer in adapted_layers(model))
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_unmerging_does_not_depend_on_what_became_of_the_adapter_or_the_threads():
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
    model.merge_adapter()
    disturb(model, seed=9)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model.unmerge_adapter()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.each_value
@pytest.mark.parametrize("lowered", [autocast, tf32_allowed])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}])
def test_autocast_and_tf32_change_nothing_of_a_merge_nor_of_taking_it_back(options, lowered):
    model = adapted(scale=0.01, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    merged = {n: p.detach().clone() for n, p in model.named_parameters()}
    with lowered():
        with model.disable_adapter():
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert all(torch.equal(p, merged[n]) for n, p in model.named_parameters())
        permanent = copy.deepcopy(model).merge_and_unload()
        model.unmerge_adapter()
        fresh = copy.deepcopy(model).merge_and_unload()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    outside = model.merge_and_unload().state_dict()
    for other in (permanent, fresh):
        assert all(torch.equal(value, outside[name]) for name, value in other.state_dict().items())


def test_merged_state_can_be_copied_and_undone_in_the_copy():
    model = adapted()
    model.merge_adapter()
    other = copy.deepcopy(model)
    other.unload()
    assert torch.equal(logits(other), logits(gpt2()))
    assert not torch.equal(logits(model), logits(gpt2()))


def test_the_merge_accumulates_in_float32_and_rounds_once():
    model = adapted(gpt2().bfloat16(), scale=0.01)
    wanted = {}
    for name, layer in adapted_layers(model):
        lora = layer.adapter("default")
        delta = lora_delta(lora.lora_A.detach(), lora.lora_B.detach(), lora.scaling).T
        wanted[name] = (layer.base_layer.weight.detach().float() + delta).bfloat16()
    model.merge_adapter()
    assert all(torch.equal(layer.weight, wanted[name]) for name, layer in adapted_layers(model))


def test_the_report_is_the_relative_error_of_the_realised_update():
    model = adapted(gpt2().bfloat16(), scale=0.01)
    before = {name: layer.base_layer.weight.detach().double().T.clone() for name, layer in adapted_layers(model)}
    report = model.merge_adapter()
    assert report.relative_error.keys() == before.keys()
    for name, layer in adapted_layers(model):
        lora = layer.adapter("default")
        wanted = lora.scaling * lora.lora_B.detach().double() @ lora.lora_A.detach().double()
        realised = layer.weight.detach().double().T - before[name]
        expected = float((realised - wanted).norm() / wanted.norm())
        assert report.relative_error[name] == pytest.approx(expected, rel=1e-3)
    assert report.worst == max(report.relative_error.values()) > 0.01  # bfloat16 does cost something
    assert "merged 8 layers" in str(report)
    assert adapted(gpt2(), scale=0.01).merge_adapter().worst < 1e-4  # float32 next to nothing


def test_a_tiny_update_is_lost_in_bfloat16_and_the_report_says_so():
    assert adapted(gpt2().bfloat16(), scale=1e-4).merge_adapter().worst > 0.9


def test_merging_is_idempotent():
    model = adapted()
    model.merge_adapter()
    before = state_digest(model)
    assert model.merge_adapter().relative_error == {}
    assert state_digest(model) == before
    merged = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), merged)


def test_merging_one_more_adapter_rounds_once_and_the_others_keep_acting():
    model = adapted(target_modules=["c_attn", "c_fc"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    model.set_adapter(["default", "second"])
    expected = logits(model)
    model.merge_adapter(["second"])
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)  # default still acts, unmerged
    model.merge_adapter(["default"])
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    assert {layer.merged for n, layer in adapted_layers(model) if "c_attn" in n} == {("second", "default")}
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("act", ["merge_adapter", "merge_and_unload"])
def test_a_value_that_is_not_finite_anywhere_stops_the_whole_merge(value, act):
    model = adapted()
    last = [layer for _, layer in adapted_layers(model)][-1]
    with torch.no_grad():
        last.adapter("default").lora_B[0, 0] = value
    before = state_digest(model)
    with pytest.raises(
        MergeError, match=r"transformer.h.1.mlp.c_proj: the merged weight is not finite .*Nothing was changed"
    ):
        getattr(model, act)()
    assert state_digest(model) == before


def test_an_overflow_of_half_precision_stops_the_merge():
    model = adapted(gpt2().half())
    with torch.no_grad():
        next(adapted_layers(model))[1].adapter("default").lora_B.fill_(1e5)
    with pytest.raises(MergeError, match="not finite in torch.float16"):
        model.merge_adapter()


def test_a_trained_copy_that_is_not_finite_stops_the_merge():
    model = adapted(modules_to_save=["ln_f"])
    with torch.no_grad():
        model.transformer.ln_f.adapters["default"].weight[0] = float("nan")
    with pytest.raises(MergeError, match="transformer.ln_f.weight: the trained values are not finite"):
        model.merge_and_unload()


@pytest.mark.parametrize("options", [{"modules_to_save": ["score"]}, {"bias": "all", "modules_to_save": None}], ids=str)
def test_what_a_merged_adapter_trains_in_full_acts_though_it_is_not_active(options):
    model = adapted(gpt2_classifier(), adapter_name="a", target_modules=["c_attn"], modules_to_save=None)
    model.add_adapter("b", LoraConfig(r=2, **options))
    model.set_adapter("b")
    disturb(model)
    model.set_adapter(["a", "b"])
    expected = logits(model)
    model.set_adapter("a")
    model.merge_adapter(["b"])
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert torch.allclose(logits(copy.deepcopy(model).merge_and_unload()), expected, atol=1e-5)
    model.unmerge_adapter()
    model.add_adapter("c", LoraConfig(r=2, **options))
    model.set_adapter("c")
    with pytest.raises(StateError, match="each train this module in full"):
        model.merge_adapter(["b"])


@pytest.mark.parametrize(("target", "other"), [("wte", "lm_head.weight"), ("lm_head", "transformer.wte.*weight")])
@pytest.mark.parametrize("act", ["merge_adapter", "merge_and_unload"])
def test_a_tied_weight_is_not_written(target, other, act):
    model = adapted(target_modules=[target])
    before = state_digest(model)
    with pytest.raises(MergeError, match=f"{target}.weight is tied to '{other}'.*untie=True"):
        getattr(model, act)()
    assert state_digest(model) == before


@pytest.mark.parametrize("targets", [["wte"], ["lm_head"], ["wte", "lm_head"]])
def test_untying_merges_and_survives_save_and_reload(targets, tmp_path):
    model = adapted(target_modules=targets)
    expected = logits(model)
    merged = model.merge_and_unload(untie=True)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-5, rtol=0)


def test_unmerging_ties_again():
    model = adapted(target_modules=["wte"])
    expected = logits(model)
    model.merge_adapter(untie=True)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert not model.config.tie_word_embeddings
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(gpt2()))
    model.unmerge_adapter()
    assert model.lm_head.weight is model.transformer.wte.base_layer.weight
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(model), expected)


def test_a_weight_that_is_a_view_of_another_counts_as_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    flat = torch.randn(48)
    model[0].weight = nn.Parameter(flat[:16].view(4, 4))
    model[1].weight = nn.Parameter(flat[8:24].view(4, 4))
    adapted_model = get_lora_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    with pytest.raises(MergeError, match="0.weight is tied to '1.weight'"):
        adapted_model.merge_adapter()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight, model[1].weight = nn.Parameter(flat[:16].view(4, 4)), nn.Parameter(flat[16:32].view(4, 4))
    get_lora_model(
        model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    ).merge_adapter()  # only neighbours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 8), (6, 7), (5, 4)])
def test_small_changes_of_a_merged_weight_are_noticed(dtype, shape):
    merged = torch.randn(*shape).to(dtype)
    for swap in [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (3, 2))]:
        written = merged.clone()
        first, second = swap
        written[first], written[second] = merged[second], merged[first]
        for own, other in [(merged, written), (merged.t(), written.t()), (merged, merged.nextafter(written))]:
            original = original_of(own.t().contiguous().t(), own, None, (), may_copy=False)
            assert original.was_merged_into(own.clone())
            assert original.was_merged_into(own.t().contiguous().t())
            assert original.was_merged_into(torch.cat([own.flatten()[:1], own.flatten()])[1:].view(own.shape))
            assert not original.was_merged_into(other)


@pytest.mark.parametrize("layer", [nn.Linear(8, 1), nn.Linear(1, 8), Conv1D(1, 8), Conv1D(8, 1)], ids=str)
def test_a_weight_with_one_row_or_column_comes_back(layer):
    model = get_lora_model(nn.Sequential(layer), LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
    before = model[0].base_layer.weight.clone()
    model.merge_adapter()
    assert not torch.equal(model[0].base_layer.weight, before)
    model.unmerge_adapter()
    assert torch.equal(model[0].base_layer.weight, before)


@pytest.mark.parametrize("scale", [0.01, 30.0])  # undone from the update, and from a copy
def test_what_was_written_after_the_merge_is_not_undone_blindly(scale):
    model = adapted(scale=scale)
    model.merge_adapter()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.base_layer.weight[0, 0] += 1
    before = state_digest(model)
    with pytest.raises(MergeError, match="transformer.h.1.mlp.c_proj: .*written or converted"):
        model.unmerge_adapter()
    assert state_digest(model) == before


def test_a_conversion_after_the_merge_cannot_be_undone():
    model = adapted()
    model.merge_adapter()
    model.half()
    with pytest.raises(MergeError, match="written or converted"):
        model.unmerge_adapter()


def test_disabling_takes_the_merged_weights_back_meanwhile():
    model = adapted()
    model.merge_adapter()
    merged = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(gpt2()))
    assert torch.equal(logits(model), merged)


class Loud(nn.Linear):
    """A subclass whose forward only calls its parent's: merging is right."""

    def forward(self, x):
        return super().forward(x)


class Normalised(nn.Linear):
    """A subclass that uses its weight in its own way: merging would be wrong."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


def test_a_subclass_with_its_own_forward_is_merged_only_if_that_is_right():
    x = torch.randn(3, 6)
    options = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    loud = get_lora_model(nn.Sequential(Loud(6, 6)), options)
    expected = loud(x)
    torch.testing.assert_close(loud.merge_and_unload()(x), expected)
    normalised = get_lora_model(nn.Sequential(Normalised(6, 6)), options)
    before = state_digest(normalised)
    with pytest.raises(MergeError, match="0: Normalised has a forward of its own, .* off by"):
        normalised.merge_adapter()
    assert state_digest(normalised) == before


def test_an_eval_call_never_writes_weights():
    model = adapted()
    before = state_digest(model.eval())
    model.train().eval()
    assert state_digest(model) == before


def test_a_merge_that_fails_keeps_what_was_merged_before():
    model = adapted(target_modules=["c_attn"])
    model.add_adapter("broken", LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.adapters["broken"].lora_A.fill_(float("nan"))
    model.merge_adapter()
    before = state_digest(model)
    for act in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="not finite"):
            act(adapter_names=["broken"])
        assert state_digest(model) == before
        assert all(layer.merged == ("default",) for _, layer in adapted_layers(model))

"""`add_weighted_adapter` against PEFT's on the same files, against float64 algebra, and what it refuses."""

import contextlib
import copy
import itertools
import logging
import math

import pytest
import torch
from fake_tf32 import autocast, tf32_allowed
from rotation import thinned
from tiny_models import adapted, bert_classifier, disturb, foreign_code, gpt2, logits, refuses, state_digest
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import minipeft
from minipeft import ConfigError, LoraConfig, StateError, TargetError, get_adapter_model, get_lora_model, load_adapter

with foreign_code():
    import peft

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
OF_FACTORS = ("linear", *PRUNING)
OF_UPDATES = ("svd", *(f"{name}_svd" for name in PRUNING))


class Net(nn.Module):
    """Every layer type that PEFT's LoRA has and that needs no other package."""

    config = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.rows = nn.Embedding(11, 8)
        self.conv1d = Conv1D(12, 8)
        self.narrow = nn.Linear(12, 5)  # of a smaller size than some ranks
        self.wide = nn.Linear(5, 16, bias=False)
        self.image = nn.Conv2d(1, 6, 3, padding=1)
        self.point = nn.Conv2d(6, 4, 1)

    def forward(self, ids):
        h = self.wide(self.narrow(self.conv1d(self.rows(ids))))
        return self.point(self.image(h.view(-1, 1, 4, 4)))


LAYERS = ["rows", "conv1d", "narrow", "wide", "image", "point"]
IDS = torch.arange(11)


def two_of_peft(tmp_path, **options):
    """PEFT's model with the adapters "a" and "b", which both act on all layers, and their files."""
    torch.manual_seed(1)
    of_a = {"r": 4, "lora_alpha": 6, **options.pop("a", {})}
    of_b = {"r": 4, "lora_alpha": 3, **options.pop("b", {})}
    common = {"target_modules": LAYERS, "init_lora_weights": False, **options}
    with foreign_code():
        model = peft.get_peft_model(Net(), peft.LoraConfig(**common, **of_a), "a")
        model.add_adapter("b", peft.LoraConfig(**common, **of_b))
        model.save_pretrained(tmp_path)
    return model


def ours_of(tmp_path):
    model = load_adapter(Net(), tmp_path / "a", "a")
    model.load_adapter(tmp_path / "b", "b")
    return model


@torch.no_grad()
def update(model, path, name):
    """One adapter's update of a layer as float64 (out, in)."""
    layer = model.get_submodule(path)
    return layer.adapter(name).delta(layer.ops.read_weight(layer.base_layer)).double()


@torch.no_grad()
def update_of_peft(model, path, name, canonical=True):
    """The same of PEFT's, made of what it holds: its own method rounds, and some of it is transposed."""
    layer = model.base_model.model.get_submodule(path)
    A, B = (layer.lora_A, layer.lora_B) if name in layer.lora_A else (layer.lora_embedding_A, layer.lora_embedding_B)
    A, B = (getattr(part[name], "weight", part[name]).double().flatten(1) for part in (A, B))
    return layer.scaling[name] * B @ A


def wanted(model, path, weights):
    return sum(weight * update(model, path, name) for name, weight in weights.items())


def combined_by_peft(model, seed=None, **options):
    """PEFT's own, with the generator set after it has drawn the starting values of the new adapter."""
    tuner, inject = model.base_model, model.base_model.inject_adapter

    def injected(*args, **kwargs):
        inject(*args, **kwargs)
        if seed is not None:
            torch.manual_seed(seed)

    tuner.inject_adapter = injected
    with foreign_code():
        tuner.add_weighted_adapter(**options)
    del tuner.inject_adapter


TYPES, WEIGHTS = ["cat", *OF_FACTORS, *OF_UPDATES], [(0.7, 0.4), (1.5, -0.6)]


@pytest.mark.parametrize(("kind", "weights"), thinned((TYPES, WEIGHTS), zip(TYPES, itertools.cycle(WEIGHTS))))
def test_every_type_gives_what_peft_gives_on_every_layer_type(kind, weights, tmp_path):
    options = {} if kind in OF_FACTORS else {"b": {"r": 3}}
    theirs = two_of_peft(tmp_path, **options)
    ours = ours_of(tmp_path)
    more = {"density": 0.6} if kind.removesuffix("_svd") in PRUNING else {}
    if "ties" in kind:
        more["majority_sign_method"] = "frequency"
    asked = {"adapters": ["a", "b"], "weights": weights, "adapter_name": "new", "combination_type": kind, **more}
    combined_by_peft(theirs, seed=3, **asked)
    torch.manual_seed(3)
    report = ours.add_weighted_adapter(**asked)
    for path in LAYERS:
        got = update(ours, path, "new")
        off = float((got - wanted(ours, path, {"a": weights[0], "b": weights[1]})).norm())
        assert off == pytest.approx(report.distances[path], rel=1e-5, abs=1e-5)
        torch.testing.assert_close(got, update_of_peft(theirs, path, "new"), atol=2e-5, rtol=1e-5)
    ours.set_adapter("new")
    ours.save_pretrained(tmp_path / "saved", "new")
    with foreign_code():
        read = peft.PeftModel.from_pretrained(Net(), tmp_path / "saved" / "new")
    torch.testing.assert_close(read(IDS), ours(IDS), atol=1e-4, rtol=1e-4)


def test_ranks_by_layer_and_alphas_by_layer_are_counted_as_peft_counts_them(tmp_path):
    patterns = {"rank_pattern": {"narrow": 2, "image": 3}, "alpha_pattern": {"wide": 5, "rows": 9}}
    theirs = two_of_peft(tmp_path, a=patterns)
    ours = ours_of(tmp_path)
    for kind in ("cat", "svd"):
        asked = {"adapters": ["b", "a"], "weights": [1, -2.0], "adapter_name": kind, "combination_type": kind}
        combined_by_peft(theirs, **asked)
        ours.add_weighted_adapter(**asked)
        for path in LAYERS:
            expected = update_of_peft(theirs, path, kind)
            torch.testing.assert_close(update(ours, path, kind), expected, atol=2e-5, rtol=1e-5)


def test_an_svd_of_another_rank_and_a_clamped_one_are_those_of_peft(tmp_path):
    theirs = two_of_peft(tmp_path)
    ours = ours_of(tmp_path)
    for name, more in {"two": {"svd_rank": 2}, "three": {"svd_rank": 3}, "clamped": {"svd_clamp": 0.95}}.items():
        asked = {"adapters": ["a", "b"], "weights": [1.0, 0.5], "adapter_name": name, **more}
        combined_by_peft(theirs, **asked, svd_full_matrices=name == "two")
        ours.add_weighted_adapter(**asked)
        for path in LAYERS:
            expected = update_of_peft(theirs, path, name)
            torch.testing.assert_close(update(ours, path, name), expected, atol=2e-5, rtol=1e-4)


def test_a_rank_beyond_the_size_of_a_layer_is_exact_there(tmp_path):
    two_of_peft(tmp_path)  # whose own call fails, since it cannot fill such a layer
    ours = ours_of(tmp_path)
    report = ours.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new", svd_rank=7)
    assert report.relative_error["narrow"] < 1e-6 < 1e-5 < report.relative_error["rows"]
    assert {ours.get_submodule(path).adapter("new").rank for path in LAYERS} == {7}


def test_what_peft_counts_wrongly_is_right_by_algebra(tmp_path):
    theirs = two_of_peft(tmp_path, use_rslora=True)
    ours = ours_of(tmp_path)
    asked = {"adapters": ["a", "b"], "weights": [1.0, 0.5], "adapter_name": "new", "combination_type": "cat"}
    combined_by_peft(theirs, **asked)
    report = ours.add_weighted_adapter(**asked)
    assert report.total < 1e-6
    for path in LAYERS:
        expected = wanted(ours, path, {"a": 1.0, "b": 0.5})
        torch.testing.assert_close(update(ours, path, "new"), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(update_of_peft(theirs, path, "new"), math.sqrt(8) * expected, atol=1e-4, rtol=1e-4)


def test_the_svd_is_the_best_of_its_rank_and_its_error_what_the_lost_values_say():
    torch.manual_seed(0)
    model = get_lora_model(gpt2().double(), LoraConfig(r=3, init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(r=2, init_lora_weights=False))
    report = model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "new", svd_rank=2)
    lost, all_of_it = 0.0, 0.0
    for path in report.relative_error:
        values = torch.linalg.svdvals(wanted(model, path, {"a": 1.0, "b": -0.5}))
        assert report.distances[path] == pytest.approx(float(values[2:].norm()), rel=1e-9)
        assert report.relative_error[path] == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-9)
        lost, all_of_it = lost + float(values[2:].square().sum()), all_of_it + float(values.square().sum())
    assert report.total == pytest.approx(math.sqrt(lost / all_of_it), rel=1e-9)
    assert report.worst == max(report.relative_error.values())
    assert "svd: 2 layers combined at rank 2" in str(report)


def test_nothing_as_large_as_a_weight_is_made_where_factors_suffice():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4096, 4096, device="meta")

    model = get_lora_model(Large(), LoraConfig(r=4, target_modules=["layer"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["layer"]))
    for name in "ab":
        adapter = model.layer.adapter(name)
        adapter.to_empty(device="cpu")
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else (made,):
                if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                    largest = max(largest, tensor.numel())
            return made

    from minipeft.merging.combining.combination import Combination
    from minipeft.merging.combining.sources import sources
    from minipeft.merging.combining.weighted import _combined

    for kind in ("cat", "linear", "svd"):
        options = {"adapters": {"a": 1.0} if kind == "linear" else {"a": 1.0, "b": 2.0}}
        with Watch(), torch.no_grad():
            _combined(sources(model, options["adapters"], different_targets=False), Combination(kind))
    assert 0 < largest <= 4096 * 16  # of the weight's 16 million


METHODS = {
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3, "init_weights": False}),
    "vera": ("VeraConfig", {"r": 6, "init_weights": False}),
    "adalora": ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 9, "init_lora_weights": False}),
    "pissa": ("LoraConfig", {"r": 2, "init_lora_weights": "pissa"}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3, "init_weights": False}),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_mix_exactly_where_their_update_is_a_product(method, tmp_path):
    torch.manual_seed(0)
    config, options = METHODS[method]
    targets = ["c_attn", "c_proj"]
    model = get_lora_model(gpt2(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "a")
    model.add_adapter("b", getattr(minipeft, config)(target_modules=targets, **options))
    model.set_adapter("b")
    disturb(model, scale=0.05)
    if method == "lokr":
        refuses(
            TargetError,
            model,
            lambda: model.add_weighted_adapter(["a", "b"], [1, 1], "new", "cat"),
            "h.0.attn.c_attn",
            "'b' (LoKr) has no factors",
            "'svd'",
        )
        report = model.add_weighted_adapter(["a", "b"], [0.8, -0.5], "new", "svd", svd_rank=32)
    else:
        report = model.add_weighted_adapter(["a", "b"], [0.8, -0.5], "new", "cat")
    assert report.total < 1e-6
    for path in report.norms:
        expected = wanted(model, path, {"a": 0.8, "b": -0.5})
        torch.testing.assert_close(update(model, path, "new"), expected, atol=1e-6, rtol=1e-4)
    model.set_adapter("new")
    model.save_pretrained(tmp_path, "new")
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "new")
        torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)


def test_a_lossy_sum_of_an_update_without_factors_is_measured():
    torch.manual_seed(0)
    lokr = minipeft.LoKrConfig(r=2, target_modules=["c_attn"], init_weights=False)
    model = get_adapter_model(gpt2(), lokr, "a")
    model.add_adapter("b", LoraConfig(r=2, init_lora_weights=False))
    report = model.add_weighted_adapter(["a", "b"], [1.0, 2.0], "new", svd_rank=3)
    for path, distance in report.distances.items():
        lost = torch.linalg.svdvals(wanted(model, path, {"a": 1.0, "b": 2.0}))[3:].norm()
        assert distance == pytest.approx(float(lost), rel=1e-4)
        assert report.relative_error[path] > 0.01


class Experts(nn.Module):
    """A mixture as transformers 5 fuses it, one stack stored as (experts, in, out)."""

    is_transposed = True

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return torch.einsum("bi,eio->beo", x, self.up)


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_experts_are_combined_one_by_one(kind):
    torch.manual_seed(0)
    base, x = nn.ModuleDict({"mix": Experts()}).double(), torch.randn(5, 6, dtype=torch.float64)
    options = {"r": 2, "target_modules": [], "target_parameters": ["mix.up"], "init_lora_weights": False}
    model = get_lora_model(base, LoraConfig(**options), "a")
    model.add_adapter("b", LoraConfig(**{**options, "lora_alpha": 3}))
    report = model.add_weighted_adapter(
        ["a", "b"], [0.5, -1.0], "new", kind, **({"svd_rank": 4} if kind == "svd" else {})
    )
    model.set_adapter(["a", "b"])
    model.set_scale("a", 0.5)
    model.set_scale("b", -1.0)
    both = model.mix(x)
    model.set_adapter("new")
    if kind == "linear":
        A, B = 0, 0
        for name, weight in (("a", 0.5 * 4.0), ("b", -1.0 * 1.5)):  # alpha / r is 4 and 1.5
            lora, root = model.mix.adapter(name), abs(weight) ** 0.5
            A, B = A + math.copysign(root, weight) * lora.lora_A, B + root * lora.lora_B
        torch.testing.assert_close(model.mix.adapter("new").lora_A, A)
        torch.testing.assert_close(model.mix.adapter("new").lora_B, B)
    else:
        assert report.total < 1e-12
        torch.testing.assert_close(model.mix(x), both)


def mixtral():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    torch.manual_seed(0)
    config = MixtralConfig(**sizes, num_hidden_layers=1, intermediate_size=24, vocab_size=100)
    return MixtralForCausalLM(config).eval()


def test_experts_of_transformers_and_other_layers_are_combined_into_a_file_that_peft_reads(tmp_path):
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = get_lora_model(mixtral(), LoraConfig(r=2, init_lora_weights=False, **targets), "a")
    model.add_adapter("b", LoraConfig(r=3, init_lora_weights=False, **targets))
    report = model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "new", "cat")
    assert len(report.norms) == 3
    model.set_adapter(["a", "b"])
    model.set_scale("a", 0.5)
    model.set_scale("b", -2.0)
    expected = logits(model)
    model.set_adapter("new")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path, "new")
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "new")
        torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-4)


def test_the_weights_that_an_attention_reads_are_combined_too(tmp_path):
    def attention():
        torch.manual_seed(0)
        return nn.ModuleDict({"att": nn.MultiheadAttention(8, 2)}).double()

    x = torch.randn(5, 2, 8, dtype=torch.float64)
    options = {"target_modules": ["att"], "init_lora_weights": False}
    model = get_lora_model(attention(), LoraConfig(r=2, **options), "a")
    model.add_adapter("b", LoraConfig(r=3, **options))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    model.set_adapter(["a", "b"])
    expected = model.att(x, x, x)[0]
    model.save_pretrained(tmp_path, "new")
    again = load_adapter(attention(), tmp_path / "new")
    torch.testing.assert_close(again.att(x, x, x)[0], expected)


def test_an_adapter_of_an_embedding_and_the_head_tied_to_it_stays_on_both(tmp_path):
    options = {"target_modules": ["wte"], "ensure_weight_tying": True, "init_lora_weights": False}
    model = get_lora_model(gpt2(), LoraConfig(r=2, **options), "a")
    model.add_adapter("b", LoraConfig(r=3, **options))
    report = model.add_weighted_adapter(["a", "b"], [1.0, -2.0], "new", "cat")
    assert list(report.norms) == ["transformer.wte"]
    model.set_adapter(["a", "b"])
    model.set_scale("b", -2.0)
    expected = logits(model)
    model.set_adapter("new")
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=1e-4)
    model.save_pretrained(tmp_path, "new")
    assert torch.equal(logits(load_adapter(gpt2(), tmp_path / "new")), logits(model))
    model.add_adapter("alone", LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False))
    refuses(
        TargetError,
        model,
        lambda: model.add_weighted_adapter(["a", "alone"], [1, 1], "other"),
        "transformer.wte",
        "'alone' does not",
    )


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"bias": "lora_only"}], ids=["lora_bias", "lora_only"])
def test_biases_are_added_up_with_the_weights(options, tmp_path):
    model = get_lora_model(gpt2(), LoraConfig(r=2, **options), "a")
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=5, **options))
    model.set_adapter(["a", "b"])
    disturb(model)
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "new", "cat")
    for layer in (block.attn.c_attn for block in model.transformer.h):
        both = 0.5 * layer.adapter("a").bias_update() - 2.0 * layer.adapter("b").bias_update()
        assert both.norm() > 0.1
        torch.testing.assert_close(layer.adapter("new").bias_update(), both)
    model.set_adapter("new")
    model.save_pretrained(tmp_path, "new")
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "new")
        torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)


def test_biases_beside_an_embedding_have_no_place_in_one_lora():
    options = {"r": 2, "target_modules": ["wte", "c_attn"], "bias": "lora_only"}
    model = get_lora_model(gpt2(), LoraConfig(**options), "a")
    model.add_adapter("b", LoraConfig(**options))
    combine = lambda: model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "new", "cat")  # noqa: E731
    refuses(TargetError, model, combine, "transformer.wte is an embedding", "biases of other layers")


def test_a_layer_that_an_adapter_lacks_counts_as_zero_if_that_is_said(tmp_path):
    theirs = two_of_peft(tmp_path, b={"exclude_modules": ["wide", "image"]})
    ours = ours_of(tmp_path)
    asked = {"adapters": ["a", "b"], "weights": [0.5, 2.0], "adapter_name": "new"}
    refuses(
        TargetError,
        ours,
        lambda: ours.add_weighted_adapter(**asked),
        "'b' is not on 'wide', 'image'",
        "different_targets=True",
    )
    for kind in ("svd", "cat", "linear"):
        asked |= {"adapter_name": kind, "combination_type": kind}
        ours.add_weighted_adapter(**asked, different_targets=True)
        combined_by_peft(theirs, **asked)
        for path in LAYERS:
            expected = update_of_peft(theirs, path, kind)
            torch.testing.assert_close(update(ours, path, kind), expected, atol=2e-5, rtol=1e-5)


def test_one_adapter_alone_can_be_cut_to_a_lower_rank():
    model = adapted(r=4)
    report = model.add_weighted_adapter(["default"], [2.0], "small", svd_rank=2)
    assert report.rank == 2
    for path, distance in report.distances.items():
        lost = torch.linalg.svdvals(2 * update(model, path, "default"))[2:].norm()
        assert distance == pytest.approx(float(lost), rel=1e-3)


def test_the_result_is_frozen_and_waits_and_training_goes_on():
    model = adapted(r=4)
    model.add_adapter("b", LoraConfig(r=2, init_lora_weights=False))
    model.train()
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    expected, generator = logits(model), torch.random.get_rng_state()
    model.add_weighted_adapter(["default", "b"], [1, 1], "sum", "cat")
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)
    assert {name: p.grad.tolist() for name, p in model.named_parameters() if p.grad is not None} == {
        name: grad.tolist() for name, grad in grads.items()
    }
    status = {row.adapter: row for row in model.adapter_status()}
    assert (status["default"].trainable, status["sum"].trainable, status["sum"].rank) == (True, False, "6")
    merged = copy.deepcopy(model)
    merged.set_adapter("sum")
    torch.testing.assert_close(logits(copy.deepcopy(merged).merge_and_unload()), logits(merged))


def test_half_precision_adapters_give_one_of_their_dtype_rounded_once():
    model = get_lora_model(
        gpt2().bfloat16(), LoraConfig(r=2, init_lora_weights=False), "a", autocast_adapter_dtype=False
    )
    model.add_adapter("b", LoraConfig(r=2, init_lora_weights=False), autocast_adapter_dtype=False)
    report = model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "new", "cat")
    assert 1e-4 < report.total < 1e-2  # the rounding of the factors is counted
    assert {p.dtype for n, p in model.named_parameters() if ".new." in n} == {torch.bfloat16}


def test_a_sum_that_is_far_off_is_logged_as_a_warning(caplog):
    model = adapted(r=2)
    model.add_adapter("b", LoraConfig(r=2, init_lora_weights=False))
    with caplog.at_level(logging.INFO, logger="minipeft"):
        model.add_weighted_adapter(["default", "b"], [1, 1], "one", "linear")
        model.add_weighted_adapter(["default", "b"], [1, 1], "two", "cat")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "linear: 2 layers combined at rank 2" in caplog.records[0].message


def pair():
    model = adapted(r=2)
    model.add_adapter("b", LoraConfig(r=3, init_lora_weights=False))
    return model


AB = ["default", "b"]
WRONG = {
    "an unknown name": (StateError, (["defualt", "b"], [1, 1], "n"), {}, "closest: 'default'"),
    "a name twice": (StateError, (["b", "b"], [1, 1], "n"), {}, "'b' stands there more than once"),
    "no name": (StateError, ([], [], "n"), {}, "at least one"),
    "a name for a list": (ConfigError, ("default", [1], "n"), {}, "list of names"),
    "lists for names": (ConfigError, ([["b"], ["default"]], [1, 1], "n"), {}, "list of names"),
    "a number for a flag": (ConfigError, (AB, [1, 1], "n"), {"svd_full_matrices": 1}, "svd_full_matrices must be True"),
    "too few weights": (ConfigError, (AB, [1], "n"), {}, "each of the 2 adapters, not 1"),
    "NaN": (ConfigError, (AB, [1, math.nan], "n"), {}, "the weight of 'b'"),
    "a word": (ConfigError, (AB, [1, "1"], "n"), {}, "the weight of 'b'"),
    "a name that is taken": (StateError, (AB, [1, 1], "b"), {}, "there is an adapter 'b' already"),
    "a name that is a path": (ConfigError, (AB, [1, 1], "../b"), {}, "not allowed"),
    "an unknown type": (ConfigError, (AB, [1, 1], "n", "tie"), {}, "closest: 'ties'"),
    "other ranks": (TargetError, (AB, [1, 1], "n", "linear"), {}, "c_attn: 'linear' adds factors of one rank"),
    "no density": (ConfigError, (AB, [1, 1], "n", "ties_svd"), {}, "needs density"),
    "density above 1": (ConfigError, (AB, [1, 1], "n", "ties_svd"), {"density": 1.5}, "above 0 and at most 1"),
    "density 0": (ConfigError, (AB, [1, 1], "n", "dare_linear_svd"), {"density": 0}, "above 0 and at most 1"),
    "a density for nothing": (ConfigError, (AB, [1, 1], "n"), {"density": 0.5}, "no use for 'density'"),
    "a rank for nothing": (ConfigError, (AB, [1, 1], "n", "cat"), {"svd_rank": 2}, "no use for 'svd_rank'"),
    "rank 0": (ConfigError, (AB, [1, 1], "n"), {"svd_rank": 0}, "svd_rank"),
    "a clamp beyond 1": (ConfigError, (AB, [1, 1], "n"), {"svd_clamp": 2}, "quantile from 0 to 1"),
    "a driver on a CPU": (ConfigError, (AB, [1, 1], "n"), {"svd_driver": "gesvd"}, "for CUDA"),
    "too large": (TargetError, (AB, [1e39, 1.0], "n", "cat"), {}, "not finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_error_and_changes_nothing(case):
    error, args, options, said = WRONG[case]
    model = pair()
    refuses(error, model, lambda: model.add_weighted_adapter(*args, **options), said, "Nothing was changed.")
    assert list(model.adapter_configs) == ["default", "b"]


REFUSED = {
    "dora": ({"use_dora": True}, "'other' (Dora) multiplies what is there"),
    "modules_to_save": ({"modules_to_save": ["classifier"]}, "classifier: adapter 'other' trains this module in full"),
    "bias": ({"bias": "all"}, "'other' trains this module in full"),
    "tokens": ({"trainable_token_indices": [3]}, "'other' trains rows of tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_more_than_an_update_is_refused_by_name(case):
    options, said = REFUSED[case]
    model = adapted(bert_classifier(), r=2, target_modules=["query"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query"], **options))
    for kind in ("cat", "svd"):
        refuses(
            StateError, model, lambda k=kind: model.add_weighted_adapter(["default", "other"], [1, 1], "n", k), said
        )


def test_rows_of_tokens_that_a_tied_head_shares_are_refused_too():
    model = adapted(adapter_name="a", r=2, target_modules=["wte"])
    model.add_adapter("tokens", minipeft.TrainableTokensConfig(token_indices=[3], init_weights=False))
    for names in (["tokens"], ["a", "tokens"]):
        action = lambda names=names: model.add_weighted_adapter(names, [1] * len(names), "n", "svd", 8)  # noqa: E731
        refuses(StateError, model, action, "'tokens' trains rows of tokens")


@pytest.mark.parametrize("config", ["OFTConfig", "IA3Config"])
def test_methods_that_multiply_are_refused(config):
    model = adapted(r=2, target_modules=["c_attn"])
    options = {"oft_block_size": 8} if config == "OFTConfig" else {"feedforward_modules": []}
    model.add_adapter("other", getattr(minipeft, config)(target_modules=["c_attn"], **options))
    act = lambda: model.add_weighted_adapter(["default", "other"], [1, 1], "n", "cat")  # noqa: E731
    refuses(StateError, model, act, "multiplies what is there", "transformer.h.0.attn.c_attn")


def test_values_that_are_not_finite_are_named():
    model = pair()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.adapter("b").lora_A[0, 0] = math.nan
    refuses(
        StateError,
        model,
        lambda: model.add_weighted_adapter(AB, [1, 1], "n"),
        "transformer.h.1.attn.c_attn: adapter 'b' has values that are not finite",
    )


@pytest.mark.parametrize("step", ["plan", "build", "attach", "measured"])
def test_ctrl_c_at_any_step_leaves_the_model_as_it_was(step, monkeypatch):
    from minipeft.merging.combining import weighted

    for late in (False, True):
        model = pair()
        before, expected, real = state_digest(model), logits(model), getattr(weighted, step)

        def failing(*args, late=late, real=real, **kwargs):
            if late:
                real(*args, **kwargs)
            raise KeyboardInterrupt

        if step == "attach" and late:
            continue  # then all is done
        with monkeypatch.context() as patch:
            patch.setattr(weighted, step, failing)
            with pytest.raises(KeyboardInterrupt):
                model.add_weighted_adapter(AB, [1, 1], "n")
        assert state_digest(model) == before
        assert torch.equal(logits(model), expected)
        model.add_weighted_adapter(AB, [1, 1], "n")


@pytest.mark.parametrize("lowered", [autocast, tf32_allowed])
@pytest.mark.parametrize(("combination_type", "density"), [("svd", None), ("ties_svd", 0.5)])
def test_autocast_and_tf32_change_nothing_of_a_combination(combination_type, density, lowered):
    made = []
    for around in (contextlib.nullcontext, lowered):
        model = adapted(init_lora_weights=False)
        model.add_adapter("b", LoraConfig(r=4))
        with around():
            report = model.add_weighted_adapter(["default", "b"], [1, 2], "c", combination_type, density=density)
        made.append((report, model.adapter_state_dict("c")))
    assert made[0][0] == made[1][0]
    assert all(torch.equal(value, made[1][1][key]) for key, value in made[0][1].items())


def test_a_merged_model_is_unmerged_first():
    model = pair()
    model.merge_adapter()
    refuses(StateError, model, lambda: model.add_weighted_adapter(AB, [1, 1], "n"), "unmerge_adapter()")

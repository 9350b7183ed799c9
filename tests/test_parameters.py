"""Bare parameters (`target_parameters`): against the update written into them, and against PEFT's ParamWrapper."""

import copy
import functools
import json
import pickle

import pytest
import torch
from old_experts import gpt_oss, mixture
from tiny_models import disturb, foreign_code, llama, logits, state_digest, token_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

from minipeft import ConfigError, LoraConfig, MergeError, TargetError, get_lora_model, load_adapter
from minipeft.injection.adapted_weight import AdaptedWeight

with foreign_code():
    peft = pytest.importorskip("peft")
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

EXPERTS, IN, OUT = 3, 5, 7


class Experts(nn.Module):
    """Every row goes through every expert; the outputs are summed. `last` and `first` are out of alphabetical order."""

    def __init__(self, is_transposed=False, experts=EXPERTS):
        super().__init__()
        self.is_transposed = is_transposed
        up, down = ((IN, OUT), (OUT, IN)) if is_transposed else ((OUT, IN), (IN, OUT))
        self.last = nn.Parameter(torch.randn(experts, *up))
        self.first = nn.Parameter(torch.randn(experts, *down))
        self.mix = nn.Parameter(torch.randn(IN, IN))

    def forward(self, x, *, scale=1.0):
        up, down = (self.last, self.first) if self.is_transposed else (self.last.mT, self.first.mT)
        return scale * (torch.matmul(torch.matmul(x, up).tanh(), down).sum(0) @ self.mix.T)


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.experts = Experts(**options)

    def forward(self, x, **kwargs):
        return self.experts(x, **kwargs)


TARGETS = ["experts.last", "first", "mix"]
KINDS = {
    "(experts, out, in)": {},
    "(experts, in, out)": {"is_transposed": True},
    "one expert": {"experts": 1},
}
each = pytest.mark.parametrize("kind", KINDS)


def config(targets=TARGETS, **options):
    options = {"r": 2, "lora_alpha": 3, "target_modules": [], "init_lora_weights": False, **options}
    return LoraConfig(target_parameters=targets, **options)


def case(kind, dtype=torch.float64, **options):
    base = Net(**KINDS[kind]).to(dtype)
    return base, get_lora_model(copy.deepcopy(base), config(**options)), torch.randn(4, IN, dtype=dtype)


def wrapper_of(model, parameter):
    return next(m for m in model.modules() if isinstance(m, AdaptedWeight) and m.ops.parameter == parameter)


def updated_by_hand(base, model):
    """The base with every update written into it, expert by expert, in the order that PEFT's file has."""
    other = copy.deepcopy(base)
    for name in ("last", "first", "mix"):
        parameter, lora = getattr(other.experts, name).data, wrapper_of(model, name).adapters["default"]
        maps = len(parameter) if parameter.ndim == 3 else 1
        for e in range(maps):
            A, B = lora.lora_A[2 * e : 2 * e + 2].detach(), lora.lora_B[:, e::maps].detach()
            part = parameter[e] if parameter.ndim == 3 else parameter
            part += 1.5 * ((B @ A).T if base.experts.is_transposed and parameter.ndim == 3 else B @ A)
    return other


@each
def test_the_output_is_that_of_the_parameters_with_the_updates_in_them(kind):
    base, model, x = case(kind)
    torch.testing.assert_close(model(x, scale=2.0), updated_by_hand(base, model)(x, scale=2.0))
    assert not torch.allclose(model(x), base(x), atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each
def test_the_start_is_exactly_the_base(kind, dtype):
    base, model, x = case(kind, dtype, init_lora_weights=True)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("kind", ["(experts, in, out)"])
def test_merged_equals_unmerged_and_unmerging_brings_every_bit_back(kind, dtype, tolerance):
    base, model, x = case(kind, dtype)
    y = model(x)
    size = float(y.detach().abs().max())
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=tolerance, atol=tolerance * size)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrapper_of(model, "last").owner.last, base.experts.last)
    model.unmerge_adapter()
    owner = wrapper_of(model, "last").owner
    assert all(torch.equal(p, q) for p, q in zip(owner.parameters(), base.parameters(), strict=True))
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("kind", ["(experts, in, out)"])
def test_files_come_back_and_copies_are_independent(kind, tmp_path):
    base, model, x = case(kind)
    y = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path)(x), y)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            wrapper_of(other, "first").adapters["default"].lora_B.add_(1)
        assert not torch.equal(other(x), y)
        assert torch.equal(model(x), y)
        assert torch.equal(other.unload()(x), base(x))


def test_a_checkpointed_call_keeps_no_weight_and_has_the_same_gradients():
    _, model, x = case("(experts, out, in)")
    factors = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), factors)
    large = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: large.append(t.numel()) or t, lambda t: t)
    with hooks:
        y = checkpoint(model, x, use_reentrant=False)
    assert max(large, default=0) < EXPERTS * IN * OUT
    assert all(map(torch.equal, torch.autograd.grad(y.square().sum(), factors), expected))


def test_an_exception_inside_leaves_the_parameters_where_they_were():
    _, model, x = case("(experts, out, in)")
    before, y = state_digest(model), model(x)
    with pytest.raises(RuntimeError):
        model(torch.randn(4, IN + 1, dtype=torch.float64))
    assert state_digest(model) == before
    assert torch.equal(model(x), y)


def test_half_precision_parameters_have_float32_factors():
    _, model, x = case("(experts, out, in)", torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(x).dtype is torch.bfloat16


def test_autocast_rounds_the_products_of_the_module_and_not_the_update():
    _, model, _ = case("(experts, out, in)", torch.float32)
    expected = wrapper_of(model, "mix").adapted_weights()
    with torch.autocast("cpu", torch.bfloat16):
        found = wrapper_of(model, "mix").adapted_weights()
    assert list(found) == ["base_layer.base_layer.mix"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_adapters_in_half_precision_add_up_under_autocast_to_the_other_one():
    _, model, x = case("(experts, out, in)", torch.bfloat16)
    for name in ("second", "third"):
        model.add_adapter(name, config(r=1), autocast_adapter_dtype=False)
    model.set_adapter(["second", "third"])
    expected = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(model(x).double(), expected, rtol=0.05, atol=0.05)


def test_two_adapters_add_up_and_one_can_go():
    base, model, x = case("(experts, out, in)")
    first = model(x)
    model.add_adapter("second", config(r=1))
    assert torch.equal(model(x), first)
    model.set_adapter("second")
    second = updated = model(x)
    assert not torch.allclose(updated, first)
    model.set_adapter(["default", "second"])
    both = model(x)
    assert not torch.allclose(both, first)
    model.merge_adapter()
    torch.testing.assert_close(model(x), both)
    model.unmerge_adapter()
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(model(x), second)
    assert torch.equal(model.unload()(x), base(x))


@pytest.mark.parametrize(("tied", "path"), [("last", "experts.base_layer.last"), ("mix", "experts.mix")])
def test_a_tied_parameter_is_not_merged_into_both_modules(tied, path):
    model = Net().double()
    model.other = Experts().double()
    shared = getattr(model.experts, tied)
    setattr(model.other, tied, shared)
    get_lora_model(model, config(["experts.last", "experts.mix"]))
    before, x = shared.detach().clone(), torch.randn(4, IN, dtype=torch.float64)
    y = model(x)
    with pytest.raises(MergeError, match=rf"{path} is tied to .*other.{tied}"):
        model.merge_adapter()
    model.merge_adapter(untie=True)
    assert getattr(model.other, tied) is shared
    assert torch.equal(shared, before)
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    assert getattr(wrapper_of(model, "last").owner, tied) is shared


def theirs(base, directory=None, targets=TARGETS):
    with foreign_code():
        base = copy.deepcopy(base)
        if directory is not None:
            return peft.PeftModel.from_pretrained(base, directory)
        options = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": targets}
        return disturb(peft.get_peft_model(base, peft.LoraConfig(**options)), scale=0.3)


@pytest.mark.parametrize("targets", [TARGETS, ["first"], ["last", "mix"]], ids=str)
@pytest.mark.parametrize("kind", ["(experts, out, in)", "(experts, in, out)"])
def test_files_are_those_of_peft_in_both_directions(kind, targets, tmp_path):
    """Also which parameter a nested key means: the first declared one is innermost, whatever the alphabet says."""
    base, model, x = case(kind, torch.float32, targets=targets)
    model.save_pretrained(tmp_path / "ours")
    reference = theirs(base, targets=targets)
    with foreign_code():
        torch.testing.assert_close(theirs(base, tmp_path / "ours")(x), model(x), rtol=1e-4, atol=1e-4)
        reference.save_pretrained(tmp_path / "theirs")
        keys, expected = peft.get_peft_model_state_dict(reference).keys(), reference(x)
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
    assert loaded.adapter_state_dict().keys() == keys == model.adapter_state_dict().keys()
    found = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert sorted(found["target_parameters"]) == sorted(targets)
    assert found["target_modules"] == []


def moe(kind):
    sizes = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": None, "bos_token_id": 0}
    with foreign_code():
        torch.manual_seed(0)
        if kind == "mixtral":
            model = MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=12, num_local_experts=3))
        else:
            more = {"moe_intermediate_size": 12, "num_experts": 4, "head_dim": 8, "intermediate_size": 12}
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **more))
    return disturb(model, scale=0.1).eval()


MOE = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


class Block(nn.Module):
    """Experts, which have no bias, between layers that have one."""

    def __init__(self):
        super().__init__()
        self.before, self.experts, self.after = nn.Linear(IN, IN), Experts(), nn.Linear(IN, IN)

    def forward(self, x):
        return self.after(self.experts(self.before(x)))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_beside_experts_train_and_are_those_of_peft_in_both_directions(bias, tmp_path):
    base, x = Block(), torch.randn(4, IN)
    options = {"target_parameters": ["last", "mix"], "target_modules": ["before"], "bias": bias}
    model = disturb(get_lora_model(copy.deepcopy(base), LoraConfig(r=2, **options)))
    model.save_pretrained(tmp_path / "ours")
    reference = disturb(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **options)))
    reference.save_pretrained(tmp_path / "theirs")
    assert model.adapter_state_dict().keys() == peft.get_peft_model_state_dict(reference).keys()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(theirs(x), model(x))
    torch.testing.assert_close(ours(x), reference(x))
    torch.testing.assert_close(ours.merge_and_unload()(x), reference(x))


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "mixtral"])
def test_peft_adapts_parameters_alone_where_it_knows_no_default_modules(family, tmp_path):
    """Its file then says null, or has an empty list, for target_modules; null means the default ones for other families."""
    options = {"r": 2, "target_parameters": ["experts.down_proj"]}
    base = gpt_oss if family == "gpt_oss" else functools.partial(mixture, family)
    with foreign_code():
        reference = disturb(peft.get_peft_model(base(), peft.LoraConfig(**options)))
        reference.save_pretrained(tmp_path)
        expected = reference.eval()(token_ids() % 60).logits
    loaded = load_adapter(base(), tmp_path)
    torch.testing.assert_close(loaded.eval()(token_ids() % 60).logits, expected, rtol=0, atol=1e-5)
    assert set(loaded.adapter_state_dict()) == set(peft.get_peft_model_state_dict(reference))


@pytest.mark.parametrize(("kind", "targets", "trained"), [("qwen3_moe", ["q_proj"], 12), ("mixtral", [], 8)])
def test_experts_of_transformers_are_adapted_as_in_peft(kind, targets, trained, tmp_path):
    options = {**MOE, "target_modules": targets}
    model = get_lora_model(moe(kind), LoraConfig(r=2, init_lora_weights=False, **options))
    y = logits(model)
    assert not torch.allclose(y, logits(moe(kind)), atol=1e-2)
    model.save_pretrained(tmp_path / "ours")
    with foreign_code():
        reference = peft.PeftModel.from_pretrained(moe(kind), tmp_path / "ours")
        assert torch.allclose(logits(reference), y, rtol=0, atol=1e-4)
        reference = disturb(peft.get_peft_model(moe(kind), peft.LoraConfig(r=2, **options)))
        reference.save_pretrained(tmp_path / "theirs")
        expected = logits(reference.eval())
    loaded = load_adapter(moe(kind), tmp_path / "theirs", is_trainable=True)
    assert torch.allclose(logits(loaded), expected, rtol=0, atol=1e-4)
    ids = token_ids()
    losses = []
    for one in (loaded, reference):
        with foreign_code():
            losses.append(one.train()(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    pairs = dict(reference.named_parameters())
    compared = 0
    for name, parameter in loaded.named_parameters():
        if parameter.requires_grad:
            *path, _, factor = f"base_model.model.{name}".replace(".adapters", "").split(".")
            other = pairs[".".join([*path, factor, "default", "weight"])]
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5)
            compared += 1
    assert compared == trained
    loaded.eval()
    merged = loaded.merge_and_unload()
    assert torch.allclose(logits(merged), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_experts_are_saved_as_plain_lora_at_the_strength_with_which_they_act(family, tmp_path):
    base = gpt_oss if family == "gpt_oss" else functools.partial(mixture, family)
    options = {**MOE, "r": 2, "rank_pattern": {"experts.down_proj": 3}, "use_rslora": True, "init_lora_weights": False}
    model = get_lora_model(base(), LoraConfig(**options))
    model.set_scale("default", 0.5)
    expected = logits(model, token_ids() % 60)
    model.save_pretrained(tmp_path, convert_to_lora=True)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (3, 3)
    assert not saved.keys() & {"rank_pattern", "use_rslora"}
    torch.testing.assert_close(logits(load_adapter(base(), tmp_path), token_ids() % 60), expected, rtol=0, atol=1e-4)
    with foreign_code():
        reference = peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(reference, token_ids() % 60), expected, rtol=0, atol=1e-4)


def test_gradient_checkpointing_of_a_mixture_gives_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = get_lora_model(moe("mixtral"), LoraConfig(r=2, init_lora_weights=False, **MOE)).train()
        if checkpointed:
            with foreign_code():
                model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = token_ids()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.allclose, *gradients))


def test_ranks_go_by_the_name_of_the_parameter():
    model = get_lora_model(Net(), config(rank_pattern={"first": 4}, alpha_pattern={"experts.mix": 9}))
    shapes = {n: tuple(wrapper_of(model, n).adapters["default"].lora_A.shape) for n in ("last", "first", "mix")}
    assert shapes == {"last": (2 * EXPERTS, IN), "first": (4 * EXPERTS, OUT), "mix": (2, IN)}
    assert wrapper_of(model, "mix").adapters["default"].scaling == 4.5


class WithBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.inner = Experts()
        self.vector = nn.Parameter(torch.zeros(4))
        self.whole = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.whole.data = self.whole.data.long()


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = WithBuffer()
        self.own = nn.Parameter(torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["inner.lst"], {}, r"'inner.lst' matches no parameter of Outer \(closest: 'inner.last', 1 parameter\)"),
        (["own"], {}, "'own' matches no parameter of Outer"),  # the model's own: it has no place to be wrapped in
        (["block.vector"], {}, "block.vector is not a plain floating-point parameter of 2 or 3 dimensions"),
        (["whole"], {}, "block.whole is not a plain floating-point parameter"),
        (["inner.last"], {"lora_dropout": 0.1}, "block.inner.last: .*lora_dropout = 0.1' cannot act"),
        (["linear.weight"], {"bias": "all"}, "block.linear.weight: .*bias = 'all'\" cannot act"),
        (["linear.weight"], {"target_modules": ["linear"]}, "block.linear has parameters to adapt, and block.linear"),
        (["linear.weight"], {"modules_to_save": ["block"]}, "block.linear has parameters to adapt, and block is"),
        (["inner.last"], {"rank_pattern": {"lst": 3}}, "rank_pattern: lst' matches none of the 1 targeted"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_nothing_is_changed(targets, options, message):
    model = Outer()
    before = state_digest(model)
    with pytest.raises(TargetError, match=message):
        get_lora_model(model, config(targets, **options))
    assert state_digest(model) == before


def test_another_adapter_must_adapt_the_same_parameters():
    _, model, x = case("(experts, out, in)", targets=["first", "mix"])
    before, y = state_digest(model), model(x)
    for targets in (["first"], ["last", "first", "mix"]):
        with pytest.raises(TargetError, match="experts: another adapter adapts other weights of this module"):
            model.add_adapter("second", config(targets))
    assert state_digest(model) == before
    assert torch.equal(model(x), y)


def test_the_weight_of_a_linear_layer_can_be_a_target_and_then_the_layer_cannot():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    base, x = copy.deepcopy(model), torch.randn(2, 4, dtype=torch.float64)
    get_lora_model(model, config(["0.weight"]))
    lora = model[0].adapters["default"]
    torch.testing.assert_close(model(x), base(x) + 1.5 * x @ lora.lora_A.T @ lora.lora_B.T)
    with pytest.raises(TargetError, match="0: another adapter adapts other weights of this module, or all of it"):
        model.add_adapter("second", LoraConfig(target_modules=["0"]))


def test_the_default_modules_are_adapted_beside_parameters_unless_the_list_is_empty():
    options = {"r": 2, "target_parameters": ["gate_proj.weight"]}
    found = get_lora_model(llama(), LoraConfig(**options)).adapter_state_dict()
    with foreign_code():
        expected = peft.get_peft_model_state_dict(peft.get_peft_model(llama(), peft.LoraConfig(**options)))
    assert found.keys() == expected.keys()
    assert len(found) == 12
    assert len(get_lora_model(llama(), LoraConfig(target_modules=[], **options)).adapter_state_dict()) == 4
    assert (
        len(get_lora_model(Net(), LoraConfig(target_parameters=["mix"])).adapter_state_dict()) == 2
    )  # no default here


def test_no_target_modules_needs_target_parameters():
    with pytest.raises(ConfigError, match="target_modules must be a non-empty list"):
        LoraConfig(target_modules=[])
    with pytest.raises(ConfigError, match="target_parameters must be a non-empty list"):
        LoraConfig(target_parameters="experts.first")

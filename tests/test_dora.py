"""DoRA against its formula in float64, against PEFT on the same weights, and as a module."""

import copy

import pytest
import torch
from tiny_layers import LAYERS, OneLayer, adapted_layer, canonical_weight, conv1d, example
from tiny_models import disturb, foreign_code, gpt2, llama, logits, token_ids
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import minipeft
from minipeft import LoraConfig, get_lora_model
from minipeft.config.adapter_config import config_from_dict
from minipeft.methods import dora
from minipeft.methods.dora import Dora, row_norms

with foreign_code():
    peft = pytest.importorskip("peft")


every_layer = pytest.mark.parametrize("name", [name for name in LAYERS if "padding" not in name])


def with_dora(name, dtype=torch.float64, **options):
    """A model around one layer whose adapter does something, its magnitudes included."""
    layer, model = adapted_layer(name, dtype, use_dora=True, r=3, lora_alpha=5, **options)
    with torch.no_grad():
        magnitude(model).mul_(1 + 0.3 * torch.rand_like(magnitude(model)))
    return layer, model


def magnitude(model):
    return model.layer.adapters["default"].lora_magnitude_vector


def direction(layer, lora):
    return canonical_weight(layer) + lora.scaling * lora.lora_B @ lora.lora_A


def formula(layer, lora, dense):
    """Eq. (5), with the norm as a constant."""
    V = direction(layer, lora)
    bias = 0 if getattr(layer, "bias", None) is None else layer.bias
    return (dense @ V.T) * (lora.lora_magnitude_vector / V.detach().norm(dim=1)) + bias


def gradients(y, parameters):
    return torch.autograd.grad(y.square().sum(), parameters)


@every_layer
def test_output_and_gradients_are_those_of_the_formula_with_a_constant_norm(name):
    layer, model = with_dora(name)
    lora = model.layer.adapters["default"]
    x, dense = example(layer)
    y, expected = model(x), formula(layer, lora, dense)
    torch.testing.assert_close(y, expected)
    trained = [lora.lora_A, lora.lora_B, lora.lora_magnitude_vector]
    for found, wanted in zip(gradients(y, trained), gradients(expected, trained), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("cached", [4, 2**17])  # values in a block: several blocks, or one
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_factored_norm_is_the_norm(dtype, transposed, cached, monkeypatch):
    monkeypatch.setattr(dora, "CACHED", cached)
    monkeypatch.setattr(dora, "MULTIPLIED", cached)
    weight = (torch.randn(8, 11).t() if transposed else torch.randn(11, 8)).to(dtype)
    A, B = torch.randn(3, 8), torch.randn(11, 3)
    found = row_norms(weight, A, B, 0.7)
    assert found.dtype is torch.promote_types(dtype, torch.float32)
    expected = (weight.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_makes_nothing_of_the_weights_size(dtype, transposed, monkeypatch):
    monkeypatch.setattr(dora, "CACHED", 2**12)
    monkeypatch.setattr(dora, "MULTIPLIED", 2**12)
    weight = torch.randn(256, 256).to(dtype)
    weight, A, B = weight.t() if transposed else weight, torch.randn(4, 256), torch.randn(256, 4)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if (
                isinstance(result, torch.Tensor)
                and result.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
            ):
                made.append(result.untyped_storage().nbytes())
            return result

    with Watch():
        row_norms(weight, A, B, 1.0)
    assert made
    assert max(made) <= 4 * 2**12


WRITES = {
    "copy_": lambda layer: layer.weight.copy_(torch.randn(layer.weight.shape)),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "one value": lambda layer: layer.weight[3, 2].add_(1),
    "by way of data": lambda layer: layer.weight.data.mul_(2),
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn(layer.weight.shape)),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(layer.weight.shape), False)),
    "rounded": lambda layer: layer.bfloat16().float(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_base_s_own_norm_is_kept_until_the_base_is_written(write, transposed, monkeypatch):
    calls = []
    real = dora.squared_rows
    monkeypatch.setattr(dora, "squared_rows", lambda *arguments: calls.append(1) or real(*arguments))
    layer = conv1d(9, 7) if transposed else nn.Linear(7, 9)
    model = disturb(get_lora_model(OneLayer(layer), LoraConfig(r=3, target_modules=["layer"], use_dora=True)))
    layer, x = model.layer.base_layer, torch.randn(5, 7)
    calls.clear()
    for _ in range(3):
        model(x).sum().backward()
    assert len(calls) <= 1
    calls.clear()
    with torch.no_grad():
        WRITES[write](layer)
    lora = model.layer.adapters["default"]
    for _ in range(2):
        torch.testing.assert_close(model(x), formula(layer, lora, x))
    assert len(calls) == 1
    twin = copy.deepcopy(model)
    with torch.no_grad():
        WRITES[write](twin.layer.base_layer)
    torch.testing.assert_close(twin(x), formula(twin.layer.base_layer, twin.layer.adapters["default"], x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_layer
def test_the_start_is_exactly_the_base(name, dtype):
    layer = LAYERS[name]().to(dtype)
    x, _ = example(layer, dtype)
    expected = layer(x)
    model = get_lora_model(OneLayer(layer), LoraConfig(r=3, target_modules=["layer"], use_dora=True))
    assert torch.equal(model(x), expected)
    assert magnitude(model).dtype is torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dropout", [0.0, 1e-9])  # the second takes the way of dropout, and drops nothing
def test_half_precision_keeps_a_scale_that_hardly_differs_from_one(dropout):
    """1.006 would be 1.0078 in bfloat16; the mean of the outputs shows whether it was rounded before it acted."""
    config = LoraConfig(r=2, target_modules=["layer"], use_dora=True, lora_dropout=dropout)
    layer = nn.Linear(64, 64).bfloat16()
    model = get_lora_model(OneLayer(layer), config).train()
    with torch.no_grad():
        magnitude(model).mul_(1.006)
    x = torch.randn(512, 64).bfloat16()
    bias = layer.bias.detach().double()
    before, after = (y.detach().double() - bias for y in (layer(x), model(x)))
    assert 1.004 < float((before * after).sum() / before.square().sum()) < 1.007


def test_a_row_without_length_stays_finite_and_learns():
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    model = get_lora_model(OneLayer(layer), LoraConfig(r=2, target_modules=["layer"], use_dora=True))
    x = torch.randn(5, 4)
    assert torch.equal(model(x), layer(x))
    model(x).sum().backward()
    lora = model.layer.adapters["default"]
    assert all(p.grad.isfinite().all() for p in lora.parameters())
    assert lora.lora_B.grad.abs().min() > 0


def test_trained_biases_are_not_scaled():
    layer, model = with_dora("linear", bias="lora_only")
    lora = model.layer.adapters["default"]
    x, dense = example(layer)
    expected = formula(layer, lora, dense)
    with torch.no_grad():
        lora.lora_bias.add_(2)
    torch.testing.assert_close(model(x), expected + 2)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected + 2)


def test_dropout_leaves_the_bases_own_output_whole():
    """``W x + b + (c - 1) W d + c s B A d``: of the ways PEFT's could be continued, the one PEFT takes."""
    layer, model = with_dora("linear", lora_dropout=0.5)
    lora = model.layer.adapters["default"]
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.manual_seed(3)
    y = model.train()(x)
    torch.manual_seed(3)
    d = nn.functional.dropout(x, 0.5)
    c = lora.lora_magnitude_vector / direction(layer, lora).detach().norm(dim=1)
    expected = layer(x) + (c - 1) * (d @ layer.weight.T) + c * lora.scaling * (d @ lora.lora_A.T @ lora.lora_B.T)
    torch.testing.assert_close(y, expected)
    trained = [lora.lora_A, lora.lora_B, lora.lora_magnitude_vector]
    for found, wanted in zip(gradients(y, trained), gradients(expected, trained), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("order", [("default", "plain"), ("plain", "default")])
def test_beside_another_adapter_a_merge_is_of_all_or_refused(order):
    layer, model = with_dora("linear")
    config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    model.add_adapter("plain", config)
    model.set_adapter(order)
    x, _ = example(layer)
    expected = model(x)
    for name in order:
        with pytest.raises(minipeft.MergeError, match="depends on the base weight"):
            model.merge_adapter([name])
        assert torch.equal(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


# test_contract.py compiles DoRA on a linear layer.
@pytest.mark.parametrize("name", [pytest.param("linear", marks=pytest.mark.slow), "embedding"])
def test_compiles_into_one_graph_with_dropout(name):
    layer, model = with_dora(name, dtype=torch.float32, lora_dropout=0.5)
    x, _ = example(layer, torch.float32)
    torch._dynamo.reset()
    assert torch.compile(model.train(), fullgraph=True, backend="aot_eager")(x).isfinite().all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant, dropout):
    _, model = with_dora("linear", lora_dropout=dropout)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    found = []
    for call in (model.train(), lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        for tensor in trained:
            tensor.grad = None
        call(x).square().sum().backward()
        found.append([tensor.grad for tensor in trained])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_autocast_computes_the_norm_in_full_precision():
    _, model = with_dora("linear", dtype=torch.float32)
    lora = model.layer.adapters["default"]
    expected = lora.scale(model.layer.base_layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora.scale(model.layer.base_layer.weight), expected)
        assert model(torch.randn(3, 5)).dtype is torch.bfloat16


def test_kept_for_backward_are_the_input_and_one_output():
    base = nn.Linear(256, 256).bfloat16()
    model = get_lora_model(OneLayer(base), LoraConfig(r=4, target_modules=["layer"], use_dora=True))
    x = torch.randn(128, 256, dtype=torch.bfloat16, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert sum(storage.nbytes() for storage in saved.values()) <= 2 * x.nbytes + 16 * 4 * 256 + 4 * 128 * 4


def test_dora_is_an_option_of_lora_in_files_too():
    config = LoraConfig(use_dora=True, target_modules=["c_attn"])
    model = minipeft.get_adapter_model(gpt2(), config)
    assert type(model.transformer.h[0].attn.c_attn.adapters["default"]) is Dora
    assert config.to_dict()["peft_type"] == "LORA"
    assert config.to_dict()["use_dora"] is True
    with pytest.raises(minipeft.ConfigError, match="peft_type 'DORA' is not implemented; known: .*'LORA'"):
        config_from_dict({**config.to_dict(), "peft_type": "DORA"})


def test_patterns_and_rank_stabilised_scaling_combine_with_it():
    options = {"target_modules": ["c_attn"], "rank_pattern": {"h.0.attn.c_attn": 2}}
    options["alpha_pattern"] = {"h.1.attn.c_attn": 5}
    model = get_lora_model(gpt2(), LoraConfig(r=4, lora_alpha=8, use_rslora=True, use_dora=True, **options))
    first, second = (model.transformer.h[i].attn.c_attn.adapters["default"] for i in (0, 1))
    assert (len(first.lora_A), first.scaling) == (2, 8 / 2**0.5)
    assert (len(second.lora_A), second.scaling) == (4, 5 / 2)


CASES = {
    "gpt2": (gpt2, {"r": 4, "lora_alpha": 7, "target_modules": ["c_attn", "c_fc", "wte"]}),
    "llama": (llama, {"r": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "llama bias": (llama, {"r": 3, "target_modules": ["q_proj", "embed_tokens"], "bias": "lora_only"}),
    "gpt2 patterns": (
        gpt2,
        {"r": 4, "target_modules": ["c_attn"], "rank_pattern": {"h.0.attn.c_attn": 2}, "use_rslora": True},
    ),
}


def theirs(case):
    factory, options = CASES[case]
    with foreign_code():
        model = peft.get_peft_model(factory(), peft.LoraConfig(use_dora=True, **copy.deepcopy(options)))
        return disturb(model).eval()


def their_logits(model):
    with foreign_code():
        return logits(model)


@pytest.mark.parametrize("case", CASES)
def test_files_go_both_ways_and_say_the_same(case, tmp_path):
    factory, _ = CASES[case]
    model = theirs(case)
    with foreign_code():
        model.save_pretrained(tmp_path / "theirs")
    ours = minipeft.load_adapter(factory(), tmp_path / "theirs")
    expected = their_logits(model)
    assert (logits(ours) - expected).abs().max() < 1e-5
    assert (logits(ours) - logits(factory())).abs().max() > 1e-2
    ours.save_pretrained(tmp_path / "ours")
    with foreign_code():
        back = peft.PeftModel.from_pretrained(factory(), tmp_path / "ours")
    assert torch.equal(their_logits(back), expected)
    again = minipeft.load_adapter(factory(), tmp_path / "ours")
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_gradients_are_pefts(case, tmp_path):
    factory, _ = CASES[case]
    model = theirs(case)
    with foreign_code():
        model.save_pretrained(tmp_path)
        ids = token_ids()
        model(input_ids=ids, labels=ids).loss.backward()
        wanted = {
            name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        }
    ours = minipeft.load_adapter(factory(), tmp_path, is_trainable=True)
    ours(input_ids=ids, labels=ids).loss.backward()
    found = {
        key.removeprefix("base_model.model.").removesuffix(".weight"): tensor.grad
        for key, tensor in ours.adapter_state_dict().items()
    }
    assert found.keys() == wanted.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_a_step_under_dropout_is_pefts(case, tmp_path):
    """Both draw one mask a layer, in the order of the layers, so one seed gives the same masks."""
    factory, options = CASES[case]
    options = {**options, "target_modules": [t for t in options["target_modules"] if t != "wte"], "lora_dropout": 0.3}
    with foreign_code():
        model = disturb(peft.get_peft_model(factory(), peft.LoraConfig(use_dora=True, **options)))
        model.save_pretrained(tmp_path)
        torch.manual_seed(5)
        expected = logits(model.train())
    ours = minipeft.load_adapter(factory(), tmp_path, is_trainable=True).train()
    torch.manual_seed(5)
    assert (logits(ours) - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch needs it for forward mode
def test_forward_mode_holds_the_norm_fixed_as_the_gradient_does():
    layer, model = with_dora("linear")
    x, _ = example(layer)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    along = {name: torch.randn_like(value) for name, value in values.items()}

    def loss(values):
        return torch.func.functional_call(model, values, (x,)).sin().sum()

    _, found = torch.func.jvp(loss, (values,), (along,))
    gradient = torch.func.grad(loss)(values)
    torch.testing.assert_close(found, sum((gradient[name] * v).sum() for name, v in along.items()))


def normed(layer):
    with foreign_code():  # torch says that its older norm is deprecated
        nn.utils.weight_norm(layer)


HOOKS = {
    "weight_norm": normed,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 4),
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_weight_that_a_hook_computes_is_normed_as_it_is_in_this_call(hook, dropout):
    _, model = with_dora("linear", lora_dropout=dropout)
    base, lora = model.layer.base_layer, model.layer.adapters["default"]
    HOOKS[hook](base)
    x, dense = example(base)
    with torch.no_grad():
        model(x)
        next(p for name, p in base.named_parameters() if name in ("weight_v", "weight_orig")).add_(torch.randn(()))
        if dropout:  # what is called next is what is called after that
            first, second = ((torch.manual_seed(0), model(x))[1] for _ in range(2))
            torch.testing.assert_close(first, second, rtol=0, atol=0) if hook != "spectral_norm" else None
        y = model.eval()(x)
        torch.testing.assert_close(y, formula(base, lora, dense))


def test_a_layer_that_is_quantized_after_adapting_is_named():
    with foreign_code():
        quantization = pytest.importorskip("torchao.quantization")
    model = get_lora_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(minipeft.StateError, match=r"Int8Tensor does not give.*Quantize the base first"):
        model(torch.randn(2, 8))

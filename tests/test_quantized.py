"""LoRA on quantized bases, against the dequantized float model: bitsandbytes' and torchao's own layers, on a CPU."""

import copy
import gc
import pickle
import sys

import pytest
import torch
from tiny_layers import OneLayer, conv1d
from tiny_models import VOCABULARY, _made, disturb, foreign_code, logits, state_digest
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import minipeft
from minipeft import ConfigError, LoraConfig, MergeError, RegistryError, StateError, TargetError
from minipeft.injection.wrapper import innermost
from minipeft.layers.base import layer_ops
from minipeft.layers.bitsandbytes_4bit import _warn_of_misreading, reads_back
from minipeft.layers.linear import LinearOps
from minipeft.layers.quantized import QuantizedLinearOps
from minipeft.memory.probe import HALF_TOLERANCE, TOLERANCE, _tolerance
from minipeft.registry import registry
from minipeft.registry.registry import layer_type_names

with foreign_code():
    bnb = pytest.importorskip("bitsandbytes")
    torchao = pytest.importorskip("torchao.quantization")

KINDS = ("nf4", "fp4", "int8", "int8_weight_only")
OPS = {"nf4": "Linear4bitOps", "fp4": "Linear4bitOps", "int8": "Linear8bitLtOps", "int8_weight_only": "Int8TensorOps"}
every_kind = pytest.mark.parametrize("kind", KINDS)
CPU = (torch.float32, torch.device("cpu"))
EPS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


# 64 features, so that no block of a 4-bit weight straddles two rows: see test_a_kernel_that_misreads_is_noticed.
def gpt2(seed=0):
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return _made(GPT2LMHeadModel, seed, GPT2Config, **sizes, **drops, **ids, vocab_size=VOCABULARY)


def llama(seed=0):
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return _made(LlamaForCausalLM, seed, LlamaConfig, **sizes, **heads, **ids, vocab_size=VOCABULARY)


def quantized(kind, make=lambda: nn.Linear(128, 64), dtype=torch.float32):
    """One quantized layer in a model, in training mode: there bitsandbytes' int8 layer leaves its input as it is."""
    return minipeft.quantize(OneLayer(make().to(dtype)), kind)


def with_lora(model, **options):
    return minipeft.get_lora_model(model, LoraConfig(target_modules=["layer"], init_lora_weights=False, r=4, **options))


def read(layer):
    layer = innermost(layer)
    return layer_ops(layer).read_weight(layer)


@every_kind
def test_each_kind_has_its_own_ops_and_the_float_ops_refuse_it(kind):
    layer = quantized(kind).layer
    assert type(layer_ops(layer)).__name__ == OPS[kind]
    assert not LinearOps().accepts(layer)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("kind", "error"), [("nf4", 0.16), ("fp4", 0.18), ("int8", 0.005), ("int8_weight_only", 0.005)]
)
def test_the_weight_that_is_read_is_the_float_weight_up_to_its_rounding(kind, error):
    layer = nn.Linear(128, 64)
    weight = layer.weight.detach().clone()
    found = read(quantized(kind, lambda: layer).layer)
    assert torch.equal(layer.weight, weight)
    assert found.dtype is torch.float32
    assert 0 < (found - weight).abs().max() <= error * weight.abs().max()


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(128, 64), lambda: nn.Linear(128, 64, False), lambda: conv1d(64, 128)]
)
@every_kind
def test_output_and_gradients_are_those_of_the_dequantized_layer(kind, make, dtype):
    model = with_lora(quantized(kind, make, dtype))
    base, lora = model.layer.base_layer, model.layer.adapters["default"]
    weight, bias = read(base).double(), 0 if base.bias is None else base.bias.double()
    x = torch.randn(2, 5, 128, dtype=dtype, requires_grad=True)
    y = model(x)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, lora.lora_A, lora.lora_B), g)
    z, A, B = (t.detach().double().requires_grad_() for t in (x, lora.lora_A, lora.lora_B))
    expected = z @ (weight + lora.scaling * B @ A).T + bias
    wanted = torch.autograd.grad(expected, (z, A, B), g.double())
    assert y.dtype is dtype
    assert lora.lora_A.dtype is torch.float32
    for a, b in zip((y, *found), (expected, *wanted), strict=True):
        assert (a.double() - b).abs().max() <= EPS[dtype] * b.abs().max()


@pytest.mark.parametrize(("compute", "dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("double", [True, False])
def test_a_compute_dtype_other_than_that_of_the_model_is_followed(compute, dtype, double):
    layer = nn.Linear(128, 64).to(dtype)
    packed = bnb.nn.Linear4bit(128, 64, compute_dtype=compute, compress_statistics=double, quant_type="nf4")
    packed.load_state_dict(layer.state_dict())
    model = with_lora(OneLayer(packed.to("cpu")))
    lora, x = model.layer.adapters["default"], torch.randn(5, 128, dtype=dtype)
    y = model(x)
    assert y.dtype is dtype
    weight = read(packed).double() + lora.scaling * lora.lora_B.double() @ lora.lora_A.double()
    expected = x.double() @ weight.T + packed.bias.double()
    assert (y - expected).abs().max() <= EPS[torch.bfloat16] * expected.abs().max()


@every_kind
def test_no_float_weight_is_kept_for_the_backward_pass(kind):
    model = with_lora(quantized(kind, lambda: nn.Linear(124, 78)))
    x, kept = torch.randn(8, 124, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach()) or t, lambda t: t):
        y = model(x)
    with foreign_code():  # some objects warn about being looked at
        kept += [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    assert not [t.dtype for t in kept if t.numel() == 124 * 78 and type(t) is torch.Tensor and t.is_floating_point()]
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_nf4_takes_as_many_bits_a_weight_as_the_paper_says(double, bits):
    if double:
        layer = quantized("nf4", lambda: nn.Linear(512, 1024)).layer
    else:
        layer = bnb.nn.Linear4bit(512, 1024, compress_statistics=False, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    assert 8 * (layer.weight.nbytes + scales) / (512 * 1024) == pytest.approx(bits, abs=1e-3)


def test_a_kernel_that_misreads_is_noticed(monkeypatch):
    """As bitsandbytes 0.50 does on a CPU with AVX512, where a block of 64 straddles two rows of 32 or 48."""
    right = bnb.functional.dequantize_4bit

    def wrong(packed, state):
        state = copy.copy(state)
        state.absmax = state.absmax.roll(1)
        return right(packed, state)

    for features in (32, 64, 96, 128, 100):
        assert reads_back(features, 32, "nf4", *CPU), features
    reads_back.cache_clear()
    _warn_of_misreading.cache_clear()
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", wrong)
    with pytest.raises(TargetError, match=r"^layer: bitsandbytes misreads rows of 128.*skip_modules"):
        quantized("nf4")
    packed = bnb.nn.Linear4bit(128, 64, quant_type="nf4").to("cpu")
    with pytest.warns(UserWarning, match="misreads 4-bit layers with 128 input features in blocks of 64"):
        with_lora(OneLayer(packed))
    reads_back.cache_clear()


def repacked(double):
    """A layer as bitsandbytes leaves it after a call in eval mode on a processor with AVX512-BF16."""
    layer = bnb.nn.Linear4bit(128, 64, compress_statistics=double, quant_type="nf4").to("cpu")
    before = read(layer)
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    return layer, before


@pytest.mark.parametrize("double", [True, False])
def test_a_repacked_weight_is_read_as_it_acts_and_can_be_trained_on(double):
    layer, before = repacked(double)
    weight = read(layer)
    # Each block of 64 has a scale that was rounded to bfloat16.
    blocks, old = weight.view(-1, 64), before.view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    assert torch.equal(scales, scales.bfloat16().float())
    torch.testing.assert_close(scales, old.abs().amax(1, keepdim=True), rtol=2**-8, atol=0)
    torch.testing.assert_close(blocks / scales, old / old.abs().amax(1, keepdim=True))
    model = with_lora(OneLayer(layer))
    assert torch.equal(read(layer), weight)
    x = torch.randn(3, 128, requires_grad=True)
    lora = model.layer.adapters["default"]
    g = torch.randn(3, 64)
    (model(x) * g).sum().backward()
    torch.testing.assert_close(x.grad, g @ (weight + lora.scaling * lora.lora_B @ lora.lora_A))


def test_evaluation_leaves_every_layer_fit_for_training():
    """Also those without an adapter, and where a side is no multiple of a block: bitsandbytes itself fails there."""
    model = nn.Sequential(nn.Linear(64, 50), nn.Linear(50, 40), nn.Linear(40, 40))
    for index in range(3):
        packed = bnb.nn.Linear4bit(model[index].in_features, model[index].out_features, quant_type="nf4")
        packed.load_state_dict(model[index].state_dict())
        model[index] = packed.to("cpu")
    model = minipeft.get_lora_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(4, 64)
    before = [read(layer) for layer in (model[0].base_layer, model[1], model[2])]
    trained = model.train()(x)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), trained)
        with model.disable_adapter():
            model(x)
    assert model.train()(x).requires_grad
    for layer, weight in zip((model[0].base_layer, model[1], model[2]), before, strict=True):
        assert torch.equal(read(layer), weight)


@pytest.mark.each_value
@pytest.mark.parametrize("factory", [gpt2, llama])
@every_kind
def test_what_is_quantized_is_every_linear_layer_but_the_head(kind, factory):
    model, plain = minipeft.quantize(factory(), kind), factory()
    for name, layer in plain.named_modules():
        if type(layer) in (nn.Linear, Conv1D):
            assert layer_ops(model.get_submodule(name)).is_quantized == (name != "lm_head"), name
    assert not model.training
    error = (logits(minipeft.dequantize(model)) - logits(plain)).abs().max() / logits(plain).abs().max()
    assert 0 < error < (0.05 if kind.startswith("int8") else 0.5)


def test_names_that_are_skipped_stay_float():
    model = minipeft.quantize(gpt2(), "nf4", skip_modules=["mlp", "h.0.attn.c_attn"])
    packed = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert packed == {f"transformer.h.{end}" for end in ("0.attn.c_proj", "1.attn.c_attn", "1.attn.c_proj")}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: minipeft.quantize(m, "nf5"), ConfigError, "closest: 'nf4'"),
        (lambda m: minipeft.quantize(m, skip_modules=["mpl"]), TargetError, "closest: 'mlp'"),
        (lambda m: minipeft.quantize(m.double()), TargetError, "float64 on cpu cannot be quantized"),
        (lambda m: minipeft.quantize(m.transformer.wte), TargetError, "no linear layer"),
        (lambda m: minipeft.quantize(minipeft.get_lora_model(m)), StateError, "quantize it first"),
    ],
)
def test_a_quantization_that_cannot_be_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(gpt2())


@pytest.mark.parametrize(("kind", "package"), [("nf4", "bitsandbytes"), ("int8_weight_only", "torchao")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(kind, package, monkeypatch):
    for name in (f"{package}.nn", f"{package}.quantization"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    model = gpt2()
    before = state_digest(model)
    with pytest.raises(ConfigError, match=rf"needs {package}.*pip install 'minipeft\[quant\]'"):
        minipeft.quantize(model, kind)
    assert state_digest(model) == before


@pytest.fixture
def isolated():
    with registry.isolated():
        yield


@pytest.mark.usefixtures("isolated")
def test_a_kind_may_come_from_a_registered_layer():
    """One file and one decorator: the ops say what they are called, how they quantize and which weights are theirs."""

    class HalfLinear(nn.Linear):
        pass

    @minipeft.register_layer(HalfLinear, weight="some.where.Halves")
    class HalfOps(QuantizedLinearOps):
        kinds = ("half",)

        def accepts(self, base):
            return base.weight.dtype is torch.float16

        def dequantized(self, base, dtype=None):
            return base.weight.to(dtype or torch.float32)

        def quantize(self, kind, weight, bias):
            layer = HalfLinear(*weight.T.shape, bias=False, device="meta")
            layer.weight = nn.Parameter(weight.half() if len(weight) < 100 else weight.clone(), False)
            return layer

    model = minipeft.quantize(OneLayer(nn.Linear(8, 9, bias=False)), "half")
    assert layer_ops(model.layer) == HalfOps()
    assert "HalfLinear[Halves]" in layer_type_names()
    assert type(minipeft.dequantize(model).layer) is nn.Linear
    with pytest.raises(TargetError, match="stores 'half' in a way that HalfOps does not know"):
        minipeft.quantize(OneLayer(nn.Linear(8, 900, bias=False)), "half")
    with pytest.raises(RegistryError, match="with 'some.where.Halves' weights is already registered"):
        minipeft.register_layer(HalfLinear, weight="some.where.Halves")(LinearOps)


@every_kind
def test_all_linear_means_the_quantized_layers_too(kind):
    config = LoraConfig(target_modules="all-linear")
    model, plain = (minipeft.get_lora_model(m, config) for m in (minipeft.quantize(gpt2(), kind), gpt2()))
    assert list(model.adapter_state_dict()) == list(plain.adapter_state_dict())


@every_kind
def test_copies_are_equal_and_independent(kind):
    model = disturb(minipeft.get_lora_model(minipeft.quantize(gpt2(), kind)))
    expected = logits(model)
    copies = [copy.deepcopy(model)]
    if kind != "int8_weight_only":  # torchao's own layers cannot be pickled
        copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        assert torch.equal(logits(other), expected)
        disturb(other)
        assert not torch.equal(logits(other), expected)
        assert torch.equal(logits(model), expected)
        merged = logits(other.merge_and_unload(dequantize=True))
        assert torch.isfinite(merged).all()


@every_kind
def test_the_state_of_an_adapted_model_is_that_of_its_base_and_the_adapters(kind):
    base = minipeft.quantize(gpt2(), kind)
    plain = base.state_dict()
    state = minipeft.get_lora_model(base).state_dict()
    own = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".adapters." not in key}
    assert own.keys() == plain.keys()
    assert len(state) == len(own) + 4


@every_kind
def test_a_merge_asks_before_it_gives_up_the_quantized_weight(kind):
    model = disturb(minipeft.get_lora_model(minipeft.quantize(gpt2(), kind)))
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"c_attn: \w+ is quantized.*dequantize=True.*Nothing was changed"):
            merge()
    assert torch.equal(logits(model), expected)
    report = model.merge_adapter(dequantize=True)
    assert set(report.output_error) == set(report.relative_error) == {f"transformer.h.{i}.attn.c_attn" for i in (0, 1)}
    assert max(report.output_error.values()) < (0.02 if kind == "int8" else 1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(minipeft.quantize(gpt2(), kind)))
    merged = logits(model)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert not torch.equal(merged, expected)
    # bitsandbytes' int8 layer rounds its input too, in eval mode, and the float layer does not.
    assert (merged - expected).abs().max() <= (0.05 if kind == "int8" else 1e-5) * expected.abs().max()


@pytest.mark.parametrize("training", [True, False])
@every_kind
def test_what_stood_aside_for_a_merge_comes_back_in_the_mode_of_the_model(kind, training):
    """bitsandbytes' int8 layer rounds its input in evaluation, and not in training."""
    model, x = with_lora(quantized(kind)), torch.randn(6, 128)
    expected = model.train(training)(x)
    with model.disable_adapter():
        bare = model(x)
    model.train(not training).merge_adapter(dequantize=True)
    model.train(training)
    with model.disable_adapter():
        assert torch.equal(model(x), bare)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    assert model.layer.base_layer.training is training


def test_what_stood_aside_for_a_merge_comes_back_on_the_device_of_the_model():
    model = with_lora(quantized("int8_weight_only"))
    model.merge_adapter(dequantize=True)
    model.layer.base_layer.to("meta")
    model.layer.undo.restore(model, model.layer, None)
    assert {p.device.type for p in model.layer.base_layer.parameters()} == {"meta"}


@every_kind
def test_what_was_written_into_the_layer_that_stands_in_is_not_dropped(kind):
    model = with_lora(quantized(kind))
    model.merge_adapter(dequantize=True)
    kept = copy.deepcopy(model)
    with torch.no_grad():
        model.layer.base_layer.bias[0] += 1
    kept.half()
    for written in (model, kept):
        before = state_digest(written)
        with pytest.raises(MergeError, match="layer: .*written or converted"):
            written.unmerge_adapter()
        assert state_digest(written) == before


def test_the_report_says_how_far_an_output_is_off(caplog):
    model = with_lora(quantized("int8")).eval()
    x = torch.randn(4096, 128)
    with torch.no_grad():
        before = model(x)
        report = model.merge_adapter(dequantize=True)
        off = float((model(x) - before).abs().max() / before.abs().max())
    assert off / 4 < report.output_error["layer"] < 2 * off
    assert "1 of them were dequantized" in caplog.text
    assert not model.layer.adapters["default"].training


@pytest.mark.each_value
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("factory", [gpt2, llama])
@every_kind
def test_the_merged_model_is_a_plain_one_that_transformers_saves(kind, factory, dtype, tmp_path):
    plain = factory().to(dtype)
    types = [type(module) for module in plain.modules()]
    model = disturb(minipeft.get_lora_model(minipeft.quantize(plain, kind), LoraConfig(init_lora_weights=False)))
    expected = logits(model)
    merged = model.merge_and_unload(dequantize=True)
    assert [type(module) for module in merged.modules()] == types
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    tolerance = 0.05 if dtype is torch.bfloat16 or kind == "int8" else 1e-5
    assert (logits(merged) - expected).abs().max() <= tolerance * expected.abs().max()
    with foreign_code():
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path).eval()
    for (name, saved), (_, tensor) in zip(again.named_parameters(), merged.named_parameters(), strict=True):
        assert torch.equal(saved, tensor), name


def test_a_float_dtype_raised_after_quantizing_is_that_of_the_merged_layers():
    """As prepare_model_for_kbit_training does it: then float32 activations come into a layer quantized from bfloat16."""
    model = minipeft.quantize(llama().bfloat16(), "nf4")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    model = disturb(minipeft.get_lora_model(model))
    expected = logits(model)
    merged = model.merge_and_unload(dequantize=True)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    assert (logits(merged) - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_a_hook_on_a_quantized_layer_is_not_lost_unseen():
    model = minipeft.get_lora_model(minipeft.quantize(gpt2(), "nf4"))
    model.transformer.h[0].mlp.c_fc.register_forward_hook(print)
    with pytest.raises(MergeError, match=r"h.0.mlp.c_fc: hooks or a patched forward"):
        model.merge_and_unload(dequantize=True)
    assert model.active_adapters == ["default"]


def test_dequantize_wants_no_adapters():
    with pytest.raises(StateError, match="has adapters"):
        minipeft.dequantize(minipeft.get_lora_model(minipeft.quantize(gpt2(), "nf4")))


def test_an_update_that_overflows_is_refused_and_the_quantized_layers_stay():
    model = with_lora(quantized("nf4"))
    with torch.no_grad():
        model.layer.adapters["default"].lora_B.fill_(float("inf"))
    with pytest.raises(MergeError, match="not finite"):
        model.merge_adapter(dequantize=True)
    assert isinstance(model.layer.base_layer, bnb.nn.Linear4bit)


class QuantLinear(nn.Module):
    """As GPTQ's, AWQ's and HQQ's layers: a module of its own with packed integers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


def dynamic():
    model = nn.Sequential(nn.Linear(64, 64))
    with foreign_code():
        torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    return model[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (QuantLinear, r"no LayerOps for .*QuantLinear; registered: .*Linear4bit, Linear8bitLt, Linear\[Int8Tensor\]"),
        (lambda: bnb.nn.Linear4bit(64, 64), "this instance is refused.*Params4bit of torch.float32"),
        (lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True), "this instance is refused.*Int8Params"),
        (dynamic, "torchao quantizes the input of this layer too, .* Load the model with Int8WeightOnlyConfig"),
    ],
)
def test_what_is_packed_in_another_way_is_refused_by_name(make, message):
    with pytest.raises(TargetError, match=message):
        with_lora(OneLayer(make()))
    assert "Linear[Int8Tensor]" in layer_type_names()


def test_a_layer_of_torchao_that_quantizes_its_input_passes_no_gradient_on():
    """If this fails, torchao does so by now, and such layers need not be refused."""
    x = torch.randn(2, 64, requires_grad=True)
    dynamic()(x).sum().backward()
    assert x.grad is None


@every_kind
def test_a_quantized_layer_is_not_trained_in_full(kind):
    model = minipeft.quantize(gpt2(), kind)
    with pytest.raises(TargetError, match=r"mlp holds a quantized \w+, which cannot be trained in full"):
        minipeft.get_lora_model(model, LoraConfig(modules_to_save=["h.0.mlp"]))


def float8():
    model = nn.Sequential(nn.Linear(64, 64))
    with foreign_code():
        torchao.quantize_(model, torchao.Float8WeightOnlyConfig())
    return model[0]


def cast_to_float8():
    """As transformers' layers of finegrained FP8 hold their weight."""
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), False)
    return layer


@pytest.mark.parametrize("make", [dynamic, float8, cast_to_float8])
def test_a_layer_that_is_quantized_in_an_unknown_way_is_not_trained_in_full_either(make):
    model = nn.ModuleDict({"adapted": nn.Linear(4, 4), "saved": nn.Sequential(make())})
    with pytest.raises(TargetError, match="saved holds a quantized Linear, which cannot be trained in full"):
        minipeft.get_lora_model(model, LoraConfig(target_modules=["adapted"], modules_to_save=["saved"]))


@every_kind
def test_the_biases_of_quantized_layers_train(kind):
    model = minipeft.get_lora_model(minipeft.quantize(gpt2(), kind).train(), LoraConfig(bias="all"))
    ids = torch.arange(12).view(1, -1)
    model(input_ids=ids, labels=ids).loss.backward()
    biases = [p for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    assert len(biases) > 8
    assert all(p.grad is not None and p.grad.any() for p in biases)
    expected = logits(disturb(model))
    merged = logits(model.merge_and_unload(dequantize=True))
    assert (merged - expected).abs().max() <= (0.05 if kind == "int8" else 1e-5) * expected.abs().max()


def test_a_lean_model_is_compared_as_exactly_as_its_layers_round(monkeypatch):
    """On a GPU int8 rounds its input, where a difference in the last bit becomes one of a step."""
    model = minipeft.quantize(llama(), "int8").train()
    assert _tolerance(model) == TOLERANCE[torch.float32]
    monkeypatch.setattr("minipeft.layers.bitsandbytes_8bit.Linear8bitLtOps.calls_linear", lambda *_: False)
    assert _tolerance(model) == HALF_TOLERANCE

"""What every method beside LoRA keeps to, on every layer type it serves; the oracle is algebra on the merged weight."""

import copy

import pytest
import torch
from method_cases import CASES, gradients, ours
from tiny_layers import LAYERS, OneLayer, example
from tiny_models import disturb, foreign_code, gpt2, logits, token_ids

import minipeft
from minipeft import get_adapter_model, get_lora_model
from minipeft.kernels import matmul

METHODS = {
    "ia3": lambda **o: minipeft.IA3Config(feedforward_modules=[], **o),
    "ia3 feedforward": lambda **o: minipeft.IA3Config(feedforward_modules=["layer"], **o),
    "adalora": lambda **o: minipeft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, **o),
    "loha": lambda **o: minipeft.LoHaConfig(r=2, alpha=3, **o),
    "lokr": lambda **o: minipeft.LoKrConfig(r=1, alpha=3, decompose_both=True, **o),
    "oft": lambda **o: minipeft.OFTConfig(oft_block_size=7, **o),
    "oft constrained": lambda **o: minipeft.OFTConfig(r=2, oft_block_size=0, coft=True, eps=0.3, **o),
    "vera": lambda **o: minipeft.VeraConfig(r=3, **o),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_method = pytest.mark.parametrize("method", METHODS)
every_layer = pytest.mark.parametrize("layer", ["linear", "linear_without_bias", "conv1d", "embedding_with_padding"])


def moved(method, layer="linear", dtype=torch.float64, scale=0.3, **options):
    """A model around one layer, whose adapter has moved away from its start."""
    base = LAYERS[layer]().to(dtype)
    torch.nn.init.normal_(base.weight)
    model = get_adapter_model(OneLayer(base), METHODS[method](target_modules=["layer"], **options))
    return base, disturb(model, scale=scale) if scale else model


@every_layer
@every_method
def test_the_merge_is_what_the_forward_pass_computes_in_float16(method, layer):
    base, model = moved(method, layer, torch.float16, scale=0.6)
    x, dense = example(base, torch.float16)
    expected = model(x).double()
    weight, bias = model.layer.folded(("default",))
    dense = dense.double() @ weight.double().T + (0 if bias is None else bias.double())
    scale = expected.abs().max()
    assert (expected - base(x).double()).abs().max() > 0.01 * scale
    assert (expected - dense).abs().max() <= 5e-3 * scale
    model.merge_adapter()
    assert (model(x).double() - dense).abs().max() <= 5e-3 * scale


@pytest.mark.each_value
@every_layer
@every_method
def test_the_start_is_exactly_the_base_in_every_dtype(method, layer):
    for dtype in DTYPES:
        base, model = moved(method, layer, dtype, scale=0)
        x, _ = example(base, dtype)
        assert torch.equal(model(x), base(x)), dtype
        assert model(x).dtype is dtype


@every_layer
@every_method
def test_the_gradients_are_those_of_the_merged_weight(method, layer):
    if layer == "embedding_with_padding":
        pytest.skip("torch's embedding gives the padding row no gradient, a one-hot product does")
    if "constrained" in method:
        pytest.skip("its gradient passes by the constraint, as PEFT's")
    base, model = moved(method, layer)
    adapter = model.layer.adapter("default")
    x, dense = example(base)
    weights = torch.randn(3, 4, 7, dtype=torch.float64)
    model.zero_grad()
    (model(x) * weights).sum().backward()
    found = [p.grad.clone() for p in adapter.parameters()]
    for parameter, gradient in zip(adapter.parameters(), found, strict=True):
        numeric = torch.zeros_like(parameter)
        for index in range(parameter.numel()):  # central differences of the merged map, which knows no forward pass
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.view(-1)[index] += step
                    weight, bias = model.layer.folded(("default",))
                    values.append(((dense @ weight.T + (0 if bias is None else bias)) * weights).sum())
                    parameter.view(-1)[index] -= step
            numeric.view(-1)[index] = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.each_value
@pytest.mark.parametrize("other", ["lora", *METHODS])
@every_method
def test_adapters_one_after_the_other_act_as_their_merges_do(method, other):
    base, model = moved(method)
    config = (
        minipeft.LoraConfig(target_modules=["layer"], r=2)
        if other == "lora"
        else METHODS[other](target_modules=["layer"])
    )
    model.add_adapter("other", config)
    x, dense = example(base)
    for names in (("default", "other"), ("other", "default")):
        model.set_adapter(names)
        disturb(model, seed=3, scale=0.3)
        weight, bias = model.layer.folded(names)
        torch.testing.assert_close(model(x), dense @ weight.T + bias)
        model.merge_adapter()
        torch.testing.assert_close(model(x), dense @ weight.T + bias)
        model.unmerge_adapter()


@pytest.mark.parametrize("case", [case for case in CASES if " " not in case])
def test_gradient_checkpointing_changes_no_gradient(case):
    model = disturb(ours(case)).train()
    gradients(model)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with foreign_code():
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    gradients(model)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", [case for case in CASES if " " not in case])
def test_autocast_trains_half_precision_bases_with_float32_parameters(case):
    model = disturb(ours(case, CASES[case][1]().bfloat16()))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        gradients(model)
    assert all(p.grad is not None and p.grad.dtype is torch.float32 and p.grad.isfinite().all() for p in trained)
    assert logits(model).dtype is torch.bfloat16


@pytest.mark.parametrize("layer", ["linear", "conv1d"])
@pytest.mark.parametrize("method", [*METHODS, "trainable_tokens"])
def test_under_autocast_the_output_has_the_dtype_of_the_bare_layers(method, layer, monkeypatch):
    """Also in training on a processor without kernels for it, where the product is made in another way."""
    monkeypatch.setattr(matmul, "has_kernels", lambda dtype: False)
    if method == "trainable_tokens":
        config = minipeft.TrainableTokensConfig(target_modules=["layer"], token_indices=[1, 4])
        model = disturb(get_adapter_model(OneLayer(LAYERS[layer]()), config))
    else:
        _, model = moved(method, layer, torch.float32)
    x = torch.randn(3, 5, requires_grad=True)
    for mode in (True, False):
        model.train(mode)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert model(x).dtype is LAYERS[layer]()(x).dtype is dtype


@pytest.mark.parametrize("case", [case for case in CASES if " " not in case])
def test_a_merge_for_good_gives_the_same_logits(case):
    model = disturb(ours(case))
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is type(CASES[case][1]())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_no_extra_loss_and_nothing_to_do_after_a_step_is_nothing():
    model = get_lora_model(gpt2(), minipeft.LoraConfig(r=2))
    loss = model(input_ids=token_ids(), labels=token_ids()).loss
    assert torch.equal(loss + minipeft.extra_loss(model), loss)
    before = copy.deepcopy(model.state_dict())
    minipeft.after_step(model, 0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(minipeft.StateError, match="has no adapter"):
        minipeft.after_step(gpt2(), 0)


def test_a_method_that_changes_the_input_is_refused_where_a_weight_is_read():
    model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(minipeft.TargetError, match="attn: its weight is read without calling the layer, and OFT"):
        minipeft.get_adapter_model(model, minipeft.OFTConfig(oft_block_size=2, target_modules=["attn"]))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

"""LoRA's other starts (PiSSA, OLoRA, orthogonal), a bias on B, a frozen A, and the way back to plain LoRA."""

import contextlib
import copy
import json
import pickle

import pytest
import torch
from fake_tf32 import autocast, tf32_allowed
from safetensors.torch import load_file
from tiny_layers import OneLayer, canonical_weight, example
from tiny_models import disturb, foreign_code, gpt2, llama, logits, token_ids
from torch import nn
from transformers.pytorch_utils import Conv1D

import minipeft
from minipeft import LoraConfig, get_lora_model
from minipeft.files.base_samples import base_samples
from minipeft.files.save import save_adapter
from minipeft.files.to_lora import as_lora
from minipeft.kernels import merged_weight
from minipeft.kernels.lora_linear import lora_linear
from minipeft.methods.lora_init import Start, pissa

with foreign_code():
    peft = pytest.importorskip("peft")

OF_WEIGHT = ["pissa", "pissa_niter_4", "olora"]


LAYERS = {
    "linear": lambda: nn.Linear(9, 12),
    "conv1d": lambda: Conv1D(12, 9),
    "square_conv1d": lambda: Conv1D(9, 9),
    "embedding": lambda: nn.Embedding(12, 9),
}


def one_layer(name, init, dtype=torch.float64, **options):
    layer = LAYERS[name]().to(dtype)
    given = {"r": 4, "lora_alpha": 12, **options}
    return layer, get_lora_model(OneLayer(layer), LoraConfig(target_modules=["layer"], init_lora_weights=init, **given))


def lora_of(model):
    return model.layer.adapters["default"]


def save_plain(model, directory):
    """What ``save_pretrained`` does when it is asked for plain LoRA."""
    tensors, config = as_lora(model, model.adapter_configs["default"], "default")
    save_adapter(directory, tensors, config, base_samples(model, "default"))


@pytest.mark.parametrize("lowered", [autocast, tf32_allowed])
@pytest.mark.parametrize("init", [*OF_WEIGHT, "orthogonal"])
def test_autocast_and_tf32_change_nothing_of_a_start(init, lowered):
    models = []
    for around in (contextlib.nullcontext, lowered):
        torch.manual_seed(0)
        with around():
            models.append(one_layer("linear", init, torch.float32)[1].state_dict())
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())


@pytest.mark.parametrize("init", [*OF_WEIGHT, "orthogonal"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_model_starts_as_its_base_whose_weight_stays(name, init):
    layer, model = one_layer(name, init)
    before, x, lora = layer.weight.detach().clone(), example(layer)[0], lora_of(model)
    torch.testing.assert_close(model(x), layer(x))
    assert lora.lora_A.norm() > 0.1
    assert lora.lora_B.norm() > 0.1
    disturb(model)
    assert (model(x) - layer(x)).abs().max() > 1e-3
    assert torch.equal(layer.weight, before)
    with model.disable_adapter():
        assert torch.equal(model(x), layer(x))
    assert torch.equal(model.unload().layer.weight, before)


@pytest.mark.parametrize("name", LAYERS)
def test_pissa_holds_the_principal_part_of_the_weight(name):
    layer, model = one_layer(name, "pissa")
    U, S, Vh = torch.linalg.svd(canonical_weight(layer))
    lora = lora_of(model)
    torch.testing.assert_close(lora.scaling * lora.lora_B @ lora.lora_A, U[:, :4] * S[:4] @ Vh[:4])
    for norm in (lora.lora_A.norm(dim=1), lora.lora_B.norm(dim=0)):
        torch.testing.assert_close(norm.square(), S[:4] / lora.scaling)


def test_pissa_by_iteration_comes_near_the_exact_one():
    U, _ = torch.linalg.qr(torch.randn(40, 40))
    weight = U * torch.tensor([9.0, 8, 7, 6] + [0.5] * 36) @ U.T
    starts = [Start(torch.empty(4, 40), torch.empty(40, 4), None, weight, 2.0, iterations) for iterations in (None, 4)]
    for start in starts:
        pissa(start)
    exact, iterated = (start.B @ start.A for start in starts)
    torch.testing.assert_close(iterated, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_olora_is_the_first_part_of_the_qr_decomposition(name):
    layer, model = one_layer(name, "olora")
    lora = lora_of(model)
    torch.testing.assert_close(lora.lora_B.T @ lora.lora_B, torch.eye(4, dtype=torch.float64))
    rest = canonical_weight(layer) - lora.lora_B @ lora.lora_A
    torch.testing.assert_close(rest[:, :4], torch.zeros_like(rest[:, :4]))  # R is triangular
    torch.testing.assert_close(lora.lora_B.T @ rest, torch.zeros(4, rest.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("factory", [gpt2, llama])
def test_starts_and_residuals_are_pefts(factory, init):
    """PEFT takes OLoRA's part off a Conv1D the wrong way round, so there is no residual to compare with."""
    targets = ["c_attn", "mlp.c_proj"] if factory is gpt2 else ["q_proj", "down_proj"]
    if factory is gpt2 and init == "olora":
        pytest.skip("PEFT's OLoRA is broken on Conv1D")
    options = {"r": 4, "lora_alpha": 12, "target_modules": targets, "init_lora_weights": init}
    ours = get_lora_model(factory(), LoraConfig(**options))
    with foreign_code():
        theirs = peft.get_peft_model(factory(), peft.LoraConfig(**options)).base_model.model
    for path, layer in minipeft.injection.module_tree.adapted_layers(ours):
        lora, other = layer.adapter("default"), theirs.get_submodule(path)
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        assert lora.scaling == other.scaling["default"]
        residual = layer.ops.read_weight(layer.base_layer)
        torch.testing.assert_close(lora.lora_B @ lora.lora_A, B @ A, rtol=1e-4, atol=1e-5)
        residual = residual - lora.scaling * lora.initial_B @ lora.initial_A
        torch.testing.assert_close(residual, layer.ops.read_weight(other.base_layer), rtol=1e-4, atol=1e-5)


def test_orthogonal_factors_draw_as_peft_does():
    torch.manual_seed(4)
    _, model = one_layer("linear", "orthogonal", dtype=torch.float32)
    layer = nn.Linear(9, 12)
    with foreign_code():
        other = peft.get_peft_model(
            OneLayer(layer), peft.LoraConfig(r=4, target_modules=["layer"])
        ).base_model.model.layer
    torch.manual_seed(4)
    LAYERS["linear"]()  # what the first model drew before
    other.orthogonal_init("default")
    torch.testing.assert_close(lora_of(model).lora_A, other.lora_A["default"].weight)
    torch.testing.assert_close(lora_of(model).lora_B, other.lora_B["default"].weight)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["linear", "square_conv1d", "embedding"])
def test_merging_changes_nothing_and_unmerging_brings_back_every_bit(name, init, use_dora):
    layer, model = one_layer(name, init, use_dora=use_dora)
    disturb(model)
    before, x = layer.weight.detach().clone(), example(layer)[0]
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_gradients_with_a_start_of_the_weight_are_those_of_the_residual():
    layer, model = one_layer("linear", "pissa")
    lora, x = disturb(model).layer.adapters["default"], example(layer)[0].requires_grad_()
    residual = layer.weight - lora.scaling * lora.initial_B @ lora.initial_A
    expected = nn.functional.linear(x, residual, layer.bias) + lora.scaling * (x @ lora.lora_A.T) @ lora.lora_B.T
    trained = [x, lora.lora_A, lora.lora_B]
    torch.testing.assert_close(model(x), expected)
    for found, wanted in zip(
        torch.autograd.grad(model(x).square().sum(), trained),
        torch.autograd.grad(expected.square().sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_copies_pickles_and_a_plain_state_dict_carry_the_start():
    layer, model = one_layer("linear", "pissa")
    x = example(layer)[0]
    expected = disturb(model)(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    _, fresh = one_layer("linear", True)
    with pytest.raises(RuntimeError, match="initial_A"):
        fresh.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    _, fresh = one_layer("linear", "pissa")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)


@pytest.mark.slow  # only its start differs from that of LoRA, which test_contract.py compiles
def test_compiles_into_one_graph():
    layer, model = one_layer("linear", "olora", dtype=torch.float32)
    x = example(layer, torch.float32)[0]
    torch._dynamo.reset()
    compiled = torch.compile(disturb(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_half_precision_starts_as_its_base_within_its_rounding():
    layer, model = one_layer("linear", "pissa", dtype=torch.bfloat16)
    x = example(layer, torch.bfloat16)[0]
    assert (model(x) - layer(x)).abs().max() <= 2**-7 * layer(x).abs().max()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_lora_weights": "pissa", "r": 10}, "exceeds the rank of a weight of shape"),
        ({"init_lora_weights": "olora", "r": 10}, "exceeds the rank of a weight of shape"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r = 3 is odd"),
        ({"init_lora_weights": "eva"}, "'eva' starts from the inputs"),
        ({"init_lora_weights": "corda"}, "'corda' starts from the inputs"),
        ({"init_lora_weights": "loftq"}, "'loftq' starts from the quantization error"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga' starts from the gradients"),
        ({"init_lora_weights": "pissa_niter_0"}, "must be one of"),
        ({"init_lora_weights": "pissa_niter_x"}, "must be one of"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias goes with"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias goes with"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(options, said):
    model = OneLayer(nn.Linear(9, 12))
    with pytest.raises(minipeft.ConfigError, match=said):
        get_lora_model(model, LoraConfig(target_modules=["layer"], **options))
    assert type(model) is OneLayer
    assert type(model.layer) is nn.Linear


def started(init, factory=gpt2, **options):
    targets = ["c_attn", "wte"] if factory is gpt2 else ["q_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=init, **options)
    return disturb(get_lora_model(factory(), config))


@pytest.mark.each_value
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
@pytest.mark.parametrize("init", [*OF_WEIGHT, "orthogonal"])
def test_saving_and_loading_restores_every_bit_and_what_trains(init, options, tmp_path):
    model = started(init, **options)
    model.save_pretrained(tmp_path)
    again = minipeft.load_adapter(gpt2(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert trained[0] == trained[1]
    again.save_pretrained(tmp_path / "again")  # and once more
    assert torch.equal(logits(minipeft.load_adapter(gpt2(), tmp_path / "again")), logits(model))


@pytest.mark.parametrize("init", OF_WEIGHT)
def test_peft_refuses_a_file_it_would_read_wrongly(init, tmp_path):
    started(init, llama).save_pretrained(tmp_path)
    with foreign_code(), pytest.raises(ValueError, match=r"init_lora_weights|Unknown initialization|invalid literal"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("init", OF_WEIGHT)
def test_a_file_of_peft_without_its_start_is_refused_with_the_way_out(init, tmp_path):
    with foreign_code():
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
        peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(minipeft.ConfigError, match="path_initial_model_for_weight_conversion"):
        minipeft.load_adapter(llama(), tmp_path)


@pytest.mark.each_value
@pytest.mark.parametrize("factory", [gpt2, llama])
@pytest.mark.parametrize("init", OF_WEIGHT)
def test_as_plain_lora_it_says_the_same_to_peft_and_to_us(init, factory, tmp_path):
    model = started(init, factory)
    save_plain(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (8, 8, factory is gpt2)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "initial" in key]
    expected = logits(model)
    assert (logits(minipeft.load_adapter(factory(), tmp_path)) - expected).abs().max() < 1e-5
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(factory(), tmp_path)
        assert (logits(theirs) - expected).abs().max() < 1e-5


def test_what_peft_converts_we_read(tmp_path):
    with foreign_code():
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
        model = peft.get_peft_model(llama(), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
        disturb(model)
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        expected = logits(model.eval())
    assert (logits(minipeft.load_adapter(llama(), tmp_path / "plain")) - expected).abs().max() < 1e-5


def test_plain_lora_of_one_rank_comes_of_patterns_and_rank_stabilised_scaling(tmp_path):
    options = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    config = LoraConfig(r=5, use_rslora=True, init_lora_weights=False, modules_to_save=["lm_head"], **options)
    model = disturb(get_lora_model(llama(), config))
    save_plain(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {5}
    assert (logits(minipeft.load_adapter(llama(), tmp_path)) - logits(model)).abs().max() < 1e-5
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
        assert (logits(theirs) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_what_is_no_plain_lora_is_not_written_as_such(options):
    model = get_lora_model(gpt2(), LoraConfig(target_modules=["c_attn"], **options))
    with pytest.raises(minipeft.CheckpointError, match=r"transformer.h.0.attn.c_attn: .* not plain LoRA"):
        as_lora(model, model.adapter_configs["default"], "default")


def test_a_bias_on_b_is_pefts_in_files_and_gradients(tmp_path):
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["c_attn"], "lora_bias": True}
    with foreign_code():
        theirs = disturb(peft.get_peft_model(gpt2(), peft.LoraConfig(**options))).eval()
        theirs.save_pretrained(tmp_path / "theirs")
        ids = token_ids()
        theirs(input_ids=ids, labels=ids).loss.backward()
        expected = logits(theirs)
    ours = minipeft.load_adapter(gpt2(), tmp_path / "theirs", is_trainable=True)
    assert (logits(ours) - expected).abs().max() < 1e-5
    ours(input_ids=ids, labels=ids).loss.backward()
    layer = theirs.base_model.model.transformer.h[0].attn.c_attn
    found = ours.transformer.h[0].attn.c_attn.adapters["default"].lora_B_bias.grad
    torch.testing.assert_close(found, layer.lora_B["default"].bias.grad, rtol=1e-4, atol=1e-7)
    ours.save_pretrained(tmp_path / "ours")
    assert "base_model.model.transformer.h.0.attn.c_attn.lora_B.bias" in load_file(
        tmp_path / "ours" / "adapter_model.safetensors"
    )
    with foreign_code():
        back = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours")
        assert torch.equal(logits(back), expected)
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    ours.merge_adapter()
    assert (logits(ours) - expected).abs().max() < 1e-5
    ours.unmerge_adapter()
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())


def test_a_bias_on_b_starts_at_zero_and_as_peft_draws_it_for_tests():
    _, model = one_layer("linear", True, lora_bias=True)
    assert not lora_of(model).lora_B_bias.any()
    _, model = one_layer("linear", False, lora_bias=True, r=9)
    assert 0 < lora_of(model).lora_B_bias.abs().max() <= 1 / 3


def test_a_bias_on_b_is_not_merged_into_a_layer_without_one():
    model = get_lora_model(llama(), LoraConfig(target_modules=["q_proj"], lora_bias=True, init_lora_weights=False))
    expected = logits(model)
    with pytest.raises(minipeft.MergeError, match="a layer without one cannot hold it"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected)


def test_a_bias_on_b_is_refused_on_an_embedding():
    with pytest.raises(minipeft.ConfigError, match="lora_bias is not for Embedding"):
        get_lora_model(gpt2(), LoraConfig(target_modules=["wte"], lora_bias=True))


def kept_bytes(model, x):
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(storage.nbytes() for storage in saved.values()), saved


@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_with_a_frozen_nothing_of_x_is_kept(dropout, pays, monkeypatch):
    monkeypatch.setattr(merged_weight, "pays", lambda rows, weight: pays)
    for freeze, bound in ((False, 1.1), (True, 0.1)):
        config = LoraConfig(r=4, target_modules=["layer"], freeze_lora_A=freeze, lora_dropout=dropout)
        model = get_lora_model(OneLayer(nn.Linear(256, 256)), config).train()
        x = torch.randn(128, 256, requires_grad=True)
        total, saved = kept_bytes(model, x)
        assert (x.untyped_storage().data_ptr() in saved) == (not freeze)
        assert bound - 0.1 <= total / x.nbytes <= bound


@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_with_a_frozen_are_those_with_a_trained(p, pays, monkeypatch):
    monkeypatch.setattr(merged_weight, "pays", lambda rows, weight: pays)
    x, B = torch.randn(3, 4, 5).double().requires_grad_(), torch.randn(7, 2).double().requires_grad_()
    A, W, b = torch.randn(2, 5).double(), torch.randn(7, 5).double(), torch.randn(7).double()
    found = []
    for trained in (False, True):
        torch.manual_seed(0)
        y = lora_linear(x, W, b, A.requires_grad_(trained), B, 0.7, p)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, B))])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_a_gradient_of_a_gradient_needs_x_only_where_b_trains():
    x, B = torch.randn(3, 5).double().requires_grad_(), torch.randn(7, 2).double()
    A, W = torch.randn(2, 5).double(), torch.randn(7, 5).double()
    assert torch.autograd.gradgradcheck(lambda x: lora_linear(x, W, None, A, B, 0.7).square(), (x,))
    y = lora_linear(x, W, None, A, B.requires_grad_(), 0.7)
    with pytest.raises(minipeft.StateError, match="lora_A frozen"):
        torch.autograd.grad(y.sum(), (x, B), create_graph=True)


def test_training_moves_b_alone_and_the_file_is_plain_lora(tmp_path):
    model = get_lora_model(gpt2(), LoraConfig(target_modules=["c_attn"], freeze_lora_A=True))
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_B"}
    model.add_adapter("other", LoraConfig(target_modules=["c_attn"]))
    model.set_adapter("other")
    model.set_adapter("default")
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == trained
    model.add_adapter("third", LoraConfig(target_modules=["c_attn"], freeze_lora_A=True))
    model.set_adapter("third")
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == trained
    model.set_adapter("default")
    disturb(model).save_pretrained(tmp_path, "default")
    assert "freeze_lora_A" not in json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path)
        assert (logits(theirs) - logits(model)).abs().max() < 1e-5


def test_an_embeddings_a_is_not_frozen():
    with pytest.raises(minipeft.ConfigError, match="starts at zero"):
        get_lora_model(gpt2(), LoraConfig(target_modules=["wte"], freeze_lora_A=True))

"""On a GPU, every method on every layer keeps its contract, and models move there, back, and over several devices."""

import copy
import functools

import accelerate
import pytest
import torch
from gpu_device import DEVICE, TOLERANCE, by_dtype, close, devices, exact, learned, needs_cuda, off, on_device
from safetensors.torch import load_file
from test_offloaded import CONFIGS
from tiny_models import adapted, disturb, foreign_code, gpt2, llama, token_ids
from torch import nn

import minipeft
from minipeft import LoraConfig, get_adapter_model, get_lora_model, load_adapter
from minipeft.registry import registry
from minipeft.testing import check_pair
from minipeft.testing.behaviour import weighted_sum
from minipeft.testing.case import case_of
from minipeft.testing.checks import CHECKS
from minipeft.testing.examples import example_of

pytestmark = on_device
LINEAR = registry.qualified(nn.Linear)
IDS = token_ids()
MOVED = {
    **CONFIGS,
    "loha": minipeft.LoHaConfig(r=2, target_modules=["c_attn"]),
    "lokr": minipeft.LoKrConfig(r=2, target_modules=["c_attn"]),
}


def made_there(layer, *sizes):
    with DEVICE:
        return example_of(registry.layer_key(layer)).make(*sizes).to(DEVICE)


@pytest.mark.parametrize("layer", registry.layers(), ids=lambda name: name.rpartition(".")[2])
@pytest.mark.parametrize("method", registry.method_names())
def test_every_method_keeps_the_contract_on_every_layer(method, layer, monkeypatch):
    """But for one graph, which says nothing of a device."""
    monkeypatch.setattr("minipeft.testing.report.CHECKS", [c for c in CHECKS if c.__name__ != "one_graph"])
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # so that one call equals another bit for bit
    report = check_pair(method, layer, functools.partial(made_there, layer))
    assert report.refused or report.passed, report


def layer_of(method, dtype, layer=LINEAR, sizes=(64, 48)):
    """A model with one adapted layer, and an input, both on the device."""
    case = case_of(method, layer, None, functools.partial(made_there, layer), {})
    model = case.adapted(dtype, sizes)
    return model, case.input(case.base(dtype, sizes))


@pytest.mark.parametrize("layer", ["torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"])
@pytest.mark.parametrize("method", registry.method_names())
@by_dtype
def test_outputs_and_gradients_are_near_those_in_float64(method, layer, dtype):
    with foreign_code():
        report = minipeft.testing.report.refusal(method, layer)
    if report is not None:
        pytest.skip(report)
    model, x = layer_of(method, dtype, layer)
    twin = exact(model)

    def outcome(some, x):
        x = x.detach().requires_grad_()
        y = some(x)
        weighted_sum(y).backward()
        gradients = {name: p.grad for name, p in some.named_parameters() if p.grad is not None}
        return {"y": y, "x": x.grad} | gradients

    found, wanted = outcome(model, x), outcome(twin, x.cpu().double())
    assert found["y"].dtype is dtype
    assert found["y"].device.type == DEVICE.type
    close(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("method", MOVED)
def test_a_model_that_moves_after_it_was_adapted_computes_the_same(method, tmp_path):
    torch.manual_seed(0)
    model = disturb(get_adapter_model(gpt2(), MOVED[method])).eval()
    inputs = {"input_ids": IDS, "labels": IDS}
    there = {name: value.to(DEVICE) for name, value in inputs.items()}
    expected, values = learned(model, **inputs), copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path / "here")
    assert model.to(DEVICE) is model
    assert devices(model) == {DEVICE.type}
    found = learned(model, **there)
    close(found, expected, 1e-4)
    assert all(p.grad.device == p.device for p in model.parameters() if p.grad is not None)
    model.save_pretrained(tmp_path / "there")
    names = [tmp_path / place / "adapter_model.safetensors" for place in ("here", "there")]
    assert names[0].read_bytes() == names[1].read_bytes()
    loaded = load_adapter(gpt2().to(DEVICE), tmp_path / "here", is_trainable=True)
    assert devices(loaded) == {DEVICE.type}
    close(learned(loaded, **there), found, 1e-5)
    model.to("cpu")
    assert devices(model) == {"cpu"}
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in values.items())
    close(learned(model, **inputs), expected, 1e-6)


@by_dtype
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3", "oft", "adalora", "loha", "lokr", "embedding"])
def test_merging_changes_nothing_and_unmerging_gives_every_bit_back(method, dtype):
    torch.manual_seed(0)
    model = disturb(get_adapter_model(gpt2().to(DEVICE, dtype), MOVED[method]), scale=0.05).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = IDS.to(DEVICE)
    with torch.no_grad():
        expected, plain = model(ids).logits, exact(model)(IDS).logits
        model.merge_adapter(untie=True)
        merged = model(ids).logits
        model.unmerge_adapter()
        assert torch.equal(model(ids).logits, expected)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        own = off(expected, plain)
        assert off(merged, plain) <= 3 * own + TOLERANCE[dtype], (off(merged, plain), own)
        unloaded = model.merge_and_unload(untie=True)
        assert devices(unloaded) == {DEVICE.type}
        close(unloaded(ids).logits, merged, TOLERANCE[dtype] / 5)


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3", "oft", "adalora", "loha", "lokr"])
@pytest.mark.parametrize("first", ["there", "here"])
def test_what_was_merged_on_one_device_is_unmerged_on_another(method, first):
    torch.manual_seed(0)
    model = disturb(get_adapter_model(gpt2().to(torch.bfloat16), MOVED[method]), scale=0.05).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = (DEVICE, "cpu") if first == "there" else ("cpu", DEVICE)
    model.to(places[0]).merge_adapter(untie=True)
    model.to(places[1]).unmerge_adapter()
    after = model.state_dict()
    assert devices(model) == {torch.device(places[1]).type}
    assert all(torch.equal(after[name].cpu(), value) for name, value in before.items())


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_adapters_start_on_the_device_and_change_nothing(init):
    base = llama().to(DEVICE)
    ids = IDS.to(DEVICE)
    with torch.no_grad():
        expected = base(ids).logits
        model = get_lora_model(base, LoraConfig(r=4, init_lora_weights=init, target_modules="all-linear"))
        assert devices(model) == {DEVICE.type}
        close(model(ids).logits, expected, 1e-4)
    assert all(p.isfinite().all() and p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_A" in n)


@pytest.mark.parametrize("place", ["cpu", str(DEVICE)])
def test_a_default_device_decides_nothing(place, tmp_path):
    """With `torch.set_default_device`, what is made belongs where the model is. Without a GPU that device is meta."""
    expected = adapted(llama(), target_modules="all-linear", lora_dropout=0.1).train()
    model = copy.deepcopy(expected).to(place)
    base = llama().to(place)
    expected.save_pretrained(tmp_path)
    inputs = {"input_ids": IDS.to(place), "labels": IDS.to(place)}
    wanted = learned(expected.eval(), input_ids=IDS, labels=IDS)
    with DEVICE if DEVICE.type == "cuda" else torch.device("meta"):
        learned(model, **inputs)
        close(learned(model.eval(), **inputs), wanted, 1e-4)
        minipeft.lean(model)
        minipeft.unlean(model)
        loaded = load_adapter(base, tmp_path, is_trainable=True)
        close(learned(loaded, **inputs), wanted, 1e-4)
        loaded.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
        rows = loaded(input_ids=IDS.to(place), adapter_names=["default", "other"])
        assert devices(loaded) == {torch.device(place).type}
        assert rows.logits.device.type == torch.device(place).type
        loaded.merge_adapter()
        loaded.unmerge_adapter()
        loaded.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="cat")
        loaded.save_pretrained(tmp_path / "again")
        close(learned(loaded, **inputs), wanted, 1e-4)
        assert minipeft.diagnose(loaded, inputs) is not None


def scattered(model, folder):
    """The first block and the ends on the device, the second block on the CPU, from where it is fetched."""
    where = {"transformer.wte": 0, "transformer.wpe": 0, "transformer.h.0": 0, "transformer.h.1": "cpu"}
    with foreign_code():
        return accelerate.dispatch_model(
            model, {**where, "transformer.ln_f": 0, "lm_head": 0}, main_device=0, offload_dir=str(folder)
        )


def from_cpu(model, folder):
    with foreign_code():
        return accelerate.cpu_offload(model, execution_device=DEVICE)


def from_disk(model, folder):
    with foreign_code():
        accelerate.disk_offload(model, str(folder), execution_device=DEVICE)
    return model


WAYS = {"cpu": from_cpu, "disk": from_disk, "scattered": scattered}


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "oft"])
@pytest.mark.parametrize("way", ["cpu", "disk", pytest.param("scattered", marks=needs_cuda)])
def test_a_base_that_is_fetched_to_the_device_trains_the_same(way, method, tmp_path):
    split = WAYS[way]
    torch.manual_seed(0)
    whole = disturb(get_adapter_model(gpt2(), CONFIGS[method])).eval()
    whole.save_pretrained(tmp_path / "adapter")
    expected = learned(whole, input_ids=IDS, labels=IDS)
    model = load_adapter(split(gpt2(), tmp_path / "base"), tmp_path / "adapter", is_trainable=True).eval()
    with foreign_code():
        found = learned(model, input_ids=IDS.to(DEVICE), labels=IDS.to(DEVICE))
    close(found, expected, 1e-4)
    model.save_pretrained(tmp_path / "again")
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("kind", ["linear", "svd", "cat", "ties", "ties_svd", "magnitude_prune"])
def test_adapters_are_combined_there_as_on_a_cpu(kind):
    model = adapted(llama(), target_modules="all-linear")
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    model.set_adapter("other")
    disturb(model, seed=3)
    model.set_adapter("default")
    there = copy.deepcopy(model).to(DEVICE)
    more = {"density": 0.6} if "ties" in kind or "prune" in kind else {}
    for some, drivers in ((model, [None]), (there, ["gesvd", "gesvdj", None] if DEVICE.type == "cuda" else [None])):
        for driver in drivers if "svd" in kind else [None]:
            name = f"both_{driver}"
            given = {} if driver is None else {"svd_driver": driver}
            some.add_weighted_adapter(["default", "other"], [0.7, 0.4], name, combination_type=kind, **more, **given)
    with torch.no_grad():
        model.set_adapter("both_None")
        expected = model(IDS).logits
        for name in [name for name in there.adapter_configs if name.startswith("both")]:
            there.set_adapter(name)
            close(there(IDS.to(DEVICE)).logits, expected, 1e-3)
    assert devices(there) == {DEVICE.type}

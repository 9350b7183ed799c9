"""LoRA's variants where they meet other parts: convolutions, quantized bases, and files of plain LoRA."""

import copy
import json

import pytest
import torch
from tiny_models import foreign_code, gpt2, token_ids
from torch import nn

import minipeft
from minipeft import LoraConfig, get_lora_model, load_adapter

CONVS = {
    "1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "2d": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "2d, groups": lambda: nn.Conv2d(4, 6, (1, 3), groups=2, padding_mode="circular", padding=(0, 1)),
    "3d": lambda: nn.Conv3d(4, 6, (1, 1, 3), bias=False),
}


def input_for(layer, dtype=torch.float64):
    return torch.randn(2, 4, *[5] * (layer.weight.ndim - 2), dtype=dtype)


def with_dora(layer, **options):
    model = nn.ModuleDict({"conv": layer})
    options = {"r": 4, "use_dora": True, "target_modules": ["conv"], "init_lora_weights": False, **options}
    model = get_lora_model(model, LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize("kind", CONVS)
def test_a_convolution_is_dora_by_its_formula_merges_and_comes_back(kind, tmp_path):
    layer = CONVS[kind]().double()
    plain, x = copy.deepcopy(layer), input_for(layer)
    model = with_dora(layer)
    lora = model["conv"].adapters["default"]
    scaling = lora.scaling
    weight = plain.weight.detach().flatten(1)
    moved = weight + scaling * lora.lora_B.detach().flatten(1) @ lora.lora_A.detach().flatten(1)
    expected = copy.deepcopy(plain)
    norms = moved.norm(dim=1, keepdim=True)
    expected.weight.data = (lora.lora_magnitude_vector.detach().reshape(-1, 1) * moved / norms).view_as(plain.weight)
    torch.testing.assert_close(model["conv"](x), expected(x))
    assert lora.lora_magnitude_vector.shape == (1, 6, *[1] * (x.ndim - 2))
    model.save_pretrained(tmp_path)
    again = load_adapter(nn.ModuleDict({"conv": copy.deepcopy(plain)}), tmp_path)
    torch.testing.assert_close(again["conv"](x), expected(x))
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged["conv"](x), expected(x))


def test_files_of_a_convolution_are_those_of_peft(tmp_path):
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.conv = nn.Conv2d(4, 6, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    x = torch.randn(2, 4, 5, 5)
    model = with_dora(Net().conv)
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    torch.testing.assert_close(theirs(x), model["conv"](x), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(Net(), tmp_path / "theirs")
    torch.testing.assert_close(ours(x), model["conv"](x), atol=1e-5, rtol=1e-5)


def test_a_quantized_base_is_dora_of_its_dequantized_weight():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
    packed = minipeft.quantize(model, "nf4")
    floats = minipeft.dequantize(copy.deepcopy(packed))
    config = LoraConfig(r=4, use_dora=True, target_modules=["0"], init_lora_weights=False)
    x = torch.randn(5, 64)
    torch.manual_seed(1)
    expected = get_lora_model(floats, config)
    torch.manual_seed(1)
    found = get_lora_model(packed, config)
    torch.testing.assert_close(found(x), expected(x), atol=1e-5, rtol=1e-5)
    found(x).sum().backward()
    expected(x).sum().backward()
    for one, other in zip(found.parameters(), expected.parameters(), strict=False):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_pissa_on_a_convolution_starts_as_the_base():
    layer = nn.Conv2d(4, 6, 3).double()
    x = input_for(layer)
    expected = layer(x)
    model = get_lora_model(
        nn.ModuleDict({"conv": layer}), LoraConfig(r=3, target_modules=["conv"], init_lora_weights="pissa")
    )
    torch.testing.assert_close(model["conv"](x), expected)
    assert model["conv"].adapters["default"].lora_B.abs().sum() > 0


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_model_that_started_from_its_weights_is_saved_as_plain_lora_that_peft_reads(start, tmp_path):
    peft = pytest.importorskip("peft")
    base, ids = gpt2(), token_ids(2, 6)
    expected_base = copy.deepcopy(base)
    model = get_lora_model(base, LoraConfig(r=3, target_modules=["c_attn", "c_fc"], init_lora_weights=start)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(tmp_path, convert_to_lora=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config.get("init_lora_weights", True)) == (6, True)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(expected_base), tmp_path).eval()
    ours = load_adapter(copy.deepcopy(expected_base), tmp_path).eval()
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(ids).logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(minipeft.ConfigError, match="not both"):
        model.save_pretrained(tmp_path / "no", convert_to_lora=True, state_dict=model.state_dict())
    assert not (tmp_path / "no").exists()


def test_a_report_on_dequantizing_knows_of_adapters_that_change_the_input():
    pytest.importorskip("bitsandbytes")
    model = minipeft.quantize(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8)), "nf4")
    model = minipeft.get_adapter_model(model, minipeft.OFTConfig(oft_block_size=8, target_modules=["0"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    report = model.merge_adapter(dequantize=True)
    assert 0 <= max(report.output_error.values()) < 1e-4

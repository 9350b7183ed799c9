"""Models in vLLM's compressed-tensors format: refused while they are compressed, adapted as any other once dequantized."""

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from tiny_models import foreign_code, llama, logits
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from minipeft import LoraConfig, TargetError, get_lora_model, load_adapter

SCHEMES = {
    "4 bits": ({"num_bits": 4, "strategy": "channel"}, None, 7, 1e-5),
    "float8": (
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        448,
        0.1,  # the inputs of layers are not rounded once it is dequantized
    ),
}


@pytest.fixture(scope="module", params=SCHEMES)
def compressed(request, tmp_path_factory):
    """A directory with a Llama with quantized linear layers, its outputs, and how close to them it must be in float."""
    weights, activations, largest, tolerance = SCHEMES[request.param]
    model, directory = llama(), tmp_path_factory.mktemp("compressed")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], quantization_status="frozen")
    with foreign_code():
        apply_quantization_config(model, config)
        for layer in model.modules():
            if hasattr(layer, "weight_scale"):
                layer.weight_scale.data = layer.weight.detach().abs().amax(1, keepdim=True) / largest
        expected = logits(model)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(directory)
        compressor.update_config(directory)
    return directory, expected, tolerance


def loaded(directory, **options):
    with foreign_code():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


@pytest.mark.each_value
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"], "all-linear"])
def test_a_compressed_model_is_refused_before_and_after_its_first_call(compressed, called, targets):
    model = loaded(compressed[0])
    if called:
        with foreign_code():
            before = logits(model)
    with pytest.raises(TargetError, match=r"compressed-tensors .*CompressedTensorsConfig\(dequantize=True\)"):
        get_lora_model(model, LoraConfig(r=2, target_modules=targets))
    assert type(model) is type(llama())
    if called:
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_a_dequantized_model_is_adapted_loaded_and_merged_as_any_other(compressed, tmp_path):
    directory, expected, tolerance = compressed
    dequantized = CompressedTensorsConfig(dequantize=True)
    model = loaded(directory, quantization_config=dequantized)
    assert (logits(model) - expected).abs().max() < tolerance * expected.abs().max()
    get_lora_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    y = logits(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="compressed-tensors"):
        load_adapter(loaded(directory), tmp_path)
    again = load_adapter(loaded(directory, quantization_config=dequantized), tmp_path)
    torch.testing.assert_close(logits(again), y)
    torch.testing.assert_close(logits(again.merge_and_unload()), y, rtol=1e-4, atol=1e-5)

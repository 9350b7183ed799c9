"""``target_modules="all-linear-text"``: of a model that also sees or hears, the part that reads text, as its files say."""

import json

import peft
import pytest
import torch
from tiny_models import disturb, foreign_code, gpt2, llama, t5
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from minipeft import LoraConfig, TargetError, get_lora_model, load_adapter
from minipeft.injection.module_tree import adapted_layers

TEXT = LoraConfig(r=2, target_modules="all-linear-text")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.randint(10, 90, (2, 6), generator=torch.Generator().manual_seed(0))


def llava():
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **SIZES)
    text = LlamaConfig(vocab_size=100, **SIZES)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=99))


def qwen():
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = {"vocab_size": 100, "num_key_value_heads": 2, "rope_parameters": rope, **SIZES}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=99, video_token_id=98)
    return Qwen2_5_VLForConditionalGeneration(config)


def gemma():
    text = {"vocab_size": 100, "num_key_value_heads": 2, "head_dim": 8, **SIZES}
    vision = {"image_size": 8, "patch_size": 4, **SIZES}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=99)
    return Gemma3ForConditionalGeneration(config)


def made(make):
    torch.manual_seed(0)
    return make().eval()


def names(model):
    return [name for name, _ in adapted_layers(model)]


@pytest.mark.parametrize("make", [llava, qwen, gemma])
def test_the_language_model_alone_is_adapted_and_peft_adapts_the_same(make, tmp_path):
    model = disturb(get_lora_model(made(make), TEXT)).eval()
    with foreign_code():  # which says what it leaves out of Gemma's tower
        every = names(get_lora_model(made(make), LoraConfig(r=2, target_modules="all-linear")))
    assert names(model) == [name for name in every if ".language_model." in name]
    assert 7 == len(names(model)) < len(every)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] != "all-linear-text"
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(made(make), tmp_path)
        expected = theirs(input_ids=IDS).logits
    adapted = sorted(name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    assert [name.removeprefix("base_model.model.") for name in adapted] == sorted(names(model))
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(load_adapter(made(make), tmp_path).eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("make", [gpt2, llama, t5])
def test_of_a_model_of_text_alone_it_is_all_of_it(make):
    assert names(get_lora_model(make(), TEXT)) == names(get_lora_model(make(), LoraConfig(target_modules="all-linear")))


def test_a_model_that_reads_no_text_is_refused():
    with pytest.raises(TargetError, match="all-linear-text.*ViTForImageClassification"):
        get_lora_model(ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES)), TEXT)

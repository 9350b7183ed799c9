"""diffusers reads our adapters and we read its, alpha kept; run where diffusers is installed."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import foreign_code

import minipeft
from minipeft.files.formats.convert import convert
from minipeft.files.readers.made_for import made_for
from minipeft.files.readers.names import Reader

with foreign_code():
    diffusers = pytest.importorskip("diffusers")
    import peft
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict
    from transformers import CLIPTextConfig, CLIPTextModel

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = {"r": 2, "lora_alpha": 6, "alpha_pattern": {"conv1": 1}, "target_modules": ["to_q", "to_out.0", "conv1"]}


def pipeline():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=2,
        attention_head_dim=2,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=100, bos_token_id=0, eos_token_id=1, **sizes))
    parts = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    scheduler = diffusers.DDIMScheduler()
    return diffusers.StableDiffusionPipeline(
        unet=unet, text_encoder=text, scheduler=scheduler, requires_safety_checker=False, **parts
    )


def output(unet):
    torch.manual_seed(1)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)).sample


def adapted(pipe):
    return minipeft.get_lora_model(pipe.unet, minipeft.LoraConfig(init_lora_weights=False, **CONFIG))


def test_a_pipeline_reads_what_convert_makes_for_it(tmp_path):
    pipe, plain = pipeline(), pipeline()
    model = adapted(pipe)
    model.save_pretrained(tmp_path / "a")
    made_for(Reader.DIFFUSERS, tmp_path / "a", tmp_path / "b")
    plain.load_lora_weights(tmp_path / "b")
    torch.testing.assert_close(output(plain.unet), output(model), rtol=0, atol=1e-5)


def test_what_a_pipeline_saves_is_loaded_and_converted_alpha_kept(tmp_path):
    pipe = pipeline()
    with foreign_code():
        from peft import LoraConfig

        pipe.unet.add_adapter(LoraConfig(init_lora_weights=False, **CONFIG))
    layers, config = get_peft_model_state_dict(pipe.unet), pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path / "a", unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    convert(tmp_path / "a", tmp_path / "b")
    pipe.unet.save_lora_adapter(tmp_path / "c")  # names no part of a pipeline
    for folder in ("a", "b", "c"):
        model = minipeft.load_adapter(pipeline().unet, tmp_path / folder)
        torch.testing.assert_close(output(model), output(pipe.unet), rtol=0, atol=1e-5)


def test_a_pipeline_with_an_adapted_part_saves_and_loads_again(tmp_path):
    pipe = pipeline()
    model = adapted(pipe)
    pipe.save_pretrained(tmp_path)
    assert isinstance(model, minipeft.AdaptedModel)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, vae=None, tokenizer=None)
    assert torch.equal(output(again.unet), output(pipeline().unet))
    loaded = minipeft.load_adapter(again.unet, tmp_path / "unet")
    assert torch.equal(output(loaded), output(model))


def test_a_pipeline_with_an_adapted_text_encoder_is_refused(tmp_path):
    pipe = pipeline()
    minipeft.get_lora_model(pipe.text_encoder, minipeft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(minipeft.StateError, match=r"unload\(\)"):
        pipe.save_pretrained(tmp_path)


def test_kohyas_names_of_a_real_unet_and_text_encoder_find_their_modules(tmp_path):
    """sd-scripts networks/lora.py: the names of Linear and Conv2d in the blocks, with underscores for dots."""
    pipe, tensors = pipeline(), {}
    for part, prefix in ((pipe.unet, "lora_unet_"), (pipe.text_encoder, "lora_te_text_model_")):
        for name, module in part.named_modules():
            if type(module) in (torch.nn.Linear, torch.nn.Conv2d) and ("blocks" in name or "layers" in name):
                shape, first = module.weight.shape, prefix + name.replace(".", "_")
                tensors[f"{first}.lora_down.weight"] = torch.randn(2, *shape[1:]) / 9
                tensors[f"{first}.lora_up.weight"] = torch.randn(shape[0], 2, *(1,) * (len(shape) - 2)) / 9
                tensors[f"{first}.alpha"] = torch.tensor(1.0)
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "x.safetensors")
    pipe.save_pretrained(tmp_path / "base")
    written = convert(tmp_path / "in", tmp_path / "out", tmp_path / "base")
    assert [path.name for path in written] == ["text_encoder", "unet"]
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    start = copy.deepcopy(pipe.unet).get_submodule(name).weight.detach()
    merged = minipeft.load_adapter(pipe.unet, tmp_path / "out" / "unet").merge_and_unload()
    first = f"lora_unet_{name.replace('.', '_')}"
    update = tensors[f"{first}.lora_up.weight"] @ tensors[f"{first}.lora_down.weight"] / 2
    torch.testing.assert_close(merged.get_submodule(name).weight.detach(), start + update, rtol=0, atol=1e-6)
    minipeft.load_adapter(pipe.text_encoder, tmp_path / "out" / "text_encoder")


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"to_q": 8}}, {"lora_bias": True}],
    ids=str,
)
def test_bare_tensors_of_our_file_have_the_same_effect_in_diffusers(options, tmp_path):
    """diffusers takes alpha for the rank of each layer if it is not told otherwise."""
    config = minipeft.LoraConfig(init_lora_weights=False, **CONFIG | options)
    model = minipeft.get_lora_model(pipeline().unet, config)
    model.save_pretrained(tmp_path)
    plain = pipeline().unet
    plain.load_lora_adapter(load_file(tmp_path / "adapter_model.safetensors"), prefix="base_model.model")
    torch.testing.assert_close(output(plain), output(model), rtol=0, atol=1e-5)
    with_peft = peft.PeftModel.from_pretrained(pipeline().unet, tmp_path)
    torch.testing.assert_close(output(with_peft), output(model), rtol=0, atol=1e-5)
    again = minipeft.load_adapter(pipeline().unet, tmp_path)
    assert (loaded := again.adapter_configs["default"]).alpha_pattern == config.alpha_pattern
    assert (loaded.lora_alpha, loaded.use_rslora) == (6, config.use_rslora)
    for key, tensor in model.adapter_state_dict().items():
        torch.testing.assert_close(again.adapter_state_dict()[key], tensor, rtol=2e-7, atol=0)


def test_the_metadata_that_diffusers_collects_keeps_alpha(tmp_path):
    pipe, plain = pipeline(), pipeline()
    model = adapted(pipe)
    layers = {key.removeprefix("base_model.model."): t for key, t in model.adapter_state_dict().items()}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, **_collate_lora_metadata({"unet": model}))
    plain.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(plain.unet), output(model), rtol=0, atol=1e-5)


def test_every_verb_of_diffusers_is_ours_or_names_ours():
    """load_lora_adapter ends in an error by itself, and the hot swap wants to be prepared before there is an adapter."""
    model = adapted(pipeline())
    verbs = {verb for verb in vars(PeftAdapterMixin) if not verb.startswith("_")}
    foreign = {verb for verb in verbs if is_from_diffusers(type(model), verb)}
    assert foreign == {"load_lora_adapter", "enable_lora_hotswap"}
    with pytest.raises(minipeft.StateError, match="set_scale"):
        model(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16), cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(minipeft.StateError, match=r"merge_and_unload\(\)"):
        model.fuse_qkv_projections()


def test_a_pipeline_unloads_what_is_adapted_and_has_its_base_again():
    pipe = pipeline()
    expected, ids = output(pipe.unet), torch.arange(5)[None]
    words = pipe.text_encoder(ids)[0]
    model = adapted(pipe)
    config = minipeft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"])
    text = minipeft.get_lora_model(pipe.text_encoder, config)
    assert not torch.equal(text(ids)[0], words)
    pipe.unload_lora_weights()
    torch.testing.assert_close(output(model), expected, rtol=0, atol=0)
    torch.testing.assert_close(text(ids)[0], words, rtol=0, atol=0)
    assert not any("adapters" in name for part in (model, text) for name in part.state_dict())
    assert not isinstance(text, minipeft.AdaptedModel)


def is_from_diffusers(cls, verb):
    owner = next(base for base in cls.__mro__ if verb in vars(base))
    return owner is PeftAdapterMixin


def test_a_training_script_saves_by_its_pipeline_and_resumes(tmp_path):
    """As train_text_to_image_lora.py does, with our tensors where it asks PEFT for its own."""
    pipe, plain = pipeline(), pipeline()
    model = adapted(pipe)
    layers = {"unet_lora_layers": model.get_adapter_state_dict(), **_collate_lora_metadata({"unet": model})}
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, **layers)
    plain.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(plain.unet), output(model), rtol=0, atol=1e-5)
    again = minipeft.load_adapter(pipeline().unet, tmp_path, is_trainable=True)
    assert torch.equal(output(again), output(model))
    assert all(p.requires_grad for key, p in again.named_parameters() if "lora_" in key)

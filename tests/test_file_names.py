"""Files whose tensors go by the names of another version or class: PEFT writes them, or their keys are renamed to the old ones.

The oracle is PEFT: the logits of the model that it adapted, and of the model that it reads the renamed file into, where it can.
"""

import copy
import functools
import json
import logging

import pytest
import torch
import transformers as tf
from fast_copy import copied
from rotation import often, shared
from safetensors.torch import load_file, save_file
from tiny_models import foreign_code, llama, state_digest, token_ids

import minipeft
from minipeft import CheckpointError, ConfigError, LoraConfig, MinipeftError

with foreign_code():
    peft = pytest.importorskip("peft")

PREFIX = "base_model.model."
ATTENTION = ("q_proj", "v_proj")
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {**ROPE, "mrope_section": [2, 1, 1]}
QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
QWEN_IDS = {"image_token_id": 99, "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96}


def made(cls, config):
    """A model, always the same."""
    torch.manual_seed(0)
    with foreign_code():
        model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


@copied
def llava():
    vision = {"model_type": "clip_vision_model", "projection_dim": 16, **VISION}
    text = {"model_type": "llama", **TEXT}
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=99, image_seq_length=4)
    return made(tf.LlavaForConditionalGeneration, config)


@copied
def paligemma():
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32, **VISION}
    text = {"model_type": "gemma", "head_dim": 8, **TEXT}
    sizes = {"projection_dim": 32, "hidden_size": 32, "vocab_size": 100, "image_token_index": 99}
    return made(
        tf.PaliGemmaForConditionalGeneration, tf.PaliGemmaConfig(vision_config=vision, text_config=text, **sizes)
    )


@copied
def gemma3():
    text = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, **TEXT}
    ids = {"mm_tokens_per_image": 4, "image_token_index": 99, "boi_token_index": 97, "eoi_token_index": 96}
    config = tf.Gemma3Config(vision_config={"vision_use_head": False, **VISION}, text_config=text, **ids)
    return made(tf.Gemma3ForConditionalGeneration, config)


@copied
def qwen25_vl():
    vision = {**QWEN, "intermediate_size": 48, "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    config = tf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config={**vision}, **QWEN_IDS)
    return made(tf.Qwen2_5_VLForConditionalGeneration, config)


@copied
def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = tf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **QWEN_IDS)
    return made(tf.Qwen2VLForConditionalGeneration, config)


@copied
def mllama():
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": ROPE}
    vision = {
        **{key: VISION[key] for key in ("hidden_size", "intermediate_size", "image_size", "patch_size")},
        **{"num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2, "intermediate_layers_indices": [0]},
        **{"vision_output_dim": 64, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]},
    }
    with foreign_code():
        config = tf.MllamaConfig(text_config=text, vision_config=vision)
    return made(tf.MllamaForConditionalGeneration, config)


@copied
def nemotron_h():
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_attention_heads": 4}
    mamba = {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 4}
    layers = {"layers_block_type": ["mamba", "mlp", "attention"], "num_key_value_heads": 2}
    return made(tf.NemotronHForCausalLM, tf.NemotronHConfig(**sizes, **mamba, **layers))


@copied
def vit():
    return made(tf.ViTForImageClassification, tf.ViTConfig(**VISION, num_labels=3))


@copied
def clip():
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    with foreign_code():
        config = tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return made(tf.CLIPModel, config)


@copied
def clip_vision():
    return made(tf.CLIPVisionModel, tf.CLIPVisionConfig(**VISION))


PIXELS = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def output(model):
    """What a model computes, of an image too if it takes one here."""
    kind, ids = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__, token_ids()
    with foreign_code():
        if "ViT" in kind:
            return model(pixel_values=PIXELS)[0]
        if "CLIPVision" in kind:
            return model(pixel_values=PIXELS).last_hidden_state
        if "CLIPModel" in kind:
            return model(input_ids=ids, pixel_values=PIXELS).logits_per_image
        if any(name in kind for name in ("Llava", "PaliGemma", "Gemma3ForCond")):
            ids = ids.clone()
            ids[:, 1:5] = 99
            types = {} if "Llava" in kind else {"token_type_ids": (ids == 99).long()}
            return model(input_ids=ids, pixel_values=PIXELS[: len(ids)], use_cache=False, **types)[0]
        return model(input_ids=ids)[0]


def moved(model):
    """The adapted model with every tensor of its adapter changed by numbers that show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    return model.eval()


def adapted(base, config):
    """PEFT's model, made of this one, and moved."""
    with foreign_code():
        return moved(peft.get_peft_model(base, config))


def lora(targets=("q_proj", "v_proj"), **options):
    targets = targets if isinstance(targets, str) else list(targets)
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options)


@functools.cache
def trained(build, targets=ATTENTION):
    """PEFT's LoRA of a model that `build` makes. It is shared: only its output and its file are wanted."""
    return adapted(build(), lora(targets))


def write(model, directory, rename=None, **edit):
    """PEFT's file, its keys renamed and its configuration edited."""
    with foreign_code():
        model.save_pretrained(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, **edit}))
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    if rename is not None:
        save_file({rename(key): tensor for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return directory


def renamed(*pairs):
    """A function that exchanges the first of these beginnings that a key has."""

    def rename(key):
        name = key.removeprefix(PREFIX)
        for new, old in pairs:
            if name.startswith(new):
                return PREFIX + old + name.removeprefix(new)
        return key

    return rename


def replaced(*pairs):
    def rename(key):
        for new, old in pairs:
            key = key.replace(new, old)
        return key

    return rename


def check_loads(build, directory, want, tmp_path, by_peft=True, again=True, **options):
    """It loads to the output that PEFT had, and what we save `again` has the model's names, for PEFT too."""
    if by_peft:
        with foreign_code():
            theirs = peft.PeftModel.from_pretrained(build(), directory)
        torch.testing.assert_close(output(theirs), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output(build()), want, atol=1e-4)
    model = minipeft.load_adapter(build(), directory, **options)
    torch.testing.assert_close(output(model), want, atol=1e-5, rtol=1e-5)
    if not again:
        return model
    model.save_pretrained(tmp_path / "again")
    again = minipeft.load_adapter(build(), tmp_path / "again")
    torch.testing.assert_close(output(again), want, atol=1e-5, rtol=1e-5)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "again")
    torch.testing.assert_close(output(theirs), want, atol=1e-5, rtol=1e-5)
    return model


BEFORE_4_52 = renamed(
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
QWEN_BEFORE_4_52 = renamed(("model.language_model.", "model."), ("model.visual.", "visual."))
MLLAMA_BEFORE_4_52 = renamed(
    ("model.language_model.", "language_model.model."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
VIT_OF_4 = replaced(
    ("attention.o_proj", "attention.output.dense"),
    (".mlp.fc1", ".intermediate.dense"),
    (".mlp.fc2", ".output.dense"),
    ("attention.q_proj", "attention.attention.query"),
    ("attention.v_proj", "attention.attention.value"),
    ("vit.layers.", "vit.encoder.layer."),
)
# PEFT reads the files of these, and silently leaves the tensors out: it does not translate them.
NOT_PEFT = {"llava everything", "qwen2.5-vl", "qwen2-vl", "clip vision"}
OLD = {
    "llava": (llava, ATTENTION, BEFORE_4_52, {}),
    "llava everything": (llava, ".*(q_proj|fc1|linear_1|lm_head|down_proj)", BEFORE_4_52, {}),
    "paligemma": (paligemma, ATTENTION, BEFORE_4_52, {}),
    "gemma3": (gemma3, ATTENTION, BEFORE_4_52, {}),
    "qwen2.5-vl": (qwen25_vl, ("q_proj", "v_proj", "qkv"), QWEN_BEFORE_4_52, {}),
    "qwen2.5-vl regex": (
        qwen25_vl,
        r"model\.language_model\..*(q_proj|v_proj)",
        QWEN_BEFORE_4_52,
        {"target_modules": r"model\.layers\..*(q_proj|v_proj)"},
    ),
    "qwen2-vl": (qwen2_vl, ("q_proj", "down_proj"), QWEN_BEFORE_4_52, {}),
    "mllama": (mllama, ("q_proj", "v_proj", "fc1"), MLLAMA_BEFORE_4_52, {}),
    "nemotron-h": (nemotron_h, ("q_proj", "up_proj", "lm_head"), renamed(("model.", "backbone.")), {}),
    "vit": (vit, ("q_proj", "v_proj"), VIT_OF_4, {"target_modules": ["query", "value"]}),
    "vit all": (
        vit,
        ("attention.o_proj", "mlp.fc1", "mlp.fc2"),
        VIT_OF_4,
        {"target_modules": ["attention.output.dense", "intermediate.dense", "output.dense"]},
    ),
    "clip vision": (clip_vision, ATTENTION, renamed(("", "vision_model.")), {}),
}


@pytest.mark.parametrize("case", shared(OLD, 0))  # the others in test_old_names.py
def test_names_of_older_transformers_are_read(case, tmp_path, caplog):
    build, targets, rename, edit = OLD[case]
    model = adapted(build(), lora(targets))
    directory = write(model, tmp_path / "old", rename, **edit)
    caplog.set_level(logging.INFO, "minipeft")
    # PEFT does not translate targets.
    check_loads(build, directory, output(model), tmp_path, by_peft=not edit and case not in NOT_PEFT)
    assert sum("were renamed" in message for message in caplog.messages) == 1


WRAPPED = {
    "adapter name": replaced((".lora_A.", ".lora_A.default."), (".lora_B.", ".lora_B.default.")),
    "another adapter name": replaced((".lora_A.", ".lora_A.my-adapter_1."), (".lora_B.", ".lora_B.my-adapter_1.")),
    "ddp": lambda key: f"module.{key}",
    "compile": lambda key: f"_orig_mod.{key}",
    "ddp and compile": lambda key: f"_orig_mod.module.{key}",
    "fsdp": replaced(("layers.0.", "layers.0._fsdp_wrapped_module."), (PREFIX, f"_fsdp_wrapped_module.{PREFIX}")),
    "module inside": replaced((PREFIX, f"{PREFIX}module.")),
    "doubled": lambda key: f"{PREFIX}{key}",
    "tripled": lambda key: f"{PREFIX}{PREFIX}{key}",
    "no prefix": replaced((PREFIX, "")),
    "lightning": lambda key: f"model.{key}",
    "value head": lambda key: f"pretrained_model.{key}",
    "everything": lambda key: "module." + PREFIX + key.replace("weight", "default.weight"),
    "backbone": replaced((PREFIX + "model.", PREFIX + "backbone.")),
    "without the head's class": replaced((PREFIX + "model.", PREFIX)),
    "neither": replaced((PREFIX + "model.", "")),
    "of a multimodal model": replaced((PREFIX + "model.", PREFIX + "model.language_model.")),
    "of an old multimodal model": replaced((PREFIX + "model.", PREFIX + "language_model.model.")),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_what_wrappers_and_other_classes_add_is_left_out(case, tmp_path):
    model = trained(llama, ("q_proj", "down_proj"))
    directory = write(model, tmp_path / "file", WRAPPED[case])
    again = case in ("ddp", "of a multimodal model")  # of the others, the model would be the same
    check_loads(llama, directory, output(model), tmp_path, by_peft=False, again=again)


@pytest.mark.parametrize(
    "case", ["ddp", "compile", "ddp and compile", "doubled", "tripled", "lightning", "value head", "inside"]
)
def test_what_wrappers_add_to_the_factors_that_all_layers_of_vera_share_is_left_out(case, tmp_path):
    rename = {**WRAPPED, "inside": replaced(("base_model.", "base_model._orig_mod."))}[case]
    model = adapted(llama(), peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    directory = write(model, tmp_path / "file", rename)
    assert sum(key.endswith(("vera_A", "vera_B")) for key in load_file(directory / "adapter_model.safetensors")) == 2
    check_loads(llama, directory, output(model), tmp_path, by_peft=False, again=case == "ddp")


NAMED = replaced((".lora_A.", ".lora_A.default."), (".lora_B.", ".lora_B.default."))
PARTLY_NAMED = {
    "head under its own name": (NAMED, {"modules_to_save": ["lm_head"]}),
    "magnitude of a module": (lambda key: f"{key}.weight" if key.endswith("vector") else key, {"use_dora": True}),
    "the same, named": (
        lambda key: f"{key}.default.weight" if key.endswith("vector") else NAMED(key),
        {"use_dora": True, "modules_to_save": ["lm_head"]},
    ),
}


@pytest.mark.parametrize("case", PARTLY_NAMED)
def test_what_scripts_name_in_part_is_read_as_peft_reads_it(case, tmp_path):
    rename, options = PARTLY_NAMED[case]
    model = adapted(llama(), lora(("q_proj", "down_proj"), **options))
    directory = write(model, tmp_path / "file", rename)
    check_loads(llama, directory, output(model), tmp_path)


@pytest.mark.parametrize(
    ("config", "options", "buffer"),
    [
        ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 10}, "layers.0.self_attn.q_proj.ranknum.default"),
        ("VeraConfig", {"r": 3}, "layers.1.self_attn.q_proj.vera_A.default"),
    ],
)
def test_the_buffers_in_a_state_without_peft_s_filter_are_compared_and_read(config, options, buffer, tmp_path):
    with foreign_code():
        theirs = peft.get_peft_model(llama(), getattr(peft, config)(target_modules=["q_proj"], **options)).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        theirs.save_pretrained(tmp_path)
        state = {key: t.clone() for key, t in theirs.state_dict().items() if key.endswith(".default")}
    save_file(state, tmp_path / "adapter_model.safetensors")
    ours = minipeft.load_adapter(llama(), tmp_path)
    torch.testing.assert_close(text_logits(ours), text_logits(theirs))
    state[f"{PREFIX}model.{buffer}"] += 1
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=buffer.rpartition(".")[0]):
        minipeft.load_adapter(llama(), tmp_path)


PARTS = {
    "llava": (llava, tf.LlamaForCausalLM),
    "qwen2.5-vl": (qwen25_vl, tf.Qwen2ForCausalLM),
    "gemma3": (gemma3, tf.Gemma3ForCausalLM),
    "mllama": (mllama, tf.MllamaForCausalLM),
}


def text_of(model, cls):
    """The text model of a multimodal one as a model of its own class, with the same weights."""
    config = copy.deepcopy(model.config.text_config)
    if cls is tf.Qwen2ForCausalLM:
        config = tf.Qwen2Config(**{**TEXT, "rope_parameters": ROPE, "rms_norm_eps": config.rms_norm_eps})
    text = made(cls, config)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    return text


@torch.no_grad()
def text_logits(model):
    with foreign_code():
        return model(input_ids=token_ids(), use_cache=False).logits


@pytest.mark.each_value
@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("targets", [ATTENTION, r"(.*\.)?layers\.1\..*(k_proj|up_proj)"], ids=["list", "regex"])
def test_a_text_models_adapter_fits_the_multimodal_model_and_back(case, targets, tmp_path):
    build, cls = PARTS[case]
    model = adapted(text_of(build(), cls), lora(targets))
    write(model, tmp_path / "text")
    loaded = minipeft.load_adapter(build(), tmp_path / "text")
    want = text_logits(model)
    torch.testing.assert_close(text_logits(loaded), want, atol=1e-5, rtol=1e-5)
    assert not any("vision" in name or "visual" in name for name, _ in adapted_names(loaded))
    loaded.save_pretrained(tmp_path / "whole")
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "whole")
    torch.testing.assert_close(text_logits(theirs), want, atol=1e-5, rtol=1e-5)
    back = minipeft.load_adapter(text_of(build(), cls), tmp_path / "whole")
    torch.testing.assert_close(text_logits(back), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.skipif(not hasattr(tf, "LagunaModel"), reason="transformers 5.24 has it")
def test_a_name_that_transformers_tables_spoil_is_read_in_another_class(tmp_path):
    # The dot in "mlp.shared_expert." is one of any character there, so today's "mlp.shared_experts" gets a second dot.
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config = tf.LagunaConfig(**{**TEXT, **experts})
    body, whole = made(tf.LagunaModel, config), made(tf.LagunaForCausalLM, config)
    whole.model.load_state_dict(body.state_dict())
    model = minipeft.get_lora_model(body, lora(["shared_experts.gate_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    loaded = minipeft.load_adapter(whole, tmp_path)
    want, got = (
        each(input_ids=token_ids(), use_cache=False).last_hidden_state for each in (model.eval(), loaded.model)
    )
    torch.testing.assert_close(got, want)


def adapted_names(model):
    return [(name, m) for name, m in model.named_modules() if type(m).__name__ == "AdaptedLayer"]


@copied
def qwen3_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return made(tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**TEXT, **experts))


@copied
def classifier():
    return made(tf.LlamaForSequenceClassification, tf.LlamaConfig(**TEXT, num_labels=3))


GATE_UP = "layers.0.mlp.experts.gate_up_proj"
OPTIONS = {
    "bare parameters": (qwen3_moe, {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, {}),
    "bare parameter by full name": (
        qwen3_moe,
        {"target_parameters": [f"model.{GATE_UP}"], "rank_pattern": {f"model.{GATE_UP}": 2}},
        {"target_parameters": [f"backbone.{GATE_UP}"], "rank_pattern": {f"backbone.{GATE_UP}": 2}},
    ),
    "layers_pattern": (llama, {"layers_to_transform": [1], "layers_pattern": "layers"}, {}),
    "tied tables trained": (
        lambda: llama(tie_word_embeddings=True),
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {},
    ),
    "tied rows": (lambda: llama(tie_word_embeddings=True), {"trainable_token_indices": [3, 4]}, {}),
    "every bias": (qwen3_moe, {"bias": "all"}, {}),
    "classifier": (classifier, {"task_type": "SEQ_CLS"}, {}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_name_modules_follow_the_names(case, tmp_path):
    build, options, edit = OPTIONS[case]
    model = adapted(build(), lora(["q_proj"], **options))
    directory = write(model, tmp_path / "old", renamed(("model.", "backbone.")), **edit)
    loaded = minipeft.load_adapter(build(), directory)
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "again")
    torch.testing.assert_close(output(theirs), output(model), atol=1e-5, rtol=1e-5)


def test_the_ranks_that_adalora_left_follow_the_names(tmp_path):
    kept = [True, False, True, True]
    ranks = {f"model.layers.{n}.self_attn.q_proj.lora_E": kept for n in range(2)}
    sizes = {"init_r": 4, "target_r": 2, "total_step": 10, "rank_pattern": ranks}
    model = moved(minipeft.get_adapter_model(llama(), minipeft.AdaLoraConfig(target_modules=["q_proj"], **sizes)))
    model.save_pretrained(tmp_path)
    rename = renamed(("model.", "backbone."))
    edited(tmp_path, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("model.layers", "backbone.layers"))
    torch.testing.assert_close(output(minipeft.load_adapter(llama(), tmp_path)), output(model))


METHODS = {
    "dora": (lambda: lora(use_dora=True), {}),
    "rank pattern": (
        lambda: lora(rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3}),
        {},
    ),
    "rank pattern by full name": (
        lambda: lora(rank_pattern={"^model.language_model.layers.1.self_attn.q_proj$": 2}),
        {"rank_pattern": {"^language_model.model.layers.1.self_attn.q_proj$": 2}},
    ),
    "one layer": (lambda: lora(layers_to_transform=[1]), {}),
    "excluded": (
        lambda: lora(exclude_modules=r".*language_model\.layers\.0.*"),
        {"exclude_modules": r".*language_model\.model\.layers\.0.*"},
    ),
    "full names": (
        lambda: lora([f"model.language_model.layers.{n}.mlp.up_proj" for n in (0, 1)]),
        {"target_modules": [f"language_model.model.layers.{n}.mlp.up_proj" for n in (0, 1)]},
    ),
    "regex": (
        lambda: lora(r"model\.language_model\..*\.(k_proj|up_proj)"),
        {"target_modules": r"language_model\.model\..*\.(k_proj|up_proj)"},
    ),
    "all-linear": (lambda: lora("all-linear"), {"target_modules": "all-linear"}),
    "head trained": (lambda: lora(modules_to_save=["lm_head", "multi_modal_projector"]), {}),
    "head trained by full name": (
        lambda: lora(modules_to_save=["model.multi_modal_projector"]),
        {"modules_to_save": ["language_model.lm_head", "multi_modal_projector"]},
    ),
    "tokens": (lambda: lora(trainable_token_indices=[7, 9]), {}),
    "tokens by name": (
        lambda: lora(trainable_token_indices={"model.language_model.embed_tokens": [7, 9]}),
        {"trainable_token_indices": {"language_model.model.embed_tokens": [7, 9]}},
    ),
    "embedding": (lambda: lora(["embed_tokens", "lm_head", "q_proj"]), {}),
    "bias": (lambda: lora(["fc1", "v_proj"], bias="lora_only"), {}),
    "ia3": (
        lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        {},
    ),
    "ia3 by full name": (
        lambda: peft.IA3Config(
            target_modules=r"model\.language_model.*\.(k_proj|down_proj)",
            feedforward_modules=r"model\.language_model.*\.down_proj",
        ),
        {
            "target_modules": r"language_model\.model.*\.(k_proj|down_proj)",
            "feedforward_modules": r"language_model\.model.*\.down_proj",
        },
    ),
    "loha": (lambda: peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]), {}),
    "lokr": (lambda: peft.LoKrConfig(r=4, target_modules=["q_proj", "v_proj"]), {}),
    "vera": (lambda: peft.VeraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|o_proj)"), {}),
    "oft": (lambda: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "v_proj"]), {}),
    "only tokens": (lambda: peft.TrainableTokensConfig(token_indices=[7, 9], target_modules=["embed_tokens"]), {}),
}


# Of the others, the options that are saved again are those of one of these, or name no module.
SAVED_AGAIN = (
    "rank pattern by full name",
    "excluded",
    "head trained by full name",
    "tokens by name",
    "ia3 by full name",
)


@pytest.mark.parametrize("case", often(METHODS, SAVED_AGAIN))
def test_every_methods_file_is_read_under_old_names_and_its_state_with_the_adapters_name(case, tmp_path):
    """The state is what a script writes that saves PEFT's state_dict() itself."""
    config, edit = METHODS[case]
    with foreign_code():
        model = adapted(llava(), config())
    want = output(model)
    directory = write(model, tmp_path / "old", BEFORE_4_52, **edit)
    check_loads(llava, directory, want, tmp_path, by_peft=False, again=case in SAVED_AGAIN)
    directory = write(model, tmp_path / "file")
    own = {id(p) for p in model.parameters() if p.requires_grad}
    state = {
        k: t for k, t in model.state_dict(keep_vars=True).items() if id(t) in own or k.startswith("base_model.vera_")
    }
    save_file({k: t.detach().clone() for k, t in state.items()}, directory / "adapter_model.safetensors")
    model = minipeft.load_adapter(llava(), directory)
    torch.testing.assert_close(output(model), want, atol=1e-5, rtol=1e-5)


def test_a_whole_state_with_the_base_in_it_is_read(tmp_path):
    model = adapted(llama(), lora(modules_to_save=["lm_head"]))
    directory = write(model, tmp_path / "file")
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    save_file(state, directory / "adapter_model.safetensors")
    loaded = minipeft.load_adapter(llama(), directory)
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)
    state[PREFIX + "model.layers.0.mlp.up_proj.weight"] += 1
    save_file(state, directory / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="differs from this model's"):
        minipeft.load_adapter(llama(), directory)


def test_two_readings_are_refused_with_both_and_key_mapping_decides(tmp_path):
    tower, model = clip_vision(), clip()
    model.vision_model.load_state_dict(tower.state_dict())
    of_tower = adapted(tower, lora())
    directory = write(of_tower, tmp_path / "tower")
    before = state_digest(model)
    with pytest.raises(CheckpointError) as error:
        minipeft.load_adapter(model, directory)
    for said in ("text_model.encoder.layers.0", "vision_model.encoder.layers.0", "key_mapping", "Nothing was changed"):
        assert said in str(error.value)
    assert state_digest(model) == before
    assert type(model) is tf.CLIPModel
    loaded = minipeft.load_adapter(model, directory, key_mapping={"^": "vision_model."})
    names = [name for name, _ in adapted_names(loaded)]
    assert names
    assert all(name.startswith("vision_model.") for name in names)
    torch.testing.assert_close(output(loaded.vision_model), output(of_tower), atol=1e-5, rtol=1e-5)


def test_shapes_tell_two_readings_apart(tmp_path):
    tower = clip_vision()
    with foreign_code():
        text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = tf.CLIPConfig(text_config={**text, "vocab_size": 100}, vision_config=VISION, projection_dim=16)
    directory = write(adapted(tower, lora()), tmp_path / "tower")
    loaded = minipeft.load_adapter(made(tf.CLIPModel, config), directory)
    assert {name.partition(".")[0] for name, _ in adapted_names(loaded)} == {"vision_model"}


def test_key_mapping_is_pefts(tmp_path):
    model = trained(llama)
    mapping = {r"^decoder\.blocks\.(\d+)": r"model.layers.\1", "layers": "never reached"}
    directory = write(model, tmp_path / "odd", renamed(("model.layers.", "decoder.blocks.")))
    with pytest.raises(CheckpointError, match="none of its 8 keys is expected"):
        minipeft.load_adapter(llama(), directory)
    with foreign_code():
        theirs = peft.PeftModel.from_pretrained(llama(), directory, key_mapping=mapping)
    torch.testing.assert_close(output(theirs), output(model), atol=1e-5, rtol=1e-5)
    check_loads(llama, directory, output(model), tmp_path, by_peft=False, key_mapping=mapping)
    first = minipeft.get_adapter_model(llama(), LoraConfig(target_modules=["q_proj"]))
    first.load_adapter(directory, "other", key_mapping=mapping)
    first.set_adapter("other")
    torch.testing.assert_close(output(first), output(model), atol=1e-5, rtol=1e-5)


HOSTILE = {
    "two to one place": ({r"layers\.\d": "layers.0"}, "one place"),
    "no place": ({"q_proj": "nowhere"}, "has no such module"),
    "explodes": ({"^(\\w|\\w\\w|\\.)*$(?<=x)": "y"}, "0.2 s"),
    "recursive": ({"(?R)": ""}, "recursive"),
    "repeats": ({"(a{9999}){9999}": ""}, "repeats"),
    "invalid": ({"(": ""}, "not a valid"),
    "no such group": ({"q_proj": r"\7"}, "cannot replace"),
    "long": ({"q_proj": "x" * 5000}, "5,0"),
    "too many": ({f"a{n}": "" for n in range(1000)}, "500"),
    "not strings": ({"a": 1}, "must map"),
    "no table": (["a"], "must map"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_key_mapping_is_refused_and_changes_nothing(case, tmp_path, monkeypatch):
    mapping, said = HOSTILE[case]
    monkeypatch.setattr("minipeft.files.names.fitted.SECONDS_PER_OPTION", 0.2)
    base = llama()
    directory = write(trained(llama), tmp_path / "file")
    before = state_digest(base)
    with pytest.raises(MinipeftError, match=said) as error:
        minipeft.load_adapter(base, directory, key_mapping=mapping)
    assert isinstance(error.value, CheckpointError | ConfigError)
    assert str(error.value).endswith("Nothing was changed.")
    assert state_digest(base) == before
    assert type(base) is tf.LlamaForCausalLM


def edited(directory, edit):
    path = directory / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})
    return directory


MISFITS = {
    "a tensor is missing": lambda t: dict(list(t.items())[1:]),
    "a layer is missing": lambda t: {key: value for key, value in t.items() if ".1." not in key},
    "a kind is missing": lambda t: {key: value for key, value in t.items() if "v_proj" not in key},
    "one more": lambda t: {**t, PREFIX + "language_model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)},
    "another shape": lambda t: {key: torch.cat([value, value], 1) if "0.self_attn.q_proj" in key else value for key, value in t.items()},
    "twice": lambda t: {**t, **{key.replace(PREFIX, ""): value.clone() for key, value in t.items()}},
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_translated_file_is_compared_as_strictly_as_any(case, tmp_path):
    base = llava()
    model = trained(llava, r".*language_model.*\.(q_proj|v_proj)")
    directory = edited(write(model, tmp_path / "old", BEFORE_4_52), MISFITS[case])
    before = state_digest(base)
    with pytest.raises(CheckpointError, match="does not fit"):
        minipeft.load_adapter(base, directory)
    assert state_digest(base) == before
    assert type(base) is tf.LlavaForConditionalGeneration


def test_strict_false_reads_what_fits_under_old_names(tmp_path):
    base = llava()
    model = trained(llava, r".*language_model.*\.(q_proj|v_proj)")
    directory = edited(write(model, tmp_path / "old", BEFORE_4_52), MISFITS["one more"])
    with pytest.warns(UserWarning, match=r"unexpected .*layers\.7"):
        loaded = minipeft.load_adapter(base, directory, strict=False)
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)


def test_another_architectures_names_are_not_exchanged(tmp_path):
    def bert(cls, config):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        return made(cls, config(**sizes, vocab_size=100, max_position_embeddings=64))

    model = adapted(bert(tf.BertForMaskedLM, tf.BertConfig), lora(["query", "value"]))
    directory = write(model, tmp_path / "bert")
    roberta = bert(tf.RobertaForMaskedLM, tf.RobertaConfig)
    before = state_digest(roberta)
    with pytest.raises(CheckpointError, match="none of its"):
        minipeft.load_adapter(roberta, directory)
    assert state_digest(roberta) == before
    # The same model's own backbone has the same names without their prefix.
    loaded = minipeft.load_adapter(bert(tf.BertModel, tf.BertConfig), directory)
    assert len(adapted_names(loaded)) == 4


def test_names_of_transformers_5_fit_a_model_of_4(tmp_path):
    """Such as one whose code comes with its checkpoint."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.Module()
            for name in ("query", "key", "value"):
                self.attention.add_module(name, torch.nn.Linear(32, 32))

        def forward(self, x):
            return self.attention.query(x) + self.attention.key(x) * self.attention.value(x)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, x):
            return self.attention(x)

    class Old(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = torch.nn.Module()
            self.vit.encoder = torch.nn.Module()
            self.vit.encoder.layer = torch.nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x):
            for layer in self.vit.encoder.layer:
                x = layer(x)
            return x

    torch.manual_seed(0)
    base, x = Old(), torch.randn(2, 32)
    model = adapted(copy.deepcopy(base), lora(["query", "value"]))
    new = ((".attention.attention.query.", ".attention.q_proj."), (".attention.attention.value.", ".attention.v_proj."))
    rename = replaced(*new, ("encoder.layer.", "layers."))
    directory = write(model, tmp_path / "new", rename, target_modules=["q_proj", "v_proj"])
    loaded = minipeft.load_adapter(base, directory)
    torch.testing.assert_close(loaded(x), model(x))


def test_our_own_file_keeps_its_samples_of_the_base_under_new_names(tmp_path):
    whole = llava()
    text = text_of(whole, tf.LlamaForCausalLM)
    adapter = moved(minipeft.get_adapter_model(copy.deepcopy(text), LoraConfig(target_modules=["q_proj"])))
    adapter.save_pretrained(tmp_path / "text")
    loaded = minipeft.load_adapter(copy.deepcopy(whole), tmp_path / "text")
    torch.testing.assert_close(text_logits(loaded), text_logits(adapter), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        whole.model.language_model.layers[1].self_attn.q_proj.weight.mul_(-1)
    with pytest.raises(CheckpointError, match="another base"):
        minipeft.load_adapter(whole, tmp_path / "text")


def test_a_resized_vocabulary_is_read_under_old_names(tmp_path):
    base = llava()
    with foreign_code():
        base.resize_token_embeddings(104)
    base.eval()
    with foreign_code():
        model = adapted(copy.deepcopy(base), lora())
        model.save_pretrained(tmp_path / "old", save_embedding_layers=True)
    directory = edited(tmp_path / "old", lambda t: {BEFORE_4_52(key): value for key, value in t.items()})
    tables = load_file(directory / "adapter_model.safetensors")
    assert f"{PREFIX}language_model.model.embed_tokens.weight" in tables
    with torch.no_grad():
        base.get_input_embeddings().weight[100:] += 1
        base.get_output_embeddings().weight[100:] -= 1
    loaded = minipeft.load_adapter(base, directory)
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)


def test_an_adapter_in_a_subfolder_is_read_under_old_names(tmp_path):
    base = llava()
    model = trained(llava)
    write(model, tmp_path / "parent" / "inner", BEFORE_4_52)
    loaded = minipeft.load_adapter(base, tmp_path / "parent", subfolder="inner")
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)


def test_a_second_adapter_is_read_under_old_names(tmp_path):
    base = llava()
    model = trained(llava)
    directory = write(model, tmp_path / "old", BEFORE_4_52)
    both = minipeft.get_adapter_model(base, LoraConfig(target_modules=["q_proj"]))
    both.load_adapter(directory, "second")
    both.set_adapter("second")
    torch.testing.assert_close(output(both), output(model), atol=1e-5, rtol=1e-5)


def test_a_quantized_base_is_no_hindrance(tmp_path):
    base = llava()
    model = trained(llava)
    directory = write(model, tmp_path / "old", BEFORE_4_52)
    quantized = minipeft.quantize(base, "int8")
    own = minipeft.load_adapter(copy.deepcopy(quantized), write(model, tmp_path / "own"))
    torch.testing.assert_close(output(minipeft.load_adapter(quantized, directory)), output(own))


@pytest.mark.slow
def test_many_keys_without_a_place_take_no_time(tmp_path):
    base = llava()
    directory = write(trained(llava), tmp_path / "old", BEFORE_4_52)
    junk = {f"{PREFIX}language_model.model.layers.{n}.x.q_proj.lora_A.weight": torch.ones(1) for n in range(20_000)}
    junk |= {"a." * 900 + "q_proj.lora_A.weight": torch.ones(1), "." * 1900: torch.ones(1)}
    edited(directory, lambda tensors: {**tensors, **junk})
    with pytest.raises(CheckpointError, match="does not fit"):
        minipeft.load_adapter(base, directory)

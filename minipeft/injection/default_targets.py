"""Default target modules by transformers ``model_type``, for configurations without ``target_modules``.

The query and value projections, as in the LoRA paper (section 7.1), under each family's own names, or the projection
that holds query, key and value in one matrix. PEFT's defaults, where it has one. A test checks every line against the
modules of the installed transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

from minipeft.registry.registry import register_targets

DEFAULTS: tuple[tuple[Sequence[str] | str, str], ...] = (
    (["c_attn"], "gpt2 gpt-sw3 gpt_bigcode openai-gpt decision_transformer imagegpt"),
    (["query_key_value"], "bloom falcon fuyu gpt_neox gpt_neox_japanese persimmon chatglm"),
    (["qkv_proj"], "codegen phi3"),
    (["Wqkv"], "modernbert mpt"),
    (["in_proj"], "deberta"),
    (["query_proj", "value_proj"], "deberta-v2 prophetnet"),
    (["q_lin", "v_lin"], "distilbert flaubert xlm"),
    (["q", "v"], "t5 mt5 umt5 longt5 switch_transformers mpnet udop"),
    (["Wq", "Wv"], "ctrl"),
    (["project_q", "project_v"], "cpmant"),
    (["q_head", "v_head"], "funnel"),
    (["linear_q", "linear_v"], "wav2vec2-bert wav2vec2-conformer"),
    (["key", "value", "receptance", "output"], "rwkv"),
    (["q_proj", "v_proj", "fc1", "fc2"], "phi"),
    (["q_proj", "k_proj", "v_proj", "o_proj"], "nemotron_h"),
    # Multi-head latent attention has no plain query and value projections; its smaller variants have q_proj.
    (
        r".*\.(?:q_proj|q_b_proj|kv_b_proj)",
        "deepseek_v2 deepseek_v3 glm4_moe_lite longcat_flash minicpm3 mistral4 youtu",
    ),
    # The vision and audio towers wrap their projections, and are left out.
    (r"(?!.*(?:vision|audio)).*\.(?:q_proj|v_proj)", "gemma4 gemma4_text gemma4_unified gemma4_unified_text"),
    # Renamed from query and value to q_proj and v_proj between releases of transformers.
    (
        r".*\.(?:query|value|q_proj|v_proj)",
        "audio-spectrogram-transformer beit data2vec-vision deit dinov2 dinov2_with_registers dinov3_vit "
        "dpt ijepa layoutlmv3 lilt mobilevit pvt swin swinv2 tvp videomae vilt vit vit_mae vit_msn vivit yolos",
    ),
    (
        ["query", "value"],
        "albert align bert bert-generation big_bird blip_2_qformer bridgetower camembert canine convbert data2vec-text "
        "electra ernie flava layoutlm longformer luke lxmert markuplm megatron-bert mobilebert mra nystromformer "
        "perceiver rembert roberta roberta-prelayernorm roc_bert roformer splinter tapas visual_bert xlm-roberta "
        "xlm-roberta-xl xmod yoso",
    ),
    (
        ["q_proj", "v_proj"],
        # decoders
        "afmoe apertus arcee aria_text biogpt bitnet blt cohere cohere2 cohere2_moe cwm diffllama doge emu3 emu3_text_model ernie4_5 "
        "ernie4_5_moe exaone4 exaone_moe falcon_h1 flex_olmo gemma gemma2 gemma3 gemma3_text git glm glm4 glm4_moe "
        "gpt_neo gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hy_v3 hyperclovax "
        "jais2 kimi_linear lfm2 llama llama4 llama4_text minimax minimax_m2 ministral3 mistral mixtral mllama mllama_text_model "
        "modernbert-decoder nanochat olmo olmo2 olmo3 olmo_hybrid olmoe opt phi4_multimodal phimoe qwen2 qwen2_moe "
        "qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open "
        "stablelm starcoder2 trocr vaultgemma xglm zamba zamba2 "
        # encoders
        "eurobert esmc nomic_bert "
        # encoder-decoders
        "bart bigbird_pegasus blenderbot blenderbot-small fsmt led m2m_100 marian mbart mvp nllb-moe pegasus pegasus_x "
        "plbart seamless_m4t seamless_m4t_v2 speech_to_text speecht5 t5gemma t5gemma2 "
        # vision, audio and both with text
        "altclip aria blip-2 chinese_clip clip clip_text_model clip_vision_model clipseg groupvit hubert idefics2 "
        "idefics3 instructblip internvl janus llava llava_next llava_onevision mistral3 moonshine owlv2 owlvit "
        "paligemma pixtral qwen2_5_vl qwen2_5_vl_text qwen2_audio qwen2_vl qwen2_vl_text qwen3_vl qwen3_vl_text "
        "sew siglip siglip2 siglip2_vision_model siglip_vision_model smolvlm unispeech unispeech-sat video_llava "
        "vipllava voxtral wav2vec2 wavlm whisper",
    ),
)

for _patterns, _model_types in DEFAULTS:
    for _model_type in _model_types.split():
        register_targets(_model_type, _patterns)

"""The options that PEFT's ``adapter_config.json`` may hold: their names, and what the value of one asks for.

The names are the fields of every configuration class under ``src/peft`` in every tag of github.com/huggingface/peft from
v0.0.1 to v0.20.0, and in the release 0.21.2. A key with one of these names means something to PEFT, so whoever does not
implement it may not ignore it. A key with any other name is bookkeeping of the tool that wrote the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from minipeft.errors import ConfigError, nearest, shown, told, told_error

NEWEST = (0, 21)  # the newest version of PEFT whose options are listed here
_NAMES = """
ab_svd_init act_fn adapter_layers adapter_len adapters alora_invocation_tokens alpha alpha_pattern apply_GS
arrow_config asa_importance_beta asa_schedule_exponent asa_target_subspaces asa_uncertainty_beta auto_mapping
auxiliary_loss_weight base_model_name_or_path beta1 beta2 bias block_share block_size block_size_pattern
boft_block_num boft_block_size boft_dropout boft_n_butterfly_factor cayley_neumann_eps coft config_A_B config_C
config_D_E corda_config cpt_mask cpt_token_ids cpt_tokens_type_mask d_initial decompose_both decompose_factor
decomposition_method deft_dropout delora_lambda deltaT depth effective_rank enable_lora enable_softmax
enable_softmax_topk encoder_dropout encoder_hidden_size encoder_num_layers encoder_reparameterization_type
ensure_weight_tying eps eva_config exclude_modules fan_in_fan_out feedforward_modules final_warmup frod_dropout
generator_seed global_scaling_weight gralora_dropout gralora_k group_size hidden_size hira_dropout hybrid_r
inference_mode init_ia3_weights init_logits_std init_lora_weights init_r init_scale init_theta_d_bound init_v_bound
init_vector_bank_bound init_warmup init_weights kasa_config lambda_pattern layer_replication layers_pattern
layers_to_transform layerwise_scalings loftq_config lora_alpha lora_bias lora_dropout lora_ga_config mask_interval
mask_type megatron_config megatron_core merge_weights mini_r miss_dropout module_dropout modules_to_save
monteclora_config n_frequency n_frequency_pattern n_skills n_splits n_tasks num_B num_attention_heads
num_cayley_neumann_terms num_frozen_tokens num_layers num_ranks num_subspaces num_tasks num_transformer_submodules
num_vectors num_virtual_tokens oft_block_size opt_loss_decay_factor opt_projection_epsilon
opt_projection_format_epsilon opt_weighted_loss_type orth_reg_weight para peft_type peft_version poly_type
postprocess_past_key_value_function prefix_projection progressbar proj_seed projection_prng_key projection_seed
prompt_tuning_init prompt_tuning_init_state_dict_path prompt_tuning_init_task prompt_tuning_init_text
proportional_parameters psoft_alpha psoft_dropout psoft_mag_a psoft_mag_b psoft_orth psoft_svd psoft_svd_lowrank_niter
pvera_dropout qalora_group_size r randlora_alpha randlora_dropout random_loc_seed random_seed rank_dropout
rank_dropout_scale rank_pattern regularization_alpha revision runtime_config runtime_offload_base_weight
sample_at_inference save_indices save_only_topk_weights save_precomputed_indices save_projection scaling
scaling_pass_value select_top shadow_alpha shadow_dropout shadow_hidden_size shadow_intermediate_size shadow_model
shadow_num_attention_heads shadow_num_hidden_layers share_embeddings softmax_temperature sparse sparse_rate sparsity
stride_A subspace_rank svd_threshold target_modules target_parameters target_r target_svd_config task_type tfinal
theta_d_length tinit tinylora_dropout token_dim token_indices tokenizer_kwargs tokenizer_name_or_path top_k_lora topk
total_step trainable_token_indices u unilora_dropout update_hidden_size use_asa use_bdlora use_cayley_neumann use_dora
use_dynamic_rank use_effective_conv2d use_idwt use_qalora use_rslora use_trainable_adapters variant vblora_dropout
vector_length velora_config vera_dropout very_sparse wavelet_family weight_tying xlora_depth xlora_dropout_p
xlora_size
"""
OPTIONS = frozenset(_NAMES.split())
# Options that describe the file, or how an adapter starts, trains or runs, but not what its tensors mean. What belongs to
# a start is ignored because init_lora_weights decides, and is checked. Those of Unsloth say how experts are laid out, see
# `minipeft.files.names.experts.layout`.
WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_B_layout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "unsloth_fused_expert_lora",
    }
)
# Of these, what a file keeps when it is saved again.
KEPT = frozenset({"auto_mapping", "revision"})
MAX_OTHERS = 64  # bookkeeping keys in one file


def asks_nothing(value: object) -> bool:
    """Whether the value of an option is one that changes nothing: null, false, empty, or a mapping of those."""
    if isinstance(value, Mapping):
        return all(asks_nothing(item) for item in value.values())
    return value is None or value is False or is_empty(value) or (value == 0 and isinstance(value, int | float))


def is_empty(value: object) -> bool:
    """Whether a value of a file is null, or an empty list, mapping or string."""
    return value is None or (isinstance(value, list | tuple | Mapping | str) and not value)


def read_value(value: object, default: object, *, null_is_default: bool) -> object:
    """The value of an option in a file, where PEFT and the tools around it write a value that asks for nothing.

    Args:
        value: what the file says.
        default: the option's own.
        null_is_default: null is allowed although the option is a number.
    """
    if isinstance(default, bool):  # PEFT only asks whether a flag counts as true
        return False if is_empty(value) or (value == 0 and isinstance(value, int | float)) else value
    if isinstance(default, int | float):
        return default if value is None and null_is_default else value
    is_no = value is False and not isinstance(default, str)  # such as "modules_to_save": false
    return default if is_no or is_empty(value) else value


def other_keys(values: Mapping[str, Any], known: Collection[str], method: str) -> dict[str, Any]:
    """The keys of a file that ask its reader for nothing, to be written back when the adapter is saved again.

    Args:
        values: what the file says.
        known: the options of the method that a file may set.
        method: its name.

    Raises:
        ConfigError: a key is an option that is not implemented, or may be one.
    """
    others = {
        key: value for key, value in values.items() if key not in {*known, *WITHOUT_EFFECT} and not asks_nothing(value)
    }
    unsure = others if _is_newer(values.get("peft_version")) else OPTIONS
    asked = [f"{key} = {told(value, 60)}" for key, value in others.items() if key in unsure]
    if asked:
        raise ConfigError(
            f"it asks for {'; '.join(asked[:5])}, which minipeft does not implement for {method.upper()}."
        )
    if len(others) > MAX_OTHERS:
        raise ConfigError(f"it has {len(others):,} unknown keys ({shown(others, 3)}); {MAX_OTHERS} are allowed.")
    absent = [name for name in known if name not in values]
    for key in others:
        option = _meant(key, absent)
        if option is not None:
            raise ConfigError(f"there is no option {told(key)}; {option!r} is probably meant.")
    return others | {key: values[key] for key in sorted(KEPT) if not asks_nothing(values.get(key))}


def checked_other_keys(value: object) -> dict[str, Any]:
    """A copy of such keys, as a configuration holds them.

    Raises:
        ConfigError: they cannot stand in a file, or one is an option.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"other_keys must map keys of a file to their values, not {told(value)}.")
    try:
        json.dumps(dict(value), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"other_keys cannot be written as JSON ({told_error(error)}).") from None
    options = [key for key in value if key in OPTIONS - KEPT]
    if options:
        raise ConfigError(f"other_keys: {shown(options)} is an option, not a key that asks for nothing.")
    return dict(value)


def _is_newer(peft_version: object) -> bool:
    """Whether a file says that it was written by a version of PEFT whose options are not listed here."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", peft_version) if isinstance(peft_version, str) else None
    return match is not None and (int(match[1]), int(match[2])) > NEWEST


def _meant(key: str, absent: Sequence[str]) -> str | None:
    """The option that a key of a file misspells; `absent` are those that the file does not have."""
    plain = _letters(key)
    same = next((option for option in absent if _letters(option) == plain), None)
    return same or nearest(key[:100], absent, cutoff=0.85)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())

"""What PEFT reads: ``PeftModel.from_pretrained``."""

from __future__ import annotations

from minipeft.files.file_names import WEIGHTS_FILE
from minipeft.files.readers import facts
from minipeft.files.readers.fused_experts import refused_for_experts, taken_for_experts
from minipeft.files.readers.rules import CONVERT, MERGE, NO, PARTLY, SAVE_AGAIN, SILENTLY, Rule

METHODS = frozenset(
    "ADALORA ADAMSS ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LILY "  # noqa: SIM905
    "LN_TUNING LOHA LOKR LORA MISS MULTITASK_PROMPT_TUNING OFT OSF PEANUT POLY PREFIX_TUNING PROMPT_TUNING PSOFT PVERA "
    "P_TUNING RANDLORA ROAD SHADOW SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT XLORA".split()
)
LOADING = "peft/utils/save_and_load.py (set_peft_model_state_dict), PEFT 0.21.2"
CONVERSION = "peft/utils/transformers_weight_conversion.py (_convert_peft_config_moe), PEFT 0.21.2"
RANKS = "correct r and rank_pattern in adapter_config.json"
TARGETS = "correct target_modules in adapter_config.json"


FORMAT = (
    Rule("format", facts.file_is_not(WEIGHTS_FILE), NO, f"is not read; the weights must be in {WEIGHTS_FILE}",
         "peft/utils/save_and_load.py (load_peft_weights), PEFT 0.21.2", "minipeft convert DIR OUT"),
    Rule("method", facts.methods_but(*METHODS), NO, "is no method of PEFT's", "peft/utils/peft_types.py, PEFT 0.21.2"),
    Rule("start", facts.kept_start, NO, "is refused: it is minipeft's own, for a start that is in the file",
         "peft/tuners/lora/layer.py (update_layer), PEFT 0.21.2", f"{CONVERT}, or save_pretrained(..., convert_to_lora=True)"),
    Rule("older tables", facts.of_older_peft, PARTLY, "is read in another way than it was written in",
         "peft/tuners/lora/model.py and lokr/layer.py, PEFT 0.13.2 and 0.14.0", CONVERT),
    Rule("former oft", facts.of_former_oft, NO, "rotates in another way and is not read: train it again",
         "peft/tuners/oft/config.py (check_kwargs), PEFT 0.21.2"),
    Rule("ranks", facts.other_ranks, NO, "is refused as a size mismatch", LOADING, RANKS),
)  # fmt: skip
SILENT = (
    Rule("wrappers", facts.with_wrappers, PARTLY, "is left out with a warning", LOADING, SAVE_AGAIN),
    Rule("targets", facts.not_selected, PARTLY, SILENTLY, LOADING, TARGETS),
)
# Layers that have the names of experts' layers in transformers 4.
EXPERTS = (
    Rule("experts", taken_for_experts, PARTLY,
         "is left out: it is named as an expert's layer was in transformers 4, and the fused experts are adapted instead",
         CONVERSION, CONVERT),
    Rule("experts refused", refused_for_experts, NO,
         "is taken for a part of the fused experts, as it is named as an expert's layer was in transformers 4, and is refused "
         "with these options",
         CONVERSION, f"{CONVERT}, or {MERGE}"),
)  # fmt: skip
RULES = (
    *FORMAT,
    Rule("prefix", facts.without_prefix, PARTLY, "is left out, with a warning at most", LOADING, CONVERT),
    *SILENT,
    *EXPERTS,
)

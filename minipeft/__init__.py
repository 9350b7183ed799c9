"""minipeft: LoRA and its relatives for any torch model, in files that PEFT, transformers and vLLM read.

What it offers stands in `minipeft.api`, which is imported at the first use, and torch with it: so ``minipeft --help``
answers at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

from minipeft.errors import PeftAttributeError, PeftNameError

if TYPE_CHECKING:
    from minipeft.api import *  # noqa: F403

__version__ = "0.1.0"
OF_RANK = "use model.add_weighted_adapter([name], [1.0], new_name, 'svd', svd_rank=rank)"
# What programs import from PEFT, and what to write instead; docs/how-to/from-peft.md has the rest.
OF_PEFT = {
    "AutoPeftModel": "use load_adapter(base, directory) on a base that you load",
    "PeftConfig": "use load_config(directory)",
    "PeftMixedModel": "use get_adapter_model or load_adapter: adapters of any methods go together",
    "PeftModel": "use get_adapter_model(model, config) or load_adapter(base, directory)",
    "PeftType": "a configuration says its method: LoraConfig().method is 'lora'",
    "TaskType": "give the task by its name, as in task_type='CAUSAL_LM'",
    "cast_mixed_precision_params": "leave it out: the adapter's own parameters are float32",
    "convert_to_lora": OF_RANK,
    "get_layer_status": "use model.layer_status()",
    "get_model_status": "use model.adapter_status()",
    "get_peft_config": "write the configuration itself, as in LoraConfig(r=8)",
    "get_peft_model": "use get_adapter_model(model, config)",
    "get_peft_model_state_dict": "use model.get_adapter_state_dict()",
    "inject_adapter_in_model": "use get_adapter_model(model, config)",
    "load_peft_weights": "use load_adapter(model, directory)",
    "prepare_model_for_kbit_training": (
        "leave it out: the base is frozen, and its norms stay in their dtype. For the gradient checkpointing that it "
        "switches on call model.gradient_checkpointing_enable()"
    ),
    "save_as_lora": f"use model.save_pretrained(directory, convert_to_lora=True). For a given rank {OF_RANK}",
    "set_peft_model_state_dict": "use model.set_adapter_state_dict(state), or load_adapter(model, directory)",
}
NO_DATA = "a start that needs data is not implemented; init_lora_weights='pissa' starts from the weights"
OF_PEFT |= dict.fromkeys(
    [
        *("EvaConfig", "LoftQConfig", "LoraGAConfig", "get_eva_state_dict", "initialize_lora_eva_weights"),
        *("preprocess_loraga", "replace_lora_weights_loftq"),
    ],
    NO_DATA,
)


def __getattr__(name: str) -> object:
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    try:
        value = globals()[name] = getattr(importlib.import_module("minipeft.api"), name)
        return value
    except AttributeError:
        message = _instead(name)
        if message is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        # ``from minipeft import name`` looks it up by this function, and would take an AttributeError for "try a submodule".
        is_import = sys._getframe(1).f_code.co_name == "_handle_fromlist"
        error = PeftNameError if is_import else PeftAttributeError
        raise error(message) from None


def _instead(name: str) -> str | None:
    """The message for a name that minipeft does not have; None: nothing is known of it."""
    classes = ("AutoPeftModel", "PeftModel")  # in PEFT one for each task
    known = next((word for word in classes if name.startswith(f"{word}For")), name)
    if known in OF_PEFT:
        return f"minipeft has no {name}, which is PEFT's; {OF_PEFT[known]}."
    if name.endswith("Config"):
        here = ", ".join(other for other in __dir__() if other.endswith("Config") and other != "AdapterConfig")
        return f"minipeft has no {name}; its methods are those of {here}."
    if name.endswith("Model"):
        return f"minipeft has no {name}; use get_adapter_model(model, config)."
    return None


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("minipeft.api").__all__})

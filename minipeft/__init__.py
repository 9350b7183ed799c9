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
# What programs import from PEFT, and what to write instead; docs/how-to/from-peft.md has the rest.
OF_PEFT = {
    "AutoPeftModel": "use load_adapter(base, directory) on a base that you load",
    "PeftConfig": "use load_config(directory)",
    "PeftMixedModel": "use get_adapter_model or load_adapter: adapters of any methods go together",
    "PeftModel": "use get_adapter_model(model, config) or load_adapter(base, directory)",
    "TaskType": "give the task by its name, as in task_type='CAUSAL_LM'",
    "get_peft_model": "use get_adapter_model(model, config)",
    "get_peft_model_state_dict": "use model.get_adapter_state_dict()",
    "inject_adapter_in_model": "use get_adapter_model(model, config)",
    "prepare_model_for_kbit_training": "leave it out: the base is frozen, and its norms stay in their dtype",
    "set_peft_model_state_dict": "use load_adapter(model, directory)",
}


def __getattr__(name: str) -> object:
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    try:
        value = globals()[name] = getattr(importlib.import_module("minipeft.api"), name)
        return value
    except AttributeError:
        instead = OF_PEFT.get("AutoPeftModel" if name.startswith("AutoPeftModel") else name)
        if instead is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        # ``from minipeft import name`` looks it up by this function, and would take an AttributeError for "try a submodule".
        is_import = sys._getframe(1).f_code.co_name == "_handle_fromlist"
        error = PeftNameError if is_import else PeftAttributeError
        raise error(f"minipeft has no {name}, which is PEFT's; {instead}.") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("minipeft.api").__all__})

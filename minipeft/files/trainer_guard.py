"""A transformers Trainer that would lose the best adapter is stopped at its first checkpoint, not after its last step.

Trainer asks ``isinstance(model, PeftModel)`` before it reads an adapter back. For any other model it looks for whole
weights: at the end of training ``load_best_model_at_end`` fails, or, for an adapter in a sub-directory, keeps the last
adapter with a line in the log. A model learns nothing of the trainer it is in, so the call stack is asked.
"""

from __future__ import annotations

import inspect
from typing import Any

from minipeft.errors import StateError


def check_trainer() -> None:
    """Refuse to save for a plain Trainer that is to load the best checkpoint at the end.

    Raises:
        StateError: there is such a trainer among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        trainer = frame.f_locals.get("self") if frame.f_code.co_name == "_save" else None
        if _forgets(trainer):
            raise StateError(
                f"{type(trainer).__name__} with load_best_model_at_end cannot read an adapter back, so nothing was saved; "
                "use minipeft.hf.AdapterTrainer, or class MyTrainer(AdapterTrainerMixin, "
                f"{type(trainer).__name__}), or load_best_model_at_end=False."
            )
        frame = frame.f_back


def _forgets(trainer: Any) -> bool:
    is_trainer = any((c.__module__, c.__name__) == ("transformers.trainer", "Trainer") for c in type(trainer).__mro__)
    if not is_trainer or getattr(trainer, "restores_adapters", False):
        return False
    shards = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # these have checkpoints of their own
    return bool(trainer.args.load_best_model_at_end) and not shards

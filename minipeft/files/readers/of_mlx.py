"""What mlx-lm reads: ``--adapter-path``."""

from __future__ import annotations

from minipeft.files.file_names import MLX_FILE
from minipeft.files.readers import facts
from minipeft.files.readers.contents import Contents
from minipeft.files.readers.rules import CONVERT, NO, Rule

LOADING = "mlx_lm/tuner/utils.py (load_adapters), mlx-lm 0.32.2"
LEAVES = (".lora_a", ".lora_b", ".m")


def other_keys(contents: Contents) -> str | None:
    """A key is not one of mlx-lm's."""
    full = contents.config.get("fine_tune_type") == "full"
    keys = [key for key in contents.weights.shapes if not key.endswith(LEAVES)]
    return facts.one_of(keys) if not full and contents.weights.path.name == MLX_FILE else None


def bad_parameters(contents: Contents) -> str | None:
    """The configuration lacks what a layer is made of."""
    own = contents.config.get("lora_parameters")
    if contents.weights.path.name != MLX_FILE or contents.config.get("fine_tune_type") == "full":
        return None
    known = own if isinstance(own, dict) else {}
    lacking = [f"lora_parameters.{name}" for name in ("rank", "scale", "dropout") if name not in known]
    lacking += [] if "num_layers" in contents.config else ["num_layers"]
    return f"the configuration has no {lacking[0]}, which" if lacking else None


RULES = (
    Rule("format", facts.file_is_not(MLX_FILE), NO, f"is not read; mlx-lm has a format of its own in {MLX_FILE}", LOADING,
         CONVERT),
    Rule("options", bad_parameters, NO, "is required", LOADING, CONVERT),
    Rule("keys", other_keys, NO, "is not an adapter's parameter there", LOADING, CONVERT),
)  # fmt: skip

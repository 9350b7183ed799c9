"""Names that changed inside of a model's layers: two names for one module have one form here.

The forms are those of transformers 5. Both the file's names and the model's are brought to them, so a file of either
version fits a model of either.
"""

from __future__ import annotations

# From ViT and its relatives of transformers 4 (see "ViTModel" in `transformers.conversion_mapping`).
FORMS = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("encoder.layer", "layers"),
)


def one_form(name: str) -> str:
    """A module's name in the form that all its versions share; it may be longer, with what follows it in a key."""
    dotted = f".{name}."
    for old, new in FORMS:
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]

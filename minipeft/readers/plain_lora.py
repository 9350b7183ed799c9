"""What every reader of plain LoRA alone asks for first."""

from __future__ import annotations

from minipeft.files.file_names import WEIGHTS_FILE
from minipeft.readers import facts
from minipeft.readers.rules import MERGE, NO, Rule


def plain_lora(reader: str, loading: str, configuration: str, *options: str) -> tuple[Rule, ...]:
    """The rules for the file, the method and the options that must be there.

    Args:
        reader: its name.
        loading: source of what it says of files.
        configuration: source of what it says of the configuration.
        options: that it needs; by default the rank, alpha and targets.
    """
    convert = f"minipeft convert DIR OUT --for {reader}"
    needed, other = options or ("r", "lora_alpha", "target_modules"), "is no LoRA, and no other method is read"
    return (
        Rule("format", facts.file_is_not(WEIGHTS_FILE), NO, "is not read", loading, "minipeft convert DIR OUT"),
        Rule("method", facts.methods_but("LORA"), NO, other, configuration, MERGE),
        Rule("options", facts.lacks(*needed), NO, "is required", configuration, convert),
    )

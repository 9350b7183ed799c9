"""What transformers reads: ``model.load_adapter``, which builds the layers with PEFT and loads the tensors itself."""

from __future__ import annotations

from minipeft.files.readers import facts
from minipeft.files.readers.keys import Kind
from minipeft.files.readers.of_peft import EXPERTS, FORMAT, SILENT
from minipeft.files.readers.rules import CONVERT, NO, PARTLY, Rule

LOADING = "transformers/integrations/peft.py (load_adapter), transformers 5.23.0"

RULES = (
    *FORMAT,
    Rule("shared state", lambda c: "peft_type 'VERA'" if c.method == "VERA" else None, NO,
         "is refused, as its layers share tensors", "peft/mapping.py (inject_adapter_in_model), PEFT 0.21.2",
         "PeftModel.from_pretrained, or save_pretrained(..., convert_to_lora=True)"),
    Rule("dora", facts.holds(Kind.MAGNITUDE), PARTLY, "is left out: DoRA then runs with the base's own magnitudes", LOADING,
         "PeftModel.from_pretrained, or minipeft merge"),
    Rule("adapter name", facts.with_adapter_name, PARTLY, "is left out, with a report at most", LOADING, CONVERT),
    *SILENT,
    *EXPERTS,
)  # fmt: skip

"""Who reads what minipeft writes, as a table: ``python -m tests.readers_table [--write docs/files.md]``."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import minipeft
from minipeft.files.readers.contents import read_contents
from minipeft.files.readers.names import Reader
from minipeft.files.readers.rules import answer
from minipeft.testing.table import with_table

BEGIN, END = "<!-- python -m tests.readers_table -->", "<!-- end of the readers -->"
LORA, LINEAR = minipeft.LoraConfig, ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {
    "LoRA": LORA(target_modules=LINEAR),
    "rsLoRA": LORA(target_modules=LINEAR, use_rslora=True),
    "`rank_pattern`": LORA(target_modules=LINEAR, rank_pattern={"q_proj": 4}),
    "`alpha_pattern`": LORA(target_modules=LINEAR, alpha_pattern={"q_proj": 4}),
    "DoRA": LORA(target_modules=LINEAR, use_dora=True),
    "a trained bias": LORA(target_modules=LINEAR, bias="lora_only"),
    "`modules_to_save`": LORA(target_modules=LINEAR, modules_to_save=["lm_head"]),
    "new tokens": LORA(target_modules=LINEAR, trainable_token_indices=[3, 5]),
    "an adapted head": LORA(target_modules=[*LINEAR, "lm_head"]),
    "experts in one parameter": LORA(
        target_modules=LINEAR, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    ),
    "PiSSA": LORA(target_modules=LINEAR, init_lora_weights="pissa"),
    "AdaLoRA": minipeft.AdaLoraConfig(target_modules=LINEAR, total_step=10),
    "LoHa": minipeft.LoHaConfig(target_modules=LINEAR),
    "LoKr": minipeft.LoKrConfig(target_modules=LINEAR),
    "(IA)3": minipeft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "OFT": minipeft.OFTConfig(target_modules=LINEAR, oft_block_size=8),
    "VeRA": minipeft.VeraConfig(target_modules=["q_proj", "o_proj"]),
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "attention_bias": True}


def table():
    """One row for each kind of adapter, one column for each program."""
    rows = [["the adapter has", *(reader.value for reader in Reader)], ["---", *[":-:"] * len(Reader)]]
    for kind, config in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            trained(config).save_pretrained(folder)
            contents = read_contents(Path(folder))
            rows.append([kind, *(answer(contents, reader).takes.value for reader in Reader)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def trained(config):
    """A tiny model with such an adapter, whose every value shows."""
    torch.manual_seed(0)
    experts = getattr(config, "target_parameters", None)
    made = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, num_attention_heads=4, num_key_value_heads=2))
    base = made if experts else LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    model = minipeft.get_adapter_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def written(text):
    """The text of the page with the table as it is now."""
    return with_table(text, table(), BEGIN, END)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="put it into this page")
    page = parser.parse_args().write
    if page is None:
        print(table(), end="")
    else:
        page.write_text(written(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    sys.exit(main())

"""How much memory `minipeft merge` takes: a Llama of random weights on disk, an adapter on all its linear layers.

    python benchmarks/merge_memory.py                  # 7B and 1.1B, bfloat16, r=16: needs 30 GB of disk
    python benchmarks/merge_memory.py --size 1.1B
    python benchmarks/merge_memory.py --quick          # a tiny one; nothing is written to results/

Each merge is a process of its own, and its peak is what the kernel says (ru_maxrss), with the interpreter, torch and pages
of mapped files. PEFT loads the model, merges and saves it, at the sizes that fit; its tensors must be ours up to rounding.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rows import Row, compare, show, write_rows
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

MIB = 2**20
SHARD = 2**31  # bytes
BLOCK = 2**22  # random values, repeated
SIZES = {  # hidden, intermediate, layers, vocabulary, and whether PEFT is compared
    "tiny": (64, 96, 2, 100, True),
    "1.1B": (2048, 5632, 22, 32000, True),
    "7B": (4096, 11008, 32, 32000, False),
}
# A process's peak includes that of the one that started it, so a small one does.
LAUNCH = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)
PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def empty_llama(size: str) -> Any:
    """The model without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, vocabulary, _ = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 128),
        vocab_size=vocabulary,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def write_base(model: Any, folder: Path) -> int:
    """Write random weights shard by shard; returns their bytes."""
    block = torch.randn(BLOCK).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Size]] = [{}]
    filled = 0
    for key, tensor in model.state_dict().items():
        if filled + 2 * tensor.numel() > SHARD:
            shards.append({})
            filled = 0
        shards[-1][key], filled = tensor.shape, filled + 2 * tensor.numel()
    weight_map, total = {}, 0
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for key, shape in shapes.items():
            numel = shape.numel()
            tensors[key] = block.repeat(-(-numel // BLOCK))[:numel].reshape(shape).clone()
            total += 2 * numel
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.save_pretrained(folder)
    return total


def write_adapter(model: Any, folder: Path, r: int = 16) -> None:
    """LoRA with random factors on every linear layer but the head."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(r, module.in_features) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, r) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({key.split(".")[-3] for key in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": r, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measured(*command: str) -> tuple[float, float]:
    """Peak resident memory in MiB and seconds of a command."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", LAUNCH, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed: {done.stderr[-2000:]}")
    return int(done.stdout) / 1024, time.perf_counter() - start


def check_equal(ours: Path, peers: Path) -> None:
    """Compare all tensors of two merged models; one bfloat16 step is allowed, since PEFT rounds its update first."""
    one, other = tensors_of(ours), tensors_of(peers)
    assert one.keys() == other.keys()
    for key, file in one.items():
        torch.testing.assert_close(file.get_tensor(key), other[key].get_tensor(key), rtol=2**-6, atol=1e-3)


def tensors_of(folder: Path) -> dict[str, Any]:
    """Key -> the open file that has it."""
    files = [safe_open(path, "pt") for path in folder.glob("*.safetensors")]
    return {key: file for file in files for key in file.keys()}  # noqa: SIM118  # it is not a dictionary


def run(size: str, scratch: Path) -> list[Row]:
    model = empty_llama(size)
    base, adapter, out, peers = (scratch / name for name in ("base", "adapter", "merged", "merged_by_peft"))
    base.mkdir()
    adapter.mkdir()
    torch.manual_seed(0)
    total = write_base(model, base)
    write_adapter(model, adapter)
    arguments = ("--base", str(base), "--adapter", str(adapter), "--out", str(out), "--json")
    memory, seconds = measured(sys.executable, "-m", "minipeft", "merge", *arguments)
    case = f"Llama {size}, bfloat16, r=16 on all linear layers"

    def row(measure: str, unit: str, ours: float, peer: float, name: str) -> Row:
        return compare("merge_memory", case, measure, unit, [ours], [peer], name, "minipeft merge")

    rows = [row("peak resident memory", "MiB", memory, total / MIB, "the base's files")]
    if SIZES[size][-1]:
        peer_memory, peer_seconds = measured(sys.executable, "-c", PEFT_MERGE, str(base), str(adapter), str(peers))
        check_equal(out, peers)
        rows.append(row("peak resident memory", "MiB", memory, peer_memory, "PEFT, load, merge_and_unload, save"))
        rows.append(row("time", "s", seconds, peer_seconds, "PEFT, load, merge_and_unload, save"))
    else:
        print(f"{case} | time | minipeft merge {seconds:.0f} s, {total / 1e9:.1f} GB", flush=True)
    for each in rows:
        show(each)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[size for size in SIZES if size != "tiny"], action="append")
    parser.add_argument("--scratch", type=Path, help="where the models are written for a while")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    rows = []
    for size in ["tiny"] if options.quick else options.size or ["1.1B", "7B"]:
        scratch = Path(tempfile.mkdtemp(dir=options.scratch))
        try:
            rows += run(size, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if not options.quick:
        print(write_rows("merge_memory", rows))


if __name__ == "__main__":
    main()

"""How much memory DPO takes in TRL: the peak of two steps, a fresh process for each subject. One base, not two.

    python benchmarks/dpo_memory.py               # GPT-2 124M, 4 pairs of 256 tokens, float32: needs 6 GiB free
    python benchmarks/dpo_memory.py --quick

All start from one adapter that PEFT has saved, and all take it for their reference. "A second base" is PEFT's model with the
adapter merged into a base of its own as the reference. The losses must agree, or nothing is reported.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from memory import status_mib
from rows import Row, compare, show, write_rows
from subjects import CORE, LEAN, PEFT, SUBJECTS, gpt2, model_name, save_adapter

SECOND = "PEFT, a second base"
COMPARED = (PEFT, SECOND, CORE, LEAN)
LOSS_TOLERANCE = 1e-3  # relative


def shape(quick: bool) -> tuple[int, int]:
    """Pairs in a step, and tokens of each text."""
    return (2, 32) if quick else (4, 256)


def pairs(count: int, tokens: int) -> list[dict[str, str]]:
    chance = random.Random(0)

    def words(number: int) -> str:
        return " ".join(f"w{chance.randrange(4, 100)}" for _ in range(number))

    half = tokens // 2
    return [
        {"prompt": words(half), "chosen": " " + words(half - 1), "rejected": " " + words(half - 1)}
        for _ in range(count)
    ]


def tokenizer(vocabulary: int) -> Any:
    """A token for each word: w4, w5, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}
    known = [*special.values(), *(f"w{place}" for place in range(4, vocabulary))]
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def trainer_of(subject: str, adapter: Path, quick: bool, folder: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from minipeft.hf import AdapterTrainerMixin

    class AdapterDPOTrainer(AdapterTrainerMixin, DPOTrainer):
        pass

    count, tokens = shape(quick)
    name = PEFT if subject == SECOND else subject
    model = SUBJECTS[name](gpt2(quick, use_cache=False), adapter)
    merged = SUBJECTS[name](gpt2(quick, use_cache=False), adapter).merge_and_unload() if subject == SECOND else None
    options = {"max_steps": 2, "per_device_train_batch_size": count, "learning_rate": 1e-3, "logging_steps": 1}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    return (AdapterDPOTrainer if subject in (CORE, LEAN) else DPOTrainer)(
        model=model,
        ref_model=merged,
        args=DPOConfig(str(folder), gradient_checkpointing=False, max_length=tokens, **options, **quiet),
        train_dataset=Dataset.from_list(pairs(2 * count, tokens)),
        processing_class=tokenizer(gpt2_vocabulary(quick)),
    )


def gpt2_vocabulary(quick: bool) -> int:
    return 101 if quick else 50257


def run_subject(subject: str, adapter: Path, quick: bool) -> dict[str, Any]:
    """Two optimizer steps: peak memory in MiB net of the interpreter, and the losses."""
    warnings.simplefilter("ignore")
    import trl.trainer.dpo_trainer  # noqa: F401  (the interpreter's, not the model's)

    interpreter = status_mib("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(subject, adapter, quick, Path(folder))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"peak": status_mib("VmHWM") - interpreter, "losses": losses}


def in_fresh_process(subject: str, adapter: Path, quick: bool) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as process:
        report = process.apply(run_subject, (subject, adapter, quick))
    print(f"{subject}: {report}", flush=True)
    return report


def measure(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        adapter = save_adapter(gpt2(quick), Path(folder))
        reports = {subject: in_fresh_process(subject, adapter, quick) for subject in COMPARED}
    wanted = reports[PEFT]
    for subject, report in reports.items():
        pairs_of_losses = zip(report["losses"], wanted["losses"], strict=True)
        if not all(math.isclose(*pair, rel_tol=LOSS_TOLERANCE) for pair in pairs_of_losses):
            raise SystemExit(
                f"{subject}: losses {report['losses']}, PEFT's are {wanted['losses']}; nothing is reported"
            )
    count, tokens = shape(quick)
    case = f"DPO, {model_name(quick)}, {count} pairs of {tokens} tokens, float32"
    measured = "peak resident memory, net"
    return [
        compare("dpo_memory", case, measured, "MiB", [report["peak"]], [wanted["peak"]], PEFT, subject)
        for subject, report in reports.items()
    ]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, nothing written")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(words)
    torch.set_num_threads(1 if args.quick else args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes started below
    rows = measure(args.quick)
    for row in rows:
        show(row)
    if not args.quick:
        print(write_rows("dpo_memory", rows))


if __name__ == "__main__":
    main()

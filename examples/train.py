"""Adapt a causal language model to a text, with LoRA or another method, and show that it worked.

    accelerate launch examples/train.py                  # the embedded GPT-2 learns to write Python; needs no network
    accelerate launch examples/train.py --quick          # the same in 30 updates
    accelerate launch examples/train.py --train_file my.txt --model_name path/or/name
    accelerate launch examples/train.py --model_name gpt2 --dataset_name Salesforce/wikitext \
        --dataset_config wikitext-2-raw-v1 --lines       # from the Hugging Face Hub
    accelerate launch examples/train.py --config run.yaml --save_every 100 --resume

It leaves in --output_dir: the adapter, metrics.jsonl, training_loss_curve.png, samples.txt, train_config.yaml and, with
--save_every, checkpoints from which --resume goes on as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import resource
import sys
import tempfile
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import GradientAccumulationPlugin, set_seed
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

import minipeft
from minipeft import registry
from minipeft.training.data.encoding import Encoding, check_fit
from minipeft.training.data.examples import Examples, encode
from minipeft.training.data.order import Update, UpdateOrder
from minipeft.training.data.sources import Source, held_out_split, open_source
from minipeft.training.data.stream import StreamOrder
from minipeft.training.distributed import deepspeed
from minipeft.training.distributed.launch import check_processes, join_after_restart, must_use_cpu, restarts
from minipeft.training.distributed.ranks import agree
from minipeft.training.distributed.sharding import is_sharded, shard
from minipeft.training.lora_plus import lora_plus_groups
from minipeft.training.runs.checkpoints import Checkpoints
from minipeft.training.runs.curve import plot_losses
from minipeft.training.runs.interrupt import EXIT_CODE, Interrupt
from minipeft.training.runs.lock import RunLock
from minipeft.training.runs.metrics import Metrics
from minipeft.training.runs.run_state import Progress, TrainingState
from minipeft.training.updates import Updater, evaluate

Texts = dict[str, Examples | Source]  # by part: "train", "eval", perhaps "docs"; a Source where it is streaming
ASSETS = Path(__file__).resolve().parent / "assets"
EMBEDDED_MODEL = ASSETS / "tiny"
EMBEDDED_TARGETS = "c_attn,c_proj,c_fc"  # so small a model needs more than its attention to change its language
CORPUS = ASSETS / "corpus"
EMBEDDED_TEXT = {"train": CORPUS / "code-train.txt.gz", "eval": CORPUS / "code-eval.txt.gz"}
EMBEDDED_TEXT["docs"] = CORPUS / "docs-eval.txt.gz"  # held out from what the base was trained on
EMBEDDED_PROMPTS = ("def read(self", "class Reader", "The file")
# What methods call that which a flag says, the first that there is.
NAMES = {"rank": ("target_r", "r"), "alpha": ("lora_alpha", "alpha"), "dropout": ("lora_dropout", "vera_dropout")}
# The first treats the embedded model's layers in two ways, and knows GPT-2's; the second is for its embedding.
WITH_OWN_TARGETS = ("ia3", "trainable_tokens")
UNKNOWN_UPDATES = 2**31  # until the text has been counted
WARMUP, CLIP = 0.1, 1.0  # share of the updates; gradient norm
QUICK_UPDATES, QUICK_EVAL_EXAMPLES = 30, 48
SAMPLE_TOKENS = 64
TOLERANCES = {"reloaded": 1e-6, "merged": 1e-5}  # as shares of the largest logit
INT8_TOLERANCE = 5e-2  # bitsandbytes' int8 layers round what they are given, a merged one does not
# Flags that say where and how to run, not what is computed: they may change when a run goes on.
FREE = {
    "output_dir",
    "resume",
    "overwrite",
    "save_every",
    "keep",
    "log_with",
    "config",
    "quick",
    "text",
    "embedded_text",
}
FREE |= {"train_file", "eval_file", "dataset_name", "dataset_config"}  # the text is compared by what it says


def fail(message: str) -> NoReturn:
    """Stop with one line on stderr and exit code 1; of several processes the first one says it."""
    first = os.environ.get("RANK", "0") == "0"
    raise SystemExit(f"train.py: error: {' '.join(message.split())}" if first else 1)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except minipeft.MinipeftError as error:
        fail(str(error))


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config = adapter_config(args)
    accelerator = make_accelerator(args)
    datasets.disable_progress_bars()  # one progress bar is enough: ours
    transformers.utils.logging.disable_progress_bar()

    set_seed(args.seed)
    tokenizer, model = load_base(args)
    with accelerator.main_process_first():  # the others find what the first has cached
        texts = load_texts(args, tokenizer, model)
    updates = count_updates(args, accelerator, texts["train"])
    if hasattr(config, "total_step") and "total_step" not in (args.method_options or ""):
        config = dataclasses.replace(config, total_step=updates)  # what the method's schedule is made for
    model = minipeft.get_adapter_model(model, config)
    accelerator.print(describe(args, model, texts))

    with the_only_run(args, accelerator):
        prompts = choose_prompts(args, tokenizer, texts["eval"])
        before = sample(args, model.to(accelerator.device), tokenizer, prompts)
        run = Run(args, accelerator, model, tokenizer, texts, updates)
        run.train()
        run.save_adapter()
        after = sample(args, model, tokenizer, prompts)
        if accelerator.is_main_process:
            show_samples(args, prompts, before, after)
            show_perplexities(run.metrics.rows)
            method = f"LoRA of rank {args.rank}" if args.method == "lora" else args.method
            title = f"{Path(args.model_name).name} on {args.text}, {method}"
            plot_losses(run.metrics.rows, args.output_dir / "training_loss_curve.png", title)
        check_adapter(args, accelerator, model, texts["eval"])
        accelerator.print(
            f"written to {args.output_dir}: the adapter, metrics.jsonl, training_loss_curve.png, samples.txt"
        )
        accelerator.wait_for_everyone()
        accelerator.end_training()


# ---------------------------------------------------------------------------------------------------- what was asked
class Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)")


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--config", type=Path, help="YAML file of flags by name; flags given here override it")
    flag("--model_name", help="Hub name or local directory (default: the embedded GPT-2 of 1 M parameters)")
    flag("--method", default="lora", help=f"{', '.join(registry.method_names())} (%(default)s)")
    flag("--method_options", help="more of its options as YAML, such as '{tinit: 20, tfinal: 50}' of adalora")
    flag("--rank", type=int, help="(default: 8 for LoRA, else the method's own)")
    flag(
        "--alpha", type=float, help="the update is scaled by alpha / rank (default: 16 for LoRA, else the method's own)"
    )
    flag("--dropout", type=float, help="of the adapter's input (default: none); the base keeps its own")
    flag("--target_modules", help=f"a,b,c or all-linear (default: minipeft's; the embedded model: {EMBEDDED_TARGETS})")
    flag("--num_epochs", type=int, default=3)
    flag("--max_steps", type=int, default=0, help="number of updates; if > 0 it overrides --num_epochs")
    flag("--batch_size", type=int, default=8, help="examples a process and forward pass (%(default)s)")
    flag("--gradient_accumulation_steps", type=int, default=1, help="forward passes an update (%(default)s)")
    flag("--auto_batch", action="store_true", help="where memory runs out, halve the first and double the second")
    flag("--learning_rate", type=float, default=1e-3, help="after the warm-up (%(default)s)")
    flag("--lora_plus_ratio", type=float, default=1.0, help="B learns so many times faster than A (arXiv:2402.12354)")
    flag("--weight_decay", type=float, default=0.01)
    flag("--max_length", type=int, default=128, help="tokens an example has at most (%(default)s)")
    flag("--mixed_precision", choices=("no", "bf16", "fp16"), help="(default: what accelerate launch was told)")
    flag("--lean", action="store_true", help="the same training in less memory and time, see minipeft.lean")
    flag("--checkpointing", choices=("none", "last", "mlp", "block"), help="what to compute again; implies --lean")
    flag("--quantize", choices=("nf4", "fp4", "int8", "int8_weight_only"), help="hold the base in 4 or 8 bits (QLoRA)")
    flag("--fsdp", action="store_true", help="divide base and adapter over the processes (FSDP2)")
    flag("--train_file", type=Path, help="text, JSON lines or a folder (default: the embedded Python code)")
    flag("--eval_file", type=Path, help="(default: the last 5 percent of the examples)")
    flag("--dataset_name", help="data set of the Hub, or a folder from save_to_disk")
    flag("--dataset_config")
    flag("--lines", action="store_true", help="rows with 'text' are lines that follow each other, not documents")
    flag("--packing", action=BooleanOptionalAction, help="join texts and cut them into blocks (default: for text only)")
    flag("--overlong", choices=("error", "truncate", "drop"), default="error", help="prompts and chats > --max_length")
    flag("--streaming", action="store_true", help="read the text while training; needs --max_steps")
    flag("--output_dir", type=Path, help="(default: output/<model>-<text>)")
    flag("--overwrite", action="store_true", help="begin anew in a directory that holds a run")
    flag("--save_every", type=int, default=0, help="updates from one checkpoint to the next (default: none)")
    flag("--keep", type=int, default=2, help="checkpoints to keep (%(default)s)")
    flag("--resume", nargs="?", const="latest", help="go on from the latest checkpoint, or from the one of this path")
    flag("--eval_every", type=int, default=0, help="updates from one evaluation to the next (default: an epoch)")
    flag("--log_with", help=f"trackers: {', '.join(LOGGER_TYPE_TO_CLASS)}")
    flag("--seed", type=int, default=0)
    flag("--quick", action="store_true", help=f"{QUICK_UPDATES} updates, if --max_steps is not given; short evaluation")
    return parser


def parse_args(argv: list[str] | None) -> Namespace:
    parser = make_parser()
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    if args.config:
        args = parser.parse_args([*flags_of(args.config, parser), *words])
    lowest = {"num_epochs": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 2, "seed": 0}
    lowest |= {"max_steps": 0, "save_every": 0, "eval_every": 0, "keep": 1}
    for name, low in lowest.items():
        if not low <= vars(args)[name] < 2**31:
            fail(f"--{name} {vars(args)[name]}: give a number from {low} to {2**31 - 1}.")
    if not 0 < args.learning_rate < math.inf or not 0 <= args.weight_decay < math.inf:
        fail(f"--learning_rate {args.learning_rate} must be above 0, --weight_decay {args.weight_decay} at least 0.")
    if args.dataset_name and (args.train_file or args.eval_file):
        fail("--dataset_name and --train_file or --eval_file exclude each other; give one of them.")
    if (args.dataset_config and not args.dataset_name) or (args.eval_file and not args.train_file):
        fail("--dataset_config goes with --dataset_name, and --eval_file with --train_file; give both.")
    for path in filter(None, (args.train_file, args.eval_file)):
        if not path.exists() or (path.is_file() and path.stat().st_size == 0):
            fail(f"{path}: no such file, or an empty one; --train_file and --eval_file take the path of a text.")
    if args.resume and args.overwrite:
        fail("--resume goes on with a run, and --overwrite begins anew; give one of them.")
    if args.quantize and args.fsdp:
        fail("--quantize does not go with --fsdp, which cannot cut packed weights up; leave one out.")
    if args.auto_batch and args.fsdp:
        fail("--auto_batch does not go with --fsdp, whose processes wait for each other within a pass; leave one out.")
    for name in filter(None, (args.log_with or "").split(",")):
        check_tracker(name)
    fill_in(args)
    if args.streaming and not args.max_steps:
        fail("--streaming: nobody knows how long the text is; give --max_steps.")
    check_writable(args.output_dir)
    return args


def flags_of(file: Path, parser: Parser) -> list[str]:
    """The flags that a YAML file gives."""
    try:
        values = yaml.safe_load(file.read_text("utf-8")) or {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        fail(f"--config {file}: cannot be read as YAML ({reason(error)}).")
    if not isinstance(values, dict) or not all(
        isinstance(value, str | int | float | None) for value in values.values()
    ):
        fail(f"--config {file}: give one value for each flag, such as 'rank: 8'.")
    words = []
    for name, value in values.items():
        if name == "packing" and value is False:
            words.append("--no-packing")
        elif value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words.append(f"--{name}={value}")
        elif name not in vars(parser.parse_args([])):
            fail(f"--config {file}: there is no flag --{name} (--help lists the flags)")
    return words


def check_tracker(name: str) -> None:
    """Accelerate leaves a tracker out, and says nothing, where its package is missing."""
    if name not in LOGGER_TYPE_TO_CLASS:
        fail(f"--log_with {name}: no such tracker; there are {', '.join(LOGGER_TYPE_TO_CLASS)}.")
    if name not in [str(kind) for kind in accelerate_trackers()]:
        fail(f"--log_with {name}: its package is not installed; pip install {name}, or leave the flag out.")


def accelerate_trackers() -> list[Any]:
    from accelerate.tracking import get_available_trackers

    return list(get_available_trackers())


def fill_in(args: Namespace) -> None:
    """Defaults that depend on other flags."""
    args.embedded_text = not (args.train_file or args.dataset_name)
    args.text = args.dataset_name or ("code" if args.embedded_text else args.train_file.name)
    args.lean = args.lean or args.checkpointing is not None
    if args.model_name is None:
        args.model_name = str(EMBEDDED_MODEL)
        if args.target_modules is None and args.method not in WITH_OWN_TARGETS:
            args.target_modules = EMBEDDED_TARGETS
    if args.method == "lora":
        args.rank, args.alpha, args.dropout = (
            default if value is None else value
            for value, default in ((args.rank, 8), (args.alpha, 16.0), (args.dropout, 0.0))
        )
    if args.quick and args.max_steps <= 0:
        args.max_steps = QUICK_UPDATES
    if args.output_dir is None:
        args.output_dir = Path("output") / f"{Path(args.model_name).name}-{Path(args.text).name.split('.')[0]}"


def check_writable(directory: Path) -> None:
    """Write a file where the results will go, or in the nearest directory above that is there already."""
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        fail(f"--output_dir {directory}: {place} cannot be written ({error.strerror}); choose another directory.")
    if (directory / "config.json").exists():
        fail(
            f"--output_dir {directory} holds a config.json, as a whole model does; give the adapter a directory of its own."
        )


def adapter_config(args: Namespace) -> minipeft.AdapterConfig:
    """The method's configuration, with the names that it has for what flags say."""
    registry.load_plugins()
    cls = registry.method_class(args.method).config_class
    known = {field.name for field in dataclasses.fields(cls)}
    targets = args.target_modules
    if targets is not None and targets != "all-linear":
        targets = [name.strip() for name in targets.split(",")]
    options = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    if "total_step" in known:
        options["total_step"] = args.max_steps or UNKNOWN_UPDATES
    for flag, names in NAMES.items():
        name = next((name for name in names if name in known), None)
        if name is None and getattr(args, flag) is not None:
            fail(f"--{flag}: {args.method} has no such option; leave it out.")
        if name is not None and getattr(args, flag) is not None:
            options[name] = getattr(args, flag)
    return cls(**options | method_options(args))


def method_options(args: Namespace) -> dict[str, Any]:
    try:
        options = yaml.safe_load(args.method_options or "{}")
    except yaml.YAMLError as error:
        fail(f"--method_options {args.method_options}: no YAML ({reason(error)}).")
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        fail(f"--method_options {args.method_options}: give a mapping, such as '{{init_r: 12}}'.")
    return options


# ------------------------------------------------------------------------------------------ accelerator, model, text
def make_accelerator(args: Namespace) -> Accelerator:
    with_deepspeed = deepspeed.asked_for()
    join_after_restart()
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            cpu=None if with_deepspeed else must_use_cpu() or None,
            kwargs_handlers=deepspeed.process_group_options() if with_deepspeed else None,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the Updater accumulates
            log_with=args.log_with.split(",") if args.log_with else None,
            project_dir=args.output_dir,
        )
    except ImportError as error:
        fail(str(error))
    except ValueError as error:
        fail(f"DeepSpeed: {error}" if with_deepspeed else f"--mixed_precision {args.mixed_precision}: {error}")
    check_processes(accelerator.num_processes, sys.argv[0])
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        fail("--mixed_precision fp16 does nothing on a CPU; give bf16 or no.")
    if with_deepspeed:
        check_deepspeed(args, accelerator)
    if accelerator.distributed_type.value in ("FSDP", "MEGATRON_LM"):
        fail(
            f"accelerate is configured for {accelerator.distributed_type.value}; configure plain data parallelism, and give --fsdp here."
        )
    return accelerator


def check_deepspeed(args: Namespace, accelerator: Accelerator) -> None:
    """Refuse the flags that do not go with DeepSpeed, and tell it what the others say."""
    if args.save_every or args.resume:
        fail("--save_every and --resume do not go with DeepSpeed, which cuts up the optimizer's state; leave them out.")
    if args.fsdp or args.auto_batch:
        fail("--fsdp and --auto_batch do not go with DeepSpeed; leave them out.")
    deepspeed.configure(accelerator, args.batch_size, CLIP)


def load_base(args: Namespace) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The base that was named, in float32; never another one."""
    name = args.model_name
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers', the Hub's and the file system's
        fail(
            f"--model_name {name}: neither a model directory nor to be had from the Hub ({reason(error)}); "
            "check the name and the network, or leave the flag out for the embedded model."
        )
    if info["missing_keys"]:
        fail(f"--model_name {name}: no weights for {min(info['missing_keys'])}; name a causal language model.")
    if args.quantize:
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line a call in int8
        model = minipeft.quantize(model, args.quantize)
    return tokenizer, model


def load_texts(args: Namespace, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Texts:
    """Examples to train on and to evaluate on; by default also of the text that the base was trained on."""
    encoding = Encoding(args.max_length, args.packing, args.overlong)
    check_fit(args.max_length, 0, model.config)

    def encoded(data: Any, split: str = "train") -> Examples:
        options = {"lines": True} if args.lines else {}
        return encode(open_source(data, args.dataset_config, split, **options), tokenizer, encoding)

    if args.embedded_text:
        texts: Texts = {part: encoded(path) for part, path in EMBEDDED_TEXT.items()}
        if args.model_name != str(EMBEDDED_MODEL):
            texts.pop("docs")
        if args.streaming:
            texts["train"] = open_source(EMBEDDED_TEXT["train"], streaming=True)
    else:
        data = args.dataset_name or args.train_file
        held_out = None if args.eval_file else held_out_split(data, args.dataset_config)
        if args.streaming:
            if not (args.eval_file or held_out):
                fail("--streaming: a stream has no end to hold out for the evaluation; give an --eval_file.")
            texts = {"train": open_source(data, args.dataset_config, streaming=True, lines=args.lines)}
        else:
            texts = {"train": encoded(data)}
        if args.eval_file or held_out:
            texts["eval"] = encoded(args.eval_file) if args.eval_file else encoded(data, held_out)
        else:
            texts["train"], texts["eval"] = texts["train"].hold_out()
    args.held_out = not (args.embedded_text or args.eval_file or held_out)
    for part, text in texts.items():
        if isinstance(text, Examples):
            check_fit(args.max_length, text.largest_id, model.config)
            if args.quick and part != "train":
                texts[part] = text.select(0, min(len(text), QUICK_EVAL_EXAMPLES))
    return texts


def update_size(args: Namespace, accelerator: Accelerator) -> int:
    """Examples that an update takes, on all processes."""
    return args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def count_updates(args: Namespace, accelerator: Accelerator, text: Examples | Source) -> int:
    if args.max_steps or not isinstance(text, Examples):
        return args.max_steps
    return args.num_epochs * math.ceil(len(text) / update_size(args, accelerator))


def reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def describe(args: Namespace, model: minipeft.AdaptedModel, texts: Texts) -> str:
    trainable, total = model.get_nb_trainable_parameters()
    numbers = {"total": total, "trainable": trainable, "frozen": total - trainable}
    lines = [f"model: {args.model_name}", f"{'parameters':<12}{'number':>16}{'percent':>10}"]
    lines += [f"{name:<12}{number:>16,}{100 * number / total:>10.2f}" for name, number in numbers.items()]
    for part, text in texts.items():
        told = text.describe() if isinstance(text, Examples) else "a stream"
        lines.append(f"text {args.text}, to {'train' if part == 'train' else 'evaluate'} on ({part}): {told}")
    if args.held_out:
        lines.append("no evaluation text: the last 5 percent of the examples are held out for it")
    return "\n".join(lines)


@contextlib.contextmanager
def the_only_run(args: Namespace, accelerator: Accelerator) -> Iterator[None]:
    """Hold the output directory for this run alone, from before its first byte is written."""
    with contextlib.ExitStack() as stack:
        error = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(RunLock(args.output_dir))
                check_unused(args)
            except minipeft.MinipeftError as caught:
                error = caught
        agree(error)
        yield


def check_unused(args: Namespace) -> None:
    """A run that is there is gone on with, or replaced on purpose, or left alone."""
    found = [
        name for name in ("adapter_config.json", "metrics.jsonl", "checkpoints") if (args.output_dir / name).exists()
    ]
    if found and not (args.resume or args.overwrite or restarts()):
        raise minipeft.StateError(
            f"--output_dir {args.output_dir} holds a run already ({', '.join(found)}): --resume goes on with it, "
            "--overwrite begins anew, or choose another directory."
        )
    if args.overwrite and not restarts():
        Checkpoints(args.output_dir).discard_newer(-1)


# ---------------------------------------------------------------------------------------------------------- training
class Run:
    """A training run: what it is made of, and where it stands."""

    def __init__(
        self,
        args: Namespace,
        accelerator: Accelerator,
        model: minipeft.AdaptedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Texts,
        updates: int,
    ) -> None:
        self.updates = updates
        self.args, self.accelerator, self.model = args, accelerator, model
        if args.lean:
            minipeft.lean(model, args.checkpointing)
        if args.fsdp:
            shard(model, accelerator.device)
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        if args.lora_plus_ratio != 1:
            groups = lora_plus_groups(model, args.learning_rate, args.lora_plus_ratio, args.weight_decay)
        optimizer = AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay)

        size = update_size(args, accelerator)
        train = texts.pop("train")
        self.texts = {part: text for part, text in texts.items() if isinstance(text, Examples)}
        if isinstance(train, Examples):
            self.order: UpdateOrder | StreamOrder = UpdateOrder(train, size, args.seed)
            self.epoch_updates = self.order.updates_per_epoch
        else:
            encoding = Encoding(args.max_length, args.packing, args.overlong)
            self.order = StreamOrder(train, tokenizer, encoding, size, args.seed)
            self.epoch_updates = 0
        self.eval_every = args.eval_every or self.epoch_updates or self.updates

        # The schedule counts updates, so it is not prepared: accelerate would step it once a process.
        self.scheduler: LRScheduler = get_scheduler("linear", optimizer, math.ceil(WARMUP * self.updates), self.updates)
        self.checkpoints = Checkpoints(args.output_dir, args.keep)
        self.state, engine = None, None
        if accelerator.deepspeed_plugin is None:
            self.optimizer = accelerator.prepare_optimizer(optimizer)
            self.state = TrainingState(
                model, optimizer, self.scheduler, scaler=accelerator.scaler, config=self.what_is_computed(train)
            )
        else:  # it cuts the optimizer's state up, so that there are no checkpoints
            engine, self.optimizer = deepspeed.prepare(accelerator, model, optimizer)
        self.updater = Updater(
            accelerator, model, self.optimizer, micro_batch=args.batch_size, clip=CLIP, auto_batch=args.auto_batch,
            engine=engine,
        )  # fmt: skip

    def what_is_computed(self, train: Examples | Source) -> dict[str, Any]:
        """The part of the configuration that must be the same when the run goes on."""
        values = {name: value for name, value in vars(self.args).items() if name not in FREE}
        texts = {"train": train, **self.texts}
        found = {part: text.fingerprint if isinstance(text, Examples) else "a stream" for part, text in texts.items()}
        return {**values, "data": found, "mixed_precision": self.accelerator.mixed_precision}

    def train(self) -> None:
        """Train the adapter, from the beginning or from a checkpoint."""
        set_seed(self.args.seed, device_specific=True)  # the processes drop out different units
        progress = self.resume()
        folder = self.args.output_dir
        self.metrics = Metrics(folder if self.accelerator.is_main_process else None, progress.step)
        if self.accelerator.is_main_process:
            settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.args).items()}
            once = {"config", "resume", "overwrite"}  # of this start of the run; to repeat them unasked could do harm
            flags = vars(make_parser().parse_args([])).keys() - once
            settings = {name: value for name, value in settings.items() if name in flags}
            (folder / "train_config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
        if self.args.log_with:
            self.accelerator.init_trackers("minipeft", json.loads(json.dumps(vars(self.args), default=str)))
        interrupt = Interrupt()
        try:
            self.train_from(progress.step, interrupt)
        finally:
            interrupt.restore()
            self.metrics.close()

    def resume(self) -> Progress:
        """Go on from a checkpoint, if that was asked for, or if this is what a restarted launch has to do."""
        if not self.args.resume and not restarts():
            return Progress(0, None)
        by_path = self.args.resume not in (None, "latest")
        folder = Path(self.args.resume) if by_path else self.checkpoints.latest()
        if folder is None:
            if self.args.resume and not restarts():
                fail(
                    f"--resume: there is no complete checkpoint in {self.checkpoints.folder}; leave the flag out to begin."
                )
            return Progress(0, None)
        progress = self.state.restore(folder)
        if by_path and self.accelerator.is_main_process:
            self.checkpoints.discard_newer(progress.step)
        self.accelerator.wait_for_everyone()
        self.updater.micro_batch = progress.position["micro_batch"]
        if isinstance(self.order, StreamOrder):
            self.order.restore(progress.position["data"])
        self.accelerator.print(f"going on from {folder}, after update {progress.step} of {self.updates}")
        return progress

    def train_from(self, done: int, interrupt: Interrupt) -> None:
        if done == 0:
            self.evaluate(0)
        updates = self.order if isinstance(self.order, StreamOrder) else self.order.iterate(done)
        main = self.accelerator.is_main_process
        with tqdm(total=self.updates, initial=done, desc="training", unit="update",
                  disable=not main or not sys.stderr.isatty()) as bar:  # fmt: skip
            for step, update in zip(range(done + 1, self.updates + 1), updates, strict=False):
                row = self.update(step, update)
                bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{row['learning_rate']:.1e}")
                bar.update()
                if bar.disable and main and (step % max(1, self.updates // 20) == 0 or step == self.updates):
                    print("update {}/{}: loss={:.3f} lr={:.1e} {:.0f} tokens/s, {:.0f} MiB".format(
                        step, self.updates, *list(row.values())[2:]), flush=True)  # fmt: skip
                if step % self.eval_every == 0 or step == self.updates:
                    self.evaluate(step)
                stopped = interrupt.came(self.accelerator.device)
                if stopped or (self.args.save_every and (step % self.args.save_every == 0 or step == self.updates)):
                    self.save(step)
                if stopped and step < self.updates:
                    goes_on = "" if self.state is None else "; --resume goes on"
                    self.accelerator.print(f"stopped by SIGTERM after update {step} of {self.updates}{goes_on}")
                    raise SystemExit(EXIT_CODE)

    def update(self, step: int, update: Update) -> dict[str, float]:
        started = time.perf_counter()
        self.model.train()
        rate = self.scheduler.get_last_lr()[0]
        loss = finite(self.updater(update))
        if not self.optimizer.step_was_skipped:  # as a gradient scaler does after an overflow
            self.scheduler.step()
        speed = update.tokens / (time.perf_counter() - started)
        row = {"loss": loss, "learning_rate": rate, "tokens_per_second": round(speed, 1)}
        row["peak_memory_mib"] = round(peak_memory(self.accelerator.device), 1)
        return self.write(step, row)

    def evaluate(self, step: int) -> None:
        losses = {
            part: finite(evaluate(self.accelerator, self.model, text, self.updater.micro_batch))
            for part, text in self.texts.items()
        }
        scores = {"eval_loss": losses["eval"], "eval_perplexity": math.exp(losses["eval"])}
        if "docs" in losses:
            scores["docs_perplexity"] = math.exp(losses["docs"])
        row = self.write(step, scores)
        if self.accelerator.is_main_process:
            line = "epoch {:.2f}, update {}: eval loss {:.4f}, perplexity {:.2f}"
            tqdm.write(line.format(row["epoch"], step, scores["eval_loss"], scores["eval_perplexity"]))

    def write(self, step: int, row: dict[str, float]) -> dict[str, float]:
        row = {"step": step, "epoch": round(step / self.epoch_updates, 4) if self.epoch_updates else 0, **row}
        self.metrics.write(row)
        self.accelerator.log(row, step=step)
        return row

    def save(self, step: int) -> None:
        """Save a checkpoint; where that fails the checkpoints before it are intact, and the run goes on."""
        if self.state is None:  # and SIGTERM came
            self.accelerator.print("train.py: warning: no checkpoint: DeepSpeed's runs have none", file=sys.stderr)
            return
        data = self.order.state() if isinstance(self.order, StreamOrder) else None
        try:
            self.state.save(self.checkpoints, step, {"micro_batch": self.updater.micro_batch, "data": data})
        except minipeft.CheckpointError as error:
            self.accelerator.print(f"train.py: warning: no checkpoint: {error}", file=sys.stderr)

    def save_adapter(self) -> None:
        if is_sharded(self.model):
            self.state.save_adapter(self.args.output_dir)
        else:
            with deepspeed.whole_adapter(self.accelerator, self.model):
                if self.accelerator.is_main_process:
                    self.model.save_pretrained(self.args.output_dir)
        self.accelerator.wait_for_everyone()


def finite(loss: float) -> float:
    """A loss that JSON and exp() can take; beyond 100 nats a token there is nothing left to train."""
    if not loss < 100:
        fail(f"the loss is {loss}: training diverged; lower --learning_rate or --alpha.")
    return loss


def peak_memory(device: torch.device) -> float:
    """MiB that this process has had at most: of the GPU, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# --------------------------------------------------------------------------------------------------- what came of it
def choose_prompts(args: Namespace, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> list[str]:
    """Openings to continue: of code for the embedded text, else of held-out examples."""
    if args.embedded_text:
        return list(EMBEDDED_PROMPTS)
    rows = examples.rows(range(min(3, len(examples))))
    return [tokenizer.decode(row.input_ids[: min(16, max(1, len(row.input_ids) // 2))]) for row in rows]


@torch.no_grad()
def sample(
    args: Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[str]:
    """Continue each prompt, with the same random numbers at each call; every process does, since a model may be sharded."""
    model.eval()
    texts = []
    for prompt in prompts:
        set_seed(args.seed)
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
        length = max(1, min(SAMPLE_TOKENS, args.max_length - inputs["input_ids"].shape[1]))
        options = {"min_new_tokens": length, "max_new_tokens": length, "pad_token_id": tokenizer.eos_token_id}
        ids = model.generate(**inputs, do_sample=True, temperature=0.7, top_k=20, **options)
        texts.append(tokenizer.decode(ids[0]))
    return texts


def show_samples(args: Namespace, prompts: list[str], before: list[str], after: list[str]) -> None:
    pairs = zip(prompts, before, after, strict=True)
    text = "\n".join(f"=== {prompt!r}, before:\n{old}\n--- {prompt!r}, after:\n{new}\n" for prompt, old, new in pairs)
    (args.output_dir / "samples.txt").write_text(text, "utf-8")
    print(text)


def show_perplexities(rows: list[dict[str, Any]]) -> None:
    evaluations = [row for row in rows if "eval_loss" in row]
    for key, what in (("eval", "held-out text"), ("docs", "documentation, what the base was trained on")):
        found = [row[f"{key}_perplexity"] for row in evaluations if f"{key}_perplexity" in row]
        if found:
            print(f"perplexity on {what}: {found[0]:.2f} before, {found[-1]:.2f} after")


@torch.no_grad()
def check_adapter(args: Namespace, accelerator: Accelerator, model: PreTrainedModel, examples: Examples) -> None:
    """Hold the saved adapter, reloaded into a fresh base and then merged, against the model that was trained."""
    ids = torch.tensor(examples.rows([0])[0].input_ids, dtype=torch.int64, device=accelerator.device)[None]

    def compute_logits(model: PreTrainedModel) -> Tensor:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()

    trained = compute_logits(model.eval())
    if not accelerator.is_main_process:
        return
    fresh = minipeft.load_adapter(load_base(args)[1].to(ids.device).eval(), args.output_dir)
    logits = {"reloaded": compute_logits(fresh)}
    logits["merged"] = compute_logits(fresh.merge_and_unload(untie=True, dequantize=bool(args.quantize)))
    largest = trained.abs().max().item()
    tolerances = TOLERANCES | ({"merged": INT8_TOLERANCE} if args.quantize == "int8" else {})
    for name, tolerance in tolerances.items():
        difference, allowed = (logits[name] - trained).abs().max().item(), tolerance * largest
        print(f"{name} against trained model: logits differ by {difference:.1e}; allowed {allowed:.1e}")
        if not difference <= allowed:
            fail(f"the {name} adapter is not the one that was trained; please report this.")


if __name__ == "__main__":
    main()

r"""Adapt a causal language model to a text, with LoRA or another method, and show that it worked.

    accelerate launch examples/train.py                  # the embedded GPT-2 learns to write Python; needs no network
    accelerate launch examples/train.py --quick          # the same in 30 updates
    accelerate launch examples/train.py --train_file my.txt --model_name path/or/name
    accelerate launch examples/train.py --model_name gpt2 --dataset_name Salesforce/wikitext \
        --dataset_config wikitext-2-raw-v1 --lines       # from the Hugging Face Hub
    accelerate launch examples/train.py --config run.yaml --save_every 100 --resume
    accelerate launch examples/train.py --model_name Qwen/Qwen3-8B --train_file chats.jsonl --dtype bf16 \
        --gradient_checkpointing --optim adamw_torch_fused --lr_scheduler_type cosine --max_length 2048

Preferences (DPO, KTO, GRPO) are for TRL's trainers, which take an adapted model: see docs/training.md.

It leaves in --output_dir: the adapter, metrics.jsonl, training_loss_curve.png, samples.txt, train_config.yaml and, with
--save_every, checkpoints from which --resume goes on as if nothing had happened.
"""

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import transformers
import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

import minipeft
from minipeft.config.options import integer
from minipeft.files.atomic import write_files
from minipeft.files.hub import create_repo
from minipeft.registry import registry
from minipeft.training import optimizers, report
from minipeft.training.base_model import DTYPES, load_base
from minipeft.training.data.encoding import Encoding
from minipeft.training.data.examples import Examples
from minipeft.training.data.order import Update, UpdateOrder
from minipeft.training.data.packing import Packed
from minipeft.training.data.sources import Source
from minipeft.training.data.stream import StreamOrder
from minipeft.training.data.texts import Texts, read_texts
from minipeft.training.distributed import deepspeed
from minipeft.training.distributed.accelerator import start_accelerator
from minipeft.training.distributed.ranks import EXIT_CODE, Interrupt
from minipeft.training.distributed.sharding import is_sharded, shard
from minipeft.training.flags import compared_values, flag, parse_flags, saved_values
from minipeft.training.method_config import check_agrees, method_config
from minipeft.training.runs.checkpoints import Checkpoints
from minipeft.training.runs.metrics import Metrics
from minipeft.training.runs.output_dir import check_writable, checkpoint_to_resume, the_only_run
from minipeft.training.runs.run_state import TrainingState
from minipeft.training.runs.saved_run import is_finished
from minipeft.training.updates import Updater, evaluate

ASSETS = Path(__file__).resolve().parent / "assets"
EMBEDDED_MODEL = ASSETS / "tiny"  # pretrained on the Python documentation
EMBEDDED_TARGETS = "c_attn,c_proj,c_fc"  # so small a model needs more than its attention to learn another language
EMBEDDED_TEXT = {part: ASSETS / "corpus" / f"{part}.txt.gz" for part in ("code-train", "code-eval", "docs-eval")}
EMBEDDED_PROMPTS = ["def read(self", "class Reader", "The file"]
CLIP = 1.0  # norm of the gradient
QUICK_UPDATES, QUICK_EVAL_EXAMPLES, QUICK_SAMPLE_TOKENS = 30, 48, 16
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Flags:
    """All flags of this program: type, default, help and rules. `minipeft.training.flags` parses and checks them."""

    config: Path | None = flag(None, "YAML file of flags by name; flags given here override it", once=True)
    model_name: str | None = flag(
        None, "Hub name or folder (default: the embedded GPT-2 of 1 M parameters)", also="model_name_or_path"
    )
    attn_implementation: str | None = flag(None, "eager, sdpa, flash_attention_2, ... (default: transformers' choice)")

    adapter: str | None = flag(None, "go on from this adapter; its configuration counts", may_change=True)
    method: str | None = flag(None, f"one of {', '.join(registry.method_names())} (default: lora)")
    method_options: str | None = flag(None, "more options of the method as YAML, such as '{tinit: 20, tfinal: 50}'")
    rank: int | None = flag(None, "of the update (default: 8 for LoRA, else the method's own)", also="lora_r")
    alpha: float | None = flag(
        None, "the update is scaled by alpha / rank (default: 16 for LoRA, else the method's own)", also="lora_alpha"
    )
    dropout: float | None = flag(None, "of the adapter's input (default: none)", also="lora_dropout")
    target_modules: str | None = flag(
        None, f"a,b,c or all-linear (for the embedded model: {EMBEDDED_TARGETS})", also="lora_target_modules"
    )
    init: str | None = flag(None, "LoRA's start: gaussian, pissa, ... (default: B = 0)", also="init_lora_weights")
    use_rslora: bool = flag(False, "scale by alpha / sqrt(rank), arXiv:2312.03732")
    use_dora: bool = flag(False, "learn the size of each row of the weight too, arXiv:2402.09353")

    num_epochs: int = flag(3, "passes over the text", lowest=1, also="num_train_epochs")
    max_steps: int = flag(0, "number of updates; if above 0 it overrides --num_epochs", lowest=0)
    batch_size: int = flag(8, "examples per process and forward pass", lowest=1, also="per_device_train_batch_size")
    gradient_accumulation_steps: int = flag(1, "forward passes per update", lowest=1)
    auto_batch: bool = flag(False, "if memory runs out, halve the first and double the second", not_with=("fsdp",))
    learning_rate: float = flag(1e-3, "after the warm-up", above=0)
    lr_scheduler_type: Literal[optimizers.SCHEDULES] = flag("linear", "after the warm-up, as transformers names it")
    warmup_ratio: float | None = flag(
        None, f"share of the updates (default: {optimizers.WARMUP_RATIO}; none with constant)"
    )
    optim: str = flag("adamw_torch", f"one of {', '.join(optimizers.NAMES)}")
    lora_plus_ratio: float = flag(1.0, "B learns this many times faster than A, see arXiv:2402.12354")
    weight_decay: float = flag(0.01, "of AdamW", lowest=0)
    max_length: int = flag(128, "the most tokens an example may have", lowest=2)
    seed: int = flag(0, "of everything random", lowest=0)

    dtype: Literal[tuple(DTYPES)] = flag(
        "float32", "of the frozen base; auto: the checkpoint's own. The adapter is float32 in any case"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = flag(None, "(default: what accelerate launch was told)")
    lean: bool = flag(False, "the same training in less memory and time, see minipeft.lean")
    checkpointing: Literal["none", "last", "mlp", "block", "sqrt"] | None = flag(
        None, "what to recompute; implies --lean"
    )
    gradient_checkpointing: bool = flag(False, "Trainers' --checkpointing block", not_with=("checkpointing",))
    quantize: Literal["nf4", "fp4", "int8", "int8_weight_only"] | None = flag(
        None, "hold the base in 4 or 8 bits (QLoRA)", not_with=("fsdp",)
    )
    fsdp: bool = flag(False, "divide base and adapter over the processes (FSDP2)")

    # When a run goes on, its texts are compared by their content, so their paths may change.
    train_file: Path | None = flag(
        None, "text, JSON lines or a folder (default: the embedded Python code)", must_exist=True, may_change=True
    )
    eval_file: Path | None = flag(
        None, "(default: the last 5 percent of the examples)", needs=("train_file",), must_exist=True, may_change=True
    )
    dataset_name: str | None = flag(
        None, "of the Hub, or a folder from save_to_disk", not_with=("train_file", "eval_file"), may_change=True
    )
    dataset_config: str | None = flag(None, "of a data set that has several", needs=("dataset_name",), may_change=True)
    lines: bool = flag(False, "rows with 'text' are lines that follow each other, not documents")
    packing: bool | None = flag(None, "fill rows with short examples, each as if alone (default: for text only)")
    attend_across: bool = flag(False, "join documents to blocks in which they attend to each other")
    chat_template: Path | None = flag(None, "file with a Jinja template for chats", must_exist=True)
    overlong: Literal["error", "truncate", "drop"] = flag("error", "what to do with prompts and chats > --max_length")
    streaming: bool = flag(False, "read the text while training", needs=("max_steps", "quick"))

    max_eval_examples: int | None = flag(None, "evaluate on so many, the first (default: all)", lowest=1)

    output_dir: Path | None = flag(None, "(default: output/<model>-<text>)", may_change=True)
    overwrite: bool = flag(
        False, "begin anew where a run is", not_with=("resume",), once=True, also="overwrite_output_dir"
    )
    save_every: int = flag(0, "updates between checkpoints (0: none)", lowest=0, may_change=True, also="save_steps")
    keep: int = flag(2, "checkpoints to keep", lowest=1, may_change=True, also="save_total_limit")
    resume: str | None = flag(
        None, "from the latest checkpoint, or this one", const="latest", once=True, also="resume_from_checkpoint"
    )
    eval_every: int = flag(0, "updates between evaluations (default: an epoch)", lowest=0, also="eval_steps")
    log_with: str | None = flag(None, f"one or more of {','.join(LOGGER_TYPE_TO_CLASS)}", may_change=True)
    push_to_hub: bool = flag(False, "push the adapter to the Hugging Face Hub", not_with=("fsdp",), may_change=True)
    hub_model_id: str | None = flag(None, "(default: --output_dir's name)", needs=("push_to_hub",), may_change=True)
    hub_private_repo: bool = flag(False, "if it is created", needs=("push_to_hub",), may_change=True)
    quick: bool = flag(
        False, f"{QUICK_UPDATES} updates unless --max_steps; short evaluations, samples", may_change=True
    )


@report.one_line_errors("train.py")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    check_writable(args.output_dir)
    adapter_config(args)  # a mistake in it is found before the model is loaded
    accelerator = make_accelerator(args)
    if args.push_to_hub and accelerator.is_main_process:  # as is a token that may not write
        create_repo(hub_name(args), private=args.hub_private_repo or None)
    datasets.disable_progress_bars()  # one progress bar is enough: ours
    transformers.utils.logging.disable_progress_bar()

    set_seed(args.seed)
    tokenizer, model = load(args)
    with accelerator.main_process_first():  # the others find what the first has cached
        texts = load_texts(args, tokenizer, model)
    updates = count_updates(args, accelerator, texts.train)
    model = adapted(args, model, updates)
    accelerator.print(f"model: {args.model_name}", report.parameter_table(model), sep="\n")
    accelerator.print(texts.describe(text_name(args)))

    with the_only_run(args.output_dir, resume=bool(args.resume), overwrite=args.overwrite):
        prompts = EMBEDDED_PROMPTS if uses_embedded_text(args) else report.openings(tokenizer, texts.evaluation["eval"])
        tokens = QUICK_SAMPLE_TOKENS if args.quick else SAMPLE_TOKENS
        options = {"tokens": tokens, "max_length": args.max_length, "seed": args.seed}
        before = report.sample(model.to(accelerator.device), tokenizer, prompts, **options)
        run = Run(args, accelerator, model, tokenizer, texts, updates)
        run.train()
        run.save_adapter()
        after = report.sample(model, tokenizer, prompts, **options)
        logits = report.logits_of_first(model, texts.evaluation["eval"])
        if accelerator.is_main_process:
            show_results(args, run, report.sample_report(prompts, before, after))
            if args.push_to_hub:
                print(f"pushed to {model.push_to_hub(hub_name(args))}")
            # Of a model that is divided over the processes, one alone cannot take the adapter out.
            divided = args.fsdp or deepspeed.asked_for()
            base = load(args)[1].to(accelerator.device) if divided else model.unload()
            print(report.check_adapter(logits, base, args.output_dir, texts.evaluation["eval"], args.quantize))
            print(f"written to {args.output_dir}: the adapter, metrics.jsonl, training_loss_curve.png, samples.txt")
        accelerator.wait_for_everyone()
        accelerator.end_training()


def parse_args(argv: list[str]) -> Flags:
    """The flags, with those filled in whose defaults depend on others."""
    args = parse_flags(Flags, argv, __doc__)
    optimizers.check_optimizer(args.optim, sharded=args.fsdp)
    found: dict[str, Any] = {"checkpointing": "block" if args.gradient_checkpointing else args.checkpointing}
    found["lean"] = args.lean or found["checkpointing"] is not None
    found["warmup_ratio"] = optimizers.warmup_share(args.lr_scheduler_type, args.warmup_ratio)
    if args.model_name is None:
        found["model_name"] = str(EMBEDDED_MODEL)
        # IA3 treats layers in two ways and knows GPT-2's; trainable_tokens is for the embedding.
        if args.target_modules is None and args.method not in ("ia3", "trainable_tokens") and not args.adapter:
            found["target_modules"] = EMBEDDED_TARGETS
    if args.method in (None, "lora") and not args.adapter:
        defaults = {"method": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.0}
        found |= {name: default for name, default in defaults.items() if getattr(args, name) is None}
    if args.quick and not args.max_steps:
        found["max_steps"] = QUICK_UPDATES
    if args.output_dir is None:
        model_name = Path(found.get("model_name", args.model_name)).name
        found["output_dir"] = Path("output") / f"{model_name}-{Path(text_name(args)).name.split('.')[0]}"
    return dataclasses.replace(args, **found)


def uses_embedded_text(args: Flags) -> bool:
    return not (args.train_file or args.dataset_name)


def text_name(args: Flags) -> str:
    return "code" if uses_embedded_text(args) else args.dataset_name or args.train_file.name


def shared_options(args: Flags) -> dict[str, Any]:
    options = {name: getattr(args, name) for name in ("rank", "alpha", "dropout", "init")}
    return options | {name: getattr(args, name) or None for name in ("use_rslora", "use_dora")}


def adapter_config(args: Flags, updates: int = 0) -> minipeft.AdapterConfig | None:
    if args.adapter:
        return None  # its own counts
    more = {"options": args.method_options, "updates": updates or args.max_steps}
    return method_config(args.method, shared_options(args), target_modules=args.target_modules, **more)


def adapted(args: Flags, model: PreTrainedModel, updates: int) -> minipeft.AdaptedModel:
    """The base with a new adapter, or with the one to go on from."""
    if not args.adapter:
        return minipeft.get_adapter_model(model, adapter_config(args, updates))
    model = minipeft.load_adapter(model, args.adapter, is_trainable=True)
    (config,) = model.adapter_configs.values()
    check_agrees(config, args.adapter, args.method, shared_options(args), args.target_modules, args.method_options)
    return model


def hub_name(args: Flags) -> str:
    return args.hub_model_id or args.output_dir.name


def make_accelerator(args: Flags) -> Accelerator:
    trackers = args.log_with.split(",") if args.log_with else []
    accelerator = start_accelerator(args.mixed_precision, trackers, args.output_dir)
    if deepspeed.asked_for():
        deepspeed.check_flags(args)
        deepspeed.configure(accelerator, args.batch_size, CLIP)
    return accelerator


def load(args: Flags) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    return load_base(args.model_name, args.dtype, args.attn_implementation, args.quantize, args.chat_template)


def load_texts(args: Flags, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Texts:
    """Examples to train on and to evaluate on; by default also of the text that the base was trained on."""
    if uses_embedded_text(args):
        data, evaluation = EMBEDDED_TEXT["code-train"], {"eval": EMBEDDED_TEXT["code-eval"]}
        if args.model_name == str(EMBEDDED_MODEL):
            evaluation["docs"] = EMBEDDED_TEXT["docs-eval"]
    else:
        data, evaluation = args.dataset_name or args.train_file, {"eval": args.eval_file} if args.eval_file else {}
    return read_texts(
        data,
        evaluation,
        tokenizer,
        Encoding(args.max_length, args.packing, args.overlong, attend_across=args.attend_across),
        model,
        dataset_config=args.dataset_config,
        lines=args.lines,
        streaming=args.streaming,
        eval_examples=args.max_eval_examples or (QUICK_EVAL_EXAMPLES if args.quick else None),
    )


def update_size(args: Flags, accelerator: Accelerator) -> int:
    """Examples per update, over all processes."""
    return args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def count_updates(args: Flags, accelerator: Accelerator, text: Examples | Packed | Source) -> int:
    return args.max_steps or args.num_epochs * math.ceil(len(text) / update_size(args, accelerator))


class Run:
    """A training run: its parts, and where it stands."""

    def __init__(
        self,
        args: Flags,
        accelerator: Accelerator,
        model: minipeft.AdaptedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Texts,
        updates: int,
    ) -> None:
        self.args, self.accelerator, self.model, self.texts, self.updates = args, accelerator, model, texts, updates
        if args.lean:
            minipeft.lean(model, args.checkpointing)
        if args.fsdp:
            shard(model, accelerator.device)
        size, self.epoch_updates = update_size(args, accelerator), 0
        if isinstance(texts.train, Source):
            self.order = StreamOrder(texts.train, tokenizer, texts.encoding, size, args.seed)
        else:
            self.order = UpdateOrder(texts.train, size, args.seed)
            self.epoch_updates = self.order.updates_per_epoch
        self.eval_every = args.eval_every or self.epoch_updates or updates

        numbers = (args.learning_rate, args.weight_decay, args.lora_plus_ratio)
        optimizer = optimizers.make_optimizer(model, args.optim, *numbers)
        # The schedule counts updates, so accelerate must not prepare it: it would step once per process.
        self.scheduler = get_scheduler(
            args.lr_scheduler_type, optimizer, math.ceil(args.warmup_ratio * updates), updates
        )
        self.checkpoints = Checkpoints(args.output_dir, args.keep)
        self.state, engine = None, None
        if accelerator.deepspeed_plugin is None:
            self.optimizer = accelerator.prepare_optimizer(optimizer)
            fixed = compared_values(args) | {"data": texts.fingerprints()}
            fixed["mixed_precision"] = accelerator.mixed_precision
            self.state = TrainingState(model, optimizer, self.scheduler, scaler=accelerator.scaler, config=fixed)
        else:  # it cuts up the optimizer's state, so there are no checkpoints
            engine, self.optimizer = deepspeed.prepare(accelerator, model, optimizer)
        batching = {"micro_batch": args.batch_size, "auto_batch": args.auto_batch}
        self.updater = Updater(accelerator, model, self.optimizer, clip=CLIP, engine=engine, **batching)

    def train(self) -> None:
        """Train the adapter, from the beginning or from a checkpoint."""
        set_seed(self.args.seed, device_specific=True)  # the processes drop out different units
        done, settings = self.resume(), saved_values(self.args)
        folder = self.args.output_dir if self.accelerator.is_main_process else None
        if folder and self.args.overwrite and not done:
            self.checkpoints.discard_newer(-1)  # only now, when nothing is left to be refused
        self.metrics = Metrics(folder, done)
        if folder:
            write_files(folder, {"train_config.yaml": yaml.safe_dump(settings, sort_keys=False).encode("utf-8")})
        self.accelerator.init_trackers("minipeft", settings)
        interrupt = Interrupt()
        try:
            self.train_from(done, interrupt)
        finally:
            interrupt.restore()
            self.metrics.close()

    def train_from(self, done: int, interrupt: Interrupt) -> None:
        """The training loop: make the updates after the first `done`."""
        if done == 0:
            self.evaluate(0)
        updates = self.order if isinstance(self.order, StreamOrder) else self.order.iterate(done)
        main, every = self.accelerator.is_main_process, self.args.save_every
        hidden = not main or not sys.stderr.isatty()
        with tqdm(total=self.updates, initial=done, desc="training", unit="update", disable=hidden) as bar:
            for step, update in zip(range(done + 1, self.updates + 1), updates, strict=False):
                row, last = self.update(step, update), step == self.updates
                bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{row['learning_rate']:.1e}")
                bar.update()
                if hidden and main and (last or step % max(1, self.updates // 20) == 0):
                    print(f"update {step}/{self.updates}: {report.update_line(row)}", flush=True)
                if last or step % self.eval_every == 0:
                    self.evaluate(step)
                stopped = interrupt.came(self.accelerator.device)
                if stopped or (every and (last or step % every == 0)):
                    self.save(step)
                if stopped and not last:
                    goes_on = "" if self.state is None else "; --resume goes on"
                    self.accelerator.print(f"stopped by SIGTERM after update {step} of {self.updates}{goes_on}")
                    raise SystemExit(EXIT_CODE)

    def update(self, step: int, update: Update) -> dict[str, float]:
        started = time.perf_counter()
        self.model.train()
        rate = self.scheduler.get_last_lr()[0]
        loss = report.finite(self.updater(update))
        if not self.optimizer.step_was_skipped:  # as a gradient scaler does after an overflow
            self.scheduler.step()
        speed = update.tokens / (time.perf_counter() - started)
        row = {"loss": loss, "learning_rate": rate, "tokens_per_second": round(speed, 1)}
        row["peak_memory_mib"] = round(report.peak_memory(self.accelerator.device), 1)
        return self.write(step, row)

    def evaluate(self, step: int) -> None:
        losses = {
            name: report.finite(evaluate(self.accelerator, self.model, text, self.updater.micro_batch))
            for name, text in self.texts.evaluation.items()
        }
        row = {"eval_loss": losses["eval"]} | {f"{name}_perplexity": math.exp(loss) for name, loss in losses.items()}
        row = self.write(step, row)
        if self.accelerator.is_main_process:
            tqdm.write(report.evaluation_line(row))

    def write(self, step: int, row: dict[str, float]) -> dict[str, float]:
        row = {"step": step, "epoch": round(step / self.epoch_updates, 4) if self.epoch_updates else 0, **row}
        self.metrics.write(row)
        self.accelerator.log(row, step=step)
        return row

    def save(self, step: int) -> None:
        """Save a checkpoint. If that fails, the checkpoints before it are intact and the run goes on."""
        if self.state is None:  # and SIGTERM came
            self.accelerator.print("train.py: warning: no checkpoint: DeepSpeed's runs have none", file=sys.stderr)
            return
        position = {"micro_batch": self.updater.micro_batch, "updates": self.updates}
        position["data"] = self.order.state() if isinstance(self.order, StreamOrder) else None
        try:
            self.state.save(self.checkpoints, step, position)
        except minipeft.CheckpointError as error:
            self.accelerator.print(f"train.py: warning: no checkpoint: {error}", file=sys.stderr)

    def resume(self) -> int:
        """Go on from a checkpoint, if asked to or restarted by the launcher; returns the number of updates done."""
        folder = checkpoint_to_resume(self.checkpoints, self.args.resume)
        if folder is None:
            return 0
        longer = is_finished(folder)  # so it may become a longer run, whose schedule then counts
        may_differ = ("num_epochs", "max_steps") if longer else ()
        progress = self.state.restore(folder, go_to=self.go_to, may_differ=may_differ)
        if progress.step > self.updates:
            raise minipeft.ConfigError(f"--resume: {progress.step} updates are done, so {self.updates} are too few.")
        if longer:
            optimizers.continue_schedule(self.scheduler)
        if self.args.resume not in (None, "latest") and self.accelerator.is_main_process:
            self.checkpoints.discard_newer(progress.step)
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"going on from {folder}, after update {progress.step} of {self.updates}")
        return progress.step

    def go_to(self, position: dict[str, Any]) -> None:
        """Continue with the data where a checkpoint left off."""
        micro_batch = integer("micro_batch", position["micro_batch"], at_least=1)
        if isinstance(self.order, StreamOrder):
            self.order.restore(position["data"])
        self.updater.micro_batch = micro_batch

    def save_adapter(self) -> None:
        if is_sharded(self.model):
            self.state.save_adapter(self.args.output_dir)
        else:
            with deepspeed.whole_adapter(self.accelerator, self.model):
                if self.accelerator.is_main_process:
                    self.model.save_pretrained(self.args.output_dir)
        self.accelerator.wait_for_everyone()


def show_results(args: Flags, run: Run, samples: str) -> None:
    """Print and write what the run leaves next to the adapter."""
    write_files(args.output_dir, {"samples.txt": samples.encode("utf-8")})
    print(samples, report.perplexity_report(run.metrics.rows), sep="\n")
    (config,) = run.model.adapter_configs.values()
    method = f"LoRA of rank {config.r}" if config.method == "lora" else config.method
    title = f"{Path(args.model_name).name} on {text_name(args)}, {method}"
    report.plot_losses(run.metrics.rows, args.output_dir / "training_loss_curve.png", title)


if __name__ == "__main__":
    main()

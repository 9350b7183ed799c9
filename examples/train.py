"""Adapt a causal language model to a text with LoRA, and show that it worked.

    accelerate launch examples/train.py                  # the embedded GPT-2 learns to write Python; needs no network
    accelerate launch examples/train.py --quick          # the same in 30 updates
    accelerate launch examples/train.py --train_file my.txt --model_name path/or/name
    accelerate launch examples/train.py --model_name gpt2 --dataset_name Salesforce/wikitext \
        --dataset_config wikitext-2-raw-v1               # from the Hugging Face Hub

It leaves in --output_dir: the adapter, metrics.jsonl, training_loss_curve.png and samples.txt.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NoReturn, TextIO

import datasets
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, set_seed
from datasets import Dataset, load_dataset
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

import minipeft

Blocks = dict[str, Dataset]  # by part: "train", "eval", perhaps "docs"
Perplexities = dict[str, float]  # by part
ASSETS = Path(__file__).resolve().parent / "assets"
EMBEDDED_MODEL = ASSETS / "tiny"
EMBEDDED_TARGETS = "c_attn,c_proj,c_fc"  # so small a model needs more than its attention to change its language
CORPUS = ASSETS / "corpus"
EMBEDDED_TEXT = {"train": CORPUS / "code-train.txt.gz", "eval": CORPUS / "code-eval.txt.gz"}
EMBEDDED_TEXT["docs"] = CORPUS / "docs-eval.txt.gz"  # held out from what the base was trained on
EMBEDDED_PROMPTS = ("def read(self", "class Reader", "The file")
WARMUP, CLIP, HELD_OUT = 0.1, 1.0, 0.05  # share of the updates; gradient norm; share of the blocks
QUICK_UPDATES, QUICK_EVAL_BLOCKS = 30, 48
SAMPLE_TOKENS = 64
TOLERANCES = {"reloaded": 1e-6, "merged": 1e-5}  # as shares of the largest logit


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
    config = lora_config(args)
    accelerator = make_accelerator(args)
    datasets.disable_progress_bars()  # one progress bar is enough: ours
    transformers.utils.logging.disable_progress_bar()

    set_seed(args.seed)
    tokenizer, model = load_base(args)
    model = minipeft.get_lora_model(model, config)
    with accelerator.main_process_first():  # the others find what the first has cached
        blocks = load_blocks(args, tokenizer)
    accelerator.print(describe(args, model, blocks))

    args.output_dir.mkdir(parents=True, exist_ok=True)
    prompts = choose_prompts(args, tokenizer, blocks["eval"])
    before = sample(args, model.to(accelerator.device), tokenizer, prompts)
    with (args.output_dir / "metrics.jsonl" if accelerator.is_main_process else Path(os.devnull)).open("w") as metrics:
        model, first, last = train(args, accelerator, model, blocks, metrics)

    if accelerator.is_main_process:
        model.save_pretrained(args.output_dir)
        show_samples(args, prompts, before, sample(args, model, tokenizer, prompts))
        for part, text in (("eval", "held-out text"), ("docs", "documentation, what the base was trained on")):
            if part in first:
                print(f"perplexity on {text}: {first[part]:.2f} before, {last[part]:.2f} after")
        plot_losses(args)
        check_adapter(args, model, blocks["eval"][:8]["input_ids"].to(accelerator.device))
        print(f"written to {args.output_dir}: the adapter, metrics.jsonl, training_loss_curve.png, samples.txt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


# ---------------------------------------------------------------------------------------------------- what was asked
class Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)")


def parse_args(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--model_name", help="Hub name or local directory (default: the embedded GPT-2 of 1 M parameters)")
    flag("--rank", type=int, default=8)
    flag("--alpha", type=float, default=16, help="the update is scaled by alpha / rank (%(default)s)")
    flag("--dropout", type=float, default=0.0, help="of the adapter's input; the base keeps its own")
    flag("--target_modules", help=f"a,b,c or all-linear (default: minipeft's; the embedded model: {EMBEDDED_TARGETS})")
    flag("--num_epochs", type=int, default=3)
    flag("--max_steps", type=int, default=0, help="number of updates; if > 0 it overrides --num_epochs")
    flag("--batch_size", type=int, default=8, help="blocks a process and forward pass (%(default)s)")
    flag("--learning_rate", type=float, default=1e-3, help="after the warm-up (%(default)s)")
    flag("--weight_decay", type=float, default=0.01)
    flag("--max_length", type=int, default=128, help="tokens a block (%(default)s)")
    flag("--gradient_accumulation_steps", type=int, default=1, help="forward passes an update (%(default)s)")
    flag("--mixed_precision", choices=("no", "bf16", "fp16"), help="(default: what accelerate launch was told)")
    flag("--train_file", type=Path, help="plain text, .gz too (default: the embedded Python code)")
    flag("--eval_file", type=Path, help=f"(default: the last {100 * HELD_OUT:.0f} percent of --train_file)")
    flag("--dataset_name", help="Hub data set with a column 'text'")
    flag("--dataset_config")
    flag("--output_dir", type=Path, help="(default: output/<model>-<text>)")
    flag("--seed", type=int, default=0)
    flag("--quick", action="store_true", help=f"{QUICK_UPDATES} updates, if --max_steps is not given; short evaluation")
    args = parser.parse_args(argv)

    lowest = {"num_epochs": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 2, "seed": 0}
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
        if not path.is_file() or path.stat().st_size == 0:
            fail(f"{path}: no such file, or an empty one; --train_file and --eval_file take the path of a text.")
    fill_in(args)
    check_writable(args.output_dir)
    return args


def fill_in(args: Namespace) -> None:
    """Defaults that depend on other flags."""
    args.embedded_text = not (args.train_file or args.dataset_name)
    args.text = args.dataset_name or ("code" if args.embedded_text else args.train_file.name)
    if args.model_name is None:
        args.model_name = str(EMBEDDED_MODEL)
        args.target_modules = EMBEDDED_TARGETS if args.target_modules is None else args.target_modules
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


def lora_config(args: Namespace) -> minipeft.LoraConfig:
    targets = args.target_modules
    if targets is not None and targets != "all-linear":
        targets = [name.strip() for name in targets.split(",")]
    return minipeft.LoraConfig(
        r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )


# ------------------------------------------------------------------------------------------ accelerator, model, text
def make_accelerator(args: Namespace) -> Accelerator:
    # A plugin, since the plain argument would yield to accelerate's own configuration.
    accumulation = GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps)
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed)
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, gradient_accumulation_plugin=accumulation, dataloader_config=order
        )
    except ValueError as error:
        fail(f"--mixed_precision {args.mixed_precision}: {error}")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        fail("--mixed_precision fp16 does nothing on a CPU; give bf16 or no.")
    return accelerator


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
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and args.max_length > positions:
        fail(f"--max_length {args.max_length}: {name} has {positions} positions; give at most that.")
    return tokenizer, model


def load_blocks(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    """Blocks of tokens to train on and to evaluate on; by default also of the text that the base was trained on."""
    if args.dataset_name:
        rows = read_dataset(args.dataset_name, args.dataset_config)
    else:
        files = EMBEDDED_TEXT if args.embedded_text else {"train": args.train_file, "eval": args.eval_file}
        rows = {part: read_file(path) for part, path in files.items() if path}
    if args.model_name != str(EMBEDDED_MODEL):
        rows.pop("docs", None)
    blocks = {part: cut(text, tokenizer, args.max_length) for part, text in rows.items()}
    args.held_out = "eval" not in blocks
    if args.held_out:
        start = len(blocks["train"]) - math.ceil(HELD_OUT * len(blocks["train"]))
        blocks["eval"] = blocks["train"].select(range(start, len(blocks["train"])))
        blocks["train"] = blocks["train"].select(range(start))
    for part, dataset in blocks.items():
        if len(dataset) == 0:
            fail(f"{args.text}: no block of {args.max_length} tokens to {part} on; lengthen it or lower --max_length.")
        if args.quick and part != "train":
            blocks[part] = dataset.select(range(min(len(dataset), QUICK_EVAL_BLOCKS)))
    return blocks


def read_file(path: Path) -> Dataset:
    file = glob.escape(str(path))
    try:
        return load_dataset("text", data_files=file, split="train", sample_by="line", keep_linebreaks=True)
    except Exception as error:  # pyarrow's, fsspec's and the file system's
        fail(f"{path}: cannot be read as text in UTF-8 ({reason(error.__cause__ or error)}); give another file.")


def read_dataset(name: str, config: str | None) -> Blocks:
    try:
        splits = load_dataset(name, config)
    except Exception as error:  # as above, and the Hub's
        fail(
            f"--dataset_name {name}: cannot be loaded ({reason(error.__cause__ or error)}); "
            "check the name, --dataset_config and the network, or give a --train_file."
        )
    if "train" not in splits or "text" not in splits["train"].column_names:
        fail(f"--dataset_name {name}: needs a split 'train' with a column 'text', but has {splits.column_names}.")
    held_out = [splits[part] for part in ("validation", "test") if part in splits]
    return {"train": splits["train"]} | ({"eval": held_out[0]} if held_out else {})


def cut(text: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenise whole runs of lines, so that indentation and blank lines read as in a file; join; cut into blocks."""

    def tokenise(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        run = "".join(line if line.endswith("\n") else line + "\n" for line in rows["text"])
        # Not verbose: it would warn that a run is longer than the model's context, but the run is cut next.
        return {"input_ids": [tokenizer(run, add_special_tokens=False, verbose=False)["input_ids"]]}

    def join_and_cut(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = list(chain.from_iterable(rows["input_ids"]))
        starts = range(0, len(ids) - max_length + 1, max_length)
        return {"input_ids": [ids[start : start + max_length] for start in starts]}

    runs = text.map(tokenise, batched=True, batch_size=1000, remove_columns=text.column_names)
    return runs.map(join_and_cut, batched=True, batch_size=100).with_format("torch")


def reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def describe(args: Namespace, model: minipeft.AdaptedModel, blocks: Blocks) -> str:
    trainable, total = model.get_nb_trainable_parameters()
    numbers = {"total": total, "trainable": trainable, "frozen": total - trainable}
    lines = [f"model: {args.model_name}", f"{'parameters':<12}{'number':>16}{'percent':>10}"]
    lines += [f"{name:<12}{number:>16,}{100 * number / total:>10.2f}" for name, number in numbers.items()]
    sizes = ", ".join(f"{part} {len(dataset):,}" for part, dataset in blocks.items())
    lines.append(f"text: {args.text} in blocks of {args.max_length} tokens: {sizes}")
    if args.held_out:
        lines.append(f"no evaluation text: the last {100 * HELD_OUT:.0f} percent of the blocks are held out for it")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- training
def train(
    args: Namespace, accelerator: Accelerator, model: nn.Module, blocks: Blocks, metrics: TextIO
) -> tuple[minipeft.AdaptedModel, Perplexities, Perplexities]:
    """Train the adapter; return the model and its perplexities before and after."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    loaders = {part: DataLoader(dataset, args.batch_size, shuffle=part == "train") for part, dataset in blocks.items()}
    loaders = {part: accelerator.prepare(loader) for part, loader in loaders.items()}
    loader = loaders.pop("train")
    epoch_updates = math.ceil(len(loader) / args.gradient_accumulation_steps)
    updates = args.max_steps if args.max_steps > 0 else args.num_epochs * epoch_updates
    # The schedule counts updates, so it is not prepared: accelerate would step it once a process.
    scheduler = get_scheduler("linear", optimizer, math.ceil(WARMUP * updates), updates)
    set_seed(args.seed, device_specific=True)  # the processes drop out different units
    model, optimizer = accelerator.prepare(model, optimizer)

    def write_row(step: int, row: dict[str, float]) -> None:
        row = {"step": step, "epoch": round(step / epoch_updates, 4), **row}
        print(json.dumps(row, allow_nan=False), file=metrics, flush=True)  # to be read while the training runs

    def evaluation(step: int) -> Perplexities:
        losses = {part: evaluate(accelerator, model, loader) for part, loader in loaders.items()}
        perplexities = {part: math.exp(loss) for part, loss in losses.items()}
        scores = {"eval_loss": losses["eval"], "eval_perplexity": perplexities["eval"]}
        write_row(step, scores)
        if accelerator.is_main_process:
            line = "epoch {:.2f}, update {}: eval loss {:.4f}, perplexity {:.2f}"
            tqdm.write(line.format(step / epoch_updates, step, *scores.values()))
        return perplexities

    step, first = 0, evaluation(0)
    with tqdm(total=updates, desc="training", unit="update", disable=not accelerator.is_main_process) as bar:
        while step < updates:
            loader.set_epoch(step // epoch_updates)
            for row in train_epoch(args, accelerator, model, optimizer, scheduler, loader):
                step += 1
                write_row(step, row)
                bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{row['learning_rate']:.1e}")
                bar.update()
                if step == updates:
                    break
            last = evaluation(step)
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False), first, last


def train_epoch(
    args: Namespace,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loader: DataLoader,
) -> Iterator[dict[str, float]]:
    """Go through the text once and yield a row after each update.

    The loss of an update is the mean over all tokens that went into it, on all processes, and its gradient is the
    gradient of that mean, also where the last batch of an epoch is short or the last accumulation has fewer batches.
    """
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    full = args.batch_size * (args.max_length - 1)  # tokens predicted in a full batch
    sums, started = torch.zeros(2, device=accelerator.device), time.perf_counter()
    for batch in loader:
        with accelerator.accumulate(model):
            losses = token_losses(model, batch["input_ids"])
            accelerator.backward(losses.sum() / full)  # which divides by the number of batches to accumulate
            sums += torch.stack([losses.detach().sum(), sums.new_tensor(losses.numel())])
            if accelerator.sync_gradients:
                loss_sum, tokens = accelerator.reduce(sums).tolist()
                planned = full * args.gradient_accumulation_steps * accelerator.num_processes
                for parameter in parameters if tokens != planned else ():
                    parameter.grad *= planned / tokens
                accelerator.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            rate, speed = scheduler.get_last_lr()[0], tokens / (time.perf_counter() - started)
            scheduler.step()
            yield {"loss": finite(loss_sum / tokens), "learning_rate": rate, "tokens_per_second": round(speed, 1)}
            sums, started = torch.zeros_like(sums), time.perf_counter()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    """Mean loss in nats a token; each token counts once, on any number of processes."""
    model.eval()
    loss_sum, tokens = 0.0, 0
    for batch in loader:
        # gather_for_metrics drops the rows that only fill up the last batch
        losses = accelerator.gather_for_metrics(token_losses(model, batch["input_ids"]))
        loss_sum, tokens = loss_sum + losses.sum().item(), tokens + losses.numel()
    return finite(loss_sum / tokens)


def compute_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(rows, length) -> (rows, length, vocabulary); the mask says that no block is padded."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it; (rows, length) -> (rows, length - 1)."""
    logits = compute_logits(model, ids)[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def finite(loss: float) -> float:
    """A loss that JSON and exp() can take; beyond 100 nats a token there is nothing left to train."""
    if not loss < 100:
        fail(f"the loss is {loss}: training diverged; lower --learning_rate or --alpha.")
    return loss


# --------------------------------------------------------------------------------------------------- what came of it
def choose_prompts(args: Namespace, tokenizer: PreTrainedTokenizerBase, blocks: Dataset) -> list[str]:
    """Openings to continue: of code for the embedded text, else of held-out blocks."""
    if args.embedded_text:
        return list(EMBEDDED_PROMPTS)
    return [tokenizer.decode(ids[: min(16, args.max_length // 2)]) for ids in blocks[:3]["input_ids"]]


@torch.no_grad()
def sample(
    args: Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[str]:
    """Continue each prompt, with the same random numbers at each call."""
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


def plot_losses(args: Namespace) -> None:
    rows = [json.loads(line) for line in (args.output_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    updates, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    steps, losses = [row["step"] for row in updates], [row["loss"] for row in updates]
    window = math.ceil(len(steps) / 20)
    means = [sum(losses[end - window : end]) / window for end in range(window, len(losses) + 1)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", lw=0.8, alpha=0.3, label="training, each update")
    axes.plot(steps[window - 1 :], means, color="tab:blue", label=f"training, mean of the last {window}")
    axes.plot([row["step"] for row in evaluations], [row["eval_loss"] for row in evaluations], "o-",
              color="tab:orange", label="evaluation, with perplexity")  # fmt: skip
    for row in evaluations:
        axes.annotate(f"{row['eval_perplexity']:.1f}", (row["step"], row["eval_loss"]), (0, -14),
                      textcoords="offset points", ha="center", color="tab:orange", weight="bold")  # fmt: skip
    title = f"{Path(args.model_name).name} on {args.text}, LoRA of rank {args.rank}"
    axes.set(xlabel="optimizer updates", ylabel="loss (nats a token)", title=title)
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.output_dir / "training_loss_curve.png", dpi=150)


@torch.no_grad()
def check_adapter(args: Namespace, model: PreTrainedModel, ids: Tensor) -> None:
    """Hold the saved adapter, reloaded into a fresh base and then merged, against the model that was trained."""
    trained = compute_logits(model, ids)
    fresh = minipeft.load_adapter(load_base(args)[1].to(ids.device).eval(), args.output_dir)
    logits = {"reloaded": compute_logits(fresh, ids)}
    logits["merged"] = compute_logits(fresh.merge_and_unload(untie=True), ids)
    largest = trained.abs().max().item()
    for name, tolerance in TOLERANCES.items():
        difference, allowed = (logits[name] - trained).abs().max().item(), tolerance * largest
        print(f"{name} against trained model: logits differ by {difference:.1e}; allowed {allowed:.1e}")
        if not difference <= allowed:
            fail(f"the {name} adapter is not the one that was trained; please report this.")


if __name__ == "__main__":
    main()

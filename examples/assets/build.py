"""Build the embedded base: corpus, tokenizer and a 1 M parameter GPT-2, from the Python standard library alone.

    python examples/assets/build.py                # retrain from the committed corpus
    python examples/assets/build.py --extract      # also rebuild the corpus from the running Python
    python examples/assets/build.py --steps 60 --output_dir build/tiny     # a quick look that touches no asset

The base reads prose (the language reference in `pydoc_data.topics` and the docstrings of the standard library);
the style that `examples/train.py` teaches it is code (the same library through `ast.unparse`, docstrings removed).
No module appears in both the training and the evaluation part of the code. The extract depends on the Python
version and is therefore committed; retraining depends on torch and the number of threads, so another machine gets
another, equally good, model. What was built, with which versions and how well it does, stands in `RESULTS.json`.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import inspect
import json
import math
import platform
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

ASSETS = Path(__file__).resolve().parent
END = "<|endoftext|>"
NOT_LIBRARY = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "turtledemo",
    "encodings",
    "ensurepip",
    "pydoc_data",
}
CODE_TRAIN_BYTES, CODE_EVAL_BYTES, CODE_MODULE_BYTES = 400_000, 50_000, 20_000
DOCS_EVAL_SHARE = 0.04
VOCAB, POSITIONS, WIDTH, LAYERS, HEADS = 2048, 256, 128, 4, 4
SEED = 20261123


def library_modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield (relative path, syntax tree) of each module of the running Python's library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if NOT_LIBRARY.isdisjoint(relative.parts):
            try:
                yield relative.as_posix(), ast.parse(path.read_text("utf-8"))
            except (SyntaxError, UnicodeDecodeError):  # the library carries a few files that are broken on purpose
                continue


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 120:
                yield inspect.cleandoc(text)


def docs_corpus() -> tuple[list[str], list[str]]:
    """The prose, as (training documents, held-out documents); the split goes by the hash of the document."""
    from pydoc_data.topics import topics

    documents = [inspect.cleandoc(text) for _, text in sorted(topics.items())]
    for _, tree in library_modules():
        documents.extend(docstrings(tree))
    documents = list(dict.fromkeys(documents))
    held_out = [hashlib.sha256(text.encode()).digest()[0] < 256 * DOCS_EVAL_SHARE for text in documents]
    train = [text for text, out in zip(documents, held_out, strict=True) if not out]
    return train, [text for text, out in zip(documents, held_out, strict=True) if out]


def without_docstrings(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def code_corpus() -> tuple[list[str], list[str]]:
    """The style, as (training modules, evaluation modules): whole top-level modules, the longest cut at a line end."""
    modules = [(path, tree) for path, tree in library_modules() if path.count("/") == 0 and not path.startswith("_")]
    modules.sort(key=lambda item: hashlib.sha256(item[0].encode()).digest())
    parts: tuple[list[str], list[str]] = ([], [])
    for _, tree in modules:
        text = without_docstrings(tree)
        text = text[: text.rfind("\n", 0, CODE_MODULE_BYTES) + 1] if len(text) > CODE_MODULE_BYTES else text + "\n"
        part = next(
            (
                p
                for p, limit in zip(parts, (CODE_TRAIN_BYTES, CODE_EVAL_BYTES), strict=True)
                if sum(map(len, p)) < limit
            ),
            None,
        )
        if part is not None and len(text) >= 500:
            part.append(text)
    return parts


def write_gzip(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = "".join(text.rstrip("\n") + f"\n{END}\n" for text in documents).encode("utf-8")
    path.write_bytes(gzip.compress(payload, compresslevel=9, mtime=0))  # mtime 0: the same bytes on every run


def extract(assets: Path) -> None:
    docs_train, docs_eval = docs_corpus()
    code_train, code_eval = code_corpus()
    corpus = {"docs-train": docs_train, "docs-eval": docs_eval, "code-train": code_train, "code-eval": code_eval}
    for name, documents in corpus.items():
        write_gzip(assets / "corpus" / f"{name}.txt.gz", documents)
        print(f"{name}: {len(documents)} documents, {sum(map(len, documents)):,} characters")
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    (assets / "LICENSE-PYTHON.txt").write_text(licence.read_text("utf-8"), "utf-8")


def read_corpus(assets: Path, name: str) -> str:
    return gzip.decompress((assets / "corpus" / f"{name}.txt.gz").read_bytes()).decode("utf-8")


def build_tokenizer(text: str):
    """Byte-level BPE, trained on the documentation only: the base has never seen the style it will be taught."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.split(END), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=POSITIONS,
    )


def pretrain(tokenizer, train_text: str, eval_texts: dict[str, str], steps: int, batch_size: int, learning_rate: float):
    """Train the base with AdamW and a cosine schedule; return it with its perplexities and the loss log."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

    random.seed(SEED)
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.0,  # attention dropout would rule out the fused CPU attention
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    ids = torch.tensor(tokenizer(train_text)["input_ids"])
    blocks = {name: torch.tensor(tokenizer(text)["input_ids"]) for name, text in eval_texts.items()}
    print(
        f"{model.num_parameters():,} parameters, {ids.numel():,} tokens, {steps * batch_size * POSITIONS / ids.numel():.1f} epochs"
    )

    def perplexity(tokens) -> float:
        model.eval()
        rows = tokens[: tokens.numel() // POSITIONS * POSITIONS].view(-1, POSITIONS)
        with torch.no_grad():
            losses = [model(input_ids=row, labels=row).loss * len(row) for row in rows.split(16)]
        model.train()
        return math.exp(float(torch.stack(losses).sum()) / len(rows))

    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    generator = torch.Generator().manual_seed(SEED)
    log, started = [], time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(ids.numel() - POSITIONS, (batch_size,), generator=generator)
        batch = torch.stack([ids[s : s + POSITIONS] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step in (1, steps):
            scores = {name: round(perplexity(tokens), 2) for name, tokens in blocks.items()}
            log.append(
                {"step": step, "loss": round(loss.item(), 4), **scores, "seconds": round(time.perf_counter() - started)}
            )
            print(json.dumps(log[-1]), flush=True)
    return model, log


def save_half(model, tokenizer, folder: Path) -> None:
    """Save in float16 (2 MB); the readers load it as float32."""
    import torch
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.float32
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = {name: p.detach().half().contiguous() for name, p in model.named_parameters()}  # tied head: stored once
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))  # save_file would make it private


def write_sums(assets: Path) -> None:
    files = sorted(
        p for p in assets.rglob("*") if p.is_file() and p.name != "SHA256SUMS" and p.suffix not in {".py", ".pyc"}
    )
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(assets).as_posix()}\n" for p in files]
    (assets / "SHA256SUMS").write_text("".join(lines), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extract", action="store_true", help="rebuild the corpus from the running Python first")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument(
        "--output_dir", type=Path, default=None, help="where to write the model (default: examples/assets/tiny)"
    )
    args = parser.parse_args()
    if args.extract:
        extract(ASSETS)

    import tokenizers
    import torch
    import transformers

    train_text = read_corpus(ASSETS, "docs-train")
    tokenizer = build_tokenizer(train_text)
    evals = {"docs_perplexity": read_corpus(ASSETS, "docs-eval"), "code_perplexity": read_corpus(ASSETS, "code-eval")}
    model, log = pretrain(tokenizer, train_text, evals, args.steps, args.batch_size, args.learning_rate)
    folder = args.output_dir or ASSETS / "tiny"
    save_half(model, tokenizer, folder)
    versions = {
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
    }
    result = {
        "command": f"python examples/assets/build.py --steps {args.steps} --batch_size {args.batch_size} "
        f"--learning_rate {args.learning_rate}",
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "parameters": model.num_parameters(),
        "final": log[-1],
        "log": log,
    }
    target = (args.output_dir or ASSETS) / "RESULTS.json"
    target.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    if args.output_dir is None:
        write_sums(ASSETS)


if __name__ == "__main__":
    main()

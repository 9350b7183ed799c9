"""What works in which trainer, as a table: ``python -m tests.trainers_table [--write docs/training.md]``.

Every cell is a run of four steps on a tiny model. Rows of packages that are not installed stay as the page has them.
"""

import argparse
import copy
import importlib
import importlib.util
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import minipeft
from minipeft.errors import MinipeftError
from minipeft.hf import AdapterTrainerMixin
from minipeft.testing.table import with_table

BEGIN, END = "<!-- python -m tests.trainers_table -->", "<!-- end of the trainers -->"
COLUMNS = (
    "the class itself",
    "inside `as_peft_model`",
    "losses of PEFT's",
    "no second base",
    "checkpoints are adapters",
    "resumed exactly",
    "best at the end",
    "`lean`",
)
PAIRS = [
    {"prompt": f"w{10 + i} w{11 + i}", "chosen": f" w{20 + i} w{21 + i}", "rejected": f" w{30 + i} w{31 + i}"}
    for i in range(8)
]
TOKENS = [{"input_ids": [10 + i, 20 + i, 30 + i, 40 + i], "labels": [10 + i, 20 + i, 30 + i, 40 + i]} for i in range(8)]
STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
# The best is the one with the greatest loss, so not the last.
STEPS |= {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss", "greater_is_better": True}
QUIET = {"logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
SAVED = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}


@dataclass(frozen=True)
class Kind:
    """A trainer, what it trains, and on what."""

    package: str
    name: str
    base: type = LlamaForCausalLM
    rows: list = field(default_factory=list)
    options: dict = field(default_factory=dict)
    others: dict = field(default_factory=dict)  # further arguments of the trainer
    adapter: dict = field(default_factory=dict)

    @property
    def trainer(self):
        return getattr(importlib.import_module(self.package), self.name)

    def arguments(self, folder, **options):
        module, name = importlib.import_module(self.package), self.name.removesuffix("Trainer")
        config = getattr(module, f"{name}Config", None) or getattr(module, f"{name}TrainingArguments")
        return config(str(folder), **{**STEPS, **QUIET, **self.options, **options})


def rewarded(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


TRL = {"bf16": False, "gradient_checkpointing": False}
ONLINE = TRL | {"num_generations": 4, "max_completion_length": 4, "beta": 0.1}
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": place % 2 == 0} for place, row in enumerate(PAIRS)
]
KINDS = (
    Kind("transformers", "Trainer", rows=TOKENS),
    Kind("transformers", "Seq2SeqTrainer", T5ForConditionalGeneration, TOKENS),
    Kind("trl", "SFTTrainer", rows=[{"text": f"w{10 + i} w{20 + i} w{30 + i} w{40 + i}"} for i in range(8)],
         options=TRL | {"max_length": 16}),
    Kind("trl", "RewardTrainer", LlamaForSequenceClassification, PAIRS, TRL | {"max_length": 16},
         adapter={"task_type": "SEQ_CLS"}),
    Kind("trl", "DPOTrainer", rows=PAIRS, options=TRL | {"max_length": 16}),
    Kind("trl", "KTOTrainer", rows=LABELLED, options=TRL | {"max_length": 16}),
    Kind("trl", "GRPOTrainer", rows=PROMPTS, options=ONLINE, others={"reward_funcs": rewarded}),
    Kind("trl", "RLOOTrainer", rows=PROMPTS, others={"reward_funcs": rewarded},  # its losses are zero but for roundings
         options=ONLINE | {"metric_for_best_model": "eval_kl", "greater_is_better": False}),
    Kind("sentence_transformers", "SentenceTransformerTrainer", BertModel,
         [{"a": f"w{10 + i} w{20 + i}", "b": f"w{30 + i} w{21 + i}"} for i in range(16)]),
)  # fmt: skip
SIZES = {"vocab_size": 96, "pad_token_id": 2, "eos_token_id": 1, "bos_token_id": 3}
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def prepare(kind, folder):
    """A base, as ``from_pretrained`` reads it, its tokenizer, and an adapter that has been trained."""
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}
    vocabulary = [*special.values(), *(f"w{i}" for i in range(4, 96))]
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = {
        T5ForConditionalGeneration: lambda: T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0, decoder_start_token_id=2, **SIZES
        ),
        BertModel: lambda: BertConfig(max_position_embeddings=32, **LAYERS, **SIZES),
    }.get(kind.base, lambda: LlamaConfig(num_key_value_heads=2, num_labels=1, **LAYERS, **SIZES))()
    kind.base(config).save_pretrained(folder / "base")
    options = {"r": 4, "target_modules": "all-linear", **kind.adapter}
    model = minipeft.get_lora_model(kind.base.from_pretrained(folder / "base"), minipeft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder / "adapter")


def ours(kind, folder):
    return minipeft.load_adapter(kind.base.from_pretrained(folder / "base"), folder / "adapter", is_trainable=True)


def theirs(kind, folder):
    import peft

    return peft.PeftModel.from_pretrained(
        kind.base.from_pretrained(folder / "base"), folder / "adapter", is_trainable=True
    )


def wrapped(kind, folder):
    from minipeft.integrations.peft import as_peft_model

    return as_peft_model(ours(kind, folder))


def lean(kind, folder):
    model = ours(kind, folder)
    return minipeft.lean(model, chunked_loss=kind.base is LlamaForCausalLM)


def trained(kind, trainer, model, folder, out, resume=None, **options):
    """The trainer after its steps."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        folder / "base", padding_side="left" if "reward_funcs" in kind.others else "right"
    )
    given = {"processing_class": tokenizer, **kind.others}
    if kind.base is BertModel:
        model, given = _encoder(model, folder)
    if kind.package == "transformers":
        given["data_collator"] = DataCollatorForSeq2Seq(tokenizer)
    rows = Dataset.from_list(copy.deepcopy(kind.rows))
    made = trainer(model=model, args=kind.arguments(out, **options), train_dataset=rows, eval_dataset=rows, **given)
    torch.manual_seed(3)
    made.train(resume_from_checkpoint=resume and str(resume))
    return made


def _encoder(body, folder):
    """The body in a model of sentence-transformers', and the loss that it is trained by."""
    from sentence_transformers import SentenceTransformer, losses
    from sentence_transformers import models as parts

    embed = parts.Transformer(str(folder / "base"), max_seq_length=16)
    embed.model = body
    model = SentenceTransformer(modules=[embed, parts.Pooling(32)], device="cpu")
    return model, {"loss": losses.MultipleNegativesRankingLoss(model)}


def course(run):
    """Loss and norm of the gradient at each step."""
    return torch.tensor([(row["loss"], row["grad_norm"]) for row in run.state.log_history if "loss" in row])


def same_course(run, other):
    """Whether two runs learned the same, and learned at all."""
    found, expected = course(run), course(other)
    assert found[:, 1].min() > 1e-6
    assert len(found) == 4
    losses = torch.allclose(found[:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)
    return losses and torch.allclose(found[:, 1], expected[:, 1], rtol=1e-2)


def values(model):
    part = next(module for module in model.modules() if isinstance(module, minipeft.AdaptedModel))
    return part.adapter_state_dict("default")


def same_values(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def says(same):
    return "yes" if same else "**no**"


def attempt(expected, kind, trainer, make, folder, out):
    """Whether a run is as another; or that it was refused."""
    try:
        run = trained(kind, trainer, make(kind, folder), folder, out)
    except MinipeftError:
        return "refused"
    return says(same_course(run, expected))


def cells(kind, folder):
    """The row of a trainer."""
    prepare(kind, folder)
    mine = type(f"Adapted{kind.name}", (AdapterTrainerMixin, kind.trainer), {})
    model = ours(kind, folder)
    run = trained(kind, mine, model, folder, folder / "run", **SAVED)
    checkpoint = folder / "run" / "checkpoint-2"
    again = trained(kind, mine, ours(kind, folder), folder, folder / "run", checkpoint, **SAVED)
    with_adapters = [path for path in checkpoint.rglob("*.safetensors") if path.name != "adapter_model.safetensors"]
    best = load_file(Path(run.state.best_model_checkpoint) / "adapter_model.safetensors")
    resumed = torch.equal(course(again), course(run)) and same_values(values(again.model), values(run.model))
    judged = run.state.best_model_checkpoint.endswith("checkpoint-2") and same_values(values(run.model), best)
    return [
        attempt(run, kind, kind.trainer, ours, folder, folder / "plain"),
        attempt(run, kind, kind.trainer, wrapped, folder, folder / "wrapped"),
        attempt(run, kind, kind.trainer, theirs, folder, folder / "theirs"),
        says(getattr(run, "ref_model", None) is None),
        says((checkpoint / "adapter_model.safetensors").exists() and not with_adapters),
        says(resumed),
        says(judged),
        attempt(run, kind, mine, lean, folder, folder / "lean"),
    ]


def installed(kind):
    return importlib.util.find_spec(kind.package) is not None


def row(kind):
    """A line of the table."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainers' own
        return f"| `{kind.name}` | {' | '.join(cells(kind, Path(folder)))} |"


def written(page):
    """The text of the page with the table as it is now."""
    old = {
        line.split("`")[1]: line
        for line in page.partition(BEGIN)[2].partition(END)[0].splitlines()
        if line.startswith("| `")
    }
    head = [f"| trainer | {' | '.join(COLUMNS)} |", f"|---|{':-:|' * len(COLUMNS)}"]
    lines = [*head, *(row(kind) if installed(kind) else old[kind.name] for kind in KINDS)]
    return with_table(page, "\n".join(lines) + "\n", BEGIN, END)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="put it into this page")
    page = parser.parse_args().write
    if page is None:
        for kind in filter(installed, KINDS):
            print(row(kind), flush=True)
    else:
        page.write_text(written(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    sys.exit(main())

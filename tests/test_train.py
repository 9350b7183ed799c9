"""examples/train.py, run as its users run it: by `accelerate launch`, or by `main(argv)` if a new process adds nothing."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import warm
from warm import Warm

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")

from accelerate.state import AcceleratorState  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import minipeft  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train.py"
TINY = ROOT / "examples" / "assets" / "tiny"
CORPUS = ROOT / "examples" / "assets" / "corpus"
RESULTS = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
RESULTS |= {
    "metrics.jsonl",
    "samples.txt",
    "training_loss_curve.png",
    "train_config.yaml",
    "run.lock",
    "run.owner.json",
}


QUICK_LENGTH = 40
ON_CPU = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **ON_CPU, **more}
    return subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=200)


def rows_of(directory: Path) -> list[dict[str, float]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def losses_of(directory: Path) -> list[float]:
    """The losses of all rows, in order. The speed is left out: no seed decides it."""
    return [row["loss"] if "loss" in row else row["eval_loss"] for row in rows_of(directory)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, Warm]:
    """One quick run as the README starts it, but for the new interpreters, and with blocks a third as long."""
    directory = tmp_path_factory.mktemp("quick") / "new" / "directory"
    words = [SCRIPT, "--quick", "--max_length", QUICK_LENGTH, "--output_dir", directory]
    process = Warm(directory.parents[1], warm.launch, *words, **ON_CPU)
    assert process.wait(200) == 0, process.stderr
    return directory, process


@pytest.fixture(scope="module")
def still_base(small_base, tmp_path_factory) -> Path:
    """The small base without dropout: its losses depend on the order of the text only."""
    directory = tmp_path_factory.mktemp("still")
    for file in small_base.iterdir():
        text = file.read_bytes()
        if file.name == "config.json":
            text = text.replace(b'pdrop": 0.1', b'pdrop": 0.0')
        (directory / file.name).write_bytes(text)
    return directory


@pytest.fixture(scope="module")
def short_text(tmp_path_factory) -> Path:
    """Seventeen blocks of 64 tokens; the last one is held out."""
    path = tmp_path_factory.mktemp("text") / "short [1].txt"  # a name that is also a glob pattern
    path.write_text(gzip.decompress((CORPUS / "code-train.txt.gz").read_bytes()).decode()[:3620], "utf-8")
    return path


@pytest.mark.slow  # two new interpreters import everything
def test_the_command_of_the_readme_lowers_the_perplexity_by_a_tenth(tmp_path):
    result = run("-m", "accelerate.commands.launch", SCRIPT, "--quick", "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path)
    assert rows[-1]["eval_perplexity"] < 0.9 * rows[0]["eval_perplexity"]


def test_the_quick_run_leaves_all_its_results(quick):
    directory, _ = quick
    assert {path.name for path in directory.iterdir()} == RESULTS
    assert (directory / "training_loss_curve.png").read_bytes().startswith(b"\x89PNG")
    samples = (directory / "samples.txt").read_text("utf-8")
    assert samples.count("before:") == samples.count("after:") == 3


def test_the_quick_run_tells_its_story(quick):
    _, result = quick
    total, trainable, frozen = (
        int(next(line for line in result.stdout.splitlines() if line.startswith(word)).split()[1].replace(",", ""))
        for word in ("total", "trainable", "frozen")
    )
    assert trainable == 65_536
    assert total == trainable + frozen
    for words in ("perplexity on held-out text", "perplexity on documentation", "reloaded against", "merged against"):
        assert words in result.stdout
    assert result.stdout.count("update 30/30: loss=") == 1  # plain lines, since there is no terminal
    assert "lr=" in result.stdout
    assert "tokens/s" in result.stdout
    assert "[transformers]" not in result.stderr  # accelerate may comment on its own defaults
    assert "Warning" not in result.stderr


def test_the_log_has_the_promised_columns(quick):
    rows = rows_of(quick[0])
    updates, evaluations = rows[1:-1], [rows[0], rows[-1]]
    columns = ["step", "epoch", "loss", "learning_rate", "tokens_per_second", "peak_memory_mib"]
    assert all(list(row) == columns for row in updates)
    assert all(list(row) == ["step", "epoch", "eval_loss", "eval_perplexity", "docs_perplexity"] for row in evaluations)
    assert [row["step"] for row in rows] == [0, *range(1, 31), 30]
    assert all(row["eval_perplexity"] == math.exp(row["eval_loss"]) for row in evaluations)


def test_the_learning_rate_warms_up_over_a_tenth_and_decays_to_zero(quick):
    rates = [row["learning_rate"] for row in rows_of(quick[0]) if "loss" in row]
    assert rates == pytest.approx([1e-3 * min(done / 3, (30 - done) / 27) for done in range(30)])


def test_the_quick_run_lowers_the_perplexity_by_a_tenth(quick):
    rows = rows_of(quick[0])
    assert rows[-1]["eval_perplexity"] < 0.9 * rows[0]["eval_perplexity"]


def test_the_evaluations_are_those_of_the_base_and_of_the_saved_adapter(quick):
    directory, _ = quick
    text = gzip.decompress((CORPUS / "code-eval.txt.gz").read_bytes()).decode("utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: 48 * QUICK_LENGTH]).view(48, QUICK_LENGTH)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    for row in (rows_of(directory)[0], rows_of(directory)[-1]):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        expected = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        assert row["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
        if row["step"] == 0:
            model = minipeft.load_adapter(model, directory)


@pytest.mark.parametrize(
    ("flags", "targets"),
    [
        ([], ("c_attn", "c_proj", "c_fc")),
        (["--target_modules", "c_fc, c_attn"], ("c_fc", "c_attn")),
        (["--target_modules", "all-linear"], "all-linear"),
        (["--model_name", str(TINY)], None),  # minipeft's own choice for the type of model
    ],
)
def test_target_modules_are_what_was_asked_for(train, tmp_path, flags, targets):
    args = train.parse_args(["--output_dir", str(tmp_path), *flags])
    found = train.adapter_config(args).target_modules
    assert found == targets or tuple(found) == targets


def test_quick_is_thirty_updates_unless_max_steps_says_otherwise(train):
    assert train.parse_args([]).max_steps == 0
    assert train.parse_args(["--quick"]).max_steps == 30
    assert train.parse_args(["--quick", "--max_steps", "7"]).max_steps == 7


def test_the_output_directory_is_named_after_the_model_and_the_text(train):
    assert train.parse_args([]).output_dir == Path("output/tiny-code")
    hub = ["--model_name", "some/gpt2", "--dataset_name", "Salesforce/wikitext"]
    assert train.parse_args(hub).output_dir == Path("output/gpt2-wikitext")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(train, short_text, tmp_path, capsys):
    flags = ["--train_file", str(short_text), "--max_length", "64", "--max_steps", "3", "--dropout", "0.1"]
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        train.main([*flags, "--seed", seed, "--output_dir", str(tmp_path / name)])
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b") != losses_of(tmp_path / "c")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert (tmp_path / "a/samples.txt").read_bytes() == (tmp_path / "b/samples.txt").read_bytes()


def test_accumulated_batches_equal_one_large_batch_up_to_the_end_of_each_epoch(
    train, still_base, short_text, tmp_path, capsys
):
    """Sixteen blocks make batches of 6, 6 and 4, or of 3, 3, 3, 3, 3 and 1, or of 2, ... with two in the last update."""
    flags = ["--model_name", str(still_base), "--train_file", str(short_text), "--num_epochs", "2"]
    flags += ["--max_length", "64"]
    for size, steps in (("6", "1"), ("3", "2"), ("2", "3")):
        sizes = ["--batch_size", size, "--gradient_accumulation_steps", steps]
        train.main([*flags, *sizes, "--output_dir", str(tmp_path / size)])
    rows = rows_of(tmp_path / "6")
    assert [row["epoch"] for row in rows] == [0, 0.3333, 0.6667, 1, 1, 1.3333, 1.6667, 2, 2]
    assert losses_of(tmp_path / "3") == pytest.approx(losses_of(tmp_path / "6"), abs=1e-5)
    assert losses_of(tmp_path / "2") == pytest.approx(losses_of(tmp_path / "6"), abs=1e-5)
    assert "the last 5 percent of the examples are held out" in capsys.readouterr().out


def test_two_processes_train_as_one_and_write_once(train, still_base, short_text, tmp_path, capsys):
    """Thirty-four blocks to evaluate on, three per batch and process: the last batch has one and is padded."""
    flags = ["--model_name", str(still_base), "--train_file", str(short_text), "--eval_file", str(short_text)]
    flags += ["--max_length", "32", "--max_steps", "3", "--mixed_precision", "no"]
    train.main([*flags, "--batch_size", "6", "--output_dir", str(tmp_path / "one")])
    (tmp_path / "temporary").mkdir()
    two = [*flags, "--batch_size", "3", "--output_dir", tmp_path / "two"]
    environment = {"ACCELERATE_USE_CPU": "true", "TMPDIR": str(tmp_path / "temporary")}
    first, second = warm.ranks(tmp_path, warm.brief, SCRIPT, *two, **environment)
    assert not list((tmp_path / "temporary").rglob("*.jsonl"))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)
    assert (first.stdout.count("trainable"), second.stdout) == (1, "")
    assert {path.name for path in (tmp_path / "two").iterdir()} == RESULTS


def test_bfloat16_runs_on_a_cpu(train, short_text, tmp_path, capsys):
    short = ["--train_file", str(short_text), "--max_length", "32", "--batch_size", "2", "--max_steps", "2"]
    train.main([*short, "--mixed_precision", "bf16", "--output_dir", str(tmp_path)])
    assert "merged against" in capsys.readouterr().out


BAD_INPUT = {
    "an unknown flag": (["--lerning_rate", "1"], "--lerning_rate"),
    "an abbreviated flag": (["--learn", "1"], "--learn"),
    "a word for a number": (["--batch_size", "many"], "many"),
    "no epochs": (["--num_epochs", "0"], "--num_epochs 0"),
    "a seed that numpy refuses": (["--seed", str(2**40)], "--seed"),
    "a learning rate that is not a number": (["--learning_rate", "nan"], "--learning_rate nan"),
    "rank 0": (["--rank", "0"], "r must be an integer from 1"),
    "dropout 1.5": (["--dropout", "1.5"], "1.5"),
    "a misspelt target": (["--target_modules", "c_attn,c_prj"], "closest: 'c_proj'"),
    "an empty target": (["--target_modules", ""], "target_modules"),
    "a missing file": (["--train_file", "missing.txt"], "missing.txt: no such file"),
    "a directory of all sorts": (["--train_file", "."], "more than one kind"),
    "an empty file": (["--train_file", "{empty}"], "empty"),
    "a file with too little text": (["--train_file", "{short}"], "cannot be divided"),
    "a file that is not text": (["--train_file", "{binary}"], "UTF-8"),
    "an evaluation file alone": (["--eval_file", "{short}"], "--train_file"),
    "two sources of text": (["--train_file", "{short}", "--dataset_name", "a/b"], "exclude each other"),
    "a configuration without a data set": (["--dataset_config", "x"], "--dataset_name"),
    "blocks longer than the model": (["--max_length", "257"], "256 positions"),
    "a model directory that is not there": (["--model_name", "/no/such/model"], "/no/such/model"),
    "a model directory without weights": (["--model_name", "{weightless}"], "model.safetensors"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(train, case, tmp_path, monkeypatch):
    flags, words = BAD_INPUT[case]
    paths = {name: tmp_path / f"{name}.txt" for name in ("empty", "short", "binary")}
    for path, text in zip(paths.values(), (b"", b"too short\n", b"\xff\xfe\x80"), strict=True):
        path.write_bytes(text)
    paths["weightless"] = tmp_path / "weightless"
    paths["weightless"].mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (paths["weightless"] / name).write_bytes((TINY / name).read_bytes())
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit) as stopped:
        train.main(["--output_dir", "out", *(flag.format(**paths) for flag in flags)])
    message = str(stopped.value.code)  # Python prints it to stderr and exits with 1
    assert message.startswith("train.py: error: ")
    assert "\n" not in message
    assert words in message
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_cannot_be_written_is_found_before_training(train, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for directory in (file, file / "below", TINY):
        with pytest.raises(SystemExit, match="--output_dir"):
            train.main(["--output_dir", str(directory)])
    assert file.read_text() == "kept"
    assert not (TINY / "adapter_config.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works there")
def test_fp16_is_refused_on_a_cpu_whoever_asks_for_it(train, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="fp16 does nothing on a CPU"):
        train.main(["--mixed_precision", "fp16", "--output_dir", str(tmp_path / "out")])
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SystemExit, match="fp16 does nothing on a CPU"):
        train.main(["--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", [["--model_name", "nobody/nothing"], ["--dataset_name", "nobody/nothing"]])
def test_what_was_named_on_the_hub_is_never_replaced(named, tmp_path):
    process = Warm(tmp_path, warm.script, SCRIPT, "--quick", *named, "--output_dir", tmp_path / "out")
    assert process.wait() == 1
    assert process.stdout == ""
    assert "Traceback" not in process.stderr
    line = process.stderr.splitlines()[-1]  # libraries that transformers imports print the lines before
    assert line.startswith("train.py: error: ")
    assert "nobody/nothing" in line
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_says_so_and_saves_no_adapter(train, short_text, tmp_path, capsys):
    flags = ["--train_file", str(short_text), "--max_length", "64", "--learning_rate", "1e9", "--num_epochs", "9"]
    with pytest.raises(SystemExit, match="training diverged; lower --learning_rate"):
        train.main([*flags, "--output_dir", str(tmp_path)])
    assert not (tmp_path / "adapter_model.safetensors").exists()
    rows_of(tmp_path)

"""Runs of examples/train.py that are interrupted, restarted, divided over processes, or refused."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
import yaml
from rotation import often
from warm import Warm

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import minipeft
from minipeft.files.format import open_adapter
from minipeft.training.distributed import accelerator
from minipeft.training.distributed.launch import check_processes, must_use_cpu
from minipeft.training.runs.checkpoints import Checkpoints
from minipeft.training.runs.lock import RunLock

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train.py"
DEATHS = ROOT / "tests" / "deaths.py"
CODE = gzip.decompress((ROOT / "examples/assets/corpus/code-train.txt.gz").read_bytes()).decode()
LAUNCH = ["-m", "accelerate.commands.launch"]
TWO = ["--multi_gpu", "--num_processes=2", "--mixed_precision=no", "--dynamo_backend=no"]
ONE_MACHINE = ["--num_machines=1", "--main_process_port=0"]


def environment(**more):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    env["OMP_NUM_THREADS"] = "1"
    return env | more


def start(*command, **more):
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment(**more), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(*command, **more):
    process = start(*command, **more)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]


def course(directory):
    """What a run computed: every loss and its step, but not the speed."""
    return [
        (row["step"], row["epoch"], row.get("loss"), row.get("learning_rate"), row.get("eval_loss"))
        for row in rows_of(directory)
    ]


def assert_same_run(found, expected):
    assert course(found) == course(expected)
    one, other = (load_file(directory / "adapter_model.safetensors") for directory in (found, expected))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def as_interrupted(run_directory, copy, step):
    """A copy of a run's directory as it was just after the checkpoint of this step was written."""
    shutil.copytree(run_directory / "checkpoints" / f"step-{step:08d}", copy / "checkpoints" / f"step-{step:08d}")
    rows = [
        row for row in rows_of(run_directory) if row["step"] <= step + 1
    ]  # the row of the next update had been written too
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "cut', "utf-8")
    return copy


@pytest.fixture(scope="module")
def flags(text, small_base):
    """Flags for five updates per epoch, the last a short one, with dropout in the base and in the adapter."""
    return ["--train_file", str(text), "--max_length", "24", "--batch_size", "5", "--dropout", "0.1",
            "--max_steps", "8", "--eval_every", "3",
            "--model_name", str(small_base), "--target_modules", "c_attn,c_proj,c_fc"]  # fmt: skip


def failure(train, *words):
    with pytest.raises(SystemExit) as stopped:
        train.main([str(word) for word in words])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    message = str(stopped.value.code)
    assert message.startswith("train.py: error: ")
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def whole(train, flags, tmp_path_factory):
    """An uninterrupted run with a checkpoint after each update."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    train.main([*flags, "--save_every", "1", "--keep", "99", "--output_dir", str(directory)])
    return directory


@pytest.mark.parametrize("step", often([1, 4, 5, 8], [5, 8]))
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(train, flags, whole, tmp_path, step, capsys):
    directory = as_interrupted(whole, tmp_path / "run", step)
    train.main([*flags, "--resume", "--output_dir", str(directory)])
    assert_same_run(directory, whole)
    assert f"after update {step} of 8" in capsys.readouterr().out


def test_resuming_by_path_goes_back_and_discards_what_came_later(train, flags, whole, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    train.main([*flags, "--resume", str(directory / "checkpoints/step-00000003"), "--output_dir", str(directory)])
    assert_same_run(directory, whole)
    assert [path.name for path in sorted((directory / "checkpoints").iterdir())] == [
        f"step-0000000{step}" for step in (1, 2, 3)
    ]


def test_a_checkpoint_holds_the_adapter_and_never_the_base(whole, small_base):
    folder = Checkpoints(whole).latest()
    assert sum(path.stat().st_size for path in folder.iterdir()) < (small_base / "model.safetensors").stat().st_size
    base = model_of(small_base)
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == minipeft.load_adapter(base, folder).adapter_state_dict().keys()


def model_of(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--learning_rate", "0.01"], "learning_rate: was 0.001, is 0.01"),
        (["--rank", "4"], "rank: was 8, is 4"),
        (["--train_file", "{other}"], "data.train: was"),
        (["--max_steps", "9"], "max_steps: was 8, is 9"),
    ],
)
def test_a_changed_configuration_or_text_is_refused_with_the_differences(train, flags, whole, tmp_path, changed, words):
    directory = as_interrupted(whole, tmp_path / "run", 4)
    before = (directory / "metrics.jsonl").read_bytes()
    other = tmp_path / "other.txt"
    other.write_text(CODE[10:1910], "utf-8")
    message = failure(
        train, *flags, *(flag.format(other=other) for flag in changed), "--resume", "--output_dir", directory
    )
    assert words in message
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_a_directory_that_holds_a_run_is_not_overwritten_unasked(train, flags, whole, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    assert "holds a run already" in failure(train, *flags, "--output_dir", directory)
    assert course(directory) == course(whole)
    train.main([*flags, "--max_steps", "2", "--overwrite", "--output_dir", str(directory)])
    assert [row["step"] for row in rows_of(directory)] == [0, 1, 2, 2]
    assert not list((directory / "checkpoints").iterdir())
    saved = yaml.safe_load((directory / "train_config.yaml").read_text("utf-8"))
    assert not {"overwrite", "resume", "config"} & saved.keys()  # or --config would overwrite a run unasked


def test_a_run_that_is_refused_overwrites_nothing(train, flags, whole, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    assert "start more" in failure(train, *flags, "--overwrite", "--fsdp", "--output_dir", directory)
    assert_same_run(directory, whole)
    assert sorted(os.listdir(directory / "checkpoints")) == sorted(os.listdir(whole / "checkpoints"))


def test_a_checkpoint_of_another_run_is_not_gone_on_from(train, flags, whole, tmp_path):
    """Its metrics are elsewhere, and the later checkpoints of this run would go."""
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    message = failure(train, *flags, "--resume", whole / "checkpoints/step-00000003", "--output_dir", directory)
    assert "in its own --output_dir" in message
    assert sorted(os.listdir(directory / "checkpoints")) == sorted(os.listdir(whole / "checkpoints"))


def test_there_must_be_something_to_resume(train, flags, tmp_path):
    assert "no complete checkpoint" in failure(train, *flags, "--resume", "--output_dir", tmp_path / "run")
    message = failure(train, *flags, "--resume", tmp_path / "nothing", "--output_dir", tmp_path / "run")
    assert "nothing" in message


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_named(train, flags, whole, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    file = directory / "checkpoints/step-00000008/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    message = failure(train, *flags, "--resume", "--output_dir", directory)
    assert "optimizer.safetensors" in message
    assert "step-00000007" in message


def test_the_wrong_base_is_refused(train, flags, whole, small_base, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(small_base, other)
    base = model_of(small_base)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.5)
    base.save_pretrained(other)
    directory = as_interrupted(whole, tmp_path / "run", 4)
    message = failure(train, *flags, "--model_name", other, "--resume", "--output_dir", directory)
    assert "model_name: was" in message


def test_two_runs_do_not_share_a_directory(train, flags, tmp_path):
    with RunLock(tmp_path / "run"):
        message = failure(train, *flags, "--output_dir", tmp_path / "run")
    assert f"process {os.getpid()}" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_run(train, flags, whole, tmp_path, monkeypatch, capsys):
    save = Checkpoints.save

    def full(self, step, write, **options):
        if step == 4:
            raise minipeft.CheckpointError("no space left on the disk")
        return save(self, step, write, **options)

    monkeypatch.setattr(Checkpoints, "save", full)
    train.main([*flags, "--save_every", "2", "--keep", "9", "--output_dir", str(tmp_path / "run")])
    assert "warning: no checkpoint: no space left" in capsys.readouterr().err
    assert [path.name[-1] for path in sorted((tmp_path / "run/checkpoints").iterdir())] == ["2", "6", "8"]
    assert_same_run(tmp_path / "run", whole)


def test_sigterm_saves_and_exits_as_the_signal_would(train, flags, whole, tmp_path):
    directory = tmp_path / "run"
    process = Warm(tmp_path, warm.brief, SCRIPT, *flags, "--output_dir", directory)
    log, deadline = directory / "metrics.jsonl", time.monotonic() + 100
    while (
        not (log.exists() and log.stat().st_size) and time.monotonic() < deadline
    ):  # until the first row is there, the base's
        time.sleep(0.02)
    process.terminate()
    assert process.wait() == 143, process.stderr
    assert "stopped by SIGTERM after update" in process.stdout
    train.main([*flags, "--resume", "--output_dir", str(directory)])
    assert_same_run(directory, whole)


def test_a_yaml_file_gives_flags_and_the_resolved_configuration_is_one(train, text, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"train_file: {text}\nrank: 4\nmax_steps: 2\nlean: true\nmax_length: 24\n", "utf-8")
    train.main(["--config", str(file), "--rank", "2", "--output_dir", str(tmp_path / "a")])
    saved = yaml.safe_load((tmp_path / "a" / "train_config.yaml").read_text("utf-8"))
    assert (saved["rank"], saved["max_steps"], saved["lean"], saved["learning_rate"]) == (2, 2, True, 1e-3)
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(["--config", str(tmp_path / "a" / "train_config.yaml"), "--output_dir", str(tmp_path / "b")])
    assert_same_run(tmp_path / "b", tmp_path / "a")
    for content, words in (("lerning_rate: 1", "--lerning_rate"), ("rank: [1]", "one value"), ("a: b: c", "YAML")):
        file.write_text(content, "utf-8")
        assert words in failure(train, "--config", file)


PROMPTS = [{"prompt": f"def f{i}(x):\n", "completion": f"    return {i} * x\n"} for i in range(40)]


def test_prompts_with_completions_learn_the_completions_only(train, small_base, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), "utf-8")
    flags = ["--train_file", str(file), "--max_steps", "4", "--learning_rate", "0.005", "--max_length", "64"]
    train.main([*flags, "--output_dir", str(tmp_path / "run")])
    first, *_, last = [row["eval_loss"] for row in rows_of(tmp_path / "run") if "eval_loss" in row]
    assert last < first
    from transformers import AutoTokenizer

    tokenizer, base = AutoTokenizer.from_pretrained(small_base), model_of(small_base).eval()
    total, tokens = 0.0, 0
    for row in PROMPTS[-2:]:  # five percent of forty
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            scores = base(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        total -= float(scores[range(len(ids[0]) - 1), ids[0, 1:]][len(prompt) - 1 :].sum())
        tokens += len(completion)
    assert first == pytest.approx(total / tokens, rel=1e-5)


def test_packed_prompts_are_evaluated_as_padded_ones_and_resumed_exactly(train, flags, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), "utf-8")
    flags = [*flags[4:], "--train_file", str(file), "--max_length", "64", "--batch_size", "2"]
    train.main([*flags, "--output_dir", str(tmp_path / "padded")])
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main([*flags, "--packing", "--save_every", "3", "--keep", "9", "--output_dir", str(tmp_path / "whole")])
    packed, padded = rows_of(tmp_path / "whole")[0], rows_of(tmp_path / "padded")[0]
    assert packed["eval_loss"] == pytest.approx(padded["eval_loss"], rel=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    directory = as_interrupted(tmp_path / "whole", tmp_path / "run", 3)
    train.main([*flags, "--packing", "--resume", "--output_dir", str(directory)])
    assert_same_run(directory, tmp_path / "whole")


def test_a_stream_is_resumed_where_it_was(train, flags, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [line for line in CODE.splitlines() if len(line) > 20][:300]
    rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8")
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text(json.dumps({"text": CODE[:2000]}) + "\n", "utf-8")
    stream = [*flags[2:], "--train_file", str(rows), "--eval_file", str(held_out), "--streaming"]
    train.main([*stream, "--save_every", "3", "--keep", "9", "--output_dir", str(tmp_path / "whole")])
    AcceleratorState._reset_state(reset_partial_state=True)
    directory = as_interrupted(tmp_path / "whole", tmp_path / "run", 3)
    train.main([*stream, "--resume", "--output_dir", str(directory)])
    assert_same_run(directory, tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--streaming"], "--max_steps"),
        (["--streaming", "--max_steps", "3", "--train_file", "{text}"], "--eval_file"),
        (["--log_with", "nonsense"], "no such tracker"),
        (["--auto_batch", "--fsdp"], "--fsdp"),
        (["--quantize", "nf4", "--fsdp"], "--quantize"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--keep", "0"], "--keep 0"),
        (["--fsdp"], "start more"),
        (["--config", "{text}.nowhere"], "--config"),
        (["--checkpointing", "most"], "most"),
        (["--lora_plus_ratio", "0.5"], "ratio"),
    ],
)
def test_flags_that_do_not_fit_are_said(train, text, tmp_path, flags, words):
    found = [flag.format(text=text) for flag in flags]
    assert words in failure(train, *found, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_tracker_whose_package_is_missing_is_an_error(train, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "get_available_trackers", list)
    assert "not installed" in failure(train, "--log_with", "wandb", "--output_dir", tmp_path / "out")


def test_leaner_ways_of_training_follow_the_same_course(train, flags, text, small_base, tmp_path):
    """Without dropout, since slices of a batch draw other masks."""
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    config = json.loads((base / "config.json").read_text("utf-8"))
    config |= {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    common = ["--model_name", str(base), "--train_file", str(text), "--max_length", "24", "--max_steps", "3"]
    train.main([*common, "--output_dir", str(tmp_path / "plain")])
    for more in (["--lean"], ["--checkpointing", "block"], ["--auto_batch"]):
        AcceleratorState._reset_state(reset_partial_state=True)
        directory = tmp_path / more[-1]
        train.main([*common, *more, "--output_dir", str(directory)])
        found, expected = ([row[2] or row[4] for row in course(d)] for d in (directory, tmp_path / "plain"))
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_quantized_base_trains_and_the_merged_model_is_checked(train, flags, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    train.main([*flags, "--quantize", "nf4", "--learning_rate", "0.005", "--output_dir", str(tmp_path / "run")])
    losses = [row["eval_loss"] for row in rows_of(tmp_path / "run") if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.05
    assert "merged against trained model" in capsys.readouterr().out


def test_lora_plus_gives_b_its_own_rate_in_the_run(train, flags, tmp_path):
    train.main([*flags, "--max_steps", "2", "--lora_plus_ratio", "16", "--save_every", "2",
                "--output_dir", str(tmp_path / "run")])  # fmt: skip
    state = json.loads((Checkpoints(tmp_path / "run").latest() / "state.json").read_text("utf-8"))
    text = json.dumps(state["optimizer"])
    assert "lora_B" in text
    assert '"initial_lr": 0.016' in text


@pytest.fixture(scope="module")
def pair(flags, tmp_path_factory):
    """Two processes, uninterrupted, with dropout."""
    directory = tmp_path_factory.mktemp("pair") / "run"
    words = [*flags, "--save_every", "2", "--keep", "9", "--output_dir", directory]
    warm.ranks(directory.parent, warm.brief, SCRIPT, *words, ACCELERATE_USE_CPU="true")
    return directory


def launched(directory, *words):
    """Exit code and output of `accelerate launch`, whose processes start warm."""
    process = Warm(directory, warm.launch, *words, ACCELERATE_USE_CPU="true")
    return process.wait(), process.stdout + process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("cold", [False, True])
def test_a_killed_process_takes_the_others_down_and_the_launch_goes_on_from_the_checkpoint(cold, pair, flags, tmp_path):
    """The first process dies in its fourth save; the launcher restarts both, and they go on from the third."""
    directory = tmp_path / "run"
    words = [*TWO, *ONE_MACHINE, "--max_restarts=1", DEATHS, "4", SCRIPT]
    words += [*flags, "--save_every", "2", "--keep", "9", "--output_dir", directory]
    code, output = run(*LAUNCH, *words) if cold else launched(tmp_path, *words)
    assert code == 0, output
    assert "going on from" in output
    assert "after update 6 of 8" in output
    assert_same_run(directory, pair)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_within_a_minute(flags, tmp_path):
    directory = tmp_path / "run"
    began = time.monotonic()
    code, output = run(*LAUNCH, *TWO, *ONE_MACHINE, DEATHS, "3", SCRIPT, *flags, "--save_every", "2",
                       "--output_dir", directory)  # fmt: skip
    assert code != 0, output
    assert time.monotonic() - began < 60
    latest = Checkpoints(directory).latest()
    assert latest is not None, output
    assert latest.name == "step-00000004"


@pytest.mark.slow
def test_another_number_of_processes_is_refused_to_go_on(train, flags, pair, tmp_path):
    directory = as_interrupted(pair, tmp_path / "run", 4)
    assert "2 processes" in failure(train, *flags, "--resume", "--output_dir", directory)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["two nodes", "fsdp", "torchrun"])
def test_however_they_are_started_two_processes_follow_the_course(way, flags, pair, tmp_path):
    directory = tmp_path / "run"
    words = [SCRIPT, *flags, "--output_dir", directory]
    if way == "two nodes":
        address = ["--num_machines=2", "--main_process_ip=127.0.0.1", "--main_process_port=29611"]
        nodes = [start(*LAUNCH, *TWO, *address, f"--machine_rank={rank}", *words) for rank in (0, 1)]
        outputs = [node.communicate(timeout=200)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], outputs
    elif way == "fsdp":
        code, output = run(*LAUNCH, *TWO, *ONE_MACHINE, *words, "--fsdp")
        assert code == 0, output
        known = open_adapter(directory).base
        assert known == open_adapter(pair).base
        assert all(known.values())
    else:
        command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29612", *words]
        code, output = run(*command, ACCELERATE_USE_CPU="false")
        assert code == 0, output
    found, expected = ([row[2] or row[4] for row in course(d)] for d in (directory, pair))
    assert found == pytest.approx(expected, rel=1e-5)


def test_fewer_processes_than_were_asked_for_stop_with_the_command_that_works(tmp_path):
    words = [SCRIPT, "--quick", "--output_dir", tmp_path / "out"]
    code, output = launched(tmp_path, "--cpu", "--num_processes=2", *words)
    assert code == 1
    assert "several processes were asked for, but 1 trains" in output
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in output
    assert not (tmp_path / "out").exists()


def test_the_number_of_processes_is_compared_with_what_was_asked_for():
    check_processes(1, "train.py", {})
    check_processes(2, "train.py", {"WORLD_SIZE": "2", "MASTER_ADDR": "x"})
    check_processes(1, "train.py", {"MASTER_ADDR": "x"})  # a variable of the user's own
    with pytest.raises(minipeft.ConfigError, match="2 processes were asked for, but 1 trains"):
        check_processes(1, "train.py", {"WORLD_SIZE": "2", "MASTER_ADDR": "x"})
    assert must_use_cpu({"WORLD_SIZE": "2"}) == (not torch.accelerator.is_available())
    assert not must_use_cpu({})

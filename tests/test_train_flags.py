"""The flags of examples/train.py for a real run: what is loaded, how it learns, and where it ends up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from rotation import often  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import minipeft  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
ASSETS = Path(__file__).resolve().parents[1] / "examples" / "assets"
TINY = ASSETS / "tiny"


@pytest.fixture(scope="module")
def bf16_base(small_base, tmp_path_factory):
    """The small base as a checkpoint in bfloat16."""
    directory = tmp_path_factory.mktemp("bf16")
    transformers.AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TINY / name).read_bytes())
    return directory


@pytest.fixture
def go(train, text, tmp_path):
    """Runs three updates in `tmp_path / "run"`, unless flags say otherwise, and gives that directory."""

    def go(*flags, name="run"):
        common = ["--train_file", text, "--max_length", "24", "--batch_size", "5", "--max_steps", "3"]
        train.main([str(word) for word in (*common, "--output_dir", tmp_path / name, *flags)])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return tmp_path / name

    return go


@pytest.fixture
def refused(go):
    """The one line with which a run is refused."""

    def refused(*flags):
        with pytest.raises(SystemExit) as stopped:
            go(*flags)
        message = str(stopped.value.code)
        assert message.startswith("train.py: error: ")
        assert "\n" not in message
        return message

    return refused


@pytest.fixture
def bases(train, monkeypatch):
    """The bases that a run loads, each with the dtype it had."""
    found = []
    load = train.load_base

    def load_base(*args):
        tokenizer, model = load(*args)
        found.append((model, model.dtype))
        return tokenizer, model

    monkeypatch.setattr(train, "load_base", load_base)
    return found


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]


def rates_of(directory):
    return [row["learning_rate"] for row in rows_of(directory) if "loss" in row]


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [([], torch.float32), (["--dtype", "bf16"], torch.bfloat16), (["--dtype", "auto"], torch.bfloat16)],
)
def test_the_base_is_loaded_once_and_in_the_dtype_asked_for(go, bases, bf16_base, capsys, flags, dtype):
    directory = go("--model_name", bf16_base, *flags)
    assert [found for _, found in bases] == [dtype]
    assert {value.dtype for value in load_file(directory / "adapter_model.safetensors").values()} == {torch.float32}
    out = capsys.readouterr().out
    assert "reloaded against trained model: logits differ by 0.0e+00" in out
    assert "merged against trained model" in out


def test_auto_is_the_dtype_of_the_checkpoint(train):
    args = train.parse_args(["--model_name", str(TINY), "--dtype", "auto"])
    assert train.load(args)[1].dtype == torch.float32


@pytest.mark.parametrize("flags", [["--lean"], ["--quantize", "int8_weight_only", "--dtype", "bf16"]])
def test_the_final_check_works_within_the_one_base(go, bases, capsys, flags):
    go(*flags)
    assert len(bases) == 1
    assert "merged against trained model" in capsys.readouterr().out


def test_the_final_check_notices_a_file_that_is_not_the_trained_adapter(go, train, monkeypatch):
    save = train.Run.save_adapter

    def save_another(run):
        with torch.no_grad():
            next(parameter for parameter in run.model.parameters() if parameter.requires_grad).mul_(2)
        save(run)
        with torch.no_grad():
            next(parameter for parameter in run.model.parameters() if parameter.requires_grad).div_(2)

    monkeypatch.setattr(train.Run, "save_adapter", save_another)
    with pytest.raises(SystemExit, match="the reloaded adapter is not the one that was trained"):
        go("--learning_rate", "0.01")


def test_attn_implementation_reaches_the_model(train):
    model = train.load(train.parse_args(["--attn_implementation", "eager"]))[1]
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["flash_attention_2", "fast"])
def test_an_attention_that_is_not_there_is_refused_by_its_flag(refused, name):
    assert f"--attn_implementation {name}" in refused("--attn_implementation", name)


OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit"]


@pytest.mark.parametrize("name", often(OPTIMIZERS, OPTIMIZERS[1:3]))
def test_each_optimizer_is_what_its_name_says_trains_and_resumes_bit_for_bit(go, train, monkeypatch, tmp_path, name):
    made, make = [], train.optimizers.make_optimizer
    monkeypatch.setattr(train.optimizers, "make_optimizer", lambda *args: made.append(make(*args)) or made[-1])
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    flags = ["--optim", name, "--rank", "64", "--save_every", "1", "--keep", "9"]
    whole = load_file(go(*flags) / "adapter_model.safetensors")
    rows = rows_of(tmp_path / "run")
    go(*flags, "--resume", tmp_path / "run/checkpoints/step-00000002")
    again = load_file(tmp_path / "run/adapter_model.safetensors")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert [row.get("loss") for row in rows_of(tmp_path / "run")] == [row.get("loss") for row in rows]
    for optimizer in made:
        assert type(optimizer).__name__ == ("AdamW8bit" if "8bit" in name else "AdamW")
        assert optimizer.defaults.get("fused") is (True if "fused" in name else None)
        if "8bit" in name:
            assert {values["state1"].dtype for values in optimizer.state.values()} == {torch.uint8}


def test_an_optimizer_that_is_not_there_is_refused_by_name(refused, monkeypatch):
    assert "choose one of adamw_torch, " in refused("--optim", "adam")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--optim adamw_8bit needs bitsandbytes" in refused("--optim", "adamw_8bit")


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        (["--lr_scheduler_type", "constant"], [1e-3] * 4),
        (["--lr_scheduler_type", "cosine", "--warmup_ratio", "0"], [1e-3, 8.5355e-4, 5e-4, 1.4645e-4]),
        (["--lr_scheduler_type", "constant_with_warmup", "--warmup_ratio", "0.5"], [0, 5e-4, 1e-3, 1e-3]),
        (["--warmup_ratio", "0.5"], [0, 5e-4, 1e-3, 5e-4]),
    ],
)
def test_the_learning_rate_follows_the_schedule(go, flags, rates):
    assert rates_of(go("--max_steps", "4", *flags)) == pytest.approx(rates, rel=1e-4)


def test_a_warm_up_that_would_not_happen_is_refused(refused):
    assert "constant has no warm-up" in refused("--lr_scheduler_type", "constant", "--warmup_ratio", "0.1")
    assert "--warmup_ratio 2.0" in refused("--warmup_ratio", "2")


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--init", "pissa"], {"init_lora_weights": "pissa"}),
        (["--init", "false"], {"init_lora_weights": False}),
        (["--use_rslora"], {"use_rslora": True}),
        (["--use_dora"], {"use_dora": True}),
        (
            ["--lora_r", "4", "--lora_alpha", "9", "--lora_dropout", "0.5"],
            {"r": 4, "lora_alpha": 9, "lora_dropout": 0.5},
        ),
        (["--method", "loha", "--init", "false"], {"init_weights": False}),
    ],
)
def test_the_options_of_the_method_are_what_was_asked_for(train, flags, options):
    config = train.adapter_config(train.parse_args(flags))
    assert {name: getattr(config, name) for name in options} == options


def test_the_final_check_holds_for_a_start_that_changes_the_base(go, bases, capsys):
    go("--init", "pissa", "--use_rslora")
    assert len(bases) == 1
    assert "reloaded against trained model" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [["--init", "pizza"], ["--method", "vera", "--use_dora"], ["--method", "ia3", "--init", "x"]]
)
def test_an_option_that_the_method_does_not_have_is_refused(refused, flags):
    assert flags[-2 if len(flags) == 4 and "ia3" in flags else -1].lstrip("-").split()[0] in refused(*flags)


def test_a_run_goes_on_from_an_adapter(go, tmp_path):
    first = go("--rank", "4", "--use_rslora", "--learning_rate", "0.01", name="first")
    second = go("--adapter", first, "--warmup_ratio", "0", "--rank", "4", name="second")
    assert rows_of(second)[0]["eval_loss"] == rows_of(first)[-1]["eval_loss"] != rows_of(first)[0]["eval_loss"]
    before, after = (load_file(place / "adapter_model.safetensors") for place in (first, second))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((place / "adapter_config.json").read_text()) for place in (first, second)]
    assert [(config["r"], config["use_rslora"]) for config in configs] == [(4, True)] * 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rank", "8"], "r=8: the adapter in"),
        (["--method", "vera"], "--method vera"),
        (["--init", "pissa"], "init_lora_weights='pissa'"),
        (["--target_modules", "c_fc"], "target_modules=['c_fc']"),
        (["--method_options", "{lora_bias: true}"], "lora_bias=True"),
    ],
)
def test_a_flag_that_contradicts_the_adapter_is_refused(refused, small_base, tmp_path, flags, words):
    model = transformers.AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32)
    config = minipeft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False)
    minipeft.get_lora_model(model, config).save_pretrained(tmp_path / "adapter")
    assert words in refused("--adapter", tmp_path / "adapter", *flags)


def test_evaluations_come_as_often_and_are_as_long_as_asked_for(go):
    evaluated = [row["step"] for row in rows_of(go("--eval_steps", "2", "--max_steps", "5")) if "eval_loss" in row]
    assert evaluated == [0, 2, 4, 5]


def test_an_evaluation_takes_no_more_than_the_examples_allowed(go, text, capsys):
    go("--eval_file", text, "--max_eval_examples", "3")
    assert "to evaluate on (eval): 3 examples" in capsys.readouterr().out


def test_gradient_checkpointing_is_leans(train):
    args = train.parse_args(["--gradient_checkpointing"])
    assert (args.lean, args.checkpointing) == (True, "block")


def test_names_of_other_trainers_work_in_files_too(train, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lora_r: 3\nsave_steps: 7\nper_device_train_batch_size: 2\n", "utf-8")
    args = train.parse_args(["--config", str(file)])
    assert (args.rank, args.save_every, args.batch_size) == (3, 7, 2)
    file.write_text("lora_r: 3\nrank: 3\n", "utf-8")
    with pytest.raises(minipeft.ConfigError, match="lora_r and rank are the same flag"):
        train.parse_args(["--config", str(file)])


@pytest.fixture
def hub(monkeypatch):
    """A hub that remembers what it is asked for."""
    asked = []

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        asked.append(("create", repo_id, private))
        return type("Url", (), {"repo_id": f"me/{repo_id}" if "/" not in repo_id else repo_id})

    def create_commit(self, repo_id, operations, **options):
        asked.append(("commit", repo_id, sorted(operation.path_in_repo for operation in operations)))
        return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", create_commit)
    monkeypatch.setattr("huggingface_hub.HfApi.file_exists", lambda *_, **__: False)
    return asked


@pytest.mark.parametrize(
    ("flags", "name", "private"),
    [([], "me/run", None), (["--hub_model_id", "us/it", "--hub_private_repo"], "us/it", True)],
)
def test_the_adapter_is_pushed_to_the_hub_and_the_place_is_tried_first(go, hub, capsys, flags, name, private):
    go("--push_to_hub", *flags)
    assert hub[0] == ("create", name.removeprefix("me/"), private)
    assert hub[-1] == ("commit", name, ["README.md", "adapter_config.json", "adapter_model.safetensors"])
    assert "pushed to https://hub/commit" in capsys.readouterr().out


def test_a_hub_that_refuses_is_noticed_before_the_model_is_loaded(refused, bases, tmp_path):
    assert "us/it" in refused("--push_to_hub", "--hub_model_id", "us/it")  # there is no network here
    assert bases == []
    assert "--push_to_hub" in refused("--hub_model_id", "us/it")


def test_a_finished_run_can_be_extended(go):
    common = ["--lr_scheduler_type", "constant", "--dropout", "0.1", "--save_every", "2", "--eval_every", "9"]
    whole = go(*common, "--max_steps", "4", name="whole")
    go(*common, "--max_steps", "2", name="run")
    extended = go(*common, "--max_steps", "4", "--resume", name="run")
    expected, found = (load_file(place / "adapter_model.safetensors") for place in (whole, extended))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_an_extended_run_goes_on_at_the_rate_of_the_longer_schedule(go, refused):
    go("--max_steps", "2", "--save_every", "1", "--warmup_ratio", "0")
    assert rates_of(go("--max_steps", "4", "--save_every", "1", "--warmup_ratio", "0", "--resume"))[
        2:
    ] == pytest.approx([5e-4, 2.5e-4])
    assert "4 updates are done" in refused("--max_steps", "3", "--warmup_ratio", "0", "--save_every", "1", "--resume")


def test_the_chat_template_of_a_file_takes_the_place_of_the_tokenizers(train, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages }}", "utf-8")
    tokenizer, _ = train.load(train.parse_args(["--chat_template", str(tmp_path / "chat.jinja")]))
    assert tokenizer.chat_template == "{{ messages }}"

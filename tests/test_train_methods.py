"""examples/train.py with other methods than LoRA: their options, their schedule, and runs that go on."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

from accelerate.state import AcceleratorState

from minipeft.registry import registry

ROOT = Path(__file__).resolve().parents[1]
CODE = gzip.decompress((ROOT / "examples/assets/corpus/code-train.txt.gz").read_bytes()).decode()
FILES = ("adapter_config.json", "adapter_model.safetensors")
ADALORA = ["--method", "adalora", "--rank", "2", "--method_options", "{init_r: 4, tfinal: 2}", "--dropout", "0.1"]


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags for five updates per epoch."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(CODE[:3000], "utf-8")
    return ["--train_file", str(path), "--max_length", "64", "--batch_size", "3"]


def test_adalora_learns_how_many_updates_there_are_and_goes_on_to_the_same_bytes(train, flags, tmp_path, capsys):
    whole, again = tmp_path / "whole", tmp_path / "again"
    train.main([*flags, *ADALORA, "--num_epochs", "2", "--save_every", "3", "--keep", "9", "--output_dir", str(whole)])
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text("utf-8").splitlines()]
    config = json.loads((whole / "adapter_config.json").read_text("utf-8"))
    assert config["total_step"] == rows[-1]["step"] > 5
    assert (config["init_r"], config["target_r"], config["lora_dropout"]) == (4, 2, 0.1)
    assert sum(map(sum, config["rank_pattern"].values())) == 2 * len(config["rank_pattern"])
    shutil.copytree(whole / "checkpoints" / "step-00000006", again / "checkpoints" / "step-00000006")
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main([*flags, *ADALORA, "--num_epochs", "2", "--resume", "--output_dir", str(again)])
    assert "after update 6 of" in capsys.readouterr().out
    assert [(whole / name).read_bytes() for name in FILES] == [(again / name).read_bytes() for name in FILES]


@pytest.mark.slow
@pytest.mark.parametrize("method", registry.method_names())
def test_every_method_trains_with_its_own_defaults(train, flags, method, tmp_path, capsys):
    needed = ["--method_options", "{token_indices: [5, 9, 300]}"] if method == "trainable_tokens" else []
    train.main([*flags, "--max_steps", "4", "--method", method, *needed, "--output_dir", str(tmp_path / "run")])
    assert "merged against" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "adalorra"], "adalora"),
        (["--method", "ia3", "--rank", "4"], "--rank: ia3 has no such option"),
        (["--method", "vera", "--alpha", "4"], "--alpha: vera has no such option"),
        (["--method", "adalora", "--rank", "16"], "target_r = 16 exceeds init_r = 12"),
        (["--method_options", "{lora_alhpa: 4}"], "closest: 'lora_alpha'"),
        (["--method_options", "[1]"], "give a mapping"),
        (["--method_options", "{a: b: c"], "not YAML"),
        (["--method", "ia3", "--lora_plus_ratio", "4"], "LoRA+ needs a pair"),
    ],
)
def test_what_a_method_does_not_have_is_said_in_one_line(train, flags, words, said, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        train.main([*flags, "--max_steps", "4", *words, "--output_dir", str(tmp_path / "out")])
    message = str(stopped.value.code)
    assert message.startswith("train.py: error: ")
    assert "\n" not in message
    assert said in message
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_flags_have_the_names_that_the_method_has_for_them(train, tmp_path):
    def config(*words):
        return train.adapter_config(train.parse_args(["--output_dir", str(tmp_path), *words]))

    lora, adalora = config(), config("--method", "adalora", "--rank", "3", "--alpha", "5", "--max_steps", "9")
    assert (lora.method, lora.r, lora.lora_alpha) == ("lora", 8, 16)
    assert (adalora.method, adalora.target_r, adalora.lora_alpha, adalora.total_step) == ("adalora", 3, 5, 9)
    vera = config("--method", "vera", "--method_options", "{d_initial: 0.3}", "--dropout", "0.2")
    assert (vera.r, vera.d_initial, vera.vera_dropout) == (256, 0.3, 0.2)

"""DeepSpeed's ZeRO through the presets of examples/deepspeed: two processes take the steps of one.

DeepSpeed has to be installed, or to lie in a folder that MINIPEFT_DEEPSPEED names. Run as a program,
``python test_deepspeed.py DIRECTORY``, this file is one of the processes that the tests launch.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import gpt2
from tiny_rows import Rows
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import load_file, save_file

import minipeft
from minipeft.files.format import open_adapter
from minipeft.training.data.order import UpdateOrder
from minipeft.training.updates import Updater

ROOT = Path(__file__).resolve().parents[1]
PRESETS = {stage: ROOT / "examples" / "deepspeed" / f"{stage}.yaml" for stage in ("zero2", "zero3")}
SCRIPT = ROOT / "examples" / "train.py"
TINY = ROOT / "examples" / "assets" / "tiny"
FOLDER = os.environ.get("MINIPEFT_DEEPSPEED", "")
needs_deepspeed = pytest.mark.skipif(
    not (importlib.util.find_spec("deepspeed") or (FOLDER and (Path(FOLDER) / "deepspeed").is_dir())),
    reason="needs deepspeed, installed or in the folder MINIPEFT_DEEPSPEED",
)
pytestmark = pytest.mark.slow
LR, SIZE, MICRO_BATCH, UPDATES = 0.1, 7, 2, 6  # an update: passes of 2 and 2, and 2 and 1; the third: 1, and 1
CLIP = 2.0  # of the gradients' norms some are above it, and some below


def in_training(**options):
    torch.manual_seed(0)
    options = {"target_modules": ["c_attn", "c_proj", "c_fc"], "init_lora_weights": False, **options}
    return minipeft.get_lora_model(gpt2(), minipeft.LoraConfig(r=4, **options)).train()


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def engine_of(accelerator, model, **config):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "gradient_accumulation_steps": 1,
        **config,
    }
    accelerator.deepspeed_plugin.deepspeed_config.update(config)
    return accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=LR))


def refused(model, engine, optimizer, accelerator, **options):
    try:
        updater = Updater(
            accelerator, model, optimizer, **{"micro_batch": 2, "clip": CLIP, "engine": engine, **options}
        )
        updater(UpdateOrder(Rows(), SIZE, seed=0)[0])
    except minipeft.StateError as error:
        return str(error)
    return None


def process(directory):
    import deepspeed

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    model = in_training()
    engine, optimizer = engine_of(accelerator, model)
    found = {"world": accelerator.num_processes, "base": model.transformer.wte.weight.numel()}
    found["auto_batch"] = refused(model, engine, optimizer, accelerator, auto_batch=True)
    found["clip"] = refused(model, engine, optimizer, accelerator, clip=1.0)
    updater = Updater(accelerator, model, optimizer, micro_batch=MICRO_BATCH, clip=CLIP, engine=engine)
    order = UpdateOrder(Rows(), SIZE, seed=0)
    found["losses"] = [updater(order[number]) for number in range(UPDATES)]
    with deepspeed.zero.GatheredParameters(trainable(model)):
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    other = gpt2()
    other.idle = nn.Linear(4, 4)  # that forward does not call
    other = minipeft.get_lora_model(other, minipeft.LoraConfig(target_modules=["c_attn", "idle"])).train()
    found["idle"] = refused(other, *engine_of(accelerator, other), accelerator)
    if accelerator.is_main_process:
        save_file(weights, directory / "weights.safetensors")
        (directory / "found.json").write_text(json.dumps(found))


def run(*command, **more):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | more
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [FOLDER, env.get("PYTHONPATH"), str(ROOT / "tests")]))
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=env, text=True, timeout=230, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )  # fmt: skip
    return done.returncode, done.stdout


def launch(stage, *command, **more):
    more = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false", **more}
    return run("-m", "accelerate.commands.launch", "--config_file", PRESETS[stage], *command, **more)


def by_hand():
    """The losses, the gradients' norms and the last weights of the same steps, example by example, in float64."""
    model, rows = in_training().double(), Rows()
    order, losses, norms = UpdateOrder(rows, SIZE, seed=0), [], []
    for number in range(UPDATES):
        total, examples = 0.0, rows.rows(order[number].indices)
        for example in examples:
            ids, labels = (torch.from_numpy(a.astype(np.int64))[None] for a in example[:2])
            logits = model(input_ids=ids).logits[0, :-1]
            total = total + F.cross_entropy(logits, labels[0, 1:], reduction="sum")
        loss = total / sum(int((example.labels[1:] != -100).sum()) for example in examples)
        gradients = torch.autograd.grad(loss, trainable(model))
        norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
        with torch.no_grad():
            for parameter, gradient in zip(trainable(model), gradients, strict=True):
                parameter -= LR * gradient * min(1, CLIP / norm)
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@needs_deepspeed
@pytest.mark.parametrize("stage", PRESETS)
def test_two_processes_take_the_steps_of_the_mean_over_all_tokens(stage, tmp_path):
    """With plain SGD, which, other than Adam, tells a gradient from its double."""
    losses, norms, weights = by_hand()
    assert min(norms) < 0.9 * CLIP
    assert max(norms) > 1.1 * CLIP
    code, output = launch(stage, __file__, tmp_path)
    assert code == 0, output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["world"] == 2
    assert found["base"] == (0 if stage == "zero3" else gpt2().transformer.wte.weight.numel())
    assert found["losses"] == pytest.approx(losses, abs=1e-5)
    saved = load_file(tmp_path / "weights.safetensors")
    assert saved.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name].double(), weight, rtol=1e-4, atol=1e-5)
    assert "auto_batch does not work with" in found["auto_batch"]
    assert "gradient_clipping 2.0" in found["clip"]
    assert "'idle': the model neither called nor read this layer" in found["idle"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Rows of different lengths, three updates an epoch, the last a short one; no dropout."""
    folder = tmp_path_factory.mktemp("data")
    words = ["def", "read", "self", "return", "size", "line", "in", "file", "not", "close", "while"]
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(words, size)) for size in generator.integers(2, 12, 30)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8")
    base = folder / "base"
    base.mkdir()
    for file in TINY.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text()) | {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    (base / "config.json").write_text(json.dumps(config))
    return ["--model_name", base, "--target_modules", "c_attn,c_proj,c_fc", "--train_file", folder / "train.jsonl",
            "--no-packing", "--max_length", "48", "--max_steps", "7", "--eval_every", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def single(flags, tmp_path_factory):
    """One process, without DeepSpeed."""
    directory = tmp_path_factory.mktemp("single") / "run"
    code, output = run(SCRIPT, *flags, "--batch_size", "12", "--output_dir", directory, ACCELERATE_USE_CPU="true")
    assert code == 0, output
    return directory


def losses_of(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row.get("loss", row.get("eval_loss")) for row in rows]


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "more"), [("zero2", []), ("zero3", []), ("zero3", ["--lean", "--checkpointing=block"])]
)
def test_a_run_of_two_processes_has_the_losses_of_one(stage, more, flags, single, tmp_path):
    directory = tmp_path / "run"
    divided = ["--batch_size=3", "--gradient_accumulation_steps=2", *more]
    code, output = launch(stage, SCRIPT, *flags, *divided, "--output_dir", directory)
    assert code == 0, output
    assert losses_of(directory) == pytest.approx(losses_of(single), abs=1e-5)
    assert open_adapter(directory).base == open_adapter(single).base  # also where the base is in pieces
    saved, expected = (load_file(path / "adapter_model.safetensors") for path in (directory, single))
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-4)


@needs_deepspeed
def test_accelerates_own_switch_to_the_cpu_is_refused_since_it_drops_deepspeed(flags, tmp_path):
    code, output = launch("zero2", SCRIPT, *flags, "--output_dir", tmp_path / "run", ACCELERATE_USE_CPU="true")
    assert code != 0
    assert "train.py: error: accelerate is told to use both DeepSpeed and the CPU without it" in output
    assert not (tmp_path / "run").exists()


def fake(mixed_precision="no", **config):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}, **config})
    return SimpleNamespace(deepspeed_plugin=plugin, mixed_precision=mixed_precision, num_processes=2)


@pytest.mark.parametrize(
    ("words", "accelerator", "message"),
    [
        (["--save_every", "2"], fake(), "--save_every and --resume do not go with DeepSpeed"),
        (["--resume"], fake(), "--save_every and --resume do not go with DeepSpeed"),
        (["--fsdp"], fake(), "--fsdp and --auto_batch do not go with DeepSpeed"),
        (["--push_to_hub"], fake(), "--push_to_hub does not go with DeepSpeed"),
        (["--auto_batch"], fake(), "--fsdp and --auto_batch do not go with DeepSpeed"),
        ([], fake(mixed_precision="bf16"), "mixed_precision bf16: DeepSpeed would round the weights"),
        ([], fake(optimizer={"type": "AdamW"}), "configuration has its own optimizer"),
        ([], fake(gradient_clipping=0.5), "gradient_clipping is 0.5, and must be 1.0 here"),
        ([], fake(gradient_accumulation_steps=4), "gradient_accumulation_steps is 4, and must be 1 here"),
        ([], fake(train_batch_size=8), "train_batch_size is 8, and must be 16 here"),
    ],
)
def test_what_deepspeed_would_do_otherwise_is_refused_in_one_line(
    train, tmp_path, monkeypatch, words, accelerator, message
):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(train, "start_accelerator", lambda *_: accelerator)
    with pytest.raises(SystemExit, match=message) as stopped:
        train.main([*words, "--output_dir", str(tmp_path / "run")])
    assert str(stopped.value).startswith("train.py: error: ")
    assert "\n" not in str(stopped.value)


def test_deepspeed_is_told_what_the_flags_say(train, tmp_path, monkeypatch):
    args = train.parse_args(["--batch_size", "5", "--gradient_accumulation_steps", "3", "--output_dir", str(tmp_path)])
    accelerator = fake(train_micro_batch_size_per_gpu="auto")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(train, "start_accelerator", lambda *_: accelerator)
    config = train.make_accelerator(args).deepspeed_plugin.deepspeed_config
    assert config["train_micro_batch_size_per_gpu"] == 5
    assert config["gradient_clipping"] == train.CLIP
    assert config["gradient_accumulation_steps"] == 1
    assert config["zero_force_ds_cpu_optimizer"] is False


if __name__ == "__main__":
    process(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # whose threads a process that ends may not leave running

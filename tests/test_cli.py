"""The commands as a shell sees them."""

import errno
import json
import math
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import typer
from method_cases import ours
from safetensors.torch import load_file, save_file
from tiny_models import adapted, disturb, foreign_code, gpt2, llama
from typer.testing import CliRunner

import minipeft
from minipeft import CheckpointError
from minipeft.cli.main import app, main

QV = {"target_modules": ["q_proj", "v_proj"]}
METHODS = {
    "LORA": "",
    "ADALORA": "adalora default",
    "LOHA": "loha",
    "LOKR": "lokr",
    "OFT": "oft",
    "IA3": "ia3",
    "VERA": "vera",
}


def run(*arguments):
    with foreign_code():
        result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*arguments):
    return json.loads(run(*arguments, "--json").output)


@pytest.fixture
def adapter(tmp_path):
    minipeft.get_lora_model(gpt2(), minipeft.LoraConfig(r=4)).save_pretrained(tmp_path)
    return tmp_path


def test_help_answers_without_torch():
    code = "import sys\nfrom minipeft.cli.main import main\nfor command in ('inspect', 'check', 'convert', 'doctor'):\n"
    code += "    sys.argv = ['minipeft', command, '--help']\n    try: main()\n    except SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("inspect", "check", "convert", "doctor"):
        assert f"{command} [OPTIONS]" in result.stdout
    assert result.stdout.endswith("False\n")


def test_a_full_disk_under_what_is_printed_is_one_line(adapter, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minipeft", "inspect", str(adapter)])
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(typer, "echo", Mock(side_effect=full))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "minipeft: what it says cannot be written: No space left on device.\n"


def test_an_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minipeft", "inspect", str(tmp_path / "nothing")])
    program = Path(minipeft.__file__).with_name("__main__.py")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(program), run_name="__main__")  # as `python -m minipeft` does
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.out == ""
    assert said.err.startswith("minipeft: ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["nothing"],
        ["inspect", "a", "--colour"],
        ["check", "a", "--for", "word"],
        ["check", "a", "--try"],
        ["check", "a", "--base", "b"],
        ["convert", "a", "--for", "vllm"],
        ["convert", "a", "b", "--for", "word"],
        ["convert", "a", "b", "--for", "vllm", "--drop", "everything"],
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minipeft", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert (caught.value.code, said.out) == (2, "")
    assert said.err.startswith("minipeft: ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("command", ["inspect", "check", "convert"])
def test_what_is_no_adapter_is_named_as_what_it_is(command, tmp_path):
    gpt2().save_pretrained(tmp_path / "model")
    more = [tmp_path / "out"] if command == "convert" else []
    with pytest.raises(CheckpointError, match="a whole model"):
        run(command, tmp_path / "model", *more)


def test_inspect_prints_json_for_programs(adapter):
    found = as_json("inspect", adapter)
    assert found["config"]["r"] == 4
    assert [row["shape"] for row in found["tensors"]] == [[4, 32], [96, 4]] * 2
    assert found["unusual"] == [
        "Updates of zero (2 of 2): 'transformer.h.0.attn.c_attn', 'transformer.h.1.attn.c_attn'."
    ]


def test_norms_are_those_of_the_updates(tmp_path):
    options = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    model = adapted(llama(), **QV, **options)
    model.save_pretrained(tmp_path)
    layers = as_json("inspect", tmp_path)["layers"]
    assert {layer["rank"] for layer in layers} == {2, 4}
    for layer in layers:
        part = model.get_submodule(layer["module"])
        up, down = part.adapter("default").factors()
        assert layer["norm"] == pytest.approx(float((up @ down).detach().norm()), rel=1e-5)
        # Of eight samples one gets an idea of the weight's norm.
        assert layer["relative"] == pytest.approx(
            layer["norm"] / float(part.base_layer.weight.detach().norm()), rel=1.0
        )


def test_the_start_that_pissa_subtracts_is_no_update(tmp_path):
    torch.manual_seed(0)
    config = minipeft.LoraConfig(r=4, init_lora_weights="pissa", **QV)
    minipeft.get_lora_model(llama(), config).save_pretrained(tmp_path)
    found = as_json("inspect", tmp_path)
    assert all(layer["norm"] < 1e-5 for layer in found["layers"])
    assert any("minipeft's own" in sentence for sentence in found["unusual"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_shown(method, tmp_path):
    model = disturb(ours(METHODS[method])) if METHODS[method] else adapted(llama())
    model.save_pretrained(tmp_path)
    found = as_json("inspect", tmp_path)
    assert found["method"] == method
    assert all(layer["norm"] > 0 for layer in found["layers"])
    assert {layer["module"] for layer in found["layers"]} == {
        name for name, module in model.named_modules() if hasattr(module, "adapter")
    }
    said = run("inspect", tmp_path).output
    assert f"{method} adapter" in said
    of_tensors = bool(found["layers"]) and method not in ("LORA", "ADALORA")
    assert {layer["norm_of"] for layer in found["layers"]} <= {"tensors" if of_tensors else "update"}
    assert ("Norms are those of the tensors" in said) == of_tensors


def test_what_is_trained_besides_is_shown(tmp_path):
    model = adapted(llama(), modules_to_save=["lm_head"], trainable_token_indices=[3, 5], use_dora=True)
    model.save_pretrained(tmp_path)
    found = as_json("inspect", tmp_path)
    assert found["modules_to_save"] == [{"module": "lm_head", "tensor": "weight", "shape": [100, 32], "bytes": 12800}]
    assert found["tokens"] == [{"module": "model.embed_tokens", "rows": 2, "width": 32}]
    text = run("inspect", tmp_path).output
    assert "trained in full:" in text
    assert "rows of tokens:" in text


def test_what_is_unusual_is_said(tmp_path):
    adapted(llama(), target_modules=["q_proj", "v_proj", "gate_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    prefix = "base_model.model.model.layers"
    tensors = {key: tensor for key, tensor in load_file(path).items() if "gate_proj" not in key}
    del tensors[f"{prefix}.1.self_attn.v_proj.lora_B.weight"]
    tensors[f"{prefix}.0.self_attn.q_proj.lora_A.weight"][0, 0] = math.nan
    tensors[f"{prefix}.0.self_attn.v_proj.lora_B.weight"][0, 0] = 5000.0
    tensors[f"{prefix}.1.self_attn.q_proj.lora_B.weight"] = torch.zeros(32, 4, dtype=torch.bfloat16)
    save_file(tensors, path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"made_by_me": "yes"}))
    said = " ".join(as_json("inspect", tmp_path)["unusual"])
    for words in ("NaN or infinity", "Values above 1000", "Updates of zero (1 of 4)", "Several dtypes: BF16+F32, F32"):
        assert words in said
    assert "One factor without the other: 'model.layers.1.self_attn.v_proj'" in said
    assert "target_modules names 'gate_proj', and no key is for it" in said
    assert "made_by_me" in said
    assert run("inspect", tmp_path).exit_code == 0


def test_what_a_file_says_cannot_steer_the_terminal(tmp_path):
    odd, q = "\x1b[31m\a\n", {}
    for name, shape in (("q.lora_A.weight", (2, 4)), ("q.lora_B.weight", (4, 2)), ("weight", (4, 2))):
        q[f"base_model.model.{odd}.{name}"] = torch.ones(shape)
    save_file(q, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], "base_model_name_or_path": odd}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, odd: odd}))
    to_vllm = ["--for", "vllm", "--drop", "modules_to_save"]
    for words in (
        ["inspect", tmp_path],
        ["inspect", tmp_path, "--layers"],
        ["diff", tmp_path, tmp_path],
        ["convert", tmp_path, tmp_path / "out", *to_vllm],
        ["check", tmp_path],
    ):
        said = run(*words).output
        assert all(line.isprintable() for line in said.split("\n")), said
        assert words[0] == "check" or r"\x1b[31m\x07\n" in said


def test_many_layers_are_grouped_by_their_kind(tmp_path):
    tensors, prefix = {}, "base_model.model.model.layers"
    for layer in range(100):
        for name in ("q_proj", "v_proj"):
            tensors[f"{prefix}.{layer}.self_attn.{name}.lora_A.weight"] = torch.ones(2, 3)
            tensors[f"{prefix}.{layer}.self_attn.{name}.lora_B.weight"] = torch.full((3, 2), float(layer))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **QV}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    rows = [line.split() for line in run("inspect", tmp_path).output.splitlines() if ".self_attn." in line]
    assert [row[:2] for row in rows if row[0].startswith("model")] == [
        ["model.layers.*.self_attn.q_proj", "100"],
        ["model.layers.*.self_attn.v_proj", "100"],
    ]
    every = [
        line for line in run("inspect", tmp_path, "--layers").output.splitlines() if line.startswith("model.layers.")
    ]
    assert len(every) == 200


def test_check_says_one_line_for_each_reader(tmp_path):
    adapted(llama(), **QV, use_dora=True).save_pretrained(tmp_path)
    result = run("check", tmp_path)
    lines = [line.split()[:2] for line in result.output.splitlines()[1:]]
    assert result.exit_code == 0
    assert lines == [
        ["peft", "yes"],
        ["transformers", "partly"],
        ["vllm", "no"],
        ["sglang", "no"],
        ["llama.cpp", "no"],
        ["mlx", "no"],
        ["diffusers", "no"],
    ]


def test_the_exit_code_of_check_answers_for_the_readers_that_were_named(tmp_path):
    adapted(llama(), **QV).save_pretrained(tmp_path)
    assert run("check", tmp_path, "--for", "vllm", "--for", "peft").exit_code == 0
    result = run("check", tmp_path, "--for", "vllm", "--for", "mlx")
    assert result.exit_code == 1
    assert "fix: minipeft convert DIR OUT --for mlx" in result.output


def test_check_tries_the_adapter_on_its_base(tmp_path):
    with foreign_code():
        llama().save_pretrained(tmp_path / "base")
    adapted(llama(), **QV, use_dora=True).save_pretrained(tmp_path / "it")
    found = as_json("check", tmp_path / "it", "--try", "--base", tmp_path / "base")["readers"]
    tried = {row["reader"]: row["tried"] for row in found}
    assert tried["peft"]["said"].startswith("the same outputs")
    assert tried["transformers"]["said"].startswith("other outputs")
    assert tried["transformers"]["difference"] > 1e-2
    assert tried["vllm"]["said"].startswith("not tried")


def test_convert_makes_what_check_then_accepts(tmp_path):
    adapted(llama(), **QV, use_rslora=True, modules_to_save=["lm_head"]).save_pretrained(tmp_path / "it")
    done = as_json("convert", tmp_path / "it", tmp_path / "out", "--for", "sglang", "--drop", "modules_to_save")
    assert done["dropped"] == ["base_model.model.lm_head.weight"]
    assert run("check", tmp_path / "out", "--for", "sglang").exit_code == 0


@pytest.mark.parametrize("swallows", [False, True])
def test_ctrl_c_ends_a_command_even_if_an_import_makes_another_error_of_it(monkeypatch, swallows):
    def interrupted(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if swallows:
                raise ImportError("cannot load module more than once per process") from None
            raise

    monkeypatch.setattr(sys, "argv", ["minipeft", "learn"])
    monkeypatch.setattr("minipeft.cli.main.app", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before

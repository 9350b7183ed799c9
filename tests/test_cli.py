"""The commands as a shell sees them."""

import json
import subprocess
import sys

import pytest
from tiny_models import gpt2
from typer.testing import CliRunner

import minipeft
from minipeft.cli.main import app


def shell(*arguments):
    return subprocess.run([sys.executable, "-m", "minipeft", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def adapter(tmp_path):
    minipeft.get_lora_model(gpt2(), minipeft.LoraConfig(r=4)).save_pretrained(tmp_path)
    return tmp_path


def test_help_answers_without_torch():
    code = "import sys; sys.argv = ['minipeft', 'inspect', '--help']\nfrom minipeft.cli.main import main\n"
    code += "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: minipeft inspect" in result.stdout
    assert result.stdout.endswith("False\n")


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    result = shell("inspect", str(tmp_path / "nothing"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("minipeft: ")
    assert result.stderr.count("\n") == 1


def test_inspect_prints_json_for_programs(adapter):
    result = CliRunner().invoke(app, ["inspect", str(adapter), "--json"])
    found = json.loads(result.output)
    assert found["config"]["r"] == 4
    assert [row["shape"] for row in found["tensors"]] == [[4, 32], [96, 4]] * 2

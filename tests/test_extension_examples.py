"""The two examples of adding a method and a layer type: short, public names only, and they run."""

import ast
import runpy
from pathlib import Path

import pytest

import minipeft
from minipeft import registry, testing

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """What an example registers is gone after it; LoRA alone is what a layer is tried with, for time's sake."""
    tables = registry._tables.copy()
    tables.methods, tables.layers_by_weight = {"lora": tables.methods["lora"]}, {}
    keep = ("Linear", "Embedding", "Conv1D")
    tables.layers = {key: ops for key, ops in tables.layers.items() if key.rpartition(".")[2] in keep}
    monkeypatch.setattr(registry, "_tables", tables)


@pytest.mark.parametrize("name", ["add_a_method", "add_a_layer"])
def test_an_example_is_short_and_uses_public_names_only(name):
    source = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert len(source.splitlines()) < 60
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("minipeft"):
            public = {"minipeft": minipeft.__all__, "minipeft.testing": testing.__all__}[node.module]
            assert {alias.name for alias in node.names} <= set(public)


def test_the_method_of_the_example_keeps_the_contract_on_every_layer(capsys):
    runpy.run_path(str(EXAMPLES / "add_a_method.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for layer in ("Linear", "Embedding", "Conv1D"):
        assert f"lora_xs on {layer}: 16 of 16 checks passed" in printed
    assert "trainable params: 32 ||" in printed


def test_the_layer_of_the_example_keeps_the_contract_under_every_method(capsys):
    runpy.run_path(str(EXAMPLES / "add_a_layer.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "lora on Readout: 16 of 16 checks passed" in printed
    assert "trainable params: 808 ||" in printed

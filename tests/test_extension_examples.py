"""The two examples of adding a method and a layer type: short, public names only, and they run."""

import ast
import runpy
from pathlib import Path

import pytest
from torch import nn

import minipeft
from minipeft import testing
from minipeft.layers.embedding import EmbeddingOps
from minipeft.layers.linear import Conv1DOps, LinearOps
from minipeft.methods.lora import Lora
from minipeft.registry import registry

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ALL_PASSED = f"{len(testing.CHECKS)} of {len(testing.CHECKS)} checks passed"


@pytest.fixture(autouse=True)
def isolated():
    """Only LoRA and three layer types are registered, to save time; what an example registers is gone after it."""
    with registry.isolated(empty=True):
        registry.register_method("lora")(Lora)
        registry.register_layer(nn.Linear)(LinearOps)
        registry.register_layer(nn.Embedding)(EmbeddingOps)
        registry.register_layer("transformers.pytorch_utils.Conv1D")(Conv1DOps)
        yield


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
        assert f"lora_xs on {layer}: {ALL_PASSED}" in printed
    assert "trainable params: 32 ||" in printed


def test_the_layer_of_the_example_keeps_the_contract_under_every_method(capsys):
    runpy.run_path(str(EXAMPLES / "add_a_layer.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"lora on Readout: {ALL_PASSED}" in printed
    assert "trainable params: 808 ||" in printed

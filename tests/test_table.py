"""The table of methods and layer types: true to the registry, and written between two lines of a file."""

import re
from pathlib import Path

import pytest
from torch import nn

from minipeft import MinipeftError, StateError, TargetError
from minipeft.layers.embedding import EmbeddingOps
from minipeft.layers.linear import Conv1DOps, LinearOps
from minipeft.methods.lora import Lora
from minipeft.registry import registry
from minipeft.testing import table
from minipeft.testing.table import BEGIN, END, code_lines, main, refusals, with_table

README = Path(__file__).resolve().parents[1] / "README.md"
COUNT = re.compile(r"\b\d+(?= \|)")  # a cell of a table that is a number


class PickyConfig(Lora.config_class):
    """Its configuration."""

    method = "picky"


class Picky(Lora):
    """A method with an empty cell."""

    config_class = PickyConfig

    def __init__(self, base, ops, config, shared):
        if ops.is_embedding:
            raise TargetError(f"picky needs vectors, not {type(base).__name__}'s indices.")
        super().__init__(base, ops, config, shared)


@pytest.fixture
def picky(monkeypatch):
    """LoRA and a second built-in method, which refuses embeddings, and three layer types."""
    monkeypatch.setattr(Picky, "__module__", "minipeft.methods.picky")
    monkeypatch.setattr(table.inspect, "getfile", lambda cls: __file__)
    with registry.isolated(empty=True):
        registry.register_method("lora")(Lora)
        registry.register_method("picky")(Picky)
        registry.register_layer(nn.Linear)(LinearOps)
        registry.register_layer(nn.Embedding)(EmbeddingOps)
        registry.register_layer("transformers.pytorch_utils.Conv1D")(Conv1DOps)
        yield


def test_a_refused_pair_is_an_empty_cell_and_its_words_are_to_be_had(picky, capsys):
    lines = code_lines(__file__)
    assert table.table() == (
        "|  | Conv1D | Embedding | Linear | lines |\n"
        "| --- | :-: | :-: | :-: | ---: |\n"
        f"| `lora` | ✓ | ✓ | ✓ | {lines} |\n"
        f"| `picky` | ✓ |  | ✓ | {lines} |\n"
        f"| lines | {lines} | {lines} | {lines} |  |\n"
    )
    assert list(refusals().values()) == ["picky needs vectors, not Embedding's indices. Nothing was changed."]
    assert main(["--why"]) == 0
    assert capsys.readouterr().out == f"picky on Embedding: {next(iter(refusals().values()))}\n"


def test_a_layer_type_without_an_example_is_an_error_not_an_empty_column(picky):
    ops = type("Ops", (LinearOps,), {"__module__": "minipeft.layers.there"})
    registry.register_layer("a_package_that_is_not_there.Layer")(ops)
    with pytest.raises(TargetError, match="a_package_that_is_not_there.Layer: there is no example to try"):
        table.table()


def test_plugins_are_left_out():
    with registry.isolated():
        registry.register_method("foreign")(Picky)
        registry.register_layer(nn.Bilinear)(type("Ops", (LinearOps,), {}))
        assert "foreign" not in table._built_in()[0]
        assert "torch.nn.modules.linear.Bilinear" not in table._built_in()[1]


def test_lines_of_code_are_those_with_code(tmp_path):
    file = tmp_path / "sample.py"
    file.write_text(
        '"""Two\nlines."""\n\n# why\nimport os  # counted\n\n\ndef f():\n    """Said."""\n    return """a\nb"""\n'
    )
    assert code_lines(file) == 4


def test_the_table_is_put_between_its_marker_lines(tmp_path, picky):
    file = tmp_path / "page.md"
    file.write_text(f"# A page\n\n{BEGIN}\nold\n{END}\n\nthe end\n", "utf-8")
    assert main(["--write", str(file)]) == 0
    assert file.read_text("utf-8") == f"# A page\n\n{BEGIN}\n{table.table()}{END}\n\nthe end\n"
    assert main(["--write", str(file)]) == 0, "writing it again changes nothing"
    assert file.read_text("utf-8") == with_table(file.read_text("utf-8"), table.table())


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{END}", f"{BEGIN}{BEGIN}{END}"])
def test_a_file_without_the_marker_lines_is_left_alone(text, tmp_path, picky, capsys):
    with pytest.raises(StateError, match="once each; nothing was written"):
        with_table(text, "new")
    file = tmp_path / "page.md"
    file.write_text(text, "utf-8")
    assert main(["--write", str(file)]) == 1
    assert file.read_text("utf-8") == text
    assert "nothing was written" in capsys.readouterr().err


def test_the_command_prints_the_table(capsys):
    try:
        expected = table.table()
    except MinipeftError as error:  # a layer's package is not installed
        pytest.skip(str(error))
    assert main([]) == 0
    assert capsys.readouterr().out == expected


def test_the_readme_holds_what_the_command_prints():
    """Ticks to the letter. Line counts to a tenth: an edit of a method must not have to touch the README."""
    text = README.read_text("utf-8")
    try:
        expected = with_table(text, table.table())
    except TargetError as error:  # a layer's package is not installed
        pytest.skip(str(error))
    assert COUNT.sub("#", text) == COUNT.sub("#", expected), "run: python -m minipeft.testing.table --write README.md"
    written, true = ([int(count) for count in COUNT.findall(each)] for each in (text, expected))
    assert written == pytest.approx(true, rel=0.1), "run: python -m minipeft.testing.table --write README.md"

"""Chapters 1 to 6 of the tutorial: their claims hold, and their pages show what they print."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from rotation import often
from tiny_models import foreign_code
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
FOLDER, PAGES = ROOT / "examples" / "tutorial", ROOT / "docs" / "tutorial"
CHAPTERS = sorted(path.stem for path in FOLDER.glob("0[1-6]_*.py"))
EXACT = ("03_layer_from_scratch", "04_into_gpt2")  # they print the same with --quick, and on every machine


@pytest.fixture(autouse=True)
def chapters(monkeypatch):
    """Chapters can be imported; they silence transformers, which is undone."""
    monkeypatch.syspath_prepend(str(FOLDER))
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    for name in CHAPTERS:
        sys.modules.pop(name, None)


def run(chapter, capsys, *options):
    """The lines that a chapter prints, without the figure's path."""
    with foreign_code():
        importlib.import_module(chapter).main([*map(str, options)])
    return [line.rstrip() for line in capsys.readouterr().out.splitlines() if not line.startswith("figure: ")]


def told(chapter):
    """The lines that its page shows."""
    shown = re.search(r"```text\n(.*?)```", (PAGES / f"{chapter}.md").read_text("utf-8"), flags=re.DOTALL)[1]
    return [line.rstrip() for line in shown.splitlines() if not line.startswith("figure: ")]


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def words(line):
    return " ".join(NUMBER.sub("", line).split())


@pytest.mark.parametrize("chapter", often(CHAPTERS, EXACT))
def test_a_chapter_proves_what_it_says_in_the_words_of_its_page(chapter, tmp_path, capsys):
    printed = run(chapter, capsys, "--quick", "--output", tmp_path)
    assert len([line for line in printed if line.startswith("true  |")]) >= 1 + (chapter not in CHAPTERS[5:])
    assert (tmp_path / f"{chapter}.png").read_bytes().startswith(b"\x89PNG")
    if chapter in EXACT:
        assert printed == told(chapter)
    assert {words(line) for line in printed} <= {words(line) for line in told(chapter)}


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_whole_chapter_prints_what_its_page_shows(chapter, tmp_path, capsys):
    printed = run(chapter, capsys, "--output", tmp_path)
    assert [words(line) for line in printed] == [words(line) for line in told(chapter)]
    for own, shown in zip(printed, told(chapter), strict=True):
        numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(line)] for line in (own, shown)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=0.1), own  # other processors round otherwise


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_page_names_its_command_and_its_figure(chapter):
    page = (PAGES / f"{chapter}.md").read_text("utf-8")
    assert f"python examples/tutorial/{chapter}.py" in page
    assert f"](figures/{chapter}.png)" in page
    assert 2000 < (PAGES / "figures" / f"{chapter}.png").stat().st_size <= 60 * 1024


def test_the_page_shows_the_layer_as_it_is():
    source = (FOLDER / "my_lora.py").read_text("utf-8")
    assert f"```python\n{source}```" in (PAGES / "03_layer_from_scratch.md").read_text("utf-8")
    assert len(source.splitlines()) <= 40


@pytest.mark.parametrize("broken", ["merge", "forward"])
def test_a_wrong_layer_ends_the_chapter_with_exit_code_1(broken, monkeypatch, tmp_path):
    layer = importlib.import_module("my_lora").LoRA
    wrong = {
        "merge": lambda self: self.base,
        "forward": lambda self, x: self.base(x) + x @ self.A.T @ self.B.T,  # without the scale
    }
    monkeypatch.setattr(layer, broken, wrong[broken])
    with foreign_code(), pytest.raises(SystemExit) as caught:
        importlib.import_module("03_layer_from_scratch").main(["--output", str(tmp_path)])
    assert caught.value.code == 1
    assert torch.get_default_dtype() == torch.float32

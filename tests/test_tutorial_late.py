"""Chapters 7 to 12 of the tutorial run, their claims hold, and each writes its figure."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from rotation import often
from tiny_models import foreign_code

from minipeft.registry import registry

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "tutorial"
CHAPTERS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem[:2] in ("07", "08", "09", "10", "11", "12"))


@pytest.fixture(autouse=True)
def chapters(monkeypatch):
    """Chapters can be imported, and what they register is gone after them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    with registry.isolated():
        yield
    for name in CHAPTERS:
        sys.modules.pop(name, None)


def run(chapter, *options):
    with foreign_code():
        importlib.import_module(chapter).main([*map(str, options)])


def claims(printed):
    return [line for line in printed.splitlines() if line.startswith(("true  |", "FALSE |"))]


@pytest.mark.parametrize("chapter", often(CHAPTERS, ["09_no_effect", "12_the_whole_circle"]))
def test_a_chapter_proves_what_it_says(chapter, tmp_path, capsys):
    run(chapter, "--quick", "--output", tmp_path)
    proved = claims(capsys.readouterr().out)
    assert len(proved) >= 4
    assert not [line for line in proved if line.startswith("FALSE")]
    assert (tmp_path / f"{chapter}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_whole_chapter_proves_what_its_page_shows(chapter, tmp_path, capsys):
    run(chapter, "--output", tmp_path)
    assert claims(capsys.readouterr().out)
    page = (ROOT / "docs" / "tutorial" / f"{chapter}.md").read_text("utf-8")
    assert f"python examples/tutorial/{chapter}.py" in page
    assert (ROOT / "docs" / "tutorial" / "figures" / f"{chapter}.png").stat().st_size <= 60 * 1024


def test_a_false_claim_ends_a_chapter_with_exit_code_1(monkeypatch):
    with foreign_code():
        chapter = importlib.import_module("12_the_whole_circle")
    monkeypatch.setattr(chapter, "train", lambda model, rows, **options: [])  # nothing is learnt
    with foreign_code(), pytest.raises(SystemExit) as caught:
        chapter.main(["--quick"])
    assert caught.value.code == 1


def test_nf4_by_hand_has_the_levels_of_the_paper():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import get_4bit_type

    with foreign_code():
        levels = importlib.import_module("10_qlora").normal_levels()
    torch.testing.assert_close(levels, get_4bit_type("nf4", device="cpu"), atol=1e-4, rtol=0)

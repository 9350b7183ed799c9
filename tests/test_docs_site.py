"""The site in docs/: both languages agree, links lead somewhere, verbs and tests exist, and it builds without a warning."""

import importlib.util
import pkgutil
import re
import subprocess
import sys

import pytest
from test_readme import PAGES, ROOT, TRANSLATIONS
from tiny_models import adapted

DOCS = ROOT / "docs"
TRANSLATED = [DOCS / "index.md", *sorted((DOCS / "tutorial").glob("*.md"))]
CODE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
INSTALLED = all(importlib.util.find_spec(name) for name in ("furo", "latex2mathml", "myst_parser"))
needs_generator = pytest.mark.skipif(not INSTALLED, reason="the site's generator is missing: pip install -e '.[docs]'")


def prose(page):
    return CODE.sub("", page.read_text("utf-8"))


def anchors(page):
    """The fragments of a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_fragment_of_a_link_is_a_heading():
    for page in PAGES:
        for target, fragment in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", prose(page)):
            goal = page.parent / target if target else page
            assert fragment in anchors(goal), f"{page} links to {target}#{fragment}"


def test_every_page_has_its_place_in_the_sidebar():
    conf = (DOCS / "conf.py").read_text("utf-8")
    for folder, constant in (("how-to", "HOW_TO"), ("", "REFERENCE")):
        listed = re.search(rf'^{constant} = "(.+)"', conf, re.MULTILINE)[1].split()
        assert set(listed) == {page.stem for page in (DOCS / folder).glob("*.md")} - {"README", "index"}


def test_every_page_of_the_tutorial_is_there_in_both_languages_and_no_other():
    assert len(TRANSLATED) == 1 + 12 + 1  # the index, the chapters, the exercises
    there = {page.relative_to(TRANSLATIONS) for page in TRANSLATIONS.rglob("*.md")}
    assert there == {page.relative_to(DOCS) for page in TRANSLATED}


def test_both_languages_have_the_same_code_formulas_figures_links_and_numbers():
    for page in TRANSLATED:
        translation = TRANSLATIONS / page.relative_to(DOCS)
        texts = [at.read_text("utf-8") for at in (page, translation)]
        for what in (CODE, r"\$\$.+?\$\$", r"(?m)^#+(?= )", r"(?m)^\|(?=.*\|$)"):
            first, second = (re.findall(what, text) for text in texts)
            assert first == second, f"{page}; python docs/same_code.py copies code blocks"
        for link in (r"!\[[^\]]*\]\(([^)]+)\)", r"(?<!!)\[[^\]]*\]\(([^)]+)\)"):
            first, second = (
                sorted(
                    goal if ":" in goal else str((at.parent / goal).resolve()) for goal in re.findall(link, prose(at))
                )
                for at in (page, translation)
            )
            assert first == sorted(goal.replace("/docs/zh-TW/", "/docs/") for goal in second), page
        first, second = (set(re.findall(r"\d[\d,.]*\d", prose(at))) for at in (page, translation))
        assert first == second, page
        assert len(re.findall("[\u4e00-\u9fff]", prose(translation))) > 150, page


def test_the_translation_is_written_as_in_taiwan():
    elsewhere = [
        "內存",
        "默認",
        "優化器",
        "代碼",
        "打印",
        "軟件",
        "信息",
        "數組",
        "缺省",
        "文件夾",
        "屏幕",
        "加載",
        "運行",
        "線程",
        "激活",
        "數據",
    ]
    for page in TRANSLATIONS.rglob("*.md"):
        text = page.read_text("utf-8")
        han = set(re.findall("[\u4e00-\u9fff]", text))
        assert not [sign for sign in han if not sign.encode("big5", "ignore")], page  # Big5 has no simplified ones
        assert not [word for word in elsewhere if word in text], page


@pytest.mark.parametrize("column", [0, 1], ids=["PEFT", "minipeft"])
def test_the_verbs_of_the_page_on_peft_exist(column):
    import peft
    from peft.tuners.lora import LoraModel
    from transformers import PreTrainedModel

    rows = re.findall(r"^\| (`.+) \|$", (DOCS / "how-to/from-peft.md").read_text("utf-8"), re.MULTILINE)
    cells = "\n".join(row.split(" | ")[column] for row in rows)
    verbs = set(re.findall(r"`((?:peft|minipeft|transformers|model)\.[\w.]+)\(", cells))
    assert len(verbs) > 15
    models = [type(adapted())] if column else [peft.PeftModel, LoraModel, peft.AdaLoraModel, PreTrainedModel]
    for verb in verbs:
        first, name = verb.split(".", 1)
        assert any(hasattr(model, name) for model in models) if first == "model" else pkgutil.resolve_name(verb), verb


def test_each_guarantee_names_a_test_that_a_usual_run_runs():
    rows = re.findall(r"^\| ([^*|].+) \| (`.+`) \|$", (DOCS / "how-to/guarantees.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 20
    for guarantee, tests in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert named, guarantee
        for file, function in named:
            before, _ = (ROOT / "tests" / file).read_text("utf-8").split(f"def {function}(")
            marks = before.rsplit("\n\n\n", 1)[-1]
            assert not re.search(r"^@pytest\.mark\.(slow|gpu|skip|xfail)", marks, re.MULTILINE), function


@needs_generator
def test_chinese_words_are_found_without_a_dictionary(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_site")
    from cjk_search import terms

    assert terms("學習率lr_1、秩") == ["學", "習", "率", "學習", "習率", "lr_1", "秩"]


@needs_generator
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    call = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import build; sys.exit(build.build(Path(sys.argv[2])))"
    done = subprocess.run([sys.executable, "-c", call, DOCS, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page: page.read_text("utf-8") for page in tmp_path.rglob("*.html")}
    assert len(pages) > 2 * len(TRANSLATED)
    for page, html in pages.items():
        assert not re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="https?:[^"]*"', html), page
        for target, fragment in re.findall(r'(?:href|src)="(?!https?:|data:)([^"#?]*)[^"#]*#?([^"]*)"', html):
            goal = (page.parent / target).resolve() if target else page
            goal = goal / "index.html" if goal.is_dir() else goal
            assert goal.exists(), f"{page} links to {target}"
            assert not fragment or f'id="{fragment}"' in pages.get(goal, html), f"{page} links to {target}#{fragment}"
    english, chinese = (tmp_path / at / "tutorial/02_mathematics.html" for at in ("docs", "zh-TW/docs/zh-TW"))
    assert "<math" in pages[english]
    assert "<math" in pages[chinese]
    assert '<html class="no-js" lang="zh-TW"' in pages[chinese]
    assert re.search(r'<a href="[./]+/zh-TW/docs/zh-TW/tutorial/02_mathematics.html" lang="zh-TW"', pages[english])

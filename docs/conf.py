"""How Sphinx builds the site; `docs/build.py` calls it once for each language."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_site"))

chinese = tags.has("zh_TW")  # noqa: F821 - Sphinx defines it
project = "minipeft"
copyright = "the authors of minipeft, Apache-2.0"
language = "zh_TW" if chinese else "en"
locale_dirs = ["docs/_site/locale"]
extensions = ["myst_parser", "cjk_search", "mathml", "pages"]

# The sources start at the root of the repository, so links to the README and to figures work here and on GitHub.
root_doc = "docs/zh-TW/index" if chinese else "docs/index"
include_patterns = ["README.md", "benchmarks/README.md", "docs/**.md"]
exclude_patterns = [
    ".*",
    "build",
    "examples",
    "minipeft",
    "output",
    "tests",
    "docs/README.md",
    "docs/_site",
    "docs/site",
]
exclude_patterns += ["docs/index.md", "docs/tutorial"] if chinese else ["docs/zh-TW"]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

html_theme = "furo"
html_title = "minipeft"
SANS = 'system-ui, "Segoe UI", Roboto, "Noto Sans", "PingFang TC", "Microsoft JhengHei", "Noto Sans CJK TC", sans-serif'
html_theme_options = {"light_css_variables": {"font-stack": SANS}}  # dark ones are added to these
html_static_path = ["_site/static"]
html_css_files = ["site.css"]
templates_path = ["_site/templates"]
html_additional_pages = {"index": "to_root.html"}
html_copy_source = False
html_show_sphinx = False
html_use_index = False
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/languages.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}

HOW_TO = "settings out-of-memory from-peft files-and-servers plugin many-gpus guarantees"
REFERENCE = "training memory-and-speed many-adapters serving doctor planning methods files nothing-silent extending architecture"
CHAPTERS = "docs/zh-TW/tutorial" if chinese else "docs/tutorial"

# What the sidebar shows: caption -> pages. `_site/pages.py` puts it into the index.
sections = {
    "教學" if chinese else "Tutorial": sorted(
        f"/{CHAPTERS}/{page.stem}" for page in (HERE.parent / CHAPTERS).glob("*.md")
    ),
    "操作指南（英文）" if chinese else "How-to": [f"/docs/how-to/{name}" for name in HOW_TO.split()],
    "參考（英文）" if chinese else "Reference": [
        *(f"/docs/{name}" for name in REFERENCE.split()),
        "/benchmarks/README",
        "/README",
    ],
}

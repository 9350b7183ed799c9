"""Builds the site into docs/site: `python docs/build.py`, after `pip install -e '.[docs]'`. A warning stops it."""

import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import build_main

DOCS = Path(__file__).resolve().parent


def build(out: Path) -> int:
    """English into the folder `out`, Traditional Chinese into `out/zh-TW`; returns the exit code."""
    with tempfile.TemporaryDirectory() as kept:
        common = ["-q", "-W", "--keep-going", "-E", "-c", str(DOCS), "-d", kept, str(DOCS.parent)]
        return build_main([*common, str(out)]) or build_main(["-t", "zh_TW", *common, str(out / "zh-TW")])


if __name__ == "__main__":
    shutil.rmtree(DOCS / "site", ignore_errors=True)
    sys.exit(build(DOCS / "site"))

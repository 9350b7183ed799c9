"""Puts the code blocks of the English pages into their translations: `python docs/same_code.py`, after one has changed."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)


def main() -> None:
    """Writes every translation whose English page has as many blocks; names those that have not."""
    for translation in sorted((DOCS / "zh-TW").rglob("*.md")):
        page, text = DOCS / translation.relative_to(DOCS / "zh-TW"), translation.read_text("utf-8")
        blocks = BLOCK.findall(page.read_text("utf-8"))
        if len(blocks) == len(BLOCK.findall(text)):
            each = iter(blocks)
            translation.write_text(BLOCK.sub(lambda _, each=each: next(each), text), "utf-8")
        else:
            print(f"{translation}: {len(BLOCK.findall(text))} code blocks, and {len(blocks)} in English")


if __name__ == "__main__":
    main()

"""The doctor's confusion table: ``python -m tests.doctor_table [--write docs/doctor.md]``."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))  # for when this is run as a module

from doctor_cases import BROKEN, HEALTHY
from tiny_models import foreign_code

import minipeft
from minipeft.diagnosis.diagnose import CHECKS
from minipeft.testing.table import with_table

BEGIN, END = "<!-- python -m tests.doctor_table -->", "<!-- end of the table -->"


def found_in(case):
    """The names of what `diagnose` finds in a set-up."""
    torch.manual_seed(0)
    with foreign_code():
        made = case.make()
    return [finding.name for finding in minipeft.diagnose(**made)]


def table(found):
    """For each check the set-ups that have its fault, in how many of those it is found, and in how many others.

    Args:
        found: the names that were found in each set-up, by what it is.
    """
    rows = ["| finding | broken set-ups that have it | found | found elsewhere |", "|---|---|---:|---:|"]
    cases = {**BROKEN, **HEALTHY}
    for name in ("no-adapter", *(check.name for check in CHECKS)):
        have = [what for what, case in cases.items() if name in case.finds]
        right = sum(name in found[what] for what in have)
        elsewhere = sum(name in names for what, names in found.items() if what not in have)
        rows.append(f"| `{name}` | {'; '.join(have)} | {right} of {len(have)} | {elsewhere} |")
    total = sum(len(case.finds) for case in cases.values())
    right = sum(name in found[what] for what, case in cases.items() for name in case.finds)
    wrong = sum(name not in cases[what].finds for what, names in found.items() for name in names)
    rows.append(f"| all | {len(BROKEN)} set-ups | {right} of {total} | {wrong} |")
    clean = sum(not found[what] for what in HEALTHY)
    return "\n".join(rows) + f"\n\n{clean} of {len(HEALTHY)} healthy set-ups have no finding: {'; '.join(HEALTHY)}.\n"


def written(text, found):
    """The text of the page with the table as it is now."""
    return with_table(text, table(found), BEGIN, END)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="put it into this page")
    page = parser.parse_args().write
    found = {what: found_in(case) for what, case in {**BROKEN, **HEALTHY}.items()}
    if page is None:
        print(table(found), end="")
    else:
        page.write_text(written(page.read_text("utf-8"), found), "utf-8")


if __name__ == "__main__":
    sys.exit(main())

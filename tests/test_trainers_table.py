"""The table of docs/training.md, trainer by what works in it, is what the runs say."""

from pathlib import Path

import pytest
import trainers_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"
IN_EVERY_RUN = {"RewardTrainer"}  # test_trl.py holds most of the others against PEFT


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.name, marks=[] if kind.name in IN_EVERY_RUN else pytest.mark.slow)
        for kind in trainers_table.KINDS
    ],
)
def test_the_row_of_a_trainer_is_what_it_does(kind):
    if not trainers_table.installed(kind):
        pytest.skip(f"{kind.package} is not installed")
    assert trainers_table.row(kind) in PAGE.read_text("utf-8")


def test_every_trainer_has_a_row():
    _, _, rest = PAGE.read_text("utf-8").partition(trainers_table.BEGIN)
    lines = rest.partition(trainers_table.END)[0].splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == [k.name for k in trainers_table.KINDS]

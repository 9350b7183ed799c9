"""minipeft.training.flags: a flag is one field of a dataclass, which says all there is to know about it."""

import dataclasses
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from minipeft import ConfigError
from minipeft.training.flags import LIMIT, compared_values, flag, parse_flags, saved_values


@dataclass(frozen=True)
class Flags:
    config: Path | None = flag(None, "YAML file", once=True)
    rank: int | None = flag(None, "of the update", lowest=1)
    seed: int = flag(0, "of everything random", lowest=0)
    rate: float = flag(1e-3, "of learning", above=0)
    decay: float = flag(0.5, "50% per step", lowest=0)
    packing: bool | None = flag(None, "join texts")
    lean: bool = flag(False, "use less memory")
    precision: Literal["bf16", "fp16"] | None = flag(None, "of numbers")
    text: Path | None = flag(None, "to read", must_exist=True, may_change=True)
    stream: bool = flag(False, "read on", needs=("rank", "lean"))
    resume: str | None = flag(None, "go on", const="latest", not_with=("stream",), once=True)


def parse(*words):
    return parse_flags(Flags, words, "A program.")


def test_without_words_every_flag_has_its_default():
    assert parse() == Flags()


def test_the_type_of_a_field_decides_how_its_flag_is_written(tmp_path):
    words = ["--rank", "4", "--rate", "1e-2", "--no-packing", "--lean", "--precision", "bf16", f"--text={tmp_path}"]
    expected = Flags(rank=4, rate=0.01, packing=False, lean=True, precision="bf16", text=tmp_path)
    assert parse(*words) == expected
    assert parse("--packing").packing is True


def test_a_flag_may_have_an_optional_value():
    assert parse("--resume").resume == "latest"
    assert parse("--resume", "here", "--lean") == Flags(resume="here", lean=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sed", "1"], "unrecognized arguments: --sed"),
        (["--ra", "1"], "unrecognized arguments: --ra"),
        (["--rank", "many"], "invalid int value: 'many'"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--rank", "0"], "--rank 0: give a number from 1 to 2147483647."),
        (["--seed", str(LIMIT)], "--seed 2147483648: give a number from 0"),
        (["--rate", "0"], "--rate 0.0: give a number above 0."),
        (["--rate", "nan"], "--rate nan"),
        (["--rate", "inf"], "--rate inf"),
        (["--decay=-1"], "--decay -1.0: give a number from 0."),
        (["--rate", "1e39"], "--rate 1e+39: give a number above 0 and below 2147483648."),  # no float32
        (["--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
        (["--stream"], "--stream needs --rank or --lean"),
        (["--stream", "--lean", "--resume"], "--resume and --stream exclude each other"),
    ],
)
def test_a_mistake_is_an_error_that_names_the_flag(words, message):
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flag_that_needs_another_takes_any_of_them():
    assert parse("--stream", "--rank", "2").stream
    assert parse("--stream", "--lean").stream


def test_a_yaml_file_gives_flags_that_words_override(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rank: 4\nrate: 1e-2\nlean: true\npacking: false\nstream: false\nprecision: null\n", "utf-8")
    expected = Flags(config=file, rank=4, rate=0.01, lean=True, packing=False)  # 1e-2 is a string to YAML
    assert parse("--config", str(file)) == expected
    assert parse("--config", str(file), "--rank", "2", "--packing") == dataclasses.replace(
        expected, rank=2, packing=True
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sead: 1", "there is no flag --sead (closest: 'seed')"),
        ("1: 1", "there is no flag --1"),
        ("rank: 0", "--rank 0"),
        ("rank: x", "invalid int value: 'x'"),
        ("rank: [1]", "one value per flag"),
        ("- rank", "one value per flag"),
        ("a: b: c", "cannot be read as YAML"),
    ],
)
def test_a_yaml_file_is_checked_as_words_are(content, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(content, "utf-8")
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(file))
    assert message in str(caught.value)


def test_a_missing_yaml_file_is_an_error():
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        parse("--config", "nowhere.yaml")


def test_what_may_change_is_not_compared_and_what_is_for_one_start_is_not_saved(tmp_path):
    flags = parse("--text", str(tmp_path), "--resume", "--rank", "3")
    compared, saved = compared_values(flags), saved_values(flags)
    assert saved.keys() - compared.keys() == {"text"}
    assert {field.name for field in dataclasses.fields(Flags)} - saved.keys() == {"config", "resume"}
    file = tmp_path / "saved.yaml"
    file.write_text(yaml.safe_dump(saved), "utf-8")
    assert parse("--config", str(file)) == dataclasses.replace(flags, config=file, resume=None)


def test_the_help_has_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("A program.", "--no-packing", "{bf16,fp16}", "50% per step (default: 0.5)", "random (default: 0)"):
        assert words in text
    assert "None" not in text
    assert "False" not in text


def test_a_program_can_define_its_flags_in_a_file_of_its_own(tmp_path, capsys):
    """As a script, whose module is not one that others import."""
    script = tmp_path / "program.py"
    script.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from minipeft.training.flags import flag, parse_flags\n"
        "@dataclass(frozen=True)\n"
        "class Flags:\n"
        "    rank: int | None = flag(None, 'of the update')\n"
        "print(parse_flags(Flags, ['--rank', '4'], None))\n",
        "utf-8",
    )
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out == "Flags(rank=4)\n"

"""What a file, a folder or a name can do wrong ends in one of our errors, soon, and in a short message."""

import contextlib
import inspect
import json
import os
import shutil
import struct
import time
import warnings

import pytest
import regex
import torch
from safetensors.torch import load_file, save_file
from tiny_models import adapted, gpt2, llama
from torch import nn

from minipeft import (
    CheckpointError,
    ConfigError,
    IA3Config,
    LoraConfig,
    MinipeftError,
    get_adapter_model,
    get_lora_model,
    load_adapter,
)
from minipeft.config.patterns import first_keys
from minipeft.errors import MAX_MESSAGE, printable, shown, told
from minipeft.files.reading import reading

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
needs_a_user = pytest.mark.skipif(os.getuid() == 0, reason="root may read and write everything")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    adapted().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of an adapter, which a test may change."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def as_from_peft(folder, **options):
    """The same adapter without our metadata, and with other options."""
    values = load_file(folder / WEIGHTS)
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    (folder / CONFIG).write_text(json.dumps({**config, **options}), "utf-8")


def within(seconds, call):
    """Call it; a MinipeftError is fine, and so is success, but both soon."""
    start = time.perf_counter()
    with contextlib.suppress(MinipeftError):
        call()
    assert time.perf_counter() - start < seconds


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


ANYTHING = [
    PermissionError(13, "Permission denied"),
    OSError(30, "Read-only file system"),
    ValueError("embedded null byte"),
]
ANYTHING += [
    MemoryError(),
    RecursionError("maximum recursion depth exceeded"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
]


@pytest.mark.parametrize("error", ANYTHING, ids=lambda error: type(error).__name__)
def test_whatever_reading_raises_becomes_our_error(error, folder, monkeypatch):
    monkeypatch.setattr(os, "scandir", raising(error))
    model = gpt2()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(model, folder)
    assert type(model) is type(gpt2())


@pytest.mark.parametrize("error", ANYTHING, ids=lambda error: type(error).__name__)
def test_whatever_writing_raises_becomes_our_error(error, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(os, "replace", raising(error))
    with pytest.raises(CheckpointError, match="cannot be written"):
        adapted().save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_warning_that_the_user_made_an_error_stays_one():
    with pytest.raises(UserWarning), reading("here"):
        raise UserWarning("as asked for")


@needs_a_user
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_folder_without_permissions_is_refused(mode, folder):
    model = adapted()
    folder.chmod(mode)
    try:
        for call in (lambda: load_adapter(gpt2(), folder), lambda: model.save_pretrained(folder)):
            with pytest.raises(CheckpointError):
                call()
    finally:
        folder.chmod(0o755)


ODD_PLACES = ["a\0b", "x" * 300, "/dev/null", "x/" * 3000, "\ud800"]


@pytest.mark.parametrize("place", ODD_PLACES, ids=["NUL", "long name", "device", "deep", "surrogate"])
def test_an_odd_path_is_refused(place):
    model = adapted()
    for call in (lambda: load_adapter(gpt2(), place), lambda: model.save_pretrained(place)):
        with pytest.raises(CheckpointError):
            call()


@pytest.mark.parametrize("place", [None, 3, b"bytes", ["list"]])
def test_what_is_no_path_is_refused(place):
    model = adapted()
    for call in (lambda: load_adapter(gpt2(), place), lambda: model.save_pretrained(place)):
        with pytest.raises(ConfigError, match="must be the path of a directory"):
            call()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, CARD])
@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling link"])
def test_something_else_in_the_place_of_a_file_does_not_hang(name, kind, folder):
    (folder / name).unlink()
    make = {"folder": os.mkdir, "fifo": os.mkfifo, "dangling link": lambda path: os.symlink("nowhere", path)}[kind]
    make(folder / name)
    within(3, lambda: load_adapter(gpt2(), folder))
    within(3, lambda: adapted().save_pretrained(folder))


def test_a_readme_that_cannot_be_read_is_left_alone(folder):
    (folder / CARD).write_bytes(b"\xff\xfe mine")
    adapted().save_pretrained(folder)
    assert (folder / CARD).read_bytes() == b"\xff\xfe mine"


HOSTILE = [
    "(?V0V1)a",
    "(?au)a",
    "(" * 500 + "a" + ")" * 500,
    "(?R)",
    "((?R))*",
    "(?<n>.)(?&n)*",
    "(?:(?:a{200}){200}){200}",
]


@pytest.mark.each_value
@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: pattern[:12])
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_regular_expression_that_the_engine_chokes_on_is_refused(pattern, option, folder):
    value = {pattern: 2} if option.endswith("pattern") else pattern
    as_from_peft(folder, **{option: value})
    with pytest.raises(ConfigError):
        load_adapter(gpt2(), folder)
    with pytest.raises(ConfigError):
        LoraConfig(**{option: value})


@pytest.mark.parametrize("error", [MemoryError(), RecursionError(), ValueError("x")])
def test_whatever_the_regex_engine_raises_becomes_our_error(error, monkeypatch):
    monkeypatch.setattr(regex, "compile", raising(error))
    with pytest.raises(ConfigError, match="not a valid regular expression"):
        LoraConfig(target_modules="c_.*")


@pytest.mark.parametrize("name", sorted(name for name in dir(nn.ModuleDict()) if name.replace("_", "a").isalnum())[::4])
def test_an_attribute_of_a_module_dict_is_no_adapter_name(name):
    with pytest.raises(ConfigError, match="not allowed"):
        get_lora_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]), name)


MANY = [f"x{i}" for i in range(20_000)]
LONG = {
    "trainable_token_indices": [*range(80_000), 79_999],
    "modules_to_save": MANY,
    "exclude_modules": MANY,
    "layers_pattern": MANY,
    "rank_pattern": {f"x{i}|y": 2 for i in range(20_000)},
    "alpha_pattern": {rf"^h\.{i}\.x$": 2 for i in range(20_000)},
}


@pytest.mark.parametrize("option", LONG)
def test_a_long_option_takes_seconds_at_most(option, folder):
    more = {"layers_to_transform": [0]} if option == "layers_pattern" else {}
    as_from_peft(folder, **more, **{option: LONG[option]})
    within(4, lambda: load_adapter(gpt2(), folder, strict=False))


def test_long_feedforward_modules_take_seconds_at_most(tmp_path):
    get_adapter_model(gpt2(), IA3Config()).save_pretrained(tmp_path)
    as_from_peft(tmp_path, feedforward_modules=MANY)
    within(4, lambda: load_adapter(gpt2(), tmp_path, strict=False))


def test_many_tables_of_tokens_are_refused(folder):
    as_from_peft(folder, trainable_token_indices={name: [1] for name in MANY})
    with pytest.raises(ConfigError, match="20,000 modules; 100 are allowed"):
        load_adapter(gpt2(), folder)


def test_a_shape_of_many_numbers_is_refused_soon(folder):
    raw = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    key = next(key for key in header if key != "__metadata__")
    for shape in ([10**17] * 50_000, [1] * 50_000):
        header[key]["shape"] = shape
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
        within(3, lambda: load_adapter(gpt2(), folder))


NAMES = [f"model.layers.{i}.{part}" for i in range(700) for part in ("q_proj", "mlp.up_proj")]


@pytest.mark.parametrize("form", ["^{}$", "{}$", "{}", "^{}", r"{}\Z"])
@pytest.mark.parametrize("escape", [str, regex.escape])
def test_anchored_keys_one_per_module_take_linear_time(form, escape):
    keys = [form.format(escape(name)) for name in NAMES]
    start = time.perf_counter()
    found = first_keys(keys, NAMES, "rank_pattern")
    assert time.perf_counter() - start < 1
    assert found == dict(zip(NAMES, keys, strict=True))


KEYS = [
    "^q_proj$",
    r".*\.q_proj",
    "q_proj",
    r"layers\.1\.q_proj",
    r"^model\.layers\.1\.q_proj",
    "model.layers",
    "up_proj$",
]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_looked_up_matches_what_its_expression_matches(key):
    names = ["q_proj", "a.q_proj", *NAMES[:6], "model.layers", "xq_proj"]
    expected = [name for name in names if regex.fullmatch(rf"(?:.*\.)?(?:{key})", name)]
    assert list(first_keys([key], names, "rank_pattern")) == expected


def test_an_earlier_key_comes_before_a_later_one_of_the_other_kind():
    keys, names = ["q_(proj|x)", "^a.q_proj$", "b.q_proj"], ["a.q_proj", "b.q_proj"]
    assert set(first_keys(keys, names, "rank_pattern").values()) == {keys[0]}
    assert first_keys(keys[::-1], names, "rank_pattern") == {"a.q_proj": keys[1], "b.q_proj": keys[2]}


def test_a_message_is_short_and_has_no_control_characters(folder):
    values = load_file(folder / WEIGHTS)
    save_file(values | {"\x1b[2J" + "x" * 900_000: torch.zeros(1)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load_adapter(gpt2(), folder)
    assert len(str(caught.value)) < MAX_MESSAGE + 100
    assert str(caught.value).isprintable()
    with pytest.warns(UserWarning, match="does not fit") as warned:
        load_adapter(gpt2(), folder, strict=False)
    assert all(len(str(w.message)) < MAX_MESSAGE and str(w.message).isprintable() for w in warned)


def with_nan(model):
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    return model


class Idle(nn.Sequential):
    def forward(self, x):
        return self[0](x)


LINES = {  # what is made first, and a call on that in a folder with an adapter that was never trained
    "load_adapter, untrained": (gpt2, lambda m, folder: load_adapter(m, folder), "every update is zero"),
    "the same, as a method": (adapted, lambda m, folder: m.load_adapter(folder, "other"), "every update is zero"),
    "load_adapter, in part": (
        llama,
        lambda m, folder: load_adapter(m, folder / "part", strict=False),
        "the rest was loaded",
    ),
    "save_pretrained": (lambda: with_nan(adapted()), lambda m, folder: m.save_pretrained(folder), "is saved, but"),
    "set_scale": (
        lambda: adapted(modules_to_save=["lm_head"]),
        lambda m, folder: m.set_scale("default", 0.5),
        "stay at full strength",
    ),
    "a call": (
        lambda: get_lora_model(Idle(nn.Linear(6, 6), nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["0", "1"])),
        lambda m, folder: m(torch.ones(1, 6)),
        "does nothing there",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_a_warning_carries_the_line_of_the_user(case, tmp_path):
    make, call, said = LINES[case]
    adapted(scale=0).save_pretrained(tmp_path)
    adapted_llama = get_lora_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted_llama.save_pretrained(tmp_path / "part")
    values = load_file(tmp_path / "part" / WEIGHTS)
    save_file(dict(list(values.items())[1:]), tmp_path / "part" / WEIGHTS, metadata={"format": "pt"})
    model = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(model, tmp_path)
    (place,) = [(w.filename, w.lineno) for w in caught if said in str(w.message)]
    lines = call.__code__.co_firstlineno + len(inspect.getsource(call).splitlines())
    assert place[0] == __file__
    assert call.__code__.co_firstlineno <= place[1] < lines


def test_code_run_by_exec_without_a_module_name_is_warned_too(tmp_path):
    adapted(scale=0).save_pretrained(tmp_path)
    names = {"load_adapter": load_adapter, "model": gpt2(), "folder": tmp_path}
    with pytest.warns(UserWarning, match="every update is zero"):
        exec("load_adapter(model, folder)", names)


def test_values_are_shown_in_short():
    assert shown(["a\x1b"]) == "'a\\x1b'"
    assert len(shown(["x" * 10**6] * 9)) < 1100
    assert len(told("x" * 10**6)) == 50
    assert printable("a" * 10, 6) == "aaa[...]aaa"
    assert str(ConfigError("a\x07b\nc")) == "a\\x07b\nc"


@pytest.mark.parametrize("layers", [2])
def test_modules_inside_one_that_trains_are_not_named_again(layers):
    model = get_lora_model(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"]))
    saved = [name for name, module in model.named_modules() if type(module).__name__ == "SavedModule"]
    assert saved == [f"model.layers.{i}.mlp" for i in range(layers)]

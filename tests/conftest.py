"""Every test is seeded, offline and single-threaded (pytest runs two of them at a time)."""

import contextlib
import functools
import gc
import gzip
import importlib.util
import itertools
import logging
import os
import re
import shutil
import signal
import socket
import types
from pathlib import Path
from unittest.mock import Mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # float32 is float32 on a GPU, too
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or each process of the suite starts one for each core

import pytest
from _pytest.logging import catching_logs
from rotation import leave_each_value

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background deaf to it
_connect = socket.socket.connect
numbers = itertools.count()
TESTS = Path(__file__).resolve().parent
EXAMPLES = TESTS.parent / "examples"
# The files that take longest go first, so that both processes are done at the same time.
LONGEST = ["gpu_graphs", "gpu_runs"]
LONGEST += [
    "architecture", "contract", "lean", "peft_interop", "serving", "estimate", "readers", "rows", "hf_trainer", "learn",
    "train_flags", "hotswap", "traced", "vocabulary", "contract_layers", "file_names", "training_order", "merge_from_disk",
    "rows_training", "trl", "packing", "doctor", "checkpoint", "quantized_fused", "model", "quantized_models", "offloaded",
    "expert_names", "readme", "split_experts", "pickles", "hf_schedule",
]  # fmt: skip


def pytest_configure(config):
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # it starts the others and runs no test, and importing torch takes it three seconds
    gc.set_threshold(100_000, 20, 100)  # looking for cycles took a twentieth of the time
    import torch

    torch.set_num_threads(1)
    if not torch.accelerator.is_available():
        # For a device to come they would note at each `torch.manual_seed` where it was called, a millisecond each.
        for devices in (torch.cuda, torch.mtia, torch.xpu):
            devices.manual_seed_all = lambda seed: None


@functools.cache
def starts_warm(file):
    """Whether a file of tests starts processes by `warm`. One process runs all of them, for the sake of one server."""
    return "warm" in re.findall(r"^(?:import|from) (\w+)", (TESTS / file).read_text("utf-8"), re.MULTILINE)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = Path(nodeid.partition("::")[0]).name
            if file.startswith("test_gpu_"):  # whose few files would keep few processes busy
                return nodeid
            return "warm" if starts_warm(file) else file

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)  # before the slow ones are left out
def pytest_collection_modifyitems(items):
    leave_each_value(items)
    rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: -1 if starts_warm(item.path.name) else rank.get(item.path.name, len(rank)))


def pytest_collection_finish():
    """A million objects of imported packages are not looked through again at every collection of garbage."""
    gc.collect()
    gc.freeze()
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch."):  # to sixty that do not propagate pytest attaches its handlers, six times a test
            logging.getLogger(name).propagate = True
    if "attached_loggers" in getattr(catching_logs, "__slots__", ()):
        known = [logging.root, *logging.root.manager.loggerDict.values()]
        loggers = [logger for logger in known if logger is logging.root or not getattr(logger, "propagate", True)]
        catching_logs.__enter__ = functools.partialmethod(listen, loggers)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    if any(starts_warm(item.path.name) for item in session.items) and not session.config.option.collectonly:
        import warm

        warm.start_server()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Nor is what a file of tests leaves behind: transformers' Trainer collects all garbage after each run."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def listen(catching, loggers):
    """As pytest does it, which looks for these loggers among thousands, six times a test: a third of what a test costs."""
    for logger in loggers:
        logger.addHandler(catching.handler)
    catching.attached_loggers.extend(loggers)
    return catching.handler


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def offline():
    """A test that reaches for another machine fails, and what takes long though no test looks at it is left out."""
    from torch._dynamo import guards
    from torch.nn import init

    from minipeft.kernels import glibc

    def connect(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to connect to {address}")
        return _connect(self, address)

    draw = init._no_grad_normal_

    def draw_values(tensor, *arguments, **options):
        return tensor if tensor.is_meta else draw(tensor, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        # What is loaded is made on the meta device first, where drawing takes ten times as long as with values.
        patch.setattr(init, "_no_grad_normal_", draw_values)
        # A save waits until the disk has it, some 6,000 times in a run. Tests that ask whether it does set it themselves.
        patch.setattr(os, "fsync", lambda descriptor: None)
        # torch.compile flushes the processor's caches to time its guards, 60 ms for each compilation.
        patch.setattr(guards, "profile_guard_manager", lambda *arguments: 0.0)
        # Looking for pages to give back takes milliseconds in a heap like this, at each block that is computed again.
        patch.setattr(glibc, "trim", functools.wraps(glibc.trim)(lambda device_type: None))
        with contextlib.suppress(ImportError):  # each run of transformers' Trainer has it collect all garbage first
            patch.setattr("accelerate.utils.memory.gc", types.SimpleNamespace(collect=lambda: 0))
            from accelerate.utils import imports  # which looks for a package in all folders, each time it is asked

            patch.setattr(imports, "_is_package_available", functools.cache(imports._is_package_available))
        with contextlib.suppress(ImportError):  # half the time that PEFT takes to save an adapter goes into its README
            patch.setattr("peft.PeftModel.create_or_update_model_card", lambda self, directory: None)
        yield


@pytest.fixture
def tmp_path(tmp_path_factory):
    """pytest's own looks at all folders of earlier tests to number a new one, a millisecond for each test."""
    return tmp_path_factory.mktemp(f"test{next(numbers)}", numbered=False)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory):
    """In place of the embedded model: half as deep and wide, untrained, with the same tokenizer and dropout."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    folder, embedded = tmp_path_factory.mktemp("base") / "tiny", EXAMPLES / "assets/tiny"
    shutil.copytree(embedded, folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(embedded, n_layer=2, n_embd=64)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if shown:
        logging.enable_progress_bar()
    return folder


@pytest.fixture(scope="module")
def train(small_base):
    """examples/train.py as a module, whose `main` takes its words; without what is slow.

    The base is small, and read once; there is one sample of one token, and the curve is not drawn.
    """
    from fast_copy import Template

    spec = importlib.util.spec_from_file_location("train_example", EXAMPLES / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.EMBEDDED_MODEL, module.SAMPLE_TOKENS = small_base, 1
    module.EMBEDDED_PROMPTS, openings = module.EMBEDDED_PROMPTS[:1], module.report.openings
    brief = {"plot_losses": lambda *_: None, "openings": lambda *arguments: openings(*arguments)[:1]}
    module.report = types.SimpleNamespace(**{**vars(module.report), **brief})
    read, found = module.load_base, {}

    def load_base(name, dtype, attention, quantized, chat_template):
        if quantized or chat_template:
            return read(name, dtype, attention, quantized, chat_template)
        if (name, dtype, attention) not in found:
            found[name, dtype, attention] = Template(read(name, dtype, attention))
        return found[name, dtype, attention].copy()

    module.load_base = load_base
    return module


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file with so much of the embedded text that it makes five batches of five examples of 24 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        gzip.decompress((EXAMPLES / "assets/corpus/code-train.txt.gz").read_bytes()).decode()[:1900], "utf-8"
    )
    return path


@pytest.fixture
def unprobed(monkeypatch):
    """lean() without its own proof that it changes nothing, which takes most of its time and counts no bytes."""
    monkeypatch.setattr("minipeft.memory.lean.Probe", Mock())


@pytest.fixture
def fresh_accelerator():
    """A process has one accelerator state; a test that makes one leaves none."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What `datasets` caches is the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()

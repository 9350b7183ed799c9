"""Every test is seeded, offline and single-threaded (pytest runs two of them at a time)."""

import gc
import os
import socket

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
_connect = socket.socket.connect
# The files that take longest go first, so that both processes are done at the same time.
LONGEST = ("train_runs", "architecture", "train", "contract", "hf_trainer", "distributed", "peft_interop", "families")
LONGEST += ("benchmarks", "plugin_package", "updates", "checkpoint", "run_state")


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish():
    """A million objects of imported packages are not looked through again at every collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A test that reaches for another machine fails."""

    def connect(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to connect to {address}")
        return _connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)

"""Processes that start warm: forked from a server that has imported minipeft and the heavy packages, and done nothing else.

A new interpreter takes six seconds to import what a training run needs. These are processes as any other, with their
own environment, output, signals and exit code; what a launcher starts, and at least one run of each program, is cold.
The server is itself a fork: of pytest's process, which has imported all that too, before its first test.
"""

import contextlib
import faulthandler
import gc
import importlib
import itertools
import logging
import multiprocessing
import os
import runpy
import socket
import sys
import warnings
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from unittest import mock

import torch

PACKAGES = ["torch.distributed.fsdp", "transformers.trainer_utils", "transformers.models.gpt2.modeling_gpt2", "peft"]
PACKAGES += ["transformers.models.auto.modeling_auto", "accelerate", "datasets", "matplotlib.figure"]
PACKAGES += ["bitsandbytes", "torchao.quantization", "transformers.optimization", "minipeft.testing"]
ROOT = Path(__file__).resolve().parents[1]
PACKAGES += [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("minipeft/training/**/*.py")]
context = multiprocessing.get_context("forkserver")


def start_server():
    """Before the first test, and outside of what pytest does to warnings while one runs."""
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PACKAGES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    logging.disable(logging.NOTSET)
    resource_tracker.ensure_running()
    with mock.patch.object(util, "spawnv_passfds", _fork_and_run):
        forkserver.ensure_running()


def _fork_and_run(executable, words, descriptors):
    """For `multiprocessing`, which wants an interpreter that runs its server: the last of these words."""
    with warnings.catch_warnings():
        # Newer Pythons warn of threads; pytest-xdist's waits for words from the other process.
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid:
        return pid
    try:
        kept = [0, 1, 2, *sorted(descriptors), os.sysconf("SC_OPEN_MAX")]
        for one, other in itertools.pairwise(kept):
            os.closerange(one + 1, other)
        _forget_pytest()
        forkserver._forkserver.__init__()  # it is locked here
        exec(words[-1], {})
    finally:
        os._exit(1)


def _forget_pytest():
    """What writes to descriptors that are closed now, and what a program would not find imported."""
    faulthandler.disable()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", [])[:]:
            if type(handler).__module__.startswith("_pytest"):
                logger.removeHandler(handler)
            elif type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
    for name in list(sys.modules):
        if name.partition(".")[0] in ("pytest", "_pytest"):
            del sys.modules[name]


class Warm:
    """A warm process that has begun to call ``target(*args)``, and what it has printed."""

    def __init__(self, directory, target, *args, **environment):
        directory.mkdir(parents=True, exist_ok=True)
        self._files = directory / "stdout", directory / "stderr"
        self.process = context.Process(target=_run, args=(self._files, environment, target, args))
        self.process.start()

    @property
    def stdout(self):
        return self._files[0].read_text("utf-8")

    @property
    def stderr(self):
        return self._files[1].read_text("utf-8")

    def terminate(self):
        self.process.terminate()

    def wait(self, timeout=120):
        """Its exit code; killed if there is none in time."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(self.stderr)
        return self.process.exitcode


def _run(files, environment, target, args):
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(environment)
    # As in any program. Else a lock, such as tqdm's, has a name that is left over if the process is killed.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    gc.freeze()  # else the first collection looks through all that the server has imported, and copies its pages
    target(*args)


def script(path, *words):
    """For `Warm`: a Python program with its words."""
    sys.argv = [str(path), *map(str, words)]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(str(path), run_name="__main__")


def brief(path, *words):
    """For `Warm`: `main` of examples/train.py with its words; its samples are one token long."""
    main = runpy.run_path(str(path))["main"]
    main.__globals__["SAMPLE_TOKENS"] = 1
    main([str(word) for word in words])


def launch(*words):
    """For `Warm`: `accelerate launch` with its words, in which only the new interpreters are forks of this process."""
    from accelerate.commands import launch
    from torch.distributed import run

    elastic_launch = run.elastic_launch

    def start_several(config, entrypoint):  # of the command `python -u SCRIPT WORDS...`
        config.start_method = "fork"
        return lambda unbuffered, *command: elastic_launch(config, script)(*command)

    def start_one(args):
        command, environment = prepare_simple_launcher_cmd_env(args)
        os.environ.update(environment)
        script(*command[1:])

    prepare_simple_launcher_cmd_env = launch.prepare_simple_launcher_cmd_env
    run.elastic_launch, launch.simple_launcher = start_several, start_one
    sys.argv = ["accelerate launch", *map(str, words)]
    launch.main()


def ranks(directory, target, *args, world=2, **environment):
    """Processes that find each other as a launcher's do, by their environment; finished without an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    with contextlib.ExitStack() as stack:
        found = []
        for rank in map(str, range(world)):
            found.append(Warm(directory / rank, target, *args, **environment, RANK=rank, LOCAL_RANK=rank))
            stack.callback(found[-1].process.kill)
        codes = [process.wait() for process in found]
    assert codes == [0] * world, "\n".join(process.stderr for process in found)
    return found

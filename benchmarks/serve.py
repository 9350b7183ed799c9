"""A server of many adapters under load, over loopback: requests a second, and how long one takes.

    python benchmarks/serve.py            # about twenty minutes on two cores
    python benchmarks/serve.py --quick

Clients in threads send one request after the other to `examples/serve_many.py`, each for another adapter than the one
before. The peers are the same server around PEFT, with `set_adapter` and one request at a time, and around our model with one
request at a time. All answer the same requests in turns, in each round in another order, and must give the same texts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import importlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import torch
from options import quietly
from rows import RESULTS, Row, compare, quantile, show, write_rows
from subjects import CORE, PEFT, TARGETS, gpt2
from transformers import AutoTokenizer

from minipeft.serving.adapters import Adapters, MiB
from minipeft.serving.batch import Batch
from minipeft.serving.engine import Engine

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ONE = "minipeft, one at a time"
PEFT_ONE = f"{PEFT}, set_adapter, one at a time"
LATENCIES = {"median": 0.5, "95 %": 0.95, "99 %": 0.99}
Request = tuple[str, list[int]]  # an adapter and a prompt


class Turns(Adapters):
    """As a user of PEFT serves adapters: one is active, and all of them stay."""

    def __init__(self, model: Any, root: Path) -> None:
        super().__init__(model.get_base_model(), root, 0)
        self.peft = model

    def acquire(self, name: str, used: Any) -> str:
        if name not in self.peft.peft_config:
            self.peft.load_adapter(self.directory(name), name)
        self.peft.set_adapter(name)
        return name


def engines(root: Path, names: Sequence[str], rows: int, quick: bool) -> dict[str, Engine]:
    """What is compared; all have read the same adapters, which PEFT has made."""
    vocabulary = len(AutoTokenizer.from_pretrained(EXAMPLES / "assets" / "tiny"))
    make = lambda: gpt2(quick, vocab_size=vocabulary).eval()  # noqa: E731
    torch.manual_seed(1)
    with quietly():
        config = peft.LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False, fan_in_fan_out=True)
        theirs = peft.get_peft_model(make(), config, names[0])
        for name in names[1:]:
            theirs.add_adapter(name, config)
        theirs.save_pretrained(root)
    found, waiting = {}, {"max_waiting": 1000}
    for subject, count in ((CORE, rows), (ONE, 1)):
        model = make()
        found[subject] = Engine(Batch(model), Adapters(model, root, 4096 * MiB), [], max_rows=count, **waiting)
    found[PEFT_ONE] = Engine(Batch(theirs.get_base_model().eval()), Turns(theirs, root), [], max_rows=1, **waiting)
    return found


@contextlib.contextmanager
def serving(engine: Engine) -> Iterator[int]:
    """The port of a server in a thread of its own."""
    sys.path.insert(0, str(EXAMPLES))
    example = importlib.import_module("serve_many")
    sys.path.remove(str(EXAMPLES))
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "assets" / "tiny")
    server = example.Server(engine, tokenizer, "base", 1024, 600, MiB)
    loop, runner = asyncio.new_event_loop(), example.web.AppRunner(example.make_app(server), access_log=None)
    loop.run_until_complete(runner.setup())
    site = example.web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    engine.start()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield runner.addresses[0][1]
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def load(port: int, requests: Sequence[Sequence[Request]], tokens: int) -> tuple[float, list[float], list[list[str]]]:
    """(requests a second, seconds of each, texts) for clients with these requests each."""
    seconds: list[float] = []

    def client(own: Sequence[Request]) -> list[str]:
        texts, connection = [], http.client.HTTPConnection("127.0.0.1", port)
        for name, prompt in own:
            start = time.perf_counter()
            body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            connection.request("POST", "/v1/completions", json.dumps(body))
            answer = json.loads(connection.getresponse().read())
            seconds.append(time.perf_counter() - start)
            texts.append(answer["choices"][0]["text"])
        connection.close()
        return texts

    start = time.perf_counter()
    with ThreadPoolExecutor(len(requests)) as pool:
        texts = list(pool.map(client, requests))
    return len(seconds) / (time.perf_counter() - start), seconds, texts


def requests_of(clients: int, names: Sequence[str], each: int, lengths: tuple[int, int]) -> list[list[Request]]:
    """Random prompts of different lengths; adapters in turn."""
    generator = torch.Generator().manual_seed(0)

    def prompt() -> list[int]:
        length = int(torch.randint(*lengths, (), generator=generator))
        return torch.randint(1, 2000, (length,), generator=generator).tolist()

    return [[(names[(c + i) % len(names)], prompt()) for i in range(each)] for c in range(clients)]


def measure(args: argparse.Namespace) -> list[Row]:
    names = [f"a{index}" for index in range(args.adapters)]
    requests = requests_of(args.clients, names, args.each, (4, 9) if args.quick else (16, 129))
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        made = engines(Path(folder), names, args.clients, args.quick)
        ports = {subject: stack.enter_context(serving(engine)) for subject, engine in made.items()}
        texts = [load(port, requests, args.tokens)[2] for port in ports.values()]  # loads the adapters, too
        if not texts[0] == texts[1] == texts[2]:
            raise SystemExit("the servers give different texts")
        for number in range(args.rounds):
            for subject in (list(ports), list(reversed(ports)))[number % 2]:
                rate, seconds, _ = load(ports[subject], requests, args.tokens)
                values = found.setdefault(subject, {})
                values.setdefault("requests a second", []).append(rate)
                for what, share in LATENCIES.items():
                    values.setdefault(f"latency, {what}", []).append(1000 * quantile(seconds, share))
    case = f"GPT-2, {args.adapters} adapters, {args.clients} clients, {args.tokens} tokens"
    return [
        compare("serve", case, what, "1/s" if "second" in what else "ms", times, found[peer][what], peer)
        for what, times in found[CORE].items()
        for peer in (PEFT_ONE, ONE)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--each", type=int, default=4, help="requests of a client in a round")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is written, unless --output is given")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    if args.quick:
        args.clients, args.adapters, args.each, args.tokens, args.rounds = 3, 3, 1, 3, 2
    rows = measure(args)
    for row in rows:
        show(row)
    if args.output or not args.quick:
        print(write_rows("serve", rows, args.output or RESULTS))


if __name__ == "__main__":
    main()

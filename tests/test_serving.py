"""A server of many adapters: each answer is its adapter's alone, whoever else is in the batch, and limits hold."""

import asyncio
import contextlib
import gc
import http.client
import importlib.util
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_models import disturb, foreign_code, gpt2, llama, t5
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

import minipeft
from minipeft import ConfigError, LoraConfig, RequestError, StateError
from minipeft.files.tensor_file import TensorFile
from minipeft.serving.adapters import Adapters
from minipeft.serving.batch import Batch
from minipeft.serving.choice import choose
from minipeft.serving.engine import Answer, Engine
from minipeft.serving.text import Text

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = EXAMPLES / "assets" / "tiny"


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64}


def made(config):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "mistral": lambda: made(tf.MistralConfig(**SIZES, sliding_window=8)),  # its layers see the last 8 tokens alone
    "gemma2": lambda: made(tf.Gemma2Config(**SIZES, sliding_window=4, head_dim=8)),  # and every second of these
    "bloom": lambda: made(
        tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=100)
    ),  # positions from the mask
}
SLOW = ("gemma2", "bloom")
METHODS = {
    "a": LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.5),
    "b.c": LoraConfig(r=2, lora_alpha=9, init_lora_weights=False, target_modules="all-linear"),
    "d": LoraConfig(r=3, use_dora=True, init_lora_weights=False),
}


def saved(make, root, methods=METHODS):
    """Adapters in directories below a root."""
    model = make()
    for seed, (name, config) in enumerate(methods.items()):
        torch.manual_seed(seed)
        adapted = minipeft.get_adapter_model(model, config)
        adapted.save_pretrained(root / name)
        model = adapted.unload()
    return root


def alone(model, root, client):
    """What `generate` makes of a prompt with one adapter and nothing else."""
    served = model if client.model is None else minipeft.load_adapter(model, root / client.model)
    with foreign_code():
        ids = torch.tensor([client.prompt])
        served.generation_config.eos_token_id = None
        found = served.generate(ids, do_sample=False, pad_token_id=0, max_new_tokens=client.max_tokens)
    if client.model is not None:
        served.unload()
    return found[0, len(client.prompt) :].tolist()


def engine_of(make, root, limit=2**20, ends=(), **options):
    model = make()
    return Engine(Batch(model), Adapters(model, root, limit), ends, **options)


class Client(Answer):
    """An answer that remembers its events."""

    def __init__(self, model, prompt, max_tokens=8, then=None, **options):
        self.events, self.then = queue.Queue(), then
        super().__init__(model, prompt, max_tokens, self.note, **options)

    def note(self, event):
        self.events.put(event)
        if self.then:
            self.then(self, event)

    def result(self):
        """(tokens, what ended it)"""
        tokens = []
        while isinstance(event := self.events.get(timeout=20), int):
            tokens.append(event)
        return tokens, event


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Adapters of a Llama, to read."""
    return saved(llama, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def running():
    """Start engines; they are stopped at the end, and have nothing left to do."""
    engines = []

    def start(*args, **options):
        engines.append(engine_of(*args, **options))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()
        assert not engine.batch.rows


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in MODELS])
def test_rows_that_join_and_leave_get_what_generate_gives_with_their_adapter_alone(kind, tmp_path, running):
    make, root = MODELS[kind], saved(MODELS[kind], tmp_path)
    generator = torch.Generator().manual_seed(1)
    seen = []

    def prompt(length):
        return torch.randint(8, 100, (length,), generator=generator).tolist()

    later = [Client(name, prompt(n), m) for name, n, m in [("d", 2, 9), (None, 9, 2), ("a", 14, 12), ("b.c", 1, 20)]]

    def join(client, event):
        seen.append(len(engine.batch.rows))
        if len(client.tokens) in (3, 5) and isinstance(event, int):
            engine.submit(later[:2] if len(client.tokens) == 3 else later[2:])

    first = [Client("a", prompt(11), 20, join), Client("b.c", prompt(3), 4), Client(None, prompt(6), 30)]
    model, clients = make(), first + later
    expected = [alone(model, root, client) for client in clients]
    end = next(token for tokens in expected[3:] for token in tokens[1:-1] if token not in expected[0])
    engine = running(make, root, ends=[end], max_rows=4)
    engine.submit(first)
    reasons = []
    for client, whole in zip(clients, expected, strict=True):
        tokens, reason = client.result()
        assert tokens == (whole[: whole.index(end) + 1] if end in whole else whole)
        assert reason == ("stop" if end in whole else "length")
        reasons.append(reason)
    assert {*reasons} == {"stop", "length"}
    assert max(seen) == 4  # more than the three that were there first
    assert engine.adapters.resident.keys() == METHODS.keys()


def test_a_seed_gives_the_same_text_whoever_else_is_in_the_batch(shared, running):
    engine = running(llama, shared)
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 5, "max_tokens": 12}
    by_itself = Client("a", [11, 12, 13], **options)
    engine.submit([by_itself])
    expected = by_itself.result()
    crowd = [Client(name, [20 + i] * (i + 1), 15, temperature=1.5) for i, name in enumerate(["d", None, "b.c"])]
    again, other = Client("a", [11, 12, 13], **options), Client("a", [11, 12, 13], **options | {"seed": 6})
    engine.submit([*crowd[:2], again, crowd[2], other])
    assert again.result() == expected != other.result()


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    count, random = 4000, torch.Generator().manual_seed(1)
    for temperature, top_p in [(1.0, 1.0), (0.7, 0.9), (1.6, 0.5), (1.0, 1e-9)]:
        scores = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits))
        expected = scores.softmax(-1)[0]
        rows = logits.expand(count, -1)
        drawn = torch.tensor(choose(rows, [temperature] * count, [top_p] * count, [random] * count))
        found = drawn.bincount(minlength=12) / count
        assert (found > 0)[expected == 0].sum() == 0
        assert (found - expected).abs().max() < 4 * (expected * (1 - expected) / count).sqrt().max() + 1e-9
    mixed = choose(logits.expand(2, -1), [0.0, 1.0], [1.0, 1e-9], [random] * 2)
    assert mixed == [logits.argmax().item()] * 2


@pytest.mark.parametrize("temperature", [1e-3, 1e-46, 5e-324])
def test_a_very_low_temperature_takes_the_most_likely_token_and_leaves_other_rows_alone(temperature):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 30
    logits[1, 7] = float("-inf")
    chosen = choose(logits, [temperature, 1.0, 0.0], [1.0] * 3, [torch.Generator().manual_seed(n) for n in range(3)])
    alone = choose(logits[1:2], [1.0], [1.0], [torch.Generator().manual_seed(1)])
    assert chosen == [int(logits[0].argmax()), *alone, int(logits[2].argmax())]


def test_a_root_that_is_gone_is_answered_and_what_cannot_be_listed_is_left_out(shared, tmp_path, monkeypatch):
    root = shutil.copytree(shared, tmp_path / "root")
    adapters, listed = Adapters(llama(), root, 2**20), os.listdir
    with monkeypatch.context() as patch:

        def listdir(place):
            if Path(place).name == "d":
                raise PermissionError(13, "Permission denied")
            return listed(place)

        patch.setattr(os, "listdir", listdir)
        assert adapters.names() == ["a", "b.c"]
    shutil.rmtree(root)
    for call in (adapters.names, lambda: adapters.directory("a")):
        with pytest.raises(RequestError, match="cannot be listed") as caught:
            call()
        assert caught.value.status == 503


def test_adapters_take_no_more_memory_than_allowed_and_one_in_use_stays(tmp_path, running):
    root = saved(llama, tmp_path, {name: LoraConfig(r=32, init_lora_weights=False) for name in "abcd"})
    size = 2 * 32 * (32 + 32 + 32 + 16) * 4  # two layers; A and B of q_proj and v_proj
    engine = running(llama, root, limit=int(2.5 * size))  # a file is a little larger
    adapters = engine.adapters
    for name in "aba":
        engine.submit([client := Client(name, [9], 2)])
        client.result()
    assert {name: adapter.size for name, adapter in adapters.resident.items()} == {"b": size, "a": size}
    engine.submit([client := Client("c", [9], 2)])
    client.result()
    assert list(adapters.resident) == ["a", "c"]  # b was used before a
    seen = []

    def note(client, event):
        seen.append((client.model, sorted(adapters.resident)))

    # Four adapters, two at a time: the third waits until one of the first two is done, and nobody overtakes it.
    clients = [Client(name, [9], tokens, note) for name, tokens in zip("abcda", [12, 3, 4, 3, 2], strict=True)]
    engine.submit(clients)
    model = llama()
    for client in clients:
        assert client.result()[0] == alone(model, root, client)
    assert all(model in resident and len(resident) <= 2 for model, resident in seen)
    with pytest.raises(RequestError, match="takes 0.0 MiB, and all adapters may take 0.0 MiB"):
        Adapters(llama(), root, size - 1).acquire("a", ())


def test_an_adapter_that_excludes_another_one_waits_until_that_is_idle_and_takes_its_place(tmp_path, running):
    """A trained head, and rows of the table that it shares, cannot be in one model."""
    head, rows = LoraConfig(r=2, modules_to_save=["lm_head"]), LoraConfig(r=2, trainable_token_indices=[9, 11])
    for name, config in {"head": head, "rows": rows, "a": METHODS["a"]}.items():
        disturb(minipeft.get_adapter_model(gpt2(), config)).save_pretrained(tmp_path / name)
    engine, clients = running(gpt2, tmp_path), []

    def join(client, event):
        if len(client.tokens) == 2 and not clients:
            clients.extend([Client("rows", [9, 11]), Client("head", [9]), Client("a", [9])])
            engine.submit(clients)

    engine.submit([first := Client("head", [11, 12], 10, join)])
    found = [first.result(), *(client.result() for client in clients)]
    assert found == [(alone(gpt2(), tmp_path, client), "length") for client in (first, *clients)]
    assert "rows" not in engine.adapters.resident
    assert {"head", "a"} <= engine.adapters.resident.keys()


def test_an_adapter_is_read_again_after_its_files_were_replaced(shared, tmp_path, running):
    root = shutil.copytree(shared, tmp_path / "root")
    engine = running(llama, root)
    engine.submit([before := Client("a", [9, 10])])
    shutil.rmtree(root / "a")
    os.rename(root / "d", root / "a")
    before.result()
    engine.submit([after := Client("a", [9, 10])])
    assert after.result()[0] == alone(llama(), root, after)


def broken(root, kind):
    """An adapter that cannot be used, and what is said of it."""
    shutil.copytree(root / "a", root / "bad")
    path = root / "bad" / "adapter_model.safetensors"
    if kind == "missing file":
        path.unlink()
        return "has no adapter_model.safetensors"
    if kind == "another base":
        saved(gpt2, root, {"bad": METHODS["a"]})
        return "c_attn"
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor.fill_(float("nan") if kind == "nan" else 1e30)
    save_file(tensors, path)
    return "NaN or infinity" if kind == "nan" else "not finite"


@pytest.mark.parametrize("kind", ["nan", "too large", "missing file", "another base"])
def test_a_broken_adapter_fails_alone_while_others_go_on(kind, shared, tmp_path, running):
    root = shutil.copytree(shared, tmp_path / "root")
    said = broken(root, kind)
    engine, other = running(llama, root), []

    def join(client, event):
        if len(client.tokens) == 2 and not other:
            other.append(Client("bad", [9, 10]))
            engine.submit([*other, Client("d", [9])])

    good = Client("a", [11, 12], 10, join)
    engine.submit([good])
    tokens, _ = good.result()
    assert tokens == alone(llama(), root, good)
    nothing, error = other[0].result()
    assert nothing == []
    assert isinstance(error, RequestError)
    assert error.status == 400
    assert said in str(error)
    assert str(tmp_path) not in str(error)
    assert "bad" not in engine.adapters.resident


def test_a_refused_adapter_leaves_nothing_in_memory_and_is_tried_again_later(shared, tmp_path, monkeypatch):
    root = shutil.copytree(shared, tmp_path / "root")
    broken(root, "nan")
    adapters, seen, clock = Adapters(llama(), root, 2**20), [], [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    read = TensorFile.read

    def noted(file, *args, **options):
        seen.append(weakref.ref(file))
        return read(file, *args, **options)

    monkeypatch.setattr(TensorFile, "read", noted)
    reads = []
    for clock[0] in (0, 9, 11):
        with pytest.raises(RequestError, match="NaN or infinity"):
            adapters.acquire("bad", ())
        gc.collect()
        assert not any(file() for file in seen)
        reads.append(len(seen))
    assert reads == [reads[0], reads[0], 2 * reads[0]]


def test_a_failing_model_ends_the_answers_and_not_the_thread(shared, running, monkeypatch, caplog):
    engine = running(llama, shared)
    monkeypatch.setattr(engine.batch, "step", lambda: 1 / 0)
    engine.submit([first := Client("a", [9])])
    assert first.result()[1].status == 500
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    engine.submit([second := Client("a", [9])])
    assert second.result()[0] == alone(llama(), shared, second)


@pytest.mark.parametrize("kind", ["mamba", "t5"])
def test_models_that_keep_anything_else_than_keys_and_values_are_refused(kind, tmp_path):
    config = tf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=100, state_size=4)
    with foreign_code():
        model = t5() if kind == "t5" else made(config)
        with pytest.raises(StateError, match=f"{type(model).__name__} cannot be served here"):
            Engine(Batch(model), Adapters(model, tmp_path, 1), [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_that_counts_padding_as_positions_is_refused(dtype, tmp_path):
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "vocab_size": 100}
    model = made(tf.BartConfig(**sizes, is_decoder=True, is_encoder_decoder=False)).to(dtype)
    with pytest.raises(StateError, match="BartForCausalLM cannot be served here: a prompt that is padded on the left"):
        Engine(Batch(model), Adapters(model, tmp_path, 1), [])
    for make in MODELS.values():
        Batch(make().to(dtype)).check()


def test_a_server_that_cannot_start_says_why_in_one_line(example, tmp_path):
    wrong = {
        "nowhere is not a directory": ["--adapters", "nowhere"],
        "max_rows must be an integer from 1": ["--rows", "0"],
        r"bind\(\): port must be 0-65535": ["--port", "99999"],
        "encoding with 'idna' codec failed": ["--host", "127.0.0..1"],
        "--timeout must be a finite number > 0, not 0": ["--timeout", "0"],
        "--timeout must be a finite number > 0, not nan": ["--timeout", "nan"],
        "--adapter_memory must be a finite number > 0, not inf": ["--adapter_memory", "inf"],
        "--max_length must be an integer from 2": ["--max_length", "1"],
        "--body must be an integer from 1": ["--body", "0"],
        "'tiny' names the base and an adapter": ["--adapters", str(tmp_path / "same")],
    }
    (tmp_path / "same" / "tiny").mkdir(parents=True)
    (tmp_path / "same" / "tiny" / "adapter_config.json").write_text("{}")
    for said, words in wrong.items():
        with foreign_code(), pytest.raises(SystemExit, match=f"^serve_many: {said}"):
            example.main(["--model", str(TINY), "--adapters", str(tmp_path), *words])


@pytest.mark.parametrize("place", [".", "../tiny/"])
def test_a_base_at_a_path_without_a_last_part_has_the_name_of_its_directory(place, example, tmp_path, monkeypatch):
    monkeypatch.chdir(TINY)
    args = example.flags(["--model", place, "--adapters", str(tmp_path)])
    with foreign_code():
        assert example.build(args).name == "tiny"


@pytest.mark.parametrize("damage", ["tokenizer", "weights", "type"])
def test_a_base_that_cannot_be_served_is_named_in_one_line(damage, example, tmp_path):
    shutil.copytree(TINY, base := tmp_path / "base")
    file, content, words = {
        "tokenizer": ("tokenizer.json", "{", "has no tokenizer that loads"),
        "weights": ("model.safetensors", "", "cannot be read"),
        "type": ("config.json", '{"model_type": "nobody"}', "cannot be read"),
    }[damage]
    (base / file).write_text(content)
    with foreign_code(), pytest.raises(SystemExit, match=f"^serve_many: {base} {words}"):
        example.main(["--model", str(base), "--adapters", str(tmp_path)])


@pytest.mark.parametrize("option", ["max_rows", "max_waiting"])
def test_an_engine_that_could_answer_nothing_is_refused(option, shared):
    for value in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match=f"{option} must be an integer from 1"):
            engine_of(llama, shared, **{option: value})


def test_the_queue_is_bounded_and_takes_all_or_none(tmp_path):
    engine = engine_of(llama, tmp_path, max_waiting=3)
    with pytest.raises(RequestError) as caught:
        engine.submit([Client(None, [9])])
    assert caught.value.status == 503
    release, entered = threading.Event(), threading.Event()

    def hold(client, event):
        entered.set()
        release.wait(20)

    engine.start()
    with pytest.raises(RequestError, match="4 prompts at once, and 3 may wait; send fewer") as caught:
        engine.submit([Client(None, [9], 1) for _ in range(4)])
    assert caught.value.status == 400
    engine.submit([first := Client(None, [9], 2, hold)])
    assert entered.wait(20)
    engine.submit([Client(None, [9], 1), Client(None, [9], 1)])
    with pytest.raises(RequestError, match="2 prompts wait, and 3 may") as caught:
        engine.submit([Client(None, [9], 1), Client(None, [9], 1)])
    assert caught.value.status == 429
    assert len(engine.waiting) == 2
    engine.waiting[1].over = True  # nobody waits for it
    engine.submit([Client(None, [9], 1), Client(None, [9], 1)])
    release.set()
    engine.stop()
    assert first.result()[1] == "length"
    assert not engine.waiting
    with pytest.raises(RequestError, match="shutting down"):
        engine.submit([Client(None, [9])])


@pytest.fixture(scope="module")
def example():
    """examples/serve_many.py as a module, which needs an extra."""
    pytest.importorskip("aiohttp")
    spec = importlib.util.spec_from_file_location("serve_many", EXAMPLES / "serve_many.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Site:
    """A server in a thread of its own, and a client of it."""

    def __init__(self, example, base, root):
        args = example.flags(["--model", str(base), "--adapters", str(root)])
        with foreign_code():
            self.server = example.build(args)
        self.engine, self.base, self.root = self.server.engine, base, root
        self.engine.start()
        self.loop, self.port = asyncio.new_event_loop(), None
        self.runner = example.web.AppRunner(example.make_app(self.server), handler_cancellation=True)
        self.loop.run_until_complete(self.runner.setup())
        self.loop.run_until_complete((site := example.web.TCPSite(self.runner, "127.0.0.1", 0)).start())
        self.port = site._server.sockets[0].getsockname()[1]
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def close(self):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        assert not self.engine.is_alive()

    @contextlib.contextmanager
    def response(self, body, path="/v1/completions"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
            yield connection.getresponse()

    def ask(self, body=None, path="/v1/completions", **fields):
        """(status, answer)"""
        if fields:
            body = {"model": "french", "prompt": "def main(", "max_tokens": 8, "temperature": 0} | fields
        with self.response(body, path) as response:
            return response.status, json.loads(response.read())

    def stream(self, **fields):
        """The events of a stream, without the last."""
        body = {"model": "french", "prompt": "def main(", "max_tokens": 8, "temperature": 0, "stream": True} | fields
        with self.response(body) as response:
            assert response.getheader("Content-Type") == "text/event-stream"
            events = response.read().decode().split("\n\n")
        assert all(event.startswith("data: ") for event in events[:-1])
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def idle(self):
        """Wait until no row is left."""
        deadline = time.monotonic() + 10
        while self.engine.batch.rows or self.engine.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture(scope="module")
def site(example, small_base, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")

    def make():
        with foreign_code():
            return tf.AutoModelForCausalLM.from_pretrained(small_base)

    saved(make, root, {"french": LoraConfig(r=4, init_lora_weights=False), "short.v1": METHODS["d"]})
    site = Site(example, small_base, root)
    yield site
    site.close()


@pytest.fixture(scope="module")
def expected(site):
    """The ids and text that `generate` and the tokenizer give for a prompt with an adapter."""
    with foreign_code():
        model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(site.base), site.server.tokenizer

    def compute(name, prompt, count):
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        client = Client(None if name == "tiny" else name, ids, count)
        return tokenizer.decode(alone(model, site.root, client), skip_special_tokens=True)

    return compute


def test_completions_over_http(site, expected):
    status, answer = site.ask(prompt="def main(")
    assert status == 200
    assert answer["object"] == "text_completion"
    text = expected("french", "def main(", 8)
    assert answer["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}
    prompts = ["def main(", "x", "import"]
    for name in ("short.v1", "tiny"):
        _, answer = site.ask(model=name, prompt=prompts, echo=True)
        assert [c["text"] for c in answer["choices"]] == [p + expected(name, p, 8) for p in prompts]
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    _, answer = site.ask(prompt=[[5, 6, 7], [8]])
    assert [c["text"] for c in answer["choices"]] == [expected("french", ids, 8) for ids in ([5, 6, 7], [8])]
    _, answer = site.ask(None, "/v1/models")
    assert [model["id"] for model in answer["data"]] == ["tiny", "french", "short.v1"]
    assert site.ask(None, "/health") == (200, {"status": "ok", "rows": 0, "waiting": 0})
    assert site.ask(None, "/v2")[0] == 404


def test_a_stream_has_the_pieces_of_the_same_text(site):
    prompts = ["def main(", "é", "x = ["]
    _, whole = site.ask(model="short.v1", prompt=prompts, max_tokens=20)
    events = site.stream(model="short.v1", prompt=prompts, max_tokens=20, stream_options={"include_usage": True})
    assert events[-1]["usage"] == whole["usage"]
    pieces = [event["choices"][0] for event in events[:-1]]
    for choice in whole["choices"]:
        own = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
    assert len(pieces) > 20


def test_stop_strings_end_the_text_before_them_and_free_the_row(site):
    _, plain = site.ask(max_tokens=40)
    text = plain["choices"][0]["text"]
    stop = text[15:20]  # within tokens, and over several
    wanted = text[: text.index(stop)]
    _, answer = site.ask(max_tokens=40, stop=["never there", stop])
    assert answer["choices"][0] | {"text": wanted, "finish_reason": "stop"} == answer["choices"][0]
    assert answer["usage"]["completion_tokens"] < 40
    events = site.stream(max_tokens=40, stop=stop)
    assert "".join(event["choices"][0]["text"] for event in events) == wanted
    site.idle()


def test_pieces_of_text_are_whole_characters_and_never_part_of_a_stop_string(site):
    tokenizer = site.server.tokenizer
    for said in ["a€b 𝄞 naïve — ok", " leading", "stopstop STOP here", "ST", "日本"]:
        for stops in [(), ("STOP",), ("op S", "€"), ("𝄞 n",)]:
            text, pieces = Text(tokenizer, stops), []
            for token in tokenizer(said)["input_ids"]:
                if not text.stopped:
                    pieces.append(text.add(token))
            pieces.append(text.rest())
            places = [said.index(stop) for stop in stops if stop in said]
            assert "".join(pieces) == said[: min(places, default=None)]
            assert text.stopped == bool(places)
            assert not any("\ufffd" in piece for piece in pieces)


BAD = {
    "unknown field": ({"max_token": 5}, 400, "unknown field 'max_token' (closest: 'max_tokens')"),
    "logprobs": ({"logprobs": 3}, 400, "logprobs must be left out"),
    "n": ({"n": 2}, 400, "n must be 1"),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty must be 0"),
    "true is not 1": ({"n": True}, 400, "n must be 1"),
    "1.0 is not whole": ({"best_of": 1.0}, 400, "best_of must be 1"),
    "false is not 0": ({"frequency_penalty": False}, 400, "frequency_penalty must be 0"),
    "no prompt": ({"prompt": None}, 400, "prompt is missing"),
    "mixed prompts": ({"prompt": ["a", 5]}, 400, "prompt must be a string"),
    "empty prompt": ({"prompt": []}, 400, "prompt must be a string"),
    "half a character": ({"prompt": "\ud800"}, 400, "prompt must be a string"),
    "half a character in a name": ({"model": "\ud800"}, 400, "model must be a string"),
    "unknown token": ({"prompt": [5, 99999]}, 400, "a token that the model does not know"),
    "true is no number": ({"max_tokens": True}, 400, "max_tokens must be a whole number"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens must be a whole number from 1 on"),
    "temperature": ({"temperature": -1}, 400, "temperature must be a number from 0 to 2"),
    "not a number": ({"temperature": float("nan")}, 400, "temperature must be a number from 0 to 2"),
    "top_p": ({"top_p": 0}, 400, "top_p must be a number above 0"),
    "seed": ({"seed": 2**64}, 400, "seed must be a whole number"),
    "stop": ({"stop": ["a"] * 5}, 400, "stop must be a string of 1 to 200 characters, or a list of up to 4"),
    "empty stop": ({"stop": ""}, 400, "stop must be a string of 1 to"),
    "stream": ({"stream": "yes"}, 400, "stream must be true or false"),
    "stream options": ({"stream_options": {"include_usage": True}}, 400, "for stream: true"),
    "too long": ({"max_tokens": 253}, 400, "4 + 253 tokens; 256 are allowed"),
    "nearest name": ({"model": "frensh"}, 404, "no model 'frensh' (closest: 'french')"),
    "a path": ({"model": "../french"}, 400, "the name of an adapter and not a path"),
    "the root": ({"model": ".."}, 400, "not a path"),
    "an absolute path": ({"model": "/etc"}, 400, "not a path"),
    "a very long name": ({"model": "a" * 5000}, 404, "no model"),
    "a file": ({"model": "file"}, 404, "no model 'file'"),
    "a link that leads out": ({"model": "link"}, 404, "no model 'link'"),
    "not an adapter": ({"model": "empty"}, 400, "empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_requests_are_answered_with_the_reason(kind, site, tmp_path):
    fields, expected_status, said = BAD[kind]
    with contextlib.suppress(FileExistsError):
        (site.root / "file").write_text("no directory")
        (site.root / "empty").mkdir()
        (site.root / "link").symlink_to(tmp_path)
    for more in ({}, {"stream": True}) if kind not in ("stream", "stream options") else ({},):
        status, answer = site.ask(**fields | more)
        assert status == expected_status
        assert answer["error"].keys() == {"message", "type", "param", "code"}
        assert said in answer["error"]["message"]
        assert str(site.root) not in answer["error"]["message"]


BODIES = {
    "empty": b"",
    "a list": b"[]",
    "half": b"{",
    "not UTF-8": b"\xff",
    "deep": b"[" * 100_000,
    "fields": b'{"model": "a"}',
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_is_no_request_is_refused(kind, site):
    assert site.ask(BODIES[kind])[0] == 400


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_body_in_another_encoding_than_it_says_is_refused(encoding, site):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)) as connection:
        connection.request("POST", "/v1/completions", b"garbage", {"Content-Encoding": encoding})
        response = connection.getresponse()
        assert response.status == 400
        assert "cannot be read as its headers say" in json.loads(response.read())["error"]["message"]


def test_a_body_of_a_gibibyte_is_refused_before_it_is_read(site):
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as connection:
        connection.sendall(request)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)) as connection:
        with contextlib.suppress(ConnectionError):
            connection.request("POST", "/v1/completions", (b"x" * 2**16 for _ in range(17)), encode_chunked=True)
        assert connection.getresponse().status == 413


def test_a_directory_that_is_deleted_or_broken_answers_4xx_and_others_go_on(site):
    shutil.copytree(site.root / "french", site.root / "gone")
    assert site.ask(model="gone")[0] == 200
    shutil.rmtree(site.root / "gone")
    status, answer = site.ask(model="gone")
    assert (status, answer["error"]["message"][:15]) == (404, "no model 'gone'")
    shutil.copytree(site.root / "french", site.root / "nan")
    path = site.root / "nan" / "adapter_model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(path).items()}, path)
    assert site.ask(model="nan")[0] == 400
    assert site.ask(model="nan", stream=True)[0] == 400
    assert site.ask(model="french")[0] == 200


@pytest.fixture
def slow(site, monkeypatch):
    """Every token takes a while."""
    step = site.engine.batch.step
    monkeypatch.setattr(site.engine.batch, "step", lambda: time.sleep(0.02) or step())
    yield
    site.idle()


@pytest.mark.usefixtures("slow")
def test_a_request_that_takes_too_long_is_answered_504_and_its_row_leaves(site, monkeypatch):
    monkeypatch.setattr(site.server, "timeout", 0.3)
    status, answer = site.ask(max_tokens=250)
    assert (status, answer["error"]["message"][:24]) == (504, "The answer took too long")
    site.idle()
    with site.response({"model": "french", "prompt": "x", "max_tokens": 250, "stream": True, "seed": 0}) as response:
        events = response.read().decode().split("\n\n")
    assert response.status == 200
    assert "took too long" in events[-2]
    assert "[DONE]" not in "".join(events)


def test_others_are_answered_while_a_long_prompt_is_made_into_tokens(site, monkeypatch):
    tokenizer, reads, goes_on = site.server.tokenizer, threading.Event(), threading.Event()

    class Slow:
        def __call__(self, prompt):
            reads.set()
            assert goes_on.wait(10)
            return tokenizer(prompt)

        decode = staticmethod(tokenizer.decode)

    monkeypatch.setattr(site.server, "tokenizer", Slow())
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(site.ask, prompt="x" * 1000)
        assert reads.wait(10)
        status, _ = site.ask(prompt=[5, 6])
        goes_on.set()
        assert (status, long.result(20)[0]) == (200, 400)


@pytest.mark.usefixtures("slow")
def test_the_row_of_a_client_that_has_gone_leaves(site):
    for stream in (True, False):
        body = {"model": "french", "prompt": "x", "max_tokens": 250, "stream": stream, "seed": 0}
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)
        connection.request("POST", "/v1/completions", json.dumps(body))
        while not site.engine.batch.rows:
            time.sleep(0.01)
        connection.close()
        start = time.monotonic()
        site.idle()
        assert time.monotonic() - start < 3  # all of it would take 5 seconds


@pytest.mark.usefixtures("slow")
def test_a_client_that_does_not_read_its_stream_is_hung_up_on(example, site, monkeypatch):
    monkeypatch.setattr(site.server, "timeout", 0.2)
    monkeypatch.setattr(example, "PATIENCE", 0.05)
    send = example.send
    monkeypatch.setattr(example, "send", lambda response, event: send(response, event | {"long": "x" * 2**22}))
    body = json.dumps({"model": "french", "prompt": "x", "max_tokens": 250, "stream": True, "seed": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as connection:
        connection.sendall(head + body)
        while not site.engine.batch.rows:
            time.sleep(0.01)
        start = time.monotonic()
        site.idle()
        assert time.monotonic() - start < 3  # all of it would take 5 seconds
        with contextlib.suppress(ConnectionError):
            while connection.recv(2**22):
                pass


@pytest.mark.usefixtures("slow")
def test_requests_beyond_the_queue_are_answered_429(site, monkeypatch):
    monkeypatch.setattr(site.engine, "max_rows", 1)
    monkeypatch.setattr(site.engine, "max_waiting", 1)
    with ThreadPoolExecutor(6) as pool:
        statuses = [status for status, _ in pool.map(lambda _: site.ask(max_tokens=20), range(6))]
    assert sorted({*statuses}) == [200, 429]
    monkeypatch.setattr(site.server, "ask", None)  # and no work is done for any of them
    assert site.ask(prompt=["a", "b"])[0] == 400  # which would never fit, so nobody should try again


def test_shutting_down_finishes_what_runs_and_refuses_what_is_new(example, site):
    other = Site(example, site.base, site.root)
    try:
        with other.response(
            {"model": "french", "prompt": "x", "max_tokens": 100, "stream": True, "seed": 0}
        ) as response:
            first = response.readline()
            closing = threading.Thread(target=other.close)
            closing.start()
            while not other.engine.closing:
                time.sleep(0.001)
            with pytest.raises(OSError, match="refused"):
                other.ask(prompt="y")
            events = (first + response.read()).decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
    finally:
        closing.join()


@pytest.mark.slow  # a new process
def test_sigterm_ends_the_program_with_0(site):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", site.base, "--adapters", site.root, "--port", str(port)]
    process = subprocess.Popen([sys.executable, EXAMPLES / "serve_many.py", *words])
    url = f"http://127.0.0.1:{port}/v1/completions"
    while process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url.replace("v1/completions", "health"), timeout=5):
            break
        time.sleep(0.05)
    body = {"model": "french", "prompt": "x", "max_tokens": 200, "stream": True, "seed": 0}
    with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=30) as response:
        response.readline()
        process.terminate()
        assert response.read().decode().endswith("data: [DONE]\n\n")
    assert process.wait(60) == 0

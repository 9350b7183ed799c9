"""A server of many adapters: each answer is its adapter's alone, whoever else is in the batch, and limits hold."""

import os
import queue
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import foreign_code, gpt2, llama, t5
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

import minipeft
from minipeft import LoraConfig, RequestError, StateError
from minipeft.serving.adapters import Adapters
from minipeft.serving.batch import Batch
from minipeft.serving.choice import choose
from minipeft.serving.engine import Answer, Engine


def mistral():
    """Its layers see the last 8 tokens alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(**sizes, num_key_value_heads=2, vocab_size=100, max_position_embeddings=64, sliding_window=8)
    torch.manual_seed(0)
    return MistralForCausalLM(config).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "mistral": mistral}
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
        found = served.generate(ids, do_sample=False, pad_token_id=0, eos_token_id=-1, max_new_tokens=client.max_tokens)
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


@pytest.mark.parametrize("kind", MODELS)
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


def test_a_seed_gives_the_same_text_whoever_else_is_in_the_batch(tmp_path, running):
    engine = running(llama, saved(llama, tmp_path))
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
    with pytest.raises(RequestError, match="takes 0.0 MiB, and adapters may take 0.0 MiB together"):
        Adapters(llama(), root, size - 1).acquire("a", ())


def test_an_adapter_is_read_again_after_its_files_were_replaced(tmp_path, running):
    root = saved(llama, tmp_path, {"a": METHODS["a"], "d": METHODS["d"]})
    engine = running(llama, root)
    engine.submit([before := Client("a", [9, 10])])
    shutil.rmtree(root / "a")
    os.rename(root / "d", root / "a")
    before.result()
    engine.submit([after := Client("a", [9, 10])])
    assert after.result()[0] == alone(llama(), root, after)


def broken(root, kind):
    """An adapter that cannot be used, and what is said of it."""
    saved(llama, root, {"bad": METHODS["a"]})
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
def test_a_broken_adapter_fails_alone_while_others_go_on(kind, tmp_path, running):
    said = broken(saved(llama, tmp_path), kind)
    engine, other = running(llama, tmp_path), []

    def join(client, event):
        if len(client.tokens) == 2 and not other:
            other.append(Client("bad", [9, 10]))
            engine.submit([*other, Client("d", [9])])

    good = Client("a", [11, 12], 10, join)
    engine.submit([good])
    tokens, _ = good.result()
    assert tokens == alone(llama(), tmp_path, good)
    nothing, error = other[0].result()
    assert nothing == []
    assert isinstance(error, RequestError)
    assert error.status == 400
    assert said in str(error)
    assert str(tmp_path) not in str(error)
    assert "bad" not in engine.adapters.resident


def test_a_failing_model_ends_the_answers_and_not_the_thread(tmp_path, running, monkeypatch, caplog):
    engine = running(llama, saved(llama, tmp_path))
    monkeypatch.setattr(engine.batch, "step", lambda: 1 / 0)
    engine.submit([first := Client("a", [9])])
    assert first.result()[1].status == 500
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    engine.submit([second := Client("a", [9])])
    assert second.result()[0] == alone(llama(), tmp_path, second)


@pytest.mark.parametrize("kind", ["mamba", "t5"])
def test_models_that_keep_anything_else_than_keys_and_values_are_refused(kind, tmp_path):
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=100, state_size=4)
    with foreign_code():
        model = t5() if kind == "t5" else MambaForCausalLM(config).eval()
        with pytest.raises(StateError, match=f"{type(model).__name__} cannot be served here"):
            Engine(Batch(model), Adapters(model, tmp_path, 1), [])


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
    engine.submit([first := Client(None, [9], 2, hold)])
    assert entered.wait(20)
    engine.submit([Client(None, [9], 1), Client(None, [9], 1)])
    with pytest.raises(RequestError, match="2 prompts wait, and 3 may") as caught:
        engine.submit([Client(None, [9], 1), Client(None, [9], 1)])
    assert caught.value.status == 429
    assert len(engine.waiting) == 2
    release.set()
    engine.stop()
    assert first.result()[1] == "length"
    assert not engine.waiting
    with pytest.raises(RequestError, match="shutting down"):
        engine.submit([Client(None, [9])])

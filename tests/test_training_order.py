"""The order of a training run: updates, what each process does of them, streams, and exact resumption."""

import copy
import functools
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rotation import often
from test_training_data import CHAT, CODE, PLAIN, chatty, letters, write
from tiny_models import gpt2

from minipeft.errors import MinipeftError, StateError
from minipeft.training.data import readers
from minipeft.training.data.collate import Example, eval_batches
from minipeft.training.data.encoding import IGNORED, Encoding, Fate
from minipeft.training.data.examples import Examples, encode
from minipeft.training.data.order import UpdateOrder
from minipeft.training.data.sources import Source, open_source
from minipeft.training.data.stream import StreamOrder

pytestmark = pytest.mark.usefixtures("own_cache")


@functools.cache
def store(count, seed=0, longest=20):
    """Examples whose first token is their number; some labels are masked. They are shared: nothing writes into them."""
    generator, examples = np.random.default_rng(seed), []
    for number in range(count):
        ids = generator.integers(1, 100, generator.integers(2, longest)).astype(np.int32)
        labels = np.where(generator.random(len(ids)) < 0.3, IGNORED, ids).astype(np.int32)
        ids[0], labels[0] = number, number
        examples.append(Example(ids, labels))
    return Examples.in_memory(examples, pad_id=0, max_length=longest)


def is_filler(batch):
    return bool((batch["labels"] == IGNORED).all()) and batch["input_ids"].shape == (1, 2)


def seen(batches):
    """Numbers of the examples in some batches."""
    return [ids[0] for batch in batches if not is_filler(batch) for ids in batch["input_ids"].tolist()]


def epoch_of(order, number):
    return [
        order[u].indices.tolist()
        for u in range(number * order.updates_per_epoch, (number + 1) * order.updates_per_epoch)
    ]


@given(
    count=st.integers(1, 60), size=st.integers(1, 20), world=st.integers(1, 9), micro=st.integers(1, 9),
    bucket=st.integers(0, 4), seed=st.integers(0, 2**40), u=st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_the_processes_share_an_update_exactly(count, size, world, micro, bucket, seed, u):
    order = UpdateOrder(store(count), size, seed, bucket)
    update = order[u]
    assert len(update.indices) == (size if (u + 1) % order.updates_per_epoch else (count - 1) % size + 1)
    shares = [update.batches(rank, world, micro) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert Counter(seen(batches)) == Counter(update.indices.tolist())
    assert all(len(batch["input_ids"]) <= micro for batch in batches)
    assert sum((batch["labels"][:, 1:] != IGNORED).sum().item() for batch in batches) == update.tokens
    assert len(shares[0]) == -(-len(update.indices) // (world * micro))


@given(count=st.integers(1, 80), size=st.integers(1, 20), bucket=st.integers(0, 5), epoch=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_an_epoch_takes_each_example_once(count, size, bucket, epoch):
    order = UpdateOrder(store(count), size, 3, bucket)
    updates = epoch_of(order, epoch)
    assert sorted(itertools.chain(*updates)) == list(range(count))
    assert [len(update) for update in updates[:-1]] == [size] * (len(updates) - 1)
    lengths = [order.store.lengths[update].tolist() for update in updates]
    assert not bucket or all(each == sorted(each) for each in lengths)


def test_the_order_depends_on_the_seed_and_the_number_alone():
    order, fresh = UpdateOrder(store(50), 8, 3), UpdateOrder(store(50), 8, 3)
    backwards = [fresh[u].indices.tolist() for u in reversed(range(30))]
    assert [order[u].indices.tolist() for u in range(30)] == backwards[::-1]
    assert [update.indices.tolist() for update in itertools.islice(order.iterate(7), 5)] == backwards[::-1][7:12]
    assert (order[7].number, order[7].epoch, order[6].epoch) == (7, 1, 0)
    assert epoch_of(order, 0) != epoch_of(order, 1)
    assert epoch_of(order, 0) != epoch_of(UpdateOrder(store(50), 8, 4), 0)


def test_the_order_is_that_of_the_raw_words():
    words = np.random.PCG64(np.random.SeedSequence([5, 1])).random_raw(30).tolist()
    order = UpdateOrder(store(30), 7, 5, bucket=0)
    assert list(itertools.chain(*epoch_of(order, 1))) == sorted(range(30), key=words.__getitem__)


def test_one_process_and_two_and_accumulation_process_the_same_examples():
    order = UpdateOrder(store(40), 8, 0)
    for u in range(6):
        alone, accumulated = order[u].batches(0, 1, 8), order[u].batches(0, 1, 4)
        two = [batch for rank in (0, 1) for batch in order[u].batches(rank, 2, 4)]
        assert [len(part) for part in (alone, accumulated, two)] == [1, 2, 2]
        assert sorted(seen(alone)) == sorted(seen(accumulated)) == sorted(seen(two))


def test_the_loss_of_an_update_is_the_same_on_any_number_of_processes():
    model, order = gpt2().double(), UpdateOrder(store(13), 8, 0)

    def loss(batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")

    for u in (0, 1):
        losses = []
        for world, micro in ((1, 8), (2, 3), (3, 1), (7, 4)):
            batches = [batch for rank in range(world) for batch in order[u].batches(rank, world, micro)]
            losses.append(torch.stack([loss(batch) for batch in batches]).sum().item() / order[u].tokens)
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-9)


def test_buckets_save_padding_and_leave_the_updates_in_random_order():
    examples = store(1000, longest=60)

    def padded(bucket):
        order = UpdateOrder(examples, 8, 0, bucket)
        return sum(order[u].batches(0, 1, 8)[0]["input_ids"].numel() for u in range(order.updates_per_epoch))

    real = int(examples.lengths.sum())
    assert padded(16) < 1.1 * real < 1.4 * real < padded(0)
    order = UpdateOrder(examples, 8, 0, 16)
    means = np.array([examples.lengths[order[u].indices].mean() for u in range(order.updates_per_epoch)])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3


def test_processes_work_on_examples_of_similar_length_at_the_same_time():
    order = UpdateOrder(store(64, longest=60), 64, 0)
    shares = [order[0].batches(rank, 4, 4) for rank in range(4)]
    for together in zip(*shares, strict=True):  # the 16 of one forward pass are neighbours in length
        lengths = [int(length) for batch in together for length in batch["attention_mask"].sum(1)]
        assert max(lengths) - min(lengths) < 30


def test_numbers_out_of_range_are_refused():
    for arguments in ((0, 0), (2.0, 0), (True, 0), (8, -1)):
        with pytest.raises(MinipeftError, match="must be an integer"):
            UpdateOrder(store(9), *arguments)
    with pytest.raises(MinipeftError, match="no examples"):
        UpdateOrder(store(0), 8, 0)
    order = UpdateOrder(store(9), 8, 0)
    with pytest.raises(MinipeftError, match="the number of an update"):
        order[-1]
    for rank, world, micro in ((2, 2, 1), (-1, 2, 1), (0, 1, 0)):
        with pytest.raises(MinipeftError, match="rank must be"):
            order[0].batches(rank, world, micro)


@given(count=st.integers(1, 40), world=st.integers(1, 7), micro=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_an_evaluation_sees_each_example_once(count, world, micro):
    shares = [list(eval_batches(store(count), micro, rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(seen(itertools.chain(*shares))) == list(range(count))


def text_file(folder):
    (folder / "a.txt").write_text(CODE * 9)
    return folder / "a.txt", {}


def documents(folder):
    return write(folder / "a.jsonl", [{"text": CODE[: 3 * n]} for n in range(15)]), {}


def prompts(folder):
    return write(folder / "a.jsonl", [{"prompt": "p" * n, "completion": "c"} for n in range(30)]), {}


def dropping(folder):
    return write(folder / "a.jsonl", [{"prompt": "p" * n, "completion": "c"} for n in range(60)]), {"overlong": "drop"}


def chats(folder):
    return write(folder / "a.jsonl", [{"messages": CHAT[1 : 3 + n % 2 * 2]} for n in range(20)]), {"max_length": 96}


def unpacked(folder):
    return documents(folder)[0], {"packing": False}


def joined(folder):
    return documents(folder)[0], {"attend_across": True}


def packed(folder):
    return prompts(folder)[0], {"packing": True}


def saved(folder):
    Dataset.from_dict({"text": [CODE[:n] for n in range(50)]}).save_to_disk(folder / "saved", num_shards=3)
    return folder / "saved", {}


def parquet(folder):
    (folder / "data").mkdir()
    for part in range(3):
        rows = Dataset.from_dict({"text": [CODE[: part + n] for n in range(20)], "more": [1] * 20})
        rows.to_parquet(folder / "data" / f"{part}.parquet", batch_size=6)
    return folder / "data", {}


SOURCES = [text_file, documents, prompts, dropping, chats, unpacked, joined, packed, saved, parquet]


ALWAYS = (text_file, prompts, chats, packed, parquet)


@pytest.fixture(params=often(SOURCES, ALWAYS), ids=lambda make: make.__name__)
def streams(request, tmp_path, monkeypatch):
    """Makes the same stream as often as it is called; `streaming` False reads the rows of a file that is whole."""
    monkeypatch.setattr(readers, "RUN_CHARACTERS", 60)
    path, options = request.param(tmp_path)

    def make(seed=0, streaming=True, size=3, window=2):
        source = open_source(path, streaming=streaming)
        return StreamOrder(
            source,
            chatty(letters(), PLAIN),
            Encoding(**{"max_length": 32, **options}),
            size,
            seed,
            window=window,
            bucket=1,
        )

    make.encode = lambda: encode(open_source(path), chatty(letters(), PLAIN), Encoding(**{"max_length": 32, **options}))
    return make


def told(update):
    return update.number, update.epoch, [(a.tolist(), b.tolist(), c) for a, b, c in update.store.rows(update.indices)]


def epochs(stream, count):
    """The updates of the first epochs."""
    return list(itertools.takewhile(lambda update: update[1] < count, map(told, stream)))


def apart(rows):
    """The examples in rows, sorted; the first token of each is not predicted in any case."""
    found = []
    for ids, labels, documents in rows:
        ends = list(itertools.accumulate(documents or (len(ids),)))
        found += [(ids[a:b], labels[a + 1 : b]) for a, b in itertools.pairwise([0, *ends])]
    return sorted(found)


def test_an_epoch_of_a_stream_has_the_examples_of_the_whole(streams):
    examples = streams.encode()
    whole = apart((a.tolist(), b.tolist(), c) for a, b, c in examples.rows(range(len(examples))))
    stream = streams()
    updates = epochs(stream, 2)
    for epoch in (0, 1):
        assert apart(itertools.chain(*(rows for _, number, rows in updates if number == epoch))) == whole
    assert [number for number, _, _ in updates] == list(range(len(updates)))
    assert [rows for _, number, rows in updates if number == 0] != [rows for _, number, rows in updates if number == 1]
    full = [len(rows) == 3 for (_, epoch, rows), (_, after, _) in itertools.pairwise(updates) if epoch == after]
    assert all(full) or stream.encoder.in_rows  # of packed rows, a window may have a few left


def test_a_stream_is_resumed_exactly_after_any_update(streams):
    expected = epochs(streams(), 2)
    stream = streams()
    states = [json.loads(json.dumps(stream.state()))]
    for _ in expected:
        next(stream)
        states.append(json.loads(json.dumps(stream.state())))
    for place, state in enumerate(states):
        resumed = streams()
        next(resumed)  # what it has done before does not matter
        resumed.restore(state)
        assert resumed.state() == state
        following = [told(update) for update in itertools.islice(resumed, 2)]
        assert following[: len(expected) - place] == expected[place : place + 2]


def test_a_stream_without_a_state_of_its_own_is_counted_and_skipped(streams):
    expected = epochs(streams(), 1)
    whole = streams(streaming=False)
    for place in range(len(expected)):
        resumed = streams(streaming=False)
        resumed.restore(whole.state())
        assert told(next(resumed)) == told(next(whole)) == expected[place]


def test_a_state_keeps_to_a_few_numbers_and_is_a_copy(streams):
    stream = streams()
    next(stream)
    state = stream.state()
    before = copy.deepcopy(state)
    for _ in range(5):
        next(stream)
    assert state == before
    assert len(json.dumps(state)) < 2000


def test_a_state_of_another_order_is_refused(tmp_path):
    path, _ = documents(tmp_path)

    def stream(length=16, size=4, seed=0, window=8):
        return StreamOrder(open_source(path, streaming=True), letters(), Encoding(length), size, seed, window=window)

    state = stream().state()
    for options in ({"length": 8}, {"size": 5}, {"seed": 1}, {"window": 9}):
        with pytest.raises(StateError, match="another"):
            stream(**options).restore(state)


def test_a_state_of_more_data_is_refused_and_nothing_has_changed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": CODE}] * 20)
    stream = StreamOrder(open_source(path, streaming=True), letters(), Encoding(8), 4, 0, window=4)
    for _ in range(20):
        next(stream)
    state = stream.state()
    write(path, [{"text": CODE}] * 5)
    one, other = (StreamOrder(open_source(path, streaming=True), letters(), Encoding(8), 4, 0, window=4) for _ in "ab")
    next(one), next(other)
    with pytest.raises(StateError, match="fewer rows .* Nothing was changed"):
        one.restore(state)
    assert one.state() == other.state()
    assert told(next(one)) == told(next(other))


def test_a_stream_without_examples_ends_in_an_error_and_not_in_a_loop():
    rows = Dataset.from_dict({"text": ["", ""]}).to_iterable_dataset()
    stream = StreamOrder(Source("memory", rows, "text"), letters(), Encoding(8), 4, 0)
    with pytest.raises(MinipeftError, match="memory: no example"):
        next(stream)


def test_a_stream_counts_what_it_leaves_out(tmp_path):
    path, options = dropping(tmp_path)
    stream = StreamOrder(
        open_source(path, streaming=True), letters(), Encoding(**{"max_length": 32, **options}), 4, 0, window=100
    )
    next(stream)
    assert stream.counts == encode(open_source(path), letters(), Encoding(**{"max_length": 32, **options})).counts
    assert stream.counts[Fate.OVERLONG] == 29  # from 31 + 2 tokens on

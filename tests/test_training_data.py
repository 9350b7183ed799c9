"""Data of a training run: files and data sets to rows, rows to tokens and labels, tokens to examples and batches."""

import gzip
import json
import random
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import gpt2, llama
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minipeft.errors import MinipeftError
from minipeft.training.data import encoding as encoding_module
from minipeft.training.data import readers
from minipeft.training.data.collate import Example, collate
from minipeft.training.data.encoding import IGNORED, Encoding, Fate, check_fit, padding_id
from minipeft.training.data.examples import cut, encode
from minipeft.training.data.sources import Source, held_out_split, open_source, split_names

pytestmark = pytest.mark.usefixtures("own_cache")
TINY = Path(__file__).resolve().parents[1] / "examples" / "assets" / "tiny"
EOS, BOS = 1, 2
CODE = "def f(x):\n\n    if x:\n        return 1\n\n\n    return 2\n"
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!\n"
    "{% endgeneration %}{% else %}{{ m.content }}!\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
ONE = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello \N{GRINNING FACE}"},
    {"role": "user", "content": "Again"},
    {"role": "assistant", "content": "Bye "},
]


@pytest.fixture(scope="module")
def tiny():
    return AutoTokenizer.from_pretrained(TINY)


def letters(bos=False, **special):
    """A token a character: ids 3 and up; <unk> is 0, eos 1, bos 2; a Llama-like one puts bos before a text."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "</s>", "<s>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "</s>", **special})


def spelled(text):
    return [3 + (95 if character == "\n" else ord(character) - 32) for character in text]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def contents(examples):
    return [(row.input_ids.tolist(), row.labels.tolist()) for row in examples.rows(range(len(examples)))]


def joined(lists):
    return list(chain.from_iterable(lists))


def tokens(examples):
    return [ids for ids, _ in contents(examples)]


def encoded(path, tokenizer, max_length=16, **options):
    return encode(open_source(path), tokenizer, Encoding(max_length, **options))


@pytest.mark.parametrize("name", ["code.py", "code.txt.gz", "NOTES"])
def test_plain_text_comes_back_whole_with_its_line_structure(tmp_path, tiny, name, monkeypatch):
    monkeypatch.setattr(readers, "RUN_CHARACTERS", 40)
    text = CODE * 20
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(text)
    source = open_source(tmp_path / name)
    assert source.kind == "run"
    assert len(source.rows) > 5
    assert all(row["text"].endswith("\n") for row in source.rows)
    examples = encode(source, tiny, Encoding(16))
    assert tiny.decode(joined(tokens(examples))) == text
    assert set(examples.lengths[:-1].tolist()) == {16}
    assert 1 < examples.lengths[-1] <= 16


def test_a_file_of_any_line_ends_and_a_byte_order_mark_reads_as_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert encoded(tmp_path / "a.txt", letters()).rows([0])[0].input_ids.tolist() == spelled("one\n\ntwo\n")


def test_a_line_without_an_end_is_cut_and_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "RUN_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("x" * 95)
    source = open_source(tmp_path / "a.txt")
    assert max(len(row["text"]) for row in source.rows) < 30
    assert "".join(row["text"] for row in source.rows) == "x" * 95 + "\n"


def test_rows_that_are_lines_join_like_the_file_they_came_from(tmp_path):
    Dataset.from_dict({"text": CODE.splitlines()}).save_to_disk(tmp_path / "lines")
    source = open_source(tmp_path / "lines", lines=True)
    assert joined(tokens(encode(source, letters(), Encoding(8, attend_across=True)))) == spelled(CODE)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(2, 9), st.lists(st.integers(1, 5), min_size=1))
@settings(max_examples=100, deadline=None)
def test_cutting_a_token_stream_equals_cutting_lists(lengths, size, chunks):
    rows = [list(range(100 * n, 100 * n + length)) for n, length in enumerate(lengths)]
    flat = joined(rows)
    pieces, start = [], 0
    for chunk in [*chunks * 12, 100]:
        pieces.append(pyarrow.array(rows[start : start + chunk], pyarrow.list_(pyarrow.int32())))
        start += chunk
    stream = pyarrow.compute.list_flatten(pyarrow.chunked_array(pieces))
    assert len(stream) == len(flat)
    starts, ends = cut(np.array([0]), np.array([len(flat)]), size)
    blocks = [flat[at : at + size] for at in range(0, len(flat), size)]
    found = [stream.slice(a, b - a).to_pylist() for a, b in zip(starts, ends, strict=True)]
    assert found == [block for block in blocks if len(block) > 1]


def test_documents_that_may_attend_across_are_joined_with_eos_and_cut(tmp_path):
    texts = ["alpha", "", "beta gamma", "d"]
    path = write(tmp_path / "a.jsonl", [{"text": text, "id": n} for n, text in enumerate(texts)])
    flat = joined([*spelled(text), EOS] for text in texts if text)
    source = open_source(path)
    assert source.ignored == ("id",)
    examples = encode(source, letters(), Encoding(8, attend_across=True))
    assert contents(examples) == [(flat[n : n + 8], flat[n : n + 8]) for n in range(0, len(flat), 8)]
    assert examples.counts[Fate.EMPTY] == 1
    assert "1 rows left out as empty" in examples.describe()


def test_unpacked_documents_are_cut_one_by_one_behind_bos(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "abcdefgh"}, {"text": "xy"}])
    first, second = [BOS, *spelled("abcdefgh"), EOS], [BOS, *spelled("xy"), EOS]
    examples = encoded(path, letters(bos=True), 6, packing=False)
    assert tokens(examples) == [first[:6], first[6:], second]
    assert examples.targets.tolist() == [5, 3, 3]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "list.json", "a.parquet", "a.csv"])
def test_prompt_and_completion_are_told_apart_in_any_format(tmp_path, name):
    rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "null", "completion": "NA"}]
    if name == "list.json":
        (tmp_path / name).write_text(json.dumps(rows))
    elif name.endswith("gz"):
        (tmp_path / name).write_bytes(gzip.compress(write(tmp_path / "a", rows).read_bytes()))
    elif name == "a.parquet":
        Dataset.from_list(rows).to_parquet(tmp_path / name)
    elif name == "a.csv":
        Dataset.from_list(rows).to_csv(tmp_path / name)
    else:
        write(tmp_path / name, rows)
    examples = encoded(tmp_path / name, letters(bos=True))
    expected = []
    for row in rows:
        prompt, completion = [BOS, *spelled(row["prompt"])], [*spelled(row["completion"]), EOS]
        expected.append((prompt + completion, [IGNORED] * len(prompt) + completion))
    assert contents(examples) == expected
    assert examples.targets.tolist() == [2, 3]


def test_the_boundary_is_the_one_that_generation_meets(tmp_path, tiny):
    path = write(tmp_path / "a.jsonl", [{"prompt": "def ", "completion": "read(self)"}])
    ids, labels = contents(encoded(path, tiny))[0]
    prompt = tiny("def ")["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]
    assert tiny.decode(ids) == "def read(self)<|endoftext|>"


def test_a_completion_that_ends_with_eos_gets_no_second_one(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b</s>"}])
    assert tokens(encoded(path, letters())) == [[*spelled("ab"), EOS]]


def test_an_overlong_row_is_refused_truncated_or_dropped_as_asked(tmp_path):
    rows = [("ab", "cdefgh"), ("abcdefghi", "j"), ("a", "b")]
    path = write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in rows])
    with pytest.raises(MinipeftError, match=r"row 0 has 9 tokens and max_length is 6.*overlong"):
        encoded(path, letters(), 6)
    cut_off = encoded(path, letters(), 6, overlong="truncate")
    assert tokens(cut_off) == [spelled("abcdef"), [*spelled("ab"), EOS]]
    assert (cut_off.counts[Fate.TRUNCATED], cut_off.counts[Fate.OVERLONG]) == (
        1,
        1,
    )  # the prompt alone fills the second
    dropped = encoded(path, letters(), 6, overlong="drop")
    assert tokens(dropped) == [[*spelled("ab"), EOS]]
    assert (dropped.targets.tolist(), cut_off.targets.tolist()) == ([2], [4, 2])
    assert "2 rows dropped for their length" in dropped.describe()


def test_an_empty_completion_is_refused_or_dropped_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}])
    with pytest.raises(MinipeftError, match="row 1 has no token to predict"):
        encoded(path, letters())
    assert encoded(path, letters(), empty="drop").counts == {0: 1, 1: 0, 2: 0, 3: 1}


def chatty(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def predicted_text(tokenizer, examples):
    return [tokenizer.decode([label for label in labels if label != IGNORED]) for _, labels in contents(examples)]


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "compared"])
def test_only_what_the_assistant_wrote_is_predicted(tmp_path, template):
    tokenizer = chatty(AutoTokenizer.from_pretrained(TINY), template)
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[1:3]}])
    examples = encoded(path, tokenizer, 128)
    whole = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in (CHAT, CHAT[1:3])]
    assert [tokenizer.decode(ids) for ids in tokens(examples)] == whole
    assert predicted_text(tokenizer, examples) == ["Hello \N{GRINNING FACE}!\nBye !\n", "Hello \N{GRINNING FACE}!\n"]


def test_marked_parts_agree_with_the_mask_of_transformers(tmp_path):
    tokenizer = chatty(letters(), MARKED)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}] * 3
    ids, labels = contents(encoded(write(tmp_path / "a.jsonl", [{"messages": chat}]), tokenizer, 128))[0]
    theirs = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    assert ids == theirs["input_ids"]
    assert [int(label != IGNORED) for label in labels] == theirs["assistant_masks"]


def test_white_space_that_a_tokenizer_trims_off_its_offsets_stays_on_its_side(tmp_path):
    """The mask of transformers takes in the secret here, since no token has the offset of the blank after 1."""
    tokenizer = chatty(
        AutoTokenizer.from_pretrained(TINY), MARKED.replace("!\n", "").replace("<|", "#").replace("|>", "# ")
    )
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    said = [("user", "q"), ("assistant", "1 "), ("user", "secret"), ("assistant", "2\n ")]
    chat = [{"role": role, "content": content} for role, content in said]
    examples = encoded(write(tmp_path / "a.jsonl", [{"messages": chat}]), tokenizer, 128)
    assert tokenizer.decode(tokens(examples)[0]) == "#user# q#assistant# 1 #user# secret#assistant# 2\n "
    # The first blank is in one token with 1, the one after it in one token with #.
    assert predicted_text(tokenizer, examples) == [" 1 # 2\n "]


def test_a_column_of_structs_renders_as_the_json_it_came_from(tmp_path):
    tool = {"role": "tool", "content": "42", "name": "calculator"}
    rows = [{"messages": CHAT}, {"messages": [CHAT[1], tool, CHAT[2]]}]
    template = PLAIN.replace("{{ m.content }}", "{{ m.content }}{% if 'name' in m %}[{{ m.name }}]{% endif %}")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    tokenizer = chatty(letters(), template)
    from_json = encoded(write(tmp_path / "a.jsonl", rows), tokenizer, 128)
    from_disk = encoded(tmp_path / "saved", tokenizer, 128)
    assert contents(from_json) == contents(from_disk)
    assert from_json.fingerprint == from_disk.fingerprint
    assert "[calculator]" in tokenizer.decode(tokens(from_disk)[1], clean_up_tokenization_spaces=False).replace(" ", "")


def test_an_answer_that_the_template_leaves_out_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    template = PLAIN.replace(
        "{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and not loop.last %}{% elif True %}"
    )
    with pytest.raises(MinipeftError, match=r"row 0: what the assistant wrote in message 2 cannot be told"):
        encoded(path, chatty(letters(), template), 128)


def test_chats_that_cannot_be_rendered_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(MinipeftError, match="no chat template"):
        encoded(path, letters(), 128)
    with pytest.raises(MinipeftError, match=r"row 0: the chat template rejects these messages \(no systems"):
        encoded(path, chatty(letters(), "{{ raise_exception('no systems') }}"), 128)
    for name, messages, template in (("b", CHAT[:2], PLAIN), ("c", [{"role": "assistant", "content": "x"}], ONE)):
        path = write(tmp_path / f"{name}.jsonl", [{"messages": messages}])
        with pytest.raises(MinipeftError, match="row 0 has no token to predict"):
            encoded(path, chatty(letters(), template), 128)


def test_saved_data_sets_and_folders_give_their_splits(tmp_path):
    parts = {"train": Dataset.from_dict({"text": ["a", "b"]}), "test": Dataset.from_dict({"text": ["c"]})}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for name, text in (("train-0.jsonl", "a"), ("train-1.jsonl", "b"), ("test.jsonl", "c")):
        (tmp_path / "folder").mkdir(exist_ok=True)
        write(tmp_path / "folder" / name, [{"text": text}])
    (tmp_path / "folder" / "README.md").write_text("about")
    for folder in ("saved", "folder"):
        path = tmp_path / folder
        assert sorted(split_names(path)) == ["test", "train"]
        assert held_out_split(path) == "test"
        assert tokens(encoded(path, letters())) == [[*spelled("a"), EOS], [*spelled("b"), EOS]]
        for streaming in (False, True):
            assert [row["text"] for row in open_source(path, split="test", streaming=streaming).rows] == ["c"]
        with pytest.raises(MinipeftError, match=r"no split 'tests' \(closest: 'test'\); it has"):
            open_source(path, split="tests")


def test_a_folder_of_texts_is_read_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    assert joined(tokens(encoded(tmp_path, letters()))) == spelled("a.txt\nb.txt\n")


BAD_ROWS = {
    "columns": ('{"question": "a", "id": 1}', r"the columns 'question', 'id' make no example; allowed are 'text'"),
    "mixed": ('{"text": "a", "prompt": "b", "completion": "c"}', r"'text', 'prompt', 'completion' make more than one"),
    "missing": ('{"text": "a"}\n\n{"txt": "b"}', r"bad.jsonl, line 3 has no 'text', as the first row has, but 'txt'"),
    "changing": ('{"text": "a"}\n{"text": "a", "messages": []}', r"line 2: the columns .* make more than one"),
    "number": ('{"text": "a"}\n{"text": 5}', r"line 2: 'text' is 5 \(int\); it must be a string"),
    "null": ('{"prompt": "a", "completion": null}', r"line 1: 'completion' is null; it must be a string"),
    "list": ('{"text": "a"}\n["b"]', r"line 2 is a list; it must be an object"),
    "role": ('{"messages": [{"content": "a"}]}', r"line 1: message 0 is .*; it must be an object with a 'role'"),
    "no messages": ('{"messages": []}', r"line 1: 'messages' is \[\] \(list\); it must be a list of at least one"),
    "not JSON": ('{"text": "a"}\n{"text": ', r"line 2 is not JSON \("),
    "blank": ("\n\n", r"holds no row"),
    "empty": ("", r"is empty"),
}


@pytest.mark.parametrize(("text", "message"), BAD_ROWS.values(), ids=list(BAD_ROWS))
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_is_named(tmp_path, text, message, streaming):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(MinipeftError, match=message):
        list(open_source(tmp_path / "bad.jsonl", streaming=streaming).rows)


def test_files_that_cannot_be_read_say_so(tmp_path, tiny):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "broken.txt.gz").write_bytes(gzip.compress(b"a" * 1000)[:-9])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed" / "a.jsonl", [{"text": "a"}])
    (tmp_path / "mixed" / "b.txt").write_text("b")
    (tmp_path / "none").mkdir()
    (tmp_path / "one.txt").write_text("x")
    for name, message in {
        "latin.txt": "is not text in UTF-8",
        "broken.txt.gz": "cannot be read",
        "mixed": "more than one kind",
        "none": "no file to read",
        "absent": "cannot be read .* no such file or folder",
        "broken.parquet": r"cannot be read .* check what it holds\.",
    }.items():
        with pytest.raises(MinipeftError, match=message):
            open_source(tmp_path / name)
    with pytest.raises(MinipeftError, match="no configurations"):
        open_source(tmp_path / "one.txt", "main")
    with pytest.raises(MinipeftError, match="no split 'test'; it has 'train'"):
        open_source(tmp_path / "one.txt", split="test")
    with pytest.raises(MinipeftError, match="no example of at least 2 tokens"):
        encode(Source("memory", Dataset.from_dict({"text": ["", ""]}), "text"), tiny, Encoding(8))


def test_a_row_of_a_data_set_is_named_by_its_number(tmp_path):
    Dataset.from_dict({"text": ["a", None]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(MinipeftError, match=r"saved, row 1: 'text' is null"):
        encoded(tmp_path / "saved", letters())


def test_wrong_settings_are_refused(tmp_path):
    for options in (
        {"max_length": 1},
        {"max_length": True},
        {"max_length": 8, "overlong": "cut"},
        {"max_length": 8, "empty": "x"},
    ):
        with pytest.raises(MinipeftError, match="must be"):
            Encoding(**options)
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(MinipeftError, match="attend_across=True is for text"):
        encoded(path, letters(), attend_across=True)
    with pytest.raises(MinipeftError, match="leave one of them out"):
        Encoding(8, packing=False, attend_across=True)
    with pytest.raises(MinipeftError, match="no eos token"):
        encoded(path, letters(eos_token=None))
    with pytest.raises(MinipeftError, match="lines=True is for"):
        open_source(path, lines=True)
    with pytest.raises(MinipeftError, match="streaming"):
        encode(open_source(path, streaming=True), letters(), Encoding(8))


def test_examples_that_a_model_cannot_take_are_refused():
    config = gpt2().config
    check_fit(config.n_positions, config.vocab_size - 1, config)
    with pytest.raises(MinipeftError, match="max_length 65: the model has 64 positions"):
        check_fit(65, 0, config)
    with pytest.raises(MinipeftError, match="token id 100 is outside the model's vocabulary of 100"):
        check_fit(64, 100, config)


@pytest.mark.parametrize("special", [{}, {"pad_token": "</s>"}, {"pad_token": "<s>"}], ids=["none", "eos", "other"])
def test_a_real_eos_is_predicted_and_padding_is_not(tmp_path, special):
    path = write(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "cd"}, {"prompt": "a", "completion": "b"}])
    tokenizer = letters(**special)
    examples = encoded(path, tokenizer)
    batch = collate(examples.rows([0, 1]), examples.pad_id)
    assert examples.pad_id == padding_id(tokenizer) == (BOS if special.get("pad_token") == "<s>" else EOS)
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, *spelled("cd"), EOS],
        [IGNORED, *spelled("b"), EOS, IGNORED, IGNORED],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["input_ids"][1].tolist() == [*spelled("ab"), EOS, examples.pad_id, examples.pad_id]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_loss_of_a_padded_batch_is_that_of_its_examples(make):
    model, generator = make().double(), random.Random(0)
    examples = []
    for length in (3, 17, 9, 30):
        ids = np.array([generator.randrange(100) for _ in range(length)], np.int32)
        examples.append(Example(ids, np.where(np.arange(length) < length // 2, IGNORED, ids)))

    def loss_sum(rows, pad_id):
        batch = collate(rows, pad_id)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").item()

    single = sum(loss_sum([example], 0) for example in examples)
    for pad_id in (0, 7):
        assert loss_sum(examples, pad_id) == pytest.approx(single, rel=1e-9)


def test_a_second_run_takes_what_the_first_has_encoded(tmp_path, tiny, monkeypatch):
    (tmp_path / "a.txt").write_text(CODE * 30)
    first = encoded(tmp_path / "a.txt", tiny)
    other_length = encoded(tmp_path / "a.txt", tiny, 8)
    monkeypatch.setattr(encoding_module.Encoder, "encode", None)  # to encode again would fail
    used = AutoTokenizer.from_pretrained(TINY)
    used(["a", "b c d e"], truncation=True, max_length=2, padding=True)  # which it keeps in its state
    again = encoded(tmp_path / "a.txt", used)
    assert contents(again) == contents(first)
    assert again.fingerprint == first.fingerprint != other_length.fingerprint
    monkeypatch.undo()
    (tmp_path / "a.txt").write_text(CODE.replace("x", "y") * 30)
    assert encoded(tmp_path / "a.txt", tiny).fingerprint != first.fingerprint


def test_the_fingerprint_is_of_the_content_alone(tmp_path):
    rows = [{"prompt": f"{n}", "completion": "b" * (n % 5 + 1)} for n in range(500)]
    here, there = write(tmp_path / "a.jsonl", rows), tmp_path / "deep" / "b.parquet"
    there.parent.mkdir()
    Dataset.from_list(rows).to_parquet(there)
    first = encoded(here, letters())
    assert encoded(there, letters()).fingerprint == first.fingerprint
    assert encode(open_source(here), letters(), Encoding(16), processes=2).fingerprint == first.fingerprint
    rows[400] = {"prompt": rows[400]["prompt"] + "b", "completion": rows[400]["completion"][1:]} | {"completion": "c"}
    assert encoded(write(tmp_path / "c.jsonl", rows), letters()).fingerprint != first.fingerprint
    assert first.select(0, 100).fingerprint != first.fingerprint


def test_labels_alone_change_the_fingerprint(tmp_path):
    one = write(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "cd"}])
    two = write(tmp_path / "b.jsonl", [{"prompt": "abc", "completion": "d"}])
    first, second = encoded(one, letters()), encoded(two, letters())
    assert tokens(first) == tokens(second)
    assert first.fingerprint != second.fingerprint


def test_the_last_five_percent_are_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefg\n" * 41)
    examples = encoded(tmp_path / "a.txt", letters(), 8)
    train, held_out = examples.hold_out()
    assert (len(train), len(held_out)) == (38, 3)
    assert contents(train) + contents(held_out) == contents(examples)
    assert examples.largest_id == max(spelled("abcdefg\n"))
    with pytest.raises(MinipeftError, match="cannot be divided"):
        examples.select(0, 1).hold_out()

"""Chats in the forms that people have them, with the templates of well-known models: what is predicted."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from datasets import Dataset  # noqa: E402

from minipeft.errors import DataError  # noqa: E402
from minipeft.training.data.chat import ChatTemplate  # noqa: E402
from minipeft.training.data.encoding import IGNORED, Encoding  # noqa: E402
from minipeft.training.data.examples import encode  # noqa: E402
from minipeft.training.data.rows import check_row, kind_of  # noqa: E402
from minipeft.training.data.sources import open_source  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")
TINY = Path(__file__).resolve().parents[1] / "examples" / "assets" / "tiny"
TRL = importlib.util.find_spec("trl")
TEMPLATES = Path(TRL.origin).parent / "chat_templates" if TRL else Path("none")
needs_trl = pytest.mark.skipif(not TEMPLATES.is_dir(), reason="the templates come with TRL")
CHAT = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "Hello you"},
    {"role": "assistant", "content": "assistant"},
]
TOOL = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "x"}}}
CALLS = [
    {"role": "user", "content": "Sun?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "sun"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]


@functools.cache
def tokenizer_with(template):
    """The embedded tokenizer with a template, and its marks as tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    marks = {"<|im_start|>", "<|im_end|>", *re.findall(r"<\|?[a-z_]+\|?>", template)}
    tokenizer.add_tokens(sorted(marks), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def predicted(name, chat):
    """The stretches of a conversation that are predicted."""
    tokenizer = tokenizer_with((TEMPLATES / f"{name}.jinja").read_text("utf-8"))
    ids, own = ChatTemplate(tokenizer).encode(chat, "row 0")
    text = "".join(tokenizer.decode([token]) if inside else "\0" for token, inside in zip(ids, own, strict=True))
    return [part for part in text.split("\0") if part]


@needs_trl
@pytest.mark.parametrize("name", ["phi3", "phi3_5", "llama3", "qwen3_vl", "qwen3_instruct_2507", "cohere", "gemma"])
def test_what_is_predicted_is_what_trls_marked_template_says(name):
    assert predicted(name, CHAT) == predicted(f"{name}_training", CHAT) != []


@needs_trl
def test_the_turns_of_phi_3_end_with_their_token():
    assert predicted("phi3", CHAT) == ["Hello you<|end|>\n", "assistant<|end|>\n<|endoftext|>"]


@needs_trl
def test_earlier_turns_of_qwen3_are_predicted_as_they_are_rendered():
    end = "<|im_end|>\n"
    assert predicted("qwen3", CHAT) == [f"Hello you{end}", f"<think>\n\n</think>\n\nassistant{end}"]
    thoughts = [{**message, "reasoning_content": "hm"} for message in CHAT]
    assert predicted("qwen3", thoughts) == [f"Hello you{end}", f"<think>\nhm\n</think>\n\nassistant{end}"]
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "x"}}\n</tool_call>' + end
    assert predicted("qwen3", CALLS) == [call, f"Yes{end}", f"<think>\n\n</think>\n\nBye{end}"]


@needs_trl
def test_what_the_prompt_opens_is_not_predicted():
    """Qwen3.5's prompt begins the thoughts, which its earlier turns lack."""
    end = "<|im_end|>\n"
    assert predicted("qwen3_5_think", CHAT) == [f"Hello you{end}", f"\n</think>\n\nassistant{end}"]


@needs_trl
def test_the_channels_of_gpt_oss_are_predicted():
    first, last = "<|channel|>final<|message|>Hello you<|end|>", "<|channel|>final<|message|>assistant<|return|>"
    assert predicted("gptoss", CHAT) == [first, last]
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert predicted("gptoss", [*CHAT[:3], {**CHAT[3], "thinking": "hm"}]) == [first, thought + last]


@needs_trl
def test_a_call_that_the_template_does_not_render_is_refused():
    with pytest.raises(DataError, match="row 0: what the assistant wrote in message 1 cannot be told"):
        predicted("phi3", CALLS)


TOOLS_AND_ROLES = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def texts_of(path):
    """Each example in full, and what of it is predicted."""
    tokenizer = tokenizer_with(TOOLS_AND_ROLES)
    examples = encode(open_source(path), tokenizer, Encoding(400))
    rows = examples.rows(range(len(examples)))
    return [(tokenizer.decode(r.input_ids), tokenizer.decode(r.labels[r.labels != IGNORED])) for r in rows]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize("saved", [False, True])
def test_tools_reach_the_template(tmp_path, tools, saved):
    rows = [{"messages": CHAT, "tools": tools}, {"messages": CHAT, "tools": None}]
    if saved:
        Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    else:
        write(tmp_path / "saved", *rows).rename(tmp_path / "saved.jsonl")
    source = open_source(tmp_path / ("saved" if saved else "saved.jsonl"))
    assert source.ignored == ()
    (first, _), (second, _) = texts_of(tmp_path / ("saved" if saved else "saved.jsonl"))
    assert json.loads(first.splitlines()[0]) == [TOOL]
    assert second.startswith("<|user|>")


def test_sharegpt_conversations_are_messages(tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    shared = {"conversations": turns, "system": "Be kind", "tools": json.dumps([TOOL])}
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}]
    messages += [{"role": "assistant", "content": "Yo"}]
    expected = texts_of(write(tmp_path / "a.jsonl", {"messages": messages, "tools": [TOOL]}))
    assert texts_of(write(tmp_path / "b.jsonl", shared)) == expected
    Dataset.from_list([shared]).save_to_disk(tmp_path / "saved")
    assert texts_of(tmp_path / "saved") == expected
    assert expected[0][1] == "Yo\n"
    with pytest.raises(DataError, match="message 0 is from 'narrator'; allowed are"):
        open_source(write(tmp_path / "c.jsonl", {"conversations": [{"from": "narrator", "value": "x"}]}))


def test_alpaca_rows_are_prompts_in_alpacas_words(tmp_path):
    rows = [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": None, "output": "Yo"}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (first, answer), (second, _) = texts_of(tmp_path / "saved")
    assert "further context. Write" in first
    assert first.endswith("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3<|endoftext|>")
    assert answer == "3<|endoftext|>"
    assert second.startswith("Below is an instruction that describes a task. Write a response")
    assert "### Input" not in second
    assert texts_of(write(tmp_path / "a.jsonl", *rows)) == texts_of(tmp_path / "saved")


def test_columns_that_made_examples_before_still_do():
    assert kind_of(["instruction", "input", "output", "text"], "it") == "text"
    assert kind_of(["conversations", "messages"], "it") == "chat"
    with pytest.raises(DataError, match="more than one kind"):
        kind_of(["conversations", "instruction", "output"], "it")


@pytest.mark.parametrize("tools", ["[", 7, [7], "{}"])
def test_tools_that_are_not_a_list_of_schemas_are_refused(tools):
    with pytest.raises(DataError, match="row 0: 'tools' is"):
        check_row("chat", {"messages": CHAT, "tools": tools}, "row 0")

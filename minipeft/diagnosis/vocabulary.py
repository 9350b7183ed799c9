"""The tokenizer and the model's tables: sizes, new tokens, and the chat template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minipeft.diagnosis.check import Seen, Setup, check
from minipeft.ecosystem.transformers_model import input_embedding
from minipeft.errors import shown
from minipeft.files.base_checkpoint import stored_rows

# How the chat formats in use mark a turn: ChatML, Llama 3, Llama 2 and Mistral, Gemma, Phi, Zephyr.
MARKS = ("<|im_start|>", "<|start_header_id|>", "[INST]", "<start_of_turn>", "<|user|>", "<|assistant|>")


@check(
    "tokenizer-too-large",
    "The ids of the last tokens are outside the table: an index error, or garbage on a GPU.",
    stops=True,
)
def too_large(setup: Setup) -> Iterator[Seen]:
    """The tokenizer has more tokens than the embedding has rows."""
    rows = _rows(setup)
    if setup.tokenizer is not None and rows is not None and len(setup.tokenizer) > rows:
        yield Seen(
            "tokenizer",
            f"it has {len(setup.tokenizer)} tokens, the embedding {rows} rows.",
            "model.resize_token_embeddings(len(tokenizer)), before the adapters are added",
        )


@check(
    "new-tokens-untrained",
    "Their embeddings are what resizing drew, and stay so: the model cannot tell the new tokens apart.",
)
def new_tokens(setup: Setup) -> Iterator[Seen]:
    """Tokens were added, and nothing trains their rows."""
    table, rows = input_embedding(setup.view.root), _rows(setup)
    if setup.tokenizer is None or table is None or rows is None:
        return
    inside = {id(module) for module in table.modules()}
    if any(id(part.module) in inside or id(part.base) in inside for part in setup.view.parts if part.trained):
        return
    weight: Any = next((p for p in table.parameters() if p.ndim == 2 and p.shape[0] == rows), None)
    name = next((name for name, p in setup.view.base.items() if p is weight), "")
    if weight is None or weight.requires_grad or not name:
        return
    before = stored_rows(setup.view.root, name.rpartition(".")[0], weight.shape[1])
    if before is not None and before < len(setup.tokenizer) <= rows:
        new = [token for token, index in setup.tokenizer.get_vocab().items() if index >= before]
        yield Seen(
            name,
            f"the base's checkpoint has {before} rows; the tokenizer added {shown(new, 3)}, and the embedding is frozen.",
            f"trainable_token_indices=[{before}, ...] in the configuration, or modules_to_save=['embed_tokens', 'lm_head']",
        )


@check("no-chat-template", "Another program will format chats in a way that the adapter has not seen.")
def no_chat_template(setup: Setup) -> Iterator[Seen]:
    """The batch has the marks of a chat, and the tokenizer has no template."""
    ids = setup.tensor("input_ids")
    if setup.tokenizer is None or ids is None or getattr(setup.tokenizer, "chat_template", None):
        return
    text = setup.tokenizer.decode(ids[0].tolist())
    marks = [mark for mark in MARKS if mark in text]
    if marks:
        yield Seen(
            "tokenizer",
            f"the batch has {shown(marks)}, and the tokenizer has no chat template.",
            "tokenizer.chat_template = ..., and tokenizer.save_pretrained next to the adapter",
        )


def _rows(setup: Setup) -> int | None:
    table = input_embedding(setup.view.root)
    rows = getattr(table, "num_embeddings", None)
    if not isinstance(rows, int):
        rows = getattr(getattr(table, "weight", None), "shape", (None,))[0]
    return rows

r"""Serve many adapters of one base over HTTP, with OpenAI's `/v1/completions`. Needs `pip install 'minipeft[serve,train]'`.

    python examples/serve_many.py --model openai-community/gpt2 --adapters saved
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"model": "french", "prompt": "Bonjour", "max_tokens": 20, "stream": true}'

`model` names a directory directly below --adapters, or the base. Requests for different adapters run in one batch, which
they join and leave between two tokens. See docs/serving.md.
"""

import argparse
import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web
from transformers import AutoModelForCausalLM

from minipeft.config.options import integer, number
from minipeft.errors import ConfigError, MinipeftError, RequestError
from minipeft.files.reading import reading
from minipeft.files.tokenizer import load_tokenizer
from minipeft.serving.adapters import Adapters, MiB
from minipeft.serving.batch import Batch
from minipeft.serving.completion import Completion, parse
from minipeft.serving.engine import Answer, Engine
from minipeft.serving.text import Text

PATIENCE = 1.0  # seconds that a client has to read why its stream ends


class Server:
    """What the handlers share."""

    def __init__(self, engine: Engine, tokenizer: Any, name: str, max_length: int, timeout: float, body: int) -> None:
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        tokenizer("")  # the first call may change its settings, which must not happen in two threads at once
        self.max_length, self.timeout, self.body = max_length, timeout, body
        self.vocabulary = min(len(tokenizer), engine.batch.model.config.get_text_config().vocab_size)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        if (request.content_length or 0) > self.body:  # aiohttp would read that much first
            raise web.HTTPRequestEntityTooLarge(self.body, request.content_length)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        answers: list[Answer] = []
        try:
            return await asyncio.wait_for(self.answer(request, response, answers), self.timeout)
        except (asyncio.TimeoutError, RequestError) as error:
            if not response.prepared:
                raise
            leave(answers)
            await last_words(request, response, failure(error))
            return response
        finally:  # also if the client has gone, which cancels this
            leave(answers)

    async def answer(
        self, request: web.Request, response: web.StreamResponse, answers: list[Answer]
    ) -> web.StreamResponse:
        try:
            wanted = parse(await request.read())
        except web.RequestPayloadError as error:  # its encoding or its chunks are broken
            raise RequestError("the body cannot be read as its headers say.") from error
        self.engine.check_number(len(wanted.prompt))  # before work for each of them, which would hold up all others
        events: asyncio.Queue[Any] = asyncio.Queue()
        answers += [await self.ask(wanted, prompt, index, events) for index, prompt in enumerate(wanted.prompt)]
        self.engine.submit(answers)
        texts = [Text(self.tokenizer, wanted.stop) for _ in answers]
        pieces = self.pieces(wanted, answers, texts, events)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head["model"] = wanted.model
        if not wanted.stream:
            whole, reasons = [""] * len(answers), [None] * len(answers)
            async for index, piece, reason in pieces:
                whole[index] += piece
                reasons[index] = reason
            choices = [choice(i, text, reason) for i, (text, reason) in enumerate(zip(whole, reasons, strict=True))]
            return web.json_response(head | {"choices": choices, "usage": usage(answers, texts)})
        async for index, piece, reason in pieces:
            if not response.prepared:  # an adapter that cannot be used answers 4xx
                await response.prepare(request)
            await send(response, head | {"choices": [choice(index, piece, reason)]})
        if wanted.include_usage:
            await send(response, head | {"choices": [], "usage": usage(answers, texts)})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def ask(self, wanted: Completion, prompt: str | Sequence[int], index: int, events: asyncio.Queue) -> Answer:
        if wanted.model != self.name:
            self.engine.adapters.directory(wanted.model)
        # In a thread: a prompt of a megabyte takes seconds, in which no other client would get a token.
        ids = (await asyncio.to_thread(self.tokenizer, prompt))["input_ids"] if isinstance(prompt, str) else prompt
        if not ids or not all(0 <= token < self.vocabulary for token in ids):
            raise RequestError("prompt is empty, or has a token that the model does not know.")
        if len(ids) + wanted.max_tokens > self.max_length:
            raise RequestError(
                f"prompt and max_tokens are {len(ids)} + {wanted.max_tokens} tokens; {self.max_length} are allowed."
            )
        loop = asyncio.get_running_loop()
        return Answer(
            model=None if wanted.model == self.name else wanted.model,
            prompt=ids,
            max_tokens=wanted.max_tokens,
            deliver=lambda event: loop.call_soon_threadsafe(events.put_nowait, (index, event)),
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            seed=wanted.seed,
        )

    async def pieces(
        self, wanted: Completion, answers: Sequence[Answer], texts: Sequence[Text], events: asyncio.Queue
    ) -> AsyncIterator[tuple[int, str, str | None]]:
        """(which answer, text, why it ends or None) as they come."""
        echoes = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in wanted.prompt if wanted.echo]
        for index, prompt in enumerate(echoes):
            yield index, prompt, None
        left = len(answers)
        while left:
            index, event = await events.get()
            text = texts[index]
            if isinstance(event, RequestError):
                raise event
            if text.stopped:  # a token that was on its way
                continue
            piece = text.rest() if isinstance(event, str) else text.add(event)
            reason = "stop" if text.stopped else event if isinstance(event, str) else None
            if reason:
                left, answers[index].over = left - 1, True
            if piece or reason:
                yield index, piece, reason

    async def models(self, request: web.Request) -> web.Response:
        names = [self.name, *self.engine.adapters.names()]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "minipeft"} for name in names]
        return web.json_response({"object": "list", "data": data})

    async def health(self, request: web.Request) -> web.Response:
        engine = self.engine
        ok = engine.is_alive() and not engine.closing
        counts = {"rows": len(engine.batch.rows), "waiting": len(engine.waiting)}
        return web.json_response({"status": "ok" if ok else "stopping", **counts}, status=200 if ok else 503)

    async def shut_down(self, app: web.Application) -> None:
        self.engine.closing = True

    async def clean_up(self, app: web.Application) -> None:
        await asyncio.to_thread(self.engine.stop)


def choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def usage(answers: Sequence[Answer], texts: Sequence[Text]) -> dict[str, int]:
    read, written = sum(len(a.prompt) for a in answers), sum(len(text.tokens) for text in texts)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def leave(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.over = True


async def last_words(request: web.Request, response: web.StreamResponse, event: dict[str, Any]) -> None:
    """Send an event, and hang up on a client that does not read."""
    try:
        await asyncio.wait_for(send(response, event), PATIENCE)
    except asyncio.TimeoutError:
        if request.transport is not None:
            request.transport.abort()


async def send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())


def failure(error: Exception) -> dict[str, Any]:
    """An error as OpenAI's server tells it."""
    timed_out = isinstance(error, asyncio.TimeoutError)
    message = "The answer took too long; ask for fewer tokens, or later." if timed_out else str(error)
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


@web.middleware
async def errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return web.json_response(failure(error), status=error.status)
    except asyncio.TimeoutError as error:
        return web.json_response(failure(error), status=504)
    except web.HTTPException as error:
        return web.json_response(failure(Exception(error.text)), status=error.status)


def make_app(server: Server) -> web.Application:
    app = web.Application(middlewares=[errors], client_max_size=server.body)
    app.add_routes([web.get("/health", server.health), web.get("/v1/models", server.models)])
    app.add_routes([web.post("/v1/completions", server.completions)])
    app.on_shutdown.append(server.shut_down)
    app.on_cleanup.append(server.clean_up)
    return app


def flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base: a directory, or a name on the Hub")
    parser.add_argument("--adapters", type=Path, required=True, help="the directory whose directories are adapters")
    parser.add_argument("--name", help="the base's name for clients; without it, the last part of --model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--adapter_memory", type=float, default=512, help="MiB for all loaded adapters together")
    parser.add_argument("--rows", type=int, default=16, help="prompts that are answered at once")
    parser.add_argument("--queue", type=int, default=64, help="prompts that may wait")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one request")
    parser.add_argument("--max_length", type=int, default=4096, help="tokens of a prompt and its answer, at most")
    parser.add_argument("--body", type=int, default=2**20, help="bytes of a request, at most")
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> Server:
    number("--timeout", args.timeout, above=0)
    number("--adapter_memory", args.adapter_memory, above=0)
    integer("--max_length", args.max_length, at_least=2)  # one of a prompt and one of its answer
    integer("--body", args.body, at_least=1)  # 0 would be no limit at all for aiohttp
    with reading(args.model):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    tokenizer = load_tokenizer(args.model)
    adapters = Adapters(model, args.adapters, int(args.adapter_memory * MiB))
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    engine = Engine(Batch(model), adapters, ends, max_rows=args.rows, max_waiting=args.queue)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or args.max_length
    name = args.name or os.path.basename(os.path.abspath(args.model))
    if name in adapters.names():
        raise ConfigError(f"{name!r} names the base and an adapter; give the base another name with --name.")
    return Server(engine, tokenizer, name, min(args.max_length, positions), args.timeout, args.body)


def main(argv: Sequence[str] | None = None) -> None:
    args = flags(argv)
    try:
        server = build(args)
    except (MinipeftError, OSError) as error:
        raise SystemExit(f"serve_many: {error}") from None
    server.engine.start()
    app = make_app(server)
    try:
        web.run_app(app, host=args.host, port=args.port, shutdown_timeout=args.timeout, handler_cancellation=True)
    except (OSError, OverflowError, UnicodeError) as error:  # of the host or the port
        raise SystemExit(f"serve_many: {error}") from None


if __name__ == "__main__":
    main()

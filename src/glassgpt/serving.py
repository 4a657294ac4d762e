# Written by tools/tangle.py from book/18_real_models.ipynb: change it there.


"""A server for OpenAI's clients, on this machine alone."""

import codecs
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from glassgpt.chat import render
from glassgpt.generation import stream
from glassgpt.gpt import GPT
from glassgpt.tokens import Tokenizer

try:
    import uvicorn
    from anyio import CapacityLimiter, to_thread
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ModuleNotFoundError as error:
    advice = "pip install 'glassgpt[serve]'"
    raise ModuleNotFoundError(f"{error.name} is missing: {advice}") from None


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text could begin one of the stop texts.

    Book: 18_real_models.html#a-server
    """
    for start in range(len(text)):
        for stop in stops:
            if stop.startswith(text[start:]):
                return len(text) - start
    return 0


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the stop text that is complete first.

    Of two that end at once the longer counts. What could be the beginning of a stop
    text is held back until that is decided.

    Book: 18_real_models.html#a-server
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(held.index(s) + len(s), held.index(s)) for s in stops if s in held]
        if found:
            yield held[: min(found)[1]]
            return
        ready = len(held) - held_back(held, stops)
        yield held[:ready]
        held = held[ready:]
    yield held


USUAL = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "suffix": "",
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0,
}


class Wanted:
    """What a request asks for: a prompt, and how to go on from it.

    body: as OpenAI describes it. chat: whether it holds messages or a prompt. Raises
    ValueError, TypeError or KeyError for what makes no sense.

    Book: 18_real_models.html#a-server
    """

    def __init__(
        self, body: dict[str, Any], model: GPT, tokenizer: Tokenizer, chat: bool
    ):
        if not isinstance(body, dict):
            raise ValueError("a request is a JSON object")
        for key, usual in USUAL.items():
            if body.get(key) not in (None, usual):
                raise ValueError(f"{key} must be {usual} here: nothing else is done")
        self.in_pieces = bool(body.get("stream"))
        options = body.get("stream_options") or {}
        if not isinstance(options, dict):
            raise ValueError("stream_options must be an object")
        self.counted = bool(options.get("include_usage"))
        if chat:
            if not isinstance(messages := body["messages"], list):
                raise ValueError("messages must be a list")
            conversation = [_plain(message) for message in messages]
            self.ids, _ = render(conversation, tokenizer, reply=True)
        else:
            match body["prompt"]:
                case str(prompt) | [str(prompt)]:
                    self.ids = tokenizer.encode(prompt)
                case list(ids):
                    self.ids = ids
                case _:
                    raise ValueError("prompt must be a text, or a list of ids")
        room = model.config.context - len(self.ids)
        if room < 1:
            raise ValueError(f"the prompt has {len(self.ids)} tokens: too long")
        limits = [body.get(key) for key in ("max_completion_tokens", "max_tokens")]
        asked = next((n for n in limits if n is not None), 512)
        if not isinstance(asked, int) or asked < 0:
            raise ValueError(f"max_tokens: a number from 0 up, not {asked!r}")
        self.limit = min(asked, room)
        self.used, self.reason = 0, "stop"  # why the text ended
        stops = body.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
            raise ValueError("stop must be a text, or a list of texts")
        self.stops = [stop for stop in stops if stop]
        names = ("temperature", "top_k", "top_p", "seed")
        settings = {name: body[name] for name in names if body.get(name) is not None}
        if settings.get("temperature") == 0:
            settings = {"top_k": 1}
        ends = tokenizer.special_tokens.values()
        self.steps = stream(model, [self.ids], self.limit, ends, **settings)
        self.tokenizer = tokenizer

    def pieces(self) -> Iterator[str]:
        """The text, as it comes."""
        decoded = codecs.iterdecode(self._bytes(), "utf-8", errors="replace")
        return until(decoded, self.stops)

    def _bytes(self) -> Iterator[bytes]:
        for step in self.steps:
            self.used += 1
            yield self.tokenizer.decode_bytes(step)
        if self.used == self.limit:  # and `until` has not stopped before
            self.reason = "length"

    def usage(self) -> dict[str, int]:
        """How many tokens were read, and written so far."""
        counts = {"prompt_tokens": len(self.ids), "completion_tokens": self.used}
        return {**counts, "total_tokens": sum(counts.values())}


def _plain(message: dict[str, Any]) -> dict[str, str]:
    """A message whose content is a text; a client may send a list of parts."""
    try:
        role, content = message["role"], message["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
    except (KeyError, TypeError):  # a picture, or no message
        due = '{"role": ..., "content": TEXT}'
        raise ValueError(f"a message is {due}; of parts, only texts are read") from None
    # developer: OpenAI's newer word for system
    return {"role": "system" if role == "developer" else role, "content": content}


def _choice(words: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    """An answer, or a piece of one, as OpenAI's clients expect it."""
    return {"index": 0, **words, "logprobs": None, "finish_reason": reason}


LARGEST = 1 << 20  # bytes of a request


def make_app(model: GPT, tokenizer: Tokenizer, name: str) -> Starlette:
    """What the server does: /v1/models, /v1/completions and /v1/chat/completions.

    Clients are served in turns, a token each.

    Book: 18_real_models.html#a-server
    """
    turns = CapacityLimiter(1)

    def refuse_pages(request: Request) -> None:
        if "origin" in request.headers:
            raise HTTPException(403, "web pages may not ask")

    async def read(request: Request, chat: bool) -> Wanted:
        content = b""
        async for part in request.stream():
            content += part
            if len(content) > LARGEST:
                raise HTTPException(413, f"a request has at most {LARGEST:,} bytes")
        try:
            return Wanted(json.loads(content), model, tokenizer, chat)
        except KeyError as error:
            raise HTTPException(400, f"{error} is missing") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise HTTPException(400, str(error)) from None

    async def pieces(request: Request, wanted: Wanted) -> AsyncIterator[str]:
        steps: Iterator[str | None] = wanted.pieces()
        while not await request.is_disconnected():
            piece = await to_thread.run_sync(next, steps, None, limiter=turns)
            if piece is None:
                return
            yield piece

    async def answer(request: Request) -> Response:
        refuse_pages(request)
        chat = request.url.path.endswith("chat/completions")
        wanted = await read(request, chat)
        kind = "chat.completion" if chat else "text_completion"
        frame = {"id": f"{kind}-{uuid4().hex}", "object": kind, "model": name}
        frame |= {"created": int(time.time())}
        if wanted.in_pieces:
            frame["object"] += ".chunk" if chat else ""
            parts = _events(frame, pieces(request, wanted), wanted, chat)
            return StreamingResponse(parts, media_type="text/event-stream")
        text = "".join([piece async for piece in pieces(request, wanted)])
        message = {"message": {"role": "assistant", "content": text}}
        choice = _choice(message if chat else {"text": text}, wanted.reason)
        return JSONResponse({**frame, "choices": [choice], "usage": wanted.usage()})

    async def models(request: Request) -> Response:
        refuse_pages(request)
        one = {"id": name, "object": "model", "created": 0, "owned_by": "glassgpt"}
        every = {"object": "list", "data": [one]}
        asked = request.path_params.get("name")
        if asked not in (None, name):
            raise HTTPException(404, f"the model here is {name}")
        return JSONResponse(one if asked else every)

    async def refuse(request: Request, error: Any) -> Response:
        told = {"message": error.detail, "type": "invalid_request_error"}
        return JSONResponse({"error": told}, error.status_code)

    async def gone(request: Request, error: Any) -> Response:
        return Response(status_code=499)  # nobody is there to read it

    routes = [Route(f"/v1/models{end}", models) for end in ("", "/{name}")]
    for path in ("/v1/completions", "/v1/chat/completions"):
        routes.append(Route(path, answer, methods=["POST"]))
    here = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    refusals = {HTTPException: refuse, ClientDisconnect: gone}
    return Starlette(routes=routes, middleware=[here], exception_handlers=refusals)


async def _events(
    frame: dict[str, Any], pieces: AsyncIterator[str], wanted: Wanted, chat: bool
) -> AsyncIterator[str]:
    """The pieces of an answer as server-sent events, one a line, each in a frame."""

    def event(*choices: dict[str, Any], **more: Any) -> str:
        return f"data: {json.dumps({**frame, 'choices': choices, **more})}\n\n"

    if chat:
        yield event(_choice({"delta": {"role": "assistant", "content": ""}}))
    async for piece in pieces:
        if piece:
            words = {"delta": {"content": piece}} if chat else {"text": piece}
            yield event(_choice(words))
    yield event(_choice({"delta": {}} if chat else {"text": ""}, wanted.reason))
    if wanted.counted:
        yield event(usage=wanted.usage())
    yield "data: [DONE]\n\n"


@contextmanager
def running(app: Starlette, port: int = 0) -> Iterator[str]:
    """Serve in the background, for this machine only, and yield the address.

    port: 0 takes any that is free. Raises OSError where it is taken.

    Book: 18_real_models.html#a-server
    """
    with socket.create_server(("127.0.0.1", port)) as listening:
        options = {"log_level": "warning", "timeout_graceful_shutdown": 1}
        server = uvicorn.Server(uvicorn.Config(app, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()

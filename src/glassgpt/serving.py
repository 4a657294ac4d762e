# Written by tools/tangle.py from book/18_real_models.ipynb: change it there.


"""A server for OpenAI's clients, on this machine alone."""

import codecs
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    raise ModuleNotFoundError(
        f"{error.name} is missing: pip install 'glassgpt[serve]'"
    ) from None


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


DEFAULTS = {
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


def refuse_unusual(body: dict[str, Any]) -> None:
    """Raise ValueError where a request asks for what isn't done here.

    Book: 18_real_models.html#a-server
    """
    for key, default in DEFAULTS.items():
        if body.get(key) not in (None, default):
            raise ValueError(f"{key} must be {default} here: nothing else is done")


def read_prompt(body: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The ids of the prompt of a completion. Raises KeyError or ValueError.

    Book: 18_real_models.html#a-server
    """
    prompt = body["prompt"]
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if isinstance(prompt, list):
        return prompt
    raise ValueError("prompt must be a text, or a list of ids")


def read_messages(body: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The ids of a conversation up to the answer. Raises KeyError or ValueError.

    Book: 18_real_models.html#a-server
    """
    messages = body["messages"]
    if not isinstance(messages, list):
        raise ValueError("messages must be a list")
    conversation = [_plain_message(message) for message in messages]
    ids, _ = render(conversation, tokenizer, reply=True)
    return ids


def _plain_message(message: dict[str, Any]) -> dict[str, str]:
    """A message whose content is a text; a client may send a list of parts."""
    try:
        role, content = message["role"], message["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
    except (KeyError, TypeError):  # a picture, or no message
        raise ValueError(
            'a message is {"role": ..., "content": TEXT}; of parts, only texts are read'
        ) from None
    if role == "developer":
        role = "system"
    return {"role": role, "content": content}


@dataclass
class CompletionRequest:
    """What a client asks for: a prompt, and how to go on from it.

    ids: the prompt. limit: tokens of an answer, at most. stops: texts that end it.
    temperature, top_k, top_p, seed: as in `Sampling`. in_pieces: whether the answer is
    sent as it comes. with_usage: whether the number of tokens follows the pieces.

    Book: 18_real_models.html#a-server
    """

    ids: list[int]
    limit: int
    stops: list[str]
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    in_pieces: bool
    with_usage: bool

    @classmethod
    def parse(
        cls, body: Any, model: GPT, tokenizer: Tokenizer, chat: bool
    ) -> "CompletionRequest":
        """The request in a JSON object, as OpenAI describes it.

        chat: whether it holds messages or a prompt. Raises ValueError, TypeError or
        KeyError for what makes no sense.
        """
        if not isinstance(body, dict):
            raise ValueError("a request is a JSON object")
        refuse_unusual(body)
        read_ids = read_messages if chat else read_prompt
        ids = read_ids(body, tokenizer)
        room = model.config.context - len(ids)
        if room < 1:
            raise ValueError(f"the prompt has {len(ids)} tokens: too long")
        temperature = body.get("temperature")
        return cls(
            ids=ids,
            limit=min(_token_limit(body), room),
            stops=_stop_texts(body),
            temperature=1.0 if temperature is None else temperature,
            top_k=body.get("top_k"),
            top_p=body.get("top_p"),
            seed=body.get("seed"),
            in_pieces=bool(body.get("stream")),
            with_usage=_wants_usage(body),
        )


def _token_limit(body: dict[str, Any]) -> int:
    """How many tokens the client allows."""
    limit = body.get("max_completion_tokens")
    if limit is None:
        limit = body.get("max_tokens")  # its older name
    if limit is None:
        return 512
    if not isinstance(limit, int) or limit < 0:
        raise ValueError(f"max_tokens: a number from 0 up, not {limit!r}")
    return limit


def _stop_texts(body: dict[str, Any]) -> list[str]:
    """The texts that end an answer."""
    stops = body.get("stop") or []
    if isinstance(stops, str):
        stops = [stops]
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise ValueError("stop must be a text, or a list of texts")
    return [stop for stop in stops if stop]


def _wants_usage(body: dict[str, Any]) -> bool:
    """Whether the number of tokens is to follow the pieces of an answer."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ValueError("stream_options must be an object")
    return bool(options.get("include_usage"))


class Answer:
    """A text that is being generated for a request.

    used: tokens so far. reason: why the text ended, as OpenAI calls it: stop or length.
    Raises ValueError or TypeError for settings that `stream` refuses.

    Book: 18_real_models.html#a-server
    """

    def __init__(self, request: CompletionRequest, model: GPT, tokenizer: Tokenizer):
        self.request, self.tokenizer = request, tokenizer
        self.used, self.reason = 0, "stop"
        self.steps = stream(
            model,
            [request.ids],
            request.limit,
            tokenizer.special_tokens.values(),
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
        )

    def pieces(self) -> Iterator[str]:
        """The text, as it comes."""
        decoded = codecs.iterdecode(self._bytes(), "utf-8", errors="replace")
        return until(decoded, self.request.stops)

    def _bytes(self) -> Iterator[bytes]:
        for step in self.steps:
            self.used += 1
            yield self.tokenizer.decode_bytes(step)
        if self.used == self.request.limit:  # and `until` has not stopped before
            self.reason = "length"

    def usage(self) -> dict[str, int]:
        """How many tokens were read, and written so far."""
        read = len(self.request.ids)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.used,
            "total_tokens": read + self.used,
        }


LARGEST_REQUEST = 1 << 20  # bytes of a request


def _choice(words: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    """An answer, or a piece of one, as OpenAI's clients expect it."""
    return {"index": 0, **words, "logprobs": None, "finish_reason": reason}


def make_app(model: GPT, tokenizer: Tokenizer, name: str) -> Starlette:
    """What the server does: /v1/models, /v1/completions and /v1/chat/completions.

    Clients are served in turns, a token each.

    Book: 18_real_models.html#a-server
    """
    turns = CapacityLimiter(1)

    def refuse_pages(request: Request) -> None:
        if "origin" in request.headers:
            raise HTTPException(403, "web pages may not ask")

    async def start(request: Request, chat: bool) -> Answer:
        content = b""
        async for part in request.stream():
            content += part
            if len(content) > LARGEST_REQUEST:
                raise HTTPException(
                    413, f"a request has at most {LARGEST_REQUEST:,} bytes"
                )
        try:
            body = json.loads(content)
            asked = CompletionRequest.parse(body, model, tokenizer, chat)
            return Answer(asked, model, tokenizer)
        except KeyError as error:
            raise HTTPException(400, f"{error} is missing") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise HTTPException(400, str(error)) from None

    async def pieces(request: Request, answer: Answer) -> AsyncIterator[str]:
        steps: Iterator[str | None] = answer.pieces()
        while not await request.is_disconnected():
            piece = await to_thread.run_sync(next, steps, None, limiter=turns)
            if piece is None:
                return
            yield piece

    async def complete(request: Request) -> Response:
        refuse_pages(request)
        chat = request.url.path.endswith("chat/completions")
        answer = await start(request, chat)
        kind = "chat.completion" if chat else "text_completion"
        frame: dict[str, Any] = {
            "id": f"{kind}-{uuid4().hex}",
            "object": kind,
            "model": name,
            "created": int(time.time()),
        }
        if answer.request.in_pieces:
            frame["object"] += ".chunk" if chat else ""
            parts = _events(frame, pieces(request, answer), answer, chat)
            return StreamingResponse(parts, media_type="text/event-stream")
        text = "".join([piece async for piece in pieces(request, answer)])
        message = {"message": {"role": "assistant", "content": text}}
        choice = _choice(message if chat else {"text": text}, answer.reason)
        return JSONResponse({**frame, "choices": [choice], "usage": answer.usage()})

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
        routes.append(Route(path, complete, methods=["POST"]))
    here = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    refusals = {HTTPException: refuse, ClientDisconnect: gone}
    return Starlette(routes=routes, middleware=[here], exception_handlers=refusals)


async def _events(
    frame: dict[str, Any], pieces: AsyncIterator[str], answer: Answer, chat: bool
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
    yield event(_choice({"delta": {}} if chat else {"text": ""}, answer.reason))
    if answer.request.with_usage:
        yield event(usage=answer.usage())
    yield "data: [DONE]\n\n"


@contextmanager
def running(app: Starlette, port: int = 0) -> Iterator[str]:
    """Serve in the background, for this machine only, and yield the address.

    port: 0 takes any that is free. Raises OSError where it is taken.

    Book: 18_real_models.html#a-server
    """
    with socket.create_server(("127.0.0.1", port)) as listening:
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()

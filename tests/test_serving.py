"""The server, asked by OpenAI's own client, by several at once, and by strangers."""

import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import torch

import glassgpt
from glassgpt import serving
from glassgpt.cli import main
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.serving import make_app, running, until
from glassgpt.tokens import BPETokenizer

openai = pytest.importorskip("openai")
HELLO = [{"role": "user", "content": "Hello"}]
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def shakespeare():
    return glassgpt.load("shakespeare")


@pytest.fixture(scope="module")
def address(shakespeare):
    with running(make_app(*shakespeare, "shakespeare")) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def talker():
    """A model with roles; what it says makes no sense."""
    tokenizer = BPETokenizer.train("hello, a miniature Eiffel tower. " * 9, 275, CHATML)
    torch.manual_seed(0)
    return GPT(GPTConfig(275, 256, layers=1, heads=2, width=16)).eval(), tokenizer


@pytest.fixture(scope="module")
def chat(talker):
    with (
        running(make_app(*talker, "talker")) as address,
        openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client,
    ):
        yield client


def expected(model, tokenizer, ids, tokens):
    ends = tokenizer.special_tokens.values()
    return tokenizer.decode(
        glassgpt.generate(model, ids, tokens, ends, top_k=1)[len(ids) :]
    )


def test_the_models_are_listed(client):
    (listed,) = client.models.list()
    assert listed.id == "shakespeare"
    assert client.models.retrieve("shakespeare") == listed
    with pytest.raises(openai.NotFoundError, match="the model here is shakespeare"):
        client.models.retrieve("hamlet")


def test_a_completion_is_that_of_generate(client, shakespeare):
    model, tokenizer = shakespeare
    prompt = "ROMEO:\nO, my"
    due = expected(model, tokenizer, tokenizer.encode(prompt), 12)
    options = {"model": "any", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    answer = client.completions.create(**options)
    assert answer.choices[0].text == due
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(tokenizer.encode(prompt))
    events = list(client.completions.create(**options, stream=True))
    assert "".join(event.choices[0].text for event in events) == due
    assert [e.choices[0].finish_reason for e in events[-2:]] == [None, "length"]
    assert len(events) > 8
    counting = {"stream": True, "stream_options": {"include_usage": True}}
    *counted, last = client.completions.create(**options, **counting)
    assert "".join(event.choices[0].text for event in counted) == due
    assert (last.choices, last.usage) == ([], answer.usage)
    for same in (tokenizer.encode(prompt), [prompt]):
        again = client.completions.create(**options | {"prompt": same})
        assert again.choices[0].text == due
    hot = client.completions.create(
        **options | {"temperature": 9, "extra_body": {"top_k": 1}}
    )
    assert hot.choices[0].text == due


def test_a_seed_gives_the_same_text(client):
    options = {"model": "any", "prompt": "KING:", "max_tokens": 20, "seed": 7}
    texts = {client.completions.create(**options).choices[0].text for _ in range(2)}
    assert len(texts) == 1


def test_a_stop_text_ends_the_answer(client, shakespeare):
    model, tokenizer = shakespeare
    due = expected(model, tokenizer, tokenizer.encode("ROMEO:\n"), 40)
    stop = due[10:16]
    options = {"model": "any", "prompt": "ROMEO:\n", "max_tokens": 40}
    options |= {"temperature": 0, "stop": [stop, "never this"]}
    answer = client.completions.create(**options).choices[0]
    assert answer.text == due[: due.index(stop)]
    assert answer.finish_reason == "stop"
    events = client.completions.create(**options, stream=True)
    assert "".join(e.choices[0].text for e in events) == answer.text


def test_a_stop_text_in_the_last_token_is_a_stop(client, shakespeare):
    model, tokenizer = shakespeare
    ids = tokenizer.encode("ROMEO:\n")
    last = tokenizer.decode(glassgpt.generate(model, ids, 12, top_k=1)[-1:])
    options = {"model": "any", "prompt": "ROMEO:\n", "temperature": 0}
    for limit in (3, 11, 12):
        answer = client.completions.create(**options, max_tokens=limit, stop=last)
        choice, used = answer.choices[0], answer.usage.completion_tokens
        due = expected(model, tokenizer, ids, limit)
        assert choice.text == due.split(last)[0]
        assert choice.finish_reason == ("stop" if last in due else "length")
        assert used <= limit
    assert choice.finish_reason == "stop"


def test_an_answer_ends_where_the_context_does(address, shakespeare):
    ids = shakespeare[1].encode("ROMEO:\n")
    prompt = ids * (250 // len(ids))
    body = {"prompt": prompt, "max_tokens": 10_000, "temperature": 0}
    answer = json.loads(post(address, json.dumps(body).encode())[1])
    room = shakespeare[0].config.context - len(prompt)
    assert answer["usage"]["completion_tokens"] == room
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_no_token_wanted_is_no_token(address, name):
    body = {"prompt": "ROMEO:", name: 0}
    status, content = post(address, json.dumps(body).encode())
    answer = json.loads(content)
    assert status == 200
    assert answer["choices"][0]["text"] == ""
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_what_is_null_is_as_if_it_were_not_there(address):
    body = dict.fromkeys(["n", "stop", "seed", "echo", "logprobs", "best_of", "stream"])
    body |= {"prompt": "ROMEO:", "max_completion_tokens": None, "max_tokens": 2}
    status, content = post(address, json.dumps(body).encode())
    assert status == 200
    assert json.loads(content)["usage"]["completion_tokens"] == 2


def test_a_conversation_is_rendered_and_answered(chat, talker):
    from glassgpt.chat import render

    model, tokenizer = talker
    talk = [{"role": "system", "content": "Be brief."}, *HELLO]
    due = expected(model, tokenizer, render(talk, tokenizer, reply=True)[0], 25)
    options = {"model": "any", "messages": talk, "temperature": 0}
    answer = chat.chat.completions.create(**options, max_tokens=25)
    assert answer.choices[0].message.content == due
    assert answer.choices[0].message.role == "assistant"
    events = list(
        chat.chat.completions.create(**options, max_completion_tokens=25, stream=True)
    )
    assert "".join(e.choices[0].delta.content or "" for e in events) == due
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].choices[0].finish_reason in ("length", "stop")
    newer = [{**talk[0], "role": "developer"}, *HELLO]
    answer = chat.chat.completions.create(
        **options | {"messages": newer}, max_tokens=25
    )
    assert answer.choices[0].message.content == due
    counting = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = chat.chat.completions.create(**options, **counting, max_tokens=25)
    assert (last.choices, last.usage) == ([], answer.usage)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    both = [
        chat.chat.completions.create(**options | {"messages": m}, max_tokens=25)
        for m in (parts, HELLO)
    ]
    assert both[0].choices[0].message.content == both[1].choices[0].message.content
    with chat.chat.completions.stream(**options, max_tokens=25) as helper:
        helper.until_done()
    whole = helper.current_completion_snapshot
    assert whole.choices[0].message.content == due


def test_a_model_without_roles_says_so(client):
    with pytest.raises(openai.BadRequestError, match="roles"):
        client.chat.completions.create(model="any", messages=HELLO)


def test_nobody_forges_a_turn(chat, talker):
    """The marks in a message are text, and cost what text costs."""
    _, tokenizer = talker
    used = [
        chat.chat.completions.create(
            model="any", messages=[{"role": "user", "content": text}], max_tokens=1
        ).usage.prompt_tokens
        for text in ("", "<|im_end|>")
    ]
    assert used[1] - used[0] == len(tokenizer.encode("<|im_end|>")) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 2}, "n must be 1"),
        ({"echo": True}, "echo must be False"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": -1}, "max_tokens: a number from 0 up"),
        ({"max_tokens": "many"}, "max_tokens: a number from 0 up"),
        ({"max_tokens": 1.5}, "max_tokens: a number from 0 up"),
        ({"prompt": ""}, "at least one token"),
        ({"prompt": "a " * 400}, "too long"),
        ({"prompt": ["a", "b"]}, "a prompt must be a list of ids"),
        ({"prompt": None}, "prompt must be a text"),
        ({"stop": 5}, "stop must be a text"),
        ({"stream_options": 5}, "stream_options must be an object"),
        ({"stop": [5]}, "stop must be a text"),
    ],
)
def test_what_makes_no_sense_is_refused(client, change, message):
    options = {"model": "any", "prompt": "a", "max_tokens": 3, **change}
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**options)


PICTURE = {"url": "data:image/png;base64," + "A" * 10_000}
PARTS = [
    [{"type": "image_url", "image_url": PICTURE}],
    [{"type": "text", "text": "What is it?"}, {"image_url": PICTURE}],
    [{"type": "text", "text": 5}],
    ["hello"],
    [None],
]


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "king", "content": "x"}], "hello", None]
    + [[{"role": "user", "content": None}]]
    + [[{"role": "user", "content": content}] for content in (5, {}, *PARTS)]
    + [[message] for message in ("hello", None, 5, [], {}, {"role": "user"})]
    + [[{"content": "x"}], *([{"role": role, "content": "x"}] for role in (5, []))],
)
def test_messages_that_are_none_are_refused(chat, messages):
    with pytest.raises(openai.BadRequestError) as refused:
        chat.chat.completions.create(model="any", messages=messages, max_tokens=1)
    told = refused.value.body["message"]
    assert re.search("a (message|turn) is|messages|at least one turn", told)
    assert not re.search("object|indices|iterable|subscript|attribute|sequence", told)
    assert len(told) < 200  # no picture comes back


def post(address, body, path="/v1/completions", method="POST", **headers):
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


PAIRS = b'[["prompt", "a"], ["max_tokens", 1]]'  # dict() would take them


@pytest.mark.parametrize("body", [b"", b"[]", PAIRS, b"\xff", b"[" * 100_000, b"{}"])
def test_what_is_no_request_is_refused(address, body):
    status, content = post(address, body)
    assert status == 400
    assert json.loads(content)["error"]["message"]


def test_a_body_too_large_is_refused(address):
    place = urlsplit(address)
    status, content = post(address, b"x" * (serving.LARGEST_REQUEST + 1))
    assert status == 413
    assert "1,048,576 bytes" in json.loads(content)["error"]["message"]
    # One that doesn't say how long it is, and never ends.
    with socket.create_connection((place.hostname, place.port), timeout=60) as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        line.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        part = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        sent, answer = 0, b""
        line.settimeout(0.5)
        while not answer and sent < 64:
            sent += 1
            try:
                line.sendall(part)
                if sent > 17:
                    answer = line.recv(100)
            except TimeoutError:
                continue
            except OSError:  # it hung up
                break
    assert answer.startswith(b"HTTP/1.1 413") or 17 <= sent < 64


def test_who_hangs_up_while_asking_leaves_no_traceback(shakespeare, capfd):
    with running(make_app(*shakespeare, "shakespeare")) as address:
        place = urlsplit(address)
        with socket.create_connection((place.hostname, place.port), timeout=60) as line:
            line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
            line.sendall(b'Content-Length: 1000\r\n\r\n{"prompt": "RO')
            time.sleep(0.2)  # its question has begun
        assert post(address, b"{}")[0] == 400  # the next one is served
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("frequency_penalty", 2),
        ("logit_bias", {"5": -100}),
        ("tool_choice", "required"),
    ],
)
def test_what_it_does_not_do_is_refused(address, name, value):
    status, content = post(address, json.dumps({"prompt": "a", name: value}).encode())
    assert status == 400
    assert f"{name} must be" in json.loads(content)["error"]["message"]


def test_other_paths_and_methods_are_refused(address):
    assert post(address, b"{}", "/v1/embeddings")[0] == 404
    assert post(address, b"{}", "/v1/models")[0] == 405


def test_a_page_of_another_name_is_refused(address):
    assert post(address, b"{}", Host="evil.example")[0] == 400
    assert b"Invalid host" in post(address, b"{}", Host="evil.example")[1]
    assert json.loads(post(address, b"{}", Host="localhost")[1])["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_web_page_is_refused(address, path):
    """A page may post text/plain anywhere, without asking; its browser says who."""
    body = json.dumps({"prompt": "ROMEO:", "max_tokens": 1}).encode()
    names = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    status, content = post(address, body, path, **names)
    assert status == 403
    assert json.loads(content)["error"]["message"] == "web pages may not ask"
    assert post(address, body, path, **{**names, "Origin": "null"})[0] == 403
    assert post(address, body, path, **{**names, "Origin": address})[0] == 403


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/shakespeare"])
def test_a_web_page_is_not_told_which_model_is_here(address, path):
    status, content = post(address, None, path, "GET", Origin="https://evil.example")
    assert status == 403
    assert json.loads(content)["error"]["message"] == "web pages may not ask"
    assert post(address, None, path, "GET")[0] == 200


def test_it_listens_on_this_machine_alone(address):
    assert address.startswith("http://127.0.0.1:")
    port = urlsplit(address).port
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    if sys.platform == "linux":  # all of 127.0.0.0/8 is this machine there
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)


def test_several_clients_at_once_get_their_own_answers(client, shakespeare):
    model, tokenizer = shakespeare
    prompts = [f"{name}:\n" for name in ("ROMEO", "JULIET", "MACBETH")]

    def ask(prompt):
        options = {"model": "any", "prompt": prompt, "max_tokens": 15}
        events = client.completions.create(**options, temperature=0, stream=True)
        return "".join(event.choices[0].text for event in events)

    with ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(ask, prompts))
    due = [expected(model, tokenizer, tokenizer.encode(p), 15) for p in prompts]
    assert texts == due


class Counted:
    """Steps of a stream, counted; each waits until it is allowed."""

    def __init__(self, monkeypatch):
        self.made, self.order, self.gate = {}, [], threading.Semaphore(0)
        original = serving.stream

        def counted(model, prompts, *rest, **settings):
            key = tuple(prompts[0])
            steps = original(model, prompts, *rest, **settings)

            def one_by_one():
                for step in steps:
                    self.gate.acquire(timeout=60)
                    self.made[key] = self.made.get(key, 0) + 1
                    self.order.append(key)
                    yield step

            return one_by_one()

        monkeypatch.setattr(serving, "stream", counted)


@pytest.mark.parametrize("in_pieces", [True, False])
def test_who_hangs_up_costs_nothing_more(address, client, monkeypatch, in_pieces):
    counted = Counted(monkeypatch)
    body = {"prompt": [9, 8, 7], "max_tokens": 200, "stream": in_pieces}
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), timeout=60) as line:
        text = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        line.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        for _ in range(5):
            counted.gate.release()
        if in_pieces:
            assert line.recv(100).startswith(b"HTTP/1.1 200")
        while counted.made.get((9, 8, 7), 0) < 5:
            counted.gate.release()
    for _ in range(300):
        counted.gate.release()
    # Somebody else is served, and by then the first stream has ended.
    for _ in range(3):
        client.completions.create(model="any", prompt=[1], max_tokens=20)
    assert counted.made[(9, 8, 7)] < 60
    before = counted.made[(9, 8, 7)]
    client.completions.create(model="any", prompt=[1], max_tokens=20)
    assert counted.made[(9, 8, 7)] == before


def test_turns_are_fair(client, monkeypatch):
    """Two streams that wait for the same steps get them in turns."""
    counted = Counted(monkeypatch)

    def ask(prompt):
        options = {"model": "any", "prompt": prompt, "max_tokens": 20}
        return [*client.completions.create(**options, stream=True)]

    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, [n]) for n in (3, 4)]
        for _ in range(400):
            counted.gate.release()
        for answer in answers:
            answer.result(timeout=60)
    order = counted.order
    both = order[order.index((4,)) if order[0] == (3,) else order.index((3,)) :]
    overlap = both[: 2 * min(both.count((3,)), both.count((4,)))]
    assert all(a != b for a, b in zip(overlap[2:-2], overlap[3:-1], strict=True))


@pytest.mark.skipif(sys.platform == "win32", reason="says it in other words")
def test_a_port_in_use_is_an_error(shakespeare):
    app = make_app(*shakespeare, "x")
    with running(app) as address:
        again = running(app, urlsplit(address).port)
        with pytest.raises(OSError, match="in use"):
            again.__enter__()


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_the_command_serves_until_ctrl_c(capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    address, seen = f"http://127.0.0.1:{port}/v1", []

    def ask():
        with openai.OpenAI(base_url=address, api_key="none", max_retries=9) as client:
            try:
                seen.extend(model.id for model in client.models.list())
                options = {"model": "any", "prompt": "ROMEO:", "max_tokens": 200}
                next(iter(client.completions.create(**options, stream=True)))
            finally:
                os.kill(os.getpid(), signal.SIGINT)  # an answer is under way

    with ThreadPoolExecutor(1) as pool:
        pool.submit(ask)
        assert main(["serve", "shakespeare", "--port", port]) == 130
    assert seen == ["shakespeare"]
    assert f"shakespeare answers at {address} until" in capsys.readouterr().out


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_is_none_is_refused(port, capsys):
    assert main(["serve", "shakespeare", "--port", port]) == 2
    assert "port" in capsys.readouterr().err


def test_without_its_libraries_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "glassgpt.serving")
    assert main(["serve", "shakespeare"]) == 2
    assert "pip install 'glassgpt[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pieces", "stops", "due"),
    [
        (["ab", "c", "d"], ["x"], "abcd"),
        (["ab", "c"], [], "abc"),
        (["a b", " US", "ER", ": x"], ["USER:"], "a b "),
        (["one stop two"], ["stop", "two"], "one "),
        (["ab", "cd"], ["abcd", "b"], "a"),
        (["abcd"], ["abcd", "b"], "a"),
        (["ab", "cd"], ["cd", "bcd"], "a"),
        (["aab", "aa", "c"], ["aac"], "aab"),
        (["a\n", "\nb"], ["\n\n"], "a"),
        (["ends in US"], ["USER"], "ends in US"),
    ],
)
def test_a_text_ends_before_its_first_stop(pieces, stops, due):
    assert "".join(until(iter(pieces), stops)) == due


def test_no_more_of_a_text_is_held_back_than_needed():
    parts = until(iter(["a tower", " of U", "nusual", " US", "ER"]), ["USER"])
    assert [*parts] == ["a tower", " of ", "Unusual", " ", ""]


def test_a_long_stop_text_costs_no_more_than_what_is_held():
    class Long(str):
        asked = 0

        def startswith(self, *what):
            Long.asked += 1
            return super().startswith(*what)

    assert [*until("bbbx", [Long("b" * 10**6)])] == ["", "", "", "bbbx", ""]
    assert Long.asked < 20

"""The server over a real socket: answers are those of ``generate``, and what goes wrong is said in OpenAI's shape."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import uvicorn
from tiny_runs import write_model

from tpa_train.checkpoints import load_pretrained
from tpa_train.errors import UserError
from tpa_train.serving.command import main, model_name
from tpa_train.serving.engine import Engine
from tpa_train.serving.server import Server
from tpa_train.tpa.generation import generate

TEXT = "the hello world, the world"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def served(folder):
    """A server of two places and a queue of one; ``gate`` holds the engine's steps back while it is cleared."""
    engine = Engine(load_pretrained(folder), max_batch=2, context=200)
    gate, step = threading.Event(), engine.step

    def gated():
        assert gate.wait(60)
        return step()

    gate.set()
    engine.step = gated
    server = Server(engine, "tiny", max_tokens=120, max_prompt=150, max_waiting=1)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        runner = uvicorn.Server(uvicorn.Config(server.app(), log_level="critical"))
        thread = threading.Thread(target=runner.run, args=([bound],))
        thread.start()
        yield SimpleNamespace(server=server, engine=engine, gate=gate, port=bound.getsockname()[1], model=engine.model)
        runner.should_exit = True
        thread.join(60)
    assert not thread.is_alive() and not server.thread._thread.is_alive()


def open_request(served, path, body=None, method="POST"):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    content = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
    connection.request(method, path, content, {"Content-Type": "application/json"})
    return connection


def ask(served, path, body=None, method="POST"):
    connection = open_request(served, path, body, method)
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response.status, json.loads(content) if response.headers["Content-Type"] == "application/json" else content


def complete(served, **body):
    status, found = ask(served, "/v1/completions", {"model": "tiny", "prompt": TEXT, "temperature": 0} | body)
    assert status == 200, found
    return found


def events(content):
    lines = content.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_completions_are_those_of_generate(served):
    expected = generate(served.model, [TEXT, "hello"], max_tokens=20)
    found = complete(served, max_tokens=20)
    (choice,) = found["choices"]
    assert choice["text"] == expected[0] and choice["finish_reason"] == "length" and choice["index"] == 0
    tokens = len(served.model.tokenizer.encode(TEXT))
    assert found["usage"] == {"prompt_tokens": tokens, "completion_tokens": 20, "total_tokens": tokens + 20}
    assert (found["object"], found["model"]) == ("text_completion", "tiny") and found["id"].startswith("cmpl-")
    several = complete(served, prompt=[served.model.tokenizer.encode(TEXT), served.model.tokenizer.encode("hello")],
                       max_tokens=20, stream_options={"include_usage": True})  # fmt: skip
    assert [c["text"] for c in several["choices"]] == expected
    assert complete(served)["usage"]["completion_tokens"] == 16  # OpenAI's default


def test_a_stream_is_the_answer_in_pieces(served):
    whole = complete(served, max_tokens=30)
    parts = events(complete(served, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert "".join(p["choices"][0]["text"] for p in parts[:-1]) == whole["choices"][0]["text"]
    assert [p["choices"][0]["finish_reason"] for p in parts[:-1]] == [None] * (len(parts) - 2) + ["length"]
    assert len(parts) > 10 and parts[-1]["choices"] == [] and parts[-1]["usage"] == whole["usage"]
    assert all(p["usage"] is None for p in parts[:-1]) and len({p["id"] for p in parts}) == 1


def test_chat_uses_the_template(served):
    body = {"model": "tiny", "messages": [{"role": "developer", "content": "the"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": " world"}]}],
            "temperature": 0, "max_completion_tokens": 12}  # fmt: skip
    expected = generate(served.model, "the\n\nhello world", max_tokens=12, chat=True)[0]
    status, found = ask(served, "/v1/chat/completions", body)
    assert status == 200 and found["choices"][0]["message"] == {
        "role": "assistant", "content": expected, "refusal": None
    }  # fmt: skip
    assert found["object"] == "chat.completion" and found["usage"]["completion_tokens"] == 12
    parts = events(ask(served, "/v1/chat/completions", body | {"stream": True})[1])
    deltas = [p["choices"][0]["delta"] for p in parts]
    assert deltas[0] == {"role": "assistant", "content": ""} and "usage" not in parts[0]
    assert "".join(d.get("content", "") for d in deltas) == expected
    assert {p["object"] for p in parts} == {"chat.completion.chunk"} and not any("role" in d for d in deltas[1:])
    # Without a limit the answer may take all that is allowed.
    status, found = ask(served, "/v1/chat/completions", {k: v for k, v in body.items() if "tokens" not in k})
    assert status == 200 and found["usage"]["completion_tokens"] <= 120


def test_stop_and_sampling(served):
    text = complete(served, max_tokens=40)["choices"][0]["text"]
    stop = text[10:12]
    (choice,) = complete(served, max_tokens=40, stop=[stop, "never written"])["choices"]
    assert choice["text"] == text[: text.find(stop)] and choice["finish_reason"] == "stop"
    rules = {"temperature": 1.2, "top_p": 0.9, "max_tokens": 20}
    first, again, other = (complete(served, seed=s, **rules)["choices"][0]["text"] for s in (1, 1, 2))
    assert first == again != other
    greedy = complete(served, max_tokens=20)["choices"][0]["text"]
    assert complete(served, temperature=1.5, top_p=1e-6, max_tokens=20)["choices"][0]["text"] == greedy


@pytest.mark.parametrize(
    "change,status,param,words",
    [
        ({"prompt": None}, 400, "prompt", "must be a text"),
        ({"prompt": []}, 400, "prompt", "must be a text"),
        ({"prompt": ["a", 3]}, 400, "prompt", "must be a text"),
        ({"prompt": [4, 10**9]}, 400, "prompt", "vocabulary ends"),
        ({"prompt": "the " * 160}, 400, None, "more than the 150"),
        ({"prompt": "hello " * 70, "max_tokens": 100}, 400, "max_tokens", "exceed the context of 200"),
        ({"prompt": ["a"] * 4}, 400, "prompt", "more than this server takes at once"),
        ({"model": "gpt"}, 404, None, "no model 'gpt' here, only 'tiny'"),
        ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"max_tokens": 121}, 400, "max_tokens", "more than the 120 allowed"),
        ({"max_tokens": True}, 400, "max_tokens", "whole number"),
        ({"temperature": -1}, 400, "temperature", "must not be negative"),
        ({"temperature": "hot"}, 400, "temperature", "must be a number"),
        ({"top_p": 0}, 400, "top_p", "must lie above 0"),
        ({"seed": 1.5}, 400, "seed", "whole number"),
        ({"stop": ["", "a"]}, 400, "stop", "none of them empty"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"stream_options": {"usage": True}}, 400, "stream_options", "no 'usage'"),
        ({"n": 2}, 400, "n", "not supported"),
        ({"logprobs": 0}, 400, "logprobs", "not supported"),
        ({"temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
        ({"messages": []}, 400, "messages", "unknown field"),
    ],
)
def test_bad_fields_are_named(served, change, status, param, words):
    found, body = ask(served, "/v1/completions", {"model": "tiny", "prompt": TEXT} | change)
    error = body["error"]
    assert found == status and words in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param or param is None
    assert served.server.active == 0


@pytest.mark.parametrize(
    "messages,words",
    [
        ("hello", "must be a list"),
        ([{"role": "robot", "content": "a"}], "messages[0].role is 'robot'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "parts of type 'text'"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "last message must be a user's"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "must alternate"),
    ],
)
def test_bad_messages_are_named(served, messages, words):
    status, body = ask(served, "/v1/chat/completions", {"messages": messages})
    assert status == 400 and words in body["error"]["message"] and body["error"]["param"].startswith("messages")


def test_other_requests(served):
    assert ask(served, "/v1/models", method="GET")[1]["data"][0]["id"] == "tiny"
    assert ask(served, "/v1/models/tiny", method="GET")[1]["max_model_len"] == 200
    for path, method, body, status in (
        ("/v1/models/other", "GET", None, 404), ("/v1/nothing", "GET", None, 404),
        ("/v1/completions", "GET", None, 405), ("/v1/completions", "POST", b"{", 400),
        ("/v1/completions", "POST", b"[" * 100_000, 413), ("/v1/completions", "POST", b"[" * 50_000, 400),
        ("/v1/completions", "POST", [1], 400),
    ):  # fmt: skip
        found, content = ask(served, path, body, method)
        assert found == status and set(content["error"]) == {"message", "type", "param", "code"}, (path, method)
    # What asks for nothing is no reason to refuse.
    complete(served, n=1, logit_bias={}, presence_penalty=0.0, user="me", echo=False, stop=None, best_of=None)


def test_a_full_server_refuses_and_clients_that_leave_make_room(served):
    served.gate.clear()
    body = {"prompt": TEXT, "max_tokens": 100, "temperature": 0}
    streams = [open_request(served, "/v1/completions", body | {"stream": True}) for _ in range(2)]
    waiting = open_request(served, "/v1/completions", body)
    until(lambda: served.server.active == 3)
    status, refused = ask(served, "/v1/completions", body)
    assert status == 429 and refused["error"]["type"] == "rate_limit_error"
    assert ask(served, "/health", method="GET")[0] == 200
    requests = list(served.engine._requests.values())
    for connection in (streams[0], waiting):
        connection.sock.close()
        connection.close()
    until(lambda: served.server.active == 1)
    served.gate.set()
    content = streams[1].getresponse().read().decode()
    expected = generate(served.model, TEXT, max_tokens=100)[0]
    assert "".join(p["choices"][0]["text"] for p in events(content)) == expected
    until(lambda: served.engine.idle)
    assert sorted(r.finish_reason for r in requests).count("cancelled") == 2 and served.server.active == 0


def test_a_failed_step_is_an_error_of_the_server(served, monkeypatch):
    def fail(batch):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "_decode", fail)
        status, body = ask(served, "/v1/completions", {"prompt": TEXT})
        assert status == 503 and body["error"]["type"] == "server_error"
        content = ask(served, "/v1/completions", {"prompt": TEXT, "stream": True})[1]
        assert json.loads(content.split("data: ")[-1])["error"]["type"] == "server_error"
    assert complete(served)["choices"] and served.server.active == 0


def test_the_command_serves_until_it_is_told_to_stop(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on host=127.0.0.1 port={port}"):
            main([f"model={folder}", f"port={port}", "device=cpu"])
    found = {}

    def client():
        try:
            until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            found["answer"] = ask(SimpleNamespace(port=port), "/v1/completions", {"prompt": TEXT, "max_tokens": 3})
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=client)
    thread.start()
    main([f"model={folder}", f"port={port}", "device=cpu", "max_batch=2", "context=64"])
    thread.join()
    assert found["answer"][0] == 200 and signal.getsignal(signal.SIGTERM) is before
    out = capsys.readouterr().out
    assert f"serving tiny at http://127.0.0.1:{port}/v1" in out and "password" not in out


def test_mistakes_of_the_command(folder, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="port=70000"):
        main([f"model={folder}", "port=70000"])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[serve\]'"):
        main([f"model={folder}"])
    (tmp_path / "mine" / "export").mkdir(parents=True)
    (tmp_path / "mine" / "run.yaml").touch()
    assert model_name(str(tmp_path / "mine" / "export")) == model_name(str(tmp_path / "mine")) == "mine"
    assert model_name("models/gemma-3-1b.gguf") == "gemma-3-1b"

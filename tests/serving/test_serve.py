"""``fewbits serve``: a real server on loopback, asked as people ask it, and as they should not."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import fewbits
from fewbits.quant.errors import CheckpointError
from fewbits.serving.serve import ServeError, require_free_port, serve_command
from tests.conftest import save_tiny_model

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("openai", reason="the serve extra is not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    fewbits.quantize(save_tiny_model(root / "model", "llama", chat=True), root / "small", recipe="rtn")
    return root / "small"


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """The port of a server that ``fewbits serve`` started; stopped as Ctrl-C does, and then it must end cleanly."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "log.txt"
    command = [sys.executable, "-m", "fewbits.cli.main", "serve", str(checkpoint), "--port", str(port),
               "--engine", "transformers", "--device", "cpu"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            break
        except OSError:
            time.sleep(0.2)
    else:
        process.kill()
        pytest.fail(log.read_text())
    yield port
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130, log.read_text()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)


def ask(port: int, body: object, path: str = "/v1/chat/completions") -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else {"text": text.decode()}


HELLO = [{"role": "user", "content": "hello"}]


def test_the_official_client(server: int) -> None:
    """Chat, a stream of the same text, and the list of models."""
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{server}/v1", api_key="none")
    assert [m.id for m in client.models.list()] == ["small"]
    whole = client.chat.completions.create(model="small", messages=HELLO, max_tokens=8, temperature=0)
    assert whole.usage and whole.usage.completion_tokens == 8
    stream = client.chat.completions.create(model="small", messages=HELLO, max_tokens=8, temperature=0, stream=True)
    parts = [c.choices[0].delta.content for c in stream if c.choices]
    assert "".join(p for p in parts if p) == whole.choices[0].message.content and len(parts) > 3
    plain = client.completions.create(model="small", prompt="hello", max_tokens=4)
    assert plain.usage and plain.usage.completion_tokens == 4


def test_the_answer_is_the_models(server: int, checkpoint: Path) -> None:
    """Greedy, as ``generate`` gives it: the packed weights were loaded, not others."""
    from fewbits.serving.transformers import load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    inputs = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = fewbits.load(checkpoint, device="cpu")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    _, answer = ask(server, {"model": "small", "messages": HELLO, "max_tokens": 8, "temperature": 0})
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(out, skip_special_tokens=True)


def test_two_requests_at_once(server: int) -> None:
    found: list[tuple[int, dict]] = []
    body = {"model": "small", "messages": HELLO, "max_tokens": 16, "temperature": 0}
    threads = [threading.Thread(target=lambda: found.append(ask(server, body))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in found] == [200, 200]
    assert len({answer["choices"][0]["message"]["content"] for _, answer in found}) == 1


@pytest.mark.parametrize("body, reason", [
    (b"{bad", "JSON"), ([], "dict"), ({}, "messages"), ({"messages": "x"}, "messages"), ({"messages": []}, "messages"),
    ({"messages": [{"content": "no role"}]}, "messages"),
    ({"messages": HELLO, "model": "another"}, "another"),
    ({"messages": [{"role": "user", "content": "far too long " * 200}]}, "context is 128"),
    ({"messages": HELLO, "max_tokens": 100_000}, "context is 128"),
])
def test_bad_requests_are_refused_and_survived(server: int, body: object, reason: str) -> None:
    status, answer = ask(server, body)
    assert status in (400, 422) and reason in json.dumps(answer), (status, answer)
    assert ask(server, {"model": "small", "messages": HELLO, "max_tokens": 2})[0] == 200


def test_a_client_that_hangs_up(server: int) -> None:
    """In the middle of a stream; the next one is served."""
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=30)
    body = json.dumps({"model": "small", "messages": HELLO, "max_tokens": 100, "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    connection.getresponse().read(10)
    connection.close()
    assert ask(server, {"model": "small", "messages": HELLO, "max_tokens": 2})[0] == 200


# -- the command -----------------------------------------------------------------------------------------------------


def command(directory: Path, engine: str | None = "transformers", **more: object) -> list[str]:
    return serve_command(directory, engine=engine, host="127.0.0.1", port=8000, device="cpu", **more)  # type: ignore


def test_print_shows_the_command(checkpoint: Path) -> None:
    shown = subprocess.run([sys.executable, "-m", "fewbits.cli.main", "serve", str(checkpoint), "--print", "--engine",
                            "transformers", "--device", "cpu", "--", "--log-level", "error"],
                           capture_output=True, text=True, check=True)
    assert shown.stdout.split() == command(checkpoint, more=["--log-level", "error"])


def test_what_cannot_be_served(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        command(tmp_path)
    with pytest.raises(ServeError, match="got 'bogus', needed vllm or transformers"):
        command(checkpoint, "bogus")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServeError, match=r"fastapi is not installed; pip install 'fewbits\[serve\]'"):
        command(checkpoint)


def test_a_port_that_is_taken(server: int) -> None:
    with pytest.raises(ServeError, match=f"--port {server}: cannot be listened on"):
        require_free_port("127.0.0.1", server)

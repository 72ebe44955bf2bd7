"""``fewbits push``: the real client of the hub, against a hub on loopback that keeps what it gets."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import fewbits
from fewbits.quant.errors import CheckpointError
from fewbits.serving.push import prepare
from tests.conftest import save_tiny_model


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload uses; every file comes inside the commit."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - the test's own
    created: list[dict] = []  # noqa: RUF012

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self._answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            self.created.append(json.loads(raw))
            return self._answer(200, {"url": f"http://{self.headers['Host']}/me/small", "name": "me/small"})
        if self.path.endswith("/preupload/main"):
            paths = [f["path"] for f in json.loads(raw)["files"]]
            return self._answer(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False}
                                                for p in paths]})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        for line in raw.splitlines():
            record = json.loads(line)
            if record["key"] == "file":
                self.files[record["value"]["path"]] = base64.b64decode(record["value"]["content"])
        url = f"http://{self.headers['Host']}/me/small/commit/1"
        self._answer(200, {"commitUrl": url, "commitOid": "1" * 40, "success": True})

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/small", "sha": "0" * 40, "siblings": []})

    def _answer(self, status: int, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pushed")
    fewbits.quantize(save_tiny_model(root / "model", "llama"), root / "small", recipe="rtn")
    return root / "small"


@pytest.fixture()
def hub():
    Hub.files, Hub.created = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def push(*args: str, hub: str, token: str = "hf_good", stdin: str | None = None) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_ENDPOINT": hub, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([sys.executable, "-m", "fewbits.cli.main", "push", *args], env=env, input=stdin or "",
                          capture_output=True, text=True, timeout=120)


def test_everything_arrives_once_it_is_confirmed(checkpoint: Path, hub: str) -> None:
    (checkpoint / "notes.tmp").write_text("left over")
    done = push(str(checkpoint), "me/small", "--yes", "--private", hub=hub)
    assert done.returncode == 0, done.stderr
    assert "private" in json.dumps(Hub.created[0]), Hub.created
    expected = {p.name: p.read_bytes() for p in checkpoint.iterdir() if p.is_file() and p.suffix != ".tmp"}
    got = {k: v for k, v in Hub.files.items() if k != ".gitattributes"}
    assert got.keys() == expected.keys() and got == expected
    assert "fewbits-00001-of-00003.safetensors" in done.stderr and "me/small" in done.stdout


def test_nobody_there_to_ask(checkpoint: Path, hub: str) -> None:
    refused = push(str(checkpoint), "me/small", hub=hub)
    assert refused.returncode == 2 and "--yes uploads without a question" in refused.stderr
    assert Hub.created == [] and Hub.files == {}


def test_what_the_hub_refuses_is_said(checkpoint: Path, hub: str) -> None:
    refused = push(str(checkpoint), "me/small", "--yes", hub=hub, token="hf_bad")
    assert refused.returncode == 2 and "error: me/small: the hub refuses" in refused.stderr
    assert "Traceback" not in refused.stderr and Hub.files == {}


def test_no_hub_there(checkpoint: Path) -> None:
    refused = push(str(checkpoint), "me/small", "--yes", hub="http://127.0.0.1:9")
    assert refused.returncode == 2 and "error: me/small: the hub refuses" in refused.stderr


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        prepare(tmp_path, "me/small")
    (tmp_path / ".fewbits").mkdir()
    with pytest.raises(CheckpointError, match="unfinished run"):
        prepare(tmp_path, "me/small")

"""An OpenAI-compatible endpoint, by an engine that is installed already."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from fewbits.quant.errors import CheckpointError, FewbitsError

ENGINES = ("vllm", "transformers")
_NEEDED = {"vllm": ("vllm",), "transformers": ("fastapi", "uvicorn", "openai")}
_INSTALL = {"vllm": "pip install vllm", "transformers": "pip install 'fewbits[serve]'"}


class ServeError(FewbitsError, ValueError):
    """A server that cannot be started as asked."""


def serve_command(
    directory: Path, *, engine: str | None, host: str, port: int, device: str | None, more: Sequence[str] = (),
) -> list[str]:
    """The command that serves a checkpoint: its first word is this Python.

    Args:
        engine: one of :data:`ENGINES`; None: vLLM where it is installed, else transformers.
        device: for transformers; None: a GPU where there is one, else the CPU.
        more: arguments for the engine, as they are.

    Raises:
        CheckpointError: the directory holds no model.
        ServeError: unknown engine, or one that is not installed.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: has no config.json; name a directory that fewbits quantize or export made")
    engine = engine or ("vllm" if _installed("vllm") else "transformers")
    if engine not in ENGINES:
        raise ServeError(f"--engine: got {engine!r}, needed {' or '.join(ENGINES)}")
    if not _installed(engine):
        missing = next(m for m in _NEEDED[engine] if importlib.util.find_spec(m) is None)
        raise ServeError(f"--engine {engine}: {missing} is not installed; {_INSTALL[engine]}")
    where = ["--host", host, "--port", str(port)]
    if engine == "vllm":
        name = ["--served-model-name", directory.resolve().name]
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), *name, *where,
                *more]
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return [sys.executable, "-m", "fewbits.serving.transformers_serve", str(directory), *where, "--device", device,
            "--dtype", "float32" if device == "cpu" else "auto", *more]


def require_free_port(host: str, port: int) -> None:
    """Raise ServeError where something listens on the port already, before a model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ServeError(f"--port {port}: cannot be listened on at {host} ({error.strerror or error}); choose another "
                         "--port or --host") from error


def example_request(host: str, port: int, name: str) -> str:
    """A request that a person can paste."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
    return f"curl http://{host}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def _installed(engine: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in _NEEDED[engine])

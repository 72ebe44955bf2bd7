"""``python -m fewbits.serving.transformers_serve DIR ...``: ``transformers serve`` that knows fewbits checkpoints.

transformers looks for no plug-ins when it starts, so this imports fewbits first and hands all arguments on. Of its
server three things are changed, all about requests: one that is malformed or longer than the model's context is
answered with status 400 and a reason (in place of 500, or of nonsense past the context), and the model also answers to
the name of its folder, which ``GET /v1/models`` tells.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import fewbits  # noqa: F401 - registers the format with transformers
from fewbits.eval.text import context_length

_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"
Handle = Callable[[Any, str], Awaitable[Any]]


def main() -> None:
    from transformers.cli.serving import server
    from transformers.cli.transformers import main as transformers

    build = server.build_server

    def build_server(manager: Any, chat: Any, **rest: Any) -> Any:
        model = _Served(manager)
        chat.handle_request = model.guarded(chat.handle_request, model.chat_tokens)
        completion = rest["completion_handler"]
        completion.handle_request = model.guarded(completion.handle_request, model.prompt_tokens)
        app = build(manager, chat, **rest)
        app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", "") != "/v1/models"]
        app.add_api_route("/v1/models", model.models, methods=["GET"])
        return app

    server.build_server = build_server  # type: ignore[assignment]
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # the server raises it again when it has shut down
    sys.argv = ["transformers", "serve", *sys.argv[1:]]
    transformers()


class _Served:
    """The one model that a server was started with."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._path = manager.force_model
        self._name = Path(self._path).resolve().name
        self._context = context_length(self._loaded()[0])

    def _loaded(self) -> tuple[Any, Any]:
        return self._manager.load_model_and_processor(self._manager.process_model_name(self._path))

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [
            {"id": self._name, "object": "model", "created": 0, "owned_by": "fewbits", "max_model_len": self._context}
        ]}

    def chat_tokens(self, body: dict[str, Any]) -> int:
        """Tokens of the prompt that a chat becomes; raises what the template raises for messages that are none."""
        messages = body["messages"]
        if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
            raise TypeError("messages: needed a list of {role, content}, at least one")
        ids = self._loaded()[1].apply_chat_template(messages, add_generation_prompt=True, tools=body.get("tools"),
                                                    tokenize=True, return_dict=True)["input_ids"]
        return len(ids[0]) if isinstance(ids[0], list) else len(ids)

    def prompt_tokens(self, body: dict[str, Any]) -> int:
        """Tokens of a plain prompt."""
        if not isinstance(body["prompt"], str):
            raise TypeError("prompt: needed a string")
        return len(self._loaded()[1](body["prompt"])["input_ids"])

    def guarded(self, handle: Handle, count: Callable[[dict[str, Any]], int]) -> Handle:
        """A handler that refuses what the model cannot answer, before anything is generated."""
        from fastapi import HTTPException
        from jinja2 import TemplateError

        async def guard(body: dict[str, Any], request_id: str) -> Any:
            if body.get("model") in (None, self._name):
                body["model"] = self._path
            try:
                tokens = count(body)
                wanted = body.get("max_completion_tokens") or body.get("max_tokens") or 1
                if self._context is not None and tokens + wanted > self._context:
                    raise ValueError(f"prompt: got {tokens} tokens and {wanted} to generate, the model's context is "
                                     f"{self._context}; shorten the prompt or lower max_tokens")
            except KeyError as error:
                raise HTTPException(400, f"{error}: missing") from error
            except (TypeError, ValueError, AttributeError, TemplateError) as error:
                raise HTTPException(400, str(error)) from error
            return await handle(body, request_id)

        return guard


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

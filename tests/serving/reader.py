"""A process that never imports fewbits and reads what it exports, with the target's own loader.

Run as a script: a line of JSON asks for one load, a line of JSON answers. One process serves all tests, because
importing transformers takes longer than any of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Reader:
    """The other end of the pipe: ``reader.load(folder)``."""

    def __init__(self) -> None:
        env = os.environ | {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, env=env)

    def load(self, folder: Path, *, model: str = "AutoModelForCausalLM", **options: object) -> dict[str, Any]:
        """Logits of the model in ``folder`` and, by name, what it then holds.

        Raises RuntimeError with the loader's own message when it cannot load it.
        """
        import torch

        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"folder": str(folder), "model": model, "options": options}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert not answer["fewbits"], "the reader is to do without fewbits"
        if "error" in answer:
            raise RuntimeError(answer["error"])
        found = torch.load(answer["file"])
        Path(answer["file"]).unlink()
        return found

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import tempfile

    import torch
    import transformers

    options = dict(request["options"])
    if "dequantize" in options:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=options.pop("dequantize"))
    dtype = getattr(torch, options.pop("dtype", "float32"))
    kind = getattr(transformers, request["model"])
    model = kind.from_pretrained(request["folder"], dtype=dtype, **options).eval()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    with tempfile.NamedTemporaryFile(suffix=".pt", delete=False) as f:
        torch.save({"logits": logits, "tensors": dict(model.state_dict()),
                    "classes": {n: type(m).__name__ for n, m in model.named_modules()}}, f)
    return {"file": f.name}


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes elsewhere
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer | {"fewbits": "fewbits" in sys.modules}), file=answers, flush=True)


if __name__ == "__main__":
    _serve()

"""How fast a checkpoint generates on this machine, beside a baseline, and how near that is to what memory allows.

Decoding one token reads every weight once, so that tokens per second times the bytes that are read for one are a
bandwidth, and what this machine streams is its limit.

Each model runs in a process of its own, so that its memory can be told, and the two take turns, so that a busy machine
disturbs both.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fewbits.eval.models import Loaded, open_model, thread_count
from fewbits.eval.scoring import Progress, silent
from fewbits.eval.speed import now, peak_rss_bytes
from fewbits.eval.text import context_length
from fewbits.kernels.explain import explain
from fewbits.kernels.linear import PackedMatrix, QuantEmbedding, TiedHead
from fewbits.quant.errors import FewbitsError
from fewbits.quant.source import open_source

PROMPT, LONG_PROMPT = 16, 512
MODE = "generate of transformers, greedy, batch 1"


@dataclass
class Measured:
    """One model.

    Attributes:
        decode_tokens_per_s: new tokens after the first; the median over rounds, as is what follows from it.
        prefill_tokens_per_s: tokens of a prompt of up to 512.
        bytes_per_token: of the weight files, read for a token: all but a table that is only looked up, and of experts
            as many as a token goes to.
        bandwidth_bytes_per_s: of these.
        peak_rss_bytes: of a process that only runs this model.
        kernels: for each quantized matrix its name, layout, shape and, for one token and for a long prompt, the kernel
            that runs and why others do not.
    """

    model: str
    dtype: str
    device: str
    mode: str
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    bytes_per_token: int
    bandwidth_bytes_per_s: float
    peak_rss_bytes: int
    kernels: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class BenchReport:
    """``to_json`` has the keys of ``fewbits bench --json``: those of :class:`Measured`, and ``baseline_*``.

    Attributes:
        stream_bytes_per_s: what this machine's processors read from memory, with as many threads; None for GPUs.
    """

    model: Measured
    baseline: Measured | None
    stream_bytes_per_s: float | None
    threads: int
    rounds: int

    def to_json(self) -> dict[str, Any]:
        out = dict(self.model.__dict__)
        if self.baseline is not None:
            out |= {f"baseline_{k}": v for k, v in self.baseline.__dict__.items() if k != "kernels"}
        return out | {"stream_bytes_per_s": self.stream_bytes_per_s, "threads": self.threads, "rounds": self.rounds}


def bench(
    model: str, *, baseline: str | None = None, new_tokens: int = 64, rounds: int = 5, device: str | None = None,
    dtype: str | None = None, threads: int | None = None, progress: Progress = silent,
) -> BenchReport:
    """Time a model, and perhaps a baseline, which computes in float32 on a CPU.

    Args:
        new_tokens: to decode after the first in each round.

    Raises:
        FewbitsError: a model cannot be loaded, or a count is below 1.
    """
    for name, value in (("new_tokens", new_tokens), ("rounds", rounds)):
        if value < 1:
            raise FewbitsError(f"{name} = {value}: must be at least 1")
    with thread_count(threads):
        count = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        own = [stack.enter_context(_process(m, device, dtype if m is model else None, count))
               for m in (model, baseline) if m is not None]
        facts = [_asked(p, "facts") for p in own]
        for p in own:
            _asked(p, "run", 2)  # what is set up at first use is not timed
        seconds: list[list[list[float]]] = [[] for _ in own]
        for i in range(rounds):
            for runs, p in zip(seconds, own):
                runs.append(_asked(p, "run", new_tokens))
            progress("Timing", i + 1, rounds)
        peaks = [_asked(p, "peak") for p in own]
    found = [_measured(f, runs, new_tokens, peak) for f, runs, peak in zip(facts, seconds, peaks)]
    stream = stream_bandwidth(count) if found[0].device == "cpu" else None
    return BenchReport(found[0], found[1] if baseline is not None else None, stream, count, rounds)


def _measured(facts: dict[str, Any], runs: list[list[float]], new_tokens: int, peak: int) -> Measured:
    prompt = facts.pop("prompt")
    prefill, decode = (statistics.median(times) for times in zip(*runs))
    rate = new_tokens / decode
    return Measured(**facts, mode=MODE, decode_tokens_per_s=rate, prefill_tokens_per_s=prompt / prefill,
                    bandwidth_bytes_per_s=rate * facts["bytes_per_token"], peak_rss_bytes=peak)


def stream_bandwidth(threads: int, nbytes: int = 1 << 28) -> float:
    """Bytes per second that so many threads read from memory: the fastest of a few sums over a large array."""
    with thread_count(threads):
        array = torch.ones(nbytes // 4)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            array.sum()
            best = min(best, time.perf_counter() - start)
    return array.nbytes / best


# -- in a process of its own ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _process(model: str, device: str | None, dtype: str | None, threads: int) -> Iterator[subprocess.Popen[str]]:
    """One that runs the model: a request a line goes in, an answer a line comes out, both JSON."""
    process = subprocess.Popen([sys.executable, "-m", __name__, json.dumps([model, device, dtype, threads])],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _asked(process: subprocess.Popen[str], what: str, new_tokens: int = 0) -> Any:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps([what, new_tokens]) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError) as error:
        raise FewbitsError("bench: the process that runs the model died; it may have been out of memory") from error
    if "error" in answer:
        raise FewbitsError(answer["error"])
    return answer["answer"]


def _serve(name: str, device: str | None, dtype: str | None, threads: int) -> None:
    """Load a model and answer until nobody asks any more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    torch.set_num_threads(threads)
    loaded: Loaded | None = None
    for line in sys.stdin:
        what, new_tokens = json.loads(line)
        try:
            loaded = loaded or open_model(name, device=device, dtype=dtype)
            if what == "facts":
                answer: dict[str, Any] = {"answer": _facts(name, loaded)}
            elif what == "peak":
                answer = {"answer": peak_rss_bytes()}
            else:
                answer = {"answer": _run(loaded.model, new_tokens)}
        except FewbitsError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _facts(name: str, loaded: Loaded) -> dict[str, Any]:
    model = loaded.model
    return {"model": loaded.name, "dtype": loaded.dtype, "device": torch.device(loaded.device).type,
            "prompt": _prompt(model, LONG_PROMPT).shape[1], "bytes_per_token": bytes_per_token(name, model),
            "kernels": [k for path, module in model.named_modules() if (k := _kernels(path, module))]}


def _kernels(path: str, module: Any) -> dict[str, Any] | None:
    packed = module.table if isinstance(module, TiedHead) else module
    if not isinstance(packed, PackedMatrix) or isinstance(module, QuantEmbedding):
        return None
    from fewbits.quant.formats import layout_name

    device = packed.packed_tensors()["weight_shape"].device.type
    def choice(tokens: int) -> list[dict[str, Any]]:
        return [explain(fmt, tokens, device).__dict__ for fmt, _ in packed.layout.runs]

    return {"name": path, "layout": layout_name(packed.layout), "shape": [packed.rows, packed.columns],
            "decode": choice(1), "prefill": choice(LONG_PROMPT)}


def bytes_per_token(name: str, model: Any) -> int:
    """Bytes of the weight files that are read to decode one token."""
    entries = open_source(name).entries
    paths = {id(module): path for path, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = isinstance(head, TiedHead) or getattr(head, "weight", None) is getattr(table, "weight", 0)
    looked_up = f"{paths[id(table)]}."
    config = model.config.get_text_config()
    experts = max(getattr(config, k, 0) or 0 for k in ("num_experts", "num_local_experts", "n_routed_experts"))
    share = getattr(config, "num_experts_per_tok", experts) / experts if experts else 1.0
    total = 0.0
    for key, entry in entries.items():
        if key.startswith(looked_up) and not tied:
            total += entry.nbytes / table.num_embeddings
        else:
            total += entry.nbytes * (share if ".experts." in key else 1.0)
    return round(total)


def _prompt(model: Any, tokens: int) -> torch.Tensor:
    count = max(1, min(tokens, (context_length(model) or 2 * tokens) // 2))
    vocabulary = model.get_input_embeddings().num_embeddings
    return (torch.arange(count, device=model.device) * 37 % vocabulary)[None]


@torch.inference_mode()
def _run(model: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds for a long prompt and its first token, and for ``new_tokens`` after the first of a short one."""
    prefill, _ = _generate(model, _prompt(model, LONG_PROMPT), 1)
    first, _ = _generate(model, _prompt(model, PROMPT), 1)
    whole, made = _generate(model, _prompt(model, PROMPT), new_tokens + 1)
    assert made == new_tokens + 1
    return prefill, max(whole - first, 1e-9)


def _generate(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[float, int]:
    start = now(model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=new_tokens,
                         max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                         pad_token_id=0)
    return now(model.device) - start, out.shape[1] - ids.shape[1]


if __name__ == "__main__":
    _serve(*json.loads(sys.argv[1]))

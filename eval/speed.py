"""Decoding speed and memory of this process."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.quant.errors import FewbitsError


@dataclass(frozen=True)
class Speed:
    """Batch 1, greedy, medians over repeats.

    Attributes:
        decode_tokens_per_s: new tokens after the first, each from one forward pass with a cache.
        prefill_tokens_per_s: prompt tokens, timed apart.
        prompt_tokens, new_tokens, repeats: what was run.
    """

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    prompt_tokens: int
    new_tokens: int
    repeats: int


@torch.inference_mode()
def decode_speed(model: Any, *, prompt_tokens: int = 16, new_tokens: int = 32, repeats: int = 3) -> Speed:
    """Time a greedy decode of ``new_tokens`` after an arbitrary prompt; one short untimed run first.

    The loop is bare (one forward pass and one argmax a token), so it leaves out what ``generate`` adds around it. An
    end-of-text token does not end it. Raises FewbitsError when a count is below 1.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        if value < 1:
            raise FewbitsError(f"{name} = {value}: must be at least 1")
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = (torch.arange(prompt_tokens, device=model.device) * 37 % vocabulary).unsqueeze(0)
    _decode(model, prompt, 2)
    runs = [_decode(model, prompt, new_tokens) for _ in range(repeats)]
    return Speed(
        decode_tokens_per_s=new_tokens / statistics.median(decode for _, decode in runs),
        prefill_tokens_per_s=prompt_tokens / statistics.median(prefill for prefill, _ in runs),
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats,
    )


def _decode(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt and for ``new_tokens`` forward passes after it."""
    start = now(model.device)
    out = model(prompt, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    middle = now(model.device)
    for _ in range(new_tokens):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return middle - start, now(model.device) - middle


def now(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type != "cpu":  # kernels are only queued until then
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def peak_rss_bytes() -> int:
    """The most resident memory this process has held, bytes (not that of a GPU)."""
    status = Path("/proc/self/status")
    if status.exists():  # VmHWM starts anew at exec; ru_maxrss inherits the parent's peak on Linux
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

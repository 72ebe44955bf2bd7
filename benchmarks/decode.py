"""Decode speed on the CPU at batch 1: the quantized model beside the dense float32 original, in one run.

    python -m benchmarks.decode CHECKPOINT [--threads 2] [--rounds 5]

The two take turns, so that a busy machine disturbs both; the figures are medians over the rounds.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

import fewbits
from benchmarks import protocol
from fewbits.eval.speed import decode_speed
from fewbits.quant.source import open_source


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {"original, float32": fewbits.load(open_source(protocol.real_model()).path)}
    models |= {path.name: fewbits.load(path) for path in args.checkpoints}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(args.rounds):
        for name, model in models.items():
            speed = decode_speed(model, new_tokens=args.new_tokens, repeats=1)
            runs[name].append((speed.decode_tokens_per_s, speed.prefill_tokens_per_s))
    rows = []
    for name, speeds in runs.items():
        decode, prefill = zip(*speeds)
        rows.append({
            "model": name, "decode_tokens_per_s": statistics.median(decode), "decode_min": min(decode),
            "decode_max": max(decode), "prefill_tokens_per_s": statistics.median(prefill), "rounds": args.rounds,
        })
        print(f"{name}: decode {statistics.median(decode):.1f} tokens/s ({min(decode):.1f} to {max(decode):.1f}), "
              f"prefill {statistics.median(prefill):.0f}")
    protocol.save("decode", rows)


if __name__ == "__main__":
    main()

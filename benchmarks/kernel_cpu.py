"""Packed integer products on the CPU beside float32 ``F.linear``, in one run.

    python benchmarks/kernel_cpu.py [--sizes 1536 4096] [--tokens 1 8 64] [--threads 2] [--json kernel_cpu.json]

Every repetition times one call of each kernel in a row of the table, in turn; the figure is the least of them, which a
busy machine disturbs least. ``gemv`` and ``dense`` are the two ways of ``KERNELS``; ``chosen`` is what dispatch takes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fewbits.kernels.cpu import int_matmul as cpu
from fewbits.kernels.dispatch import Prepared, matmul, prepare, select_kernel
from fewbits.quant.formats.integer import IntFormat

SECONDS = 1.0  # for each row of the table
MOST_REPEATS = 500


def make(size: int, bits: int, group: int, symmetric: bool) -> Prepared:
    fmt = IntFormat(bits, group, symmetric)
    codes = torch.randint(0, 1 << bits, (size, size), dtype=torch.uint8)
    params = {"scale": torch.rand(size, size // group).half()}
    if not symmetric:
        params["zero_point"] = torch.randint(0, 1 << bits, (size, size // group), dtype=torch.uint8)
    return prepare(fmt, fmt.pack(codes, params), size, size)


def side_by_side(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Least microseconds a call of each."""
    best = dict.fromkeys(runs, float("inf"))
    until = time.perf_counter() + SECONDS
    for _ in range(MOST_REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
        if time.perf_counter() > until:
            break
    return {name: seconds * 1e6 for name, seconds in best.items()}


def measure(size: int, tokens: int, bits: int, group: int, symmetric: bool) -> dict[str, object]:
    prepared = make(size, bits, group, symmetric)
    assert prepared.operands is not None
    operands, x, weight = prepared.operands, torch.randn(tokens, size), torch.randn(size, size)
    found = side_by_side({
        "linear": lambda: torch.nn.functional.linear(x, weight),
        "gemv": lambda: cpu.gemv(x, *operands, bits),
        "dense": lambda: cpu.dense(x, *operands, bits),
        "chosen": lambda: matmul(x, prepared),
    })
    return {"format": prepared.format.name, "N=K": size, "M": tokens,
            **{f"{name}_us": round(us, 1) for name, us in found.items()},
            "speedup": round(found["linear"] / found["chosen"], 2),
            "kernel": select_kernel(prepared.format, tokens, x.device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1536, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if not cpu.available():
        parser.error("no C compiler: the kernel cannot be built")
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for size in options.sizes:
        for tokens in options.tokens:
            for bits in options.bits:
                rows.append(measure(size, tokens, bits, options.group, options.symmetric))
                if len(rows) == 1:
                    print("  ".join(f"{name:>10}" for name in rows[0]))
                print("  ".join(f"{value!s:>10}" for value in rows[-1].values()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

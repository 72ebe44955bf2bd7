"""Products with packed weights of integers, levels and tables on the CPU beside float32 ``F.linear``, in one run.

    python benchmarks/kernel_cpu.py [--formats int4_g64 ternary_g128 nf4_g64] [--sizes 1536 4096] [--tokens 1 8 64]
                                    [--threads 2] [--json kernel_cpu.json]

Every repetition times one call of each kernel in a row of the table, in turn; the figure is the least of them, which a
busy machine disturbs least. ``gemv`` and ``dense`` are the two ways of ``KERNELS`` and of ``CODED_KERNELS``; ``chosen``
is what dispatch takes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fewbits.kernels.coded import CODED_KERNELS
from fewbits.kernels.cpu import int_matmul as cpu
from fewbits.kernels.dispatch import KERNELS, Prepared, matmul, prepare, select_kernel
from fewbits.quant.formats import parse_format
from fewbits.quant.types import Segment

SECONDS = 1.0  # for each row of the table
MOST_REPEATS = 500


def make(size: int, name: str) -> Prepared:
    """Of normal values; the rows repeat, since the search for their parameters takes longer than all products."""
    fmt, own = parse_format(name), 64
    values = torch.randn(own, size)
    fitted = fmt.fit(values.view(own, fmt.groups(size), -1), None)
    codes = Segment.nearest(fmt, values, fitted).codes
    times = -(-size // own)
    params = {k: v.repeat(times, 1)[:size] for k, v in fitted.items()}
    return prepare(fmt, fmt.pack(codes.repeat(times, 1)[:size], params), size, size)


def ways(prepared: Prepared, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The two ways to compute a product with this weight."""
    if (operands := prepared.operands) is not None:
        bits = prepared.format.code_bits
        return {way: lambda k=KERNELS[f"cpu_{way}"]: k.run(x, *operands, bits) for way in ("gemv", "dense")}
    coded = prepared.coded
    assert coded is not None
    return {way: lambda k=CODED_KERNELS[f"cpu_group_{way}"]: k.run(x, coded, prepared.format)
            for way in ("gemv", "dense")}


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


def measure(size: int, tokens: int, name: str) -> dict[str, object]:
    prepared, x, weight = make(size, name), torch.randn(tokens, size), torch.randn(size, size)
    found = side_by_side({
        "linear": lambda: torch.nn.functional.linear(x, weight), **ways(prepared, x),
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
    parser.add_argument("--formats", nargs="+", default=[f"int{bits}_g64" for bits in range(1, 9)])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if not cpu.available():
        parser.error("no C compiler: the kernel cannot be built")
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for size in options.sizes:
        for tokens in options.tokens:
            for name in options.formats:
                rows.append(measure(size, tokens, name))
                if len(rows) == 1:
                    print("  ".join(f"{name:>10}" for name in rows[0]))
                print("  ".join(f"{value!s:>10}" for value in rows[-1].values()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

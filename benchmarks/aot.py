"""Compile every Triton kernel for GPUs that need not be there, print what the machine code says, write it as JSON.

    python benchmarks/aot.py [--quick] --json aot.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fewbits.kernels.aot import CHIPS, FULL, QUICK, judge_elsewhere

COLUMNS = ("kernel", "format", "chip", "tokens", "dtype", "registers", "spills", "shared_bytes", "occupancy",
           "instructions_per_weight", "bytes_per_thread_load", "mma")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one asymmetric format per bit width")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    rows = judge_elsewhere(QUICK if options.quick else FULL, CHIPS)
    widths = [max(len(c), *(len(str(r[c])) for r in rows)) for c in COLUMNS]
    for line in (dict(zip(COLUMNS, COLUMNS)), *rows):
        print("  ".join(str(line[c]).ljust(w) for c, w in zip(COLUMNS, widths)).rstrip())
    if options.json:
        options.json.write_text(json.dumps({"kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

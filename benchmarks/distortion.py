"""Mean squared error of formats on normal values of one deviation, beside the bound of rate-distortion theory, 4^-bits.

    python -m benchmarks.distortion [--values 256000] [--formats trellis2 rvq2 ...]

A gap of 6.02 dB is worth one bit. Bits are those of codes and gains; scales of a rotation and codebooks are left out.
"""

from __future__ import annotations

import math
import time

import torch

from benchmarks import protocol
from fewbits.quant.formats import parse_format
from fewbits.quant.types import nominal_bits

FORMATS = [
    *(f"trellis{b}{s}" for s in ("_l10", "", "_l14", "_l16") for b in (1, 2, 3, 4)),
    *(f"{family}{b}" for family in ("rvq", "pvq") for b in (2, 3, 4)), "vq8_v4", "vq8x2_v8", "vq8_v2",
]


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--values", type=int, default=256_000)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    args = parser.parse_args()
    values = torch.randn(64, args.values // 512 * 8, generator=torch.Generator().manual_seed(0))
    rows = []
    for name in args.formats:
        fmt, start = parse_format(name), time.perf_counter()
        params = fmt.fit(values, None)
        codes = fmt.encode(values, params)
        seconds = time.perf_counter() - start
        error = float((fmt.decode(codes, params) - values).square().mean() / values.square().mean())
        bits = nominal_bits(fmt)
        row = {"format": fmt.name, "bits": bits, "error": error, "gap_db": 10 * math.log10(error * 4**bits),
               "weights_per_second": values.numel() / seconds}
        rows.append(row)
        print(f"{fmt.name}: {bits:.3f} bits, {error:.5f}, {row['gap_db']:.2f} dB above the bound, "
              f"{row['weights_per_second']:.3g} weights/s", flush=True)
    protocol.save("distortion", rows)


if __name__ == "__main__":
    main()

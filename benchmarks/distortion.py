"""Mean squared error of formats on normal values of one deviation, beside the bound of rate-distortion theory, 4^-bits.

    python -m benchmarks.distortion [--tiles 1000]

A gap of 6.02 dB is worth one bit. Scales and other parameters are left out: these are errors at the bits of the codes.
"""

from __future__ import annotations

import math
import time

import torch

from benchmarks import protocol
from fewbits.quant.formats.trellis import TrellisFormat


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--tiles", type=int, default=1000, help="of 256 values")
    parser.add_argument("--states", type=int, nargs="+", default=[10, 12, 14, 16])
    args = parser.parse_args()
    values = torch.randn(32, 8 * args.tiles, generator=torch.Generator().manual_seed(0))
    rows = []
    for state_bits in args.states:
        for bits in (1, 2, 3, 4):
            fmt, start = TrellisFormat(bits, state_bits), time.perf_counter()
            decoded = fmt.decode(fmt.encode(values, {}), {})
            seconds = time.perf_counter() - start
            error = float((decoded - values).square().mean() / values.square().mean())
            row = {"format": fmt.name, "state_bits": state_bits, "bits": bits, "error": error,
                   "gap_db": 10 * math.log10(error * 4**bits), "weights_per_second": values.numel() / seconds}
            rows.append(row)
            print(f"{fmt.name}: {error:.5f}, {row['gap_db']:.2f} dB above the bound, "
                  f"{row['weights_per_second']:.3g} weights/s", flush=True)
    protocol.save("distortion", rows)


if __name__ == "__main__":
    main()

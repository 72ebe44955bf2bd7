"""4-bit weights whose inputs are rounded to 4 bits too, simulated: with and without inputs evened out (LLM-FP4).

    FEWBITS_DATA=... python -m benchmarks.activations [--layouts fpq4 scl:fpq4] [--activations fpq4_row]

Both by recipe llm-fp4 on the protocol of ``protocol.py``. A layout of ``scl:`` shifts large inputs down by powers of
two and their weights up. Rows that are there are kept.
"""

from __future__ import annotations

import fewbits
from benchmarks import protocol
from fewbits.quant.source import open_source

NAME = "activations"


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--layouts", nargs="+", default=["fpq4", "scl:fpq4"])
    parser.add_argument("--activations", nargs="+", default=["fpq4_row"])
    args = parser.parse_args()
    source, rows = protocol.real_model(), protocol.load_rows(NAME)
    baseline = open_source(source).path
    for layout in args.layouts:
        missing = [a for a in (None, *args.activations)
                   if not any((r["layout"], r["activations"]) == (layout, a) for r in rows)]
        if not missing:
            continue
        out = protocol.RESULTS / "checkpoints" / f"{NAME}-{layout}".replace(":", "-")
        scales = {"quantizer.scales": "inputs"} if layout.startswith("scl:") else {}
        made = fewbits.quantize(source, out, recipe="llm-fp4", force=True, overrides={
            **protocol.given(named=True), "format.layout": layout, **scales})
        for activations in missing:
            scores = protocol.evaluate(out, baseline, activations=activations)
            kept = {k: v for k, v in scores.items() if isinstance(v, float | int)}
            rows.append({"layout": layout, "activations": activations, "bits_per_weight": made.bits_per_weight,
                         "commit": protocol.provenance()["commit"], **kept})
            print(f"{layout}, inputs {activations or 'as they are'}: KL {scores['kl_mean']:.4f}")
            protocol.save(NAME, rows)


if __name__ == "__main__":
    main()

"""Quality at equal stored bits: RTN and GPTQ at 4, 3 and 2 bits, group 64, on the protocol of ``protocol.py``.

    FEWBITS_DATA=... python -m benchmarks.quality [--bits 4 3 2] [--recipes gptq rtn nupes:nupes3] [--effort fast]

A recipe may be followed by a layout of its own. With --resume, rows that are there are kept.
"""

from __future__ import annotations

import fewbits
from benchmarks import protocol
from fewbits.quant.source import open_source


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--recipes", nargs="+", default=["gptq", "rtn"])
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys, as in fewbits quantize")
    parser.add_argument("--effort", help="of the refiners: fast, normal or best")
    parser.add_argument("--name", default="quality")
    args = parser.parse_args()

    from fewbits.quant.recipe import load_recipe, parse_settings

    source = protocol.real_model()
    rows = protocol.load_rows(args.name) if args.resume else []
    baseline = open_source(source).path
    for entry in args.recipes:
        recipe, _, named = entry.partition(":")
        own = {**parse_settings(args.set), **({"format.layout": named} if named else {})}
        layout = own.get("format.layout") or load_recipe(recipe).format.layout  # it says how many bits
        for bits in [layout] if layout else args.bits:
            wanted = (recipe, bits, args.set, args.effort)
            if any((r["recipe"], r["bits"], r["settings"], r.get("effort")) == wanted for r in rows):
                continue
            overrides = {**protocol.given(named=bool(layout)), **own}
            if not layout:
                overrides["format.bits"] = bits
            name = "-".join(map(str, filter(None, (args.name, recipe, bits, args.effort))))
            out = protocol.RESULTS / "checkpoints" / name.replace(":", "-")
            made = fewbits.quantize(source, out, recipe=recipe, overrides=overrides, force=True, effort=args.effort)
            scores = protocol.evaluate(out, baseline)
            left_out = ("per_text", "tasks", "protocol", "output", "model", "baseline")  # long, or paths
            row = {"recipe": recipe, "bits": bits, "seed": 0, "settings": args.set,
                   "effort": args.effort, "commit": protocol.provenance()["commit"],
                   **{k: v for k, v in (made.to_json() | scores).items() if k not in left_out}}
            rows.append(row)
            print(f"{recipe} {bits} bits: {made.bits_per_weight:.3f} stored, perplexity {scores['perplexity']:.2f}, "
                  f"KL {scores['kl_mean']:.4f}, {made.cpu_seconds:.0f} CPU s")
            protocol.save(args.name, rows)


if __name__ == "__main__":
    main()

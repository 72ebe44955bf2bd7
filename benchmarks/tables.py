"""Writes docs/results.md from what the other benchmarks left in benchmarks/runs. Numbers are never typed by hand.

    python -m benchmarks.tables
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks import protocol
from fewbits.quant.formats import resolve_layout
from fewbits.quant.types import nominal_bits

Row = dict[str, Any]


def _quality(rows: list[Row]) -> str:
    return _table(
        ["recipe", "bits", "stored bits per weight", "over all", "perplexity", "KL to the original", "top-1", "CPU s"],
        [[r["recipe"], r["bits"], f"{r['bits_per_weight']:.3f}", f"{r['bits_per_weight_total']:.2f}",
          *_scores(r), f"{r['cpu_seconds']:.0f}"] for r in rows],
    ) + _original(rows)


def _levels(rows: list[Row]) -> str:
    return _table(
        ["recipe", "layout", "bits of codes alone", "stored bits per weight", "over all", "perplexity",
         "KL to the original", "top-1", "CPU s"],
        [[r["recipe"], r["bits"], f"{_code_bits(r['bits']):.2f}", f"{r['bits_per_weight']:.3f}",
          f"{r['bits_per_weight_total']:.2f}", *_scores(r), f"{r['cpu_seconds']:.0f}"]
         for r in sorted(rows, key=lambda r: (round(r["bits_per_weight"]), r["kl_mean"]))],
    ) + _original(rows)


def _code_bits(layout: str) -> float:
    """What a paper would count: bits of codes, over long rows. Five trits make a byte."""
    parsed = resolve_layout(layout, COLUMNS)
    return sum(columns * (1.6 if fmt.name.endswith("_b3") else nominal_bits(fmt)) for fmt, columns in parsed.runs
               ) / COLUMNS


COLUMNS = 1 << 15


def _scores(r: Row) -> list[str]:
    """Perplexity, KL and top-1 agreement."""
    return [f"{r['perplexity']:.2f} ± {r['perplexity_stderr']:.2f}", f"{r['kl_mean']:.4f} ± {r['kl_stderr']:.4f}",
            f"{100 * r['top1_agreement']:.1f} %"]


def _original(rows: list[Row]) -> str:
    return f"\nThe original has perplexity {rows[0]['perplexity_baseline']:.2f} on the same windows.\n"


def _refined(rows: list[Row]) -> str:
    def line(r: Row) -> list[Any]:
        last = r["refined"][-1]
        rest = r["seconds_calibration"] + r["seconds_quantization"]
        name = ", ".join(filter(None, (r["recipe"], *r["settings"], r.get("effort"))))
        return [name, r["bits"], f"{r['bits_per_weight']:.3f}", *_scores(r),
                ", ".join(x["refiner"] for x in r["refined"]),
                f"{last['before']:.4f} to {last['after']:.4f}", f"{rest:.0f}", f"{r['seconds_refining']:.0f}",
                f"{r['cpu_seconds']:.0f}"]

    return _table(["recipe", "bits", "stored bits per weight", "perplexity", "KL to the original", "top-1", "refiners",
                   "held-out loss", "s: quantizing", "s: refining", "CPU s"], [line(r) for r in rows]
                  ) + _original(rows)


def _activations(rows: list[Row]) -> str:
    return _table(["layout", "stored bits per weight", "inputs", "perplexity", "KL to the original", "top-1"],
                  [[r["layout"], f"{r['bits_per_weight']:.3f}", r["activations"] or "as they are", *_scores(r)]
                   for r in rows]) + _original(rows)


def _distortion(rows: list[Row]) -> str:
    return _table(
        ["format", "bits", "squared error", "bound at these bits", "gap, dB", "weights/s"],
        [[r["format"], f"{r['bits']:.3f}", f"{r['error']:.5f}", f"{4.0 ** -r['bits']:.5f}", f"{r['gap_db']:.2f}",
          f"{r['weights_per_second']:.1e}"] for r in rows],
    )


def _heads(rows: list[Row]) -> str:
    return _table(
        ["format of the head", "stored bits per weight", "bytes", "KL to the original", "perplexity", "top-1", "CPU s"],
        [[r["format"], f"{r['bits_per_weight']:.3f}", f"{r['bytes']:,}", f"{r['kl_mean']:.4f} ± {r['kl_stderr']:.4f}",
          f"{r['perplexity']:.2f}", f"{100 * r['top1']:.1f} %", f"{r['cpu_seconds']:.0f}"] for r in rows],
    )


def _trained(rows: list[Row]) -> str:
    """One line a model, over its seeds, at the rate that was best on held-out text."""
    def line(own: list[Row]) -> list[Any]:
        bits = [r["bits_per_byte"] for r in own]
        return [own[0]["title"], own[0]["width"], f"{own[0]['bytes_linears']:,}", f"{own[0]['bytes']:,}",
                f"{statistics.mean(bits):.3f}", f"{min(bits):.3f} to {max(bits):.3f}", len(own),
                f"{statistics.mean(r['cpu_seconds'] for r in own):.0f}"]

    names = dict.fromkeys(r["model"] for r in rows)
    return _table(["weights", "width", "bytes of linears", "bytes", "bits per byte", "least to most", "seeds", "CPU s"],
                  [line(_at_best_rate([r for r in rows if r["model"] == name])) for name in names])


def _at_best_rate(rows: list[Row]) -> list[Row]:
    rate = min(rows, key=lambda r: (r["seed"], r["held_out"]))["rate"]
    return [r for r in rows if r["rate"] == rate]


def _allocation(rows: list[Row]) -> str:
    def foreseen(r: Row) -> list[str]:
        p, held = r.get("predicted"), r.get("held_out")
        if not p or not held:
            return ["", "", ""]
        low, high = p["band"]
        return [f"{p['kl_mean']:.3f} ({low:.3f} to {high:.3f})", f"{held['kl_mean']:.3f}",
                "yes" if low <= held["kl_mean"] <= high else "no"]

    def name(r: Row) -> str:
        search = r.get("search") or {}
        return f"{r['recipe']} ({search['generations']} generations)" if search else r["recipe"]

    rows = sorted(rows, key=lambda r: (round(r["bits_per_weight"], 2), r["kl_mean"]))
    return _table(
        ["recipe", "budget", "stored bits per weight", "KL to the original", "predicted, held-out text",
         "measured, held-out text", "in the band", "CPU s: survey",
         "quantization", "wall s: allocation", "measuring plans"],
        [[name(r), r["budget"], f"{r['bits_per_weight']:.4f}", f"{r['kl_mean']:.4f} ± {r['kl_stderr']:.4f}",
          *foreseen(r), *(f"{r[k]:.0f}" if k in r else "" for k in ("survey_cpu_seconds", "cpu_seconds")),
          *(f"{r['seconds'][k]:.1f}" if k in r.get("seconds", {}) else "" for k in ("allocation", "measuring plans"))]
         for r in rows],
    )


def _prediction(rows: list[Row]) -> str:
    def inside(r: Row) -> bool:
        low, high = r["predicted"]["band"]
        return bool(low <= r["measured"]["kl_mean"] <= high)

    held = [r for r in rows if not r["point"]]
    widest = max((r["predicted"]["band"][1] / r["predicted"]["band"][0] for r in held), default=0.0)
    return _table(
        ["budget", "stored bits per weight", "damage", "predicted", "band", "measured", "in the band"],
        [[r["budget"], f"{r['bits_per_weight']:.4f}", f"{r['damage']:.4f}", f"{r['predicted']['kl_mean']:.4f}",
          "{:.4f} to {:.4f}".format(*r["predicted"]["band"]),
          f"{r['measured']['kl_mean']:.4f} ± {r['measured']['kl_stderr']:.4f}",
          "a run to go by" if r["point"] else "yes" if inside(r) else "no"]
         for r in sorted(rows, key=lambda r: r["budget"])],
    ) + (f"\nIn the band: {sum(map(inside, held))} of {len(held)}; bands are at most a factor {widest:.2f} from end to "
         "end.\n")


def _trust(rows: list[Row]) -> str:
    return _table(
        ["damage model", "Spearman, 2 bits", "Spearman, 2 and 4 bits", "tensors", "CPU s"],
        [[r["damage"], f"{r['rho']:.3f}", f"{r['rho_both']:.3f}", r["tensors"], f"{r['cpu_seconds']:.0f}"]
         for r in sorted(rows, key=lambda r: -r["rho"])],
    )


def _speed(rows: list[Row]) -> str:
    return _table(
        ["toolkit", "bits", "CPU s", "wall s", "perplexity", "KL to the original", "peak memory"],
        [[r["toolkit"], r["bits"], f"{r['cpu_seconds']:.0f}", f"{r['seconds']:.0f}", f"{r['perplexity']:.2f}",
          f"{r['kl_mean']:.4f} ± {r['kl_stderr']:.4f}", f"{r['peak_rss_bytes'] / 1e9:.2f} GB"] for r in rows],
    )


def _memory(rows: list[Row]) -> str:
    return _table(
        ["layers", "checkpoint", "peak beyond the interpreter", "share of the checkpoint", "wall s"],
        [[r["layers"], f"{r['checkpoint_bytes'] / 1e9:.2f} GB", f"{(r['peak'] - r['before']) / 1e9:.3f} GB",
          f"{r['share']:.3f}", f"{r['seconds']:.0f}"] for r in rows],
    )


def _llamacpp(found: Any) -> str:
    agreement = found["agreement"]
    return _table(
        ["file", "bytes of tensors", "perplexity", "nats per token above ours"],
        [[r["file"], f"{r['tensor_bytes']:,}", f"{r['perplexity']:.2f} ± {r['stderr']:.2f}",
          f"{r['above_ours']:+.4f} ± {r['above_ours_stderr']:.4f}" if r["above_ours"] else ""] for r in found["files"]],
    ) + (f"\n{found['windows']} windows of {found['length']} tokens; the importance matrix is of "
         f"{found['imatrix_rows']} rows. llama.cpp and fewbits computing one file differ by a KL of "
         f"{agreement['kl_mean']:.4f} nats per token and agree on the likeliest token in "
         f"{100 * agreement['top1_agreement']:.1f} % of places: llama.cpp rounds activations to 8 bits.\n")


def _vllm(rows: list[Row]) -> str:
    def outcome(r: Row) -> list[str]:
        if "refused" in r:
            return ["", "", f"it has no kernel; {r['read_alike']} of {r['matrices']} matrices are read back alike"]
        return [f"{r['tokens_agree']} of {r['tokens']}", f"{r['largest_logprob_difference']:.1e}", ""]

    return _table(
        ["case", "vLLM's method", "computed in", "greedy tokens that agree", "largest difference of a log-probability",
         "refused"],
        [[r["case"], r.get("quantization", ""), r.get("dtype", ""), *outcome(r)] for r in rows],
    )


def _decode(rows: list[Row]) -> str:
    return _table(
        ["model", "decode tokens/s", "least to most", "prefill tokens/s"],
        [[r["model"], f"{r['decode_tokens_per_s']:.1f}", f"{r['decode_min']:.1f} to {r['decode_max']:.1f}",
          f"{r['prefill_tokens_per_s']:.0f}"] for r in rows],
    )


def _reloaded(rows: list[Row]) -> str:
    arms: dict[tuple[str, int], dict[int, Row]] = {}  # by seed, at the rate that suits seed 0 best
    for r in sorted(rows, key=lambda r: r["held_out"], reverse=True):
        own = [q for q in rows if (q["scale"], q["hidden"], q["seed"]) == (r["scale"], r["hidden"], 0)]
        if not own or min(own, key=lambda q: q["held_out"])["rate"] == r["rate"]:
            arms.setdefault((r["scale"], r["hidden"]), {})[r["seed"]] = r

    def over_seeds(values: list[float], digits: int = 4, sign: str = "") -> str:
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{sign}.{digits}f}{spread}"

    def versus(one: tuple[str, int], other: tuple[str, int]) -> list[str]:
        seeds = sorted(arms[one].keys() & arms[other].keys())
        return [f"{one[0]} of {one[1]}", f"{other[0]} of {other[1]}",
                over_seeds([arms[one][s]["test"] - arms[other][s]["test"] for s in seeds], sign="+"), str(len(seeds))]

    shown = sorted(arms, key=lambda arm: (arm[1], arm))
    pairs = [(("absmedian", h), ("absmean", h)) for _, h in shown]
    pairs += [((s, 2 * h), ("float", h)) for s, h in shown] + [((s, h), ("float", h)) for s, h in shown]
    pairs = [(a, b) for a, b in dict.fromkeys(pairs) if a != b and {a, b} <= arms.keys()]
    return _table(
        ["weights", "hidden size", "parameters", "in linears", "rate", "held out, bits per byte",
         "test, bits per byte", "test, perplexity of a token", "seeds"],
        [[s, h, f"{r['parameters']:,}", f"{r['in_linears']:,}", f"{r['rate']:g}",
          *(over_seeds([q[k] for q in arms[s, h].values()], d) for k, d in
            (("held_out", 4), ("test", 4), ("perplexity", 2))), len(arms[s, h])]
         for s, h in shown for r in [next(iter(arms[s, h].values()))]],
    ) + "\n" + _table(["this", "less that", "test, bits per byte, by seed", "seeds"], [versus(a, b) for a, b in pairs])


SECTIONS: dict[str, tuple[str, str, Callable[[Any], str]]] = {
    "quality": (
        "Quality",
        "SmolLM2-135M-Instruct, linears of the decoder blocks, group 64, asymmetric. Calibration: the first 128 x 512 "
        "tokens of WikiText-2 valid. Perplexity on 40 windows of 1024 tokens of WikiText-2 test, KL (nats per token) "
        "on the first 4; ± is one standard error. `python -m benchmarks.quality`", _quality),
    "trellis": (
        "Trellis codes",
        "Recipe trellis, the same protocol: 12 bits of state, nothing tuned. "
        "`python -m benchmarks.quality --recipes trellis --bits 2 3 4 --name trellis`", _quality),
    "rvq": (
        "Residual vector codes", "The same, recipe rvq. "
        "`python -m benchmarks.quality --recipes rvq --bits 2 --name rvq`", _quality),
    "pvq": (
        "Pyramid vectors", "The same, recipe pvq. "
        "`python -m benchmarks.quality --recipes pvq --bits 2 --name pvq`", _quality),
    "vptq": (
        "Vectors with codebooks of their own", "The same, recipe vptq. "
        "`python -m benchmarks.quality --recipes vptq --bits 2 --name vptq`", _quality),
    "additive": (
        "Sums of vectors with codebooks of their own", "The same with two codebooks for vectors of 8 (AQLM). "
        "`python -m benchmarks.quality --recipes vptq --bits 2 --set format.vector=8 --name additive`", _quality),
    "lr2vq": (
        "Vectors of low rank", "The same, recipe lr2vq. "
        "`python -m benchmarks.quality --recipes lr2vq --bits 2 --name lr2vq`", _quality),
    "fwsvd": (
        "A term of low rank beside integers", "The same, recipe fwsvd. "
        "`python -m benchmarks.quality --recipes fwsvd --bits 3 --name fwsvd`", _quality),
    "levels": (
        "Few levels, and number formats",
        "The same protocol, any group size that is not named the largest power of two up to 128. Ternary codes five to "
        "a byte where the name ends in _b3. Best first among those of about as many bits; bits of codes alone are what "
        "papers count (1.61 for PTQ1.61). `python -m benchmarks.quality --name levels --resume --recipes ternary "
        "bitnet-absmean bitnet-absmedian ptq161 ifairy db-llm db-llm:binary2 bitmod bitmod:bitmod3 nupes nupes:nupes3 "
        "rtn:int3_g64 rtn:int4_g64 gptq:int4_g64 llm-fp4 nf4 mxfp4 nvfp4`; clipped GPTQ integers of 3 bits are in the "
        "first table", _levels),
    "refined": (
        "Refined",
        "The same protocol: quantized on the first 128 x 512 tokens of WikiText-2 valid, then tuned end to end on "
        "the first 256 rows of it, 8 more rows held out to judge by. Loss before and after: of the last refiner, nats "
        "per token on those held-out rows. Seconds: wall, of quantizing with its calibration, and of refining. "
        "`python -m benchmarks.quality --name refined --resume --bits 2 --recipes best-2bit best-2bit-trellis "
        "pv-tuning`, and so on", _refined),
    "activations": (
        "Inputs of 4 bits too, simulated",
        "Recipe llm-fp4, the same protocol; inputs of quantized linears rounded token by token, one scale and the best "
        "split into exponent and mantissa for each (fpq4_row). scl: with quantizer.scales = inputs, which evens inputs "
        "out by powers of two. A simulation: products are in floating point. `python -m benchmarks.activations`",
        _activations),
    "heads": (
        "Output heads", "The head of SmolLM2-135M-Instruct alone, 49152 x 576, all else in float32; statistics of "
        "64 x 512 tokens of WikiText-2 valid, KL and perplexity on 4 windows of 1024 tokens of test. pq8_v2 is recipe "
        "vq-logits; pq12_v576 gives every token one of 4096 rows, as the paper does. `python -m benchmarks.heads`",
        _heads),
    "ifairy-trained": (
        "Complex weights, trained from scratch", "Two decoder blocks of Llama on the bytes of WikiText-2 valid, 500 "
        "steps of 16 x 128 bytes on the first nine tenths, the rate chosen on the last, judged on 1024 windows of 128 "
        "bytes of test; embedding, head and norms are float and count 2 bytes a number. So short a training says which "
        "weights learn fastest, not which learn most. `python -m benchmarks.ifairy`", _trained),
    "distortion": (
        "Distortion",
        "Of normal values of one deviation, codes alone. `python -m benchmarks.distortion`", _distortion),
    "allocation": (
        "Budgets",
        "The same protocol, at equal stored bits, best first where bits are equal; GPTQ for all rows (plain rounding "
        "for finequant), with one calibration of the original model, as in `fewbits sweep`. Predictions are those of "
        "the damage model without any run on this model to go by, for held-out rows of the calibration text; one "
        "survey serves all budgets of a recipe, and what an earlier row measured is not measured again, so only the "
        "first of each kind shows its whole time. AutoScheme's formats are quantized by the same GPTQ. All menus are "
        "of integers, but for auto-trellis: auto with trellis codes of 1 to 4 bits and integers from 5 on, no rivals. "
        "`python -m benchmarks.allocation`", _allocation),
    "allocation-sequential": (
        "Budgets, quantized in sequence",
        "The same, with statistics that see what was quantized before, as in `fewbits quantize`. "
        "`python -m benchmarks.allocation --sequential`", _allocation),
    "prediction": (
        "Predictions",
        "Recipe auto without rivals, as in `fewbits sweep`: two runs give the constants, the other budgets are "
        "foreseen. KL on held-out rows of the calibration text. `python -m benchmarks.prediction`", _prediction),
    "trust": (
        "Trust in damage models",
        "Rank correlation with the KL of each linear quantized alone (int2_g192, int4_g64). "
        "`python -m benchmarks.trust`", _trust),
    "speed": (
        "Time to quantize",
        "Calibration and quantization, one after the other on the same rows with the same threads; CPU seconds are "
        "user and system time of all threads. `python -m benchmarks.speed`", _speed),
    "memory": (
        "Memory to quantize",
        "Synthetic Llama checkpoints of random bfloat16 weights, 44 M parameters a layer. "
        "`python -m benchmarks.memory`",
        _memory),
    "llamacpp": (
        "In llama.cpp",
        "SmolLM2-135M-Instruct, linears as Q4_0 and the tied embedding as Q8_0 in every row but the first. GPTQ is "
        "calibrated on WikiText-2 valid; perplexity is llama.cpp's own, on WikiText-2 test, the same ids for all, and "
        "differences are paired by window. The model was distributed as Q4_1, an asymmetric grid of groups of 32, "
        "which would fit it by accident, so only Q4_0 is compared. `python -m benchmarks.llamacpp`", _llamacpp),
    "vllm_cpu": (
        "In vLLM",
        "SmolLM2-135M-Instruct, rounded to nearest, served by a CPU build of vLLM 0.32 beside fewbits.load of the same "
        "files: 32 tokens after each of 4 prompts. mixed: 2, 3, 4 and 8 bits that differ within q, k and v; table: "
        "embedding and tied head too; both by the plug-in. stock: 4 bits exported to compressed-tensors, no plug-in, "
        "in the one dtype its kernel has here; widths: 2, 4 and 8 bits exported. "
        "`python -m benchmarks.vllm_cpu`", _vllm),
    "reloaded": (
        "Ternary networks trained from scratch",
        "Decoders of 3 layers on the first 0.9 of WikiText-2 valid, 500 steps of 1024 tokens of a BPE of 512 entries; "
        "ternary linears have one scale a matrix and inputs of 8 bits, all else is float. Means over seeds ± the "
        "standard deviation between them; differences are of models with the same batches and, at one width, the same "
        "first weights. Test: 1000 windows of 128 tokens of WikiText-2 test. `python -m benchmarks.reloaded`",
        _reloaded),
    "decode": (
        "Decode on the CPU",
        "SmolLM2-135M-Instruct at batch 1, greedy, in turns in one run. `python -m benchmarks.decode`", _decode),
}


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _kept() -> dict[str, str]:
    """Sections of the page as it is, by title: those of runs whose rows are not at hand stay."""
    path = protocol.ROOT / "docs" / "results.md"
    parts = path.read_text().split("\n## ")[1:] if path.exists() else []
    return {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in parts}


def main() -> None:
    parts = ["# Results\n", "Written by `python -m benchmarks.tables` from the runs named under each table, whose rows "
             "are in `benchmarks/runs`. "
             "Times are those of a machine with other work to do: compare them within a table only.\n"]
    kept = _kept()
    for name, (title, text, render) in SECTIONS.items():
        path = protocol.RUNS / f"{name}.json"
        if not path.exists():
            parts += [kept[title]] if title in kept else []
            continue
        record = json.loads(path.read_text())
        about = record["provenance"]
        parts.append(f"## {title}\n\n{text}\n")
        parts.append(render(record["rows"]))
        rows = record["rows"] if isinstance(record["rows"], list) else []
        commits = dict.fromkeys(r.get("commit", about["commit"]) for r in rows) or {about["commit"]: None}
        parts.append(f"Commit {', '.join(commits)}, {about['cpu']}, {about['threads']} threads, "
                     f"Python {about['python']}, torch {about['torch']}, "
                     f"transformers {about['transformers']}, seed 0.\n")
    (protocol.ROOT / "docs" / "results.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()

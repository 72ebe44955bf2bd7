"""Calibration plus quantization, side by side with llm-compressor: same rows, same threads, one after the other.

    python -m benchmarks.speed --peer peer/bin/python [--bits 4] [--repeats 1]

``--peer`` is a Python with llm-compressor in it (see ``peer_llmcompressor.py``). Both checkpoints are then evaluated by
our evaluator, so that the row with the time also has the quality that the time bought.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks import protocol
from fewbits.quant.source import open_source


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--peer", help="python of the environment that has llm-compressor")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()

    source = protocol.real_model()
    dense = open_source(source).path
    rows = []
    for repeat in range(args.repeats):
        out = protocol.RESULTS / "checkpoints" / f"speed-{args.bits}"
        settings = [f"{k}={json.dumps(v)}" for k, v in protocol.CALIBRATION.items()]
        report = protocol.RESULTS / "speed-ours.json"
        command = [
            sys.executable, "-m", "fewbits.cli.main", "quantize", str(dense), "-o", str(out), "--force", "--recipe",
            "gptq", "--bits", str(args.bits), "--calib", str(protocol.text("valid")), "--threads", str(args.threads),
            "--json", str(report), "--set", *settings,
        ]
        subprocess.run(command, check=True, cwd=protocol.ROOT)
        ours = json.loads(report.read_text())
        ours |= {k: v for k, v in protocol.evaluate(out, dense).items() if k in ("perplexity", "kl_mean", "kl_stderr")}
        rows.append({"toolkit": "fewbits gptq", "bits": args.bits, "repeat": repeat, **ours})
        if args.peer:
            rows.append({"toolkit": "llm-compressor GPTQ", "bits": args.bits, "repeat": repeat, **peer(args, dense)})
        protocol.save("speed", rows)
        for row in rows[-2:]:
            print(f"{row['toolkit']}: {row['cpu_seconds']:.0f} CPU s, {row['seconds']:.0f} s, KL {row['kl_mean']:.4f}")


def peer(args, dense) -> dict:  # type: ignore[no-untyped-def]
    """Run llm-compressor on the same rows and evaluate what it made."""
    import torch

    from fewbits.calibration.data import load_calibration
    from fewbits.serving.transformers import load_tokenizer

    text = load_calibration([str(protocol.text("valid"))], load_tokenizer(dense), order="first")
    rows, out = protocol.RESULTS / "rows.pt", protocol.RESULTS / "checkpoints" / f"peer-{args.bits}"
    torch.save(text.tokens, rows)
    report = protocol.RESULTS / "speed-peer.json"
    subprocess.run(
        [args.peer, "benchmarks/peer_llmcompressor.py", "--model", str(dense), "--rows", str(rows), "--json",
         str(report), "--save", str(out), "--threads", str(args.threads), "--bits", str(args.bits)],
        check=True, cwd=protocol.ROOT, env={**os.environ, "PYTHONPATH": ""},
    )
    scores = protocol.evaluate(out, dense)
    keep = {k: v for k, v in scores.items() if k in ("perplexity", "kl_mean", "kl_stderr")}
    return json.loads(report.read_text()) | keep


if __name__ == "__main__":
    main()

"""The same job by llm-compressor, in an environment of its own: GPTQ W4 asymmetric, group 64, the same rows of text.

    python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor
    peer/bin/python benchmarks/peer_llmcompressor.py --model DIR --rows rows.pt --json out.json [--save OUT]

``benchmarks/speed.py`` makes the rows and runs it. CPU seconds are user and system time of all threads, from the
moment the model is loaded until it is quantized.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--json", required=True)
    parser.add_argument("--save")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bits", type=int, default=4)
    args = parser.parse_args()

    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    rows = torch.load(args.rows, weights_only=True)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    weights = QuantizationArgs(num_bits=args.bits, type="int", symmetric=False, strategy="group", group_size=64)
    modifier = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    started, cpu_started = time.monotonic(), time.process_time()
    oneshot(
        model=model, tokenizer=tokenizer, dataset=data, recipe=modifier, max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows),
    )
    report = {
        "seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu_started,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if args.save:
        model.save_pretrained(args.save, save_compressed=False)
        config = json.loads((Path(args.save) / "config.json").read_text())
        config.pop("quantization_config", None)  # the weights are dense float32 with quantized values: a plain model
        (Path(args.save) / "config.json").write_text(json.dumps(config))
        tokenizer.save_pretrained(args.save)
    Path(args.json).write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()

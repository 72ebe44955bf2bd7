"""Formats by auto-round's AutoScheme, in an environment of its own: menu, text and budgets of ``allocation.py``.

    python -m venv peer && peer/bin/pip install torch==2.13.0 auto-round
    peer/bin/python benchmarks/peer_autoscheme.py --model DIR --text valid.txt --formats int2_g64 int4_g64 \\
        --bpw 2.5 3 3.5 --json out.json

Its own defaults: the gradient scores of 16 rows of 256 tokens, one backward pass a format. What it chooses is then
quantized by the same GPTQ as every other row of the table.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--formats", nargs="+", required=True)
    parser.add_argument("--bpw", type=float, nargs="+", required=True)
    parser.add_argument("--json", required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    import torch
    from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
    from auto_round.schemes import QuantizationScheme
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    schemes = {fmt: _scheme(fmt) for fmt in args.formats}
    options = [QuantizationScheme.from_dict(dict(s)) for s in schemes.values()]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    names = {(s["bits"], s["group_size"]): fmt for fmt, s in schemes.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "text.json"
        data.write_text(json.dumps(_rows(Path(args.text).read_text())))
        for bpw in args.bpw:
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
            layers = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"]
            started = time.process_time()
            found = GenScheme(
                AutoScheme(avg_bits=bpw, options=options, low_gpu_mem_usage=False, low_cpu_mem_usage=False), model,
                layers, {}, dataset=str(data), device_map="cpu", tokenizer=tokenizer, enable_torch_compile=False,
            ).get_layer_config()
            chosen = {n: names[c["bits"], c["group_size"]] for n, c in found.items() if n in layers}
            rows.append({"budget": bpw, "formats": chosen, "cpu_seconds": time.process_time() - started})
            Path(args.json).write_text(json.dumps(rows) + "\n")


def _scheme(fmt: str) -> dict[str, object]:
    bits, group = re.fullmatch(r"int(\d)_g(\d+)", fmt).groups()  # type: ignore[union-attr]
    return {"bits": int(bits), "group_size": int(group), "sym": False, "data_type": "int", "act_bits": 16}


def _rows(text: str, characters: int = 4000) -> list[str]:
    return [text[i : i + characters] for i in range(0, min(len(text), 200 * characters), characters)]


if __name__ == "__main__":
    main()

"""What vLLM computes of our checkpoints, beside ``fewbits.load`` of the same files; on a CPU.

    python -m venv peer && peer/bin/pip install <a CPU build of vLLM> && peer/bin/pip install --no-deps .
    python -m benchmarks.vllm_cpu --engine peer/bin/python [--model DIR] [--only mixed]

- mixed: 2, 3, 4 and 8 bits, with and without zero points, formats that differ within q, k and v: by the plug-in;
- table: embedding and tied head at 8 bits too: by the plug-in;
- stock: 4 bits exported to compressed-tensors, with the plug-in switched off;
- widths: 2, 4 and 8 bits exported for vLLM. Its kernels for CPUs take 4 bits only, so it should refuse; what is in the
  files is then read by the library whose format it is.

Both compute in float32 (bfloat16 for ``stock``, whose kernel has no other here). The engine decodes 32 tokens greedily
after each prompt; fewbits is given the same tokens, and says how likely each was and whether it would have chosen it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import fewbits
from benchmarks import protocol
from fewbits.quant.recipe import load_recipe
from fewbits.quant.source import open_source
from fewbits.serving.export import export
from fewbits.serving.export.stored import open_stored
from fewbits.serving.transformers import load_tokenizer

PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):", "The three primary colours are"]

_MIXED = {
    "*.q_proj": "int4_g64", "*.k_proj": "int8_sym_row", "*.v_proj": "int8_g64", "*.o_proj": "int4_sym_g32",
    "*.1?.mlp.gate_proj": "int3_g32", "*.layers.5.mlp.up_proj": "int2_g32", "*.down_proj": "int4_g128_f32",
}
_TABLE = {"model.embed_tokens": "int8_row", "*.q_proj": "int3_g64"}
_WIDTHS = {"*.o_proj": "int8_sym_g32", "*.2?.mlp.down_proj": "int2_sym_g32"}

RECIPES: dict[str, dict[str, Any]] = {
    "mixed": {"rules": _MIXED, "format.group_size": 64},
    "table": {"rules": _TABLE, "format.group_size": 64, "embeddings": True},
    "stock": {"format.symmetric": True, "format.group_size": 32, "format.scale_dtype": "bfloat16"},
    "widths": {"rules": _WIDTHS, "format.symmetric": True, "format.group_size": 32},
}
EXPORTED = ("stock", "widths")
DTYPES = {"stock": "bfloat16"}


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--engine", required=True, help="command of the interpreter that has vLLM")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = args.model or open_source(protocol.real_model()).path
    for name in args.only:
        folder = checkpoint(name, model)
        served = folder if name not in EXPORTED else _exported(folder)
        row = {"case": name} | compare(folder, served, shlex.split(args.engine), DTYPES.get(name, "float32"))
        if name == "widths":
            row |= read_back(folder, served, shlex.split(args.engine))
        print(json.dumps(row), flush=True)
        keep(row)


def keep(row: dict[str, Any]) -> None:
    """In place of an earlier row of the case."""
    rows = protocol.load_rows("vllm_cpu")
    rows = [r for r in rows if r["case"] != row["case"]] + [row]
    protocol.save("vllm_cpu", sorted(rows, key=lambda r: list(RECIPES).index(r["case"])))


def checkpoint(name: str, model: Path) -> Path:
    """The model rounded to nearest as the case says, made once."""
    out = protocol.RESULTS / "vllm" / name
    if not (out / "config.json").exists():
        wanted = dict(RECIPES[name])
        wanted["rules"] = [{"match": m, "format": f} for m, f in wanted.get("rules", {}).items()]
        fewbits.quantize(model, out, recipe=load_recipe("rtn", wanted), force=True)
    return out


def _exported(folder: Path) -> Path:
    out = folder.with_name(f"{folder.name}-ct")
    export(folder, out, to="compressed-tensors", force=True)
    return out


def _peer(engine: list[str], *options: str | Path, plug_in: bool) -> subprocess.CompletedProcess[str]:
    script = protocol.ROOT / "benchmarks" / "peer_vllm.py"
    env = os.environ | {"VLLM_PLUGINS": "fewbits" if plug_in else "none"}
    env.pop("PYTHONPATH", None)  # it has an environment of its own
    return subprocess.run([*engine, str(script), *map(str, options)], env=env, capture_output=True, text=True)


def compare(folder: Path, served: Path, engine: list[str], dtype: str) -> dict[str, Any]:
    """The engine's tokens and their log-probabilities beside those of the same checkpoint in fewbits."""
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
    asked, answer = served.with_name("prompts.json"), served.with_name(f"{served.name}.json")
    asked.write_text(json.dumps(prompts))
    answer.unlink(missing_ok=True)
    ran = _peer(engine, "generate", "--model", served, "--prompts", asked, "--json", answer,
                "--dtype", dtype, plug_in=served == folder)
    answer.with_suffix(".log").write_text(ran.stdout + ran.stderr)
    if not answer.exists():
        lines = [line.strip() for line in ran.stderr.splitlines() if "Error" in line]
        return {"refused": lines[-1] if lines else f"exit code {ran.returncode}"}
    found = json.loads(answer.read_text())
    model = fewbits.load(folder, dtype=getattr(torch, dtype))
    agree, worst = 0, 0.0
    for prompt, row in zip(prompts, found["rows"]):
        tokens = torch.tensor(row["tokens"])
        with torch.no_grad():
            logits = model(torch.tensor([prompt + row["tokens"]])).logits[0, len(prompt) - 1 : -1]
        ours = logits.float().log_softmax(-1)
        agree += int((ours.argmax(-1) == tokens).sum())
        worst = max(worst, float((ours.gather(1, tokens[:, None])[:, 0] - torch.tensor(row["logprobs"])).abs().max()))
    return {
        "vllm": found["vllm"], "dtype": dtype, "quantization": found["quantization"], "tokens_agree": agree,
        "tokens": sum(len(r["tokens"]) for r in found["rows"]), "largest_logprob_difference": worst,
        "text": tokenizer.decode(found["rows"][0]["tokens"]), "load_seconds": round(found["load_seconds"], 1),
        "generate_seconds": round(found["generate_seconds"], 1),
    }


def read_back(folder: Path, served: Path, engine: list[str]) -> dict[str, Any]:
    """The weights of an export as the compressed-tensors library reads them, beside ours."""
    dense = served.with_name(f"{served.name}.safetensors")
    _peer(engine, "unpack", "--model", served, "--out", dense, plug_in=False).check_returncode()
    theirs, stored = load_file(dense), open_stored(folder)
    equal = sum(torch.equal(theirs[n], stored.read(n).dequantize()) for n in stored.matrices)
    dense.unlink()
    return {"matrices": len(stored.matrices), "read_alike": equal}


if __name__ == "__main__":
    main()

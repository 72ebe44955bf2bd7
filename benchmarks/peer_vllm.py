"""What vLLM makes of a checkpoint, in an environment of its own; ``benchmarks/vllm_cpu.py`` runs it.

    peer/bin/python benchmarks/peer_vllm.py generate --model DIR --prompts prompts.json --json out.json
    peer/bin/python benchmarks/peer_vllm.py unpack --model DIR --out dense.safetensors

``generate`` decodes greedily and records the log-probabilities of what it chose. ``unpack`` gives the
weights of a compressed-tensors export back as that library reads them, tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["generate", "unpack"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts")
    parser.add_argument("--json")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.what == "generate":
        generate(args.model, json.loads(Path(args.prompts).read_text()), Path(args.json), args.dtype)
    else:
        unpack(Path(args.model), args.out)


def generate(model: str, prompts: list[list[int]], out: Path, dtype: str) -> None:
    # One process, so that an error of the engine is an error here; nothing is asked of the network.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
                   "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams, __version__

    started = time.monotonic()
    llm = LLM(model=model, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=4)
    loaded = time.monotonic()
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True)
    results = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling)
    rows = []
    for result in results:
        (best,) = result.outputs
        tokens = list(best.token_ids)
        rows.append({"tokens": tokens, "logprobs": [step[t].logprob for step, t in zip(best.logprobs, tokens)]})
    out.write_text(json.dumps({
        "vllm": __version__, "quantization": llm.llm_engine.vllm_config.model_config.quantization, "rows": rows,
        "load_seconds": loaded - started, "generate_seconds": time.monotonic() - loaded,
    }) + "\n")


def unpack(model: Path, out: str) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # type: ignore[import]
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())["quantization_config"]
    weights = {name: g["weights"] for g in config["config_groups"].values() for name in g["targets"]}
    dense = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            for full in f.keys():  # noqa: SIM118  (it is no dict)
                name, _, leaf = full.rpartition(".")
                if leaf == "weight_packed":
                    shape, scale = f.get_tensor(f"{name}.weight_shape"), f.get_tensor(f"{name}.weight_scale").float()
                    codes = unpack_from_int32(f.get_tensor(full), weights[name]["num_bits"], shape)
                    groups = codes.float().reshape(len(scale), scale.shape[1], -1) * scale.unsqueeze(-1)
                    dense[name] = groups.reshape(len(scale), -1)
    save_file(dense, out)


if __name__ == "__main__":
    main()

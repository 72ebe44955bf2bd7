"""Peak memory of quantizing, on synthetic checkpoints of random weights: it must not grow with the number of layers.

    python -m benchmarks.memory [--layers 6 22] [--dtype bfloat16]

Each size is quantized in a process of its own; what counts is its peak resident memory less what the interpreter and
its libraries take before any model is opened.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import protocol

_CHILD = """
import json, sys
import torch, transformers, accelerate
import fewbits
from fewbits.quant.pipeline import quantize
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
import fewbits.serving.transformers, fewbits.calibration.data
from fewbits.eval.speed import peak_rss_bytes as peak
before = peak()
report = quantize(sys.argv[1], sys.argv[2], recipe="gptq", force=True, overrides=json.loads(sys.argv[3]))
print(json.dumps({"before": before, "peak": peak(), "seconds": report.seconds, "bytes": report.bytes}))
"""


def make_checkpoint(folder: Path, layers: int, dtype: str) -> int:
    """A Llama of about 44 M parameters a layer (1.1 B with 22), written shard by shard; returns its bytes."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, tie_word_embeddings=False, dtype=dtype, architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "outer"
        groups.setdefault(part, {})[name] = tensor.shape
    weight_map, total = {}, 0
    for part, shapes in groups.items():
        tensors = {
            n: (torch.randn(s, generator=generator) * 0.02 if len(s) > 1 else torch.ones(s)).to(getattr(torch, dtype))
            for n, s in shapes.items()
        }
        file = f"model-{part}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return total


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 22])
    parser.add_argument("--dtype", default="bfloat16", help="of the checkpoint")
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    rows = []
    for layers in args.layers:
        folder = protocol.RESULTS / "synthetic" / f"{layers}-{args.dtype}"
        size = make_checkpoint(folder, layers, args.dtype)
        settings = {"calibration.samples": args.samples, "calibration.seqlen": 512}
        out = subprocess.run(
            [sys.executable, "-c", _CHILD, str(folder), str(folder) + "-w4", json.dumps(settings)],
            check=True, capture_output=True, text=True, cwd=protocol.ROOT,
        ).stdout
        row = {"layers": layers, "checkpoint_bytes": size, **json.loads(out.splitlines()[-1])}
        row["share"] = (row["peak"] - row["before"]) / size
        rows.append(row)
        print(f"{layers} layers, {size / 1e9:.2f} GB: {(row['peak'] - row['before']) / 1e9:.3f} GB beyond the "
              f"interpreter's {row['before'] / 1e9:.2f}, {row['share']:.3f} of the checkpoint, {row['seconds']:.0f} s")
    protocol.save("memory", rows)


if __name__ == "__main__":
    main()

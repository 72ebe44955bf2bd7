"""Formats for the output head alone: what each costs in bytes, and in nats at the end of an otherwise untouched model.

    FEWBITS_DATA=... python -m benchmarks.heads [--formats int4_g64 pq8_v2 ...]

Hidden states are taken once, so a row takes as long as quantizing the head does. The head of SmolLM2 is tied to its
embedding: what the embedding needs is left out of the bytes.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

import fewbits
from benchmarks import protocol
from fewbits.eval.estimate import mean_of_windows
from fewbits.eval.perplexity import perplexity_of
from fewbits.quant.formats import parse_layout
from fewbits.quant.quantizers import GPTQ
from fewbits.quant.source import open_source
from fewbits.quant.types import LayerStats

FORMATS = ["int8_g64", "int4_g64", "int2_g64", "trellis4", "trellis3", "trellis2", "pq8_v2", "pq8_v4", "pq8_v8",
           "pq12_v576"]
ROWS, LENGTH = 64, 512


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    args = parser.parse_args()
    path = open_source(protocol.real_model()).path
    model, tokenizer = fewbits.load(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)

    def states(split: str, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Hidden states ``(rows, length, K)`` that the head reads, and the tokens."""
        ids = torch.tensor(tokenizer(protocol.text(split).read_text()[: 12 * rows * length])["input_ids"])
        ids = ids[: rows * length].view(rows, length)
        with torch.no_grad():
            return torch.cat([model.model(row[None]).last_hidden_state for row in ids]), ids

    seen, _ = states("valid", ROWS, LENGTH)
    flat = seen.flatten(0, 1)
    stats, weight = LayerStats(flat.T @ flat, len(flat)), model.get_output_embeddings().weight.detach()
    hidden, ids = states("test", protocol.KL_WINDOWS, protocol.WINDOW)
    references = [(states_of @ weight.T).log_softmax(-1) for states_of in hidden]
    rows = []
    for name in [None, *args.formats]:
        start, made = time.process_time(), None
        if name is not None:
            made, _ = GPTQ().quantize(weight, stats, parse_layout(name, weight.shape[1]))
        seconds, dense = time.process_time() - start, weight if made is None else made.dequantize()
        kl, loss, top = [], [], []  # by window
        for states_of, tokens, p in zip(hidden, ids, references):
            q = (states_of @ dense.T).log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1).numpy())
            loss.append(F.nll_loss(q[:-1], tokens[1:], reduction="none").numpy())
            top.append((p.argmax(-1) == q.argmax(-1)).numpy())
        divergence = mean_of_windows(kl)
        row = {"format": name or "dense", "bytes": weight.numel() * 2 if made is None else made.stored_bytes,
               "bits_per_weight": 16.0 if made is None else made.bits_per_weight,
               "kl_mean": divergence.mean, "kl_stderr": divergence.stderr,
               "perplexity": perplexity_of(loss).value, "top1": mean_of_windows(top).mean,
               "cpu_seconds": seconds}
        rows.append(row)
        print(f"{row['format']}: {row['bits_per_weight']:.3f} bits, KL {row['kl_mean']:.4f} +- {row['kl_stderr']:.4f}, "
              f"perplexity {row['perplexity']:.2f}, {seconds:.0f} CPU s", flush=True)
        protocol.save("heads", rows)


if __name__ == "__main__":
    main()

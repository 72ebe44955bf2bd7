"""A small transformer trained from scratch with complex weights in powers of i (iFairy), beside real ones.

    FEWBITS_DATA=... python -m benchmarks.ifairy [--seeds 0 1 2] [--models phase float ...]

Text is bytes: WikiText-2 valid to train on, test to judge by. Two decoder blocks of Llama; what is quantized has inputs
of 8 bits, and embedding, head and norms stay float. With ``phase`` the real channels of a model are
``[real parts; imaginary parts]``, and heads are cut so that rotary positions turn a complex channel. A run that
benchmarks/runs has already is not done again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import protocol
from fewbits.quant.training.complex import PhaseLinear, StraightThrough, round_tokens

HEADS, LAYERS, STD = 4, 2, 0.05
LENGTH, BATCH, STEPS, WARMUP = 128, 16, 500, 50
WINDOWS = 1024  # of LENGTH bytes, to judge by


@dataclass(frozen=True)
class Kind:
    """What is trained.

    Attributes:
        title: in the table.
        width: real channels.
        inner: real channels between the linears of an MLP.
        linear: makes the linear of so many inputs and outputs; None: leaves it as it is.
    """

    title: str
    width: int
    inner: int
    linear: Callable[[int, int], nn.Module] | None


class TernaryLinear(nn.Linear):
    """BitNet b1.58: 0 or plus or minus the mean of |W|, inputs of 8 bits."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=STD)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.detach().abs().mean()
        weight = (self.weight.detach() / scale).round().clamp(-1, 1) * scale
        whole, step = round_tokens(x)
        return F.linear(StraightThrough.apply(x, whole * step), StraightThrough.apply(self.weight, weight))

    @property
    def stored_bytes(self) -> int:
        """Five to a byte, and a scale in float32."""
        return -(-self.weight.numel() // 5) + 4


def _phase(inputs: int, outputs: int) -> nn.Module:
    return PhaseLinear(inputs, outputs, round_inputs=True, std=STD)


KINDS = {
    "phase": Kind("powers of i, 2 bits a complex weight", 128, 344, _phase),
    "float": Kind("float, the same width", 128, 344, None),
    "float-half": Kind("float, half as many weights in linears", 88, 256, None),
    "ternary-linears": Kind("ternary, as many bytes in linears", 72, 190, TernaryLinear),
    "ternary-all": Kind("ternary, as many bytes in all", 104, 272, TernaryLinear),
}


class ToHeads(nn.Module):
    """``[real parts; imaginary parts]`` of all heads to the same of each head."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, HEADS, -1)).transpose(-3, -2).flatten(-3)


class FromHeads(nn.Module):
    """Inverse of :class:`ToHeads`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, 2, -1)).transpose(-3, -2).flatten(-3)


def build(kind: Kind, seed: int) -> Any:
    """A model of random weights with the linears of its blocks replaced."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=kind.width, intermediate_size=kind.inner, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=LENGTH, initializer_range=STD))
    if kind.linear is None:
        return model
    for layer in model.model.layers:
        for part, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
            for name in names:
                old = getattr(part, f"{name}_proj")
                new = kind.linear(old.in_features, old.out_features)
                if isinstance(new, PhaseLinear) and part is layer.self_attn:
                    new = nn.Sequential(FromHeads(), new) if name == "o" else nn.Sequential(new, ToHeads())
                setattr(part, f"{name}_proj", new)
    return model


def stored_bytes(model: Any) -> tuple[int, int]:
    """Bytes of the linears of all blocks, and of the model; what is float counts 2 bytes a number."""
    linears = 0
    for module in model.model.layers.modules():
        if isinstance(module, PhaseLinear):
            linears += module.frozen().stored_bytes
        elif isinstance(module, TernaryLinear):
            linears += module.stored_bytes
        elif isinstance(module, nn.Linear):
            linears += 2 * module.weight.numel()
    inside = {id(p) for m in model.model.layers.modules() if isinstance(m, nn.Linear | PhaseLinear)
              for p in m.parameters()}
    return linears, linears + sum(2 * p.numel() for p in model.parameters() if id(p) not in inside)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Nats per byte."""
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(model: Any, text: Tensor, rate: float, seed: int, steps: int = STEPS) -> None:
    """AdamW with a linear warm-up and a cosine down to a tenth; runs of bytes from anywhere in the text."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (
        0.55 + 0.45 * math.cos(math.pi * step / steps)))
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=draw)
        loss_of(model, text[starts + torch.arange(LENGTH)]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def bits_per_byte(model: Any, text: Tensor) -> float:
    """Over windows side by side, as many as there are up to 1024; the first byte of each is context alone."""
    batches = min(WINDOWS * LENGTH, len(text)) // (BATCH * LENGTH)
    windows = text[: batches * BATCH * LENGTH].view(-1, BATCH, LENGTH)
    return sum(float(loss_of(model, ids)) for ids in windows) / len(windows) / math.log(2)


def read(split: str) -> Tensor:
    return torch.frombuffer(bytearray(protocol.text(split).read_bytes()), dtype=torch.uint8).long()


def run(name: str, seed: int, rate: float) -> dict[str, Any]:
    """A row. Trained on the first nine tenths of WikiText-2 valid; the last is held out, to choose a rate by."""
    kind, start = KINDS[name], time.process_time()
    model = build(kind, seed)
    valid = read("valid")
    cut = len(valid) * 9 // 10
    train(model, valid[:cut], rate, seed)
    linears, total = stored_bytes(model)
    return {"model": name, "title": kind.title, "width": kind.width, "seed": seed, "steps": STEPS, "rate": rate,
            "held_out": bits_per_byte(model, valid[cut:]), "bits_per_byte": bits_per_byte(model, read("test")),
            "bytes_linears": linears, "bytes": total, "cpu_seconds": time.process_time() - start}


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 8e-3, 16e-3],
                        help="tried with seed 0; the one that is best on held-out text goes on")
    args = parser.parse_args()
    rows = protocol.load_rows("ifairy-trained")

    def measured(name: str, seed: int, rate: float) -> dict[str, Any]:
        wanted = {"model": name, "width": KINDS[name].width, "seed": seed, "steps": STEPS, "rate": rate}
        for row in rows:
            if wanted.items() <= row.items():
                return row
        rows.append(row := run(name, seed, rate))
        print(f"{name}, seed {seed}, rate {rate:g}: held out {row['held_out']:.4f}, test {row['bits_per_byte']:.4f} "
              f"bits per byte, {row['bytes_linears']:,} of {row['bytes']:,} bytes in linears, "
              f"{row['cpu_seconds']:.0f} CPU s", flush=True)
        protocol.save("ifairy-trained", rows)
        return row

    for name in args.models:
        rate = min(args.rates, key=lambda r, name=name: measured(name, 0, r)["held_out"])
        for seed in args.seeds:
            measured(name, seed, rate)


if __name__ == "__main__":
    main()

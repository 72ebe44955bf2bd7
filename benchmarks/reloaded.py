"""Small language models trained from scratch, in float and ternary, at two widths: the claims of BitNet b1.58 Reloaded.

    FEWBITS_DATA=... python -m benchmarks.reloaded [--scales float absmean ...] [--hidden 32 64] [--seeds 0 1 2]

Decoders in the shape of Llama, of 3 layers, with an RMSNorm in front of every linear: those before o_proj and down_proj
are the SubLN of BitNet, and the float models have them too. Between models of one width and seed only the rounding
differs: the first weights and the batches are the same, and float is the ternary layer at ``mix = 0``. Ternary linears
have one scale a matrix and inputs of 8 bits; embedding (tied to the head) and norms stay float.

Text is the first 0.9 of WikiText-2 valid, as tokens of a BPE of 512 entries made from it. The rest is held out: it
alone decides between learning rates, by seed 0. Test text is scored once for each model and decides nothing. Bits are
per byte of the tokens predicted. AdamW (0.9, 0.95), warm-up and linear decay, weight decay 0.1 for the first half and 0
then, as BitNet's authors do. Rows that an earlier run of as many steps left are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import protocol
from fewbits.cli.common import ProgressBars
from fewbits.eval.perplexity import perplexity_of
from fewbits.quant.training.ternary import Ternary, TernaryLinear, replace_linears, set_mix

SCALES, HIDDEN, SEEDS, RATES = ["float", "absmean", "absmedian", "learned"], [32, 64], [0, 1, 2], [2e-2]
LAYERS, HEADS, ENTRIES = 3, 4, 512
STEPS, WARM_UP, BATCH, LENGTH = 500, 40, 8, 128
WINDOWS = 1000  # of LENGTH tokens of test
DECAY = 0.1


@dataclass(frozen=True)
class Texts:
    """Token ids ``(L,)`` of the three texts, and the bytes of each entry ``(ENTRIES,)``."""

    train: Tensor
    held_out: Tensor
    test: Tensor
    entry_bytes: Tensor


def texts() -> Texts:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    valid, test = (protocol.text(split).read_text() for split in ("valid", "test"))
    cut = valid.index("\n", len(valid) * 9 // 10)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [valid[:cut]], trainers.BpeTrainer(vocab_size=ENTRIES, initial_alphabet=alphabet, show_progress=False))
    ids = [torch.tensor(tokenizer.encode(part).ids) for part in (valid[:cut], valid[cut:], test)]
    # the alphabet has a letter for each byte
    return Texts(*ids, torch.tensor([len(tokenizer.id_to_token(i)) for i in range(ENTRIES)]))


def new_model(scale: str, hidden: int, seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=ENTRIES, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 16 * 16, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        initializer_range=hidden**-0.5))
    ternary = Ternary() if scale == "float" else Ternary(scale)  # type: ignore[arg-type]
    replace_linears(model, replace(ternary, norm=True), match=["*.o_proj", "*.down_proj"])
    replace_linears(model, ternary)
    set_mix(model, 0.0 if scale == "float" else 1.0)
    return model


def train(model: nn.Module, tokens: Tensor, rate: float, seed: int, progress: Callable[[str, int, int], None]) -> None:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / WARM_UP, 1 - i / STEPS))
    batches = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        if step == STEPS // 2:
            optimizer.param_groups[0]["weight_decay"] = 0.0
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=batches)
        ids = torch.stack([tokens[at : at + LENGTH] for at in starts])
        optimizer.zero_grad()
        losses(model, ids).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress("steps", step + 1, STEPS)


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats ``(windows, length - 1)`` of what follows the first token of each window."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@torch.no_grad()
def score(model: nn.Module, tokens: Tensor, entry_bytes: Tensor) -> tuple[float, float]:
    """Bits per byte, and perplexity per token, over windows of LENGTH tokens."""
    windows = tokens[: min(len(tokens) // LENGTH, WINDOWS) * LENGTH].view(-1, LENGTH)
    nats = torch.cat([losses(model, part) for part in windows.split(64)])
    bits = float(nats.double().sum()) / math.log(2) / int(entry_bytes[windows[:, 1:]].sum())
    return bits, perplexity_of(list(nats.numpy())).value


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--scales", nargs="+", default=SCALES, choices=SCALES)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="tried with seed 0; the best goes on")
    args = parser.parse_args()
    made = {"steps": STEPS, "tokens": BATCH * LENGTH}
    rows: list[dict[str, Any]] = protocol.load_rows("reloaded")
    rows = [row for row in rows if made.items() <= row.items()]
    read = texts()

    def measured(scale: str, hidden: int, seed: int, rate: float) -> dict[str, Any]:
        key = {"scale": scale, "hidden": hidden, "seed": seed, "rate": rate, **made}
        for row in rows:
            if key.items() <= row.items():
                return row
        start, model = time.process_time(), new_model(scale, hidden, seed)
        train(model, read.train, rate, seed, progress)
        held_out, _ = score(model, read.held_out, read.entry_bytes)
        test, perplexity = score(model, read.test, read.entry_bytes)
        linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, TernaryLinear))
        rows.append({**key, "parameters": sum(p.numel() for p in model.parameters()), "in_linears": linears,
                     "held_out": held_out, "test": test, "perplexity": perplexity,
                     "cpu_seconds": time.process_time() - start})
        print(f"{scale} {hidden}, seed {seed}, rate {rate:g}: held out {held_out:.4f}, test {test:.4f} bits per byte, "
              f"{rows[-1]['cpu_seconds']:.0f} CPU s", flush=True)
        protocol.save("reloaded", rows)
        return rows[-1]

    arms = [(seed, scale, hidden) for seed in args.seeds for scale in args.scales for hidden in args.hidden]
    with ProgressBars() as progress:
        for done, (seed, scale, hidden) in enumerate(arms):
            progress("models", done, len(arms))
            rate = min(args.rates, key=lambda r: measured(scale, hidden, 0, r)["held_out"])
            measured(scale, hidden, seed, rate)


if __name__ == "__main__":
    main()

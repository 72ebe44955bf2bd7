"""In llama.cpp itself: our GPTQ as Q4_0 against llama.cpp's own Q4_0, every tensor of the same type and size.

    FEWBITS_DATA=... python -m benchmarks.llamacpp --peer peer/bin/python [--windows 40] [--imatrix-rows 32]

``peer_llamacpp.py`` says how to make the peer's environment. Both sides quantize the same weights: linears to Q4_0,
the tied embedding to Q8_0. llama.cpp quantizes once without and once with an importance matrix, whose means come from
the first rows of the text that GPTQ is calibrated on. Windows are 512 tokens of WikiText-2 test without BOS, the same
ids for all. The model was distributed as Q4_1, groups of 32: an asymmetric 4-bit grid would fit it by accident, and the
symmetric one of Q4_0 does not.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewbits
from benchmarks import protocol
from fewbits.quant.source import open_source
from fewbits.serving.export import export
from fewbits.serving.export.gguf_model import ARCHITECTURES, namer

LENGTH = 512
WORK = protocol.RESULTS / "llamacpp"
SETTINGS = protocol.CALIBRATION | {
    "format.bits": 4, "format.symmetric": True, "format.group_size": 32,
    "rules": [{"match": "model.embed_tokens", "format": "int8_sym_g32"}],
}


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--peer", required=True, help="interpreter of the environment that has llama-cpp-python")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--imatrix-rows", type=int, default=32, help="calibration rows for llama.cpp; 0: without")
    parser.add_argument("--checkpoint", type=Path, default=WORK / "w4", help="ours; made where it is missing")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)

    source = protocol.real_model()
    dense = open_source(source).path
    tokens = _tokens(dense, "test")[: args.windows * LENGTH].view(args.windows, LENGTH)
    np.save(WORK / "windows.npy", tokens.numpy().astype(np.int32))
    files = {"the model as distributed": source, "fewbits, GPTQ": _ours(source, args.checkpoint)}
    files["llama.cpp"] = _theirs(args.peer, source, WORK / "q4_0.gguf")
    if args.imatrix_rows:
        means = _mean_squares(dense, args.imatrix_rows)
        files["llama.cpp, importance matrix"] = _theirs(args.peer, source, WORK / "q4_0-imatrix.gguf", means)

    scores = {name: _scored(args.peer, file) for name, file in files.items()}
    ours = scores["fewbits, GPTQ"]
    rows = [_row(name, file, scores[name]["nll"], ours["nll"]) for name, file in files.items()]
    agreement = _agreement(args.checkpoint, tokens, ours)
    protocol.save("llamacpp", {"rows": rows, "agreement": agreement, "windows": args.windows, "length": LENGTH})
    for row in rows:
        print(f"{row['file']}: perplexity {row['perplexity']:.3f} +- {row['stderr']:.3f}, {row['tensor_bytes']} bytes "
              f"of tensors; nats per token above ours {row['above_ours']:+.4f} +- {row['above_ours_stderr']:.4f}")
    print(agreement)


def _tokens(dense: Path, split: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense)
    return tokenizer(protocol.text(split).read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]


def _ours(source: Path, checkpoint: Path) -> Path:
    if not (checkpoint / "plan.json").exists():
        overrides = SETTINGS | {"calibration.sources": [str(protocol.text("valid"))]}
        fewbits.quantize(source, checkpoint, recipe="gptq", overrides=overrides, force=True)
    out = WORK / "fewbits.gguf"
    export(checkpoint, out, to="gguf", force=True)
    return out


def _theirs(peer: str, source: Path, out: Path, imatrix: Path | None = None) -> Path:
    extra = ["--imatrix", str(imatrix)] if imatrix else []
    _run(peer, "quantize", str(source), str(out), *extra)
    return out


def _run(peer: str, *args: str) -> None:
    script = Path(__file__).with_name("peer_llamacpp.py")
    done = subprocess.run([peer, str(script), *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{peer} {script.name} {' '.join(args)}: {done.stderr[-2000:]}")


def _scored(peer: str, file: Path) -> dict[str, np.ndarray]:
    out, text = WORK / f"{file.stem}.npz", WORK / "text.txt"
    text.write_text(protocol.text("test").read_text()[:20000])
    _run(peer, "score", str(file), "--windows", str(WORK / "windows.npy"), "--out", str(out), "--text", str(text))
    return dict(np.load(out))


def _mean_squares(dense: Path, rows: int) -> Path:
    """What llama.cpp calls an importance matrix: the mean square of every input of every linear."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    config = model.config
    name = namer(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    sums: dict[str, torch.Tensor] = {}

    def watch(ours: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[ours] = sums.get(ours, 0) + inputs[0].flatten(0, -2).square().sum(0)
        return hook

    for path, module in model.named_modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_pre_hook(watch("model.embed_tokens" if path == "lm_head" else path))
    with torch.no_grad():
        for row in _tokens(dense, "valid")[: rows * LENGTH].view(rows, 1, LENGTH):
            model(input_ids=row)
    out = WORK / "imatrix.npz"
    means = {name(f"{ours}.weight"): (s / (rows * LENGTH)).numpy() for ours, s in sums.items()}
    np.savez(out, allow_pickle=False, **means)
    return out


def _row(name: str, file: Path, nll: np.ndarray, ours: np.ndarray) -> dict[str, Any]:
    """Perplexity, and the difference to ours window by window: the same text makes both errors small."""
    import gguf

    difference = (nll - ours).mean(axis=1)
    root = np.sqrt(len(nll))
    perplexity = float(np.exp(nll.mean()))
    return {
        "file": name, "bytes": file.stat().st_size,
        "tensor_bytes": int(sum(t.n_bytes for t in gguf.GGUFReader(file).tensors)),
        "perplexity": perplexity, "stderr": perplexity * float(nll.mean(axis=1).std(ddof=1) / root),
        "above_ours": float(difference.mean()), "above_ours_stderr": float(difference.std(ddof=1) / root),
    }


def _agreement(checkpoint: Path, tokens: torch.Tensor, theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Our own model against llama.cpp on the first window, of the same file.

    llama.cpp rounds the inputs of every product to 8 bits, so its logits are ours only nearly.
    """
    from transformers import AutoTokenizer

    model = fewbits.load(checkpoint, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        ours = model(input_ids=tokens[:1]).logits[0].double()
    found = torch.from_numpy(theirs["logits"]).double()
    log_p, log_q = ours.log_softmax(-1), found.log_softmax(-1)
    nll = -log_p[:-1].gather(1, tokens[0, 1:, None]).mean()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.encode((WORK / "text.txt").read_text(), add_special_tokens=False)
    return {
        "kl_mean": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "top1_agreement": float((ours.argmax(-1) == found.argmax(-1)).double().mean()),
        "relative_error": float((ours - found).norm() / (ours - ours.mean(-1, keepdim=True)).norm()),
        "nll_ours": float(nll), "nll_llamacpp": float(theirs["nll"][0].mean()),
        "tokenizers_agree": ids == theirs["ids"].tolist(), "tokens_compared": len(ids),
    }


if __name__ == "__main__":
    main()

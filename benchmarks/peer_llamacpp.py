"""llama.cpp's side of ``benchmarks/llamacpp.py``, in an environment of its own: quantize a GGUF, score one on tokens.

    python -m venv peer && peer/bin/pip install llama-cpp-python==0.3.36
    peer/bin/python benchmarks/peer_llamacpp.py quantize SRC.gguf OUT.gguf [--imatrix means.npz]
    peer/bin/python benchmarks/peer_llamacpp.py score MODEL.gguf --windows windows.npy --out scores.npz [--text FILE]
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import llama_cpp
import numpy as np


def quantize(source: str, out: str, imatrix: str | None, threads: int) -> None:
    """Every linear to Q4_0 and the embedding to Q8_0, by ``llama_model_quantize``.

    Args:
        imatrix: a file of name in GGUF -> mean squares ``(K,)`` of the tensor's inputs.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = threads, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    params.token_embedding_type = params.output_tensor_type = llama_cpp.GGML_TYPE_Q8_0
    params.allow_requantize = True  # the source may be quantized: it is then what it dequantizes to
    if imatrix is not None:
        means = {k: np.ascontiguousarray(v, np.float32) for k, v in np.load(imatrix).items()}
        entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()  # the last one is empty: the end
        for entry, (name, mean) in zip(entries, means.items()):
            entry.name, entry.size = name.encode(), mean.size
            entry.data = mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), params):
        raise SystemExit(f"{source}: llama.cpp could not quantize it")


def score(model: str, windows: np.ndarray, out: str, text: str | None, threads: int) -> None:
    """Save ``nll (windows, length - 1)`` in nats, ``logits`` of the first window, and the ``ids`` of ``text``."""
    length = windows.shape[1]
    engine = llama_cpp.Llama(model, n_ctx=length, n_batch=length, n_threads=threads, n_threads_batch=threads,
                             logits_all=True, verbose=False)
    nll, first = [], None
    for window in windows:
        engine.reset()
        engine.eval(window.tolist())
        logits = np.array(engine.scores[:length], np.float32)
        first = logits if first is None else first
        top = logits[:-1].max(axis=1)
        total = top + np.log(np.exp(logits[:-1] - top[:, None]).sum(axis=1))
        nll.append(total - logits[np.arange(length - 1), window[1:]])
    ids = engine.tokenize(Path(text).read_bytes(), add_bos=False, special=False) if text else []
    np.savez(out, nll=np.array(nll), logits=first, ids=np.array(ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("quantize")
    sub.add_argument("source")
    sub.add_argument("out")
    sub.add_argument("--imatrix")
    sub = commands.add_parser("score")
    sub.add_argument("model")
    sub.add_argument("--windows", required=True)
    sub.add_argument("--out", required=True)
    sub.add_argument("--text")
    args = parser.parse_args()
    if args.command == "quantize":
        quantize(args.source, args.out, args.imatrix, args.threads)
    else:
        score(args.model, np.load(args.windows), args.out, args.text, args.threads)


if __name__ == "__main__":
    main()

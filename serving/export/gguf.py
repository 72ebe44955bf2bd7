"""GGUF, the file of llama.cpp: codes and scales go into ggml's own block types unchanged.

The scale of a whole nvfp4 tensor is a tensor beside it, ``.scale``, by which llama.cpp multiplies the product.

Linears, embedding and head may be quantized or not; what is dense keeps its dtype (vectors become float32, as
llama.cpp has them). One tensor is in memory at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.quant.errors import FormatError, RecipeError
from fewbits.quant.targets import Target
from fewbits.quant.types import Layout
from fewbits.serving.export.base import Progress, as_integers, one_format
from fewbits.serving.export.ggml import FLOATS, BlockType, Bytes, block_type, to_blocks
from fewbits.serving.export.gguf_model import (
    Architecture,
    add_metadata,
    architecture,
    namer,
    require_gguf,
    rope_factors,
    rows_of,
)
from fewbits.serving.export.gguf_tokenizer import add_tokenizer
from fewbits.serving.export.stored import Stored

_FILE_TYPES = {"MXFP4": "MOSTLY_MXFP4_MOE"}  # the others are named after their tensors
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Piece:
    """A tensor of the file.

    Attributes:
        name, kind, shape, nbytes: as the file announces it; ``kind`` is a name of ``gguf.GGMLQuantizationType``.
        read: makes its bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Bytes]


@dataclass(frozen=True)
class Gguf:
    """Attributes:
    ternary: 2-bit codes are -1, 0 and 1 and never -2: store them as TQ1_0 (1.69 bits) and not as TQ2_0 (2.06 bits).
    """

    ternary: bool = False

    single_file = True

    def obstacle(self, target: Target, layout: Layout) -> str | None:
        fmt = one_format(layout)
        if isinstance(fmt, str):
            return fmt
        if target.kind not in ("linear", "embedding"):
            return f"takes no {target.kind}; use the checkpoint with fewbits"
        found = block_type(fmt, target.shape[1], ternary=self.ternary)
        if found is FLOATS["nvfp4"] and target.kind == "embedding":
            return "has no scale of the whole tensor for embeddings in nvfp4; quantize it as mxfp4 or int8_sym_g32"
        return found if isinstance(found, str) else None

    def write(self, stored: Stored, out: Path, progress: Progress) -> list[str]:
        gguf = require_gguf()
        arch = architecture(stored)
        rounded: Counter[str] = Counter()
        pieces = self._pieces(stored, arch, rounded)
        if unknown := {p.kind for p in pieces} - set(gguf.GGMLQuantizationType.__members__):
            raise RecipeError(f"--to gguf: the installed package gguf knows no {', '.join(sorted(unknown))}; "
                              "pip install --upgrade gguf")
        writer = gguf.GGUFWriter(str(out), arch.name)
        try:
            warnings = add_metadata(writer, stored)
            add_tokenizer(writer, stored)
            writer.add_file_type(_file_type(gguf, pieces))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for piece in pieces:
                # any dtype but uint8, with which the writer would take the shape for one in bytes
                writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), piece.nbytes,
                                       raw_dtype=gguf.GGMLQuantizationType[piece.kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for i, piece in enumerate(pieces):
                progress("Exporting", i, len(pieces))
                writer.write_tensor_data(piece.read())
            progress("Exporting", len(pieces), len(pieces))
        finally:
            writer.close()
        return warnings + _about_offsets(rounded)

    def _pieces(self, stored: Stored, arch: Architecture, rounded: Counter[str]) -> list[Piece]:
        config = stored.model.config
        name = namer(arch, config.num_hidden_layers)
        pieces = []
        for ours in (n for names in stored.by_shard() for n in names):
            rows = rows_of(arch, ours, config)
            if ours in stored.matrices:
                pieces += self._packed(stored, ours, name(f"{ours}.weight"), rows, rounded)
            else:
                pieces.append(_dense(stored, ours, name(ours), rows))
        if (factors := rope_factors(arch, config)) is not None:
            pieces.append(_as_it_is("rope_freqs.weight", "F32", factors.shape, lambda: factors))
        return pieces

    def _packed(self, stored: Stored, ours: str, name: str, rows: Tensor | None, rounded: Counter[str]
                ) -> list[Piece]:
        target, layout = stored.matrices[ours]
        fmt = one_format(layout)
        assert not isinstance(fmt, str)
        kind = block_type(fmt, target.shape[1], ternary=self.ternary)
        assert isinstance(kind, BlockType)

        def read() -> Bytes:
            tensor = as_integers(stored.read(ours))
            packed, inexact = to_blocks(ours, tensor if rows is None else tensor.rows(rows), kind)
            if inexact:
                rounded[ours] += inexact
            return packed

        nbytes = target.shape[0] * kind.row_bytes(target.shape[1])
        pieces = [Piece(name, kind.name, target.shape, nbytes, read)]
        if kind is FLOATS["nvfp4"]:
            whole = name.removesuffix(".weight") + ".scale"
            pieces.append(_as_it_is(whole, "F32", (1,), lambda: 1 / stored.dense(f"{ours}.weight_global_scale")))
        return pieces


def _dense(stored: Stored, ours: str, name: str, rows: Tensor | None) -> Piece:
    entry = stored.entries[ours]
    if entry.dtype not in _DENSE:
        raise FormatError(f"{ours}: gguf takes float32, float16 and bfloat16, got {entry.dtype}; cast it before "
                          "quantizing")
    dtype = torch.float32 if len(entry.shape) == 1 else entry.dtype

    def read() -> Tensor:
        tensor = stored.dense(ours)
        return (tensor if rows is None else tensor[rows]).to(dtype)

    return _as_it_is(name, _DENSE[dtype], entry.shape, read)


def _as_it_is(name: str, kind: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> Piece:
    itemsize = next(dtype.itemsize for dtype, known in _DENSE.items() if known == kind)
    nbytes = int(np.prod(shape)) * itemsize
    return Piece(name, kind, tuple(shape), nbytes, lambda: read().contiguous().view(torch.uint8).numpy())


def _file_type(gguf: Any, pieces: list[Piece]) -> int:
    """What most weights are: programs show it as the type of the file."""
    weights: Counter[str] = Counter()
    for piece in pieces:
        weights[piece.kind] += int(np.prod(piece.shape)) if len(piece.shape) > 1 else 0
    names = [k for k, _ in weights.most_common() if k not in _DENSE.values()]
    return int(gguf.LlamaFileType[_FILE_TYPES.get(names[0], f"MOSTLY_{names[0]}")])


def _about_offsets(rounded: Counter[str]) -> list[str]:
    if not rounded:
        return []
    first = next(iter(rounded))
    return [f"{first} and {len(rounded) - 1} more: GGUF stores -scale * zero_point in float16, which rounded "
            f"{rounded.total()} of them, each by 1/2048 of itself at most; codes and scales are exact"]

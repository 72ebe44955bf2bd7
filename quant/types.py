"""The values that everything passes around: a quantized tensor, its formats, and the statistics it was made from.

A quantized weight is a *value* (a frozen dataclass), never a module or a tensor subclass. Quantizers return codes and
parameters, and nobody derives codes from floats again.

Notation used everywhere: ``N`` out_features (rows), ``K`` in_features (columns), ``G`` groups per row, ``M`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fewbits.quant.errors import FormatError

Params = Mapping[str, Tensor]
"""Parameters of a format for some groups: name -> tensor whose leading shape is that of the groups."""


@runtime_checkable
class Format(Protocol):
    """What stored codes mean.

    Attributes:
        name: canonical name, e.g. ``int4_g64``; ``parse_format(fmt.name) == fmt``.
        code_bits: bits of one code.
        span: consecutive input columns coded jointly (1 for a scalar format).
        width: codes per span.
        group_size: columns that share parameters, or None for one group per row.
    """

    @property
    def name(self) -> str: ...
    @property
    def code_bits(self) -> int: ...
    @property
    def span(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def group_size(self) -> int | None: ...

    def groups(self, columns: int) -> int:
        """Groups that ``columns`` columns make; raises FormatError when they do not divide."""
        ...

    def fit(self, weight: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """Parameters for groups ``weight (..., g)``, each tensor of shape ``(...)``, as they will be stored.

        ``importance (..., g)`` (broadcastable, >= 0) weighs the squared error of each column; None fits the range.
        """
        ...

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """Nearest codes (uint8) of ``values``; each parameter broadcasts against ``values``."""
        ...

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """float32 values of ``codes``; each parameter broadcasts against ``codes``."""
        ...

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """Tensors to store for ``codes (N, columns)`` and parameters ``(N, G)``."""
        ...

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Inverse of :meth:`pack`; raises FormatError when a tensor is missing or has the wrong shape or dtype."""
        ...

    def storage(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that :meth:`pack` returns, without making any."""
        ...


Layout = Sequence[tuple[Format, int]]
"""Runs of columns, left to right: ``[(format, columns), ...]``. Most tensors have one run."""


def stored_bytes(layout: Layout, shape: tuple[int, int]) -> int:
    """Bytes on disk of a weight ``(N, K)``: codes, scales, zero points, shape record."""
    stored = [info for fmt, columns in layout for info in fmt.storage(shape[0], columns).values()]
    return sum(math.prod(size) * dtype.itemsize for size, dtype in [*stored, ((2,), torch.int64)])


@dataclass(frozen=True)
class Segment:
    """A format over a run of columns.

    Attributes:
        format: what the codes mean.
        codes: ``(N, columns / span * width)`` uint8.
        params: parameters of the format, each ``(N, G)``.
    """

    format: Format
    codes: Tensor
    params: Params

    @property
    def columns(self) -> int:
        return self.codes.shape[1] // self.format.width * self.format.span

    def dequantize(self) -> Tensor:
        """float32 ``(N, columns)``."""
        rows, groups = self.codes.shape[0], self.format.groups(self.columns)
        codes = self.codes.view(rows, groups, -1)
        return self.format.decode(codes, {k: v.unsqueeze(-1) for k, v in self.params.items()}).view(rows, -1)


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight matrix ``(N, K)``: segments side by side, left to right."""

    shape: tuple[int, int]
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        assert sum(s.columns for s in self.segments) == self.shape[1], "segments do not cover the columns"

    @property
    def layout(self) -> list[tuple[Format, int]]:
        return [(s.format, s.columns) for s in self.segments]

    def dequantize(self) -> Tensor:
        """float32 ``(N, K)``: exactly what the stored codes mean."""
        return torch.cat([s.dequantize() for s in self.segments], dim=1)

    def pack(self) -> dict[str, Tensor]:
        """Local tensor names -> tensors to store. Names of a second segment end in ``_1``, of a third in ``_2``."""
        out: dict[str, Tensor] = {}
        for i, segment in enumerate(self.segments):
            out |= {_suffixed(k, i): v for k, v in segment.format.pack(segment.codes, segment.params).items()}
        return out | {"weight_shape": torch.tensor(self.shape, dtype=torch.int64)}

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor], layout: Layout) -> QuantizedTensor:
        """Inverse of :meth:`pack`. Raises FormatError when the tensors do not fit the layout."""
        if "weight_shape" not in tensors:
            raise FormatError("weight_shape: missing; the checkpoint is incomplete, quantize again")
        if (shape := tensors["weight_shape"]).shape != (2,) or shape.is_floating_point() or int(shape.min()) < 0:
            raise FormatError(f"weight_shape: got {shape.tolist()}, needed two sizes (N, K)")
        rows, columns = (int(n) for n in shape)
        if sum(n for _, n in layout) != columns:
            raise FormatError(f"weight_shape: got {columns} columns, the layout needs {sum(n for _, n in layout)}")
        segments = []
        for i, (fmt, n) in enumerate(layout):
            suffix = f"_{i}" if i else ""
            local = {k.removesuffix(suffix): v for k, v in tensors.items() if k.endswith(suffix)}
            segments.append(Segment(fmt, *fmt.unpack(local, rows, n)))
        return QuantizedTensor((rows, columns), tuple(segments))

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk: codes, scales, zero points, shape record."""
        return stored_bytes(self.layout, self.shape)

    @property
    def bits_per_weight(self) -> float:
        """From stored bytes; nominal bits appear nowhere."""
        return 8 * self.stored_bytes / (self.shape[0] * self.shape[1])

    @staticmethod
    def concat_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """Blocks of rows of one layout, one below the other: the inverse of :meth:`split_rows`."""
        if len(parts) == 1:
            return parts[0]
        segments = []
        for pieces in zip(*(p.segments for p in parts)):
            params = {k: torch.cat([s.params[k] for s in pieces]) for k in pieces[0].params}
            segments.append(Segment(pieces[0].format, torch.cat([s.codes for s in pieces]), params))
        return QuantizedTensor((sum(p.shape[0] for p in parts), parts[0].shape[1]), tuple(segments))

    def split_rows(self, sizes: Sequence[int]) -> list[QuantizedTensor]:
        """Cut into blocks of rows, e.g. the stacked q, k and v back into three."""
        parts, start = [], 0
        for n in sizes:
            rows = slice(start, start + n)
            cut = tuple(Segment(s.format, s.codes[rows], {k: v[rows] for k, v in s.params.items()})
                        for s in self.segments)
            parts.append(QuantizedTensor((n, self.shape[1]), cut))
            start += n
        return parts


def _suffixed(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


_CHUNK_WEIGHTS = 1 << 21


@dataclass(frozen=True)
class LayerStats:
    """Sums over calibration tokens of one linear's input, so that shards and devices merge with ``+``.

    Attributes:
        xtx: ``(K, K)`` float32, sum of ``x x^T`` over tokens.
        n_tokens: tokens summed.
        cross: ``(K, K)`` float32 or None, sum of ``(x~ - x) x^T`` where ``x~`` is the input in the original model
            and ``x`` the one in the partly quantized model (QEP).
    """

    xtx: Tensor
    n_tokens: int
    cross: Tensor | None = None

    def __add__(self, other: LayerStats) -> LayerStats:
        assert (self.cross is None) == (other.cross is None)
        cross = None if self.cross is None or other.cross is None else self.cross + other.cross
        return LayerStats(self.xtx + other.xtx, self.n_tokens + other.n_tokens, cross)

    @property
    def hessian(self) -> Tensor:
        """``E[x x^T]`` per token, ``(K, K)`` (no factor 2)."""
        return self.xtx / max(self.n_tokens, 1)


def proxy_loss(weight: Tensor, quantized: Tensor | QuantizedTensor, stats: LayerStats) -> tuple[float, float]:
    """``tr(E H E^T)`` with ``E = W - Q`` and the undamped Hessian, and its ratio to ``tr(W H W^T)``.

    The first is the mean squared output error per token, summed over the N outputs.
    """
    loss = power = 0.0
    rows = max(1, _CHUNK_WEIGHTS // weight.shape[1])  # dense rows are made a chunk at a time, to bound memory
    sizes = [min(rows, len(weight) - start) for start in range(0, len(weight), rows)]
    parts = quantized.split(sizes) if isinstance(quantized, Tensor) else quantized.split_rows(sizes)
    for w, part in zip(weight.split(sizes), parts):
        q = part if isinstance(part, Tensor) else part.dequantize()
        loss += _quadratic(w.float() - q, stats.xtx)
        power += _quadratic(w.float(), stats.xtx)
    return loss / max(stats.n_tokens, 1), loss / power if power > 0 else 0.0


def _quadratic(rows: Tensor, xtx: Tensor) -> float:
    """``tr(E X^T X E^T)``."""
    return float(((rows @ xtx) * rows).sum())


class Quantizer(Protocol):
    """How codes are chosen. Options are fields of the implementing frozen dataclass, read from the recipe."""

    @property
    def needs_stats(self) -> bool: ...

    def quantize(
        self, weight: Tensor, stats: LayerStats | None, layout: Layout, *, seed: int = 0
    ) -> tuple[QuantizedTensor, dict[str, float]]:
        """Quantize ``weight (N, K)``, of any float dtype. Also returns facts worth recording, e.g. the damping."""
        ...

"""The values that everything passes around: a quantized tensor, its formats, and the statistics it was made from.

A quantized weight is a *value* (a frozen dataclass), never a module or a tensor subclass. Quantizers return codes and
parameters, and nobody derives codes from floats again.

Notation used everywhere: ``N`` out_features (rows), ``K`` in_features (columns), ``G`` groups per row, ``M`` tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fewbits.quant.errors import FormatError
from fewbits.quant.rotation import Rotation, block_size, rotated_back

Params = Mapping[str, Tensor]
"""Parameters of a format for some groups: name -> tensor whose leading shape is that of the groups."""


@runtime_checkable
class Format(Protocol):
    """What stored codes mean.

    Attributes:
        name: canonical name, e.g. ``int4_g64``; ``parse_format(fmt.name) == fmt``.
        code_bits: bits of one code.
        span: consecutive input columns coded jointly (1 for a scalar format).
        width: columns of codes per span.
        height: consecutive rows coded jointly (1 for a scalar format).
        depth: rows of codes per height.
        group_size: columns that share parameters, or None for one group per row.
        rotated: whether it codes weights in a rotated basis, see :class:`Rotation`.
        joint: whether rows or columns are coded jointly. Its parameters (codebooks), if it has any, are those of all
            rows: ``(G, ...)`` in place of ``(N, G)``.
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
    def height(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def group_size(self) -> int | None: ...
    @property
    def rotated(self) -> bool: ...
    @property
    def joint(self) -> bool: ...

    def __hash__(self) -> int: ...

    def groups(self, columns: int) -> int:
        """Groups that ``columns`` columns make; raises FormatError when they do not divide."""
        ...

    def fit(self, weight: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """Parameters for groups ``weight (..., g)``, each tensor of shape ``(...)``, as they will be stored.

        ``importance (..., g)`` (broadcastable, >= 0) weighs the squared error of each column; None fits the range.
        A joint format takes all rows at once, ``weight (N, columns)`` and ``importance (columns,)``.
        """
        ...

    def shared(self, weight: Tensor) -> dict[str, Tensor]:
        """Parameters that all of ``weight (N, K)`` has in common; :meth:`fit` takes them by name. Most have none."""
        ...

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """Nearest codes (uint8) of ``values``; each parameter broadcasts against ``values``.

        Of a joint format, ``values (N, columns)`` become ``(N / height * depth, columns / span * width)``, int32 where
        a code has more than 8 bits, and parameters are those of the groups that the columns lie in.
        """
        ...

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """float32 values of ``codes``, as :meth:`encode` shapes them; each parameter broadcasts against ``codes``."""
        ...

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """Tensors to store for codes and parameters, as :meth:`encode` and :meth:`fit` shape them."""
        ...

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Inverse of :meth:`pack`; raises FormatError when a tensor is missing or has the wrong shape or dtype."""
        ...

    def storage(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that :meth:`pack` returns, without making any."""
        ...


Stored = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Local tensor name -> shape and dtype of what is stored."""


@dataclass(frozen=True)
class Layout:
    """How a weight is stored: formats over runs of its columns. Most weights have one run.

    Attributes:
        runs: ``((format, columns), ...)``, left to right.
        permuted: the columns are sorted before the runs are laid over them, and the permutation is stored too. Which
            permutation follows from the statistics, when the weight is quantized: :meth:`LayerStats.column_order`.
        rotated: the (sorted) weight is coded in a rotated basis, and the scales of the rotation are stored too. Formats
            that need it bring it along.
        low_rank: rank of a product of two thin matrices that is stored beside the codes and added to them; 0: none.
        scaled: the (sorted) weight is coded with scales of its rows and columns taken out, which are stored.
    """

    runs: tuple[tuple[Format, int], ...]
    permuted: bool = False
    rotated: bool = False
    low_rank: int = 0
    scaled: bool = False

    def __post_init__(self) -> None:
        if any(fmt.rotated for fmt, _ in self.runs):
            object.__setattr__(self, "rotated", True)
        if self.rotated and self.scaled:
            raise FormatError("layout: got scl: and a rotation, which has scales of its own; leave scl: out")

    @staticmethod
    def of(fmt: Format, columns: int) -> Layout:
        """One format over all columns, in their own order."""
        return Layout(((fmt, columns),))

    @staticmethod
    def join(parts: Sequence[Layout]) -> Layout:
        """Parts side by side; neighbours of one format become one run."""
        runs: list[tuple[Format, int]] = []
        for fmt, columns in (run for part in parts for run in part.runs):
            if runs and runs[-1][0] == fmt and fmt.group_size is not None:
                runs[-1] = (fmt, runs[-1][1] + columns)
            else:
                runs.append((fmt, columns))
        assert len(parts) == 1 or not any(p.low_rank for p in parts), "a product is that of all columns"
        return Layout(tuple(runs), any(p.permuted for p in parts), any(p.rotated for p in parts), parts[0].low_rank,
                      any(p.scaled for p in parts))

    def cut(self, start: int, stop: int) -> Layout:
        """What is stored of columns ``start`` to ``stop``."""
        runs, at = [], 0
        for fmt, columns in self.runs:
            if (n := min(at + columns, stop) - max(at, start)) > 0:
                runs.append((fmt, n))
            at += columns
        return Layout(tuple(runs), self.permuted, self.rotated, scaled=self.scaled)

    @property
    def columns(self) -> int:
        return sum(n for _, n in self.runs)

    def check_groups(self) -> None:
        """Raise FormatError where a run of columns is not whole groups of its format."""
        for fmt, columns in self.runs:
            fmt.groups(columns)

    @property
    def own_basis(self) -> bool:
        """Whether the codes are those of the weight itself, neither rotated nor scaled."""
        return not (self.rotated or self.scaled)

    @property
    def whole(self) -> bool:
        """Whether rows and columns are coded together, so that no part of the weight means anything by itself."""
        return not self.own_basis or self.low_rank > 0 or any(fmt.joint for fmt, _ in self.runs)

    @property
    def height(self) -> int:
        """Rows that can only be cut out together, whatever the rotation says."""
        return math.lcm(*(fmt.height for fmt, _ in self.runs))

    def codes_storage(self, rows: int) -> Stored:
        """Codes and parameters of ``rows`` rows. Names of a second run end in ``_1``, of a third in ``_2``."""
        out: Stored = {}
        start = 0
        for i, (fmt, columns) in enumerate(self.runs):
            if start % fmt.span:
                raise FormatError(f"layout: {fmt.name} starts at column {start}, needed a multiple of {fmt.span}, "
                                  "which it codes jointly")
            out |= {_suffixed(k, i): v for k, v in fmt.storage(rows, columns).items()}
            start += columns
        return out

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Names of the tensors that are stored, and their dtypes, whatever the number of rows."""
        return {name: dtype for name, (_, dtype) in self.storage(_LARGE * self.height).items()}

    def storage(self, rows: int) -> Stored:
        """Every tensor that is stored of ``rows`` rows, without making any."""
        out = self.codes_storage(rows)
        if self.permuted:
            out["weight_perm"] = ((self.columns,), permutation_dtype(self.columns))
        if not self.own_basis:
            out |= rotation_storage(rows, self.columns, rotated=self.rotated)
        if self.low_rank:
            out |= low_rank_storage(rows, self.columns, self.low_rank)
        return out | {"weight_shape": ((2,), torch.int64)}

    def stored_bytes(self, rows: int) -> int:
        """Bytes on disk of ``rows`` rows: all of :meth:`storage`."""
        return nbytes(self.storage(rows))


def require_stored(who: str, stored: Stored, tensors: Mapping[str, Tensor], *, any_float: bool = False) -> None:
    """Raise FormatError when a tensor is missing, or has the wrong shape or dtype.

    Args:
        who: what needs them.
        any_float: scales may have been cast with the model; any float dtype that kernels read will do.
    """
    for name, (shape, dtype) in stored.items():
        if (t := tensors.get(name)) is None:
            raise FormatError(f"{name}: missing, {who} needs it; the checkpoint is incomplete")
        allowed = _FLOATS if any_float and dtype.is_floating_point else (dtype,)
        if tuple(t.shape) != shape or t.dtype not in allowed:
            raise FormatError(f"{name}: got {tuple(t.shape)} {t.dtype}, {who} needs {shape} {dtype}")


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def rotation_storage(rows: int, columns: int, *, rotated: bool) -> Stored:
    """The scales of a rotation, or scales alone; raises FormatError where the dimensions have no rotation."""
    if rotated:
        block_size(rows), block_size(columns)
    return {"weight_in_scale": ((columns,), torch.float16), "weight_out_scale": ((rows,), torch.float16)}


def low_rank_storage(rows: int, columns: int, rank: int) -> Stored:
    """Two thin matrices; raises FormatError where they are not thin."""
    if rank > min(rows, columns):
        raise FormatError(f"low_rank: got {rank} for a weight of {rows} x {columns}, needed at most "
                          f"{min(rows, columns)}; lower it")
    return {"weight_low_a": ((rows, rank), torch.float16), "weight_low_b": ((rank, columns), torch.float16)}


@dataclass(frozen=True)
class LowRank:
    """``a b``, added to what the codes mean, in the weight's own basis and order.

    Attributes:
        a: ``(N, r)`` float16.
        b: ``(r, K)`` float16.
    """

    a: Tensor
    b: Tensor

    def dense(self) -> Tensor:
        """float32 ``(N, K)``."""
        return self.a.float() @ self.b.float()


def check_low_rank(tensors: Mapping[str, Tensor], rows: int, columns: int, rank: int) -> LowRank:
    """What was stored; raises FormatError when it is missing, or not finite."""
    require_stored("a layout with lr", stored := low_rank_storage(rows, columns, rank), tensors)
    for name in stored:
        if not bool(tensors[name].isfinite().all()):
            raise FormatError(f"{name}: got NaN or Inf, needed numbers; the checkpoint is damaged, download or "
                              "quantize it again")
    return LowRank(tensors["weight_low_a"], tensors["weight_low_b"])


def check_rotation(tensors: Mapping[str, Tensor], layout: Layout, rows: int) -> Rotation | None:
    """What was stored, if the layout has it; raises FormatError when a scale is missing, or is none."""
    if layout.own_basis:
        return None
    stored = rotation_storage(rows, layout.columns, rotated=layout.rotated)
    require_stored("a layout with had: or scl:", stored, tensors)
    for name in stored:
        if not bool((tensors[name].isfinite() & (tensors[name] != 0)).all()):
            raise FormatError(f"{name}: got 0, NaN or Inf, needed finite scales; the checkpoint is damaged, download "
                              "or quantize it again")
    blocks = (block_size(rows), block_size(layout.columns)) if layout.rotated else (1, 1)
    return Rotation(tensors["weight_in_scale"], tensors["weight_out_scale"], *blocks)


def nbytes(stored: Stored) -> int:
    return sum(math.prod(size) * dtype.itemsize for size, dtype in stored.values())


def permutation_dtype(columns: int) -> torch.dtype:
    """The dtype that a permutation of so many columns is stored in."""
    return torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32


def check_permutation(order: Tensor | None, columns: int) -> Tensor:
    """What was stored as ``weight_perm``; raises FormatError when it does not put ``columns`` columns in some order."""
    again = "the checkpoint is damaged, download or quantize it again"
    if order is None:
        raise FormatError("weight_perm: missing, the layout says perm; the checkpoint is incomplete, quantize again")
    if tuple(order.shape) != (columns,) or order.dtype != permutation_dtype(columns):
        raise FormatError(f"weight_perm: got {tuple(order.shape)} {order.dtype}, "
                          f"needed ({columns},) {permutation_dtype(columns)}; {again}")
    if not torch.equal(order.long().sort().values, torch.arange(columns, device=order.device)):
        raise FormatError(f"weight_perm: got values from {int(order.min())} to {int(order.max())}, "
                          f"needed each of 0 to {columns - 1} once; {again}")
    return order


def natural_columns(stored: Tensor, order: Tensor) -> Tensor:
    """Columns back where they belong: column ``k`` of ``stored (N, K)`` is column ``order[k]``."""
    return torch.empty_like(stored).index_copy_(1, order.long(), stored)


def nominal_bits(fmt: Format) -> float:
    """Bits of codes for each weight; stored bits are more. Only models of widths may ask for it."""
    if not fmt.joint:
        return fmt.code_bits
    rows, columns = _LARGE * fmt.height, _LARGE * fmt.span  # codebooks are next to nothing
    return 8 * nbytes(fmt.storage(rows, columns)) / (rows * columns)


_LARGE = 1 << 16


@dataclass(frozen=True)
class Segment:
    """A format over a run of columns.

    Attributes:
        format: what the codes mean.
        codes: ``(N / height * depth, columns / span * width)`` uint8, or int32.
        params: parameters of the format, each ``(N, G)``, or ``(G, ...)`` of a joint format.
    """

    format: Format
    codes: Tensor
    params: Params

    @property
    def columns(self) -> int:
        return self.codes.shape[1] // self.format.width * self.format.span

    @property
    def rows(self) -> int:
        return self.codes.shape[0] // self.format.depth * self.format.height

    def dequantize(self) -> Tensor:
        """float32 ``(N, columns)``."""
        if self.format.joint:
            return self.format.decode(self.codes, self.params)
        codes = self.codes.view(self.rows, self.format.groups(self.columns), -1)
        return self.format.decode(codes, {k: v.unsqueeze(-1) for k, v in self.params.items()}).view(self.rows, -1)

    @staticmethod
    def nearest(fmt: Format, values: Tensor, params: Params) -> Segment:
        """The nearest codes of ``values (N, columns)``, given parameters as :meth:`Format.fit` shapes them."""
        if fmt.joint:
            return Segment(fmt, fmt.encode(values, params), params)
        grouped = values.reshape(len(values), fmt.groups(values.shape[1]), -1)
        codes = fmt.encode(grouped, {k: v.unsqueeze(-1) for k, v in params.items()})
        return Segment(fmt, codes.view(values.shape), params)

    def cut(self, which: slice | Tensor) -> Segment:
        """Some rows; of rows that are coded jointly, a slice of whole tiles."""
        params = self.params if self.format.joint else {k: v[which] for k, v in self.params.items()}
        if self.format.height > 1:
            assert isinstance(which, slice)
            start, stop, _ = which.indices(self.rows)
            assert start % self.format.height == stop % self.format.height == 0, "a tile is cut"
            which = slice(*(row // self.format.height * self.format.depth for row in (start, stop)))
        return Segment(self.format, self.codes[which], params)


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight matrix ``(N, K)``: segments side by side, left to right.

    Attributes:
        permutation: ``(K,)``: column ``k`` of the segments is column ``permutation[k]`` of the weight. None: they are
            in their own order.
        rotation: the basis of the segments; None: that of the weight.
        low_rank: what is added to the segments, once they are in the basis and order of the weight.
    """

    shape: tuple[int, int]
    segments: tuple[Segment, ...]
    permutation: Tensor | None = None
    rotation: Rotation | None = None
    low_rank: LowRank | None = None

    def __post_init__(self) -> None:
        assert sum(s.columns for s in self.segments) == self.shape[1], "segments do not cover the columns"

    @property
    def layout(self) -> Layout:
        runs = tuple((s.format, s.columns) for s in self.segments)
        rank = 0 if self.low_rank is None else self.low_rank.a.shape[1]
        basis = self.rotation
        return Layout(runs, self.permutation is not None, basis is not None and basis.column_block > 1, rank,
                      basis is not None and basis.column_block == 1)

    def dequantize(self) -> Tensor:
        """float32 ``(N, K)``, columns in their own order: exactly what the stored codes mean."""
        stored = torch.cat([s.dequantize() for s in self.segments], dim=1)
        if self.rotation is not None:
            stored = rotated_back(stored, self.rotation)
        if self.permutation is not None:
            stored = natural_columns(stored, self.permutation)
        return stored if self.low_rank is None else stored + self.low_rank.dense()

    def pack(self) -> dict[str, Tensor]:
        """Local tensor names -> tensors to store, as :meth:`Layout.storage` announces them."""
        out: dict[str, Tensor] = {}
        for i, segment in enumerate(self.segments):
            out |= {_suffixed(k, i): v for k, v in segment.format.pack(segment.codes, segment.params).items()}
        if self.permutation is not None:  # a copy: blocks of rows share one permutation, and each stores its own
            out["weight_perm"] = self.permutation.to(permutation_dtype(self.shape[1]), copy=True)
        if self.rotation is not None:
            out |= {"weight_in_scale": self.rotation.in_scale.clone(), "weight_out_scale": self.rotation.out_scale}
        if self.low_rank is not None:
            out |= {"weight_low_a": self.low_rank.a, "weight_low_b": self.low_rank.b.clone()}
        return out | {"weight_shape": torch.tensor(self.shape, dtype=torch.int64)}

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor], layout: Layout) -> QuantizedTensor:
        """Inverse of :meth:`pack`. Raises FormatError when the tensors do not fit the layout."""
        if "weight_shape" not in tensors:
            raise FormatError("weight_shape: missing; the checkpoint is incomplete, quantize again")
        if (shape := tensors["weight_shape"]).shape != (2,) or shape.is_floating_point() or int(shape.min()) < 0:
            raise FormatError(f"weight_shape: got {shape.tolist()}, needed two sizes (N, K)")
        rows, columns = (int(n) for n in shape)
        if layout.columns != columns:
            raise FormatError(f"weight_shape: got {columns} columns, the layout needs {layout.columns}")
        segments = []
        for i, (fmt, n) in enumerate(layout.runs):
            suffix = f"_{i}" if i else ""
            local = {k.removesuffix(suffix): v for k, v in tensors.items() if k.endswith(suffix)}
            segments.append(Segment(fmt, *fmt.unpack(local, rows, n)))
        order = check_permutation(tensors.get("weight_perm"), columns) if layout.permuted else None
        rotation = check_rotation(tensors, layout, rows)
        low_rank = check_low_rank(tensors, rows, columns, layout.low_rank) if layout.low_rank else None
        return QuantizedTensor((rows, columns), tuple(segments), order, rotation, low_rank)

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk of everything that is stored."""
        return self.layout.stored_bytes(self.shape[0])

    @property
    def bits_per_weight(self) -> float:
        """From stored bytes; nominal bits appear nowhere."""
        return 8 * self.stored_bytes / (self.shape[0] * self.shape[1])

    @staticmethod
    def concat_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """Blocks of rows of one layout and permutation, one below the other: the inverse of :meth:`split_rows`."""
        if len(parts) == 1:
            return parts[0]
        segments = []
        for pieces in zip(*(p.segments for p in parts)):
            fmt, params = pieces[0].format, pieces[0].params
            if not fmt.joint:
                params = {k: torch.cat([s.params[k] for s in pieces]) for k in params}
            segments.append(Segment(fmt, torch.cat([s.codes for s in pieces]), params))
        assert all(p.rotation is None and p.low_rank is None for p in parts), "these are of all rows"
        shape = (sum(p.shape[0] for p in parts), parts[0].shape[1])
        return QuantizedTensor(shape, tuple(segments), parts[0].permutation)

    def split_rows(self, sizes: Sequence[int]) -> list[QuantizedTensor]:
        """Cut into blocks of rows, e.g. the stacked q, k and v back into three."""
        ends = list(itertools.accumulate(sizes))
        return [self.rows(slice(end - n, end)) for n, end in zip(sizes, ends)]

    def rows(self, which: slice | Tensor) -> QuantizedTensor:
        """Some rows, in the order in which they are named; of tiles or a rotated basis, whole blocks of them."""
        rotation = None
        if self.rotation is not None:
            assert isinstance(which, slice)
            rotation = self.rotation.rows(which)
        cut = tuple(s.cut(which) for s in self.segments)
        low_rank = None if self.low_rank is None else LowRank(self.low_rank.a[which], self.low_rank.b)
        return QuantizedTensor((cut[0].rows, self.shape[1]), cut, self.permutation, rotation, low_rank)

    @property
    def row_step(self) -> int:
        """Rows that can only be cut out together."""
        return math.lcm(self.layout.height, 1 if self.rotation is None else self.rotation.row_block)


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
        curvature: ``(N,)`` or None, what the model's output thinks of an error of each of this linear's outputs, see
            :func:`fewbits.calibration.curvature.output_curvature`. Not summed: it is one linear's own.
    """

    xtx: Tensor
    n_tokens: int
    cross: Tensor | None = None
    curvature: Tensor | None = None

    def __add__(self, other: LayerStats) -> LayerStats:
        assert (self.cross is None) == (other.cross is None)
        cross = None if self.cross is None or other.cross is None else self.cross + other.cross
        return LayerStats(self.xtx + other.xtx, self.n_tokens + other.n_tokens, cross)

    @property
    def hessian(self) -> Tensor:
        """``E[x x^T]`` per token, ``(K, K)`` (no factor 2)."""
        return self.xtx / max(self.n_tokens, 1)

    def column_order(self) -> Tensor:
        """Columns by falling mean square of the input, equal ones as they come: how a permuted layout has them."""
        return torch.argsort(self.xtx.diagonal(), descending=True, stable=True)

    def permuted(self, order: Tensor) -> LayerStats:
        """Those of the input with its columns in ``order``."""
        cross = None if self.cross is None else permuted(self.cross, order)
        return LayerStats(permuted(self.xtx, order), self.n_tokens, cross)


def permuted(matrix: Tensor, order: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``matrix[order][:, order]`` without a second copy of its size."""
    out = torch.empty(matrix.shape, dtype=dtype or matrix.dtype, device=matrix.device)
    for start in range(0, len(order), 256):
        out[start : start + 256] = matrix[order[start : start + 256]][:, order]
    return out


def proxy_loss(weight: Tensor, quantized: Tensor | QuantizedTensor, stats: LayerStats) -> tuple[float, float]:
    """``tr(E H E^T)`` with ``E = W - Q`` and the undamped Hessian, and its ratio to ``tr(W H W^T)``.

    The first is the mean squared output error per token, summed over the N outputs.
    """
    loss = power = 0.0
    rows = max(1, _CHUNK_WEIGHTS // weight.shape[1])  # dense rows are made a chunk at a time, to bound memory
    if isinstance(quantized, QuantizedTensor):
        rows = -(-rows // quantized.row_step) * quantized.row_step
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
    @property
    def stacks(self) -> bool:
        """Whether matrices that read one input may be quantized as one: nothing is the same for all rows."""
        ...

    def quantize(
        self, weight: Tensor, stats: LayerStats | None, layout: Layout, *, seed: int = 0
    ) -> tuple[QuantizedTensor, dict[str, float]]:
        """Quantize ``weight (N, K)``, of any float dtype. Also returns facts worth recording, e.g. the damping.

        Sorted columns and rotations are left to :func:`fewbits.quant.quantizers.fit.in_coded_basis`.
        """
        ...

"""The weights of one vLLM layer while they arrive, tensor by tensor, until they are packed matrices of this device.

One layer of vLLM can stand for several weights of a checkpoint (``qkv_proj`` for q, k and v), and on each of several
devices for some rows or columns of them. Each weight is collected until it is whole, cut to what this device needs, and
becomes a :class:`PackedMatrix`, so the weights of a layer may have different formats; neighbours of one format are put
into one. Which rows and columns a device needs is asked of vLLM: the layer's own loader is run over their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.kernels.linear import PackedMatrix
from fewbits.quant.errors import CheckpointError, FormatError
from fewbits.quant.types import Layout, check_permutation
from fewbits.serving.tensor_parallel import own_scale, stack_rows, stackable, take_columns, take_rows

AGAIN = "the checkpoint does not belong to its config.json or is incomplete; copy or quantize it again"
_SHARDS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Share:
    """What one device has of a layer.

    Attributes:
        rows, columns: of the layer on this device, all its weights together.
        loader: vLLM's own, ``(param, loaded, [shard id])``: copies this device's part of ``loaded`` to its place.
        tp_size: devices that share the layer.
        padded: some of the last rows may belong to no weight.
        device, dtype: where the weights go, and what is computed in.
    """

    rows: int
    columns: int
    loader: Callable[..., None]
    tp_size: int
    padded: bool
    device: torch.device
    dtype: torch.dtype

    def of(self, whole: int, dim: int, shard: Any) -> tuple[int, Tensor]:
        """Which of ``whole`` rows (dim 0) or columns (dim 1) this device needs, and where the first of them goes.

        vLLM's loader copies numbers from 1 on as it would copy weights; 0 stays where nothing of this weight goes.

        Raises:
            FormatError: the loader has another number of them in mind.
        """
        shape, own = ((1, -1), self.columns) if dim else ((-1, 1), self.rows)
        place = nn.Parameter(torch.zeros(own, dtype=torch.int64, device="cpu").view(shape), requires_grad=False)
        setattr(place, "input_dim" if dim else "output_dim", dim)
        place.ignore_warning = True  # type: ignore[attr-defined]  # vLLM's, of a tensor that all weights share
        numbers = torch.arange(1, whole + 1, device="cpu").view(shape)
        wrong = f"has {whole} {'columns' if dim else 'rows'}, and vLLM needs another number of them"
        try:
            self.loader(place, numbers, *(() if shard is None else (shard,)))
        except (AssertionError, RuntimeError) as e:
            raise FormatError(wrong) from e
        found = place.detach().flatten()
        at = found.nonzero().flatten()
        room = own if self.padded else len(at)  # of a padded layer the last device may have less
        if not len(at) or int(at[-1]) - int(at[0]) + 1 != len(at) or whole > room * self.tp_size:
            raise FormatError(wrong)
        return int(at[0]), found[at] - 1


@dataclass
class Loading:
    """The weights of one layer.

    Attributes:
        prefix: name of the layer.
        layouts: name in the checkpoint -> layout of the whole weight, in the order of their rows.
        pending: shard id -> tensors that have arrived of a weight that is not whole yet.
        finished: shard ids of those that are.
        done: first row on this device -> matrix.
    """

    prefix: str
    layouts: dict[str, Layout]
    share: Share
    pending: dict[Any, dict[str, Tensor]] = field(default_factory=dict)
    finished: set[Any] = field(default_factory=set)
    done: dict[int, PackedMatrix] = field(default_factory=dict)

    def loader_of(self, local: str) -> Callable[..., None]:
        """What vLLM calls with each tensor of this local name; the shard id says which weight it belongs to."""

        def load(param: nn.Parameter, tensor: Tensor, *shard: Any) -> None:
            self.take(local, tensor, shard[0] if shard else None)

        return load

    def take(self, local: str, tensor: Tensor, shard: Any) -> None:
        name, layout = self._weight(shard)
        tensors = self.pending.setdefault(shard, {})
        if local in tensors or shard in self.finished:
            raise CheckpointError(f"{name}.{local}: stored twice; the folder has files of another checkpoint, keep "
                                  "those that fewbits.safetensors.index.json names")
        tensors[local] = tensor
        if tensors.keys() == layout.dtypes.keys():
            self._place(name, layout, self.pending.pop(shard), shard)
            self.finished.add(shard)

    def finish(self) -> list[PackedMatrix]:
        """The matrices in the order of their rows, neighbours of one layout in one."""
        for shard, tensors in self.pending.items():
            name, layout = self._weight(shard)
            missing = [k for k in layout.dtypes if k not in tensors]
            raise CheckpointError(f"{name}.{missing[0]}: missing; {AGAIN}")
        out: list[list[PackedMatrix]] = []
        for first in sorted(self.done):
            matrix = self.done[first]
            if out and _are_one(out[-1][0], matrix):
                out[-1].append(matrix)
            else:
                out.append([matrix])
        if not self._covered():
            rows = sum(m.rows for m in self.done.values())
            raise CheckpointError(f"{self.prefix}: {rows} of {self.share.rows} rows are stored (of "
                                  f"{', '.join(self.layouts)}); {AGAIN}")
        return [self._stacked(group) for group in out]

    def _covered(self) -> bool:
        end = 0
        for first in sorted(self.done):
            if first != end:
                return False
            end += self.done[first].rows
        return end > 0 and (end == self.share.rows or self.share.padded)

    def _weight(self, shard: Any) -> tuple[str, Layout]:
        """Name and layout of the weight with this shard id; None is a weight that is fused in the checkpoint too."""
        items = list(self.layouts.items())
        index = _SHARDS.get(shard, shard) if isinstance(shard, str) else shard
        if isinstance(index, int) and index < len(items):
            return items[index]
        if any(layout != items[0][1] for _, layout in items):
            raise CheckpointError(f"{self.prefix}: its parts have several formats, and vLLM calls one of them "
                                  f"{shard!r}, which says not which; quantize all of {', '.join(self.layouts)} alike")
        return (items[0] if len(items) == 1 else (self.prefix, items[0][1]))

    def _place(self, name: str, layout: Layout, tensors: dict[str, Tensor], shard: Any) -> None:
        height = _checked(name, layout, tensors)
        start, stop = 0, layout.columns
        try:
            first, rows = self.share.of(height, 0, shard)
            if self.share.columns != layout.columns:
                _, columns = self.share.of(layout.columns, 1, shard)
                start, stop = int(columns[0]), int(columns[-1]) + 1
            cut, layout = take_columns(take_rows(tensors, layout, rows), layout, start, stop)
        except FormatError as e:
            raise CheckpointError(f"{name}: {e} for {self.prefix}; {AGAIN}") from e
        self.done[first] = self._matrix(cut, layout)

    def _matrix(self, tensors: Mapping[str, Tensor], layout: Layout) -> PackedMatrix:
        matrix = PackedMatrix(layout, (int(tensors["weight_shape"][0]), layout.columns), dtype=self.share.dtype)
        matrix.assign({k: v.to(self.share.device) for k, v in tensors.items()})
        return matrix

    def _stacked(self, group: list[PackedMatrix]) -> PackedMatrix:
        if len(group) == 1:
            return group[0]
        parts = [{k: v.detach() for k, v in m.packed_tensors().items()} for m in group]
        return self._matrix(stack_rows(parts, group[0].layout), group[0].layout)


def _are_one(above: PackedMatrix, below: PackedMatrix) -> bool:
    return (above.layout == below.layout and stackable(below.layout)
            and own_scale([above.packed_tensors(), below.packed_tensors()], below.layout) is None)


def _checked(name: str, layout: Layout, tensors: Mapping[str, Tensor]) -> int:
    """Rows of a weight whose tensors all have the shapes and dtypes of its layout."""
    shape = tensors["weight_shape"].tolist()
    if len(shape) != 2 or shape[1] != layout.columns or shape[0] < 1:
        raise CheckpointError(f"{name}.weight_shape: got {shape}, needed (N, {layout.columns}); {AGAIN}")
    for local, (size, dtype) in layout.storage(shape[0]).items():
        got = tensors[local]
        if tuple(got.shape) != size or got.dtype != dtype:
            raise CheckpointError(f"{name}.{local}: got {tuple(got.shape)} {got.dtype}, needed {size} {dtype}; "
                                  f"{AGAIN}")
    if layout.permuted:
        try:
            check_permutation(tensors["weight_perm"], layout.columns)
        except FormatError as e:
            raise CheckpointError(f"{name}: {e}") from e
    return shape[0]

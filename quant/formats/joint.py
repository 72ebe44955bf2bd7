"""What formats that code several rows, or columns, at once have in common."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fewbits.quant.errors import FormatError


class JointFormat:
    """Codes of tiles of ``height`` rows by ``span`` columns, in a rotated basis and with no parameters beside them
    unless a family says otherwise.

    Attributes:
        unit: what a tile is called.
    """

    unit: ClassVar[str]
    height: ClassVar[int]
    depth: ClassVar[int] = 1
    span: ClassVar[int] = 1
    width: ClassVar[int] = 1
    group_size = None
    rotated: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def groups(self, columns: int) -> int:
        if columns % self.span:
            raise FormatError(f"K = {columns} is not a multiple of {self.span}, the columns of {self.unit}; give it an "
                              "integer format")
        return 1

    def fit(self, weight: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        return {}

    def shared(self, weight: Tensor) -> dict[str, Tensor]:
        return {}

    def tiles(self, rows: int, columns: int) -> tuple[int, int]:
        """Tiles that a weight has, one below the other and side by side; raises FormatError where some are cut."""
        self.groups(columns)
        if rows % self.height:
            raise FormatError(f"N = {rows} is not a multiple of {self.height}, the rows of {self.unit}; give it an "
                              "integer format")
        return rows // self.height, columns // self.span

    def column_vectors(self, values: Tensor) -> Tensor:
        """``(N, columns)`` to ``(N / height * columns, height)``: what lies one below the other is coded together."""
        columns = values.shape[1]
        return values.reshape(-1, self.height, columns).transpose(1, 2).reshape(-1, self.height)

    def code_rows(self, codes: Tensor, columns: int) -> Tensor:
        """Codes of :meth:`column_vectors`, ``(N / height * columns, depth)``, as ``(N / height * depth, columns)``."""
        return codes.view(-1, columns, self.depth).transpose(1, 2).reshape(-1, columns)


def summed(codes: Tensor, books: Tensor) -> Tensor:
    """float32 ``(N, columns)``: sums of one entry of each of ``books (stages, entries, height)``.

    ``codes (N / height * stages, columns)``.
    """
    columns = codes.shape[1]
    first, *rest = codes.view(-1, len(books), columns).unbind(1)
    vectors = books[0][first.long()]
    for book, stage in zip(books[1:], rest):
        vectors = vectors + book[stage.long()]
    return vectors.transpose(1, 2).reshape(-1, columns)

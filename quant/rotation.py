"""The change of basis in which vector codes see weights that look Gaussian: block Hadamard, signs and scales.

    W = diag(out_scale) R_N^T Q R_K diag(in_scale)

``Q`` is what is coded, ``R_n`` the orthonormal Hadamard matrix of ``block_size(n)`` repeated along the diagonal, and
both scales carry random signs. Whatever transforms the weight transforms the Hessian: ``H' = R_K D H D R_K^T`` with
``D = diag(in_scale)``, so that the loss in one basis is the loss in the other.

At run time ``y = out_scale * R_N^T (Q (R_K (in_scale * x)))``; a Sylvester Hadamard matrix is its own transpose.

A *scaled* weight has the scales alone: blocks of 1, and no signs. They are the learned scales of rows and columns of
PTQ1.61 (arXiv 2502.13179) and ARB-RC of ARB-LLM (arXiv 2410.03129).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewbits.quant.errors import FormatError

if TYPE_CHECKING:
    from fewbits.quant.types import LayerStats

MAX_BLOCK, MIN_BLOCK = 128, 16


def block_size(n: int) -> int:
    """Of the Hadamard transform: the largest power of two up to 128 that divides ``n``.

    Raises:
        FormatError: it is below 16.
    """
    if (size := min(n & -n, MAX_BLOCK)) < MIN_BLOCK:
        raise FormatError(f"rotation: got a dimension of {n}, divided by {size} and no larger power of two; needed at "
                          f"least {MIN_BLOCK}; give it an integer format")
    return size


@dataclass(frozen=True)
class Rotation:
    """The basis that a weight is coded in: ``W = diag(out_scale) R_N^T Q R_K diag(in_scale)``.

    ``R_n`` is the orthonormal Hadamard matrix of :func:`block_size` repeated along the diagonal; 1: the identity.

    Attributes:
        in_scale: ``(K,)`` float16, with random signs.
        out_scale: ``(N,)`` float16, with random signs.
        row_block: size of the transform along the rows, which stays what it is when blocks of rows are cut out.
        column_block: size of the transform along the columns.
    """

    in_scale: Tensor
    out_scale: Tensor
    row_block: int
    column_block: int

    def rows(self, which: slice) -> Rotation:
        return dataclasses.replace(self, out_scale=self.out_scale[which])

    def float(self) -> Rotation:
        """With scales in float32, as every product needs them."""
        return dataclasses.replace(self, in_scale=self.in_scale.float(), out_scale=self.out_scale.float())


SCALE_RANGE = 8.0
"""Scales stay within this factor of their geometric mean."""


_MATRICES: dict[tuple[int, torch.device], Tensor] = {}


def _hadamard(size: int, device: torch.device) -> Tensor:
    """Sylvester's matrix, orthonormal, float32 ``(size, size)``; made once."""
    if (size, device) not in _MATRICES:
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        _MATRICES[size, device] = (matrix / math.sqrt(size)).to(device)
    return _MATRICES[size, device]


def hadamard(x: Tensor, size: int) -> Tensor:
    """``x (..., n)`` with each run of ``size`` entries of its last dimension transformed; its own inverse."""
    if size == 1:
        return x
    return (x.reshape(-1, size) @ _hadamard(size, x.device).to(x.dtype)).view(x.shape)


def rotate_columns(x: Tensor, rotation: Rotation) -> Tensor:
    """``x (..., K)`` as the coded matrix reads it: ``R_K (in_scale * x)``, float32."""
    return hadamard(x.float() * rotation.in_scale.float(), rotation.column_block)


def rotate_rows_back(y: Tensor, rotation: Rotation) -> Tensor:
    """What the coded matrix made, ``(..., N)`` float32, as the weight would have made it."""
    return hadamard(y, rotation.row_block) * rotation.out_scale.float()


def rotated_back(coded: Tensor, rotation: Rotation) -> Tensor:
    """The weight ``(N, K)`` that ``coded (N, K)`` float32 stands for."""
    columns = hadamard(coded, rotation.column_block) * rotation.in_scale.float()
    return rotate_rows_back(columns.T, rotation).T


def rotate(weight: Tensor, rotation: Rotation) -> Tensor:
    """Inverse of :func:`rotated_back`: ``weight (N, K)`` float32 as it is coded."""
    rows = hadamard((weight / rotation.out_scale.float()[:, None]).T, rotation.row_block).T
    return hadamard(rows / rotation.in_scale.float(), rotation.column_block)


def rotate_stats(stats: LayerStats, rotation: Rotation) -> LayerStats:
    """Those of the inputs that the coded matrix reads. Both axes of the sums are inputs: one rule for all of them."""
    def both(matrix: Tensor) -> Tensor:
        half = rotate_columns(matrix, rotation)
        return rotate_columns(half.T, rotation).T.contiguous()

    cross = None if stats.cross is None else both(stats.cross)
    return dataclasses.replace(stats, xtx=both(stats.xtx), cross=cross)


def choose_rotation(weight: Tensor, stats: LayerStats | None, seed: int) -> Rotation:
    """Scales and signs for ``weight (N, K)`` float32, so that what is coded has a mean square of 1.

    Once rotated, all entries of a block of rows and of columns have one variance, and the error that a code makes of
    them is in proportion to ``|W / (out in^T)|^2 (sum_k H_kk in_k^2) (sum_n out_n^2)``. The inequality of Cauchy and
    Schwarz gives the least of it: ``out_n = |w_n|^(1/2)``, ``in_k = (|w_k|^2 / H_kk)^(1/4)``. That is before error
    feedback, which spends the error where ``H`` is small anyway: with half the exponent of ``in`` all five matrices of
    SmolLM2-135M that were tried lost 1 to 6 % less than without it, with all of it up to 6 % more.

    Signs are drawn by ``seed`` and K alone for the columns, so that all weights that read one input share them.
    """
    rows, columns = weight.shape
    signs = [_signs(n, seed + salt).to(weight.device) for n, salt in ((columns, 0), (rows, 1))]
    out_scale = _clamped(weight.square().sum(1).pow(1 / 4))
    power = (weight / out_scale[:, None]).square().sum(0)
    curvature = torch.ones_like(power) if stats is None else stats.hessian.diagonal()
    in_scale = _clamped((power / (curvature + 0.01 * curvature.mean()).clamp(min=1e-30)).pow(1 / 8))
    in_scale = (in_scale / in_scale.log().mean().exp() * signs[0]).half()
    # Orthonormal transforms keep the sum of squares, so the size of what is coded is known before it is made.
    size = (weight / out_scale[:, None] / in_scale.float()).square().mean().sqrt().clamp(min=1e-12)
    return Rotation(in_scale, storable(out_scale * size * signs[1]), block_size(rows), block_size(columns))


def choose_scales(weight: Tensor, stats: LayerStats | None) -> Rotation:
    """Scales alone for ``weight (N, K)`` float32: the best product of two vectors for the magnitudes.

    It minimizes ``sum_ij H_jj (|w_ij| - r_i c_j)^2``, r and c in turns: with codes that are the signs, that is ARB-RC.
    """
    size = weight.abs()
    h = torch.ones_like(size[0]) if stats is None else stats.hessian.diagonal()
    h = (h / h.mean().clamp(min=1e-30) + 1e-4)
    c = torch.ones_like(h)
    for _ in range(_RANK_ONE_ROUNDS):
        r = size @ (h * c) / (h * c.square()).sum().clamp(min=1e-30)
        c = r @ size / r.square().sum().clamp(min=1e-30)
    c = _clamped(c)
    mean = c.log().mean().exp()
    return Rotation(storable(c / mean), storable(_clamped(r * mean)), 1, 1)


_RANK_ONE_ROUNDS = 8


def fold_exponents(weight: Tensor, stats: LayerStats) -> Rotation:
    """Scales of columns that even out the inputs of ``weight (N, K)``: powers of two from 1/8 to 1, and none of rows.

    These are the pre-shifted exponents of LLM-FP4 (arXiv 2310.16836, eq. 9): an input that is large in all tokens is
    shifted down before it is rounded with one exponent a token, and its weights are shifted up before they are rounded
    (the paper shifts them afterwards, where small ones are lost). Inputs up to the median of sizes stay as they are.
    """
    size = stats.hessian.diagonal().clamp(min=1e-30).sqrt().log2()
    shift = (size - size.median()).round().clamp(0, _SHIFTS)
    return Rotation(torch.exp2(-shift).half(), torch.ones(len(weight), dtype=torch.float16, device=weight.device), 1, 1)


_SHIFTS = 3
"""What an exponent of E2M1 can be shifted by."""


def _signs(n: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n,), generator=draw).mul_(2).sub_(1).float()


def _clamped(scale: Tensor) -> Tensor:
    """Within a factor of the geometric mean of those above 0."""
    if not bool((scale > 0).any()):
        return torch.ones_like(scale)
    mean = scale[scale > 0].log().mean().exp()
    return scale.clamp(mean / SCALE_RANGE, mean * SCALE_RANGE)


def storable(scale: Tensor) -> Tensor:
    """A scale with signs in float16, none of it 0; raises FormatError where that cannot hold it."""
    limits = torch.finfo(torch.float16)
    if bool((scale.abs() > limits.max).any()):
        raise FormatError(f"weight_out_scale: got {float(scale.abs().max()):.3g}, float16 holds at most "
                          f"{limits.max:.3g}; give the tensor an integer format with scales of bfloat16")
    least = limits.smallest_normal / 32
    return torch.where(scale < 0, scale.clamp(max=-least), scale.clamp(min=least)).half()

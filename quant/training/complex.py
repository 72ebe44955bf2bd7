"""Linears with complex weights in {+1, +i, -1, -i}, trained from scratch (iFairy).

``W = A + iB (n, m)`` acts on ``x = x_r + i x_i``, which is stored as the real ``[x_r; x_i]`` of 2m channels. Every
entry becomes the power of i that it points to most (PhaseQuant) times a scale: the mean of |A| of all that became +1
or -1, or of |B| of those that became +i or -i. A weight is 2 bits, and there are a quarter as many as in a real linear
of these channels. Nothing in a model needs a complex dtype: the layer is the real matrix ``[[A, -B], [B, A]]``,
``Re(q conj(k))`` is the product of concatenated parts, and rotary positions turn ``(x_r, x_i)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.quant.bitpack import pack_rows, packed_words, unpack_rows
from fewbits.quant.errors import FormatError
from fewbits.quant.formats.fairy import axis_scales, phases, powers
from fewbits.quant.types import Stored, nbytes, require_stored

LEAST_SCALE = 1e-6
LEAST_INPUT = 1e-5


class StraightThrough(torch.autograd.Function):
    """The second argument forwards, and its gradient to the first, all of it."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def block_matrix(a: Tensor, b: Tensor) -> Tensor:
    """The real ``(2n, 2m)`` that multiplies ``[x_r; x_i]`` as ``a + ib (n, m)`` multiplies x."""
    return torch.cat([torch.cat([a, -b], 1), torch.cat([b, a], 1)])


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs ``(..., K)`` as whole numbers of -128 to 127 in float32, and what 1 is worth, ``(..., 1)``."""
    step = x.detach().float().abs().amax(-1, keepdim=True).clamp(min=LEAST_INPUT) / 127
    return (x.detach().float() / step).round().clamp(-128, 127), step


class PhaseLinear(nn.Module):
    """``[x_r; x_i] (..., in_features) -> [y_r; y_i] (..., out_features)`` with ``y = PhaseQuant(A + iB) x``.

    Gradients pass the quantizer unchanged, to both coordinates of every entry: to A they are ``g_r x_r^T + g_i x_i^T``
    and to B ``g_i x_r^T - g_r x_i^T``. The coordinate that is not in use moves too, and so a phase can turn.

    Attributes:
        a: ``(out_features / 2, in_features / 2)``, real parts.
        b: imaginary parts, the same shape.
        round_inputs: whether inputs are rounded to 8 bits, with one scale a token.
    """

    def __init__(self, in_features: int, out_features: int, *, round_inputs: bool = False, std: float = 0.02) -> None:
        super().__init__()
        if in_features % 2 or out_features % 2:
            raise FormatError(f"PhaseLinear: got {in_features} inputs and {out_features} outputs, needed even numbers, "
                              "one half of them imaginary parts")
        self.in_features, self.out_features, self.round_inputs = in_features, out_features, round_inputs
        self.a = nn.Parameter(torch.randn(out_features // 2, in_features // 2) * std)
        self.b = nn.Parameter(torch.randn(out_features // 2, in_features // 2) * std)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, round_inputs={self.round_inputs}"

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """Powers of i ``(n, m)`` and the scales ``(2,)`` of the real and the imaginary axis, float32."""
        z = torch.complex(self.a.float(), self.b.float())
        found = phases(z)
        return found, axis_scales(z, found).clamp(min=LEAST_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        found, scales = self.codes()
        parts = (powers(found) * scales).to(self.a.dtype)
        a, b = (StraightThrough.apply(raw, own) for raw, own in zip((self.a, self.b), parts.unbind(-1)))
        if self.round_inputs:
            whole, step = round_tokens(x)
            x = StraightThrough.apply(x, (whole * step).to(x.dtype))
        return F.linear(x, block_matrix(a, b))

    def frozen(self) -> PhaseWeight:
        """What is left of the weight once training is over."""
        found, scales = self.codes()
        return PhaseWeight(found.to(torch.uint8), scales)


@dataclass(frozen=True)
class PhaseWeight:
    """A complex matrix as powers of i and two scales.

    Attributes:
        codes: ``(n, m)`` uint8, 0 to 3.
        scales: ``(2,)`` float32, of +1 and -1, and of +i and -i.
    """

    codes: Tensor
    scales: Tensor

    def dense(self) -> Tensor:
        """The real matrix float32 ``(2n, 2m)`` of the training graph."""
        return block_matrix(*(powers(self.codes) * self.scales).unbind(-1))

    @staticmethod
    def storage(rows: int, columns: int) -> Stored:
        """Of ``rows`` by ``columns`` complex weights."""
        return {"phases": ((rows, packed_words(columns, 2)), torch.int32), "scales": ((2,), torch.float32)}

    def pack(self) -> dict[str, Tensor]:
        """2 bits a complex weight, and the scales."""
        return {"phases": pack_rows(self.codes, 2), "scales": self.scales}

    @staticmethod
    def unpack(tensors: dict[str, Tensor], rows: int, columns: int) -> PhaseWeight:
        """Inverse of :meth:`pack`; raises FormatError where the tensors do not fit."""
        require_stored("a phase weight", PhaseWeight.storage(rows, columns), tensors)
        return PhaseWeight(unpack_rows(tensors["phases"], 2, columns), tensors["scales"])

    @property
    def stored_bytes(self) -> int:
        return nbytes(self.storage(*self.codes.shape))

    def accumulate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of whole numbers ``x (M, 2m)`` int64: of what +1 and -1 take, and of what +i and -i take, ``(M, 2n)``.

        An input turned by quarters is its parts swapped and negated, so nothing is multiplied: a matrix of 0, +1 and
        -1 adds, subtracts and skips.
        """
        real, imaginary = powers(self.codes).long().unbind(-1)
        x_r, x_i = x.chunk(2, -1)
        return (torch.cat([x_r @ real.T, x_i @ real.T], -1),
                torch.cat([-x_i @ imaginary.T, x_r @ imaginary.T], -1))

    def matmul(self, x: Tensor) -> Tensor:
        """``x (..., 2m) -> (..., 2n)`` float32, inputs rounded to 8 bits: integers but for three scales."""
        whole, step = round_tokens(x)
        straight, turned = self.accumulate(whole.flatten(0, -2).long())
        y = self.scales[0] * straight.float() + self.scales[1] * turned.float()
        return y.view(*x.shape[:-1], -1) * step

"""A simulation of rounded activations: what a model loses whose quantized linears read their inputs in few bits too.

Inputs are rounded token by token to a format of :mod:`fewbits.quant.formats`, in the basis in which the codes of the
weight read them: sorted, scaled or rotated as these are. Products are still computed in floating point, so this says
how good an engine with such arithmetic would be (W4A4 for 4-bit weights), and nothing about how fast it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fewbits.kernels.linear import PackedMatrix
from fewbits.quant.errors import FewbitsError, FormatError
from fewbits.quant.formats import MAX_AUTO_GROUP, named_format
from fewbits.quant.types import Format


def round_activations(model: Any, name: str) -> Format:
    """Let every quantized linear of ``model`` round its inputs to the format ``name``, from now on.

    Args:
        name: of a format of single numbers, e.g. ``fp4_row`` (a scale for each token), ``int8_sym_row``, ``nvfp4``.

    Raises:
        FormatError: an unknown format, one that codes numbers jointly, or one whose groups do not divide an input.
        FewbitsError: a model without quantized linears.
    """
    fmt = named_format(name, MAX_AUTO_GROUP)
    if fmt.joint:
        raise FormatError(f"--activations: got {name}, which codes several rows at once, and tokens are rounded one by "
                          "one; give a format of single numbers such as fp4_row or int8_sym_row")
    found = [m for m in model.modules() if isinstance(m, PackedMatrix)]
    if not found:
        raise FewbitsError(f"--activations: got {name} and a model with no quantized linears; quantize it first")
    for module in found:
        fmt.groups(module.columns)
        module.round_inputs = rounder(fmt)
    return fmt


def rounder(fmt: Format) -> Callable[[Tensor], Tensor]:
    """``x (..., K)`` to what ``fmt`` makes of it, in the dtype of ``x``; scales cover the range of each group."""
    def run(x: Tensor) -> Tensor:
        flat = x.float().reshape(-1, fmt.groups(x.shape[-1]), x.shape[-1] // fmt.groups(x.shape[-1]))
        params = {k: v.unsqueeze(-1) for k, v in fmt.fit(flat, None).items()}
        return fmt.decode(fmt.encode(flat, params), params).view(x.shape).to(x.dtype)

    return run

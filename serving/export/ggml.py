"""The block types of ggml that hold fewbits' codes as they are: which format goes into which, and its bytes.

A row is cut into blocks, and a block stores a float16 scale beside its codes. A group of several blocks repeats its
scale in each of them, which is exact. What every type means is ggml's own definition (``ggml-common.h`` and
``dequantize_row_*`` of its reference implementation); nothing here rounds a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewbits.quant.errors import FormatError
from fewbits.quant.formats.grid import GridFormat
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.types import Format, QuantizedTensor

Bytes = NDArray[np.uint8]
"""Shape ``(blocks, n)``: some bytes of every block."""


@dataclass(frozen=True)
class BlockType:
    """A tensor type of ggml.

    Attributes:
        name: in ``gguf.GGMLQuantizationType``.
        code_bits, symmetric: of the codes that it holds.
        columns: in a block.
        nbytes: of a block.
        pack: codes ``(blocks, columns)`` -> the bytes that stand for them.
        scale_last: whether they come before the scale; the offset of an asymmetric type always follows the scale.
        negative: whether the stored scale is minus ours, the codes being counted downwards.
    """

    name: str
    code_bits: int
    symmetric: bool
    columns: int
    nbytes: int
    pack: Callable[[Bytes], Bytes]
    scale_last: bool = False
    negative: bool = False

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many columns."""
        return columns // self.columns * self.nbytes


_FOUR_BITS = np.uint8(15)


def _nibbles(codes: Bytes) -> Bytes:
    """The first half of a block in the low halves of its bytes, the second half in the high ones."""
    low, high = np.split(codes & _FOUR_BITS, 2, axis=1)
    return low | high << np.uint8(4)


def _nibbles_of_sixteen(codes: Bytes) -> Bytes:
    """The same for every 16 columns by themselves."""
    return _nibbles(codes.reshape(-1, 16)).reshape(len(codes), -1)


def _five_bits(codes: Bytes) -> Bytes:
    """The highest bits of all codes, column 0 in the lowest bit, then the other four as nibbles."""
    return np.concatenate([np.packbits(codes >> np.uint8(4), axis=1, bitorder="little"), _nibbles(codes)], axis=1)


def _signed_bytes(codes: Bytes) -> Bytes:
    """``code - 128`` in two's complement."""
    return codes ^ np.uint8(0x80)


def _crumbs(codes: Bytes) -> Bytes:
    """``3 - code``, of which ggml subtracts 1: with the scale negated that is ``code - 2``, all four values of it.

    Four runs of 32 columns share 32 bytes. ggml itself writes only 0, 1 and 2 here, but its reference code and its
    kernels (x86, ARM and RISC-V CPUs, Metal, Vulkan) read two bits as they are and have room for a 3 in their sums.
    """
    runs = (3 - codes).reshape(len(codes), -1, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(runs, axis=2).reshape(len(codes), -1)


_RUNS_OF_TRITS = ((32, 5), (16, 5), (4, 4))
"""Of a block of 256: so many bytes, and the digits in each. A byte's digits lie as many columns apart."""


def _trits(codes: Bytes) -> Bytes:
    """``code - 1``, in 0..2, as digits in base 3: a byte is the fraction ``0.abcde`` of 256, rounded up."""
    out, start = [], 0
    for width, digits in _RUNS_OF_TRITS:
        run = codes[:, start : start + width * digits].reshape(len(codes), digits, width) - 1
        weights = 3 ** np.arange(4, 4 - digits, -1, dtype=np.uint16)
        value = (run * weights[:, None]).sum(axis=1, dtype=np.uint16)
        out.append(((value * 256 + 242) // 243).astype(np.uint8))
        start += width * digits
    return np.concatenate(out, axis=1)


BLOCK_TYPES = (
    BlockType("Q4_0", 4, True, 32, 18, _nibbles),
    BlockType("Q4_1", 4, False, 32, 20, _nibbles),
    BlockType("Q5_0", 5, True, 32, 22, _five_bits),
    BlockType("Q5_1", 5, False, 32, 24, _five_bits),
    BlockType("Q8_0", 8, True, 32, 34, _signed_bytes),
    BlockType("TQ2_0", 2, True, 256, 66, _crumbs, scale_last=True, negative=True),
)
TERNARY = BlockType("TQ1_0", 2, True, 256, 54, _trits, scale_last=True)
FLOATS = {
    "mxfp4": BlockType("MXFP4", 4, True, 32, 17, _nibbles),
    "nvfp4": BlockType("NVFP4", 4, True, 64, 36, _nibbles_of_sixteen),
}
"""Family of floats -> its type; the bytes of scales, of one group or four, come first."""


def block_type(fmt: Format, columns: int, *, ternary: bool = False) -> BlockType | str:
    """The type that holds a format over rows of so many columns, or why none does.

    Args:
        ternary: 2-bit codes are -1, 0 and 1 and never -2.
    """
    if isinstance(fmt, GridFormat) and (floats := FLOATS.get(fmt.family)) is not None:
        if columns % floats.columns:
            return f"has blocks of {floats.columns} columns for {fmt.name}, got K = {columns}; {_other(columns)}"
        return floats
    if not isinstance(fmt, IntFormat):
        return f"has no type for {fmt.name}; {_other(columns)}"
    same = [t for t in BLOCK_TYPES if t.code_bits == fmt.code_bits]
    found = next((t for t in same if t.symmetric == fmt.symmetric), None)
    if found is None:
        nearest = min(BLOCK_TYPES, key=lambda t: (abs(t.code_bits - fmt.code_bits), -t.code_bits))
        return f"has no type for {fmt.name}; {_way_out(nearest, columns)}"
    if (group := fmt.group_size or columns) % found.columns:
        return (f"has no {fmt.code_bits}-bit type for groups of {group}, its blocks have {found.columns} columns; "
                f"{_way_out(found, columns)}")
    return TERNARY if ternary and fmt.code_bits == TERNARY.code_bits else found


def _other(columns: int) -> str:
    return f"K = {columns} is no multiple of 32, add it to keep" if columns % 32 else "quantize it as int4_sym_g32"


def _way_out(kind: BlockType, columns: int) -> str:
    if columns % 32:
        return _other(columns)
    if columns % kind.columns:
        return f"K = {columns} is no multiple of {kind.columns}, {_other(columns)}"
    ternary = " or ternary_g256" * (kind.code_bits == TERNARY.code_bits)
    return f"quantize it as int{kind.code_bits}{'_sym' * kind.symmetric}_g{kind.columns}{ternary}"


def to_blocks(name: str, tensor: QuantizedTensor, kind: BlockType) -> tuple[Bytes, int]:
    """The bytes of a matrix ``(N, K)`` as ``(N, row_bytes)``, and how many of its offsets had to be rounded.

    Offsets (``-scale * zero_point``) exist in asymmetric types only; codes and scales are never rounded.

    Raises:
        FormatError: a scale, or an offset, is none that float16 holds; or a ternary type meets a code for -2.
    """
    segment = tensor.segments[0]
    codes = segment.codes.numpy().reshape(-1, kind.columns)
    if isinstance(segment.format, GridFormat):
        stored = segment.format.pack(segment.codes, segment.params)["weight_scale"].view(torch.uint8).numpy()
        blocks = np.concatenate([stored.reshape(len(codes), -1), kind.pack(codes)], axis=1)
        return blocks.reshape(tensor.shape[0], -1), 0
    scale = _halves(name, segment.params["scale"])
    if kind is TERNARY and not codes.all():
        raise FormatError(f"{name}: TQ1_0 holds -1, 0 and 1, got -2 for {int((codes == 0).sum())} weights; export "
                          "without --allow ternary, as TQ2_0")
    parts = [-scale if kind.negative else scale]
    rounded = 0
    if not kind.symmetric:
        exact = -scale.astype(np.float32) * segment.params["zero_point"].numpy()
        with np.errstate(over="ignore"):
            parts.append(exact.astype(np.float16))
        rounded = int((parts[1].astype(np.float32) != exact).sum())
        if not np.isfinite(parts[1]).all():
            raise FormatError(f"{name}: {kind.name} stores scale * zero_point in float16, which holds at most 65504, "
                              f"got {float(abs(exact).max()):.3g}; quantize it symmetrically")
    repeats = len(codes) // scale.size
    columns = [np.repeat(p.reshape(-1, 1), repeats, axis=0).view(np.uint8) for p in parts]
    columns.insert(0 if kind.scale_last else len(columns), kind.pack(codes))
    return np.concatenate(columns, axis=1).reshape(tensor.shape[0], -1), rounded


def _halves(name: str, scale: Tensor) -> NDArray[np.float16]:
    half = scale.half()
    kept = (half.double() == scale.double()) & half.isfinite()
    if not kept.all():
        worst = scale.double()[~kept][0]
        raise FormatError(f"{name}: GGUF has float16 scales, got {float(worst):.9g} in {scale.dtype}, which is none; "
                          "quantize with format.scale_dtype = 'float16'")
    return half.contiguous().numpy()

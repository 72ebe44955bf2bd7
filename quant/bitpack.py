"""Dense little-endian bit streams in int32 words: the disk layout of every integer code; trits five to a byte.

The layout is that of compressed-tensors ``pack-quantized``: code ``j`` of a row occupies bits ``[j*b, (j+1)*b)`` of
that row's stream, counted from the least significant bit of the first word, so 32 codes fill exactly ``b`` words and
codes of 3, 5, 6 or 7 bits may straddle two words. A row is padded with zero bits to a whole word.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def packed_words(count: int, bits: int) -> int:
    """Number of int32 words that hold ``count`` codes of ``bits`` bits."""
    return -(-count * bits // WORD_BITS)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes ``(N, K)``, each in ``[0, 2**bits)``, into int32 words ``(N, ceil(K*bits/32))``.

    Raises:
        ValueError: ``bits`` is outside 1..8, or a code is out of range.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: got {bits}, needed 1 to 8")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes: got {int(codes.min())}..{int(codes.max())}, needed 0..{(1 << bits) - 1}")
    rows, count = codes.shape
    # 32 codes make `bits` words exactly; working on that unit keeps every shift a constant.
    units = torch.nn.functional.pad(codes.to(torch.int64), (0, -count % WORD_BITS)).view(rows, -1, WORD_BITS)
    words = torch.zeros(rows, units.shape[1], bits, dtype=torch.int64, device=codes.device)
    for j in range(WORD_BITS):
        word, offset = divmod(j * bits, WORD_BITS)
        words[..., word] |= (units[..., j] << offset) & 0xFFFFFFFF
        if offset + bits > WORD_BITS:
            words[..., word + 1] |= units[..., j] >> (WORD_BITS - offset)
    words = words.view(rows, -1)[:, : packed_words(count, bits)]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_rows`: int32 words ``(N, ceil(count*bits/32))`` to codes ``(N, count)`` uint8."""
    rows = packed.shape[0]
    mask = (1 << bits) - 1
    if WORD_BITS % bits == 0:  # no code straddles a word
        shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=packed.device)
        codes = (packed.unsqueeze(-1) >> shifts) & mask
        return codes.view(rows, -1)[:, :count].to(torch.uint8)
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).view(rows, -1, bits)
    codes = torch.empty(rows, words.shape[1], WORD_BITS, dtype=torch.uint8, device=packed.device)
    for j in range(WORD_BITS):
        word, offset = divmod(j * bits, WORD_BITS)
        value = words[..., word] >> offset  # arithmetic shift: the sign bits above are masked or replaced below
        if offset + bits > WORD_BITS:
            low = WORD_BITS - offset
            value = (value & ((1 << low) - 1)) | (words[..., word + 1] << low)
        codes[..., j] = (value & mask).to(torch.uint8)
    return codes.view(rows, -1)[:, :count]


TRITS = 5
"""In a byte: 3^5 = 243."""


def pack_trits(codes: Tensor) -> Tensor:
    """Pack codes ``(N, K)`` of 0, 1 and 2 into bytes ``(N, ceil(K/5))``, rows padded with code 0.

    Five digits, the first the most significant, make ``v < 243``, stored as ``ceil(256 v / 243)``: multiplied by 3 in
    8 bits, a byte gives up its first digit as the carry, which is how ggml's TQ1_0 reads it.

    Raises:
        ValueError: a code is out of range.
    """
    if codes.numel() and int(codes.max()) > 2:
        raise ValueError(f"codes: got up to {int(codes.max())}, needed 0 to 2")
    digits = torch.nn.functional.pad(codes.int(), (0, -codes.shape[1] % TRITS)).unflatten(1, (-1, TRITS))
    value = digits[..., 0]
    for digit in digits.unbind(-1)[1:]:
        value = 3 * value + digit
    return ((256 * value + 242) // 243).to(torch.uint8)


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """Inverse of :func:`pack_trits`: bytes ``(N, ceil(count/5))`` to codes ``(N, count)`` uint8.

    Any byte means some five digits.
    """
    digits, rest = [], packed.int()
    for _ in range(TRITS):
        digits.append((rest * 3) >> 8)
        rest = (rest * 3) & 255
    return torch.stack(digits, -1).flatten(1)[:, :count].to(torch.uint8)

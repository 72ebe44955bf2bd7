"""Bit streams against a big integer per row, against compressed-tensors, and there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.quant.bitpack import WORD_BITS, pack_rows, packed_words, unpack_rows

torch.set_num_threads(1)

BITS = range(1, 9)
COUNTS = (1, 2, 5, 7, 31, 32, 33, 63, 64, 65, 95, 127)


def random_codes(rows: int, count: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, count), generator=generator, dtype=torch.uint8)


def naive_pack(row: list[int], bits: int) -> list[int]:
    """One big integer, code j at bit j * bits, cut into signed words of 32 bits."""
    stream = sum(code << (j * bits) for j, code in enumerate(row))
    words = [(stream >> (WORD_BITS * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // WORD_BITS))]
    return [w - (1 << 32) if w >> 31 else w for w in words]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 200), st.integers(0, 2**31))
def test_round_trip(bits: int, rows: int, count: int, seed: int) -> None:
    codes = random_codes(rows, count, bits, seed)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32 and packed.is_contiguous()
    assert packed.shape == (rows, packed_words(count, bits))
    assert packed.shape[1] * WORD_BITS - count * bits < WORD_BITS  # dense: less than a word of padding
    back = unpack_rows(packed, bits, count)
    assert back.dtype == torch.uint8 and torch.equal(back, codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", COUNTS)
def test_bit_positions(bits: int, count: int) -> None:
    codes = random_codes(3, count, bits, seed=bits * 1000 + count)
    codes[0] = (1 << bits) - 1  # all ones: sign bits everywhere
    assert pack_rows(codes, bits).tolist() == [naive_pack(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", BITS)
def test_a_single_code_sets_no_bit_of_another(bits: int) -> None:
    full = (1 << bits) - 1
    for j in range(70):
        codes = torch.zeros(1, 70, dtype=torch.uint8)
        codes[0, j] = full
        packed = pack_rows(codes, bits)
        assert packed[0].tolist() == naive_pack(codes[0].tolist(), bits)
        assert torch.equal(unpack_rows(packed, bits, 70), codes)


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_zero_and_ignored(bits: int) -> None:
    codes = torch.full((2, 5), (1 << bits) - 1, dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    used = 5 * bits % WORD_BITS
    assert used and ((packed[:, -1].long() & 0xFFFFFFFF) >> used == 0).all()
    dirty = packed | torch.tensor(-1 << used, dtype=torch.int64).to(torch.int32) * (
        torch.arange(packed.shape[1]) == packed.shape[1] - 1
    )
    assert torch.equal(unpack_rows(dirty.to(torch.int32), bits, 5), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", COUNTS)
def test_equals_compressed_tensors(bits: int, count: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(4, count, bits, seed=count)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits)
    if theirs.shape[1] != packed_words(count, bits):  # old versions leave bits unused where codes do not divide a word
        assert WORD_BITS % bits != 0
        pytest.skip("this version of compressed-tensors is not dense here")
    ours = pack_rows(codes, bits)
    assert torch.equal(theirs, ours)
    assert torch.equal(helpers.unpack_from_int32(ours, bits, torch.Size((4, count))), signed)
    assert torch.equal(unpack_rows(theirs, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_along_rows_equal_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(13, 3, bits)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits, packed_dim=0)
    if theirs.shape[0] != packed_words(13, bits):
        pytest.skip("this version of compressed-tensors is not dense here")
    assert torch.equal(theirs, pack_rows(codes.T, bits).T)


def test_input_dtype_does_not_matter() -> None:
    codes = random_codes(2, 40, 3)
    for dtype in (torch.int8, torch.int32, torch.int64):
        assert torch.equal(pack_rows(codes.to(dtype), 3), pack_rows(codes, 3))


def test_input_need_not_be_contiguous() -> None:
    codes = random_codes(9, 6, 5)
    assert torch.equal(pack_rows(codes.T, 5), pack_rows(codes.T.contiguous(), 5))
    packed = pack_rows(codes, 5)
    assert torch.equal(unpack_rows(packed.T.contiguous().T, 5, 6), codes)


@pytest.mark.parametrize("bits", [-1, 0, 9, 16])
def test_bad_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits: got {bits}, needed 1 to 8"):
        pack_rows(torch.zeros(1, 4, dtype=torch.uint8), bits)


@pytest.mark.parametrize("bits", BITS)
def test_codes_out_of_range(bits: int) -> None:
    codes = torch.zeros(2, 4, dtype=torch.int64)
    for bad in (1 << bits, -1):
        codes[1, 2] = bad
        with pytest.raises(ValueError, match=rf"codes: got .*needed 0\.\.{(1 << bits) - 1}"):
            pack_rows(codes, bits)


def test_packed_words() -> None:
    assert [packed_words(n, 3) for n in (0, 1, 10, 11, 32, 33)] == [0, 1, 1, 2, 3, 4]

"""Every kernel of the registry against the truth, over the shapes that break kernels."""

from __future__ import annotations

import pytest
import torch

from fewbits.kernels import reference
from fewbits.kernels.dispatch import KERNELS, TRITON_BITS, prepare

from .conftest import error_bound

SHAPES = [  # rows, columns, group_size
    (1, 33, None),  # one row, an odd number of columns, one group per row
    (17, 96, 32),
    (5, 72, 8),  # groups smaller than what a word of 1, 2 or 3 bits covers
    (40, 576, 64),  # not a multiple of 128
    (3, 520, 520),
]
TOKENS = [1, 3, 16, 33]


def run_all(name: str, weight, bits: int, tokens: int, dtype: torch.dtype, scale_dtype: torch.dtype,
            shapes=SHAPES) -> None:
    device = "cuda" if KERNELS[name].device == "cuda" and torch.cuda.is_available() else "cpu"
    for (rows, columns, group), symmetric in [(s, sym) for s in shapes for sym in (True, False)]:
        fmt, tensors = weight(rows, columns, bits, group, symmetric=symmetric, scale_dtype=scale_dtype)
        operands = prepare(fmt, {k: v.to(device) for k, v in tensors.items()}, rows, columns).operands
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        dense = reference.dequantize(*operands, bits, columns)
        exact = x.double() @ dense.double().T
        y = KERNELS[name].run(x, *operands, bits)
        assert y.shape == (tokens, rows) and y.dtype == dtype
        bound = error_bound(x, exact, operands, bits, dense)
        assert not y.isnan().any(), f"{fmt.name} {rows}x{columns}: not everything was written"
        excess = ((y.double() - exact).abs() - bound).max().item()
        assert excess <= 0, f"{fmt.name} {rows}x{columns}: error exceeds the bound by {excess:.3g}"


def skip_unavailable(name: str) -> None:
    if not KERNELS[name].available():
        pytest.skip(f"{name} cannot run here (no compiler or no Triton)")


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", [n for n, k in KERNELS.items() if k.device != "cuda"])
def test_matches_reference(name: str, bits: int, tokens: int, weight) -> None:
    skip_unavailable(name)
    if bits in KERNELS[name].bits:
        run_all(name, weight, bits, tokens, torch.float32, torch.float16)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", list(KERNELS))
def test_dtypes(name: str, dtype: torch.dtype, scale_dtype: torch.dtype, weight) -> None:
    skip_unavailable(name)
    run_all(name, weight, 3, 2, dtype, scale_dtype, SHAPES[:3])


# The interpreter takes about 3 ms per step of a tile, whatever its size: few shapes, each once.
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("bits", TRITON_BITS)
@pytest.mark.parametrize("name", [n for n, k in KERNELS.items() if k.device == "cuda"])
def test_triton_matches_reference(name: str, bits: int, tokens: int, weight) -> None:
    skip_unavailable(name)
    if tokens <= (KERNELS[name].max_tokens or tokens):
        run_all(name, weight, bits, tokens, torch.float32, torch.float16, [*SHAPES[:3], (9, 512, 128)])


@pytest.mark.parametrize("split", [2, 3, 8])
def test_split_columns(split: int, weight) -> None:
    """Programs that share the columns of a tile: an uneven split, and one with more parts than there are steps."""
    triton_int = pytest.importorskip("fewbits.kernels.triton_int")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fmt, tensors = weight(9, 320, 4, 64)
    operands = prepare(fmt, {k: v.to(device) for k, v in tensors.items()}, 9, 320).operands
    x = torch.randn(3, 320, device=device)
    dense = reference.dequantize(*operands, 4, 320)
    exact = x.double() @ dense.double().T
    y = triton_int.gemm(x, *operands, 4, split=split)
    assert ((y.double() - exact).abs() <= error_bound(x, exact, operands, 4, dense)).all()


def test_split_fills_a_gpu_without_starving_programs() -> None:
    triton_int = pytest.importorskip("fewbits.kernels.triton_int")
    assert triton_int.choose_split(blocks=8, steps=64, units=132) == 8
    assert triton_int.choose_split(blocks=8, steps=8, units=132) == 2
    assert triton_int.choose_split(blocks=512, steps=64, units=132) == 1


def test_reference_is_the_format(weight) -> None:
    """The truth agrees with ``IntFormat.decode`` bit for bit, also when rows come in several chunks."""
    fmt, tensors = weight(300, 96, 3, 32)
    codes, params = fmt.unpack(tensors, 300, 96)
    expected = fmt.decode(codes.view(300, 3, 32), {k: v.unsqueeze(-1) for k, v in params.items()}).view(300, 96)
    operands = prepare(fmt, tensors, 300, 96).operands
    assert torch.equal(reference.dequantize(*operands, 3, 96), expected)
    chunks = list(reference.row_chunks(300, 96, codes=96 * 7))
    assert [c.start for c in chunks[1:]] == [c.stop for c in chunks[:-1]] and chunks[-1].stop == 300

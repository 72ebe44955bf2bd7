"""Kernels of groups of few levels and of tables against what the formats mean."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewbits.kernels import coded, dispatch
from fewbits.kernels.coded import CODED_KERNELS, FAMILIES
from fewbits.kernels.cpu import build, groups
from fewbits.kernels.dispatch import prepare, select_kernel
from fewbits.kernels.groups import decode
from fewbits.quant.formats import BASES, parse_format
from fewbits.quant.formats.levels import LevelsFormat
from fewbits.quant.types import Segment

SHAPES = [  # rows, columns
    (1, 33),  # one row, an odd number of columns
    (5, 72),
    (17, 96),
    (9, 1152),  # not a multiple of 512
]
LEVELS = ["ternary_g8", "ternary_mean_g32_b3", "ternary_row_b3", "ternary_g128", "binary_row", "binary_mean_g16",
          "binary2_g36", "binary3_g32", "binary3_mean_row", "binary4_g24", "fdb_g128", "seq_mean_row"]
TABLES = ["nf4_g64", "nf4_row", "fp3_g24", "fp4_g16", "fpq4_g32", "bitmod3_g128", "bitmod4_row", "nupes3_row",
          "nupes4_g8", "mxfp4", "nvfp4"]
NAMES = LEVELS + TABLES
GROUPED = [name for name in CODED_KERNELS if "group" in name]

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


def shapes(name: str) -> list[tuple[int, int]]:
    size = parse_format(name).group_size
    return [s for s in SHAPES if size is None or s[1] % size == 0]


@lru_cache(maxsize=256)
def stored(name: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    """Of normal values: what is in a checkpoint, and the float32 weight that it means."""
    fmt = parse_format(name)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    grouped = values.view(rows, fmt.groups(columns), -1)
    segment = Segment.nearest(fmt, values, fmt.fit(grouped, None))
    return fmt.pack(segment.codes, segment.params), segment.dequantize()


def operands(name: str, rows: int, columns: int) -> coded.Operands:
    return coded.operands(parse_format(name), stored(name, rows, columns)[0], rows, columns)


def assert_within_rounding(y: Tensor, x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    exact = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T
    # of weights and outputs; Triton's interpreter cuts bfloat16 off instead of rounding it
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 0}[dtype]
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= terms * ((x.shape[1] + 16) * 2.0**-23 + rounding) + 1e-12).all())


def cases() -> list[tuple[str, str, torch.dtype]]:
    """Format, kernel, dtype of the inputs; the interpreter is slow, so other dtypes meet one format in four there."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [(name, kernel, dtype) for i, name in enumerate(NAMES) for kernel in GROUPED for dtype in dtypes
            if dtype == torch.float32 or i % 4 == 0 or not kernel.startswith("triton")]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("name", "kernel", "dtype"), cases())
def test_matches_the_format(name: str, kernel: str, dtype: torch.dtype) -> None:
    fmt, found = parse_format(name), CODED_KERNELS[kernel]
    if not found.available():
        pytest.skip(f"{kernel} cannot run here (no compiler or no Triton)")
    device = "cuda" if found.device == "cuda" and torch.cuda.is_available() else "cpu"
    slow = device == "cpu" and kernel.startswith("triton")  # in the interpreter
    for rows, columns in shapes(name)[-2:] if slow else shapes(name):
        for tokens in (1, 2, 3, 7, 33) if not slow else (2,) if found.max_tokens else (17,):
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(device, dtype)
            tensors = {k: v.to(device) for k, v in stored(name, rows, columns)[0].items()}
            y = found.run(x, coded.operands(fmt, tensors, rows, columns), fmt).cpu()
            assert_within_rounding(y, x.cpu(), stored(name, rows, columns)[1], dtype)


@pytest.mark.parametrize("name", ["ternary_mean_g32_b3", "nvfp4", "bitmod3_g24"])
def test_split_columns_add_up(name: str) -> None:
    kernels = pytest.importorskip("fewbits.kernels.triton_groups")
    weight = stored(name, 9, 336)[1] if name != "ternary_mean_g32_b3" else stored(name, 9, 352)[1]
    x = torch.randn(3, weight.shape[1])
    for split in (1, 2, 3):
        y = kernels.gemm(x, *operands(name, *weight.shape), parse_format(name), split)
        assert_within_rounding(y, x, weight, torch.float32)


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_compiled_rows_are_exact_and_do_not_depend_on_threads_or_tokens(name: str) -> None:
    for rows, columns in shapes(name):
        made, weight = operands(name, rows, columns), stored(name, rows, columns)[1]
        family = FAMILIES[type(parse_format(name))]
        assert family.shape(made, parse_format(name)) == (rows, columns)
        assert torch.equal(family.decode(made, parse_format(name)), weight)
        assert torch.equal(groups.dequantize(*made), weight)
    x = torch.randn(7, columns)
    together = groups.gemv(x, *made)
    torch.set_num_threads(2)
    assert torch.equal(groups.gemv(x, *made), together)
    for m in range(7):
        assert torch.equal(groups.gemv(x[m:m + 1], *made)[0], together[m])


@needs_compiler
def test_several_threads_and_dense_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are given to several threads, and blocks that do not divide the rows."""
    monkeypatch.setattr(groups, "DENSE_CODES", 1152 * 7)
    made, weight = operands("bitmod4_g64", 40, 1152), stored("bitmod4_g64", 40, 1152)[1]
    torch.set_num_threads(2)
    assert torch.equal(groups.dequantize(*made), weight)
    x = torch.randn(20, 1152)
    assert_within_rounding(groups.dense(x, *made), x, weight, torch.float32)


@needs_compiler
@pytest.mark.parametrize("flags", [(), ("-mavx2",), ("-mavx512f",)])
def test_other_instruction_sets(flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that this machine's own build may never run."""
    wanted = {"-mavx2": " avx2 ", "-mavx512f": " avx512f "}
    if any(wanted[f] not in f"{build.cpu_flags()} " for f in flags):
        pytest.skip(f"no {flags[0]} here")
    monkeypatch.setattr(build, "VARIANTS", (flags,))
    monkeypatch.setattr(build, "FLAGS", ("-O1", *build.FLAGS[1:]))
    monkeypatch.setattr(build, "cache_dir", lambda: tmp_path)
    build.load.cache_clear()
    try:
        assert groups.available()
        for name in ("binary_row", "ternary_g32", "bitmod3_g24", "nvfp4"):
            made, weight = operands(name, 17, 96), stored(name, 17, 96)[1]
            x = torch.randn(5, 96)
            assert_within_rounding(groups.gemv(x, *made), x, weight, torch.float32)
            assert torch.equal(groups.dequantize(*made), weight)
    finally:
        build.load.cache_clear()


@needs_compiler
@pytest.mark.parametrize("name", ["nf4_g16", "mxfp4"])
def test_scales_that_are_no_numbers_read_as_the_format_says(name: str) -> None:
    tensors = {k: v.clone() for k, v in stored(name, 5, 96)[0].items()}
    odd = [6e-8, 65504.0, float("inf")] if name == "nf4_g16" else [0, 1, 255]  # 2^-127 is subnormal
    tensors["weight_scale"][0, :3] = torch.tensor(odd, dtype=tensors["weight_scale"].dtype)
    made = coded.operands(parse_format(name), tensors, 5, 96)
    expected = decode(*made)
    assert torch.equal(groups.dequantize(*made).nan_to_num(), expected.nan_to_num())
    fmt = parse_format(name)
    assert torch.equal(Segment(fmt, *fmt.unpack(tensors, 5, 96)).dequantize().nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", ["ternary_row_b3", "nf4_row", "nvfp4", "bitmod3_g24"])
def test_the_operator_is_opaque_and_has_a_gradient(name: str) -> None:
    made, weight = operands(name, *shapes(name)[0]), stored(name, *shapes(name)[0])[1]
    columns = weight.shape[1]
    torch.library.opcheck(torch.ops.fewbits.coded_matmul.default, (torch.randn(3, columns), made, name))
    torch.library.opcheck(torch.ops.fewbits.coded_dequantize.default, (made, name))
    x = torch.randn(2, 3, columns, requires_grad=True)
    coded.matmul(x, made, parse_format(name)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, 3, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ternary_row_b3", "bitmod4_row", "nvfp4", "pq8_v8"])
def test_rows_are_picked_without_decoding_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = parse_format(name)
    if name == "pq8_v8":
        values = torch.randn(17, 96)
        params = fmt.fit(values, None)
        codes = fmt.encode(values, params)
        tensors, weight = fmt.pack(codes, params), fmt.decode(codes, params)
    else:
        tensors, weight = stored(name, 17, 96)
    prepared = prepare(fmt, tensors, 17, 96)
    decoded = []
    monkeypatch.setattr(coded, "_DEQUANTIZE", lambda o, f: decoded.append(len(o[0])) or coded._dequantize(o, f))
    index = torch.tensor([[3, 16], [0, 3]])
    assert torch.equal(dispatch.dequantize_rows(prepared, index), weight[index])
    assert decoded == [4]


@pytest.mark.parametrize("name", NAMES)
def test_selection(name: str) -> None:
    fmt = parse_format(name)
    for device in ("cpu", "cuda"):
        for tokens in (1, 1000):
            kernel = f"{'triton' if device == 'cuda' else 'cpu'}_group_"
            kernel += "gemv" if tokens == 1 else "gemm" if device == "cuda" else "dense"
            if CODED_KERNELS[kernel].available():
                assert select_kernel(fmt, tokens, torch.device(device)) == kernel
    assert select_kernel(fmt, 1, torch.device("mps")) == "coded_reference"


@pytest.mark.parametrize("family", BASES)
def test_levels_are_what_a_kernel_is_told(family: str) -> None:
    """A kernel knows the start and the step of a scale; bits have a scale each, or there is one scale."""
    kernels = pytest.importorskip("fewbits.kernels.triton_groups")
    fmt = LevelsFormat(family, 32)
    told = kernels.constants(fmt, 64)
    codes = torch.arange(fmt.basis.levels)
    if told["SCALES"] == 1:
        expected = (told["START"] + told["STEP"] * codes)[:, None]
    else:
        assert told["SCALES"] == told["BITS"]
        expected = torch.stack([told["START"] + told["STEP"] * (codes >> i & 1) for i in range(told["BITS"])], 1)
    assert torch.equal(fmt.design(), expected.float())

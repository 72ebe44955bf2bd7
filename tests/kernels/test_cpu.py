"""The C kernel and the way it gets built."""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path

import pytest
import torch

from fewbits.kernels import coded, dispatch, reference
from fewbits.kernels.cpu import build
from fewbits.kernels.cpu import int_matmul as cpu
from fewbits.kernels.dispatch import prepare, select_kernel

from .conftest import error_bound

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


@pytest.fixture
def fresh():
    """Forget which library was loaded and which kernels can run, before and after."""
    for cache in (build.load, dispatch._candidates, coded._candidates):
        cache.cache_clear()
    yield
    for cache in (build.load, dispatch._candidates, coded._candidates):
        cache.cache_clear()


@needs_compiler
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantize_is_exact(bits: int, weight) -> None:
    for rows, columns, group, symmetric in [(1, 33, None, True), (17, 96, 32, False), (5, 72, 8, False),
                                            (60, 1024, 128, False)]:
        fmt, tensors = weight(rows, columns, bits, group, symmetric=symmetric)
        operands = prepare(fmt, tensors, rows, columns).operands
        assert torch.equal(cpu.dequantize(*operands, bits, columns), reference.dequantize(*operands, bits, columns))


@needs_compiler
def test_dequantize_special_half_scales() -> None:
    """Subnormal, infinite and NaN scales of a damaged or extreme checkpoint read as IEEE says."""
    scale = torch.tensor([[6e-8, 65504.0, -1e-5, 0.0]], dtype=torch.float16)
    packed = torch.full((1, 4), -1, dtype=torch.int32)  # 16 codes of 255
    assert torch.equal(cpu.dequantize(packed, scale, None, 8, 16), reference.dequantize(packed, scale, None, 8, 16))
    scale = torch.tensor([[float("inf"), float("nan")]], dtype=torch.float16)
    found = cpu.dequantize(packed[:, :2], scale, None, 8, 8)
    assert found[0, 0] == float("inf") and found[0, 7].isnan()


@needs_compiler
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_result_depends_neither_on_threads_nor_on_tokens(bits: int, weight) -> None:
    fmt, tensors = weight(160, 576, bits, 64)
    operands = prepare(fmt, tensors, 160, 576).operands
    assert 160 * 576 > 1 << 15, "too small a weight is not given to several threads"
    x = torch.randn(7, 576)
    together = cpu.gemv(x, *operands, bits)
    torch.set_num_threads(2)
    assert torch.equal(cpu.gemv(x, *operands, bits), together)
    for m in range(7):
        assert torch.equal(cpu.gemv(x[m:m + 1], *operands, bits)[0], together[m])


@needs_compiler
def test_dense_blocks_of_rows(weight, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not divide the rows: the last one is shorter than the buffer."""
    monkeypatch.setattr(cpu, "DENSE_CODES", 96 * 7)
    fmt, tensors = weight(17, 96, 4, 32)
    operands = prepare(fmt, tensors, 17, 96).operands
    x = torch.randn(20, 96)
    dense = reference.dequantize(*operands, 4, 96)
    exact = x.double() @ dense.double().T
    assert ((cpu.dense(x, *operands, 4).double() - exact).abs() <= error_bound(x, exact, operands, 4, dense)).all()


@needs_compiler
def test_portable_code(weight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh) -> None:
    """The code without AVX-512, which this machine's own build may never run."""
    monkeypatch.setattr(build, "VARIANTS", ((),))  # no -march=native and no OpenMP: the least that a compiler offers
    monkeypatch.setattr(build, "FLAGS", ("-O1", *build.FLAGS[1:]))  # -O3 takes 10 times as long to compile
    monkeypatch.setattr(build, "cache_dir", lambda: tmp_path)
    assert cpu.available()
    for bits in range(1, 9):
        fmt, tensors = weight(9, 600, bits, 40)
        operands = prepare(fmt, tensors, 9, 600).operands
        x = torch.randn(5, 600)
        dense = reference.dequantize(*operands, bits, 600)
        exact = x.double() @ dense.double().T
        bound = error_bound(x, exact, operands, bits, dense)
        assert ((cpu.gemv(x, *operands, bits).double() - exact).abs() <= bound).all()
        assert torch.equal(cpu.dequantize(*operands, bits, 600), dense)


@needs_compiler
def test_build_is_cached_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))
    compiler = build.find_compiler()
    assert compiler is not None
    first = build.build("int_matmul", compiler, tmp_path)
    assert first is not None and list(tmp_path.iterdir()) == [first]
    stamp = first.stat().st_mtime_ns
    assert build.build("int_matmul", compiler, tmp_path) == first and first.stat().st_mtime_ns == stamp
    monkeypatch.setattr(build, "cpu_flags", lambda: "another CPU")
    monkeypatch.setattr(build, "VARIANTS", (("-fno-such-flag",),))
    assert build.build("int_matmul", compiler, tmp_path) is None, "another CPU must not load this library"
    assert list(tmp_path.iterdir()) == [first], "a failed build leaves its temporary file behind"


def test_no_compiler(weight, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    fmt, tensors = weight(17, 96, 4, 32)
    prepared = prepare(fmt, tensors, 17, 96)
    x = torch.randn(2, 96)
    with caplog.at_level(logging.WARNING):
        y = dispatch.matmul(x, prepared)
        dispatch.dequantize(prepared)
        assert select_kernel(fmt, 2, x.device) == "reference"
    assert [("install" in r.message) for r in caplog.records] == [True], "one warning that says what to do"
    assert torch.equal(y, reference.matmul(x, *prepared.operands, 4))


def test_broken_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                         fresh) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: sys.executable)  # answers --version and compiles nothing
    monkeypatch.setattr(build, "cache_dir", lambda: tmp_path)
    with caplog.at_level(logging.WARNING):
        assert not cpu.available()
    assert "could not compile" in caplog.text


def test_unwritable_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    found = build.cache_dir()
    assert found.is_dir() and not found.is_relative_to(blocked)
    found.rmdir()


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")
def test_one_pool_of_threads(weight) -> None:
    """Torch's OpenMP runtime and ours are one: two pools would fight for the cores."""
    assert isinstance(build.load("int_matmul"), ctypes.CDLL)
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line}
    assert len(loaded) <= 1, f"several OpenMP runtimes are loaded: {loaded}"

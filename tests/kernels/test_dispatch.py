"""The interface that linear layers use."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbits.kernels import dispatch
from fewbits.kernels.dispatch import KERNELS, dequantize, dequantize_rows, matmul, prepare, select_kernel
from fewbits.quant.errors import FormatError

CASES = [(4, 32, False), (3, None, True), (8, 32, False)]


@pytest.mark.parametrize("bits, group, symmetric", CASES)
def test_operators_pass_opcheck(bits: int, group: int | None, symmetric: bool, weight) -> None:
    fmt, tensors = weight(17, 96, bits, group, symmetric=symmetric)
    operands = prepare(fmt, tensors, 17, 96).operands
    torch.library.opcheck(torch.ops.fewbits.int_matmul.default, (torch.randn(2, 3, 96), *operands, bits))
    torch.library.opcheck(torch.ops.fewbits.int_dequantize.default, (*operands, bits, 96))


@pytest.mark.parametrize("bits, group, symmetric", CASES)
def test_compiles_as_one_graph(bits: int, group: int | None, symmetric: bool, weight) -> None:
    fmt, tensors = weight(17, 96, bits, group, symmetric=symmetric)
    prepared = prepare(fmt, tensors, 17, 96)
    torch.compiler.reset()

    def model(x, index):
        return torch.relu(matmul(x, prepared)) + 1, dequantize_rows(prepared, index), dequantize(prepared)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 2, 5):
        x, index = torch.randn(tokens, 96), torch.arange(tokens + 1)
        assert all(torch.equal(a, b) for a, b in zip(compiled(x, index), model(x, index)))


def test_gradient_of_the_input(weight) -> None:
    fmt, tensors = weight(17, 96, 4, 32)
    prepared = prepare(fmt, tensors, 17, 96)
    x = torch.randn(2, 3, 96, requires_grad=True)
    grad = torch.randn(2, 3, 17)
    matmul(x, prepared).backward(grad)
    torch.testing.assert_close(x.grad, grad @ dequantize(prepared))
    with torch.no_grad():
        assert not matmul(x, prepared).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(dtype: torch.dtype, weight) -> None:
    fmt, tensors = weight(17, 96, 4, 32)
    prepared = prepare(fmt, tensors, 17, 96)
    wide = torch.randn(4, 5, 192).to(dtype)
    for x in (wide[..., :96], wide[0, 0, :96], wide[..., ::2], wide[:0, :, :96]):  # strided, one vector, none
        y = matmul(x, prepared)
        assert y.shape == (*x.shape[:-1], 17) and y.dtype == dtype
        torch.testing.assert_close(y, (x.float() @ dequantize(prepared).T).to(dtype), rtol=1e-2, atol=1e-3)


def test_rows_as_an_embedding_reads_them(weight) -> None:
    for bits, group, symmetric in CASES:
        fmt, tensors = weight(17, 96, bits, group, symmetric=symmetric)
        prepared = prepare(fmt, tensors, 17, 96)
        index = torch.tensor([[16, 0], [3, 3]])
        assert torch.equal(dequantize_rows(prepared, index), dequantize(prepared)[index])


def test_packed_weight_is_shared(weight) -> None:
    """No second copy of the model: what prepare makes beside the checkpoint's tensors is the zero points."""
    fmt, tensors = weight(64, 96, 4, 32)
    packed, scale, zero = prepare(fmt, tensors, 64, 96).operands
    assert packed.data_ptr() == tensors["weight_packed"].data_ptr()
    assert scale.data_ptr() == tensors["weight_scale"].data_ptr()
    assert zero.shape == (64, 3) and zero.dtype == torch.uint8


def test_prepare_names_what_does_not_fit(weight) -> None:
    fmt, tensors = weight(17, 96, 4, 32)
    with pytest.raises(FormatError, match="weight_zero_point: missing"):
        prepare(fmt, {k: v for k, v in tensors.items() if k != "weight_zero_point"}, 17, 96)
    with pytest.raises(FormatError, match=r"weight_packed: got \(17, 12\)"):
        prepare(fmt, tensors, 18, 96)
    with pytest.raises(FormatError, match="weight_scale: got"):
        prepare(fmt, tensors | {"weight_scale": tensors["weight_scale"].double()}, 17, 96)
    cast = prepare(fmt, tensors | {"weight_scale": tensors["weight_scale"].float()}, 17, 96)  # as model.float() does
    assert torch.equal(dequantize(cast), dequantize(prepare(fmt, tensors, 17, 96)))


def test_matmul_names_what_does_not_fit(weight) -> None:
    fmt, tensors = weight(17, 96, 4, 32)
    prepared = prepare(fmt, tensors, 17, 96)
    with pytest.raises(ValueError, match="x: got 95 columns, the weight needs 96"):
        matmul(torch.randn(2, 95), prepared)
    with pytest.raises(ValueError, match="float64"):
        matmul(torch.randn(2, 96, dtype=torch.float64), prepared)


class OtherFormat:
    """A format that no fast kernel knows, made of one that they do."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def __getattr__(self, name: str):
        return getattr(self.inner, name)


def test_any_format_works(weight) -> None:
    """Adding a format takes no kernel: what nobody knows is decoded by its own methods."""
    fmt, tensors = weight(17, 96, 4, 32)
    known, other = prepare(fmt, tensors, 17, 96), prepare(OtherFormat(fmt), tensors, 17, 96)
    x = torch.randn(2, 96, dtype=torch.bfloat16)
    assert select_kernel(OtherFormat(fmt), 1, x.device) == "reference"
    assert torch.equal(dequantize(other), dequantize(known))
    assert torch.equal(dequantize_rows(other, torch.tensor([3, 1])), dequantize(known)[[3, 1]])
    assert torch.equal(matmul(x, other), (x.float() @ dequantize(known).T).to(x.dtype))


def test_selection(weight) -> None:
    fmt, _ = weight(1, 32, 4, None)
    odd, _ = weight(1, 32, 5, None)
    if KERNELS["cpu_gemv"].available():
        limit = KERNELS["cpu_gemv"].max_tokens
        assert select_kernel(fmt, 1, torch.device("cpu")) == "cpu_gemv"
        assert select_kernel(fmt, limit, torch.device("cpu")) == "cpu_gemv"
        assert select_kernel(fmt, limit + 1, torch.device("cpu")) == "cpu_dense"
    if KERNELS["triton_gemv"].available():
        assert select_kernel(fmt, 1, torch.device("cuda", 0)) == "triton_gemv"
        assert select_kernel(fmt, 33, torch.device("cuda", 0)) == "triton_gemm"
    assert select_kernel(odd, 1, torch.device("cuda", 0)) == "reference"
    assert select_kernel(fmt, 1, torch.device("mps")) == "reference"


def test_every_kernel_can_be_chosen() -> None:
    """An entry of the table that nothing reaches is dead code."""
    chosen = {dispatch._select(bits, tokens, device)[0]
              for bits in range(1, 9) for tokens in (1, 1000) for device in ("cpu", "cuda", "mps")}
    assert chosen >= {name for name, kernel in KERNELS.items() if kernel.available()}


def test_no_regular_package_named_kernels() -> None:
    """Transformers imports the hub's ``kernels`` package; ours on sys.path must never be found in its place.

    A folder without ``__init__.py`` is a mere namespace portion, and any installed package of that name wins.
    """
    root = Path(__file__).parents[2]
    assert not (root / "kernels" / "__init__.py").exists()
    code = ("import importlib.util as u; s = u.find_spec('kernels'); "
            "print('regular' if s and s.origin and 'site-packages' not in s.origin else 'ok')")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ok"
    assert importlib.util.find_spec("fewbits.kernels.dispatch") is not None

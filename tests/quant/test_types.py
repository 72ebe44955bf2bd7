"""Quantized tensors as values, sums of statistics, and the proxy loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.quant.errors import FormatError
from fewbits.quant.formats import parse_layout
from fewbits.quant.quantizers.rtn import RTN
from fewbits.quant.types import LayerStats, QuantizedTensor, proxy_loss

torch.set_num_threads(1)

LAYOUTS = ["int4_g8", "int3_row", "int1_sym_g4", "int8_g8[16]+int2_g4_bf16[24]"]


def weights(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.05


def quantized(name: str, rows: int = 11, columns: int = 40) -> QuantizedTensor:
    return RTN().quantize(weights(rows, columns), None, parse_layout(name, columns))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_pack_round_trip(name: str) -> None:
    tensor = quantized(name)
    back = QuantizedTensor.unpack(tensor.pack(), tensor.layout)
    assert back.shape == tensor.shape and back.layout == tensor.layout
    assert torch.equal(back.dequantize(), tensor.dequantize())
    for a, b in zip(back.segments, tensor.segments):
        assert torch.equal(a.codes, b.codes) and all(torch.equal(a.params[k], b.params[k]) for k in b.params)
    packed_again = back.pack()
    assert all(torch.equal(packed_again[k], v) for k, v in tensor.pack().items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_split_rows(name: str) -> None:
    tensor = quantized(name)
    parts = tensor.split_rows([3, 1, 7])
    assert [p.shape for p in parts] == [(3, 40), (1, 40), (7, 40)]
    assert torch.equal(torch.cat([p.dequantize() for p in parts]), tensor.dequantize())
    for part in parts:  # each is a tensor of its own: it can be packed and read back
        assert torch.equal(QuantizedTensor.unpack(part.pack(), part.layout).dequantize(), part.dequantize())
    back = QuantizedTensor.unpack(tensor.pack(), tensor.layout).split_rows([5, 6])
    assert torch.equal(torch.cat([p.dequantize() for p in back]), tensor.dequantize())


def test_bits_per_weight_comes_from_bytes() -> None:
    tensor = quantized("int4_g8")  # 40 codes of 4 bits and 5 scales a row, 2 words of zero points a group
    assert tensor.stored_bytes == 11 * 20 + 11 * 5 * 2 + 2 * 5 * 4 + 16
    assert tensor.bits_per_weight == 8 * tensor.stored_bytes / 440


def test_unpack_refuses_what_does_not_fit() -> None:
    tensor = quantized("int4_g8")
    stored = tensor.pack()
    with pytest.raises(FormatError, match="weight_shape: missing"):
        QuantizedTensor.unpack({k: v for k, v in stored.items() if k != "weight_shape"}, tensor.layout)
    with pytest.raises(FormatError, match="got 40 columns, the layout needs 48"):
        QuantizedTensor.unpack(stored, parse_layout("int4_g8", 48))
    with pytest.raises(FormatError, match="weight_packed: got"):
        QuantizedTensor.unpack(stored | {"weight_shape": torch.tensor([12, 40])}, tensor.layout)
    for shape in (torch.tensor(11), torch.tensor([11]), torch.tensor([11, 40, 1]), torch.tensor([[11, 40]]),
                  torch.tensor([11.0, 40.0]), torch.tensor([-11, 40])):
        with pytest.raises(FormatError):
            QuantizedTensor.unpack(stored | {"weight_shape": shape}, tensor.layout)
    two = quantized("int8_g8[16]+int2_g4_bf16[24]")
    with pytest.raises(FormatError, match="weight_scale: missing"):
        QuantizedTensor.unpack({k: v for k, v in two.pack().items() if k != "weight_scale_1"}, two.layout)


# -- sorted columns --------------------------------------------------------------------------------------------------


def sorted_tensor(order: Tensor, rows: int, name: str, seed: int = 0) -> QuantizedTensor:
    """A tensor whose columns are stored in ``order``."""
    weight = torch.randn(rows, len(order), generator=torch.Generator().manual_seed(seed))
    stored = RTN().quantize(weight[:, order], None, parse_layout(name, len(order)))[0]
    return dataclasses.replace(stored, permutation=order)


@settings(deadline=None, max_examples=60)
@given(st.permutations(range(24)), st.integers(1, 9), st.sampled_from(["int4_g8", "int8_g8[16]+int2_g4_bf16[8]"]))
def test_sorted_columns_round_trip(order: list[int], rows: int, name: str) -> None:
    tensor = sorted_tensor(torch.tensor(order), rows, name)
    stored = tensor.pack()
    assert tensor.layout == parse_layout(f"perm:{name}", 24)
    assert {k: (tuple(v.shape), v.dtype) for k, v in stored.items()} == tensor.layout.storage(rows)
    assert sum(v.numel() * v.element_size() for v in stored.values()) == tensor.stored_bytes
    assert tensor.bits_per_weight == 8 * tensor.stored_bytes / (rows * 24)
    back = QuantizedTensor.unpack(stored, tensor.layout)
    assert torch.equal(back.dequantize(), tensor.dequantize())
    plain = dataclasses.replace(tensor, permutation=None).dequantize()
    for k, column in enumerate(order):  # column k of what is stored is column order[k] of the weight
        assert torch.equal(tensor.dequantize()[:, column], plain[:, k])
    again = back.pack()
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in stored.items())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-2, 9), min_size=8, max_size=8).filter(lambda v: sorted(v) != list(range(8))))
def test_what_is_no_permutation_is_refused(values: list[int]) -> None:
    tensor = sorted_tensor(torch.arange(8), 2, "int4_g8")
    with pytest.raises(FormatError, match=r"weight_perm: got values .* needed each of 0 to 7 once"):
        QuantizedTensor.unpack(tensor.pack() | {"weight_perm": torch.tensor(values, dtype=torch.int16)}, tensor.layout)


def test_permutations_of_another_shape_or_dtype_are_refused() -> None:
    tensor = sorted_tensor(torch.arange(8), 2, "int4_g8")
    stored = tensor.pack()
    with pytest.raises(FormatError, match="weight_perm: missing"):
        QuantizedTensor.unpack({k: v for k, v in stored.items() if k != "weight_perm"}, tensor.layout)
    good = torch.arange(8, dtype=torch.int16)
    for bad in (good[:7], good[None], good.int(), good.float(), good.to(torch.uint8), torch.tensor(0).short()):
        with pytest.raises(FormatError, match="weight_perm: got"):
            QuantizedTensor.unpack(stored | {"weight_perm": bad}, tensor.layout)


def test_a_permutation_is_as_wide_as_it_must_be() -> None:
    for columns, dtype in ((32767, torch.int16), (32768, torch.int32)):
        tensor = sorted_tensor(torch.arange(columns).flip(0), 1, "int8_row")
        assert tensor.pack()["weight_perm"].dtype == dtype
        assert tensor.stored_bytes == parse_layout("int8_row", columns).stored_bytes(1) + columns * dtype.itemsize
        assert torch.equal(QuantizedTensor.unpack(tensor.pack(), tensor.layout).dequantize(), tensor.dequantize())


def test_rows_of_sorted_columns_come_apart_and_together() -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    tensor = sorted_tensor(order, 11, "int8_g8[16]+int2_g4_bf16[24]")
    parts = tensor.split_rows([3, 8])
    assert torch.equal(torch.cat([p.dequantize() for p in parts]), tensor.dequantize())
    whole = QuantizedTensor.concat_rows(parts)
    assert whole.layout == tensor.layout and torch.equal(whole.dequantize(), tensor.dequantize())
    read = QuantizedTensor.unpack(tensor.pack(), tensor.layout)
    first, second = (p.pack()["weight_perm"] for p in read.split_rows([3, 8]))
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()  # each stores its own


def test_values_are_frozen() -> None:
    tensor = quantized("int4_g8")
    for value, field in ((tensor, "shape"), (tensor.segments[0], "codes"), (LayerStats(torch.eye(2), 1), "xtx")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)


def test_statistics_add_up() -> None:
    x, shift = torch.randn(30, 5), torch.randn(30, 5)

    def stats(rows: slice, *, cross: bool) -> LayerStats:
        part, more = x[rows], shift[rows]
        return LayerStats(part.T @ part, part.shape[0], more.T @ part if cross else None)

    for cross in (False, True):
        whole = stats(slice(None), cross=cross)
        merged = stats(slice(0, 7), cross=cross) + stats(slice(7, 30), cross=cross)
        assert merged.n_tokens == 30
        torch.testing.assert_close(merged.xtx, whole.xtx)
        torch.testing.assert_close(merged.hessian, x.T @ x / 30)
        assert (merged.cross is None) == (not cross)
        if merged.cross is not None:
            torch.testing.assert_close(merged.cross, whole.cross)
    with pytest.raises(AssertionError):
        stats(slice(0, 7), cross=True) + stats(slice(7, 30), cross=False)


def test_hessian_is_new_memory_and_safe_without_tokens() -> None:
    stats = LayerStats(torch.eye(3), 4)
    stats.hessian.zero_()
    assert torch.equal(stats.xtx, torch.eye(3))
    assert torch.equal(LayerStats(torch.zeros(3, 3), 0).hessian, torch.zeros(3, 3))


def test_proxy_loss_is_the_output_error() -> None:
    """Against the outputs themselves: the squared error per token summed over outputs, and its share of the power."""
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    weight = weights(4, 12)
    other = weight + 0.01 * torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    loss, relative = proxy_loss(weight, other, LayerStats(x.T @ x, 50))
    error, power = 0.0, 0.0
    for token in x:
        for w, q in zip(weight, other):
            error += float((w - q) @ token) ** 2 / 50
            power += float(w @ token) ** 2 / 50
    assert loss == pytest.approx(error, rel=1e-4) and relative == pytest.approx(error / power, rel=1e-4)


def test_proxy_loss_of_nothing() -> None:
    weight = weights(3, 4)
    assert proxy_loss(weight, weight, LayerStats(torch.eye(4), 2)) == (0, 0)
    assert proxy_loss(weight, weight + 1, LayerStats(torch.zeros(4, 4), 0)) == (0, 0)
    loss, relative = proxy_loss(torch.zeros(3, 4), torch.ones(3, 4), LayerStats(torch.eye(4), 1))
    assert loss == 12 and relative == 0

"""A term of low rank beside codes: the closed form against other products, what it stores, and a model with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbits
from fewbits.calibration.feedback import feedback_damage
from fewbits.kernels.linear import PackedMatrix
from fewbits.quant.errors import FewbitsError, FormatError
from fewbits.quant.formats import layout_name, parse_layout
from fewbits.quant.quantizers import GPTQ, RTN
from fewbits.quant.quantizers.lowrank import low_rank
from fewbits.quant.recipe import Weights
from fewbits.quant.types import LayerStats, LowRank, QuantizedTensor, proxy_loss
from fewbits.serving.doctor import diagnose

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stats_of(columns: int, curvature: Tensor | None = None) -> LayerStats:
    x = normal(300, columns, seed=2) @ (torch.eye(columns) + 0.5 * normal(columns, columns, seed=3))
    return LayerStats(x.T @ x, 300, curvature=curvature)


def loss(error: Tensor, hessian: Tensor, curvature: Tensor) -> float:
    return float((curvature * ((error @ hessian) * error).sum(1)).sum())


def test_no_product_of_its_rank_is_better() -> None:
    error, curvature = normal(24, 20), normal(24, seed=1).exp()
    stats = stats_of(20, curvature)
    best = loss(error - low_rank(error, stats, 3).dense(), stats.hessian, curvature)
    found = low_rank(error, stats, 3)
    for seed in range(50):  # near it and far from it, and what ignores one side or both
        a, b = found.a.float(), found.b.float()
        size = 10.0 ** -(seed % 4)
        near = LowRank(a + size * normal(24, 3, seed=seed), b + size * normal(3, 20, seed=seed + 99))
        assert loss(error - near.dense(), stats.hessian, curvature) > best * (1 - 1e-3)
    for other in (None, stats_of(20), LayerStats(torch.eye(20), 1, curvature=curvature)):
        assert loss(error - low_rank(error, other, 3).dense(), stats.hessian, curvature) > best


def test_without_weights_it_is_the_svd() -> None:
    error = normal(24, 20)
    left, size, right = torch.linalg.svd(error, full_matrices=False)
    torch.testing.assert_close(low_rank(error, None, 5).dense(), left[:, :5] * size[:5] @ right[:5], rtol=0, atol=5e-3)
    torch.testing.assert_close(low_rank(error, None, 20).dense(), error, rtol=0, atol=5e-3)


def test_rows_that_do_not_matter_and_inputs_that_are_dead_do_no_harm() -> None:
    curvature, error = torch.zeros(24), normal(24, 20)
    curvature[:3] = 1
    stats = stats_of(20, curvature)
    stats.xtx[5], stats.xtx[:, 5] = 0, 0
    term = low_rank(error, stats, 3)
    assert term.a.isfinite().all() and term.b.isfinite().all()
    assert loss(error - term.dense(), stats.hessian, curvature) < 1e-3 * loss(error, stats.hessian, curvature)
    assert not low_rank(torch.zeros(24, 20), stats, 3).dense().any()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_it_keeps_its_digits_in_half_precision(scale: float) -> None:
    a, b = normal(24, 3), normal(3, 20, seed=1)
    term = low_rank(scale * a @ b, stats_of(20), 3)
    torch.testing.assert_close(term.dense() / scale, a @ b, rtol=0, atol=0.02)


def test_it_is_the_same_from_either_side() -> None:
    error = normal(24, 20)
    for shape in (error, torch.cat([error, torch.zeros(24, 9)], 1)):  # taller than wide, wider than tall
        left, size, right = torch.linalg.svd(shape, full_matrices=False)
        best = left[:, :3] * size[:3] @ right[:3]
        torch.testing.assert_close(low_rank(shape, None, 3).dense(), best, rtol=0, atol=5e-3)


LAYOUTS = ["lr4:int3_g32", "lr1:int2_row", "lr8:perm:int2_g32[32]+int4_g32[64]", "lr4:had:int3_g32", "lr4:trellis2",
           "lr4:had:vq8_v4"]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("quantizer", [RTN("search"), GPTQ()], ids=["rtn", "gptq"])
def test_stored_is_what_was_made_and_it_pays(name: str, quantizer: RTN | GPTQ) -> None:
    layout, weight, stats = parse_layout(name, 96), normal(64, 96) * 0.1, stats_of(96)
    made, _ = quantizer.quantize(weight, stats, layout, seed=3)
    stored = made.pack()
    assert made.layout == layout and layout_name(layout) == name
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == layout.storage(64)
    assert sum(t.nbytes for t in stored.values()) == layout.stored_bytes(64) == made.stored_bytes
    assert torch.equal(QuantizedTensor.unpack(stored, layout).dequantize(), made.dequantize())
    plain, _ = quantizer.quantize(weight, stats, parse_layout(name.partition(":")[2], 96), seed=3)
    assert proxy_loss(weight, made, stats)[1] < proxy_loss(weight, plain, stats)[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_products_are_those_of_the_dense_weight(name: str) -> None:
    layout, x = parse_layout(name, 96), normal(5, 96, seed=4)
    made, _ = RTN().quantize(normal(64, 96) * 0.1, stats_of(96), layout)
    matrix = PackedMatrix(layout, (64, 96), dtype=torch.float32)
    matrix.assign(made.pack())
    torch.testing.assert_close(matrix.project(x), x @ made.dequantize().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(matrix.dense(), made.dequantize())
    assert matrix.to(torch.bfloat16).packed_tensors()["weight_low_a"].dtype == torch.float16


def test_some_rows_of_it() -> None:
    made, _ = RTN().quantize(normal(64, 96), None, parse_layout("lr4:int3_g32", 96))
    torch.testing.assert_close(made.rows(slice(8, 24)).dequantize(), made.dequantize()[8:24])


@pytest.mark.parametrize("name", ["lr0:int3_g32", "lr:int3_g32", "perm:lr4:int3_g32", "lr4:lr4:int3_g32",
                                  "lr04:int3_g32"])
def test_bad_names(name: str) -> None:
    with pytest.raises(FormatError):
        parse_layout(name, 96)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(FormatError, match="low_rank: got 65 for a weight of 64 x 96, needed at most 64"):
        parse_layout("lr65:int3_g32", 96).storage(64)
    made, _ = RTN().quantize(normal(64, 96), None, parse_layout("lr4:int3_g32", 96))
    stored = made.pack()
    for bad in (stored["weight_low_a"][:-1], stored["weight_low_a"].float(), stored["weight_low_a"] * torch.inf):
        with pytest.raises(FormatError, match="weight_low_a"):
            QuantizedTensor.unpack({**stored, "weight_low_a": bad}, made.layout)


SETTINGS: dict[str, Any] = {"calibration.samples": 4, "calibration.seqlen": 32, "format.group_size": 32}


def test_from_a_recipe_to_logits(tiny, tmp_path: Path) -> None:
    overrides = SETTINGS | {"format.low_rank": 2}
    report = fewbits.quantize(tiny("llama"), tmp_path / "q", recipe="fwsvd", overrides=overrides)
    assert 4 < report.bits_per_weight < 6
    packed, dense = fewbits.load(tmp_path / "q"), fewbits.load(tmp_path / "q")
    dense.dequantize()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(FewbitsError, match="to which a product of rank 2 is added"):
        fewbits.export(tmp_path / "q", tmp_path / "e", to="compressed-tensors")
    verdicts = {v.engine: v for v in diagnose(tmp_path / "q").engines}
    assert verdicts["vLLM with fewbits' plug-in"].tensor_parallel == [1]


def test_row_weights_change_the_term_and_nothing_is_random(tiny, tmp_path: Path) -> None:
    for name, weights in (("a", "fisher"), ("b", "fisher"), ("c", "none")):
        overrides = SETTINGS | {"format.low_rank": 2, "format.row_weights": weights}
        fewbits.quantize(tiny("llama"), tmp_path / name, recipe="fwsvd", overrides=overrides)
    files = {name: [f.read_bytes() for f in sorted((tmp_path / name).glob("*.safetensors"))] for name in "abc"}
    assert files["a"] == files["b"] != files["c"]


def test_an_embedding_has_none(tiny, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="an embedding is looked up row by row"):
        fewbits.quantize(tiny("llama"), tmp_path / "q", recipe="fwsvd", overrides=SETTINGS | {"embeddings": True})


def test_recipe_keys() -> None:
    assert Weights(bits=3, low_rank=8).for_columns(64) == parse_layout("lr8:int3_g64", 64)
    assert Weights(family="trellis", bits=2, low_rank=8).for_columns(64) == parse_layout("lr8:trellis2", 64)


def test_a_budget_knows_what_the_term_is_worth() -> None:
    """Its estimate orders layouts as the quantizer's own loss does."""
    weight, stats = normal(64, 4) @ normal(4, 96, seed=1) + 0.3 * normal(64, 96, seed=5), stats_of(96)
    layouts = [parse_layout(name, 96) for name in ("int3_g32", "lr4:int3_g32", "int2_g32", "lr4:int2_g32")]
    foreseen = feedback_damage(weight, stats, layouts, None)
    found = [proxy_loss(weight, GPTQ().quantize(weight, stats, layout)[0], stats)[0] for layout in layouts]
    assert sorted(range(4), key=foreseen.__getitem__) == sorted(range(4), key=found.__getitem__)
    assert foreseen[1] < 0.9 * foreseen[0]

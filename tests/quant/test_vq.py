"""Codebooks made from the weight: k-means, refits against normal equations, and the formats that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbits
from fewbits.quant.errors import FewbitsError, FormatError
from fewbits.quant.formats import parse_format, parse_layout
from fewbits.quant.formats.vq import CodebookFormat, LowRankVQFormat, ProductFormat, VQFormat
from fewbits.quant.kmeans import assign, kmeans
from fewbits.quant.quantizers import GPTQ, RTN
from fewbits.quant.quantizers.codebooks import conjugate_gradients, fit_codebooks, refit_codebooks, with_codebooks
from fewbits.quant.recipe import Weights
from fewbits.quant.types import LayerStats, QuantizedTensor, Segment, proxy_loss

torch.set_num_threads(1)

SMALL = [VQFormat(8, 4), VQFormat(8, 8, 2), VQFormat(9, 2), ProductFormat(8, 4), LowRankVQFormat(8, 4, 2)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stats_of(columns: int, tokens: int = 300) -> LayerStats:
    x = normal(tokens, columns, seed=2) @ (torch.eye(columns) + 0.3 * normal(columns, columns, seed=3))
    return LayerStats(x.T @ x, tokens)


def name(fmt: CodebookFormat) -> str:
    return fmt.name


# -- k-means -----------------------------------------------------------------------------------------------------------


def test_kmeans_finds_clusters_that_are_there() -> None:
    truth = 10 * normal(16, 3, seed=4)
    points = truth.repeat(50, 1) + 0.01 * normal(800, 3, seed=5)
    found = kmeans(points, torch.ones(800), 16)
    assert float(assign(truth, found)[1].max()) < 1e-3


def test_kmeans_lowers_its_weighted_objective_and_ends_at_means() -> None:
    points, weight = normal(3000, 2), normal(3000, seed=1).exp()

    def objective(centers: Tensor) -> float:
        return float((assign(points, centers)[1] * weight).sum())

    losses = [objective(kmeans(points, weight, 32, iterations=n)) for n in (0, 1, 2, 5, 200)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0]
    centers = kmeans(points, weight, 32, iterations=200)
    nearest, _ = assign(points, centers)
    for c in range(32):
        own = nearest == c
        mean = (points[own] * weight[own, None]).sum(0) / weight[own].sum()
        torch.testing.assert_close(mean, centers[c], rtol=0, atol=1e-4)


def test_kmeans_is_the_same_every_time_and_keeps_few_points() -> None:
    points = normal(5000, 4)
    assert torch.equal(kmeans(points, torch.ones(5000), 16), kmeans(points, torch.ones(5000), 16))
    few = kmeans(points[:5], torch.ones(5), 16)
    assert torch.equal(few[:5], points[:5]) and not few[5:].any()
    assert torch.isfinite(kmeans(torch.zeros(100, 4), torch.zeros(100), 16)).all()


def test_nearest_centers_are_those_of_brute_force() -> None:
    points, centers = normal(200, 5), normal(40, 5, seed=1)
    distances = torch.cdist(points.double(), centers.double()).square()
    nearest, error = assign(points, centers)
    assert torch.equal(nearest, distances.argmin(1))
    torch.testing.assert_close(error, distances.amin(1).float(), rtol=1e-4, atol=1e-5)


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", SMALL, ids=name)
def test_as_many_entries_as_vectors_lose_nothing(fmt: CodebookFormat) -> None:
    """But for float16, and for what has no rank or is the sum of several."""
    weight = normal(8, 32).half().float()
    params = fmt.fit(weight, None)
    decoded = fmt.decode(fmt.encode(weight, params), params)
    if isinstance(fmt, LowRankVQFormat):
        vectors = weight.view(-1, 4)
        _, _, axes = torch.linalg.svd(vectors, full_matrices=False)
        weight = (vectors @ axes[:2].T @ axes[:2]).view(8, 32)
    torch.testing.assert_close(decoded, weight, rtol=0, atol=5e-3)


@pytest.mark.parametrize("fmt", SMALL, ids=name)
def test_adjoint_is_the_transpose_of_decode(fmt: CodebookFormat) -> None:
    weight, other = normal(64, 64), normal(64, 64, seed=7)
    params = fmt.fit(weight, None)
    codes, change = fmt.encode(weight, params), normal(*params["codebook"].shape, seed=8)
    left = (fmt.decode(codes, {**params, "codebook": change}) * other).sum()
    right = (fmt.adjoint(codes, other, params) * change).sum()
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3)


def test_full_rank_is_plain_vector_quantization() -> None:
    weight = normal(32, 64)
    plain, ranked = ProductFormat(8, 64 // 16), LowRankVQFormat(8, 4, 4)
    params = ranked.fit(weight, None)
    vectors, books = weight.view(-1, 4), ranked.books(params)
    nearest = torch.cdist(vectors.double(), books[0].double()).argmin(1)
    assert torch.equal(ranked.encode(weight, params).long().view(-1), nearest)
    assert plain.storage(32, 64)["weight_codes"] == ranked.storage(32, 64)["weight_codes"]


def test_names() -> None:
    assert parse_format("vq8x2_v8") == VQFormat(8, 8, 2) and parse_format("vq12_v6") == VQFormat(12, 6)
    assert parse_format("pq12_v576") == ProductFormat(12, 576)
    assert parse_format("lrvq8_v4_d3") == LowRankVQFormat(8, 4, 3)
    for bad in ("vq7_v4", "vq17_v4", "vq8x1_v4", "vq8x5_v4", "vq8_v0", "pq8", "lrvq8_v4_d5", "lrvq8_v4_d0", "vq8_v4\n"):
        with pytest.raises(FormatError):
            parse_format(bad)
    with pytest.raises(FormatError, match="N = 34 is not a multiple of 4"):
        VQFormat(8, 4).storage(34, 64)
    with pytest.raises(FormatError, match="K = 34 is not a multiple of 4"):
        ProductFormat(8, 4).storage(34, 34)


def test_bits_are_those_of_indexes_and_codebook() -> None:
    assert parse_layout("vq8_v4", 256).stored_bytes(512) == 512 * 256 // 4 + 256 * 4 * 2 + 16
    assert parse_layout("vq12_v6", 256).stored_bytes(600) == 100 * 256 * 12 // 8 + 4096 * 6 * 2 + 16
    assert parse_layout("pq8_v8", 64).stored_bytes(1000) == 1000 * 8 + 8 * 256 * 8 * 2 + 16


@pytest.mark.parametrize("layout", ["vq8_v4", "had:vq8x2_v8", "perm:vq8_v2[16]+vq8_v4[80]", "vq12_v2", "pq8_v8",
                                    "lrvq8_v4_d3", "int4_g32[32]+pq9_v16[64]"])
@pytest.mark.parametrize("quantizer", [RTN("search"), GPTQ(), GPTQ(act_order=False, refits=0)],
                         ids=["rtn", "gptq", "in-order"])
def test_stored_is_what_was_made(layout: str, quantizer: RTN | GPTQ) -> None:
    how, weight = parse_layout(layout, 96), normal(64, 96) * 0.1
    made, _ = quantizer.quantize(weight, stats_of(96), how, seed=3)
    stored = made.pack()
    assert made.layout == how
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == how.storage(64)
    assert torch.equal(QuantizedTensor.unpack(stored, how).dequantize(), made.dequantize())


# -- refits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [VQFormat(8, 4), VQFormat(8, 8, 2), ProductFormat(8, 16), LowRankVQFormat(8, 4, 2)],
                         ids=name)
def test_a_refit_solves_the_normal_equations(fmt: CodebookFormat) -> None:
    """No direction in the space of codebooks lowers the loss, and it is lower than before."""
    weight, hessian = normal(512, 32) * 0.1, stats_of(32).hessian + 0.1 * torch.eye(32)
    layout = parse_layout(fmt.name, 32)
    books = fit_codebooks(weight, hessian.diagonal(), layout)
    made = QuantizedTensor((512, 32), (Segment.nearest(fmt, weight, books[0]),))

    def loss(tensor: QuantizedTensor) -> float:
        error = (weight - tensor.dequantize()).double()
        return float(((error @ hessian.double()) * error).sum())

    better = refit_codebooks(made, lambda: weight.split(256), hessian, books)
    assert loss(with_codebooks(made, better)) < 0.99 * loss(made)
    again = refit_codebooks(with_codebooks(made, better), lambda: weight.split(512), hessian, better)
    assert loss(with_codebooks(made, again)) == pytest.approx(loss(with_codebooks(made, better)), rel=2e-3)


def test_conjugate_gradients_solve_a_system_and_leave_what_is_not_in_it() -> None:
    matrix = normal(12, 12) @ normal(12, 12).T / 12 + torch.eye(12)
    matrix[5], matrix[:, 5] = 0, 0
    right = normal(12, seed=1)
    right[5] = 0
    x = conjugate_gradients(lambda v: matrix @ v, right, matrix.diagonal())
    torch.testing.assert_close(matrix @ x, right, rtol=0, atol=1e-3)
    assert x[5] == 0


def test_refits_and_feedback_pay() -> None:
    weight, stats = normal(256, 64) * 0.1, stats_of(64)
    layout = parse_layout("vq8_v4", 64)
    losses = [proxy_loss(weight, q.quantize(weight, stats, layout)[0], stats)[1]
              for q in (RTN("search"), GPTQ(refits=0), GPTQ(refits=2))]
    assert losses[1] < 0.9 * losses[0] and losses[2] < 0.97 * losses[1]


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats, layout = normal(128, 64), stats_of(64), parse_layout("vq8_v4", 64)
    whole, _ = GPTQ().quantize(weight, stats, layout)
    monkeypatch.setattr("fewbits.quant.quantizers.gptq._CHUNK_WEIGHTS", 32 * 64)
    parts, _ = GPTQ().quantize(weight, stats, layout)
    losses = [proxy_loss(weight, made, stats)[1] for made in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # sums in another order move a few codes


# -- recipes and models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "layout"), [
    ({"bits": 2}, "vq8_v4"), ({"bits": 2, "vector": 8}, "vq8x2_v8"), ({"bits": 3, "vector": 8}, "vq8x3_v8"),
    ({"bits": 4}, "vq8x2_v4"), ({"bits": 4, "vector": 2}, "vq8_v2"), ({"bits": 2, "vector": 6}, "vq12_v6"),
    ({"bits": 2, "rotated": True}, "had:vq8_v4"), ({"bits": 2, "outliers": 1.5}, "perm:vq8x2_v4[2]+vq8_v4[94]"),
    ({"bits": 2, "family": "lrvq"}, "lrvq8_v4_d3"), ({"bits": 3, "family": "lrvq", "rank": 4}, "lrvq12_v4_d4"),
])
def test_recipe_keys(keys: dict[str, Any], layout: str) -> None:
    assert Weights(**{"family": "vq", **keys}).for_columns(96) == parse_layout(layout, 96)


@pytest.mark.parametrize(("keys", "message"), [
    ({"bits": 3, "vector": 2}, "got 3 bits and vectors of 2, needed indexes of 8 to 16 bits"),
    ({"bits": 8, "vector": 8}, "needed indexes of 8 to 16 bits in all, or 24 or 32"),
    ({"outliers": 1.0, "rotated": True}, "which leaves no column larger than others"),
    ({"family": "lrvq", "bits": 2, "rank": 5}, "got rank 5, needed at most the 4 weights of a vector"),
])
def test_impossible_recipe_keys(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Weights(**{"family": "vq", "bits": 2, **keys})


def test_a_damaged_checkpoint_is_refused() -> None:
    layout = parse_layout("vq12_v4", 64)
    made, _ = RTN().quantize(normal(64, 64), None, layout)
    stored = made.pack()
    for bad in ("weight_codes", "weight_codes_high", "weight_codebook"):
        with pytest.raises(FewbitsError, match=bad):
            QuantizedTensor.unpack({k: v for k, v in stored.items() if k != bad}, layout)
        with pytest.raises(FewbitsError, match=bad):
            QuantizedTensor.unpack({**stored, bad: stored[bad][:-1]}, layout)


SETTINGS: dict[str, Any] = {"calibration.samples": 4, "calibration.seqlen": 32}


@pytest.mark.parametrize("recipe", ["vptq", "lr2vq"])
def test_from_a_recipe_to_logits(recipe: str, tiny, tmp_path: Path) -> None:
    fewbits.quantize(tiny("llama"), tmp_path / "q", recipe=recipe, overrides=SETTINGS)
    packed, dense = fewbits.load(tmp_path / "q"), fewbits.load(tmp_path / "q")
    dense.dequantize()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    packed.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(fewbits.load(tmp_path / "again")(ids).logits, packed(ids).logits)
    with pytest.raises(FormatError, match=r"serve it with fewbits|takes integers alone"):
        fewbits.export(tmp_path / "q", tmp_path / "e", to="compressed-tensors")


def test_a_head_by_product_codebooks_beside_a_dense_table(tiny, tmp_path: Path) -> None:
    """The tied table stays dense, and the head reads its own codes."""
    model = tiny("llama")
    fewbits.quantize(model, tmp_path / "q", recipe="vq-logits", overrides=SETTINGS)
    packed, original = fewbits.load(tmp_path / "q"), fewbits.load(model)
    assert torch.equal(packed.get_input_embeddings().weight, original.get_input_embeddings().weight)
    head = packed.get_output_embeddings()
    assert type(head.quantized().segments[0].format).__name__ == "ProductFormat"
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        states = original.model(ids).last_hidden_state
        torch.testing.assert_close(packed(ids).logits, states @ head.quantized().dequantize().T, rtol=1e-4, atol=1e-4)
    assert packed.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 15)


def test_they_are_candidates_for_a_budget(tiny, tmp_path: Path) -> None:
    settings = SETTINGS | {"budget.bpw": 6.0, "allocate.rivals": [], "allocate.damage": "fisher",
                           "allocate.formats": ["had:vq8_v4", "vq8_v2", "lr2:int3", "had:int4"]}
    report = fewbits.quantize(tiny("llama"), tmp_path / "q", recipe="auto", overrides=settings)
    assert report.bits_per_weight <= 6.0
    assert report.measured is not None and report.measured["kl_mean"] >= 0
    with pytest.raises(FewbitsError, match="leave perm: out"):
        fewbits.plan(tiny("llama"), overrides=settings | {"allocate.formats": ["perm:int4"]}, recipe="auto")

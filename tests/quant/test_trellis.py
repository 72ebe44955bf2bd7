"""Trellis codes: the search against brute force, what is stored against what is meant, and what makes them worth it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbits
from fewbits.calibration.feedback import feedback_damage, rounded
from fewbits.kernels.cpu import trellis as compiled
from fewbits.quant import viterbi
from fewbits.quant.errors import FewbitsError, FormatError
from fewbits.quant.formats import layout_name, parse_format, parse_layout
from fewbits.quant.formats.trellis import TrellisFormat, codebook, trellis_layout
from fewbits.quant.inspection import inspect
from fewbits.quant.quantizers import GPTQ, RTN
from fewbits.quant.types import LayerStats, Layout, QuantizedTensor, proxy_loss
from fewbits.serving.doctor import diagnose

torch.set_num_threads(1)
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not compiled.can_search(), reason="no C compiler")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def path_cost(values: Tensor, book: Tensor, codes: tuple[int, ...], edge: int, code_bits: int) -> tuple[float, int]:
    """Cost of shifting ``codes`` in from an edge, and the edge that they end in."""
    mask, cost = len(book) - 1, torch.zeros(())
    for x, code in zip(values, codes):
        state = (edge << code_bits | code) & mask
        cost = cost + (book[state] - x).square()
        edge = state & (mask >> code_bits)
    return float(cost), edge


@pytest.mark.parametrize(("state_bits", "code_bits", "length"), [(3, 1, 7), (4, 2, 4), (4, 1, 6), (6, 3, 3)])
def test_the_search_finds_what_brute_force_finds(state_bits: int, code_bits: int, length: int) -> None:
    book, values = normal(1 << state_bits, seed=1), normal(length, seed=2)
    edges = len(book) >> code_bits
    every = [(path_cost(values, book, codes, edge, code_bits), edge, codes)
             for edge in range(edges) for codes in itertools.product(range(1 << code_bits), repeat=length)]
    free = viterbi._forward(values[None], book, code_bits, torch.zeros(1, edges))
    assert float(free[-1].min()) == pytest.approx(min(cost for (cost, _), _, _ in every), rel=1e-5)
    for seam in range(edges):  # a string that bites its tail
        start = torch.full((1, edges), torch.inf)
        start[0, seam] = 0
        costs = viterbi._forward(values[None], book, code_bits, start)
        best, codes = min((cost, codes) for (cost, end), edge, codes in every if edge == end == seam)
        assert float(costs[-1][0, seam]) == pytest.approx(best, rel=1e-5)
        edge, found = viterbi._backward(values[None], book, code_bits, costs, torch.tensor([seam]), first=0)
        assert tuple(found[0].tolist()) == codes and int(edge) == seam


@pytest.mark.parametrize("code_bits", [1, 2])
def test_the_seam_is_the_best_of_all(code_bits: int) -> None:
    """For a whole tile: two searches find what a search bound to each seam in turn would."""
    fmt = TrellisFormat(code_bits, 8)
    book, values = codebook(fmt, CPU), normal(3, 256)
    edges = len(book) >> code_bits
    for row in values:
        starts = torch.full((edges, edges), torch.inf).fill_diagonal_(0)
        ends = viterbi._forward(row.expand(edges, -1), book, code_bits, starts)[-1].diagonal()
        codes = viterbi.search(row[None], book, code_bits)
        tile = codes.view(fmt.span, fmt.height).T  # in the order of its string
        cost = float((fmt.decode(tile, {}) - row.view(fmt.span, fmt.height).T).square().sum())
        assert cost == pytest.approx(float(ends.min()), rel=1e-5)


@needs_compiler
@pytest.mark.parametrize("state_bits", [10, 12])
@pytest.mark.parametrize("code_bits", [1, 2, 3, 4])
def test_the_compiled_search_makes_the_same_choices(code_bits: int, state_bits: int) -> None:
    values, book = normal(9, 256), codebook(TrellisFormat(code_bits, state_bits), CPU)
    values[1] = 0
    values[2] *= 100
    assert torch.equal(compiled.search(values, book, code_bits), viterbi._search(values, book, code_bits))


def test_the_search_in_torch_is_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values, book = normal(7, 64), codebook(TrellisFormat(2, 10), CPU)
    whole = viterbi.search(values, book, 2)
    monkeypatch.setattr(viterbi, "CHUNK_BYTES", 1)
    assert torch.equal(viterbi.search(values, book, 2), whole)


@pytest.mark.parametrize(("bits", "most"), [(1, 0.295), (2, 0.077), (3, 0.0203), (4, 0.0055)])
def test_distortion_of_normal_values(bits: int, most: float) -> None:
    """Of one deviation, at 12 bits of state; no scalar quantizer does better than 0.36, 0.118, 0.035 and 0.0095."""
    fmt, values = TrellisFormat(bits), normal(128, 64)
    decoded = fmt.decode(fmt.encode(values, {}), {})
    assert float((decoded - values).square().mean() / values.square().mean()) < most


def test_names() -> None:
    assert parse_format("trellis2") == TrellisFormat(2) and TrellisFormat(3, 16).name == "trellis3_l16"
    for bad in ("trellis0", "trellis5", "trellis2_l9", "trellis2_l17", "trellis2.5", "trellis", "trellis2_g64"):
        with pytest.raises(FormatError):
            parse_format(bad)
    assert layout_name(trellis_layout(2.5, 12, 64)) == "trellis2[32]+trellis3[32]"
    assert parse_layout("trellis2[32]+trellis3[32]", 64) == trellis_layout(2.5, 12, 64)
    assert parse_layout("had:int4_g32", 64).rotated and not parse_layout("int4_g32", 64).rotated
    for name in ("had:int4_g32", "perm:had:int4_g32", "perm:trellis2"):
        assert layout_name(parse_layout(name, 64)) == name


@pytest.mark.parametrize(("rows", "columns", "match"), [
    (48, 64, "N = 48 is not a multiple of 32"), (64, 60, "K = 60 is not a multiple of 8"),
    (64, 72, "rotation: got a dimension of 72"),
])
def test_shapes_that_have_no_tiles(rows: int, columns: int, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        Layout.of(TrellisFormat(2), columns).storage(rows)


def test_a_tile_starts_on_its_own_columns() -> None:
    with pytest.raises(FormatError, match="trellis2 starts at column 4, needed a multiple of 8"):
        parse_layout("int4_row[4]+trellis2[24]", 28).codes_storage(32)


def statistics(columns: int, seed: int = 0) -> LayerStats:
    """Of correlated inputs, some channels much larger than others."""
    x = normal(4 * columns, columns, seed=seed) @ normal(columns, columns, seed=seed + 1) * columns**-0.5
    x = x * normal(columns, seed=seed + 2).exp() + normal(4 * columns, columns, seed=seed + 3) * 0.1
    return LayerStats(x.T @ x, len(x))


@pytest.mark.parametrize("name", [
    "trellis2", "trellis3_l10", "trellis1[32]+trellis2[64]", "had:int3_g32", "perm:trellis2", "perm:had:int4_sym_row",
    "had:int4_g32[32]+trellis2[64]",
])
@pytest.mark.parametrize("quantizer", [RTN("search"), GPTQ()], ids=["rtn", "gptq"])
def test_stored_is_what_was_made(name: str, quantizer: RTN | GPTQ) -> None:
    layout, weight = parse_layout(name, 96), normal(64, 96) * 0.1
    made, _ = quantizer.quantize(weight, statistics(96), layout, seed=3)
    assert made.layout == layout
    stored = made.pack()
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == layout.storage(64)
    assert made.stored_bytes == sum(t.nbytes for t in stored.values())
    again = QuantizedTensor.unpack(stored, layout)
    assert torch.equal(again.dequantize(), made.dequantize())
    halves = made.split_rows([32, 32])
    if made.row_step == 32:
        assert torch.equal(torch.cat([h.dequantize() for h in halves]), made.dequantize())


def test_error_feedback_over_tiles_loses_what_it_says() -> None:
    """``tr(E H E^T) = sum_B |(v_B - q_B) R_BB|^2``: exact, and wrong at once if an order or a sign is."""
    stats, weight = statistics(64), normal(64, 64)
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(TrellisFormat):
        def encode(self, values: Tensor, params: object) -> Tensor:
            codes = super().encode(values, params)  # type: ignore[arg-type]
            seen.append((values.clone(), self.decode(codes, {})))
            return codes

    layout = Layout(((Spy(2, 10), 64),))
    coded, _ = GPTQ(damp=0.01)._quantize(weight, stats, layout)
    hessian = stats.hessian.double() + 0.01 * stats.hessian.diagonal().mean().double() * torch.eye(64)
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)  # R R^T, R upper triangular
    expected = sum(float(((v - q).double() @ factor[8 * b : 8 * b + 8, 8 * b : 8 * b + 8]).square().sum())
                   for b, (v, q) in enumerate(seen))
    error = (weight - coded.segments[0].dequantize()).double()
    assert float(((error @ hessian) * error).sum()) == pytest.approx(expected, rel=1e-4)


def test_it_halves_the_loss_of_scalar_codes_at_fewer_bits() -> None:
    weight, stats = normal(128, 256), statistics(256)
    losses = {}
    for name in ("int2_g64", "had:int2_g64", "trellis2"):
        made, _ = GPTQ().quantize(weight, stats, parse_layout(name, 256))
        losses[name] = proxy_loss(weight, made, stats)[1], made.bits_per_weight
    assert losses["trellis2"][0] < 0.5 * losses["int2_g64"][0]
    assert losses["trellis2"][0] < 0.7 * losses["had:int2_g64"][0]
    assert losses["trellis2"][1] < losses["int2_g64"][1]


def test_a_row_factor_that_is_fitted_afterwards_never_hurts() -> None:
    weight, stats, layout = normal(64, 64), statistics(64), parse_layout("trellis1", 64)
    fitted, _ = GPTQ().quantize(weight, stats, layout)
    with_cross = LayerStats(stats.xtx, stats.n_tokens, torch.zeros(64, 64))  # QEP's targets are other weights: no fit
    plain, _ = GPTQ().quantize(weight, with_cross, layout)
    assert proxy_loss(weight, fitted, stats)[0] < proxy_loss(weight, plain, stats)[0]


@pytest.mark.parametrize("name", ["trellis2", "rvq2", "had:int3_g64", "trellis2[128]+trellis3[128]"])
def test_what_it_will_lose_is_foreseen(name: str) -> None:
    weight, stats, layout = normal(128, 256) * normal(128, 1).exp(), statistics(256), parse_layout(name, 256)
    made, _ = GPTQ().quantize(weight, stats, layout)
    (foreseen,) = feedback_damage(weight, stats, [layout], None)
    # these inputs are so correlated that feedback makes what is coded much wider than what was sampled
    assert 0.6 < foreseen / (0.5 * proxy_loss(weight, made, stats)[0]) < 1.4
    weights = rounded(weight, None, layout)
    assert float((weights - weight).square().sum() / weight.square().sum()) < 0.12


@pytest.mark.parametrize("what", ["missing", "shape", "dtype", "zero", "nan"])
@pytest.mark.parametrize("name", ["weight_in_scale", "weight_out_scale", "weight_trellis"])
def test_damaged_tensors_are_refused(name: str, what: str) -> None:
    layout = parse_layout("trellis2", 64)
    made, _ = RTN().quantize(normal(64, 64), None, layout)
    stored = made.pack()
    if what == "missing":
        del stored[name]
    elif what == "shape":
        stored[name] = stored[name][:-1]
    elif what == "dtype":
        stored[name] = stored[name].double()
    elif name == "weight_trellis":
        return  # any bits are codes
    else:
        stored[name][3] = 0 if what == "zero" else float("nan")
    with pytest.raises(FormatError, match=name):
        QuantizedTensor.unpack(stored, layout)


def test_dead_inputs_and_zero_weights() -> None:
    stats, weight = statistics(64), normal(64, 64)
    stats.xtx[:8] = 0
    stats.xtx[:, :8] = 0
    weight[5] = 0
    made, _ = GPTQ().quantize(weight, stats, parse_layout("trellis2", 64))
    assert bool(made.dequantize().isfinite().all())
    made, _ = RTN().quantize(torch.zeros(64, 64), None, parse_layout("trellis2", 64))
    assert bool(made.dequantize().abs().max() < 1e-4)  # the least scale that is stored


# -- a whole model -----------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "calibration.samples": 4, "calibration.seqlen": 32, "calibration.dtype": "float32", "format.state_bits": 10,
}


def test_from_a_recipe_to_logits(tiny, tmp_path: Path) -> None:
    report = fewbits.quantize(tiny("llama"), tmp_path / "q", recipe="trellis", overrides=SETTINGS | {"format.bits": 3})
    assert 3 < report.bits_per_weight < 4.2  # two scales of 16 bits for 64 or 96 weights each
    packed, dense = fewbits.load(tmp_path / "q"), fewbits.load(tmp_path / "q")
    dense.dequantize()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert packed.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 15)
    packed.save_pretrained(tmp_path / "again")
    again = fewbits.load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, packed(ids).logits)
    with pytest.raises(FormatError, match="takes codes of the weight in its own basis; got trellis3"):
        fewbits.export(tmp_path / "q", tmp_path / "e", to="compressed-tensors")
    verdicts = {v.engine: v for v in diagnose(tmp_path / "q").engines}
    assert "cpu_trellis_gemv" in verdicts["transformers with fewbits"].kernel or not compiled.available()
    assert verdicts["vLLM with fewbits' plug-in"].tensor_parallel == [1]


def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewbits.quantize(tiny("llama"), tmp_path / "whole", recipe="trellis", overrides=SETTINGS)

    def stop(what: str, done: int, total: int) -> None:
        if what == "Quantizing" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fewbits.quantize(tiny("llama"), tmp_path / "cut", recipe="trellis", overrides=SETTINGS, progress=stop)
    fewbits.quantize(tiny("llama"), tmp_path / "cut", recipe="trellis", overrides=SETTINGS, resume=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()


def test_it_is_a_candidate_for_a_budget(tiny, tmp_path: Path) -> None:
    formats = ["trellis2", "trellis2.5", "trellis3", "int4_g32"]
    settings = SETTINGS | {"budget.bpw": 4.2, "allocate.formats": formats, "allocate.rivals": []}
    settings.pop("format.state_bits")
    report = fewbits.quantize(tiny("llama"), tmp_path / "q", recipe="auto", overrides=settings)
    assert 3.5 < report.bits_per_weight <= 4.2
    found = {t["format"] for t in inspect(tmp_path / "q").tensors if t["linear"]}
    assert any("trellis" in f for f in found)


@pytest.mark.parametrize(("settings", "match"), [
    ({"embeddings": True}, "an embedding is looked up row by row and its rows are coded together"),
    ({"rules": [{"match": "model.embed_tokens", "format": "trellis2"}]}, "an embedding is looked up row by row"),
    ({"budget.bpw": 3.0, "allocate.formats": ["trellis2", "int4"], "allocate.target": "vllm"}, "vllm does not read"),
    ({"budget.bpw": 3.0, "allocate.formats": ["trellis2"], "allocate.unit": "columns", "allocate.column_group": 32,
      "allocate.rivals": []}, "scales or a rotation leave no columns that matter more than others"),
])
def test_what_cannot_be_is_refused(tiny, tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    recipe = "auto" if "budget.bpw" in settings else "trellis"
    with pytest.raises(FewbitsError, match=match):
        fewbits.quantize(tiny("llama"), tmp_path / "q", recipe=recipe, overrides=SETTINGS | settings)
    assert not (tmp_path / "q").exists()

"""Residual vector codes: the beam against all sums there are, and what makes them worth it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbits
from fewbits.kernels.cpu import search as compiled
from fewbits.quant.beam import SumSearch, beam_search
from fewbits.quant.errors import FormatError
from fewbits.quant.formats import parse_format, parse_layout
from fewbits.quant.formats.rvq import BEAM, RVQFormat
from fewbits.quant.quantizers import GPTQ, RTN
from fewbits.quant.types import LayerStats, Layout, QuantizedTensor, proxy_loss

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(vectors: Tensor, books: Tensor, codes: Tensor) -> Tensor:
    total = torch.stack([book[codes[:, m].long()] for m, book in enumerate(books)]).sum(0)
    return (vectors - total).square().sum(1)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_wide_beam_finds_the_best_sum_of_all(stages: int) -> None:
    books, vectors = normal(stages, 5, 4, seed=1), normal(50, 4)
    every = torch.tensor(list(itertools.product(range(5), repeat=stages)))
    best = torch.stack([errors(vectors, books, codes.expand(50, -1)) for codes in every]).amin(0)
    torch.testing.assert_close(errors(vectors, books, beam_search(vectors, books, 1000)), best)


def test_a_wider_beam_is_better() -> None:
    books, vectors = RVQFormat(3).books(torch.device("cpu")), normal(2000, 8)
    found = [float(errors(vectors, books, beam_search(vectors, books, beam)).mean()) for beam in (1, 4, BEAM)]
    assert found[0] > 1.02 * found[1] > 1.02 * found[2]


@pytest.mark.parametrize(("bits", "most"), [(2, 0.096), (3, 0.0275), (4, 0.0083)])
def test_distortion_of_normal_values(bits: int, most: float) -> None:
    fmt, values = RVQFormat(bits), normal(64, 400, seed=5)
    decoded = fmt.decode(fmt.encode(values, {}), {})
    assert float((decoded - values).square().mean() / values.square().mean()) < most


def test_codebooks_are_exact_in_half_precision() -> None:
    for bits in (2, 3, 4):
        books = RVQFormat(bits).books(torch.device("cpu"))
        assert books.shape == (bits, 256, 8) and torch.equal(books.half().float(), books)


def test_names_and_shapes() -> None:
    assert parse_format("rvq2") == RVQFormat(2)
    for bad in ("rvq1", "rvq5", "rvq", "rvq2_g8"):
        with pytest.raises(FormatError):
            parse_format(bad)
    with pytest.raises(FormatError, match="N = 36 is not a multiple of 8"):
        RVQFormat(2).storage(36, 64)


@pytest.mark.parametrize("name", ["rvq2", "perm:rvq3", "rvq2[40]+trellis2[56]", "had:int4_g32[32]+rvq4[64]"])
@pytest.mark.parametrize("quantizer", [RTN("search"), GPTQ(), GPTQ(act_order=False)], ids=["rtn", "gptq", "in-order"])
def test_stored_is_what_was_made(name: str, quantizer: RTN | GPTQ) -> None:
    layout, weight, x = parse_layout(name, 96), normal(64, 96) * 0.1, normal(300, 96, seed=2)
    made, _ = quantizer.quantize(weight, LayerStats(x.T @ x, len(x)), layout, seed=3)
    stored = made.pack()
    assert made.layout == layout
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == layout.storage(64)
    assert torch.equal(QuantizedTensor.unpack(stored, layout).dequantize(), made.dequantize())


def test_feedback_pays_and_it_beats_scalar_codes_at_fewer_bits() -> None:
    weight, mix = normal(128, 128), normal(128, 128, seed=1)
    x = normal(600, 128, seed=2) @ mix * 0.1 + 0.1 * normal(600, 128, seed=3)
    stats = LayerStats(x.T @ x, len(x))
    losses = {}
    for name, quantizer in (("rvq2", RTN()), ("rvq2", GPTQ()), ("int2_g64", GPTQ())):
        made, _ = quantizer.quantize(weight, stats, parse_layout(name, 128))
        losses[name, type(quantizer)] = proxy_loss(weight, made, stats)[1]
    assert losses["rvq2", GPTQ] < 0.6 * losses["rvq2", RTN]
    assert losses["rvq2", GPTQ] < 0.7 * losses["int2_g64", GPTQ]


def test_damaged_codes_are_refused() -> None:
    layout = Layout.of(RVQFormat(2), 64)
    stored = RTN().quantize(normal(64, 64), None, layout)[0].pack()
    for wrong in (stored["weight_codes"][:-1], stored["weight_codes"].int()):
        with pytest.raises(FormatError, match="weight_codes: got"):
            QuantizedTensor.unpack(stored | {"weight_codes": wrong}, layout)
    del stored["weight_codes"]
    with pytest.raises(FormatError, match="weight_codes: missing"):
        QuantizedTensor.unpack(stored, layout)


SETTINGS: dict[str, Any] = {"calibration.samples": 4, "calibration.seqlen": 32, "calibration.dtype": "float32"}


def test_from_a_recipe_to_logits(tiny, tmp_path: Path) -> None:
    fewbits.quantize(tiny("llama"), tmp_path / "q", recipe="rvq", overrides=SETTINGS)
    packed, dense = fewbits.load(tmp_path / "q"), fewbits.load(tmp_path / "q")
    dense.dequantize()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packed(ids[:, :3]).logits, dense(ids[:, :3]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"format.bits": 5}, {"format.bits": 2.5}])
def test_bits_that_it_has_not(tiny, tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rvq has 2, 3 or 4"):
        fewbits.quantize(tiny("llama"), tmp_path / "q", recipe="rvq", overrides=SETTINGS | settings)


@pytest.mark.skipif(not compiled.has_beam(), reason="no C compiler")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compiled_search_finds_what_torch_finds(bits: int) -> None:
    vectors, books = normal(3000, 8, seed=6), RVQFormat(bits).books(torch.device("cpu"))
    fast, slow = SumSearch.of(books).search(vectors, BEAM), beam_search(vectors, books, BEAM)
    assert float((fast == slow).all(1).float().mean()) > 0.995  # sums in another order end a tie another way
    lost = [float(errors(vectors, books, codes).mean()) for codes in (fast, slow)]
    assert lost[0] == pytest.approx(lost[1], rel=1e-4)


@pytest.mark.skipif(not compiled.has_beam(), reason="no C compiler")
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_compiled_wide_beam_finds_the_best_sum_of_all(stages: int) -> None:
    books, vectors = normal(stages, 16, 5, seed=1), normal(40, 5)
    every = torch.tensor(list(itertools.product(range(16), repeat=stages)))
    sums = torch.stack([book[every[:, m]] for m, book in enumerate(books)]).sum(0)
    best = torch.cdist(vectors, sums).square().amin(1)
    found = SumSearch.of(books).search(vectors, 5000)
    torch.testing.assert_close(errors(vectors, books, found), best, rtol=1e-4, atol=1e-4)


def test_the_search_does_not_depend_on_threads() -> None:
    vectors, books = normal(500, 8, seed=6), SumSearch.of(RVQFormat(3).books(torch.device("cpu")))
    one = books.search(vectors, BEAM)
    torch.set_num_threads(2)
    two = books.search(vectors, BEAM)
    torch.set_num_threads(1)
    assert torch.equal(one, two)

"""Complex tiles (Fairy2i): the split into U and V, codes against the paper's, storage, and error feedback."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbits
from fewbits.quant.errors import FormatError
from fewbits.quant.formats import parse_format, parse_layout
from fewbits.quant.formats.fairy import (
    FairyFormat,
    axis_scales,
    fit_scales,
    phases,
    powers,
    real_form,
    residual_phases,
    sums,
    widely_linear,
)
from fewbits.quant.quantizers import GPTQ, RTN
from fewbits.quant.types import LayerStats, QuantizedTensor, proxy_loss

torch.set_num_threads(1)

EVERY = [FairyFormat(stages) for stages in (1, 2, 3)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def name(fmt: FairyFormat) -> str:
    return fmt.name


def decoded(fmt: FairyFormat, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    params = fmt.fit(weight, importance)
    return fmt.decode(fmt.encode(weight, params), params)


# -- widely linear forms -----------------------------------------------------------------------------------------------


def test_a_tile_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    u, v = widely_linear(weight)
    assert u.tolist() == [[0.5j]] and v.tolist() == [[1 + 2.5j]]
    x = torch.tensor([2 - 1j])
    assert (u @ x + v @ x.conj()).tolist() == [7j] and (weight @ torch.tensor([2.0, -1.0])).tolist() == [0, 7]


@pytest.mark.parametrize("halves", [False, True], ids=["neighbours", "halves"])
def test_the_split_is_exact_and_multiplies_as_the_weight_does(halves: bool) -> None:
    whole = torch.randint(-1000, 1000, (10, 14), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(real_form(*widely_linear(whole, halves=halves), halves=halves), whole)
    weight, x = normal(10, 14), normal(14, seed=1)
    u, v = widely_linear(weight, halves=halves)
    torch.testing.assert_close(real_form(u, v, halves=halves), weight, rtol=0, atol=1e-6)

    def to_complex(values: Tensor) -> Tensor:
        return torch.complex(*(values.chunk(2) if halves else (values[::2], values[1::2])))

    z = to_complex(x)
    torch.testing.assert_close(u @ z + v @ z.conj(), to_complex(weight @ x))


def test_the_pairings_differ_by_an_order_of_rows_and_columns() -> None:
    weight = normal(12, 16)
    rows, columns = (torch.arange(n).view(2, -1).T.flatten() for n in weight.shape)  # 0, n/2, 1, n/2 + 1, ...
    for one, other in zip(widely_linear(weight, halves=True), widely_linear(weight[rows][:, columns])):
        assert torch.equal(one, other)


# -- phases ------------------------------------------------------------------------------------------------------------


def test_quarters_are_those_of_the_angle_and_half_open() -> None:
    z = torch.complex(normal(5000), normal(5000, seed=1))
    assert torch.equal(phases(z), ((z.angle() + torch.pi / 4) // (torch.pi / 2)).long() % 4)
    edges = torch.tensor([1 + 1j, -1 + 1j, -1 - 1j, 1 - 1j, 0, 1, 1j, -1, -1j])
    assert phases(edges).tolist() == [1, 2, 3, 0, 0, 0, 1, 2, 3]
    i = torch.complex(torch.tensor(0.0), torch.tensor(1.0))
    assert torch.equal(torch.view_as_complex(powers(torch.arange(4))), torch.stack([i**0, i, i * i, i * i * i]))


def test_scales_are_means_along_the_axes() -> None:
    z = torch.complex(normal(400), 2 * normal(400, seed=1))
    codes = phases(z)
    real = codes % 2 == 0
    expected = torch.stack([z.real[real].abs().mean(), z.imag[~real].abs().mean()])
    torch.testing.assert_close(axis_scales(z, codes), expected)
    assert axis_scales(torch.tensor([2 + 1j]), torch.tensor([0])).tolist() == [2, 0]


def test_one_shared_scale_is_signs_in_a_hadamard_basis() -> None:
    """An orthonormal mix of a tile's entries, signs, and the mix back: every value is the same."""
    weight = normal(64, 64)
    u, v = widely_linear(weight)
    shared = [float((z.real.abs() + z.imag.abs()).mean()) / 2 for z in (u, v)]  # of both diagonals
    made = real_form(*(torch.view_as_complex(powers(phases(z)) * 2 * s) for z, s in zip((u, v), shared)))
    # of (R11, R12, R21, R22), one row for each of U_r + U_i, U_r - U_i, V_r + V_i, V_r - V_i
    mix = torch.tensor([[1, -1, 1, 1], [1, 1, -1, 1], [1, 1, 1, -1], [1, -1, -1, -1]]) / 2
    torch.testing.assert_close(mix @ mix.T, torch.eye(4))
    entries = torch.stack([weight[::2, ::2], weight[::2, 1::2], weight[1::2, ::2], weight[1::2, 1::2]])
    mixed = torch.einsum("ij,jab->iab", mix, entries)
    scales = torch.tensor([shared[0], shared[0], shared[1], shared[1]])[:, None, None]
    signs = torch.where(mixed > 0, 1.0, -1.0) * scales * 2
    back = torch.einsum("ji,jab->iab", mix, signs)
    for i, (row, column) in enumerate(itertools.product((0, 1), (0, 1))):
        torch.testing.assert_close(made[row::2, column::2], back[i])


@pytest.mark.parametrize(("stages", "expected"), [(1, 0.3634), (2, 0.1305), (3, 0.0584)])
def test_error_on_normal_weights(stages: int, expected: float) -> None:
    """As the paper chooses codes and scales it is that of residual signs; choosing both jointly never loses by it."""
    weight, forms = normal(256, 256), []
    for z in widely_linear(weight):
        codes, scales = residual_phases(z, stages)
        forms.append(sum(torch.view_as_complex(powers(k) * s) for k, s in zip(codes, scales)))
    greedy = float((weight - real_form(*forms)).square().mean())
    assert greedy == pytest.approx(expected, rel=0.02)
    ours = float((weight - decoded(FairyFormat(stages), weight)).square().mean())
    assert ours < {1: 1.002, 2: 0.9, 3: 0.65}[stages] * greedy  # scales are rounded to float16


def test_residuals_shrink_with_every_stage() -> None:
    z = torch.complex(normal(3000), 0.3 * normal(3000, seed=1))
    codes, scales = residual_phases(z, 3)
    left = [float(z.abs().square().sum())]
    for k, s in zip(codes, scales):
        z = z - torch.view_as_complex(powers(k) * s)
        left.append(float(z.abs().square().sum()))
    assert all(after < 0.6 * before for before, after in itertools.pairwise(left))


def test_sums_are_those_of_powers() -> None:
    scale = normal(3, 2).abs()
    found = sums(scale)
    for digits in itertools.product(range(4), repeat=3):
        exact = sum((powers(torch.tensor(k)) * s for k, s in zip(digits, scale)), torch.zeros(2))
        torch.testing.assert_close(found[sum(k << 2 * t for t, k in enumerate(digits))], exact)


def test_fitted_scales_are_the_least_squares_of_their_codes() -> None:
    z, mass = torch.complex(normal(2000), 2 * normal(2000, seed=1)), normal(2000, seed=2).exp()
    scale = fit_scales(z, 2, mass)

    def loss(trial: Tensor) -> float:
        points = torch.view_as_real(z)
        return float(((torch.cdist(points, sums(trial)).amin(1) ** 2) * mass).sum())

    assert loss(scale) < 0.98 * loss(residual_phases(z, 2, mass)[1])
    for i, j, step in itertools.product(range(2), range(2), (0.97, 1.03)):
        moved = scale.clone()
        moved[i, j] *= step
        assert loss(moved) > loss(scale)


# -- the format --------------------------------------------------------------------------------------------------------


def test_names_and_sizes_that_do_not_fit() -> None:
    assert [parse_format(f"fairy{b}") for b in (1, 2, 3)] == EVERY
    for bad in ("fairy", "fairy0", "fairy4", "fairy2_g64", "fairy2\n"):
        with pytest.raises(FormatError):
            parse_format(bad)
    with pytest.raises(FormatError, match="K = 33 is not a multiple of 2"):
        FairyFormat(2).storage(32, 33)
    with pytest.raises(FormatError, match="N = 33 is not a multiple of 2"):
        FairyFormat(2).storage(33, 32)


@pytest.mark.parametrize("fmt", EVERY, ids=name)
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (6, 34), (10, 18), (64, 48), (34, 130)])
def test_pack_is_exact_and_bits_are_those_of_bytes(fmt: FairyFormat, rows: int, columns: int) -> None:
    weight = normal(rows, columns)
    params = fmt.fit(weight, None)
    codes = fmt.encode(weight, params)
    stored = fmt.pack(codes, params)
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == fmt.storage(rows, columns)
    back, scales = fmt.unpack(stored, rows, columns)
    assert torch.equal(back, codes) and torch.equal(scales["scale"], params["scale"])
    made, _ = RTN().quantize(weight, None, parse_layout(fmt.name, columns))
    assert made.stored_bytes == sum(t.nbytes for t in made.pack().values())
    words = -(-columns // 2 * 4 // 32)
    assert made.stored_bytes == rows // 2 * fmt.stages * words * 4 + 8 * fmt.stages + 16


def test_a_stage_is_a_bit_a_weight() -> None:
    for fmt in EVERY:
        assert parse_layout(fmt.name, 256).stored_bytes(512) == 512 * 256 * fmt.stages // 8 + 8 * fmt.stages + 16


@pytest.mark.parametrize("fmt", EVERY, ids=name)
def test_coding_again_what_was_decoded_loses_nothing(fmt: FairyFormat) -> None:
    weight = normal(32, 64) * 0.02
    params = fmt.fit(weight, None)
    once = fmt.decode(fmt.encode(weight, params), params)
    assert torch.equal(fmt.decode(fmt.encode(once, params), params), once)


@pytest.mark.parametrize("fmt", EVERY, ids=name)
@pytest.mark.parametrize("factor", [2.0**-6, 8.0])
def test_scaled_weights_have_the_same_codes_and_scaled_values(fmt: FairyFormat, factor: float) -> None:
    weight = normal(32, 64)
    params, scaled = fmt.fit(weight, None), fmt.fit(weight * factor, None)
    torch.testing.assert_close(scaled["scale"].float(), params["scale"].float() * factor, rtol=2e-3, atol=0)
    assert float((fmt.encode(weight, params) == fmt.encode(weight * factor, scaled)).float().mean()) > 0.999
    torch.testing.assert_close(decoded(fmt, -weight).square().sum(), decoded(fmt, weight).square().sum(),
                               rtol=1e-3, atol=0)


def test_codes_are_the_nearest_of_all() -> None:
    fmt, weight = FairyFormat(2), normal(8, 12)
    params = fmt.fit(weight, None)
    books = [torch.view_as_complex(book) for book in fmt.books(params)]
    best = real_form(*(book[(z[..., None] - book).abs().argmin(-1)] for z, book in zip(widely_linear(weight), books)))
    torch.testing.assert_close(fmt.decode(fmt.encode(weight, params), params), best)


def test_one_stage_is_nearly_the_paper_s_phases() -> None:
    weight, fmt = normal(64, 64), FairyFormat(1)
    codes = fmt.encode(weight, fmt.fit(weight, None)).long()
    for z, part in zip(widely_linear(weight), (codes & 3, codes >> 2)):
        assert float((part == phases(z)).float().mean()) > 0.9  # scales of two axes move the diagonals a little


@pytest.mark.parametrize("fmt", EVERY, ids=name)
def test_zeros_stay_zeros_and_importance_is_heeded(fmt: FairyFormat) -> None:
    assert not decoded(fmt, torch.zeros(4, 8)).any()
    weight = normal(64, 32)
    weight[:, 16:] *= 8
    importance = torch.tensor([1.0] * 16 + [1e-4] * 16)
    errors = [(weight - decoded(fmt, weight, h)).square().mean(0) for h in (None, importance)]
    assert errors[1][:16].mean() < 0.8 * errors[0][:16].mean()


def test_a_damaged_checkpoint_is_refused() -> None:
    layout = parse_layout("fairy2", 64)
    stored = RTN().quantize(normal(32, 64), None, layout)[0].pack()
    for bad in ("weight_phases", "weight_scale"):
        with pytest.raises(FormatError, match=bad):
            QuantizedTensor.unpack({k: v for k, v in stored.items() if k != bad}, layout)
        with pytest.raises(FormatError, match=bad):
            QuantizedTensor.unpack({**stored, bad: stored[bad][:-1]}, layout)


# -- quantizers and models ---------------------------------------------------------------------------------------------


def stats_of(columns: int) -> LayerStats:
    x = normal(300, columns, seed=2) @ (torch.eye(columns) + 0.3 * normal(columns, columns, seed=3))
    return LayerStats(x.T @ x, 300)


@pytest.mark.parametrize("layout", ["fairy1", "fairy2", "had:fairy3", "perm:fairy2", "int4_g32[32]+fairy2[64]"])
@pytest.mark.parametrize("quantizer", [RTN("search"), GPTQ()], ids=["rtn", "gptq"])
def test_stored_is_what_was_made(layout: str, quantizer: RTN | GPTQ) -> None:
    how, weight = parse_layout(layout, 96), normal(64, 96) * 0.1
    made, _ = quantizer.quantize(weight, stats_of(96), how, seed=3)
    assert made.layout == how
    stored = made.pack()
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == how.storage(64)
    assert torch.equal(QuantizedTensor.unpack(stored, how).dequantize(), made.dequantize())
    parts = made.split_rows([16, 48])
    if made.rotation is None:
        assert torch.equal(torch.cat([p.dequantize() for p in parts]), made.dequantize())


def test_feedback_pays_and_rotations_even_out_rows() -> None:
    weight, stats = normal(128, 64) * normal(128, 1, seed=5).exp(), stats_of(64)

    def loss(quantizer: RTN | GPTQ, layout: str) -> float:
        return proxy_loss(weight, quantizer.quantize(weight, stats, parse_layout(layout, 64))[0], stats)[1]

    plain, feedback = loss(RTN("search"), "fairy2"), loss(GPTQ(), "fairy2")
    assert feedback < 0.9 * plain and loss(GPTQ(), "had:fairy2") < 0.8 * feedback


def test_from_a_recipe_to_logits(tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"calibration.samples": 4, "calibration.seqlen": 32}
    fewbits.quantize(tiny("llama"), tmp_path / "q", recipe="ifairy", overrides=settings)
    packed, dense = fewbits.load(tmp_path / "q"), fewbits.load(tmp_path / "q")
    dense.dequantize()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    packed.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(fewbits.load(tmp_path / "again")(ids).logits, packed(ids).logits)

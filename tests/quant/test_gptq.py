"""GPTQ against slow oracles: explicit optimal brain quantization, exhaustive search, and the algebra beneath."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from torch import Tensor

from fewbits.quant.errors import FewbitsError
from fewbits.quant.formats import parse_layout
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.quantizers.gptq import GPTQ, reverse_cholesky
from fewbits.quant.quantizers.rtn import RTN
from fewbits.quant.types import LayerStats, Layout, QuantizedTensor, proxy_loss

torch.set_num_threads(1)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated inputs ``(T, K)`` of very different sizes, as activations are."""
    generator = torch.Generator().manual_seed(seed + 1000)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(tokens, columns, generator=generator) @ (mix + 0.5 * torch.eye(columns)) * sizes


def stats_of(x: Tensor) -> LayerStats:
    return LayerStats(x.T @ x, x.shape[0])


def codes_of(tensor: QuantizedTensor) -> Tensor:
    return torch.cat([s.codes for s in tensor.segments], dim=1)


def loss(weight: Tensor, tensor: QuantizedTensor, stats: LayerStats) -> float:
    return proxy_loss(weight, tensor.dequantize(), stats)[0]


def per_column(tensor: QuantizedTensor) -> list[tuple[IntFormat, dict[str, Tensor]]]:
    """The format and parameters ``(N,)`` of each column."""
    out = []
    for segment in tensor.segments:
        groups = segment.format.groups(segment.columns)
        for column in range(segment.columns):
            group = column * groups // segment.columns
            out.append((segment.format, {k: v[:, group] for k, v in segment.params.items()}))
    return out


def factored(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """R of ``H + damp mean(diag H) I = R R^T``, and the damping that it took."""
    lower, damp = reverse_cholesky(hessian, 1, torch.arange(len(hessian)), damp)
    return lower.flip(0, 1), damp


def brain_surgeon(weight: Tensor, stats: LayerStats, tensor: QuantizedTensor, damp: float, act_order: bool) -> Tensor:
    """Codes by the push form with an explicit inverse at every step, float64, on the groups of ``tensor``."""
    hessian = stats.xtx.double() / stats.n_tokens
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    if not act_order:
        order = list(range(weight.shape[1]))
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    work, columns = weight.double().clone(), per_column(tensor)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for step, k in enumerate(order):
        rest = order[step:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        fmt, params = columns[k]
        codes[:, k] = fmt.encode(work[:, k], params)
        error = (work[:, k] - fmt.decode(codes[:, k], params).double()) / inverse[0, 0]
        work[:, rest] -= error[:, None] * inverse[0]
    return codes


# -- sorted columns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int3_g16", "int6_g16[16]+int3_g16[32]+int2_g16[16]"])
@pytest.mark.parametrize("clip", ["minmax", "search"])
def test_sorted_columns_with_a_diagonal_hessian_are_round_to_nearest(name: str, clip: str) -> None:
    """In groups of sorted columns: the one with the largest input comes first."""
    weight = weights(12, 64)
    power = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(5)))
    stats = LayerStats(torch.diag(power), 1)
    layout = parse_layout(f"perm:{name}", 64)
    ours, _ = GPTQ(clip=clip).quantize(weight, stats, layout)
    rounded, _ = RTN(clip).quantize(weight, stats, layout)
    assert torch.equal(ours.dequantize(), rounded.dequantize())
    order = torch.argsort(power, descending=True)
    by_hand, _ = RTN(clip).quantize(weight[:, order], LayerStats(torch.diag(power[order]), 1), parse_layout(name, 64))
    assert torch.equal(rounded.dequantize()[:, order], by_hand.dequantize())
    assert ours.layout == rounded.layout == layout


@pytest.mark.parametrize("act_order", [False, True])
def test_sorted_columns_are_the_same_sweep_over_a_renamed_input(act_order: bool) -> None:
    """The weight and all its statistics in another order; QEP's too. What comes out is in the columns' own order."""
    _, _, stats = paired()
    weight, order = weights(9, 48), stats.column_order()
    assert bool((stats.xtx.diagonal()[order].diff() <= 0).all()) and stats.cross is not None
    how = GPTQ(act_order=act_order, qep=0.5)
    tensor, facts = how.quantize(weight, stats, parse_layout("perm:int4_g16[16]+int2_g16[32]", 48))
    renamed = LayerStats(stats.xtx[order][:, order], stats.n_tokens, stats.cross[order][:, order])
    plain, same = how.quantize(weight[:, order], renamed, parse_layout("int4_g16[16]+int2_g16[32]", 48))
    assert torch.equal(tensor.dequantize()[:, order], plain.dequantize()) and facts == same
    if act_order:  # and with one group for a row, sorting is nothing but another name for each column
        alone, _ = how.quantize(weight, stats, parse_layout("int3_row", 48))
        named, _ = how.quantize(weight, stats, parse_layout("perm:int3_row", 48))
        assert float((alone.dequantize() != named.dequantize()).float().mean()) < 0.01


@pytest.mark.parametrize("how", [GPTQ(), RTN(), RTN("search")])
def test_nothing_to_sort_by_is_an_error(how: GPTQ | RTN) -> None:
    for stats in (None, LayerStats(torch.zeros(16, 16), 0)):
        with pytest.raises(FewbitsError, match="no calibration tokens"):
            how.quantize(weights(2, 16), stats, parse_layout("perm:int4_g8", 16))


# -- the sweep ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int2_g16", "int3_sym_g16", "int4_row", "int4_g16[32]+int2_sym_g8[32]"])
def test_equals_explicit_inverse_form(name: str, act_order: bool) -> None:
    weight, stats = weights(48, 64), stats_of(inputs(300, 64))
    tensor, facts = GPTQ(act_order=act_order).quantize(weight, stats, parse_layout(name, 64))
    expected = brain_surgeon(weight, stats, tensor, 0.01, act_order)
    different = (codes_of(tensor) != expected).any(dim=1)
    assert int(different.sum()) <= 1  # a tie in float32 changes what follows in its row
    assert facts == {"damp": 0.01}


@pytest.mark.parametrize("act_order", [False, True])
def test_block_size_changes_nothing(act_order: bool) -> None:
    weight, stats = weights(96, 160), stats_of(inputs(500, 160))
    layout = parse_layout("int3_g32", 160)
    first = codes_of(GPTQ(act_order=act_order, block_size=1).quantize(weight, stats, layout)[0])
    for size in (7, 32, 128, 1000):
        other = codes_of(GPTQ(act_order=act_order, block_size=size).quantize(weight, stats, layout)[0])
        assert int((first != other).sum()) <= 1e-4 * first.numel()


def test_what_is_rounded_is_rounded_to_nearest() -> None:
    """With E = W - Q and A = R / diag(R), (E A)_k is what was lost at column k: half a step, unless codes ended."""
    weight, stats = weights(64, 96), stats_of(inputs(400, 96))
    tensor, _ = GPTQ(act_order=False).quantize(weight, stats, Layout.of(IntFormat(4, 32), 96))
    factor, _ = factored(stats.hessian, 0.01)
    lost = (weight - tensor.dequantize()) @ (factor / factor.diagonal())
    scale = tensor.segments[0].params["scale"].float().repeat_interleave(32, dim=1)
    codes = codes_of(tensor)
    inside = (codes > 0) & (codes < 15)
    assert inside.float().mean() > 0.7
    assert (lost.abs() <= scale / 2 * (1 + 1e-3))[inside].all()
    # and the loss, damping included, is the sum of the losses of the columns
    hessian = factor @ factor.T
    error = weight - tensor.dequantize()
    torch.testing.assert_close(
        ((error @ hessian) * error).sum(), (lost.square() * factor.diagonal().square()).sum(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("factor", [4.0, 2.0**-20, 37.0, 1e-5])
@pytest.mark.parametrize("dead", [0, 20])
def test_the_scale_of_the_hessian_does_not_matter(factor: float, dead: int) -> None:
    x = inputs(300, 64)
    x[:, :dead] = 0
    weight, stats = weights(64, 64), stats_of(x)
    layout = parse_layout("int3_g16", 64)
    plain = codes_of(GPTQ().quantize(weight, stats, layout)[0])
    scaled = codes_of(GPTQ().quantize(weight, LayerStats(stats.xtx * factor, 300), layout)[0])
    different = (plain != scaled).any(dim=1).sum()
    assert different == 0 if factor in (4.0, 2.0**-20) else different <= 1
    tokens = codes_of(GPTQ().quantize(weight, LayerStats(stats.xtx * 4, 1200), layout)[0])
    assert torch.equal(plain, tokens)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip", ["minmax", "search"])
def test_diagonal_hessian_is_round_to_nearest(act_order: bool, clip: str) -> None:
    """No correlation, no feedback: the order of columns is undone exactly, and RTN's codes come out."""
    weight = weights(32, 48)
    stats = LayerStats(torch.diag(torch.rand(48, generator=torch.Generator().manual_seed(5)) + 0.1), 1)
    layout = parse_layout("int3_g8[32]+int4_sym_row[16]", 48)
    ours, _ = GPTQ(act_order=act_order, clip=clip).quantize(weight, stats, layout)
    plain, _ = RTN(clip).quantize(weight, stats, layout)
    assert torch.equal(codes_of(ours), codes_of(plain))
    assert torch.equal(ours.dequantize(), plain.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_on_the_grid_come_back(bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (8, 4, 16), generator=generator)
    codes[..., 0], codes[..., 1] = 0, (1 << bits) - 1  # the ends, so that the range gives the scale away
    zero = torch.randint(0, 1 << bits, (8, 4), generator=generator)
    scale = 2.0 ** torch.randint(-8, 0, (8, 4), generator=generator)
    if symmetric:  # the range of a symmetric group is not a value of its grid: scales must be given
        zero = torch.full((8, 4), 1 << (bits - 1))
        monkeypatch.setattr(IntFormat, "fit", lambda *args: {"scale": scale})
    weight = (scale[..., None] * (codes - zero[..., None])).view(8, 64)
    stats = stats_of(inputs(200, 64))
    layout = Layout.of(IntFormat(bits, 16, symmetric, torch.float32), 64)
    tensor, _ = GPTQ(clip="minmax").quantize(weight, stats, layout)
    assert torch.equal(codes_of(tensor), codes.view(8, 64).to(torch.uint8))
    assert torch.equal(tensor.dequantize(), weight)
    assert loss(weight, tensor, stats) == 0


def test_groups_are_those_of_the_original_weights() -> None:
    weight, stats = weights(16, 64), stats_of(inputs(200, 64))
    layout = parse_layout("int3_g16[48]+int2_row[16]", 64)
    ours, _ = GPTQ().quantize(weight, stats, layout)
    plain, _ = RTN("search").quantize(weight, stats, layout)
    for a, b in zip(ours.segments, plain.segments):
        assert all(torch.equal(a.params[k], b.params[k]) for k in b.params)


# -- quality -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int2_g32", "int3_sym_g32", "int4_row"])
def test_beats_round_to_nearest_on_correlated_inputs(name: str) -> None:
    weight, stats = weights(64, 128), stats_of(inputs(1000, 128))
    layout = parse_layout(name, 128)
    losses = {
        "gptq": loss(weight, GPTQ().quantize(weight, stats, layout)[0], stats),
        "in order": loss(weight, GPTQ(act_order=False).quantize(weight, stats, layout)[0], stats),
        "minmax": loss(weight, GPTQ(clip="minmax").quantize(weight, stats, layout)[0], stats),
        "rtn": loss(weight, RTN("search").quantize(weight, stats, layout)[0], stats),
    }
    assert losses["gptq"] < 0.9 * losses["rtn"]
    assert losses["gptq"] < losses["in order"]
    if name != "int4_row":
        assert losses["gptq"] < losses["minmax"]


def test_every_bit_is_worth_six_decibels() -> None:
    weight, stats = weights(32, 64), stats_of(inputs(400, 64))
    layouts = [Layout.of(IntFormat(b, 32), 64) for b in range(2, 9)]
    losses = [loss(weight, GPTQ().quantize(weight, stats, layout)[0], stats) for layout in layouts]
    assert all(2.5 < a / b < 7 for a, b in itertools.pairwise(losses))


def test_exhaustive_search_is_never_beaten_and_hardly_better() -> None:
    ours_total = best_total = plain_total = 0.0
    exact = 0
    for seed in range(60):
        columns = 3 + seed % 3
        weight, stats = weights(1, columns, seed), stats_of(inputs(40, columns, seed))
        layout = Layout.of(IntFormat(2, None, False, torch.float32), columns)
        tensor, _ = GPTQ(clip="minmax").quantize(weight, stats, layout)
        plain, _ = RTN("minmax").quantize(weight, stats, layout)
        fmt, params = per_column(tensor)[0]
        every = torch.tensor(list(itertools.product(range(4), repeat=columns)), dtype=torch.uint8)
        factor, _ = factored(stats.hessian, 0.01)

        def objective(values: Tensor, weight: Tensor = weight, factor: Tensor = factor) -> Tensor:
            return ((weight - values) @ factor).double().square().sum(-1)

        best = float(objective(fmt.decode(every, params)).min())
        ours = float(objective(tensor.dequantize()))
        assert ours >= best * (1 - 1e-5)
        exact += ours <= best * (1 + 1e-5)
        ours_total, best_total = ours_total + ours, best_total + best
        plain_total += float(objective(plain.dequantize()))
    assert exact >= 30
    assert ours_total < 1.35 * best_total < plain_total


# -- hard Hessians -----------------------------------------------------------------------------------------------------


def test_dead_columns_are_zeroed_and_change_nothing_else() -> None:
    x = inputs(300, 64) * 1e-3  # small activations: a dead column must not weigh more than a live one
    dead = torch.arange(64) % 5 == 2
    x[:, dead] = 0
    weight, stats = weights(16, 64), stats_of(x)
    tensor, facts = GPTQ().quantize(weight, stats, parse_layout("int3_row", 64))
    back = tensor.dequantize()
    assert (back[:, dead] == 0).all() and facts == {"damp": 0.01}
    live = stats_of(x[:, ~dead])
    alone, _ = GPTQ().quantize(weight[:, ~dead].contiguous(), live, parse_layout("int3_row", int((~dead).sum())))
    different = (back[:, ~dead] != alone.dequantize()).any(dim=1)
    assert int(different.sum()) <= 1


def test_all_columns_dead() -> None:
    tensor, _ = GPTQ().quantize(weights(4, 32), LayerStats(torch.zeros(32, 32), 10), parse_layout("int4_g16", 32))
    assert (tensor.dequantize() == 0).all()


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_fewer_tokens_than_columns(tokens: int) -> None:
    weight, stats = weights(32, 64), stats_of(inputs(tokens, 64))
    layout = parse_layout("int3_g32", 64)
    tensor, facts = GPTQ().quantize(weight, stats, layout)
    assert facts["damp"] == 0.01 and torch.isfinite(tensor.dequantize()).all()
    assert loss(weight, tensor, stats) < 0.5 * loss(weight, RTN("search").quantize(weight, stats, layout)[0], stats)


def test_singular_hessian_without_damping_escalates(caplog: pytest.LogCaptureFixture) -> None:
    weight, stats = weights(8, 32), stats_of(inputs(4, 32))
    with caplog.at_level(logging.WARNING):
        tensor, facts = GPTQ(damp=0).quantize(weight, stats, parse_layout("int3_g32", 32))
    assert 0 < facts["damp"] < 1e-2 and torch.isfinite(tensor.dequantize()).all()
    assert "damping raised from 0 to" in caplog.text


def test_reverse_cholesky() -> None:
    hessian = stats_of(inputs(200, 48)).hessian
    factor, damp = factored(hessian, 0.01)
    damping = 0.01 * float(hessian.diagonal().mean())
    damped = hessian + damping * torch.eye(48)
    assert damp == 0.01 and torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.T, damped, rtol=1e-5, atol=1e-6 * float(hessian.diagonal().max()))
    curvature = factor.diagonal().double().square()
    assert (curvature >= damping * (1 - 1e-4)).all()
    assert (curvature <= damped.diagonal() * (1 + 1e-5)).all()
    assert curvature[-1] == pytest.approx(float(damped[-1, -1]), rel=1e-5)
    assert float(curvature.log().sum()) == pytest.approx(float(torch.linalg.slogdet(damped.double())[1]), rel=1e-4)
    inverse = torch.linalg.inv(damped.double())
    assert float(curvature[0]) == pytest.approx(1 / float(inverse[0, 0]), rel=1e-3)


def test_reverse_cholesky_in_another_order_leaves_its_input_alone() -> None:
    stats, order = stats_of(inputs(100, 16)), torch.randperm(16, generator=torch.Generator().manual_seed(2))
    before = stats.xtx.clone()
    lower, _ = reverse_cholesky(stats.xtx, 100, order, 0.1)
    assert torch.equal(stats.xtx, before)
    expected, _ = factored(stats.hessian[order][:, order], 0.1)  # the order of columns, and sums instead of means
    torch.testing.assert_close(lower.flip(0, 1), expected, rtol=1e-4, atol=1e-5)


def test_ill_conditioned_hessian_is_factored_with_the_damping_asked_for() -> None:
    """Beyond float32: one direction 1e9 times stronger than the rest. float64 must do it before damping is raised."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))
    values = torch.ones(64, dtype=torch.float64)
    values[0] = 1e9
    hessian = (basis * values) @ basis.T
    factor, damp = factored(hessian, 1e-8)
    assert damp == 1e-8
    damped = hessian + 1e-8 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(factor.double() @ factor.double().T, damped, rtol=1e-5, atol=1e3)


def test_pivots_that_float32_makes_up_are_not_believed() -> None:
    """No pivot can fall below the damping. In float32 they do, by cancellation: then float64 must take over."""
    for seed in range(100):
        x = inputs(1, 12, seed).double()  # float64, because sums in float32 would be indefinite themselves
        factor, damp = factored(x.T @ x, 1e-7)
        assert damp == 1e-7  # which float64 can do
        floor = 1e-7 * float(x.square().mean())
        assert float(factor.diagonal().double().square().min()) >= 0.49 * floor


def test_indefinite_hessian_escalates_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    basis, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    values = torch.ones(16)
    values[3] = -0.05
    hessian = (basis * values) @ basis.T
    with caplog.at_level(logging.WARNING):
        factor, damp = factored(hessian, 0.01)
    assert damp == pytest.approx(0.1)
    assert "damping raised from 0.01 to 0.1" in caplog.text
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(16)
    torch.testing.assert_close(factor @ factor.T, damped, rtol=1e-4, atol=1e-5)
    weight = weights(4, 16)
    tensor, facts = GPTQ().quantize(weight, LayerStats(hessian, 1), parse_layout("int4_g16", 16))
    assert facts["damp"] == pytest.approx(0.1)


def test_hopeless_hessian_is_an_error_and_never_rounds_to_nearest() -> None:
    hopeless = torch.full((8, 8), 100.0).fill_diagonal_(1)
    with pytest.raises(FewbitsError, match="not positive definite even with damping 10"):
        GPTQ().quantize(weights(2, 8), LayerStats(hopeless, 1), parse_layout("int4_g8", 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [(0, 0), (1, 2)])
def test_hessian_that_is_not_finite_is_an_error(bad: float, where: tuple[int, int]) -> None:
    xtx = torch.eye(8)
    xtx[where] = xtx[where[::-1]] = bad
    with pytest.raises(FewbitsError, match="NaN or Inf in the calibration statistics"):
        GPTQ().quantize(weights(2, 8), LayerStats(xtx, 1), parse_layout("int4_g8", 8))


def test_no_statistics_is_an_error() -> None:
    for stats in (None, LayerStats(torch.zeros(8, 8), 0)):
        with pytest.raises(FewbitsError, match="no calibration tokens"):
            GPTQ().quantize(weights(2, 8), stats, parse_layout("int4_g8", 8))


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_that_share_an_input_can_be_stacked() -> None:
    stats = stats_of(inputs(300, 64))
    parts = [weights(rows, 64, seed) for seed, rows in enumerate((32, 16, 80))]
    layout = parse_layout("int3_g32", 64)
    whole, _ = GPTQ().quantize(torch.cat(parts), stats, layout)
    for part, together in zip(parts, whole.split_rows([32, 16, 80])):
        alone, _ = GPTQ().quantize(part, stats, layout)
        assert int((codes_of(alone) != codes_of(together)).any(dim=1).sum()) <= 1
        assert all(torch.equal(alone.segments[0].params[k], v) for k, v in together.segments[0].params.items())


# -- QEP ---------------------------------------------------------------------------------------------------------------


def paired(tokens: int = 600, columns: int = 48) -> tuple[Tensor, Tensor, LayerStats]:
    """Inputs of the partly quantized and of the original model, and their statistics."""
    x = inputs(tokens, columns)
    noise = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(9))
    original = x + 0.3 * x.roll(1, dims=1) + 0.1 * noise
    return x, original, LayerStats(x.T @ x, tokens, (original - x).T @ x)


def test_qep_without_a_difference_changes_nothing() -> None:
    weight, (x, _, _) = weights(24, 48), paired()
    layout = parse_layout("int3_g16", 48)
    same = LayerStats(x.T @ x, len(x), torch.zeros(48, 48))
    plain, _ = GPTQ().quantize(weight, stats_of(x), layout)
    tensor, facts = GPTQ(qep=1).quantize(weight, same, layout)
    assert torch.equal(codes_of(tensor), codes_of(plain)) and facts["qep_shift"] == 0
    ignored, facts = GPTQ(qep=0).quantize(weight, paired()[2], layout)
    assert torch.equal(codes_of(ignored), codes_of(plain)) and "qep_shift" not in facts


def test_qep_target_turns_the_asymmetric_objective_into_the_usual_one() -> None:
    """||Q X - W X~||^2 = ||(Q - W*) X||^2 + what no Q can change (least squares leaves an orthogonal residual)."""
    weight = weights(6, 48)
    x, original = (v.double() for v in paired()[:2])
    stats = LayerStats(x.T @ x, len(x), (original - x).T @ x)
    target = weight.double() + weight.double() @ GPTQ(qep=1, qep_damp=0)._correction(stats)
    expected = torch.linalg.lstsq(x, original @ weight.double().T).solution.T
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-6)
    constants = []
    for seed in range(4):
        q = weights(6, 48, seed + 50).double()
        asymmetric = (x @ q.T - original @ weight.double().T).square().sum()
        constants.append(float(asymmetric - (x @ (q - target).T).square().sum()))
    assert constants == pytest.approx([constants[0]] * 4, rel=1e-4)


def test_qep_lowers_the_asymmetric_objective() -> None:
    weight, (x, original, stats) = weights(48, 48), paired()
    layout = parse_layout("int4_g16", 48)

    def objective(quantizer: GPTQ) -> float:
        tensor, _ = quantizer.quantize(weight, stats, layout)
        return float((x @ tensor.dequantize().T - original @ weight.T).square().sum())

    plain, half, full = (objective(GPTQ(qep=q, qep_damp=0.01)) for q in (0.0, 0.5, 1.0))
    assert full < half < plain and full < 0.8 * plain


def test_qep_damping_shrinks_the_correction() -> None:
    weight, (_, _, stats) = weights(8, 48), paired()
    layout = parse_layout("int4_g16", 48)
    shifts = [GPTQ(qep=1, qep_damp=d).quantize(weight, stats, layout)[1]["qep_shift"] for d in (0.01, 0.1, 1.0, 10.0)]
    assert shifts == sorted(shifts, reverse=True) and shifts[-1] < 0.5 * shifts[0]


def test_qep_keeps_dead_columns_zero() -> None:
    x, original, _ = paired()
    x[:, 7] = 0
    stats = LayerStats(x.T @ x, len(x), (original - x).T @ x)
    tensor, _ = GPTQ(qep=1).quantize(weights(8, 48), stats, parse_layout("int4_g16", 48))
    assert (tensor.dequantize()[:, 7] == 0).all()


def test_rows_in_chunks_give_the_codes_of_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, original = paired()[:2]
    stats = LayerStats(x.T @ x, len(x), (original - x).T @ x)
    whole, facts = GPTQ(qep=0.5).quantize(weights(40, 48), stats, Layout.of(IntFormat(3, 16), 48))
    monkeypatch.setattr("fewbits.quant.quantizers.gptq._CHUNK_WEIGHTS", 48 * 7)
    chunked, same = GPTQ(qep=0.5).quantize(weights(40, 48), stats, Layout.of(IntFormat(3, 16), 48))
    assert same["qep_shift"] == pytest.approx(facts["qep_shift"], rel=1e-5)
    # other shapes of the same products round differently, which may flip a tie
    assert (whole.segments[0].codes != chunked.segments[0].codes).float().mean() <= 1e-3
    for name, value in whole.segments[0].params.items():
        assert torch.equal(value, chunked.segments[0].params[name])

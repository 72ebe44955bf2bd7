"""Sums of x x^T against the plain product, and the tap against inputs known from outside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.calibration.stats import Gram, InputTap

torch.set_num_threads(1)

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 130, 257, 300])
def test_gram_is_the_plain_product(columns: int) -> None:
    parts = [random(rows, columns, seed=rows) for rows in (1, 17, 40)]
    gram = Gram(columns, CPU)
    for x in parts:
        gram.add(x)
    stats, whole = gram.stats(), torch.cat(parts).double()
    assert stats.n_tokens == 58 and stats.cross is None and stats.xtx.dtype == torch.float32
    assert torch.equal(stats.xtx, stats.xtx.T)
    torch.testing.assert_close(stats.xtx.double(), whole.T @ whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", [5, 130])
def test_cross_is_the_plain_product(columns: int) -> None:
    gram = Gram(columns, CPU, cross=True)
    own = [random(n, columns, seed=n) for n in (3, 20)]
    original = [random(n, columns, seed=100 + n) for n in (3, 20)]
    for x, y in zip(own, original):
        gram.add(x, y)
    x, y = torch.cat(own).double(), torch.cat(original).double()
    cross = gram.stats().cross
    assert cross is not None
    torch.testing.assert_close(cross.double(), (y - x).T @ x, rtol=1e-5, atol=1e-4)  # C = (x~ - x) x^T, not C^T
    assert not torch.allclose(cross, cross.T)


def test_float16_overflows_nowhere() -> None:
    x = (random(2000, 70) * 1000).half()
    gram = Gram(70, CPU)
    gram.add(x)
    torch.testing.assert_close(gram.stats().xtx.double(), x.double().T @ x.double(), rtol=1e-4, atol=1e5)


@pytest.mark.parametrize("columns", [3, 130])
def test_bfloat16_is_summed_in_float32(columns: int) -> None:
    """Products may be rounded to bfloat16 (2^-9), sums may not: many small batches lose no more than one."""
    parts = [random(20, columns, seed=i).bfloat16() for i in range(300)]
    gram = Gram(columns, CPU, cross=True)
    for x in parts:
        gram.add(x, 2 * x)
    stats, whole = gram.stats(), torch.cat(parts).double()
    expected = whole.T @ whole
    assert stats.n_tokens == 6000 and stats.xtx.dtype == torch.float32 and stats.cross is not None
    assert (stats.xtx.double() - expected).norm() <= 2**-8 * expected.norm()
    assert (stats.cross.double() - expected).norm() <= 2**-8 * expected.norm()


def test_massive_tokens_do_not_drown_the_others_in_bfloat16() -> None:
    x = random(200, 70)
    x[3] *= 300
    x = x.bfloat16()
    gram = Gram(70, CPU)
    gram.add(x)
    exact, rest = x.double().T @ x.double(), torch.cat([x[:3], x[4:]]).double()
    assert (gram.stats().xtx.double() - exact).norm() <= 2**-6 * (rest.T @ rest).norm()


def test_no_tokens() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gram = Gram(70, CPU)
        gram.add(torch.zeros(0, 70, dtype=dtype))
        assert gram.stats().n_tokens == 0 and not gram.stats().xtx.any()


def test_reading_does_not_disturb_the_sum() -> None:
    gram = Gram(70, CPU)
    x = random(9, 70)
    gram.add(x)
    first = gram.stats().xtx.clone()  # stats() hands over the sum itself, without a second matrix of its size
    assert torch.equal(gram.stats().xtx, first) and torch.equal(first, first.T)
    gram.add(x)
    torch.testing.assert_close(gram.stats().xtx, 2 * first)


# -- the tap -----------------------------------------------------------------------------------------------------------


class Recorder:
    """Collects what the tap reports."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Tensor, Tensor]] = []

    def __call__(self, name: str, x: Tensor, tokens: Tensor) -> None:
        self.seen.append((name, x.clone(), tokens.clone()))


def test_tap_sees_linears_and_transposed_linears() -> None:
    linear, conv, other = nn.Linear(6, 4), Conv1D(3, 4), nn.Linear(6, 6)
    x, record = random(2, 5, 6), Recorder()
    watched = {linear.weight.data_ptr(): "linear", conv.weight.data_ptr(): "conv"}
    with torch.no_grad(), InputTap(watched, record, 10):
        expected = linear(other(x))
        conv(expected)
    assert [name for name, _, _ in record.seen] == ["linear", "conv"]
    with torch.no_grad():
        torch.testing.assert_close(record.seen[0][1], other(x))
    torch.testing.assert_close(record.seen[1][1].view(2, 5, 4), expected)
    assert all(torch.equal(tokens, torch.arange(10)) for _, _, tokens in record.seen)
    linear(x)
    assert len(record.seen) == 2  # nothing is seen outside


def test_tap_changes_no_result() -> None:
    linear, x = nn.Linear(6, 4), random(3, 6)
    with torch.no_grad():
        plain = linear(x)
        with InputTap({linear.weight.data_ptr(): "linear"}, Recorder(), 3):
            assert torch.equal(linear(x), plain)


def routed(weight: Tensor, x: Tensor, rows: list[list[int]]) -> None:
    """Experts as transformers has them: gather the tokens, multiply by the expert's slice of a 3-D parameter."""
    for expert, tokens in enumerate(rows):
        F.linear(x[torch.tensor(tokens, dtype=torch.int64)], weight[expert])


def test_tap_knows_the_tokens_of_experts() -> None:
    weight, x, record = nn.Parameter(random(3, 4, 6)), random(7, 6), Recorder()
    rows = [[0, 3, 6], [6, 5, 4, 3, 2, 1, 0], [2]]  # the second sees every token, in an order of its own
    names = {weight[e].data_ptr(): f"experts.{e}" for e in range(3)}
    with torch.no_grad(), InputTap(names, record, 7, routed=set(names.values())):
        routed(weight, x, rows)
    assert [name for name, _, _ in record.seen] == ["experts.0", "experts.1", "experts.2"]
    for (_, got, tokens), expected in zip(record.seen, rows):
        assert tokens.tolist() == expected and torch.equal(got, x[expected])


def test_tap_on_a_linear_after_experts_sees_every_token_in_order() -> None:
    weight, linear, x, record = nn.Parameter(random(1, 4, 6)), nn.Linear(6, 2), random(3, 6), Recorder()
    watched = {weight[0].data_ptr(): "experts.0", linear.weight.data_ptr(): "shared"}
    with torch.no_grad(), InputTap(watched, record, 3, routed={"experts.0"}):
        routed(weight, x, [[2, 1, 0]])
        linear(x)
    assert [tokens.tolist() for _, _, tokens in record.seen] == [[2, 1, 0], [0, 1, 2]]


def test_tap_does_not_guess() -> None:
    linear, x = nn.Linear(6, 2), random(7, 6)
    tap = InputTap({linear.weight.data_ptr(): "linear"}, Recorder(), 7)
    with pytest.raises(AssertionError, match="cannot tell which tokens"), torch.no_grad(), tap:
        linear(x[:3])

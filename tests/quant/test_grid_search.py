"""The compiled search for scales of tables makes the choices of the one in torch."""

from __future__ import annotations

import pytest
import torch

from fewbits.kernels.cpu import search
from fewbits.quant.formats import parse_format
from fewbits.quant.types import Segment

NAMES = ["nf4_g64", "fp3_g24", "fp4_row", "fpq4_g16", "bitmod3_g128", "bitmod4_g100", "nupes3_g8", "nupes4_g64",
         "mxfp4", "nvfp4"]


@pytest.mark.skipif(not search.has_grid_loss(), reason="no C compiler")
@pytest.mark.parametrize("weighed", ["range", "columns", "weights"])
@pytest.mark.parametrize("name", NAMES)
def test_choices_are_those_of_torch(name: str, weighed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = parse_format(name)
    rows, columns = 12, 4 * (fmt.group_size or 300)
    gen = torch.Generator().manual_seed(columns)
    weight = torch.randn(rows, columns, generator=gen)
    weight[0] = 0
    grouped = weight.view(rows, fmt.groups(columns), -1)
    importance = None
    if weighed != "range":
        importance = torch.rand(grouped.shape[weighed == "columns" :], generator=gen) + 0.01
    calls = []
    real = search.grid_loss
    monkeypatch.setattr(search, "grid_loss", lambda *a: calls.append(1) or real(*a))
    found = fmt.fit(grouped, importance)
    assert calls
    monkeypatch.setattr(search, "has_grid_loss", lambda: False)
    expected = fmt.fit(grouped, importance)
    by = torch.ones_like(grouped) if importance is None else importance.expand_as(grouped)

    def losses(params: dict[str, torch.Tensor]) -> torch.Tensor:
        error = Segment.nearest(fmt, weight, params).dequantize().view_as(grouped) - grouped
        return (by * error.square()).sum(-1).double()

    same = torch.stack([(found[k] == expected[k]).broadcast_to(grouped.shape[:-1]) for k in found]).all(0)
    assert same.float().mean() > 0.95, "not ties alone"
    torch.testing.assert_close(losses(found), losses(expected), rtol=1e-5, atol=1e-12)

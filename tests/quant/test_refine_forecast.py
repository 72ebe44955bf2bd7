"""How long refiners will take: counted in steps and tokens, and told before the work."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fewbits
from fewbits.calibration.stream import StreamedModel
from fewbits.quant.plan import assign
from fewbits.quant.recipe import load_recipe
from fewbits.quant.refiners import REFINERS
from fewbits.quant.refiners.forecast import Pace, pace
from fewbits.quant.source import open_source

NOTHING = Pace(0.0, 0.0, 0.0, 0.0, 0.0, 3)


def counted(what: str, name: str, rows: int = 12, length: int = 10, **options: object) -> float:
    return dataclasses.replace(NOTHING, **{what: 1.0}).of(REFINERS[name](**options), rows, length)


def test_refiners_of_the_whole_model():
    options = {"samples": 8, "held_out": 4, "epochs": 3.0, "batch": 2, "checks": 5}  # 12 steps of 2 rows of 10 tokens
    assert counted("step", "distill", **options) == 12
    assert counted("step", "norms", **options) == 0  # no weight moves
    assert counted("pull", "distill", **options) == 12 * 2 * 10
    assert counted("backward", "distill", **options) == 3 * 12 * 2 * 10
    assert counted("judge", "distill", **options) == 6 * 4 * 10  # before, and at every check
    assert counted("forward", "distill", **options) == 3 * 6 * 4 * 10
    assert counted("step", "distill", **options | {"samples": 100}) == 12, "there are no more rows"
    assert counted("step", "qat", **options, steps=7) == 7


def test_refiners_of_blocks():
    options = {"iterations": 9, "batch": 2, "held_out": 4, "checks": 2}
    assert counted("step", "codebook", **options) == 9
    assert counted("backward", "codebook", **options) == 3 * 9 * 2 * 10
    assert counted("forward", "codebook", **options) == 3 * 3 * 3 * 10
    assert counted("pull", "codebook", **options) == 0


def test_the_original_is_run_once():
    refiners = load_recipe("best-2bit").make_refiners()
    rows = torch.zeros(264, 512)
    own = dataclasses.replace(NOTHING, forward=1.0)
    assert own.of_all(refiners, rows[:128], rows) == own.of(refiners["distill"], 264, 512) + 3 * rows.numel()
    assert own.of_all(load_recipe("gptq").make_refiners(), rows, None) == 0


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2"])
def test_a_trial_leaves_the_model_as_it_was(family, tiny):
    source = open_source(tiny(family))
    recipe = load_recipe("gptq", {"format.group_size": 32})
    streamed = StreamedModel(source, dtype=torch.bfloat16, device=torch.device("cpu"))
    own = pace(streamed, assign(recipe, streamed), 16)
    assert own.blocks == 2 and all(v > 0 for v in dataclasses.astuple(own))
    assert all(p.is_meta and p.grad is None for p in streamed.model.parameters())


def test_it_is_told_before_the_work(tiny, tmp_path):
    text, said, seen = tmp_path / "text.txt", [], []
    text.write_text("a text of some length that is no more than words " * 300)
    report = fewbits.quantize(
        tiny("llama"), tmp_path / "out", recipe="best-2bit", effort="fast", announce=said.append,
        progress=lambda what, done, total: seen.append((what, len(said))),
        overrides={"format.group_size": 32, "calibration.sources": [str(text)], "calibration.samples": 4,
                   "calibration.seqlen": 32, "refine.distill.samples": 8})
    assert len(said) == 1 and said[0].startswith("refining (distill) will take about")
    assert all(told == 1 for what, told in seen if what in ("Quantizing", "Refining: distill"))
    assert report.to_json()["seconds_refining_expected"] > 0

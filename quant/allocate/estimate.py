"""What a run will take: time from a trial of one block on this machine, memory from what is held at once."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import psutil

from fewbits.calibration.collect import HIDDEN_LIMIT_BYTES, PAUSED_LIMIT_BYTES, Collector
from fewbits.calibration.data import CalibrationSet
from fewbits.calibration.stream import BATCH_TOKENS, StreamedModel
from fewbits.quant.plan import Assignment
from fewbits.quant.prepare import HELD_OUT_ROWS
from fewbits.quant.recipe import Recipe
from fewbits.quant.step import quantize_step

_FLOAT = 4
_SWEEP_COPIES = 6  # of a weight in float32 that the quantizer holds: original, target, errors, codes, grid, feedback


@dataclass(frozen=True)
class RunEstimate:
    """Of ``fewbits quantize`` with a plan, KL on held-out rows included.

    Attributes:
        seconds: wall time, from one block and one batch of text.
        peak_memory: bytes of resident memory, the interpreter's own included.
    """

    seconds: float
    peak_memory: int

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def estimate_run(
    streamed: StreamedModel, recipe: Recipe, assignment: Assignment, text: CalibrationSet | None, *, stored: bool
) -> RunEstimate:
    """Time and memory of carrying a plan out.

    Args:
        text: calibration rows, or None where the quantizer needs none.
        stored: statistics are on disk: no pass over the model is needed.
    """
    rows = 0 if text is None else max(1, BATCH_TOKENS // text.tokens.shape[1])
    few = None if text is None else replace(text, tokens=text.tokens[:rows], mask=text.mask[:rows], images=None)
    with _quiet():
        calibrating, quantizing = _trial(streamed, recipe, assignment, few)
    blocks = len(streamed.block_modules)
    batches = 0 if text is None else text.n_rows / rows
    judging = 2 * calibrating * (HELD_OUT_ROWS / rows) if rows else 0.0
    passes = 0.0 if stored else calibrating * batches
    return RunEstimate(blocks * (passes + quantizing + judging), _peak(streamed, recipe, assignment, text))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a trial on too little text warns of is of no concern."""
    logger = logging.getLogger("fewbits.quant.quantizers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _trial(
    streamed: StreamedModel, recipe: Recipe, assignment: Assignment, text: CalibrationSet | None
) -> tuple[float, float]:
    """Seconds that a block takes to be observed on these rows, and to be quantized."""
    quantizer = recipe.make_quantizer()
    needs_stats = quantizer.needs_stats or recipe.sorts_columns
    collector = Collector(streamed, recipe, assignment.layouts, text if needs_stats else None)
    calibrating = quantizing = 0.0
    with contextlib.closing(collector), contextlib.closing(streamed.blocks()) as blocks:
        block = next(blocks)
        for step in collector.steps(block):
            start = time.monotonic()
            stats = collector.observe(block, step)
            observed = time.monotonic()
            made, _ = quantize_step(assignment, quantizer, block, step, stats, seed=0, curvature={})
            collector.install(block, made)
            calibrating += observed - start
            quantizing += time.monotonic() - observed
        start = time.monotonic()
        collector.advance(block)
        calibrating += time.monotonic() - start
    return calibrating, quantizing


def _peak(
    streamed: StreamedModel, recipe: Recipe, assignment: Assignment, text: CalibrationSet | None
) -> int:
    """The larger of two moments: a block being quantized, and both whole models being compared."""
    dense = [math.prod(i.shape) * i.element_size() for i in streamed.model.state_dict().values()]
    block = streamed.block_modules[0]
    weights = sum(math.prod(p.shape) * p.element_size() for p in block.parameters())
    shapes = [t.shape for n, t in streamed.targets.items() if streamed.block_index(n) == 0]
    widest, rows = max((k for _, k in shapes), default=0), max((n for n, _ in shapes), default=0)
    tokens = 0 if text is None else text.n_tokens
    width = streamed.model.get_input_embeddings().weight.shape[1]
    streams = 2 if float(recipe.quantizer.get("qep", 0)) > 0 else 1
    item = streamed.dtype.itemsize
    hidden = min(tokens * width * item * streams, HIDDEN_LIMIT_BYTES)
    paused = tokens * 3 * (rows + width) * item * streams
    open_passes = paused if recipe.calibration.true_sequential and paused <= PAUSED_LIMIT_BYTES else 0
    sweep = 4 * widest**2 * _FLOAT + _SWEEP_COPIES * max((n * k for n, k in shapes), default=0) * _FLOAT
    packed = sum(f["bytes"] for f in assignment.facts(streamed))
    vocabulary = streamed.model.get_input_embeddings().weight.shape[0]
    logits = 0 if text is None else 3 * text.tokens.shape[1] * vocabulary * _FLOAT
    own = psutil.Process().memory_info().rss
    return own + max(hidden + open_passes + streams * 2 * weights + sweep, sum(dense) + packed + logits)

"""The main job: a checkpoint goes in, a packed low-bit checkpoint comes out.

``quantize`` is the whole of it; ``_quantize_blocks`` is the loop, on one screen.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewbits.calibration.collect import Collector, require_consistent
from fewbits.calibration.curvature import CURVATURE_ROWS, output_curvature
from fewbits.calibration.data import CalibrationSet
from fewbits.calibration.stored import StoredStats
from fewbits.calibration.stream import StreamedModel
from fewbits.calibration.survey import dense_model, text_rows
from fewbits.eval.models import choose_device
from fewbits.eval.speed import peak_rss_bytes
from fewbits.quant.allocate.menu import require_readable
from fewbits.quant.allocate.planning import Planner, read_plan
from fewbits.quant.card import CARD, write_card
from fewbits.quant.checkpoint import CheckpointWriter, RunFolder, disk_errors, file_sizes
from fewbits.quant.errors import CheckpointError, QualityGateError, RecipeError
from fewbits.quant.manifest import checkpoint_files, run_identity, stats_identity
from fewbits.quant.plan import Assignment, assign, tensor_fact, totals
from fewbits.quant.prepare import load_text
from fewbits.quant.quantizers.rtn import RTN
from fewbits.quant.recipe import Recipe, load_recipe
from fewbits.quant.refiners.block import BlockRefiner
from fewbits.quant.refiners.distill import Distill
from fewbits.quant.refiners.forecast import pace
from fewbits.quant.refiners.run import of_blocks, refine_in_block, refine_model, require_shares
from fewbits.quant.refiners.team import Team
from fewbits.quant.source import Source, check_finite, open_source, require_dense
from fewbits.quant.step import quantize_step
from fewbits.quant.targets import find_targets
from fewbits.quant.types import QuantizedTensor, Quantizer

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: called when a unit of work is finished."""

@dataclass
class QuantizeReport:
    """What a run made and what it cost. ``to_json`` has the keys of ``fewbits quantize --json``.

    Attributes:
        bits_per_weight: over all linears of the decoder blocks, from stored bytes (a dense one counts its own).
        bits_per_weight_total: over everything stored, embeddings and head included.
        bytes: size of the weight files.
        measured: KL to the original on held-out text (``kl_mean``, ``kl_stderr``, nats per token), where asked for.
        seconds_refining_expected: what a trial before the run made of it; None without refiners.
        worst: the five tensors with the largest relative proxy loss, before any refiner.
        refined: what each refiner did: loss on held-out rows before and after, seconds, and the curve.
        warnings: what the calibration lint found.
    """

    output: str
    seconds: float = 0.0
    seconds_calibration: float = 0.0
    seconds_quantization: float = 0.0
    seconds_refining: float = 0.0
    seconds_refining_expected: float | None = None
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0
    bits_per_weight: float = 0.0
    bits_per_weight_total: float = 0.0
    bytes: int = 0
    predicted: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    worst: list[str] = field(default_factory=list)
    refined: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass
class _Clock:
    """Seconds of each part of a run, and of each refiner of blocks."""

    calibration: float = 0.0
    quantization: float = 0.0
    refining: float = 0.0
    refiners: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timing(self, part: Literal["calibration", "quantization", "refining"]) -> Iterator[None]:
        start = time.monotonic()
        yield
        setattr(self, part, getattr(self, part) + time.monotonic() - start)


@dataclass(frozen=True)
class _Job:
    """What every step of a run needs."""

    streamed: StreamedModel
    assignment: Assignment
    quantizer: Quantizer
    writer: CheckpointWriter
    seed: int
    clock: _Clock
    curvature: Mapping[str, Tensor]
    refiners: Mapping[str, BlockRefiner]


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = "gptq",
    overrides: Mapping[str, Any] | None = None,
    stats: str | Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    max_kl: float | None = None,
    plan: str | Path | None = None,
    measured: Sequence[tuple[float, float]] = (),
    effort: str | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    team: Team | None = None,
) -> QuantizeReport:
    """Quantize a model and write a fewbits checkpoint.

    Args:
        model: a Hugging Face id, a directory of safetensors, or a GGUF file.
        out: directory to write; must be empty unless ``resume`` or ``force``.
        recipe: a shipped recipe's name, a TOML file, or a Recipe.
        overrides: dotted recipe keys to change, e.g. ``{"format.bits": 3, "calibration.samples": 64}``.
        stats: directory of calibration statistics: reused if it holds those of this model and text, else written.
            Statistics are then those of the original model (``calibration.inputs = "original"``).
        device: where to compute, e.g. ``cpu`` or ``cuda:0``; default the first GPU, else the CPU.
        threads: CPU threads (default: torch's own choice).
        seed: of everything that draws.
        resume: continue the interrupted run in ``out``; gives the bytes that an uninterrupted run gives.
        force: overwrite what an earlier run left in ``out``.
        max_kl: quality gate: nats per token to the original on held-out calibration text.
        plan: a plan file to carry out, in place of what the recipe's budget would lead to.
        measured: ``(damage, measured KL)`` of earlier runs on this model, which sharpen the prediction.
        effort: fast, normal or best: what the recipe's refiners may spend; None: what the recipe says.
        progress: called as work is done.
        announce: called with a line to tell the user before the work, e.g. how long refiners will take.
        team: processes that were launched together; they share the work of refiners of the whole model. The first of
            them does everything else, and the report of the others is empty.

    Raises:
        FewbitsError: anything that is wrong with the input (see ``fewbits.quant.errors``).
        QualityGateError: the gate was missed; the checkpoint is written nevertheless.
    """
    started, cpu_started = time.monotonic(), time.process_time()
    _tame_malloc()
    if threads:
        torch.set_num_threads(threads)
    team = team or Team()
    device = team.device or device or ("cuda" if torch.cuda.is_available() else "cpu")
    progress = progress or (lambda what, done, total: None)
    if not isinstance(recipe, Recipe):
        forced = {"calibration.inputs": "original", "calibration.true_sequential": False} if stats else {}
        recipe = load_recipe(recipe, {**(overrides or {}), **forced})
    if effort is not None:
        recipe = recipe.with_effort(effort)
    source = open_source(model)
    require_dense(source)
    quantizer, refiners = recipe.make_quantizer(), recipe.make_refiners()
    require_consistent(recipe)
    _check_arguments(source, Path(out), seed, max_kl)
    recipe = recipe.for_device(where := choose_device(device))
    streamed = StreamedModel(source, dtype=getattr(torch, recipe.calibration.dtype), device=where)
    if plan is not None:
        recipe = read_plan(Path(plan), recipe, streamed)
    if recipe.needs_plan and team.size > 1:
        raise RecipeError(f"budget: {team.size} processes do not plan together; make a plan with 'fewbits plan' first, "
                          "and name formats here")
    planner = Planner(streamed, recipe, seed=seed, progress=progress) if recipe.needs_plan else None
    judged = max_kl is not None or bool(recipe.budget.given)
    text = held_out = tuning = None
    needs_stats = quantizer.needs_stats or recipe.sorts_columns
    if needs_stats or judged or refiners or (planner and planner.needs_text):
        text, held_out = load_text(recipe, streamed, seed, held_out=judged)
        tuning = text.tuning
    run = run_identity(source, recipe, text if needs_stats else None, seed=seed, device=device, tuning=tuning)
    if team.size > 1:  # each has rows of its own, so that their number decides the order of all rows
        run["processes"] = team.size
    kept = StoredStats(Path(stats), stats_identity(source, recipe, text)) if stats and text else None
    if planner is not None:
        known = _known_allocation(Path(out), run) if resume else None
        run["allocation"] = known or planner.allocation(text, kept, measured)
        recipe = recipe.model_copy(update={"plan": run["allocation"]["formats"]})
    assignment = assign(recipe, streamed)
    require_readable(assignment.layouts, recipe.allocate)
    over_all = {n: r for n, r in refiners.items() if isinstance(r, Distill)}
    rows = [] if tuning is None else text_rows(tuning, tuning.n_rows)
    require_shares(over_all, len(rows), team)
    refine = partial(refine_model, streamed, assignment, refiners=over_all, rows=rows, seed=seed, progress=progress,
                     team=team)
    if not team.first:
        if over_all:
            refine(folder=RunFolder(Path(out), len(streamed.block_modules) + 1))
        return QuantizeReport(output=str(out))
    stored = kept if needs_stats else None
    writer = CheckpointWriter(
        Path(out), len(streamed.block_modules) + 1, run, resume=resume, force=force,
        need_bytes=sum(file_sizes(assignment.shards(streamed))),
    )
    clock = _Clock()
    report = QuantizeReport(
        output=str(out), warnings=[] if text is None else list(text.warnings),
        predicted=run["allocation"]["predicted"] if planner else None,
    )
    if refiners and text is not None:
        own = pace(streamed, assignment, text.tokens.shape[1])
        seconds = own.of_all(refiners, text.tokens, None if tuning is None else tuning.tokens) / team.size
        report.seconds_refining_expected = seconds
        if announce is not None:
            announce(f"refining ({', '.join(refiners)}) will take about {seconds / 60:.1f} min on this machine, beside "
                     "the time to quantize")
    try:
        with clock.timing("calibration"):
            curvature = _curvature(streamed, recipe, assignment, text, seed, progress)
        in_blocks = {n: r for n, r in refiners.items() if isinstance(r, BlockRefiner)}
        job = _Job(streamed, assignment, quantizer, writer, seed, clock, curvature, in_blocks)
        with clock.timing("calibration"):
            collector = Collector(
                streamed, recipe, assignment.layouts, text if needs_stats or in_blocks else None, stored,
                reference=bool(in_blocks),
            )
        with contextlib.closing(collector):
            _quantize_blocks(job, collector, progress)
            _write_rest(job, collector)
        progress("Quantizing", writer.total, writer.total)
        made = of_blocks(in_blocks, writer, clock.refiners)
        if over_all:
            with clock.timing("refining"):
                made += refine(folder=writer)
        report.refined = [r.to_json() for r in made]
        report.warnings += [r.warning for r in made if r.warning]
        if stored:
            stored.finish()
        facts = [f for i in range(writer.total) for f in writer.facts(i)]
        files = checkpoint_files(source, recipe, assignment, facts, run, writer.hashes(), report.refined)
        report.bytes = writer.finish(files, source.extra_files(), source.path)
    finally:
        writer.close()
    report.warnings += collector.warnings
    report.bits_per_weight, report.bits_per_weight_total = totals(facts)
    report.worst = [f["name"] for f in sorted(facts, key=lambda f: -f.get("relative_loss", 0))[:5]]
    report.seconds_calibration, report.seconds_quantization = clock.calibration, clock.quantization
    report.seconds_refining = clock.refining
    try:
        if judged:
            _judge(report, source, held_out, max_kl, device, progress)
    finally:  # a missed gate is told of, and reports what the run cost too
        with disk_errors(Path(out)):
            write_card(Path(out), Path(out), measured=report.measured, base_card=source.path / CARD)
        report.seconds = time.monotonic() - started
        report.cpu_seconds = time.process_time() - cpu_started
        report.peak_rss_bytes = peak_rss_bytes()
    return report


def _check_arguments(source: Source, out: Path, seed: int, max_kl: float | None) -> None:
    if out.resolve() == source.path:
        raise CheckpointError(f"{out}: is the model itself, which is never written to; choose another output")
    if not -(2**62) <= seed < 2**62:
        raise RecipeError(f"--seed: got {seed}, needed an integer of at most 62 bits")
    if max_kl is not None and not max_kl >= 0:  # NaN would let everything pass
        raise RecipeError(f"--max-kl: got {max_kl}, needed a number of nats per token, 0 or more")


def _curvature(
    streamed: StreamedModel, recipe: Recipe, assignment: Assignment, text: CalibrationSet | None, seed: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """Of the outputs of the linears that have a term of low rank, where that is weighed by it."""
    wanted = {name for name, layout in assignment.layouts.items() if layout.low_rank}
    if recipe.format.row_weights == "none" or text is None or not wanted:
        return {}
    model = dense_model(streamed, streamed.dtype)
    targets = [t for t in find_targets(model) if t.name in wanted]
    return output_curvature(model, targets, text_rows(text, CURVATURE_ROWS), seed=seed, progress=progress)


def _quantize_blocks(job: _Job, collector: Collector, progress: Progress) -> None:
    """For each decoder block: statistics of its inputs, codes, a shard; then its outputs feed the next block."""
    if not collector.keeps and all(map(job.writer.has, range(job.writer.total))):
        return  # the run that this one resumes was stopped later: no output is needed
    for block in job.streamed.blocks():
        shard = block.index + 1
        if job.writer.has(shard):  # made by the interrupted run that this one resumes
            if collector.keeps:  # the directory of statistics is to hold those of every block
                for step in collector.steps(block):
                    collector.observe(block, step)
            collector.install(block, job.assignment.unpack([t.name for t in block.targets], job.writer.read(shard)))
        else:
            tensors: dict[str, QuantizedTensor] = {}
            facts: list[dict[str, Any]] = []
            for step in collector.steps(block):
                with job.clock.timing("calibration"):
                    stats = collector.observe(block, step)
                with job.clock.timing("quantization"):
                    made, made_facts = quantize_step(job.assignment, job.quantizer, block, step, stats, seed=job.seed,
                                                     curvature=job.curvature)
                collector.install(block, made)
                tensors |= made
                facts += made_facts
            if job.refiners:
                with job.clock.timing("refining"):
                    tensors = refine_in_block(job.refiners, block, collector, tensors, facts, seed=job.seed,
                                              spent=job.clock.refiners)
            dense, dense_facts = job.assignment.dense(job.streamed, block)
            job.writer.write(shard, job.assignment.pack(tensors) | dense, facts + dense_facts)
        with job.clock.timing("calibration"):
            collector.advance(block)
        _return_memory()
        progress("Quantizing", shard, job.writer.total)


_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # mallopt's names for them
_LARGE_BYTES = 1 << 20


def _tame_malloc() -> None:
    """Let freed memory be found again: glibc gives every thread a heap of its own, and keeps what is freed in each.

    Large tensors get mappings of their own, which go when they are freed; glibc would stop that
    after the first.
    """
    with contextlib.suppress(AttributeError, OSError):  # another libc has no such calls, and no such habit
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _return_memory() -> None:
    """Give freed memory back to the system, where it lies between what is in use."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _write_rest(job: _Job, collector: Collector) -> None:
    """What lies outside the decoder blocks: embeddings, final norm, head, quantized only where the recipe says so."""
    if job.writer.has(0):
        if collector.keeps:
            collector.observe_head()
        return
    tensors: dict[str, QuantizedTensor] = {}
    facts = []
    with job.clock.timing("calibration"):
        needs = [layout.permuted or (job.quantizer.needs_stats and job.assignment.is_multiplied(t))
                 for t, layout in job.assignment.outside()]
        head = collector.observe_head() if any(needs) or collector.keeps else None
    for target, layout in job.assignment.outside():
        weight = job.streamed.weight(target)
        check_finite(target.name, weight)
        weight = weight.float()
        multiplied = job.assignment.is_multiplied(target)
        how: Quantizer = job.quantizer if multiplied else RTN("search")  # what is looked up has no input statistics
        own = head if multiplied and (how.needs_stats or layout.permuted) else None
        with job.clock.timing("quantization"):
            tensors[target.name], extra = how.quantize(weight, own, layout, seed=job.seed)
        facts.append(tensor_fact(target.name, weight, tensors[target.name], own, extra, linear=False))
    dense, dense_facts = job.assignment.dense(job.streamed, None)
    job.writer.write(0, job.assignment.pack(tensors) | dense, facts + dense_facts)


def _known_allocation(out: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The allocation that the unfinished run in ``out`` was made with, if it is of this very run."""
    before = CheckpointWriter.unfinished_run(out)
    if before is None or any(before.get(key) != json.loads(json.dumps(value)) for key, value in run.items()):
        return None
    return before.get("allocation")


def _judge(
    report: QuantizeReport, source: Source, held_out: list[Tensor] | None, max_kl: float | None, device: str,
    progress: Progress,
) -> None:
    """Measure KL to the original on held-out rows. Raises QualityGateError when it exceeds ``max_kl``.

    The rows are of text alone, also of a model that takes images: its language model is what was quantized.
    """
    from fewbits.eval.divergence import divergence
    from fewbits.serving.transformers import load

    assert held_out is not None
    result = divergence(
        load(report.output, device=device), load(source.path, device=device), held_out, progress=progress
    )
    report.measured = {"kl_mean": result.kl_mean, "kl_stderr": result.kl_stderr}
    if report.predicted is not None:
        low, high = report.predicted["band"]
        report.measured["in_band"] = low <= result.kl_mean <= high
    if max_kl is not None and result.kl_mean > max_kl:
        raise QualityGateError(
            f"--max-kl: got {result.kl_mean:.4f} nats per token (+- {result.kl_stderr:.4f}), needed at most {max_kl}; "
            f"worst tensors: {', '.join(report.worst)}; give more bits, or keep these", report
        )

"""Statistics for one block at a time: which passes to run, what to sum, and how hidden states move on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbits.calibration.block import Block, Call
from fewbits.calibration.data import CalibrationSet
from fewbits.calibration.hidden import HIDDEN_LIMIT_BYTES, HiddenStates
from fewbits.calibration.lint import lint_experts, lint_tokens
from fewbits.calibration.lockstep import Closed, PausedPass
from fewbits.calibration.stats import Gram
from fewbits.calibration.stored import StoredStats
from fewbits.calibration.stream import BATCH_TOKENS, Inputs, StreamedModel
from fewbits.quant.errors import CalibrationError
from fewbits.quant.recipe import Recipe
from fewbits.quant.targets import Target
from fewbits.quant.types import LayerStats, QuantizedTensor

log = logging.getLogger(__name__)

PAUSED_LIMIT_BYTES = 4 << 30
"""Activations of passes kept open; beyond this each step of a block runs it anew. Changes no number."""


def make_batches(tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """Rows of token ids in batches ``(B, L)``. A padded row runs alone, cut to its length: padding never enters."""
    length = tokens.shape[1]
    lengths = mask.sum(1).tolist()
    whole = tokens[[i for i, n in enumerate(lengths) if n == length]]
    size = max(1, BATCH_TOKENS // length)
    batches = [whole[i : i + size] for i in range(0, len(whole), size)]
    return batches + [tokens[i : i + 1, mask[i]] for i, n in enumerate(lengths) if 0 < n < length]


def model_inputs(text: CalibrationSet) -> Iterator[Inputs]:
    """What the model is called with for each batch of calibration rows: text first, then images one by one.

    An image is made into pixels when its turn comes, so one is in memory at a time.
    """
    yield from make_batches(text.tokens, text.mask)
    for i in range(len(text.images) if text.images else 0):
        assert text.images is not None
        yield text.images.inputs(i)


def require_consistent(recipe: Recipe) -> None:
    """Raise CalibrationError for settings that contradict each other."""
    want = recipe.calibration
    if want.inputs == "original" and (want.true_sequential or float(recipe.quantizer.get("qep", 0)) > 0):
        raise CalibrationError(
            "calibration.inputs: 'original' goes with neither true_sequential nor qep, which need the inputs that "
            "the quantized blocks produce; set calibration.inputs = 'quantized' (and do not keep statistics)"
        )


@dataclass(frozen=True)
class Lesson:
    """What a block is tuned on, batch by batch.

    Attributes:
        inputs: hidden states ``(B, L, d)`` that the quantized blocks before it give.
        targets: what the original block gives on the original's own inputs.
        calls: what the block is called with beside them.
        weights: the original weights ``(N, K)`` of the block's targets.
    """

    inputs: HiddenStates
    targets: HiddenStates
    calls: list[Call]
    weights: dict[str, Tensor]


class Collector:
    """Feeds calibration text through the blocks and gathers what the quantizer needs.

    Args:
        wanted: names of the targets that will be quantized.
        text: calibration rows, or None when the quantizer needs no statistics.
        stored: statistics of the original model kept on disk for several recipes, or None.
        reference: whether to follow the original model too, for what its blocks give on its own inputs.

    Raises:
        CalibrationError: settings that contradict each other.
    """

    def __init__(
        self, streamed: StreamedModel, recipe: Recipe, wanted: Iterable[str], text: CalibrationSet | None,
        stored: StoredStats | None = None, *, reference: bool = False,
    ) -> None:
        require_consistent(recipe)
        self.streamed, self.settings, self.wanted = streamed, recipe.calibration, set(wanted)
        self._seen: list[tuple[Target, int]] = []
        self._tokens = 0 if text is None else text.n_tokens
        self._stored = stored
        self._qep = float(recipe.quantizer.get("qep", 0)) > 0
        self._sequential = self.settings.inputs == "quantized"
        self.runs = text is not None and not (stored and stored.complete)
        self.keeps = self.runs and stored is not None
        self._moved = -1
        self._paused: list[tuple[PausedPass, PausedPass | None]] | None = None
        self._twin: tuple[int, nn.Module] | None = None
        self._taught: HiddenStates | None = None
        self._original = self._reference = None
        if not self.runs:
            return
        assert text is not None
        with streamed.outer():
            hidden, self._calls = streamed.first_inputs(model_inputs(text))
        self._hidden = HiddenStates(hidden, HIDDEN_LIMIT_BYTES, None)
        self._original = HiddenStates(hidden, HIDDEN_LIMIT_BYTES, None) if self._qep else None
        self._reference = HiddenStates(hidden, HIDDEN_LIMIT_BYTES, None) if reference else None
        if self._hidden.spilled:
            log.info("hidden states exceed %d MB and are kept on disk", HIDDEN_LIMIT_BYTES >> 20)

    # -- what is quantized together --------------------------------------------------------------------------------

    def steps(self, block: Block) -> list[list[list[str]]]:
        """Groups of targets that read one input, in the steps in which they are quantized."""
        if self.runs:
            groups = block.shared_inputs(self._hidden[0], self._call(0, block))
        elif self._stored:
            groups = self._stored.groups(block.index, self.wanted & {t.name for t in block.targets})
        else:
            groups = [[t.name] for t in block.targets]
        groups = [g for g in groups if self.wanted & set(g)]
        if not self.settings.true_sequential:
            return [groups] if groups else []
        steps: dict[str, list[list[str]]] = {}
        experts = {t.name for t in block.targets if t.kind == "expert"}
        for group in groups:  # the experts of a layer go together
            first = group[0]
            steps.setdefault(first.rpartition(".")[0] if first in experts else first, []).append(group)
        return list(steps.values())

    # -- statistics ------------------------------------------------------------------------------------------------

    def observe(self, block: Block, step: list[list[str]]) -> dict[str, LayerStats]:
        """Statistics for each group of a step, under the name of its first target."""
        kinds = {t.name: t for t in block.targets}
        if self.runs:
            device = self.streamed.device
            grams = {
                g[0]: Gram(kinds[g[0]].shape[1], device, cross=self._qep and kinds[g[0]].kind != "expert") for g in step
            }
            self._gather(block, step, grams)
            stats = {name: grams.pop(name).stats() for name in list(grams)}
            if self._stored:
                self._stored.write(block.index, step, stats)
        elif self._stored:
            stats = self._stored.read(block.index)
        else:
            return {}
        self._seen += [(kinds[name], s.n_tokens) for name, s in stats.items()]
        return _pool_starved(stats, kinds)

    def _gather(self, block: Block, step: list[list[str]], grams: dict[str, Gram]) -> None:
        """Fill the sums, one batch after another."""
        if self._one_pass(block):
            if self._paused is None:
                self._paused = self._open_passes(block)
            ((name, *_),) = step  # a step of several groups has experts, and those take the other way
            for i, (own, original) in enumerate(self._paused):
                x = self._rows(i, *own.next_input())
                reference = None if original is None else self._rows(i, *original.next_input())
                grams[name].add(x, reference)
        else:
            self._run_anew(block, grams)

    def _one_pass(self, block: Block) -> bool:
        """Whether to keep every batch's pass open from step to step: if they fit in memory. Changes no number."""
        if not self.settings.true_sequential or any(t.kind == "expert" for t in block.targets):
            return False
        tokens = sum(shape[0] * shape[1] for shape in self._hidden.shapes)
        widest = max(t.shape[0] for t in block.targets)
        live = tokens * (3 * widest + 3 * self._hidden.shapes[0][-1]) * self._hidden.dtype.itemsize
        return live * (2 if self._qep else 1) <= PAUSED_LIMIT_BYTES

    def _open_passes(self, block: Block) -> list[tuple[PausedPass, PausedPass | None]]:
        """For every batch a pass that stops in front of each step's linear, and with QEP one in the original block."""
        stops = {group[0] for step in self.steps(block) for group in step}
        twin = self._twin_of(block)

        def open_pass(states: HiddenStates, i: int, module: nn.Module | None) -> PausedPass:
            return PausedPass(lambda see: block.watch(states[i], self._call(i, block), see, module), stops)

        return [
            (open_pass(self._hidden, i, None),
             None if self._original is None else open_pass(self._original, i, twin))
            for i in range(len(self._hidden))
        ]

    def _rows(self, batch: int, x: Tensor, tokens: Tensor) -> Tensor:
        """Inputs ``(T, K)`` of the tokens that count."""
        x = x.reshape(-1, x.shape[-1])
        skip, length = self.settings.skip_tokens, self._hidden.shapes[batch][1]
        return x[(tokens % length) >= skip] if skip else x

    def _run_anew(self, block: Block, grams: dict[str, Gram]) -> None:
        """A pass over all batches from the block's start. Outputs are kept where they are what the next block reads."""
        experts = any(t.kind == "expert" for t in block.targets)
        stop_early = self._sequential and not experts  # the output is not needed: stop at the last input that is
        for i in range(len(self._hidden)):
            reference: dict[str, Tensor] = {}
            left = set(grams)

            def keep(name: str, x: Tensor, tokens: Tensor, i: int = i, into: dict = reference) -> None:
                if name in grams and grams[name].cross is not None:
                    into[name] = self._rows(i, x, tokens)

            def add(
                name: str, x: Tensor, tokens: Tensor, i: int = i, given: dict = reference, left: set = left
            ) -> None:
                if name in grams:
                    grams[name].add(self._rows(i, x, tokens), given.get(name))
                    left.discard(name)
                    if stop_early and not left:
                        raise Closed

            if self._original is not None:
                block.watch(self._original[i], self._call(i, block), keep, self._twin_of(block))
            with contextlib.suppress(Closed):
                out = block.watch(self._hidden[i], self._call(i, block), add)
                if not self._sequential:
                    self._hidden[i] = out
                    self._moved = block.index

    @property
    def warnings(self) -> list[str]:
        """What the lint finds in the statistics gathered so far: too few tokens, starved experts by name."""
        plain = {t.name: t.shape[1] for t, _ in self._seen if t.kind != "expert"}
        experts = {t.name: n for t, n in self._seen if t.kind == "expert"}
        widths = {t.name: t.shape[1] for t, _ in self._seen}
        fewest = min((n for t, n in self._seen if t.kind != "expert"), default=0)
        return lint_tokens(fewest, plain) + lint_experts(experts, self._tokens, widths=widths)

    # -- moving on -------------------------------------------------------------------------------------------------

    def install(self, block: Block, tensors: Mapping[str, QuantizedTensor]) -> None:
        """Let the block compute with quantized weights, where later statistics are to see them."""
        if not self.runs or not self._sequential:
            return
        self._twin_of(block)  # must be taken while the block is still the original
        for name, tensor in tensors.items():
            block.install(name, tensor.dequantize())

    def lesson(self, block: Block) -> Lesson:
        """What the quantized block reads, and what the original one gives on inputs of its own."""
        assert self._reference is not None
        self.close()  # passes that are open have gone through weights that will change
        calls = [self._call(i, block) for i in range(len(self._hidden))]
        twin = self._twin_of(block)
        assert twin is not None
        weights = {  # those of the block are overwritten where they need no cast; then those of the twin are as exact
            name: own if own.dtype == block.weights[name].dtype else block.weights[name]
            for name, own in block.weights_of(twin).items()
        }
        return Lesson(self._hidden, self._targets(block), calls, weights)

    def _targets(self, block: Block) -> HiddenStates:
        assert self._reference is not None
        if self._taught is None:
            twin = self._twin_of(block)
            out = [block.run(self._reference[i], self._call(i, block), twin) for i in range(len(self._reference))]
            self._taught = HiddenStates(out, HIDDEN_LIMIT_BYTES, None)
        return self._taught

    def advance(self, block: Block) -> None:
        """Move the hidden states past a block."""
        if self._reference is not None:
            self._reference, self._taught = self._targets(block), None
        if not self.runs or self._moved == block.index:
            return
        twin = self._twin_of(block)
        for i in range(len(self._hidden)):
            own, original = self._paused[i] if self._paused else (None, None)
            self._hidden[i] = own.finish() if own else block.run(self._hidden[i], self._call(i, block))
            if self._original is not None:
                self._original[i] = (
                    original.finish() if original else block.run(self._original[i], self._call(i, block), twin)
                )
        self._twin = self._paused = None

    def close(self) -> None:
        """Abandon passes that an error left open."""
        for passes in self._paused or []:
            for each in filter(None, passes):
                each.close()
        self._paused = None

    def _twin_of(self, block: Block) -> nn.Module | None:
        """The block with its original weights, kept beside the quantized one for QEP."""
        if self._original is None and self._reference is None:
            return None
        if self._twin is None or self._twin[0] != block.index:
            self._twin = block.index, block.original()
        return self._twin[1]

    def _call(self, batch: int, block: Block) -> Call:
        return self._calls[batch][block.index]

    def observe_head(self) -> LayerStats | None:
        """Statistics of the output head's input, after all blocks; None where nothing is observed."""
        if not self.runs:
            return self._stored.read_head() if self._stored else None
        head = self.streamed.model.get_output_embeddings()
        gram = Gram(head.weight.shape[1], self.streamed.device)
        with self.streamed.outer(head=True):
            for i in range(len(self._hidden)):
                x = self.streamed.head_input(self._hidden[i])
                gram.add(x[:, self.settings.skip_tokens :].reshape(-1, x.shape[-1]))
        stats = gram.stats()
        if self._stored:
            self._stored.write_head(stats)
        return stats


def _pool_starved(stats: dict[str, LayerStats], kinds: Mapping[str, Target]) -> dict[str, LayerStats]:
    """Experts that saw fewer tokens than they have columns get the sums over all experts of the layer.

    Their own Hessian would be singular; that of the layer has the same inputs, weighted by how the router spreads them.
    The lint has named them by then.
    """
    out = dict(stats)
    layers: dict[str, list[str]] = {}
    for name in stats:
        if kinds[name].kind == "expert":
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    for names in layers.values():
        starved = [n for n in names if stats[n].n_tokens < kinds[n].shape[1]]
        if starved:
            pooled = LayerStats(torch.zeros_like(stats[names[0]].xtx), 0)
            for n in names:
                pooled = pooled + stats[n]
            out.update(dict.fromkeys(starved, pooled))
    return out



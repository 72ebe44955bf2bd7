"""What a damage model works from: the model, the menu, and passes over calibration text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fewbits
from fewbits.calibration.block import Block
from fewbits.calibration.collect import Collector
from fewbits.calibration.data import CalibrationSet
from fewbits.calibration.feedback import column_shares
from fewbits.calibration.findings import Findings
from fewbits.calibration.stored import StoredStats
from fewbits.calibration.stream import StreamedModel, one_expert_at_a_time
from fewbits.quant.quantizers.rtn import RTN
from fewbits.quant.recipe import Recipe
from fewbits.quant.types import LayerStats, Layout, QuantizedTensor, Quantizer

Progress = Callable[[str, int, int], None]

Losses = dict[str, dict[str, float]]
"""Tensor name -> entry of the menu -> damage."""


@dataclass
class Survey:
    """What a damage model works from.

    Attributes:
        menu: layouts to judge, by tensor of the decoder blocks and entry.
        text: calibration rows; None only for models that look at weights alone.
        stored: statistics of the original model on disk: read if they are complete, else written.
        ends: formats to judge for embedding and head, where they have a choice.
    """

    streamed: StreamedModel
    recipe: Recipe
    menu: Mapping[str, Mapping[str, Layout]]
    text: CalibrationSet | None
    stored: StoredStats | None
    seed: int
    progress: Progress
    ends: Mapping[str, Mapping[str, Layout]] = field(default_factory=dict)
    _groups: list[list[str]] = field(default_factory=list)
    _head: LayerStats | None = None
    _shares: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.findings = Findings(self.stored.folder if self.stored else None, {
            "fewbits": fewbits.__version__, "seed": self.seed, "quantizer": self.recipe.quantizer,
            "threads": torch.get_num_threads(), "device": str(self.streamed.device),
        })

    def blocks(self) -> Iterator[tuple[Block, dict[str, LayerStats]]]:
        """Each block with the statistics of the original model's inputs, by target (shared ones are one object)."""
        settings = self.recipe.calibration.model_copy(update={"inputs": "original", "true_sequential": False})
        recipe = self.recipe.model_copy(update={"calibration": settings, "quantizer": {"name": "gptq", "qep": 0.0}})
        collector = Collector(self.streamed, recipe, self.menu, self.text, self.stored)
        self._groups = []
        total = len(self.streamed.block_modules)
        with contextlib.closing(collector):
            for block in self.streamed.blocks():
                stats: dict[str, LayerStats] = {}
                for step in collector.steps(block):
                    own = collector.observe(block, step)
                    for group in step:
                        stats |= dict.fromkeys(group, own[group[0]])
                        self._groups.append(group)
                        self._share_out(group, own[group[0]])
                yield block, stats
                collector.advance(block)
                self.progress("Surveying", block.index + 1, total)
            if self.ends or collector.keeps:
                self._head = collector.observe_head()
        if self.stored:
            self.stored.finish()

    def quantized(self, wanted: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, str, QuantizedTensor]]:
        """``(tensor, entry, codes)`` for each wanted entry of each tensor, all else being the original."""
        quantizer = self.recipe.make_quantizer()
        known = self._head is not None and not self.menu.keys() & wanted.keys()  # by an earlier pass: none is needed
        for block, stats in () if known else self.blocks():
            for name in sorted(stats.keys() & wanted.keys()):
                yield from self._entries(quantizer, name, block.weights[name], stats[name], wanted[name])
        for name in [n for n in self.ends if n in wanted]:
            target = self.streamed.targets[name]
            weight = self.streamed.weight(target).float()
            if target.kind == "embedding" and not self.streamed.is_tied(target):  # looked up, never multiplied
                yield from self._entries(RTN("search"), name, weight, None, wanted[name])
            else:
                yield from self._entries(quantizer, name, weight, self._head, wanted[name])

    def _entries(
        self, quantizer: Quantizer, name: str, weight: Tensor, stats: LayerStats | None, entries: Iterable[str]
    ) -> Iterator[tuple[str, str, QuantizedTensor]]:
        for entry in entries:
            made, _ = quantizer.quantize(weight, stats, self.layout(name, entry), seed=self.seed)
            yield name, entry, made

    def layout(self, name: str, entry: str) -> Layout:
        """What an entry of the menu means for a tensor."""
        return (self.menu.get(name) or self.ends[name])[entry]

    def groups(self) -> list[list[str]]:
        """Targets that read one input, as the last pass saw them; or a short pass over a few tokens, to see them."""
        if not self._groups:
            ids = torch.arange(8)[None]
            with self.streamed.outer():
                (hidden,), (calls,) = self.streamed.first_inputs([ids])
            for block in self.streamed.blocks():
                self._groups += block.shared_inputs(hidden, calls[block.index])
                hidden = block.run(hidden, calls[block.index])
        return self._groups

    def _share_out(self, group: list[str], stats: LayerStats) -> None:
        want = self.recipe.allocate
        if want.unit == "columns" and group[0] not in self._shares:
            self._shares |= dict.fromkeys(group, column_shares(stats, want.column_group))

    def shares(self) -> dict[str, list[float]]:
        """For each tensor: the part of its damage that falls on each group of its columns once they are sorted."""
        if not self._shares:
            for _ in self.blocks():
                pass
        return self._shares

    def rows(self, n: int) -> list[Tensor]:
        """The first ``n`` calibration rows of text, padding left out; none with images."""
        assert self.text is not None
        return text_rows(self.text, n)

    def dense_model(self, dtype: torch.dtype = torch.float32) -> Any:
        """The original model, whole."""
        return dense_model(self.streamed, dtype)


def text_rows(text: CalibrationSet, n: int) -> list[Tensor]:
    """The first ``n`` rows of text, padding left out; none with images."""
    return [t[m] for t, m in zip(text.tokens[:n], text.mask[:n])]


def dense_model(streamed: StreamedModel, dtype: torch.dtype) -> Any:
    """The original model, whole."""
    from fewbits.serving.transformers import load

    model = load(streamed.source.path, device=str(streamed.device), dtype=dtype)
    one_expert_at_a_time(model)
    return model

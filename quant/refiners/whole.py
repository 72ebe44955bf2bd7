"""Tuning a whole quantized model towards the original: the distributions of its next tokens.

The model computes with dense weights, which are leaves (:mod:`fewbits.quant.refiners.leaves`): a step gathers their
gradients over a batch, and every quantized tensor makes of its own what it can. So the model's code knows nothing of
formats, and formats nothing of models.

The original is run once and only what its decoder gives is kept; logits are made of that when they are needed.

Memory: the dense weights and their gradients (4 bytes a weight in bfloat16), and 16 bytes for every weight whose codes
move (latents, two averages, and what a step needs).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbits.calibration.hidden import HIDDEN_LIMIT_BYTES, HiddenStates
from fewbits.quant.errors import ModelError
from fewbits.quant.refiners.leaves import Leaves
from fewbits.quant.refiners.losses import Loss, pull
from fewbits.quant.refiners.team import Team
from fewbits.quant.refiners.tunable import Free, Tunable
from fewbits.quant.targets import Target, read_weight
from fewbits.quant.types import QuantizedTensor

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

MICRO_TOKENS = 2048
"""Tokens in a pass: memory and speed only, but for the order in which floats are added."""
_WARM_UP, _LAST_RATE = 0.05, 0.05


@dataclass(frozen=True)
class Schedule:
    """How long to tune, and how fast.

    Attributes:
        epochs: passes over the rows.
        batch: rows of a step.
        rate: of scales, codebooks and norms, in their own size, where the loss is a nat or more; 0: they stay. What the
            noise of steps costs grows with their square whatever the loss is, so that the rate falls with the root of
            the loss that there is at the start.
        code_rate: of latents of codes, in steps of their grids; 0: codes stay.
        most: share of the codes that a step may change.
        checks: how often the held-out rows are looked at; what was best on them is kept.
        fixed_steps: in place of ``epochs``; 0: those count.
    """

    epochs: float
    batch: int
    rate: float
    code_rate: float
    most: float
    checks: int
    loss: Loss
    fixed_steps: int = 0

    def steps(self, rows: int) -> int:
        return self.fixed_steps or max(1, round(self.epochs * rows / self.batch))

    def factor(self, step: int, steps: int) -> float:
        """Of the rates at a step: up, then down by a cosine."""
        up = min(1.0, (step + 1) / max(1.0, _WARM_UP * steps))
        return up * (_LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2)


class Keeper(Protocol):
    """Where the state of a run is kept while it is under way."""

    def load(self) -> dict[str, Tensor] | None: ...
    def save(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass
class Tuned:
    """What came of it.

    Attributes:
        before, after: loss on held-out rows, nats per token; equal where nothing helped, and all was left as it was.
        curve: ``(step, loss of the batch, loss on held-out rows or NaN)``.
    """

    before: float
    after: float
    curve: list[tuple[int, float, float]] = field(default_factory=list)


Best = tuple[dict[str, QuantizedTensor], dict[str, Tensor]]
"""Tensors and norms as they are stored."""


class Whole:
    """A model that is tuned.

    Args:
        model: the original, dense; its weights are replaced. Its dtype is what is computed in.
        tensors: by target name, of what is quantized inside of the decoder blocks.
        make: of a tensor and its original weight, what moves it.
        norms: dense parameters that move too, by name, as they are stored.
        team: the processes that tune it, each on rows of its own.
    """

    def __init__(
        self, model: Any, targets: Mapping[str, Target], tensors: Mapping[str, QuantizedTensor], *,
        make: Callable[[QuantizedTensor, Tensor], Tunable], norms: Mapping[str, Tensor], team: Team,
    ) -> None:
        self.team = team
        self.model = model.eval().requires_grad_(False)
        tunables = {name: make(tensor, read_weight(model, targets[name])) for name, tensor in tensors.items()}
        plain = {name: Free((-1, name), stored, _scale(stored)) for name, stored in norms.items()}
        self.start: Best = dict(tensors), dict(norms)
        self.leaves = Leaves(model, targets, tunables, plain)
        self.leaves.install(*self.start)
        self.leaves.watch(True)

    @torch.no_grad()
    def loss_on(self, rows: Sequence[Tensor], teacher: HiddenStates, which: Sequence[int], loss: Loss) -> float:
        """Mean loss per token of what is installed, over the rows of all processes."""
        own = sum(self._pull(loss, rows[i], teacher[i], 1.0) for i in which)
        total, count = self.team.total(own, sum(rows[i].numel() for i in which))
        return total / count

    def step(self, batches: Sequence[Tensor], teacher: Sequence[Tensor], schedule: Schedule, factor: float) -> float:
        """One step over a few batches of rows, and those of other processes; their mean loss per token."""
        (count,) = self.team.total(sum(b.numel() for b in batches))
        own = sum(self._pull(schedule.loss, ids, known, 1 / count) for ids, known in zip(batches, teacher))
        (total,) = self.team.total(own)
        self.team.add_up(self.leaves.gradients())
        self.leaves.step(rate=schedule.rate * factor, code_rate=schedule.code_rate * factor, most=schedule.most)
        return total / count

    def _pull(self, loss: Loss, ids: Tensor, known: Tensor, scale: float) -> float:
        hidden = decoded(self.model, ids)
        return pull(loss, partial(logits_of, self.model), hidden.flatten(0, 1), known.flatten(0, 1), scale)


def tune(
    whole: Whole, rows: Sequence[Tensor], teacher: HiddenStates, own: Sequence[int], held: Sequence[int],
    schedule: Schedule, steps: int, *, seed: int, keeper: Keeper, progress: Progress, title: str,
) -> tuple[Tuned, Best]:
    """Tune, look at held-out rows now and then, and give back what was best on them.

    Args:
        rows: batches of one row each, ``(1, L)``: those of this process.
        teacher: what the original's decoder makes of them.
        own, held: which of them to tune on, and which to judge by.
        steps: of the schedule.
    """
    leaves, team = whole.leaves, whole.team
    batch = schedule.batch // team.size
    checks = {round(steps * (i + 1) / schedule.checks) for i in range(schedule.checks)}
    if (kept := keeper.load()) is not None:
        done, tuned, best = _resumed(kept, whole.start[0])
        leaves.restore({k.removeprefix("now/"): v for k, v in kept.items() if k.startswith("now/")})
    else:
        start = whole.loss_on(rows, teacher, held, schedule.loss)
        done, tuned, best = 0, Tuned(start, start), whole.start
    schedule = replace(schedule, rate=schedule.rate * math.sqrt(min(1.0, max(0.0, tuned.before))))
    order = _order(len(own), steps * batch, seed + team.rank)
    leaves.anneal(done / steps)
    for step in range(done, steps):
        chosen = [own[i] for i in order[step * batch : (step + 1) * batch]]
        loss = whole.step(*_gathered(rows, teacher, chosen), schedule, schedule.factor(step, steps))
        if not math.isfinite(loss):
            raise ModelError(f"{title}: the loss is {loss} at step {step + 1} of {steps}; lower the learning rates")
        seen = math.nan
        if step + 1 in checks:
            now = leaves.stored()
            leaves.install(*now)
            seen = whole.loss_on(rows, teacher, held, schedule.loss)
            if seen < tuned.after:
                tuned.after, best = seen, now
        tuned.curve.append((step + 1, loss, seen))
        if step + 1 in checks and team.first:
            keeper.save(_kept(leaves, step + 1, tuned, best, finished=step + 1 == steps))
        leaves.anneal((step + 1) / steps)
        progress(title, step + 1, steps)
        log.info("%s: step %d of %d, loss %.4f, held-out %.4f", title, step + 1, steps, loss, seen)
    return tuned, best


def _gathered(
    rows: Sequence[Tensor], teacher: HiddenStates, chosen: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The chosen rows, those of one length together as far as a pass takes them."""
    batches: list[list[int]] = []
    for i in sorted(chosen, key=lambda i: rows[i].shape[1]):
        last = batches[-1] if batches else None
        if last and rows[last[0]].shape == rows[i].shape and (len(last) + 1) * rows[i].shape[1] <= MICRO_TOKENS:
            last.append(i)
        else:
            batches.append([i])
    return [torch.cat([rows[i] for i in b]) for b in batches], [torch.cat([teacher[i] for i in b]) for b in batches]


def _order(rows: int, count: int, seed: int) -> list[int]:
    """Indexes of rows, every pass over them in an order of its own."""
    draw = torch.Generator().manual_seed(seed)
    out: list[int] = []
    while len(out) < count:
        out += torch.randperm(rows, generator=draw).tolist()
    return out[:count]


# -- what is kept of a run that is under way ------------------------------------------------------------------------

def finished(keeper: Keeper, tensors: Mapping[str, QuantizedTensor]) -> tuple[Tuned, Best] | None:
    """What an earlier run came to, if it came to its end; ``tensors`` have the layouts."""
    if (kept := keeper.load()) is None or not bool(kept["finished"]):
        return None
    _, tuned, best = _resumed(kept, tensors)
    return tuned, best


def _kept(leaves: Leaves, done: int, tuned: Tuned, best: Best, *, finished: bool) -> dict[str, Tensor]:
    out = {} if finished else {f"now/{k}": v for k, v in leaves.state().items()}
    out |= {f"best/{name}/{k}": v for name, tensor in best[0].items() for k, v in tensor.pack().items()}
    out |= {f"norm/{name}": v for name, v in best[1].items()}
    return out | {"done": torch.tensor(done), "finished": torch.tensor(finished),
                  "curve": torch.tensor(tuned.curve, dtype=torch.float64),
                  "losses": torch.tensor([tuned.before, tuned.after], dtype=torch.float64)}


def _resumed(kept: Mapping[str, Tensor], tensors: Mapping[str, QuantizedTensor]) -> tuple[int, Tuned, Best]:
    packed: dict[str, dict[str, Tensor]] = {}
    for key, value in kept.items():
        if key.startswith("best/"):
            name, _, local = key.removeprefix("best/").rpartition("/")
            packed.setdefault(name, {})[local] = value
    best = {}
    for name, own in packed.items():
        device = tensors[name].segments[0].codes.device
        best[name] = QuantizedTensor.unpack({k: v.to(device) for k, v in own.items()}, tensors[name].layout)
    norms = {k.removeprefix("norm/"): v for k, v in kept.items() if k.startswith("norm/")}
    before, after = kept["losses"].tolist()
    curve = [(int(a), b, c) for a, b, c in kept["curve"].tolist()]
    return int(kept["done"]), Tuned(before, after, curve), (best, norms)


# -- models ---------------------------------------------------------------------------------------------------------


class _Decoded:
    """What a decoder returns, but for all that the head does not read."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _Seen(Exception):
    """The decoder is done; what follows is not needed."""


def decoded(model: Any, ids: Tensor) -> Tensor:
    """Hidden states ``(B, L, d)`` that leave the decoder, final norm included, with their graph."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(out[0])
        raise _Seen

    hook = model.get_decoder().register_forward_hook(keep)
    try:
        with contextlib.suppress(_Seen):
            model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits ``(T, V)`` of hidden states ``(T, d)``, by the model's own code: head, caps, scales and all."""
    decoder = model.get_decoder()
    decoder.forward = lambda *args, **kwargs: _Decoded(hidden[None])
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        del decoder.forward


@torch.no_grad()
def teacher_states(model: Any, rows: Sequence[Tensor], progress: Progress) -> HiddenStates:
    """What the original's decoder makes of each row ``(1, L)``."""
    out = []
    for i, row in enumerate(rows):
        out.append(decoded(model, row))
        progress("Running the original", i + 1, len(rows))
    return HiddenStates(out, HIDDEN_LIMIT_BYTES, None)


def _scale(stored: Tensor) -> Tensor:
    """What a change of 1 means for a norm or a bias."""
    size = stored.float().abs()
    return size.mean().clamp(min=1e-3) if size.numel() else size

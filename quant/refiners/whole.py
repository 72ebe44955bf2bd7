"""Tuning a whole quantized model towards the original: the distributions of its next tokens.

The model computes with dense weights, which are leaves: a step gathers their gradients over a batch, and every
quantized tensor makes of its own what it can (:class:`~fewbits.quant.refiners.tunable.Tunable`). So the model's code
knows nothing of formats, and formats nothing of models.

The original is run once and only what its decoder gives is kept; logits are made of that when they are needed.

Memory: the dense weights and their gradients (4 bytes a weight in bfloat16), and 16 bytes for every weight whose codes
move (latents, two averages, and what a step needs).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbits.calibration.hidden import HiddenStates
from fewbits.quant.errors import ModelError
from fewbits.quant.refiners.losses import Loss, pull
from fewbits.quant.refiners.tunable import Free, Moments, Tunable
from fewbits.quant.targets import Target, as_matrix
from fewbits.quant.types import QuantizedTensor

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

MICRO_TOKENS = 2048
"""Tokens in a pass: memory and speed only, but for the order in which floats are added."""
HIDDEN_LIMIT_BYTES = 2 << 30
_WARM_UP, _LAST_RATE = 0.05, 0.05


@dataclass(frozen=True)
class Schedule:
    """How long to tune, and how fast.

    Attributes:
        epochs: passes over the rows.
        batch: rows of a step.
        rate: of scales, codebooks and norms, in their own size; 0: they stay.
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


class Whole:
    """A model that is tuned.

    Args:
        model: the original, dense; its weights are replaced. Its dtype is what is computed in.
        tensors: by target name, of what is quantized inside of the decoder blocks.
        make: of a tensor and its original weight, what moves it.
        norms: names of dense parameters that move too, as they are stored.
    """

    def __init__(
        self, model: Any, targets: Mapping[str, Target], tensors: Mapping[str, QuantizedTensor], *,
        make: Callable[[QuantizedTensor, Tensor], Tunable], norms: Mapping[str, Tensor],
    ) -> None:
        self.model = model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.targets = {name: targets[name] for name in tensors}
        self.tunables: dict[str, Tunable] = {}
        for name, tensor in tensors.items():
            weight = self._matrix(name)
            self.tunables[name] = make(tensor, weight)
            weight.copy_(tensor.dequantize())
        self.norms = {name: Free((-1, name), stored, _scale(stored)) for name, stored in norms.items()}
        self._leaves = {id(p): p for p in map(self._parameter, self.targets)}
        self._leaves |= {id(p): p for p in map(model.get_parameter, self.norms)}
        for parameter in self._leaves.values():
            parameter.requires_grad_(True)

    def _parameter(self, name: str) -> nn.Parameter:
        target = self.targets[name]
        return self.model.get_parameter(f"{target.module_path}.{target.param_name}")

    def _matrix(self, name: str) -> Tensor:
        return as_matrix(self._parameter(name).detach(), self.targets[name])

    # -- passes ---------------------------------------------------------------------------------------------------

    def hidden(self, ids: Tensor) -> Tensor:
        """What the decoder makes of token ids ``(B, L)``: ``(B, L, d)``."""
        return decoded(self.model, ids)

    @torch.no_grad()
    def loss_on(self, rows: Sequence[Tensor], teacher: HiddenStates, loss: Loss) -> float:
        """Mean loss per token of the tensors as they would be stored."""
        with self._frozen():
            total = sum(
                pull(loss, self._logits, self.hidden(batch).flatten(0, 1), teacher[i].flatten(0, 1), 1.0)
                for i, batch in enumerate(rows))
        return total / sum(batch.numel() for batch in rows)

    def _logits(self, hidden: Tensor) -> Tensor:
        return logits_of(self.model, hidden)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        for name, tunable in self.tunables.items():
            self._matrix(name).copy_(tunable.frozen().dequantize())
        for name, free in self.norms.items():
            self.model.get_parameter(name).detach().copy_(free.stored())
        yield
        self._install()

    @torch.no_grad()
    def _install(self) -> None:
        for name, tunable in self.tunables.items():
            self._matrix(name).copy_(tunable.dense())
        for name, free in self.norms.items():
            self.model.get_parameter(name).detach().copy_(free.value())

    def step(self, batches: Sequence[Tensor], teacher: Sequence[Tensor], schedule: Schedule, factor: float,
             progress: float) -> float:
        """One step over a few batches of rows, after which ``progress`` is done; its mean loss per token."""
        for parameter in self._leaves.values():
            parameter.grad = None
        count = sum(b.numel() for b in batches)
        total = sum(
            pull(schedule.loss, self._logits, self.hidden(ids).flatten(0, 1), known.flatten(0, 1), 1 / count)
            for ids, known in zip(batches, teacher))
        for name, tunable in self.tunables.items():
            if (gradient := self._parameter(name).grad) is not None:  # an expert that no token went to has none
                tunable.step(as_matrix(gradient, self.targets[name]), rate=schedule.rate * factor,
                             code_rate=schedule.code_rate * factor, most=schedule.most)
        for name, free in self.norms.items():
            gradient = self.model.get_parameter(name).grad
            if gradient is not None:
                free.change.grad = gradient.float() * free.unit
                free.step(schedule.rate * factor)
        self.anneal(progress)
        return total / count

    def anneal(self, progress: float) -> None:
        """Compute with what moves, once the share ``progress`` of the steps is done."""
        for tunable in self.tunables.values():
            tunable.anneal(progress)
        self._install()

    # -- results --------------------------------------------------------------------------------------------------

    def results(self) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
        """The tensors and the norms as they are stored."""
        return ({n: t.frozen() for n, t in self.tunables.items()}, {n: f.stored() for n, f in self.norms.items()})

    def state(self) -> dict[str, Tensor]:
        out = {f"{name}/{k}": v for name, tunable in self.tunables.items() for k, v in tunable.state().items()}
        for name, free in self.norms.items():
            out |= {f"{name}/change": free.change, f"{name}/first": free.moments.first,
                    f"{name}/second": free.moments.second, f"{name}/steps": torch.tensor(free.moments.steps)}
        return out

    def restore(self, state: Mapping[str, Tensor]) -> None:
        own: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, rest = key.rpartition("/")
            own.setdefault(name, {})[rest] = value
        for name, tunable in self.tunables.items():
            tunable.restore(own.get(name, {}))
        for name, free in self.norms.items():
            kept = {k: v.to(free.start.device) for k, v in own[name].items()}
            free.change = kept["change"]
            free.moments = Moments(kept["first"], kept["second"], int(kept["steps"]))
        self._install()


def tune(
    whole: Whole, rows: Sequence[Tensor], held: Sequence[Tensor], teacher: HiddenStates, held_teacher: HiddenStates,
    schedule: Schedule, *, seed: int, keeper: Keeper, progress: Progress, title: str,
) -> tuple[Tuned, dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Tune, look at held-out rows now and then, and give back what was best on them.

    Args:
        rows, held: batches of one row each, ``(1, L)``, and what the original's decoder makes of them.
    """
    steps = schedule.steps(len(rows))
    checks = {round(steps * (i + 1) / schedule.checks) for i in range(schedule.checks)}
    best = whole.results()
    if (kept := keeper.load()) is not None:
        done, tuned, best = _resumed(kept, {n: t.tensor for n, t in whole.tunables.items()})
        whole.restore({k.removeprefix("now/"): v for k, v in kept.items() if k.startswith("now/")})
    else:
        done, tuned = 0, Tuned(start := whole.loss_on(held, held_teacher, schedule.loss), start)
    order = _order(len(rows), steps * schedule.batch, seed)
    whole.anneal(done / steps)
    for step in range(done, steps):
        chosen = order[step * schedule.batch : (step + 1) * schedule.batch]
        batches, known = _gathered(rows, teacher, chosen)
        loss = whole.step(batches, known, schedule, schedule.factor(step, steps), (step + 1) / steps)
        if not math.isfinite(loss):
            raise ModelError(f"{title}: the loss is {loss} at step {step + 1} of {steps}; lower the learning rates")
        seen = math.nan
        if step + 1 in checks:
            seen = whole.loss_on(held, held_teacher, schedule.loss)
            if seen < tuned.after:
                tuned.after, best = seen, whole.results()
        tuned.curve.append((step + 1, loss, seen))
        if step + 1 in checks:
            keeper.save(_kept(whole, step + 1, tuned, best, finished=step + 1 == steps))
        progress(title, step + 1, steps)
        log.info("%s: step %d of %d, loss %.4f, held-out %.4f", title, step + 1, steps, loss, seen)
    return tuned, *best


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

Best = tuple[dict[str, QuantizedTensor], dict[str, Tensor]]


def finished(keeper: Keeper, tensors: Mapping[str, QuantizedTensor]) -> tuple[Tuned, dict, dict] | None:
    """What an earlier run came to, if it came to its end; ``tensors`` have the layouts."""
    if (kept := keeper.load()) is None or not bool(kept["finished"]):
        return None
    _, tuned, best = _resumed(kept, tensors)
    return tuned, *best


def _kept(whole: Whole, done: int, tuned: Tuned, best: Best, *, finished: bool) -> dict[str, Tensor]:
    out = {} if finished else {f"now/{k}": v for k, v in whole.state().items()}
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

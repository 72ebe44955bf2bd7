"""A quantized tensor as a function of float parameters, which gradients of the dense weight can tune.

What is stored stays of the same format: scales, means, codebooks, scales of a rotation and products of low rank move in
float32 and are rounded to their stored dtypes at the end; codes move, where they may, by latent weights of which they
are the nearest.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbits.quant.formats.scalar import ScalarFormat
from fewbits.quant.formats.vq import CodebookFormat
from fewbits.quant.rotation import rotate, rotated_back
from fewbits.quant.types import LowRank, Params, QuantizedTensor, Segment, natural_columns

BETAS = (0.9, 0.95)
_EPS = 1e-12


@dataclass
class Moments:
    """Adam (arXiv 1412.6980) for one tensor: averages of its gradient and of the square of that."""

    first: Tensor
    second: Tensor
    steps: int = 0

    @staticmethod
    def like(value: Tensor) -> Moments:
        return Moments(torch.zeros_like(value), torch.zeros_like(value))

    def state(self) -> dict[str, Tensor]:
        return {"first": self.first, "second": self.second, "steps": torch.tensor(self.steps)}

    @staticmethod
    def restored(state: Mapping[str, Tensor]) -> Moments:
        return Moments(state["first"], state["second"], int(state["steps"]))

    def direction(self, gradient: Tensor) -> Tensor:
        """Of the next step, entries of about 1 in size."""
        self.steps += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.lerp_(gradient.square(), 1 - BETAS[1])
        size = (self.second / (1 - BETAS[1] ** self.steps)).sqrt_().add_(_EPS)
        return (self.first / (1 - BETAS[0] ** self.steps)).div_(size)


@dataclass
class Free:
    """A parameter that moves: ``start + unit * change``.

    Attributes:
        where: segment and name; the segment is -1 for what belongs to the whole tensor.
        start: as it is stored.
        unit: float32, broadcasts: what a change of 1 means. The size of each entry where that is a scale, the root mean
            square of all of them otherwise.
        change: float32, shaped as ``start``.
    """

    where: tuple[int, str]
    start: Tensor
    unit: Tensor
    change: Tensor = field(init=False)
    moments: Moments = field(init=False)

    def __post_init__(self) -> None:
        self.change = torch.zeros_like(self.start, dtype=torch.float32)
        self.moments = Moments.like(self.change)

    @property
    def key(self) -> str:
        return f"{self.where[0]}.{self.where[1]}"

    def value(self) -> Tensor:
        """float32, with a gradient where ``change`` has one."""
        return self.start.float() + self.unit * self.change

    def stored(self) -> Tensor:
        """In the dtype that is stored; an entry that would leave its range or change its sign stays as it was."""
        new = self.value().detach().to(self.start.dtype)
        kept = ~new.isfinite() if self.unit.ndim == 0 else ~new.isfinite() | (new.sign() != self.start.sign())
        return self.start.where(kept, new)

    def step(self, rate: float) -> None:
        """Down the gradient of ``change``, which is forgotten."""
        if self.change.grad is not None:
            self.change = (self.change.detach() - rate * self.moments.direction(self.change.grad))

    def state(self) -> dict[str, Tensor]:
        """What :meth:`restore` needs."""
        return {"change": self.change, **self.moments.state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        state = {k: v.to(self.start.device) for k, v in state.items()}
        self.change, self.moments = state["change"], Moments.restored(state)


class Tunable:
    """A quantized tensor that moves.

    Args:
        tensor: where it starts.
        weight: ``(N, K)`` of the original, which says how wide a step of the grid is; None: codes stay as they are.

    Attributes:
        latents: what codes are the nearest of, ``(N, columns)`` float32 by segment; none where codes stay. They start
            at what the codes mean, and not at the original weight: feedback chose many codes that are not the nearest
            to that, and those would be the first to go.
    """

    def __init__(self, tensor: QuantizedTensor, weight: Tensor | None = None) -> None:
        self.tensor = tensor
        self.free = [*_free(tensor)]
        self.latents: dict[int, Tensor] = {}
        self._known: dict[int, Tensor] = {}
        self._moments: dict[int, Moments] = {}
        self._units: dict[int, Tensor] = {}
        if weight is not None:
            self._add_latents(weight)

    def _add_latents(self, weight: Tensor) -> None:
        coded = self._coded(weight)
        for i, (segment, own) in enumerate(zip(self.tensor.segments, self._spans())):
            if not recodable(segment):
                continue
            target = coded[:, own]
            error = target - Segment.nearest(segment.format, target, segment.params).dequantize()
            # rounding errors are spread evenly over a step, whose twelfth of a square is their variance
            self._units[i] = (12 * error.square().mean(1, keepdim=True)).sqrt_().clamp(min=1e-12)
            self.latents[i] = self._start(i, target)
            self._moments[i] = Moments.like(self.latents[i])

    def _start(self, i: int, target: Tensor) -> Tensor:
        """Latents of a segment, given the original weight as it would be coded."""
        return self.tensor.segments[i].dequantize()

    def _spans(self) -> list[slice]:
        ends = [0]
        for segment in self.tensor.segments:
            ends.append(ends[-1] + segment.columns)
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def _coded(self, weight: Tensor) -> Tensor:
        """The weight in the basis and order of the segments, less what is beside the codes."""
        made, weight = self.tensor, weight.float()
        if made.low_rank is not None:
            weight = weight - made.low_rank.dense()
        if made.permutation is not None:
            weight = weight[:, made.permutation.long()]
        return weight if made.rotation is None else rotate(weight, made.rotation)

    # -- as a function --------------------------------------------------------------------------------------------

    def dense(self) -> Tensor:
        """float32 ``(N, K)``, differentiable in what moves; codes pass gradients straight to their latents."""
        values = {free.where: free.value() for free in self.free}
        return self._dense(values, self.latents)

    def _dense(self, values: dict[tuple[int, str], Tensor], latents: dict[int, Tensor]) -> Tensor:
        made = self.tensor
        out = torch.cat([
            self._part(i, {k: values.get((i, k), v) for k, v in segment.params.items()}, latents.get(i))
            for i, segment in enumerate(made.segments)], 1)
        if made.rotation is not None:
            out = rotated_back(out, dataclasses.replace(
                made.rotation, in_scale=values[-1, "in_scale"], out_scale=values[-1, "out_scale"]))
        if made.permutation is not None:
            out = natural_columns(out, made.permutation)
        return out if made.low_rank is None else out + values[-1, "low_a"] @ values[-1, "low_b"]

    def _part(self, i: int, params: Params, latent: Tensor | None) -> Tensor:
        """What the codes of a segment mean, float32 ``(N, columns)``."""
        segment = self.tensor.segments[i]
        if latent is None and all(free.where[0] != i for free in self.free):
            return self._fixed_part(i)
        part = Segment(segment.format, segment.codes, params).dequantize()
        return part if latent is None else part + (latent - latent.detach())

    def _fixed_part(self, i: int) -> Tensor:
        """That of a segment of which nothing moves, as with a trellis: CPUs decode slowly and have the memory."""
        segment = self.tensor.segments[i]
        if segment.codes.device.type != "cpu":
            return segment.dequantize()
        if i not in self._known:
            self._known[i] = segment.dequantize()
        return self._known[i]

    def frozen(self) -> QuantizedTensor:
        """What it is now, as it is stored."""
        made, new = self.tensor, {free.where: free.stored() for free in self.free}
        segments = tuple(
            Segment(s.format, s.codes, {k: new.get((i, k), v) for k, v in s.params.items()})
            for i, s in enumerate(made.segments))
        rotation, low_rank = made.rotation, made.low_rank
        if rotation is not None:
            rotation = dataclasses.replace(
                rotation, in_scale=new[-1, "in_scale"], out_scale=new[-1, "out_scale"])
        if low_rank is not None:
            low_rank = LowRank(new[-1, "low_a"], new[-1, "low_b"])
        return dataclasses.replace(made, segments=segments, rotation=rotation, low_rank=low_rank)

    # -- moving ---------------------------------------------------------------------------------------------------

    def step(self, gradient: Tensor, *, rate: float, code_rate: float = 0.0, most: float = 1.0) -> None:
        """One step of Adam down the ``gradient (N, K)`` of the dense weight.

        Args:
            rate: of parameters, in their units.
            code_rate: of latents, in steps of their grids.
            most: share of the spans of codes that may change; those that would change most do.
        """
        with torch.enable_grad():
            for free in self.free:
                free.change = free.change.detach().requires_grad_(rate > 0)
            latents = {i: v.detach().requires_grad_(code_rate > 0) for i, v in self.latents.items()}
            values = {free.where: free.value() for free in self.free}
            dense = self._dense(values, latents)
            if not dense.requires_grad:
                return  # nothing of it is free
            dense.backward(gradient.float())
        for free in self.free:
            free.step(rate)
            free.change = free.change.detach()
        for i, latent in latents.items():
            if latent.grad is not None:
                self.latents[i] = latent.detach() - code_rate * self._units[i] * self._moments[i].direction(latent.grad)
        if code_rate > 0:
            self._recode(most)

    @torch.no_grad()
    def _recode(self, most: float) -> None:
        """Find codes anew for the latents that there are."""
        segments = list(self.tensor.segments)
        values = {free.where: free.value() for free in self.free}
        for i in self.latents:
            old = segments[i]
            now = Segment(old.format, old.codes, {k: values.get((i, k), v) for k, v in old.params.items()})
            segments[i] = Segment(old.format, self._codes(i, now, most), old.params)
        self._set(segments)

    def _codes(self, i: int, now: Segment, most: float) -> Tensor:
        """Codes of the latents of segment ``i``, which is ``now``."""
        new = Segment.nearest(now.format, self.latents[i], now.params)
        codes = new.codes if most >= 1 else _limited(now, new, most)
        value = Segment(now.format, codes, now.params).dequantize()
        # a latent that runs away from its code would take as long to come back
        self.latents[i] = value + (self.latents[i] - value).clamp(-self._units[i], self._units[i])
        return codes

    def _set(self, segments: list[Segment]) -> None:
        self.tensor = dataclasses.replace(self.tensor, segments=tuple(segments))

    def anneal(self, progress: float) -> None:
        """Called before each step, with the share of them that is done; for what depends on it."""

    # -- kept on disk ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything that moves, by name."""
        out = {f"{free.key}.{k}": v for free in self.free for k, v in free.state().items()}
        for i, latent in self.latents.items():
            own = {"latent": latent, "codes": self.tensor.segments[i].codes, **self._moments[i].state()}
            out |= {f"{i}.{k}": v for k, v in own.items()}
        return out

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state`."""
        own: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, rest = key.rpartition(".")
            own.setdefault(name, {})[rest] = value.to(self.tensor.segments[0].codes.device)
        for free in self.free:
            free.restore(own[free.key])
        segments = list(self.tensor.segments)
        for i in self.latents:
            self.latents[i], self._moments[i] = own[f"{i}"]["latent"], Moments.restored(own[f"{i}"])
            segments[i] = Segment(segments[i].format, own[f"{i}"]["codes"], segments[i].params)
        self._set(segments)


def recodable(segment: Segment) -> bool:
    """Whether codes are found fast enough to be found anew at every step: no search over a trellis or a lattice."""
    return isinstance(segment.format, ScalarFormat | CodebookFormat)


def _free(tensor: QuantizedTensor) -> list[Free]:
    out = []
    for i, segment in enumerate(tensor.segments):
        for name in _free_names(segment):
            value = segment.params[name]
            own = name.startswith("scale")
            out.append(Free((i, name), value, _size(value) if own else _rms(value)))
    if (rotation := tensor.rotation) is not None:
        out += [Free((-1, n), v, _size(v)) for n, v in (("in_scale", rotation.in_scale),
                                                        ("out_scale", rotation.out_scale))]
    if tensor.low_rank is not None:
        out += [Free((-1, n), v, _rms(v)) for n, v in (("low_a", tensor.low_rank.a), ("low_b", tensor.low_rank.b))]
    return out


def _free_names(segment: Segment) -> list[str]:
    fmt = segment.format
    if isinstance(fmt, CodebookFormat):
        return [n for n in ("codebook", "basis") if n in segment.params]
    if isinstance(fmt, ScalarFormat):  # one group will say which parameters are free
        codes = segment.codes[:1, : fmt.group_size or segment.columns].view(1, 1, -1)
        return list(fmt.linear(codes, {k: v[:1, :1].unsqueeze(-1) for k, v in segment.params.items()}))
    return []


def _size(value: Tensor) -> Tensor:
    return value.float().abs()


def _rms(value: Tensor) -> Tensor:
    return value.float().square().mean().sqrt()


def _limited(old: Segment, new: Segment, most: float) -> Tensor:
    """Codes of ``new`` for the share ``most`` of spans that they move furthest, those of ``old`` for the others."""
    fmt = old.format
    moved = (new.dequantize() - old.dequantize()).square_()
    rows, columns = old.rows // fmt.height, old.columns // fmt.span
    far = moved.view(rows, fmt.height, columns, fmt.span).sum((1, 3))
    allowed = max(1, int(most * far.numel()))
    if int((far > 0).sum()) <= allowed:
        return new.codes
    chosen = torch.zeros_like(far, dtype=torch.bool)
    chosen.view(-1)[far.flatten().topk(allowed).indices] = True
    wide = chosen.repeat_interleave(fmt.depth, 0).repeat_interleave(fmt.width, 1)
    return new.codes.where(wide, old.codes)

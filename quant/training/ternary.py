"""Linears that are trained ternary: weights of -1, 0 and 1 times a scale, activations of 8 bits (BitNet b1.58).

Weights are those of "The Era of 1-bit LLMs" (arXiv 2402.17764) and "BitNet b1.58 Reloaded" (arXiv 2407.09527):

    T = clip(round(W / gamma), -1, 1),  W_hat = gamma T,  gamma = mean |W|, median |W| or learned
    x_hat = round(s x),  s = 127 / max |x| of a token
    y = (x_hat / s) W_hat^T + b

Gradients go straight through: W and x get those of a plain linear at the quantized values, and gamma counts as a
constant. A learned gamma is ``exp(theta)`` with the gradient of LSQ (arXiv 1902.08153). ``mix`` in [0, 1] turns a float
layer into a quantized one by degrees, for both weights and activations.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.quant.errors import FewbitsError, FormatError, ModelError
from fewbits.quant.formats import parse_format
from fewbits.quant.solvers import two_magnitudes
from fewbits.quant.types import QuantizedTensor, Segment

EPS = 1e-5
"""Least scale of weights, and least ``max |x|`` of a token. A maximum, as a sum would move every threshold."""


@dataclass(frozen=True)
class Ternary:
    """How linears are trained.

    Attributes:
        scale: what gamma is. Of an even number of weights the median is the lower one.
        granularity: weights that share a scale, all or those of a row.
        act_bits: 8: inputs are rounded to int8, token by token; None: they stay as they are.
        norm: an RMSNorm of the layer's own in front, which SubLN needs where the model has none.
    """

    scale: Literal["absmean", "absmedian", "learned"] = "absmean"
    granularity: Literal["tensor", "row"] = "tensor"
    act_bits: Literal[8] | None = 8
    norm: bool = False

    def __post_init__(self) -> None:
        for name, known in (("scale", ("absmean", "absmedian", "learned")), ("granularity", ("tensor", "row")),
                            ("act_bits", (None, 8))):
            if (got := getattr(self, name)) not in known:
                raise FewbitsError(f"{name}: got {got!r}, needed one of {', '.join(map(repr, known))}")


class TernaryLinear(nn.Linear):
    """A linear whose ``weight (N, K)`` holds the latent weights.

    Attributes:
        mix: 0: exactly the float layer, 1: exactly the quantized one, in between both blended.
        log_scale: theta of a learned scale, ``(N,)`` or ``(1,)`` (no matrix, so that the usual groups of an optimizer
            spare it weight decay); None for the others.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, ternary: Ternary | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.ternary = ternary or Ternary()
        self.mix = 1.0
        self.norm = nn.RMSNorm(in_features, EPS, device=device, dtype=dtype) if self.ternary.norm else None
        learned = self.ternary.scale == "learned"
        self.log_scale = nn.Parameter(torch.zeros(self._scales, device=device)) if learned else None
        self.reset_scale()

    @staticmethod
    def of(linear: nn.Linear, ternary: Ternary) -> TernaryLinear:
        """The same layer with the very parameters of ``linear``, so that what is tied stays tied."""
        weight, bias = linear.weight, linear.bias
        out = TernaryLinear(linear.in_features, linear.out_features, bias is not None, ternary=ternary,
                            device=weight.device, dtype=weight.dtype)
        out.weight, out.bias = weight, bias
        out.reset_scale()
        return out.train(linear.training)

    @property
    def _scales(self) -> int:
        return self.out_features if self.ternary.granularity == "row" else 1

    def _shared(self) -> Tensor:
        """float32 ``(scales, weights that share one)``."""
        return self.weight.detach().float().reshape(self._scales, -1)

    @torch.no_grad()
    def reset_scale(self) -> None:
        """A learned scale starts where the squared error of the weights is least."""
        if self.log_scale is not None and not self.weight.is_meta:
            groups = self._shared()
            best = two_magnitudes(groups, torch.ones_like(groups), 0, 1)[:, 0]
            self.log_scale.copy_(best.clamp(min=EPS).log())

    # -- training -------------------------------------------------------------------------------------------------

    def scale(self) -> Tensor:
        """gamma, float32 ``(N, 1)`` or ``(1, 1)``, without a gradient."""
        if self.log_scale is not None:
            gamma = self.log_scale.detach().float().exp()
        elif self.ternary.scale == "absmean":
            gamma = self._shared().abs().mean(1)
        else:
            gamma = self._shared().abs().median(1).values
        return gamma.clamp(min=EPS)[:, None]

    def effective_weight(self) -> Tensor:
        """float32 ``(N, K)`` that multiplies the inputs, with the gradient that the latent weights and theta get."""
        latent, scale = self.weight.float(), self.scale()
        codes = _nearest(latent, scale)
        value = torch.lerp(latent.detach(), scale * codes, self.mix)
        return _straight_through(value, latent if self.log_scale is None else self._surrogate(latent, codes))

    def _surrogate(self, latent: Tensor, codes: Tensor) -> Tensor:
        """``alpha (clip(w / alpha, -1, 1) + c)`` with the rounding ``c`` held fast: what LSQ differentiates.

        By alpha that is ``t - w / alpha`` inside of the clip and ``t``, the level itself, outside; by w, 1 and 0. The
        gradient of theta is divided by the root of the number of weights that share it.
        """
        assert self.log_scale is not None
        theta, share = self.log_scale.float(), 1 / math.sqrt(latent.numel() / self._scales)
        alpha = _straight_through(theta, theta * share).exp().clamp(min=EPS)[:, None]
        inside = (latent / alpha).clamp(-1, 1)
        return torch.lerp(latent, alpha * (inside + (codes - inside).detach()), self.mix)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., K)`` to ``(..., N)``, in the dtype of ``x``."""
        x = x if self.norm is None else self.norm(x)
        if self.ternary.act_bits is not None:
            codes, scale = quantize_tokens(x)
            x = _straight_through(torch.lerp(x.detach().float(), codes / scale, self.mix).to(x.dtype), x)
        return F.linear(x, self.effective_weight().to(self.weight.dtype), self.bias)

    # -- frozen ---------------------------------------------------------------------------------------------------

    def export(self) -> tuple[Tensor, Tensor]:
        """T int8 ``(N, K)`` and gamma float32 ``(N, 1)`` or ``(1, 1)``: those that :meth:`forward` computes with.

        Raises:
            ModelError: training left weights or scales that are not finite.
        """
        scale = self.scale()
        if not bool(self.weight.isfinite().all() and scale.isfinite().all()):
            raise ModelError("weight: got NaN or Inf, needed numbers; train with a lower learning rate")
        return _nearest(self.weight, scale).to(torch.int8), scale

    def to_quantized(self) -> QuantizedTensor:
        """The weight as format ``ternary_row``; gamma is rounded to float16, the codes are those of :meth:`export`.

        Raises:
            FormatError: a scale is more than float16 holds.
            ModelError: as :meth:`export`.
        """
        codes, scale = self.export()
        if float(scale.max()) > (limit := torch.finfo(torch.float16).max):
            raise FormatError(f"scale: got {float(scale.max()):.3g}, float16 holds at most {limit:.3g}; "
                              "train from smaller weights")
        rows = scale.half().expand(self.out_features, 1).contiguous()
        segment = Segment(parse_format("ternary_row"), (codes + 1).to(torch.uint8), {"scale": rows})
        return QuantizedTensor((self.out_features, self.in_features), (segment,))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.ternary}"


def _nearest(latent: Tensor, scale: Tensor) -> Tensor:
    """T, float32 ``(N, K)``. In float32 whatever the parameters are: bfloat16 would move the thresholds."""
    return (latent.detach().float() / scale).round_().clamp_(-1, 1)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of 8 bits, as float32 ``(..., K)``, and s ``(..., 1)``, of which their quotient is nearly ``x``."""
    x = x.detach().float()
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=EPS)
    return (x * scale).round_().clamp_(-128, 127), scale


def _straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value`` to the last bit, with the gradient of ``surrogate``."""
    return value.detach() + (surrogate - surrogate.detach())


def replace_linears(
    model: nn.Module, ternary: Ternary, *, match: Sequence[str] = ("*",), keep: Sequence[str] = ("*lm_head",)
) -> list[str]:
    """Make linears of ``model`` ternary, in place, with the weights that they have.

    Args:
        match: glob patterns of names, of which one must match.
        keep: of names that are left alone whatever ``match`` says. Embeddings are no linears and always stay.

    Returns:
        the names of what was replaced.

    Raises:
        ModelError: no linear was.
    """
    def chosen(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in patterns)

    names = [name for name, module in model.named_modules()
             if type(module) is nn.Linear and chosen(name, match) and not chosen(name, keep)]
    if not names:
        raise ModelError(f"match: no nn.Linear fits {list(match)} and not {list(keep)}; name others")
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, TernaryLinear.of(linear, ternary))
    return names


def set_mix(model: nn.Module, mix: float) -> None:
    """Give every ternary linear of ``model`` this blend: a schedule calls it before each step.

    Raises:
        FewbitsError: it is not in [0, 1].
    """
    if not 0 <= mix <= 1:
        raise FewbitsError(f"mix: got {mix}, needed 0 (float) to 1 (quantized)")
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            module.mix = mix

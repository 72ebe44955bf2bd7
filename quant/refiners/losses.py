"""How far a student's next-token distributions are from its teacher's, a few tokens at a time.

Logits of all tokens of a step would be what takes the most memory; here they come and go in chunks, and each leaves its
gradient behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewbits.kernels.cpu import divergence as compiled

Kind = Literal["kl", "dad", "topk"]


@dataclass(frozen=True)
class Loss:
    """KL(teacher || student) per token.

    Attributes:
        kind: ``kl``; ``dad``: tokens weighed by ``u^gamma``, u the entropy of the teacher over its most (the
            deviation-aware distillation of DB-LLM, arXiv 2402.11960, for which no code is public); ``topk``: over the
            teacher's ``k`` likeliest tokens alone, both renormalized (TopKLD).
    """

    kind: Kind = "kl"
    gamma: float = 0.5
    k: int = 64

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(T,)`` nats of logits ``(T, V)`` each, already weighed; the gradient goes to the student."""
        if self.kind == "topk":
            top = teacher.topk(min(self.k, teacher.shape[-1]), -1).indices
            return _Divergence.apply(student.gather(-1, top), teacher.gather(-1, top))
        kl = _Divergence.apply(student, teacher)
        return kl if self.kind == "kl" else kl * self.weights(teacher)

    def weights(self, teacher: Tensor) -> Tensor:
        """``(T,)`` of ``dad``, 0 to 1. Their mean is left as it is: a step of Adam is the same for any."""
        log = teacher.float().log_softmax(-1)
        entropy = -(log.exp() * log).sum(-1)
        return (entropy / math.log(teacher.shape[-1])).clamp(min=0).pow(self.gamma)


class _Divergence(torch.autograd.Function):
    """KL of softmaxes: the gradient by the student's logits is the difference of the two."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        if compiled.takes(student):
            kl, gradient = compiled.divergence(student, teacher)
        else:
            s, t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
            p = t.exp()
            kl, gradient = t.sub_(s).mul_(p).sum(-1), s.exp_().sub_(p).to(student.dtype)
        ctx.save_for_backward(gradient)
        return kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * gradients[0][:, None].to(difference.dtype), None


_CHUNK_TOKENS = 512


def pull(
    loss: Loss, logits: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor, scale: float
) -> float:
    """Sum of the loss over hidden states ``(T, d)``; ``scale`` times its gradient goes back through ``student``.

    Args:
        logits: of hidden states.
    """
    leaf = student.detach().requires_grad_(student.requires_grad)
    total = 0.0
    for own, other in zip(leaf.split(_CHUNK_TOKENS), teacher.split(_CHUNK_TOKENS)):
        with torch.no_grad():
            reference = logits(other)
        value = loss(logits(own), reference).sum()
        total += float(value.detach())
        if student.requires_grad:
            (value * scale).backward()
    if student.requires_grad:
        assert leaf.grad is not None
        student.backward(leaf.grad)
    return total

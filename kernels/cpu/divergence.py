"""The compiled divergence behind torch tensors; see ``quant/refiners/losses.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels.cpu.build import load

_DTYPES = (torch.float32, torch.bfloat16)


def takes(logits: Tensor) -> bool:
    """Whether there is compiled code for such logits; compiles it the first time."""
    return logits.device.type == "cpu" and logits.dtype in _DTYPES and load("divergence") is not None


def divergence(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) float32 ``(T,)`` of logits ``(T, V)``, and its gradient by the student's, in its dtype."""
    library = load("divergence")
    assert library is not None, "ask takes() first"
    student, teacher = student.contiguous(), teacher.to(student.dtype).contiguous()
    kl, gradient = torch.empty(len(student)), torch.empty_like(student)
    library.fewbits_divergence(
        student.data_ptr(), teacher.data_ptr(), gradient.data_ptr(), kl.data_ptr(), *student.shape,
        student.dtype == torch.bfloat16, torch.get_num_threads())
    return kl, gradient

"""Which kernel multiplies by a weight of a format, and why no other one of the tables does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fewbits.kernels import coded
from fewbits.kernels.coded import CODED_KERNELS, CodedKernel
from fewbits.kernels.dispatch import KERNELS, Kernel, select_kernel
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.types import Format


@dataclass(frozen=True)
class Choice:
    """What dispatch takes.

    Attributes:
        kernel: its name.
        rejected: the others of the format's family, in the order in which they were asked -> why not.
    """

    kernel: str
    rejected: dict[str, str]


def explain(fmt: Format, tokens: int, device: str) -> Choice:
    """The choice for so many tokens on a type of device (``cpu``, ``cuda``)."""
    chosen = select_kernel(fmt, tokens, torch.device(device))
    rejected: dict[str, str] = {}
    for name, kernel, lack in _family(fmt):
        if name == chosen:
            continue
        if kernel.device not in (None, device):
            rejected[name] = f"runs on {kernel.device}"
        elif lack:
            rejected[name] = lack
        elif not kernel.available():
            rejected[name] = "needs a C compiler" if device == "cpu" else "needs Triton"
        elif kernel.max_tokens is not None and tokens > kernel.max_tokens:
            rejected[name] = f"is for at most {kernel.max_tokens} tokens"
        else:
            rejected[name] = f"{chosen} is preferred"
    return Choice(chosen, rejected)


def _family(fmt: Format) -> Iterator[tuple[str, Kernel | CodedKernel, str | None]]:
    """Kernels for formats of this kind, in order of preference, and what of the format they do not take."""
    if coded.is_coded(fmt):
        for name, own in CODED_KERNELS.items():
            if own.family is None or isinstance(fmt, own.family):
                yield name, own, None if own.fits(fmt) else f"does not take {fmt.name}"
    elif isinstance(fmt, IntFormat):
        for key, kernel in KERNELS.items():
            fits = fmt.code_bits in kernel.bits
            yield key, kernel, None if fits else f"takes codes of {', '.join(map(str, kernel.bits))} bits"

"""Several processes that tune one model together, as ``accelerate launch`` or ``torchrun`` starts them.

Each has the whole model and a part of the rows; gradients are added up, and all make the same step. The first process
alone quantizes and writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
from torch import Tensor

_PATIENCE = timedelta(days=7)  # the others wait while the first quantizes


class Team:
    """The processes of one run; without arguments: this one, alone.

    Attributes:
        rank, size: which of how many this is.
        device: what this one computes on, or None: it may choose.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str | None = None) -> None:
        self.rank, self.size, self.device = rank, size, device

    @staticmethod
    def of_launch(device: str | None = None) -> Team:
        """Those that were launched with this one, connected.

        Args:
            device: where to compute; None: a GPU each, if there are any.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Team()
        from accelerate import PartialState

        on_cpu = device == "cpu" or not torch.accelerator.is_available()
        state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
        return Team(state.process_index, state.num_processes, str(state.device))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, items: range) -> range:
        """This process's own of what is to be shared out."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def total(self, *values: float) -> list[float]:
        """Of each value its sum over all processes: the same in each."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, device=self.device)  # float32: not every device has more
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Sums over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

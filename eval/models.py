"""Opens what a user calls a model: a hub id, a directory (dense or fewbits), a GGUF file, or a loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.quant.errors import FewbitsError, ModelError, nearest
from fewbits.quant.source import open_source

DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    Attributes:
        name: what the user called it.
        model: a transformers causal language model in eval mode.
        tokenizer: its tokenizer, or None when it has none of its own.
        nbytes: bytes of its weights as stored on disk, or None for a model that was already loaded.
    """

    name: str
    model: Any
    tokenizer: Any
    nbytes: int | None

    @property
    def dtype(self) -> str:
        """The dtype it computes in, such as ``float32``: that of its norms, as scales of packed weights may differ."""
        norms = (p.dtype for p in self.model.parameters() if p.ndim == 1 and p.is_floating_point())
        return str(next(norms, self.model.dtype)).removeprefix("torch.")

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding: token ids must lie below."""
        return self.model.get_input_embeddings().num_embeddings

    @property
    def device(self) -> str:
        return str(self.model.device)

    def need_tokenizer(self) -> Any:
        """The tokenizer; raises ModelError when there is none."""
        if self.tokenizer is None:
            raise ModelError(f"{self.name}: has no tokenizer; copy the tokenizer files of the original model beside it")
        return self.tokenizer


def open_model(
    model: str | Path | Any, *, tokenizer: Any = None, device: str | None = None, dtype: str | None = None
) -> Loaded:
    """Load ``model`` for evaluation; one that is loaded already is taken as it is, without ``device`` or ``dtype``.

    ``device`` defaults to a GPU where there is one, ``dtype`` to float32 on CPU and to the checkpoint's own elsewhere.
    Raises ModelError or CheckpointError when it cannot be loaded, FewbitsError for an unknown device or dtype.
    """
    if not isinstance(model, str | Path):
        if device is not None or dtype is not None:
            raise FewbitsError("device and dtype: cannot be set for a model that is already loaded; load it with them")
        model.eval()
        return Loaded(_name_of(model), model, tokenizer or _tokenizer_of(model), None)
    from fewbits.serving.transformers import load

    where = choose_device(device)
    source = open_source(model)
    compute = choose_dtype(dtype, where)
    try:
        loaded = load(source.path, device=where, dtype=compute)
    except FewbitsError:
        raise
    except (OSError, ValueError, KeyError) as e:  # as transformers reports configs and files it cannot use
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(f"{source.name}: transformers cannot load it ({reason})") from e
    return Loaded(source.name, loaded, tokenizer or _load_tokenizer(source.path), source.weights_bytes)


def choose_device(device: str | None) -> torch.device:
    """The device to run on. Raises FewbitsError for one that is unknown or not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as e:  # torch asserts when it was built without CUDA
        raise FewbitsError(f"--device {device}: {str(e).splitlines()[0]}; use cpu, or leave it out") from e


def choose_dtype(dtype: str | None, device: torch.device) -> str:
    """The compute dtype's name, ``auto`` for the checkpoint's own. Raises FewbitsError for an unknown one."""
    if dtype is None:
        return "float32" if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise FewbitsError(f"--dtype {dtype}: not a dtype to compute in; {nearest(dtype, list(DTYPES))}")
    return dtype


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Run with so many torch threads on CPU. Raises FewbitsError when it is below 1."""
    if threads is None:
        yield
        return
    if threads < 1:
        raise FewbitsError(f"--threads {threads}: must be at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _name_of(model: Any) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def _tokenizer_of(model: Any) -> Any:
    path = getattr(model.config, "_name_or_path", "")
    return _load_tokenizer(Path(path)) if path and Path(path).is_dir() else None


def _load_tokenizer(path: Path) -> Any:
    from fewbits.serving.transformers import load_tokenizer

    try:
        return load_tokenizer(path)
    except (OSError, ValueError, KeyError):  # what transformers raises when the files are missing or of a kind unknown
        return None

"""Writing a quantized checkpoint: one shard per finished block, renamed into place, the index last.

While a run is under way its directory has a ``.fewbits`` folder: ``run.json`` says what the run is (so that only the
same run may resume), and one file per finished shard keeps the facts about its tensors. A directory without the index
is not a checkpoint, and no reader takes it for one. Weight files are called ``fewbits-*.safetensors``, not
``model-*``: transformers without fewbits then finds no weights and stops, where it would otherwise warn about an
unknown method and load random ones.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fewbits.quant.errors import CheckpointError
from fewbits.quant.shards import DTYPES, read_header, read_tensor, sha256_file

INDEX = "fewbits.safetensors.index.json"
_WORK = ".fewbits"
_SPARE_BYTES = 64 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DTYPE_ORDER = [
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
]
"""The order in which safetensors stores tensors of different dtypes."""


def shard_name(index: int, total: int) -> str:
    """File name of shard ``index`` (from 0) of ``total``."""
    return f"fewbits-{index + 1:05d}-of-{total:05d}.safetensors"


class RunFolder:
    """The directory of a run that is under way, to read from: what others of its processes see.

    Args:
        out: the directory.
        total: number of shards.
    """

    def __init__(self, out: Path, total: int) -> None:
        self.out, self.total = out, total
        self._work = out / _WORK

    def path(self, index: int) -> Path:
        return self.out / shard_name(index, self.total)

    def has(self, index: int) -> bool:
        """Whether this shard is finished."""
        return self.path(index).exists()

    def read(self, index: int) -> dict[str, Tensor]:
        """Tensors of a finished shard. Raises CheckpointError when the file is damaged."""
        return read_shard(self.path(index))

    def facts(self, index: int) -> list[dict[str, Any]]:
        """What :meth:`CheckpointWriter.write` was told about the tensors of a finished shard."""
        return json.loads((self._work / f"{index:05d}.json").read_text())

    def keeper(self, name: str) -> StateFile:
        """Where what runs over the whole checkpoint keeps its state until the run is done."""
        return StateFile(self._work / f"{name}.safetensors", self.out)


class CheckpointWriter(RunFolder):
    """Writes shards of one run into a directory, atomically, and knows which are there already.

    Args:
        out: the directory.
        total: number of shards.
        run: everything that decides the bytes; only a run that agrees in all of it can be resumed.

    Raises:
        CheckpointError: the directory holds something else, or another run, or is in use, or the disk is too small.
    """

    def __init__(
        self, out: Path, total: int, run: Mapping[str, Any], *, resume: bool, force: bool, need_bytes: int = 0
    ) -> None:
        super().__init__(out, total)
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out}: is a file, needed a directory to write to; choose another output")
        self._lock_file: IO[str] | None = None
        try:
            with disk_errors(out):
                self._claim(dict(run), resume, force, need_bytes)
        except BaseException:
            self.close()
            raise

    def _claim(self, run: dict[str, Any], resume: bool, force: bool, need_bytes: int) -> None:
        run = json.loads(json.dumps(run))
        marker = self._work / "run.json"
        existing = [p for p in self.out.iterdir()] if self.out.is_dir() else []
        if existing == [self._work] and not marker.exists():
            existing = []  # a run of ours that was killed before it said what it was
        if existing and not marker.exists() and not force:
            what = "a finished checkpoint" if (self.out / INDEX).exists() else f"{len(existing)} other files"
            raise CheckpointError(f"{self.out}: holds {what}; choose an empty directory, or --force to overwrite")
        if marker.exists() and not (resume or force):
            raise CheckpointError(f"{self.out}: holds an unfinished run; --resume continues it, --force starts afresh")
        self._work.mkdir(parents=True, exist_ok=True)
        self._lock()
        if marker.exists() and not force:
            _require_same(json.loads(marker.read_text()), run, self.out)
        else:
            self._clear()
        self._require_space(need_bytes)
        write_atomically(marker, json.dumps(run, indent=1, sort_keys=True) + "\n")
        for leftover in self.out.glob("fewbits-*.tmp"):
            leftover.unlink()

    @staticmethod
    def unfinished_run(out: Path) -> dict[str, Any] | None:
        """What the unfinished run in a directory is, or None where there is none."""
        marker = out / _WORK / "run.json"
        return json.loads(marker.read_text()) if marker.exists() else None

    def _require_space(self, need_bytes: int) -> None:
        done = sum(self.path(i).stat().st_size for i in range(self.total) if self.has(i))
        free, need = shutil.disk_usage(self.out).free, max(need_bytes - done, 0) + _SPARE_BYTES
        if need > free:
            raise CheckpointError(
                f"{self.out}: got {free / 1e6:.0f} MB free, needed about {need / 1e6:.0f} MB; "
                "free some space or choose another output"
            )

    def _lock(self) -> None:
        self._lock_file = open(self._work / "lock", "w")  # noqa: SIM115 - held until close()
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise CheckpointError(f"{self.out}: another process is writing to it; wait, or choose another") from error

    def _clear(self) -> None:
        """Remove what an earlier run of ours wrote, and nothing else."""
        for path in [*self.out.glob("fewbits-*.safetensors"), self.out / INDEX, *self._work.glob("*.json"),
                     *self._work.glob("*.safetensors")]:
            path.unlink(missing_ok=True)

    def write(self, index: int, tensors: dict[str, Tensor], facts: list[dict[str, Any]]) -> None:
        """Write a shard; it appears under its name only when it is whole and on disk.

        Raises:
            CheckpointError: the disk is full or cannot be written; finished shards stay and the run can resume.
        """
        with disk_errors(self.out):
            write_atomically(self._work / f"{index:05d}.json", json.dumps(facts))
            _write_tensors(self.path(index), {k: v.contiguous() for k, v in sorted(tensors.items())})

    def hashes(self) -> dict[str, str]:
        """sha256 of every shard."""
        return {p.name: sha256_file(p) for p in map(self.path, range(self.total))}

    def finish(self, files: Mapping[str, str], carry: list[Path], root: Path) -> int:
        """Write the other files, then the index; returns the bytes of all shards.

        ``files``: name -> text. ``carry``: files of the source (below ``root``) to copy unchanged.
        """
        with disk_errors(self.out):
            for path in carry:
                target = self.out / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            for name, text in files.items():
                write_atomically(self.out / name, text)
            weight_map, size = {}, 0
            for i in range(self.total):
                for name, entry in read_header(self.path(i)).items():
                    weight_map[name] = self.path(i).name
                    size += entry.nbytes
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_atomically(self.out / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        self.close()
        shutil.rmtree(self._work)
        return sum(self.path(i).stat().st_size for i in range(self.total))

    def close(self) -> None:
        """Release the directory; an unfinished run stays resumable."""
        if self._lock_file is not None:
            self._lock_file.close()


@dataclass(frozen=True)
class StateFile:
    """Tensors that are either absent (or as before) or whole."""

    path: Path
    out: Path

    def load(self) -> dict[str, Tensor] | None:
        """What was saved; None where nothing was. Raises CheckpointError when the file is damaged."""
        return read_shard(self.path) if self.path.exists() else None

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError: the disk is full or cannot be written."""
        # copies, because what is best may share memory with what is now
        copies = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()}
        with disk_errors(self.out):
            _write_tensors(self.path, copies)


def file_sizes(shards: Iterable[Mapping[str, tuple[tuple[int, ...], torch.dtype]]]) -> list[int]:
    """Bytes that each shard's file will have, header included, given the shape and dtype of each tensor."""
    sizes = []
    for entries in shards:
        # safetensors orders by dtype, then by name, and pads the header to a multiple of 8
        order = sorted(entries, key=lambda n: (_DTYPE_ORDER.index(_DTYPE_NAMES[entries[n][1]]), n))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in order:
            shape, dtype = entries[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        sizes.append(8 + -(-len(text) // 8) * 8 + end)
    return sizes


def read_shard(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by plain reads. Raises CheckpointError when it is damaged."""
    return {name: read_tensor(path.parent, name, entry) for name, entry in read_header(path).items()}


def _require_same(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    different = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    if different:
        key = different[0]
        raise CheckpointError(
            f"{out}: the unfinished run there differs in {', '.join(different)} ({key}: it has {_short(old.get(key))}, "
            f"got {_short(new.get(key))}); repeat the same command to resume, or --force to start afresh"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is either absent (or as before) or whole."""
    temp = path.with_name(path.name + ".tmp")
    try:
        temp.write_text(text)
        _sync_and_rename(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file so that it is either absent (or as before) or whole."""
    temp = path.with_suffix(".tmp")
    try:
        save_file(tensors, temp, metadata={"format": "pt"})
        _sync_and_rename(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def _sync_and_rename(temp: Path, path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temp, 0o666 & ~umask)  # safetensors makes files only their owner can read; a server may be another user
    with open(temp, "rb") as f:
        os.fsync(f.fileno())
    os.replace(temp, path)


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one clear error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in str(error).lower():
            raise CheckpointError(f"{out}: the disk is full; free some space and run again with --resume") from error
        if code in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise CheckpointError(f"{out}: cannot be written ({error}); choose another output") from error
        raise

"""Reads safetensors files without trusting them: bounded, checked headers, and one tensor at a time.

Weights are read with plain ``readinto``. No mmap: its pages count as resident memory, and a streamed run must stay
within a few tensors. For the same reason headers are parsed here, and nothing in them is believed before it is checked:
a checkpoint is a download, so it is input and not data of ours.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fewbits.quant.errors import CheckpointError, FewbitsError

MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library itself sets
MAX_JSON_BYTES = 64_000_000  # config.json and the index; the largest indexes known are a few MB

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
})

AGAIN = "download it again"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``nbytes`` at byte ``start`` of shard ``file``, of ``shape`` and ``dtype``."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse and check the header of one safetensors file: tensor name -> entry, in the order of the bytes.

    The rules are those of the safetensors library: tensors lie in the file back to back, without gap or overlap.
    Raises CheckpointError for anything else.
    """
    file = path.name
    try:
        size = _regular_size(path)
        with open(path, "rb", buffering=0) as f:
            if size < 8:
                raise CheckpointError(f"{file}: truncated: {size} bytes, a safetensors file has at least 8; {AGAIN}")
            prefix = bytearray(8)
            _read_full(f, memoryview(prefix), file)
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{file}: the header claims {length} bytes, but the file has {size} "
                                      f"and headers at most {MAX_HEADER_BYTES}; truncated or not safetensors: {AGAIN}")
            raw = bytearray(length)
            _read_full(f, memoryview(raw), file)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read ({e}); check that it exists and is yours to read") from e
    header = _parse_json(bytes(raw), f"{file}: header")
    header.pop("__metadata__", None)
    entries = [(key, _entry_of(file, key, value, 8 + length)) for key, value in header.items()]
    entries.sort(key=lambda item: (item[1].start, item[1].nbytes))
    _check_contiguous(file, entries, 8 + length, size)
    return dict(entries)


def read_tensor(directory: Path, key: str, entry: TensorEntry) -> Tensor:
    """Read one tensor, in the dtype it is stored in, into memory of its own.

    Raises CheckpointError when the file is gone, or shrank since its header was read.
    """
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if entry.nbytes:
        buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with open(directory / entry.file, "rb", buffering=0) as f:
                f.seek(entry.start)
                _read_full(f, buffer, f"{entry.file}: {key}")
        except OSError as e:
            raise CheckpointError(f"{entry.file}: cannot be read ({e}); check the disk, or {AGAIN}") from e
    return tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size; raises CheckpointError when it is none or cannot be read."""
    try:
        size = _regular_size(path)
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name}: {size} bytes, at most {MAX_JSON_BYTES} are read; {AGAIN}")
        return _parse_json(path.read_bytes(), path.name)
    except OSError as e:
        raise CheckpointError(f"{path.name}: cannot be read ({e}); check that it exists and is yours to read") from e


def sha256_file(path: Path) -> str:
    """sha256 of a file, as hex. Cached in the process while its size and modification time stay."""
    try:
        status = path.stat()
        return _sha256(str(path), status.st_size, status.st_mtime_ns)
    except OSError as e:
        raise CheckpointError(f"{path.name}: cannot be read ({e}); check that it exists and is yours to read") from e


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _regular_size(path: Path) -> int:
    """Bytes of a regular file; asked before opening, because opening a named pipe waits for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.name}: is not a regular file; {AGAIN}")
    return status.st_size


def _read_full(f: FileIO, buffer: memoryview, what: str) -> None:
    """``readinto`` until the buffer is full; one call gives at most 2 GB on Linux."""
    done = 0
    while done < len(buffer):
        n = f.readinto(buffer[done:])
        if not n:
            raise CheckpointError(f"{what}: truncated: needed {len(buffer)} bytes, got {done}; {AGAIN}")
        done += n


def _parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys or NaN; CheckpointError for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            double = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{what}: the key {double!r} appears twice; {AGAIN}")
        return out

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except FewbitsError:
        raise
    except (ValueError, RecursionError) as e:  # bad UTF-8, bad JSON, an endless integer, a tower of brackets
        raise CheckpointError(f"{what}: is not valid JSON ({e}); {AGAIN}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: got a JSON {type(value).__name__}, needs an object; {AGAIN}")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**60


def _entry_of(file: str, key: str, value: object, data_start: int) -> TensorEntry:
    """One header record, checked on its own."""
    what = f"{file}: {key[:200]!r}"
    if not key.isprintable() or not key.strip():  # it will be printed, and become a key of files that we write
        raise CheckpointError(f"{what}: is not a printable name; do not trust this checkpoint")
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: got a JSON {type(value).__name__}, needs an object; {AGAIN}")
    dtype, shape, offsets = (value.get(k) for k in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{what}: unknown dtype {str(dtype)[:40]!r}, known: {', '.join(DTYPES)}; "
                              "convert the model to bfloat16 or float16")
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_count, shape)):
        raise CheckpointError(f"{what}: shape {str(shape)[:80]} is not a list of sizes; {AGAIN}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{what}: data_offsets {str(offsets)[:80]} are not two byte counts; {AGAIN}")
    start, end = offsets
    # sizes beside a zero count too, because torch multiplies them for the strides
    if math.prod(max(n, 1) for n in shape) >= 2**60:
        raise CheckpointError(f"{what}: shape {shape} is too large for any memory; {AGAIN}")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != needed:
        raise CheckpointError(f"{what}: shape {shape} of {dtype} needs {needed} bytes, "
                              f"data_offsets {offsets} give {end - start}; {AGAIN}")
    return TensorEntry(file, tuple(shape), DTYPES[dtype], data_start + start, needed)


def _check_contiguous(file: str, entries: list[tuple[str, TensorEntry]], start: int, size: int) -> None:
    """Tensors back to back from ``start`` to the end of the file."""
    position = start
    end = max((e.start + e.nbytes for _, e in entries), default=start)
    if end > size:
        raise CheckpointError(f"{file}: truncated: header promises {end} bytes, file has {size}; {AGAIN}")
    for key, entry in entries:
        if entry.start != position:
            how = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(f"{file}: {key[:200]!r} {how} (at byte {entry.start}, needed {position}); {AGAIN}")
        position += entry.nbytes
    if position != size:
        raise CheckpointError(f"{file}: header promises {position} bytes, file has {size}; {AGAIN}")

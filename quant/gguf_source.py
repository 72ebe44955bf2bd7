"""Turns a GGUF file into a directory of float16 safetensors, once, in the user's cache.

The reading is transformers' own. Its result is what a user of transformers gets from the same file, and keeping it on
disk lets everything else (streaming, hashes, evaluation) know one layout only.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fewbits.quant.errors import ModelError
from fewbits.quant.shards import sha256_file


def cache_root() -> Path:
    """The user's cache directory for fewbits: ``$XDG_CACHE_HOME/fewbits``, or the platform's place for caches."""
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "fewbits"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fewbits"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "fewbits" / "cache"
    return Path.home() / ".cache" / "fewbits"


def dequantized(file: Path) -> Path:
    """The directory that holds ``file`` dequantized, made if need be; keyed by the file's sha256.

    Making it holds the whole dense model in memory, because that is how transformers reads GGUF.

    Raises ModelError when the file is not a GGUF that transformers can read, or the cache cannot be written.
    """
    _check_magic(file)
    target = cache_root() / f"gguf-{sha256_file(file)}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name[:21]}-", dir=target.parent))
    except OSError as e:
        raise ModelError(f"{target.parent}: cannot be written ({e}); set XDG_CACHE_HOME to a place that can") from e
    try:
        _convert(file, work)
        work.chmod(0o755)  # mkdtemp makes it private; a cache directory is as open as its parent
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # else another process finished first, and its copy is as good
                raise
    except (OSError, SafetensorError) as e:  # a full disk is either, depending on which file meets it
        raise ModelError(f"{file.name}: cannot be converted into {target.parent} ({e}); "
                         "free some space, or set XDG_CACHE_HOME to another place") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _check_magic(file: Path) -> None:
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name):
        raise ModelError(f"{file.name}: is one part of a split GGUF; join them first: llama-gguf-split --merge")
    with open(file, "rb") as f:
        head = f.read(8)
    if len(head) < 8 or head[:4] != b"GGUF" or struct.unpack("<I", head[4:])[0] not in (2, 3):
        raise ModelError(f"{file.name}: got a file that starts with {head!r}, needs GGUF version 2 or 3 "
                         "(little-endian); download it again")


def _convert(file: Path, out: Path) -> None:
    """Dequantize ``file`` and save model, tokenizer, chat template and generation config into ``out``."""
    with tempfile.TemporaryDirectory() as alone:
        # Alone in a directory, so that no config.json or tokenizer beside it is mixed in.
        (Path(alone) / file.name).symlink_to(file)
        model, tokenizer = _load(Path(alone), file.name, torch.float16)
        if _overflowed(model):  # float16 is what the scales of GGUF blocks are, but BF16 tensors reach further
            model, tokenizer = _load(Path(alone), file.name, torch.float32)
            if bad := _overflowed(model):
                raise ModelError(f"{file.name}: {bad} has NaN or Inf values; the file is damaged, download it again")
        model.config._name_or_path = ""
        model.save_pretrained(out, max_shard_size="2GB")
        tokenizer.save_pretrained(out)


def _load(directory: Path, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The dense model and the tokenizer. transformers turns the blocks straight into ``dtype``."""
    try:
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as e:
        raise ModelError(f"{name}: reading GGUF needs {e.name}; pip install 'fewbits[gguf]'") from e
    try:
        # GgufConfig, because without it transformers keeps the blocks where it has a kernel for them
        model = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=name, dtype=dtype, quantization_config=GgufConfig(dequantize=True))
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    # The parser is not ours and does not validate: a broken file surfaces as any of these.
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, NotImplementedError,
            OverflowError, struct.error) as e:
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise ModelError(f"{name}: transformers cannot read it ({reason}); it is damaged, or its architecture or "
                         "quantization type is unknown: use the original safetensors model") from e
    return model, tokenizer


def _overflowed(model: torch.nn.Module) -> str | None:
    """Name of the first parameter that holds NaN or Inf."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return name
    return None

"""Opens the model to work on: a Hugging Face id, a directory of safetensors, or a GGUF file."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.quant.errors import CheckpointError, ModelError
from fewbits.quant.shards import AGAIN, TensorEntry, read_header, read_json, read_tensor, sha256_file

MAX_EXTRA_BYTES = 128_000_000  # the largest tokenizer.json known has 35 MB; beyond this it is weights by another name

_NOT_CARRIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".llamafile", ".h5", ".hdf5", ".msgpack", ".onnx",
    ".onnx_data", ".ot", ".npz", ".npy", ".tflite", ".mlmodel", ".nemo", ".engine", ".plan", ".pkl", ".pickle",
    ".joblib", ".tar", ".gz", ".xz", ".zip", ".7z", ".zst",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, validated and open for reading.

    Attributes:
        name: what the user typed.
        path: the local directory, resolved.
        config: config.json.
        entries: tensor name -> where it lies, in the order of the shards and of the bytes in them.
        shards: file names of the weights, sorted.
    """

    name: str
    path: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry] = field(repr=False)
    shards: tuple[str, ...]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(e.nbytes for e in self.entries.values())

    @property
    def revision(self) -> str | None:
        """The commit, when the directory is a snapshot in the hub's cache."""
        return self.path.name if self.path.parent.name == "snapshots" else None

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self.entries)

    def info(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """``(shape, dtype)`` of a tensor. Raises CheckpointError when there is none of that name."""
        entry = self._entry(key)
        return entry.shape, entry.dtype

    def get(self, key: str) -> Tensor:
        """Read one tensor, in the dtype it is stored in, into memory of its own.

        Raises CheckpointError when there is none of that name or the file shrank since it was opened.
        """
        return read_tensor(self.path, key, self._entry(key))

    def hashes(self) -> dict[str, str]:
        """sha256 of each shard and of config.json; a file that did not change is hashed once per process."""
        return {name: sha256_file(self.path / name) for name in ("config.json", *self.shards)}

    def extra_files(self, *, remote_code: bool = False) -> list[Path]:
        """Files to carry over to a copy of the model: tokenizer, chat templates, generation config, licence, README.

        Absolute paths below ``path``, sorted. Never weights in any format, config.json, an index, or hidden files;
        ``*.py`` only with ``remote_code``. Raises CheckpointError for a link that leaves the directory.
        """
        found = [*self.path.iterdir(), *self.path.glob("additional_chat_templates/*.jinja")]
        return sorted(p for p in found if self._carried(p, remote_code))

    def _carried(self, path: Path, remote_code: bool) -> bool:
        name = path.name.lower()
        if name.startswith(".") or name == "config.json" or name.endswith(".index.json") or not path.is_file():
            return False
        if path.suffix.lower() in _NOT_CARRIED or (path.suffix == ".py" and not remote_code):
            return False
        _require_inside(path, self.path)
        return path.stat().st_size <= MAX_EXTRA_BYTES

    def _entry(self, key: str) -> TensorEntry:
        if key not in self.entries:
            raise CheckpointError(f"{key}: not in {self.name}, which has {len(self.entries)} other tensors; "
                                  f"the checkpoint does not fit its config.json, {AGAIN}")
        return self.entries[key]


def open_source(model: str | Path) -> Source:
    """Open MODEL: a hub id (``name`` or ``name@revision``), a directory of safetensors, or a ``.gguf`` file.

    A GGUF file is dequantized to float16 once, into the user's cache directory (``quant/gguf_source.py``).
    Raises ModelError when it is not a model we can read, CheckpointError when its files are broken or hostile.
    """
    name = str(model)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_directory(name, path)
    if path.is_file():
        if _is_gguf(path):
            from fewbits.quant.gguf_source import dequantized

            return _open_directory(name, dequantized(path.resolve()))
        raise ModelError(f"{name}: is a file that is not GGUF; pass the directory that holds it and its config.json")
    looks_local = isinstance(model, Path) or name.startswith((".", "~", "/")) or name.lower().endswith(".gguf")
    if looks_local or not _HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such directory or file, and not a hub id; check the path")
    return _open_directory(name, _download(name))


def require_dense(source: Source) -> None:
    """Raise ModelError when the model is already quantized, so that quantizing it again makes no sense."""
    way_out = "start from the original 16-bit model"
    for config in (source.config, source.config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            quantized = config.get(key) if isinstance(config, Mapping) else None
            if quantized:
                method = quantized.get("quant_method", "?") if isinstance(quantized, Mapping) else "?"
                raise ModelError(f"{source.name}: is already quantized ({key}: {method}); {way_out}")
    for file in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        if (source.path / file).exists():
            raise ModelError(f"{source.name}: is already quantized (it has {file}); {way_out}")
    for key, entry in source.entries.items():
        if key.endswith((".weight_packed", ".qweight")):
            raise ModelError(f"{source.name}: is already quantized ({key}); {way_out}")
        if key.endswith(".weight") and not entry.dtype.is_floating_point:
            raise ModelError(f"{source.name}: {key} holds {entry.dtype}, not floats: already quantized; {way_out}")


def check_finite(key: str, tensor: Tensor) -> None:
    """Raise ModelError naming the tensor when it has NaN or Inf: no method can quantize those."""
    if not tensor.is_floating_point():
        return
    # torch has no isfinite for 8-bit floats
    finite = torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float())
    bad = tensor.numel() - int(finite.sum())
    if bad:
        raise ModelError(f"{key}: {bad} of {tensor.numel()} values are NaN or Inf; the checkpoint is damaged "
                         "or overflowed when it was converted: take another copy, or convert it to bfloat16")


def _open_directory(name: str, path: Path) -> Source:
    path = path.resolve()
    if not (path / "config.json").is_file():
        raise ModelError(f"{name}: has no config.json; pass a model directory as save_pretrained writes it."
                         f"{_other_weights(path)}")
    config = read_json(path / "config.json")
    shards, wanted = _find_shards(name, path)
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        _require_inside(path / shard, path)
        for key, entry in read_header(path / shard).items():
            if key in entries:
                raise CheckpointError(f"{key}: stands in both {entries[key].file} and {shard}; remove the files "
                                      "of the other model from the directory, or download it again")
            entries[key] = entry
    for key, shard in wanted.items():
        if key not in entries or entries[key].file != shard:
            raise CheckpointError(f"{key}: the index says {shard}, which lacks it; {AGAIN}")
    if not entries:
        raise ModelError(f"{name}: its safetensors hold no tensors; {AGAIN}")
    return Source(name, path, config, entries, tuple(shards))


def _find_shards(name: str, path: Path) -> tuple[list[str], dict[str, str]]:
    """File names of the weights, as transformers chooses them, and what the index says of them (key -> shard)."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists():
        return ["model.safetensors"], {}
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index.name}: weight_map is not an object of file names; {AGAIN}")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
                raise CheckpointError(f"{index.name}: names {shard[:200]!r}, which is not a plain name of a "
                                      f".safetensors file in this directory; do not trust this checkpoint")
            if not (path / shard).exists():
                raise CheckpointError(f"{index.name}: names {shard}, which is missing; {AGAIN}")
        return shards, weight_map
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    if any(s.startswith("adapter_model") for s in shards):
        raise ModelError(f"{name}: is a LoRA adapter; merge it into its base model first (peft: merge_and_unload)")
    if not shards:
        raise ModelError(f"{name}: has no .safetensors weights.{_other_weights(path)}")
    return shards, {}


def _other_weights(path: Path) -> str:
    """What else the directory holds that a user may have meant, as a sentence or nothing."""
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        return f" There is a GGUF file: pass its path, {gguf[0]}"
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        return (" Pickle files (.bin, .pt) are never read, because loading one can run any code; convert them where "
                "you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR)")
    return ""


def _require_inside(path: Path, root: Path) -> None:
    """A link may not leave the directory, or a download could make us copy any file of the machine.

    In the hub's cache every file of ``snapshots/<commit>`` is a link into ``blobs`` beside it; that is fine.
    """
    target = path.resolve()
    inside = target.is_relative_to(root)
    cached = root.parent.name == "snapshots" and target.is_relative_to(root.parents[1] / "blobs")
    if not inside and not cached:
        raise CheckpointError(f"{path.name}: is a link to {target}, outside of the model's directory; "
                              "replace it with a copy if you trust it")


def _is_gguf(path: Path) -> bool:
    if path.suffix.lower() == ".gguf":
        return True
    with open(path, "rb") as f:
        return f.read(4) == b"GGUF"


def _download(name: str) -> Path:
    """The hub's snapshot in its own cache: safetensors, configs and tokenizer only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    allow = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*"]
    ignore = ["*/*.safetensors", "*/*.json", "consolidated*.safetensors"]  # copies in other layouts
    failures: tuple[type[Exception], ...] = (
        LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, *_network_errors())
    try:
        path = snapshot_download(repo, revision=revision or None, allow_patterns=allow, ignore_patterns=ignore)
    except GatedRepoError as e:
        raise ModelError(f"{name}: is gated; accept its licence on the hub and run `hf auth login`") from e
    except failures as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(f"{name}: no such directory here, and the hub did not give it either ({reason}); check "
                         "the name and the network, or pass a directory (offline, only cached models are found)") from e
    return Path(path)


def _network_errors() -> tuple[type[Exception], ...]:
    """The base error of the HTTP library that huggingface_hub has imported; which one depends on its version."""
    modules = [sys.modules[name] for name in ("httpx2", "httpx") if name in sys.modules]
    return tuple(m.HTTPError for m in modules)

"""The transformers plug-in: ``AutoModelFor....from_pretrained`` reads fewbits checkpoints once this is registered.

A checkpoint is ``config.json`` with a ``quantization_config`` (see :class:`FewbitsConfig`) and safetensors shards under
names of their own, ``fewbits-*.safetensors``. The names are on purpose: transformers without this plug-in only warns
about an unknown ``quant_method`` and goes on with random weights; finding no ``model.safetensors`` it raises instead.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbits.quant.checkpoint import INDEX, shard_name
from fewbits.quant.errors import CheckpointError, nearest

if TYPE_CHECKING:  # imported in the middle of transformers' own import: its models are imported where they are used
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHOD = "fewbits"
FORMAT_VERSION = 1

_KEYS = ("quant_method", "format_version", "default", "exceptions", "keep", "dequantize")


class FewbitsConfig(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint.

    Attributes:
        default: layout of every weight that can be quantized, embeddings apart, unless named below; e.g. ``int4_g64``.
        exceptions: exact name -> layout. An embedding is quantized only if it is named here.
        keep: exact names of weights that are stored dense.
        format_version: version of this layout on disk.
        dequantize: an option of loading and no property of the checkpoint: give dense modules.

    Exact names and no patterns, because transformers sorts the keys of a config when it saves one, and the first
    matching pattern would then be another one.
    """

    def __init__(
        self,
        default: str | None = None,
        exceptions: dict[str, str] | None = None,
        keep: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        dequantize: bool = False,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # a plain string; transformers' enum is closed
        self.format_version = format_version
        self.default = default
        self.exceptions = {} if exceptions is None else exceptions
        self.keep = [] if keep is None else keep
        self.dequantize = dequantize
        self._check()
        self.exceptions, self.keep = dict(self.exceptions), list(self.keep)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> FewbitsConfig | tuple[FewbitsConfig, dict[str, Any]]:
        """From ``config.json``.

        Raises:
            CheckpointError: a value has the wrong type, a key is unknown, or the version is newer than this one.
        """
        version = config_dict.get("format_version", FORMAT_VERSION)
        _demand(type(version) is int and version <= FORMAT_VERSION, "format_version", version,
                f"an integer up to {FORMAT_VERSION}; if a newer fewbits wrote it, pip install -U fewbits")
        for key in config_dict:
            _demand(key in _KEYS, "unknown key", key, nearest(str(key), list(_KEYS)))
        config = cls(**config_dict)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def _check(self) -> None:
        version = self.format_version
        _demand(type(version) is int and 1 <= version <= FORMAT_VERSION, "format_version", version,
                f"an integer from 1 to {FORMAT_VERSION}")
        _demand(self.default is None or _is_name(self.default), "default", self.default, "a layout such as int4_g64")
        _demand(isinstance(self.exceptions, dict) and all(isinstance(k, str) and _is_name(v)
                                                          for k, v in self.exceptions.items()),
                "exceptions", self.exceptions, "an object of names and layouts")
        _demand(isinstance(self.keep, (list, tuple)) and all(isinstance(n, str) for n in self.keep),
                "keep", self.keep, "a list of names")
        _demand(type(self.dequantize) is bool, "dequantize", self.dequantize, "true or false")

    def get_loading_attributes(self) -> dict[str, Any]:
        """What ``from_pretrained(..., quantization_config=FewbitsConfig(dequantize=True))`` may change."""
        return {"dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "format_version": self.format_version, "default": self.default,
                "exceptions": dict(self.exceptions), "keep": list(self.keep)}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1 << 16  # thousands of runs, to bound what is parsed


def _demand(ok: bool, key: str, got: object, needed: str) -> None:
    if not ok:
        raise CheckpointError(f"quantization_config.{key}: got {str(got)[:80]!r}, needed {needed}")


class FewbitsHfQuantizer(HfQuantizer):
    """The hooks that transformers calls while it loads a checkpoint, in the order in which it calls them."""

    requires_calibration = True  # so that transformers refuses to "quantize on load" with this config
    quantization_config: FewbitsConfig

    def update_attn_implementation(self, config: Any) -> Any:
        # The only hook that sees the config before transformers looks for files.
        config.transformers_weights = INDEX
        # Packed experts are read one by one, which is what the eager forward does; the others want a 3-D tensor.
        config._experts_implementation = "eager"
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from fewbits.kernels.linear import PackedMatrix
        from fewbits.serving.modules import read_headers, replace_modules, resolve, same_folder, verify

        config = self.quantization_config
        _demand(config.default is not None, "default", None, "a layout such as int4_g64; quantize again")
        if not checkpoint_files or not same_folder(checkpoint_files):
            raise CheckpointError(f"checkpoint files: got {checkpoint_files}, needed the shards of one folder; "
                                  "a state_dict= argument cannot replace them")
        headers = read_headers(checkpoint_files)
        plan = resolve(model, config.default or "", exceptions=config.exceptions, keep=config.keep)
        replace_modules(model, plan, set(headers))
        verify(model, headers)
        self._packed = {f"{path}.{name}" for path, m in model.named_modules() if isinstance(m, PackedMatrix)
                        for name in m.packed_tensors()}

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        # The shards have the names of the module tree, so nothing is renamed, merged or split, now or when saving.
        return []

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # transformers' fp32 lists may match the name of a scale; packed tensors are never cast
        return None if not self._packed.isdisjoint(converter.target_patterns) else super().get_new_dtype(
            converter, param, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.quantization_config.dequantize:
            return self._dequantize(model, dtype=model.dtype)
        for name, tensor in model.state_dict().items():
            assert not tensor.is_meta or hasattr(model, "hf_device_map"), f"{name} was not loaded"
        model.save_pretrained = types.MethodType(_save_pretrained, model)  # type: ignore[method-assign]
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        from fewbits.serving.modules import restore_modules

        # model.dequantize() hands over config.dtype, which save_pretrained has turned into a string
        restore_modules(model, dtype if isinstance(dtype, torch.dtype) else model.dtype)
        # A dense model again: it saves under transformers' own names, with the model's own conversions.
        model.__dict__.pop("save_pretrained", None)
        model.__dict__.pop("_weight_conversions", None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Teach transformers the quantization method; any number of times."""
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, FewbitsConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, FewbitsHfQuantizer)
    if FewbitsConfig not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (FewbitsConfig,)  # type: ignore[assignment]


# -- saving -------------------------------------------------------------------------------------------------------


def _save_pretrained(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
) -> None:
    """transformers' ``save_pretrained`` with the file names of a fewbits checkpoint; same arguments.

    Everything is written beside its place first and moved there at the end, the index last.
    """
    if kwargs.get("push_to_hub"):
        raise CheckpointError("push_to_hub: got True, which uploads before files have their names; save to a folder "
                              "and call model.push_to_hub(name) or huggingface_hub.upload_folder")
    write = type(model).save_pretrained
    if not is_main_process:
        write(model, save_directory, is_main_process=False, **kwargs)
        return
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        write(model, staging, **kwargs)
        _rename_weights(staging)
        fresh = {p.name for p in staging.iterdir()}
        if INDEX in fresh:  # shards of an older save with another count would be dead weight
            for old in folder.glob("fewbits-*.safetensors"):
                if old.name not in fresh:
                    old.unlink()
        for path in sorted(staging.iterdir(), key=lambda p: p.name == INDEX):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _rename_weights(folder: Path) -> None:
    """``model*.safetensors`` -> ``fewbits-*.safetensors`` with an index, also for one shard."""
    from fewbits.serving.modules import read_headers

    old_index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards:  # adapters only
        return
    new_names = {p.name: shard_name(i, len(shards)) for i, p in enumerate(shards)}
    mode = (folder / "config.json").stat().st_mode
    headers = read_headers([str(p) for p in shards])
    weight_map = {name: new_names[Path(file).name] for name, (_, _, file) in headers.items()}
    size = sum(p.stat().st_size for p in shards)
    for path in shards:
        path.chmod(mode)  # safetensors makes files that only their owner can read
        path.rename(folder / new_names[path.name])
    old_index.unlink(missing_ok=True)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# -- loading ------------------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> PreTrainedModel:
    """A language model, quantized by fewbits or not, from a folder or the hub, in evaluation mode.

    A causal one, or one of images and text (see :func:`fewbits.quant.architecture.auto_class`).

    Args:
        device: one device for all of it; the first GPU, or else the CPU.
        device_map: as in transformers; excludes ``device``.
        dtype: of activations and dense weights; default float32 on the CPU and ``auto`` (as stored) elsewhere.
        dequantize: give dense modules.

    Raises:
        CheckpointError: the checkpoint is incomplete, malformed or from a newer version.
    """
    from transformers import AutoConfig

    from fewbits.quant.architecture import auto_class

    if device is not None and device_map is not None:
        raise CheckpointError(f"device: got {device} and a device_map, needed one of them")
    if device is None and device_map is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        on_cpu = device_map == "cpu" or (device is not None and torch.device(device).type == "cpu")
        dtype = torch.float32 if on_cpu else "auto"
    common = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(path, **common)
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        if Path(path).is_dir():
            _check_index(Path(path))
        config.quantization_config = {**quantization, "dequantize": dequantize}
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "offload_folder": offload_folder,
                               "device_map": device_map}
    if device is not None and torch.device(device).type != "cpu":
        options["device_map"] = {"": device}
    model = auto_class(config).from_pretrained(
        path, config=config, dtype=dtype, **common, **{k: v for k, v in options.items() if v is not None})
    return model.eval()


def _check_index(folder: Path) -> None:
    """A folder has an index that names files of that folder."""
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: has no {INDEX}, needed beside config.json; the checkpoint is "
                              "incomplete, copy the folder again or finish quantizing it")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{folder / INDEX}: no JSON ({e}); copy the folder again") from e
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    files = set(weight_map.values()) if isinstance(weight_map, dict) and weight_map else {None}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise CheckpointError(f"{folder / INDEX}: got {str(file)[:80]!r} in weight_map, needed the name of a "
                                  "shard in this folder; copy the folder again")


def load_tokenizer(
    path: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, from a folder or the hub."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=trust_remote_code)


def load_processor(path: str | os.PathLike[str]) -> Any:
    """The processor of images and text beside a model; never remote code."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(path, trust_remote_code=False)


register()

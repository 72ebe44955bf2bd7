"""Checkpoints made by rounding to nearest, without the pipeline: the tests of the reader stand on their own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fewbits.quant.bitpack import pack_rows, unpack_rows
from fewbits.quant.formats import parse_layout
from fewbits.quant.quantizers.rtn import RTN
from fewbits.quant.targets import find_targets, read_weight
from fewbits.quant.types import Layout, QuantizedTensor


def round_to_nearest(weight: Tensor, layout: Layout) -> QuantizedTensor:
    """``weight (N, K)`` rounded, run of columns by run of columns, in some order where the layout has one."""
    order = None
    if layout.permuted:
        order = torch.randperm(layout.columns, generator=torch.Generator().manual_seed(layout.columns))
        weight = weight[:, order]
    made, _ = RTN().quantize(weight, None, dataclasses.replace(layout, permuted=False))
    return dataclasses.replace(made, permutation=order)


def quantize(
    source: Path, out: Path, *, default: str = "int4_g32", exceptions: dict[str, str] | None = None,
    keep: tuple[str, ...] = ("lm_head",), shards: int = 2,
) -> PreTrainedModel:
    """Write a checkpoint of ``source`` to ``out``; returns the dense model that holds the dequantized weights."""
    exceptions = exceptions or {}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = dict(model.state_dict())
    tied = dict(model.all_tied_weights_keys)
    with torch.no_grad():
        for target in find_targets(model):
            if target.name in keep or (target.kind == "embedding" and target.name not in exceptions):
                continue
            weight = read_weight(model, target)
            layout = parse_layout(exceptions.get(target.name, default), target.shape[1])
            quantized = round_to_nearest(weight, layout)
            tensors.pop(f"{target.module_path}.{target.param_name}".removeprefix("."), None)
            tensors |= {f"{target.name}.{k}": v for k, v in quantized.pack().items()}
            if f"{target.module_path}.weight" in tied:  # a tied head that is quantized on its own
                module = model.get_submodule(target.module_path)
                module.weight = torch.nn.Parameter(quantized.dequantize())
            else:
                weight.copy_(quantized.dequantize())
    for name in tied:
        tensors.pop(name, None)
    config = {"quant_method": "fewbits", "format_version": 1, "default": default, "exceptions": exceptions,
              "keep": list(keep)}
    write(source, out, tensors, config, shards=shards)
    return model.eval()


def write(source: Path, out: Path, tensors: dict[str, Tensor], config: dict, *, shards: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not file.name.startswith("model"):
            shutil.copy(file, out / file.name)
    full = json.loads((out / "config.json").read_text())
    full["quantization_config"] = config
    (out / "config.json").write_text(json.dumps(full))
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file_name = f"fewbits-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n].clone().contiguous() for n in names[i::shards]}
        save_file(part, out / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    (out / "fewbits.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_ternary(folder: Path) -> None:
    """The 2-bit integers of a checkpoint lose their lowest value: -2 becomes -1."""
    for file in folder.glob("fewbits-*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if n.endswith("weight_packed")]:
            columns = int(tensors[name.replace("_packed", "_shape")][1])
            if tensors[name].shape[1] * 16 == columns:
                tensors[name] = pack_rows(unpack_rows(tensors[name], 2, columns).clamp(min=1), 2)
        save_file(tensors, file, metadata={"format": "pt"})


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the shards that the index names."""
    index = json.loads((folder / "fewbits.safetensors.index.json").read_text())["weight_map"]
    out: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        out |= load_file(folder / file)
    assert set(out) == set(index)
    return out


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(_bytes(a[n]), _bytes(b[n]))
        for n in a)


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def logits(model: PreTrainedModel, length: int = 12) -> Tensor:
    ids = torch.arange(3, 3 + 2 * length).view(2, length)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of ``quantization_config``; a value of None removes the key."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config["quantization_config"][key] = value
        if value is None:
            del config["quantization_config"][key]
    (folder / "config.json").write_text(json.dumps(config))


def config_of(folder: Path) -> dict:
    return AutoConfig.from_pretrained(folder).quantization_config


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tiny, tmp_path_factory: pytest.TempPathFactory):
    """``checkpoint(family, **options of quantize) -> (folder, dense model)``, made once; tests do not write to it."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def make(family: str, **options: object) -> tuple[Path, PreTrainedModel]:
        key = f"{family}{options}"
        if key not in made:
            out = tmp_path_factory.mktemp(f"{family}-fewbits")
            made[key] = (out, quantize(tiny(family), out, **options))
        return made[key]

    return make


@pytest.fixture
def copied(checkpoint, tmp_path: Path):
    """``copied(family, **options) -> Path``: a checkpoint that the test may damage."""

    def make(family: str = "llama", **options: object) -> Path:
        return shutil.copytree(checkpoint(family, **options)[0], tmp_path / "copy")

    return make


# -- exports ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reader():
    """A process that loads exports and has never heard of fewbits."""
    from tests.serving.reader import Reader

    reader = Reader()
    yield reader
    reader.close()


@pytest.fixture(scope="session")
def quantized(tiny, tmp_path_factory: pytest.TempPathFactory):
    """``quantized(family or folder, **recipe keys) -> Path``: a checkpoint of the real pipeline, made once.

    Dots in keys are written as two underscores; ``formats``, by exact name, becomes the recipe's rules.
    """
    import fewbits

    made: dict[str, Path] = {}

    def make(source: str | Path, formats: dict[str, str] | None = None, **keys: object) -> Path:
        key = f"{source}{formats}{keys}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "model"
            overrides = {k.replace("__", "."): v for k, v in keys.items()}
            rules = [{"match": name, "format": fmt} for name, fmt in (formats or {}).items()]
            folder = source if isinstance(source, Path) else tiny(source)
            fewbits.quantize(folder, made[key], recipe="rtn", overrides=overrides | {"rules": rules})
        return made[key]

    return make

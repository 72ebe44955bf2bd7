"""What the tests of all export targets need: models of awkward shapes, every format that fits, and what is on disk."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fewbits.quant.formats import layout_name
from fewbits.quant.plan import format_fact
from fewbits.quant.targets import find_targets
from fewbits.quant.types import QuantizedTensor
from tests.conftest import save_tiny_model
from tests.serving.conftest import write

SYMMETRIC = {"format__symmetric": True}

# Rows that are no multiple of 4 or 8, columns that are odd multiples of a group, rows whose codes fill no whole word.
SHAPES = {
    "48x50": {"hidden_size": 48, "intermediate_size": 50, "head_dim": 10},
    "96x70": {"hidden_size": 96, "intermediate_size": 70, "head_dim": 6},
    "192x80": {"hidden_size": 192, "intermediate_size": 80, "head_dim": 16},
}


def columns_of(layer_projection: str, shape: dict[str, int]) -> int:
    """K of a projection of the tiny Llama with 4 heads."""
    if layer_projection == "o_proj":
        return 4 * shape["head_dim"]
    return shape["intermediate_size"] if layer_projection == "down_proj" else shape["hidden_size"]


def all_formats(bits: Iterable[int], columns: int, symmetric: Iterable[bool], groups=(16, 32, 64)) -> list[str]:
    """Every format with groups of 16, 32, 64 or a row that a matrix with so many columns can have."""
    sizes = ["row", *(f"g{g}" for g in groups if columns % g == 0)]
    return [f"int{b}{'_sym' if s else ''}_{g}" for b, s, g in itertools.product(bits, symmetric, sizes)]


def every_format(
    path: Path, shape: dict[str, int], bits: Iterable[int], symmetric: Iterable[bool]
) -> tuple[Path, dict[str, str]]:
    """A Llama with as many blocks as it takes for each of its K to meet each format, and the format of each linear."""
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    bits, symmetric = list(bits), list(symmetric)
    wanted = {p: all_formats(bits, columns_of(p.split(".")[1], shape), symmetric) for p in projections}
    layers = max(len(wanted["mlp.down_proj"]), len(wanted["self_attn.o_proj"]), -(-len(wanted["mlp.up_proj"]) // 5))
    source = save_tiny_model(path, "llama", num_hidden_layers=layers, **shape)
    formats, given = {}, {p: itertools.cycle(f) for p, f in wanted.items()}
    for p in projections[:3] + projections[4:6]:
        given[p] = given["self_attn.q_proj"]  # these have the same K, and share the list
    for layer, p in itertools.product(range(layers), projections):
        formats[f"model.layers.{layer}.{p}"] = next(given[p])
    return source, formats


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an export, found through its index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    out: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        out |= load_file(folder / file)
    assert set(out) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in out.values())
    return out


def local(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one module."""
    return {k.removeprefix(name + "."): t for k, t in tensors.items() if k.rpartition(".")[0] == name}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def write_checkpoint(source: Path, out: Path, tensors: dict[str, QuantizedTensor]) -> Path:
    """A checkpoint whose codes are given and not found: ``tensors`` by the names of linears, the rest stays dense."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    linears = {t.name: t for t in find_targets(model) if t.kind == "linear"}
    tied = set(model.all_tied_weights_keys)
    stored = {n: t for n, t in model.state_dict().items() if n not in tied and n.removesuffix(".weight") not in tensors}
    facts = [{"name": n, "shape": list(t.shape), "format": "float32", "bits_per_weight": 32.0, "bytes": t.nbytes,
              "linear": False} for n, t in stored.items()]
    for name, tensor in tensors.items():
        stored |= {f"{name}.{k}": t for k, t in tensor.pack().items()}
        facts.append(format_fact(name, tensor.shape, tensor.layout, linear=True))
    config = {
        "quant_method": "fewbits", "format_version": 1, "default": "int2_sym_row",
        "exceptions": {n: layout_name(t.layout) for n, t in tensors.items()}, "keep": sorted(linears.keys() - tensors),
    }
    write(source, out, stored, config, shards=2)
    (out / "plan.json").write_text(json.dumps({"version": 1, "recipe": "given", "tensors": facts}))
    (out / "fewbits.lock").write_text(json.dumps({"seed": 0}))
    return out

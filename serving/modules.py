"""Swap the modules of a model for packed ones and back, and check a checkpoint's files against what they need."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fewbits.kernels.linear import PackedMatrix, QuantEmbedding, QuantExperts, QuantLinear, TiedHead
from fewbits.quant.errors import CheckpointError, FormatError
from fewbits.quant.formats import parse_layout
from fewbits.quant.targets import Target, find_targets
from fewbits.quant.types import Layout, check_permutation

Headers = dict[str, tuple[tuple[int, ...], str, str]]
"""Tensor name -> shape, dtype as safetensors writes it, and the file that holds it."""

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_AGAIN = "the checkpoint does not belong to its config.json or is incomplete; download or quantize it again"


# -- which layout each target has -------------------------------------------------------------------------------


def resolve(
    model: PreTrainedModel, default: str, *, exceptions: Mapping[str, str], keep: Sequence[str]
) -> list[tuple[Target, Layout]]:
    """The targets that are quantized, each with its layout, in module order (see ``FewbitsConfig``).

    Names are exact. A model loaded without its head (``AutoModel``) lacks the prefix of the names; it is put back.

    Raises:
        CheckpointError: a name of ``exceptions`` is no target of this model, or a layout does not fit.
    """
    prefix = f"{model.base_model_prefix}."
    is_base = not hasattr(model, model.base_model_prefix)
    kept, out, used = set(keep), [], set()
    for target in find_targets(model):
        name = f"{prefix}{target.name}" if is_base and prefix != "." else target.name
        if target.name in kept or target.name in exceptions:
            name = target.name
        used.add(name)
        if name in kept or (target.kind == "embedding" and name not in exceptions):
            continue
        out.append((target, _layout(target, exceptions.get(name, default))))
    unknown = sorted(n for n in exceptions if n not in used and not (is_base and not n.startswith(prefix)))
    if unknown:
        raise CheckpointError(f"{unknown[0]}: named in quantization_config.exceptions ({len(unknown)} such names), "
                              f"but {type(model).__name__} has no such weight; {_AGAIN}")
    return out


def _layout(target: Target, name: str) -> Layout:
    rows, columns = target.shape
    try:
        layout = parse_layout(name, columns)
        layout.storage(rows)
        if layout.permuted and target.kind == "embedding":
            raise FormatError(f"layout: got {name!r}, the columns of an embedding are never sorted; {_AGAIN}")
    except FormatError as e:
        raise CheckpointError(f"{target.name}: {e}") from e
    return layout


# -- dense to packed ----------------------------------------------------------------------------------------------


def replace_modules(model: PreTrainedModel, plan: list[tuple[Target, Layout]], stored: set[str]) -> None:
    """Put empty packed modules (on meta) where the plan says; ``stored`` are the names in the checkpoint.

    Raises:
        CheckpointError: only some experts of a fused parameter are quantized, or a weight is tied to one in a way that
            packed tensors cannot be.
    """
    experts: dict[tuple[str, str], list[tuple[Target, Layout]]] = {}
    for target, layout in plan:
        module = model.get_submodule(target.module_path)
        dtype = module.get_parameter(target.param_name).dtype if target.kind != "expert" else None
        if target.kind == "expert":
            experts.setdefault((target.module_path, target.param_name), []).append((target, layout))
        elif isinstance(module, nn.Embedding):
            assert dtype is not None
            QuantEmbedding.replacing(module, layout, dtype=dtype)
        else:
            assert dtype is not None
            new = QuantLinear(layout, target.shape, bias=getattr(module, "bias", None) is not None, dtype=dtype,
                              was_conv1d=target.kind == "conv1d")
            model.set_submodule(target.module_path, new)
    for (path, name), members in experts.items():
        _replace_experts(model.get_submodule(path), path, name, members)
    _untie(model, stored)


def _replace_experts(owner: nn.Module, path: str, name: str, members: list[tuple[Target, Layout]]) -> None:
    param = owner.get_parameter(name)
    if len(members) != param.shape[0]:
        raise CheckpointError(f"{path}.{name}: {len(members)} of {param.shape[0]} experts are quantized, needed all or "
                              f"none; add all of them to keep, or none")
    new = QuantExperts([layout for _, layout in members], members[0][0].shape, dtype=param.dtype)
    del owner._parameters[name]
    owner.add_module(name, new)


def _untie(model: PreTrainedModel, stored: set[str]) -> None:
    """Drop ties of which one end is packed now; a head tied to a packed embedding reads the packed table.

    transformers ties parameters by name, also later (``tie_weights``), so the names are taken out of its tables.
    """
    untied: dict[str, str] = {}
    model.__dict__["_fewbits_untied"] = untied
    for target, source in list(model.all_tied_weights_keys.items()):
        target_path, source_path = target.rpartition(".")[0], source.rpartition(".")[0]
        ends = [model.get_submodule(target_path), model.get_submodule(source_path)]
        if not any(isinstance(m, PackedMatrix) for m in ends):
            continue
        del model.all_tied_weights_keys[target]
        untied[target] = source
        if isinstance(ends[1], PackedMatrix) and not isinstance(ends[0], PackedMatrix) and target not in stored:
            if type(ends[0]) is not nn.Linear or not isinstance(ends[1], QuantEmbedding):
                raise CheckpointError(f"{target}: tied to {source}, which is quantized; only a linear head can be tied "
                                      f"to a quantized embedding; quantize again with {source_path} in keep")
            model.set_submodule(target_path, TiedHead(ends[1], ends[0].bias))
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(module._tied_weights_keys, dict):
            inner = dict(module.named_modules())
            module._tied_weights_keys = {k: v for k, v in module._tied_weights_keys.items()
                                         if not any(_is_packed(inner.get(n.rpartition(".")[0])) for n in (k, v))}


def _is_packed(module: nn.Module | None) -> bool:
    return isinstance(module, (PackedMatrix, TiedHead))


# -- packed to dense ----------------------------------------------------------------------------------------------


def restore_modules(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put dense modules with the dequantized weights back, one at a time.

    Raises:
        CheckpointError: weights are offloaded to disk.
    """
    _refuse_offloaded(model)
    heads = [path for path, m in model.named_modules() if isinstance(m, TiedHead)]
    # paths and not modules, so that each packed weight is freed before the next dense one is made
    for path in [p for p, m in model.named_modules() if isinstance(m, (QuantLinear, QuantEmbedding, QuantExperts))]:
        module = model.get_submodule(path)
        if isinstance(module, QuantExperts):
            owner, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            dense = torch.stack([module[e].to(dtype) for e in range(len(module))])
            delattr(owner, name)
            owner.register_parameter(name, nn.Parameter(dense))
        elif isinstance(module, QuantLinear):
            _swap(model, path, _dense_linear(module, dtype))
        elif isinstance(module, QuantEmbedding):
            hook = _take_hook(module)
            module.restore(module.dense().to(dtype))
            _give_hook(module, hook)
    for path in heads:
        head = model.get_submodule(path)
        assert isinstance(head, TiedHead)
        new = _bare_linear(head.in_features, head.out_features, head.bias)
        new.weight = head.table.weight  # type: ignore[assignment]  # a dense parameter by now: tied again
        _swap(model, path, new)
    _tie_again(model, heads)


def _tie_again(model: PreTrainedModel, heads: list[str]) -> None:
    """transformers' tables of ties say again what holds: a head that had its own weights stays on its own."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__dict__.pop("_tied_weights_keys", None)
    for target, source in model.__dict__.pop("_fewbits_untied", {}).items():
        if target.rpartition(".")[0] in heads:
            model.all_tied_weights_keys[target] = source
        else:
            model.config.get_text_config().tie_word_embeddings = False
            model.config.tie_word_embeddings = False


def _dense_linear(module: QuantLinear, dtype: torch.dtype) -> nn.Module:
    weight = module.dense().to(dtype)
    if module.was_conv1d:
        with torch.device("meta"):
            conv = Conv1D(module.out_features, module.in_features)
        conv.weight, conv.bias = nn.Parameter(weight.T.contiguous()), module.bias
        return conv
    new = _bare_linear(module.in_features, module.out_features, module.bias)
    new.weight = nn.Parameter(weight)
    return new


def _bare_linear(columns: int, rows: int, bias: nn.Parameter | None) -> nn.Linear:
    new = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    if bias is not None:
        new.bias = bias
    return new


def _refuse_offloaded(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, PackedMatrix) and any(t.is_meta for t in module.packed_tensors().values()):
            raise CheckpointError(f"{path}: offloaded, so it cannot be dequantized in place; load the model without "
                                  "offloading (device_map='cpu')")


def _swap(model: nn.Module, path: str, new: nn.Module) -> None:
    old = model.get_submodule(path)
    new.train(old.training)
    hook = _take_hook(old)
    model.set_submodule(path, new)
    _give_hook(new, hook)


def _take_hook(module: nn.Module) -> Any:
    """accelerate moves inputs between devices with a hook that wraps ``forward``; it has to move house as well."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module)
    return hook


def _give_hook(module: nn.Module, hook: Any) -> None:
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, hook)


# -- files against modules ------------------------------------------------------------------------------------------


def read_headers(files: Sequence[str]) -> Headers:
    """Names, shapes and dtypes of all tensors in the files; no weight is read.

    Raises:
        CheckpointError: a file is missing or no safetensors file, or two hold the same name.
    """
    out: Headers = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118  (it is no dict)
                    if name in out:
                        raise CheckpointError(f"{name}: stored in {out[name][2]} and in {file}; {_AGAIN}")
                    info = f.get_slice(name)
                    out[name] = (tuple(info.get_shape()), info.get_dtype(), file)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file}: cannot be read ({e}), needed a complete safetensors file; {_AGAIN}") from e
    return out


def verify(model: PreTrainedModel, headers: Headers) -> None:
    """Every tensor that the model needs is stored with the right shape and dtype, and every ``weight_shape`` and
    ``weight_perm`` is right.

    transformers only warns about a missing tensor and draws it at random, so this runs before it loads anything.

    Raises:
        CheckpointError: naming the first tensor that is wrong.
    """
    needed = model.state_dict()
    packed = {_join(path, name) for path, m in model.named_modules() if isinstance(m, PackedMatrix)
              for name in m.packed_tensors()}
    stored = _as_named_in(model, headers, needed)
    tied = model.all_tied_weights_keys
    optional = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    for name, tensor in needed.items():
        if name not in stored:
            twins = {tied.get(name)} | {t for t, s in tied.items() if s == name}
            if not twins.isdisjoint(stored) or any(p.search(name) for p in optional):
                continue
            raise CheckpointError(f"{name}: missing, needed {tuple(tensor.shape)} {tensor.dtype}; {_AGAIN}")
        shape, dtype, _ = headers[stored[name]]
        exact = name in packed or not tensor.is_floating_point()
        if shape != tuple(tensor.shape) or dtype not in ((_DTYPES[tensor.dtype],) if exact else _FLOATS):
            raise CheckpointError(f"{name}: got {shape} {dtype}, needed {tuple(tensor.shape)} "
                                  f"{_DTYPES.get(tensor.dtype, tensor.dtype)}; {_AGAIN}")
    _verify_nothing_beside(model, stored, needed)
    _verify_shapes(model, headers, stored)


def _as_named_in(model: PreTrainedModel, headers: Headers, needed: Mapping[str, Any]) -> dict[str, str]:
    """Name in the model -> name in the files, where the two may differ by the prefix of the base model."""
    prefix = f"{model.base_model_prefix}."
    out = {}
    for name in headers:
        options = (name, f"{prefix}{name}", name.removeprefix(prefix))
        out[next((n for n in options if n in needed), name)] = name
    return out


def _verify_nothing_beside(model: nn.Module, stored: Mapping[str, str], needed: Mapping[str, Any]) -> None:
    """No tensor of a packed weight is left over: it would mean another format than the config names."""
    modules = dict(model.named_modules())
    for name in stored:
        owner, _, leaf = name.rpartition(".")
        if name not in needed and leaf.startswith("weight") and owner in modules:
            raise CheckpointError(f"{name}: stored, but {type(modules[owner]).__name__} needs none; {_AGAIN}")


def _verify_shapes(model: nn.Module, headers: Headers, stored: Mapping[str, str]) -> None:
    """The stored ``weight_shape`` is the shape of the module, and a ``weight_perm`` is a permutation."""
    by_file: dict[str, list[tuple[str, PackedMatrix]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedMatrix):
            for leaf in ("weight_shape", "weight_perm")[: 1 + module.layout.permuted]:
                name = _join(path, leaf)
                by_file.setdefault(headers[stored[name]][2], []).append((name, module))
    for file, members in by_file.items():
        with safe_open(file, framework="pt") as f:
            for name, module in members:
                _verify_values(name, f.get_tensor(stored[name]), module)


def _verify_values(name: str, tensor: torch.Tensor, module: PackedMatrix) -> None:
    if name.endswith("weight_perm"):
        try:
            check_permutation(tensor, module.columns)
        except FormatError as e:
            raise CheckpointError(f"{name}: {e}") from e
    elif (got := tuple(tensor.tolist())) != (module.rows, module.columns):
        raise CheckpointError(f"{name}: got {got}, needed {(module.rows, module.columns)}; {_AGAIN}")


def same_folder(files: Sequence[str]) -> bool:
    """An index may not send us elsewhere: shards stand side by side."""
    return len({Path(f).parent for f in files}) == 1


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

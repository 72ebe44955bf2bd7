"""Which weights of a model can be quantized: found by type, never by a model's name.

Works on a model whose parameters are on the meta device. The pipeline and the loader both call :func:`find_targets`,
so that what is written is what is read.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Kind = Literal["linear", "conv1d", "expert", "embedding"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Target:
    """One matrix of a model that can be quantized.

    Attributes:
        name: its name in a checkpoint: the module's path; of an expert ``<module path>.<parameter>.<index>``.
        module_path: path of the module that owns the parameter.
        kind: ``conv1d`` is transformers' transposed linear; its parameter is ``(K, N)``.
        param_name: parameter of the module, e.g. ``weight`` or ``gate_up_proj``.
        expert_index: index into the fused ``(E, N, K)`` parameter, or None.
        shape: ``(N, K)`` of the weight as it is quantized; an embedding has N rows (tokens).
    """

    name: str
    module_path: str
    kind: Kind
    param_name: str
    expert_index: int | None
    shape: tuple[int, int]


def find_targets(model: nn.Module) -> list[Target]:
    """Every weight that can be quantized, in module order, experts by index.

    Embeddings are listed too (whether they are quantized is the recipe's choice). A weight tied to another one is
    listed under each module that has it. A module reached by several paths is listed under the first.
    """
    return [target for path, module in model.named_modules() for target in _targets_of(path, module)]


def find_unquantizable(model: nn.Module) -> dict[str, str]:
    """Parameters that look like weights of linears and yet are no targets: full name -> reason."""
    out: dict[str, str] = {}
    for path, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if param.ndim == 3 and not isinstance(module, _CONVOLUTIONS):
                if (reason := expert_obstacle(module, name)) is not None:
                    out[_join(path, name)] = reason
            elif name == "weight" and isinstance(module, nn.Linear) and type(module) is not nn.Linear:
                out[_join(path, name)] = f"{type(module).__name__} changes what nn.Linear does with its weight"
            elif name == "weight" and isinstance(module, nn.Embedding) and not _plain_embedding(module):
                out[_join(path, name)] = f"{type(module).__name__} changes what nn.Embedding does with its weight"
    return out


def read_weight(model: nn.Module, target: Target) -> Tensor:
    """The weight of a target as ``(N, K)``: a view of the module's parameter, in its dtype and on its device."""
    return as_matrix(getattr(model.get_submodule(target.module_path), target.param_name).detach(), target)


def as_matrix(param: Tensor, target: Target) -> Tensor:
    """The part of a module's parameter (or of its gradient) that belongs to a target, as ``(N, K)``: a view."""
    if target.kind == "conv1d":
        return param.T
    return param if target.expert_index is None else param[target.expert_index]


def _targets_of(path: str, module: nn.Module) -> Iterator[Target]:
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        yield Target(path, path, "linear", "weight", None, (module.out_features, module.in_features))
    elif type(module) is Conv1D:
        yield Target(path, path, "conv1d", "weight", None, (module.weight.shape[1], module.weight.shape[0]))
    elif isinstance(module, nn.Embedding):
        if _plain_embedding(module):
            yield Target(path, path, "embedding", "weight", None, (module.num_embeddings, module.embedding_dim))
    elif not isinstance(module, _CONVOLUTIONS):
        for name, param in module.named_parameters(recurse=False):
            if param.ndim == 3 and expert_obstacle(module, name) is None:
                for e in range(param.shape[0]):
                    shape = (param.shape[1], param.shape[2])
                    yield Target(f"{_join(path, name)}.{e}", path, "expert", name, e, shape)


def _plain_embedding(module: nn.Embedding) -> bool:
    """A lookup that only ``nn.Embedding.forward`` reads the weight of: a subclass may scale rows or shift ids."""
    return module.max_norm is None and not _uses(type(module), "weight")  # type: ignore[arg-type]


def expert_obstacle(module: nn.Module, param_name: str) -> str | None:
    """Why a 3-D parameter cannot be quantized expert by expert, or None when it can.

    It can if the module's own code reads it only as ``linear(x, self.param[i])``: then a stand-in whose item ``i`` is
    the weight of expert ``i`` is all that the code needs. Transposed layouts (``x @ self.param[i]``, ``bmm``) hold
    ``(E, K, N)`` and are refused rather than quantized along the wrong axis.
    """
    if getattr(module, "is_transposed", False):
        return "experts are stored transposed (E, K, N); only (E, N, K) can be quantized"
    uses = _uses(type(module), param_name)  # type: ignore[arg-type]  # mypy: a metaclass is no Hashable
    if not uses:
        return f"the code of {type(module).__name__} never reads it by name, so its layout cannot be known"
    if not all(uses):
        return f"{type(module).__name__} does not read it as linear(x, self.{param_name}[i]) everywhere"
    return None


_INIT_METHODS = ("__init__", "_init_weights", "reset_parameters")
_METADATA = ("dtype", "device", "shape", "ndim")


@functools.lru_cache(maxsize=1024)
def _uses(cls: type, name: str) -> tuple[bool, ...]:
    """For each read of ``self.<name>`` in the methods of ``cls`` and its bases: is it ``linear(x, self.<name>[i])``?"""
    found: list[bool] = []
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == "torch" or base is object:
            continue
        for method in vars(base).values():
            if inspect.isfunction(method) and method.__name__ not in _INIT_METHODS:
                found += _uses_in(inspect.unwrap(method), name)
    return tuple(found)


def _uses_in(method: object, name: str) -> list[bool]:
    try:
        source = textwrap.dedent(inspect.getsource(method))  # type: ignore[arg-type]
    except (OSError, TypeError):  # defined where there is no file: nothing is known about it
        return [False]
    tree = ast.parse(source)
    linear_reads, metadata_reads = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _METADATA:
            metadata_reads.add(id(node.value))
        if isinstance(node, ast.Call) and _last_name(node.func) == "linear" and len(node.args) >= 2:
            weight = node.args[1]
            if isinstance(weight, ast.Subscript) and not isinstance(weight.slice, (ast.Slice, ast.Tuple)):
                linear_reads.add(id(weight.value))
    return [
        id(node) in linear_reads
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == name and _last_name(node.value) == "self"
        and id(node) not in metadata_reads
    ]


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

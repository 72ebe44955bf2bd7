"""Modules that hold packed weights and multiply by them: linear, embedding, experts, and a head tied to an embedding.

The tensors of a checkpoint are the state of a module, byte for byte: a float tensor of a format (scales) keeps its
stored dtype when the module is cast, because a cast scale is another weight. What a kernel reads is derived from them
at the first forward and kept out of the state dict. No dense weight is kept anywhere.

Integer tensors are parameters, so that offloading moves them. Float tensors are buffers: ``model.dtype`` of
transformers is the dtype of the first float parameter, and the dtype of a scale says nothing about the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewbits.kernels.dispatch import Prepared, dequantize, dequantize_rows, matmul, prepare
from fewbits.kernels.rotation import rotate_in, rotate_out
from fewbits.quant.errors import FormatError
from fewbits.quant.rotation import Rotation, rotated_back
from fewbits.quant.types import (
    Layout,
    LowRank,
    QuantizedTensor,
    check_low_rank,
    check_permutation,
    check_rotation,
    natural_columns,
)


class WeightView:
    """What ``module.weight`` is: dtype, device and shape for free; any other use dequantizes for that use alone.

    Model code asks a weight for its dtype to cast activations, and a few models multiply by it themselves.
    """

    _is_hf_initialized = True  # transformers must not initialize what it cannot see the inside of
    requires_grad = False
    is_cuda = property(lambda self: self.device.type == "cuda")
    ndim = property(lambda self: len(self.shape))

    def __init__(self, owner: PackedMatrix) -> None:
        self._owner = owner
        self.shape = torch.Size((owner.rows, owner.columns))
        self.dtype = owner.compute_dtype
        self.device = owner.packed_tensors()["weight_shape"].device

    def dense(self) -> Tensor:
        """``(N, K)`` in the compute dtype; not kept."""
        return self._owner.dense()

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def real(value: Any) -> Any:
            return value.dense() if isinstance(value, WeightView) else value

        return func(*(real(a) for a in args), **{k: real(v) for k, v in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.dense() @ other


class PreparedRuns(NamedTuple):
    """Attributes:
    runs: columns of a run, and what a kernel reads of it.
    order: ``(K,)``, which input each stored column is multiplied by; None: the columns are in their own order.
    rotation: the basis of the codes; None: that of the inputs and outputs.
    low_rank: what is added to the codes, as it is stored.
    """

    runs: list[tuple[slice, Prepared]]
    order: Tensor | None
    rotation: Rotation | None
    low_rank: LowRank | None


class PackedMatrix(nn.Module):
    """The packed tensors of one ``(N, K)`` weight, on the meta device until they are loaded.

    Attributes:
        layout: runs of columns, and whether they are sorted.
        rows, columns: N, K.
        compute_dtype: dtype of what is computed; follows ``.to(dtype)``, unlike the packed tensors.
        round_inputs: what inputs go through before they are multiplied, in a simulation; None: nothing.
    """

    layout: Layout
    rows: int
    columns: int
    compute_dtype: torch.dtype
    round_inputs: Callable[[Tensor], Tensor] | None = None
    _packed_names: tuple[str, ...]

    def __init__(self, layout: Layout, shape: tuple[int, int], *, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self._register_packed(layout, shape, dtype)

    def _register_packed(self, layout: Layout, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.layout, (self.rows, self.columns), self.compute_dtype = layout, shape, dtype
        storage = layout.storage(self.rows)
        self._packed_names = tuple(storage)
        for name, (size, stored) in storage.items():
            tensor = torch.empty(size, dtype=stored, device="meta")
            if stored.is_floating_point or name == "weight_shape":
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def packed_tensors(self) -> dict[str, Tensor]:
        """Names of the checkpoint (local) -> tensors, as stored."""
        own: dict[str, Any] = {**self._parameters, **self._buffers}
        return {name: own[name] for name in self._packed_names}

    def quantized(self) -> QuantizedTensor:
        """The weight as a value; its ``pack()`` returns the stored bytes again."""
        return QuantizedTensor.unpack({k: v.detach() for k, v in self.packed_tensors().items()}, self.layout)

    def assign(self, tensors: dict[str, Tensor]) -> None:
        """Take packed tensors (``QuantizedTensor.pack()``) without a copy.

        Raises:
            FormatError: a tensor is missing, or has the wrong shape or dtype.
        """
        for name, old in self.packed_tensors().items():
            new = tensors.get(name)
            if new is None or new.shape != old.shape or new.dtype != old.dtype:
                got = "none" if new is None else f"{tuple(new.shape)} {new.dtype}"
                raise FormatError(f"{name}: got {got}, the layout needs {tuple(old.shape)} {old.dtype}")
            setattr(self, name, new if name in self._buffers else nn.Parameter(new, requires_grad=False))
        self.__dict__.pop("_prepared", None)

    def prepared(self) -> PreparedRuns:
        """What a kernel reads of every run of columns. Made at first use, shared until a tensor changes."""
        tensors = self.packed_tensors()
        if (kept := self.__dict__.get("_prepared")) is not None:
            sources, state = kept
            if all(a is b for a, b in zip(sources, tensors.values())):
                return state
        runs, start = [], 0
        for i, (fmt, columns) in enumerate(self.layout.runs):
            suffix = f"_{i}" if i else ""
            local = {k: tensors[f"{k}{suffix}"].detach() for k in fmt.storage(self.rows, columns)}
            runs.append((slice(start, start + columns), prepare(fmt, local, self.rows, columns)))
            start += columns
        order = check_permutation(tensors["weight_perm"], self.columns).long() if self.layout.permuted else None
        basis = check_rotation(tensors, self.layout, self.rows)
        rotation = None if basis is None else basis.float()
        low_rank = None
        if rank := self.layout.low_rank:
            low_rank = check_low_rank(tensors, self.rows, self.columns, rank)
        state = PreparedRuns(runs, order, rotation, low_rank)
        # An offloading hook puts the tensors back to disk after each forward: keeping them here would defeat it.
        if not getattr(getattr(self, "_hf_hook", None), "offload", False):
            self.__dict__["_prepared"] = (list(tensors.values()), state)
        return state

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x (..., K)`` -> ``(..., N)`` in the dtype of ``x``, and ``bias (N,)``."""
        state, own = self.prepared(), x
        if state.order is not None:
            x = x.index_select(-1, state.order)
        inner = x
        if state.rotation is not None:
            # matrix units take no float32
            inner = rotate_in(x, state.rotation, x.dtype if x.is_cuda else torch.float32)
        if self.round_inputs is not None:
            inner = self.round_inputs(inner)
        (columns, first), *rest = state.runs
        y = matmul(inner[..., columns] if rest else inner, first)
        for columns, part in rest:
            y = y + matmul(inner[..., columns], part)
        if state.rotation is not None:
            y, bias = rotate_out(y, state.rotation, x.dtype, bias), None
        if (term := state.low_rank) is not None:
            y = y + own @ term.b.to(x.dtype).T @ term.a.to(x.dtype).T
        return y if bias is None else y + bias.to(y.dtype)

    def dense(self) -> Tensor:
        """``(N, K)`` in the compute dtype, made anew."""
        state = self.prepared()
        stored = torch.cat([dequantize(p) for _, p in state.runs], dim=1)
        if state.rotation is not None:
            stored = rotated_back(stored, state.rotation)
        stored = stored if state.order is None else natural_columns(stored, state.order)
        return (stored if state.low_rank is None else stored + state.low_rank.dense()).to(self.compute_dtype)

    def forward(self) -> Tensor:
        # A forward, because that is where offloading hooks bring the tensors in.
        return self.dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.__dict__.pop("_prepared", None)
        packed = {id(t) for t in self.packed_tensors().values()}

        def keep_dtype(t: Tensor) -> Tensor:
            out = fn(t)
            return out if id(t) not in packed or out.dtype == t.dtype else t.to(out.device)

        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.__dict__.pop("_prepared", None)
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_prepared"}

    def extra_repr(self) -> str:
        from fewbits.quant.formats import layout_name

        return f"{self.columns} -> {self.rows}, {layout_name(self.layout)}"


class QuantLinear(PackedMatrix, nn.Linear):
    """``y = x W^T + b`` with a packed weight. An ``nn.Linear``, so that code which looks for one finds it.

    Attributes:
        was_conv1d: it stands for transformers' ``Conv1D``, whose dense weight is ``(K, N)``.
    """

    def __init__(
        self, layout: Layout, shape: tuple[int, int], *, bias: bool, dtype: torch.dtype, was_conv1d: bool = False
    ) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which would make a dense weight
        self.out_features, self.in_features = shape
        self.was_conv1d = was_conv1d
        self._register_packed(layout, shape, dtype)
        empty = nn.Parameter(torch.empty(shape[0], dtype=dtype, device="meta")) if bias else None
        self.register_parameter("bias", empty)

    @property
    def weight(self) -> WeightView:  # type: ignore[override]
        return WeightView(self)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``x (..., K)`` -> ``(..., N)`` in the dtype of ``x``."""
        return self.project(x, self.bias)


class QuantEmbedding(PackedMatrix, nn.Embedding):
    """A lookup in a packed table; only the rows asked for are dequantized."""

    dense_class: type[nn.Embedding]

    @staticmethod
    def replacing(module: nn.Embedding, layout: Layout, *, dtype: torch.dtype) -> QuantEmbedding:
        """Turn ``module`` into a quantized one in place, so that what a subclass adds (a scale, an offset) stays."""
        shape = (module.num_embeddings, module.embedding_dim)
        del module._parameters["weight"]
        module.__dict__["dense_class"] = type(module)
        module.__class__ = _quant_embedding_class(type(module))  # type: ignore[arg-type]
        assert isinstance(module, QuantEmbedding)
        module._register_packed(layout, shape, dtype)
        return module

    def restore(self, weight: Tensor) -> None:
        """Back to the dense module it was, with this ``weight (N, K)``."""
        self.__dict__.pop("_prepared", None)
        for name in self._packed_names:
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        for name in ("layout", "rows", "columns", "compute_dtype", "_packed_names"):
            del self.__dict__[name]
        self.__class__ = self.__dict__.pop("dense_class")
        self.register_parameter("weight", nn.Parameter(weight))

    @property
    def weight(self) -> WeightView:  # type: ignore[override]
        return WeightView(self)

    def forward(self, index: Tensor) -> Tensor:  # type: ignore[override]
        """``index (...)`` -> ``(..., K)`` in the compute dtype."""
        rows = [dequantize_rows(p, index) for _, p in self.prepared().runs]
        return (rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)).to(self.compute_dtype)


@functools.lru_cache(maxsize=256)
def _quant_embedding_class(cls: type) -> type[QuantEmbedding]:
    """``super().forward`` in ``cls`` shall mean :meth:`QuantEmbedding.forward`, so that goes behind it in the order."""
    return QuantEmbedding if cls is nn.Embedding else type(f"Quant{cls.__name__}", (cls, QuantEmbedding), {})


class TiedHead(nn.Linear):
    """A linear that reads the packed table of an embedding, and owns nothing but its bias."""

    table: QuantEmbedding

    def __init__(self, table: QuantEmbedding, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = table.rows, table.columns
        self.__dict__["table"] = table  # not a submodule: its tensors are stored, moved and counted once
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> WeightView:  # type: ignore[override]
        return WeightView(self.table)

    def quantized(self) -> QuantizedTensor:
        return self.table.quantized()

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., K)`` -> ``(..., N)`` in the dtype of ``x``."""
        hook = getattr(self.table, "_hf_hook", None)
        if hook is not None:  # bring an offloaded table in, as a call of the embedding would
            (x,), _ = hook.pre_forward(self.table, x)
        y = self.table.project(x)
        if hook is not None:
            y = hook.post_forward(self.table, y)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class QuantExperts(nn.Module):
    """Stands for a fused expert parameter ``(E, N, K)``: item ``i`` is the dense weight of expert ``i``, made anew.

    Enough for code that only reads ``linear(x, experts.param[i])``, which is what ``quant.targets`` demands.
    """

    def __init__(self, layouts: list[Layout], shape: tuple[int, int], *, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = torch.Size((len(layouts), *shape))
        for e, layout in enumerate(layouts):
            self.add_module(str(e), PackedMatrix(layout, shape, dtype=dtype))
        self._is_hf_initialized = True  # transformers takes it for a parameter of its owner

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix(0).compute_dtype

    @property
    def device(self) -> torch.device:
        return self.matrix(0).packed_tensors()["weight_shape"].device

    @property
    def ndim(self) -> int:
        return 3

    def __len__(self) -> int:
        return self.shape[0]

    def matrix(self, index: int) -> PackedMatrix:
        """The packed weight of one expert."""
        module = self._modules[str(range(len(self))[index])]
        assert isinstance(module, PackedMatrix)
        return module

    def quantized(self) -> list[QuantizedTensor]:
        return [self.matrix(e).quantized() for e in range(len(self))]

    def __getitem__(self, index: int | Tensor) -> Tensor:
        if (isinstance(index, Tensor) and index.ndim) or isinstance(index, (slice, tuple)):
            raise FormatError("experts: got several indices at once, packed experts are read one by one; "
                              "call model.set_experts_implementation('eager')")
        return self.matrix(int(index))()

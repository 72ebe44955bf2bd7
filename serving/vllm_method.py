"""What vLLM calls: which of its layers are quantized, what their tensors are called, and the product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from fewbits.kernels.dispatch import dequantize_rows
from fewbits.quant.errors import CheckpointError, FormatError
from fewbits.quant.formats import parse_layout
from fewbits.quant.types import Layout
from fewbits.serving.tensor_parallel import column_splits
from fewbits.serving.transformers import FewbitsConfig
from fewbits.serving.vllm import METHOD
from fewbits.serving.vllm_loading import AGAIN, Loading, Share


class FewbitsVllmConfig(QuantizationConfig):
    """``quantization_config`` of a checkpoint, asked layer by layer (see :class:`FewbitsConfig`)."""

    def __init__(self, config: FewbitsConfig) -> None:
        super().__init__()
        if config.default is None:
            raise CheckpointError("quantization_config.default: got none, needed a layout such as int4_g64; "
                                  "quantize again")
        self.default = config.default
        self.exceptions = dict(config.exceptions)
        self.keep = list(config.keep)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # what the Triton kernels are compiled for

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it stands in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FewbitsVllmConfig:
        found = FewbitsConfig.from_dict(config)
        assert isinstance(found, FewbitsConfig)
        return cls(found)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Modules have other names in some of vLLM's models."""
        self.exceptions = hf_to_vllm_mapper.apply_dict(self.exceptions)
        self.keep = hf_to_vllm_mapper.apply_list(self.keep)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How the layer of this name is loaded and multiplied by; None where it is none of ours.

        Raises:
            CheckpointError: a layer whose weights cannot be read.
        """
        if isinstance(layer, VocabParallelEmbedding):
            head = isinstance(layer, ParallelLMHead)
            name = prefix or self._only_table()
            layout = self._layout_of(name) if head else self.exceptions.get(name)
            if layout is not None:
                return FewbitsTableMethod(name, {name: layout})
            return DenseHeadMethod() if head else None
        if isinstance(layer, LinearBase):
            names = self._parts_of(prefix)
            layouts = {n: self._layout_of(n) for n in names}
            if all(v is None for v in layouts.values()):
                return UnquantizedLinearMethod()
            dense = [n for n, v in layouts.items() if v is None]
            if dense:
                raise CheckpointError(f"{dense[0]}: is dense, but vLLM makes one layer of it and of others that are "
                                      f"quantized ({', '.join(names)}); quantize all of them, or add all to keep")
            return FewbitsLinearMethod(prefix, {n: v for n, v in layouts.items() if v is not None})
        if any(c.__name__ in ("RoutedExperts", "FusedMoE") for c in type(layer).__mro__):
            raise CheckpointError(f"{prefix}: mixtures of experts cannot be read by the vLLM plug-in; quantize with "
                                  "--target vllm, and fewbits export --to compressed-tensors")
        return None

    def _only_table(self) -> str:
        """The embedding of the checkpoint: vLLM's Llama, for one, does not say which it is building."""
        found = [n for n in self.exceptions if "emb" in (leaf := n.rpartition(".")[2]) or leaf == "wte"]
        return found[0] if len(found) == 1 else ""

    def _layout_of(self, name: str) -> str | None:
        return None if name in self.keep else self.exceptions.get(name, self.default)

    def _parts_of(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the weights that make up a layer."""
        parent, dot, leaf = prefix.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]


class FewbitsLinearMethod(LinearMethodBase):
    """One layer of packed weights.

    Attributes:
        prefix: name of the layer.
        layouts: name in the checkpoint of each of its weights -> name of its layout, in the order of their rows.
    """

    def __init__(self, prefix: str, layouts: Mapping[str, str]) -> None:
        self.prefix = prefix
        self.layouts = dict(layouts)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Names for vLLM's loader to find. Memory is taken when a weight is whole, of the size that it has."""
        layouts = {n: _parse(n, layout, input_size) for n, layout in self.layouts.items()}
        parts = input_size // input_size_per_partition
        for name, layout in layouts.items():
            if parts not in (sizes := column_splits(layout)):
                raise CheckpointError(f"{name}: tensor_parallel_size {parts} would cut a group of the columns of "
                                      f"{self.layouts[name]}, K = {input_size}; possible here: "
                                      f"{', '.join(map(str, sizes))}")
        share = Share(
            rows=sum(output_partition_sizes), columns=input_size_per_partition, tp_size=getattr(layer, "tp_size", 1),
            loader=extra_weight_attrs["weight_loader"], padded=isinstance(layer, VocabParallelEmbedding),
            device=torch.empty(0).device, dtype=params_dtype)
        loading = Loading(self.prefix, layouts, share)
        layer.__dict__["fewbits_loading"] = loading
        stored = {k: dtype for layout in layouts.values() for k, dtype in layout.dtypes.items()}
        for local, dtype in stored.items():
            param = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            param.weight_loader = loading.loader_of(local)  # type: ignore[attr-defined]
            layer.register_parameter(local, param)

    def process_weights_after_loading(self, layer: Any) -> None:
        """The packed matrices take the place of what was there to be found.

        Raises:
            CheckpointError: a weight is not stored, or only in part.
        """
        loading = layer.__dict__.pop("fewbits_loading", None)
        if loading is None:
            return
        for local in {k for layout in loading.layouts.values() for k in layout.dtypes}:
            delattr(layer, local)
        matrices = loading.finish()
        layer.packed = nn.ModuleList(matrices)
        for matrix in matrices:
            matrix.prepared()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x (..., K)`` -> ``(..., N)`` in the dtype of ``x``; N and K are those of this device."""
        parts = [matrix.project(x) for matrix in layer.packed]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if bias is None else y + bias


class FewbitsTableMethod(FewbitsLinearMethod):
    """An embedding, or a head with weights of its own. vLLM pads the vocabulary; the rows stored are the real ones."""

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """``input_ (...)``, rows of this device -> ``(..., K)``."""
        (matrix,) = layer.packed
        rows = [dequantize_rows(p, input_) for _, p in matrix.prepared().runs]
        return torch.cat(rows, dim=-1).to(matrix.compute_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = super().apply(layer, x)
        y = nn.functional.pad(y, (0, layer.num_embeddings_per_partition - y.shape[-1]))
        return y if bias is None else y + bias

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        return layer  # a head that is named in the checkpoint has codes of its own


class DenseHeadMethod(UnquantizedEmbeddingMethod):
    """A head that is not quantized; if the model ties it to an embedding that is, the embedding does its work."""

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        if isinstance(embed_tokens.quant_method, FewbitsTableMethod):
            return embed_tokens
        return super().tie_weights(layer, embed_tokens)


def _parse(name: str, layout: str, columns: int) -> Layout:
    try:
        found = parse_layout(layout, columns)
        _ = found.dtypes
    except FormatError as e:
        raise CheckpointError(f"{name}: {e}; {AGAIN}") from e
    return found

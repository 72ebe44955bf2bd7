"""What GGUF says of a model besides its weights: architecture, tensor names and the order of rows, sizes, rope."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.quant.errors import FormatError, ModelError, RecipeError
from fewbits.serving.export.stored import Stored


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp has a family of models.

    Attributes:
        name: in ``gguf.MODEL_ARCH_NAMES``.
        rotates_pairs: rope turns columns 2i and 2i + 1 of a head together, where transformers turns i and i + d/2:
            the rows of q and k are stored in that order.
        biases: linears that may have a bias.
        rope_freqs: whether factors of the rope's frequencies can be stored as a tensor.
    """

    name: str
    rotates_pairs: bool = False
    biases: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    rope_freqs: bool = False


_LLAMA = Architecture("llama", rotates_pairs=True, rope_freqs=True, biases=(
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}
"""``model_type`` of config.json -> what llama.cpp calls it."""


def require_gguf() -> Any:
    """The package ``gguf``; raises RecipeError without it."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise RecipeError("--to gguf: needs the package gguf, which is not installed; "
                          "pip install 'fewbits[gguf]'") from error


def architecture(stored: Stored) -> Architecture:
    """Raises ModelError for a family, or a variant of it, that is not written."""
    config = stored.model.config
    if config.model_type not in ARCHITECTURES:
        raise ModelError(f"model_type: got {config.model_type!r}, gguf takes {', '.join(ARCHITECTURES)}; use the "
                         "checkpoint with fewbits")
    if config.hidden_act not in ("silu", "swish"):
        raise ModelError(f"hidden_act: got {config.hidden_act!r}, llama.cpp computes {config.model_type} with silu; "
                         "use the checkpoint with fewbits")
    found = ARCHITECTURES[config.model_type]
    for name in stored.entries:
        linear = name.removesuffix(".bias").rpartition(".")[2]
        if name.endswith(".bias") and linear not in found.biases:
            raise ModelError(f"{name}: llama.cpp's {found.name} has no such bias; use the checkpoint with fewbits")
    return found


def rows_of(arch: Architecture, name: str, config: Any) -> Tensor | None:
    """Which row of ``name`` (q or k, weight or bias) comes first, second and so on; None: all in order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    linear = next((part for part in name.split(".") if part in heads), None)
    if not arch.rotates_pairs or linear is None:
        return None
    rows = heads[linear] * head_dim(config)
    return torch.arange(rows).view(heads[linear], 2, -1).transpose(1, 2).flatten()


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def namer(arch: Architecture, blocks: int) -> Callable[[str], str]:
    """``name of ours -> name in GGUF``, both with ``.weight`` or ``.bias``; raises FormatError for one it has not."""
    gguf = require_gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(kinds[arch.name], blocks)

    def name(ours: str) -> str:
        found: str | None = known.get_name(ours, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise FormatError(f"{ours}: has no place in a GGUF of the architecture {arch.name}; use the checkpoint "
                              "with fewbits")
        return found

    return name


def add_metadata(writer: Any, stored: Stored) -> list[str]:
    """Sizes and constants of the model. Returns warnings.

    Raises:
        ModelError: rope of a kind that is not written.
    """
    config = stored.model.config
    named = stored.config.get("_name_or_path") or stored.path.resolve().name
    writer.add_name(named.rstrip("/").rpartition("/")[2])
    writer.add_quantized_by("fewbits")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim(config))
    _add_rope(writer, config)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return [f"sliding_window = {window}: llama.cpp lets {config.model_type} attend to everything, so beyond "
                f"{window} tokens its outputs differ from transformers'"]
    return []


_YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}


def _add_rope(writer: Any, config: Any) -> None:
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    if rope.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ModelError("partial_rotary_factor: llama.cpp turns whole heads of this architecture; use the checkpoint "
                         "with fewbits")
    writer.add_rope_freq_base(rope["rope_theta"])
    kinds = require_gguf().RopeScalingType
    if kind == "linear":
        writer.add_rope_scaling_type(kinds.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn" and not set(rope) - _YARN:
        writer.add_rope_scaling_type(kinds.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):
        extra = ", ".join(sorted(set(rope) - _YARN))
        raise ModelError(f"rope_parameters: got {kind!r}{f' with {extra}' * bool(extra)}, gguf takes default, linear, "
                         "llama3, and yarn with a factor alone; use the checkpoint with fewbits")


def rope_factors(arch: Architecture, config: Any) -> Tensor | None:
    """What llama.cpp divides each frequency of the rope by, float32 ``(head_dim / 2,)``; None: nothing.

    Raises:
        ModelError: the architecture takes none, and the model needs them.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    if not arch.rope_freqs:
        raise ModelError(f"rope_parameters: got 'llama3', llama.cpp's {arch.name} has none; use the checkpoint with "
                         "fewbits")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config)
    return config.rope_parameters["rope_theta"] ** -steps / scaled

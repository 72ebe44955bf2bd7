"""Which transformers class a model is: the one place that knows of models beyond causal language models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def auto_class(config: Any) -> Any:
    """The Auto class that builds and loads the model of a config.

    ``AutoModelForCausalLM`` where it knows the config (or leaves it to remote code), else
    ``AutoModelForImageTextToText`` where that does.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = type(config)
    only_with_images = kind not in AutoModelForCausalLM._model_mapping
    known = kind in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if only_with_images and known else AutoModelForCausalLM


def empty_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model that a folder's config.json describes, parameters on the meta device. Raises what transformers does.

    Args:
        dtype: of the parameters; None: as transformers chooses.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        return auto_class(config).from_config(config, **({} if dtype is None else {"dtype": dtype}))


def takes_images(model: Any) -> bool:
    """Whether a model continues text that images stand in."""
    from transformers import AutoModelForImageTextToText

    mapping: Any = AutoModelForImageTextToText._model_mapping
    return type(model.config) in mapping and type(model) is mapping[type(model.config)]

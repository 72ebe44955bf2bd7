"""The vLLM plug-in: ``vllm serve DIR`` reads fewbits checkpoints where fewbits is installed beside vLLM.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. What it
registers is in ``vllm_method.py``, which cannot be imported without vLLM.
"""

from __future__ import annotations

METHOD = "fewbits"


def register() -> None:
    """Teach vLLM the quantization method; any number of times."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if METHOD not in QUANTIZATION_METHODS:
        from fewbits.serving.vllm_method import FewbitsVllmConfig

        register_quantization_config(METHOD)(FewbitsVllmConfig)

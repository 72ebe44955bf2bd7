"""Shared fixtures: tiny random models made from configs, so that no test needs a hub or a network."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports them: no hub, and Triton kernels run in the interpreter where there is no GPU.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of reference texts and task files named by FEWBITS_DATA; the test is skipped without it."""
    path = os.environ.get("FEWBITS_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip("FEWBITS_DATA is not set to a folder of reference data")
    return Path(path)


def tiny_config(family: str, **overrides: object):
    """A config of the named family small enough to run in milliseconds (hidden 64, 2 layers, 256 tokens)."""
    import transformers as tf

    common = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }
    families = {
        "llama": (tf.LlamaConfig, {}),
        "llama-tied": (tf.LlamaConfig, {"tie_word_embeddings": True}),
        "qwen3": (tf.Qwen3Config, {"head_dim": 16}),
        "qwen3-moe": (tf.Qwen3MoeConfig, {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                          "moe_intermediate_size": 32, "decoder_sparse_step": 1}),
        "mistral": (tf.MistralConfig, {"sliding_window": 32}),
        "gemma": (tf.GemmaConfig, {"head_dim": 16, "tie_word_embeddings": True}),
        "phi": (tf.PhiConfig, {}),
        "opt": (tf.OPTConfig, {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": True}),
        "gpt2": (tf.GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96}),
    }
    cls, extra = families[family]
    kwargs = {**common, **extra, **overrides}
    if family == "gpt2":
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings"):
            kwargs.pop(name, None)
    if family == "opt":
        for name in ("intermediate_size", "num_key_value_heads"):
            kwargs.pop(name, None)
    return cls(**kwargs)


FAMILIES = ["llama", "llama-tied", "qwen3", "qwen3-moe", "mistral", "gemma", "phi", "opt", "gpt2"]


def save_tokenizer(path: Path, *, chat: bool = False) -> None:
    """A byte-level tokenizer of 256 entries (three special), enough to turn any text into tokens below 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet[:253])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<pad>"))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if chat:
        fast.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    fast.save_pretrained(path)


def save_tiny_model(path: Path, family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0,
                    max_shard_size: str | None = None, chat: bool = False, **overrides: object) -> Path:
    """A tiny random model of the family with a tokenizer, saved as a user would have it on disk."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).to(dtype)
    with torch.no_grad():  # the default init of 0.02 makes every logit alike; spread them so that tests can tell
        for p in model.parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.15)
    model.save_pretrained(path, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    save_tokenizer(path, chat=chat)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """``tiny(family) -> Path``: a tiny random model on disk, made once per session."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny_model(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make

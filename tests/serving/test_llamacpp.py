"""llama.cpp itself reads what the export writes, and computes nearly the same: it rounds activations to 8 bits.

FEWBITS_LLAMACPP names the interpreter of an environment that has llama-cpp-python; skipped without it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fewbits
from fewbits.serving.export import export
from tests.serving.conftest import make_ternary

pytest.importorskip("gguf")

_PEER = os.environ.get("FEWBITS_LLAMACPP")
_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peer_llamacpp.py"
_TEXT = "the other thee theatre 4242, it's\n\n  là-bas! Über 100 km"

pytestmark = pytest.mark.skipif(not _PEER, reason="FEWBITS_LLAMACPP is not set to an interpreter with llama-cpp-python")


def _llama3(original: int) -> dict[str, object]:
    return {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": original}


def _given(name: str, *more: str) -> dict[str, object]:
    return {"rules": [{"match": match, "format": name} for match in ("*_proj", *more)]}


_CASES: dict[str, tuple[str, dict, dict]] = {
    "Q4_0": ("llama", {}, {}),
    "Q4_1": ("llama", {}, {"format.symmetric": False}),
    "Q5_0": ("llama", {}, {"format.bits": 5}),
    "Q5_1": ("llama", {}, {"format.bits": 5, "format.symmetric": False}),
    "Q8_0 rows, head too": ("llama", {}, {"format.bits": 8, "format.group_size": "row", "lm_head": True}),
    "TQ2_0": ("llama", {"intermediate_size": 512}, {"format.bits": 2, "format.group_size": 256}),
    "TQ1_0": ("llama", {"intermediate_size": 512}, {"format.bits": 2, "format.group_size": 256}),
    "MXFP4": ("llama", {}, _given("mxfp4")),
    "NVFP4, head too": ("qwen3", {"head_dim": 64}, _given("nvfp4", "lm_head")),
    "TQ2_0 of ternary_g256": ("llama", {"intermediate_size": 512}, _given("ternary_g256")),
    "TQ1_0 of ternary_row": ("llama", {"intermediate_size": 512}, _given("ternary_row")),
    "tied table": ("llama", {"tie_word_embeddings": True},
                   {"rules": [{"match": "model.embed_tokens", "format": "int8_sym_g32"}]}),
    "tied head of its own": ("llama", {"tie_word_embeddings": True},
                             {"rules": [{"match": "lm_head", "format": "int4_sym_g64"}]}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "heads of another size": ("llama", {"head_dim": 128}, {}),
    "mistral": ("mistral", {"sliding_window": None}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 32}, {}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}, {}),
    "llama3 rope": ("llama", {"rope_parameters": _llama3(64)}, {}),
    "yarn rope": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                                                "original_max_position_embeddings": 64}}, {}),
}


def _tiny(folder: Path, family: str, overrides: dict) -> Path:
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | overrides)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.08)
    model.save_pretrained(folder)
    _byte_level(folder)
    return folder


def _byte_level(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*letters, "th", "the", "Ġthe", "42"])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e"), ("Ġ", "the"), ("4", "2")]))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def _sentencepiece(folder: Path) -> None:
    letters = ["▁", *"abehortmk'01249,!"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("o", "t"), ("ot", "he"), ("othe", "r"), ("▁", "othe")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *map("".join, merges)]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, unk_token="<unk>",
                               byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)


def _by_llama_cpp(ours: Path, folder: Path, *allow: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """A window of tokens, llama.cpp's logits of it, and its tokens of the text."""
    export(ours, folder / "m.gguf", to="gguf", allow=allow)
    window = torch.randint(3, 250, (1, 192), generator=torch.Generator().manual_seed(1))
    np.save(folder / "windows.npy", window.numpy())
    (folder / "text.txt").write_text(_TEXT)
    subprocess.run([str(_PEER), str(_SCRIPT), "score", str(folder / "m.gguf"), "--windows", str(folder / "windows.npy"),
                    "--out", str(folder / "scores.npz"), "--text", str(folder / "text.txt")], check=True)
    scores = np.load(folder / "scores.npz")
    return window, torch.from_numpy(scores["logits"]), scores["ids"].tolist()


@pytest.mark.parametrize("case", _CASES)
def test_llama_cpp_computes_nearly_the_same(case: str, tmp_path: Path) -> None:
    family, overrides, recipe = _CASES[case]
    dense, ours = _tiny(tmp_path / "dense", family, overrides), tmp_path / "ours"
    settings = {"format.group_size": 32, "format.symmetric": True} | recipe
    fewbits.quantize(dense, ours, recipe="rtn", overrides=settings)
    if case == "TQ1_0":
        make_ternary(ours)
    window, found, ids = _by_llama_cpp(ours, tmp_path, *["ternary"] * case.startswith("TQ1_0"))
    with torch.no_grad():
        want = fewbits.load(ours, device="cpu", dtype=torch.float32)(input_ids=window).logits[0]
    error = float((found - want).norm() / want.norm())
    assert error < 0.08, error  # 0.027 of Q4_0, 0.045 of TQ2_0; more than 1 with a rope that is wrong
    assert float((found.argmax(-1) == want.argmax(-1)).float().mean()) > 0.9
    assert ids == AutoTokenizer.from_pretrained(ours).encode(_TEXT, add_special_tokens=False)


def test_llama_cpp_splits_text_like_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    dense, ours = _tiny(tmp_path / "dense", "llama", {}), tmp_path / "ours"
    _sentencepiece(dense)
    fewbits.quantize(dense, ours, recipe="rtn", overrides={"format.group_size": 32, "format.symmetric": True})
    _, _, ids = _by_llama_cpp(ours, tmp_path)
    assert ids == AutoTokenizer.from_pretrained(ours).encode(_TEXT, add_special_tokens=False)

"""GGUF files: dequantized once into the cache, and one clear error for what cannot be."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
import torch

from fewbits.quant import gguf_source
from fewbits.quant.errors import ModelError
from fewbits.quant.source import open_source, require_dense


def tiny_gguf(path: Path, *, overflow: bool = False) -> Path:
    """A llama of one layer, 32 wide, written by the gguf package: Q8_0 matrices, float norms, five tokens."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (5, 32), "output": (5, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (32, 32),
              "blk.0.attn_v": (32, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32),
              "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        raw = gguf.quantize(rng.standard_normal(shape, dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.full(32, 1e6 if overflow else 1.5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fewbits"


def test_gguf_is_dequantized_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_gguf(tmp_path / "tiny.gguf")
    source = open_source(file)
    assert source.name == str(file) and source.path.parent == cache
    assert [p.name for p in cache.iterdir()] == [f"gguf-{hashlib.sha256(file.read_bytes()).hexdigest()}"]
    import gguf

    raw = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight")
    expected = torch.from_numpy(gguf.dequantize(raw.data, raw.tensor_type)).half()
    assert torch.equal(source.get("model.layers.0.mlp.up_proj.weight"), expected)
    assert {"tokenizer.json", "chat_template.jinja"} <= {p.name for p in source.extra_files()}
    assert "quantization_config" not in source.config
    require_dense(source)
    monkeypatch.setattr(gguf_source, "_convert", None)  # the second time must not convert
    assert open_source(file).hashes() == source.hashes()


def test_gguf_beyond_float16_is_kept_in_float32(tmp_path: Path, cache: Path) -> None:
    source = open_source(tiny_gguf(tmp_path / "tiny.gguf", overflow=True))
    norm = source.get("model.norm.weight")
    assert norm.dtype == torch.float32 and (norm == 1e6).all()


def test_gguf_that_is_broken(tmp_path: Path, cache: Path) -> None:
    whole = tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    for raw in (b"", b"GGUF", b"GGUF" + struct.pack("<I", 99), whole[:40], whole[:700], whole[:-100]):
        (tmp_path / "bad.gguf").write_bytes(raw)
        with pytest.raises(ModelError, match=r"bad\.gguf"):
            open_source(tmp_path / "bad.gguf")
        assert not list(cache.glob("*")) if cache.exists() else True  # nothing half made is left behind
    (tmp_path / "x-00001-of-00002.gguf").write_bytes(whole)
    with pytest.raises(ModelError, match="split GGUF"):
        open_source(tmp_path / "x-00001-of-00002.gguf")


def test_gguf_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="XDG_CACHE_HOME"):
        open_source(tiny_gguf(tmp_path / "tiny.gguf"))

"""``fewbits doctor``: what it says of an engine is what the export to it does, and what its loader does."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import fewbits
from fewbits.cli.main import main
from fewbits.quant.errors import CheckpointError, FewbitsError
from fewbits.serving.doctor import diagnose
from fewbits.serving.export import export
from tests.conftest import save_tiny_model


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    """``make(default, {pattern: format}) -> checkpoint`` of a tiny llama with 4 heads and 2 key-value heads."""
    root = tmp_path_factory.mktemp("doctor")
    model = save_tiny_model(root / "model", "llama")

    def quantized(default: str, more: dict[str, str] | None = None) -> Path:
        rules = [{"match": k, "format": v} for k, v in {**(more or {}), "model.layers.*": default}.items()]
        out = root / f"m{len(list(root.iterdir()))}"
        fewbits.quantize(model, out, recipe="rtn", overrides={"rules": rules})
        return out

    return quantized


def verdicts(directory: Path) -> dict[str, dict]:
    return {v["engine"].split(" with compressed")[0]: v for v in diagnose(directory).to_json()["engines"]}


def test_what_every_engine_reads(make) -> None:
    found = verdicts(make("int4_sym_g32"))
    assert {k: v["reads"] for k, v in found.items()} == {
        "transformers with fewbits": "yes", "transformers": "after export", "vLLM": "after export",
        "vLLM with fewbits' plug-in": "with plug-in", "SGLang": "after export", "llama.cpp": "after export",
    }
    assert "Marlin" in found["vLLM"]["kernel"] and "4 bits" in found["vLLM"]["kernel"]


@pytest.mark.parametrize("default, more", [
    ("int4_sym_g32", {}), ("int4_g32", {}), ("int3_sym_g32", {}), ("int8_sym_g32", {"*.o_proj": "int2_sym_g32"}),
    ("int4_sym_g32", {"*.q_proj": "int8_sym_g32"}), ("int8_sym_row", {}),
])
def test_it_promises_what_the_export_does(make, tmp_path: Path, default: str, more: dict[str, str]) -> None:
    checkpoint = make(default, more)
    for name, verdict in verdicts(checkpoint).items():
        targets = {"transformers": "compressed-tensors", "llama.cpp": "gguf"}
        if name not in targets:
            continue
        out = tmp_path / ("m.gguf" if name == "llama.cpp" else "folder")
        if verdict["reads"] == "after export":
            words = shlex.split(verdict["how"])
            assert words[:2] == ["fewbits", "export"] and words[words.index("--to") + 1] == targets[name]
            export(checkpoint, out, to=targets[name])
        else:
            with pytest.raises(FewbitsError) as refusal:
                export(checkpoint, out, to=targets[name])
            assert verdict["reads"] == "no" and verdict["reasons"][0].split(":")[0] in str(refusal.value)


def test_what_is_fused_must_be_alike(make) -> None:
    found = verdicts(make("int4_sym_g32", {"*.k_proj": "int8_sym_g32"}))
    assert found["vLLM"]["reads"] == "no" and "k_proj: is int8_sym_g32 and q_proj int4_sym_g32" in str(found["vLLM"])
    assert found["transformers"]["reads"] == "after export"


def test_ranks_that_the_packed_weights_can_be_cut_into(make) -> None:
    """o_proj has 64 columns and down_proj 96: groups of 32 give halves of o_proj, and no halves of three groups."""
    assert verdicts(make("int4_sym_g32"))["vLLM"]["tensor_parallel"] == [1]
    assert verdicts(make("int4_sym_g16"))["vLLM with fewbits' plug-in"]["tensor_parallel"] == [1, 2]
    assert verdicts(make("int8_sym_row"))["vLLM"]["tensor_parallel"] == [1, 2, 4]


def test_traps(make) -> None:
    mixed = diagnose(make("int4_sym_g32", {"*.o_proj": "int3_sym_g32"})).traps
    assert any("dequantize=True" in t for t in mixed) and any("3 bits" in t and "0.18" in t for t in mixed)
    assert any("scales are float16 and the model is float32" in t for t in mixed)
    plain = diagnose(make("int4_sym_g32_f32")).traps
    assert not any("dequantize=True" in t or "scales" in t for t in plain)


def test_command(make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = make("int4_sym_g32")
    assert main(["doctor", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == diagnose(checkpoint).to_json()
    assert main(["doctor", str(checkpoint)]) == 0 and "llama.cpp" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path)]) == 2
    with pytest.raises(CheckpointError):
        diagnose(tmp_path)

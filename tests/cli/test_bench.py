"""``fewbits bench`` on tiny models: figures that add up, kernels that are those that run, and clear errors."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.cli.main import main
from fewbits.eval.bench import bytes_per_token, stream_bandwidth
from fewbits.kernels.coded import CODED_KERNELS
from fewbits.kernels.dispatch import KERNELS, select_kernel
from fewbits.kernels.explain import explain
from fewbits.quant.formats import EXAMPLES, parse_format
from fewbits.quant.shards import read_header


def bytes_of(folder: Path) -> int:
    return sum(e.nbytes for file in folder.glob("*.safetensors") for e in read_header(file).values())


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "model"
    fewbits.quantize(tiny("llama"), out, recipe="rtn", overrides={"format.group_size": 32})
    return out


def test_the_report(quantized, tiny, tmp_path, capsys):
    started = time.monotonic()
    assert main(["bench", str(quantized), "--baseline", str(tiny("llama")), "--new-tokens", "8", "--rounds", "2",
                 "--threads", "1", "--json", str(tmp_path / "r.json")]) == 0
    taken = time.monotonic() - started
    found = json.loads((tmp_path / "r.json").read_text())
    for side in ("", "baseline_"):
        rate = found[f"{side}decode_tokens_per_s"]
        assert 2 * 8 / rate < taken and found[f"{side}prefill_tokens_per_s"] > 0
        assert found[f"{side}bandwidth_bytes_per_s"] == pytest.approx(rate * found[f"{side}bytes_per_token"])
        assert found[f"{side}peak_rss_bytes"] > 50 << 20 and found[f"{side}dtype"] == "float32"
    table = 256 * 64 * 4  # looked up
    assert found["bytes_per_token"] == pytest.approx(bytes_of(quantized) - table, abs=64 * 4)
    assert found["baseline_bytes_per_token"] == pytest.approx(bytes_of(tiny("llama")) - table, abs=64 * 4)
    assert found["stream_bytes_per_s"] > 1e8 and found["threads"] == 1 and found["rounds"] == 2
    assert len(found["kernels"]) == 14 and {k["layout"] for k in found["kernels"]} == {"int4_g32"}
    printed = capsys.readouterr().err
    assert "decode tokens/s" in printed and "decoding reaches" in printed and found["kernels"][0]["name"] in printed


@pytest.mark.parametrize("family", ["llama-tied", "gemma"])
def test_a_table_that_is_the_head_is_read(family, tiny):
    model = fewbits.load(tiny(family))
    assert bytes_per_token(str(tiny(family)), model) == bytes_of(tiny(family))


def test_only_experts_that_a_token_goes_to_are_read(tiny):
    model, folder = fewbits.load(tiny("qwen3-moe")), tiny("qwen3-moe")
    experts = sum(e.nbytes for file in folder.glob("*.safetensors") for n, e in read_header(file).items()
                  if ".experts." in n)
    assert experts > 0
    assert bytes_per_token(str(folder), model) == pytest.approx(
        bytes_of(folder) - experts / 2 - 256 * 64 * 4, abs=64 * 4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 512])
def test_explained_is_what_dispatch_takes(device, tokens):
    for name in [*EXAMPLES, "int5_row", "int8_sym_g64"]:
        fmt = parse_format(name)
        choice = explain(fmt, tokens, device)
        assert choice.kernel == select_kernel(fmt, tokens, torch.device(device)), name
        assert choice.kernel not in choice.rejected and all(choice.rejected.values())
        others = {n for n in (*KERNELS, *CODED_KERNELS) if n.endswith(("gemv", "gemm"))}
        assert choice.rejected.keys() & others, f"{name}: nothing is said of the others"


def test_streaming_is_no_slower_than_a_disk():
    assert stream_bandwidth(1, nbytes=1 << 24) > 1e8


def test_bad_input_is_one_line(tmp_path, quantized, capsys):
    assert main(["bench", str(tmp_path / "nothing")]) == 2
    assert main(["bench", str(quantized), "--baseline", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2

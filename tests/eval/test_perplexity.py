"""Perplexity and divergence against loops that anyone can check by eye."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fewbits.eval import logits as logits_module
from fewbits.eval.divergence import divergence, divergence_of
from fewbits.eval.logits import token_kl, window_logits
from fewbits.eval.perplexity import perplexity
from fewbits.eval.scoring import score_windows
from fewbits.eval.text import choose_window, cut_windows
from fewbits.quant.errors import FewbitsError, ModelError

torch.set_num_threads(1)

FAMILIES = ["llama", "llama-tied", "qwen3-moe", "gemma", "opt", "gpt2"]


@pytest.fixture(scope="module")
def models(tiny):
    """``models(family)``: a tiny model and one a little off it."""
    from transformers import AutoModelForCausalLM

    made = {}

    def make(family):
        if family not in made:
            model, other = (AutoModelForCausalLM.from_pretrained(tiny(family)).eval() for _ in range(2))
            torch.manual_seed(1)
            with torch.no_grad():
                for p in other.parameters():
                    p.add_(0.01 * torch.randn_like(p))
            made[family] = model, other
        return made[family]

    return make


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 256, (1000,), generator=torch.Generator().manual_seed(0))


def naive_perplexity(model, tokens, window):
    """The loop of the field's scripts: whole windows side by side, logits shifted by one."""
    losses = []
    for i in range(len(tokens) // window):
        ids = tokens[i * window:(i + 1) * window].unsqueeze(0)
        with torch.no_grad():
            logits = model(ids).logits
        losses.append(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def naive_strided(model, tokens, window, stride):
    """Each token by itself, with the context its window gives it."""
    nll, covered, begin = [], 1, 0
    while begin + window <= len(tokens):
        with torch.no_grad():
            log_probs = model(tokens[begin:begin + window].unsqueeze(0)).logits[0].log_softmax(-1)
        for t in range(covered, begin + window):
            nll.append(-log_probs[t - begin - 1, tokens[t]].item())
        covered, begin = begin + window, begin + stride
    return math.exp(sum(nll) / len(nll)), len(nll)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_the_naive_loop(models, tokens, family):
    model, _ = models(family)
    result = perplexity(model, tokens, window=64)
    assert result.value == pytest.approx(naive_perplexity(model, tokens, 64), rel=1e-5)
    assert result.tokens == 15 * 63
    assert result.value == pytest.approx(math.exp(result.nll))
    assert 0 < result.stderr < result.value


@pytest.mark.parametrize("window, stride", [(64, 16), (32, 31), (16, 1)])
def test_strided_perplexity(models, tokens, window, stride):
    model, _ = models("llama")
    expected, count = naive_strided(model, tokens[:200], window, stride)
    result = perplexity(model, tokens[:200], window=window, stride=stride)
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert result.tokens == count


def test_bos_before_each_window(models, tokens):
    model, _ = models("llama")
    result = perplexity(model, tokens[:31], window=32, bos=1)
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor([1]), tokens[:31]]).unsqueeze(0)).logits[0]
    assert result.value == pytest.approx(math.exp(F.cross_entropy(logits[:-1], tokens[:31]).item()), rel=1e-5)
    assert result.tokens == 31


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_results_do_not_depend_on_the_chunk(models, tokens, rows, monkeypatch):
    model, other = models("llama")
    windows = cut_windows(tokens, window=64, stride=40, limit=3)
    whole = score_windows(other, windows, baseline=model)
    monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", rows * 256)
    for a, b in zip(whole, score_windows(other, windows, baseline=model)):
        for name in ("nll", "baseline_nll", "kl", "agree"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-6)


def test_models_that_change_their_logits_after_the_head():
    """Gemma 2 caps them; taking them from the head would be silently wrong."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=0.5)).eval()
    ids = torch.arange(10)
    with torch.no_grad():
        expected = model(ids.unsqueeze(0)).logits[0]
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(window_logits(model, ids)(2, 9), expected[2:9])


def naive_kl(model, other, rows):
    """By the definition, in float64, at every position."""
    values = []
    for row in rows:
        with torch.no_grad():
            p, q = (m(row.unsqueeze(0)).logits[0].double().log_softmax(-1) for m in (model, other))
        values.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(values).mean().item()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_divergence_is_that_of_the_naive_loop(models, tokens, family):
    model, other = models(family)
    rows = list(tokens[:960].view(15, 64))
    result = divergence(other, model, rows)
    assert result.kl_mean == pytest.approx(naive_kl(model, other, rows), rel=1e-4)
    assert result.positions == 960
    with torch.no_grad():
        same = [(model(r[None]).logits.argmax(-1) == other(r[None]).logits.argmax(-1)).float().mean() for r in rows]
    assert result.top1_agreement == pytest.approx(torch.stack(same).mean().item(), abs=1e-6)
    assert 0 < result.kl_stderr < result.kl_mean
    assert abs(result.nll_increase) < 10 * result.nll_increase_stderr + 0.1


def test_equal_models_do_not_diverge(models, tokens):
    model, _ = models("llama")
    result = divergence(model, model, [tokens[:64], tokens[64:100]])
    assert (result.kl_mean, result.kl_stderr, result.top1_agreement, result.nll_increase) == (0, 0, 1, 0)


def test_the_error_of_the_divergence_is_the_spread_over_texts(models):
    model, other = models("llama")
    generator = torch.Generator().manual_seed(3)
    runs = [divergence(other, model, torch.randint(3, 256, (10, 32), generator=generator)) for _ in range(30)]
    spread = np.std([r.kl_mean for r in runs], ddof=1)
    assert spread / 2 < np.mean([r.kl_stderr for r in runs]) < spread * 2


def test_token_kl_keeps_its_digits_and_survives_masked_words():
    torch.manual_seed(0)
    a = torch.randn(5, 1000) * 5 + 100
    b = a + 1e-2 * torch.randn_like(a)
    exact = (a.double().softmax(1) * (a.double().log_softmax(1) - b.double().log_softmax(1))).sum(1)
    torch.testing.assert_close(token_kl(a.log_softmax(1), b.log_softmax(1)), exact, rtol=0.01, atol=0)
    assert token_kl(a.log_softmax(1), (a + 30).log_softmax(1)).abs().max() < 1e-7
    a[:, 3] = b[:, 3] = -torch.inf
    assert token_kl(a.log_softmax(1), b.log_softmax(1)).isfinite().all()


def test_divergence_on_the_first_windows_only(models, tokens):
    model, other = models("llama")
    windows = cut_windows(tokens, window=64)
    scores = score_windows(other, windows, baseline=model, kl_windows=4)
    assert [s.kl is not None for s in scores] == [True] * 4 + [False] * 11
    assert all(s.baseline_nll is not None for s in scores)
    first = divergence(other, model, [w.ids for w in windows[:4]])
    assert divergence_of(scores).kl_mean == pytest.approx(first.kl_mean, rel=1e-6)


def test_each_model_runs_once_per_window(models, tokens):
    model, other = models("llama")
    calls = []
    hooks = [m.model.layers[0].register_forward_hook(lambda *a, who=who: calls.append(who))
             for who, m in (("baseline", model), ("model", other))]
    progress = []
    try:
        score_windows(other, cut_windows(tokens, window=64, limit=3), baseline=model,
                      progress=lambda *a: progress.append(a))
    finally:
        for hook in hooks:
            hook.remove()
    assert sorted(calls) == ["baseline"] * 3 + ["model"] * 3
    assert progress == [("Evaluating", i, 3) for i in (1, 2, 3)]


def test_bad_models(models, tokens):
    from transformers import AutoModelForCausalLM

    model, _ = models("llama")
    config = model.config.to_dict() | {"vocab_size": 300}
    wide = AutoModelForCausalLM.from_config(type(model.config)(**config)).eval()
    with pytest.raises(ModelError, match="vocabularies differ"):
        divergence(wide, model, [tokens[:32]])
    with torch.no_grad():
        wide.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        perplexity(wide, tokens[:32], window=16)
    for rows in ([], [tokens[:1]]):
        with pytest.raises(FewbitsError, match="2 tokens or more"):
            divergence(model, model, rows)


def test_choice_of_window(models):
    model, _ = models("llama")
    assert choose_window(model, None) == 128
    for window in (1, 129):
        with pytest.raises(FewbitsError, match=f"--window {window}"):
            choose_window(model, window)

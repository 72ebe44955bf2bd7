"""Evaluate a model: perplexity, divergence from a baseline, zero-shot tasks and speed, in one report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewbits.eval.activations import round_activations
from fewbits.eval.divergence import Divergence, divergence_of
from fewbits.eval.models import Loaded, open_model, thread_count
from fewbits.eval.perplexity import Perplexity, perplexity_of
from fewbits.eval.scoring import Progress, WindowScores, score_windows, silent
from fewbits.eval.speed import Speed, decode_speed, peak_rss_bytes
from fewbits.eval.tasks import TaskScores, find_tasks, run_tasks
from fewbits.eval.text import Text, choose_window, cut_windows, default_text, read_text, tokenize
from fewbits.quant.errors import FewbitsError, ModelError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TextScores:
    """Results on one text, or pooled over all of them.

    Attributes:
        name: of the text.
        model: perplexity of the model.
        baseline: perplexity of the baseline on the same tokens, when there is one.
        divergence: of the model from the baseline, when there is one.
    """

    name: str
    model: Perplexity
    baseline: Perplexity | None
    divergence: Divergence | None

    def to_json(self) -> dict[str, Any]:
        """``perplexity``, ``perplexity_stderr``, ``tokens``, and with a baseline the measures against it."""
        out: dict[str, Any] = {
            "perplexity": self.model.value, "perplexity_stderr": self.model.stderr, "tokens": self.model.tokens}
        if self.baseline is not None and self.divergence is not None:
            d = self.divergence
            out |= {
                "perplexity_baseline": self.baseline.value, "perplexity_baseline_stderr": self.baseline.stderr,
                "kl_mean": d.kl_mean, "kl_stderr": d.kl_stderr, "kl_positions": d.positions,
                "top1_agreement": d.top1_agreement, "top1_stderr": d.top1_stderr,
                "nll_increase": d.nll_increase, "nll_increase_stderr": d.nll_increase_stderr,
            }
        return out


@dataclass(frozen=True)
class EvalReport:
    """What an evaluation found.

    Attributes:
        model, baseline: their names; the baseline may be None.
        total: results pooled over all texts, each token with the same weight; None when only tasks were run.
        texts: results of each text.
        tasks, tasks_baseline: task -> metric -> value, with ``metric_stderr`` and ``documents``.
        speed: decoding speed, when it was measured.
        nbytes: bytes of the model's weights on disk, when it was loaded from there.
        peak_rss_bytes: peak resident memory of the process so far, both models included.
        protocol: how the numbers were made: window, stride, BOS, limits, dtype, device, hashes of the texts.
    """

    model: str
    baseline: str | None
    total: TextScores | None
    texts: tuple[TextScores, ...]
    tasks: TaskScores
    tasks_baseline: TaskScores
    speed: Speed | None
    nbytes: int | None
    peak_rss_bytes: int
    protocol: Mapping[str, Any] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values by the documented keys; null where nothing was measured."""
        out: dict[str, Any] = {"model": self.model, "baseline": self.baseline}
        out |= self.total.to_json() if self.total else {"perplexity": None, "perplexity_stderr": None, "tokens": 0}
        out |= {"tasks": self.tasks}
        if self.tasks_baseline:
            out["tasks_baseline"] = self.tasks_baseline
        return out | {
            "per_text": {t.name: t.to_json() for t in self.texts},
            "decode_tokens_per_s": self.speed.decode_tokens_per_s if self.speed else None,
            "prefill_tokens_per_s": self.speed.prefill_tokens_per_s if self.speed else None,
            "peak_rss_bytes": self.peak_rss_bytes,
            "bytes": self.nbytes,
            "protocol": dict(self.protocol),
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """``(what, value, baseline's value)`` for people to read, errors included."""
        rows: list[tuple[str, str, str]] = []
        shown = [*self.texts, *([self.total] if self.total and len(self.texts) > 1 else [])]
        for t in shown:
            base = _number(t.baseline.value, t.baseline.stderr) if t.baseline else ""
            rows.append((f"perplexity, {t.name}", _number(t.model.value, t.model.stderr), base))
            if t.divergence:
                d = t.divergence
                rows.append((f"KL from the baseline, {t.name}", _number(d.kl_mean, d.kl_stderr), ""))
                rows.append((f"same first token, {t.name}", _number(d.top1_agreement, d.top1_stderr), ""))
        for task, metrics in self.tasks.items():
            other = self.tasks_baseline.get(task, {})
            for metric, value in metrics.items():
                if metric != "documents" and not metric.endswith("_stderr"):
                    error = f"{metric}_stderr"
                    rows.append((f"{task}, {metric}", _number(value, metrics.get(error)),
                                 _number(other.get(metric), other.get(error))))
        if self.speed:
            rows.append(("decode, tokens/s", f"{self.speed.decode_tokens_per_s:.1f}", ""))
        if self.nbytes is not None:
            rows.append(("weights, MB", f"{self.nbytes / 1e6:.1f}", ""))
        return rows

    def to_markdown(self) -> str:
        """A table and the protocol in one line."""
        columns = [self.model, *([self.baseline] if self.baseline else [])]
        lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
        for row in self.rows():
            lines.append("| " + " | ".join(row[:1 + len(columns)]) + " |")
        return "\n".join([*lines, "", self.summary(), ""])

    def summary(self) -> str:
        """The protocol in one line."""
        p = self.protocol
        parts = []
        if self.total:
            parts.append(f"windows of {p['window']} tokens, stride {p['stride']}, {'with' if p['bos'] else 'no'} BOS, "
                         f"{self.total.model.tokens} tokens scored; +/- one standard error ({p['stderr']})")
        if "activations" in p:
            parts.append(f"SIMULATION: inputs of the model's quantized linears rounded to {p['activations']}")
        return "; ".join([*parts, f"{p['dtype']} on {p['device']}"])

    def to_table(self) -> Table:
        """The same as a rich table."""
        from rich.table import Table

        table = Table("", self.model, *([self.baseline] if self.baseline else []), caption=self.summary())
        for row in self.rows():
            table.add_row(*row[:3 if self.baseline else 2])
        return table


def evaluate(
    model: str | Path | Any,
    *,
    baseline: str | Path | Any = None,
    text: str | Path | Text | Iterable[str | Path | Text] = (),
    window: int | None = None,
    stride: int | None = None,
    add_bos: bool = False,
    tasks: str | Sequence[str] = (),
    task_dir: str | Path | None = None,
    limit: int | None = None,
    kl_windows: int | None = None,
    speed: bool = False,
    activations: str | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> EvalReport:
    """Measure how good a model is, and with ``baseline`` how far it moved from that.

    Args:
        model: hub id, directory (dense or fewbits), GGUF file, or a loaded transformers model.
        baseline: the same, usually the model before quantization. Each model runs once per window.
        text: UTF-8 files, or :class:`~fewbits.eval.text.Text`; without text (and without tasks, or with a baseline)
            a text that comes with Python is used.
        window: tokens per window; the smaller of 2048 and the model's context by default.
        stride: step between windows, the window itself by default.
        add_bos: put a BOS token before each window.
        tasks: names (or one string, by commas) of lm-eval tasks, or of the templates in ``configs/tasks`` whose data
            ``task_dir`` holds.
        limit: at most so many windows per text and documents per task.
        kl_windows: take the divergence on the first so many windows of each text only.
        speed: time decoding too.
        activations: simulate that the quantized linears of ``model`` read inputs that are rounded to this format, see
            :mod:`fewbits.eval.activations`.
        device, dtype: see :func:`~fewbits.eval.models.open_model`; threads: torch threads on CPU.
        progress: called as ``progress(what, done, total)`` when a window is done.

    Raises:
        FewbitsError: bad input (one of its subclasses says which part).
    """
    names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    texts = _unique(_texts(text))
    if not texts and (not names or baseline is not None):
        texts = [default_text()]
    for name, value in (("limit", limit), ("kl_windows", kl_windows)):
        if value is not None and value < 1:
            raise FewbitsError(f"{name} = {value}: must be at least 1")
    with thread_count(threads):
        found = find_tasks(names, task_dir) if names else None  # before the models: a typo should cost no time
        wanted = [model] if baseline is None else [model, baseline]
        models = [open_model(m, tokenizer=tokenizer, device=device, dtype=dtype) for m in wanted]
        if activations is not None:
            if not isinstance(model, str | Path):
                raise FewbitsError("activations: cannot be rounded in a model that is loaded already; give its folder")
            activations = round_activations(models[0].model, activations).name
        cutting = _Cutting(window, stride, limit, add_bos).fit(models)
        scored = [_score_text(item, models, cutting, kl_windows, progress) for item in texts]
        task_scores = []
        if found:
            task_scores = [run_tasks(m.model, m.tokenizer or models[0].need_tokenizer(), found, limit=limit)
                           for m in models]
        timing = decode_speed(models[0].model) if speed else None
    total = _summarize("all texts", [s for one in scored for s in one]) if scored else None
    protocol = {
        "dtype": models[0].dtype, "device": models[0].device, "limit": limit, "kl_windows": kl_windows,
        **(cutting.protocol(texts, total) if total else {}),
        **({"tasks": found.origins} if found else {}),
        **({"speed": asdict(timing)} if timing else {}),
        **({"activations": activations} if activations else {}),
    }
    return EvalReport(
        model=models[0].name, baseline=models[1].name if baseline is not None else None, total=total,
        texts=tuple(_summarize(t.name, s) for t, s in zip(texts, scored)),
        tasks=task_scores[0] if task_scores else {}, tasks_baseline=task_scores[1] if len(task_scores) > 1 else {},
        speed=timing, nbytes=models[0].nbytes, peak_rss_bytes=peak_rss_bytes(), protocol=protocol,
    )


def _score_text(
    text: Text, models: Sequence[Loaded], cutting: _Cutting, kl_windows: int | None, progress: Progress
) -> list[WindowScores]:
    """Scores of each window of a text; ``models`` is the model and, where there is one, its baseline."""
    try:
        windows = cut_windows(_tokens(text, models[0]), **cutting.arguments(models[0]))
    except FewbitsError as e:
        raise type(e)(f"{text.name}: {e}") from e
    baseline = models[1].model if len(models) > 1 else None
    return score_windows(models[0].model, windows, baseline=baseline, kl_windows=kl_windows, progress=progress)


@dataclass(frozen=True)
class _Cutting:
    """How texts are cut into windows."""

    window: int | None
    stride: int | None
    limit: int | None
    add_bos: bool

    def fit(self, models: Sequence[Loaded]) -> _Cutting:
        """With a window that fits all models, and the stride for the window."""
        window = min(choose_window(m.model, self.window) for m in models)
        return replace(self, window=window, stride=window - self.add_bos if self.stride is None else self.stride)

    def arguments(self, subject: Loaded) -> dict[str, Any]:
        return {"window": self.window, "stride": self.stride, "limit": self.limit,
                "bos": _bos(subject) if self.add_bos else None}

    def protocol(self, texts: Sequence[Text], total: TextScores) -> dict[str, Any]:
        return {
            "window": self.window, "stride": self.stride, "bos": self.add_bos,
            "tokenization": "each text whole, as it is, without special tokens" +
                            ("; BOS before each window" if self.add_bos else "; no BOS"),
            "scored": "every token once, with context from its own window; the first token of the text, and with "
                      "windows side by side the first of each, is not predicted" if not self.add_bos else
                      "every token once, with context from its own window; the first of each is predicted from BOS",
            "tail": "less than a whole window at the end is dropped, unless the text is shorter than one",
            "pooling": "over tokens of all texts",
            "stderr": total.model.method,
            "kl": "KL(baseline || model), nats, mean over every position of a window" if total.divergence else None,
            "kl_stderr": total.divergence.method if total.divergence else None,
            "texts": [{"name": t.name, "sha256": t.sha256} for t in texts],
        }


def _texts(text: str | Path | Text | Iterable[str | Path | Text]) -> list[Text]:
    items = [text] if isinstance(text, str | Path | Text) else list(text)
    return [item if isinstance(item, Text) else read_text(item) for item in items]


def _bos(subject: Loaded) -> int:
    bos = subject.need_tokenizer().bos_token_id
    if bos is None:
        raise FewbitsError(f"--add-bos: the tokenizer of {subject.name} has no BOS token; leave it out")
    return bos


def _tokens(text: Text, subject: Loaded) -> Tensor:
    """Tokens ``(L,)`` of a text; raises ModelError when the model does not know one of them."""
    tokens = tokenize(text, subject.need_tokenizer())
    if len(tokens) and int(tokens.max()) >= subject.vocabulary:
        raise ModelError(f"{subject.name}: its tokenizer makes token {int(tokens.max())}, the model has "
                         f"{subject.vocabulary}; they do not belong together")
    return tokens


def _summarize(name: str, scores: Sequence[WindowScores]) -> TextScores:
    model = perplexity_of([s.nll for s in scores])
    compared = [s.baseline_nll for s in scores if s.baseline_nll is not None]
    return TextScores(
        name, model, perplexity_of(compared) if compared else None, divergence_of(scores) if compared else None
    )


def _number(value: float | int | None, stderr: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if stderr is None else f"{value:.4g} +/- {stderr:.2g}"


def _unique(texts: Sequence[Text]) -> list[Text]:
    """The texts, with a number after a name that was there before, so that no result hides another."""
    seen: Counter[str] = Counter()
    named = []
    for text in texts:
        seen[text.name] += 1
        named.append(text if seen[text.name] == 1 else replace(text, name=f"{text.name} ({seen[text.name]})"))
    return named

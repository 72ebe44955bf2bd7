"""The model card: README.md of a checkpoint, from its plan, its lock and what was measured. No number by hand."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fewbits.quant.checkpoint import write_atomically
from fewbits.quant.inspection import Inspection, inspect
from fewbits.quant.shards import sha256_file

CARD = "README.md"

_PLAIN = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR")
```
"""

_LOADING = {
    "fewbits": """```python
import fewbits  # pip install fewbits

model = fewbits.load("DIR")
```

Where `fewbits` is imported, `AutoModelForCausalLM.from_pretrained` of transformers loads it too, and vLLM where it is
installed beside it. `fewbits serve DIR` starts an OpenAI-compatible endpoint, `fewbits doctor DIR` says which
other engines read it and which export leads there.
""",
    "compressed-tensors": """```python
from transformers import AutoModelForCausalLM  # pip install transformers compressed-tensors

model = AutoModelForCausalLM.from_pretrained("DIR")  # without dequantize=True
```

    vllm serve DIR
""",
    "gptq": "    vllm serve DIR\n\nor any engine that reads the GPTQ layout.\n",
    "bitnet": _PLAIN,
    "dense": _PLAIN,
}
"""How a checkpoint in each layout is loaded. No name of the folder: equal runs make equal files, wherever they are."""


def write_card(
    directory: Path, out: Path, *, layout: str = "fewbits", measured: Mapping[str, Any] | None = None,
    evaluated: Mapping[str, Any] | None = None, base_card: Path | None = None,
) -> None:
    """Write README.md of a checkpoint, or of an export of it, to ``out``.

    Args:
        directory: the fewbits checkpoint.
        layout: what ``out`` is written in.
        measured: KL on held-out calibration text (``measured`` of the report of quantize).
        evaluated: the report of ``fewbits eval --json``.
        base_card: README.md of the base model; None: what the card in ``directory`` has of it.
    """
    facts = inspect(directory)
    front, base = _base_card(base_card or directory / CARD)
    parts = [_front_matter(facts, front, layout), *_parts(facts, directory, layout, measured, evaluated), _MARK, base]
    write_atomically(out / CARD, "\n".join(parts))


def _parts(
    facts: Inspection, directory: Path, layout: str, measured: Mapping[str, Any] | None,
    evaluated: Mapping[str, Any] | None,
) -> Iterable[str]:
    lock = facts.provenance
    model = lock.get("model") or {}
    base = _base_name(model)
    yield f"# {base}, {facts.bits_per_weight:.2f} bits\n"
    if layout == "dense":
        yield (f"{base}, its weights rounded to codes of {facts.bits_per_weight:.3f} bits each (over the linears of "
               "the decoder blocks) and stored as floats of these values. Made with fewbits.\n")
    else:
        yield (f"{base}, its weights stored in {facts.bits_per_weight:.3f} bits each (over the linears of the decoder "
               f"blocks; {facts.bits_per_weight_total:.3f} over everything), {facts.bytes / 1e6:.1f} MB in all, scales "
               "and zero points included. Made with fewbits.\n")
    yield from _quality(measured, evaluated)
    yield "## Load\n"
    yield "DIR is this folder, or its name on the hub.\n"
    yield _LOADING[layout]
    if layout != "dense":
        yield "## What is stored\n"
        yield _classes(facts.tensors)
    yield "## How it was made\n"
    sources = (lock.get("calibration") or {}).get("sources", [])
    rows = {
        "base model": base + (f" at {model['revision']}" if model.get("revision") else ""),
        "recipe": lock.get("recipe_name"), "seed": lock.get("seed"), "fewbits": lock.get("fewbits"),
        "calibration": "; ".join(s if s.startswith("hf:") else s.rpartition("/")[2] for s in sources) or "none",
        "sha256 of fewbits.lock": sha256_file(directory / "fewbits.lock"),
    }
    yield _pairs(rows.items())
    yield "`fewbits.lock` has the hashes of the base model and of every file, and all versions.\n"


def _quality(measured: Mapping[str, Any] | None, evaluated: Mapping[str, Any] | None) -> Iterable[str]:
    rows = []
    if measured and measured.get("kl_mean") is not None:
        rows.append(("KL to the base model, nats per token, held-out calibration text",
                     _spread(measured["kl_mean"], measured.get("kl_stderr"))))
    if evaluated:
        for key, label in (("perplexity", "perplexity"), ("perplexity_baseline", "perplexity of the base model"),
                           ("kl_mean", "KL to the base model, nats per token"), ("top1_agreement", "top-1 agreement")):
            if evaluated.get(key) is not None:
                rows.append((label, _spread(evaluated[key], evaluated.get(key.replace("_mean", "") + "_stderr"))))
        for task, metrics in sorted((evaluated.get("tasks") or {}).items()):
            rows += [(f"{task}, {m}", _spread(v, metrics.get(f"{m}_stderr"))) for m, v in metrics.items()
                     if not m.endswith("_stderr")]
    if rows:
        yield "## Measured\n"
        yield _pairs(rows)


def _pairs(rows: Iterable[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows)]) + "\n"


def _spread(value: float, error: float | None) -> str:
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _classes(tensors: Iterable[Mapping[str, Any]]) -> str:
    """A line for each kind of tensor: its last name, with the number of a layer or expert left out."""
    classes: dict[str, list[Mapping[str, Any]]] = {}
    for t in tensors:
        name = str(t["name"]).removesuffix(".weight")
        leaf = next(part for part in reversed(name.split(".")) if not part.isdigit())
        classes.setdefault(leaf if len(t["shape"]) >= 2 else "vectors (norms, biases)", []).append(t)
    lines = ["| tensors | count | formats | bits per weight | MB |", "|---|---:|---|---:|---:|"]
    for leaf, members in classes.items():
        formats = Counter(str(t["format"]) for t in members)
        shown = ", ".join(f"{f} ({n})" if len(formats) > 1 else f for f, n in formats.most_common(4))
        more = f" and {len(formats) - 4} more" if len(formats) > 4 else ""
        size = sum(t["bytes"] for t in members)
        bits = 8 * size / max(sum(math.prod(t["shape"]) for t in members), 1)
        lines.append(f"| {_cell(leaf)} | {len(members)} | {_cell(shown)}{more} | {bits:.3f} | {size / 1e6:.2f} |")
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


_LICENSE = re.compile(r"""^license:[ \t]*["']?([\w.\-]+)["']?[ \t]*$""", re.MULTILINE)
_MARK = "<!-- The card of the base model, if it has one: -->\n"


def _base_name(model: Mapping[str, Any]) -> str:
    """The base model's id on the hub, or the last part of its path: where it lies is nobody else's business."""
    name = str(model.get("name", "a model"))
    return name.partition("@")[0] if model.get("revision") else Path(name).name


def _base_card(path: Path) -> tuple[str, str]:
    """Front matter and text of the base model's card: the README that came with it, or the end of a card of ours."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    head, rest = "", text
    if text.startswith("---\n"):
        head, _, rest = text.partition("\n---")
    return head, (rest.partition(_MARK)[2] if _MARK in rest else rest).lstrip("-\n")


def _front_matter(facts: Inspection, base_front: str, layout: str) -> str:
    """What the hub reads: the licence is the base model's, which travels with its card."""
    values: dict[str, Any] = {"library_name": "transformers", "tags": ["fewbits", "quantized"]}
    if layout != "fewbits":
        values["tags"].append(layout)
    model = facts.provenance.get("model") or {}
    if model.get("revision"):  # only what came from the hub has one
        values |= {"base_model": _base_name(model), "base_model_relation": "quantized"}
    if found := _LICENSE.search(base_front):
        values["license"] = found[1]
    return "\n".join(["---", *(f"{k}: {json.dumps(v)}" for k, v in values.items()), "---", ""])

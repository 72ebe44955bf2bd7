"""Which engines read a checkpoint, how, with which kernel and on how many GPUs, and what to change where one does not.

What an engine reads is asked of the export that writes for it and of the table that ``--target`` uses, so that all
three say the same. Kernels and traps of other projects are facts of the versions named in :data:`CHECKED`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fewbits.kernels.dispatch import select_kernel
from fewbits.quant.allocate.menu import ENGINES
from fewbits.quant.bitpack import WORD_BITS
from fewbits.quant.formats import layout_name
from fewbits.quant.formats.grid import GridFormat
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.formats.levels import LevelsFormat
from fewbits.quant.types import Layout
from fewbits.serving.export import make_exporter
from fewbits.serving.export.base import FUSED, group_of, one_format
from fewbits.serving.export.stored import Stored, open_stored
from fewbits.serving.tensor_parallel import column_splits

if TYPE_CHECKING:
    from rich.table import Table

Reads = Literal["yes", "after export", "with plug-in", "no"]

CHECKED = {
    "transformers": "5.20 to 5.23", "vllm": "0.33", "sglang": "0.5.23", "llama.cpp": "any that reads the types written",
    "compressed-tensors": "0.15 or newer, 0.18 for 3, 5, 6 and 7 bits",
}
"""Engine -> versions that these facts were read from."""

_MOST_RANKS = 16


@dataclass(frozen=True)
class Verdict:
    """What one engine does with the checkpoint.

    Attributes:
        reads: as it is, after an export, with fewbits' plug-in, or not at all.
        how: the command that leads there.
        kernel: what multiplies.
        tensor_parallel: numbers of ranks that its weights can be cut into; empty where the engine does not cut.
        reasons: why not, or not fully: each with the tensor and what to change.
    """

    engine: str
    versions: str
    reads: Reads
    how: str = ""
    kernel: str = ""
    tensor_parallel: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Diagnosis:
    """Verdicts on a checkpoint, and traps that lie in wait for whoever serves it."""

    directory: str
    engines: list[Verdict]
    traps: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_table(self) -> Table:
        from rich.table import Table

        table = Table(title=f"{self.directory}: who reads it")
        for column in ("engine", "versions", "reads", "kernel", "ranks", "how, or what to change"):
            table.add_column(column, overflow="fold")
        for v in self.engines:
            table.add_row(v.engine, v.versions, v.reads, v.kernel, ", ".join(map(str, v.tensor_parallel)),
                          "\n".join([v.how] * bool(v.how) + v.reasons))
        return table


def diagnose(directory: str | Path) -> Diagnosis:
    """Ask every engine about a fewbits checkpoint.

    Raises:
        CheckpointError: the directory holds none.
    """
    stored = open_stored(directory)
    ask: list[Callable[[Stored], Verdict]] = [_fewbits, _transformers, _vllm, _vllm_plugin, _sglang, _llamacpp]
    return Diagnosis(str(directory), [verdict(stored) for verdict in ask], _traps(stored))


# -- engines ---------------------------------------------------------------------------------------------------------


def _fewbits(stored: Stored) -> Verdict:
    formats = {fmt for _, layout in stored.matrices.values() for fmt, _ in layout.runs}
    names = sorted({select_kernel(fmt, 1, torch.device(device)) for fmt in formats for device in ("cpu", "cuda")})
    return Verdict("transformers with fewbits", CHECKED["transformers"], "yes", "import fewbits, then from_pretrained; "
                   f"or fewbits serve {stored.path}", f"fewbits: {', '.join(names)}")


def _transformers(stored: Stored) -> Verdict:
    obstacles = _obstacles(stored, "compressed-tensors")
    return Verdict(
        f"transformers with compressed-tensors {CHECKED['compressed-tensors']}", CHECKED["transformers"],
        "no" if obstacles else "after export", "" if obstacles else _export(stored, "compressed-tensors"),
        "" if obstacles else "none: dense after the first forward pass", [], obstacles,
    )


def _vllm(stored: Stored) -> Verdict:
    """Without a plug-in, through compressed-tensors; it fuses what reads one input."""
    reasons = _obstacles(stored, "compressed-tensors") or [*_unread(stored, "vllm"), *_fused(stored)]
    if reasons:
        return Verdict("vLLM", CHECKED["vllm"], "no", reasons=[*reasons, "or quantize with --target vllm"])
    if any(isinstance(fmt, GridFormat) for _, layout in stored.matrices.values() for fmt, _ in layout.runs):
        kernel = "Marlin, compute capability 8.0 or newer; not on CPU"
        return Verdict("vLLM", CHECKED["vllm"], "after export", _export(stored, "compressed-tensors"), kernel,
                       tensor_parallel_sizes(stored, _stock_cuts))
    widths = {fmt.code_bits for fmt in _formats(stored)}
    kernel = "Marlin or Machete" if widths <= {4, 8} else "Marlin; for 2 bits Humming, compute capability 7.5 or newer"
    on_cpu = "; on CPU: 4 bits" if widths == {4} else "; not on CPU, which has 4 bits only"
    return Verdict("vLLM", CHECKED["vllm"], "after export", _export(stored, "compressed-tensors"), kernel + on_cpu,
                   tensor_parallel_sizes(stored, _stock_cuts))


def _vllm_plugin(stored: Stored) -> Verdict:
    engine = "vLLM with fewbits' plug-in"
    experts = [n for n, (target, _) in stored.matrices.items() if target.kind == "expert"]
    if experts:
        return Verdict(engine, CHECKED["vllm"], "no", reasons=[
            f"{experts[0]}: mixtures of experts cannot be read by the plug-in; quantize with --target vllm, and export"
        ])
    how = f"pip install fewbits beside vllm; vllm serve {stored.path}"
    sizes = tensor_parallel_sizes(stored, _plugin_cuts)
    return Verdict(engine, CHECKED["vllm"], "with plug-in", how, "fewbits", sizes)


def _sglang(stored: Stored) -> Verdict:
    reasons = _obstacles(stored, "compressed-tensors") or [*_unread(stored, "sglang"), *_fused(stored)]
    if reasons:
        return Verdict("SGLang", CHECKED["sglang"], "no", reasons=[*reasons, "or quantize with --target sglang"])
    return Verdict("SGLang", CHECKED["sglang"], "after export", _export(stored, "compressed-tensors"), "Marlin",
                   tensor_parallel_sizes(stored, _stock_cuts))


def _llamacpp(stored: Stored) -> Verdict:
    reasons = _obstacles(stored, "gguf")
    if reasons:
        reasons = [*reasons, "or quantize with --target llama.cpp"]
        return Verdict("llama.cpp", CHECKED["llama.cpp"], "no", reasons=reasons)
    return Verdict("llama.cpp", CHECKED["llama.cpp"], "after export", _export(stored, "gguf", ".gguf"), "its own")


def _obstacles(stored: Stored, to: str) -> list[str]:
    """The first tensor that an export refuses, with the reason."""
    exporter = make_exporter(to)
    found = [f"{n}: {why}" for n, (t, layout) in stored.matrices.items() if (why := exporter.obstacle(t, layout))]
    more = f" ({len(found)} of {len(stored.matrices)} tensors are like it)" if len(found) > 1 else ""
    return [found[0] + more] if found else []


def _export(stored: Stored, to: str, suffix: str = "-export") -> str:
    return f"fewbits export {stored.path} --to {to} -o {stored.path.resolve().name}{suffix}"


def _unread(stored: Stored, engine: str) -> list[str]:
    found = [n for n, (_, layout) in stored.matrices.items() if not ENGINES[engine].reads(layout)]
    if not found:
        return []
    layout = stored.matrices[found[0]][1]
    return [f"{found[0]}: {engine} has no kernel for {layout_name(layout)}; it reads {', '.join(ENGINES[engine].menu)}"]


def _fused(stored: Stored) -> list[str]:
    """Linears that an engine runs as one, and that have different formats here."""
    for name, (_, layout) in stored.matrices.items():
        parent, _, leaf = name.rpartition(".")
        for group in FUSED.values():
            for other in group if leaf == group[0] else ():
                twin = stored.matrices.get(f"{parent}.{other}")
                if twin is None or twin[1] != layout:
                    got = "unquantized" if twin is None else layout_name(twin[1])
                    return [f"{parent}.{other}: is {got} and {leaf} {layout_name(layout)}, but the engine runs them as "
                            "one; give them one format"]
    return []


# -- tensor parallel -------------------------------------------------------------------------------------------------


Cuts = Callable[[Layout, int, str, int], bool]
"""``cuts(layout, rows, style, ranks)``: whether a matrix can be cut so; ``style`` is of transformers' plan."""


def tensor_parallel_sizes(stored: Stored, cuts: Cuts) -> list[int]:
    """Numbers of ranks that heads and packed weights can be cut into.

    Which linears are cut by rows and which by columns is transformers' own plan for the model.
    """
    config = stored.model.config.get_text_config()
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        return [1]
    styles = [(re.compile(r"(.*\.)?" + re.escape(k).replace(r"\*", r"\d+")), v) for k, v in plan.items()]
    matrices = [(layout, target.shape[0], next((v for p, v in styles if p.fullmatch(target.name)), ""))
                for target, layout in stored.matrices.values()]
    heads = getattr(config, "num_attention_heads", 1)
    shared = getattr(config, "num_key_value_heads", None) or heads  # heads of keys are cut, or else copied
    return [n for n in range(1, _MOST_RANKS + 1)
            if heads % n == 0 and (shared % n == 0 or n % shared == 0) and all(cuts(*m, n) for m in matrices)]


def _stock_cuts(layout: Layout, rows: int, style: str, ranks: int) -> bool:
    """vLLM and SGLang cut stored words, so each rank must get whole words and whole groups."""
    fmt = one_format(layout)
    if isinstance(fmt, GridFormat):  # no group ends within a word
        cut = style.startswith("rowwise")
        whole = layout.columns % (ranks * (fmt.group_size or 1)) if cut else rows % ranks
        return ranks == 1 or whole == 0
    assert isinstance(fmt, IntFormat)
    if style.startswith("rowwise"):
        part, group = layout.columns // ranks, group_of(fmt, layout.columns) or 1
        whole = layout.columns % ranks == 0 and part * fmt.code_bits % WORD_BITS == 0 and part % group == 0
        return ranks == 1 or whole
    words = fmt.symmetric or rows // ranks * fmt.code_bits % WORD_BITS == 0  # zero points are packed along the rows
    return ranks == 1 or not style.startswith("colwise") or (rows % ranks == 0 and words)


def _plugin_cuts(layout: Layout, rows: int, style: str, ranks: int) -> bool:
    """The plug-in packs parts again, so that only groups must stay whole; and what is coded together."""
    if layout.whole:
        return ranks == 1
    if style.startswith("rowwise"):
        return ranks in column_splits(layout, _MOST_RANKS)
    return not style.startswith("colwise") or rows % ranks == 0


# -- traps -----------------------------------------------------------------------------------------------------------


def _traps(stored: Stored) -> list[str]:
    formats = _formats(stored)
    out = ["without `import fewbits`, transformers finds no weights here and stops: that is meant, so that it does not "
           "go on with random ones"]
    if len({(f.code_bits, f.group_size, f.symmetric) for f in formats}) > 1:
        out.append("several formats: after an export to compressed-tensors, transformers decodes all but the first "
                   "wrongly, and says nothing, when it is asked to dequantize=True while loading")
    dtype = getattr(stored.model.config, "dtype", None)
    if any(f.scale_dtype != dtype for f in formats):
        out.append(f"scales are {_short({f.scale_dtype for f in formats})} and the model is {_short([dtype])}: vLLM "
                   "casts scales to the model's dtype, which rounds them; serve with --dtype float16, or quantize with "
                   "scales of the model's dtype (formats such as int4_sym_g64_bf16)")
    odd = sorted({f.code_bits for f in formats} - {2, 4, 8})
    if odd:
        out.append(f"{', '.join(map(str, odd))} bits: compressed-tensors before 0.18 packs them with gaps and reads an "
                   "export wrongly; nothing in the file says which")
    return out


def _short(dtypes: Any) -> str:
    return ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))


def _formats(stored: Stored) -> Sequence[IntFormat]:
    runs = {fmt for _, layout in stored.matrices.values() for fmt, _ in layout.runs}
    found = {fmt.integers if isinstance(fmt, LevelsFormat) else fmt for fmt in runs}
    return sorted((f for f in found if isinstance(f, IntFormat)), key=lambda f: f.name)

"""``fewbits eval``: perplexity, divergence from a baseline, zero-shot tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.common import (
    STDOUT,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    ProgressBars,
    ThreadsOption,
    examples,
    report_to,
    say_reported,
    show_table,
)

EPILOG = examples(
    "fewbits eval ./model-w4 --baseline ./model --text test.txt",
    "fewbits eval ./model-w4 --text a.txt b.txt --window 1024 --limit 40 --json report.json",
    "fewbits eval ./model-w4 --baseline ./model --activations fp4_row",
    "fewbits eval ./model-w4 --tasks piqa,blimp --task-dir ./data --limit 100 --json",
)


def evaluate(
    model: ModelArgument,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="Also measure the KL divergence from this model.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", metavar="FILE ...", help="UTF-8 text; a built-in one without it.")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", metavar="W", help="Tokens per window; default 2048 or the context.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", metavar="S", help="Step between windows; default: the window.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="lm-eval tasks, or piqa, copa, arc_easy, winogrande, "
                                 "lambada_openai, blimp with their data in --task-dir.")
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option("--task-dir", metavar="DIR", help="Folder of task YAMLs or of .jsonl data.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="At most N windows a text, N documents a task.")
    ] = None,
    kl_windows: Annotated[
        int | None, typer.Option("--kl-windows", metavar="N", min=1, help="Divergence on the first N windows only.")
    ] = None,
    add_bos: Annotated[bool, typer.Option("--add-bos", help="Start each window with a BOS token.")] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Time decoding too.")] = False,
    activations: Annotated[
        str | None, typer.Option("--activations", metavar="FORMAT", help="Simulate W4A4 and the like: round the inputs "
                                 "of the quantized linears, token by token, e.g. fp4_row, int8_sym_row, nvfp4.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = None,
) -> None:
    """Measure perplexity, divergence from a baseline, and zero-shot tasks.

    Texts are read as they are and tokenized whole, without BOS, and cut into windows side by side. Without text and
    tasks, a text that comes with Python is used, so that it works offline.
    """
    with report_to(json) as report, ProgressBars() as progress:
        from fewbits.eval.report import evaluate as run

        result = run(
            model, baseline=baseline, text=text or (), window=window, stride=stride, add_bos=add_bos,
            tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()], task_dir=task_dir, limit=limit,
            kl_windows=kl_windows, speed=speed, activations=activations, device=device, dtype=dtype, threads=threads,
            progress=progress,
        )
        report(result.to_json())
    if json != STDOUT:
        show_table(result.to_table())
    say_reported(json)

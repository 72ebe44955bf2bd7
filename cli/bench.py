"""``fewbits bench``: tokens per second, bandwidth and memory, and which kernel runs for each tensor."""

from __future__ import annotations

from typing import Annotated, Any

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
    say,
    say_reported,
    show_table,
)

EPILOG = examples(
    "fewbits bench ./model-w4",
    "fewbits bench ./model-w4 --baseline ./model --threads 2 --json bench.json",
    "fewbits bench ./model-w2 --rounds 10 --new-tokens 128 --json",
)


def bench(
    model: ModelArgument,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="Time this too, in turns; float32 on a CPU.")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", metavar="N", min=1, help="Tokens to decode.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Figures are medians over rounds.")] = 5,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = None,
) -> None:
    """Time generation at batch 1, and say which kernel runs for each tensor and why not another."""
    with report_to(json) as report, ProgressBars() as progress:
        from fewbits.eval.bench import bench as run

        made = run(model, baseline=baseline, new_tokens=new_tokens, rounds=rounds, device=device, dtype=dtype,
                   threads=threads, progress=progress)
        report(made.to_json())
    if json != STDOUT:
        show_table(_speeds(made))
        if made.model.kernels:
            show_table(_kernels(made.model.kernels))
        if made.stream_bytes_per_s:
            share = made.model.bandwidth_bytes_per_s / made.stream_bytes_per_s
            say(f"{made.threads} threads of this machine read {made.stream_bytes_per_s / 1e9:.1f} GB/s from memory; "
                f"decoding reaches {share:.0%} of that")
    say_reported(json)


def _speeds(made: Any) -> Any:
    from rich.table import Table

    table = Table("model", "dtype", "decode tokens/s", "prefill tokens/s", "MB a token", "GB/s", "peak memory, MB",
                  title=made.model.mode)
    for m in (made.model, made.baseline):
        if m is not None:
            table.add_row(m.model, m.dtype, f"{m.decode_tokens_per_s:.1f}", f"{m.prefill_tokens_per_s:.0f}",
                          f"{m.bytes_per_token / 1e6:.1f}", f"{m.bandwidth_bytes_per_s / 1e9:.2f}",
                          f"{m.peak_rss_bytes / 1e6:.0f}")
    return table


def _kernels(kernels: list[dict[str, Any]]) -> Any:
    """A line for all matrices of one layout and choice."""
    from rich.table import Table

    table = Table("tensors", "such as", "layout", "decoding", "a prompt", "why not others, decoding")
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for k in kernels:
        decode, prefill = ("+".join(dict.fromkeys(c["kernel"] for c in k[step])) for step in ("decode", "prefill"))
        why = "; ".join(dict.fromkeys(f"{n} {reason}" for c in k["decode"] for n, reason in c["rejected"].items()))
        groups.setdefault((k["layout"], decode, prefill, why), []).append(k["name"])
    for (layout, decode, prefill, why), names in groups.items():
        table.add_row(str(len(names)), names[0], layout, decode, prefill, why)
    return table

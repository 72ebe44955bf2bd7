"""``fewbits train``: quantization-aware training of a pretrained model."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbits.cli.common import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    ProgressBars,
    ThreadsOption,
    examples,
    report_to,
    say,
    say_reported,
)
from fewbits.cli.options import (
    BitsOption,
    ForceOption,
    GroupSizeOption,
    OutOption,
    ResumeOption,
    SeedOption,
    SeqlenOption,
    SettingsOption,
    recipe_settings,
)

EPILOG = examples(
    "fewbits train ./model -o ./model-ternary --recipe bitnet-finetune --text books.txt",
    "fewbits train ./model -o out --recipe bitnet-finetune --text hf:Salesforce/wikitext --steps 2000",
    "fewbits train ./model -o out --recipe bitnet-finetune --text books.txt --set format.layout=int2_g64",
    "fewbits train ./model -o out --recipe bitnet-finetune --text books.txt --resume",
    "accelerate launch --num_processes 4 -m fewbits.cli.main train ./model -o out --recipe bitnet-finetune --text a",
)


def train(
    model: ModelArgument,
    out: OutOption,
    recipe: Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="One with a table [refine.qat].")],
    text: Annotated[list[str], typer.Option("--text", metavar="SRC ...", help="Text or JSONL files, or hf:NAME.")],
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Default: once over the text, or 4096 rows of it.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", metavar="X", help="Of the weights, in steps of their grid (0.004).")
    ] = None,
    bits: BitsOption = None,
    group_size: GroupSizeOption = None,
    samples: Annotated[int | None, typer.Option("--samples", metavar="N", min=1, help="Rows of text at most.")] = None,
    seqlen: SeqlenOption = None,
    settings: SettingsOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    force: ForceOption = False,
    json: JsonOption = None,
) -> None:
    """Train a pretrained model with its codes in the loop; writes a checkpoint, and loss.png where matplotlib is."""
    with report_to(json) as report, ProgressBars() as progress:
        from fewbits.quant.refiners.curve import draw_curve
        from fewbits.quant.training.finetune import train as run

        overrides = recipe_settings(settings, bits=bits, group_size=group_size, calib=text, samples=None,
                                    seqlen=seqlen)
        result = run(model, out, recipe=recipe, overrides=overrides, steps=steps, lr=lr, rows=samples, device=device,
                     threads=threads, seed=seed, resume=resume, force=force, progress=progress, announce=say)
        if result is None:
            return  # one of several processes; the first reports
        report(result.to_json())
    for warning in result.warnings:
        say(f"warning: {warning}")
    (trained,) = (r for r in result.refined if r["refiner"] == "qat")
    say(f"wrote {out}: {result.bits_per_weight:.2f} bits per weight in the decoder blocks; KL to the original on "
        f"held-out text {trained['before']:.3f} to {trained['after']:.3f}, in {result.seconds:.0f} s")
    if (drawn := draw_curve(trained, out / "loss.png")) is not None:
        say(f"wrote {drawn}")
    say_reported(json)

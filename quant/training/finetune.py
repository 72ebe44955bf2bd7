"""``fewbits train``: a recipe with ``[refine.qat]``, run on a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fewbits.quant.errors import RecipeError
from fewbits.quant.pipeline import QuantizeReport, quantize
from fewbits.quant.recipe import load_recipe
from fewbits.quant.refiners.team import Team


def train(
    model: str | Path, out: str | Path, *, recipe: str, overrides: Mapping[str, Any] | None = None,
    steps: int | None = None, lr: float | None = None, rows: int | None = None, device: str | None = None,
    threads: int | None = None, seed: int = 0, resume: bool = False, force: bool = False,
    progress: Callable[[str, int, int], None] | None = None, announce: Callable[[str], None] | None = None,
) -> QuantizeReport | None:
    """Train a pretrained model with its codes in the loop, and write a fewbits checkpoint.

    Processes that ``accelerate launch`` or ``torchrun`` started together train one model, each on a part of the rows.

    Args:
        model: a Hugging Face id, a directory of safetensors, or a GGUF file.
        recipe: one with a table ``[refine.qat]``.
        overrides: dotted recipe keys to change; ``calibration.sources`` names the text.
        steps: of training; None: what the recipe says, or one pass over the rows.
        lr: learning rate of the weights, in steps of their grids.
        rows: of text, at most.
        out, device, threads, seed, resume, force, progress, announce: as :func:`~fewbits.quant.pipeline.quantize` has
            them.

    Returns:
        what was made; None in all processes but the first.

    Raises:
        RecipeError: the recipe does not train.
        FewbitsError: anything else that is wrong with the input.
    """
    own = {"refine.qat.steps": steps, "refine.qat.code_rate": lr, "refine.qat.samples": rows}
    if "qat" not in load_recipe(recipe, overrides).refine:
        raise RecipeError(f"--recipe: got {recipe}, which trains nothing; use bitnet-finetune, or give the recipe a "
                          "table [refine.qat]")
    chosen = {**(overrides or {}), **{k: v for k, v in own.items() if v is not None}}
    team = Team.of_launch(device)
    made = quantize(model, out, recipe=recipe, overrides=chosen, device=device, threads=threads, seed=seed,
                    resume=resume, force=force, progress=progress if team.first else None,
                    announce=announce if team.first else None, team=team)
    return made if team.first else None

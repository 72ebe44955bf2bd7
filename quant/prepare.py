"""What every job on a model starts with: the model opened, its calibration rows read."""

from __future__ import annotations

from torch import Tensor

from fewbits.calibration.data import CalibrationSet, load_calibration
from fewbits.calibration.stream import StreamedModel
from fewbits.eval.text import context_length
from fewbits.quant.errors import CalibrationError
from fewbits.quant.recipe import Recipe

HELD_OUT_ROWS = 8
"""Rows that measured KL is taken over."""


def load_text(
    recipe: Recipe, streamed: StreamedModel, seed: int, *, held_out: bool
) -> tuple[CalibrationSet, list[Tensor] | None]:
    """Calibration rows, and rows held out to judge by: drawn by the same rule, none of them in both.

    Raises:
        CalibrationError: the model has no usable tokenizer, or there is too little text.
    """
    from fewbits.calibration.data import self_generate
    from fewbits.serving.transformers import load, load_tokenizer

    source = streamed.source
    try:
        tokenizer = load_tokenizer(source.path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(
            f"{source.name}: has no usable tokenizer, which calibration needs ({reason}); put the model's tokenizer "
            "files beside its weights, or use a recipe without calibration, such as rtn"
        ) from error
    want = recipe.calibration
    context = context_length(streamed.model)
    if context is not None and want.seqlen > context:
        raise CalibrationError(
            f"calibration.seqlen: got {want.seqlen}, the model's context is {context} tokens; choose at most {context}"
        )

    def generate(rows: int, length: int, seed: int) -> Tensor:
        model = load(source.path)
        return self_generate(model, tokenizer, rows, length, seed=seed)

    def rows(samples: int) -> CalibrationSet:
        return load_calibration(
            want.sources, tokenizer, samples=samples, seqlen=want.seqlen, seed=seed, order=want.order,
            generate=generate,
        )

    text = rows(want.samples)
    vocabulary = streamed.model.get_input_embeddings().weight.shape[0]
    if int(text.tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"tokenizer: makes token {int(text.tokens.max())}, the model has {vocabulary}; they do not belong together"
        )
    return text, _held_out(text, rows(want.samples + 4 * HELD_OUT_ROWS)) if held_out else None


def _held_out(text: CalibrationSet, more: CalibrationSet) -> list[Tensor]:
    """Rows of ``more`` that are not in ``text``. Raises CalibrationError when there are too few to judge by."""
    used = {tuple(row.tolist()) for row in text.tokens}
    held = [row[mask] for row, mask in zip(more.tokens, more.mask) if tuple(row.tolist()) not in used]
    if len(held) < 2:
        raise CalibrationError(
            f"held-out text: got {len(held)} rows of text beyond those calibrated on, needed at least 2 to judge by; "
            "give more text, or lower --samples"
        )
    return held[:HELD_OUT_ROWS]

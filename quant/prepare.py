"""What every job on a model starts with: its calibration rows, of text and with images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fewbits.calibration.data import CalibrationSet, load_calibration
from fewbits.calibration.images import ImageRows, choose, find_images, load_images, require_pillow
from fewbits.calibration.stream import StreamedModel
from fewbits.eval.text import context_length
from fewbits.quant.architecture import takes_images
from fewbits.quant.errors import CalibrationError
from fewbits.quant.recipe import Recipe
from fewbits.quant.refiners.distill import Distill
from fewbits.quant.source import Source

HELD_OUT_ROWS = 8
"""Rows that measured KL is taken over."""

_LEAST_TO_JUDGE = 2  # rows without which there is no standard error
_LEFT_PER_HELD_OUT = 8  # rows of a short text for each that it gives up


def load_text(
    recipe: Recipe, streamed: StreamedModel, seed: int, *, held_out: bool
) -> tuple[CalibrationSet, list[Tensor] | None]:
    """Calibration rows, and rows held out to judge by: drawn by the same rule, none of them in both.

    A text that has fewer rows than asked gives up some of them to be held out, asked for or not, so that all runs on
    it share their statistics. Rows that refiners tune on are those of calibration and more (``tuning``). Of the
    calibration rows a share has images, where the recipe names some; rows held out are of text alone.

    Raises:
        CalibrationError: the model has no usable tokenizer, there is too little text, or images that it cannot take.
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

    images = load_image_rows(recipe, streamed, seed)
    calibrating = want.samples - (len(images) if images else 0)
    tuning = rows_to_tune(recipe)
    samples = max(calibrating, tuning)

    def generate(rows: int, length: int, seed: int) -> Tensor:
        model = load(source.path)
        return self_generate(model, tokenizer, rows, length, seed=seed)

    def rows(samples: int) -> CalibrationSet:
        return load_calibration(
            want.sources, tokenizer, samples=samples, seqlen=want.seqlen, seed=seed, order=want.order,
            generate=generate,
        )

    text = rows(samples)
    vocabulary = streamed.model.get_input_embeddings().weight.shape[0]
    if int(text.tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"tokenizer: makes token {int(text.tokens.max())}, the model has {vocabulary}; they do not belong together"
        )
    held: list[Tensor] | None = None
    given_up = min(HELD_OUT_ROWS, len(text.tokens) // _LEFT_PER_HELD_OUT)
    if len(text.tokens) < samples and given_up >= _LEAST_TO_JUDGE:
        text, held = text.hold_out(given_up)
    elif held_out:
        held = _others(text, rows(samples + 4 * HELD_OUT_ROWS))
    if tuning:
        text = replace(text.first(calibrating), tuning=text)
    return _mixed(text, images, recipe, streamed), held


def rows_to_tune(recipe: Recipe) -> int:
    """Rows of text that the refiners want, those included that they hold out."""
    wanted = (r.samples + r.held_out for r in recipe.make_refiners().values() if isinstance(r, Distill))
    return max(wanted, default=0)


def load_image_rows(recipe: Recipe, streamed: StreamedModel, seed: int) -> ImageRows | None:
    """The share of the calibration rows that have images; None where the recipe names no images.

    Where there are too few images, the rows that they leave are of text.

    Raises:
        CalibrationError: the model takes no images or lacks the processor for them, or an image cannot be used.
    """
    want = recipe.calibration
    if not want.images:
        return None
    if not takes_images(streamed.model):
        raise CalibrationError(f"--images {want.images}: {type(streamed.model).__name__} takes text alone; leave the "
                               "images out")
    if want.samples < 2:
        raise CalibrationError(f"--samples: got {want.samples}, needed at least 2 with images: one of them, one of "
                               "text")
    require_pillow()
    files = find_images(want.images)
    processor = _processor(streamed.source)
    wanted = min(max(round(want.image_fraction * want.samples), 1), want.samples - 1)
    chosen = choose(files, wanted, None if want.order == "first" else seed)
    return load_images(chosen, processor, context=context_length(streamed.model))


def _processor(source: Source) -> Any:
    """The model's processor. Raises CalibrationError where it has none that can be used."""
    from fewbits.serving.transformers import load_processor

    way_out = "put the model's preprocessor_config.json and processor_config.json beside its weights"
    try:
        processor = load_processor(source.path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CalibrationError(f"{source.name}: has no processor of images that can be used ({reason[:300]}); install "
                               f"what it asks for, or {way_out}") from error
    if getattr(processor, "image_processor", None) is None:
        raise CalibrationError(f"{source.name}: has no processor of images; {way_out}")
    return processor


def _mixed(text: CalibrationSet, images: ImageRows | None, recipe: Recipe, streamed: StreamedModel) -> CalibrationSet:
    """Rows of text and with images as one set, with a warning where the images are fewer than they should be."""
    warnings = list(text.warnings)
    want = recipe.calibration
    if images is not None:
        text = text.with_images(images, want.images)
        if (share := len(images) / text.n_rows) < 0.9 * want.image_fraction:
            warnings.append(f"{want.images}: has images for {share:.0%} of the calibration rows, asked for "
                            f"{want.image_fraction:.0%}; add images, or lower --samples")
    elif takes_images(streamed.model):
        warnings.append(f"{type(streamed.model).__name__} takes images, but only text was calibrated on; "
                        "add --images")
    return replace(text, warnings=warnings)


def _others(text: CalibrationSet, more: CalibrationSet) -> list[Tensor]:
    """Rows of ``more`` that are not in ``text``. Raises CalibrationError when there are too few to judge by."""
    used = {tuple(row.tolist()) for row in text.tokens}
    held = [row[mask] for row, mask in zip(more.tokens, more.mask) if tuple(row.tolist()) not in used]
    if len(held) < _LEAST_TO_JUDGE:
        raise CalibrationError(
            f"held-out text: got {len(held)} rows of text beyond those calibrated on, needed at least "
            f"{_LEAST_TO_JUDGE} to judge by; give more text, or lower --samples"
        )
    return held[:HELD_OUT_ROWS]

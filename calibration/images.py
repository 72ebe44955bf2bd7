"""Images to calibrate on, each with its text: read from a folder or a JSONL file, made into inputs by the model's own
processor.

A row is kept as the bytes of its file and made into inputs each time it is asked for: pixels are many times their file.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from fewbits.quant.errors import CalibrationError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What a file may be, whatever its name: Pillow reads more, some of it with the help of other programs."""

MAX_IMAGE_BYTES = 64_000_000
MAX_TEXT_BYTES = 1_000_000

_BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, OverflowError, struct.error, zlib.error)
"""What Pillow's readers raise for files that are damaged, or no images."""


@dataclass(frozen=True)
class ImageFile:
    """Where an image lies, and its text.

    Attributes:
        path: of the image; it may turn out not to be one.
        text: what stands after the image; may be empty.
        named: what error messages call it: the file, or the line that names it.
    """

    path: Path
    text: str
    named: str


@dataclass(frozen=True)
class ImageRows:
    """Calibration rows of one image and its text each.

    Attributes:
        images: ``(name, bytes of the file, text)`` of each row.
        processor: the model's own, which makes the inputs.
        lengths: tokens of each row, those that stand for the image included.
        fingerprint: sha256 hex over files, texts and the inputs made of them.
    """

    images: tuple[tuple[str, bytes, str], ...]
    processor: Any
    lengths: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.images)

    def inputs(self, i: int) -> dict[str, Tensor]:
        """What the model is called with for row ``i``: ``input_ids (1, L)``, pixels, and what else it asks for."""
        return make_inputs(self.processor, *self.images[i])


def load_images(files: Sequence[ImageFile], processor: Any, *, context: int | None) -> ImageRows:
    """Read images and check that the model can be given each.

    Args:
        processor: a transformers processor of images and text.
        context: the most tokens a row may have, or None.

    Raises:
        CalibrationError: naming the image that cannot be read or does not fit.
    """
    digest = hashlib.sha256()
    images, lengths = [], []
    for file in files:
        row = (file.named, _read_bytes(file), file.text)
        inputs = make_inputs(processor, *row)
        length = inputs["input_ids"].shape[1]
        if context is not None and length > context:
            raise CalibrationError(f"{file.named}: makes {length} tokens with its text, the model's context is "
                                   f"{context}; shorten the text, or take a smaller image")
        for part in (row[1], row[2].encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
        for name in sorted(inputs):  # the processor's own settings are in what it makes
            digest.update(name.encode() + inputs[name].contiguous().numpy().tobytes())
        images.append(row)
        lengths.append(length)
    return ImageRows(tuple(images), processor, tuple(lengths), digest.hexdigest())


def find_images(source: str) -> list[ImageFile]:
    """Images of a folder (a ``.txt`` of the same name has the text), or those that a JSONL file names.

    A line of JSONL is ``{"image": path, "text": ...}``, the path relative to the folder of the JSONL and inside of it.
    Files of a folder come in the order of their names; the images themselves are not opened.

    Raises:
        CalibrationError: neither of the two, nothing in it, or a line that is not as above.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _in_folder(path)
        needed = f"files that end with {', '.join(SUFFIXES)}"
    elif path.is_file() and path.suffix.lower() == ".jsonl":
        found = _in_jsonl(path)
        needed = 'lines such as {"image": "cat.png", "text": "A cat."}'
    else:
        raise CalibrationError(f"--images {source}: is neither a folder nor a .jsonl file; give one of them")
    if not found:
        raise CalibrationError(f"--images {source}: has no images, needed {needed}")
    return found


def _in_folder(folder: Path) -> list[ImageFile]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith("."):
            beside = path.with_suffix(".txt")
            text = _read_text(beside, MAX_TEXT_BYTES).strip() if beside.is_file() else ""
            found.append(ImageFile(path, text, str(path)))
    return found


def _in_jsonl(path: Path) -> list[ImageFile]:
    found = []
    for number, line in enumerate(_read_text(path, MAX_IMAGE_BYTES).splitlines(), 1):
        if line.strip():
            found.append(_of_line(path, number, line))
    return found


def _of_line(path: Path, number: int, line: str) -> ImageFile:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: is not JSON ({error}); repair it, or leave it out") from error
    image, text = (row.get("image"), row.get("text", "")) if isinstance(row, dict) else (None, None)
    if not isinstance(image, str) or not image or not isinstance(text, str):
        raise CalibrationError(f"{where}: got {line.strip()[:80]}, needed an object whose image is a path and whose "
                               'text, if any, is a string: {"image": "cat.png", "text": "A cat."}')
    if PurePath(image).is_absolute() or ".." in PurePath(image).parts or "\0" in image:
        raise CalibrationError(f"{where}: got image {image[:200]!r}, needed a path inside of the folder that the "
                               "JSONL lies in; move the image there")
    return ImageFile(path.parent / image, text, f"{where}: {image}")


def _read_text(path: Path, limit: int) -> str:
    try:
        if path.stat().st_size > limit:
            raise CalibrationError(f"{path}: has {path.stat().st_size} bytes, needed at most {limit}; split it")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({error}); repair it, or leave it out") from error


def _read_bytes(file: ImageFile) -> bytes:
    try:
        size = file.path.stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise CalibrationError(f"{file.named}: has {size} bytes, needed at most {MAX_IMAGE_BYTES}; make it smaller")
        return file.path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{file.named}: cannot be read ({error.strerror}); repair the path, or leave it out"
                               ) from error


# -- inputs of a model ---------------------------------------------------------------------------------------------


def require_pillow() -> None:
    """Raise CalibrationError where Pillow, which decodes images, is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise CalibrationError("--images: needs Pillow to read images, which is not installed; "
                               "pip install 'fewbits[vision]'") from error


def make_inputs(processor: Any, name: str, data: bytes, text: str) -> dict[str, Tensor]:
    """What a model is called with for an image followed by a text.

    The chat template, where there is one, makes a user's turn of both; else the text follows the image on a new line.

    Raises:
        CalibrationError: the file is no image, or the processor cannot place it.
    """
    from jinja2 import TemplateError

    image = _decode(name, data)
    try:
        if processor.chat_template:
            content: list[dict[str, Any]] = [{"type": "image", "image": image}]
            content += [{"type": "text", "text": text}] if text else []
            made = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:
            made = processor(images=image, text=f"{processor.image_token}\n{text}", return_tensors="pt")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, TemplateError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(f"{name}: the model's processor cannot make inputs of it ({reason}); "
                               "take another image, or repair the processor's files") from error
    inputs = {k: v for k, v in made.items() if isinstance(v, Tensor)}
    mark = getattr(processor, "image_token_id", None)
    if len(inputs) < 2 or (mark is not None and not bool((inputs["input_ids"] == mark).any())):
        raise CalibrationError(f"{name}: the model's processor left the image out; its chat template must write an "
                               "image where a turn has one")
    return inputs


def _decode(name: str, data: bytes) -> Any:
    """The image in RGB, turned as its camera says."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (*_BROKEN, Image.DecompressionBombError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(f"{name}: is damaged or no image ({reason}); replace it, or leave it out") from error


def choose(files: Sequence[ImageFile], n: int, seed: int | None) -> list[ImageFile]:
    """``n`` of the files: the first, or drawn without replacement."""
    if seed is None:
        return list(files[:n])
    return [files[i] for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:n]]

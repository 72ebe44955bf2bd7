"""Images to calibrate on: what is found, what a model is given, what one is told of those that cannot be used."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image
from transformers import AutoProcessor

from fewbits.calibration.images import MAX_IMAGE_BYTES, ImageFile, choose, find_images, load_images, require_pillow
from fewbits.quant.errors import CalibrationError
from tests.vision import save_images, save_jsonl, save_llava


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory):
    return AutoProcessor.from_pretrained(save_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_images(tmp_path / "images", 3)


# -- finding -----------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_images_by_name_with_captions(folder: Path) -> None:
    (folder / "1.txt").unlink()
    (folder / "notes.md").write_text("no image")
    shutil.copy(folder / "0.png", folder / "A.PNG")
    found = find_images(str(folder))
    assert [f.path.name for f in found] == ["0.png", "1.png", "2.png", "A.PNG"]
    assert [f.text for f in found] == ["Picture 0 of 3, which shows noise of kind 0.", "",
                                       "Picture 2 of 3, which shows noise of kind 4.", ""]


def test_a_jsonl_names_images_beside_it(folder: Path, tmp_path: Path) -> None:
    path = save_jsonl(tmp_path / "rows.jsonl", [{"image": "images/2.png", "text": "Two."}, {"image": "images/0.png"}])
    with open(path, "a") as f:
        f.write("\n")  # an empty line is none
    assert [(f.path, f.text) for f in find_images(str(path))] == [
        (folder / "2.png", "Two."), (folder / "0.png", ""),
    ]


@pytest.mark.parametrize(("line", "message"), [
    ('{"image": "a.png"', "line 1: is not JSON"),
    ('{"picture": "a.png"}', 'line 1: got .*"picture".*needed an object whose image is a path'),
    ('{"image": "a.png", "text": 3}', "needed an object .* whose text, if any, is a string"),
    ('{"image": ""}', "needed an object"),
    ('["a.png"]', "needed an object"),
    ('{"image": "/etc/passwd"}', "got image '/etc/passwd', needed a path inside of the folder"),
    ('{"image": "images/../../a.png"}', "needed a path inside of the folder"),
    ("", "has no images, needed lines such as"),
])
def test_bad_lines(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(CalibrationError, match=message) as error:
        find_images(str(tmp_path / "rows.jsonl"))
    assert "rows.jsonl" in str(error.value)


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    for source in ("nowhere", "a.zip"):
        with pytest.raises(CalibrationError, match=r"is neither a folder nor a \.jsonl file; give one of them"):
            find_images(str(tmp_path / source))
    with pytest.raises(CalibrationError, match=r"has no images, needed files that end with \.png"):
        find_images(str(tmp_path))
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(CalibrationError, match="cannot be read as UTF-8"):
        find_images(str(tmp_path / "rows.jsonl"))


def test_choice(folder: Path) -> None:
    files = find_images(str(save_images(folder, 20)))
    assert choose(files, 5, None) == files[:5]
    one, again, other = (choose(files, 5, seed) for seed in (1, 1, 2))
    assert one == again != other and len({f.path for f in one}) == 5


# -- inputs ------------------------------------------------------------------------------------------------------------


def test_inputs_are_the_processors_own(folder: Path, processor) -> None:
    rows = load_images(find_images(str(folder)), processor, context=None)
    for i in range(3):
        text = f"<image>\nPicture {i} of 3, which shows noise of kind {i * i}."
        expected = processor(images=Image.open(folder / f"{i}.png"), text=text, return_tensors="pt")
        got = rows.inputs(i)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[k], expected[k]) for k in got)
        assert int((got["input_ids"] == 256).sum()) == 16 and rows.lengths[i] == got["input_ids"].shape[1]


def test_a_chat_template_makes_a_turn_of_image_and_text(folder: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(save_llava(tmp_path / "chat", chat=True))
    rows = load_images([ImageFile(folder / "0.png", "Hi.", "0.png")], processor, context=None)
    expected = processor(images=Image.open(folder / "0.png"), text="user: <image>Hi.", return_tensors="pt")
    assert torch.equal(rows.inputs(0)["input_ids"], expected["input_ids"])
    processor.chat_template = "{{ messages[0].role }}"
    with pytest.raises(CalibrationError, match=r"0\.png: .*(left the image out|cannot make inputs)"):
        load_images([ImageFile(folder / "0.png", "Hi.", "0.png")], processor, context=None)


def test_other_modes_and_orientation(folder: Path, processor) -> None:
    """Palettes, transparency and grey become RGB; a camera's orientation is applied."""
    wide = Image.new("RGB", (16, 16), (255, 0, 0))
    wide.paste((0, 0, 255), (8, 0, 16, 16))
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down: the colours change sides
    wide.save(folder / "plain.png")
    wide.save(folder / "turned.png", exif=turned)
    for i, mode in enumerate(("P", "RGBA", "L", "1")):
        wide.convert(mode).save(folder / f"mode{i}.png")
    names = ["plain.png", "turned.png", *(f"mode{i}.png" for i in range(4))]
    rows = load_images([ImageFile(folder / n, "", n) for n in names], processor, context=None)
    pixels = [rows.inputs(i)["pixel_values"] for i in range(len(names))]
    assert all(p.shape == (1, 3, 16, 16) for p in pixels)
    assert torch.equal(pixels[1], pixels[0].flip(-1)) and not torch.equal(pixels[1], pixels[0])


def test_the_fingerprint_sees_images_captions_and_the_processor(folder: Path, processor, tmp_path: Path) -> None:
    def fingerprint(with_: object = processor) -> str:
        return load_images(find_images(str(folder)), with_, context=None).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    other = AutoProcessor.from_pretrained(save_llava(tmp_path / "other"))
    other.image_processor.image_mean = [0.5, 0.5, 0.5]
    seen = [first, fingerprint(other)]
    (folder / "1.txt").write_text("Something else.")
    seen.append(fingerprint())
    image = Image.open(folder / "2.png").convert("RGB")
    image.putpixel((9, 9), (1, 2, 3))
    image.save(folder / "2.png")
    seen.append(fingerprint())
    Image.open(folder / "0.png").save(folder / "0.png", compress_level=0)  # the same pixels in another file
    seen.append(fingerprint())
    (folder / "0.png").unlink()
    seen.append(fingerprint())
    assert len(set(seen)) == 6


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "header", "script", "missing", "folder"])
def test_a_bad_image_is_named(damage: str, folder: Path, processor) -> None:
    path = folder / "1.png"
    data = path.read_bytes()
    if damage in ("missing", "folder"):
        path.unlink()
    if damage == "folder":
        path.mkdir()
    broken = {"text": b"no image at all", "empty": b"", "cut": data[: len(data) // 2], "header": data[:20] + b"\0" * 9,
              "script": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"}
    if damage in broken:
        path.write_bytes(broken[damage])
    files = [ImageFile(folder / f"{i}.png", "", str(folder / f"{i}.png")) for i in range(3)]
    with pytest.raises(CalibrationError, match=rf"{path}: (is damaged or no image|cannot be read)"):
        load_images(files, processor, context=None)


def test_too_large_a_file_is_not_read(folder: Path, processor) -> None:
    os.truncate(folder / "0.png", MAX_IMAGE_BYTES + 1)  # sparse
    with pytest.raises(CalibrationError, match=r"0\.png: has 64000001 bytes, needed at most 64000000"):
        load_images(find_images(str(folder)), processor, context=None)


def test_a_row_that_does_not_fit_the_context(folder: Path, processor) -> None:
    with pytest.raises(CalibrationError, match=r"0\.png: makes 61 tokens with its text, the model's context is 60"):
        load_images(find_images(str(folder)), processor, context=60)
    load_images(find_images(str(folder))[:1], processor, context=61)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    require_pillow()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CalibrationError, match=r"needs Pillow.*pip install 'fewbits\[vision\]'"):
        require_pillow()

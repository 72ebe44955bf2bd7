"""Models of images and text from end to end (LUQ, arXiv 2509.23729): mixed calibration, blocks by entropy."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import fewbits
from fewbits.cli.main import main
from fewbits.kernels.linear import PackedMatrix
from fewbits.quant import prepare
from fewbits.quant.errors import CalibrationError, CheckpointError
from fewbits.quant.source import open_source
from tests.conftest import save_tiny_model
from tests.vision import QwenImages, save_images, save_llava, save_qwen

torch.set_num_threads(1)

BLOCKS = "model.language_model.layers."


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("pictures"), 10)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(f"Line {i} of a text that says little, but says it {i * i} times. " for i in range(60)))
    return path


def settings(text: Path, pictures: Path | None = None, **more: Any) -> dict[str, Any]:
    small = {"calibration.sources": [str(text)], "calibration.samples": 16, "calibration.seqlen": 32}
    return small | ({"calibration.images": str(pictures)} if pictures else {}) | more


def luq(model: Path, out: Path, text: Path, pictures: Path | None = None, *, bpw: float = 3.3, **more: Any):
    return fewbits.quantize(model, out, recipe="luq", device="cpu", overrides=settings(
        text, pictures, **{"budget.bpw": bpw, **more}))


def lock(out: Path) -> dict[str, Any]:
    return json.loads((out / "fewbits.lock").read_text())


def example(folder: Path, pictures: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)(
        images=Image.open(pictures / "0.png"), text="<image>\nWhat is this?", return_tensors="pt")


@torch.no_grad()
def kl(original: nn.Module, other: nn.Module, inputs: Any) -> float:
    p, q = (m(**inputs).logits.log_softmax(-1) for m in (original, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def made(llava: Path, pictures: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("made") / "out"
    return out, luq(llava, out, text, pictures)


def test_the_checkpoint_loads_and_generates_with_an_image(made, llava: Path, pictures: Path) -> None:
    out, _ = made
    model = AutoModelForImageTextToText.from_pretrained(out)
    packed = {n for n, m in model.named_modules() if isinstance(m, PackedMatrix)}
    linears = {n for n, m in AutoModelForImageTextToText.from_pretrained(llava).named_modules()
               if isinstance(m, nn.Linear) and n.startswith(BLOCKS)}
    assert packed == linears and len(packed) == 4 * 7
    inputs = example(out, pictures)
    assert torch.equal(inputs["pixel_values"], example(llava, pictures)["pixel_values"])
    tokens = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert tokens.shape == (1, inputs["input_ids"].shape[1] + 6)
    assert type(fewbits.load(out, device="cpu")) is type(model)


def test_it_saves_and_loads_again(made, tmp_path: Path) -> None:
    model = fewbits.load(made[0], device="cpu")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())


def test_names_of_older_checkpoints(made, llava: Path, pictures: Path, text: Path, tmp_path: Path) -> None:
    """The hub's LLaVA has another name for the tower, and a buffer that is none any more."""
    from safetensors.torch import load_file, save_file

    old = tmp_path / "old"
    shutil.copytree(llava, old)
    tensors = {k.replace("vision_tower.", "vision_tower.vision_model."): v
               for k, v in load_file(old / "model.safetensors").items()}
    assert any(k.startswith("language_model.model.layers.") for k in tensors)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    luq(old, tmp_path / "out", text, pictures)
    ours, expected = (fewbits.load(p, device="cpu").state_dict() for p in (tmp_path / "out", made[0]))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[k], expected[k]) for k in ours)


def test_what_lies_outside_the_decoder_is_untouched(made, llava: Path) -> None:
    out, _ = made
    ours, original = (AutoModelForImageTextToText.from_pretrained(p).state_dict() for p in (out, llava))
    outside = [n for n in original if not n.startswith(BLOCKS)]
    assert {"model.vision_tower", "model.multi_modal_projector", "lm_head.weight"} <= {
        n if n.startswith("lm") else ".".join(n.split(".")[:2]) for n in outside}
    assert all(torch.equal(ours[n], original[n]) for n in outside)


def test_kl_with_an_image_is_sane_and_falls_with_bits(
    made, llava: Path, pictures: Path, text: Path, tmp_path: Path
) -> None:
    original = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).eval()
    inputs = example(llava, pictures)
    low = kl(original, fewbits.load(made[0], device="cpu"), inputs)
    fewbits.quantize(llava, tmp_path / "out", recipe="gptq", overrides=settings(text, pictures, **{"format.bits": 8}),
                     device="cpu")
    high = kl(original, fewbits.load(tmp_path / "out", device="cpu"), inputs)
    assert 0 < high < 1e-2 * low < 0.05
    dense = fewbits.load(made[0], device="cpu", dequantize=True)
    assert abs(kl(original, dense, inputs) - low) < 1e-3 * low
    shuffled = dict(inputs) | {"pixel_values": inputs["pixel_values"].flip(-1)}
    assert kl(original, original, inputs) == 0 and not torch.equal(
        original(**inputs).logits, original(**shuffled).logits)  # the image counts


def test_files_and_report(made, llava: Path, pictures: Path) -> None:
    out, report = made
    config, source = json.loads((out / "config.json").read_text()), json.loads((llava / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == source and quantization["quant_method"] == "fewbits"
    names = {p.name for p in llava.iterdir()} - {"model.safetensors", "config.json"}
    assert "processor_config.json" in names
    assert all((out / n).read_bytes() == (llava / n).read_bytes() for n in names)
    assert report.measured["kl_mean"] > 0
    assert not any("only text" in w for w in report.warnings)
    identity = lock(out)["calibration"]
    assert identity["rows"] == 16 and f"{pictures}: 8 rows with images" in identity["sources"]
    assert identity["tokens"] > 8 * 32 + 8 * 50


def block_bits(out: Path) -> list[set[str]]:
    bits: list[set[str]] = [set() for _ in range(4)]
    for t in json.loads((out / "plan.json").read_text())["tensors"]:
        if t["linear"]:
            bits[int(t["name"].removeprefix(BLOCKS).partition(".")[0])].add(t["format"].partition("_")[0])
    return bits


def test_the_budget_is_met_from_below_to_the_byte(
    llava: Path, pictures: Path, text: Path, tmp_path: Path
) -> None:
    """A budget of what ``low`` blocks of 2 bits and the rest of 4 take buys just that; a byte less lowers one more."""

    def facts(bpw: float, formats: list[str]) -> list[dict[str, Any]]:
        keys = {"budget.bpw": bpw, "allocate.formats": formats}
        planned = fewbits.plan(llava, recipe="luq", overrides=settings(text, pictures, **keys), device="cpu")
        return [f for f in planned.facts if f["linear"]]

    menu = ["int2", "int4"]
    most, least = (sum(f["bytes"] for f in facts(16, formats)) for formats in (["int4"], ["int2"]))
    weights = sum(math.prod(f["shape"]) for f in facts(16, menu))
    for low in (1, 2, 3):
        exact = most - low * (most - least) // 4  # all blocks are of one size
        for spare, expected in ((0, low), (-1, low + 1)):
            chosen = facts(8 * (exact + spare + 0.5) / weights, menu)
            assert sum(f["bytes"] for f in chosen) == most - expected * (most - least) // 4 <= exact + spare
    report = luq(llava, tmp_path / "out", text, pictures, bpw=8 * (exact + 0.5) / weights)
    assert report.bits_per_weight == 8 * exact / weights
    stored = [f for f in json.loads((tmp_path / "out" / "plan.json").read_text())["tensors"] if f["linear"]]
    assert sum(f["bytes"] for f in stored) == exact
    assert sorted(map(sorted, block_bits(tmp_path / "out"))) == [["int2"]] * 3 + [["int4"]]


def test_the_blocks_of_least_entropy_get_two_bits(
    llava: Path, pictures: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbits.calibration import sensitivity

    seen: dict[int, float] = {}

    def watched(job: Any, **kwargs: Any) -> Any:
        scores = scored(job, **kwargs)
        seen.update({i: s.entropy for i, s in scores.items()})
        return scores

    scored = sensitivity.block_scores
    monkeypatch.setattr(sensitivity, "block_scores", watched)
    for low, bpw in ((1, 4.2), (2, 3.7), (3, 3.2)):
        luq(llava, tmp_path / str(low), text, pictures, bpw=bpw)
        order = sorted(seen, key=seen.__getitem__)
        assert len(set(seen.values())) == 4
        bits = block_bits(tmp_path / str(low))
        assert [i for i in range(4) if bits[i] == {"int2"}] == sorted(order[: bits.count({"int2"})])
    assert 0 < bits.count({"int2"}) < 4


def test_images_change_the_run_and_what_is_quantized(
    made, llava: Path, text: Path, tmp_path: Path
) -> None:
    out, _ = made
    before = lock(out)
    other = save_images(tmp_path / "pictures", 10, seed=1)
    luq(llava, tmp_path / "other", text, other)
    luq(llava, tmp_path / "text", text)
    prints = [lock(o)["calibration"]["fingerprint"] for o in (out, tmp_path / "other", tmp_path / "text")]
    assert len(set(prints)) == 3 and before["calibration"]["tokens"] != lock(tmp_path / "text")["calibration"]["tokens"]
    name = f"{BLOCKS}0.mlp.down_proj.weight_packed"
    packed = [weights(o, name) for o in (out, tmp_path / "other", tmp_path / "text")]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(packed))


def weights(out: Path, name: str) -> Tensor:
    from safetensors import safe_open

    index = json.loads((out / "fewbits.safetensors.index.json").read_text())["weight_map"]
    with safe_open(out / index[name], framework="pt") as f:
        return f.get_tensor(name)


def test_the_same_run_gives_the_same_bytes_and_other_images_do_not_resume(
    llava: Path, pictures: Path, text: Path, tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "Quantizing" and done == 3:
            raise KeyboardInterrupt

    images = save_images(tmp_path / "images", 10)
    options = {"recipe": "gptq", "overrides": settings(text, images), "device": "cpu"}
    fewbits.quantize(llava, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fewbits.quantize(llava, tmp_path / "stopped", progress=stop, **options)
    caption = (images / "0.txt").read_text()
    for i in range(10):
        (images / f"{i}.txt").write_text("Another caption.")
    with pytest.raises(CheckpointError, match="calibration"):
        fewbits.quantize(llava, tmp_path / "stopped", resume=True, **options)
    save_images(images, 10)
    assert (images / "0.txt").read_text() == caption
    fewbits.quantize(llava, tmp_path / "stopped", resume=True, **options)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()


# -- how much of it is images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "rows"), [(0.25, 4), (0.5, 8), (0.01, 1), (0.99, 10)])
def test_the_share_of_rows_with_images(
    fraction: float, rows: int, llava: Path, pictures: Path, text: Path, tmp_path: Path
) -> None:
    report = fewbits.quantize(llava, tmp_path / "out", recipe="gptq", device="cpu", overrides=settings(
        text, pictures, **{"calibration.image_fraction": fraction}))
    identity = lock(tmp_path / "out")["calibration"]
    assert identity["rows"] == 16 and identity["sources"][-1] == f"{pictures}: {rows} rows with images"
    few = [w for w in report.warnings if "has images for 62% of the calibration rows, asked for 99%" in w]
    assert len(few) == (rows == 10)  # there are ten images


def test_text_alone_works_and_warns(llava: Path, text: Path, tmp_path: Path) -> None:
    report = luq(llava, tmp_path / "out", text)
    assert any("LlavaForConditionalGeneration takes images, but only text was calibrated on" in w
               for w in report.warnings)
    assert report.bits_per_weight <= 3.3


# -- the command line --------------------------------------------------------------------------------------------------


def test_plan_then_quantize(llava: Path, pictures: Path, text: Path, tmp_path: Path) -> None:
    small = ["--images", str(pictures), "--calib", str(text), "--samples", "16", "--seqlen", "32", "--recipe", "luq",
             "--threads", "1", "--device", "cpu"]
    plan, report = tmp_path / "plan.json", tmp_path / "report.json"
    assert main(["plan", str(llava), "--bpw", "3.3", "-o", str(plan), *small]) == 0
    out = str(tmp_path / "out")
    assert main(["quantize", str(llava), "-o", out, "--bpw", "3.3", "--json", str(report), *small]) == 0
    planned, done = json.loads(plan.read_text()), json.loads(report.read_text())
    assert planned["bytes"] == done["bytes"] == sum(
        p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert planned["bits_per_weight"] == done["bits_per_weight"] <= 3.3
    formats = [{t["name"]: t["format"] for t in json.loads(p.read_text())["tensors"] if t["linear"]}
               for p in (plan, tmp_path / "out" / "plan.json")]
    assert formats[0] == formats[1]


def test_memory_is_counted(llava: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--calib", str(text), "--samples", "8", "--seqlen", "32", "--recipe", "luq", "--threads", "1", "--json"]
    assert main(["plan", str(llava), "--fits-in", "10MB", "--ctx", "64", *small]) == 0
    footprint = json.loads(capsys.readouterr().out)["footprint"]
    assert footprint["kv_cache"] == 4 * 2 * 64 * 2 * 16 * 4  # blocks, k and v, tokens, heads, width of a head, float32


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_images_for_a_model_of_text(tiny, text: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="LlamaForCausalLM takes text alone; leave the images out"):
        fewbits.quantize(tiny("llama"), tmp_path / "out", overrides=settings(text, pictures), device="cpu")


def test_one_row_is_too_few(llava: Path, text: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="--samples: got 1, needed at least 2 with images"):
        fewbits.quantize(llava, tmp_path / "out", device="cpu",
                         overrides=settings(text, pictures, **{"calibration.samples": 1}))


def test_no_processor(text: Path, pictures: Path, tmp_path: Path) -> None:
    model = save_llava(tmp_path / "model")
    (model / "processor_config.json").unlink()
    with pytest.raises(CalibrationError, match=r"has no processor of images.*put the model's preprocessor_config"):
        fewbits.quantize(model, tmp_path / "out", overrides=settings(text, pictures), device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_bad_image_is_one_line_and_exit_2(
    llava: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = save_images(tmp_path / "images", 2)
    (images / "1.png").write_bytes(b"no image")
    code = main(["quantize", str(llava), "-o", str(tmp_path / "out"), "--images", str(images), "--calib", str(text),
                 "--samples", "8", "--seqlen", "32", "--device", "cpu"])
    err = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    assert code == 2 and len(err) == 1 and "1.png: is damaged or no image" in err[0]


# -- other models ------------------------------------------------------------------------------------------------------


def test_qwen(text: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own processor needs torchvision, for videos; without it one is told so. The rest is the same code."""
    model = save_qwen(tmp_path / "model")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(CalibrationError, match="Torchvision"):
            luq(model, tmp_path / "out", text, pictures)
    monkeypatch.setattr(prepare, "_processor", lambda source: QwenImages.at(source.path))
    report = luq(model, tmp_path / "out", text, pictures)
    assert 2.4 < report.bits_per_weight <= 3.3
    original, ours = (fewbits.load(p, device="cpu") for p in (model, tmp_path / "out"))
    inputs = QwenImages.at(model)(images=Image.open(pictures / "0.png"), text="<|image_pad|>\nHi", return_tensors="pt")
    assert 0 < kl(original, ours, inputs) < 5
    assert ours.generate(**inputs, max_new_tokens=4, min_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 4


def test_a_head_tied_in_the_text_config(text: Path, pictures: Path, tmp_path: Path) -> None:
    """A quantized head has weights of its own, and nothing in config.json says otherwise."""
    model = save_llava(tmp_path / "model", tied=True)
    assert "lm_head.weight" not in "".join(open_source(model).keys())
    assert json.loads((model / "config.json").read_text())["text_config"]["tie_word_embeddings"] is True
    fewbits.quantize(model, tmp_path / "kept", overrides=settings(text, pictures), device="cpu")
    inputs = example(model, pictures)
    original, kept = (fewbits.load(p, device="cpu") for p in (model, tmp_path / "kept"))
    assert kept.lm_head.weight is kept.get_input_embeddings().weight and 0 < kl(original, kept, inputs) < 1
    fewbits.quantize(model, tmp_path / "out", overrides=settings(text, pictures, lm_head=True), device="cpu")
    ours = fewbits.load(tmp_path / "out", device="cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["text_config"]["tie_word_embeddings"] is False
    assert isinstance(ours.lm_head, PackedMatrix) and not isinstance(ours.get_input_embeddings(), PackedMatrix)
    assert 0 < kl(original, ours, inputs) < 1


def test_stored_statistics_are_of_these_images(
    llava: Path, pictures: Path, text: Path, tmp_path: Path
) -> None:
    stats = tmp_path / "stats"
    fewbits.quantize(llava, tmp_path / "a", overrides=settings(text, pictures), stats=stats, device="cpu")
    fewbits.quantize(llava, tmp_path / "b", overrides=settings(text, pictures), stats=stats, device="cpu")
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    with pytest.raises(CheckpointError, match=r"another run \(calibration differs"):
        fewbits.quantize(llava, tmp_path / "c", overrides=settings(text), stats=stats, device="cpu")


@pytest.mark.parametrize("recipe", ["auto", "adaquant-ip", "evopress"])
def test_other_recipes(recipe: str, llava: Path, pictures: Path, text: Path, tmp_path: Path) -> None:
    """Damage models that run the whole model do so on the rows of text."""
    report = fewbits.quantize(llava, tmp_path / "out", recipe=recipe, device="cpu", overrides=settings(
        text, pictures, **{"budget.bpw": 3.3, "allocate.generations": 1, "allocate.offspring": 2}))
    assert report.bits_per_weight <= 3.3 and report.measured["kl_mean"] < 5


def test_text_models_are_opened_as_before(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, LlavaConfig

    from fewbits.quant.architecture import auto_class

    path = save_tiny_model(tmp_path, "llama")
    assert auto_class(AutoConfig.from_pretrained(path)) is AutoModelForCausalLM
    assert auto_class(LlavaConfig()) is AutoModelForImageTextToText

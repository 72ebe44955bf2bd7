"""Models of images and text run block by block: the decoder's blocks see what they see in the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from fewbits.calibration.blockscores import block_scores
from fewbits.calibration.collect import Collector, make_batches, model_inputs
from fewbits.calibration.data import CalibrationSet
from fewbits.calibration.images import find_images, load_images
from fewbits.calibration.stream import StreamedModel
from fewbits.calibration.survey import Survey
from fewbits.eval.text import context_length
from fewbits.quant.allocate.menu import build_menu
from fewbits.quant.architecture import takes_images
from fewbits.quant.errors import ModelError
from fewbits.quant.recipe import load_recipe
from fewbits.quant.source import open_source
from tests.vision import QwenImages, save_deepstack, save_images, save_llava, save_qwen

torch.set_num_threads(1)

PROCESSORS: dict[str, Callable[[Path], Any]] = {
    "llava": AutoProcessor.from_pretrained, "qwen2.5-vl": QwenImages.at, "qwen3-vl": QwenImages.at,
}
SAVE = {"llava": save_llava, "qwen2.5-vl": save_qwen, "qwen3-vl": save_deepstack}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = SAVE[family](tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("pictures"), 5)


def streamed(path: Path) -> StreamedModel:
    return StreamedModel(open_source(path), dtype=torch.float32, device=torch.device("cpu"))


def mixed(family: str, path: Path, pictures: Path) -> CalibrationSet:
    """Five rows with images beside six of text, one of them padded."""
    tokens = torch.randint(3, 256, (6, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(6, 20, dtype=torch.bool)
    mask[5, 13:] = False
    images = load_images(find_images(str(pictures)), PROCESSORS[family](path), context=128)
    return CalibrationSet(tokens, mask, "text", ["text"], []).with_images(images, "pictures")


def whole_model(path: Path) -> tuple[nn.Module, list[list[Tensor]], list[Tensor]]:
    """The whole model; the inputs of each decoder block, and the outputs of the last, filled by hooks."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    layers = model.model.language_model.layers
    inputs: list[list[Tensor]] = [[] for _ in layers]
    outputs: list[Tensor] = []
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda m, args, kwargs, i=i: inputs[i].append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    layers[-1].register_forward_hook(lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    return model, inputs, outputs


def whole_inputs(family: str, path: Path, text: CalibrationSet, pictures: Path) -> list[dict[str, Tensor]]:
    """What the whole model is given: the same rows, made by the processor without any code of ours."""
    processor = PROCESSORS[family](path)
    rows = [{"input_ids": x} for x in make_batches(text.tokens, text.mask)]
    for image in sorted(pictures.glob("*.png")):
        prompt = f"{processor.image_token}\n{image.with_suffix('.txt').read_text()}"
        rows.append(dict(processor(images=Image.open(image), text=prompt, return_tensors="pt")))
    return rows


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_hidden_states_are_those_of_the_whole_model(family: str, model, pictures: Path) -> None:
    ours, text = streamed(model(family)), mixed(family, model(family), pictures)
    theirs, inputs, outputs = whole_model(model(family))
    with torch.no_grad():
        for one in whole_inputs(family, model(family), text, pictures):
            theirs(**one, use_cache=False)
    with ours.outer():
        states, calls = ours.first_inputs(model_inputs(text))
    assert len(states) == 2 + 5  # a batch of text, the padded row, and each image by itself
    for block in ours.blocks():
        for i, want in enumerate(inputs[block.index]):
            torch.testing.assert_close(states[i], want, rtol=1e-5, atol=1e-5)
        states = [block.run(s, calls[i][block.index]) for i, s in enumerate(states)]
    for got, want in zip(states, outputs):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    # and the images are in there: their places do not hold the embedding of the placeholder
    ids = whole_inputs(family, model(family), text, pictures)[-1]["input_ids"][0]
    placeholder = theirs.get_input_embeddings().weight[256].detach()
    here = inputs[0][-1][0][ids == 256]
    assert len(here) >= 4 and float((here - placeholder).abs().amax(1).min()) > 0.05
    assert len(torch.unique(here, dim=0)) == len(here)


def test_positions_of_an_image_have_three_dimensions(model, pictures: Path) -> None:
    """Without what the processor says of the image's shape, the rotary embeddings are those of plain text."""
    ours, text = streamed(model("qwen2.5-vl")), mixed("qwen2.5-vl", model("qwen2.5-vl"), pictures)
    *_, row = model_inputs(text)
    assert not isinstance(row, Tensor) and "image_grid_thw" in row
    with ours.outer():
        _, (with_image,) = ours.first_inputs([row])
        _, (as_text,) = ours.first_inputs([row["input_ids"]])
    cos, plain = (c[0].kwargs["position_embeddings"][0] for c in (with_image, as_text))
    assert cos.shape[-2:] == plain.shape[-2:] and not torch.allclose(cos, plain.expand_as(cos))


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_statistics_are_sums_over_text_and_images(family: str, model, pictures: Path) -> None:
    ours, text = streamed(model(family)), mixed(family, model(family), pictures)
    theirs, _, _ = whole_model(model(family))
    name = "model.language_model.layers.2.mlp.down_proj"
    rows: list[Tensor] = []
    theirs.get_submodule(name).register_forward_pre_hook(lambda m, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for one in whole_inputs(family, model(family), text, pictures):
            theirs(**one, use_cache=False)
    x = torch.cat(rows).double()
    recipe = load_recipe("gptq", {"calibration.inputs": "original", "calibration.true_sequential": False})
    collector = Collector(ours, recipe, [name], text)
    for block in ours.blocks():
        for step in collector.steps(block):
            stats = collector.observe(block, step)
        if block.index == 2:
            (found,) = stats.values()
        collector.advance(block)
    assert found.n_tokens == len(x) == text.n_tokens > 6 * 20 - 7
    torch.testing.assert_close(found.xtx.double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_the_decoder_is_found_beside_a_larger_tower(tmp_path: Path) -> None:
    ours = streamed(save_llava(tmp_path, tower=256))
    tower, blocks = ours.model.model.vision_tower, ours.block_modules
    assert sum(p.numel() for p in tower.parameters()) > sum(p.numel() for p in blocks.parameters())
    assert ours.blocks_path == "model.language_model.layers" and len(blocks) == 4
    assert takes_images(ours.model) and context_length(ours.model) == 128


def test_one_block_in_memory_and_no_tower_beside_it(model) -> None:
    ours = streamed(model("llava"))
    with ours.outer():
        assert not any(p.is_meta for p in ours.model.model.vision_tower.parameters())
        assert all(p.is_meta for p in ours.block_modules.parameters())
    for block in ours.blocks():
        loaded = {n for n, p in ours.model.named_parameters() if not p.is_meta}
        assert loaded and all(n.startswith(f"model.language_model.layers.{block.index}.") for n in loaded)


def test_a_model_that_adds_between_blocks_is_refused_with_images_only(model, pictures: Path) -> None:
    ours, text = streamed(model("qwen3-vl")), mixed("qwen3-vl", model("qwen3-vl"), pictures)
    with ours.outer():
        states, _ = ours.first_inputs([torch.arange(3, 20)[None]])
        assert states[0].shape == (1, 17, 64)
        with pytest.raises(ModelError, match=r"Qwen3VL.*adds to the hidden states between .*; calibrate on text alone"):
            ours.first_inputs(model_inputs(text))


def test_entropy_is_of_text_and_images(model, pictures: Path) -> None:
    """The score of a block is that of the whole model's outputs over all rows, first tokens and sinks left out."""
    from fewbits.calibration.blockscores import _counted, cluster_entropy

    recipe = load_recipe("luq", {"budget.bpw": 3.0})
    scores = []
    text = mixed("llava", model("llava"), pictures)
    for rows in (text, CalibrationSet(text.tokens, text.mask, "", [], [])):
        ours = streamed(model("llava"))
        job = Survey(ours, recipe, build_menu(recipe, ours), rows, None, 0, lambda *a: None)
        scores.append([s.entropy for s in block_scores(job, entropy=True).values()])
    theirs, inputs, outputs = whole_model(model("llava"))
    with torch.no_grad():
        for one in whole_inputs("llava", model("llava"), text, pictures):
            theirs(**one, use_cache=False)
    for i, after in enumerate([*inputs[1:], outputs]):
        kept = torch.cat([_counted(a, a)[1] for a in after])
        assert abs(scores[0][i] - cluster_entropy(kept, seed=0)[0]) < 0.02
    assert min(abs(a - b) for a, b in zip(*scores)) > 0.05

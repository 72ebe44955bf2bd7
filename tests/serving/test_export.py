"""What all targets share: refusals, folders that are whole or not there, the command line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fewbits.cli.main import main
from fewbits.quant.errors import CheckpointError, FormatError, RecipeError
from fewbits.quant.formats import parse_format, parse_layout
from fewbits.quant.types import Layout, QuantizedTensor, Segment
from fewbits.serving.export import EXPORTS, export
from tests.serving.conftest import round_to_nearest
from tests.serving.exporting import SYMMETRIC, config_of, tensors_of, write_checkpoint

FOLDERS = ["compressed-tensors", "gptq"]
FORMATS = {"format__group_size": 32, **SYMMETRIC}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FOLDERS)
def test_what_is_written(to, quantized, tmp_path):
    folder = quantized("llama", **FORMATS)
    before, steps, out = contents(folder), [], tmp_path / "new" / "out"
    report = export(folder, out, to=to, progress=lambda what, done, total: steps.append((done, total)))
    assert contents(folder) == before, "the checkpoint itself is only read"
    assert steps[0] == (0, 3) and steps[-1] == (3, 3)
    files = {p.name for p in out.iterdir()}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert files == {"config.json", "model.safetensors.index.json", "generation_config.json", "tokenizer.json",
                     "tokenizer_config.json", "fewbits.lock", "README.md"} | shards
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert report.bytes == sum(p.stat().st_size for p in out.glob("*.safetensors")) and report.tensors == 14
    assert {p.stat().st_mode & 0o777 for p in out.iterdir()} == {0o666 & ~umask()}
    config = config_of(out)
    assert config.pop("quantization_config")["quant_method"] == to
    assert config == {k: v for k, v in config_of(folder).items() if k != "quantization_config"}
    again = tmp_path / "again"
    export(folder, again, to=to)
    assert contents(again) == contents(out)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_force_replaces_an_export_and_nothing_else(quantized, tmp_path):
    folder, out = quantized("llama", **FORMATS), tmp_path / "out"
    export(folder, out, to="gptq")
    (out / "model-00009-of-00009.safetensors").write_bytes(b"left by an earlier export")
    with pytest.raises(CheckpointError, match=r"out: exists.*--force"):
        export(folder, out, to="compressed-tensors")
    assert config_of(out)["quantization_config"]["quant_method"] == "gptq"
    export(folder, out, to="compressed-tensors", force=True)
    assert config_of(out)["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not (out / "model-00009-of-00009.safetensors").exists() and tensors_of(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_keeps_what_is_no_export(quantized, tmp_path):
    folder = quantized("llama", **FORMATS)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("a year of work")
    (tmp_path / "file").write_text("mine too")
    for name in ("notes", "file"):
        with pytest.raises(CheckpointError, match=rf"{name}: is no export"):
            export(folder, tmp_path / name, to="gptq", force=True)
    assert contents(tmp_path) == {"notes/mine.txt": b"a year of work", "file": b"mine too"}


@pytest.mark.parametrize("other", ["checkpoint", "model"])
def test_force_never_replaces_what_is_no_export_but_a_model(other, quantized, tiny, tmp_path):
    folder = quantized("llama", **FORMATS)
    target = shutil.copytree({"checkpoint": folder, "model": tiny("llama")}[other], tmp_path / "target")
    before = contents(target)
    with pytest.raises(CheckpointError, match="target: is no export"):
        export(folder, target, to="gptq", force=True)
    with pytest.raises(CheckpointError, match="target: is no export"):
        export(target if other == "checkpoint" else folder, target, to="gptq", force=True)
    assert contents(target) == before and [p.name for p in tmp_path.iterdir()] == ["target"]


def test_an_empty_directory_is_taken(quantized, tmp_path):
    (tmp_path / "out").mkdir()
    export(quantized("llama", **FORMATS), tmp_path / "out", to="gptq")
    assert tensors_of(tmp_path / "out")


def test_a_failure_leaves_what_was_there(quantized, tmp_path):
    """The last tensor of the last shard is refused, by its values, when all others are written."""
    good = quantized("llama", **FORMATS)
    bad = quantized("llama", {"*.1.mlp.down_proj": "int4_sym_g32_f32"}, **FORMATS)
    export(good, tmp_path / "out", to="gptq")
    before = contents(tmp_path)
    for out, force in (("new", False), ("out", True)):
        with pytest.raises(FormatError, match=r"layers\.1\.mlp\.down_proj: gptq stores scales in float16"):
            export(bad, tmp_path / out, to="gptq", force=force)
    assert contents(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_cannot_be_written(quantized, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):  # root may write anywhere but where the kernel has the say
        locked = Path("/sys/kernel")
    if not locked.is_dir():
        pytest.skip("no directory here that cannot be written")
    with pytest.raises(CheckpointError, match=r"out: cannot be written.*choose another output"):
        export(quantized("llama", **FORMATS), locked / "out", to="gptq")


def test_a_path_through_a_file(quantized, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/out: cannot be written.*choose another output"):
        export(quantized("llama", **FORMATS), tmp_path / "file" / "out", to="gptq")


# -- what is no checkpoint --------------------------------------------------------------------------------------------


def test_what_is_no_checkpoint(tiny, quantized, tmp_path):
    unfinished = shutil.copytree(quantized("llama", **FORMATS), tmp_path / "unfinished")
    (unfinished / "fewbits.safetensors.index.json").unlink()
    (unfinished / ".fewbits").mkdir()
    for source, match in ((tmp_path / "missing", "missing: holds no fewbits index"),
                          (tiny("llama"), "no fewbits index"), (unfinished, "an unfinished run .*--resume")):
        with pytest.raises(CheckpointError, match=match):
            export(source, tmp_path / "out", to="gptq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage, match", [
    (lambda f: next(f.glob("fewbits-00002*.safetensors")).unlink(), "fewbits-00002"),
    (lambda f: next(f.glob("fewbits-00002*.safetensors")).write_bytes(b"short"), "fewbits-00002"),
    (lambda f: (f / "config.json").write_text("{}"), "config.json"),
    (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"llama"', '"lama"')), "lama"),
])
def test_damaged_checkpoints(damage, match, quantized, tmp_path):
    folder = shutil.copytree(quantized("llama", **FORMATS), tmp_path / "damaged")
    damage(folder)
    with pytest.raises(CheckpointError, match=match):
        export(folder, tmp_path / "out", to="gptq")
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("to", [to for to in EXPORTS if to != "dense"])
def test_tensors_of_several_runs_are_refused(to, tiny, tmp_path):
    source, name = tiny("llama"), "model.layers.0.mlp.up_proj"
    layout = parse_layout("int2_sym_g16[32]+int4_sym_g16[32]", 64)
    weight = load_file(source / "model.safetensors")[f"{name}.weight"]
    folder = write_checkpoint(source, tmp_path / "model", {name: round_to_nearest(weight, layout)})
    with pytest.raises(FormatError, match=rf"{name}: {to} takes one format for a tensor.*allocate\.unit = 'tensor'"):
        export(folder, tmp_path / "out", to=to)


# -- names ------------------------------------------------------------------------------------------------------------


def test_unknown_names(quantized, tmp_path):
    folder = quantized("llama", **FORMATS)
    with pytest.raises(RecipeError, match=r"--to: got 'gptqq', did you mean 'gptq'"):
        export(folder, tmp_path / "out", to="gptqq")
    with pytest.raises(RecipeError, match=r"--allow: got 'odd-bits', gptq knows asymmetric"):
        export(folder, tmp_path / "out", to="gptq", allow=["odd-bits"])
    with pytest.raises(RecipeError, match=r"--allow: got 'asymmetric', bitnet knows none"):
        export(folder, tmp_path / "out", to="bitnet", allow=["asymmetric"])


# -- command line -----------------------------------------------------------------------------------------------------


def test_command_line(tiny, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    quantize = ["quantize", str(tiny("llama")), "-o", str(model), "--recipe", "rtn", "--set", "format.symmetric=true"]
    assert main([*quantize, "--group-size", "32"]) == 0
    assert main(["export", str(model), "--to", "gptq", "-o", str(out), "--json", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr()
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {"output": str(out), "target": "gptq", "bytes": size, "tensors": 14, "warnings": []}
    assert printed.out == "" and f"14 quantized tensors, {size / 1e6:.1f} MB in {out}" in printed.err
    assert main(["export", str(model), "--to", "compressed-tensors", "-o", str(tmp_path / "ct"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "compressed-tensors"
    assert main(["export", str(model), "--to", "gptq", "-o", str(out)]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("--force to replace it")
    assert main(["export", str(model), "--to", "gptq", "-o", str(out), "--force"]) == 0
    assert main(["export", str(model), "--to", "bitnet", "-o", str(tmp_path / "bitnet")]) == 2
    assert "model.layers.0.self_attn.q_proj: bitnet takes ternary weights" in capsys.readouterr().err


def test_warnings_are_printed(quantized, tmp_path, capsys):
    folder = quantized("llama", {"*.mlp.*": "int8_sym_g32"}, **FORMATS)
    assert main(["export", str(folder), "--to", "gptq", "-o", str(tmp_path / "out")]) == 0
    assert "warning: several formats: GPTQModel" in capsys.readouterr().err.replace("\n", " ")


def test_help_names_every_target_and_option(capsys):
    assert main(["export", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, kind in EXPORTS.items():
        assert name in text
        for option in getattr(kind, "__dataclass_fields__", {}):
            assert option.replace("_", "-") in text


# -- rows -------------------------------------------------------------------------------------------------------------


@st.composite
def tensors_and_rows(draw) -> tuple[QuantizedTensor, torch.Tensor]:
    """A tensor of one or two runs with random codes, and some of its rows in some order, repeated or not."""
    rows, seed = draw(st.integers(1, 9)), draw(st.integers(0, 2**31))
    random = torch.Generator().manual_seed(seed)
    segments, columns = [], 0
    for _ in range(draw(st.integers(1, 2))):
        fmt = parse_format(f"int{draw(st.integers(1, 8))}{draw(st.sampled_from(['', '_sym']))}_"
                           f"{draw(st.sampled_from(['g4', 'g12', 'row']))}")
        k = 12 * draw(st.integers(1, 3))
        shape = (rows, fmt.groups(k))
        params = {"scale": torch.rand(shape, generator=random).half() + 0.1}
        if not fmt.symmetric:
            params["zero_point"] = torch.randint(0, fmt.levels, shape, generator=random, dtype=torch.uint8)
        codes = torch.randint(0, fmt.levels, (rows, k), generator=random, dtype=torch.uint8)
        segments.append(Segment(fmt, codes, params))
        columns += k
    order = torch.randperm(columns, generator=random) if draw(st.booleans()) else None
    which = torch.tensor(draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=12)))
    return QuantizedTensor((rows, columns), tuple(segments), order), which


@settings(max_examples=60, deadline=None)
@given(tensors_and_rows())
def test_rows_of_a_tensor(case):
    tensor, which = case
    part = tensor.rows(which)
    assert part.shape == (len(which), tensor.shape[1])
    assert torch.equal(part.dequantize(), tensor.dequantize()[which])
    again = QuantizedTensor.unpack(part.pack(), Layout(part.layout.runs, part.layout.permuted))
    assert torch.equal(again.dequantize(), part.dequantize())
    whole = tensor.rows(slice(None))
    assert all(torch.equal(a, b) for a, b in zip(whole.pack().values(), tensor.pack().values()))

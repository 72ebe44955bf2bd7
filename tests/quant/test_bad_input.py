"""Bad input: one clear error, exit code 2, the source as it was, and nothing left that looks like a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewbits
from fewbits.cli.main import main
from fewbits.quant import checkpoint
from fewbits.quant.errors import CalibrationError, CheckpointError, FewbitsError, ModelError, RecipeError
from fewbits.quant.source import open_source
from tests.conftest import save_tiny_model

torch.set_num_threads(1)

INDEX = "fewbits.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"
SMALL = ["--samples", "4", "--seqlen", "32", "--threads", "1"]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(f"Line {i} of a text that says little, but says it {i * i} times. " for i in range(40)))
    return path


@pytest.fixture
def copied(tiny, tmp_path: Path):
    """``copied(family) -> Path``: a model that the test may damage."""
    return lambda family="llama": shutil.copytree(tiny(family), tmp_path / "model")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit_tensors(model: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))


def refused(model: Path, text: Path, capfd: Any, *words: str, more: list[str] | None = None, code: int = 2,
            untouched: bool = True) -> str:
    """Run the command line: it fails with one line that holds all the words, and leaves nothing that looks whole."""
    out = model.parent / "out"
    before = files(model) if untouched else {}
    capfd.readouterr()
    status = main(["quantize", str(model), "-o", str(out), "--calib", str(text), *SMALL, *(more or []), "--json"])
    stdout, stderr = capfd.readouterr()
    lines = [line for line in stderr.splitlines() if not line.startswith(("Loading weights", "\rLoading weights"))]
    assert status == code, stderr
    assert stdout == ""
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in stderr, stderr
    for word in words:
        assert word in lines[0], lines[0]
    if untouched:
        assert files(model) == before, "the source was written to"
    assert not (out / INDEX).exists() and not (out / "config.json").exists()
    if out.exists():
        with pytest.raises((ValueError, OSError)):
            fewbits.load(out)
    return lines[0]


# -- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["gptq", "rtn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_weights_are_named(value, recipe, copied, text, capfd):
    model = copied()
    edit_tensors(model, lambda t: t[DOWN].__setitem__((3, 5), value))
    refused(model, text, capfd, "model.layers.1.mlp.down_proj", "1 of 6144 values are NaN or Inf",
            more=["--recipe", recipe])
    with pytest.raises(ModelError, match="NaN or Inf"):
        fewbits.quantize(model, model.parent / "out2", recipe="rtn")


@pytest.mark.parametrize("recipe", ["gptq", "rtn"])
def test_nan_in_an_expert_is_named(recipe, copied, text, capfd):
    model = copied("qwen3-moe")
    edit_tensors(model, lambda t: t["model.layers.1.mlp.experts.2.down_proj.weight"].__setitem__((0, 0), float("inf")))
    refused(model, text, capfd, "model.layers.1.mlp.experts.down_proj.2", "NaN or Inf", more=["--recipe", recipe])


def test_nan_where_it_is_not_quantized_stops_calibration(copied, text, capfd):
    model = copied()
    edit_tensors(model, lambda t: t["model.layers.1.input_layernorm.weight"].__setitem__(0, float("nan")))
    refused(model, text, capfd, "NaN or Inf")


@pytest.mark.parametrize("recipe", ["gptq", "rtn"])
@pytest.mark.parametrize("name", [
    DOWN, "model.layers.0.input_layernorm.weight", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight",
])
def test_missing_tensors_are_named_before_any_work(name, recipe, copied, text, capfd):
    model = copied()
    edit_tensors(model, lambda t: t.pop(name))
    refused(model, text, capfd, f"error: {name}: not in the checkpoint", more=["--recipe", recipe])
    assert not (model.parent / "out").exists()


def test_missing_expert(copied, text, capfd):
    model = copied("qwen3-moe")
    edit_tensors(model, lambda t: t.pop("model.layers.1.mlp.experts.2.down_proj.weight"))
    refused(model, text, capfd, "model.layers.1.mlp.experts.down_proj")


@pytest.mark.parametrize("name", [DOWN, "model.norm.weight"])
def test_a_tensor_of_another_shape_is_named(name, copied, text, capfd):
    model = copied()
    edit_tensors(model, lambda t: t.__setitem__(name, torch.zeros(t[name].shape[0], *[48] * (t[name].ndim - 1), 2)))
    refused(model, text, capfd, f"error: {name}: got shape", "config.json needs", more=["--recipe", "rtn"])


# -- files ----------------------------------------------------------------------------------------------------------


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_shard(path: Path, header: dict[str, Any], data: bytes, length: int | None = None) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def damage_truncated(model: Path) -> None:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 1000)


def damage_huge_header(model: Path) -> None:
    header, data = header_of(model / "model.safetensors")
    write_shard(model / "model.safetensors", header, data, length=2**60)


def damage_overlap(model: Path) -> None:
    header, data = header_of(model / "model.safetensors")
    names = [n for n in header if n != "__metadata__"]
    same = next(n for n in names[1:] if header[n]["shape"] == header[names[0]]["shape"])
    header[same]["data_offsets"] = header[names[0]]["data_offsets"]
    write_shard(model / "model.safetensors", header, data)


def damage_name(model: Path) -> None:
    header, data = header_of(model / "model.safetensors")
    header["\x1b[2J"] = header.pop(DOWN)
    write_shard(model / "model.safetensors", header, data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (damage_truncated, "truncated"),
    "empty": (lambda m: os.truncate(m / "model.safetensors", 0), "truncated"),
    "huge header": (damage_huge_header, "claims"),
    "overlapping offsets": (damage_overlap, "overlap"),
    "terminal escapes": (damage_name, "not a printable name"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no .safetensors weights"),
    "no config": (lambda m: (m / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), "config.json: is not valid JSON"),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), "needs an object"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage, copied, text, capfd):
    model = copied()
    work, words = DAMAGES[damage]
    work(model)
    refused(model, text, capfd, words)
    assert not (model.parent / "out").exists()


def test_missing_and_truncated_shards(tmp_path, text, capfd):
    model = save_tiny_model(tmp_path / "model", "llama", max_shard_size="40KB")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.unlink()
    refused(model, text, capfd, f"model.safetensors.index.json: names {shard.name}, which is missing")
    shard.write_bytes(data[:-1])
    refused(model, text, capfd, shard.name, "truncated")


def test_no_such_model(tmp_path, text, capfd):
    refused(tmp_path / "nothing", text, capfd, "no such directory or file", untouched=False)
    (tmp_path / "file.txt").write_text("x")
    refused(tmp_path / "file.txt", text, capfd, "is a file that is not GGUF", untouched=False)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "already quantized": ({"quantization_config": {"quant_method": "gptq"}}, "is already quantized"),
    "unknown architecture": ({"model_type": "nonsense"}, "does not recognize this architecture"),
    "no language model": ({"model_type": "vit"}, "cannot build this model"),
    "wrong type": ({"hidden_size": "wide"}, "cannot build this model"),
    "null": ({"hidden_size": None}, "cannot build this model"),
    "negative": ({"hidden_size": -1}, "cannot build this model"),
    "zero heads": ({"num_attention_heads": 0}, "cannot build this model"),
    "unknown dtype": ({"dtype": "float3"}, "cannot build this model"),
    "no layers": ({"num_hidden_layers": 0}, "found no list of decoder blocks"),
    "too many layers": ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight: not in the checkpoint"),
    "other size": ({"intermediate_size": 128}, "mlp.gate_proj.weight: got shape (96, 64), config.json needs (128, 64)"),
    "small vocabulary": ({"vocab_size": 100}, "embed_tokens.weight: got shape (256, 64)"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_fit(case, copied, text, capfd):
    model = copied()
    changes, words = CONFIGS[case]
    edit_config(model, **changes)
    refused(model, text, capfd, words)
    assert not (model.parent / "out").exists()


def test_a_fewbits_checkpoint_is_not_quantized_again(copied, text, capfd, tmp_path):
    fewbits.quantize(copied(), tmp_path / "once", recipe="rtn")
    refused(tmp_path / "once", text, capfd, "is already quantized", more=["--recipe", "rtn"])


@pytest.mark.parametrize("damage", ["missing", "not JSON", "not a tokenizer"])
def test_without_a_tokenizer(damage, copied, text, capfd):
    model = copied()
    for path in model.glob("*token*"):
        path.unlink()
    if damage != "missing":
        (model / "tokenizer.json").write_text("{" if damage == "not JSON" else "{}")
        (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    refused(model, text, capfd, "has no usable tokenizer", "rtn")
    assert not (model.parent / "out").exists()
    fewbits.quantize(model, model.parent / "out", recipe="rtn")  # which needs none


def test_a_tokenizer_of_another_model(tmp_path, text, capfd):
    model = save_tiny_model(tmp_path / "model", "llama", vocab_size=50)
    refused(model, text, capfd, "tokenizer: makes token", "the model has 50")


# -- calibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, words", [
    (b"", "no usable tokens"), (b" \n\n", "no usable tokens"), (b"\xff\xfe\xff", "is not UTF-8"),
    (None, "no such file"),
])
def test_calibration_files(content, words, tiny, tmp_path, capfd):
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    source = tmp_path / "calib.txt"
    if content is not None:
        source.write_bytes(content)
    refused(model, source, capfd, words)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CalibrationError):
        fewbits.quantize(model, tmp_path / "out", overrides={"calibration.sources": [str(source)]})


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_rows_longer_than_the_context(family, tiny, tmp_path):
    with pytest.raises(CalibrationError, match=r"calibration\.seqlen: got 200, the model's context is 128"):
        fewbits.quantize(tiny(family), tmp_path / "out", overrides={"calibration.seqlen": 200})
    assert not (tmp_path / "out").exists()


def test_skipping_every_token(tiny, text, tmp_path):
    overrides = {"calibration.sources": [str(text)], "calibration.seqlen": 32, "calibration.skip_tokens": 32}
    with pytest.raises(FewbitsError, match="no calibration tokens"):
        fewbits.quantize(tiny("llama"), tmp_path / "out", overrides=overrides)


def test_a_text_that_is_used_up_gives_rows_to_judge_by(tiny, text, tmp_path):
    """All of a short text was calibrated on, and nothing was left for a gate or a budget: refused at defaults."""
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:6000])
    settings = {"calibration.sources": [str(short)], "calibration.samples": 1000, "calibration.seqlen": 24}
    stats = tmp_path / "stats"
    judged = fewbits.quantize(tiny("llama"), tmp_path / "a", overrides=settings, stats=stats, max_kl=100.0)
    assert any("of the" in w and "rows are held out to judge by" in w for w in judged.warnings), judged.warnings
    assert judged.measured is not None and judged.measured["kl_stderr"] > 0
    again = fewbits.quantize(tiny("llama"), tmp_path / "b", overrides=settings, stats=stats)  # the same rows, unjudged
    assert again.warnings == judged.warnings
    same = (tmp_path / "a" / "fewbits-00002-of-00003.safetensors").read_bytes()
    assert (tmp_path / "b" / "fewbits-00002-of-00003.safetensors").read_bytes() == same


def test_a_gate_without_text_to_judge_by(tiny, tmp_path):
    (tmp_path / "short.txt").write_text("Too short to hold anything out.")
    sources = [str(tmp_path / "short.txt")]
    overrides = {"calibration.sources": sources, "calibration.samples": 1, "calibration.seqlen": 24}
    with pytest.raises(CalibrationError, match="held-out text: got 0 rows of text beyond those calibrated on"):
        fewbits.quantize(tiny("llama"), tmp_path / "out", overrides=overrides, max_kl=1.0)
    assert not (tmp_path / "out").exists()


# -- flags ----------------------------------------------------------------------------------------------------------

FLAGS: list[tuple[list[str], str]] = [
    (["--group-size", "abc"], "--group-size: got 'abc', needed a number, auto or row"),
    (["--group-size", "-1"], "--group-size"), (["--group-size", "0"], "group_size"),
    (["--group-size", "48"], "model.layers.0.self_attn.q_proj: K = 64 is not a multiple of group_size 48"),
    (["--set", "format.group_size=-16"], "format.group_size"),
    (["--set", "format.group_size=1.5"], "format.group_size"),
    (["--bits", "0"], "format.bits: got 0"), (["--bits", "9"], "format.bits: got 9"), (["--bits", "four"], "--bits"),
    (["--samples", "0"], "calibration.samples: got 0"), (["--samples", "1e3"], "--samples"),
    (["--seqlen", "1"], "calibration.seqlen: got 1"), (["--threads", "0"], "--threads"),
    (["--dtype", "float16"], "calibration.dtype: got 'float16'"),
    (["--seed", "9" * 30], "--seed"), (["--seed", "x"], "--seed"),
    (["--device", "bogus"], "--device bogus"),
    (["--max-kl", "nan"], "--max-kl: got nan"), (["--max-kl", "-1"], "--max-kl: got -1"),
    (["--max-kl", "x"], "--max-kl"),
    (["--recipe", "gtpq"], "did you mean 'gptq'?"), (["--recipe", "no.toml"], "no file no.toml"),
    (["--set", "quantizer.dmap=1"], "did you mean 'damp'?"),
    (["--set", "calibration.sample=1"], "did you mean 'samples'?"),
    (["--set", "frmat.bits=3"], "did you mean 'format'?"), (["--set", "kep=['x']"], "did you mean 'keep'?"),
    (["--set", "novalue"], "needed key=value"), (["--set", "=3"], "needed key=value"),
    (["--set", "quantizer=3"], "quantizer: got 3"), (["--set", "format=int4"], "format: got 'int4'"),
    (["--set", "quantizer.damp.x=3"], "damp is a value, not a table"),
    (["--set", "quantizer.damp=-1"], "quantizer.damp"),
    (["--set", "quantizer.damp=nan"], "damp"), (["--set", "quantizer.block_size=0"], "quantizer.block_size"),
    (["--set", "quantizer.block_size=-1"], "quantizer.block_size"), (["--set", "quantizer.qep=7"], "quantizer.qep"),
    (["--set", "quantizer.clip=no"], "quantizer.clip: got 'no'"),
    (["--set", "quantizer.name=7"], "quantizer.name: got 7"),
    (["--set", "keep=x"], "keep: got 'x'"), (["--set", "keep=['*']"], "keep: leaves nothing to quantize"),
    (["--set", "rules=[1]"], "rules.0: got 1"), (["--set", "rules=[{match='x',format='int9'}]"], "format: got 'int9'"),
    (["--set", "rules=[{match='*',format='int4_g48'}]"], "K = 64 is not a multiple of group_size 48"),
    (["--set", "calibration.inputs=original", "quantizer.qep=1"], "goes with neither true_sequential nor qep"),
    (["--bpw", "1"], "--bpw: got 1, the smallest that is reachable is"), (["--bpw", "x"], "--bpw"),
    (["--bpw", "nan"], "--bpw: got nan"), (["--bpw-total", "-3"], "--bpw-total: got -3"),
    (["--size", "90XB"], "--size: got '90XB', needed a size"), (["--fits-in", "1KB"], "--fits-in: got 1000 bytes"),
    (["--bpw", "3", "--size", "1GB"], "needed one budget"),
    (["--ctx", "4096"], "--ctx: got no --fits-in"), (["--batch", "2"], "--batch: got no --fits-in"),
    (["--formats", "int4_g64,int3_g64"], "--formats: got no budget"),
    (["--bpw", "4", "--formats", "int4_g64,int99"], "format: got 'int99'"),
    (["--bpw", "4", "--target", "vllm", "--formats", "int3_g32"], "vllm does not read int3_g32"),
    (["--plan", "p.json"], "--plan p.json: is not a plan"),
    (["--plan", "p.json", "--bpw", "4"], "--plan: got a budget"),
    (["--measured", "p.json"], "--measured p.json: is not the report"),
    (["--target", "vllm"], "vllm does not read int4_g"), (["--target", "tgi"], "allocate.target: got 'tgi'"),
    (["--effort", "best"], "--effort: recipe gptq refines nothing"),
    (["--recipe", "best-2bit", "--effort", "bset"], "--effort: got 'bset'"),
    (["--set", "refine.pvv.rate=1"], "refine.pvv"), (["--set", "refine.pv.rte=1"], "refine.pv.rte"),
    (["--set", "refine.pv.rate=-1"], "refine.pv.rate"),
    (["--bogus"], "--bogus"), (["extra"], "extra"),
]


@pytest.mark.parametrize("more, words", FLAGS, ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "")
def test_flags(more, words, tiny, tmp_path, text, capfd):
    model = tmp_path / "model"
    model.symlink_to(tiny("llama"))
    refused(model, text, capfd, words, more=more)
    assert not (tmp_path / "out").exists(), "a wrong flag is found before anything is written"


def test_out_is_required(tiny, capfd):
    assert main(["quantize", str(tiny("llama"))]) == 2
    assert "-o" in capfd.readouterr().err


# -- where it is written --------------------------------------------------------------------------------------------


def test_a_folder_with_something_else_in_it(tiny, text, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for how in ([], ["--resume"]):
        command = ["quantize", str(tiny("llama")), "-o", str(out), "--recipe", "rtn", *how]
        assert main(command) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: ") and "holds 1 other files" in err and "--force" in err and err.count("\n") == 1
        assert files(out) == {"thesis.tex": b"years of work"}
    assert main(["quantize", str(tiny("llama")), "-o", str(out), "--recipe", "rtn", "--force"]) == 0
    assert files(out)["thesis.tex"] == b"years of work", "--force removes nothing that is not ours"
    fewbits.load(out)


def test_a_finished_checkpoint_is_kept_unless_forced(tiny, tmp_path):
    out = tmp_path / "out"
    fewbits.quantize(tiny("llama"), out, recipe="rtn")
    before = files(out)
    for how in ({}, {"resume": True}):
        with pytest.raises(CheckpointError, match="holds a finished checkpoint; choose an empty directory, or --force"):
            fewbits.quantize(tiny("llama"), out, recipe="rtn", overrides={"format.bits": 2}, **how)
        assert files(out) == before
    fewbits.quantize(tiny("gpt2"), out, recipe="rtn", force=True)  # another model with other tensors
    fresh = tmp_path / "fresh"
    fewbits.quantize(tiny("gpt2"), fresh, recipe="rtn")
    assert {n: b for n, b in files(out).items() if n in files(fresh)} == files(fresh)
    fewbits.load(out)


def test_the_model_itself_is_never_written_to(copied, capfd):
    model = copied()
    before = files(model)
    for name in (str(model), f"{model}/", f"{model}/../model"):
        for how in ([], ["--force"], ["--resume"]):
            assert main(["quantize", str(model), "-o", name, "--recipe", "rtn", *how]) == 2
            assert "is the model itself" in capfd.readouterr().err
    assert files(model) == before


def test_out_is_a_file_or_below_one(copied, text, capfd):
    model = copied()
    out = model.parent / "out"
    out.write_text("precious")
    with pytest.raises(CheckpointError, match="is a file, needed a directory"):
        fewbits.quantize(model, out, recipe="rtn", force=True)
    assert main(["quantize", str(model), "-o", str(out / "below"), "--recipe", "rtn"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert out.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_cannot_be_written(copied, text, capfd):
    model = copied()
    (model.parent / "out").mkdir(mode=0o500)
    refused(model, text, capfd, "cannot be written")


def test_a_report_that_cannot_be_written_is_said_first(tiny, tmp_path, capfd):
    report = str(tmp_path / "none" / "report.json")
    command = ["quantize", str(tiny("llama")), "-o", str(tmp_path / "out"), "--recipe", "rtn", "--json", report]
    assert main(command) == 2
    assert "there is no directory" in capfd.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
], ids=["ENOSPC", "EDQUOT", "safetensors"])
@pytest.mark.parametrize("place", ["save_file", "write_atomically", "copyfile"])
def test_a_full_disk(place, error, copied, text, tmp_path, capfd, monkeypatch):
    """Said in one line; what is finished stays, and with space the run goes on to the same bytes."""
    model, out = copied(), tmp_path / "out"
    command = ["quantize", str(model), "-o", str(out), "--calib", str(text), *SMALL]
    calls: list[Any] = []
    owner: Any = checkpoint.shutil if place == "copyfile" else checkpoint
    original = getattr(owner, place)

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            if place == "save_file":
                Path(args[1]).write_bytes(b"half")
            raise error
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, fail)
        assert main(command) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and "the disk is full" in err and "--resume" in err and err.count("\n") == 1
    assert not (out / INDEX).exists() and not list(out.glob("*.tmp"))
    with pytest.raises((ValueError, OSError)):
        fewbits.load(out)
    assert main([*command, "--resume"]) == 0
    assert main([*command[:3], str(tmp_path / "whole"), *command[4:]]) == 0
    assert files(out) == files(tmp_path / "whole")


def test_too_little_space_is_said_before_any_work(copied, text, capfd, monkeypatch):
    model = copied()
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused(model, text, capfd, "MB free, needed about", "choose another output")


def test_opening_a_model_writes_nothing(copied):
    model = copied()
    before = files(model)
    source = open_source(model)
    for key in source.keys():  # noqa: SIM118 - a method, not a dict
        source.get(key).zero_()
    assert files(model) == before


def test_api_errors_are_of_the_documented_kinds(tiny, tmp_path):
    with pytest.raises(RecipeError):
        fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="nothing")
    with pytest.raises(RecipeError):
        fewbits.quantize(tiny("llama"), tmp_path / "out", overrides={"nothing": 1})
    with pytest.raises(ModelError):
        fewbits.quantize(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(FewbitsError, match="device"):
        fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="rtn", device="bogus")
    assert not (tmp_path / "out").exists()

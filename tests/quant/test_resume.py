"""The same run gives the same bytes: twice, from kept statistics, and however often it was killed on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.calibration.stream import StreamedModel
from fewbits.cli.main import main
from fewbits.quant import checkpoint
from fewbits.quant.checkpoint import CheckpointWriter
from fewbits.quant.errors import CalibrationError, CheckpointError, FewbitsError
from fewbits.quant.inspection import inspect
from tests.conftest import save_tiny_model

torch.set_num_threads(1)

INDEX = "fewbits.safetensors.index.json"

VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gptq": ("llama", "gptq", {"lm_head": True}),
    "tied head and embedding": ("llama-tied", "gptq", {"lm_head": True, "embeddings": True}),
    "rtn": ("gpt2", "rtn", {}),
    "original inputs": ("opt", "gptq", {"calibration.inputs": "original"}),
    "sorted columns": ("llama", "baq", {"budget.bpw": 4.0, "allocate.column_group": 32}),
    "refined blocks": ("llama", "gptq", {
        "format.bits": 2, "refine.signround.iterations": 4, "refine.gumbel.iterations": 4, "refine.gumbel.rate": 0.01}),
    "qep on experts": ("qwen3-moe", "gptq", {"quantizer.qep": 0.5, "calibration.true_sequential": True}),
}
"""Name -> family, recipe, overrides."""


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(topics[k] for k in sorted(topics))[:5_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def job(tiny, text):
    """``job(variant, **more) -> (model, keyword arguments)`` of ``fewbits.quantize``."""

    def make(variant: str = "gptq", **more: Any) -> tuple[Path, dict[str, Any]]:
        family, recipe, overrides = VARIANTS[variant]
        return tiny(family), {"recipe": recipe, "overrides": {**small(text), **overrides, **more}}

    return make


@pytest.fixture(scope="session")
def whole(job, tmp_path_factory: pytest.TempPathFactory):
    """``whole(variant) -> bytes of every file`` of a run that nothing interrupted."""
    done: dict[str, dict[str, bytes]] = {}

    def make(variant: str = "gptq") -> dict[str, bytes]:
        if variant not in done:
            out = tmp_path_factory.mktemp("whole") / "out"
            model, kwargs = job(variant)
            fewbits.quantize(model, out, **kwargs)
            done[variant] = files(out)
        return done[variant]

    return make


def flags(text: Path) -> list[str]:
    """What the variant ``gptq`` is on the command line."""
    return ["--calib", str(text), "--samples", "4", "--seqlen", "32", "--threads", "1", "--dtype", "float32",
            "--set", "lm_head=true", "calibration.true_sequential=false"]


def small(text: Path) -> dict[str, Any]:
    return {"calibration.sources": [str(text)], "calibration.samples": 4, "calibration.seqlen": 32,
            "calibration.true_sequential": False, "calibration.dtype": "float32"}


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_files(got: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert got.keys() == expected.keys()
    assert [n for n in got if got[n] != expected[n]] == []


def forked(work: Callable[[], Any]) -> int:
    """Run in a copy of this process; its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)  # a child that hangs dies
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(shard: int) -> Callable[[str, int, int], None]:
    return lambda what, done, total: die() if (what, done) == ("Quantizing", shard) else None


def assert_refused(folder: Path) -> None:
    """Nobody takes the folder for a model."""
    with pytest.raises((ValueError, OSError)):
        fewbits.load(folder)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"unfinished run \(quantize --resume"):
        inspect(folder)


# -- the same again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_twice_the_same_bytes(variant, job, whole, tmp_path):
    model, kwargs = job(variant)
    fewbits.quantize(model, tmp_path / "again", **kwargs)
    assert_same_files(files(tmp_path / "again"), whole(variant))


def test_the_same_bytes_from_another_process_by_the_command_line(job, whole, text, tmp_path):
    model, _ = job()
    command = [sys.executable, "-m", "fewbits.cli.main", "quantize", str(model), "-o", str(tmp_path / "out")]
    command += flags(text)
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run(command, check=True, capture_output=True, env=env, cwd=tmp_path)
    assert_same_files(files(tmp_path / "out"), whole())


def test_the_gate_changes_no_byte(tiny, tmp_path, text):
    overrides = small(text)
    for recipe in ("rtn", "gptq"):
        for name, gate in (("with", 1e9), ("without", None)):
            out = tmp_path / f"{recipe}-{name}"
            fewbits.quantize(tiny("llama"), out, recipe=recipe, overrides=overrides, max_kl=gate)
        judged, plain = files(tmp_path / f"{recipe}-with"), files(tmp_path / f"{recipe}-without")
        assert judged.pop("README.md") != plain.pop("README.md"), "the card says what was measured"
        assert_same_files(judged, plain)


# -- kept statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_kept_statistics_give_the_bytes_of_the_run_that_gathered_them(family, tiny, text, tmp_path, monkeypatch):
    overrides = {**small(text), "lm_head": True}
    stats = tmp_path / "stats"
    fewbits.quantize(tiny(family), tmp_path / "gathered", overrides=overrides, stats=stats)
    fewbits.quantize(tiny(family), tmp_path / "plain", overrides={**overrides, "calibration.inputs": "original"})
    kept = files(stats)
    monkeypatch.setattr(StreamedModel, "first_inputs", lambda *a: pytest.fail("the model ran again"))
    fewbits.quantize(tiny(family), tmp_path / "reused", overrides=overrides, stats=stats)
    assert_same_files(files(tmp_path / "reused"), files(tmp_path / "gathered"))
    assert_same_files(files(tmp_path / "plain"), files(tmp_path / "gathered"))
    fewbits.quantize(tiny(family), tmp_path / "other", overrides={**overrides, "format.bits": 2}, stats=stats)
    assert inspect(tmp_path / "other").bits_per_weight < inspect(tmp_path / "reused").bits_per_weight - 1
    assert_same_files(files(stats), kept)


@pytest.mark.parametrize("kill", [1, 2, 3])
@pytest.mark.parametrize("same_folder", [True, False], ids=["same folder", "new folder"])
def test_statistics_of_a_killed_run_are_whole_after_resuming(kill, same_folder, tiny, text, tmp_path):
    overrides = {**small(text), "lm_head": True}
    fewbits.quantize(tiny("llama"), tmp_path / "whole", overrides=overrides, stats=tmp_path / "whole-stats")
    out, first = tmp_path / "out", tmp_path / "first"
    assert forked(lambda: fewbits.quantize(tiny("llama"), out, overrides=overrides, stats=first,
                                           progress=killed_after(kill))) == -signal.SIGKILL
    stats = first if same_folder else tmp_path / "second"
    fewbits.quantize(tiny("llama"), out, overrides=overrides, stats=stats, resume=True)
    assert_same_files(files(out), files(tmp_path / "whole"))
    assert_same_files(files(stats), files(tmp_path / "whole-stats"))
    fewbits.quantize(tiny("llama"), tmp_path / "reused", overrides=overrides, stats=stats)
    assert_same_files(files(tmp_path / "reused"), files(tmp_path / "whole"))


def test_statistics_of_something_else_are_refused(tiny, text, tmp_path):
    overrides = small(text)
    stats = tmp_path / "stats"
    fewbits.quantize(tiny("llama"), tmp_path / "out", overrides=overrides, stats=stats)
    for model, more, key in (("llama-tied", {}, "model"), ("llama", {"calibration.samples": 3}, "calibration"),
                             ("llama", {"calibration.skip_tokens": 1}, "skip_tokens"),
                             ("llama", {"calibration.dtype": "bfloat16"}, "dtype")):
        with pytest.raises(CheckpointError, match=rf"stats: holds statistics of another run \({key} differs\)"):
            fewbits.quantize(tiny(model), tmp_path / "no", overrides={**overrides, **more}, stats=stats)
        assert not (tmp_path / "no").exists()
    fewbits.quantize(tiny("llama"), tmp_path / "head", overrides={**overrides, "lm_head": True}, stats=stats)
    (stats / "head.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no statistics of the output head"):
        fewbits.quantize(tiny("llama"), tmp_path / "no", overrides={**overrides, "lm_head": True}, stats=stats)
    with pytest.raises(CalibrationError, match=r"'original' goes with neither true_sequential nor qep"):
        fewbits.quantize(tiny("llama"), tmp_path / "qep", overrides={**overrides, "quantizer.qep": 0.5}, stats=stats)


@pytest.mark.parametrize("damage", ["stats.json cut", "stats.json empty object", "block cut", "block missing",
                                    "a file"])
def test_damaged_statistics_are_one_clear_error(damage, tiny, text, tmp_path):
    overrides = small(text)
    stats = tmp_path / "stats"
    fewbits.quantize(tiny("llama"), tmp_path / "out", overrides=overrides, stats=stats)
    if damage == "a file":
        shutil.rmtree(stats)
        stats.write_text("x")
    elif damage.startswith("stats.json"):
        (stats / "stats.json").write_text((stats / "stats.json").read_text()[:40] if "cut" in damage else "{}")
    else:
        block = stats / "block-00001.safetensors"
        data = block.read_bytes()
        block.unlink()
        if "cut" in damage:
            block.write_bytes(data[:-100])
    with pytest.raises(FewbitsError, match=r"stats|block-00001"):
        fewbits.quantize(tiny("llama"), tmp_path / "again", overrides=overrides, stats=stats)
    assert not (tmp_path / "again" / INDEX).exists()


# -- killed and resumed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_between_blocks(variant, job, whole, tmp_path):
    """Killed after the first block; resumed and killed after the second; resumed and killed before the end."""
    model, kwargs = job(variant)
    out = tmp_path / "out"
    for shard in (1, 2, 3):
        code = forked(lambda shard=shard: fewbits.quantize(model, out, resume=True, progress=killed_after(shard),
                                                           **kwargs))
        assert code == -signal.SIGKILL
        assert_refused(out)
        made = {p: p.stat() for p in out.glob("fewbits-*.safetensors")}
        assert len(made) == shard
    fewbits.quantize(model, out, resume=True, **kwargs)
    assert_same_files(files(out), whole(variant))
    for path, status in made.items():
        assert path.stat().st_mtime_ns == status.st_mtime_ns, "a finished shard was written again"


RENAMES = 12  # run.json; facts and weights of three shards; four files; the index


@pytest.mark.parametrize("when, count", [*(("before", i) for i in range(RENAMES)), ("after", 6), ("after", 11)])
def test_killed_at_every_rename(when, count, job, whole, tmp_path, monkeypatch):
    """Whatever file the power fails at: the folder is no checkpoint until the index is there, and resuming is exact."""
    model, kwargs = job()
    out, calls = tmp_path / "out", []

    def rename(temp: Path, path: Path, rename=checkpoint._sync_and_rename) -> None:
        calls.append(path)
        if when == "before" and len(calls) == count + 1:
            die()
        rename(temp, path)
        if len(calls) == count + 1:
            die()

    def run() -> None:
        monkeypatch.setattr(checkpoint, "_sync_and_rename", rename)
        fewbits.quantize(model, out, **kwargs)

    assert forked(run) == -signal.SIGKILL
    if (out / INDEX).exists():
        assert (count, when) == (RENAMES - 1, "after")
        fewbits.load(out)
    else:
        assert_refused(out)
    fewbits.quantize(model, out, resume=True, **kwargs)
    assert_same_files(files(out), whole())


def test_every_rename_was_counted(job, tmp_path, monkeypatch):
    model, kwargs = job()
    calls = []
    original = checkpoint._sync_and_rename
    monkeypatch.setattr(checkpoint, "_sync_and_rename", lambda *a: (calls.append(a), original(*a)))
    fewbits.quantize(model, tmp_path / "out", **kwargs)
    assert len(calls) == RENAMES + 1, "and the card, when all else is there"


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_killed_in_the_middle_of_a_shard(share, job, whole, tmp_path, monkeypatch):
    model, kwargs = job()
    out = tmp_path / "out"

    def save(tensors: Any, path: Path, metadata: Any, save=checkpoint.save_file) -> None:
        save(tensors, path, metadata=metadata)
        if "00003-of" in path.name:
            os.truncate(path, int(share * path.stat().st_size))
            die()

    def run() -> None:
        monkeypatch.setattr(checkpoint, "save_file", save)
        fewbits.quantize(model, out, **kwargs)

    assert forked(run) == -signal.SIGKILL
    assert list(out.glob("*.tmp")) and len(list(out.glob("*.safetensors"))) == 1
    assert_refused(out)
    fewbits.quantize(model, out, resume=True, **kwargs)
    assert_same_files(files(out), whole())


def test_killed_while_overwriting_a_finished_checkpoint(job, whole, tmp_path):
    """No mixture of old and new shards can be loaded."""
    model, kwargs = job(**{"format.bits": 8})
    out = tmp_path / "out"
    fewbits.quantize(model, out, **kwargs)
    model, kwargs = job()
    code = forked(lambda: fewbits.quantize(model, out, force=True, progress=killed_after(1), **kwargs))
    assert code == -signal.SIGKILL
    assert_refused(out)
    fewbits.quantize(model, out, resume=True, **kwargs)
    assert_same_files(files(out), whole())


def test_a_shard_damaged_between_the_runs_is_an_error(job, tmp_path):
    model, kwargs = job()
    out = tmp_path / "out"
    assert forked(lambda: fewbits.quantize(model, out, progress=killed_after(1), **kwargs)) == -signal.SIGKILL
    shard = next(out.glob("fewbits-*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="00002-of-00003"):
        fewbits.quantize(model, out, resume=True, **kwargs)
    assert_refused(out)


def test_resume_in_an_empty_folder_starts(job, whole, tmp_path):
    model, kwargs = job()
    (tmp_path / "out").mkdir()
    fewbits.quantize(model, tmp_path / "out", resume=True, **kwargs)
    assert_same_files(files(tmp_path / "out"), whole())


# -- refused --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def unfinished(job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run killed after its first block; tests do not change it."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    model, kwargs = job()
    assert forked(lambda: fewbits.quantize(model, out, progress=killed_after(1), **kwargs)) == -signal.SIGKILL
    return out


@pytest.mark.parametrize("more, words", [
    (["--bits", "3"], "differs in recipe"), (["--seed", "1"], "differs in calibration, seed"),
    (["--samples", "3"], "differs in calibration, recipe"), (["--recipe", "rtn"], "differs in calibration, recipe"),
    (["--set", "quantizer.damp=0.02"], "differs in recipe"), (["--threads", "2"], "differs in threads"),
], ids=str)
def test_resuming_with_other_options_is_refused(more, words, job, text, unfinished, capsys):
    before = files(unfinished)
    base = ["quantize", str(job()[0]), "-o", str(unfinished), *flags(text)]
    try:
        assert main([*base, *more, "--resume"]) == 2
    finally:
        torch.set_num_threads(1)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert words in err and "--force" in err
    assert_same_files(files(unfinished), before)


def test_another_model_under_the_same_name_is_refused(job, tmp_path):
    _, kwargs = job()
    model, out = save_tiny_model(tmp_path / "model", "llama"), tmp_path / "out"
    assert forked(lambda: fewbits.quantize(model, out, progress=killed_after(1), **kwargs)) == -signal.SIGKILL
    save_tiny_model(tmp_path / "model", "llama", seed=1)
    with pytest.raises(CheckpointError, match="differs in model"):
        fewbits.quantize(model, out, resume=True, **kwargs)


def test_an_unfinished_run_is_neither_overwritten_nor_continued_unasked(job, unfinished, capsys):
    before = files(unfinished)
    model, kwargs = job()
    with pytest.raises(CheckpointError, match="unfinished run; --resume continues it, --force starts afresh"):
        fewbits.quantize(model, unfinished, **kwargs)
    for command in (["inspect", str(unfinished)], ["eval", str(unfinished)], ["generate", str(unfinished), "Hello"]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert_refused(unfinished)
    assert_same_files(files(unfinished), before)


def test_one_writer_at_a_time(job, tmp_path):
    model, kwargs = job()
    out = tmp_path / "out"
    writer = CheckpointWriter(out, 3, {}, resume=False, force=False)
    try:
        for how in ("resume", "force"):
            with pytest.raises(CheckpointError, match="another process is writing to it"):
                fewbits.quantize(model, out, **{how: True}, **kwargs)
    finally:
        writer.close()


def test_interrupt_from_the_keyboard(job, whole, text, tmp_path):
    """Ctrl-C between two blocks: exit code 130, a hint, and a folder that resumes to the same bytes."""
    code = ("import os, signal, sys\nfrom fewbits.quant import checkpoint\n"
            "write = checkpoint.CheckpointWriter.write\n"
            "def interrupted(self, index, *rest):\n"
            "    write(self, index, *rest)\n"
            "    if index == 1: os.kill(os.getpid(), signal.SIGINT)\n"
            "if '--resume' not in sys.argv: checkpoint.CheckpointWriter.write = interrupted\n"
            "from fewbits.cli.main import main\nsys.exit(main(sys.argv[1:]))")
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, "quantize", str(job()[0]), "-o", str(out), *flags(text), "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 130, run.stderr
    assert run.stdout == "" and run.stderr == "interrupted; run again with --resume\n"
    assert_refused(out)
    run = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_same_files(files(out), whole())

"""The checkpoint writer: what it refuses, what it survives, and what it never leaves behind."""

from __future__ import annotations

import collections
import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from fewbits.quant import checkpoint
from fewbits.quant.checkpoint import INDEX, CheckpointWriter, disk_errors, read_shard, shard_name
from fewbits.quant.errors import CheckpointError

torch.set_num_threads(1)

RUN = {"model": {"files": {"a": "123"}}, "recipe": "abc", "seed": 0}


def writer(
    out: Path, total: int = 3, run: dict[str, Any] | None = None, *, resume: bool = False, force: bool = False,
    need_bytes: int = 0,
) -> CheckpointWriter:
    return CheckpointWriter(out, total, run or RUN, resume=resume, force=force, need_bytes=need_bytes)


def tensors(i: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return {
        f"layers.{i}.weight_packed": torch.randint(-(2**31), 2**31, (4, 3), generator=generator).to(torch.int32),
        f"layers.{i}.weight_scale": torch.randn(4, 2, generator=generator).half(),
        f"layers.{i}.norm": torch.randn(7, generator=generator).bfloat16(),
    }


def write_all(w: CheckpointWriter, indices: range | None = None) -> None:
    for i in indices or range(w.total):
        w.write(i, tensors(i), [{"name": f"layers.{i}", "bytes": i}])


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def unfinished(out: Path, shards: int = 2) -> None:
    w = writer(out)
    write_all(w, range(shards))
    w.close()


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_whole_run(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "deep" / "out"
    (source / "templates").mkdir(parents=True)
    (source / "templates" / "chat.jinja").write_text("hello")
    w = writer(out)
    assert not any(w.has(i) for i in range(3))
    write_all(w)
    assert all(w.has(i) for i in range(3)) and w.facts(1) == [{"name": "layers.1", "bytes": 1}]
    hashes = w.hashes()
    size = w.finish({"config.json": "{}\n", "fewbits.lock": "x"}, [source / "templates" / "chat.jinja"], source)
    shards = [shard_name(i, 3) for i in range(3)]
    assert shards[0] == "fewbits-00001-of-00003.safetensors" and list(hashes) == shards
    assert files(out) == {*shards, INDEX, "config.json", "fewbits.lock", "templates/chat.jinja"}
    assert size == sum((out / s).stat().st_size for s in shards)
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == {name: shards[i] for i in range(3) for name in tensors(i)}
    everything = [t for i in range(3) for t in tensors(i).values()]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in everything)
    for i in range(3):
        back = read_shard(out / shards[i])
        assert back.keys() == tensors(i).keys()
        assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors(i).items())


def test_writing_is_deterministic(tmp_path: Path) -> None:
    for name in ("a", "b"):
        w = writer(tmp_path / name)
        for i in range(3):
            given = tensors(i)
            w.write(i, given if name == "a" else dict(reversed(given.items())), [])
        w.close()
    for i in range(3):
        assert (tmp_path / "a" / shard_name(i, 3)).read_bytes() == (tmp_path / "b" / shard_name(i, 3)).read_bytes()


def test_tensors_need_not_be_contiguous(tmp_path: Path) -> None:
    w = writer(tmp_path / "out", 1)
    big = torch.arange(12.0).view(3, 4)
    w.write(0, {"a": big.T, "b": big[:, 1:3]}, [])
    back = w.read(0)
    assert torch.equal(back["a"], big.T) and torch.equal(back["b"], big[:, 1:3])
    w.close()


def test_index_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "out", []
    w = writer(out)
    write_all(w)
    rename = os.replace

    def watch(source: Path, target: Path) -> None:
        seen.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(os, "replace", watch)
    w.finish({"config.json": "{}", "plan.json": "{}"}, [], tmp_path)
    assert seen == ["config.json", "plan.json", INDEX]


def test_a_run_killed_before_the_index_is_no_checkpoint_and_can_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    w = writer(out)
    write_all(w)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "read_header", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            w.finish({"config.json": "{}"}, [], tmp_path)
    w.close()
    assert INDEX not in files(out)
    w = writer(out, resume=True)
    assert all(w.has(i) for i in range(3))
    w.finish({"config.json": "{}"}, [], tmp_path)
    assert files(out) == {*(shard_name(i, 3) for i in range(3)), INDEX, "config.json"}


@pytest.mark.skipif(os.name != "posix", reason="file modes")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path, umask: int) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_text("{}")
    source.chmod(0o600)
    before = os.umask(umask)
    try:
        w = writer(tmp_path / "out")
        write_all(w)
        w.finish({"config.json": "{}"}, [source], tmp_path)
        assert os.umask(umask) == umask  # and the umask is as it was
    finally:
        os.umask(before)
    for name in files(tmp_path / "out"):
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == 0o666 & ~umask, name


# -- directories that are not empty ------------------------------------------------------------------------------------


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds 1 other files; choose an empty directory, or --force"):
        writer(tmp_path)
    with pytest.raises(CheckpointError, match="holds 1 other files"):
        writer(tmp_path, resume=True)
    assert files(tmp_path) == {"notes.txt"}


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="is a file, needed a directory"):
            writer(tmp_path / "out", force=force)


def test_a_finished_checkpoint_is_refused(tmp_path: Path) -> None:
    w = writer(tmp_path / "out")
    write_all(w)
    w.finish({}, [], tmp_path)
    before = files(tmp_path / "out")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match="holds a finished checkpoint"):
            writer(tmp_path / "out", resume=resume)
    assert files(tmp_path / "out") == before


def test_an_empty_directory_and_one_abandoned_at_once_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    writer(tmp_path / "empty").close()
    (tmp_path / "abandoned" / ".fewbits").mkdir(parents=True)
    (tmp_path / "abandoned" / ".fewbits" / "lock").touch()
    writer(tmp_path / "abandoned").close()


def test_force_clears_our_files_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    w = writer(out, 2)
    write_all(w)
    w.finish({"config.json": "old"}, [], tmp_path)
    mine = {"notes.txt", "draft.tmp", "model.safetensors", "sub/fewbits-00001-of-00002.safetensors"}
    (out / "sub").mkdir()
    for name in mine:
        (out / name).write_text("mine")
    (out / "fewbits-00001-of-00002.tmp").write_text("half a shard")
    w = writer(out, 3, force=True)
    assert files(out) == mine | {"config.json", ".fewbits/run.json", ".fewbits/lock"}
    write_all(w)
    w.finish({"config.json": "new"}, [], tmp_path)
    assert files(out) == mine | {*(shard_name(i, 3) for i in range(3)), INDEX, "config.json"}
    assert all((out / name).read_text() == "mine" for name in mine)
    assert (out / "config.json").read_text() == "new"


def test_force_starts_an_unfinished_run_afresh(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unfinished(out)
    w = writer(out, run={"recipe": "other"}, force=True)
    assert not any(w.has(i) for i in range(3)) and files(out) == {".fewbits/run.json", ".fewbits/lock"}
    w.close()


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_resumed_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unfinished(out)
    with pytest.raises(CheckpointError, match="holds an unfinished run; --resume continues it, --force starts afresh"):
        writer(out)
    w = writer(out, resume=True)
    assert [w.has(i) for i in range(3)] == [True, True, False]
    assert w.facts(0) == [{"name": "layers.0", "bytes": 0}]
    assert all(torch.equal(w.read(1)[k], v) for k, v in tensors(1).items())
    write_all(w, range(2, 3))
    w.finish({}, [], tmp_path)


def test_resume_of_nothing_starts(tmp_path: Path) -> None:
    w = writer(tmp_path / "out", resume=True)
    assert not w.has(0)
    w.close()


def test_only_the_same_run_is_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unfinished(out)
    before = {name: (out / name).read_bytes() for name in files(out)}
    other = {"model": {"files": {"a": "9" * 100}}, "recipe": "abc", "device": "cuda"}
    with pytest.raises(CheckpointError) as info:
        writer(out, run=other, resume=True)
    message = str(info.value)
    assert "differs in device, model, seed" in message and "recipe" not in message
    assert 'it has null, got "cuda"' in message and "--force to start afresh" in message
    with pytest.raises(CheckpointError, match=r"differs in model \(model: it has .*123.*, got .*\.\.\.\)"):
        writer(out, run=RUN | {"model": {"files": {"a": "9" * 100}}}, resume=True)
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    # the refusals above are still alive here, and must not hold the directory
    assert writer(out, resume=True).has(1)


def test_runs_are_compared_as_stored(tmp_path: Path) -> None:
    w = writer(tmp_path / "out", run={"shape": (1, 2), "by": {1: "x"}})
    w.close()
    writer(tmp_path / "out", run={"shape": [1, 2], "by": {"1": "x"}}, resume=True).close()


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unfinished(out)
    (out / "fewbits-00003-of-00003.tmp").write_text("half a shard")
    w = writer(out, resume=True)
    assert not w.has(2) and not list(out.glob("*.tmp"))
    w.close()


def test_damaged_shard(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unfinished(out)
    path = out / shard_name(0, 3)
    path.write_bytes(path.read_bytes()[:-5])
    w = writer(out, resume=True)
    with pytest.raises(CheckpointError, match=r"fewbits-00001-of-00003\.safetensors: truncated"):
        w.read(0)
    w.close()


def test_two_writers_on_one_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = writer(out)
    first.write(0, tensors(0), [])
    for resume, force in ((True, False), (False, True)):
        with pytest.raises(CheckpointError, match="another process is writing to it"):
            writer(out, resume=resume, force=force)
    assert first.has(0)  # --force of the second has not cleared the first's shards
    first.close()
    writer(out, resume=True).close()


# -- disks -------------------------------------------------------------------------------------------------------------


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(given: dict[str, Tensor], path: Path, **kwargs: Any) -> None:
    Path(path).write_bytes(b"half")
    full()


def full_in_rust(given: dict[str, Tensor], path: Path, **kwargs: Any) -> None:
    Path(path).write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failing", [full, half_written, full_in_rust])
def test_full_disk_leaves_no_shard_and_can_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: Any
) -> None:
    out = tmp_path / "out"
    w = writer(out)
    write_all(w, range(1))
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save_file", failing)
        with pytest.raises(CheckpointError, match=r"the disk is full; free some space and run again with --resume"):
            w.write(1, tensors(1), [])
    assert w.has(0) and not w.has(1)
    assert not [name for name in files(out) if name.endswith(".tmp")]
    w.close()
    w = writer(out, resume=True)
    assert [w.has(i) for i in range(3)] == [True, False, False]
    write_all(w, range(1, 3))
    w.finish({}, [], tmp_path)
    assert all(torch.equal(read_shard(out / shard_name(1, 3))[k], v) for k, v in tensors(1).items())


def test_disk_that_fills_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    w = writer(out)
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="the disk is full"):
            w.write(0, tensors(0), [])
    assert not w.has(0) and not [name for name in files(out) if name.endswith(".tmp")]
    w.close()


def test_disk_that_fills_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    w = writer(out)
    write_all(w)
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="the disk is full"):
            w.finish({"config.json": "{}"}, [], tmp_path)
    assert files(out).isdisjoint({INDEX, "config.json", "config.json.tmp"})
    w.close()
    writer(out, resume=True).finish({"config.json": "{}"}, [], tmp_path)
    assert {INDEX, "config.json"} <= files(out)


def usage(free: int) -> Any:
    return lambda path: collections.namedtuple("usage", "total used free")(free * 2, free, free)


def test_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(shutil, "disk_usage", usage(100_000_000))
    with pytest.raises(CheckpointError, match="got 100 MB free, needed about 267 MB; free some space") as info:
        writer(out, need_bytes=200_000_000)
    assert info.value is not None  # the refusal is still alive, and must not hold the directory
    monkeypatch.setattr(shutil, "disk_usage", usage(300_000_000))
    writer(out, need_bytes=200_000_000, resume=True).close()


def test_finished_shards_need_no_space_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    w = writer(out)
    w.write(0, {"a": torch.zeros(1_000_000)}, [])  # 4 MB
    w.close()
    monkeypatch.setattr(shutil, "disk_usage", usage((64 << 20) + 6_000_000))
    writer(out, need_bytes=9_000_000, resume=True).close()
    with pytest.raises(CheckpointError, match="needed about"):
        writer(out, need_bytes=9_000_000, force=True)  # which begins by removing them


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be written .*choose another output"):
        writer(tmp_path / "out")


def test_other_errors_pass_through(tmp_path: Path) -> None:
    for error in (OSError(errno.EIO, "io"), SafetensorError("bad header"), KeyError("x")):
        with pytest.raises(type(error)), disk_errors(tmp_path):
            raise error
    w = writer(tmp_path / "out")
    with pytest.raises(RuntimeError):  # two names for one memory: a bug of ours, not the user's
        shared = torch.zeros(4)
        w.write(0, {"a": shared, "b": shared}, [])
    assert not w.has(0) and not list((tmp_path / "out").glob("*.tmp"))
    w.close()

"""The checkpoint reader: right on what users have, and one clear error for everything that is broken or hostile."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewbits.quant.errors import CheckpointError, FewbitsError, ModelError
from fewbits.quant.shards import DTYPES, read_header
from fewbits.quant.source import check_finite, open_source, require_dense

Tiny = Callable[[str], Path]


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, honest or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def record(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model directory of two shards with an index: a and b in the first, c in the second."""
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "model-00002-of-00002.safetensors")
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_index(tmp_path, {"a": one, "b": one, "c": two})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def write_index(path: Path, weight_map: object) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_safetensors_reads(tiny: Tiny, tmp_path: Path, dtype: torch.dtype, shards: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    source = open_source(tmp_path)
    expected = {k: v for file in source.shards for k, v in load_file(tmp_path / file).items()}
    assert (len(source.shards) == 1) == (shards == "1GB")
    assert sorted(source.keys()) == sorted(expected)
    for key, value in expected.items():
        assert source.info(key) == (tuple(value.shape), value.dtype)
        assert torch.equal(source.get(key), value)
    assert source.weights_bytes == sum(v.nbytes for v in expected.values())
    assert source.config["model_type"] == "llama"
    require_dense(source)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_survives(tmp_path: Path, name: str) -> None:
    tensor = torch.randint(0, 2, (15 * DTYPES[name].itemsize,), dtype=torch.uint8).view(DTYPES[name])
    save_file({"t": tensor.view(3, 5), "scalar": tensor[0].clone(), "empty": tensor[:0].view(0, 7)},
              tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = open_source(tmp_path)
    assert torch.equal(source.get("t").view(torch.uint8), tensor.view(3, 5).view(torch.uint8))
    assert source.get("scalar").shape == () and source.get("empty").shape == (0, 7)
    source.get("t").zero_()  # memory of its own: writing to it changes no file
    assert torch.equal(source.get("t").view(torch.uint8), tensor.view(3, 5).view(torch.uint8))


def test_hashes_are_sha256_and_follow_the_file(sharded: Path) -> None:
    source = open_source(sharded)
    hashes = source.hashes()
    assert set(hashes) == {"config.json", *source.shards}
    for file, digest in hashes.items():
        assert digest == hashlib.sha256((sharded / file).read_bytes()).hexdigest()
    (sharded / "config.json").write_text('{"model_type": "mistral"}')
    assert source.hashes()["config.json"] != hashes["config.json"]


def test_extra_files(sharded: Path) -> None:
    carried = ["LICENSE", "README.md", "chat_template.jinja", "generation_config.json", "tokenizer.json",
               "tokenizer.model"]
    left = ["pytorch_model.bin", "model.gguf", "consolidated.00.pth", "x.onnx", ".gitattributes", "notes.pkl",
            "pytorch_model.bin.index.json", "modeling_custom.py"]
    for name in carried + left:
        (sharded / name).write_text("{}")
    (sharded / ".git").mkdir()
    (sharded / ".git" / "config").write_text("secret")
    (sharded / "additional_chat_templates").mkdir()
    (sharded / "additional_chat_templates" / "tool.jinja").write_text("x")
    with open(sharded / "weights.dat", "wb") as f:
        f.truncate(200_000_000)  # sparse
    source = open_source(sharded)
    names = [str(p.relative_to(source.path)) for p in source.extra_files()]
    assert names == sorted([*carried, "additional_chat_templates/tool.jinja"])
    assert "modeling_custom.py" in [p.name for p in source.extra_files(remote_code=True)]


def expect(path: Path, *words: str, error: type[FewbitsError] = CheckpointError) -> None:
    """Opening the directory raises one line that holds all the words."""
    with pytest.raises(error) as caught:
        open_source(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


ABUSES = {
    "short file": (b"", "truncated: 3 bytes"),
    "huge header": ({"a": record([1], 0, 4)}, "claims"),
    "not JSON": (b"{nonsense", "not valid JSON"),
    "not UTF-8": (b"\xff\xfe{}", "not valid JSON"),
    "deep JSON": (b"[" * 200_000, "not valid JSON"),
    "long integer": (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    "a list": (b"[1, 2]", "needs an object"),
    "twice the same key": (b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": 1}', "twice"),
    "record is a number": ({"a": 7}, "needs an object"),
    "unknown dtype": ({"a": record([1], 0, 4, "F4")}, "unknown dtype"),
    "dtype is a list": ({"a": {"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]}}, "unknown dtype"),
    "negative shape": ({"a": record([-1], 0, 4)}, "not a list of sizes"),
    "float shape": ({"a": record([1.0], 0, 4)}, "not a list of sizes"),
    "bool shape": ({"a": record([True], 0, 4)}, "not a list of sizes"),
    "many dimensions": ({"a": record([1] * 65, 0, 4)}, "not a list of sizes"),
    "overflowing shape": ({"a": record([2**40, 2**40], 0, 4)}, "too large"),
    "overflow hidden by zero": ({"a": record([0, 2**40, 2**40], 0, 0)}, "too large"),
    "offsets reversed": ({"a": record([1], 4, 0)}, "needs 4 bytes"),
    "negative offset": ({"a": record([1], -4, 0)}, "data_offsets"),
    "one offset": ({"a": {"dtype": "F32", "shape": [], "data_offsets": [0]}}, "data_offsets"),
    "count and shape differ": ({"a": record([3], 0, 8)}, "needs 12 bytes"),
    "overlap": ({"a": record([2], 0, 8), "b": record([2], 4, 12)}, "overlaps"),
    "gap": ({"a": record([1], 0, 4), "b": record([1], 8, 12)}, "gap"),
    "beyond the file": ({"a": record([100], 0, 400)}, "truncated: header promises"),
    "trailing bytes": ({"a": record([1], 0, 4)}, "header promises"),
    "terminal escapes": ({"a\x1b[2J": record([3], 0, 12)}, "printable"),
    "lone surrogate": (b'{"\\ud800": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}', "printable"),
}


@pytest.mark.parametrize("case", ABUSES)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    header, message = ABUSES[case]
    path = tmp_path / "model.safetensors"
    write_raw(path, header, b"\0" * 12, length=2**62 if case == "huge header" else None)
    if case == "short file":
        path.write_bytes(b"abc")
    (tmp_path / "config.json").write_text("{}")
    expect(tmp_path, "model.safetensors", message)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
@example(struct.pack("<Q", 2) + b"{}")
def test_any_bytes_raise_only_our_errors(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with contextlib.suppress(FewbitsError):
        read_header(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(sorted(DTYPES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner, max_size=4), max_leaves=12)
sizes = st.lists(st.integers(-1, 4) | st.just(2**63), max_size=3)
records = st.fixed_dictionaries({"dtype": st.sampled_from(sorted(DTYPES)), "shape": sizes,
                                 "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2)})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=4), records | json_values, max_size=3), st.binary(max_size=64))
def test_any_header_raises_only_our_errors_or_reads(tmp_path: Path, header: dict, data: bytes) -> None:
    """What passes the checks can be read to the last byte, and agrees with the safetensors library."""
    write_raw(tmp_path / "model.safetensors", header, data)
    (tmp_path / "config.json").write_text("{}")
    try:
        source = open_source(tmp_path)
    except FewbitsError:
        return
    assert source.weights_bytes == len(data)
    expected = load_file(tmp_path / "model.safetensors")
    for key in source.keys():  # noqa: SIM118
        assert torch.equal(source.get(key).view(-1).view(torch.uint8), expected[key].view(-1).view(torch.uint8))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_one_flipped_byte(tmp_path: Path, position: int, value: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, path)
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] = value
    path.write_bytes(bytes(raw))
    (tmp_path / "config.json").write_text("{}")
    try:
        source = open_source(tmp_path)
        for key in source.keys():  # noqa: SIM118
            source.get(key)
    except FewbitsError:
        pass


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    expect(sharded, "model-00002-of-00002.safetensors", "missing", "download it again")


def test_truncated_shard(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    expect(sharded, shard.name, "truncated: header promises", "download it again")


def test_shard_that_shrinks_after_opening(sharded: Path) -> None:
    source = open_source(sharded)
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="c: truncated: needed 10 bytes, got 7"):
        source.get("c")
    shard.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        source.get("c")
    with pytest.raises(CheckpointError, match="cannot be read"):
        source.hashes()
    with pytest.raises(CheckpointError, match="not in"):
        source.get("nothing")


@pytest.mark.parametrize("escape", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "x\n.safetensors"])
def test_index_that_leaves_the_directory(sharded: Path, escape: str) -> None:
    write_index(sharded, {"a": escape})
    expect(sharded, "index.json", "do not trust")


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}, {"a": None}])
def test_index_of_wrong_type(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    expect(sharded, "weight_map")


def test_index_names_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_index(sharded, {"a": one, "b": one, "c": two, "d": two})
    expect(sharded, "d: the index says", two)
    write_index(sharded, {"a": one, "b": two, "c": two})
    expect(sharded, "b: the index says", two)


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, sharded / "model-00002-of-00002.safetensors")
    expect(sharded, "a: stands in both")


def test_link_out_of_the_directory(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret"
    outside.write_text("key")
    (sharded / "README.md").symlink_to(outside)
    source = open_source(sharded)
    with pytest.raises(CheckpointError, match=r"README\.md: is a link"):
        source.extra_files()
    shard = sharded / "model-00002-of-00002.safetensors"
    shutil.move(shard, outside)
    shard.symlink_to(outside)
    expect(sharded, "is a link", "outside")


def test_links_of_the_hub_cache_are_followed(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    repo = tmp_path_factory.mktemp("hub") / "models--x"
    snapshot = repo / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in list(sharded.iterdir()):
        shutil.move(file, repo / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    source = open_source(snapshot)
    assert source.revision == "abc123" and source.get("a").shape == (2, 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe_is_refused_not_waited_for(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    expect(sharded, shard.name, "not a regular file")


def test_what_is_not_a_model(tmp_path: Path) -> None:
    expect(tmp_path, "config.json", error=ModelError)
    (tmp_path / "config.json").write_text("{}")
    expect(tmp_path, "no .safetensors", error=ModelError)
    (tmp_path / "pytorch_model.bin").write_text("x")
    expect(tmp_path, "Pickle", "save_pretrained", error=ModelError)
    (tmp_path / "model.Q4_1.gguf").write_text("x")
    expect(tmp_path, "pass its path", error=ModelError)
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    expect(tmp_path, "LoRA", error=ModelError)
    (tmp_path / "config.json").write_text("{")
    expect(tmp_path, "config.json", "not valid JSON")


def test_names_that_are_neither_path_nor_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("./nope", "/nope/nope", "~/nope/nope", "nope.gguf", "a b", "a/b/c", "../x"):
        with pytest.raises(ModelError, match="no such directory"):
            open_source(name)
    with pytest.raises(ModelError, match="no such directory here, and the hub"):
        open_source("fewbits-tests/there-is-no-such-model")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ModelError, match="not GGUF"):
        open_source(tmp_path / "a.txt")


def test_hub_id(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = {}

    def give(repo: str, **kwargs: object) -> str:
        asked.update(kwargs, repo=repo)
        return str(sharded)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert open_source("someone/model@abc").name == "someone/model@abc"
    assert asked["repo"] == "someone/model" and asked["revision"] == "abc"
    assert not any(p.endswith((".bin", ".pt", "*")) and p[0] == "*" for p in asked["allow_patterns"])

    def fail(repo: str, **kwargs: object) -> str:
        raise TimeoutError("the line broke\nin two")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"hub did not give it either \(the line broke\)"):
        open_source("someone/model")


@pytest.mark.parametrize("config", [
    {"quantization_config": {"quant_method": "gptq"}}, {"text_config": {"quantization_config": {"quant_method": "x"}}},
    {"compression_config": {"format": "x"}},
])
def test_quantized_models_open_but_are_not_dense(sharded: Path, config: dict) -> None:
    (sharded / "config.json").write_text(json.dumps(config))
    source = open_source(sharded)
    with pytest.raises(ModelError, match=r"already quantized.*16-bit"):
        require_dense(source)


@pytest.mark.parametrize(("key", "dtype"), [("q.weight", torch.int8), ("q.qweight", torch.int32)])
def test_quantized_tensors_are_not_dense(tmp_path: Path, key: str, dtype: torch.dtype) -> None:
    save_file({key: torch.zeros(4, dtype=dtype)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="already quantized"):
        require_dense(open_source(tmp_path))


def test_check_finite() -> None:
    bad = torch.ones(10, dtype=torch.bfloat16)
    check_finite("w", bad)
    check_finite("w", torch.ones(4, dtype=torch.int32))
    check_finite("w", torch.ones(4).to(torch.float8_e4m3fn))
    bad[3], bad[4] = float("nan"), float("-inf")
    with pytest.raises(ModelError, match=r"^w: 2 of 10 values"):
        check_finite("w", bad)
    with pytest.raises(ModelError, match="1 of 4"):
        check_finite("w", torch.tensor([1.0, 1.0, float("nan"), 1.0]).to(torch.float8_e5m2))

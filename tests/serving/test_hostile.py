"""Checkpoints that are incomplete, inconsistent or hostile raise one clear error and never load."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from fewbits.quant.checkpoint import INDEX
from fewbits.quant.errors import CheckpointError, FewbitsError
from fewbits.serving.transformers import FewbitsConfig, load
from tests.serving.conftest import edit_config, stored_tensors

LINEAR = "model.layers.1.mlp.down_proj"


def rewrite(folder, change) -> None:
    """Apply ``change(tensors)`` to all tensors and write them again."""
    tensors = stored_tensors(folder)
    change(tensors)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    shard = "fewbits-00001-of-00001.safetensors"
    save_file({k: v.clone() for k, v in tensors.items()}, folder / shard, metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_refused(folder, *words: str) -> None:
    with pytest.raises(FewbitsError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
def test_missing_packed_tensor(copied, leaf):
    folder = copied()
    rewrite(folder, lambda t: t.pop(f"{LINEAR}.{leaf}"))
    assert_refused(folder, f"{LINEAR}.{leaf}", "missing", "quantize it again")


@pytest.mark.parametrize("make, words", [
    (lambda t: None, ("missing",)), (lambda t: t[:-1], ("got (95,)",)), (lambda t: t.int(), ("I32",)),
    (lambda t: t.clamp(max=94), ("0 to 94", "each of 0 to 95 once")), (lambda t: t - 1, ("-1 to 94",)),
    (lambda t: t * 300, ("each of 0 to 95 once",)),
])
def test_wrong_permutation(copied, make, words):
    folder = copied("llama", exceptions={LINEAR: "perm:int4_g32"})
    name = f"{LINEAR}.weight_perm"

    def change(tensors):
        bad = make(tensors.pop(name))
        if bad is not None:
            tensors[name] = bad

    rewrite(folder, change)
    assert_refused(folder, name, *words)


def test_permutation_that_the_config_does_not_know(copied):
    folder = copied("llama", exceptions={LINEAR: "perm:int4_g32"})
    edit_config(folder, exceptions={})
    assert_refused(folder, "weight_perm", "needs none")


def test_embedding_with_a_permutation(copied):
    folder = copied()
    edit_config(folder, exceptions={"model.embed_tokens": "perm:int4_g32"})
    assert_refused(folder, "model.embed_tokens", "perm:int4_g32", "never sorted")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_missing_dense_tensor(copied, name):
    folder = copied()
    rewrite(folder, lambda t: t.pop(name))
    assert_refused(folder, name, "missing")


def test_missing_bias_and_expert(copied, tmp_path):
    folder = copied("qwen3-moe")
    name = "model.layers.0.mlp.experts.down_proj.2.weight_packed"
    rewrite(folder, lambda t: t.pop(name))
    assert_refused(folder, name, "missing")


def test_tied_pair_missing_altogether(copied):
    folder = copied("llama-tied")
    rewrite(folder, lambda t: t.pop("model.embed_tokens.weight"))
    assert_refused(folder, "embed_tokens.weight", "missing")


@pytest.mark.parametrize("leaf, make", [
    ("weight_packed", lambda t: t[:, :-1]), ("weight_packed", lambda t: t.to(torch.int64)),
    ("weight_scale", lambda t: t.float()), ("weight_scale", lambda t: t.T), ("weight_zero_point", lambda t: t[:-1]),
    ("weight_shape", lambda t: t.flip(0)), ("weight_shape", lambda t: t + 32), ("weight_shape", lambda t: t * -1),
])
def test_wrong_packed_tensor(copied, leaf, make):
    folder = copied()

    def change(tensors):
        tensors[f"{LINEAR}.{leaf}"] = make(tensors[f"{LINEAR}.{leaf}"]).contiguous()

    rewrite(folder, change)
    assert_refused(folder, f"{LINEAR}.{leaf}", "got", "needed")


def test_wrong_dense_tensor(copied):
    folder = copied()
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}))
    assert_refused(folder, "model.norm.weight", "I32", "F32")


def test_tensor_that_the_config_does_not_know(copied):
    folder = copied()
    rewrite(folder, lambda t: t.update({f"{LINEAR}.weight_packed_1": torch.zeros(4, 4, dtype=torch.int32)}))
    assert_refused(folder, "weight_packed_1")


def test_symmetric_in_config_and_zero_points_on_disk(copied):
    folder = copied()
    edit_config(folder, default="int4_sym_g32")
    assert_refused(folder, "weight_zero_point")


def test_truncated_shard_and_no_index(copied, tmp_path):
    folder = copied()
    shard = folder / "fewbits-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_refused(folder, "fewbits-00002-of-00002", "cannot be read")
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=INDEX):
        load(folder)
    with pytest.raises(ValueError, match=INDEX):  # transformers' own
        AutoModelForCausalLM.from_pretrained(folder)


def test_index_that_leads_elsewhere(copied, tmp_path):
    folder = copied()
    (tmp_path / "elsewhere").mkdir()
    (folder / "fewbits-00002-of-00002.safetensors").rename(tmp_path / "elsewhere" / "x.safetensors")
    index = json.loads((folder / INDEX).read_text())
    for name, file in index["weight_map"].items():
        if "00002-of" in file:
            index["weight_map"][name] = "../elsewhere/x.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert_refused(folder, "one folder")
    with pytest.raises(CheckpointError, match="elsewhere"):
        load(folder)


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}',
    '{"weight_map": {"a": "b.safetensors"}}', "[" * 100_000,
])
def test_index_that_is_none(copied, text):
    folder = copied()
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        load(folder)


@pytest.mark.parametrize("key, value", [
    ("format_version", 2), ("format_version", "1"), ("format_version", True), ("format_version", 0),
    ("default", 4), ("default", None), ("default", ""), ("default", "int4_g64" * 10_000),
    ("exceptions", ["int4_g32"]), ("exceptions", {LINEAR: 8}), ("exceptions", {LINEAR: {"bits": 4}}),
    ("keep", "lm_head"), ("keep", [1]), ("keep", {"lm_head": 1}), ("dequantize", "yes"), ("kepe", ["lm_head"]),
])
def test_config_values(copied, key, value):
    folder = copied()
    edit_config(folder, **{key: value})
    assert_refused(folder, f"quantization_config.{'unknown key' if key == 'kepe' else key}", "needed")


@pytest.mark.parametrize("layout", [
    "int4", "nf99_g32", "int4_g48", "int4_g32[32]+int4_g32[16]", "int4_g32[0]+int4_g32[96]", "int4_row[0]+int4_row[96]",
    "int4_g32[-1]", "int4_g32[", "__import__('os')", "int4_g32[" + "9" * 4000 + "]",
])
def test_layouts(copied, layout):
    folder = copied()
    edit_config(folder, exceptions={LINEAR: layout})
    assert_refused(folder, LINEAR)


def test_exception_that_is_no_weight(copied):
    folder = copied()
    edit_config(folder, exceptions={"model.layers.7.mlp.down_proj": "int4_g32"})
    assert_refused(folder, "model.layers.7.mlp.down_proj")


def test_some_experts_kept(copied):
    folder = copied("qwen3-moe")
    edit_config(folder, keep=["lm_head", "model.layers.0.mlp.experts.down_proj.1"])
    assert_refused(folder, "model.layers.0.mlp.experts.down_proj", "all or none")


def test_state_dict_argument_and_quantize_on_load(copied, tiny):
    folder = copied()
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(FewbitsError, match="state_dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=stored_tensors(folder))
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=FewbitsConfig(default="int4_g32"))


def test_head_for_another_task_is_not_drawn_at_random(copied):
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(FewbitsError, match="score"):
        AutoModelForSequenceClassification.from_pretrained(copied(keep=("lm_head", "score")))


def test_codes_are_read_from_every_shard(copied):
    folder = copied()
    file = folder / "fewbits-00001-of-00002.safetensors"
    other = load_file(folder / "fewbits-00002-of-00002.safetensors")
    name = next(iter(other))
    save_file(load_file(file) | {name: other[name]}, file, metadata={"format": "pt"})
    assert_refused(folder, name, "stored in")

"""from_pretrained, load, save_pretrained and generate on checkpoints of every family."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import fewbits
from fewbits.kernels.linear import PackedMatrix, QuantEmbedding, QuantExperts, QuantLinear, TiedHead
from fewbits.quant.errors import FewbitsError
from fewbits.quant.targets import find_targets
from fewbits.serving.transformers import FewbitsConfig, load, load_tokenizer
from tests.conftest import FAMILIES
from tests.serving.conftest import config_of, logits, same_bytes, stored_tensors

# Sums of at most 256 float32 products of size 1 in another order: 256 * 2^-24 per linear, ten linears deep, logits of
# size 5. What is seen is 5e-6. The quantization itself moves logits by more than 1.
TOLERANCE = 2e-4

EMBEDDINGS = {"llama": "model.embed_tokens", "llama-tied": "model.embed_tokens", "gemma": "model.embed_tokens",
              "opt": "model.decoder.embed_tokens", "gpt2": "transformer.wte"}


def assert_close(model, dense, tolerance: float = TOLERANCE) -> None:
    for length in (1, 12):  # one token and many take different kernels
        torch.testing.assert_close(logits(model, length), logits(dense, length), rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dequantized_model(family, checkpoint, tiny):
    folder, dense = checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not any(type(m) in (nn.Linear, Conv1D) for path, m in model.named_modules() if path != "lm_head")
    assert_close(model, dense)
    original = AutoModelForCausalLM.from_pretrained(tiny(family))
    assert (logits(model) - logits(original)).abs().max() > 0.3, "the test cannot tell quantized from original"


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_again_writes_the_same(family, checkpoint, tmp_path):
    folder, _ = checkpoint(family)
    model = load(folder)
    before = logits(model)  # a forward first: what kernels derive must not be saved
    model.save_pretrained(tmp_path)
    assert same_bytes(stored_tensors(folder), stored_tensors(tmp_path))
    assert config_of(tmp_path) == config_of(folder)
    assert not list(tmp_path.glob("model*")), "transformers without fewbits would load these"
    assert torch.equal(logits(load(tmp_path)), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_generate(family, checkpoint):
    folder, dense = checkpoint(family)
    ids = torch.tensor([[1, 5, 9, 30]])
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(load(folder).generate(ids, **kwargs), dense.generate(ids, **kwargs))


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize(family, checkpoint, tmp_path):
    folder, dense = checkpoint(family)
    model = load(folder)
    model.dequantize()
    assert not any(isinstance(m, PackedMatrix) for m in model.modules())
    assert [t.shape for t in find_targets(model)] == [t.shape for t in find_targets(dense)]
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=TOLERANCE)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and not list(tmp_path.glob("fewbits*"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=TOLERANCE)


def test_dequantize_while_loading(checkpoint):
    folder, dense = checkpoint("llama")
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    with pytest.warns(UserWarning, match="loading attributes"):
        by_argument = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FewbitsConfig(dequantize=True))
    by_config = AutoModelForCausalLM.from_pretrained(folder, config=config)
    for model in (by_config, by_argument, load(folder, dequantize=True)):
        assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
        assert torch.equal(logits(model), logits(dense))


# -- mixtures -----------------------------------------------------------------------------------------------------


def test_exceptions_keep_and_segments(checkpoint, tmp_path):
    exceptions = {"model.layers.0.mlp.down_proj": "int8_sym_row_bf16", "lm_head": "int6_g64",
                  "model.layers.1.self_attn.q_proj": "int3_g32[32]+int8_g16[32]",
                  "model.layers.1.self_attn.k_proj": "perm:int3_g32[32]+int8_g16[32]",
                  "model.layers.1.self_attn.o_proj": "int2_g16[16]+int4_sym_g16[32]+int1_row_f32[16]"}
    kept = "model.layers.0.self_attn.q_proj"
    folder, dense = checkpoint("llama", exceptions=exceptions, keep=(kept,))
    model = load(folder)
    assert type(model.get_submodule(kept)) is nn.Linear
    assert isinstance(model.lm_head, QuantLinear)
    for name, layout in exceptions.items():
        assert layout.split("[")[0] in repr(model.get_submodule(name))
        assert len(model.get_submodule(name).quantized().segments) == layout.count("+") + 1
    assert_close(model, dense)
    model.save_pretrained(tmp_path)
    assert same_bytes(stored_tensors(folder), stored_tensors(tmp_path))
    assert_close(load(tmp_path), dense)


def test_experts_of_several_formats(checkpoint, tmp_path):
    exceptions = {"model.layers.0.mlp.experts.gate_up_proj.1": "int8_g32",
                  "model.layers.1.mlp.experts.down_proj.3": "int2_row"}
    folder, dense = checkpoint("qwen3-moe", exceptions=exceptions)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm")  # wants a 3-D tensor
    experts = model.model.layers[0].mlp.experts
    assert model.config._experts_implementation == "eager"
    assert isinstance(experts.gate_up_proj, QuantExperts) and len(experts.gate_up_proj.quantized()) == 4
    assert_close(model, dense)
    assert all(p.ndim < 3 for p in model.parameters()), "a dense copy of all experts is kept"
    with pytest.raises(FewbitsError, match="eager"):
        experts.gate_up_proj[torch.tensor([0, 1])]
    model.save_pretrained(tmp_path)
    assert same_bytes(stored_tensors(folder), stored_tensors(tmp_path))


def test_experts_kept_dense(checkpoint):
    keep = tuple(f"model.layers.0.mlp.experts.gate_up_proj.{e}" for e in range(4))
    folder, dense = checkpoint("qwen3-moe", keep=(*keep, "lm_head"))
    model = load(folder)
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 64, 64)
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, QuantExperts)
    assert_close(model, dense)


# -- embeddings and heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_quantized_embedding(family, checkpoint, tmp_path):
    name = EMBEDDINGS[family]
    folder, dense = checkpoint(family, exceptions={name: "int8_g32[32]+int6_row[32]"})
    model = load(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16, "the dtype of a scale was taken for that of the model"
    model = load(folder)
    assert isinstance(model.get_submodule(name), QuantEmbedding)
    assert isinstance(model.get_output_embeddings(), TiedHead) == (family != "llama")
    assert_close(model, dense)
    model.tie_weights()  # what resizing and other callers do
    model.save_pretrained(tmp_path)
    assert same_bytes(stored_tensors(folder), stored_tensors(tmp_path))
    model = load(tmp_path)
    assert_close(model, dense)
    model.dequantize()
    assert_close(model, dense)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family != "llama")


def test_tied_head_quantized_on_its_own(checkpoint, tmp_path):
    exceptions = {"lm_head": "int8_g32", "model.embed_tokens": "int4_g32"}
    folder, dense = checkpoint("llama-tied", exceptions=exceptions, keep=())
    model = load(folder)
    assert isinstance(model.lm_head, QuantLinear)
    assert_close(model, dense)
    model.save_pretrained(tmp_path)
    assert same_bytes(stored_tensors(folder), stored_tensors(tmp_path))
    model.dequantize()
    model.tie_weights()
    assert_close(model, dense)


# -- dtype and device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_that_of_activations_and_not_of_scales(dtype, checkpoint):
    exceptions = {"model.layers.0.mlp.up_proj": "int4_g32_bf16", "model.embed_tokens": "int8_g32"}
    folder, dense = checkpoint("llama", exceptions=exceptions)
    stored = stored_tensors(folder)
    loaded = load(folder, dtype=dtype)
    cast = load(folder).to(dtype)
    for model in (loaded, cast):
        assert model.dtype == dtype
        assert model.model.embed_tokens.weight.dtype == dtype
        packed = {n: t for n, t in model.state_dict().items() if ".weight_" in n}
        assert same_bytes(packed, {n: t for n, t in stored.items() if ".weight_" in n})
        out = model(input_ids=torch.tensor([[1, 2, 3]])).logits
        assert out.dtype == dtype
        # 8 or 11 bits of mantissa through two layers, against logits of size 5 (and .to() casts the rotary table too)
        torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=0.4 if dtype == torch.bfloat16 else 0.05)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2"])
def test_device_map_and_disk_offload(family, checkpoint, tmp_path):
    folder, dense = checkpoint(family)
    assert_close(AutoModelForCausalLM.from_pretrained(folder, device_map="auto"), dense)
    layers = "transformer.h" if family == "gpt2" else "model.layers"
    first, *rest = [path for path, _ in dense.named_children()]
    device_map = {f"{first}.{name}": "cpu" for name, _ in dense.get_submodule(first).named_children()}
    device_map = {k: v for k, v in device_map.items() if k != layers} | dict.fromkeys(rest, "cpu")
    device_map |= {f"{layers}.0": "disk", f"{layers}.1": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    for _ in range(2):
        assert_close(model, dense)
    packed = [m for m in model.get_submodule(f"{layers}.0").modules() if isinstance(m, PackedMatrix)]
    assert packed and all(m.weight_packed.is_meta and "_prepared" not in m.__dict__ for m in packed)
    with pytest.raises(FewbitsError, match="offloaded"):
        model.dequantize()
    with pytest.warns(UserWarning, match="offloaded"):
        model.save_pretrained(tmp_path / "again")
    assert same_bytes(stored_tensors(folder), stored_tensors(tmp_path / "again"))


def test_offloaded_table_with_tied_head(checkpoint, tmp_path):
    folder, dense = checkpoint("llama-tied", exceptions={"model.embed_tokens": "int8_g32"})
    device_map = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
                  "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert_close(model, dense)


# -- the rest of the front door -----------------------------------------------------------------------------------


def test_load_plain_model_and_tokenizer(tiny):
    model = fewbits.load(tiny("llama"))
    assert type(model.lm_head) is nn.Linear and model.dtype == torch.float32 and not model.training
    assert load_tokenizer(tiny("llama"))("ab")["input_ids"]
    with pytest.raises(FewbitsError, match="device_map"):
        fewbits.load(tiny("llama"), device="cpu", device_map="auto")


def test_base_model_without_head(checkpoint):
    folder, dense = checkpoint("llama", exceptions={"model.layers.0.mlp.up_proj": "int8_g32", "lm_head": "int8_g32"},
                               keep=("model.layers.1.mlp.up_proj",))
    model = AutoModel.from_pretrained(folder)
    assert type(model.layers[1].mlp.up_proj) is nn.Linear
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        got, expected = model(ids).last_hidden_state, dense.model(ids).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_saving_in_shards_over_an_older_checkpoint(checkpoint, tmp_path):
    folder, dense = checkpoint("llama")
    model = load(folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(names) > 3 and names[0] == f"fewbits-00001-of-{len(names):05d}.safetensors"
    assert_close(load(tmp_path), dense)
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["fewbits-00001-of-00001.safetensors"]
    assert {p.stat().st_mode for p in tmp_path.iterdir()} == {(tmp_path / "config.json").stat().st_mode}
    assert "transformers_weights" not in json.loads((tmp_path / "config.json").read_text())
    assert_close(load(tmp_path), dense)


def test_a_copy_saves_itself(checkpoint, tmp_path):
    folder, _ = checkpoint("llama")
    model = load(folder)
    logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.fill_(3)
    twin.save_pretrained(tmp_path)
    assert (stored_tensors(tmp_path)["model.norm.weight"] == 3).all()

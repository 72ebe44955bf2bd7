"""The plug-in in vLLM's own layers, loaders and engine. Runs where vLLM is installed, with CPU support."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewbits.quant.errors import CheckpointError
from fewbits.quant.formats import parse_layout
from tests.conftest import save_tiny_model
from tests.serving.conftest import edit_config, quantize, round_to_nearest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: its plug-in is not tested against it")

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "fewbits",
               "VLLM_NO_USAGE_STATS": "1"}

from vllm.model_executor.layers import linear, vocab_parallel_embedding  # noqa: E402
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402

from fewbits.serving.vllm import register  # noqa: E402

# Sums of at most 256 float32 products in another order, ten linears deep: 5e-6 is seen, and the quantization itself
# moves logits by more than 1
TOLERANCE = 2e-4
HEADS, KV_HEADS, HEAD, HIDDEN = 8, 2, 24, 192
MODULES = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(autouse=True)
def _one_process():
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def rank(monkeypatch):
    """``rank(r, n)``: layers are made as the r-th of n devices makes them."""

    def pretend(r: int, n: int) -> None:
        for module in (linear, vocab_parallel_embedding, vllm.model_executor.parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: r)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: n)

    pretend(0, 1)
    return pretend


def config(default: str = "int4_g24", exceptions: dict[str, str] | None = None, keep: list[str] | None = None):
    register()
    found = get_quantization_config("fewbits").from_config(
        {"quant_method": "fewbits", "format_version": 1, "default": default, "exceptions": exceptions or {},
         "keep": keep or []})
    found.packed_modules_mapping = MODULES
    return found


def quantized(rows: int, name: str, columns: int = HIDDEN, seed: int = 0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return round_to_nearest(weight, parse_layout(name, columns))


def fill(layer, tensors: dict[str, torch.Tensor], *shard) -> None:
    """As the engine does: by the name of a parameter and its ``weight_loader``."""
    params = dict(layer.named_parameters())
    for local, tensor in tensors.items():
        params[local].weight_loader(params[local], tensor, *shard)


def ready(layer) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def qkv(quant_config):
    return linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, bias=False, quant_config=quant_config,
                                    prefix="attn.qkv_proj")


def test_it_is_registered_once_and_again():
    register()
    register()
    assert get_quantization_config("fewbits").__name__ == "FewbitsVllmConfig"
    assert vllm.model_executor.layers.quantization.QUANTIZATION_METHODS.count("fewbits") == 1


# k and v are narrower than q; four devices share two key heads; formats of the three may differ
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("formats", [
    ["int4_g24", "int4_g24", "int4_g24"], ["int3_g24", "int8_sym_row", "int5_g32_bf16"],
    ["perm:int6_g32[64]+int3_g32[128]"] * 3,
])
def test_fused_qkv(size, formats, rank):
    names = [f"attn.{p}" for p in MODULES["qkv_proj"]]
    heads = dict(zip("qkv", (HEADS, KV_HEADS, KV_HEADS)))
    whole = {s: quantized(n * HEAD, f, seed=i) for i, ((s, n), f) in enumerate(zip(heads.items(), formats))}
    x = torch.randn(5, HIDDEN)
    for r in range(size):
        rank(r, size)
        layer = qkv(config(exceptions=dict(zip(names, formats))))
        for shard, weight in whole.items():
            fill(layer, weight.pack(), shard)
        ready(layer)
        q = HEADS * HEAD // size
        kv, mine = (HEAD, r // 2) if size == 4 else (KV_HEADS * HEAD // size, r)
        parts = [whole["q"].dequantize()[r * q : (r + 1) * q],
                 *(whole[s].dequantize()[mine * kv : (mine + 1) * kv] for s in "kv")]
        torch.testing.assert_close(layer(x)[0], x @ torch.cat(parts).T, rtol=0, atol=TOLERANCE)
        assert len(layer.packed) == (1 if formats[0] == "int4_g24" else 3)
        scales = [m.packed_tensors()["weight_scale"].dtype for m in layer.packed]
        assert (torch.bfloat16 in scales) == (formats[2] == "int5_g32_bf16")


def test_a_layer_is_one_graph(rank):
    """The engine compiles its models; the product is an operator that the compiler does not look into."""
    layer = qkv(config(exceptions={"attn.k_proj": "int8_sym_row"}))
    for i, (shard, heads) in enumerate(zip("qkv", (HEADS, KV_HEADS, KV_HEADS))):
        fill(layer, quantized(heads * HEAD, "int8_sym_row" if shard == "k" else "int4_g24", seed=i).pack(), shard)
    ready(layer)
    x = torch.randn(3, HIDDEN)
    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x)[0])


@pytest.mark.parametrize("size", [1, 2])
def test_fused_gate_up_and_down(size, rank):
    gate, up, down = quantized(240, "int2_g24"), quantized(240, "int2_g24", seed=1), quantized(192, "int3_g24", 240)
    x, total = torch.randn(3, HIDDEN), 0
    for r in range(size):
        rank(r, size)
        one = linear.MergedColumnParallelLinear(HIDDEN, [240, 240], bias=False, prefix="mlp.gate_up_proj",
                                                quant_config=config("int2_g24"))
        two = linear.RowParallelLinear(240, HIDDEN, bias=False, prefix="mlp.down_proj", reduce_results=False,
                                       quant_config=config("int3_g24"))
        fill(one, gate.pack(), 0)
        fill(one, up.pack(), 1)
        fill(two, down.pack())
        ready(one)
        ready(two)
        g, u = one(x)[0].chunk(2, dim=-1)
        total = total + two(g * u)[0]
    dense = (x @ gate.dequantize().T * (x @ up.dequantize().T)) @ down.dequantize().T
    torch.testing.assert_close(total / dense.abs().max(), dense / dense.abs().max(), rtol=0, atol=1e-5)


def test_weights_that_are_fused_in_the_checkpoint(rank):
    whole = quantized((HEADS + 2 * KV_HEADS) * HEAD, "int3_g24")
    x = torch.randn(2, HIDDEN)
    for r in range(2):
        rank(r, 2)
        quant_config = config("int3_g24")
        quant_config.packed_modules_mapping = {}
        layer = qkv(quant_config)
        fill(layer, whole.pack())
        ready(layer)
        q, k, v = whole.dequantize().split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD])
        mine = torch.cat([p.chunk(2)[r] for p in (q, k, v)])
        torch.testing.assert_close(layer(x)[0], x @ mine.T, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [1, 2])
def test_embedding_and_head(size, rank):
    table = quantized(200, "int6_g24")  # the engine pads the vocabulary to 256
    ids, x, logits = torch.tensor([0, 3, 99, 127, 128, 199]), torch.randn(2, HIDDEN), []
    for r in range(size):
        rank(r, size)
        names = config(exceptions={"embed": "int6_g24", "lm_head": "int6_g24"})
        embed = vocab_parallel_embedding.VocabParallelEmbedding(200, HIDDEN, quant_config=names, prefix="embed")
        head = vocab_parallel_embedding.ParallelLMHead(200, HIDDEN, quant_config=names, prefix="lm_head")
        for layer in (embed, head):
            fill(layer, table.pack())
            ready(layer)
        indices = embed.shard_indices
        mine = ids[(ids >= indices.org_vocab_start_index) & (ids < indices.org_vocab_end_index)]
        rows = embed.quant_method.embedding(embed, mine - indices.org_vocab_start_index)
        assert torch.equal(rows, table.dequantize()[mine])
        logits.append(head.quant_method.apply(head, x))
        assert logits[-1].shape == (2, 256 // size)
        assert head.tie_weights(embed) is head, "it is stored, so it has codes of its own"
    torch.testing.assert_close(torch.cat(logits, -1)[:, :200], x @ table.dequantize().T, rtol=0, atol=TOLERANCE)


def test_a_dense_head_tied_to_a_packed_embedding_reads_its_codes(rank):
    names = config(exceptions={"embed": "int6_g24"}, keep=["lm_head"])
    embed = vocab_parallel_embedding.VocabParallelEmbedding(200, HIDDEN, quant_config=names, prefix="embed")
    head = vocab_parallel_embedding.ParallelLMHead(200, HIDDEN, quant_config=names, prefix="lm_head")
    assert head.tie_weights(embed) is embed
    plain = vocab_parallel_embedding.VocabParallelEmbedding(200, HIDDEN, quant_config=names, prefix="other")
    assert head.tie_weights(plain) is head and head.weight is plain.weight


def test_an_embedding_that_vllm_gives_no_name(rank):
    """As in its Llama."""
    rank(0, 1)
    names = config(exceptions={"model.embed_tokens": "int6_g24", "model.layers.0.q_proj": "int3_g24"})
    embed = vocab_parallel_embedding.VocabParallelEmbedding(200, HIDDEN, quant_config=names)
    table = quantized(200, "int6_g24")
    fill(embed, table.pack())
    ready(embed)
    ids = torch.tensor([0, 3, 199])
    assert torch.equal(embed.quant_method.embedding(embed, ids), table.dequantize()[ids])


def test_what_is_kept_is_dense(rank):
    assert isinstance(qkv(config(keep=[f"attn.{p}" for p in MODULES["qkv_proj"]])).quant_method,
                      linear.UnquantizedLinearMethod)
    with pytest.raises(CheckpointError, match=r"attn\.k_proj: is dense, but vLLM makes one layer .* all to keep"):
        qkv(config(keep=["attn.k_proj"]))


@pytest.mark.parametrize("name,sizes", [("int4_g64", "1, 3"), ("perm:int6_g32[64]+int3_g32[128]", "1")])
def test_a_group_that_would_be_cut_is_refused_before_anything_is_loaded(name, sizes, rank):
    rank(0, 2)
    with pytest.raises(CheckpointError, match=f"o_proj: tensor_parallel_size 2 would cut .* possible here: {sizes}$"):
        linear.RowParallelLinear(HIDDEN, HIDDEN, bias=False, quant_config=config(name), prefix="attn.o_proj")


def test_a_part_that_is_not_stored_is_refused(rank):
    layer = qkv(config())
    fill(layer, quantized(HEADS * HEAD, "int4_g24").pack(), "q")
    with pytest.raises(CheckpointError, match=r"attn\.qkv_proj: 192 of 288 rows are stored"):
        ready(layer)


def test_experts_are_refused(tmp_path):
    quantize(save_tiny_model(tmp_path / "a", "qwen3-moe"), tmp_path / "b")
    with pytest.raises(Exception, match="mixtures of experts cannot be read by the vLLM plug-in"):
        engine(tmp_path / "b")


def test_the_commands_of_the_docs_are_known_to_vllm():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    text = (Path(__file__).resolve().parents[2] / "docs" / "vllm.md").read_text()
    commands = [line.split()[2:] for line in text.splitlines() if line.startswith("    vllm serve ")]
    assert len(commands) >= 8
    for command in commands:
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
        assert f"--tensor-parallel-size {parsed.tensor_parallel_size}" in " ".join(command) or len(command) == 1


# -- the engine ----------------------------------------------------------------------------------------------------


def engine(folder):
    return vllm.LLM(model=str(folder), dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2)


def logprobs(llm, ids: list[int]) -> torch.Tensor:
    """Of each token but the first, given those before it."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (result,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    return torch.tensor([step[t].logprob for step, t in zip(result.prompt_logprobs[1:], ids[1:])])


_ATTN = "model.layers.0.self_attn"
CHECKPOINTS = {
    "mixed": ("llama", {f"{_ATTN}.q_proj": "int3_g32", f"{_ATTN}.v_proj": "int8_sym_row",
                        "model.layers.1.mlp.down_proj": "int2_g16_f32", "model.layers.1.self_attn.o_proj": "int1_g32"}),
    "table": ("llama-tied", {"model.embed_tokens": "int8_g32"}),
    "rotated": ("llama", {f"{_ATTN}.q_proj": "trellis2", f"{_ATTN}.k_proj": "trellis2", f"{_ATTN}.v_proj": "rvq3",
                          "model.layers.1.mlp.down_proj": "pvq2", "model.layers.0.mlp.up_proj": "had:int3_g32",
                          "model.layers.1.self_attn.o_proj": "trellis2[64]+trellis3[64]"}),
    "codebooks": ("llama", {f"{_ATTN}.q_proj": "had:vq8_v4", f"{_ATTN}.k_proj": "vq8x2_v8", f"{_ATTN}.v_proj": "pq8_v8",
                            "model.layers.1.mlp.down_proj": "lrvq8_v4_d3", "model.layers.0.mlp.up_proj": "lr4:int3_g32",
                            "model.layers.1.self_attn.o_proj": "lr4:had:vq9_v4"}),
    "scalars": ("llama", {f"{_ATTN}.q_proj": "ternary_row_b3", f"{_ATTN}.k_proj": "nf4_g32", f"{_ATTN}.v_proj": "nvfp4",
                          "model.layers.1.mlp.down_proj": "bitmod3_g32", "model.layers.0.mlp.up_proj": "scl:fdb_g32",
                          "model.layers.1.self_attn.o_proj": "had:binary2_row", "model.layers.1.mlp.gate_proj": "mxfp4",
                          "model.layers.1.mlp.up_proj": "mxfp4", "model.layers.0.self_attn.o_proj": "had:fairy2"}),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_the_engine_computes_with_the_dequantized_weights(case, tmp_path):
    family, exceptions = CHECKPOINTS[case]
    source = save_tiny_model(tmp_path / "dense", family, hidden_size=128)
    dense = quantize(source, tmp_path / "packed", exceptions=exceptions)
    ids = list(range(5, 45))
    with torch.no_grad():
        ours = dense(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = ours[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(logprobs(engine(tmp_path / "packed"), ids), expected, rtol=0, atol=TOLERANCE)


def test_files_of_two_checkpoints_are_refused(tmp_path):
    quantize(save_tiny_model(tmp_path / "dense", "llama", hidden_size=128), tmp_path / "packed")
    files = sorted((tmp_path / "packed").glob("*.safetensors"))
    file = next(f for f in files if any(k.endswith("weight_packed") for k in load_file(f)))
    shutil.copy(file, tmp_path / "packed" / "fewbits-00009-of-00009.safetensors")
    with pytest.raises(Exception, match="stored twice"):
        engine(tmp_path / "packed")


def test_a_config_of_a_newer_version_is_refused(tmp_path):
    quantize(save_tiny_model(tmp_path / "dense", "llama", hidden_size=128), tmp_path / "packed")
    edit_config(tmp_path / "packed", format_version=99)
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["format_version"] == 99
    with pytest.raises(Exception, match="if a newer fewbits wrote it"):
        engine(tmp_path / "packed")

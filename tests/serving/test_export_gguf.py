"""GGUF: what its own reader, and transformers, read back is what fewbits stored, integer by integer."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fewbits
from fewbits.cli.main import main
from fewbits.quant.allocate.menu import ENGINES
from fewbits.quant.errors import CheckpointError, FormatError, ModelError, RecipeError
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.targets import Target
from fewbits.quant.types import Layout, QuantizedTensor, Segment
from fewbits.serving.export import export
from fewbits.serving.export.ggml import BlockType, block_type, to_blocks
from fewbits.serving.export.gguf import Gguf
from fewbits.serving.export.gguf_tokenizer import splitter
from fewbits.serving.export.stored import open_stored
from tests.conftest import save_tiny_model
from tests.serving.conftest import make_ternary

gguf = pytest.importorskip("gguf")

_COLUMNS = 768  # = 3 * 256 = 24 * 32
_FORMATS = [
    *(f"int{bits}{sym}_{group}" for bits, sym in ((4, "_sym"), (4, ""), (5, "_sym"), (5, ""), (8, "_sym"))
      for group in ("g32", "g96", "g128", "row")),
    "int2_sym_g256", "int2_sym_g768", "int2_sym_row",
]


def _random(fmt: IntFormat, rows: int, columns: int = _COLUMNS, *, lowest: int = 0) -> QuantizedTensor:
    """Codes that use every value, and scales of every size that float16 has, subnormal ones too."""
    draw = torch.Generator().manual_seed(rows)
    groups = fmt.groups(columns)
    codes = torch.randint(lowest, fmt.levels, (rows, columns), generator=draw, dtype=torch.uint8)
    codes.view(-1)[: fmt.levels - lowest] = torch.arange(lowest, fmt.levels, dtype=torch.uint8)
    scale = torch.exp2(torch.rand(rows, groups, generator=draw) * 30 - 20).to(fmt.scale_dtype)
    params = {"scale": scale}
    if not fmt.symmetric:
        params["zero_point"] = torch.randint(0, fmt.levels, (rows, groups), generator=draw, dtype=torch.uint8)
    return QuantizedTensor((rows, columns), (Segment(fmt, codes, params),))


def _kind(fmt: IntFormat, columns: int = _COLUMNS, **options: bool) -> BlockType:
    kind = block_type(fmt, columns, **options)
    assert isinstance(kind, BlockType), kind
    return kind


def _dequantized(packed: np.ndarray, kind: BlockType) -> np.ndarray:
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind.name])


@pytest.mark.parametrize("rows", [1, 3, 10])
@pytest.mark.parametrize("name", _FORMATS)
def test_the_own_reader_of_gguf_finds_our_integers(name: str, rows: int) -> None:
    fmt = IntFormat.parse(name)
    assert fmt is not None
    tensor, kind = _random(fmt, rows), _kind(fmt)
    packed, rounded = to_blocks("w", tensor, kind)
    assert packed.shape == (rows, kind.row_bytes(_COLUMNS)) and kind.nbytes == gguf.GGML_QUANT_SIZES[
        gguf.GGMLQuantizationType[kind.name]][1]
    found, ours = _dequantized(packed, kind), tensor.dequantize().numpy()
    if fmt.symmetric:
        assert rounded == 0 and np.array_equal(found, ours)
        return
    segment = tensor.segments[0]
    repeats = _COLUMNS // fmt.groups(_COLUMNS)
    scale, zero = (np.repeat(segment.params[k].float().numpy(), repeats, 1) for k in ("scale", "zero_point"))
    offset = (-scale * zero).astype(np.float16).astype(np.float32)
    assert np.array_equal(found, scale * segment.codes.numpy() + offset)  # so codes, scales and offsets are these
    assert bool(rounded) == bool((offset != -scale * zero).any())
    assert bool((abs(found - ours) <= scale * zero / 2048 + 2**-25).all())


def test_a_zero_point_of_zero_needs_no_rounding() -> None:
    fmt = IntFormat(4, 32)
    tensor = _random(fmt, 3)
    tensor.segments[0].params["zero_point"].zero_()
    packed, rounded = to_blocks("w", tensor, _kind(fmt))
    assert rounded == 0 and np.array_equal(_dequantized(packed, _kind(fmt)), tensor.dequantize().numpy())


@pytest.mark.parametrize("rows", [1, 7])
def test_ternary_codes_fit_tq1_0_and_others_are_refused(rows: int) -> None:
    fmt = IntFormat(2, 256, symmetric=True)
    kind = _kind(fmt, ternary=True)
    assert kind.name == "TQ1_0"
    tensor = _random(fmt, rows, lowest=1)
    assert np.array_equal(_dequantized(to_blocks("w", tensor, kind)[0], kind), tensor.dequantize().numpy())
    with pytest.raises(FormatError, match=r"a\.b: TQ1_0 holds -1, 0 and 1, got -2 for .*as TQ2_0"):
        to_blocks("a.b", _random(fmt, rows), kind)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1e6), (torch.bfloat16, 1e-9), (torch.float32, 0.1),
                                              (torch.float32, float("inf"))])
def test_a_scale_that_float16_does_not_hold_is_refused(dtype: torch.dtype, scale: float) -> None:
    fmt = IntFormat(4, 32, symmetric=True, scale_dtype=dtype)
    tensor = _random(fmt, 2)
    tensor.segments[0].params["scale"].fill_(0.25)
    assert to_blocks("a.b", tensor, _kind(fmt))[1] == 0
    tensor.segments[0].params["scale"][1, 3] = scale
    with pytest.raises(FormatError, match=r"a\.b: GGUF has float16 scales.*format\.scale_dtype = 'float16'"):
        to_blocks("a.b", tensor, _kind(fmt))


def test_an_offset_beyond_float16_is_refused() -> None:
    fmt = IntFormat(5, 32)
    tensor = _random(fmt, 2)
    tensor.segments[0].params["scale"].fill_(30000)
    with pytest.raises(FormatError, match=r"a\.b: Q5_1 stores scale.*quantize it symmetrically"):
        to_blocks("a.b", tensor, _kind(fmt))


@pytest.mark.parametrize(("name", "columns", "reason"), [
    ("int3_sym_g32", 768, "no type for int3_sym_g32; quantize it as int4_sym_g32"),
    ("int6_g64", 768, "no type for int6_g64; quantize it as int5_sym_g32"),
    ("int7_sym_row", 768, "no type for int7_sym_row; quantize it as int8_sym_g32"),
    ("int8_g32", 768, "no type for int8_g32; quantize it as int8_sym_g32"),
    ("int1_sym_g32", 768, "no type for int1_sym_g32; quantize it as int2_sym_g256"),
    ("int2_g32", 768, "no type for int2_g32; quantize it as int2_sym_g256"),
    ("int2_sym_g64", 768, "groups of 64, its blocks have 256 columns; quantize it as int2_sym_g256"),
    ("int2_sym_g64", 576, "K = 576 is no multiple of 256, quantize it as int4_sym_g32"),
    ("int4_g16", 768, "groups of 16, its blocks have 32 columns; quantize it as int4_g32"),
    ("int4_sym_row", 80, "groups of 80, its blocks have 32 columns; K = 80 is no multiple of 32, add it to keep"),
])
def test_what_no_type_holds_is_refused_with_the_nearest_choice(name: str, columns: int, reason: str) -> None:
    fmt = IntFormat.parse(name)
    assert fmt is not None
    target = Target("a.b", "a.b", "linear", "weight", None, (4, columns))
    assert reason in str(Gguf().obstacle(target, Layout.of(fmt, columns)))


def test_several_formats_in_one_tensor_are_refused() -> None:
    layout = Layout(((IntFormat(4, 32, True), 64), (IntFormat(8, 32, True), 64)))
    target = Target("a.b", "a.b", "linear", "weight", None, (4, 128))
    assert "takes one format for a tensor" in str(Gguf().obstacle(target, layout))


@pytest.mark.parametrize("columns", [48, 96, 256, 576, 768])
def test_the_engine_of_the_planner_reads_what_the_export_takes(columns: int) -> None:
    target = Target("a.b", "a.b", "linear", "weight", None, (4, columns))
    verdicts = set()
    for bits in range(1, 9):
        for group in (None, 16, 32, 64, 96, 128, 256, 768):
            for symmetric in (False, True):
                layout = Layout.of(IntFormat(bits, group, symmetric), columns)
                if group is None or columns % group == 0:
                    taken = Gguf().obstacle(target, layout) is None
                    assert ENGINES["llama.cpp"].reads(layout) == taken, layout
                    verdicts.add(taken)
    assert verdicts == ({False} if columns == 48 else {False, True})


# -- whole models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """``made(family, model overrides, recipe overrides) -> folder``: a checkpoint rounded to nearest, made once."""
    done: dict[str, Path] = {}

    def make(family: str, model: dict | None = None, **recipe: object) -> Path:
        key = f"{family}{model}{recipe}"
        if key not in done:
            folder = tmp_path_factory.mktemp(family)
            save_tiny_model(folder / "dense", family, **(model or {}))
            settings = {"format.group_size": 32, "format.symmetric": True} | {
                k.replace("__", "."): v for k, v in recipe.items()}
            fewbits.quantize(folder / "dense", folder / "ours", recipe="rtn", overrides=settings)
            done[key] = folder / "ours"
        return done[key]

    return make


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 27).view(2, 12)).logits


def _same_as_transformers(ours: Path, out: Path, **options: object) -> None:
    export(ours, out, to="gguf", **options)
    read = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32)
    dense = fewbits.load(ours, device="cpu", dtype=torch.float32, dequantize=True)
    assert float((_logits(read) - _logits(dense)).abs().max()) < 1e-5
    assert float(_logits(dense).std()) > 0.1


def _rule(match: str, name: str) -> dict[str, str]:
    return {"match": match, "format": name}


_MODELS = {
    "int4": ("llama", {}, {"format__bits": 4}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {"format__bits": 4}),
    "int5, head too": ("qwen3", {"head_dim": 128}, {"format__bits": 5, "lm_head": True}),
    "int8 rows": ("mistral", {"sliding_window": None}, {"format__bits": 8, "format__group_size": "row"}),
    "tied table": ("llama-tied", {}, {"rules": [_rule("model.embed_tokens", "int8_sym_g32")]}),
    "tied head of its own": ("llama-tied", {}, {"rules": [_rule("lm_head", "int8_sym_g64")]}),
    "int2": ("llama", {"hidden_size": 256, "intermediate_size": 512},
             {"format__bits": 2, "format__group_size": 256, "rules": [_rule("*.v_proj", "int8_sym_g32")]}),
    "mixed": ("qwen3", {"head_dim": 128}, {"rules": [_rule("*.o_proj", "keep"), _rule("*.up_proj", "int8_sym_g64")]}),
}


@pytest.mark.parametrize("case", _MODELS)
def test_transformers_computes_the_same_from_the_file(case: str, made, tmp_path: Path) -> None:
    family, model, recipe = _MODELS[case]
    _same_as_transformers(made(family, model, **recipe), tmp_path / "m.gguf")


def test_transformers_computes_the_same_of_qwen2(tmp_path: Path) -> None:
    import transformers as tf

    config = tf.Qwen2Config(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    torch.manual_seed(0)
    dense = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in dense.parameters():  # biases are drawn too
            p.normal_(0, 0.15)
    dense.save_pretrained(tmp_path / "dense")
    _byte_level(tmp_path / "dense", pre_tokenizers.ByteLevel(add_prefix_space=False))
    fewbits.quantize(tmp_path / "dense", tmp_path / "ours", recipe="rtn",
                     overrides={"format.group_size": 32, "format.symmetric": True})
    _same_as_transformers(tmp_path / "ours", tmp_path / "m.gguf")


def test_transformers_computes_the_same_from_ternary_codes(made, tmp_path: Path) -> None:
    family, model, recipe = _MODELS["int2"]
    ours = shutil.copytree(made(family, model, **recipe), tmp_path / "ours")
    with pytest.raises(FormatError, match=r"model\.layers\.0\..*TQ1_0 holds"):
        export(ours, tmp_path / "m.gguf", to="gguf", allow=["ternary"])
    make_ternary(ours)
    _same_as_transformers(ours, tmp_path / "m.gguf", allow=["ternary"])
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {"TQ1_0", "Q8_0"} <= kinds and "TQ2_0" not in kinds


def test_every_tensor_of_the_file_is_ours_with_the_rows_of_q_and_k_in_pairs(made, tmp_path: Path) -> None:
    ours = made("llama", format__bits=4)
    export(ours, tmp_path / "m.gguf", to="gguf")
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in
             gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    stored = open_stored(ours)
    assert len(found) == len(stored.matrices) + len(stored.dense_names)
    plain = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for layer in range(2):
        for theirs, name in plain.items():
            want = stored.read(f"model.layers.{layer}.{theirs}").dequantize().numpy()
            assert np.array_equal(found[f"blk.{layer}.{name}.weight"], want)
        q = stored.read(f"model.layers.{layer}.self_attn.q_proj").dequantize().numpy()
        head = found[f"blk.{layer}.attn_q.weight"][:16]  # 4 heads of 16: rows i and i + 8 stand side by side
        assert np.array_equal(head[0::2], q[:8]) and np.array_equal(head[1::2], q[8:16])
    assert np.array_equal(found["token_embd.weight"], stored.dense("model.embed_tokens.weight").numpy())


def _fields(path: Path) -> dict[str, object]:
    return {name: f.contents() for name, f in gguf.GGUFReader(path).fields.items()}


def test_metadata(made, tmp_path: Path) -> None:
    report = export(made("llama", {"head_dim": 32}, format__bits=4), tmp_path / "m.gguf", to="gguf")
    assert report.warnings == [] and report.bytes == (tmp_path / "m.gguf").stat().st_size
    fields = _fields(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "llama", "general.file_type": 2, "llama.block_count": 2, "llama.context_length": 128,
        "llama.embedding_length": 64, "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 32, "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0, "llama.vocab_size": 256, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.pre": "gpt-2",
    }
    assert {k: fields.get(k) for k in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_zero_points_and_windows_are_warned_of(made, tmp_path: Path) -> None:
    report = export(made("mistral", format__symmetric=False), tmp_path / "m.gguf", to="gguf")
    assert len(report.warnings) == 2 and "attend to everything, so beyond 32 tokens" in report.warnings[0]
    assert "14" not in report.warnings[1] and "13 more: GGUF stores -scale * zero_point" in report.warnings[1]


def test_rope(made, tmp_path: Path) -> None:
    linear = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}
    export(made("llama", linear), tmp_path / "linear.gguf", to="gguf")
    fields = _fields(tmp_path / "linear.gguf")
    assert fields["llama.rope.scaling.type"] == "linear" and fields["llama.rope.scaling.factor"] == 4.0
    assert fields["llama.rope.freq_base"] == 5000.0

    llama3 = {"head_dim": 64, "rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}
    export(made("llama", llama3), tmp_path / "llama3.gguf", to="gguf")
    (factors,) = (t.data for t in gguf.GGUFReader(tmp_path / "llama3.gguf").tensors if t.name == "rope_freqs.weight")
    # wavelengths below 64/4 tokens stay, those above 64/1 are eight times as long, and between the two it rises
    waves = 2 * np.pi * 10000.0 ** (np.arange(0, 64, 2) / 64)
    assert factors.shape == (32,) and bool((np.diff(factors) >= -1e-4).all())
    assert np.allclose(factors[waves < 16], 1, rtol=1e-5) and np.allclose(factors[waves > 64], 8, rtol=1e-5)
    middle = factors[(waves > 16) & (waves < 64)]
    assert len(middle) and bool(((middle > 1) & (middle < 8)).all())

    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    with pytest.raises(ModelError, match=r"rope_parameters: got 'dynamic'.*gguf takes default, linear, llama3"):
        export(made("llama", dynamic), tmp_path / "no.gguf", to="gguf")
    with pytest.raises(ModelError, match=r"rope_parameters: got 'llama3', llama\.cpp's qwen3 has none"):
        export(made("qwen3", llama3), tmp_path / "no.gguf", to="gguf")


# -- tokenizers -----------------------------------------------------------------------------------------------------

_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_level(folder: Path, before: pre_tokenizers.PreTokenizer, **special: object) -> Path:
    """A byte-level tokenizer with three merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*letters[:240], "th", "the", "Ġthe"])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e"), ("Ġ", "the")]))
    tok.pre_tokenizer, tok.decoder = before, decoders.ByteLevel()
    options = {"eos_token": "<|end|>", "pad_token": "<|end|>"} | special
    PreTrainedTokenizerFast(tokenizer_object=tok, **options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("before", "ignore_merges", "name"), [
    (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
    (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                              pre_tokenizers.ByteLevel(add_prefix_space=False)]), False, "smollm"),
    (_split(_LLAMA3), True, "llama-bpe"),
    (_split(_LLAMA3), False, "smaug-bpe"),
    (_split(_LLAMA3.replace("{1,3}", "")), False, "qwen2"),
])
def test_the_rules_that_split_text_are_known_by_what_they_do(before, ignore_merges: bool, name: str) -> None:
    tok = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], ignore_merges=ignore_merges))
    tok.pre_tokenizer, tok.normalizer = before, normalizers.NFC()
    spec = json.loads(tok.to_str())
    assert splitter(spec) == name
    tok.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match=r"tokenizer: splits text by .* after .*Lowercase"):
        splitter(json.loads(tok.to_str()))


@pytest.mark.parametrize("before", [
    None, pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False),
                             pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    _split(_LLAMA3.replace("{1,3}", "{1,2}")), pre_tokenizers.Whitespace(),
])
def test_rules_that_llama_cpp_has_no_name_for_are_refused(before) -> None:
    tok = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    if before is not None:
        tok.pre_tokenizer = before
    with pytest.raises(ModelError, match=r"no name that is known here .gpt-2, smollm, qwen2"):
        splitter(json.loads(tok.to_str()))


_TEXT = "the other thee theatre 42"


def test_the_tokenizer_of_the_file_is_ours(made, tmp_path: Path) -> None:
    ours = shutil.copytree(made("llama", format__bits=4), tmp_path / "ours")
    _byte_level(ours, pre_tokenizers.ByteLevel(add_prefix_space=False), chat_template="{{ messages }}",
                bos_token="<|begin|>")
    export(ours, tmp_path / "m.gguf", to="gguf")
    want = AutoTokenizer.from_pretrained(ours)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert read.encode(_TEXT) == want.encode(_TEXT) and len(want.encode(_TEXT)) < len(_TEXT)
    fields = _fields(tmp_path / "m.gguf")
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["tokenizer.ggml.bos_token_id"] == want.bos_token_id
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]))
    assert (kinds["<|end|>"], kinds["<|begin|>"], kinds["the"], kinds["[PAD255]"]) == (3, 3, 1, 5)
    assert len(kinds) == 256


def _greedy(text: str, scores: dict[str, float]) -> list[str]:
    """What llama.cpp does with scores: the pair whose token has the highest one is merged, the leftmost of equals."""
    parts = list(text)
    while pairs := [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]:
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_a_sentencepiece_tokenizer(made, tmp_path: Path) -> None:
    letters = ["▁", *"abehort"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("o", "t"), ("ot", "he"), ("othe", "r"), ("▁", "othe")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(200)), *letters, *map("".join, merges)]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, unk_token="<unk>",
                               byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ours = shutil.copytree(made("llama", format__bits=4), tmp_path / "ours")
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(ours)
    export(ours, tmp_path / "m.gguf", to="gguf")
    fields = _fields(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    made_by_merges = {"".join(m) for m in merges}
    scores = {t: s for t, s in zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"])
              if t in made_by_merges}
    for text in ("the other", "bother other thee", "rot he the"):
        assert _greedy("▁" + text.replace(" ", "▁"), scores) == tok.encode(text, add_special_tokens=False).tokens


def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(made, tmp_path: Path) -> None:
    ours = shutil.copytree(made("llama", format__bits=4), tmp_path / "ours")
    spec = json.loads((ours / "tokenizer.json").read_text())
    spec["model"]["vocab"]["far"] = 300
    (ours / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ModelError, match="tokenizer: token 'far' has the number 300, the embedding has 256 rows"):
        export(ours, tmp_path / "m.gguf", to="gguf")
    (ours / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json that can be read"):
        export(ours, tmp_path / "m.gguf", to="gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma", "phi", "opt"])
def test_other_families_are_refused(family: str, made, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"model_type: got '{family}', gguf takes llama, mistral, qwen2, qwen3"):
        export(made(family, format__bits=4), tmp_path / "m.gguf", to="gguf")


def test_a_bias_that_llama_cpp_lacks_is_refused(made, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.o_proj\.bias: llama\.cpp's qwen3 has no such"):
        export(made("qwen3", {"attention_bias": True}), tmp_path / "m.gguf", to="gguf")


def test_a_refusal_names_the_tensor_and_leaves_nothing(made, tmp_path: Path) -> None:
    ours = made("llama", rules=[_rule("*.1.mlp.down_proj", "int3_sym_g32")])
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.down_proj: gguf has no type for int3_sym_g32; "
                                          "quantize it as int4_sym_g32"):
        export(ours, tmp_path / "m.gguf", to="gguf")
    late = made("llama", rules=[_rule("*.1.mlp.down_proj", "int4_sym_g32_f32")])  # met when most is written
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.down_proj: GGUF has float16 scales"):
        export(late, tmp_path / "m.gguf", to="gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_package_gguf(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = made("llama", format__bits=4)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RecipeError, match=r"needs the package gguf.*pip install 'fewbits\[gguf\]'"):
        export(ours, tmp_path / "m.gguf", to="gguf")
    assert not list(tmp_path.iterdir())


def test_the_command(made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, out = str(made("llama", format__bits=4)), tmp_path / "m.gguf"
    assert main(["export", ours, "--to", "gguf", "-o", str(out), "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["target"], report["tensors"], report["bytes"]) == ("gguf", 14, out.stat().st_size)
    before = out.read_bytes()
    assert main(["export", ours, "--to", "gguf", "-o", str(out)]) == 2
    assert "exists; choose another output, or --force" in capsys.readouterr().err.replace("\n", " ")
    assert main(["export", ours, "--to", "gguf", "-o", str(out), "--force"]) == 0
    assert out.read_bytes() == before  # the same checkpoint gives the same file
    with pytest.raises(CheckpointError, match="is no export that could be replaced"):
        export(ours, tmp_path, to="gguf", force=True)


def test_a_plan_for_llama_cpp_can_be_exported(made, tmp_path: Path) -> None:
    dense = made("llama", format__bits=4).parent / "dense"
    out = tmp_path / "ours"
    assert main(["quantize", str(dense), "-o", str(out), "--recipe", "rtn", "--bits", "4", "--group-size", "32",
                 "--target", "llama.cpp"]) == 0  # asymmetric: Q4_1
    export(out, tmp_path / "m.gguf", to="gguf")
    assert main(["quantize", str(dense), "-o", str(tmp_path / "no"), "--recipe", "rtn", "--bits", "3",
                 "--target", "llama.cpp"]) == 2

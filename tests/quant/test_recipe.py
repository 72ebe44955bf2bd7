"""Recipes: every mistake is an error that names the way out, and everything that counts is in the fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.quant.errors import FormatError, RecipeError
from fewbits.quant.formats import layout_name
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.formats.trellis import TrellisFormat
from fewbits.quant.quantizers import QUANTIZERS
from fewbits.quant.quantizers.gptq import GPTQ
from fewbits.quant.quantizers.rtn import RTN
from fewbits.quant.recipe import (
    Recipe,
    Weights,
    load_recipe,
    parse_recipe,
    parse_settings,
    recipe_names,
    recipe_text,
)
from fewbits.quant.types import Layout

CHANGES: dict[str, Any] = {
    "quantizer.damp": 0.02, "quantizer.act_order": False, "quantizer.clip": "minmax", "quantizer.qep": 0.5,
    "quantizer.qep_damp": 0.5, "quantizer.refits": 0, "quantizer.rescale": True, "quantizer.coarse_first": True,
    "quantizer.scales": "inputs",
    "format.layout": "nf4_g32", "format.bits": 3, "format.group_size": 32,
    "format.symmetric": True,
    "format.scale_dtype": "bfloat16", "format.family": "trellis", "format.state_bits": 14,
    "format.rotated": True, "format.vector": 8, "format.rank": 2, "format.outliers": 1.0,
    "format.low_rank": 4, "format.row_weights": "fisher",
    "calibration.sources": ["default", "other.txt"], "calibration.samples": 64,
    "calibration.images": "pictures", "calibration.image_fraction": 0.25,
    "calibration.seqlen": 256, "calibration.order": "first", "calibration.inputs": "original",
    "calibration.true_sequential": True, "calibration.skip_tokens": 1, "calibration.dtype": "bfloat16",
    "keep": ["*.down_proj"], "rules": [{"match": "*.q_proj", "format": "int8_row"}], "lm_head": True,
    "embeddings": True, "plan": {"model.layers.0.mlp.up_proj": "int4_g64"},
    "budget.bpw": 3.0, "budget.bpw_total": 5.0, "budget.size": 1000, "budget.fits_in": 1000, "budget.ctx": 8,
    "budget.batch": 2, "allocate.damage": "kl", "allocate.formats": ["int4"], "allocate.unit": "block",
    "allocate.target": "vllm", "allocate.refine": "evopress", "allocate.generations": 3, "allocate.offspring": 3,
    "allocate.trust": 3, "allocate.column_group": 32, "allocate.rivals": ["fisher"],
}
OTHER_BUDGETS = ("budget.bpw_total", "budget.size", "budget.fits_in")
"""A recipe can have one budget."""
ALONE = (*OTHER_BUDGETS, "format.layout")
"""What stands in place of other keys."""


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "message"), [
    ({"quantiser": {"name": "rtn"}}, "quantiser: unknown recipe key; did you mean 'quantizer'"),
    ({"format": {"bit": 3}}, "format.bit: unknown recipe key; did you mean 'bits'"),
    ({"calibration": {"sample": 3}}, "calibration.sample: unknown recipe key; did you mean 'samples'"),
    ({"quantizer": {"name": "gptq", "dampen": 3}}, "quantizer.dampen: gptq has no such option; did you mean 'damp'"),
    ({"quantizer": {"name": "rtn", "damp": 3}}, "quantizer.damp: rtn has no such option"),
    ({"quantizer": {"name": "gptqq"}}, "quantizer.name: got 'gptqq', did you mean 'gptq'"),
    ({"quantizer": {}}, "quantizer.name: got None, known: bitnet, gptq, rtn"),
    ({"rules": [{"match": "*", "fromat": "keep"}]}, "rules.0.fromat: unknown recipe key; did you mean 'format'"),
    ({"zzz": 1}, "zzz: unknown recipe key; known: allocate, .*rules"),
])
def test_unknown_keys_suggest_the_nearest(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(data)


@pytest.mark.parametrize(("data", "where"), [
    ({"format": {"bits": "4"}}, "format.bits: got '4'"),
    ({"format": {"bits": 4.0}}, "format.bits: got 4.0"),
    ({"format": {"bits": True}}, "format.bits: got True"),
    ({"format": {"bits": 0}}, "format.bits: got 0"),
    ({"format": {"bits": 9}}, "format.bits: got 9"),
    ({"format": {"group_size": "all"}}, r"format.group_size.*: got 'all'"),
    ({"format": {"group_size": 0}}, r"format.group_size.*: got 0"),
    ({"format": {"group_size": -1}}, r"format.group_size.*: got -1"),
    ({"format": {"symmetric": 1}}, "format.symmetric: got 1"),
    ({"format": {"scale_dtype": "fp16"}}, "format.scale_dtype: got 'fp16'"),
    ({"format": 4}, "format: got 4"),
    ({"calibration": {"samples": 0}}, "calibration.samples: got 0"),
    ({"calibration": {"image_fraction": 1.0}}, "calibration.image_fraction: got 1.0"),
    ({"calibration": {"samples": "many"}}, "calibration.samples: got 'many'"),
    ({"calibration": {"skip_tokens": -1}}, "calibration.skip_tokens: got -1"),
    ({"calibration": {"order": "last"}}, "calibration.order: got 'last'"),
    ({"calibration": {"sources": "default"}}, "calibration.sources: got 'default'"),
    ({"quantizer": {"name": "gptq", "damp": "much"}}, "quantizer.damp: got 'much'"),
    ({"quantizer": {"name": "gptq", "damp": "0.1"}}, "quantizer.damp: got '0.1'"),
    ({"quantizer": {"name": "gptq", "act_order": 1}}, "quantizer.act_order: got 1"),
    ({"quantizer": {"name": "gptq", "clip": "mse"}}, "quantizer.clip: got 'mse'"),
    ({"quantizer": {"name": "gptq", "block_size": 12.5}}, "quantizer.block_size: got 12.5"),
    ({"quantizer": {"name": "gptq", "block_size": 0}}, "quantizer.block_size: got 0"),
    ({"quantizer": {"name": "gptq", "damp": -0.1}}, "quantizer.damp: got -0.1"),
    ({"quantizer": {"name": "gptq", "qep": 2}}, "quantizer.qep: got 2"),
    ({"quantizer": "gptq"}, "quantizer: got 'gptq'"),
    ({"keep": "*.gate"}, "keep: got '\\*.gate'"),
    ({"rules": [{"match": "*"}]}, "rules.0.format"),
    ({"rules": {"match": "*", "format": "keep"}}, "rules"),
    ({"lm_head": "yes"}, "lm_head: got 'yes'"),
])
def test_wrong_values_name_the_key_and_what_was_given(data: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError, match=where):
        parse_recipe(data)


def test_integers_do_for_floats() -> None:
    assert parse_recipe({"quantizer": {"name": "gptq", "damp": 1}}).make_quantizer() == GPTQ(damp=1.0)


def test_rule_with_an_unknown_format() -> None:
    with pytest.raises(FormatError, match="did you mean 'int4_g64'"):
        parse_recipe({"rules": [{"match": "*", "format": "int4-g64"}]})


# -- loading -----------------------------------------------------------------------------------------------------------


def test_shipped_recipes_load() -> None:
    assert {"gptq", "rtn"} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.description
        assert isinstance(recipe.make_quantizer(), tuple(QUANTIZERS.values()))
        assert recipe_text(name).startswith("#")  # says what it reproduces


def test_unknown_recipes_and_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="got 'gptk', did you mean 'gptq'"):
        load_recipe("gptk")
    with pytest.raises(RecipeError, match=r"no file .*missing\.toml"):
        load_recipe(str(tmp_path / "missing.toml"))
    for text in (b"name = ", b"\xff\xfe", b"[format]\nbits = 3\nbits = 4\n"):
        (tmp_path / "bad.toml").write_bytes(text)
        with pytest.raises(RecipeError, match=r"bad\.toml: not TOML"):
            load_recipe(str(tmp_path / "bad.toml"))


def test_a_file_is_named_after_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[quantizer]\nname = "rtn"\n[format]\nbits = 3\n')
    recipe = load_recipe(str(tmp_path / "mine.toml"), {"format.group_size": "row"})
    assert recipe.name == "mine" and recipe.make_quantizer() == RTN()
    assert recipe.format == Weights(bits=3, group_size="row")
    (tmp_path / "mine.toml").write_text('name = "yours"\n')
    assert load_recipe(str(tmp_path / "mine.toml")).name == "yours"


def test_overrides() -> None:
    recipe = load_recipe("gptq", {"quantizer.damp": 0.05, "format.bits": 2, "keep": []})
    assert recipe.make_quantizer() == GPTQ(damp=0.05) and recipe.format.bits == 2 and recipe.keep == []
    assert load_recipe("gptq").format.bits == 4  # the shipped one is as it was
    with pytest.raises(RecipeError, match=r"format\.bitz: unknown"):
        load_recipe("gptq", {"format.bitz": 2})
    with pytest.raises(RecipeError, match=r"name\.x: name is a value, not a table"):
        load_recipe("gptq", {"name.x": 2})
    with pytest.raises(RecipeError, match=r"quantizer\.clip\.x: clip is a value"):
        load_recipe("gptq", {"quantizer.clip.x": 2})


def test_settings() -> None:
    assert parse_settings([
        "quantizer.damp=0.05", "format.bits=3", " format.group_size = row ", "lm_head=true", 'keep=["*.a", "*.b"]',
        "calibration.order=first", 'name="x=y"', "calibration.sources=[]", "description=a = b", "calibration.dtype=",
    ]) == {
        "quantizer.damp": 0.05, "format.bits": 3, "format.group_size": "row", "lm_head": True, "keep": ["*.a", "*.b"],
        "calibration.order": "first", "name": "x=y", "calibration.sources": [], "description": "a = b",
        "calibration.dtype": "",
    }
    for bad in ("format.bits", "=3", " = 3", ""):
        with pytest.raises(RecipeError, match=r"--set: got .*needed key=value"):
            parse_settings([bad])
    assert load_recipe("gptq", parse_settings(["format.bits=2"])).format.bits == 2


# -- identity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [
    {}, {k: v for k, v in CHANGES.items() if k not in ALONE},
], ids=["defaults", "everything changed"])
def test_toml_round_trip(overrides: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe("gptq", overrides)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    again = load_recipe(str(tmp_path / "recipe.toml"))
    assert again == recipe and again.fingerprint == recipe.fingerprint
    assert again.make_quantizer() == recipe.make_quantizer()
    assert again.to_toml() == recipe.to_toml()


def test_toml_says_everything() -> None:
    """Options of the quantizer included, so that other defaults in a later version change nothing."""
    text = parse_recipe({}).to_toml()
    for key in CHANGES:
        if key not in (*OTHER_BUDGETS, "budget.bpw"):  # TOML has no null: a budget that is not set is not there
            assert f"{key.rpartition('.')[2]} = " in text or f"[{key}]" in text, key


def test_fingerprint_ignores_the_name_and_nothing_else() -> None:
    base = load_recipe("gptq")
    assert load_recipe("gptq", {"name": "other", "description": "other"}).fingerprint == base.fingerprint
    dump, prints = base.model_dump(), {base.fingerprint}
    for key, value in CHANGES.items():
        table, _, leaf = key.rpartition(".")
        now = (dump[table] if table else dump)[leaf]
        prints.add(load_recipe("gptq", {key: not now if isinstance(now, bool) else value}).fingerprint)
    assert len(prints) == 1 + len(CHANGES)
    tables = {"quantizer": GPTQ.__dataclass_fields__, "format": Weights.model_fields,
              "calibration": type(base.calibration).model_fields, "budget": type(base.budget).model_fields,
              "allocate": type(base.allocate).model_fields}
    known = {f"{table}.{key}" for table, keys in tables.items() for key in keys} | set(Recipe.model_fields)
    # a new key must be added to CHANGES; block_size is a matter of speed
    assert known - set(CHANGES) == {
        "name", "description", "quantizer", "format", "calibration", "budget", "allocate", "quantizer.block_size",
        "refine",  # see test_refiners
    }


def test_fingerprint_is_stable() -> None:
    """Spelling out a default, and the order of keys, change nothing."""
    assert parse_recipe({"quantizer": {"name": "gptq", "damp": 0.01}}).fingerprint == parse_recipe({}).fingerprint
    data = {"format": {"bits": 3, "symmetric": True}, "lm_head": True}
    turned = {"lm_head": True, "format": {"symmetric": True, "bits": 3}}
    assert parse_recipe(data).fingerprint == parse_recipe(turned).fingerprint


# -- formats of tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "group"), [
    (576, 64), (1536, 128), (4096, 128), (128, 128), (64, 64), (96, 32), (97, 1), (1, 1), (8192 * 3, 128),
])
def test_auto_group_is_the_largest_power_of_two_that_divides(columns: int, group: int) -> None:
    ((fmt, _),) = Weights().for_columns(columns).runs
    assert fmt.group_size == group and fmt.groups(columns) * group == columns


def test_formats_for_columns() -> None:
    assert Weights(bits=3, group_size="row").for_columns(97) == Layout.of(IntFormat(3, None), 97)
    layout = Weights(bits=8, group_size=32, symmetric=True, scale_dtype="bfloat16").for_columns(64)
    assert layout == Layout.of(IntFormat(8, 32, True, torch.bfloat16), 64)
    assert Weights(family="trellis", bits=3).for_columns(64) == Layout.of(TrellisFormat(3), 64)
    halves = Weights(family="trellis", bits=2.5, state_bits=14).for_columns(72)
    assert halves == Layout(((TrellisFormat(2, 14), 40), (TrellisFormat(3, 14), 32)))
    with pytest.raises(ValueError, match="trellis codes have 1 to 4"):
        Weights(family="trellis", bits=5)
    with pytest.raises(ValueError, match="integers have 1 to 8 whole ones"):
        Weights(bits=2.5)
    with pytest.raises(FormatError, match="K = 96 is not a multiple of group_size 64"):
        Weights(group_size=64).for_columns(96)


def format_for(recipe: Recipe, name: str, *, kind: str = "linear", is_head: bool = False) -> str | None:
    layout = recipe.layout_for(name, 64, kind=kind, is_head=is_head)
    return None if layout is None else layout_name(layout)


def test_rules_and_keep() -> None:
    recipe = parse_recipe({
        "keep": ["*.down_proj", "model.layers.0.*"],
        "rules": [
            {"match": "*.1.*.q_proj", "format": "keep"},
            {"match": "*.q_proj", "format": "int8_g32"},
            {"match": "*_proj", "format": "int3_row"},
            {"match": "*.[kv]", "format": "int2_row"},
        ],
    })
    assert format_for(recipe, "model.layers.1.self_attn.q_proj") is None  # the first rule that matches
    assert format_for(recipe, "model.layers.2.self_attn.q_proj") == "int8_g32"
    assert format_for(recipe, "model.layers.2.self_attn.k_proj") == "int3_row"
    assert format_for(recipe, "model.layers.2.mlp.down_proj") == "int3_row"  # a rule goes before keep
    assert format_for(recipe, "model.layers.0.fc1") is None
    assert format_for(recipe, "model.layers.2.fc1") == "int4_g64"
    assert format_for(recipe, "a.k") == "int2_row" and format_for(recipe, "a.q") == "int4_g64"
    assert format_for(recipe, "model.layers.2.FC1") == "int4_g64"
    assert format_for(recipe, "model.layers.2.self_attn.Q_PROJ") == "int4_g64"  # case counts


def test_head_and_embeddings_are_asked_for() -> None:
    plain = parse_recipe({})
    assert format_for(plain, "lm_head", is_head=True) is None
    assert format_for(plain, "model.embed_tokens", kind="embedding") is None
    both = parse_recipe({"lm_head": True, "embeddings": True})
    assert format_for(both, "lm_head", is_head=True) == "int4_g64"
    assert format_for(both, "model.embed_tokens", kind="embedding") == "int4_g64"
    ruled = parse_recipe({"rules": [{"match": "lm_head", "format": "int8_row"}]})
    assert format_for(ruled, "lm_head", is_head=True) == "int8_row"


def test_routers_stay_dense() -> None:
    recipe = parse_recipe({})
    for name in ("model.layers.0.mlp.gate", "model.layers.0.mlp.router", "model.layers.0.mlp.shared_expert_gate"):
        assert format_for(recipe, name) is None
    assert format_for(recipe, "model.layers.0.mlp.gate_proj") == "int4_g64"


def test_format_that_does_not_fit_names_the_tensor_and_ways_out() -> None:
    message = r"a\.b: K = 96 is not a multiple of group_size 64; choose .*32.* or add it to keep"
    with pytest.raises(FormatError, match=message):
        parse_recipe({"format": {"group_size": 64}}).layout_for("a.b", 96, kind="linear", is_head=False)
    with pytest.raises(FormatError, match=message):
        parse_recipe({"rules": [{"match": "a.*", "format": "int4_g64"}]}).layout_for(
            "a.b", 96, kind="linear", is_head=False
        )

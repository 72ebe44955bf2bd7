"""Parts of packed weights, and the weights of an engine's layer as they arrive; without an engine."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from fewbits.quant.errors import CheckpointError, FormatError
from fewbits.quant.formats import parse_layout
from fewbits.quant.types import QuantizedTensor
from fewbits.serving.tensor_parallel import column_splits, stack_rows, take_columns, take_rows
from fewbits.serving.vllm_loading import Loading, Share
from tests.serving.conftest import round_to_nearest, same_bytes

# 44 rows: zero points of 44 * bits bits end within a word, as those of half of the rows do
ROWS, COLUMNS = 44, 192
LAYOUTS = [f"int{b}_{g}" for b in range(1, 9) for g in ("g24", "sym_row")] + ["int3_g32", "int5_row", "int4_sym_g64"]
LAYOUTS += ["ternary_g24", "ternary_mean_g12_b3", "ternary_row_b3", "binary_g16", "binary3_mean_g32", "fdb_row",
            "seq_g32", "nf4_g24", "fpq4_g12", "bitmod3_g24", "bitmod4_row", "nupes4_g12", "mxfp4", "nvfp4"]
RUNS = ["int4_g32[64]+int3_g16[128]", "int8_row[96]+int2_sym_g32[96]",
        "ternary_g32_b3[64]+nvfp4[64]+bitmod3_g16[64]"]
SORTED = "perm:int6_g32[64]+int3_g32[128]"


def packed(name: str, rows: int = ROWS, seed: int = 0) -> QuantizedTensor:
    weight = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return round_to_nearest(weight, parse_layout(name, COLUMNS))


def dense(tensors: dict[str, Tensor], layout) -> Tensor:
    return QuantizedTensor.unpack(tensors, layout).dequantize()  # which checks every shape and dtype


@pytest.mark.parametrize("name", [*LAYOUTS, *RUNS, SORTED])
def test_rows_are_those_of_the_weight(name):
    whole = packed(name)
    rows = torch.tensor([3, 4, 5, 40, 41, 9, 43])
    assert torch.equal(dense(take_rows(whole.pack(), whole.layout, rows), whole.layout), whole.dequantize()[rows])


@pytest.mark.parametrize("name", [*LAYOUTS, *RUNS])
def test_rows_taken_and_stacked_again_are_the_same_bytes(name):
    whole = packed(name)
    parts = [take_rows(whole.pack(), whole.layout, torch.arange(a, b)) for a, b in ((0, 11), (11, 30), (30, ROWS))]
    assert same_bytes(stack_rows(parts, whole.layout), whole.pack())


@pytest.mark.parametrize("name", [*LAYOUTS, *RUNS])
def test_columns_are_those_of_the_weight(name):
    whole = packed(name)
    sizes = column_splits(whole.layout, 8)
    assert len(sizes) > 1
    for parts in sizes[1:]:
        width = COLUMNS // parts
        for start in range(0, COLUMNS, width):
            found = dense(*take_columns(whole.pack(), whole.layout, start, start + width))
            assert torch.equal(found, whole.dequantize()[:, start : start + width])


@pytest.mark.parametrize("name,sizes", [
    ("int4_g32", [1, 2, 3, 6]), ("int4_g64", [1, 3]), ("int3_g192", [1]), (SORTED, [1]),
    ("nvfp4", [1, 2, 3, 4, 6, 12]), ("bitmod3_g24", [1, 2, 4, 8]),
    ("int4_row", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]), (RUNS[0], [1, 2, 3, 6]),
])
def test_column_splits_cut_no_group(name, sizes):
    assert column_splits(parse_layout(name, COLUMNS)) == sizes


def test_matrices_with_scales_of_their_own_stay_apart():
    layout = parse_layout("nvfp4", COLUMNS)
    q, k = packed("nvfp4"), packed("nvfp4", seed=1)
    with pytest.raises(FormatError, match=r"weight_global_scale: got .*, needed one number for matrices"):
        stack_rows([q.pack(), k.pack()], layout)
    share = Share(2 * ROWS, COLUMNS, from_shard, 1, False, torch.device("cpu"), torch.float32)
    for other, matrices in ((k, 2), (q, 1)):
        layer = Loading("qkv", {"q": layout, "k": layout}, share)
        for shard, part in enumerate((q, other)):
            for local, tensor in part.pack().items():
                layer.loader_of(local)(None, tensor, shard)
        found = layer.finish()
        assert len(found) == matrices
        assert torch.equal(torch.cat([m.dense() for m in found]), torch.cat([q.dequantize(), other.dequantize()]))


def test_columns_within_a_group_are_refused():
    whole = packed("int4_g64")
    with pytest.raises(FormatError, match="columns 0 to 96 of 192 cut a group of 64"):
        take_columns(whole.pack(), whole.layout, 0, 96)
    whole = packed(SORTED)
    with pytest.raises(FormatError, match="sorted"):
        take_columns(whole.pack(), whole.layout, 0, 96)


# -- weights as they arrive ----------------------------------------------------------------------------------------


def from_row(start: int):
    """A loader like those of vLLM: one weight, of which the device has rows from ``start`` on."""

    def load(param: nn.Parameter, loaded: Tensor) -> None:
        dim = getattr(param, "output_dim", None)
        if dim is not None:
            loaded = loaded.narrow(dim, start, param.shape[dim])
        assert param.shape == loaded.shape
        param.data.copy_(loaded)

    return load


def from_shard(param: nn.Parameter, loaded: Tensor, shard: int) -> None:
    """Weights of ``ROWS`` rows, one below the other."""
    param.data.narrow(param.output_dim, shard * ROWS, ROWS).copy_(loaded)


def loading(name: str = "int4_g32", *, rows: int = ROWS, start: int = 0, tp_size: int = 1) -> Loading:
    share = Share(rows, COLUMNS, from_row(start), tp_size, False, torch.device("cpu"), torch.float32)
    return Loading("layer", {"layer": parse_layout(name, COLUMNS)}, share)


def give(into: Loading, tensors: dict[str, Tensor]) -> Loading:
    for local, tensor in tensors.items():
        into.loader_of(local)(None, tensor)
    return into


@pytest.mark.parametrize("name", ["int3_g24", "int8_sym_row", "ternary_row_b3", "nvfp4", RUNS[1], SORTED])
def test_a_device_multiplies_by_its_rows(name):
    whole = packed(name)
    (matrix,) = give(loading(name, rows=11, start=22, tp_size=4), whole.pack()).finish()
    x = torch.randn(3, COLUMNS)
    torch.testing.assert_close(matrix.project(x), x @ whole.dequantize()[22:33].T, rtol=0, atol=1e-4)
    assert matrix.packed_tensors()["weight_scale"].dtype == whole.layout.dtypes["weight_scale"]


def test_what_is_not_whole_is_refused():
    tensors = packed("int4_g32").pack()
    with pytest.raises(CheckpointError, match=r"layer\.weight_zero_point: missing"):
        give(loading(), {k: v for k, v in tensors.items() if k != "weight_zero_point"}).finish()
    with pytest.raises(CheckpointError, match="layer: 0 of 44 rows are stored"):
        loading().finish()
    with pytest.raises(CheckpointError, match=r"layer\.weight_shape: stored twice.*index\.json"):
        give(give(loading(), tensors), {"weight_shape": tensors["weight_shape"]})


@pytest.mark.parametrize("local,wrong,message", [
    ("weight_scale", lambda t: t.float(), r"weight_scale: got \(44, 6\) torch.float32, needed \(44, 6\) torch.float16"),
    ("weight_packed", lambda t: t[:, :-1], r"weight_packed: got \(44, 23\)"),
    ("weight_zero_point", lambda t: t[:-1], r"weight_zero_point: got \(5, 6\)"),
    ("weight_shape", lambda t: t + 1, r"weight_shape: got \[45, 193\], needed \(N, 192\)"),
])
def test_a_tensor_of_another_format_is_refused(local, wrong, message):
    tensors = packed("int4_g32").pack()
    with pytest.raises(CheckpointError, match=message):
        give(loading(), tensors | {local: wrong(tensors[local])})


@pytest.mark.parametrize("rows", [40, 48])
def test_another_number_of_rows_is_refused(rows):
    with pytest.raises(CheckpointError, match="layer: has 44 rows, and vLLM needs another number"):
        give(loading(rows=rows), packed("int4_g32").pack())


def test_a_sorted_weight_needs_a_permutation():
    tensors = packed(SORTED).pack()
    with pytest.raises(CheckpointError, match="each of 0 to 191 once"):
        give(loading(SORTED), tensors | {"weight_perm": torch.zeros_like(tensors["weight_perm"])})


def test_the_entry_point_imports_nothing_heavy():
    code = "import sys, fewbits.serving.vllm; assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

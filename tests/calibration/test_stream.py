"""A model run block by block gives what the whole model gives, with one block in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fewbits.calibration.hidden import HiddenStates
from fewbits.calibration.stream import StreamedModel, find_blocks
from fewbits.quant.errors import FewbitsError, ModelError
from fewbits.quant.source import open_source
from fewbits.quant.targets import read_weight
from tests.conftest import FAMILIES, save_tiny_model

torch.set_num_threads(1)

CPU = torch.device("cpu")


def streamed(path: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(open_source(path), dtype=dtype, device=CPU)


def whole(path: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval()
    return model


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 256, shape, generator=generator) for shape in ((3, 20), (1, 20), (1, 7))]


def run_through(model: StreamedModel) -> list[list[Tensor]]:
    """Hidden states before the first block and after each, for every batch."""
    with model.outer():
        hidden, calls = model.first_inputs(batches())
    out = [list(hidden)]
    for block in model.blocks():
        hidden = [block.run(h, calls[i][block.index]) for i, h in enumerate(hidden)]
        out.append(hidden)
    return out


# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_whole_model(family: str, tiny) -> None:
    model = whole(tiny(family))
    blocks = model.get_submodule(find_blocks(model))
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict, out: Tensor | tuple) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        seen.append(out[0] if isinstance(out, tuple) else out)

    for block in blocks:
        block.register_forward_hook(record, with_kwargs=True)
    ours = run_through(streamed(tiny(family)))
    for i, batch in enumerate(batches()):
        seen.clear()
        with torch.no_grad():
            model(batch, use_cache=False)
        expected = [seen[0], *seen[1::2]]
        assert len(ours) == len(expected) == 3
        for got, want in zip(ours, expected):
            torch.testing.assert_close(got[i], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "opt", "gpt2"])
def test_head_input_is_that_of_the_whole_model(family: str, tiny) -> None:
    model, ours = whole(tiny(family)), streamed(tiny(family))
    seen: list[Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    states = run_through(ours)[-1]
    with ours.outer(head=True):
        got = [ours.head_input(h) for h in states]
    for batch, x in zip(batches(), got):
        seen.clear()
        with torch.no_grad():
            model(batch)
        torch.testing.assert_close(x, seen[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2"])
def test_weights_are_those_of_the_checkpoint(family: str, tiny) -> None:
    model, ours = whole(tiny(family)), streamed(tiny(family))
    found = set()
    for block in ours.blocks():
        for target in block.targets:
            assert torch.equal(block.weights[target.name], read_weight(model, target))
            found.add(target.name)
    outside = {n for n in ours.targets if ours.block_index(n) is None}
    assert found | outside == set(ours.targets)
    for name in outside:
        assert torch.equal(ours.weight(ours.targets[name]), read_weight(model, ours.targets[name]))


def test_blocks_can_be_gone_through_twice(tiny) -> None:
    for family in ("llama", "gpt2"):
        model = streamed(tiny(family))
        first, second = run_through(model), run_through(model)
        assert all(torch.equal(a, b) for x, y in zip(first, second) for a, b in zip(x, y))


def test_lower_precision(tmp_path: Path) -> None:
    """Weights come in the dtype of the source; the forward pass runs in the dtype asked for."""
    path = save_tiny_model(tmp_path, "llama", dtype=torch.bfloat16)
    model = streamed(path)
    blocks = model.blocks()
    block = next(blocks)
    assert all(w.dtype == torch.bfloat16 for w in block.weights.values())
    assert all(p.dtype == torch.float32 for p in block.module.parameters())
    low = run_through(streamed(path, torch.bfloat16))
    high = run_through(streamed(path))
    assert low[-1][0].dtype == torch.bfloat16 and high[-1][0].dtype == torch.float32
    assert (low[-1][0].float() - high[-1][0]).norm() < 0.05 * high[-1][0].norm()


# -- memory ------------------------------------------------------------------------------------------------------------


def loaded(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.is_meta}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3-moe", "gpt2"])
def test_only_one_block_is_in_memory(family: str, tiny) -> None:
    model = streamed(tiny(family))
    assert not loaded(model.model)
    with model.outer():
        names = loaded(model.model)
        assert names and not any(model.block_index(n) is not None for n in names)
    assert not loaded(model.model)
    count = 0
    for block in model.blocks():
        names = loaded(model.model)
        assert names and {model.block_index(n) for n in names} == {block.index}
        assert names == {f"{block.name}.{n}" for n, _ in block.module.named_parameters()}
        count += 1
    assert count == 2 and not loaded(model.model)


def test_the_head_is_loaded_only_when_asked_for(tiny) -> None:
    model = streamed(tiny("llama"))
    with model.outer():
        assert "lm_head.weight" not in loaded(model.model)
    with model.outer(head=True):
        assert "lm_head.weight" in loaded(model.model)
    tied = streamed(tiny("llama-tied"))
    with tied.outer():
        assert tied.model.lm_head.weight is tied.model.model.embed_tokens.weight
        assert not tied.model.lm_head.weight.is_meta


# -- what is shared ----------------------------------------------------------------------------------------------------

GROUPS = {
    "llama": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
              ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]],
    "phi": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"], ["self_attn.dense"], ["mlp.fc2"]],
    "opt": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
}


@pytest.mark.parametrize("family", GROUPS)
def test_linears_that_read_one_input_are_grouped(family: str, tiny) -> None:
    model = streamed(tiny(family))
    with model.outer():
        hidden, calls = model.first_inputs(batches())
    for block in model.blocks():
        groups = block.shared_inputs(hidden[0], calls[0][block.index])
        assert sorted(map(sorted, groups)) == sorted(
            sorted(f"{block.name}.{name}" for name in group) for group in GROUPS[family]
        )


def test_experts_are_groups_of_their_own_and_none_is_lost(tiny) -> None:
    model = streamed(tiny("qwen3-moe"))
    with model.outer():
        hidden, calls = model.first_inputs([torch.tensor([[5]])])  # one token: two of four experts see nothing
    blocks = model.blocks()
    block = next(blocks)
    groups = block.shared_inputs(hidden[0], calls[0][0])
    assert sorted(n for g in groups for n in g) == sorted(t.name for t in block.targets)
    assert all(len(g) == 1 for g in groups if ".experts." in g[0])
    assert ".experts." in groups[-1][0]


# -- errors ------------------------------------------------------------------------------------------------------------


def test_models_without_blocks() -> None:
    with pytest.raises(ModelError, match="Sequential: found no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_blocks_are_the_outermost_and_largest_list() -> None:
    inner = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(9, 9) for _ in range(9))}) for _ in range(3)
    )
    model = nn.ModuleDict({"adapters": nn.ModuleList([nn.Linear(2, 2)]), "body": nn.ModuleDict({"layers": inner})})
    assert find_blocks(model) == "body.layers"


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_is_missing(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = save_tiny_model(tmp_path, "llama")
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name}: not in the checkpoint"):
        model = streamed(path)
        with model.outer(head=True):
            list(model.blocks())


def test_an_architecture_that_is_not_known(tmp_path: Path, tiny) -> None:
    import json
    import shutil

    shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
    with pytest.raises(FewbitsError, match="transformers"):
        streamed(tmp_path / "model")


# -- hidden states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_in_memory_and_on_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    given = [torch.randn(shape).to(dtype) for shape in ((2, 3, 5), (1, 3, 5), (1, 2, 5))]
    size = sum(b.numel() * b.element_size() for b in given)
    memory, disk = HiddenStates(given, size, tmp_path), HiddenStates(given, size - 1, tmp_path)
    assert not memory.spilled and disk.spilled and len(memory) == len(disk) == 3
    assert memory.shapes == disk.shapes
    changed = torch.randn(1, 3, 5).to(dtype)
    for states in (memory, disk):
        assert all(torch.equal(states[i], b) for i, b in enumerate(given))
        states[1] = changed
        assert torch.equal(states[1], changed)
        assert torch.equal(states[0], given[0]) and torch.equal(states[2], given[2])
        assert states[0].dtype == dtype
    disk[0].zero_()  # what is read from disk is a copy
    assert torch.equal(disk[0], given[0])
    assert not list(tmp_path.iterdir())  # the file has no name, so that no kill leaves it behind


def test_a_second_pass_gives_the_same_weights(tiny) -> None:
    """The dtype that blocks compute in must not round what the next pass reads."""
    model = StreamedModel(open_source(tiny("llama")), dtype=torch.bfloat16, device=torch.device("cpu"))
    first = {n: w.clone() for block in model.blocks() for n, w in block.weights.items()}
    second = {n: w.clone() for block in model.blocks() for n, w in block.weights.items()}
    assert first and all(w.dtype == torch.float32 for w in first.values())
    for name, weight in first.items():
        assert torch.equal(weight, second[name]) and second[name].dtype == torch.float32

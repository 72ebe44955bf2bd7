"""The packed modules on their own, and what counts as a target."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as tf
from torch import nn

from fewbits.kernels.linear import QuantEmbedding, QuantLinear
from fewbits.quant.errors import FormatError
from fewbits.quant.formats import parse_layout
from fewbits.quant.targets import find_targets, find_unquantizable, read_weight
from tests.conftest import tiny_config
from tests.serving.conftest import round_to_nearest, same_bytes

LAYOUTS = ["int4_g32", "int3_sym_g16", "int8_row_bf16", "int2_g16[48]+int8_g16[16]", "perm:int4_g16",
           "perm:int6_g16[16]+int3_g16[32]+int2_g16[16]"]


def make_linear(name: str, *, rows: int = 33, bias: bool = True) -> tuple[QuantLinear, torch.Tensor]:
    torch.manual_seed(0)
    layout = parse_layout(name, 64)
    quantized = round_to_nearest(torch.randn(rows, 64), layout)
    module = QuantLinear(layout, (rows, 64), bias=bias, dtype=torch.float32)
    module.assign(quantized.pack())
    if bias:
        module.bias = nn.Parameter(torch.randn(rows))
    return module, quantized.dequantize()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_multiplies_by_what_the_codes_mean(layout):
    module, weight = make_linear(layout)
    for x in (torch.randn(64), torch.randn(1, 64), torch.randn(2, 5, 64), torch.randn(0, 64)):
        expected = nn.functional.linear(x, weight, module.bias)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=64 * 2**-20)  # 64 products of size up to 16
    assert torch.equal(module.quantized().dequantize(), weight)
    assert same_bytes(module.quantized().pack(), module.packed_tensors())
    assert isinstance(module, nn.Linear) and not any(p.shape == weight.shape for p in module.parameters())
    held = [t for _, p in module.prepared().runs for t in (p.operands or ()) if t is not None]
    held = [t for t in held if t.data_ptr() not in {p.data_ptr() for p in module.packed_tensors().values()}]
    assert all(t.numel() < weight.numel() / 8 for t in held), "a copy of the weight is kept"


def test_gradient_flows_to_the_input_only():
    module, weight = make_linear("int4_g32")
    x = torch.randn(3, 64, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 64), rtol=0, atol=1e-4)
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["bias"]


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half(),
                                  lambda m: m.half().float(), lambda m: m.double().to("cpu", torch.bfloat16)])
def test_casts_leave_packed_tensors_alone(cast):
    module, _ = make_linear("int4_g32_f32")
    before = copy.deepcopy(module.packed_tensors())
    bias = copy.deepcopy(module.bias)
    cast(module)
    assert same_bytes(module.packed_tensors(), before)
    assert module.compute_dtype == module.bias.dtype == module.weight.dtype
    assert module(torch.randn(2, 64, dtype=module.compute_dtype)).dtype == module.compute_dtype
    assert torch.allclose(module.bias.float(), bias, atol=0.02)


def test_what_kernels_derive_follows_the_tensors():
    module, _ = make_linear("int4_g32", bias=False)
    other, _ = make_linear("int4_g32", bias=False)
    other.assign(round_to_nearest(torch.randn(33, 64), other.layout).pack())
    x = torch.randn(2, 64)
    assert not torch.equal(module(x), other(x))
    module.load_state_dict(other.state_dict())  # copies in place
    assert torch.equal(module(x), other(x))
    module.to("meta")
    module.to_empty(device="cpu").load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    assert set(module.state_dict()) == set(module.packed_tensors())
    clone = pickle.loads(pickle.dumps(module))
    assert "_prepared" in module.__dict__ and "_prepared" not in clone.__dict__
    assert torch.equal(clone(x), module(x))


def test_weight_is_a_view_that_dequantizes_on_use():
    module, weight = make_linear("int4_g32")
    view = module.bfloat16().weight
    assert (view.dtype, view.shape, view.ndim, view.device.type) == (torch.bfloat16, (33, 64), 2, "cpu")
    assert view.requires_grad is False and not isinstance(view, torch.Tensor)
    dense = weight.bfloat16()
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(nn.functional.linear(x, view), nn.functional.linear(x, dense))
    assert torch.equal(view @ x.T, dense @ x.T) and torch.equal(view[3], dense[3])
    assert torch.equal(view.T, dense.T)


def test_assign_refuses_what_does_not_fit():
    module, _ = make_linear("int4_g32")
    tensors = dict(module.packed_tensors())
    for name, bad in {"weight_packed": None, "weight_scale": tensors["weight_scale"].float(),
                      "weight_shape": torch.zeros(3, dtype=torch.int64)}.items():
        with pytest.raises(FormatError, match=name):
            module.assign({**tensors, name: bad})


def test_embedding_keeps_what_its_class_adds():
    class Shifted(nn.Embedding):
        def forward(self, index, offset=2):
            return super().forward(index + offset) * self.factor.to(self.weight.dtype)

    torch.manual_seed(0)
    module = Shifted(40, 64, padding_idx=0)
    module.register_buffer("factor", torch.tensor(3.0), persistent=False)
    assert [t.kind for t in find_targets(module)] == ["embedding"]
    layout = parse_layout("int8_g32[32]+int4_row[32]", 64)
    quantized = round_to_nearest(module.weight.detach(), layout)
    packed = QuantEmbedding.replacing(module, layout, dtype=torch.float32)
    packed.assign(quantized.pack())
    index = torch.tensor([[0, 5], [7, 1]])
    expected = quantized.dequantize()[index + 2] * 3
    assert packed is module and isinstance(module, Shifted) and torch.equal(module(index), expected)
    assert module.bfloat16()(index).dtype == torch.bfloat16
    packed.restore(quantized.dequantize())
    assert type(module) is Shifted and set(module.state_dict()) == {"weight"}


# -- targets ------------------------------------------------------------------------------------------------------


def on_meta(config) -> tf.PreTrainedModel:
    with torch.device("meta"):
        return tf.AutoModelForCausalLM.from_config(config)


def test_targets_in_module_order_with_their_shapes():
    targets = find_targets(on_meta(tiny_config("qwen3-moe")))
    names = [t.name for t in targets]
    assert names[0] == "model.embed_tokens" and names[-1] == "lm_head" and len(set(names)) == len(names) == 26
    expert = next(t for t in targets if t.name == "model.layers.0.mlp.experts.down_proj.3")
    assert (expert.kind, expert.param_name, expert.expert_index, expert.shape) == ("expert", "down_proj", 3, (64, 32))
    assert expert.module_path == "model.layers.0.mlp.experts"


def test_conv1d_is_read_transposed():
    model = tf.AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    target = next(t for t in find_targets(model) if t.name.endswith("mlp.c_fc"))
    assert (target.kind, target.shape) == ("conv1d", (96, 64))
    weight = read_weight(model, target)
    assert weight.shape == (96, 64)
    assert weight.data_ptr() == model.get_submodule(target.name).weight.data_ptr(), "a copy was made"


@pytest.mark.parametrize("config", [
    tf.GptOssConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=2, head_dim=16,
                    num_attention_heads=4, num_key_value_heads=2, vocab_size=64),
    tf.Llama4TextConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=2, head_dim=16,
                        num_attention_heads=4, num_key_value_heads=2, vocab_size=64, interleave_moe_layer_step=1),
])
def test_transposed_experts_are_refused_with_a_reason(config):
    model = on_meta(config)
    assert not any(t.kind == "expert" for t in find_targets(model))
    reasons = [reason for name, reason in find_unquantizable(model).items() if "experts" in name]
    assert len(reasons) == 2 and all("transposed" in r or "linear(x" in r for r in reasons)


@pytest.mark.parametrize("config", [
    tf.MixtralConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=2,
                     num_attention_heads=4, num_key_value_heads=2, vocab_size=64),
    tf.JetMoeConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=2, kv_channels=16,
                    num_key_value_heads=2, vocab_size=64),
])
def test_experts_are_found_by_how_they_are_read(config):
    model = on_meta(config)
    assert any(t.kind == "expert" for t in find_targets(model)) and not find_unquantizable(model)


def test_subclasses_of_linear_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(Scaled(8, 8), nn.Conv1d(8, 8, 3), nn.Embedding(4, 8, max_norm=1.0))
    assert find_targets(model) == []
    assert set(find_unquantizable(model)) == {"0.weight", "2.weight"}

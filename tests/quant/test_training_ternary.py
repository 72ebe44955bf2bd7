"""Linears trained ternary: values, straight-through gradients, and codes that are those of the training graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.quant.errors import FewbitsError, FormatError, ModelError
from fewbits.quant.training.ternary import EPS, Ternary, TernaryLinear, quantize_tokens, replace_linears, set_mix
from fewbits.quant.types import Layout, QuantizedTensor

torch.set_num_threads(1)

SCALES = ("absmean", "absmedian", "learned")
EVERY = [Ternary(scale, granularity, bits) for scale in SCALES  # type: ignore[arg-type]
         for granularity in ("tensor", "row") for bits in (None, 8)]

GOLDEN = torch.tensor([[0.9, -0.4, 0.1, -1.3, 0.05, 0.7, -0.2, 0.3]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(weight: Tensor, ternary: Ternary, bias: Tensor | None = None) -> TernaryLinear:
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias)
    return TernaryLinear.of(dense, ternary)


def some_layer(ternary: Ternary) -> TernaryLinear:
    return layer(normal(24, 40), ternary, normal(24, seed=1))


def seen_by_inputs(ternary: TernaryLinear) -> Tensor:
    """The weight ``(N, K)`` that the training graph multiplies by, found with unit inputs (int8 holds those)."""
    plain = ternary(torch.zeros(1, ternary.in_features, dtype=ternary.weight.dtype))
    return (ternary(torch.eye(ternary.in_features, dtype=ternary.weight.dtype)) - plain).detach().T


# -- golden values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, gamma, codes, loss", [
    ("absmean", 0.49375, [1, -1, 0, -1, 0, 1, 0, 1], 0.956445),
    ("absmedian", 0.30, [1, -1, 0, -1, 0, 1, -1, 1], 1.552500),  # the lower median
    ("learned", 0.966667, [1, 0, 0, -1, 0, 1, 0, 0], 0.489167),  # where it starts: the exact optimum
])
def test_golden_codes_and_losses(scale, gamma: float, codes: list[int], loss: float) -> None:
    for granularity in ("tensor", "row"):
        made = layer(GOLDEN.clone(), Ternary(scale, granularity))  # type: ignore[arg-type]
        found, own = made.export()
        assert found.tolist() == [codes] and found.dtype == torch.int8
        assert float(own) == pytest.approx(gamma, abs=1e-6)
        assert float((GOLDEN - made.effective_weight().detach()).square().sum()) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("scale, distortion, zeros", [("absmean", 0.2634, 0.310), ("absmedian", 0.3180, 0.264),
                                                      ("learned", 0.1902, 0.459)])
def test_distortion_of_normal_weights(scale, distortion: float, zeros: float) -> None:
    weight = normal(500, 1000)
    made = layer(weight, Ternary(scale))
    # half a million weights: relative errors of a few thousandths
    assert float((weight - made.effective_weight().detach()).square().mean()) == pytest.approx(distortion, rel=0.01)
    assert float((made.export()[0] == 0).float().mean()) == pytest.approx(zeros, abs=0.005)


def test_large_weights_leave_the_median_alone() -> None:
    weight = normal(8, 64, seed=2)
    outliers = weight.abs() > weight.abs().quantile(0.7)
    grown = torch.where(outliers, 10 * weight, weight)

    def codes_of_rest(scale, w: Tensor) -> Tensor:
        return layer(w, Ternary(scale)).export()[0][~outliers]

    assert torch.equal(codes_of_rest("absmedian", weight), codes_of_rest("absmedian", grown))
    assert not torch.equal(codes_of_rest("absmean", weight), codes_of_rest("absmean", grown))


def test_rows_have_scales_of_their_own() -> None:
    weight = normal(4, 32) * torch.tensor([[1e-2], [1.0], [5.0], [100.0]])
    for scale in SCALES:
        codes, gamma = layer(weight, Ternary(scale, "row")).export()  # type: ignore[arg-type]
        alone = [layer(row[None], Ternary(scale)).export() for row in weight]  # type: ignore[arg-type]
        assert torch.equal(codes, torch.cat([c for c, _ in alone]))
        torch.testing.assert_close(gamma, torch.cat([g for _, g in alone]), rtol=1e-6, atol=0)


def test_least_scale_is_a_maximum_and_not_added() -> None:
    # gamma = 1e-3: eps added to it would move the threshold by 1 % and lose the code of a weight right above it
    weight = torch.tensor([[0.502e-3, 1e-3, 1e-3, 1.498e-3]])
    assert layer(weight, Ternary()).export()[0].tolist() == [[1, 1, 1, 1]]
    codes, scale = layer(torch.zeros(2, 4), Ternary()).export()
    assert float(scale) == pytest.approx(EPS) and not bool(codes.any())


# -- values of the layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ternary", EVERY, ids=str)
def test_mix_is_exact_at_both_ends(ternary: Ternary) -> None:
    made, x = some_layer(ternary), normal(5, 40, seed=3)
    made.mix = 0.0
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
    made.mix = 1.0
    codes, scale = made.export()
    inputs = x
    if ternary.act_bits:
        rounded, s = quantize_tokens(x)
        inputs = rounded / s
    assert torch.equal(made(x), F.linear(inputs, scale * codes, made.bias))


def test_mix_blends_weights_and_inputs() -> None:
    made, x = some_layer(Ternary()), normal(5, 40, seed=3)
    codes, scale = made.export()
    rounded, s = quantize_tokens(x)
    made.mix = 0.25
    blend = F.linear(0.75 * x + 0.25 * rounded / s, 0.75 * made.weight + 0.25 * scale * codes, made.bias)
    torch.testing.assert_close(made(x), blend, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ternary", EVERY[1::2], ids=str)
def test_integers_compute_the_same(ternary: Ternary) -> None:
    made, x = some_layer(ternary), 3 * normal(5, 40, seed=3)
    codes, scale = made.export()
    rounded, s = quantize_tokens(x)
    assert torch.equal(rounded, rounded.to(torch.int8).float()) and int(rounded.abs().max()) == 127
    sums = rounded.to(torch.int32) @ codes.to(torch.int32).T
    expected = sums.double() * scale.T.double() / s.double() + made.bias.double()
    # accumulators are exact and only the rescale rounds; the float path rounds inputs, products and 40 sums
    bound = 44 * 2**-24 * ((rounded / s).abs() @ (scale * codes).abs().T + made.bias.abs())
    assert bool(((made(x) - expected).abs() <= bound).all())


def test_bias_is_not_rescaled() -> None:
    weight, bias = normal(24, 40), normal(24, seed=1)
    with_bias, without = layer(weight, Ternary(), bias), layer(weight, Ternary())
    for size in (1e-3, 1.0, 1e3):
        x = size * normal(5, 40, seed=3)
        torch.testing.assert_close(with_bias(x), without(x) + bias, rtol=1e-6, atol=1e-6)
    assert torch.equal(with_bias(torch.zeros(1, 40)), bias[None])


def test_tokens_are_rounded_each_by_itself() -> None:
    x = normal(3, 16) * torch.tensor([[1e-2], [1.0], [1e4]])
    codes, s = quantize_tokens(x)
    assert codes.abs().amax(1).tolist() == [127, 127, 127]
    assert bool(((codes / s - x).abs() <= 0.5001 / s).all())
    assert not bool(quantize_tokens(torch.zeros(2, 4))[0].any())


def test_norm_comes_first_and_nothing_else_changes() -> None:
    weight, x = normal(24, 40), normal(5, 40, seed=3)
    normed = layer(weight, Ternary(norm=True))
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    torch.testing.assert_close(normed(x), layer(weight, Ternary())(unit), rtol=1e-5, atol=1e-5)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("ternary", [t for t in EVERY if t.scale != "learned"], ids=str)
def test_gradients_are_those_of_a_plain_linear_at_the_quantized_values(ternary: Ternary, mix: float) -> None:
    made, g = some_layer(ternary), normal(5, 24, seed=4)
    made.mix = mix
    x = normal(5, 40, seed=3).requires_grad_()
    made(x).backward(g)
    inputs = x.detach()
    if ternary.act_bits:
        rounded, s = quantize_tokens(x)
        inputs = torch.lerp(inputs, rounded / s, mix)
    assert torch.equal(made.weight.grad, g.T @ inputs)
    assert torch.equal(x.grad, g @ made.effective_weight().detach())
    assert torch.equal(made.bias.grad, g.sum(0))


def differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """The gradient of a scalar ``function`` by central differences, float64."""
    out = torch.zeros_like(at)
    for i in range(at.numel()):
        up, down = at.clone(), at.clone()
        up.view(-1)[i] += step
        down.view(-1)[i] -= step
        out.view(-1)[i] = (function(up) - function(down)) / (2 * step)
    return out


@pytest.mark.parametrize("mix", [0.3, 1.0])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_learned_scale_has_the_gradient_of_its_surrogate(granularity, mix: float) -> None:
    weight, x, target = normal(6, 20), normal(7, 20, seed=3), normal(7, 6, seed=4)
    made = layer(weight, Ternary("learned", granularity, None))
    with torch.no_grad():  # away from the least squares scale, where the gradient of the plain squared error is 0
        made.log_scale += 0.3 * normal(*made.log_scale.shape, seed=5)
    made.mix = mix
    (made(x) - target).square().sum().backward()

    theta, codes = made.log_scale.detach().double(), made.export()[0].double()
    rest = codes - (weight.double() / theta.exp()[:, None]).clamp(-1, 1)

    def loss(theta: Tensor, w: Tensor) -> Tensor:
        alpha = theta.exp()[:, None]
        soft = alpha * ((w / alpha).clamp(-1, 1) + rest)
        return (x.double() @ ((1 - mix) * w + mix * soft).T - target.double()).square().sum()

    by_theta = differences(lambda t: loss(t, weight.double()), theta)
    by_weight = differences(lambda w: loss(theta, w), weight.double())
    shared = 20 if granularity == "row" else 6 * 20
    # float32 sums of terms of either sign: absolute errors of 1e-5 of the largest
    torch.testing.assert_close(made.log_scale.grad.double() * math.sqrt(shared), by_theta, rtol=1e-4,
                               atol=1e-4 * float(by_theta.abs().max()))
    torch.testing.assert_close(made.weight.grad.double(), by_weight, rtol=1e-4,
                               atol=1e-4 * float(by_weight.abs().max()))


def test_a_level_out_of_reach_pulls_the_scale_by_the_level_itself() -> None:
    made = layer(torch.tensor([[5.0, -5.0, 5.0, 5.0]]), Ternary("learned", "row", None))
    with torch.no_grad():
        made.log_scale.zero_()  # alpha = 1, every weight is far outside
    made(torch.tensor([[1.0, -2.0, 0.0, 4.0]])).sum().backward()
    assert float(made.log_scale.grad) == pytest.approx((1 + 2 + 4) / math.sqrt(4))
    assert not bool(made.weight.grad.any())


def test_learned_scale_finds_the_least_squared_error() -> None:
    """With the error of the weights themselves as the loss: their optimum is known."""
    weight = normal(4, 256)
    made = layer(weight, Ternary("learned", "row", None))
    best = made.log_scale.detach().clone()
    with torch.no_grad():
        made.log_scale += torch.tensor([0.4, -0.4, 0.2, -0.2])
    step = torch.optim.Adam([made.log_scale], lr=0.01)
    for _ in range(300):
        step.zero_grad()
        (made.effective_weight() - weight).square().sum().backward()
        step.step()
    # the surrogate's zero is where sum (t - u)(t - u [inside]) = 0; it lies near the optimum and not on it
    error = (made.effective_weight().detach() - weight).square().sum(1)
    with torch.no_grad():
        made.log_scale.copy_(best)
    assert bool((error <= 1.1 * (made.effective_weight() - weight).square().sum(1)).all())


# -- frozen ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ternary", EVERY, ids=str)
def test_exported_codes_are_those_of_the_training_graph(ternary: Ternary, dtype: torch.dtype) -> None:
    made = some_layer(ternary).to(dtype)
    step = torch.optim.SGD(made.parameters(), lr=0.05)
    for i in range(3):
        step.zero_grad()
        made(normal(5, 40, seed=i).to(dtype)).float().square().mean().backward()
        step.step()
    codes, scale = made.export()
    # roundings of gamma T, of 1 as 127 / 127 and of the bias, in the layer's dtype; codes are 1 apart
    torch.testing.assert_close(seen_by_inputs(made).float() / scale, codes.float(), rtol=0,
                               atol=1e-5 if dtype is torch.float32 else 0.1)
    assert torch.equal(codes.float(), (made.weight.float() / scale).round().clamp(-1, 1))


def test_codes_of_bfloat16_weights_are_computed_in_float32() -> None:
    """In bfloat16 some quotients near a half round to the other side."""
    weight = normal(64, 256).bfloat16()
    made = layer(weight, Ternary())
    codes, scale = made.export()
    assert torch.equal(codes.float(), (weight.float() / scale).round().clamp(-1, 1))
    assert not torch.equal(codes.float(), (weight / scale.bfloat16()).round().clamp(-1, 1).float())


@pytest.mark.parametrize("ternary", EVERY[::2], ids=str)
def test_quantized_tensor_means_what_was_trained(ternary: Ternary) -> None:
    made = some_layer(ternary)
    codes, scale = made.export()
    stored = made.to_quantized()
    assert torch.equal(stored.dequantize(), scale.half().float() * codes)
    again = QuantizedTensor.unpack(stored.pack(), stored.layout)
    assert torch.equal(again.dequantize(), stored.dequantize())
    assert stored.layout == Layout.of(stored.segments[0].format, 40) and stored.layout.runs[0][0].name == "ternary_row"
    # 24 rows of 3 words of codes and a float16 scale, and two sizes
    assert stored.stored_bytes == 24 * (3 * 4 + 2) + 16


def test_what_cannot_be_stored_is_refused() -> None:
    weight = normal(4, 8)
    with pytest.raises(FormatError, match="scale: got"):
        layer(1e6 * weight, Ternary()).to_quantized()
    weight[1, 2] = math.nan
    with pytest.raises(ModelError, match="NaN"):
        layer(weight, Ternary()).export()


# -- models ------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8, bias=False)})
                                    for _ in range(2))
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())  # type: ignore[index]
        return self.lm_head(x)


def test_replacing_keeps_weights_heads_and_ties() -> None:
    model, ids = Small().eval(), torch.arange(11)
    before, weight = model(ids), model.blocks[0]["up"].weight  # type: ignore[index]
    names = replace_linears(model, Ternary())
    assert names == [f"blocks.{i}.{which}" for i in range(2) for which in ("up", "down")]
    assert model.blocks[0]["up"].weight is weight and not model.blocks[0]["up"].training  # type: ignore[index]
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.embed.weight
    assert not torch.equal(model(ids), before)
    set_mix(model, 0.0)
    assert torch.equal(model(ids), before)


def test_patterns_choose_linears() -> None:
    model = Small()
    assert replace_linears(model, Ternary(norm=True), match=["*.down"], keep=["blocks.0.*"]) == ["blocks.1.down"]
    left = ["blocks.0.up", "blocks.0.down", "blocks.1.up"]
    assert replace_linears(model, Ternary(), match=["*.down", "*.up"]) == left
    with pytest.raises(ModelError, match="match: no nn"):
        replace_linears(model, Ternary())


def test_learned_scales_follow_weights_and_are_saved() -> None:
    model = Small()
    replace_linears(model, Ternary("learned"))
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            assert float(module.scale()) == pytest.approx(float(layer(module.weight, Ternary("learned")).scale()))
    with torch.no_grad():
        model.blocks[0]["up"].log_scale.fill_(0.5)  # type: ignore[index]
    other = Small()
    replace_linears(other, Ternary("learned"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(torch.arange(11)), model(torch.arange(11)))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(FewbitsError, match="scale: got 'mean', needed one of 'absmean'"):
        Ternary("mean")  # type: ignore[arg-type]
    with pytest.raises(FewbitsError, match="act_bits: got 4"):
        Ternary(act_bits=4)  # type: ignore[arg-type]
    with pytest.raises(FewbitsError, match="mix: got"):
        set_mix(Small(), 1.5)


def test_training_lowers_the_loss_of_a_ternary_model_below_that_of_its_rounded_float_twin() -> None:
    """What training with codes is for."""
    x = normal(256, 16, seed=6)
    target = x @ normal(16, 4, seed=7).tanh()

    def trained(mix: float) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        replace_linears(model, Ternary())
        set_mix(model, mix)
        step = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(300):
            step.zero_grad()
            (model(x) - target).square().mean().backward()
            step.step()
        set_mix(model, 1.0)
        return float((model(x) - target).square().mean().detach())

    assert trained(1.0) < 0.5 * trained(0.0)

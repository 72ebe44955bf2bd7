"""Linears with complex weights in powers of i: the quantizer, its gradients, and what is stored of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbits.quant.errors import FormatError
from fewbits.quant.training.complex import PhaseLinear, PhaseWeight, block_matrix, round_tokens

torch.set_num_threads(1)


def layer(inputs: int = 12, outputs: int = 8, *, round_inputs: bool = False) -> PhaseLinear:
    torch.manual_seed(0)
    return PhaseLinear(inputs, outputs, round_inputs=round_inputs, std=0.5)


def to_complex(parts: Tensor) -> Tensor:
    return torch.complex(*parts.chunk(2, -1))


def test_it_is_a_complex_product() -> None:
    linear, x = layer(), torch.randn(3, 12)
    codes, scales = linear.codes()
    weight = torch.where(codes % 2 == 0, scales[0], scales[1]) * torch.tensor([1, 1j, -1, -1j])[codes]
    torch.testing.assert_close(to_complex(linear(x)), to_complex(x) @ weight.T)
    assert linear(x.view(3, 1, 12)).shape == (3, 1, 8)


def test_codes_point_where_weights_do_and_scales_are_means() -> None:
    linear = layer(64, 96)
    codes, scales = linear.codes()
    a, b = linear.a.detach(), linear.b.detach()
    real = codes % 2 == 0
    assert torch.equal(real, a.abs() >= b.abs())  # no ties among normal values
    assert torch.equal(codes[real] == 2, a[real] < 0) and torch.equal(codes[~real] == 3, b[~real] < 0)
    torch.testing.assert_close(scales, torch.stack([a[real].abs().mean(), b[~real].abs().mean()]))


@pytest.mark.parametrize("round_inputs", [False, True])
def test_gradients_pass_the_quantizer_unchanged(round_inputs: bool) -> None:
    """To both coordinates of every entry: ``g_r x_r^T + g_i x_i^T`` and ``g_i x_r^T - g_r x_i^T``."""
    linear, x = layer(round_inputs=round_inputs), torch.randn(5, 12, requires_grad=True)
    grad = torch.randn(5, 8)
    linear(x).backward(grad)
    seen = x.detach()
    if round_inputs:
        whole, step = round_tokens(seen)
        seen = whole * step
    (x_r, x_i), (g_r, g_i) = seen.chunk(2, 1), grad.chunk(2, 1)
    torch.testing.assert_close(linear.a.grad, g_r.T @ x_r + g_i.T @ x_i)
    torch.testing.assert_close(linear.b.grad, g_i.T @ x_r - g_r.T @ x_i)
    torch.testing.assert_close(x.grad, grad @ linear.frozen().dense())


def test_gradients_are_those_of_autograd_through_the_dense_matrix() -> None:
    """As if quantized values were the parameters."""
    linear, x, grad = layer(), torch.randn(5, 12), torch.randn(5, 8)
    linear(x).backward(grad)
    dense = linear.frozen().dense()
    a, b = (part.clone().requires_grad_() for part in (dense[:4, :6], dense[4:, :6]))
    (x @ block_matrix(a, b).T).backward(grad)
    torch.testing.assert_close(linear.a.grad, a.grad)
    torch.testing.assert_close(linear.b.grad, b.grad)


def test_what_is_frozen_is_the_training_graph() -> None:
    linear = layer(40, 24)
    frozen = linear.frozen()
    assert torch.equal(frozen.codes.long(), linear.codes()[0]) and torch.equal(frozen.scales, linear.codes()[1])
    x = torch.randn(7, 40)
    assert torch.equal(nn.functional.linear(x, frozen.dense()), linear(x))
    stored = frozen.pack()
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == PhaseWeight.storage(12, 20)
    assert frozen.stored_bytes == sum(t.nbytes for t in stored.values()) == 12 * 2 * 4 + 8
    back = PhaseWeight.unpack(stored, 12, 20)
    assert torch.equal(back.codes, frozen.codes) and torch.equal(back.scales, frozen.scales)
    with pytest.raises(FormatError, match="phases: got"):
        PhaseWeight.unpack(stored, 12, 40)


def test_integers_are_the_sums_of_turned_inputs() -> None:
    """Each input is swapped and negated as its code says, and then added; nothing is multiplied."""
    frozen, x = layer(10, 6).frozen(), torch.randint(-128, 128, (4, 10))
    x_r, x_i = x.chunk(2, 1)
    turned = [(x_r, x_i), (-x_i, x_r), (-x_r, -x_i), (x_i, -x_r)]  # 1, i, -1, -i times x
    straight, quarter = frozen.accumulate(x)
    for row in range(3):
        sums = torch.zeros(2, 4, 2, dtype=torch.int64)  # axis, token, part
        for column, k in enumerate(frozen.codes[row].tolist()):
            for part in (0, 1):
                sums[k % 2, :, part] += turned[k][part][:, column]
        for found, axis in ((straight, 0), (quarter, 1)):
            assert torch.equal(found[:, [row, row + 3]], sums[axis])


def test_the_integer_product_is_the_training_graph() -> None:
    linear = layer(128, 96, round_inputs=True)
    x = torch.randn(2, 9, 128) * torch.tensor([0.01, 30.0]).view(2, 1, 1)
    with torch.no_grad():
        expected = linear(x)
    scale = x.abs().amax(-1, keepdim=True) * float(linear.codes()[1].max()) * 128
    assert ((linear.frozen().matmul(x) - expected).abs() < 2e-6 * scale).all()


def test_rounded_inputs_use_all_of_a_byte() -> None:
    whole, step = round_tokens(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    assert whole.tolist() == [[64, -127, 32], [0, 0, 0]]
    torch.testing.assert_close(whole * step, torch.tensor([[1.0, -2.0, 0.5], [0, 0, 0]]), rtol=0, atol=1e-2)


def test_phases_turn_in_training() -> None:
    """A teacher of powers of i is learned, which moves codes that started elsewhere."""
    torch.manual_seed(1)
    student, teacher = PhaseLinear(16, 16, std=0.3), PhaseLinear(16, 16, std=0.3)
    start, target = student.codes()[0], teacher.codes()[0]
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    for _ in range(300):
        x = torch.randn(32, 16)
        loss = (student(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = [float((codes == target).float().mean()) for codes in (start, student.codes()[0])]
    assert right[0] < 0.5 and right[1] > 0.95


def test_odd_widths_are_refused() -> None:
    for inputs, outputs in ((3, 4), (4, 3)):
        with pytest.raises(FormatError, match=f"got {inputs} inputs and {outputs} outputs, needed even numbers"):
            PhaseLinear(inputs, outputs)

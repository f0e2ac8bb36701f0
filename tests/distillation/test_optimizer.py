"""Steps relative to the size of what they change; everything else is AdamW."""

import copy
import math

import pytest
import torch

from tpa_train.distillation.optimizer import ScaledAdamW, element_scale


def _product(scales, shape):
    total = torch.ones(shape)
    for scale in scales:
        total = total * scale
    return total


def _signs(*shape, seed=0):
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@pytest.mark.parametrize("shape", [(6, 9), (3, 4, 5), (1, 7), (7, 1)])
def test_steps_are_relative_to_matrices_scaled_by_row_and_column(shape):
    """|W_ij| = a_i b_j, over seven orders of magnitude: every element's scale is its own size."""
    rows = torch.logspace(-4, 3, math.prod(shape[:-1])).view(*shape[:-1], 1)
    columns = torch.logspace(-2, 1, shape[-1])
    factor = _signs(*shape) * rows * columns
    scales = element_scale(factor)
    torch.testing.assert_close(_product(scales, shape), factor.abs(), rtol=1e-5, atol=0)
    assert sum(s.numel() for s in scales) == rows.numel() + columns.numel(), "no matrix of the factor's size is kept"


def test_scales_of_random_matrices_are_their_row_and_column_sizes():
    factor = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 4, 40)[:, None]
    ratio = factor.abs() / _product(element_scale(factor), factor.shape)
    assert ratio.square().mean(1).sqrt().sub(1).abs().max() < 0.3


@pytest.mark.parametrize("factor", [torch.tensor([3.0, -4.0, 0.0]), torch.tensor(2.0), torch.full((5,), -0.1)])
def test_vectors_step_by_their_overall_size(factor):
    (scale,) = element_scale(factor)
    torch.testing.assert_close(scale.expand(factor.shape), factor.square().mean().sqrt().expand(factor.shape))


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 25), (9,)])
def test_factors_that_start_at_zero_learn(shape):
    """By steps of a random matrix' size: 1 / √columns."""
    (scale,) = element_scale(torch.zeros(shape))
    assert scale.dim() == len(shape) and scale.item() == pytest.approx(shape[-1] ** -0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scales_are_float32_and_detached(dtype):
    scales = element_scale(torch.randn(4, 5).to(dtype).requires_grad_())
    assert all(s.dtype == torch.float32 and not s.requires_grad and s.isfinite().all() for s in scales)


# ------------------------------------------------------------------------------------------------------------ optimizer


def _gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def _parameters():
    generator = torch.Generator().manual_seed(1)
    # Away from zero: between numbers within a factor of two a difference is exact (Sterbenz).
    return [torch.nn.Parameter(torch.rand(s, generator=generator) + 1.0) for s in ((4, 6), (3,), (2, 3, 4))]


def _scaled(parameters, scale, lr=1e-2, **options):
    relative = parameters[:-1]
    groups = [{"params": relative, "scales": [scale(p) for p in relative]}, {"params": parameters[-1:]}]
    return ScaledAdamW(groups, lr=lr, betas=(0.9, 0.95), **options)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "eps": 1e-12}, {"amsgrad": True}])
def test_a_scale_of_one_is_adamw_to_the_bit(options):
    ours, theirs = _parameters(), _parameters()
    optimizer = _scaled(ours, lambda p: (torch.ones(1),), **options)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), **options)
    for step in range(20):
        for parameters, o in ((ours, optimizer), (theirs, reference)):
            _gradients(parameters, step)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    states = zip(optimizer.state_dict()["state"].values(), reference.state_dict()["state"].values(), strict=True)
    assert all(torch.equal(a[k], b[k]) for a, b in states for k in b), "the state is AdamW's own"


def test_each_element_moves_by_its_scale():
    """The first step of Adam is the learning rate in the gradient's direction, whatever its size."""
    (parameter, *_) = _parameters()
    before = parameter.detach().clone()
    scales = (torch.tensor([[1.0], [0.5], [0.0], [2.0]]), torch.arange(6.0))
    optimizer = ScaledAdamW(
        [{"params": [parameter], "scales": [scales]}], lr=1e-2, weight_decay=0.0, eps=1e-12
    )  # fmt: skip
    _gradients([parameter], 0)
    optimizer.step()
    expected = -1e-2 * parameter.grad.sign() * scales[0] * scales[1]
    torch.testing.assert_close(parameter.detach() - before, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(parameter.detach()[2], before[2]) and torch.equal(parameter.detach()[:, 0], before[:, 0])


def test_relative_steps_do_not_see_the_units():
    """A latent in other units, its weights scaled by row and column: the same relative path."""
    rows, columns = torch.tensor([[4.0], [0.25], [2.0**-6]]), torch.tensor([1.0, 2.0**-10, 8.0, 0.5])
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).sign() * 1.5
    paths = []
    for unit in (torch.ones(3, 4), rows * columns):
        parameter = torch.nn.Parameter(start * unit)
        optimizer = ScaledAdamW(
            [{"params": [parameter], "scales": [element_scale(parameter)]}], lr=1e-2, weight_decay=0.0, eps=1e-30
        )
        for step in range(10):
            gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            parameter.grad = gradient / unit  # the same loss in other units
            optimizer.step()
        paths.append(parameter.detach() / unit)
    torch.testing.assert_close(paths[1], paths[0], rtol=1e-4, atol=1e-5)
    assert (paths[0] - start).abs().max() > 0.02


def test_a_zero_matrix_moves():
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = ScaledAdamW([{"params": [parameter], "scales": [element_scale(parameter)]}], lr=1e-2, weight_decay=0.0)
    _gradients([parameter], 0)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), -1e-2 * 0.5 * parameter.grad.sign(), rtol=1e-4, atol=0)


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path):
    """Through a file; the scales are those of the start, not of the weights where it stopped."""
    straight = _parameters()
    optimizer = _scaled(straight, element_scale)
    saved = None
    for step in range(10):
        if step == 4:
            torch.save({"optimizer": optimizer.state_dict(), "weights": copy.deepcopy(straight)}, tmp_path / "state")
            saved = torch.load(tmp_path / "state", weights_only=True)
        _gradients(straight, step)
        optimizer.step()
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in saved["weights"]]
    again = _scaled(resumed, lambda p: (torch.full((1,), 77.0),))  # what is loaded counts
    again.load_state_dict(saved["optimizer"])
    for step in range(4, 10):
        _gradients(resumed, step)
        again.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_the_closure_and_parameters_without_gradients():
    parameters = _parameters()
    optimizer = _scaled(parameters, element_scale)
    before = [p.detach().clone() for p in parameters]

    def closure():
        optimizer.zero_grad()
        loss = parameters[0].square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(loss) == float(before[0].square().sum())
    assert [torch.equal(p, b) for p, b in zip(parameters, before, strict=True)] == [False, True, True]

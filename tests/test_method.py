"""The method by hand: loss and gradient, lambda, schedules, periodic work under any stride, epsilon-greedy actions."""

import pytest
import torch
from hypothesis import given, strategies
from torch.distributions import Categorical, kl_divergence

from qdagger_dqn_atari_impalacnn import Batch, act, distill_coefficient, due, linear_schedule, qdagger_loss


def test_large_q_values_at_a_low_temperature_stay_finite():
    """Probabilities that underflow to 0 must not turn the divergence into nan or inf."""
    q_values, zero = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True), torch.zeros(1)
    batch = Batch(None, zero.long(), zero, zero, None, -q_values)
    losses = qdagger_loss(q_values, q_values, batch, 1.0, temperature=0.1)
    assert losses[2].item() == 4000 and torch.autograd.grad(losses[0], q_values)[0].isfinite().all()


@pytest.mark.parametrize("huber", [False, True])
@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.7, 0.1), (0.7, 4.0), (torch.tensor(3.0), 0.5)])
def test_loss_and_gradient_by_formula(huber, weight, temperature):
    """2 (Q - y) / B on the action taken, clipped under Huber, plus weight (student - teacher) / (T B) on every action;
    nothing flows into what targets are made of, even where it could. torch.distributions knows the divergence."""
    torch.manual_seed(0)
    q_values, next_q_values, teacher = torch.randn(3, 7, 5).requires_grad_().unbind()
    discounts = torch.tensor([0.0 if i % 3 == 1 else 0.99**i for i in range(7)])
    batch = Batch(None, torch.randint(5, (7,)), torch.randn(7), discounts, None, teacher)
    losses = qdagger_loss(q_values, next_q_values, batch, weight, temperature, huber)
    gradient, *none = torch.autograd.grad(losses[0], [q_values, next_q_values, teacher], allow_unused=True)
    assert none == [None, None]
    policies = [Categorical(logits=q.detach() / temperature) for q in (teacher, q_values)]
    divergence, reverse = kl_divergence(*policies).mean(), kl_divergence(*policies[::-1]).mean()
    expected, rows = weight * (policies[1].probs - policies[0].probs) / (temperature * 7), torch.arange(7)
    errors = (q_values[rows, batch.actions] - batch.returns - discounts * next_q_values.amax(1)).detach()
    expected[rows, batch.actions] += (errors.clamp(-1, 1) if huber else 2 * errors) / 7
    torch.testing.assert_close(gradient, expected)
    squares = torch.where(errors.abs() < 1, errors**2 / 2, errors.abs() - 0.5) if huber else errors**2
    by_formula = torch.stack([squares.mean() + weight * divergence, squares.mean(), divergence])
    torch.testing.assert_close(torch.stack(losses), by_formula, rtol=1e-4, atol=1e-6)
    assert abs(divergence - reverse) > 1e-3 * divergence, "this case cannot tell the two directions apart"
    assert errors.abs().min() < 1 < errors.abs().max(), "this case cannot tell Huber from squares"


@pytest.mark.parametrize(
    ("student", "teacher", "baseline", "expected"),
    [
        *[(0, 400, 0, 1), (100, 400, 0, 0.75), (300, 400, 0, 0.25), (400, 400, 0, 0), (4000, 400, 0, 0)],
        *[(-1, 400, 0, 1), (-21, 19.7, 0, 1), (9.85, 19.7, 0, 0.5)],  # Pong's -21 is not 2.07
        *[(-20.7, 19.7, -20.7, 1), (-0.5, 19.7, -20.7, 0.5), (21, 19.7, -20.7, 0), (-21, 19.7, -20.7, 1)],
        *[(-20, -10, -20, 1), (-17.5, -10, -20, 0.75), (-10, -10, -20, 0), (-5, -10, -20, 0)],  # a teacher below 0
    ],
)
def test_lambda_is_the_share_of_the_teachers_return_that_ten_games_lack(student, teacher, baseline, expected):
    """1 - (G_student - baseline) / (G_teacher - baseline), clipped; 1 before ten games; 0 from distill_steps on."""
    returns = [student + spread for spread in (-40, -30, -20, -10, 0, 0, 10, 20, 30, 40)]
    values = [distill_coefficient(returns, teacher, baseline, step, 1000) for step in (0, 999, 1000, 10**9)]
    assert values == pytest.approx([expected, expected, 0, 0]) and type(values[0]) is float
    assert distill_coefficient(returns, teacher, baseline, 10**12) == pytest.approx(expected)
    assert [distill_coefficient(returns[:n], teacher, baseline, 9, 10) for n in (0, 1, 9)] == [1, 1, 1]
    assert distill_coefficient([], teacher, baseline, 0, 0) == 0


def test_linear_schedule_by_hand():
    """Start, quarter, middle, last step, end exactly and for ever; it may rise, be broken, or have no duration."""
    values = [linear_schedule(1.0, 0.2, 100, step) for step in (0, 25, 50, 99, 100, 101, 10**9)]
    assert values == pytest.approx([1.0, 0.8, 0.6, 0.208, 0.2, 0.2, 0.2]) and values[4:] == [0.2] * 3
    assert [linear_schedule(0.0, 1.0, 2.5, step) for step in (1, 2, 3)] == pytest.approx([0.4, 0.8, 1.0])
    assert [linear_schedule(1.0, 0.05, duration, step) for duration in (0, 0.0) for step in (0, 3)] == [0.05] * 4


@given(*(strategies.integers(*limits) for limits in ((0, 500), (1, 60), (0, 80))))
def test_due_looks_at_every_step_of_a_stride(step, stride, every):
    """0 means never; together the strides count as often as single steps, if none is longer than the period."""
    assert due(step, stride, every) is any(every > 0 and one % every == 0 for one in range(step + 1, step + stride + 1))
    steps = range(0, step * stride, stride)
    assert stride > every > 0 or sum(due(one, stride, every) for one in steps) == (every and step * stride // every)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("epsilon", [0.0, 0.4, torch.tensor(0.4), 1.0])
@pytest.mark.parametrize("num_actions", [4, 9, 18])
def test_act_takes_the_best_action_but_explores_uniformly_as_often_as_epsilon_says(num_actions, epsilon):
    """Chi-square over all pairs of the best and the taken action, within 4 deviations; rows are independent."""
    q_values = torch.randn(90_000, num_actions, generator=seeded(3))
    best, actions = q_values.argmax(1), act(lambda obs: obs, seeded(0), q_values, epsilon)[0]
    counts = torch.bincount(best * num_actions + actions, minlength=num_actions**2).view(num_actions, num_actions)
    shares = (1 - epsilon) * torch.eye(num_actions) + epsilon / num_actions
    expected, freedom = torch.bincount(best)[:, None] * shares, num_actions * (num_actions - 1)
    assert ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum() < freedom + 4 * (2 * freedom) ** 0.5
    greedy, share = (actions == best).float(), shares[0, 0].item()
    assert (greedy[0::2] * greedy[1::2]).mean().item() == pytest.approx(share**2, abs=0.01)


def test_act_draws_from_its_generator_alone():
    """Other actions at the next call, the same with the same seed; global chance is neither used nor moved."""
    layer, obs, generator = torch.nn.Linear(6, 6), torch.randn(200, 6), seeded(7)
    state, first, second = torch.get_rng_state(), *(act(layer, generator, obs, 0.5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again, other = (act(layer, seeded(seed), obs, 0.5)[0] for seed in (7, 8))
    assert torch.equal(again, first[0]) and not torch.equal(first[0], second[0]) and not torch.equal(other, first[0])
    assert torch.equal(first[1], layer(obs)) and not first[1].requires_grad and first[0].dtype == torch.int64

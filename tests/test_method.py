"""The method by hand: loss and gradient, lambda, periodic work, epsilon-greedy actions, both networks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies
from torch.distributions import Categorical, kl_divergence

from qdagger_dqn_atari_impalacnn import NETWORKS, Batch, act, compute_lambda, due, qdagger_loss


def test_large_q_values_at_a_low_temperature_stay_finite():
    """Probabilities that underflow to 0 must not turn the divergence into nan or inf."""
    q_values, zero = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True), torch.zeros(1)
    batch = Batch(None, zero.long(), zero, zero, None, -q_values)
    losses = qdagger_loss(q_values, q_values, batch, 1.0, temperature=0.1)
    assert losses[2].item() == 4000 and torch.autograd.grad(losses[0], q_values)[0].isfinite().all()


@pytest.mark.parametrize("huber", [False, True])
@pytest.mark.parametrize(
    ("weight", "temperature"), [(0.0, 1.0), (0.7, 0.1), (0.7, 4.0), (torch.tensor(3.0), 0.5)]
)
def test_loss_and_gradient_by_formula(huber, weight, temperature):
    """2 (Q - y) / B on the action taken, clipped under Huber, plus weight (student - teacher) / (T B) on every action;
    nothing flows into what targets are made of, even where it could. torch.distributions knows the divergence."""
    torch.manual_seed(0)
    q_values, next_q_values, teacher = torch.randn(3, 7, 5).requires_grad_().unbind()
    discounts = torch.tensor([0.0 if i % 3 == 1 else 0.99**i for i in range(7)])
    batch = Batch(None, torch.randint(5, (7,)), torch.randn(7), discounts, None, teacher)
    losses = qdagger_loss(q_values, next_q_values, batch, weight, temperature, huber)
    gradient, *none = torch.autograd.grad(
        losses[0], [q_values, next_q_values, teacher], allow_unused=True
    )
    assert none == [None, None]
    policies = [Categorical(logits=q.detach() / temperature) for q in (teacher, q_values)]
    divergence, reverse = kl_divergence(*policies).mean(), kl_divergence(*policies[::-1]).mean()
    expected, rows = (
        weight * (policies[1].probs - policies[0].probs) / (temperature * 7),
        torch.arange(7),
    )
    errors = (
        q_values[rows, batch.actions] - batch.returns - discounts * next_q_values.amax(1)
    ).detach()
    expected[rows, batch.actions] += (errors.clamp(-1, 1) if huber else 2 * errors) / 7
    torch.testing.assert_close(gradient, expected)
    squares = (
        torch.where(errors.abs() < 1, errors**2 / 2, errors.abs() - 0.5) if huber else errors**2
    )
    by_formula = torch.stack([squares.mean() + weight * divergence, squares.mean(), divergence])
    torch.testing.assert_close(torch.stack(losses), by_formula, rtol=1e-4, atol=1e-6)
    assert abs(divergence - reverse) > 1e-3 * divergence, (
        "this case cannot tell the two directions apart"
    )
    assert errors.abs().min() < 1 < errors.abs().max(), "this case cannot tell Huber from squares"


LAMBDAS = [
    (0, 400, 0, 1),
    (100, 400, 0, 0.75),
    (300, 400, 0, 0.25),
    (400, 400, 0, 0),
    (4000, 400, 0, 0),
]
LAMBDAS += [(-1, 400, 0, 1), (-21, 19.7, 0, 1), (9.85, 19.7, 0, 0.5)]  # Pong's -21 is not 2.07
LAMBDAS += [
    (-20.7, 19.7, -20.7, 1),
    (-0.5, 19.7, -20.7, 0.5),
    (21, 19.7, -20.7, 0),
    (-21, 19.7, -20.7, 1),
]
LAMBDAS += [
    (-20, -10, -20, 1),
    (-17.5, -10, -20, 0.75),
    (-10, -10, -20, 0),
    (-5, -10, -20, 0),
]  # a teacher below 0


@pytest.mark.parametrize("student, teacher, baseline, expected", LAMBDAS)
def test_lambda_is_the_share_of_the_teachers_return_that_ten_games_lack(
    student, teacher, baseline, expected
):
    """1 - (G_student - baseline) / (G_teacher - baseline), clipped; 1 before ten games."""
    returns = [student + spread for spread in (-40, -30, -20, -10, 0, 0, 10, 20, 30, 40)]
    coefficient = compute_lambda(returns, teacher, baseline)
    assert coefficient == pytest.approx(expected) and type(coefficient) is float
    assert [compute_lambda(returns[:n], teacher, baseline) for n in (0, 1, 9)] == [1, 1, 1]


@given(*(strategies.integers(*limits) for limits in ((0, 500), (1, 60), (0, 80))))
def test_due_looks_at_every_step_of_a_stride(step, stride, every):
    """0 means never; together the strides count as often as single steps, if none is longer than the period."""
    end, begins = step + stride, range(0, step * stride, stride)
    assert due(step, end, every) is any(
        every > 0 and one % every == 0 for one in range(step + 1, end + 1)
    )
    counted = sum(due(begin, begin + stride, every) for begin in begins)
    assert stride > every > 0 or counted == (every and step * stride // every)


@pytest.mark.parametrize("epsilon", [0.0, 0.4, torch.tensor(0.4), 1.0])
@pytest.mark.parametrize("num_actions", [4, 9, 18])
def test_act_takes_the_best_action_but_explores_uniformly_as_often_as_epsilon_says(
    num_actions, epsilon
):
    """Chi-square over all pairs of the best and the taken action, within 4 deviations; rows are independent."""
    q_values = torch.randn(
        90_000, num_actions, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    actions, returned = act(
        lambda obs: 1 * obs, torch.Generator().manual_seed(0), q_values, epsilon
    )
    assert (
        torch.equal(returned, q_values)
        and not returned.requires_grad
        and actions.dtype == torch.int64
    )
    best = q_values.argmax(1)
    counts = torch.bincount(best * num_actions + actions, minlength=num_actions**2).view(
        num_actions, num_actions
    )
    shares = (1 - epsilon) * torch.eye(num_actions) + epsilon / num_actions
    expected, freedom = torch.bincount(best)[:, None] * shares, num_actions * (num_actions - 1)
    assert ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum() < freedom + 4 * (
        2 * freedom
    ) ** 0.5
    greedy, share = (actions == best).float(), shares[0, 0].item()
    assert (greedy[0::2] * greedy[1::2]).mean().item() == pytest.approx(share**2, abs=0.01)


def by_hand(name: str, state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Q-values from these tensors alone, all of which are used; x is float, from 0 to 1."""
    left = dict(state)

    def layer(function, key: str, x: torch.Tensor, **options) -> torch.Tensor:
        return function(
            x, left.pop(f"network.{key}.weight"), left.pop(f"network.{key}.bias"), **options
        )

    for i in range(3):
        if name == "nature":
            x = layer(F.conv2d, str(2 * i), x, stride=(4, 2, 1)[i]).relu()
            continue
        x = F.max_pool2d(
            layer(F.conv2d, f"{i}.conv", x, padding=1), kernel_size=3, stride=2, padding=1
        )
        for block in (f"{i}.res_block0", f"{i}.res_block1"):
            inner = layer(F.conv2d, f"{block}.conv0", x.relu(), padding=1).relu()
            x = x + layer(F.conv2d, f"{block}.conv1", inner, padding=1)
    hidden, last = ("7", "9") if name == "nature" else ("5", "7")
    q_values = layer(F.linear, last, layer(F.linear, hidden, x.relu().flatten(1)).relu())
    assert not left
    return q_values


@pytest.mark.parametrize(
    "name, size, per_action", [("nature", 1_684_128, 513), ("impala", 1_089_232, 257)]
)
@pytest.mark.parametrize("num_actions", [4, 6, 9, 18])
def test_q_values_layer_by_layer(name, size, per_action, num_actions):
    """From uint8 to float32, on images without symmetry, so that no layer, frame or skip connection can be misplaced.

    Published teachers have these names and sizes. In bfloat16 only the last layer multiplies in float32.
    """
    torch.manual_seed(0)
    network, obs = (
        NETWORKS[name](num_actions).requires_grad_(False),
        torch.randint(256, (3, 4, 84, 84)).byte(),
    )
    state, before, seen = network.state_dict(), obs.clone(), []
    expected = by_hand(name, state, obs / 255)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert sum(tensor.numel() for tensor in state.values()) == size + num_actions * per_action
    network.to(memory_format=torch.channels_last)
    for rows in (slice(3), slice(1, 2)):
        torch.testing.assert_close(network(obs[rows]), expected[rows], rtol=1e-4, atol=1e-6)
    assert (expected - by_hand(name, state, obs.flip(1) / 255)).abs().max() > 1e-4, (
        "frames look alike to it"
    )
    network.network[-3].register_forward_hook(lambda module, inputs, output: seen.append(output))
    network.amp = True
    q_values = network(obs)
    assert q_values.dtype == torch.float32 and seen[0].dtype == torch.bfloat16
    torch.testing.assert_close(
        q_values, F.linear(seen[0].relu().float(), *network.network[-1].state_dict().values())
    )
    assert 0 < (q_values - expected).abs().max() < 0.03 * expected.abs().max() and torch.equal(
        obs, before
    )

"""The method by hand: loss and gradient, lambda, periodic work, actions, both networks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from qdagger_dqn_atari_impalacnn import (
    NETWORKS,
    AtariNetwork,
    Batch,
    act,
    compute_lambda,
    due,
    qdagger_loss,
)


def test_large_q_values_at_a_low_temperature_stay_finite():
    """Probabilities that underflow to 0 must not turn the divergence into nan or inf."""
    q_values = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    zero = torch.zeros(1)
    batch = Batch(
        obs=None,
        actions=zero.long(),
        returns=zero,
        discounts=zero,
        next_obs=None,
        teacher_q_values=-q_values,
    )

    loss, _, distill_loss = qdagger_loss(q_values, q_values, batch, 1.0, temperature=0.1)
    (gradient,) = torch.autograd.grad(loss, q_values)

    assert distill_loss.item() == 4000
    assert gradient.isfinite().all()


@pytest.mark.parametrize("huber", [False, True])
@pytest.mark.parametrize(
    ("weight", "temperature"), [(0.0, 1.0), (0.7, 0.1), (0.7, 4.0), (torch.tensor(3.0), 0.5)]
)
def test_loss_and_gradient_by_formula(huber, weight, temperature):
    """The gradient has two parts, for B transitions and the temperature T.

    On the action taken it is 2 (Q - y) / B, under Huber the clipped error over B. On every action
    it is weight (student - teacher) / (T B), of their probabilities. Nothing flows into what
    targets are made of, even where it could.
    """
    torch.manual_seed(0)
    size = 7
    rows = torch.arange(size)
    q_values, next_q_values, teacher_q_values = torch.randn(3, size, 5).requires_grad_().unbind()
    discounts = 0.99**rows
    discounts[1::3] = 0  # these have terminated
    batch = Batch(
        obs=None,
        actions=torch.randint(5, (size,)),
        returns=torch.randn(size),
        discounts=discounts,
        next_obs=None,
        teacher_q_values=teacher_q_values,
    )

    loss, td_loss, distill_loss = qdagger_loss(
        q_values, next_q_values, batch, weight, temperature, huber
    )
    gradient, next_gradient, teacher_gradient = torch.autograd.grad(
        loss, [q_values, next_q_values, teacher_q_values], allow_unused=True
    )

    td_targets = batch.returns + discounts * next_q_values.amax(1)
    errors = (q_values[rows, batch.actions] - td_targets).detach()
    if huber:
        expected_td_loss = torch.where(errors.abs() < 1, errors**2 / 2, errors.abs() - 0.5).mean()
        td_gradient = errors.clamp(-1, 1) / size
    else:
        expected_td_loss = (errors**2).mean()
        td_gradient = 2 * errors / size

    student = Categorical(logits=q_values.detach() / temperature)
    teacher = Categorical(logits=teacher_q_values.detach() / temperature)
    divergence = kl_divergence(teacher, student).mean()
    expected_gradient = weight * (student.probs - teacher.probs) / (temperature * size)
    expected_gradient[rows, batch.actions] += td_gradient

    reverse = kl_divergence(student, teacher).mean()
    assert abs(divergence - reverse) > 1e-3 * divergence, "this case cannot tell directions apart"
    assert errors.abs().min() < 1 < errors.abs().max(), "this case cannot tell Huber from squares"

    assert next_gradient is None
    assert teacher_gradient is None
    torch.testing.assert_close(gradient, expected_gradient)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(td_loss, expected_td_loss, **close)
    torch.testing.assert_close(distill_loss, divergence, **close)
    torch.testing.assert_close(loss, expected_td_loss + weight * divergence, **close)


@pytest.mark.parametrize(
    ("student", "teacher", "baseline", "expected"),
    [
        # Breakout's scores, which begin at 0.
        (0, 400, 0, 1),
        (100, 400, 0, 0.75),
        (300, 400, 0, 0.25),
        (400, 400, 0, 0),
        (4000, 400, 0, 0),
        # A student below 0: Pong's -21 is not 2.07.
        (-1, 400, 0, 1),
        (-21, 19.7, 0, 1),
        (9.85, 19.7, 0, 0.5),
        # The same above the score of random play.
        (-20.7, 19.7, -20.7, 1),
        (-0.5, 19.7, -20.7, 0.5),
        (21, 19.7, -20.7, 0),
        (-21, 19.7, -20.7, 1),
        # A teacher below 0.
        (-20, -10, -20, 1),
        (-17.5, -10, -20, 0.75),
        (-10, -10, -20, 0),
        (-5, -10, -20, 0),
    ],
)
def test_lambda_is_the_share_of_the_teachers_return_that_ten_games_lack(
    student, teacher, baseline, expected
):
    """1 - (G_student - baseline) / (G_teacher - baseline), clipped; 1 before ten games."""
    spread = (-40, -30, -20, -10, 0, 0, 10, 20, 30, 40)
    scores = [student + each for each in spread]

    lambda_ = compute_lambda(scores, teacher, baseline)
    assert lambda_ == pytest.approx(expected)
    assert type(lambda_) is float

    for too_few in (0, 1, 9):
        assert compute_lambda(scores[:too_few], teacher, baseline) == 1


@given(strategies.integers(0, 500), strategies.integers(1, 60), strategies.integers(0, 80))
def test_due_looks_at_every_step_of_a_stride(step, stride, every):
    """0 means never. Strides no longer than the period are due as often as single steps."""

    def single_step_is_due(number: int) -> bool:
        return every > 0 and number % every == 0

    end = step + stride
    expected = any(single_step_is_due(number) for number in range(step + 1, end + 1))
    assert due(step, end, every) is expected

    begins = range(0, step * stride, stride)
    times_due = sum(due(begin, begin + stride, every) for begin in begins)
    if every == 0:
        assert times_due == 0
    elif stride <= every:
        assert times_due == step * stride // every


@pytest.mark.parametrize("epsilon", [0.0, 0.4, torch.tensor(0.4), 1.0])
@pytest.mark.parametrize("num_actions", [4, 9, 18])
def test_act_takes_the_best_action_but_explores_uniformly_as_often_as_epsilon_says(
    num_actions, epsilon
):
    """By chi-square over all pairs of the best and the taken action, within four deviations.

    Rows are independent of one another.
    """

    def network(obs: Tensor) -> Tensor:
        return 1 * obs  # observations that are Q-values already

    generator = torch.Generator().manual_seed(3)
    q_values = torch.randn(90_000, num_actions, generator=generator).requires_grad_()

    actions, returned = act(network, torch.Generator().manual_seed(0), q_values, epsilon)
    assert torch.equal(returned, q_values)
    assert not returned.requires_grad
    assert actions.dtype == torch.int64

    best = q_values.argmax(1)
    pairs = best * num_actions + actions
    counts = torch.bincount(pairs, minlength=num_actions**2).view(num_actions, num_actions)
    shares = (1 - epsilon) * torch.eye(num_actions) + epsilon / num_actions
    expected = torch.bincount(best)[:, None] * shares
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    freedom = num_actions * (num_actions - 1)
    deviation = (2 * freedom) ** 0.5
    assert chi_square < freedom + 4 * deviation

    greedy = (actions == best).float()
    share = shares[0, 0].item()
    both_of_neighbours = (greedy[0::2] * greedy[1::2]).mean().item()
    assert both_of_neighbours == pytest.approx(share**2, abs=0.01)


def q_values_by_hand(name: str, state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Q-values from these tensors alone, all of which are used; pixels lie between 0 and 1."""
    unused = dict(state)

    def conv(key, x, **options):
        weight = unused.pop(f"network.{key}.weight")
        bias = unused.pop(f"network.{key}.bias")
        return F.conv2d(x, weight, bias, **options)

    def linear(key, x):
        weight = unused.pop(f"network.{key}.weight")
        bias = unused.pop(f"network.{key}.bias")
        return F.linear(x, weight, bias)

    def residual_block(key, x):
        inner = conv(f"{key}.conv0", x.relu(), padding=1)
        return x + conv(f"{key}.conv1", inner.relu(), padding=1)

    def nature(x):
        x = conv("0", x, stride=4).relu()
        x = conv("2", x, stride=2).relu()
        x = conv("4", x, stride=1).relu()
        x = linear("7", x.flatten(1)).relu()
        return linear("9", x)

    def impala(x):
        for nth in range(3):
            x = conv(f"{nth}.conv", x, padding=1)
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
            x = residual_block(f"{nth}.res_block0", x)
            x = residual_block(f"{nth}.res_block1", x)
        x = linear("5", x.relu().flatten(1)).relu()
        return linear("7", x)

    q_values = nature(pixels) if name == "nature" else impala(pixels)
    assert not unused
    return q_values


def network_and_images(name: str, num_actions: int) -> tuple[AtariNetwork, Tensor]:
    """Images have no symmetry, so that no layer, frame or skip connection can be misplaced."""
    torch.manual_seed(0)
    network = NETWORKS[name](num_actions).requires_grad_(False)
    images = torch.randint(256, (3, 4, 84, 84)).byte()
    return network, images


@pytest.mark.parametrize("name", ["nature", "impala"])
@pytest.mark.parametrize("num_actions", [4, 6, 9, 18])
def test_q_values_layer_by_layer(name, num_actions):
    """From uint8 to float32. Published teachers have these names and sizes."""
    network, obs = network_and_images(name, num_actions)
    state = network.state_dict()
    obs_before = obs.clone()
    expected = q_values_by_hand(name, state, obs / 255)
    of_flipped_stacks = q_values_by_hand(name, state, obs.flip(1) / 255)
    assert (expected - of_flipped_stacks).abs().max() > 1e-4, "frames look alike to it"

    network.to(memory_format=torch.channels_last)
    q_values = network(obs)
    of_one_image = network(obs[1:2])

    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(q_values, expected, **close)
    torch.testing.assert_close(of_one_image, expected[1:2], **close)
    assert torch.equal(obs, obs_before)

    size = sum(tensor.numel() for tensor in state.values())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    if name == "nature":
        assert size == 1_684_128 + num_actions * 513
    else:
        assert size == 1_089_232 + num_actions * 257


@pytest.mark.parametrize("name", ["nature", "impala"])
@pytest.mark.parametrize("num_actions", [4, 6, 9, 18])
def test_in_bfloat16_the_last_layer_still_multiplies_in_float32(name, num_actions):
    network, obs = network_and_images(name, num_actions)
    network.to(memory_format=torch.channels_last)
    obs_before = obs.clone()
    exact = network(obs)
    before_last_relu = []

    def remember(module, inputs, output):
        before_last_relu.append(output)

    network.network[-3].register_forward_hook(remember)
    network.amp = True
    q_values = network(obs)

    (hidden,) = before_last_relu
    assert hidden.dtype == torch.bfloat16
    assert q_values.dtype == torch.float32
    last = network.network[-1]
    expected = F.linear(hidden.relu().float(), last.weight, last.bias)
    torch.testing.assert_close(q_values, expected)
    largest_error = (q_values - exact).abs().max()
    assert 0 < largest_error < 0.03 * exact.abs().max()
    assert torch.equal(obs, obs_before)

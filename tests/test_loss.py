"""qdagger_loss against numbers worked out by hand and against torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from qdagger_dqn_atari_impalacnn import STACK, Batch, FrameReplay, qdagger_loss


def make_batch(actions, returns, discounts, teacher_q_values) -> Batch:
    """A batch without images, which the loss has no use for."""
    no_images = torch.empty(0, dtype=torch.uint8)
    return Batch(
        no_images,
        torch.tensor(actions),
        torch.tensor(returns, dtype=torch.float32),
        torch.tensor(discounts, dtype=torch.float32),
        no_images,
        torch.as_tensor(teacher_q_values, dtype=torch.float32),
    )


def random_case(batch_size: int = 7, num_actions: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """q_values that want a gradient, next_q_values and a batch in which some transitions terminate."""
    generator = torch.Generator().manual_seed(seed)
    q_values, next_q_values, teacher = torch.randn((3, batch_size, num_actions), generator=generator).unbind()
    actions = torch.randint(num_actions, (batch_size,), generator=generator).tolist()
    returns = torch.randn(batch_size, generator=generator).tolist()
    discounts = [0.0 if i % 3 == 1 else 0.99 for i in range(batch_size)]
    return q_values.requires_grad_(), next_q_values, make_batch(actions, returns, discounts, teacher)


def test_td_loss_by_hand():
    """Targets 1 + 0.5 * 4 = 3 and -1 + 0.25 * 8 = 1 against 2.5 and -2: (0.25 + 9) / 2."""
    q_values = torch.tensor([[9.0, 2.5, 9.0], [-2.0, 9.0, 9.0]])
    next_q_values = torch.tensor([[-7.0, 4.0, 3.0], [8.0, 1.0, 2.0]])
    batch = make_batch([1, 0], [1.0, -1.0], [0.5, 0.25], torch.zeros(2, 3))
    loss, td_loss, _ = qdagger_loss(q_values, next_q_values, batch, 0.0)
    assert td_loss.item() == pytest.approx(4.625)
    assert loss.item() == pytest.approx(4.625)


def test_distill_loss_by_hand():
    """KL of (1/4, 3/4) from (1/2, 1/2) is log(2) - H(1/4); a student who agrees adds 0; the mean halves it."""
    teacher = [[0.0, math.log(3)], [5.0, 4.0]]
    q_values = torch.tensor([[2.0, 2.0], [1.0, 0.0]])  # only differences between Q-values make a policy
    batch = make_batch([0, 0], [0.0, 0.0], [0.0, 0.0], teacher)
    _, _, distill_loss = qdagger_loss(q_values, torch.zeros(2, 2), batch, 1.0)
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert by_hand == pytest.approx(0.130812, abs=1e-6)
    assert distill_loss.item() == pytest.approx(by_hand / 2, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_distill_loss_is_kl_from_teacher_to_student(temperature):
    """torch.distributions knows the divergence, its direction and what a temperature does to a softmax."""
    q_values, next_q_values, batch = random_case()
    teacher = Categorical(logits=batch.teacher_q_values / temperature)
    student = Categorical(logits=q_values / temperature)
    expected, reverse = kl_divergence(teacher, student).mean(), kl_divergence(student, teacher).mean()
    _, td_loss, distill_loss = qdagger_loss(q_values, next_q_values, batch, 1.0, temperature)
    assert distill_loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(expected - reverse) > 1e-3 * expected, "this case cannot tell the two directions apart"
    assert td_loss.item() == qdagger_loss(q_values, next_q_values, batch, 1.0, 1.0)[1].item()


def test_temperature_is_a_division_of_both():
    """Q-values twice as large at twice the temperature are the same two policies."""
    q_values, next_q_values, batch = random_case()
    doubled = batch._replace(teacher_q_values=2 * batch.teacher_q_values)
    at_1, at_2 = (
        qdagger_loss(q_values, next_q_values, batch, 1.0, 1.0)[2],
        qdagger_loss(2 * q_values, next_q_values, doubled, 1.0, 2.0)[2],
    )
    assert at_1.item() == pytest.approx(at_2.item(), rel=1e-5)
    assert qdagger_loss(q_values, next_q_values, batch, 1.0, 2.0)[2].item() < 0.5 * at_1.item()


def test_large_q_values_at_a_low_temperature_stay_finite():
    """Probabilities that underflow to 0 must not turn the divergence into nan or inf."""
    q_values = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    batch = make_batch([0], [0.0], [0.0], [[-200.0, 0.0, 200.0]])
    loss, _, distill_loss = qdagger_loss(q_values, torch.zeros(1, 3), batch, 1.0, temperature=0.1)
    loss.backward()
    assert distill_loss.item() == pytest.approx(4000, rel=1e-5)
    assert torch.isfinite(q_values.grad).all()


def test_huber_is_square_near_zero_and_linear_beyond_one():
    """Errors 0.5 and -3: 0.5 * 0.25 and 3 - 0.5 under Huber, 0.25 and 9 squared; the distillation is as before."""
    q_values = torch.tensor([[0.5, 7.0], [-3.0, 7.0]])
    batch = make_batch([0, 0], [0.0, 0.0], [0.0, 0.0], [[1.0, 2.0], [3.0, 4.0]])
    _, squared, distill_loss = qdagger_loss(q_values, torch.zeros(2, 2), batch, 1.0)
    loss, huber, same_distill_loss = qdagger_loss(q_values, torch.zeros(2, 2), batch, 1.0, huber=True)
    assert squared.item() == pytest.approx((0.25 + 9) / 2)
    assert huber.item() == pytest.approx((0.125 + 2.5) / 2)
    assert same_distill_loss.item() == distill_loss.item()
    assert loss.item() == pytest.approx(huber.item() + distill_loss.item())


def test_termination_ignores_next_q_values_and_truncation_does_not():
    """Discount 0 cuts the bootstrap whatever the next Q-values say; a truncated step keeps its discount."""
    q_values = torch.tensor([[1.0, 0.0]])
    low, high = torch.tensor([[-50.0, -60.0]]), torch.tensor([[50.0, 60.0]])
    terminated = make_batch([0], [3.0], [0.0], torch.zeros(1, 2))
    truncated = make_batch([0], [3.0], [0.5], torch.zeros(1, 2))
    assert [qdagger_loss(q_values, next_q, terminated, 0.0)[1].item() for next_q in (low, high)] == [4.0, 4.0]
    assert qdagger_loss(q_values, low, truncated, 0.0)[1].item() == pytest.approx((1 - (3 - 25)) ** 2)
    assert qdagger_loss(q_values, high, truncated, 0.0)[1].item() == pytest.approx((1 - (3 + 30)) ** 2)


@pytest.mark.parametrize("huber", [False, True])
@pytest.mark.parametrize("times", [2, 16])
def test_independent_of_batch_size(times, huber):
    """A batch repeated k times has the same losses and moves shared weights by the same gradient."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5)
    features, (_, next_q_values, batch) = torch.randn(7, 6), random_case()
    results = []
    for k in (1, times):
        repeated = batch._replace(
            actions=batch.actions.repeat(k),
            returns=batch.returns.repeat(k),
            discounts=batch.discounts.repeat(k),
            teacher_q_values=batch.teacher_q_values.repeat(k, 1),
        )
        losses = qdagger_loss(layer(features.repeat(k, 1)), next_q_values.repeat(k, 1), repeated, 0.7, 0.5, huber)
        results.append((torch.stack(losses).detach(), *torch.autograd.grad(losses[0], list(layer.parameters()))))
    for once, repeated in zip(*results, strict=True):
        torch.testing.assert_close(once, repeated, rtol=1e-4, atol=1e-6)


def test_gradient_by_formula():
    """2 (Q - y) / B on the action taken, plus weight (student - teacher) / (T B) on every action."""
    q_values, next_q_values, batch = random_case()
    weight, temperature = 0.7, 0.5
    qdagger_loss(q_values, next_q_values, batch, weight, temperature)[0].backward()
    q, batch_size = q_values.detach(), len(q_values)
    student = torch.softmax(q / temperature, 1)
    teacher = torch.softmax(batch.teacher_q_values / temperature, 1)
    expected = weight * (student - teacher) / (temperature * batch_size)
    for i, action in enumerate(batch.actions.tolist()):
        target = batch.returns[i] + batch.discounts[i] * next_q_values[i].max()
        expected[i, action] += 2 * (q[i, action] - target) / batch_size
    torch.testing.assert_close(q_values.grad, expected)


def test_gradient_flows_only_into_q_values():
    """Targets are constants: neither the target network nor the teacher is trained, even where they could be."""
    q_values, next_q_values, batch = random_case()
    next_q_values.requires_grad_()
    batch.teacher_q_values.requires_grad_()
    qdagger_loss(q_values, next_q_values, batch, 1.0)[0].backward()
    assert q_values.grad.abs().sum() > 0
    assert next_q_values.grad is None or not next_q_values.grad.any()
    assert batch.teacher_q_values.grad is None or not batch.teacher_q_values.grad.any()


def test_weight_may_be_a_number_or_a_tensor():
    """loss = td_loss + weight * distill_loss, and only `loss` is weighted."""
    q_values, next_q_values, batch = random_case()
    weight = torch.zeros(())
    for value in (0.0, 0.25, 1.0, 32.0):
        weight.fill_(value)
        by_number = qdagger_loss(q_values, next_q_values, batch, value)
        by_tensor = qdagger_loss(q_values, next_q_values, batch, weight)
        assert [x.item() for x in by_number] == [x.item() for x in by_tensor]
        assert all(x.shape == () for x in by_tensor)
        loss, td_loss, distill_loss = (x.item() for x in by_number)
        assert td_loss > 0.1 and distill_loss > 0.1, "this case cannot tell the terms apart"
        assert loss == pytest.approx(td_loss + value * distill_loss, rel=1e-6)


def test_td_loss_is_the_n_step_formula():
    """y = r_t + g r_t+1 + g^2 r_t+2 + g^3 max Q(s_t+3), shorter at an end and without max Q if it is a termination."""
    gamma, n_step, rewards = 0.9, 3, [1.0, -1.0, 0.5, 0.25, 2.0, -3.0, 1.5, 4.0, -0.5, 1.0]
    termination, truncation = 3, 7  # the steps that end the first and the second episode

    def grey(step: int) -> int:
        """Of the image before `step`."""
        return 2 * step

    def grey_after(step: int) -> int:
        """Of the image that `step` led to, which no step follows if it was an episode's last."""
        return 101 if step in (termination, truncation) else grey(step + 1)

    def q_values(newest: torch.Tensor) -> torch.Tensor:
        return torch.stack([newest, 10 - newest], 1)  # either action is the better one somewhere

    replay = FrameReplay(100, 1, 2)
    for step, reward in enumerate(rewards):
        images = [torch.full((1, STACK, 84, 84), shade, dtype=torch.uint8) for shade in (grey(step), grey_after(step))]
        ends = [torch.tensor([step == end]) for end in (termination, truncation)]
        replay.add(images[0], torch.tensor([step % 2]), torch.tensor([reward]), *ends, images[1])

    batch = replay.sample(64, n_step, gamma, torch.Generator().manual_seed(0))
    newest, next_newest = (images[:, -1, 0, 0].float() for images in (batch.obs, batch.next_obs))
    errors = []
    for shade in newest.int().tolist():
        start, target, discount = shade // 2, 0.0, 1.0
        for step in range(start, start + n_step):
            target += discount * rewards[step]
            discount *= gamma
            if step in (termination, truncation):
                break
        if step != termination:
            target += discount * max(grey_after(step), 10 - grey_after(step))
        errors.append([shade, 10 - shade][start % 2] - target)
    assert len(set(errors)) == len(rewards) - n_step + 1, "every transition should have been drawn"
    td_loss = qdagger_loss(q_values(newest), q_values(next_newest), batch, 0.0)[1]
    assert td_loss.item() == pytest.approx(sum(error**2 for error in errors) / len(errors), rel=1e-5)

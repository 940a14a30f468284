"""The small functions that decide how much, how often and at random: epsilon, lambda, periodic work, actions."""

from itertools import pairwise

import pytest
import torch

from qdagger_dqn_atari_impalacnn import act, distill_coefficient, due, linear_schedule


def test_linear_schedule_by_hand():
    """Start, quarter, middle, last step before the end, end, and far beyond it."""
    values = [linear_schedule(1.0, 0.2, 100, step) for step in (0, 25, 50, 99, 100, 101, 10**9)]
    assert values == pytest.approx([1.0, 0.8, 0.6, 0.208, 0.2, 0.2, 0.2])
    assert linear_schedule(1.0, 0.01, 1_000_000, 500_000) == pytest.approx(0.505)


def test_linear_schedule_falls_in_equal_steps():
    """Constant differences, and the end value exactly: 0.01 and not nearly 0.01."""
    values = [linear_schedule(1.0, 0.01, 640, step) for step in range(700)]
    assert [a - b for a, b in pairwise(values[:641])] == pytest.approx([0.99 / 640] * 640)
    assert set(values[640:]) == {0.01}


def test_linear_schedule_without_duration_is_at_its_end():
    """A share of 0 of the steps means no exploration phase at all, not a division by zero."""
    assert linear_schedule(1.0, 0.05, 0, 0) == 0.05
    assert linear_schedule(1.0, 0.05, 0.0, 3) == 0.05


def test_linear_schedule_can_rise_and_take_a_broken_duration():
    """Durations are a fraction of a number of steps, so seldom whole."""
    assert linear_schedule(0.0, 1.0, 2.5, 1) == pytest.approx(0.4)
    assert linear_schedule(0.0, 1.0, 2.5, 2) == pytest.approx(0.8)
    assert linear_schedule(0.0, 1.0, 2.5, 3) == 1.0


def test_due_by_brute_force():
    """Look at every single step of a stride for a multiple; 0 means never."""
    for every in range(13):
        for stride in range(1, 30):
            for step in range(60):
                passed = range(step + 1, step + stride + 1)
                expected = every > 0 and any(one % every == 0 for one in passed)
                assert due(step, stride, every) is expected, (step, stride, every)


@pytest.mark.parametrize("stride", [1, 3, 4, 7, 100])
def test_due_counts_the_same_under_any_stride(stride):
    """As often as a loop of single steps, as long as a stride is no longer than the period."""
    steps = 100 * 7 * 12
    assert sum(due(step, stride, 100) for step in range(0, steps, stride)) == steps // 100
    assert not any(due(step, stride, 0) for step in range(0, steps, stride))


def test_lambda_follows_the_ratio_of_returns():
    """1 - G_student / G_teacher."""
    assert [distill_coefficient(g, 400.0) for g in (0.0, 100.0, 300.0, 400.0)] == pytest.approx([1.0, 0.75, 0.25, 0.0])


def test_lambda_is_clipped_at_both_ends():
    """A student above its teacher is left alone; a negative return does not push lambda above 1."""
    assert distill_coefficient(401.0, 400.0) == 0
    assert distill_coefficient(4000.0, 400.0) == 0
    assert distill_coefficient(-1.0, 400.0) == 1


def test_lambda_is_1_while_no_return_is_known():
    """Whatever the teacher is worth and however long it takes."""
    assert distill_coefficient(None, 400.0) == 1
    assert distill_coefficient(None, 19.0, -20.7, step=10**9) == 1
    assert distill_coefficient(None, 400.0, step=9, distill_steps=10) == 1


def test_lambda_on_pong():
    """A beginner at -21 beside a teacher at 19.7 gets 1, not 2.07; above random, half of the way is one half."""
    assert distill_coefficient(-21.0, 19.7) == 1
    assert distill_coefficient(9.85, 19.7) == pytest.approx(0.5)
    random_return, teacher_return = -20.7, 19.7
    halfway = (random_return + teacher_return) / 2
    assert distill_coefficient(random_return, teacher_return, random_return) == pytest.approx(1.0)
    assert distill_coefficient(halfway, teacher_return, random_return) == pytest.approx(0.5)
    assert distill_coefficient(teacher_return, teacher_return, random_return) == pytest.approx(0.0)
    assert distill_coefficient(0.0, teacher_return, random_return) == pytest.approx(1 - 20.7 / 40.4)
    assert distill_coefficient(-21.0, teacher_return, random_return) == 1
    assert distill_coefficient(21.0, teacher_return, random_return) == 0


def test_lambda_of_a_teacher_below_zero():
    """Above the random baseline even a teacher at -10 can be reached in quarters."""
    returns = (-20.0, -17.5, -15.0, -12.5, -10.0, -5.0)
    values = [distill_coefficient(g, -10.0, -20.0) for g in returns]
    assert values == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_lambda_is_cut_off_at_distill_steps():
    """The last step with a teacher is distill_steps - 1, returns known or not; unset never cuts."""
    for student_return, before in ((None, 1.0), (100.0, 0.75), (-5.0, 1.0)):
        values = [distill_coefficient(student_return, 400.0, 0.0, step, 1000) for step in (0, 999, 1000, 1001)]
        assert values == [before, before, 0.0, 0.0]
        assert distill_coefficient(student_return, 400.0, step=10**12) == before
    assert distill_coefficient(None, 400.0, step=0, distill_steps=0) == 0


def spread(batch_size: int, num_actions: int) -> torch.Tensor:
    """Q-values whose best action differs from row to row, so that taking the same one everywhere shows."""
    return torch.randn((batch_size, num_actions), generator=torch.Generator().manual_seed(3))


def test_act_without_exploration_takes_the_best_action():
    """Argmax for every row; the Q-values come back as the network gave them, without a graph."""
    layer = torch.nn.Linear(8, 6)
    obs = torch.randn((500, 8), generator=torch.Generator().manual_seed(1))
    actions, q_values = act(layer, obs, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(q_values, layer(obs)) and not q_values.requires_grad
    assert torch.equal(actions, layer(obs).argmax(1))
    assert actions.dtype == torch.int64 and actions.shape == (500,)
    assert len(actions.unique()) > 1


@pytest.mark.parametrize("num_actions", [4, 6, 9, 18])
def test_act_with_full_exploration_is_uniform(num_actions):
    """Chi-square over all actions, of all rows and of those whose best action is the first."""
    q_values = spread(90_000, num_actions)
    actions, _ = act(lambda obs: obs, q_values, 1.0, torch.Generator().manual_seed(0))
    quantile = {4: 16.27, 6: 20.52, 9: 26.12, 18: 40.79}[num_actions]  # 0.999, one degree of freedom less than actions
    for chosen in (actions, actions[q_values.argmax(1) == 0]):
        counts, expected = torch.bincount(chosen, minlength=num_actions), len(chosen) / num_actions
        assert len(counts) == num_actions
        assert ((counts - expected) ** 2 / expected).sum().item() < quantile


def test_act_explores_as_often_as_epsilon_says():
    """The best action has 1 - epsilon + epsilon / n, and rows explore independently of each other."""
    q_values = spread(100_000, 4)
    actions, _ = act(lambda obs: obs, q_values, 0.4, torch.Generator().manual_seed(0))
    greedy = (actions == q_values.argmax(1)).float()
    assert greedy.mean().item() == pytest.approx(0.7, abs=0.005)  # three standard deviations are 0.0043
    both = (greedy[0::2] * greedy[1::2]).mean().item()
    assert both == pytest.approx(0.49, abs=0.008)


def test_act_repeats_itself_only_with_the_same_seed():
    """The generator given is the only source of chance, and it moves on from call to call."""
    q_values = spread(200, 6)

    def three_calls(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [act(lambda obs: obs, q_values, 0.5, generator)[0].tolist() for _ in range(3)]

    torch.manual_seed(0)
    first = three_calls(7)
    torch.manual_seed(1)
    assert three_calls(7) == first
    assert three_calls(8) != first
    assert first[0] != first[1] != first[2]

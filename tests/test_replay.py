"""FrameReplay against a naive store that keeps every stacked observation as it was seen."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from qdagger_dqn_atari_impalacnn import STACK, FrameReplay


class NaiveStore:
    """Whole transitions, one list per environment, and n-step returns by following them."""

    def __init__(self, num_envs: int):
        self.steps = [[] for _ in range(num_envs)]

    def n_step(self, env: int, start: int, n_step: int, gamma: float):
        """(obs, action, n-step return, discount, next_obs) from `start`, or None if rewards are still to come."""
        rewards, discount = 0.0, 1.0
        for step in self.steps[env][start : start + n_step]:
            rewards += discount * step["reward"]
            discount *= gamma
            if step["terminated"] or step["truncated"]:
                break
        else:
            if start + n_step > len(self.steps[env]):
                return None
        first = self.steps[env][start]
        return first["obs"], first["action"], rewards, 0.0 if step["terminated"] else discount, step["next_obs"]


def random_ends(steps: int, num_envs: int, seed: int = 0, p_end: float = 0.15) -> np.ndarray:
    """For each step and environment: 0, the episode goes on; 1, it terminates; 2, it is truncated."""
    return np.random.default_rng(seed).choice(3, p=[1 - p_end, p_end / 2, p_end / 2], size=(steps, num_envs))


def play(replay: FrameReplay, naive: NaiveStore, ends: np.ndarray, seed: int = 0) -> None:
    """Episodes with unique frames and random rewards, ended as `ends` (see random_ends) says, into both stores."""
    rng = np.random.default_rng(seed)
    frame = 0

    def new_frame() -> np.ndarray:
        nonlocal frame
        frame += 1
        return np.frombuffer(np.full(84 * 21, frame, dtype=np.uint32).tobytes(), dtype=np.uint8).reshape(84, 84)

    obs = np.stack([np.stack([new_frame()] * STACK) for _ in range(replay.num_envs)])
    for ends_now in np.asarray(ends):
        terminations, truncations = ends_now == 1, ends_now == 2
        actions = rng.integers(0, 6, replay.num_envs)
        rewards = rng.integers(-1, 2, replay.num_envs).astype(np.float64)
        last_obs = np.stack([np.concatenate([stack[1:], new_frame()[None]]) for stack in obs])
        scores = torch.tensor(rng.random((replay.num_envs, 6)), dtype=torch.float32)
        replay.add(obs, actions, rewards, terminations, truncations, last_obs, scores)
        for env in range(replay.num_envs):
            naive.steps[env].append(
                {
                    "obs": obs[env],
                    "action": actions[env],
                    "reward": rewards[env],
                    "terminated": terminations[env],
                    "truncated": truncations[env],
                    "next_obs": last_obs[env],
                    "scores": scores[env],
                }
            )
        obs = last_obs.copy()
        for env in np.flatnonzero(terminations | truncations):
            obs[env] = np.stack([new_frame()] * STACK)


def frame_number(obs) -> int:
    """The number that `play` painted into the newest frame."""
    return int(np.ascontiguousarray(np.asarray(obs)[-1]).view(np.uint32).flat[0])


def check(replay: FrameReplay, naive: NaiveStore, n_step: int, capacity: int, draws: int = 2000) -> None:
    """Stacks, n-step returns, discounts and next observations are right, and all that should be drawn is."""
    index = {frame_number(s["obs"]): (env, t) for env, of_env in enumerate(naive.steps) for t, s in enumerate(of_env)}
    batch = replay.sample(draws, n_step, 0.9, torch.Generator().manual_seed(0))
    drawn = set()
    for i in range(draws):
        env, time = index[frame_number(batch.obs[i])]
        if (env, time) in drawn:
            continue
        drawn.add((env, time))
        expected = naive.n_step(env, time, n_step, 0.9)
        assert expected is not None, "drawn before its rewards were known"
        obs, action, returns, discount, next_obs = expected
        np.testing.assert_array_equal(batch.obs[i], obs)
        assert batch.actions[i] == action
        assert batch.returns[i].item() == pytest.approx(returns, abs=1e-6)
        assert batch.discounts[i].item() == pytest.approx(discount, abs=1e-6)
        if discount > 0:
            np.testing.assert_array_equal(batch.next_obs[i], next_obs)
        assert torch.equal(batch.teacher_q_values[i], naive.steps[env][time]["scores"])
    # Nothing that should be there is missing: all that fits, but the newest n - 1 whose rewards are to come.
    of_env = math.ceil(capacity / replay.num_envs)
    for env, steps in enumerate(naive.steps):
        truncated = sum(s["truncated"] for s in steps[-of_env:])
        kept = range(max(0, len(steps) - (of_env - truncated)), len(steps) - n_step + 1)
        assert {(env, time) for time in kept} <= drawn


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("steps", [6, 40, 400])
def test_samples_are_what_a_naive_store_holds(num_envs, n_step, steps):
    """Before and after the ring has wrapped around."""
    replay, naive = FrameReplay(60 * num_envs, num_envs, 6), NaiveStore(num_envs)
    play(replay, naive, random_ends(steps, num_envs, seed=steps))
    check(replay, naive, n_step, 60 * num_envs)


@pytest.mark.parametrize(
    "examples", [pytest.param(25, id="short"), pytest.param(2000, id="long", marks=pytest.mark.long)]
)
def test_samples_of_any_history_are_what_a_naive_store_holds(examples):
    """Any number of environments, capacity, n and sequence of ends that hypothesis thinks of."""

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(data=strategies.data())
    def holds(data):
        num_envs, n_step = data.draw(strategies.integers(1, 3)), data.draw(strategies.integers(1, 5))
        capacity = data.draw(strategies.integers(n_step * num_envs, 40))
        ends = data.draw(
            strategies.lists(
                strategies.lists(strategies.integers(0, 2), min_size=num_envs, max_size=num_envs),
                min_size=n_step,
                max_size=60,
            )
        )
        replay, naive = FrameReplay(capacity, num_envs, 6), NaiveStore(num_envs)
        play(replay, naive, np.array(ends))
        check(replay, naive, n_step, capacity, draws=600)

    holds()


def test_capacity_is_what_can_be_drawn():
    replay, naive = FrameReplay(50, 1, 6), NaiveStore(1)
    play(replay, naive, np.zeros((500, 1)))
    batch = replay.sample(5000, 1, 0.99, torch.Generator().manual_seed(0))
    assert {frame_number(obs) for obs in batch.obs} == {frame_number(s["obs"]) for s in naive.steps[0][-50:]}


def test_draws_are_uniform_over_environments_and_time():
    replay, naive = FrameReplay(40, 4, 6), NaiveStore(4)
    play(replay, naive, np.zeros((200, 4)))
    batch = replay.sample(8000, 1, 0.99, torch.Generator().manual_seed(0))
    counts = np.unique([frame_number(obs) for obs in batch.obs], return_counts=True)[1]
    assert len(counts) == 40
    chi_square = float(((counts - 200) ** 2 / 200).sum())
    assert chi_square < 72.1  # 0.999 quantile at 39 degrees of freedom


def test_state_round_trip_continues_identically():
    replay, naive = FrameReplay(60, 2, 6), NaiveStore(2)
    play(replay, naive, random_ends(100, 2))
    restored = FrameReplay(60, 2, 6)
    restored.load_state_dict({name: value.clone() for name, value in replay.state_dict().items()})
    for one in (replay, restored):
        play(one, NaiveStore(2), random_ends(30, 2, seed=7), seed=7)
    a, b = (one.sample(64, 3, 0.99, torch.Generator().manual_seed(1)) for one in (replay, restored))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_state_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="another type or shape"):
        FrameReplay(60, 2, 6).load_state_dict(FrameReplay(60, 2, 4).state_dict())


def test_a_frame_is_stored_once():
    replay = FrameReplay(1000, 4, 6)
    assert sum(value.nbytes for value in replay.state_dict().values()) < 1.02 * 7_140 * 1000

"""FrameReplay against a naive store that keeps every whole stack as it was seen."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies
from scipy.stats import chisquare

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import (
    STACK,
    FrameReplay,
    GameStep,
    load_teacher_buffer,
    pack,
    unpack,
    write,
)

GAMMA = 0.9


class Doubled:
    """A replay, and beside it each step with whole stacks; the teacher's Q-values are (time, environment)."""

    def __init__(self, capacity: int, num_envs: int):
        self.capacity, self.num_envs, self.frames_painted = capacity, num_envs, 0
        self.replay, self.steps = FrameReplay(capacity, num_envs, 2), []

    def add(self, obs, actions, rewards, terminations, truncations) -> None:
        names = torch.tensor([[len(self.steps), env] for env in range(self.num_envs)]).float()
        step = GameStep(actions, rewards, terminations, truncations, [])
        self.replay.add(torch.as_tensor(obs[:, -1]), step, names)
        self.steps.append((obs, actions, rewards, terminations, truncations))

    def new_frames(self) -> np.ndarray:
        """(num_envs, 84, 84), each full of its own number."""
        numbers = self.frames_painted + np.arange(self.num_envs, dtype=np.uint32)
        self.frames_painted += self.num_envs
        return numbers.repeat(84 * 21).view(np.uint8).reshape(self.num_envs, 84, 84)

    def play(self, ends: np.ndarray, seed: int = 0) -> None:
        """New games, whose steps go on (0), terminate (1), are truncated (2) or both (3): (steps, num_envs)."""
        rng = np.random.default_rng(seed)
        obs = self.new_frames()[:, None].repeat(STACK, axis=1)
        for now in ends:
            actions, rewards = (
                rng.integers(6, size=self.num_envs),
                rng.normal(size=self.num_envs).astype(np.float32),
            )
            self.add(obs, actions, rewards, (now & 1) > 0, now > 1)
            frames, ended = self.new_frames()[:, None], (now > 0)[:, None, None, None]
            obs = np.where(ended, frames, np.concatenate([obs[:, 1:], frames], axis=1))

    def transition(self, time: int, env: int, n_step: int) -> tuple:
        """(return, discount, next observation) from there, by following the steps one by one."""
        total, discount = 0.0, 1.0
        for obs, _, rewards, terminations, truncations in self.steps[time : time + n_step]:
            if truncations[env]:
                return total, discount, obs[env]
            total, discount = total + discount * rewards[env], discount * GAMMA
            if terminations[env]:
                return total, 0.0, None
        return total, discount, self.steps[time + n_step][0][env]

    def drawable(self, n_step: int) -> set[tuple[int, int]]:
        """All steps that fit, less the oldest 3, whose stacks lack frames, the newest n, and those truncated."""
        oldest = max(0, len(self.steps) - math.ceil(self.capacity / self.num_envs) + STACK - 1)
        times = range(oldest, len(self.steps) - n_step)
        return {
            (time, env)
            for time in times
            for env in range(self.num_envs)
            if not self.steps[time][-1][env]
        }

    def check(self, n_step: int) -> None:
        """Exactly those are drawn, and all of a transition is as it was seen."""
        wanted, drawn, generator = self.drawable(n_step), set(), torch.Generator().manual_seed(0)
        for _ in range(200):
            batch = self.replay.sample(128, n_step, GAMMA, generator)
            for i, (time, env) in enumerate(batch.teacher_q_values.int().tolist()):
                if (time, env) in drawn:
                    continue
                assert (time, env) in wanted
                drawn.add((time, env))
                total, discount, next_obs = self.transition(time, env, n_step)
                assert (batch.obs[i].numpy() == self.steps[time][0][env]).all()
                assert batch.actions[i] == self.steps[time][1][env]
                assert batch.returns[i].item() == pytest.approx(total, abs=1e-5)
                assert batch.discounts[i].item() == pytest.approx(discount, abs=1e-6)
                assert next_obs is None or (batch.next_obs[i].numpy() == next_obs).all()
            if drawn == wanted:
                return
        raise AssertionError(f"never drawn: {wanted - drawn}")


def random_ends(steps: int, num_envs: int, seed=0, share: float = 0.15) -> np.ndarray:
    rng, size = np.random.default_rng(seed), (steps, num_envs)
    return rng.choice([1, 1, 2, 3], size) * (rng.random(size) < share)


@pytest.mark.parametrize("examples", [40, pytest.param(3000, marks=pytest.mark.long)])
def test_samples_of_any_history_are_what_a_naive_store_holds(examples, monkeypatch):
    """Any number of games, room, n and ends, before and after the ring has wrapped around; saved, loaded, played on."""
    monkeypatch.setattr(qdagger, "BLOCK", 7)
    whole, parts = (
        strategies.integers,
        strategies.lists(strategies.integers(1, 40), min_size=1, max_size=3),
    )
    share = strategies.floats(0, 0.8, allow_subnormal=False)  # of steps that end an episode

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(whole(1, 16), whole(1, 5), whole(0, 20), whole(0, 15), parts, share, whole(0, 2**32))
    def holds(num_envs, n_step, rows, short, parts, share, seed):
        capacity = (
            n_step + STACK + rows
        ) * num_envs - short % num_envs  # room for so many more rows than it needs
        doubled = Doubled(capacity, num_envs)
        for part, steps in enumerate(parts):
            if part:
                state, doubled.replay = pack(doubled.replay), FrameReplay(capacity, num_envs, 2)
                unpack(state, doubled.replay)
                doubled.steps[-1][-1][:] = True  # the last step is truncated
            doubled.play(random_ends(steps, num_envs, [seed, part], share), seed)
        candidates = num_envs * (min(sum(parts), n_step + 1 + rows) - n_step)
        assume(len(doubled.drawable(n_step)) > 0.2 * candidates > 0)
        doubled.check(n_step)

    holds()


def test_draws_are_uniform_over_environments_and_time():
    """And no less so where steps are left out: a draw that hits one of them does not go to its neighbour."""
    doubled = Doubled(160, 4)
    doubled.play(random_ends(200, 4, share=0.6))
    generator = torch.Generator().manual_seed(0)
    batches = [doubled.replay.sample(500, 1, GAMMA, generator).teacher_q_values for _ in range(20)]
    drawn, counts = torch.cat(batches).unique(dim=0, return_counts=True)
    assert {tuple(step) for step in drawn.int().tolist()} == doubled.drawable(1)
    assert len(counts) < 120 and chisquare(counts).pvalue > 0.001


def test_a_frame_is_stored_once_and_restored_from_a_far_smaller_file(tmp_path, monkeypatch):
    """Of a replay that has wrapped around; what is restored ends with a truncated row."""
    monkeypatch.setattr(qdagger, "BLOCK", 16)
    doubled, file, restored = Doubled(90, 3), tmp_path / "buffer.pt", FrameReplay(90, 3, 2)
    doubled.play(random_ends(100, 3))
    write({"made_with": {"num_envs": 3}, "replay": pack(doubled.replay)}, file)
    load_teacher_buffer(file, {"num_envs": 3}, restored)
    doubled.replay.excluded[99 % 30 * 3 + torch.arange(3)] = True
    tensors = {
        name: value for name, value in vars(doubled.replay).items() if torch.is_tensor(value)
    }
    assert all(torch.equal(value, getattr(restored, name)) for name, value in tensors.items())
    assert 84 * 84 < sum(value.nbytes for value in tensors.values()) / 90 < 84 * 84 + 50
    assert file.stat().st_size / 90 < 84 * 84 / 20

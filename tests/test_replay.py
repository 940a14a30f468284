"""FrameReplay against a naive store that keeps every whole stack as it was seen."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import tensors_of
from hypothesis import assume, given, settings, strategies
from scipy.stats import chisquare

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import (
    STACK,
    Batch,
    FrameReplay,
    GameStep,
    load_teacher_buffer,
    pack,
    unpack,
    write,
)

GAMMA = 0.9

# How a step may end an episode, as bits: it may do both.
TERMINATED = 1
TRUNCATED = 2


class Transition(NamedTuple):
    n_step_return: float
    discount: float
    next_obs: np.ndarray | None  # None if it terminated


class CheckedReplay:
    """A replay, and beside it lists of all steps and of the whole stacks before them.

    The teacher's Q-values are (time, environment): whatever is drawn tells which step it is.
    """

    def __init__(self, capacity: int, num_envs: int):
        self.capacity = capacity
        self.num_envs = num_envs
        self.replay = FrameReplay(capacity, num_envs, 2)
        self.steps: list[GameStep] = []
        self.obs: list[np.ndarray] = []  # uint8 (num_envs, 4, 84, 84)
        self.frames_painted = 0

    def add(self, obs: np.ndarray, step: GameStep) -> None:
        time = len(self.steps)
        names = torch.tensor([[time, env] for env in range(self.num_envs)]).float()
        self.replay.add(torch.as_tensor(obs[:, -1]), step, names)
        self.steps.append(step)
        self.obs.append(obs)

    def new_frames(self) -> np.ndarray:
        """uint8 (num_envs, 84, 84), each full of its own number."""
        numbers = self.frames_painted + np.arange(self.num_envs, dtype=np.uint32)
        self.frames_painted += self.num_envs
        pixels = numbers.repeat(84 * 21).view(np.uint8)  # a number has four bytes
        return pixels.reshape(self.num_envs, 84, 84)

    def play(self, ends: np.ndarray, seed: int = 0) -> None:
        """New games; `ends`, (steps, num_envs), has the bits of each step, or 0 if it goes on."""
        rng = np.random.default_rng(seed)
        obs = self.new_frames()[:, None].repeat(STACK, axis=1)
        for now in ends:
            step = GameStep(
                actions=rng.integers(6, size=self.num_envs),
                rewards=rng.normal(size=self.num_envs).astype(np.float32),
                terminations=(now & TERMINATED) > 0,
                excluded=(now & TRUNCATED) > 0,
                finished=[],
            )
            self.add(obs, step)

            frames = self.new_frames()[:, None]
            begins = (now > 0)[:, None, None, None]
            shifted = np.concatenate([obs[:, 1:], frames], axis=1)
            obs = np.where(begins, frames, shifted)

    def transition(self, time: int, env: int, n_step: int) -> Transition:
        """What begins there, by following the steps one by one."""
        total = 0.0
        discount = 1.0
        for now in range(time, time + n_step):
            step = self.steps[now]
            if step.excluded[env]:
                return Transition(total, discount, self.obs[now][env])
            total += discount * step.rewards[env]
            discount *= GAMMA
            if step.terminations[env]:
                return Transition(total, 0.0, None)
        return Transition(total, discount, self.obs[time + n_step][env])

    def drawable(self, n_step: int) -> set[tuple[int, int]]:
        """(time, environment) of all steps that fit, less those that must not be drawn.

        These are the oldest three, whose stacks lack frames, the newest n, and those truncated.
        """
        rows = math.ceil(self.capacity / self.num_envs)
        oldest = max(0, len(self.steps) - rows + STACK - 1)
        found = set()
        for time in range(oldest, len(self.steps) - n_step):
            for env in range(self.num_envs):
                if not self.steps[time].excluded[env]:
                    found.add((time, env))
        return found

    def check(self, n_step: int) -> None:
        """All that is drawable is drawn, nothing else, and each transition is as it was seen."""
        expected = self.drawable(n_step)
        drawn = set()
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            uniform = self.replay.random_numbers(128, generator)
            batch = self.replay.sample(128, n_step, GAMMA, uniform)
            names = batch.teacher_q_values.int().tolist()
            for index, (time, env) in enumerate(names):
                if (time, env) not in drawn:
                    drawn.add((time, env))
                    assert (time, env) in expected
                    self.check_row(batch, index, n_step)
            if drawn == expected:
                return
        raise AssertionError(f"never drawn: {expected - drawn}")

    def check_row(self, batch: Batch, index: int, n_step: int) -> None:
        row = Batch._make(part[index].numpy() for part in batch)
        time, env = row.teacher_q_values.astype(int).tolist()
        expected = self.transition(time, env, n_step)
        assert np.array_equal(row.obs, self.obs[time][env])
        assert row.actions == self.steps[time].actions[env]
        assert row.returns == pytest.approx(expected.n_step_return, abs=1e-5)
        assert row.discounts == pytest.approx(expected.discount, abs=1e-6)
        if expected.next_obs is not None:
            assert np.array_equal(row.next_obs, expected.next_obs)


def random_ends(steps: int, num_envs: int, seed=0, share: float = 0.15) -> np.ndarray:
    """For `play`: of all steps, about this share end an episode."""
    rng = np.random.default_rng(seed)
    size = (steps, num_envs)
    kinds = rng.choice([TERMINATED, TERMINATED, TRUNCATED, TERMINATED | TRUNCATED], size)
    return kinds * (rng.random(size) < share)


@pytest.mark.parametrize("examples", [40, pytest.param(3000, marks=pytest.mark.long)])
def test_samples_of_any_history_are_what_a_naive_store_holds(examples, monkeypatch):
    """Before and after the ring has wrapped around; saved, loaded, played on."""
    monkeypatch.setattr(qdagger, "BLOCK", 7)

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(
        num_envs=strategies.integers(1, 16),
        n_step=strategies.integers(1, 5),
        spare_rows=strategies.integers(0, 20),  # room for so many more rows than it needs
        short=strategies.integers(0, 15),  # of the last row, so many steps do not fit
        parts=strategies.lists(strategies.integers(1, 40), min_size=1, max_size=3),  # in steps
        share=strategies.floats(0, 0.8, allow_subnormal=False),  # of steps that end an episode
        seed=strategies.integers(0, 2**32),
    )
    def holds(num_envs, n_step, spare_rows, short, parts, share, seed):
        capacity = (n_step + STACK + spare_rows) * num_envs - short % num_envs
        checked = CheckedReplay(capacity, num_envs)
        for part, steps in enumerate(parts):
            if part > 0:
                state = pack(checked.replay)
                checked.replay = FrameReplay(capacity, num_envs, 2)
                unpack(state, checked.replay)
                checked.steps[-1].excluded[:] = True  # its successor is lost
            checked.play(random_ends(steps, num_envs, [seed, part], share), seed)

        # Where hardly any step may be drawn, a draw may find none.
        rows = min(sum(parts), n_step + 1 + spare_rows) - n_step
        candidates = num_envs * rows
        assume(candidates > 0)
        assume(len(checked.drawable(n_step)) > 0.2 * candidates)
        checked.check(n_step)

    holds()


def test_draws_are_uniform_over_environments_and_time():
    """Also where steps are left out: a draw that hits one of them goes to no neighbour."""
    checked = CheckedReplay(160, 4)
    checked.play(random_ends(200, 4, share=0.6))
    generator = torch.Generator().manual_seed(0)

    replay = checked.replay
    batches = []
    for _ in range(20):
        uniform = replay.random_numbers(500, generator)
        batches.append(replay.sample(500, 1, GAMMA, uniform))
    names = torch.cat([batch.teacher_q_values for batch in batches])
    drawn, counts = names.unique(dim=0, return_counts=True)

    drawn_steps = {tuple(step) for step in drawn.int().tolist()}
    assert drawn_steps == checked.drawable(n_step=1)
    assert len(counts) < 120
    assert chisquare(counts).pvalue > 0.001


def test_a_frame_is_stored_once_and_restored_from_a_far_smaller_file(tmp_path, monkeypatch):
    """Of a replay that has wrapped around; what is restored ends with a truncated row."""
    monkeypatch.setattr(qdagger, "BLOCK", 16)
    num_envs = 3
    rows = 30
    size = rows * num_envs
    checked = CheckedReplay(size, num_envs)
    checked.play(random_ends(100, num_envs))
    file = tmp_path / "buffer.pt"
    made_with = {"num_envs": num_envs}

    write({"made_with": made_with, "replay": pack(checked.replay)}, file)
    restored = FrameReplay(size, num_envs, 2)
    load_teacher_buffer(file, made_with, restored)

    newest = 99 % rows * num_envs + torch.arange(num_envs)
    checked.replay.excluded[newest] = True
    expected = tensors_of(checked.replay)
    for name, value in tensors_of(restored).items():
        assert torch.equal(value, expected[name]), name

    frame = 84 * 84  # bytes
    in_memory = sum(value.nbytes for value in expected.values())
    assert frame < in_memory / size < frame + 50
    assert file.stat().st_size / size < frame / 20


def test_a_buffer_in_which_all_is_excluded_still_gives_a_batch():
    """A few rows only, so that a run goes on all the same."""
    replay = FrameReplay(40, 4, 3)
    replay.set_written(10)
    batch = replay.sample(8, 3, 0.99, replay.random_numbers(8, torch.Generator()))
    assert batch.obs.shape == (8, 4, 84, 84)
    assert batch.discounts.isfinite().all()


@pytest.mark.parametrize("valid", [[], [0], [3], [0, 1, 2, 3]])
def test_a_draw_stays_among_what_is_stored(valid):
    """It goes to a valid step if there is one, be it the last that is drawn or the first."""
    checked = CheckedReplay(40, 4)
    checked.play(np.zeros((2, 4), dtype=int))
    checked.replay.excluded[:4] = True
    checked.replay.excluded[valid] = False
    uniform = torch.arange(4, dtype=torch.float64) / 4

    drawn = checked.replay.draw(8, 1, uniform).tolist()

    if valid:
        assert drawn == (8 * valid)[:8]
    else:
        assert set(drawn) <= {0, 1, 2, 3}

"""The environments on real games: frames, rewards, ends and returns, one game or several, up to what is stored."""

from contextlib import closing
from itertools import pairwise
from typing import NamedTuple

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.atari_wrappers import AtariWrapper

from qdagger_dqn_atari_impalacnn import STACK, Args, FrameReplay, finish_step, finished_games, make_env, make_envs

BREAKOUT, PONG, SPACE_INVADERS = "BreakoutNoFrameskip-v4", "PongNoFrameskip-v4", "SpaceInvadersNoFrameskip-v4"

# Pong whose games are truncated by the emulator. Its full name makes gym.make import this file first, which a worker
# process needs.
gym.register_envs(ale_py)
SHORT_FRAMES = 400
gym.register(
    "ShortPong-v0",
    entry_point="ale_py.env:AtariEnv",
    kwargs={**gym.spec(PONG).kwargs, "max_num_frames_per_episode": SHORT_FRAMES},
)
SHORT_PONG = f"{__name__}:ShortPong-v0"


class Step(NamedTuple):
    """What one game showed, did and answered, as seen without any automatic reset."""

    obs: np.ndarray
    action: int
    reward: float
    terminated: bool
    truncated: bool
    next_obs: np.ndarray  # the last one of its episode if that ended
    game: tuple[float, int] | None  # raw return and length in frames of a whole game that ended here


def random_actions(env_id: str, steps: int, seed: int = 0) -> np.ndarray:
    with closing(gym.make(env_id)) as env:
        return np.random.default_rng(seed).integers(env.action_space.n, size=steps)


def play_alone(env_id: str, seed: int, actions, repeat_action_probability: float = 0.0) -> list[Step]:
    """One make_env in this process, reset by hand at every end."""
    steps = []
    with closing(make_env(env_id, repeat_action_probability)) as env:
        obs = env.reset(seed=seed)[0]
        for action in actions:
            next_obs, reward, terminated, truncated, info = env.step(action)
            game = (info["episode"]["r"], info["episode"]["l"]) if "episode" in info else None
            steps.append(Step(obs, int(action), float(reward), terminated, truncated, next_obs, game))
            obs = env.reset()[0] if terminated or truncated else next_obs
    return steps


def assert_same(ours: list[Step], theirs: list[Step]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a[1:5] == b[1:5] and a.game == b.game
        np.testing.assert_array_equal(a.obs, b.obs)
        np.testing.assert_array_equal(a.next_obs, b.next_obs)


class SpyReplay(FrameReplay):
    """The real replay, which also keeps its arguments; the Q-values number the steps, so that samples can be told."""

    def __init__(self, capacity: int, num_envs: int, num_actions: int):
        super().__init__(capacity, num_envs, num_actions)
        self.steps: list[list[Step]] = [[] for _ in range(num_envs)]

    def add(self, obs, actions, rewards, terminations, truncations, next_obs, teacher_q_values=None):
        super().add(obs, actions, rewards, terminations, truncations, next_obs, teacher_q_values)
        for env, steps in enumerate(self.steps):
            step = Step(
                np.array(obs[env]),
                int(actions[env]),
                float(rewards[env]),
                bool(terminations[env]),
                bool(truncations[env]),
                np.array(next_obs[env]),
                None,
            )
            steps.append(step)


def record(env_id: str, num_envs: int, seed: int, actions, repeat_action_probability: float = 0.0) -> SpyReplay:
    """make_envs played through finish_step, every environment taking the same actions, nothing left out."""
    args = Args(env_id=env_id, repeat_action_probability=repeat_action_probability)
    replay = SpyReplay(num_envs * (len(actions) + 100), num_envs, 2)
    with closing(make_envs(args, num_envs)) as envs:
        obs = envs.reset(seed=seed)[0]
        for number, action in enumerate(actions):
            same_action = np.full(num_envs, action)
            envs.step_async(same_action)
            ids = torch.tensor([[number, env] for env in range(num_envs)], dtype=torch.float32)
            obs, infos = finish_step(envs, replay, obs, same_action, ids)
            for env, *game in finished_games(infos):
                replay.steps[env][-1] = replay.steps[env][-1]._replace(game=tuple(game))
    return replay


@pytest.fixture(scope="module")
def breakout() -> tuple[np.ndarray, SpyReplay]:
    actions = random_actions(BREAKOUT, 400)
    return actions, record(BREAKOUT, 2, 5, actions)


@pytest.fixture(scope="module")
def short_pong() -> tuple[np.ndarray, SpyReplay]:
    actions = random_actions(PONG, 250)
    return actions, record(SHORT_PONG, 2, 5, actions)


class EmulatorLog:
    """What the emulator returns below all wrappers: its last frames, rewards and games."""

    def __init__(self, env):
        self.frames, self.rewards, self.actions, self.over = [], [], [], []
        self.raw_step, self.raw_reset = env.unwrapped.step, env.unwrapped.reset
        env.unwrapped.step, env.unwrapped.reset = self.step, self.reset

    def step(self, action):
        result = frame, reward, terminated, truncated, _ = self.raw_step(action)
        self.frames = [*self.frames[-1:], frame]
        self.rewards.append(reward)
        self.actions.append(int(action))
        if terminated or truncated:
            self.over.append((sum(self.rewards), len(self.rewards)))
        return result

    def reset(self, **kwargs):
        self.rewards, self.actions = [], []
        return self.raw_reset(**kwargs)

    def take_over(self) -> list[tuple[float, int]]:
        """(raw return, frames) of the games that ended since the last call."""
        over, self.over = self.over, []
        return over


# --- One game against the reference ---


@pytest.mark.parametrize(("env_id", "steps"), [(BREAKOUT, 600), (PONG, 1000)])
def test_bit_identical_to_the_reference_wrappers(env_id, steps):
    """Stable-Baselines3's AtariWrapper with frames stacked by hand, through lost lives, game overs and resets."""
    env, reference = make_env(env_id), AtariWrapper(gym.make(env_id))
    assert env.observation_space.shape == (STACK, 84, 84) and env.observation_space.dtype == np.uint8
    obs, frame = env.reset(seed=11)[0], reference.reset(seed=11)[0]
    stack, ends, rewards_seen, images = [frame[..., 0]] * 4, 0, set(), set()
    for action in random_actions(env_id, steps, seed=1):
        np.testing.assert_array_equal(obs, np.stack(stack))
        obs, *answer, _ = env.step(action)
        frame, *reference_answer, _ = reference.step(action)
        assert answer == reference_answer
        stack = [*stack[1:], frame[..., 0]]
        rewards_seen.add(answer[0])
        images.add(obs[-1].tobytes())
        if answer[1] or answer[2]:
            np.testing.assert_array_equal(obs, np.stack(stack))
            ends += 1
            obs, frame = env.reset()[0], reference.reset()[0]
            stack = [frame[..., 0]] * 4
    assert ends > (10 if env_id == BREAKOUT else 0) and len(rewards_seen) > 1 and len(images) > steps / 3
    env.close()
    reference.close()


@pytest.mark.parametrize(("env_id", "gymnasium_is_off_by"), [(BREAKOUT, 0.5), (PONG, 2.0)])
def test_greys_are_those_of_opencv(env_id, gymnasium_is_off_by):
    """The max of the last two RGB frames, grey and area-resized by OpenCV; gymnasium's greys would not pass."""
    env = make_env(env_id)
    log = EmulatorLog(env)
    gymnasium_grey = gym.wrappers.GrayscaleObservation(gym.make(env_id)).observation
    ours, opencv, gymnasium = [], [], []
    env.reset(seed=3)
    for action in random_actions(env_id, 200):
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:  # an end may come between the frames of a step
            env.reset()
            continue
        brightest = np.maximum(*log.frames)
        ours.append(obs[-1])
        for greys, grey in ((opencv, cv2.cvtColor(brightest, cv2.COLOR_RGB2GRAY)), (gymnasium, None)):
            grey = gymnasium_grey(brightest) if grey is None else grey
            greys.append(cv2.resize(grey, (84, 84), interpolation=cv2.INTER_AREA))
    env.close()
    assert len(ours) > 150 and len({frame.tobytes() for frame in ours}) > 50
    ours, opencv, gymnasium = (np.stack(frames).astype(np.float64) for frames in (ours, opencv, gymnasium))
    assert np.abs(ours - opencv).mean() < 0.02
    assert np.abs(ours - gymnasium).mean() > gymnasium_is_off_by


@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_sticky_actions_reach_the_emulator(probability):
    """It is the emulator that repeats actions, frame by frame; the wrappers hand on what they are given."""
    env = make_env(BREAKOUT, probability)
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == probability
    log = EmulatorLog(env)
    env.reset(seed=2)
    before = len(log.actions)
    for action in (3, 2, 0, 3):
        env.step(action)
    assert log.actions[before:] == [3] * 4 + [2] * 4 + [0] * 4 + [3] * 4
    env.close()


def test_actions_do_not_stick_unless_asked():
    """Neither by default, although ale-py's newer environments do, nor to the same trajectory when asked."""
    env = make_env(SPACE_INVADERS)
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0
    env.close()
    actions = random_actions(SPACE_INVADERS, 100)
    frames = [play_alone(SPACE_INVADERS, 4, actions, probability)[-1].next_obs for probability in (0.0, 0.25)]
    assert not np.array_equal(*frames)


# --- Rewards, lives and games ---


def watch(env_id: str, num_envs: int, steps: int, seed: int | list[int]):
    """Per vector step: the learner's rewards and ends, finished_games, and what the emulators say is over."""
    envs = gym.vector.SyncVectorEnv(
        [lambda: make_env(env_id)] * num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
    )
    rng = np.random.default_rng(seed)
    with closing(envs):
        logs = [EmulatorLog(env) for env in envs.envs]
        envs.reset(seed=seed)
        for _ in range(steps):
            actions = rng.integers(envs.single_action_space.n, size=num_envs)
            _, rewards, terminations, truncations, infos = envs.step(actions)
            over = [(env, *game) for env, log in enumerate(logs) for game in log.take_over()]
            yield rewards, terminations, truncations, finished_games(infos), over


def test_clipped_rewards_for_the_learner_and_raw_returns_of_whole_games():
    """Space Invaders pays 5 to 30 points a hit: the learner sees 1, the report sums the points of all three lives."""
    clipped, steps, games = np.zeros(2), np.zeros(2, dtype=int), []
    for rewards, _, _, reported, over in watch(SPACE_INVADERS, 2, 1500, seed=8):
        assert set(rewards.tolist()) <= {-1.0, 0.0, 1.0}
        assert reported == over
        clipped += rewards
        steps += 1
        for env, game_return, frames in reported:
            assert game_return % 5 == 0 and game_return >= 5 * clipped[env] > 0
            # Four frames a step, a few more to start with and after each life, none of them counted as steps.
            assert 4 * steps[env] - 4 < frames < 4 * steps[env] + 100
            games.append(game_return)
            clipped[env] = steps[env] = 0
    assert len(games) >= 3 and len(set(games)) > 1


def test_a_lost_life_ends_an_episode_but_not_the_game():
    """Of all ends in eight games of Breakout only those of the emulator are reported, even when both kinds coincide."""
    lives_lost = games = coincidences = 0
    for _, terminations, truncations, reported, over in watch(BREAKOUT, 8, 300, seed=2):
        assert reported == over
        assert {env for env, *_ in over} <= set(np.flatnonzero(terminations))
        assert not truncations.any()
        games += len(over)
        lives_lost += terminations.sum() - len(over)
        coincidences += 0 < len(over) < terminations.sum()
    assert games >= 8 and coincidences >= 1
    assert 4 * games <= lives_lost <= 4 * (games + 8)  # five lives a game


def test_games_that_end_together_are_all_reported():
    """Three games with a time limit, two of them of the same seed: both in one list, the third in another."""
    together = []
    for _, _, truncations, reported, over in watch(SHORT_PONG, 3, 100, seed=[3, 3, 4]):
        assert reported == over
        assert np.flatnonzero(truncations).tolist() == [env for env, *_ in over]
        together += [[env for env, *_ in over]] * bool(over)
    assert sorted(together) == [[0, 1], [2]]


# --- Several games, and what is stored of them ---


@pytest.mark.parametrize("num_envs", [1, 3])
def test_same_seed_same_games(num_envs):
    """With sticky actions too, and environment i of seed s is the single environment of seed s + i."""
    actions = random_actions(SPACE_INVADERS, 250)
    first, again = (record(SPACE_INVADERS, num_envs, 20, actions, 0.25).steps for _ in range(2))
    for env in range(num_envs):
        assert_same(first[env], again[env])
        assert_same(first[env], play_alone(SPACE_INVADERS, 20 + env, actions, 0.25))
    last_images = {steps[-1].next_obs.tobytes() for steps in first}
    assert len(last_images) == num_envs, "environments of different seeds play the same game"


@pytest.mark.parametrize("recording", ["breakout", "short_pong"])
def test_stored_transitions_are_those_of_single_games(recording, request):
    """finish_step hands over what a single game shows when it is reset by hand, the last image of an episode too."""
    actions, replay = request.getfixturevalue(recording)
    env_id = BREAKOUT if recording == "breakout" else SHORT_PONG
    for env, steps in enumerate(replay.steps):
        assert_same(steps, play_alone(env_id, 5 + env, actions))


@pytest.mark.parametrize("recording", ["breakout", "short_pong"])
def test_no_transition_crosses_a_reset(recording, request):
    """next_obs is always obs moved on by one frame; behind an end the first frame stands four times."""
    _, replay = request.getfixturevalue(recording)
    for steps in replay.steps:
        ends = 0
        for step, following in pairwise(steps):
            np.testing.assert_array_equal(step.next_obs[:-1], step.obs[1:])
            if step.terminated or step.truncated:
                ends += 1
                assert (following.obs == following.obs[0]).all()
                assert not np.array_equal(step.next_obs, following.obs)
            else:
                np.testing.assert_array_equal(following.obs, step.next_obs)
        assert ends >= 2


@pytest.mark.parametrize("recording", ["breakout", "short_pong"])
def test_samples_are_the_steps_that_were_played(recording, request):
    """Through the real replay and back; only a termination is without a future."""
    _, replay = request.getfixturevalue(recording)
    batch = replay.sample(3000, 1, 0.9, torch.Generator().manual_seed(0))
    ends_drawn = 0
    for i, (number, env) in enumerate(batch.teacher_q_values.int().tolist()):
        step = replay.steps[env][number]
        assert batch.actions[i] == step.action and batch.returns[i] == step.reward
        assert batch.discounts[i].item() == pytest.approx(0.0 if step.terminated else 0.9)
        np.testing.assert_array_equal(batch.obs[i], step.obs)
        if not step.terminated:
            np.testing.assert_array_equal(batch.next_obs[i], step.next_obs)
        ends_drawn += step.terminated or step.truncated
    assert ends_drawn >= 10


def test_a_truncated_game_is_stored_with_its_last_image(short_pong):
    """A time limit truncates and never terminates: a game of that many frames, whose last image is not a reset's."""
    _, replay = short_pong
    numbers = [[number for number, step in enumerate(steps) if step.truncated] for steps in replay.steps]
    assert all(len(of_env) >= 2 for of_env in numbers)
    assert set(numbers[0]) - set(numbers[1]), "both always at once would not test the mask"
    for steps in replay.steps:
        for step, following in pairwise(steps):
            assert not step.terminated
            assert step.truncated == (step.game is not None)
            if step.truncated:
                assert step.game[1] == SHORT_FRAMES
                assert len({frame.tobytes() for frame in step.next_obs}) > 1, "the images of a reset are all alike"
                assert not np.array_equal(step.next_obs[-1], following.obs[-1])

"""The games: bit for bit those of the reference wrappers, one or several, up to what is stored of them."""

from itertools import pairwise
from typing import NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.atari_wrappers import AtariWrapper, NoopResetEnv

from qdagger_dqn_atari_impalacnn import STACK, Args, AtariGame, AtariGames, AtariVectorEnv, FrameReplay, evaluate

BREAKOUT, PONG, SPACE_INVADERS = "BreakoutNoFrameskip-v4", "PongNoFrameskip-v4", "SpaceInvadersNoFrameskip-v4"
SHORT_FRAMES = 400


@pytest.fixture
def short_games(monkeypatch):
    """Every game is truncated after so many frames."""

    class Short(AtariVectorEnv):
        def __init__(self, *args, **options):
            super().__init__(*args, max_num_frames_per_episode=SHORT_FRAMES, **options)

    monkeypatch.setattr("qdagger_dqn_atari_impalacnn.AtariVectorEnv", Short)


class Transition(NamedTuple):
    """What one game showed, did and answered."""

    obs: np.ndarray
    action: int
    reward: float
    terminated: bool
    truncated: bool
    next_obs: np.ndarray  # the last one of its episode if that ended
    game: tuple[float, int] | None  # raw return and length in frames of a whole game that ended here


def random_actions(env_id: str, steps: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(AtariGame(env_id, 0).num_actions, size=steps).tolist()


def play(game: AtariGame, actions: list[int]) -> list[Transition]:
    steps = []
    for action in actions:
        obs = game.obs
        game.send(action)
        reward, terminated, truncated, last_obs = game.recv()
        steps.append(Transition(obs, action, reward, terminated, truncated, last_obs, game.ended))
    return steps


def assert_same(ours: list[Transition], theirs: list[Transition]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a[1:5] == b[1:5] and a.game == b.game
        np.testing.assert_array_equal(a.obs, b.obs)
        np.testing.assert_array_equal(a.next_obs, b.next_obs)


# --- One game against the reference ---


class Reference:
    """Stable-Baselines3's AtariWrapper around gymnasium's environment, with frames stacked by hand."""

    def __init__(self, env_id: str):
        gym.register_envs(ale_py)
        self.env = AtariWrapper(gym.wrappers.RecordEpisodeStatistics(gym.make(env_id)))
        self.waiting = self.env
        while not isinstance(self.waiting, NoopResetEnv):
            self.waiting = self.waiting.env
        other = gym.make(env_id)  # another one, since a second game can begin differently from the first
        other.reset()
        self.own_frames = other.unwrapped.ale.getEpisodeFrameNumber()  # some games begin with some

    def reset(self, frames_waited: int) -> np.ndarray:
        """The next episode's first observation; a new game waits for so many frames of our count."""
        noops = frames_waited - self.own_frames
        self.waiting.override_num_noops = noops or None
        if noops:
            self.waiting.__dict__.pop("reset", None)
        else:  # the reference waits at least once
            self.waiting.reset = self.waiting.env.reset
        return np.repeat(self.env.reset()[0].transpose(2, 0, 1), STACK, axis=0)


def compare(env_id: str, steps: int, monkeypatch) -> tuple[int, int, set[float]]:
    """Play both with the same random actions; the episodes and games that ended, and the rewards seen."""
    waited, reset = [], AtariVectorEnv.reset

    def spy(*args, **options):
        frame, info = reset(*args, **options)
        waited.append(int(info["episode_frame_number"][0]))
        return frame, info

    monkeypatch.setattr(AtariVectorEnv, "reset", spy)
    game, reference, episodes, games, rewards = AtariGame(env_id, 3), Reference(env_id), 0, 0, set()
    stack = reference.reset(waited[-1])
    for action in random_actions(env_id, steps, seed=1):
        np.testing.assert_array_equal(game.obs, stack)
        game.send(action)
        reward, terminated, truncated, last_obs = game.recv()
        frame, *answer, info = reference.env.step(action)
        assert [np.sign(reward), terminated, truncated] == answer
        stack = np.concatenate([stack[1:], frame.transpose(2, 0, 1)])
        if not terminated:  # the image after which a game is over is never looked at
            np.testing.assert_array_equal(last_obs, stack)
        if game.ended:
            assert game.ended[0] == info["episode"]["r"] and 0 <= game.ended[1] - info["episode"]["l"] < 200
        if terminated or truncated:
            episodes, games = episodes + 1, games + bool(game.ended)
            stack = reference.reset(waited[-1])
        rewards.add(answer[0])
    return episodes, games, rewards


@pytest.mark.parametrize(
    "game, steps, ends, games",
    [
        ("Breakout", 1500, 30, 6),
        ("Pong", 1100, 1, 1),
        ("BeamRider", 1500, 3, 1),
        ("SpaceInvaders", 1000, 5, 1),
        ("Freeway", 2100, 1, 1),
    ],
)
def test_bit_identical_to_the_reference_wrappers(game, steps, ends, games, monkeypatch):
    """With lives and without, with FIRE and without; through lost lives, game overs and launches."""
    seen = compare(f"{game}NoFrameskip-v4", steps, monkeypatch)
    assert seen[0] >= ends and seen[1] >= games and len(seen[2]) > 1 - (game == "Freeway")


@pytest.mark.long
def test_every_game_is_bit_identical_to_the_reference_wrappers(monkeypatch):
    gym.register_envs(ale_py)
    ends = 0
    for env_id in sorted(env_id for env_id in gym.registry if env_id.endswith("NoFrameskip-v4")):
        ends += compare(env_id, 500, monkeypatch)[0]
        monkeypatch.undo()
    assert ends > 50


def test_a_game_begins_with_up_to_29_frames_of_waiting():
    waited = [int(AtariGame(PONG, seed).emulator.reset(seed=seed)[1]["episode_frame_number"][0]) for seed in range(40)]
    assert min(waited) < 5 and 24 < max(waited) < 30 and len(set(waited)) > 12


def test_actions_stick_only_when_asked():
    """Neither by default, although ale-py's newer environments do, nor to the same trajectory when asked."""
    actions = random_actions(SPACE_INVADERS, 100)
    plain, again, sticky = (
        play(AtariGame(SPACE_INVADERS, 4, probability), actions)[-1].next_obs for probability in (0.0, 0.0, 0.25)
    )
    assert np.array_equal(plain, again) and not np.array_equal(plain, sticky)
    sticks = [play(AtariGame(BREAKOUT, 4, 1.0), [action] * 30)[-1].next_obs for action in (2, 3)]
    assert np.array_equal(*sticks)  # always the last action: neither of them is ever taken


# --- Rewards, lives and games ---


def test_clipped_rewards_for_the_learner_and_raw_returns_of_whole_games():
    """Space Invaders pays 5 to 30 points a hit: the learner sees 1, the report sums the points of all three lives."""
    games, sums, ended = AtariGames(Args(env_id=SPACE_INVADERS), 2, seed=8), np.zeros(2), []
    rng = np.random.default_rng(0)
    for _ in range(1500):
        games.step_async(rng.integers(6, size=2))
        step = games.step_wait()
        assert step.rewards.dtype == np.float32 and set(step.rewards.tolist()) <= {-1.0, 0.0, 1.0}
        sums += step.rewards
        for env, game_return, frames in step.games:
            assert game_return % 5 == 0 and game_return >= 5 * sums[env] > 0 and frames > 400
            ended.append(game_return)
            sums[env] = 0
    assert len(ended) >= 3 and len(set(ended)) > 1


def test_a_lost_life_ends_an_episode_but_not_the_game():
    steps = play(AtariGame(BREAKOUT, 2), random_actions(BREAKOUT, 800))
    ends, games = sum(step.terminated for step in steps), sum(step.game is not None for step in steps)
    assert games >= 2 and 5 * games <= ends < 5 * (games + 1)  # five lives a game
    assert all(step.terminated for step in steps if step.game)


def test_games_that_end_together_are_all_reported(short_games):
    """Three games with a time limit, two of them of the same seed: both in one list, the third in another or alone."""
    games = AtariGames(Args(env_id=PONG), 3, 3)
    for game, seed in zip(games.games, (3, 3, 10)):
        game.restore(seed)
    together = []
    for _ in range(110):
        games.step_async(np.zeros(3, dtype=int))
        step = games.step_wait()
        assert np.flatnonzero(step.truncations).tolist() == [env for env, *_ in step.games]
        together += [[env for env, *_ in step.games]] * bool(step.games)
    assert [0, 1] in together or [0, 1, 2] in together
    assert sum(map(len, together)) >= 3


# --- The state of a game ---


@pytest.mark.parametrize("env_id", [BREAKOUT, PONG, SPACE_INVADERS])
@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_a_game_is_its_seed_and_its_actions(env_id, probability, monkeypatch):
    """The same observations, rewards and ends in another emulator, through lives, games and new seeds."""
    monkeypatch.setattr(AtariGame, "RESEEDED", 150)
    game, other = (AtariGame(env_id, seed, probability) for seed in (1, 2))
    play(game, random_actions(env_id, 1137))
    assert len(game.actions) < 1137 or env_id == PONG
    other.restore(game.seed, game.actions)
    np.testing.assert_array_equal(game.obs, other.obs)
    actions = random_actions(env_id, 700, seed=1)
    assert_same(play(game, actions), play(other, actions))


def test_what_is_no_state_of_a_game_is_refused():
    games = AtariGames(Args(), 2, 1)
    good = games.state_dict()
    bad = [(2**31, good[0][1]), (-1, good[0][1]), ("1", good[0][1]), (1, torch.tensor([4], dtype=torch.uint8))]
    bad += [(1, torch.zeros(2)), (1, torch.zeros(100_000, dtype=torch.uint8)), (1, torch.zeros((), dtype=torch.uint8))]
    for state in bad:
        with pytest.raises((ValueError, TypeError)):
            games.load_state_dict([good[0], state])
    with pytest.raises(ValueError):
        games.load_state_dict(good[:1])
    games.load_state_dict(good)


# --- Several games, and what is stored of them ---


def record(env_id: str, num_envs: int, seed: int, actions: list[int]) -> tuple[FrameReplay, list[list[Transition]]]:
    """Games played as training plays them, every environment taking the same actions; the Q-values number the steps."""
    games, replay = (
        AtariGames(Args(env_id=env_id), num_envs, seed),
        FrameReplay(2 * len(actions) * num_envs, num_envs, 2),
    )
    steps: list[list[Transition]] = [[] for _ in range(num_envs)]
    for number, action in enumerate(actions):
        obs = games.obs
        games.step_async(torch.full((num_envs,), action))
        *outcome, ended = games.step_wait()
        ids = torch.tensor([[number, env] for env in range(num_envs)], dtype=torch.float32)
        replay.add(obs, [action] * num_envs, *outcome, ids)
        ended = {env: tuple(game) for env, *game in ended}
        for env, (reward, terminated, truncated, last_obs) in enumerate(zip(*outcome)):
            of_env = float(reward), bool(terminated), bool(truncated), last_obs, ended.get(env)
            steps[env].append(Transition(obs[env], action, *of_env))
    return replay, steps


@pytest.fixture(params=["breakout", "short_pong"])
def recording(request):
    """(actions, replay, steps of each environment, single games of the same seeds)."""
    env_id = BREAKOUT if request.param == "breakout" else PONG
    if env_id == PONG:
        request.getfixturevalue("short_games")
    actions = random_actions(env_id, 300)
    return actions, *record(env_id, 2, 5, actions), [AtariGame(env_id, 5 + env) for env in range(2)]


def test_several_games_are_those_of_their_seeds(recording):
    """Environment i of seed s is the single game of seed s + i; what is stored is what that game shows."""
    actions, _, steps, singles = recording
    for of_env, game in zip(steps, singles):
        alone = [step._replace(reward=float(np.sign(step.reward))) for step in play(game, actions)]
        assert_same(of_env, alone)
    assert any(not np.array_equal(*(step.obs for step in both)) for both in zip(*steps))


def test_no_transition_crosses_a_reset(recording):
    """next_obs is always obs moved on by one frame; behind an end the first frame stands four times."""
    for steps in recording[2]:
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


def test_samples_are_the_steps_that_were_played(recording):
    """Through the real replay and back; only a termination is without a future."""
    _, replay, steps, _ = recording
    batch = replay.sample(3000, 1, 0.9, torch.Generator().manual_seed(0))
    ends_drawn = 0
    for i, (number, env) in enumerate(batch.teacher_q_values.int().tolist()):
        step = steps[env][number]
        assert batch.actions[i] == step.action and batch.returns[i] == step.reward
        assert batch.discounts[i].item() == pytest.approx(0.0 if step.terminated else 0.9)
        np.testing.assert_array_equal(batch.obs[i], step.obs)
        if not step.terminated:
            np.testing.assert_array_equal(batch.next_obs[i], step.next_obs)
        ends_drawn += step.terminated or step.truncated
    assert ends_drawn >= 10


def test_a_truncated_game_is_stored_with_its_last_image(short_games):
    """A time limit truncates and never terminates: a game of that many frames, whose last image is not a reset's."""
    _, steps = record(PONG, 2, 5, random_actions(PONG, 250))
    for of_env in steps:
        assert sum(step.truncated for step in of_env) >= 2
        for step, following in pairwise(of_env):
            assert not step.terminated and step.truncated == (step.game is not None)
            if step.truncated:
                assert SHORT_FRAMES <= step.game[1] < SHORT_FRAMES + 30
                assert len({frame.tobytes() for frame in step.next_obs}) > 1, "the images of a reset are all alike"
                assert not np.array_equal(step.next_obs[-1], following.obs[-1])


def test_an_evaluation_plays_as_many_games_of_each_environment_as_was_said_before():
    """Twelve games of ten environments, two of the first and second each, however long they take; the same twice."""

    def always_left(obs: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(len(obs), 1)

    scores, again = (evaluate(always_left, Args(seed=1), 12, "cpu", epsilon=0.3) for _ in range(2))
    assert len(scores) == 12 and scores == again
    expected = []
    for env in range(10):
        game, left = AtariGame(BREAKOUT, 20_001 + env), 2 if env < 2 else 1
        while left:
            game.send(3)
            game.recv()
            if game.ended:
                expected.append(game.ended[0])
                left -= 1
    assert sorted(evaluate(always_left, Args(seed=1), 12, "cpu", epsilon=0.0)) == sorted(expected)
    assert len(set(expected)) > 1 or len(set(scores)) > 1

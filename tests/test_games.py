"""The games: bit for bit those of the reference wrappers, up to what is stored and filmed."""

import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest.mock import MagicMock

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import RecordEpisodeStatistics
from stable_baselines3.common.atari_wrappers import AtariWrapper
from test_replay import CheckedReplay

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import (
    FIRE,
    NOOP,
    PURPOSES,
    RIGHT,
    SIDE,
    STACK,
    Args,
    AtariGames,
    AtariVectorEnv,
    FinishedGame,
    GameStep,
    evaluate,
    pack,
    seeds_for,
)

KIND = "NoFrameskip-v4"
GAMES = sorted(env_id.removesuffix(KIND) for env_id in gym.registry if env_id.endswith(KIND))
LEFT = 3  # the first action that launches nothing
FRAME_LIMIT = 108_000  # ALE's own, of a game


@pytest.fixture
def set_emulators(monkeypatch):
    """set_emulators(**options): those of all games from now on have these instead of their own."""

    def patch(**options) -> None:
        def emulators(*args, **own_options):
            return AtariVectorEnv(*args, **(own_options | options))

        monkeypatch.setattr(qdagger, "AtariVectorEnv", emulators)

    return patch


def new_games(game: str, num_envs: int, seed: int, **flags) -> AtariGames:
    seeds = np.arange(seed, seed + num_envs) % 2**31
    return AtariGames(Args(env_id=game + KIND, **flags), seeds)


class Played(NamedTuple):
    step: GameStep
    obs: np.ndarray  # after it
    images: np.ndarray


def play(games: AtariGames, actions: np.ndarray) -> Iterator[Played]:
    """Step by step, what these actions, (steps, num_envs), lead to."""
    for now in actions:
        games.step_async(now)
        step = games.step_wait()
        yield Played(step, games.obs, games.images)


class Reference:
    """A game of the reference wrappers, whose own reset launches it after each episode.

    Ours does so in steps of its own, `launches`. When all of them are done, both are in step again.
    """

    def __init__(self, game: str):
        counted = RecordEpisodeStatistics(gym.make(game + KIND))
        self.env = AtariWrapper(counted, noop_max=0)
        meanings = self.env.unwrapped.get_action_meanings()
        self.launches_of_a_game = [FIRE, RIGHT] if "FIRE" in meanings else []
        self.launches = self.launches_of_a_game.copy()
        self.is_over = True

    def obs(self) -> np.ndarray:
        """uint8 (4, 84, 84); the next episode begins if the last is over."""
        if self.is_over:
            frame, _ = self.env.reset()
            self.stack = frame.transpose(2, 0, 1).repeat(STACK, axis=0)
            self.is_over = False
        return self.stack

    def step(self, action: int) -> tuple[float, bool, bool, dict]:
        """Reward, terminated, truncated, info."""
        frame, reward, terminated, truncated, info = self.env.step(action)
        self.stack = np.concatenate([self.stack[1:], frame.transpose(2, 0, 1)])
        if terminated:
            self.is_over = True
            self.launches = self.launches_of_a_game.copy()
            if "episode" not in info:  # a life alone is lost
                self.launches.insert(0, NOOP)
        return reward, terminated, truncated, info

    def frames_played(self) -> int:
        return self.env.unwrapped.ale.getEpisodeFrameNumber()


def compare(game: str, steps: int, num_envs: int) -> tuple[int, int]:
    """Ours and the reference with the same random actions; how many episodes and games ended."""
    games = new_games(game, num_envs, 3)
    references = [Reference(game) for _ in range(num_envs)]
    rng = np.random.default_rng(2)
    episodes_ended = 0
    games_ended = 0

    for asked in rng.integers(games.num_actions, size=(steps, num_envs)):
        for obs, reference in zip(games.obs, references):
            if reference.launches:
                assert (obs == obs[-1]).all()
            else:
                assert (obs == reference.obs()).all()

        games.step_async(asked)
        step = games.step_wait()
        finished = {game.env: game for game in step.finished}

        for env, reference in enumerate(references):
            if reference.launches:
                assert games.actions[env] == reference.launches.pop(0)
                assert step.excluded[env]
                assert env not in finished
                continue

            reward, terminated, truncated, info = reference.step(asked[env])
            assert games.actions[env] == asked[env]
            assert step.rewards[env] == reward
            assert step.terminations[env] == terminated
            assert step.excluded[env] == truncated
            if env in finished:
                # The image in which a game ends is never looked at.
                assert finished[env].score == info["episode"]["r"]
                assert finished[env].length == reference.frames_played()
            else:
                assert "episode" not in info
                assert (games.obs[env, -1] == reference.stack[-1]).all()
            episodes_ended += terminated
            games_ended += env in finished
    return episodes_ended, games_ended


@pytest.mark.parametrize(
    ("game", "steps", "has_lives"),
    [
        ("Breakout", 400, True),
        ("Pong", 1200, False),
        ("BeamRider", 1300, True),
        ("SpaceInvaders", 600, True),
        ("Freeway", 2060, False),
        ("Asterix", 400, True),  # without FIRE
        ("BankHeist", 570, True),  # lives are 0 before the game is over
    ],
)
def test_bit_identical_to_the_reference_wrappers(game, steps, has_lives, set_emulators):
    """With lives and without, with FIRE and without; through lost lives, game overs, launches."""
    set_emulators(noop_max=0)

    episodes_ended, games_ended = compare(game, steps, num_envs=2 if has_lives else 1)

    assert games_ended > 0
    assert (episodes_ended > games_ended) == has_lives


@pytest.mark.long
@pytest.mark.parametrize("game", GAMES)
def test_every_game_is_bit_identical_to_the_reference_wrappers(game, set_emulators):
    set_emulators(noop_max=0)
    compare(game, 800, num_envs=2)
    assert len(GAMES) == 62


def test_a_game_whose_first_action_fires_is_not_launched():
    """Backgammon has FIRE, but no NOOP, and its second action is another."""
    games = AtariGames(Args(env_id="ALE/Backgammon-v5"), np.array([1]))
    assert not games.forced_left.any()


def test_a_game_begins_with_0_to_29_frames_of_waiting(set_emulators):
    """Here it is over after a step, four frames later."""
    set_emulators(max_num_frames_per_episode=4)
    lengths = set()
    for played in play(new_games("Pong", 1, 0), np.zeros((250, 1), int)):
        lengths |= {game.length for game in played.step.finished}
    assert lengths == set(range(4, 34))


@pytest.mark.parametrize("height", [210, 214, 220, 230, 250])
def test_a_tall_image_of_all_games_is_shrunk_like_each_alone(height):
    """The heights of all games; images one above the other do not mix, however many they are."""

    def shrunk(image):
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)

    for num_envs in (1, 2, 3, 4, 7, 16, 64):
        rng = np.random.default_rng(height)
        images = rng.integers(256, size=(num_envs, 1, height, 160, 3), dtype=np.uint8)
        games = MagicMock(images=images)
        alone = [shrunk(image) for image in images[:, 0]]
        assert (AtariGames.grey(games) == alone).all()


@pytest.mark.parametrize(
    ("game", "num_envs", "seed", "sticky", "frame_limit"),
    [
        ("Breakout", 4, 2**31 - 2, 0.0, FRAME_LIMIT),  # the largest seeds
        ("SpaceInvaders", 3, 5, 0.25, 400),
    ],
)
def test_several_games_are_those_of_their_seeds(
    game, num_envs, seed, sticky, frame_limit, set_emulators
):
    """Environment i of seed s is the single game of seed s + i, in all it shows."""
    set_emulators(max_num_frames_per_episode=frame_limit)
    games = new_games(game, num_envs, seed, repeat_action_probability=sticky)
    seeds = [(seed + env) % 2**31 for env in range(num_envs)]
    singles = [new_games(game, 1, each, repeat_action_probability=sticky) for each in seeds]
    for env, single in enumerate(singles):
        assert (games.obs[env] == single.obs[0]).all()

    rng = np.random.default_rng(0)
    actions = rng.integers(games.num_actions, size=(150, num_envs))
    together = list(play(games, actions))
    games_ended = 0
    for env, single in enumerate(singles):
        alone = play(single, actions[:, [env]])
        for ours, its in zip(together, alone, strict=True):
            assert ours.step.actions[env] == its.step.actions[0]
            assert ours.step.rewards[env] == its.step.rewards[0]
            assert ours.step.terminations[env] == its.step.terminations[0]
            assert ours.step.excluded[env] == its.step.excluded[0]
            assert (ours.obs[env] == its.obs[0]).all()
            assert (ours.images[env] == its.images[0]).all()

            finished = [each for each in ours.step.finished if each.env == env]
            assert finished == [each._replace(env=env) for each in its.step.finished]
            games_ended += len(finished)

    assert games_ended >= 2
    last_stacks = {stack.tobytes() for stack in games.obs}
    assert len(last_stacks) == num_envs


def last_images(env_id: str, actions: np.ndarray, sticky: float | None) -> bytes:
    games = AtariGames(Args(env_id=env_id, repeat_action_probability=sticky), np.array([4]))
    played = list(play(games, actions))
    return played[-1].images.tobytes()


def test_actions_stick_when_asked_or_when_the_name_says_so():
    """By default with probability 0.25 in ALE/GAME-v5, and in its namesake never."""
    actions = np.random.default_rng(0).integers(6, size=(100, 1))
    older = "SpaceInvaders" + KIND
    newer = "ALE/SpaceInvaders-v5"

    never = last_images(older, actions, 0.0)
    sometimes = last_images(older, actions, 0.25)

    assert never != sometimes
    assert last_images(older, actions, None) == never
    assert last_images(newer, actions, None) == sometimes
    assert last_images(newer, actions, 0.0) == never
    assert last_images(newer, actions, 0.25) == sometimes


def test_with_sticky_actions_of_probability_1_none_is_ever_taken():
    rights = np.full((100, 1), RIGHT)
    lefts = np.full((100, 1), LEFT)
    assert last_images("ALE/Breakout-v5", rights, 1.0) == last_images("ALE/Breakout-v5", lefts, 1.0)


def test_a_time_limit_truncates_and_never_terminates(set_emulators):
    """A game of 100 decisions, two of which launch it; those that end together are all reported."""
    set_emulators(max_num_frames_per_episode=400)
    played = list(play(new_games("Pong", 3, 3), np.full((250, 3), LEFT)))
    steps = [each.step for each in played]

    # The last step of a game, and the two that launch the next.
    cut = [0, 1, 99, 100, 101, 199, 200, 201]
    for number, step in enumerate(steps):
        assert not step.terminations.any()
        assert step.excluded.tolist() == [number in cut] * 3
    for number in cut:
        obs = played[number].obs
        assert (obs == obs[:, -1:]).all(), "the stack begins anew"

    actions = [step.actions.tolist() for step in steps[98:104]]
    assert actions == [[action] * 3 for action in (LEFT, LEFT, FIRE, RIGHT, LEFT, LEFT)]

    for number, step in enumerate(steps):
        envs = [game.env for game in step.finished]
        assert envs == ([0, 1, 2] if number in (99, 199) else [])
        for game in step.finished:
            assert 400 <= game.length < 430


@pytest.mark.parametrize(
    ("game", "frame_limit", "ends"),
    [("Breakout", FRAME_LIMIT, "terminations"), ("Pong", 160, "truncations")],
)
def test_samples_are_the_steps_that_were_played(game, frame_limit, ends, set_emulators):
    """Through the real replay and back: no stack or return crosses an end.

    What the agent did not choose is left out.
    """
    set_emulators(max_num_frames_per_episode=frame_limit)
    games = new_games(game, 3, 5)
    checked = CheckedReplay(450, 3)
    obs = games.obs
    rng = np.random.default_rng(0)
    actions = rng.integers(LEFT, games.num_actions, size=(200, 3))
    for played in play(games, actions):
        checked.add(obs, played.step)
        obs = played.obs

    checked.check(n_step=3)

    replay = checked.replay
    launching = replay.actions < LEFT
    truncated = replay.excluded & ~launching
    assert launching.sum() > 6
    assert replay.excluded[launching].all()
    assert truncated.any() == (ends == "truncations")
    assert replay.terminations.any() == (ends == "terminations")

    packed = sum(block.nbytes for block in pack(replay)["frames"])
    assert packed < replay.frames.nbytes / 8


def fond_of_left(obs: torch.Tensor) -> torch.Tensor:
    """A network that always takes the same action."""
    q_values = torch.zeros(len(obs), 4)
    q_values[:, LEFT] = 1
    return q_values


def test_an_evaluation_plays_as_many_games_of_each_environment_as_was_said_before(monkeypatch):
    """Twelve games of ten environments: two each of the first and second, one of the others.

    They come in the order of the environments, so that those that were over first are not the
    first ten.
    """
    steps = []
    for number in range(1, 11):
        # Environment i ends a game every i + 1 steps; a score tells its environment and step.
        envs = [env for env in range(10) if number % (env + 1) == 0]
        finished = [FinishedGame(env, score=100.0 * env + number, length=4) for env in envs]
        steps.append(MagicMock(finished=finished))
    games = MagicMock(obs=np.zeros((10, 4, 84, 84), np.uint8))
    games.step_wait.side_effect = steps
    make_games = MagicMock(return_value=games)
    monkeypatch.setattr(qdagger, "AtariGames", make_games)
    args = Args(seed=1)

    scores = evaluate(fond_of_left, args, 12, "cpu")

    first_games = [1, 102, 203, 304, 405, 506, 607, 708, 809, 910]
    second_games = [2, 104]
    assert scores == first_games + second_games

    (given_args, given_seeds), _ = make_games.call_args
    assert given_args is args
    assert given_seeds.tolist() == seeds_for("evaluation", 1, 10).tolist()


def test_no_two_runs_or_purposes_have_a_game_in_common():
    """Nor has a phase that is resumed any of those before; seeds are such as ALE takes."""
    drawn = []
    for purpose in PURPOSES:
        for seed in (1, 2, 3, 2**31 - 1):
            for step in (0, 4, 100_000):
                drawn += seeds_for(purpose, seed, 32, step).tolist()

    assert len(set(drawn)) == len(drawn)
    assert min(drawn) >= 0
    assert max(drawn) < 2**31


def test_seeds_are_the_same_each_time_and_for_any_count():
    assert seeds_for("online", 1, 2).tolist() == seeds_for("online", 1, 32)[:2].tolist()


class WatchedGames(AtariGames):
    """Remembers its first environment: all images, and how long the first game there was."""

    def __init__(self, args, seeds):
        super().__init__(args, seeds)
        self.images_seen = []
        self.length = None

    def step_wait(self) -> GameStep:
        self.images_seen.append(self.images[0, 0])
        step = super().step_wait()
        ended = any(game.env == 0 for game in step.finished)
        if ended and self.length is None:
            self.length = len(self.images_seen)
        return step


@pytest.fixture
def watched(monkeypatch):
    """watched(seed, **options): scores and games of an evaluation; `seed` is that of torch.

    It leaves alone the generators outside.
    """
    args = Args(seed=1, end_e=0.3, capture_video=True, repeat_action_probability=0.25)
    made = []

    def make_games(args, seeds):
        games = WatchedGames(args, seeds)
        made.append(games)
        return games

    def numpy_state():
        return np.random.get_state(legacy=False)["state"]["key"]

    def run(seed: int, **options) -> tuple[list[float], WatchedGames]:
        torch_before = torch.manual_seed(seed).get_state()
        numpy_before = numpy_state()

        scores = evaluate(fond_of_left, args, 3, "cpu", **options)

        assert torch.equal(torch.get_rng_state(), torch_before)
        assert np.array_equal(numpy_state(), numpy_before)
        return scores, made[-1]

    monkeypatch.setattr(qdagger, "AtariGames", make_games)
    return run


def test_an_evaluation_is_always_the_same_and_its_first_game_is_filmed(
    watched, monkeypatch, tmp_path
):
    """Whatever the generators outside are at; by default with the least exploration, end_e."""
    path = tmp_path / "videos" / "7.mp4"
    moviepy = MagicMock()
    monkeypatch.setitem(sys.modules, "moviepy.video.io.ffmpeg_writer", moviepy)

    scores, games = watched(seed=0, epsilon=0.3)
    _, others = watched(seed=1, epsilon=0.9)
    same_scores, same_games = watched(seed=2, video=path)

    assert same_scores == scores
    assert np.array_equal(same_games.images_seen, games.images_seen)
    assert not np.array_equal(others.images_seen[:50], games.images_seen[:50])

    moviepy.FFMPEG_VideoWriter.assert_called_once_with(str(path), (160, 210), fps=15)
    writer = moviepy.FFMPEG_VideoWriter.return_value
    film = [call.args[0] for call in writer.write_frame.call_args_list]
    assert games.length < len(games.images_seen)
    assert np.array_equal(film, games.images_seen[: games.length])


def test_a_signal_stops_an_evaluation():
    with pytest.raises(qdagger.Stopped, match="15"):
        evaluate(fond_of_left, Args(), 2, "cpu", stop=[15])

"""The games: bit for bit those of the reference wrappers, one or several, up to what is stored of them and filmed."""

import sys
from collections import Counter
from unittest.mock import MagicMock

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.atari_wrappers import AtariWrapper
from test_replay import Doubled

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import (
    PURPOSES,
    STACK,
    Args,
    AtariGames,
    AtariVectorEnv,
    evaluate,
    pack,
    seeds_for,
)

KIND = "NoFrameskip-v4"
GAMES = sorted(env_id.removesuffix(KIND) for env_id in gym.registry if env_id.endswith(KIND))
PLAYED = {"Breakout": 400, "Pong": 1200, "BeamRider": 1300, "SpaceInvaders": 600, "Freeway": 2060}
PLAYED |= {
    "Asterix": 400,
    "BankHeist": 570,
}  # lives without FIRE; lives that are 0 before the game is over


def emulators_with(monkeypatch, **options) -> None:
    """The emulators of all games from now on have these options instead of their own."""

    def emulators(*args, **own):
        return AtariVectorEnv(*args, **own | options)

    monkeypatch.setattr(qdagger, "AtariVectorEnv", emulators)


def new_games(game: str, num_envs: int, seed: int, **options) -> AtariGames:
    seeds = np.arange(seed, seed + num_envs) % 2**31
    return AtariGames(Args(env_id=game + KIND, **options), seeds)


def play(games: AtariGames, actions: np.ndarray):
    """Step by step, what these actions (steps, num_envs) lead to."""
    for now in actions:
        games.step_async(now)
        actions, *outcome, finished = games.step_wait()
        yield *outcome, actions, games.obs, games.images, finished


def compare(game: str, steps: int, num_envs: int) -> Counter:
    """Ours and the reference, whose own reset launches games and lives, with random actions; what there was of them."""
    games, seen = new_games(game, num_envs, 3), Counter()
    bare = [gym.wrappers.RecordEpisodeStatistics(gym.make(game + KIND)) for _ in range(num_envs)]
    references, stacks = [AtariWrapper(env, noop_max=0) for env in bare], [None] * num_envs
    launch = [1, 2] if "FIRE" in references[0].unwrapped.get_action_meanings() else []
    launches = [[*launch] for _ in references]  # what is to be done before each is reset
    for asked in np.random.default_rng(2).integers(games.num_actions, size=(steps, num_envs)):
        for env, reference in enumerate(references):
            if stacks[env] is None and not launches[env]:
                stacks[env] = reference.reset()[0].transpose(2, 0, 1).repeat(STACK, axis=0)
            assert (games.obs[env] == (games.obs[env, -1] if launches[env] else stacks[env])).all()
        games.step_async(asked)
        _, rewards, terminations, truncations, finished = games.step_wait()
        over = {env: whole_game for env, *whole_game in finished}
        for env, reference in enumerate(references):
            if launches[env]:
                assert (
                    games.actions[env] == launches[env].pop(0)
                    and truncations[env]
                    and env not in over
                )
                continue
            frame, *answer, info = reference.step(asked[env])
            assert [rewards[env], terminations[env], truncations[env]] == answer and games.actions[
                env
            ] == asked[env]
            stacks[env] = np.concatenate([stacks[env][1:], frame.transpose(2, 0, 1)])
            if env in over:  # the image in which a game ends is never looked at
                assert over[env] == [
                    info["episode"]["r"],
                    reference.unwrapped.ale.getEpisodeFrameNumber(),
                ]
            else:
                assert "episode" not in info and (games.obs[env, -1] == frame[:, :, 0]).all()
            if terminations[env]:
                stacks[env], launches[env] = None, [0] * (env not in over) + launch
            seen.update(lives=int(terminations[env]), games=int(env in over))
    return seen


@pytest.mark.parametrize("game, steps", PLAYED.items())
def test_bit_identical_to_the_reference_wrappers(game, steps, monkeypatch):
    """With lives and without, with FIRE and without; through lost lives, game overs and launches."""
    emulators_with(monkeypatch, noop_max=0)
    without_lives = game in ("Pong", "Freeway")
    seen = compare(game, steps, num_envs=1 if without_lives else 2)
    assert seen["games"] > 0 and (seen["lives"] == seen["games"]) == without_lives


@pytest.mark.long
@pytest.mark.parametrize("game", GAMES)
def test_every_game_is_bit_identical_to_the_reference_wrappers(game, monkeypatch):
    emulators_with(monkeypatch, noop_max=0)
    compare(game, 800, 2)
    assert len(GAMES) == 62


def test_a_game_whose_first_action_fires_is_not_launched():
    """Backgammon has FIRE, but no NOOP, and its second action is another."""
    assert not AtariGames(Args(env_id="ALE/Backgammon-v5"), np.array([1])).forced_left.any()


def test_a_game_begins_with_0_to_29_frames_of_waiting(monkeypatch):
    """Here it is over after a step, four frames later."""
    emulators_with(monkeypatch, max_num_frames_per_episode=4)
    steps = play(new_games("Pong", 1, 0), np.zeros((250, 1), int))
    assert {length for *_, finished in steps for *_, length in finished} == set(range(4, 34))


@pytest.mark.parametrize("height", [210, 214, 220, 230, 250])
def test_a_tall_image_of_all_games_is_shrunk_like_each_alone(height):
    """The heights of all games; four images of 210 lines, shrunk to 84, do not mix, nor do sixteen of 250."""
    for num_envs in (1, 2, 3, 4, 7, 16, 64):
        images = np.random.default_rng(height).integers(
            256, size=(num_envs, 1, height, 160, 3), dtype=np.uint8
        )
        alone = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images[:, 0]]
        alone = [cv2.resize(image, (84, 84), interpolation=cv2.INTER_AREA) for image in alone]
        assert (AtariGames.grey(MagicMock(images=images)) == alone).all()


@pytest.mark.parametrize(
    "game, num_envs, seed, sticky, max_frames",
    [
        ("Breakout", 4, 2**31 - 2, 0.0, 108_000),
        ("SpaceInvaders", 3, 5, 0.25, 400),
    ],  # the first has the largest seeds
)
def test_several_games_are_those_of_their_seeds(
    game, num_envs, seed, sticky, max_frames, monkeypatch
):
    """Environment i of seed s is the single game of seed s + i, in all it shows, also if actions stick."""
    emulators_with(monkeypatch, max_num_frames_per_episode=max_frames)
    games = new_games(game, num_envs, seed, repeat_action_probability=sticky)
    actions = np.random.default_rng(0).integers(games.num_actions, size=(150, num_envs))
    seeds, ended = [(seed + env) % 2**31 for env in range(num_envs)], 0
    singles = [new_games(game, 1, seed, repeat_action_probability=sticky) for seed in seeds]
    assert (games.obs == np.concatenate([single.obs for single in singles])).all()
    alone = [play(single, actions[:, [env]]) for env, single in enumerate(singles)]
    for (*together, finished), *apart in zip(play(games, actions), *alone):
        assert all(
            (fields[0] == np.concatenate(fields[1:])).all() for fields in zip(together, *apart)
        )
        assert finished == [
            (env, *of_game[1:]) for env, of_env in enumerate(apart) for of_game in of_env[-1]
        ]
        ended += len(finished)
    assert ended >= 2 and len({stack.tobytes() for stack in games.obs}) == num_envs


def test_actions_stick_when_asked_or_when_the_name_says_so():
    """With probability 0.25 in ALE/GAME-v5, in its namesake never; with probability 1 none is ever taken."""

    def last_images(env_id: str, actions: np.ndarray, sticky: float | None) -> bytes:
        games = AtariGames(Args(env_id=env_id, repeat_action_probability=sticky), np.array([4]))
        return [images for *_, images, _ in play(games, actions)][-1].tobytes()

    actions = np.random.default_rng(0).integers(6, size=(100, 1))
    older, newer = (
        [last_images(env_id, actions, sticky) for sticky in (None, 0.0, 0.25)]
        for env_id in ("SpaceInvaders" + KIND, "ALE/SpaceInvaders-v5")
    )
    assert older[1:] == newer[1:] and older[0] == older[1] != newer[0] == newer[2]
    left, right = (
        last_images("ALE/Breakout-v5", np.full_like(actions, action), 1.0) for action in (2, 3)
    )
    assert left == right


def test_a_time_limit_truncates_and_never_terminates(monkeypatch):
    """A game of 100 decisions, two of which launch it; those that end together are all reported."""
    emulators_with(monkeypatch, max_num_frames_per_episode=400)
    steps = list(play(new_games("Pong", 3, 3), np.full((250, 3), 3)))
    terminations, truncations, actions, obs = (np.stack(field) for field in list(zip(*steps))[1:5])
    cut, finished = (
        [0, 1, 99, 100, 101, 199, 200, 201],
        [[env for env, *_ in step[-1]] for step in steps],
    )
    assert (truncations.nonzero()[0] == np.repeat(cut, 3)).all() and not terminations.any()
    assert finished[99] == finished[199] == [0, 1, 2] and sum(map(len, finished)) == 6
    assert (obs[cut] == obs[cut][:, :, -1:]).all(), "the stack begins anew"
    assert actions[98:104].T.tolist() == [[3, 3, 1, 2, 3, 3]] * 3
    assert all(400 <= length < 430 for step in steps for *_, length in step[-1])


@pytest.mark.parametrize("game, max_frames", [("Breakout", 108_000), ("Pong", 160)])
def test_samples_are_the_steps_that_were_played(game, max_frames, monkeypatch):
    """Through the real replay and back: no stack or return crosses an end, and what the agent did not choose is out."""
    emulators_with(monkeypatch, max_num_frames_per_episode=max_frames)
    games, doubled = new_games(game, 3, 5), Doubled(450, 3)
    obs, chosen = (
        games.obs,
        np.random.default_rng(0).integers(3, games.num_actions, size=(200, 3)),
    )  # none that launch
    for *outcome, actions, next_obs, _, _ in play(games, chosen):
        doubled.add(obs, actions, *outcome)
        obs = next_obs
    doubled.check(n_step=3)
    replay, launched = doubled.replay, doubled.replay.actions < 3
    assert launched.sum() > 6 and replay.excluded[launched].all()
    assert (replay.excluded & ~launched).any() == (game == "Pong") != replay.terminations.any()
    assert sum(block.nbytes for block in pack(replay)["frames"]) < replay.frames.nbytes / 8


def fond_of_left(obs: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(len(obs), 1)


def test_an_evaluation_plays_as_many_games_of_each_environment_as_was_said_before(monkeypatch):
    """Twelve games of ten environments, of which i ends one every i + 1 steps: two of the first and second each. They
    come in the order of the environments, so that those that were over first are not the first ten."""
    ends = [
        [(env, 100.0 * env + step, 4) for env in range(10) if step % (env + 1) == 0]
        for step in range(1, 11)
    ]
    outcomes = {"step_wait.side_effect": [MagicMock(finished=finished) for finished in ends]}
    games, args = MagicMock(obs=np.zeros((10, 4, 84, 84), np.uint8), **outcomes), Args(seed=1)
    monkeypatch.setattr(qdagger, "AtariGames", MagicMock(return_value=games))
    scores = evaluate(fond_of_left, args, 12, "cpu")
    assert scores == [1, 102, 203, 304, 405, 506, 607, 708, 809, 910, 2, 104]
    (called_with, seeds), _ = qdagger.AtariGames.call_args
    assert called_with is args and seeds.tolist() == seeds_for("evaluation", 1, 10).tolist()


def test_no_two_runs_or_purposes_have_a_game_in_common():
    """Nor has a phase that is resumed any of those before; seeds are what ALE takes, and the same each time."""
    drawn = [
        tuple(seeds_for(purpose, seed, 32, step).tolist())
        for purpose in PURPOSES
        for seed in (1, 2, 3, 2**31 - 1)
        for step in (0, 4, 100_000)
    ]
    together = {one for seeds in drawn for one in seeds}
    assert len(together) == 32 * len(drawn) and min(together) >= 0 and max(together) < 2**31
    assert seeds_for("online", 1, 2).tolist() == seeds_for("online", 1, 32)[:2].tolist()


def test_an_evaluation_is_always_the_same_and_its_first_game_is_filmed(monkeypatch, tmp_path):
    """Whatever the generators outside are at, which it leaves alone; by default with the least exploration."""
    path, sticky = tmp_path / "videos" / "7.mp4", dict(repeat_action_probability=0.25)
    args = Args(seed=1, end_e=0.3, capture_video=True, **sticky)
    module, scores, images, ended = MagicMock(), [], [], []

    class Watched(AtariGames):
        def step_wait(self):
            images[-1].append(self.images[0, 0])
            outcome = super().step_wait()
            ended[-1].append([game.env for game in outcome.finished])
            return outcome

    monkeypatch.setattr(qdagger, "AtariGames", Watched)
    monkeypatch.setitem(sys.modules, "moviepy.video.io.ffmpeg_writer", module)
    for seed, options in enumerate([{"epsilon": 0.3}, {"epsilon": 0.9}, {"video": path}]):
        images.append([]), ended.append([])
        states = torch.manual_seed(seed).get_state(), np.random.get_state()[1]
        scores.append(evaluate(fond_of_left, args, 3, "cpu", **options))
        assert all(map(np.array_equal, states, (torch.get_rng_state(), np.random.get_state()[1])))
    steps, length = len(images[0]), 1 + [0 in envs for envs in ended[0]].index(True)
    assert scores[0] == scores[2] and np.array_equal(images[0], images[2][:steps])
    assert not np.array_equal(images[0][:50], images[1][:50])
    module.FFMPEG_VideoWriter.assert_called_once_with(str(path), (160, 210), fps=15)
    video = module.FFMPEG_VideoWriter.return_value.write_frame.call_args_list
    assert length < steps and np.array_equal([call.args[0] for call in video], images[0][:length])
    with pytest.raises(qdagger.Stopped, match="15"):
        evaluate(fond_of_left, args, 2, "cpu", stop=[15])

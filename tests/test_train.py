"""Training as a whole: phases on real games, logs, counts of updates, lambda, and the same weights twice."""

import math
import re
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import PROGRAM, refusal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import (
    Args,
    AtariGames,
    AtariNetwork,
    FinishedGame,
    FrameReplay,
    GameStep,
    Learner,
    pack,
    train,
)

GAME_TAGS = {"charts/episodic_return", "charts/episodic_length"}
ONLINE_TAGS = {f"charts/{name}" for name in ("epsilon", "SPS", "distill_coeff", "learning_rate")}
ONLINE_TAGS |= {"losses/loss", "losses/td_loss", "losses/q_values", "eval/episodic_return"}
OFFLINE_TAGS = {
    f"charts/offline/{name}" for name in ("loss", "q_loss", "distill_loss", "avg_episodic_return")
}
ACTION = 3  # what the teachers here are fond of
PHASES = dict(
    teacher_steps=480, offline_steps=20, total_timesteps=240, learning_starts=100, buffer_size=400
)
SIZES = dict(
    network="nature",
    batch_size=4,
    target_network_frequency=24,
    teacher_eval_episodes=1,
    eval_episodes=1,
)
SETTINGS = PHASES | SIZES | dict(eval_frequency=0, save_model=True, cuda=False, amp=False)


def tiny(num_actions: int) -> AtariNetwork:
    """In place of the Nature CNN: a few thousand weights."""
    convolution = [nn.Conv2d(4, 4, 12, stride=12), nn.ReLU(), nn.Flatten()]
    return AtariNetwork(
        [*convolution, nn.Linear(4 * 7 * 7, 32), nn.ReLU(), nn.Linear(32, num_actions)]
    )


class Clockwork:
    """Games that cost nothing: stripes, by a clock that starts at the seed and counts the steps of all environments, so
    that, with `seeds_in_a_row`, games of a resumed phase go on with those before. Every fourth row is truncated:
    nothing is lost if a run ends with it. In every seventh a game ends, or when and with what returns `script` says."""

    num_actions, script = 4, None

    def __init__(self, args: Args, seeds: np.ndarray):
        self.num_envs, self.seed, self.clock = len(seeds), int(seeds[0]), int(seeds[0])

    @property
    def obs(self) -> np.ndarray:
        stripes = np.random.default_rng(self.clock).integers(
            256, size=(self.num_envs, 1, 84, 1), dtype=np.uint8
        )
        return stripes.repeat(4, axis=1).repeat(84, axis=3)

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self):
        self.clock += self.num_envs
        row, never = self.clock // self.num_envs, np.zeros(self.num_envs, dtype=bool)
        by_rule = [(row + self.actions.sum()) % 5 + 1.0] if row % 7 == 0 else []
        returns = (
            self.script.get((self.clock - self.seed) // self.num_envs, [])
            if self.script
            else by_rule
        )
        games = [FinishedGame(row // 7 % self.num_envs, float(score), 28) for score in returns]
        rewards = np.sign(self.actions - row % 4, dtype=np.float32)
        return GameStep(self.actions, rewards, never, never | (row % 4 == 0), games)


def seeds_in_a_row(purpose: str, seed: int, count: int, step: int = 0) -> np.ndarray:
    """In place of `seeds_for`: those of the teacher's buffer from 0, online from 10,000, evaluation from 20,000 on."""
    return seed + step + np.arange(count) + 10_000 * qdagger.PURPOSES.index(purpose)


def time_with(**functions) -> SimpleNamespace:
    """In place of the module `time`: what it has, but for these functions."""
    return SimpleNamespace(**vars(time) | functions)


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            same(value, other[name]) for name, value in one.items()
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.fixture(scope="module")
def run(make_model, tmp_path_factory):
    """run(evaluate, games, script, **changes): train; unless told otherwise, evaluations play no games but return 2.

    What comes back has `steps` and `values` of each tag, `weights`, the `epsilons` that were acted with, of each
    gradient step whether target and online network were equal before (`in_sync`) and how many steps its replay held
    (`stored`), and the `rows` but for frames that were added to each replay, in the order of their use."""

    def go(
        evaluate=lambda *_, **__: [2.0], games=Clockwork, script=None, actions=4, **changes
    ) -> SimpleNamespace:
        seen, real_act = SimpleNamespace(in_sync=[], stored=[], epsilons=[], rows={}), qdagger.act

        def add(replay, frames, step, *teacher_q_values, add=FrameReplay.add):
            seen.rows.setdefault(replay, []).append(step[:4])
            add(replay, frames, step, *teacher_q_values)

        def gradient_step(learner, replay, step=Learner.gradient_step):
            seen.rows.setdefault(replay, [])
            seen.in_sync.append(
                same(learner.target_network.state_dict(), learner.q_network.state_dict())
            )
            seen.stored.append(int(replay.written) * replay.num_envs)
            step(learner, replay)

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("run"))
            patch.setitem(qdagger.NETWORKS, "nature", tiny)
            patch.setattr(Clockwork, "script", script)
            patch.setattr(FrameReplay, "add", add)
            patch.setattr(Learner, "gradient_step", gradient_step)
            patch.setattr(qdagger, "AtariGames", games)
            if games is Clockwork:
                patch.setattr(qdagger, "seeds_for", seeds_in_a_row)
            patch.setattr(qdagger, "evaluate", evaluate)
            patch.setattr(
                qdagger, "act", lambda *args: seen.epsilons.append(args[3]) or real_act(*args)
            )
            seen.args = Args(
                **dict(teacher=str(make_model(actions, action=ACTION))) | SETTINGS | changes
            )
            seen.directory = train(seen.args).absolute()
        events = EventAccumulator(str(seen.directory), size_guidance={"scalars": 0}).Reload()
        seen.text = (
            events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
        )
        seen.steps = {
            tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
        }
        seen.values = {
            tag: np.array([event.value for event in events.Scalars(tag)]) for tag in seen.steps
        }
        seen.weights = torch.load(seen.directory / f"{seen.args.exp_name}.cleanrl_model")
        return seen

    return go


@pytest.fixture(scope="module")
def three_phases(run):
    """Asterix: each thing caught is 50 points, a NOOP is forced after a life; games end while the student learns."""
    steps = dict(
        teacher_steps=256,
        offline_steps=100,
        total_timesteps=1800,
        learning_starts=1600,
        buffer_size=2000,
    )
    others = dict(
        num_envs=3,
        exploration_fraction=0.9,
        learning_rate=1e-3,
        capture_video=True,
        eval_frequency=1200,
    )
    return run(
        qdagger.evaluate, AtariGames, actions=9, env_id="AsterixNoFrameskip-v4", **steps, **others
    )


def test_every_documented_tag_and_no_other_is_logged_along_its_own_axis(three_phases):
    """Gradient steps while offline; then environment steps, which begin at 100: multiples of 3 at or after hundreds."""
    table = (
        PROGRAM.with_name("README.md")
        .read_text()
        .partition("## What is logged")[2]
        .partition("\n## ")[0]
    )
    documented = re.findall(
        r"`([\w/]+)`", " ".join(re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE))
    )
    assert sorted(documented) == sorted([*three_phases.steps, "hyperparameters"])
    values, expected = three_phases.values, {"charts/teacher/avg_episodic_return": [0]}
    expected |= {
        "charts/offline/avg_episodic_return": [0, 100],
        "eval/episodic_return": [1300, 1900],
    }
    expected |= {tag: [100] for tag in OFFLINE_TAGS - expected.keys()}
    for tag in (ONLINE_TAGS | {"losses/distill_loss"}) - expected.keys():
        counts = range(1700 if tag.startswith("losses") else 100, 1801, 100)
        expected[tag] = [100 + math.ceil(count / 3) * 3 for count in counts]
    assert {
        tag: steps for tag, steps in three_phases.steps.items() if tag not in GAME_TAGS
    } == expected
    assert all(np.isfinite(of_tag).all() for of_tag in values.values())
    assert (
        values["charts/teacher/avg_episodic_return"] > 0
        and (values["charts/distill_coeff"] == 1).all()
    )
    weighted = values["charts/offline/q_loss"] + 3 * values["charts/offline/distill_loss"]
    assert values["charts/offline/loss"] == pytest.approx(weighted, rel=1e-5)
    epsilons = [
        max(0.01, 1 - 0.99 * (step - 3) / 1620) for step in three_phases.steps["charts/epsilon"]
    ]
    assert values["charts/epsilon"] == pytest.approx(epsilons, abs=1e-6) and epsilons[-1] == 0.01


def test_what_is_stored_is_what_was_really_done(three_phases):
    """Forced steps are the NOOPs that they were, the teacher's Q-values in both buffers those at the observation."""
    actions, _, terminations, truncations = map(np.array, zip(*list(three_phases.rows.values())[1]))
    assert (
        truncations.sum() > 10
        and not actions[truncations].any()
        and terminations[:-1][truncations[1:]].all()
    )
    teacher = tiny(9)
    teacher.load_state_dict(torch.load(three_phases.args.teacher))
    for replay in three_phases.rows:
        batch = replay.sample(64, 3, 0.99, torch.Generator().manual_seed(0))
        assert torch.allclose(batch.teacher_q_values, teacher(batch.obs), atol=1e-5)
        assert batch.teacher_q_values.std(0).min() > 1e-4  # another row's would be others


def test_a_run_leaves_what_was_asked_for_and_nothing_else(three_phases):
    """Its settings as text, a film of each evaluation, its checkpoints, its model; no half-written files."""
    settings = asdict(three_phases.args) | {
        "teacher_file": f"{three_phases.args.teacher}, as given",
        "threads": 1,
    }
    assert all(f"|{name}|{value}|" in three_phases.text for name, value in settings.items())
    files = {
        "checkpoint.previous.pt",
        "checkpoint.pt",
        f"{three_phases.args.exp_name}.cleanrl_model",
        "videos",
    }
    files |= {f"videos/{step}.mp4" for step in (0, 100, 1300, 1900)}
    names = {
        path.relative_to(three_phases.directory).as_posix()
        for path in three_phases.directory.rglob("*")
    }
    assert names >= files and ["tfevents" in name for name in names - files] == [True]
    assert [path.name for path in three_phases.directory.parent.parent.iterdir()] == ["runs"]


@pytest.mark.parametrize("num_envs", [1, 3, 8])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_updates_and_exploration_do_not_depend_on_the_number_of_environments(run, num_envs, tau):
    """Offline 50 on the whole buffer, a new target after every 24th; at the end it is copied, whatever tau is. Online
    one in four from 101 on, offline steps not counted, while the games step; a new target at 120, 144, ... Exploration
    of the teacher falls over its buffer, of the student from where the offline steps have brought it."""
    seen = run(
        num_envs=num_envs,
        offline_steps=50,
        tau=tau,
        exploration_fraction=0.5,
        start_e=0.9,
        end_e=0.1,
    )
    played = math.ceil(480 / (8 * num_envs)) * 8 * num_envs
    assert seen.stored == [played] * 50 + [
        (step - 1) // num_envs * num_envs for step in range(104, 241, 4)
    ]
    copied = [25, 49, *(50 + step for step in (6, 12, 18, 24, 30))] if tau == 1 else []
    assert [step for step, in_sync in enumerate(seen.in_sync, 1) if in_sync] == sorted(
        [1, 51, *copied]
    )
    epsilons = [0.9 - 0.8 * step / 480 for step in range(0, 480, 8 * num_envs)]
    epsilons += [max(0.1, 0.9 - 0.8 * (50 + step) / 120) for step in range(0, 240, num_envs)]
    assert seen.epsilons == pytest.approx(epsilons)


def test_the_step_rate_is_of_online_steps_alone(run, monkeypatch):
    """By a clock in which 4 steps take half a second, an update a day, an evaluation months."""
    passed, wait, loss = [], Clockwork.step_wait, qdagger.qdagger_loss
    monkeypatch.setattr(
        qdagger, "time", SimpleNamespace(**vars(time) | {"perf_counter": lambda: sum(passed)})
    )
    monkeypatch.setattr(Clockwork, "step_wait", lambda games: passed.append(0.5) or wait(games))
    monkeypatch.setattr(qdagger, "qdagger_loss", lambda *args: passed.append(1e5) or loss(*args))
    seen = run(
        lambda *_, **__: passed.append(1e7) or [2.0], eval_frequency=80, learning_starts=1000
    )
    assert list(seen.values["charts/SPS"]) == [8, 8] and len(passed) == 15 + 20 + 60 + 6


def test_a_seed_settles_weights_and_points_and_evaluations_change_nothing(run):
    """Real games every 80 steps and at the end, against none; a point more, since the teacher must have one."""

    def evaluate(*args, games=qdagger.evaluate, **options) -> list[float]:
        return [score + 1 for score in games(*args, **options)]

    sticky = dict(games=AtariGames, huber=True, repeat_action_probability=0.25, num_envs=1)
    first, again, other = run(**sticky), run(**sticky), run(seed=2, **sticky)
    evaluated = run(evaluate, eval_frequency=80, **sticky)
    assert same(first.weights, again.weights) and not same(first.weights, other.weights)
    assert first.steps == again.steps
    assert all(
        (first.values[tag] == again.values[tag]).all() for tag in first.steps if tag != "charts/SPS"
    )
    assert evaluated.steps["eval/episodic_return"] == [100, 180, 260] and same(
        first.weights, evaluated.weights
    )


@pytest.mark.parametrize(
    "network, starts, first, layer", [("nature", 0, 28, 0), ("impala", 100, 100, "0.conv")]
)
def test_without_a_teacher_it_is_plain_dqn(run, network, starts, first, layer):
    """No trace of a teacher, lambda 0 and the loss its TD part alone, steps counted from 0; nothing is learned before
    there are, of four games each, seven rows: three rewards and a stack of four."""
    seen = run(teacher="none", network=network, learning_starts=starts, final_learning_rate=1e-5)
    assert seen.steps.keys() - GAME_TAGS == ONLINE_TAGS and seen.steps["eval/episodic_return"] == [
        240
    ]
    assert (
        seen.steps["charts/distill_coeff"] == [100, 200]
        and not seen.values["charts/distill_coeff"].any()
    )
    assert seen.values["charts/learning_rate"] == pytest.approx(1e-4)
    assert (seen.values["losses/loss"] == seen.values["losses/td_loss"]).all()
    assert seen.stored == list(range(first, 240, 4)) and f"network.{layer}.weight" in seen.weights


def test_offline_alone_imitates_the_teacher(run):
    """No online step at all: the student ends up pressing what its teacher, without exploration, has pressed."""
    changes = dict(
        total_timesteps=0,
        offline_steps=100,
        learning_rate=1e-2,
        batch_size=16,
        start_e=0.0,
        end_e=0.0,
    )
    seen, student = run(**changes), tiny(4)
    assert (
        len(seen.in_sync) == 100
        and seen.steps.keys() == {"charts/teacher/avg_episodic_return"} | OFFLINE_TAGS
    )
    assert seen.steps["charts/offline/avg_episodic_return"] == [0, 100]
    student.load_state_dict(seen.weights)
    (buffer,) = seen.rows
    batch = buffer.sample(64, 1, 0.99, torch.Generator().manual_seed(0))
    assert (batch.actions == ACTION).all() and (student(batch.obs).argmax(1) == ACTION).all()


def test_the_file_of_the_buffer_is_for_students_of_the_same_teacher_alone(
    run, tmp_path, monkeypatch
):
    """For them, whatever their seed, no teacher plays again; for others it is refused with the name of the setting."""
    path, other = tmp_path / "buffer", tmp_path / "other"
    runs = [run(teacher_buffer=str(path), seed=seed) for seed in (1, 2)]
    (first, played), (second, played_again) = [next(iter(seen.rows.items())) for seen in runs]
    first.excluded[-32:] = True  # so does the last row count once it is read
    assert same(run(teacher_buffer=str(path), seed=1).weights, runs[0].weights), (
        "the same run, made or read"
    )
    assert (len(played), len(played_again)) == (15, 0) and same(pack(first), pack(second))
    torch.save(tiny(4).state_dict(), other)
    monkeypatch.setattr(qdagger.Run, "open", lambda run: None)  # nor is a directory made
    others = dict(
        env_id="ALE/Pong-v5",
        repeat_action_probability=0.25,
        num_envs=2,
        teacher_steps=500,
        temperature=1.0,
    )
    for name, value in (others | dict(start_e=0.5, end_e=0.5, teacher=str(other))).items():
        message = refusal(run, teacher_buffer=str(path), **{name: value})
        assert message.startswith(f"--teacher-buffer {path}: made with another {name};")


KICKSTART = dict(offline_steps=0, temperature=1.0, learning_starts=20)


@pytest.mark.parametrize("baseline, lowest", [("zero", 0), ("random", -2)])
def test_lambda_is_the_formula_on_the_logged_returns(run, baseline, lowest):
    """By the last ten games that were over when the step began, 1 before. It weighs its part of the loss, and the
    learning rate follows. A teacher of 2, random play at -2; no offline phase, so no buffer of the teacher's either."""
    rng, expected = np.random.default_rng(0), []
    script = {row: rng.uniform(-3, 3 + row / 50, size=1 + row % 3) for row in range(15, 250, 4)}
    evaluate = lambda *_, epsilon=None, **__: [-2.0 if epsilon == 1.0 else 2.0]  # noqa: E731
    changes = KICKSTART | dict(
        return_baseline=baseline, total_timesteps=1000, final_learning_rate=1e-5
    )
    seen = run(evaluate, script=script, **changes)
    assert seen.values["charts/episodic_return"] == pytest.approx(
        np.concatenate(list(script.values()))
    )
    assert seen.steps["charts/episodic_return"] == [4 * row for row in script for _ in script[row]]
    assert seen.values["charts/episodic_length"].tolist() == [28] * len(
        seen.steps["charts/episodic_return"]
    )
    for step in seen.steps["charts/distill_coeff"]:
        last = seen.values["charts/episodic_return"][
            np.array(seen.steps["charts/episodic_return"]) <= step - 4
        ][-10:]
        share = (np.mean(last) - lowest) / (2 - lowest) if len(last) == 10 else 0
        expected.append(min(max(1 - share, 0), 1))
    assert seen.values["charts/distill_coeff"] == pytest.approx(expected, abs=1e-6)
    assert seen.values["charts/learning_rate"] == pytest.approx(
        1e-5 + 9e-5 * np.array(expected), abs=1e-9
    )
    assert expected[0] == 1 and sum(0 < value < 1 for value in expected) >= 4 and 0 in expected
    loss, td_loss, distill_loss = (
        seen.values[f"losses/{name}"] for name in ("loss", "td_loss", "distill_loss")
    )
    assert loss == pytest.approx(td_loss + 3 * np.array(expected) * distill_loss, rel=1e-5)
    assert (
        not seen.steps.keys() & OFFLINE_TAGS and len(seen.rows) == 1 and distill_loss.min() > 0.005
    )


def informed_lambdas(seen: SimpleNamespace, offline: list[float], steps: list[int]) -> list[float]:
    """By hand, after so many online steps: of the `offline` games and those logged the last ten; a teacher of 2."""
    ended = np.array(seen.steps["charts/episodic_return"]) - seen.args.offline_steps
    played = seen.values["charts/episodic_return"]
    lambdas = []
    for step in steps:
        last = [*offline, *played[ended <= step]][-10:]
        lambdas.append(min(max(1 - np.mean(last) / 2, 0), 1) if len(last) == 10 else 1)
    return lambdas


@pytest.mark.parametrize("episodes, first", [(10, 0.55), (4, 1.0), (13, 0.55)])
def test_lambda_is_informed_by_the_last_offline_evaluation(run, episodes, first):
    """Its games, at most ten, are the first of the ten returns, and those of training push them out one by one. Of
    fewer the rest is waited for. The first evaluation, before the student has learned anything, counts for nothing."""
    offline = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 90.0, 90.0, 90.0][:episodes]
    evaluations = [
        [2.0],
        [30.0] * episodes,
        offline,
        [0.0],
    ]  # the teacher's, at 0, at the end of phase 2, of phase 3
    script = {row: [row / 100] for row in range(30, 250, 9)}
    changes = dict(total_timesteps=1000, exploration_fraction=0.01, eval_episodes=episodes)
    seen = run(lambda *_, **__: evaluations.pop(0), script=script, **changes)
    logged = [
        step - 20 - 4 for step in seen.steps["charts/distill_coeff"]
    ]  # lambda is that of the step's beginning
    expected = informed_lambdas(seen, offline[:10], logged)
    assert seen.values["charts/distill_coeff"] == pytest.approx(expected, abs=1e-6)
    assert expected[0] == pytest.approx(first) and len(set(expected)) > 4
    if episodes == 10:  # as a reader of the curves would reckon it
        mean = seen.values["charts/offline/avg_episodic_return"][-1]
        assert expected[0] == pytest.approx(
            1 - mean / seen.values["charts/teacher/avg_episodic_return"][0]
        )


CASES = {
    "neither": ({}, [1, 0.25, 0, 0.5], 100, 4),
    "latched": (dict(distill_latch=True), [1, 0.25, 0, 0], 55, 2),
}
CASES |= {"cut off": (dict(distill_steps=120, offline_steps=60), [1, 0, 0, 0], 15 + 30, 1)}


@pytest.mark.parametrize("changes, coefficients, asked, taught", CASES.values(), ids=CASES.keys())
def test_lambda_once_over_stays_0_and_the_teacher_is_not_asked(
    run, monkeypatch, changes, coefficients, asked, taught
):
    """Of a teacher of 2: students of 1.5 after 30 vector steps, of 3 after 55, of 1 after 80. It is `asked` for
    Q-values in so many vector steps, 15 of its buffer; in so many of four points its loss is logged."""
    calls = []
    load = qdagger.load_network

    def load_and_count(*args):
        network = load(*args)
        network.register_forward_hook(lambda *_: calls.append(1))
        return network

    monkeypatch.setattr(qdagger, "load_network", load_and_count)
    script = {30: [1.5] * 10, 55: [3.0] * 10, 80: [1.0] * 10}
    seen = run(script=script, total_timesteps=400, **KICKSTART | changes)
    assert (
        seen.values["charts/distill_coeff"] == pytest.approx(coefficients) and len(calls) == asked
    )
    assert seen.steps["losses/distill_loss"] == seen.steps["losses/loss"][:taught]
    assert list(seen.values["losses/loss"] == seen.values["losses/td_loss"]) == [
        value == 0 for value in coefficients
    ]

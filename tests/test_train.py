"""Training as a whole.

Its phases on real games, its logs, counts of updates, lambda, and the same weights twice.
"""

import math
import re
import time
from dataclasses import asdict
from pathlib import Path
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
OFFLINE_TAGS = {
    "charts/offline/loss",
    "charts/offline/q_loss",
    "charts/offline/distill_loss",
    "charts/offline/avg_episodic_return",
}
ONLINE_TAGS = {  # those that need no teacher
    "charts/epsilon",
    "charts/SPS",
    "charts/distill_coeff",
    "charts/learning_rate",
    "losses/loss",
    "losses/td_loss",
    "losses/q_values",
    "eval/episodic_return",
}

ACTION = 3  # what the teachers here are fond of
SETTINGS = dict(
    network="nature",  # in fact `tiny`
    teacher_steps=480,  # with four games, 15 rows of the teacher's 32
    offline_steps=20,
    total_timesteps=240,
    learning_starts=100,
    buffer_size=400,
    batch_size=4,
    target_network_frequency=24,
    teacher_eval_episodes=1,
    eval_episodes=1,
    eval_frequency=0,
    save_model=True,
    cuda=False,
    amp=False,
)


# --- What stands in for parts of the program ---


def tiny(num_actions: int) -> AtariNetwork:
    """In place of the Nature CNN: a few thousand weights."""
    layers = [
        nn.Conv2d(4, 4, 12, stride=12),  # 84 to 7 pixels a side
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 7 * 7, 32),
        nn.ReLU(),
        nn.Linear(32, num_actions),
    ]
    return AtariNetwork(layers)


class Clockwork:
    """Games that cost nothing: stripes, by a clock.

    It starts at the seed and counts the steps of all environments. So, with `seeds_in_a_row`, games
    of a phase that is resumed go on with those before.

    Every fourth row is excluded: nothing is lost if a run ends with it. In every seventh a game
    ends; or `script` says with which returns games end in which row, counted from the seed.
    """

    num_actions = 4
    script: dict[int, list[float]] | None = None

    def __init__(self, args: Args, seeds: np.ndarray):
        self.num_envs = len(seeds)
        self.seed = int(seeds[0])
        self.clock = self.seed

    @property
    def obs(self) -> np.ndarray:
        rng = np.random.default_rng(self.clock)
        stripes = rng.integers(256, size=(self.num_envs, 1, 84, 1), dtype=np.uint8)
        return stripes.repeat(4, axis=1).repeat(84, axis=3)

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> GameStep:
        self.clock += self.num_envs
        row = self.clock // self.num_envs
        if self.script is not None:
            row_from_seed = (self.clock - self.seed) // self.num_envs
            scores = self.script.get(row_from_seed, [])
        elif row % 7 == 0:
            scores = [(row + self.actions.sum()) % 5 + 1.0]
        else:
            scores = []
        env = row // 7 % self.num_envs
        return GameStep(
            actions=self.actions,
            rewards=np.sign(self.actions - row % 4, dtype=np.float32),
            terminations=np.zeros(self.num_envs, dtype=bool),
            excluded=np.full(self.num_envs, row % 4 == 0),
            finished=[FinishedGame(env, float(score), 28) for score in scores],
        )


def seeds_in_a_row(purpose: str, seed: int, count: int, step: int = 0) -> np.ndarray:
    """In place of `seeds_for`.

    Those of the teacher's buffer count from 0, online from 10,000, of evaluations from 20,000 on.
    """
    return seed + step + np.arange(count) + 10_000 * qdagger.PURPOSES.index(purpose)


def two(*_, **__) -> list[float]:
    """In place of `evaluate`: no games, but a return."""
    return [2.0]


def time_with(**functions) -> SimpleNamespace:
    """In place of the module `time`: what it has, but for these functions."""
    return SimpleNamespace(**vars(time) | functions)


def same(one, other) -> bool:
    """Whether all values are equal, in dictionaries and lists of any depth."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return False
        return all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        if len(one) != len(other):
            return False
        return all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


# --- A run, and what was seen of it ---


class Seen:
    """What a run did, and what it left."""

    def __init__(self):
        self.epsilons: list[float] = []  # that were acted with
        # Of each gradient step: whether target and online network were equal before it, and how
        # many steps its replay held.
        self.in_sync: list[bool] = []
        self.stored: list[int] = []
        # What was added to each replay, but for the frames, in the order of their use.
        self.rows: dict[FrameReplay, list[GameStep]] = {}

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        real_act = qdagger.act
        real_add = FrameReplay.add
        real_gradient_step = Learner.gradient_step

        def act(network, generator, obs, epsilon):
            self.epsilons.append(epsilon)
            return real_act(network, generator, obs, epsilon)

        def add(replay, frames, step, teacher_q_values=None):
            self.rows.setdefault(replay, []).append(step)
            real_add(replay, frames, step, teacher_q_values)

        def gradient_step(learner, replay):
            self.rows.setdefault(replay, [])
            target = learner.target_network.state_dict()
            self.in_sync.append(same(target, learner.q_network.state_dict()))
            self.stored.append(int(replay.written) * replay.num_envs)
            real_gradient_step(learner, replay)

        patch.setattr(qdagger, "act", act)
        patch.setattr(FrameReplay, "add", add)
        patch.setattr(Learner, "gradient_step", gradient_step)

    def read(self, args: Args, directory: Path) -> None:
        self.args = args
        self.directory = directory
        self.weights = torch.load(directory / f"{args.exp_name}.cleanrl_model")

        events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
        text = events.Tensors("hyperparameters/text_summary")[0]
        self.text = text.tensor_proto.string_val[0].decode()
        self.steps = {}
        self.values = {}
        for tag in events.Tags()["scalars"]:
            logged = events.Scalars(tag)
            self.steps[tag] = [event.step for event in logged]
            self.values[tag] = np.array([event.value for event in logged])


@pytest.fixture(scope="module")
def run(make_model, tmp_path_factory):
    """run(evaluate, games, script, actions, **changes): train, and return what was seen.

    Unless told otherwise games are Clockwork, of 4 actions, and evaluations play none but return 2.
    """

    def go(evaluate=two, games=Clockwork, script=None, actions=4, **changes) -> Seen:
        seen = Seen()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("run"))
            patch.setitem(qdagger.NETWORKS, "nature", tiny)
            patch.setattr(Clockwork, "script", script)
            patch.setattr(qdagger, "AtariGames", games)
            patch.setattr(qdagger, "evaluate", evaluate)
            if games is Clockwork:
                patch.setattr(qdagger, "seeds_for", seeds_in_a_row)
            seen.watch(patch)

            teacher = make_model(actions, action=ACTION)  # tiny as well
            flags = {"teacher": str(teacher)} | SETTINGS | changes
            args = Args(**flags)
            directory = train(args).absolute()
        seen.read(args, directory)
        return seen

    return go


@pytest.fixture(scope="module")
def three_phases(run):
    """Asterix: each thing caught is 50 points, a NOOP is forced after a life.

    Games end while the student learns.
    """
    return run(
        qdagger.evaluate,
        AtariGames,
        actions=9,
        env_id="AsterixNoFrameskip-v4",
        num_envs=3,
        teacher_steps=256,
        offline_steps=100,
        total_timesteps=1800,
        learning_starts=1600,
        buffer_size=2000,
        exploration_fraction=0.9,
        learning_rate=1e-3,
        eval_frequency=1200,
        capture_video=True,
    )


# --- Logs and files ---


def documented_tags() -> list[str]:
    """Those in the first column of the table."""
    page = (PROGRAM.parent / "docs" / "logging.md").read_text()
    first_column = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    return re.findall(r"`([\w/]+)`", " ".join(first_column))


def test_every_documented_tag_and_no_other_is_logged_along_its_own_axis(three_phases):
    """Gradient steps while offline; then environment steps, which begin at 100."""
    steps = three_phases.steps
    values = three_phases.values
    assert sorted(documented_tags()) == sorted([*steps, "hyperparameters"])

    # Strides of 3 that end at or after hundreds.
    online = [100 + math.ceil(count / 3) * 3 for count in range(100, 1801, 100)]
    learning = online[16:]  # from 1700 on
    expected = {
        "charts/teacher/avg_episodic_return": [0],
        "charts/offline/avg_episodic_return": [0, 100],
        "charts/offline/loss": [100],
        "charts/offline/q_loss": [100],
        "charts/offline/distill_loss": [100],
        "charts/epsilon": online,
        "charts/SPS": online,
        "charts/distill_coeff": online,
        "charts/learning_rate": online,
        "losses/loss": learning,
        "losses/td_loss": learning,
        "losses/distill_loss": learning,
        "losses/q_values": learning,
        "eval/episodic_return": [1300, 1900],
    }
    for tag in GAME_TAGS:
        expected[tag] = steps[tag]  # whenever a game ends
    assert steps == expected

    for of_tag in values.values():
        assert np.isfinite(of_tag).all()
    assert values["charts/teacher/avg_episodic_return"] > 0
    assert (values["charts/distill_coeff"] == 1).all()
    weighted = values["charts/offline/q_loss"] + 3 * values["charts/offline/distill_loss"]
    assert values["charts/offline/loss"] == pytest.approx(weighted, rel=1e-5)

    # By the step at which a stride begins.
    epsilons = [max(0.01, 1 - 0.99 * (step - 3) / 1620) for step in online]
    assert values["charts/epsilon"] == pytest.approx(epsilons, abs=1e-6)
    assert epsilons[-1] == 0.01


def test_what_is_stored_is_what_was_really_done(three_phases):
    """Forced steps are the NOOPs that they were.

    The teacher's Q-values in both buffers are those at the observation.
    """
    _, online_rows = three_phases.rows.values()
    actions = np.stack([row.actions for row in online_rows])
    terminations = np.stack([row.terminations for row in online_rows])
    forced = np.stack([row.excluded for row in online_rows])
    assert forced.sum() > 10
    assert (actions[forced] == qdagger.NOOP).all()
    assert terminations[:-1][forced[1:]].all()  # each follows a life that was lost

    teacher = tiny(9)
    teacher.load_state_dict(torch.load(three_phases.args.teacher))
    for replay in three_phases.rows:
        uniform = replay.random_numbers(64, torch.Generator().manual_seed(0))
        batch = replay.sample(64, 3, 0.99, uniform)
        assert torch.allclose(batch.teacher_q_values, teacher(batch.obs), atol=1e-5)
        assert batch.teacher_q_values.std(0).min() > 1e-4  # another row's would be others


def test_a_run_leaves_what_was_asked_for_and_nothing_else(three_phases):
    """Its settings as text, a film of each evaluation, its checkpoints, its model.

    No half-written files.
    """
    args = three_phases.args
    directory = three_phases.directory

    settings = asdict(args) | {"teacher_file": f"{args.teacher}, as given", "threads": 1}
    for name, value in settings.items():
        assert f"|{name}|{value}|" in three_phases.text

    files = {
        "checkpoint.pt",
        "checkpoint.previous.pt",
        "lock",
        f"{args.exp_name}.cleanrl_model",
        f"{args.exp_name}.best.cleanrl_model",
        "videos",
        "videos/0.mp4",
        "videos/100.mp4",
        "videos/1300.mp4",
        "videos/1900.mp4",
    }
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*")}
    assert names >= files
    (event_file,) = names - files
    assert "tfevents" in event_file
    beside_runs = directory.parent.parent
    assert [path.name for path in beside_runs.iterdir()] == ["runs"]


# --- Counts and schedules ---


@pytest.mark.parametrize("num_envs", [1, 3, 8])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_updates_and_exploration_do_not_depend_on_the_number_of_environments(run, num_envs, tau):
    seen = run(
        num_envs=num_envs,
        offline_steps=50,
        tau=tau,
        exploration_fraction=0.5,
        start_e=0.9,
        end_e=0.1,
    )

    # Offline each of 50 updates draws from the whole buffer. Online there is one in four steps from
    # 101 on, offline steps not counted, while the games step.
    teacher_envs = 8 * num_envs
    buffer = math.ceil(480 / teacher_envs) * teacher_envs
    online = [(step - 1) // num_envs * num_envs for step in range(104, 241, 4)]
    assert seen.stored == [buffer] * 50 + online

    # The networks are equal at first, and when phase 2 has ended, whatever tau is. The target is
    # new after every 24th update offline, and online at step 120, with the fifth update, 144, ...
    equal_before = [1, 51]
    if tau == 1:
        equal_before += [25, 49]
        equal_before += [50 + number for number in (6, 12, 18, 24, 30)]
    in_sync = [number for number, equal in enumerate(seen.in_sync, 1) if equal]
    assert in_sync == sorted(equal_before)

    # The teacher's exploration falls over its buffer, the student's from where the offline steps
    # have brought it.
    epsilons = [0.9 - 0.8 * step / 480 for step in range(0, 480, teacher_envs)]
    epsilons += [max(0.1, 0.9 - 0.8 * (50 + step) / 120) for step in range(0, 240, num_envs)]
    assert seen.epsilons == pytest.approx(epsilons)


def test_the_step_rate_is_of_online_steps_alone(run, monkeypatch):
    """By a clock in which 4 steps take half a second, an update a day, an evaluation months."""
    passed = []
    real_step_wait = Clockwork.step_wait
    real_loss = qdagger.qdagger_loss

    def step_wait(games):
        passed.append(0.5)
        return real_step_wait(games)

    def loss(*args):
        passed.append(1e5)
        return real_loss(*args)

    def evaluate(*_, **__):
        passed.append(1e7)
        return [2.0]

    monkeypatch.setattr(Clockwork, "step_wait", step_wait)
    monkeypatch.setattr(qdagger, "qdagger_loss", loss)
    monkeypatch.setattr(qdagger, "time", time_with(perf_counter=lambda: sum(passed)))

    seen = run(evaluate, eval_frequency=80, learning_starts=239)

    assert list(seen.values["charts/SPS"]) == [8, 8]
    assert len(passed) == 15 + 20 + 60 + 1 + 6  # rows, updates, rows, an update, evaluations


def test_a_seed_settles_weights_and_points_and_evaluations_change_nothing(run):
    """Real games every 80 steps and at the end, against none."""

    def evaluate(*args, **options) -> list[float]:
        scores = qdagger_evaluate(*args, **options)
        return [score + 1 for score in scores]  # since the teacher's must be above 0

    qdagger_evaluate = qdagger.evaluate
    sticky = dict(games=AtariGames, huber=True, repeat_action_probability=0.25, num_envs=1)
    first = run(**sticky)
    again = run(**sticky)
    other = run(seed=2, **sticky)
    evaluated = run(evaluate, eval_frequency=80, **sticky)

    assert same(first.weights, again.weights)
    assert not same(first.weights, other.weights)
    assert first.steps == again.steps
    for tag in first.steps.keys() - {"charts/SPS"}:
        assert (first.values[tag] == again.values[tag]).all()
    assert evaluated.steps["eval/episodic_return"] == [100, 180, 260]
    assert same(first.weights, evaluated.weights)


# --- With and without a teacher ---


@pytest.mark.parametrize(
    "network, starts, first, layer",
    [
        ("nature", 0, 28, 0),
        ("impala", 100, 100, "0.conv"),
    ],
)
def test_without_a_teacher_it_is_plain_dqn(run, network, starts, first, layer):
    """No trace of a teacher, steps counted from 0, and the loss is its TD part alone.

    Nothing is learned before there are, of four games each, seven rows: three rewards and a stack
    of four.
    """
    seen = run(teacher="none", network=network, learning_starts=starts, final_learning_rate=1e-5)

    assert seen.steps.keys() - GAME_TAGS == ONLINE_TAGS
    assert seen.steps["eval/episodic_return"] == [240]
    assert seen.steps["charts/distill_coeff"] == [100, 200]
    assert not seen.values["charts/distill_coeff"].any()
    assert seen.values["charts/learning_rate"] == pytest.approx(1e-4)
    assert (seen.values["losses/loss"] == seen.values["losses/td_loss"]).all()
    assert seen.stored == list(range(first, 240, 4))
    assert f"network.{layer}.weight" in seen.weights


def test_offline_alone_imitates_the_teacher(run):
    """No online step at all.

    The student ends up pressing what its teacher, without exploration, has pressed.
    """
    seen = run(
        offline_steps=100,
        total_timesteps=0,
        learning_rate=1e-2,
        batch_size=16,
        start_e=0.0,
        end_e=0.0,
    )

    assert len(seen.in_sync) == 100
    assert seen.steps.keys() == {"charts/teacher/avg_episodic_return"} | OFFLINE_TAGS
    assert seen.steps["charts/offline/avg_episodic_return"] == [0, 100]
    student = tiny(4)
    student.load_state_dict(seen.weights)
    (buffer,) = seen.rows
    uniform = buffer.random_numbers(64, torch.Generator().manual_seed(0))
    batch = buffer.sample(64, 1, 0.99, uniform)
    assert (batch.actions == ACTION).all()
    assert (student(batch.obs).argmax(1) == ACTION).all()


def test_the_file_of_the_buffer_is_for_students_of_the_same_teacher_alone(
    run, tmp_path, monkeypatch
):
    """For them, whatever their seed, no teacher plays again.

    For others it is refused with the name of the setting.
    """
    path = str(tmp_path / "buffer")
    makes = run(teacher_buffer=path, seed=1)
    reads = run(teacher_buffer=path, seed=2)
    made, _ = makes.rows  # the teacher's buffer comes first
    read, _ = reads.rows
    assert len(makes.rows[made]) == 15
    assert len(reads.rows[read]) == 0
    made.excluded[-32:] = True  # as the last row is once it is read
    assert same(pack(made), pack(read))

    reads_too = run(teacher_buffer=path, seed=1)
    assert same(reads_too.weights, makes.weights)

    other_teacher = tmp_path / "other"
    torch.save(tiny(4).state_dict(), other_teacher)
    others = dict(
        env_id="ALE/Pong-v5",
        repeat_action_probability=0.25,
        num_envs=2,
        teacher_steps=500,
        temperature=1.0,
        start_e=0.5,
        end_e=0.5,
        teacher=str(other_teacher),
    )
    monkeypatch.setattr(qdagger.Run, "open_log", lambda run: None)  # a refusal needs no directory
    for name, value in others.items():
        changes = {name: value}
        message = refusal(run, teacher_buffer=path, **changes)
        assert message.startswith(f"--teacher-buffer {path}: made with another {name};")


# --- Lambda ---

KICKSTART = dict(offline_steps=0, temperature=1.0, learning_starts=20)


def lambdas_by_hand(seen: Seen, offline=(), lowest: float = 0.0) -> list[float]:
    """At each step where lambda was logged, of a teacher of 2 and random play at `lowest`.

    Of the scores of `offline` and those of training games that were over when the step of all four
    environments began the last ten count.
    """
    scores = seen.values["charts/episodic_return"]
    ended = np.array(seen.steps["charts/episodic_return"])
    lambdas = []
    for step in seen.steps["charts/distill_coeff"]:
        last = [*offline, *scores[ended <= step - 4]][-10:]
        if len(last) < 10:
            lambdas.append(1.0)
        else:
            share = (np.mean(last) - lowest) / (2 - lowest)
            lambdas.append(min(max(1 - share, 0), 1))
    return lambdas


@pytest.mark.parametrize("baseline, lowest", [("zero", 0), ("random", -2)])
def test_lambda_is_the_formula_on_the_logged_returns(run, baseline, lowest):
    """It weighs its part of the loss, and the learning rate follows.

    There is no offline phase, so no buffer of the teacher's either.
    """

    def evaluate(*_, epsilon=None, **__) -> list[float]:
        return [-2.0] if epsilon == 1.0 else [2.0]

    rng = np.random.default_rng(0)
    script = {row: rng.uniform(-3, 3 + row / 50, size=1 + row % 3) for row in range(15, 250, 4)}
    changes = KICKSTART | dict(
        return_baseline=baseline, total_timesteps=1000, final_learning_rate=1e-5
    )
    seen = run(evaluate, script=script, **changes)

    # What the script says is logged.
    scores = np.concatenate(list(script.values()))
    ended = []
    for row, scores_of_row in script.items():
        ended += [4 * row] * len(scores_of_row)
    assert seen.values["charts/episodic_return"] == pytest.approx(scores)
    assert seen.steps["charts/episodic_return"] == ended
    assert seen.values["charts/episodic_length"].tolist() == [28] * len(ended)

    # Lambda: 1 at first, then a share, and once 0.
    expected = np.array(lambdas_by_hand(seen, lowest=lowest))
    assert seen.values["charts/distill_coeff"] == pytest.approx(expected, abs=1e-6)
    assert expected[0] == 1
    assert ((expected > 0) & (expected < 1)).sum() >= 4
    assert 0 in expected

    # What follows from it.
    learning_rate = 1e-5 + 9e-5 * expected
    assert seen.values["charts/learning_rate"] == pytest.approx(learning_rate, abs=1e-9)
    td_loss = seen.values["losses/td_loss"]
    distill_loss = seen.values["losses/distill_loss"]
    loss = td_loss + 3 * expected * distill_loss
    assert seen.values["losses/loss"] == pytest.approx(loss, rel=1e-5)
    assert distill_loss.min() > 0.005

    assert not seen.steps.keys() & OFFLINE_TAGS
    assert len(seen.rows) == 1


@pytest.mark.parametrize("episodes, first", [(10, 0.55), (4, 1.0), (13, 0.55)])
def test_lambda_is_informed_by_the_last_offline_evaluation(run, episodes, first):
    """Its games, at most ten, are the first of the ten returns.

    Those of training push them out one by one. If there are fewer than ten, the rest is waited for.
    The first evaluation, before the student has learned anything, counts for nothing.
    """
    offline = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 90.0, 90.0, 90.0][:episodes]
    evaluations = [
        [2.0],  # the teacher's
        [30.0] * episodes,  # at the beginning of phase 2
        offline,  # at its end
        [0.0],  # at the end of phase 3
    ]
    script = {row: [row / 100] for row in range(30, 250, 9)}

    seen = run(
        lambda *_, **__: evaluations.pop(0),
        script=script,
        total_timesteps=1000,
        exploration_fraction=0.01,
        eval_episodes=episodes,
    )

    expected = lambdas_by_hand(seen, offline[:10])
    assert seen.values["charts/distill_coeff"] == pytest.approx(expected, abs=1e-6)
    assert expected[0] == pytest.approx(first)
    assert len(set(expected)) > 4
    if episodes == 10:  # as a reader of the curves would reckon it
        student = seen.values["charts/offline/avg_episodic_return"][-1]
        teacher = seen.values["charts/teacher/avg_episodic_return"][0]
        assert expected[0] == pytest.approx(1 - student / teacher)


@pytest.mark.parametrize(
    "changes, lambdas, asked, taught",
    [
        pytest.param({}, [1, 0.25, 0, 0.5], 100, 4, id="neither"),
        pytest.param({"distill_latch": True}, [1, 0.25, 0, 0], 55, 2, id="latched"),
        pytest.param(
            {"distill_steps": 120, "offline_steps": 60}, [1, 0, 0, 0], 15 + 30, 1, id="cut off"
        ),
    ],
)
def test_lambda_once_over_stays_0_and_the_teacher_is_not_asked(
    run, monkeypatch, changes, lambdas, asked, taught
):
    """A teacher of 2; students of 1.5 after 30 rows, of 3 after 55, of 1 after 80.

    The teacher is `asked` for Q-values in so many rows, 15 of them of its buffer if there is one.
    In `taught` of the four points its loss is logged.
    """
    calls = []
    real_load_network = qdagger.load_network

    def load_network(*args):
        network = real_load_network(*args)
        network.register_forward_hook(lambda *_: calls.append(1))
        return network

    monkeypatch.setattr(qdagger, "load_network", load_network)
    script = {30: [1.5] * 10, 55: [3.0] * 10, 80: [1.0] * 10}

    seen = run(script=script, total_timesteps=400, **KICKSTART | changes)

    assert seen.values["charts/distill_coeff"] == pytest.approx(lambdas)
    assert len(calls) == asked
    assert seen.steps["losses/distill_loss"] == seen.steps["losses/loss"][:taught]
    td_alone = seen.values["losses/loss"] == seen.values["losses/td_loss"]
    assert list(td_alone) == [lambda_ == 0 for lambda_ in lambdas]

"""Training as a whole, on real games: phases, logs, counts of updates, lambda, and the same weights twice."""

import json
import math
import time
from dataclasses import fields
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import (
    Args,
    AtariNetwork,
    FrameReplay,
    Learner,
    QNetwork,
    TeacherNetwork,
    load_model,
    train,
)

ONLINE_TAGS = {
    *("charts/episodic_return", "charts/episodic_length", "charts/epsilon", "charts/SPS", "charts/distill_coeff"),
    *("losses/loss", "losses/td_loss", "losses/q_values", "eval/episodic_return"),
}
TEACHER_TAGS = {"charts/teacher/avg_episodic_return", "losses/distill_loss"}
OFFLINE_TAGS = {f"charts/offline/{name}" for name in ("loss", "q_loss", "distill_loss", "avg_episodic_return")}
ACTION = 1  # FIRE: launches the ball and stays, which scores 2 and ends within 200 steps


class Run(SimpleNamespace):
    """A finished training: its directory, its logs, and what was seen right before each of its gradient steps.

    `in_sync` notes whether target and online network were equal, `stored` how many environment steps the replay had
    been given that the batch came from, and `replays` those replays in the order of their first use.
    """

    def scalars(self, tag: str) -> dict[int, float]:
        return {event.step: event.value for event in self.events.Scalars(tag)}

    @property
    def tags(self) -> set[str]:
        return set(self.events.Tags()["scalars"])

    def model(self) -> AtariNetwork:
        (path,) = self.directory.glob("*.cleanrl_model")
        return load_model(path, 4, "--teacher")


@pytest.fixture(scope="module")
def run(make_model, tmp_path_factory):
    """run(evaluate=..., games=..., **changes): train a small Nature CNN on Breakout under observation.

    Evaluations play no games but return 2, unless `evaluate` is another function.
    """
    phases = dict(teacher_steps=144, offline_steps=20, total_timesteps=240, learning_starts=100)
    sizes = dict(network="nature", batch_size=4, buffer_size=240, target_network_frequency=24)
    games = dict(teacher_eval_episodes=1, eval_episodes=1, eval_frequency=0, save_model=True, cuda=False)
    defaults = dict(teacher=str(make_model(4, action=ACTION))) | phases | sizes | games

    def go(evaluate=lambda *args, **options: [2.0], games=qdagger.AtariGames, **changes) -> Run:
        seen = Run(in_sync=[], stored=[], replays=[], parameters=None)

        class SpyReplay(FrameReplay):
            added = 0

            def add(self, *args, **options):
                self.added += self.num_envs
                super().add(*args, **options)

            def sample(self, *args, **options):
                if self not in seen.replays:
                    seen.replays.append(self)
                seen.stored.append(self.added)
                return super().sample(*args, **options)

        class SpyLearner(Learner):
            def gradient_step(self, replay):
                seen.parameters = list(self.q_network.parameters())
                seen.in_sync.append(all(map(torch.equal, self.target_network.parameters(), seen.parameters)))
                super().gradient_step(replay)

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("run"))
            patch.setattr(qdagger, "Learner", SpyLearner)
            patch.setattr(qdagger, "FrameReplay", SpyReplay)
            patch.setattr(qdagger, "AtariGames", games)
            patch.setattr(qdagger, "evaluate", evaluate)
            seen.args = Args(**defaults | changes)
            seen.directory = train(seen.args).absolute()
        seen.events = EventAccumulator(str(seen.directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        return seen

    return go


def same_weights(one: Run, other: Run) -> bool:
    a, b = one.model().state_dict(), other.model().state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- The three phases, with real evaluations ---


@pytest.fixture(scope="module")
def three_phases(run):
    """The default network on real games throughout, long enough that games end while it learns."""
    steps = dict(teacher_steps=120, offline_steps=100, total_timesteps=1200, learning_starts=1000, buffer_size=2000)
    exploration = dict(start_e=1.0, end_e=0.05, exploration_fraction=1.0)
    return run(qdagger.evaluate, network="impala", eval_frequency=600, **steps, **exploration)


def test_every_documented_tag_and_no_other_is_logged(three_phases):
    assert three_phases.tags == ONLINE_TAGS | TEACHER_TAGS | OFFLINE_TAGS
    assert all(np.isfinite(list(three_phases.scalars(tag).values())).all() for tag in three_phases.tags)


def test_each_tag_has_its_step_axis(three_phases):
    """Gradient steps while offline; from there on environment steps, which begin at offline_steps."""
    teacher = three_phases.scalars("charts/teacher/avg_episodic_return")
    assert list(teacher) == [0] and teacher[0] > 0
    assert list(three_phases.scalars("charts/offline/avg_episodic_return")) == [0, 100]
    for tag in OFFLINE_TAGS - {"charts/offline/avg_episodic_return"}:
        assert list(three_phases.scalars(tag)) == [100], tag
    for tag in ("charts/epsilon", "charts/SPS", "charts/distill_coeff"):
        assert list(three_phases.scalars(tag)) == list(range(200, 1301, 100)), tag
    for tag in ("losses/loss", "losses/td_loss", "losses/distill_loss", "losses/q_values"):
        assert list(three_phases.scalars(tag)) == [1200, 1300], tag  # learning_starts is 1000 online steps
    assert list(three_phases.scalars("eval/episodic_return")) == [700, 1300]


def test_exploration_falls_along_the_logged_steps(three_phases):
    """Offline steps count: at the first online step the schedule is already 100 of its 1200 steps down."""
    for step, epsilon in three_phases.scalars("charts/epsilon").items():
        assert epsilon == pytest.approx(max(0.05, 1 - 0.95 * (step - 4) / 1200), abs=1e-6)


def test_games_are_logged_in_points_and_frames(three_phases):
    """At least four games end; the first one's length is four frames per decision, and what resets take."""
    returns, lengths = (three_phases.events.Scalars(f"charts/episodic_{name}") for name in ("return", "length"))
    assert len(returns) == len(lengths) >= 4
    assert all(event.value >= 0 and event.value == int(event.value) for event in returns)
    decisions = (lengths[0].step - 100) // 4
    assert 4 * decisions - 4 <= lengths[0].value <= 4 * decisions + 150
    assert sum(event.value for event in lengths) <= 4 * 1200 + len(lengths) * 150


def test_lambda_is_1_until_ten_games_are_over(three_phases):
    ended = [event.step for event in three_phases.events.Scalars("charts/episodic_return")]
    coefficients = three_phases.scalars("charts/distill_coeff")
    assert coefficients[200] == 1
    tenth = ended[9] if len(ended) >= 10 else math.inf
    assert all(value == 1 if step <= tenth else 0 <= value <= 1 for step, value in coefficients.items())


def test_the_loss_is_the_sum_of_its_parts(three_phases):
    """distill_coef is 3; lambda is 1 offline, and the logged coefficient online."""
    parts = (three_phases.scalars(f"charts/offline/{name}") for name in ("loss", "q_loss", "distill_loss"))
    for loss, td_loss, distill_loss in zip(*(part.values() for part in parts), strict=True):
        assert loss == pytest.approx(td_loss + 3 * distill_loss, rel=1e-5)
        assert distill_loss > 0
    for step, loss in three_phases.scalars("losses/loss").items():
        weight = 3 * three_phases.scalars("charts/distill_coeff")[step]
        distill_loss = three_phases.scalars("losses/distill_loss")[step]
        assert loss == pytest.approx(three_phases.scalars("losses/td_loss")[step] + weight * distill_loss, rel=1e-5)


def test_the_saved_model_is_what_training_ended_with(three_phases):
    saved = list(three_phases.model().parameters())
    assert len(saved) == len(three_phases.parameters)
    assert all(map(torch.equal, saved, three_phases.parameters))
    assert type(three_phases.model()) is QNetwork


def test_every_setting_is_kept_with_the_run(three_phases):
    kept = json.loads((three_phases.directory / "hyperparameters.json").read_text())
    text = three_phases.events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    for field in fields(Args):
        assert kept[field.name] == getattr(three_phases.args, field.name), field.name
        assert f"|{field.name}|{getattr(three_phases.args, field.name)}|" in text


def test_a_run_leaves_what_was_asked_for_and_nothing_else(three_phases):
    """No videos, no half-written files, one event file."""
    names = sorted(path.name for path in three_phases.directory.iterdir())
    assert [name for name in names if not name.startswith("events.out.tfevents")] == [
        "checkpoints",
        "hyperparameters.json",
        f"{three_phases.args.exp_name}.cleanrl_model",
    ]
    assert len(names) == 4
    assert [path.name for path in three_phases.directory.parent.parent.iterdir()] == ["runs"]


def test_videos_of_a_training_and_its_last_evaluation(run):
    """From the first game that begins in the first environment on, at ever longer intervals; playable to their end."""
    cv2 = pytest.importorskip("cv2")
    pytest.importorskip("moviepy")
    seen = run(
        qdagger.evaluate, capture_video=True, total_timesteps=2400, learning_starts=2000, teacher="none", end_e=0.5
    )
    videos = {path.name: cv2.VideoCapture(str(path)) for path in (seen.directory / "videos").iterdir()}
    assert "evaluation.mp4" in videos and 2 <= len(videos) <= 8
    for name, video in videos.items():
        assert video.get(cv2.CAP_PROP_FRAME_WIDTH) == 160 and video.get(cv2.CAP_PROP_FRAME_HEIGHT) == 210, name
        assert video.get(cv2.CAP_PROP_FRAME_COUNT) > 20 and video.read()[1].max() > 0, name


# --- The same weights twice ---

AUTHORS = dict(n_step=3, huber=True, temperature=0.1, distill_coef=3.0, adam_eps=1.5e-4, repeat_action_probability=0.25)


@pytest.fixture(scope="module")
def seeded(run):
    return {num_envs: run(num_envs=num_envs, **AUTHORS) for num_envs in (1, 4)}


@pytest.mark.parametrize("num_envs", [1, 4])
def test_the_same_seed_ends_with_the_same_weights(run, seeded, num_envs):
    assert same_weights(run(num_envs=num_envs, **AUTHORS), seeded[num_envs])


def test_another_seed_ends_with_other_weights(run, seeded):
    assert not same_weights(run(num_envs=4, seed=2, **AUTHORS), seeded[4])


def test_evaluations_change_nothing_in_the_training_around_them(run, seeded):
    """Real games in the middle and at the end, against none at all; a point more, since the teacher must have one."""

    def evaluate(*args, games=qdagger.evaluate, **options) -> list[float]:
        return [score + 1 for score in games(*args, **options)]

    evaluated = run(evaluate, num_envs=4, eval_frequency=80, **AUTHORS)
    assert list(evaluated.scalars("eval/episodic_return")) == [100, 180, 260]
    assert same_weights(evaluated, seeded[4])


def test_evaluations_are_no_part_of_the_step_rate(run, monkeypatch):
    """A clock that an evaluation moves on by weeks must not show in SPS."""
    weeks = 0.0

    def ahead(clock):
        return lambda: clock() + weeks

    for name in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(time, name, ahead(getattr(time, name)))

    def slow(*args, **options) -> list[float]:
        nonlocal weeks
        weeks += 1e7
        return [2.0]

    speeds = run(slow, eval_frequency=80).scalars("charts/SPS")
    assert list(speeds) == [120, 220] and all(0.1 < speed < 1e5 for speed in speeds.values())


# --- How often it learns ---


@pytest.mark.parametrize("num_envs", [1, 3, 4, 8])
def test_updates_do_not_depend_on_the_number_of_environments(run, num_envs):
    """35 gradient steps in 240 steps, of which 100 are waited; the target is renewed after 120, 144 and so on."""
    seen = run(num_envs=num_envs, teacher="none")
    assert len(seen.in_sync) == 35
    assert [step for step, in_sync in enumerate(seen.in_sync, 1) if in_sync] == [1, 6, 12, 18, 24, 30]
    assert 100 - num_envs < seen.stored[0] <= 104
    assert all(later - earlier <= num_envs + 4 for earlier, later in pairwise(seen.stored))
    assert seen.stored[-1] >= 240 - 2 * num_envs


@pytest.mark.parametrize("num_envs", [1, 3, 4, 8])
def test_offline_updates_do_not_depend_on_it_either(run, num_envs):
    """50 on the whole teacher buffer, the target renewed after every 24th and at the end; then the online ones."""
    seen = run(num_envs=num_envs, offline_steps=50)
    played = math.ceil(144 / (4 * num_envs)) * 4 * num_envs
    assert seen.stored[:50] == [played] * 50
    assert len(seen.replays) == 2 and len(seen.in_sync) == 50 + 35
    in_sync = [step for step, in_sync in enumerate(seen.in_sync, 1) if in_sync]
    assert in_sync == [1, 25, 49, 51, *(50 + step for step in (6, 12, 18, 24, 30))]


def test_learning_starts_counts_online_steps(run):
    """More offline steps than learning_starts do not open the gate early."""
    seen = run(offline_steps=120, learning_starts=100)
    assert len(seen.in_sync) == 120 + 35
    assert seen.stored[120] >= 100


def test_nothing_is_learned_before_a_batch_can_be_drawn(run):
    """learning_starts 0: the first update waits until the replay holds a batch of three-step returns."""
    seen = run(teacher="none", learning_starts=0, batch_size=32, n_step=3, total_timesteps=120)
    assert seen.stored[0] >= 32 and len(seen.stored) >= (120 - 60) / 4


def test_tau_mixes_the_target_instead_of_copying_it(run):
    seen = run(teacher="none", tau=0.5)
    assert [step for step, in_sync in enumerate(seen.in_sync, 1) if in_sync] == [1]


# --- Which phases there are ---


@pytest.mark.parametrize("network, network_class", [("nature", TeacherNetwork), ("impala", QNetwork)])
def test_without_a_teacher_it_is_plain_dqn(run, network, network_class):
    """No trace of a teacher, lambda 0 and the loss its TD part alone, steps counted from 0."""
    seen = run(teacher="none", network=network)
    assert seen.tags - {"charts/episodic_return", "charts/episodic_length"} == {
        tag for tag in ONLINE_TAGS if not tag.startswith("charts/episodic")
    }
    assert seen.scalars("charts/distill_coeff") == {100: 0, 200: 0}
    assert list(seen.scalars("eval/episodic_return")) == [240]
    assert seen.scalars("losses/loss") == seen.scalars("losses/td_loss")
    assert type(seen.model()) is network_class and len(seen.in_sync) == 35


def test_offline_alone_imitates_the_teacher(run):
    """No online step at all: the student ends up pressing what its teacher presses."""
    seen = run(total_timesteps=0, offline_steps=100, teacher_steps=240, learning_rate=1e-3, batch_size=16)
    assert len(seen.in_sync) == 100 and len(seen.replays) == 1
    assert seen.tags == TEACHER_TAGS - {"losses/distill_loss"} | OFFLINE_TAGS | {"eval/episodic_return"}
    assert list(seen.scalars("eval/episodic_return")) == [100]
    obs = seen.replays[0].sample(64, 1, 0.99, torch.Generator().manual_seed(0)).obs
    assert (seen.model()(obs).argmax(1) == ACTION).all()


def test_kickstarting_alone_has_no_teacher_buffer(run, capfd):
    """offline_steps 0: the teacher does not play for a buffer, but its Q-values are learned from online."""
    seen = run(offline_steps=0, teacher_steps=0, temperature=1.0)
    assert "teacher buffer" not in capfd.readouterr().err
    assert len(seen.replays) == 1 and len(seen.in_sync) == 35
    assert not seen.tags & OFFLINE_TAGS and seen.tags >= TEACHER_TAGS
    assert seen.scalars("charts/distill_coeff") == {100: 1, 200: 1}
    batch = seen.replays[0].sample(64, 1, 0.99, torch.Generator().manual_seed(0))
    assert (batch.teacher_q_values.argmax(1) == ACTION).all()
    assert all(loss > 0.02 for loss in seen.scalars("losses/distill_loss").values())


# --- Lambda ---


def test_lambda_is_cut_off_at_distill_steps(run):
    """120 online steps are taught, the offline ones do not count; afterwards the loss is its TD part alone."""
    seen = run(distill_steps=120, learning_starts=20, total_timesteps=400, buffer_size=400, temperature=1.0)
    assert seen.scalars("charts/distill_coeff") == {120: 1, 220: 0, 320: 0, 420: 0}
    loss, td_loss, distill_loss = (seen.scalars(f"losses/{name}") for name in ("loss", "td_loss", "distill_loss"))
    assert loss[120] == pytest.approx(td_loss[120] + 3 * distill_loss[120], rel=1e-5) and distill_loss[120] > 0.02
    assert all(loss[step] == td_loss[step] for step in (220, 320, 420))


def scripted_games(returns: dict[int, float]):
    """AtariGames that report, at their n-th step, ten games of that return."""

    class Scripted(qdagger.AtariGames):
        steps = 0

        def step_wait(self):
            self.steps += 1
            games = [(0, returns[self.steps], 400)] * 10 if self.steps in returns else []
            return super().step_wait()._replace(games=games)

    return Scripted


@pytest.mark.parametrize("latch, coefficients", [(False, [1, 0.25, 0, 0.5]), (True, [1, 0.25, 0, 0])])
def test_lambda_follows_the_last_ten_games_unless_it_is_latched(run, latch, coefficients):
    """A teacher of 2: students of 1.5, 3 and 1 give 0.25, 0 and 0.5, or stay at 0 once they were there."""
    games = scripted_games({30: 1.5, 55: 3.0, 80: 1.0})
    phases = dict(teacher_steps=0, offline_steps=0, total_timesteps=400, buffer_size=400)
    seen = run(games=games, distill_latch=latch, **phases)
    assert list(seen.scalars("charts/distill_coeff").values()) == pytest.approx(coefficients)
    assert len(seen.events.Scalars("charts/episodic_return")) == 30


def test_lambda_above_a_random_baseline(run):
    """A teacher of 2 and chance at -2: a student of 1 has covered three quarters of the way."""

    def evaluate(network, args, episodes, device, epsilon=None, **options) -> list[float]:
        return [-2.0 if epsilon == 1.0 else 2.0]

    games = scripted_games({10: 1.0})
    seen = run(evaluate, games, return_baseline="random", teacher_steps=0, offline_steps=0)
    assert list(seen.scalars("charts/distill_coeff").values()) == pytest.approx([0.25, 0.25])

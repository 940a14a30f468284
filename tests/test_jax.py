"""The JAX program beside its sibling in PyTorch: the same text, numbers, files and runs."""

import ast
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from conftest import Malicious, interrupted, points, saved

jax = pytest.importorskip(
    "jax", reason="the extra `jax` is not installed, or Python is older than 3.11"
)

import flax.linen as nn  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import test_replay  # noqa: E402
from flax import serialization  # noqa: E402
from flax.traverse_util import flatten_dict  # noqa: E402
from test_resume import steps  # noqa: E402
from test_teacher import AGENTS, OBS, TEACHERS, sb3  # noqa: E402
from test_train import Clockwork, seeds_in_a_row  # noqa: E402

import qdagger_dqn_atari_impalacnn as sibling  # noqa: E402
import qdagger_dqn_atari_jax_impalacnn as qdagger  # noqa: E402
from qdagger_dqn_atari_jax_impalacnn import (  # noqa: E402
    NETWORKS,
    Args,
    Batch,
    FrameReplay,
    GameStep,
    Learner,
    load_network,
    seeds_for,
)

# What was compiled once serves all runs, those in other processes too.
CACHE = TemporaryDirectory()
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": CACHE.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
jax.config.update("jax_compilation_cache_dir", CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
SAME = "UserError Stopped user_error compute_lambda linear_schedule due FinishedGame GameStep AtariGames "
SAME += "Learner.read_metrics Progress fade_teacher Run.open_log Run.log Run.checkpoint_if_due Run.made_with Run.finish "
SAME += "Run.track Run.lock Run.writing reason fewest_steps Film try_to_film load hub_is_silent hub_name "
SAME += "name_idle_flags check_names ignore_full_disk seeds_for open_film load_sb3 find_teacher check_upload upload refuse validate check_unchanged parse_flags"


def definitions(program) -> dict[str, str]:
    """The text of each function and class, and of each method."""
    text, found = Path(program.__file__).read_text(), {}
    for node in ast.parse(text).body:
        for each in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(each, ast.FunctionDef | ast.ClassDef):
                name = each.name if each is node else f"{node.name}.{each.name}"
                found[name] = ast.get_source_segment(text, each)
    return found


def test_what_knows_no_framework_is_the_same_text_in_both():
    """So that a mend in one cannot be forgotten in the other; flags too, but for those of PyTorch's alone."""
    ours, theirs = definitions(qdagger), definitions(sibling)
    for name in SAME.split():
        assert ours[name] == theirs[name], name
    flags, of_sibling = (
        {field.name: field.default for field in fields(each.Args)} for each in (qdagger, sibling)
    )
    assert flags | {
        "torch_deterministic": True,
        "capture": True,
        "compile": False,
    } == of_sibling | {
        "amp": False,
        "exp_name": Path(qdagger.__file__).stem,
        "teacher_model_exp_name": "dqn_atari_jax",
    }


def test_without_jax_a_line_says_what_to_install():
    script = "import runpy, sys; sys.modules['flax'] = None; runpy.run_path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, qdagger.__file__], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and '".[jax]"' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def converted(tree, state: dict[str, torch.Tensor]):
    """PyTorch's tensors in the form of this tree: copies, since JAX may still read what PyTorch then changes."""
    return jax.tree.unflatten(jax.tree.structure(tree), map(np.array, qdagger.from_torch(state)))


def pair(name: str, num_actions: int = 4, **settings):
    """A learner of each program with the same weights, those of PyTorch's."""
    settings = (
        dict(network=name, amp=False, batch_size=8, adam_eps=1.5e-4, final_learning_rate=1e-5)
        | settings
    )
    theirs = sibling.Learner(sibling.Args(**settings), num_actions, torch.device("cpu"))
    ours = Learner(Args(**settings), num_actions)
    params = converted(ours.params, theirs.q_network.state_dict())
    ours.params, ours.target_params = params, jax.tree.map(jnp.copy, params)
    return ours, theirs


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_actions", [4, 18])
def test_a_network_of_one_is_converted_the_same_in_the_other(name, num_actions):
    """Q-values to 1e-4, on images without symmetry, of both networks; in bfloat16 about the same."""
    ours, theirs = pair(name, num_actions)
    with torch.no_grad():
        expected = theirs.q_network(OBS).numpy()
    q_values = ours.network.apply(ours.params, OBS.numpy())
    assert q_values.dtype == jnp.float32 and np.std(expected, axis=1).min() > 0
    np.testing.assert_allclose(q_values, expected, atol=1e-4, rtol=0)
    assert np.abs(ours.network.apply(ours.params, OBS.flip(1).numpy()) - expected).max() > 1e-3
    coarse = NETWORKS[name](num_actions, jnp.bfloat16).apply(ours.params, OBS.numpy())
    assert (
        coarse.dtype == jnp.float32
        and 0 < np.abs(coarse - expected).max() < 0.03 * np.abs(expected).max()
    )


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("huber", [False, True])
def test_a_batch_gives_both_the_same_loss_gradient_and_weights(name, huber, monkeypatch):
    """Terms to 1e-5, gradients to 1e-4 of their size, then Adam's steps and a target that follows."""
    ours, theirs = pair(name, huber=huber, n_step=1)
    rng = np.random.default_rng(0)
    images = [
        torch.tensor(rng.integers(256, size=(8, 4, 84, 84), dtype=np.uint8)) for _ in range(2)
    ]
    numbers = [
        torch.tensor(rng.normal(size=shape), dtype=torch.float32) for shape in ((8,), (8, 4))
    ]
    actions, discounts = torch.tensor(rng.integers(4, size=8)), torch.tensor([0.9, 0.0] * 4)
    batch = sibling.Batch(images[0], actions, numbers[0], discounts, images[1], numbers[1])
    ours_batch = Batch(*(jnp.asarray(part.numpy()) for part in batch))
    monkeypatch.setattr(sibling.FrameReplay, "sample", lambda *_: batch)
    monkeypatch.setattr(FrameReplay, "sample", lambda *_: ours_batch)
    replays = FrameReplay.create(40, 1, 4), sibling.FrameReplay(40, 1, 4)
    assert theirs.set_lambda(0.5) == ours.set_lambda(0.5) == pytest.approx(5.5e-5)
    for updates in range(1, 4):
        before = jax.tree.map(np.asarray, ours.params)
        ours.gradient_step(replays[0])
        theirs.gradient_step(replays[1])
        metrics, expected = ours.read_metrics(), theirs.read_metrics()
        assert metrics == pytest.approx(expected, rel=1e-4 if updates > 1 else 1e-5, abs=1e-5)
        if updates == 1:
            gradient = {name: weight.grad for name, weight in theirs.q_network.named_parameters()}
            gradient = flatten_dict(converted(ours.params, gradient), sep="/")
            moment = flatten_dict(ours.opt_state.mu, sep="/")  # a tenth of the first gradient
            for path, values in gradient.items():
                np.testing.assert_allclose(
                    10 * moment[path], values, atol=1e-4 * np.abs(values).max(), rtol=0
                )
        moved = flatten_dict(
            jax.tree.map(lambda new, old: np.abs(new - old).max(), ours.params, before), sep="/"
        )
        assert min(moved.values()) > 0
    ours.update_target(0.5), theirs.update_target(0.5)
    for tree, network in (
        (ours.params, theirs.q_network),
        (ours.target_params, theirs.target_network),
    ):
        for path, values in flatten_dict(converted(tree, network.state_dict()), sep="/").items():
            np.testing.assert_allclose(flatten_dict(tree, sep="/")[path], values, atol=2e-5, rtol=0)
    assert int(ours.opt_state.count) == 3


class Replay:
    """FrameReplay by the interface that its sibling has: tensors, changed in place, drawn from by a generator."""

    draw = staticmethod(jax.jit(FrameReplay.sample, static_argnums=(1, 2, 3)))

    def __init__(self, capacity: int, num_envs: int, num_actions: int):
        self.replay, self.draws = FrameReplay.create(capacity, num_envs, num_actions), 0

    def add(self, frames, step, teacher_q_values) -> None:
        obs = np.asarray(frames)[:, None]
        self.replay = self.replay.add(
            obs, qdagger.without_finished(step), np.asarray(teacher_q_values)
        )

    def sample(self, batch_size: int, n_step: int, gamma: float, _) -> sibling.Batch:
        self.draws += 1
        batch = self.draw(self.replay, batch_size, n_step, gamma, jax.random.PRNGKey(self.draws))
        return sibling.Batch(*(torch.tensor(np.asarray(part)) for part in batch))


def unpack(state: dict, replay: Replay) -> None:
    replay.replay = qdagger.unpack(state, replay.replay)


@pytest.mark.parametrize("examples", [8, pytest.param(300, marks=pytest.mark.long)])
def test_samples_are_what_the_same_naive_store_holds(examples, monkeypatch):
    """Any number of games, room, n and ends, around the ring; saved, loaded, played on."""
    monkeypatch.setattr(test_replay, "FrameReplay", Replay)
    monkeypatch.setattr(test_replay, "pack", lambda replay: qdagger.pack(replay.replay))
    monkeypatch.setattr(test_replay, "unpack", unpack)
    monkeypatch.setattr(qdagger, "BLOCK", 7)
    test_replay.test_samples_of_any_history_are_what_a_naive_store_holds(examples, monkeypatch)


def test_a_row_is_written_in_place():
    """What `add` is given is overwritten, not copied: a million frames would take seconds."""
    replay = FrameReplay.create(64, 4, 2)
    pointer = replay.frames.unsafe_buffer_pointer()
    step = GameStep(np.zeros(4, int), np.zeros(4), np.zeros(4, bool), np.zeros(4, bool), None)
    after = replay.add(np.ones((4, 1, 84, 84), np.uint8), step, np.zeros((4, 2)))
    assert after.frames.unsafe_buffer_pointer() == pointer and replay.frames.is_deleted()
    assert int(after.written) == 1 and int(after.frames.sum()) == 4 * 84 * 84


@pytest.mark.long
def test_a_million_frames_have_more_bytes_than_31_bits_count():
    """7.06 GB: the last rows are found again, and those after them at the beginning."""
    replay = FrameReplay.create(1_000_000, 4, 2)
    step = GameStep(*(np.zeros(4, kind) for kind in (int, float, bool, bool)), None)
    replay = replay.replace(written=jnp.int32(249_990))
    for number in range(20):
        images = (
            np.full((4, 1, 84, 84), 10 * number, np.uint8)
            + np.arange(4, dtype=np.uint8)[:, None, None, None]
        )
        replay = replay.add(images, step)
    seen = replay.stacks(4 * jnp.arange(249_993, 250_010) + 3)
    assert np.asarray(seen[:, -1, 0, 0]).tolist() == [10 * number + 3 for number in range(3, 20)]
    assert np.asarray(replay.frames[:40:4, -1]).tolist() == [
        10 * number for number in range(10, 20)
    ]


def test_a_teachers_buffer_serves_both_programs(tmp_path):
    """Written by either, read by the other: the same content."""
    replay, rng = FrameReplay.create(24, 4, 3), np.random.default_rng(0)
    for _ in range(5):
        frames = rng.integers(256, size=(4, 1, 84, 84), dtype=np.uint8)
        ends = rng.random((2, 4)) < 0.3
        step = GameStep(rng.integers(3, size=4), rng.normal(size=4), *ends, None)
        replay = replay.add(frames, step, rng.normal(size=(4, 3)))
    made_with = {"num_envs": 1}
    content = {"made_with": made_with, "replay": jax.tree.map(torch.tensor, qdagger.pack(replay))}
    qdagger.write(partial(torch.save, content), tmp_path / "ours")
    theirs = sibling.FrameReplay(24, 4, 3)
    sibling.load_teacher_buffer(tmp_path / "ours", made_with, theirs)
    sibling.write({"made_with": made_with, "replay": sibling.pack(theirs)}, tmp_path / "theirs")
    back = qdagger.load_teacher_buffer(tmp_path / "theirs", made_with, FrameReplay.create(24, 4, 3))
    for name in ("frames", *qdagger.FIELDS):
        stored, expected = (np.asarray(getattr(each, name))[:20] for each in (back, replay))
        if name == "excluded":
            expected = np.append(expected[:16], [True] * 4)
        in_theirs = getattr(theirs, name)[:20].numpy().reshape(expected.shape)
        assert (stored == expected).all() and (in_theirs == expected).all(), name


class FlaxTeacher(nn.Module):
    """The Nature CNN as a Flax user writes it, whose files the hub has."""

    num_actions: int

    @nn.compact
    def __call__(self, x):
        x = jnp.transpose(x, (0, 2, 3, 1)) / 255.0
        for channels, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            x = nn.relu(
                nn.Conv(
                    channels, kernel_size=(size, size), strides=(stride, stride), padding="VALID"
                )(x)
            )
        x = nn.relu(nn.Dense(512)(x.reshape((x.shape[0], -1))))
        return nn.Dense(self.num_actions)(x)


def test_flax_models_of_others_and_of_ours_are_read(tmp_path):
    theirs = FlaxTeacher(6)
    params = theirs.init(jax.random.PRNGKey(3), OBS.numpy())
    (tmp_path / "teacher").write_bytes(serialization.to_bytes(params))
    network, loaded = load_network(tmp_path / "teacher", 6, "--teacher")
    np.testing.assert_allclose(
        network.apply(loaded, OBS.numpy()), theirs.apply(params, OBS.numpy()), atol=1e-6
    )
    student = Learner(Args(), 6)
    (tmp_path / "student").write_bytes(serialization.to_bytes(student.params))
    network, loaded = load_network(tmp_path / "student", 6, "--teacher")
    assert network == NETWORKS["impala"](6)
    expected = student.network.apply(student.params, OBS.numpy())
    assert (np.asarray(network.apply(loaded, OBS.numpy())) == np.asarray(expected)).all()


@pytest.mark.parametrize("game, num_actions", [("Breakout", 4), ("Pong", 6), ("BeamRider", 9)])
def test_bundled_teachers_are_the_same_in_both(game, num_actions):
    path = TEACHERS / f"{game}NoFrameskip-v4.cleanrl_model"
    network, params = load_network(path, num_actions, "--teacher")
    expected = sibling.load_network(path, num_actions, "--teacher")(OBS)
    np.testing.assert_allclose(network.apply(params, OBS.numpy()), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("algorithm, options", AGENTS[1:3])
def test_agents_of_stable_baselines3_are_the_same_in_both(tmp_path, algorithm, options):
    sb3(tmp_path / "a.zip", algorithm, num_actions=6, **options)
    network, params = load_network(tmp_path / "a.zip", 6, "--teacher", 0.3)
    expected = sibling.load_network(tmp_path / "a.zip", 6, "--teacher", 0.3)(OBS)
    np.testing.assert_allclose(network.apply(params, OBS.numpy()), expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_is_none_is_refused_in_a_line_and_runs_nothing(tmp_path):
    victim = tmp_path / "victim"
    params = jax.tree.map(np.asarray, FlaxTeacher(4).init(jax.random.PRNGKey(0), OBS.numpy()))
    whole = serialization.to_bytes(params)
    bad = {
        "cut": whole[:-9],
        "empty": b"",
        "noise": bytes(range(256)),
        "code": saved(Malicious(victim)),
    }
    bad |= {
        "pickle": b"\x80" + saved(Malicious(victim)),
        "another game": serialization.to_bytes(
            FlaxTeacher(6).init(jax.random.PRNGKey(0), OBS.numpy())
        ),
        "no layers": serialization.to_bytes({"params": {}}),
    }
    bad |= {"torch": saved({name: torch.zeros(3) for name in "abcd"})}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(qdagger.UserError, match=f"--teacher {tmp_path / name}: "):
            load_network(tmp_path / name, 4, "--teacher")
    assert not victim.exists()


class Tiny(nn.Module):
    """In place of the Nature CNN: a few thousand weights."""

    num_actions: int
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, obs):
        x = qdagger.normalized(obs, self.dtype)
        x = nn.relu(nn.Conv(4, (12, 12), 12, padding="VALID")(x)).reshape(len(obs), -1)
        return nn.Dense(self.num_actions)(nn.relu(nn.Dense(32)(x)))


SMALL = dict(
    teacher_steps=512,
    offline_steps=20,
    total_timesteps=320,
    learning_starts=160,
    buffer_size=240,
    num_envs=8,
)
SMALL |= dict(
    network="nature",
    batch_size=4,
    target_network_frequency=40,
    teacher_eval_episodes=1,
    eval_episodes=1,
)
SMALL |= dict(
    final_learning_rate=1e-5,
    eval_frequency=100,
    train_frequency=8,
    save_model=True,
    checkpoint_frequency=0,
)


@pytest.fixture
def go(monkeypatch, tmp_path, tmp_path_factory):
    """go(run, at, kill, games, **changes): train, on Clockwork unless told otherwise, or resume `run`; the directory.

    At the `at`-th event (a row of games, an update, a checkpoint) a signal comes, or all ends at once.
    """
    events, stop, plan = [], [], {}
    monkeypatch.setitem(NETWORKS, "nature", Tiny)
    params = NETWORKS["nature"](4).init(jax.random.PRNGKey(0), OBS.numpy())
    params["params"]["Dense_1"]["bias"] = params["params"]["Dense_1"]["bias"].at[1].set(5.0)
    (tmp_path / "teacher").write_bytes(serialization.to_bytes(params))

    def spy(owner, name):
        method = getattr(owner, name)

        def spied(*args):
            events.append(name)
            if len(events) == plan["at"]:
                stop.append(signal.SIGTERM)
                if plan["kill"]:
                    raise SystemExit
            return method(*args)

        monkeypatch.setattr(owner, name, spied)

    for owner, name in (
        (Clockwork, "step_wait"),
        (Learner, "gradient_step"),
        (qdagger.Run, "checkpoint"),
    ):
        spy(owner, name)

    def go(run=None, at=-1, kill=False, games=Clockwork, **changes) -> Path:
        if not run:
            monkeypatch.chdir(tmp_path_factory.mktemp("run"))
        monkeypatch.setattr(qdagger, "AtariGames", games)
        monkeypatch.setattr(
            qdagger, "seeds_for", seeds_in_a_row if games is Clockwork else seeds_for
        )
        events.clear(), stop.clear(), plan.update(at=at, kill=kill)
        before = SMALL | {"teacher": str(tmp_path / "teacher")}
        before = qdagger.load_checkpoint(run)["args"] | {"resume": str(run)} if run else before
        with suppress(qdagger.Stopped, SystemExit):
            qdagger.train(Args(**before | changes), stop)
        return run or next(Path("runs").absolute().glob("*"))

    go.events = events
    return go


def state(run: Path) -> dict:
    """The last checkpoint, but for what may differ."""
    content = flatten_dict(serialization.to_state_dict(qdagger.load_checkpoint(run)), sep="/")
    return {
        name: value
        for name, value in content.items()
        if not name.startswith(("args/", "progress/seconds"))
    }


def test_a_run_stopped_or_killed_goes_on_as_if_nothing_had_happened(go):
    """In games, updates and evaluations; offline, and where no games are cut off, bit for bit; the same seed twice."""
    whole, exact = go(), 0
    count, updates = len(go.events), go.events.count("gradient_step")
    assert updates == 40 and state(whole)["progress/step"] == 320
    for nth, at in enumerate(range(12, count, 14)):
        run = go(at=at, kill=nth % 2 > 0, checkpoint_frequency=8)
        stopped = qdagger.load_checkpoint(run)
        assert (
            go(run) == run and state(run)["progress/step"] == 320 and steps(run) == steps(whole)
        ), at
        replay, phase = stopped["replay"], stopped["progress"]["phase"]
        envs, rows = (64, 8) if phase == "teacher buffer" else (8, 30)
        last = (int(replay["written"]) - 1) % rows * envs
        if phase == "offline" or replay["excluded"][last : last + envs].all():
            ours, theirs = state(run), state(whole)
            assert ours.keys() == theirs.keys() and points(run) == points(whole)
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours), at
            exact += 1
    assert exact >= 3
    run = go(at=1, offline_steps=0, teacher="none")  # after the first row
    assert state(run)["progress/step"] == 8 and state(go(run))["progress/step"] == 320
    content = qdagger.load_checkpoint(whole)
    model = jax.tree.leaves(load_network(next(whole.glob("*.cleanrl_model")), 4, "--evaluate")[1])
    assert all(
        (saved == own).all() for saved, own in zip(content["params"], model)
    )  # the online network comes first


def test_three_phases_on_real_games_log_every_tag_along_its_own_axis(go):
    run = go(games=qdagger.AtariGames, offline_steps=100, total_timesteps=400, eval_frequency=0)
    logged = points(run)
    tags = {
        "charts/teacher/avg_episodic_return": [0],
        "charts/offline/avg_episodic_return": [0, 100],
    }
    tags |= {f"charts/offline/{name}": [100] for name in ("loss", "q_loss", "distill_loss")}
    tags |= {
        f"charts/{name}": [204, 300, 404, 500]
        for name in ("epsilon", "distill_coeff", "learning_rate")
    }
    tags |= {
        f"losses/{name}": [300, 404, 500]
        for name in ("loss", "td_loss", "distill_loss", "q_values")
    }
    tags |= {"eval/episodic_return": [500]}
    seen, of_games = steps(run), {"charts/episodic_return", "charts/episodic_length"}
    assert {tag: seen[tag] for tag in tags} == tags and seen.keys() - tags.keys() <= of_games
    loss, td, kl = (
        [value for _, value in logged[f"losses/{name}"]]
        for name in ("loss", "td_loss", "distill_loss")
    )
    assert loss == pytest.approx(np.add(td, 3 * np.array(kl)), rel=1e-4) and min(kl) > 0


def test_lambda_is_informed_by_the_last_offline_evaluation(go):
    """Its ten games are the first of the ten returns, also after a resume at the first online step."""
    ten_games = dict(eval_episodes=10, eval_frequency=0)
    run = go(**ten_games)
    events = go.events.copy()
    logged = points(run)
    (_, teacher), *_ = logged["charts/teacher/avg_episodic_return"]
    offline = qdagger.load_checkpoint(go(total_timesteps=0, **ten_games))["progress"]["scores"]
    assert logged["charts/offline/avg_episodic_return"][-1] == (20, pytest.approx(np.mean(offline)))
    played = [(step - 20, value) for step, value in logged["charts/episodic_return"]]
    for step, value in logged["charts/distill_coeff"]:
        last = [*offline, *(score for ended, score in played if ended <= step - 20 - 8)][-10:]
        assert value == pytest.approx(np.clip(1 - np.mean(last) / teacher, 0, 1), abs=1e-6)
    assert logged["charts/distill_coeff"][0][1] < 1
    last_update_offline = [at for at, event in enumerate(events, 1) if event == "gradient_step"][19]
    saved_after = last_update_offline + events[last_update_offline:].index("checkpoint") + 1
    stopped = go(at=saved_after, **ten_games)
    progress = qdagger.load_checkpoint(stopped)["progress"]
    assert (progress["phase"], progress["step"]) == ("offline", 20)
    assert points(go(stopped))["charts/distill_coeff"] == logged["charts/distill_coeff"]


def test_without_a_teacher_it_is_plain_dqn(go):
    logged = points(go(teacher="none"))
    assert not [
        tag for tag in logged if "teacher" in tag or "offline" in tag or "distill_loss" in tag
    ]
    assert logged["losses/loss"] == logged["losses/td_loss"] and not any(
        v for _, v in logged["charts/distill_coeff"]
    )


def test_a_damaged_checkpoint_costs_the_way_back_to_the_one_before_and_runs_nothing(
    go, tmp_path, capfd
):
    run, victim = go(at=24, checkpoint_frequency=4), tmp_path / "victim"
    path = run / "checkpoint.npz"
    before, whole = qdagger.load_checkpoint(run), go()
    for kind in ("cut", "garbage", "malicious"):
        copied = Path(shutil.copytree(run, tmp_path / kind))
        if kind == "malicious":
            np.savez(
                copied / "checkpoint.npz",
                state=np.array([Malicious(victim)], dtype=object),
                allow_pickle=True,
            )
        else:
            (copied / "checkpoint.npz").write_bytes(
                path.read_bytes()[:-99] if kind == "cut" else bytes(5000)
            )
        earlier = qdagger.load_checkpoint(copied)["progress"]
        assert "cannot be read" in capfd.readouterr().out and earlier != before["progress"]
        assert state(go(copied))["progress/step"] == state(whole)["progress/step"]
        (copied / "checkpoint.npz").write_bytes(b"")
        (copied / "checkpoint.previous.npz").write_bytes(b"")
        with pytest.raises(qdagger.UserError, match="no checkpoint"):
            qdagger.load_checkpoint(copied)
    assert not victim.exists()
    for name in ("params", "replay", "progress"):  # of another version
        content = {key: before[key] for key in before if key != name}
        np.savez(path, state=np.frombuffer(serialization.msgpack_serialize(content), np.uint8))
        with pytest.raises(qdagger.UserError):
            qdagger.train(Args(**before["args"] | {"resume": str(run)}))


def test_real_signals_and_a_kill_end_the_program_and_it_goes_on(tmp_path):
    """As from a terminal, with Pong's bundled teacher, whose games are short when half of its actions are random."""
    flags = "--env-id PongNoFrameskip-v4 --network nature --num-envs 1 --teacher-steps 112 --offline-steps 20 "
    flags += "--learning-starts 60 --buffer-size 100 --batch-size 4 --teacher-eval-episodes 1 --eval-episodes 1 "
    flags += "--checkpoint-frequency 20 --seed 3 --end-e 0.5 --return-baseline random --no-cuda --teacher"
    command = [qdagger.__file__, *flags.split(), str(TEACHERS / "PongNoFrameskip-v4.cleanrl_model")]
    run = interrupted(command, "checkpoint.npz", (signal.SIGTERM, signal.SIGKILL), tmp_path)
    last = 20 + qdagger.load_checkpoint(run)["progress"]["step"]
    assert steps(run)["charts/distill_coeff"] == list(range(120, last + 1, 100))


def test_wrong_flags_get_a_line_and_a_model_is_evaluated(tmp_path):
    def program(*flags) -> subprocess.CompletedProcess:
        command = [sys.executable, qdagger.__file__, "--no-cuda", *map(str, flags)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    for flags, words in (
        ("--gamma 2", "--gamma 2.0: "),
        ("--teacher missing", "--teacher missing: "),
    ):
        done = program(*flags.split())
        assert (
            done.returncode == 2
            and f"error: {words}" in done.stderr
            and "Traceback" not in done.stderr
        )
    assert not (tmp_path / "runs").exists()
    model = TEACHERS / "PongNoFrameskip-v4.cleanrl_model"
    flags = [
        "--env-id",
        "PongNoFrameskip-v4",
        "--evaluate",
        model,
        "--eval-episodes",
        2,
        "--end-e",
        0.5,
    ]
    done = program(*flags)
    args = Args(env_id="PongNoFrameskip-v4", end_e=0.5)
    scores = qdagger.evaluate(partial(qdagger.act, *load_network(model, 6, "--evaluate")), args, 2)
    assert done.returncode == 0 and done.stdout.splitlines()[-3:-1] == [
        f"game {n}: {s:g}" for n, s in enumerate(scores, 1)
    ]

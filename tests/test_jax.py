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
from sb3_contrib import QRDQN
from stable_baselines3 import PPO

jax = pytest.importorskip(
    "jax", reason="the extra `jax` is not installed, or Python is older than 3.11"
)

import flax.linen as nn  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import test_replay  # noqa: E402
from flax import serialization  # noqa: E402
from test_resume import NEW, Interruption, exactly_restored, steps  # noqa: E402
from test_teacher import OBS, PONG, TEACHERS, sb3  # noqa: E402
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
    Run,
    Stopped,
    UserError,
    load_checkpoint,
    load_network,
    load_teacher_buffer,
)

# What was compiled once serves all runs, those in other processes too.
CACHE = TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


# --- The same text ---

# What knows no framework, and must be the same to the letter in both programs.
SAME = [
    "UserError",
    "Stopped",
    "user_error",
    "reason",
    "compute_lambda",
    "linear_schedule",
    "due",
    "fewest_steps",
    "FinishedGame",
    "GameStep",
    "AtariGames",
    "Learner.read_metrics",
    "Progress",
    "fade_teacher",
    "Run.track",
    "Run.open_log",
    "Run.lock",
    "Run.writing",
    "Run.log",
    "Run.checkpoint_if_due",
    "Run.made_with",
    "Run.finish",
    "seeds_for",
    "open_film",
    "Film",
    "try_to_film",
    "load",
    "load_sb3",
    "hub_is_silent",
    "find_teacher",
    "reading_checkpoint",
    "check_upload",
    "hub_name",
    "upload",
    "refuse",
    "validate",
    "name_idle_flags",
    "check_unchanged",
    "parse_flags",
    "read_flags",
    "ignore_full_disk",
]


def definitions(program) -> dict[str, str]:
    """The text of each function, of each class, and of each method as CLASS.METHOD."""
    text = Path(program.__file__).read_text()
    found = {}

    def keep(node: ast.AST, prefix: str = "") -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[prefix + node.name] = ast.get_source_segment(text, node)

    for node in ast.parse(text).body:
        keep(node)
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                keep(member, prefix=f"{node.name}.")
    return found


def test_what_knows_no_framework_is_the_same_text_in_both():
    """So that a mend in one cannot be forgotten in the other."""
    ours = definitions(qdagger)
    theirs = definitions(sibling)
    for name in SAME:
        assert ours[name] == theirs[name], name


def defaults(program) -> dict:
    return {flag.name: flag.default for flag in fields(program.Args)}


def test_flags_and_defaults_are_the_same_in_both():
    """But for the flags of PyTorch's alone, and what is faster or named otherwise."""
    of_pytorch_alone = {"torch_deterministic": True, "capture": True, "compile": False}
    otherwise_here = {
        "amp": False,
        "exp_name": Path(qdagger.__file__).stem,
        "teacher_model_exp_name": "dqn_atari_jax",
    }
    assert defaults(qdagger) | of_pytorch_alone == defaults(sibling) | otherwise_here


def test_without_jax_a_line_says_what_to_install():
    script = "import runpy, sys; sys.modules['flax'] = None; runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-c", script, qdagger.__file__]
    done = subprocess.run(command, capture_output=True, text=True)

    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("error: ")
    assert '".[jax]"' in line


@pytest.mark.parametrize("jaxlib, is_set", [("0.10.2", True), ("0.10.1", False), ("0.11.0", False)])
def test_a_flag_that_other_versions_of_xla_do_not_know_is_set_for_its_own_alone(jaxlib, is_set):
    script = """
import importlib.metadata, os, sys
importlib.metadata.version = lambda package: sys.argv[1]
sys.modules["ale_py"] = None  # what comes after the settings is not imported
try:
    import qdagger_dqn_atari_jax_impalacnn
except ImportError as error:
    print(error.name, os.environ.get("XLA_FLAGS", "unset"))
"""
    environment = os.environ.copy()
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-c", script, jaxlib]
    directory = Path(qdagger.__file__).parent
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)

    name, flag = done.stdout.split()
    assert name == "ale_py"
    assert flag.startswith("--xla_") if is_set else flag == "unset"


# --- The same numbers ---


def converted(tree, state: dict[str, torch.Tensor]):
    """PyTorch's tensors in the form of this tree.

    They are copies, since JAX may still read what PyTorch then changes.
    """
    weights = [np.array(weight) for weight in qdagger.from_torch(state)]
    return jax.tree.unflatten(jax.tree.structure(tree), weights)


def beside(tree, state: dict[str, torch.Tensor]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each kernel and each bias: that of the tree, and PyTorch's."""
    ours = [np.asarray(weight) for weight in jax.tree.leaves(tree)]
    theirs = jax.tree.leaves(converted(tree, state))
    return list(zip(ours, theirs, strict=True))


def pair(name: str, num_actions: int = 4, huber: bool = False) -> tuple[Learner, sibling.Learner]:
    """A learner of each program, both with the weights of PyTorch's."""
    flags = dict(
        network=name,
        huber=huber,
        adam_eps=1.5e-4,
        final_learning_rate=1e-5,
        amp=False,
    )
    theirs = sibling.Learner(sibling.Args(**flags), num_actions, torch.device("cpu"))
    ours = Learner(Args(**flags), num_actions)
    ours.params = converted(ours.params, theirs.q_network.state_dict())
    ours.target_params = jax.tree.map(jnp.copy, ours.params)
    return ours, theirs


def answer(network: nn.Module, params: dict, obs: torch.Tensor = OBS) -> np.ndarray:
    """Q-values, which are float32 whatever the network computes in."""
    q_values = network.apply(params, obs.numpy())
    assert q_values.dtype == jnp.float32
    return np.asarray(q_values)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_actions", [4, 18])
def test_a_network_of_one_is_converted_the_same_in_the_other(name, num_actions):
    """On images without symmetry; in bfloat16 about the same."""
    ours, theirs = pair(name, num_actions)
    with torch.no_grad():
        expected = theirs.q_network(OBS).numpy()
    q_values = answer(ours.network, ours.params)
    of_flipped_stacks = answer(ours.network, ours.params, OBS.flip(1))
    coarse = answer(NETWORKS[name](num_actions, jnp.bfloat16), ours.params)

    assert np.std(expected, axis=1).min() > 0
    assert np.abs(of_flipped_stacks - expected).max() > 1e-3, "frames look alike to it"
    np.testing.assert_allclose(q_values, expected, atol=1e-4, rtol=0)
    largest_error = np.abs(coarse - expected).max()
    assert 0 < largest_error < 0.03 * np.abs(expected).max()


def random_batch() -> sibling.Batch:
    """Every other transition has terminated."""
    rng = np.random.default_rng(0)
    images = (8, 4, 84, 84)
    return sibling.Batch(
        obs=torch.tensor(rng.integers(256, size=images, dtype=np.uint8)),
        next_obs=torch.tensor(rng.integers(256, size=images, dtype=np.uint8)),
        returns=torch.tensor(rng.normal(size=8)).float(),
        teacher_q_values=torch.tensor(rng.normal(size=(8, 4))).float(),
        actions=torch.tensor(rng.integers(4, size=8)),
        discounts=torch.tensor([0.9, 0.0] * 4),
    )


def always(value):
    """A function that returns it, whatever it is given."""

    def function(*_):
        return value

    return function


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("huber", [False, True])
def test_a_batch_gives_both_the_same_loss_gradient_and_weights(name, huber, monkeypatch):
    """Then Adam goes on the same, and so does a target that follows."""
    ours, theirs = pair(name, huber=huber)
    their_batch = random_batch()
    our_batch = Batch(*[jnp.asarray(part.numpy()) for part in their_batch])
    monkeypatch.setattr(FrameReplay, "sample", always(our_batch))
    monkeypatch.setattr(sibling.FrameReplay, "sample", always(their_batch))
    our_replay = FrameReplay.create(40, 1, 4)
    their_replay = sibling.FrameReplay(40, 1, 4)

    ours.set_lambda(0.5)
    theirs.set_lambda(0.5)
    assert ours.learning_rate == theirs.learning_rate == pytest.approx(5.5e-5)

    for update in (1, 2, 3):
        before = [np.array(weight) for weight in jax.tree.leaves(ours.params)]
        ours.gradient_step(our_replay)
        theirs.gradient_step(their_replay)

        close = 1e-5 if update == 1 else 1e-4
        expected = pytest.approx(theirs.read_metrics(), rel=close, abs=1e-5)
        assert ours.read_metrics() == expected
        for new, old in zip(jax.tree.leaves(ours.params), before, strict=True):
            assert np.abs(new - old).max() > 0

        if update == 1:
            # Adam's running mean is a tenth of its first gradient.
            weights = theirs.q_network.named_parameters()
            gradient = {name: weight.grad for name, weight in weights}
            for tenth, expected in beside(ours.opt_state.mu, gradient):
                close = 1e-4 * np.abs(expected).max()
                np.testing.assert_allclose(10 * tenth, expected, atol=close, rtol=0)

    ours.update_target(0.5)
    theirs.update_target(0.5)
    params = beside(ours.params, theirs.q_network.state_dict())
    target_params = beside(ours.target_params, theirs.target_network.state_dict())
    for weight, expected in params + target_params:
        np.testing.assert_allclose(weight, expected, atol=2e-5, rtol=0)
    assert int(ours.opt_state.count) == 3


# --- Random numbers, which here follow from a key and the number of a step ---


class Echo(nn.Module):
    """Its observations are Q-values already."""

    @nn.compact
    def __call__(self, obs):
        return obs


def test_act_explores_uniformly_as_often_as_epsilon_says_and_anew_at_each_step():
    q_values = np.random.default_rng(0).normal(size=(90_000, 4))
    best = q_values.argmax(1)
    key = jax.random.PRNGKey(0)

    def act(step: int, epsilon: float) -> np.ndarray:
        actions, returned = qdagger.act(Echo(), {}, key, step, q_values, epsilon)
        np.testing.assert_allclose(returned, q_values, rtol=1e-6)
        return np.asarray(actions)

    assert np.array_equal(act(step=7, epsilon=0.0), best)

    actions = act(step=7, epsilon=0.4)
    actions_next = act(step=8, epsilon=0.4)
    assert np.array_equal(act(step=7, epsilon=0.4), actions)

    # Of four actions, a random one is the best in a quarter of all cases.
    shares = np.bincount((actions - best) % 4) / len(best)
    assert shares == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=0.01)
    best_twice = np.mean((actions == best) & (actions_next == best))
    assert best_twice == pytest.approx(0.7**2, abs=0.01)


def test_each_update_draws_another_batch():
    """With a learning rate of 0, a loss that changes is that of other transitions."""
    learner = Learner(Args(network="nature", learning_rate=0.0), 4)
    rewards = np.random.default_rng(0).normal(size=400)
    replay = FrameReplay.create(400, 4, 4).replace(
        rewards=jnp.asarray(rewards, jnp.float32),
        excluded=jnp.zeros(400, bool),
        written=jnp.int32(100),
    )

    losses = set()
    for _ in range(3):
        learner.gradient_step(replay)
        losses.add(learner.read_metrics()["td_loss"])
    assert len(losses) == 3


# --- The same replay ---


class MutableReplay:
    """FrameReplay by its sibling's interface: tensors, changed in place."""

    draw = staticmethod(jax.jit(FrameReplay.sample, static_argnums=(1, 2, 3)))

    def __init__(self, capacity: int, num_envs: int, num_actions: int):
        self.replay = FrameReplay.create(capacity, num_envs, num_actions)
        self.draws = 0

    def add(self, frames, step: sibling.GameStep, teacher_q_values) -> None:
        obs = np.asarray(frames)[:, None]
        q_values = np.asarray(teacher_q_values)
        self.replay = self.replay.add(obs, qdagger.without_finished(step), q_values)

    def random_numbers(self, *_) -> None:
        """JAX draws them in `sample`."""

    def sample(self, batch_size: int, n_step: int, gamma: float, _) -> sibling.Batch:
        self.draws += 1
        key = jax.random.PRNGKey(self.draws)
        batch = self.draw(self.replay, batch_size, n_step, gamma, key)
        return sibling.Batch(*[torch.tensor(np.asarray(part)) for part in batch])


def pack(replay: MutableReplay) -> dict:
    return qdagger.pack(replay.replay)


def unpack(state: dict, replay: MutableReplay) -> None:
    replay.replay = qdagger.unpack(state, replay.replay)


@pytest.mark.parametrize("examples", [8, pytest.param(300, marks=pytest.mark.long)])
def test_samples_are_what_the_same_naive_store_holds(examples, monkeypatch):
    """Any number of games, room, n and ends, around the ring; saved, loaded, played on."""
    monkeypatch.setattr(test_replay, "FrameReplay", MutableReplay)
    monkeypatch.setattr(test_replay, "pack", pack)
    monkeypatch.setattr(test_replay, "unpack", unpack)
    monkeypatch.setattr(qdagger, "BLOCK", 7)
    test_replay.test_samples_of_any_history_are_what_a_naive_store_holds(examples, monkeypatch)


IDLE_STEP = GameStep(
    actions=np.zeros(4, int),
    rewards=np.zeros(4),
    terminations=np.zeros(4, bool),
    excluded=np.zeros(4, bool),
    finished=None,
)


def test_a_row_is_written_in_place():
    """What `add` is given is overwritten, not copied: a million frames would take seconds."""
    before = FrameReplay.create(64, 4, 2)
    address = before.frames.unsafe_buffer_pointer()
    white = np.ones((4, 1, 84, 84), np.uint8)
    after = before.add(white, IDLE_STEP, np.zeros((4, 2)))

    assert before.frames.is_deleted()
    assert after.frames.unsafe_buffer_pointer() == address
    assert int(after.written) == 1
    assert int(after.frames.sum()) == 4 * 84 * 84


@pytest.mark.long
def test_a_million_frames_have_more_bytes_than_31_bits_count():
    """7.06 GB: the last rows are found again, and those after them at the beginning."""
    replay = FrameReplay.create(1_000_000, 4, 2)  # 250,000 rows
    replay = replay.replace(written=jnp.int32(249_990))
    environments = np.arange(4, dtype=np.uint8)[:, None, None, None]
    for number in range(20):
        images = np.full((4, 1, 84, 84), 10 * number, np.uint8) + environments
        replay = replay.add(images, IDLE_STEP)

    of_last_environment = 4 * jnp.arange(249_993, 250_010) + 3
    seen = np.asarray(replay.stacks(of_last_environment))
    newest_pixels = seen[:, -1, 0, 0].tolist()
    assert newest_pixels == [10 * number + 3 for number in range(3, 20)]
    of_first_environment = np.asarray(replay.frames[:40:4, -1]).tolist()
    assert of_first_environment == [10 * number for number in range(10, 20)]


def stored_rows(replay: FrameReplay | sibling.FrameReplay, size: int) -> dict[str, np.ndarray]:
    """Its first `size` steps, each as a row."""
    rows = {}
    for name in ("frames", *qdagger.FIELDS):
        stored = np.asarray(getattr(replay, name)[:size])
        rows[name] = stored.reshape(size, -1)
    return rows


def test_a_teachers_buffer_serves_both_programs(tmp_path):
    """Written by either, read by the other: the same content."""
    rng = np.random.default_rng(0)
    replay = FrameReplay.create(24, 4, 3)
    for _ in range(5):
        frames = rng.integers(256, size=(4, 1, 84, 84), dtype=np.uint8)
        step = GameStep(
            actions=rng.integers(3, size=4),
            rewards=rng.normal(size=4),
            terminations=rng.random(4) < 0.3,
            excluded=rng.random(4) < 0.3,
            finished=None,
        )
        replay = replay.add(frames, step, rng.normal(size=(4, 3)))

    made_with = {"num_envs": 1}
    packed = jax.tree.map(torch.tensor, qdagger.pack(replay))
    content = {"made_with": made_with, "replay": packed}
    qdagger.write(partial(torch.save, content), tmp_path / "ours")
    theirs = sibling.FrameReplay(24, 4, 3)
    sibling.load_teacher_buffer(tmp_path / "ours", made_with, theirs)

    content = {"made_with": made_with, "replay": sibling.pack(theirs)}
    sibling.write(content, tmp_path / "theirs")
    empty = FrameReplay.create(24, 4, 3)
    back = load_teacher_buffer(tmp_path / "theirs", made_with, empty)

    expected = stored_rows(replay, 20)
    # The games that could go on are gone.
    expected["excluded"] = expected["excluded"].copy()
    expected["excluded"][-4:] = True
    in_theirs = stored_rows(theirs, 20)
    in_back = stored_rows(back, 20)
    for name, rows in expected.items():
        assert np.array_equal(in_theirs[name], rows), name
        assert np.array_equal(in_back[name], rows), name


# --- The same models ---


class FlaxTeacher(nn.Module):
    """The Nature CNN as a Flax user writes it, whose files the hub has."""

    num_actions: int

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, padding="VALID")
        x = jnp.transpose(x, (0, 2, 3, 1))
        x = x / 255.0
        x = nn.relu(conv(32, kernel_size=(8, 8), strides=(4, 4))(x))
        x = nn.relu(conv(64, kernel_size=(4, 4), strides=(2, 2))(x))
        x = nn.relu(conv(64, kernel_size=(3, 3), strides=(1, 1))(x))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(self.num_actions)(x)


def flax_teacher(num_actions: int) -> tuple[nn.Module, dict]:
    network = FlaxTeacher(num_actions)
    return network, network.init(jax.random.PRNGKey(3), OBS.numpy())


def bundled(game: str) -> Path:
    return TEACHERS / f"{game}NoFrameskip-v4.cleanrl_model"


def test_flax_models_of_others_are_read(tmp_path):
    network, params = flax_teacher(6)
    path = tmp_path / "model"
    path.write_bytes(serialization.to_bytes(params))

    loaded = load_network(path, 6, "--teacher")
    np.testing.assert_allclose(answer(*loaded), answer(network, params), atol=1e-6)


def test_flax_models_of_ours_are_read(tmp_path):
    student = Learner(Args(), 6)
    path = tmp_path / "model"
    path.write_bytes(serialization.to_bytes(student.params))

    network, params = load_network(path, 6, "--teacher")
    assert network == NETWORKS["impala"](6)
    assert np.array_equal(answer(network, params), answer(student.network, student.params))


@pytest.mark.parametrize("game, num_actions", [("Breakout", 4), ("Pong", 6), ("BeamRider", 9)])
def test_bundled_teachers_are_the_same_in_both(game, num_actions):
    ours = load_network(bundled(game), num_actions, "--teacher")
    theirs = sibling.load_network(bundled(game), num_actions, "--teacher")
    np.testing.assert_allclose(answer(*ours), theirs(OBS), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("algorithm, options", [(QRDQN, {"n_quantiles": 50}), (PPO, {})])
def test_agents_of_stable_baselines3_are_the_same_in_both(tmp_path, algorithm, options):
    path = tmp_path / "a.zip"
    temperature = 0.3
    sb3(path, algorithm, num_actions=6, **options)

    ours = load_network(path, 6, "--teacher", temperature)
    theirs = sibling.load_network(path, 6, "--teacher", temperature)
    np.testing.assert_allclose(answer(*ours), theirs(OBS), atol=1e-5, rtol=1e-5)


def test_a_model_that_is_none_is_refused_in_a_line_and_runs_nothing(tmp_path):
    victim = tmp_path / "victim"
    code = saved(Malicious(victim))
    _, params = flax_teacher(4)
    _, of_another_game = flax_teacher(6)
    whole = serialization.to_bytes(params)
    bad = {
        "cut": whole[:-9],
        "empty": b"",
        "noise": bytes(range(256)),
        "code": code,
        "pickle": b"\x80" + code,
        "another game": serialization.to_bytes(of_another_game),
        "no layers": serialization.to_bytes({"params": {}}),
        "torch": saved({name: torch.zeros(3) for name in "abcd"}),
    }
    for name, content in bad.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError) as refusal:
            load_network(path, 4, "--teacher")
        (line,) = str(refusal.value).splitlines()
        assert line.startswith(f"--teacher {path}: "), name

    assert not victim.exists()


# --- The same runs ---


class Tiny(nn.Module):
    """In place of the Nature CNN: a few thousand weights."""

    num_actions: int
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, obs):
        x = qdagger.normalized(obs, self.dtype)
        x = nn.Conv(4, (12, 12), 12, padding="VALID")(x)  # 84 to 7 pixels a side
        x = nn.relu(x).reshape(len(obs), -1)
        x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(self.num_actions)(x)


def tiny_teacher(action: int) -> bytes:
    """A model that is fond of this action, in games of four."""
    params = Tiny(4).init(jax.random.PRNGKey(0), OBS.numpy())
    last_layer = params["params"]["Dense_1"]
    last_layer["bias"] = last_layer["bias"].at[action].set(5.0)
    return serialization.to_bytes(params)


@pytest.fixture
def go(monkeypatch, tmp_path_factory):
    """go(run, at, what, kill, games, **changes): train on Clockwork, or resume `run`.

    It returns the directory. `at`, `what` and `kill` are those of Interruption.plan. `go.events`
    are of the last call: a "row" of games, an "update", and (phase, step) of each checkpoint that
    is about to be written.
    """
    teacher = tmp_path_factory.mktemp("models") / "teacher"
    teacher.write_bytes(tiny_teacher(action=3))
    interruption = Interruption()

    def place(run: Run, *_) -> tuple[str, int]:
        return run.progress.phase, run.progress.step

    interruption.spy(monkeypatch, Clockwork, "step_wait", always("row"))
    interruption.spy(monkeypatch, Learner, "gradient_step", always("update"))
    interruption.spy(monkeypatch, Run, "checkpoint", place)
    monkeypatch.setitem(NETWORKS, "nature", Tiny)

    def go(
        run: Path | None = None,
        at: int = -1,
        what=None,
        kill: bool = False,
        games=Clockwork,
        **changes,
    ) -> Path:
        interruption.events.clear()
        interruption.plan(at, what, kill)
        if run is None:
            monkeypatch.chdir(tmp_path_factory.mktemp("run"))
            flags = NEW | {"teacher": str(teacher)}
        else:
            flags = load_checkpoint(run)["args"] | {"resume": str(run)}

        with monkeypatch.context() as patch, suppress(Stopped, SystemExit):
            patch.setattr(qdagger, "AtariGames", games)
            if games is Clockwork:
                patch.setattr(qdagger, "seeds_for", seeds_in_a_row)
            qdagger.train(Args(**flags | changes), interruption.signals)

        if run is None:
            (run,) = Path("runs").absolute().glob("*")
        return run

    go.events = interruption.events
    return go


def state(run: Path) -> dict:
    """The last checkpoint, but for what may differ."""
    content = load_checkpoint(run)
    del content["args"]
    del content["progress"]["seconds"]
    return content


def values(logged: list[tuple[int, float]]) -> np.ndarray:
    """Of a tag's points, without their steps."""
    return np.array([value for _, value in logged])


def same(one, other) -> bool:
    """Whether all values are equal, in dictionaries and lists of any depth."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_a_run_stopped_or_killed_goes_on_as_if_nothing_had_happened(go):
    """In games, updates and evaluations.

    Offline, and where no row is cut off whose games are lost, it ends the same bit for bit.
    """
    whole = go()
    whole_state = state(whole)
    whole_points = points(whole)
    events = go.events.copy()
    assert whole_state["progress"]["step"] == 320
    assert events.count("update") == 40

    num_exact = 0
    for nth, at in enumerate(range(12, len(events), 14)):
        run = go(at=at, kill=nth % 2 == 1, checkpoint_frequency=8)
        stop = state(run)
        assert go(run) == run

        end = state(run)
        assert end["progress"]["step"] == 320, at
        assert steps(run) == steps(whole), at
        if exactly_restored(stop):
            num_exact += 1
            assert same(end, whole_state), at
            assert points(run) == whole_points, at

    assert num_exact >= 3


def test_a_run_stopped_in_its_first_row_goes_on(go):
    run = go(at=1, offline_steps=0, teacher="none")
    assert state(run)["progress"]["step"] == 8

    go(run)
    assert state(run)["progress"]["step"] == 320


def test_the_saved_model_is_the_online_network(go):
    run = go(target_network_frequency=1000)
    path = run / f"{Args.exp_name}.cleanrl_model"
    _, params = load_network(path, 4, "--evaluate")

    content = load_checkpoint(run)
    model = jax.tree.leaves(params)
    assert same(model, content["params"])
    assert not same(model, content["target_params"])


def test_the_network_of_the_best_evaluation_is_kept(go, monkeypatch):
    """Of evaluations of 3, 7 and 5 that is the second's."""
    scores = iter([3.0, 7.0, 5.0])
    evaluated = []

    def evaluate(policy, *_, **__) -> list[float]:
        _, params = policy.args
        evaluated.append(jax.tree.map(np.asarray, params))
        return [next(scores)]

    monkeypatch.setattr(qdagger, "evaluate", evaluate)
    run = go(teacher="none", eval_frequency=120, save_model=True)

    for name, nth in ((f"{Args.exp_name}.best", 1), (Args.exp_name, 2)):
        _, params = load_network(run / f"{name}.cleanrl_model", 4, "--evaluate")
        assert same(jax.tree.leaves(params), jax.tree.leaves(evaluated[nth])), name
    progress = load_checkpoint(run)["progress"]
    assert (progress["best_return"], progress["best_step"]) == (7.0, 240)


def test_three_phases_on_real_games_log_every_tag_along_its_own_axis(go, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.write_bytes(tiny_teacher(action=qdagger.FIRE))  # in Breakout that scores 2
    run = go(
        games=qdagger.AtariGames,
        teacher=str(teacher),
        offline_steps=100,
        total_timesteps=400,
        eval_frequency=0,
    )
    logged_at = steps(run)

    # Strides of 8 that end at or after hundreds; the student learns from 160 on.
    online = [204, 300, 404, 500]
    learning = [300, 404, 500]
    expected = {
        "charts/teacher/avg_episodic_return": [0],
        "charts/offline/avg_episodic_return": [0, 100],
        "charts/offline/loss": [100],
        "charts/offline/q_loss": [100],
        "charts/offline/distill_loss": [100],
        "charts/epsilon": online,
        "charts/distill_coeff": online,
        "charts/learning_rate": online,
        "losses/loss": learning,
        "losses/td_loss": learning,
        "losses/distill_loss": learning,
        "losses/q_values": learning,
        "eval/episodic_return": [500],
    }
    for tag in ("charts/episodic_return", "charts/episodic_length"):
        if tag in logged_at:
            expected[tag] = logged_at[tag]  # whenever a game ends, if one does
    assert logged_at == expected

    logged = points(run)
    loss = values(logged["losses/loss"])
    td_loss = values(logged["losses/td_loss"])
    distill_loss = values(logged["losses/distill_loss"])
    assert loss == pytest.approx(td_loss + 3 * distill_loss, rel=1e-4)
    assert distill_loss.min() > 0


def test_lambda_is_informed_by_the_last_offline_evaluation(go):
    """Its ten games are the first of the ten returns, also after a resume at the first online step.

    Each game online then replaces the oldest.
    """
    ten_games = dict(eval_episodes=10, eval_frequency=0)
    whole = points(go(**ten_games))
    without_online = go(total_timesteps=0, **ten_games)
    offline_scores = load_checkpoint(without_online)["progress"]["scores"]
    last_evaluation = whole["charts/offline/avg_episodic_return"][-1]
    assert last_evaluation == (20, pytest.approx(np.mean(offline_scores)))

    _, teacher_return = whole["charts/teacher/avg_episodic_return"][0]
    lambdas = whole["charts/distill_coeff"]
    for step, lambda_ in lambdas:
        row_begins = step - 8
        online_scores = [
            score for ended, score in whole["charts/episodic_return"] if ended <= row_begins
        ]
        last_ten = (offline_scores + online_scores)[-10:]
        expected = np.clip(1 - np.mean(last_ten) / teacher_return, 0, 1)
        assert lambda_ == pytest.approx(expected, abs=1e-6)
    _, first_lambda = lambdas[0]
    assert 0 < first_lambda < 1

    run = go(at=1, what=("offline", 20), **ten_games)
    progress = load_checkpoint(run)["progress"]
    assert progress["phase"] == "offline"
    assert progress["step"] == 20
    assert points(go(run))["charts/distill_coeff"] == lambdas


def test_without_a_teacher_it_is_plain_dqn(go):
    logged = points(go(teacher="none"))

    for word in ("teacher", "offline", "distill_loss"):
        assert word not in " ".join(logged)
    assert logged["losses/loss"] == logged["losses/td_loss"]
    assert (values(logged["charts/distill_coeff"]) == 0).all()


@pytest.fixture
def stopped(go) -> Path:
    """A run that was stopped in its 12th offline update; the checkpoint before is of the tenth."""
    run = go(at=12, what="update", checkpoint_frequency=10)
    assert go.events[-1] == ("offline", 12)
    return run


@pytest.mark.parametrize("kind", ["cut", "garbage", "malicious"])
def test_a_damaged_checkpoint_costs_the_way_back_to_the_one_before(
    go, stopped, tmp_path, capfd, kind
):
    """If both are damaged, nothing is left. No damage runs code."""
    path = stopped / "checkpoint.npz"
    victim = tmp_path / "victim"
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-99])
    elif kind == "garbage":
        path.write_bytes(bytes(5000))
    else:
        np.savez(path, state=np.array([Malicious(victim)], dtype=object))
    copied = Path(shutil.copytree(stopped, tmp_path / "copy"))

    # It goes on from the checkpoint before.
    capfd.readouterr()
    assert load_checkpoint(stopped)["progress"]["step"] == 10
    assert f"--resume: {path} cannot be read: " in capfd.readouterr().out
    assert state(go(stopped))["progress"]["step"] == 320

    # Both are damaged.
    shutil.copy(copied / "checkpoint.npz", copied / "checkpoint.previous.npz")
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(copied)
    assert not victim.exists()


def test_a_checkpoint_of_another_version_is_refused(go, stopped):
    whole = load_checkpoint(stopped)
    for part in ("params", "replay", "progress"):
        content = whole.copy()
        del content[part]
        packed = np.frombuffer(serialization.msgpack_serialize(content), np.uint8)
        np.savez(stopped / "checkpoint.npz", state=packed)
        with pytest.raises(UserError, match="does not fit"):
            go(stopped)


# --- As a program ---


def program(directory: Path, *flags) -> subprocess.CompletedProcess:
    command = [sys.executable, qdagger.__file__, "--no-cuda", *map(str, flags)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True)


def test_real_signals_and_a_kill_end_the_program_and_it_goes_on(tmp_path):
    """As from a terminal.

    Games of Pong's bundled teacher are short when half of its actions are random.
    """
    command = [
        qdagger.__file__,
        f"--env-id={PONG}",
        f"--teacher={bundled('Pong')}",
        "--network=nature",
        "--num-envs=1",
        "--teacher-steps=112",
        "--offline-steps=20",
        "--learning-starts=60",
        "--buffer-size=100",
        "--batch-size=4",
        "--teacher-eval-episodes=1",
        "--eval-episodes=1",
        "--checkpoint-frequency=20",
        "--seed=3",
        "--end-e=0.5",
        "--return-baseline=random",
        "--no-cuda",
    ]
    run = interrupted(command, "checkpoint.npz", [signal.SIGTERM, signal.SIGKILL], tmp_path)

    last = 20 + load_checkpoint(run)["progress"]["step"]
    assert steps(run)["charts/distill_coeff"] == list(range(120, last + 1, 100))


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--gamma", "2", "error: --gamma 2.0: "),
        ("--teacher", "missing", "error: --teacher missing: "),
    ],
)
def test_a_wrong_flag_gets_a_line_and_makes_no_run(tmp_path, flag, value, message):
    done = program(tmp_path, flag, value)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_model_is_evaluated(tmp_path):
    model = bundled("Pong")
    flags = [f"--env-id={PONG}", f"--evaluate={model}", "--eval-episodes=2", "--end-e=0.5"]
    done = program(tmp_path, *flags)

    policy = partial(qdagger.act, *load_network(model, 6, "--evaluate"))
    args = Args(env_id=PONG, end_e=0.5)
    first, second = qdagger.evaluate(policy, args, episodes=2)
    *_, first_line, second_line, _ = done.stdout.splitlines()
    assert done.returncode == 0
    assert first_line == f"game 1: {first:g}"
    assert second_line == f"game 2: {second:g}"

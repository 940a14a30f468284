"""No run is lost: stopped, killed, damaged or tampered with, it goes on from its last good checkpoint, bit for bit."""

import contextlib
import functools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Malicious
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import (
    Args,
    Checkpoints,
    FrameReplay,
    GameError,
    Stopped,
    UserError,
    args_of,
    closing_games,
    load,
    make_env,
    train,
)

PHASES = dict(teacher_steps=80, offline_steps=20, total_timesteps=160, learning_starts=60, buffer_size=100)
SIZES = dict(
    num_envs=2, network="nature", batch_size=4, target_network_frequency=24, teacher_eval_episodes=1, eval_episodes=1
)
SETTINGS = PHASES | SIZES | dict(eval_frequency=100, save_model=True, cuda=False, checkpoint_frequency=0)


class StopAfter:
    """As `stop`: no signal at the first `points` safe points, then SIGTERM."""

    def __init__(self, points: int):
        self.points = points

    def __bool__(self) -> bool:
        self.points -= 1
        return self.points < 0

    def __getitem__(self, _) -> int:
        return signal.SIGTERM


@pytest.fixture(scope="module")
def go(make_model, tmp_path_factory):
    """go(stop, **changes): a small training in a directory of its own, or the rest of one; its evaluations are 2."""
    teacher = str(make_model(4, action=1))

    def go(stop=(), args: Args | None = None, **changes) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(qdagger, "evaluate", lambda *_, **__: [2.0])
            if args is None:
                patch.chdir(tmp_path_factory.mktemp("run"))
                args = Args(**dict(teacher=teacher) | SETTINGS | changes)
            try:
                return train(args, stop).absolute()
            except Stopped as stopped:
                return stopped.args[1].absolute()

    return go


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob("*.cleanrl_model")
    return torch.load(path)


def points(run: Path) -> dict[str, list]:
    """Every (step, value) of every tag in the event files, but for the measured speed."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    tags = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.fixture(scope="module")
def whole(go):
    """whole(num_envs): a run that nobody stopped."""
    return functools.cache(lambda num_envs: go(num_envs=num_envs))


# --- The same run ---


@pytest.mark.parametrize("num_envs, stops", [(2, [13]), (2, [50]), (2, [100]), (1, [150]), (2, [5, 20, 30, 50])])
def test_a_stopped_and_resumed_run_is_the_run_that_was_not_stopped(go, whole, num_envs, stops):
    """Same weights and the same points in the logs, none missing and none twice, whichever phase was cut off."""
    run = go(StopAfter(stops[0]), num_envs=num_envs)
    for stop in [*stops[1:], math.inf]:
        assert not list(run.glob("*.part"))
        run = go(StopAfter(stop), args=args_of(run))
    expected = weights(whole(num_envs))
    assert all(torch.equal(expected[name], value) for name, value in weights(run).items())
    assert points(run) == points(whole(num_envs))


@pytest.mark.parametrize("env_id", ["BreakoutNoFrameskip-v4", "PongNoFrameskip-v4", "SpaceInvadersNoFrameskip-v4"])
def test_a_game_goes_on_in_another_environment(env_id):
    """The same observations, rewards and ends once `game_state` was handed over, through lives, games and resets."""
    rng = np.random.default_rng(0)
    with closing(make_env(env_id)) as first, closing(make_env(env_id)) as second:
        first.reset(seed=1)
        second.reset(seed=2)
        actions = rng.integers(first.action_space.n, size=1500)
        for action in actions[:157]:
            if any(first.step(int(action))[2:4]):
                first.reset()
        second.game_state = first.game_state
        for action in actions:
            steps = [env.step(int(action)) for env in (first, second)]
            if any(steps[0][2:4]):
                steps = [(*step, env.reset()[0]) for step, env in zip(steps, (first, second))]
            for info in (steps[0][4], steps[1][4]):
                info.get("episode", {}).pop("t", None)
            np.testing.assert_equal(steps[0], steps[1])


def test_a_finished_run_can_be_made_longer(go):
    run = go(total_timesteps=120)
    before = points(run)
    args = args_of(run)
    args.total_timesteps = 160
    assert go(args=args) == run
    after = points(run)
    assert after["charts/distill_coeff"][: len(before["charts/distill_coeff"])] == before["charts/distill_coeff"]
    assert max(step for step, _ in after["eval/episodic_return"]) == 20 + 160
    assert args_of(run).total_timesteps == 160


# --- The replay on disk ---


@pytest.mark.parametrize("num_envs, capacity", [(1, 30), (3, 30)])
def test_frames_written_in_pieces_are_the_replay(num_envs, capacity, monkeypatch):
    """A replay that was restored from pieces, past the wrap, is drawn from like the original."""
    monkeypatch.setattr(qdagger, "BLOCK", 7)
    rng, replay, pieces, since = np.random.default_rng(0), FrameReplay(capacity, num_envs, 4), [], [0] * num_envs
    for step in range(60):
        obs = rng.integers(256, size=(2, num_envs, 4, 84, 84), dtype=np.uint8)
        ends = rng.random((2, num_envs)) < 0.1
        replay.add(obs[0], rng.integers(4, size=num_envs), rng.random(num_envs), *ends, obs[1])
        if step % 9 == 0 or step == 59:
            pieces += replay.pack_frames(since)
            since = replay.written.tolist()
    restored = FrameReplay(capacity, num_envs, 4)
    restored.load_state_dict(replay.state_dict() | {"frames": restored.frames})
    restored.unpack_frames(pieces)
    for seed in range(20):
        drawn = [each.sample(32, 3, 0.99, torch.Generator().manual_seed(seed)) for each in (replay, restored)]
        assert all(torch.equal(one, other) for one, other in zip(*drawn))


def test_two_checkpoints_are_kept_and_every_frame_is_written_once(go):
    run = go(checkpoint_frequency=16)
    files = sorted((run / "checkpoints").iterdir())
    assert len([path for path in files if path.suffix == ".checkpoint"]) == 2
    blocks = [block for path in files if path.suffix == ".frames" for block in load(path)]
    spans = sorted((env, first) for env, first, _ in blocks)
    assert len(set(spans)) == len(spans)
    assert {path.name for path in files} == set().union(
        *(
            {path.name} | {file for file, _ in load(path)["frames"]["student"]}
            for path in files
            if path.suffix == ".checkpoint"
        )
    )


# --- Damage ---


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(b"" if kind == "empty" else content[: len(content) // 2] if kind == "cut" else content)
    if kind == "gone":
        path.unlink()


@pytest.fixture(scope="module")
def stopped(go):
    """A run that was stopped in phase 1 after 60 of the teacher's steps; its checkpoint before that is of 56."""
    run = go(StopAfter(30), checkpoint_frequency=8)
    assert [load(path)["progress"]["teacher_steps"] for path in sorted(run.glob("checkpoints/*.checkpoint"))] == [
        56,
        60,
    ]
    return run


@pytest.fixture
def copied(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "runs" / stopped.name))


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "gone"])
@pytest.mark.parametrize("suffix", ["checkpoint", "frames"])
def test_a_damaged_checkpoint_costs_the_way_back_to_the_one_before(copied, capfd, kind, suffix):
    damage(max(copied.glob(f"checkpoints/*.{suffix}")), kind)
    content, frames = Checkpoints(copied).load()
    assert content["progress"]["teacher_steps"] == 56
    assert sum(len(block) > 0 for block in frames["teacher"]) > 0
    assert ("damaged" in capfd.readouterr().out) == ((suffix, kind) != ("checkpoint", "gone"))


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 1e-3}, {"seed": 2}, {"env_id": "PongNoFrameskip-v4"}, {"n_step": 3}]
)
def test_another_experiment_is_no_resumed_run(go, copied, changes):
    run = copied
    args = args_of(run)
    (name, value), *_ = changes.items()
    setattr(args, name, value)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} "):
        go(args=args)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_without_a_readable_checkpoint_there_is_a_line(go, copied):
    run = copied
    for path in run.glob("checkpoints/*.checkpoint"):
        damage(path, "flip")
    with pytest.raises(UserError, match=r"^--resume .*: no readable checkpoint"):
        go(args=args_of(run))
    for missing in (run / "nothing", run.parent):
        with pytest.raises(UserError, match=r"^--resume .*: no run that can be resumed"):
            args_of(missing)


def test_a_checkpoint_never_runs_code(copied, tmp_path):
    victim = tmp_path / "victim"
    written = copied / "checkpoints" / "999999.checkpoint"
    qdagger.write({"frames": Malicious(victim)}, written)
    assert Checkpoints(copied).load()[0]["progress"]["teacher_steps"] == 60
    assert not victim.exists()
    torch.load(written, weights_only=False)  # it would have worked
    assert victim.exists()


def test_a_disk_that_takes_no_checkpoint_does_not_stop_training(go, whole, monkeypatch, capfd):
    """The last good one stays, nothing half-written lies about, and the weights are those of any other run."""
    save, calls = torch.save, []

    def full(content, path, *args, **options):
        if str(path).endswith((".checkpoint.part", ".frames.part")):
            calls.append(path)
            if len(calls) > 4:
                Path(path).write_bytes(b"as far as it went")
                raise OSError(28, "No space left on device")
        return save(content, path, *args, **options)

    monkeypatch.setattr(torch, "save", full)
    run = go(checkpoint_frequency=16)
    assert len(calls) > 8 and "No space left on device" in capfd.readouterr().out
    assert not list(run.rglob("*.part"))
    expected = weights(whole(2))
    assert all(torch.equal(expected[name], value) for name, value in weights(run).items())
    monkeypatch.undo()
    assert go(args=args_of(run)) == run
    assert all(torch.equal(expected[name], value) for name, value in weights(run).items())


def test_a_disk_that_takes_no_points_does_not_stop_training(go, whole, monkeypatch, capfd):
    """One line a checkpoint, no traceback of the thread that writes, and points again once there is room."""
    filesystem, calls = LocalFileSystem.append, []

    def full(self, filename, content, binary_mode=False):
        calls.append(filename)
        if 1 < len(calls) < 6:
            raise OSError(28, "No space left on device")
        return filesystem(self, filename, content, binary_mode)

    monkeypatch.setattr(LocalFileSystem, "append", full)
    run = go(checkpoint_frequency=16)
    output = "".join(capfd.readouterr())
    assert output.count("No space left on device; trying again at the next checkpoint") == 4
    assert "Traceback" not in output
    expected, logged = points(whole(2)), points(run)
    assert 0 < sum(map(len, logged.values())) < sum(map(len, expected.values()))
    assert all(set(of_tag) <= set(expected[tag]) for tag, of_tag in logged.items())
    assert all(torch.equal(*pair) for pair in zip(weights(whole(2)).values(), weights(run).values()))


def test_a_directory_that_disappears_does_not_stop_training(go, whole, capfd):
    class TakeAway(list):
        """No signal, but at the 50th safe point the run's directory goes."""

        points = 0

        def __bool__(self) -> bool:
            self.points += 1
            if self.points == 50:
                for directory in Path("runs").iterdir():
                    shutil.rmtree(directory)
            return False

    run = go(TakeAway(), checkpoint_frequency=16)
    output = "".join(capfd.readouterr())
    assert "cannot" in output and "Traceback" not in output
    expected = weights(whole(2))
    assert all(torch.equal(expected[name], value) for name, value in weights(run).items())


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(go, monkeypatch):
    loss, calls = qdagger.qdagger_loss, []

    def broken(*args):
        calls.append(args)
        return tuple(value * (math.nan if len(calls) > 12 else 1) for value in loss(*args))

    monkeypatch.setattr(qdagger, "qdagger_loss", broken)
    with pytest.raises(UserError, match=r"the loss is nan after .* offline updates"):
        go(checkpoint_frequency=5)


# --- Signals, from outside ---


FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in PHASES.items()]
FLAGS += ["--network=nature", "--batch-size=4", "--teacher-eval-episodes=1", "--eval-episodes=1", "--num-envs=2"]
FLAGS += ["--checkpoint-frequency=8", "--no-cuda", "--save-model"]


def start(cwd: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, qdagger.__file__, *flags]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(pattern: str, cwd: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(cwd.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.02)


@pytest.mark.parametrize("number, to_all", [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGUSR1, False)])
def test_a_signal_ends_with_a_checkpoint_and_the_command_that_goes_on(make_model, tmp_path, number, to_all):
    """Ctrl-C and a scheduler's signal reach the games' processes too."""
    process = start(tmp_path, "--teacher", str(make_model(4, action=1)), *FLAGS, "--total-timesteps=100000")
    wait_for("runs/*/checkpoints/*.checkpoint", tmp_path, process)
    (os.killpg if to_all else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    (run,) = (tmp_path / "runs").iterdir()
    assert output.splitlines()[-1].endswith(f"--resume {run.relative_to(tmp_path)}")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the process by /proc")
def test_a_game_whose_process_dies_ends_the_run_with_a_line(make_model, tmp_path):
    process = start(tmp_path, "--teacher", str(make_model(4, action=1)), *FLAGS, "--total-timesteps=100000")
    wait_for("runs/*/checkpoints/*.checkpoint", tmp_path, process)
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    of_run = [pid for pid, parent in parents.items() if parents.get(parent) == process.pid]
    assert of_run
    os.kill(of_run[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in output, output
    assert output.splitlines()[-1].startswith("error: the process of a game died")


class Failing(gym.Env):
    """An emulator that gives up in its third step."""

    observation_space, action_space, steps = gym.spaces.Discrete(2), gym.spaces.Discrete(2), 0

    def reset(self, **_):
        return 0, {}

    def step(self, _):
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("the emulator is stuck\nin many words")
        return 0, 0.0, False, False, {}


def test_a_game_that_fails_ends_the_run_with_a_line(capfd, monkeypatch):
    make_env("PongNoFrameskip-v4").close()  # it quiets gymnasium
    envs = gym.vector.AsyncVectorEnv([Failing, Failing])
    with pytest.raises(GameError) as error, closing_games(envs):
        envs.reset()
        for _ in range(3):
            envs.step(np.zeros(2, dtype=int))
    assert str(error.value) == "a game failed: the emulator is stuck"
    assert not any(process.is_alive() for process in envs.processes)

    def train(*_):
        raise error.value

    monkeypatch.setattr(qdagger, "train", train)
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as stopped:
        qdagger.main()
    output = "".join(capfd.readouterr())
    assert stopped.value.code == 1 and output.splitlines()[-1].startswith("error: a game failed: ")
    assert "Traceback" not in output


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.long)])
def test_a_run_that_is_killed_again_and_again_arrives(make_model, tmp_path, kills):
    """SIGKILL to everything at random moments, in the middle of writing too: nothing is lost but the last few steps."""
    rng = random.Random(0)
    flags = [*FLAGS, f"--offline-steps={5 * kills}", f"--total-timesteps={60 * kills}"]
    process = start(tmp_path, "--teacher", str(make_model(4, action=1)), *flags)
    for _ in range(kills):
        wait_for("runs/*/checkpoints/*.checkpoint", tmp_path, process)
        time.sleep(rng.random() * 2)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        (run,) = (tmp_path / "runs").iterdir()
        process = start(tmp_path, "--resume", str(run))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    steps = [step for step, _ in points(run)["charts/distill_coeff"]]
    assert steps == list(range(5 * kills + 100, 65 * kills + 1, 100))
    assert len(list(run.glob("*.cleanrl_model"))) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_stopped_and_resumed_run_goes_on(go):
    """To the same end with a point for each step; the last digits are not promised there."""
    whole = go(cuda=True)
    run = go(StopAfter(100), cuda=True)
    run = go(args=args_of(run))
    expected, logged = points(whole), points(run)
    assert expected.keys() == logged.keys()
    for tag in expected:
        assert "episodic" in tag or [step for step, _ in expected[tag]] == [step for step, _ in logged[tag]]


# --- Memory ---


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("seconds", [15, pytest.param(1200, marks=pytest.mark.long)])
def test_memory_stays_flat(tmp_path, seconds):
    """Once the replay is full, neither the learner nor its games grow: over all, less than 2% in the second half."""
    flags = ["--teacher=none", "--network=nature", "--batch-size=4", "--buffer-size=400", "--learning-starts=100"]
    process = start(tmp_path, *flags, "--no-cuda", "--checkpoint-frequency=2000", "--total-timesteps=10000000")
    wait_for("runs/*/checkpoints/*.checkpoint", tmp_path, process)

    def resident() -> int:
        """Bytes of all processes of the run."""
        pages = 0
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getpgid(int(path.name)) == process.pid:
                    pages += int((path / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    sizes = []
    for _ in range(30):
        time.sleep(seconds / 30)
        sizes.append(resident())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    print(f"{seconds} s: {[size >> 20 for size in sizes]} MiB")
    first, second = np.median(sizes[10:20]), np.median(sizes[20:])
    assert first > 1e8 and second < 1.02 * first

"""No run is lost: stopped, killed, damaged or tampered with, it goes on from its last good checkpoint, bit for bit."""

import functools
import io
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Malicious, points, refusal
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import (
    Args,
    Checkpoints,
    FrameReplay,
    Stopped,
    UserError,
    args_of,
    load,
    start_run,
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

    def go(stop=(), args: Args | None = None, evaluate=lambda *_, **__: [2.0], **changes) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(qdagger, "evaluate", evaluate)
            if args is None:
                patch.chdir(tmp_path_factory.mktemp("run"))
                args = Args(**dict(teacher=teacher) | SETTINGS | changes)
            try:
                return train(args, stop).absolute()
            except Stopped as stopped:
                if len(stopped.args) == 1:
                    raise
                return stopped.args[1].absolute()

    return go


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob("*.cleanrl_model")
    return torch.load(path)


@pytest.fixture(scope="module")
def whole(go):
    """whole(num_envs): a run that nobody stopped."""
    return functools.cache(lambda num_envs: go(num_envs=num_envs))


# --- The same run ---


@pytest.mark.parametrize("num_envs, stops", [(2, [5]), (2, [20]), (2, [60]), (1, [130]), (2, [3, 12, 25, 40])])
def test_a_stopped_and_resumed_run_is_the_run_that_was_not_stopped(go, whole, num_envs, stops):
    """Same weights and the same points in the logs, none missing and none twice, whichever phase was cut off."""
    run = go(StopAfter(stops[0]), num_envs=num_envs)
    for stop in [*stops[1:], math.inf]:
        assert not list(run.glob("*.part"))
        run = go(StopAfter(stop), args=args_of(run))
    expected = weights(whole(num_envs))
    assert all(torch.equal(expected[name], value) for name, value in weights(run).items())
    assert points(run) == points(whole(num_envs))


@pytest.mark.parametrize("evaluation", [1, 2, 3, 4, 5])
def test_a_run_that_is_stopped_in_an_evaluation_evaluates_again(go, whole, evaluation):
    """The teacher's, the student's before and after the offline phase, one online, the last."""
    evaluations = []

    def evaluate(*_, **__) -> list[float]:
        evaluations.append(1)
        if len(evaluations) == evaluation:
            raise Stopped(signal.SIGTERM)
        return [2.0]

    if evaluation == 1:  # before there is a run
        with pytest.raises(Stopped) as stopped:
            go(evaluate=evaluate)
        assert stopped.value.args == (signal.SIGTERM,)
        return
    run = go(evaluate=evaluate)
    assert len(evaluations) == evaluation
    run = go(args=args_of(run))
    expected = weights(whole(2))
    assert all(torch.equal(expected[name], value) for name, value in weights(run).items())
    assert points(run) == points(whole(2))


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
    """A run that was stopped in phase 1 after 56 of the teacher's steps; its checkpoint before that is of 48."""
    run = go(StopAfter(7), checkpoint_frequency=8)
    assert [load(path)["progress"]["teacher_steps"] for path in sorted(run.glob("checkpoints/*.checkpoint"))] == [
        48,
        56,
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
    assert content["progress"]["teacher_steps"] == 48
    assert sum(len(block) > 0 for block in frames["teacher"]) > 0
    assert ("damaged" in capfd.readouterr().out) == ((suffix, kind) != ("checkpoint", "gone"))


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 1e-3}, {"seed": 2}, {"env_id": "PongNoFrameskip-v4"}, {"n_step": 5}]
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
    assert Checkpoints(copied).load()[0]["progress"]["teacher_steps"] == 56
    assert not victim.exists()
    torch.load(written, weights_only=False)  # it would have worked
    assert victim.exists()


def test_a_disk_that_takes_no_checkpoint_does_not_stop_training(go, whole, monkeypatch, capfd):
    """The last good one stays, nothing half-written lies about, the weights are right; the end says what is missing."""
    save, calls = torch.save, []

    class FullDisk(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    def full(content, file):
        if file.name.endswith((".checkpoint.part", ".frames.part")):
            calls.append(Path(file.name).absolute())
            if len(calls) > 4:
                file.write(b"as far as it went")
                file = FullDisk()
        return save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="is not on disk, see above: make room, then --resume"):
        go(checkpoint_frequency=16)
    run = calls[0].parent.parent
    assert len(calls) > 8 and "No space left on device" in capfd.readouterr().out
    assert not list(run.rglob("*.part"))
    expected = weights(whole(2))
    assert all(torch.equal(expected[name], value) for name, value in weights(run).items())
    monkeypatch.undo()
    assert go(args=args_of(run)) == run
    assert all(torch.equal(expected[name], value) for name, value in weights(run).items())


def test_a_model_that_cannot_be_written_is_written_when_the_run_is_resumed(go, whole, monkeypatch):
    save, models = torch.save, []

    def full(content, file):
        if file.name.endswith(".cleanrl_model.part"):
            models.append(Path(file.name).absolute())
            raise OSError(28, "No space left on device")
        return save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="is not on disk"):
        go()
    monkeypatch.undo()
    run = models[0].parent
    assert not list(run.glob("*.cleanrl_model")) and go(args=args_of(run)) == run
    assert all(torch.equal(*pair) for pair in zip(weights(whole(2)).values(), weights(run).values()))
    assert points(run) == points(whole(2))


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


def test_where_nothing_can_be_written_no_run_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file, where a directory should be")
    assert refusal(start_run, Args(), {}).startswith("cannot start runs/BreakoutNoFrameskip-v4__")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(go, monkeypatch):
    loss, calls = qdagger.qdagger_loss, []

    def broken(*args):
        calls.append(args)
        return tuple(value * (math.nan if len(calls) > 12 else 1) for value in loss(*args))

    monkeypatch.setattr(qdagger, "qdagger_loss", broken)
    with pytest.raises(UserError, match=r"the loss is nan after .* offline updates"):
        go(checkpoint_frequency=5)


@pytest.mark.gpu
def test_on_a_gpu_a_stopped_and_resumed_run_goes_on(go):
    """To the same end with a point for each step; the last digits are not promised there."""
    whole = go(cuda=True)
    run = go(StopAfter(100), cuda=True)
    run = go(args=args_of(run))
    expected, logged = points(whole), points(run)
    assert expected.keys() == logged.keys()
    for tag in expected:
        assert "episodic" in tag or [step for step, _ in expected[tag]] == [step for step, _ in logged[tag]]

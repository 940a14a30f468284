"""Files from strangers and from dying disks, by the hundred: each is refused in a line or harmless, none runs or hangs.

Short versions always run; `pytest -m long` runs hundreds of cases of each kind.
"""

import copy
import io
import math
import random
import shutil
import signal
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from conftest import Malicious, refusal, saved

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import Args, QNetwork, Stopped, TeacherNetwork, UserError, args_of, load_model, train

CASES = pytest.mark.parametrize("cases", [12, pytest.param(200, marks=pytest.mark.long)])


def damaged(content: bytes, rng: random.Random) -> bytes:
    """`content` cut off, with a flipped bit, a hole, bytes missing, or bytes from elsewhere."""
    place, length = rng.randrange(len(content)), rng.choice([1, 8, 512, 70_000])
    kind = rng.choice(["cut", "cut near the end", "flip", "hole", "missing", "moved"])
    if kind == "cut":
        return content[:place]
    if kind == "cut near the end":
        return content[: -rng.randrange(1, 2000)]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if kind == "hole":
        return content[:place] + bytes(len(content[place : place + length])) + content[place + length :]
    if kind == "missing":
        return content[:place] + content[place + length :]
    other = rng.randrange(len(content))
    return content[:place] + content[other : other + length] + content[place + length :]


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# --- Models ---


@CASES
@pytest.mark.parametrize("kind", ["nature", "impala", "zip"])
def test_a_damaged_model_is_refused_or_still_the_same(tmp_path, cases, kind):
    """The same if only padding or names that nobody reads were hit."""
    network = QNetwork(4) if kind == "impala" else TeacherNetwork(4)
    content, path, rng = saved(network.state_dict()), tmp_path / "model", random.Random(0)
    if kind == "zip":
        layers = {ours: f"q_net.features_extractor.{theirs}" for theirs, ours in qdagger.SB3_LAYERS.items()}
        names = {name: ".".join(name.split(".")[1:]) for name in network.state_dict()}
        policy = {
            f"{({'9': 'q_net.q_net.0'} | layers)[names[name].split('.')[0]]}.{names[name].split('.')[1]}": value
            for name, value in network.state_dict().items()
        }
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("data", "{}")
            archive.writestr("policy.pth", saved(policy))
        content = file.getvalue()
    path.write_bytes(content)
    load_model(path, 4, "--teacher")
    refused = 0
    for _ in range(cases):
        path.write_bytes(damaged(content, rng))
        try:
            assert same(load_model(path, 4, "--teacher").state_dict(), network.state_dict())
        except UserError as error:
            assert str(error).startswith(f"--teacher {path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > cases / 2


def tampered(value: torch.Tensor) -> list:
    """What might stand where a tensor should: other types, shapes, sizes, numbers."""
    values = [None, "weights", 0.5, [], {}, [value], value.long(), value > 0, value.to(torch.complex64)]
    values += [value[None], value.reshape(-1)[1:], value[None, :0] if value.ndim else value[None], value.to_sparse()]
    values += [value.new_zeros(1).expand(size) for size in [(10**9,), (10**12,), (10**6, 10**6, 10**6)]]
    return values + [value * float(number) for number in ("nan", "inf")]


@pytest.mark.parametrize("network_class", [TeacherNetwork, QNetwork])
@CASES
def test_a_tampered_model_is_refused(tmp_path, cases, network_class):
    path, rng, state = tmp_path / "model", random.Random(0), network_class(4).state_dict()
    changes = [{name: each} for name, value in state.items() for each in tampered(value)]
    for change in rng.sample(changes, min(cases, len(changes))):
        torch.save(state | change, path)
        assert refusal(load_model, path, 4, "--teacher").startswith(f"--teacher {path}: ")


def repacked(content: bytes, **changes) -> bytes:
    """A torch file whose members are compressed, or with other bytes for one."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            for before, after in changes.get("replace", {}).items():
                data = data.replace(before, after)
            new.writestr(member.filename, data, changes.get("compress_type"))
    return file.getvalue()


def test_a_file_that_claims_more_than_it_holds_is_refused(tmp_path):
    """As a compressed file whose content would fill the memory, and by the size of a storage or of a tensor."""
    path, content = tmp_path / "model", saved({"network.9.bias": torch.zeros(70_000)})
    size = (70_000).to_bytes(4, "little")
    assert content.count(b"J" + size) == 2  # of the storage, and of the tensor
    for bytes_ in [
        repacked(content, compress_type=zipfile.ZIP_DEFLATED),
        repacked(content, replace={b"J" + size: b"J" + (2**31 - 1).to_bytes(4, "little")}),
        repacked(content, replace={b"J" + size: b"\x8a\x08" + (2**50).to_bytes(8, "little")}),
    ]:
        path.write_bytes(bytes_)
        assert refusal(load_model, path, 4, "--teacher").startswith(f"--teacher {path}: ")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("policy.pth", bytes(200_000_000))
    assert "far too large" in refusal(load_model, path, 4, "--teacher")


# --- Checkpoints ---


class StopAtOnce(list):
    def __bool__(self) -> bool:
        return True

    def __getitem__(self, _) -> int:
        return signal.SIGTERM


SETTINGS = dict(
    teacher_steps=40, offline_steps=6, total_timesteps=40, learning_starts=20, buffer_size=60, num_envs=2, cuda=False
) | dict(network="nature", batch_size=4, teacher_eval_episodes=1, eval_episodes=1, checkpoint_frequency=4)


@pytest.fixture(scope="module")
def run(make_model, tmp_path_factory) -> Path:
    """A whole small run, with optimizer, games and both halves of a replay in its last checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qdagger, "evaluate", lambda *_, **__: [2.0])
        patch.chdir(tmp_path_factory.mktemp("run"))
        return train(Args(teacher=str(make_model(4, action=1)), **SETTINGS)).absolute()


@pytest.fixture
def resumed(run, tmp_path, monkeypatch, capfd):
    """resumed(change): the UserError of a run that goes on after change(its last checkpoint's files), if any."""
    monkeypatch.setattr(qdagger, "evaluate", lambda *_, **__: [2.0])

    def resumed(change) -> UserError | None:
        directory = tmp_path / "runs" / run.name
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(run, directory)
        checkpoints = sorted(directory.glob("checkpoints/*.checkpoint"))
        for path in checkpoints[:-1]:
            path.unlink()
        change(checkpoints[-1])
        try:
            args = args_of(directory)
            args.total_timesteps = 60
            train(args, StopAtOnce())
        except Stopped:
            return None
        except UserError as error:
            assert str(error).startswith(("--resume ", "--")) and "\n" not in str(error)
            return error
        finally:
            assert "Traceback" not in "".join(capfd.readouterr())

    return resumed


@CASES
@pytest.mark.parametrize("suffix", ["checkpoint", "frames"])
def test_a_damaged_checkpoint_is_refused_or_still_the_same(run, cases, suffix, tmp_path):
    rng, path = random.Random(0), tmp_path / "file"
    (*_, original) = sorted(run.glob(f"checkpoints/*.{suffix}"))
    content, refused = original.read_bytes(), 0
    for _ in range(cases):
        path.write_bytes(damaged(content, rng))
        try:
            assert same(qdagger.load(path), qdagger.load(original))
        except AssertionError:
            raise
        except Exception:  # whatever it is, Checkpoints.load looks for an older one
            refused += 1
    assert refused > cases / 2


def leaves(content, path=()) -> list[tuple]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [leaf for key, value in items for leaf in leaves(value, (*path, key))] or [path]


def listed(content):
    """Tuples as lists, so that they can be changed."""
    if isinstance(content, dict):
        return {key: listed(value) for key, value in content.items()}
    return [listed(each) for each in content] if isinstance(content, list | tuple) else content


# Facts are only written down, and what a resumed run was started with is compared with the flags.
IGNORED = ("facts", "args")


@CASES
def test_a_tampered_checkpoint_is_refused_or_harmless(run, resumed, cases):
    """Any value in it replaced by one of another type, shape or size: no traceback, nothing that hangs."""
    rng, refused = random.Random(0), 0
    (*_, original) = sorted(run.glob("checkpoints/*.checkpoint"))
    content = qdagger.load(original)
    places = [place for place in leaves(listed(content)) if place[0] not in IGNORED]

    def change(path: Path) -> None:
        altered = copy.deepcopy(listed(content))
        *inside, last = rng.choice(places)
        part = altered
        for key in inside:
            part = part[key]
        value = part[last]
        values = tampered(value) if isinstance(value, torch.Tensor) else [None, "x", -1, math.nan, 10**30, [], {}, True]
        part[last] = rng.choice(values)
        altered["returns"] = tuple(altered["returns"])
        if altered["games"] and isinstance(altered["games"], list):
            altered["games"] = tuple(altered["games"])
        qdagger.write(altered, path)

    assert resumed(lambda path: None) is None
    for _ in range(cases):
        refused += resumed(change) is not None
    assert refused > cases / 3


@pytest.mark.parametrize("where", ["facts", "progress", "games", "frames"])
def test_a_tampered_checkpoint_never_runs_code(run, resumed, tmp_path, where):
    victim = tmp_path / "victim"

    def change(path: Path) -> None:
        content = torch.load(path, weights_only=False)
        content[where] = Malicious(victim)
        torch.save(content, path)

    assert "no readable checkpoint" in str(resumed(change))
    assert not victim.exists()


def test_frames_that_would_fill_the_memory_are_cut_off(run, resumed):
    """A block of frames that unpacks to more than a block holds."""

    def change(path: Path) -> None:
        for frames in path.parent.glob("*.frames"):
            bomb = torch.frombuffer(bytearray(zlib.compress(bytes(40_000_000), 1)), dtype=torch.uint8)
            torch.save([(0, 0, bomb)], frames)

    assert "does not fit" in str(resumed(change))

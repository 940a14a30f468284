"""Where teachers come from: files, a hub over real HTTP, the bundled ones; and the buffers they leave to others."""

import copy
import hashlib
import io
import pickle
import re
import shutil
import time
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Malicious, refusal, saved
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import Args, FrameReplay, QNetwork, TeacherNetwork, load_model

BREAKOUT, PONG, MS_PACMAN = "BreakoutNoFrameskip-v4", "PongNoFrameskip-v4", "MsPacmanNoFrameskip-v4"


# --- A file ---


@pytest.mark.parametrize("network_class", [TeacherNetwork, QNetwork])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loaded_model_is_the_one_that_was_saved(tmp_path, network_class, dtype):
    """Class told from the tensors, Q-values equal, float32 whatever the file has, nothing left to train."""
    network = network_class(6).to(dtype)
    torch.save(network.state_dict(), tmp_path / "model")
    loaded = load_model(tmp_path / "model", 6, "--teacher")
    assert type(loaded) is network_class
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in loaded.parameters())
    obs = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded(obs), network.float()(obs))


def test_state_dict_of_the_other_layout_and_with_foreign_memory_format(tmp_path):
    """What training itself holds, channels last, is saved and read back value by value."""
    network = QNetwork(4).to(memory_format=torch.channels_last)
    torch.save(network.state_dict(), tmp_path / "model")
    loaded = load_model(tmp_path / "model", 4, "--teacher").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("network", ["nature", "impala"])
def test_a_model_of_another_game_is_refused_by_its_actions(make_model, network):
    path = make_model(4, network)
    message = refusal(load_model, path, 6, "--teacher")
    assert message.startswith(f"--teacher {path}: ") and "4 actions" in message and "has 6" in message


def nature_state(**changes) -> dict:
    return {**TeacherNetwork(4).state_dict(), **changes}


def without(name: str) -> dict:
    return {key: value for key, value in nature_state().items() if key != name}


NO_MODELS = {
    "empty": b"",
    "random bytes": bytes(torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0)).tolist()),
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "a tensor": saved(torch.zeros(4)),
    "a list": saved([torch.zeros(4)]),
    "a number": saved(4),
    "an empty dictionary": saved({}),
    "another program's": saved({"policy.weight": torch.zeros(4, 4)}),
    "a bias that is a number": saved({"network.9.bias": 4}),
    "a bias that is a word": saved({"network.9.bias": "four"}),
    "a wrong shape": saved(nature_state(**{"network.0.weight": torch.zeros(32, 1, 8, 8)})),
    "a wrong shape inside": saved(nature_state(**{"network.7.bias": torch.zeros(256)})),
    "a missing first layer": saved(without("network.0.weight")),
    "a missing last weight": saved(without("network.9.weight")),
    "a tensor too many": saved(nature_state(**{"network.11.weight": torch.zeros(4)})),
    "a value that is no tensor": saved(nature_state(**{"network.2.bias": [0.0] * 64})),
}


@pytest.mark.parametrize("flag", ["--teacher", "--evaluate"])
@pytest.mark.parametrize("content", NO_MODELS.values(), ids=NO_MODELS.keys())
def test_what_is_no_model_is_refused_in_a_line(tmp_path, content, flag):
    path = tmp_path / "model"
    path.write_bytes(content)
    assert refusal(load_model, path, 4, flag).startswith(f"{flag} {path}: ")


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    missing = refusal(load_model, tmp_path / "missing", 4, "--teacher")
    assert missing.startswith(f"--teacher {tmp_path / 'missing'}: ") and "no such file" in missing.lower()
    assert refusal(load_model, tmp_path, 4, "--teacher").startswith(f"--teacher {tmp_path}: ")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_model_is_refused(tmp_path, share):
    content = saved(nature_state())
    path = tmp_path / "model"
    path.write_bytes(content[: int(share * len(content))])
    assert refusal(load_model, path, 4, "--teacher").startswith(f"--teacher {path}: ")


@pytest.mark.parametrize("content", [Malicious, lambda victim: {**nature_state(), "note": Malicious(victim)}])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_model_file_never_runs_code(tmp_path, content, legacy):
    path, victim = tmp_path / "model", tmp_path / "victim"
    torch.save(content(victim), path, _use_new_zipfile_serialization=not legacy)
    assert refusal(load_model, path, 4, "--teacher").startswith(f"--teacher {path}: ")
    assert not victim.exists()
    torch.load(path, weights_only=False)  # it would have worked
    assert victim.exists()


# --- Stable-Baselines3 ---


class Screen(gym.Env):
    """A game's shape for stable-baselines3: stacked frames in, `num_actions` out."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)

    def __init__(self, num_actions: int):
        self.action_space = gym.spaces.Discrete(num_actions)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    """zipped(num_actions, algorithm=DQN): (file, model), saved by stable-baselines3 itself."""
    directory = tmp_path_factory.mktemp("sb3")

    def make(num_actions: int, algorithm=DQN) -> tuple[Path, BaseAlgorithm]:
        small = {"buffer_size": 1} if algorithm is DQN else {}
        model = algorithm("CnnPolicy", Screen(num_actions), device="cpu", **small)
        path = directory / f"{algorithm.__name__}{num_actions}.zip"
        model.save(path)
        return path, model

    return make


def test_a_stable_baselines3_zip_has_the_q_values_of_its_model(zipped, tmp_path):
    """Whatever the file is called: what counts is what is in it."""
    path, model = zipped(6)
    renamed = shutil.copy(path, tmp_path / "a.cleanrl_model")
    obs = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.q_net(obs)
        assert not torch.equal(expected, torch.zeros_like(expected))
        for file in (path, renamed):
            network = load_model(file, 6, "--teacher")
            assert type(network) is TeacherNetwork
            torch.testing.assert_close(network(obs), expected, rtol=0, atol=1e-6)


def test_a_stable_baselines3_zip_of_another_game_or_algorithm_is_refused(zipped):
    path, _ = zipped(6)
    assert "6 actions" in refusal(load_model, path, 4, "--teacher")
    path, _ = zipped(4, PPO)
    message = refusal(load_model, path, 4, "--teacher")
    assert message.startswith(f"--teacher {path}: ") and "q_net" in message


@pytest.mark.parametrize("member", ["policy_pth", "pytorch_variables_pth", "policy_optimizer_pth", "data"])
def test_a_zip_never_runs_code_and_only_its_policy_is_read(zipped, tmp_path, member):
    path, victim = zipped(4)[0], tmp_path / "victim"
    payload = saved(Malicious(victim)) if member != "data" else pickle.dumps(Malicious(victim))
    changed = tmp_path / "changed.zip"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(changed, "w") as target:
        names = source.namelist()
        (replaced,) = [each for each in names if each.replace(".", "_") == member]
        for each in names:
            target.writestr(each, payload if each == replaced else source.read(each))
    if member == "policy_pth":
        assert refusal(load_model, changed, 4, "--teacher").startswith(f"--teacher {changed}: ")
    else:
        load_model(changed, 4, "--teacher")
    assert not victim.exists()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 0.9999])
def test_a_truncated_zip_is_refused(zipped, tmp_path, share):
    content = zipped(4)[0].read_bytes()
    path = tmp_path / "cut.zip"
    path.write_bytes(content[: int(share * len(content))])
    assert refusal(load_model, path, 4, "--teacher").startswith(f"--teacher {path}: ")


def test_a_damaged_zip_is_refused(zipped, tmp_path):
    """One byte of the policy is another: the zip's own sum tells."""
    path, _ = zipped(4)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("policy.pth")
    content[member.header_offset + member.compress_size // 2] ^= 0xFF
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(content)
    assert refusal(load_model, damaged, 4, "--teacher").startswith(f"--teacher {damaged}: ")


# --- The hub ---


def repository(env_id: str, exp_name: str = "dqn_atari") -> str:
    return f"cleanrl/{env_id}-{exp_name}-seed1"


@pytest.fixture
def hub_out_of_reach(hub):
    hub.close()
    yield
    hub.start()


def test_the_default_teacher_comes_from_the_hub(hub, hub_client):
    """Its repository is named after game and teacher; what arrives has the Q-values of what was put there."""
    teacher = TeacherNetwork(9)
    hub.files[repository(MS_PACMAN), "dqn_atari.cleanrl_model"] = saved(teacher.state_dict())
    answer = hub_client(find_teacher={"env_id": MS_PACMAN})
    assert "path" in answer, answer
    loaded = load_model(answer["path"], 9, "--teacher")
    obs = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    assert torch.equal(loaded(obs), teacher.requires_grad_(False)(obs))
    assert answer["reason"] == f"from the hub, {repository(MS_PACMAN)}"
    asked = [path for _, path in hub.requests if "/resolve/" in path]
    assert set(asked) == {f"/{repository(MS_PACMAN)}/resolve/main/dqn_atari.cleanrl_model"}


@pytest.mark.parametrize("seen_before", [False, True])
def test_a_cached_teacher_needs_no_hub(hub, hub_client, seen_before):
    """Once downloaded it is found without anybody listening; one that never came is not."""
    env_id = "AlienNoFrameskip-v4" if seen_before else "AmidarNoFrameskip-v4"
    hub.files[repository(env_id), "dqn_atari.cleanrl_model"] = saved(env_id)
    if seen_before:
        assert "path" in hub_client(find_teacher={"env_id": env_id})
    hub.close()
    answer = hub_client(find_teacher={"env_id": env_id})
    hub.start()
    if seen_before:
        assert torch.load(answer["path"]) == env_id
        assert repository(env_id) in answer["reason"] and "cache" in answer["reason"]
    else:
        assert "--teacher auto" in answer["error"] and repository(env_id) in answer["error"]


def test_repository_and_file_names_follow_the_flags(hub, hub_client):
    hub.files["bob/teachers", "c51_atari.cleanrl_model"] = saved("of bob")
    hub.files[repository(PONG, "c51_atari"), "c51_atari.cleanrl_model"] = saved("of cleanrl")
    named = hub_client(find_teacher={"teacher_policy_hf_repo": "bob/teachers", "teacher_model_exp_name": "c51_atari"})
    assert torch.load(named["path"]) == "of bob"
    by_default = hub_client(find_teacher={"env_id": PONG, "teacher_model_exp_name": "c51_atari"})
    assert torch.load(by_default["path"]) == "of cleanrl"


@pytest.mark.parametrize(
    "files",
    [{}, {("nobody/nothing", "README.md"): b"no model"}],
    ids=["no such repository", "no such file"],
)
def test_what_the_hub_does_not_have_is_refused_by_name(hub, hub_client, files):
    """Even where a file is bundled: the hub answered, and a wrong name must not be papered over."""
    hub.files.update(files)
    answer = hub_client(find_teacher={"env_id": PONG, "teacher_policy_hf_repo": "nobody/nothing"})
    assert answer["error"].startswith("UserError: --teacher-policy-hf-repo nobody/nothing: ")
    assert len(answer["error"].splitlines()) == 1


@pytest.mark.parametrize("name", ["no/such/name", "with space", ""])
def test_an_impossible_repository_name_is_refused(hub, hub_client, name):
    answer = hub_client(find_teacher={"teacher_policy_hf_repo": name})
    assert answer["error"].startswith("UserError: --teacher-policy-hf-repo")
    assert len(answer["error"].splitlines()) == 1


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_a_hub_that_answers_with_an_error_is_told_from_one_out_of_reach(hub, hub_client, status):
    """Its answer is in the line, and the bundled teacher of the game is not used."""
    hub.files[repository(PONG), "dqn_atari.cleanrl_model"] = saved(nature_state())
    hub.fault, hub.status = "resolve", status
    answer = hub_client(find_teacher={"env_id": PONG})
    assert answer["error"].startswith(f"UserError: --teacher-policy-hf-repo {repository(PONG)}: ")
    assert str(status) in answer["error"] and len(answer["error"].splitlines()) == 1


@pytest.mark.parametrize("fault, env_id", [("break_off", "AssaultNoFrameskip-v4"), ("stall", "AsterixNoFrameskip-v4")])
def test_a_broken_download_ends_in_a_line(hub, hub_client, fault, env_id):
    """A connection that ends halfway, or goes quiet: UserError, and no half file that a later run would find."""
    hub.files[repository(env_id), "dqn_atari.cleanrl_model"] = content = saved(nature_state())
    setattr(hub, fault, True)
    answer = hub_client(find_teacher={"env_id": env_id})
    assert answer["error"].startswith(f"UserError: --teacher-policy-hf-repo {repository(env_id)}: ")
    setattr(hub, fault, False)
    assert Path(hub_client(find_teacher={"env_id": env_id})["path"]).read_bytes() == content


@pytest.mark.parametrize("silent", [False, True], ids=["nobody listens", "nobody answers"])
def test_out_of_reach_the_bundled_teacher_teaches_within_ten_seconds(hub, hub_client, silent):
    start = time.perf_counter()
    if silent:
        hub.silent = True
    else:
        hub.close()
    answer = hub_client(find_teacher={"env_id": PONG})
    seconds = time.perf_counter() - start
    if silent:
        hub.silent = False
    else:
        hub.start()
    assert Path(answer["path"]).read_bytes() == b"bundled"
    assert answer["reason"] == "bundled: the hub is out of reach"
    assert seconds < 10


def test_a_damaged_bundled_teacher_is_refused(hub_out_of_reach, hub_client):
    error = hub_client(find_teacher={"env_id": "QbertNoFrameskip-v4"})["error"]
    assert error.startswith("UserError: --teacher auto: ") and "SHA-256" in error


def test_out_of_reach_without_a_bundled_teacher_is_refused(hub_out_of_reach, hub_client):
    answer = hub_client(find_teacher={"env_id": BREAKOUT})
    assert answer["error"].startswith("UserError: --teacher auto: the hub is out of reach")
    assert repository(BREAKOUT) in answer["error"] and answer["out"] == ""


def test_a_bundled_teacher_is_no_stand_in_for_one_asked_for_by_name(hub_out_of_reach, hub_client):
    answer = hub_client(find_teacher={"env_id": PONG, "teacher_policy_hf_repo": "bob/pong"})
    assert answer.get("error", "").startswith("UserError: --teacher"), answer


@pytest.mark.parametrize("repo, file", [("sb3/dqn-PongNoFrameskip-v4", "dqn-PongNoFrameskip-v4.zip")])
def test_the_hub_s_stable_baselines3_teachers(hub, hub_client, zipped, repo, file):
    path, model = zipped(6)
    hub.files[repo, file] = path.read_bytes()
    answer = hub_client(find_teacher={"env_id": PONG, "teacher_policy_hf_repo": repo})
    obs = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(load_model(answer["path"], 6, "--teacher")(obs), model.q_net(obs), rtol=0, atol=1e-6)


def test_a_path_asks_nobody(hub, hub_client):
    assert hub_client(find_teacher={"teacher": "some/where"})["path"] == "some/where"
    assert hub.requests == []


# --- The bundled teachers ---

BUNDLED = sorted((Path(qdagger.__file__).resolve().parent / "teachers").glob("*.cleanrl_model"))


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_a_bundled_teacher_is_the_one_on_its_card_and_plays_like_it(path):
    """Half precision, its SHA-256 there, and three games that score no less than half of what the card says."""
    card = path.with_suffix(".md").read_text()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    assert {value.dtype for value in torch.load(path).values()} == {torch.float16}
    args = Args(env_id=path.stem, cuda=False)
    teacher = load_model(path, qdagger.AtariGame(args.env_id, 1).num_actions, "--teacher").to(
        memory_format=torch.channels_last
    )
    score = float(re.search(r"score \| (-?[\d.]+) ± ", card)[1])
    assert np.mean(qdagger.evaluate(teacher, args, 3, torch.device("cpu"))) >= score / 2 > 0


def test_there_is_a_bundled_teacher_for_the_default_game():
    assert Args().env_id in {path.stem for path in BUNDLED}


# --- The teacher's buffer ---


@pytest.fixture(scope="module")
def buffer_run(make_model, tmp_path_factory):
    """run(**changes): two offline steps on a teacher's buffer; returns the replay that they learned from."""
    teacher = make_model(4, action=1)
    settings = dict(teacher=str(teacher), num_envs=2, teacher_steps=40, offline_steps=2, total_timesteps=0)
    sizes = dict(network="nature", batch_size=4, buffer_size=40, teacher_eval_episodes=1, eval_episodes=1, cuda=False)

    def run(**changes) -> FrameReplay:
        drawn_from = []

        class SpyReplay(FrameReplay):
            def sample(self, *args):
                drawn_from.append(self)
                return super().sample(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("run"))
            patch.setattr(qdagger, "evaluate", lambda *args, **options: [1.0])
            patch.setattr(qdagger, "FrameReplay", SpyReplay)
            qdagger.train(Args(**settings | sizes | changes))
        assert len(drawn_from) == 2
        return drawn_from[0]

    return run


@pytest.fixture(scope="module")
def buffer(buffer_run, tmp_path_factory):
    """The file and the replay of a first run."""
    path = tmp_path_factory.mktemp("buffers") / "buffer.pt"
    return path, copy.deepcopy(buffer_run(teacher_buffer=path).state_dict())


def test_a_second_student_learns_from_the_first_one_s_buffer(buffer, buffer_run, capfd):
    """No teacher plays again, and every tensor is what the first run had."""
    path, first = buffer
    before = path.read_bytes()
    buffer_run(teacher_buffer=None)
    assert "teacher buffer" in capfd.readouterr().err
    second = buffer_run(teacher_buffer=path, seed=2).state_dict()
    assert "teacher buffer" not in capfd.readouterr().err
    assert first.keys() == second.keys() and first["written"].tolist() == [5] * 8
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["nature", "impala", "zip"])
def test_a_student_learns_from_each_kind_of_teacher(buffer_run, make_model, zipped, kind):
    """Two updates on real games that this teacher played: its Q-values are what is imitated."""
    path = zipped(4)[0] if kind == "zip" else make_model(4, kind)
    replay = buffer_run(teacher=str(path))
    batch = replay.sample(64, 1, 0.99, torch.Generator().manual_seed(0))
    expected = load_model(path, 4, "--teacher")(batch.obs)
    assert expected.std(dim=1).min() > 0
    torch.testing.assert_close(batch.teacher_q_values, expected, rtol=0, atol=1e-4)


def test_the_buffer_holds_what_the_teacher_did(buffer, make_model):
    """Q-values are the teacher's at those observations, and actions its own wherever it did not explore."""
    state = buffer[1]
    replay = FrameReplay(40, 8, 4)
    replay.load_state_dict(state)
    batch = replay.sample(64, 1, 0.99, torch.Generator().manual_seed(0))
    teacher = load_model(make_model(4, action=1), 4, "--teacher")
    torch.testing.assert_close(batch.teacher_q_values, teacher(batch.obs), rtol=0, atol=1e-4)
    assert {1} < set(batch.actions.tolist())


@pytest.mark.parametrize(
    "changes",
    [
        {"env_id": PONG},
        {"repeat_action_probability": 0.25},
        {"num_envs": 1},
        {"teacher_steps": 42},
        {"start_e": 0.5},
        {"end_e": 0.5},
        {"teacher": "other"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_buffer_made_otherwise_is_refused_by_the_setting(buffer, buffer_run, make_model, changes):
    path, name = buffer[0], next(iter(changes))
    if name == "teacher":
        changes = {"teacher": str(make_model(4, action=2))}
    elif name == "env_id":
        changes = {**changes, "teacher": str(make_model(6))}
    message = refusal(lambda: buffer_run(teacher_buffer=path, **changes))
    assert message.startswith(f"--teacher-buffer {path}: ")
    others = {"env_id", "repeat_action_probability", "num_envs", "teacher_steps", "start_e", "end_e"} - {name}
    told = message.removeprefix(f"--teacher-buffer {path}: ")
    assert name in told and not any(other in told for other in others)


def damaged_buffers(content: bytes) -> dict[str, bytes]:
    parts = {f"cut at {share}": content[: int(share * len(content))] for share in (0.0, 0.01, 0.5, 0.9999)}
    loaded = torch.load(io.BytesIO(content))
    loaded["replay"].pop("actions")
    return parts | {"a missing tensor": saved(loaded), "a model": saved(nature_state()), "noise": b"\x00\x01" * 999}


def test_a_damaged_buffer_is_refused(buffer, buffer_run, tmp_path):
    """Truncated, incomplete or something else: a line with the flag, and nothing runs."""
    for name, content in damaged_buffers(buffer[0].read_bytes()).items():
        path = tmp_path / name
        path.write_bytes(content)
        message = refusal(lambda: buffer_run(teacher_buffer=path))  # noqa: B023
        assert message.startswith(f"--teacher-buffer {path}: "), name
    assert refusal(lambda: buffer_run(teacher_buffer=tmp_path)).startswith(f"--teacher-buffer {tmp_path}: ")


def test_a_buffer_file_never_runs_code(buffer_run, tmp_path):
    path, victim = tmp_path / "buffer.pt", tmp_path / "victim"
    torch.save({"made_with": {}, "replay": Malicious(victim)}, path)
    assert refusal(lambda: buffer_run(teacher_buffer=path)).startswith(f"--teacher-buffer {path}: ")
    assert not victim.exists()


def test_a_buffer_whose_directory_is_missing_is_refused_before_the_teacher_plays(buffer_run, tmp_path):
    path = tmp_path / "missing" / "buffer.pt"
    assert refusal(lambda: buffer_run(teacher_buffer=path)).startswith(f"--teacher-buffer {path}: ")
    assert not path.parent.exists()

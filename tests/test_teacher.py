"""Where teachers come from: files, a hub over real HTTP, the bundled ones; the buffers they leave; what is uploaded."""

import hashlib
import re
import time
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Malicious, refusal, saved
from huggingface_hub import ModelCard
from stable_baselines3 import DQN, PPO

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import Args, FrameReplay, QNetwork, TeacherNetwork, find_teacher, load_network

PONG, QBERT = "PongNoFrameskip-v4", "QbertNoFrameskip-v4"
TEACHERS = Path(qdagger.__file__).resolve().parent / "teachers"
OBS = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("network_class", [TeacherNetwork, QNetwork])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loaded_model_is_the_one_that_was_saved(tmp_path, network_class, dtype):
    """Class told from the tensors, Q-values equal, float32 whatever the file has, nothing left to train."""
    network = network_class(6).to(dtype, memory_format=torch.channels_last)
    torch.save(network.state_dict(), tmp_path / "model")
    loaded = load_network(tmp_path / "model", 6, "--teacher")
    assert type(loaded) is network_class
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(OBS), network.float().to(memory_format=torch.contiguous_format)(OBS))


def sb3(path: Path, algorithm=DQN, policy="CnnPolicy", num_actions=4, shape=(84, 84, 4), **options) -> DQN | PPO:
    """A model of stable-baselines3, which it saves to `path` itself."""
    screen = gym.Env()
    screen.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
    screen.action_space = gym.spaces.Discrete(num_actions)
    model = algorithm(policy, screen, device="cpu", **options)
    model.save(path)
    return model


def test_a_stable_baselines3_zip_has_the_q_values_of_its_model(tmp_path):
    """Whatever the file is called: what counts is what is in it."""
    model = sb3(tmp_path / "a.cleanrl_model", num_actions=6, buffer_size=1)
    network = load_network(tmp_path / "a.cleanrl_model", 6, "--teacher")
    with torch.no_grad():
        assert type(network) is TeacherNetwork and model.q_net(OBS).std() > 0
        torch.testing.assert_close(network(OBS), model.q_net(OBS), rtol=0, atol=1e-5)


def nature_state(**changes) -> dict:
    return {name: value for name, value in {**TeacherNetwork(4).state_dict(), **changes}.items() if value is not None}


WHOLE = saved(nature_state())
NO_MODELS = {
    "random bytes": bytes(torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0)).tolist()),
    **{f"cut at {share}": WHOLE[: int(share * len(WHOLE))] for share in (0, 0.001, 0.5, 0.9999)},
    "an empty dictionary": saved({}),
    "another program's": saved({4: torch.zeros(4, 4)}),
    "a wrong shape": saved(nature_state(**{"network.7.bias": torch.zeros(256)})),
    "a missing layer": saved(nature_state(**{"network.9.weight": None, "network.9.bias": None})),
    "a tensor too many": saved(nature_state(**{"network.11.weight": torch.zeros(4)})),
    "a value that is no tensor": saved(nature_state(**{"network.2.bias": [0.0] * 64})),
    "a teacher of another game": saved(TeacherNetwork(6).state_dict()),
    "a student of another game": saved(QNetwork(18).state_dict()),
}


def test_what_is_no_model_is_refused_in_a_line(tmp_path):
    """Zips of another algorithm, game or policy, the last with as many tensors as a Nature CNN, as well."""
    flat, small = {"policy": "MlpPolicy", "shape": (8,)}, {"policy_kwargs": {"net_arch": [8] * 4}}
    for nth, options in enumerate([{"algorithm": PPO}, {"num_actions": 6}, flat, flat | small]):
        sb3(tmp_path / f"{nth}.zip", **options, **({} if "algorithm" in options else {"buffer_size": 1}))
    (tmp_path / "cut.zip").write_bytes((tmp_path / "1.zip").read_bytes()[:-9])
    for name, content in NO_MODELS.items():
        (tmp_path / name).write_bytes(content)
    for path in [tmp_path, tmp_path / "missing", *tmp_path.iterdir()]:
        for flag in ("--teacher", "--evaluate"):
            assert refusal(load_network, path, 4, flag).startswith(f"{flag} {path}: ")


def test_no_model_ever_runs_code_and_of_a_zip_only_the_policy_is_read(tmp_path):
    path, victim = tmp_path / "model", tmp_path / "victim"
    sb3(tmp_path / "model.zip", buffer_size=1)
    source = zipfile.ZipFile(tmp_path / "model.zip")
    members = {name: source.read(name) for name in source.namelist()}
    for replaced in ("data", "policy.optimizer.pth", "policy.pth"):
        with zipfile.ZipFile(path, "w") as target:
            for name, content in (members | {replaced: saved(Malicious(victim))}).items():
                target.writestr(name, content)
        if replaced != "policy.pth":
            load_network(path, 4, "--teacher")
    refusals = [refusal(load_network, path, 4, "--teacher")]
    for content in (Malicious(victim), nature_state(note=Malicious(victim))):
        for new in (False, True):
            torch.save(content, path, _use_new_zipfile_serialization=new)
            refusals.append(refusal(load_network, path, 4, "--teacher"))
    assert all(message.startswith(f"--teacher {path}: ") for message in refusals) and not victim.exists()
    torch.load(path, weights_only=False)  # it would have worked
    assert victim.exists()


def default(env_id: str, exp_name: str = "dqn_atari") -> tuple[str, str]:
    """Repository and file of the default teacher."""
    return f"cleanrl/{env_id}-{exp_name}-seed1", f"{exp_name}.cleanrl_model"


def test_the_default_teacher_comes_from_the_hub_and_then_from_its_cache(hub):
    """Always the hub's newest, and without anybody listening the one that came last."""
    repo, file = default(PONG)
    for content in (b"old", b"new"):
        hub.files[repo, file], hub.commit_hash = content, content.hex().ljust(40, "0")
        path, reason = find_teacher(Args(env_id=PONG))
        assert (path.read_bytes(), reason) == (content, f"from the hub, {repo}")
    assert {path for _, path in hub.requests if "/api/" not in path} == {f"/{repo}/resolve/main/{file}"}
    hub.close()
    path, reason = find_teacher(Args(env_id=PONG))
    assert (path.read_bytes(), reason) == (b"new", f"from the cache of the hub, {repo}")


def test_repository_and_file_follow_the_flags(hub):
    c51 = {"teacher_model_exp_name": "c51_atari"}
    for flags, place in [
        ({"env_id": QBERT, **c51}, default(QBERT, "c51_atari")),
        ({"teacher_policy_hf_repo": "bob/teachers", **c51}, ("bob/teachers", "c51_atari.cleanrl_model")),
        ({"teacher_policy_hf_repo": f"sb3/dqn-{PONG}", **c51}, (f"sb3/dqn-{PONG}", f"dqn-{PONG}.zip")),
    ]:
        hub.files[place] = content = repr(place).encode()
        assert find_teacher(Args(**flags))[0].read_bytes() == content
    hub.requests.clear()
    assert find_teacher(Args(teacher="some/where"))[0] == Path("some/where") and not hub.requests


@pytest.mark.parametrize("silent", [False, True])
def test_out_of_reach_the_bundled_teacher_teaches_within_ten_seconds(hub, silent):
    hub.silent = silent
    if not silent:
        hub.close()
    start = time.perf_counter()
    path, reason = find_teacher(Args(env_id=PONG))
    assert time.perf_counter() - start < 10
    assert (path, reason) == (TEACHERS / f"{PONG}.cleanrl_model", "bundled: the hub is out of reach")


def test_a_hub_that_answers_with_an_error_is_told_from_one_out_of_reach(hub):
    """Its answer is in the line, and neither the bundled teacher of the game nor then the cached one is used."""
    for cached in (False, True):
        for hub.status in (401, 403, 404, 429, 500, 503):
            hub.fault = "resolve"
            message = refusal(find_teacher, Args(env_id=PONG))
            assert message.startswith(f"--teacher-policy-hf-repo {default(PONG)[0]}: ") and str(hub.status) in message
        hub.files[default(PONG)], hub.fault = WHOLE, ""
        assert cached or find_teacher(Args(env_id=PONG))[0].read_bytes() == WHOLE


def test_a_bundled_teacher_is_no_stand_in_for_another(hub):
    """No such repository, no such file in it, no such name; or the hub is out of reach."""
    hub.files["bob/pong", "README.md"] = b"no model"
    for repo in ("bob/nothing", "bob/pong", "no/such/name", "with space"):
        message = refusal(find_teacher, Args(env_id=PONG, teacher_policy_hf_repo=repo))
        assert message.startswith(f"--teacher-policy-hf-repo {repo}: ")
    hub.close()
    for repo, env_id in (("bob/pong", PONG), (default(QBERT)[0], QBERT)):
        message = refusal(find_teacher, Args(env_id=env_id, teacher_policy_hf_repo=repo))
        assert message.startswith("--teacher auto: the hub is out of reach") and repo in message


def test_a_broken_download_ends_in_a_line_and_leaves_no_half_file(hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client waits before it tries again
    hub.files[default(QBERT)], hub.break_off = WHOLE, True
    assert refusal(find_teacher, Args(env_id=QBERT)).startswith("--teacher")
    hub.break_off = False
    assert find_teacher(Args(env_id=QBERT))[0].read_bytes() == WHOLE


def test_the_bundled_teachers_are_those_of_their_cards_and_can_be_loaded():
    """One for the default game among them, in half precision, with the SHA-256 on the card."""
    bundled = {path.stem: path for path in TEACHERS.glob("*.cleanrl_model")}
    assert Args().env_id in bundled
    for env_id, path in bundled.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() in path.with_suffix(".md").read_text()
        assert {value.dtype for value in torch.load(path).values()} == {torch.float16}
        load_network(path, qdagger.AtariGames(Args(env_id=env_id), 1, 1).num_actions, "--teacher")


@pytest.fixture
def buffer_run(make_model, monkeypatch):
    """run(**changes): phase 1 for two offline steps, which are not done; the replay that they would learn from."""
    settings = dict(num_envs=1, teacher_steps=112, offline_steps=2, total_timesteps=0, buffer_size=40, cuda=False)
    settings, replays = settings | {"teacher": str(make_model(4, action=1)), "network": "nature"}, []
    monkeypatch.setattr(qdagger, "evaluate", lambda *args, **options: [1.0])
    monkeypatch.setattr(qdagger, "Run", MagicMock(**{"return_value.time_to_save.return_value": False}))
    monkeypatch.setattr(qdagger.Learner, "gradient_step", lambda _, replay: replays.append(replay))

    def run(**changes) -> FrameReplay:
        qdagger.train(Args(**settings | changes))
        assert replays[-1] is replays[-2]
        return replays.pop()

    return run


def test_the_buffer_holds_what_the_teacher_did(buffer_run, make_model):
    """Q-values are the teacher's at those observations, and actions, without exploration, its own."""
    path = make_model(4, "impala")
    batch = buffer_run(teacher=str(path), start_e=0.0, end_e=0.0).sample(64, 1, 0.99, torch.Generator().manual_seed(0))
    expected = load_network(path, 4, "--teacher")(batch.obs)
    assert expected.std(dim=1).min() > 0 and torch.equal(batch.actions, batch.teacher_q_values.argmax(1))
    torch.testing.assert_close(batch.teacher_q_values, expected, rtol=0, atol=1e-4)


def test_the_file_of_the_buffer_is_for_students_with_the_same_teacher_alone(buffer_run, make_model, tmp_path, capfd):
    """For them no teacher plays again; for others it is refused with the name of the setting."""
    path = tmp_path / "buffer.pt"
    first = buffer_run(teacher_buffer=str(path)).state_dict()
    content, first["truncations"][-8:] = path.read_bytes(), True  # so does the last row count once it is read
    assert "teacher buffer" in capfd.readouterr().err
    second = buffer_run(teacher_buffer=str(path), seed=2).state_dict()
    assert "teacher buffer" not in capfd.readouterr().err and path.read_bytes() == content
    assert first.keys() == second.keys() and first["written"] == 14
    assert all(torch.equal(*pair) for pair in zip(first.pop("frames"), second.pop("frames"), strict=True))
    assert all(torch.equal(first[name], second[name]) for name in first)
    others = dict(env_id=PONG, repeat_action_probability=0.25, num_envs=2, teacher_steps=120, start_e=0.5, end_e=0.5)
    for name, value in (others | {"teacher": str(make_model(4, action=2))}).items():
        changes = {name: value} | ({"teacher": str(make_model(6))} if name == "env_id" else {})
        message = refusal(buffer_run, teacher_buffer=str(path), **changes)
        assert message.startswith(f"--teacher-buffer {path}: made with another {name};")


def test_a_damaged_buffer_is_refused_and_never_runs_code(tmp_path):
    """Truncated, incomplete or something else: a line with the flag, and nothing runs."""
    victim, replay = tmp_path / "victim", FrameReplay(8, 4, 4)
    replay.written += 2
    whole = {"made_with": {"num_envs": 1}, "replay": replay.state_dict()}
    files = {f"cut at {share}": saved(whole)[: int(share * len(saved(whole)))] for share in (0.0, 0.01, 0.5, 0.9999)}
    files |= {"a model": WHOLE, "noise": b"\x00\x01" * 999, "a list": saved([1]), "code": saved(Malicious(victim))}
    for name, other in [("actions", None), ("frames", [torch.zeros(9).byte()]), ("rewards", torch.zeros(7))]:
        files[name] = saved(whole | {"replay": whole["replay"] | {name: other}})
    for name, damaged in ({"whole": saved(whole)} | files).items():
        (tmp_path / name).write_bytes(damaged)
    load = partial(qdagger.load_teacher_buffer, made_with=whole["made_with"], replay=FrameReplay(8, 4, 4))
    load(tmp_path / "whole")
    for path in [tmp_path, *(tmp_path / name for name in files)]:
        assert refusal(load, path).startswith(f"--teacher-buffer {path}: "), path
    assert not victim.exists()


UPLOAD = ["--num-envs=1", "--total-timesteps=28", "--offline-steps=0", "--network=nature", "--batch-size=4"]
UPLOAD += ["--buffer-size=28", "--teacher-steps=56", "--no-cuda", "--save-model", "--upload-model"]
MODEL, NAME = "qdagger_dqn_atari_impalacnn.cleanrl_model", "BreakoutNoFrameskip-v4-qdagger_dqn_atari_impalacnn-seed1"


@pytest.fixture
def publish(command_line, hub, monkeypatch, make_model):
    """publish(*flags): a whole run with a made-up score; hub.known are the repositories at each evaluation."""
    hub.known = []
    monkeypatch.setattr(qdagger, "evaluate", lambda *_, **__: hub.known.append([*hub.repos]) or [2.0, 5.0])
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    return lambda *flags: command_line(*UPLOAD, "--teacher", make_model(4), *flags)


def test_the_repository_is_made_before_the_first_game_and_holds_the_run_in_the_end(publish, hub, tmp_path):
    """Model, event files, and a card with the score; no checkpoint."""
    code, out, _ = publish("--hf-entity", "lab")
    (run,) = (tmp_path / "runs").iterdir()
    assert code == 0 and out.splitlines()[-1] == f"runs/{run.name}: 3.50 ± 1.50 over 2 games"
    assert hub.known[0] == [f"lab/{NAME}"] == list(hub.commits)
    (files,) = hub.commits.values()
    assert files == {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".pt"}
    assert not [path for path in run.iterdir() if re.search(r'[<>:"|?*\\]|[ .]$', path.name)]  # which Windows refuses
    assert {file.split(".")[0] for file in files} == {"qdagger_dqn_atari_impalacnn", "README", "events"}
    load_network(run / MODEL, 4, "--evaluate")
    (result,) = ModelCard((run / "README.md").read_text()).data.eval_results
    assert (result.metric_value, result.dataset_name) == ("3.50 ± 1.50", "BreakoutNoFrameskip-v4")


@pytest.mark.parametrize("token, entity", [("", ""), ("hf_wrong", ""), ("hf_right", "strangers"), ("hf_right", "")])
def test_who_cannot_upload_is_told_so_before_the_first_game(publish, hub, monkeypatch, tmp_path, token, entity):
    """Nobody is logged in, the hub does not know the token, its user may not; the hub is out of reach."""
    monkeypatch.setenv("HF_TOKEN", token)
    if token == "hf_right" and not entity:
        hub.close()
    code, out, err = publish("--hf-entity", entity)
    assert (code, out, len(err.splitlines()), list(tmp_path.iterdir())) == (2, "", 1, [])
    assert err.startswith("error: --upload-model") and "hf auth login" in err


def test_an_upload_that_fails_in_the_end_is_made_up_for_by_resuming_the_run(publish, command_line, hub, tmp_path):
    hub.fault = "/commit/"
    code, out, err = publish()
    (run,) = (tmp_path / "runs").iterdir()
    assert code == 2 and err.splitlines()[-1].startswith("error: --upload-model") and "Traceback" not in err
    assert f"runs/{run.name}: " in out and (run / MODEL).stat().st_size > 1_000_000
    hub.fault = ""
    assert command_line("--resume", f"runs/{run.name}")[0] == 0
    files = hub.commits[f"alice/{NAME}"]
    assert files[MODEL] == (run / MODEL).read_bytes() and b"3.50" in files["README.md"]
    assert not [name for name in files if "checkpoint" in name]

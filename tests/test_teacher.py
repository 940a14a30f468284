"""Where teachers come from: files, a hub over real HTTP, the bundled ones; their buffers; what is uploaded."""

import hashlib
import re
import time
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock, call

import gymnasium as gym
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import PROGRAM, Malicious, refusal, saved
from sb3_contrib import QRDQN, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import (
    Args,
    FrameReplay,
    ImpalaCNN,
    NatureCNN,
    find_teacher,
    load_network,
    pack,
)

PONG, QBERT = "PongNoFrameskip-v4", "QbertNoFrameskip-v4"
TEACHERS = PROGRAM.parent / "teachers"
OBS = torch.randint(
    256, (5, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


@pytest.mark.parametrize("network_class", [NatureCNN, ImpalaCNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loaded_model_is_the_one_that_was_saved(tmp_path, network_class, dtype):
    """Class told from the tensors, Q-values equal, float32 whatever the file has, nothing left to train."""
    network = network_class(6).to(dtype, memory_format=torch.channels_last)
    torch.save(network.state_dict(), tmp_path / "model")
    loaded = load_network(tmp_path / "model", 6, "--teacher")
    assert type(loaded) is network_class
    assert all(
        value.dtype == torch.float32 and not value.requires_grad for value in loaded.parameters()
    )
    with torch.no_grad():
        assert torch.equal(
            loaded(OBS), network.float().to(memory_format=torch.contiguous_format)(OBS)
        )


def sb3(
    path: Path, algorithm=DQN, policy="CnnPolicy", num_actions=4, shape=(84, 84, 4), **policy_kwargs
):
    """A policy of stable-baselines3, whose model it saves to `path` itself."""
    screen = gym.Env()
    screen.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
    screen.action_space = gym.spaces.Discrete(num_actions)
    options = {"buffer_size": 1} if algorithm in (DQN, QRDQN) else {}
    model = algorithm(policy, screen, device="cpu", seed=0, policy_kwargs=policy_kwargs, **options)
    if hasattr(model.policy, "action_net"):
        model.policy.action_net.weight.data *= 300  # or all actions would be as likely at first
    model.save(path)
    return model.policy


@pytest.fixture(scope="module")
def real_obs() -> torch.Tensor:
    """Observations of 8 games of Pong after half a second."""
    games = qdagger.AtariGames(Args(env_id=PONG), np.arange(1, 9))
    for action in range(30):
        games.step_async(np.full(8, action % 6))
        games.step_wait()
    return torch.as_tensor(games.obs)


AGENTS = [
    (DQN, {}),
    (QRDQN, {"n_quantiles": 50}),
    (PPO, {}),
    (PPO, {"share_features_extractor": False}),
    (A2C, {}),
]


@pytest.mark.parametrize("algorithm, options", AGENTS)
def test_a_stable_baselines3_zip_says_what_its_agent_says(tmp_path, real_obs, algorithm, options):
    """Q-values, means of quantiles, log-probabilities, whatever the file is called and the temperature."""
    path, temperature = tmp_path / "a.cleanrl_model", 0.3
    policy = sb3(path, algorithm, num_actions=6, **options)
    network = load_network(path, 6, "--teacher", temperature)
    assert type(network) is NatureCNN
    for obs in (OBS, real_obs):
        with torch.no_grad():
            if algorithm in (PPO, A2C):
                expected = policy.get_distribution(obs).distribution.logits
                actual = torch.log_softmax(network(obs) / temperature, dim=1)
            else:
                expected = (
                    policy.q_net(obs) if algorithm is DQN else policy.quantile_net(obs).mean(dim=1)
                )
                actual = network(obs)
        assert expected.std() > 1e-3 and torch.equal(actual.argmax(1), expected.argmax(1))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


STATE = NatureCNN(4).state_dict()
WHOLE, LAST = saved(STATE), "network.9.bias"


def test_what_is_no_model_is_refused_in_a_line(tmp_path):
    """Cut, empty, another program's or game's, another shape; zips of another game, also one whose quantiles can be
    shared out among our actions, frame size, algorithm or policy, one with as many tensors as a Nature CNN."""
    for num_actions, algorithm in ((6, DQN), (6, PPO), (8, QRDQN)):
        sb3(tmp_path / f"{algorithm.__name__}.zip", algorithm, num_actions=num_actions)
    sb3(tmp_path / "small.zip", shape=(64, 64, 4))
    sb3(tmp_path / "flat.zip", policy="MlpPolicy", shape=(8,), net_arch=[8] * 4)
    sb3(tmp_path / "flat-ppo.zip", PPO, policy="MlpPolicy", shape=(8,))
    sb3(tmp_path / "deep.zip", PPO, net_arch=[512])
    sb3(tmp_path / "recurrent.zip", RecurrentPPO, policy="CnnLstmPolicy", lstm_hidden_size=512)
    contents = [WHOLE[: int(share * len(WHOLE))] for share in (0, 0.001, 0.5, 0.9999)]
    contents += [np.random.default_rng(0).bytes(5000), (tmp_path / "DQN.zip").read_bytes()[:-9]]
    contents += map(saved, ({}, {4: torch.zeros(4, 4)}, NatureCNN(6).state_dict()))
    contents += [
        saved(STATE | {name: wrong})
        for name, wrong in (("network.7.bias", STATE[LAST]), (LAST, [0.0] * 4))
    ]
    for nth, content in enumerate(contents):
        (tmp_path / str(nth)).write_bytes(content)
    for path in [tmp_path, tmp_path / "missing", *tmp_path.iterdir()]:
        message = refusal(load_network, path, 4, "--teacher")
        assert (
            message.startswith(f"--teacher {path}: ")
            and "\n" not in message
            and "weights_only" not in message
        )
        assert path.suffix != ".zip" or "for the 4 actions of --env-id" in message


def test_no_model_ever_runs_code_and_of_a_zip_only_the_policy_is_unpickled(tmp_path):
    path, victim = tmp_path / "model", tmp_path / "victim"
    sb3(tmp_path / "model.zip")
    data, whole = (
        zipfile.ZipFile(tmp_path / "model.zip").read(name) for name in ("data", "policy.pth")
    )
    code = saved(Malicious(victim))

    def load_zip(data: bytes, policy: bytes) -> None:
        with zipfile.ZipFile(path, "w") as target:
            for name, content in {
                "data": data,
                "policy.optimizer.pth": code,
                "policy.pth": policy,
            }.items():
                target.writestr(name, content)
        load_network(path, 4, "--teacher")

    load_zip(data, whole)
    for contents in ((data, code), (code, whole)):
        assert refusal(load_zip, *contents).startswith(f"--teacher {path}: ")
    for content, as_zip in (
        (Malicious(victim), True),
        (STATE | {"note": Malicious(victim)}, False),
    ):
        torch.save(content, path, _use_new_zipfile_serialization=as_zip)
        assert refusal(load_network, path, 4, "--teacher").startswith(f"--teacher {path}: ")
    assert not victim.exists()
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
    assert {path for path in hub.requests if "/api/" not in path} == {
        f"/{repo}/resolve/main/{file}"
    }
    hub.close()
    path, reason = find_teacher(Args(env_id=PONG))
    assert (path.read_bytes(), reason) == (b"new", f"from the cache of the hub, {repo}")


SB3_NAMES = [f"{algorithm}-{PONG}" for algorithm in ("dqn", "qrdqn", "ppo", "a2c")]


def test_repository_and_file_follow_the_flags(hub):
    c51 = {"teacher_model_exp_name": "c51_atari"}
    for flags, place in [
        ({"env_id": QBERT, **c51}, default(QBERT, "c51_atari")),
        (
            {"teacher_policy_hf_repo": "bob/teachers", **c51},
            ("bob/teachers", "c51_atari.cleanrl_model"),
        ),
        ({"env_id": "ALE/Qbert-v5", **c51}, default(QBERT, "c51_atari")),
        *(
            ({"teacher_policy_hf_repo": f"sb3/{name}", **c51}, (f"sb3/{name}", f"{name}.zip"))
            for name in SB3_NAMES
        ),
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
    path, reason = find_teacher(Args(env_id="ALE/Pong-v5" if silent else PONG))
    assert time.perf_counter() - start < 10
    assert (path, reason) == (
        TEACHERS / f"{PONG}.cleanrl_model",
        "bundled: the hub is out of reach",
    )


def test_a_hub_that_knows_no_such_file_is_told_from_one_that_is_too_busy(hub):
    """Its answer is in the line, and neither the bundled teacher of the game nor then the cached one is used; if it is
    asked too often, or has an error of its own, it is as if it were out of reach."""
    for reason in (
        "bundled: the hub is out of reach",
        f"from the cache of the hub, {default(PONG)[0]}",
    ):
        for hub.status in (401, 403, 404):
            message = refusal(find_teacher, Args(env_id=PONG))
            assert (
                message.startswith(f"--teacher-policy-hf-repo {default(PONG)[0]}: ")
                and str(hub.status) in message
            )
        for hub.status in (429, 500, 503):
            assert find_teacher(Args(env_id=PONG))[1] == reason
        hub.files[default(PONG)], hub.status = WHOLE, 0
        assert find_teacher(Args(env_id=PONG))[0].read_bytes() == WHOLE


def test_a_bundled_teacher_is_no_stand_in_for_another(hub):
    """No such name; or the hub is out of reach."""
    message = refusal(find_teacher, Args(env_id=PONG, teacher_policy_hf_repo="with space"))
    assert message.startswith("--teacher-policy-hf-repo with space: ")
    hub.close()
    for repo, env_id in (("bob/pong", PONG), (default(QBERT)[0], QBERT)):
        message = refusal(find_teacher, Args(env_id=env_id, teacher_policy_hf_repo=repo))
        assert message.startswith("--teacher auto: the hub is out of reach") and repo in message


def test_the_bundled_teachers_are_those_of_their_cards_and_of_the_readme_and_can_be_loaded():
    """One for the default game among them, in half precision, with the SHA-256 and the score on the card."""
    bundled, readme = (
        {path.stem: path for path in TEACHERS.glob("*.cleanrl_model")},
        PROGRAM.with_name("README.md"),
    )
    assert Args().env_id in bundled
    for env_id, path in bundled.items():
        card = path.with_suffix(".md").read_text()
        score = re.search(r"^\| score \| (-?[\d.]+ ± [\d.]+)", card, re.MULTILINE)[1]
        assert f"[{score}](teachers/{env_id}.md)" in readme.read_text()
        assert hashlib.sha256(path.read_bytes()).hexdigest() in card
        assert {value.dtype for value in torch.load(path).values()} == {torch.float16}
        load_network(
            path, qdagger.AtariGames(Args(env_id=env_id), np.array([1])).num_actions, "--teacher"
        )


def test_a_damaged_buffer_is_refused_and_never_runs_code(tmp_path):
    """Truncated, incomplete or something else: a line with the flag, and nothing runs."""
    path, victim, replay = tmp_path / "buffer", tmp_path / "victim", FrameReplay(8, 4, 4)
    replay.written += 2
    whole = {"made_with": {"num_envs": 1}, "replay": pack(replay)}
    damaged = [saved(whole)[: int(share * len(saved(whole)))] for share in (0, 0.01, 0.5, 0.9999)]
    damaged += [WHOLE, b"\x00\x01" * 999, saved([1]), saved(Malicious(victim))]
    for name, other in dict(
        actions=None, frames=[torch.zeros(9).byte()], rewards=torch.zeros(7)
    ).items():
        damaged.append(saved(whole | {"replay": whole["replay"] | {name: other}}))
    load = partial(qdagger.load_teacher_buffer, path, whole["made_with"], FrameReplay(8, 4, 4))
    for content in damaged:
        path.write_bytes(content)
        assert refusal(load).startswith(f"--teacher-buffer {path}: "), content[:100]
    path.write_bytes(saved(whole))
    load()
    assert not victim.exists()


UPLOAD = [
    "--num-envs=1",
    "--total-timesteps=28",
    "--offline-steps=0",
    "--network=nature",
    "--batch-size=4",
]
UPLOAD += [
    "--buffer-size=7",
    "--teacher-steps=56",
    "--no-cuda",
    "--save-model",
    "--upload-model",
]  # just enough
NAME = "BreakoutNoFrameskip-v4-qdagger_dqn_atari_impalacnn-seed1"


@pytest.fixture
def api(monkeypatch) -> MagicMock:
    """In place of the hub's client; its `mock_calls` have evaluations as well, whose scores are made up."""
    me = {"name": "me", "orgs": [{"name": "lab"}]}
    api = MagicMock(**{"evaluate.return_value": [2.0, 5.0], "whoami.return_value": me})
    monkeypatch.setattr(qdagger, "evaluate", api.evaluate)
    monkeypatch.setattr(qdagger, "HfApi", lambda: api)
    return api


def test_who_may_upload_is_asked_before_the_first_game_and_the_run_is_published_in_the_end(
    api, command_line, make_model
):
    """Model, event files, and a card with the score; no checkpoint."""
    code, out, _ = command_line(*UPLOAD, "--hf-entity", "lab", "--teacher", make_model(4))
    (run,) = Path("runs").iterdir()
    assert code == 0 and out.splitlines()[-1] == f"{run}: 3.50 ± 1.50 over 2 games"
    calls = ["whoami", "evaluate", "evaluate", "create_repo", "upload_folder"]
    assert [name for name, *_ in api.mock_calls] == calls
    assert api.create_repo.call_args_list == [call(f"lab/{NAME}", exist_ok=True)]
    folder = dict(folder_path=run, ignore_patterns="checkpoint*")
    api.upload_folder.assert_called_with(repo_id=api.create_repo.return_value.repo_id, **folder)
    files = {"qdagger_dqn_atari_impalacnn", "README", "events", "checkpoint"}
    assert {path.name.split(".")[0] for path in run.iterdir()} == files
    load_network(run / "qdagger_dqn_atari_impalacnn.cleanrl_model", 4, "--evaluate")
    (result,) = huggingface_hub.ModelCard((run / "README.md").read_text()).data.eval_results
    assert (result.metric_value, result.dataset_name) == ("3.50 ± 1.50", "BreakoutNoFrameskip-v4")


def test_an_upload_that_fails_in_the_end_is_made_up_for_by_resuming_the_run(
    api, command_line, make_model
):
    api.upload_folder.side_effect = [OSError("a cable"), None]
    code, _, err = command_line(*UPLOAD, "--teacher", make_model(4))
    (run,) = Path("runs").iterdir()
    assert code == 2 and re.fullmatch(r"error: --upload-model.*a cable\)", err.splitlines()[-1])
    assert command_line("--resume", run)[0] == 0 and api.upload_folder.call_count == 2
    assert "3.50" in (run / "README.md").read_text() and api.create_repo.call_args == call(
        NAME, exist_ok=True
    )


@pytest.mark.parametrize("status", [401, 403, 0])
def test_who_cannot_upload_is_told_so_before_the_first_game(
    command_line, hub, monkeypatch, tmp_path, status
):
    """The hub does not know the token, its user may not, the hub is out of reach."""
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    hub.status = status
    if not status:
        hub.close()
    code, out, err = command_line(*UPLOAD)
    assert (code, out, len(err.splitlines()), list(tmp_path.iterdir())) == (2, "", 1, [])
    assert err.startswith("error: --upload-model") and "hf auth login" in err

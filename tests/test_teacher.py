"""Where teachers come from: files, a hub over real HTTP, the bundled ones.

Also the file of the teacher's buffer, and what a run uploads.
"""

import hashlib
import re
import time
import zipfile
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
    AtariGames,
    FrameReplay,
    ImpalaCNN,
    NatureCNN,
    find_teacher,
    load_network,
    load_teacher_buffer,
    pack,
)

PONG = "PongNoFrameskip-v4"
QBERT = "QbertNoFrameskip-v4"
TEACHERS = PROGRAM.parent / "teachers"
OBS = torch.randint(
    256, (5, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


# --- Models ---


@pytest.mark.parametrize("network_class", [NatureCNN, ImpalaCNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loaded_model_is_the_one_that_was_saved(tmp_path, network_class, dtype):
    """Its class is told from the tensors, and its Q-values are equal.

    It is float32 whatever the file has, and nothing in it is left to train.
    """
    network = network_class(6).to(dtype, memory_format=torch.channels_last)
    torch.save(network.state_dict(), tmp_path / "model")

    loaded = load_network(tmp_path / "model", 6, "--teacher")

    assert type(loaded) is network_class
    for value in loaded.parameters():
        assert value.dtype == torch.float32
        assert not value.requires_grad
    network = network.float().to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        assert torch.equal(loaded(OBS), network(OBS))


def sb3(
    path: Path, algorithm=DQN, policy="CnnPolicy", num_actions=4, shape=(84, 84, 4), **policy_kwargs
):
    """A policy of stable-baselines3, whose model it saves to `path` itself."""
    env = gym.Env()
    env.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
    env.action_space = gym.spaces.Discrete(num_actions)

    options = {}
    if algorithm in (DQN, QRDQN):
        options["buffer_size"] = 1
    model = algorithm(policy, env, device="cpu", seed=0, policy_kwargs=policy_kwargs, **options)
    if hasattr(model.policy, "action_net"):
        model.policy.action_net.weight.data *= 300  # or all actions would be as likely at first
    model.save(path)
    return model.policy


@pytest.fixture(scope="module")
def real_obs() -> torch.Tensor:
    """Observations of 8 games of Pong after half a second."""
    games = AtariGames(Args(env_id=PONG), np.arange(1, 9))
    for step in range(30):
        games.step_async(np.full(8, step % 6))
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
    """Q-values, means of quantiles, or log-probabilities.

    Neither the name of the file nor the temperature makes a difference.
    """
    path = tmp_path / "a.cleanrl_model"
    temperature = 0.3
    policy = sb3(path, algorithm, num_actions=6, **options)

    network = load_network(path, 6, "--teacher", temperature)

    assert type(network) is NatureCNN
    for obs in (OBS, real_obs):
        with torch.no_grad():
            actual = network(obs)
            if algorithm is DQN:
                expected = policy.q_net(obs)
            elif algorithm is QRDQN:
                expected = policy.quantile_net(obs).mean(dim=1)
            else:
                expected = policy.get_distribution(obs).distribution.logits
                actual = torch.log_softmax(actual / temperature, dim=1)
        assert expected.std() > 1e-3
        assert torch.equal(actual.argmax(1), expected.argmax(1))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


STATE = NatureCNN(4).state_dict()
MODEL = saved(STATE)
LAST_BIAS = "network.9.bias"


def cut(content: bytes, *shares: float) -> list[bytes]:
    """What is left of a file of which only such a share was written."""
    return [content[: int(share * len(content))] for share in shares]


def test_what_is_no_model_is_refused_in_a_line(tmp_path):
    # Zips of another game. Eight actions' quantiles could be shared out among our four.
    sb3(tmp_path / "DQN.zip", DQN, num_actions=6)
    sb3(tmp_path / "PPO.zip", PPO, num_actions=6)
    sb3(tmp_path / "QRDQN.zip", QRDQN, num_actions=8)
    # Another size of frames, other policies, another algorithm.
    sb3(tmp_path / "small.zip", shape=(64, 64, 4))
    # It has as many tensors as a Nature CNN.
    sb3(tmp_path / "flat.zip", policy="MlpPolicy", shape=(8,), net_arch=[8] * 4)
    sb3(tmp_path / "flat-ppo.zip", PPO, policy="MlpPolicy", shape=(8,))
    sb3(tmp_path / "deep.zip", PPO, net_arch=[512])
    sb3(tmp_path / "recurrent.zip", RecurrentPPO, policy="CnnLstmPolicy", lstm_hidden_size=512)

    contents = [
        *cut(MODEL, 0, 0.001, 0.5, 0.9999),
        np.random.default_rng(0).bytes(5000),
        (tmp_path / "DQN.zip").read_bytes()[:-9],
        saved({}),
        saved({4: torch.zeros(4, 4)}),
        saved(NatureCNN(6).state_dict()),
        saved(STATE | {"network.7.bias": STATE[LAST_BIAS]}),
        saved(STATE | {LAST_BIAS: [0.0] * 4}),
    ]
    for nth, content in enumerate(contents):
        (tmp_path / str(nth)).write_bytes(content)

    for path in [tmp_path, tmp_path / "missing", *tmp_path.iterdir()]:
        message = refusal(load_network, path, 4, "--teacher")
        assert message.startswith(f"--teacher {path}: ")
        assert "\n" not in message
        assert "weights_only" not in message  # torch's advice to let a file run code
        if path.suffix == ".zip":
            assert "for the 4 actions of --env-id" in message


def test_no_model_ever_runs_code_and_of_a_zip_only_the_policy_is_unpickled(tmp_path):
    victim = tmp_path / "victim"
    code = saved(Malicious(victim))
    path = tmp_path / "model"

    sb3(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        data = file.read("data")
        policy = file.read("policy.pth")

    def load_zip(data: bytes, policy: bytes) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("data", data)
            file.writestr("policy.optimizer.pth", code)
            file.writestr("policy.pth", policy)
        load_network(path, 4, "--teacher")

    load_zip(data, policy)
    assert refusal(load_zip, data, code).startswith(f"--teacher {path}: ")
    assert refusal(load_zip, code, policy).startswith(f"--teacher {path}: ")

    torch.save(Malicious(victim), path)
    assert refusal(load_network, path, 4, "--teacher").startswith(f"--teacher {path}: ")

    malicious_state = STATE | {"note": Malicious(victim)}
    torch.save(malicious_state, path, _use_new_zipfile_serialization=False)
    assert refusal(load_network, path, 4, "--teacher").startswith(f"--teacher {path}: ")

    assert not victim.exists()
    torch.load(path, weights_only=False)  # it would have worked
    assert victim.exists()


# --- The hub, its cache, and the bundled teachers ---


def default(env_id: str, exp_name: str = "dqn_atari") -> tuple[str, str]:
    """Repository and file of the default teacher."""
    return f"cleanrl/{env_id}-{exp_name}-seed1", f"{exp_name}.cleanrl_model"


PONG_REPO, PONG_FILE = default(PONG)
BUNDLED = "bundled; the hub is out of reach: "


def test_the_default_teacher_comes_from_the_hub_and_then_from_its_cache(hub):
    """Always the hub's newest; when nobody listens, the one that came last."""
    for content in (b"old", b"new"):
        hub.files[PONG_REPO, PONG_FILE] = content
        hub.commit_hash = content.hex().ljust(40, "0")
        path, reason = find_teacher(Args(env_id=PONG))
        assert path.read_bytes() == content
        assert reason == f"from the hub, {PONG_REPO}@{hub.commit_hash}"
    asked_for = {path for path in hub.requests if "/api/" not in path}
    assert asked_for == {f"/{PONG_REPO}/resolve/main/{PONG_FILE}"}

    hub.close()
    path, reason = find_teacher(Args(env_id=PONG))
    assert path.read_bytes() == b"new"
    origin = f"from the cache of the hub, {PONG_REPO}@{hub.commit_hash}; "
    assert reason.startswith(origin + "the hub is out of reach: ")


def test_repository_and_file_follow_the_flags(hub):
    def check(repo: str, file: str, **flags) -> None:
        content = f"{file} of {repo}".encode()
        hub.files[repo, file] = content
        path, _ = find_teacher(Args(teacher_model_exp_name="c51_atari", **flags))
        assert path.read_bytes() == content

    check(*default(QBERT, "c51_atari"), env_id=QBERT)
    check("bob/teachers", "c51_atari.cleanrl_model", teacher_policy_hf_repo="bob/teachers")
    check(*default(QBERT, "c51_atari"), env_id="ALE/Qbert-v5")
    for algorithm in ("dqn", "qrdqn", "ppo", "a2c", "PPO"):
        name = f"{algorithm}-{PONG}"
        check(f"sb3/{name}", f"{name}.zip", teacher_policy_hf_repo=f"sb3/{name}")

    revision = "bob/teachers@v2"
    hub.commit_hash = b"v2".hex().ljust(40, "0")
    check(revision, "c51_atari.cleanrl_model", teacher_policy_hf_repo=revision)

    hub.requests.clear()
    path, _ = find_teacher(Args(teacher="some/where"))
    assert path == Path("some/where")
    assert not hub.requests


@pytest.mark.parametrize("silent, why", [(False, "Connection refused"), (True, "timed out")])
def test_out_of_reach_the_bundled_teacher_teaches_within_ten_seconds(hub, silent, why):
    """Nobody listens, or a hub that listens never answers; the line says which."""
    if silent:
        hub.silent = True
        env_id = "ALE/Pong-v5"
    else:
        hub.close()
        env_id = PONG

    start = time.perf_counter()
    path, reason = find_teacher(Args(env_id=env_id))

    assert time.perf_counter() - start < 10
    assert path == TEACHERS / f"{PONG}.cleanrl_model"
    assert reason.startswith(BUNDLED)
    assert why in reason


def test_a_hub_that_knows_no_such_file_is_told_from_one_that_is_too_busy(hub):
    """Its refusal is in the line as it says it, and no other teacher stands in, bundled or cached.

    A hub that is asked too often, or has an error of its own, is as good as out of reach.
    """
    args = Args(env_id=PONG)

    def check(teacher_if_busy: str) -> None:
        for status in (401, 403, 404):
            hub.status = status
            message = refusal(find_teacher, args)
            assert message.startswith(f"--teacher-policy-hf-repo {PONG_REPO}: ")
            assert str(status) in message
        for status in (429, 500, 503):
            hub.status = status
            _, reason = find_teacher(args)
            assert reason.startswith(teacher_if_busy)
            assert str(status) in reason

    def download() -> None:
        hub.status = 0
        hub.files[PONG_REPO, PONG_FILE] = MODEL
        path, _ = find_teacher(args)
        assert path.read_bytes() == MODEL

    check(BUNDLED)
    download()
    check(f"from the cache of the hub, {PONG_REPO}@")
    download()


def test_a_bundled_teacher_is_no_stand_in_for_another(hub):
    """For a repository that cannot be; or for one of others, or of another game, out of reach."""
    message = refusal(find_teacher, Args(env_id=PONG, teacher_policy_hf_repo="with space"))
    assert message.startswith("--teacher-policy-hf-repo with space: ")

    hub.close()
    qbert_repo, _ = default(QBERT)
    for repo, env_id in (("bob/pong", PONG), (qbert_repo, QBERT)):
        message = refusal(find_teacher, Args(env_id=env_id, teacher_policy_hf_repo=repo))
        assert message.startswith(f"--teacher auto: {repo} is not in the cache, and the hub is ")
        assert "Connection refused" in message


def test_the_bundled_teachers_are_those_of_their_cards_and_of_the_docs_and_can_be_loaded():
    """In half precision, with the SHA-256 and the score of the card.

    There is one for the default game among them.
    """
    bundled = list(TEACHERS.glob("*.cleanrl_model"))
    page = (PROGRAM.parent / "docs" / "teachers.md").read_text()
    assert Args().env_id in [path.stem for path in bundled]

    for path in bundled:
        env_id = path.stem
        card = path.with_suffix(".md").read_text()
        score = re.search(r"^\| score \| (-?[\d.]+ ± [\d.]+)", card, re.MULTILINE)[1]
        assert f"[{score}](../teachers/{env_id}.md)" in page
        assert hashlib.sha256(path.read_bytes()).hexdigest() in card

        dtypes = {value.dtype for value in torch.load(path).values()}
        assert dtypes == {torch.float16}
        games = AtariGames(Args(env_id=env_id), np.array([1]))
        load_network(path, games.num_actions, "--teacher")


# --- The file of the teacher's buffer ---


def test_a_damaged_buffer_is_refused_and_never_runs_code(tmp_path):
    path = tmp_path / "buffer"
    victim = tmp_path / "victim"
    made_with = {"num_envs": 1}
    replay = FrameReplay(8, 4, 4)
    replay.set_written(2)
    packed = pack(replay)
    whole = saved({"made_with": made_with, "replay": packed})

    def with_another(**part) -> bytes:
        return saved({"made_with": made_with, "replay": packed | part})

    damaged = [
        *cut(whole, 0, 0.01, 0.5, 0.9999),
        MODEL,
        b"\x00\x01" * 999,
        saved([1]),
        saved(Malicious(victim)),
        with_another(actions=None),
        with_another(frames=[torch.zeros(9).byte()]),
        with_another(rewards=torch.zeros(7)),
    ]

    target = FrameReplay(8, 4, 4)
    for content in damaged:
        path.write_bytes(content)
        message = refusal(load_teacher_buffer, path, made_with, target)
        assert message.startswith(f"--teacher-buffer {path}: "), content[:100]
    path.write_bytes(whole)
    load_teacher_buffer(path, made_with, target)
    assert not victim.exists()


# --- Uploads ---

UPLOAD = [  # as little as a run can do
    "--num-envs=1",
    "--total-timesteps=28",
    "--learning-starts=8",
    "--offline-steps=0",
    "--network=nature",
    "--batch-size=4",
    "--buffer-size=14",
    "--no-cuda",
    "--save-model",
    "--upload-model",
]
NAME = "BreakoutNoFrameskip-v4-qdagger_dqn_atari_impalacnn-seed1"


@pytest.fixture
def api(monkeypatch) -> MagicMock:
    """In place of the hub's client.

    Its `mock_calls` have evaluations as well, whose scores are made up.
    """
    api = MagicMock()
    api.whoami.return_value = {"name": "me", "orgs": [{"name": "lab"}]}
    api.evaluate.return_value = [2.0, 5.0]
    monkeypatch.setattr(qdagger, "evaluate", api.evaluate)
    monkeypatch.setattr(qdagger, "HfApi", lambda: api)
    return api


def test_who_may_upload_is_asked_before_the_first_game_and_the_run_is_published_in_the_end(
    api, command_line, make_model
):
    """Published are the model, event files, and a card with the score, but no checkpoint."""
    code, out, _ = command_line(*UPLOAD, "--hf-entity", "lab", "--teacher", make_model(4))

    (run,) = Path("runs").iterdir()
    assert code == 0
    result = f"{run}: 3.50 ± 1.50 over 2 games; best evaluation: 3.50 at step 28"
    assert out.splitlines()[-1] == result
    calls = [name for name, _, _ in api.mock_calls]
    assert calls == ["whoami", "evaluate", "evaluate", "create_repo", "upload_folder"]
    assert api.create_repo.call_args_list == [call(f"lab/{NAME}", exist_ok=True)]
    api.upload_folder.assert_called_with(
        repo_id=api.create_repo.return_value.repo_id,
        folder_path=run,
        ignore_patterns=["checkpoint*", "lock", "*.part"],
    )

    files = {path.name.split(".")[0] for path in run.iterdir()}
    assert files == {"qdagger_dqn_atari_impalacnn", "README", "events", "checkpoint", "lock"}
    load_network(run / "qdagger_dqn_atari_impalacnn.cleanrl_model", 4, "--evaluate")
    card = huggingface_hub.ModelCard((run / "README.md").read_text())
    (result,) = card.data.eval_results
    assert result.metric_value == "3.50 ± 1.50"
    assert result.dataset_name == "BreakoutNoFrameskip-v4"


def test_an_upload_that_fails_in_the_end_is_made_up_for_by_resuming_the_run(
    api, command_line, make_model
):
    api.upload_folder.side_effect = [OSError("a cable"), None]

    code, _, err = command_line(*UPLOAD, "--teacher", make_model(4))
    assert code == 2
    assert re.fullmatch(r"error: --upload-model.*a cable\)", err.splitlines()[-1])

    (run,) = Path("runs").iterdir()
    code, _, _ = command_line("--resume", run)
    assert code == 0
    assert api.upload_folder.call_count == 2
    assert "3.50" in (run / "README.md").read_text()
    assert api.create_repo.call_args == call(NAME, exist_ok=True)


@pytest.mark.parametrize("status", [401, 403, 0])
def test_who_cannot_upload_is_told_so_before_the_first_game(
    command_line, hub, monkeypatch, tmp_path, status
):
    """The hub does not know the token, its user may not, the hub is out of reach."""
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    if status == 0:
        hub.close()
    else:
        hub.status = status

    code, out, err = command_line(*UPLOAD)

    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: --upload-model")
    assert "hf auth login" in err
    assert list(tmp_path.iterdir()) == []

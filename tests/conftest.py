"""What several tests share: models made here, points as TensorBoard shows them, the program as a subprocess, a hub."""

import base64
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import qdagger_dqn_atari_impalacnn as qdagger

# One thread each: on a busy machine, threads that wait for one another make small runs a hundred times slower.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

PROGRAM = Path(qdagger.__file__).resolve()


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def refusal(refused, *args, **options) -> str:
    """The message of the UserError that `refused(*args, **options)` raises; always one line."""
    with pytest.raises(qdagger.UserError) as error:
        refused(*args, **options)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and len(message) < 500
    return message


def points(run: Path) -> dict[str, list]:
    """Every (step, value) of every tag as TensorBoard shows it, without what was logged again; but not the speed."""
    files = {path: [int(part) for part in path.name.split(".") if part.isdigit()] for path in run.glob("events.*")}
    with TemporaryDirectory() as directory:  # in order: names of one second are not
        for nth, path in enumerate(sorted(files, key=files.get)):
            shutil.copy(path, Path(directory, f"{nth:03}.tfevents"))
        events = EventAccumulator(directory, size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: shown for tag in tags if (shown := [(event.step, event.value) for event in events.Scalars(tag)])}


class Malicious:
    """Unpickling this by the book writes a file."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.write_text, (self.victim, "was here")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """make_model(num_actions, network="nature", action=None): an untrained model on disk, fond of `action`."""

    def make(num_actions: int, network: str = "nature", action: int | None = None) -> Path:
        torch.manual_seed(num_actions)
        model = qdagger.NETWORKS[network](num_actions)
        if action is not None:
            model.network[-1].bias.data[action] += 5
        path = tmp_path_factory.mktemp("models") / f"{network}.cleanrl_model"
        torch.save(model.state_dict(), path)
        return path

    return make


@pytest.fixture
def command_line(tmp_path, monkeypatch, capfd):
    """command_line(*flags): exit code, stdout and stderr of `main`, which begins in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*flags) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, flags)])
        try:
            code = qdagger.main() or 0
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as downloads and uploads need, over HTTP on the loopback interface.

    `files` maps (repository, file name) to content, `repos` are those that were created, `commits` the files that each
    was sent, by alice of the organisation lab with token hf_right. `fault` makes it answer `status` to a request whose
    path contains that word; as long as they are True, `break_off` makes it hang up halfway through each content, and
    `silent` say nothing at all.
    """

    listener, port = None, 0

    @classmethod
    def reset(cls) -> None:
        cls.files, cls.requests, cls.repos, cls.commits, cls.commit_hash = {}, [], [], {}, "c0ffee" * 6 + "c0ff"
        cls.fault, cls.status, cls.break_off, cls.silent = "", 500, False, False
        if not cls.listener:
            cls.listener = ThreadingHTTPServer(("127.0.0.1", cls.port), cls)
            cls.port = cls.listener.server_port
            threading.Thread(target=cls.listener.serve_forever, args=(0.05,), daemon=True).start()

    @classmethod
    def close(cls) -> None:
        """From now on nobody listens at the port."""
        cls.listener.shutdown()
        cls.listener.server_close()
        cls.listener = None

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.break_off else content)

    def respond(self) -> None:
        self.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        while self.silent:
            threading.Event().wait(0.05)
        if self.fault and self.fault in self.path:
            return self.answer(self.status)
        if self.command == "POST":
            return self.receive([json.loads(line) for line in body.splitlines()])
        repo, _, file = self.path.removeprefix("/").partition("/resolve/")
        content = self.files.get((repo, file.partition("/")[2]))
        if content is None:
            missing = "Entry" if repo in {of_repo for of_repo, _ in self.files} else "Repo"
            return self.answer(404, X_Error_Code=f"{missing}NotFound")
        self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=self.commit_hash)

    do_HEAD = do_GET = do_POST = respond

    def receive(self, lines: list[dict]) -> None:
        url, answer = f"http://127.0.0.1:{self.port}", {}
        if self.path != "/api/validate-yaml" and self.headers["Authorization"] != "Bearer hf_right":
            return self.answer(401)
        if self.path == "/api/repos/create":
            owner = lines[0]["organization"] or "alice"
            if owner not in ("alice", "lab"):
                return self.answer(403)
            self.repos.append(f"{owner}/{lines[0]['name']}")
            answer = {"url": f"{url}/{self.repos[-1]}"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in lines[0]["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in self.path:
            repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.commits[repo] = {file["path"]: base64.b64decode(file["content"]) for file in files}
            answer = {"commitUrl": f"{url}/{repo}/commit/1", "commitOid": self.commit_hash}
        self.answer(200, json.dumps(answer).encode())


# No test asks the real hub, or is logged in there. Where the hub is, is settled when huggingface_hub is imported.
Hub.reset()
HUB_HOME = TemporaryDirectory()
for variable in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
    del os.environ[variable]
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{Hub.port}", "HF_HOME": HUB_HOME.name, "no_proxy": "127.0.0.1"}
os.environ["HF_HUB_DISABLE_XET"] = "1"


@pytest.fixture
def hub():
    """The hub, empty and without faults; its cache is empty, and nobody is logged in."""
    shutil.rmtree(Path(HUB_HOME.name, "hub"), ignore_errors=True)
    Hub.reset()
    yield Hub
    Hub.reset()

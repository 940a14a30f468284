"""What several tests share: teachers made here, the program as a subprocess, and a hub on this machine."""

import base64
import hashlib
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import qdagger_dqn_atari_impalacnn as qdagger

# One thread each: on a busy machine, threads that wait for one another make small runs a hundred times slower.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

PROGRAM = Path(inspect.getsourcefile(qdagger)).resolve()


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def refusal(refused, *args) -> str:
    """The message of the UserError that `refused(*args)` raises; always one line."""
    with pytest.raises(qdagger.UserError) as error:
        refused(*args)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and len(message) < 400
    return message


def points(run: Path) -> dict[str, list]:
    """Every (step, value) of every tag in the event files, but for the measured speed."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    tags = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


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


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, less whoever is logged in at the hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
    return kept | changes


@pytest.fixture(scope="session")
def run_program():
    """run_program(*flags, cwd): the program from the command line, to its end."""

    def run(*flags, cwd: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, PROGRAM, *map(str, flags)]
        return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=200)

    return run


class Hub:
    """As much of the hub's protocol as downloads, log-ins and commits need, over HTTP on the loopback interface.

    `files` maps (repository, file name) to content; what is missing is answered like the hub does. `fault` makes it
    answer `status` to a request whose path contains that word; `break_off` makes it hang up halfway through each
    content, `stall` fall silent there, `silent` say nothing at all, as long as they are True.
    """

    commit_hash = "c0ffee" * 6 + "c0ff"

    def __init__(self):
        self.port = 0
        self.reset()
        self.start()

    def reset(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.commits: dict[str, dict[str, bytes]] = {}
        self.fault, self.status, self.break_off, self.stall, self.silent = "", 500, False, False, False

    def start(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Handler", (HubHandler,), {"hub": self}))
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """From now on nobody listens at the port."""
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class HubHandler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2])
            while self.hub.stall:
                time.sleep(0.05)
            if not self.hub.break_off:
                self.wfile.write(content[len(content) // 2 :])

    def do_HEAD(self) -> None:
        self.hub.requests.append((self.command, self.path))
        while self.hub.silent:
            time.sleep(0.05)
        if self.hub.fault and self.hub.fault in self.path:
            return self.answer(self.hub.status)
        if self.path == "/api/whoami-v2":
            if self.headers["Authorization"] != "Bearer hf_right":
                return self.answer(401)
            return self.answer(200, json.dumps({"type": "user", "name": "alice", "orgs": [{"name": "lab"}]}).encode())
        repo, _, file = self.path.removeprefix("/").partition("/resolve/")
        if repo not in {of_repo for of_repo, _ in self.hub.files}:
            return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        content = self.hub.files.get((repo, file.partition("/")[2]))
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=self.hub.commit_hash)

    do_GET = do_HEAD

    def do_POST(self) -> None:
        self.hub.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.fault and self.hub.fault in self.path:
            return self.answer(self.hub.status)
        answer = {}
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            answer = {"url": f"{self.hub.url}/{asked['organization']}/{asked['name']}"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in self.path:
            repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            lines = [json.loads(line) for line in body.splitlines()]
            contents = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
            self.hub.commits[repo] = {name: base64.b64decode(content) for name, content in contents.items()}
            answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/1", "commitOid": self.hub.commit_hash}
        self.answer(200, json.dumps(answer).encode())


@pytest.fixture(scope="session")
def hub_server():
    with closing(Hub()) as hub:
        yield hub


@pytest.fixture
def hub(hub_server):
    """The hub, empty and without faults."""
    hub_server.reset()
    return hub_server


# Where the hub is and what is cached are settled when huggingface_hub is imported: hence a process of its own, which
# is asked one thing per line.
CLIENT = """
import contextlib, io, json, os, sys, time
import qdagger_dqn_atari_impalacnn as qdagger

time.sleep = lambda seconds: None  # the hub's client waits longer and longer before it tries again
answers = sys.stdout
for line in sys.stdin:
    asked = json.loads(line)
    out, err, answer = io.StringIO(), io.StringIO(), {}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if "find_teacher" in asked:
                path, answer["reason"] = qdagger.find_teacher(qdagger.Args(**asked["find_teacher"]))
                answer["path"] = str(path)
            else:
                os.environ.pop("HF_TOKEN", None)
                os.environ.update(asked["environment"])
                os.chdir(asked["cwd"])
                sys.argv = ["program", *asked["main"]]
                qdagger.main()
                answer["code"] = 0
        except SystemExit as stop:
            answer["code"] = stop.code
        except BaseException as error:
            answer["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(answer | {"out": out.getvalue(), "err": err.getvalue()}), file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def hub_client(hub_server, tmp_path_factory):
    """A copy of the program whose hub is `hub_server`; ask(find_teacher={...}) or ask(main=[flags], cwd=...).

    It has its own empty cache, nobody is logged in; its teachers/ holds a file for Pong, and a damaged one for Qbert.
    """
    home = tmp_path_factory.mktemp("hub_client")
    shutil.copy(PROGRAM, home)
    (home / "teachers").mkdir()
    for env_id, summed in {"PongNoFrameskip-v4": b"bundled", "QbertNoFrameskip-v4": b"what it was"}.items():
        (home / "teachers" / f"{env_id}.cleanrl_model").write_bytes(b"bundled")
        (home / "teachers" / f"{env_id}.md").write_text(f"SHA-256 `{hashlib.sha256(summed).hexdigest()}`")
    of_hub = {"HF_ENDPOINT": hub_server.url, "HF_HOME": str(home / "cache"), "HF_HUB_DISABLE_XET": "1"}
    of_hub["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"  # seconds without a byte, instead of 10
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        cwd=home,
        env=environment(PYTHONPATH=str(home), no_proxy="127.0.0.1", **of_hub),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(cwd: Path = home, environment=(), **question) -> dict:
        print(
            json.dumps({"cwd": str(cwd), "environment": dict(environment), **question}), file=process.stdin, flush=True
        )
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    assert process.wait(timeout=20) == 0

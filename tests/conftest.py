"""What several tests share: models made here, points as TensorBoard shows them, the program as a subprocess, a hub."""

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
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
    files = {
        path: [int(part) for part in path.name.split(".") if part.isdigit()]
        for path in run.glob("events.*")
    }
    with TemporaryDirectory() as directory:  # in order: names of one second are not
        for nth, path in enumerate(sorted(files, key=files.get)):
            shutil.copy(path, Path(directory, f"{nth:03}.tfevents"))
        events = EventAccumulator(directory, size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {
        tag: shown
        for tag in tags
        if (shown := [(event.step, event.value) for event in events.Scalars(tag)])
    }


def interrupted(
    command: list, checkpoint: str, numbers, directory: Path, pause=lambda: 0.0
) -> Path:
    """The run that a program leaves in `directory`: each signal ends it, as from a terminal, `pause()` seconds
    after it wrote `checkpoint`; it goes on with the command that it printed, at last for 200 steps."""
    streams = dict(
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=directory,
    )

    def last_checkpoint() -> int:
        return max(
            (path.stat().st_mtime_ns for path in directory.glob(f"runs/*/{checkpoint}")), default=0
        )

    for number in numbers:
        before, process = last_checkpoint(), subprocess.Popen([sys.executable, *command], **streams)
        while process.poll() is None and last_checkpoint() <= before:
            time.sleep(0.02)
        time.sleep(pause())
        os.killpg(process.pid, number)
        output = process.communicate(timeout=100)[0]
        assert (
            process.returncode == (-9 if number == 9 else 128 + number)
            and "Traceback" not in output
        ), output
        if number != 9:
            command = shlex.split(output.partition("go on with: python ")[2].splitlines()[0])
    subprocess.run(
        [sys.executable, *command, "--total-timesteps", "200"], cwd=directory, check=True
    )
    (run,) = directory.glob("runs/*")
    return run


class Malicious:
    """Unpickling this by the book writes a file."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.write_text, (self.victim, "was here")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """make_model(num_actions, action=None): an untrained Nature CNN on disk, fond of `action`."""

    def make(num_actions: int, action: int | None = None) -> Path:
        torch.manual_seed(num_actions)
        model, path = (
            qdagger.NETWORKS["nature"](num_actions),
            tmp_path_factory.mktemp("models") / "model",
        )
        if action is not None:
            model.network[-1].bias.data[action] += 5
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


# No test asks the real hub, or is logged in there, which is settled when huggingface_hub is imported.
HUB_HOME = TemporaryDirectory()
for variable in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
    del os.environ[variable]
os.environ |= {
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HOME": HUB_HOME.name,
    "HF_HUB_DISABLE_XET": "1",
}
os.environ["no_proxy"] = "127.0.0.1"


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub's protocol as downloads need."""

    def log_message(self, *_) -> None:
        pass

    def respond(self) -> None:
        hub = self.server
        hub.requests.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        while hub.silent:
            threading.Event().wait(0.05)
        content = (
            b"" if hub.status else hub.files.get(tuple(self.path[1:].split("/resolve/main/")), b"")
        )
        self.send_response(hub.status or (200 if content else 404))
        headers = {
            "X-Error-Code": "" if content or hub.status else "EntryNotFound",
            "Content-Length": len(content),
        }
        for name, value in (
            headers | {"X-Repo-Commit": hub.commit_hash, "ETag": hash(content)}
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET = do_POST = respond


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """The hub over HTTP on the loopback interface, empty as its cache. `files` maps (repository, name) to content. If
    `status` is set that is its answer to everything; while `silent` it gives none; after `close` nobody listens."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    hub.files, hub.requests, hub.commit_hash, hub.status, hub.silent = (
        {},
        [],
        "c0ffee" * 6 + "c0ff",
        0,
        False,
    )
    hub.close = lambda: (hub.shutdown(), hub.server_close())
    url, constants = f"http://127.0.0.1:{hub.server_port}", "huggingface_hub.constants."
    monkeypatch.setattr(constants + "ENDPOINT", url)
    monkeypatch.setattr(
        constants + "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    yield hub
    hub.silent = False
    hub.close()

"""What several tests share: models, points as TensorBoard shows them, the program run, a hub."""

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

# One thread each: on a busy machine, threads that wait for one another make small runs a hundred
# times slower.
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
    assert len(message.splitlines()) == 1
    assert len(message) < 500
    return message


def tensors_of(replay: qdagger.FrameReplay) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(replay).items() if torch.is_tensor(value)}


def event_file_order(path: Path) -> list[int]:
    """The numbers in its name: when it was made, by which process, and which file of that."""
    return [int(part) for part in path.name.split(".") if part.isdigit()]


def points(run: Path) -> dict[str, list]:
    """Every (step, value) of every tag as TensorBoard shows it, but for the speed.

    What was logged again is left out.
    """
    files = sorted(run.glob("events.*"), key=event_file_order)
    with TemporaryDirectory() as directory:
        # TensorBoard reads files by name, which is not in order if they are of the same second.
        for number, path in enumerate(files):
            shutil.copy(path, Path(directory, f"{number:03}.tfevents"))
        events = EventAccumulator(directory, size_guidance={"scalars": 0}).Reload()

    shown = {}
    for tag in events.Tags()["scalars"]:
        scalars = [(event.step, event.value) for event in events.Scalars(tag)]
        if scalars and tag != "charts/SPS":
            shown[tag] = scalars
    return shown


def no_pause() -> float:
    return 0.0


def interrupted(command: list, checkpoint: str, numbers, directory: Path, pause=no_pause) -> Path:
    """The run that a program leaves in `directory` if signals of these numbers end it, one by one.

    Each comes as from a terminal, `pause()` seconds after the program wrote `checkpoint`. Then it
    goes on with the command that it printed, and the last time it goes on for 200 steps.
    """

    def last_checkpoint() -> int:
        times = [path.stat().st_mtime_ns for path in directory.glob(f"runs/*/{checkpoint}")]
        return max(times, default=0)

    for number in numbers:
        before = last_checkpoint()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=directory,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while process.poll() is None and last_checkpoint() <= before:
            time.sleep(0.02)
        time.sleep(pause())
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=100)

        assert "Traceback" not in output, output
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL, output
        else:
            assert process.returncode == 128 + number, output
            _, _, rest = output.partition("go on with: python ")
            command = shlex.split(rest.splitlines()[0])

    last_command = [sys.executable, *command, "--total-timesteps", "200"]
    subprocess.run(last_command, cwd=directory, check=True)
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
        model = qdagger.NETWORKS["nature"](num_actions)
        if action is not None:
            model.network[-1].bias.data[action] += 5
        path = tmp_path_factory.mktemp("models") / "model"
        torch.save(model.state_dict(), path)
        return path

    return make


@pytest.fixture
def command_line(tmp_path, monkeypatch, capfd):
    """command_line(*flags): exit code, stdout and stderr of `main`, begun in an empty directory."""

    def keep_handlers(*_) -> None:
        """Signals are for pytest, not for `main`."""

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", keep_handlers)

    def run(*flags) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, flags)])
        try:
            qdagger.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, out, err

    return run


# No test asks the real hub, or is logged in there. That must be settled before huggingface_hub is
# imported.
HUB_HOME = TemporaryDirectory()
for variable in list(os.environ):
    if variable.startswith(("HF_", "HUGGING_FACE_")):
        del os.environ[variable]
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HOME"] = HUB_HOME.name
os.environ["HF_HUB_DISABLE_XET"] = "1"
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
            time.sleep(0.05)

        repository, _, place = self.path[1:].partition("/resolve/")
        revision, _, name = place.partition("/")
        if revision != "main":
            repository += f"@{revision}"
        content = b""
        problem = ""
        if hub.status != 0:
            status = hub.status
        elif (repository, name) in hub.files:
            status = 200
            content = hub.files[repository, name]
        else:
            status = 404
            problem = "EntryNotFound"

        if hub.shows_a_login:
            status = 200
            content = b"<html>Log in</html>"
        self.send_response(status)
        if not hub.shows_a_login:
            self.send_header("X-Error-Code", problem)
            self.send_header("X-Repo-Commit", hub.commit_hash)
            self.send_header("ETag", str(hash(content)))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = respond
    do_HEAD = respond
    do_POST = respond


class Hub(ThreadingHTTPServer):
    """The hub over HTTP on the loopback interface."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        # By repository, @REVISION if it is not the newest, and name.
        self.files: dict[tuple[str, str], bytes] = {}
        self.requests: list[str] = []  # paths
        self.commit_hash = "c0ffee" * 6 + "c0ff"
        self.status = 0  # the answer to everything, unless it is 0
        self.silent = False  # while True, it gives no answer
        self.shows_a_login = False  # a page of a hotel's network, instead of the hub

    def close(self) -> None:
        """From now on nobody listens."""
        self.shutdown()
        self.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """An empty hub, and an empty cache of it."""
    hub = Hub()
    url = f"http://127.0.0.1:{hub.server_port}"
    file_url = url + "/{repo_id}/resolve/{revision}/{filename}"
    cache = str(tmp_path_factory.mktemp("cache"))
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "ENDPOINT", url)
    monkeypatch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", file_url)
    monkeypatch.setattr(constants + "HF_HUB_CACHE", cache)
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    yield hub
    hub.silent = False
    hub.close()

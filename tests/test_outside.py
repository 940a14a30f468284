"""What comes from outside: terminals, files, disks, other processes, hubs, services, GPUs.

Each test is of something that users of this program, or of its kind, have run into.
"""

import errno
import inspect
import os
import pty
import re
import select
import shlex
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import run as run_tool
import torch
from conftest import PROGRAM, refusal
from huggingface_hub import errors
from test_train import Clockwork, seeds_in_a_row, tiny

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import Args, Film, Run, find_teacher, hub_is_silent, validate

FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


def raising(error: Exception) -> MagicMock:
    return MagicMock(side_effect=error)


@pytest.fixture
def small_run(command_line, make_model, monkeypatch):
    """small_run(*flags): exit code, stdout and stderr of `main`, with games of Clockwork.

    Without a teacher: 100 online steps, evaluated at step 52 and at the end.
    """
    monkeypatch.setattr(qdagger, "AtariGames", Clockwork)
    monkeypatch.setattr(qdagger, "seeds_for", seeds_in_a_row)
    monkeypatch.setitem(qdagger.NETWORKS, "nature", tiny)

    def run(*flags) -> tuple[int, str, str]:
        return command_line(
            "--teacher=none",
            "--network=nature",
            "--total-timesteps=100",
            "--learning-starts=40",
            "--buffer-size=60",
            "--batch-size=4",
            "--eval-frequency=50",
            "--eval-episodes=1",
            "--no-cuda",
            "--no-amp",
            *flags,
        )

    return run


def the_run() -> Path:
    (run,) = Path("runs").iterdir()
    return run


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def error_line(err: str) -> str:
    """The only one, beside which there may be a progress bar."""
    (line,) = re.findall("error: .*", err)
    return line


# --- Terminals and cores ---


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_is_shown_where_there_is_no_lambda(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, PROGRAM, "--help"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"--env-id" in done.stdout
    assert b"\xce\xbb" not in done.stdout  # λ in UTF-8


def test_a_log_gets_its_line_of_progress_every_half_minute():
    script = f"import {PROGRAM.stem}, tqdm; print(tqdm.tqdm([]).mininterval)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=PROGRAM.parent, capture_output=True, text=True)
    assert done.stdout == "30.0\n"


def hang_up_while_it_trains(command: list, directory: Path) -> int:
    """Exit code of a program whose terminal is closed once there is a checkpoint."""

    def has_checkpoint() -> bool:
        return any(directory.glob("runs/*/checkpoint.pt"))

    pid, terminal = pty.fork()
    if pid == 0:  # the program
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.chdir(directory)
        os.execv(sys.executable, [sys.executable, *map(str, command)])

    until = time.monotonic() + 200
    while not has_checkpoint():
        assert time.monotonic() < until
        readable, _, _ = select.select([terminal], [], [], 0.1)
        if readable:  # or it would wait for us
            os.read(terminal, 10_000)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def test_a_terminal_that_is_closed_stops_the_run_at_a_checkpoint(tmp_path):
    command = [
        PROGRAM,
        "--teacher=none",
        "--network=nature",
        "--total-timesteps=1000000",
        "--learning-starts=999999",
        "--buffer-size=1000",
        "--checkpoint-frequency=400",
        "--eval-frequency=0",
        "--no-cuda",
    ]

    code = hang_up_while_it_trains(command, tmp_path)

    assert code == 128 + signal.SIGHUP
    (checkpoint,) = tmp_path.glob("runs/*/checkpoint.pt")
    assert time.time() - checkpoint.stat().st_mtime < 60
    assert not list(tmp_path.glob("runs/*/*.part"))


def test_the_cores_that_are_granted_are_counted_as_the_tools_do():
    """Which have the tests of it."""
    assert inspect.getsource(qdagger.cores) == inspect.getsource(run_tool.cores)


@pytest.mark.parametrize("variable, threads", [(None, 1), ("7", 3)])
def test_torch_has_no_more_threads_than_cores_are_granted(
    command_line, monkeypatch, variable, threads
):
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(qdagger, "cores", lambda: 1)
    try:
        torch.set_num_threads(3)
        command_line("--env-id", "CartPole-v1")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


# --- Flags ---

TEXTS = [
    "exp_name",
    "env_id",
    "teacher",
    "teacher_policy_hf_repo",
    "teacher_model_exp_name",
    "teacher_buffer",
    "resume",
    "evaluate",
    "wandb_project_name",
    "wandb_entity",
]


@pytest.mark.parametrize("flag", TEXTS)
def test_an_empty_value_as_of_an_unset_variable_of_the_shell_is_refused(command_line, flag):
    flag = "--" + flag.replace("_", "-")
    code, _, err = command_line(flag, "")
    assert code == 2
    assert err == f"error: {flag} : is empty\n"
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", ["--cuda False", "--no-cuda true", "--save-model=True"])
def test_who_gives_a_switch_a_value_is_told_its_two_names(command_line, words):
    code, _, err = command_line(*words.split())
    assert code == 2
    flag = re.split("[ =]", words)[0]
    assert err.startswith(f"error: {flag}")
    assert "takes no value" in err
    assert "--no-" in err


def test_flags_that_may_have_any_value_where_they_play_no_part_are_let_through():
    validate(Args(offline_steps=0, teacher_steps=0))
    validate(Args(teacher="none", teacher_steps=0, offline_steps=5))
    validate(Args(total_timesteps=0, learning_starts=80_000, buffer_size=1))


@pytest.mark.parametrize(
    "flags, line",
    [
        (
            dict(teacher="none", temperature=1.0, distill_latch=True),
            "--teacher none: no part is played by --distill-latch, --temperature\n",
        ),
        (
            dict(offline_steps=0, teacher_buffer="a"),
            "--offline-steps 0: no part is played by --teacher-buffer\n",
        ),
        (dict(teacher="none"), ""),
        (dict(temperature=1.0), ""),
    ],
)
def test_flags_that_play_no_part_are_named_in_a_line(capfd, flags, line):
    qdagger.name_idle_flags(Args(**flags))
    assert capfd.readouterr().out == line


MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 26.00 GiB"),
]


@pytest.mark.parametrize("error", MEMORY, ids=["python", "cpu", "cuda"])
def test_memory_that_runs_out_later_is_a_line(command_line, monkeypatch, error):
    monkeypatch.setattr(qdagger, "train", raising(error))
    code, _, err = command_line()
    assert code == 2
    assert re.fullmatch("error: out of memory; .*--buffer-size.*\n", err)


def test_an_error_of_the_program_itself_is_a_traceback(command_line, monkeypatch):
    monkeypatch.setattr(qdagger, "train", raising(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        command_line()


# --- Disks and files ---


@pytest.mark.parametrize("method", ["add_scalar", "flush", "add_text", "close"])
def test_a_full_disk_met_by_the_event_file_is_the_line_that_says_resume(
    small_run, monkeypatch, method
):
    writer = "torch.utils.tensorboard.SummaryWriter."
    monkeypatch.setattr(writer + method, raising(FULL_DISK))
    code, _, err = small_run()
    assert code == 2
    line = error_line(err)
    assert line.startswith("error: cannot write runs/")
    assert "; once it can be written, --resume (" in line
    assert "No space left" in line


def test_an_error_of_a_thread_is_shown_unless_it_is_of_the_disk(monkeypatch):
    """One of the disk's is raised anew where the program writes next."""
    shown = MagicMock()
    monkeypatch.setattr(threading, "__excepthook__", shown)
    for error in (FULL_DISK, ZeroDivisionError()):
        qdagger.ignore_full_disk(MagicMock(exc_type=type(error)))
    (call,) = shown.call_args_list
    assert call.args[0].exc_type is ZeroDivisionError


def test_the_folder_of_a_buffer_that_is_no_longer_needed_may_have_gone(tmp_path):
    args = Args(teacher_buffer=str(tmp_path / "gone" / "buffer.pt"))
    for phase in (None, "teacher buffer"):
        assert refusal(validate, args, phase).startswith("--teacher-buffer ")
    for phase in ("offline", "online"):
        validate(args, phase)


def test_a_checkpoint_is_written_before_the_models(small_run, monkeypatch):
    """So that what a name or a disk does to them costs no run."""
    real_write = qdagger.write
    names = []

    def write(content, path, before=None):
        names.append(path.name)
        real_write(content, path, before)

    monkeypatch.setattr(qdagger, "write", write)
    code, _, _ = small_run("--save-model", "--exp-name=a")
    assert code == 0
    assert names[:2] == ["checkpoint.pt", "a.cleanrl_model"]


def test_the_command_that_goes_on_can_be_pasted_into_a_shell(monkeypatch):
    """Whatever the run is called."""
    monkeypatch.setattr(sys, "argv", ["program"])
    run = MagicMock(spec=Run, args=Args(), stop=[signal.SIGTERM], directory=Path("runs", "a b"))
    run.progress = qdagger.Progress()
    run.next_checkpoint = 0.0

    with pytest.raises(qdagger.Stopped) as stopped:
        Run.checkpoint_if_due(run, None, None)

    run.checkpoint.assert_called_once()
    _, message = stopped.value.args
    _, _, command = message.partition("go on with: ")
    assert shlex.split(command) == ["python", "program", "--resume", "runs/a b"]


# --- Another process in the same directory ---

HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(100)
"""


def test_a_directory_in_which_another_process_is_at_work_is_refused(small_run):
    small_run()
    run = the_run()
    files = sorted(run.iterdir())

    command = [sys.executable, "-c", HOLD, str(run / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        code, _, err = small_run("--resume", run, "--total-timesteps=200")
        other.kill()

    assert code == 2
    assert error_line(err) == f"error: {run}: another process is at work there"
    assert sorted(run.iterdir()) == files
    code, _, _ = small_run("--resume", run, "--total-timesteps=200")
    assert code == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_a_file_system_has_no_locks_it_goes_on_and_says_so(small_run, monkeypatch, number):
    monkeypatch.setattr(qdagger.fcntl, "lockf", raising(OSError(number, "no locks")))
    code, out, _ = small_run()
    assert code == 0
    assert f"{the_run()}: no lock, so let no other process resume it" in out


def test_where_there_are_no_locks_at_all_it_goes_on(small_run, monkeypatch):
    monkeypatch.setattr(qdagger, "fcntl", None)  # as on Windows
    code, _, _ = small_run()
    assert code == 0


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """Each has a part file of its own, even on another machine with the same process number."""
    parts = []
    monkeypatch.setattr(torch, "save", lambda content, file: parts.append(file.name))
    for _ in range(2):
        qdagger.write({}, tmp_path / "checkpoint.pt")
    assert len(set(parts)) == 2


# --- Films ---


def test_a_film_that_fails_is_a_line_and_costs_the_film_alone(monkeypatch, capfd):
    """Also if it fails at its end."""
    writer = MagicMock()
    writer.write_frame.side_effect = [None, BrokenPipeError("ffmpeg was interrupted")]
    writer.close.side_effect = BrokenPipeError("again")
    monkeypatch.setattr(qdagger, "open_film", lambda path, image: writer)

    film = Film(Path("film.mp4"))
    for _ in range(5):
        film.add(None)
    film.close()

    assert writer.write_frame.call_count == 2
    said = "--capture-video: film.mp4 is cut short: ffmpeg was interrupted\n"
    assert capfd.readouterr().err == said


def test_a_run_whose_films_fail_ends_as_one_without(small_run, monkeypatch):
    monkeypatch.setattr(qdagger, "open_film", raising(FileExistsError("videos is a file")))
    monkeypatch.setattr(qdagger, "try_to_film", lambda: None)
    monkeypatch.setattr(Clockwork, "images", np.zeros((1, 1, 2, 2, 3)), raising=False)
    code, out, _ = small_run("--capture-video", "--save-model")
    assert code == 0
    assert "over 1 games" in last_line(out)


def no_encoder(path, image):
    raise OSError("no encoder libx264")


def writes_nothing(path, image):
    return MagicMock()


@pytest.mark.parametrize(
    "opens, why",
    [(no_encoder, "no encoder libx264"), (writes_nothing, "ffmpeg wrote nothing")],
)
def test_an_encoder_that_fails_is_noticed_before_the_first_step(
    command_line, monkeypatch, opens, why
):
    monkeypatch.setattr(qdagger, "open_film", opens)
    code, out, err = command_line("--capture-video", "--no-cuda")
    assert code == 2
    assert out == ""
    assert err == f"error: --capture-video: no film can be made here ({why})\n"
    assert not Path("runs").exists()


# --- Weights & Biases ---


@pytest.mark.parametrize("said", ["No API key configured", "Invalid project name: a:b"])
def test_who_cannot_track_is_told_so_before_the_first_game(
    small_run, monkeypatch, tmp_path_factory, said
):
    package = tmp_path_factory.mktemp("package")
    (package / "wandb.py").write_text(f"def init(**_):\n    raise Exception({said!r})\n")
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(qdagger, "evaluate", None)

    code, _, err = small_run("--track")

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert code == 2
    assert error_line(err) == f"error: --track ({said})"
    assert not Path("runs").exists()


# --- The hub ---


def named(name: str, base=Exception) -> Exception:
    """As a library of HTTP has it."""
    return type(name, (base,), {})("it says")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("refused"),
        ConnectionResetError("reset"),
        TimeoutError("timed out"),
        named("ConnectError", type("NetworkError", (Exception,), {})),
        named("ReadTimeout", type("TimeoutException", (Exception,), {})),
        errors.LocalEntryNotFoundError("not in the cache"),
    ],
    ids=repr,
)
def test_a_hub_that_cannot_be_asked_is_silent(error):
    assert hub_is_silent(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, "Read-only file system"),
        FULL_DISK,
        PermissionError("cache"),
        TypeError("unexpected keyword"),
        ImportError("Using SOCKS proxy, but the 'socksio' package is not installed"),
        ssl.SSLCertVerificationError("certificate verify failed: self-signed certificate"),
        ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"),
        ValueError("no such name"),
    ],
    ids=repr,
)
def test_what_else_fails_is_no_silence_of_the_hub(error):
    assert not hub_is_silent(error)


PONG = Args(env_id="PongNoFrameskip-v4")
REPO = "cleanrl/PongNoFrameskip-v4-dqn_atari-seed1"


def test_a_cache_that_cannot_be_written_is_named_instead_of_another_teacher(
    hub, monkeypatch, tmp_path
):
    hub.files[REPO, "dqn_atari.cleanrl_model"] = b"a model"
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refusal(find_teacher, PONG)
    assert message.startswith(f"--teacher-policy-hf-repo {REPO}: ")
    assert "cache" in message


def test_a_page_in_place_of_the_hub_is_no_teacher_and_no_silence(hub):
    """It answers to everything, and is no file of the hub."""
    hub.shows_a_login = True
    message = refusal(find_teacher, PONG)
    assert message.startswith(f"--teacher-policy-hf-repo {REPO}: ")


def test_a_token_that_is_refused_is_named(hub, monkeypatch):
    """The hub refuses a wrong one even for what is public."""
    hub.status = 401
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refusal(find_teacher, PONG)
    assert "token" in message
    assert "hf auth" in message


def test_what_the_hub_says_is_not_cut_at_its_first_sentence(hub):
    message = refusal(find_teacher, Args(teacher_policy_hf_repo="bob/pong"))
    assert "404 Client Error." in message
    _, _, rest = message.partition("404 Client Error.")
    assert len(rest) > 50


# --- Another machine ---


def resumed_run(monkeypatch, begun_on: str, has_gpu: bool, **flags) -> Run:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    return Run(Args(resume="runs/a", **flags), [], {"facts": {"device": begun_on}})


@pytest.mark.parametrize("cuda", [True, False])
def test_a_run_begun_on_a_cpu_goes_on_there_on_a_machine_with_a_gpu(monkeypatch, capfd, cuda):
    run = resumed_run(monkeypatch, "cpu", has_gpu=True, cuda=cuda)
    assert run.device.type == "cpu"
    assert run.facts["device"] == "cpu"
    assert ("begun on a CPU, where it goes on" in capfd.readouterr().out) == cuda


@pytest.mark.parametrize("has_gpu, cuda", [(False, True), (True, False)])
def test_a_run_begun_on_a_gpu_needs_one_and_says_so(monkeypatch, has_gpu, cuda):
    message = refusal(resumed_run, monkeypatch, "H100", has_gpu=has_gpu, cuda=cuda)
    assert message.startswith("--resume runs/a: the run was begun on a GPU, H100, and needs one")
    assert "--no-cuda" in message


# --- The network of the best evaluation ---


def test_the_network_of_the_best_evaluation_is_kept_and_named(small_run, monkeypatch):
    """Of evaluations of 3, 7 and 5 that is the second's, also after a resume."""
    scores = iter([3.0, 7.0, 5.0, 6.0])
    weights = []

    def evaluate(network, *_, **__) -> list[float]:
        weights.append({name: value.clone() for name, value in network.state_dict().items()})
        return [next(scores)]

    monkeypatch.setattr(qdagger, "evaluate", evaluate)
    code, out, _ = small_run("--save-model", "--eval-frequency=40", "--exp-name=a")

    run = the_run()
    assert code == 0
    assert last_line(out) == f"{run}: 5.00 ± 0.00 over 1 games; best evaluation: 7.00 at step 80"

    def check_models(last: int) -> None:
        for name, nth in (("a.best", 1), ("a", last)):
            model = torch.load(run / f"{name}.cleanrl_model")
            for key, value in model.items():
                assert torch.equal(value, weights[nth][key]), (name, key)

    check_models(last=2)
    code, out, _ = small_run("--resume", run, "--total-timesteps=110", "--exp-name=a")
    assert code == 0
    assert "best evaluation: 7.00 at step 80" in last_line(out)
    check_models(last=3)

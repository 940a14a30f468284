"""What each trick alone gives: milliseconds per update, and per four steps with their update, with all of them but one.

A second table has the steps per second of the teacher's buffer, each row in a process of its own.

    python results/tricks.py --out results/speed/NAME_tricks.json

Rows take turns, so that a machine that slows down slows all of them; the numbers are medians. A trick is undone from
outside: the program has no switches for what nobody would turn off.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import tyro
from speed import machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import qdagger_dqn_atari_impalacnn as qdagger

CAPACITY = 20_000  # of the replay that is drawn from, full of noise


@dataclass
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"
    updates: int = 10  # of each row in each turn
    turns: int = 6
    steps: int = 50  # of each row in each turn, times four environment steps
    buffer_games: int = 0  # instead of all that, fill a teacher's buffer from so many games and print steps per second
    buffer_steps: int = 12_000  # of it
    out: Path | None = None  # write the table and every single number here, as JSON


@contextmanager
def without_channels_last() -> Iterator[None]:
    with mock.patch.object(torch, "channels_last", torch.contiguous_format):
        yield


@contextmanager
def without_fused_adam() -> Iterator[None]:
    adam = torch.optim.Adam
    with mock.patch.object(torch.optim, "Adam", lambda *args, **options: adam(*args, **options | {"fused": False})):
        yield


@contextmanager
def without_tf32() -> Iterator[None]:
    with mock.patch.object(torch, "set_float32_matmul_precision", lambda _: None):
        yield


@contextmanager
def without_stored_teacher() -> Iterator[None]:
    """The teacher is asked again in every update."""
    sample, networks = qdagger.FrameReplay.sample, {}

    @torch.no_grad()
    def sample_and_ask(replay, *args):
        batch = sample(replay, *args)
        if batch.obs.device not in networks:
            network = qdagger.TeacherNetwork(replay.teacher_q_values.shape[1])
            networks[batch.obs.device] = network.to(batch.obs.device, memory_format=torch.channels_last)
        return batch._replace(teacher_q_values=networks[batch.obs.device](batch.obs))

    with mock.patch.object(qdagger.FrameReplay, "sample", sample_and_ask):
        yield


@contextmanager
def without_overlap() -> Iterator[None]:
    """Games are waited for before the student learns."""
    environment, result = qdagger.AtariGames, {}
    begin, wait = environment.step_async, environment.step_wait

    def begin_and_wait(envs, actions) -> None:
        begin(envs, actions)
        result[envs] = wait(envs)

    with (
        mock.patch.object(environment, "step_async", begin_and_wait),
        mock.patch.object(environment, "step_wait", lambda envs: result.pop(envs)),
    ):
        yield


def rows(cuda: bool) -> dict[str, tuple[dict, Callable | None]]:
    """For each row: flags, and what undoes a trick (or adds one that does not pay here)."""
    fast = {"amp": cuda or qdagger.Args().amp}  # bfloat16 where it pays, as the program has it on a CPU
    table = {
        "everything": (fast, None),
        f"{'without' if fast['amp'] else 'with'} bfloat16": ({"amp": not fast["amp"]}, None),
        "without channels_last": (fast, without_channels_last),
        "without the fused Adam": (fast, without_fused_adam),
        "without stored teacher's Q-values": (fast, without_stored_teacher),
        "without overlap of games and learning": (fast, without_overlap),
        "with one game instead of four side by side": (fast | {"num_envs": 1}, None),
    }
    if cuda:
        table["without CUDA graphs"] = ({"amp": True, "capture": False}, None)
        table["without bfloat16 and TF32"] = ({"amp": False}, without_tf32)
    if cuda or shutil.which("g++"):
        table["with torch.compile"] = (fast | {"compile": True}, None)
    return table


class Row:
    """A learner on a full replay, and its games."""

    def __init__(self, args: Args, flags: dict, undo: Callable | None):
        self.undo = undo or ExitStack
        with self.undo():
            self.args = qdagger.Args(env_id=args.env_id, **flags)
            self.device = qdagger.choose_device(self.args)
            self.games = qdagger.AtariGames(self.args, self.args.num_envs, seed=1)
            actions = self.games.games[0].num_actions
            self.learner = qdagger.Learner(self.args, actions, self.device)
            self.learner.distill_weight.fill_(1.0)
            self.replay = qdagger.FrameReplay(CAPACITY, self.args.num_envs, actions, self.device)
            self.replay.frames.random_(0, 256)
            self.replay.ages.fill_(qdagger.STACK - 1)
            self.replay.written.fill_(CAPACITY // self.args.num_envs)
            self.gradient_step = self.learner.step_on(self.replay)
            of_student = self.learner.q_values, self.args.num_envs, actions, self.learner.generator
            self.policy = qdagger.Policy(*of_student, self.args.capture)

    def seconds(self, work: Callable[[], None], repeats: int) -> list[float]:
        times = []
        with self.undo():
            for _ in range(repeats):
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                work()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        return times

    def four_steps(self) -> None:
        """Four environment steps and one update, as the online phase has them."""
        for vector_step in range(4 // self.args.num_envs):
            obs = self.games.obs
            actions, _ = self.policy(obs, 0.01)
            self.games.step_async(actions)
            if vector_step == 0:
                self.gradient_step()
            *outcome, _ = self.games.step_wait()
            self.replay.add(obs, actions, *outcome)


def buffer_rate(args: Args) -> float:
    """Steps per second of the teacher's buffer, as phase 1 fills it, after a first tenth that warms up."""
    of_program = qdagger.Args(env_id=args.env_id)
    device = qdagger.choose_device(of_program)
    games = qdagger.AtariGames(of_program, args.buffer_games, seed=1)
    actions = games.games[0].num_actions
    path = Path(qdagger.__file__).parent / "teachers" / f"{args.env_id}.cleanrl_model"
    teacher = qdagger.load_model(path, actions, "--teacher").to(device, memory_format=torch.channels_last)
    replay = qdagger.FrameReplay(args.buffer_steps, args.buffer_games, actions, device)
    generator = torch.Generator(device).manual_seed(1)
    policy = qdagger.Policy(teacher, args.buffer_games, actions, generator, of_program.capture)
    steps, start = 0, 0.0
    while steps < args.buffer_steps:
        if start == 0.0 and steps >= args.buffer_steps / 10:
            first, start = steps, time.perf_counter()
        obs = games.obs
        chosen, q_values = policy(obs, 0.5)
        games.step_async(chosen)
        *outcome, _ = games.step_wait()
        replay.add(obs, chosen, *outcome, q_values)
        steps += args.buffer_games
    return (steps - first) / (time.perf_counter() - start)


BUFFER = {  # games, and the environment variables of the process
    "everything": (qdagger.Args().teacher_envs, {}),
    "as many games as the student has": (qdagger.Args().num_envs, {}),
    "torch's threads wait as they do by default": (qdagger.Args().teacher_envs, {"GOMP_SPINCOUNT": "300000"}),
}


def buffer_rates(args: Args) -> dict[str, list[float]]:
    """For each row of BUFFER what three processes measure, in turns."""
    rates: dict[str, list[float]] = {name: [] for name in BUFFER}
    for _ in range(3):
        for name, (games, variables) in BUFFER.items():
            options = [f"--env-id={args.env_id}", f"--buffer-games={games}", f"--buffer-steps={args.buffer_steps}"]
            command = [sys.executable, __file__, *options]
            result = subprocess.run(command, env=os.environ | variables, check=True, stdout=subprocess.PIPE, text=True)
            rates[name].append(float(result.stdout.split()[-1]))
    return rates


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_flush_denormal(True)
    if args.buffer_games:
        print(f"{buffer_rate(args):.0f}")
        return
    rates = buffer_rates(args)
    table = {name: Row(args, *how) for name, how in rows(torch.cuda.is_available()).items()}
    updates: dict[str, list[float]] = {name: [] for name in table}
    steps: dict[str, list[float]] = {name: [] for name in table}
    for turn in range(args.turns + 1):
        for name, row in table.items():
            of_updates, of_steps = (
                row.seconds(row.gradient_step, args.updates),
                row.seconds(row.four_steps, args.steps),
            )
            if turn:  # the first one warms up
                updates[name] += of_updates
                steps[name] += of_steps
        print(f"turn {turn} of {args.turns}", file=sys.stderr)

    lines = ["| | update, ms | 4 steps and an update, ms |", "|---|---|---|"]
    for name in table:
        medians = [1000 * statistics.median(times[name]) for times in (updates, steps)]
        lines.append(f"| {name} | {medians[0]:.1f} | {medians[1]:.1f} |")
    lines += ["", "| | teacher buffer, steps/s |", "|---|---|"]
    lines += [f"| {name} | {statistics.median(of_name):.0f} |" for name, of_name in rates.items()]
    print("\n".join(lines))
    if args.out:
        times = {name: {"update": updates[name], "step": steps[name]} for name in table}
        rounded = {name: {key: np.round(value, 6).tolist() for key, value in of.items()} for name, of in times.items()}
        content = {"machine": machine(), "table": "\n".join(lines), "seconds": rounded, "buffer": rates}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content))


if __name__ == "__main__":
    main()

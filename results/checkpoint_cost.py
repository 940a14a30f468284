"""What a checkpoint of a full replay costs: seconds that training waits, and bytes on disk.

    python results/checkpoint_cost.py --transitions 1000000 --out results/checkpoint_cost.json

The replay is filled with frames of real games under random play, repeated until it is full. Three saves are timed: the
first, which writes every frame; one with the frames of ten more minutes at 150 steps/s; and one with nothing new.
"""

import json
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from qdagger_dqn_atari_impalacnn import AtariGame, Checkpoints, FrameReplay, QNetwork


@dataclass
class Args:
    transitions: int = 1_000_000  # in the replay, of four environments
    env_id: str = "BreakoutNoFrameskip-v4"  # whose frames
    recorded: int = 20_000  # of them, different ones
    new: int = 90_000  # transitions between the first and the second save
    out: Path | None = None  # a JSON file for the numbers


def record(env_id: str, count: int) -> torch.Tensor:
    """uint8 (count, 7056): the newest frame of each observation of random play."""
    rng, frames = np.random.default_rng(1), []
    game = AtariGame(env_id, seed=1)
    while len(frames) < count:
        game.send(int(rng.integers(game.num_actions)))
        game.recv()
        frames.append(torch.from_numpy(game.obs[-1].reshape(-1).copy()))
    return torch.stack(frames)


def main(args: Args) -> None:
    frames, replay = record(args.env_id, args.recorded), FrameReplay(args.transitions, 4, 4)
    for start in range(0, len(replay.frames), len(frames)):
        part = replay.frames[start : start + len(frames)]
        part.copy_(frames[: len(part)])
    replay.written += args.transitions // 4
    network = QNetwork(4)
    content = {"q_network": network.state_dict(), "target_network": network.state_dict()}
    content["optimizer"] = [network.state_dict(), network.state_dict()]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(Path(directory))
        for name, new in {
            "the first, every frame": 0,
            f"{args.new} new transitions": args.new,
            "nothing new": 0,
        }.items():
            replay.written += new // 4
            before = {path: path.stat().st_size for path in Path(directory).rglob("*") if path.is_file()}
            start = time.perf_counter()
            checkpoints.save(dict(content), {"student": replay}, 0)
            seconds = time.perf_counter() - start
            after = {path: path.stat().st_size for path in Path(directory).rglob("*") if path.is_file()}
            written = sum(size for path, size in after.items() if path not in before)
            rows.append({"save": name, "seconds": round(seconds, 2), "MB": round(written / 1e6, 1)})
            print(f"{name}: {seconds:.2f} s, {written / 1e6:.1f} MB")
    facts = {"transitions": args.transitions, "env_id": args.env_id, "torch": torch.__version__}
    facts |= {"machine": platform.machine(), "threads": torch.get_num_threads()}
    if args.out:
        args.out.write_text(json.dumps(facts | {"saves": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

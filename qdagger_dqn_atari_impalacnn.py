"""QDagger on Atari: a student Impala-CNN takes over from a DQN teacher and plays on by itself.

    python qdagger_dqn_atari_impalacnn.py --env-id BreakoutNoFrameskip-v4               # teach, then play on
    python qdagger_dqn_atari_impalacnn.py --teacher none --network nature --save-model  # train a teacher
    python qdagger_dqn_atari_impalacnn.py --evaluate runs/RUN/MODEL.cleanrl_model       # play a saved model

Reincarnating Reinforcement Learning (Agarwal et al., 2022, arXiv 2206.01626), in three phases:

1. Teacher buffer: the teacher plays and its transitions are stored with its Q-values.
2. Offline: the student learns from that buffer alone, by a TD loss plus a distillation loss.
3. Online: the student plays and learns from its own transitions. The distillation weight lambda fades as its return
   approaches the teacher's.

One step is one decision of the agent: four emulator frames.
"""

import copy
import difflib
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads of torch that have to wait let games play sooner

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- Arguments ---

# CPUs that are faster in bfloat16: those with AMX, and of those with AVX-512 instructions for it AMD's.
CPU = {} if torch.cuda.is_available() else getattr(torch.cpu, "get_capabilities", dict)()
FAST_BFLOAT16 = CPU.get("amx_bf16", False) or (CPU.get("avx512_bf16", False) and "AMD" in CPU.get("cpu_name", ""))


@dataclass
class Args:
    # run
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run's name
    seed: int = 1  # seeds networks, exploration, sampling and games
    torch_deterministic: bool = True  # choose deterministic cuDNN kernels
    cuda: bool = True  # train on the GPU if there is one
    track: bool = False  # follow the run on Weights & Biases as well (extra `track`)
    wandb_project_name: str = "cleanRL"  # its project there
    wandb_entity: str | None = None  # its user or team there
    capture_video: bool = False  # film the first environment to runs/RUN/videos (extra `video`)
    save_model: bool = False  # write the network to runs/RUN/ at each evaluation and at the end
    upload_model: bool = False  # upload the saved model to the Hugging Face hub at the end
    hf_entity: str = ""  # user or organisation there; empty: the one logged in

    # environment
    env_id: str = "BreakoutNoFrameskip-v4"  # one of ale-py's *NoFrameskip-v4 games
    num_envs: int = 4  # games side by side, the teacher's four times as many; updates per step do not depend on it
    repeat_action_probability: float = 0.0  # chance that a frame repeats the last action; 0.25 = sticky actions

    # DQN
    total_timesteps: int = 10_000_000  # environment steps of the online phase
    learning_rate: float = 1e-4  # of Adam
    adam_eps: float = 1e-8  # of Adam
    buffer_size: int = 1_000_000  # transitions in the student's replay; 7.06 GB per million
    gamma: float = 0.99  # discount per step
    tau: float = 1.0  # share of the online network in a target update; 1 copies it
    target_network_frequency: int = 1000  # gradient steps (offline) or environment steps (online) per target update
    batch_size: int = 32  # transitions per gradient step
    n_step: int = 3  # rewards summed before the target network's value
    huber: bool = False  # Huber instead of squared TD error
    start_e: float = 1.0  # exploration at the start of a schedule
    end_e: float = 0.01  # exploration at its end, and in every evaluation
    exploration_fraction: float = 0.10  # share of total_timesteps over which exploration falls, offline steps counted
    learning_starts: int = 80_000  # online steps before the first online gradient step
    train_frequency: int = 4  # online steps per gradient step

    # QDagger
    teacher_steps: int = 500_000  # environment steps of the teacher's buffer
    offline_steps: int = 500_000  # gradient steps on the teacher's buffer
    temperature: float = 0.1  # of both policies in the distillation loss
    distill_coef: float = 3.0  # weight of the distillation loss beside lambda
    distill_steps: int | None = None  # online steps after which lambda is 0; unset: never cut off
    distill_latch: bool = False  # once lambda was 0, keep it there
    return_baseline: Literal["zero", "random"] = "zero"  # lambda compares returns above this baseline

    # teacher
    teacher: str = "auto"  # auto (hub, else bundled), none (plain DQN from scratch), or a path: model or SB3 DQN zip
    teacher_policy_hf_repo: str | None = None  # hub repository; unset: cleanrl/{env_id}-{teacher_model_exp_name}-seed1
    teacher_model_exp_name: str = "dqn_atari"  # the file there is {teacher_model_exp_name}.cleanrl_model (or dqn-*.zip)
    teacher_eval_episodes: int = 10  # games that measure the teacher
    teacher_buffer: Path | None = None  # read the teacher's buffer from this file if it exists, else write it there

    # speed
    network: Literal["impala", "nature"] = "impala"  # the network that learns
    amp: bool = FAST_BFLOAT16  # all layers but the last in bfloat16; the default on a CPU that is faster so
    capture: bool = True  # on a GPU, replay acting and each gradient step as CUDA graphs, once seen to do the same
    compile: bool = False  # let torch.compile fuse the networks; needs a C++ compiler, and minutes at the start

    # checkpoints
    checkpoint_frequency: int | None = None  # steps or updates per checkpoint; unset: 10 minutes; 0: at evaluations
    resume: Path | None = None  # go on with this run, runs/RUN, from its last checkpoint, with its flags

    # evaluation
    eval_frequency: int = 500_000  # online steps between evaluations; 0: at the end only
    eval_episodes: int = 10  # games in each of them
    evaluate: Path | None = None  # only play this saved model for eval_episodes games and print the scores

    @property
    def teacher_envs(self) -> int:
        """Games of the teacher: the more the faster, since its policy never ages."""
        return 4 * self.num_envs

    def warm_up(self, num_envs: int) -> int:
        """Environment steps before a replay of so many games can fill a batch of n-step transitions."""
        return self.batch_size + (self.n_step + 1) * num_envs


class UserError(Exception):
    """What the user can put right: `main` shows its one line and exits with code 2."""


@contextmanager
def user_error(problem: str):
    """Turn whatever goes wrong inside into a UserError that says `problem` and, in brackets, why."""
    try:
        yield
    except Exception as error:
        raise error if isinstance(error, UserError) else UserError(f"{problem} ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:160]


def validate(args: Args) -> None:
    """Raise UserError for the first flag that cannot work, before anything is downloaded or written."""

    def require(condition: bool, flag: str, rule: str) -> None:
        if not condition:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: {rule}")

    gym.register_envs(ale_py)
    games = [env_id for env_id in gym.registry if env_id.endswith("NoFrameskip-v4")]
    near = " or ".join(difflib.get_close_matches(args.env_id, games, n=2, cutoff=0.4) or ["PongNoFrameskip-v4"])
    require(args.env_id in games, "env_id", f"not one of ale-py's {len(games)} NoFrameskip-v4 games, try {near}")

    counts = ["num_envs", "buffer_size", "batch_size", "n_step", "train_frequency", "target_network_frequency"]
    for flag in [*counts, "learning_rate", "adam_eps", "temperature", "teacher_eval_episodes", "eval_episodes"]:
        require(0 < getattr(args, flag) < math.inf, flag, "must be above 0")
    phases = ["total_timesteps", "learning_starts", "teacher_steps", "offline_steps", "distill_steps"]
    for flag in [*phases, "seed", "distill_coef", "eval_frequency", "checkpoint_frequency"]:
        require(0 <= (getattr(args, flag) or 0) < math.inf, flag, "must not be negative")
    for flag in ["gamma", "tau", "start_e", "end_e", "exploration_fraction", "repeat_action_probability"]:
        require(0 <= getattr(args, flag) <= 1, flag, "must lie between 0 and 1")

    needed = {"buffer_size": args.warm_up(args.num_envs)}
    if args.teacher != "none" and args.offline_steps > 0:
        needed["teacher_steps"] = args.warm_up(args.teacher_envs)
    for flag, least in needed.items():
        require(getattr(args, flag) >= least, flag, f"too few for --batch-size {args.batch_size}: {least} or more")
    require(args.save_model or not args.upload_model, "upload_model", "there is nothing to upload without --save-model")
    for flag, package in {"capture_video": "moviepy", "track": "wandb"}.items():
        missing = getattr(args, flag) and importlib.util.find_spec(package) is None
        require(not missing, flag, f"needs a package that is not installed: pip install {package}")
    if args.teacher_buffer is not None:
        writable = os.access(args.teacher_buffer.absolute().parent, os.W_OK)
        require(writable, "teacher_buffer", "its directory does not exist or cannot be written")


# --- Environments ---

STACK = 4  # frames in an observation


@cache
def screen_size(rom: str) -> tuple[int, int]:
    """Height and width in pixels."""
    emulator = ale_py.ALEInterface()
    emulator.loadROM(ale_py.roms.get_rom_path(rom))
    return emulator.getScreenDims()


class AtariGame:
    """One Atari game as the reference wrappers show it (stable_baselines3's AtariWrapper), in a thread of ALE's.

    A step is four emulator frames with one action; its image is the maximum of the last two, grey, 84 x 84. A lost life
    ends an episode of the learner's, but not the game. Where an episode ends the next one has begun: if a game or a
    life must be launched, FIRE was pressed. A game begins with up to 29 frames of waiting.

    All that happens follows from `seed` and `actions`, so these are the state of a game.
    """

    RESEEDED = 10_000  # actions after which a new game gets a new seed, so that playing them again does not take long

    def __init__(self, env_id: str, seed: int, repeat_action_probability: float = 0.0):
        gym.register_envs(ale_py)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        cv2.setNumThreads(1)  # a frame is too small to share among threads
        rom = gym.spec(env_id).kwargs["game"]
        raw = dict(zip(("img_height", "img_width"), screen_size(rom)), grayscale=False, stack_num=1)
        raw |= {"use_fire_reset": False, "reward_clipping": False}
        self.emulator = AtariVectorEnv(rom, 1, repeat_action_probability=repeat_action_probability, **raw)
        action_set = self.emulator.ale.get_action_set()
        self.num_actions = len(action_set)
        self.launch = [1, 2] if ale_py.Action.FIRE in action_set else []
        self.ended: tuple[float, int] | None = None  # raw return and length in frames, if the last step ended the game
        self.video = None
        self.restore(seed)

    def restore(self, seed: int, actions: Sequence[int] = ()) -> None:
        """Begin with `seed`, and take these actions."""
        self.seed, self.actions = seed, []
        self.new_game(seed=np.array([seed]))
        for action in actions:
            self.send(action)
            self.recv()

    def send(self, action: int) -> None:
        """Begin a step."""
        self.actions.append(action)
        self.emulator.send(np.array([action]))

    def recv(self) -> tuple[float, bool, bool, np.ndarray]:
        """End it: (raw reward, terminated, truncated, observation at its end); `obs` is what to act on next."""
        self.ended = None
        outcome = self.observe()
        last_obs = self.obs
        if self.over:
            self.new_game()
        elif outcome[1]:
            self.begin_episode(0, *self.launch)  # a NOOP first, as the reference has it
        return *outcome, last_obs

    def observe(self) -> tuple[float, bool, bool]:
        """Wait for the emulator: (raw reward, terminated, truncated)."""
        images, (reward,), (over,), (truncated,), info = self.emulator.recv()
        lives, length = int(info["lives"][0]), int(info["episode_frame_number"][0])
        life_lost, self.lives = 0 < lives < self.lives, lives
        self.obs = np.stack([*self.obs[1:], self.frame(images)])
        self.game_return += float(reward)
        self.over = bool(over or truncated)
        if self.over:
            self.ended = self.game_return, length
        return float(reward), bool(over or life_lost), bool(truncated)

    def frame(self, images: np.ndarray) -> np.ndarray:
        """uint8 (84, 84) from the emulator's (1, 1, height, width, 3)."""
        if self.video:
            with suppress(OSError):  # Ctrl-C ends the process that writes it as well
                self.video.write_frame(images[0, 0])
        grey = cv2.cvtColor(images[0, 0], cv2.COLOR_RGB2GRAY)
        return cv2.resize(grey, (84, 84), interpolation=cv2.INTER_AREA)

    def new_game(self, **seed) -> None:
        self.close()
        if len(self.actions) >= self.RESEEDED:
            self.seed, self.actions = random.Random(self.seed).getrandbits(31), []
            seed = {"seed": np.array([self.seed])}
        images, info = self.emulator.reset(**seed)
        self.lives, self.game_return, self.obs = info["lives"][0], 0.0, self.frame(images)[None].repeat(STACK, axis=0)
        self.begin_episode(*self.launch)

    def begin_episode(self, *actions: int) -> None:
        """Take these actions, and begin there with the last frame four times; with a new game if they end this one."""
        for action in actions:
            self.emulator.send(np.array([action]))
            self.observe()
            if self.over:
                return self.new_game()
        self.obs = self.obs[-1:].repeat(STACK, axis=0)

    def film(self, path: Path) -> None:
        """Write what is seen from now on to the end of this game to `path` (extra `video`)."""
        from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

        path.parent.mkdir(exist_ok=True)
        self.video = FFMPEG_VideoWriter(str(path), self.emulator.single_observation_space.shape[-2:-4:-1], fps=15)

    def close(self) -> None:
        """End the video, if one is being written."""
        if self.video:
            with suppress(OSError):
                self.video.close()
            self.video = None


class Step(NamedTuple):
    """What a step of all games has brought."""

    rewards: np.ndarray  # float32 (num_envs,): their signs
    terminations: np.ndarray  # bool (num_envs,)
    truncations: np.ndarray  # bool (num_envs,)
    last_obs: np.ndarray  # uint8 (num_envs, 4, 84, 84): the observations at its end, also where an episode ended
    games: list[tuple[int, float, int]]  # (environment, raw return, length in frames) of whole games that ended


class AtariGames:
    """Games side by side, the i-th with seed + i; they play on between `step_async` and `step_wait`."""

    def __init__(self, args: Args, num_envs: int, seed: int):
        make = partial(AtariGame, args.env_id, repeat_action_probability=args.repeat_action_probability)
        self.games = [make(seed=(seed + env) % 2**31) for env in range(num_envs)]

    @property
    def obs(self) -> np.ndarray:
        """uint8 (num_envs, 4, 84, 84), the oldest frame first: what to act on next."""
        return np.stack([game.obs for game in self.games])

    def step_async(self, actions: torch.Tensor) -> None:
        for game, action in zip(self.games, actions.tolist()):
            game.send(action)

    def step_wait(self) -> Step:
        rewards, *ends, last_obs = zip(*(game.recv() for game in self.games))
        ended = [(env, *game.ended) for env, game in enumerate(self.games) if game.ended]
        return Step(np.sign(rewards, dtype=np.float32), *map(np.array, ends), np.stack(last_obs), ended)

    def close(self) -> None:
        for game in self.games:
            game.close()

    def state_dict(self) -> list[tuple[int, torch.Tensor]]:
        return [(game.seed, torch.tensor(game.actions, dtype=torch.uint8)) for game in self.games]

    def load_state_dict(self, state: list[tuple[int, torch.Tensor]]) -> None:
        """Play all games again up to there; ValueError if that is no state of theirs."""
        for game, (seed, actions) in zip(self.games, state, strict=True):
            refuse_unlike(actions, torch.zeros(min(len(actions), game.RESEEDED + 30_000), dtype=torch.uint8))
            if type(seed) is not int or not 0 <= seed < 2**31 or (actions >= game.num_actions).any():
                raise ValueError("not the seed and the actions of a game")
        with ThreadPoolExecutor() as pool:
            restored = pool.map(lambda game, saved: game.restore(saved[0], saved[1].tolist()), self.games, state)
            list(tqdm(restored, "games, up to where they were", len(self.games), leave=False, unit="game"))


# --- Networks ---


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv1(F.relu(self.conv0(F.relu(x))))


class ConvSequence(nn.Sequential):
    """Halves the image: (batch, in_channels, h, w) to (batch, out_channels, ceil(h / 2), ceil(w / 2))."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.res_block0 = ResidualBlock(out_channels)
        self.res_block1 = ResidualBlock(out_channels)


class AtariNetwork(nn.Module):
    """Q-values float32 (batch, num_actions) from observations uint8 (batch, 4, 84, 84)."""

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        features = self.network[:-1](obs.to(torch.float32, memory_format=torch.channels_last).div_(255))
        with torch.autocast(obs.device.type, enabled=False):  # bfloat16 is too coarse to tell one action from another
            return self.network[-1](features.float())


class QNetwork(AtariNetwork):
    """The student: Impala-CNN (Espeholt et al., 2018). Its sequences turn 84 pixels a side into 42, 21 and 11."""

    def __init__(self, num_actions: int):
        super().__init__()
        convolutions = [ConvSequence(STACK, 16), ConvSequence(16, 32), ConvSequence(32, 32), nn.ReLU()]
        head = [nn.Flatten(), nn.Linear(32 * 11 * 11, 256), nn.ReLU(), nn.Linear(256, num_actions)]
        self.network = nn.Sequential(*convolutions, *head)


class TeacherNetwork(AtariNetwork):
    """The teacher: the Nature CNN (Mnih et al., 2015)."""

    def __init__(self, num_actions: int):
        super().__init__()
        layers = [nn.Conv2d(STACK, 32, 8, stride=4), nn.Conv2d(32, 64, 4, stride=2), nn.Conv2d(64, 64, 3, stride=1)]
        convolutions = [module for layer in layers for module in (layer, nn.ReLU())]
        head = [nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, num_actions)]
        self.network = nn.Sequential(*convolutions, *head)


NETWORKS = {"impala": QNetwork, "nature": TeacherNetwork}


# --- Replay ---


BLOCK = 4096  # frames that are compressed together


class Batch(NamedTuple):
    obs: torch.Tensor  # uint8 (batch, 4, 84, 84)
    actions: torch.Tensor  # int64 (batch,)
    returns: torch.Tensor  # float32 (batch,): discounted sum of up to n rewards
    discounts: torch.Tensor  # float32 (batch,): gamma^n for the value of next_obs, 0 after a termination
    next_obs: torch.Tensor  # uint8 (batch, 4, 84, 84)
    teacher_q_values: torch.Tensor  # float32 (batch, num_actions) at obs


def frame_store(slots: int, device: torch.device) -> torch.Tensor:
    """Room for frames, uint8 (slots, 7056): on the device, or on the host, pinned, if it would fill a GPU's memory."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    if free - slots * 84 * 84 < 2e9:  # what networks and kernels need
        print(f"the GPU has {free / 1e9:.1f} GB to spare: {slots * 84 * 84 / 1e9:.1f} GB of frames stay on the host")
        return torch.empty((slots, 84 * 84), dtype=torch.uint8, pin_memory=True)
    return torch.empty((slots, 84 * 84), dtype=torch.uint8, device=device)


class FrameReplay:
    """Uniform replay that stores each frame once, 7,056 bytes, and rebuilds stacks of four when it is sampled.

    Every environment owns a ring of slots. A slot holds the newest frame of an observation and what was done there, the
    slot behind it the newest frame of the next observation. An age tells how many frames of the same episode lie before
    a slot, up to 3: a stack never reaches into an older episode but repeats its first frame. A truncated episode takes
    one more slot, for the last frame, which is bootstrapped from but never acted in.

    Args:
        capacity: how many transitions can be drawn at least, over all environments, once so many were added.
        device: where everything is stored, drawn and gathered; frames on the host if it is a GPU too small for them.
    """

    def __init__(self, capacity: int, num_envs: int, num_actions: int, device: torch.device | str = "cpu"):
        self.num_envs, self.device = num_envs, device
        self.ring = math.ceil(capacity / num_envs) + STACK + 1  # the slot being written, and the oldest stack's frames
        slots = num_envs * self.ring
        self.frames = frame_store(slots, torch.device(device))
        self.ages = torch.zeros(slots, dtype=torch.int64, device=device)
        self.actions = torch.zeros(slots, dtype=torch.int64, device=device)
        self.rewards = torch.zeros(slots, device=device)
        self.terminations = torch.zeros(slots, dtype=torch.bool, device=device)
        self.truncations = torch.zeros(slots, dtype=torch.bool, device=device)
        self.teacher_q_values = torch.zeros((slots, num_actions), device=device)
        self.written = torch.zeros(num_envs, dtype=torch.int64, device=device)  # slots filled by each environment
        self.age = torch.zeros(num_envs, dtype=torch.int64, device=device)  # of each environment's next slot
        self.env = torch.arange(num_envs, device=device)

    def slot(self, env: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Where `env` keeps the `time`-th of the slots it has written."""
        return env * self.ring + time % self.ring

    def add(self, obs, actions, rewards, terminations, truncations, next_obs, teacher_q_values=None) -> None:
        """Store one step of every environment.

        Args:
            obs, next_obs: uint8 (num_envs, 4, 84, 84); if the episode ended, next_obs is its last, not the next one's.
            actions, rewards, terminations, truncations: (num_envs,).
            teacher_q_values: float32 (num_envs, num_actions) at obs, or None where nothing is distilled.
        """
        tensor = partial(torch.as_tensor, device=self.device)
        here, behind = self.slot(self.env, self.written), self.slot(self.env, self.written + 1)
        terminations, truncations = tensor(terminations), tensor(truncations)
        for slots, stacks in ((here, obs), (behind, next_obs)):
            newest = torch.as_tensor(stacks[:, -1].reshape(self.num_envs, -1), device=self.frames.device)
            self.frames[slots.to(self.frames.device)] = newest
        self.ages[here] = self.age
        self.actions[here] = tensor(actions)
        self.rewards[here] = tensor(rewards, dtype=torch.float32)
        self.terminations[here] = terminations
        self.truncations[here] = truncations
        self.truncations[behind] = False
        if teacher_q_values is not None:
            self.teacher_q_values[here] = teacher_q_values
        self.written += 1 + truncations.long()
        self.age = torch.where(terminations | truncations, 0, (self.age + 1).clamp(max=STACK - 1))

    def sample(self, batch_size: int, n_step: int, gamma: float, generator: torch.Generator) -> Batch:
        """Draw transitions uniformly, with replacement; n-step returns stop where the episode ends.

        The newest n_step - 1 of an environment wait for their rewards, so each must have written n_step slots. The draw
        of a last frame goes to the truncated step before it, which thus comes up twice as often: one in 27,000 steps.
        """
        draw = partial(torch.rand, batch_size, dtype=torch.float64, generator=generator, device=self.device)
        env = (draw() * self.num_envs).long()
        written = self.written[env]
        choices = written.clamp(max=self.ring - STACK - 1) - (n_step - 1)
        time = written - n_step - (draw() * choices).long()
        time = time - self.truncations[self.slot(env, time - 1)].long()  # never a last frame

        slots = self.slot(env, time)
        offsets = torch.arange(n_step, device=self.device)
        window = self.slot(env[:, None], time[:, None] + offsets)  # (batch, n_step)
        ended = self.terminations[window] | self.truncations[window]
        in_episode = ended.cumsum(1) - ended.long() == 0  # up to the step that ends it
        steps = in_episode.sum(1)
        terminated = (self.terminations[window] & in_episode).any(1)
        return Batch(
            obs=self.stack(env, time, self.ages[slots]),
            actions=self.actions[slots],
            returns=(self.rewards[window] * in_episode * gamma**offsets).sum(1),
            discounts=gamma**steps * ~terminated,
            next_obs=self.stack(env, time + steps, self.ages[slots] + steps),
            teacher_q_values=self.teacher_q_values[slots],
        )

    def stack(self, env: torch.Tensor, time: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
        """Observations uint8 (batch, 4, 84, 84) whose newest frame is the `time`-th of `env`."""
        back = torch.arange(STACK - 1, -1, -1, device=self.device).minimum(age[:, None])  # (batch, 4)
        slots = self.slot(env[:, None], time[:, None] - back)
        frames = self.frames.index_select(0, slots.flatten().to(self.frames.device))
        return frames.to(self.device, non_blocking=True).view(-1, STACK, 84, 84)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore `state_dict` of a replay of the same shape; ValueError for any other."""
        refuse_unlike({name: state[name] for name in self.state_dict()}, self.state_dict())
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def pack_frames(self, since: list[int]) -> list[tuple[int, int, torch.Tensor]]:
        """(env, first slot, zlib-compressed frames) of what each environment has written from slot `since[env]` on."""
        blocks = []
        for env, (start, written) in enumerate(zip(since, self.written.tolist())):
            start = max(start, written + 1 - self.ring)
            blocks += [(env, first, min(first + BLOCK, written + 1)) for first in range(start, written + 1, BLOCK)]

        def compress(block: tuple[int, int, int]) -> tuple[int, int, torch.Tensor]:
            env, first, end = block
            frames = self.frames[self.slot(env, torch.arange(first, end, device=self.frames.device))]
            packed = zlib.compress(frames.cpu().numpy(), level=1)
            return env, first, torch.frombuffer(bytearray(packed), dtype=torch.uint8)

        with ThreadPoolExecutor() as pool:
            return list(pool.map(compress, blocks))

    def unpack_frames(self, blocks: list[tuple[int, int, torch.Tensor]]) -> None:
        for env, first, packed in blocks:
            zlib_stream = zlib.decompressobj()
            frames = zlib_stream.decompress(packed.numpy(), BLOCK * 84 * 84 + 1)
            if not zlib_stream.eof:
                raise ValueError("not the frames that were packed")
            frames = torch.frombuffer(bytearray(frames), dtype=torch.uint8).view(-1, 84 * 84)
            slots = self.slot(env, torch.arange(first, first + len(frames), device=self.frames.device))
            self.frames[slots] = frames.to(self.frames.device)


# --- The mathematics ---


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """From `start` at step 0 to `end` at step `duration`, and `end` from there on."""
    return end if step >= duration else start + (end - start) * step / duration


def due(step: int, stride: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (step, step + stride]: periodic work under any stride; never if 0."""
    return every > 0 and (step + stride) // every > step // every


def distill_coefficient(student_return, teacher_return, baseline_return=0.0, step=0, distill_steps=None) -> float:
    """lambda = 1[t < t0] clip(1 - G_student / G_teacher, 0, 1), with returns G above the baseline (section 4.1).

    It is 1 while student_return is None, since too few games are over; distill_steps, t0, may be None for never.
    """
    if distill_steps is not None and step >= distill_steps:
        return 0.0
    if student_return is None:
        return 1.0
    return min(1.0, max(0.0, 1 - (student_return - baseline_return) / (teacher_return - baseline_return)))


def qdagger_loss(q_values, next_q_values, batch: Batch, distill_weight, temperature: float = 1.0, huber: bool = False):
    """loss = td_loss + distill_weight KL(teacher || student), both terms means over the batch.

    Args:
        q_values: the student's, float32 (batch, num_actions) at batch.obs.
        next_q_values: the target network's, float32 (batch, num_actions) at batch.next_obs.
        distill_weight: distill_coef times lambda, a number or a scalar tensor.

    Returns: loss, td_loss, distill_loss; scalars.
    """
    td_target = batch.returns + batch.discounts * next_q_values.detach().max(1).values
    q_taken = q_values.gather(1, batch.actions[:, None]).squeeze(1)
    td_loss = F.smooth_l1_loss(q_taken, td_target) if huber else F.mse_loss(q_taken, td_target)
    student = F.log_softmax(q_values / temperature, dim=1)
    teacher = F.log_softmax(batch.teacher_q_values.detach() / temperature, dim=1)
    distill_loss = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return td_loss + distill_weight * distill_loss, td_loss, distill_loss


@torch.no_grad()
def act(network: Callable, obs: torch.Tensor, epsilon: float, generator: torch.Generator):
    """epsilon-greedy actions int64 (batch,), and the Q-values (batch, num_actions) behind them."""
    q_values = network(obs)
    draw = partial(torch.rand, len(obs), generator=generator, device=obs.device)
    random_actions = (draw() * q_values.shape[1]).long()
    return torch.where(draw() < epsilon, random_actions, q_values.argmax(1)), q_values


# --- Models on disk and on the hub ---


def write(content: dict | list, path: Path) -> bool:
    """torch.save beside `path`, then rename: never half a file. A full disk costs this file and a line, not the run."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
        os.replace(part, path)
        return True
    except (OSError, RuntimeError) as error:
        cause = error.__context__ or error  # of a full disk torch's own error says nothing
        tqdm.write(f"cannot write {path}: {first_line(cause)}; going on without it")
        with suppress(OSError):
            part.unlink(missing_ok=True)
        return False


def load(file: Path | io.BytesIO, **options):
    """What torch.save wrote, if it is whole: tensors and plain values, never code, and no more bytes than it has."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()) or archive.testzip():
                raise ValueError("its contents are not those that were written")
    if isinstance(file, io.BytesIO):
        file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True, **options)


SB3_LAYERS = {"cnn.0": "0", "cnn.2": "2", "cnn.4": "4", "linear.0": "7"}  # of NatureCNN there, of TeacherNetwork here


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A model's tensors under our names: from a state dict, or from `policy.pth` in a Stable-Baselines3 DQN zip.

    Nothing else in the zip is opened.
    """
    if not zipfile.is_zipfile(path):
        return load(path)
    with zipfile.ZipFile(path) as archive:  # torch's own files are zips as well
        if "policy.pth" not in archive.namelist():
            return load(path)
        if archive.getinfo("policy.pth").file_size > 100_000_000:
            raise ValueError("policy.pth is far too large for a Nature CNN")
        policy = load(io.BytesIO(archive.read("policy.pth")))
    layers = {f"q_net.features_extractor.{theirs}": f"network.{ours}" for theirs, ours in SB3_LAYERS.items()}
    layers["q_net.q_net.0"] = "network.9"
    return {f"{layers[layer]}.{kind}": policy[f"{layer}.{kind}"] for layer in layers for kind in ("weight", "bias")}


def frozen_network(state: dict[str, torch.Tensor], num_actions: int) -> AtariNetwork:
    """A float32 network that nothing trains; its tensors tell Nature CNN from Impala-CNN."""
    if not all(value.is_floating_point() and value.layout == torch.strided for value in state.values()):
        raise ValueError("its weights are not dense floating-point numbers")
    network = (TeacherNetwork if "network.9.bias" in state else QNetwork)(num_actions)
    network.load_state_dict(state)
    if not all(parameter.isfinite().all() for parameter in network.parameters()):
        raise ValueError("some of its weights are not finite")
    return network.requires_grad_(False)


def load_model(path: Path, num_actions: int, flag: str) -> AtariNetwork:
    """The frozen network in a model file (see read_state); UserError names `flag` if it is none for this game."""
    with user_error(f"{flag} {path}: no Nature CNN or Impala-CNN can be read there"):
        state = read_state(path)
        outputs = len(list(state.values())[-1])
        if outputs != num_actions:
            raise UserError(f"{flag} {path}: a network for {outputs} actions, but --env-id has {num_actions}")
        return frozen_network(state, num_actions)


def find_teacher(args: Args) -> tuple[Path, str]:
    """The teacher's file, and why that one: the path given, else the hub's; out of its reach, its cache's, else ours.

    Whatever the hub answers but a file is a UserError: the bundled teacher is no stand-in for a wrong name.
    """
    if args.teacher != "auto":
        return Path(args.teacher), "as given"
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    repo = args.teacher_policy_hf_repo or f"cleanrl/{args.env_id}-{args.teacher_model_exp_name}-seed1"
    name = repo.split("/")[-1]
    file = f"{name}.zip" if name.startswith("dqn-") else f"{args.teacher_model_exp_name}.cleanrl_model"
    with user_error(f"--teacher-policy-hf-repo {repo}: no {file} from there"):
        question = partial(get_hf_file_metadata, hf_hub_url(repo, file), timeout=5)
        try:  # once and not for long, since the client by itself tries again for half a minute
            ThreadPoolExecutor(1).submit(question).result(timeout=8)
        except errors.HfHubHTTPError:
            raise
        except Exception:
            cached = try_to_load_from_cache(repo, file)
        else:
            return Path(hf_hub_download(repo, file)), f"from the hub, {repo}"
    if cached:
        return Path(cached), f"from the cache of {repo}: the hub is out of reach"
    bundled = Path(__file__).parent / "teachers" / f"{args.env_id}.cleanrl_model"
    if repo != f"cleanrl/{args.env_id}-dqn_atari-seed1" or not bundled.exists():
        raise UserError(f"--teacher auto: the hub is out of reach and {repo} not in its cache; give a PATH")
    if hashlib.sha256(bundled.read_bytes()).hexdigest() not in bundled.with_suffix(".md").read_text():
        raise UserError(f"--teacher auto: {bundled} is damaged, its SHA-256 is not the one on its card; fetch it again")
    return bundled, "bundled: the hub is out of reach"


def load_teacher_buffer(replay: FrameReplay, path: Path, made_with: dict) -> None:
    """Fill `replay` from `path`; UserError if the file is damaged or was made with other settings."""
    with user_error(f"--teacher-buffer {path}: not a readable buffer"):
        content = load(path, mmap=True)
        differing = [name for name in made_with if content["made_with"][name] != made_with[name]]
        if differing:
            raise UserError(f"--teacher-buffer {path}: made with another {', '.join(differing)}; name another file")
        replay.load_state_dict(content["replay"])


def check_upload(args: Args) -> str:
    """The hub repository that the model will go to; UserError if nobody is logged in or may not write there."""
    from huggingface_hub import whoami

    with user_error("--upload-model: log in with `hf auth login` first"):
        user = whoami()
    entity = args.hf_entity or user["name"]
    if entity not in [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]:
        raise UserError(f"--hf-entity {entity}: {user['name']} is not a member of it")
    return f"{entity}/{args.env_id}-{args.exp_name}-seed{args.seed}"


def upload_model(args: Args, repo: str, run_dir: Path, returns: list[float]) -> None:
    """Publish the run's directory (model, hyper-parameters, event file, videos) with a card that tells its scores."""
    from huggingface_hub import EvalResult, HfApi, ModelCardData

    task, score = "reinforcement-learning", f"{np.mean(returns):.2f} +/- {np.std(returns):.2f}"
    result = EvalResult(task, args.env_id, args.env_id, metric_type="mean_reward", metric_value=score)
    data = ModelCardData(model_name=args.exp_name, tags=[args.env_id, task], pipeline_tag=task, eval_results=[result])
    command = f"python {Path(__file__).name} --env-id {args.env_id} --evaluate {args.exp_name}.cleanrl_model"
    text = f"# QDagger on {args.env_id}\n\n{score} over {len(returns)} games, epsilon {args.end_e}.\n\n    {command}\n"
    with user_error(f"--upload-model: {repo} did not take {run_dir}, which stays as it is"):
        (run_dir / "README.md").write_text(f"---\n{data}\n---\n{text}")
        HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=run_dir, ignore_patterns="checkpoints/*", commit_message=score)


# --- Acceleration ---


def choose_device(args: Args) -> torch.device:
    """The device to train on, set up for it."""
    if args.cuda and not torch.cuda.is_available():
        print("--cuda: no GPU found, running on the CPU")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.deterministic = args.torch_deterministic
    if FAST_BFLOAT16 and args.amp:
        print("--amp: this CPU is faster in bfloat16, so the networks run in it; --no-amp for float32")
    return device


class Captured:
    """`step()` as one CUDA graph: its kernels run again without Python between them.

    The first call runs it as it is, captures it, and compares what both made of `tensors`, all that it changes, with
    the same draws from `generator`. If they differ or the capture fails: a line, and from then on it runs as it is.
    """

    def __init__(self, step: Callable[[], None], tensors: Sequence[torch.Tensor], generator: torch.Generator):
        self.step, self.tensors, self.generator, self.run = step, tensors, generator, None

    def __call__(self) -> None:
        if self.run is None:
            try:
                self.run = self.capture()
            except Exception as error:
                tqdm.write(f"--capture: {first_line(error)}; going on one kernel at a time")
                self.run = self.step
        self.run()

    def capture(self) -> Callable[[], None]:
        begin, random_state = self.values(), self.generator.get_state()

        @torch.no_grad()
        def rewind() -> None:
            for tensor, value in zip(self.tensors, begin):
                tensor.copy_(value)
            self.generator.set_state(random_state)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):  # the first calls choose algorithms and allocate
                    rewind()
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            plain = self.values()
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph):
                self.step()
            rewind()
            graph.replay()
            for value, expected, before in zip(self.values(), plain, begin):
                if (value - expected).norm() > 0.1 * (expected - before).norm():  # more than rounding
                    raise ValueError("the graph does not do what the step does")
        finally:
            rewind()
        return graph.replay

    @torch.no_grad()
    def values(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.tensors]


class Policy:
    """`act` of a network for so many games, captured where that can be."""

    def __init__(self, network: Callable, num_envs: int, num_actions: int, generator: torch.Generator, capture: bool):
        self.network, self.generator, device = network, generator, generator.device
        self.obs = torch.zeros((num_envs, STACK, 84, 84), dtype=torch.uint8, device=device)  # what was acted on
        self.epsilon = torch.zeros((), device=device)
        self.actions = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.q_values = torch.zeros((num_envs, num_actions), device=device)
        can_be = capture and device.type == "cuda"
        self.step = Captured(self.act, [self.q_values], generator) if can_be else self.act

    def act(self) -> None:
        actions, q_values = act(self.network, self.obs, self.epsilon, self.generator)
        self.actions.copy_(actions)
        self.q_values.copy_(q_values)

    def __call__(self, obs: np.ndarray, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions and Q-values, as of `act`; the next call overwrites them."""
        self.obs.copy_(torch.as_tensor(obs))
        self.epsilon.fill_(epsilon)
        self.step()
        return self.actions, self.q_values


# --- Evaluation ---


def evaluate(
    network: Callable, args: Args, episodes: int, device, epsilon=None, video: Path | None = None, stop=()
) -> list[float]:
    """Raw returns of `episodes` whole games at epsilon, by default end_e; one is filmed if `video` is a path.

    Stopped is raised as soon as there is a signal in `stop`.

    Games and generator are its own: an evaluation changes nothing in the training around it. Up to ten games run side
    by side; how many each environment plays is fixed beforehand, so that short games are not preferred.
    """
    num_envs = min(episodes, 10)
    games = AtariGames(args, num_envs, args.seed + 20_000)
    left = {game: len(range(env, episodes, num_envs)) for env, game in enumerate(games.games)}
    epsilon = args.end_e if epsilon is None else epsilon
    generator, returns = torch.Generator(device).manual_seed(args.seed), []
    if video:
        games.games[0].film(video)
    with closing(games), tqdm(total=episodes, desc="evaluation", unit="game", leave=False) as bar:
        while left:
            if stop:
                raise Stopped(stop[0])
            obs = torch.as_tensor(np.stack([game.obs for game in left]), device=device)
            actions, _ = act(network, obs, epsilon, generator)
            for game, action in zip(left, actions.tolist()):
                game.send(action)
            for game in [*left]:
                game.recv()
                if game.ended:
                    returns.append(game.ended[0])
                    bar.update()
                    left[game] -= 1
                    if left[game] == 0:
                        del left[game]
    return returns


def play(args: Args) -> None:
    """--evaluate: print the score of every game of a saved model, and their mean and standard deviation."""
    validate(args)
    device = choose_device(args)
    num_actions = AtariGame(args.env_id, args.seed).num_actions
    network = load_model(args.evaluate, num_actions, "--evaluate").to(device, memory_format=torch.channels_last)
    video = args.evaluate.parent / "videos" / "evaluation.mp4" if args.capture_video else None
    returns = evaluate(network, args, args.eval_episodes, device, video=video)
    print(*(f"game {game}: {game_return:g}" for game, game_return in enumerate(returns, 1)), sep="\n")
    print(f"{np.mean(returns):.2f} ± {np.std(returns):.2f} over {len(returns)} games of {args.env_id}")
    if video:
        print(f"video of one of them: {video}")


# --- Checkpoints ---

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is Slurm's warning


class Stopped(Exception):
    """A signal, whose number it carries, asked for an end."""


# What may be another in a resumed run; any other flag would make it another experiment.
FREE = "resume total_timesteps checkpoint_frequency eval_frequency eval_episodes evaluate teacher_buffer track "
FREE += "wandb_project_name wandb_entity capture_video save_model upload_model hf_entity"


def plain(args: Args) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}


def args_of(run_dir: Path) -> Args:
    """The flags that a run was started with."""
    with user_error(f"--resume {run_dir}: no run that can be resumed"):
        settings = json.loads((run_dir / "hyperparameters.json").read_text())
        paths = {"teacher_buffer": settings["teacher_buffer"] and Path(settings["teacher_buffer"]), "evaluate": None}
        known = {each.name: settings[each.name] for each in fields(Args)}
        return Args(**known | paths | {"resume": run_dir})


def refuse_changes(args: Args, before: dict) -> None:
    """UserError for the first flag of a resumed run that would make it another experiment."""
    for name, value in plain(args).items():
        if name not in FREE.split() and value != before[name]:
            rule = f"a resumed run keeps its {before[name]}; leave out --resume for a new one"
            raise UserError(f"--{name.replace('_', '-')} {value}: {rule}")


def refuse_unlike(value, model) -> None:
    """ValueError unless `value` has the type of `model`, and inside its keys, shapes and dtypes or finite numbers."""
    like = type(value) is type(model) or isinstance(model, torch.Tensor)
    if isinstance(model, torch.Tensor):
        like = isinstance(value, torch.Tensor) and value.layout == torch.strided  # indices of sparse ones may lie
        like = like and (value.shape, value.dtype) == (model.shape, model.dtype)
    elif like and isinstance(model, Mapping):
        like = value.keys() == model.keys()
        for key in model:
            refuse_unlike(value[key], model[key])
    elif like and isinstance(model, list | tuple):
        like = all(isinstance(each, float) and math.isfinite(each) for each in value)
    elif like:
        like = math.isfinite(value)
    if not like:
        raise ValueError("not what was saved: another type or shape")


def rewind_events(run_dir: Path, sizes: dict[str, int]) -> None:
    """Forget what was logged after the checkpoint, since it will be logged again."""
    for path in run_dir.glob("events.*"):
        if path.name in sizes:
            os.truncate(path, min(sizes[path.name], path.stat().st_size))
        else:
            path.unlink()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the first SIGINT, SIGTERM or SIGUSR1; the second one quits at once."""
    received: list[int] = []

    def handle(number: int, _) -> None:
        received.append(number)
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Checkpoints:
    """The last two complete states of a run, in runs/RUN/checkpoints.

    Each is a file of its own and names the files with the frames of its replays, which are written only once: a
    checkpoint adds those that are new since the one before.
    """

    def __init__(self, run_dir: Path):
        self.directory = run_dir / "checkpoints"
        files = self.directory.glob("[0-9][0-9][0-9][0-9][0-9][0-9][-.]*")
        self.count = max((int(path.name[:6]) for path in files), default=0)  # no name is used twice
        self.frames: dict[str, list] = {}  # of the newest: (file, slots written by each environment) for each replay
        self.kept: list[set[str]] = []  # files of the last two
        self.time, self.steps = time.monotonic(), 0  # of the last attempt

    def due(self, steps: int, frequency: int | None) -> bool:
        if frequency is None:
            return time.monotonic() - self.time > 600
        return frequency > 0 and steps - self.steps >= frequency

    def save(self, content: dict, replays: dict[str, FrameReplay], steps: int) -> bool:
        """Write `content`, plain values and tensors, and the replays; if that fails, a line, and the last one stays."""
        self.time, self.steps, self.count = time.monotonic(), steps, self.count + 1
        with suppress(OSError):
            self.directory.mkdir(exist_ok=True)
        content["frames"], content["replays"] = {}, {}
        for name, replay in replays.items():
            files, written = self.frames.get(name, []), replay.written.tolist()
            if not all((self.directory / file).exists() for file, _ in files):
                files = []  # somebody took them away
            oldest = [slots + 1 - replay.ring for slots in written]
            files = [each for each in files if any(end > old for end, old in zip(each[1], oldest))]
            since = files[-1][1] if files else [0] * replay.num_envs
            if since != written:
                path = self.directory / f"{self.count:06d}-{name}.frames"
                if not write(replay.pack_frames(since), path):
                    return False
                files = [*files, (path.name, written)]
            content["frames"][name] = files
            content["replays"][name] = {key: value for key, value in replay.state_dict().items() if key != "frames"}
        path = self.directory / f"{self.count:06d}.checkpoint"
        if not write(content, path):
            return False
        self.keep(path, content["frames"])
        for each in self.directory.iterdir():
            if not any(each.name in files for files in self.kept):
                each.unlink()
        return True

    def keep(self, path: Path, frames: dict[str, list]) -> None:
        """From now on `path`, with these frames, is the newest, and the one before it the oldest."""
        self.frames = frames
        self.kept = [*self.kept[-1:], {path.name, *(file for files in frames.values() for file, _ in files)}]

    def load(self) -> tuple[dict, dict[str, list]]:
        """The newest content whose files are all whole, and its frames; UserError if there is none."""
        for path in sorted(self.directory.glob("*.checkpoint"), reverse=True):
            try:
                content, frames = load(path), {}
                for name, files in content["frames"].items():
                    blocks = [load(self.directory / Path(file).name) for file, _ in files]
                    frames[name] = [block for of_file in blocks for block in of_file]
                self.keep(path, content["frames"])
                return content, frames
            except Exception as error:
                print(f"--resume: {path.name} is damaged ({first_line(error)}), looking for an older one")
        raise UserError(f"--resume {self.directory.parent}: no readable checkpoint in it")


# --- Training ---


class Learner:
    """The student, its target network and its optimizer, and the one gradient step of both phases."""

    def __init__(self, args: Args, num_actions: int, device: torch.device):
        self.args, self.device = args, device
        torch.manual_seed(args.seed)  # the network's first weights
        self.generator = torch.Generator(device).manual_seed(args.seed)  # exploration and sampling
        self.q_network = NETWORKS[args.network](num_actions).to(device, memory_format=torch.channels_last)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        self.distill_weight = torch.zeros((), device=device)  # distill_coef times lambda
        self.metrics: dict[str, torch.Tensor] = {}  # of the last gradient step

        on_gpu = device.type == "cuda"
        parameters, rates = list(self.q_network.parameters()), {"lr": args.learning_rate, "eps": args.adam_eps}
        self.optimizer = torch.optim.Adam(parameters, **rates, fused=True, capturable=on_gpu)
        for parameter in parameters:  # Adam makes its averages in its first step, but they are to be restored, captured
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # changes no weight, since there is no gradient
        for state in self.optimizer.state.values():
            state["step"].zero_()
        if args.compile:
            with user_error("--compile: torch.compile fails here"):
                for network in (self.q_network, self.target_network):
                    network.compile()
                    network(torch.zeros((args.num_envs, STACK, 84, 84), dtype=torch.uint8, device=device))

    def q_values(self, obs: torch.Tensor, network: nn.Module | None = None) -> torch.Tensor:
        """float32 (batch, num_actions) of the student, or of its target network."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp, cache_enabled=False):
            return (network or self.q_network)(obs)

    def gradient_step(self, replay: FrameReplay) -> None:
        args = self.args
        batch = replay.sample(args.batch_size, args.n_step, args.gamma, self.generator)
        with torch.no_grad():
            next_q_values = self.q_values(batch.next_obs, self.target_network)
        q_values = self.q_values(batch.obs)
        loss, td_loss, distill_loss = qdagger_loss(
            q_values, next_q_values, batch, self.distill_weight, args.temperature, args.huber
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.metrics.update(loss=loss, td_loss=td_loss, distill_loss=distill_loss, q_values=q_values.mean())

    def changed(self) -> list[torch.Tensor]:
        """All that a gradient step changes."""
        averages = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.q_network.parameters(), *averages]

    def step_on(self, replay: FrameReplay) -> Callable[[], None]:
        """`gradient_step` on `replay`, captured where that can be."""
        step = partial(self.gradient_step, replay)
        can_be = self.args.capture and replay.frames.is_cuda
        return Captured(step, self.changed(), self.generator) if can_be else step

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        torch._foreach_lerp_(list(self.target_network.parameters()), list(self.q_network.parameters()), tau)

    def state_dict(self) -> dict:
        networks = {"q_network": self.q_network.state_dict(), "target_network": self.target_network.state_dict()}
        return networks | {"optimizer": self.optimizer.state_dict()["state"], "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict` of a learner with the same networks; ValueError for any other."""
        refuse_unlike(state, self.state_dict())
        self.q_network.load_state_dict(state["q_network"])
        self.target_network.load_state_dict(state["target_network"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})
        self.generator.set_state(state["generator"].cpu())


@dataclass
class Progress:
    """The work done so far: each phase is a loop that goes on from here."""

    teacher_steps: int = 0
    offline_steps: int = 0
    online_steps: int = 0
    online_seconds: float = 0.0  # evaluations excluded
    recent_returns: list[float] = field(default_factory=list)  # of the last 10 whole online games
    distilling: bool = False  # whether lambda may still be above 0
    evaluated: int = -1  # step of this phase's last evaluation, as logged
    scores: list[float] = field(default_factory=list)  # of its games

    @property
    def steps(self) -> int:
        return self.teacher_steps + self.offline_steps + self.online_steps

    @property
    def score(self) -> float:
        return float(np.mean(self.scores)) if self.scores else math.nan

    @property
    def student_return(self) -> float | None:
        """What lambda is made of: None until 10 games are over."""
        return float(np.mean(self.recent_returns)) if len(self.recent_returns) == 10 else None


def measure_teacher(args: Args, teacher: nn.Module, device: torch.device, stop: Sequence[int]) -> tuple[float, float]:
    """Phase 0: mean returns of the teacher and of the baseline; UserError if the teacher is not the better one."""
    teacher_return = float(np.mean(evaluate(teacher, args, args.teacher_eval_episodes, device, stop=stop)))
    baseline_return, advice = 0.0, "--return-baseline random or "
    if args.return_baseline == "random":
        chance = evaluate(teacher, args, args.teacher_eval_episodes, device, epsilon=1.0, stop=stop)
        baseline_return = float(np.mean(chance))
        advice = ""
    print(f"teacher: mean return {teacher_return:.2f} over {args.teacher_eval_episodes} games")
    if teacher_return <= baseline_return:
        comparison = f"mean return {teacher_return:.2f} is not above the baseline {baseline_return:.2f}"
        raise UserError(f"--teacher {args.teacher}: its {comparison}, so no lambda; {advice}another teacher")
    return teacher_return, baseline_return


class Log(SummaryWriter):
    """Scalars for TensorBoard. A disk that takes no more costs a line and points, not the run; `flush` tries anew."""

    broken = False

    def attempt(self, write: Callable, *args) -> None:
        try:
            if not self.broken:
                write(*args)
        except Exception as error:  # of the thread that writes, and from then on of every call
            tqdm.write(f"cannot log to {self.log_dir}: {first_line(error)}; trying again at the next checkpoint")
            self.broken = True

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.attempt(super().add_scalar, tag, value, step)

    def flush(self) -> None:
        if self.broken:
            self.file_writer = self.all_writers = None  # the next point opens a new file
        self.broken = False
        self.attempt(super().flush)

    def close(self) -> None:
        self.attempt(super().close)


def start_run(args: Args, facts: dict[str, str]) -> tuple[Path, Log]:
    """A directory under runs/ with every flag and the `facts` in it, and a writer of event files there.

    It is a new one, or that of --resume.
    """
    run_dir = args.resume or Path("runs") / f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    # Log says in a line what its thread died of.
    threading.excepthook = lambda died: isinstance(died.exc_value, OSError) or threading.__excepthook__(died)
    with user_error(f"cannot start {run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
        if args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_dir.name}
            wandb.init(**names, id=run_dir.name, resume="allow", config=asdict(args), sync_tensorboard=True)
        settings = asdict(args) | facts
        (run_dir / "hyperparameters.json").write_text(json.dumps(settings, indent=2, default=str))
        log = Log(run_dir)
        if not args.resume:
            rows = "\n".join(f"|{name}|{value}|" for name, value in settings.items())
            log.add_text("hyperparameters", f"|name|value|\n|-|-|\n{rows}")
    return run_dir, log


def train(args: Args, stop: Sequence[int] = ()) -> Path:
    """Run all phases, or what is left of a run to be resumed, and return its directory.

    UserError, before any work, for what cannot work. Once there is a signal in `stop`: a checkpoint, then Stopped.
    """
    torch.set_flush_denormal(True)  # Adam's averages decay into denormal numbers, which make a CPU crawl
    validate(args)
    upload_repo = check_upload(args) if args.upload_model else ""
    device, actions_count = choose_device(args), AtariGame(args.env_id, args.seed).num_actions
    teacher, checkpoints, saved, saved_frames, progress = None, None, {}, {}, Progress()
    facts = {"device": str(device), "torch": str(torch.__version__)}
    if args.resume:
        checkpoints = Checkpoints(args.resume)
        saved, saved_frames = checkpoints.load()
        with user_error(f"--resume {args.resume}: its checkpoint does not fit"):
            refuse_changes(args, saved["args"])
            refuse_unlike(saved["progress"], asdict(progress))
            progress, facts = Progress(**saved["progress"]), saved["facts"]
            checkpoints.steps = progress.steps
            if saved["teacher"]:
                teacher = frozen_network(saved["teacher"], actions_count)
    elif args.teacher != "none":
        path, reason = find_teacher(args)
        print(f"teacher: {path}, {reason}")
        teacher = load_model(path, actions_count, "--teacher")
        facts |= {"teacher_path": str(path), "teacher_reason": reason}
        facts |= {"teacher_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        progress.distilling = True
    offline_steps = 0
    if teacher:
        teacher.to(device, memory_format=torch.channels_last)
        offline_steps = args.offline_steps

    new_replay = partial(FrameReplay, num_actions=actions_count, device=device)
    with user_error("--buffer-size, --teacher-steps: too large for the memory"):
        replay = new_replay(args.buffer_size, args.num_envs)
        before_online = teacher and ("teacher" in saved["replays"] if saved else offline_steps > 0)
        teacher_replay = new_replay(args.teacher_steps, args.teacher_envs) if before_online else None
    if teacher_replay:
        names = ["env_id", "repeat_action_probability", "num_envs", "teacher_steps", "start_e", "end_e"]
        made_with = {name: getattr(args, name) for name in names} | {"teacher": facts["teacher_sha256"]}
        if args.teacher_buffer and args.teacher_buffer.exists() and not saved:
            load_teacher_buffer(teacher_replay, args.teacher_buffer, made_with)
            progress.teacher_steps = args.teacher_steps

    learner = Learner(args, actions_count, device)
    if saved:
        with user_error(f"--resume {args.resume}: its checkpoint does not fit"):
            refuse_unlike(saved["returns"], (0.0, 0.0))
            teacher_return, baseline_return = saved["returns"]
            learner.load_state_dict(saved.pop("learner"))
            for name, state in saved.pop("replays").items():
                of_name = {"teacher": teacher_replay, "student": replay}[name]
                of_name.load_state_dict(state | {"frames": of_name.frames})
                of_name.unpack_frames(saved_frames.pop(name))
            rewind_events(args.resume, saved["events"])
    else:
        teacher_return, baseline_return = measure_teacher(args, teacher, device, stop) if teacher else (0.0, 0.0)
    run_dir, log = start_run(args, facts)
    checkpoints = checkpoints or Checkpoints(run_dir)
    if teacher and not saved:
        log.add_scalar("charts/teacher/avg_episodic_return", teacher_return, 0)

    def evaluate_student(tag: str, step: int, video: Path | None = None) -> None:
        try:
            returns = evaluate(learner.q_values, args, args.eval_episodes, device, video=video, stop=stop)
        except Stopped as stopped:  # a checkpoint was written right before
            raise Stopped(*stopped.args, run_dir) from None
        progress.evaluated, progress.scores = step, returns
        log.add_scalar(tag, progress.score, step)
        save_model()

    def save_model() -> bool:
        """Whether it is on disk, if it should be."""
        model = run_dir / f"{args.exp_name}.cleanrl_model"
        return not args.save_model or write(learner.q_network.state_dict(), model)

    def read_metrics() -> dict[str, float]:
        """The last gradient step's; a UserError if the loss is no number any more."""
        values = {name: value.item() for name, value in learner.metrics.items()}
        if not math.isfinite(values.get("loss", 0.0)):
            after = f"{progress.offline_steps} offline updates and {progress.online_steps} online steps"
            raise UserError(f"the loss is {values['loss']} after {after}; {run_dir} keeps its last checkpoint")
        return values

    def save(games: AtariGames | None = None) -> bool:
        """A checkpoint, unless the last update went wrong; whether it is on disk."""
        read_metrics()
        log.flush()
        content = {
            "args": plain(args),
            "facts": facts,
            "progress": asdict(progress),
            "returns": (teacher_return, baseline_return),
            "teacher": teacher.state_dict() if teacher else None,
            "learner": learner.state_dict(),
            "games": games and games.state_dict(),
            "events": {path.name: path.stat().st_size for path in run_dir.glob("events.*")},
        }
        replays = {"teacher": teacher_replay} if teacher_replay else {"student": replay}
        return checkpoints.save(content, replays, progress.steps)

    def safe_point(games: AtariGames | None = None) -> None:
        """Between two steps: a checkpoint if it is time for one, and the end if a signal asked for it."""
        if stop:
            save(games)
            raise Stopped(stop[0], run_dir)
        if checkpoints.due(progress.steps, args.checkpoint_frequency):
            save(games)

    def start_games(num_envs: int, seed: int) -> AtariGames:
        """New games, or those of the checkpoint."""
        games, state = AtariGames(args, num_envs, seed), saved.pop("games", None)
        if state:
            with user_error(f"--resume {args.resume}: its games do not fit"):
                games.load_state_dict(state)
        return games

    # Phase 1: the teacher fills its buffer.
    if teacher_replay and progress.teacher_steps < args.teacher_steps:
        games = start_games(args.teacher_envs, args.seed + 10_000)
        policy = Policy(teacher, args.teacher_envs, actions_count, learner.generator, args.capture)
        with tqdm(total=args.teacher_steps, initial=progress.teacher_steps, desc="teacher buffer", unit="step") as bar:
            while progress.teacher_steps < args.teacher_steps:
                safe_point(games)
                epsilon = linear_schedule(args.start_e, args.end_e, args.teacher_steps, progress.teacher_steps)
                obs = games.obs
                actions, q_values = policy(obs, epsilon)
                games.step_async(actions)
                *outcome, ended = games.step_wait()
                teacher_replay.add(obs, actions, *outcome, q_values)
                progress.teacher_steps += args.teacher_envs
                bar.update(args.teacher_envs)
                for _, game_return, _ in ended:
                    bar.set_postfix_str(f"return={game_return:.1f}, λ=1.00", refresh=False)
        if args.teacher_buffer:
            write({"made_with": made_with, "replay": teacher_replay.state_dict()}, args.teacher_buffer)

    # Phase 2: the student learns from the teacher's buffer alone.
    if teacher_replay:
        learner.distill_weight.fill_(args.distill_coef)
        gradient_step = learner.step_on(teacher_replay)
        with tqdm(total=offline_steps, initial=progress.offline_steps, desc="offline", unit="update") as bar:
            while True:
                at_end = progress.offline_steps >= offline_steps
                if (at_end or progress.offline_steps % 100_000 == 0) and progress.evaluated != progress.offline_steps:
                    save()
                    evaluate_student("charts/offline/avg_episodic_return", progress.offline_steps)
                if at_end:
                    break
                safe_point()
                gradient_step()
                progress.offline_steps += 1
                bar.update()
                if progress.offline_steps % args.target_network_frequency == 0:
                    learner.update_target(args.tau)
                if progress.offline_steps % 100 == 0:
                    values = read_metrics()
                    for name, tag in {"loss": "loss", "td_loss": "q_loss", "distill_loss": "distill_loss"}.items():
                        log.add_scalar(f"charts/offline/{tag}", values[name], progress.offline_steps)
                    bar.set_postfix_str(f"return={progress.score:.1f}, λ=1.00", refresh=False)
        learner.update_target(tau=1.0)
        teacher_replay, progress.evaluated = None, -1

    # Phase 3: the student plays on by itself, and the teacher fades.
    learning_starts = max(args.learning_starts, args.warm_up(args.num_envs))
    exploration_steps = args.exploration_fraction * args.total_timesteps
    coefficient = 0.0
    learner.metrics.clear()
    gradient_step = learner.step_on(replay)
    policy = Policy(learner.q_values, args.num_envs, actions_count, learner.generator, args.capture)
    games, film_next = start_games(args.num_envs, args.seed), 0
    bar = tqdm(total=args.total_timesteps, initial=progress.online_steps, desc="online", unit="step")
    with closing(games), bar:
        while True:
            begin, global_step = progress.online_steps, offline_steps + progress.online_steps
            at_end = begin >= args.total_timesteps
            periodic = begin > 0 and due(begin - args.num_envs, args.num_envs, args.eval_frequency)
            if (at_end or periodic) and progress.evaluated != global_step:
                save(games)
                video = run_dir / "videos" / "evaluation.mp4" if args.capture_video and at_end else None
                evaluate_student("eval/episodic_return", global_step, video)
            if at_end:
                complete = save_model() and save(games)
                break
            safe_point(games)

            start = time.perf_counter()
            epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, global_step)
            if progress.distilling:
                coefficient = distill_coefficient(
                    progress.student_return, teacher_return, baseline_return, begin, args.distill_steps
                )
                learner.distill_weight.fill_(args.distill_coef * coefficient)
                over = args.distill_latch or (args.distill_steps is not None and begin >= args.distill_steps)
                progress.distilling = coefficient > 0 or not over

            obs = games.obs
            actions, _ = policy(obs, epsilon)
            games.step_async(actions)  # they go on while the student learns
            for step in range(begin + 1, begin + args.num_envs + 1):
                if step > learning_starts and step % args.train_frequency == 0:
                    gradient_step()
                if step % args.target_network_frequency == 0:
                    learner.update_target(args.tau)
            teacher_q_values = teacher(policy.obs) if progress.distilling else None
            *outcome, ended = games.step_wait()
            replay.add(obs, actions, *outcome, teacher_q_values)
            progress.online_steps += args.num_envs
            progress.online_seconds += time.perf_counter() - start
            bar.update(args.num_envs)

            global_step = offline_steps + progress.online_steps
            for env, game_return, game_length in ended:
                if args.capture_video and env == 0 and progress.online_steps >= film_next:
                    games.games[0].film(run_dir / "videos" / f"training-{global_step}.mp4")
                    film_next = 2 * progress.online_steps
                log.add_scalar("charts/episodic_return", game_return, global_step)
                log.add_scalar("charts/episodic_length", game_length, global_step)
                progress.recent_returns = [*progress.recent_returns[-9:], game_return]
            if due(begin, args.num_envs, 100):
                speed = progress.online_steps / progress.online_seconds
                scalars = {"charts/epsilon": epsilon, "charts/distill_coeff": coefficient, "charts/SPS": speed}
                scalars |= {f"losses/{name}": value for name, value in read_metrics().items()}
                if not progress.distilling:
                    scalars.pop("losses/distill_loss", None)  # there is no teacher to differ from
                for tag, value in scalars.items():
                    log.add_scalar(tag, value, global_step)
                shown = np.mean(progress.recent_returns or [np.nan])
                bar.set_postfix_str(f"return={shown:.1f}, λ={coefficient:.2f}", refresh=False)

    log.close()
    print(f"{run_dir}: {progress.score:.2f} ± {np.std(progress.scores):.2f} over {len(progress.scores)} games")
    if not complete:
        raise UserError(f"the end of {run_dir} is not on disk, see above: make room, then --resume {run_dir}")
    if upload_repo:
        upload_model(args, upload_repo, run_dir, progress.scores)
    return run_dir


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        if args.resume:  # what is not said again is as it was
            args = tyro.cli(Args, description=__doc__, default=args_of(args.resume))
        with stop_signals() as stop:
            play(args) if args.evaluate else train(args, stop)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        number, *run_dir = stopped.args
        how = f"; go on with: python {Path(sys.argv[0]).name} --resume {run_dir[0]}" if run_dir else ""
        print(f"stopped{how}", file=sys.stderr)
        sys.exit(128 + number)


if __name__ == "__main__":
    main()

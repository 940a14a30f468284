"""QDagger on Atari in JAX: a student Impala-CNN takes over from a DQN teacher and plays on by itself.

    python qdagger_dqn_atari_jax_impalacnn.py --env-id BreakoutNoFrameskip-v4               # teach, then play on
    python qdagger_dqn_atari_jax_impalacnn.py --teacher none --network nature --save-model  # train a teacher
    python qdagger_dqn_atari_jax_impalacnn.py --evaluate runs/RUN/MODEL.cleanrl_model       # play a saved model

Reincarnating Reinforcement Learning (Agarwal et al., 2022, arXiv 2206.01626). A step is four emulator frames.

1. Teacher buffer: the teacher plays, ever less at random; its transitions are stored with its Q-values.
2. Offline: the student learns from that buffer alone, with λ = 1.
3. Online: the student learns from its own play; λ falls as its return nears the teacher's.

The loss is the same in phases 2 and 3; its terms are means over a batch, and a reward r is 1, 0 or -1:

    y            = r₁ + γ r₂ + … + γⁿ⁻¹ rₙ + γⁿ (1 − terminated) max_a Q_target(sₙ, a)
    td_loss      = (Q(s, a) − y)²
    distill_loss = KL(π_teacher(·|s) ‖ π(·|s))    with π = softmax(Q / temperature)
    loss         = td_loss + distill_coef · λ · distill_loss
    λ            = 1[t < distill_steps] · clip(1 − G_student / G_teacher, 0, 1)    t: online step, G: mean raw scores

G_student is the mean of the last ten whole games: at first those of the evaluation that ends phase 2, which the games
of phase 3 push out one by one. While there are fewer than ten, λ is 1.

Random numbers follow from the seed and the number of the step. The sibling in PyTorch: qdagger_dqn_atari_impalacnn.py.
"""

import hashlib
import importlib.util
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes at once all that it may, 75% of a GPU
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution")  # 1.4x on a CPU

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch  # reads PyTorch's models, and writes for TensorBoard
import tyro
from ale_py.vector_env import AtariVectorEnv
from huggingface_hub import EvalResult, HfApi, ModelCardData, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax
    from flax import serialization, struct
except ImportError as missing:
    print(f'error: {missing}: pip install -e ".[jax]", on Python 3.11 or newer', file=sys.stderr)
    sys.exit(2)

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
load = partial(torch.load, map_location="cpu", weights_only=True)  # tensors and plain values, never code


@dataclass
class Args:
    # run
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run's name
    seed: int = 1  # seeds networks, exploration, sampling and games
    cuda: bool = True  # train on the GPU if there is one
    track: bool = False  # follow the run on Weights & Biases as well (extra `track`)
    wandb_project_name: str = "cleanRL"  # its project there
    wandb_entity: str | None = None  # its user or team there
    capture_video: bool = False  # film a game of each evaluation to runs/RUN/videos (extra `video`)
    save_model: bool = False  # write the network to runs/RUN/ at each evaluation and checkpoint
    upload_model: bool = False  # upload the saved model to the Hugging Face hub at the end
    hf_entity: str = ""  # user or organisation there; empty: the one logged in

    # environment
    env_id: str = "BreakoutNoFrameskip-v4"  # one of ale-py's games, as GAMENoFrameskip-v4 or ALE/GAME-v5
    num_envs: int = 4  # games side by side, the teacher's eight times as many; updates per step do not depend on it
    repeat_action_probability: float | None = None  # sticky actions; unset: as env_id says, 0 or, for ALE/GAME-v5, 0.25

    # DQN
    network: Literal["impala", "nature"] = "impala"  # the network that learns
    total_timesteps: int = 10_000_000  # environment steps of the online phase
    learning_rate: float = 1e-4  # of Adam; with --final-learning-rate, the one at lambda = 1
    final_learning_rate: float | None = None  # the one at lambda = 0, linear between; unset, or no teacher: constant
    adam_eps: float = 1e-8  # of Adam
    buffer_size: int = 1_000_000  # environment steps in the student's replay; 7.06 GB per million
    gamma: float = 0.99  # discount per step
    tau: float = 1.0  # share of the learning network in a target update; 1 copies it
    target_network_frequency: int = 1000  # gradient steps (offline) or environment steps (online) per target update
    batch_size: int = 32  # transitions per gradient step
    n_step: int = 3  # rewards summed before the target network's value
    huber: bool = False  # Huber instead of squared TD error
    start_e: float = 1.0  # exploration at first, the teacher's during --teacher-steps as well
    end_e: float = 0.01  # exploration in the end, and in every evaluation
    exploration_fraction: float = 0.10  # it falls over this share of total_timesteps, from the first offline step on
    learning_starts: int = 80_000  # online steps before the first online gradient step
    train_frequency: int = 4  # online steps per gradient step

    # QDagger
    teacher_steps: int = 500_000  # environment steps of the teacher's buffer
    offline_steps: int = 500_000  # gradient steps on the teacher's buffer; 0: no such buffer either
    temperature: float = 0.1  # of both policies in the distillation loss
    distill_coef: float = 3.0  # weight of the distillation loss, times lambda
    distill_steps: int | None = None  # online steps after which lambda is 0; unset: never cut off
    distill_latch: bool = False  # once lambda was 0, keep it there
    return_baseline: Literal["zero", "random"] = "zero"  # lambda compares returns above this baseline
    teacher: str = "auto"  # auto (hub, else bundled), none (plain DQN from scratch), or a path: model or SB3 zip
    teacher_policy_hf_repo: str | None = None  # for auto; unset: cleanrl/{env_id}-{teacher_model_exp_name}-seed1
    teacher_model_exp_name: str = "dqn_atari_jax"  # its file there, .cleanrl_model; an SB3 repository has its own zip
    teacher_eval_episodes: int = 10  # games that measure the teacher
    teacher_buffer: str | None = None  # read the teacher's buffer, any seed's, from this file, else write it there

    # speed
    amp: bool = False  # all layers but the last in bfloat16

    # checkpoints and evaluation
    checkpoint_frequency: int | None = None  # steps between them; unset: 10 minutes; 0: only at evaluations and ends
    resume: str | None = None  # go on with this run, runs/RUN, from its last checkpoint, with its flags
    eval_frequency: int = 500_000  # online steps between evaluations, 0: at the end only; offline always 100,000
    eval_episodes: int = 10  # games in each of them
    evaluate: str | None = None  # only play this saved model for eval_episodes games and print the scores


class UserError(Exception):
    """What the user can put right: `main` shows its one line and exits with code 2."""


@contextmanager
def user_error(problem: str):
    """Turn whatever goes wrong inside into a UserError that says `problem` and, in brackets, why."""
    try:
        yield
    except Exception as error:
        why = re.split(r"\n|\. ", str(error).strip() or type(error).__name__)[0][:200]  # its first sentence
        raise error if isinstance(error, UserError) else UserError(f"{problem} ({why})") from None


# --- The method ---


class Batch(NamedTuple):
    obs: jax.Array  # uint8 (batch, 4, 84, 84)
    actions: jax.Array  # int32 (batch,)
    returns: jax.Array  # float32 (batch,): discounted sum of up to n rewards
    discounts: jax.Array  # float32 (batch,): gamma^k for the k rewards in returns; 0 if the last of them terminated
    next_obs: jax.Array  # uint8 (batch, 4, 84, 84)
    teacher_q_values: jax.Array  # float32 (batch, num_actions) at obs


def qdagger_loss(q_values, next_q_values, batch: Batch, distill_weight, temperature: float, huber: bool = False):
    """Scalars (loss, td_loss, distill_loss), means over the batch; distill_weight is distill_coef * lambda.

    Q-values are float32 (batch, num_actions), the student's at batch.obs and the target network's at batch.next_obs.
    """
    td_target = batch.returns + batch.discounts * next_q_values.max(axis=1)
    q_taken = jnp.take_along_axis(q_values, batch.actions[:, None], axis=1).squeeze(1)
    td_loss = (optax.huber_loss if huber else optax.squared_error)(q_taken, td_target).mean()
    student, teacher = (jax.nn.log_softmax(each / temperature) for each in (q_values, batch.teacher_q_values))
    distill_loss = optax.losses.kl_divergence_with_log_targets(student, teacher).mean()
    return td_loss + distill_weight * distill_loss, td_loss, distill_loss


def distill_coefficient(returns, teacher_return, baseline_return=0.0) -> float:
    """lambda = clip(1 - G_student / G_teacher, 0, 1) with mean game scores G above the baseline (section 4.1)."""
    if len(returns) < 10:  # as many as are kept: fewer games are too few to tell
        return 1.0
    return float(np.clip(1 - (np.mean(returns) - baseline_return) / (teacher_return - baseline_return), 0, 1))


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """From `start` at step 0 to `end` at step `duration`, and `end` from there on."""
    return end if step >= duration else start + (end - start) * step / duration


PURPOSES = ("teacher buffer", "online", "evaluation", "baseline")  # of random numbers; each has its own


def seeds_for(purpose: str, seed: int, count: int, step: int = 0) -> np.ndarray:
    """`count` seeds below 2^31, int64 (count,), unlike those of any other purpose, run or step of a resumed phase."""
    entropy = np.random.SeedSequence([seed, PURPOSES.index(purpose), step])
    return entropy.generate_state(count).astype(np.int64) % 2**31


def due(begin: int, end: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (begin, end]: periodic work under any stride; never if 0."""
    return every > 0 and end // every > begin // every


@partial(jax.jit, static_argnums=0)
def act(network: nn.Module, params: dict, key: jax.Array, step: int, obs: jax.Array, epsilon: float):
    """epsilon-greedy actions int32 (batch,), random by `key` and `step` alone, and Q-values (batch, num_actions)."""
    q_values, draws = network.apply(params, obs), jax.random.uniform(jax.random.fold_in(key, step), (2, len(obs)))
    random_actions = (draws[0] * q_values.shape[1]).astype(int)
    return jnp.where(draws[1] < epsilon, random_actions, q_values.argmax(1)), q_values


# --- Networks: Flax names their parameters by class and order, as in the files on the hub ---

STACK, SIDE = 4, 84  # frames in an observation, and their height and width
INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # of kernels, as PyTorch's; biases begin at 0
Conv, Dense = partial(nn.Conv, kernel_init=INIT), partial(nn.Dense, kernel_init=INIT)  # float32 unless told a dtype


def max_pool(x: jax.Array) -> jax.Array:
    """3 x 3, stride 2, padding 1, by pairs of rows, then of columns: reduce_window's gradient is slow on a CPU."""
    for _ in range(2):
        x = jnp.pad(x, ((0, 0), (2, x.shape[1] % 2), (0, 0), (0, 0)), constant_values=-jnp.inf)
        first, second = jnp.unstack(x.reshape(len(x), -1, 2, *x.shape[2:]), axis=2)  # pair i: rows 2i - 2, 2i - 1
        x = jnp.maximum(jnp.maximum(first, second)[:, 1:], second[:, :-1]).swapaxes(1, 2)  # rows 2i, 2i + 1; and 2i - 1
    return x


class ResidualBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = Conv(x.shape[-1], (3, 3), dtype=x.dtype)(nn.relu(x))
        return x + Conv(x.shape[-1], (3, 3), dtype=x.dtype)(nn.relu(inner))


class ConvSequence(nn.Module):
    """Halves the image: (batch, h, w, in_channels) to (batch, ceil(h / 2), ceil(w / 2), channels)."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        convolution = Conv(self.channels, (3, 3), dtype=x.dtype)
        return nn.Sequential([convolution, max_pool, ResidualBlock(), ResidualBlock()])(x)


def impala(x: jax.Array) -> jax.Array:
    """Impala-CNN (Espeholt et al., 2018), the student by default: (batch, 84, 84, 4) to (batch, 11, 11, 32)."""
    return nn.Sequential([*map(ConvSequence, (16, 32, 32)), nn.relu])(x)


def nature(x: jax.Array) -> jax.Array:
    """The Nature CNN (Mnih et al., 2015), which most teachers are: (batch, 84, 84, 4) to (batch, 7, 7, 64)."""
    for channels, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
        x = nn.relu(Conv(channels, (size, size), stride, padding="VALID", dtype=x.dtype)(x))
    return x


class AtariNetwork(nn.Module):
    """Q-values float32 (batch, num_actions) from observations uint8 (batch, 4, 84, 84)."""

    features: Callable
    hidden: int
    num_actions: int
    dtype: type = jnp.float32  # of all layers but the last: bfloat16 is too coarse to tell one action from another

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        features = self.features(obs.transpose(0, 2, 3, 1).astype(self.dtype) / 255).reshape(len(obs), -1)
        hidden = nn.relu(Dense(self.hidden, dtype=self.dtype)(features))
        return Dense(self.num_actions)(hidden.astype(jnp.float32))


NETWORKS = {"impala": partial(AtariNetwork, impala, 256), "nature": partial(AtariNetwork, nature, 512)}


# --- Replay and games ---


@struct.dataclass
class FrameReplay:
    """Uniform replay that stores each frame once, 7,056 bytes, and rebuilds stacks of four when it is sampled.

    Step t of environment i, number t * num_envs + i, holds its observation's newest frame and what was done there; the
    next observation is that of step t + 1. A stack never reaches into an older episode but repeats its own first frame.
    Draws pass over truncated steps, whose next observation is not stored; a return that meets one stops before it and
    bootstraps from the observation there. Steps that AtariGames forces, or last before a resume, count as truncated.
    """

    frames: jax.Array  # uint8 (size, 7056); all arrays are on the device
    actions: jax.Array  # int32 (size,)
    rewards: jax.Array  # float32
    terminations: jax.Array  # bool
    truncations: jax.Array  # bool
    teacher_q_values: jax.Array  # float32 (size, num_actions)
    written: jax.Array  # int32: steps of each environment since the beginning, overwritten ones included
    num_envs: int = struct.field(pytree_node=False)

    FIELDS = ("actions", "rewards", "terminations", "truncations", "teacher_q_values")  # beside frames, in add's order
    BLOCK = 4096  # frames that are compressed together

    @classmethod
    def create(cls, capacity: int, num_envs: int, num_actions: int, state: dict | None = None) -> "FrameReplay":
        """Room for `capacity` environment steps, of all environments together; and what is in `state`, a state_dict."""
        size = math.ceil(capacity / num_envs) * num_envs
        with user_error("--buffer-size, --teacher-steps: too large for the memory, or not those of the checkpoint"):
            frames, actions = jnp.zeros((size, SIDE * SIDE), jnp.uint8), jnp.zeros(size, jnp.int32)
            ends, teacher_q_values = (jnp.zeros(size, bool), jnp.ones(size, bool)), jnp.zeros((size, num_actions))
            replay = cls(frames, actions, jnp.zeros(size), *ends, teacher_q_values, jnp.int32(0), num_envs)
            return jax.block_until_ready(replay.load_state_dict(state) if state else replay)

    @partial(jax.jit, donate_argnums=0)
    def add(self, obs, *fields) -> "FrameReplay":
        """This one, donated, plus a step: obs uint8 (num_envs, 4, 84, 84), FIELDS; the last only while distilling."""
        here = self.written * self.num_envs % len(self.rewards)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=here, axis=0)
        row = zip(("frames", *self.FIELDS), (obs[:, -1].reshape(self.num_envs, -1), *fields))
        return self.replace(written=self.written + 1, **{name: put(getattr(self, name), new) for name, new in row})

    def sample(self, batch_size: int, n_step: int, gamma: float, key: jax.Array) -> Batch:
        """Draw transitions uniformly, but for the newest n_step of each environment, whose future is still to come."""
        size, num_envs, ahead = len(self.rewards), self.num_envs, jnp.arange(n_step)
        oldest = jnp.maximum((self.written + STACK - 1) * num_envs - size, 0)  # the first whose stack is whole
        numbers = jax.random.randint(key, (4 * batch_size,), oldest, (self.written - n_step) * num_envs)
        numbers = numbers[self.truncations[numbers % size].argsort()[:batch_size]]  # the first that are not truncated

        window = (numbers[:, None] + ahead * num_envs) % size  # (batch, n_step)
        terminations, truncations = self.terminations[window], self.truncations[window]
        counted = (terminations.cumsum(1) - terminations + truncations.cumsum(1)) == 0  # the terminating step as well
        here, steps = window[:, 0], counted.sum(1)
        returns = (self.rewards[window] * counted * gamma**ahead).sum(1)
        discounts = gamma**steps * ~(terminations & counted).any(1)
        obs, next_obs = self.stacks(numbers), self.stacks(numbers + steps * num_envs)
        return Batch(obs, self.actions[here], returns, discounts, next_obs, self.teacher_q_values[here])

    def stacks(self, numbers: jax.Array) -> jax.Array:
        """Observations uint8 (batch, 4, 84, 84) at these steps. What was never written counts as truncated."""
        size, back = len(self.rewards), jnp.arange(STACK)
        before = (numbers[:, None] - back[1:] * self.num_envs) % size  # the three steps before, the nearest first
        age = ((self.terminations[before] | self.truncations[before]).cumsum(1) == 0).sum(1)  # how many of its episode
        numbers = numbers[:, None] - jnp.minimum(back[::-1], age[:, None]) * self.num_envs
        return self.frames[numbers % size].reshape(-1, STACK, SIDE, SIDE)

    def state_dict(self) -> dict:
        """All that was written, on the host, the frames compressed by several threads."""
        used = min(int(self.written) * self.num_envs, len(self.rewards))
        blocks = [slice(begin, min(begin + self.BLOCK, used)) for begin in range(0, used, self.BLOCK)]
        with ThreadPoolExecutor(8) as pool:  # each has a block on the device
            packed = pool.map(lambda block: zlib.compress(np.asarray(self.frames[block]), level=1), blocks)
            frames = [np.frombuffer(block, dtype=np.uint8) for block in packed]
        fields = {name: np.asarray(getattr(self, name)[:used]) for name in self.FIELDS}
        return fields | {"written": np.asarray(self.written), "frames": frames}

    def load_state_dict(self, state: dict) -> "FrameReplay":
        """This one, frames donated, with what is in `state`. Its games are gone: the last step of each is truncated."""
        frames, used = self.frames, len(state["actions"])
        put = jax.jit(partial(jax.lax.dynamic_update_slice_in_dim, axis=0), donate_argnums=0)
        for begin, packed in zip(range(0, used, self.BLOCK), state["frames"], strict=True):
            frames = put(frames, np.frombuffer(zlib.decompress(packed), np.uint8).reshape(-1, SIDE * SIDE), begin)
        fields = {name: getattr(self, name).at[:used].set(state[name]) for name in self.FIELDS}
        newest = state["written"] * self.num_envs - 1 - np.arange(self.num_envs)
        fields["truncations"] = fields["truncations"].at[newest % len(self.rewards)].set(True)
        return self.replace(frames=frames, **fields, written=jnp.asarray(state["written"], jnp.int32))


class AtariGames:
    """Atari as the reference wrappers show it (stable_baselines3's AtariWrapper), one for each of `seeds`.

    An image is grey, 84 x 84; an episode's first one fills its whole stack. A lost life ends an episode, not the game,
    and forces a NOOP; where there is FIRE, FIRE and action 2 follow it, and open every game as well.
    Such a step is not the agent's: `actions` says what was really done, and it is an episode of its own, truncated.
    Games play on between `step_async` and `step_wait`, in ALE's threads. All follows from seeds and actions.
    """

    def __init__(self, args: Args, seeds: np.ndarray):
        num_envs, spec, screen = len(seeds), gym.spec(args.env_id).kwargs, ale_py.ALEInterface()
        screen.loadROM(ale_py.roms.get_rom_path(spec["game"]))
        options = dict(zip(("img_height", "img_width"), screen.getScreenDims()), grayscale=False, stack_num=1)
        options |= dict(reward_clipping=False, use_fire_reset=False, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
        sticky = (spec if args.repeat_action_probability is None else asdict(args))["repeat_action_probability"]
        self.emulators = AtariVectorEnv(spec["game"], num_envs, **options, repeat_action_probability=sticky)
        self.num_actions = int(self.emulators.single_action_space.n)
        self.launch = np.array([0, 1, 2] if self.emulators.ale.get_action_set()[1] == ale_py.Action.FIRE else [0])
        self.launching = np.full(num_envs, len(self.launch) - 1)  # how many actions of `launch` are still to come
        self.images, info = self.emulators.reset(seed=seeds)  # colour, full size
        self.lives, self.began, self.returns = info["lives"], np.zeros(num_envs, dtype=int), np.zeros(num_envs)
        self.obs = self.grey()[:, None].repeat(STACK, axis=1)  # what to act on, uint8 (num_envs, 4, 84, 84)

    def grey(self) -> np.ndarray:
        """uint8 (num_envs, 84, 84): the reference's two calls for one tall picture of all games, which do not mix."""
        tall = cv2.cvtColor(self.images.reshape(-1, *self.images.shape[-2:]), cv2.COLOR_RGB2GRAY)
        return cv2.resize(tall, (SIDE, SIDE * len(self.images)), interpolation=cv2.INTER_AREA).reshape(-1, SIDE, SIDE)

    def step_async(self, actions: np.ndarray) -> None:
        """Begin a step with these actions, integers (num_envs,), but where a game or life is to be launched."""
        self.forced = self.launching > 0
        self.actions = np.where(self.forced, self.launch[-self.launching], actions)  # counted from the end of `launch`
        self.launching -= self.forced
        self.emulators.send(self.actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, float, int]]]:
        """End it: rewards' signs, terminations, truncations, (num_envs,); of ended games (env, raw return, frames)."""
        self.images, rewards, over, truncated, info = self.emulators.recv()
        ended, lives = over | truncated, info["lives"]
        life_lost = ~ended & (lives > 0) & (lives < self.lives)
        self.launching[life_lost], self.launching[ended] = len(self.launch), len(self.launch) - 1
        began = info["frame_number"] - info["episode_frame_number"]  # the first frame of each game
        self.returns += rewards
        finished = [(i, self.returns[i].item(), (began - self.began)[i].item()) for i in np.flatnonzero(ended).tolist()]
        self.returns[ended], self.began, self.lives = 0, began, lives
        first = (ended | life_lost | self.forced)[:, None, None, None]
        frames = self.grey()[:, None]
        self.obs = np.where(first, frames, np.concatenate([self.obs[:, 1:], frames], axis=1))
        return np.sign(rewards, dtype=np.float32), over | life_lost, truncated | self.forced, finished


def evaluate(
    policy: Callable, args: Args, episodes: int, video=None, stop=(), epsilon=None, purpose="evaluation"
) -> list[float]:
    """Raw returns of `episodes` whole games by `policy`, `act` of some network, at epsilon, by default end_e.

    Games and random numbers are its own. How many each of up to ten environments plays is fixed beforehand, so that
    short games are not preferred; and returns come in the order of the environments, first the first game of each, so
    that the first ten are not the shortest. --capture-video films the first to `video`; a signal in `stop` interrupts.
    """
    num_envs = min(episodes, 10)
    seeds = seeds_for(purpose, args.seed, num_envs)
    games, key = AtariGames(args, seeds), jax.random.PRNGKey(seeds[0])
    left = [len(range(env, episodes, num_envs)) for env in range(num_envs)]
    returns: list[list[float]] = [[] for _ in left]
    actions_of_first, epsilon = [], args.end_e if epsilon is None else epsilon
    with tqdm(total=episodes, desc="evaluation", unit="game", leave=False) as bar:
        while any(left):
            if stop:
                raise KeyboardInterrupt(stop[0], "stopped")
            actions = np.asarray(policy(key, len(actions_of_first), games.obs, epsilon)[0])
            actions_of_first.append(int(actions[0]))
            games.step_async(actions)
            for env, game_return, _ in games.step_wait()[-1]:
                if left[env] > 0:
                    left[env] -= 1
                    returns[env].append(game_return)
                    bar.update()
    if video and args.capture_video:
        film(args, seeds[:1], actions_of_first, video)
    rounds = range(len(returns[0]))  # the first environment plays as many games as any
    return [of_env[nth] for nth in rounds for of_env in returns if nth < len(of_env)]


# --- Training ---


class Learner:
    """The student, its target network and its optimizer, and the one gradient step of both phases."""

    def __init__(self, args: Args, num_actions: int):
        self.args, self.network = args, NETWORKS[args.network](num_actions, jnp.bfloat16 if args.amp else jnp.float32)
        self.key, obs = jax.random.PRNGKey(args.seed), np.zeros((1, STACK, SIDE, SIDE), np.uint8)
        self.params, self.target_params = (jax.jit(self.network.init)(self.key, obs) for _ in range(2))  # not aliased
        self.adam = optax.scale_by_adam(eps=args.adam_eps)
        self.opt_state = self.adam.init(self.params)  # its averages, and how many gradient steps
        self.metrics: dict[str, jax.Array] = {}  # scalars

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def update(self, params, opt_state, target_params, replay, distill_weight: float, learning_rate: float):
        """A gradient step, one XLA program, self a constant; returns params, opt_state (both donated), metrics."""
        args, key = self.args, jax.random.fold_in(self.key, opt_state.count)
        batch = replay.sample(args.batch_size, args.n_step, args.gamma, key)
        next_q_values = self.network.apply(target_params, batch.next_obs)

        def loss_of(params: dict):
            q_values = self.network.apply(params, batch.obs)
            loss, td, kl = qdagger_loss(q_values, next_q_values, batch, distill_weight, args.temperature, args.huber)
            q_taken = jnp.take_along_axis(q_values, batch.actions[:, None], axis=1)
            return loss, {"loss": loss, "td_loss": td, "distill_loss": kl, "q_values": q_taken.mean()}

        gradient, metrics = jax.grad(loss_of, has_aux=True)(params)
        direction, opt_state = self.adam.update(gradient, opt_state)
        return optax.tree.add_scale(params, -learning_rate, direction), opt_state, metrics

    def gradient_step(self, replay: FrameReplay, distill_weight: float, learning_rate: float) -> None:
        state = self.params, self.opt_state, self.target_params
        self.params, self.opt_state, self.metrics = self.update(*state, replay, distill_weight, learning_rate)

    def read_metrics(self) -> dict[str, float]:
        """Those of the last gradient step, fetched from the device; UserError if its loss is not finite."""
        values = {name: value.item() for name, value in self.metrics.items()}
        if not math.isfinite(values.get("loss", 0.0)):
            raise UserError(f"the loss is {values['loss']}: start anew with a smaller --learning-rate")
        return values

    def update_target(self, tau: float) -> None:
        self.target_params = jax.jit(optax.incremental_update, donate_argnums=1)(self.params, self.target_params, tau)


@dataclass
class Progress:
    """How far a run has come: each phase is a loop that goes on from here."""

    phase: int = 3  # 1 teacher buffer, 2 offline, 3 online; the defaults here are a start without a teacher
    step: int = 0  # of this phase: environment steps, in phase 2 gradient steps
    offset: int = 0  # of the step in logs and exploration, which count on from phase 2 to phase 3
    seconds: float = 0.0  # spent on online steps, evaluations excluded
    teacher_return: float = 0.0  # mean of its games
    baseline_return: float = 0.0  # mean of random play's, if that is the baseline
    distilling: bool = False  # False is for good: the teacher is asked no more, and its stored Q-values go stale
    recent_returns: list[float] = field(default_factory=list)  # of the student's last 10 whole games, for lambda
    evaluated: int = 0  # step of this phase's last evaluation, not to be repeated; -1: none yet; online begins at 0
    scores: list[float] = field(default_factory=list)  # of its games


class Run:
    """runs/RUN: event files, and the state in checkpoint.npz; the one before it stays as checkpoint.previous.npz."""

    def __init__(self, args: Args, facts: dict[str, str], first_step: int):
        """A new directory, or that of --resume, where what was logged from `first_step` on will be logged again."""
        self.next_save = time.monotonic() + 600  # for runs without --checkpoint-frequency
        game, settings = args.env_id.replace("/", "-"), asdict(args) | facts
        self.directory = Path(args.resume or f"runs/{game}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}")
        self.directory.mkdir(parents=True, exist_ok=args.resume is not None)
        if args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "id": self.directory.name}
            wandb.init(**names, name=names["id"], resume="allow", config=settings, sync_tensorboard=True)
        self.writer = SummaryWriter(str(self.directory), purge_step=first_step, flush_secs=10)
        rows = "\n".join(f"|{name}|{value}|" for name, value in settings.items())
        self.writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{rows}", first_step)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)

    def save(self, state: dict, replay: FrameReplay) -> None:
        start, path = time.monotonic(), self.directory / "checkpoint.npz"
        self.writer.flush()
        data = np.frombuffer(serialization.msgpack_serialize(state | {"replay": replay.state_dict()}), np.uint8)
        write(partial(np.savez, state=data), path, before=path.with_suffix(".previous.npz"))  # a CRC tells damage
        self.next_save = time.monotonic() + max(600, 100 * (time.monotonic() - start))  # at most 1% of the time for it


def train(args: Args, stop: Sequence[int] = ()) -> Path:
    """Run all phases, or what --resume has left of them, and return the directory. A signal in `stop` interrupts it."""
    saved = load_checkpoint(Path(args.resume)) if args.resume else {}
    validate(args, saved.get("args", {}))
    if args.upload_model:
        upload(args)
    device, num_actions = jax.devices()[0], AtariGames(args, seeds_for("online", args.seed, 1)).num_actions
    if args.cuda and device.platform == "cpu":
        print('--cuda: no GPU found (pip install "jax[cuda12]"), running on the CPU, where ten million steps take days')
    learner, progress, teacher = Learner(args, num_actions), Progress(), None  # teacher: (network, weights)
    FrameReplay.create(args.buffer_size, args.num_envs, num_actions)  # if there is no room, that is better known now
    facts = {"device": device.device_kind, "jax": jax.__version__}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts["threads"] = str(cores)  # XLA's; sums, and so weights, depend on it

    # Phase 0: the teacher is found and measured. A run that is resumed has that behind it, and a replay.
    if saved:
        with user_error(f"--resume {args.resume}: its checkpoint does not fit"):
            progress, facts, _ = Progress(**saved["progress"]), saved["facts"] | facts, len(saved["replay"])
            teacher = saved["teacher"] and network_of(jax.tree.leaves(saved["teacher"]), num_actions)
            form = jax.tree.structure((learner.params, learner.target_params, learner.opt_state))
            learned = jax.tree.unflatten(form, map(jnp.asarray, saved["learner"]))
            learner.params, learner.target_params, learner.opt_state = learned
    elif args.teacher != "none":
        path, reason = find_teacher(args)
        teacher = load_network(path, num_actions, "--teacher", args.temperature)
        facts |= {"teacher_file": f"{path}, {reason}", "teacher_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        print(f"teacher: {facts['teacher_file']}")
        play_games = partial(evaluate, partial(act, *teacher), args, args.teacher_eval_episodes, stop=stop)
        progress = Progress(phase=1 if args.offline_steps > 0 else 3, distilling=True)
        progress.teacher_return = float(np.mean(play_games()))
        if args.return_baseline == "random":
            progress.baseline_return = float(np.mean(play_games(epsilon=1.0, purpose="baseline")))
        print(means := f"teacher: mean return {progress.teacher_return:.2f}, baseline {progress.baseline_return:.2f}")
        if progress.teacher_return <= progress.baseline_return:
            raise UserError(f"--teacher {args.teacher}: {means}: take another, or --return-baseline random")
    run = Run(args, facts, (progress.offset + progress.step + 1) if saved and progress.phase > 1 else 0)
    if teacher and (progress.phase == 1 or not saved):  # in phase 1 a resumed run logs all anew
        run.log(0, {"charts/teacher/avg_episodic_return": progress.teacher_return})

    def steps(name: str, total: int, stride: int, tag: str = "", every: int = 0) -> Iterator[tqdm]:
        """The loop of a phase: its bar for each step; in between, evaluations, checkpoints of `replay`, and the end."""
        bar = tqdm(total=total, initial=progress.step, desc=name, unit="update" if name == "offline" else "step")
        while True:
            before, at_end, logged = progress.step - stride, progress.step >= total, progress.offset + progress.step
            evaluating = tag and (at_end or due(before, progress.step, every))  # also at step 0: before is negative
            if evaluating and progress.evaluated != progress.step:  # if not done right before the run was resumed
                with suppress(KeyboardInterrupt):  # when it is stopped: a checkpoint first
                    policy = partial(act, learner.network, learner.params)
                    scores = evaluate(policy, args, args.eval_episodes, run.directory / f"videos/{logged}.mp4", stop)
                    progress.evaluated, progress.scores = progress.step, scores
                    run.log(logged, {tag: np.mean(scores)})
            by_time = args.checkpoint_frequency is None and time.monotonic() > run.next_save
            by_step = progress.step > 0 and due(before, progress.step, args.checkpoint_frequency or 0)
            if by_time or by_step or evaluating or stop or at_end:
                learner.read_metrics()  # nothing is kept that has diverged
                if args.save_model:
                    model = run.directory / f"{args.exp_name}.cleanrl_model"
                    write(lambda file: file.write(serialization.to_bytes(learner.params)), model)
                state = dict(args=asdict(args), facts=facts, progress=asdict(progress), teacher=teacher and teacher[1])
                learned = jax.tree.leaves((learner.params, learner.target_params, learner.opt_state))
                run.save(state | {"learner": learned}, replay)
            if stop:
                raise KeyboardInterrupt(stop[0], f"stopped; go on with: python {sys.argv[0]} --resume {run.directory}")
            if at_end:
                return bar.close()
            yield bar
            progress.step += stride
            bar.update(stride)

    # Phase 1: the teacher fills its buffer, unless a file has it.
    teacher_envs = 8 * args.num_envs  # the more the faster, since its policy never ages; the 8 is in validate as well
    key_of_teacher, key_of_student = (
        jax.random.PRNGKey(seeds_for(purpose, args.seed, 1)[0]) for purpose in ("teacher buffer", "online")
    )
    names = ["env_id", "repeat_action_probability", "num_envs", "teacher_steps", "start_e", "end_e", "temperature"]
    made_with = {name: getattr(args, name) for name in names} | {"teacher": facts.get("teacher_sha256")}
    if progress.phase < 3:
        replay = FrameReplay.create(args.teacher_steps, teacher_envs, num_actions, saved.pop("replay", None))
    if progress.phase == 1 and args.teacher_buffer and Path(args.teacher_buffer).exists():
        replay = load_teacher_buffer(Path(args.teacher_buffer), made_with, replay)
        progress.phase, progress.step, progress.evaluated = 2, 0, -1
    if progress.phase == 1:
        games = AtariGames(args, seeds_for("teacher buffer", args.seed, teacher_envs, progress.step))
        for bar in steps("teacher buffer", args.teacher_steps, teacher_envs):
            epsilon = linear_schedule(args.start_e, args.end_e, args.teacher_steps, progress.step)
            obs = jax.device_put(games.obs)
            actions, q_values = act(*teacher, key_of_teacher, progress.step, obs, epsilon)
            games.step_async(np.asarray(actions))
            *outcome, finished = games.step_wait()
            replay = replay.add(obs, games.actions, *outcome, q_values)
            if finished:
                bar.postfix = f"return={finished[-1][1]:.1f}, λ=1.00"
        if args.teacher_buffer:
            content = {"made_with": made_with, "replay": jax.tree.map(torch.tensor, replay.state_dict())}
            write(partial(torch.save, content), Path(args.teacher_buffer))  # for the sibling as well
        progress.phase, progress.step, progress.evaluated = 2, 0, -1

    # Phase 2: the student learns from the teacher's buffer alone.
    if progress.phase == 2:
        for bar in steps("offline", args.offline_steps, 1, "charts/offline/avg_episodic_return", 100_000):
            learner.gradient_step(replay, args.distill_coef, args.learning_rate)
            step = progress.step + 1
            if step % args.target_network_frequency == 0:
                learner.update_target(args.tau)
            if step % 100 == 0:  # by CleanRL's names: q_loss is td_loss
                losses = {name.replace("td_", "q_"): value for name, value in learner.read_metrics().items()}
                run.log(step, {f"charts/offline/{name}": value for name, value in losses.items() if "loss" in name})
                bar.postfix = f"return={np.mean(progress.scores):.1f}, λ=1.00"
        learner.update_target(tau=1.0)
        progress.phase, progress.step, progress.evaluated, progress.offset = 3, 0, 0, args.offline_steps
        progress.recent_returns = progress.scores[:10]  # of the evaluation just now: lambda is informed from the start
        replay = content = obs = actions = q_values = None  # room for the student's own, in one piece

    # Phase 3: the student plays on by itself, and the teacher fades.
    learner.metrics, exploration_steps = {}, args.exploration_fraction * args.total_timesteps
    replay = FrameReplay.create(args.buffer_size, args.num_envs, num_actions, saved.pop("replay", None))
    learning_starts = max(args.learning_starts, (args.n_step + STACK) * args.num_envs)
    final = args.learning_rate if args.final_learning_rate is None or not teacher else args.final_learning_rate
    games = AtariGames(args, seeds_for("online", args.seed, args.num_envs, progress.step))
    for bar in steps("online", args.total_timesteps, args.num_envs, "eval/episodic_return", args.eval_frequency):
        start, begin, end = time.perf_counter(), progress.step, progress.step + args.num_envs
        epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, progress.offset + begin)
        measured = progress.recent_returns, progress.teacher_return, progress.baseline_return
        progress.distilling &= args.distill_steps is None or begin < args.distill_steps  # once False, for good
        lambda_ = distill_coefficient(*measured) if progress.distilling else 0.0
        progress.distilling &= lambda_ > 0 or not args.distill_latch  # latched; lambda_ is 0 in this step already
        learning_rate = final + (args.learning_rate - final) * lambda_
        obs = jax.device_put(games.obs)
        actions, _ = act(learner.network, learner.params, key_of_student, begin, obs, epsilon)
        games.step_async(np.asarray(actions))  # they play on while the student learns
        for step in range(begin + 1, end + 1):
            if step > learning_starts and step % args.train_frequency == 0:
                learner.gradient_step(replay, args.distill_coef * lambda_, learning_rate)
            if step % args.target_network_frequency == 0:
                learner.update_target(args.tau)
        teacher_q_values = act(*teacher, key_of_teacher, begin, obs, 0.0)[1:] if progress.distilling else []
        *outcome, finished = games.step_wait()
        replay = replay.add(obs, games.actions, *outcome, *teacher_q_values)
        progress.seconds += time.perf_counter() - start
        for _, game_return, frames in finished:
            run.log(progress.offset + end, {"charts/episodic_return": game_return, "charts/episodic_length": frames})
            progress.recent_returns = [*progress.recent_returns, game_return][-10:]
        if due(begin, end, 100):
            scalars = {f"losses/{name}": value for name, value in learner.read_metrics().items()}
            if not progress.distilling:
                scalars.pop("losses/distill_loss", None)  # the teacher's stored Q-values are stale, or missing
            scalars |= {"charts/epsilon": epsilon, "charts/distill_coeff": lambda_}
            scalars |= {"charts/learning_rate": learning_rate, "charts/SPS": end / progress.seconds}
            run.log(progress.offset + end, scalars)
            bar.postfix = f"return={np.mean(progress.recent_returns or math.nan):.1f}, λ={lambda_:.2f}"
    run.writer.close()
    score = f"{np.mean(progress.scores):.2f} ± {np.std(progress.scores):.2f}"
    print(f"{run.directory}: {score} over {len(progress.scores)} games")
    if args.upload_model:
        upload(args, run.directory, score)
    return run.directory


# --- Models, checkpoints, publishing, flags: the method is above ---


def network_of(weights: list, num_actions: int) -> tuple[nn.Module, dict]:
    """The network of these weights, the first of NETWORKS with as many, of these shapes; ValueError if none."""
    for kind in NETWORKS.values():
        network = kind(num_actions)
        shapes = jax.eval_shape(network.init, jax.random.PRNGKey(0), jnp.zeros((1, STACK, SIDE, SIDE), jnp.uint8))
        if [np.shape(weight) for weight in weights] == [leaf.shape for leaf in jax.tree.leaves(shapes)]:
            return network, jax.tree.unflatten(jax.tree.structure(shapes), map(jnp.asarray, weights))
    raise ValueError(f"no weights of a Nature CNN or Impala-CNN for the {num_actions} actions of --env-id")


def from_torch(state: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """A PyTorch network's weights in Flax's order. PyTorch puts channels first, also before flattening an image."""
    arrays, weights, channels = [tensor.float().numpy() for tensor in state.values()], [], STACK
    for kernel, bias in zip(arrays[::2], arrays[1::2], strict=True):  # layer by layer in both, Flax's sorted by name
        pixels = kernel.reshape(len(kernel), channels, -1)  # (outputs, channels, pixels); a vector has one pixel
        weights += [bias, pixels.transpose(2, 1, 0).reshape(*kernel.shape[2:], -1, len(kernel))]
        channels = len(kernel)
    return weights


def load_sb3(path: Path, num_actions: int, temperature: float) -> dict[str, torch.Tensor]:
    """The Nature CNN in a Stable-Baselines3 zip of DQN, QR-DQN, PPO or A2C with CnnPolicy; ValueError if there is none.

    Logits of the last two, times temperature, stand for Q-values: softmax(Q / temperature) is that agent's policy.
    """
    with zipfile.ZipFile(path) as file:
        its_actions = int(json.loads(file.read("data"))["action_space"].get("n", num_actions))
        state = load(file.open("policy.pth"))
    unused = r".*(_target|value_net)\.|(pi|vf)_features_extractor\."  # value and target networks, and copies
    state = {name: tensor for name, tensor in state.items() if not re.match(unused, name)}
    if its_actions != num_actions or len(state) != 10:
        raise ValueError(f"no CnnPolicy of DQN, QR-DQN, PPO or A2C for the {num_actions} actions of --env-id")
    for name in list(state)[-2:]:  # of the last layer: that of QR-DQN gives quantiles, whose mean is linear, too
        state[name] = state[name].unflatten(0, (-1, num_actions)).mean(0) * (temperature if "action" in name else 1)
    return state


def load_network(path: Path, num_actions: int, flag: str, temperature: float = 1.0) -> tuple[nn.Module, dict]:
    """Network and weights in a Flax model, a PyTorch one or a Stable-Baselines3 zip; no file can run code."""
    with user_error(f"{flag} {path}: cannot be read"):
        if not zipfile.is_zipfile(path):
            return network_of(jax.tree.leaves(serialization.msgpack_restore(path.read_bytes())), num_actions)
        sb3 = "policy.pth" in zipfile.ZipFile(path).namelist()  # torch writes zips as well
        return network_of(from_torch(load_sb3(path, num_actions, temperature) if sb3 else load(path)), num_actions)


def find_teacher(args: Args) -> tuple[Path, str]:
    """The teacher's file, and why that one: the path given, else the hub's, else its cache's, else the bundled one."""
    if args.teacher != "auto":
        return Path(args.teacher), "as given"
    env_id = re.sub("ALE/(.*)-v5", r"\1NoFrameskip-v4", args.env_id)  # the older name of the same game
    repo = args.teacher_policy_hf_repo or f"cleanrl/{env_id}-{args.teacher_model_exp_name}-seed1"
    sb3 = re.search("/((dqn|qrdqn|ppo|a2c)-.*)", repo)
    file = f"{sb3[1]}.zip" if sb3 else f"{args.teacher_model_exp_name}.cleanrl_model"
    with user_error(f"--teacher-policy-hf-repo {repo}: no {file} from there"):
        try:  # once and not for long: hf_hub_download itself tries again for half a minute and more
            ThreadPoolExecutor(1).submit(get_hf_file_metadata, hf_hub_url(repo, file), timeout=5).result(timeout=8)
            return Path(hf_hub_download(repo, file)), f"from the hub, {repo}"
        except Exception as error:
            if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 429:
                raise  # a real answer, such as 404 to a wrong name; 429 and 5xx count as out of reach
            with suppress(errors.LocalEntryNotFoundError):
                return Path(hf_hub_download(repo, file, local_files_only=True)), f"from the cache of the hub, {repo}"
    bundled = Path(__file__).parent / "teachers" / f"{env_id}.cleanrl_model"
    if repo != f"cleanrl/{env_id}-{Args.teacher_model_exp_name}-seed1" or not bundled.exists():
        raise UserError(f"--teacher auto: the hub is out of reach and {repo} not in its cache; give a PATH")
    return bundled, "bundled: the hub is out of reach"


def load_teacher_buffer(path: Path, made_with: dict, replay: FrameReplay) -> FrameReplay:
    """`replay` filled from --teacher-buffer; UserError if the file is damaged or was made with other settings."""
    with user_error(f"--teacher-buffer {path}: not a teacher's buffer of this version"):
        content = load(path)
        if differing := [name for name, value in made_with.items() if content["made_with"][name] != value]:
            raise UserError(f"--teacher-buffer {path}: made with another {differing[0]}; name another file")
        return replay.load_state_dict(jax.tree.map(np.asarray, content["replay"]))


def write(save: Callable, path: Path, before: Path | None = None) -> None:
    """save(file) beside `path`, to the disk, then rename: never half a file. What was there is kept as `before`."""
    part = Path(f"{path}.part" if before else f"{path}.{os.getpid()}.part")  # one buffer may have several writers
    with user_error(f"cannot write {path}; once it can be written, --resume"), ExitStack() as at_the_end:
        at_the_end.callback(part.unlink, missing_ok=True)  # what a full disk has left of it
        with part.open("wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            path.replace(before)
        part.replace(path)


def load_checkpoint(run_dir: Path) -> dict:
    """The newest whole state of a run: arrays and plain values, never code. UserError if there is none."""
    for path in (run_dir / "checkpoint.npz", run_dir / "checkpoint.previous.npz"):
        try:
            return serialization.msgpack_restore(np.load(path)["state"].tobytes())
        except Exception as error:
            print(f"--resume: {path} cannot be read: {type(error).__name__}")
    raise UserError(f"--resume {run_dir}: no checkpoint of this version in it")


def film(args: Args, seeds: np.ndarray, actions: list[int], path: Path) -> None:
    """Play the game of this one seed and these actions again, and write what is seen, in colour (extra `video`)."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    games = AtariGames(args, seeds)
    path.parent.mkdir(parents=True, exist_ok=True)
    with user_error("--capture-video"), FFMPEG_VideoWriter(str(path), games.images.shape[-2:-4:-1], fps=15) as video:
        for action in actions:
            video.write_frame(games.images[0, 0])
            games.step_async(np.array([action]))
            if games.step_wait()[-1]:
                break


def upload(args: Args, run_dir: Path | None = None, score: str = "") -> None:
    """Before the first step make the hub's repository, to see that one may; at the end publish the run there."""
    name, task = f"{args.env_id}-{args.exp_name}-seed{args.seed}".replace("/", "-"), "reinforcement-learning"
    with user_error("--upload-model: no way to write there; `hf auth login` first, or another --hf-entity"):
        repo = HfApi().create_repo(f"{args.hf_entity}/{name}".removeprefix("/"), exist_ok=True).repo_id
        if run_dir:
            result = EvalResult(task, args.env_id, args.env_id, metric_type="mean_reward", metric_value=score)
            card = ModelCardData(model_name=name, tags=[args.env_id, task], pipeline_tag=task, eval_results=[result])
            (run_dir / "README.md").write_bytes(f"---\n{card}\n---\n# QDagger on {args.env_id}: {score}\n".encode())
            HfApi().upload_folder(repo_id=repo, folder_path=run_dir, ignore_patterns="checkpoint*")


def validate(args: Args, before: dict) -> None:
    """UserError for the first flag that cannot work, or that is not as `before` in the run to be resumed."""
    mutable = "resume total_timesteps checkpoint_frequency eval_frequency eval_episodes evaluate teacher_buffer "
    mutable += "track wandb_project_name wandb_entity capture_video save_model upload_model hf_entity capture compile"
    positive = "num_envs buffer_size batch_size n_step train_frequency target_network_frequency learning_rate "
    positive += "adam_eps temperature teacher_eval_episodes eval_episodes"
    shares = "gamma tau start_e end_e exploration_fraction repeat_action_probability"
    games = [env_id for env_id in gym.registry if re.fullmatch(r"(ALE/\w+-v5)|(\w+NoFrameskip-v4)", env_id)]
    numbers = {flag: value for flag, value in asdict(args).items() if isinstance(value, int | float)}
    least, buffer = (args.n_step + STACK) * args.num_envs, Path(args.teacher_buffer or __file__)  # unset: this file
    changed = [flag for flag in before if flag not in mutable.split() and getattr(args, flag) != before[flag]]
    rules = [
        ("env_id", args.env_id in games, "no game of ale-py's, such as PongNoFrameskip-v4 or ALE/Pong-v5"),
        *((flag, 0 <= number < 2**31, "must lie between 0 and 2^31") for flag, number in numbers.items()),
        *((flag, numbers[flag] > 0, "must be above 0") for flag in positive.split()),
        *((flag, numbers.get(flag, 0) <= 1, "must lie between 0 and 1") for flag in shares.split()),
        ("buffer_size", args.buffer_size >= least, f"too few: {least} or more"),
        ("teacher_steps", args.teacher == "none" or args.teacher_steps >= 8 * least, f"too few: {8 * least} or more"),
        ("teacher_buffer", buffer.exists() or os.access(buffer.absolute().parent, os.W_OK), "not there, nor writable"),
        ("upload_model", args.save_model or not args.upload_model, "there is nothing to upload without --save-model"),
        ("capture_video", not args.capture_video or importlib.util.find_spec("moviepy"), "pip install moviepy"),
        ("track", not args.track or importlib.util.find_spec("wandb"), "pip install wandb"),
        *((flag, False, f"the run to be resumed has {before[flag]}; leave out --resume") for flag in changed),
    ]
    for flag, holds, rule in rules:
        if not holds:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: {rule}")


def play(args: Args, stop: Sequence[int]) -> None:
    """--evaluate: print the score of every game of a saved model, and their mean and standard deviation."""
    validate(args, {})
    path = Path(args.evaluate)
    network = load_network(path, AtariGames(args, seeds_for("online", args.seed, 1)).num_actions, "--evaluate")
    returns = evaluate(partial(act, *network), args, args.eval_episodes, path.parent / "videos/evaluation.mp4", stop)
    print(*(f"game {game}: {game_return:g}" for game, game_return in enumerate(returns, 1)), sep="\n")
    print(f"{np.mean(returns):.2f} ± {np.std(returns):.2f} over {len(returns)} games of {args.env_id}")


def main() -> None:
    args, stop = tyro.cli(Args, description=__doc__), []

    def handle(number: int, _) -> None:
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping; the same signal again quits at once\n")  # print may be in the middle of a line

    for name in {"SIGINT", "SIGTERM", "SIGUSR1"} & set(dir(signal)):  # the last is Slurm's warning, not on Windows
        signal.signal(getattr(signal, name), handle)
    try:
        if args.resume:  # what is not said again is as it was
            with user_error(f"--resume {args.resume}: its flags are those of another version"):
                before = Args(**load_checkpoint(Path(args.resume))["args"] | {"resume": args.resume, "evaluate": None})
            args = tyro.cli(Args, description=__doc__, default=before)
        if not args.cuda:
            jax.config.update("jax_platforms", "cpu")
        play(args, stop) if args.evaluate else train(args, stop)
    except (UserError, OSError, jax.errors.JaxRuntimeError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)  # above a progress bar
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        tqdm.write(stopped.args[1], file=sys.stderr)
        sys.exit(128 + stopped.args[0])


if __name__ == "__main__":
    main()

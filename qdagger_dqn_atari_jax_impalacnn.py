"""QDagger on Atari in JAX: a student Impala-CNN takes over from a DQN teacher and plays on.

    # teach, then play on
    python qdagger_dqn_atari_jax_impalacnn.py --env-id BreakoutNoFrameskip-v4
    # train a teacher
    python qdagger_dqn_atari_jax_impalacnn.py --teacher none --network nature --save-model
    # play a saved model
    python qdagger_dqn_atari_jax_impalacnn.py --evaluate runs/RUN/MODEL.cleanrl_model

Reincarnating Reinforcement Learning (Agarwal et al., 2022, arXiv 2206.01626).
A step is four emulator frames.

1. Teacher buffer: the teacher plays, ever less at random; its transitions are stored with its
   Q-values.
2. Offline: the student learns from that buffer alone, with λ = 1.
3. Online: the student learns from its own play; λ falls as its return nears the teacher's.

The loss is the same in phases 2 and 3; its terms are means over a batch, and a reward r is 1, 0
or -1:

    y            = r₁ + γ r₂ + … + γⁿ⁻¹ rₙ + γⁿ (1 − terminated) max_a Q_target(sₙ, a)
    td_loss      = (Q(s, a) − y)²
    distill_loss = KL(π_teacher(·|s) ‖ π(·|s))    with π = softmax(Q / temperature)
    loss         = td_loss + distill_coef · λ · distill_loss
    λ            = 1[t < distill_steps] · clip(1 − G_student / G_teacher, 0, 1)

t counts online steps, and G is a mean of raw scores of whole games, above --return-baseline.
G_student is the mean of the student's last ten. The evaluation that ends phase 2 provides the first
ten, and each game that ends in phase 3 replaces the oldest. While there are fewer than ten, λ is 1.

How JAX differs from PyTorch, whose version is qdagger_dqn_atari_impalacnn.py:

- A network is a description without weights. These are a tree of arrays, that is, nested dicts:
  here `params`.
- A function under jax.jit is compiled at its first call, for these shapes and static arguments;
  `if` and `for` are decided then. A call only enqueues the work; np.asarray waits for its result.
- Gradients are taken with respect to a function's first argument; all else is constant, so that
  nothing needs to be detached.
- No array is changed: a function returns new ones. An argument that is donated must not be used
  again; the result takes its memory, so that a replay is written in place. Work that was
  enqueued before still reads the old values.
- There is no generator with a state: random numbers follow from a key, into which each step folds
  its number. So a resumed run goes on with the same random numbers, in new games.
"""

import hashlib
import importlib.util
import json
import math
import os
import pickle
import re
import shlex
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

# These two are read when jax is imported. Without the first, it reserves 75% of a GPU at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The second makes convolutions on a CPU 1.4 times as fast. A version that does not know it ends the
# process, so it is set for the one that it was measured with.
with suppress(PackageNotFoundError):
    if version("jaxlib") == "0.10.2":
        flag = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
        os.environ.setdefault("XLA_FLAGS", flag)
# A log gets its line of progress every half minute. This is read when tqdm is imported.
if not os.isatty(2):
    os.environ.setdefault("TQDM_MININTERVAL", "30")
    os.environ.setdefault("TQDM_MAXINTERVAL", "30")

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch  # reads PyTorch's models, and writes for TensorBoard
import tyro
from ale_py.vector_env import AtariVectorEnv
from huggingface_hub import (
    EvalResult,
    HfApi,
    ModelCardData,
    errors,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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


@dataclass
class RunArgs:
    exp_name: str = Path(__file__).stem  # names the run and its files
    seed: int = 1  # seeds networks, exploration, sampling and games
    cuda: bool = True  # train on the GPU if there is one
    track: bool = False  # log the run to Weights & Biases as well; needs wandb
    wandb_project_name: str = "cleanRL"  # project at Weights & Biases
    wandb_entity: str | None = None  # user or team at Weights & Biases
    capture_video: bool = False  # film a game of each evaluation to runs/RUN/videos; needs moviepy
    save_model: bool = False  # keep the last network and that of the best evaluation in runs/RUN
    upload_model: bool = False  # publish the run on the Hugging Face hub at the end
    hf_entity: str = ""  # user or organisation on the hub; empty: whoever is logged in


@dataclass
class EnvironmentArgs:
    env_id: str = "BreakoutNoFrameskip-v4"  # a game of ale-py's, GAMENoFrameskip-v4 or ALE/GAME-v5
    num_envs: int = 4  # games the student plays side by side; the teacher plays 8 times as many
    repeat_action_probability: float | None = None  # sticky actions; unset: 0, in ALE/GAME-v5 0.25


@dataclass
class DQNArgs:
    network: Literal["impala", "nature"] = "impala"  # architecture of the network that learns
    total_timesteps: int = 10_000_000  # steps of the online phase; --resume may raise it
    learning_rate: float = 1e-4  # Adam's step size; with --final-learning-rate, that at lambda = 1
    final_learning_rate: float | None = None  # Adam's step size at lambda = 0; unset: constant
    adam_eps: float = 1e-8  # Adam's epsilon
    buffer_size: int = 1_000_000  # environment steps in the student's replay; 7.06 GB per million
    gamma: float = 0.99  # discount per step
    tau: float = 1.0  # share of the learning network in a target update; 1 copies it
    target_network_frequency: int = 1000  # online steps, or offline updates, per target update
    batch_size: int = 32  # transitions per gradient step
    n_step: int = 3  # rewards summed before the target network's value
    huber: bool = False  # Huber instead of squared TD error
    start_e: float = 1.0  # exploration at first, while the teacher or the student plays
    end_e: float = 0.01  # exploration in the end, and in every evaluation
    exploration_fraction: float = 0.10  # share of total_timesteps until exploration is at end_e
    learning_starts: int = 80_000  # online steps before the first online gradient step
    train_frequency: int = 4  # online steps per gradient step


@dataclass
class QDaggerArgs:
    teacher_steps: int = 500_000  # environment steps of the teacher's buffer
    offline_steps: int = 500_000  # gradient steps on the teacher's buffer; 0: it is not made at all
    temperature: float = 0.1  # makes policies of Q-values, softmax(Q / temperature), to compare
    distill_coef: float = 3.0  # weight of the distillation loss, times lambda
    distill_steps: int | None = None  # online steps after which lambda is 0; unset: never cut off
    distill_latch: bool = False  # once lambda was 0, keep it there
    return_baseline: Literal["zero", "random"] = "zero"  # score that lambda counts from
    teacher: str = "auto"  # auto (hub, else bundled), none (DQN from scratch), or a model's PATH
    teacher_policy_hf_repo: str | None = None  # hub REPO or REPO@REVISION; unset: CleanRL's
    teacher_model_exp_name: str = "dqn_atari_jax"  # the teacher's file there, without its ending
    teacher_eval_episodes: int = 10  # games that measure the teacher
    teacher_buffer: str | None = None  # file to read the teacher's buffer from, or to write it to


@dataclass
class SpeedArgs:
    amp: bool = False  # all layers but the last in bfloat16; slower on a CPU


@dataclass
class EvaluationArgs:
    checkpoint_frequency: int | None = None  # how often, in steps; 0: at evaluations; unset: 10 min
    resume: str | None = None  # go on with this run, runs/RUN, from its last checkpoint
    eval_frequency: int = 500_000  # online steps between evaluations; 0: at the end only
    eval_episodes: int = 10  # games per evaluation
    evaluate: str | None = None  # only play this saved model of --env-id, eval_episodes games


@dataclass
class Args(EvaluationArgs, SpeedArgs, QDaggerArgs, DQNArgs, EnvironmentArgs, RunArgs):
    """All flags, in the order above: a dataclass begins with the fields of its last base."""


@dataclass
class Groups:
    """The flags as --help shows them."""

    run: RunArgs
    environment: EnvironmentArgs
    dqn: DQNArgs
    qdagger: QDaggerArgs
    speed: SpeedArgs
    evaluation: EvaluationArgs


# Flags that may be changed when a run is resumed. A larger total_timesteps stretches exploration.
MAY_CHANGE = {
    "resume",
    "cuda",
    "total_timesteps",
    "checkpoint_frequency",
    "eval_frequency",
    "eval_episodes",
    "evaluate",
    "teacher_buffer",
    "track",
    "wandb_project_name",
    "wandb_entity",
    "capture_video",
    "save_model",
    "upload_model",
    "hf_entity",
}


class UserError(Exception):
    """What the user can put right: `main` shows its one line and exits with code 2."""


class Stopped(Exception):
    """A signal has come. Arguments: its number, and what to tell the user."""


@contextmanager
def user_error(problem: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a UserError: `problem` and, in brackets, why.

    Only for code that handles what comes from outside, such as files: an error of the program
    itself should end in a traceback.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem} ({reason(error)})") from None


def reason(error: BaseException) -> str:
    """What an error says, in a line; or what the operating system had said before it."""
    # torch.save, for one, hides «No space left on device» behind an error of its own.
    while isinstance(error.__context__, OSError):
        error = error.__context__
    text = " ".join(str(error).split())
    if text == "":
        text = type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"


# --- The method ---


class Batch(NamedTuple):
    obs: jax.Array  # uint8 (batch, 4, 84, 84)
    actions: jax.Array  # int32 (batch,)
    returns: jax.Array  # float32 (batch,): discounted sum of up to n rewards
    discounts: jax.Array  # float32 (batch,): gamma^k after k rewards; 0 if the last terminated
    next_obs: jax.Array  # uint8 (batch, 4, 84, 84)
    teacher_q_values: jax.Array  # float32 (batch, num_actions) at obs


def qdagger_loss(
    q_values: jax.Array,
    next_q_values: jax.Array,
    batch: Batch,
    distill_weight: float | jax.Array,
    temperature: float,
    huber: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scalars (loss, td_loss, distill_loss), means over the batch.

    Q-values are float32 (batch, num_actions), the student's at batch.obs and the target network's
    at batch.next_obs; distill_weight is distill_coef * lambda. Only `q_values` depend on the
    weights that Learner.update differentiates by, so that nothing needs to be detached.
    """
    td_target = batch.returns + batch.discounts * next_q_values.max(axis=1)
    q_taken = jnp.take_along_axis(q_values, batch.actions[:, None], axis=1).squeeze(1)
    if huber:
        td_loss = optax.huber_loss(q_taken, td_target).mean()
    else:
        td_loss = optax.squared_error(q_taken, td_target).mean()
    student_log_probs = jax.nn.log_softmax(q_values / temperature, axis=1)
    teacher_log_probs = jax.nn.log_softmax(batch.teacher_q_values / temperature, axis=1)
    # Optax's order: predictions, then targets, for KL(targets || predictions).
    distill_losses = optax.losses.kl_divergence_with_log_targets(
        student_log_probs, teacher_log_probs
    )
    distill_loss = distill_losses.mean()
    return td_loss + distill_weight * distill_loss, td_loss, distill_loss


GAMES_FOR_LAMBDA = 10  # whose mean is the student's return; fewer are too few to tell


def compute_lambda(
    scores: list[float], teacher_return: float, baseline_return: float = 0.0
) -> float:
    """lambda = clip(1 - G_student / G_teacher, 0, 1), G being mean scores above the baseline.

    Source: section 4.1 of the paper.
    """
    if len(scores) < GAMES_FOR_LAMBDA:
        return 1.0
    student = np.mean(scores) - baseline_return
    teacher = teacher_return - baseline_return
    return float(np.clip(1 - student / teacher, 0, 1))


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """From `start` at step 0 to `end` at step `duration`, and `end` from there on."""
    if step >= duration:
        return end
    return start + (end - start) * step / duration


def due(begin: int, end: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (begin, end]: periodic work under any stride.

    Never if `every` is 0.
    """
    return every > 0 and end // every > begin // every


@partial(jax.jit, static_argnums=0)  # compiled once per network, not per step or epsilon
def act(
    network: nn.Module,
    params: dict,
    key: jax.Array,
    step: int,
    obs: jax.Array,
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """epsilon-greedy actions int32 (batch,), and Q-values float32 (batch, num_actions).

    Observations are uint8 (batch, 4, 84, 84). Random by `key` and `step` alone.
    """
    q_values = network.apply(params, obs)
    num_actions = q_values.shape[1]
    key = jax.random.fold_in(key, step)
    draws = jax.random.uniform(key, (2, len(obs)))
    random_actions = (draws[0] * num_actions).astype(int)
    explores = draws[1] < epsilon
    return jnp.where(explores, random_actions, q_values.argmax(1)), q_values


# --- Networks ---

STACK = 4  # frames in an observation
SIDE = 84  # their height and width

# Under nn.compact a layer is declared where it is called; its weights are found in `params` by its
# class and number, such as Conv_0. Files are read in the sorted order of these names and recognised
# by shapes, see network_of. Who reorders layers, or has more than ten of a class in a module, as
# Conv_10 comes before Conv_2, can no longer read the files on the hub. Kernels begin as PyTorch's
# do, biases at 0. Flax's Conv pads so that the image keeps its size.
INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Conv = partial(nn.Conv, kernel_init=INIT)
Dense = partial(nn.Dense, kernel_init=INIT)


def max_pool(x: jax.Array) -> jax.Array:
    """3 x 3, stride 2, padding 1, as PyTorch pools, first over rows, then over columns.

    By slices, since the gradient of Flax's own, reduce_window, is slow on a CPU.
    """
    for _ in range(2):
        rows = x.shape[1]
        # Two rows before the first one, so that the rows form pairs: pair i has 2i - 2 and 2i - 1.
        padding = ((0, 0), (2, rows % 2), (0, 0), (0, 0))
        x = jnp.pad(x, padding, constant_values=-jnp.inf)
        pairs = x.reshape(len(x), -1, 2, x.shape[2], x.shape[3])
        first, second = jnp.unstack(pairs, axis=2)
        # The window around row 2i: rows 2i and 2i + 1, which are pair i + 1, and, of pair i, the
        # second, which is row 2i - 1.
        larger = jnp.maximum(first, second)
        x = jnp.maximum(larger[:, 1:], second[:, :-1])
        x = x.swapaxes(1, 2)  # columns become rows, and back
    return x


class ResidualBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        new_conv = partial(Conv, x.shape[-1], (3, 3), dtype=x.dtype)
        inner = new_conv()(nn.relu(x))
        return x + new_conv()(nn.relu(inner))


class ConvSequence(nn.Module):
    """Halves the image: (batch, h, w, in) to (batch, ceil(h / 2), ceil(w / 2), channels)."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Conv(self.channels, (3, 3), dtype=x.dtype)(x)
        x = max_pool(x)
        x = ResidualBlock()(x)
        return ResidualBlock()(x)


def normalized(obs: jax.Array, dtype: type) -> jax.Array:
    """uint8 (batch, 4, 84, 84) to pixels from 0 to 1, channels last: (batch, 84, 84, 4)."""
    return obs.transpose(0, 2, 3, 1).astype(dtype) / 255


class ImpalaCNN(nn.Module):
    """Impala-CNN (Espeholt et al., 2018), the student by default.

    Q-values float32 (batch, num_actions) from observations uint8 (batch, 4, 84, 84).
    """

    num_actions: int
    # All layers but the last compute in this; in the last, bfloat16 is too coarse to tell actions
    # apart. Weights are float32.
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        x = normalized(obs, self.dtype)
        x = ConvSequence(16)(x)  # 84 to 42 pixels a side
        x = ConvSequence(32)(x)  # to 21
        x = ConvSequence(32)(x)  # to 11
        x = nn.relu(x).reshape(len(x), -1)
        x = nn.relu(Dense(256, dtype=self.dtype)(x))
        return Dense(self.num_actions)(x.astype(jnp.float32))


class NatureCNN(nn.Module):
    """The Nature CNN (Mnih et al., 2015), which most teachers are; in and out as ImpalaCNN."""

    num_actions: int
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        conv = partial(Conv, padding="VALID", dtype=self.dtype)
        x = normalized(obs, self.dtype)
        x = nn.relu(conv(32, (8, 8), 4)(x))  # 84 to 20 pixels a side
        x = nn.relu(conv(64, (4, 4), 2)(x))  # to 9
        x = nn.relu(conv(64, (3, 3), 1)(x))  # to 7
        x = x.reshape(len(x), -1)
        x = nn.relu(Dense(512, dtype=self.dtype)(x))
        return Dense(self.num_actions)(x.astype(jnp.float32))


NETWORKS = {"impala": ImpalaCNN, "nature": NatureCNN}


# --- Replay and games ---


def fewest_steps(n_step: int, num_envs: int) -> int:
    """Environment steps that a replay must hold before it is drawn from.

    For each game, n steps that follow the one drawn, and four to draw from: two that may be forced
    at its start, see AtariGames, and two to spare.
    """
    return (n_step + 4) * num_envs


@struct.dataclass  # immutable, a tree of its arrays: compiled functions take and return it
class FrameReplay:
    """Uniform replay of single frames: stacks of four are rebuilt when it is sampled.

    So a million steps take 7 GB instead of 28, fit on the device that learns, and are drawn from
    there inside one XLA program; the price is a few operations on indices per draw.

    Step t of environment i has the id t * num_envs + i. It holds its observation's newest frame and
    what was done there; the next observation is that of step t + 1. A stack never reaches into an
    older episode but repeats its own first frame.

    An `excluded` step is never drawn. A return that meets one stops before it and bootstraps from
    the observation before that step, which is stored. Excluded are:
    - a step that a time limit cut off, and a game's last step before a resume, since the next
      observation is not stored;
    - the steps that AtariGames forced at the start of a game or a life, which the agent did not
      choose. Each is an episode of its own.
    """

    frames: jax.Array  # uint8 (size, 7056), a frame a row
    actions: jax.Array  # int32 (size,)
    rewards: jax.Array  # float32 (size,)
    terminations: jax.Array  # bool (size,)
    excluded: jax.Array  # bool (size,)
    teacher_q_values: jax.Array  # float32 (size, num_actions)
    written: jax.Array  # int32: steps of each environment so far
    num_envs: int = struct.field(pytree_node=False)  # static: fixed when a function is compiled

    @classmethod
    def create(cls, capacity: int, num_envs: int, num_actions: int) -> "FrameReplay":
        """Room for `capacity` environment steps, of all environments together."""
        size = math.ceil(capacity / num_envs) * num_envs
        with user_error("--buffer-size, --teacher-steps: too large for the memory"):
            frames = jax.block_until_ready(jnp.zeros((size, SIDE * SIDE), jnp.uint8))
        return cls(
            frames=frames,
            actions=jnp.zeros(size, jnp.int32),
            rewards=jnp.zeros(size),
            terminations=jnp.zeros(size, bool),
            excluded=jnp.ones(size, bool),  # until they are written: no stack reaches into them
            teacher_q_values=jnp.zeros((size, num_actions)),
            written=jnp.int32(0),
            num_envs=num_envs,
        )

    @partial(jax.jit, donate_argnums=0)  # 0 is self: the old replay is gone after the call
    def add(
        self, obs: jax.Array, step: "GameStep", teacher_q_values: jax.Array | None = None
    ) -> "FrameReplay":
        """The replay with one more step of each game; this one may not be used again.

        `obs`, uint8 (num_envs, 4, 84, 84), is what was seen before the step; Q-values there are
        (num_envs, num_actions), and what was stored stays if there are none.
        """
        # The slice never wraps around, since the size is a multiple of num_envs.
        here = self.written * self.num_envs % len(self.rewards)

        def put(stored: jax.Array, values: jax.Array) -> jax.Array:  # stored[here : ...] = values
            values = values.astype(stored.dtype)
            return jax.lax.dynamic_update_slice_in_dim(stored, values, here, axis=0)

        q_values = self.teacher_q_values
        if teacher_q_values is not None:  # one program with, one without
            q_values = put(q_values, teacher_q_values)
        newest_frames = obs[:, -1].reshape(self.num_envs, -1)
        return self.replace(
            frames=put(self.frames, newest_frames),
            actions=put(self.actions, step.actions),
            rewards=put(self.rewards, step.rewards),
            terminations=put(self.terminations, step.terminations),
            excluded=put(self.excluded, step.excluded),
            teacher_q_values=q_values,
            written=self.written + 1,
        )

    def sample(self, batch_size: int, n_step: int, gamma: float, key: jax.Array) -> Batch:
        """Transitions of steps that are drawn uniformly, with replacement.

        Compiled as a part of Learner.update.
        """
        step_ids = self.draw(batch_size, n_step, key)
        return self.transitions(step_ids, n_step, gamma)

    def draw(self, batch_size: int, n_step: int, key: jax.Array) -> jax.Array:
        """Ids of steps that are not excluded, int32 (batch_size,); see the class."""
        size = len(self.rewards)
        # Drawn from [begin, end). `written` counts the steps of one environment, so the oldest that
        # is stored has the id written * num_envs - size; begin is the first of which three earlier
        # frames are, too, and end the first whose observation n steps on is not stored yet.
        begin = jnp.maximum((self.written + STACK - 1) * self.num_envs - size, 0)
        end = (self.written - n_step) * self.num_envs
        # A compiled program needs fixed shapes: draw too many, and sort those that are excluded to
        # the end.
        count = max(4 * batch_size, 128)
        candidates = jax.random.randint(key, (count,), begin, end)
        excluded = self.excluded[candidates % size]
        candidates = candidates[excluded.argsort()]
        # If fewer than a batch are left, they are repeated. If all are excluded, as early on, 1
        # avoids a division by 0, and the batch does no harm: it has no rewards, and its next
        # observations are the same ones.
        num_valid = jnp.maximum(count - excluded.sum(), 1)
        picked = jnp.arange(batch_size) % num_valid
        return candidates[picked]

    def transitions(self, step_ids: jax.Array, n_step: int, gamma: float) -> Batch:
        """The transitions of up to n steps that begin at `step_ids`, int32 (batch,)."""
        ahead = jnp.arange(n_step)
        window = (step_ids[:, None] + ahead * self.num_envs) % len(self.rewards)  # (batch, n_step)
        terminated = self.terminations[window]
        excluded = self.excluded[window]
        # Rewards count up to and including a termination, and up to, but without, an excluded step.
        terminations_before = terminated.cumsum(1) - terminated
        exclusions_so_far = excluded.cumsum(1)
        counted = (terminations_before + exclusions_so_far) == 0
        bootstraps = ~(terminated & counted).any(1)
        num_rewards = counted.sum(1)  # at least 1, as the first step is not excluded
        next_ids = step_ids + num_rewards * self.num_envs
        stacks = self.stacks(jnp.concatenate([step_ids, next_ids]))
        obs, next_obs = jnp.split(stacks, 2)
        here = window[:, 0]
        return Batch(
            obs=obs,
            actions=self.actions[here],
            returns=(self.rewards[window] * counted * gamma**ahead).sum(1),
            discounts=gamma**num_rewards * bootstraps,
            next_obs=next_obs,
            teacher_q_values=self.teacher_q_values[here],
        )

    def stacks(self, step_ids: jax.Array) -> jax.Array:
        """Observations uint8 (batch, 4, 84, 84) at `step_ids`, int32 (batch,)."""
        size = len(self.rewards)
        back = jnp.arange(STACK)
        # The three steps before, the nearest first. What was never written counts as excluded.
        before = (step_ids[:, None] - back[1:] * self.num_envs) % size
        episode_ends = self.terminations[before] | self.excluded[before]
        age = (episode_ends.cumsum(1) == 0).sum(1)  # how many of them are of the same episode
        # The oldest frame first: 3, 2, 1, 0 steps back, but not past the episode's first step.
        steps_back = jnp.minimum(back[::-1], age[:, None])
        slots = (step_ids[:, None] - steps_back * self.num_envs) % size
        return self.frames[slots].reshape(-1, STACK, SIDE, SIDE)


# Actions that AtariGames forces, by their numbers in the games that have FIRE as the second.
NOOP = 0
FIRE = 1
RIGHT = 2  # in some games another direction


class FinishedGame(NamedTuple):
    env: int
    score: float  # sum of its raw rewards
    length: int  # in emulator frames


class GameStep(NamedTuple):
    actions: np.ndarray  # int64 (num_envs,): what was really done
    rewards: np.ndarray  # float32 (num_envs,): their signs
    terminations: np.ndarray  # bool (num_envs,): a game is over or a life is lost
    excluded: np.ndarray  # bool (num_envs,): cut off by a time limit, or forced; see FrameReplay
    finished: list[FinishedGame]


class AtariGames:
    """Atari as the reference wrappers show it (stable_baselines3's AtariWrapper), one per seed.

    An image is grey, 84 x 84; an episode's first one fills its whole stack. A lost life ends an
    episode, not the game. After it NOOP is forced and, in games that have FIRE, FIRE and RIGHT;
    these two also open every game. Each forced step is an episode of its own.

    Games play on between `step_async` and `step_wait`, in ALE's threads. All follows from seeds and
    actions.
    """

    def __init__(self, args: Args, seeds: np.ndarray):
        num_envs = len(seeds)
        spec = gym.spec(args.env_id).kwargs
        sticky = args.repeat_action_probability
        if sticky is None:
            sticky = spec["repeat_action_probability"]

        screen = ale_py.ALEInterface()
        screen.loadROM(ale_py.roms.get_rom_path(spec["game"]))
        height, width = screen.getScreenDims()
        self.emulators = AtariVectorEnv(
            spec["game"],
            num_envs,
            repeat_action_probability=sticky,
            noop_max=30,  # NoopResetEnv
            frameskip=4,  # MaxAndSkipEnv, with maxpool
            maxpool=True,
            episodic_life=False,  # EpisodicLifeEnv: in step_wait
            use_fire_reset=False,  # FireResetEnv: in step_async
            reward_clipping=False,  # ClipRewardEnv: in step_wait, since scores are of raw rewards
            img_height=height,  # WarpFrame: in grey(), since ALE's grey differs from OpenCV's
            img_width=width,
            grayscale=False,
            stack_num=1,  # VecFrameStack: in step_wait
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
        )
        self.num_actions = int(self.emulators.single_action_space.n)

        # forced_actions[k] is forced while k are left: at 3 NOOP, at 2 FIRE, at 1 RIGHT, at 0 none.
        has_fire = self.emulators.ale.get_action_set()[1] == ale_py.Action.FIRE
        if has_fire:
            self.forced_actions = np.array([NOOP, RIGHT, FIRE, NOOP])
        else:
            self.forced_actions = np.array([NOOP, NOOP])
        self.forced_after_life = len(self.forced_actions) - 1
        self.forced_after_game = self.forced_after_life - 1  # its NOOP is for a lost life alone
        self.forced_left = np.full(num_envs, self.forced_after_game)

        self.images, info = self.emulators.reset(seed=seeds)  # in colour and full size
        self.lives = info["lives"]
        # The number of each game's first frame in ALE's count of all frames, which begins at 0.
        self.first_frames = np.zeros(num_envs, dtype=int)
        self.scores = np.zeros(num_envs)
        # What to act on, uint8 (num_envs, 4, 84, 84).
        self.obs = self.grey()[:, None].repeat(STACK, axis=1)

    def grey(self) -> np.ndarray:
        """uint8 (num_envs, 84, 84), made of one tall picture of all games, which do not mix."""
        num_envs, _, height, width, channels = self.images.shape
        tall = self.images.reshape(num_envs * height, width, channels)
        tall = cv2.cvtColor(tall, cv2.COLOR_RGB2GRAY)
        tall = cv2.resize(tall, (SIDE, SIDE * num_envs), interpolation=cv2.INTER_AREA)
        return tall.reshape(num_envs, SIDE, SIDE)

    def step_async(self, actions: np.ndarray) -> None:
        """Begin a step with these actions, integers (num_envs,), but where others are forced."""
        self.forced = self.forced_left > 0
        self.actions = np.where(self.forced, self.forced_actions[self.forced_left], actions)
        self.forced_left -= self.forced
        self.emulators.send(self.actions)

    def step_wait(self) -> GameStep:
        """End the step that was begun."""
        self.images, rewards, game_over, truncated, info = self.emulators.recv()
        ended = game_over | truncated
        lives = info["lives"]
        life_lost = ~ended & (lives > 0) & (lives < self.lives)
        self.lives = lives
        self.forced_left[life_lost] = self.forced_after_life
        self.forced_left[ended] = self.forced_after_game

        self.scores += rewards
        # Where a game has ended, these are of the next one already.
        first_frames = info["frame_number"] - info["episode_frame_number"]
        finished = []
        for env in np.flatnonzero(ended).tolist():
            score = self.scores[env].item()
            length = (first_frames[env] - self.first_frames[env]).item()
            finished.append(FinishedGame(env, score, length))
        self.scores[ended] = 0
        self.first_frames = first_frames

        frames = self.grey()[:, None]
        begins = (ended | life_lost | self.forced)[:, None, None, None]
        shifted = np.concatenate([self.obs[:, 1:], frames], axis=1)
        self.obs = np.where(begins, frames, shifted)
        return GameStep(
            actions=self.actions,
            rewards=np.sign(rewards, dtype=np.float32),
            terminations=game_over | life_lost,
            excluded=truncated | self.forced,
            finished=finished,
        )


def evaluate(
    policy: Callable,
    args: Args,
    episodes: int,
    stop: Sequence[int] = (),
    epsilon: float | None = None,
    purpose: str = "evaluation",
    video: Path | None = None,
) -> list[float]:
    """Raw scores of `episodes` whole games by `policy`, which is `act` of some network.

    epsilon is end_e by default; the first game goes to `video`. Games and random numbers are its
    own and the same each time. How many games each environment plays is fixed beforehand, so that
    short ones are not preferred. Scores come in the order of the environments, the first game of
    each first, so that the first ten are not the shortest. `stop` is a list of signals, see main:
    once one has come, Stopped is raised.
    """
    if epsilon is None:
        epsilon = args.end_e
    num_envs = min(episodes, 10)
    seeds = seeds_for(purpose, args.seed, num_envs)
    games = AtariGames(args, seeds)
    key = key_for(purpose, args.seed)
    step = 0
    rounds = math.ceil(episodes / num_envs)
    scores = np.full((rounds, num_envs), np.nan)  # row k: the k-th game of each environment
    played = np.zeros(num_envs, dtype=int)

    film = Film(video)
    bar = tqdm(total=episodes, desc="evaluation", unit="game", leave=False)
    with closing(film), bar:
        while played.sum() < episodes:
            if stop:
                raise Stopped(stop[0], "stopped")
            if video is not None and played[0] == 0:
                film.add(games.images[0, 0])
            actions, _ = policy(key, step, games.obs, epsilon)
            step += 1
            games.step_async(np.asarray(actions))
            for env, score, _ in games.step_wait().finished:
                nth = played[env]
                if nth * num_envs + env < episodes:
                    scores[nth, env] = score
                    played[env] += 1
                    bar.update()
    return scores.flatten()[:episodes].tolist()


# --- Training ---


# Called with new parameters, old ones and tau; the old ones are donated.
move_towards = jax.jit(optax.incremental_update, donate_argnums=1)


class Learner:
    """The student, its target network, its optimizer, and the gradient step of phases 2 and 3."""

    def __init__(self, args: Args, num_actions: int):
        self.args = args
        dtype = jnp.bfloat16 if args.amp else jnp.float32
        self.network = NETWORKS[args.network](num_actions, dtype)
        self.key = jax.random.PRNGKey(args.seed)
        obs = np.zeros((1, STACK, SIDE, SIDE), np.uint8)  # only its shape counts
        self.params = jax.jit(self.network.init)(self.key, obs)
        # Copies, since `update` is given the arrays of params to use up.
        self.target_params = jax.tree.map(jnp.copy, self.params)
        self.adam = optax.scale_by_adam(eps=args.adam_eps)
        self.opt_state = self.adam.init(self.params)  # its averages, and how many gradient steps
        self.distill_weight = 0.0
        self.learning_rate = args.learning_rate
        self.metrics: dict[str, jax.Array] = {}  # scalars of the last gradient step

    def set_lambda(self, lambda_: float):
        """Weigh the teacher by lambda; the learning rate follows."""
        final = self.args.final_learning_rate
        if final is not None:
            self.learning_rate = final + (self.args.learning_rate - final) * lambda_
        self.distill_weight = self.args.distill_coef * lambda_

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def update(self, params, opt_state, target_params, replay, distill_weight, learning_rate):
        """A gradient step as one XLA program: new params, opt_state and metrics.

        `replay` is only read, and not copied. The old params and opt_state may not be used again.
        What is read from `self` is fixed when this is compiled, and a later change of it is not
        seen; what changes from step to step is an argument.
        """
        args = self.args
        key = jax.random.fold_in(self.key, opt_state.count)  # gradient steps so far
        batch = replay.sample(args.batch_size, args.n_step, args.gamma, key)
        next_q_values = self.network.apply(target_params, batch.next_obs)

        def loss_of(params: dict):
            q_values = self.network.apply(params, batch.obs)
            loss, td_loss, distill_loss = qdagger_loss(
                q_values, next_q_values, batch, distill_weight, args.temperature, args.huber
            )
            q_taken = jnp.take_along_axis(q_values, batch.actions[:, None], axis=1)
            metrics = {
                "loss": loss,
                "td_loss": td_loss,
                "distill_loss": distill_loss,
                "q_values": q_taken.mean(),
            }
            return loss, metrics

        # Of the first that loss_of returns; the second is passed through.
        gradient, metrics = jax.grad(loss_of, has_aux=True)(params)
        # Adam's step before the learning rate and the sign.
        direction, opt_state = self.adam.update(gradient, opt_state)
        params = optax.tree.add_scale(params, -learning_rate, direction)
        return params, opt_state, metrics

    def gradient_step(self, replay: FrameReplay):
        self.params, self.opt_state, self.metrics = self.update(
            self.params,
            self.opt_state,
            self.target_params,
            replay,
            self.distill_weight,
            self.learning_rate,
        )

    def read_metrics(self) -> dict[str, float]:
        """Those of the last gradient step; UserError if its loss is not finite.

        This waits for the device, so it is done only where they are logged or saved.
        """
        values = {name: value.item() for name, value in self.metrics.items()}
        loss = values.get("loss", 0.0)
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss}: start anew with a smaller --learning-rate")
        return values

    def update_target(self, tau: float):
        self.target_params = move_towards(self.params, self.target_params, tau)


@dataclass
class Progress:
    """How far a run has come: each phase is a loop that goes on from here."""

    phase: str = "online"  # with a teacher, "teacher buffer" and "offline" come first
    step: int = 0  # of this phase: environment steps, offline gradient steps
    global_step: int = 0  # of logs and exploration: offline and online steps
    seconds: float = 0.0  # spent on online steps, evaluations excluded
    teacher_return: float = 0.0  # mean score of its games
    baseline_return: float = 0.0  # that of random play, if lambda looks at it
    distilling: bool = False  # True while there is a teacher; once it is let go of, False for good
    recent_returns: list[float] = field(default_factory=list)  # of ten whole games, for lambda
    scores: list[float] = field(default_factory=list)  # of the last evaluation's games
    evaluated: bool = False  # whether an evaluation was done at this very step
    best_return: float | None = None  # highest mean of an evaluation, with --save-model
    best_step: int = 0  # its global_step
    saved_step: int = 0  # this phase's step at its last checkpoint

    def advance(self, steps: int):
        self.step += steps
        self.evaluated = False
        if self.phase != "teacher buffer":
            self.global_step += steps

    def begin(self, phase: str):
        self.phase = phase
        self.step = 0
        self.saved_step = 0
        self.evaluated = False


def fill_teacher_buffer(run: "Run", learner: Learner, replay: FrameReplay) -> FrameReplay:
    """Phase 1: the teacher plays, ever less at random; its steps and Q-values are stored."""
    args = run.args
    progress = run.progress
    file = None if args.teacher_buffer is None else Path(args.teacher_buffer)
    if file is not None and file.exists():  # all of phase 1, whatever a resume restored of it
        return load_teacher_buffer(file, run.made_with(), replay)

    num_envs = replay.num_envs  # eight times the student's: the teacher does not learn
    key = key_for("teacher buffer", args.seed)
    games = AtariGames(args, seeds_for("teacher buffer", args.seed, num_envs, progress.step))

    bar = tqdm(total=args.teacher_steps, initial=progress.step, desc="teacher buffer", unit="step")
    while progress.step < args.teacher_steps:
        run.checkpoint_if_due(learner, replay)
        epsilon = linear_schedule(args.start_e, args.end_e, args.teacher_steps, progress.step)
        obs = jax.device_put(games.obs)  # once, for act and for add
        actions, q_values = act(*run.teacher, key, progress.step, obs, epsilon)
        games.step_async(np.asarray(actions))
        step = games.step_wait()
        replay = replay.add(obs, without_finished(step), q_values)
        progress.advance(num_envs)
        bar.update(num_envs)
        if step.finished:
            bar.postfix = f"return={step.finished[-1].score:.1f}"
    bar.close()

    if file is not None:
        # By PyTorch, so that qdagger_dqn_atari_impalacnn.py can read it as well.
        tensors = jax.tree.map(torch.tensor, pack(replay))
        content = {"made_with": run.made_with(), "replay": tensors}
        write(partial(torch.save, content), file)
    return replay


OFFLINE_EVAL_FREQUENCY = 100_000  # gradient steps
LOG_FREQUENCY = 100  # steps


def learn_offline(run: "Run", learner: Learner, replay: FrameReplay) -> None:
    """Phase 2: the student learns from the teacher's buffer alone, with lambda = 1."""
    args = run.args
    progress = run.progress
    learner.set_lambda(1.0)

    bar = tqdm(total=args.offline_steps, initial=progress.step, desc="offline", unit="update")
    while progress.step < args.offline_steps:
        if progress.step % OFFLINE_EVAL_FREQUENCY == 0:
            run.evaluate_once(learner, "charts/offline/avg_episodic_return")
        run.checkpoint_if_due(learner, replay)

        learner.gradient_step(replay)
        progress.advance(1)
        bar.update(1)
        if progress.step % args.target_network_frequency == 0:
            learner.update_target(args.tau)

        if progress.step % LOG_FREQUENCY == 0:
            metrics = learner.read_metrics()
            scalars = {
                "charts/offline/loss": metrics["loss"],
                "charts/offline/q_loss": metrics["td_loss"],  # CleanRL's name
                "charts/offline/distill_loss": metrics["distill_loss"],
            }
            run.log(scalars)
            bar.postfix = f"return={np.mean(progress.scores):.1f}, λ=1.00"
    bar.close()

    run.evaluate_once(learner, "charts/offline/avg_episodic_return")
    run.checkpoint_if_due(learner, replay)
    learner.update_target(tau=1.0)  # phase 3 begins with two equal networks
    # The games just played give the first lambda of phase 3, also after a resume at the checkpoint
    # above, which has their scores.
    progress.recent_returns = progress.scores[:GAMES_FOR_LAMBDA]


def fade_teacher(args: Args, progress: Progress) -> float:
    """Lambda for the coming step; also lets go of the teacher for good when that is due."""
    if args.distill_steps is not None and progress.step >= args.distill_steps:
        progress.distilling = False
    if not progress.distilling:
        return 0.0
    lambda_ = compute_lambda(
        progress.recent_returns, progress.teacher_return, progress.baseline_return
    )
    if args.distill_latch and lambda_ == 0:
        progress.distilling = False
    return lambda_


def learn_online(run: "Run", learner: Learner, replay: FrameReplay) -> None:
    """Phase 3: the student plays on by itself, and the teacher fades."""
    args = run.args
    progress = run.progress
    exploration_steps = args.exploration_fraction * args.total_timesteps
    learning_starts = max(args.learning_starts, fewest_steps(args.n_step, args.num_envs))
    learner.metrics = {}  # else those of the last offline step would be logged as online

    key = key_for("online", args.seed)
    games = AtariGames(args, seeds_for("online", args.seed, args.num_envs, progress.step))

    bar = tqdm(total=args.total_timesteps, initial=progress.step, desc="online", unit="step")
    while progress.step < args.total_timesteps:
        begin = progress.step
        end = begin + args.num_envs
        # If the last stride passed a multiple of the frequency. It is done here and not after that
        # stride, so that one that a signal stopped is repeated. At step 0 phase 2 has done it.
        if begin > 0 and due(begin - args.num_envs, begin, args.eval_frequency):
            run.evaluate_once(learner, "eval/episodic_return")
        run.checkpoint_if_due(learner, replay)
        start = time.perf_counter()

        # How much the teacher weighs, and how much the student explores.
        lambda_ = fade_teacher(args, progress)
        if run.teacher is not None:  # else final_learning_rate would apply
            learner.set_lambda(lambda_)
        # global_step counts offline steps, too, as in CleanRL's file: by default epsilon begins
        # this phase at 0.5.
        epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, progress.global_step)

        # ACT: the games play on while the student learns.
        obs = jax.device_put(games.obs)
        actions, _ = act(learner.network, learner.params, key, begin, obs, epsilon)
        games.step_async(np.asarray(actions))

        # LEARN from what is stored; the step just begun is not yet.
        for online_step in range(begin + 1, end + 1):
            if online_step > learning_starts and online_step % args.train_frequency == 0:
                learner.gradient_step(replay)
            if online_step % args.target_network_frequency == 0:
                learner.update_target(args.tau)

        # STORE
        teacher_q_values = None
        if progress.distilling:
            _, teacher_q_values = act(*run.teacher, key, begin, obs, 0.0)  # for its Q-values alone
        step = games.step_wait()
        replay = replay.add(obs, without_finished(step), teacher_q_values)
        progress.advance(args.num_envs)
        progress.seconds += time.perf_counter() - start
        bar.update(args.num_envs)

        # LOG
        for game in step.finished:
            run.log({"charts/episodic_return": game.score, "charts/episodic_length": game.length})
            progress.recent_returns.append(game.score)
        progress.recent_returns = progress.recent_returns[-GAMES_FOR_LAMBDA:]
        if due(begin, end, LOG_FREQUENCY):
            metrics = learner.read_metrics()
            if not progress.distilling:  # the teacher's Q-values are no longer stored
                metrics.pop("distill_loss", None)
            scalars = {f"losses/{name}": value for name, value in metrics.items()}
            scalars["charts/epsilon"] = epsilon
            scalars["charts/distill_coeff"] = lambda_  # CleanRL's name for it
            scalars["charts/learning_rate"] = learner.learning_rate
            scalars["charts/SPS"] = end / progress.seconds
            run.log(scalars)
            student_return = np.mean(progress.recent_returns or math.nan)  # nan: no game yet
            bar.postfix = f"return={student_return:.1f}, λ={lambda_:.2f}"
    bar.close()

    if progress.step > 0:  # else the evaluation of phase 2 stands
        run.evaluate_once(learner, "eval/episodic_return")
    run.checkpoint_if_due(learner, replay)


def train(args: Args, stop: Sequence[int] = ()) -> Path:
    """Run all phases, or what --resume has left of them; returns the directory of the run.

    `stop` is a list of signals, see main: once one has come, Stopped is raised after a checkpoint.
    """
    saved = None
    phase = None
    if args.resume is not None:
        saved = load_checkpoint(Path(args.resume))
        with reading_checkpoint(args):
            phase = saved["progress"]["phase"]
            check_unchanged(args, saved["args"])
    validate(args, phase)
    name_idle_flags(args)
    if args.upload_model:
        check_upload(args)
    run = Run(args, stop)
    learner = Learner(args, run.num_actions)
    run.make_replay("online")  # and freed at once: a GPU without room for it should say so now

    if args.track:
        run.track()

    # Phase 0: the teacher is found and measured. A checkpoint holds it.
    if saved is not None:
        run.restore(saved, learner)
    elif args.teacher != "none":
        run.meet_teacher()
        if args.offline_steps > 0:
            run.progress.begin("teacher buffer")
    run.open_log()
    if saved is not None:
        run.save_models(learner)  # a kill may have come between a checkpoint and these
    replay = run.make_replay(run.progress.phase, saved)

    if run.progress.phase == "teacher buffer":
        replay = fill_teacher_buffer(run, learner, replay)
        run.progress.begin("offline")
    if run.progress.phase == "offline":
        learn_offline(run, learner, replay)
        run.progress.begin("online")
        del replay  # there is never room for two
        replay = run.make_replay("online")
    learn_online(run, learner, replay)
    run.finish()
    return run.directory


# --- The method is above. Below: runs, teachers, publishing, flags ---

TEACHER_ENVS_PER_ENV = 8  # more is faster, and does no harm, since the teacher does not learn
CHECKPOINT_SECONDS = 600


class Run:
    """A run's state but for learner and replay; its event files and checkpoints, in runs/RUN.

    The newest checkpoint is checkpoint.npz; the one before it stays as checkpoint.previous.npz.
    """

    def __init__(self, args, stop):
        self.args = args
        self.stop = stop
        self.progress = Progress()
        game = args.env_id.replace("/", "-")
        name = f"{game}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
        self.directory = Path("runs", name) if args.resume is None else Path(args.resume)
        self.teacher: tuple[nn.Module, dict] | None = None  # network and weights
        self.num_actions = AtariGames(args, seeds_for("online", args.seed, 1)).num_actions
        device = jax.devices()[0]
        if args.cuda and device.platform == "cpu":
            print(
                '--cuda: no GPU found (pip install "jax[cuda13]==0.10.2", with a driver from 580 '
                "on); on a CPU a million steps take half a day or more"
            )
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        else:
            cores = os.cpu_count()
        self.facts = {
            "device": device.device_kind,
            "jax": jax.__version__,
            "threads": str(cores),  # XLA's; sums, and so weights, depend on it
        }
        self.tracker = None  # the run at Weights & Biases
        self.checkpoint_due = False
        self.next_checkpoint = time.monotonic() + CHECKPOINT_SECONDS

    def meet_teacher(self):
        """Find, load and measure the teacher."""
        args = self.args
        progress = self.progress
        path, origin = find_teacher(args)
        self.teacher = load_network(path, self.num_actions, "--teacher", args.temperature)
        self.facts["teacher_file"] = f"{path}, {origin}"
        self.facts["teacher_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"teacher: {path}, {origin}")

        policy = partial(act, *self.teacher)
        play = partial(evaluate, policy, args, args.teacher_eval_episodes, self.stop)
        progress.teacher_return = float(np.mean(play()))
        if args.return_baseline == "random":
            random_scores = play(epsilon=1.0, purpose="baseline")  # the teacher never chooses
            progress.baseline_return = float(np.mean(random_scores))
        means = f"mean return {progress.teacher_return:.2f}"
        means += f", baseline {progress.baseline_return:.2f}"
        print(f"teacher: {means}")
        if progress.teacher_return <= progress.baseline_return:
            advice = "take another"
            if args.return_baseline != "random":
                advice += ", or --return-baseline random"
            raise UserError(f"--teacher {args.teacher}: {means}: {advice}")
        progress.distilling = True

    def track(self):
        """Log to Weights & Biases as well, from the event file; before anything else is done."""
        with user_error("--track"):
            import wandb

            self.tracker = wandb.init(
                project=self.args.wandb_project_name,
                entity=self.args.wandb_entity,
                id=self.directory.name,
                name=self.directory.name,
                resume="allow",
                config=asdict(self.args),
                sync_tensorboard=True,
            )

    def open_log(self):
        """Make the directory, or go on in that of --resume, and begin to log."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.lock()
        # What was logged after the checkpoint is purged, and logged again. At a checkpoint of phase
        # 1 that is everything, since global_step is still 0.
        starts_anew = self.args.resume is None or self.progress.phase == "teacher buffer"
        first_step = 0 if starts_anew else self.progress.global_step + 1

        if self.tracker is not None:
            self.tracker.config.update(self.facts, allow_val_change=True)
        settings = asdict(self.args) | self.facts
        rows = "\n".join(f"|{name}|{value}|" for name, value in settings.items())
        with self.writing():
            self.writer = SummaryWriter(str(self.directory), purge_step=first_step, flush_secs=10)
            self.writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{rows}", first_step)
        if self.teacher is not None and starts_anew:
            self.log({"charts/teacher/avg_episodic_return": self.progress.teacher_return})

    def lock(self):
        """Keep other processes out of the directory, where the file system can; until the end."""
        self.lock_file = (self.directory / "lock").open("w")
        if fcntl is None:
            return
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{self.directory}: another process is at work there") from None
        except OSError as error:
            print(f"{self.directory}: no lock, so let no other process resume it ({reason(error)})")

    def writing(self):
        return user_error(f"cannot write {self.directory}; once it can be written, --resume")

    def log(self, scalars):
        with self.writing():
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, self.progress.global_step)

    def evaluate_once(self, learner, tag):
        """Let the student play, unless that was done at this step before a resume.

        `checkpoint_if_due` has to follow: it saves the scores, and stops if a signal has come.
        """
        args = self.args
        progress = self.progress
        if progress.evaluated:
            return
        video = None
        if args.capture_video:
            video = self.directory / "videos" / f"{progress.global_step}.mp4"
        policy = partial(act, learner.network, learner.params)
        with suppress(Stopped):
            progress.scores = evaluate(policy, args, args.eval_episodes, self.stop, video=video)
            progress.evaluated = True
            self.checkpoint_due = True
            mean = float(np.mean(progress.scores))
            self.log({tag: mean})
            if args.save_model and (progress.best_return is None or mean > progress.best_return):
                progress.best_return = mean
                progress.best_step = progress.global_step

    def checkpoint_if_due(self, learner, replay):
        """After evaluations, as often as --checkpoint-frequency says, and if stopped: Stopped."""
        frequency = self.args.checkpoint_frequency
        if frequency is None:
            periodic = time.monotonic() > self.next_checkpoint
        else:
            periodic = due(self.progress.saved_step, self.progress.step, frequency)
        if periodic or self.checkpoint_due or self.stop:
            self.checkpoint(learner, replay)
        if self.stop:
            command = shlex.join(["python", sys.argv[0], "--resume", str(self.directory)])
            raise Stopped(self.stop[0], f"stopped; go on with: {command}")

    def checkpoint(self, learner, replay):
        learner.read_metrics()  # nothing is kept that has diverged
        with self.writing():
            self.writer.flush()
        self.progress.saved_step = self.progress.step
        content = {
            "args": asdict(self.args),
            "facts": self.facts,
            "progress": asdict(self.progress),
            "teacher": None if self.teacher is None else jax.tree.leaves(self.teacher[1]),
            # Lists of arrays, since msgpack knows no optax state; `restore` gives them its form.
            "params": jax.tree.leaves(learner.params),
            "target_params": jax.tree.leaves(learner.target_params),
            "optimizer": jax.tree.leaves(learner.opt_state),
            "replay": pack(replay),
        }
        # As an array in an npz file, whose checksum reveals damage.
        state = np.frombuffer(serialization.msgpack_serialize(content), np.uint8)
        path = self.directory / "checkpoint.npz"
        write(partial(np.savez, state=state), path, self.directory / "checkpoint.previous.npz")
        self.checkpoint_due = False
        self.next_checkpoint = time.monotonic() + CHECKPOINT_SECONDS
        self.save_models(learner)

    def save_models(self, learner):
        """With --save-model: the network as it is, also as the best if its evaluation was."""
        if not self.args.save_model:
            return
        progress = self.progress
        names = [self.args.exp_name]
        if progress.evaluated and progress.best_step == progress.global_step:
            names.append(f"{self.args.exp_name}.best")
        model = serialization.to_bytes(learner.params)
        for name in names:
            write(lambda file: file.write(model), self.directory / f"{name}.cleanrl_model")

    def restore(self, saved, learner):
        """Go on from a checkpoint; its replay is restored by `make_replay`."""

        def like(tree, leaves: list):
            leaves = [jnp.asarray(leaf) for leaf in leaves]
            return jax.tree.unflatten(jax.tree.structure(tree), leaves)

        with reading_checkpoint(self.args):
            self.facts = saved["facts"] | self.facts
            self.progress = Progress(**saved["progress"])
            if saved["teacher"] is not None:
                self.teacher = network_of(saved["teacher"], self.num_actions)
            learner.params = like(learner.params, saved["params"])
            learner.target_params = like(learner.target_params, saved["target_params"])
            learner.opt_state = like(learner.opt_state, saved["optimizer"])

    def make_replay(self, phase, saved=None) -> FrameReplay:
        """The student's replay, or the teacher's buffer before phase 3; restored from `saved`."""
        capacity = self.args.buffer_size
        num_envs = self.args.num_envs
        if phase != "online":
            capacity = self.args.teacher_steps
            num_envs *= TEACHER_ENVS_PER_ENV
        replay = FrameReplay.create(capacity, num_envs, self.num_actions)
        if saved is not None:
            with reading_checkpoint(self.args):
                replay = unpack(saved.pop("replay"), replay)
        return replay

    def made_with(self) -> dict:
        """What a file of --teacher-buffer depends on, but for the seed: all seeds may share one."""
        names = ["env_id", "repeat_action_probability", "num_envs", "teacher_steps"]
        names += ["start_e", "end_e", "temperature"]  # the last scales logits, see load_sb3
        settings = {name: getattr(self.args, name) for name in names}
        return settings | {"teacher": self.facts["teacher_sha256"]}

    def finish(self):
        with self.writing():
            self.writer.close()
        progress = self.progress
        score = f"{np.mean(progress.scores):.2f} ± {np.std(progress.scores):.2f}"
        result = f"{self.directory}: {score} over {len(progress.scores)} games"
        if progress.best_return is not None:
            result += f"; best evaluation: {progress.best_return:.2f} at step {progress.best_step}"
        print(result)
        if self.args.upload_model:
            upload(self.args, self.directory, score)


PURPOSES = ("teacher buffer", "online", "evaluation", "baseline")


def seeds_for(purpose: str, seed: int, count: int, step: int = 0) -> np.ndarray:
    """`count` seeds, int64 (count,), unlike those of another purpose, seed or step of a resume."""
    entropy = np.random.SeedSequence([seed, PURPOSES.index(purpose), step])
    return entropy.generate_state(count).astype(np.int64) % 2**31


def key_for(purpose, seed) -> jax.Array:
    return jax.random.PRNGKey(seeds_for(purpose, seed, 1)[0])


def without_finished(step: GameStep) -> GameStep:
    """For `FrameReplay.add`, which would be compiled anew for each length of that list."""
    return step._replace(finished=None)


FIELDS = ("actions", "rewards", "terminations", "excluded", "teacher_q_values")
BLOCK = 4096  # frames that are compressed together


def pack(replay) -> dict:
    """All that was written to a replay, on the host, its frames compressed by several threads."""

    used = min(int(replay.written) * replay.num_envs, len(replay.rewards))

    def compress(begin: int) -> np.ndarray:
        block = np.asarray(replay.frames[begin : min(begin + BLOCK, used)])
        return np.frombuffer(zlib.compress(block, level=1), dtype=np.uint8)

    with ThreadPoolExecutor(8) as pool:  # each thread slices on the device, then fetches
        frames = list(pool.map(compress, range(0, used, BLOCK)))
    state = {"written": np.asarray(replay.written), "frames": frames}
    for name in FIELDS:
        state[name] = np.asarray(getattr(replay, name)[:used])
    return state


def unpack(state, replay) -> FrameReplay:
    """The replay restored; the one given, of the same shape, may not be used again.

    Its games are gone, so their last steps are excluded.
    """
    # Frames are written in place, block by block, since there is no room for a copy of them.
    put = jax.jit(partial(jax.lax.dynamic_update_slice_in_dim, axis=0), donate_argnums=0)
    frames = replay.frames
    for block, packed in enumerate(state["frames"]):
        pixels = np.frombuffer(zlib.decompress(packed), np.uint8)
        frames = put(frames, pixels.reshape(-1, SIDE * SIDE), block * BLOCK)
    replay = replay.replace(frames=frames, written=jnp.asarray(state["written"], jnp.int32))

    # `x.at[here].set(y)` is a copy of x in which x[here] = y.
    used = len(state["actions"])
    for name in FIELDS:
        restored = getattr(replay, name).at[:used].set(state[name])
        replay = replay.replace(**{name: restored})
    newest = (int(replay.written) - 1) * replay.num_envs % len(replay.rewards)
    excluded = replay.excluded.at[newest : newest + replay.num_envs].set(True)
    return replay.replace(excluded=excluded)


def open_film(path, image):
    """A writer of RGB images like this one, 15 a second (extra `video`)."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    height, width = image.shape[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    return FFMPEG_VideoWriter(str(path), (width, height), fps=15)


class Film:
    """A film, begun with its first image. What fails here is said, and costs the film alone."""

    def __init__(self, path):
        self.path = path
        self.writer = None
        self.failed = False

    def add(self, image):
        """Append an RGB image, uint8 (height, width, 3)."""
        if self.failed:
            return
        try:
            if self.writer is None:
                self.writer = open_film(self.path, image)
            self.writer.write_frame(image)
        except Exception as error:
            self.failed = True
            tqdm.write(f"--capture-video: {self.path} is cut short: {reason(error)}", sys.stderr)

    def close(self):
        with suppress(Exception):
            if self.writer is not None:
                self.writer.close()


def try_to_film():
    """UserError if no film can be made here."""
    with TemporaryDirectory() as directory, user_error("--capture-video: no film can be made here"):
        path = Path(directory, "trial.mp4")
        image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        film = open_film(path, image)
        film.write_frame(image)
        film.close()
        if not path.exists() or path.stat().st_size == 0:
            raise OSError("ffmpeg wrote nothing")


def network_of(weights: list, num_actions) -> tuple[nn.Module, dict]:
    """The network that has weights of these shapes, and its params; ValueError if none has."""
    obs = jnp.zeros((1, STACK, SIDE, SIDE), jnp.uint8)
    shapes = [np.shape(weight) for weight in weights]
    for kind in NETWORKS.values():
        network = kind(num_actions)
        # The tree of its weights with their shapes alone: nothing is computed.
        form = jax.eval_shape(network.init, jax.random.PRNGKey(0), obs)
        if [leaf.shape for leaf in jax.tree.leaves(form)] == shapes:
            arrays = [jnp.asarray(weight) for weight in weights]
            return network, jax.tree.unflatten(jax.tree.structure(form), arrays)
    raise ValueError(
        f"no weights of a Nature CNN or Impala-CNN for the {num_actions} actions of --env-id"
    )


def from_torch(state: dict[str, Tensor]) -> list[np.ndarray]:
    """A PyTorch network's weights in Flax's order, which is PyTorch's with each bias first.

    PyTorch puts channels first, also where an image is flattened. So kernels are turned:

        convolution             (outputs, channels, 3, 3)       to  (3, 3, channels, outputs)
        layer after flattening  (outputs, channels * pixels)    to  (pixels * channels, outputs)
        layer after a vector    (outputs, channels)             to  (channels, outputs)
    """
    arrays = [tensor.float().numpy() for tensor in state.values()]
    weights = []
    channels = STACK  # of what comes into a layer
    kernels = arrays[::2]
    biases = arrays[1::2]
    for kernel, bias in zip(kernels, biases, strict=True):
        outputs = len(kernel)
        by_pixel = kernel.reshape(outputs, channels, -1)  # a vector has one pixel
        turned = by_pixel.transpose(2, 1, 0)
        weights += [bias, turned.reshape(*kernel.shape[2:], -1, outputs)]
        channels = outputs
    return weights


def load(file) -> dict:
    """Tensors and plain values; never code. ValueError if there is anything else."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose text advises to run the code
        raise ValueError("damaged, or not made of tensors and plain values alone") from None


def load_sb3(path, num_actions, temperature) -> dict[str, Tensor]:
    """The Nature CNN in a Stable-Baselines3 zip of DQN, QR-DQN, PPO or A2C with CnnPolicy.

    Logits of the last two, times temperature, stand for Q-values: softmax(Q / temperature) is that
    agent's policy. ValueError if there is none.
    """
    with zipfile.ZipFile(path) as file:
        its_actions = int(json.loads(file.read("data"))["action_space"].get("n", num_actions))
        state = load(file.open("policy.pth"))
    # Value and target networks, and copies.
    unused = r".*(_target|value_net)\.|(pi|vf)_features_extractor\."
    state = {name: tensor for name, tensor in state.items() if not re.match(unused, name)}
    if its_actions != num_actions or len(state) != 10:  # five layers, each weight and bias
        raise ValueError(
            f"no CnnPolicy of DQN, QR-DQN, PPO or A2C for the {num_actions} actions of --env-id"
        )
    for name in list(state)[-2:]:  # of the last layer
        # QR-DQN's gives quantiles for each action, whose mean is linear, too.
        by_quantile = state[name].unflatten(0, (-1, num_actions))
        state[name] = by_quantile.mean(0)
        if "action" in name:  # of PPO and A2C: action_net
            state[name] *= temperature
    return state


def load_network(path, num_actions, flag, temperature=1.0) -> tuple[nn.Module, dict]:
    """Network and weights in a Flax model, a state dict of PyTorch's or a Stable-Baselines3 zip.

    UserError if there is none. No file can run code.
    """
    with user_error(f"{flag} {path}: cannot be read"):
        if not zipfile.is_zipfile(path):
            weights = jax.tree.leaves(serialization.msgpack_restore(path.read_bytes()))
        elif "policy.pth" in zipfile.ZipFile(path).namelist():  # torch writes zips as well
            weights = from_torch(load_sb3(path, num_actions, temperature))
        else:
            weights = from_torch(load(path))
        return network_of(weights, num_actions)


def hub_is_silent(error) -> bool:
    """Whether the hub could not be asked, or has no time: no connection, a time-out, 429, 5xx.

    Then another file may stand in. All else is the user's to know, be it an answer, such as 404 to
    a wrong name, or a fault on this side, such as a full disk or a certificate.
    """
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    if "certificate" in str(error).lower():
        return False
    # By their names, since the client's library for HTTP depends on its version.
    names = {kind.__name__ for kind in type(error).__mro__}
    silent = {"ConnectionError", "NetworkError", "RemoteProtocolError"}
    silent |= {"TimeoutError", "TimeoutException", "LocalEntryNotFoundError"}
    return not names.isdisjoint(silent)


def find_teacher(args) -> tuple[Path, str]:
    """The teacher's file, and why that one.

    The path given, else the hub's, else its cache's, else the bundled one.
    """
    if args.teacher != "auto":
        return Path(args.teacher), "as given"
    env_id = re.sub("ALE/(.*)-v5", r"\1NoFrameskip-v4", args.env_id)  # the older name of the game
    wanted = args.teacher_policy_hf_repo
    if wanted is None:
        wanted = f"cleanrl/{env_id}-{args.teacher_model_exp_name}-seed1"
    repo, at, revision = wanted.partition("@")
    if at == "":
        revision = None  # the newest
    sb3 = re.search("/((dqn|qrdqn|ppo|a2c)-.*)", repo, re.IGNORECASE)
    file = f"{args.teacher_model_exp_name}.cleanrl_model" if sb3 is None else f"{sb3[1]}.zip"

    with user_error(f"--teacher-policy-hf-repo {wanted}: no {file} from there"):
        try:
            # Once and not for long: hf_hub_download itself tries again for half a minute and more.
            url = hf_hub_url(repo, file, revision=revision)
            answer = ThreadPoolExecutor(1).submit(get_hf_file_metadata, url, timeout=5)
            answer.result(timeout=8)
            path = Path(hf_hub_download(repo, file, revision=revision))
            return path, f"from the hub, {repo}@{path.parent.name}"
        except Exception as error:
            refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401
            if refused and get_token() is not None:
                raise UserError(
                    f"--teacher-policy-hf-repo {wanted}: the hub refuses the token stored here, "
                    "even for what is public: `hf auth login` anew, or `hf auth logout`"
                ) from None
            if not hub_is_silent(error):
                raise
            silence = f"the hub is out of reach: {reason(error)}"
            with suppress(errors.LocalEntryNotFoundError):
                path = Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
                return path, f"from the cache of the hub, {repo}@{path.parent.name}; {silence}"

    # A bundled file stands in for this repository alone.
    default_repo = f"cleanrl/{env_id}-{Args.teacher_model_exp_name}-seed1"
    bundled = Path(__file__).parent / "teachers" / f"{env_id}.cleanrl_model"
    if wanted != default_repo or not bundled.exists():
        raise UserError(f"--teacher auto: {wanted} is not in the cache, and {silence}; give a PATH")
    return bundled, f"bundled; {silence}"


def load_teacher_buffer(path, made_with, replay) -> FrameReplay:
    """`replay` with --teacher-buffer; UserError if that is damaged, or of other settings."""
    with user_error(f"--teacher-buffer {path}: not a teacher's buffer of this version"):
        content = load(path)
        for name, value in made_with.items():
            if content["made_with"][name] != value:
                raise UserError(
                    f"--teacher-buffer {path}: made with another {name}; name another file"
                )
        return unpack(jax.tree.map(np.asarray, content["replay"]), replay)


def write(save: Callable, path, before=None):
    """save(file) beside `path`, to the disk, then rename: never half a file.

    What was there is kept as `before`.
    """
    # A name of its own, since a buffer may have several writers, and on several machines.
    part = Path(f"{path}.{os.urandom(4).hex()}.part")
    with user_error(f"cannot write {path}; once it can be written, --resume"):
        try:
            with part.open("wb") as file:
                save(file)
                file.flush()
                os.fsync(file.fileno())
            if before is not None and path.exists():
                path.replace(before)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)  # what a full disk has left of it


def load_checkpoint(run_dir) -> dict:
    """The newest whole state of a run: arrays and plain values. UserError if there is none."""
    for name in ("checkpoint.npz", "checkpoint.previous.npz"):
        path = run_dir / name
        if not path.exists():
            continue
        try:
            return serialization.msgpack_restore(np.load(path)["state"].tobytes())
        except Exception as error:
            print(f"--resume: {path} cannot be read: {type(error).__name__}")
    raise UserError(f"--resume {run_dir}: no checkpoint of this version in it, give runs/RUN")


def reading_checkpoint(args):
    """For what is read from the checkpoint of --resume."""
    return user_error(f"--resume {args.resume}: its checkpoint does not fit")


def check_upload(args):
    """UserError if the run could not be uploaded in the end."""
    with user_error("--upload-model: the hub does not know you; `hf auth login` first"):
        user = HfApi().whoami()
    own = [user["name"]]
    own += [organisation["name"] for organisation in user.get("orgs", [])]
    if args.hf_entity and args.hf_entity not in own:
        raise UserError(
            f"--hf-entity {args.hf_entity}: neither {user['name']} nor one of its organisations"
        )
    with user_error(f"--upload-model: {hub_name(args)} is no name for the hub; try --exp-name"):
        validate_repo_id(hub_name(args))


def hub_name(args) -> str:
    name = f"{args.env_id}-{args.exp_name}-seed{args.seed}".replace("/", "-")
    return f"{args.hf_entity}/{name}" if args.hf_entity else name


def upload(args, run_dir, score):
    """Publish models, event files, films and a card with the score."""
    task = "reinforcement-learning"
    name = hub_name(args)
    result = EvalResult(
        task_type=task,
        dataset_type=args.env_id,
        dataset_name=args.env_id,
        metric_type="mean_reward",
        metric_value=score,
    )
    card = ModelCardData(
        model_name=name,
        tags=[args.env_id, task],
        pipeline_tag=task,
        eval_results=[result],
    )
    text = f"---\n{card}\n---\n# QDagger on {args.env_id}: {score}\n"
    (run_dir / "README.md").write_text(text, encoding="utf-8")
    with user_error("--upload-model: the run is not published; try --resume"):
        api = HfApi()
        repo = api.create_repo(name, exist_ok=True)
        private = ["checkpoint*", "lock", "*.part"]
        api.upload_folder(repo_id=repo.repo_id, folder_path=run_dir, ignore_patterns=private)


def refuse(args, flag, rule):
    raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: {rule}")


# Flags that must be above 0, and those that are shares of 1.
POSITIVE = {
    "num_envs",
    "buffer_size",
    "batch_size",
    "n_step",
    "train_frequency",
    "target_network_frequency",
    "learning_rate",
    "adam_eps",
    "temperature",
    "teacher_eval_episodes",
    "eval_episodes",
}
SHARES = {"gamma", "tau", "start_e", "end_e", "exploration_fraction", "repeat_action_probability"}

# Flags that play no part without a teacher.
OF_THE_TEACHER = {
    "teacher_steps",
    "offline_steps",
    "temperature",
    "distill_coef",
    "distill_steps",
    "distill_latch",
    "return_baseline",
    "final_learning_rate",
    "teacher_policy_hf_repo",
    "teacher_model_exp_name",
    "teacher_eval_episodes",
    "teacher_buffer",
}


def validate(args, phase=None):
    """UserError for the first flag that cannot work; --resume goes on in `phase`."""

    def require(condition, flag, rule):
        if not condition:
            refuse(args, flag, rule)

    is_game = args.env_id in gym.registry
    named_so = re.fullmatch(r"ALE/\w+-v5|\w+NoFrameskip-v4", args.env_id) is not None
    rule = "no game of ale-py's, such as PongNoFrameskip-v4 or ALE/Pong-v5"
    require(is_game and named_so, "env_id", rule)
    is_name = re.fullmatch(r"\w[\w .+=-]{0,99}", args.exp_name) is not None
    require(is_name, "exp_name", "must be a name for files, of 100 letters at most")

    for flag, value in asdict(args).items():
        if not isinstance(value, int | float):
            continue
        require(0 <= value < 2**31, flag, "must lie between 0 and 2^31")
        if flag in POSITIVE:
            require(value > 0, flag, "must be above 0")
        if flag in SHARES:
            require(value <= 1, flag, "must lie between 0 and 1")
    rule = "must be 1e-6 or more: float32 cannot tell Q-values apart that differ by less"
    require(args.temperature >= 1e-6, "temperature", rule)

    offline_steps = 0 if args.teacher == "none" else args.offline_steps
    rule = "neither offline nor online steps: there is nothing to do"
    require(offline_steps + args.total_timesteps > 0, "total_timesteps", rule)
    fewest = fewest_steps(args.n_step, args.num_envs)
    if args.total_timesteps > 0:
        rule = f"nothing is learned: must be below the {args.total_timesteps} of --total-timesteps"
        require(args.learning_starts < args.total_timesteps, "learning_starts", rule)
        # Twice as many, so that there is a choice when the oldest three have lost their stacks.
        require(args.buffer_size >= 2 * fewest, "buffer_size", f"too few: {2 * fewest} or more")
    if offline_steps > 0:
        fewest *= TEACHER_ENVS_PER_ENV
        require(args.teacher_steps >= fewest, "teacher_steps", f"too few: {fewest} or more")
    is_to_come = offline_steps > 0 and phase in (None, "teacher buffer")
    if args.teacher_buffer is not None and is_to_come:
        path = Path(args.teacher_buffer).absolute()
        usable = path.exists() or os.access(path.parent, os.W_OK)
        require(usable, "teacher_buffer", "not there, nor writable")

    if args.upload_model:
        require(args.save_model, "upload_model", "there is nothing to upload without --save-model")
    for flag, package in (("capture_video", "moviepy"), ("track", "wandb")):
        if getattr(args, flag):
            found = importlib.util.find_spec(package) is not None
            require(found, flag, f"pip install {package}")
    if args.capture_video:
        try_to_film()


def name_idle_flags(args):
    """A line that names the flags which were given, but play no part."""
    idle = set()
    if args.teacher == "none":
        idle = OF_THE_TEACHER
    elif args.offline_steps == 0:
        idle = {"teacher_steps", "teacher_buffer"}
    given = [flag for flag in sorted(idle) if getattr(args, flag) != getattr(Args, flag)]
    if given:
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in given)
        cause = "--teacher none" if args.teacher == "none" else "--offline-steps 0"
        print(f"{cause}: no part is played by {flags}")


def check_unchanged(args, before):
    """UserError for the first flag that a resumed run must keep, but that is another."""
    for flag, value in before.items():
        if flag not in MAY_CHANGE and getattr(args, flag) != value:
            rule = f"the run to be resumed has {value}; leave out this flag, or --resume"
            refuse(args, flag, rule)


def play_model(args, stop):
    """--evaluate: print each game's score, and their mean and standard deviation."""
    validate(args)
    path = Path(args.evaluate)
    num_actions = AtariGames(args, seeds_for("evaluation", args.seed, 1)).num_actions
    policy = partial(act, *load_network(path, num_actions, "--evaluate"))
    video = path.parent / "videos" / "evaluation.mp4" if args.capture_video else None
    scores = evaluate(policy, args, args.eval_episodes, stop, video=video)
    for number, score in enumerate(scores, 1):
        print(f"game {number}: {score:g}")
    games = f"{len(scores)} games of {args.env_id}"
    print(f"{np.mean(scores):.2f} ± {np.std(scores):.2f} over {games}")


def parse_flags() -> Args:
    """The flags of the command line; with --resume, what is not said again is as it was."""
    # A switch takes no value: neither --cuda=False nor --cuda False.
    for word, value in pairwise([*sys.argv[1:], ""]):
        flag, is_joined, joined = word.partition("=")
        name = flag.removeprefix("--").removeprefix("no-")
        is_switch = isinstance(getattr(Args, name.replace("-", "_"), None), bool)
        if is_switch and (is_joined or value.lower() in ("true", "false")):
            rule = f"takes no value; it is --{name} or --no-{name}"
            raise UserError(f"{flag} {joined or value}: {rule}")
    args = read_flags(Args())
    if args.resume is None:
        return args
    saved = load_checkpoint(Path(args.resume))
    with user_error(f"--resume {args.resume}: its flags are those of another version"):
        before = Args(**saved["args"])
        before.resume = args.resume
        before.evaluate = None
    return read_flags(before)


def read_flags(defaults: Args) -> Args:
    """Those of the command line, which --help shows in groups.

    UserError for an empty one, such as a shell's unset variable.
    """
    groups = {}
    for group in fields(Groups):
        names = [flag.name for flag in fields(group.type)]
        groups[group.name] = group.type(**{name: getattr(defaults, name) for name in names})
    given = tyro.cli(
        tyro.conf.OmitArgPrefixes[Groups],
        description=__doc__.split("\n\nReincarnating")[0],  # what it is, and three commands
        default=Groups(**groups),
    )

    values = {}
    for group in vars(given).values():
        values |= vars(group)
    args = Args(**values)
    for flag, value in values.items():
        if value == "" and flag != "hf_entity":
            refuse(args, flag, "is empty")
    return args


# As allocators say it: CUDA's, a CPU's and XLA's.
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|RESOURCE_EXHAUSTED")


def ignore_full_disk(failed):
    """No traceback when the thread that writes the event file meets a full disk.

    `Run.log` raises that error again, as one line.
    """
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def main():
    stop: list[int] = []
    on_terminal = [stream for stream in (1, 2) if os.isatty(stream)]

    def handle(number, _):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
        if number == getattr(signal, "SIGHUP", None):
            # The terminal is gone, and writing to it would be an error.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in on_terminal:
                os.dup2(nowhere, stream)
        # print may be in the middle of a line
        os.write(2, b"\nstopping; the same signal again quits at once\n")

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # the last is Slurm's warning
        number = getattr(signal, name, None)  # Windows lacks two of them
        if number is not None and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, handle)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for a terminal that has no λ
    threading.excepthook = ignore_full_disk
    try:
        args = parse_flags()
        if not args.cuda:
            jax.config.update("jax_platforms", "cpu")
        if args.evaluate is not None:
            play_model(args, stop)
        else:
            train(args, stop)
    except (UserError, OSError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)  # above a progress bar
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        advice = "smaller --buffer-size, --teacher-steps or --batch-size need less"
        tqdm.write(f"error: out of memory; {advice} ({reason(error)})", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        number, message = stopped.args
        tqdm.write(message, file=sys.stderr)
        sys.exit(128 + number)


if __name__ == "__main__":
    main()

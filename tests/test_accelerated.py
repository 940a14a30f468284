"""The gradient step by hand; it is the same in bfloat16, compiled, and as CUDA graphs.

Graphs are tried on a GPU and, simulated, on the CPU.
"""

import copy
import gc
import os
import runpy
import shutil
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from conftest import PROGRAM, points, refusal, tensors_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import Args, FrameReplay, GameStep, Graphed, Learner, qdagger_loss

NUM_ENVS = 2
NUM_ACTIONS = 4
ARGS = Args(
    network="nature",
    num_envs=NUM_ENVS,
    batch_size=4,
    n_step=2,
    gamma=0.9,
    temperature=0.5,
    distill_coef=0.8,
    huber=True,
    learning_rate=1e-3,
    final_learning_rate=5e-4,
    adam_eps=1e-3,
    amp=False,
    seed=3,
)


def add_random_steps(replay: FrameReplay, rng: np.random.Generator, count: int) -> None:
    for _ in range(count):
        frames = rng.integers(256, size=(NUM_ENVS, 84, 84), dtype=np.uint8)
        actions = rng.integers(NUM_ACTIONS, size=NUM_ENVS)
        rewards = rng.normal(size=NUM_ENVS).astype(np.float32)
        terminations, excluded = rng.random((2, NUM_ENVS)) < 0.05
        teacher_q_values = rng.random((NUM_ENVS, NUM_ACTIONS), dtype=np.float32)
        step = GameStep(actions, rewards, terminations, excluded, [])
        replay.add(torch.as_tensor(frames), step, torch.as_tensor(teacher_q_values))


def learner_and_replay(device: str = "cpu", **flags) -> tuple[Learner, FrameReplay]:
    """At lambda 0.5, where the learning rate is 7.5e-4."""
    learner = Learner(replace(ARGS, **flags), NUM_ACTIONS, torch.device(device))
    learner.set_lambda(0.5)
    assert learner.learning_rate == pytest.approx(7.5e-4)
    replay = FrameReplay(100, NUM_ENVS, NUM_ACTIONS, device)
    add_random_steps(replay, np.random.default_rng(0), 40)
    return learner, replay


def weights(network: torch.nn.Module) -> Tensor:
    values = [value.detach().flatten() for value in network.parameters()]
    return torch.cat(values).cpu()


def test_two_gradient_steps_by_hand():
    """Of the transitions that the learner's own generator draws, by an Adam of its own.

    Nothing else changes.
    """
    learner, replay = learner_and_replay()
    assert learner.read_metrics() == {}
    assert torch.equal(weights(learner.target_network), weights(learner.q_network))
    learner.target_network.network[-1].bias += torch.arange(4)  # so that it is another network

    target_before = weights(learner.target_network)
    student_before = weights(learner.q_network)
    replay_before = copy.deepcopy(tensors_of(replay))

    network = copy.deepcopy(learner.q_network)
    adam = torch.optim.Adam(network.parameters(), lr=7.5e-4, eps=1e-3)
    generator = torch.Generator().manual_seed(ARGS.seed)
    for _ in range(2):
        learner.gradient_step(replay)

        batch = replay.sample(4, 2, 0.9, replay.random_numbers(4, generator))
        q_values = network(batch.obs)
        next_q_values = learner.target_network(batch.next_obs)
        loss, td_loss, distill_loss = qdagger_loss(
            q_values, next_q_values, batch, 0.4, temperature=0.5, huber=True
        )
        adam.zero_grad()
        loss.backward()
        adam.step()

        student = weights(learner.q_network)
        torch.testing.assert_close(student, weights(network), rtol=0, atol=1e-5)
        metrics = {
            "loss": loss.item(),
            "td_loss": td_loss.item(),
            "distill_loss": distill_loss.item(),
            "q_values": q_values[torch.arange(4), batch.actions].mean().item(),
        }
        assert learner.read_metrics() == pytest.approx(metrics, rel=1e-4)

    assert (student - student_before).abs().max() > 1e-3, "nothing is learned"
    assert torch.equal(weights(learner.target_network), target_before)
    assert learner.distill_weight == pytest.approx(0.4)
    for name, value in tensors_of(replay).items():
        assert torch.equal(value, replay_before[name]), name


def test_tau_is_the_share_of_the_student_in_a_target_update():
    learner, replay = learner_and_replay()
    learner.gradient_step(replay)
    student = weights(learner.q_network)
    target = weights(learner.target_network)
    assert not torch.equal(student, target)

    learner.update_target(0.0)
    assert torch.equal(weights(learner.target_network), target)

    learner.update_target(0.25)
    expected = target + 0.25 * (student - target)
    torch.testing.assert_close(weights(learner.target_network), expected, rtol=0, atol=1e-6)

    learner.update_target(1.0)
    assert torch.equal(weights(learner.target_network), student)
    assert torch.equal(weights(learner.q_network), student)


@pytest.mark.parametrize("worst", [torch.inf, -torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_is_refused(worst):
    learner, replay = learner_and_replay()
    learner.gradient_step(replay)
    learner.metrics["loss"].fill_(worst)
    assert "--learning-rate" in refusal(learner.read_metrics)


def test_the_learning_rate_follows_lambda_after_a_resume_too():
    """Loading the optimizer's state replaces its tensors; Adam's own is what must change."""
    learner, replay = learner_and_replay()
    learner.gradient_step(replay)
    learner.optimizer.load_state_dict(learner.optimizer.state_dict())
    for lambda_, learning_rate in ((1.0, 1e-3), (0.0, 5e-4)):
        learner.set_lambda(lambda_)
        assert learner.learning_rate == pytest.approx(learning_rate)
        assert learner.optimizer.param_groups[0]["lr"].item() == pytest.approx(learning_rate)


@pytest.mark.parametrize(
    ("capability", "cpu_name", "is_faster"),
    [("amx_bf16", "", True), ("avx512_bf16", "", False), ("avx512_bf16", "AMD", True)],
)
@pytest.mark.parametrize("gpu", [False, True])
def test_bfloat16_is_the_default_on_a_cpu_that_is_faster_in_it(
    monkeypatch, capability, cpu_name, is_faster, gpu
):
    capabilities = {capability: True, "cpu_name": cpu_name}
    monkeypatch.setattr(torch.cpu, "get_capabilities", MagicMock(return_value=capabilities))
    monkeypatch.setattr(torch.cuda, "is_available", MagicMock(return_value=gpu))
    program = runpy.run_path(str(PROGRAM))
    assert program["Args"]().amp == (is_faster and not gpu)


COMPILER = shutil.which(os.environ.get("CXX", "g++"))
WITH_COMPILER = [
    pytest.mark.long,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


@pytest.mark.parametrize(
    ("amp", "backend"),
    [
        (True, None),
        (False, "aot_eager"),
        pytest.param(True, "inductor", marks=WITH_COMPILER),
    ],
)
def test_faster_variants_learn_the_same_but_for_rounding(monkeypatch, amp, backend):
    # The compile of a module calls it as well.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain, replay = learner_and_replay()
    fast, _ = learner_and_replay(amp=amp, compile=backend is not None)
    before = weights(plain.q_network)

    obs = replay.sample(8, 1, 0.9, replay.random_numbers(8, torch.Generator())).obs
    exact = plain.q_network(obs)
    tolerance = 0.03 if amp else 1e-5
    for network in (fast.q_network, fast.target_network):
        q_values = network(obs)
        assert q_values.dtype == torch.float32
        assert (q_values - exact).abs().max() < tolerance * exact.abs().max()
        if amp:
            assert not torch.equal(q_values, exact)

    for _ in range(8):
        plain.gradient_step(replay)
        fast.gradient_step(replay)
    plain_moved = weights(plain.q_network) - before
    fast_moved = weights(fast.q_network) - before
    tolerance = 0.4 if amp else 0.01
    assert (fast_moved - plain_moved).norm() < tolerance * plain_moved.norm()


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    def compile_what_fails_when_called(network, dynamic):
        failing = MagicMock(side_effect=ZeroDivisionError("division by zero"))
        network.register_forward_pre_hook(failing)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_what_fails_when_called)
    message = refusal(learner_and_replay, compile=True)
    assert message == "--compile: torch.compile fails here (division by zero)"


class FakeGraph(TorchDispatchMode):
    """A CUDA graph on the CPU.

    Replayed, it runs the kernels of its capture again, on the same tensors, and nothing of Python;
    the first time they have just run. Waiting for a number is an error.
    """

    def __init__(self):
        super().__init__()
        self.kernels = []
        self.replays = 0
        self.register_generator_state = MagicMock()

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        if kernel == torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        again = partial(kernel, *args, **(kwargs or {}))
        outputs = again()
        self.kernels.append((again, outputs))
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        for again, outputs in self.kernels:
            for own, value in zip(tree_leaves(outputs), tree_leaves(again())):
                # What is a view or was changed in place holds the value already.
                if torch.is_tensor(own) and own.data_ptr() != value.data_ptr():
                    own.copy_(value)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    """Where Graphed works: on a GPU, or on the CPU with fakes of all that it uses."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    def begin_capture(graph, stream):
        return graph

    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph", begin_capture)
        monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
        monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    return request.param


class Trained(NamedTuple):
    moved: Tensor  # how far each weight went
    numbers: list[float]  # losses, Q-values and learning rates
    draws: list[list[int]]  # actions, and states of the generator


def train_rounds(device: str, with_graphs: bool, **flags) -> Trained:
    """Twelve rounds, with all that changes around acting and learning in training."""
    learner, replay = learner_and_replay(device, **flags)
    before = weights(learner.q_network)
    policy = partial(qdagger.act, learner.q_network, learner.generator)
    gradient_step = partial(learner.gradient_step, replay)
    if with_graphs:
        policy = Graphed(policy, learner.generator)
        gradient_step = Graphed(gradient_step, learner.generator)

    rng = np.random.default_rng(1)
    numbers = []
    draws = []
    for turn in range(12):
        obs = rng.integers(256, size=(8, 4, 84, 84), dtype=np.uint8)
        actions, q_values = policy(torch.as_tensor(obs, device=device), turn / 12)
        gradient_step()
        numbers += learner.read_metrics().values()
        numbers += q_values.flatten().tolist()
        draws.append(actions.tolist())
        draws.append(learner.generator.get_state().tolist())

        add_random_steps(replay, rng, 8)  # so that it wraps around
        learner.set_lambda(turn % 2)
        numbers.append(learner.learning_rate)
        learner.update_target(0.7)
    return Trained(weights(learner.q_network) - before, numbers, draws)


@pytest.mark.parametrize("fast", [False, True])
def test_graphs_do_what_is_done_without_them(device, fast):
    """With the same draws: they see whatever changes around them.

    It is the same to the bit on the CPU, and but for rounding on a GPU.
    """
    # Fake graphs are of kernels that are not compiled.
    flags = {"amp": fast, "compile": fast and device == "cuda"}
    plain = train_rounds(device, with_graphs=False, **flags)
    graphed = train_rounds(device, with_graphs=True, **flags)

    tolerance = 0 if device == "cpu" else 0.02
    assert (graphed.moved - plain.moved).norm() <= tolerance * plain.moved.norm()
    assert graphed.numbers == pytest.approx(plain.numbers, rel=tolerance, abs=tolerance / 10)
    assert graphed.draws == plain.draws


def first_numbers(tensors: list[Tensor]) -> list[float]:
    return [tensor[0].item() for tensor in tensors]


def test_three_calls_are_plain_the_fourth_is_captured_and_later_ones_run_no_python(device):
    """Inputs stay, outputs are overwritten, the plain calls' stream waits and is waited for.

    All calls are given the same tensors, those of the graph, so that they run the same kernels.
    """
    calls = []

    def double(x):
        calls.append(x)
        return 2 * x

    graphed = Graphed(double, torch.Generator(device))
    inputs = [torch.full((3,), number, device=device) for number in range(8)]
    outputs = [graphed(x) for x in inputs]

    assert len(calls) == 4
    assert all(x is graphed.inputs[0] for x in calls)
    assert first_numbers(inputs) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert first_numbers(outputs) == [0, 2, 4, 14, 14, 14, 14, 14]
    if device == "cpu":
        stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        assert stream.wait_stream.call_args_list == 3 * [call(current)]
        assert current.wait_stream.call_args_list == 3 * [call(stream)]
        graphed.graph.register_generator_state.assert_called_once_with(graphed.generator)


def test_what_cannot_be_captured_is_refused(device):
    def works_three_times(x):
        if graphed.calls == 4:
            raise RuntimeError("the fourth call")
        return 2 * x

    graphed = Graphed(works_three_times, torch.Generator(device))
    inputs = [torch.full((3,), number, device=device) for number in range(4)]

    assert first_numbers([graphed(x) for x in inputs[:3]]) == [0, 2, 4]
    assert refusal(graphed, inputs[3]) == "--capture: the fourth call; try --no-capture"


def test_the_first_error_of_a_capture_is_shown(device, monkeypatch):
    """Not the one that ends the capture, of which a forbidden operation is the cause."""

    @contextmanager
    def capture_that_cannot_be_ended(graph, stream):
        try:
            yield
        finally:
            raise RuntimeError("capture was invalidated")

    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "graph", capture_that_cannot_be_ended)
    graphed = Graphed(torch.Tensor.tolist, torch.Generator(device))
    x = torch.zeros(3, device=device)
    for _ in range(3):
        graphed(x)
    if device == "cpu":
        graphed.function = MagicMock(side_effect=RuntimeError("operation not permitted"))

    message = refusal(graphed, x)
    assert "operation not permitted" in message
    assert message.endswith("; try --no-capture")


def test_the_target_network_runs_on_a_stream_of_its_own_that_waits_and_is_waited_for(monkeypatch):
    events = []

    class Stream:
        def __init__(self, name: str):
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            events.append(f"{self.name} waits for {other.name}")

    streams = [Stream("main")]

    @contextmanager
    def on_stream(stream: Stream):
        streams.append(stream)
        yield
        streams.pop()

    def run(name: str) -> str:
        events.append(f"{name} on {streams[-1].name}")
        return name

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(qdagger, "side_stream", lambda: Stream("side"))
    both = partial(run, "target"), partial(run, "student")

    assert qdagger.side_by_side(*both, torch.device("cuda")) == ("target", "student")
    assert events == [
        "side waits for main",
        "target on side",
        "student on main",
        "main waits for side",
    ]
    events.clear()
    assert qdagger.side_by_side(*both, torch.device("cpu")) == ("target", "student")
    assert events == ["target on main", "student on main"]


@pytest.mark.parametrize(
    ("has_driver", "hidden", "cuda", "words"),
    [
        (False, None, "13.0", "no GPU in this machine"),
        (False, None, None, "no GPU in this machine"),
        (True, None, None, "built for CPUs alone"),
        (True, None, "13.0", "the driver is too old for CUDA 13.0: a newer one, or pip install"),
        (True, "", "13.0", "CUDA_VISIBLE_DEVICES hides"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, has_driver, hidden, cuda, words):
    monkeypatch.setattr(
        shutil, "which", MagicMock(return_value="nvidia-smi" if has_driver else None)
    )
    monkeypatch.setattr(qdagger.Path, "exists", MagicMock(return_value=False))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert words in qdagger.why_no_gpu()


class NothingOfTheCPU(TorchDispatchMode):
    """All tensors of all kernels must lie on the device meta."""

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        result = kernel(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if torch.is_tensor(leaf):
                assert leaf.is_meta, kernel
        return result


@pytest.fixture
def on_meta(monkeypatch):
    """on_meta(**flags): a learner and a replay on the device meta, which computes nothing.

    The generator, Adam and bfloat16 are not there.
    """
    monkeypatch.setattr(torch, "Generator", MagicMock())
    monkeypatch.setattr(torch.optim, "Adam", MagicMock())
    monkeypatch.setattr(torch, "autocast", MagicMock(return_value=nullcontext()))

    def make(**flags) -> tuple[Learner, FrameReplay]:
        learner = Learner(replace(ARGS, **flags), NUM_ACTIONS, torch.device("meta"))
        learner.generator = None
        return learner, FrameReplay(96, 4, NUM_ACTIONS, "meta")

    return make


@pytest.mark.parametrize("network", ["impala", "nature"])
def test_what_is_captured_stays_on_the_device(network, on_meta):
    """Tried where nothing can be read or waited for."""
    learner, replay = on_meta(network=network)
    obs = torch.empty((4, 4, 84, 84), dtype=torch.uint8, device="meta")
    epsilon = torch.empty((), device="meta")

    with NothingOfTheCPU():
        learner.gradient_step(replay)
        qdagger.act(learner.q_network, None, obs, epsilon)


class Operations(TorchDispatchMode):
    """Counts those that do something: neither views nor reservations of memory."""

    count = 0

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in kernel._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and "empty" not in kernel.name():
            self.count += 1
        return kernel(*args, **(kwargs or {}))


def operations(function, *args) -> int:
    with Operations() as counted:
        function(*args)
    return counted.count


def test_a_gradient_step_takes_no_more_operations_than_it_did(on_meta):
    """On a GPU each costs two microseconds or more, as much as its arithmetic.

    There a convolution's bias is one more, in both directions; Adam, two, is not counted here.
    """
    learner, replay = on_meta(network="impala", huber=False)
    uniform = replay.random_numbers(4, None)
    step_ids = replay.draw(4, 3, uniform)
    assert operations(replay.draw, 4, 3, uniform) <= 15
    assert operations(replay.transitions, step_ids, 3, 0.99) <= 41
    assert operations(learner.gradient_step, replay) <= 214


def test_a_vector_step_takes_no_more_operations_outside_graphs_than_it_did(on_meta):
    learner, replay = on_meta()
    obs = np.zeros((4, 4, 84, 84), np.uint8)
    step = GameStep(
        actions=np.zeros(4, np.int64),
        rewards=np.zeros(4, np.float32),
        terminations=np.zeros(4, bool),
        excluded=np.zeros(4, bool),
        finished=[],
    )
    teacher_q_values = torch.zeros((4, NUM_ACTIONS), device="meta")

    def vector_step(lambda_: float) -> None:
        learner.set_lambda(lambda_)
        on_device = qdagger.to_device(obs, "meta")
        replay.add(on_device[:, -1], step, teacher_q_values)

    assert operations(vector_step, 0.5) <= 11  # two of them since lambda is another
    assert operations(vector_step, 0.5) <= 9


@pytest.mark.gpu
def test_a_replay_lies_on_the_gpu_also_beyond_2_31_bytes():
    """7,056 bytes per frame and 30 beside it for four actions, all of them there."""
    gc.collect()
    rows = 160_000
    size = rows * NUM_ENVS
    before = torch.cuda.memory_allocated()
    replay = FrameReplay(size, NUM_ENVS, NUM_ACTIONS, "cuda")
    memory = torch.cuda.memory_allocated() - before
    assert memory / size == pytest.approx(7056 + 30, rel=0.003)
    assert all(value.is_cuda for value in tensors_of(replay).values())

    same_on_cpu = FrameReplay(size, NUM_ENVS, NUM_ACTIONS)
    for each in (replay, same_on_cpu):
        each.set_written(rows - 6)
        add_random_steps(each, np.random.default_rng(1), 6)
    last = torch.arange(size - 12, size)
    expected = same_on_cpu.stacks(last)
    assert expected.float().std() > 1
    assert torch.equal(replay.stacks(last.cuda()).cpu(), expected)


@pytest.mark.gpu
def test_a_graph_reuses_its_memory():
    gc.collect()  # what is left of other tests is not to be freed while this one measures
    learner, replay = learner_and_replay("cuda")
    gradient_step = Graphed(partial(learner.gradient_step, replay), learner.generator)
    used = []
    for _ in range(200):
        gradient_step()
        used.append(torch.cuda.memory_allocated())
    assert len(set(used[5:])) == 1


@pytest.mark.gpu
def test_nothing_but_reading_waits_for_the_gpu():
    learner, replay = learner_and_replay("cuda")
    gradient_step = Graphed(partial(learner.gradient_step, replay), learner.generator)
    policy = Graphed(partial(qdagger.act, learner.q_network, learner.generator), learner.generator)
    rng = np.random.default_rng(1)

    def vector_step(turn: int) -> Tensor:
        learner.set_lambda(turn / 10)
        obs = rng.integers(256, size=(NUM_ENVS, 4, 84, 84), dtype=np.uint8)
        obs = qdagger.to_device(obs, "cuda")
        actions, q_values = policy(obs, turn / 10)
        gradient_step()
        flags = np.zeros(NUM_ENVS, bool)
        rewards = np.zeros(NUM_ENVS, np.float32)
        replay.add(
            obs[:, -1], GameStep(np.ones(NUM_ENVS, int), rewards, flags, flags, []), q_values
        )
        return actions

    for turn in range(5):  # the captures, and what they compile, may wait
        vector_step(turn)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for turn in range(5, 10):
            actions = vector_step(turn)
        with pytest.raises(RuntimeError, match="synchroniz"):
            actions.cpu()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_adam_is_fused_and_all_it_reads_lies_on_the_gpu():
    learner, replay = learner_and_replay("cuda", network="impala")
    gradient_step = Graphed(partial(learner.gradient_step, replay), learner.generator)
    for _ in range(6):
        gradient_step()
    (group,) = learner.optimizer.param_groups
    assert group["fused"]
    assert group["capturable"]
    assert group["lr"].is_cuda
    for parameter in learner.q_network.parameters():
        assert parameter.grad.stride() == parameter.stride()
        state = learner.optimizer.state[parameter]
        assert state["step"].is_cuda
        assert state["step"].item() == 6
        assert state["exp_avg"].stride() == parameter.stride()


@pytest.mark.gpu
def test_two_graphs_and_plain_calls_share_a_generator():
    """What is drawn is the same, in the same order, as without graphs."""

    def draws(capture: bool) -> list[float]:
        generator = torch.Generator("cuda").manual_seed(1)
        draw = partial(torch.rand, 3, generator=generator, device="cuda")
        double = partial(torch.rand, 3, generator=generator, device="cuda", dtype=torch.float64)
        one = qdagger.graphed(draw, generator, capture)
        other = qdagger.graphed(double, generator, capture)
        found = []
        for _ in range(10):
            found += one().tolist()
            found += draw().tolist()
            found += other().tolist()
        return found

    assert draws(capture=True) == draws(capture=False)


@pytest.mark.gpu
def test_fifty_captured_steps_are_fifty_plain_ones(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    moved = []
    for capture in (True, False):
        learner, replay = learner_and_replay("cuda", network="impala")
        before = weights(learner.q_network)
        step = partial(learner.gradient_step, replay)
        step = qdagger.graphed(step, learner.generator, capture)
        for _ in range(50):
            step()
        moved.append(weights(learner.q_network) - before)
    assert (moved[0] - moved[1]).norm() < 0.02 * moved[1].norm()


@pytest.mark.gpu
def test_both_phases_at_full_size_take_nine_gigabytes_at_most():
    """Of what torch reserves; phase 2's buffer is given back before phase 3's is made."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    args = Args(amp=False)
    learner = Learner(args, NUM_ACTIONS, torch.device("cuda"))
    for size, num_envs in ((args.teacher_steps, 32), (args.buffer_size, 4)):
        replay = FrameReplay(size, num_envs, NUM_ACTIONS, "cuda")
        replay.set_written(size // num_envs)
        replay.excluded.fill_(False)
        gradient_step = Graphed(partial(learner.gradient_step, replay), learner.generator)
        for _ in range(6):
            gradient_step()
        learner.metrics = {}
        del replay, gradient_step
        torch.cuda.empty_cache()
    assert torch.cuda.max_memory_reserved() < 9e9


@pytest.mark.parametrize("cuda", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_whole_run_keeps_one_replay_at_a_time_and_can_be_resumed(
    cuda, monkeypatch, make_model, tmp_path
):
    """The teacher's buffer is gone before the student's is made, and so is the graph that reads it.

    Losses stay finite.
    """
    alive = weakref.WeakSet()

    def one_at_a_time(*args) -> FrameReplay:
        assert not alive
        replay = FrameReplay(*args)
        alive.add(replay)
        return replay

    def evaluate(*args, **options) -> list[float]:  # no mock, which would keep them alive
        return [1.0]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qdagger, "FrameReplay", one_at_a_time)
    monkeypatch.setattr(qdagger, "evaluate", evaluate)
    args = replace(
        ARGS,
        cuda=cuda,
        teacher=str(make_model(NUM_ACTIONS)),
        teacher_steps=224,
        offline_steps=100,
        buffer_size=150,
        batch_size=2,
        total_timesteps=200,
        learning_starts=40,
        train_frequency=8,
    )

    run = qdagger.train(args)
    resumed_run = qdagger.train(replace(args, resume=str(run), total_timesteps=300))

    logged = points(resumed_run)
    assert [step for step, _ in logged["losses/loss"]] == [200, 300, 400]
    for tag, shown in logged.items():
        values = [value for _, value in shown]
        assert np.isfinite(values).all(), tag

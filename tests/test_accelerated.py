"""The gradient step by hand; it stays the same in bfloat16, compiled, and as CUDA graphs, on a GPU or simulated."""

import copy
import gc
import os
import runpy
import shutil
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, partialmethod
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import PROGRAM, points, refusal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import Args, FrameReplay, GameStep, Graphed, Learner

ARGS = Args(
    network="nature", batch_size=4, n_step=2, gamma=0.9, temperature=0.5, huber=True, adam_eps=1e-3
)
ARGS = replace(
    ARGS,
    learning_rate=1e-3,
    final_learning_rate=5e-4,
    distill_coef=0.8,
    amp=False,
    num_envs=2,
    seed=3,
)


def add(replay: FrameReplay, rng: np.random.Generator, rows: int) -> None:
    for _ in range(rows):
        frames, actions = (
            rng.integers(256, size=(2, 84, 84), dtype=np.uint8),
            rng.integers(4, size=2),
        )
        rewards, ends, scores = (
            rng.normal(size=2),
            rng.random((2, 2)) < 0.05,
            rng.random((2, 4), dtype=np.float32),
        )
        step = GameStep(actions, rewards.astype(np.float32), *ends, [])
        replay.add(torch.as_tensor(frames), step, torch.as_tensor(scores))


def learner(device: str = "cpu", **flags) -> tuple[Learner, FrameReplay]:
    made, replay = (
        Learner(replace(ARGS, **flags), 4, torch.device(device)),
        FrameReplay(100, 2, 4, device),
    )
    assert made.set_lambda(0.5) == pytest.approx(7.5e-4)
    add(replay, np.random.default_rng(0), 40)
    return made, replay


def weights(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in network.parameters()]).cpu()


def test_two_gradient_steps_and_target_updates_by_hand():
    """Of the transitions that the learner's own generator draws, by an Adam of its own; nothing else changes."""
    (made, replay), generator = learner(), torch.Generator().manual_seed(3)
    assert (
        torch.equal(weights(made.target_network), weights(made.q_network))
        and made.read_metrics() == {}
    )
    made.target_network.network[-1].bias += torch.arange(4)  # so that it is another network
    network, stored = copy.deepcopy(made.q_network), copy.deepcopy(vars(replay))
    start, target = weights(network), weights(made.target_network)
    adam = torch.optim.Adam(network.parameters(), lr=7.5e-4, eps=1e-3)
    for _ in range(2):
        made.gradient_step(replay)
        batch = replay.sample(4, 2, 0.9, generator)
        q_values, next_q_values = network(batch.obs), made.target_network(batch.next_obs)
        losses = qdagger.qdagger_loss(
            q_values, next_q_values, batch, 0.4, temperature=0.5, huber=True
        )
        adam.zero_grad()
        losses[0].backward()
        adam.step()
        student = weights(made.q_network)
        torch.testing.assert_close(student, weights(network), rtol=0, atol=1e-5)
        q_taken = q_values[torch.arange(4), batch.actions].mean()
        metrics = dict(zip(("loss", "td_loss", "distill_loss", "q_values"), (*losses, q_taken)))
        assert made.read_metrics() == pytest.approx(
            {name: x.item() for name, x in metrics.items()}, rel=1e-4
        )
    assert (student - start).abs().max() > 1e-3, "nothing is learned"
    assert all(
        torch.equal(value, stored[name])
        for name, value in vars(replay).items()
        if torch.is_tensor(value)
    )
    for tau, expected in (
        (0.0, target),
        (0.25, target + 0.25 * (student - target)),
        (1.0, student),
    ):
        made.update_target(tau)
        torch.testing.assert_close(
            weights(made.target_network), expected, rtol=0, atol=1e-6 if tau == 0.25 else 0
        )
    assert torch.equal(weights(made.q_network), student) and made.distill_weight == pytest.approx(
        0.4
    )
    for worst in (torch.inf, -torch.inf, torch.nan):
        made.metrics["loss"].fill_(worst)
        assert "--learning-rate" in refusal(made.read_metrics)


def test_the_learning_rate_follows_lambda_after_a_resume_too():
    """Loading the optimizer's state replaces the tensors in it; Adam's own is what must change."""
    made, replay = learner()
    made.gradient_step(replay)
    made.optimizer.load_state_dict(made.optimizer.state_dict())
    for lambda_, learning_rate in ((1.0, 1e-3), (0.0, 5e-4)):
        assert made.set_lambda(lambda_) == pytest.approx(learning_rate)
        assert made.optimizer.param_groups[0]["lr"].item() == pytest.approx(learning_rate)


@pytest.mark.parametrize(
    "able, cpu, fast", [("amx_bf16", "", 1), ("avx512_bf16", "", 0), ("avx512_bf16", "AMD", 1)]
)
def test_bfloat16_is_the_default_on_a_cpu_that_is_faster_in_it(monkeypatch, able, cpu, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True, "cpu_name": cpu})
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", partial(bool, on_gpu))
        assert runpy.run_path(str(PROGRAM))["Args"]().amp == (fast and not on_gpu)


LONG = [
    pytest.mark.long,
    pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler"),
]


@pytest.mark.parametrize(
    "amp, backend", [(1, ""), (0, "aot_eager"), pytest.param(1, "inductor", marks=LONG)]
)
def test_faster_variants_learn_the_same_but_for_rounding(monkeypatch, amp, backend):
    monkeypatch.setattr(
        torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend)
    )
    (plain, replay), (fast, _) = learner(), learner(amp=bool(amp), compile=bool(backend))
    obs, start = replay.sample(8, 1, 0.9, torch.Generator()).obs, weights(plain.q_network)
    exact = plain.q_network(obs)
    for q_values in (fast.q_network(obs), fast.target_network(obs)):
        assert q_values.dtype == torch.float32 and not (amp and torch.equal(q_values, exact))
        assert (q_values - exact).abs().max() < (0.03 if amp else 1e-5) * exact.abs().max()
    for _ in range(8):
        plain.gradient_step(replay), fast.gradient_step(replay)
    moved = weights(plain.q_network) - start
    assert (weights(fast.q_network) - start - moved).norm() < (0.4 if amp else 0.01) * moved.norm()
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: self.register_forward_pre_hook(lambda *_: 1 / 0)
    )
    assert (
        refusal(partial(learner, compile=True))
        == "--compile: torch.compile fails here (division by zero)"
    )


class FakeGraph(TorchDispatchMode):
    """A CUDA graph on the CPU: replayed it runs the kernels of its capture again, on the same tensors, and nothing of
    Python; the first time they have just run. Waiting for a number is an error."""

    def __init__(self):
        super().__init__()
        self.kernels, self.replays, self.register_generator_state = [], 0, MagicMock()

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        if kernel == torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        again = partial(kernel, *args, **kwargs or {})
        self.kernels.append((again, again()))
        return self.kernels[-1][1]

    @torch.no_grad()
    def replay(self) -> None:
        for again, outputs in self.kernels if self.replays else ():
            for own, value in zip(tree_leaves(outputs), tree_leaves(again())):
                if (
                    torch.is_tensor(own) and own.data_ptr() != value.data_ptr()
                ):  # neither a view nor changed in place
                    own.copy_(value)
        self.replays += 1


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    """Where Graphed works: on a GPU, or on the CPU with fakes of all that it uses."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    streams = dict(Stream=MagicMock(), current_stream=MagicMock(), stream=nullcontext)
    for name, fake in dict(streams, CUDAGraph=FakeGraph, graph=lambda graph, stream: graph).items():
        monkeypatch.setattr(
            torch.cuda, name, fake if request.param == "cpu" else getattr(torch.cuda, name)
        )
    return request.param


def trained(device: str, graphs: bool, **flags) -> tuple[torch.Tensor, list, list]:
    """What 12 rounds make of weights, losses and Q-values, and draws, with all that changes around them in training."""
    (made, replay), rng, numbers, draws = learner(device, **flags), np.random.default_rng(1), [], []
    start, wrap = weights(made.q_network), Graphed if graphs else lambda function, _: function
    policy = wrap(partial(qdagger.act, made.q_network, made.generator), made.generator)
    step = wrap(partial(made.gradient_step, replay), made.generator)
    for turn in range(12):
        obs = torch.as_tensor(rng.integers(256, size=(8, 4, 84, 84), dtype=np.uint8), device=device)
        actions, q_values = policy(obs, turn / 12)
        step()
        numbers += [*made.read_metrics().values(), *q_values.flatten().tolist()]
        draws += [actions.tolist(), made.generator.get_state().tolist()]
        add(replay, rng, 8)  # so that it wraps around
        numbers.append(made.set_lambda(turn % 2))
        made.update_target(0.7)
    return weights(made.q_network) - start, numbers, draws


@pytest.mark.parametrize("fast", [False, True])
def test_graphs_do_what_is_done_without_them(device, fast):
    """To the bit on the CPU, but for rounding on a GPU, with the same draws: they see whatever changes around them."""
    flags = {
        "amp": fast,
        "compile": fast and device == "cuda",
    }  # fake graphs are of kernels that are not compiled
    plain, graphed = (trained(device, graphs, **flags) for graphs in (False, True))
    tolerance = 0 if device == "cpu" else 0.02
    assert (graphed[0] - plain[0]).norm() <= tolerance * plain[0].norm()
    assert graphed[1] == pytest.approx(plain[1], rel=tolerance, abs=tolerance / 10)
    assert graphed[2] == plain[2]


def test_three_calls_are_plain_the_fourth_is_captured_and_later_ones_run_no_python(device):
    """Inputs stay, outputs are overwritten, the plain calls' stream waits and is waited for, a failure is refused."""
    calls, inputs = [], [torch.full((3,), number, device=device) for number in range(8)]
    graphed = Graphed(lambda x: calls.append(x) or 2 * x, torch.Generator(device))
    outputs = [graphed(x) for x in inputs]
    assert [x[0].item() for x in outputs] == [0, 2, 4, 14, 14, 14, 14, 14] and len(calls) == 4
    assert [x[0].item() for x in inputs] == list(range(8))
    if device == "cpu":
        own, current = torch.cuda.Stream(), torch.cuda.current_stream()
        assert own.wait_stream.call_args_list == 3 * [((current,),)]
        assert current.wait_stream.call_args_list == 3 * [((own,),)]
        graphed.graph.register_generator_state.assert_called_once_with(graphed.generator)
    failing = Graphed(lambda x: x + [0, 0, 0].pop(failing.calls - 1), torch.Generator(device))
    assert [failing(x)[0].item() for x in inputs[:3]] == [0, 1, 2]
    assert refusal(failing, inputs[3]) == "--capture: try --no-capture (pop index out of range)"


class NothingOfTheCPU(TorchDispatchMode):
    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        result = kernel(*args, **kwargs or {})
        assert all(
            leaf.is_meta for leaf in tree_leaves((args, kwargs, result)) if torch.is_tensor(leaf)
        ), kernel
        return result


@pytest.mark.parametrize("network", ["impala", "nature"])
def test_what_is_captured_stays_on_the_device(network, monkeypatch):
    """Tried on the device meta, where nothing can be read or waited for; the generator and Adam are not there."""
    monkeypatch.setattr(torch, "Generator", MagicMock())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.optim, "Adam", MagicMock())
    made = Learner(replace(ARGS, network=network), 4, torch.device("meta"))
    made.generator, replay = None, FrameReplay(96, 4, 4, "meta")
    obs, epsilon = (
        torch.empty(4, 4, 84, 84, dtype=torch.uint8, device="meta"),
        torch.empty((), device="meta"),
    )
    with NothingOfTheCPU():
        made.gradient_step(replay)
        qdagger.act(made.q_network, None, obs, epsilon)


@pytest.mark.gpu
def test_a_replay_lies_on_the_gpu_and_graphs_reuse_their_memory():
    """7,056 bytes per frame and 30 beside it for 4 actions, all of them there, also beyond 2^31 of them."""
    gc.collect()
    (made, small), before = learner("cuda"), torch.cuda.memory_allocated()
    replay, same = FrameReplay(320_000, 2, 4, "cuda"), FrameReplay(320_000, 2, 4)
    assert (torch.cuda.memory_allocated() - before) / 320_000 == pytest.approx(7056 + 30, rel=0.003)
    assert all(value.is_cuda for value in vars(replay).values() if torch.is_tensor(value))
    for each in (replay, same):
        each.written.fill_(160_000 - 6)
        add(each, np.random.default_rng(1), 6)
    last = torch.arange(320_000 - 12, 320_000)
    assert (
        torch.equal(replay.stacks(last.cuda()).cpu(), same.stacks(last))
        and same.stacks(last).float().std() > 1
    )
    step = Graphed(partial(made.gradient_step, small), made.generator)
    used = [(step(), torch.cuda.memory_allocated())[1] for _ in range(200)]
    assert len(set(used[5:])) == 1


@pytest.mark.parametrize("cuda", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_whole_run_keeps_one_replay_at_a_time_and_can_be_resumed(
    cuda, monkeypatch, make_model, tmp_path
):
    """The teacher's buffer is gone, and the graph that reads it, before the student's is made. Losses stay finite."""
    alive = weakref.WeakSet()

    def one_at_a_time(*args) -> FrameReplay:
        assert not alive
        alive.add(replay := FrameReplay(*args))
        return replay

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qdagger, "FrameReplay", one_at_a_time)
    monkeypatch.setattr(qdagger, "evaluate", lambda *args, **options: [1.0])
    args = replace(
        ARGS,
        cuda=cuda,
        teacher=str(make_model(4)),
        teacher_steps=224,
        buffer_size=150,
        offline_steps=100,
    )
    args = replace(args, total_timesteps=200, learning_starts=40, train_frequency=8, batch_size=2)
    logged = points(
        qdagger.train(replace(args, resume=str(qdagger.train(args)), total_timesteps=300))
    )
    assert [step for step, _ in logged["losses/loss"]] == [200, 300, 400]
    assert np.isfinite([value for values in logged.values() for _, value in values]).all()

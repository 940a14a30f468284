"""Whatever makes a gradient step faster, it stays the same step. What needs a GPU is skipped where there is none."""

import contextlib
import runpy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import Args, Captured, FrameReplay, Learner, Policy, act


def filled_replay(device: str = "cpu", steps: int = 200) -> FrameReplay:
    rng, replay = np.random.default_rng(0), FrameReplay(300, 2, 4, device)
    for _ in range(steps):
        obs = rng.integers(256, size=(2, 2, 4, 84, 84), dtype=np.uint8)
        ends = rng.random((2, 2)) < 0.05
        scores = torch.as_tensor(rng.random((2, 4)), dtype=torch.float32, device=device)
        replay.add(obs[0], rng.integers(4, size=2), rng.integers(-1, 2, size=2), *ends, obs[1], scores)
    return replay


def learner(device: str = "cpu", **flags) -> Learner:
    args = Args(
        **dict(network="nature", batch_size=8, learning_rate=1e-3, amp=False, seed=3, n_step=1, temperature=1.0) | flags
    )
    made = Learner(args, 4, torch.device(device))
    made.distill_weight.fill_(0.5)
    return made


def trained(made: Learner, replay: FrameReplay, steps: int = 50, capture: bool = False) -> dict[str, torch.Tensor]:
    """Its weights after `steps`; with `capture` they are captured as on a GPU."""
    step = made.step_on(replay)
    if capture:
        step = Captured(step, made.changed(), made.generator)
    for number in range(steps):
        step()
        if number % 10 == 9:
            made.update_target(tau=1.0)
    return {name: value.cpu() for name, value in made.q_network.state_dict().items()}


@pytest.fixture(scope="module")
def replay() -> FrameReplay:
    return filled_replay()


def test_the_step_is_that_of_a_plain_loop(replay):
    """Against a loop written out, with an optimizer that was not prepared for anything."""
    reference = learner()
    network, target = reference.q_network, reference.target_network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    for number in range(50):
        batch = replay.sample(8, 1, 0.99, reference.generator)
        with torch.no_grad():
            best = target(batch.next_obs).max(1).values
        q_values = network(batch.obs)
        taken = q_values.gather(1, batch.actions[:, None])[:, 0]
        td_loss = F.mse_loss(taken, batch.returns + batch.discounts * best)
        teacher = F.log_softmax(batch.teacher_q_values, 1)
        distill_loss = F.kl_div(F.log_softmax(q_values, 1), teacher, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        (td_loss + 0.5 * distill_loss).backward()
        optimizer.step()
        if number % 10 == 9:
            target.load_state_dict(network.state_dict())
    weights = trained(learner(), replay)
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name])


class FakeGraph:
    """Of CUDA's graph only what Captured relies on: it does what was done inside, when told to."""

    def __init__(self):
        self.replay = None

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generator = generator


class FakeStream:
    def wait_stream(self, _) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch):
    """fake_cuda(replay): capturing works without a GPU, and what is replayed is replay(step)."""

    def fake(replay=lambda step: step) -> None:
        recorded = []
        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)

        @contextlib.contextmanager
        def graph(of: FakeGraph):
            of.replay = replay(recorded[-1])
            yield

        monkeypatch.setattr(torch.cuda, "graph", graph)
        construct = Captured.__init__

        def record(self, step, *args) -> None:
            recorded.append(step)
            construct(self, step, *args)

        monkeypatch.setattr(Captured, "__init__", record)

    return fake


def test_what_capturing_tries_out_leaves_no_trace(replay, fake_cuda, capfd):
    """Warm-up, recording and comparison are undone: weights, averages, step count, random draws."""
    fake_cuda()
    weights = trained(learner(), replay, capture=True)
    expected = trained(learner(), replay)
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert "--capture" not in capfd.readouterr().out


def twice(step):
    def run() -> None:
        step()
        step()

    return run


def failing(step):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("fault", [twice, failing, lambda step: lambda: None])
def test_a_graph_that_does_something_else_is_not_used(replay, fake_cuda, capfd, fault):
    fake_cuda(fault)
    weights = trained(learner(), replay, steps=20, capture=True)
    expected = trained(learner(), replay, steps=20)
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert capfd.readouterr().out.count("--capture: ") == 1


def chosen(device: str = "cpu", capture: bool = False, calls: int = 20) -> list[tuple]:
    """Actions and Q-values of a policy for 3 games, in turn."""
    made, rng = learner(device), np.random.default_rng(1)
    policy = Policy(made.q_values, 3, 4, made.generator, capture)
    if capture:
        policy.step = Captured(policy.act, [policy.q_values], made.generator)
    result = []
    for call in range(calls):
        actions, q_values = policy(rng.integers(256, size=(3, 4, 84, 84), dtype=np.uint8), call / calls)
        result.append((actions.tolist(), q_values.cpu().clone()))
    return result


def test_a_policy_acts_as_act_does():
    made, rng = learner(), np.random.default_rng(1)
    for call, (actions, q_values) in enumerate(chosen()):
        obs = torch.as_tensor(rng.integers(256, size=(3, 4, 84, 84), dtype=np.uint8))
        expected = act(made.q_network, obs, call / 20, made.generator)
        assert actions == expected[0].tolist() and torch.equal(q_values, expected[1])


@pytest.mark.parametrize("fault, refused", [(lambda step: step, 0), (failing, 1), (lambda step: lambda: None, 1)])
def test_a_captured_policy_draws_what_a_plain_one_draws(fake_cuda, capfd, fault, refused):
    expected = chosen()
    fake_cuda(fault)
    for (actions, q_values), (plain_actions, plain_q_values) in zip(chosen(capture=True), expected):
        assert actions == plain_actions and torch.equal(q_values, plain_q_values)
    assert capfd.readouterr().out.count("--capture: ") == refused


@pytest.mark.parametrize(
    "capability, name, expected",
    [
        ("amx_bf16", "Intel", True),
        ("avx512_bf16", "Intel", False),
        ("avx512_bf16", "AMD EPYC", True),
        ("avx2", "AMD", False),
    ],
)
def test_bfloat16_is_the_default_where_it_is_faster(monkeypatch, capfd, capability, name, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True, "cpu_name": name})
    fresh = runpy.run_path(qdagger.__file__)
    for flags, settled in ((["--no-cuda"], expected), (["--amp"], True), (["--no-amp"], False)):
        args = tyro.cli(fresh["Args"], args=flags)
        fresh["choose_device"](args)
        assert args.amp is settled
        assert ("bfloat16" in capfd.readouterr().out) == (expected and settled)


def test_bfloat16_learns_the_same_but_for_rounding(replay):
    """Autocast rounds to 8 bits, 1 in 256: after 50 steps the weights have moved the same way."""
    start = learner().q_network.state_dict()
    plain, rounded = (trained(learner(amp=amp), replay) for amp in (False, True))
    for name, value in plain.items():
        moved, differs = (value - start[name]).norm(), (rounded[name] - value).norm()
        assert 0 < differs < 0.7 * moved


def test_both_buffers_of_a_default_run_fit_in_12_gb():
    args = Args()
    sizes = {args.buffer_size: args.num_envs, args.teacher_steps: args.teacher_envs}
    replays = [FrameReplay(capacity, num_envs, 18, "meta") for capacity, num_envs in sizes.items()]
    assert 10e9 < sum(value.nbytes for replay in replays for value in replay.state_dict().values()) < 12e9


def test_frames_stay_on_the_host_if_they_would_fill_the_gpu(monkeypatch, capfd):
    made = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5e9, 8e9))
    monkeypatch.setattr(torch, "empty", lambda *args, **options: made.append(options))
    qdagger.frame_store(100_000, torch.device("cuda"))
    qdagger.frame_store(1_000_000, torch.device("cuda"))
    assert made[0]["device"].type == "cuda"
    assert made[1].get("pin_memory") and "device" not in made[1]
    assert "stay on the host" in capfd.readouterr().out


# --- On a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("n_step", [1, 3])
def test_captured_steps_are_plain_steps(n_step, capfd):
    """TF32 and the order of sums differ between kernels: within 1% of what 50 steps moved."""
    replay = filled_replay("cuda")
    start = learner("cuda", n_step=n_step).q_network.state_dict()
    plain, fast = (trained(learner("cuda", n_step=n_step, capture=capture), replay) for capture in (False, True))
    assert "--capture" not in capfd.readouterr().out
    for name, value in plain.items():
        assert (fast[name] - value).norm() < 0.01 * (value - start[name].cpu()).norm()


@pytest.mark.gpu
def test_a_captured_policy_is_a_plain_one(capfd):
    plain, fast = chosen("cuda"), chosen("cuda", capture=True)
    assert "--capture" not in capfd.readouterr().out
    for (actions, q_values), (plain_actions, plain_q_values) in zip(fast, plain):
        torch.testing.assert_close(q_values, plain_q_values, rtol=1e-3, atol=1e-4)  # TF32
        assert actions == plain_actions


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [dict(amp=True), dict(compile=True), dict(amp=True, compile=True)])
def test_faster_variants_learn_the_same_but_for_rounding(flags):
    replay = filled_replay("cuda")
    start = learner("cuda").q_network.state_dict()
    plain, fast = trained(learner("cuda"), replay), trained(learner("cuda", **flags), replay)
    for name, value in plain.items():
        assert (fast[name] - value).norm() < 0.7 * (value - start[name].cpu()).norm()


@pytest.mark.gpu
def test_frames_on_the_host_are_drawn_like_those_on_the_gpu(monkeypatch):
    on_gpu = filled_replay("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
    on_host = filled_replay("cuda")
    assert not on_host.frames.is_cuda
    drawn = [each.sample(64, 3, 0.99, torch.Generator("cuda").manual_seed(0)) for each in (on_gpu, on_host)]
    assert all(torch.equal(*pair) for pair in zip(*drawn))

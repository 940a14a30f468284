"""Both networks: names and sizes of their tensors, and their outputs recomputed layer by layer."""

import pytest
import torch
import torch.nn.functional as F

from qdagger_dqn_atari_impalacnn import NETWORKS


def by_hand(name: str, state: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, set[str]]:
    """Q-values from the tensors alone, and the names of those; x is float, from 0 to 1."""
    used = set()

    def layer(function, key: str, x: torch.Tensor, **options) -> torch.Tensor:
        names = f"network.{key}.weight", f"network.{key}.bias"
        used.update(names)
        return function(x, *(state[name] for name in names), **options)

    for i in range(3):
        if name == "nature":
            x = layer(F.conv2d, str(2 * i), x, stride=(4, 2, 1)[i]).relu()
            continue
        x = F.max_pool2d(layer(F.conv2d, f"{i}.conv", x, padding=1), kernel_size=3, stride=2, padding=1)
        for block in (f"{i}.res_block0", f"{i}.res_block1"):
            inner = layer(F.conv2d, f"{block}.conv0", x.relu(), padding=1).relu()
            x = x + layer(F.conv2d, f"{block}.conv1", inner, padding=1)
    hidden, last = ("7", "9") if name == "nature" else ("5", "7")
    return layer(F.linear, last, layer(F.linear, hidden, x.relu().flatten(1)).relu()), used


@pytest.mark.parametrize("name, size, per_action", [("nature", 1_684_128, 513), ("impala", 1_089_232, 257)])
@pytest.mark.parametrize("num_actions", [4, 6, 9, 18])
def test_q_values_layer_by_layer(name, size, per_action, num_actions):
    """From uint8 to float32, on images without symmetry, so that no layer, frame or skip connection can be misplaced.

    Published teachers have these names and sizes. Under autocast only the last layer multiplies in float32.
    """
    torch.manual_seed(0)
    network, obs = NETWORKS[name](num_actions).requires_grad_(False), torch.randint(256, (3, 4, 84, 84)).byte()
    state, before, seen = network.state_dict(), obs.clone(), []
    expected, used = by_hand(name, state, obs / 255)
    assert state.keys() == used and {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert sum(tensor.numel() for tensor in state.values()) == size + num_actions * per_action
    network.to(memory_format=torch.channels_last)
    for rows in (slice(3), slice(1, 2)):
        torch.testing.assert_close(network(obs[rows]), expected[rows], rtol=1e-4, atol=1e-6)
    assert (expected - by_hand(name, state, obs.flip(1) / 255)[0]).abs().max() > 1e-4, "frames look alike to it"
    network.network[-3].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q_values = network(obs)
    assert q_values.dtype == torch.float32 and seen[0].dtype == torch.bfloat16
    torch.testing.assert_close(q_values, F.linear(seen[0].relu().float(), *network.network[-1].state_dict().values()))
    assert 0 < (q_values - expected).abs().max() < 0.03 * expected.abs().max() and torch.equal(obs, before)

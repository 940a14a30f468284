"""Both networks: shapes, sizes, names of their tensors, and their outputs recomputed layer by layer."""

import pytest
import torch
import torch.nn.functional as F

from qdagger_dqn_atari_impalacnn import QNetwork, TeacherNetwork

NETWORKS = [QNetwork, TeacherNetwork]


def build(network_class, num_actions: int = 6, seed: int = 0):
    torch.manual_seed(seed)
    return network_class(num_actions).requires_grad_(False)


def random_obs(batch_size: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (batch_size, 4, 84, 84), dtype=torch.uint8, generator=generator)


def impala_by_hand(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The student's layers from the tensors alone; x is float, from 0 to 1."""
    for sequence in range(3):

        def conv(name: str, x: torch.Tensor, prefix: str = f"network.{sequence}") -> torch.Tensor:
            return F.conv2d(x, state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"], padding=1)

        x = F.max_pool2d(conv("conv", x), kernel_size=3, stride=2, padding=1)
        for block in ("res_block0", "res_block1"):
            x = x + conv(f"{block}.conv1", F.relu(conv(f"{block}.conv0", F.relu(x))))
    x = F.relu(F.linear(F.relu(x).flatten(1), state["network.5.weight"], state["network.5.bias"]))
    return F.linear(x, state["network.7.weight"], state["network.7.bias"])


def nature_by_hand(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The teacher's layers from the tensors alone; x is float, from 0 to 1."""
    for index, stride in ((0, 4), (2, 2), (4, 1)):
        x = F.relu(F.conv2d(x, state[f"network.{index}.weight"], state[f"network.{index}.bias"], stride=stride))
    x = F.relu(F.linear(x.flatten(1), state["network.7.weight"], state["network.7.bias"]))
    return F.linear(x, state["network.9.weight"], state["network.9.bias"])


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("num_actions", [4, 6, 9, 18])
def test_q_values_of_bytes_are_float32(network_class, num_actions):
    """uint8 images in, one float32 number per action out; a row does not depend on its neighbours."""
    network, obs = build(network_class, num_actions), random_obs()
    q_values = network(obs)
    assert q_values.shape == (3, num_actions) and q_values.dtype == torch.float32
    torch.testing.assert_close(network(obs[1:2]), q_values[1:2], rtol=1e-4, atol=1e-6)
    assert (q_values[0] - q_values[1]).abs().max() > 1e-4, "the images make no difference"


@pytest.mark.parametrize("num_actions", [4, 6, 9, 18])
def test_number_of_parameters(num_actions):
    """Known sizes: 1,090,260 for the student at 4 actions, 257 more for each; the teacher's from its formula."""

    def count(network) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    assert count(QNetwork(num_actions)) == 1_090_260 + 257 * (num_actions - 4)
    assert count(TeacherNetwork(num_actions)) == 1_684_128 + 513 * num_actions


def test_teacher_tensors_have_the_published_names_and_shapes():
    """Published checkpoints load only if every key and shape is theirs, in float32."""
    shapes = {
        "network.0": (32, 4, 8, 8),
        "network.2": (64, 32, 4, 4),
        "network.4": (64, 64, 3, 3),
        "network.7": (512, 3136),
        "network.9": (6, 512),
    }
    expected = {f"{layer}.weight": shape for layer, shape in shapes.items()}
    expected |= {f"{layer}.bias": shape[:1] for layer, shape in shapes.items()}
    state = TeacherNetwork(6).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_student_tensors_keep_their_names_and_shapes():
    """A student saved today must load tomorrow, as a teacher too."""
    expected = {}
    for sequence, (inputs, outputs) in enumerate([(4, 16), (16, 32), (32, 32)]):
        expected[f"network.{sequence}.conv"] = (outputs, inputs, 3, 3)
        for conv in ("res_block0.conv0", "res_block0.conv1", "res_block1.conv0", "res_block1.conv1"):
            expected[f"network.{sequence}.{conv}"] = (outputs, outputs, 3, 3)
    expected |= {"network.5": (256, 32 * 11 * 11), "network.7": (9, 256)}
    shapes = {f"{layer}.weight": shape for layer, shape in expected.items()}
    shapes |= {f"{layer}.bias": shape[:1] for layer, shape in expected.items()}
    assert {name: tuple(tensor.shape) for name, tensor in QNetwork(9).state_dict().items()} == shapes


def test_feature_maps_halve_three_times():
    """84 to 42, 21 and 11, with 16, 32 and 32 channels."""
    network, shapes = build(QNetwork), []
    for sequence in network.network[:3]:
        sequence.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    network(random_obs(1))
    assert shapes == [(16, 42, 42), (32, 21, 21), (32, 11, 11)]


@pytest.mark.parametrize(("network_class", "by_hand"), [(QNetwork, impala_by_hand), (TeacherNetwork, nature_by_hand)])
def test_white_images_are_ones(network_class, by_hand):
    """All-255 bytes give what the layers make of ones: the division by 255 is inside, and done once."""
    network = build(network_class)
    white = network(torch.full((1, 4, 84, 84), 255, dtype=torch.uint8))
    torch.testing.assert_close(white, by_hand(network.state_dict(), torch.ones(1, 4, 84, 84)), rtol=1e-4, atol=1e-6)
    black = by_hand(network.state_dict(), torch.zeros(1, 4, 84, 84))
    assert (white - black).abs().max() > 1e-3, "white and black look alike to this network"


@pytest.mark.parametrize(("network_class", "by_hand"), [(QNetwork, impala_by_hand), (TeacherNetwork, nature_by_hand)])
def test_random_images_layer_by_layer(network_class, by_hand):
    """The whole network on images without symmetry, so that no layer, skip connection or frame can be misplaced."""
    network, obs = build(network_class), random_obs()
    expected = by_hand(network.state_dict(), obs.float() / 255)
    torch.testing.assert_close(network(obs), expected, rtol=1e-4, atol=1e-6)
    assert (expected - by_hand(network.state_dict(), obs.flip(1).float() / 255)).abs().max() > 1e-4


@pytest.mark.parametrize("network_class", NETWORKS)
def test_bfloat16_inside_float32_outside(network_class):
    """Under autocast the Q-values are still float32, close to the exact ones, and not equal to them."""
    network, obs = build(network_class), random_obs()
    exact = network(obs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q_values = network(obs)
    assert q_values.dtype == torch.float32
    assert not torch.equal(q_values, exact), "autocast changed nothing: was it on?"
    assert (q_values - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("network_class", NETWORKS)
def test_channels_last_changes_nothing(network_class):
    """The memory format of the weights is a matter of speed alone."""
    network, obs = build(network_class), random_obs()
    expected = network(obs)
    network.to(memory_format=torch.channels_last)
    kernels = [parameter for parameter in network.parameters() if parameter.dim() == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    torch.testing.assert_close(network(obs), expected, rtol=1e-4, atol=1e-6)

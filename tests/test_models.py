"""Networks by name; the taps that can be cut without a difference; taps on layers."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kdutils import models
from kdutils._torchvision import torchvision


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("stem", models.STEMS)
@pytest.mark.parametrize("name", models.NETWORKS)
def test_every_network_maps_images_to_logits(name, stem):
    network = models.build(name, classes=7, seed=0, stem=stem, size=16).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    assert all(
        m.weight.is_contiguous(memory_format=torch.channels_last)
        for m in network.modules()
        if isinstance(m, torch.nn.Conv2d)
    )


def test_resnets_are_torchvisions_own_at_sizes_where_nothing_is_idle():
    resnet18 = torchvision.models.resnet18(num_classes=10)
    built = models.build("resnet18", classes=10, seed=0, size=64)
    shapes = {key: value.shape for key, value in resnet18.state_dict().items()}
    assert {key: value.shape for key, value in built.state_dict().items()} == shapes
    built.load_state_dict(resnet18.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = resnet18.eval()(images)
        torch.testing.assert_close(built.eval()(images), expected, atol=1e-5, rtol=1e-4)


def test_the_small_stem_keeps_the_resolution():
    network = models.build("resnet18", classes=10, seed=0, stem="small")
    found = models.taps(network.eval(), ["layer1", "layer4"])(torch.zeros(1, 3, 32, 32))
    assert found["layer1"].shape[2:] == (32, 32)
    assert found["layer4"].shape[2:] == (4, 4)
    # Known from many CIFAR-10 repositories: ResNet-18 with this stem, 10 classes.
    assert parameters(network) == 11_173_962


def test_convnet_widths_are_its_layers():
    for widths in ((16, 32, 64), (8,), (4, 6)):
        network = models.build("convnet", classes=10, seed=0, widths=widths)
        channels = [m.out_channels for m in network if isinstance(m, torch.nn.Conv2d)]
        assert channels == list(widths)
    before, count = 3, 0
    for width in (16, 32, 64):  # kernel, then scale and shift of batch norm
        count, before = count + 9 * before * width + 2 * width, width
    network = models.build("convnet", classes=10, seed=0)
    assert parameters(network) == count + 64 * 10 + 10


def test_pooling_before_the_stems_relu_leaves_the_same_bits():
    ours = models._resnet("resnet10", 10, "imagenet")
    torchs = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1] * 4, 10)
    torchs.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 64, 64)
    outputs = [network(images) for network in (ours, torchs)]
    assert torch.equal(*outputs)
    for output in outputs:
        F.cross_entropy(output, torch.tensor([1, 2, 3, 4])).backward()
    for one, other in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


# ------------------------------------------------------------------------------ idle taps


def full_and_cut(name, size, stem="imagenet"):
    """The same network (double precision) as torchvision makes it, and with idle taps cut."""
    torch.manual_seed(0)
    if name == "bottlenecks":  # of ResNet-50, one a stage
        resnet = torchvision.models.resnet
        full = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10).double()
    else:
        full = models._resnet(name, 10, stem).double()
    cut = copy.deepcopy(full)
    models.fit_to_size(cut.float(), size)  # it measures with single-precision images
    return full, cut.double()


def kept(full, cut):
    """Where the kept taps lie in the full kernels: slices by name of the parameter."""
    places = {}
    for (name, old), new in zip(full.named_parameters(), cut.parameters(), strict=True):
        if old.shape == new.shape:
            places[name] = (slice(None),) * old.dim()
        elif new.shape[2:] == (1, 1):
            places[name] = (slice(None), slice(None), slice(1, 2), slice(1, 2))
        else:
            assert new.shape[2:] == (2, 2)
            places[name] = (slice(None), slice(None), slice(1, 3), slice(1, 3))
    return places


def steps(network, size, count, look=lambda: None):
    """Train on the same random pictures; the losses."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.002, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(count):
        images = torch.randn(6, 3, size, size, dtype=torch.float64)
        loss = F.cross_entropy(network(images), torch.randint(10, (6,)))
        optimizer.zero_grad()
        loss.backward()
        look()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "size"), [("resnet10", 32), ("resnet10", 16), ("bottlenecks", 32)]
)
def test_idle_taps_change_no_output_no_gradient_and_no_training(name, size):
    full, cut = full_and_cut(name, size)
    places = kept(full, cut)
    smaller = [n for n, p in full.named_parameters() if p[places[n]].shape != p.shape]
    assert smaller  # something was cut
    original = {n: p.detach().clone() for n, p in full.named_parameters()}

    def look():
        for name, parameter in full.named_parameters():
            idle = parameter.grad.clone()
            idle[places[name]] = 0
            assert not idle.any()  # exactly zero

    losses = steps(full, size, 2, look), steps(cut, size, 2)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for (name, old), new in zip(full.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(old[places[name]], new, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(old.grad[places[name]], new.grad, rtol=1e-5, atol=1e-6)
        idle = old.detach() - original[name]
        idle[places[name]] = 0
        assert not idle.any()  # they never moved
    for name, old in full.named_buffers():
        torch.testing.assert_close(old, cut.get_buffer(name), rtol=1e-8, atol=1e-10)
    images = torch.randn(5, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = full.eval()(images)
        torch.testing.assert_close(cut.eval()(images), expected, rtol=1e-7, atol=1e-9)


def test_resnet18_has_4_2_million_weights_without_idle_taps():
    full, cut = full_and_cut("resnet18", 32)
    assert parameters(full) == 11_181_642
    stride_2 = (9 - 4) * 256 * 512  # 2 × 2 pixels become one: 4 of 9 taps are read
    others = 3 * (9 - 1) * 512 * 512  # one pixel: only the centre is
    assert parameters(cut) == 11_181_642 - stride_2 - others == 4_234_826
    assert parameters(models.build("resnet18", classes=10, seed=0)) == 4_234_826


@pytest.mark.parametrize(("size", "stem"), [(64, "imagenet"), (32, "small")])
def test_nothing_is_cut_where_every_tap_is_read(size, stem):
    full, cut = full_and_cut("resnet10", size, stem)
    assert parameters(full) == parameters(cut)


def test_cutting_leaves_mode_and_batch_statistics_alone():
    torch.manual_seed(0)
    network = models._resnet("resnet10", 10, "imagenet").train()
    before = {name: value.clone() for name, value in network.named_buffers()}
    models.fit_to_size(network, 32)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(network.get_buffer(name), value) for name, value in before.items())


def computes_the_same(layer, usual, side):
    """Values, gradients, second gradients; state; tapped as a whole. Returns the maps used."""
    assert usual.state_dict().keys() == layer.state_dict().keys()
    layer.load_state_dict(usual.state_dict())
    maps = torch.randn(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    found = [one(maps) for one in (usual, layer)]
    torch.testing.assert_close(*found)
    way = torch.randn_like(found[0])
    gradients = [
        torch.autograd.grad(out, (maps, one.weight), way)
        for out, one in zip(found, (usual, layer), strict=True)
    ]
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradgradcheck(layer, maps)
    tapped = models.taps(torch.nn.Sequential(layer), ["0"])
    assert torch.equal(tapped(maps)["0"], found[1])
    assert list(tapped.state_dict()) == ["0.weight"]
    return maps


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (1, 1, 0)])
def test_a_matrix_convolution_is_the_convolution(side, kernel, stride, pad):
    torch.manual_seed(0)
    usual = torch.nn.Conv2d(3, 4, kernel, stride, pad, bias=False).double()
    matrix = models.MatrixConv2d(3, 4, kernel, stride, pad, side=side).double()
    maps = computes_the_same(matrix, usual, side)
    with pytest.raises(ValueError, match=f"fitted to pictures on which it is {side} × {side}"):
        matrix(maps[:, :, :, 1:])


def test_a_batch_convolution_is_the_convolution():
    torch.manual_seed(0)
    usual = torch.nn.Conv2d(3, 5, 3, 1, 1, bias=False).double()
    computes_the_same(models.BatchConv2d(3, 5, 3, 1, 1, bias=False).double(), usual, 4)


def test_the_layers_that_small_maps_are_given():
    network = models.build("resnet18", classes=10, seed=0)
    kinds = [type(m).__name__ for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert kinds[:6] == ["Conv2d"] * 6  # stem, layer1, and layer2's first, from 8 × 8
    assert kinds[6:10] == ["BatchConv2d", "Conv2d", "BatchConv2d", "BatchConv2d"]
    assert kinds[10:] == ["MatrixConv2d"] * 10


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"groups": 2},
        {"dilation": 2, "padding": 2},
        {"padding_mode": "reflect"},
        {"kernel_size": (1, 3), "padding": (0, 1)},
        {"stride": (1, 2)},
        {"padding": "same"},
    ],
    ids=str,
)
def test_other_convolutions_are_left_alone(options):
    usual = {"kernel_size": 3, "padding": 1, "bias": False}
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(2))
    network.append(torch.nn.Conv2d(4, 4, **usual | options))
    network.append(torch.nn.Conv2d(4, 4, **usual))
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = network.eval()(images)
        models.fit_to_size(network, 8)
        torch.testing.assert_close(network(images), expected)
    height, width = network[:3](images).shape[2:]
    found = [type(network[k]).__name__ for k in (2, 3)]
    assert found == ["Conv2d", "MatrixConv2d" if height == width else "Conv2d"]


# ---------------------------------------------------------------------------- seeds, names


@pytest.mark.parametrize("name", ["resnet10", "convnet"])
def test_weights_depend_on_the_seed_alone(name):
    one = models.build(name, classes=10, seed=1, size=16).state_dict()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = models.build(name, classes=10, seed=1, size=16).state_dict()
    other = models.build(name, classes=10, seed=2, size=16).state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # nothing global was drawn
    assert all(torch.equal(one[key], again[key]) for key in one)
    kernels = [key for key in one if one[key].dim() == 4]
    assert not any(torch.equal(one[key], other[key]) for key in kernels)


def test_an_unknown_network_or_stem_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'resnet19'; networks: resnet10, resnet18, resnet34, "):
        models.build("resnet19", classes=10, seed=0)
    with pytest.raises(ValueError, match="'cifar'; stems: imagenet, small"):
        models.build("resnet18", classes=10, seed=0, stem="cifar")


def test_taps_return_the_named_layers_on_the_same_weights():
    network = models.build("resnet10", classes=10, seed=0).eval()
    tapped = models.taps(network, ["layer2", "layer4.0.conv1", "fc"])
    images = torch.randn(2, 3, 32, 32)
    found = tapped(images)
    assert set(found) == {"layer2", "layer4.0.conv1", "fc"}
    assert torch.equal(found["fc"], network(images))
    expected = []
    handle = network.layer2.register_forward_hook(lambda m, x, out: expected.append(out))
    network(images)
    handle.remove()
    assert torch.equal(found["layer2"], expected[0])
    found["layer2"].sum().backward()
    assert network.conv1.weight.grad is not None  # the network's own, not a copy's
    assert network.fc.weight.grad is None


@pytest.mark.parametrize("layer", ["layer5", "layer", "layer2.0.conv", ""])
def test_a_layer_that_does_not_exist_is_named_with_those_that_do(layer):
    network = models.build("resnet10", classes=10, seed=0)
    with pytest.raises(ValueError, match=rf"no layer '{layer}'; layers: x, conv1, .*layer4.0"):
        models.taps(network, ["layer1", layer])


# ------------------------------------------------------------- torchvision beside a CPU torch

SHIM = """
import sys, types, torch

state = {"error": None}

class Finder:  # a torchvision that imports as `state` says
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "torchvision":
            return None
        import importlib.machinery
        return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        if state["error"] and not declared():
            raise state["error"]
        module.ours = True

def declared():
    try:
        torch.ops.torchvision.nms, torch.ops.torchvision.qnms
    except (AttributeError, RuntimeError):
        return False
    return True

def attempt(error):
    state["error"] = error
    for name in [n for n in sys.modules if "torchvision" in n]:
        del sys.modules[name]
    from kdutils._torchvision import torchvision
    assert torchvision.ours

sys.meta_path.insert(0, Finder())
attempt(None)
assert not declared()
print("its own import succeeds: nothing is declared")
for error in (RuntimeError("out of memory"), ImportError("torchvision::nms")):
    try:
        attempt(error)
    except type(error) as caught:
        assert caught is error and not declared()
    else:
        raise SystemExit("passed over")
print("other errors pass through: nothing is declared")
attempt(RuntimeError("operator torchvision::nms does not exist"))
assert declared()
print("missing schemas are declared")
"""


def test_the_schemas_of_torchvision_are_declared_only_when_its_import_needs_them():
    done = subprocess.run([sys.executable, "-c", SHIM], capture_output=True, encoding="utf-8")
    assert done.stderr == ""
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        "its own import succeeds",
        "other errors pass through",
        "missing schemas are declared",
    ]

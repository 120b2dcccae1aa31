"""Networks by name, and taps on their layers."""

import torch
from torch import nn

from kdutils._torchvision import torchvision

BLOCKS = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
NETWORKS = (*BLOCKS, "resnet50", "convnet")
STEMS = ("imagenet", "small")


def build(
    name: str,
    *,
    classes: int,
    seed: int,
    stem: str = "imagenet",
    size: int = 32,
    widths: tuple[int, ...] = (16, 32, 64),
) -> nn.Module:
    """A network with fresh weights drawn from ``seed``; images (B, 3, size, size) to logits (B, C).

    ``stem`` is torchvision's own for ImageNet (7 × 7, stride 2, then pooling), or ``small``
    (3 × 3, stride 1, no pooling), usual for CIFAR; it and ``size`` matter to ResNets alone,
    ``widths`` (channels of each 3 × 3 layer) to ``convnet`` alone.
    Raises ValueError naming the allowed values when ``name`` or ``stem`` is not one of them.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; networks: {', '.join(NETWORKS)}")
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; stems: {', '.join(STEMS)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "convnet":
            network = convnet(widths, classes)
        else:
            network = _resnet(name, classes, stem)
            drop_idle_taps(network, size)
    return network.to(memory_format=torch.channels_last)


def _resnet(name: str, classes: int, stem: str) -> nn.Module:
    resnet = torchvision.models.resnet
    if name == "resnet50":
        network = resnet.ResNet(resnet.Bottleneck, [3, 4, 6, 3], num_classes=classes)
    else:
        network = resnet.ResNet(resnet.BasicBlock, list(BLOCKS[name]), num_classes=classes)
    if stem == "small":
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network


def convnet(widths: tuple[int, ...], classes: int) -> nn.Sequential:
    """3 × 3 convolutions of these widths, each with batch norm, ReLU and 2 × 2 pooling; one head.

    (B, 3, H, W) to (B, C). With widths (16, 32, 64) and 10 classes: 24,000 weights.
    """
    layers, before = [], 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def drop_idle_taps(network: nn.Module, size: int) -> None:
    """Cut from 3 × 3 kernels, in place, the taps that only ever read padding at this image size.

    With the ImageNet stem, 32 × 32 images have shrunk to 2 × 2 and 1 × 1 pixels in a ResNet's last
    stage. There eight of nine taps (five of nine where 2 × 2 becomes 1 × 1) see zeros alone: they
    get no gradient and change no output. Without them the function and its training are the
    same, while ResNet-18 has 4.2 million weights in place of 11.2 and a step takes three quarters
    of the time.
    """
    shapes = {}
    convolutions = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    hooks = [
        module.register_forward_pre_hook(lambda _, x, n=n: shapes.update({n: x[0].shape[-2:]}))
        for n, module in convolutions.items()
    ]
    was_training = network.training
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    for name, old in convolutions.items():
        if old.kernel_size != (3, 3) or old.padding != (1, 1) or old.groups != 1:
            continue
        if shapes[name] == (1, 1):
            taps = slice(1, 2)
        elif shapes[name] == (2, 2) and old.stride == (2, 2):
            taps = slice(1, 3)
        else:
            continue
        weight = old.weight.detach()[:, :, taps, taps].clone()
        new = nn.Conv2d(old.in_channels, old.out_channels, weight.shape[-1], bias=False)
        new.weight = nn.Parameter(weight)
        network.set_submodule(name, new)


def taps(network: nn.Module, layers: list[str]) -> nn.Module:
    """A module that returns ``{layer: output}`` for the named layers, on the same weights.

    Names are those of ``torchvision.models.feature_extraction.get_graph_node_names``.
    Raises ValueError listing the names there are when one does not exist.
    """
    extraction = torchvision.models.feature_extraction
    known = extraction.get_graph_node_names(network)[1]
    for layer in layers:
        if layer not in known and not any(k.startswith(f"{layer}.") for k in known):
            raise ValueError(f"no layer {layer!r}; layers: {', '.join(known)}")
    return extraction.create_feature_extractor(network, list(layers))

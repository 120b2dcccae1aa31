"""Networks by name, and taps on their layers."""

from collections import OrderedDict

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
            fit_to_size(network, size)
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
    else:
        # The greatest of nine ReLUs is the ReLU of the greatest: a quarter of the work.
        network.relu, network.maxpool = nn.Identity(), nn.Sequential(network.maxpool, network.relu)
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


# Channels of the three convolutions, then of the hidden fully connected layer (Passalis et al.
# 2020, their public networks; those of study 2's authors, code/cifar_tiny.py at commit 9447244).
CNN_WIDTHS = {"convtiny": (16, 32, 64, 128), "convverytiny": (8, 16, 32, 64)}


def small_cnn(name: str, *, classes: int, seed: int, size: int = 32) -> nn.Sequential:
    """ConvTiny or ConvVeryTiny of study 2: three 3 × 3 convolutions, two fully connected layers.

    Fresh weights are drawn from ``seed``; images (B, 3, ``size``, ``size``), at least 22 pixels, to
    logits (B, C). Convolutions have no padding; batch norm, ReLU and 2 × 2 pooling follow each.
    58,000 and 15,000 weights for 32 pixels and 10 classes. Layers to tap: ``layer1``, ``layer2``,
    ``layer3`` (after pooling), ``hidden``, ``logits``.
    Raises ValueError naming the allowed values when ``name`` is not one of them.
    """
    if name not in CNN_WIDTHS:
        raise ValueError(f"unknown network {name!r}; networks: {', '.join(CNN_WIDTHS)}")
    *widths, hidden = CNN_WIDTHS[name]
    layers, side = {}, size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for k, (before, width) in enumerate(zip((3, *widths), widths, strict=False), 1):
            side = (side - 2) // 2
            layers[f"conv{k}"] = nn.Conv2d(before, width, 3)
            layers[f"norm{k}"] = nn.BatchNorm2d(width)
            # The greatest of four ReLUs is the ReLU of the greatest: a quarter of the work.
            layers |= {f"pool{k}": nn.MaxPool2d(2), f"layer{k}": nn.ReLU()}
        layers |= {"flatten": nn.Flatten(), "fc": nn.Linear(widths[-1] * side**2, hidden)}
        layers |= {"hidden": nn.ReLU(), "logits": nn.Linear(hidden, classes)}
    return nn.Sequential(OrderedDict(layers)).to(memory_format=torch.channels_last)


class Unfold(torch.autograd.Function):
    """Rows (B, N, C) to the rows that ``read`` names, (B, len(read), C); row N is padding, zero.

    ``back`` (N, R) lists who read each row, filled up with len(read), which is nobody. So the way
    back is a gather and a sum as well: indexed addition takes several times as long. Whether there
    is padding, and whether ``back`` is filled up, is said, since looking is slow on a GPU.
    """

    @staticmethod
    def forward(ctx, rows, read, back, padded, filled):
        ctx.save_for_backward(back)
        ctx.filled = filled
        return _one_more(rows, padded).index_select(1, read)

    @staticmethod
    def backward(ctx, gradient):
        (back,) = ctx.saved_tensors
        found = _one_more(gradient, ctx.filled).index_select(1, back.flatten())
        return found.unflatten(1, back.shape).sum(2), None, None, None, None


def _one_more(rows: torch.Tensor, wanted: bool) -> torch.Tensor:
    return nn.functional.pad(rows, (0, 0, 0, 1)) if wanted else rows


class MatrixConv2d(nn.Conv2d):
    """A convolution of maps (B, C, ``side``, ``side``) as one matrix product, without a bias.

    On maps of a few pixels a processor's convolution kernels, above all those for the weights'
    gradient, take up to ten times as long as the product that they amount to.
    Raises ValueError for maps of another size.
    """

    def __init__(self, before, after, kernel, stride, pad, *, side: int):
        super().__init__(before, after, kernel, stride, pad, bias=False)
        inside = torch.arange(side**2)
        places = torch.full((side + 2 * pad,) * 2, len(inside))
        places[pad : pad + side, pad : pad + side] = inside.view(side, side)
        windows = places.unfold(0, kernel, stride).unfold(1, kernel, stride)
        read = windows.flatten()
        readers = [torch.nonzero(read == place).flatten() for place in inside]
        back = nn.utils.rnn.pad_sequence(readers, batch_first=True, padding_value=len(read))
        self.register_buffer("read", read, persistent=False)
        self.register_buffer("back", back, persistent=False)
        self.side, self.across, self.whole = side, windows.shape[0], read.equal(inside)
        self.padded = bool((read == len(inside)).any())
        self.filled = bool((back == len(read)).any())

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if maps.shape[2:] != (self.side, self.side):
            found = " × ".join(map(str, maps.shape[2:]))
            raise ValueError(
                f"a map is {found} pixels, but this network was fitted to pictures on which it is "
                f"{self.side} × {self.side}"
            )
        rows = maps.permute(0, 2, 3, 1).flatten(1, 2)
        if not self.whole:
            rows = Unfold.apply(rows, self.read, self.back, self.padded, self.filled)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        found = nn.functional.linear(rows.reshape(-1, weight.shape[1]), weight)
        return found.unflatten(0, (-1, self.across, self.across)).permute(0, 3, 1, 2)


class BatchConv2d(nn.Conv2d):
    """A convolution of stride 1, without a bias, whose weights' gradient is a convolution as well.

    It slides the output's gradient over the maps, with pictures in the place of channels. On maps
    of 4 × 4 pixels a processor's own kernel for that gradient takes more than twice as long.
    """

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if maps.device.type != "cpu":
            return super().forward(maps)
        return Sliding.apply(maps, self.weight.to(maps.dtype), self.padding)


class Sliding(torch.autograd.Function):
    """Maps (B, C, H, W) convolved with weights (C', C, k, k): the function of BatchConv2d."""

    @staticmethod
    def forward(ctx, maps, weight, padding):
        ctx.save_for_backward(maps, weight)
        ctx.padding = padding
        return nn.functional.conv2d(maps, weight, None, 1, padding)

    @staticmethod
    def backward(ctx, gradient):
        maps, weight = ctx.saved_tensors
        on_maps = nn.grad.conv2d_input(maps.shape, weight, gradient, 1, ctx.padding)
        swapped = (
            tensor.transpose(0, 1).contiguous(memory_format=torch.channels_last)
            for tensor in (maps, gradient)
        )
        return on_maps, nn.functional.conv2d(*swapped, None, 1, ctx.padding).transpose(0, 1), None


def cifar_resnet(
    depth: int, *, classes: int, seed: int, width: int = 16, stride: int = 1
) -> nn.Sequential:
    """A ResNet for small pictures (He et al. 2016, section 4.2); (B, 3, H, W) to logits (B, C).

    A 3 × 3 stem of this ``stride``, then three stages of (``depth`` − 2) / 6 basic blocks each,
    ``width``, 2 · ``width`` and 4 · ``width`` channels wide; every stage after the first halves the
    map. With ``width`` 16 and ``stride`` 1 it is the paper's, but that shortcuts which change shape
    are 1 × 1 convolutions. The last layer is ``fc``. Weights are drawn from ``seed``.
    Not narrower than 16 to be trained: without bf16 arithmetic, oneDNN 3.12 writes past its memory
    for such shortcuts of fewer than a block of channels (uxlfoundation/oneDNN, issue 6035).
    Raises ValueError when ``depth`` is not 8, 14, 20, ...
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth is {depth}; it must be 8, 14, 20, ... (6 n + 2)")
    block, before = torchvision.models.resnet.BasicBlock, width
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(inplace=True), *(block(width, width) for _ in range(depth // 6))]
        for after in (2 * width, 4 * width):
            shortcut = nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after)
            layers += [block(before, after, 2, nn.Sequential(*shortcut))]
            layers += [block(after, after) for _ in range(depth // 6 - 1)]
            before = after
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network.add_module("fc", nn.Linear(before, classes))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network.to(memory_format=torch.channels_last)


class Featured(nn.Module):
    """A network whose output is its pooled features and its logits, end to end: (B, D + C).

    Features (B, D) are what ``network.fc``, the last layer, reads; ``width`` is D. One tensor, so
    that both go through whatever takes a network's output. The network itself is taken over.
    With ``maps`` the output goes on, (B, D + C + H · W): of what is pooled to become the features,
    (B, D, H, W), the root of the mean square over channels, as attention transfer reads it.
    """

    def __init__(self, network: nn.Module, maps: bool = False):
        super().__init__()
        self.head, network.fc = network.fc, nn.Identity()
        self.body, self.width, self.maps, self.pooled = network, self.head.in_features, maps, None
        for pool in (m for m in network.modules() if isinstance(m, nn.AdaptiveAvgPool2d) and maps):
            pool.register_forward_pre_hook(lambda _, read: setattr(self, "pooled", *read))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.body(images).float()
        found = [features, self.head(features).float()]
        if self.maps:  # a root's gradient has no bound at zero
            found.append((self.pooled.float().square().mean(1) + 1e-12).sqrt().flatten(1))
        return torch.cat(found, 1)


def _plain(convolution: nn.Conv2d) -> bool:
    """Whether :class:`MatrixConv2d` computes the same."""
    square = all(
        isinstance(pair, tuple) and len(set(pair)) == 1
        for pair in (convolution.kernel_size, convolution.stride, convolution.padding)
    )
    usual = convolution.groups == 1 and convolution.dilation == (1, 1)
    zeros = convolution.padding_mode == "zeros" and convolution.bias is None
    return type(convolution) is nn.Conv2d and square and usual and zeros


def fit_to_size(network: nn.Module, size: int) -> None:
    """Replace, in place, convolutions that images of ``size`` make wasteful; the function stays.

    For that size and no other. Touched are convolutions without groups, bias, dilation or padding
    other than zeros, square in kernel, stride and maps; all others stay.

    With the ImageNet stem, 32 × 32 images have shrunk to 2 × 2 and 1 × 1 pixels in a ResNet's last
    two stages. Where a map has one pixel, eight of nine taps of a 3 × 3 kernel (five of nine where
    2 × 2 becomes 1 × 1) only ever read padding: they get no gradient and change no output. They
    are cut off, which leaves ResNet-18 4.2 million weights of 11.2. What puts out at most 2 × 2
    pixels becomes a :class:`MatrixConv2d`, a 3 × 3 kernel from 4 × 4 to 4 × 4 a
    :class:`BatchConv2d`.
    """
    shapes = {}
    convolutions = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    hooks = [
        module.register_forward_hook(
            lambda _, x, y, n=n: shapes.update({n: (x[0].shape[2:], y.shape[2:])})
        )
        for n, module in convolutions.items()
    ]
    was_training = network.training
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    for name, old in convolutions.items():
        (before, across), (after, beside) = shapes[name]
        if (before, after) != (across, beside) or not _plain(old):
            continue
        if (before, after, old.kernel_size, old.stride) == (4, 4, (3, 3), (1, 1)):
            new = BatchConv2d(old.in_channels, old.out_channels, 3, 1, old.padding, bias=False)
            new.weight = old.weight
            network.set_submodule(name, new)
        if after > 2:
            continue
        weight, pad = old.weight.detach(), old.padding
        if old.kernel_size == (3, 3) and pad == (1, 1) and after == 1:
            pad = (0, 0)
            weight = weight[:, :, 1 : 1 + before, 1 : 1 + before].clone()
        kernel, stride, (pad, *_) = weight.shape[-1], old.stride[0], pad
        new = MatrixConv2d(old.in_channels, old.out_channels, kernel, stride, pad, side=before)
        new.weight = nn.Parameter(weight)
        network.set_submodule(name, new)


def taps(network: nn.Module, layers: list[str]) -> nn.Module:
    """A module that returns ``{layer: output}`` for the named layers, on the same weights.

    Names are those of ``torchvision.models.feature_extraction.get_graph_node_names``. Where a ReLU
    that works in place follows a layer, the layer shows what the ReLU has left, if that is computed
    too: tap the ReLU itself, or set its ``inplace`` to False first.
    Raises ValueError listing the names there are when one does not exist.
    """
    extraction = torchvision.models.feature_extraction
    whole = {"leaf_modules": [MatrixConv2d, BatchConv2d]}
    known = extraction.get_graph_node_names(network, tracer_kwargs=whole)[1]
    for layer in layers:
        if layer not in known and not any(k.startswith(f"{layer}.") for k in known):
            raise ValueError(f"no layer {layer!r}; layers: {', '.join(known)}")
    return extraction.create_feature_extractor(network, list(layers), tracer_kwargs=whole)

"""ResNets whose parameters have the names that published weights have, as torchvision's."""

import torch
from torch import nn


class _Block(nn.Module):
    """A residual block: x -> relu(convolutions(x) + shortcut(x)).

    layers  (outputs, kernel, stride) of each convolution
    """

    def __init__(self, inputs, layers, stride):
        super().__init__()
        self._depth, first = len(layers), inputs
        for i, (outputs, kernel, its_stride) in enumerate(layers, 1):
            conv = nn.Conv2d(inputs, outputs, kernel, its_stride, kernel // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(outputs))
            inputs = outputs
        self.downsample = None
        if stride != 1 or first != inputs:
            self.downsample = nn.Sequential(nn.Conv2d(first, inputs, 1, stride, bias=False), nn.BatchNorm2d(inputs))
        # Every block starts as its shortcut (Goyal et al. 2017).
        nn.init.zeros_(getattr(self, f"bn{self._depth}").weight)

    def forward(self, x):
        y = x
        for i in range(1, self._depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self._depth:
                y = y.relu_()
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


def _basic(inputs, width, stride):
    return _Block(inputs, [(width, 3, stride), (width, 3, 1)], stride), width


def _bottleneck(inputs, width, stride):
    """With the stride on the 3x3 convolution, as in the weights that are published (ResNet 1.5)."""
    return _Block(inputs, [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)], stride), 4 * width


RESNETS = {"resnet18": (_basic, (2, 2, 2, 2)), "resnet34": (_basic, (3, 4, 6, 3)),
           "resnet50": (_bottleneck, (3, 4, 6, 3))}


class ResNet(nn.Module):
    """ResNet (He et al. 2016): images (B, channels, size, size) -> features (B, D).

    Batch norm uses the statistics of each rank's own examples. For images of up to 64 pixels the stem does not shrink
    them; its first convolution then has another shape than the published one. `fc` projects to the features.
    """

    def __init__(self, block, depths, channels, image_size, feature_dim):
        super().__init__()
        small = image_size <= 64
        self.conv1 = nn.Conv2d(channels, 64, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        previous = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                layer, previous = block(previous, 64 << stage, 2 if stage and not i else 1)
                blocks.append(layer)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(previous, feature_dim)
        self._num_layers, self._num_frozen = len(depths), 0

    @property
    def stages(self):
        """The modules of every stage, from the input on: the stem, then layer1 and those behind it; fc is in none."""
        return [[self.conv1, self.bn1], *([layer] for layer in self._layers())]

    def _layers(self):
        return [getattr(self, f"layer{i + 1}") for i in range(self._num_layers)]

    def freeze(self, num_stages):
        """Train the first stages no more: their parameters get no gradient, their batch norms use and keep their
        running statistics."""
        self._num_frozen = num_stages
        for module in self._frozen():
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self):
        return [module for stage in self.stages[: self._num_frozen] for module in stage]

    def forward(self, images):
        x = self.maxpool(self.bn1(self.conv1(images)).relu_())
        for layer in self._layers():
            x = layer(x)
        return self.fc(self.avgpool(x).flatten(1))

    def old_names(self):
        """{old: new} of modules: the names in checkpoints of the time before the published names."""
        names, place = {"layers.0.0": "conv1", "layers.0.1": "bn1", "project": "fc"}, 2
        place += isinstance(self.maxpool, nn.MaxPool2d)
        for i, layer in enumerate(self._layers(), 1):
            for j, block in enumerate(layer):
                old, new = f"layers.{place}", f"layer{i}.{j}"
                for k in range(block._depth):
                    names[f"{old}.body.{2 * k}.0"] = f"{new}.conv{k + 1}"
                    names[f"{old}.body.{2 * k}.1"] = f"{new}.bn{k + 1}"
                names |= {f"{old}.shortcut.{k}": f"{new}.downsample.{k}" for k in range(2)}
                place += 1
        return names

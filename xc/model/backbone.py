"""Backbones by name: networks that turn images or vectors into features. All end in `FeatureNorm`."""

import math

import torch
from torch import nn

from xc.comm.autograd import sum_over
from xc.errors import UserError
from xc.model.resnet import RESNETS, ResNet


class FeatureNorm(nn.Module):
    """Batch norm of the features over the global batch, without scale and shift: (B, D) -> (B, D).

    Untrained features all point the same way. Without this norm every target row is first pulled there, and a cosine
    softmax over thousands of classes takes long to recover: in trials of 400 steps of 128 glyphs at the same learning
    rates the loss ended at 2.6 with it, and at 5.8 with a norm of each example alone in its place. The statistics are
    those of the global batch, so the result does not depend on the number of ranks; they cost a sum of 2 D + 1 numbers.

    In training mode forward() is collective.
    """

    def __init__(self, feature_dim, world, momentum=0.1, eps=1e-5):
        super().__init__()
        self._group, self._momentum, self._eps = world.all_ranks, momentum, eps
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("variance", torch.ones(feature_dim))

    def forward(self, features):
        if not self.training:
            return (features - self.mean) / (self.variance + self._eps).sqrt()
        x = features.double()  # E[x²] - E[x]² loses too many digits in float32
        count = x.new_tensor([len(x)])
        sums = sum_over(torch.cat([count, x.sum(0), x.square().sum(0)]), self._group)
        mean, square = (sums[1:] / sums[0]).chunk(2)
        variance = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.mean.lerp_(mean.to(self.mean), self._momentum)
            self.variance.lerp_(variance.to(self.variance), self._momentum)
        return ((x - mean) / (variance + self._eps).sqrt()).to(features)


def _mlp(dim, feature_dim):
    """A perceptron with one hidden layer: vectors (B, dim) -> features (B, D)."""
    hidden = 2 * feature_dim
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, feature_dim))


class SmallConvNet(nn.Module):
    """Four convolutions for small images: (B, channels, size, size) -> (B, D).

    It takes about 1 ms per grey image of 32 x 32 pixels and core. Group norm makes the result independent of how a
    batch is split over ranks.
    """

    def __init__(self, channels, feature_dim, widths=(16, 32, 64, 128)):
        super().__init__()
        layers, previous = [], channels
        for width in widths:
            layers += [nn.Conv2d(previous, width, 3, padding=1, bias=False), nn.GroupNorm(8, width),
                       nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            previous = width
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.project = nn.Linear(4 * previous, feature_dim)

    def forward(self, images):
        return self.project(self.pool(self.layers(images)).flatten(1))


class Backbone(nn.Sequential):
    """A network, computed in 16 bits where `dtype` is given, followed by the norm of its features."""

    def __init__(self, net, norm, dtype=None):
        super().__init__(net, norm)
        self._dtype = dtype

    def forward(self, inputs):
        net, norm = self
        if self._dtype is None:
            return norm(net(inputs))
        with torch.autocast(inputs.device.type, self._dtype):
            features = net(inputs)
        return norm(features.float())

    def renamed(self, tensors):
        """{name: tensor} of a checkpoint with the names of now: ResNets had others before the published ones."""
        if not (isinstance(self[0], ResNet) and any(name.startswith("0.layers.") for name in tensors)):
            return tensors
        names = {f"0.{old}": f"0.{new}" for old, new in self[0].old_names().items()}
        split = {name: name.rsplit(".", 1) for name in tensors}
        return {f"{names[of]}.{leaf}" if of in names else name: tensors[name] for name, (of, leaf) in split.items()}


_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolved(name, images):
    """The name of the network that auto stands for, with images or with vectors; another name stays."""
    return ("small" if images else "mlp") if name == "auto" else name


def build(name, input_shape, feature_dim, seed, world, amp="off", examples_of_rank=2, freeze=0):
    """The Backbone of that name, with the same weights on every rank for the same seed.

    input_shape       (channels, size, size) or (dim,), of one example
    amp               off, bf16 or fp16; parameters stay float32, activations are in 16 bits
    examples_of_rank  fewest examples that a rank has of a micro-batch
    freeze            stages of a ResNet, from the input on, that are not trained

    UserError where the name is not known or the network does not take such examples, or so few of them.
    """
    images = len(input_shape) == 3
    name = resolved(name, images)
    if name not in ("mlp", "small", *RESNETS) and not name.startswith("timm:"):
        raise UserError(f"--backbone {name} is not known: auto, mlp, small, {', '.join(RESNETS)} or timm:NAME")
    if images == (name == "mlp"):
        takes, given = ("vectors", "images") if images else ("images", "vectors")
        raise UserError(f"--backbone {name} takes {takes}, but the data are {given}: leave it out, auto finds one")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            net = _mlp(*input_shape, feature_dim)
        elif name == "small":
            net = SmallConvNet(input_shape[0], feature_dim)
        elif name in RESNETS:
            net = ResNet(*RESNETS[name], *input_shape[:2], feature_dim)
        else:
            net = _from_timm(name.removeprefix("timm:"), *input_shape[:2], feature_dim)
    if freeze:
        _freeze(net, name, freeze)
    try:
        fewest = _fewest_values(net, input_shape)
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as e:  # timm's models raise any of them
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"--backbone {name} cannot take --image-size {input_shape[-1]} ({reason}): take larger images "
                        "or another network") from e
    if fewest * examples_of_rank < 2:
        raise UserError(f"--backbone {name} has batch norm, which needs two values of a channel: a micro-batch has one "
                        f"example on a rank, and at --image-size {input_shape[-1]} one value remains of it. Take a "
                        "larger --global-batch, fewer --micro-batches, larger images or --backbone small")
    return Backbone(net.train(), FeatureNorm(feature_dim, world), _DTYPES[amp]).to(world.device)


def _freeze(net, name, num_stages):
    """Freeze the first stages of a network. UserError where it has no such stages."""
    if not isinstance(net, ResNet):
        raise UserError(f"--freeze {num_stages} counts the stages of a ResNet, which --backbone {name} is not: take "
                        f"one of {', '.join(RESNETS)}, or leave --freeze out")
    if num_stages > len(net.stages):
        raise UserError(f"--freeze {num_stages} is more than the {len(net.stages)} stages of --backbone {name}, which "
                        f"are the stem and layer1 to layer{len(net.stages) - 1}: take at most {len(net.stages)}")
    net.freeze(num_stages)


@torch.no_grad()
def _fewest_values(net, input_shape):
    """Fewest values of a channel of one example that a trained batch norm has statistics of; inf without one."""
    fewest, hooks = [math.inf], []

    def look(module, inputs):
        fewest.append(inputs[0].numel() // inputs[0].shape[1])

    for module in net.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:  # frozen ones keep their statistics
            hooks.append(module.register_forward_pre_hook(look))
    net.eval()(torch.zeros(1, *input_shape))
    for hook in hooks:
        hook.remove()
    return min(fewest)


def _from_timm(name, channels, image_size, feature_dim):
    """A network of the package timm; UserError where there is none."""
    try:
        import timm
    except Exception as e:  # a torchvision that does not fit torch raises RuntimeError, not ImportError
        raise UserError(f"--backbone timm:{name} needs timm, which does not import here ({e}): pip install timm "
                        "beside a torchvision that fits torch, or take --backbone resnet50") from e
    if name.partition(".")[0] not in timm.list_models():  # a tag of weights may follow
        raise UserError(f"--backbone timm:{name} is not a model of timm {timm.__version__}: see timm.list_models()")
    keywords, random = {"in_chans": channels, "num_classes": feature_dim}, torch.random.get_rng_state()
    try:
        return timm.create_model(name, img_size=image_size, **keywords)
    except TypeError:  # most networks take images of any size, and no img_size
        torch.random.set_rng_state(random)
        return timm.create_model(name, **keywords)
    except (RuntimeError, AssertionError, ValueError) as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"--backbone timm:{name} cannot take --image-size {image_size} ({reason}): take another size "
                        "or another network") from e

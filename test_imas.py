"""Tests of imas.py and data/: formulas against loops, runs against a second way.

    IMAS_KILLS=10 pytest test_imas.py -k killed        kills each of those runs ten times
"""

import contextlib
import copy
import hashlib
import io
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # sums depend on the number of threads
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all runs here are the CPU's
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "data")]

import numpy as np
from PIL import Image, ImageFilter, ImageOps
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets import Cityscapes
from torchvision.transforms import functional as TF

import demo
import imas
import prepare
import report

PROGRAM = HERE / "imas.py"
NAMES = imas.PRESETS["voc"]["class_names"].split(",")
TINY = dict(dataset="voc", labeled="4", backbone="resnet8", weights="none", width=8, crop=33,
            base_size=50, batch=4, epochs=2, tau=0.07, workers=0, device="cpu")
TRAIN = "ImageSets/Segmentation/train.txt"
VAL = "ImageSets/Segmentation/val.txt"
cases = pytest.mark.parametrize
load_report = imas.load_report
close = partial(torch.testing.assert_close, check_dtype=False)


# ---------- what the tests share

def noise(height, width, seed=0, high=256, bands=(3,)):
    """An image of random colors, or with bands=() a mask of random classes."""
    rng = np.random.default_rng((height, width, seed))
    return Image.fromarray(rng.integers(high, size=(height, width, *bands), dtype=np.uint8))


def write(path, content):
    """An image, bytes or lines as the file `path`, and its folders; None: no such file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.unlink()
    elif isinstance(content, Image.Image):
        content.save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text("\n".join(content), encoding="utf-8")


def files(folder):
    """{path: content} of all files in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}


def draw(root, train=12, masks=6):
    """A tiny dataset in VOC's layout: noise, and palette masks of `masks` images and five more."""
    names = [f"img_{i}" for i in range(train)] + ["val_0", "val_1", "val_2", "a.b c", "städte/x"]
    for i, name in enumerate(names):
        image = noise(20 + 19 * i % 50, 20 + 31 * i % 50, i)
        write(root / f"JPEGImages/{name}.jpg", image)
        if masks <= i < train:
            continue
        mask = Image.new("P", image.size)
        mask.paste(255, (4, 5, 17, 15))
        mask.paste(1 + i % 20, (5, 6, 16, 14))
        write(root / f"SegmentationClass/{name}.png", mask)
    write(root / TRAIN, names[:-5])
    write(root / VAL, names[-5:])
    return root


@pytest.fixture
def voc(tmp_path):
    return draw(tmp_path / "voc")


@pytest.fixture
def out(tmp_path):
    """The folder of a run, which is not there yet."""
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def confident(monkeypatch):
    """A new network is unsure of everything, all hardness 1: make it confident. Only tables."""
    def build(*arguments, real=imas.build_model):
        model = real(*arguments)
        model.decoder[-1].weight.data *= 30
        return model
    monkeypatch.setattr("imas.build_model", build)
    tables = lambda *run: report.write_tables(Path(run[3].settings.out), *run[:3])  # in no time
    monkeypatch.setattr("imas.load_report", lambda: vars(report) | {"write_report": tables})


def settings(root="", **changes):
    return imas.Settings(**imas.PRESETS["voc"] | TINY | changes, root=str(root))


def command(root, out, flags=""):
    """The command line of a tiny run."""
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    return [*argv, f"--root={root}", f"--out={out}", *flags.split()]


def run(root, out, flags=""):
    imas.main(command(root, out, flags))


def fault(capsys, argv, lines=1):
    """The one line with which the program ends, or several."""
    with pytest.raises(SystemExit, match="^2$"):
        imas.main(argv)
    told = capsys.readouterr().err
    assert told.startswith("imas.py: ") and told.count("\n") == lines, told
    return told


def processes(work, world=1, seconds=math.inf):
    """Exit codes of `world` processes that call work(). When one has failed, the others are ended,
    as by torchrun; after so many seconds they and their workers are killed."""
    meet = "file://" + tempfile.mktemp()

    def child(rank):
        imas.RANK = imas.LOCAL_RANK = rank
        imas.WORLD_SIZE = world
        imas.dist.init_process_group = partial(
            imas.dist.init_process_group, init_method=meet, rank=rank, world_size=world)
        work()

    started = [get_context("fork").Process(target=child, args=(rank,)) for rank in range(world)]
    for process in started:
        process.start()
        os.setpgid(process.pid, process.pid)  # with its workers
    end = time.monotonic() + seconds
    while any([process.is_alive() for process in started]):
        time.sleep(0.005)
        failed = any(process.exitcode for process in started)
        if failed or time.monotonic() > end:
            for process in started:
                if process.is_alive():
                    os.killpg(process.pid, signal.SIGTERM if failed else signal.SIGKILL)
    return [process.exitcode for process in started]


def program(*argv, **environment):
    """Exit code and stderr of a program."""
    done = subprocess.run([sys.executable, *argv], env=os.environ | environment, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=100)
    return done.returncode, done.stderr


def table(path):
    """The rows of a CSV file: table(path)["column"]."""
    return np.genfromtxt(path, None, delimiter=",", names=True, encoding="utf-8", ndmin=1)


def learned(out):
    """The networks of a run and its optimizer; its tables but for the times."""
    last = torch.load(out / "last.pt")
    log = re.sub(",[^,]*\n", "\n", (out / "log.csv").read_text())
    tensors = last["student"], last["teacher"], last["optimizer"]["state"]
    return tensors, log + (out / "hardness.csv").read_text()


def same_runs(a, b):
    """Assert that two runs have the same weights, to the bit, and the same rows."""
    close(learned(a)[0], learned(b)[0], rtol=0, atol=0)
    assert learned(a)[1] == learned(b)[1]


def checkpoint(path, root, bias=0.0):
    """An untrained checkpoint, and its network, which finds some background."""
    torch.manual_seed(4)
    model = imas.build_model(settings(root)).eval()
    model.decoder[-1].bias.data += bias
    torch.save({"settings": vars(model.settings), "teacher": model.state_dict()}, path)
    return model


@torch.no_grad()
def label_of(model, path):
    """The most probable classes of an image in a file: shrunk to 50 pixels, softmax, enlarged."""
    image = Image.open(path).convert("RGB")
    x = TF.normalize(TF.to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    shrink = min(50 / max(image.size), 1)
    x = TF.resize(x, [math.ceil(side * shrink) for side in x.shape[1:]])
    return TF.resize(model(x[None]).softmax(1), image.size[::-1])[0].argmax(0).numpy()


# ---------- the formulas of sections 2 to 5

# From here on imas works with functions that know the libraries alone: each can be copied.
for section in re.split("\n# [2-6] -+ .*", PROGRAM.read_text(encoding="utf-8"))[1:5]:
    alone = dict(torch=torch, F=F, np=np, Image=Image, ImageFilter=ImageFilter, ImageOps=ImageOps,
                 TF=TF, get_ema_multi_avg_fn=get_ema_multi_avg_fn)
    exec(section, alone)
    vars(imas).update(alone)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def hardness_by_definition(student, teacher, tau, background):
    """The paper's formula for the pixels of one image, logits [C, pixels], class by class."""
    p_s = student.double().softmax(0).numpy()
    p_t = teacher.double().softmax(0).numpy()
    s = p_s.argmax(0)
    t = p_t.argmax(0)
    agreement = 0
    for p, r in ((p_s, s), (p_t, t)):
        counted = r[r != background]
        for k in set(counted):
            iou = ((s == k) & (t == k)).sum() / ((s == k) | (t == k)).sum()
            agreement += (p.max(0) >= tau).mean() * (counted == k).mean() * iou
    return 1 - agreement / 2


@cases("tau", [0.0, 0.7, 0.999])
@cases("classes, background", [(2, 0), (2, None), (6, 3), (21, 0), (40, None)])
def test_hardness_is_the_papers_formula(classes, background, tau):
    teacher, other = 4 * torch.randn(2, 7, classes, 9, 7, generator=seeded(classes))
    student = teacher + other * torch.arange(7).view(7, 1, 1, 1)  # more and more different
    valid = torch.rand(7, 9, 7, generator=seeded(0)) < 0.6
    gamma = imas.hardness(student, teacher, tau, background, valid)
    for g, s, t, there in zip(gamma, student, teacher, valid):
        expected = hardness_by_definition(s[:, there], t[:, there], tau, background)
        assert g.item() == pytest.approx(expected, abs=1e-6)


@cases("size", [1, 2, 3, 15])
def test_the_kth_hardest_is_paired_with_the_kth_easiest(size):
    gamma = torch.arange(size) * 7 % 5 / 5  # from 6 images on some are equally hard
    order = sorted(range(size), key=lambda i: gamma[i])
    partner = imas.pair_hard_easy(gamma)
    assert partner[order].tolist() == order[::-1]


def test_cutmix_boxes_have_their_definition():
    for seed in range(20):
        boxes = imas.cutmix_boxes(6, 48, 80, seeded(seed))
        draws = seeded(seed)  # the same: size, rows, columns
        v = torch.empty(()).uniform_(0.1, 0.9, generator=draws).item()
        rows = torch.randint(3, 48, (6,), generator=draws)
        columns = torch.randint(5, 80, (6,), generator=draws)
        h = int(v * 48) // 2
        w = int(v * 80) // 2
        for box, y, x in zip(boxes, rows, columns):
            expected = torch.zeros(48, 80, dtype=torch.bool)
            expected[max(y - h, 0):y + h, max(x - w, 0):x + w] = True
            assert torch.equal(box, expected)


@cases("adaptive, chance", [(True, 0.3), (False, 0.5)])
def test_cutmix_is_decided_by_a_coin(adaptive, chance):
    gamma = torch.tensor([0.9, 0.4, 1.0, 0.5])  # mean(1 - gamma) = 0.3
    for seed in range(50):
        partner, box = imas.draw_cutmix(gamma, 16, 20, seeded(seed), adaptive)
        draws = seeded(seed)
        if torch.rand((), generator=draws) >= chance:
            assert partner is box is None
            continue
        expected = torch.tensor([3, 2, 1, 0])  # from easy to hard: 1 3 0 2
        if not adaptive:
            expected = torch.randperm(4, generator=draws)
        close(partner, expected)
        close(box, imas.cutmix_boxes(4, 16, 20, draws))


@cases("threshold, min_kept", [(0.7, 0), (0.2, 10), (0, 25), (0.5, 99)])
def test_ohem_is_the_mean_over_hard_pixels(threshold, min_kept):
    logits = 2 * torch.randn(2, 5, 5, 6, generator=seeded(0))
    target = torch.randint(5, (2, 5, 6), generator=seeded(0))
    losses = F.cross_entropy(logits, target, reduction="none")[:, 2:].ravel().sort().values
    hard = (losses.neg().exp() <= threshold).sum().item()
    target[:, :2] = 255
    loss = imas.ohem_cross_entropy(logits, target, threshold, min_kept)
    close(loss, losses[-max(hard, min_kept):].mean())


def test_ohem_keeps_50000_pixels_of_each_image_of_a_micro_batch(monkeypatch):
    monkeypatch.setattr("imas.ohem_cross_entropy", lambda *_, min_kept: min_kept)
    assert imas.labeled_loss(torch.zeros(3, 2, 1, 1), None, settings(ohem=True)) == 150_000


def test_no_labeled_pixel_is_no_loss():
    assert imas.supervised_loss(torch.rand(1, 3, 2, 2), torch.full((1, 2, 2), 255)) == 0


@cases("step, alpha", [(0, 0.0), (1, 0.5), (9, 0.9), (999_999, 0.996)])
def test_teacher_follows_the_student(step, alpha):
    teacher = torch.nn.BatchNorm2d(3)
    old = copy.deepcopy(teacher.state_dict())
    student = copy.deepcopy(teacher)
    torch.nn.init.normal_(student.weight)
    student(torch.randn(4, 3, 3, 3))  # moves the running statistics, and counts
    imas.update_teacher(teacher, student, step, 0.996)
    for name, new in student.state_dict().items():
        if name != "num_batches_tracked":
            new = alpha * old[name] + (1 - alpha) * new
        close(teacher.state_dict()[name], new, rtol=0, atol=1e-6 if alpha else 0)


def test_weak_augmentation_is_resize_then_crop():
    """Up to Pillow's two roundings, and to a mask's pixels whose centers fall on an edge."""
    image = noise(9, 12).resize((120, 90), Image.BICUBIC)
    mask = noise(9, 12, 0, 5, ()).resize((120, 90), Image.NEAREST)
    for seed in range(30):
        views = imas.weak_augment(image, mask, 33, 130, np.random.default_rng(seed))
        draws = np.random.default_rng(seed)
        factor = draws.uniform(0.5, 2) * 130 / 120
        size = round(120 * factor), round(90 * factor)
        x, y = draws.integers(np.subtract(size, 32)).tolist()
        if draws.random() < 0.5:
            views = map(ImageOps.mirror, views)
        whole = image.resize(size, Image.BILINEAR), mask.resize(size, Image.NEAREST)
        for view, expected, tolerance in zip(views, whole, (1, 0)):
            expected = expected.crop((x, y, x + 33, y + 33))
            error = np.abs(np.asarray(view, int) - expected)
            assert (error > tolerance).mean() < 0.05


# ---------- one training step, and the network

def first_step(cfg):
    """A student, a teacher that differs a little, and the first batch."""
    torch.manual_seed(0)
    student = imas.build_model(cfg)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    for p in teacher.parameters():
        p += 0.01 * torch.randn(p.shape)
    batch = {}
    for dataset in imas.load_datasets(cfg)[:2]:
        batch |= next(iter(imas.make_loader(dataset, 0, 1, 4)))
    return student, teacher, batch


@cases("changes, seed, fires", [
    ({}, 0, True), ({}, 1, False), ({"adapt": "intensity"}, 0, True),
    ({"adapt": "cutmix,loss"}, 0, True), ({"method": "uniform"}, 0, True),
    ({"ohem": True, "aux_weight": 0.4}, 1, False)])
def test_step_is_algorithm_1(changes, seed, fires, voc):
    """Losses, metrics and gradients, by the algorithm written again, pixel by pixel."""
    cfg = settings(voc, base_size=27, **changes)
    student, teacher, batch = first_step(cfg)
    again = copy.deepcopy(student)
    loss, metrics, _ = imas.micro_batch_loss(student, teacher, batch, seeded(seed), cfg)
    loss.backward()

    image, weak, strong = (imas.normalize(batch[name]) for name in ("image", "weak", "strong"))
    valid = batch["valid"]
    p_t = teacher(weak).softmax(1)
    gamma = imas.hardness(again.eval()(weak), p_t.log(), cfg.tau, 0, valid).detach()
    assert 0.1 < gamma.min() < gamma.max() < 0.9
    if "intensity" in cfg.adapt:
        g = gamma.view(4, 1, 1, 1)
        strong = (1 - g) * strong + g * weak
    views = [image, weak, strong]
    truth = [(*p_t.max(1), valid)]
    partner, box = imas.draw_cutmix(gamma, 33, 33, seeded(seed), "cutmix" in cfg.adapt)
    assert (box is not None) == fires
    if fires:
        views.append(torch.where(box[:, None], weak[partner], weak))
        truth.append([torch.where(box, x[partner], x) for x in truth[0]])

    output = again.train()(torch.cat(views))
    logits, aux = output if cfg.aux_weight else (output, output)
    cross_entropy = partial(F.cross_entropy, target=batch["label"].long(), ignore_index=255)
    loss_x = cross_entropy(logits[:4]) + cfg.aux_weight * cross_entropy(aux[:4])  # OHEM keeps all
    loss_u = 0
    weight = 1 - gamma * ("loss" in cfg.adapt)
    for of_view, (confidence, pseudo_label, there) in zip(logits.split(4)[2:], truth):
        pixels = F.cross_entropy(of_view, pseudo_label, reduction="none")
        pixels[~there | (confidence < cfg.tau)] = 0
        loss_u = loss_u + (weight * pixels.mean((1, 2))).mean() / len(truth)
    (loss_x + cfg.lambda_u * loss_u).backward()
    confident = (truth[0][0][valid] >= cfg.tau).float().mean()
    close(metrics, torch.stack([loss_x, loss_u, gamma.mean(), confident, torch.tensor(fires)]))
    largest = max(q.grad.abs().max() for q in again.parameters()).item()
    for p, q in zip(student.parameters(), again.parameters()):
        close(p.grad, q.grad, rtol=0, atol=1e-5 * largest)


@cases("backbone, stride, dilations", [
    ("resnet8", 16, "6 12 18"), ("resnet8", 8, "12 24 36"),
    ("resnet18", 16, "2 2 4 4 6 12 18"), ("resnet50", 16, "2 4 8 6 12 18"),
    ("resnet50", 8, "2 2 2 2 2 4 8 16 12 24 36"), ("resnet101", 16, "2 4 8 6 12 18"),
    ("resnet101", 8, "2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 4 8 16 12 24 36")])
def test_network_has_its_strides_and_dilations(backbone, stride, dilations):
    net = imas.DeepLabV3Plus(5, backbone, None, stride, width=16, aux=True)
    for result in net(torch.randn(2, 3, 33, 50)):  # and that of the auxiliary head
        assert result.shape == (2, 5, 33, 50)
    assert "Dropout" not in str(net)
    deepest = torch.nn.Sequential(*net.backbone.children())(torch.randn(1, 3, 64, 96))
    assert deepest.shape[2:] == (64 // stride, 96 // stride)
    assert re.findall(r"dilation=\((\d+)", str(net)) == dilations.split()


# ---------- data

def test_epoch_shows_unlabeled_images_once_and_labeled_ones_evenly(voc):
    labeled, unlabeled, *_ = imas.load_datasets(settings(voc))
    (batch,) = imas.make_loader(unlabeled, 1, 1, 8)
    assert sorted(batch["index"]) == [*range(8)]
    labeled.set_epoch(0, 42)
    assert {*np.bincount(labeled.order[:42])} == {10, 11}


def test_images_are_augmented_then_padded(voc):
    """Every draw follows from (seed, epoch, kind, position)."""
    dataset = imas.SegmentationDataset(["img_0"], "unlabeled", settings(voc, seed=5, crop=120))
    dataset.set_epoch(3, 9)
    item = dataset[7]
    rng = np.random.default_rng((5, 3, 2, 7))
    image = Image.open(voc / "JPEGImages/img_0.jpg")
    weak, _ = imas.weak_augment(image, image, 120, 50, rng)
    for name, view in (("weak", weak), ("strong", imas.strong_augment(weak, rng))):
        padded = Image.new("RGB", (120, 120), (124, 116, 104))
        padded.paste(view)
        close(item[name], TF.pil_to_tensor(padded))
    assert item["valid"][:weak.height, :weak.width].all()
    assert item["valid"].sum() == weak.width * weak.height
    dataset.kind = "labeled"
    assert (dataset[7]["label"][-1] == 255).all()


@cases("name", "L.png LA.png P.png CMYK.jpg 1.bmp RGBA.tiff RGB.webp RGB.PNG".split())
def test_images_of_all_kinds(name, tmp_path):
    image = noise(8, 12).convert(name.split(".")[0])
    image.save(tmp_path / name, quality=100, subsampling=0, lossless=True)
    error = np.asarray(imas.read_image(tmp_path / name), int) - image.convert("RGB")
    assert np.abs(error).mean() <= (2 if "jpg" in name else 0)


@cases("mode, kind", [("P", "u1"), ("L", "u1"), ("1", "?"), ("I;16", "u2"), ("I", "i4")])
def test_masks_of_all_kinds_hold_classes(mode, kind, tmp_path):
    labels = np.eye(9, 7, dtype=int) * (1 if mode == "1" else 20)
    mask = Image.fromarray(labels.astype(kind))
    if mode == "P":
        mask.putpalette(np.random.default_rng(1).bytes(768))
    mask.save(tmp_path / "x.png", "TIFF" if mode == "I" else "PNG")
    assert np.array_equal(imas.read_mask(tmp_path / "x.png", 21), labels)


@cases("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@cases("line", ["{}", "./{}", "  {}.png ", "/JPEGImages/{0}.jpg /SegmentationClass/{0}.png",
                "JPEGImages/{0}.JPG\tSegmentationClass/{0}.PNG"])
def test_lists_hold_ids_or_paths(line, encoding, tmp_path):
    ids = ["cat and dog.v2", "städte/x", "2007_1"]
    lines = "\r\n".join(map(line.format, ids)) + "\r\n\r\n"
    write(tmp_path / "list", lines.encode(encoding))
    assert imas.read_ids(tmp_path / "list") == ids


def test_labels_are_drawn_with_the_seed_among_those_that_have_a_mask(voc):
    ids = [imas.load_datasets(settings(voc, seed=seed))[0].ids for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    assert {*ids[0], *ids[2]} <= {f"img_{i}" for i in range(6)}


# ---------- evaluation and prediction

def test_scores_are_those_of_a_loop_in_1_and_2_processes(voc, capfd):
    model = checkpoint(voc / "x.pt", voc)
    pixels = []  # (class, predicted class) of each
    for id in imas.read_ids(voc / VAL):
        truth = np.asarray(Image.open(voc / f"SegmentationClass/{id}.png"))
        label = label_of(model, voc / f"JPEGImages/{id}.jpg")
        pixels += zip(truth[truth < 255], label[truth < 255])
    truth, label = np.transpose(pixels)
    told = ""
    scores = []
    for k, name in enumerate(NAMES):
        either = (truth == k) | (label == k)
        scores.append(100 * (truth == label)[either].mean() if either.any() else np.nan)
        told += f"{scores[k]:6.2f}  {name}\n"
    told += f"{np.nanmean(scores):6.2f}  mIoU\n"
    assert scores[0] > 10
    for world in (1, 2):
        assert processes(lambda: imas.main([f"--eval={voc}/x.pt"]), world) == [0] * world
        printed = capfd.readouterr()  # some versions of gloo say hello first
        assert printed.out.endswith(told) and not printed.err


def test_predicted_masks_are_the_networks(voc, out, capsys):
    """A broken image is named, and the others are labeled; notes are passed over."""
    model = checkpoint(voc / "x.pt", voc)
    write(voc / "mine/grey.png", noise(20, 30).convert("L"))
    write(voc / "mine/long.webp", noise(40, 300))
    write(voc / "mine/broken.png", b"no image")
    write(voc / "mine/notes.txt", b"")
    flags = f"--checkpoint {voc}/x.pt --predict {voc}/mine {voc}/JPEGImages/img_0.jpg"
    told = fault(capsys, command(voc, out, flags), lines=2)
    assert "broken.png" in told and "1 images have no mask" in told
    assert len(files(out)) == 6
    for path in ("mine/grey.png", "mine/long.webp", "JPEGImages/img_0.jpg"):
        mask = Image.open(out / Path(path).with_suffix(".png").name)
        assert mask.mode == "P" and np.array_equal(mask, label_of(model, voc / path))


# ---------- runs

def of_two_micro_batches_and_processes(voc, tmp_path, flags):
    """The folders of a run with --accumulate 2, and of the same run by two processes."""
    for world in (1, 2):
        out = tmp_path / str(world)
        more = f"{flags} --batch 8 --epochs 1 --accumulate {2 // world}"
        assert processes(lambda: run(voc, out, more), world) == [0] * world
        yield out


def test_two_processes_do_what_two_micro_batches_do(voc, tmp_path, monkeypatch):
    """Gradients, which the momentum is after one step, to 1e-5; hardness to the bit, if the
    running statistics stay 0 and 1."""
    def build(*arguments, real=imas.build_model):
        model = real(*arguments)
        for module in model.modules():
            module.momentum = 0
        return model
    monkeypatch.setattr("imas.build_model", build)
    runs = []
    for out in of_two_micro_batches_and_processes(voc, tmp_path, "--weight-decay 0"):
        state = torch.load(out / "last.pt")["optimizer"]["state"].values()
        runs.append([x["momentum_buffer"] for x in state] + [*table(out / "log.csv")[0]][3:-1])
    close(runs[0], runs[1], rtol=1e-5, atol=1e-5)
    assert (tmp_path / "1/hardness.csv").read_text() == (tmp_path / "2/hardness.csv").read_text()


@cases("flags, unmeasured", [
    ("--adapt none --workers 1", 0), ("--method supervised", 2),
    ("--warmup-epochs 1 --accumulate 2", 1), ("--adapt cutmix,loss --background none", 0),
    ("--ohem --aux-weight 0.4 --sliding --eval-every 2", 0)])
def test_tables_hold_what_was_measured(flags, unmeasured, voc, out):
    run(voc, out, flags)
    log = table(out / "log.csv")
    hard = table(out / "hardness.csv")
    close(log["lr"], 0.001 * np.array([0.75, 0.25])**0.9, rtol=1e-5, atol=0)
    assert np.isnan(log["miou"]).tolist() == ["every" in flags, False]
    assert len(hard) == 8 * (2 - unmeasured)
    for row in log[unmeasured:]:
        gammas = hard["hardness"][hard["epoch"] == row["epoch"]]
        assert row["hardness"] == pytest.approx(gammas.mean(), abs=1e-5)
    for name in imas.METRICS[1:]:
        assert np.isnan(log[name]).sum() == unmeasured


def test_schedule_of_a_run(voc, out, monkeypatch, capsys):
    """Warm-up, the first epoch with unlabeled images, and one of a teacher of its own."""
    for name in ("micro_batch_loss", "update_teacher"):
        monkeypatch.setattr(imas, name, mock.Mock(side_effect=getattr(imas, name)))
    monkeypatch.setattr("imas.evaluate", mock.Mock(side_effect=torch.tensor([[30.0], [20.0]])))
    run(voc, out, "--epochs 3 --warmup-epochs 1 --eval-every 2")
    batches = [call.args[2] for call in imas.micro_batch_loss.call_args_list]
    seen = [(len(batch["image"]), "weak" in batch) for batch in batches]
    assert seen == [(8, False)] * 2 + [(4, True)] * 4
    steps = [call.args[2] for call in imas.update_teacher.call_args_list]
    assert steps == [0, 0, 0, 0, 2, 3]
    assert "best mIoU is 30.00" in capsys.readouterr().out
    best, last = (torch.load(out / name)["teacher"] for name in ("best.pt", "last.pt"))
    assert not torch.equal(best["decoder.2.bias"], last["decoder.2.bias"])


@cases("world", [1, 2])
def test_run_killed_and_resumed_is_never_killed(world, tmp_path, out):
    root = draw(tmp_path / "voc", 40, 8)
    kills = int(os.environ.get("IMAS_KILLS", 4))
    dice = np.random.default_rng(world)

    def codes(name, workers=0, seconds=math.inf):
        flags = f"--labeled 8 --warmup-epochs 1 --resume --epochs {kills + 2} --workers {workers}"
        return processes(lambda: run(root, out / name, flags), world, seconds)

    begun = time.monotonic()
    assert codes("straight") == [0] * world
    epoch = (time.monotonic() - begun) / (kills + 2)
    killed = 0
    for i in range(kills):
        killed += codes("killed", i % 2 * 2, dice.uniform(0.2, 2.5) * epoch) != [0] * world
    assert killed >= 0.75 * kills  # the last may come too late
    assert codes("killed") == [0] * world
    same_runs(out / "straight", out / "killed")


SAYS = """
--labeled 4                      | 4 labeled images (drawn with the seed), 8 unlabeled, 5 for val
--labeled {voc}/mine.txt         | 3 labeled images (listed), 9 unlabeled
--labeled 3                      | 3 labeled images | 2 unlabeled, 5 for validation; 1 steps
--method supervised --labeled 12 | 12 labeled images | 0 unlabeled | 3 steps an epoch
--warmup-epochs 2                | no unlabeled image is used
--help                           | side of a training image, in pixels (default: 513)
--dataset camvid --help          | side of a training image, in pixels (default: 128)
--method magic                   | argument --method: invalid choice: 'magic'
--min-scale 3                    | unrecognized arguments: --min-scale 3
--resume --eval x                | argument --eval: not allowed with argument --resume
--lr x                           | argument --lr: invalid float value: 'x'
"""


@cases("row", SAYS.strip().splitlines())
def test_program_says(row, tmp_path, out, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    root = draw(tmp_path / "voc", masks=12)
    for name in ("mine.txt", "splits/3/labeled.txt"):
        write(root / name, ["img_0", "img_1", "img_2"])
    write(root / "splits/3/unlabeled.txt", ["img_3", "img_4"])
    flags, *words = map(str.strip, row.format(voc=root).split("|"))
    with contextlib.suppress(SystemExit):
        run(root, out, flags + " --batch 2")
    told = "".join(capsys.readouterr())
    assert all(word in told for word in words), told


# ---------- errors

def test_full_disk_leaves_the_checkpoint_before(voc, out, capsys, monkeypatch):
    def replace(source, target, real=os.replace):
        if Path(target).name == "last.pt" and Path(target).exists():
            raise OSError(28, "No space left on device")
        real(source, target)
    monkeypatch.setattr("os.replace", replace)
    told = fault(capsys, command(voc, out))
    assert "make room" in told and "--resume" in told and "No space left on device" in told
    assert torch.load(out / "last.pt")["schedule"]["last_epoch"] == 2


@cases("error, code, words", [
    (torch.OutOfMemoryError(), 2, "imas.py: out of memory: raise --accumulate"),
    (MemoryError(), 2, "imas.py: out of memory: raise --accumulate"),
    (RuntimeError("boom"), 1, "RuntimeError: boom"),
    (imas.UserError("no image"), 2, "imas.py: no image\n")])
def test_error_of_one_process_is_told_once(error, code, words, voc, out, capfd, monkeypatch):
    def loss(*arguments, real=imas.micro_batch_loss):
        if imas.RANK == 0:
            raise error
        return real(*arguments)
    monkeypatch.setattr("imas.micro_batch_loss", loss)
    assert processes(lambda: run(voc, out), 2) == [code, -signal.SIGTERM]
    told = capfd.readouterr().err
    assert words in told and told.count("imas.py: ") == 1
    assert ("Traceback" in told) == (code == 1)


@cases("flags", ["--labeled 99", "--checkpoint {voc}/x.pt --predict {voc}"])
def test_error_of_all_processes_is_told_once(flags, voc, out, capfd):
    checkpoint(voc / "x.pt", voc)
    work = partial(run, voc, out, flags.format(voc=voc))
    assert processes(work, 2) == [2, -signal.SIGTERM]
    assert capfd.readouterr().err.count("\n") == 1


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", PROGRAM)


def test_torchrun_trains_to_the_end_and_draws(voc, out):
    assert program(*TORCHRUN, *command(voc, out, "--workers 1")) == (0, "")
    assert len(table(out / "hardness.csv")) == 16
    assert {"curves.png", "samples.png", "unlabeled.png"} < files(out).keys()


@cases("position", [0, 2])
def test_torchrun_tells_of_a_broken_image_of_either_process_once(position, voc, out):
    _, unlabeled, *_ = imas.load_datasets(settings(voc))
    unlabeled.set_epoch(0, 8)
    broken = unlabeled.images[unlabeled.ids[unlabeled.order[position]]]
    write(broken, b"no image")
    code, told = program(*TORCHRUN, *command(voc, out))
    assert code == 1 and told.count("imas.py: ") == 1, told
    assert f"imas.py: cannot read {broken}" in told


def test_ctrl_c_ends_at_once_and_leaves_whole_files(voc, out):
    argv = command(voc, out, "--epochs 999")
    process = subprocess.Popen([sys.executable, PROGRAM, *argv], stderr=subprocess.PIPE)
    while not (out / "last.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=5) == (None, b"")
    assert process.returncode == -signal.SIGINT
    assert torch.load(out / "last.pt")["teacher"]


# ---------- mistakes of the user's

CONTENTS = {
    "gone": None,
    "an image": noise(9, 9),
    "9 x 9": noise(9, 9, 0, 2, ()),
    "class 21": noise(20, 20, 0, 22, ()),
    "0 and 255": noise(20, 20, 0, 2, ()).point(lambda k: 255 * k),
    "no lines": b"\n\n",
    "binary": b"\xff\xfe\x00",
    "img_3": b"./img_3",
}
MISTAKES = """
| | --root {voc}/nowhere | nowhere | data/prepare.py
| | --dataset nowhere --num-classes 0 | --num-classes | voc
JPEGImages/img_1.jpg | gone | | no image | img_1
JPEGImages/img_1.png | an image | | two images of one name | img_1
JPEGImages/img_7.jpg | binary | | cannot read | img_7.jpg | replace it
SegmentationClass/val_1.png | gone | | val_1.png | replace it
SegmentationClass/img_0.png | 9 x 9 | --labeled 6 | img_0.jpg | img_0.png | size
SegmentationClass/img_0.png | class 21 | --labeled 6 | img_0.png | --num-classes 21
SegmentationClass/img_0.png | an image | --labeled 6 | img_0.png | several bands | prepare.py own
SegmentationClass/img_0.png | 0 and 255 | --labeled 6 --num-classes 2 --class-names a,b | 255 | own
| | --labeled= | --labeled is missing
| | --labeled 7 | --labeled 7 | from 1 to 6
| | --labeled -1 | --labeled -1 | from 1 to 6
| | --labeled 6 --batch 8 | 6 unlabeled | --batch
mine.txt | no lines | --labeled {voc}/mine.txt | mine.txt | empty
mine.txt | binary | --labeled {voc}/mine.txt | mine.txt | UTF-8
ImageSets/Segmentation/val.txt | img_3 | | val.txt | img_3
| | --weights imagenet --backbone resnet18 | resnet18 | --weights none
| | --accumulate 4 | --batch | 4 micro-batches | 2 images or more
| | --background 21 | --background
| | --class-names a,b | --class-names
| | --num-classes 1 | --num-classes
| | --tau 1.1 | --tau
| | --crop 32 | --crop
| | --epochs 0 | --epochs
| | --workers -1 | --workers
| | --width 0 | --width
| | --ema-decay 2 | --ema-decay
| | --lr -1 | --lr
| | --lambda-u nan | --lambda-u
| | --method uniform --adapt loss | --adapt
| | --device cuda | no cuda | --device cpu
| | --lr 1e8 | not finite | lower --lr
| | --backbone vgg16 | vgg16
| | --base-size 9999999999 | --base-size 9999999999
| | --out {voc} | {voc} | --out
last.pt | gone | --out {voc} | {voc} | --out
| | --out {voc}/last.pt/run | last.pt/run | --out
| | --out /proc/run | /proc/run | --out
| | --resume --out {run} --accumulate 2 | {run} | accumulate
| | --resume --out {run} --lr 0.1 --seed 1 | {run} | lr | seed
ImageSets/Segmentation/val.txt | gone | --resume --out {run} | val.txt
../run/last.pt | binary | --resume --out {run} | last.pt is no good checkpoint
| | --eval {voc}/last.pt --width 16 | last.pt does not fit | flags
last.pt | binary | --eval {voc}/last.pt | last.pt is no good checkpoint
| | --eval {voc}/nan.pt | nan.pt | not finite
| | --eval= | no good checkpoint
| | --predict {voc}/JPEGImages {voc}/JPEGImages/img_0.jpg --checkpoint {voc}/last.pt | two images
| | --predict {voc}/JPEGImages --checkpoint {voc}/last.pt --out {voc} | {voc} | --out
| | --predict {voc}/typo.jpg --checkpoint {voc}/last.pt | typo.jpg | --predict
| | --predict {voc}/JPEGImages --checkpoint {voc}/last.pt --out= | --predict needs --out
| | --resume --out {voc} | last.pt | seed
"""


@cases("row", MISTAKES.strip().splitlines())
def test_mistake_is_one_line_and_nothing_is_overwritten(row, voc, out, capsys, monkeypatch):
    monkeypatch.setattr("torch.hub.download_url_to_file", open)  # no network: an error
    monkeypatch.setenv("TORCH_HOME", str(out / "none"))
    checkpoint(voc / "last.pt", voc)
    checkpoint(voc / "nan.pt", voc, math.nan)
    if "--resume" in row:
        run(voc, out)
    file, content, flags, *words = map(str.strip, row.format(voc=voc, run=out).split("|"))
    if content:
        write(voc / file, CONTENTS[content])
    before = files(voc.parent)
    told = fault(capsys, command(voc, out.with_name("new"), flags))
    assert all(word in told for word in words), told
    after = files(voc.parent)
    assert before.items() <= after.items() and "new/last.pt" not in after


# ---------- what only a GPU would show


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_step_on_a_gpu_that_is_not_there(monkeypatch):
    """Fake tensors have no value to read: what is copied back, and in which dtype is convolved."""
    gpu = torch.device("cuda:0")
    copied_back = []
    convolved = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if "_to_copy" in str(function) and args[0].is_cuda and not result.is_cuda:
                copied_back.append(len(result))
            if "convolution" in str(function):
                convolved.add(result.dtype)
            return result

    coin = mock.MagicMock(__ge__=lambda coin, probability: False)
    monkeypatch.setattr("torch.rand", lambda *shape, **how: coin)
    box = torch.ones(4, 33, 33, dtype=torch.bool)
    monkeypatch.setitem(imas.draw_cutmix.__globals__, "cutmix_boxes", lambda *size: box)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **how: True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    cfg = settings(ohem=True, aux_weight=0.4)
    with FakeTensorMode(allow_non_fake_inputs=True), Watch():
        with gpu:
            student = imas.build_model(cfg)
            teacher = imas.build_model(cfg).eval().requires_grad_(False)
            image = torch.zeros(4, 3, 33, 33, dtype=torch.uint8)
        label = image[:, 0]
        batch = dict(image=image, label=label, weak=image, strong=image, valid=label == 0)
        loss, *_ = imas.micro_batch_loss(student, teacher, batch, None, cfg)
        assert copied_back == [4]  # the hardness, for CutMix
        assert convolved == {torch.bfloat16} and loss.dtype == torch.float32


@cases("height, width, windows", [
    (33, 33, 1), (34, 33, 2), (55, 90, 8), (20, 100, 5), (7, 9, 1)])
def test_sliding_windows_see_what_the_whole_image_shows(height, width, windows):
    """The network looks at one pixel at a time, so windows must not show."""
    net = torch.nn.Conv2d(3, 21, 1)
    net.settings = settings(base_size=0)
    image = TF.pil_to_tensor(noise(height, width))[None]
    whole = imas.predict(net, image)
    sizes = []
    net.register_forward_pre_hook(lambda net, inputs: sizes.append(inputs[0].shape[2:]))
    net.settings.sliding = True
    close(whole, imas.predict(net, image))
    assert sizes == [(min(height, 33), min(width, 33))] * windows  # full ones alone


def test_statistics_move_as_far_in_two_micro_batches_as_in_two_processes(voc, tmp_path):
    """From 0 on, with m = 0.1: micro-batches move by m/2, processes by m and are averaged."""
    labeled, *_ = imas.load_datasets(settings(voc))
    (batch,) = imas.make_loader(labeled, 0, 1, 16)
    runs = of_two_micro_batches_and_processes(voc, tmp_path, "--warmup-epochs 1 --lr 0")
    for out, first in zip(runs, (0.95 * 0.05, 0.05)):
        net = imas.load(out / "best.pt").backbone
        a, b = net.conv1(imas.normalize(batch["image"])).mean((2, 3)).detach().split(8)
        close(net.bn1.running_mean, first * a.mean(0) + 0.05 * b.mean(0), rtol=1e-4, atol=1e-6)


def test_folder_of_a_run_is_named_by_what_it_does():
    assert settings(labeled="my/list.txt", adapt="cutmix").out == "runs/voc-my-list-cutmix-0"
    assert settings(method="uniform", adapt="none").out == "runs/voc-4-uniform-0"


def test_finished_run_resumed_is_done(voc, out, capsys):
    run(voc, out)
    before = files(out)
    run(voc, out, "--resume")
    assert files(out) == before
    assert capsys.readouterr().out.count("done: ") == 2


def test_taken_port_is_told(voc, out):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, told = program(PROGRAM, *command(voc, out), RANK="0", WORLD_SIZE="2",
                             MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert code == 2 and "another --master-port" in told and "--device" not in told


# ---------- pictures

def test_run_without_matplotlib_says_so_in_one_line(voc, out, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("imas.load_report", load_report)
    run(voc, out)
    assert capsys.readouterr().out.count("pip install matplotlib") == 1


def test_picture_shows_what_the_student_saw(voc):
    """From easy to hard: three views, the pasted box, and pseudo-labels pale under tau."""
    cfg = settings(voc)
    *_, seen = imas.micro_batch_loss(*first_step(cfg), seeded(0), cfg)
    figure = report.draw_unlabeled(seen, cfg.tau, NAMES)
    for k, i in enumerate(seen["gamma"].argsort()):
        axes = figure.axes[4 * k:]
        for name, axis in zip(("weak", "intensity", "cutmix", "pseudo-label"), axes):
            assert name in axis.get_title().lower()
        for x, y in axes[2].collections[0].get_paths()[0].vertices:  # between pasted and not
            sides = seen["box"][i, [math.floor(y), math.ceil(y)], [math.floor(x), math.ceil(x)]]
            assert sides[0] != sides[1]
        opaque = axes[3].images[0].get_array()[..., 3] == 255
        used = (seen["confidence"][i] >= cfg.tau) & seen["valid"][i]
        assert np.array_equal(opaque, used)


def test_curves_are_the_log_and_have_labels():
    log = np.random.default_rng(0).random((5, len(imas.COLUMNS)))
    figure = report.draw_curves(log, [torch.arange(9.0)] * 5)
    for axis, name in zip(figure.axes, ("miou", "loss_x", "loss_u", "hardness", "confident")):
        assert axis.get_xlabel() == "epoch" and axis.get_ylabel()
        close(axis.lines[0].get_ydata(), log[:, imas.COLUMNS.index(name)])


# ---------- data/prepare.py and data/demo.py

LISTS = "ImageSets/Segmentation/"


def picture(array):
    return Image.fromarray(np.asarray(array, np.uint8))


def labels_of(i, classes=2):
    """A mask of 36x40 pixels: slanting stripes of classes 0, 1, ..."""
    return np.add.outer(np.arange(36), np.arange(i, i + 40)) // 20 % classes


def fill(source, values=(0, 1), store=picture, image="images/p{}.png", mask="masks/p{}.png",
         masks=8, files={}):
    """Ten pictures and some masks, in which `values` (or colours) stand for classes 0, 1, ..."""
    for i in range(10):
        write(source / image.format(i), noise(36, 40, i))
        if i < masks:
            labels = labels_of(i, len(values))
            write(source / mask.format(i), store(np.array(values)[labels]))
    for name, content in files.items():
        write(source / name, content)


def own(source, *flags):
    """Take a folder over; the new one lies beside it. The exit code where that fails."""
    root = source.with_name("taken")
    return prepare.main(["own", str(source), "--root", str(root), *flags]) or root


def stored(root):
    """{name: classes} of the masks that training would read."""
    paths = root.glob("SegmentationClass/**/*.png")
    return {path.stem: np.asarray(Image.open(path)) for path in paths}


def means(root, values):
    """Whether the masks that `fill` wrote are there, with these values for 0, 1, ..."""
    found = stored(root)
    truth = [np.array(values)[labels_of(i, len(values))] for i in range(8)]
    listed = {Path(name).name for name in ids(root, "train") | ids(root, "val")}
    return found.keys() <= listed and np.array_equal([found[k] for k in sorted(found)], truth)


def ids(root, split):
    """The ids that training would read."""
    return {*(root / LISTS / f"{split}.txt").read_text(encoding="utf-8").splitlines()}


def train(printed, out):
    """Run the printed command for two epochs, with a network of the smallest size."""
    line = printed.split("train with:\n")[1].replace("\\\n", " ")
    small = ("--backbone resnet8 --weights none --width 8 --crop 33 --batch 2 --epochs 2 "
             "--eval-every 2 --warmup-epochs 0 --workers 0 --device cpu --out")
    imas.main([*shlex.split(line)[2:], *small.split(), str(out)])
    assert len((out / "log.csv").read_text().splitlines()) == 3


# Own pictures. How `fill` writes them; and what the masks must become, or the words of the line

MAP = ["# label:color_rgb:parts:actions", "cat:200,10,10::", "dog:0,0,255::", "background:0,0,0::"]
OF_MAP = [(0, 0, 0), (200, 10, 10), (0, 0, 255), (224, 224, 192)]
OF_VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (224, 224, 192)]
LABELME = ["__ignore__", "_background_", "cat", "dog"]
LEVELS = ["ignored:0,0,0::", "cup:128,128,128::", "disc:255,255,255::"]
ROBOFLOW = ["Pixel Value, Class", "0, background", "1, cat", "2, big dog"]
VOC = dict(image="JPEGImages/p{}.jpg", mask="SegmentationClass/p{}.png")
PNG = dict(image="JPEGImages/p{}.jpg", mask="SegmentationClassPNG/p{}.png")
JPG = dict(image="images/p{}.jpg", mask="masks/p{}.jpg")


def equal_bands(values):
    return picture(np.dstack([values] * 3))


def palette(values):
    return picture(values).quantize(4)


def odd(values):
    """A palette mask in which the colors are those of VOC, but of other classes."""
    mask = picture(values)
    mask.putpalette([0, 0, 0, 0, 128, 0, 128, 0, 0])
    return mask


def smooth(values):
    return picture(values).resize((99, 75), Image.BILINEAR).resize((40, 36), Image.BILINEAR)


def in_alpha(values):
    return picture(np.dstack([0 * values, 0 * values, 0 * values, values]))


TENS = {f"images/{i}.png": noise(9, 9, i) for i in range(10)}
CONVERTS = {
    "plain": (dict(values=(0, 1, 2)), (0, 1, 2)),
    "_L0": (dict(mask="masks/p{}_L0.png"), (0, 1)),
    "digits are no ending": (dict(  # masks of 01, 11, ..., not of 0, 1, ...
        image="images/{}1.png", mask="masks/{}1.png", files=TENS), (0, 1)),
    "Roboflow": (dict(values=(0, 1, 2), image="train/p{}.jpg", mask="train/p{}_mask.png",
                      files={"train/_classes.csv": ROBOFLOW}), (0, 1, 2)),
    "0 and 255": (dict(values=(0, 255)), (0, 1)),
    "JPEG": (dict(values=(0, 255), store=equal_bands, **JPG), (0, 1)),
    "equal bands": (dict(values=(0, 1, 2), store=equal_bands), (0, 1, 2)),
    "no class 0": (dict(values=(1, 2)), (1, 2)),
    "levels": (dict(values=(0, 128, 255), files={"labelmap.txt": LEVELS}), (255, 0, 1)),
    "scribbles": (dict(values=(0, 255, 255, 1)), (0, 255, 255, 1)),
    "named values": (
        dict(values=(0, 1, 2), store=odd, files={"class_names.txt": "abc"}), (0, 1, 2)),
    "16 bits": (dict(store=lambda values: Image.fromarray(values.astype("u2")),
                     image="images/a/p{}.tiff", mask="masks/a/p{}.tiff"), (0, 1)),
    "CVAT": (dict(VOC, values=OF_MAP, files={"labelmap.txt": MAP}), (0, 1, 2, 255)),
    "Datumaro": (
        dict(VOC, values=OF_MAP, store=palette, files={"labelmap.txt": MAP}), (0, 1, 2, 255)),
    "labelme": (dict(PNG, values=OF_VOC, files={"class_names.txt": LABELME}), (0, 1, 2, 255)),
}


TRAINS = "_L0, Roboflow, 0 and 255, JPEG, equal bands, no class 0, levels, CVAT"


@pytest.mark.parametrize("name", CONVERTS)
def test_folder_becomes_what_it_means_and_its_command_trains(name, tmp_path, capsys):
    how, values = CONVERTS[name]
    fill(tmp_path / "source", **how)
    before = files(tmp_path / "source")
    root = own(tmp_path / "source")
    assert means(root, values)
    assert files(tmp_path / "source") == before
    assert {path.stat().st_nlink for path in root.rglob("*.*")} == {1}  # copies
    if name in TRAINS.split(", "):
        train(capsys.readouterr().out, tmp_path / "run")


STRAY = np.maximum(255 * labels_of(0), np.eye(36, 40))
HALF = {f"masks/p{i}.png": picture(labels_of(i)) for i in range(4)}
MOVED = {f"images/p{i}_mask.png": picture(labels_of(i)) for i in range(8)}
OBJECT = "255 looks like the object|cut at 128|SOURCE/labelmap.txt"
REFUSED = {
    "smoothed": (dict(values=(0, 255), store=smooth), OBJECT),
    "stray pixel": (dict(values=(0, 255), files={"masks/p0.png": picture(STRAY)}), OBJECT),
    "half 0/1": (dict(values=(0, 255), files=HALF), OBJECT),
    "levels": (dict(values=(0, 128, 255)), "grey|name:0,0,0:: name:128,128,128:: name:255,255,255"),
    "a tool's names": (dict(mask="masks/task-{}-annotation-2-tag-cat-0.png"),
                       "['p0', 'p1', 'p2']|task-0-annotation-2-tag-cat-0|equal names"),
    "look-alikes": (dict(image="images/\u00e9{}.png", mask="masks/e\u0301{}.png"),
                    r"\xe90|e\u03010|equal names"),
    "moved among pictures": (dict(mask="masks/p{}_mask.png", files=MOVED), "among|'p0_mask'"),
    "JPEG of classes": (dict(JPG, values=(0, 1, 2)), "JPEG|PNG"),
    "JPEG of colours": (dict(JPG, values=OF_MAP, files={"labelmap.txt": MAP}), "p0.jpg|JPEG|PNG"),
    "alpha": (dict(values=(0, 255), store=in_alpha), "p0.png|alpha band varies|without it"),
    "all of one class": (dict(values=(0, 0)), "one class"),
    "no names": (dict(values=OF_MAP), "p0.png|is no known class|SOURCE/labelmap.txt"),
    "one colour twice": (dict(files={"labelmap.txt": ["a:9,9,9", "b:9,9,9"]}), "b has|taken"),
    "a value too many": (dict(files={"class_names.txt": ["a"]}), "p0.png|1 is no known class"),
    "two palettes": (dict(values=OF_VOC, store=palette,
                          files={"masks/p1.png": palette(np.array(OF_MAP)[labels_of(1)])}),
                     "p1.png|another colour"),
    "two sizes": (dict(files={"masks/p0.png": picture(np.eye(36))}), "p0.png|differ in size"),
    "two pictures": (dict(files={"images/p0.png.jpg": noise(36, 40)}), "p0.png.jpg|one id"),
    "cp1252": (dict(files={LISTS + "val.txt": b"stra\xdfe"}), "val.txt is not UTF-8"),
    "16 bits": (dict(files={"images/p0.png": Image.new("I;16", (40, 36))}), "p0.png|8 bits"),
    "too few": (dict(masks=1), "too few masks: 0 to train"),
    "a line break": (dict(files={"images/a\nb.png": b""}), r"rename or remove 'images/a\nb.png'"),
    "root is there": (dict(files={"../taken/x": b"mine"}), "taken exists"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_folder_is_refused_in_one_line_before_anything_is_written(name, tmp_path, capsys):
    how, words = REFUSED[name]
    fill(tmp_path / "source", **how)
    before = files(tmp_path)
    assert own(tmp_path / "source") == 2
    line = capsys.readouterr().err
    assert line.startswith("prepare.py: ") and line.count("\n") == 1
    assert [word for word in words.split("|") if word not in line] == [], line
    assert files(tmp_path) == before and not list(tmp_path.glob("own-*"))


@pytest.mark.parametrize("layout", ["images/{}/p{{}}.png masks/{}/p{{}}.png",
                                    "{}/images/p{{}}.png {}/masks/p{{}}.png"])
@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_folders_are_the_split_and_a_test_is_left_out(layout, val, tmp_path, capsys):
    for folder in ("train", val, "test"):
        image, mask = layout.format(folder, folder).split()
        fill(tmp_path / "source", image=image, mask=mask)
    root = own(tmp_path / "source")
    assert ids(root, "train") == {f"train/p{i}" for i in range(10)}
    assert ids(root, "val") == {f"{val}/p{i}" for i in range(8)}  # two have no mask
    assert "(for tests, or on no list): 10 ['test/p0'" in capsys.readouterr().out


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Validation"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_go_before_folders(val, encoding, tmp_path, capsys):
    lines = "val\\ß2\r\n/images/val/ß1.png masks/val/ß1.png\r\nval/ß9\r\ngone"
    fill(tmp_path / "source", image="images/val/ß{}.png", mask="masks/val/ß{}.png",
         files={LISTS + f"{val}.txt": lines.encode(encoding), LISTS + "test.txt": ["val/ß0"]})
    root = own(tmp_path / "source")
    assert ids(root, "val") == {"val/ß1", "val/ß2"}
    assert ids(root, "train") == {f"val/ß{i}" for i in range(3, 9)}
    assert r"(no mask to validate on): 2 ['gone', 'val/\xdf9']" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--root source/x", "--root new --val 1.5"])
def test_flags_that_make_no_sense_are_refused(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "source")
    assert prepare.main(["own", "source", *flags.split()]) == 2


def test_what_is_left_out_is_counted_by_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    fill(tmp_path / "source", mask="masks/p{}_mask.png", files={
        "images/a.heic": b"", "images/b.png": b"broken", "images/d.png": noise(90, 90),
        "images/.hidden.png": b"", "masks/e_mask.png": picture(labels_of(0))})
    pages = tmp_path / "source/images/c.tiff"
    noise(9, 9).save(pages, save_all=True, append_images=[noise(9, 9)])
    own(tmp_path / "source")
    told = capsys.readouterr().out
    for line in ("(UnidentifiedImageError): 2 ", "a.heic", "(SeveralPages): 1 ", "c.tiff",
                 "(DecompressionBombError): 1 ", "d.png", "(no picture): 1 ['e']",
                 "unlabeled images: 2 ['p8', 'p9']", "taken off the masks' names: _mask"):
        assert line in told
    assert "hidden" not in told


def test_links_to_folders_are_followed(tmp_path):
    fill(tmp_path / "elsewhere")
    fill(tmp_path / "source", masks=0, mask="masks/x{}")
    (tmp_path / "source/masks").symlink_to(tmp_path / "elsewhere/masks")
    assert means(own(tmp_path / "source"), (0, 1))


@pytest.mark.parametrize("how, said, names, background", [
    (dict(), "taken as the background", "background,class-1", False),
    (CONVERTS["Roboflow"][0], "taken as the background", "background,cat,big-dog", False),
    (dict(values=(1, 2)), "it is in 0 masks", "background,class-1,class-2", True),
    (dict(files={"class_names.txt": ["__ignore__", "sky", "red, big cat"]}), "", "sky,red-big-cat",
     True)])
def test_command_says_whether_class_zero_is_the_background(
        how, said, names, background, tmp_path, capsys):
    fill(tmp_path / "source", **how)
    own(tmp_path / "source")
    told, command = capsys.readouterr().out.split("train with:")
    assert said in told and f"--class-names {names} " in command
    assert ("--background none" in command) == background


# The demo


def test_demo_draws_the_same_pixels(tmp_path):
    demo.draw_demo(tmp_path / "demo")
    assert len(ids(tmp_path / "demo", "train")) == 144
    summed = hashlib.sha256()
    for path in sorted(tmp_path.rglob("*.png")):
        summed.update(np.asarray(Image.open(path)).tobytes())
    assert summed.hexdigest() in (  # by Pillow from 11.2 on, 11.1, and before
        "8ebd0fab663a1084b5753f791a8f99bd292c4ddb544a5f147ff26414e8ae6cd9",
        "da35498c5cafe3075b2702957e9e29f048c5b0f2f3b1832291c25ecaee505742",
        "abd8147989f361719307c54ed90a65b751ada59cf3a4b02dc3e6368a1b769dbc")


# Published data


@pytest.fixture
def web(monkeypatch):
    """Nothing is fetched: .files {address: bytes}; .missing: as if so many bytes did not come."""
    def urlopen(request, timeout):
        url = request.full_url
        start = int(request.get_header("Range")[6:-1])
        content = io.BytesIO(web.files[url][start:])
        return contextlib.nullcontext(types.SimpleNamespace(
            status=206 if start else 200,
            length=web.missing,
            read=content.read))

    web = types.SimpleNamespace(files={}, missing=0)
    monkeypatch.setattr(prepare.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(prepare, "SPLITS", "http://x")
    monkeypatch.setattr(prepare, "VOC_SIZES", ["7"])
    monkeypatch.setattr(prepare, "CITYSCAPES_SIZES", ["7"])
    return web


def pack(folder, kind):
    return Path(shutil.make_archive(str(folder), kind, folder)).read_bytes()


@pytest.fixture
def voc_on_the_web(web, tmp_path, monkeypatch):
    """VOC on the web: p0 and p1 are its train.txt; p0 to p7 are the pool; p2 to p9 lack masks."""
    fill(tmp_path / "V/VOCdevkit/VOC2012", masks=2, **VOC, files={
        LISTS + "train.txt": ["p0", "p1"], LISTS + "val.txt": ["p8", "p9"]})
    web.files = {
        prepare.VOC: pack(tmp_path / "V", "tar"),
        "http://x/pascal/7/labeled.txt": b"p0\np1",
        "http://x/pascal/7/unlabeled.txt": b"JPEGImages/p2.jpg x\np3\np4\np5\np6\np7\n"}
    monkeypatch.setattr(prepare, "VOC_MD5", hashlib.md5(web.files[prepare.VOC]).hexdigest())
    return tmp_path / "voc"


def test_voc_has_the_published_pool_as_its_list(voc_on_the_web):
    for _ in range(2):  # again: nothing is left to do
        assert prepare.main(["voc", "--root", str(voc_on_the_web)]) is None
        assert ids(voc_on_the_web, "train") == {f"p{i}" for i in range(8)}
        assert ids(voc_on_the_web, "train_voc") == {"p0", "p1"}
        assert len(files(voc_on_the_web / "JPEGImages")) == 10


def test_download_goes_on_where_it_stopped(voc_on_the_web, web):
    start = web.files[prepare.VOC][:10_000]
    write(voc_on_the_web / "VOCtrainval_11-May-2012.tar.part", start)
    web.files[prepare.VOC] = bytes(len(start)) + web.files[prepare.VOC][len(start):]
    assert prepare.main(["voc", "--root", str(voc_on_the_web)]) is None


def test_broken_connection_says_to_run_again(voc_on_the_web, web, capsys):
    web.missing = 9
    assert prepare.main(["voc", "--root", str(voc_on_the_web)]) == 2
    assert "9 bytes are missing: run this again" in capsys.readouterr().err


def test_wrong_download_is_thrown_away(voc_on_the_web, web, capsys):
    web.files[prepare.VOC] += b"x"
    assert prepare.main(["voc", "--root", str(voc_on_the_web)]) == 2
    assert "checksum" in capsys.readouterr().err and not list(voc_on_the_web.glob("VOC*"))


def test_blended_masks_are_vocs_or_else_sbds(voc_on_the_web, web, tmp_path, monkeypatch):
    write(tmp_path / "S/benchmark_RELEASE/dataset/cls/p2.mat", b"")
    url = prepare.SBD + "benchmark.tgz"
    web.files[url] = pack(tmp_path / "S", "gztar")
    monkeypatch.setattr(prepare, "SBD_MD5", hashlib.md5(web.files[url]).hexdigest())
    content = {"GTcls": {"Segmentation": np.full((1, 1, 36, 40), 9)}}
    scipy = types.SimpleNamespace(loadmat=lambda path: content)
    monkeypatch.setitem(sys.modules, "scipy.io", scipy)
    assert prepare.main(["voc", "--blended", "--root", str(voc_on_the_web)]) is None
    for name, mask in stored(voc_on_the_web).items():
        assert mask.max() == (1 if name in ("p0", "p1") else 9)


def test_cityscapes_becomes_classes_and_ids(web, tmp_path):
    classes = Cityscapes.classes[:34]
    names = ["train/ulm/ulm_0", "train/ulm/ulm_1", "val/lindau/lindau_0"]
    label_ids = np.arange(40 * 80).reshape(40, 80) % 34
    for name in names:
        write(tmp_path / f"gtFine/{name}_gtFine_labelIds.png", picture(label_ids))
        write(tmp_path / f"leftImg8bit/{name}_leftImg8bit.png", noise(40, 80))
    for name, file in zip(names, ["labeled", "unlabeled"]):
        line = f"leftImg8bit/{name}_leftImg8bit.png"
        web.files[f"http://x/cityscapes/7/{file}.txt"] = line.encode()
    assert prepare.main(["cityscapes", "--root", str(tmp_path)]) is None
    assert (ids(tmp_path, "train"), ids(tmp_path, "val")) == ({*names[:2]}, {names[2]})
    assert (tmp_path / "splits/7/labeled.txt").read_text().split() == names[:1]
    expected = np.array([255 if c.ignore_in_eval else c.train_id for c in classes])[label_ids]
    assert files(tmp_path / "JPEGImages").keys() == {f"{name}.png" for name in names}
    for mask in stored(tmp_path).values():
        assert (mask == expected).all()



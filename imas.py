"""iMAS: instance-specific and model-adaptive supervision for semi-supervised semantic segmentation, in one file.

Zhao et al., CVPR 2023, arXiv 2211.11335. Read it from top to bottom beside the paper.

    python imas.py                                              the demo: small drawn scenes, on a CPU, in minutes
    torchrun imas.py --dataset voc --labeled 183                PASCAL VOC on one GPU
    torchrun --nproc-per-node 4 imas.py --dataset voc --labeled 183                          on four
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 imas.py ...   on two machines
    python imas.py --dataset PATH --num-classes N --labeled N   your own pictures, in VOC's folder layout
    python imas.py --eval runs/demo-16-imas-0/best.pt           score a checkpoint
    python imas.py --predict FOLDER --checkpoint runs/demo-16-imas-0/best.pt --out MASKS     label any pictures
    python imas.py --plot runs/A runs/B                         compare runs in one picture

A network, the student, learns from a few labeled images and many unlabeled ones. For the unlabeled ones a second network
of the same shape, the teacher, makes up the labels; its weights are the running mean of the student's. Where the two
still disagree about an image, the image is hard: its labels are not to be trusted, and distorting it further would hurt.
So every unlabeled image u gets a hardness gamma in [0, 1] (section 4), which steers how strongly u is distorted and with
which image it is mixed (section 5), and how much it counts in the loss (section 6). Section 8 is the whole algorithm: begin
there, go on to sections 4 to 7, and leave the rest, which makes it run, for later.

1 settings · 2 data · 3 model · 4 quantitative hardness · 5 model-adaptive augmentation · 6 losses · 7 mean teacher ·
8 one training step · 9 evaluation · 10 the run · 11 the command line
"""

import argparse
import copy
import csv
import dataclasses
import datetime
import functools
import glob
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import ExifTags, Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import masks_to_boxes
from torchvision.transforms.functional import adjust_hue, pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

HERE = Path(__file__).resolve().parent
IMAGE_ENDINGS = (".jpg", ".png", ".jpeg", ".JPG", ".PNG", ".JPEG")
IGNORE = 255                                     # the label of pixels that no loss and no score looks at
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # of ImageNet, as torchvision's weights expect
CITYSCAPES = [c for c in torchvision.datasets.Cityscapes.classes if 0 <= c.train_id < 19]     # in the order of train_id


class UserError(Exception):
    """A mistake of the user's in one line: what is wrong, where, what to do. `main` prints it and exits with 2."""


def require(fine, line):
    """Raise UserError(line) unless `fine`."""
    if not fine:
        raise UserError(line)


@contextmanager
def explained(what, advice, kind=Exception):
    """Turn errors inside the `with` into a UserError: what was tried, the error's first line, what to do."""
    try:
        yield
    except UserError:
        raise
    except kind as error:                        # of Pillow and torch for a broken file: any
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{what} ({reason.splitlines()[0][:200]}): {advice}") from None


def some_of(things):
    """The first ten of the strings `things` in one line."""
    return "; ".join(things[:10]) + ("; ..." if things[10:] else "")


# 1 ------------------------------------------------------------------------------------------------------- settings ---

def option(default, help, **limits):
    """A field of Settings: its default, its line in --help, and what it may be (low, high, choices)."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass
class Settings:
    """All settings of a run. Each field is a flag; its default is the preset's of the dataset, else the one here."""
    dataset: str = option("demo", "demo, voc, cityscapes, camvid, or the path of a folder in VOC's layout")
    root: str = option("", "folder of the data (default: data/DATASET beside imas.py)")
    out: str = option("", "folder of the run (default: runs/DATASET-LABELED-METHOD-SEED)")
    labeled: str = option("", "how many images keep their labels, or a file with their ids, one a line")
    method: str = option("imas", "uniform: the views without hardness; supervised: labeled images alone, twice as many a step",
                         choices=("imas", "uniform", "supervised"))
    adapt: str = option("intensity,cutmix,loss", "which parts follow hardness: any of these three, or none (for ablations)")
    num_classes: int = option(0, "classes in the masks, the background included; 255 is ignored", low=2, high=255)
    class_names: str = option("", "their names for tables and pictures, from class 0 on: sky,road,...")
    background: int | None = option(0, "the class left out of hardness because it fills every image, or none")
    backbone: str = option("resnet50", "resnet8 is the demo's", choices=("resnet8", "resnet18", "resnet34", "resnet50", "resnet101"))
    weights: str = option("imagenet", "imagenet (downloaded by torchvision), none, or a file with the backbone's state dict")
    output_stride: int = option(16, "8 is finer, and about three times slower", choices=(8, 16))
    width: int = option(256, "channels of ASPP and decoder", low=1)
    base_size: int = option(0, "long side in pixels before scaling, in training; 0: each image's own", low=0)
    min_scale: float = option(0.5, "weak augmentation scales by a factor from here ...", low=0.01)
    max_scale: float = option(2.0, "... to here", low=0.01)
    crop: int = option(513, "side of the square training crop in pixels; fits best as a multiple of the output stride, plus 1", low=16, high=8192)
    batch: int = option(16, "labeled images a step, and as many unlabeled, over all processes", low=2)
    accumulate: int = option(1, "cut each process's part of the batch into so many shares; raise it when memory runs out", low=1)
    epochs: int = option(80, "passes over the unlabeled images, the warm-up's included", low=1)
    warmup_epochs: int = option(0, "supervised epochs before the teacher starts; without pretrained weights take a few", low=0)
    lr: float = option(0.001, "learning rate of the backbone at the start; follows (1 - step/steps)^0.9", low=0.0)
    head_lr: float = option(10.0, "the learning rate of all but the backbone is this many times lr", low=0.0)
    momentum: float = option(0.9, "of SGD", low=0.0, high=1.0)
    weight_decay: float = option(1e-4, "of SGD", low=0.0)
    tau: float = option(0.95, "confidence from which a pseudo-label counts; lower it if few pixels ever count", low=0.0, high=1.0)
    lambda_u: float = option(3.0, "weight of the unlabeled loss", low=0.0)
    ema_decay: float = option(0.996, "how slowly the teacher follows; lower it for very short runs", low=0.0, high=1.0)
    ohem: bool = option(False, "learn from the labeled pixels that are hardest to get right (OHEM) instead of all")
    aux_weight: float = option(0.0, "weight of an auxiliary head on layer3; 0: no such head", low=0.0)
    sliding: bool = option(False, "evaluate by overlapping windows of crop x crop, for pictures too large to go through whole")
    weak_in_batch: bool = option(True, "show BatchNorm the weak images too (see loss_of_share); off saves a fifth of the time")
    eval_every: int = option(1, "epochs between two evaluations; the last epoch is always evaluated", low=1)
    save_every: float = option(30.0, "minutes between two checkpoints, besides the one after each epoch", low=0.0)
    workers: int = option(4, "loader processes per training process; no more are started than there are cores", low=0)
    seed: int = option(0, "of every draw, that of the labeled images by --labeled N too", low=0)
    device: str = option("", "cpu, cuda, cuda:1, mps (default: the best there is)")

    def __post_init__(self):
        self.adapt = "none" if self.method == "uniform" else self.adapt
        self.class_names = self.class_names or ",".join(f"class {k}" for k in range(self.num_classes))


PRESETS = {
    "voc": dict(num_classes=21, backbone="resnet101", base_size=500,
                class_names=",".join(c.strip("_") for c in DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"])),
    "cityscapes": dict(num_classes=19, class_names=",".join(c.name for c in CITYSCAPES), base_size=2048, crop=769, lr=0.01, head_lr=1.0,
                       weight_decay=5e-4, epochs=240, tau=0.7, ohem=True, aux_weight=0.4, sliding=True),
    "camvid": dict(num_classes=11, class_names="sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist",
                   background=None, backbone="resnet18", weights="none", base_size=240, crop=128, batch=4, width=64,
                   lr=0.01, head_lr=1.0, lambda_u=1.0, epochs=12, warmup_epochs=4),
    "demo": dict(num_classes=6, class_names="background,disc,square,triangle,cross,ring", labeled="16",
                 backbone="resnet8", weights="none", width=64, base_size=64, crop=64, batch=16, lr=0.03, head_lr=1.0,
                 tau=0.8, lambda_u=1.0, ema_decay=0.99, epochs=70, warmup_epochs=1, eval_every=5, workers=0),
}


def flag(name):
    """The flag of the setting `name`."""
    return "--" + name.replace("_", "-")


def check_settings(s):
    """Raise UserError for the first value of Settings `s` that is out of its bounds, alone or together with others."""
    require(s.num_classes, f"--num-classes is missing; it is known for --dataset {', '.join(PRESETS)} alone, not for {s.dataset}")
    for field in dataclasses.fields(s):
        value, low, high = getattr(s, field.name), field.metadata.get("low"), field.metadata.get("high", 1e9)
        require(low is None or low <= value <= high, f"{flag(field.name)} {value}: must be from {low} to {high:g}")
    parts, names = set(s.adapt.split(",")), s.class_names.split(",")
    require(parts == {"none"} or parts <= {"intensity", "cutmix", "loss"}, f"--adapt {s.adapt}: choose among intensity,cutmix,loss; or none")
    require(s.background is None or 0 <= s.background < s.num_classes,
            f"--background {s.background}: a class from 0 to {s.num_classes - 1}, or none")
    require(len(names) == s.num_classes, f"--class-names {s.class_names}: {len(names)} names for {s.num_classes} classes")
    require(s.min_scale <= s.max_scale, f"--min-scale {s.min_scale} is above --max-scale {s.max_scale}")
    require(s.warmup_epochs <= s.epochs, f"--warmup-epochs {s.warmup_epochs} is more than --epochs {s.epochs}")


# 2 ----------------------------------------------------------------------------------------------------------- data ---

Sample = NamedTuple("Sample", [("id", str), ("image", Path), ("mask", Path | None)])         # None: labels are not to be read


def read_ids(path):
    """The ids in the list file `path`, one a line, of plain ids or of paths: "x", "JPEGImages/x.jpg" and "JPEGImages/x.jpg
    SegmentationClass/x.png" all name x; an id may have folders and spaces in it."""
    with explained(f"cannot read the id list {path}", "name a text file with an id a line"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    ids = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        image = re.sub(r"(\.(jpe?g|png))\s.*\.png$", r"\1", line, flags=re.IGNORECASE)               # less the mask's path
        name = re.sub(r"^/?(JPEGImages|leftImg8bit)/|(_leftImg8bit)?(\.(jpe?g|png))?$", "", Path(image).as_posix(), flags=re.IGNORECASE)
        place = f"{path}, line {number}: '{line}'"
        require(not Path(name).is_absolute() and ".." not in Path(name).parts, f"{place} leads out of the dataset's folder")
        require(name not in ids, f"{place} stands there a second time, remove one")
        if line:
            ids[name] = number
    return list(ids)


def data_root(s):
    """The folder of the data: --root, else --dataset where that is a path, else data/DATASET."""
    return Path(s.root or (HERE / "data" / s.dataset if s.dataset in PRESETS else s.dataset))


def locate(s, name):
    """Paths of the image and the mask with the id `name`, in the layout of VOC or of Cityscapes; they need not exist."""
    root = data_root(s)
    if s.dataset == "cityscapes":
        masks = [root / "gtFine" / f"{name}_gtFine_{kind}.png" for kind in ("labelTrainIds", "labelIds")]
        return root / "leftImg8bit" / f"{name}_leftImg8bit.png", next(filter(Path.is_file, masks), masks[0])
    images = [root / "JPEGImages" / (name + ending) for ending in IMAGE_ENDINGS]
    return next(filter(Path.is_file, images), images[0]), root / "SegmentationClass" / f"{name}.png"


def list_ids(s, split):
    """The ids of "train" or "val", and the list that names them. A file train_aug.txt goes before train.txt."""
    root = data_root(s)
    if s.dataset == "cityscapes":
        folder, end = root / "leftImg8bit" / split, "_leftImg8bit.png"
        return sorted(f"{split}/{p.parent.name}/{p.name.removesuffix(end)}" for p in folder.glob("*/*" + end)), folder
    path = root / "ImageSets" / "Segmentation" / f"{split}_aug.txt"
    path = path if path.is_file() else path.with_name(f"{split}.txt")
    return read_ids(path), path


@explained("cannot look for the images", "check the id lists and the folders' permissions", OSError)
def find_data(s):
    """The images of a run: (labeled, unlabeled, validation, note), three lists of Sample with no id in common, and where the
    labeled ids come from. UserError for anything missing."""
    validation = find_validation(s)
    require(s.labeled, "--labeled is missing: a number of images, or a file with their ids")
    (pool, path), published = list_ids(s, "train"), data_root(s) / "splits" / s.labeled
    if s.labeled.isdecimal() and not (published / "labeled.txt").is_file():
        with_mask = [i for i in pool if locate(s, i)[1].is_file()]
        require(0 < int(s.labeled) <= len(with_mask),
                f"--labeled {s.labeled}: {len(with_mask)} ids of {path} have a mask, so at most that many, and at least 1")
        draw = np.random.default_rng(s.seed).permutation(len(with_mask))[:int(s.labeled)]
        labeled, note = [with_mask[i] for i in draw], f"drawn with seed {s.seed} from the {len(with_mask)} with a mask in {path.name}"
    elif s.labeled.isdecimal():
        labeled, note = read_ids(published / "labeled.txt"), f"the published partition in {published}"
        if (published / "unlabeled.txt").is_file():
            pool, path = read_ids(published / "unlabeled.txt"), published / "unlabeled.txt"
        if s.dataset == "voc":
            own = read_ids(data_root(s) / "ImageSets" / "Segmentation" / "train.txt")
            note += f", {'classic' if set(labeled) <= set(own) else 'blended'} protocol"
    else:
        labeled, note = read_ids(Path(s.labeled)), f"listed in {s.labeled}"
    require(labeled, f"no id is labeled: the list is empty ({note})")
    both = sorted({v.id for v in validation} & {*pool, *labeled})
    require(not both, f"{len(both)} ids are in val and among the training images too ({some_of(both)}): remove them from one side")
    unlabeled = sorted(set(pool) - set(labeled))
    require(len(unlabeled) >= s.batch or s.method == "supervised" and len(labeled) >= s.batch,
            f"{len(unlabeled)} unlabeled images are left in {path}, a step takes {s.batch}: lower --labeled or --batch")
    return find_samples(s, labeled, True), find_samples(s, unlabeled, False), validation, note


@explained("cannot look for the images", "check the id lists and the folders' permissions", OSError)
def find_validation(s):
    """The images of the validation set: a list of Sample."""
    folder = data_root(s) / ("leftImg8bit" if s.dataset == "cityscapes" else "JPEGImages")
    require(folder.is_dir(), f"there is no folder {folder}: " + (
        f"run 'python data/prepare.py {s.dataset}', or say --root" if s.dataset in PRESETS else "see the README's layout, or say --root"))
    ids, path = list_ids(s, "val")
    require(ids, f"{path} holds no id: nothing to evaluate on")
    return find_samples(s, ids, True)


def find_samples(s, ids, with_masks):
    """The files of `ids` as a list of Sample; UserError that counts what is missing, unreadable or of another size."""
    samples, faults = [], []
    for name in ids:
        image, mask = locate(s, name)
        samples.append(Sample(name, image, mask if with_masks else None))
        sizes = []
        for path in filter(None, samples[-1][1:]):
            try:
                with Image.open(path) as picture:            # reads the header alone
                    on_its_side = picture.format != "PNG" and picture.getexif().get(ExifTags.Base.Orientation, 1) > 4
                    sizes.append(picture.size[::-1] if on_its_side else picture.size)
            except FileNotFoundError:
                faults.append(f"{path} is missing")
            except Exception:                                # Pillow raises errors of many kinds
                faults.append(f"{path} is no readable picture")
        if len(set(sizes)) == 2:
            faults.append(f"{mask} is {sizes[1][0]}x{sizes[1][1]}, its image {sizes[0][0]}x{sizes[0][1]}")
    require(not faults, f"{len(faults)} fault(s) in the data: {some_of(faults)}")
    return samples


def read_image(path):
    """The picture in the file `path` as a PIL image in RGB, turned as its camera says (a PNG, whose header need not say, as it is)."""
    with explained(f"cannot decode {path}", "replace it, or begin a run without it"), Image.open(path) as image:
        if image.mode[0] in "IF":                            # 16 or 32 bits, whose range Pillow does not convert
            raise ValueError(f"mode {image.mode}, save it with 8 bits per channel")
        return (image if image.format == "PNG" else ImageOps.exif_transpose(image)).convert("RGB")


def read_mask(sample, num_classes):
    """The mask of `sample` as a PIL image whose pixels are class indices, 0..num_classes-1 or 255.

    The stored index is the class. The mode is never converted: a palette turned into luminance is garbage.
    """
    with explained(f"cannot decode {sample.mask}", "replace it, or remove its id from the lists"), Image.open(sample.mask) as mask:
        mode, labels = mask.mode, np.array(mask, np.uint8)
    require(mode in ("P", "L", "1"), f"the mask {sample.mask} has mode {mode}: save class indices as an 8-bit palette or grey PNG")
    if sample.mask.name.endswith("_labelIds.png"):
        train_id = {c.id: c.train_id for c in CITYSCAPES}
        labels = np.array([train_id.get(k, IGNORE) for k in range(256)], np.uint8)[labels]
    stored = set(np.bincount(labels.ravel()).nonzero()[0].tolist())
    require(mode != "L" or num_classes > 2 or stored != {0, IGNORE}, f"the mask {sample.mask} holds 0 and {IGNORE} alone, and {IGNORE} is "
            f"ignored: store class 1 as 1 (if it is meant so, save the mask as a palette PNG)")
    wrong = sorted(stored - {*range(num_classes), IGNORE})
    require(not wrong, f"the mask {sample.mask} holds {wrong}; --num-classes {num_classes} allows 0 to {num_classes - 1} and {IGNORE}")
    return Image.fromarray(labels)


def weak_augment(image, mask, s, rng):
    """A_w: random scale, crop and flip of a PIL image and its mask. The results are at most crop x crop.

    Draws scale and window first and resamples the window alone: what resize-then-crop gives, up to the rounding of single
    grey levels, in a fraction of the time.
    """
    factor = rng.uniform(s.min_scale, s.max_scale) * (s.base_size / max(image.size) if s.base_size else 1)
    width, height = (max(1, round(side * factor)) for side in image.size)               # of the scaled picture
    w, h = min(width, s.crop), min(height, s.crop)                                      # of the window
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    (sx, sy), flip = (image.width / width, image.height / height), rng.random() < 0.5
    box = (x * sx, y * sy, min((x + w) * sx, image.width), min((y + h) * sy, image.height))
    image = image.resize((w, h), Image.Resampling.BILINEAR, box=box)
    mask = mask.resize((w, h), Image.Resampling.NEAREST, box=box)
    return (ImageOps.mirror(image), ImageOps.mirror(mask)) if flip else (image, mask)


STRONG = (  # A_s: an operation on an image and a magnitude, and the range from which the magnitude is drawn
    (lambda image, m: image, 0, 0),
    (lambda image, m: ImageOps.autocontrast(image), 0, 0),
    (lambda image, m: ImageOps.equalize(image), 0, 0),
    (lambda image, m: ImageOps.invert(image), 0, 0),
    (lambda image, m: image.filter(ImageFilter.GaussianBlur(m)), 0.1, 2),
    (lambda image, m: ImageEnhance.Contrast(image).enhance(m), 0.1, 0.95),
    (lambda image, m: ImageEnhance.Brightness(image).enhance(m), 0.1, 0.95),
    (lambda image, m: ImageEnhance.Color(image).enhance(m), 0.1, 0.95),
    (lambda image, m: ImageEnhance.Sharpness(image).enhance(m), 0.1, 0.95),
    (lambda image, m: ImageOps.posterize(image, int(m)), 4, 8),         # 4 to 7 bits
    (lambda image, m: ImageOps.solarize(image, int(m)), 1, 256),        # threshold 1 to 255
    (lambda image, m: adjust_hue(image, m), -0.5, 0.5),
)


def strong_augment(image, rng):
    """A_s: two operations, drawn with replacement, on a PIL image. They change colours and sharpness, never places."""
    for operation, low, high in (STRONG[i] for i in rng.integers(len(STRONG), size=2)):
        image = operation(image, rng.uniform(low, high))
    return image


LABELED, UNLABELED = 1, 2                                    # streams of random numbers


class TrainingShares:
    """The training images as shares of batches, `shares` of them a step. An item is a share; its key is a list of images' keys.

    An image's key, (stream, epoch, position, index), says all that it depends on: its draws come from a generator seeded
    by (seed, epoch, stream, position), so that neither the number of workers nor a stop in between changes a pixel.
    """

    def __init__(self, labeled, unlabeled, shares, s):
        self.samples, self.shares, self.s = {LABELED: labeled, UNLABELED: unlabeled}, shares, s
        self.steps = len(unlabeled) // s.batch or len(labeled) // s.batch    # of an epoch

    def keys(self, step, share):
        """The key of one share of one step.

        An epoch is one pass over the unlabeled images in an order of its own, the last incomplete batch dropped. The labeled
        ones come in random order again and again; where they are alone, they take the unlabeled ones' places too. (A supervised
        run without a batch of unlabeled images has epochs as long as if the labeled ones were the unlabeled.)
        """
        s, keys = self.s, []
        epoch, step = divmod(step, self.steps)
        alone = s.method == "supervised" or epoch < s.warmup_epochs
        for stream, times in ((LABELED, 2 if alone else 1), (UNLABELED, 0 if alone else 1)):
            n, size = len(self.samples[stream]), times * s.batch // self.shares
            rng = np.random.default_rng((s.seed, epoch, stream))
            passes = math.ceil(self.steps * self.shares * size / n) if size else 0
            order = [i for _ in range(passes) for i in rng.permutation(n).tolist()]
            first = (step * self.shares + share) * size
            keys += [(stream, epoch, position, order[position]) for position in range(first, first + size)]
        return keys

    def __getitem__(self, keys):
        """A dict of stacked tensors, H = W = crop: image uint8 [B, 3, H, W], label uint8 [B, H, W] of the labeled; weak and
        strong uint8 [B, 3, H, W], valid bool [B, H, W] (False: padding), index int64 [B] of the unlabeled, if any."""
        images = [self.load(*key) for key in keys]
        return {name: torch.stack([i[name] for i in images if name in i]) for name in images[0] | images[-1]}

    def load(self, stream, epoch, position, index):
        """The tensors of one image. Pixels stay uint8 until they are on the device."""
        sample, s, rng = self.samples[stream][index], self.s, np.random.default_rng((self.s.seed, epoch, stream, position))
        image = read_image(sample.image)
        mask = read_mask(sample, s.num_classes) if stream == LABELED else Image.new("L", image.size)
        weak, mask = weak_augment(image, mask, s, rng)

        def pad(picture, fill=tuple(round(255 * m) for m in MEAN)):          # at the right and at the bottom
            return pil_to_tensor(ImageOps.expand(picture, (0, 0, s.crop - picture.width, s.crop - picture.height), fill))

        label = pad(mask, IGNORE)[0]
        if stream == LABELED:
            return {"image": pad(weak), "label": label}
        return {"weak": pad(weak), "strong": pad(strong_augment(weak, rng)), "valid": label != IGNORE, "index": torch.tensor(index)}


def load_whole(sample, num_classes):
    """A whole picture, uint8 [1, 3, H, W], and its mask, uint8 [1, H, W]."""
    return pil_to_tensor(read_image(sample.image))[None], pil_to_tensor(read_mask(sample, num_classes))


def normalize(images):
    """uint8 [B, 3, H, W] on any device -> float32 with ImageNet's mean and deviation, channels-last."""
    channels = [(images[:, c] / 255 - MEAN[c]) / STD[c] for c in range(3)]   # no constants to copy: the host does not wait
    return torch.stack(channels, 1).contiguous(memory_format=torch.channels_last)


# 3 ---------------------------------------------------------------------------------------------------------- model ---

class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al., ECCV 2018) on a torchvision ResNet: float [B, 3, H, W] -> logits [B, num_classes, H, W].

    backbone       resnet18, 34, 50, 101; or resnet8: one block a stage and no layer4, for small pictures
    weights        None: drawn; "imagenet": torchvision's IMAGENET1K_V1; else a file with the backbone's state dict
    output_stride  16 or 8: input pixels per pixel of the deepest features
    width          channels of ASPP and decoder
    aux            a second head on layer3; in training mode the result is then a pair (logits, auxiliary logits)
    """

    def __init__(self, num_classes, backbone="resnet18", weights=None, output_stride=16, width=256, aux=False):
        super().__init__()
        self.backbone, low, mid, high = dilated_resnet(backbone, weights, output_stride)
        rates = [r * 16 // output_stride for r in (6, 12, 18)]
        self.aspp = ASPP(high, rates, width)
        self.aspp.project = self.aspp.project[:-1]           # without its dropout, as released
        self.low_level = nn.Sequential(nn.Conv2d(low, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
        self.decoder = nn.Sequential(
            nn.Conv2d(width + 48, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, num_classes, 1))
        self.aux = FCNHead(mid, num_classes) if aux else None
        if aux:
            self.aux[3] = nn.Identity()                      # its dropout

    def forward(self, images):
        """float [B, 3, H, W] -> logits [B, num_classes, H, W]; (logits, auxiliary logits) with `aux` in training mode."""
        def upsample(x, like):
            return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)

        net = self.backbone
        low = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))              # [B, low, H/4, W/4]
        mid = net.layer3(net.layer2(low))
        high = self.aspp(net.layer4(mid))                                                # [B, width, H/stride, W/stride]
        logits = self.decoder(torch.cat([upsample(high, low), self.low_level(low)], 1))  # [B, C, H/4, W/4]
        if self.aux is not None and self.training:
            return upsample(logits, images), upsample(self.aux(mid), images)
        return upsample(logits, images)


def dilated_resnet(name, weights, output_stride):
    """torchvision's ResNet with strides turned into dilations; and the channels of layer1, of layer3 and of the last stage.

    torchvision dilates Bottlenecks alone, so every ResNet is built plain and its convolutions are set here. layer4 gets the
    multi-grid (1, 2, 4): its blocks dilate by so many times the stage's own rate.
    """
    if name == "resnet8":
        net = ResNet(BasicBlock, [1, 1, 1, 1])
        net.layer4 = nn.Identity()
    else:
        net = getattr(torchvision.models, name)()
    del net.avgpool, net.fc
    if weights is not None:
        load_backbone(net, name, weights)
    for stage, plain_stride, grid in ((net.layer3, 16, itertools.repeat(1)), (net.layer4, 32, (1, 2, 4))):
        rate = plain_stride // output_stride
        if rate > 1:
            for block, times in zip(stage.children(), grid):
                for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
                    conv.stride = (1, 1)
                    if conv.kernel_size == (3, 3):
                        conv.dilation = conv.padding = (rate * times, rate * times)
    low, mid, high = (c * net.layer1[0].expansion for c in (64, 256, 512))
    return net, low, mid, mid if name == "resnet8" else high


def load_backbone(net, name, weights):
    """Load torchvision's ImageNet weights (`weights` "imagenet"), or the state dict in the file `weights`, into `net`."""
    with explained(f"no weights '{weights}' for {name}", "use --weights none, or --weights FILE with a state dict"):
        if weights == "imagenet":
            state = torchvision.models.get_model_weights(name).IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        missing = net.load_state_dict(state, strict=False).missing_keys   # what is too much, as the classifier, is left
        if missing:
            raise ValueError(f"{missing[0]} is missing")


# 4 ------------------------------------------------------------------------------------------- quantitative hardness ---
# Sections 4 to 7 are the method. Each of their functions needs torch and nothing else: copy what you want.

def hardness(student_logits, teacher_logits, tau, background=None, valid=None):
    """Hardness gamma of each image: how little student and teacher agree on it, weighed by class and confidence.

    Section "Quantitative hardness analysis" of the paper. With p^s, p^t the two networks' softmax on one image:

        rho(p)      = fraction of pixels whose highest probability is >= tau
        IoU_k       = IoU of class k between argmax p^s and argmax p^t; 0 where neither predicts k
        wIoU(q | r) = sum_k w_k IoU_k,  w_k = fraction of class k among the pixels that r predicts, `background` left out
        gamma       = 1 - 1/2 [ rho(p^s) wIoU(p^t | p^s) + rho(p^t) wIoU(p^s | p^t) ]

    student_logits, teacher_logits   float [B, C, H, W], both networks in eval mode and without gradient
    tau                              confidence threshold in [0, 1]
    background                       class left out of w, or None
    valid                            bool [B, H, W]: False for padding; rho and w_k are fractions of the valid pixels. None: all True
    Returns float32 [B] in [0, 1], 1 = hardest. (The released code calls 1 - gamma "hardness".) wIoU is 0 where r predicts
    background alone, so gamma is then 1; likewise for an image without a valid pixel. ValueError if shapes disagree.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"logits of shapes {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    B, C = student_logits.shape[:2]
    valid = torch.ones_like(student_logits[:, 0], dtype=torch.bool) if valid is None else valid

    def rho_and_label(logits):                                       # -> rho [B], argmax [B, H, W]
        top, label = logits.float().max(1)
        confidence = (top - logits.float().logsumexp(1)).exp()  # the softmax's highest probability, without the softmax
        rho = ((confidence >= tau) & valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
        return rho, label

    (rho_s, label_s), (rho_t, label_t) = rho_and_label(student_logits), rho_and_label(teacher_logits)
    # Count the pixels of each (image, teacher's class, student's class): one histogram for the batch.
    image = torch.arange(B, device=valid.device).view(B, 1, 1)
    cell = ((image * C + label_t) * C + label_s).flatten()
    count = torch.zeros(B * C * C, dtype=torch.int64, device=valid.device).scatter_add_(0, cell, valid.flatten().long())
    count = count.view(B, C, C)
    n_t, n_s, both = count.sum(2), count.sum(1), count.diagonal(dim1=1, dim2=2)          # [B, C] each
    iou = both / (n_t + n_s - both).clamp(min=1)

    def weighted_iou(n):                                             # n: pixels of each class by the weighing network
        if background is not None:
            n = n.clone()
            n[:, background] = 0
        return (n * iou).sum(1) / n.sum(1).clamp(min=1)

    return 1 - (rho_s * weighted_iou(n_s) + rho_t * weighted_iou(n_t)) / 2


# 5 ------------------------------------------------------------------------------------ model-adaptive augmentation ---

def adapt_intensity(weak, strong, gamma):
    """The intensity view: (1 - gamma) strong + gamma weak, image by image; a hard image is distorted little.

    Section "Model-adaptive augmentations". weak, strong: float [B, 3, H, W]; gamma: [B] in [0, 1]. -> float [B, 3, H, W]
    """
    return torch.lerp(strong, weak, gamma.to(weak.dtype).view(-1, 1, 1, 1))


def pair_hard_easy(gamma):
    """Partner of each image in CutMix: the k-th hardest gets the k-th easiest, and the other way round.

    Section "Model-adaptive augmentations". gamma: [B]. -> int64 [B], its own inverse; in an odd batch the middle image is
    its own partner. Equal gammas keep the batch's order (stable sort).
    """
    order = gamma.argsort(stable=True)                               # from easy to hard
    partner = torch.empty_like(order)
    partner[order] = order.flip(0)
    return partner


def cutmix_boxes(batch, height, width, generator):
    """Boxes of CutMix: bool [batch, height, width] on the CPU, True where the partner's pixels are pasted.

    All boxes of a batch have one size, v height x v width with v ~ U(0.1, 0.9), rounded down to even. Each has its own
    centre, drawn from [height/16, height) x [width/16, width), and is clipped at the border. generator: a CPU's.
    """
    v = torch.empty(()).uniform_(0.1, 0.9, generator=generator).item()

    def span(side):                                                  # bool [batch, side]: inside along one axis
        centre = torch.randint(side // 16, side, (batch, 1), generator=generator)
        reach, at = int(v * side) // 2, torch.arange(side)
        return (at >= centre - reach) & (at < centre + reach)

    return span(height).unsqueeze(2) & span(width).unsqueeze(1)


# 6 --------------------------------------------------------------------------------------------------------- losses ---

def supervised_loss(logits, target):
    """L_x: mean cross entropy over the labeled pixels, 0 where there is none.

    logits: float [B, C, H, W]; target: int64 [B, H, W] in 0..C-1, or 255: ignored. -> scalar
    """
    total = torch.nn.functional.cross_entropy(logits.float(), target, ignore_index=255, reduction="sum")
    return total / (target != 255).sum().clamp(min=1)


def ohem_cross_entropy(logits, target, threshold, min_kept, ignore=255):
    """Cross entropy over the hard labeled pixels alone (online hard example mining, Shrivastava et al., CVPR 2016).

    Hard: the true class has probability <= threshold; if these are fewer than min_kept, the min_kept least probable pixels,
    and all that are as probable as the last of them.
    logits: float [B, C, H, W]; target: int64 [B, H, W] in 0..C-1 or `ignore`. -> scalar, 0 where no pixel is labeled
    """
    loss = torch.nn.functional.cross_entropy(logits.float(), target, ignore_index=ignore, reduction="none")
    probability = torch.exp(-loss.detach()).masked_fill(target == ignore, 2.0)           # an ignored pixel comes last
    if min_kept > 0:
        least = probability.flatten().kthvalue(min(min_kept, probability.numel())).values
        threshold = least.clamp(min=threshold)
    hard = (probability <= threshold) & (target != ignore)
    return (loss * hard).sum() / hard.sum().clamp(min=1)


def consistency_loss(logits, pseudo_label, confidence, tau, gamma=None, valid=None):
    """L_u of one view: cross entropy against the teacher's labels where it is sure, a hard image counting less.

        L_i = mean over all H W pixels of [confidence >= tau] CE(logits, pseudo_label),   L_u = mean over i of (1 - gamma_i) L_i

    logits        float [B, C, H, W]: the student's, on the view
    pseudo_label  int64 [B, H, W]: the teacher's argmax; 255 is ignored
    confidence    float [B, H, W] in [0, 1]: the teacher's highest probability
    gamma         [B], the images' hardness (of the image pasted into, for CutMix); None: every image counts fully
    valid         bool [B, H, W]; padded pixels add nothing, and the mean still divides by H W. None: all are valid
    -> scalar. Section "Model-adaptive supervision".
    """
    loss = torch.nn.functional.cross_entropy(logits.float(), pseudo_label, ignore_index=255, reduction="none")
    sure = confidence >= tau if valid is None else (confidence >= tau) & valid
    per_image = torch.where(sure, loss, 0).mean((1, 2))
    return per_image.mean() if gamma is None else ((1 - gamma) * per_image).mean()


# 7 --------------------------------------------------------------------------------------------------- mean teacher ---

@torch.no_grad()
def update_teacher(teacher, student, step, decay):
    """theta_t <- alpha theta_t + (1 - alpha) theta_s with alpha = min(1 - 1/(step + 1), decay), in place.

    teacher, student  modules of the same shape; parameters and BatchNorm's running statistics alike are averaged, integer
                      buffers copied
    step              optimizer steps since the end of the warm-up; at 0 alpha is 0 and the teacher becomes the student
    decay             in [0, 1]. ValueError if the two modules do not have as many entries.
    """
    alpha = min(1 - 1 / (step + 1), decay)
    pairs = list(zip(teacher.state_dict().values(), student.state_dict().values(), strict=True))
    floats = [(t, s) for t, s in pairs if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in floats], [s for _, s in floats], 1 - alpha)
    for t, s in pairs:
        if not t.is_floating_point():
            t.copy_(s)


# 8 ----------------------------------------------------------------------------------------------- one training step ---

class Learner(NamedTuple):
    """Everything that a step changes."""
    student: nn.Module
    parallel: nn.Module                          # the student behind DistributedDataParallel; itself with one process
    teacher: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler


MEASURED = ("loss_x", "loss_u", "hardness", "confident", "cutmix")           # what loss_of_share reports of a share


def adapted_views(weak, strong, gamma, step, share, s):
    """Section 5 put together: (intensity view [B, 3, H, W], CutMix view or None, partners [B] and boxes bool [B, H, W] or None).

    The intensity view has strong colours, the less of them the harder the image. The CutMix view is made of weak images, with
    probability mean(1 - gamma) for the share, and mixes hard ones with easy ones. What s.adapt leaves out does not follow gamma.
    The draws are seeded by (s.seed, step, share) and come in the order coin, partners, boxes.
    """
    intensity = adapt_intensity(weak, strong, gamma) if "intensity" in s.adapt else strong
    generator = torch.Generator().manual_seed(int(np.random.default_rng((s.seed, step, share)).integers(2**63)))
    gamma = gamma.cpu()                                      # the host waits for the device
    if torch.rand((), generator=generator) >= ((1 - gamma).mean() if "cutmix" in s.adapt else 0.5):
        return intensity, None, None, None
    partner = pair_hard_easy(gamma) if "cutmix" in s.adapt else torch.randperm(len(gamma), generator=generator)
    partner, box = (x.to(weak.device, non_blocking=True) for x in (partner, cutmix_boxes(len(gamma), *weak.shape[2:], generator)))
    return intensity, torch.where(box.unsqueeze(1), weak[partner], weak), partner, box


def loss_of_share(learner, images, step, share, s):
    """Algorithm 1 and Figure 2 of the paper: the loss L_x + lambda_u L_u of one share, and its record.

    A share is the part of a step's batch that goes through the networks at once; images is an item of TrainingShares, on the
    device. L_u is the consistency loss of the intensity view; where a CutMix view is made, the mean over both views.
    The record is a dict: step, share, measured (the MEASURED, float [5]), and of the unlabeled images index int64 [B] and
    gamma [B]. In the warm-up and in a supervised run there are none: B is 0, and all that is measured but loss_x is 0.
    """
    student, teacher, device = learner.student, learner.teacher, images["image"].device
    views, targets = [normalize(images["image"])], []    # what the student is to see; the teacher's labels of the last ones
    gamma, index, confident = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64), torch.zeros((), device=device)
    mixed = None

    if "weak" in images:
        weak, strong = normalize(images["weak"]), normalize(images["strong"])
        valid, index = images["valid"], images["index"]
        # Both networks look at the weak view u; how far they disagree about it is its hardness.
        student.eval()
        with torch.no_grad(), autocast(device):
            logits_s, logits_t = student(weak), teacher(weak)                                 # [B, C, H, W]
        student.train()
        gamma = hardness(logits_s, logits_t, s.tau, s.background, valid)                      # [B]
        confidence, pseudo_label = logits_t.float().softmax(1).max(1)                         # [B, H, W]
        confident = ((confidence >= s.tau) & valid).sum() / valid.sum().clamp(min=1)
        targets.append({"pseudo_label": pseudo_label, "confidence": confidence, "valid": valid})
        # The student sees u once more although no loss looks at the result: BatchNorm's running statistics are to fit
        # undistorted images, those of the hardness above and of every evaluation.
        if s.weak_in_batch:
            views.append(weak)
        # The two views that follow hardness; of the CutMix view the labels are pasted together as the images are.
        intensity, mixed, partner, box = adapted_views(weak, strong, gamma, step, share, s)
        views.append(intensity)
        if mixed is not None:
            views.append(mixed)
            targets.append({name: torch.where(box, x[partner], x) for name, x in targets[0].items()})

    # The student looks at everything at once.
    with autocast(device):
        output = learner.parallel(torch.cat(views))
    logits, auxiliary = output if s.aux_weight else (output, None)
    label, logits = images["label"].long(), logits.split([len(view) for view in views])
    loss_x = labeled_loss(logits[0], label, s)
    if s.aux_weight:
        loss_x = loss_x + s.aux_weight * labeled_loss(auxiliary[:len(label)], label, s)
    losses_u = [consistency_loss(of_view, **target, tau=s.tau, gamma=gamma if "loss" in s.adapt else None)
                for of_view, target in zip(logits[-len(targets):], targets)]         # none without targets
    loss_u = torch.stack(losses_u).mean() if losses_u else torch.zeros_like(loss_x)

    fired = torch.full_like(confident, mixed is not None)
    measured = torch.stack([loss_x, loss_u, gamma.sum() / max(len(gamma), 1), confident, fired]).detach()
    return loss_x + s.lambda_u * loss_u, {"step": step, "share": share, "measured": measured, "index": index, "gamma": gamma}


def labeled_loss(logits, label, s):
    """L_x: plain cross entropy, or OHEM with threshold 0.7 and at least 100 000 pixels where s.ohem."""
    return ohem_cross_entropy(logits, label, 0.7, min_kept=100_000) if s.ohem else supervised_loss(logits, label)


def train_step(learner, batch, step, teacher_step, s, device):
    """One step: the gradient of the mean of the shares' losses, the student's update, the teacher's. Returns the records.

    batch         {number of the share: item of TrainingShares}, this process's shares of the step
    step          number of the step from 0; seeds CutMix
    teacher_step  passed to update_teacher: 0 makes the teacher a copy of the student, else steps since the end of the warm-up
    """
    student, parallel, teacher, optimizer, schedule, scaler = learner
    records = []
    for share, images in batch.items():
        images = {name: value.to(device, non_blocking=True) for name, value in images.items()}
        # The processes' gradients are averaged once a step, with the last share.
        with nullcontext() if parallel is student or share == max(batch) else parallel.no_sync():
            loss, record = loss_of_share(learner, images, step, share, s)
            scaler.scale(loss / len(batch)).backward()
        records.append(record)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    schedule.step()
    average_running_statistics(student)
    update_teacher(teacher, student, teacher_step, s.ema_decay)
    return records


def autocast(device):
    """Mixed precision on CUDA: bfloat16 where the GPU has it, else float16. Off elsewhere."""
    on = device.type == "cuda"
    half = torch.bfloat16 if on and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.autocast(device.type, dtype=half, enabled=on)


@torch.no_grad()
def average_running_statistics(student):
    """Make BatchNorm's running statistics the mean over the processes, unless SyncBatchNorm keeps them equal."""
    if world() > 1 and not any(isinstance(m, nn.SyncBatchNorm) for m in student.modules()):
        for buffer in (b for b in student.buffers() if b.is_floating_point()):
            dist.all_reduce(buffer)
            buffer /= world()


# 9 ------------------------------------------------------------------------------------------------------ evaluation ---

def confusion_matrix(prediction, target, num_classes):
    """int64 [C, C]: how many pixels of each true class (row) are predicted as each class (column).

    prediction, target: integer tensors of one shape with 0..C-1; where target is 255 the pixel is left out.
    """
    counted = (target != IGNORE).flatten()
    cell = torch.where(counted, target.long().flatten() * num_classes + prediction.long().flatten(), 0)
    count = torch.zeros(num_classes**2, dtype=torch.int64, device=target.device)
    return count.scatter_add_(0, cell, counted.long()).view(num_classes, num_classes)


def iou_per_class(confusion):
    """float64 [C] on the CPU: intersection over union of each class, NaN for a class in neither truth nor prediction."""
    confusion = confusion.cpu().double()
    hit = confusion.diagonal()
    return hit / (confusion.sum(0) + confusion.sum(1) - hit)                 # 0 / 0 is NaN


@torch.no_grad()
def predict(model, image):
    """Probabilities float [1, C, H, W] of one picture, uint8 [1, 3, H, W] on any device; `model` is in eval mode.

    The model's attribute `settings`, which `load` gives it, says how: the picture goes through whole, as one window; with
    `sliding` the result is the mean over windows of crop x crop, or as large as the picture where that is smaller. Each is 2/3
    of a window from the one before, and the last is flush with the border.
    """
    s, device = model.settings, next(model.parameters()).device
    if image.dtype != torch.uint8:
        raise ValueError(f"an image of {image.dtype}: predict takes uint8, 0 to 255")
    image = normalize(image.to(device, non_blocking=True))
    height, width = image.shape[2:]
    size = s.crop if s.sliding else max(height, width)
    total, count = image.new_zeros(1, s.num_classes, height, width), image.new_zeros(height, width)

    def starts(side):
        last, stride = max(side - size, 0), max(size * 2 // 3, 1)
        return [min(at, last) for at in range(0, last + stride, stride)]

    with autocast(device):
        for y in starts(height):
            for x in starts(width):
                window = (..., slice(y, y + size), slice(x, x + size))
                total[window] += model(image[window]).float().softmax(1)
                count[window] += 1
    return total / count


@torch.no_grad()
def evaluate(model, samples, device):
    """Confusion matrix [C, C] of `model`, in eval mode, over all `samples`.

    Pictures are looked at one by one and whole, each by one process, so that the number of processes changes nothing.
    """
    classes = model.settings.num_classes
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def count():
        for sample in samples[rank()::world()]:
            image, label = load_whole(sample, classes)
            confusion.add_(confusion_matrix(predict(model, image).argmax(1), label.to(device), classes))

    together(count)
    if world() > 1:
        dist.all_reduce(confusion)
    require(confusion.any(), f"the masks of the validation set hold nothing but {IGNORE}: there is nothing to score")
    return confusion


# 10 -------------------------------------------------------------------------------------------------------- the run ---

def rank():
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world():
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def gather(thing):
    """The list of every process's `thing`."""
    things = [thing] * world()
    if world() > 1:
        dist.all_gather_object(things, thing)
    return things


def together(act):
    """act() of every process; if one of them raises UserError, so do all."""
    result = trouble = None
    try:
        result = act()
    except UserError as error:
        trouble = str(error)
    for line in filter(None, gather(trouble)):
        raise UserError(line)
    return result


def set_up_device(name):
    """The device `name`, or the best there is, ready for use; the processes are joined over it."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), max(torch.cuda.device_count(), 1)
    require(name != "cuda" or here <= gpus, f"{here} processes, {gpus} GPU(s): lower --nproc-per-node")
    require(world() == 1 or ":" not in name, f"--device {name}: each of several processes takes a GPU of its own, say cuda")
    with explained(f"--device {name} cannot be used", "choose among cpu, cuda, cuda:1, mps"):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError("an unknown kind")
        torch.empty(1, device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")           # TF32 for what autocast leaves in float32
        torch.backends.cudnn.allow_tf32 = True
    if world() > 1 and not dist.is_initialized():
        with explained(f"{world()} processes (WORLD_SIZE) do not find each other", "start them by torchrun"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def build_model(s, weights=None):
    """The network of the Settings `s`, which are its attribute `settings`."""
    model = DeepLabV3Plus(s.num_classes, s.backbone, weights, s.output_stride, s.width, s.aux_weight > 0)
    model.settings = s
    return model


def build_learner(s, device, steps, weights="none"):
    """Student, teacher, optimizer and its schedule over `steps` steps, on `device`; `weights` are the backbone's, see Settings."""
    torch.manual_seed(s.seed)                              # for the first weights, the only use of the global generator
    student = together(lambda: build_model(s, None if weights == "none" else weights))
    student = student.to(device, memory_format=torch.channels_last).train()
    if world() > 1 and device.type == "cuda":
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    parallel = student
    if world() > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                # newer torch has another name for broadcast_buffers
            parallel = nn.parallel.DistributedDataParallel(    # BatchNorm's statistics are shared otherwise
                student, [device] if device.type == "cuda" else None, broadcast_buffers=False)
    backbone = list(student.backbone.parameters())
    head = [p for name, p in student.named_parameters() if not name.startswith("backbone.")]
    optimizer = torch.optim.SGD([{"params": backbone}, {"params": head, "lr": s.lr * s.head_lr}],
                                s.lr, s.momentum, weight_decay=s.weight_decay, foreach=True)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    needed = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)       # for float16
    scaler = torch.amp.GradScaler(device.type, enabled=needed)
    return Learner(student, parallel, teacher, optimizer, schedule, scaler)


def save(path, write):
    """Have write(a path beside it) make the file `path`: whole or not at all."""
    beside = path.with_name(path.name + ".new")
    try:
        with explained(f"cannot write {path}", "make room (a training then goes on with --resume), or write elsewhere (--out); what was there is whole"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(beside)
            os.replace(beside, path)
    finally:
        with suppress(OSError):                              # there only if it was not made whole
            beside.unlink()


def claim(out):
    """Make the folder `out` this run's own until `main` ends; UserError if another run is alive in it."""
    with explained(f"cannot use the folder {out}", "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        claim.file = open(out / "lock", "w")
        with suppress(ImportError):                          # on Windows another run is not noticed
            import fcntl
            try:
                fcntl.flock(claim.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is alive in {out} (one that was killed, for seconds): wait for it, or choose another --out") from None


claim.file = None


# Pictures of what happens

def class_colours(s):
    """[(r, g, b), ...]: the dataset's own; for up to 8 other classes Okabe's and Ito's, which the colour-blind can tell apart."""
    if s.dataset == "cityscapes":
        return [c.color for c in CITYSCAPES]
    if s.dataset == "camvid":
        return [(128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
                (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)]
    if s.num_classes <= 8:
        return [(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]
    # VOC's: the class's bits 0, 3, 6 are the highest of red, 1, 4, 7 of green, 2, 5 of blue.
    return [tuple(sum((k >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3)) for k in range(s.num_classes)]


def paint(labels, s):
    """Labels [H, W], 0..C-1 or 255, as a palette picture: the stored index is the class, 255 is white."""
    picture, colours = Image.fromarray(labels.to("cpu", torch.uint8).numpy()), class_colours(s)[:s.num_classes]
    picture.putpalette([v for colour in colours for v in colour] + [255] * 3 * (256 - len(colours)))
    return picture


def save_sheet(path, rows, titles, s):
    """Write a page of `rows`, (caption, pictures), under `titles` and above a legend of the classes."""
    font, first = ImageFont.load_default(13), rows[0][1][0]
    width, height = 200, min(max(round(200 * first.height / first.width), 60), 400)
    fitted = [pil_to_tensor(ImageOps.pad(p.convert("RGB"), (width, height), Image.Resampling.BOX, "white")) for _, row in rows for p in row]
    grid = to_pil_image(make_grid(torch.stack(fitted), len(titles), padding=4, pad_value=255))
    legend = [*zip(s.class_names.split(","), class_colours(s)), ("ignored", "white")]
    step = 30 + int(max(font.getlength(name) for name, _ in legend))
    per_line = max(grid.width // step, 1)
    page = ImageOps.expand(grid, (0, 20, 0, 4 + 20 * -(-len(legend) // per_line)), "white")
    draw = ImageDraw.Draw(page)
    for i, title in enumerate(titles):
        draw.text((4 + i * (width + 4), 4), title, "black", font)
    for i, (caption, _) in enumerate(rows):
        draw.text((9, 26 + i * (height + 4)), caption, "black", font, stroke_width=2, stroke_fill="white")
    for i, (name, colour) in enumerate(legend):
        x, y = 4 + i % per_line * step, grid.height + 24 + i // per_line * 20
        draw.rectangle((x, y, x + 14, y + 14), colour, "black")
        draw.text((x + 20, y), name, "black", font)
    save(path, lambda file: page.save(file, "PNG"))


def draw_samples(model, samples, path):
    """Write a sheet of up to five of `samples`: what `model` says of them."""
    rows, s = [], model.settings
    for sample in samples[::max(len(samples) // 5, 1)][:5]:
        image, truth = load_whole(sample, s.num_classes)
        confidence, label = predict(model, image)[0].max(0)
        rows.append((Path(sample.id).name, (to_pil_image(image[0]), paint(truth[0], s), paint(label, s), to_pil_image(confidence.cpu()))))
    save_sheet(path, rows, ("image", "truth", "teacher's prediction", "confidence (0 black, 1 white)"), s)


def draw_unlabeled(model, records, data, path):
    """Write a sheet of an epoch's two easiest and two hardest unlabeled images: training's views of them, the teacher as it is now.

    records: the epoch's, from which the views' draws follow. Of an epoch in which CutMix fired, images of those shares alone.
    """
    rows, s = [], data.s
    records = [r for r in records if r["measured"][-1]] or records           # the last of MEASURED: cutmix
    seen = sorted((g, n, i) for n, r in enumerate(records) for i, g in enumerate(r["gamma"].tolist()))
    for g, n, i in seen[:2] + seen[2:][-2:]:
        step, share, gamma = (records[n][name] for name in ("step", "share", "gamma"))
        images = data[data.keys(step, share)]
        weak = images["weak"]
        intensity, mixed, _, box = adapted_views(weak.float(), images["strong"].float(), gamma, step, share, s)
        mixed = torch.full_like(weak[i], 255) if mixed is None else mixed[i].byte()          # blank where there was none
        if box is not None and box[i].any():
            mixed = draw_bounding_boxes(mixed, masks_to_boxes(box[i:i + 1]), colors="magenta", width=math.ceil(s.crop / 100))
        confidence, label = predict(model, weak[i:i + 1])[0].cpu().max(0)
        colours = pil_to_tensor(paint(torch.where(images["valid"][i], label, IGNORE), s).convert("RGB"))
        pale = torch.where(confidence >= s.tau, colours, 191 + colours // 4)
        caption = f"hardness {g:.2f}: {Path(data.samples[UNLABELED][images['index'][i]].id).name}"
        rows.append((caption, [to_pil_image(view) for view in (weak[i], intensity[i].byte(), mixed, pale)]))
    if rows:
        save_sheet(path, rows, ("weak view", "intensity view", "CutMix view", f"pseudo-label (pale: under {s.tau:g})"), s)


def plot(runs, path):
    """Draw log.csv and hardness.csv of the folders `runs` into the picture `path`, each run in a colour of its own.

    mIoU, losses, mean hardness and confident pixels by epoch, and Figure 3c of the paper: the hardness of single images over the
    training, of some of the easiest and of the hardest on average. UserError without matplotlib.
    """
    tables, some = [], 4 if len(runs) == 1 else 1
    for run in runs:
        try:
            (names, *rows), (_, *images) = (list(csv.reader((run / name).read_text(encoding="utf-8").splitlines()))
                                            for name in ("log.csv", "hardness.csv"))
            log = dict(zip(names, np.array(rows, float).T, strict=True))
            [log[name] for name in ("epoch", "miou", *MEASURED)]             # LookupError unless all are there
            courses = {}                                                     # of each image: (epoch, hardness), ...
            for epoch, name, value in images:
                courses.setdefault(name, []).append((float(epoch), float(value)))
            tables.append((log, sorted(courses.values(), key=lambda course: np.mean(course, 0)[1])))
        except (OSError, ValueError, LookupError):
            raise UserError(f"--plot {run}: no run with an epoch behind it (whole log.csv and hardness.csv) is there") from None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("no curves drawn: pip install matplotlib, then python imas.py --plot RUN...") from None
    figure = Figure(figsize=(9, 6.4), dpi=100, layout="constrained")
    miou, loss, mean, single = axes = figure.subplots(2, 2).ravel()
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00") * len(runs)
    for run, (log, courses), colour in zip(runs, tables, colours):
        prefix, unlabeled = f"{run.name}: " * (len(runs) > 1), log["hardness"] > 0
        for axis, column, style, label, shown in (
                (miou, "miou", ".-", "mIoU", ~np.isnan(log["miou"])), (loss, "loss_x", "-", "labeled, L_x", log["epoch"] > 0),
                (loss, "loss_u", "--", "unlabeled, L_u", unlabeled), (mean, "hardness", "-", "hardness", unlabeled),
                (mean, "confident", "--", "confident pixels", unlabeled), (single, "hardness", "-", "mean", unlabeled)):
            if shown.any():
                axis.plot(log["epoch"][shown], log[column][shown], style, color=colour, label=prefix + label, lw=3 if axis is single else 1.5)
        for kind, chosen, style in (("easiest", courses[:some], "-"), ("hardest", courses[some:][-some:], ":")):
            for i, course in enumerate(chosen):
                single.plot(*zip(*course), style, color=colour, label=None if i else prefix + kind, lw=1)
    for axis, label in zip(axes, ("mIoU of the teacher [%]", "loss", "hardness, confidence [0 to 1]", "hardness of single images [0 to 1]")):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    save(path, lambda file: figure.savefig(file, format="png"))
    print(f"curves of {len(runs)} run(s): {path}")


TRAINED = ("student", "teacher", "optimizer", "schedule", "scaler")          # what last.pt holds of a Learner


def open_run(s, device, resume, total, shares, ids):
    """The learner, and the rest of a run's state, a dict: new, or as the run in the folder s.out left them where `resume` finds one.

    total: steps of the run; shares: a step's; ids: of the labeled, unlabeled and validation images. UserError unless the folder is free, or this very run's.
    """
    out, last = Path(s.out), Path(s.out, "last.pt")
    found = gather(resume and last.exists())[0]              # as process 0 sees it
    files = ("last.pt", "best.pt", "settings.json", "log.csv", "hardness.csv", "samples.png", "unlabeled.png", "curves.png")
    holds = gather([name for name in files if (out / name).exists()])[0]
    require(found or not holds, f"{out} holds {', '.join(holds)} already" + (
        ", but no last.pt to resume from: " if resume else ": go on with --resume, or ") + "choose another --out, or delete that folder")
    together(lambda: claim(out) if rank() == 0 else None)
    learner = build_learner(s, device, total, "none" if found else s.weights)
    run = {"shares": shares, "ids": ids, "step": 0, "best": -1.0, "records": [], "log.csv": "", "hardness.csv": ""}
    if found:
        state = together(lambda: load_checkpoint(last, *run, *TRAINED))
        require(state["shares"] == shares,
                f"{out} was begun with {state['shares']} share(s) a step, this is {shares}: keep processes x --accumulate")
        require(state["ids"] == ids,
                f"{out} was begun with other images or labels: bring the id lists and masks back, or choose another --out")
        run = {name: state[name] for name in run}
        for name in filter(state.get, TRAINED):              # a GradScaler that is not needed has an empty state
            getattr(learner, name).load_state_dict(state[name])
    return learner, run


def save_run(s, learner, run):
    """Process 0 writes the checkpoint last.pt, settings.json and the tables."""
    if rank() == 0:
        out, settings = Path(s.out), dataclasses.asdict(s)
        state = {"settings": settings, **run, **{name: getattr(learner, name).state_dict() for name in TRAINED}}
        save(out / "last.pt", lambda file: torch.save(state, file))
        save(out / "settings.json", lambda file: file.write_text(json.dumps(settings | {"shares": run["shares"]}, indent=1) + "\n"))
        for name in filter(run.get, ("log.csv", "hardness.csv")):
            save(out / name, lambda file: file.write_text(run[name], encoding="utf-8"))


def train(s, device, resume):
    """Train by the Settings `s`, from the start or from where the run in the folder s.out stopped."""
    shares, mine = world() * s.accumulate, range(rank() * s.accumulate, (rank() + 1) * s.accumulate)
    require(s.batch % shares == 0 and s.batch >= 2 * shares,
            f"--batch {s.batch} does not make {shares} equal shares (processes x --accumulate) of at least 2 images")
    labeled, unlabeled, validation, note = together(lambda: find_data(s))
    data, out = TrainingShares(labeled, unlabeled, shares, s), Path(s.out)
    steps, total = data.steps, s.epochs * data.steps         # of an epoch, of the run
    learner, run = open_run(s, device, resume, total, shares, [[x.id for x in part] for part in (labeled, unlabeled, validation)])

    def on_signal(number, frame):
        nonlocal signalled
        signalled = number
        signal.signal(number, signal.SIG_DFL)                # the same signal a second time does what it always does

    signalled, trouble = 0, None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    keys = (data.keys(step, share) for step in range(run["step"], total) for share in mine)
    batches = iter(DataLoader(data, batch_size=None, sampler=keys, num_workers=s.workers,
                              worker_init_fn=leave_signals_to_parent, pin_memory=device.type == "cuda"))
    if rank() == 0:
        n = s.batch // shares
        how = f"from step {run['step']} on, " if run["step"] else "nothing to resume, " if resume else ""
        print(f"{s.dataset}: {len(labeled)} labeled images ({note}), {len(unlabeled)} unlabeled, {len(validation)} for validation\n"
              f"{s.method}: {s.epochs} epochs of {steps} steps, {world()} process(es) x {s.accumulate} share(s) of "
              f"{f'{2 * n} labeled' if s.method == 'supervised' else f'{n} + {n}'} images, on {device}, {how}into {out}", flush=True)
    fresh, first = [], run["step"]                           # records that are still on the device
    begun = epoch_begun = saved = time.monotonic()
    while True:
        step, batch = run["step"], None
        try:
            batch = {share: next(batches) for share in mine} if step < total else None
        except UserError as error:
            trouble = str(error)
        # Between two steps. All processes act on what any of them has met, and on the clock of process 0.
        signals, due, troubles = zip(*gather((signalled, time.monotonic() - saved > 60 * s.save_every, trouble)))
        stop, trouble = max(signals), next(filter(None, troubles), None)
        epoch_ends = step % steps == 0
        to_save = epoch_ends or stop or trouble or due[0]
        if fresh and (step % 10 == 0 or to_save):            # seldom, for the host waits for the device here
            run["records"] += look(fresh, learner.student, data, f"epoch {(step - 1) // steps + 1}/{s.epochs}  step {step}/{total}",
                                   (time.monotonic() - begun) / (step - first), total - step)
            fresh = []
        if epoch_ends and run["records"] and not (stop or trouble):
            try:
                together(lambda: end_epoch(step // steps, run, learner, data, validation, device, epoch_begun))
                epoch_begun = time.monotonic()
            except UserError as error:                       # a broken picture, say; resuming ends the epoch once more
                trouble = str(error)
        if to_save and not (trouble and step == 0):          # at the start, too, unless it fails: then the folder stays free
            together(lambda: save_run(s, learner, run))
            saved = time.monotonic()
        require(not trouble, trouble)
        if stop:
            tell(f"stopped by {signal.Signals(stop).name} after step {step}, saved; go on with the same command and --resume", last=True)
            raise SystemExit(128 + stop)
        if step == total:
            break
        # The teacher stays a copy of the student through the warm-up and the first epoch after it, as in the released code.
        teacher_step = step - s.warmup_epochs * steps if step // steps > s.warmup_epochs else 0
        fresh += train_step(learner, batch, step, teacher_step, s, device)
        run["step"] += 1
    if rank() == 0:
        try:
            plot([out], out / "curves.png")
        except UserError as error:                           # no matplotlib
            print(error)
        print(f"done in {(time.monotonic() - begun) / 60:.1f} minutes; the teacher's best mIoU is {run['best']:.2f}\n"
              f"{out}: {', '.join(sorted(path.name for path in out.iterdir() if path.name != 'lock'))}\n"
              f"score again with --eval {out / 'best.pt'}, label pictures with --predict FOLDER --checkpoint {out / 'best.pt'} --out MASKS")


def end_epoch(epoch, run, learner, data, validation, device, begun):
    """Evaluate the teacher, where s.eval_every says so; turn the epoch's records into rows and pictures; keep best.pt."""
    s, out, miou, records = data.s, Path(data.s.out), math.nan, run["records"]
    if epoch % s.eval_every == 0 or epoch == s.epochs:
        miou = 100 * iou_per_class(evaluate(learner.teacher, validation, device)).nanmean().item()
        if rank() == 0:
            draw_samples(learner.teacher, validation, out / "samples.png")
            draw_unlabeled(learner.teacher, records, data, out / "unlabeled.png")
    means = torch.stack([r["measured"] for r in records]).double().mean(0).tolist()
    row = {"epoch": epoch, "steps": run["step"], "lr": learner.optimizer.param_groups[0]["lr"], **dict(zip(MEASURED, means)),
           "miou": miou, "seconds": time.monotonic() - begun}
    gammas = sorted((data.samples[UNLABELED][i].id, g) for r in records for i, g in zip(r["index"].tolist(), r["gamma"].tolist()))
    content = {"settings": dataclasses.asdict(s), "epoch": epoch, "miou": miou, "teacher": learner.teacher.state_dict()}
    if miou > run["best"] and rank() == 0:                   # NaN, not evaluated, is not
        save(out / "best.pt", lambda file: torch.save(content, file))
    # From here on nothing is written: the epoch is ended as a whole, or not at all.
    for name, header, rows in (("log.csv", list(row), [[f"{v:.6g}" for v in row.values()]]),
                               ("hardness.csv", ["epoch", "id", "hardness"], [[epoch, i, f"{g:.6f}"] for i, g in gammas])):
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(rows if run[name] else [header, *rows])
        run[name] += lines.getvalue()
    run["best"], run["records"] = max(run["best"], miou), []                 # in this order NaN is not more
    shown = [f"{name} {value:.4g}" for name, value in list(row.items())[2:] if value == value]           # not a mIoU that was not measured
    tell(f"epoch {epoch}/{s.epochs}  {'  '.join(shown)}", last=True)


def look(fresh, student, data, place, seconds, left):
    """Show how the run goes; returns the records `fresh` of all processes on the CPU. UserError if a loss or a weight is not finite.

    seconds: that a step took; left: steps to go.
    """
    s = data.s
    fresh = [{name: value.cpu() if torch.is_tensor(value) else value for name, value in record.items()} for record in fresh]
    records = sorted(sum(gather(fresh), []), key=lambda record: (record["step"], record["share"]))
    weights = torch.stack([value.isfinite().all() for value in student.state_dict().values()]).all()
    bad = [record for record in records if not record["measured"].isfinite().all()] + records[-1:] * (not weights)
    if bad:
        step, share = bad[0]["step"], bad[0]["share"]
        names = [data.samples[stream][index].id for stream, _, _, index in data.keys(step, share)]
        raise UserError(f"the loss or the weights are not finite at step {step}, images {', '.join(names)}: look at these images, or begin "
                        f"again with a lower --lr and another --out; what was good before is in {Path(s.out) / 'last.pt'}")
    loss_x, loss_u, gamma = torch.stack([record["measured"][:3] for record in records]).mean(0).tolist()
    tell(f"{place}  loss {loss_x + s.lambda_u * loss_u:.3f}  hardness {gamma:.2f}  {2 * s.batch / seconds:.1f} images/s  "
         f"{datetime.timedelta(seconds=round(seconds * left))} left", last=False)
    return records


def tell(line, last):
    """Print a line of progress: over the one before on a terminal (until `last`), else at most one in half a minute."""
    if rank() == 0 and sys.stdout.isatty():
        print(f"\r{line if last else line[:shutil.get_terminal_size().columns - 1]}\x1b[K", end="\n" if last else "", flush=True)
    elif rank() == 0 and (last or time.monotonic() - tell.time > 30):
        print(line, flush=True)
        tell.time = time.monotonic()


tell.time = 0.0


def leave_signals_to_parent(worker):
    """In a loader's worker: ignore Ctrl-C and torchrun's SIGTERM, which reach all processes. `main` ends the workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# 11 ----------------------------------------------------------------------------------------------- the command line ---

def parse(argv):
    """The command line as (Settings, what to do: a namespace of resume, eval, predict, checkpoint, plot).

    A setting is the flag's value where given; else, in turn, the checkpoint's, the dataset's preset's, the field's default.
    """
    def on_or_off(text):
        return bool(("off", "on").index(text))

    def class_or_none(text):
        return None if text == "none" else int(text)

    def fail(message):                                       # argparse's errors are told as all others are
        raise UserError(f"{message}; --help lists all flags")

    on_or_off.__name__, class_or_none.__name__ = "on/off", "class (or none)"
    parser = argparse.ArgumentParser(prog="imas.py", allow_abbrev=False,
                                     description="Semi-supervised semantic segmentation by iMAS; see the README. [in brackets]: "
                                     "what holds unless the dataset has a value of its own, as the README's table of presets shows.")
    parser.error = fail
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--resume", action="store_true", help="go on with the run in --out where it stopped; begin it if there is none")
    what.add_argument("--eval", metavar="CKPT", help="score this checkpoint on the validation set, train nothing")
    what.add_argument("--predict", metavar="IMAGE", nargs="+",
                      help="write masks and overlays of these images, folders or patterns into --out")
    what.add_argument("--plot", metavar="RUN", nargs="+", help="draw the curves of these runs into one picture, train nothing")
    parser.add_argument("--checkpoint", metavar="CKPT", help="the network for --predict")
    for field in dataclasses.fields(Settings):
        kind = {bool: on_or_off, int | None: class_or_none}.get(field.type, field.type)
        choices, default = field.metadata.get("choices"), ("off", "on")[field.default] if field.type is bool else field.default
        parser.add_argument(flag(field.name), type=kind, choices=choices, default=argparse.SUPPRESS, help=field.metadata["help"] + (
            f" [{default}]" if default != "" else ""), metavar=None if choices else "on|off" if field.type is bool else field.name.upper())
    todo = parser.parse_args(argv)
    given = {field.name: todo.__dict__.pop(field.name) for field in dataclasses.fields(Settings) if field.name in todo}
    require(todo.checkpoint and given.get("out") and all(todo.predict) if todo.predict else todo.checkpoint is None,
            "--predict IMAGE... --checkpoint CKPT --out FOLDER belong together")
    for name in {"dataset", "root", "labeled"} & set(given):                 # a path is to hold wherever it is read again
        value, no_path = given[name], {"dataset": given[name] in PRESETS, "labeled": given[name].isdecimal()}
        given[name] = value if not value or no_path.get(name) else str(Path(value).resolve())
    checkpoint = todo.checkpoint or todo.eval
    if checkpoint is None:
        base = PRESETS.get(given.get("dataset", "demo"), {})
    else:                                                    # trained elsewhere, maybe
        base = load_checkpoint(checkpoint)["settings"] | {"device": ""}
    for name, follows in (("dataset", "root"), ("num_classes", "class_names")):
        if name in given and given[name] != base.get(name):
            base = base | {follows: ""}
    s = Settings(**base | given)
    if todo.plot:
        s.out = s.out or str(Path(todo.plot[0]) if len(todo.plot) == 1 else Path(todo.plot[0]).parent)
        return s, todo
    s.out = s.out or str(Path("runs", "-".join((Path(s.dataset).resolve().name, Path(s.labeled).stem, s.method, str(s.seed)))))
    if todo.resume and Path(s.out, "last.pt").exists():
        begun = Settings(**load_checkpoint(Path(s.out, "last.pt"))["settings"] | {"out": s.out})
        free = ("workers", "device", "save_every", "accumulate", "class_names", "weights", "root")
        s = dataclasses.replace(begun, **given)
        for name in given:
            was, value = getattr(begun, name), getattr(s, name)
            require(name in free or value == was, f"{s.out} was begun with {flag(name)} {was}, not {value}: leave it out, or choose another --out")
    check_settings(s)
    s.workers = min(s.workers, os.cpu_count() or 1)
    return s, todo


def load_checkpoint(path, *needed):
    """The content of the checkpoint file `path`, a dict; UserError unless it holds settings, a teacher, and all that is `needed`."""
    require(Path(path).is_file(), f"there is no checkpoint {path}: take a last.pt or best.pt of a run")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        Settings(**content["settings"]), [content[name] for name in ("teacher", *needed)]                # an error unless all are there
        return content
    except Exception:                            # cut off, of another program, a plain state dict
        raise UserError(f"{path} is not a whole checkpoint of this program: take a last.pt or best.pt, or begin anew in another --out") from None


def load(checkpoint, device="cpu", s=None):
    """The teacher in the file `checkpoint`, in eval mode on `device`, ready for `predict`.

    Its attribute `settings` are the run's, or `s`. UserError if the file is no checkpoint, or does not fit the Settings `s`.
    """
    content = load_checkpoint(checkpoint)
    model = build_model(s or Settings(**content["settings"]))
    with explained(f"{checkpoint} does not fit", "leave --num-classes, --backbone, --width and --aux-weight out"):
        model.load_state_dict(content["teacher"])
    return model.to(device, memory_format=torch.channels_last).eval()


def score(s, checkpoint, device):
    """Print the IoU of each class, their mean and the pixel accuracy of the teacher in `checkpoint`; write them beside it as JSON."""
    samples = together(lambda: find_validation(s))
    confusion = evaluate(together(lambda: load(checkpoint, device, s)), samples, device).cpu()
    if rank() == 0:
        iou = 100 * iou_per_class(confusion)
        result = {"checkpoint": str(checkpoint), "data": str(data_root(s)), "images": len(samples), "miou": iou.nanmean().item(),
                  "pixel_accuracy": 100 * (confusion.trace() / confusion.sum()).item(),
                  "classes": [{"name": name, "iou": None if v != v else v} for name, v in zip(s.class_names.split(","), iou.tolist())]}
        for k, entry in enumerate(result["classes"]):
            print(f"{k:3d}  {entry['name']:20}" + ("   in no picture" if entry["iou"] is None else f"  IoU {entry['iou']:6.2f}"))
        print(f"mIoU {result['miou']:.2f}  pixel accuracy {result['pixel_accuracy']:.2f}  ({len(samples)} images)")
        save(Path(checkpoint).with_suffix(".json"), lambda file: file.write_text(json.dumps(result, indent=1) + "\n"))


def find_pictures(patterns):
    """The files that `patterns` (files, folders, glob patterns) name, each once and in order."""
    pictures = {}
    for pattern in patterns:
        as_it_is = glob.escape(pattern)                      # brackets may be part of a name; hidden files are left out
        names = glob.glob(as_it_is + "/*") or glob.glob(as_it_is) or glob.glob(pattern, recursive=True)
        found = [path for path in map(Path, sorted(names)) if path.is_file()]
        require(found, f"--predict {pattern}: no such file, and no file in such a folder (for those in its folders say '{pattern}/**/*')")
        pictures |= {path.resolve(): path for path in found}
    return list(pictures.values())


def predict_pictures(s, patterns, checkpoint, device):
    """Write a mask and an overlay for each picture; UserError at the end if some could not be done."""
    model, pictures, faults = load(checkpoint, device, s), find_pictures(patterns), []
    for done, path in enumerate(pictures, 1):
        mask, overlay = (Path(s.out, path.stem + end) for end in (".png", "_overlay.png"))
        try:
            picture = read_image(path)
            for file in (mask, overlay):                     # a picture, or what another picture of this name gave
                require(not file.exists(), f"{file} is there already: choose another --out")
            label = predict(model, pil_to_tensor(picture)[None])[0].argmax(0).cpu()
        except (UserError, OSError, RuntimeError, MemoryError) as error:     # no picture; too long a name; too large for the memory
            faults.append(f"{path} ({(str(error) or 'out of memory').splitlines()[0]})")
            continue
        painted, seen = paint(label, s), to_pil_image((label != (-1 if s.background is None else s.background)).byte() * 255)
        overlaid = Image.composite(Image.blend(picture, painted.convert("RGB"), 0.5), picture, seen)
        save(mask, lambda file: painted.save(file, "PNG"))
        save(overlay, lambda file: overlaid.save(file, "PNG"))
        tell(f"{done} of {len(pictures)} pictures", last=False)
    tell(f"masks and overlays of {len(pictures) - len(faults)} pictures are in {s.out}", last=True)
    require(not faults, f"{len(faults)} of {len(pictures)} files gave no mask: {some_of(faults)}")


def draw_demo(root):
    """Process 0 draws the demo's scenes into the folder `root` if it is not there yet."""
    if rank() == 0 and not root.exists():
        with explained(f"cannot draw the demo into {root}", "run 'python data/prepare.py demo --root FOLDER', then say --root FOLDER"):
            runpy.run_path(str(HERE / "data" / "prepare.py"))["demo"](root)


def main(argv=None):
    """Do what the command line `argv` says (None: this process's own). A mistake in it ends in SystemExit(2) after one line."""
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGCHLD") if hasattr(signal, name)]
    handlers, children = {number: signal.getsignal(number) for number in signals}, torch.multiprocessing.active_children()
    try:
        s, todo = parse(argv)
        if todo.plot:
            return plot([Path(run) for run in todo.plot], Path(s.out, "curves.png" if len(todo.plot) == 1 else "compare.png"))
        device = set_up_device(s.device)
        if s.dataset == "demo" and not s.root and not todo.predict:
            together(lambda: draw_demo(data_root(s)))
        if todo.predict and rank() == 0:         # one process is enough for it
            predict_pictures(s, todo.predict, todo.checkpoint, device)
        elif todo.eval:
            score(s, todo.eval, device)
        elif not todo.predict:
            train(s, device, todo.resume)
    except UserError as error:
        # An error from a loader's worker comes with the worker's traceback in front; the last line is the message. Once joined, all
        # processes have the same error; before, each machine may have its own.
        if rank() == 0 or not dist.is_initialized() and os.environ.get("LOCAL_RANK") == "0":
            print("\n" * sys.stdout.isatty() + "imas.py: " + str(error).strip().rpartition("UserError: ")[2], file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:                # out of memory, maybe one process alone
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        print(f"imas.py: {str(error).splitlines()[0][:200]}: raise --accumulate, lower --batch or --crop, take a smaller --backbone; in evaluation --sliding on",
              file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:                      # nobody reads on: python imas.py ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:                    # outside training, which saves first
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise when a loader's worker is ended
        for worker in set(torch.multiprocessing.active_children()) - set(children):
            worker.kill()
            worker.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if claim.file:
            claim.file.close()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

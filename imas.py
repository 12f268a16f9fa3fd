"""iMAS: instance-specific and model-adaptive supervision for semi-supervised segmentation.

Zhao et al., CVPR 2023, arXiv 2211.11335, in one file, to be read beside the paper.

    python imas.py                                             the demo: on a CPU, in minutes
    torchrun imas.py --dataset voc --labeled 183               VOC, on one GPU
    python imas.py --dataset PATH --num-classes N --labeled K  your own pictures

A student network learns from a few labeled images and many unlabeled ones. Their labels are made up
by a teacher, whose weights are the running mean of the student's. Where the two disagree about an
image or are unsure, it is hard: its labels are not to be trusted, and distorting it would hurt.
Each has a hardness gamma in [0, 1] (section 4), which steers how it is distorted and mixed (5), and
how much it counts (6); as the two learn to agree, more is asked. Section 8, share_loss, is the
algorithm: begin there. "Released" is the authors' code.
"""

import argparse
import copy
import csv
import dataclasses
import inspect
import json
import math
import os
import re
import runpy
import sys
import time
import traceback
from collections import defaultdict, namedtuple
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageColor, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import Conv2dNormActivation, masks_to_boxes
from torchvision.transforms.functional import adjust_hue, pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
IGNORE = 255  # label of pixels that no loss or score sees
# Channels-last, but on MPS, where BatchNorm's gradients were wrong in it.
LAYOUT = torch.contiguous_format if torch.backends.mps.is_available() else torch.channels_last
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for its weights


class UserError(Exception):
    """A mistake of the user's: what is wrong, where, what to do, in one line."""


def require(fine, line):
    """Raise UserError(line) unless `fine`."""
    if not fine:
        raise UserError(line)


@contextmanager
def explained(what, advice):
    """Turn errors into UserError."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} ({reason}): {advice}") from None


# 1 ---------- settings

@dataclasses.dataclass
class Settings:
    """All settings, each a flag with its comment for help; PRESETS override these defaults."""
    dataset: str = "demo"  # demo, voc, cityscapes, camvid, or a folder
    root: str = ""  # folder of the data: data/DATASET
    out: str = ""  # folder of the run: runs/DATASET-LABELED-METHOD-SEED
    labeled: str = ""  # how many images keep labels, or a list of ids
    method: Literal["imas", "uniform", "supervised"] = "imas"  # uniform: --adapt none
    adapt: str = "intensity,cutmix,loss"  # which of these follow hardness, or none
    num_classes: int = 0  # in the masks, background included
    class_names: str = ""  # from class 0 on: sky,road,...
    background: int | None = 0  # class left out of hardness; or none
    backbone: Literal["resnet8", "resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    weights: Literal["imagenet", "none"] = "imagenet"  # of the backbone
    output_stride: Literal[8, 16] = 16  # 8 is finer, three times slower
    width: int = 256  # channels of ASPP and decoder
    base_size: int = 0  # long side before scaling, in evaluation at most; 0: as it is
    min_scale: float = 0.5  # random scaling from here ...
    max_scale: float = 2.0  # ... to here
    crop: int = 513  # side in pixels
    batch: int = 16  # labeled images a step, and unlabeled ones, of all processes
    accumulate: int = 1  # shares of a process's batch; raise it to save memory
    epochs: int = 80  # passes over the unlabeled images, warm-up included
    warmup_epochs: int = 0  # supervised ones; without weights take a few
    lr: float = 0.001  # falls as (1 - step/steps)^0.9
    head_lr: float = 10.0  # factor of lr for all but the backbone
    momentum: float = 0.9  # of SGD
    weight_decay: float = 1e-4  # of SGD
    tau: float = 0.95  # confidence from which pseudo-labels count
    lambda_u: float = 3.0  # weight of the unlabeled loss
    ema_decay: float = 0.996  # of the teacher; lower for short runs
    ohem: bool = False  # learn from the hardest labeled pixels alone
    aux_weight: float = 0.0  # of an auxiliary head on layer3; 0: none
    sliding: bool = False  # evaluate by overlapping windows of crop x crop
    eval_every: int = 1  # epochs, and at the end
    workers: int = 4  # that load pictures
    seed: int = 0  # of every draw
    device: str = ""  # cpu, cuda, cuda:1, mps; else the best

    def __post_init__(self):
        name, labels = Path(self.dataset).name, Path(self.labeled).stem
        preset = f"{HERE}/data/{self.dataset}" if self.dataset in PRESETS else self.dataset
        self.root = self.root or preset
        self.out = self.out or f"runs/{name}-{labels}-{self.method}-{self.seed}"
        self.adapt = "none" if self.method == "uniform" else self.adapt
        self.class_names = self.class_names or ",".join(map(str, range(self.num_classes)))


VOC = "background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse," \
      "motorbike,person,pottedplant,sheep,sofa,train,tvmonitor"
CITYSCAPES = [c.name for c in torchvision.datasets.Cityscapes.classes if 0 <= c.train_id < 19]
CAMVID = "sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist"
PRESETS = {
    "voc": dict(num_classes=21, class_names=VOC, backbone="resnet101", base_size=500),
    # As released, hardness leaves out Cityscapes' class 0, road, too.
    "cityscapes": dict(
        num_classes=19, class_names=",".join(CITYSCAPES), base_size=2048, crop=769, lr=0.01,
        head_lr=1.0, weight_decay=5e-4, epochs=240, tau=0.7, ohem=True, aux_weight=0.4,
        sliding=True),
    "camvid": dict(
        num_classes=11, class_names=CAMVID, background=None, backbone="resnet18", weights="none",
        width=64, base_size=240, crop=128, batch=4, lr=0.005, head_lr=1.0, tau=0.8, epochs=28,
        warmup_epochs=12),
    "demo": dict(
        num_classes=6, class_names="background,disc,square,triangle,cross,ring", labeled="16",
        backbone="resnet8", weights="none", width=64, base_size=64, crop=64, lr=0.03, head_lr=1.0,
        tau=0.8, lambda_u=1.0, ema_decay=0.99, epochs=70, warmup_epochs=1, eval_every=5,
        workers=0),
}


def check_settings(s):
    """UserError for the first value out of its limits."""
    for name, value in vars(s).items():
        low = {"crop": 32, "width": 1, "accumulate": 1, "epochs": 1, "eval_every": 1}.get(name, 0)
        high = {"momentum": 1, "tau": 1, "ema_decay": 1, "min_scale": s.max_scale}.get(name, 1e9)
        require(type(value) not in (int, float) or low <= value <= high,
                f"--{name.replace('_', '-')} {value} is not from {low} to {high:g}")
    names, classes = s.class_names.split(","), range(s.num_classes)
    require(1 < s.num_classes < 256, "--num-classes is missing, or not from 2 to 255")
    require(len(names) == len(classes), f"--class-names: {len(names)} for {len(classes)} classes")
    require(s.background in (None, *classes), f"--background {s.background} is no class, nor none")
    require(s.backbone != "resnet8" or s.weights == "none", "--backbone resnet8: --weights none")
    require(s.adapt == "none" or set(s.adapt.split(",")) <= {"intensity", "cutmix", "loss"},
            f"--adapt {s.adapt}: choose among intensity,cutmix,loss; or none")


# 2 ---------- data

Sample = namedtuple("Sample", "id image mask")  # mask: None where labels are not to be read


def read_ids(path):
    """The ids in a list, one a line. A path names its id: JPEGImages/x.jpg is x."""
    with explained(f"no list {path}", "see --root, or python data/prepare.py"):
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    around = r"^[./]*(JPEGImages/)?|\.(jpe?g|png|bmp|gif|tiff?|webp)(\s.*)?$"
    ids = [re.sub(around, "", line.strip(), flags=re.I) for line in lines if line.strip()]
    require(ids, f"the list {path} is empty: write an id a line")
    return list(dict.fromkeys(ids))


def find_samples(s, ids, with_masks):
    """The files of `ids`, a list of Sample. UserError for the first that is unfit."""
    folder, found, samples = Path(s.root, "JPEGImages"), defaultdict(list), []
    for path in folder.rglob("*"):
        if path.suffix.lower() in Image.registered_extensions():
            found[path.relative_to(folder).with_suffix("").as_posix()].append(path)
    for name in ids:
        advice = f"mend it, or take {name} off the list"
        require(len(found[name]) == 1, f"{len(found[name])} pictures {folder / name}.*: {advice}")
        mask = Path(s.root, "SegmentationClass", f"{name}.png") if with_masks else None
        samples.append(Sample(name, found[name][0], mask))
        with explained("no readable picture or mask", advice):
            sizes = [sorted(Image.open(path).size) for path in samples[-1][1:] if path]
        require(sizes[0] == sizes[-1], f"{mask} and its image differ in size, {sizes}: {advice}")
    return samples


def find_data(s):
    """The images of a run, labeled, unlabeled, validation; and where the labels are from."""
    folder, listed = Path(s.root, "ImageSets/Segmentation"), Path(s.labeled)
    train = folder / ("train_aug.txt" if (folder / "train_aug.txt").is_file() else "train.txt")
    validation, pool = find_samples(s, read_ids(folder / "val.txt"), True), read_ids(train)
    require(s.labeled, "--labeled is missing: a number of images, or a list of ids")
    if s.labeled.isdecimal():
        listed = Path(s.root, "splits", s.labeled, "labeled.txt")
    if listed.is_file() or not s.labeled.isdecimal():
        labeled, note = read_ids(listed), f"listed in {listed}"
        rest = listed.with_name("unlabeled.txt")
        pool = read_ids(rest) if rest.is_file() else pool
    else:
        masked = [i for i in pool if Path(s.root, "SegmentationClass", f"{i}.png").is_file()]
        require(0 < int(s.labeled) <= len(masked),
                f"--labeled {s.labeled}: of {train} {len(masked)} have a mask; take 1 to that many")
        draw = np.random.default_rng(s.seed).permutation(len(masked))[:int(s.labeled)]
        labeled = [masked[i] for i in draw]
        note = f"drawn with seed {s.seed} from the {len(masked)} with a mask in {train.name}"
    unlabeled = sorted(set(pool) - set(labeled))
    both = sorted({sample.id for sample in validation} & {*labeled, *unlabeled})
    require(not both, f"in val.txt and for training too: {both[:3]}: take them off one list")
    require(len(unlabeled) >= s.batch,
            f"{len(unlabeled)} unlabeled images for steps of {s.batch}: lower --labeled or --batch")
    return find_samples(s, labeled, True), find_samples(s, unlabeled, False), validation, note


def decode(path):
    """The picture in a file as a PIL image, turned as its camera says."""
    with explained(f"cannot decode {path}", "replace it, or take it off the lists"):
        return ImageOps.exif_transpose(Image.open(path))


def read_image(path):
    """The picture in a file as a PIL image in RGB."""
    image = decode(path)
    require(image.mode[0] not in "IF", f"{path} has mode {image.mode}: save it with 8 bits a band")
    return image.convert("RGB")


def read_sample(sample, num_classes):
    """Image and mask, PIL images of one size; the mask holds classes, 0..num_classes-1, or 255: the
    stored values, not a palette's colours."""
    image = read_image(sample.image)
    if sample.mask is None:
        return image, Image.new("L", image.size)
    mask = decode(sample.mask)
    labels = np.array(mask)
    stored = set(np.unique(labels).tolist())
    fine = labels.ndim == 2 and stored <= {*range(num_classes), IGNORE}
    black_and_white = mask.mode == "L" and num_classes == 2 and stored == {0, IGNORE}
    require(fine and not black_and_white, f"the mask {sample.mask} ({mask.mode}) holds "
            f"{sorted(stored)[:9]}, for classes 0 to {num_classes - 1} or {IGNORE}: "
            "see data/prepare.py own")
    require(mask.size == image.size, f"{sample.mask} lies on its side: turn it as its image")
    return image, Image.fromarray(labels.astype(np.uint8))


def weak_augment(image, mask, s, rng):
    """A_w: random scale, crop and flip of a PIL image and its mask, at most crop x crop.

    As resize-then-crop, up to rounding, but the window alone is resampled.
    """
    factor = rng.uniform(s.min_scale, s.max_scale)
    factor *= s.base_size / max(image.size) if s.base_size else 1
    width, height = (max(1, round(side * factor)) for side in image.size)
    w, h = min(width, s.crop), min(height, s.crop)
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    flip, sx, sy = rng.random() < 0.5, image.width / width, image.height / height
    box = (x * sx, y * sy, min((x + w) * sx, image.width), min((y + h) * sy, image.height))
    image = image.resize((w, h), Image.BILINEAR, box=box)
    mask = mask.resize((w, h), Image.NEAREST, box=box)
    return (ImageOps.mirror(image), ImageOps.mirror(mask)) if flip else (image, mask)


STRONG = (  # A_s: an operation on an image and a magnitude, and the magnitude's range
    (lambda image, m: image, 0, 0),
    (lambda image, m: ImageOps.autocontrast(image), 0, 0),
    (lambda image, m: ImageOps.equalize(image), 0, 0),
    (lambda image, m: ImageOps.invert(image), 0, 0),
    (lambda image, m: image.filter(ImageFilter.GaussianBlur(m)), 0.1, 2),
    (lambda image, m: ImageEnhance.Contrast(image).enhance(m), 0.1, 0.95),
    (lambda image, m: ImageEnhance.Brightness(image).enhance(m), 0.1, 0.95),
    (lambda image, m: ImageEnhance.Color(image).enhance(m), 0.1, 0.95),
    (lambda image, m: ImageEnhance.Sharpness(image).enhance(m), 0.1, 0.95),
    (lambda image, m: ImageOps.posterize(image, int(m)), 4, 8),
    (lambda image, m: ImageOps.solarize(image, int(m)), 1, 256),
    (lambda image, m: adjust_hue(image, m), -0.5, 0.5),
)


def strong_augment(image, rng):
    """A_s: two operations, drawn with replacement, on a PIL image's colours."""
    for i in rng.integers(len(STRONG), size=2):
        operation, low, high = STRONG[i]
        image = operation(image, rng.uniform(low, high))
    return image


def pad(picture, side, fill=tuple(round(255 * m) for m in MEAN)):
    """A PIL image as uint8 [bands, side, side], padded at the right and the bottom."""
    border = (0, 0, side - picture.width, side - picture.height)
    return pil_to_tensor(ImageOps.expand(picture, border, fill))


def training_batch(keys, samples, kind, epoch, s):
    """Augmented images of `keys`, a list of (position in the epoch, index in `samples`).

    Labeled: image uint8 [B, 3, crop, crop], label uint8 [B, crop, crop]. Unlabeled: weak, strong
    like image, valid bool [B, crop, crop], False where padded, index int64 [B]. Draws follow from
    (seed, epoch, kind, position) alone.
    """
    images = []
    for position, index in keys:
        rng = np.random.default_rng((s.seed, epoch, kind, position))
        weak, mask = weak_augment(*read_sample(samples[index], s.num_classes), s, rng)
        image, label = pad(weak, s.crop), pad(mask, s.crop, IGNORE)[0]
        if samples[index].mask:
            images.append({"image": image, "label": label})
        else:
            images.append({"weak": image, "strong": pad(strong_augment(weak, rng), s.crop),
                           "valid": label != IGNORE, "index": index})
    return default_collate(images)


def epoch_loader(samples, epoch, steps, batch, s):
    """This process's part of `steps` batches of `samples`, in random order again and again."""
    kind = 1 if samples[0].mask else 2  # labeled and unlabeled images draw apart
    rng = np.random.default_rng((s.seed, epoch, kind))
    passes = math.ceil(steps * batch / len(samples))
    order = np.concatenate([rng.permutation(len(samples)) for _ in range(passes)])
    keys = np.stack([np.arange(steps * batch), order[:steps * batch]], 1)
    mine = keys.reshape(steps, WORLD, -1, 2)[:, RANK].reshape(-1, 2).tolist()
    make = partial(training_batch, samples=samples, kind=kind, epoch=epoch, s=s)
    return DataLoader(mine, batch // WORLD, collate_fn=make, num_workers=s.workers,
                      pin_memory=torch.cuda.is_initialized())


def epoch_batches(labeled, unlabeled, epoch, steps, s):
    """An epoch's batches: labeled and unlabeled images in one dict; in the warm-up and a supervised
    run labeled ones alone, twice as many."""
    if s.method == "supervised" or epoch < s.warmup_epochs:
        return epoch_loader(labeled, epoch, steps, 2 * s.batch, s)
    kinds = (epoch_loader(samples, epoch, steps, s.batch, s) for samples in (labeled, unlabeled))
    return (x | u for x, u in zip(*kinds))


def normalize(images):
    """uint8 [B, 3, H, W] -> float32, ImageNet's mean and deviation, in LAYOUT."""
    channels = [(images[:, c] / 255 - MEAN[c]) / STD[c] for c in range(3)]
    return torch.stack(channels, 1).contiguous(memory_format=LAYOUT)


# 3 ---------- model

class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al., ECCV 2018): float [B, 3, H, W] -> logits [B, num_classes, H, W].

    backbone: resnet18 to 101, or resnet8: one block a stage, no layer4; weights: "imagenet" or
    None; output_stride: 16 or 8; width: of ASPP and decoder; aux: a second head on layer3, whose
    logits are a second result in training.
    """

    def __init__(self, num_classes, backbone="resnet18", weights=None, output_stride=16, width=256,
                 aux=False):
        super().__init__()
        self.backbone = dilated_resnet(backbone, weights, output_stride)
        low, mid, high = (c * self.backbone.layer1[0].expansion for c in (64, 256, 512))
        high = mid if backbone == "resnet8" else high
        self.aspp = ASPP(high, [rate * 16 // output_stride for rate in (6, 12, 18)], width)
        self.aspp.project = self.aspp.project[:-1]  # without its dropout, as released
        self.low_level = Conv2dNormActivation(low, 48, 1)
        self.decoder = nn.Sequential(
            Conv2dNormActivation(width + 48, width, 3), Conv2dNormActivation(width, width, 3),
            nn.Conv2d(width, num_classes, 1))
        self.aux = FCNHead(mid, num_classes) if aux else None
        if aux:
            self.aux[3] = nn.Identity()  # its dropout

    def forward(self, images):
        def upsample(x, like):
            size = like.shape[-2:]
            return nn.functional.interpolate(x, size, mode="bilinear", align_corners=True)

        net = self.backbone
        low = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))  # [B, low, H/4, W/4]
        mid = net.layer3(net.layer2(low))
        high = self.aspp(net.layer4(mid))  # [B, width, H/stride, W/stride]
        logits = self.decoder(torch.cat([upsample(high, low), self.low_level(low)], 1))
        if self.aux is not None and self.training:
            return upsample(logits, images), upsample(self.aux(mid), images)
        return upsample(logits, images)  # [B, C, H, W]


def dilated_resnet(name, weights, output_stride):
    """torchvision's ResNet, its last strides turned into dilations; layer4 is multi-grid."""
    if name == "resnet8":
        net = ResNet(BasicBlock, [1, 1, 1, 1])
        net.layer4 = nn.Identity()
    else:
        with explained(f"no weights of {name}", "say --weights none, or mend the network"):
            weights = "IMAGENET1K_V1" if weights == "imagenet" else None
            net = getattr(torchvision.models, name)(weights=weights)
    del net.avgpool, net.fc
    rates = [1] + [2] * 22 if output_stride == 8 else []  # the first block keeps layer2's
    grid = [32 // output_stride * k for k in (1, 2, 4)]
    for block, rate in [*zip(net.layer3, rates), *zip(net.layer4.children(), grid)]:
        for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (rate, rate)
    return net


# 4 ---------- quantitative hardness
# Sections 4 to 7, the method, need torch alone: copy what you want.

def hardness(student_logits, teacher_logits, tau, background=None, valid=None):
    """Hardness gamma of each image: how little student and teacher agree, and how unsure they are.

    Section "Quantitative hardness analysis": class-weighted symmetric IoU. p^s, p^t: softmax.

        rho(p)      = share of pixels whose highest probability is >= tau
        IoU_k       = IoU of class k between argmax p^s and argmax p^t; 0 where neither predicts k
        wIoU(q | r) = sum_k w_k IoU_k, w_k = share of class k in argmax r, renormalised without
                      `background`
        gamma       = 1 - 1/2 [ rho(p^s) wIoU(p^t | p^s) + rho(p^t) wIoU(p^s | p^t) ]

    Both logits: float [B, C, H, W], in eval mode and without gradient; tau in [0, 1]; background:
    a class or None; valid: bool [B, H, W], False for padding: shares are of the valid pixels.
    -> float32 [B] in [0, 1], 1 = hardest. While the teacher is the student, it is 1 - rho; but
    where background alone is predicted, it is 1.
    """
    B, C, H, W = student_logits.shape
    if valid is None:
        valid = torch.ones(B, H, W, dtype=torch.bool, device=student_logits.device)

    def rho_and_label(logits):  # -> rho [B], argmax [B, H, W]
        top, label = logits.float().max(1)
        confidence = (top - logits.float().logsumexp(1)).exp()
        rho = ((confidence >= tau) & valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
        return rho, label

    rho_s, label_s = rho_and_label(student_logits)
    rho_t, label_t = rho_and_label(teacher_logits)
    # Count the pixels of each [image, teacher's class, student's class]: one histogram for all.
    i = torch.arange(B, device=valid.device).view(B, 1, 1)
    cell = ((i * C + label_t) * C + label_s).flatten()
    count = torch.zeros(B * C * C, dtype=torch.int64, device=valid.device)
    count = count.scatter_add_(0, cell, valid.flatten().long()).view(B, C, C)
    n_t, n_s, both = count.sum(2), count.sum(1), count.diagonal(dim1=1, dim2=2)  # [B, C] each
    iou = both / (n_t + n_s - both).clamp(min=1)
    if background is not None:
        n_t[:, background] = n_s[:, background] = 0

    def weighted_iou(n):  # n [B, C]: r's pixels; n_s for wIoU(p^t | p^s)
        return (n * iou).sum(1) / n.sum(1).clamp(min=1)

    return 1 - (rho_s * weighted_iou(n_s) + rho_t * weighted_iou(n_t)) / 2


# 5 ---------- model-adaptive augmentation

def adapt_intensity(weak, strong, gamma):
    """The intensity view, (1 - gamma) strong + gamma weak: a hard image is distorted little.

    Section "Model-adaptive augmentations". weak, strong, result: float [B, 3, H, W];
    gamma: [B] in [0, 1].
    """
    return torch.lerp(strong, weak, gamma.to(weak.dtype).view(-1, 1, 1, 1))


def pair_hard_easy(gamma):
    """Partner of each image in CutMix: the k-th hardest gets the k-th easiest, and the reverse.

    Section "Model-adaptive augmentations". gamma: [B] -> int64 [B]; in an odd batch the middle
    one's is itself. Equal gammas keep the batch's order.
    """
    order = gamma.argsort(stable=True)  # easy to hard
    partner = torch.empty_like(order)
    partner[order] = order.flip(0)
    return partner


def cutmix_boxes(batch, height, width, generator):
    """Boxes of CutMix: bool [batch, height, width] on the CPU, True where the partner is pasted.

    All are v height x v width, rounded down to even, v ~ U(0.1, 0.9). Each has a centre of its own
    in [height/16, height) x [width/16, width), and is clipped at the border.
    """
    v = torch.empty(()).uniform_(0.1, 0.9, generator=generator).item()

    def span(side):  # bool [batch, side], along one axis
        centre = torch.randint(side // 16, side, (batch, 1), generator=generator)
        reach, at = int(v * side) // 2, torch.arange(side)
        return (at >= centre - reach) & (at < centre + reach)

    return span(height).unsqueeze(2) & span(width).unsqueeze(1)


# 6 ---------- losses

def supervised_loss(logits, target):
    """L_x: mean cross entropy over the labeled pixels, 0 where there is none.

    logits: float [B, C, H, W]; target: int64 [B, H, W] in 0..C-1, or 255: ignored. -> scalar
    """
    loss = torch.nn.functional.cross_entropy(
        logits.float(), target, ignore_index=255, reduction="sum")
    return loss / (target != 255).sum().clamp(min=1)


def ohem_cross_entropy(logits, target, threshold, min_kept, ignore=255):
    """L_x of Cityscapes: cross entropy of hard pixels alone (OHEM, Shrivastava et al., CVPR 2016).

    Hard: the true class has probability <= threshold; if they are fewer than min_kept, the min_kept
    least probable pixels, and any as probable as the last of them.
    logits: float [B, C, H, W]; target: int64 [B, H, W] in 0..C-1 or `ignore`. -> scalar, 0 if empty
    """
    loss = torch.nn.functional.cross_entropy(
        logits.float(), target, ignore_index=ignore, reduction="none")
    probability = torch.exp(-loss.detach()).masked_fill(target == ignore, 2.0)
    if min_kept > 0:
        least = probability.flatten().kthvalue(min(min_kept, probability.numel())).values
        threshold = least.clamp(min=threshold)
    hard = (probability <= threshold) & (target != ignore)
    return (loss * hard).sum() / hard.sum().clamp(min=1)


def consistency_loss(logits, pseudo_label, confidence, tau, gamma=None, valid=None):
    """L_u of one view: cross entropy against the teacher where it is sure; hard images count less.

        L_i = mean over all H W pixels of [confidence >= tau] CE(logits, pseudo_label)
        L_u = mean over i of (1 - gamma_i) L_i

    logits: float [B, C, H, W], the student's; pseudo_label: int64 [B, H, W], 255 is ignored, and
    confidence: float [B, H, W], the teacher's; gamma: [B], in CutMix of the image pasted into, or
    None: 0; valid: bool [B, H, W], False for padding, which adds nothing though the mean divides by
    H W, or None. -> scalar. Section "Model-adaptive supervision".
    """
    loss = torch.nn.functional.cross_entropy(
        logits.float(), pseudo_label, ignore_index=255, reduction="none")
    sure = confidence >= tau if valid is None else (confidence >= tau) & valid
    per_image = torch.where(sure, loss, 0).mean((1, 2))  # L_i
    return per_image.mean() if gamma is None else ((1 - gamma) * per_image).mean()


# 7 ---------- mean teacher

@torch.no_grad()
def update_teacher(teacher, student, step, decay):
    """theta_t <- alpha theta_t + (1 - alpha) theta_s, alpha = min(1 - 1/(step + 1), decay).

    Parameters and BatchNorm's running statistics alike, in place; integer buffers are copied.
    step: optimizer steps since the warm-up's end, but 0 till the first epoch with unlabeled images
    is over: alpha is then 0, the teacher the student, as released.
    """
    alpha = min(1 - 1 / (step + 1), decay)
    pairs = list(zip(teacher.state_dict().values(), student.state_dict().values(), strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([t for t, _ in floats], [s for _, s in floats], 1 - alpha)
    for t, s in pairs:
        if not t.is_floating_point():
            t.copy_(s)


# 8 ---------- one training step

Learner = namedtuple("Learner", "student parallel teacher optimizer schedule")
MEASURED = ("loss_x", "loss_u", "hardness", "confident", "cutmix")


def train_step(learner, batch, step, teacher_step, s, device):
    """One step: the gradient of the shares' mean loss, the student's update, the teacher's.

    A share is what goes through the networks at once: a step's batch is cut into processes x
    --accumulate of them. Images are paired, and CutMix is decided on, within a share.
    Returns this process's MEASURED [accumulate, 5]; gamma; whether its first share has CutMix.
    """
    results = []
    for k in range(s.accumulate):
        images = {name: x.chunk(s.accumulate)[k].to(device, non_blocking=x.is_pinned())
                  for name, x in batch.items()}
        apart = WORLD > 1 and k + 1 < s.accumulate  # gradients are averaged with the last share
        with learner.parallel.no_sync() if apart else nullcontext():
            loss, *result = share_loss(learner, images, step, RANK * s.accumulate + k, s)
            (loss / s.accumulate).backward()
        results.append(result)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    learner.schedule.step()
    if WORLD > 1 and device.type != "cuda":  # else by SyncBatchNorm
        for statistic in (b for b in learner.student.buffers() if b.is_floating_point()):
            dist.all_reduce(statistic)
            statistic /= WORLD
    update_teacher(learner.teacher, learner.student, teacher_step, s.ema_decay)
    measured, gammas, mixed = zip(*results)
    return torch.stack(measured), torch.cat(gammas), mixed[0]


def share_loss(learner, images, step, share, s):
    """Algorithm 1 and Figure 2 of the paper: the loss L_x + lambda_u L_u of one share.

    images: of training_batch; in the warm-up and a supervised run without unlabeled ones.
    L_u: the intensity view's, or both views' mean where there is a CutMix view.
    Returns the loss, MEASURED [5], gamma [B], whether there is a CutMix view.
    """
    student, teacher, label = learner.student, learner.teacher, images["label"].long()
    gamma, zero, mixed = label.new_zeros(0).float(), label.new_zeros(()).float(), None
    views, confident, loss_u = [normalize(images["image"])], zero, zero
    if "weak" in images:
        weak, strong = normalize(images["weak"]), normalize(images["strong"])
        valid = images["valid"]
        # Both networks look at the weak image u: disagreement and doubt make it hard.
        student.eval()
        with torch.no_grad(), autocast(weak.device):
            logits_s, logits_t = student(weak), teacher(weak)  # [B, C, H, W]
        student.train()
        gamma = hardness(logits_s, logits_t, s.tau, s.background, valid)  # [B]
        confidence, pseudo_label = logits_t.float().softmax(1).max(1)  # [B, H, W]
        confident = ((confidence >= s.tau) & valid).sum() / valid.sum().clamp(min=1)
        del logits_s, logits_t
        intensity, mixed, partner, box = adapted_views(weak, strong, gamma, step, share, s)
        # No loss looks at u's output: it is there for BatchNorm's running statistics, to fit the
        # clean images that hardness and evaluation see.
        views += [weak, intensity] if mixed is None else [weak, intensity, mixed]

    with autocast(label.device):  # one forward with gradient
        output = learner.parallel(torch.cat(views))
    logits, auxiliary = output if s.aux_weight else (output, None)
    x, *u = logits.split([len(view) for view in views])  # u: weak, intensity, CutMix

    loss_x = labeled_loss(x, label, s)
    if s.aux_weight:
        loss_x = loss_x + s.aux_weight * labeled_loss(auxiliary[:len(label)], label, s)
    if "weak" in images:
        gamma_u = gamma if "loss" in s.adapt else None
        loss_u = consistency_loss(u[1], pseudo_label, confidence, s.tau, gamma_u, valid)
    if mixed is not None:  # labels are pasted as images are
        label_m, confidence_m, valid_m = (
            torch.where(box, y[partner], y) for y in (pseudo_label, confidence, valid))
        loss_m = consistency_loss(u[2], label_m, confidence_m, s.tau, gamma_u, valid_m)
        loss_u = (loss_u + loss_m) / 2

    values = loss_x, loss_u, gamma.mean().nan_to_num(), confident, zero + (mixed is not None)
    return loss_x + s.lambda_u * loss_u, torch.stack(values).detach(), gamma, mixed is not None


def adapted_views(weak, strong, gamma, step, share, s):
    """Section 5 put together: two views of the weak images, float [B, 3, H, W].

    CutMix mixes weak images, with probability mean(1 - gamma). What s.adapt leaves out does not
    follow gamma: CutMix then has probability 1/2, as released, and random partners.
    Returns the intensity view; the CutMix view, or None; partners [B]; boxes bool [B, H, W].
    """
    intensity = adapt_intensity(weak, strong, gamma) if "intensity" in s.adapt else strong
    seed = int(np.random.default_rng((s.seed, step, share)).integers(2**63))
    generator = torch.Generator().manual_seed(seed)
    gamma = gamma.cpu()  # the host waits
    chance = (1 - gamma).mean() if "cutmix" in s.adapt else 0.5
    if torch.rand((), generator=generator) >= chance:
        return intensity, None, None, None
    partner = pair_hard_easy(gamma)
    if "cutmix" not in s.adapt:
        partner = torch.randperm(len(gamma), generator=generator)
    box = cutmix_boxes(len(gamma), *weak.shape[2:], generator)
    partner, box = (x.to(weak.device) for x in (partner, box))
    return intensity, torch.where(box.unsqueeze(1), weak[partner], weak), partner, box


def labeled_loss(logits, label, s):
    """L_x of one output; OHEM keeps at least 50 000 pixels for each image."""
    if s.ohem:
        return ohem_cross_entropy(logits, label, 0.7, min_kept=50_000 * len(logits))
    return supervised_loss(logits, label)


def autocast(device):
    """Mixed precision in bfloat16, on the GPUs that have it."""
    on = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


# 9 ---------- evaluation

def confusion_matrix(prediction, target, num_classes):
    """int64 [C, C]: the pixels of each true class (row) predicted as each (column). Both maps:
    integer tensors of one shape, 0..C-1; target 255 is left out."""
    counted = (target != IGNORE).flatten()
    cell = target.long().flatten() * num_classes + prediction.long().flatten()
    count = torch.zeros(num_classes**2, dtype=torch.int64, device=target.device)
    count.scatter_add_(0, torch.where(counted, cell, 0), counted.long())
    return count.view(num_classes, num_classes)


def iou_per_class(confusion):
    """float64 [C] on the CPU: intersection over union, NaN for a class in neither map."""
    confusion = confusion.cpu().double()
    hit = confusion.diagonal()
    return hit / (confusion.sum(0) + confusion.sum(1) - hit)  # 0 / 0 is NaN


@torch.no_grad()
def predict(model, image):
    """Probabilities float [1, C, H, W] of one picture, uint8 [1, 3, H, W]; `model` as of load.

    Shrunk to base_size if larger, it goes through whole; with `sliding` by windows of crop x crop,
    each 2/3 of one from the one before, the last flush with the border, averaged where they meet.
    """
    s, image = model.settings, normalize(image.to(next(model.parameters()).device))
    full = image.shape[2:]
    shrink = min(s.base_size / max(full), 1) if s.base_size else 1
    height, width = (math.ceil(side * shrink) for side in full)
    image = resize(image, [height, width])
    size = s.crop if s.sliding else max(height, width)
    total, count = image.new_zeros(1, s.num_classes, height, width), image.new_zeros(height, width)

    def starts(side):
        last, stride = max(side - size, 0), max(size * 2 // 3, 1)
        return [min(at, last) for at in range(0, last + stride, stride)]

    for y in starts(height):
        for x in starts(width):
            window = (..., slice(y, y + size), slice(x, x + size))
            total[window] += model(image[window]).softmax(1)
            count[window] += 1
    return resize(total / count, full)


@torch.no_grad()
def evaluate(model, samples, device):
    """Confusion matrix [C, C] of `samples`, each by one process."""
    classes, mine = model.settings.num_classes, samples[RANK::WORLD]
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    read = partial(read_sample, num_classes=classes)
    for image, mask in DataLoader(mine, None, collate_fn=read, num_workers=model.settings.workers):
        prediction = predict(model, pil_to_tensor(image)[None]).argmax(1)
        confusion += confusion_matrix(prediction, pil_to_tensor(mask).to(device), classes)
    if WORLD > 1:
        dist.all_reduce(confusion)
    return confusion


# 10 ---------- the run

def set_up_device(s):
    """The device asked for, or the best there is; joins the processes."""
    best = "mps" if torch.backends.mps.is_available() and WORLD == 1 else "cpu"
    name = s.device or ("cuda" if torch.cuda.is_available() else best)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with explained(f"no device {name} for {local} process(es)", "try --device cpu"):
        if name == "cuda":  # each process takes a GPU of its own
            require(torch.cuda.device_count() >= local, f"{torch.cuda.device_count()} GPUs")
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if WORLD > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    s.workers = min(s.workers, max(cores // local // 2, 1))
    return device


def build_model(s, weights=None):
    """The network of `s`, its attribute `settings`."""
    model = DeepLabV3Plus(
        s.num_classes, s.backbone, weights, s.output_stride, s.width, s.aux_weight > 0)
    model.settings = s
    return model


def build_learner(s, device, steps):
    """A Learner with a schedule over `steps` steps."""
    torch.manual_seed(s.seed)  # for the first weights alone
    student = build_model(s, s.weights).to(device, memory_format=LAYOUT).train()
    if WORLD > 1 and device.type == "cuda":
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    for m in student.modules():
        if hasattr(m, "momentum"):  # BatchNorm: K shares move it about as one
            m.momentum /= s.accumulate
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    parallel = student
    if WORLD > 1:
        parallel = nn.parallel.DistributedDataParallel(student)
        parallel.broadcast_buffers = False
    head = [p for name, p in student.named_parameters() if not name.startswith("backbone.")]
    groups = [{"params": student.backbone.parameters()}, {"params": head, "lr": s.lr * s.head_lr}]
    optimizer = torch.optim.SGD(groups, s.lr, s.momentum, weight_decay=s.weight_decay, foreach=True)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    return Learner(student, parallel, teacher, optimizer, schedule)


def save(path, write):
    """Have write(file) make `path`, whole or not at all."""
    with explained(f"cannot write {path}", "make room, then --resume; or change --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.new", "wb") as file:
            write(file)
        os.replace(f"{path}.new", path)


def class_colours(s):
    """[(r, g, b), ...]: Okabe's and Ito's first, for the colour-blind."""
    colours = "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()
    wheel = [f"hsl({137 * k % 360}, 60%, {35 + 20 * (k % 3)}%)" for k in range(8, s.num_classes)]
    return [ImageColor.getrgb(colour) for colour in (colours + wheel)[:s.num_classes]]


def paint(labels, s):
    """Labels [H, W], 0..C-1 or 255, stored in a palette picture."""
    picture = Image.fromarray(labels.byte().cpu().numpy())
    colours = class_colours(s) + [(255, 255, 255)] * (256 - s.num_classes)
    picture.putpalette(np.array(colours, np.uint8).tobytes())
    return picture


def save_sheet(path, titles, rows, s):
    """Write a page of `rows`, (caption, pictures), with a legend."""
    font, below, names = ImageFont.load_default(13), 24 + 224 * len(rows), s.class_names.split(",")
    page = Image.new("RGB", (820, below + 22 * (1 + len(names) // 7)), "white")
    draw = ImageDraw.Draw(page)
    for row, (caption, pictures) in enumerate(rows):
        draw.text((4, 24 + 224 * row), caption, "black", font)
        for column, picture in enumerate(pictures):
            draw.text((4 + 205 * column, 4), titles[column], "black", font)
            tile = ImageOps.pad(picture.convert("RGB"), (200, 200), Image.BOX, "white")
            page.paste(tile, (4 + 205 * column, 44 + 224 * row))
    for i, (name, colour) in enumerate(zip([*names, "ignored"], [*class_colours(s), "white"])):
        x, y = 4 + i % 7 * 116, below + i // 7 * 22
        draw.rectangle((x, y, x + 14, y + 14), colour, "black")
        draw.text((x + 20, y), name, "black", font)
    save(path, lambda file: page.save(file, "PNG"))


def draw_samples(model, samples, path):
    """Write a sheet of up to five of `samples`: what `model` says of them."""
    rows, s = [], model.settings
    for sample in samples[::max(len(samples) // 5, 1)][:5]:
        image, mask = read_sample(sample, s.num_classes)
        confidence, label = predict(model, pil_to_tensor(image)[None])[0].max(0)
        maps = [paint(labels, s) for labels in (pil_to_tensor(mask)[0], label)]
        rows.append((sample.id, (image, *maps, to_pil_image(confidence.cpu()))))
    save_sheet(path, ("image", "truth", "teacher's prediction", "confidence (white: 1)"), rows, s)


@torch.no_grad()
def draw_unlabeled(model, batch, gamma, step, samples, path):
    """Write a sheet of the two easiest and two hardest images in the first share of a step: what
    training saw, what `model` says now."""
    rows, s = [], model.settings
    weak, strong, valid, index = (batch[name].chunk(s.accumulate)[0]
                                  for name in ("weak", "strong", "valid", "index"))
    logits = model(normalize(weak.to(gamma.device))).cpu()
    gamma = gamma[:len(weak)].cpu()
    intensity, mixed, _, box = adapted_views(weak.float(), strong.float(), gamma, step, 0, s)
    order = gamma.argsort(stable=True).tolist()
    for i in order[:2] + order[2:][-2:]:
        corners = masks_to_boxes(box[i:i + 1])
        cutmix = draw_bounding_boxes(mixed[i].byte(), corners, colors="magenta")
        confidence, label = logits[i].softmax(0).max(0)
        pseudo = pil_to_tensor(paint(torch.where(valid[i], label, IGNORE), s).convert("RGB"))
        pseudo = torch.where(confidence >= s.tau, pseudo, 191 + pseudo // 4)
        views = map(to_pil_image, (weak[i], intensity[i].byte(), cutmix, pseudo))
        rows.append((f"hardness {gamma[i]:.2f}: {samples[index[i]].id}", views))
    titles = ("weak view", "intensity view", "CutMix view", f"pseudo-label (pale: under {s.tau:g})")
    save_sheet(path, titles, rows, s)


def plot(runs, path):
    """Draw log.csv of the folders `runs`; Figure 3c: the hardness of easy and hard images."""
    with explained("no curves", "they take pip install matplotlib, and runs after an epoch"):
        from matplotlib.figure import Figure
        logs = [np.genfromtxt(f"{run}/log.csv", None, delimiter=",", names=True) for run in runs]
        tables = [Path(run, "hardness.csv").read_text("utf-8").splitlines() for run in runs]
    figure = Figure((9, 6.4), layout="constrained")
    miou, loss, mean, single = figure.subplots(2, 2).flat
    for run, log, table in zip(runs, logs, tables):
        for axis, column in ((miou, "miou"), (loss, "loss_x"), (loss, "loss_u"), (mean, "hardness"),
                             (mean, "confident")):
            x, y = np.atleast_1d(log["epoch"], log[column])
            axis.plot(x[y > 0], y[y > 0], ".-", label=f"{Path(run).name} {column}")
            axis.legend(fontsize=8)
        courses = defaultdict(list)
        for row in csv.DictReader(table):
            courses[row["id"]].append((int(row["epoch"]), float(row["hardness"])))
        courses = sorted(courses.values(), key=lambda course: np.mean(course, 0)[1])
        for course in courses[:3] + courses[3:][-3:]:
            single.plot(*zip(*course))
    single.set_title("hardness of single images, by epoch")
    save(path, lambda file: figure.savefig(file, format="png"))


TRAINED = ("student", "teacher", "optimizer", "schedule")
FREE = ("device", "workers", "root", "out", "accumulate")  # on resuming
COLUMNS = ("epoch", "steps", "lr", *MEASURED, "miou", "seconds")


def begin_run(s, device, resume):
    """A run, new or as last.pt has it: images, Learner, the rest of last.pt ("fixed" is what may
    not change), steps of an epoch."""
    shares, out, last = WORLD * s.accumulate, Path(s.out), Path(s.out, "last.pt")
    require(s.batch % shares == 0 and s.batch >= 2 * shares, f"--batch {s.batch} does not make "
            f"{shares} shares (processes x --accumulate) of 2 images or more")
    *images, note = find_data(s)
    found = [resume and last.exists()]
    if WORLD > 1:
        dist.broadcast_object_list(found)
    require(found[0] or RANK > 0 or not (last.exists() or (out / "log.csv").exists()),
            f"{out} holds a run: --resume (from last.pt), delete it, or change --out")
    fixed = {name: value for name, value in vars(s).items() if name not in FREE}
    ids = [[x.id for x in part] for part in images]
    fixed |= {"processes x accumulate": shares, "images": ids}
    run = {"fixed": fixed, "epoch": 0, "best": -1.0, "log.csv": ",".join(COLUMNS) + "\n",
           "hardness.csv": "epoch,id,hardness\n"}
    steps = len(images[1]) // s.batch
    fresh = dataclasses.replace(s, weights="none") if found[0] else s
    learner = build_learner(fresh, device, s.epochs * steps)
    if found[0]:
        saved = load_checkpoint(last)
        begun = saved.get("fixed", {})
        changed = [name for name, value in fixed.items() if begun.get(name) != value]
        require(not changed, f"{out} was begun with other {changed}: keep them, or change --out")
        run = {name: saved[name] for name in run}
        for name in TRAINED:
            getattr(learner, name).load_state_dict(saved[name])
        if RANK == 0:
            write_tables(s, run)
    if RANK == 0:
        with explained(f"cannot write into {out}", "change --out"):
            out.mkdir(parents=True, exist_ok=True)
        labeled, unlabeled, validation = map(len, images)
        print(f"{labeled} labeled images ({note}), {unlabeled} unlabeled, {validation} validation; "
              f"epochs {run['epoch'] + 1} to {s.epochs} of {steps} steps, the warm-up's to "
              f"{s.warmup_epochs}; on {device}, into {out}")
    return images, learner, run, steps


def train(s, device, images, learner, run, steps):
    """The epochs of a run of begin_run: train, evaluate, draw, save."""
    (labeled, unlabeled, validation), out, teacher = images, Path(s.out), learner.teacher
    broken = f"loss or weights not finite: lower --lr, change --out; {out} is as it was"
    for epoch in range(run["epoch"], s.epochs):
        begun, miou, measured, example = time.monotonic(), math.nan, [], None
        gammas = torch.full((len(unlabeled),), -1.0, device=device)  # -1: not seen
        batches = epoch_batches(labeled, unlabeled, epoch, steps, s)
        for step, batch in enumerate(batches, epoch * steps):
            teacher_step = step - s.warmup_epochs * steps if epoch > s.warmup_epochs else 0
            values, gamma, mixed = train_step(learner, batch, step, teacher_step, s, device)
            measured.append(values)
            if "index" in batch:
                gammas[batch["index"].to(device)] = gamma
            if mixed:
                example = batch, gamma, step
            if RANK == 0 and (step + 1) % 100 == 0:
                require(values.isfinite().all(), broken)
                print(f"step {step + 1}/{s.epochs * steps}  loss_x {values[-1, 0]:.3f}", flush=True)

        means, gammas = torch.cat(measured).cpu().double().mean(0) / WORLD, gammas.cpu()
        if WORLD > 1:
            dist.all_reduce(means)
            dist.all_reduce(gammas, dist.ReduceOp.MAX)
        if (epoch + 1) % s.eval_every == 0 or epoch + 1 == s.epochs:
            miou = 100 * iou_per_class(evaluate(teacher, validation, device)).nanmean().item()
        if RANK > 0:
            continue
        values = means, *learner.student.state_dict().values()
        require(all(value.isfinite().all() for value in values), broken)
        if miou == miou:  # evaluated
            draw_samples(teacher, validation, out / "samples.png")
            if example:
                draw_unlabeled(teacher, *example, unlabeled, out / "unlabeled.png")
        row = [epoch + 1, (epoch + 1) * steps, learner.optimizer.param_groups[0]["lr"],
               *means.tolist(), miou, time.monotonic() - begun]
        end_epoch(s, learner, run, row, zip(unlabeled, gammas.tolist()))
    if RANK == 0:
        print(f"done: the teacher's best mIoU is {run['best']:.2f}, in {out / 'best.pt'}")
        try:
            plot([out], out / "curves.png")
        except UserError as error:
            print(error)


def end_epoch(s, learner, run, row, gammas):
    """Process 0 adds an epoch to `run`: its row of COLUMNS, and (Sample, gamma or -1) of all."""
    epoch, miou, out = row[0], row[-2], Path(s.out)
    run["epoch"] = epoch
    run["log.csv"] += ",".join(f"{value:.6g}" for value in row) + "\n"
    run["hardness.csv"] += "".join(f"{epoch},{x.id.replace(',', ';')},{gamma:.6f}\n"
                                   for x, gamma in gammas if gamma >= 0)
    if miou > run["best"]:  # never for NaN
        run["best"] = miou
        best = {"settings": vars(s), "epoch": epoch, "teacher": learner.teacher.state_dict()}
        save(out / "best.pt", lambda file: torch.save(best, file))
    trained = {name: getattr(learner, name).state_dict() for name in TRAINED}
    save(out / "last.pt", lambda file: torch.save({"settings": vars(s), **run, **trained}, file))
    write_tables(s, run)
    shown = (f"{name} {value:.5g} " for name, value in zip(COLUMNS, row) if value == value)
    print(*shown, flush=True)


def write_tables(s, run):
    """Process 0 writes the state's tables, and the settings."""
    texts = run | {"settings.json": json.dumps(vars(s), indent=1) + "\n"}
    for name in ("log.csv", "hardness.csv", "settings.json"):
        save(Path(s.out, name), lambda file: file.write(texts[name].encode()))


# 11 ---------- the command line

def parse(argv):
    """Settings, and what to do. A setting is the flag's, else the checkpoint's (--eval, --predict)
    or the preset's, else the default."""
    def fail(message):
        raise UserError(f"{message}; --help lists all flags")

    def class_or_none(text):
        return None if text == "none" else int(text)

    parser = argparse.ArgumentParser("imas.py", description=Settings.__doc__)
    parser.error = fail
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--resume", action="store_true", help="go on with the run in --out, if any")
    job.add_argument("--eval", metavar="CKPT", help="score a checkpoint")
    job.add_argument("--predict", metavar="IMAGE", nargs="+", help="label images or folders")
    job.add_argument("--plot", metavar="RUN", nargs="+", help="draw runs: curves.png in the first")
    parser.add_argument("--checkpoint", metavar="CKPT", help="for --predict")
    fields = dataclasses.fields(Settings)
    helps = dict(re.findall(r"(\w+): .* = (.*)", inspect.getsource(Settings)))
    for field in fields:
        kind = {"type": type(field.default), "choices": get_args(field.type) or None}
        if field.name == "background":
            kind = {"type": class_or_none}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=helps[field.name].replace("  # ", ": "), **kind)
    todo = parser.parse_args(argv)
    given = {field.name: getattr(todo, field.name) for field in fields if field.name in todo}
    require(bool(todo.predict) == bool(todo.checkpoint) and ("out" in given or not todo.predict),
            "--predict IMAGE... --checkpoint CKPT --out FOLDER belong together")
    base = PRESETS.get(given.get("dataset", "demo"), {})
    if todo.eval or todo.checkpoint:
        base = load_checkpoint(todo.eval or todo.checkpoint)["settings"] | {"device": ""}
        base["root"] = "" if "dataset" in given else base["root"]
    s = Settings(**base | given)
    if not todo.plot:
        check_settings(s)
    return s, todo


def load_checkpoint(path):
    """A checkpoint's content: a dict of settings, teacher, and more in last.pt."""
    with explained(f"{path} is no whole checkpoint", "take a last.pt or best.pt"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        settings = vars(Settings(**content["settings"]))
        return content | {"teacher": content["teacher"], "settings": settings}


def load(checkpoint, device="cpu", s=None):
    """The teacher in a checkpoint, in eval mode; its `settings` are the run's, or `s`.
    UserError if the file does not fit."""
    content = load_checkpoint(checkpoint)
    with explained(f"{checkpoint} does not fit", "leave out the flags that change the network"):
        model = build_model(s or Settings(**content["settings"]))
        model.load_state_dict(content["teacher"])
    return model.to(device, memory_format=LAYOUT).eval()


def score(model, validation, checkpoint, device):
    """Print what `model` scores, in percent, as JSON; write it beside `checkpoint`."""
    iou, s = 100 * iou_per_class(evaluate(model, validation, device)), model.settings
    of_class = [None if value != value else value for value in iou.tolist()]
    result = {"miou": iou.nanmean().item(), "iou": dict(zip(s.class_names.split(","), of_class)),
              "images": len(validation)}
    if RANK == 0:
        text = json.dumps(result, indent=1)
        print(text)
        save(Path(checkpoint).with_suffix(".json"), lambda file: file.write(text.encode()))


def predict_pictures(model, names, out):
    """Write NAME.png, a palette mask, and NAME_overlay.png into `out` for all pictures in `names`,
    files or folders; then UserError if some failed."""
    pictures, faults = [], []
    for name in names:
        pictures += sorted(Path(name).glob("[!.]*")) or [Path(name)]
    for path in pictures[RANK::WORLD]:
        mask, overlay = Path(out, f"{path.stem}.png"), Path(out, f"{path.stem}_overlay.png")
        try:
            require(not mask.exists() and not overlay.exists(), f"{mask} or its overlay is there")
            image = read_image(path)
            label = predict(model, pil_to_tensor(image)[None])[0].argmax(0)
        except (UserError, RuntimeError) as error:  # or out of memory
            faults.append(f"{path} ({str(error).splitlines()[0]})")
            continue
        painted = paint(label, model.settings)
        blended = Image.blend(image, painted.convert("RGB"), 0.5)
        save(mask, lambda file: painted.save(file, "PNG"))
        save(overlay, lambda file: blended.save(file, "PNG"))
    require(not faults, f"{len(faults)} gave no mask: {'; '.join(faults[:3])}")


def main(argv=None):
    """Do what the command line says. A mistake ends in one line: process 0's while all set up
    alike, later its finder's."""
    tells, code = os.environ.get("LOCAL_RANK", "0") == "0", 2
    try:
        s, todo = parse(argv)
        if todo.plot:
            return plot(todo.plot, Path(todo.plot[0], "curves.png"))
        device = set_up_device(s)
        if s.dataset == "demo" and not (Path(s.root).exists() or todo.predict or RANK):
            with explained("no demo", "try again, or another --root"):
                runpy.run_path(str(HERE / "data/prepare.py"))["demo"](s.root)
        if WORLD > 1:
            dist.barrier()  # the demo is there
        if todo.predict:
            model, tells = load(todo.checkpoint, device, s), True
            predict_pictures(model, todo.predict, s.out)
        elif todo.eval:
            ids = read_ids(Path(s.root, "ImageSets/Segmentation/val.txt"))
            model, validation, tells = load(todo.eval, device, s), find_samples(s, ids, True), True
            score(model, validation, todo.eval, device)
        else:
            run, tells = begin_run(s, device, todo.resume), True
            train(s, device, *run)
        if WORLD == 1:
            return
        dist.destroy_process_group()
        tells, code = False, 0
    except UserError as error:  # with a traceback, if from a worker
        line = str(error).strip().rpartition("UserError: ")[2]
    except KeyboardInterrupt:
        tells, code, line = RANK == 0, 130, "stopped; a run goes on with --resume"
    except Exception as error:
        tells, line = True, str(error).partition("\n")[0]
        if re.search("of (shared )?memory|ALLOC|allocate |invalid conf|worker .pid", str(error)):
            line += ": raise --accumulate, lower --batch, --crop, --workers; to evaluate --sliding"
        else:
            code, line = 1, traceback.format_exc()
    if tells:
        print(f"imas.py: {line}", file=sys.stderr, flush=True)
    if WORLD > 1:  # and wait for no other process
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    main()

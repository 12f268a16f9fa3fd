"""iMAS: instance-specific and model-adaptive supervision for semi-supervised segmentation.

Zhao et al., CVPR 2023, arXiv 2211.11335, in one file, to be read beside the paper.

    python imas.py  # the demo: on a CPU, in minutes
    torchrun imas.py --dataset voc --labeled 183  # VOC on a GPU; on four: --nproc-per-node 4
    python imas.py --dataset FOLDER --num-classes N --labeled K  # your own images

A student network learns from a few labeled images and many unlabeled ones. A teacher, the moving
average of the student, predicts pseudo-labels for these. Where teacher and student disagree about
an image, or are not confident, it is hard: its pseudo-labels are not to be trusted. Its hardness
gamma in [0, 1] (section 2) decides how strongly it is augmented, with which image it is mixed (3)
and how much its loss counts (4). Section 6 is the paper's Algorithm 1.

Sections 2 to 5, the method, stand alone: copy what you need. B is the number of images, C of
classes, H and W are height and width, and label 255 is ignored.
"""

import argparse
import copy
import dataclasses
import glob
import inspect
import io
import json
import math
import os
import re
import runpy
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import functional as TF

DATA = Path(__file__).resolve().parent / "data"
REPORT = DATA / "report.py"  # tables, pictures, predicted masks
RANK = int(os.environ.get("RANK", 0))  # these three are set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue, in [0, 1]
STD = (0.229, 0.224, 0.225)


class UserError(Exception):
    """A mistake of the user's: what is wrong, where and what to do, in one line."""


def check(condition, *words):
    """Raise UserError unless the condition holds; words as for print."""
    if not condition:
        raise UserError(" ".join(map(str, words)).replace(" :", ":"))


@contextmanager
def explain(*words):
    """Turn an error within into UserError: these words, and the error's own."""
    try:
        yield
    except Exception as error:
        reason = re.split(r"\n|\. ", str(error))[0] or repr(error)
        check(False, *words, f"({reason})")


# 1 ---------- settings

ALL_PARTS = "intensity,cutmix,loss"  # what can follow hardness
Adapt = Literal["none", "intensity", "cutmix", "loss", "intensity,cutmix", "intensity,loss",
                "cutmix,loss", ALL_PARTS]


@dataclasses.dataclass
class Settings:
    """All settings. Each is a flag, its comment the help; PRESETS override these defaults."""
    dataset: str = "demo"  # demo, voc, cityscapes, camvid, or a folder
    root: str = ""  # folder of the data; else data/DATASET, or DATASET
    out: str = ""  # new folder of the run; else in runs/
    labeled: str = ""  # how many images keep labels, or a file with their ids
    method: Literal["imas", "uniform", "supervised"] = "imas"  # uniform: no part by hardness
    adapt: Adapt = ALL_PARTS  # parts that follow hardness
    num_classes: int = 0  # in the masks, background included
    class_names: str = ""  # from class 0 on: sky,road,...
    background: int | None = 0  # class left out of hardness, or none
    backbone: str = "resnet50"  # resnet18, 34, 50, 101; or resnet8, without weights
    weights: Literal["imagenet", "none"] = "imagenet"  # the backbone's first ones
    output_stride: Literal[8, 16] = 16  # 8 is finer, and three times slower
    width: int = 256  # channels of ASPP and decoder
    base_size: int = 0  # long side before random scaling, maximum in evaluation; 0: any
    crop: int = 513  # side of a training image, in pixels
    batch: int = 16  # labeled images a step, and unlabeled ones, over all processes
    accumulate: int = 1  # micro-batches a step in each process; raise it to save memory
    epochs: int = 80  # passes over the unlabeled images, warm-up included
    warmup_epochs: int = 0  # supervised ones at the start; without weights take a few
    lr: float = 0.001  # of the backbone; falls as (1 - step/steps)^0.9
    head_lr: float = 10.0  # factor of lr, for all but the backbone
    weight_decay: float = 1e-4  # of SGD
    tau: float = 0.95  # least confidence of a pseudo-label that counts
    lambda_u: float = 3.0  # weight of the unlabeled loss
    ema_decay: float = 0.996  # of the teacher; lower it for short runs
    ohem: bool = False  # learn from the hardest labeled pixels alone
    aux_weight: float = 0.0  # of the loss of a second head, on layer3; 0: none
    sliding: bool = False  # evaluate by overlapping windows of crop x crop
    eval_every: int = 1  # epochs, and at the end
    workers: int = min(4, os.cpu_count() // 2)  # processes that load images, for each loader
    seed: int = 0  # of every draw
    device: Literal["", "cpu", "cuda"] = ""  # else cuda if there is one

    def __post_init__(self):
        """Fill in what follows from others; UserError for nonsense."""
        check(self.num_classes, "--num-classes is missing, or --dataset is not one of", *PRESETS)
        for name, value in vars(self).items():
            least = LEAST.get(name, 0)
            most = MOST.get(name, 2**32)
            check(isinstance(value, str | None) or least <= value <= most,
                  "--" + name.replace("_", "-"), value, "is not from", least, "to", most)
        check((self.background or 0) < self.num_classes, "--background has to be a class, or none")
        method = self.method
        if method != "imas":
            check(self.adapt in (ALL_PARTS, "none"), "--adapt is for --method imas")
            self.adapt = "none"
        elif self.adapt != ALL_PARTS:
            method = self.adapt
        self.class_names = self.class_names or ",".join(map(str, range(self.num_classes)))
        check(self.class_names.count(",") == self.num_classes - 1,
              "--class-names are not as many as --num-classes")
        folder = DATA / self.dataset if self.dataset in PRESETS else Path(self.dataset)
        self.root = os.path.abspath(self.root or folder)
        labels = "-".join(Path(self.labeled.removesuffix(".txt")).parts[-2:])
        self.out = self.out or f"runs/{folder.resolve().name}-{labels}-{method}-{self.seed}"


# Of numbers; what is not here is 0 or more.
LEAST = dict(num_classes=2, crop=33, width=1, batch=1, accumulate=1, epochs=1, eval_every=1)
MOST = dict(num_classes=255, tau=1, ema_decay=1)

PRESETS = {
    "demo": dict(
        num_classes=6, labeled="16", backbone="resnet8", weights="none", width=64, base_size=64,
        crop=64, epochs=70, warmup_epochs=1, lr=0.03, head_lr=1.0, tau=0.8, lambda_u=1.0,
        ema_decay=0.99, eval_every=5, workers=0,
        class_names="background,disc,square,triangle,cross,ring",
    ),
    "voc": dict(
        num_classes=21, backbone="resnet101", base_size=500,
        class_names="background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,"
                    "diningtable,dog,horse,motorbike,person,pottedplant,sheep,sofa,train,tvmonitor",
    ),
    "cityscapes": dict(  # hardness leaves out class 0, road, as in the authors' code
        num_classes=19, base_size=2048, crop=769, epochs=240, lr=0.01, head_lr=1.0,
        weight_decay=5e-4, tau=0.7, ohem=True, aux_weight=0.4, sliding=True,
        class_names="road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,"
                    "terrain,sky,person,rider,car,truck,bus,train,motorcycle,bicycle",
    ),
    "camvid": dict(
        num_classes=11, background=None, backbone="resnet18", weights="none", width=64, tau=0.8,
        base_size=240, crop=128, batch=4, epochs=28, warmup_epochs=12, lr=0.005, head_lr=1.0,
        class_names="sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist",
    ),
}


# 2 ---------- quantitative hardness

def hardness(student_logits, teacher_logits, tau, background=None, valid=None):
    """Hardness gamma of each image: how little student and teacher agree, and how unsure they are.

    Paper, "Quantitative hardness analysis": class-weighted symmetric IoU. p^s, p^t: softmax.

        rho(p)      = fraction of pixels whose highest probability is >= tau
        IoU_k       = IoU of class k between argmax p^s and argmax p^t; 0 where neither predicts k
        wIoU(q | r) = sum_k w_k IoU_k, w_k = fraction of class k in argmax r without `background`
        gamma       = 1 - 1/2 [ rho(p^s) wIoU(p^t | p^s) + rho(p^t) wIoU(p^s | p^t) ]

    Both logits: float [B, C, H, W], in eval mode and without gradient; tau in [0, 1]; background:
    a class or None; valid: bool [B, H, W], False for padding: fractions are of the valid pixels.
    -> float32 [B] in [0, 1], 1 = hardest, as where nothing but background is predicted.
    """
    B, C = student_logits.shape[:2]
    if valid is None:
        valid = torch.ones_like(student_logits[:, 0], dtype=torch.bool)

    def rho_and_label(logits):  # [B], [B, H, W]
        top, label = logits.float().max(1)
        confidence = (top - logits.float().logsumexp(1)).exp()
        confident = (confidence >= tau) & valid
        return confident.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1), label

    rho_s, label_s = rho_and_label(student_logits)
    rho_t, label_t = rho_and_label(teacher_logits)

    # A confusion matrix for each image: rows are the teacher's classes, columns the student's.
    cell = (label_t * C + label_s).flatten(1)
    confusion = cell.new_zeros(B, C * C).scatter_add_(1, cell, valid.flatten(1).long())
    confusion = confusion.view(B, C, C)
    pixels_t = confusion.sum(2)  # [B, C]
    pixels_s = confusion.sum(1)
    intersection = confusion.diagonal(dim1=1, dim2=2)
    iou = intersection / (pixels_t + pixels_s - intersection).clamp(min=1)

    def weighted_iou(pixels):  # wIoU(q | r) [B], by the pixels of each class in r
        if background is not None:
            pixels[:, background] = 0  # in place: these counts are not needed again
        return (pixels * iou).sum(1) / pixels.sum(1).clamp(min=1)

    return 1 - (rho_s * weighted_iou(pixels_s) + rho_t * weighted_iou(pixels_t)) / 2


# 3 ---------- model-adaptive augmentation

def weak_augment(image, mask, crop, base_size, rng):
    """A_w: random scaling, crop and horizontal flip of a PIL image and its mask.

    base_size: the long side before scaling by a factor from [0.5, 2], or 0: the image's own. rng:
    a numpy.random.Generator. -> both, at most crop x crop, as by resizing and then cropping; but
    only the crop is resampled.
    """
    factor = rng.uniform(0.5, 2)
    if base_size:
        factor *= base_size / max(image.size)
    scaled = np.maximum(np.round(np.multiply(image.size, factor)), 1).astype(int)  # width, height
    size = np.minimum(scaled, crop)
    corner = rng.integers(scaled - size + 1)
    to_pixels = image.size / scaled
    end = np.minimum((corner + size) * to_pixels, image.size)
    window = (*corner * to_pixels, *end)  # left, top, right, bottom, in the image's own pixels
    image = image.resize(size.tolist(), Image.BILINEAR, window)
    mask = mask.resize(size.tolist(), Image.NEAREST, window)
    if rng.random() < 0.5:
        return ImageOps.mirror(image), ImageOps.mirror(mask)
    return image, mask


STRONG = (  # operations on a PIL image, and the range of their magnitude if they have one
    (lambda image: image,), (TF.autocontrast,), (TF.equalize,), (TF.invert,),
    (lambda image, m: image.filter(ImageFilter.GaussianBlur(m)), 0.1, 2),
    (TF.adjust_contrast, 0.1, 0.95),
    (TF.adjust_brightness, 0.1, 0.95),
    (TF.adjust_saturation, 0.1, 0.95),
    (TF.adjust_sharpness, 0.1, 0.95),
    (lambda image, m: TF.posterize(image, int(m)), 4, 8),
    (lambda image, m: TF.solarize(image, int(m)), 1, 256),
    (TF.adjust_hue, -0.5, 0.5),
)


def strong_augment(image, rng):
    """A_s: two operations of STRONG, drawn with replacement, on an RGB PIL image."""
    for i in rng.integers(len(STRONG), size=2):
        operation, *limits = STRONG[i]
        magnitude = rng.uniform(*limits)  # not used where there is no range
        image = operation(image, magnitude) if limits else operation(image)
    return image


def adapt_intensity(weak, strong, gamma):
    """The intensity view, (1 - gamma) A_s(u) + gamma u: hard images are augmented less.

    Paper, "Model-adaptive augmentations". weak (u), strong: float [B, 3, H, W]; gamma: [B].
    """
    return torch.lerp(strong, weak, gamma.to(weak.dtype).view(-1, 1, 1, 1))


def pair_hard_easy(gamma):
    """Partner of each image in CutMix: the k-th hardest gets the k-th easiest, and the reverse.

    Paper, "Model-adaptive augmentations". gamma: [B] -> int64 [B]; the middle of an odd B: itself.
    """
    easy_to_hard = gamma.argsort(stable=True)
    partner = torch.empty_like(easy_to_hard)
    partner[easy_to_hard] = easy_to_hard.flip(0)
    return partner


def cutmix_boxes(batch, height, width, generator):
    """Boxes of CutMix: bool [batch, height, width] on the CPU, True where the partner is pasted.

    v height x v width, rounded down to even, with one v ~ U(0.1, 0.9) for all; centers are drawn
    from [height/16, height) x [width/16, width). generator: a torch.Generator on the CPU.
    """
    v = torch.empty(()).uniform_(0.1, 0.9, generator=generator).item()

    def span(side):  # bool [batch, side], along one axis
        center = torch.randint(side // 16, side, (batch, 1), generator=generator)
        return (torch.arange(side) + 0.5 - center).abs() < int(v * side) // 2
    return span(height).unsqueeze(2) & span(width).unsqueeze(1)


def draw_cutmix(gamma, height, width, generator, adaptive=True):
    """Decide on CutMix for a batch, with probability mean(1 - gamma): the easier, the likelier.

    Paper, "Model-adaptive augmentations". gamma: [B]. -> partners int64 [B] and boxes bool
    [B, height, width]; or None, None. If not adaptive: probability 1/2 and random partners.
    """
    device = gamma.device
    gamma = gamma.cpu()  # here the CPU waits for the GPU, once a micro-batch
    probability = (1 - gamma).mean() if adaptive else 0.5
    if torch.rand((), generator=generator) >= probability:
        return None, None
    if adaptive:
        partner = pair_hard_easy(gamma)
    else:
        partner = torch.randperm(len(gamma), generator=generator)
    box = cutmix_boxes(len(gamma), height, width, generator)
    return partner.to(device, non_blocking=True), box.to(device, non_blocking=True)


# 4 ---------- losses

def supervised_loss(logits, target):
    """L_x: mean cross entropy over the labeled pixels, 0 where there are none.

    logits: float [B, C, H, W]; target: int64 [B, H, W] in 0..C-1, or 255. -> scalar
    """
    loss = F.cross_entropy(logits.float(), target, ignore_index=255, reduction="sum")
    return loss / (target != 255).sum().clamp(min=1)


def ohem_cross_entropy(logits, target, threshold, min_kept):
    """L_x of Cityscapes: cross entropy of hard pixels alone (OHEM, Shrivastava et al., CVPR 2016).

    Hard: the true class has probability <= threshold; at least the min_kept least probable pixels.
    logits: float [B, C, H, W]; target: int64 [B, H, W] in 0..C-1, or 255. -> scalar, 0 if empty
    """
    loss = F.cross_entropy(logits.float(), target, ignore_index=255, reduction="none")
    probability = torch.exp(-loss.detach()).masked_fill(target == 255, 2.0)
    if min_kept > 0:
        min_kept = min(min_kept, probability.numel())
        threshold = probability.flatten().kthvalue(min_kept).values.clamp(min=threshold)
    hard = (probability <= threshold) & (target != 255)
    return (loss * hard).sum() / hard.sum().clamp(min=1)


def consistency_loss(logits, pseudo_label, confidence, tau, gamma=None, valid=None):
    """L(view): cross entropy with confident pseudo-labels, in which hard images count less.

        L_i = mean over all H W pixels of [confidence >= tau] CE(logits, pseudo_label)
        L(view) = mean over i of (1 - gamma_i) L_i

    Paper, "Model-adaptive supervision". logits: float [B, C, H, W], the student's; pseudo_label:
    int64 [B, H, W] and confidence: float [B, H, W], the teacher's; gamma: [B], in CutMix of the
    image outside the box, or None: no weighting; valid: bool [B, H, W] or None, False for padding,
    whose loss is 0 but which counts in H W. -> scalar
    """
    loss = F.cross_entropy(logits.float(), pseudo_label, ignore_index=255, reduction="none")
    used = confidence >= tau
    if valid is not None:
        used = used & valid
    per_image = torch.where(used, loss, 0).mean((1, 2))  # L_i
    if gamma is not None:
        per_image = (1 - gamma) * per_image
    return per_image.mean()


# 5 ---------- mean teacher

@torch.no_grad()
def update_teacher(teacher, student, step, decay):
    """theta_t <- alpha theta_t + (1 - alpha) theta_s, alpha = min(1 - 1/(step + 1), decay).

    Parameters and BatchNorm's running statistics alike, in place; integer buffers are copied.
    step: since the warm-up; but 0, that is teacher = student, up to the end of the first epoch
    with unlabeled images, as in the authors' code.
    """
    of_teacher = []
    of_student = []
    for t, s in zip(teacher.state_dict().values(), student.state_dict().values()):
        if t.is_floating_point():
            of_teacher.append(t)
            of_student.append(s)
        else:
            t.copy_(s)
    alpha = min(1 - 1 / (step + 1), decay)
    get_ema_multi_avg_fn(alpha)(of_teacher, of_student, None)


# 6 ---------- one training step

METRICS = ("loss_x", "loss_u", "hardness", "confident", "cutmix")


def micro_batch_loss(student, teacher, batch, generator, cfg):
    """Algorithm 1 and Figure 2 of the paper: the loss L_x + lambda_u L_u of one micro-batch.

        L_u = L(intensity view), or with CutMix (L(intensity view) + L(CutMix view)) / 2

    Then, in train: the student's step and update_teacher. batch: image uint8 [B, 3, H, W], label
    uint8 [B, H, W]; with unlabeled images also weak, strong uint8 [B, 3, H, W], valid bool
    [B, H, W], index [B]. generator: for CutMix, on the CPU. -> the loss; METRICS, float [5], NaN
    where nothing is measured; what the student saw of unlabeled images, or None.
    """
    label = batch["label"].long()
    views = {"labeled": normalize(batch["image"])}
    if "weak" in batch:
        weak = normalize(batch["weak"])  # u [B, 3, H, W]
        strong = normalize(batch["strong"])  # A_s(u)
        valid = batch["valid"]
        student.eval()
        with torch.no_grad(), autocast(weak.device):
            student_logits = student(weak)  # [B, C, H, W]
            teacher_logits = teacher(weak)
        student.train()
        gamma = hardness(student_logits, teacher_logits, cfg.tau, cfg.background, valid)
        confidence, pseudo_label = teacher_logits.float().softmax(1).max(1)
        views["weak"] = weak  # in no loss: BatchNorm's statistics need clean images too
        views["intensity"] = strong
        if "intensity" in cfg.adapt:
            views["intensity"] = adapt_intensity(weak, strong, gamma)
        partner, box = draw_cutmix(gamma, *weak.shape[2:], generator, "cutmix" in cfg.adapt)
        if box is not None:
            views["cutmix"] = torch.where(box.unsqueeze(1), weak[partner], weak)

    with autocast(label.device):
        logits = student(torch.cat(list(views.values())))  # the only pass with gradient
    loss_aux = 0
    if cfg.aux_weight:
        logits, aux_logits = logits
        loss_aux = cfg.aux_weight * labeled_loss(aux_logits[:len(label)], label, cfg)
    logits = dict(zip(views, logits.chunk(len(views))))

    loss_x = labeled_loss(logits["labeled"], label, cfg) + loss_aux
    if "weak" not in batch:  # the warm-up, or a supervised run
        return loss_x, F.pad(loss_x.detach().view(1), (0, 4), value=math.nan), None

    loss_gamma = gamma if "loss" in cfg.adapt else None
    loss_u = consistency_loss(
        logits["intensity"], pseudo_label, confidence, cfg.tau, loss_gamma, valid)
    if "cutmix" in views:  # pseudo-labels are pasted as images are
        mixed_label, mixed_confidence, mixed_valid = (
            torch.where(box, x[partner], x) for x in (pseudo_label, confidence, valid))
        loss_cutmix = consistency_loss(
            logits["cutmix"], mixed_label, mixed_confidence, cfg.tau, loss_gamma, mixed_valid)
        loss_u = (loss_u + loss_cutmix) / 2

    confident = ((confidence >= cfg.tau) & valid).sum() / valid.sum()
    cutmix = torch.full_like(confident, "cutmix" in views)
    metrics = torch.stack([loss_x, loss_u, gamma.mean(), confident, cutmix]).detach()
    seen = views | {"box": box, "gamma": gamma, "valid": valid, "pseudo_label": pseudo_label,
                    "confidence": confidence}
    return loss_x + cfg.lambda_u * loss_u, metrics, seen


def labeled_loss(logits, label, cfg):
    """L_x of one output; OHEM (Cityscapes) keeps at least 50 000 pixels times the images."""
    if cfg.ohem:
        return ohem_cross_entropy(logits, label, 0.7, min_kept=50_000 * len(logits))
    return supervised_loss(logits, label)


def autocast(device):
    """Mixed precision, on GPUs with bfloat16."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled)


def normalize(images):
    """uint8 [B, 3, H, W] -> float32 with ImageNet's mean and deviation, channels-last."""
    channels = [(images[:, c] / 255 - MEAN[c]) / STD[c] for c in range(3)]
    return torch.stack(channels, 1).contiguous(memory_format=torch.channels_last)


# 7 ---------- model

class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al., ECCV 2018): float [B, 3, H, W] -> logits [B, num_classes, H, W].

    backbone: resnet18 to 101, or resnet8: one block a stage, no layer4; weights: "imagenet", None;
    output_stride: 16, 8; width: of ASPP and decoder; aux: in training, also logits from layer3.
    """

    def __init__(self, num_classes, backbone="resnet18", weights=None, output_stride=16, width=256,
                 aux=False):
        super().__init__()
        self.backbone = dilated_resnet(backbone, weights, output_stride)
        expansion = self.backbone.layer1[0].expansion
        high_channels = (256 if backbone == "resnet8" else 512) * expansion
        rates = (6, 12, 18) if output_stride == 16 else (12, 24, 36)
        self.aspp = ASPP(high_channels, rates, width)
        self.aspp.project = self.aspp.project[:-1]  # no dropout, as in the authors' code
        self.low_level = Conv2dNormActivation(64 * expansion, 48, 1)
        self.decoder = nn.Sequential(Conv2dNormActivation(width + 48, width, 3),
                                     Conv2dNormActivation(width, width, 3),
                                     nn.Conv2d(width, num_classes, 1))
        self.aux = None
        if aux:
            self.aux = nn.Sequential(Conv2dNormActivation(256 * expansion, 64 * expansion, 3),
                                     nn.Conv2d(64 * expansion, num_classes, 1))

    def forward(self, images):
        net = self.backbone
        stem = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        low = net.layer1(stem)  # [B, 64 * expansion, H/4, W/4]
        mid = net.layer3(net.layer2(low))
        high = self.aspp(net.layer4(mid))  # [B, width, H/output_stride, W/output_stride]
        features = torch.cat([upsample(high, low), self.low_level(low)], 1)
        logits = upsample(self.decoder(features), images)
        if self.aux is not None and self.training:
            return logits, upsample(self.aux(mid), images)
        return logits


def upsample(x, like):
    """Enlarge x [B, C, h, w] to the height and width of `like`."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)


def dilated_resnet(name, weights, output_stride):
    """torchvision's ResNet, its last strides turned into dilations; layer4 is multi-grid."""
    with explain("no", name, "with --weights", weights, "here: put torchvision's file into",
                 torch.hub.get_dir() + "/checkpoints, or take --weights none"):
        if name == "resnet8" and weights != "imagenet":
            net = ResNet(BasicBlock, [1, 1, 1, 1])
            net.layer4 = nn.Identity()
        else:
            net = get_model(name, weights="IMAGENET1K_V1" if weights == "imagenet" else None)
        del net.avgpool, net.fc
    if output_stride == 8:
        dilate(net.layer3, [1] + [2] * 22)  # the first block keeps layer2's dilation
    dilate(net.layer4, [32 // output_stride * k for k in (1, 2, 4)])
    return net


def dilate(stage, rates):
    """Replace a ResNet stage's stride by dilation, one rate for each block."""
    for block, rate in zip(stage.children(), rates):
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (rate, rate)


# 8 ---------- data

class SegmentationDataset(Dataset):
    """Images and masks in PASCAL VOC's layout. An item is a dict, by kind:

    "whole"      image uint8 [3, H, W], label uint8 [H, W]: as stored, for evaluation
    "labeled"    the same, weakly augmented and padded to [crop, crop]
    "unlabeled"  weak and strong like image; valid bool [crop, crop], False for padding; index

    Draws: from (seed, epoch, kind, position). cfg has root, num_classes, seed, base_size and crop.
    """

    KINDS = ("whole", "labeled", "unlabeled")

    def __init__(self, ids, kind, cfg):
        folder = Path(cfg.root, "JPEGImages")
        self.images = find_images(folder)
        for id in ids:
            check(id in self.images, "no image", folder / id, "for an id in the lists: add it")
        self.ids = ids
        self.kind = kind
        self.cfg = cfg
        self.order = range(len(ids))

    def set_epoch(self, epoch, length):
        """Draw an epoch: all images in random order, again until there are `length` or more."""
        self.seed = (self.cfg.seed, epoch, self.KINDS.index(self.kind))
        rng = np.random.default_rng(self.seed)
        passes = length // len(self.ids) + 1
        self.order = np.concatenate([rng.permutation(len(self.ids)) for _ in range(passes)])

    def __len__(self):
        return len(self.order)

    def __getitem__(self, position):
        cfg = self.cfg
        index = self.order[position]
        id = self.ids[index]
        image = read_image(self.images[id])
        mask = Image.new("L", image.size)  # of an unlabeled image: to tell padding apart
        if self.kind != "unlabeled":
            path = Path(cfg.root, "SegmentationClass", f"{id}.png")
            mask = read_mask(path, cfg.num_classes)
            check(mask.size == image.size, path, "is not of the size of", self.images[id],
                  ": replace one, or take both off the lists")
        if self.kind == "whole":
            return {"image": TF.pil_to_tensor(image), "label": TF.pil_to_tensor(mask)[0]}

        rng = np.random.default_rng((*self.seed, position))
        weak, mask = weak_augment(image, mask, cfg.crop, cfg.base_size, rng)
        label = pad(mask, cfg.crop, 255)[0]
        if self.kind == "labeled":
            return {"image": pad(weak, cfg.crop), "label": label}
        strong = strong_augment(weak, rng)
        return {"weak": pad(weak, cfg.crop), "strong": pad(strong, cfg.crop),
                "valid": label != 255, "index": index}


def find_images(folder):
    """{id: path} of the images in a folder and the folders in it."""
    found = {}
    for name in sorted(glob.glob("**/*.*", root_dir=folder, recursive=True)):
        id, ending = os.path.splitext(name.replace(os.sep, "/"))
        if ending.lower() in Image.registered_extensions():
            check(id not in found, "two images of one name in", folder, ": remove one of", id)
            found[id] = Path(folder, name)
    return found


def open_image(path):
    """The PIL image in a file, its EXIF orientation applied."""
    with explain("cannot read", path, ": replace it, or leave it out"):
        return ImageOps.exif_transpose(Image.open(path))


def read_image(path):
    """The PIL image in a file, in RGB."""
    image = open_image(path)
    check(image.mode[0] not in "IF", path, "has mode", image.mode, ": save it with 8 bits a band")
    return image.convert("RGB")


def read_mask(path, num_classes):
    """The mask in a file, a PIL image of bytes: the stored values, classes or 255."""
    mask = open_image(path)
    labels = np.array(mask)
    check(labels.ndim == 2, path, "has several bands, not one: see data/prepare.py own")
    wrong = labels[~np.isin(labels, [*range(num_classes), 255])]
    check(not wrong.size, path, "has", *wrong[:1], "in", wrong.size, "pixels: with --num-classes",
          num_classes, "that is no class; see data/prepare.py own")
    check(num_classes > 2 or mask.mode != "L" or np.unique(labels).tolist() != [0, 255],
          path, "has 0 and 255 alone, 255 is ignored: see data/prepare.py own")
    return Image.fromarray(labels.astype(np.uint8))


def pad(image, side, fill=(124, 116, 104)):
    """A PIL image as uint8 [bands, side, side], padded at the right and bottom by MEAN."""
    border = (0, 0, side - image.width, side - image.height)
    return TF.pil_to_tensor(ImageOps.expand(image, border, fill))


def read_ids(path):
    """The ids in a list, one a line. A path names its id: "JPEGImages/x.jpg y.png" is x."""
    with explain("no list", path, "in UTF-8: see --root, --labeled and data/prepare.py"):
        text = Path(path).read_bytes()
        lines = text.decode(json.detect_encoding(text)).splitlines()  # UTF-16 too
    around_id = r"^[./]*(JPEGImages/)?|\.(jpe?g|png|bmp|gif|tiff?|webp)(\s.*)?$"
    ids = [re.sub(around_id, "", line.strip(), flags=re.I) for line in lines if line.strip()]
    check(ids, "the list", path, "is empty: write an id on each line")
    return list(dict.fromkeys(ids))


def load_datasets(cfg):
    """The labeled, unlabeled and validation images; and where the labeled ones are from."""
    check(cfg.labeled, "--labeled is missing: how many images, or a file with their ids")
    lists = Path(cfg.root, "ImageSets/Segmentation")
    val = read_ids(lists / "val.txt")
    pool = read_ids(lists / "train.txt")
    published = Path(cfg.root, "splits", cfg.labeled)
    source = "listed"
    if published.is_dir():
        labeled = read_ids(published / "labeled.txt")
        pool = read_ids(published / "unlabeled.txt")
    elif re.fullmatch(r"-?\d+", cfg.labeled):
        masks = Path(cfg.root, "SegmentationClass")
        masked = [id for id in pool if Path(masks, f"{id}.png").is_file()]
        number = int(cfg.labeled)
        check(0 < number <= len(masked), "--labeled", number, "is not from 1 to", len(masked),
              ": so many ids of train.txt have a mask in", masks)
        rng = np.random.default_rng(cfg.seed)
        labeled = rng.permutation(masked)[:number].tolist()
        source = "drawn with the seed"
    else:
        labeled = read_ids(cfg.labeled)
    unlabeled = sorted({*pool} - {*labeled})
    both = {*val} & {*labeled, *unlabeled}
    check(not both, "in val.txt and to train with, take off one list:", *sorted(both)[:3])
    return (
        SegmentationDataset(labeled, "labeled", cfg),
        SegmentationDataset(unlabeled, "unlabeled", cfg),
        SegmentationDataset(val, "whole", cfg),
        source,
    )


def make_loader(dataset, epoch, steps, batch):
    """A DataLoader of this process's micro-batches, in `steps` steps of `batch` images."""
    cfg = dataset.cfg
    dataset.set_epoch(epoch, steps * batch)
    positions = torch.arange(steps * batch).view(steps, WORLD_SIZE, cfg.accumulate, -1)
    return DataLoader(dataset, batch_sampler=positions[:, RANK].flatten(0, 1).tolist(),
                      num_workers=cfg.workers, pin_memory=torch.cuda.is_initialized())


# 9 ---------- evaluation

def confusion_matrix(prediction, target, num_classes):
    """int64 [C, C]: the pixels of each true class (row) predicted as each class (column).

    Both maps: integer tensors of one shape, 0..C-1; where target is 255 is left out.
    """
    counted = target != 255
    cell = target[counted].long() * num_classes + prediction[counted]
    return cell.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def iou_per_class(confusion):
    """float64 [C] on the CPU: intersection over union, NaN for a class in neither map."""
    confusion = confusion.cpu().double()
    intersection = confusion.diagonal()
    return intersection / (confusion.sum(0) + confusion.sum(1) - intersection)


@torch.no_grad()
def predict(model, image):
    """Probabilities float [1, C, H, W] of an image, uint8 [1, 3, H, W]; `model` as load gives it.

    Shrunk to base_size if larger, it is seen whole; with `sliding` by windows of crop x crop, 2/3
    of a window apart, the last flush with the border.
    """
    cfg = model.settings
    image = normalize(image.to(next(model.parameters()).device))
    full_size = list(image.shape[2:])
    shrink = min(1, (cfg.base_size or math.inf) / max(full_size))
    image = TF.resize(image, [math.ceil(side * shrink) for side in full_size])
    height, width = image.shape[2:]
    size = cfg.crop if cfg.sliding else max(height, width, 2)

    def windows(side):  # along one axis
        last = max(side - size, 0)
        return [slice(start, start + size) for start in (*range(0, last, size * 2 // 3), last)]

    total = image.new_zeros(1, cfg.num_classes, height, width)
    count = image.new_zeros(height, width)
    for rows in windows(height):
        for columns in windows(width):
            total[..., rows, columns] += model(image[..., rows, columns]).softmax(1)
            count[rows, columns] += 1
    return TF.resize(total / count, full_size)


@torch.no_grad()
def evaluate(model, dataset):
    """IoU of each class in percent, float64 [C], over `dataset` of kind "whole"."""
    cfg = model.settings
    C = cfg.num_classes
    device = next(model.parameters()).device
    confusion = torch.zeros(C, C, dtype=torch.int64, device=device)
    part = range(RANK, len(dataset), WORLD_SIZE)  # of this process
    for item in DataLoader(dataset, batch_size=None, sampler=part, num_workers=cfg.workers):
        prediction = predict(model, item["image"][None])[0].argmax(0)
        confusion += confusion_matrix(prediction, item["label"].to(device), C)
    if WORLD_SIZE > 1:
        dist.all_reduce(confusion)
    check(confusion.any(), "no pixel of the validation masks is labeled: see data/prepare.py own")
    return 100 * iou_per_class(confusion)


def print_scores(iou, cfg):
    """Print the IoU of each class, and their mean, in percent."""
    for name, value in zip(cfg.class_names.split(","), iou):
        print(f"{value:6.2f}  {name}")
    print(f"{iou.nanmean():6.2f}  mIoU")


# 10 ---------- tables and pictures

def load_report():
    """The functions of data/report.py by name."""
    sys.modules["imas"] = sys.modules[__name__]  # this file, as that one imports it
    return runpy.run_path(str(REPORT))


# 11 ---------- the run

NOT_FINITE = "the loss or the weights are not finite: lower --lr, and change --out"
COLUMNS = ("epoch", "steps", "lr", *METRICS, "miou", "seconds")
MAY_CHANGE = {"device", "workers", "root", "out", "eval_every", "class_names", "accumulate"}


def set_up_device(cfg):
    """The device asked for, else a GPU if there is one; joins torchrun's processes."""
    name = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with explain("no", name, "for each process: take fewer, or --device cpu"):
        if name == "cuda":
            torch.cuda.set_device(LOCAL_RANK)
    if WORLD_SIZE > 1:
        with explain("the processes do not meet: try another --master-port"):
            dist.init_process_group("nccl" if name == "cuda" else "gloo")
    return torch.device(name)


def build_model(cfg, weights=None):
    """The network of these settings, its attribute `settings`."""
    model = DeepLabV3Plus(
        cfg.num_classes, cfg.backbone, weights, cfg.output_stride, cfg.width, cfg.aux_weight > 0)
    model.settings = cfg
    return model


def load_checkpoint(path):
    """A checkpoint's content: settings, teacher, and more in last.pt."""
    with explain(path, "is no good checkpoint: take a run's best.pt or last.pt"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["settings"] = Settings(**content["settings"])
        check(all(x.isfinite().all() for x in content["teacher"].values()), "it is not finite")
    return content


def load(path, device="cpu", cfg=None):
    """The teacher in a checkpoint, in eval mode; its `settings` are the run's, or cfg."""
    content = load_checkpoint(path)
    model = build_model(cfg or content["settings"])
    with explain(path, "does not fit: leave out flags that change the network"):
        model.load_state_dict(content["teacher"])
    return model.to(device, memory_format=torch.channels_last).eval()


def save(path, write):
    """Have write(file) make a file, whole or not at all."""
    content = io.BytesIO()
    write(content)
    with explain("cannot write", path, ": make room and --resume, or change --out"):
        Path(f"{path}.new").write_bytes(content.getbuffer())
        os.replace(f"{path}.new", path)


def build_networks(cfg, device):
    """The student, the teacher as its copy, and the student as DDP wraps it."""
    torch.manual_seed(cfg.seed)  # for the first weights alone
    student = build_model(cfg, cfg.weights)
    student.to(device, memory_format=torch.channels_last)
    if WORLD_SIZE > 1 and device.type == "cuda":
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    for module in student.modules():
        if hasattr(module, "momentum"):  # of BatchNorm: K micro-batches move it as far as one
            module.momentum /= cfg.accumulate
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    ddp_student = student
    if WORLD_SIZE > 1:
        ddp_student = nn.parallel.DistributedDataParallel(student)
        ddp_student.broadcast_buffers = False  # the argument's name changes with torch
    return student, teacher, ddp_student


def train(cfg, device, resume):
    """Train, and write all files of a run into its folder cfg.out."""
    out = Path(cfg.out)
    last = out / "last.pt"
    terminal = sys.stdout.isatty()
    labeled, unlabeled, val, source = load_datasets(cfg)
    steps = len(unlabeled) // cfg.batch  # in an epoch
    if cfg.method == "supervised":
        steps = steps or len(labeled) // (2 * cfg.batch)
    total_steps = cfg.epochs * steps
    micro_batches = WORLD_SIZE * cfg.accumulate  # in a step
    check(steps, len(unlabeled), "unlabeled images make no step: lower --labeled or --batch")
    check(cfg.batch % micro_batches == 0 and cfg.batch >= 2 * micro_batches, "--batch is not for",
          micro_batches, "micro-batches (processes x --accumulate) of 2 images or more")

    # To resume, settings and images must match, but for MAY_CHANGE
    fixed = {**vars(cfg), "processes x --accumulate": micro_batches,
             "images": [labeled.ids, unlabeled.ids, val.ids]}
    saved = None
    if resume and last.exists():
        saved = load_checkpoint(last)
        before = saved.get("fixed", {})
        changed = {name for name in fixed if before.get(name) != fixed[name]} - MAY_CHANGE
        check(not changed, last, "is of a run with other", *sorted(changed),
              ": keep them, or change --out")
    student, teacher, ddp_student = build_networks(cfg, device)

    groups = []
    for name, module in student.named_children():
        factor = 1 if name == "backbone" else cfg.head_lr
        groups.append({"params": module.parameters(), "lr": factor * cfg.lr})
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_steps, power=0.9)

    # The state of a run: new, or as last.pt has it
    trained = {"student": student, "teacher": teacher, "optimizer": optimizer, "schedule": schedule}
    log = []  # one row of COLUMNS per epoch
    gammas = []  # hardness of all unlabeled images by epoch, NaN where it was not measured
    best_miou = -1.0
    if saved:
        log, gammas, best_miou = saved["history"]
        for name, part in trained.items():
            part.load_state_dict(saved[name])
    if RANK == 0:
        with explain(out, "has to be new: change --out; --resume goes on with a run"):
            out.mkdir(parents=True, exist_ok=resume)
        save(out / "settings.json", lambda file: file.write(json.dumps(vars(cfg)).encode()))
        print(len(labeled), f"labeled images ({source}),", len(unlabeled), "unlabeled,", len(val),
              "for validation;", steps, "steps an epoch; on", device, "into", out)
        if cfg.warmup_epochs >= cfg.epochs:
            print("The warm-up takes all epochs: no unlabeled image is used.")
        report = load_report() if REPORT.exists() else {}
        if not report:
            print("No tables and pictures without", REPORT)

    for epoch in range(len(log), cfg.epochs):
        start = time.monotonic()
        measured = []
        gamma = torch.full((len(unlabeled.ids),), -1.0, device=device)  # -1: not measured
        if epoch < cfg.warmup_epochs or cfg.method == "supervised":
            loaders = [make_loader(labeled, epoch, steps, 2 * cfg.batch)]
        else:
            loaders = [make_loader(x, epoch, steps, cfg.batch) for x in (labeled, unlabeled)]
        for i, parts in enumerate(zip(*loaders), epoch * steps * cfg.accumulate):
            step, micro_step = divmod(i, cfg.accumulate)
            last_of_step = micro_step == cfg.accumulate - 1
            batch = {name: x.to(device, non_blocking=True)
                     for part in parts for name, x in part.items()}
            rng = np.random.default_rng((cfg.seed, step, RANK * cfg.accumulate + micro_step))
            generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
            # DDP averages gradients over the processes in a step's last backward pass.
            ddp_student.require_backward_grad_sync = last_of_step
            loss, metrics, seen = micro_batch_loss(ddp_student, teacher, batch, generator, cfg)
            (loss / cfg.accumulate).backward()
            measured.append(metrics)
            if seen:
                gamma[batch["index"]] = seen["gamma"]
            if not last_of_step:
                continue
            lr = schedule.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if WORLD_SIZE > 1 and device.type == "cpu":  # in place of SyncBatchNorm
                for buffer in student.buffers():
                    if buffer.is_floating_point():
                        dist.all_reduce(buffer)
                        buffer /= WORLD_SIZE
            ema_step = step - cfg.warmup_epochs * steps if epoch > cfg.warmup_epochs else 0
            update_teacher(teacher, student, ema_step, cfg.ema_decay)

            if RANK == 0 and (step + 1) % (10 if terminal else 100) == 0:
                loss_x, loss_u = metrics[:2].tolist()
                pace = (time.monotonic() - start) / (step + 1 - epoch * steps)
                print(f"epoch {epoch + 1}  step {step + 1}/{total_steps}  loss_x {loss_x:.3f}  "
                      f"loss_u {loss_u:.3f}  {pace * (total_steps - step - 1) / 60:.0f} min left  ",
                      end="\r" if terminal else "\n", flush=True)
                check(loss.isfinite(), NOT_FINITE)

        check(all(x.isfinite().all() for x in student.state_dict().values()), NOT_FINITE)
        means = torch.stack(measured).double().mean(0) / WORLD_SIZE
        if WORLD_SIZE > 1:
            dist.all_reduce(means)
            dist.all_reduce(gamma, dist.ReduceOp.MAX)
        check(means[0], "no pixel of the labeled masks is labeled: see data/prepare.py own")
        last_epoch = epoch + 1 == cfg.epochs
        evaluated = last_epoch or (epoch + 1) % cfg.eval_every == 0
        iou = evaluate(teacher, val) if evaluated else torch.tensor(math.nan)
        if RANK > 0:
            continue

        miou = iou.nanmean().item()
        log.append([epoch + 1, step + 1, lr, *means.tolist(), miou, time.monotonic() - start])
        gammas.append(gamma.where(gamma >= 0, math.nan).cpu())
        row = zip(COLUMNS, log[-1])
        print(*(f"{name} {value:.5g} " for name, value in row if not math.isnan(value)), flush=True)
        state = {"settings": vars(cfg), "teacher": teacher.state_dict()}
        if miou > best_miou:
            best_miou = miou
            save(out / "best.pt", partial(torch.save, state))
        state |= {name: part.state_dict() for name, part in trained.items()}
        state |= {"fixed": fixed, "history": [log, gammas, best_miou]}
        if report:
            report["write_report"](log, gammas, unlabeled.ids, teacher, val, seen)
        save(last, partial(torch.save, state))
        if last_epoch:
            print_scores(iou, cfg)
    if RANK == 0:
        print(f"done: the teacher's best mIoU is {best_miou:.2f}, in {out / 'best.pt'}")


# 12 ---------- the command line

def parse(argv):
    """Settings and jobs. A setting is the flag's, else the checkpoint's or preset's, or default."""
    parser = argparse.ArgumentParser(
        add_help=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--resume", action="store_true", help="go on with the run in --out, if any")
    job.add_argument("--eval", metavar="CHECKPOINT", type=Path, help="score a checkpoint")
    job.add_argument("--predict", metavar="IMAGE", nargs="+",
                     help="write masks of images, or folders of them, into --out")
    parser.add_argument("--checkpoint", help="for --predict")
    helps = dict(re.findall(r"(\w+): .* = .*  # (.*)", inspect.getsource(Settings)))
    for field in dataclasses.fields(Settings):
        options = {"type": type(field.default), "choices": get_args(field.type) or None}
        if field.name == "background":
            options = {"type": lambda text: None if text == "none" else int(text)}
        if field.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default,
                            help=helps[field.name], **options)
    args, _ = parser.parse_known_args(argv, argparse.Namespace(dataset=None))
    defaults = PRESETS.get(args.dataset or Settings.dataset, {})
    checkpoint = args.eval or args.checkpoint
    if checkpoint:
        defaults = vars(load_checkpoint(checkpoint)["settings"]) | {"out": "", "device": ""}
        if args.dataset:
            defaults["root"] = ""
    parser.set_defaults(**defaults)
    parser.add_argument("-h", "--help", action="help", help="show this, with --dataset's defaults")
    args = parser.parse_args(argv)
    check(bool(args.predict) == bool(args.checkpoint), "--predict and --checkpoint go together")
    return Settings(**{name: getattr(args, name) for name in helps}), args


def run(argv):
    """Train, score or predict."""
    cfg, args = parse(argv)
    device = set_up_device(cfg)
    root = Path(cfg.root)
    if args.eval:
        ids = read_ids(root / "ImageSets/Segmentation/val.txt")
        iou = evaluate(load(args.eval, device, cfg), SegmentationDataset(ids, "whole", cfg))
        if RANK == 0:
            print_scores(iou, cfg)
    elif args.predict:
        check(WORLD_SIZE == 1, "--predict takes one process: start it without torchrun")
        model = load(args.checkpoint, device, cfg)
        load_report()["predict_images"](model, args.predict, Path(args.out))
    else:
        if RANK == 0 and cfg.dataset == "demo" and not root.exists():
            runpy.run_path(str(DATA / "demo.py"))["draw_demo"](root)
        if WORLD_SIZE > 1:
            dist.barrier()
        train(cfg, device, args.resume)


def main(argv=None):
    """The program. A mistake of the user's ends in one line and exit code 2."""
    code = 2
    try:
        run(argv)
        code = 0
    except (UserError, OSError) as error:  # a loader's has a traceback before it
        message = str(error).strip().rpartition("UserError: ")[2]
    except (torch.OutOfMemoryError, MemoryError):
        message = "out of memory: raise --accumulate or lower --crop; to evaluate, add --sliding"
    except Exception:
        code = 1
        message = traceback.format_exc()
    if code:
        if LOCAL_RANK > 0 or code == 1 and WORLD_SIZE > 1:
            time.sleep(5)  # meanwhile torchrun ends this one, if another has reported
        print("imas.py:", message, file=sys.stderr, flush=True)
    if WORLD_SIZE > 1:
        # At once: NCCL can wait for ever, and older torch hung in joining threads.
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends at once
    sys.stdout.reconfigure(errors="backslashreplace")  # for consoles that lack a letter
    main()

"""What people look at: the tables and pictures of a run, and predicted masks.

imas.py, which is imported here, calls write_report after each epoch, and predict_images. The
pictures of a run are drawn by matplotlib; without it all else works.
"""

import math
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import imas

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError:
    Figure = None

# PASCAL VOC's colors, uint8 [256, 3]: bits 0, 3, 6 of a class are the highest bits of its red,
# bits 1, 4, 7 of its green, bits 2, 5 of its blue.
BITS = np.arange(256)[:, None] >> np.arange(9) & 1
PALETTE = np.packbits(BITS.reshape(256, 3, 3), axis=1)[:, 0]


def write_report(log, gammas, ids, model, dataset, seen):
    """Write the tables of a run, and after an evaluation its pictures, into its folder.

    log: a row of COLUMNS for each epoch. gammas: for each epoch the hardness of all unlabeled
    images, [N], NaN where it was not measured. ids: of the unlabeled images. model: the teacher,
    as build_model gives it. dataset: the validation images. seen: as of micro_batch_loss.
    """
    cfg = model.settings
    out = Path(cfg.out)
    write_tables(out, log, gammas, ids)
    if math.isnan(log[-1][imas.COLUMNS.index("miou")]):
        return
    if Figure is None:
        say_once("No pictures of the run: they take pip install matplotlib.")
        return
    names = cfg.class_names.split(",")
    imas.save(out / "curves.png", draw_curves(log, gammas).savefig)
    imas.save(out / "samples.png", draw_samples(model, dataset, names).savefig)
    if seen:
        imas.save(out / "unlabeled.png", draw_unlabeled(seen, cfg.tau, names).savefig)


@cache
def say_once(line):
    """Print a line, unless this program has done so before."""
    print(line)


def write_tables(out, log, gammas, ids):
    """Write log.csv, one row per epoch, and hardness.csv, one per epoch and image it measured."""
    write = partial(np.savetxt, delimiter=",", comments="", encoding="utf-8")
    header = ",".join(imas.COLUMNS)
    imas.save(out / "log.csv", partial(write, X=log, fmt="%.6g", header=header))
    rows = []
    for epoch, gamma in enumerate(gammas, 1):
        for id, value in zip(ids, gamma.tolist()):
            if value >= 0:
                rows.append((epoch, id.replace(",", ";"), f"{value:.6f}"))
    imas.save(out / "hardness.csv", partial(write, X=rows, fmt="%s", header="epoch,id,hardness"))


def draw_grid(cells, names):
    """A figure of `cells`, (title, image), four in a row, with a legend of the classes.

    An image is [H, W, 3] or [H, W, 4], or [H, W] from 0, black, to 1, white.
    """
    rows = len(cells) // 4
    figure = Figure((11, 2.8 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    for axis, (title, image) in zip(axes.flat, cells):
        axis.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=13, parse_math=False)
        axis.axis("off")
    colors = [*PALETTE[:len(names)], PALETTE[255]]
    for name, color in zip([*names, "ignored"], colors):
        axis.plot([], "s", color=color / 255, label=name)
    figure.legend(loc="outside lower center", ncols=7, fontsize=12)
    return figure


def draw_samples(model, dataset, names):
    """Five images of `dataset`, of kind "whole": ground truth, and what the teacher predicts."""
    cells = []
    for i in range(0, len(dataset), math.ceil(len(dataset) / 5)):
        item = dataset[i]
        confidence, label = imas.predict(model, item["image"][None])[0].cpu().max(0)
        cells += [
            (dataset.ids[i], item["image"].permute(1, 2, 0)),
            ("ground truth", PALETTE[item["label"]]),
            ("teacher's prediction", PALETTE[label]),
            ("confidence (white: 1)", confidence),
        ]
    return draw_grid(cells, names)


def draw_unlabeled(seen, tau, names):
    """What the student saw of a few unlabeled images: their views, and their pseudo-labels."""
    gamma = seen["gamma"]
    few = gamma.argsort()[::max(len(gamma) // 4, 1)][:4]  # from easy to hard
    seen = {name: x[few].cpu() for name, x in seen.items() if x is not None}
    cells = []
    for i, gamma in enumerate(seen["gamma"]):
        label = seen["pseudo_label"][i].where(seen["valid"][i], 255)
        opacity = np.where(seen["confidence"][i] >= tau, 255, 64).astype(np.uint8)
        opacity[~seen["valid"][i]] = 0
        titles = {
            "weak": f"weak view, hardness {gamma:.2f}",
            "intensity": "intensity view",
            "cutmix": "CutMix view",
        }
        if "cutmix" not in seen:
            titles["cutmix"] = "no CutMix in this step"
        for name, title in titles.items():
            view = seen.get(name, seen["weak"])[i].permute(1, 2, 0)
            view = view * torch.tensor(imas.STD) + torch.tensor(imas.MEAN)
            cells.append((title, view.clamp(0, 1)))
        pseudo_label = np.dstack([PALETTE[label], opacity])
        cells.append((f"pseudo-label (pale: under {tau:g})", pseudo_label))
    figure = draw_grid(cells, names)
    for axis, box in zip(figure.axes[2::4], seen.get("box", [])):
        axis.contour(box.numpy(), [0.5], colors="magenta")
    return figure


def draw_curves(log, gammas):
    """The columns of log.csv, and the paper's Figure 3c: the hardness of single images by epoch,
    of the three easiest and the three hardest.
    """
    figure = Figure((11, 6), layout="constrained")
    axes = figure.subplots(2, 3).flat
    table = dict(zip(imas.COLUMNS, np.transpose(log)))
    labels = {
        "miou": "mIoU of the teacher (%)",
        "loss_x": "supervised loss",
        "loss_u": "unlabeled loss",
        "hardness": "mean hardness",
        "confident": "fraction of confident pixels",
    }
    for axis, (name, label) in zip(axes, labels.items()):
        known = np.isfinite(table[name])
        axis.plot(table["epoch"][known], table[name][known], ".-")
        axis.set_xlabel("epoch", fontsize=13)
        axis.set_ylabel(label, fontsize=13)
    courses = torch.stack(gammas)  # [epochs, images]
    easy_to_hard = courses.nanmean(0).argsort()
    few = torch.cat([easy_to_hard[:3], easy_to_hard[3:][-3:]])
    axes[5].plot(table["epoch"], courses[:, few].numpy(), ".-")
    axes[5].set_xlabel("epoch", fontsize=13)
    axes[5].set_ylabel("hardness of six images", fontsize=13)
    for axis in figure.axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(0.5, len(log) + 0.5)
    return figure


def predict_images(model, names, out):
    """Write NAME.png, a palette mask, and NAME_overlay.jpg of images, files or folders of them."""
    imas.check(out.name, "--predict needs --out, a new folder")
    images = {}
    for name in names:
        found = imas.find_images(name)
        if Path(name).is_file():
            found = {Path(name).stem: Path(name)}
        imas.check(name and found, "no image in", repr(name), ": change --predict")
        doubled = images.keys() & found.keys()
        imas.check(not doubled, "two images of one name: rename one of", *sorted(doubled)[:3])
        images |= found
    with imas.explain(out, "has to be a new folder: change --out"):
        out.mkdir(parents=True)
    failed = 0
    for id, path in images.items():
        try:
            image = imas.read_image(path)
            label = imas.predict(model, TF.pil_to_tensor(image)[None])[0].argmax(0)
        except (imas.UserError, RuntimeError) as error:  # no image; no memory
            print("imas.py: no mask:", error, file=sys.stderr)
            failed += 1
            continue
        mask = Image.fromarray(label.byte().cpu().numpy())
        mask.putpalette(PALETTE.tobytes())
        overlay = Image.blend(image, mask.convert("RGB"), 0.5)
        Path(out, id).parent.mkdir(parents=True, exist_ok=True)
        imas.save(out / f"{id}.png", partial(mask.save, format="PNG"))
        imas.save(out / f"{id}_overlay.jpg", partial(overlay.save, format="JPEG"))
    print(len(images) - failed, "masks in", out)
    imas.check(not failed, failed, "images have no mask: see above")

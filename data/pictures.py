"""The pictures of a run, drawn by matplotlib: imas.py calls this after each evaluation.

Each function returns a matplotlib Figure. names: of the classes; palette: uint8 [256, 3], their
colors, of which the last is that of ignored pixels.
"""

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw_grid(cells, names, palette):
    """A figure of `cells`, (title, image), four in a row, with a legend of the classes.

    An image is [H, W, 3] or [H, W, 4], or [H, W] from 0, black, to 1, white.
    """
    rows = len(cells) // 4
    figure = Figure((11, 2.8 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    for axis, (title, image) in zip(axes.flat, cells):
        axis.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=13)
        axis.axis("off")
    colors = [*palette[:len(names)], palette[255]]
    for name, color in zip([*names, "ignored"], colors):
        axis.plot([], "s", color=color / 255, label=name)
    figure.legend(loc="outside lower center", ncols=7, fontsize=12)
    return figure


def draw_samples(predict, dataset, names, palette):
    """Five images of `dataset`, of kind "whole": the ground truth, and what the teacher predicts.

    predict: from an image, uint8 [1, 3, H, W], to probabilities float [1, C, H, W].
    """
    cells = []
    for i in range(0, len(dataset), math.ceil(len(dataset) / 5)):
        item = dataset[i]
        confidence, label = predict(item["image"][None])[0].cpu().max(0)
        cells += [
            (dataset.ids[i], item["image"].permute(1, 2, 0)),
            ("ground truth", palette[item["label"]]),
            ("teacher's prediction", palette[label]),
            ("confidence (white: 1)", confidence),
        ]
    return draw_grid(cells, names, palette)


def draw_unlabeled(seen, tau, names, palette, mean, std):
    """What the student saw of a few unlabeled images: their views, and their pseudo-labels.

    seen: as of micro_batch_loss. mean, std: of red, green and blue, by which views are normalized.
    """
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
            view = view * torch.tensor(std) + torch.tensor(mean)
            cells.append((title, view.clamp(0, 1)))
        pseudo_label = np.dstack([palette[label], opacity])
        cells.append((f"pseudo-label (pale: under {tau:g})", pseudo_label))
    figure = draw_grid(cells, names, palette)
    for axis, box in zip(figure.axes[2::4], seen.get("box", [])):
        axis.contour(box.numpy(), [0.5], colors="magenta")
    return figure


def draw_curves(log, columns, gammas):
    """The columns of log.csv, and the paper's Figure 3c: the hardness of single images by epoch,
    of the three easiest and the three hardest.

    log: a row of `columns` for each epoch. gammas: for each epoch the hardness of all unlabeled
    images, [N], NaN where it was not measured.
    """
    figure = Figure((11, 6), layout="constrained")
    axes = figure.subplots(2, 3).flat
    table = dict(zip(columns, np.transpose(log)))
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

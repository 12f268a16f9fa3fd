"""Puts a dataset under data/NAME in the layout that imas.py reads.

    python data/prepare.py demo        draws 500 small scenes (a few seconds, nothing is downloaded)

The layout is PASCAL VOC's: JPEGImages/ID.jpg or .png, SegmentationClass/ID.png, ImageSets/Segmentation/{train,val}.txt.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

DATA = Path(__file__).resolve().parent

# The demo: scenes of 64x64 pixels -----------------------------------------------------------------------------------
# Each class has an outline, a typical hue and a typical texture. Hues spread so widely that neighbours on the colour
# circle overlap, one object in four wears another class's texture, and the background takes any hue: no single cue
# gives the class, all of them together do.
DEMO_CLASSES = ("background", "disc", "square", "triangle", "cross", "ring")
SIZE, TRAIN, VAL = 64, 400, 100


def polygon(class_id, centre, radius, angle):
    """Corners [(x, y), ...] of an object's outline; the ring's hole is cut out by its caller."""
    if class_id in (1, 5):
        turns, radii = np.arange(40) / 40, np.ones(40)
    elif class_id == 4:                                     # a cross: 12 corners, 4 of them near the centre
        turns = (np.arange(4)[:, None] / 4 + np.array([-0.05, 0.05, 0.125])).ravel()
        radii = np.tile([1.0, 1.0, 0.44], 4)
    else:
        corners = 4 if class_id == 2 else 3
        turns, radii = np.arange(corners) / corners, np.full(corners, 1.15)
    angles = 2 * np.pi * turns + angle
    return [tuple(p) for p in centre + radius * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)]


def texture(kind, angle, rng):
    """A pattern in [-1, 1] over the whole scene: 1 plain, 2 stripes, 3 checks, 4 dots, 5 grain."""
    y, x = np.mgrid[:SIZE, :SIZE]
    u = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / rng.uniform(5, 8)
    v = (y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / rng.uniform(5, 8)
    return {1: np.zeros((SIZE, SIZE)), 2: np.sign(np.sin(u)), 3: np.sign(np.sin(u) * np.sin(v)),
            4: np.where(np.cos(u) + np.cos(v) > 0.9, 1.0, -0.3), 5: rng.uniform(-1, 1, (SIZE, SIZE))}[kind]


def clouds(cells, rng):
    """Smooth noise [SIZE, SIZE, 3] around 0 from a grid of cells x cells random colours."""
    grid = [Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32)) for _ in range(3)]
    return np.stack([np.asarray(g.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for g in grid], 2)


def draw_scene(rng):
    """One scene: image (uint8 [SIZE, SIZE, 3]) and mask (uint8 [SIZE, SIZE], the class of each pixel)."""
    def colour(hue, saturation, value):
        return np.asarray(Image.new("HSV", (1, 1), (int(hue % 1 * 255), int(saturation * 255), int(value * 255)))
                          .convert("RGB"), np.float64)[0, 0] / 255

    scene = colour(rng.random(), rng.uniform(0, 0.6), rng.uniform(0.25, 0.8)) + 0.08 * clouds(3, rng) \
        + 0.06 * clouds(9, rng) + rng.uniform(0, 0.12) * texture(int(rng.integers(1, 6)), rng.uniform(0, 6.3), rng)[..., None]
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(rng.integers(1, 5)):                     # the later object hides the earlier
        class_id = int(rng.integers(1, len(DEMO_CLASSES)))
        radius, angle = np.exp(rng.uniform(np.log(6), np.log(22))), rng.uniform(0, 2 * np.pi)
        centre = rng.uniform(4, SIZE - 4, 2)
        outline = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(outline).polygon(polygon(class_id, centre, radius, angle), fill=255)
        if class_id == 5:
            ImageDraw.Draw(outline).polygon(polygon(1, centre, 0.5 * radius, angle), fill=0)
        inside = np.asarray(outline) > 0
        kind = class_id if rng.random() < 0.75 else int(rng.integers(1, 6))
        hue = class_id / 5 + rng.normal(0, 0.09)
        paint = colour(hue, rng.uniform(0.45, 1), rng.uniform(0.5, 1)) * (1 + rng.uniform(0.15, 0.35) * texture(kind, angle, rng)[..., None])
        scene[inside], mask[inside] = paint[inside], class_id
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.7)
    light = 1 + strength * (x * np.cos(direction) + y * np.sin(direction))
    scene = scene * light[..., None] + rng.uniform(0.02, 0.08) * rng.normal(size=scene.shape)
    return (scene.clip(0, 1) * 255).round().astype(np.uint8), mask


def palette(classes=256):
    """VOC's colours: bits 0, 3, 6 ... of the class become the high bits of red, bits 1, 4, 7 of green, 2, 5 of blue."""
    ids = np.arange(classes)[:, None]
    return sum(((ids >> 3 * i + np.arange(3)) & 1) << 7 - i for i in range(8)).astype(np.uint8).ravel().tolist()


def demo(root=DATA / "demo"):
    """Draw the demo dataset into `root`: the same pixels on every machine; the folder appears whole or not at all."""
    root, new = Path(root), Path(f"{root}.new")
    shutil.rmtree(new, ignore_errors=True)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (new / folder).mkdir(parents=True)
    for split, count in (("train", TRAIN), ("val", VAL)):
        ids = [f"{split}_{i:04d}" for i in range(count)]
        for i, name in enumerate(ids):
            image, mask = draw_scene(np.random.default_rng((2211, 11335, len(split), i)))
            Image.fromarray(image).save(new / "JPEGImages" / f"{name}.png")
            mask = Image.fromarray(mask)
            mask.putpalette(palette())
            mask.save(new / "SegmentationClass" / f"{name}.png")
        (new / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    shutil.rmtree(root, ignore_errors=True)
    os.replace(new, root)
    print(f"drew {TRAIN} training and {VAL} validation scenes, classes {', '.join(DEMO_CLASSES)}: {root}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["demo"])
    parser.parse_args(argv)
    demo()


if __name__ == "__main__":
    sys.exit(main())

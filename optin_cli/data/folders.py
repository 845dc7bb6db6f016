"""Folders as data: where a split is, and images with label maps of the same file names."""

from __future__ import annotations

from pathlib import Path

from optin_cli.errors import InputError, UsageError

_ALIASES = ({"validation", "valid", "val", "dev"}, {"train", "training"}, {"test", "testing"})
_IMAGES = ("images", "image", "img", "imgs")
_MASKS = ("masks", "mask", "annotations", "annotation", "labels", "label", "gt")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"}


def names_of(split: str) -> set[str]:
    """Other names of a split."""
    return next((group for group in _ALIASES if split in group), {split})


def split_folder(path: Path, split: str) -> Path:
    """The folder of a split within `path`; `path` itself where it has none for any.

    Raises `UsageError` if there are folders of other splits alone.
    """
    splits = [d.name for d in sorted(path.iterdir()) if d.is_dir() and any(d.name in g for g in _ALIASES)]
    if splits and not names_of(split) & set(splits):
        raise UsageError(f"{path} has no folder for the split {split!r}", f"it has {', '.join(splits)}")
    return next((path / name for name in sorted(names_of(split)) if (path / name).is_dir()), path)


def image_mask_pairs(
    path: Path, split: str, image: str | None = None, mask: str | None = None
) -> dict[str, list[str]] | None:
    """Files of images and of their masks, by the names of their two folders; None if `path` has no such folders.

    They are in `images/` and `masks/` (or `annotations/`, `labels/`, or as `image` and `mask` say), within the
    folder of the split or with such folders in them. Raises `UsageError` where a named folder is not there,
    `InputError` for images without a mask.
    """
    for base in dict.fromkeys((path, *sorted(path / name for name in names_of(split)))):
        folders = [base / name for name in (image,) if name] or [base / name for name in _IMAGES]
        maps = [base / name for name in (mask,) if name] or [base / name for name in _MASKS]
        images = next((folder for folder in folders if folder.is_dir()), None)
        masks = next((folder for folder in maps if folder.is_dir()), None)
        if images is not None and masks is not None:
            return _pairs(images, masks, split)
    return None


def _pairs(images: Path, masks: Path, split: str) -> dict[str, list[str]]:
    """One row for each image, by its name."""
    found = _by_stem(split_folder(images, split))
    maps = _by_stem(split_folder(masks, split))
    if not found:
        raise InputError(f"{images} holds no images")
    if missing := sorted(set(found) - set(maps)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{found[missing[0]]}{more}: no mask in {masks} has its name",
            "give every image a mask of the same name, whatever its suffix",
        )
    stems = sorted(found)
    return {
        images.name: [str(found[stem]) for stem in stems],
        masks.name: [str(maps[stem]) for stem in stems],
    }


def _by_stem(folder: Path) -> dict[str, Path]:
    """Image files by their path below `folder`, without suffix."""
    files = (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES)
    return {str(file.relative_to(folder).with_suffix("")): file for file in files}

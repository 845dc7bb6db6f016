"""Label maps from Parquet, folders and hub data sets, and what is said of bad ones."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers.data import tiny_masks
from helpers.lazy import Lazy
from PIL import Image

from optin_cli.data.examples import Examples, sample
from optin_cli.data.label_maps import VOID, Masks, decode_mask
from optin_cli.data.readers import MASKS, ROWS
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError

datasets, pyarrow, parquet = Lazy("datasets"), Lazy("pyarrow"), Lazy("pyarrow.parquet")

IDS = np.array([[0, 1, 2], [3, 4, 255]], dtype=np.uint8)


def png(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def palette(ids: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids, "P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    return image


def table(path: Path, masks: list[bytes], size: tuple[int, int] = (3, 2), **columns) -> Path:
    images = [png(Image.new("RGB", size, (i, 0, 0))) for i in range(len(masks))]
    path.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"image": images, "mask": masks, **columns}), path / "train.parquet")
    return path


def read(path: Path | str, **spec) -> Examples:
    return sample(DataSpec(str(path), **spec), "image", None, 0, reader=MASKS)


def masks_of(examples: Examples, classes: int = 5, **options) -> list[np.ndarray]:
    return list(Masks(examples, classes, **options))


@pytest.mark.parametrize(
    "image",
    [
        palette(IDS),
        Image.fromarray(IDS),
        Image.fromarray(IDS.astype(np.uint16)),
    ],
    ids=["palette", "grey", "grey16"],
)
def test_ids_are_palette_indices_or_grey_values(image):
    assert np.array_equal(decode_mask(png(image)), IDS)


def test_void_becomes_one_class_whatever_its_id(tmp_path):
    (found,) = masks_of(read(table(tmp_path, [png(palette(IDS))])))
    assert found.tolist() == [[0, 1, 2], [3, 4, VOID]]
    ids = np.where(IDS == 255, 5, IDS)
    (found,) = masks_of(read(table(tmp_path / "b", [png(palette(ids))]), ignore_index=5))
    assert found.tolist() == [[0, 1, 2], [3, 4, VOID]]


def test_reduced_labels_have_no_background(tmp_path):
    (found,) = masks_of(read(table(tmp_path, [png(palette(IDS))])), 4, reduced=True)
    assert found.tolist() == [[VOID, 0, 1], [2, 3, VOID]]


@pytest.mark.parametrize(
    ("images", "masks", "split"),
    [
        ("images", "masks", "train"),
        ("images", "annotations", "train"),
        ("train/images", "train/masks", "train"),
        ("images/training", "annotations/training", "train"),
        ("images/val", "labels/val", "validation"),
    ],
)
def test_folders_pair_images_with_masks_by_name(images, masks, split, tmp_path):
    made = tiny_masks(tmp_path / "made", 3)
    for kind, target in (("images", images), ("masks", masks)):
        (tmp_path / "data" / target).parent.mkdir(parents=True, exist_ok=True)
        (made / kind).rename(tmp_path / "data" / target)
    examples = read(tmp_path / "data", split=split)
    files = [
        [Path(row[c]["path"]).stem for row in examples.rows] for c in vars(examples.columns).values() if c
    ]
    assert files == [["000", "001", "002"]] * 2
    stored = Image.open(tmp_path / "data" / masks / "001.png")
    assert np.array_equal(masks_of(examples)[1] != VOID, np.asarray(stored) != 255)


def test_folders_may_have_any_names_that_are_given(tmp_path):
    made = tiny_masks(tmp_path, 2)
    (made / "images").rename(tmp_path / "photos")
    (made / "masks").rename(tmp_path / "truth")
    examples = read(tmp_path, image="photos", mask="truth")
    assert (examples.columns.image, examples.columns.mask) == ("photos", "truth")
    again = examples.describe()
    assert read(tmp_path, image=again["image"], mask=again["mask"]).fingerprint == again["fingerprint"]


def test_a_hub_data_set_has_masks_among_its_images(tmp_path, monkeypatch):
    image = Image.new("RGB", (3, 2))
    published = datasets.Dataset.from_dict({"pixel_values": [image], "label": [Image.fromarray(IDS)]})
    published = published.cast(datasets.Features(dict.fromkeys(published.features, datasets.Image())))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: published)
    examples = read("org/scenes")
    assert (examples.columns.image, examples.columns.mask) == ("pixel_values", "label")
    assert masks_of(examples)[0].tolist() == [[0, 1, 2], [3, 4, VOID]]


def test_images_alone_have_no_masks_and_other_tasks_see_none(tmp_path):
    path = table(tmp_path, [png(palette(IDS))], label=[1])
    assert read(path).columns.mask == "mask"
    plain = sample(DataSpec(str(path)), "image", None, 0, reader=ROWS)
    assert (plain.columns.mask, plain.columns.label) == (None, "label")
    parquet.write_table(pyarrow.table({"image": [png(Image.new("RGB", (3, 2)))]}), tmp_path / "train.parquet")
    assert read(tmp_path).columns.mask is None


def test_masks_are_part_of_the_fingerprint(tmp_path):
    one = read(table(tmp_path / "a", [png(palette(IDS))])).fingerprint
    assert one != read(table(tmp_path / "b", [png(palette(IDS // 2))])).fingerprint


# ---- bad input ----


def test_ids_outside_the_classes_are_named_with_their_row_and_file(tmp_path):
    data = tiny_masks(tmp_path, 3, void=11)
    with pytest.raises(InputError) as caught:
        masks_of(read(data))
    assert "the mask in row 0 (000.png) has the ids 11, but the model has classes 0..4" in str(caught.value)
    assert "ignore_index=11" in str(caught.value)
    masks_of(read(data, ignore_index=11))


def test_several_ids_outside_the_classes_are_no_void(tmp_path):
    data = tiny_masks(tmp_path, 3, classes=200)
    with pytest.raises(InputError, match="has the ids") as caught:
        masks_of(read(data))
    assert "ignore_index" not in caught.value.hint and "trained on these classes" in caught.value.hint


def test_an_image_and_a_mask_of_other_sizes_are_named(tmp_path):
    path = table(tmp_path, [png(palette(IDS)), png(palette(IDS))], size=(3, 2))
    assert len(masks_of(read(path))) == 2
    path = table(tmp_path / "b", [png(palette(IDS.T))])
    with pytest.raises(InputError, match="row 0 has 2 x 3 pixels, its image 3 x 2"):
        masks_of(read(path))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (png(Image.new("RGB", (3, 2))), "holds colours"),
        (png(palette(IDS))[:40], "can't be used"),
        (b"", "is empty"),
        (None, "there is none"),
    ],
    ids=["colours", "cut", "empty", "none"],
)
def test_a_mask_that_is_none_is_named(content, told, tmp_path):
    path = table(tmp_path, [png(palette(IDS)), content])
    with pytest.raises(InputError, match="mask in row 1") as caught:
        masks_of(read(path))
    assert told in str(caught.value)


def test_an_image_without_a_mask_is_named(tmp_path):
    data = tiny_masks(tmp_path, 3)
    (data / "masks" / "001.png").unlink()
    with pytest.raises(InputError, match=r"001\.jpg: no mask in .*masks has its name"):
        read(data)


def test_a_mask_column_that_is_not_there_or_holds_no_images(tmp_path):
    path = table(tmp_path, [png(palette(IDS))], label=[1])
    with pytest.raises(UsageError, match="no column 'truth'"):
        read(path, mask="truth")
    with pytest.raises(UsageError, match=r"'label' of .* holds no images"):
        read(path, mask="label")


def test_several_columns_of_masks_must_be_told_apart(tmp_path):
    path = table(tmp_path, [png(palette(IDS))], extra=[png(palette(IDS))])
    assert read(path).columns.mask == "mask"
    renamed = pyarrow.table(
        {
            name: parquet.read_table(path / "train.parquet")[old]
            for name, old in (("image", "image"), ("fine", "mask"), ("coarse", "extra"))
        }
    )
    parquet.write_table(renamed, path / "train.parquet")
    with pytest.raises(UsageError, match=r"several columns of images"):
        read(path)
    assert read(path, mask="coarse").columns.mask == "coarse"

"""Find the columns of a data set that hold the text, the image or recording, and the label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optin_cli.data.sources import DataSpec
from optin_cli.data.usual_names import AUDIOS, LABELS, MASKS, PAIRS, SINGLES
from optin_cli.errors import InputError, UsageError, param

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Columns:
    """Resolved columns: one or two `text` columns, an `image` or an `audio` column; perhaps a `label`."""

    text: tuple[str, ...] = ()
    image: str | None = None
    label: str | None = None
    labels: tuple[str, ...] = ()
    """Instead of `label`: columns of 0 and 1, or of numbers, one for each of several labels."""
    mask: str | None = None
    """Label maps: a class id for each pixel of the image."""
    words: bool = False
    """The text column holds lists of words (token classification)."""
    audio: str | None = None
    """Recordings; `text` is then their transcript, where the task has one."""

    @property
    def stored(self) -> str | None:
        """The column of files that the model reads: images or recordings."""
        return self.image or self.audio


def find_columns(dataset: Dataset, data: DataSpec, modality: str, masks: bool = False) -> Columns:
    """Find the columns from the features, or check the ones the user named. With `masks`, labels are label maps.

    Raises `UsageError` for a named column that is not there or not of that kind, `InputError` when nothing fits.
    """
    features = dataset.features
    given = [c for c in (*data.text, data.label, data.image, data.mask, data.audio) if c]
    if absent := [c for c in given if c not in features]:
        raise UsageError(f"{data.spec} has no column {absent[0]!r}", f"it has {', '.join(features)}")
    if len(data.text) > 2:
        raise UsageError(
            f"{param('text')} takes one or two columns", f"{data.spec} has {', '.join(features)}"
        )
    label = data.label or _label(features)
    if modality == "image":
        for given_image in filter(None, (data.image, data.mask if masks else None)):
            if not _is_image(features[given_image]):
                raise UsageError(
                    f"column {given_image!r} of {data.spec} holds no images", f"it is {features[given_image]}"
                )
        if not masks:
            return Columns(image=data.image or _image(features, data), label=label)
        mask = data.mask or _mask(features, data)
        rest = {name: feature for name, feature in features.items() if name != mask}
        return Columns(image=data.image or _image(rest, data), mask=mask)
    if modality == "audio":
        if data.audio and not (_is_audio(features[data.audio]) or _is_string(features[data.audio])):
            raise UsageError(
                f"column {data.audio!r} of {data.spec} holds no recordings", f"it is {features[data.audio]}"
            )
        return Columns(audio=data.audio or _audio(features, data), label=label)
    text = data.text or _text(features, data, label)
    for column in text:
        if not (_is_string(features[column]) or _is_words(features[column])):
            raise UsageError(f"column {column!r} of {data.spec} holds no text", f"it is {features[column]}")
    return Columns(text=text, label=label, words=_is_words(features[text[0]]))


def _label(features: dict[str, Any]) -> str | None:
    named = next((name for name in LABELS if name in features), None)
    return named or next((name for name, feature in features.items() if _is_class(feature)), None)


def _image(features: dict[str, Any], data: DataSpec) -> str:
    images = [name for name, feature in features.items() if _is_image(feature)]
    if len(images) == 1 or "image" in images:
        return "image" if "image" in images else images[0]
    if not images:
        raise InputError(
            f"{data.spec} has no image column; it has {', '.join(features)}", "this model reads images"
        )
    raise UsageError(
        f"{data.spec} has several image columns: {', '.join(images)}", f"name one with {param('image')}"
    )


def _audio(features: dict[str, Any], data: DataSpec) -> str:
    """The column of recordings: the only one, or by its name, also where it holds paths."""
    found = [name for name, feature in features.items() if _is_audio(feature)]
    named = next((name for name in AUDIOS if name in found), None) or (found[0] if len(found) == 1 else None)
    if named is None and not found:
        named = next((name for name in AUDIOS if name in features and _is_string(features[name])), None)
    if named is not None:
        return named
    if not found:
        raise InputError(
            f"{data.spec} has no column of recordings; it has {', '.join(features)}",
            f"this model reads recordings; name the column with {param('audio')}",
        )
    raise UsageError(
        f"{data.spec} has several columns of recordings: {', '.join(found)}",
        f"name one with {param('audio')}",
    )


def _mask(features: dict[str, Any], data: DataSpec) -> str | None:
    """The column of label maps: by its name, or the only one of images beside the image."""
    images = [name for name, feature in features.items() if _is_image(feature) and name != data.image]
    named = next((name for name in MASKS if name in images), None)
    rest = [name for name in images if name != "image"]
    if named or (len(rest) == 1 and len(rest) < len(images) + bool(data.image)):
        return named or rest[0]
    if len(rest) > 1:
        raise UsageError(
            f"{data.spec} has several columns of images: {', '.join(images)}",
            f"name the masks with {param('mask')}",
        )
    return None


def _text(features: dict[str, Any], data: DataSpec, label: str | None) -> tuple[str, ...]:
    strings = [n for n, f in features.items() if n != label and _is_words(f)]
    strings = strings or [n for n, f in features.items() if n != label and _is_string(f)]
    for pair in PAIRS:
        if set(pair) <= set(strings):
            return pair
    for single in SINGLES:
        if single in strings:
            return (single,)
    if len(strings) in (1, 2):
        return tuple(strings)
    if not strings:
        raise InputError(
            f"{data.spec} has no text column; it has {', '.join(features) or 'no columns'}",
            "this model reads text",
        )
    raise UsageError(
        f"{data.spec} has several text columns: {', '.join(strings)}",
        f"name one or two with {param('text', meta='A[,B]')}",
    )


def _is_class(feature: Any) -> bool:
    """A ClassLabel of `datasets`."""
    return hasattr(feature, "str2int")


def _is_image(feature: Any) -> bool:
    """An image of `datasets`, or the encoded bytes as other tools write them, with or without a path beside them."""
    from datasets import Image

    return isinstance(feature, Image) or _is_bytes(feature)


def _is_audio(feature: Any) -> bool:
    """The same for recordings."""
    from datasets import Audio

    return isinstance(feature, Audio) or _is_bytes(feature)


def _is_bytes(feature: Any) -> bool:
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(content, "dtype", None) in ("binary", "large_binary")


def _is_string(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string") and not hasattr(feature, "feature")


def _is_words(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    return inner is not None and getattr(inner, "dtype", None) in ("string", "large_string")

"""Recordings: WAV of every depth, stereo, other rates, and what is broken."""

from __future__ import annotations

from functools import cache
from io import BytesIO

import numpy as np
import pytest
from helpers.data import sound, tiny_audio_folder
from helpers.lazy import Lazy

from optin_cli.data.audio import Recording, decode, resampled
from optin_cli.data.encoded_files import BrokenFile
from optin_cli.data.examples import sample
from optin_cli.data.readers import TRANSCRIPTS
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError

datasets, pyarrow, parquet = Lazy("datasets"), Lazy("pyarrow"), Lazy("pyarrow.parquet")
wavfile = Lazy("scipy.io.wavfile")

RATE = 16000
TONE = sound(0.2, RATE, 440)


def wav(values: np.ndarray, rate: int = RATE) -> bytes:
    content = BytesIO()
    wavfile.write(content, rate, values)
    return content.getvalue()


def wav24(values: np.ndarray) -> bytes:
    """A WAV of 24 bits, which SciPy reads and does not write."""
    import wave

    content = BytesIO()
    with wave.open(content, "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(3)
        stream.setframerate(RATE)
        whole = (values * (2**23 - 1)).round().astype("<i4")
        stream.writeframes(whole.view(np.uint8).reshape(-1, 4)[:, :3].tobytes())
    return content.getvalue()


DEPTHS = {
    "8 bits": (lambda: wav((TONE * 127 + 128).round().astype(np.uint8)), 1 / 64),
    "16 bits": (lambda: wav((TONE * 32767).round().astype(np.int16)), 1e-4),
    "24 bits": (lambda: wav24(TONE), 1e-6),
    "32 bits": (lambda: wav((TONE * (2**31 - 1)).round().astype(np.int32)), 1e-6),
    "float": (lambda: wav(TONE.astype(np.float32)), 1e-7),
    "double": (lambda: wav(TONE), 1e-7),
}


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_gives_the_same_samples(depth):
    make, atol = DEPTHS[depth]
    found = decode({"bytes": make(), "path": None})
    assert (found.rate, found.samples.dtype) == (RATE, np.float32)
    np.testing.assert_allclose(found.samples, TONE, rtol=0, atol=atol)


def test_stereo_becomes_the_mean_of_its_channels():
    both = np.stack([TONE, -0.5 * TONE], axis=1).astype(np.float32)
    np.testing.assert_allclose(decode(wav(both)).samples, 0.25 * TONE, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100])
def test_another_rate_is_the_same_tone(rate):
    def tone(rate: int) -> np.ndarray:
        return np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate).astype(np.float32)

    found = resampled(Recording(tone(rate), rate), RATE)
    expected = tone(RATE)
    assert abs(len(found) - len(expected)) <= 1
    inner = slice(400, len(expected) - 400)  # a filter needs both sides
    np.testing.assert_allclose(found[inner], expected[inner], atol=0.01)


def test_frequencies_that_a_lower_rate_lacks_are_left_out():
    high = np.sin(2 * np.pi * 15000 * np.arange(48000) / 48000).astype(np.float32)
    assert np.abs(resampled(Recording(high, 48000), RATE)[200:-200]).max() < 0.01


def test_the_models_own_rate_changes_nothing():
    samples = TONE.astype(np.float32)
    assert resampled(Recording(samples, RATE), RATE) is samples


@cache
def whole() -> bytes:
    return DEPTHS["16 bits"][0]()


BROKEN = {
    "empty": (lambda: b"", "it is empty"),
    "no sound": (lambda: wav(np.zeros(0, np.int16)), "no sound"),
    "cut": (lambda: whole()[:1000], "EOF|incomplete|damaged"),
    "a header alone": (lambda: whole()[:30], "."),
    "text": (lambda: b"hello, this is no sound at all", "unknown kind|Format"),
    "not finite": (lambda: wav(np.full(100, np.nan, np.float32)), "not finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_recordings_say_why(case):
    make, why = BROKEN[case]
    with pytest.raises(BrokenFile, match=why):
        decode({"bytes": make(), "path": "a.wav"})


def test_damaged_bytes_raise_nothing_else():
    rng = np.random.default_rng(0)
    for _ in range(200):
        content = bytearray(whole())
        for at in rng.integers(4, 60, 3):  # the header
            content[at] = rng.integers(256)
        try:
            found = decode(bytes(content))
        except (BrokenFile, InputError):
            continue
        assert len(found.samples) and np.isfinite(found.samples).all()


def test_another_kind_names_the_package_it_needs():
    try:
        import soundfile  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="FLAC needs the package soundfile") as told:
            decode(b"fLaC" + bytes(100))
        assert "pip install 'optin[audio]'" in str(told.value.hint)
    else:
        with pytest.raises(BrokenFile):
            decode(b"fLaC" + bytes(100))


# ---- as data ----


def read(spec: DataSpec, **options):
    found = sample(spec, "audio", None, 0, **options)
    column = found.columns.audio
    return found, [decode(stored) for stored in found.rows[column]]


def test_a_folder_by_class(tmp_path):
    found, recordings = read(DataSpec(str(tiny_audio_folder(tmp_path))))
    assert found.rows.features["label"].names == ["high", "low"]
    assert found.rows["label"][:] == [0] * 6 + [1] * 6
    assert {r.rate for r in recordings} == {8000, 16000, 11025}


def test_a_folder_of_splits_and_of_splits_alone(tmp_path):
    tiny_audio_folder(tmp_path / "train", 4)
    tiny_audio_folder(tmp_path / "test", 2)
    assert len(read(DataSpec(str(tmp_path)))[1]) == 4
    assert len(read(DataSpec(str(tmp_path), split="test"))[1]) == 2


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_transcripts_in_a_metadata_file(name, tmp_path):
    tiny_audio_folder(tmp_path / "train", 2)
    files = ["high/000.wav", "low/001.wav"]
    if name == "metadata.csv":
        text = "file_name,transcription\n" + "".join(f"{f},said {i}\n" for i, f in enumerate(files))
    else:
        text = "".join(f'{{"file_name": "{f}", "transcription": "said {i}"}}\n' for i, f in enumerate(files))
    (tmp_path / "train" / name).write_text(text)
    found, recordings = read(DataSpec(str(tmp_path)), reader=TRANSCRIPTS)
    assert found.columns.text == ("transcription",)
    assert found.rows["transcription"][:] == ["said 0", "said 1"]
    assert len(recordings) == 2


def test_a_table_of_paths_beside_the_files(tmp_path):
    folder = tiny_audio_folder(tmp_path, 6, transcripts=True)
    for spec in (folder, folder / "train.csv"):
        found, recordings = read(DataSpec(str(spec)), reader=TRANSCRIPTS)
        assert (found.columns.audio, found.columns.text, len(recordings)) == ("audio", ("text",), 6)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "datasets", "folder"])
def test_files_within_parquet_and_streams(kind, stream, tmp_path):
    audio = [{"bytes": wav((TONE * 2**14).astype(np.int16)), "path": f"{i}.wav"} for i in range(6)]
    table = pyarrow.table({"audio": audio, "label": [0, 1] * 3})
    if kind == "datasets":  # as `datasets` writes them: the column is an Audio
        features = datasets.Features({"audio": datasets.Audio(), "label": datasets.Value("int64")})
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
    if kind == "folder":
        tiny_audio_folder(tmp_path, 6)
    else:
        parquet.write_table(table, tmp_path / "train.parquet")
    found, recordings = read(DataSpec(str(tmp_path), stream=stream))
    assert (found.columns.audio, found.columns.label, len(recordings)) == ("audio", "label", 6)


def test_a_broken_file_is_named_and_left_out(tmp_path, caplog):
    folder = tiny_audio_folder(tmp_path, 20)
    (folder / "low" / "003.wav").write_bytes(whole()[:500])
    found = sample(DataSpec(str(folder)), "audio", 12, 0)
    every = sample(DataSpec(str(folder)), "audio", None, 0)
    assert (len(found.rows), len(every.rows)) == (12, 19)
    assert "1 of 20 recordings" in caplog.text and "003.wav" in caplog.text
    for name in ("001", "005"):
        (folder / "low" / f"{name}.wav").write_bytes(b"")
    with pytest.raises(InputError, match=r"3 of 20 recordings .* more than a tenth"):
        sample(DataSpec(str(folder)), "audio", None, 0)


def test_columns_that_are_not_there(tmp_path):
    folder = tiny_audio_folder(tmp_path, 6, transcripts=True)
    with pytest.raises(UsageError, match="no column 'sound'"):
        sample(DataSpec(str(folder), audio="sound"), "audio", None, 0)
    with pytest.raises(InputError, match="transcripts"):
        classes = tiny_audio_folder(tmp_path / "more", 4)
        sample(DataSpec(str(classes)), "audio", None, 0, reader=TRANSCRIPTS)
    with pytest.raises(InputError, match="no column of recordings"):
        (tmp_path / "t.csv").write_text("text,label\na,1\n")
        sample(DataSpec(str(tmp_path / "t.csv")), "audio", None, 0)

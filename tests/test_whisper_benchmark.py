"""The parts of the benchmark on speech: weights of another layout, sentences to speak, the table."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.models import shared_model

PARTS = Path(__file__).resolve().parents[1] / "benchmarks/whisper_parts"
BLOCKS = 3


def part(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"whisper_parts_{name}", PARTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model, speech = part("model"), part("speech")


def stored(weights: dict[str, np.ndarray], alias: tuple[str, str]) -> bytes:
    """A model file of CTranslate2 in float32."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(weights))
    for name, array in weights.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        content += text(name) + shape + struct.pack("<BI", 0, array.nbytes) + array.tobytes()
    return content + struct.pack("<I", 1) + text(alias[0]) + text(alias[1])


def in_their_layout(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Weights of transformers as CTranslate2 names them, the projections of an attention in one array."""
    found = {}

    def put(target: str, *sources: str) -> None:
        for kind in ("weight", "bias"):
            like = state.get(f"{sources[-1]}.{kind}")
            parts = [
                state.get(f"{source}.{kind}", None if like is None else torch.zeros_like(like))
                for source in sources
            ]
            if parts[0] is not None:
                found[f"{target}/{kind}"] = torch.cat(parts).numpy()

    def norm(target: str, source: str) -> None:
        found[f"{target}/layer_norm/gamma"] = state[f"{source}.weight"].numpy()
        found[f"{target}/layer_norm/beta"] = state[f"{source}.bias"].numpy()

    for side in ("encoder", "decoder"):
        norm(side, f"model.{side}.layer_norm")
        found[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"].numpy()
        for layer in range(BLOCKS):
            theirs, ours = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            put(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{p}_proj" for p in "qkv"))
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/self_attention", f"{ours}.self_attn_layer_norm")
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn", f"{ours}.final_layer_norm")
            if side == "decoder":
                put(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                put(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{p}_proj" for p in "kv"))
                put(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                norm(f"{theirs}/attention", f"{ours}.encoder_attn_layer_norm")
    put("encoder/conv1", "model.encoder.conv1")
    put("encoder/conv2", "model.encoder.conv2")
    put("decoder/embeddings", "model.decoder.embed_tokens")
    return found


def test_weights_of_ctranslate2_become_those_of_transformers():
    state = shared_model("whisper").module.state_dict()
    content = stored(in_their_layout(state), ("decoder/projection/weight", "decoder/embeddings/weight"))
    read = model.variables(content)
    assert np.array_equal(read["decoder/projection/weight"], read["decoder/embeddings/weight"])
    found = model.renamed(read, BLOCKS)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_bias_of_keys_and_another_layout_are_refused():
    weights = in_their_layout(shared_model("whisper").module.state_dict())
    weights["encoder/layer_0/self_attention/linear_0/bias"] += 1
    with pytest.raises(ValueError, match="bias for its keys"):
        model.renamed(weights, BLOCKS)
    with pytest.raises(ValueError, match="has layout 7"):
        model.variables(struct.pack("<I", 7))


def test_sentences_are_plain_and_from_all_over(tmp_path):
    good = [f"The {word} sat on the mat and looked at the dog." for word in ("cat", "cow", "hen", "pig")]
    odd = "It cost 5 dollars in the year 1961, said he. A -- dash is read, or not, by the one who speaks it. Short one."
    path = tmp_path / "text.txt"
    path.write_text(f"{good[0]} {odd}\n{good[1]} {good[2]}\n{good[3]}\n")
    assert speech.sentences(path, 4) == good
    assert speech.sentences(path, 2) == [good[1], good[3]]

"""Models and data as people bring them: a command does its work, or says in clear words what is wrong and what to do.

An error that begins with "unexpected" is one that nobody thought of: none of these may end so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.cli import run
from helpers.data import sentences, tiny_image_folder, tiny_text_csv
from helpers.families import ENCODER_DECODERS
from helpers.lazy import Lazy
from helpers.models import copy_of, randomise, saved_model
from helpers.tokenizers import save_tokenizer
from safetensors.torch import load_file, save_file

transformers = Lazy("transformers")

QUICK = ["--samples", 8, "--batch-size", 4, "--method", "magnitude", "--compensate", "none"]


def configured(folder: Path, **changes: object) -> Path:
    """A BERT classifier with other entries in its config.json; None removes one."""
    copy_of(saved_model("bert"), folder)
    stored = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in stored.items() if v is not None}))
    return folder


def headed(folder: Path, class_name: str, like: str = "bert", **changes: object) -> Path:
    cls = getattr(transformers, class_name)
    config = cls.config_class(
        **{**transformers.AutoConfig.from_pretrained(saved_model(like)).to_dict(), **changes}
    )
    randomise(cls(config)).save_pretrained(folder)
    save_tokenizer("bert", folder)
    return folder


def prefixed(folder: Path) -> Path:
    copy_of(saved_model("bert"), folder)
    weights = {f"module.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without_pad(folder: Path, class_name: str, like: str) -> Path:
    return headed(folder, class_name, like, pad_token_id=None, architectures=[class_name])


def trocr(folder: Path) -> Path:
    from transformers import TrOCRConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    decoder = TrOCRConfig(
        vocab_size=80, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=32
    )
    encoder = ViTConfig(**small, image_size=32, patch_size=8)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    VisionEncoderDecoderModel(config).save_pretrained(folder)
    save_tokenizer("bert", folder)
    return folder


def other_tokenizer(folder: Path) -> Path:
    """A token was added to the tokenizer, and no embedding to the model: the commonest slip with pad tokens."""
    copy_of(saved_model("bert"), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained(folder)
    return folder


def holding(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / name).write_bytes(b"x")
    return folder


WORKS, REFUSED = 0, 1
MODELS: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "masked language model": (lambda f: headed(f, "BertForMaskedLM"), WORKS, ""),
    "multiple choice": (lambda f: headed(f, "BertForMultipleChoice"), WORKS, "no task covers the head"),
    "no architecture": (lambda f: configured(f, architectures=None), REFUSED, "names no architecture"),
    "unknown architecture": (lambda f: configured(f, architectures=["MyBert"]), REFUSED, "MyBert"),
    "gptq": (
        lambda f: configured(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        REFUSED,
        "gptq",
    ),
    "8 bit": (lambda f: configured(f, quantization_config={"load_in_8bit": True}), REFUSED, "bitsandbytes"),
    "data parallel": (prefixed, WORKS, "'module.'"),
    "llama without pad": (
        lambda f: without_pad(f, "LlamaForSequenceClassification", "llama"),
        WORKS,
        "pad_token_id",
    ),
    "gpt2 without pad": (
        lambda f: without_pad(f, "GPT2ForSequenceClassification", "gpt2"),
        WORKS,
        "pad_token_id",
    ),
    "dpr": (lambda f: headed(f, "DPRQuestionEncoder", projection_dim=0), WORKS, ""),
    "marian": (lambda f: copy_of(saved_model("marian"), f), WORKS, ""),
    "bert2bert": (lambda f: copy_of(saved_model("bert-to-bert"), f), WORKS, ""),
    "trocr": (trocr, REFUSED, "writes text about images"),
    "tokens without embeddings": (other_tokenizer, REFUSED, "('<added>'), and the model knows"),
    "other shapes": (lambda f: configured(f, intermediate_size=48), REFUSED, "of another shape"),
    "odd heads": (lambda f: configured(f, num_attention_heads=5), REFUSED, "not a multiple"),
    "unknown model type": (lambda f: configured(f, model_type="brontosaurus"), REFUSED, "brontosaurus"),
    "adapter": (lambda f: holding(f, "adapter_model.safetensors"), REFUSED, "merge it"),
    "gguf": (lambda f: holding(f, "model-Q4_K_M.gguf"), REFUSED, "GGUF"),
    "onnx": (lambda f: holding(f, "model.onnx"), REFUSED, "ONNX"),
    "tensorflow": (lambda f: holding(f, "tf_model.h5"), REFUSED, "TensorFlow"),
    "lightning": (lambda f: holding(f, "last.ckpt"), REFUSED, "Lightning"),
    "weights alone": (lambda f: holding(f, "best.pt"), REFUSED, "load them into the model"),
}


def clear(result: object, says: str) -> None:
    text = " ".join(result.stderr.split())
    assert "unexpected" not in text and "Traceback" not in text, text
    assert says in text, text


@pytest.mark.parametrize("case", MODELS)
def test_a_model_works_or_is_refused_in_clear_words(case, tmp_path):
    make, code, says = MODELS[case]
    model = make(tmp_path / "m")
    data = tiny_text_csv(tmp_path, rows=24, pairs=False)
    out = ["-o", tmp_path / "p", "--ranking", tmp_path / "r.h5"]
    clear(run("prune", model, "--data", data, "--flops", 0.6, *out, *QUICK, code=code), says)


def table(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    return write


def lines(rows: list[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TEXTS = sentences(12)
ROWS = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
DATA: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "semicolons": (table("t.csv", "text;label\n" + "".join(f"{t};1\n{t};0\n" for t in TEXTS)), WORKS, "semicolons"),
    "tabs": (table("t.csv", "text\tlabel\n" + "".join(f"{t}\t{i % 2}\n" for i, t in enumerate(TEXTS))), WORKS, "tabs"),
    "no header": (table("t.csv", "".join(f"{t},{i % 2}\n" for i, t in enumerate(TEXTS))), REFUSED, "no header"),
    "latin 1": (table("t.csv", "text,label\nschön,1\n".encode("latin-1")), REFUSED, "iconv"),
    "utf-16": (table("t.csv", "text,label\nschön,1\n".encode("utf-16")), REFUSED, "UTF-16"),
    "unquoted commas": (table("t.csv", "text\nyes, it is\nno, never\n"), REFUSED, "quotation marks"),
    "nulls": (table("t.jsonl", lines([*ROWS, {"text": None, "label": 1}])), WORKS, "1 of 13 rows"),
    "blank": (table("t.csv", "text,label\n,1\n ,0\n"), REFUSED, "has text in 'text'"),
    "null labels": (table("t.jsonl", lines([*ROWS, {"text": "a", "label": None}])), REFUSED, "label"),
    "labels of other kinds": (table("t.jsonl", lines([{**row, "label": [1, 0]} for row in ROWS])), REFUSED, "label"),
    "classes beyond": (table("t.jsonl", lines([{**row, "label": 7} for row in ROWS])), REFUSED, "7"),
    "unknown names": (table("t.jsonl", lines([{**row, "label": "meh"} for row in ROWS])), REFUSED, "meh"),
    "numbers for texts": (table("t.csv", "text,label\n1,1\n2,0\n"), REFUSED, "no text"),
    "nested": (table("t.json", json.dumps({"data": ROWS})), REFUSED, "no text column"),
    "chat": (table("t.jsonl", lines([{"messages": [{"role": "user", "content": "a"}]}])), REFUSED, "no text"),
    "mixed types": (table("t.jsonl", lines([{"text": "a", "label": 1}, {"text": 3}])), REFUSED, "no text column"),
    "several texts": (table("t.csv", "a,b,c,label\nx y,z,w,1\nx,y z,w,0\n"), 2, "--text"),
    "excel": (table("t.xlsx", b"PK\x03\x04"), 2, "of no known kind"),
    "an archive": (table("t.zip", b"PK\x03\x04"), 2, "of no known kind"),
    "images": (lambda folder: tiny_image_folder(folder / "images"), REFUSED, "no text column"),
    "an empty folder": (lambda folder: folder / "nothing", REFUSED, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_data_is_read_or_refused_in_clear_words(case, tmp_path):
    make, code, says = DATA[case]
    (tmp_path / "nothing").mkdir()
    data = make(tmp_path)
    clear(run("eval", saved_model("bert"), "--data", data, "--split", "train", code=code), says)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_a_trace_of_an_encoder_and_a_decoder_says_that_it_finds_one_list_of_blocks(name):
    clear(run("families", "--trace", saved_model(name), code=REFUSED), "an encoder and a decoder")


def test_a_baseline_of_an_unlisted_architecture_is_opened_by_what_the_pruned_folder_carries(tmp_path):
    from optin_cli.architectures.families import family_to_yaml, find_family

    config = transformers.AutoConfig.from_pretrained(saved_model("bert")).to_dict()
    config = transformers.ErnieConfig(
        **{k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    )
    model = tmp_path / "ernie"
    randomise(transformers.ErnieForSequenceClassification(config)).save_pretrained(model)
    save_tokenizer("bert", model)
    text = family_to_yaml(find_family(["bert"])).replace("bert", "ernie")
    (tmp_path / "ernie.yaml").write_text(text)
    data = tiny_text_csv(tmp_path, rows=24)
    out = ["-o", tmp_path / "p", "--ranking", tmp_path / "r.h5", "--anatomy", tmp_path / "ernie.yaml"]
    run("prune", model, "--data", data, "--flops", 0.6, *out, *QUICK)
    measured = ("--data", data, "--split", "train", "--samples", 8, "--json")
    assert json.loads(run("eval", tmp_path / "p", "--baseline", model, *measured).stdout)["fidelity"]
    times = ("--batch-size", 1, "--seq-len", 8, "--seconds", 0, "--repeats", 1, "--json")
    assert len(json.loads(run("bench", tmp_path / "p", "--baseline", model, *times).stdout)["timings"]) == 2
    refused = run("eval", model, "--data", data, "--split", "train", code=REFUSED)
    clear(refused, "nearest known are")

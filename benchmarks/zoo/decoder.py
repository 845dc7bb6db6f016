"""Train the zoo's decoder on Python's own standard library: an hour or two on one CPU core.

    python benchmarks/zoo/decoder.py --output FOLDER [--epochs 5]

Needs no data but a Python installation. The result is a transformers directory with its tokenizer, beside it the text
it was trained and measured on (text/train.txt, text/test.txt). The same command goes on where an interrupted run
stopped; --epochs may then move the end of the schedule. README.md is the model card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from training import Training, parser_of
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 256
END = "<|endoftext|>"
TEST_SHARE = 1 / 16
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
}
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,  # two heads of queries to each: what is pruned is such a group
    "head_dim": 16,
    "max_position_embeddings": 2 * CONTEXT,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def sources(limit: int | None) -> dict[str, list[str]]:
    """The standard library's source files, their code, comments and docstrings; pydoc_data is Python's language
    reference. A file is a text to test on by the hash of its name, so that another Python version moves none."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[str]] = {"train": [], "test": []}
    for path in sorted(root.rglob("*.py"))[:limit]:
        name = path.relative_to(root)
        if SKIPPED.intersection(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few files say in their first line that they are in another encoding
        share = hashlib.sha256(name.as_posix().encode()).digest()[0] / 256
        found["test" if share < TEST_SHARE else "train"].append(text)
    return found


def written(folder: Path, limit: int | None) -> dict[str, str]:
    """The text of both splits, as it is in `folder`; written there if it is not."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{split}.txt" for split in ("train", "test")}
    if not all(file.is_file() for file in files.values()):
        for split, texts in sources(limit).items():
            files[split].write_text("\n".join(texts), encoding="utf-8")
    return {split: file.read_text(encoding="utf-8") for split, file in files.items()}


def new_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=2 * CONTEXT
    )


def windows(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """All of a text as token ids, (windows, CONTEXT + 1): each begins with the last token of the one before."""
    lines = tokenizer(text.splitlines(keepends=True), verbose=False)["input_ids"]
    ids = np.fromiter((token for line in lines for token in line), dtype=np.int64)
    count = (len(ids) - 1) // CONTEXT
    places = np.arange(count)[:, None] * CONTEXT + np.arange(CONTEXT + 1)
    return torch.from_numpy(ids[places])


def new_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, because it learns much faster per epoch; AdamW for everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def nats(model: nn.Module, batch: Tensor, autocast: bool) -> Tensor:
    """The mean negative log likelihood of a batch (n, CONTEXT + 1) but its first tokens."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, test: Tensor, autocast: bool) -> float:
    """Of the windows of `test`."""
    parts = test.split(16)
    return math.exp(sum(float(nats(model, part, autocast)) * len(part) for part in parts) / len(test))


def new_training(settings: argparse.Namespace, rows: int, device: torch.device) -> Training:
    """A fresh model to train on so many windows."""
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(device)
    return Training(model, new_optimizers(model), settings, rows)


def run(training: Training, train: Tensor, test: Tensor, settings: argparse.Namespace) -> None:
    """Train to the end: a line each 50 steps, a test every epoch, a checkpoint at intervals."""
    saved = clock = time.monotonic()
    losses: list[Tensor] = []
    while training.done < training.total:
        batch = train[training.next_rows().to(train.device)]
        losses.append(training.descend(nats(training.model, batch, autocast=True), clip=1.0))
        if training.done % 50 == 0:
            rate = len(losses) * batch.numel() / (time.monotonic() - clock)
            loss = float(torch.stack(losses).mean())
            print(f"step {training.done}/{training.total}: loss {loss:.3f}, {rate:.0f} tokens/s", flush=True)
            losses, clock = [], time.monotonic()
        epoch, inside = divmod(training.done, training.per_epoch)
        if not inside:
            found = perplexity(training.model, test[:128], autocast=True)
            training.history.append({"epoch": epoch, "of": settings.epochs, "perplexity": found})
            print(f"epoch {epoch}/{settings.epochs}: perplexity {found:.2f}", flush=True)
        if time.monotonic() - saved > settings.save_every or training.done == training.total:
            training.save(settings.output / "work" / "state.pt")
            saved = time.monotonic()


def main() -> None:
    """Train, save, measure what was saved."""
    parser = parser_of(__doc__.splitlines()[0], epochs=5, batch_size=32)
    parser.add_argument("--files", type=int, help="read only the first so many files: for a try")
    settings = parser.parse_args()
    torch.set_flush_denormal(True)
    device = torch.device(settings.device)
    (settings.output / "work").mkdir(parents=True, exist_ok=True)
    texts = written(settings.output / "text", settings.files)
    if not all(texts.values()):
        raise SystemExit("so few files leave none to test on: give more --files")
    if not (settings.output / "tokenizer.json").is_file():
        new_tokenizer(texts["train"]).save_pretrained(settings.output)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(settings.output)
    train, test = (windows(tokenizer, texts[split]).to(device) for split in ("train", "test"))
    training = new_training(settings, len(train), device)
    training.restore(settings.output / "work" / "state.pt")
    run(training, train, test, settings)
    training.model.half().save_pretrained(settings.output)
    stored = AutoModelForCausalLM.from_pretrained(settings.output, dtype=torch.float32).to(device).eval()
    score = perplexity(stored, test, autocast=False)
    card = {
        "perplexity": score, "context": CONTEXT, "epochs": settings.epochs, **training.identity,
        "parameters": sum(p.numel() for p in stored.parameters()),
        "train_tokens": train[:, 1:].numel(), "test_tokens": test[:, 1:].numel(),
        "bytes_per_token": len(texts["test"].encode()) / test[:, 1:].numel(),
        "python": platform.python_version(), "history": training.history,
    }  # fmt: skip
    (settings.output / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{settings.output}: perplexity {score:.2f} (float16 weights, float32 arithmetic)")


if __name__ == "__main__":
    main()

"""What the zoo's training scripts share: steps that can be repeated to the bit, and a state to go on from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 0.04


def learning_rate(progress: float) -> float:
    """One cycle as a share of the peak: a short rise, then a straight line to zero."""
    return min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def batch_rows(rows: int, batch: int, seed: int, step: int) -> Tensor:
    """Row numbers (batch,) of a step: each epoch has its own permutation and leaves out its last few rows."""
    epoch, index = divmod(step, rows // batch)
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 10_000 + epoch))
    return shuffled[index * batch : (index + 1) * batch]


class Training:
    """Model, optimisers, steps done and history: everything that a resumed run needs."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        settings: argparse.Namespace,
        rows: int,
        identity: Sequence[str] = ("batch_size", "seed"),
    ) -> None:
        """`identity` names the settings that a resumed run must share; `rows` are those of an epoch."""
        self.model = model
        self.optimizers = optimizers
        self.peaks = [group["lr"] for group in self.groups()]
        self.identity = {key: getattr(settings, key) for key in identity}
        self.rows = rows
        self.per_epoch = rows // settings.batch_size
        self.total = settings.epochs * self.per_epoch
        self.done = 0
        self.history: list[dict[str, float]] = []

    def groups(self) -> list[dict[str, Any]]:
        """The optimisers' parameter groups; read anew each time, because loading a state replaces them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def next_rows(self) -> Tensor:
        """Row numbers of the next step, whose randomness is its own, so that resuming is exact."""
        torch.manual_seed(self.identity["seed"] * 1_000_000 + self.done)
        return batch_rows(self.rows, self.identity["batch_size"], self.identity["seed"], self.done)

    def descend(self, loss: Tensor, clip: float | None = None) -> Tensor:
        """One update; the loss, still on its device."""
        for group, peak in zip(self.groups(), self.peaks, strict=True):
            group["lr"] = peak * learning_rate((self.done + 1) / self.total)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.detach()

    def save(self, file: Path) -> None:
        """Write the state, whole or not at all."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"identity": self.identity, "done": self.done, "history": self.history}
        state |= {"model": self.model.state_dict(), "optimizers": optimizers}
        torch.save(state, partial := file.with_suffix(".partial"))
        partial.replace(file)

    def restore(self, file: Path) -> None:
        """Go on from `file`, if it is there."""
        if not file.is_file():
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["identity"] != self.identity:
            raise SystemExit(f"{file} was made with {state['identity']}: give those, or another --output")
        self.done, self.history = state["done"], state["history"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def parser_of(description: str, *, epochs: int | None, batch_size: int) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; work/ in it can go")
    parser.add_argument("--epochs", type=int, default=epochs, help="a resumed run may name another end")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-every", type=float, default=240, help="seconds between checkpoints")
    return parser

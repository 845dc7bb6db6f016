"""The tokens of a fast tokenizer, and its `tokenizer.json` without some of them.

New ids are the ranks of the old ones, so that their order stays. Text whose tokens are all kept is split as before:

- WordPiece takes the longest token that fits. It is kept, and shorter ones do not change which is longest.
- BPE applies the merge of the lowest rank there is. `BPE.needed` has the results of all merges that lead to a token;
  a merge stays if its parts and its result do. So at each step fewer merges are possible than before, and the one that
  was applied is among them: it is still the first.
- Unigram takes the split of the largest sum of scores. It is still possible, and no other one is new. The score of an
  unknown character follows from the smallest score, whose token is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from optin_cli.errors import InputError

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Vocabulary:
    """The tokens of a tokenizer, from what its `tokenizer.json` holds."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.model: dict[str, Any] = content["model"]
        self.added: list[dict[str, Any]] = content.get("added_tokens") or []
        self.pieces: dict[str, int] = self._pieces()
        """Token -> id of the tokenizer's model, without those that were added to it."""

    @cached_property
    def ids(self) -> set[int]:
        """All ids that the tokenizer may give."""
        return {*self.pieces.values(), *(token["id"] for token in self.added)}

    def always(self) -> set[int]:
        """Ids that are kept whatever the data has: added and special tokens, bytes, and what unseen words are split
        into."""
        named = {token["id"] for token in self.added} | set(_ids_in(self.content.get("post_processor")))
        bytes_ = {id for token, id in self.pieces.items() if _BYTE.fullmatch(token)}
        unknown = self.pieces.get(self.model.get("unk_token") or "")
        return named | bytes_ | self.basic() | (set() if unknown is None else {unknown})

    def basic(self) -> set[int]:
        """Ids of the tokens that any other can be made of."""
        raise NotImplementedError

    def needed(self, token: int) -> set[int]:
        """Ids without which a token can't be reached, itself included."""
        return {token}

    def without(self, kept: Sequence[int]) -> dict[str, Any]:
        """`tokenizer.json` with the `kept` ids alone, ascending; each becomes its rank."""
        ids = {old: new for new, old in enumerate(kept)}
        padding = self.content.get("padding")
        return {
            **self.content,
            "added_tokens": [{**token, "id": ids[token["id"]]} for token in self.added],
            "post_processor": _renumbered(self.content.get("post_processor"), ids),
            "padding": padding and {**padding, "pad_id": ids.get(padding["pad_id"], 0)},
            "model": {**self.model, **self._model(ids)},
        }

    def _pieces(self) -> dict[str, int]:
        return dict(self.model["vocab"])

    def _model(self, ids: Mapping[int, int]) -> dict[str, Any]:
        return {"vocab": {token: ids[old] for token, old in self.pieces.items() if old in ids}}


class WordPiece(Vocabulary):
    """Words are split from the left into the longest tokens there are (Schuster & Nakajima 2012)."""

    def basic(self) -> set[int]:
        """Single characters, and tokens with a character that has no token of its own."""
        return {
            id for token, id in self.pieces.items() if len(letters := self._letters(token)) == 1
            or not all(letter in self.pieces for letter in letters)
        }  # fmt: skip

    def _letters(self, token: str) -> list[str]:
        """The tokens of single characters that would spell a token."""
        prefix = self.model.get("continuing_subword_prefix") or ""
        inside = bool(prefix) and token.startswith(prefix) and token != prefix
        text = token.removeprefix(prefix) if inside else token
        return [f"{prefix if inside or place else ''}{letter}" for place, letter in enumerate(text)]


class BPE(Vocabulary):
    """Characters or bytes are merged pair by pair, those first that were learnt first (Sennrich et al. 2016)."""

    @cached_property
    def merges(self) -> dict[tuple[str, str], int]:
        """Pair of tokens -> rank of their merge."""
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in self.model["merges"])
        found: dict[tuple[str, str], int] = {}
        for rank, (left, right) in enumerate(pairs):
            found[left, right] = rank  # the last one counts, as in the library
        return found

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id: token for token, id in self.pieces.items()}

    @property
    def _prefix(self) -> str:
        return self.model.get("continuing_subword_prefix") or ""

    @property
    def _suffix(self) -> str:
        return self.model.get("end_of_word_suffix") or ""

    def basic(self) -> set[int]:
        """What words begin as: characters, of a byte-level tokenizer one for each byte."""
        return {id for token, id in self.pieces.items() if len(self._letters(token)) == 1}

    def needed(self, token: int) -> set[int]:
        """The tokens that merging passes through on the way from single characters."""
        if token not in self._names:
            return {token}
        left = self._letters(self._names[token])
        found = {token}
        while len(left) > 1:
            pairs = list(pairwise(left))
            rank, place = min(
                (self.merges.get(pair, len(self.merges)), place) for place, pair in enumerate(pairs)
            )
            if rank == len(self.merges):  # merging does not lead to it
                return {token}
            left[place : place + 2] = [self._merged(*pairs[place])]
            found.add(self.pieces[left[place]])
        return found

    def _letters(self, token: str) -> list[str]:
        """The symbols that merging a token begins with."""
        prefix, suffix = self._prefix, self._suffix
        inside = bool(prefix) and token.startswith(prefix) and token != prefix
        last = bool(suffix) and token.endswith(suffix) and token != suffix
        text = token.removeprefix(prefix) if inside else token
        text = text.removesuffix(suffix) if last else text
        found = [f"{prefix if inside or place else ''}{letter}" for place, letter in enumerate(text)]
        return [*found[:-1], f"{found[-1]}{suffix}"] if last else found

    def _merged(self, left: str, right: str) -> str:
        return left + right.removeprefix(self._prefix)

    def _model(self, ids: Mapping[int, int]) -> dict[str, Any]:
        kept = {token for token, old in self.pieces.items() if old in ids}
        merges = [
            [left, right]
            for left, right in sorted(self.merges, key=self.merges.__getitem__)
            if left in kept and right in kept and self._merged(left, right) in kept
        ]
        return {**super()._model(ids), "merges": merges}


class Unigram(Vocabulary):
    """Of all splits the one of the largest sum of log probabilities is taken (Kudo 2018)."""

    def basic(self) -> set[int]:
        """Single characters, the unknown token, and the token of the smallest score."""
        scores = [score for _, score in self.model["vocab"]]
        unknown = self.model.get("unk_id")
        single = {id for token, id in self.pieces.items() if len(token) == 1}
        return single | {scores.index(min(scores))} | (set() if unknown is None else {unknown})

    def _pieces(self) -> dict[str, int]:
        return {token: id for id, (token, _) in enumerate(self.model["vocab"])}

    def _model(self, ids: Mapping[int, int]) -> dict[str, Any]:
        unknown = self.model.get("unk_id")
        kept = [pair for id, pair in enumerate(self.model["vocab"]) if id in ids]
        return {"vocab": kept, "unk_id": None if unknown is None else ids[unknown]}


_KINDS: dict[str, type[Vocabulary]] = {"WordPiece": WordPiece, "BPE": BPE, "Unigram": Unigram}


def vocabulary_of(tokenizer: Any, spec: str) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers. Raises `InputError` for a kind that can't lose tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"the tokenizer of {spec} is a {type(tokenizer).__name__}, which has no tokenizer.json to take tokens out "
            "of: it is written in Python, or its vocabulary is a SentencePiece file",
            "convert it to a fast tokenizer, save that beside the model, and reduce its vocabulary",
        )
    content = json.loads(backend.to_str())
    kind = content["model"]["type"]
    if kind not in _KINDS:
        raise InputError(
            f"the tokenizer of {spec} is a {kind}: it can't split a word that has no token, so that a smaller "
            "vocabulary would know fewer words and nothing else",
            f"vocabularies of {', '.join(_KINDS)} can be reduced",
        )
    if content["model"].get("dropout"):
        raise InputError(
            f"the tokenizer of {spec} leaves out merges at random (dropout): no text has tokens of its own",
            "set dropout to null in tokenizer.json",
        )
    return _KINDS[kind](content)


def _ids_in(processor: Any) -> Iterator[int]:
    """The ids that a post-processor puts into texts."""
    for part in _parts(processor):
        for token in (part.get("special_tokens") or {}).values():
            yield from token["ids"]
        for name in ("cls", "sep"):
            if name in part:
                yield part[name][1]


def _parts(processor: Any) -> Iterable[dict[str, Any]]:
    if processor is None:
        return []
    if processor["type"] != "Sequence":
        return [processor]
    return [part for inner in processor["processors"] for part in _parts(inner)]


def _renumbered(processor: Any, ids: Mapping[int, int]) -> Any:
    """A post-processor with new ids."""
    if processor is None:
        return None
    made = dict(processor)
    if processor["type"] == "Sequence":
        made["processors"] = [_renumbered(part, ids) for part in processor["processors"]]
    if processor.get("special_tokens"):
        made["special_tokens"] = {
            name: {**token, "ids": [ids[old] for old in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    for name in ("cls", "sep"):
        if name in processor:
            made[name] = [processor[name][0], ids[processor[name][1]]]
    return made

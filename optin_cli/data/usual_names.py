"""Names that columns usually have: what is looked for where the user names none."""

from __future__ import annotations

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("text1", "text2"),
)
SINGLES = ("sentence", "text", "content", "review", "tweet", "sentence1")
LABELS = ("label", "labels", "score", "similarity_score", "fine_label", "target", "ner_tags", "tags")
MASKS = (
    "mask", "masks", "annotation", "annotations", "segmentation", "segmentation_map", "semantic_mask", "label_map",
    "label", "labels", "gt", "groundtruth", "ground_truth",
)  # fmt: skip
AUDIOS = ("audio", "recording", "file", "path")
TARGETS = ("target", "summary", "highlights", "translation", "output")
TRANSCRIPTS = ("text", "transcription", "transcript", "sentence", "normalized_text", "target")

NAMES = frozenset(
    (*(name for pair in PAIRS for name in pair), *SINGLES, *LABELS, *AUDIOS, *TARGETS, *TRANSCRIPTS)
)
"""All of them that a table of texts may have."""

"""All tasks by name. Adding one is a class in a file of this room and its entry here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optin_cli.errors import UsageError
from optin_cli.tasks.answering import QuestionAnswering
from optin_cli.tasks.audio import AudioClassification, SpeechRecognition
from optin_cli.tasks.base import Task
from optin_cli.tasks.embedding import Embedding
from optin_cli.tasks.language import LanguageModeling
from optin_cli.tasks.segmentation import Segmentation
from optin_cli.tasks.seq2seq import TextToText
from optin_cli.tasks.sequences import ImageClassification, SequenceClassification
from optin_cli.tasks.tagging import TokenClassification

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        SequenceClassification,
        TokenClassification,
        QuestionAnswering,
        ImageClassification,
        AudioClassification,
        LanguageModeling,
        SpeechRecognition,
        TextToText,
        Segmentation,
        Embedding,
    )
}


def task_from_config(config: Any, folder: Path | None, override: str | None) -> Task:
    """The task of a transformers model, from `config.architectures` unless `override` names one.

    A bare encoder, or one with a head of no known task, is an embedding model.
    """
    if override is not None and override not in TASKS:
        raise UsageError(f"unknown task {override!r}", f"choose one of {', '.join(TASKS)}")
    architecture = (getattr(config, "architectures", None) or [""])[0]
    named = next((t for t in TASKS.values() if architecture.endswith(t.architectures)), Embedding)
    return (TASKS[override] if override else named).from_config(config, folder)

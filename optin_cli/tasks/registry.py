"""All tasks by name. Adding one is a class in a file of this room and its entry here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optin_cli.errors import UsageError
from optin_cli.tasks.answering import QuestionAnswering
from optin_cli.tasks.audio import AudioClassification, SpeechRecognition
from optin_cli.tasks.base import Task
from optin_cli.tasks.embedding import PROJECTED, Embedding
from optin_cli.tasks.hidden_states import HiddenStates
from optin_cli.tasks.language import LanguageModeling
from optin_cli.tasks.masked_language import MaskedLanguageModeling
from optin_cli.tasks.pooling import pools_sentences
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
        MaskedLanguageModeling,
        SpeechRecognition,
        TextToText,
        Segmentation,
        Embedding,
        HiddenStates,
    )
}


def task_from_config(config: Any, folder: Path | None, override: str | None) -> Task:
    """The task of a transformers model, from its files unless `override` names one.

    A model of sentence-transformers embeds, whatever class its encoder was trained as.
    """
    if override is not None and override not in TASKS:
        raise UsageError(f"unknown task {override!r}", f"choose one of {', '.join(TASKS)}")
    own = Embedding if folder is not None and pools_sentences(folder) else task_of_class(config)
    return (TASKS[override] if override else own).from_config(config, folder)


def task_of_class(config: Any) -> type[Task]:
    """What the class that `config.architectures` names computes.

    A bare encoder is an embedding model. One with a head of no known task is scored on its hidden states.
    """
    architecture = (getattr(config, "architectures", None) or [""])[0]
    named = next((t for t in TASKS.values() if architecture.endswith(t.architectures)), None)
    return named or (HiddenStates if has_other_head(architecture) else Embedding)


def has_other_head(architecture: str) -> bool:
    """Return whether a class of transformers has a head that no task covers: it is no bare model."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if not hasattr(transformers, architecture):
        return False
    bare: set[str] = set()
    for names in MODEL_MAPPING_NAMES.values():
        bare.update([names] if isinstance(names, str) else names)
    ends = ("Model", "Encoder", PROJECTED)
    named = architecture.endswith(ends) and not architecture.endswith(("HeadModel", "HeadsModel"))
    return architecture not in bare and not named

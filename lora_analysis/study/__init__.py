"""Studies of trained adapters: the tasks, the pretrained model, and what training on them shows.

``docstring_task`` is a text task that is on every machine, ``load_minilm`` a real pretrained model that
installs with pip.
"""

from lora_analysis.study.docstrings import docstring_task
from lora_analysis.study.minilm import (
    SentenceModel,
    accuracy,
    class_means,
    cosine_logits,
    embed,
    embeddings,
    load_minilm,
    minilm_path,
    tokenize,
)
from lora_analysis.study.task import Source, TextTask

__all__ = [
    "SentenceModel",
    "Source",
    "TextTask",
    "accuracy",
    "class_means",
    "cosine_logits",
    "docstring_task",
    "embed",
    "embeddings",
    "load_minilm",
    "minilm_path",
    "tokenize",
]

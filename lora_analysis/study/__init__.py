"""Studies of trained adapters: the tasks, the pretrained model, and what training on them shows.

``docstring_task`` is a text task that is on every machine, ``load_minilm`` a real pretrained model that
installs with pip.
"""

from lora_analysis.study.docstrings import Source, TextTask, docstring_task
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

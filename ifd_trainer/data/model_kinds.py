"""What a model is instead of a causal language model, by its class name and its config: a sentence about each kind.

IFD compares the loss of an answer given its prompt with that of the answer alone, so it needs a model that predicts a
text from left to right. Nothing slow is imported here: a wrong model is told before torch is.
"""

from __future__ import annotations

import re

WANTED = (
    "Use a causal (decoder-only) language model, as AutoModelForCausalLM loads it from a checkpoint like Llama or Qwen."
)
ENCODER_DECODER = (
    "is an encoder-decoder: its encoder reads the prompt and its decoder the answer, so there is no loss of the answer "
    "alone to compare with"
)
CLASSIFIER = "is a classifier: it gives scores of labels for a text, and no probabilities of the next token"
SEES_AHEAD = (
    "lets tokens see those that follow them, as masked language models (encoders) do, so its losses are not those of "
    "predicting an answer"
)
HEADLESS = "has no language model head: it gives hidden states, and no probabilities of the next token"
_CLASSIFIERS = re.compile(r"Classification|QuestionAnswering|MultipleChoice|SentencePrediction|RewardModel")
_ENCODERS = re.compile(r"MaskedLM|ForPreTraining")


def kind_of_class(name: str, is_encoder_decoder: bool) -> str | None:
    """What a model class of that name is instead of a causal language model; None if the name does not tell.

    >>> kind_of_class("LlamaForSequenceClassification", False).partition(":")[0]
    'is a classifier'
    >>> kind_of_class("LlamaForCausalLM", False)
    """
    if _CLASSIFIERS.search(name):
        return CLASSIFIER
    if is_encoder_decoder:
        return ENCODER_DECODER
    return SEES_AHEAD if _ENCODERS.search(name) else None

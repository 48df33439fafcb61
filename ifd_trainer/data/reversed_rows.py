"""Rows turned round: a model is shown the answer, and asked for the instruction that it answers.

Reversed IFD (r-IFD, arXiv 2402.10110) is the IFD of such a row. What its instruction is:

- a template (Alpaca, WizardLM, one of your own): the instruction, and behind it the input, a line break between them
- chats: the last message of the user before the answer; earlier turns and the system's are left out
- each answer of a chat, where all are scored: what the user says between the answer before it and this one, several
  messages with a line break between them; an answer to none, such as one to what a tool returned, has no instruction
- prompt-completion texts: the prompt, without the template of Alpaca or WizardLM where it was written with one, and
  without the response header that it ends with where that is known; rows of a `PromptFormat` of your own likewise

The turned row is written as its format writes rows, since that is how the model is used to being asked: the request to
guess, with the answer in it, takes the place of the instruction, and the instruction that of the answer. For chats the
request is a user's turn and the instruction the assistant's, under the chat template, without system turn and tools.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import UserError
from ..method.further_scores import REVERSED, REVERSED_DIRECT, losses_read
from .chat_template import MalformedRow, common_prefix_length, content_of, renderer, split_chat, template_options
from .formats import (
    ALPACA,
    WIZARDLM,
    ChatFormat,
    Example,
    PromptCompletionFormat,
    PromptFormat,
    TemplateFormat,
    answer_text,
    conversation_parts,
)
from .turn_headers import RESPONSE, told_header

PLACE = "{answer}"  # in a request, for the answer
GUESS = (
    "Somebody gave an instruction and received the reply below. Work out which instruction it most likely was, and "
    f"write down that instruction only.\n\nReply:\n{PLACE}"
)
_MARK = "IFDx7question"  # stands for what a user says: nothing that a template trims, escapes or looks for


def request(guess: str | None, scores: Iterable[str]) -> str | None:
    """The request to guess an instruction that further scores make, the usual one for None; None if they make none.

    Raises:
        UserError: for one that has no place for the answer, and for one beside scores that make none.
    """
    if guess is not None and (not isinstance(guess, str) or guess.count(PLACE) != 1):
        raise UserError(f"guess asks for the instruction, with {PLACE} where the answer stands, once; got {guess!r}.")
    if losses_read(scores) & {REVERSED, REVERSED_DIRECT}:
        return guess or GUESS
    if guess is not None:
        raise UserError("guess is the request of the score rifd, which was not asked for: add it, or leave guess out.")
    return None


@dataclass(frozen=True)
class ReversedRows:
    """Turns rows round.

    Args:
        tokenizer: a `transformers` tokenizer.
        guess: the request, with `{answer}` for the answer.
        template: the chat template that wrote the rows, if it is not the tokenizer's own.

    >>> example = ReversedRows(None, "Which question has the answer {answer}?").of_text("2 + 2?", "4")
    >>> example.prompt, example.answer
    ('Which question has the answer 4?\\n\\n', '2 + 2?')
    """

    tokenizer: Any
    guess: str = GUESS
    template: str | None = None

    def of_row(self, row: Mapping[str, Any], format: PromptFormat) -> Example | None:
        """A raw row turned round; None for a chat without a user's message or without a text of the answer, and for a
        row that cannot be rendered.
        """
        try:
            return self._of_row(row, format)
        except MalformedRow:
            return None

    def of_answers(self, row: Mapping[str, Any], format: PromptFormat) -> list[Example | None]:
        """Each answer of a raw row turned round; None where the user says nothing between it and the one before, or it
        is a call without a text.

        Raises:
            MalformedRow: for a row that the format cannot read.

        >>> row = {"instruction": "2 + 2?", "output": "4"}
        >>> [example.answer for example in ReversedRows(None).of_answers(row, ALPACA)]
        ['2 + 2?']
        """
        parts = conversation_parts(row, format, self.tokenizer)
        if parts is None:
            return [self.of_row(row, format)]
        messages, first = parts
        options = template_options(row, self.tokenizer) | {"tools": None}
        found, said = [], []
        for place, message in enumerate(messages):
            if message["role"] == "user":
                said.append(content_of(message.get("content")))
            if message["role"] == "assistant":
                if place >= first:
                    found.append(self._of_answer("\n".join(said), [message], options))
                said = []
        return found

    def of_text(self, prompt: str, answer: str, header: str | None = None) -> Example:
        """A prompt and an answer turned round, two texts.

        Args:
            header: the response header that the prompt ends with; told from the prompt by default.
        """
        for format in (ALPACA, WIZARDLM):
            fields = _fields(format, prompt.rstrip())
            if fields is not None:
                return self._of_template(format, *fields, answer)
        header = told_header(prompt) if header is None else header
        return Example(f"{self._asked(answer)}\n\n{header}", prompt.removesuffix(header).strip(), header)

    def of_tokens(self, prompt: Sequence[int], answer: Sequence[int]) -> Example | None:
        """A tokenised row turned round: its texts are decoded, and told to be a chat by the template's user turn."""
        decode = self.tokenizer.decode
        said = decode(list(answer), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        header, after = self._user_turn
        text = decode(list(prompt), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if header and header in text:
            question = text[text.rindex(header) + len(header) :]
            question = question.partition(after)[0] if after.strip() else question
            try:
                return self._of_chat(question, said, {})
            except MalformedRow:
                return None
        text = decode(list(prompt), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text.endswith(RESPONSE[:-1]) and said.startswith(RESPONSE[-1]):  # a quote merged with the header's colon
            text, said = text + said[0], said[1:]
        return self.of_text(text, said)

    def of_later_tokens(self, since: Sequence[int], answer: Sequence[int]) -> Example | None:
        """The same of an answer that others precede, by what stands between them: None where no user says anything."""
        header, _ = self._user_turn
        between = self.tokenizer.decode(list(since), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return None if header and header not in between else self.of_tokens(since, answer)

    def _of_row(self, row: Mapping[str, Any], format: PromptFormat) -> Example | None:
        if isinstance(format, TemplateFormat):
            return self._of_template(format, *format.texts(row))
        if isinstance(format, (ChatFormat, PromptCompletionFormat)):
            prompt, answer = format.parts(row)
            if not isinstance(prompt, list):
                return self.of_text(prompt, answer, format.header)
            questions = [message for message in prompt if message["role"] == "user"]
            if not questions:
                return None
            options = template_options(row, self.tokenizer) | {"tools": None}
            return self._of_answer(content_of(questions[-1].get("content")), answer, options)
        example = format.render(row, self.tokenizer)
        return self.of_text(example.prompt, example.answer.removesuffix(example.end), example.header)

    def _of_answer(self, question: str, answer: list[dict], options: Mapping[str, Any]) -> Example | None:
        said = answer_text(answer)
        if not question.strip() or not said.strip():  # a call without a text shows nothing to guess from
            return None
        try:
            return self._of_chat(question, said, options)
        except MalformedRow:
            return None

    def _of_template(self, format: TemplateFormat, instruction: str, extra: str, answer: str) -> Example:
        texts = {format.output: "\n".join(text for text in (instruction, extra) if text.strip())}
        row = {format.instruction: self._asked(answer), **texts}
        row |= {} if format.instances is None else {format.instances: [texts]}
        return format.render(row if format.system is None else row | {format.system: ""})

    def _of_chat(self, question: str, answer: str, options: Mapping[str, Any]) -> Example:
        asked = {"role": "user", "content": self._asked(answer)}
        options = options if self.template is None else {**options, "chat_template": self.template}
        before, rest, frame = split_chat([asked], [{"role": "assistant", "content": question}], options, self.tokenizer)
        return Example(before, rest, frame.before, special_tokens=False, end=frame.after)

    def _asked(self, answer: str) -> str:
        return self.guess.replace(PLACE, answer)

    @cached_property
    def _user_turn(self) -> tuple[str, str]:
        """What the chat template writes before and behind what a user says, wherever the turn stands; "" for none."""
        template = self.template or getattr(self.tokenizer, "chat_template", None)
        if not template:
            return "", ""
        render = renderer(self.tokenizer, {} if self.template is None else {"chat_template": template})
        for parts in (False, True):  # templates of models that see images read contents as lists of parts
            user, said, other = (_turn(*turn, parts) for turn in (("user", _MARK), ("assistant", "y"), ("user", "x")))
            try:
                texts = [render([user, said]), render([other, said, user, said])]
                opened = render([user], add_generation_prompt=True)
            except Exception:  # no chat that this template knows
                continue
            (first, behind), (later, _) = (text.rpartition(_MARK)[::2] for text in texts)
            size = common_prefix_length(first[::-1], later[::-1])
            if header := first[len(first) - size :].lstrip():
                return header, behind[: common_prefix_length(behind, opened.rpartition(_MARK)[2])]
        return "", ""


def _turn(role: str, text: str, parts: bool) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}


def _fields(format: TemplateFormat, prompt: str) -> tuple[str, str] | None:
    """The instruction and the input in a prompt that a template wrote; None where it did not."""
    for template in dict.fromkeys((format.prompt_with_input, format.prompt)):
        # The pieces of the template and, at odd places, the names of its fields.
        pieces = re.split(r"\{(instruction|input)\}", template)
        pattern = "".join(f"(?P<{piece}>.*?)" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
        found = re.fullmatch(pattern, prompt, re.DOTALL)
        if found is not None:
            return found["instruction"], found.groupdict().get("input", "")
    return None

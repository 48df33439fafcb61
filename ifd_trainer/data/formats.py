"""Raw rows to prompt and answer text.

A format says three things about a row: the prompt the model reads, the answer whose loss is measured, and the
header, the text that stands before the answer when it is scored alone (`### Response:`, the assistant header of a
chat template, or nothing).

Templates: Alpaca and WizardLM prompts as in the paper (arXiv 2308.12032) and its program; the bare prompt of
Superfiltering (arXiv 2402.00530). `None` and NaN count as no text; published programs render them as "None".

A row asks nothing when its instruction and its input, its prompt, or all messages before the answer but the
assistant's own are blank: there is no IFD without a prompt. An input alone is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import UserError, shown_value
from .chat_template import MalformedRow, chat_messages, check_chat, reads_as_text, split_chat, template_options, text_of
from .turn_headers import RESPONSE, told_header


@dataclass(frozen=True, slots=True)
class Example:
    """One rendered row.

    Attributes:
        prompt: text before the answer, in its format.
        answer: text whose tokens are scored; may end with a template's end-of-turn text.
        header: text that precedes the answer in the direct pass; "" for none (then BOS or EOS is used).
        special_tokens: whether the tokenizer is to add its own BOS (chat templates write theirs).
        counted: what the `cherry` program counts as the prompt when it cuts an answer; None for the whole prompt.
        end: what a template wrote at the end of `answer`, which is not scored.
        asked: whether the row's own part of the prompt says anything.
    """

    prompt: str
    answer: str
    header: str = ""
    special_tokens: bool = True
    counted: str | None = None
    end: str = ""
    asked: bool = True


class PromptFormat(Protocol):
    """What every format offers: a name, the columns it reads, and `render`."""

    name: str

    @property
    def columns(self) -> tuple[str, ...]: ...

    def render(self, row: Mapping[str, Any], tokenizer: Any) -> Example: ...


# A name in braces; behind a letter they are plain text, such as LaTeX's \boxed{answer}.
_PLACEHOLDER = re.compile(r"(?<!\w)\{(\w+)\}")
_FIELD = re.compile(r"\{(instruction|input|system)\}(\s*)")


@dataclass(frozen=True)
class TemplateFormat:
    """A prompt template over an instruction, an input (optional) and an output, in columns of any names.

    Args:
        name: what errors and data cards call the format.
        prompt: the prompt of a row without an input. `{instruction}` stands for the instruction, whatever its column
            is called.
        prompt_with_input: the prompt of a row with an input, for which `{input}` stands; the same as `prompt` where
            no row has one.
        header: the text before the answer when it is scored alone, as the prompts end; "" for none.
        instruction, input, output: names of the columns; that of the input may be missing from the data.
        counts_instruction_only: see `Example.counted`.
        system: name of the column for which `{system}` stands; of a row without such a text, the white space behind it
            is left out too. None: `{system}` is text like any other.
        instances: name of a column that holds input and output in a list of one mapping, as in self-instruct's files.

    Raises:
        ValueError: for a template without its placeholders, or with a column's name in place of them.

    >>> qa = TemplateFormat("qa", "{instruction} A:", "{input} {instruction} A:", "A:", instruction="q", output="a")
    >>> qa.render({"q": "2 + 2?", "a": "4"}).prompt
    '2 + 2? A:'
    """

    name: str
    prompt: str
    prompt_with_input: str
    header: str = RESPONSE
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    counts_instruction_only: bool = False
    system: str | None = None
    instances: str | None = None

    def __post_init__(self) -> None:
        if problem := self.problem(self.prompt, self.prompt_with_input, self.instruction, self.output, self.input):
            template, wrong = problem
            raise UserError(
                f"TemplateFormat {self.name!r}: {template}={getattr(self, template)!r} {wrong}. Write {{instruction}} "
                "for the instruction and, in prompt_with_input, {input} for the input, whatever their columns are "
                "called; name the columns with instruction=..., input=... and output=..."
            )
        for template in ("prompt", "prompt_with_input"):
            if self.system is not None and "{system}" not in getattr(self, template):
                raise UserError(
                    f"TemplateFormat {self.name!r}: {template}={getattr(self, template)!r} has no place for the column "
                    f"system={self.system!r}. Write {{system}} where its text is to stand, or leave system out."
                )

    @staticmethod
    def problem(prompt: str, prompt_with_input: str, *columns: str) -> tuple[str, str] | None:
        """Which template lacks a placeholder, or has the name of a column in the place of one; and what is wrong."""
        with_input = ("instruction", "input") if prompt_with_input != prompt else ("instruction",)
        names = {*columns, "output"} - {"instruction", "input"}
        for template, text, needed in (
            ("prompt", prompt, ("instruction",)),
            ("prompt_with_input", prompt_with_input, with_input),
        ):
            missing = [f"lacks {{{name}}}" for name in needed if f"{{{name}}}" not in text]
            # Other braces may be text ("reply as {answer}"); the name of a column is a mistake.
            unknown = [f"has {{{name}}}" for name in sorted(names & set(_PLACEHOLDER.findall(text)))]
            if missing or unknown:
                return template, " and ".join(missing + unknown)
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        system = () if self.system is None else (self.system,)
        return (self.instruction, self.output if self.instances is None else self.instances, *system)

    def texts(self, row: Mapping[str, Any]) -> tuple[str, str, str]:
        """Instruction, input and output of a row.

        Raises:
            MalformedRow: for values that are no text, and for a row of several instances.
        """
        values = row if self.instances is None else {**row, **_only_instance(_cell(row, self.instances))}
        return (
            text_of(_cell(row, self.instruction)),
            text_of(values.get(self.input)),
            text_of(_cell(values, self.output)),
        )

    def render(self, row: Mapping[str, Any], tokenizer: Any = None) -> Example:
        instruction, extra, output = self.texts(row)
        values = {"instruction": instruction, "input": extra}
        if self.system is not None:
            values["system"] = text_of(_cell(row, self.system))

        def filled(field: re.Match) -> str:
            name, space = field.groups()
            if name not in values:
                return field[0]
            return values[name] + (space if name != "system" or values[name].strip() else "")

        # One pass over the template, not str.format: instructions hold braces of their own.
        prompt = _FIELD.sub(filled, self.prompt_with_input if extra else self.prompt)
        counted = instruction if self.counts_instruction_only else None
        asked = bool(instruction.strip() or extra.strip())
        return Example(prompt, output, self.header, counted=counted, asked=asked)


def _only_instance(instances: Any) -> Mapping[str, Any]:
    instances = instances.tolist() if hasattr(instances, "tolist") else instances  # numpy's
    if not isinstance(instances, Sequence) or len(instances) != 1 or not isinstance(instances[0], Mapping):
        found = f"{len(instances)} of them" if isinstance(instances, list) else shown_value(instances)
        raise MalformedRow(
            f"'instances' has to be a list of one object with input and output, got {found}: a row has one answer, "
            "write each instance to a row of its own"
        )
    return instances[0]


@dataclass(frozen=True)
class PromptCompletionFormat:
    """TRL's prompt-completion rows: two texts, or two lists of chat messages.

    Args:
        name: what errors and data cards call the format.
        prompt, completion: names of the columns.
        system: name of a column whose text becomes the system turn of messages without one; texts have no place for it.
        header: the text before an answer that is scored alone, where prompts are texts; by default the one that a
            prompt ends with, if it is known (`### Response:` and others), as the callback finds it.
    """

    name: str = "prompt-completion"
    prompt: str = "prompt"
    completion: str = "completion"
    system: str | None = None
    header: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.prompt, self.completion) if self.system is None else (self.prompt, self.completion, self.system)

    def render(self, row: Mapping[str, Any], tokenizer: Any) -> Example:
        prompt, completion = self.parts(row)
        if isinstance(prompt, list):
            return _render_chat(prompt, completion, row, tokenizer)
        header = told_header(prompt) if self.header is None else self.header
        return Example(prompt, completion, header, asked=prompt.strip() != "")

    def parts(self, row: Mapping[str, Any]) -> tuple[str, str] | tuple[list[dict], list[dict]]:
        """Prompt and completion, two texts or two lists of messages.

        Raises:
            MalformedRow: for anything else.
        """
        prompt, completion = _cell(row, self.prompt), _cell(row, self.completion)
        if reads_as_text(prompt):
            return text_of(prompt), text_of(completion)
        return _with_system(row, self.system, chat_messages(prompt)), (
            [] if completion is None else chat_messages(completion)
        )


@dataclass(frozen=True)
class ChatFormat:
    """Chat messages under the tokenizer's chat template; the last assistant turn is the answer.

    Reads `messages` (role, content) or ShareGPT's `conversations` (from, value). Turns after the last assistant
    turn are ignored, since no answer depends on them.

    Args:
        name: what errors and data cards call the format.
        messages: name of the column.
        system: name of a column whose text becomes the system turn of chats without one.
    """

    name: str = "messages"
    messages: str = "messages"
    system: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.messages,) if self.system is None else (self.messages, self.system)

    def render(self, row: Mapping[str, Any], tokenizer: Any) -> Example:
        prompt, answer = self.parts(row)
        return _render_chat(prompt, answer, row, tokenizer) if answer else Example("", "")

    def parts(self, row: Mapping[str, Any]) -> tuple[list[dict], list[dict]]:
        """The messages before the last assistant turn, and that turn; all and none where there is none.

        Raises:
            MalformedRow: for what is no list of messages.
        """
        messages = _with_system(row, self.system, chat_messages(_cell(row, self.messages)))
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
        return messages[:last], messages[last : last + 1]


ALPACA = TemplateFormat(
    "alpaca",
    prompt=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
    prompt_with_input=(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
)
WIZARDLM = TemplateFormat(
    "wizardlm",
    prompt="{instruction}\n\n### Response:",
    prompt_with_input="{instruction}\nInput:{input}\n\n### Response:",
    counts_instruction_only=True,
)
SUPERFILTERING = TemplateFormat(
    "superfiltering", prompt="{instruction}\n", prompt_with_input="{instruction}\n{input}\n", header=""
)
PROMPT_COMPLETION = PromptCompletionFormat()
MESSAGES = ChatFormat()
SHAREGPT = ChatFormat("sharegpt", "conversations")

FORMATS: dict[str, PromptFormat] = {
    format.name: format for format in (ALPACA, WIZARDLM, SUPERFILTERING, PROMPT_COMPLETION, MESSAGES, SHAREGPT)
}


def answer_of(row: Mapping[str, Any], format: TemplateFormat | PromptCompletionFormat | ChatFormat) -> str:
    """The answer that the format scores, as text, without what a template adds.

    Raises:
        MalformedRow: when the row has none that the format can read.

    >>> answer_of({"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "gpt", "content": "4"}]}, MESSAGES)
    '4'
    """
    return format.texts(row)[2] if isinstance(format, TemplateFormat) else answer_text(format.parts(row)[1])


def answer_text(answer: str | Sequence[Mapping[str, Any]] | None) -> str:
    """An answer as text: of messages, what each of them says, a line break between them.

    >>> answer_text([{"role": "assistant", "content": "Let me see."}, {"role": "assistant", "content": "4"}])
    'Let me see.\\n4'
    """
    if isinstance(answer, list):
        return "\n".join(filter(None, (text_of(message.get("content")) for message in answer)))
    return text_of(answer)


def rows_of(batch: Mapping[str, list]) -> Iterator[dict[str, Any]]:
    """The rows of a batch of columns.

    >>> list(rows_of({"a": [1, 2], "b": [3, 4]}))
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 4}]
    """
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def conversation_parts(row: Mapping[str, Any], format: PromptFormat, tokenizer: Any) -> tuple[list[dict], int] | None:
    """The messages of a row, and the first of them that may be an answer; None for a row of texts.

    Of prompt-completion rows, answers are in the completion.

    Raises:
        MalformedRow: when the format cannot read the row.
        UserError: for messages without a chat template.
    """
    if not isinstance(format, (ChatFormat, PromptCompletionFormat)):
        return None
    prompt, completion = format.parts(row)
    if not isinstance(prompt, list):
        return None
    _need_template(tokenizer)
    return prompt + completion, len(prompt) if isinstance(format, PromptCompletionFormat) else 0


def to_prompt_completion(row: Mapping[str, Any], format: PromptFormat) -> dict[str, Any]:
    """The row as TRL's SFTTrainer reads it: `prompt` and `completion`, as text or as messages.

    Text formats give two texts; chats stay messages, so that TRL applies the template and masks the prompt.

    Raises:
        MalformedRow: when the format cannot render the row.
    """
    if isinstance(format, (ChatFormat, PromptCompletionFormat)):
        prompt, completion = format.parts(row)
    else:
        example = format.render(row, None)
        prompt, completion = example.prompt, example.answer
    return {"prompt": prompt, "completion": completion}


def to_training_row(row: Mapping[str, Any], format: PromptFormat, tokenizer: Any = None) -> dict[str, Any]:
    """`to_prompt_completion` with what a chat's template reads beside it, in forms that TRL takes as they are.

    `tools` is JSON, "null" for none.

    Raises:
        MalformedRow: when the row cannot be trained on: what `render` refuses, a chat without an answer or without a
            message before it, and what the tokenizer's chat template, where one is given, cannot write.
    """
    texts = to_prompt_completion(row, format)
    if not isinstance(texts["prompt"], list):
        return texts
    if not texts["completion"]:
        raise MalformedRow("the chat has no assistant turn")
    if not texts["prompt"]:
        raise MalformedRow("the chat begins with its answer: no message stands before it")
    options = template_options(row, tokenizer)
    if getattr(tokenizer, "chat_template", None):
        check_chat(texts["prompt"], texts["completion"], options, tokenizer)
    return texts | {"tools": json.dumps(options.pop("tools")), "chat_template_kwargs": options}


def _with_system(row: Mapping[str, Any], column: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with a system turn of a row's own before them, unless they have one, or the row has no such text."""
    text = "" if column is None else text_of(_cell(row, column))
    if not text.strip() or any(message["role"] in ("system", "developer") for message in messages):
        return messages
    return [{"role": "system", "content": text}, *messages]


def _cell(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise MalformedRow(f"the row has no {name!r}")
    return row[name]


def _render_chat(prompt: list[dict], answer: list[dict], row: Mapping[str, Any], tokenizer: Any) -> Example:
    _need_template(tokenizer)
    before, rest, frame = split_chat(prompt, answer, template_options(row, tokenizer), tokenizer)
    others = (str(message.get("content") or "") for message in prompt if message["role"] != "assistant")
    asked = any(map(str.strip, others))
    return Example(before, rest, frame.before, special_tokens=False, end=frame.after, asked=asked)


def _need_template(tokenizer: Any) -> None:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            "The rows are chat messages, but the tokenizer has no chat template. Set `tokenizer.chat_template`, or "
            "use a text format such as 'prompt-completion'."
        )

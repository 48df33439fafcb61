"""Raw rows to prompt and answer text.

A format says three things about a row: the prompt the model reads, the answer whose loss is measured, and the
header, the text that stands before the answer when it is scored alone (`### Response:`, the assistant header of a
chat template, or nothing).

Templates: Alpaca and WizardLM prompts as in the paper (arXiv 2308.12032) and its program; the bare prompt of
Superfiltering (arXiv 2402.00530). `None` and NaN count as no text; published programs render them as "None".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .errors import UserError


class MalformedRow(UserError):
    """A row that its format cannot render, for example a chat without messages."""


@dataclass(frozen=True, slots=True)
class Example:
    """One rendered row.

    Attributes:
        prompt: text before the answer, in its format.
        answer: text whose tokens are scored; may end with a template's end-of-turn text.
        header: text that precedes the answer in the direct pass; "" for none (then BOS or EOS is used).
        special_tokens: whether the tokenizer is to add its own BOS (chat templates write theirs).
        counted: what the `cherry` program counts as the prompt when it cuts an answer; None for the whole prompt.
    """

    prompt: str
    answer: str
    header: str = ""
    special_tokens: bool = True
    counted: str | None = None


class PromptFormat(Protocol):
    """What every format offers: a name, the columns it reads, and `render`."""

    name: str

    @property
    def columns(self) -> tuple[str, ...]: ...

    def render(self, row: Mapping[str, Any], tokenizer: Any) -> Example: ...


def text_of(value: Any) -> str:
    """The text of one cell: "" for None and NaN, `str(value)` for numbers.

    Raises:
        MalformedRow: for lists, mappings and other values that are not text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    raise MalformedRow(f"expected text, got {type(value).__name__}")


# A name in braces; behind a letter they are plain text, such as LaTeX's \boxed{answer}.
_PLACEHOLDER = re.compile(r"(?<!\w)\{(\w+)\}")


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

    Raises:
        ValueError: for a template without its placeholders, or with a column's name in place of them.

    >>> qa = TemplateFormat("qa", "{instruction} A:", "{input} {instruction} A:", "A:", instruction="q", output="a")
    >>> qa.render({"q": "2 + 2?", "a": "4"}).prompt
    '2 + 2? A:'
    """

    name: str
    prompt: str
    prompt_with_input: str
    header: str = "### Response:"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    counts_instruction_only: bool = False

    def __post_init__(self) -> None:
        with_input = ("instruction", "input") if self.prompt_with_input != self.prompt else ("instruction",)
        columns = {self.instruction, self.input, self.output, "output"} - {"instruction", "input"}
        for template, needed in (("prompt", ("instruction",)), ("prompt_with_input", with_input)):
            text = getattr(self, template)
            missing = [f"lacks {{{name}}}" for name in needed if f"{{{name}}}" not in text]
            # Other braces may be text ("reply as {answer}"); the name of a column is a mistake.
            unknown = sorted(columns & set(_PLACEHOLDER.findall(text)))
            if missing or unknown:
                raise UserError(
                    f"TemplateFormat {self.name!r}: {template}={text!r} "
                    f"{' and '.join(missing + [f'has {{{name}}}' for name in unknown])}. Write {{instruction}} for the "
                    "instruction and, in prompt_with_input, {input} for the input, whatever their columns are called; "
                    "name the columns with instruction=..., input=... and output=..."
                )

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.instruction, self.output)

    def render(self, row: Mapping[str, Any], tokenizer: Any = None) -> Example:
        instruction, extra = text_of(row[self.instruction]), text_of(row.get(self.input))
        template = self.prompt_with_input if extra else self.prompt
        # str.replace, not str.format: instructions hold braces of their own.
        parts = template.split("{instruction}")
        prompt = instruction.join(part.replace("{input}", extra) for part in parts)
        counted = instruction if self.counts_instruction_only else None
        return Example(prompt, text_of(row[self.output]), self.header, counted=counted)


@dataclass(frozen=True)
class PromptCompletionFormat:
    """TRL's prompt-completion rows: two texts, or two lists of chat messages."""

    name: str = "prompt-completion"
    prompt: str = "prompt"
    completion: str = "completion"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.prompt, self.completion)

    def render(self, row: Mapping[str, Any], tokenizer: Any) -> Example:
        prompt, completion = row[self.prompt], row[self.completion]
        if isinstance(prompt, Sequence) and not isinstance(prompt, str):
            answer = [] if completion is None else _chat_messages(completion)
            return _render_chat(_chat_messages(prompt), answer, row, tokenizer)
        return Example(text_of(prompt), text_of(completion))


@dataclass(frozen=True)
class ChatFormat:
    """Chat messages under the tokenizer's chat template; the last assistant turn is the answer.

    Reads `messages` (role, content) or ShareGPT's `conversations` (from, value). Turns after the last assistant
    turn are ignored, since no answer depends on them.
    """

    name: str = "messages"
    messages: str = "messages"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.messages,)

    def render(self, row: Mapping[str, Any], tokenizer: Any) -> Example:
        messages = _chat_messages(row[self.messages])
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            return Example("", "")
        return _render_chat(messages[:last], messages[last : last + 1], row, tokenizer)


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

_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def detect_format(columns: Iterable[str]) -> PromptFormat:
    """The format that the columns of a data set speak of.

    `messages`; `conversations`; `prompt` and `completion`; `instruction`, `input`, `output` (Alpaca); `instruction`
    and `output` alone (WizardLM), looked for in this order.

    Raises:
        ValueError: when none fits; the message names the columns found and the ones wanted.

    >>> detect_format(["instruction", "input", "output"]).name
    'alpaca'
    """
    columns = list(columns)
    has = set(columns)
    for format in (MESSAGES, SHAREGPT, PROMPT_COMPLETION):
        if has.issuperset(format.columns):
            return format
    if has.issuperset(ALPACA.columns):
        return ALPACA if ALPACA.input in has else WIZARDLM
    raise UserError(
        f"Cannot tell the format from the columns {sorted(columns)}. Wanted: 'messages'; 'conversations'; 'prompt' and "
        "'completion'; 'instruction', 'input' and 'output' (Alpaca); or 'instruction' and 'output' (WizardLM). Rename "
        "columns with `dataset.rename_columns`, or pass format=TemplateFormat(...) with your column names."
    )


def resolve_format(format: str | PromptFormat | None, columns: Iterable[str]) -> PromptFormat:
    """A format by name, as it is, or detected from `columns`; checks that its columns are there.

    Raises:
        ValueError: for an unknown name, or when a column that the format reads is missing.
    """
    columns = list(columns)
    if format is None:
        return detect_format(columns)
    if isinstance(format, str):
        if format not in FORMATS:
            raise UserError(f"Unknown format {format!r}. Known formats: {', '.join(sorted(FORMATS))}.")
        format = FORMATS[format]
    missing = [column for column in format.columns if column not in columns]
    if missing:
        raise UserError(
            f"Format {format.name!r} reads the columns {list(format.columns)}, but {missing} are not among the data "
            f"set's columns {sorted(columns)}. Rename columns, or choose another format of {sorted(FORMATS)}."
        )
    return format


def to_prompt_completion(row: Mapping[str, Any], format: PromptFormat) -> dict[str, Any]:
    """The row as TRL's SFTTrainer reads it: `prompt` and `completion`, as text or as messages.

    Text formats give two texts; chats stay messages, so that TRL applies the template and masks the prompt.
    """
    if isinstance(format, ChatFormat):
        messages = _chat_messages(row[format.messages])
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
        return {"prompt": messages[:last], "completion": messages[last : last + 1]}
    if isinstance(format, PromptCompletionFormat):
        return {"prompt": row[format.prompt], "completion": row[format.completion]}
    example = format.render(row, None)
    return {"prompt": example.prompt, "completion": example.answer}


def _chat_messages(turns: Any) -> list[dict[str, Any]]:
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise MalformedRow(f"expected a list of messages, got {type(turns).__name__}")
    return [_chat_message(turn) for turn in turns]


def _chat_message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise MalformedRow(f"expected a message with role and content, got {type(turn).__name__}")
    if turn.get("role") is not None:
        return {key: value for key, value in turn.items() if value is not None}
    if "from" not in turn:
        raise MalformedRow(f"a message needs 'role' and 'content' (or 'from' and 'value'), got keys {sorted(turn)}")
    return {"role": _ROLES.get(turn["from"], turn["from"]), "content": text_of(turn.get("value"))}


def _render_chat(prompt: list, answer: list, row: Mapping[str, Any], tokenizer: Any) -> Example:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            "The rows are chat messages, but the tokenizer has no chat template. Set `tokenizer.chat_template`, or "
            "use a text format such as 'prompt-completion'."
        )
    tools = row.get("tools") or None
    try:
        options = {"tools": json.loads(tools) if isinstance(tools, str) else tools, "tokenize": False}
    except json.JSONDecodeError as error:
        raise MalformedRow(f"'tools' is not JSON: {error}") from error
    options.update(row.get("chat_template_kwargs") or {})
    try:
        opened = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options) if prompt else ""
        closed = tokenizer.apply_chat_template(prompt, **options) if prompt else ""
        whole = tokenizer.apply_chat_template(prompt + answer, **options)
    except Exception as error:  # templates raise jinja2 errors, KeyError, TypeError: all of them mean this row
        raise MalformedRow(f"the chat template cannot render the row: {error}") from error
    # Some templates render a finished turn unlike an open one; the answer begins where the two part.
    shared = common_prefix_length(opened, whole)
    return Example(whole[:shared], whole[shared:], opening(opened, closed), special_tokens=False)


def opening(opened: str, closed: str) -> str:
    """What a template adds to open an assistant's turn, from a chat rendered with and without it.

    >>> opening("<user>Hi<assistant>", "<user>Hi")
    '<assistant>'
    """
    return opened[len(closed) :] if opened.startswith(closed) else ""


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading items that two sequences share.

    >>> common_prefix_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))

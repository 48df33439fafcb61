"""Which format the rows of a data set have: told from the names of its columns, or from what a user says of them.

One function decides for the transform, the command line and recipes: `resolve_format`. What it decided is written down
beside scores by `format_record`, and read again by `recorded_format`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields, replace

from ..errors import UserError
from .formats import (
    ALPACA,
    FORMATS,
    MESSAGES,
    PROMPT_COMPLETION,
    SHAREGPT,
    SUPERFILTERING,
    WIZARDLM,
    ChatFormat,
    PromptCompletionFormat,
    PromptFormat,
    TemplateFormat,
)

logger = logging.getLogger(__name__)

# Columns of prompt and answer in public data sets: the first is taken before all others, of which one has to fit alone.
_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),  # Dolly
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),  # OpenOrca
    ("query", "response"),  # MetaMath
)
_BARE_PAIR = ("prompt", "completion")  # TRL's, whose prompts have no template unless one is asked for
_SYSTEM = ("system", "system_prompt")
_INPUT = ("input", "context")  # `context` beside `instruction` and `response` alone, as in Dolly
_LIKE_INPUT = (
    *("input", "inputs", "context", "contexts", "document", "documents", "passage", "passages", "article", "paragraph"),
    *("background", "evidence"),
)
_TEXT_COLUMNS = ("prompt_column", "input_column", "answer_column")
_COLUMNS = (*_TEXT_COLUMNS, "system_column", "messages_column")
_TEMPLATES = ("template", "template_with_input", "response_header")
_MESSAGE_TABLE = {"message_id", "parent_id", "role", "text"}  # OpenAssistant's, of messages and of trees of them
_MESSAGE_TREES = {"message_tree_id", "prompt"}
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


@dataclass(frozen=True)
class FormatOptions:
    """What a user says of the rows' format on the command line or in a recipe; None for what the columns tell.

    Attributes:
        format: a name in `FORMATS`.
        prompt_column, input_column, answer_column, system_column, messages_column: names of columns.
        template: the prompt of a row, with `{instruction}` for what is in the prompt column, and perhaps `{input}` and
            `{system}`. `\\n` and `\\t` stand for a line break and a tab, as a shell passes them on.
        template_with_input: the prompt of a row with an input; by default `template`.
        response_header: text before an answer that is scored alone; by default the last line of the template.

    Raises:
        UserError: for an unknown name, and for options that contradict each other.
    """

    format: str | None = None
    prompt_column: str | None = None
    input_column: str | None = None
    answer_column: str | None = None
    system_column: str | None = None
    messages_column: str | None = None
    template: str | None = None
    template_with_input: str | None = None
    response_header: str | None = None

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"Unknown format {self.format!r}. Known formats: {', '.join(sorted(FORMATS))}.")
        for name in _TEMPLATES:
            if (text := getattr(self, name)) is not None:
                object.__setattr__(self, name, re.sub(r"\\[nt\\]", lambda escape: _ESCAPES[escape[0]], text))
        if self.template_with_input is not None and self.template is None:
            raise UserError("--template-with-input goes with --template, the prompt of rows without an input.")
        texts = [name for name in (*_TEXT_COLUMNS, *_TEMPLATES) if getattr(self, name) is not None]
        named = FORMATS.get(self.format)
        if self.messages_column is not None and texts:
            raise UserError(f"{_option(texts[0])} is of rows of texts, and --messages-column of chats: leave one out.")
        if self.messages_column is not None and named is not None and not isinstance(named, ChatFormat):
            raise UserError(f"--messages-column is of chats, and --format {self.format} of texts: leave one out.")
        if isinstance(named, ChatFormat) and texts:
            raise UserError(
                f"{_option(texts[0])} is of rows of texts, and --format {self.format} of chats: leave it out."
            )
        text_only = [name for name in texts if name not in ("prompt_column", "answer_column", "response_header")]
        if isinstance(named, PromptCompletionFormat) and text_only:
            raise UserError(
                f"--format {self.format} takes prompts as they are: leave it out, or {_option(text_only[0])}."
            )
        if self.template is not None:
            self._check_template()

    @property
    def plain(self) -> bool:
        """Whether nothing is said but perhaps a name."""
        return all(getattr(self, field.name) is None for field in fields(self)[1:])

    def _check_template(self) -> None:
        columns = filter(None, (self.prompt_column, self.answer_column, self.input_column, self.system_column))
        with_input = self.template if self.template_with_input is None else self.template_with_input
        if problem := TemplateFormat.problem(self.template, with_input, *({*columns} - {"system"})):
            template, wrong = problem
            name = "template" if template == "prompt" else "template_with_input"
            raise UserError(
                f"{_option(name)} {getattr(self, name) or self.template!r} {wrong}. Write {{instruction}} where the "
                "text of the prompt column is to stand, and {input} for the input column's, whatever they are called."
            )
        missing = [name for name in _TEMPLATES[:2] if "{system}" not in (getattr(self, name) or self.template)]
        if missing and (len(missing) == 1 or self.system_column is not None):
            raise UserError(
                f"{_option(missing[0])} has no {{system}}, where the text of the system column is to stand. Write it "
                "there, or leave it out everywhere."
            )


def resolve_format(
    format: str | PromptFormat | FormatOptions | None, columns: Iterable[str], bare: bool = False, warn: bool = True
) -> PromptFormat:
    """The format of rows with these columns: by name, as it is, or told from the names of the columns.

    Told are `messages`; `conversations`; `prompt` and `completion`; and instruction and answer under the names of
    public data sets (`instruction` and `output` or `response`, `prompt` and `response`, `question` and `answer` or
    `response`, `query` and `response`; `instruction` and `instances`), with Alpaca's prompt if there is an `input` (in
    Dolly `context`), else with WizardLM's. A column `system` or `system_prompt` becomes a chat's system turn.

    Args:
        format: a name, a format, or what a user said of it.
        columns: names of the columns.
        bare: whether rows of which nothing else is said have no template (the definition `superfiltering`).
        warn: say which columns look like a part of the prompt, and are not read.

    Raises:
        UserError: when no format fits, for an unknown name, and for a column that is not there.

    >>> resolve_format(None, ["question", "answer"]).columns
    ('question', 'answer')
    """
    columns = list(columns)
    if format is None or isinstance(format, (str, FormatOptions)):
        options = format if isinstance(format, FormatOptions) else FormatOptions(format)
        found = _Choice(options, columns, bare, options is format).format()
        _check_there(found, columns, options if options is format else None)
        if warn:
            _warn_of_unread(found, columns, options is format)
        return found
    _check_there(format, columns)
    return format


def told_format(columns: Iterable[str]) -> PromptFormat | None:
    """The format that the names of the columns tell, None where they tell none.

    >>> told_format(["instruction", "output"]).name, told_format(["text"])
    ('wizardlm', None)
    """
    try:
        return resolve_format(None, columns, warn=False)
    except UserError:
        return None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def holds_message_trees(columns: Collection[str]) -> bool:
    """Whether columns are those of a table of messages, or of trees of them.

    >>> holds_message_trees(["message_id", "parent_id", "role", "text", "lang"]), holds_message_trees(["messages"])
    (True, False)
    """
    return "messages" not in columns and (set(columns) >= _MESSAGE_TABLE or set(columns) >= _MESSAGE_TREES)


@dataclass(frozen=True)
class _Choice:
    """The decision: options and columns of a data set, and whether advice is for the command line or for Python."""

    options: FormatOptions
    columns: Collection[str]
    bare: bool
    command_line: bool

    def format(self) -> PromptFormat:
        named, options = FORMATS.get(self.options.format), self.options
        if named is None and self.bare and options.messages_column is None:
            named = SUPERFILTERING
        if named is None:
            named = self._told()
        if isinstance(named, ChatFormat):
            return replace(named, messages=options.messages_column or named.messages, system=self._system())
        if isinstance(named, PromptCompletionFormat):
            prompt, completion = options.prompt_column or named.prompt, options.answer_column or named.completion
            header = options.response_header if options.response_header is not None else named.header
            return replace(named, prompt=prompt, completion=completion, system=self._system(), header=header)
        return self._template(named)

    def _told(self) -> ChatFormat | PromptCompletionFormat | None:
        options = self.options
        if options.messages_column is not None:
            return MESSAGES
        given = [name for name in (*_TEXT_COLUMNS, *_TEMPLATES) if getattr(options, name) is not None]
        if given not in ([], ["response_header"]):
            return None
        told = (MESSAGES, SHAREGPT, PROMPT_COMPLETION) if not given else (PROMPT_COMPLETION,)
        return next((format for format in told if set(format.columns) <= set(self.columns)), None)

    def _system(self) -> str | None:
        return self.options.system_column or next((name for name in _SYSTEM if name in self.columns), None)

    def _template(self, named: TemplateFormat | None) -> TemplateFormat:
        """Rows of instruction, input and output; a template of the user's, the named one, or the paper's."""
        options = self.options
        instruction, output, instances = self._pair(named)
        beside = "context" if (instruction, output) == ("instruction", "response") else "input"
        told = next((name for name in _INPUT if name in self.columns and name in ("input", beside)), None)
        extra = options.input_column or ("input" if instances is not None else told)
        format = named or (WIZARDLM if extra is None else ALPACA)
        names = {"instruction": instruction, "output": output, "input": extra or "input", "instances": instances}
        if options.template is not None:
            with_input = options.template if options.template_with_input is None else options.template_with_input
            system = self._system() if "{system}" in options.template else None
            if "{system}" in options.template and system is None:
                raise UserError(
                    f"--template has {{system}}, and there is no column {' or '.join(map(repr, _SYSTEM))} among "
                    f"{sorted(self.columns)}. Name it with --system-column."
                )
            header = last_line(options.template, with_input)
            format = TemplateFormat("template", options.template, with_input, header, **names, system=system)
        elif options.system_column is not None:
            raise UserError(
                f"--system-column {options.system_column}: the prompt of the format {format.name!r} has no place for "
                "it. Write one with --template, with {system} and {instruction} in it, or leave the option out."
            )
        else:
            format = replace(format, **names)
        return format if options.response_header is None else replace(format, header=options.response_header)

    def _pair(self, named: TemplateFormat | None) -> tuple[str, str, str | None]:
        """The columns of instruction and answer, and that of the instances."""
        prompt, answer, there = self.options.prompt_column, self.options.answer_column, set(self.columns)
        if prompt is not None and answer is not None:
            return prompt, answer, None
        pairs = _PAIRS if self.options.plain else (*_PAIRS, _BARE_PAIR)
        fitting = dict.fromkeys((prompt or one, answer or other) for one, other in pairs)
        fitting = [pair for pair in fitting if there.issuperset(pair) and pair[0] != pair[1]]
        if len(fitting) == 1 or _PAIRS[0] in fitting:
            return *fitting[0], None
        if fitting:
            shown = "; ".join(f"{one!r} and {other!r}" for one, other in fitting)
            raise UserError(f"The columns {sorted(there)} can be read in several ways: {shown}. {self._advice()}")
        if {"instruction", "instances"} <= there and prompt is None and answer is None:
            return "instruction", "output", "instances"
        if prompt is not None or answer is not None:
            given, lacking = ("--prompt-column", "--answer-column")[:: 1 if prompt is not None else -1]
            raise UserError(
                f"{given} {prompt or answer}: which of the columns {sorted(there)} goes with it cannot be told. Name "
                f"it with {lacking}."
            )
        if named is not None:  # that its columns are not there is told with its name
            return named.instruction, named.output, None
        if holds_message_trees(there):
            raise UserError(
                "The rows are messages of trees, each of which answers another row (parent_id): make chats of them "
                "first with ifd_trainer.data.message_trees.as_chats(dataset)."
            )
        raise UserError(
            f"Cannot tell the format from the columns {sorted(there)}. Wanted: 'messages'; 'conversations'; 'prompt' "
            "and 'completion'; 'instruction', 'input' and 'output' (Alpaca); 'instruction' and 'output' (WizardLM); or "
            f"'response' or 'answer' beside 'instruction', 'prompt' or 'question'. {self._advice()}"
        )

    def _advice(self) -> str:
        if self.command_line:
            return "Name the columns with --prompt-column and --answer-column, or with --messages-column."
        return (
            "Rename columns with `dataset.rename_columns`, or pass format=TemplateFormat(...) with your column names."
        )


def last_line(*templates: str) -> str:
    """What all templates end with, from the last line that is not blank: the text before an answer by itself.

    >>> last_line("Q: {instruction}\\nA:", "Q: {instruction} ({input})\\nA:"), last_line("{instruction}\\n")
    ('A:', '')
    """
    tails = [re.split(r"\{(?:instruction|input|system)\}", template)[-1] for template in templates]
    shortest = min(tails, key=len)
    tail = shortest if all(other.endswith(shortest) for other in tails) else ""
    return tail[len(tail.rstrip()[: tail.rstrip().rfind("\n") + 1]) :].lstrip()


def _check_there(format: PromptFormat, columns: Collection[str], options: FormatOptions | None = None) -> None:
    missing = [column for column in format.columns if column not in columns]
    if not missing:
        return
    named = [_option(name) for name in _COLUMNS if getattr(options, name, None) == missing[0]]
    if named:
        raise UserError(f"{named[0]} {missing[0]}: there is no such column; the columns are {sorted(columns)}.")
    rename = "Rename columns" if options is None else "Name the columns (--prompt-column, --answer-column, ...)"
    raise UserError(
        f"Format {format.name!r} reads the columns {list(format.columns)}, but {missing} are not among the data set's "
        f"columns {sorted(columns)}. {rename}, or choose another format of {sorted(FORMATS)}."
    )


def columns_read(format: PromptFormat, columns: Iterable[str]) -> list[str]:
    """Those of a data set's columns that a format reads as prompt and answer.

    >>> columns_read(ALPACA, ["id", "instruction", "input", "output"])
    ['instruction', 'input', 'output']
    """
    extra = (format.input,) if isinstance(format, TemplateFormat) else ()
    return [name for name in columns if name in (*format.columns, *extra)]


def _warn_of_unread(format: PromptFormat, columns: Collection[str], command_line: bool) -> None:
    """One warning of the columns that look like a part of the prompt and are not read as one."""
    if isinstance(format, ChatFormat):
        return
    said = []
    template = isinstance(format, TemplateFormat)
    read = set(columns_read(format, columns))
    if template and format.input in columns and "{input}" not in format.prompt_with_input:
        read.discard(format.input)
    for name in [name for name in _LIKE_INPUT if name in columns and name not in read]:
        if template and name == format.input:
            way = "write {input} into --template, or give --template-with-input"
        elif command_line:
            way = f"--input-column {name} makes it the input"
        else:
            way = f'TemplateFormat(..., input="{name}") makes it the input'
        said.append(f"{name!r} looks like a part of the prompt and is not read: {way}")
    if isinstance(format, PromptCompletionFormat) and format.system is not None:
        said.append(f"{format.system!r} is read where prompts are messages, and has no place in those that are texts")
    if template and format.system is None and (system := [name for name in _SYSTEM if name in columns]):
        python = f'TemplateFormat(..., system="{system[0]}")'
        way = "a --template with {system} and {instruction} in it" if command_line else python
        said.append(f"{system[0]!r} is not read, for which the prompt of {format.name!r} has no place: {way} has one")
    if said:
        logger.warning("Columns of the data set: %s.", "; ".join(said))


def format_record(format: PromptFormat) -> str:
    """A format as it is written down beside scores: its name, or, of one with names or templates of its own, JSON.

    >>> format_record(ALPACA)
    'alpaca'
    >>> format_record(replace(ALPACA, output="response"))
    '{"format": "alpaca", "output": "response"}'
    """
    base = FORMATS.get(format.name)
    if base == format or not isinstance(format, (TemplateFormat, PromptCompletionFormat, ChatFormat)):
        return format.name
    base = base if type(base) is type(format) else None
    values = asdict(format) | {"format": format.name}
    del values["name"]
    usual = {} if base is None else asdict(base)
    changed = {name: value for name, value in values.items() if name not in usual or value != usual[name]}
    return json.dumps({"format": format.name} | changed, ensure_ascii=False)


def format_of_rows(record: str | None, columns: Collection[str]) -> PromptFormat | None:
    """The format that `format_record` wrote down of rows with these columns; None where it is not known, or not theirs.

    >>> format_of_rows("alpaca", ["instruction", "output", "id"]).name, format_of_rows("alpaca", ["messages"])
    ('alpaca', None)
    """
    format = recorded_format(record)
    format = FORMATS.get(format) if isinstance(format, str) else format
    return format if format is not None and set(format.columns) <= set(columns) else None


def recorded_format(record: str | None) -> PromptFormat | str | None:
    """The format that `format_record` wrote down; a name that it does not know as it is.

    Raises:
        UserError: for what it did not write.

    >>> recorded_format(format_record(replace(ALPACA, output="response"))).columns
    ('instruction', 'response')
    """
    if record is None or not record.startswith("{"):
        return record
    try:
        values = json.loads(record)
        name = values.pop("format")
        if name in FORMATS:
            return replace(FORMATS[name], **values)
        kind = next(kind for kind in (TemplateFormat, ChatFormat, PromptCompletionFormat) if _has_fields(kind, values))
        return kind(name=name, **values)
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        raise UserError(f"What is recorded of the format of the rows, {record!r}, is no format's record.") from error


def _has_fields(kind: type, values: Collection[str]) -> bool:
    return {field.name for field in fields(kind)} == {"name", *values}

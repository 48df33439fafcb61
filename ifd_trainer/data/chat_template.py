"""Chat messages of a row, and what a chat template writes around an assistant's answer.

A template writes more than a header before an answer and an end-of-turn after it: an empty think block (Qwen3), a
channel (gpt-oss), a recipient. Whatever it adds is context or end, never answer. It is found by rendering: by where the
template puts a text that no row holds.

From the data of a row, only what cannot do harm reaches a template: messages, tools, and variables that are no
parameters of `apply_chat_template`.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from ..errors import UserError, shown_value

_MARK = "IFDx7answer"  # stands for a text of a row: nothing that a template trims, escapes, splits or looks for
_TOOL = "IFDx7tool"  # for the name of a tool
_REASONING = ("reasoning_content", "reasoning", "thinking")  # names that templates know for what was thought
_ROLES = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter"),
    "assistant": (
        *("assistant", "gpt", "bot", "chatbot", "model", "ai", "chatgpt", "gpt-4", "gpt4", "bing", "bard", "claude"),
        *("function_call", "function-call", "tool_call", "tool-call"),
    ),
    "tool": (
        *("tool", "function", "ipython", "observation", "environment"),
        *("function_response", "function-response", "tool_response", "tool-response", "function_result", "tool_result"),
    ),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
# Names that `apply_chat_template` and the template's renderer give their own meaning, in any version.
_NOT_VARIABLES = {
    *("messages", "conversation", "conversations", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens", "kwargs", "self"),
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
}


class MalformedRow(UserError):
    """A row that its format cannot render, for example a chat without messages."""


def last_answer(messages: Any) -> str:
    """What the last turn of the assistant says; "" where there is none, or it is no text.

    >>> last_answer([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}])
    '4'
    """
    turns = messages if isinstance(messages, (list, tuple)) else []
    said = [turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "assistant"]
    return said[-1] if said and isinstance(said[-1], str) else ""


def text_of(value: Any) -> str:
    """The text of one cell: "" for None and NaN, `str(value)` for numbers.

    Raises:
        MalformedRow: for lists, mappings and other values that are not text, and for text that is no Unicode.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise MalformedRow("the text holds half of a surrogate pair, which no tokenizer reads") from error
        return value
    if isinstance(value, (int, float)):
        return str(value)
    raise MalformedRow(f"expected text, got {type(value).__name__}")


def common_prefix_length(a: Sequence[int] | str, b: Sequence[int] | str) -> int:
    """Number of leading items that two sequences share.

    >>> common_prefix_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


# ---- messages -----------------------------------------------------------------------------------------------------


def chat_messages(turns: Any) -> list[dict[str, Any]]:
    """Messages with role and content, from these (OpenAI, TRL) or from turns with from and value (ShareGPT).

    Roles have one of the names that templates know (`gpt`, `bot`, `model` become `assistant`); contents are texts,
    parts that are all text joined.

    Raises:
        MalformedRow: for anything else: an unknown role, an image, a message that says nothing.
    """
    turns = _plain(turns)
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)):
        raise MalformedRow(f"expected a list of messages, got {type(turns).__name__}")
    return [_chat_message(turn, number) for number, turn in enumerate(turns)]


def _chat_message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise MalformedRow(f"expected a message with role and content, got {type(turn).__name__}")
    given = {key: value for key, value in turn.items() if value is not None}
    role, keys = given.get("role", given.get("from")), sorted(map(str, turn))
    if role is None:
        raise MalformedRow(f"a message needs 'role' and 'content' (or 'from' and 'value'), got keys {keys}")
    known = role_of(role)
    if known is None:
        raise MalformedRow(
            f"message {number} has the unknown role {shown_value(role)}; known are {', '.join(_ROLES)}, and names such "
            "as human and gpt"
        )
    content = given.get("content", given.get("value"))
    if "role" not in given:
        return {"role": known, "content": content_of(content, number)}
    message = given | {"role": known}
    message.pop("value", None)
    if content is not None:
        message["content"] = content_of(content, number)
    elif known != "assistant" or not _says(message):
        raise MalformedRow(f"message {number} ({known}) has no content")
    return message


def role_of(name: Any) -> str | None:
    """The role that a name stands for, None for one that is not known.

    >>> role_of("gpt"), role_of("narrator")
    ('assistant', None)
    """
    return _ROLE_OF.get(name.strip().lower()) if isinstance(name, str) else None


def content_of(content: Any, number: int = 0) -> str:
    """The text of a message's content: a text, or a list of parts that are all text.

    >>> content_of([{"type": "text", "text": "Name "}, {"type": "text", "text": "one."}])
    'Name one.'

    Raises:
        MalformedRow: for a part that is no text, such as an image.
    """
    if reads_as_text(content):
        return text_of(content)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if kind in ("text", None) and isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = shown_value(kind or type(part).__name__)
            raise MalformedRow(f"message {number} has a part of type {kind}; only text can be scored")
        texts.append(text_of(text))
    return "".join(texts)


def reads_as_text(value: Any) -> bool:
    """Whether a prompt or completion is text (or nothing) and no list of messages."""
    value = _plain(value)
    return isinstance(value, (str, bytes)) or not isinstance(value, Sequence)


def _plain(value: Any) -> Any:
    """Numpy's arrays as lists: what a data set in numpy's format holds."""
    if hasattr(value, "tolist") and not isinstance(value, str):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# ---- what else a row says -----------------------------------------------------------------------------------------


def template_options(row: Mapping[str, Any], tokenizer: Any = None) -> dict[str, Any]:
    """What a row gives its chat template beside messages: `tools`, and the variables in `chat_template_kwargs`.

    Both may be JSON texts; "" and null are none. Variables that are null are left out: Arrow fills in nulls where
    other rows have a value.

    Raises:
        MalformedRow: for what is neither, and for names that are parameters of `apply_chat_template` or special tokens:
            a row chooses among a template's variants, it does not replace the template.
    """
    tools = _from_json(row.get("tools"), "tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise MalformedRow(f"'tools' has to be a list of objects, or that as JSON; got {shown_value(tools)}")
    given = _from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise MalformedRow(f"'chat_template_kwargs' has to be an object with names, got {shown_value(given)}")
    variables = {name: value for name, value in given.items() if value is not None}
    taken = sorted(set(variables) & (_NOT_VARIABLES | _parameters(type(tokenizer))))
    if taken:
        raise MalformedRow(
            f"'chat_template_kwargs' sets {', '.join(taken)}, which is not for a row to say; only variables of the "
            "template are, such as enable_thinking"
        )
    return {"tools": tools, **variables}


@cache
def _parameters(kind: type) -> frozenset[str]:
    """Parameters of a tokenizer's `apply_chat_template`, of whatever version."""
    method = getattr(kind, "apply_chat_template", None)
    return frozenset(inspect.signature(method).parameters) if method else frozenset()


def _from_json(value: Any, name: str) -> Any:
    value = _plain(value)
    if value != value or (isinstance(value, str) and not value.strip()):  # NaN is none too
        return None
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise MalformedRow(f"'{name}' is not JSON: {error}") from error


# ---- what a template writes ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around an answer.

    Attributes:
        before: from the end of the turn before to the answer's first character: the assistant's header, and what the
            template puts behind it.
        after: behind the answer's last character.
    """

    before: str
    after: str


Render = Callable[..., str]


def renderer(tokenizer: Any, options: Mapping[str, Any]) -> Render:
    """The tokenizer's chat template as a function of messages."""
    return partial(tokenizer.apply_chat_template, tokenize=False, **options)


def check_chat(prompt: list[dict], answer: list[dict], options: Mapping[str, Any], tokenizer: Any) -> None:
    """Render a row as TRL does, to see whether the template can.

    Raises:
        MalformedRow: when it cannot.
    """
    render = renderer(tokenizer, options)
    try:
        render(prompt, add_generation_prompt=True)
        render(prompt + answer)
    except Exception as error:
        raise MalformedRow(f"the chat template cannot render the row: {error}") from error


def split_chat(
    prompt: list[dict], answer: list[dict], options: Mapping[str, Any], tokenizer: Any
) -> tuple[str, str, Frame]:
    """A chat as the template writes it, cut where the answer begins: (prompt, answer and end, frame).

    The answer begins behind all that the template writes before the first text of the row's own answer, and not before
    the end of what it writes to open a turn.

    Raises:
        MalformedRow: when the template cannot render the messages, neither with texts nor with parts as contents.
    """
    render = renderer(tokenizer, options)
    eos = getattr(tokenizer, "eos_token", None) or ""
    try:
        return _split(render, prompt, answer, eos)
    except Exception as error:  # templates raise jinja2 errors, KeyError, TypeError: all of them mean this row
        first = error
    try:  # templates of models that see images read contents as lists of parts
        return _split(render, _in_parts(prompt), _in_parts(answer), eos)
    except Exception:
        raise MalformedRow(f"the chat template cannot render the row: {first}") from first


def spans_of_answers(
    render: Render, messages: list[dict], places: Sequence[int]
) -> tuple[str, list[tuple[int, int] | None]]:
    """A conversation as the template writes it, and where in it the messages at some places are.

    An answer begins and ends as in `split_chat`. It is None where no rendering tells: with another text in its place,
    the template writes something else around it.

    Raises:
        MalformedRow: when the template cannot render the messages, neither with texts nor with parts as contents.
    """
    found, first = None, None
    for given in (messages, _in_parts(messages)):
        try:
            text = render(given)
        except Exception as error:
            first = first or error
            continue
        spans = [_span(render, given, place, text) for place in places]
        if any(spans):
            return text, spans
        found = found or (text, spans)  # a template that reads no texts as contents writes none of them
    if found is None:
        raise MalformedRow(f"the chat template cannot render the row: {first}") from first
    return found


def _span(render: Render, messages: list[dict], place: int, text: str) -> tuple[int, int] | None:
    """First character of a message and the one behind its last, without what the template writes around it."""
    probes, behind = _probes(messages[place]), messages[place + 1 :]
    try:
        tried = [_around_mark(render, [*messages[:place], probe, *behind]) for probe in probes]
        alone = _around_mark(render, [*messages[:place], probes[0]])
    except ValueError:  # the template leaves this message out
        return None
    around = [found for found in tried if found is not None]
    begins = [len(before) for before, *_ in around if text.startswith(before)]
    opened, closed = _rendered(render, messages[:place], opened=True), _rendered(render, messages[: place + 1])
    begins += [len(opened)] if opened and text.startswith(opened) else []
    if not begins:
        return None
    begin = max(begins)
    ends = [len(text) - len(after) for _, after, _ in around[:1] if text.endswith(after)]
    # A template may go on within the turn: with what a tool answered to the call in it. The turn by itself then is
    # all there, but for what ends it.
    shared = common_prefix_length(closed, text)
    ends += [shared] if alone and shared > begin and len(closed) - shared <= len(alone[1]) else []
    return (begin, max(begin, min(ends))) if ends else None


def _rendered(render: Render, messages: list[dict], opened: bool = False) -> str:
    """Some messages of a conversation, by themselves; "" where that is no chat that the template knows."""
    try:
        return render(messages, add_generation_prompt=opened)
    except Exception:
        return ""


def template_frames(tokenizer: Any, template: str | None = None) -> list[Frame]:
    """What a tokenizer's chat template writes around answers in chats of several kinds, the longest first.

    Args:
        template: a template in place of the tokenizer's own.
    """
    if template is None and not getattr(tokenizer, "chat_template", None):
        return []
    render = renderer(tokenizer, {} if template is None else {"chat_template": template})
    eos = getattr(tokenizer, "eos_token", None) or ""
    user, said = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    tool = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "name": "f", "content": "z"}]
    frames = set()
    for prompt in ([user], [{"role": "system", "content": "s"}, user], [user, said, user], [user, *tool]):
        for answer in ([said], [said | dict.fromkeys(_REASONING, "w")]):
            for asked, given in ((prompt, answer), (_in_parts(prompt), _in_parts(answer))):
                try:
                    frame = _split(render, asked, given, eos)[2]
                    opened = _behind(render(asked), render(asked, add_generation_prompt=True), eos)
                except Exception:  # a kind of chat that this template does not know
                    continue
                # An answer may begin as an open turn goes on; behind an empty one, white space may be left out.
                frames |= {Frame(before, frame.after) for before in (frame.before, opened, frame.before.rstrip())}
                break
    earlier = _between(render, [user | {"content": _MARK}, said | {"content": _MARK}, user, said])
    befores = {frame.before for frame in frames if frame.before.strip()}
    shared = (text[:size] for text in befores for size in range(len(text), 0, -1) if earlier.endswith(text[:size]))
    if (before := max(shared, key=len, default="")).strip():  # a template may leave out what was thought earlier
        frames |= {Frame(before, frame.after) for frame in frames}
    return sorted(
        (frame for frame in frames if frame.before), key=lambda frame: (-len(frame.before), frame.before, frame.after)
    )


def turn_texts(tokenizer: Any, template: str | None = None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a tokenizer's chat template writes between the turns of a conversation: headers and openers.

    Headers stand before an assistant's answers, earlier ones of a conversation too, where a template may leave out what
    was thought. Openers stand between an answer and what follows it, the turn of a user, a tool or a system: first what
    ends the answer's turn.

    Args:
        template: a template in place of the tokenizer's own.
    """
    headers = [frame.before for frame in template_frames(tokenizer, template) if frame.before.strip()]
    render = renderer(tokenizer, {} if template is None else {"chat_template": template})
    user, said = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    answered = said | {"content": _MARK}
    openers = []
    for role in ("user", "system", "tool"):
        for turn in ({"role": role, "content": _MARK}, {"role": role, "content": [{"type": "text", "text": _MARK}]}):
            turn |= {"name": _TOOL} if role == "tool" else {}
            found = [_between(render, [user, answered, turn, *then]) for then in ([said], [])]
            found.append(_behind_calls(render, user, turn, said) if role == "tool" else "")
            openers += [opener.partition(_TOOL)[0] for opener in found]
            if any(found):
                break
    return tuple(dict.fromkeys(headers)), tuple(dict.fromkeys(opener for opener in openers if opener.strip()))


def _behind_calls(render: Render, user: dict, turn: dict, said: dict) -> str:
    """What a template writes between the call of a tool and its result, whatever was called."""
    texts = []
    for arguments in ({}, {"a": "b"}, {"cd": 5}):
        call = {"type": "function", "id": "c00000000", "function": {"name": _TOOL, "arguments": arguments}}
        messages = [user, {"role": "assistant", "content": "", "tool_calls": [call]}, turn, said]
        try:
            around = _around_mark(render, messages)
        except ValueError:
            return ""
        texts.append(around[0][::-1] if around else "")
    shared = min(common_prefix_length(texts[0], other) for other in texts[1:])
    return texts[0][:shared][::-1]


def _between(render: Render, messages: list[dict]) -> str:
    """What a template writes between the two marks in some messages; nothing where it cannot render them."""
    try:
        around = _around_mark(render, messages)
    except ValueError:
        return ""
    return "" if around is None else around[2].partition(_MARK)[0]


def _split(render: Render, prompt: list[dict], answer: list[dict], eos: str) -> tuple[str, str, Frame]:
    opened = render(prompt, add_generation_prompt=True) if prompt else ""
    closed = render(prompt) if prompt else ""
    whole = render(prompt + answer) if answer else opened
    if not any(_says(message) for message in answer):
        return whole, "", Frame(_behind(closed, opened, eos), "")
    # Some templates render a finished turn unlike an open one; the answer begins no earlier than where the two part,
    # and the row's own text may begin as the open turn goes on: probes tell.
    arounds = [_around_mark(render, [*prompt, probe]) for probe in _probes(answer[0])]
    lengths = [len(around[0]) for around in arounds if around and whole.startswith(around[0])]
    begin = max(lengths, default=common_prefix_length(opened, whole))
    begin = max(begin, len(opened)) if whole.startswith(opened) else begin
    around = _around_mark(render, [*prompt, *answer[:-1], _probes(answer[-1])[0]])
    after = around[1] if around is not None and whole[begin:].endswith(around[1]) else ""
    before = _behind(closed, whole[:begin], eos)
    if not before.strip() and prompt:  # the header stands at the end of the user's turn: [/INST]
        marked = {**prompt[-1], "content": _like(prompt[-1], _MARK)}
        around = _around_mark(render, [*prompt[:-1], marked, _probes(answer[0])[0]])
        between = around[2] if around is not None else ""
        if after.strip():  # a turn of the user ends as the assistant's does: <|im_end|>
            between = between.removeprefix(after)
        before = between if whole[:begin].endswith(between) else before
    return whole[:begin], whole[begin:], Frame(before, after)


def _says(message: Mapping[str, Any]) -> bool:
    """Whether a message says anything: in its content, or in what only some have (tool calls, what was thought)."""
    return any(str(message.get(name) or "").strip() for name in ("content", "tool_calls", "function_call", *_REASONING))


def _behind(closed: str, text: str, eos: str) -> str:
    """What `text` says behind a chat that a template closed, perhaps with EOS."""
    for start in (closed, closed.removesuffix(eos)):
        if text.startswith(start):
            return text[len(start) :]
    return text[common_prefix_length(closed, text) :]


def _probes(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages of the same role that hold a mark in place of the text: as content, and as what was thought before."""
    probes = [{"role": message["role"], "content": _like(message, _MARK)}]
    if any(message.get(name) for name in _REASONING) or "</think>" in str(message.get("content")):
        probes.append(probes[0] | dict.fromkeys(_REASONING, _MARK))
    return probes


def _like(message: Mapping[str, Any], text: str) -> Any:
    return [{"type": "text", "text": text}] if isinstance(message.get("content"), list) else text


def _in_parts(messages: Collection[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message.get("content") or ""}]} for message in messages]


def _around_mark(render: Render, messages: list[dict]) -> tuple[str, str, str] | None:
    """The text before the first mark, behind the last, and between the two; None where it cannot be rendered.

    Raises:
        ValueError: when the template does not write the mark: it would not write the row's text either.
    """
    try:
        text = render(messages)
    except Exception:  # the row itself could be rendered: it is unlike the probe
        return None
    first, last = text.find(_MARK), text.rfind(_MARK)
    if first < 0:
        raise ValueError("it leaves out the text of the assistant's message")
    return text[:first], text[last + len(_MARK) :], text[first + len(_MARK) : last]

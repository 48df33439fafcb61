"""A judge behind any server that speaks OpenAI's chat completions: that of OpenAI, another one, one on this machine.

It reads each pair in both orders (arXiv 2308.12032), and gives two scores from 1 to 10 on its first line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ..errors import JudgeError, NotInstalledError, UserError, one_line, shown_value
from .cache import content_key
from .scores import Judgement, paired
from .verdicts import Reason, Verdict, read_verdict

# In our words; what is asked for is the paper's: helpfulness, relevance, accuracy and level of detail, from 1 to 10,
# the two scores alone on the first line, whatever the order.
PROMPT = """\
Two assistants have answered the same request. Compare their answers as an impartial judge.

<request>
{question}
</request>

<answer_of_assistant_1>
{first}
</answer_of_assistant_1>

<answer_of_assistant_2>
{second}
</answer_of_assistant_2>

Look at how helpful, relevant, accurate and detailed each answer is, and give each assistant one score for all of it, \
from 1 (worst) to 10 (best). Which answer stands first has no meaning.

Begin with a line that holds nothing but two numbers with a space between them: the score of assistant 1, then the \
score of assistant 2. On the next line, give your reasons in one or two sentences."""
OPENAI = "https://api.openai.com/v1"
GIVE_UP = 10  # requests in a row without an answer, after which a server is taken to be out of order
_PLACES = re.compile(r"\{(question|first|second)\}")
Asked = tuple[str, str, str]  # request, first answer, second answer


class Secret:
    """A text that is shown, copied and written nowhere: not in a repr, an error, JSON or a pickle.

    >>> Secret("sk-1")
    Secret('***')
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself."""
        return self._text

    def __repr__(self) -> str:
        return "Secret('***')"

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: Any) -> Secret:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("A secret is not pickled: leave it in OPENAI_API_KEY.")


@dataclass(frozen=True)
class OpenAIJudge:
    """Asks a chat model which of two answers is better.

    What it was asked is told from anything else by `key`: the model's name, the prompt, the sampling and the texts. The
    server's address is not in it, since servers of one's own change machines and ports, and a name that is as good as
    any, such as "local", should not be given to two models; each verdict keeps who gave it, in `Verdict.by`.

    Attributes:
        model: as the server calls it.
        base_url: of the server, as "http://localhost:8000/v1"; by default that in OPENAI_BASE_URL, or OpenAI's.
        api_key: by default that in OPENAI_API_KEY, which is sent to `base_url` too; a server that is named needs none.
        workers: requests at a time.
        timeout: seconds without a sign of the server, after which a request is sent again.
        retries: how often a request is sent again after a time-out, a lost connection, or the status 408, 409, 429 or
            5xx: after half a second, then twice as long each time up to 8 s, or when the server's Retry-After says.
        temperature: None to leave it to the server, as some models want it.
        max_tokens: of what the judge says, 256 by default; None to leave it to the server.
        prompt: with {question}, {first} and {second} where the texts go.
        options: further fields of a request, such as {"max_completion_tokens": 2000, "reasoning_effort": "low"}.

    Raises:
        UserError: for settings that cannot be, and a key that no header can hold.

    >>> judge = OpenAIJudge("local", "http://localhost:8000/v1", api_key="sk-1")
    >>> judge.name, "sk-1" in repr(judge)
    ('local', False)
    >>> judge([("Name a colour.", "Red.", "No.")])                                               # doctest: +SKIP
    [Verdict(first=9.0, second=2.0, reason=None, text='9 2\\nThe second ...', by='local at localhost:8000')]
    """

    model: str
    base_url: str | None = None
    api_key: str | Secret | None = field(default=None, repr=False, compare=False)
    workers: int = 4
    timeout: float = 60.0
    retries: int = 5
    temperature: float | None = 0.0
    max_tokens: int | None = 256
    prompt: str = field(default=PROMPT, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        key = self.api_key.reveal() if isinstance(self.api_key, Secret) else self.api_key
        object.__setattr__(self, "api_key", None if key is None else Secret(_header_text(key, "api_key")))
        if not (isinstance(self.model, str) and self.model):
            raise UserError(f"A judge wants the name of a model, as its server calls it, got {self.model!r}.")
        if self.base_url is not None:
            _check_url(self.base_url, "base_url")
        for name, least in (("workers", 1), ("retries", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise UserError(f"{name} of a judge must be at least {least}, got {getattr(self, name)!r}.")
        if not self.timeout > 0:
            raise UserError(f"timeout of a judge wants seconds above 0, got {self.timeout!r}.")
        if missing := sorted({"question", "first", "second"} - set(_PLACES.findall(self.prompt))):
            raise UserError(
                f"The prompt of a judge wants a place for each text; it lacks {', '.join(f'{{{m}}}' for m in missing)}."
            )

    @property
    def name(self) -> str:
        """As tables have it."""
        return self.model

    @property
    def address(self) -> str:
        """Where requests go."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI

    def settings(self) -> dict[str, Any]:
        """What a record of a comparison may hold: all but the key."""
        names = ("model", "temperature", "max_tokens", "prompt")
        return {name: getattr(self, name) for name in names} | {"options": dict(self.options), "address": self.address}

    def questions(self, prompt: str, own: str, other: str) -> list[Asked]:
        """Both orders of two answers."""
        return [(prompt, own, other), (prompt, other, own)]

    def key(self, asked: Asked) -> str:
        """A digest of all that a verdict depends on."""
        sampling = [self.temperature, self.max_tokens, dict(self.options)]
        return content_key("chat", self.model, self.prompt, sampling, *asked)

    def read(self, record: dict[str, Any]) -> Verdict:
        """The verdict that a cache has kept."""
        return Verdict.from_record(record)

    def compare(self, verdicts: Sequence[Verdict]) -> Judgement:
        """What the verdicts on both orders say of the first answer of the first order."""
        reasons = tuple(str(verdict.reason) for verdict in verdicts if verdict.reason is not None)
        if reasons:
            return Judgement(None, reasons=reasons)
        there, back = verdicts
        return paired([(there.first, there.second), (back.second, back.first)])

    def __call__(self, asked: Sequence[Asked], said: Callable[[int, Verdict], Any] | None = None) -> list[Verdict]:
        """A verdict for each question.

        Args:
            asked: request, first answer and second answer.
            said: is called in this thread with the number and the verdict of each question, as they come; before an
                error or an interrupt goes on, with those that are still on their way.

        Raises:
            NotInstalledError: without the package openai.
            JudgeError: for a server that is not there, refuses the key or the model, or has given no answer to
                `GIVE_UP` requests in a row.
            UserError: for OpenAI's server without a key.
        """
        if not asked:
            return []
        verdicts: dict[int, Verdict] = {}
        unanswered = 0

        def note(number: int, verdict: Verdict) -> None:
            nonlocal unanswered
            verdicts[number] = verdict
            if said is not None:
                said(number, verdict)
            unanswered = 0 if verdict.reason is None or verdict.reason.said else unanswered + 1
            if unanswered >= GIVE_UP:
                raise JudgeError(
                    f"The judge {self.model} at {self.address} gave no answer to {unanswered} requests in a row; the "
                    f"last one: {verdict.reason}{f' ({verdict.text})' if verdict.text else ''}. What it had answered "
                    "before is kept."
                )

        with self._client() as client:
            first = self._verdict(client.with_options(max_retries=0), asked[0])
            if first.reason is Reason.CONNECTION:
                raise JudgeError(
                    f"No judge answers at {self.address}: {first.text}. Start its server, or name another one with "
                    "base_url."
                )
            if first.reason is None or first.reason.said:
                note(0, first)
            with ThreadPoolExecutor(self.workers) as pool:
                numbers = range(len(verdicts), len(asked))
                going = {pool.submit(self._verdict, client, asked[number]): number for number in numbers}
                try:
                    for ended in as_completed(list(going)):
                        note(going.pop(ended), ended.result())
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    _keep(going, said)
                    raise
        return [verdicts[number] for number in range(len(asked))]

    def check(self) -> None:
        """Raise for what is known before anything is asked: the package or the key is not there. Asks nothing."""
        self._client().close()

    def _client(self) -> Any:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise NotInstalledError(
                "A judge behind a server is asked by the package openai: pip install 'ifd_trainer[judge]'."
            ) from error
        if self.api_key is not None:
            key = self.api_key.reveal()
        elif os.environ.get("OPENAI_API_KEY"):
            key = _header_text(os.environ["OPENAI_API_KEY"], "OPENAI_API_KEY")
        elif self.address == OPENAI:
            raise UserError("The judge wants a key: set OPENAI_API_KEY, or name a server of your own with base_url.")
        else:
            key = "no-key"  # the client wants one
        _check_url(self.address, "OPENAI_BASE_URL")
        return OpenAI(api_key=key, base_url=self.address, timeout=self.timeout, max_retries=self.retries)

    def _verdict(self, client: Any, asked: Asked) -> Verdict:
        """What the server says to one question; JudgeError where it would say nothing to any."""
        import openai

        def failed(reason: Reason, error: Exception | None = None) -> Verdict:
            return Verdict(reason=reason, text="" if error is None else _message(error, client.api_key), by=self._by())

        try:
            reply = client.chat.completions.create(**self._request(asked))
        except openai.APITimeoutError:
            return failed(Reason.TIMEOUT)
        except openai.APIConnectionError as error:
            return failed(Reason.CONNECTION, error.__cause__ or error)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            # The server's own words may hold a part of the key.
            raise JudgeError(
                f"The judge at {self.address} refuses the key (status {error.status_code}): set OPENAI_API_KEY to one "
                "that it takes."
            ) from None
        except openai.NotFoundError as error:
            raise JudgeError(
                f"The judge at {self.address} has no model {self.model}, or does not take chat completions there: "
                f"{_message(error, client.api_key)}. A base_url mostly ends in /v1."
            ) from None
        except openai.RateLimitError as error:
            if error.code == "insufficient_quota":  # to wait does not help
                raise JudgeError(f"The judge at {self.address}: {_message(error, client.api_key)}.") from None
            return failed(Reason.RATE, error)
        except openai.APIStatusError as error:
            if error.code == "content_filter":
                return read_verdict("", refused=True, by=self._by())
            return failed(Reason.SERVER if error.status_code >= 500 else Reason.NOT_ACCEPTED, error)
        except (openai.OpenAIError, ValueError):  # what is no JSON is a ValueError
            return failed(Reason.MALFORMED)
        return self._read(reply, client.api_key) or failed(Reason.MALFORMED)

    def _request(self, asked: Asked) -> dict[str, Any]:
        texts = dict(zip(("question", "first", "second"), asked, strict=True))
        content = _PLACES.sub(lambda place: texts[place[1]], self.prompt)  # a text that holds {first} stays as it is
        sampling = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "extra_body": dict(self.options),
            **{name: value for name, value in sampling.items() if value is not None},
        }

    def _read(self, reply: Any, key: str) -> Verdict | None:
        """The verdict of a chat completion; None for what is none, which the client lets through."""
        choices = getattr(reply, "choices", None)
        message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
        content, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
        if message is None or not isinstance(content, (str, type(None))):
            return None
        ended = getattr(choices[0], "finish_reason", None)
        by = self._by(getattr(reply, "model", None))
        refused = bool(refusal) or ended == "content_filter"
        return read_verdict(_without(key, str(refusal or content or "")), refused, ended == "length", by)

    def _by(self, model: Any = None) -> str:
        return f"{model if isinstance(model, str) and model else self.model} at {urlsplit(self.address).netloc}"


def _keep(going: Mapping[Future[Verdict], int], said: Callable[[int, Verdict], Any] | None) -> None:
    """Say what came while others were being called off: it is paid for."""
    for future, number in going.items():
        with suppress(Exception):  # there is an error on its way already
            if said is not None and not future.cancelled():
                said(number, future.result())


def _message(error: Exception, key: str) -> str:
    """What an error says, on a line, cut where it is long, without the key if a server repeats that."""
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, dict) else None
    text = _without(key, one_line(text if isinstance(text, str) else error)).rstrip(".")
    return text if len(text) <= 300 else f"{text[:297]}..."


def _without(key: str, text: str) -> str:
    """A text, which is kept and shown, without the key: a server may repeat it. A word such as "EMPTY" is none."""
    return text.replace(key, "***") if len(key) > 8 else text


def _check_url(url: str, name: str) -> None:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:  # not shown: it may be secret
        raise UserError(f"{name} of a judge wants scheme, host and path alone; a key belongs in OPENAI_API_KEY.")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"{name} of a judge wants an address as http://localhost:8000/v1, got {shown_value(url)}.")


def _header_text(key: str, name: str) -> str:
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():  # not shown: the client's own error would
        raise UserError(f"{name} is empty, or holds characters that no HTTP header takes.")
    return key

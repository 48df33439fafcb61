"""From encoded rows to scores: how surprised a model is by each answer, with its prompt and without.

The loss of an answer is the mean negative log-likelihood of its tokens, in nats; IFD is the ratio of the two losses.
`score_pairs` scores encoded rows: both segments of a row are forwards among all others, in batches that an engine makes
and runs (see `scoring.engine`). An accelerator does not wait for the host: the next batch is laid out while it runs
one. Scoring leaves no trace: every module's train or eval mode, the attention function and the global random state are
as before.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..data.encoding import EncodedPair, Segment, token_count, with_ending
from ..errors import UserError
from ..method.columns import IFD_COLUMNS, LAST_COLUMNS, SCORES
from ..method.equations import FROM_LOSSES, further_scores
from ..method.further_scores import losses_read
from ..method.reasons import Status
from .engine import Engine, EngineName, model_device
from .eval_guard import eval_mode
from .forward import Batch, LaunchedBatch
from .model_notes import noted
from .model_parts import lm_head, text_config, unwrapped
from .rope_limits import remembers_lengths
from .token_budget import token_budget as measured_budget

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

# Share of the tokens that did not fit which are tried next: halves of a batch are not of quite the same size.
_HALVED = 0.55


@dataclass
class MemoryLimit:
    """The most tokens of a batch that are tried, since one did not fit in memory."""

    tokens: float = float("inf")


# What is run where nothing is to be scored.
_NOTHING = [Segment([0, 0], 1)]


Collect = Callable[[np.ndarray, LaunchedBatch], Any]  # positions of a batch's segments, and what was launched
Around = Callable[[np.ndarray, Batch], AbstractContextManager[Any]]  # the same positions, and what is to be launched


class Options(TypedDict, total=False):
    """How a model is run over many rows.

    Attributes:
        device: where the token ids go; the model's device by default.
        token_budget: tokens of a batch; by default 2,048 on a CPU, fewer for a model with wide layers, and elsewhere
            what a quarter of the device's memory holds, or 3 GiB (1,024 to 65,536 tokens), measured on a few batches.
            Halved, with one warning, whenever the device runs out of memory.
        progress: called with the number of tokens done after each batch.
        engine: "auto", "stream" or "padded".
        forwards: for processes that have to run the same number of forwards: called with the number of batches before
            the first one, returns how many forwards to run, at least as many. Those without a batch run on two tokens.
        sharded: the processes hold parts of one model's weights and gather them in every forward (FSDP, ZeRO-3). A
            process that is out of memory then cannot halve its batch: the others would wait for it in a forward.
        around: gives the context in which the forward of a batch is launched. No segment runs inside another one then,
            so that in the padded engine each has a row of the batch, in their order.
    """

    device: torch.device | str | None
    token_budget: int | None
    progress: Callable[[int], Any] | None
    engine: EngineName
    forwards: Callable[[int], int] | None
    sharded: bool
    around: Around | None


@dataclass(frozen=True)
class Scores:
    """Scores of n rows as arrays of shape (n,); cas, das in nats per token; NaN where `ifd_status` is not `ok`.

    `eot_loss`, in nats, is NaN also where nobody knows how the turn ended. `further` holds the scores that were asked
    for, by name; see `method.further_scores`. They are NaN too where a row has no such score. `losses` are those that
    were read for them beside `cas` and `das`, by name, where the scores are fresh from a model.
    """

    cas: np.ndarray
    das: np.ndarray
    ifd: np.ndarray
    ifd_ppl: np.ndarray
    eot_loss: np.ndarray
    answer_tokens: np.ndarray
    ifd_status: np.ndarray
    further: Mapping[str, np.ndarray] = field(default_factory=dict)
    losses: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cas)

    @property
    def of_last_answers(self) -> Scores:
        """Scores of the rows' last answers; these, where rows are scored by one answer each.

        `nonfinite` stands for a last answer that has no score, of a row that has one.
        """
        if LAST_COLUMNS[0] not in self.further:
            return self
        losses = (self.further[name] for name in LAST_COLUMNS)
        return Scores.from_nll(*losses, self.ifd_status, self.eot_loss)

    def columns(self) -> dict[str, np.ndarray]:
        """Arrays by column name, the further ones last."""
        return {name: getattr(self, name) for name in IFD_COLUMNS} | dict(self.further)

    def placed(self, rows: np.ndarray, tokens: np.ndarray, status: str) -> Scores:
        """These scores of the rows at m positions as those of n rows; the others have none.

        Args:
            rows: (m,) positions.
            tokens: (n,) answer tokens of all rows.
            status: of the others.
        """
        placed, known = {}, {"answer_tokens": tokens, "ifd_status": status}
        for name, values in self.columns().items():
            others = known.get(name, np.nan if values.dtype.kind == "f" else 0)
            placed[name] = np.full(len(tokens), others, dtype=values.dtype)
            placed[name][rows] = values
        return Scores.of(placed)

    @classmethod
    def unscored(cls, rows: int, status: str, further: Iterable[str] = ()) -> Scores:
        """No scores at all, for one reason."""
        return cls.not_run(np.zeros(rows, dtype=np.int64), np.full(rows, status, dtype=object), further)

    @classmethod
    def not_run(cls, tokens: np.ndarray, status: np.ndarray, further: Iterable[str] = ()) -> Scores:
        """Rows that no model has read: what is known of them beside scores, which are NaN, also where they are `ok`."""
        blank = {name: np.full(len(tokens), np.nan) for name in (*SCORES, *further)}
        return cls.of({**blank, "answer_tokens": tokens, "ifd_status": status})

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray]) -> Scores:
        """Scores by column, further ones among them; those of an earlier release lack `eot_loss`."""
        own = {name: columns[name] for name in IFD_COLUMNS if name in columns}
        further = {name: values for name, values in columns.items() if name not in own}
        return cls(**{"eot_loss": np.full(len(columns["cas"]), np.nan), **own}, further=further)

    @classmethod
    def from_nll(
        cls,
        cas: np.ndarray,
        das: np.ndarray,
        tokens: np.ndarray,
        status: np.ndarray,
        eot_loss: np.ndarray | None = None,
        further: Mapping[str, np.ndarray] | None = None,
    ) -> Scores:
        """Scores from the two mean losses; a row of which one is not finite becomes `nonfinite`."""
        values = {"cas": cas, "das": das} | {name: score(cas, das) for name, score in FROM_LOSSES.items()}
        values["eot_loss"] = np.full(len(cas), np.nan) if eot_loss is None else eot_loss
        finite = np.logical_and.reduce([np.isfinite(values[name]) for name in FROM_LOSSES])
        status = np.where((status == Status.OK.value) & ~finite, Status.NONFINITE.value, status)
        blank = status != Status.OK.value
        values = {name: np.where(blank, np.nan, value) for name, value in {**values, **(further or {})}.items()}
        return cls.of({**values, "answer_tokens": tokens, "ifd_status": status})


def score_pairs(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    further: Sequence[str] = (),
    collect: Collect | None = None,
    **options: Unpack[Options],
) -> Scores:
    """Score encoded rows.

    Args:
        model: a causal language model, or what a trainer wrapped around one (DDP, FSDP, DeepSpeed); put into eval mode
            and back.
        pairs: n encoded rows.
        further: names of further scores; what they follow from is run in the same batches.
        collect: called with what was launched of each batch; its segments are the conditioned one of the first row
            that can be scored, its direct one, the conditioned one of the second, and so on; behind them those of
            further scores.
        options: see `Options`.

    Returns:
        Scores of the n rows, in their order.

    Raises:
        torch.OutOfMemoryError: when one row alone does not fit, or a batch of a sharded model.
    """
    segments = [segment for pair in pairs if pair.conditioned for segment in (with_ending(pair), pair.direct)]
    read, both = losses_read(further), len(segments)
    more = [(name, row) for row, pair in enumerate(pairs) for name in pair.more if name in read]
    segments += [pairs[row].more[name] for name, row in more]
    nll, tail_nll = nll_with_tails(model, segments, collect, **options)
    status = statuses(pairs)
    scored = status == Status.OK.value
    losses = {name: np.full(len(pairs), np.nan) for name in ("cas", "das", "eot_loss", *read)}
    losses["cas"][scored], losses["das"][scored] = nll[0:both:2], nll[1:both:2]
    losses["eot_loss"][scored] = tail_nll[0:both:2]
    for (name, row), loss in zip(more, nll[both:].tolist(), strict=True):
        losses[name][row] = loss
    found = further_scores(further, losses)
    scores = Scores.from_nll(losses["cas"], losses["das"], answer_tokens(pairs), status, losses["eot_loss"], found)
    return replace(scores, losses={name: losses[name] for name in read})


def statuses(pairs: Sequence[EncodedPair]) -> np.ndarray:
    """Status of each row, (n,), by its value."""
    return np.array([pair.status.value for pair in pairs], dtype=object)


def answer_tokens(pairs: Sequence[EncodedPair]) -> np.ndarray:
    """Tokens of each row's answer that are scored, (n,); 0 of a row that is not."""
    return np.array([pair.conditioned.scored if pair.conditioned else 0 for pair in pairs], dtype=np.int64)


def answer_nll(model: nn.Module, segments: Sequence[Segment], **options: Unpack[Options]) -> np.ndarray:
    """Mean negative log-likelihood of each segment's scored tokens.

        nll = -1/N * sum_{i >= start} log P(ids[i] | ids[:i])

    Options: see `Options`.

    Returns:
        (n,) float64, nats per token.
    """
    return nll_with_tails(model, segments, **options)[0]


def nll_with_tails(
    model: nn.Module, segments: Sequence[Segment], collect: Collect | None = None, **options: Unpack[Options]
) -> tuple[np.ndarray, np.ndarray]:
    """`answer_nll`, and the negative log-likelihood of each segment's tail as a whole, in nats, NaN without one.

    `collect` is called with what was launched of each batch. Options: see `Options`.
    """
    nll, tail_nll = np.empty(len(segments)), np.empty(len(segments))
    for batch, launched in _forwards(model, segments, **options):
        nll[batch], tail_nll[batch] = launched.nll(), launched.tail_nll()
        if collect is not None:
            collect(batch, launched)
    return nll, tail_nll


def prompt_features(
    model: nn.Module, prompts: Sequence[Sequence[int]], **options: Unpack[Options]
) -> tuple[np.ndarray, np.ndarray]:
    """How a model sees n prompts of T tokens q_t: what the brief experience is sampled by (arXiv 2308.12032).

        embedding  = 1/T * sum_t h_t                            h_t: last hidden state, what the LM head reads
        perplexity = exp(-1/(T-1) * sum_{t > 1} log P(q_t | q_<t))

    Options: see `Options`.

    Returns:
        Embeddings (n, H) float32 and perplexities (n,) float64; NaN for a prompt of no token, and a perplexity of NaN
        for a prompt of one.

    Raises:
        ValueError: for a model that does not tell its LM head.
    """
    _need_states(model)
    # A prompt of one token is its own continuation: that loss is not used.
    segments = [Segment([*ids, *ids][: max(len(ids), 2)], 1) for ids in map(list, prompts) if ids]
    present = np.flatnonzero([len(ids) > 0 for ids in prompts])
    perplexity = np.full(len(prompts), np.nan)
    embeddings = np.full((len(prompts), 0), np.nan, dtype=np.float32)
    sizes = [len(prompts[i]) for i in present]
    for batch, launched in _forwards(model, segments, sizes, **options):
        means = launched.means()
        if not embeddings.shape[1]:
            embeddings = np.full((len(prompts), means.shape[1]), np.nan, dtype=np.float32)
        perplexity[present[batch]] = np.exp(launched.nll())
        embeddings[present[batch]] = means
    perplexity[[len(ids) < 2 for ids in prompts]] = np.nan
    return embeddings, perplexity


def position_weighted_embeddings(
    model: nn.Module, sequences: Sequence[Sequence[int]], **options: Unpack[Options]
) -> np.ndarray:
    """How a model sees n sequences of T tokens each, the later tokens most: what RDS+ compares (arXiv 2503.01807).

        embedding = sum_t t * h_t / sum_t t                     h_t: last hidden state, what the LM head reads

    Options: see `Options`.

    Returns:
        (n, H) float32; NaN for a sequence of no token.

    Raises:
        ValueError: for a model that does not tell its LM head.
    """
    _need_states(model)
    present = np.flatnonzero([len(ids) > 0 for ids in sequences])
    # One token is predicted, not all: the LM head is not what is looked at. A sequence of one is followed by itself.
    segments = [Segment([*ids, *ids][: max(len(ids), 2)], max(len(ids) - 1, 1)) for ids in map(list, sequences) if ids]
    embeddings = np.full((len(sequences), 0), np.nan, dtype=np.float32)
    for batch, launched in _forwards(
        model, segments, [len(sequences[i]) for i in present], by_position=True, **options
    ):
        means = launched.means()
        if not embeddings.shape[1]:
            embeddings = np.full((len(sequences), means.shape[1]), np.nan, dtype=np.float32)
        embeddings[present[batch]] = means
    return embeddings


def _need_states(model: nn.Module) -> None:
    if lm_head(model) is None:
        raise UserError(f"{type(unwrapped(model)).__name__} does not tell its output embeddings, so no hidden state.")


def _forwards(
    model: nn.Module,
    segments: Sequence[Segment],
    pooled_tokens: Sequence[int] | None = None,
    *,
    by_position: bool = False,
    device: torch.device | str | None = None,
    token_budget: int | None = None,
    progress: Callable[[int], Any] | None = None,
    engine: EngineName = "auto",
    forwards: Callable[[int], int] | None = None,
    sharded: bool = False,
    around: Around | None = None,
) -> Iterator[tuple[np.ndarray, LaunchedBatch]]:
    """Run all segments in batches; their positions, and what was launched.

    `pooled_tokens` says how many tokens of each segment, from the first, are averaged; None for no hidden states.
    `by_position`: with weights that grow with the position.
    """
    if not segments and forwards is None:
        return  # with `forwards`, trying out is done by all processes or by none
    device = torch.device(device) if device is not None else model_device(model)
    lengths = [len(segment.ids) for segment in segments]
    with eval_mode(model, device):
        chosen = Engine.for_model(model, device, engine, sharded)
        chosen = chosen if around is None else replace(chosen, nests=False)
        if not token_budget:
            # Forwards that other processes would have to share in are not spent on measuring.
            alone = not sharded and (forwards is None or unwrapped(model) is model)
            run, scored_budget = chosen.nll if alone else None, chosen.scored_budget(segments)
            token_budget = measured_budget(model, lengths, scored_budget, device, run, chosen.setting)
        # A job has a call for each of its parts, and not all of them are to find out anew.
        limit = noted(model, "most tokens", chosen.setting, MemoryLimit)
        batches = chosen.batches(segments, int(min(token_budget, limit.tokens)))
        if remembers_lengths(text_config(model)):
            chosen.nll(_NOTHING)  # what was scored or tried out before is forgotten
        idle = 0 if forwards is None else forwards(len(batches)) - len(batches)

        def lay_out(rows: np.ndarray) -> Batch:
            return chosen.lay_out([segments[i] for i in rows])

        def begin(rows: np.ndarray, batch: Batch) -> LaunchedBatch:
            of_rows = None if pooled_tokens is None else [pooled_tokens[i] for i in rows]
            with nullcontext() if around is None else around(rows, batch):
                return chosen.launch(batch, of_rows, by_position)

        for rows, launched in run_in_turn(lay_out, begin, batches, device, limit, halve=not sharded):
            launched.wait()
            if progress is not None:
                progress(sum(lengths[i] for i in rows))
            yield rows, launched
        for _ in range(idle):
            chosen.nll(_NOTHING)


def run_in_turn(
    lay_out: Callable[[np.ndarray], Batch],
    begin: Callable[[np.ndarray, Batch], LaunchedBatch],
    batches: list[np.ndarray],
    device: torch.device,
    limit: MemoryLimit,
    halve: bool = True,
) -> Iterator[tuple[np.ndarray, LaunchedBatch]]:
    """Run batches one after another; what they give is waited for once the next one is launched, but for a CPU.

    One that does not fit in memory is run in halves, and so are all that follow with more than half of its tokens.
    """

    def attempt(rows: np.ndarray, batch: Batch) -> LaunchedBatch | None:
        """What a forward gives, or None if it does not fit."""
        try:
            return begin(rows, batch)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise torch.OutOfMemoryError(
                    f"Out of memory on {device} while scoring a single row. Lower max_length, or score with a smaller "
                    "model or on a larger device."
                ) from error
            if not halve:
                raise torch.OutOfMemoryError(
                    f"Out of memory on {device} while scoring {len(rows)} rows in a batch with a model whose weights "
                    "are spread over processes. Lower token_budget."
                ) from error
        tokens = batch.input_ids.size
        if limit.tokens == float("inf"):
            logger.warning("Out of memory on %s with %d tokens in a batch: going on with half.", device, tokens)
        limit.tokens = _HALVED * tokens
        if device.type == "cuda":
            torch.cuda.empty_cache()  # not before the error is gone, whose traceback holds what the forward had made
        return None

    queue, launched = batches[::-1], deque()
    while queue:
        rows = queue.pop()
        batch = lay_out(rows)
        running = attempt(rows, batch) if batch.input_ids.size <= limit.tokens or len(rows) == 1 else None
        if running is None:
            half = len(rows) // 2
            queue += [rows[half:], rows[:half]]
            continue
        launched.append((rows, running))
        while len(launched) > (device.type != "cpu"):
            yield launched.popleft()
    yield from launched


def token_progress(pairs: Sequence[EncodedPair], description: str, enabled: bool = True) -> tqdm:
    """A progress bar that counts tokens, for `score_pairs(progress=bar.update)`."""
    total = token_count(pairs)
    return tqdm(total=total, desc=description, unit="tok", unit_scale=True, disable=not enabled, leave=False)

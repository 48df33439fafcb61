"""The `datasets.map` transform: its columns, its model, its fingerprint.

`datasets.map` caches by the pickle of the callable. The pickle of an `IFDScorer` holds the options and a digest of
what the model computes, never the weights: equal models and options hit the cache, changed weights, adapters, settings
or code miss it (see `weights_digest`), and hashing costs one read of the weights in a process. Since the workers
of `num_proc` load the model from that pickle, it holds a local folder's path too, in one spelling of all: a copy of the
folder misses the cache.

For a pool beyond one machine, a Ray cluster scores with one model for each GPU (`pip install ifd_trainer[ray]`):

    rows = ray.data.read_parquet("s3://bucket/pool/")
    scored = rows.map_batches(
        IFDScorer,  # the class: each worker loads the model once; on CPUs leave out num_gpus
        fn_constructor_kwargs={"model": "HuggingFaceTB/SmolLM2-135M", "format": "alpaca"},
        batch_format="pyarrow",  # the only one: all columns stay as they are, and their types
        batch_size=2048,
        num_gpus=1,
        concurrency=16,
    )
    scored.write_parquet("s3://bucket/scored/")
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.formatting.formatting import LazyRow
from datasets.utils import are_progress_bars_disabled
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from ..data.conversation import ConversationEncoder
from ..data.encoding import EncodedPair, Encoder, Segment, check_positive
from ..data.format_choice import FormatOptions, format_record, resolve_format
from ..data.formats import Example, MalformedRow, PromptFormat, rows_of
from ..data.further_segments import with_further
from ..data.image_rows import has_images, stored_images
from ..data.paths import check_model, model_name
from ..data.reversed_rows import GUESS, ReversedRows, request
from ..data.table_reader import Lists, arrow_array
from ..errors import FileAccessError, UserError, one_line
from ..method.calibrated_limit import CalibratedLimit
from ..method.choices import TurnRule, WrongPrompts
from ..method.columns import OWN_COLUMNS, SELECTION_COLUMNS, SELECTIVE_COLUMNS, TOKEN_COLUMNS, TURN_COLUMNS
from ..method.further_scores import SCORED_BY_MODEL, further_names, replaced_columns, turn_column
from ..method.number_words import many
from ..method.pairing_test import PairingTest
from ..method.reasons import Status
from ..method.selective_ifd import SHARE
from ..method.turns import check_turns
from ..method.unfinished import Unfinished
from .calibration import Calibration, Reader, measure, p_values
from .devices import check_device, default_device, default_dtype, device_type, named_dtype
from .engine import check_causal_config, check_causal_lm
from .losses import (
    Scores,
    nll_with_tails,
    position_weighted_embeddings,
    prompt_features,
    score_pairs,
    token_progress,
)
from .neighbourhood import ALPHA, NEIGHBOURS, NeighbourScorer
from .rope_limits import window
from .selective_columns import TOKEN_TYPE, with_numbers
from .token_losses import check_token_losses, score_with_tokens
from .turns import EncodedTurns, answer_counts, encode_turns
from .weights_digest import checkpoint_digest, weights_digest

logger = logging.getLogger(__name__)

# Columns from scores that are no longer there once a row is scored again.
_TURN_TYPES = {
    name: pa.list_({"turn_tokens": pa.int64(), "turn_status": pa.string()}.get(name, pa.float64()))
    for name in TURN_COLUMNS
}
_FURTHER_OF_TURNS = {turn_column(name) for name in SCORED_BY_MODEL}
_SELECTION_TYPES = dict(zip(SELECTION_COLUMNS, (pa.string(), pa.int64(), pa.string()), strict=True))
_SELECTION_TYPES |= dict.fromkeys(TOKEN_COLUMNS, TOKEN_TYPE) | dict.fromkeys(SELECTIVE_COLUMNS, pa.float64())
_ANY_SHARE = 0.5  # what is drawn does not depend on the alpha that it is used for
_RENDERED = 1000  # rows at a time
# Attributes that are made on first use.
_LOADED = ("_model", "_config", "_encoder", "_told", "_conversations", "_counted")
# Attributes of a scorer that is asked for nothing more. It is pickled without them, so that caches of a release that
# did not have them are hit.
_NOTHING_MORE = {"scores": (), "guess": None, "turns": None, "token_losses": False}
_PID = os.getpid()
SCORES_VERSION = 6  # raised when the same weights and options would give other scores


class IFDScorer:
    """Attach IFD columns to a data set: `ds.map(IFDScorer(model), batched=True)`.

    For each row, with the answer's N tokens a_i and the prompt Q (arXiv 2308.12032):

        cas = -1/N * sum_i log P(a_i | Q, a_<i)    das = -1/N * sum_i log P(a_i | header, a_<i)
        ifd = cas / das                            ifd_ppl = exp(cas - das)

    Columns: `cas`, `das` (nats per token), `ifd`, `ifd_ppl` (float64, null unless `ifd_status` is "ok"),
    `answer_tokens` (int64) and `ifd_status` (`Status`). All other columns stay as they are, but what a selection by
    older scores left behind: `ifd_definition` becomes that of these scores, `ifd_rank` and `ifd_reason` null, and so do
    further scores of an older scoring. End-of-turn tokens are not part of the answer.

    `scores` attaches further columns (float64), measured in the same pass; null where a row has no such score, which
    leaves its others as they are. What each means is in `method.further_scores`:

        ira = das - cas        answer_ppl = exp(cas)        direct_ppl = exp(das)
        prompt_ppl = exp(-1/(T-1) * sum_{t > 1} log P(q_t | q_<t))        of the prompt's T tokens q_t
        rifd = rcas / rdas     rcas = s(Q | A, guess)       rdas = s(Q)       see `data.reversed_rows`

    Args:
        model: a hub name, a local path, or a loaded causal LM.
        tokenizer: loaded, or its name or path; needed with a loaded model unless `model.config.name_or_path` leads to
            one.
        format: a `PromptFormat` or its name; detected from the columns by default.
        definition: "paper" (default), "cherry" or "superfiltering": what precedes and bounds the direct answer; see
            `data.encoding`.
        max_length: most tokens of prompt and answer, at most the model's context window; by default that ("cherry":
            512, "superfiltering": 1024, where the window is not smaller).
        min_answer_tokens: rows with fewer answer tokens are `too_short`.
        score_truncated: score the part of a too long answer that fits, as the paper does, instead of `truncated`.
        turns: None to score the last answer of a conversation alone; "tokens", "mean", "min", "max" or "last" to score
            all of its answers, in one forward of the whole, each behind all that stands before it. Of them, `turn_cas`,
            `turn_das`, `turn_ifd`, `turn_tokens` and `turn_status` are lists, and such of further scores (`turn_rifd`);
            the row's own columns follow by that rule; see `method.turns`. "tokens" is the loss that a run on all
            answers trains on. The prompt of an answer, for `prompt_ppl`, is what stands behind the answer before it,
            its question, for `rifd`, what the user says there: an answer to what a tool returned has no `rifd`.
        device: "cuda", "mps" or "cpu" by default, the first there is. With `map(with_rank=True, num_proc=N)` each
            process takes the device of its rank.
        dtype: by default the checkpoint's own on an accelerator (bfloat16 if it says float16 and the device can),
            float32 on a CPU, where bfloat16 is slower.
        token_budget: tokens of a batch; see `scoring.losses.Options`.
        token_losses: attach `cas_tokens` and `das_tokens` too, lists of float32, null without a score: the losses that
            `cas` and `das` are the means of, for `attach_selective_ifd`. The definition "paper" alone has them, and of
            several answers the rule "tokens".
        revision, trust_remote_code: passed to `from_pretrained`; the revision is not that of a named tokenizer.
        scores: names of further scores; those that are always there may be among them.
        guess: the request that `rifd` makes, with `{answer}` where the answer stands.

    Raises:
        ValueError: for a format that cannot be told from the columns, `map` without `batched=True`, or options that
            contradict each other or the model.
        FileNotFoundError: for the path of a folder that is not there.

    >>> from datasets import load_dataset                                                    # doctest: +SKIP
    >>> ds = load_dataset("json", data_files="alpaca.json", split="train")                   # doctest: +SKIP
    >>> ds = ds.map(IFDScorer("HuggingFaceTB/SmolLM2-135M", format="alpaca"), batched=True)  # doctest: +SKIP
    """

    auto_class: ClassVar[Any] = AutoModelForCausalLM  # what loads a model by its name
    more_columns: ClassVar[tuple[str, ...]] = ()  # that are always attached beside the others

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel,
        tokenizer: Any = None,
        *,
        format: str | PromptFormat | FormatOptions | None = None,
        definition: str = "paper",
        max_length: int | None = None,
        min_answer_tokens: int = 1,
        score_truncated: bool = False,
        turns: TurnRule | None = None,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        token_budget: int | None = None,
        token_losses: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        scores: str | Iterable[str] = (),
        guess: str | None = None,
    ) -> None:
        self.scores = further_names(scores)
        self.guess = request(guess, self.scores)
        named = isinstance(model, (str, os.PathLike))
        if not named:
            if not isinstance(model, torch.nn.Module):
                what = f"{type(model).__name__}: {model!r}"
                raise UserError(f"model must be a hub name, a path or a loaded causal LM, got {what}.")
            check_causal_lm(model)
        check_positive(token_budget=token_budget)
        self.name = model_name(model) if named else None
        self.format = format
        self.options = {
            "definition": definition,
            "max_length": max_length,
            "min_answer_tokens": min_answer_tokens,
            "score_truncated": score_truncated,
        }
        Encoder(None, **self.options)  # wrong options are errors here, not after the model has loaded
        check_turns(turns)
        if turns is not None and definition != "paper":
            raise UserError(
                f"turns={turns!r} scores every answer of a conversation, and definition={definition!r} is defined for "
                "one answer: use definition='paper', or leave turns out."
            )
        self.turns = turns
        if token_losses:
            check_token_losses(definition, turns)
        self.token_losses = bool(token_losses)
        self.device, self.dtype, self.token_budget = device, named_dtype(dtype), token_budget
        if device is not None:
            device_type(device)
        self.hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = AutoTokenizer.from_pretrained(model_name(tokenizer), trust_remote_code=trust_remote_code)
        self.tokenizer = tokenizer
        self._model = None if named else model
        self._config: PretrainedConfig | None = None
        self._encoder: Encoder | None = None
        self._told: tuple[tuple[str, ...], PromptFormat] | None = None
        self._conversations: ConversationEncoder | None = None
        self._counted: bool | None = None  # whether answers that are not scored were counted

    def __call__(
        self, batch: Mapping[str, list] | pa.Table, rank: int | None = None, *more: Any
    ) -> dict[str, list] | pa.Table:
        """Columns for a batch of rows, as `datasets.map(batched=True)` passes and takes them.

        An Arrow table, as Ray passes it with `batch_format="pyarrow"`, comes back whole, with the columns at its end.
        """
        if isinstance(batch, pa.Table):
            return self._table(batch, rank)
        need_batch("IFDScorer", batch, rank, *more)
        rows = self.encode_rows(batch, rank)
        with token_progress(rows.pairs, "Scoring a batch", shows_progress()) as bar:
            columns = mapped_columns(self.score_rows(rows, bar.update))
        return self.outdated(batch) | columns

    def outdated(self, batch: Mapping[str, list]) -> dict[str, list]:
        """Columns of older scores, for rows that are scored anew: `map` can replace a column, not drop it."""
        rows = len(next(iter(batch.values()), []))
        values = {"ifd_definition": self.options["definition"]}
        outdated = _SELECTION_TYPES | (_TURN_TYPES if self.turns is None else {})
        outdated |= {
            name: pa.list_(pa.float64()) if name in _FURTHER_OF_TURNS else pa.float64()
            for name in replaced_columns(batch, self.further_columns)
        }
        return {
            name: TypedColumn(np.full(rows, values.get(name), dtype=object), kind)
            for name, kind in outdated.items()
            if name in batch
        }

    def _table(self, table: pa.Table, rank: int | None) -> pa.Table:
        # Ray tells a schema by an empty block.
        rows = self.encode_rows(table.to_pydict(), rank) if table.num_rows else EncodedTurns([], [], [])
        stale = [*OWN_COLUMNS, *self.more_columns, *replaced_columns(table.column_names, self.further_columns)]
        return table_with(table, self.score_rows(rows), stale)

    def encode_rows(self, batch: Mapping[str, list], rank: int | None = None) -> EncodedTurns:
        """Render and tokenise a batch, with `turns` every answer of it; loads the model on first use."""
        self._need_text(batch)
        self._load(rank)
        self._say_what_is_left_out(batch)
        rows, problem = self._read(batch, self._format(batch))
        if problem is not None:  # no error: the last rows of a long job may be like that
            logger.warning(problem)
        return rows

    def _say_what_is_left_out(self, batch: Mapping[str, list]) -> None:
        """Say once, of the first rows, how many have answers that are not scored."""
        if self.turns is not None or self._counted:
            return
        self._counted = True
        counts = self._answer_counts(batch)
        if several := sum(count > 1 for count in counts):
            logger.warning(
                "%s of the first %s have several answers, and the last one alone is scored. turns='tokens' scores all "
                "of them, as a run trains on them; turns='last' says that the last one is meant.",
                many(several, "row"),
                many(len(counts), "row"),
            )

    def _answer_counts(self, batch: Mapping[str, list]) -> list[int]:
        """How many answers each row has."""
        return answer_counts(batch, self._format(batch), self._encoder.tokenizer)

    def score_rows(
        self, rows: EncodedTurns, progress: Callable[[int], Any] | None = None
    ) -> dict[str, np.ndarray | Lists | pa.Array]:
        """Columns of encoded rows; `progress` is called with the number of tokens done after each batch."""
        if not self.token_losses:
            return self._columns(rows, self.score(rows.pairs, progress))
        options = {"token_budget": self.token_budget, "progress": progress}
        scores, tokens = score_with_tokens(self._model, rows.pairs, self.scores, **options)
        return self._columns(rows, scores) | tokens.of_rows(rows.counts).columns()

    def _columns(self, rows: EncodedTurns, scores: Scores) -> dict[str, np.ndarray | Lists | pa.Array]:
        return scores.columns() if self.turns is None else rows.columns(scores, self.turns, self.scores)

    def encode(self, batch: Mapping[str, list], rank: int | None = None) -> list[EncodedPair]:
        """Render and tokenise the last answers of a batch; loads the model on first use."""
        self._need_text(batch)
        self._load(rank)
        pairs, problem = self._encoded(batch, self._format(batch))
        if problem is not None:
            logger.warning(problem)
        return pairs

    def _read(self, batch: Mapping[str, list], format: PromptFormat) -> tuple[EncodedTurns, str | None]:
        """Encoded rows, with `turns` every answer of them, and what is wrong if none of them could be rendered."""
        if self.turns is None:
            pairs, problem = self._encoded(batch, format)
            return EncodedTurns.single(pairs), problem
        self._conversations = self._conversations or ConversationEncoder(self._encoder)
        rows, error = encode_turns(
            batch, format, self._encoder, self._conversations, self.scores, self._reversed_rows()
        )
        return rows, self._problem(rows.pairs, rows.empty, error, format)

    def _need_text(self, batch: Mapping[str, list]) -> None:
        """Raise for rows with images, which this scorer would leave out without a word."""
        held = [name for name, cells in stored_images(batch).items() if has_images(cells)]
        if held:
            raise UserError(
                "The rows have images, and IFDScorer reads text alone: answers would be scored without what they are "
                "about. Use ImageIFDScorer with a model that reads images; to score the texts alone, remove the column "
                f"first: dataset.remove_columns({held!r})."
            )

    def _encoded(self, batch: Mapping[str, list], format: PromptFormat) -> tuple[list[EncodedPair], str | None]:
        """The last answers of rows, encoded, and what is wrong if none of them could be rendered."""
        examples, error = _render(batch, format, self._encoder.tokenizer)
        reversed_rows = self._reversed_rows()
        columns = {name: batch[name] for name in batch} if self.scores else {}
        pairs = with_further(
            self._encoder(examples),
            self.scores,
            self._encoder,
            lambda row: reversed_rows.of_row({name: values[row] for name, values in columns.items()}, format),
        )
        return pairs, self._problem(pairs, [pair.status.value for pair in pairs], error, format)

    def _reversed_rows(self) -> ReversedRows:
        return ReversedRows(self._encoder.tokenizer, self.guess or GUESS)

    def _problem(
        self, pairs: list[EncodedPair], statuses: Sequence[str], error: Exception | None, format: PromptFormat
    ) -> str | None:
        """What is wrong with rows of which none could be rendered; raises for tokens that the model does not have."""
        segments = (segment for pair in pairs if pair.conditioned for segment in (pair.conditioned, pair.direct))
        self.check_tokens(segment.ids for segment in segments)
        if error is None or any(status != Status.MALFORMED.value for status in statuses):
            return None
        return (
            f"None of {many(len(statuses), 'row')} can be rendered as {format.name!r}; the first one: {error}. Check "
            "the columns, or pass another format."
        )

    def check_tokens(self, texts: Iterable[Sequence[int]]) -> None:
        """Raise UserError for token ids that the model does not have; needs no weights."""
        self._prepare()
        known = getattr(self._config.get_text_config(), "vocab_size", None)
        most = max((max(ids) for ids in texts if ids), default=0)
        if isinstance(known, int) and most >= known:
            raise UserError(
                f"The tokenizer gives token {most}, and the model has {known} tokens: they do not belong together. Use "
                "the model's own tokenizer, or resize its embeddings."
            )

    def check(self, batch: Mapping[str, list]) -> None:
        """Raise now what scoring such rows would raise once the weights are loaded, from the tokenizer and the config.

        A device that is not there, columns that the format does not find, a format that the definition or the tokenizer
        does not go with, rows of which none can be rendered, tokens that the model does not have, a max_length above
        its window.
        """
        if self.device is not None:
            check_device(self.device)
        self._need_text(batch)
        format = self._format(batch)
        self._prepare()
        _, problem = self._read(batch, format)
        if problem is not None:
            raise UserError(problem)

    def settings(self, columns: Iterable[str]) -> dict[str, str | int | bool | None]:
        """The options in force for rows with these columns, the format as its record; None for what loading decides."""
        self._prepare()
        further = {"scores": " ".join(self.scores), "guess": self.guess} if self.scores else {}
        return self.options | {
            "max_length": self._encoder.max_length,
            "format": format_record(self._format(columns)),
            "device": None if self.device is None else device_type(self.device),
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "token_budget": self.token_budget,
            "turns": self.turns,
            **({"token_losses": True} if self.token_losses else {}),
            **further,
        }

    def digest(self) -> str:
        """What tells the weights from others: a digest, the same for every copy of a folder; a hub name's commit."""
        if self.name is not None:
            return checkpoint_digest(self.name, **self.hub)
        return weights_digest(self._model) if self._model is not None else self._weights

    def _format(self, columns: Iterable[str]) -> PromptFormat:
        columns = tuple(columns)
        if self._told is None or self._told[0] != columns:  # once for all batches, with its warning
            bare = self.options["definition"] == "superfiltering"
            self._told = columns, resolve_format(self.format, columns, bare)
        return self._told[1]

    def score(self, pairs: list[EncodedPair], progress: Callable[[int], Any] | None = None) -> Scores:
        """Scores of encoded rows; `progress` is called with the number of tokens done after each batch."""
        return score_pairs(self._model, pairs, further=self.scores, token_budget=self.token_budget, progress=progress)

    def nll_with_tails(
        self, segments: list[Segment], progress: Callable[[int], Any] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses of segments of encoded rows; see `scoring.losses.nll_with_tails`."""
        return nll_with_tails(self._model, segments, token_budget=self.token_budget, progress=progress)

    def calibrate(
        self, rows: Dataset, pairs: int = 256, cuts: int = 128, seed: int = 0, prompts: WrongPrompts = "random"
    ) -> Calibration:
        """Measure what noise scores in a data set: of what a limit with an error rate is made.

        `wrong` holds the scores of answers under the prompts of other rows, `cut` the end-of-turn loss, in nats, behind
        answers that were cut off at random: what `CalibratedLimit` and `Unfinished` take, as in a training run. Which
        rows those are depends on the seed and on the row ids (a column `row_id` or `id`, else positions) alone. The
        definitions `cherry` and `superfiltering` have no end-of-turn loss, and `cut` is empty.

        Args:
            rows: the data set with the columns that this scorer attached.
            pairs: answers to score under a wrong prompt; fewer where there are no more with a score.
            cuts: answers to cut.
            seed: of the draws.
            prompts: "random" ones of other rows, or "near" ones, those most like the row's own.

        Raises:
            UserError: for rows without scores, or with those of a scorer that reads them otherwise.

        >>> ds = ds.map(scorer, batched=True)                                                    # doctest: +SKIP
        >>> calibration = scorer.calibrate(ds)                                                   # doctest: +SKIP
        >>> limit = CalibratedLimit(alpha=0.05).limit(calibration.wrong.ifd)                     # doctest: +SKIP
        >>> threshold = Unfinished().threshold(np.array(ds["eot_loss"], float), calibration.cut) # doctest: +SKIP
        """
        check_positive(pairs=pairs, cuts=cuts)
        limit, unfinished = CalibratedLimit(_ANY_SHARE, pairs, prompts), Unfinished(_ANY_SHARE, cuts)
        return measure(**self._reading(rows, "calibrate"), limit=limit, unfinished=unfinished, seed=seed)

    def pairing_p_values(
        self,
        rows: Dataset,
        which: Sequence[int] | np.ndarray | None = None,
        test: PairingTest | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Test whether answers belong to their prompts: (n,) p-values, NaN for rows that were not tested.

        An answer passes with p <= alpha, `test.passes(p)`: no more than a share alpha of mismatched rows does. The test
        takes K forwards of a row, so test the rows that would be kept. What anchors a row has depends on the seed and
        on the ids of the tested rows.

        Args:
            rows: the data set with the columns that this scorer attached.
            which: positions of the rows to test; all by default. Those without a score are not tested.
            test: how they are; by default against 9 random prompts, with alpha 0.1.
            seed: of the draw of anchors.

        Raises:
            UserError: for rows without scores, or with those of a scorer that reads them otherwise; for a mask.

        >>> ds = ds.map(scorer, batched=True)                                                    # doctest: +SKIP
        >>> belongs = PairingTest().passes(scorer.pairing_p_values(ds))                          # doctest: +SKIP
        >>> ds = ds.select(np.flatnonzero(belongs))                                              # doctest: +SKIP
        """
        reading = self._reading(rows, "pairing_p_values")
        which = None if which is None else np.asarray(which)
        if which is not None and which.size and which.dtype.kind not in "iu":
            raise UserError(
                f"which are positions of rows, whole numbers, got values of type {which.dtype}. Of a mask, they are "
                "np.flatnonzero(mask)."
            )
        which = None if which is None else which.astype(np.int64)
        return p_values(**reading, which=which, test=test or PairingTest(), seed=seed)

    def check_single(self, caller: str) -> None:
        """Raise a UserError where a row's score is of several answers, and what is to be measured of one."""
        if self.turns not in (None, "last"):
            raise UserError(
                f"{caller} measures what a single wrong or cut answer scores, and with turns={self.turns!r} a row's "
                "score is of several. Score with turns='last', or without turns."
            )

    def neighbourhood(
        self,
        rows: Dataset,
        share: float = SHARE,
        neighbours: int = NEIGHBOURS,
        alpha: float = ALPHA,
        seed: int = 0,
    ) -> Dataset:
        """The data set with `sifd_mean` and `sifd_std`: how much of a row's S-IFD stays when the row is disturbed.

        Mean and standard deviation of S-IFD (see `attach_selective_ifd`) over neighbours of each row, whose embeddings
        have noise added, uniform in [-1, 1) times alpha / sqrt(L d) for L tokens of d dimensions (T-SHIRT, arXiv
        2506.01317); float64, null where S-IFD is. `Hierarchical` selects by them. The tokens that count are those of
        the row as it is, so that alpha=0 gives S-IFD itself and 0. It takes 2 forwards for each neighbour of a row.

        Args:
            rows: the data set with the columns that this scorer attached, with token_losses=True.
            share: of all tokens, in (0, 1].
            neighbours: how many of each row.
            alpha: the size of the noise.
            seed: of the noise, which depends on it, the row's tokens and the number of the neighbour alone.

        Raises:
            UserError: for rows without losses of tokens, or with those of a scorer that reads them otherwise; for a
                model whose embeddings cannot be disturbed.

        >>> ds = ds.map(IFDScorer("HuggingFaceTB/SmolLM2-135M", token_losses=True), batched=True)  # doctest: +SKIP
        >>> ds = scorer.neighbourhood(ds)                                                          # doctest: +SKIP
        """
        values = as_dataset(rows, "neighbourhood")
        neighbourhood = NeighbourScorer(self, values, share, neighbours, alpha, seed)
        return with_numbers(rows, neighbourhood.columns(values, not are_progress_bars_disabled()))

    def _reading(self, rows: Dataset, caller: str) -> dict[str, Any]:
        """How measuring functions read rows and run the model."""
        self.check_single(caller)
        rows = as_dataset(rows, caller)
        format = self._format(rows.column_names)
        self._prepare()

        def encode(positions: np.ndarray) -> list[EncodedPair]:
            return self.encode(rows[positions.tolist()])

        def texts() -> Iterator[str]:
            for start in range(0, len(rows), _RENDERED):
                examples, _ = _render(rows[start : start + _RENDERED], format, self._encoder.tokenizer)
                yield from ("" if example is None else example.prompt for example in examples)

        reader = Reader(encode, self.score, self.nll_with_tails, self._encoder.max_length)
        return {"reader": reader, "rows": rows, "prompts": texts, "show": not are_progress_bars_disabled()}

    def embed(
        self, texts: Sequence[str], progress: Callable[[int], Any] | None = None, by_position: bool = False
    ) -> np.ndarray:
        """Mean of the last hidden states of each text, (n, H) float32, NaN for an empty one; see `prompt_features`.

        Texts longer than the model's window are cut at their end. `by_position`: with weights that grow with a token's
        position, as `position_weighted_embeddings`.
        """
        self._load(None)
        most = self._encoder.window
        ids = self._encoder.tokenizer(list(texts), truncation=most is not None, max_length=most, verbose=False)
        running = {"token_budget": self.token_budget, "progress": progress}
        if by_position:
            return position_weighted_embeddings(self._model, ids["input_ids"], **running)
        return prompt_features(self._model, ids["input_ids"], **running)[0]

    @property
    def further_columns(self) -> tuple[str, ...]:
        """Names of the columns of further scores, with `turns` those of lists among them."""
        return self.scores if self.turns is None else (*self.scores, *map(turn_column, self.scores))

    @property
    def model(self) -> PreTrainedModel:
        """The model that scores, loaded on first use."""
        return self.load()

    @property
    def encoder(self) -> Encoder:
        """How rows become tokens, with the tokenizer and the model's window; needs no weights."""
        self._prepare()
        return self._encoder

    def examples(self, batch: Mapping[str, list]) -> list[Example | None]:
        """The rows of a batch in their format, None for those that it cannot render; needs no weights."""
        return _render(batch, self._format(batch), self.encoder.tokenizer)[0]

    def load(self, rank: int | None = None) -> PreTrainedModel:
        """The model that scores, loaded on first use, on the device of this rank."""
        self._load(rank)
        return self._model

    def rows_format(self, columns: Iterable[str]) -> PromptFormat:
        """The format of rows with these columns."""
        return self._format(columns)

    def _prepare(self) -> None:
        """Load what is small and tells most mistakes: config and tokenizer."""
        if self._encoder is not None:
            return
        if self._model is None and self.name is None:
            raise UserError(
                "This IFDScorer was sent to another process, and a loaded model does not travel. Pass a name or a "
                "path instead of a loaded model to use num_proc."
            )
        if self._model is not None:
            self._config = self._model.config
        else:
            check_model(self.name)
            revision = self.hub["revision"]  # the error's own message may name neither it nor the model
            with _reading(f"{self.name}{f' at {revision}' if revision else ''} cannot be read"):
                self._config = AutoConfig.from_pretrained(self.name, **self.hub)
            self._check_config(self._config)
        self._encoder = Encoder(self._tokenizer(), **self.options, window=window(self._config.get_text_config()))

    def _check_config(self, config: PretrainedConfig) -> None:
        """Raise for the config of a model that is no causal language model."""
        check_causal_config(self.name, config)

    def _tokenizer(self) -> Any:
        """The tokenizer, read by the model's name where none was given."""
        if self.tokenizer is not None:
            return self.tokenizer
        source = self.name or self._config.name_or_path
        if not source:
            raise UserError("Pass the tokenizer too: the loaded model does not say where it came from.")
        with _reading(f"{source} has no tokenizer that can be read"):
            return AutoTokenizer.from_pretrained(source, **self.hub)

    def _load(self, rank: int | None) -> None:
        self._prepare()
        if self._model is not None:
            return
        device = self.device or default_device(rank)
        check_device(device)
        if os.getpid() != _PID and torch.device(device).type == "cpu":
            # A forked worker waits forever for OpenMP threads that its parent had and a fork does not copy.
            torch.set_num_threads(1)
        options = self.hub | {"dtype": self.dtype or default_dtype(self._config, device), "output_loading_info": True}
        try:
            with _reading(f"The weights in {self.name} cannot be loaded"):
                model, loading = self.auto_class.from_pretrained(self.name, **options)
        except SafetensorError as error:
            raise UserError(
                f"The weights in {self.name} cannot be read ({error}): a file is damaged or was cut short. Download or "
                "copy it again."
            ) from error
        check_causal_lm(model)
        if missing := sorted(loading["missing_keys"]):
            raise UserError(
                f"{self.name} lacks {len(missing)} of the weights of a {type(model).__name__} ({', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}), so they would be random: it holds another kind of model, or "
                "one without its language model head. Score with a checkpoint of a causal language model."
            )
        self._model = model.to(device)

    def __getstate__(self) -> dict[str, Any]:
        # What is pickled is what identifies the scores: options and a digest of the weights. Nothing that is loaded
        # on use belongs here, or a second `map` with the same scorer would miss the cache of the first.
        state = {key: value for key, value in vars(self).items() if key not in _LOADED}
        state = {key: value for key, value in state.items() if value != _NOTHING_MORE.get(key, ...)}
        return state | {"_weights": self.digest(), "_version": SCORES_VERSION}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**_NOTHING_MORE, **state}, **dict.fromkeys(_LOADED))

    def __repr__(self) -> str:
        model, scores = self.name or type(self._model).__name__, f", scores={self.scores!r}" if self.scores else ""
        return f"IFDScorer({model!r}, format={self.format!r}, definition={self.options['definition']!r}{scores})"


def as_dataset(rows: Dataset, caller: str) -> Dataset:
    """The rows as Python values; raises UserError for what is no `datasets.Dataset`."""
    if not isinstance(rows, Dataset):
        raise UserError(
            f"{caller} reads rows of a datasets.Dataset, got a {type(rows).__name__}: pass one split of it, or load "
            "what is streamed."
        )
    return rows.with_format(None)


def need_batch(name: str, batch: Mapping[str, list], rank: int | None, *more: Any) -> None:
    """Raise UserError for what `datasets.map(batched=True)` does not pass to a transform of this name."""
    if more or isinstance(batch, (list, str)) or isinstance(rank, (list, str)):
        raise UserError(
            f"{name} reads the columns of its format itself: call `dataset.map(scorer, batched=True)` without "
            "input_columns and with_indices."
        )
    if not isinstance(batch, Mapping):
        raise UserError(
            f"{name} takes Python values or an Arrow table, got a {type(batch).__name__}: call it on "
            '`dataset.with_format(None)`, or in Ray with `map_batches(..., batch_format="pyarrow")`.'
        )
    if _in_ray():  # what comes back there takes the place of the rows, and is not added to them
        raise UserError(
            f"{name} got a dictionary of arrays. In Ray pass an Arrow table, whose columns all stay: "
            f'`map_batches({name}, batch_format="pyarrow", ...)`.'
        )
    if isinstance(batch, LazyRow) or any(isinstance(value, str) for value in batch.values()):
        raise UserError(f"{name} scores batches: call `dataset.map(scorer, batched=True)`.")


def shows_progress() -> bool:
    """Whether a transform shows how far it is with a batch.

    `map` shows a batch once it is done, which on a CPU takes minutes; its workers would write over each other.
    """
    return os.getpid() == _PID and not are_progress_bars_disabled()


def mapped_columns(columns: Mapping[str, np.ndarray | Lists | pa.Array]) -> dict[str, list]:
    """Columns as `datasets.map` takes them, of their types also where all values are null; None for NaN."""
    return {name: TypedColumn(values) for name, values in columns.items()}


def table_with(
    table: pa.Table, columns: Mapping[str, np.ndarray | Lists | pa.Array], replaced: Iterable[str]
) -> pa.Table:
    """A table with columns at its end, without those that they replace."""
    table = table.drop_columns([name for name in replaced if name in table.column_names])
    for name, values in columns.items():
        table = table.append_column(name, arrow_array(values))
    return table


@contextmanager
def _reading(problem: str) -> Iterator[None]:
    """What transformers raises for files and names that it cannot read, told in a sentence that begins so."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise FileAccessError(f"{problem}: {one_line(error)}") from error


def _in_ray() -> bool:
    """Whether this is a worker of a Ray cluster."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    return context.get_actor_id() is not None or context.get_task_id() is not None


class TypedColumn(list):
    """Values of a column, None for NaN, with their Arrow type: a batch of nulls does not tell `datasets` its type."""

    def __init__(self, values: np.ndarray | Lists | pa.Array, type: pa.DataType | None = None) -> None:
        array = pa.array(values, type) if type is not None else arrow_array(values)
        super().__init__(array.to_pylist())
        self.type = array.type

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        return pa.array(list(self), type or self.type)


def _render(
    batch: Mapping[str, list], format: PromptFormat, tokenizer: Any
) -> tuple[list[Example | None], Exception | None]:
    """Examples, None where a row is malformed, and the first error."""
    examples, first = [], None
    for row in rows_of(batch):
        try:
            examples.append(format.render(row, tokenizer))
        except MalformedRow as error:
            first = first or error
            examples.append(None)
    return examples, first

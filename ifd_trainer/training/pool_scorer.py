"""All rows of a trainer's pool through a model: their scores, and how the model sees their prompts.

Each process runs a share of the rows and gets the values of all of them (see `scoring.processes`). With sharded weights
they run the same number of forwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer

from ..data.encoding import EncodedPair, Encoder, Segment, token_count
from ..data.formats import Example
from ..data.further_segments import with_further
from ..data.reversed_rows import GUESS, ReversedRows, request
from ..data.similar_prompts import SimilarPrompts
from ..data.token_rows import TokenRows
from ..errors import NotInstalledError, UserError
from ..method.choices import TurnRule
from ..method.columns import EOT_LOSS, IFD_COLUMNS, SCORES
from ..method.equations import FROM_LOSSES
from ..method.further_scores import FURTHER, SCORED_BY_MODEL
from ..method.reasons import Status
from ..method.target_set import cosines
from ..method.turns import last_scores
from ..scoring.calibration import Reader, wrong_scores
from ..scoring.losses import (
    Scores,
    answer_tokens,
    nll_with_tails,
    position_weighted_embeddings,
    prompt_features,
    score_pairs,
    statuses,
)
from ..scoring.model_parts import text_config
from ..scoring.processes import run_shares
from ..scoring.rope_limits import window
from ..scoring.transform import IFDScorer
from ..scoring.turns import EncodedTurns
from .pool import Pool
from .trainer_hooks import scoring_model, template_of

_CHUNK = 8192  # pool rows encoded and scored at a time, on each process
_TEXTS = 1000  # pool rows decoded at a time


class PoolScorer:
    """Runs the rows of a pool through the trainer's model as it is, or through another one.

    Args:
        trainer: the model, its device and its processes.
        encoder: for the trainer's tokenizer.
        other: None for the trainer's own model; the name, the path or the instance of another model, which reads the
            pool's texts with its own tokenizer; or "columns" for scores that the training set already has.
        embedder: what embeds prompts for a diverse selection: by default the model that scores (with "columns" the
            trainer's), an `IFDScorer`, or the name of a sentence-transformers model.
        token_budget: tokens of a batch.
        further: names of further scores; see `method.further_scores`.
        guess: the request that `rifd` makes.
        rule: how the scores of a row's answers become one; see `method.turns`.
    """

    def __init__(
        self,
        trainer: Trainer,
        encoder: Encoder,
        other: str | PreTrainedModel | None = None,
        embedder: str | IFDScorer | None = None,
        token_budget: int | None = None,
        further: Sequence[str] = (),
        guess: str | None = None,
        rule: TurnRule = "tokens",
    ) -> None:
        self.trainer, self.encoder, self.other, self.token_budget = trainer, encoder, other, token_budget
        self.further = tuple(name for name in further if name in SCORED_BY_MODEL)
        self.guess = request(guess, self.further)
        self.embedder, self.rule = embedder, rule
        self._similar: tuple[Pool, SimilarPrompts] | None = None
        self._answer_texts: tuple[Pool, np.ndarray] | None = None
        self._others: dict[str, IFDScorer] = {}
        self.rank, self.world_size = trainer.accelerator.process_index, trainer.accelerator.num_processes

    @property
    def name(self) -> str | None:
        """What scores, where it is not the trainer's model."""
        if self.other is None or isinstance(self.other, str):
            return self.other
        return self.other.config.name_or_path or type(self.other).__name__

    @property
    def turns(self) -> TurnRule | None:
        """How the scores of a row's answers become one; None where the last answer of each row is scored alone."""
        several = self.rule != "last" and self.other != "columns" and not self.pool.whole
        return self.rule if several and (self.pool.answer_counts() > 1).any() else None

    def scores(
        self, prefix: Sequence[int], description: str = "IFD", rows: np.ndarray | None = None, own: bool = False
    ) -> Scores:
        """Scores of all rows, or of some, with the tokens `prefix` before a direct answer.

        `own`: by the trainer's model, whatever else scores.
        """
        if self.other == "columns" and not own:
            return _stored_scores(self.pool.examples, rows, self.further)
        rows = np.arange(len(self.pool)) if rows is None else rows
        reader = self._own_reader(prefix) if own else self._reader(prefix)
        starts, ends = self.pool.spans(rows).T
        answers = self.pool.answer_counts()[rows] if self.turns else 1
        tokens = self.pool.lengths(rows) + answers * (ends - starts)  # of all segments of a row, about

        def run(part: np.ndarray) -> dict[str, np.ndarray]:
            answers = self._answers(rows[part], prefix, own)
            with self._progress(token_count(answers.pairs), description) as bar:
                return self._of_rows(reader.score(answers.pairs, bar.update), answers)

        columns = self._run_shares(tokens, run)
        if self.pool.whole:  # both losses are that of the whole text
            of_prompts = [name for name in self.further if FURTHER[name].of != ("das",)]
            columns |= dict.fromkeys(("cas", *FROM_LOSSES, *of_prompts), np.full(len(rows), np.nan))
        return Scores.of(columns)

    def _answers(self, rows: np.ndarray, prefix: Sequence[int], own: bool = False) -> EncodedTurns:
        """All answers of rows that are scored, encoded with what further scores read."""
        own = own or self.other is None
        encode = self._own_pairs if own else self._other_pairs
        spans, counts = self.pool.spans(rows), np.ones(len(rows), dtype=np.int64)
        if self.turns is not None:
            spans, counts = self.pool.all_spans(rows)
        pairs = encode(np.repeat(rows, counts), spans, prefix)
        if own:  # another model's scorer reads what further scores need by itself
            pairs = self._with_further(pairs, np.repeat(rows, counts), spans, counts)
        last = np.cumsum(counts) - 1
        return EncodedTurns(pairs, counts.tolist(), [pairs[i].status.value for i in last.tolist()])

    def _of_rows(self, scores: Scores, answers: EncodedTurns) -> dict[str, np.ndarray]:
        """Columns of rows from the scores of their answers."""
        if self.turns is None:
            return scores.columns()
        of_last = last_scores(scores.columns(), answers.counts)
        return answers.of_rows(scores, self.turns, self.further) | of_last

    def _with_further(
        self, pairs: list[EncodedPair], rows: np.ndarray, spans: np.ndarray, counts: np.ndarray
    ) -> list[EncodedPair]:
        """Encoded answers (m, 2) of rows (m,), of the trainer's model, with what further scores read."""
        if not self.further or self.pool.whole:
            return pairs
        tokens = list(self.pool.tokens(rows))
        reversed_rows = ReversedRows(self.encoder.tokenizer, self.guess or GUESS, template_of(self.trainer))
        first = np.repeat(np.cumsum(counts) - counts, counts)  # of each answer, its row's first

        def turned(place: int) -> Example | None:
            ids, _ = tokens[place]
            start, end = self._read.span(ids, *spans[place].tolist())
            if place == first[place]:
                return reversed_rows.of_tokens(ids[:start], ids[start:end])
            before = self._read.span(ids, *spans[place - 1].tolist())[1]
            return reversed_rows.of_later_tokens(ids[before:start], ids[start:end])

        # The trainer cut rows to its max_length, and not rows turned round: they may be as long as the model can read.
        encoder = replace(self.encoder, max_length=None, window=window(text_config(self.trainer.model)))
        return with_further(pairs, self.further, encoder, turned, counts)

    def not_run(self, prefix: Sequence[int]) -> Scores:
        """Statuses and answer lengths of all rows, without a forward: all that a policy needs that reads no score."""

        def read(part: np.ndarray) -> dict[str, np.ndarray]:
            answers = self._answers(part, prefix, own=True)
            blank = Scores.not_run(answer_tokens(answers.pairs), statuses(answers.pairs))
            found = answers.of_rows(blank, "tokens" if self.turns else "last")
            return {"tokens": found["answer_tokens"], "status": found["ifd_status"]}

        rows = self._run_shares(self.pool.lengths(np.arange(len(self.pool))), read)
        return Scores.not_run(**rows, further=self.further)

    def mismatched_scores(
        self,
        candidates: np.ndarray,
        wanted: int,
        prefix: Sequence[int],
        das: np.ndarray,
        description: str = "Wrong prompts",
    ) -> Scores:
        """Scores of answers of some rows under the prompts of others.

        Args:
            candidates: (m, 2) positions, answer of and prompt of. A pair that is too long, or whose answers or prompts
                are equal, is passed over.
            wanted: how many of the others are scored; fewer if there are no more.
            prefix: tokens before a direct answer.
            das: (n,) direct scores of all rows, by the model as it is.
        """
        reader = self._reader(prefix)
        pairs = reader.wrong_pairs(candidates, wanted)  # each process reads all: a few hundred rows

        def run(part: np.ndarray) -> dict[str, np.ndarray]:
            return {"cas": self._losses(reader, [pairs[i][1] for i in part], description)[0]}

        sizes = np.array([len(segment.ids) for _, segment in pairs])
        return wrong_scores(pairs, self._run_shares(sizes, run)["cas"], das)

    def cut_losses(
        self, rows: np.ndarray, left: np.ndarray, prefix: Sequence[int], description: str = "Cut answers"
    ) -> np.ndarray:
        """Losses (m,) of the end of turn behind answers of which only `left` tokens (m,) are left, in nats."""
        reader = self._reader(prefix)

        def run(part: np.ndarray) -> dict[str, np.ndarray]:
            return {"loss": self._losses(reader, reader.cut_answers(rows[part], left[part]), description)[1]}

        return self._run_shares(self.pool.lengths(rows), run)["loss"]

    def paired_losses(
        self,
        rows: np.ndarray,
        anchors: np.ndarray,
        wanted: int,
        tokens: int,
        prefix: Sequence[int],
        description: str = "Pairing test",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean losses of the first tokens of answers under their own prompts, (m,), and under others, (m, wanted).

        Args:
            rows: (m,) positions.
            anchors: (m, C) positions of rows whose prompts are tried; see `mismatched_scores` for what is passed over.
            wanted: how many of them are scored; NaN stands for those that are missing.
            tokens: of each answer.
        """
        reader = self._reader(prefix)

        def losses(segments: list[Segment]) -> np.ndarray:
            return self._losses(reader, segments, description)[0]

        def run(part: np.ndarray) -> dict[str, np.ndarray]:
            return {"losses": reader.paired_losses(rows[part], anchors[part], wanted, tokens, losses)}

        table = self._run_shares(self.pool.lengths(rows), run)["losses"]
        return table[:, 0], table[:, 1:]

    def nearest_prompts(self, rows: np.ndarray, k: int, among: np.ndarray | None = None) -> np.ndarray:
        """Positions (m, k) of the rows with the prompts most like those of `rows`; see `SimilarPrompts`."""
        if self._similar is None or self._similar[0] is not self.pool:
            self._similar = self.pool, SimilarPrompts(prompt for prompt, _ in self.texts())
        return self._similar[1].nearest(rows, k, among)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Prompt and answer of each row, as text, without special tokens and what a template adds to the answer."""
        for start in range(0, len(self.pool), _TEXTS):
            rows = np.arange(start, min(start + _TEXTS, len(self.pool)))
            prompts, answers, _ = self._texts(rows, self.pool.spans(rows))
            yield from zip(prompts, answers, strict=True)

    def answer_texts(self) -> np.ndarray:
        """The last answer of each row, as text, (n,)."""
        if self._answer_texts is None or self._answer_texts[0] is not self.pool:
            texts = np.empty(len(self.pool), dtype=object)
            texts[:] = [answer for _, answer in self.texts()]
            self._answer_texts = self.pool, texts
        return self._answer_texts[1]

    def features(self, rows: np.ndarray | None = None, description: str = "Prompts") -> tuple[np.ndarray, np.ndarray]:
        """Prompt embeddings (m, H) and perplexities (m,) of the rows, of all by default; see `prompt_features`."""
        rows = np.arange(len(self.pool)) if rows is None else rows
        starts, ends = self.pool.spans(rows).T

        def run(part: np.ndarray) -> dict[str, np.ndarray]:
            tokens = self.pool.tokens(rows[part])
            prompts = [list(ids[:start]) for (ids, _), start in zip(tokens, starts[part], strict=True)]
            with self._progress(sum(map(len, prompts)), description) as bar:
                embeddings, perplexity = prompt_features(prompts=prompts, progress=bar.update, **self._running())
            return {"embeddings": embeddings, "perplexity": perplexity}

        columns = self._run_shares(starts, run)
        columns["perplexity"][starts == ends] = np.nan  # no answer: a row that no training can use
        return columns["embeddings"], columns["perplexity"]

    def embeddings(self, rows: np.ndarray, description: str = "Embeddings") -> np.ndarray:
        """Embeddings of the rows' prompts, (m, d) float32, by which a diverse selection tells rows apart.

        Raises:
            ImportError: for a sentence-transformers model where that package is not installed.
        """
        embedder = self.embedder
        if embedder is None and self.other in (None, "columns"):
            return self.features(rows, description)[0]
        if embedder is None:
            embedder = self._other_scorer("")
        elif isinstance(embedder, str):
            embedder = _sentence_transformer(embedder, str(self.trainer.args.device))

        def run(part: np.ndarray) -> dict[str, np.ndarray]:
            prompts = self._texts(rows[part], self.pool.spans(rows[part]))[0]
            with self._progress(len(prompts), description) as bar:
                embeddings = embedder.embed(prompts) if isinstance(embedder, IFDScorer) else embedder(prompts)
                bar.update(len(prompts))
            return {"embeddings": embeddings}

        return self._run_shares(self.pool.spans(rows)[:, 0], run)["embeddings"]

    def similarities(
        self, targets: Sequence[Sequence[int]], rows: np.ndarray, description: str = "Likeness to targets"
    ) -> np.ndarray:
        """Cosines of the rows, prompt and answer, with m targets given as token ids: see `method.target_set`.

        Both are embedded by the model that scores (with "columns" the trainer's, unless an `IFDScorer` embeds), by
        their mean states with weights that grow with the position.

        Returns:
            (n, m) float32; NaN for a row that cannot be scored.
        """
        embedded = self._position_weighted(targets, description)  # by each process: a few hundred rows

        def run(part: np.ndarray) -> dict[str, np.ndarray]:
            pairs = self._own_pairs(rows[part], self.pool.spans(rows[part]), ())
            ids = [pair.conditioned.ids if pair.conditioned else [] for pair in pairs]
            found = cosines(self._position_weighted(ids, description), embedded)
            found[[not row for row in ids]] = np.nan  # another model's tokenizer may put a BOS there
            return {"similarities": found}

        return self._run_shares(self.pool.lengths(rows), run)["similarities"]

    def _position_weighted(self, sequences: Sequence[Sequence[int]], description: str) -> np.ndarray:
        """Embeddings of sequences of the trainer's tokens, (n, H); another model reads them as text."""
        embedder = self.embedder if isinstance(self.embedder, IFDScorer) else None
        if embedder is None and self.other not in (None, "columns"):
            embedder = self._other_scorer("")
        with self._progress(sum(map(len, sequences)), description) as bar:
            if embedder is None:
                return position_weighted_embeddings(sequences=sequences, progress=bar.update, **self._running())
            texts = self.encoder.tokenizer.batch_decode(sequences, skip_special_tokens=True)
            return embedder.embed(texts, bar.update, by_position=True) if texts else np.empty((0, 0), np.float32)

    def _other_scorer(self, header: str) -> IFDScorer:
        """The other model; loaded once for all that an epoch asks of it, see `release`."""
        if header not in self._others:
            self._others[header] = IFDScorer(
                self.other,
                format=_Texts(header),
                score_truncated=True,
                device=str(self.trainer.args.device),
                token_budget=self.token_budget,
                trust_remote_code=getattr(self.trainer.args, "trust_remote_code", False),
                scores=self.further,
                guess=self.guess,
            )
        return self._others[header]

    def release(self) -> None:
        """Give the memory of another model back, before training goes on."""
        self._others.clear()

    @property
    def pool(self) -> Pool:
        """What is scored."""
        return self.trainer.selection_pool

    @cached_property
    def _read(self) -> TokenRows:
        """The pool's rows, by the chat template that the trainer wrote them with."""
        return TokenRows(self.encoder, template_of(self.trainer))

    def _own_reader(self, prefix: Sequence[int]) -> Reader:
        """How the trainer's model reads the pool."""
        running = self._running()
        return Reader(
            lambda rows: self._own_pairs(rows, self.pool.spans(rows), prefix),
            self._own_scores,
            lambda segments, progress: nll_with_tails(segments=segments, progress=progress, **running),
            int(self.pool.lengths(np.arange(len(self.pool))).max()),
        )

    def _own_scores(self, pairs: list[EncodedPair], progress: Callable[[int], Any]) -> Scores:
        """Scores of encoded rows by the trainer's model."""
        return score_pairs(pairs=pairs, further=self.further, progress=progress, **self._running())

    def _reader(self, prefix: Sequence[int]) -> Reader:
        """How the model that scores reads the pool."""
        if self.other is None:
            return self._own_reader(prefix)
        scorer = self._scorer_behind(prefix)

        def encode(rows: np.ndarray) -> list[EncodedPair]:
            return self._other_pairs(rows, self.pool.spans(rows), prefix)

        def score(pairs: list[EncodedPair], progress: Callable[[int], Any]) -> Scores:
            return scorer.score(pairs, progress) if pairs else Scores.unscored(0, "", self.further)

        return Reader(encode, score, scorer.nll_with_tails, scorer.settings(_Texts.columns)["max_length"])

    def _scorer_behind(self, prefix: Sequence[int]) -> IFDScorer:
        """The other model, with these tokens before a direct answer."""
        return self._other_scorer(self.encoder.tokenizer.decode(prefix, skip_special_tokens=True))

    def _other_pairs(self, rows: np.ndarray, spans: np.ndarray, prefix: Sequence[int]) -> list[EncodedPair]:
        """Answers (m, 2) of rows (m,), encoded for the other model."""
        prompts, answers, cut = self._texts(rows, spans)
        pairs = self._scorer_behind(prefix).encode({"prompt": prompts, "answer": answers}) if len(rows) else []
        return [replace(pair, ending=()) if was_cut else pair for pair, was_cut in zip(pairs, cut, strict=True)]

    def _losses(self, reader: Reader, segments: list[Segment], description: str) -> tuple[np.ndarray, np.ndarray]:
        with self._progress(sum(len(segment.ids) for segment in segments), description) as bar:
            return reader.losses(segments, bar.update)

    def _own_pairs(self, rows: np.ndarray, spans: np.ndarray, prefix: Sequence[int]) -> list[EncodedPair]:
        """Answers (m, 2) of rows (m,), encoded for the trainer's model."""
        tokens = zip(self.pool.tokens(rows), spans.tolist(), strict=True)
        return [
            self._own_pair(row, ids, start, end, prefix)
            for row, ((ids, _), (start, end)) in zip(rows.tolist(), tokens, strict=True)
        ]

    def _own_pair(self, row: int, ids: list[int], start: int, end: int, prefix: Sequence[int]) -> EncodedPair:
        if self.pool.whole:
            return self._read.whole(ids, self._fills(ids))
        if self.pool.finder is not None and start == len(ids) and self.pool.finder(ids, row) is None:
            return EncodedPair.unscorable(Status.PROMPT_TOO_LONG if self._fills(ids) else Status.NO_HEADER)
        return self._read.pair(ids, start, end, prefix, self._fills(ids))

    def _texts(self, rows: np.ndarray, spans: np.ndarray) -> tuple[list[str], list[str], list[bool]]:
        """Prompts and answers (m, 2) of rows (m,) as text, without special tokens: another model has its own; and
        whether an answer was cut."""
        prompts, answers, cut = [], [], []
        for (ids, _), (start, end) in zip(self.pool.tokens(rows), spans.tolist(), strict=True):
            start, end = self._read.span(ids, start, end)
            prompts.append([] if self._read.asks_nothing(ids[:start]) else ids[:start])
            answers.append(ids[start:end])
            cut.append(end == len(ids) and self._fills(ids))
        decode = self.encoder.tokenizer.batch_decode
        return decode(prompts, skip_special_tokens=True), decode(answers, skip_special_tokens=True), cut

    def _fills(self, ids: Sequence[int]) -> bool:
        """Whether a row is as long as rows may be: the trainer may have cut it there."""
        return len(ids) >= self.longest_row

    @cached_property
    def longest_row(self) -> float:
        """Most tokens of a row: what the trainer leaves, and what the model was made for."""
        limits = (getattr(self.trainer.args, "max_length", None), window(text_config(self.trainer.model)))
        return min((limit for limit in limits if limit is not None), default=math.inf)

    def _running(self) -> dict[str, Any]:
        """How the trainer's model is run."""
        model, sharded = scoring_model(self.trainer)
        return {
            "model": model,
            "device": self.trainer.args.device,
            "token_budget": self.token_budget,
            "forwards": (lambda batches: max(gather_object([batches]))) if self.world_size > 1 else None,
            "sharded": sharded,
        }

    def _progress(self, total: int, description: str) -> tqdm:
        show = self.trainer.is_local_process_zero() and not self.trainer.args.disable_tqdm
        return tqdm(total=total, desc=description, unit="tok", unit_scale=True, disable=not show, leave=False)

    def _run_shares(
        self, tokens: np.ndarray, run: Callable[[np.ndarray], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        return run_shares(run, tokens, self.rank, self.world_size, _CHUNK)


@dataclass(frozen=True)
class _Texts:
    """Decoded prompts and answers as a format: what another model than the trainer's reads."""

    header: str
    name: str = "decoded"
    columns: tuple[str, ...] = ("prompt", "answer")

    def render(self, row: dict[str, Any], tokenizer: Any) -> Example:
        return Example(row["prompt"], row["answer"], self.header, asked=row["prompt"].strip() != "")


def _sentence_transformer(name: str, device: str) -> Callable[[list[str]], np.ndarray]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise NotInstalledError(
            f"embedder={name!r} is a sentence-transformers model: pip install sentence-transformers, or leave it out "
            "to embed prompts with the model that scores."
        ) from error
    model = SentenceTransformer(name, device=device)
    return lambda texts: model.encode(texts, convert_to_numpy=True, show_progress_bar=False).astype(np.float32)


def _stored_scores(examples: Any, rows: np.ndarray | None, further: Sequence[str]) -> Scores:
    """Scores of all rows, or of some, from the columns that `IFDScorer` attached to the training set before."""
    names = getattr(examples, "column_names", None) or []
    missing = [name for name in (*IFD_COLUMNS, *further) if name not in names and name != EOT_LOSS]
    if missing:
        asked = f", scores={tuple(further)!r}" if further else ""
        raise UserError(
            f"scorer='columns' reads the scores of the training set, which has no {', '.join(missing)}. Attach them "
            f"with dataset.map(IFDScorer(model{asked}), batched=True) before the trainer is made; packing drops them."
        )
    numbers = [name for name in (*SCORES, *further) if name in names]
    table = examples.select_columns([*numbers, "answer_tokens", "ifd_status"]).with_format("arrow")[:].to_pandas()
    table = table if rows is None else table.iloc[rows]
    columns = {name: table[name].to_numpy(dtype=np.float64, na_value=np.nan) for name in numbers}
    status = table["ifd_status"].fillna(Status.NONFINITE.value).to_numpy(dtype=object)
    tokens = table["answer_tokens"].fillna(0).to_numpy(dtype=np.int64)
    return Scores.of({**columns, "answer_tokens": tokens, "ifd_status": status})

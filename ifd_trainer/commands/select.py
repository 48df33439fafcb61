"""`ifd-trainer select`: keep the rows with the highest scores, with a data card."""

from __future__ import annotations

import argparse
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.definitions import KNOWN_DEFINITIONS
from ..data.paths import check_model, check_readable, check_rows, check_writable
from ..errors import NotFoundError, UserError
from ..method.choices import TOKEN_SHARE
from ..method.columns import EOT_LOSS, SIFD
from .gates import gates_of
from .messages import say
from .select_options import ALL, add_options, at_or_above, by_sifd, guards_of, quotas_of, ranking_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from ..data.table_reader import TableReader
    from ..publish.select import PoolSelection


def add_parser(commands: argparse._SubParsersAction) -> None:
    """The command and its options."""
    add_options(commands).set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with ExitStack() as stack:
        return _select_rows(options, stack)


def _select_rows(options: argparse.Namespace, stack: ExitStack) -> int:
    """What `select` does; what has to be closed at its end, well or not, goes on the stack."""
    check_rows(options.data)
    if options.scores is not None:
        if not Path(options.scores).is_file():
            raise NotFoundError(f"No such file of scores: {options.scores}.")
        check_readable(Path(options.scores))
    alpha, duplicates = guards_of(options)
    threshold = at_or_above(options)
    ranking, quotas = ranking_of(options), quotas_of(options)
    ranked_by_sifd = by_sifd(options, ranking)
    gates = gates_of(options)
    if options.keep == ALL and (quotas is not None or options.targets is not None):
        raise UserError(f"--keep {ALL} keeps every row that is not dropped: leave out --per and --targets.")
    if options.targets is not None:
        check_rows(options.targets)
        if options.embedder is not None:
            check_model(options.embedder)

    import numpy as np

    from ..data.files import check_features, output_file, write_tables
    from ..data.refused_answers import refused_rows
    from ..data.table_reader import TableReader, selected_tables
    from ..method.quotas import REST
    from ..method.ranking import Ranking
    from ..method.schedule import parse_keep
    from ..method.score_histogram import of_other_models
    from ..method.target_set import TargetSet
    from ..publish.card import card_paths, check_card, public_name, write_card
    from ..publish.gates import gated_rows
    from ..publish.guards import dropped_rows, measured_limit, unfinished_rows
    from ..publish.hub import check_repository, push_files
    from ..publish.provenance import READ_COLUMNS, find_scores
    from ..publish.select import choose, choose_above, no_scores, numbers_of, texts_of, tie_ids
    from ..scoring.selective_columns import selective_column

    data, in_folder = output_file(options.output)
    if data.is_file():
        _check_apart(data, options)
    card, image = card_paths(data, in_folder)
    check_writable(data)
    if options.card:
        check_card(card)
    if options.push_to_hub:
        check_repository(options.push_to_hub)
        if not options.card:
            raise UserError("--push-to-hub pushes the card too: leave out --no-card.")
    elif options.private:
        raise UserError("--private goes with --push-to-hub USER/NAME.")
    rows = TableReader(options.data, options.split)
    check_features(rows.features, data)
    unscored = ranking is not None and ranking.ifd is None and options.scores is None
    unscored &= "ifd_status" not in rows.features
    own = options.scores is None and options.scores_format in (None, "ifd-trainer") and "ifd_status" in rows.features
    if unscored and options.max_ifd is not None:
        raise UserError(f"--max-ifd {options.max_ifd}: {options.data} has no IFD. Score it, or leave the limit out.")
    if unscored:
        scores, added, provenance = no_scores(len(rows), options.data)
    else:
        # Without scores of their own the texts are wanted too: of answers that another program did not score.
        table = rows.coded_frame(READ_COLUMNS) if own else rows.frame(rows.column_names)
        scores, added, provenance = find_scores(
            table, options.data, options.scores, kind=options.scores_format, model=options.scored_by
        )
        del table
    if threshold is not None and of_other_models(threshold.weights, provenance.weights):
        say(
            f"warning: the threshold was agreed on for scores by the weights {threshold.weights}, and those of "
            f"{options.data} were made by {provenance.weights}."
        )
    definition = KNOWN_DEFINITIONS.get(provenance.definition)
    usual = definition.ranked_by if definition else "ifd"
    ranking = ranking or Ranking({usual: 1.0})
    selective = {}
    if ranked_by_sifd and (options.token_share is not None or SIFD not in rows.features):
        selective[SIFD] = selective_column(rows, options.token_share or TOKEN_SHARE)
    # How alike rows are to targets is known later, of those that may be kept.
    names = [name for name in ranking.weights if name not in selective]
    no_numbers = np.full(len(rows), np.nan)
    columns = selective | {
        name: numbers_of(name, rows, scores) if options.targets is None else no_numbers for name in names
    }
    name = ranking.ifd or usual  # of the limit
    if ranking.ifd and scores[name].isna().all() and (scores["ifd_status"] == "ok").any():
        raise UserError(f"The scores have no {name}; rank by another one with --score.")
    origin = options.scores or options.data
    limit = (1.0 if ranking.ifd or ranked_by_sifd else float("inf")) if options.max_ifd is None else options.max_ifd
    limit = limit if alpha is None else measured_limit(provenance, name, alpha, origin)
    unfinished = None
    if options.drop_unfinished:
        unfinished, too_little = unfinished_rows(_end_of_turn(rows, scores, own), provenance, origin)
        if too_little:
            say(f"warning: {too_little}")
    mismatched = None
    if options.drop_mismatched:
        from ..publish.mismatched import MismatchedRows

        trust = options.trust_remote_code
        mismatched = MismatchedRows(options.data, options.split, scores, provenance, origin, trust)
    elif options.trust_remote_code and options.targets is None:
        raise UserError("--trust-remote-code goes with --drop-mismatched or --targets.")
    like = None
    if options.targets is not None:
        from ..publish.targets import LikeTargets

        trust = options.trust_remote_code
        like = LikeTargets(options.targets, options.data, options.split, data, provenance, options.embedder, trust)
        stack.enter_context(closing(like))
    id_column, ids = tie_ids(rows, options.id_column)
    status, of_limit = scores["ifd_status"], scores[name].to_numpy(dtype=float, na_value=np.nan)
    values = ranking.values(columns, (status == "ok").to_numpy())
    format = provenance.rows_format(rows.column_names)
    refusals = refused_rows(rows, format) if options.drop_refusals else None
    usable = (np.isfinite(values) | (like is not None)) & ~(of_limit >= limit)
    dropped = dropped_rows(rows, usable, status, ids, refusals, unfinished, duplicates, format)
    if gates:
        left = usable & (status == "ok").to_numpy() & ~np.logical_or.reduce([np.zeros_like(usable), *dropped.values()])
        for reason, held in gated_rows(rows, gates, left, ids, options.gate_examples, format).items():
            dropped[reason] = dropped.get(reason, False) | held
    if like is not None:
        usable &= ~np.logical_or.reduce([np.zeros(len(rows), dtype=bool), *dropped.values()])
        similarities, status = like.similarities(usable, status)
        values = similarities.max(axis=1).astype(np.float64)
        added = added.assign(target_similarity=values, target_row=like.most_like(similarities))
        scores = scores.assign(ifd_status=status)
    choice = {"ranking": ranking, "max_ifd": limit, "limited": (name, of_limit), "ids": ids, "alpha": alpha}
    choice |= {"strict": options.strict, "quotas": quotas}
    if like is not None:
        choice["targets"] = TargetSet(options.targets, on_shortfall="error"), similarities
    if quotas is not None:
        choice["groups"] = texts_of(quotas.column, rows)
    without = options.keep == ALL or (quotas is not None and REST in quotas.quotas)
    keep = None if without else parse_keep(options.keep or "0.1")

    def choose_from(dropped: dict[str, np.ndarray]) -> PoolSelection:
        if threshold is None:
            return choose(values, status, keep, dropped=dropped, **choice)
        # As many as there are: a row that is dropped later on has none below the threshold take its place.
        return choose_above(threshold.value, values, status, dropped, **choice)

    chosen = mismatched.choose(choose_from, dropped) if mismatched else choose_from(dropped)
    if like is not None:
        words = like.words(public_name(options.targets), public_name(like.model))
        chosen = replace(chosen, targets=words)
    del unfinished, refusals, dropped, mismatched
    if chosen.warning:
        say(f"warning: {chosen.warning}")
    added = added.assign(**selective, ifd_rank=chosen.ranks, ifd_reason=chosen.selection.reasons)
    tables, features = selected_tables(rows, added, chosen.is_kept | options.all)
    write_tables(tables, features, data)
    scores = scores[["answer_tokens", "ifd_status"]].assign(**{ranking.label: values})
    columns = list(features)
    del added, ids, tables  # of ten million rows, as much again as the card needs
    if options.card:
        write_card(
            card,
            image,
            data=data.name,
            source=options.data,
            rows=scores,
            chosen=chosen,
            provenance=provenance,
            id_column=id_column,
            columns=columns,
            everything=options.all,
        )
    if like is not None:
        like.finish()
    print(f"{chosen.summary} Written to {data}{f' with its card {card}' if options.card else ''}.")
    if options.push_to_hub:
        files = {data.name: data, "README.md": card, image.name: image}
        print(f"Pushed to {push_files(options.push_to_hub, files, options.private)}.")
    return 0


def _end_of_turn(rows: TableReader, scores: pd.DataFrame, own: bool) -> np.ndarray | None:
    """The losses of the end of turn, (n,), of the scores that rows are ranked by; None where they have none."""
    if EOT_LOSS in scores:
        values = scores[EOT_LOSS]
    elif own and EOT_LOSS in rows.features:
        values = rows.column(EOT_LOSS).to_pandas()
    else:
        return None
    return values.to_numpy(dtype=float, na_value=float("nan"))


def _check_apart(output: Path, options: argparse.Namespace) -> None:
    """Raise ValueError where the rows that are kept would be written over the rows or scores they are chosen from."""
    # With all rows, none of the data's would be lost; scores are another program's file.
    sources = [options.scores] if options.all else [options.data, options.scores]
    for source in map(Path, filter(None, sources)):
        whole = source / f"{options.split}.parquet"  # what is read of a folder, if it is there
        files = [whole] if whole.is_file() else [source, *source.rglob("*")]
        if any(output.samefile(path) for path in files if path.is_file()):
            raise UserError(
                f"--output {output} is read by this command, and what is not kept of it would be lost. Write to "
                "another file, or, to keep all rows of DATA, add --all."
            )

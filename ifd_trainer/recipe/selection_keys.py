"""The keys that this package adds to TRL's recipes: their names, defaults, choices and what they say in `--help`.

This is the only place where a key is described: the parser of recipes, `ifd-trainer train --help` and `--help-all` are
all made from it. Nothing slow is imported, so that the help is there at once; what the values mean together, and which
of them contradict each other, is in `selection`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.definitions import DEFINITIONS
from ..data.formats import FORMATS
from ..method.choices import (
    BRIEF_ROWS,
    CASCADE,
    CONTROLS,
    DIRECTIONS,
    GUARDS,
    MISALIGNED,
    ORDERS,
    RANKED_BY,
    RESCORES,
    SHORTFALLS,
    SIMILARITY,
    SPREADS,
    TARGET,
    TIER_MODES,
    TURN_RULES,
    WITHOUT,
    WRONG_PAIRS,
    WRONG_PROMPTS,
)
from ..method.further_scores import FURTHER

# Titles of the help; each stands before this key, and the keys after it belong to it too.
GROUPS = {
    "format": "Rows",
    "keep": "How many rows are trained on, and when",
    "method": "Method",
    "score": "Which rows are kept",
    "scorer": "Scoring",
    "label": "Report and history",
}


@dataclass
class SelectionKeys:
    """What a recipe says about data and selection, beside TRL's own keys; the metadata is argparse's."""

    format: str | None = field(
        default=None,
        metadata={
            "help": f"Prompt format of the rows: {', '.join(FORMATS)}. Told from the columns by default.",
            "metavar": "NAME",
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column of instructions or questions, where its name does not tell.", "metavar": "COLUMN"},
    )
    input_column: str | None = field(
        default=None,
        metadata={"help": "Column of what an instruction is about: a context, a document.", "metavar": "COLUMN"},
    )
    answer_column: str | None = field(default=None, metadata={"help": "Column of answers.", "metavar": "COLUMN"})
    system_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of system prompts: a system turn before a chat without one, {system} in a template.",
            "metavar": "COLUMN",
        },
    )
    messages_column: str | None = field(default=None, metadata={"help": "Column of chats.", "metavar": "COLUMN"})
    template: str | None = field(
        default=None,
        metadata={
            "help": "Prompt of a row, with {instruction} for the text of the prompt column, and perhaps {input} and "
            "{system}; \\n is a line break.",
            "metavar": "TEXT",
        },
    )
    template_with_input: str | None = field(
        default=None, metadata={"help": "Prompt of a row with an input; the template by default.", "metavar": "TEXT"}
    )
    response_header: str | None = field(
        default=None,
        metadata={
            "help": "What stands before an answer that is scored alone; the template's last line by default.",
            "metavar": "TEXT",
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Held-out rows: a file or a hub name; with --eval_strategy epoch their loss is shown for each "
            "epoch.",
            "metavar": "FILE_OR_NAME",
        },
    )
    eval_by: str | None = field(
        default=None,
        metadata={
            "help": "Column whose values the held-out rows are parted by: each is an evaluation set of its own, with a "
            "loss of its own. With bad_cases it is the column of per by default.",
            "metavar": "COLUMN",
        },
    )
    split_seed: int | None = field(
        default=None,
        metadata={
            "help": "Of the rows that test_split_size holds out of a mixture; the run's seed by default.",
            "metavar": "N",
        },
    )
    drop_refusals: bool = field(
        default=False,
        metadata={
            "help": "Leave rows out of the pool whose answer looks like a refusal (English).",
            "metavar": "true",
        },
    )
    threshold: str | None = field(
        default=None,
        metadata={
            "help": "Leave rows out of the pool whose score is below this: the file that `ifd-trainer threshold` wrote "
            "for several sites, or a number, of the column that score names. It is the score that the rows have "
            "(`ifd-trainer score`), not one of the run; keep is of the rows that are left.",
            "metavar": "FILE_OR_X",
        },
    )
    keep: list[str] = field(
        default_factory=lambda: ["0.1"],
        metadata={
            "help": "Rows per epoch: a fraction of the pool (0.1, 1.0), a number of rows (1000), or one entry for each "
            "epoch (1.0 0.5 0.1). With packing, of packed rows.",
            "metavar": "N",
        },
    )
    every: int = field(
        default=1,
        metadata={"help": "Select in each so many epochs; between, train on the same rows.", "metavar": "K"},
    )
    every_steps: int | None = field(
        default=None,
        metadata={
            "help": "Within an epoch, score again after each so many updates the rows that are left, and choose the "
            "next ones among them; 0 for whole epochs.",
            "metavar": "N",
        },
    )
    warmup_epochs: int = field(
        default=0, metadata={"help": "Train on all rows for so many epochs first.", "metavar": "N"}
    )
    freeze_after: int | None = field(
        default=None, metadata={"help": "From this epoch on, score nothing again.", "metavar": "N"}
    )
    rescore: str = field(
        default="all",
        metadata={
            "help": "Which rows are scored anew once there are scores: all, or candidates, those near the cut and some "
            "others that rescore_budget pays for.",
            "choices": list(RESCORES),
        },
    )
    rescore_budget: float = field(
        default=0.1,
        metadata={
            "help": "Of rescore: candidates, what scoring them may cost, as a share of training on the epoch's rows.",
            "metavar": "X",
        },
    )
    anneal_share: float = field(
        default=0.0, metadata={"help": "Train on all rows for this last share of the epochs.", "metavar": "X"}
    )
    curriculum: str | None = field(
        default=None,
        metadata={"help": "Train on tiers of the kept rows, one after the other.", "choices": list(DIRECTIONS)},
    )
    tiers: int = field(default=3, metadata={"help": "Tiers of the curriculum.", "metavar": "N"})
    tier_mode: str = field(
        default="tiers",
        metadata={
            "help": "One tier at a time, growing from the first, shrinking to the last, or remaining: one at a time, "
            "of the rows that no tier before had.",
            "choices": list(TIER_MODES),
        },
    )
    order: str = field(default="shuffle", metadata={"help": "Order within an epoch.", "choices": list(ORDERS)})
    method: str = field(
        default="dynamic",
        metadata={
            "help": "dynamic: score and select before each epoch. cherry: brief experience, one scoring, then all "
            "epochs from the original weights on the rows that were kept (arXiv 2308.12032).",
            "choices": ["dynamic", "cherry"],
        },
    )
    brief: str = field(
        default="kmeans",
        metadata={
            "help": "Rows of the brief experience: k-means over prompts, random, or none to score without it.",
            "choices": [*BRIEF_ROWS, "none"],
        },
    )
    brief_clusters: int = field(
        default=100, metadata={"help": "Clusters of the brief experience in a large pool.", "metavar": "N"}
    )
    brief_per_cluster: int = field(default=10, metadata={"help": "Rows of each of these clusters.", "metavar": "N"})
    score: str = field(
        default="ifd",
        metadata={
            "help": f"Rank by {' or '.join(RANKED_BY)}, by one of `scores`, by another column of the rows, by the "
            "weighted ranks of several (ifd:0.7 reward:0.3), or by a function of yours from columns to numbers, as "
            "module.name (of a module beside the recipe); the highest are kept, with policy: lowest the lowest.",
            "metavar": "NAME",
        },
    )
    max_ifd: str = field(
        default="auto",
        metadata={
            "help": "Rows with a score at or above this are dropped; inf for no limit. calibrated: the limit is "
            f"measured in each scoring, from answers under wrong prompts. auto: 1.0; with policy: {TARGET} no limit.",
            "metavar": "X",
        },
    )
    guards: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": f"What keeps noise out: {', '.join(GUARDS)}; auto (all but pairing in dynamic selection by "
            "IFD, none in others), auto with others, or none.",
            "metavar": "NAME",
        },
    )
    alpha: float = field(
        default=0.05,
        metadata={
            "help": "Of the calibrated limit: the share of mismatched rows that may be below it.",
            "metavar": "X",
        },
    )
    wrong_prompts: str = field(
        default="random",
        metadata={
            "help": "Of the calibrated limit and the pairing test: the prompts that answers are held against, random "
            "ones or those most like their own.",
            "choices": list(WRONG_PROMPTS),
        },
    )
    wrong_pairs: int | None = field(
        default=None,
        metadata={
            "help": "Of the calibrated limit: answers that are scored under a wrong prompt in each scoring (default "
            f"{WRONG_PAIRS}, or as many as alpha needs).",
            "metavar": "N",
        },
    )
    anchors: int = field(
        default=9, metadata={"help": "Of the pairing test: prompts that a row's own is held against.", "metavar": "K"}
    )
    similarity: float = field(
        default=SIMILARITY,
        metadata={"help": "Of duplicates: from which share of common shingles on texts are the same.", "metavar": "X"},
    )
    on_misaligned: str = field(
        default="error",
        metadata={
            "help": "With guards, where the prompts of most rows do not help the model: stop before the first step, or "
            "warn.",
            "choices": list(MISALIGNED),
        },
    )
    policy: str = field(
        default="cherry",
        metadata={
            "help": f"Which rows are kept: cherry (the highest scores under the limit), {TARGET} (those most like "
            f"target_set), {CASCADE} (the highest scores among the rows that cascade_by ranks first), infobatch (rows "
            "below the mean loss are drawn, and count for the others), kakurenbo (all but the rows with the lowest "
            "loss that are learnt), lead (rows of a group that a bandit draws, by losses of training), one of the "
            f"controls {', '.join(CONTROLS)}, or a policy of your own as module.Name (of a module beside the recipe).",
            "metavar": "NAME",
        },
    )
    balance_by: str | None = field(
        default=None,
        metadata={
            "help": "Of policy: balanced, the column of whose values as many rows each are drawn.",
            "metavar": "COLUMN",
        },
    )
    lead_by: str | None = field(
        default=None,
        metadata={
            "help": "Of policy: lead, the column whose values are the groups (default: groups by IFD).",
            "metavar": "COLUMN",
        },
    )
    lead_groups: int = field(
        default=7, metadata={"help": "Of policy: lead, how many groups by IFD there are.", "metavar": "N"}
    )
    target_set: str | None = field(
        default=None,
        metadata={
            "help": f"Of policy: {TARGET}, examples of what the model is to be good at: rows, some of which may have "
            "no answer. They take turns, each the row most like it (RDS+, arXiv 2503.01807).",
            "metavar": "FILE_OR_NAME",
        },
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Draw rows, the likelier the higher their score: P(next) is proportional to exp(score / this). "
            "Near 0 it keeps the highest scores.",
            "metavar": "X",
        },
    )
    per: str | None = field(
        default=None,
        metadata={
            "help": "A column, such as a source, whose values have the shares, floors and caps that follow, a mixture "
            "by epoch, stages, or shares that follow its held-out losses.",
            "metavar": "COLUMN",
        },
    )
    shares: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Of each named value exactly this fraction of the kept rows, or so many: web=0.9 code=0.1; equal "
            "for as many of each value as of any other.",
            "metavar": "VALUE=N",
        },
    )
    floors: list[str] = field(
        default_factory=list,
        metadata={"help": "Of each named value at least so much: code=0.1.", "metavar": "VALUE=N"},
    )
    caps: list[str] = field(
        default_factory=list, metadata={"help": "Of each named value at most so much.", "metavar": "VALUE=N"}
    )
    buckets: int | None = field(
        default=None,
        metadata={
            "help": "Of a column of numbers (answer_tokens, say): so many buckets of equally many rows, whose values "
            "are 1 (lowest), 2, ...",
            "metavar": "K",
        },
    )
    mixture: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Shares of each epoch, an entry for each: 'web=0.9 code=0.1' 'web=0.5 code=0.5'; the last one "
            "stands for all after it.",
            "metavar": "SHARES",
        },
    )
    stages: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Values of the column that are trained on one after another; keep is of the rows of each.",
            "metavar": "VALUE",
        },
    )
    stage_epochs: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "Epochs of each stage, or of every one.", "metavar": "N"},
    )
    growing: bool = field(
        default=False, metadata={"help": "Each stage keeps the values of those before it.", "metavar": "true"}
    )
    bad_cases: bool = field(
        default=False,
        metadata={
            "help": "Shares that follow the held-out loss of each value, measured anew whenever rows are selected: "
            "more rows of what the model is bad at.",
            "metavar": "true",
        },
    )
    bad_cases_floor: float = field(
        default=0.0,
        metadata={"help": "Fraction of the kept rows that each value with held-out rows has at least.", "metavar": "X"},
    )
    bad_cases_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Shares by a softmax of losses over this, in nats; in proportion to the losses by default.",
            "metavar": "X",
        },
    )
    cascade_by: str | None = field(
        default=None,
        metadata={
            "help": f"Of policy: {CASCADE}, the column that comes first, such as a reward model's score or ratings of "
            "people: the rows with its highest values are left to be chosen from.",
            "metavar": "COLUMN",
        },
    )
    cascade_share: str = field(
        default="0.5",
        metadata={"help": "How much of the pool it leaves: a fraction, or a number of rows.", "metavar": "X"},
    )
    row_weights: str | None = field(
        default=None,
        metadata={
            "help": "A column of numbers of at least 0 that the loss of each row is multiplied by in training.",
            "metavar": "COLUMN",
        },
    )
    on_shortfall: str = field(
        default="repeat",
        metadata={
            "help": "When fewer rows are eligible than planned: repeat eligible rows, relax the limit, or stop.",
            "choices": list(SHORTFALLS),
        },
    )
    diverse: str | None = field(
        default=None,
        metadata={
            "help": "Choose the rows among this share of the eligible ones with the highest scores, so that they stand "
            "for all of it (facility location; Superfiltering.D: 0.2).",
            "metavar": "X",
        },
    )
    diverse_by: str = field(
        default="facility_location",
        metadata={
            "help": "Of diverse: facility_location chooses the middle of what rows stand for, k_center rows far from "
            "one another.",
            "choices": list(SPREADS),
        },
    )
    embedder: str | None = field(
        default=None,
        metadata={
            "help": "A sentence-transformers model for that; by default the model that scores.",
            "metavar": "NAME_OR_PATH",
        },
    )
    scorer: str | None = field(
        default=None,
        metadata={
            "help": "Score with this model, once, instead of the one in training (Superfiltering: gpt2).",
            "metavar": "NAME_OR_PATH",
        },
    )
    definition: str = field(
        default="paper",
        metadata={"help": "What `scorer` computes; see `ifd-trainer score --help`.", "choices": list(DEFINITIONS)},
    )
    scores: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Further scores for the history and the report: {', '.join(FURTHER)}.",
            "metavar": "NAME",
        },
    )
    guess: str | None = field(
        default=None,
        metadata={
            "help": "Of the score rifd: the request for the instruction, with {answer} where the answer stands.",
            "metavar": "TEXT",
        },
    )
    turns: str = field(
        default="tokens",
        metadata={
            "help": "The score of a row with several answers that are trained on (assistant_only_loss: true): of all "
            "their tokens, their mean, the lowest (min) or highest (max) IFD, or of the last one.",
            "choices": list(TURN_RULES),
        },
    )
    without: str = field(
        default="both",
        metadata={
            "help": "Of rows with images: what a direct score leaves out, image and question (both) or the image.",
            "choices": list(WITHOUT),
        },
    )
    min_answer_tokens: int = field(
        default=1, metadata={"help": "Rows with shorter answers are not scored.", "metavar": "N"}
    )
    token_budget: int | None = field(default=None, metadata={"help": "Tokens of a scoring batch.", "metavar": "N"})
    train_losses: bool = field(
        default=False,
        metadata={
            "help": "Let the history have the loss of each row in the forwards that train on it.",
            "metavar": "true",
        },
    )
    label: str | None = field(
        default=None,
        metadata={
            "help": "A column of labels to show in the report; selection never reads it.",
            "metavar": "COLUMN",
        },
    )
    push_history: bool = field(
        default=False,
        metadata={
            "help": "Let a push to a hub take ifd_history and reports along; they hold texts of the training set.",
            "metavar": "true",
        },
    )

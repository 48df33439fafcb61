"""The words among which a user chooses, each list once: policies and schedules, recipes and `--help` all read it here.

Nothing is imported for it, so that the command line can say what there is to choose at once.
"""

from __future__ import annotations

from typing import Literal, get_args

Score = Literal["ifd", "ifd_ppl"]  # what rows are ranked by
Shortfall = Literal["repeat", "relax", "error"]  # what is done with fewer eligible rows than planned
Misaligned = Literal["error", "warn"]  # what is done where most prompts do not help
WrongPrompts = Literal["random", "near"]  # which other rows' prompts an answer is scored under
TurnRule = Literal["tokens", "mean", "min", "max", "last"]  # how the answers of a conversation become one score
Without = Literal["both", "image"]  # what the direct score of a row with images leaves out
Order = Literal["shuffle", "descending", "ascending"]  # of the kept rows within an epoch, by their scores
Spread = Literal["facility_location", "k_center"]  # how a diverse selection chooses among its candidates
BriefRows = Literal["kmeans", "random"]  # which rows give the brief experience
Direction = Literal["easy_to_hard", "hard_to_easy"]  # of a curriculum
Rescore = Literal["all", "candidates"]  # which rows are scored anew where there are scores already
TierMode = Literal["tiers", "growing", "shrinking", "remaining"]  # which of its tiers are trained on together

CONTROLS = {  # policies by the names that recipes have for them
    "random": "RandomRows",
    "balanced": "BalancedRandom",
    "longest": "LongestAnswers",
    "lowest": "LowestScores",
    "middle": "MiddleBand",
}

TARGET = "target"  # the policy `TargetSet` in recipes
CASCADE = "cascade"  # the policy `Cascade` in recipes
BY_LOSS = {
    "infobatch": "InfoBatch",
    "kakurenbo": "Kakurenbo",
    "lead": "Lead",
}  # policies that go by losses, in recipes

GUARDS = ("limit", "pairing", "unfinished", "duplicates", "freeze")  # the fields of a `Guard` that can be on or off

GATES = ("length", "noise", "copies", "matched")  # for synthetic rows, by the names that `select` has for them

CALIBRATED = "calibrated"  # in the place of a number, a limit that is measured: `CalibratedLimit` by default
MEASURING_GUARDS = ("limit", "pairing", "unfinished")  # those for which a model has to measure something

WRONG_PAIRS = 256  # of which a limit is made, where no other number is given
SIMILARITY = 0.85  # from which share of common shingles on texts are duplicates, where no other is given

TOKEN_SHARE = 0.5  # of all tokens that S-IFD is made of, where no other is given; the paper takes 0.5 to 0.75

ROWS_TOGETHER = 10  # of a bin of a histogram that a site shows, where no other number is given

RANKED_BY = get_args(Score)
SHORTFALLS = get_args(Shortfall)
MISALIGNED = get_args(Misaligned)
WRONG_PROMPTS = get_args(WrongPrompts)
TURN_RULES = get_args(TurnRule)
WITHOUT = get_args(Without)
ORDERS = get_args(Order)
SPREADS = get_args(Spread)
BRIEF_ROWS = get_args(BriefRows)
DIRECTIONS = get_args(Direction)
RESCORES = get_args(Rescore)
TIER_MODES = get_args(TierMode)

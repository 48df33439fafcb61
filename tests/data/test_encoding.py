"""Text to token ids: which tokens are scored, what stands before them, and how rows are batched."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import build_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from ifd_trainer.data.chat_template import common_prefix_length
from ifd_trainer.data.definitions import DEFAULT_MAX_LENGTH
from ifd_trainer.data.encoding import (
    EncodedPair,
    Encoder,
    EndOfTurn,
    Segment,
    answer_span,
    direct_prefix,
    header_before,
    mismatched,
    token_budget_batches,
    token_count,
    with_ending,
)
from ifd_trainer.data.formats import (
    ALPACA,
    MESSAGES,
    PROMPT_COMPLETION,
    SUPERFILTERING,
    WIZARDLM,
    Example,
)
from ifd_trainer.method.reasons import Status

HEADER = "### Response:"
# Texts whose merges run over the boundary between a prompt and its answer.
MERGES = ('### Response:"Yes."',) * 40 + ("Response:\n\nYes",) * 40 + ("Answer it now: Yes",) * 40
TOKENIZERS = {
    "no BOS added": build_tokenizer(),
    "BOS added": build_tokenizer(add_bos=True),
    "no BOS": build_tokenizer(bos=False),
    "merging": build_tokenizer(extra=MERGES),
    "merging, BOS added": build_tokenizer(add_bos=True, extra=MERGES),
}
FRAGMENTS = [
    "Name three colours",
    "Yes.",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    ":",
    '"',
    ':"',
    "{input}",
    "{instruction}",
    "{",
    "<|im_end|>",
    "<|im_start|>",
    "<s>",
    "<|endoftext|>",
    "### Response:",
    "שלום עולם",
    "مرحبا",
    "你好世界",
    "日本語",
    "🙂🏽",
    "e\u0301",
    "42",
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join) | st.text(max_size=12)
any_tokenizer = st.sampled_from(sorted(TOKENIZERS))
ids = st.lists(st.integers(0, 5), max_size=8)


def without_end_of_turn(tokenizer, ids: list[int], start: int) -> list[int]:
    """ids up to the last answer token that is neither special nor white space before a special token."""
    last = len(ids)
    while True:
        end = last
        while (
            end > start
            and ids[end - 1] not in tokenizer.all_special_ids
            and not tokenizer.decode(ids[end - 1 : end]).strip()
        ):
            end -= 1
        if end == start or ids[end - 1] not in tokenizer.all_special_ids:
            return ids[:last]
        last = end - 1


def encode(tokenizer, example: Example, **options) -> EncodedPair:
    return Encoder(tokenizer, **options)([example])[0]


# ---- the paper's definition: one tokenisation, the same answer tokens in both segments --------------------------


@given(name=any_tokenizer, instruction=texts, extra=texts, answer=texts)
@example(name="no BOS added", instruction="Fill {input} in {instruction} ", extra="", answer='"Yes."')
@example(name="merging", instruction="Name a colour", extra="", answer='"Yes."')
@example(name="merging, BOS added", instruction="Name a colour", extra="", answer='"Yes."')
@example(name="merging, BOS added", instruction="Name a colour", extra="", answer="\n\nYes")
@example(name="no BOS", instruction="日本語", extra="שלום", answer="Yes.<|im_end|>\n")
def test_alpaca_rows_keep_their_tokens(name, instruction, extra, answer):
    tokenizer = TOKENIZERS[name]
    row = ALPACA.render({"instruction": instruction, "input": extra, "output": answer})
    prompt, whole = tokenizer(row.prompt)["input_ids"], tokenizer(row.prompt + answer)["input_ids"]
    start = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    trimmed = without_end_of_turn(tokenizer, whole, start)
    pair = encode(tokenizer, row)
    if not answer.strip() or not tokenizer.decode(trimmed[start:]).strip():
        assert pair == EncodedPair(status=Status.EMPTY_ANSWER)
        return
    if not (instruction + extra).strip():
        assert pair == EncodedPair(status=Status.EMPTY_PROMPT)
        return
    assert pair.status is Status.OK
    assert pair.conditioned.ids == trimmed
    assert pair.conditioned.start == start >= 1
    assert pair.direct.start >= 1
    assert pair.direct.ids[pair.direct.start :] == trimmed[start:]
    header = tokenizer(HEADER)["input_ids"]
    assert pair.direct.ids[: pair.direct.start] == header[: pair.direct.start]
    # Nothing is lost or said twice where the header's last character is part of the answer's first token.
    bos = tokenizer.decode(header[: len(header) - len(tokenizer(HEADER, add_special_tokens=False)["input_ids"])])
    said = tokenizer.decode(trimmed)[len(bos + row.prompt) :]
    assert tokenizer.decode(pair.direct.ids) == bos + HEADER + said


@given(name=any_tokenizer, prompt=texts, answer=texts)
@example(name="merging", prompt="Answer it now: ", answer="Yes")
@example(name="BOS added", prompt="", answer="Yes")
@example(name="no BOS added", prompt="", answer="Yes")
def test_prompt_completion_rows_keep_their_tokens(name, prompt, answer):
    tokenizer = TOKENIZERS[name]
    whole = tokenizer(prompt + answer)["input_ids"]
    pair = encode(tokenizer, Example(prompt, answer))
    if pair.status is not Status.OK:
        assert pair.status is Status.EMPTY_ANSWER
        return
    conditioned, direct = pair.conditioned, pair.direct
    assert conditioned.start >= 1
    assert direct.start == 1
    assert direct.ids[0] == (tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    assert conditioned.ids[conditioned.start :] == direct.ids[direct.start :]
    without_bos = conditioned.ids if conditioned.ids[0] == whole[0] else conditioned.ids[1:]
    assert without_bos == whole[: len(without_bos)]


@given(name=any_tokenizer, question=texts, answer=texts.filter(str.strip))
def test_chat_rows_are_tokenised_as_the_template_writes_them(name, question, answer):
    tokenizer = TOKENIZERS[name]
    opened = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer(opened + answer + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
    start = common_prefix_length(whole, tokenizer(opened, add_special_tokens=False)["input_ids"])
    row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    pair = encode(tokenizer, MESSAGES.render(row, tokenizer))
    expected = without_end_of_turn(tokenizer, whole, start)
    if not tokenizer.decode(expected[start:]).strip():
        assert pair.status is Status.EMPTY_ANSWER
        return
    if not question.strip():
        assert pair.status is Status.EMPTY_PROMPT
        return
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    assert pair.conditioned == Segment(expected, start)
    assert pair.direct.ids[pair.direct.start :] == expected[start:]
    assert pair.direct.ids[: pair.direct.start] == header[: pair.direct.start]


def test_a_trailing_space_of_the_prompt_belongs_to_the_answer_it_merges_with():
    tokenizer = TOKENIZERS["merging"]
    pair = encode(tokenizer, Example("Answer it now: ", "Yes"))
    assert tokenizer.decode(pair.conditioned.ids[pair.conditioned.start :]) == " Yes"
    assert tokenizer.decode(pair.conditioned.ids[: pair.conditioned.start]) == "Answer it now:"


@pytest.mark.parametrize("name", ["merging", "merging, BOS added"])
def test_a_header_whose_colon_merged_with_the_answer_is_cut_before_it(name):
    tokenizer = TOKENIZERS[name]
    pair = encode(tokenizer, ALPACA.render({"instruction": "Yes or no?", "output": '"Yes."'}))
    answer = tokenizer.convert_ids_to_tokens(pair.direct.ids[pair.direct.start :])
    assert answer[0] == ':"'  # or the row would not be about merging
    assert tokenizer.decode(pair.direct.ids, skip_special_tokens=True) == '### Response:"Yes."'


def test_a_row_does_not_depend_on_its_batch():
    tokenizer = TOKENIZERS["BOS added"]
    examples = [
        Example("The cat", " sat."),
        MESSAGES.render({"messages": [{"role": "assistant", "content": "Hi."}]}, tokenizer),
        None,
        ALPACA.render({"instruction": "Name a colour", "output": "Red."}),
        Example("", ""),
    ]
    encoder = Encoder(tokenizer)
    assert encoder(examples) == [encoder([example])[0] for example in examples]


def test_no_rows_are_no_pairs(tokenizer):
    assert Encoder(tokenizer)([]) == []


@pytest.mark.parametrize("definition", ["paper", "cherry", "superfiltering"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_encoding_leaves_the_tokenizer_as_it_was(definition, side):
    tokenizer = build_tokenizer()
    tokenizer.padding_side = tokenizer.truncation_side = side
    before = tokenizer.backend_tokenizer.to_str()
    Encoder(tokenizer, definition, max_length=40)([ALPACA.render({"instruction": "Add", "output": "Yes " * 40})] * 2)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == (side, side)
    assert tokenizer.backend_tokenizer.to_str() == before


# ---- statuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|> \n<|endoftext|>\n"])
def test_an_answer_of_nothing_but_end_of_turn_is_empty(tokenizer, answer):
    assert encode(tokenizer, Example("The cat", answer)).status is Status.EMPTY_ANSWER


@pytest.mark.parametrize("definition", ["paper", "cherry", "superfiltering"])
def test_an_empty_answer_is_empty_in_every_definition(tokenizer, definition):
    row = ALPACA.render({"instruction": "Name a colour", "output": ""})
    assert encode(tokenizer, row, definition=definition).status is Status.EMPTY_ANSWER


@pytest.mark.parametrize(("wanted", "status"), [(4, Status.OK), (5, Status.TOO_SHORT)])
@pytest.mark.parametrize("definition", ["paper", "cherry", "superfiltering"])
def test_min_answer_tokens(tokenizer, definition, wanted, status):
    row = ALPACA.render({"instruction": "Name a colour", "output": "7777"})  # one token each
    assert encode(tokenizer, row, definition=definition, min_answer_tokens=wanted).status is status


def lengths_of(tokenizer, example: Example) -> tuple[int, int]:
    return len(tokenizer(example.prompt)["input_ids"]), len(tokenizer(example.answer)["input_ids"])


def test_an_answer_that_just_fits_is_scored(tokenizer):
    example = Example("The cat", " sat on the mat.")
    assert encode(tokenizer, example, max_length=sum(lengths_of(tokenizer, example))).status is Status.OK


def test_an_answer_one_token_too_long_is_truncated(tokenizer):
    example = Example("The cat", " sat on the mat.")
    pair = encode(tokenizer, example, max_length=sum(lengths_of(tokenizer, example)) - 1)
    assert pair == EncodedPair(status=Status.TRUNCATED)


def test_score_truncated_scores_what_fits(tokenizer):
    example = Example("The cat", " sat on the mat.")
    prompt, _ = lengths_of(tokenizer, example)
    whole = encode(tokenizer, example)
    pair = encode(tokenizer, example, max_length=prompt + 2, score_truncated=True)
    assert pair.status is Status.OK
    assert pair.conditioned == Segment(whole.conditioned.ids[: prompt + 2], prompt)
    assert pair.direct == Segment(whole.direct.ids[:3], 1)


def test_what_is_left_after_truncation_may_be_too_short(tokenizer):
    example = Example("The cat", " sat on the mat.")
    prompt, _ = lengths_of(tokenizer, example)
    options = {"max_length": prompt + 2, "score_truncated": True, "min_answer_tokens": 3}
    assert encode(tokenizer, example, **options).status is Status.TOO_SHORT


@pytest.mark.parametrize("score_truncated", [False, True])
@pytest.mark.parametrize("spare", [0, -1])
def test_a_prompt_that_leaves_no_room_is_too_long(tokenizer, score_truncated, spare):
    example = Example("The cat", " sat on the mat.")
    limit = lengths_of(tokenizer, example)[0] + spare
    pair = encode(tokenizer, example, max_length=limit, score_truncated=score_truncated)
    assert pair.status is Status.PROMPT_TOO_LONG


@pytest.mark.parametrize("score_truncated", [False, True])
@pytest.mark.parametrize("limit", [5, 6, 7, 20])
@pytest.mark.parametrize("prompt", ["", "a"])
def test_no_segment_is_longer_than_max_length(tokenizer, prompt, limit, score_truncated):
    # Without a prompt, BOS stands before the answer: it needs a place too, or the model runs out of positions.
    pair = encode(tokenizer, Example(prompt, "777777"), max_length=limit, score_truncated=score_truncated)
    fits = len(prompt or "B") + 6 <= limit
    assert pair.status is (Status.OK if fits or score_truncated else Status.TRUNCATED)
    for segment in (pair.conditioned, pair.direct):
        assert segment is None or len(segment.ids) <= limit


def test_a_row_that_could_not_be_rendered_is_malformed(tokenizer):
    assert Encoder(tokenizer)([None]) == [EncodedPair(status=Status.MALFORMED)]


def test_statuses_print_as_their_value():
    assert [f"{status}" for status in Status] == [status.value for status in Status]


# ---- the published programs -------------------------------------------------------------------------------------


def test_default_lengths_are_those_of_the_programs(tokenizer):
    assert DEFAULT_MAX_LENGTH == {"cherry": 512, "superfiltering": 1024}
    assert Encoder(tokenizer, "cherry").max_length == 512
    assert Encoder(tokenizer, "superfiltering").max_length == 1024
    assert Encoder(tokenizer).max_length is None


@pytest.mark.parametrize(
    ("definition", "window", "found"),
    [
        ("paper", 700, 700),
        ("cherry", 700, 512),
        ("superfiltering", 700, 700),
        ("cherry", None, 512),
        ("paper", None, None),
    ],
)
def test_the_default_length_is_the_smaller_of_the_definition_and_the_window(definition, window, found):
    assert Encoder(None, definition, window=window).max_length == found


def test_a_length_above_the_window_is_refused():
    assert Encoder(None, max_length=700, window=700).max_length == 700
    with pytest.raises(ValueError, match=r"max_length=701 .* window of 700 tokens.*the default is 512"):
        Encoder(None, "cherry", max_length=701, window=700)


@pytest.mark.parametrize("name", ["max_length", "min_answer_tokens"])
@pytest.mark.parametrize("number", [0, -1, 1.5, True, "8"])
def test_numbers_below_one_are_refused(name, number):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {number!r}"):
        Encoder(None, **{name: number})


@pytest.mark.parametrize("definition", ["paper", "cherry", "superfiltering"])
@given(instruction=texts, answer=st.integers(1, 60), name=any_tokenizer)
def test_no_segment_is_longer_than_the_window(definition, instruction, answer, name):
    row = {"instruction": instruction, "output": "7" * answer}
    format = SUPERFILTERING if definition == "superfiltering" else WIZARDLM
    examples = [format.render(row), Example("", "7" * answer, format.header), Example(":", "7" * answer, format.header)]
    for pair in Encoder(TOKENIZERS[name], definition, score_truncated=True, window=32)(examples):
        for segment in (pair.conditioned, pair.direct):
            assert segment is None or len(segment.ids) <= 32


def test_unknown_definition(tokenizer):
    with pytest.raises(ValueError, match="Unknown definition 'peper'; choose one of paper, cherry, superfiltering"):
        Encoder(tokenizer, "peper")


def test_cherry_tokenises_header_and_answer_apart_from_the_prompt():
    tokenizer = TOKENIZERS["merging"]
    row = ALPACA.render({"instruction": "Name a colour", "output": '"Yes."'})
    pair = encode(tokenizer, row, definition="cherry")
    assert pair.conditioned == Segment(
        tokenizer(row.prompt + row.answer)["input_ids"], len(tokenizer(row.prompt)["input_ids"])
    )
    assert pair.direct == Segment(tokenizer(HEADER + row.answer)["input_ids"], 3)


@pytest.mark.parametrize(
    ("name", "answer_tokens", "status"),
    [
        ("BOS added", 3, Status.OK),
        ("BOS added", 40, Status.OK),  # cut to what fits
        ("no BOS added", 3, Status.OK),
        ("no BOS added", 40, Status.TRUNCATED),  # the header is three tokens: one answer token too many is left
    ],
)
def test_cherry_truncation_takes_the_header_for_four_tokens(name, answer_tokens, status):
    row = WIZARDLM.render({"instruction": "777", "output": "7" * answer_tokens})
    assert encode(TOKENIZERS[name], row, definition="cherry", max_length=20).status is status


def test_cherry_counts_only_the_instruction_of_wizardlm_rows():
    tokenizer = TOKENIZERS["BOS added"]
    row = WIZARDLM.render({"instruction": "777", "output": "7" * 30})
    prompt = len(tokenizer(row.prompt)["input_ids"])
    pair = encode(tokenizer, row, definition="cherry", max_length=20)
    assert pair.conditioned == Segment(tokenizer(row.prompt + row.answer)["input_ids"][:20], prompt)
    assert len(pair.direct.ids) == 20 - 4 + 4  # BOS and three digits are counted


@pytest.mark.parametrize("format", [ALPACA, WIZARDLM])
def test_cherry_prompt_too_long(tokenizer, format):
    row = format.render({"instruction": "7" * 30, "output": "Yes."})
    assert encode(tokenizer, row, definition="cherry", max_length=30).status is Status.PROMPT_TOO_LONG


def test_cherry_needs_a_response_header(tokenizer):
    with pytest.raises(ValueError, match=r"'cherry' is defined for the Alpaca and WizardLM prompts only.*'paper'"):
        encode(tokenizer, Example("a", "b"), definition="cherry")


def test_superfiltering_scores_no_first_direct_token(tokenizer):
    row = SUPERFILTERING.render({"instruction": "Name a colour", "output": "7777"})
    pair = encode(tokenizer, row, definition="superfiltering")
    prompt, whole = tokenizer(row.prompt)["input_ids"], tokenizer(row.prompt + "7777")["input_ids"]
    assert pair.conditioned == Segment(whole, len(prompt))
    assert pair.direct == Segment(tokenizer("7777")["input_ids"], 1)
    assert (pair.conditioned.scored, pair.direct.scored) == (4, 3)


def test_superfiltering_cuts_the_direct_answer(tokenizer):
    row = SUPERFILTERING.render({"instruction": "777", "output": "7" * 30})  # prompt of four tokens with its newline
    pair = encode(tokenizer, row, definition="superfiltering", max_length=20)
    assert (len(pair.conditioned.ids), pair.conditioned.start) == (20, 4)
    assert len(pair.direct.ids) == 20 - 4 + 1


def test_superfiltering_of_one_token(tokenizer):
    row = SUPERFILTERING.render({"instruction": "Name a number", "output": "4"})
    assert encode(tokenizer, row, definition="superfiltering").status is Status.TOO_SHORT


@pytest.mark.parametrize("limit", [3, 4])
def test_superfiltering_prompt_too_long(tokenizer, limit):
    row = SUPERFILTERING.render({"instruction": "777", "output": "7777"})
    assert encode(tokenizer, row, definition="superfiltering", max_length=limit).status is Status.PROMPT_TOO_LONG


@pytest.mark.parametrize("definition", ["paper", "superfiltering"])
@pytest.mark.parametrize("prompt", [None, "", " \n"])
def test_without_a_prompt_there_is_no_score(tokenizer, definition, prompt):
    row = PROMPT_COMPLETION.render({"prompt": prompt, "completion": "7777"}, tokenizer)
    assert encode(tokenizer, row, definition=definition).status is Status.EMPTY_PROMPT


@given(
    name=any_tokenizer,
    definition=st.sampled_from(["paper", "cherry", "superfiltering"]),
    limit=st.integers(1, 60),
    instruction=texts,
    answer=texts,
)
def test_every_scored_segment_has_a_token_before_and_a_token_to_score(name, definition, limit, instruction, answer):
    format = SUPERFILTERING if definition == "superfiltering" else ALPACA
    row = format.render({"instruction": instruction, "output": answer})
    pair = encode(TOKENIZERS[name], row, definition=definition, max_length=limit, score_truncated=True)
    assert (pair.conditioned is None) == (pair.direct is None) == (pair.status is not Status.OK)
    if pair.conditioned:
        for segment in (pair.conditioned, pair.direct):
            assert 1 <= segment.start < len(segment.ids)
            assert segment.scored == len(segment.ids) - segment.start
        assert len(pair.conditioned.ids) <= limit


# ---- what precedes a direct answer ------------------------------------------------------------------------------


def test_direct_prefix_is_the_header_with_bos_where_the_tokenizer_adds_it():
    header = build_tokenizer()(HEADER)["input_ids"]
    assert direct_prefix(TOKENIZERS["no BOS added"], HEADER, special=True) == header
    assert direct_prefix(TOKENIZERS["BOS added"], HEADER, special=True) == [3, *header]
    assert direct_prefix(TOKENIZERS["BOS added"], HEADER, special=False) == header


@pytest.mark.parametrize(("name", "token"), [("no BOS added", "<s>"), ("BOS added", "<s>"), ("no BOS", "<|im_end|>")])
def test_direct_prefix_without_a_header_is_bos_else_eos(name, token):
    tokenizer = TOKENIZERS[name]
    assert direct_prefix(tokenizer, "", special=True) == [tokenizer.convert_tokens_to_ids(token)]


def test_direct_prefix_needs_some_token():
    tokenizer = build_tokenizer(bos=False)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        direct_prefix(tokenizer, "", special=True)


@pytest.mark.parametrize(
    ("prompt", "header", "expected"),
    [
        ([7, 7, 1, 2, 3], [1, 2, 3], [1, 2, 3]),
        ([7, 7, 1, 2], [1, 2, 3], [1, 2]),  # 3 merged with the answer's first token
        ([7, 1], [1, 2, 1], [1]),
        ([9, 7, 1, 2, 3], [9, 1, 2, 3], [9, 1, 2, 3]),  # 9 is a BOS
        ([9, 7, 1, 2], [9, 1, 2, 3], [9, 1, 2]),
        ([9, 1, 2], [9, 1, 2, 3], [9, 1, 2]),
        ([7, 8, 2, 3], [4, 2, 3], [4, 2, 3]),  # the header's first token reads otherwise in the middle of a text
        ([7, 8, 2], [4, 2, 3], [4, 2]),
        ([7, 7], [1, 2, 3], [1, 2, 3]),  # a prompt without the header
        ([], [1, 2], [1, 2]),
        ([7], [], []),
    ],
)
def test_header_before(prompt, header, expected):
    assert header_before(prompt, header) == expected


@given(a=ids, b=ids)
def test_common_prefix_length(a, b):
    n = common_prefix_length(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


# ---- where an answer begins and ends ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "span"),
    [
        ([-100, -100, 7, 8], (2, 4)),
        ([-100, 7, 8, -100], (1, 3)),
        ([-100, 5, -100, 7, 8], (3, 5)),  # several answers: the last one
        ([7, 8], (0, 2)),
        ([-100, -100], (2, 2)),
        ([], (0, 0)),
    ],
)
def test_answer_span(labels, span):
    assert answer_span(labels) == span


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("Yes.", "Yes."),
        ("Yes.<|im_end|>", "Yes."),
        ("Yes.<|im_end|>\n", "Yes."),
        ("Yes.<|im_end|>\n<|endoftext|>", "Yes."),
        ("Yes.\n", "Yes.\n"),  # white space alone is the answer's own
        ("Yes. \n<|im_end|>", "Yes. \n"),
        ("Yes<|im_end|>No", "Yes<|im_end|>No"),
        ("<|im_end|>", ""),
    ],
)
def test_end_of_turn(tokenizer, answer, kept):
    prompt, whole = (tokenizer(text)["input_ids"] for text in ("The cat", "The cat" + answer))
    end = EndOfTurn(tokenizer)(whole, len(prompt))
    assert tokenizer.decode(whole[len(prompt) : end]) == kept


def test_end_of_turn_stops_at_the_prompt(tokenizer):
    special = tokenizer("<|im_end|><|im_end|>")["input_ids"]
    assert EndOfTurn(tokenizer)(special, 1) == 1


# ---- batches ----------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 50), max_size=30), budget=st.integers(1, 200))
def test_batches_are_a_partition_within_the_token_budget(lengths, budget):
    batches = token_budget_batches(lengths, budget)
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@given(
    rows=st.lists(st.integers(1, 50).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), max_size=30),
    scored_budget=st.integers(1, 100),
)
def test_batches_keep_within_the_budget_of_scored_tokens(rows, scored_budget):
    lengths, scored = [n for n, _ in rows], [k for _, k in rows]
    batches = token_budget_batches(lengths, 200, scored, scored_budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or sum(scored[i] for i in batch) <= scored_budget
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 200


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), budget=st.integers(1, 200))
def test_the_longest_come_first_and_no_batch_could_take_the_next_row(lengths, budget):
    batches = [[lengths[i] for i in batch] for batch in token_budget_batches(lengths, budget)]
    flat = [length for batch in batches for length in batch]
    assert flat == sorted(lengths, reverse=True)
    for batch in batches[:-1]:
        assert (len(batch) + 1) * batch[0] > budget


def test_equal_lengths_keep_their_order():
    assert [batch.tolist() for batch in token_budget_batches([4] * 5, 8)] == [[0, 1], [2, 3], [4]]


def test_a_wrong_prompt_ends_with_the_header_of_the_rows_own_answer():
    """`:` and a quote are one token (7): the prompt then ends before the colon (6), and the answer begins with both."""
    plain = EncodedPair(Segment([1, 11, 5, 6, 21], 4), Segment([5, 6, 21], 2))
    merged = EncodedPair(Segment([1, 12, 5, 7, 22], 3), Segment([5, 7, 22], 1))
    assert mismatched(merged, plain, None) == EncodedPair(Segment([1, 11, 5, 7, 22], 3), merged.direct)
    assert mismatched(plain, merged, None) == EncodedPair(Segment([1, 12, 5, 6, 21], 4), plain.direct)


def test_a_wrong_prompt_keeps_its_bos_where_the_direct_answer_has_one_too():
    plain = EncodedPair(Segment([1, 11, 5, 6, 21], 4), Segment([1, 5, 6, 21], 3))
    merged = EncodedPair(Segment([1, 12, 5, 7, 22], 3), Segment([1, 5, 7, 22], 2))
    assert mismatched(merged, plain, None).conditioned == Segment([1, 11, 5, 7, 22], 3)
    assert mismatched(plain, merged, None).conditioned == Segment([1, 12, 5, 6, 21], 4)


def test_a_direct_answer_without_a_header_leaves_prompts_as_they_are():
    """Superfiltering's begins with its own first token, which the other prompt may end with (a line break, 5)."""
    row = EncodedPair(Segment([1, 11, 5, 21, 22], 3), Segment([21, 22], 1))
    other = EncodedPair(Segment([1, 12, 5, 5, 23], 3), Segment([5, 23], 1))
    assert mismatched(row, other, None) == EncodedPair(Segment([1, 12, 5, 21, 22], 3), row.direct)


@pytest.mark.parametrize(
    ("row", "other", "longest"),
    [
        (([1, 5, 2], 2), ([3, 5, 2], 2), None),  # the same answer
        (([1, 5, 2], 2), ([1, 5, 4], 2), None),  # the same prompt
        (([1, 5, 2], 2), ([3, 3, 5, 4], 3), 3),  # too long
    ],
)
def test_what_is_no_wrong_pair_has_no_segments(row, other, longest):
    pairs = [EncodedPair(Segment(*given), Segment([5, given[0][-1]], 1)) for given in (row, other)]
    assert mismatched(*pairs, longest) == EncodedPair.unscorable(Status.MALFORMED)
    assert mismatched(pairs[0], EncodedPair.unscorable(Status.EMPTY_ANSWER), None).conditioned is None


# ---- what ends a turn -------------------------------------------------------------------------------------------


def test_what_ends_a_turn_is_the_end_of_turn_token_of_a_chat_and_eos_elsewhere():
    tokenizer = TOKENIZERS["no BOS added"]
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = {"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "Yes."}]}
    assert encode(tokenizer, MESSAGES.render(chat, tokenizer)).ending == (im_end,)
    assert encode(tokenizer, Example("Add.", "Yes.")).ending == (tokenizer.eos_token_id,)
    assert encode(tokenizer, Example("Add.", "Yes.<|endoftext|>")).ending == (
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )


def test_white_space_before_the_end_of_turn_token_belongs_to_the_end():
    tokenizer = TOKENIZERS["no BOS added"]
    tokens = tokenizer("\n<|im_end|>\n", add_special_tokens=False)["input_ids"]
    turns = Encoder(tokenizer).turns
    assert turns.ending(tokens) == tuple(tokens[:2])
    words = tokenizer("Human: more", add_special_tokens=False)["input_ids"]
    assert turns.ending(words) == tuple(words[:1])  # a template that ends a turn in words


def test_an_answer_that_was_cut_has_no_end_and_neither_has_one_that_fills_the_window():
    tokenizer = TOKENIZERS["no BOS added"]
    row = Example("Name three colours:", "one two three")
    size = len(tokenizer(row.prompt + row.answer)["input_ids"])
    assert encode(tokenizer, row, max_length=size).ending == (tokenizer.eos_token_id,)
    assert encode(tokenizer, row, max_length=size - 1, score_truncated=True).ending == ()
    assert encode(tokenizer, row, window=size).ending == ()
    assert encode(tokenizer, row, window=size + 1).ending == (tokenizer.eos_token_id,)
    assert encode(build_tokenizer(bos=False), row).ending != ()


def test_an_ending_stands_behind_what_is_left_of_an_answer():
    pair = EncodedPair(Segment([5, 6, 7, 8], 2), Segment([9, 7, 8], 1), ending=(2, 3))
    assert with_ending(pair) == Segment([5, 6, 7, 8, 2, 3], 2, 2)
    assert with_ending(pair, answer_tokens=1) == Segment([5, 6, 7, 2, 3], 2, 2)
    assert (with_ending(pair).scored, with_ending(pair).predicted) == (2, 4)
    assert token_count([pair, EncodedPair.unscorable(Status.EMPTY_ANSWER)]) == 6 + 3  # what a progress bar counts

"""Where answers begin in rows of which every token is trained on."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, build_tokenizer
from test_chat_template import CHATS, NO_SYSTEM, READ_PARTS, TEMPLATES, said, tokenizer_for, user
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ifd_trainer.data.answer_finder import PLAIN, TurnTexts, answer_finder
from ifd_trainer.data.distinct_prompts import Prompts
from ifd_trainer.data.encoding import Encoder
from ifd_trainer.data.formats import ALPACA, MESSAGES
from ifd_trainer.data.response_header import response_prefix
from ifd_trainer.data.token_rows import TokenRows
from ifd_trainer.errors import UserError
from ifd_trainer.method.reasons import Status

CALL = {"type": "function", "function": {"name": "get", "arguments": {"city": "Rome"}}}
MORE = {
    "system": [{"role": "system", "content": "Be brief."}, user("Name it."), said("Red.")],
    "thought": [user("Name it."), said("Red.", reasoning_content="Hm, which one?")],
    "thought in text": [user("Name it."), said("<think>\nHm, which one?\n</think>\n\nRed.")],
}
WITH_TOOLS = [
    user("Weather?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get", "content": "21 degrees"},
    said("It is warm."),
]
NAMES = sorted(name for name in TEMPLATES if not name.startswith(READ_PARTS))


def ids_of(tokenizer, messages: list[dict]) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_trained_on_whole_is_read_as_the_transform_reads_it(name, special):
    tokenizer = tokenizer_for(TEMPLATES[name], special)
    encoder = Encoder(tokenizer)
    chats = {kind: messages for kind, (messages, _) in CHATS.items()} | MORE
    if name in NO_SYSTEM:
        del chats["system"]
    rows = {kind: ids_of(tokenizer, messages) for kind, messages in chats.items()}
    finder = answer_finder(tokenizer, rows.values())
    assert finder.header is None  # that of the template, which knows it better
    spans = {kind: finder(ids) for kind, ids in rows.items()}
    prefix = response_prefix(tokenizer, Prompts.of(rows[kind][:start] for kind, (start, _) in spans.items()))
    read = TokenRows(encoder)
    for kind, ids in rows.items():
        (expected,) = encoder([MESSAGES.render({"messages": chats[kind]}, tokenizer)])
        assert read.pair(ids, *spans[kind], prefix) == expected, kind


@pytest.mark.parametrize("name", NAMES)
def test_turns_behind_the_last_answer_are_left_out(name):
    """A template may write what is around an earlier answer otherwise: the row has it as it is trained on."""
    tokenizer = tokenizer_for(TEMPLATES[name], special=True)
    rows = [ids_of(tokenizer, [user("Name it."), said("It is red."), user("And now?")]) for _ in range(2)]
    start, end = answer_finder(tokenizer, rows)(rows[0])
    pair = TokenRows(Encoder(tokenizer)).pair(rows[0], start, end, [])
    assert tokenizer.decode(pair.conditioned.ids[pair.conditioned.start :]).strip() == "It is red."


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_to_a_tools_result_is_the_last_one(name):
    tokenizer = tokenizer_for(TEMPLATES[name], special=True)
    try:
        (expected,) = Encoder(tokenizer)([MESSAGES.render({"messages": WITH_TOOLS}, tokenizer)])
        row = ids_of(tokenizer, WITH_TOOLS)
    except Exception:
        pytest.skip("a template without tools")
    if "21 degrees" not in tokenizer.decode(row):
        pytest.skip("a template that leaves out what a tool says")
    start, end = answer_finder(tokenizer, [row])(row)
    assert TokenRows(Encoder(tokenizer)).pair(row, start, end, []).conditioned == expected.conditioned


def test_a_chat_without_an_answer_has_none():
    tokenizer = build_tokenizer()
    rows = [ids_of(tokenizer, [user("a"), said("b")]), ids_of(tokenizer, [user("a")])]
    finder = answer_finder(tokenizer, rows)
    assert finder(rows[0]) is not None
    assert finder(rows[1]) is None


# ---- plain text -------------------------------------------------------------------------------------------------


def plain_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them: a token's text depends on where it stands."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    letters = " ".join(map(chr, [10, *range(33, 127), *map(ord, "éü")]))
    texts = ["### Instruction: Name it, please. ### Response: It is blue and green.", "Question: why? Answer: so."]
    tokenizer.train_from_iterator([letters, *texts * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = pytest.mark.parametrize("tokenizer", [plain_tokenizer(), metaspace_tokenizer()], ids=["bytes", "pieces"])


def found(tokenizer, texts: list[str], **options: str) -> list[str | None]:
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    finder = answer_finder(tokenizer, rows, **options)
    spans = map(finder, rows)
    return [
        None if span is None else tokenizer.decode(row[slice(*span)]) for span, row in zip(spans, rows, strict=True)
    ]


@TOKENIZERS
@pytest.mark.parametrize("texts", PLAIN, ids=[plain.headers[0].strip() for plain in PLAIN])
def test_answers_of_known_formats_stand_behind_their_headers(tokenizer, texts):
    opener, header = [*texts.openers, ""][0], texts.headers[0]
    rows = [f"{opener} Name it é, please. {header} It is blü {i}." for i in range(3)]
    assert [text.strip() for text in found(tokenizer, rows)] == [f"It is blü {i}." for i in range(3)]


@TOKENIZERS
def test_of_several_turns_the_last_one_with_a_header_counts(tokenizer):
    turns = "### Human: Hi ### Assistant: Yes? ### Human: Name it. ### Assistant: Red."
    assert [text.strip() for text in found(tokenizer, [turns, f"{turns} ### Human: Thanks"])] == ["Red.", "Red."]


def test_a_break_behind_all_headers_is_part_of_them():
    tokenizer = plain_tokenizer()
    rows = [f"### Instruction:\nName {i}.\n\n### Response:\nIt is {i}." for i in range(10)]
    assert found(tokenizer, rows) == [f"It is {i}." for i in range(10)]
    mixed = [*rows[:5], *(row.replace("Response:\n", "Response: ") for row in rows[5:])]
    assert found(tokenizer, mixed)[0] == "\nIt is 0."


def test_a_token_that_holds_the_headers_end_is_the_answers():
    tokenizer = build_tokenizer(extra=['### Response:"yes"'] * 50)
    tokenizer.chat_template = None
    whole = tokenizer('### Response:"yes"', add_special_tokens=False)["input_ids"]
    alone = tokenizer("### Response:", add_special_tokens=False)["input_ids"]
    assert whole[: len(alone)] != alone  # merged
    assert found(tokenizer, ['Name it. ### Response:"yes"'])[0].endswith(':"yes"')


@TOKENIZERS
def test_a_header_of_the_users_own(tokenizer):
    rows = [f"Ask {i} >> It is {i}." for i in range(4)] + ["Nothing here."]
    answers = found(tokenizer, rows, header=">>")
    assert [answer and answer.strip() for answer in answers] == [*(f"It is {i}." for i in range(4)), None]
    with pytest.raises(UserError, match="header='=>' stands in none of 5 rows of the training set"):
        found(tokenizer, rows, header="=>")


def test_where_too_few_rows_have_a_header_the_nearest_is_named():
    tokenizer = plain_tokenizer()
    rows = ["Ask. ### Response: Red."] * 4 + ["Once upon a time."] * 6
    with pytest.raises(UserError, match=r"stands in 50 % of them \('### Response:' in 40 %\), so nobody can tell"):
        found(tokenizer, rows)
    with pytest.raises(UserError, match=r"stands in 50 % of them, so nobody can tell which tokens are the answer"):
        found(tokenizer, rows[-3:])


def test_texts_around_turns_by_hand():
    texts = TurnTexts(("A:", "A: <think>"), ("Q:",))
    assert texts.answer(b"Q: 1 A: 2 Q: 3 A: <think>4") == (25, 26)
    assert texts.answer(b"Q: 1 A: 2 Q: 3") == (7, 10)
    assert texts.answer(b"A: 5") == (2, 4)
    assert texts.answer(b"Q: 1") is None


def test_an_answer_that_speaks_of_the_header_keeps_its_beginning():
    tokenizer = plain_tokenizer()
    row = "### Instruction:\nName it.\n\n### Response:It stands behind ### Response: in a prompt."
    assert found(tokenizer, [row]) == ["It stands behind ### Response: in a prompt."]


def test_a_header_with_nothing_behind_it_is_an_empty_answer():
    tokenizer = plain_tokenizer()
    row = tokenizer("### Instruction:\nName it.\n\n### Response:", add_special_tokens=False)["input_ids"]
    start, end = answer_finder(tokenizer, [row])(row)
    assert start == end == len(row)
    assert TokenRows(Encoder(tokenizer)).pair(row, start, end, []).status is Status.EMPTY_ANSWER


def test_the_direct_answer_of_plain_text_stands_behind_the_header_that_was_found():
    tokenizer = plain_tokenizer()
    prompts = [f"### Question: What is {i}?\n### Answer:" for i in range(5)]
    rows = tokenizer([f"{prompt} It is {i}." for i, prompt in enumerate(prompts)], add_special_tokens=False)[
        "input_ids"
    ]
    finder = answer_finder(tokenizer, rows)
    prefix = response_prefix(tokenizer, Prompts.of(row[: finder(row)[0]] for row in rows), found=finder.header)
    assert tokenizer.decode(prefix) == "### Answer:"


def test_alpacas_rows_are_read_as_the_transform_reads_them():
    tokenizer = plain_tokenizer()
    raw = [{"instruction": f"Name {i}.", "input": "", "output": f'"{i}" it is.'} for i in range(6)]
    examples = [ALPACA.render(row) for row in raw]
    rows = tokenizer([each.prompt + each.answer + tokenizer.eos_token for each in examples])["input_ids"]
    finder = answer_finder(tokenizer, rows)
    prefix = response_prefix(tokenizer, Prompts.of(row[: finder(row)[0]] for row in rows), found=finder.header)
    encoder = Encoder(tokenizer)
    read = TokenRows(encoder)
    assert [read.pair(row, *finder(row), prefix) for row in rows] == encoder(examples)


def test_the_tokens_of_other_kinds_of_numbers_are_read_too():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    row = ids_of(tokenizer, [user("a"), said("b")])
    assert answer_finder(tokenizer, [row])(np.array(row)) == answer_finder(tokenizer, [row])(row)

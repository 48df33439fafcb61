"""What gates decide from, measured on texts, and gates on the rows of a data set."""

from __future__ import annotations

import pytest
from datasets import Dataset

from ifd_trainer import CopyGate, LengthGate, MatchedGate, NoiseGate, gate_rows
from ifd_trainer.data.gate_measures import echo, measured, repetition
from ifd_trainer.errors import UserError

PROMPT = "Explain in two plain sentences how a violin makes its sound."


def noise(answer: str, prompt: str = PROMPT, gate: NoiseGate | None = None) -> str:
    rows = Dataset.from_dict({"instruction": [prompt], "output": [answer]})
    return gate_rows(rows, [gate or NoiseGate()])[0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("The bow makes a string shake. The body makes that louder.", "kept"),
        ("4", "kept"),
        ("да", "kept"),
        ("四", "kept"),
        ("", "near_empty"),
        ("  \n", "near_empty"),
        ("...", "near_empty"),
        ("- !", "near_empty"),
        ("As an AI language model, I cannot hear.", "boilerplate"),
        ("I'm sorry, but I cannot help.", "boilerplate"),
        ("Sure! Here is the answer: strings.", "boilerplate"),
        ("SURE,  here it is.", "boilerplate"),
        ("She said: sure, here it is.", "kept"),  # a greeting stands at the beginning
        ("The strings.\n\n### Instruction:\nName a cat.", "boilerplate"),
        ("The strings.<|im_end|>", "boilerplate"),
        ("the bow the bow the bow the bow the bow", "repetitive"),
        (PROMPT, "echoes_prompt"),
        (PROMPT.upper() + "!", "echoes_prompt"),
        ("How a violin makes its sound: the bow makes a string shake, and the body makes that louder.", "kept"),
    ],
)
def test_answers_that_are_none(answer, reason):
    assert noise(answer) == reason


def test_the_phrases_are_the_users():
    assert noise("Sure! Here it is.", gate=NoiseGate(greetings=())) == "kept"
    assert noise("I’d say: the bow.", gate=NoiseGate(greetings=("i'd say",))) == "boilerplate"
    assert noise("As an AI language model, I cannot.", gate=NoiseGate(refusals=False)) == "kept"
    assert noise("The bow [END]", gate=NoiseGate(leaks=("[end]",))) == "boilerplate"


def test_a_short_answer_echoes_a_short_prompt_word_by_word():
    assert noise("Name cats", "Name cats.") == "echoes_prompt"
    assert noise("Tom", "Name cats.") == "kept"


def test_runs_of_words_by_hand():
    """Of "a b a b a b a b" the five runs of four are two, each after its first one a repeat."""
    assert repetition(list("abababab")) == pytest.approx(3 / 5)
    assert repetition(list("abcde")) == 0
    assert repetition([]) == 0
    assert echo(list("abcde"), list("abcdf")) == pytest.approx(1 / 3)  # abcd; bcde and bcdf
    assert echo(list("abc"), list("abcdf")) == 0


def test_only_what_gates_read_is_measured():
    texts = [("Name a cat.", "Tom"), ("name a cat", " Tom. ")]
    found = measured(texts, [LengthGate()])
    assert found.answer_lengths.tolist() == [3, 4]
    assert found.prompt_lengths.tolist() == [11, 10]
    assert (found.letters.tolist(), found.groups) == ([0, 0], None)
    found = measured(texts, [CopyGate()], examples=[("Add one.", "2")])
    assert found.groups.tolist() == [0, 1, 1]
    assert (found.example_answer_lengths.tolist(), found.example_prompt_lengths.tolist()) == ([1], [8])
    assert len(measured([], [NoiseGate(), CopyGate()])) == 0


def test_rows_of_a_data_set_and_examples_in_another_format():
    rows = Dataset.from_dict(
        {
            "id": [5, 4, 3, 2],
            "instruction": ["Name a cat.", "Name a dog.", "Name a  dog!", "Name a bird."],
            "output": ["Tom", "Rex", "rex", "Sure! Here is one: Tweety."],
        }
    )
    examples = [{"messages": [{"role": "user", "content": "Name a cat."}, {"role": "assistant", "content": "Tom"}]}]
    assert gate_rows(rows, [NoiseGate(), CopyGate()]).tolist() == ["kept", "kept", "duplicate", "boilerplate"]
    seeds = [{"prompt": "Name a cat.", "completion": "Tom"}, {"prompt": "Name a fish.", "completion": "Wanda"}]
    assert gate_rows(rows, [CopyGate(), LengthGate()], seeds).tolist() == [
        "copy_of_example",
        "kept",
        "duplicate",
        "length_outlier",  # 3 and 5 characters: from 2 to 6
    ]
    assert gate_rows(rows, [CopyGate(of="prompt")], Dataset.from_list(seeds)).tolist()[0] == "copy_of_example"
    assert gate_rows(rows, [CopyGate()], examples).tolist()[0] == "kept"  # a chat's texts name its roles


def test_prompts_alone_may_be_the_same():
    rows = Dataset.from_dict({"instruction": ["Name a cat."] * 2, "output": ["Tom", "Felix"]})
    assert gate_rows(rows, [CopyGate()]).tolist() == ["kept", "kept"]
    assert gate_rows(rows, [CopyGate(of="prompt")]).tolist() == ["kept", "duplicate"]


def test_rows_that_cannot_be_read_are_next_to_empty_and_columns_are_numbers():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    bad = Dataset.from_dict({"messages": [None, chat]})
    assert gate_rows(bad, [NoiseGate()]).tolist() == ["near_empty", "kept"]
    rows = Dataset.from_dict({"instruction": ["a", "b"], "output": ["c", "d"], "spin_gap": [0.0, None]})
    assert gate_rows(rows, [MatchedGate()]).tolist() == ["matched", "kept"]
    with pytest.raises(UserError, match="A gate reads numbers in the column 'spin_gap', which holds string"):
        gate_rows(rows.remove_columns("spin_gap").add_column("spin_gap", ["x", "y"]), [MatchedGate()])
    with pytest.raises(UserError, match="attach it with `ifd-trainer score --spin`"):
        gate_rows(rows.remove_columns("spin_gap"), [MatchedGate()])
    with pytest.raises(UserError, match="No answers among the columns"):
        gate_rows(Dataset.from_dict({"n": [1]}), [NoiseGate()])
    with pytest.raises(UserError, match="got a list: load it first"):
        gate_rows([{"instruction": "a", "output": "b"}], [NoiseGate()])

"""Gates for synthetic rows, from numbers: bounds worked by hand, the order of gates, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifd_trainer import CopyGate, LengthGate, MatchedGate, NoiseGate
from ifd_trainer.errors import UserError
from ifd_trainer.method.gate_names import parse_gates
from ifd_trainer.method.gates import GateMeasures, gate
from ifd_trainer.method.spin import spin_gap


def measures(lengths: list[float], **more: object) -> GateMeasures:
    """Of answers of these lengths that nothing is wrong with."""
    zeros = np.zeros(len(lengths))
    plain = GateMeasures(
        np.array(lengths, dtype=float), zeros + 7, zeros + 9, zeros, zeros, zeros.astype(bool), order=None
    )
    arrays = {name: np.array(values) if isinstance(values, list) else values for name, values in more.items()}
    return replace(plain, **arrays)


def test_the_range_of_lengths_is_that_of_the_examples():
    """Mean 6, standard deviation of the population 2: from 2 to 10 with two of them, from 4 to 8 with one."""
    examples = {"example_answer_lengths": [4.0, 8.0]}
    rows = measures([1, 2, 4, 8, 10, 11], **examples)
    far = "length_outlier"
    assert gate(rows, [LengthGate()]).tolist() == [far, "kept", "kept", "kept", "kept", far]
    assert gate(rows, [LengthGate(1)]).tolist() == [far, far, "kept", "kept", far, far]


def test_without_examples_the_rows_that_passed_so_far_say_what_is_long():
    rows = measures([10, 10, 10, 10, 13, 1000], letters=[9, 9, 9, 9, 9, 0])
    assert gate(rows, [LengthGate(1.9)]).tolist() == ["kept"] * 5 + ["length_outlier"]
    assert gate(rows, [NoiseGate(), LengthGate(1.9)]).tolist() == ["kept"] * 4 + ["length_outlier", "near_empty"]
    with pytest.raises(UserError, match="there is one: give two examples or more"):
        gate(measures([5]), [LengthGate()])
    with pytest.raises(UserError, match="there is none"):
        gate(measures([]), [LengthGate()])


def test_prompts_have_a_range_of_their_own():
    examples = {"example_answer_lengths": [4.0, 6.0], "example_prompt_lengths": [8.0, 10.0]}
    rows = measures([5, 50, 5], prompt_lengths=[9, 9, 90], **examples)
    far = "length_outlier"
    assert gate(rows, [LengthGate(of="prompt")]).tolist() == ["kept", "kept", far]
    assert gate(rows, [LengthGate(of="both")]).tolist() == ["kept", far, far]


def test_noise_has_a_reason_each_and_the_first_one_counts():
    rows = measures(
        [9] * 6,
        letters=[0, 9, 9, 9, 1, 9],
        boilerplate=[True, True, False, False, False, False],
        repetition=[0.9, 0.9, 0.6, 0.5, 0.0, 0.0],
        echo=[1.0, 1.0, 1.0, 0.8, 0.0, 0.7],
    )
    found = ["near_empty", "boilerplate", "repetitive", "echoes_prompt", "kept", "kept"]
    assert gate(rows, [NoiseGate()]).tolist() == found
    loose = NoiseGate(least=0, repetition=2.0, echo=2.0)
    assert gate(rows, [loose]).tolist() == ["boilerplate"] * 2 + ["kept"] * 4


def test_copies_of_examples_and_of_one_another():
    """Two examples; row 0 says what the second does, rows 1, 2 and 4 the same, of which 4 has the lowest number."""
    rows = measures([5] * 5, groups=[0, 1, 1, 3, 3, 5, 3], order=[0, 9, 8, 7, 3])
    found = ["copy_of_example", "duplicate", "duplicate", "kept", "kept"]
    assert gate(rows, [CopyGate()]).tolist() == found
    by_place = ["copy_of_example", "kept", "duplicate", "kept", "duplicate"]
    assert gate(replace(rows, order=None), [CopyGate()]).tolist() == by_place
    usable = np.array([True, True, True, True, False])
    assert gate(rows, [CopyGate()], usable).tolist() == ["copy_of_example", "duplicate", "kept", "kept", None]
    with pytest.raises(UserError, match="which were not measured"):
        gate(measures([5, 5]), [CopyGate()])


def test_what_the_model_scores_as_its_own_is_matched():
    columns = {"spin_gap": np.array([-0.5, 0.1, 0.11, np.nan]), "own_agreement": np.array([0.0, 0.0, 0.9, 0.8])}
    rows = measures([5] * 4, columns=columns)
    assert gate(rows, [MatchedGate()]).tolist() == ["matched", "matched", "kept", "kept"]
    assert gate(rows, [MatchedGate(-0.2)]).tolist() == ["matched", "kept", "kept", "kept"]
    assert gate(rows, [MatchedGate(-9.0, agreement=0.9)]).tolist() == ["kept", "kept", "matched", "kept"]
    with pytest.raises(UserError, match="reads own_agreement, which the rows do not have: attach it"):
        gate(measures([5], columns={"spin_gap": np.array([0.5])}), [MatchedGate(agreement=0.5)])
    assert spin_gap([1.0, np.inf, np.nan], [0.25, 0.5, 0.5]).tolist()[0] == 0.75
    assert np.isnan(spin_gap([1.0, np.inf, np.nan], [np.inf, 0.5, 0.5])).all()


def test_of_several_gates_the_first_reason_counts_and_the_next_see_what_is_left():
    seen = []

    class Odd:
        name = "odd"

        def __call__(self, found: GateMeasures, passed: np.ndarray) -> np.ndarray:
            seen.append(passed.tolist())
            return np.where(found.answer_lengths % 2 == 1, "odd", None)

    rows = measures([3, 4, 99, 98], example_answer_lengths=[2.0, 6.0])
    assert gate(rows, [LengthGate(), Odd()]).tolist() == ["odd", "kept", "length_outlier", "length_outlier"]
    assert gate(rows, [Odd(), LengthGate()]).tolist() == ["odd", "kept", "odd", "length_outlier"]
    assert seen == [[True, True, False, False], [True] * 4]


@given(st.lists(st.integers(0, 60), min_size=2, max_size=20), st.floats(0.1, 4))
def test_the_range_is_that_of_mean_and_deviation_told_in_words(lengths, deviations):
    mean = sum(lengths) / len(lengths)
    spread = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
    low, high = LengthGate(deviations).range(np.array(lengths))
    assert (low, high) == pytest.approx((mean - deviations * spread, mean + deviations * spread))
    kept = gate(measures(lengths), [LengthGate(deviations)])
    assert [reason == "kept" for reason in kept] == [low <= length <= high for length in lengths]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LengthGate(0), "deviations must be a number above 0, got 0"),
        (lambda: LengthGate(math.inf), "deviations must be a number above 0, got inf"),
        (lambda: LengthGate(of="all"), "of must be one of answer, prompt, both, got 'all'"),
        (lambda: NoiseGate(least=-1), "least must be a whole number of at least 0, got -1"),
        (lambda: NoiseGate(echo=0.0), "echo must be a number above 0, got 0.0"),
        (lambda: NoiseGate(greetings="sure"), "greetings are phrases, none of them blank, got 'sure'"),
        (lambda: NoiseGate(leaks=[" "]), "leaks are phrases, none of them blank"),
        (lambda: CopyGate(0.2), "similarity must be a share from 0.5 to 1"),
        (lambda: CopyGate(of="answer"), "of must be one of row, prompt, got 'answer'"),
        (lambda: MatchedGate(math.nan), "margin must be a number of nats per token, got nan"),
        (lambda: MatchedGate(agreement=0.0), "agreement must be a number above 0 and at most 1, or None, got 0.0"),
        (lambda: gate(measures([5, 5]), []), "one at least; got none"),
        (lambda: gate(measures([5, 5]), [LengthGate(), LengthGate(3)]), "Each gate is given once, and one at least"),
        (lambda: parse_gates(["size"]), "'size' is no gate: they are length, noise, copies, matched."),
        (lambda: parse_gates(["length", "length:3"]), "the gate length is named twice"),
        (lambda: parse_gates(["noise:3"]), "'noise:3': the gate noise takes no number"),
        (lambda: parse_gates(["length:x"]), "'length:x': wants a number behind the colon"),
        (lambda: parse_gates(["copies:0.1"]), "'copies:0.1': similarity must be a share"),
    ],
)
def test_what_is_no_gate_is_refused(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert words in str(caught.value)


def test_gates_by_their_names():
    assert parse_gates(["noise", "length:3", "matched:-0.5", "copies:1"]) == [
        NoiseGate(),
        LengthGate(3.0),
        MatchedGate(-0.5),
        CopyGate(1.0),
    ]

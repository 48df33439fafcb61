"""Which rows say the same, in several languages; and that order, hash seed and a template's text do not matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import combinations
from string import ascii_lowercase

import numpy as np
import pytest
from conftest import ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from ifd_trainer.data.duplicates import duplicate_groups, normalised

FROG = (
    "A frog begins its life as an egg in a pond. A tadpole with gills and a tail hatches from it and eats algae. Its "
    "legs grow, its tail shrinks, and lungs take the place of the gills, until a young frog leaves the water."
)
FROSCH = (
    "Ein Frosch beginnt sein Leben als Ei im Teich. Daraus schlüpft eine Kaulquappe mit Kiemen und Schwanz, die Algen "
    "frisst. Ihr wachsen Beine, der Schwanz wird kürzer, und Lungen ersetzen die Kiemen, bis der junge Frosch an Land "
    "geht."
)
PANDA = (
    "大熊猫主要生活在中国西南部的高山竹林里，以竹子为食，每天要花十几个小时进食。它们的毛色黑白相间，性情温和，"
    "善于爬树，是国家一级保护动物，也是世界自然基金会的标志。"
)
SORT = """def insertion_sort(values):
    for i in range(1, len(values)):
        current = values[i]
        j = i - 1
        while j >= 0 and values[j] > current:
            values[j + 1] = values[j]
            j -= 1
        values[j + 1] = current
    return values"""
HOW_FROGS = "Describe in a few sentences how an animal such as a frog develops from the egg on."
WIE_FROSCH = "Beschreibe in einigen Sätzen, wie sich ein Tier wie der Frosch vom Ei an entwickelt."
WHAT_PANDA = "请用几句话介绍一下大熊猫的生活习性、外形特点以及它们的保护级别，要求语言简洁明了。"
HOW_SORT = "Write a Python function that sorts a list of numbers in place with the insertion sort algorithm."
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)


def same(first, second, similarity=0.85) -> bool:
    return duplicate_groups([first, second], similarity).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("What is AI?", "A  field.\n"), ("what is ai", "a field")),
        (("Say “hi” – now!!!", "It’s me."), ('Say "hi" - now!', "It's me…")),
        (("Nenne die Straße.", "Hauptstraße"), ("NENNE DIE STRASSE", "HAUPTSTRASSE!")),
        (("ｆｕｌｌ　ｗｉｄｔｈ", "１２"), ("full width", "12")),
        (("你好。", "你好！"), ("你好", "你好")),
        (("Add.", "x=f(a+b);"), ("Add", "x = f( a + b );\n")),
        (("A soft\u00adhyphen\u200b", ""), ("a softhyphen", "")),
    ],
)
def test_what_normalisation_makes_equal(first, second):
    assert same(first, second, None)
    assert same(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a+b", "a-b"),
        ("x < 3", "x > 3"),
        ("x = 3", "x == 3"),
        ("x == 3", "x != 3"),
        ("x == 3", "x === 3"),
        ("3.14", "314"),
        ("print(x)", "print('x')"),
        ("12:30", "12 30"),
        ("Résumé", "Resume"),
        ("ab", "a b"),
    ],
)
def test_what_normalisation_keeps_apart(first, second):
    for row in ((first, "yes"), (second, "yes")), (("Go.", first), ("Go.", second)):
        assert not same(*row, None)
        assert not same(*row)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((HOW_FROGS, FROG), (HOW_FROGS, FROG.replace("hatches", "htaches"))),
        ((HOW_FROGS, FROG), (HOW_FROGS.replace("sentences", "sentenses"), FROG.replace("until", "and then"))),
        ((HOW_FROGS, FROG), (HOW_FROGS + " Please.", FROG)),
        (("How do frogs grow up?", FROG), ("How do fogs grow up?", FROG)),
        (("青蛙是怎么长大的？", PANDA), ("青蛙怎么长大的？", PANDA)),
        ((WIE_FROSCH, FROSCH), (WIE_FROSCH.replace("Sätzen", "Saetzen"), FROSCH.replace("junge ", ""))),
        ((WHAT_PANDA, PANDA), (WHAT_PANDA.replace("一下", ""), PANDA.replace("主要", "")) ),
        ((HOW_SORT, SORT), (HOW_SORT.replace("numbers ", ""), SORT.replace("current", "item", 1))),
        ((HOW_SORT, SORT), (HOW_SORT, "# sorted in place\n" + SORT)),
    ],
)  # fmt: skip
def test_small_edits_of_long_rows_are_found_but_not_equal(first, second):
    assert same(first, second)
    assert not same(first, second, None)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # The same prompt, another answer; the same answer, another prompt.
        ((HOW_FROGS, FROG), (HOW_FROGS, "It lays eggs, tadpoles hatch, they get legs and lose their tails.")),
        (("Is the sky blue?", "Yes."), ("Is the grass green?", "Yes.")),
        (("Is the sky blue?", "Yes."), ("Is the sky blue?", "No.")),
        (("Fasse zusammen: " + FROSCH, "ja"), ("Fasse zusammen: " + FROSCH, "nein")),
        ((WHAT_PANDA, PANDA), ("请介绍一下金丝猴。", PANDA)),
        (("她喜欢他吗？", "喜欢"), ("他喜欢她吗？", "喜欢")),
        (("Write a joke about men.", "They forgot."), ("Write a joke about women.", "They forgot.")),
        (("Translate into German: The cat sleeps.", FROSCH), ("Translate into German: The dog barks.", FROSCH + "!?")),
        ((HOW_SORT + " Ascending.", SORT), (HOW_SORT + " Descending.", SORT + "[::-1]")),
        # Other numbers or signs are another exercise, in however long a text.
        (("What is 12 + 7?", "19"), ("What is 13 + 7?", "20")),
        (("What is 12 + 7?", "a number"), ("What is 12 * 7?", "a number")),
        ((HOW_FROGS + " Write 50 words.", FROG), (HOW_FROGS + " Write 60 words.", FROG)),
        ((HOW_SORT, SORT), (HOW_SORT, SORT.replace("> current", "< current"))),
        ((HOW_SORT, SORT + "\n# x != y"), (HOW_SORT, SORT + "\n# x = y")),
        ((HOW_FROGS + " 1 12", FROG), (HOW_FROGS + " 11 2", FROG)),
        (("Add 1 and 2.", "3"), ("Add 2 and 1.", "3")),
        # Numbers of the prompt are not those of the answer.
        ((HOW_FROGS + " 1", FROG), (HOW_FROGS, FROG + " 1")),
    ],
)
def test_rows_that_share_much_and_say_something_else(first, second):
    assert not same(first, second)
    assert not same(first, second, None)


def test_a_group_has_the_number_of_its_first_row():
    rows = [(HOW_SORT, SORT), ("a", "b"), (HOW_FROGS, FROG), ("A", "b."), (HOW_FROGS, FROG + " Really."), ("", "b")]
    groups = duplicate_groups(iter(rows))
    assert groups.tolist() == [0, 1, 2, 1, 2, 5]
    assert groups.dtype == np.int64
    assert duplicate_groups(rows, None).tolist() == [0, 1, 2, 1, 4, 5]


def test_groups_are_joined_over_rows_between():
    chain = [FROG]
    for old, new in (("egg in a pond", "unborn tadpole"), ("eats algae", "likes worms"), ("its tail", "the swim")):
        chain.append(chain[-1].replace(old, new))
    rows = [(HOW_FROGS, text) for text in chain]
    assert duplicate_groups(rows, 0.8).tolist() == [0, 0, 0, 0]
    assert duplicate_groups([rows[3], rows[0], rows[2]], 0.8).tolist() == [0, 1, 0]


def template_rows(number) -> list[tuple[str, str]]:
    """Short questions in a long template, all answered alike."""
    names = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo", "Kim", "Lee", "Max", "Ned", "Ole", "Pia"]
    tasks = [f"Is {a} {b} {c}?" for a in names for b in names for c in names if a != b != c]
    return [(PREAMBLE.format(task), "Yes.") for task in tasks[:: len(tasks) // number][:number]]


@pytest.mark.parametrize("rows", [12, 300])
def test_text_that_all_rows_share_makes_no_two_alike(rows):
    template = template_rows(rows)
    assert duplicate_groups(template).tolist() == [*range(rows)]
    again = PREAMBLE.format(HOW_FROGS), FROG
    near = PREAMBLE.format(HOW_FROGS.replace("few", "fwe")), FROG
    assert duplicate_groups([*template, again, near]).tolist() == [*range(rows), rows, rows]


def test_text_that_a_sixth_of_the_rows_share_counts_for_nothing_wherever_they_stand():
    template, others = template_rows(500), a_pool()[:2400]
    for rows in (template + others, others + template):
        assert duplicate_groups(rows).tolist() == [*range(2900)]


def test_where_all_of_a_prompt_is_shared_text_only_an_equal_one_is_alike():
    tasks = HOW_FROGS, HOW_FROGS.replace("few", "fwe")
    rows = [(tasks[i % 2], ascii_lowercase[i:] + ascii_lowercase[:i]) for i in range(24)]
    assert same((tasks[0], FROG), (tasks[1], FROG))
    rows += [(tasks[0], FROG), (tasks[1], FROG), (tasks[0], FROG + " Yes.")]
    assert duplicate_groups(rows)[24:].tolist() == [24, 25, 24]


def test_no_rows_and_rows_of_nothing():
    assert duplicate_groups([]).tolist() == []
    assert duplicate_groups([], None).tolist() == []
    assert duplicate_groups([("", ""), (" ", "\n"), ("", "."), ("\ud800", "")]).tolist() == [0, 0, 0, 3]


@pytest.mark.parametrize("similarity", [0.49, 1.01, -1, float("nan")])
def test_a_similarity_that_means_nothing_is_refused(similarity):
    with pytest.raises(ValueError, match=r"similarity must be 0\.5 to 1, or None"):
        duplicate_groups([], similarity)


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.85, 0.95])
@pytest.mark.parametrize("above", [True, False])
def test_pairs_above_a_similarity_are_found_and_no_others(similarity, above):
    rng = np.random.default_rng(0)
    jaccard = similarity + (0.03 if above else -0.03)
    shared = round(800 * jaccard / (1 + jaccard))  # of 400 shingles that each answer has
    rows = []
    for _ in range(100):
        kept, one, other = ("".join(rng.choice(list(ascii_lowercase), n)) for n in (shared, 400 - shared, 400 - shared))
        rows += [("Go on.", kept + one), ("Go on.", kept + other)]
    expected = [2 * (i // 2) if above else i for i in range(200)]
    assert duplicate_groups(rows, similarity).tolist() == expected


words = st.sampled_from(["one", "two", "three", "plus", "the", "of", "1", "2", "+", "-", "<", "好", "für"])
a_text = st.lists(words, min_size=0, max_size=12).map(" ".join)
some_rows = st.lists(st.tuples(a_text, a_text), max_size=12)


def partition(groups) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(groups == group).tolist()) for group in set(groups.tolist())}


@given(rows=some_rows, edits=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=8), data=st.data())
def test_groups_do_not_depend_on_the_order_of_the_rows(rows, edits, data):
    rows = [(prompt, f"{answer} {FROG}") for prompt, answer in rows]
    for row, place in edits if rows else ():
        prompt, answer = rows[row % len(rows)]
        place %= len(answer)
        rows.append((prompt, answer[:place] + answer[place + 1 :]))
    order = data.draw(st.permutations(range(len(rows))))
    groups = duplicate_groups([rows[i] for i in order])
    expected = {frozenset(order.index(i) for i in group) for group in partition(duplicate_groups(rows))}
    assert partition(groups) == expected
    assert all(group == np.flatnonzero(groups == group)[0] for group in groups)


def groups_one_by_one(rows, similarity) -> list[int]:
    """The definition with sets of Python, pair by pair, for rows without numbers and signs."""
    texts = [tuple(f" {normalised(text)} ".encode() for text in row) for row in rows]
    sets = {text: [{t[i : i + 4] for i in range(len(t) - 3)} for t in text] for text in texts}
    counts = [Counter(shingle for both in sets.values() for shingle in both[part]) for part in (0, 1)]
    most = max(10, len(sets) // 10)

    def jaccard(a, b) -> float:
        return len(a & b) / len(a | b) if a | b else 0

    def alike(one, other) -> bool:
        if one == other:
            return True
        for kept in (lambda part, shingle: True, lambda part, shingle: counts[part][shingle] <= most):
            (p, a), (q, b) = ([{(k, s) for s in sets[x][k] if kept(k, s)} for k in (0, 1)] for x in (one, other))
            if one[1] == other[1]:
                found = jaccard(p, q) >= 0.6 and jaccard(p | a, q | b) >= similarity
            else:
                found = (one[0] == other[0] or jaccard(p, q) >= similarity) and jaccard(a, b) >= similarity
            if not found:
                return False
        return True

    groups = list(range(len(rows)))
    for i, j in combinations(range(len(rows)), 2):
        if groups[i] != groups[j] and alike(texts[i], texts[j]):
            groups = [min(groups[i], groups[j]) if g in (groups[i], groups[j]) else g for g in groups]
    return groups


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.85])
@given(data=st.data())
@settings(max_examples=30)
def test_groups_are_those_of_the_definition(similarity, data):
    prose = st.sampled_from([HOW_FROGS, WIE_FROSCH, WHAT_PANDA, "Why?", FROG, FROSCH, PANDA])
    rows = data.draw(st.lists(st.tuples(prose, prose), min_size=1, max_size=4))
    edits = st.tuples(st.integers(0, 99), st.booleans(), st.integers(0, 99), st.integers(0, 20))
    for row, part, start, length in data.draw(st.lists(edits, max_size=14)):
        edited = list(rows[row % len(rows)])
        edited[part] = edited[part][:start] + edited[part][start + length :]
        rows.append(tuple(edited))
    assert duplicate_groups(rows, similarity).tolist() == groups_one_by_one(rows, similarity)


@given(some_rows)
def test_equal_rows_are_in_one_group_and_only_they_without_a_similarity(rows):
    keys = [(normalised(prompt), normalised(answer)) for prompt, answer in rows]
    assert duplicate_groups(rows, None).tolist() == [keys.index(key) for key in keys]
    near = duplicate_groups(rows).tolist()
    assert all(near[keys.index(key)] == group for key, group in zip(keys, near, strict=True))


@given(st.text(max_size=60), st.text(max_size=60))
@settings(max_examples=200)
def test_any_text_is_taken(prompt, answer):
    rows = [(prompt, answer), (answer, prompt), (f" {prompt}\n", f"{answer}  ")]
    groups = duplicate_groups(rows)
    assert groups[0] == groups[2] == 0


def a_pool() -> list[tuple[str, str]]:
    """More rows than the sample of shared text has, one of ten a near copy."""
    rng = np.random.default_rng(0)
    vocabulary = np.array(["".join(rng.choice(list("abcdefghijklmnopqrst"), 2 + i % 7)) for i in range(3000)])
    chosen = rng.choice(vocabulary, (2400, 40))
    rows = [(" ".join(row[:10]), " ".join(row[10:])) for row in chosen]
    return rows + [(prompt, answer + " indeed") for prompt, answer in rows[:240]]


def test_a_large_pool_in_another_order_and_with_other_hash_seeds(tmp_path):
    rows = a_pool()
    groups = duplicate_groups(rows)
    assert groups.tolist() == [*range(2400), *range(240)]
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = duplicate_groups([rows[i] for i in order])
    assert partition(shuffled) == {frozenset(np.argsort(order)[list(g)].tolist()) for g in partition(groups)}
    (tmp_path / "rows.json").write_text(json.dumps(rows[:50] + rows[2400:2450]))
    code = (
        "import json, sys; from ifd_trainer.data.duplicates import duplicate_groups; "
        "print(duplicate_groups(map(tuple, json.load(open(sys.argv[1])))).tolist())"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "rows.json")],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(run.stdout) == [*range(50), *range(50)]


def test_datasketch_is_imported_only_when_it_is_used():
    code = "import sys, ifd_trainer, ifd_trainer.data.duplicates; print('datasketch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


def test_real_rows_that_two_files_share_are_found_and_no_others():
    files = {name: SHARED / "data" / f"{name}.jsonl" for name in ("alpaca_cherry_5pct", "alpaca_mixed_1k")}
    if not all(path.exists() for path in files.values()):
        pytest.skip("the data are not here")
    rows, is_shared = [], []
    for path in files.values():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append((f"{row['instruction']}\n{row['input']}", row["output"]))
            is_shared.append(row.get("in_cherry_5pct", False))
    groups = duplicate_groups(rows)
    assert ((groups != np.arange(len(rows))) == np.array(is_shared)).all()
    assert (groups == duplicate_groups(rows, None)).all()

"""The docstring task: what is a paragraph, that no name gives the class away, and that nothing leaks."""

import ast
import hashlib
import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_analysis.study import docstrings
from lora_analysis.study.docstrings import (
    LIBRARIES,
    MASK,
    docstring_task,
    folded,
    mask_libraries,
    ngram_shares,
    prose,
)
from lora_analysis.study.task import TextTask

SMALL = 40
"""Paragraphs a side and class: enough to see the rules at work, read in about a second."""


@pytest.fixture(scope="module")
def task() -> TextTask:
    return docstring_task(held_out_per_class=SMALL, train_per_class=SMALL)


def sentence(*numbers: object) -> str:
    """A sentence of ten words like no other."""
    digits = hashlib.sha256(repr(numbers).encode()).hexdigest().translate(str.maketrans("0123456789", "ghijklmnoq"))
    return " ".join(digits[i : i + 6] for i in range(0, 60, 6)).capitalize() + "."


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six libraries of two folders with two files of four paragraphs each."""
    monkeypatch.setattr(docstrings, "_root", lambda library: tmp_path / library)
    for library in LIBRARIES:
        for folder in ("a", "b"):
            for file in ("one", "two"):
                write(
                    tmp_path / library / folder / f"{file}.py", *[sentence(library, folder, file, i) for i in range(4)]
                )
    return tmp_path


def write(path: Path, *paragraphs: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('"""' + "\n\n".join(paragraphs) + '\n"""\n', "utf-8")


def test_every_class_has_the_same_number_of_paragraphs_on_either_side(task: TextTask) -> None:
    assert task.classes == LIBRARIES
    assert set(Counter(task.train_labels).values()) == {SMALL}
    assert set(Counter(task.held_out_labels).values()) == {SMALL}
    assert all(source.paragraphs == 2 * SMALL and source.files for source in task.sources.values())


def test_no_name_of_a_library_is_left_in_any_text(task: TextTask) -> None:
    names = re.compile(r"numpy|scipy|torch|matplotlib|pandas|python|\b(np|plt|mpl|pd)\b", re.IGNORECASE)
    texts = task.train_texts + task.held_out_texts
    assert not [text for text in texts if names.search(text)]
    assert any(MASK in text for text in texts)


def test_no_text_is_on_both_sides_or_twice_on_one(task: TextTask) -> None:
    keys = Counter(folded(text)[:60] for text in task.train_texts + task.held_out_texts)
    assert keys.most_common(1)[0][1] == 1


def test_no_training_paragraph_holds_most_of_a_held_out_one(task: TextTask) -> None:
    shares = ngram_shares(task.held_out_texts, task.train_texts)
    assert max(share for found in shares for share in found.values()) <= 0.5


def test_the_task_does_not_depend_on_the_hash_seed_and_imports_no_library(task: TextTask) -> None:
    program = f"""
import sys
from lora_analysis.study.docstrings import docstring_task
before = set(sys.modules)
print(docstring_task(held_out_per_class={SMALL}, train_per_class={SMALL}).digest)
print(sorted(name for name in set(sys.modules) - before
             if name.split(".")[0] in ("numpy", "scipy", "torch", "matplotlib", "pandas")))
"""
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [task.digest, "[]"]


def test_a_folder_is_on_one_side_only(made_up: Path) -> None:
    task = docstring_task(held_out_per_class=8, train_per_class=8)
    folder_of = {
        text: f"{library}/{folder}"
        for library in LIBRARIES
        for folder in ("a", "b")
        for file in ("one", "two")
        for text in [mask_libraries(sentence(library, folder, file, i)) for i in range(4)]
    }
    held_out = {folder_of[text] for text in task.held_out_texts}
    assert tuple(folder_of[text] for text in task.held_out_texts) == task.held_out_groups
    assert held_out.isdisjoint(folder_of[text] for text in task.train_texts)


def test_any_first_part_of_a_side_mixes_the_classes(task: TextTask) -> None:
    assert len(set(task.held_out_labels[:SMALL])) == len(set(task.train_labels[:SMALL])) == len(LIBRARIES)


def test_a_paragraph_of_two_libraries_is_in_neither(made_up: Path) -> None:
    copied = sentence("copied")
    for library in ("numpy", "scipy"):
        write(made_up / library / "a" / "three.py", copied, sentence(library, "extra"))
    for library in set(LIBRARIES) - {"numpy", "scipy"}:
        write(made_up / library / "a" / "three.py", sentence(library, "extra"))
    task = docstring_task(held_out_per_class=8, train_per_class=8)
    assert copied not in task.train_texts + task.held_out_texts


def test_a_paragraph_twice_in_a_library_is_there_once_and_held_out(made_up: Path) -> None:
    copied = sentence("copied")
    for library in LIBRARIES:
        for folder in ("a", "b"):
            write(made_up / library / folder / "three.py", *[sentence(library, folder, "three", i) for i in range(2)])
    for folder in ("a", "b"):
        write(made_up / "torch" / folder / "three.py", copied, copied.replace(" ", "\n"), sentence(folder, "more"))
    task = docstring_task(held_out_per_class=9, train_per_class=9)
    assert task.held_out_texts.count(copied) <= 1
    assert copied not in task.train_texts


def test_a_training_paragraph_that_quotes_a_held_out_one_is_dropped(made_up: Path) -> None:
    (made_up / "pandas" / "a" / "long.py").write_text("#" * 9999, "utf-8")  # the largest folder is held out
    quoting = f"As is said elsewhere, {sentence('pandas', 'a', 'one', 0)}"
    write(made_up / "pandas" / "b" / "three.py", quoting)
    task = docstring_task(held_out_per_class=8, train_per_class=8)
    assert sentence("pandas", "a", "one", 0) in task.held_out_texts
    assert quoting not in task.train_texts


@pytest.mark.parametrize("folder", ["tests", "a/tests", "_vendor", "site-packages", "testing"])
def test_tests_and_vendored_packages_are_not_read(made_up: Path, folder: str) -> None:
    for library in LIBRARIES:
        write(made_up / library / folder / "more.py", *[sentence(library, "more", i) for i in range(9)])
    with pytest.raises(ValueError, match=r"expected 9 docstring paragraphs of standard library .* got 8"):
        docstring_task(held_out_per_class=9, train_per_class=8)


def test_no_file_makes_up_a_class(made_up: Path) -> None:
    for library in LIBRARIES:
        for folder in ("a", "b"):
            write(made_up / library / folder / "big.py", *[sentence(library, folder, "big", i) for i in range(99)])
    with pytest.raises(ValueError, match=r"got 48"):  # 40 of the big file, 4 of each small one
        docstring_task(held_out_per_class=49, train_per_class=40)


def test_a_file_that_is_no_python_is_passed_over(made_up: Path) -> None:
    (made_up / "numpy" / "a" / "template.py").write_text("def {name}(:", "utf-8")
    (made_up / "numpy" / "a" / "escape.py").write_text('"\\d"', "utf-8")
    assert docstring_task(held_out_per_class=8, train_per_class=8).sources["numpy"].files == 6


def test_too_few_paragraphs_are_an_error_that_names_the_library(made_up: Path) -> None:
    with pytest.raises(ValueError, match=r"of standard library for the train side, got 8\. .*train_per_class="):
        docstring_task(held_out_per_class=8, train_per_class=9)


@pytest.mark.parametrize("name", ["held_out_per_class", "train_per_class"])
def test_a_side_needs_a_paragraph(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        docstring_task(**{name: 0})


def test_a_library_that_is_not_installed_is_named() -> None:
    with pytest.raises(ValueError, match="no_such_library: expected an installed package"):
        docstrings._root("no_such_library")


def test_prose_is_whole_sentences_without_headers_parameters_and_code() -> None:
    docstring = """Return the sum of the elements over a given axis.

    Parameters
    ----------
    a : array_like
        Elements to sum, converted to an array where they are none.
    axis : the axis or axes along which a sum is performed here.

    Notes
    -----
    Arithmetic is modular when using integer types,
    and no error is raised on overflow.

    - A list item of more than eight words is not running prose.

    >>> add(1, 2) is three and this line has many words in it.
    3

    .. note:: This directive has enough words to be taken for prose.

    Too short to keep.

    this one goes on from somewhere else and is no sentence.

    This one has enough words but it breaks off before
    """
    assert list(prose(inspect.cleandoc(docstring))) == [
        "Return the sum of the elements over a given axis.",
        "Elements to sum, converted to an array where they are none.",
    ]


def test_docstrings_of_compiled_functions_are_found() -> None:
    tree = ast.parse("add_newdoc('numpy', 'sin', ('''\n    What sin is.\n    ''', 'x'))\nprint('no docstring')")
    assert "What sin is." in list(docstrings.docstrings(tree))
    assert "no docstring" not in list(docstrings.docstrings(tree))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("numpy.ndarray", "[LIB].ndarray"),
        ("A NumPy array, PyTorch and torchvision", "A [LIB] array, [LIB] and [LIB]vision"),
        ("mpl_toolkits, np., plt.plot", "[LIB]_toolkits, [LIB]., [LIB].plot"),
        ("the Standard Library of CPython", "the [LIB] of [LIB]"),
        ("input, npz, spd, PDF", "input, npz, spd, PDF"),
    ],
)
def test_names_and_aliases_are_masked_and_nothing_else(text: str, masked: str) -> None:
    assert mask_libraries(text) == masked


words = st.lists(st.sampled_from("abc"), max_size=12).map(" ".join)


@given(st.lists(words, max_size=4), st.lists(words, max_size=4), st.integers(1, 4))
def test_ngram_shares_are_those_of_the_definition(texts: list[str], references: list[str], n: int) -> None:
    def grams(text: str) -> set[str]:
        parts = text.split()
        return {" ".join(parts[i : i + n]) for i in range(len(parts)) if i + n <= len(parts)}

    for text, found in zip(texts, ngram_shares(texts, references, n=n), strict=True):
        for j, reference in enumerate(references):
            common = len(grams(text) & grams(reference))
            assert found.get(j, 0.0) == (common / len(grams(text)) if common else 0.0)


@given(st.text())
def test_folding_twice_is_folding_once_and_ignores_space(text: str) -> None:
    assert folded(folded(text)) == folded(text) == folded(f" {text}\n.")

"""The list of mutants follows the sources that it changes."""

from benchmarks.mutants import MUTANTS, ROOT, misplaced


def test_each_mutant_stands_in_its_file_once() -> None:
    assert misplaced() == []


def test_each_mutant_names_tests_that_are_there() -> None:
    named = {word for mutant in MUTANTS for word in mutant.tests.split() if word.startswith("tests/")}
    assert [path for path in sorted(named) if not (ROOT / path.split("::")[0]).exists()] == []

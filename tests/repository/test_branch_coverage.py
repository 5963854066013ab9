"""tools/branch_coverage.py: the limits, and the list of files; `make coverage` itself tries the rest."""

from branch_coverage import Counts, find_problems, list_files


def counts(branches: int = 100, covered: int = 95, left_out: int = 0) -> Counts:
    return Counts(
        lines=200,
        covered_lines=190,
        left_out_lines=left_out,
        branches=branches,
        covered_branches=covered,
    )


def test_ninety_percent_of_the_branches_are_enough() -> None:
    assert find_problems(counts(covered=90)) == []
    (problem,) = find_problems(counts(covered=87))
    assert "87.0 %" in problem
    assert "test 3 more," in problem


def test_the_lines_do_not_count() -> None:
    """Lines are covered sooner than branches, so a mixed figure would hide missed branches."""
    figures = counts(covered=89)
    assert figures.lines_percent == 95
    assert len(find_problems(figures)) == 1


def test_at_most_five_percent_of_the_lines_are_left_out() -> None:
    assert find_problems(counts(left_out=10)) == []
    (problem,) = find_problems(counts(left_out=30))
    assert "leaves out 13.0 %" in problem


def test_the_files_with_the_most_missed_branches_come_first() -> None:
    files = {"whole.py": counts(covered=100), "some.py": counts(covered=99), "most.py": counts(covered=40)}
    assert [line.split()[0] for line in list_files(files)] == ["60", "1"]
    assert "most.py" in list_files(files)[0]

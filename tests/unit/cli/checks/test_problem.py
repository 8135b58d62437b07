"""Problems of many hosts become one line."""

from __future__ import annotations

from hpcnn.cli.checks.problem import Problem, advice, merged
from hpcnn.errors import CommError


def test_error_is_split_into_what_is_wrong_and_what_to_do() -> None:
    problem = Problem.of(CommError("comm: no library (x); one is needed. Load it, or install one."))
    assert problem == Problem("comm: no library (x); one is needed", "Load it, or install one.", True)


def test_hosts_with_the_same_problem_are_counted() -> None:
    loads = [advice(f"{host}: the load is {load} on 4 cores", "Ask.") for host, load in zip("abc", (9, 8.5, 7))]
    other = [advice("c: shared memory is small", "Enlarge it."), Problem("packages missing: x", "Install it.")]
    found = merged([*loads, *other], {"a", "b", "c"})
    assert [problem.what for problem in found] == [
        "a: the load is 9 on 4 cores (and 2 more hosts like it)",
        "c: shared memory is small",
        "packages missing: x",
    ]
    assert merged(loads[:1], {"a"}) == loads[:1]

"""What is concluded from a self-test, on outcomes written by hand."""

from __future__ import annotations

from hpcnn.cli.checks.links import describe, judge

HOSTS = ["a", "a", "b", "b"]


def sums(seconds: float = 1e-3, wrong: tuple[int, ...] = ()) -> list[dict]:
    return [
        {"algorithm": name, "num_bytes": size, "wrong_ranks": wrong, "seconds": seconds, "predicted_s": price}
        for size in (4, 4096)
        for name, price in (("ring", 1e-3), ("mpi", None))
    ]


def outcome(*, slow: float = 1e-3, measured: bool = False, **more: object) -> dict:
    pairs = [
        {"ranks": (low, high), "seconds": slow if (low, high) == (1, 3) else 1e-3, "same_node": low // 2 == high // 2}
        for low in range(4)
        for high in range(low + 1, 4)
    ]
    return {"sums": sums(), "pairs": pairs, "pair_bytes": 4096, "measured": measured} | more


def test_messages_as_fast_as_predicted_are_fine() -> None:
    assert judge(outcome(), HOSTS, crowded=False) == []
    assert judge({"sums": [], "pairs": [], "pair_bytes": 4, "measured": False}, ["a"], crowded=False) == []


def test_wrong_sums_are_essential_and_name_algorithms_and_ranks() -> None:
    (problem,) = judge(outcome(sums=sums(wrong=(2, 3))), HOSTS, crowded=True)
    assert problem.essential
    assert problem.what == "all-reduce gave wrong sums (ring, mpi; rank 2 on b and 1 more)"


def test_slow_messages_are_advice_unless_ranks_wait_for_cores() -> None:
    slow = outcome(sums=sums(seconds=0.0101))
    (problem,) = judge(slow, HOSTS, crowded=False)
    assert not problem.essential
    assert "10 times as long as an ordinary cluster's links give" in problem.what
    assert judge(slow, HOSTS, crowded=True) == []
    assert judge(outcome(sums=sums(seconds=0.005)), HOSTS, crowded=False) == []
    (problem,) = judge(outcome(sums=sums(seconds=0.005), measured=True), HOSTS, crowded=False)
    assert "5 times as long as the machine file tells" in problem.what


def test_a_slow_pair_is_named_among_pairs_of_its_kind() -> None:
    (problem,) = judge(outcome(slow=0.02), HOSTS, crowded=False)
    assert problem.what == "slow link: 4.1 kB between ranks 1 (a) and 3 (b) took 20 ms, 20 times the usual"
    assert "--exclude=b" in problem.fix
    assert judge(outcome(slow=0.0029), HOSTS, crowded=False) == []


def test_description_counts_what_was_right() -> None:
    lines = describe(outcome(slow=0.02))
    assert lines["sums"] == "ring, mpi: 4 of 4 right, 4 B to 4.1 kB"
    assert lines["speed"] == "all-reduce of 4.1 kB by ring in 1 ms, 4.1 MB/s (built-in machine: 1 ms)"
    assert lines["slowest pair"].startswith("ranks 1 and 3, 20 ms")
    assert describe({}) == {}

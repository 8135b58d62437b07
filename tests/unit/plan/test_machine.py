"""What a machine file may say, and what a link charges."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpcnn.errors import PlanError
from hpcnn.plan.fabric import Fabric
from hpcnn.plan.machine import (
    DEFAULT_NETWORK,
    DEFAULT_NODE,
    Link,
    Machine,
    Measured,
    Rates,
    from_toml,
    load,
    to_toml,
)

TABLE = Link(
    alpha_s=1e-5,
    beta_s_per_byte=1e-9,
    crossing=1.25,
    sizes=(4, 1000, 2000),
    copy_s=(1e-5, 2e-5, 6e-5),
    sum_s=(2e-5, 3e-5, 9e-5),
)
MACHINE = Machine(
    start_s=2e-6,
    gamma_s_per_byte=3e-10,
    node=Link(alpha_s=1e-6, beta_s_per_byte=1e-10),
    network=TABLE,
    rates=Rates(linear_flops_per_s=1e9),
    measured=Measured(hosts=2, ranks=4, cores=8, mpi="MPICH 5.0.2"),
)


@pytest.mark.parametrize("machine", [MACHINE, replace(MACHINE, node=None), replace(MACHINE, network=None)])
def test_a_machine_that_was_written_is_read_back_equal(machine, tmp_path):
    path = tmp_path / "machine.toml"
    path.write_text(to_toml(machine))
    assert machine == load(path)
    assert hash(machine) == hash(load(path))


def test_what_was_not_measured_is_not_in_the_file():
    assert "[network]" not in to_toml(replace(MACHINE, network=None))
    assert "[node]" not in to_toml(replace(MACHINE, node=None))


def test_a_link_that_was_not_measured_is_the_built_in_one():
    assert DEFAULT_NODE == Machine(network=TABLE).link(same_node=True)
    assert DEFAULT_NETWORK == Machine(node=TABLE).link(same_node=False)
    assert TABLE == MACHINE.link(same_node=False)
    assert MACHINE.node == MACHINE.link(same_node=True)


def test_a_link_without_a_table_charges_the_line_and_additions():
    link = Link(alpha_s=1e-5, beta_s_per_byte=1e-9)
    assert 1e-5 + 1e-6 == pytest.approx(link.seconds(1000))
    assert 1e-5 + 1.5e-6 == pytest.approx(link.seconds(1000, summing=True, gamma_s_per_byte=5e-10))


@pytest.mark.parametrize(
    ("num_bytes", "copy_s", "sum_s"),
    [
        (1, 1e-5, 2e-5),
        (4, 1e-5, 2e-5),
        (502, 1.5e-5, 2.5e-5),
        (1000, 2e-5, 3e-5),
        (1500, 4e-5, 6e-5),
        (2000, 6e-5, 9e-5),
        (4000, 14e-5, 21e-5),
    ],
)
def test_a_table_is_followed_from_point_to_point_and_beyond_its_end(num_bytes, copy_s, sum_s):
    assert copy_s == pytest.approx(TABLE.seconds(num_bytes))
    # What adding costs has been measured with it.
    assert sum_s == pytest.approx(TABLE.seconds(num_bytes, summing=True, gamma_s_per_byte=1.0))


def test_a_table_that_ends_downhill_is_not_followed_downhill():
    link = Link(alpha_s=1e-5, beta_s_per_byte=1e-9, sizes=(4, 8), copy_s=(2e-5, 1e-5), sum_s=(2e-5, 1e-5))
    assert 1e-5 == link.seconds(1 << 30)


def test_a_table_of_one_length_goes_on_with_the_line():
    link = Link(alpha_s=1e-5, beta_s_per_byte=1e-9, sizes=(4,), copy_s=(2e-5,), sum_s=(3e-5,))
    assert 2e-5 + 1e-6 == pytest.approx(link.seconds(1004))


GOOD = to_toml(MACHINE)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("alpha_s = 1e-06", "alpha_s = nan", "'node.alpha_s' .* positive"),
        ("alpha_s = 1e-06", "alpha_s = inf", "'node.alpha_s' .* positive"),
        ("alpha_s = 1e-06", "alpha_s = -1e-06", "'node.alpha_s' .* positive"),
        ("alpha_s = 1e-06", "alpha_s = 0.0", "'node.alpha_s' .* positive"),
        ("alpha_s = 1e-06", 'alpha_s = "fast"', "'node.alpha_s'"),
        ("alpha_s = 1e-06", "", "alpha_s"),
        ("alpha_s = 1e-06", "alpha_s = ", "not valid TOML"),
        ("alpha_s = 1e-06", "latency = 1e-06", "unknown key 'node.latency'"),
        ("start_s = 2e-06", "bandwidth = 2e-06", "unknown key 'bandwidth'"),
        ("start_s = 2e-06", "start_s = -2e-06", "'start_s' .* positive"),
        ("crossing = 1.25", "crossing = 0.5", "'network.crossing' .* at least 1"),
        ("6e-05", "-6e-05", "'network.copy_s' .* positive"),
        ("    6e-05,\n", "", "equally long"),
        ("    2000,\n", "    20,\n", "must ascend"),
        ("linear_flops_per_s = 1000000000.0", "linear_flops_per_s = 0.0", "'rates.linear_flops_per_s' .* positive"),
        ("hosts = 2", "hosts = 2.5", "'measured.hosts'"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_key_and_what_to_do(old, new, words):
    assert old in GOOD
    with pytest.raises(PlanError, match=rf"^machine: here\.toml: .*{words}.*hpcnn profile --out here\.toml") as caught:
        from_toml(GOOD.replace(old, new, 1), "here.toml")
    assert "\n" not in str(caught.value)


def test_a_file_that_was_cut_off_anywhere_is_refused():
    text = GOOD.rstrip()
    assert MACHINE == from_toml(text)
    for length in range(len(text)):
        with pytest.raises(PlanError, match=r"^machine: "):
            from_toml(text[:length])


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(PlanError, match=r"cannot read .*nothing\.toml.*hpcnn profile"):
        load(tmp_path / "nothing.toml")
    with pytest.raises(PlanError, match="cannot read"):
        load(tmp_path)


def test_messages_are_cut_shorter_on_slow_links():
    machine = Machine(network=Link(alpha_s=1e-4, beta_s_per_byte=8e-8), node=Link(alpha_s=1e-6, beta_s_per_byte=1e-10))
    assert 1 << 16 == Machine(network=Link(alpha_s=1e-4, beta_s_per_byte=8e-7)).segment_bytes(single_node=False)
    assert 1 << 16 == machine.segment_bytes(single_node=False)
    assert 1 << 20 == machine.segment_bytes(single_node=True)
    between = Machine(network=Link(alpha_s=1e-4, beta_s_per_byte=8e-9)).segment_bytes(single_node=False)
    assert 0.005 < between * 8e-9 <= 0.01


DESCRIBED = """
[network]
alpha_s = 2e-6
beta_s_per_byte = 1e-10
[fabric]
kind = "fat-tree"
switch_nodes = [4, 16]
oversubscription = [1.0, 2.0]
[described]
sources = "made up"
"""


def test_a_described_machine_needs_no_measurement_and_is_read_back() -> None:
    machine = from_toml(DESCRIBED)
    assert machine.fabric == Fabric(kind="fat-tree", switch_nodes=(4, 16), oversubscription=(1.0, 2.0))
    assert from_toml(to_toml(machine)) == machine


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("[4, 16]", "[4, 18]", "must each be a multiple of the one before"),
        ("[4, 16]", "[4]", "must be equally long"),
        ("[1.0, 2.0]", "[1.0, -2.0]", r"'fabric.oversubscription' \(=-2.0\) must be a positive number"),
        ('"fat-tree"', '"hypercube"', "'fabric.kind'"),
        ('"fat-tree"', '"torus"', r"'fabric.shape' \(=\[\]\) must name the nodes"),
        ("switch_nodes", "switches", "unknown key 'fabric.switches'"),
        ('sources = "made up"', "ranks_per_node = 2", "sources"),
        ('"made up"', '"made up"\nranks_per_node = 2', r"for several ranks a node \[node\]"),
        ('"made up"', '"made up"\nranks_per_node = 0', "must be"),
        ('"made up"', '"made up"\nthread_efficiency = 1.5', "at most 1"),
        ("[network]", "[node]", r"\[network\].* must be described"),
        ("[described]", "[measured]\nhosts = 1\nranks = 1\ncores = 1\nmpi = 'x'\n[described]", "has both"),
    ],
)
def test_descriptions_that_make_no_machine_are_refused(old: str, new: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        from_toml(DESCRIBED.replace(old, new))

"""The table of a scaling study: means of repeats, speed-up and efficiency, and lines that are no measurement."""

from __future__ import annotations

import pytest

from hpcnn.report.scale_table import read_scale_table

HEADER = "model,mode,plan,exchange,algorithm,ranks,repeat,global_batch,step_s,images_per_second,predicted_step_s,status"


def table(tmp_path, *lines):
    (tmp_path / "scaling.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    return read_scale_table(tmp_path)


def test_means_speedup_and_efficiency(tmp_path):
    found = table(
        tmp_path,
        "vgg16,strong,data,allreduce,ring,2,1,64,0.2,320,0.21,finished",
        "vgg16,strong,data,allreduce,ring,8,1,64,0.1,640,,finished",
        "vgg16,strong,data,allreduce,ring,8,2,64,0.3,213,,finished",
        "vgg16,strong,data,allreduce,ring,8,3,64,0.11,582,,finished",
        "vgg16,strong,hybrid,allreduce,ring,8,1,64,0.05,1280,,finished",
        "vgg16,weak,data,allreduce,ring,1,1,32,0.2,160,,finished",
        "vgg16,weak,data,allreduce,ring,4,1,128,0.25,512,,finished",
    )
    data, hybrid, weak = found.curves
    assert (data.label, hybrid.label, weak.label) == ("strong data", "strong hybrid", "weak data")
    two, eight = data.points
    # on two ranks taken for twice as fast as one
    assert (two.ranks, two.speedup, two.efficiency, two.predicted_step_s) == (2, 2.0, 1.0, 0.21)
    assert (eight.ranks, eight.repeats, eight.fastest_s, eight.slowest_s) == (8, 3, 0.1, 0.3)
    assert eight.step_s == pytest.approx(0.17)
    assert eight.speedup == pytest.approx(2 * 0.2 / 0.17)
    assert eight.efficiency == pytest.approx(2 * 0.2 / 0.17 / 8)
    # whatever else was measured starts at the one point on the fewest ranks
    assert [point.ranks for point in hybrid.points] == [2, 8]
    assert [point.speedup for point in hybrid.points] == pytest.approx([2.0, 8.0])
    assert weak.points[1].speedup == pytest.approx(512 / 160)
    assert found.notes == []


def test_a_lone_first_point_is_a_part_of_all_curves_and_none_itself(tmp_path):
    found = table(
        tmp_path,
        "vgg16,strong,data,allreduce,auto,1,1,64,0.4,160,,finished",
        "vgg16,strong,data,allreduce,ring,2,1,64,0.25,256,,finished",
        "vgg16,strong,hybrid,allreduce,ring,2,1,64,0.2,320,,finished",
    )
    assert [(curve.label, [point.ranks for point in curve.points]) for curve in found.curves] == [
        ("data ring", [1, 2]),
        ("hybrid ring", [1, 2]),
    ]
    assert [curve.points[1].speedup for curve in found.curves] == pytest.approx([1.6, 2.0])


def test_what_was_not_measured_is_named_with_its_reason(tmp_path):
    lines = ["vgg16,strong,data,allreduce,ring,4,0,64,,,,failed", "x,,,,,many,,,1,,,finished", "x"]
    found = table(tmp_path, *lines)
    assert found.curves == []
    assert any("on 4 ranks was not measured (failed)" in note for note in found.notes)
    assert any("without a number of ranks" in note for note in found.notes)
    many = [f"vgg16,strong,data,allreduce,ring,{ranks},0,64,,,,pending" for ranks in range(1, 31)]
    assert table(tmp_path, *many).notes[-1] == "And 20 more."


@pytest.mark.parametrize("text", ["", "ranks\n", "\x00\x01", "a,b\n1,2,3,4\n", "ranks,step_s\n2,nan\n2,-1\n2,inf\n"])
def test_a_table_that_is_none_has_no_curves(tmp_path, text):
    (tmp_path / "scaling.csv").write_text(text)
    assert read_scale_table(tmp_path).curves == []

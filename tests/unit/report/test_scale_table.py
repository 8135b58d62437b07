"""The table of a scaling study: medians of repeats, speed-up and efficiency, and lines that are no measurement."""

from __future__ import annotations

import pytest

from hpcnn.report.scale_table import read_scale_table

HEADER = "model,mode,plan,exchange,algorithm,ranks,repeat,global_batch,step_s,images_per_second,predicted_step_s,status"


def table(tmp_path, *lines):
    (tmp_path / "scaling.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    return read_scale_table(tmp_path)


def test_medians_speedup_and_efficiency(tmp_path):
    found = table(
        tmp_path,
        "vgg16,strong,data,allreduce,ring,2,0,64,0.2,320,0.21,done",
        "vgg16,strong,data,allreduce,ring,8,0,64,0.1,600,,done",
        "vgg16,strong,data,allreduce,ring,8,1,64,0.3,700,,done",
        "vgg16,strong,data,allreduce,ring,8,2,64,0.11,640,,done",
        "vgg16,strong,hybrid,allreduce,ring,8,0,64,0.05,1280,,done",
    )
    data, hybrid = found.curves
    assert (data.label, hybrid.label) == ("data", "hybrid")
    two, eight = data.points
    assert (two.ranks, two.speedup, two.efficiency, two.predicted_step_s) == (2, 1.0, 1.0, 0.21)
    assert (eight.ranks, eight.repeats, eight.step_s, eight.fastest_s, eight.slowest_s) == (8, 3, 0.11, 0.1, 0.3)
    assert eight.speedup == pytest.approx(2.0)
    assert eight.efficiency == pytest.approx(0.5)
    assert hybrid.points[0].speedup == 1.0
    assert found.notes == []


def test_what_was_not_measured_is_named_with_its_reason(tmp_path):
    found = table(tmp_path, "vgg16,strong,data,allreduce,ring,4,0,64,,,,failed: no room", "x,,,,,many,,,1,,,done", "x")
    assert found.curves == []
    assert any("on 4 ranks was not measured: failed: no room" in note for note in found.notes)
    assert any("without a number of ranks" in note for note in found.notes)


@pytest.mark.parametrize("text", ["", "ranks\n", "\x00\x01", "a,b\n1,2,3,4\n", "ranks,step_s\n2,nan\n2,-1\n2,inf\n"])
def test_a_table_that_is_none_has_no_curves(tmp_path, text):
    (tmp_path / "scaling.csv").write_text(text)
    assert read_scale_table(tmp_path).curves == []

"""Report: whether the anchor held, by stage, over time and by module."""

from __future__ import annotations

import numpy as np
from reports import run

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.plots import HeatMap, Plot
from peso.evaluation.report.sections.anchor import anchor
from peso.evaluation.report.tables import Quantity


def section(*runs):
    return anchor(Comparison(runs, [5, 10]))


def test_ratios_are_drawn_of_the_systems_that_anchor() -> None:
    found = section(run("single", "single", 0.5), run("peso", "peso", 0.6, penalty=0.1))
    (over_time,) = [plot for plot in found.plots if isinstance(plot, Plot)]
    assert over_time.name == "anchor-gradient"
    (line,) = over_time.series
    assert line.label == "peso"
    np.testing.assert_allclose(line.y[:5], [0.02, 0.1, 0.16, 0.2, np.nan])
    np.testing.assert_allclose(line.x[:4], [0.125, 0.375, 0.625, 0.875])  # stage 1 is the first that is drawn
    assert any("the penalty's gradient was 12 %" in paragraph for paragraph in found.paragraphs)


def test_maps_show_each_module_in_its_place() -> None:
    found = section(run("single", "single", 0.5), run("peso", "peso", 0.6, penalty=0.1))
    maps = [plot for plot in found.plots if isinstance(plot, HeatMap)]
    assert len(maps) == 2
    assert (maps[0].rows, maps[0].columns) == (["0", "1"], ["up", "q"])
    np.testing.assert_allclose(maps[0].values, [[0.1, 0.1], [1.1, 1.1]])


def test_the_table_has_a_row_a_stage_and_says_what_is_not_known() -> None:
    (table,) = section(run("single", "single", 0.5), run("peso", "peso", 0.6, penalty=0.1)).tables
    assert len(table.rows) == 8  # two systems, stages 1 to 4
    single, peso = table.rows[0], table.rows[4]
    ratio = table.columns.index("Gradient ratio")
    assert single[ratio] is None
    assert repr(peso[ratio]) == repr(Quantity(0.12, decimals=4))  # nan != nan
    assert peso[table.columns.index("ρ̄")] == "4.4e+04"


def test_without_adapters_that_moved_there_is_no_section() -> None:
    assert anchor(Comparison([run("none", "none", 0.5, learns=False)], [5, 10])) is None


def test_maps_of_distances_share_one_scale() -> None:
    runs = [run(name, name, 0.5, penalty=1e-3) for name in ("single", "peso")]
    maps = [plot for plot in section(*runs).plots if isinstance(plot, HeatMap)]
    assert len({plot.scale for plot in maps}) == 1
    assert maps[0].scale == (0, max(plot.values.max() for plot in maps))

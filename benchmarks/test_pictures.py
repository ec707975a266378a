"""The pictures in `results/` can be read: nothing in them overlaps, and every contender has its own colour."""

import itertools

import pictures
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

RESULTS = sorted(pictures.RESULTS.glob("*.json"))
PICTURES = [(path, picture) for path in RESULTS for picture in pictures.pictures(path)]


def box(artist):
    return artist.get_window_extent()


@pytest.mark.parametrize(("results", "picture"), PICTURES, ids=lambda value: getattr(value, "stem", ""))
def test_no_label_overlaps_another_and_the_legend_hides_nothing(results, picture):
    figure = pictures.figure(picture, pictures.date(results))
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    for axes in figure.axes:
        assert not box(legend).overlaps(axes.get_tightbbox())
        texts = [axes.title, *axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
        visible = [text for text in texts if text.get_text() and figure.bbox.overlaps(box(text))]
        for one, other in itertools.combinations(visible, 2):
            assert not box(one).overlaps(box(other)), (one.get_text(), other.get_text())


@pytest.mark.parametrize(("results", "picture"), PICTURES, ids=lambda value: getattr(value, "stem", ""))
def test_the_legend_names_every_contender_that_is_drawn(results, picture):
    (legend,) = pictures.figure(picture, "").legends
    named = {text.get_text() for text in legend.get_texts()}
    assert named == {x.contender for x in picture.lines} | set(picture.barred)


def test_contenders_of_one_picture_have_different_colours():
    for _, picture in PICTURES:
        names = {entry.contender for entry in [*picture.lines, *picture.bars]}
        assert len({pictures.COLOURS[name] for name in names}) == len(names)


def test_recorded_dates_come_before_the_commits_date(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"date": "2026-11-29"}')
    assert pictures.date(path) == "measured 2026-11-29"
    path.write_text("{}")
    assert pictures.date(path) == "date not recorded"

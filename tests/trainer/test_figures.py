"""The figures of a run have labels that can be read, and every value in view."""

import itertools

import figures
import numpy as np
import pytest
from data import Dataset, Pixels
from matplotlib.backends.backend_agg import FigureCanvasAgg
from model import NORMS
from records import Epoch
from steps import Results


def history(epochs, *, right=False, layers=5, scale=1.0):
    """Losses that fall by a quarter each time, or to zero halfway where all is right."""
    told = []
    for e in range(epochs):
        zero = right and 2 * e >= epochs - 1
        loss, accuracy = (0.0, 1.0) if zero else (scale * 0.75**e, 1 - 0.3 * 0.8**e)
        drift = {f"Block_{i}/BatchNorm2d_0": [0.7**e * (i + 1), 0.5**e] for i in range(layers)}
        told.append(Epoch(loss, accuracy, 1.1 * loss, accuracy, accuracy, drift, 1.0, 0.0))
    return told


def classified(classes, wrong):
    """Results on images of so many classes, the first of which are wrong."""
    y = np.arange(4 * classes) % classes
    predicted = np.where(np.arange(len(y)) < wrong, (y + 1) % classes, y)
    x = np.random.RandomState(0).rand(len(y), 4, 4, 1).astype(np.float32)
    names = tuple(f"class {i}" for i in range(classes))
    confidence = np.linspace(0.5, 1, len(y))
    return Results(confidence, predicted, confidence), Dataset(
        x, y, x, y, Pixels(0, 1, 0, 1), names
    )


def labels(figure):
    """The boxes of the labels in view at each axis, when the figure is drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for axes in (axes for axes in figure.axes if axes.get_label() != "<colorbar>"):
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            low, high = sorted(limits)
            shown = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            texts = [tick.label1 for tick in shown if tick.label1.get_text()]
            yield axes, axis, [text.get_window_extent(renderer) for text in texts]


CASES = {
    "one epoch": (1, {}, 10, 5),
    "fifteen epochs": (15, {}, 10, 5),
    "a loss that hardly changes": (2, {"scale": 0.23}, 3, 1),
    "losses of many magnitudes": (60, {}, 30, 7),
    "all right": (15, {"right": True}, 10, 0),
    "all right at once": (1, {"right": True}, 2, 0),
    "two classes, two epochs": (2, {"right": True}, 2, 3),
    "a hundred classes, nineteen layers": (15, {"layers": 19}, 100, 100),
}


@pytest.mark.parametrize("case", CASES)
def test_labels_and_values_can_be_seen(case):
    epochs, how, classes, wrong = CASES[case]
    told = history(epochs, **how)
    drawn = [figures.draw_history(told), figures.draw_confusion(*classified(classes, wrong))]
    drawn += [figures.comparison(dict.fromkeys(NORMS, told))]
    drawn += [figures.draw_drift(told)] if epochs > 1 else []
    for figure in drawn:
        for axes, axis, boxes in labels(figure):
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
            least = 1 if axis is axes.xaxis and epochs == 1 else 2
            assert len(boxes) >= least, axes.get_title()
        for axes in figure.axes:
            for line in axes.get_lines() if axes.get_title() else ():
                x, y = np.asarray(line.get_data(), float)
                low, high = axes.get_ylim()
                assert np.all((low <= y) & (y <= high) | np.isnan(y)), axes.get_title()
                if axes.get_xlabel() == "epoch" and len(x) == epochs:
                    assert axes.get_xlim()[0] <= 1
                    assert axes.get_xlim()[1] - axes.get_xlim()[0] >= 0.4


def test_class_names_are_no_formulas_and_do_not_overlap():
    results, dataset = classified(3, 12)
    names = ("$x^$", "nothing but dogs", "nothing but cats")
    dataset = dataset._replace(names=names)
    figure = figures.draw_confusion(results, dataset)
    for _, _, boxes in labels(figure):
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    shown = [text.get_text().replace(r"\$", "$") for text in figure.axes[0].get_yticklabels()]
    assert shown == ["$x^$", "nothing but d…", "nothing but c…"]
    sheet = figures.draw_mistakes(results, dataset)
    canvas = FigureCanvasAgg(sheet)
    canvas.draw()
    boxes = [axes.title.get_window_extent(canvas.get_renderer()) for axes in sheet.axes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_losses_of_zero_are_apart_from_others():
    axes = figures.draw_history(history(15, right=True)).axes[0]
    low, high = axes.get_ylim()
    assert low == 0
    assert high < 2


def test_a_norm_has_one_color():
    told = history(3)
    colors = []
    for norms in (NORMS, NORMS[::-1], NORMS[1:3]):
        lines = figures.comparison(dict.fromkeys(norms, told)).axes[0].lines
        colors.append({line.get_label(): line.get_color() for line in lines})
    assert len({*colors[0].values()}) == len(NORMS)
    assert colors[1] == colors[0]
    assert colors[2].items() <= colors[0].items()


def test_layers_are_told_apart():
    """By colours, or where these do not suffice by rows with a name."""
    few = figures.draw_drift(history(3, layers=7)).axes[0]
    assert len({line.get_color() for line in few.lines}) == 7
    many = figures.draw_drift(history(3, layers=19)).axes[0]
    assert [text.get_text() for text in many.get_yticklabels()] == [f"Block_{i}" for i in range(19)]
    (image,) = many.images
    np.testing.assert_allclose(image.get_array()[:, 0], 0.7 * np.arange(1, 20))


def test_a_sheet_without_mistakes_says_so():
    sheet = figures.draw_mistakes(*classified(3, 0))
    assert [text.get_text() for text in sheet.texts][-1] == "0 mistakes on 12 images"
    assert not sheet.axes
    assert len(figures.draw_mistakes(*classified(10, 30)).axes) == 24

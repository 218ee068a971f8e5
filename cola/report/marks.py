"""Whose the marks of a figure are, and what its points say: what a page needs to switch arms off and to show numbers.

A figure for a paper is the same without them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from markupsafe import escape
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Says = tuple[float, float, str]  # a place in an axes' own numbers, and what stands there in words
MOST = 14  # points of a line that say something


class Drawing(Figure):
    """A figure that knows them."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.whose: dict[str, tuple[str, ...]] = {}  # arms by the id of what is drawn
        self.said: list[tuple[Axes, tuple[str, ...], list[Says]]] = []


def _drawing(artist: Artist) -> Drawing:
    figure = artist.get_figure(root=True)
    assert isinstance(figure, Drawing)
    return figure


def belong(arms: tuple[str, ...], *artists: Artist) -> None:
    """Note that artists are some arms', and go with any of them."""
    for artist in artists:
        whose = _drawing(artist).whose
        artist.set_gid(f"mark_{len(whose) + 1}")
        whose[f"mark_{len(whose) + 1}"] = arms


def belong_rows(axes: Axes, arms: Iterable[str]) -> None:
    """The labels of rows, each an arm's, go with it; a panel beside the first one has none."""
    for arm, label in zip(arms, axes.get_yticklabels(), strict=False):
        belong((arm,), label)


@contextmanager
def of(axes: Axes, *arms: str) -> Iterator[None]:
    """Whatever is drawn into the axes meanwhile is these arms'."""
    before = set(axes.get_children())
    yield
    belong(arms, *(artist for artist in axes.get_children() if artist not in before))


def say(axes: Axes, arms: str | tuple[str, ...], points: Iterable[Says]) -> None:
    """Note what points of the axes say."""
    arms = (arms,) if isinstance(arms, str) else arms
    _drawing(axes).said.append((axes, arms, list(points)))


def some(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of a long line the points that say something, the last one among them."""
    every = max(1, -(-len(line) // MOST))
    return list(line[::-1][::every][::-1])


def marked(text: str, figure: Figure, classes: Mapping[str, str]) -> str:
    """The SVG of a drawn figure with each arm's class where its marks are, and its points before all else: circles that
    are not seen and have their numbers as titles."""
    if not isinstance(figure, Drawing):
        return text

    def named(arms: tuple[str, ...]) -> str:
        return " ".join(classes[arm] for arm in arms if arm in classes)

    def classed(group: re.Match[str]) -> str:
        found = named(figure.whose[group[1]])
        return f'<g class="{found}">' if found else group[0]

    text = re.sub(r'<g id="(mark_\d+)">', classed, text)
    circles = []
    for axes, arms, says in figure.said:
        for x, y, what in says:
            place = axes.transData.transform((x, y))
            if axes.bbox.contains(*place):
                left, top = place[0] * 72 / figure.dpi, (figure.bbox.height - place[1]) * 72 / figure.dpi
                circles.append(
                    f'<circle class="{named(arms)}" cx="{left:.1f}" cy="{top:.1f}" r="5"><title>{escape(what)}</title>'
                    "</circle>"
                )
    points = f'<g class="points">{"".join(circles)}</g>' if circles else ""
    return re.sub(r"</svg>\s*$", lambda end: points + end[0], text)

"""One legend for all panels of a figure."""

from collections.abc import Iterable

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def common_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Below them, each label once, though a panel may lack some."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        own, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, own, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)

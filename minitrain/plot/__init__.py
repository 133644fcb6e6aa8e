"""All drawing, from names and arrays: each function returns the matplotlib figure, and needs no display.

Lines and maps that are in order go from dark to bright (viridis), kinds have the colours of Okabe and Ito: both are safe for
colour-blind readers.
"""

from minitrain.plot.bins import histograms
from minitrain.plot.depths import depth, gradient_flow
from minitrain.plot.lines import dead, stats
from minitrain.plot.maps import heatmap
from minitrain.plot.training import curves, lr_find, schedule

__all__ = ["curves", "dead", "depth", "gradient_flow", "heatmap", "histograms", "lr_find", "schedule", "stats"]

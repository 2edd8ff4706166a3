"""Figures of the paper's questions, each with what chance alone would show.

Conventions
-----------
Functions of one panel take and return ``Axes``; without ``ax=`` they make a figure of one column's width,
``ax.figure``. Those called ``figure_...`` return a ``Figure`` of several panels. Sizes are for print (3.4 in for
one column, 7 in for two); text is sized relative to the reader's own ``font.size``. Figures are made without
pyplot: no backend is chosen, no current figure and no ``rcParams`` are changed. In a notebook, say
``%matplotlib inline`` once and end a cell with the figure, ``ax.figure``, for it to show.

Every plot takes a table of ``lora_analysis.tables`` (or rows of it) and looks nothing up elsewhere, so that a
figure can be drawn again from a saved table. Colours are those of Okabe and Ito for categories, viridis and
cividis for quantities: told apart by readers with any colour vision, and with marker or dash in grey print too.

Plots
-----
``rank_ablation`` (tables 6 and 18 of the paper), ``similarity_grid``, ``figure_ranks`` (figure 3),
``figure_seeds`` (figure 4), ``figure_top_directions`` (figure 8), ``amplification_points`` and ``gain_by_layer``
(table 7), ``spectra``, ``module_map``, ``spectrum_overlap``, ``figure_atlas``, ``training_dynamics`` and
``figure_dynamics``; ``save_figure``.

References
----------
Hu et al. 2021, arXiv:2106.09685. Okabe and Ito, *Color Universal Design*, 2008.
"""

from lora_analysis.plots.ablation import rank_ablation
from lora_analysis.plots.amplification import amplification_points, gain_by_layer
from lora_analysis.plots.dynamics import figure_dynamics, training_dynamics
from lora_analysis.plots.maps import module_map
from lora_analysis.plots.overlap import spectrum_overlap
from lora_analysis.plots.saving import save_figure
from lora_analysis.plots.shelf import figure_atlas
from lora_analysis.plots.similarity import figure_ranks, figure_seeds, similarity_grid
from lora_analysis.plots.spectra import spectra
from lora_analysis.plots.top_directions import figure_top_directions

__all__ = [
    "amplification_points",
    "figure_atlas",
    "figure_dynamics",
    "figure_ranks",
    "figure_seeds",
    "figure_top_directions",
    "gain_by_layer",
    "module_map",
    "rank_ablation",
    "save_figure",
    "similarity_grid",
    "spectra",
    "spectrum_overlap",
    "training_dynamics",
]

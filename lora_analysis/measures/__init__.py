"""Measures: pure functions from decompositions and tensors to numbers, one module per question.

``spectrum`` how many directions an update uses; ``subspace`` how two subspaces lie to each other; ``null``
what chance alone would give; ``precision`` what storage rounding hides; ``amplification`` how the update
relates to its base weight; ``intruders`` which directions are new to the model; ``interference`` how
updates get in each other's way.
"""

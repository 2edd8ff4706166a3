"""Measures: pure functions from decompositions and tensors to numbers, one module per question.

``spectrum`` how many directions an update uses; ``subspace`` how two subspaces lie to each other; ``null``
and ``spectrum_null`` what chance alone would give; ``precision`` what storage rounding hides; ``weight`` the
base matrix; ``amplification`` how the update relates to it, and ``projection_null`` how random directions
do; ``magnitude`` how it changes lengths and directions; ``intruders`` which directions are new to the model;
``interference`` how updates get in each other's way.
"""

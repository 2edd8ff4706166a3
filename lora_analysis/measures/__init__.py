"""Measures: pure functions from decompositions and tensors to numbers, one module per question.

``spectrum`` how many directions an update uses; ``subspace`` how two subspaces lie to each other; ``null``
and ``spectrum_null`` what chance alone would give; ``precision`` what storage rounding hides; ``weight`` the
base matrix; ``amplification`` how the update relates to it, and ``projection_null`` how random directions
do; ``magnitude`` how it changes lengths and directions; ``triples`` the singular vectors of W and of W + ΔW;
``adapted_directions`` how close these are, with ``spectral_measure`` for a certificate, and ``intruders`` which are
new to the model; ``deciles`` where along W's spectrum an update lies;
``interference`` how updates get in each other's way.
"""

"""Which columns of a table the report shows, what it calls them, and what they mean."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["name", "text", "count", "number", "fine", "share", "p", "q", "flags"]
"""How values are written: ``fine`` with four digits, ``share`` in per cent,
``q`` with the words *consistent with chance* above 0.05."""


class Column(NamedTuple):
    """One column of a table on a page."""

    key: str
    """Its name in the table and in the CSV."""
    label: str
    kind: Kind
    help: str
    """What it is, with its chance level."""


_MODULE = Column("module", "module", "name", "The adapted matrix, as in the base's state dict.")
_FLAGS = Column("flags", "flags", "flags", "Why a value is missing or weak.")
_R = Column("r", "r", "count", "Declared inner dimension.")

RANK = (
    _MODULE,
    Column("d_out", "d out", "count", "Rows of ΔW."),
    Column("d_in", "d in", "count", "Columns of ΔW."),
    _R,
    Column("scale", "scale", "number", "What B·A is multiplied by."),
    Column("scale_source", "scale from", "text", "Where the scale came from; it is never guessed."),
    Column("norm", "‖ΔW‖", "number", "Frobenius norm, in the unit of the weights."),
    Column("stable_rank", "stable rank", "number", "Σσ² / σ₁²."),
    Column("stable_rank_low", "chance 1 %", "number", "Of the stable rank, by random factors of the same shape."),
    Column("stable_rank_high", "chance 99 %", "number", "The same, upper end."),
    Column("effective_rank", "effective rank", "number", "exp of the entropy of σ / Σσ."),
    Column("effective_rank_low", "chance 1 %", "number", "Of the effective rank, by random factors."),
    Column("effective_rank_high", "chance 99 %", "number", "The same, upper end."),
    Column("k90", "k90", "count", "Least k that holds 90 % of ‖ΔW‖²."),
    Column("k90_low", "chance 1 %", "number", "Of k90, by random factors."),
    Column("k90_high", "chance 99 %", "number", "The same, upper end."),
    Column("resolved_rank", "resolved", "count", "Singular values of at least three storage-noise floors."),
    Column("learned_directions", "learned", "count", "Directions of A that its random start does not explain."),
    Column("learned_p", "p", "p", "Of the largest of them, against the random start."),
    Column("learned_q", "q", "q", "The same, adjusted for the number of modules."),
    Column("start", "start", "text", "Which random start the bulk of A is like."),
    Column("above_noise", "above noise", "count", "Singular values above a plateau of noise; missing where none is."),
    _FLAGS,
)
STRENGTH = (
    _MODULE,
    _R,
    Column("norm_update", "‖ΔW‖", "number", "Frobenius norm, in the unit of the weights."),
    Column("norm_base", "‖W‖", "number", "The same of the base's matrix."),
    Column("relative_norm", "‖ΔW‖ / ‖W‖", "share", "Size of the update beside its weight."),
    Column("rounding", "bfloat16 noise", "share", "What rounding W + ΔW to bfloat16 changes, as a share of ‖W‖."),
    Column("sigma_ratio", "σ₁ ratio", "share", "σ₁(ΔW) / σ₁(W)."),
    Column("merge_signal_to_noise", "merge S/N", "number", "‖ΔW‖ over that rounding noise; 1 where they are equal."),
    Column("merge_kept", "kept", "share", "What a merge in bfloat16 leaves of the update."),
    _FLAGS,
)
AMPLIFICATION = (
    _MODULE,
    Column("k", "k", "count", "ΔW means its best rank-k part; k = r is the paper's figure."),
    Column("projected", "‖UᵀWV‖", "number", "W projected on ΔW's first k directions."),
    Column("projected_null_rms", "random", "number", "The same by random directions."),
    Column("projected_top", "top", "number", "The same by W's own first k directions, the ceiling."),
    Column("gain", "gain", "number", "‖UᵀWV‖ / random: 1 by chance, and the number to read."),
    Column("z", "z", "number", "Standard score of the gain; none at k = 1."),
    Column("p", "p", "p", "Upper tail of the gain."),
    Column("q", "q", "q", "The same, adjusted for the number of modules."),
    Column("ceiling_fraction", "ceiling", "share", "‖UᵀWV‖ / top."),
    Column("amplification", "factor", "number", "‖ΔW_k‖ / ‖UᵀWV‖, the paper's; falls with k by chance, too."),
    Column("amplification_null", "factor, random", "number", "The same by random directions."),
    Column("signed_positive", "signs +", "share", "Share of uᵀWv above 0; half by chance."),
    Column("sign_q", "q of signs", "q", "Exact p of the signs, adjusted for the number of modules."),
    _FLAGS,
)
INTRUDERS = (
    _MODULE,
    Column("side", "side", "text", "out: left singular vectors; in: right ones."),
    Column("k", "k", "count", "How many top directions of W + ΔW are looked at."),
    Column("threshold", "below", "number", "A direction is new where its cosine with all of W's is below this."),
    Column("intruders", "new", "count", "New directions among them."),
    Column("undecided", "open", "count", "Directions that could not be decided."),
    Column("energy_share", "energy", "share", "Share of the top k's σ² in new directions."),
    Column("control_share", "random", "share", "The same for random updates of the same singular values."),
    Column("control_se", "± se", "share", "Standard error of that mean."),
    Column("max_cosine_min", "newest", "number", "Largest cosine of the newest direction with W's."),
    _FLAGS,
)
SAMENESS = (
    Column("module_a", "module", "name", "The matrix that both adapt."),
    Column("rows_shared", "shared start", "share", "Share of A's rows that both began with."),
    Column("cosine", "cos", "number", "Of the two updates as vectors; 0 by chance."),
    Column("cosine_null_sd", "chance sd", "number", "Standard deviation of the cosine by chance."),
    Column("cosine_p", "p", "p", "Two-sided, against the same spectra turned at random."),
    Column("cosine_q", "q", "q", "The same, adjusted for the number of modules."),
    Column("norm_ratio", "norm ratio", "number", "Smaller norm over the larger."),
    *(
        column
        for side in ("in", "out")
        for column in (
            Column(f"phi_{side}", f"φ {side}", "number", f"Overlap of all directions on the side {side}."),
            Column(f"phi_corrected_{side}", f"φ* {side}", "number", "The same, 0 by chance and 1 if contained."),
            Column(f"phi_p_{side}", "p", "p", "Upper tail of φ, against random subspaces."),
            Column(f"phi_q_{side}", "q", "q", "The same, adjusted for the number of modules."),
        )
    ),
    _FLAGS,
)
INTERFERENCE = (
    _MODULE,
    Column("cosine", "cos", "number", "Of the two updates; 0 by chance."),
    Column("cosine_null_sd", "chance sd", "number", "Standard deviation of the cosine by chance."),
    Column("sti_relative", "STI / Σσ", "number", "Singular task interference, over all singular values."),
    Column("sti_chance", "chance", "number", "The same for these spectra turned at random."),
    Column("sti_p", "p", "p", "Upper tail of STI."),
    Column("sti_q", "q", "q", "The same, adjusted for the number of modules."),
    Column("alignment_ratio", "alignment", "number", "Mean share of an update in the leading directions of the sum."),
    Column("union_rank", "union", "count", "Output directions that both span together."),
    Column("rank_sum", "of", "count", "How many these would be with nothing shared."),
    Column("averaging_error", "avg. error", "share", "What averaging the factors gets wrong of averaging updates."),
    _FLAGS,
)
PAIRS = (
    Column("a", "A", "name", "An adapter."),
    Column("b", "B", "name", "Another."),
    Column("kind", "compares", "text", "What differs between the two."),
    Column("modules", "modules", "count", "Matrices that both adapt."),
    Column("rows_shared", "shared start", "share", "Mean share of A's rows that both began with."),
    Column("cosine", "cos", "number", "Mean over modules; 0 by chance."),
    Column("cosine_found", "cos beyond chance", "text", "Modules with q of at most 0.05, of those tested."),
    Column("phi_in", "φ* in", "number", "Mean over modules; 0 by chance, 1 where one contains the other."),
    Column("phi_in_found", "φ in beyond chance", "text", "Modules with q of at most 0.05."),
    Column("phi_out", "φ* out", "number", "Mean over modules; 0 by chance."),
    Column("phi_out_found", "φ out beyond chance", "text", "Modules with q of at most 0.05."),
    Column("sti", "STI / Σσ", "number", "Mean over modules."),
    Column("sti_chance", "chance", "number", "The same for these spectra turned at random."),
    Column("sti_found", "STI beyond chance", "text", "Modules with q of at most 0.05."),
)
ADAPTERS = (
    Column("adapter", "adapter", "name", "As it was named on the command line, without what all share."),
    Column("format", "format", "text", "As its content says."),
    Column("targets", "targets", "text", "Kinds of adapted matrices."),
    Column("r", "r", "text", "Declared inner dimensions."),
    Column("scale", "scale", "text", "What B·A is multiplied by."),
    Column("scale_source", "scale from", "text", "Where the scale came from."),
    Column("base", "base", "text", "The base model that its configuration names."),
    Column("modules", "modules", "count", "Adapted matrices."),
    Column("lint", "lint", "text", "Findings by severity."),
    Column("effective_rank", "effective rank", "number", "Median over modules."),
    Column("effective_rank_chance", "chance", "text", "1 % to 99 % of random factors, over all modules."),
    Column("below_chance", "below it", "text", "Modules whose effective rank is below chance."),
    Column("norm", "‖ΔW‖", "number", "Median over modules."),
    Column("relative_norm", "‖ΔW‖ / ‖W‖", "share", "Median over modules."),
    Column("gain", "gain", "number", "Median over modules at the largest k; 1 by chance."),
    Column("gain_found", "beyond chance", "text", "Modules whose gain has q of at most 0.05."),
    Column("intruder_share", "intruders", "share", "Mean share of energy in new directions, side out."),
    Column("control_share", "random", "share", "The same for random updates of the same singular values."),
)

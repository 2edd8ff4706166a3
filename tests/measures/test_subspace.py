"""Similarity, principal angles and Grassmann distances: closed forms, oracles and metric properties."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from torch import Tensor

from lora_analysis.measures.subspace import (
    GrassmannKind,
    corrected_similarity,
    grassmann_distance,
    principal_angles,
    projection_metric,
    subspace_similarity,
)
from lora_analysis.update import LowRankUpdate

KINDS: tuple[GrassmannKind, ...] = get_args(GrassmannKind)

# Products of orthonormal bases and sums of at most 100 terms, in float64.
ROUNDING = 1e-12
# Distances are square roots or arc functions of such sums, and near 0 only half as accurate in cosines.
CLOSE = 1e-9

E = torch.eye(8, dtype=torch.float64)

# The first call of a LAPACK routine can take longer than hypothesis allows.
patient = settings(deadline=None)


def haar(d: int, k: int, seed: int) -> Tensor:
    gaussian = torch.randn(d, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    basis: Tensor = torch.linalg.qr(gaussian).Q
    return basis


@st.composite
def pairs_of_bases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    d = draw(st.integers(1, 12))
    m, n = draw(st.integers(1, d)), draw(st.integers(1, d))
    seed = draw(st.integers(0, 10_000))
    return haar(d, m, seed), haar(d, n, seed + 20_000)


def planes_at(*degrees: float) -> tuple[Tensor, Tensor]:
    """Two bases whose k-th vectors span the k-th coordinate plane at the given angle."""
    a, b = torch.zeros(2 * len(degrees), len(degrees)), torch.zeros(2 * len(degrees), len(degrees))
    a, b = a.double(), b.double()
    for k, angle in enumerate(degrees):
        a[2 * k, k] = 1.0
        b[2 * k, k], b[2 * k + 1, k] = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return a, b


# Similarity


@patient
@given(pairs_of_bases())
def test_similarity_agrees_with_the_double_loop(bases: tuple[Tensor, Tensor]) -> None:
    a, b = bases
    phi = subspace_similarity(a, b)
    for i, j in itertools.product(range(1, a.shape[1] + 1), range(1, b.shape[1] + 1)):
        naive = float((a[:, :i].mT @ b[:, :j]).norm() ** 2) / min(i, j)
        assert float(phi[i - 1, j - 1]) == pytest.approx(naive, abs=ROUNDING)


@patient
@given(pairs_of_bases())
def test_similarity_is_bounded_and_its_overlaps_grow_by_at_most_one(bases: tuple[Tensor, Tensor]) -> None:
    a, b = bases
    d, m, n = a.shape[0], a.shape[1], b.shape[1]
    phi = subspace_similarity(a, b)
    i, j = torch.arange(1.0, m + 1).double()[:, None], torch.arange(1.0, n + 1).double()
    smaller = torch.minimum(i, j)
    overlap = torch.nn.functional.pad(phi * smaller, (1, 0, 1, 0))
    for steps in (overlap.diff(dim=0), overlap.diff(dim=1)):
        assert float(steps.min()) >= -ROUNDING
        assert float(steps.max()) <= 1 + ROUNDING
    assert bool((phi <= 1).all())
    assert bool((phi >= (i + j - d).clamp(min=0) / smaller - ROUNDING).all())


@patient
@given(pairs_of_bases())
def test_similarity_is_symmetric(bases: tuple[Tensor, Tensor]) -> None:
    a, b = bases
    torch.testing.assert_close(subspace_similarity(a, b), subspace_similarity(b, a).mT, rtol=ROUNDING, atol=ROUNDING)


def test_a_basis_contains_every_part_of_itself() -> None:
    a = haar(50, 9, 0)
    torch.testing.assert_close(subspace_similarity(a, a), torch.ones(9, 9, dtype=torch.float64), rtol=ROUNDING, atol=0)


def test_similarity_slices_both_bases_and_keeps_the_grid_rectangular() -> None:
    assert subspace_similarity(E[:, :3], E[:, 3:6]).tolist() == torch.zeros(3, 3).tolist()
    assert subspace_similarity(E[:, :2], E[:, 1:4]).tolist() == [[0.0, 0.0, 0.0], [1.0, 0.5, 0.5]]
    # Not monotone in i and j, though the overlap is.
    assert subspace_similarity(E[:, :2], E[:, [1, 0]]).tolist() == [[0.0, 1.0], [1.0, 1.0]]


def test_similarity_of_planes_at_known_angles() -> None:
    assert float(subspace_similarity(*planes_at(60.0))) == pytest.approx(0.25, abs=ROUNDING)
    phi = subspace_similarity(*planes_at(30.0, 60.0)).flatten().tolist()
    assert phi == pytest.approx([0.75, 0.75, 0.75, 0.5], abs=ROUNDING)


def test_similarity_on_a_depends_on_the_gauge_and_on_the_update_does_not() -> None:
    up, down = E[:, :2], torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)) @ E[:2]
    gauge = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    other_up, other_down = up @ torch.linalg.inv(gauge), gauge @ down
    V = LowRankUpdate(up, down, 1.0).svd().V
    other_V = LowRankUpdate(other_up, other_down, 1.0).svd().V
    torch.testing.assert_close(subspace_similarity(V, other_V), subspace_similarity(V, V), rtol=ROUNDING, atol=0)
    rows, other_rows = (torch.linalg.svd(A, full_matrices=False)[2].mT for A in (down, other_down))
    phi = subspace_similarity(rows, other_rows)
    assert float(phi[0, 0]) == pytest.approx(0.0, abs=ROUNDING)
    assert float(phi[1, 1]) == pytest.approx(1.0, abs=ROUNDING)


def test_two_planes_in_space_meet_in_a_line() -> None:
    phis = []
    for seed in range(400):
        a, b = haar(3, 2, seed), haar(3, 2, seed + 1000)
        assert float(principal_angles(a, b)[0]) == pytest.approx(0.0, abs=1e-14)
        phis.append(float(subspace_similarity(a, b)[1, 1]))
    assert min(phis) >= 0.5 - ROUNDING
    # Var phi = Var cos² / 4 with cos uniform: 1/45; four standard errors.
    assert sum(phis) / 400 == pytest.approx(2 / 3, abs=4 * math.sqrt(1 / 45 / 400))


def test_float32_bases_of_an_svd_are_accepted() -> None:
    gaussian = torch.randn(384, 384, generator=torch.Generator().manual_seed(0))
    U = torch.linalg.svd(gaussian)[0]
    phi = subspace_similarity(U[:, :16], U[:, 8:40])
    assert phi.dtype == torch.float64
    assert float(phi.max()) <= 1.0


def test_empty_bases_have_an_empty_grid_and_no_angles() -> None:
    empty = torch.empty(8, 0)
    assert subspace_similarity(empty, E[:, :3]).shape == (0, 3)
    assert principal_angles(E[:, :3], empty).shape == (0,)
    assert projection_metric(empty, E[:, :3]) == 0.0
    assert grassmann_distance(empty, E[:, :3], containment=True) == 0.0
    assert grassmann_distance(empty, E[:, :3]) == pytest.approx(math.sqrt(3), abs=ROUNDING)
    assert all(grassmann_distance(empty, empty, kind=kind) == 0.0 for kind in KINDS)


@pytest.mark.parametrize("measure", [subspace_similarity, principal_angles, projection_metric, grassmann_distance])
@pytest.mark.parametrize(
    "basis",
    [
        haar(8, 3, 0).mT,
        haar(8, 3, 0) * torch.tensor([1.0, 1.0, 1.001]),
        torch.cat([E[:, :2], E[:, :1]], dim=1),
        torch.cat([E[:, :2], torch.zeros(8, 1)], dim=1),
        torch.full((8, 2), math.nan),
        torch.randn(8, 4, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["transposed", "long", "repeated", "zero", "nan", "factor"],
)
def test_columns_that_are_not_orthonormal_are_refused(measure, basis: Tensor) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"basis_b: expected orthonormal columns, got a basis of shape"):
        measure(haar(8, 2, 1), basis)


def test_bases_of_different_spaces_and_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"subspaces of one space.*\(8, 2\) and \(6, 2\)"):
        subspace_similarity(haar(8, 2, 0), haar(6, 2, 0))
    with pytest.raises(ValueError, match=r"basis_a: expected a basis of shape \(d, k\), got shape \(8,\)"):
        principal_angles(E[0], E[:, :2])


def test_corrected_similarity_is_zero_at_chance_and_one_at_containment() -> None:
    mean = torch.tensor([0.25, 0.25, 0.25, 1.0], dtype=torch.float64)
    phi = torch.tensor([0.25, 1.0, 0.0, 1.0], dtype=torch.float64)
    corrected = corrected_similarity(phi, mean)
    assert corrected[:3].tolist() == pytest.approx([0.0, 1.0, -1 / 3], abs=ROUNDING)
    assert math.isnan(float(corrected[3]))


# Principal angles


@patient
@given(pairs_of_bases())
def test_principal_angles_agree_with_scipy(bases: tuple[Tensor, Tensor]) -> None:
    a, b = bases
    expected = linalg.subspace_angles(a.numpy(), b.numpy())[::-1]
    # Loose because of scipy, which takes some small angles from their cosines when others are large.
    assert principal_angles(a, b).tolist() == pytest.approx(expected.tolist(), abs=1e-7)


@pytest.mark.parametrize("angle", [1e-10, 1e-7, 1e-3, math.pi / 4, math.pi / 2 - 1e-9])
def test_angles_are_accurate_at_both_ends(angle: float) -> None:
    a, b = planes_at(math.degrees(angle), 50.0)
    rotation = haar(4, 4, 3)
    angles = principal_angles(rotation @ a, rotation @ b)
    # A basis in float64 holds an angle to about 1e-16, whatever its size.
    assert float((angles - angle).abs().min()) < 1e-15


@patient
@given(pairs_of_bases())
def test_similarity_is_one_minus_the_squared_projection_metric_over_p(bases: tuple[Tensor, Tensor]) -> None:
    a, b = bases
    p = min(a.shape[1], b.shape[1])
    phi = float(subspace_similarity(a, b)[-1, -1])
    assert phi == pytest.approx(1 - projection_metric(a, b) ** 2 / p, abs=ROUNDING)


@patient
@given(pairs_of_bases())
def test_the_projection_metric_is_the_distance_of_the_projections(bases: tuple[Tensor, Tensor]) -> None:
    a, b = bases
    missing = abs(a.shape[1] - b.shape[1])
    # ||P - P'||_F² = m + n - 2 sum(cos²) = 2 sum(sin²) + |m - n|
    squared = float((a @ a.mT - b @ b.mT).norm() ** 2)
    assert 2 * projection_metric(a, b) ** 2 + missing == pytest.approx(squared, abs=ROUNDING)


# Distances


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (
            (90.0, 90.0, 90.0),
            {
                "geodesic": math.sqrt(3) * math.pi / 2,
                "chordal": math.sqrt(3),
                "procrustes": math.sqrt(6),
                "fubini-study": math.pi / 2,
                "binet-cauchy": 1.0,
                "martin": math.inf,
                "asimov": math.pi / 2,
                "projection": 1.0,
                "spectral": math.sqrt(2),
            },
        ),
        (
            (60.0,),
            {
                "geodesic": math.pi / 3,
                "chordal": math.sqrt(3) / 2,
                "procrustes": 1.0,
                "fubini-study": math.pi / 3,
                "binet-cauchy": math.sqrt(3) / 2,
                "martin": math.sqrt(2 * math.log(2)),
                "asimov": math.pi / 3,
                "projection": math.sqrt(3) / 2,
                "spectral": 1.0,
            },
        ),
        (
            (30.0, 60.0),
            {
                "geodesic": math.hypot(math.pi / 6, math.pi / 3),
                "chordal": 1.0,
                "procrustes": 2 * math.hypot(math.sin(math.pi / 12), 0.5),
                "fubini-study": math.acos(math.sqrt(3) / 4),
                "binet-cauchy": math.sqrt(13) / 4,
                "martin": math.sqrt(-2 * math.log(math.sqrt(3) / 4)),
                "asimov": math.pi / 3,
                "projection": math.sqrt(3) / 2,
                "spectral": 1.0,
            },
        ),
    ],
)
def test_distances_at_known_angles(degrees: tuple[float, ...], expected: dict[GrassmannKind, float]) -> None:
    a, b = planes_at(*degrees)
    rotation = haar(a.shape[0], a.shape[0], 5)
    assert expected.keys() == set(KINDS)
    for kind, value in expected.items():
        assert grassmann_distance(rotation @ a, rotation @ b, kind=kind) == pytest.approx(value, abs=ROUNDING)


def test_missing_dimensions_are_right_angles_unless_containment_is_asked_for() -> None:
    a, b = E[:, :2], E[:, 1:4]  # angles 0 and 90 degrees, one dimension missing
    assert grassmann_distance(a, b, containment=True) == pytest.approx(1.0, abs=ROUNDING)
    assert grassmann_distance(a, b) == pytest.approx(math.sqrt(2), abs=ROUNDING)
    maxima = {
        "geodesic": math.pi / 2 * math.sqrt(2),
        "chordal": math.sqrt(2),
        "procrustes": 2.0,
        "fubini-study": math.pi / 2,
        "binet-cauchy": 1.0,
        "martin": math.inf,
        "asimov": math.pi / 2,
        "projection": 1.0,
        "spectral": math.sqrt(2),
    }
    for kind in KINDS:
        inner, outer = E[:, :2], E[:, :4]
        assert grassmann_distance(inner, outer, kind=kind, containment=True) == pytest.approx(0.0, abs=CLOSE)
        assert grassmann_distance(inner, outer, kind=kind) == pytest.approx(maxima[kind], abs=ROUNDING)


@patient
@given(pairs_of_bases(), st.sampled_from(KINDS), st.booleans())
def test_distances_are_symmetric_and_zero_only_at_equality(
    bases: tuple[Tensor, Tensor], kind: GrassmannKind, containment: bool
) -> None:
    a, b = bases
    distance = grassmann_distance(a, b, kind=kind, containment=containment)
    reverse = grassmann_distance(b, a, kind=kind, containment=containment)
    # Martin is steep where a cosine is near 0: the derivative of its log is 1/cos.
    assert distance == pytest.approx(reverse, rel=1e-6, abs=CLOSE)
    assert grassmann_distance(a, a, kind=kind) == pytest.approx(0.0, abs=CLOSE)
    angles = principal_angles(a, b)
    apart = float(angles[-1]) > 1e-6 or (not containment and a.shape[1] != b.shape[1])
    assert (distance > 1e-7) == apart


@patient
@given(pairs_of_bases())
def test_geodesic_is_at_least_procrustes_at_least_chordal(bases: tuple[Tensor, Tensor]) -> None:
    geodesic, procrustes, chordal = (
        grassmann_distance(*bases, kind=kind, containment=True) for kind in ("geodesic", "procrustes", "chordal")
    )
    assert geodesic >= procrustes - ROUNDING
    assert procrustes >= chordal - ROUNDING


@patient
@given(st.integers(2, 8), st.data(), st.sampled_from([kind for kind in KINDS if kind != "martin"]))
def test_distances_are_metrics_over_all_dimensions(d: int, data: st.DataObject, kind: GrassmannKind) -> None:
    sizes = data.draw(st.tuples(*[st.integers(1, d)] * 3))
    seed = data.draw(st.integers(0, 10_000))
    a, b, c = (haar(d, k, seed + 10_001 * place) for place, k in enumerate(sizes))
    direct = grassmann_distance(a, c, kind=kind)
    assert direct <= grassmann_distance(a, b, kind=kind) + grassmann_distance(b, c, kind=kind) + CLOSE


def test_martin_breaks_the_triangle_inequality() -> None:
    a, c = planes_at(90.0)
    _, b = planes_at(45.0)
    assert grassmann_distance(a, c, kind="martin") == math.inf
    detour = grassmann_distance(a, b, kind="martin") + grassmann_distance(b, c, kind="martin")
    assert detour == pytest.approx(2 * math.sqrt(math.log(2)), abs=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_distances_of_close_subspaces_keep_their_digits(kind: GrassmannKind) -> None:
    # All are the angle itself to first order for lines. Cosines alone would give 0 or 1e-8.
    assert grassmann_distance(*planes_at(math.degrees(1e-9)), kind=kind) == pytest.approx(1e-9, rel=1e-6)


def test_an_unknown_distance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind: expected one of geodesic, chordal, .*, got 'cosine'"):
        grassmann_distance(E[:, :1], E[:, :1], kind="cosine")  # type: ignore[arg-type]

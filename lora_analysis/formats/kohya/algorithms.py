"""What a module's tensors make, by the algorithm that their names tell: LoCon, LoHa, LoKr, or a full difference.

Conventions
-----------
Shapes alone describe a module; its numbers are read by ``read_update``. Each r is the one that the format's own loaders
divide alpha by. Convolutions are unfolded to (out, in·k·k); where a file holds factors that are unfolded already
(LoHa and LoKr without a Tucker core) it does not tell the kernel, which then is ().

- LoCon: ``up (out, r)``, ``down (r, in[, k, k])``, with ``lora_mid (r, r, k, k)`` a Tucker core.
- LoHa: ``(w1_a w1_b)∘(w2_a w2_b)``, a (out, r), b (r, in·k·k); with ``hada_t1``, ``hada_t2`` (r, r, k, k) Tucker cores,
  a (r, out), b (r, in).
- LoKr: ``kron(w1, w2)``, each whole or a product ``_a``·``_b``; w2 carries the kernel, or a core ``lokr_t2``.
  Of two whole matrices the scale is 1 whatever alpha says, and r bounds the rank.
- Full: ``diff``, the difference itself, scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.kohya.stems import FULL, LOCON, LOHA, LOKR
from lora_analysis.formats.products import hadamard, kronecker, low_rank
from lora_analysis.update import DenseUpdate, Update

Shape = tuple[int, ...]
Tensors = Mapping[str, Tensor]
_CONTROL = ("up", "down")


@dataclass(frozen=True, slots=True)
class Product:
    """One module as the shapes of its tensors describe it.

    Parameters
    ----------
    algorithm : str
        ``"LoRA"``, ``"LoHa"``, ``"LoKr"``, ``"full"`` or ``"Control-LoRA"``.
    shape : (int, int)
        (d_out, d_in), unfolded.
    r : int
        Declared inner dimension; of whole matrices the largest possible rank.
    kernel : tuple of int
        As far as the tensors tell.
    parts : tuple of str
        The last names of the tensors it is made of.
    build : callable
        The update out of those tensors and a scale.
    scaled : bool
        Whether alpha / r multiplies it; if not, its scale is 1.
    """

    algorithm: str
    shape: tuple[int, int]
    r: int
    kernel: tuple[int, ...]
    parts: tuple[str, ...]
    build: Callable[[Tensors, float], Update]
    scaled: bool = True


def described(checkpoint: Checkpoint, stem: str, names: list[str], where: str) -> Product:
    """The update of one module.

    Parameters
    ----------
    checkpoint : Checkpoint
    stem : str
    names : list of str
        The last names of the module's tensors, alpha and ``dora_scale`` among them.
    where : str
        The file, for messages.

    Raises
    ------
    AdapterFormatError
        If the tensors do not make up one algorithm's module, or their shapes do not fit.
    """
    readers = {LOCON: _locon, LOHA: _loha, LOKR: _lokr, FULL: _full, _CONTROL: _control}
    present = [group for group in readers if set(group) & set(names)]
    where = f"{where}: {stem!r}"
    if len(present) != 1:
        held = ", ".join(sorted(names))
        raise AdapterFormatError(f"{where}: expected the tensors of one algorithm, got {held}.")
    parts = tuple(name for name in present[0] if name in names)
    shapes = {name: checkpoint.shape(f"{stem}.{name}") for name in parts}
    for name, shape in shapes.items():
        if len(shape) < 2 or 0 in shape:
            raise AdapterFormatError(f"{where}: expected {name} to be a matrix with numbers in it, got shape {shape}.")
    return readers[present[0]](shapes, where)


def read_update(checkpoint: Checkpoint, stem: str, product: Product, scale: float, device: torch.device) -> Update:
    """A module's update, its tensors read now."""
    return product.build({name: checkpoint[f"{stem}.{name}"].to(device) for name in product.parts}, scale)


def _locon(shapes: Mapping[str, Shape], where: str) -> Product:
    up, down = _both("lora_up.weight", "lora_down.weight", shapes, where)
    core = shapes.get("lora_mid.weight")
    r = down[0]
    fits = up[1] == r and math.prod(up[2:]) == 1
    if core is None:
        kernel = down[2:]
    else:
        kernel = core[2:]
        fits = fits and core[:2] == (r, r) and math.prod(down[2:]) == 1
    if not fits:
        raise AdapterFormatError(
            f"{where}: expected lora_down (r, d_in), lora_up (d_out, r) and lora_mid (r, r, k, k), if any, to share r, "
            f"got {down}, {up}{'' if core is None else f' and {core}'}."
        )
    return Product("LoRA", (up[0], down[1] * math.prod(kernel)), r, kernel, tuple(shapes), _build_locon)


def _build_locon(tensors: Tensors, scale: float) -> Update:
    core = tensors.get("lora_mid.weight")
    return low_rank(tensors["lora_up.weight"], tensors["lora_down.weight"], scale, middle=core)


def _loha(shapes: Mapping[str, Shape], where: str) -> Product:
    w1_a, w1_b = _both("hada_w1_a", "hada_w1_b", shapes, where)
    w2_a, w2_b = _both("hada_w2_a", "hada_w2_b", shapes, where)
    r = w1_b[0]
    tucker = "hada_t1" in shapes or "hada_t2" in shapes
    if tucker:
        cores = _both("hada_t1", "hada_t2", shapes, where)
        kernel, d_out = cores[0][2:], w1_a[1]
        fits = cores[0] == cores[1] and cores[0][:2] == (r, r) and w1_a[0] == r and len(w1_a) == len(w1_b) == 2
    else:
        kernel, d_out = w1_b[2:], w1_a[0]
        fits = w1_a[1] == r and len(w1_a) == 2
    if not (fits and w1_a == w2_a and w1_b == w2_b):
        held = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise AdapterFormatError(f"{where}: expected two products of one shape and one r, got {held}.")
    return Product("LoHa", (d_out, w1_b[1] * math.prod(kernel)), r, kernel, tuple(shapes), _build_loha)


def _build_loha(tensors: Tensors, scale: float) -> Update:
    w1, w2 = ((tensors[f"hada_{w}_a"], tensors[f"hada_{w}_b"]) for w in ("w1", "w2"))
    cores = (tensors["hada_t1"], tensors["hada_t2"]) if "hada_t1" in tensors else None
    r = w1[1].shape[0]
    return hadamard(w1, w2, scale, cores=cores, declared_r=r)


def _lokr(shapes: Mapping[str, Shape], where: str) -> Product:
    if "lokr_t1" in shapes:
        raise AdapterFormatError(f"{where}: expected w1 without a Tucker core, got lokr_t1; LyCORIS reads none.")
    core = shapes.get("lokr_t2")
    rows1, columns1, r1, _ = _lokr_side("lokr_w1", shapes, None, where)
    rows2, columns2, r2, kernel = _lokr_side("lokr_w2", shapes, core, where)
    columns2 *= math.prod(kernel)
    shape = (rows1 * rows2, columns1 * columns2)
    if r1 is None and r2 is None:
        r = min(rows1, columns1) * min(rows2, columns2)
        return Product("LoKr", shape, r, kernel, tuple(shapes), _build_lokr, scaled=False)
    if r1 is not None and r2 is not None and r1 != r2:
        raise AdapterFormatError(f"{where}: expected the factors of w1 and w2 to share r, got {r1} and {r2}.")
    return Product("LoKr", shape, r1 or r2 or 0, kernel, tuple(shapes), _build_lokr)


def _lokr_side(
    name: str, shapes: Mapping[str, Shape], core: Shape | None, where: str
) -> tuple[int, int, int | None, tuple[int, ...]]:
    """Rows, columns, r and kernel of w1 or w2; no r where it is whole."""
    whole, a, b = (shapes.get(f"{name}{end}") for end in ("", "_a", "_b"))
    if whole is not None and a is None and b is None and core is None:
        if name == "lokr_w1" and len(whole) > 2:
            raise AdapterFormatError(f"{where}: expected {name} to be a matrix, got shape {whole}.")
        return whole[0], whole[1], None, whole[2:]
    if whole is not None or a is None or b is None:
        held = ", ".join(sorted(shapes))
        raise AdapterFormatError(f"{where}: expected {name}, or {name}_a and {name}_b, got {held}.")
    if core is not None:
        if len(a) == len(b) == 2 and a[0] == b[0] and core[:2] == (a[0], a[0]):
            return a[1], b[1], a[0], core[2:]
    elif len(a) == 2 and a[1] == b[0]:
        return a[0], b[1], b[0], b[2:]
    raise AdapterFormatError(
        f"{where}: expected {name}_a and {name}_b to share r, got {a} and {b}"
        f"{'' if core is None else f' beside a core {core}'}."
    )


def _build_lokr(tensors: Tensors, scale: float) -> Update:
    w1, w2 = (
        tensors[name] if name in tensors else (tensors[f"{name}_a"], tensors[f"{name}_b"])
        for name in ("lokr_w1", "lokr_w2")
    )
    factored = [tensors[f"{name}_b"].shape[0] for name in ("lokr_w1", "lokr_w2") if f"{name}_b" in tensors]
    return kronecker(w1, w2, scale, core=tensors.get("lokr_t2"), declared_r=factored[0] if factored else None)


def _full(shapes: Mapping[str, Shape], where: str) -> Product:
    shape = shapes["diff"]
    flat = (shape[0], math.prod(shape[1:]))
    return Product("full", flat, min(flat), shape[2:], tuple(shapes), _build_full, scaled=False)


def _build_full(tensors: Tensors, scale: float) -> Update:
    return DenseUpdate(tensors["diff"].flatten(1), scale)


def _control(shapes: Mapping[str, Shape], where: str) -> Product:
    up, down = _both("up", "down", shapes, where)
    r = math.prod(up[1:])
    if down[0] != r:
        raise AdapterFormatError(f"{where}: expected down (r, d_in) and up (d_out, r) to share r, got {down} and {up}.")
    shape = (up[0], math.prod(down[1:]))
    return Product("Control-LoRA", shape, r, down[2:], tuple(shapes), _build_control, scaled=False)


def _build_control(tensors: Tensors, scale: float) -> Update:
    return low_rank(tensors["up"].flatten(1), tensors["down"], scale)


def _both(first: str, second: str, shapes: Mapping[str, Shape], where: str) -> tuple[Shape, Shape]:
    for name, other in ((first, second), (second, first)):
        if name not in shapes:
            raise AdapterFormatError(f"{where}: expected {first} and {second}, got only {other}.")
    return shapes[first], shapes[second]

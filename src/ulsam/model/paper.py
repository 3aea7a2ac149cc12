"""The ULSAM paper's tables as data, each cost figure beside what this code counts.

Source: the slides and poster of Saini et al., WACV 2020 (arXiv 2006.15102). "FLOPs" there are multiply-accumulates
(MACs). The paper prints rounded totals, so the REDUCTIONS are compared: the counted change of an edit is added to the
base that its column fits, and must give the printed figure to its last digit, or the row says why not.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import cache

import timm
import torch

from ulsam.base.text_table import text_table
from ulsam.layer.ulsam import ULSAM
from ulsam.model.presets import PLACEMENTS
from ulsam.surgery.cost import Cost, Rule, cost

_UNITS = {"K": 1_000, "M": 1_000_000}


@dataclass(frozen=True)
class PaperScore:
    """A printed accuracy in per cent; ``groups`` is None for a model without ULSAM."""

    data: str
    groups: int | None
    top1: float
    top5: float | None = None


@dataclass(frozen=True)
class Figure:
    """A printed cost beside this code's count.

    ``counted`` is the count itself, in a row with an edit the change that the edit makes; ``gives`` is what the
    column's rule makes of it, rounded as the printed figure.
    """

    printed: str
    counted: int
    gives: str

    @property
    def agrees(self) -> bool:
        """To the last printed digit."""
        return self.gives == self.printed


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's tables.

    ``name`` is the timm name of what is counted here ("" for an attention module by itself), ``place`` its edit.
    ``note`` says why a figure does not agree.
    """

    table: str
    model: str
    place: str
    name: str
    params: Figure | None  # None: not printed
    macs: Figure
    scores: tuple[PaperScore, ...] = ()
    note: str = ""


_INTRODUCTION = (
    "For each printed figure: what this code counts (for an edited model the change that the edit makes), what that "
    "gives by the table's rule, and whether it agrees to the last printed digit. FLOPs are the paper's: "
    "multiply-accumulates."
)

#: Each table with its counting rule.
TABLES = {
    "Baselines": "Counted as they are, BatchNorm's parameters too.",
    "Inserted, ImageNet-1K": "FLOPs: 569M (V1) or 299.998M (V2) plus the counted change. No parameters are printed.",
    "Replaced, ImageNet-1K": "V1: the printed base (4.2M and 569M at width 1.0) plus the counted change; which of the "
    "512-channel layers 8 to 12 was replaced is not published, each gives these figures. V2: as in the V2 table below.",
    "Replaced, fine-grained, V1": "4.2M and 569M plus the counted change.",
    "Replaced, fine-grained, V2": "Parameters: 3.40M plus the counted change, without BatchNorm's. FLOPs: 299.998M "
    "plus the counted change; bases from 299.996M to 299.999M fit these rows, the model counts 300.774M. Which "
    "64-channel and which 96-channel layer stand behind 9,13 is not published, any two give these figures.",
    "Attention modules at 512 x 14 x 14": "ULSAM: counted from the layer. Others: the paper's formula, m = 512 "
    "channels, hw = 196 pixels, t = 8, r = 16; products of activations with activations are not in it.",
}

#: What each base model's columns fit: model, parameters and their rule, MACs.
_BASES: dict[str, tuple[str, int, Rule, int]] = {
    "mobilenetv1_100": ("1.0 MobileNet-V1", 4_200_000, "exact", 569_000_000),
    "mobilenetv1_075": ("0.75 MobileNet-V1", 2_600_000, "exact", 325_000_000),
    "mobilenetv1_050": ("0.50 MobileNet-V1", 1_300_000, "exact", 149_000_000),
    "mobilenetv2_100": ("1.0 MobileNet-V2", 3_400_000, "paper", 299_998_000),
}


@dataclass(frozen=True)
class _Printed:
    """A row as printed."""

    table: str
    name: str
    params: str  # "": not printed
    macs: str
    scores: tuple[PaperScore, ...]
    note: str = ""


def _scores(data: str, groups: Sequence[int | None], top1: str, top5: str = "") -> tuple[PaperScore, ...]:
    fifth: list[float | None] = [*map(float, top5.split())] or [None] * len(groups)
    return tuple(map(PaperScore, [data] * len(groups), groups, map(float, top1.split()), fifth))


_IN, _BIRDS, _SLIDE = "ImageNet-1K", "Birds", "slide table, set not named"
_ALL, _FINE = (1, 2, 4, 8, 16), (1, 4, 8, 16)
_V1, _V2 = "ulsam_mobilenetv1_100_", "ulsam_mobilenetv2_100_"
_BASELINE, _INSERTED, _REPLACED, _FINE_V1, _FINE_V2, _MODULES = TABLES

# fmt: off
_PRINTED = [
    _Printed(_BASELINE, "mobilenetv1_100", "4.2M", "569M",
             _scores(_IN, [None], "70.65", "89.76") + _scores("Food-101", [None], "81.31")
             + _scores(_BIRDS, [None], "62.88") + _scores("Dogs", [None], "62.20")),
    _Printed(_BASELINE, "mobilenetv1_075", "2.6M", "325M", _scores(_IN, [None], "67.48", "88.00")),
    _Printed(_BASELINE, "mobilenetv1_050", "1.3M", "149M", _scores(_IN, [None], "63.22", "84.63")),
    _Printed(_BASELINE, "mobilenetv2_100", "3.4M", "300M",
             _scores(_IN, [None], "71.25", "90.19") + _scores(_BIRDS, [None], "62.94")
             + _scores(_SLIDE, [None], "81.51"),
             "3.4M and 300M are what the MobileNet-V2 paper prints; the model counts 3.505M (3.471M without BatchNorm) "
             "and 300.774M"),
    _Printed(_INSERTED, _V1 + "insert_11", "", "569.2M",
             _scores(_IN, _ALL, "70.69 70.84 70.77 70.59 70.89", "89.85 89.87 89.91 89.83 89.74")),
    _Printed(_INSERTED, _V1 + "insert_12", "", "569.2M",
             _scores(_IN, _ALL, "70.62 70.88 70.61 70.92 70.73", "89.86 89.88 89.79 89.98 89.78")),
    _Printed(_INSERTED, _V1 + "insert_13", "", "569.1M",
             _scores(_IN, _ALL, "70.63 70.85 70.86 70.74 70.82", "89.60 89.97 89.85 89.81 90.05")),
    _Printed(_INSERTED, _V2 + "insert_17", "", "300.01M",
             _scores(_IN, _ALL, "71.31 71.39 71.64 71.35 71.42", "90.28 90.34 90.27 90.36 90.43")),
    _Printed(_REPLACED, _V1 + "replace_12", "3.9M", "517M",
             _scores(_IN, _ALL, "69.92 70.14 70.43 70.29 70.04", "89.25 89.67 89.92 89.96 89.98")),
    _Printed(_REPLACED, "ulsam_mobilenetv1_075_replace_12", "2.4M", "296M",
             _scores(_IN, (1, 4), "67.98 67.81", "88.06 88.43")),
    _Printed(_REPLACED, "ulsam_mobilenetv1_050_replace_12", "1.2M", "136M",
             _scores(_IN, (1, 4), "63.42 63.25", "84.70 84.81")),
    _Printed(_REPLACED, _V2 + "replace_14_17", "2.96M", "261.88M", _scores(_IN, (4,), "71.52", "90.25"),
             "2.96M is a slip: the V2 table below prints 2.97M for the same model, which the count gives"),
    _Printed(_REPLACED, _V2 + "replace_16_17", "2.77M", "269.07M", _scores(_IN, (4,), "70.74", "89.15"),
             "269.07M is a slip: the V2 table below prints 269.08M for the same model, which the count gives"),
    _Printed(_REPLACED, _V2 + "replace_13_14_16_17", "2.54M", "223.77M", _scores(_IN, (4,), "69.72", "87.79")),
    _Printed(_FINE_V1, _V1 + "replace_12", "3.9M", "517M",
             _scores("Food-101", _FINE, "81.28 81.30 81.19 81.62") + _scores(_BIRDS, _FINE, "62.46 63.52 64.44 63.47")
             + _scores("Dogs", _FINE, "62.73 63.06 63.30 62.75")),
    _Printed(_FINE_V2, _V2 + "replace_14", "3.28M", "277.34M",
             _scores(_BIRDS, _FINE, "63.01 63.05 63.11 64.32") + _scores(_SLIDE, _FINE, "81.67 81.71 81.76 81.94")),
    _Printed(_FINE_V2, _V2 + "replace_17", "3.08M", "284.54M",
             _scores(_BIRDS, _FINE, "63.98 64.44 65.03 63.47") + _scores(_SLIDE, _FINE, "82.05 82.02 81.74 81.54")),
    _Printed(_FINE_V2, _V2 + "replace_9_13", "3.23M", "267.06M", _scores(_BIRDS, _FINE, "63.43 63.47 63.10 62.21")),
    _Printed(_FINE_V2, _V2 + "replace_16_17", "2.77M", "269.08M", _scores(_BIRDS, _FINE, "64.19 64.57 64.61 65.03")),
    _Printed(_FINE_V2, _V2 + "replace_14_17", "2.97M", "261.88M",
             _scores(_BIRDS, _FINE, "63.35 64.70 65.41 63.31") + _scores(_SLIDE, _FINE, "81.57 81.69 82.13 81.84")),
    _Printed(_FINE_V2, _V2 + "replace_13_14_16_17", "2.54M", "224.16M",
             _scores(_BIRDS, _FINE, "64.11 64.15 63.22 63.98") + _scores(_SLIDE, _FINE, "82.38 82.31 82.59 82.91"),
             "224.16M is a slip: the ImageNet table prints 223.77M for the same model, which the count gives"),
]
# fmt: on


@dataclass(frozen=True)
class _Module:
    """An attention module as printed, with the paper's formulas of its parameters and MACs."""

    name: str
    formula: str
    params: str
    macs: str
    count: Callable[[int, int], tuple[int, int]]  # m, hw -> parameters, MACs
    note: str = ""


def _bam(m: int, hw: int) -> tuple[int, int]:
    branch = 4 * m * m // _R + 18 * m * m // _R**2
    return branch, 2 * m * m // _R + branch * hw


def _ulsam(m: int, hw: int) -> tuple[int, int]:
    side = math.isqrt(hw)
    layer = cost(ULSAM(m, device="meta"), (m, side, side))
    return layer.params, layer.macs


_T, _R = 8, 16
_ATTENTION = [
    _Module("Non-local", "2m^2; 2m^2 hw", "524K", "102.76M", lambda m, hw: (2 * m * m, 2 * m * m * hw)),
    _Module(
        "A2-Model",
        "2m^2/t; 2m^2/t hw",
        "66K",
        "12.85M",
        lambda m, hw: (2 * m * m // _T, 2 * m * m // _T * hw),
        "the slide's formula is 2mt, which is 8K; its figures are those of m/t = 64 channels",
    ),
    _Module("SE-Model", "2m^2/r; 2m^2/r", "33K", "0.03M", lambda m, hw: (2 * m * m // _R, 2 * m * m // _R)),
    _Module("BAM", "b = 4m^2/r + 18m^2/r^2; 2m^2/r + b hw", "84K", "16.49M", _bam),
    _Module(
        "CBAM",
        "2m^2/r + 98; 2m^2/r + 98 hw",
        "33K",
        "0.05M",
        lambda m, hw: (2 * m * m // _R + 98, 2 * m * m // _R + 98 * hw),
    ),
    _Module("ULSAM", "2m; 2m hw", "1K", "0.2M", _ulsam),
]


def rows() -> list[PaperRow]:
    """Every row of the paper's cost tables, counted now.

    >>> row = next(row for row in rows() if row.name.endswith("v2_100_replace_14_17") and row.params.agrees)
    >>> row.params
    Figure(printed='2.97M', counted=-431104, gives='2.97M')
    """
    return [*map(_row, _PRINTED), *map(_module_row, _ATTENTION)]


def report() -> str:
    """The tables of :func:`rows` as text: printed, counted, verdict, and each table's counting rule.

    >>> report().splitlines()[3]
    'Baselines'
    """
    found = rows()
    tables = [_table(title, [row for row in found if row.table == title]) for title in TABLES]
    return "\n\n".join([textwrap.fill(_INTRODUCTION, 120), *tables])


@cache
def _count(name: str, rule: Rule) -> Cost:
    with torch.device("meta"):
        model = timm.create_model(name)
    return cost(model, rule=rule)


def _row(printed: _Printed) -> PaperRow:
    base, edit = PLACEMENTS.get(printed.name, (printed.name, ""))
    model, params, rule, macs = _BASES[base]
    few: Figure | None = None
    if edit:
        after, before = _count(printed.name, rule), _count(base, rule)
        many = _figure(printed.macs, after.macs - before.macs, macs)
        if printed.params:
            few = _figure(printed.params, after.params - before.params, params)
    else:
        whole = _count(base, "exact")
        few, many = _figure(printed.params, whole.params), _figure(printed.macs, whole.macs)
    return PaperRow(printed.table, model, edit, printed.name, few, many, printed.scores, printed.note)


def _module_row(module: _Module) -> PaperRow:
    params, macs = module.count(512, 14 * 14)
    few, many = _figure(module.params, params), _figure(module.macs, macs)
    return PaperRow(_MODULES, module.name, module.formula, "", few, many, note=module.note)


def _figure(printed: str, counted: int, base: int = 0) -> Figure:
    digits, unit = Decimal(printed[:-1]), printed[-1]
    value = (Decimal(base + counted) / _UNITS[unit]).quantize(digits, ROUND_HALF_UP)
    return Figure(printed, counted, f"{value}{unit}")


def _table(title: str, rows: list[PaperRow]) -> str:
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    cells = [
        ["model", "place" if rows[0].name else "formulas", "timm name", *(["", "counted", "gives", "verdict"] * 2)]
    ]
    cells[0][3], cells[0][7] = "params", "FLOPs"
    for row in rows:
        cells.append([row.model, row.place, row.name])
        figures = [row.params, row.macs]
        for figure in figures:
            if figure is None:
                cells[-1] += [""] * 4
                continue
            sign = "+" if row.place and row.name else ""
            explained = row.note and (not figure.agrees or all(f is not None and f.agrees for f in figures))
            mark = f" [{notes.index(row.note) + 1}]" if explained else ""
            verdict = ("agrees" if figure.agrees else "off") + mark
            cells[-1] += [figure.printed, f"{figure.counted:{sign},}", figure.gives, verdict]
    remarks = [*(f"[{n}] {note}." for n, note in enumerate(notes, 1)), f"Rule: {TABLES[title]}"]
    return "\n".join(
        [title, *text_table(cells, right=(3, 4, 5, 7, 8, 9)), *(textwrap.fill(remark, 120) for remark in remarks)]
    )

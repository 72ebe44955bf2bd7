"""Budgets: every recipe that allocates, and uniform bits, at the same stored bits, with KL predicted and measured.

    FEWBITS_DATA=... python -m benchmarks.allocation [--bpw 2.5 3 3.5] [--recipes auto baq ...]

One survey serves all budgets of a recipe, and one calibration (of the original model, as in ``fewbits sweep``) all
rows; ``--sequential`` quantizes as ``fewbits quantize`` does, with statistics that see what was quantized before. Rows
that an earlier run left are kept; KL is on the windows of ``protocol.py``. The menu holds no affine grid of 4 or more
bits with groups of 32: this model comes from such a grid, so that they fit it by accident.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import fewbits
from benchmarks import protocol
from fewbits.quant.allocate.planning import Planner
from fewbits.quant.allocate.run import prepare_planner
from fewbits.quant.recipe import Budget, Recipe, load_recipe
from fewbits.quant.source import open_source

BUDGETS = [2.25, 2.5, 3.0, 3.5, 4.25]
MENUS = {
    "auto": ["int2_g192", "int2_g64", "int2_g32", "int3_g192", "int3_g64", "int3_g32", "int4_g192", "int4_g64",
             "int5_g64", "int6_g64", "int8_g64"],
    "baq": ["int2", "int3", "int4", "int5", "int6", "int8"],
    "baq-matrices": ["int2_g192", "int2_g64", "int3_g64", "int4_g64", "int5_g64", "int6_g64", "int8_g64"],
    "adaquant-ip": ["int2_g192", "int3_g64", "int4_g64", "int6_g64"],
    "layerwise-lim": ["int2_g192", "int4_g64"], "layerwise-zd": ["int2_g192", "int4_g64"],
    "luq": ["int2_g192", "int4_g64"],
    "finequant": [f"int{b}_{g}" for b in (2, 3) for g in ("row", "g192", "g96", "g64", "g32")]
    + ["int4_row", "int4_g192", "int4_g96", "int4_g64"],
}
MENUS["auto-trellis"] = ["trellis1", "trellis2", "trellis3", "trellis4", "int5_g64", "int6_g64", "int8_g64"]
MENUS["evopress"] = MENUS["auto"]
AUTOSCHEME = "AutoScheme (auto-round)"
MENUS["baq-across"] = MENUS["baq-wide"] = MENUS["auto-columns"] = MENUS["baq"]
MORE: dict[str, dict[str, Any]] = {
    "baq-across": {"allocate.damage": "baq"}, "baq-matrices": {"allocate.damage": "baq", "allocate.unit": "tensor"},
    "baq-wide": {"allocate.column_group": 192},  # 2.25 bits are below what groups of 64 can reach
    "auto-trellis": {"allocate.rivals": []},
    "auto-columns": {"allocate.unit": "columns", "allocate.damage": "fisher", "allocate.rivals": []},
}
"""What a row changes in the recipe that it is named after."""

UNIFORM = ["int2_g192", "int2_g64", "int2_g32", "int3_g192", "int3_g64", "int3_g32", "int4_g192", "int4_g64"]


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--bpw", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--recipes", nargs="*", default=[*MENUS, "uniform"])
    parser.add_argument("--sequential", action="store_true")
    parser.add_argument("--generations", type=int, default=10, help="of evopress; each takes over a minute")
    parser.add_argument("--autoscheme", metavar="PYTHON", help="interpreter of an environment with auto-round")
    args = parser.parse_args()
    MORE["evopress"] = {"allocate.generations": args.generations}
    source = protocol.real_model()
    baseline = open_source(source).path
    bench = "allocation-sequential" if args.sequential else "allocation"
    stats = protocol.RESULTS / "stats"
    rows: list[dict[str, Any]] = protocol.load_rows(bench)

    def measure(chosen: Recipe, key: tuple[str, float | str], **more: Any) -> None:
        out = protocol.RESULTS / "checkpoints" / f"{bench}-{key[0]}"
        if args.sequential:
            chosen = _sequential(chosen)
        made = fewbits.quantize(source, out, recipe=chosen, force=True, stats=None if args.sequential else stats)
        scores = fewbits.evaluate(
            out, baseline=baseline, text=[protocol.text("test")], window=protocol.WINDOW, limit=protocol.KL_WINDOWS,
        ).to_json()
        row = {"recipe": key[0], "budget": key[1], "bits_per_weight": made.bits_per_weight, "seed": 0,
               "kl_mean": scores["kl_mean"], "kl_stderr": scores["kl_stderr"], "held_out": made.measured,
               "cpu_seconds": made.cpu_seconds, **more}
        rows.append(row)
        print(f"{key[0]} {key[1]}: {made.bits_per_weight:.4f} stored, KL {row['kl_mean']:.4f} ± {row['kl_stderr']:.4f}"
              f"{', predicted ' + format(more['predicted']['kl_mean'], '.4f') if more.get('predicted') else ''}",
              flush=True)
        protocol.save(bench, rows)

    def known(recipe: str, budget: float | str) -> bool:
        return any(r["recipe"] == recipe and r["budget"] == budget for r in rows)

    todo = [b for b in args.bpw if not known(AUTOSCHEME, b)] if args.autoscheme else []
    for found in _autoscheme(args.autoscheme, baseline, todo) if todo else []:
        rules = [{"match": name, "format": fmt} for name, fmt in found["formats"].items()]
        chosen = recipe("gptq", {"rules": rules})
        measure(chosen, (AUTOSCHEME, found["budget"]), survey_cpu_seconds=found["cpu_seconds"])
    for name in args.recipes:
        if name == "uniform":
            for fmt in UNIFORM:
                if not known(name, fmt):
                    rules = [{"match": "model.layers.*", "format": fmt}]
                    measure(recipe("gptq", {"rules": rules}), (name, fmt))
            continue
        budgets = [b for b in args.bpw if not known(name, b)]
        if not budgets:
            continue
        started = time.process_time()
        planner = _survey(name, source, stats)
        survey_seconds = time.process_time() - started
        for b in budgets:
            try:
                plan = planner.plan(Budget(bpw=b))
            except fewbits.FewbitsError as error:
                print(f"{name} {b}: {error}")
                continue
            chosen = plan.recipe
            if plan.predicted is None:  # no KL was foreseen, so none needs to be measured on held-out rows
                chosen = chosen.model_copy(update={"budget": Budget()})
            facts = plan.to_json()
            measure(chosen, (name, b), survey_cpu_seconds=survey_seconds,
                    **{k: facts[k] for k in ("predicted", "damage", "trust", "search", "election", "seconds")})


def _overrides() -> dict[str, Any]:
    settings = {k: v for k, v in protocol.CALIBRATION.items() if k.startswith("calibration.")}
    return {**settings, "calibration.sources": [str(protocol.text("valid"))], "calibration.inputs": "original",
            "calibration.true_sequential": False}


def _sequential(recipe: Recipe) -> Recipe:
    settings = recipe.calibration.model_copy(update={"inputs": "quantized", "true_sequential": True})
    return recipe.model_copy(update={"calibration": settings})


def recipe(name: str, more: dict[str, Any]) -> Recipe:
    """A recipe on the protocol's calibration, with statistics of the original model."""
    base = "baq" if name.startswith("baq") else name.removesuffix("-columns").removesuffix("-trellis")
    return load_recipe(base, {**_overrides(), **MORE.get(name, {}), **more})


def _autoscheme(python: str, model: Path, budgets: list[float]) -> list[dict[str, Any]]:
    """What auto-round chooses, by ``peer_autoscheme.py``; a backward pass for each format limits the menu."""
    out = protocol.RESULTS / "autoscheme.json"
    subprocess.run([
        python, str(protocol.ROOT / "benchmarks" / "peer_autoscheme.py"), "--model", str(model),
        "--text", str(protocol.text("valid")), "--formats", *MENUS["adaquant-ip"], "--bpw", *map(str, budgets),
        "--json", str(out), "--threads", str(torch.get_num_threads()),
    ], check=True)
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def _survey(name: str, source: Path, stats: Path) -> Planner:
    chosen = recipe(name, {"allocate.formats": MENUS[name]})
    planner, _ = prepare_planner(source, chosen, None, stats, None, None, 0, None)
    return planner


if __name__ == "__main__":
    main()

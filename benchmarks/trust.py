"""Trust: how well each damage model ranks tensors, against the KL of each quantized alone, on the protocol's model.

    FEWBITS_DATA=... python -m benchmarks.trust [--models fisher hessian ...]

Spearman's rho over all linears at the smallest format, and over tensors and two formats together. What is measured
alone is kept in the folder of statistics, and is there already after ``benchmarks.allocation`` has run ``auto``.
"""

from __future__ import annotations

import time

from scipy.stats import spearmanr

from benchmarks import allocation, protocol
from fewbits.calibration.sensitivity import DAMAGE, measure, measured_alone
from fewbits.quant.allocate.run import prepare_planner

MENU = ["int2_g192", "int4_g64"]


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=[d for d in DAMAGE if d not in ("kl", "measured")])
    args = parser.parse_args()
    recipe = allocation.recipe("auto", {"allocate.formats": MENU, "allocate.rivals": [], "allocate.damage": "fisher"})
    planner, _ = prepare_planner(protocol.real_model(), recipe, None, protocol.RESULTS / "stats", None, None, 0, None)
    job = planner.job
    alone = {(n, e): kl for n, e, kl in measured_alone(job, job.menu)}
    rows = []
    for name in args.models:
        start = time.process_time()
        losses = measure(job, name)
        spent = time.process_time() - start
        first = [(losses[n][MENU[0]], alone[n, MENU[0]]) for n in job.menu]
        both = [(losses[n][e], kl) for (n, e), kl in alone.items()]
        rows.append({
            "damage": name, "seed": 0, "tensors": len(first), "cpu_seconds": spent,
            "rho": float(spearmanr(*zip(*first)).statistic), "rho_both": float(spearmanr(*zip(*both)).statistic),
        })
        print(f"{name}: {rows[-1]['rho']:.3f} at {MENU[0]}, {rows[-1]['rho_both']:.3f} with {MENU[1]}", flush=True)
        protocol.save("trust", rows)


if __name__ == "__main__":
    main()

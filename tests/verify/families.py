"""Compare families under plans of each kind with a whole model: those that tensor parallelism knows, and some others.

python -m tests.verify.families [FAMILY ...]
"""

import sys

from moreh.models.families import FAMILIES, tensor_parallel_families
from tests.helpers.models.families import NOT_TENSOR_PARALLEL, PLANS
from tests.helpers.sharded import cases
from tests.helpers.workers import WorkerError, run_on_workers

TOLERANCE = 1e-9


def main(families):
    """Print the largest difference of each family and plan; the exit code is 1 if any is too large."""
    failed = 0
    for family in families or [*tensor_parallel_families(), *NOT_TENSOR_PARALLEL]:
        for name, plan in PLANS.items():
            if family in NOT_TENSOR_PARALLEL and plan.get("tensor", 1) > 1:
                continue
            if FAMILIES[family].whole and plan.get("sequence_parallel"):
                continue
            try:
                # Each difference is infinite where there is a NaN.
                difference = max(max(result) for result in run_on_workers(cases.compare, [(family, plan)], size=4)[0])
                result = f"{difference:.1e}"
                failed += not difference < TOLERANCE
            except WorkerError as error:
                result, failed = f"failed: {str(error).strip().splitlines()[-1][:200]}", failed + 1
            print(f"{family:20} {name:16} {result}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Verify every plan of the planner on eight processes: a training with it must be that of a single process.

    python -m tests.verify.plans [--model gpt2] [--sample 40] [--only 'tp2 pp2 dp2 mb1x4'] [--loss custom]
        [--broken no-tied-sum]

Each plan that the planner enumerates for eight devices and tiny models runs a short training as a script writes it, in
float64 on gloo. Compared with the plain loop of transformers are

- the losses, the gradient norms and an evaluation,
- the first step's gradients and the weights in the end, element by element.

That layers are called as often, and processes hold as many elements, as the plan says shows that it was really
carried out.
"""

import argparse
import random
import sys
import time

from moreh.errors import PlanError
from tests.helpers.plans.cases import MODELS, all_plans, plan_of
from tests.helpers.plans.faults import FAULTS
from tests.helpers.plans.runs import TOLERANCE, Differences, verify
from tests.helpers.plans.training import LOSSES

PLANS_PER_LINE = 20


def main():
    options = parse_options()
    cases = selected_cases(options)[options.first - 1 :]
    counts = ", ".join(
        f"{sum(family == name for family, _ in cases)} of {len(all_plans(name))} for {name}" for name in MODELS
    )
    print(f"{len(cases)} plans: {counts}", flush=True)
    started = time.monotonic()
    verdicts = []
    for index, (family, plan) in enumerate(cases, start=options.first):
        verdict = verify(family, plan, options.broken, loss=options.loss)
        verdicts.append(verdict)
        if options.verbose:
            worst = "failed" if verdict.differences is None else f"{verdict.differences.worst:.1e}"
            print(
                f"{worst} {verdict.seconds:.1f} s ({verdict.cpu_s:.1f} s of CPU time)  {verdict.text}",
                flush=True,
            )
        for problem in verdict.problems:
            print(f"WRONG  {verdict.text}\n    {problem}", flush=True)
        if index % PLANS_PER_LINE == 0:
            minutes = (time.monotonic() - started) / 60
            print(f"{index} of {len(cases) + options.first - 1} plans after {minutes:.0f} min", flush=True)
    summarize(verdicts, time.monotonic() - started)
    return 1 if any(verdict.problems for verdict in verdicts) else 0


def parse_options():
    parser = argparse.ArgumentParser(description="Run every plan of the planner and compare it with a single process.")
    parser.add_argument("--model", choices=MODELS, help="one of the models; both if left out")
    parser.add_argument("--sample", type=int, metavar="N", help="N plans of each model, the same ones each time")
    parser.add_argument(
        "--first", type=int, default=1, metavar="N", help="begin with plan number N, where a run was interrupted"
    )
    parser.add_argument(
        "--only", metavar="PLAN", help="this plan, as moreh-plan writes it, for example 'tp2 pp2 dp2 mb1x4'"
    )
    parser.add_argument(
        "--broken", choices=[name for name in FAULTS if name], help="run with a fault that must be found"
    )
    parser.add_argument(
        "--loss",
        choices=LOSSES,
        default="built-in",
        help="the model's loss, or one that the script makes of the logits",
    )
    parser.add_argument("--verbose", action="store_true", help="a line for each plan")
    return parser.parse_args()


def selected_cases(options):
    """Pairs of a model and a plan."""
    families = [options.model] if options.model else list(MODELS)
    if options.only is not None:
        cases, errors = [], []
        for family in families:
            try:
                cases.append((family, plan_of(family, options.only)))
            except PlanError as error:
                errors.append(f"{family}: {error}")
        if not cases:
            sys.exit("\n".join(errors))
        return cases
    cases = []
    for family in families:
        plans = list(all_plans(family))
        if options.sample is not None:
            plans = random.Random(0).sample(plans, min(options.sample, len(plans)))
        cases += [(family, plan) for plan in plans]
    return cases


def summarize(verdicts, seconds):
    """Print how many plans ran, the worst difference of each kind, and the plans that failed."""
    failed = [verdict for verdict in verdicts if verdict.problems]
    print(
        f"\n{len(verdicts)} plans in {seconds / 60:.1f} min, {len(failed)} of them wrong. "
        "The worst relative differences:"
    )
    ran = [verdict for verdict in verdicts if verdict.differences is not None]
    for kind in Differences.__dataclass_fields__ if ran else ():
        worst = max(ran, key=lambda verdict: getattr(verdict.differences, kind))
        print(f"  {kind:<11} {getattr(worst.differences, kind):.1e}  {worst.text}")
    if failed:
        print(f"Wrong, which is: a difference above {TOLERANCE:g}, no gradient, a step left out, an error, or no end:")
        for verdict in failed:
            print(f"  {verdict.text}")


if __name__ == "__main__":
    sys.exit(main())

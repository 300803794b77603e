"""The plans that several workers carry out: the harness takes them in turns, so that a group meets all of them."""

import zlib
from dataclasses import replace

# By name, the traits of a plan and how many workers it has. "auto" leaves the choice to the planner.
PLANS = {
    "auto": {},
    "tp2": {"tensor": 2, "pipeline": 1, "data": 1},
    "pp2": {"tensor": 1, "pipeline": 2, "data": 1},
    "dp2": {"tensor": 1, "pipeline": 1, "data": 2, "sharding": "none"},
    "dp2-sharded": {"tensor": 1, "pipeline": 1, "data": 2, "sharding": "parameters"},
    "tp2pp2": {"tensor": 2, "pipeline": 2, "data": 1},
    "tp2dp2": {"tensor": 2, "pipeline": 1, "data": 2},
    "pp2dp2": {"tensor": 1, "pipeline": 2, "data": 2},
    "dp4-sharded": {"tensor": 1, "pipeline": 1, "data": 4, "sharding": "parameters"},
}
# How many of the fastest plans are looked through for one with the traits.
COUNT = 10_000


def workers_of(name):
    """How many workers a plan has; None if any number."""
    traits = PLANS[name]
    return traits["tensor"] * traits["pipeline"] * traits["data"] if traits else None


def plans_for(workers, chosen=()):
    """The names of the plans for a number of workers: of the chosen ones, or of all if none is chosen."""
    return [name for name in chosen or PLANS if workers_of(name) in (None, workers)]


def plan_in_turn(pattern_name, workers, chosen=()):
    """The plan that a pattern is run with, always the same; None if the chosen ones are for other numbers."""
    names = plans_for(workers, chosen)
    return names[zlib.crc32(pattern_name.encode()) % len(names)] if names else None


def force_plan(name):
    """Let the planner of this process choose the fastest plan with some traits, or its own if no plan has them."""
    from moreh.runtime.engine import choose_plan

    traits = PLANS[name]
    search = choose_plan.search

    def search_with_traits(training, environment, constraints, count=10, threads=1):
        result = search(training, environment, constraints, count=COUNT, threads=threads)
        fitting = [
            prediction
            for prediction in result.best
            if all(getattr(prediction.plan, trait) == value for trait, value in traits.items())
        ]
        return replace(result, best=(fitting or result.best)[:count])

    if traits:
        choose_plan.search = search_with_traits


def use_synthetic_machine():
    """Plan for a machine of constants: measuring this one takes seconds, and its plans would differ from another's."""
    from moreh.planner.hardware import environment
    from tests.helpers.planner.synthetic_profile import synthetic_profile

    environment.local_profile = synthetic_profile

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
# Has at least as many devices as workers.
FLAVOR = "xLarge.512GB"
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
    """Let the planner of this process choose the fastest plan with some traits, or its own if no plan has them.

    Returns the list to which each search adds whether a plan has them.
    """
    from moreh.runtime.engine import choose_plan

    traits, found = PLANS[name], []
    search = choose_plan.search

    def search_with_traits(training, environment, constraints, count=10, threads=1):
        result = search(training, environment, constraints, count=COUNT, threads=threads)
        fitting = [
            prediction
            for prediction in result.best
            if all(getattr(prediction.plan, trait) == value for trait, value in traits.items())
        ]
        found.append(bool(fitting))
        return replace(result, best=(fitting or result.best)[:count])

    if traits:
        choose_plan.search = search_with_traits
    return found


def plan_for_fixed_devices():
    """Plan for devices of the catalogue: measuring this machine takes seconds, and another one has other plans."""
    from moreh.accelerator.flavors import find_flavor
    from moreh.planner.hardware.cluster import cluster_for_flavor
    from moreh.planner.hardware.environment import make_environment
    from moreh.runtime.engine import choose_plan

    def environment(workers, software):
        return make_environment(cluster_for_flavor(find_flavor(FLAVOR)), software).with_devices(workers)

    choose_plan.measured_environment = environment

"""Patches the functions with which a generator without a seed gets one, for several workers."""

from collections.abc import Callable
from typing import Any

from moreh.patches.patch import Patch

_NO_PUBLIC_WAY = "The script makes the generator itself, and no library has a hook for where its seed comes from."

NUMPY_BITS = Patch(
    target="numpy.random.bit_generator.randbits",
    why="On several workers, `np.random.default_rng()`, `np.random.RandomState()` and `np.random.seed()` of a script "
    "take one seed on all of them.",
    no_public_way=_NO_PUBLIC_WAY,
    tested=("numpy 2.4",),
)
RANDOM_CLASS = Patch(
    target="random.Random.seed",
    why="On several workers, `random.Random()` of a script takes one seed on all of them.",
    no_public_way=_NO_PUBLIC_WAY,
    tested=("Python 3.11",),
)
RANDOM_MODULE = Patch(
    target="random.seed",
    why="On several workers, `random.seed()` of a script takes one seed on all of them.",
    no_public_way=_NO_PUBLIC_WAY,
    tested=("Python 3.11",),
)
TORCH_SEED = Patch(
    target="torch",
    names=("seed", "random.seed"),
    why="On several workers, `torch.seed()` of a script takes one seed on all of them.",
    no_public_way=_NO_PUBLIC_WAY,
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)

# Makes the function that takes the place of an original.
MakeFunction = Callable[[Any], Any]


def install_fresh_seeds(
    numpy_bits: MakeFunction | None, class_seed: MakeFunction, module_seed: MakeFunction, torch_seed: MakeFunction
) -> None:
    """Replace the functions, once in a process; `numpy_bits` is None if NumPy is not installed."""
    if numpy_bits is not None:
        NUMPY_BITS.install(numpy_bits)
    RANDOM_CLASS.install(class_seed)
    RANDOM_MODULE.install(module_seed)
    TORCH_SEED.install_each(lambda _, original: torch_seed(original))


def uninstall_fresh_seeds() -> None:
    """Put the originals back."""
    for patch in (NUMPY_BITS, RANDOM_CLASS, RANDOM_MODULE, TORCH_SEED):
        if patch.is_active:
            patch.uninstall()

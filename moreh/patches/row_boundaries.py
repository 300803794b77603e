"""Rows of one sequence each, of which transformers need not ask a GPU whether they hold several.

Without a mask and a cache, a model of transformers looks in its positions for sequences that begin anew. To know the
answer, Python waits until the GPU has computed everything before it, once in each micro-batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moreh.patches.patch import Patch

ROW_BOUNDARIES = Patch(
    target="transformers.masking_utils.find_packed_sequence_indices",
    why="While a GPU computes a micro-batch in which each row is one sequence, the function returns this at once. "
    "The original waits for the GPU to determine it.",
    no_public_way="A mask of ones makes transformers wait too, and a mask of pairs of tokens rules out the fastest "
    "attention.",
    tested=("transformers 5.17", "transformers 5.23", "transformers 5.24"),
)
# A call with one of these may have several sequences in a row.
_OTHER_ROWS = ("attention_mask", "position_ids")


@contextmanager
def one_sequence_in_each_row(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Compute a micro-batch with these arguments; nothing is asked where its rows are known to be one sequence each.

    No other thread may compute a model meanwhile.
    """
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    if tokens.device.type == "cpu" or any(inputs.get(name) is not None for name in _OTHER_ROWS):
        yield
        return
    ROW_BOUNDARIES.install(lambda original: _no_boundaries)
    try:
        yield
    finally:
        ROW_BOUNDARIES.uninstall()


def _no_boundaries(position_ids: Any) -> None:
    """The answer for positions that count up in each row."""

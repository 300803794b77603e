"""Patches the functions with which a script creates files and directories, for several workers."""

from collections.abc import Callable
from typing import Any

from moreh.patches.patch import Patch

_NO_PUBLIC_WAY = "The script calls the function directly, and neither Python nor the libraries have a hook around it."

OPEN = Patch(
    target="builtins.open",
    why="On several workers, only worker 0 appends to files; otherwise each worker would write each line. One worker "
    "writes a file that all of them write; otherwise a slow one would empty it while a fast one reads it.",
    no_public_way=_NO_PUBLIC_WAY,
    tested=("Python 3.11",),
)
IO_OPEN = Patch(
    target="io.open",
    why="The same function under the name that `pathlib` uses.",
    no_public_way=_NO_PUBLIC_WAY,
    tested=("Python 3.11",),
)
MKDIR = Patch(
    target="os.mkdir",
    why="On several workers, a directory that another worker has created in the same call is not an error. "
    "`os.makedirs`, `Path.mkdir` and `tempfile` use it.",
    no_public_way=_NO_PUBLIC_WAY,
    tested=("Python 3.11",),
)
REMOVALS = tuple(
    Patch(
        target=target,
        why="On several workers, a script's call is made once, when all workers have reached it; the others would find "
        "nothing, or remove what a slower worker still writes.",
        no_public_way=_NO_PUBLIC_WAY,
        tested=("Python 3.11",),
    )
    for target in ("os.remove", "os.unlink", "os.rename", "os.replace", "shutil.rmtree")
)
TORCH_SAVE = Patch(
    target="torch.save",
    why="On several workers, all of which write the file, it is complete at any time, so that each can read it.",
    no_public_way=_NO_PUBLIC_WAY,
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)
SAVE_PRETRAINED = Patch(
    target="transformers.modeling_utils.PreTrainedModel.save_pretrained",
    why="On several workers, one of them saves a model that is not sharded, in the requested dtype, and the others "
    "wait for its files.",
    no_public_way=_NO_PUBLIC_WAY,
    tested=("transformers 5.17", "transformers 5.23", "transformers 5.24"),
)

# Makes the function that takes the place of an original.
MakeFunction = Callable[[Any], Any]


def install_script_files(
    open_file: MakeFunction, mkdir: MakeFunction, removal: MakeFunction, save: MakeFunction, model: MakeFunction
) -> None:
    """Replace `open`, `os.mkdir`, removals, renamings, `torch.save`, and `save_pretrained` of models; once."""
    OPEN.install(open_file)
    IO_OPEN.install(open_file)
    MKDIR.install(mkdir)
    for patch in REMOVALS:
        patch.install(removal)
    TORCH_SAVE.install(save)
    SAVE_PRETRAINED.install(model)

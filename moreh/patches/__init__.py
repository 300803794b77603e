"""All process-wide patches of torch, transformers and other libraries, grouped into files.

`patch` says what a patch is and which are active; `catalog` lists all that are declared and renders their table
(`python -m moreh.patches`); `process_changes` lists changes of the process that replace no attribute of a library.
The patches are mechanism only: they import nothing of the packages that use them, which pass in the functions to call.
"""

from moreh.patches.patch import ActivePatch, Patch, active

__all__ = ["ActivePatch", "Patch", "active"]

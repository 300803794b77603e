"""Other changes of this package to its process: handlers, exit, warnings, the allocator.

The list is data only; each change is made in the file that it names, for the reason given. A test finds every such call
in the package and compares it with the list. The training scripts and `utils` are programs, whose process is their own.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessChange:
    """One kind of change in one file."""

    what: str
    """What is changed or called, such as "sys.excepthook"."""
    where: str
    """The file, such as "moreh/runtime/launch/world.py"."""
    why: str
    """What the change is for, when it is made, and whether it is taken back."""


PROCESS_CHANGES = (
    ProcessChange(
        "os.dup2",
        "moreh/console/output.py",
        "At the end of a tool that cannot write to standard output: what Python writes at its exit goes nowhere.",
    ),
    ProcessChange(
        "os.environ",
        "moreh/planner/report/figures.py",
        "While matplotlib is imported: a value of MPLBACKEND that it does not know would end the import. Put back.",
    ),
    ProcessChange(
        "warnings.filterwarnings",
        "moreh/patches/cuda/face.py",
        "Where torch is imported without a GPU: hides a DataLoader's warning that pinned memory needs an accelerator.",
    ),
    ProcessChange(
        "atexit.register",
        "moreh/accelerator/job.py",
        "When the process becomes a job: removes the job from the registry at the end.",
    ),
    ProcessChange(
        "global hooks of torch",
        "moreh/accelerator/job.py",
        "When the process becomes a job without a GPU: counts gradients and optimizer state around optimizer steps.",
    ),
    ProcessChange(
        "global hooks of torch",
        "moreh/runtime/engine/calls/recorded.py",
        "From the first training batch on one worker: before an optimizer's step, keeps the weights of a batch whose "
        "logits a script may still read.",
    ),
    ProcessChange(
        "sys.unraisablehook",
        "moreh/accelerator/memory/saved_activations.py",
        "When the process becomes a job: repeats a Ctrl-C that arrives in the backward pass, where Python discards it.",
    ),
    ProcessChange(
        "mallopt",
        "moreh/runtime/kernels/allocator.py",
        "From the first training step on a CPU: glibc keeps freed memory for the next step instead of returning it. "
        "Unless a malloc variable is set; disable=('keep_freed_memory',) switches it off.",
    ),
    ProcessChange(
        "log levels of libraries",
        "moreh/models/describe/from_source.py",
        "While a model is described: hides transformers' advice for people who run the model. Taken back.",
    ),
    ProcessChange(
        "warnings.filterwarnings",
        "moreh/runtime/checkpoint/dcp_io.py",
        "When one worker reads or writes a training state: hides torch's warning that there is no process group.",
    ),
    ProcessChange(
        "log levels of libraries",
        "moreh/runtime/launch/launcher.py",
        "In the process that starts workers: torch.distributed.elastic logs each signal that it sends.",
    ),
    ProcessChange(
        "os.environ",
        "moreh/runtime/launch/launcher.py",
        "In the process that starts workers: torch.distributed.elastic leaves signals to the launcher. The workers get "
        "the variable as it was.",
    ),
    ProcessChange(
        "signal.signal",
        "moreh/runtime/launch/supervisor.py",
        "While workers run: signals that stop a program are passed on to them. Taken back.",
    ),
    ProcessChange(
        "signal.signal",
        "moreh/runtime/launch/launcher.py",
        "At the end of the process that starts workers: it ends by the signal that ended a worker.",
    ),
    ProcessChange(
        "os._exit",
        "moreh/runtime/launch/launcher.py",
        "At the end of the process that starts workers: nothing after the hook's line may run in it.",
    ),
    ProcessChange(
        "signal.signal",
        "moreh/bootstrap.py",
        "In a new worker before it becomes the script: Ctrl-C shows no traceback of the bootstrap.",
    ),
    ProcessChange(
        "prctl",
        "moreh/bootstrap.py",
        "In a new worker on Linux: the system kills it when the process that started it ends.",
    ),
    ProcessChange(
        "os.chdir",
        "moreh/bootstrap.py",
        "In a new worker: the script runs in the directory in which it was started.",
    ),
    ProcessChange(
        "os.dup2",
        "moreh/bootstrap.py",
        "In a worker other than rank 0: errors go to its log, and there is no input.",
    ),
    ProcessChange(
        "os.execv",
        "moreh/bootstrap.py",
        "In a new worker: the bootstrap becomes the script.",
    ),
    ProcessChange(
        "global hooks of torch",
        "moreh/runtime/launch/watch/pulse.py",
        "In a worker: counts the steps of optimizers, so that the launcher sees how far the worker has come.",
    ),
    ProcessChange(
        "atexit.register",
        "moreh/runtime/launch/watch/pulse.py",
        "In a worker: tells the launcher that the script has ended, and that Python takes its time to shut down.",
    ),
    ProcessChange(
        "faulthandler.enable",
        "moreh/runtime/launch/watch/pulse.py",
        "In a worker: writes its stack to a file when it crashes, and at a real-time signal of the launcher.",
    ),
    ProcessChange(
        "sys.excepthook",
        "moreh/runtime/launch/worker_errors.py",
        "In a worker: writes the exception that ends it to a file, from which the launcher reports the first error.",
    ),
    ProcessChange(
        "sys.excepthook",
        "moreh/runtime/launch/world.py",
        "In a worker: puts back the hook that torch.distributed replaces by one that adds the rank to each line.",
    ),
    ProcessChange(
        "sys.stdout.reconfigure",
        "moreh/runtime/launch/world.py",
        "In a worker other than rank 0: lines reach its log at once, even if it is killed.",
    ),
    ProcessChange(
        "os._exit",
        "moreh/runtime/launch/world.py",
        "In a worker on systems other than Linux: ends it when the process that started it has ended.",
    ),
    ProcessChange(
        "atexit.register",
        "moreh/runtime/launch/world.py",
        "In a worker: ends the process group before Python shuts down, or its threads would abort the process.",
    ),
    ProcessChange(
        "os.environ",
        "moreh/patches/world_variables.py",
        "In a worker: RANK, WORLD_SIZE and the like are removed, since libraries that find them start a distributed "
        "training of their own; MOREH_WORKERS becomes 1.",
    ),
    ProcessChange(
        "torch.set_num_threads",
        "moreh/planner/hardware/microbenchmarks.py",
        "In a process of its own that measures this machine.",
    ),
    ProcessChange(
        "sys.stdout.reconfigure",
        "moreh/cli/terminal.py",
        "In the command-line tools, whose process it is: characters that the terminal lacks are replaced.",
    ),
)

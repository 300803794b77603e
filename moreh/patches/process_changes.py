"""Other changes of this package to its process: handlers, exit, warnings, the allocator.

The list is data only; each change is made in the file that it names, for the reason given. A test finds every such call
in the package and compares it with the list. The training scripts and `utils` are programs, whose process is their own.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessChange:
    """One kind of change in one file."""

    what: str
    """The object that is changed or called, such as "sys.excepthook"."""
    where: str
    """The file, such as "moreh/runtime/launch/world.py"."""
    why: str
    """The purpose of the change, when it is made, and whether it is taken back."""


PROCESS_CHANGES = (
    ProcessChange(
        "os.dup2",
        "moreh/console/output.py",
        "At the end of a tool that cannot write to standard output: discards what Python writes at its exit.",
    ),
    ProcessChange(
        "os.environ",
        "moreh/planner/report/figures.py",
        "While matplotlib is imported: removes MPLBACKEND, since an unknown value would end the import. Restored.",
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
        "moreh/runtime/engine/calls/kept_forwards.py",
        "On several workers, from the first custom loss: frees activations before the step of the weights they are of.",
    ),
    ProcessChange(
        "global hooks of torch",
        "moreh/runtime/engine/calls/unread.py",
        "From the first training batch: before an optimizer's step, keeps the weights of a batch whose logits a script "
        "may still read; on several workers at the first step.",
    ),
    ProcessChange(
        "mallopt",
        "moreh/runtime/kernels/allocator.py",
        "From the first training step on a CPU: tells glibc to keep freed memory for the next step instead of "
        "returning it. Not if a malloc variable is set; disable=('keep_freed_memory',) switches it off.",
    ),
    ProcessChange(
        "log levels of libraries",
        "moreh/models/describe/from_source.py",
        "While a model is described: hides transformers' advice for people who run the model. Restored afterwards.",
    ),
    ProcessChange(
        "warnings.filterwarnings",
        "moreh/runtime/checkpoint/dcp_io.py",
        "When one worker reads or writes a training state: hides torch's warning that there is no process group.",
    ),
    ProcessChange(
        "log levels of libraries",
        "moreh/runtime/launch/launcher.py",
        "In the process that starts workers: hides torch.distributed.elastic's log lines about sent signals.",
    ),
    ProcessChange(
        "os.environ",
        "moreh/runtime/launch/launcher.py",
        "In the process that starts workers: tells torch.distributed.elastic to leave signals to the launcher. The "
        "workers get the original value.",
    ),
    ProcessChange(
        "signal.signal",
        "moreh/runtime/launch/supervisor.py",
        "While workers run: passes signals that stop a program on to them. Restored afterwards.",
    ),
    ProcessChange(
        "signal.signal",
        "moreh/runtime/launch/launcher.py",
        "At the end of the process that starts workers: ends it with the signal that ended a worker.",
    ),
    ProcessChange(
        "os._exit",
        "moreh/runtime/launch/launcher.py",
        "At the end of the process that starts workers: ends it without running the script after the line.",
    ),
    ProcessChange(
        "signal.signal",
        "moreh/bootstrap.py",
        "In a new worker before it becomes the script: ends it on Ctrl-C without a traceback of the bootstrap.",
    ),
    ProcessChange(
        "prctl",
        "moreh/bootstrap.py",
        "In a new worker on Linux: tells the system to kill it when the process that started it ends.",
    ),
    ProcessChange(
        "os.chdir",
        "moreh/bootstrap.py",
        "In a new worker: changes to the directory in which the script was started.",
    ),
    ProcessChange(
        "os.dup2",
        "moreh/bootstrap.py",
        "In a worker other than rank 0: sends errors to its log, and makes standard input empty.",
    ),
    ProcessChange(
        "os.execv",
        "moreh/bootstrap.py",
        "In a new worker: replaces the bootstrap by the script.",
    ),
    ProcessChange(
        "global hooks of torch",
        "moreh/runtime/launch/watch/heartbeat.py",
        "In a worker: counts the steps of optimizers, so that the launcher sees how far the worker has come.",
    ),
    ProcessChange(
        "atexit.register",
        "moreh/runtime/launch/watch/heartbeat.py",
        "In a worker: tells the launcher that the script has ended, and that Python is shutting down.",
    ),
    ProcessChange(
        "faulthandler.enable",
        "moreh/runtime/launch/watch/heartbeat.py",
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
        "In a worker: restores the original hook; that of torch.distributed adds the rank to each line.",
    ),
    ProcessChange(
        "sys.stdout.reconfigure",
        "moreh/runtime/launch/world.py",
        "In a worker other than rank 0: flushes each line to its log, in case the worker is killed.",
    ),
    ProcessChange(
        "os._exit",
        "moreh/runtime/launch/world.py",
        "In a worker on systems other than Linux: ends it when the process that started it has ended.",
    ),
    ProcessChange(
        "atexit.register",
        "moreh/runtime/launch/world.py",
        "In a worker: ends the process group before Python shuts down; otherwise its threads would abort the process.",
    ),
    ProcessChange(
        "os.environ",
        "moreh/patches/world_variables.py",
        "In a worker: removes RANK, WORLD_SIZE and the like, since libraries that find them start their own "
        "distributed training; sets MOREH_WORKERS to 1.",
    ),
    ProcessChange(
        "torch.set_num_threads",
        "moreh/planner/hardware/microbenchmarks.py",
        "In a separate process that measures this machine: sets its number of threads.",
    ),
    ProcessChange(
        "sys.stdout.reconfigure",
        "moreh/cli/terminal.py",
        "In the command-line tools: replaces characters that the terminal cannot show.",
    ),
)

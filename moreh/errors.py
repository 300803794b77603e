"""The errors of this package. Each message names the value, the allowed values and the next step."""


class MorehError(Exception):
    """Base of every error that a user's action, not a defect, can cause."""


class OptionError(MorehError, ValueError):
    """An option of the hook, or an environment variable, has a value that cannot be used."""


class SecondBackwardError(OptionError, RuntimeError):
    """`backward()` through a loss whose gradients are handed over once. Also a RuntimeError, as torch's own is."""


class AcceleratorError(MorehError, RuntimeError):
    """An accelerator cannot do what was asked: unknown, busy, or too many of them."""


class AcceleratorBusyError(AcceleratorError):
    """Another process is using the accelerator."""


class RegistryError(MorehError, RuntimeError):
    """The files of the registry cannot be read or written."""


class PlanError(MorehError, ValueError):
    """A training cannot be planned: its model, its accelerator or a plan for it is not supported."""


class WorkerError(MorehError, RuntimeError):
    """The workers of a run do different things, or one of them failed."""


class CheckpointError(MorehError, RuntimeError):
    """A training cannot be saved under its plan, or a checkpoint does not fit the training that is to be resumed."""

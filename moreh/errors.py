"""The errors of this package. Each message names the value, the allowed values and the next step."""


class MorehError(Exception):
    """Base class of all errors that a user can cause and fix."""


class OptionError(MorehError, ValueError):
    """An option, an environment variable or a call of a model is invalid or not supported."""


class SecondBackwardError(OptionError, RuntimeError):
    """A second `backward()` through a loss. Also a RuntimeError, like torch's own error."""


class MissingCacheError(OptionError, AttributeError):
    """The cache of a model on several workers is used. Also an AttributeError, so that `hasattr` says no."""


class AcceleratorError(MorehError, RuntimeError):
    """An accelerator is unknown or busy, or there are too many accelerators."""


class AcceleratorBusyError(AcceleratorError):
    """Another process is using the accelerator."""


class RegistryError(MorehError, RuntimeError):
    """The files of the registry cannot be read or written."""


class PlanError(MorehError, ValueError):
    """A training job cannot be planned: its model, accelerator or plan is not supported."""


class WorkerError(MorehError, RuntimeError):
    """The workers of a run diverged, or one of them failed."""


class CheckpointError(MorehError, RuntimeError):
    """A checkpoint cannot be saved, or does not match the training job that is to be resumed."""

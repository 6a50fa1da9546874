"""Errors that a user can cause. Each message names the culprit and the fix."""


class MoloraError(Exception):
    """Parent of every error that molora raises on purpose."""


class ConfigError(MoloraError, ValueError):
    """A setting is wrong. The message names the field and the fix."""


class WrapError(MoloraError, ValueError):
    """A model cannot be wrapped, merged or unwrapped as asked."""


class RoutingError(MoloraError, RuntimeError):
    """A router could not route, or a forward lacks what its router needs."""


class CheckpointError(MoloraError, RuntimeError):
    """A checkpoint is missing, broken, foreign or cannot be written."""


class DataError(MoloraError, ValueError):
    """Training data is missing or malformed. The message names file and line."""


class TrainingError(MoloraError, RuntimeError):
    """Training cannot go on: for example too many non-finite steps in a row."""

"""Errors that a user can cause and fix. Each message names the cause and the fix.

The command line prints these errors without a traceback. Any other exception is a defect of peso.
"""


class PesoError(Exception):
    """The base class of all errors whose cause is outside the program."""


class ConfigError(PesoError):
    """An unknown key, a wrong type or an invalid value in a configuration."""


class UsageError(PesoError):
    """Options of a command that are missing, exclude each other or have an invalid value."""


class DataError(PesoError):
    """Unreadable, incomplete or inconsistent input. The message names the file, row, key or id."""


class UntrainableStage(DataError):
    """A stage without events, or in which no user has enough events."""


class NothingLeft(DataError):
    """A log without any events after cleaning."""


class NothingNew(DataError):
    """Events to append that are all in the stream already."""


class BackboneError(PesoError):
    """A language model that cannot be loaded, or that does not pass the checks when it is loaded."""


class AssetError(PesoError):
    """A model or data set that cannot be fetched or whose checksum is wrong."""


class WorkspaceError(PesoError):
    """A workspace that is missing, locked, damaged, newer than this version or configured differently."""


class FullDisk(WorkspaceError):
    """A file that could not be written because the disk is full. Existing files do not change."""


class TrainingError(PesoError):
    """Training that cannot start or continue."""


class Divergence(TrainingError):
    """A loss or a gradient that is not finite."""


class LostProcess(TrainingError):
    """One of several processes that train together has ended."""


class ExportError(PesoError):
    """A model that cannot be written in the requested form, or to the requested path."""

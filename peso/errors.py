"""Errors that a user can cause and cure. Each message names the cause and what to do.

The command line prints these without a traceback; everything else is a defect of ours.
"""


class PesoError(Exception):
    """Base of all errors with a cause outside the program."""


class ConfigError(PesoError):
    """An unknown key, a wrong type or an impossible value in a configuration."""


class UsageError(PesoError):
    """Options of a command that are missing, exclude each other or have an impossible value."""


class DataError(PesoError):
    """Unreadable, incomplete or inconsistent input: names file, row, key or id."""


class UntrainableStage(DataError):
    """A stage without events, or in which no user has enough of them."""


class NothingLeft(DataError):
    """A log of which the cleaning left no event."""


class NothingNew(DataError):
    """Events to append of which the stream has every one."""


class BackboneError(PesoError):
    """A language model that cannot be loaded or that does not pass the checks at loading."""


class AssetError(PesoError):
    """A model or data set that cannot be fetched or whose checksum is wrong."""


class WorkspaceError(PesoError):
    """A workspace that is missing, locked, damaged, newer than this version or configured differently."""


class FullDisk(WorkspaceError):
    """Something that could not be written for want of space; what was there before stays."""


class TrainingError(PesoError):
    """Training that cannot start or go on."""


class Divergence(TrainingError):
    """A loss or a gradient that is not finite."""


class LostProcess(TrainingError):
    """One of several processes that train together is gone."""


class ExportError(PesoError):
    """A model that cannot be written in the form asked for, or not where it was asked for."""

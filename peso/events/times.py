"""Parse the times of logs: seconds, milliseconds, microseconds, ISO text or a pattern."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import duckdb

from peso.errors import DataError
from peso.events.database import literal

MICROSECONDS = {"seconds": 1e6, "milliseconds": 1e3, "microseconds": 1.0}
# Seconds from this limit on would be after the year 5138, so such a number is in milliseconds, and so on.
_LIMITS = {"seconds": 1e11, "milliseconds": 1e14, "microseconds": 1e17}
_NUMERIC = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL", "U")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
END = 253_370_764_800_000_000  # the year 9999 in microseconds, where Python's calendar ends


@dataclass(frozen=True)
class Clock:
    """The format of a log's times.

    ``kind`` is ``number``, ``iso``, ``typed`` (the file has a timestamp or date type) or a strptime pattern.
    ``unit`` is the unit of numbers; None until it is known.
    """

    kind: str
    unit: str | None = None

    @property
    def stated(self) -> str:
        """The format as text for messages."""
        names = {"iso": "ISO text (UTC unless a zone is given)", "typed": "timestamps of the file's type"}
        return self.unit or names.get(self.kind, "a number" if self.kind == "number" else self.kind)

    def parse(self, column: str) -> str:
        """SQL: numbers in the log's unit, other times in microseconds; null if unreadable or negative."""
        if self.kind == "number":
            number = f"try_cast({column} AS DOUBLE)"
            most = END / MICROSECONDS[self.unit] if self.unit else 1e19  # the unit is found from the largest
            return f"CASE WHEN isfinite({number}) AND {number} BETWEEN 0 AND {most:.0f} THEN {number} END"
        if self.kind == "iso":
            return _finite(f"try_cast({column} AS TIMESTAMPTZ)")
        if self.kind == "typed":
            return _finite(f"{column}::TIMESTAMPTZ")
        return _finite(f"try_strptime({column}::VARCHAR, {literal(self.kind)})")

    def in_microseconds(self, column: str) -> str:
        """SQL: the result of :meth:`parse` in microseconds."""
        if self.kind != "number":
            return column
        assert self.unit is not None
        return f"round({column} * {MICROSECONDS[self.unit]})::BIGINT"

    def moment(self, value: int | float | str, key: str) -> int:
        """A time from the configuration in microseconds.

        Args:
            value: ISO text, or a number in the unit of the log.
            key: the key of the configuration, for messages.

        Raises:
            DataError: the text cannot be read, or the number is before 1970 or after the year 9998.
        """
        if not isinstance(value, str):
            number = value * MICROSECONDS[self.unit or "seconds"]
            if not 0 <= number <= END:
                raise DataError(
                    f"{key}: {value} {self.unit or 'seconds'} is not between 1970 and 9998; "
                    "write it in the unit of the log, or as a date such as 2013-06-01"
                )
            return round(number)
        try:
            when = datetime.fromisoformat(value)
        except ValueError:
            raise DataError(
                f"{key}: {value!r} is not a date or time; write 2013-06-01 or 2013-06-01 12:00"
            ) from None
        return microseconds(when if when.tzinfo else when.replace(tzinfo=UTC))


def recognize(sample: Sequence[object], sql_type: str, time_format: str, where: str) -> Clock:
    """Recognize the format of times. The unit of numbers is determined by :func:`recognize_unit`.

    Args:
        sample: the first values of the column.
        sql_type: the column's type. Timestamps and dates are used as they are.
        time_format: the configured format; ``auto`` to recognize it.
        where: the column, for messages.

    Raises:
        DataError: the values are neither numbers nor ISO text, or they are numbers such as 20130601, which
            could be dates.
    """
    if sql_type.startswith(("TIMESTAMP", "DATE")):
        return Clock("typed")
    if time_format in MICROSECONDS:
        return Clock("number", time_format)
    if "%" in time_format:
        try:
            duckdb.execute(f"SELECT try_strptime('', {literal(time_format)})").fetchall()
        except duckdb.Error as error:
            cause = str(error).splitlines()[0]
            raise DataError(
                f"data.time_format: {time_format!r} is not a valid time pattern ({cause}); use strptime "
                "codes, such as %d/%m/%Y %H:%M"
            ) from None
        return Clock(time_format)
    given = [str(value) for value in sample if value is not None]
    if time_format == "auto" and given and all(map(_is_compact_date, given)):
        raise DataError(
            f"{where} has {given[0]!r}, which could be a day or a number of seconds in 1970; set "
            "data.time_format to '%Y%m%d' or seconds"
        )
    if sql_type.startswith(_NUMERIC):
        return Clock("number")
    if time_format == "iso":
        return Clock("iso")
    numbers = sum(_reads(value, "DOUBLE") for value in given[:20])
    texts = sum(_reads(value, "TIMESTAMPTZ") for value in given[:20])
    if not numbers and not texts:
        example = repr(given[0]) if given else "nothing"
        raise DataError(
            f"{where} has {example}, which is neither seconds, milliseconds nor ISO text; "
            "set data.columns.time to the right column, or data.time_format to a pattern such as %d/%m/%Y"
        )
    return Clock("number" if numbers >= texts else "iso")


def recognize_unit(least: float, most: float, where: str) -> str:
    """The unit of numbers, from the smallest and the largest.

    Raises:
        DataError: the two have different units, or are too large for microseconds.
    """
    units = [next((unit for unit, limit in _LIMITS.items() if v < limit), None) for v in (least, most)]
    if units[1] is None:
        raise DataError(f"{where} goes up to {most:.0f}, too large for microseconds; rescale the times")
    if units[0] != units[1]:
        raise DataError(
            f"{where} goes from {least:.0f} to {most:.0f}, which mixes {units[0]} and {units[1]}; "
            "correct the times, or set data.time_format to their unit"
        )
    return str(units[1])


def microseconds(when: datetime) -> int:
    """Microseconds since 1970 of a time with a time zone."""
    return (when - _EPOCH) // timedelta(microseconds=1)


def iso(microseconds_: int) -> str:
    """A time as ISO text in UTC."""
    return (_EPOCH + timedelta(microseconds=microseconds_)).isoformat().replace("+00:00", "Z")


def _is_compact_date(value: str) -> bool:
    """Whether a value looks like 20130601: a day in ISO 8601, but a time in August 1970 in seconds."""
    return re.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", value) is not None


def _finite(timestamp: str) -> str:
    return (
        f"CASE WHEN isfinite({timestamp}) AND year({timestamp}) BETWEEN 1970 AND 9998 "
        f"THEN epoch_us({timestamp}) END"
    )


def _reads(value: str, sql_type: str) -> bool:
    # fetch all rows, because an open result would block the process's shared connection
    rows = duckdb.execute(f"SELECT try_cast({literal(value)} AS {sql_type}) IS NOT NULL").fetchall()
    return bool(rows[0][0])

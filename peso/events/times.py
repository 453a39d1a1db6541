"""Moments as logs write them: seconds, milliseconds, microseconds, ISO text or a pattern."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import duckdb

from peso.errors import DataError
from peso.events.database import literal

MICROSECONDS = {"seconds": 1e6, "milliseconds": 1e3, "microseconds": 1.0}
# A number of seconds from here on would lie after the year 5138; so it is milliseconds, and so on.
_LIMITS = {"seconds": 1e11, "milliseconds": 1e14, "microseconds": 1e17}
_NUMERIC = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL", "U")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
END = 253_370_764_800_000_000  # the year 9999 in microseconds: the calendar ends with it


@dataclass(frozen=True)
class Clock:
    """How the times of a log are read.

    ``kind``: ``number``, ``iso``, ``typed`` (a timestamp or date already) or a strptime pattern.
    ``unit``: of numbers, once known.
    """

    kind: str
    unit: str | None = None

    @property
    def stated(self) -> str:
        """What was recognised, for people."""
        names = {"iso": "ISO text (UTC where no zone is named)", "typed": "timestamps of the file's own type"}
        return self.unit or names.get(self.kind, "a number" if self.kind == "number" else self.kind)

    def parse(self, column: str) -> str:
        """SQL: a number in the log's unit, else microseconds; null if unreadable or negative."""
        if self.kind == "number":
            number = f"try_cast({column} AS DOUBLE)"
            most = END / MICROSECONDS[self.unit] if self.unit else 1e19  # the unit follows from the greatest
            return f"CASE WHEN isfinite({number}) AND {number} BETWEEN 0 AND {most:.0f} THEN {number} END"
        if self.kind == "iso":
            return _finite(f"try_cast({column} AS TIMESTAMPTZ)")
        if self.kind == "typed":
            return _finite(f"{column}::TIMESTAMPTZ")
        return _finite(f"try_strptime({column}::VARCHAR, {literal(self.kind)})")

    def in_microseconds(self, column: str) -> str:
        """SQL: what :meth:`parse` gave, in microseconds."""
        if self.kind != "number":
            return column
        assert self.unit is not None
        return f"round({column} * {MICROSECONDS[self.unit]})::BIGINT"

    def moment(self, value: int | float | str, key: str) -> int:
        """A moment of the configuration in microseconds: ISO text, or a number in the unit of the log.

        Raises:
            DataError: unreadable text, or a moment before 1970 or after the year 9998.
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
                f"{key}: {value!r} is not a moment; write 2013-06-01 or 2013-06-01 12:00"
            ) from None
        return microseconds(when if when.tzinfo else when.replace(tzinfo=UTC))


def recognise(sample: Sequence[object], sql_type: str, time_format: str, where: str) -> Clock:
    """How times are written, from the first of them. The unit of numbers follows in :func:`recognise_unit`.

    Args:
        sample: values of the column.
        sql_type: the column's type; timestamps and dates are taken as they are.
        time_format: as configured; ``auto`` to recognise.
        where: names the column, for the message.

    Raises:
        DataError: neither numbers nor ISO text, or numbers such as 20130601.
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
                f"data.time_format: {time_format!r} is not a pattern of times ({cause})"
            ) from None
        return Clock(time_format)
    given = [str(value) for value in sample if value is not None]
    if time_format == "auto" and given and all(map(_is_compact_date, given)):
        raise DataError(
            f"{where} holds {given[0]!r}: a day, or a number of seconds in 1970? Say which in "
            "data.time_format: '%Y%m%d' or seconds"
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
            f"{where} holds {example}, which is neither seconds, milliseconds nor ISO text; "
            "name the right column in data.columns.time, or the pattern in data.time_format (%d/%m/%Y)"
        )
    return Clock("number" if numbers >= texts else "iso")


def recognise_unit(least: float, most: float, where: str) -> str:
    """The unit of numbers from their size.

    Raises:
        DataError: the least and the greatest are not of one unit, or beyond microseconds.
    """
    units = [next((unit for unit, limit in _LIMITS.items() if v < limit), None) for v in (least, most)]
    if units[1] is None:
        raise DataError(f"{where} goes up to {most:.0f}, which is beyond microseconds; rescale the times")
    if units[0] != units[1]:
        raise DataError(
            f"{where} goes from {least:.0f} to {most:.0f}, which mixes {units[0]} and {units[1]}; "
            "correct the times, or say which they are in data.time_format"
        )
    return str(units[1])


def microseconds(when: datetime) -> int:
    """Microseconds since 1970 of a moment with a zone."""
    return (when - _EPOCH) // timedelta(microseconds=1)


def iso(microseconds_: int) -> str:
    """A moment as ISO text in UTC."""
    return (_EPOCH + timedelta(microseconds=microseconds_)).isoformat().replace("+00:00", "Z")


def _is_compact_date(value: str) -> bool:
    """20130601 and the like: as ISO 8601 a day, as seconds one in August 1970."""
    return re.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", value) is not None


def _finite(timestamp: str) -> str:
    return (
        f"CASE WHEN isfinite({timestamp}) AND year({timestamp}) BETWEEN 1970 AND 9998 "
        f"THEN epoch_us({timestamp}) END"
    )


def _reads(value: str, sql_type: str) -> bool:
    # fetched to the end: a result left open would block the process's shared connection
    rows = duckdb.execute(f"SELECT try_cast({literal(value)} AS {sql_type}) IS NOT NULL").fetchall()
    return bool(rows[0][0])

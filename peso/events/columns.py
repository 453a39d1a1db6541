"""The names and types of the columns in which events, stages and items are stored."""

from __future__ import annotations

import pyarrow as pa

USER = "user"
ITEM = "item"
TIME = "time"
PREVIOUS = "previous"
CURRENT = "current"
ITEM_ID = "item_id"
TITLE = "title"
TEXT = "text"
CATEGORY = "category"

# One row per event, with the log's ids; time in Unix seconds.
EVENTS = pa.schema([(USER, pa.string()), (ITEM, pa.string()), (TIME, pa.int64())])
# One row per user of a stage; items are row numbers of the item table, oldest first.
STAGE = pa.schema([(USER, pa.string()), (PREVIOUS, pa.list_(pa.int32())), (CURRENT, pa.list_(pa.int32()))])
# The row number is the item number; rows are only appended. An unknown title, text or category is null.
ITEMS = pa.schema(
    [(ITEM_ID, pa.string()), (TITLE, pa.string()), (TEXT, pa.string()), (CATEGORY, pa.string())]
)

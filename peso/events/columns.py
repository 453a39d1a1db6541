"""Names and types of the columns that events, stages and items are stored under."""

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

# One row an event, in the log's own ids; time in unix seconds.
EVENTS = pa.schema([(USER, pa.string()), (ITEM, pa.string()), (TIME, pa.int64())])
# One row a user of a stage; items are row numbers of the item table, oldest first.
STAGE = pa.schema([(USER, pa.string()), (PREVIOUS, pa.list_(pa.int32())), (CURRENT, pa.list_(pa.int32()))])
# Row order is the item number; rows are only ever appended. Unknown title, text or category: null.
ITEMS = pa.schema(
    [(ITEM_ID, pa.string()), (TITLE, pa.string()), (TEXT, pa.string()), (CATEGORY, pa.string())]
)

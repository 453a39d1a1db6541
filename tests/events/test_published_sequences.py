"""Published data sets of sequences, in miniature: rows of a history and a target, and lists of users."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_logs import appended, data_config, histories, write_json_lines, write_log
from published import LOG, T, folder, found, lines, of_item, read

from peso.errors import DataError
from peso.events.sources import format_at, open_source
from peso.events.times import iso
from peso.runtime.progress import Silent


def test_minionerec_s_rows_of_history_and_target(tmp_path: Path) -> None:
    head = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid"
    train = [
        """A1,"['Lamp, blue', ""Ann's cup""]",Rug,"[0, 1]",2,"['<a_1>', '<a_2>']",<a_3>""",
        """B2,['Rug'],Pen,[2],3,['<a_3>'],<a_4>""",
        """A1,"['Lamp, blue', ""Ann's cup"", 'Rug']",Rug,"[0, 1, 2]",2,"['<a_1>']",<a_3>""",
    ]
    data = folder(
        tmp_path,
        **{
            "Toys.train.csv": "\n".join([head, *train]) + "\n",
            "Toys.valid.csv": f"{head}\nB2,\"['Rug', 'Pen']\",Lamp,\"[2, 3]\",0,[],<a_1>\n",
            "Toys.test.csv": f"{head}\nA1,['Rug'],Pen,[2],3,[],<a_4>\n",
        },
    )
    stream = read(tmp_path / "s", data, "sequences", stages=1)
    # a repeated item is an event of its own, and the parts follow one another
    assert histories(stream) == [{"A1": ([], ["0", "1", "2", "2", "3"]), "B2": ([], ["2", "3", "0"])}]
    assert [of_item(stream, item)[0] for item in "0123"] == ["Lamp, blue", "Ann's cup", "Rug", "Pen"]
    assert format_at(str(data), Silent()) == "csv"  # the columns could mean other things
    with pytest.raises(DataError, match="if 'history_item_id' has lists of items, use --format sequences"):
        open_source(data_config(format="csv", path=str(data)))


def test_dact_s_periods_with_vectors_beside_them(tmp_path: Path) -> None:
    data = tmp_path / "Tools"
    data.mkdir()
    vectors = {"ItemID": [1, 2], "embedding": [[0.5, 1.0], [0.0, 1.0]]}
    pq.write_table(pa.table(vectors), data / "item_emb_0.6_0.7.parquet")
    (data / "item_mapping.npy").write_bytes(b"")
    parts = {  # user: history and target in each row; the last 3 items only
        "train_0.6": [(7, [1], 2), (7, [1, 2], 3), (8, [9], 1)],
        "valid_0.6": [(7, [1, 2, 3], 4), (8, [9, 1], 2)],
        "test_0.6": [(7, [2, 3, 4], 5), (8, [9, 1, 2], 3)],
        "train_1.0": [(8, [2, 3, 5], 9)],
        "valid_1.0": [(8, [3, 5, 9], 6)],
        "test_1.0": [(8, [5, 9, 6], 7), (6, [1, 2], 3)],
        "train_0.7": [(7, [3, 4, 5], 6)],
        "valid_0.7": [(7, [4, 5, 6], 7), (8, [1, 2, 3], 4)],
        "test_0.7": [(7, [5, 6, 7], 8), (8, [2, 3, 4], 5)],
    }
    for name, rows in parts.items():
        user, history, target = map(list, zip(*rows, strict=True))
        table = pa.table({"history": history, "target": target, "user": user})
        pq.write_table(table, data / f"{name}.parquet")
    # events of the periods: 9, 5 and 6, in which the parts of a period follow one another
    (before, now, last) = histories(
        read(tmp_path / "s", data, "sequences", stages={"fractions": [9 / 20, 5 / 20, 6 / 20]})
    )
    assert before == {"7": ([], [*"12345"]), "8": ([], [*"9123"])}
    assert now == {"7": ([*"12345"], [*"678"]), "8": ([*"9123"], [*"45"])}
    assert last == {"8": ([*"912345"], [*"967"]), "6": ([], [*"123"])}


def test_lc_rec_s_lists_and_contents(tmp_path: Path) -> None:
    lists = {str(u): [(u + k) % 6 for k in range(10)] for u in range(3)}
    contents = {
        "0": {"title": "Lamp", "brand": "B", "description": "Bright", "categories": "Home, Light"},
        "1": {"title": "Cup", "brand": "", "description": "", "categories": ["Home", "Kitchen"]},
    }
    index = {str(item): ["<a_1>", "<b_2>"] for item in range(6)}
    data = folder(
        tmp_path,
        **{"Toys.inter.json": json.dumps(lists), "Toys.item.json": json.dumps(contents)},
        **{"Toys.index.json": json.dumps(index), "Toys.train.inter": "user_id:token\titem_id:token\n"},
    )
    assert found(data) == found(data / "Toys.inter.json") == "lc-rec"
    stream = read(tmp_path / "s", data, "lc-rec", stages=1)
    expected = {user: ([], [str(item) for item in items]) for user, items in lists.items()}
    assert histories(stream) == [expected]
    assert "time" not in stream.manifest
    assert of_item(stream, "0") == ("Lamp", "B\nBright", "Home, Light")
    assert of_item(stream, "1") == ("Cup", None, "Home > Kitchen")
    assert of_item(stream, "5") == (None, None, None)
    (data / "Toys.item.json").unlink()
    assert histories(read(tmp_path / "t", data / "Toys.inter.json", "lc-rec", stages=1)) == [expected]
    (data / "Toys.inter.json").write_text('{"0": [1, 2], "1": {"a": 3}}')
    with pytest.raises(DataError, match="user '1' has no list of items"):
        read(tmp_path / "u", data, "lc-rec")
    (data / "Games.inter.json").write_text("{}")
    with pytest.raises(DataError, match=r"has 2 files \*\.inter\.json, not one"):
        read(tmp_path / "v", data, "lc-rec")


@pytest.mark.parametrize("container", ["parquet", "jsonl", "csv"])
def test_a_history_and_a_target_in_every_container(tmp_path: Path, container: str) -> None:
    rows = [
        {"user": 7, "history": [10, 11], "target": 12, "timestamp": T},
        {"user": 8, "history": [12], "target": 10, "timestamp": T + 5},
        {"user": 7, "history": [10, 11, 12], "target": 13, "timestamp": T + 9},
        {"user": 8, "history": [12, 10], "target": 11, "timestamp": T + 10},
    ]
    path = tmp_path / f"train.{container}"
    if container == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif container == "jsonl":
        write_json_lines(path, rows)
    else:
        path.write_text(lines([("user", "history", "target", "timestamp")], ",") + "".join(
            f'{r["user"]},"{r["history"]}",{r["target"]},{r["timestamp"]}\n' for r in rows
        ))  # fmt: skip
    stream = read(tmp_path / "s", path, "sequences", stages=1)
    assert histories(stream) == [{"7": ([], ["10", "11", "12", "13"]), "8": ([], ["12", "10", "11"])}]
    assert stream.manifest["time"]["until"] == iso((T + 10) * 1_000_000)


def test_one_list_a_user_is_spread_over_the_stages(tmp_path: Path) -> None:
    rows = [{"user_id": f"u{u}", "items": [f"i{u + k}" for k in range(10)]} for u in range(3)]
    path = write_json_lines(tmp_path / "sequences.jsonl", rows)
    stream = read(tmp_path / "s", path, "sequences", stages={"fractions": [0.6, 0.4]})
    expected = {f"u{u}": [f"i{u + k}" for k in range(10)] for u in range(3)}
    first, second = histories(stream)
    assert first == {user: ([], items[:6]) for user, items in expected.items()}
    assert second == {user: (items[:6], items[6:]) for user, items in expected.items()}


def test_one_list_a_user_with_a_list_of_times(tmp_path: Path, reference: object) -> None:
    users = sorted({u for u, *_ in LOG})
    table = pa.table(
        {
            "uid": users,
            "item_id": [[i for u, i, _, _ in LOG if u == user] for user in users],
            "timestamp": [[t for u, _, t, _ in LOG if u == user] for user in users],
        }
    )
    pq.write_table(table, tmp_path / "listens.parquet")
    assert histories(read(tmp_path / "s", tmp_path / "listens.parquet", "sequences")) == reference


def test_columns_of_other_names_and_rows_without_a_user(tmp_path: Path) -> None:
    rows = [{"seen": ["a", "b"], "next": "c"}, {"seen": ["b", "c"], "next": "a"}]
    path = write_json_lines(tmp_path / "log.jsonl", rows)
    named = {"columns": {"history": "seen", "item": "next"}}
    stream = read(tmp_path / "s", path, "sequences", stages=1, **named)
    assert histories(stream) == [{"1": ([], ["a", "b", "c"]), "2": ([], ["b", "c", "a"])}]
    with pytest.raises(DataError, match="no column 'missing'"):
        open_source(data_config(format="sequences", path=str(path), columns={"item": "missing"}))
    with pytest.raises(DataError, match="has no column that is known to hold lists of items"):
        open_source(data_config(format="sequences", path=str(path)))


def test_a_row_that_is_not_a_sequence_is_named_or_skipped(tmp_path: Path) -> None:
    rows = [{"user": "a", "items": ["x", "y", "z"]}, {"user": "b", "items": 3}]
    path = write_json_lines(tmp_path / "log.jsonl", [*rows, {"user": "c", "items": ["x", "x", "x"]}])
    with pytest.raises(DataError, match=r"row 2 \(counted from 1, without a header\) has no item"):
        read(tmp_path / "s", path, "sequences", stages=1)
    stream = read(tmp_path / "t", path, "sequences", stages=1, on_error="skip")
    assert histories(stream) == [{"a": ([], ["x", "y", "z"]), "c": ([], ["x", "x", "x"])}]
    assert stream.manifest["skipped"] == 1


def test_a_log_without_times_is_cut_by_shares_and_takes_no_append(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "log.jsonl", [{"user": "a", "items": ["x", "y", "z"]}])
    with pytest.raises(DataError, match="has no times, so it cannot be cut by time"):
        read(tmp_path / "s", path, "sequences", stages={"boundaries": ["2020-01-01"]})
    stream = read(tmp_path / "t", path, "sequences", stages=1)
    with pytest.raises(DataError, match="was not made from a log with times"):
        appended(tmp_path / "more", stream, format="sequences", path=str(path), stages=1)
    log = write_log(tmp_path / "log.csv", [("a", "x", T + k) for k in range(3)])
    timed = read(tmp_path / "u", log, "csv", stages=1)
    with pytest.raises(DataError, match=r"has no times, so its events cannot be placed"):
        appended(tmp_path / "again", timed, format="sequences", path=str(path), stages=1)

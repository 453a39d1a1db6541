"""The formats in which data sets are published, in miniature: each gives the events that its files have."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_logs import data_config, histories, write_json_lines, write_log
from odd_logs import Notes
from published import LOG, T, folder, found, lines, of_item, read

from peso.config import load_config
from peso.errors import ConfigError, DataError
from peso.events.ingest import ingest
from peso.events.sources import format_at, open_source
from peso.events.stream import Stream
from peso.events.times import iso
from peso.runtime.progress import Silent


def days(seconds: int) -> str:
    return iso(seconds * 1_000_000)[:10]


# -- RecBole -----------------------------------------------------------------------------------------


def test_recbole(tmp_path: Path, reference: object) -> None:
    log = [("user_id:token", "item_id:token", "rating:float", "timestamp:float")]
    items = [("item_id:token", "title:token_seq", "class:token_seq"), ("i0", 'The "Lamp"', "Home Light")]
    data = folder(
        tmp_path,
        **{"shop.inter": lines(log + [(u, i, float(r), float(t)) for u, i, t, r in LOG])},  # type: ignore[list-item]
        **{"shop.item": lines(items)},
    )
    assert found(data) == found(data / "shop.inter") == "recbole"
    stream = read(tmp_path / "s", data, "recbole")
    assert histories(stream) == reference
    assert of_item(stream, "i0") == ('The "Lamp"', None, "Home, Light")


def test_recbole_without_times_is_in_the_order_of_the_file(tmp_path: Path, reference: object) -> None:
    rows = [("user_id:token", "item_id:token"), *((u, i) for u, i, _, _ in LOG)]
    stream = read(tmp_path / "s", folder(tmp_path, **{"shop.inter": lines(rows)}), "recbole")
    assert histories(stream) == reference
    assert "time" not in stream.manifest


def test_recbole_s_split_files_are_read_in_the_order_of_the_split(tmp_path: Path) -> None:
    head = ("session_id:token", "item_id_list:token_seq", "item_id:token")
    data = folder(
        tmp_path,
        **{
            "shop.train.inter": lines([head, ("u", "a", "b"), ("u", "a b", "c")]),
            "shop.valid.inter": lines([head, ("u", "a b c", "d")]),
            "shop.test.inter": lines([head, ("u", "a b c d", "e")]),
        },
    )
    stream = read(tmp_path / "s", data, "recbole", stages=1)
    assert histories(stream) == [{"u": ([], ["a", "b", "c", "d", "e"])}]
    (data / "shop.inter").write_text(lines([head[::2], *(("w", item) for item in "xyz")]))  # beside its parts
    assert histories(read(tmp_path / "t", data, "recbole", stages=1)) == [{"w": ([], ["x", "y", "z"])}]


def test_recbole_s_names_may_have_dots_and_a_folder_has_one_data_set(tmp_path: Path) -> None:
    log = lines([("user_id:token", "item_id:token"), *((u, i) for u, i, _, _ in LOG)])
    item = lines([("item_id:token", "title:token_seq"), ("i0", "Lamp")])
    data = folder(tmp_path, **{"shop-1.0.inter": log, "shop-1.0.item": item})
    assert of_item(read(tmp_path / "s", data, "recbole"), "i0")[0] == "Lamp"
    (data / "shop-1.0.inter").rename(data / "shop-1.0.part1.inter")
    assert of_item(read(tmp_path / "t", data, "recbole"), "i0")[0] == "Lamp"
    (data / "shop.inter").write_text(log)
    several = (
        r"several data sets, or variants of one \(shop-1.0.part1.inter, shop.inter\); give the file of one"
    )
    with pytest.raises(DataError, match=several):
        read(tmp_path / "u", data, "recbole")
    with pytest.raises(DataError, match=several):
        format_at(str(data), Silent())


# -- news, games, music, fashion, video --------------------------------------------------------------


def test_mind(tmp_path: Path) -> None:
    news = lines(
        [(f"N{k}", "sports", "golf", f'"Title" {k}', f"About {k}", "url", "[]", "[]") for k in range(9)]
    )
    train = lines(
        [
            (1, "U1", "11/11/2019 9:05:58 AM", "N0 N1", "N2-1 N3-0 N4-1"),
            (2, "U2", "11/10/2019 1:00:00 PM", "", "N5-0 N6-1"),
            (3, "U1", "11/10/2019 11:00:00 PM", "N0  N1 ", "N7-1"),
        ]
    )
    dev = lines([(1, "U2", "11/15/2019 8:00:00 AM", "N6", "N1-1 N12-0 N2-1")])
    for part, log in (("MINDsmall_dev", dev), ("MINDsmall_train", train)):
        (tmp_path / "mind" / part).mkdir(parents=True)
        (tmp_path / "mind" / part / "behaviors.tsv").write_text(log)
        (tmp_path / "mind" / part / "news.tsv").write_text(news)
    assert found(tmp_path / "mind") == found(tmp_path / "mind" / "MINDsmall_train") == "mind"
    stream = read(tmp_path / "s", tmp_path / "mind", "mind", stages=1)
    assert histories(stream) == [{"U1": ([], ["N0", "N1", "N7", "N2", "N4"]), "U2": ([], ["N6", "N1", "N2"])}]
    assert stream.manifest["time"]["from"] == "2019-11-10T13:00:00Z"  # where the histories are
    assert of_item(stream, "N1") == ('"Title" 1', "About 1", "sports > golf")


def test_steam_is_read_without_executing_it(tmp_path: Path) -> None:
    day = 86_400
    log = [(u, i, T - T % day + k * day, r) for k, (u, i, _, r) in enumerate(LOG)]
    reviews = [
        {"username": u, "hours": float(r), "product_id": i, "date": days(t), "t": '"b" \\ c', "early": False}
        for u, i, t, r in log
    ]  # fmt: skip
    text = "".join(f"{{u{repr(row)[1:]}\n" for row in reviews)  # as Python 2 wrote it
    data = tmp_path / "steam"
    data.mkdir()
    (data / "steam_reviews.json.gz").write_bytes(gzip.compress(text.encode()))
    (data / "steam_games.json").write_text(
        "{u'genres': [u'Action', u'Indie'], u'app_name': u'Kitty', u'id': u'i0', u'tags': [u'2D'], "
        "u'developer': u'K', u'price': 4.99}\n"
    )
    assert found(data) == "steam"
    stream = read(tmp_path / "s", data, "steam", min_rating=2)
    same = write_log(tmp_path / "same.csv", log, "user,item,time,rating")
    other = {"columns": {"rating": "rating"}, "min_rating": 2}
    assert histories(stream) == histories(read(tmp_path / "same", same, "csv", **other))
    assert of_item(stream, "i0") == ("Kitty", "K, 2D", "Action, Indie")
    ran = tmp_path / "ran"
    evil = f"{{u'username': __import__('pathlib').Path({str(ran)!r}).touch()}}\n"
    (data / "steam_reviews.json.gz").write_bytes(gzip.compress((text + evil).encode()))
    with pytest.raises(DataError, match="line 49 is neither JSON nor a Python dictionary"):
        read(tmp_path / "t", data, "steam")
    assert read(tmp_path / "u", data, "steam", on_error="skip").manifest["skipped"] == 1
    assert not ran.exists()


def test_amazon_2014(tmp_path: Path, reference: object) -> None:
    reviews = [
        {"reviewerID": u, "asin": i, "overall": float(r), "unixReviewTime": t, "helpful": [0, 1]}
        for u, i, t, r in LOG
    ]
    meta = {"asin": "i0", "title": "Sham\"poo's", "brand": "B", "description": "Soft",
            "categories": [["Beauty", "Hair Care"], ["Gifts"]], "related": {"bought": ["i1"]}}  # fmt: skip
    data = tmp_path / "amazon"
    data.mkdir()
    write_json_lines(data / "reviews_Beauty_5.json", reviews)
    (data / "meta_Beauty.json.gz").write_bytes(gzip.compress(f"{meta!r}\n{{'asin': 'i1'}}\n".encode()))
    assert found(data) == found(data / "reviews_Beauty_5.json") == "amazon-2014"
    stream = read(tmp_path / "s", data, "amazon-2014")
    assert histories(stream) == reference
    assert of_item(stream, "i0") == ("Sham\"poo's", "B\nSoft", "Beauty > Hair Care")
    assert of_item(stream, "i1") == (None, None, None)
    ratings = data / "ratings_Beauty.csv"
    ratings.write_text(lines([(u, i, float(r), t) for u, i, t, r in LOG], ","))
    assert histories(read(tmp_path / "t", ratings, "amazon-2014")) == reference
    with pytest.raises(DataError, match="should contain one file"):
        open_source(data_config(format="amazon-2014", path=str(data)))


def test_yambda(tmp_path: Path, reference: object) -> None:
    data = tmp_path / "50m"
    data.mkdir()
    table = pa.table(
        {
            "uid": pa.array([int(u[1:]) for u, *_ in LOG], pa.uint32()),
            "timestamp": pa.array([t - T for _, _, t, _ in LOG], pa.uint32()),
            "item_id": pa.array([int(i[1:]) for _, i, *_ in LOG], pa.uint32()),
            "event_type": ["listen" if k % 2 else "like" for k in range(len(LOG))],
            "played_ratio_pct": pa.array([50 if k % 2 else None for k in range(len(LOG))], pa.uint16()),
        }
    )
    pq.write_table(table, data / "multi_event.parquet")
    assert found(data) == "yambda"
    got = histories(read(tmp_path / "s", data, "yambda"))
    named = [
        {f"u{u}": tuple([f"i{i}" for i in part] for part in both) for u, both in stage.items()}
        for stage in got
    ]
    assert named == reference
    keep = {"events": {"column": "event_type", "keep": ["listen"]}}
    assert histories(read(tmp_path / "t", data, "yambda", stages=1, **keep))[0].keys() == {"1", "3"}
    by_user = table.group_by("uid").aggregate([("item_id", "list"), ("timestamp", "list")])
    sequential = tmp_path / "sequential"
    sequential.mkdir()
    names = ["uid", "item_id", "timestamp"]
    pq.write_table(by_user.rename_columns(names), sequential / "listens.parquet")
    assert found(sequential) == "yambda"
    assert histories(read(tmp_path / "u", sequential, "yambda")) == got


def test_kuairec(tmp_path: Path, reference: object) -> None:
    data = tmp_path / "KuaiRec" / "data"
    data.mkdir(parents=True)
    head = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio"
    write_log(data / "big_matrix.csv", [(u, i, 1, 2, "x", 20200705, float(t), r) for u, i, t, r in LOG], head)
    write_log(
        data / "kuairec_caption_category.csv",
        [("i0", "Cover", '"A, ""caption"""', "[tag]", 1, "Food", 2, "Cakes", 3, "")],
        "video_id,manual_cover_text,caption,topic_tag,first_level_category_id,first_level_category_name,"
        "second_level_category_id,second_level_category_name,third_level_category_id,third_level_category_name",
    )
    assert found(tmp_path / "KuaiRec") == found(data) == "kuairec"
    stream = read(tmp_path / "s", tmp_path / "KuaiRec", "kuairec")
    assert histories(stream) == reference
    assert of_item(stream, "i0") == ('A, "caption"', "Cover\n[tag]", "Food > Cakes")


def test_h_and_m(tmp_path: Path) -> None:
    day = 86_400
    log = [(u, f"0{k % 6}", T - T % day + k // 6 * day, 0) for k, (u, *_) in enumerate(LOG)]
    data = tmp_path / "hm"
    data.mkdir()
    write_log(
        data / "transactions_train.csv",
        [(days(t), u, i, 0.05, 2) for u, i, t, _ in log],
        "t_dat,customer_id,article_id,price,sales_channel_id",
    )
    write_log(
        data / "articles.csv",
        [("00", "Strap top", "Vest top", "Garment Upper body", "Black", "Ladieswear", '"Top, jersey."')],
        "article_id,prod_name,product_type_name,product_group_name,colour_group_name,index_group_name,detail_desc",
    )
    assert found(data) == "h-and-m"
    stream = read(tmp_path / "s", data, "h-and-m")
    same = write_log(tmp_path / "same.csv", [(u, i, t) for u, i, t, _ in log])
    assert histories(stream) == histories(read(tmp_path / "same", same, "csv"))
    category = "Ladieswear > Garment Upper body > Vest top"
    assert of_item(stream, "00") == ("Strap top", "Black\nTop, jersey.", category)
    with pytest.raises(ConfigError, match=r"data.min_rating: h-and-m has no ratings"):
        open_source(data_config(format="h-and-m", path=str(data), min_rating=1))


def test_last_fm_1k_s_quotes_are_part_of_its_names(tmp_path: Path) -> None:
    name = "userid-timestamp-artid-artname-traid-traname.tsv"
    rows = [
        (u, iso(t * 1_000_000), "", '"Weird Al', "" if i == "i0" else i, f'{i} 12" mix') for u, i, t, _ in LOG
    ]
    data = folder(tmp_path, **{name: lines(rows)})
    assert found(data) == "lastfm-1k"
    stream = read(tmp_path / "s", data, "lastfm-1k")
    assert of_item(stream, '"Weird Al - i0 12" mix')[:2] == ('i0 12" mix', '"Weird Al')
    assert of_item(stream, "i1")[0] == 'i1 12" mix'
    assert stream.manifest["funnel"][1]["events"] == len(LOG)


def test_quotes_can_be_switched_off_by_name(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", [("a", '"x', T + k) for k in range(3)])
    assert data_config(format="csv", path=str(path), quote="none").quote == ""
    assert histories(read(tmp_path / "s", path, "csv", stages=1, quote="none"))[0]["a"][1] == ['"x'] * 3


def test_otto(tmp_path: Path, reference: object) -> None:
    users = sorted({u for u, *_ in LOG})
    sessions = [
        {"session": user, "events": [
            {"aid": i, "ts": t * 1000, "type": "orders" if r > 4 else "clicks"}
            for u, i, t, r in LOG if u == user
        ]}
        for user in users
    ]  # fmt: skip
    data = folder(tmp_path, **{"otto-recsys-test.jsonl": json.dumps({"session": 1, "events": []}) + "\n"})
    write_json_lines(data / "otto-recsys-train.jsonl", sessions)
    assert found(data) == found(data / "otto-recsys-train.jsonl") == "otto"
    assert histories(read(tmp_path / "s", data, "otto")) == reference
    kept = read(tmp_path / "t", data, "otto", 1, events={"column": "type", "keep": ["orders"]})
    expected = [i for u, i, _, r in LOG if u == "u0" and r > 4]
    assert histories(kept)[0]["u0"] == ([], expected)
    write_json_lines(data / "otto-recsys-train.jsonl", [*sessions, {"session": 9, "events": "none"}])
    with pytest.raises(DataError, match=r"row 5 .* has no item"):
        read(tmp_path / "u", data, "otto")
    competition = folder(data, **{"train.jsonl": json.dumps(sessions[0]) + "\n"})
    assert found(competition) == "otto"
    (competition / "train.jsonl").write_text(json.dumps({"session": "a", "item": "b", "time": T}) + "\n")
    notes = Notes()
    assert (format_at(str(competition), notes), notes.told) == ("jsonl", [])


@pytest.mark.parametrize(
    "meta", ["raw/meta_categories/meta_Games.jsonl", "raw_meta_Games/full-00000-of-00001.parquet"]
)
@pytest.mark.parametrize(
    "log", ["raw/review_categories/Games.jsonl", "benchmark/5core/rating_only/Games.csv"]
)
def test_amazon_2023_as_the_hub_has_it(tmp_path: Path, reference: object, log: str, meta: str) -> None:
    row = {
        "parent_asin": "i3",
        "title": "Zelda",
        "features": ["big"],
        "description": ["long"],
        "categories": ["G", "S"],
    }
    for path in (tmp_path / log, tmp_path / meta):
        path.parent.mkdir(parents=True)
    if log.endswith("jsonl"):
        names = ("user_id", "parent_asin", "timestamp", "rating")
        write_json_lines(
            tmp_path / log, [dict(zip(names, (u, i, t * 1000, r), strict=True)) for u, i, t, r in LOG]
        )
    else:
        head = "user_id,parent_asin,rating,timestamp"
        write_log(tmp_path / log, [(u, i, float(r), t * 1000) for u, i, t, r in LOG], head)
    if meta.endswith("jsonl"):
        write_json_lines(tmp_path / meta, [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / meta)
    stream = read(tmp_path / "s", tmp_path / log, "amazon-2023")
    assert histories(stream) == reference
    assert of_item(stream, "i3") == ("Zelda", "big\nlong", "G > S")


# -- what is recognized ------------------------------------------------------------------------------


def test_a_folder_above_a_data_set_is_read_as_the_only_variant_or_names_the_variants(tmp_path: Path) -> None:
    rows = pa.table({name: pa.array([1, 2, 3], pa.uint32()) for name in ("uid", "timestamp", "item_id")})

    def add(name: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, tmp_path / name)

    add("embeddings.parquet")
    add(".cache/flat/50m/listens.parquet")
    assert found(tmp_path) is None
    add("flat/50m/listens.parquet")
    notes = Notes()
    assert format_at(str(tmp_path), notes) == "yambda"
    assert f"recognized from the files of {tmp_path}/flat/50m; --format" in notes.told[0]
    (source,) = open_source(data_config(format="yambda", path=str(tmp_path))).log.table.files
    assert source == tmp_path / "flat/50m/listens.parquet"
    add("flat/50m/multi_event.parquet")  # a larger file of the same variant
    assert found(tmp_path) == found(tmp_path / "flat") == "yambda"
    add("flat/500m/likes.parquet")
    add("sequential/50m/listens.parquet")
    (tmp_path / "games").mkdir()
    (tmp_path / "games" / "a.inter").write_text("user_id:token\titem_id:token\nu\ti\n")
    told = (
        r"or variants of one \(flat/500m: yambda, flat/50m: yambda, games: recbole, sequential/50m: yambda\)"
    )
    with pytest.raises(DataError, match=f"{told}; give the folder of one"):
        format_at(str(tmp_path), Silent())
    told = r"\(flat/500m: yambda, flat/50m: yambda, sequential/50m: yambda\); give the folder of one"
    with pytest.raises(DataError, match=told):
        open_source(data_config(format="yambda", path=str(tmp_path)))
    with pytest.raises(DataError, match=r"has no userid-timestamp.*; give the folder of the unpacked"):
        open_source(data_config(format="lastfm-1k", path=str(tmp_path)))


def test_variants_within_one_data_set_are_not_mixed(tmp_path: Path) -> None:
    row = lines([(1, "U1", "11/11/2019 9:05:58 AM", "N0 N1", "N2-1 N3-0 N4-1")])
    hub = tmp_path / "hub"
    for name in ("mind/MINDsmall_dev", "mind/MINDsmall_train", "above/small/train", "above/small/dev"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "behaviors.tsv").write_text(row)
    files = [f"review_categories/{name}.jsonl" for name in "AB"]
    review = {"user_id": "u", "parent_asin": "i", "timestamp": T * 1000, "rating": 5.0}
    (hub / "raw" / "review_categories").mkdir(parents=True)
    write_json_lines(hub / "raw" / files[0], [review])
    for path, name in ((tmp_path / "above", "mind"), (tmp_path / "mind", "mind"), (hub, "amazon-2023")):
        assert found(path) == name
    assert len(open_source(data_config(format="mind", path=str(tmp_path / "above"))).log.table.files) == 2
    (tmp_path / "mind" / "MINDsmall_dev").rename(tmp_path / "mind" / "MINDlarge_dev")
    write_json_lines(hub / "raw" / files[1], [review])
    for path, told in (
        (tmp_path / "mind", r"\(MINDlarge_dev, MINDsmall_train\); give one of them"),
        (hub, rf"\(raw/{files[0]}, raw/{files[1]}\); give the file of one"),
    ):
        with pytest.raises(DataError, match=told):
            format_at(str(path), Silent())


def test_other_folders_are_not_taken_for_a_data_set(tmp_path: Path) -> None:
    for name in ("a.all.block_0.parquet", "b.parquet"):
        pq.write_table(pa.table({"user": ["a"], "item": ["b"], "time": [T]}), tmp_path / name)
    assert found(tmp_path) is None
    assert format_at(str(tmp_path), Silent()) == "parquet"
    log = write_log(tmp_path / "log.csv", LOG, "user,item,time,rating")
    rows = write_json_lines(tmp_path / "log.jsonl", [{"user": "a", "item": "b", "time": T}])
    assert (found(log), found(rows), found(tmp_path / "gone.inter")) == (None, None, None)
    assert (format_at(str(log), Silent()), format_at(str(rows), Silent())) == ("csv", "jsonl")


def test_who_names_columns_gets_the_format_of_the_extension(tmp_path: Path) -> None:
    path = tmp_path / "ratings.dat"
    path.write_text(lines([(u, i, r, t) for u, i, t, r in LOG], "::"))
    assert found(path) == "movielens"
    assert format_at(str(path), Silent(), columns_given=True) == "csv"


def test_a_product_table_of_ones_own_replaces_that_of_a_data_set(tmp_path: Path) -> None:
    rows = [("user_id:token", "item_id:token"), *((u, i) for u, i, _, _ in LOG)]
    data = folder(
        tmp_path, **{"shop.inter": lines(rows), "shop.item": "item_id:token\ttitle:token\ni0\told\n"}
    )
    own = tmp_path / "own.csv"
    own.write_text("item,name\ni0,new\n")
    told = {"items": {"path": str(own), "columns": {"title": "name"}}}
    assert of_item(read(tmp_path / "s", data, "recbole", **told), "i0")[0] == "new"


def test_settings_of_one_format_are_refused_by_the_others() -> None:
    for data, match in (
        ({"format": "otto", "columns": {"user": "x"}}, "data.columns has no meaning for data.format: otto"),
        ({"format": "csv", "columns": {"history": "x"}}, "only for data.format: sequences"),
        ({"format": "peso-release", "events": {"column": "a", "keep": ["b"]}}, "data.events has no meaning"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_config({"data": {"path": "x", **data}})


def test_a_stream_of_sequences_is_the_same_after_its_configuration_is_written(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "log.jsonl", [{"user": "a", "history": ["x"], "target": "y"}] * 3)
    data = data_config(format="sequences", path=str(path), stages=1)
    again = data_config(**json.loads(data.model_dump_json()))
    streams = []
    for number, each in enumerate((data, again)):
        (tmp_path / str(number)).mkdir()
        ingest(each, tmp_path / str(number))
        streams.append(histories(Stream.open(tmp_path / str(number))))
    assert streams[0] == streams[1] == [{"a": ([], ["x", "y", "y", "y"])}]


# -- saved by the library `datasets` -----------------------------------------------------------------


def saved(folder: Path, *tables: pa.Table) -> Path:
    """A data set as `save_to_disk` writes it: Arrow's stream format in numbered files."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(tables):05}.arrow" for number in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_saved_data_set_in_several_files(tmp_path: Path, reference: object) -> None:
    fields = list(zip(*LOG, strict=True))
    table = pa.table({"user": fields[0], "item": fields[1], "time": fields[2], "rating": fields[3]})
    path = saved(tmp_path / "log", table.slice(0, 20), table.slice(20))
    assert found(path) == "datasets"
    assert histories(read(tmp_path / "s", path, "datasets")) == reference
    renamed = saved(tmp_path / "other", table.rename_columns(["who", "what", "when", "stars"]))
    named = {"columns": {"user": "who", "item": "what", "time": "when", "rating": "stars"}, "min_rating": 5}
    expected = [i for u, i, _, r in LOG if u == "u0" and r >= 5]
    assert histories(read(tmp_path / "t", renamed, "datasets", 1, **named))[0]["u0"][1] == expected
    with pytest.raises(DataError, match="has no column 'user'"):
        open_source(data_config(format="datasets", path=str(renamed)))
    (path / "data-00001-of-00002.arrow").write_bytes(b"not Arrow")
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow is not readable as Arrow"):
        open_source(data_config(format="datasets", path=str(path)))


def test_saved_splits_of_sequences_are_read_in_their_order(tmp_path: Path) -> None:
    rows = {"test": (["a", "b", "c"], "d"), "train": (["a"], "b"), "validation": (["a", "b"], "c")}
    for split, (history, item) in rows.items():
        saved(tmp_path / "dict" / split, pa.table({"user": ["u"], "history": [history], "next": [item]}))
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": [*rows]}))
    named = {"columns": {"history": "history", "item": "next"}}
    stream = read(tmp_path / "s", tmp_path / "dict", "datasets", 1, **named)
    assert histories(stream) == [{"u": ([], ["a", "b", "c", "d"])}]

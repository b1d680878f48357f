"""Criteo and Avazu text to Parquet: every irregularity published files are known for."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fiited_ray.data import DataError
from fiited_ray.data.convert import Avazu, Criteo, Report, convert

INTEGERS = [f"I{at}" for at in range(1, 14)]
CATEGORIES = [f"C{at}" for at in range(1, 27)]
HASHED = ["site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category", "device_id", "device_ip", "device_model"]
AVAZU = ["id", "click", "hour", "C1", "banner_pos", *HASHED, "device_type", "device_conn_type", *(f"C{at}" for at in range(14, 22))]
HEADER = ",".join(AVAZU).encode()


def criteo_line(label: str = "0", **values: str) -> bytes:
    row = {name: str(at) for at, name in enumerate(INTEGERS)} | dict.fromkeys(CATEGORIES, "0000000a") | values
    return "\t".join([label, *row.values()]).encode()


def avazu_line(click: str = "0", hour: str = "14102100", **values: str) -> bytes:
    row = dict.fromkeys(AVAZU, "7") | dict.fromkeys(HASHED, "85f751fd")
    row |= {"id": "10000169349117863715", "click": click, "hour": hour} | values
    return ",".join(row.values()).encode()


def criteo(folder: Path, *lines: bytes, end: bytes = b"\n", **options: Any) -> tuple[Report, pa.Table]:
    """Convert lines with every rejection allowed, all rows to train.parquet."""
    path = folder / "train.txt"
    path.write_bytes(end.join(lines) + end)
    done = convert([path], folder / "out", Criteo(), **{"split": 0.0, "max_rejected": 1.0} | options)
    return done, pq.read_table(folder / "out" / "train.parquet")


def avazu(folder: Path, *lines: bytes, **options: Any) -> tuple[Report, pa.Table]:
    path = folder / "train.csv"
    path.write_bytes(b"\n".join([HEADER, *lines]) + b"\n")
    done = convert([path], folder / "out", Avazu(), **{"split": 0.0, "max_rejected": 1.0} | options)
    return done, pq.read_table(folder / "out" / "train.parquet")


def test_criteo_columns_are_label_integers_and_parsed_hex_ids(tmp_path: Path) -> None:
    _, table = criteo(tmp_path, criteo_line("1", I2="-3", C1="ffffffff", C26="05DB9164"))
    assert table.column_names == ["label", *INTEGERS, *CATEGORIES]
    assert table.schema.field("label").type == pa.int8()
    assert {table.schema.field(name).type for name in INTEGERS} == {pa.int64()}
    assert {table.schema.field(name).type for name in CATEGORIES} == {pa.int64()}
    row = table.to_pylist()[0]
    assert (row["label"], row["I1"], row["I2"], row["C1"], row["C2"], row["C26"]) == (1, 0, -3, 0xFFFFFFFF, 10, 0x05DB9164)


def test_empty_criteo_fields_are_null(tmp_path: Path) -> None:
    done, table = criteo(tmp_path, criteo_line(I1="", I13="", C1="", C26=""), criteo_line())
    assert done.rejected.total() == 0
    assert [table[name].to_pylist() for name in ("I1", "I13", "C1", "C26")] == [[None, 0], [None, 12], [None, 10], [None, 10]]


def test_an_integer_beyond_32_bits_keeps_its_value(tmp_path: Path) -> None:
    _, table = criteo(tmp_path, criteo_line(I5=str(2**31)), criteo_line(I5="1"))
    assert table["I5"].to_pylist() == [2**31, 1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (criteo_line("2"), "bad label"),
        (criteo_line(""), "bad label"),
        (criteo_line("-1"), "bad label"),
        (criteo_line('"1"'), "bad label"),
        (criteo_line(I3="1.5"), "bad integer"),
        (criteo_line(I3="+3"), "bad integer"),
        (criteo_line(I3="--3"), "bad integer"),
        (criteo_line(I3=" 3"), "bad integer"),
        (criteo_line(I3="NULL"), "bad integer"),
        (criteo_line(I3="1\x00"), "bad integer"),
        (criteo_line(I3="1\r"), "bad integer"),
        (criteo_line(I3="-"), "bad integer"),
        (criteo_line(I3="1-2"), "bad integer"),
        (criteo_line(I3="0x1f"), "bad integer"),
        (criteo_line(I3="9" * 30), "bad integer"),
        (criteo_line(C3="0000000g"), "bad hex id"),
        (criteo_line(C3="0123456789"), "bad hex id"),
        (criteo_line(C3="-1"), "bad hex id"),
        (criteo_line(C3="0x1f"), "bad hex id"),
        (criteo_line(C3='"0000000a"'), "bad hex id"),
        (criteo_line().replace(b"\t", b" "), "wrong number of columns"),
        (criteo_line().replace(b"\t", b","), "wrong number of columns"),
        (criteo_line() + b"\t1", "wrong number of columns"),
        (b"nonsense", "wrong number of columns"),
        (criteo_line(C3="XXXXXXXX").replace(b"XXXXXXXX", b"\xff\xfe000000"), "bad UTF-8"),
        (b"\xff\xff", "bad UTF-8"),
    ],
)
def test_a_bad_criteo_line_is_left_out_and_counted_by_its_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    done, table = criteo(tmp_path, criteo_line(C1="00000001"), line, criteo_line(C1="00000002"))
    assert table["C1"].to_pylist() == [1, 2]
    assert dict(done.rejected) == {reason: 1}
    assert done.examples[reason] == f"{tmp_path / 'train.txt'}, line 2"


def test_a_criteo_line_may_end_in_empty_fields_or_hold_nothing_but_its_label(tmp_path: Path) -> None:
    ending = b"\t".join(criteo_line("1").split(b"\t")[:30]) + b"\t" * 10
    done, table = criteo(tmp_path, ending, b"0" + b"\t" * 39, criteo_line(), end=b"\r\n")
    assert (table.num_rows, done.rejected.total()) == (3, 0)
    assert table["C16"].to_pylist() == [10, None, 10]
    assert table["C17"].to_pylist() == [None, None, 10]
    assert table["C26"].to_pylist() == [None, None, 10]
    assert [table[name].to_pylist()[1] for name in INTEGERS] == [None] * 13


def test_a_last_line_may_end_in_empty_fields_without_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(criteo_line("1") + b"\n0" + b"\t" * 39)
    convert([path], tmp_path / "out", Criteo(), split=0.0)
    assert pq.read_table(tmp_path / "out" / "train.parquet")["C26"].to_pylist() == [10, None]


@pytest.mark.parametrize(("text", "value"), [("-1", -1), ("-2147483648", -(2**31)), ("-0", 0), ("007", 7), ("9" * 18, 10**18 - 1)])
def test_criteo_counts_may_be_negative_padded_or_long(tmp_path: Path, text: str, value: int) -> None:
    _, table = criteo(tmp_path, criteo_line(I2=text, I13=text))
    assert (table["I2"].to_pylist(), table["I13"].to_pylist()) == ([value], [value])


@pytest.mark.parametrize(("text", "value"), [("a", 10), ("0", 0), ("abc1234", 0xABC1234), ("DEADBEEF", 0xDEADBEEF), ("00000000", 0)])
def test_a_criteo_id_may_be_short_or_in_capitals_and_zero_is_no_missing_value(tmp_path: Path, text: str, value: int) -> None:
    _, table = criteo(tmp_path, criteo_line(C1=text, C26=text))
    assert (table["C1"].to_pylist(), table["C26"].to_pylist()) == ([value], [value])


def test_a_criteo_line_of_39_columns_among_others_is_left_out(tmp_path: Path) -> None:
    done, table = criteo(tmp_path, criteo_line("1"), criteo_line().partition(b"\t")[2], criteo_line("1"))
    assert (table["label"].to_pylist(), dict(done.rejected)) == ([1, 1], {"wrong number of columns": 1})


def test_a_last_line_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(criteo_line("1") + b"\n" + criteo_line("0")[:-20])
    done = convert([path], tmp_path / "out", Criteo(), split=0.0, max_rejected=1.0)
    assert (done.train_rows, dict(done.rejected)) == (1, {"wrong number of columns": 1})


def test_a_line_with_several_faults_is_counted_once(tmp_path: Path) -> None:
    done, _ = criteo(tmp_path, criteo_line(), criteo_line("x", I1="y", C1="z"))
    assert dict(done.rejected) == {"bad label": 1}


def test_windows_line_ends_and_a_byte_order_mark_are_no_content(tmp_path: Path) -> None:
    done, table = criteo(tmp_path, b"\xef\xbb\xbf" + criteo_line("1"), criteo_line("0", C26="0000000b"), end=b"\r\n")
    assert done.rejected.total() == 0
    assert table["label"].to_pylist() == [1, 0]
    assert table["C26"].to_pylist() == [10, 11]


def test_windows_blank_lines_are_counted_as_blank(tmp_path: Path) -> None:
    done, table = criteo(tmp_path, criteo_line(), b"", b"", criteo_line(), end=b"\r\n")
    assert (table.num_rows, done.blank, done.rejected.total()) == (2, 2, 0)


def test_a_missing_final_newline_loses_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(criteo_line("1") + b"\n" + criteo_line("0", C26="0000000c"))
    convert([path], tmp_path / "out", Criteo(), split=0.0)
    assert pq.read_table(tmp_path / "out" / "train.parquet")["C26"].to_pylist() == [10, 12]


@pytest.mark.parametrize("block_bytes", [400, 1000, 4096])
def test_rows_do_not_depend_on_where_blocks_are_cut(tmp_path: Path, block_bytes: int) -> None:
    lines = [criteo_line(str(at % 2), I1=str(at), C1=f"{at:08x}") for at in range(50)]
    lines[20:20] = [b"", b"nonsense"]
    done, table = criteo(tmp_path, *lines, block_bytes=block_bytes)
    assert table["I1"].to_pylist() == table["C1"].to_pylist() == list(range(50))
    assert (done.blank, dict(done.rejected)) == (1, {"wrong number of columns": 1})


@pytest.mark.parametrize("kind", ["plain", "gzip", "two gzip members", "zstd"])
def test_compression_is_told_by_content(tmp_path: Path, kind: str) -> None:
    lines = [criteo_line(I1=str(at)) + b"\n" for at in range(100)]
    text, path = b"".join(lines), tmp_path / "day_0"
    if kind == "zstd":
        path.write_bytes(pa.compress(text, "zstd", asbytes=True))
    elif kind == "two gzip members":
        path.write_bytes(gzip.compress(b"".join(lines[:30])) + gzip.compress(b"".join(lines[30:])))
    else:
        path.write_bytes(gzip.compress(text) if kind == "gzip" else text)
    convert([path], tmp_path / "out", Criteo(), split=0.0)
    assert pq.read_table(tmp_path / "out" / "train.parquet")["I1"].to_pylist() == list(range(100))


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_truncated_file_is_refused_by_name_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    text = b"".join(criteo_line(I1=str(at), C1=f"{at * 2654435761 % 2**32:08x}") + b"\n" for at in range(500))
    packed = gzip.compress(text) if kind == "gzip" else pa.compress(text, "zstd", asbytes=True)
    path = tmp_path / "day_0.packed"
    path.write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(DataError, match=r"day_0\.packed: .*; fetch it again"):
        convert([path], tmp_path / "out", Criteo(), block_bytes=4096)
    assert not list((tmp_path / "out").glob("**/*"))


def test_a_gzip_file_with_something_else_behind_it_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "day_0.gz").write_bytes(gzip.compress(criteo_line() + b"\n") + b"not gzip")
    with pytest.raises(DataError, match=r"day_0\.gz: cannot be unpacked: .*; fetch it again"):
        convert([tmp_path / "day_0.gz"], tmp_path / "out", Criteo())


def archive(kind: str) -> bytes:
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as packed:
            packed.writestr("train.txt", criteo_line())
    else:
        with tarfile.open(fileobj=content, mode="w:gz" if kind == "tar.gz" else "w") as packed:
            packed.addfile(tarfile.TarInfo("train.txt"), io.BytesIO())
    return content.getvalue()


@pytest.mark.parametrize(("kind", "message"), [("zip", "a zip archive"), ("tar", "a tar archive"), ("tar.gz", "a tar archive")])
def test_an_archive_is_refused_by_name(tmp_path: Path, kind: str, message: str) -> None:
    (tmp_path / f"dac.{kind}").write_bytes(archive(kind))
    with pytest.raises(DataError, match=rf"dac\.{kind}: {message}; unpack it first"):
        convert([tmp_path / f"dac.{kind}"], tmp_path / "out", Criteo())


def test_utf_16_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(criteo_line().decode().encode("utf-16"))
    with pytest.raises(DataError, match=r"train\.txt: UTF-16 text; convert it to UTF-8"):
        convert([tmp_path / "train.txt"], tmp_path / "out", Criteo())


def test_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder; name the files in it"):
        convert([tmp_path], tmp_path / "out", Criteo())


def test_a_failure_leaves_earlier_output_as_it_was(tmp_path: Path) -> None:
    criteo(tmp_path, criteo_line("1"))
    (tmp_path / "bad.gz").write_bytes(gzip.compress(criteo_line() * 100)[:-9])
    with pytest.raises(DataError):
        convert([tmp_path / "bad.gz"], tmp_path / "out", Criteo())
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["train.parquet"]
    assert pq.read_table(tmp_path / "out" / "train.parquet")["label"].to_pylist() == [1]


@pytest.mark.parametrize("content", [b"", gzip.compress(b"")], ids=["plain", "gzip"])
def test_an_empty_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "day_0").write_bytes(content)
    with pytest.raises(DataError, match="no line could be read"):
        convert([tmp_path / "day_0"], tmp_path / "out", Criteo())


def test_a_file_of_blank_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "day_0").write_bytes(b"\n\n\n")
    with pytest.raises(DataError, match="no line could be read"):
        convert([tmp_path / "day_0"], tmp_path / "out", Criteo())


def test_a_missing_file_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "day_0").write_bytes(criteo_line() + b"\n")
    with pytest.raises(DataError, match="day_1: no such file"):
        convert([tmp_path / "day_0", tmp_path / "day_1"], tmp_path / "out", Criteo())
    assert not list((tmp_path / "out").glob("**/*"))


def test_kaggles_criteo_test_file_is_refused_for_lack_of_labels(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_bytes(b"\n".join(criteo_line().partition(b"\t")[2] for _ in range(3)))
    with pytest.raises(DataError, match=r"test\.txt: lines have 39 columns, so there is no label"):
        convert([tmp_path / "test.txt"], tmp_path / "out", Criteo())


def test_more_rejections_than_allowed_are_an_error_with_the_counts(tmp_path: Path) -> None:
    lines = [criteo_line()] * 97 + [b"nonsense"] * 3
    with pytest.raises(DataError, match=r"3\.00% of the lines are unreadable, more than 2\.00% [^$]*wrong number of columns: 3"):
        criteo(tmp_path, *lines, max_rejected=0.02)
    assert not list((tmp_path / "out").glob("**/*"))
    done, _ = criteo(tmp_path, *lines, max_rejected=0.03)
    assert done.rejected.total() == 3


def test_files_are_taken_in_the_order_given_and_the_last_rows_are_the_test(tmp_path: Path) -> None:
    paths = []
    for name, begin in (("b", 0), ("a", 30)):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(b"".join(criteo_line(I1=str(begin + at)) + b"\n" for at in range(30)))
    done = convert(paths, tmp_path / "out", Criteo(), split=0.25, block_bytes=1000)
    assert pq.read_table(tmp_path / "out" / "train.parquet")["I1"].to_pylist() == list(range(45))
    assert pq.read_table(tmp_path / "out" / "test.parquet")["I1"].to_pylist() == list(range(45, 60))
    assert (done.train_rows, done.test_rows) == (45, 15)


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_lines_behind_the_last_row_wanted_are_not_looked_at(tmp_path: Path, block_bytes: int) -> None:
    lines = [criteo_line(), b"broken", b"", criteo_line("1"), b"broken", b"", criteo_line()]
    report, rows = criteo(tmp_path, *lines, max_rows=2, max_rejected=0.4, split=0, block_bytes=block_bytes)
    assert rows["label"].to_pylist() == [0, 1]
    assert (report.rejected, report.blank) == ({"wrong number of columns": 1}, 1)


def test_no_rows_at_all_cannot_be_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^--max-rows 0: at least 1 is wanted$"):
        criteo(tmp_path, criteo_line(), max_rows=0)


def test_a_test_share_of_all_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a share of at least 0 and below 1 is wanted"):
        criteo(tmp_path, criteo_line(), split=1.0)


def test_avazu_time_hour_and_weekday_come_from_the_hour_column(tmp_path: Path) -> None:
    _, table = avazu(tmp_path, avazu_line("1", "14102100"), avazu_line("0", "14103023"), avazu_line("0", "16022907"))
    moments = [datetime(2014, 10, 21, 0, tzinfo=UTC), datetime(2014, 10, 30, 23, tzinfo=UTC), datetime(2016, 2, 29, 7, tzinfo=UTC)]
    assert table["time"].to_pylist() == [int(each.timestamp()) for each in moments]
    assert table["hour_of_day"].to_pylist() == [each.hour for each in moments]
    assert table["weekday"].to_pylist() == [each.weekday() for each in moments]
    assert table["label"].to_pylist() == [1, 0, 0]


def test_avazu_columns_are_integers_without_the_row_id(tmp_path: Path) -> None:
    _, table = avazu(tmp_path, avazu_line(site_id="1fbe01fe", C14="15706", C20="-1"))
    row = table.to_pylist()[0]
    assert "id" not in row
    assert "click" not in row
    assert (row["site_id"], row["device_model"], row["C14"], row["C20"]) == (0x1FBE01FE, 0x85F751FD, 15706, -1)
    assert all(pa.types.is_integer(each.type) for each in table.schema)


@pytest.mark.parametrize(
    "hour", ["14130100", "14023000", "14102124", "1410210", "1410210x", "", "14100000", "2014102100", "141021", "-4102100", "14102100.0"]
)
def test_an_impossible_avazu_hour_is_rejected(tmp_path: Path, hour: str) -> None:
    done, table = avazu(tmp_path, avazu_line(), avazu_line(hour=hour))
    assert (table.num_rows, dict(done.rejected)) == (1, {"bad hour": 1})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (avazu_line("yes"), "bad label"),
        (avazu_line(""), "bad label"),
        (avazu_line(C14="a"), "bad integer"),
        (avazu_line(C14="1.0"), "bad integer"),
        (avazu_line(app_id='"ecad2386"'), "bad hex id"),
        (avazu_line(app_id="ecad23860"), "bad hex id"),
        (HEADER, "bad label"),
        (avazu_line().rpartition(b",")[0], "wrong number of columns"),
        (avazu_line(app_id="zzzzzzzz"), "bad hex id"),
        (avazu_line() + b",1", "wrong number of columns"),
    ],
)
def test_a_bad_avazu_line_is_counted_by_its_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    done, table = avazu(tmp_path, avazu_line(), line)
    assert (table.num_rows, dict(done.rejected)) == (1, {reason: 1})


def test_empty_avazu_fields_are_null_and_blank_lines_are_counted(tmp_path: Path) -> None:
    done, table = avazu(tmp_path, avazu_line(site_id="", C21=""), b"", avazu_line(site_id="a", C21="-1"), b"")
    assert (done.blank, done.rejected.total()) == (2, 0)
    assert (table["site_id"].to_pylist(), table["C21"].to_pylist()) == ([None, 10], [None, -1])


@pytest.mark.parametrize("row_id", ["10000169349117863715", "1.00001E+19", ""])
def test_avazus_row_id_is_not_read_whatever_it_is(tmp_path: Path, row_id: str) -> None:
    done, _ = avazu(tmp_path, avazu_line(id=row_id), avazu_line(id=row_id))
    assert (done.train_rows, done.rejected.total()) == (2, 0)


def test_avazu_columns_are_found_by_their_names(tmp_path: Path) -> None:
    line = dict(zip(AVAZU, avazu_line("1", C14="15706", site_id="1fbe01fe").decode().split(","), strict=True))
    names = sorted(AVAZU, reverse=True)
    (tmp_path / "a.csv").write_text(",".join(names) + "\n" + ",".join(line[name] for name in names) + "\n")
    convert([tmp_path / "a.csv"], tmp_path / "out", Avazu(), split=0.0)
    (row,) = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert (row["label"], row["C14"], row["site_id"], row["hour_of_day"]) == (1, 15706, 0x1FBE01FE, 0)


def test_avazu_files_may_each_have_a_header_or_be_pieces_of_one_file(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.csv", "b.csv", "piece.csv")]
    for at, path in enumerate(paths):
        path.write_bytes((HEADER + b"\n" if at < 2 else b"") + avazu_line(C14=str(at)) + b"\n")
    done = convert(paths, tmp_path / "out", Avazu(), split=0.0)
    assert done.rejected.total() == 0
    assert pq.read_table(tmp_path / "out" / "train.parquet")["C14"].to_pylist() == [0, 1, 2]


def test_a_quoted_avazu_header_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b",".join(b'"' + name.encode() + b'"' for name in AVAZU) + b"\n" + avazu_line() + b"\n")
    with pytest.raises(DataError, match=r"a\.csv: not Avazu's header: .*missing"):
        convert([tmp_path / "a.csv"], tmp_path / "out", Avazu())


def test_avazus_test_file_is_refused_for_lack_of_clicks(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_bytes(HEADER.replace(b"click,", b"") + b"\n1,14103100\n")
    with pytest.raises(DataError, match=r"test\.csv: there is no column 'click'"):
        convert([tmp_path / "test.csv"], tmp_path / "out", Avazu())


def test_another_csv_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_bytes(b"id,click,hour\n1,0,14103100\n")
    with pytest.raises(DataError, match=r"other\.csv: not Avazu's header: C1, banner_pos, .* missing"):
        convert([tmp_path / "other.csv"], tmp_path / "out", Avazu())


def test_an_avazu_header_may_follow_a_byte_order_mark_and_end_as_on_windows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + HEADER + b"\r\n" + avazu_line("1") + b"\r\n")
    done = convert([tmp_path / "a.csv"], tmp_path / "out", Avazu(), split=0.0)
    assert (done.train_rows, done.rejected.total()) == (1, 0)


def test_the_last_avazu_day_can_be_the_test(tmp_path: Path) -> None:
    lines = [avazu_line(hour=f"1410{day}{hour:02}") for day in (21, 22, 23) for hour in range(24)]
    done, train = avazu(tmp_path, *lines, split="last-day")
    test = pq.read_table(tmp_path / "out" / "test.parquet")
    assert (done.train_rows, done.test_rows) == (48, 24)
    assert max(train["time"].to_pylist()) < min(test["time"].to_pylist())


def test_the_last_day_of_one_day_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--split last-day: all rows are of one day"):
        avazu(tmp_path, avazu_line(), split="last-day")
    assert not list((tmp_path / "out").glob("**/*"))

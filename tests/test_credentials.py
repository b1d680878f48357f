"""No piece of a password is in what is shown of an address, whatever characters it is made of."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fiited_ray.credentials import mask_addresses, redact, scrub

SCHEME = st.sampled_from(["http", "https", "postgresql", "mysql+pymysql", "mssql+pyodbc", "sqlite+pysqlcipher"])
SECRET = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="hostparamdbX*"), min_size=1, max_size=12)
PLACE = st.sampled_from(["host", "host:5000", "host:5000/", "host/db", "host/a/b#c", ""])


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://user:secret@host:5000/x", "https://***@host:5000/x"),
        ("https://token@host", "https://***@host"),
        ("http://user:se#cr?e/t@x@host:5000", "http://***@host:5000"),
        ("http://user:sec?re=t@host", "http://***"),
        ("postgresql://host/db?user=me&password=p@ss", "postgresql://***"),
        ("postgresql://host/db?password=pass#1", "postgresql://host/db?***"),
        ("user:secret@host", "***@host"),
        ("http:user:secret@host", "***@host"),
        ("http://host:5000", "http://host:5000"),
        ("http://host/#/experiments", "http://host/#/experiments"),
        ("sqlite:////home/me@work/a.db?mode=ro", "sqlite:////home/me@work/a.db?mode=ro"),
        ("sqlite+pysqlcipher://:secret@/a.db", "sqlite+pysqlcipher://***@/a.db"),
        ("mlflow.db", "mlflow.db"),
        ("", ""),
    ],
)
def test_an_address_is_shown_without_user_password_and_query(uri: str, shown: str) -> None:
    assert redact(uri) == shown


@given(SCHEME, st.text("userU", max_size=5), SECRET, PLACE)
@example("http", "user", "5000#/?@", "host")
def test_no_password_shows_whatever_it_holds(scheme: str, user: str, password: str, place: str) -> None:
    shown = redact(f"{scheme}://{user}:{password}@{place}")
    assert shown in (f"{scheme}://***@{place}", f"{scheme}://***")


@given(SCHEME, SECRET, st.sampled_from(["password", "token", "sslkey"]))
def test_no_secret_of_a_query_shows(scheme: str, secret: str, name: str) -> None:
    assert redact(f"{scheme}://host/db?{name}={secret}") in (f"{scheme}://host/db?***", f"{scheme}://***")


@given(st.text(), st.sampled_from(["", "http://", "https://u:p@", "sqlite:///"]))
def test_redacting_twice_is_redacting_once(text: str, start: str) -> None:
    assert redact(redact(start + text)) == redact(start + text)


@given(SCHEME, st.text("jkqvyz", min_size=1), st.sampled_from("#?/@:&"), st.text("JKQVYZ", min_size=1), PLACE, st.integers(0, 3))
def test_a_librarys_words_never_tell_a_piece_of_the_password(scheme: str, first: str, mark: str, last: str, place: str, form: int) -> None:
    uri = f"{scheme}://U:{first}{mark}{last}@{place}"
    words = [f"no answer from {uri}/api", f"cannot parse {uri[9:]!r}", f"bad port {first!r}", f"bad path '{last}@'"][form]
    told = scrub(words, uri)
    assert first not in told
    assert last not in told


def test_a_librarys_words_stay_where_they_tell_nothing() -> None:
    assert scrub("no answer from http://user:secret@host/api", "http://user:secret@host/") == "no answer from http://***@host/api"
    assert scrub("no answer from http://host/api", "http://host") == "no answer from http://host/api"
    assert scrub("cannot parse 'user:sec'", "http://user:sec#ret@host") == ""


def test_addresses_within_a_text_are_masked() -> None:
    assert mask_addresses("a http://u:p@h and ['b://q@x@h'] c@d") == "a http://***@h and ['b://***@h'] c@d"

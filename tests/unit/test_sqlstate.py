"""The map from SQLSTATE to what happens next, code by code: what is not listed halts."""

import psycopg.errors
import pytest

from consumerd.sqlstate import CODES, Next, next_step

EXPECTED = {
    Next.RECONNECT: "08000 08001 08003 08004 08006 08007 25006 25P03 26000 28P01 42P05 57P01 57P02 57P03 57P05",
    Next.RETRY: "40001 40P01 55P03",
    Next.SMALLER: "57014 25P04",
    Next.ISOLATE: (
        "21000 22000 22001 22003 22004 22007 22008 22009 22012 22015 22018 22019 22021 22023 22025 22026 2200M 2200N "
        "2200S 2200T 2201B 2201E 2201F 2202E 22030 22031 22032 22P01 22P02 22P05 23001 23502 23503 23505 23514 23P01 "
        "54000 54001 P0001"
    ),
    Next.RELOAD: "3F000 42703 42P01",
    Next.HALT: "2200H 22P03 22P04",
}
LISTED = [(code, step) for step, codes in EXPECTED.items() for code in codes.split()]

UNLISTED = [
    "42501",  # insufficient_privilege
    "42804",  # datatype_mismatch
    "0A000",  # feature_not_supported
    "22024",  # of an isolating code's class, but not listed
    "23000",
    "25001",
    "25P02",  # in_failed_sql_transaction
    "28000",
    "3D000",
    "40002",
    "44000",
    "55000",
    "57P04",  # database_dropped
    "P0002",
    "P0003",
    "XX000",
    "XX001",  # data_corrupted
    "U1234",  # a trigger's own code
    "",
    "99999",
]


@pytest.mark.parametrize(("code", "step"), LISTED)
def test_listed(code: str, step: Next) -> None:
    """Each listed code leads to its own next step."""
    assert next_step(code) is step


def test_the_list_is_whole() -> None:
    """A code is added to the table only together with its row here."""
    assert sorted(CODES) == sorted(code for code, _ in LISTED)


@pytest.mark.parametrize("code", ["53000", "53100", "53200", "53300", "53400", "58000", "58030", "58P01"])
def test_resources_and_system(code: str) -> None:
    """The server's lack of resources and its own I/O errors are waited for."""
    assert next_step(code) is Next.WAIT


@pytest.mark.parametrize("code", UNLISTED)
def test_unlisted_halts(code: str) -> None:
    """A code that is not listed halts, whatever its class."""
    assert next_step(code) is Next.HALT


def test_codes_exist() -> None:
    """Each listed code is one that Postgres has."""
    assert [code for code in CODES if psycopg.errors.lookup(code).sqlstate != code] == []

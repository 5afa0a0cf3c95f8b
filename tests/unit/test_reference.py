"""docs/configuration.md says what the config's types say."""

from tests import reference


def test_the_page_is_current() -> None:
    """The page is what `make docs` would write now."""
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page()


def test_each_key_is_described() -> None:
    """A key without a docstring is missed; defaults are written as TOML would."""
    page = reference.page()
    for row in (
        "| `max_bytes` | `8MiB` |",
        "| `initial` | `100ms` |",
        "| `from` | must be there |",
        "| `create` | `false` |",
        "| `group_id` | `consumerd.<handler>` |",
    ):
        assert row in page
    for of_the_file in ("| `path` |", "| `name` | none |"):
        assert of_the_file not in page

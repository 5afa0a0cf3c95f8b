"""docs/configuration.md says what the config's types say, and docs/metrics.md what the metrics' declarations say."""

from consumerd import metrics
from tests import reference, reference_metrics


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


def test_the_metrics_page_is_current() -> None:
    """Its tables are what `make docs` would write now."""
    text = reference_metrics.PAGE.read_text(encoding="utf-8")
    assert text == reference_metrics.page(text)


def test_each_metric_is_described() -> None:
    """Each metric that is exposed has its name, type, labels, sentence and use in the table, and its label's values."""
    page = reference_metrics.page(reference_metrics.PAGE.read_text(encoding="utf-8"))
    declared = reference_metrics.declared()
    ours = {name for names in metrics.registry._collector_to_names.values() for name in names if "consumerd" in name}
    assert {reference_metrics.exposed(each) for each in declared.values()} <= ours
    assert [] == [name for name in declared if name not in reference_metrics.uses()]
    assert "| `consumerd_lag_seconds` | gauge | handler, topic, partition | Age of the oldest message" in page
    assert "| `consumerd_build_info` | gauge | version |" in page
    assert "| `consumerd_retries_total` | `cause`: `postgres`, `kafka`, `dead_letter`, `transform` |" in page
    for line in ("consumerd_flushes_total` | counter", "consumerd_connection_wait_seconds` | histogram"):
        assert line in page

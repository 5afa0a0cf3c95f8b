"""consumerd: Kafka topics into Postgres, exactly once, in batches."""

__version__ = "0.1.0"

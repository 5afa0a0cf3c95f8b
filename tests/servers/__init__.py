"""Real servers for tests: a Kafka broker, a Postgres, a TCP proxy to break connections, and the daemon itself."""

"""Other ways to carry a topic into a table, measured beside the daemon; run by hand (`make bench-peers`)."""

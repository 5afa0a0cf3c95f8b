"""`consumerd dlq`: what is done about letters; a file for each step."""

"""Tests of consumerd. A package so that tests can import tests.servers, and `python -m tests.bench` works."""

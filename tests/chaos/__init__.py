"""The chaos checker: the daemon under a seeded schedule of faults, and every record compared with what was sent."""

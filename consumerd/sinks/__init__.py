"""Where rows go: one file each; `base.py` has the protocol."""

"""Data that is generated from a pinned version of another program, and the scripts that generate it."""

"""Tests of the C core, driven from Python."""

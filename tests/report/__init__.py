"""Tests of worldmpc.report."""

"""Benchmarks: run.py times the ops into a CSV, report.py turns the CSV into the README's tables and the plots."""

"""Malformed inputs of every kind that the product reads, and what may come of each.

``python -m tests.faults.malformed --seed 1 --count 5000`` tries that many and prints a table.
"""

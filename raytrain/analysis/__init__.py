"""Measurements and figures of trained models and searches: evaluations, text metrics, tables, figures, reports."""

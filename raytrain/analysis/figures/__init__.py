"""Figures: functions from plain data to a matplotlib ``Figure``. They read nothing and keep no global state."""

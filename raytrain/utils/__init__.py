"""Small utilities with no better place: errors, files, retries, text, validation of JSON."""

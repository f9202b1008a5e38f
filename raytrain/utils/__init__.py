"""Small tools without a home of their own: errors, files, retries, text, validation of JSON."""

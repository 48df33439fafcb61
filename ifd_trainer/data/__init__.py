"""Rows to token ids: formats, chat templates, encoding, files."""

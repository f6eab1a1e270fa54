"""Bands inside other libraries, each imported by whoever uses it."""

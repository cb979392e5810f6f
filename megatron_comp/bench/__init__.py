"""Measured times of codecs, collectives and links."""
